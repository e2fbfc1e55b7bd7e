//! Applies the retry policy to single tasks and calls after worker failures: see [`rustcluster_core::head::retry`].
//! For jobs, [`rustcluster_core::head::job`] does so. R is notified of each
//! worker failure that was handled, and decides nothing.

use super::handle::{Cluster, may_send, with_cluster};
use super::send;
use crate::r::failure::Failure;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::hub::NO_JOB;
use rustcluster_core::head::retry::{Attempts, Policy, Verdict, is_reported, log_attempt};
use rustcluster_core::head::scheduler::events::Termination;
use rustcluster_core::protocol::ids::{CALLS, JobId, Rank, TaskId};

/// Returns the failure of the worker that had a task.
fn worker_failure(cluster: &Cluster, rank: Rank, termination: &Termination) -> Failure {
    let now = cluster.hub.borrow().worker(rank).termination;
    Failure::worker_failure(rank, termination, now.as_deref())
}

/// A worker failure for R, and whether R raises it as a warning.
struct Lost {
    failure: Failure,
    reported: bool,
}

impl Lost {
    fn new(cluster: &Cluster, assigned: Rank, termination: &Termination, task: TaskId) -> Lost {
        let replaced = cluster.hub.borrow().worker(assigned).termination.is_none();
        Lost {
            failure: worker_failure(cluster, assigned, termination).with("task", task),
            reported: is_reported(termination, replaced),
        }
    }

    /// Records that the verdict was carried out. `again`: whether the task is retried.
    fn dealt_with(self, cluster: &Cluster, job: JobId, again: bool) -> Failure {
        if self.reported {
            let reported = self.failure.clone().with("again", again);
            cluster.failures.borrow_mut().report(job, reported);
        }
        self.failure
    }
}

/// Handles the failure of the worker at `assigned` for a task that R gave to `rank`. R knows the node by its
/// index `node`. Returns `NULL` if R has to continue waiting.
///
/// # Errors
/// If the worker failure is an error. The error is returned again until R has removed the task.
pub(super) fn task_lost(
    cluster: &Cluster,
    (rank, assigned): (Rank, Rank),
    node: i32,
    task: TaskId,
    termination: &Termination,
) -> std::result::Result<Robj, Failure> {
    let (index, job, verdict, raises) = {
        let messages = cluster.messages.borrow();
        let message = messages.get(&task).ok_or_else(|| Failure::new("no_task"))?;
        let policy = cluster.failures.borrow().policy(message.job);
        let verdict = message.attempts.verdict(policy, termination);
        let attempt = message.attempts.failures().len() + 1;
        log_attempt(task, assigned, attempt, verdict == Verdict::Retry);
        (message.index, message.job, verdict, policy.raises)
    };
    let mut lost = Lost::new(cluster, assigned, termination, task);
    lost.failure = lost.failure.with("node_index", node).with("index", index);
    let record = |lost: Lost, again: bool| {
        let failure = lost.dealt_with(cluster, job, again);
        if let Some(message) = cluster.messages.borrow_mut().get_mut(&task) {
            message.attempts.record(failure, termination);
        }
    };
    match verdict {
        Verdict::Raise if raises => Err(lost.failure.with("again", false)),
        Verdict::Raise => Err(lost.failure),
        Verdict::GiveUp => {
            cluster.hub.borrow_mut().give_up(task);
            record(lost, false);
            Ok(().into())
        }
        Verdict::Retry => {
            if let Err(Jump(token)) = send_again(cluster, rank, task)? {
                return Ok(token);
            }
            record(lost, true);
            Ok(().into())
        }
    }
}

/// Retries a task that R gave to `rank`.
///
/// # Errors
/// If no worker can run the task, or the task is bound to a lost worker: waiting would not help.
fn send_again(
    cluster: &Cluster,
    rank: Rank,
    task: TaskId,
) -> std::result::Result<std::result::Result<(), Jump>, Failure> {
    may_send(cluster)?;
    let (message, setup_call, blobs) = match cluster.messages.borrow().get(&task) {
        Some(m) => (m.message.clone(), m.setup_call, m.blobs),
        None => return Err(Failure::new("no_task")),
    };
    let blob = |assigned| blobs.of(cluster.format(assigned));
    let started = cluster
        .hub
        .borrow_mut()
        .try_again(rank, task, setup_call, blob);
    let started = started.map_err(|(assigned, termination)| {
        Failure::termination(assigned, &termination).with("task", task)
    })?;
    Ok(send::write(cluster, &started, &message).map(drop))
}

