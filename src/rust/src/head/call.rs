//! Calls: tasks of no job, which any of several workers may run. Calls are sent one by one, and the answer of
//! each is requested by the call's number.

use super::handle::{DroppableCall, SLICE, may_send, rank_of, with_cluster};
use super::send::send_call;
use super::{nodes, retry};
use crate::codec::mapped;
use crate::r::failure::Failure;
use crate::r::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, SEXP};
use rustcluster_core::head::hub::Kept;
use rustcluster_core::head::retry::Attempts;
use rustcluster_core::head::scheduler::events::Outcome;
use rustcluster_core::head::scheduler::pool::CallLocation;
use rustcluster_core::protocol::ids::{KEEP, Rank, TaskId};
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// Returns the number of a call that has not been sent yet. `keep`: whether agents keep its answer for the next head if
/// this one disconnects.
/// @noRd
#[extendr]
fn call_number(handle: Robj, keep: bool) -> Robj {
    with_cluster(&handle, |cluster| {
        let task = cluster.hub.borrow_mut().number_call() | if keep { KEEP } else { 0 };
        Ok((task as f64).into())
    })
}

/// Sends the call with this number to the first of these workers that is idle. `what`: the name of the call in
/// warnings.
/// @noRd
#[extendr]
fn call_submit(handle: Robj, ranks: &[i32], task: f64, what: &str, message: Robj) -> Robj {
    let task = task as TaskId;
    with_cluster(&handle, |cluster| {
        let mut any_of = {
            let hub = cluster.hub.borrow();
            let ranks = ranks.iter().map(|&rank| rank_of(&hub, rank));
            ranks.collect::<std::result::Result<Vec<Rank>, Failure>>()?
        };
        any_of.sort_unstable();
        let any_of: Arc<[Rank]> = any_of.into();
        may_send(cluster)?;
        let call = DroppableCall {
            message: message.clone(),
            any_of: any_of.clone(),
            what: what.to_owned(),
            attempts: Attempts::default(),
        };
        cluster.calls.borrow_mut().insert(task, call);
        if let Err(Jump(token)) = send_call(cluster, &any_of, task, false, &message) {
            cluster.forget_message_of_call(task);
            return Ok(token);
        }
        Ok(().into())
    })
}

/// Returns the answer to a call: `NULL` if the call has not ended, or is being retried after a worker failure.
/// The same answer is returned until the call is forgotten.
/// @noRd
#[extendr]
fn call_take(handle: Robj, task: f64) -> Robj {
    let task = task as TaskId;
    with_cluster(&handle, |cluster| {
        let end = cluster.hub.borrow().call_end(task);
        let Some(end) = end else {
            return Ok(().into());
        };
        let ended = |failure: Failure| Err(failure.with("task", task));
        match end.outcome {
            // The answer stays in the hub until it has been read, because R may jump.
            Outcome::Answer(body) => match nodes::read_answer(body, 0) {
                Ok(answer) => Ok(answer),
                Err(Jump(token)) => Ok(token),
            },
            Outcome::Lost(termination) => retry::call_lost(cluster, end.rank, task, &termination),
            Outcome::TimedOut => ended(Failure::new("timeout").with("rank", end.rank + 1)),
            Outcome::Cancelled | Outcome::Revoked => ended(Failure::new("cancelled")),
        }
    })
}

/// Returns the answers that agents have kept while they had no head, in the order in which they ended: a list of the
/// agents, the numbers of the answers, and the times (seconds since 1970). `NULL`: the agents have not all responded yet;
/// waits up to one slice for that. `ask`: whether to ask them.
/// @noRd
#[extendr]
fn kept_list(handle: Robj, ask: bool) -> Robj {
    with_cluster(&handle, |cluster| {
        if ask {
            cluster.hub.borrow_mut().ask_kept();
        }
        let kept = cluster.hub.borrow().kept(SLICE);
        let Some(kept) = kept else {
            return Ok(().into());
        };
        let numbers = |of: &dyn Fn(&Kept) -> f64| kept.iter().map(of).collect::<Vec<f64>>();
        Ok(list!(
            agent = numbers(&|kept| (kept.agent + 1) as f64),
            number = numbers(&|kept| kept.number as f64),
            ended = numbers(&|kept| kept.ended as f64 / 1000.0)
        )
        .into())
    })
}

/// Returns an answer of kept_list(), `FALSE` if it is not there any more, or `NULL` if it has not arrived yet; waits up to
/// one slice for that. `ask`: whether to ask for it.
/// @noRd
#[extendr]
fn kept_read(handle: Robj, agent: f64, number: f64, ask: bool) -> Robj {
    with_cluster(&handle, |cluster| {
        if ask {
            let mut hub = cluster.hub.borrow_mut();
            hub.ask_answer((agent as usize).saturating_sub(1), number as u64);
        }
        let answer = cluster.hub.borrow().answer(SLICE);
        match answer {
            None => Ok(().into()),
            Some(None) => Ok(false.into()),
            Some(Some(body)) => {
                let body = mapped::in_memory(body).map_err(|error| {
                    Failure::new("call_failed").with("reason", error.to_string())
                })?;
                match nodes::read_answer(body, 0) {
                    Ok(answer) => Ok(answer),
                    Err(Jump(token)) => Ok(token),
                }
            }
        }
    })
}

