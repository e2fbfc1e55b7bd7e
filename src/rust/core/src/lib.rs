//! rustcluster without R: the head's hub, the hosts' agents, the workers' channels, and the wire
//! between them.
//!
//! Nothing here calls R, so everything builds and tests with cargo alone. [`protocol`], [`head::scheduler`]
//! and [`agent::worker_table`] do no I/O at all.

#![cfg_attr(
    test,
    allow(clippy::unchecked_time_subtraction, reason = "a panic fails the test")
)]

#[cfg(not(target_os = "linux"))]
compile_error!("rustcluster runs on Linux");

pub mod agent;
pub mod gateway;
pub mod head;
pub mod platform;
pub mod protocol;
pub mod relay;
pub mod store;
pub mod worker;
