//! The guard of the jobs of a batch engine, for R.

use super::handle::{SLICE, strings};
use crate::r::failure::Failure;
use extendr_api::prelude::*;
use rustcluster_core::head::guard_process::GuardProcess;
use std::cell::RefCell;
use std::time::Duration;

type Guard = RefCell<GuardProcess>;

fn with_guard(guard: &Robj, run: impl FnOnce(&Guard) -> Robj) -> Robj {
    // The pointer is nil after it has been saved and loaded.
    let pointer: Result<&ExternalPtr<Guard>, _> = guard.try_into();
    match pointer.and_then(|pointer| pointer.try_addr()) {
        Ok(guard) => run(guard),
        Err(_) => Failure::new("restored").into(),
    }
}

/// Starts a guard in a session of its own. It ends the jobs when it is released, or when this process ends.
/// @noRd
#[extendr]
fn guard_start(command: Robj) -> Robj {
    let command: Vec<_> = strings(&command).into_iter().map(Into::into).collect();
    match GuardProcess::start(&command) {
        Ok(guard) => ExternalPtr::new(RefCell::new(guard)).into(),
        Err(error) => Failure::new("start_failed")
            .with("reason", error.to_string())
            .into(),
    }
}

/// Returns the process id of a guard.
/// @noRd
#[extendr]
fn guard_pid(guard: Robj) -> Robj {
    with_guard(&guard, |guard| (guard.borrow().pid() as i32).into())
}

/// Sends a line to a guard. Returns whether the guard is there to read it.
/// @noRd
#[extendr]
fn guard_send(guard: Robj, line: &str) -> Robj {
    with_guard(&guard, |guard| guard.borrow().send(line).is_ok().into())
}

/// Tells a guard to end the jobs.
/// @noRd
#[extendr]
fn guard_release(guard: Robj) -> Robj {
    with_guard(&guard, |guard| {
        guard.borrow_mut().release();
        ().into()
    })
}

/// Returns whether a guard has ended; waits up to `max` seconds for that, and not longer than one slice.
/// @noRd
#[extendr]
fn guard_ended(guard: Robj, max: f64) -> Robj {
    let max = Duration::try_from_secs_f64(max).unwrap_or_default();
    with_guard(&guard, |guard| guard.borrow().wait(max.min(SLICE)).into())
}

extendr_module! {
    mod guard_process;
    fn guard_start;
    fn guard_pid;
    fn guard_send;
    fn guard_release;
    fn guard_ended;
}
