//! Jobs: all tasks of one call of a verb, sent and collected on R's thread without R code for each task. The
//! engine is [`rustcluster_core::head::job`], its codec is [`super::elements`], and [`crate::codec::batch`]
//! describes the messages.
//!
//! R is needed only for errors, and for the results of tasks that have failed: [`job_step`] then returns a
//! failure.

use super::elements::{Encoder, loss_of_batch, numbers};
use super::handle::{Cluster, Job, SLICE, Unsent, may_begin, rank_of, with_cluster};
use super::values::{Elements, Values};
use super::{broadcast, nodes, store};
use crate::codec::batch;
use crate::r::failure::Failure;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::batching::Assignment;
use rustcluster_core::head::dashboard::board::Chunks;
use rustcluster_core::head::hub::HostView;
use rustcluster_core::head::job::{self, Failed, Halt, JobWorker};
use rustcluster_core::head::retry::Policy;
use rustcluster_core::protocol::ids::{JobId, Rank, TaskId};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Starts a job. `ranks`: the ranks of the nodes, from 1. `common`: a list of the function and of a list of
/// arguments that all tasks have. `elements`: a vector without a class, or a function of the index of an
/// element.
///
/// `settings` is a list of:
/// * `round`: whether tasks are assigned to the nodes in turn, and not to the next idle worker.
/// * `reuse`: the objects that are reused by all tasks of a batch: `"nothing"`; `"all"`, as in a chunk of parallel; or
///   `"function"`, if that has an environment of its own.
/// * `spread`: whether an element is a list of arguments.
/// * `seed`: a function that returns the seed of an element by its index, or `NULL`.
/// * `seeded`: see [`Values`].
/// * `order`: the order of the elements, or `NULL`.
/// * `singly`: whether each task is sent alone.
/// * `timeout`: the time limit of a task in seconds.
/// * `retries`, `raises`: see [`Policy`].
/// * `noun`: the name of a task in warnings.
/// * `part`, `parts`: what an element of a chunk is called, and the number of all, if they are counted
///   (job_count_elements()).
/// * `store`, `ids`, `keep`: see storing() of store.rs.
/// * `total`: the number of results, if it is not that of the tasks; `order` then has the index of each task.
/// * `at_once`: whether to run the first step at once, if there are no more tasks than nodes.
///
/// Returns the value of job_results() if that step has ended the job, which is then closed, and otherwise
/// `NULL`.
/// @noRd
#[extendr]
fn job_begin(
    handle: Robj,
    job: f64,
    ranks: &[i32],
    count: f64,
    common: Robj,
    elements: Robj,
    settings: List,
) -> Robj {
    with_cluster(&handle, |cluster| {
        may_begin(cluster)?;
        // The R code that closes a job may have been interrupted.
        let stale = cluster.job.borrow().as_ref().map(|job| job.engine.id());
        if let Some(stale) = stale {
            nodes::close_job(cluster, stale);
        }
        let count = count as usize;
        let settings: HashMap<&str, Robj> = settings.iter().collect();
        let flag = |name| settings.get(name).and_then(Robj::as_bool).unwrap_or(false);
        let assignment = match flag("round") {
            true => Assignment::Round,
            false => Assignment::Free,
        };
        let hub = cluster.hub.borrow();
        let ranks: std::result::Result<Vec<Rank>, Failure> =
            ranks.iter().map(|&rank| rank_of(&hub, rank)).collect();
        let ranks = ranks?;
        // Where hosts come and go, a job without an assignment uses the workers that are there.
        let skips = assignment == Assignment::Free && hub.is_elastic();
        let (mut usable, mut absent) = (false, None);
        let mut agents = Vec::with_capacity(ranks.len());
        for &rank in &ranks {
            let worker = hub.worker(rank);
            match worker.termination {
                None => usable = true,
                Some(termination) if skips && termination.is_of_host() => {
                    usable |= hub.is_awaited(rank);
                    absent = Some((rank, termination));
                }
                Some(termination) => return Err(Failure::termination(rank, &termination)),
            }
            agents.push(worker.agent);
        }
        if let Some((rank, termination)) = absent.filter(|_| !usable) {
            return Err(Failure::termination(rank, &termination));
        }
        let cores = |host: &HostView| host.hello.as_ref().map_or(0, |hello| hello.cores as usize);
        let cores: Vec<usize> = hub.hosts().iter().map(cores).collect();
        drop(hub);
        let order = settings.get("order").and_then(|order| {
            let order = order.as_integer_slice()?;
            Some(order.iter().map(|&at| at as usize - 1).collect())
        });
        let timeout = settings.get("timeout").and_then(Robj::as_real);
        let timeout = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let retries = settings.get("retries").and_then(Robj::as_real);
        let policy = Policy {
            retries: retries.unwrap_or(0.0) as usize,
            raises: flag("raises"),
        };
        let (blob, as_written) =
            match broadcast::send_common_blob(cluster, &ranks, job as JobId, &common) {
                Ok(blob) => blob,
                Err(Jump(token)) => return Ok(token),
            };
        let setting = |name| settings.get(name).cloned().unwrap_or_default();
        let reuse = settings.get("reuse").and_then(Robj::as_str);
        let storing = store::storing(&setting)?;
        let total = setting("total")
            .as_real()
            .map_or(count, |total| total as usize);
        let flags = [
            (reuse == Some("all"), batch::CHUNK),
            (
                reuse == Some("function") && !as_written.fixed,
                batch::FUNCTION,
            ),
            (flag("spread"), batch::SPREAD),
            (
                settings.get("seed").is_some_and(|seed| !seed.is_null()),
                batch::SEEDED,
            ),
            (storing.is_some(), batch::STORED),
            (
                storing
                    .as_ref()
                    .is_some_and(|storing| storing.saving.is_some()),
                batch::SAVED,
            ),
        ];
        let flags: u8 = flags
            .iter()
            .filter(|(is, _)| *is)
            .map(|(_, flag)| flag)
            .sum();
        let elements = match elements.is_function() {
            true => Elements::Function(elements),
            false => Elements::Vector(elements),
        };
        let rtts = cluster.rtts.borrow();
        let slot = |(&rank, host): (&Rank, usize)| JobWorker {
            rank,
            host,
            cores: cores.get(host).copied().unwrap_or(0),
            rtt: rtts.get(&rank).copied(),
            // Without `singly`, a task that is revoked may be sent in another batch next time.
            detained: flag("singly") && cluster.hub.borrow().is_detained(rank),
            absent: cluster.hub.borrow().worker(rank).termination.is_some(),
        };
        let slots: Vec<JobWorker> = ranks.iter().zip(agents).map(slot).collect();
        drop(rtts);
        let store = store::view_of(&setting("store"), total, count, storing.as_ref());
        let at_once = flag("at_once")
            && flags & batch::SEEDED == 0
            && matches!(elements, Elements::Vector(_))
            && count <= slots.len();
        let setup = job::Setup {
            id: job as JobId,
            slots,
            tasks: count,
            assignment,
            order,
            singly: flag("singly"),
            timeout,
            policy,
            blob,
            reading: (flags & (batch::CHUNK | batch::FUNCTION) != 0).then_some(as_written.bytes),
        };
        let mut new = Box::new(Job {
            engine: job::Job::new(setup, Instant::now()),
            values: Values::new(
                elements,
                common,
                flags,
                as_written.fixed,
                reuse == Some("nothing"),
                setting,
            )
            .with_results(total, storing),
            pending: None,
        });
        let noun = setting("noun");
        let noun = noun.as_str().unwrap_or("task");
        let chunks = setting("part").as_str().map(|noun| Chunks {
            noun: noun.to_owned(),
            elements: setting("parts").as_real().unwrap_or(0.0) as usize,
        });
        let gauge = new.engine.gauge();
        let hub = cluster.hub.borrow();
        hub.job_began(job as JobId, noun, count, chunks, gauge, store);
        drop(hub);
        let mut done = false;
        if at_once {
            // A short job ends before R could record that a verb is running.
            cluster.open_job.set(Some(job as JobId));
            match new.step(cluster, true) {
                Ok(is_done) => done = is_done && !cluster.hub.borrow().has_events(),
                Err(unsent) => new.pending = Some(unsent),
            }
        }
        let results = done.then(|| new.values.results());
        cluster.job.replace(Some(new));
        if done {
            nodes::close_job(cluster, job as JobId);
        }
        Ok(results.unwrap_or_default())
    })
}

