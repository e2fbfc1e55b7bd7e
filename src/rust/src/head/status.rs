//! Worker status and timelines, for R.

use super::handle::{Cluster, SLICE, rank_of, with_cluster};
use crate::r::failure::Failure;
use crate::r::first_string;
use extendr_api::prelude::*;
use extendr_ffi::{LENGTH, SEXP, SEXPTYPE, TYPEOF, VECTOR_ELT};
use rustcluster_core::head::activity::{ActivityKind, Interval, Moment, WorkerStats};
use rustcluster_core::head::hub::state_name;
use rustcluster_core::head::scheduler::events::State;
use rustcluster_core::protocol::ids::{Rank, TaskId};
use std::ffi::{c_int, c_void};
use std::time::Duration;

unsafe extern "C" {
    fn rustcluster_answer_failed(answer: *mut c_void) -> c_int;
    fn rustcluster_is_error(value: *mut c_void) -> c_int;
}

/// Records the error that is the result of a task of this worker: a value of class `"try-error"`. `raised`: whether the
/// task has raised it; otherwise it has returned such a value.
///
/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
pub unsafe fn note_error(cluster: &Cluster, rank: Rank, value: SEXP, raised: bool) {
    // SAFETY: guaranteed by the caller.
    if let Some(text) = unsafe { first_string(value) } {
        cluster.hub.borrow().failed(rank, text.trim_end(), raised);
    }
}

/// Records the error of an answer as `recvData()` or `recvOneData()` returns it, if its value is an error.
pub fn note_failure(cluster: &Cluster, rank: Rank, answer: &Robj) {
    // SAFETY: this runs on R's thread; types and lengths are checked before elements are read, and the Robj
    // keeps them alive. None of these functions jumps.
    unsafe {
        let second = |list: SEXP| {
            let is = TYPEOF(list) == SEXPTYPE::VECSXP && LENGTH(list) > 1;
            is.then(|| VECTOR_ELT(list, 1))
        };
        // With two elements, the answer is the second, behind the index of the node.
        let answer = match answer.len() {
            2 => second(answer.get()),
            _ => Some(answer.get()),
        };
        let raised = answer.is_some_and(|answer| rustcluster_answer_failed(answer.cast()) != 0);
        let value = answer.and_then(second);
        if let Some(value) = value.filter(|value| rustcluster_is_error(value.cast()) != 0) {
            note_error(cluster, rank, value, raised);
        }
    }
}

/// Returns the index of a task in its job, and the number of tasks of the batch whose first task it is.
fn position_in_batch(cluster: &Cluster, task: TaskId) -> Option<(usize, usize)> {
    let job = cluster.job.try_borrow().ok()?;
    let batch = job.as_ref().and_then(|job| job.engine.at(task));
    let batch = batch.map(|(first, count)| (first + 1, count));
    let alone = || {
        let messages = cluster.messages.try_borrow().ok()?;
        let index = messages.get(&task)?.index;
        Some((usize::try_from(index).ok()?, 1))
    };
    batch.or_else(alone)
}

pub(super) fn text(text: Option<&String>) -> Option<String> {
    text.map(|text| text.replace('\0', ""))
}

/// Returns the current status of all workers: a list of vectors with an element for each worker.
/// @noRd
#[extendr]
fn hub_status(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let (workers, now) = cluster.hub.borrow().status(false);
        let number = |of: &dyn Fn(&WorkerStats) -> f64| -> Vec<f64> {
            workers.iter().map(|worker| of(&worker.stats)).collect()
        };
        let positions: Vec<_> = workers
            .iter()
            .map(|worker| match worker.state {
                State::Busy(task) | State::Ending(task) | State::Draining(Some(task)) => {
                    position_in_batch(cluster, task)
                }
                _ => None,
            })
            .collect();
        let pids: Vec<Option<i32>> = workers
            .iter()
            .map(|w| w.pid.map(|pid| pid as i32))
            .collect();
        let first = positions
            .iter()
            .map(|position| Some(position.as_ref()?.0 as i32));
        let count = positions
            .iter()
            .map(|position| Some(position.as_ref()?.1 as i32));
        let errors = workers.iter().map(|w| text(w.stats.error.as_ref()));
        Ok(list!(
            state = workers
                .iter()
                .map(|w| state_name(w.state))
                .collect::<Vec<_>>(),
            pid = pids,
            task = first.collect::<Vec<Option<i32>>>(),
            batch = count.collect::<Vec<Option<i32>>>(),
            done = number(&|stats| stats.tasks as f64),
            seconds = number(&|stats| stats.busy.as_secs_f64()),
            bytes_in = number(&|stats| stats.bytes_in as f64),
            bytes_out = number(&|stats| stats.bytes_out as f64),
            losses = number(&|stats| stats.failures as f64),
            error = errors.collect::<Vec<Option<String>>>(),
            now = now.as_secs_f64()
        )
        .into())
    })
}

/// Returns the bytes that were sent to each host, and received from it.
/// @noRd
#[extendr]
fn hub_bytes(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let hosts = cluster.hub.borrow().host_status();
        let sent: Vec<f64> = hosts.iter().map(|host| host.bytes_in as f64).collect();
        let received: Vec<f64> = hosts.iter().map(|host| host.bytes_out as f64).collect();
        Ok(list!(bytes_in = sent, bytes_out = received).into())
    })
}

