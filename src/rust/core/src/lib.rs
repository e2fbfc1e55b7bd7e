//! rustcluster without R: the head's hub, the hosts' agents, the workers' channels, and the wire
//! between them.
//!
//! Nothing here calls R, so everything builds and tests with cargo alone. [`frame`], [`message`],
//! [`scheduler`] and [`agent::state`] do no I/O at all.

#![cfg_attr(
    test,
    allow(clippy::unchecked_time_subtraction, reason = "a panic fails the test")
)]

pub mod activity;
pub mod agent;
pub mod cores;
pub mod elf;
pub mod frame;
pub mod greeting;
pub mod hub;
pub mod launch;
pub mod limits;
pub mod message;
pub mod outbuf;
pub mod payloads;
pub mod planner;
pub mod pulse;
pub mod reserve;
pub mod scheduler;
pub mod share;
pub mod signals;
pub mod sys;
pub mod worker;
