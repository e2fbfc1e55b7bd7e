//! What head, agents and workers say to each other. No I/O, no clock; of this crate only
//! [`platform`](crate::platform) is used.

pub mod body;
pub mod control;
pub mod dedup;
pub mod error;
pub mod frame;
pub mod handshake;
pub mod heartbeat;
pub mod ids;
pub mod limits;
pub mod send_queue;
pub mod setup_calls;
