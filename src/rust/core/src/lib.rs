//! rustcluster without R: the head's hub, the hosts' agents, the workers' channels, and the wire
//! between them.
//!
//! Nothing here calls R, so everything builds and tests with cargo alone. [`protocol`], [`scheduler`]
//! and [`agent::state`] do no I/O at all.

#![cfg_attr(
    test,
    allow(clippy::unchecked_time_subtraction, reason = "a panic fails the test")
)]

pub mod activity;
pub mod agent;
pub mod hub;
pub mod launch;
pub mod payloads;
pub mod planner;
pub mod platform;
pub mod protocol;
pub mod scheduler;
pub mod worker;