/// Sends tasks and takes answers, for up to one slice. Returns `TRUE` if all results have arrived, `NULL` if
/// not, or a failure. A failure with `elements` that is a worker failure ends the job. Any other is returned
/// again until job_set_result() has set the result of its elements.
/// @noRd
#[extendr]
fn job_step(handle: Robj) -> Robj {
    with_job(&handle, |cluster, job| {
        cluster.open_job.set(None);
        Ok(match job.step(cluster, false)? {
            true => true.into(),
            false => ().into(),
        })
    })
}

/// Runs `body` with the open job. No other code can get the job meanwhile: R code that runs during `body` finds
/// that the cluster is busy.
fn with_job(
    handle: &Robj,
    body: impl FnOnce(&Cluster, &mut Job) -> std::result::Result<Robj, Unsent>,
) -> Robj {
    with_cluster(handle, |cluster| {
        let Some(mut job) = cluster.job.take() else {
            return Err(Failure::new("busy"));
        };
        let result = body(cluster, &mut job);
        cluster.job.replace(Some(job));
        match result {
            Ok(value) => Ok(value),
            Err(unsent) => Ok(unsent.into()),
        }
    })
}

impl Job {
    /// Sends tasks and takes answers, for up to one slice. Returns whether all results have arrived and R has
    /// been notified of each worker failure. `plain_only`: whether to leave an answer whose reading may fail for
    /// the next step.
    ///
    /// # Errors
    /// If R has to act.
    fn step(&mut self, cluster: &Cluster, plain_only: bool) -> std::result::Result<bool, Unsent> {
        if let Some(pending) = self.pending.take() {
            return Err(pending);
        }
        if cluster.failures.borrow().any_unreported() {
            return Ok(false);
        }
        let mut codec = Encoder {
            cluster,
            job: self.engine.id(),
            values: &mut self.values,
        };
        if let Some(storing) = &codec.values.storing {
            let is_full = storing.writer.wait_for_room(SLICE);
            if let Some(reason) = storing.writer.error() {
                return Err(store::write_failed(reason).into());
            }
            if is_full {
                return Ok(false);
            }
        }
        let stepped = self
            .engine
            .step(&cluster.hub, &mut codec, SLICE, plain_only);
        let stepped = match (&self.values.storing, stepped) {
            (Some(storing), Ok(true)) => match storing.writer.wait_for_all(SLICE) {
                Ok(durable) => Ok(durable),
                Err(reason) => {
                    return Err(store::write_failed(reason).into());
                }
            },
            (_, stepped) => stepped,
        };
        self.values.note_durable();
        // Between two steps R may be busy with other things.
        let waits = self.engine.is_free() && self.engine.left() > 0;
        cluster.hub.borrow_mut().set_tasks_wait(waits);
        stepped.map_err(|halt| self.unsent(halt))
    }