/// Handles the failure of the worker at `assigned` for a call. Returns `NULL` if R has to continue waiting.
///
/// # Errors
/// If the call has failed. The error is returned again until the call is forgotten.
pub(super) fn call_lost(
    cluster: &Cluster,
    assigned: Rank,
    task: TaskId,
    termination: &Termination,
) -> std::result::Result<Robj, Failure> {
    let (any_of, what, message, attempts) = {
        let calls = cluster.calls.borrow();
        let call = calls.get(&task).ok_or_else(|| Failure::new("no_task"))?;
        let attempts = call.attempts.clone();
        (
            call.any_of.clone(),
            call.what.clone(),
            call.message.clone(),
            attempts,
        )
    };
    let lost = Lost::new(cluster, assigned, termination, task);
    let policy = cluster.failures.borrow().policy(CALLS);
    let verdict = attempts.verdict(policy, termination);
    log_attempt(
        task,
        assigned,
        attempts.failures().len() + 1,
        verdict == Verdict::Retry,
    );
    match verdict {
        Verdict::Raise => Err(lost.failure),
        Verdict::GiveUp => {
            let mut attempts = attempts;
            attempts.record(lost.failure, termination);
            Err(given_up(&attempts).with("task", task))
        }
        Verdict::Retry => {
            let living = |&rank: &Rank| cluster.hub.borrow().worker(rank).termination.is_none();
            if !any_of.iter().any(living) {
                return Err(lost.failure);
            }
            may_send(cluster)?;
            if let Err(Jump(token)) = send::send_call(cluster, &any_of, task, true, &message) {
                return Ok(token);
            }
            let lost = Lost {
                failure: lost.failure.with("tasks", what),
                ..lost
            };
            let failure = lost.dealt_with(cluster, CALLS, true);
            match cluster.calls.borrow_mut().get_mut(&task) {
                Some(call) => call.attempts.record(failure, termination),
                // The call was dropped while it was being sent.
                None => cluster.hub.borrow_mut().forget_call(task),
            }
            Ok(().into())
        }
    }
}

/// Returns the failure of a task whose worker died on all attempts.
pub(super) fn given_up(attempts: &Attempts<Failure>) -> Failure {
    Failure::new("task_failed").with("losses", attempts.failures())
}

/// Sets how often tasks are retried, and whether the first worker failure is an error, for this job or, if
/// `job` is 0, for all tasks without another policy.
/// @noRd
#[extendr]
fn hub_policy(handle: Robj, job: f64, retries: f64, raises: bool) -> Robj {
    with_cluster(&handle, |cluster| {
        let retries = retries as usize;
        let policy = Policy { retries, raises };
        let mut failures = cluster.failures.borrow_mut();
        match job as JobId {
            NO_JOB => failures.default = policy,
            job => failures.of_job = Some((job, policy)),
        }
        Ok(().into())
    })
}

/// Returns the worker failures that were handled and that R has not acknowledged, as a list of failures, or
/// `NULL`.
/// @noRd
#[extendr]
fn hub_losses(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let unreported = cluster.failures.borrow().unreported.clone();
        if unreported.is_empty() {
            return Ok(().into());
        }
        Ok(List::from_values(
            unreported
                .into_iter()
                .map(|(_, worker_failure)| Robj::from(worker_failure)),
        )
        .into())
    })
}

/// Acknowledges the first `count` worker failures of hub_losses().
/// @noRd
#[extendr]
fn hub_losses_acknowledge(handle: Robj, count: i32) -> Robj {
    with_cluster(&handle, |cluster| {
        let unreported = &mut cluster.failures.borrow_mut().unreported;
        let count = usize::try_from(count).unwrap_or(0).min(unreported.len());
        unreported.drain(..count);
        Ok(().into())
    })
}

extendr_module! {
    mod retry;
    fn hub_policy;
    fn hub_losses;
    fn hub_losses_acknowledge;
}
