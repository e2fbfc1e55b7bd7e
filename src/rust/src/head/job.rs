//! Jobs: all tasks of one call of a verb, given out and collected on R's thread, and not one by one in R
//! code. The engine is [`rustcluster_core::head::job`]; its codec is in [`super::elements`]. See
//! [`crate::codec::batch`] for the messages.
//!
//! What happens to tasks besides that they are answered (a lost worker, a time limit) is R's to decide
//! on: [`job_step`] then returns a failure with the number of the unit's task.

use super::elements::{Elements, Encoder, Values};
use super::handle::{Cluster, SLICE, Unsent, may_begin, rank_of, with_cluster};
use super::{broadcast, nodes};
use crate::codec::batch;
use crate::r::failure::Failure;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::batching::Assignment;
use rustcluster_core::head::hub::HostView;
use rustcluster_core::head::job::{self, Halt, Place};
use rustcluster_core::protocol::ids::{JobId, Rank, TaskId};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// See the module's documentation.
pub struct Job {
    pub engine: job::Job,
    values: Values,
    /// What the first step, which job_begin() takes, has left for the next: what R has to decide on.
    said: Option<Unsent>,
}

/// Begins a job. `ranks`: of the nodes, from 1. `common`: a list of the function and a list of arguments
/// that all tasks have. `elements`: a vector without a class, or a function of an element's number.
/// `settings`: a list of `round` (tasks go round the nodes, and not to whoever is free), `shares` (what
/// tasks that are sent together share: `"nothing"`; `"all"`, as in a chunk of parallel's; `"function"`, if
/// that has an environment of its own), `spread` (an element is a list of arguments), `seed` (a function
/// that gives each element's seed, or `NULL`), `seeded` (see [`Values`]),
/// `order` (of the elements, or `NULL`), `singly` (no two tasks cross together), `timeout` (of a task,
/// in seconds), `at_once` (if there are no more tasks than nodes, a first step is taken at once).
/// Returns what job_results() does if the job has ended with that, and is closed; otherwise `NULL`.
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
        // R's code that ends a job may have been interrupted.
        let stale = cluster.job.borrow().as_ref().map(|job| job.engine.id());
        if let Some(stale) = stale {
            nodes::close_job(cluster, stale);
        }
        let hub = cluster.hub.borrow();
        let ranks: std::result::Result<Vec<Rank>, Failure> =
            ranks.iter().map(|&rank| rank_of(&hub, rank)).collect();
        let ranks = ranks?;
        let mut agents = Vec::with_capacity(ranks.len());
        for &rank in &ranks {
            let worker = hub.worker(rank);
            if let Some(gone) = worker.gone {
                return Err(Failure::gone(rank, &gone));
            }
            agents.push(worker.agent);
        }
        let cores = |host: &HostView| host.hello.as_ref().map_or(0, |hello| hello.cores as usize);
        let cores: Vec<usize> = hub.hosts().iter().map(cores).collect();
        drop(hub);
        let count = count as usize;
        let settings: HashMap<&str, Robj> = settings.iter().collect();
        let flag = |name| settings.get(name).and_then(Robj::as_bool).unwrap_or(false);
        let assignment = match flag("round") {
            true => Assignment::Round,
            false => Assignment::Free,
        };
        let order = settings.get("order").and_then(|order| {
            let order = order.as_integer_slice()?;
            Some(order.iter().map(|&at| at as usize - 1).collect())
        });
        let timeout = settings.get("timeout").and_then(Robj::as_real);
        let timeout = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let (payload, as_written) =
            match broadcast::share_common(cluster, &ranks, job as JobId, &common) {
                Ok(shared) => shared,
                Err(Jump(token)) => return Ok(token),
            };
        let setting = |name| settings.get(name).cloned().unwrap_or_default();
        let shares = settings.get("shares").and_then(Robj::as_str);
        let flags = [
            (shares == Some("all"), batch::CHUNK),
            (
                shares == Some("function") && !as_written.fixed,
                batch::FUNCTION,
            ),
            (flag("spread"), batch::SPREAD),
            (
                settings.get("seed").is_some_and(|seed| !seed.is_null()),
                batch::SEEDED,
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
        let ways = cluster.ways.borrow();
        let place = |(&rank, host): (&Rank, usize)| Place {
            rank,
            host,
            cores: cores.get(host).copied().unwrap_or(0),
            way: ways.get(&rank).copied(),
            // Where tasks go together, one of them that comes back may go with others next time.
            detained: flag("singly") && cluster.hub.borrow().is_detained(rank),
        };
        let places: Vec<Place> = ranks.iter().zip(agents).map(place).collect();
        drop(ways);
        let at_once = flag("at_once")
            && flags & batch::SEEDED == 0
            && matches!(elements, Elements::Vector(_))
            && count <= places.len();
        let setup = job::Setup {
            id: job as JobId,
            places,
            tasks: count,
            assignment,
            order,
            singly: flag("singly"),
            timeout,
            payload,
            reading: (flags & (batch::CHUNK | batch::FUNCTION) != 0).then_some(as_written.bytes),
        };
        let mut new = Box::new(Job {
            engine: job::Job::new(setup, Instant::now()),
            values: Values::new(
                count,
                elements,
                common,
                flags,
                as_written.fixed,
                shares == Some("nothing"),
                setting,
            ),
            said: None,
        });
        let mut done = false;
        if at_once {
            // Until R has noted that a verb is under way, which takes as long as a short job.
            cluster.begun.set(Some(job as JobId));
            match new.step(cluster, true) {
                Ok(is_done) => done = is_done && !cluster.hub.borrow().has_events(),
                Err(unsent) => new.said = Some(unsent),
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

/// Gives tasks out and takes answers, for some time. Returns TRUE once all are there, and `NULL`
/// before, or what R has to decide on.
/// @noRd
#[extendr]
fn job_step(handle: Robj) -> Robj {
    with_job(&handle, |cluster, job| {
        cluster.begun.set(None);
        Ok(match job.step(cluster, false)? {
            true => true.into(),
            false => ().into(),
        })
    })
}

/// Runs `body` with the job that is open. It is not to be had while that is so: R code that runs in
/// the middle finds the cluster busy.
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
    /// Gives tasks out and takes answers, for some time. Returns whether all are there. `plain_only`: an answer that may
    /// fail to be read is left for the next step.
    ///
    /// # Errors
    /// What R has to decide on.
    fn step(&mut self, cluster: &Cluster, plain_only: bool) -> std::result::Result<bool, Unsent> {
        if let Some(said) = self.said.take() {
            return Err(said);
        }
        let mut codec = Encoder {
            cluster,
            values: &mut self.values,
        };
        self.engine
            .step(&cluster.hub, &mut codec, SLICE, plain_only)
            .map_err(|halt| unsent(cluster, halt))
    }
}

/// What R gets of what it has to decide on.
fn unsent(cluster: &Cluster, halt: Halt<Jump>) -> Unsent {
    let of_task = |failure: Failure, task: TaskId, first: Option<usize>| {
        let index = first.map_or(0, |first| first + 1);
        failure.with("task", task).with("index", index)
    };
    let failure = match halt {
        Halt::Codec(jump) => return jump.into(),
        Halt::Lost {
            place,
            gone,
            task,
            first,
        } => of_task(nodes::loss(cluster, place, &gone), task, first),
        Halt::TimedOut { rank, task, first } => {
            let failure = Failure::new("timeout").with("rank", rank + 1);
            of_task(failure, task, first)
        }
        Halt::Gone { rank, gone } => Failure::gone(rank, &gone),
        Halt::Stuck => Failure::new("protocol").with(
            "reason",
            "tasks are left and nothing is out: a bug in rustcluster",
        ),
    };
    failure.into()
}

/// The elements of a unit whose task was lost or took too long, from 1.
/// @noRd
#[extendr]
fn job_tasks(handle: Robj, task: f64) -> Robj {
    with_job(&handle, |_, job| {
        let tasks = job.engine.tasks_of(task as TaskId);
        let tasks: Vec<i32> = tasks.iter().map(|&index| index as i32 + 1).collect();
        Ok(tasks.into())
    })
}

/// A unit has ended without an answer: `again` of its elements are to be tried again, one by one; the
/// others have `values` for results.
/// @noRd
#[extendr]
fn job_settle(handle: Robj, task: f64, again: &[i32], values: List) -> Robj {
    with_job(&handle, |cluster, job| {
        let task = task as TaskId;
        let tasks = job.engine.tasks_of(task);
        let is_again = |index: &usize| again.contains(&(*index as i32 + 1));
        let (again, given_up): (Vec<usize>, Vec<usize>) = tasks.iter().copied().partition(is_again);
        for (index, value) in given_up.into_iter().zip(values.values()) {
            job.values.give_up(index, &value);
        }
        let mut codec = Encoder {
            cluster,
            values: &mut job.values,
        };
        let settled = job.engine.settle(&cluster.hub, &mut codec, task, &again);
        settled.map_err(|halt| unsent(cluster, halt))?;
        Ok(().into())
    })
}

/// What has come of the job: a list of its results, the numbers of those that are errors, and of those
/// that are new since this was last asked.
/// @noRd
#[extendr]
fn job_results(handle: Robj) -> Robj {
    with_job(&handle, |_, job| Ok(job.values.results()))
}

/// How far the job is: tasks, those that have ended, and workers that are busy.
/// @noRd
#[extendr]
fn job_progress(handle: Robj) -> Robj {
    with_job(&handle, |_, job| {
        let (tasks, done, busy) = job.engine.progress();
        Ok([tasks, done, busy].map(|n| n as f64).to_vec().into())
    })
}

extendr_module! {
    mod job;
    fn job_begin;
    fn job_step;
    fn job_tasks;
    fn job_settle;
    fn job_results;
    fn job_progress;
}