    /// Returns the failure for which R has to act.
    fn unsent(&self, halt: Halt<Jump>) -> Unsent {
        let failure = match halt {
            Halt::Codec(jump) => return jump.into(),
            Halt::Lost(failure) if self.engine.policy().raises => {
                loss_of_batch(&failure, &failure.tasks).with("again", false)
            }
            Halt::Lost(failure) => loss_of_batch(&failure, &failure.tasks),
            Halt::Failed(failed) => {
                let index = failed.tasks().first().map_or(0, |first| first + 1);
                let failure = match &failed {
                    Failed::TimedOut { rank, .. } => Failure::new("timeout").with("rank", rank + 1),
                    &Failed::GivenUp(index) => {
                        let failures = self.engine.failures(index).iter();
                        let failures: Vec<Failure> = failures
                            .map(|failure| loss_of_batch(failure, &failure.tasks))
                            .collect();
                        Failure::new("task_failed").with("losses", failures)
                    }
                };
                let elements = numbers(failed.tasks());
                failure.with("index", index).with("elements", elements)
            }
            Halt::Terminated { rank, termination } => Failure::termination(rank, &termination),
            Halt::Stuck => Failure::new("protocol").with(
                "reason",
                "tasks are left and nothing is out: a bug in rustcluster",
            ),
        };
        failure.into()
    }
}

