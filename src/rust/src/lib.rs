//! The functions of rustcluster-core for R: thin wrappers that convert arguments, call the core, and return
//! errors as values.
//!
//! Every function here runs on R's thread. R functions that can jump are called only under [`r::unwind`]. A
//! value of an unexpected type tells R what happened (see R/boundary.R): `NULL` means not yet, a list of class
//! `rustcluster_rust_failure` is a failure, and a pairlist is a jump of R that R has to continue.

#![allow(missing_docs, reason = "nothing is public but what extendr generates")]
#![allow(
    clippy::needless_pass_by_value,
    reason = "extendr passes arguments by value"
)]

mod agent;
mod codec;
mod gateway;
mod head;
mod r;
mod worker;

use extendr_api::prelude::*;

#[global_allocator]
static ALLOCATOR: rustcluster_core::platform::reserve::Reserving =
    rustcluster_core::platform::reserve::Reserving;

/// Returns the number of cores that this process may use, by affinity, cgroups and the variables of batch
/// schedulers.
/// @noRd
#[extendr]
fn usable_cores() -> i32 {
    i32::try_from(rustcluster_core::platform::cores::usable_cores()).unwrap_or(i32::MAX)
}

/// Returns whether an address belongs to an interface of this machine. Of the loopback addresses only the usual
/// one counts, because others may be forwarded to other machines.
/// @noRd
#[extendr]
fn is_own_address(text: &str) -> bool {
    rustcluster_core::head::launch::is_own_address(text)
}

/// Returns the addresses by which other machines may reach this one.
/// @noRd
#[extendr]
fn own_addresses() -> Vec<String> {
    let addresses = rustcluster_core::platform::socket::own_addresses();
    addresses.iter().map(ToString::to_string).collect()
}

extendr_module! {
    mod rustcluster;
    fn usable_cores;
    fn is_own_address;
    fn own_addresses;
    use agent;
    use head;
    use worker;
    use gateway;
}