/// Requests the memory use of workers from the hosts of these workers. Returns the number of the request.
/// @noRd
#[extendr]
fn hub_ask_usage(handle: Robj, ranks: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        let question = {
            let hub = cluster.hub.borrow();
            let ranks: std::result::Result<Vec<Rank>, Failure> =
                ranks.iter().map(|&rank| rank_of(&hub, rank)).collect();
            hub.ask_usage(&ranks?)
        };
        Ok((question as f64).into())
    })
}

/// Returns the answer to a request for memory use: a list of the resident bytes of each worker, and of its
/// proportional set size. Returns `NULL` if answers are missing; waits up to `max_wait` seconds for them.
/// `anyway`: whether to return an incomplete answer instead of `NULL`.
/// @noRd
#[extendr]
fn hub_usage(handle: Robj, question: f64, max_wait: f64, anyway: bool) -> Robj {
    with_cluster(&handle, |cluster| {
        let max_wait = Duration::try_from_secs_f64(max_wait).unwrap_or_default();
        let max_wait = max_wait.min(SLICE);
        let usages = cluster
            .hub
            .borrow()
            .usage(question as u64, max_wait, anyway);
        let Some(usages) = usages else {
            return Ok(().into());
        };
        let known = |bytes: u64| (bytes > 0).then_some(bytes as f64);
        let resident = usages.iter().map(|usage| known(usage.as_ref()?.resident));
        let proportional = usages
            .iter()
            .map(|usage| known(usage.as_ref()?.proportional));
        Ok(list!(
            resident = resident.collect::<Vec<Option<f64>>>(),
            proportional = proportional.collect::<Vec<Option<f64>>>()
        )
        .into())
    })
}

/// Returns the timeline of some workers: a list of vectors with an element for each interval, and `now`.
/// @noRd
#[extendr]
fn hub_timeline(handle: Robj, ranks: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        let (workers, now) = cluster.hub.borrow().status(true);
        let mut rows = Rows::default();
        for &rank in ranks {
            let at = usize::try_from(rank - 1).ok();
            if let Some(worker) = at.and_then(|at| workers.get(at)) {
                rows.add(rank, &worker.stats, now);
            }
        }
        Ok(list!(
            rank = rows.rank,
            start = rows.start,
            end = rows.end,
            kind = rows.kind,
            busy = rows.busy,
            tasks = rows.tasks,
            now = now.as_secs_f64()
        )
        .into())
    })
}

#[derive(Default)]
struct Rows {
    rank: Vec<i32>,
    start: Vec<f64>,
    end: Vec<f64>,
    kind: Vec<&'static str>,
    busy: Vec<f64>,
    tasks: Vec<f64>,
}

impl Rows {
    /// Adds the intervals and the failures of a worker, in order. An interval that spans a failure is divided
    /// there.
    fn add(&mut self, rank: i32, stats: &WorkerStats, now: Moment) {
        let open = stats.lost_since().map(|since| (since, now));
        let mut failures = stats.failures().iter().copied().chain(open).peekable();
        for interval in stats.intervals() {
            let mut rest = *interval;
            while let Some((lost, back)) = failures.next_if(|failure| failure.0 < interval.end) {
                if lost > rest.start {
                    self.add_interval(rank, &cut(&mut rest, lost));
                }
                self.push(rank, lost, back, "lost", 0.0, 0.0);
                let tasks = rest.tasks;
                cut(&mut rest, back.min(interval.end));
                rest.tasks = tasks;
            }
            if rest.start < rest.end || interval.start == interval.end || rest.tasks > 0 {
                self.add_interval(rank, &rest);
            }
        }
        for (lost, back) in failures {
            self.push(rank, lost, back, "lost", 0.0, 0.0);
        }
    }

    fn add_interval(&mut self, rank: i32, of: &Interval) {
        let kind = match of.kind {
            ActivityKind::Busy => "busy",
            ActivityKind::Transfer => "transfer",
        };
        let busy = of.busy.as_secs_f64();
        self.push(rank, of.start, of.end, kind, busy, of.tasks as f64);
    }

    pub(super) fn push(
        &mut self,
        rank: i32,
        from: Moment,
        to: Moment,
        kind: &'static str,
        busy: f64,
        tasks: f64,
    ) {
        self.rank.push(rank);
        self.start.push(from.as_secs_f64());
        self.end.push(to.as_secs_f64());
        self.kind.push(kind);
        self.busy.push(busy);
        self.tasks.push(tasks);
    }
}

/// Removes the part of an interval before this moment, and returns it with its fraction of the work.
fn cut(interval: &mut Interval, at: Moment) -> Interval {
    let at = at.clamp(interval.start, interval.end);
    let length = interval.end.saturating_sub(interval.start);
    let fraction = match length.is_zero() {
        true => 0.0,
        false => at.saturating_sub(interval.start).as_secs_f64() / length.as_secs_f64(),
    };
    let busy = interval.busy.mul_f64(fraction);
    let before = Interval {
        end: at,
        busy,
        ..*interval
    };
    interval.start = at;
    interval.busy = interval.busy.saturating_sub(busy);
    interval.tasks = 0;
    before
}

extendr_module! {
    mod status;
    fn hub_status;
    fn hub_bytes;
    fn hub_ask_usage;
    fn hub_usage;
    fn hub_timeline;
}
