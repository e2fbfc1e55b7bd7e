//! R's view of rustcluster-core: thin shells that convert, call and hand errors back as values.
//!
//! Every function here runs on R's thread. No R function that can jump is called outside of
//! [`unwind`]. A value that is not what was asked for tells R what happened (see R/boundary.R):
//! `NULL`, not yet; a character vector, a failure; a pairlist, a jump of R's to be taken up.

#![allow(missing_docs, reason = "nothing is public but what extendr generates")]
#![allow(
    clippy::needless_pass_by_value,
    reason = "extendr passes arguments by value"
)]

mod agent;
mod call;
mod failure;
mod head;
mod job;
mod mapped;
mod plain;
mod repeat;
mod status;
mod stream;
mod unit;
mod unwind;
mod worker;

use extendr_api::prelude::*;

#[global_allocator]
static ALLOCATOR: rustcluster_core::platform::reserve::Reserving =
    rustcluster_core::platform::reserve::Reserving;

/// Cores that this process may use: affinity, cgroups and schedulers' variables considered.
/// @noRd
#[extendr]
fn usable_cores() -> i32 {
    i32::try_from(rustcluster_core::platform::cores::usable_cores()).unwrap_or(i32::MAX)
}

/// Whether it is the address of an interface of this machine. Of the loopback's only the usual one
/// counts: others may be forwarded to other machines.
/// @noRd
#[extendr]
fn is_own_address(text: &str) -> bool {
    rustcluster_core::launch::is_own_address(text)
}

extendr_module! {
    mod rustcluster;
    fn usable_cores;
    fn is_own_address;
    use agent;
    use call;
    use head;
    use job;
    use status;
    use worker;
}
