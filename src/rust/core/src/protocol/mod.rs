//! The protocol between head, agents and workers. It does no I/O and reads no clock; of this crate
//! it uses only [`platform`](crate::platform).

pub mod body;
pub mod control;
pub mod dedup;
pub mod error;
pub mod frame;
pub mod handshake;
pub mod heartbeat;
pub mod ids;
pub mod limits;
pub mod noise;
pub mod send_queue;
pub mod setup_calls;
pub mod truncate;