/// Sets the result of the elements of the last failure of job_step(), which is not returned again.
/// @noRd
#[extendr]
fn job_set_result(handle: Robj, value: Robj) -> Robj {
    with_job(&handle, |_, job| {
        for &index in job.engine.made().iter().flat_map(Failed::tasks) {
            job.values.fail(index, &value)?;
        }
        Ok(().into())
    })
}

/// Returns the indices of the elements of an outstanding message, from 1.
/// @noRd
#[extendr]
fn job_tasks(handle: Robj, task: f64) -> Robj {
    with_job(&handle, |_, job| {
        Ok(numbers(&job.engine.tasks_of(task as TaskId)).into())
    })
}

/// Handles an answer that cannot be read. `value`: the result of the element, if the message has only one;
/// several elements are retried.
/// @noRd
#[extendr]
fn job_unreadable(handle: Robj, task: f64, value: Robj) -> Robj {
    with_job(&handle, |cluster, job| {
        let mut codec = Encoder {
            cluster,
            job: job.engine.id(),
            values: &mut job.values,
        };
        let ended = job
            .engine
            .unreadable(&cluster.hub, &mut codec, task as TaskId);
        if let Some(index) = ended.map_err(|halt| job.unsent(halt))? {
            job.values.fail(index, &value)?;
        }
        Ok(().into())
    })
}

/// Returns a list of the results, of the indices of those that are errors, and of the indices of those that are
/// new since the last call.
/// @noRd
#[extendr]
fn job_results(handle: Robj) -> Robj {
    with_job(&handle, |_, job| Ok(job.values.results()))
}

/// Returns a list of the hosts, from 1, that could not save results, and of the reasons.
/// @noRd
#[extendr]
fn job_unsaved(handle: Robj) -> Robj {
    with_job(&handle, |_, job| {
        let storing = job.values.storing.as_ref();
        let saving = storing.and_then(|storing| storing.saving.as_ref());
        let mut unsaved: Vec<(i32, String)> = saving
            .iter()
            .flat_map(|saving| &saving.unsaved)
            .map(|(&host, reason)| (host as i32 + 1, reason.clone()))
            .collect();
        unsaved.sort();
        let (hosts, reasons): (Vec<i32>, Vec<String>) = unsaved.into_iter().unzip();
        Ok(list!(hosts, reasons).into())
    })
}

/// Returns the progress of the job: the numbers of tasks, of finished tasks, and of busy workers.
/// @noRd
#[extendr]
fn job_progress(handle: Robj) -> Robj {
    with_job(&handle, |_, job| {
        let (tasks, done, busy) = job.engine.progress();
        Ok([tasks, done, busy].map(|n| n as f64).to_vec().into())
    })
}

/// Sets the number of elements of chunks that are finished, for pages.
/// @noRd
#[extendr]
fn job_count_elements(handle: Robj, finished: f64) -> Robj {
    with_job(&handle, |_, job| {
        job.engine.gauge().set_elements(finished as usize);
        Ok(().into())
    })
}

extendr_module! {
    mod job;
    fn job_count_elements;
    fn job_begin;
    fn job_step;
    fn job_set_result;
    fn job_tasks;
    fn job_unreadable;
    fn job_results;
    fn job_unsaved;
    fn job_progress;
}
