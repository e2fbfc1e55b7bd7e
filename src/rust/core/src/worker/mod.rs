//! The worker's side: what a worker process needs of this crate.

pub mod channel;