/// Drops an answer of kept_list(), which has been read.
/// @noRd
#[extendr]
fn kept_drop(handle: Robj, agent: f64, number: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let mut hub = cluster.hub.borrow_mut();
        hub.drop_answer((agent as usize).saturating_sub(1), number as u64);
        Ok(().into())
    })
}

/// Returns the progress events of a call that have arrived since this function was last called, as a list of
/// raw vectors.
/// @noRd
#[extendr]
fn call_progress_events(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let progress_events = cluster
            .hub
            .borrow_mut()
            .call_progress_events(task as TaskId);
        let progress_events = progress_events
            .iter()
            .map(|progress_event| Raw::from_bytes(progress_event));
        Ok(List::from_values(progress_events).into())
    })
}

/// Returns the rank of the worker that runs a call; 0 if the call waits for a worker, `NA` if it has ended.
/// @noRd
#[extendr]
fn call_location(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let location = match cluster.hub.borrow().call_location(task as TaskId) {
            CallLocation::Waiting => Some(0),
            CallLocation::With(rank) => Some(rank as i32 + 1),
            CallLocation::Nowhere => None,
        };
        Ok(location.into())
    })
}

/// Removes a call whose result is no longer needed. A call that has not ended is cancelled.
/// @noRd
#[extendr]
fn call_forget(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let task = task as TaskId;
        cluster.hub.borrow_mut().forget_call(task);
        cluster.forget_message_of_call(task);
        Ok(().into())
    })
}

/// Removes a call whose object was garbage-collected. A call that has not ended is cancelled. This function is
/// for finalizers, which R may run while another function of this package is running.
/// @noRd
#[extendr]
fn call_drop(handle: Robj, task: f64) -> Robj {
    nodes::drop_call(&handle, task as TaskId)
}

/// Requests that R is woken when this call has ended: see [`calls_wake`].
/// @noRd
#[extendr]
fn call_notify(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        cluster.hub.borrow_mut().notify_call(task as TaskId);
        Ok(().into())
    })
}

/// Waits up to one slice for the end of this call, or for another event that R has to handle.
/// @noRd
#[extendr]
fn call_wait(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let mut hub = cluster.hub.borrow_mut();
        hub.wait_for_call(task as TaskId, SLICE);
        Ok(().into())
    })
}

/// Returns the numbers of the calls that R has to handle: calls that have ended and for which R is to be woken,
/// and calls whose worker has failed.
/// @noRd
#[extendr]
fn calls_to_check(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let calls = cluster.hub.borrow_mut().calls_to_check();
        let calls: Vec<f64> = calls.into_iter().map(|task| task as f64).collect();
        Ok(calls.into())
    })
}

unsafe extern "C" {
    fn rustcluster_later() -> *mut c_void;
    fn rustcluster_wake(later: *mut c_void, number: usize, l: c_int);
}

/// The function of package 'later' that any thread may call.
struct Later(*mut c_void);

// SAFETY: this is the address of a function, which does not change.
unsafe impl Send for Later {}

impl Later {
    pub(super) fn wake(&self, number: usize, in_loop: c_int) {
        // SAFETY: the function was found by rustcluster_later(); any thread may call it.
        unsafe { rustcluster_wake(self.0, number, in_loop) };
    }
}

unsafe extern "C" fn find_later(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the pointer of calls_wake, which outlives this call. This frame owns nothing that needs
    // to be dropped when R jumps.
    unsafe {
        *data.cast::<*mut c_void>() = rustcluster_later();
        R_NilValue
    }
}

/// From now on, these event loops of package 'later' call callsWoken(number) when R has to handle a call.
/// @noRd
#[extendr]
fn calls_wake(handle: Robj, number: f64, loops: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        let mut later: *mut c_void = std::ptr::null_mut();
        if let Err(Jump(token)) = unwind::run(find_later, &mut later) {
            return Ok(token);
        }
        let (later, number, loops) = (Later(later), number as usize, loops.to_vec());
        let wake = move || {
            for &in_loop in &loops {
                later.wake(number, in_loop);
            }
        };
        cluster.hub.borrow_mut().wake_with(Box::new(wake));
        Ok(().into())
    })
}

extendr_module! {
    mod call;
    fn call_number;
    fn call_submit;
    fn call_take;
    fn kept_list;
    fn kept_read;
    fn kept_drop;
    fn call_progress_events;
    fn call_location;
    fn call_forget;
    fn call_drop;
    fn call_notify;
    fn call_wait;
    fn calls_to_check;
    fn calls_wake;
}
