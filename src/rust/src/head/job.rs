//! Jobs: all tasks of one call of a verb, given out and collected here, on R's thread, and not one by
//! one in R code. See [`Planner`] for who gets what, [`crate::codec::batch`] for the messages.
//!
//! What happens to tasks besides that they are answered (a lost worker, a time limit) is R's to decide
//! on: [`job_step`] then returns a failure with the number of the unit's task.

use super::elements::{Elements, Form};
use super::handle::{Cluster, SLICE, Unsent, may_begin, rank_of, with_cluster};
use super::{broadcast, nodes};
use crate::codec::batch;
use crate::codec::stream::Format;
use crate::r::failure::Failure;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::batching::{Assignment, Planner};
use rustcluster_core::head::hub::{Answer, HostView, Turn};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::ids::{JobId, PayloadId, Rank, TaskId};
use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

/// Places that are given something before answers are looked for, at first; then more and more.
const AT_ONCE: usize = 8;
/// How long is then waited for one.
const FIRST: Duration = Duration::from_micros(500);

/// See the module's documentation.
pub struct Job {
    id: JobId,
    /// The worker of each place.
    ranks: Vec<Rank>,
    /// All of these.
    members: HashSet<Rank>,
    /// The list of function and common arguments, and the payload by which workers have it.
    pub(super) common: Robj,
    payload: PayloadId,
    /// Of [`batch::Head`].
    pub(super) flags: u8,
    /// The common list refers to nothing whose identity matters, such as an environment, so that no
    /// element can share such a thing with it.
    pub(super) fixed: bool,
    pub(super) elements: Elements,
    /// A function that gives the seed of a task, or `NULL`.
    pub(super) seed: Robj,
    /// A list of the function by which a task is run with a seed where that cannot be sent apart, and of
    /// no arguments.
    pub(super) seeded: Robj,
    /// The task that is begun at each position; otherwise in their order.
    order: Option<Vec<usize>>,
    /// A list with an element for each task.
    pub(super) results: Robj,
    assignment: Assignment,
    pub(super) planner: Planner,
    pub(super) sent: HashMap<TaskId, Sent>,
    /// Those that are out at each place, in the order in which they are begun.
    pub(super) lanes: Vec<VecDeque<TaskId>>,
    /// Places that are given something between two looks at what has come.
    at_once: usize,
    /// Places that may be given more.
    pub(super) ready: VecDeque<usize>,
    /// Places whose worker may still be at a task that took too long or was cancelled: others may have what
    /// waits for it.
    pub(super) detained: Vec<bool>,
    /// Elements that user code has made, by their numbers, until they are answered: it is asked once for
    /// each, also if that comes back or is lost.
    pub(super) held: HashMap<usize, Robj>,
    pub(super) done: usize,
    /// Tasks whose result is an error, from 1.
    pub(super) failed: Vec<i32>,
    /// A value of class `"try-error"` is an error, too, as parallel has it for its tasks. Elements of parallel's
    /// chunks and of lapply() may have such values.
    pub(super) by_class: bool,
    /// Tasks that have been answered since R last asked, from 1.
    pub(super) fresh: Vec<i32>,
    began: Instant,
    /// How long a task may take.
    timeout: Option<Duration>,
    pub(super) scratch: Vec<u8>,
    pub(super) message: Vec<u8>,
    /// What the first step, which job_begin() takes, has left for the next: an answer that R must have a handler for,
    /// or what R has to decide on.
    unread: Option<(Rank, TaskId, Body)>,
    said: Option<Unsent>,
}

/// A unit that is out.
pub(super) struct Sent {
    pub(super) place: usize,
    /// From 0.
    pub(super) tasks: Vec<usize>,
    pub(super) at: Instant,
    /// How long it takes tells how long the way is: it is sent to its own worker, which is idle.
    pub(super) telling: bool,
    /// It has been asked back.
    recalled: bool,
}

/// Begins a job. `ranks`: of the nodes, from 1. `common`: a list of the function and a list of arguments
/// that all tasks have. `elements`: a vector without a class, or a function of an element's number.
/// `settings`: a list of `round` (tasks go round the nodes, and not to whoever is free), `shares` (what
/// tasks that are sent together share: `"nothing"`; `"all"`, as in a chunk of parallel's; `"function"`, if
/// that has an environment of its own), `spread` (an element is a list of arguments), `seed` (a function
/// that gives each element's seed, or `NULL`), `seeded` (see [`Job`]),
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
        let stale = cluster.job.borrow().as_ref().map(|job| job.id);
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
        let setting = |name| settings.get(name).cloned().unwrap_or_default();
        let seed = setting("seed");
        let (payload, as_written) =
            match broadcast::share_common(cluster, &ranks, job as JobId, &common) {
                Ok(shared) => shared,
                Err(Jump(token)) => return Ok(token),
            };
        let shares = settings.get("shares").and_then(Robj::as_str);
        let flags = [
            (shares == Some("all"), batch::CHUNK),
            (
                shares == Some("function") && !as_written.fixed,
                batch::FUNCTION,
            ),
            (flag("spread"), batch::SPREAD),
            (!seed.is_null(), batch::SEEDED),
        ];
        let flags = flags
            .iter()
            .filter(|(is, _)| *is)
            .map(|(_, flag)| flag)
            .sum();
        let places = ranks.len();
        let mut planner = Planner::new(assignment, count, places);
        if flag("singly") {
            planner.singly();
        }
        if flags & (batch::CHUNK | batch::FUNCTION) != 0 {
            planner.expect_reading(as_written.bytes);
        }
        let ways = cluster.ways.borrow();
        for (place, (rank, agent)) in ranks.iter().zip(agents).enumerate() {
            planner.expect(place, ways.get(rank).copied());
            planner.place_on(place, agent, cores.get(agent).copied().unwrap_or(0));
        }
        drop(ways);
        // Where tasks go together, one of them that comes back may go with others next time.
        let is_detained = |&rank: &Rank| flag("singly") && cluster.hub.borrow().is_detained(rank);
        let new = Job {
            id: job as JobId,
            members: ranks.iter().copied().collect(),
            at_once: AT_ONCE,
            detained: ranks.iter().map(is_detained).collect(),
            held: HashMap::new(),
            ready: (0..ranks.len()).collect(),
            ranks,
            common,
            payload,
            flags,
            fixed: as_written.fixed,
            elements: match elements.is_function() {
                true => Elements::Function(elements),
                false => Elements::Vector(elements),
            },
            seed,
            seeded: setting("seeded"),
            order,
            results: List::new(count).into(),
            assignment,
            planner,
            sent: HashMap::new(),
            lanes: vec![VecDeque::new(); places],
            done: 0,
            failed: Vec::new(),
            by_class: shares == Some("nothing"),
            fresh: Vec::new(),
            began: Instant::now(),
            timeout,
            scratch: Vec::new(),
            message: Vec::new(),
            unread: None,
            said: None,
        };
        let at_once = flag("at_once")
            && new.seed.is_null()
            && matches!(new.elements, Elements::Vector(_))
            && count <= places;
        let mut new = Box::new(new);
        let mut done = false;
        if at_once {
            // Until R has noted that a verb is under way, which takes as long as a short job.
            cluster.begun.set(Some(new.id));
            match new.step(cluster, true) {
                Ok(is_done) => done = is_done && !cluster.hub.borrow().has_events(),
                Err(unsent) => new.said = Some(unsent),
            }
        }
        let results = done.then(|| new.results());
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
    /// How long the way to each worker and back has taken.
    pub fn ways(&self) -> impl Iterator<Item = (Rank, f64)> + '_ {
        let ranks = self.ranks.iter().enumerate();
        ranks.filter_map(|(place, &rank)| Some((rank, self.planner.way(place)?)))
    }

    /// The tasks of a unit that is out: the first one's number, from 1, and how many.
    pub fn at(&self, task: TaskId) -> Option<(usize, usize)> {
        let tasks = &self.sent.get(&task)?.tasks;
        Some((self.task(*tasks.first()?) + 1, tasks.len()))
    }

    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn task(&self, position: usize) -> usize {
        self.order
            .as_ref()
            .map_or(position, |order| order[position])
    }

    /// Gives tasks out and takes answers, for some time. Returns whether all are there. `plain_only`: an answer that may
    /// fail to be read is left for the next step.
    ///
    /// # Errors
    /// What R has to decide on.
    fn step(&mut self, cluster: &Cluster, plain_only: bool) -> std::result::Result<bool, Unsent> {
        if let Some(said) = self.said.take() {
            return Err(said);
        }
        let until = Instant::now() + SLICE;
        if self.planner.may_resume(self.now()) {
            self.wake();
        }
        let mut answered = false;
        if let Some((place, task, body)) = self.unread.take() {
            self.take(cluster, place, task, body)?;
        }
        loop {
            // While answers come, those who have answered are given more at once, and others are not
            // begun with: it is they who are quick, and have the function and its memory at hand.
            let count = if answered { 1 } else { self.at_once };
            answered = false;
            for _ in 0..count {
                let Some(place) = self.ready.pop_front() else {
                    break;
                };
                if let Err(unsent) = self.fill(cluster, place) {
                    self.ready.push_back(place);
                    return Err(unsent);
                }
            }
            if self.done == self.results.len() {
                return Ok(true);
            }
            self.recall(cluster);
            let mut left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if !self.ready.is_empty() {
                // The first answers tell how large units should be: worth waiting for, as long as not
                // much time is lost by that if they do not come.
                left = match self.planner.knows() {
                    true => Duration::ZERO,
                    false => FIRST,
                };
                self.at_once = match self.planner.knows() {
                    true => AT_ONCE,
                    false => 2 * self.at_once,
                };
            }
            let answer = {
                let mut hub = cluster.hub.borrow_mut();
                hub.receive_any(|rank| self.members.contains(&rank), left)
            };
            match answer {
                Answer::Ready {
                    place, task, body, ..
                } => {
                    if plain_only && !body.whole().is_some_and(batch::is_plain_result) {
                        self.unread = Some((place, task, body));
                        return Ok(false);
                    }
                    self.take(cluster, place, task, body)?;
                    answered = true;
                }
                Answer::Pending | Answer::NothingSent if !self.ready.is_empty() => {}
                // Until it is time, or a signal has come.
                Answer::Pending => return Ok(false),
                Answer::NothingSent => {
                    self.none_stopped(cluster)?;
                    return Err(Failure::new("protocol")
                        .with(
                            "reason",
                            "tasks are left and nothing is out: a bug in rustcluster",
                        )
                        .into());
                }
                Answer::Lost {
                    place, task, gone, ..
                } => {
                    let failure = nodes::loss(cluster, place, &gone);
                    return Err(self.of_task(failure, task).into());
                }
                Answer::TimedOut { rank, task } => {
                    if let Some(sent) = self.sent.get(&task) {
                        self.detained[sent.place] = true;
                    }
                    let failure = Failure::new("timeout").with("rank", rank + 1);
                    return Err(self.of_task(failure, task).into());
                }
                Answer::Recalled { task, .. } => {
                    if let Some(sent) = self.remove(task) {
                        self.planner.dropped(sent.place, true);
                        self.planner.returned(sent.place, &sent.tasks);
                        self.wake();
                    }
                }
                Answer::GivenUp { .. } => {}
            }
        }
    }

    /// What was outstanding on a node that has been stopped, in the middle of the job, is forgotten.
    fn none_stopped(&self, cluster: &Cluster) -> std::result::Result<(), Failure> {
        for sent in self.sent.values() {
            let rank = self.ranks[sent.place];
            if let Some(gone) = cluster.hub.borrow().worker(rank).gone {
                return Err(Failure::gone(rank, &gone));
            }
        }
        Ok(())
    }

    fn of_task(&self, failure: Failure, task: TaskId) -> Failure {
        let index = self.sent.get(&task).and_then(|sent| sent.tasks.first());
        let index = index.map_or(0, |&first| self.task(first) + 1);
        failure.with("task", task).with("index", index)
    }

    /// Sends a place what it is to have now.
    fn fill(&mut self, cluster: &Cluster, place: usize) -> std::result::Result<(), Unsent> {
        if self.is_gone(cluster, place)? {
            return Ok(());
        }
        loop {
            let began = Instant::now();
            let now = self.now();
            let Some(unit) = self.planner.next(place, now) else {
                return Ok(());
            };
            let turn = if unit.ahead { Turn::Ahead } else { Turn::Last };
            let sent = self.send(cluster, place, &unit.tasks, unit.most, turn);
            let count = match &sent {
                Ok(count) => *count,
                Err(_) => 0,
            };
            if count < unit.tasks.len() {
                self.planner.returned(place, &unit.tasks[count..]);
            }
            if count == 0 {
                self.planner.dropped(place, true);
            } else {
                self.planner.shortened(place, count);
            }
            if sent? == 0 {
                return Ok(());
            }
            self.planner.took(began.elapsed());
        }
    }

    /// Whether the worker of this place is gone, and others are there to do its part.
    fn is_gone(&mut self, cluster: &Cluster, place: usize) -> std::result::Result<bool, Failure> {
        if self.assignment == Assignment::Round {
            return Ok(false);
        }
        let rank = self.ranks[place];
        let Some(gone) = cluster.hub.borrow().worker(rank).gone else {
            return Ok(false);
        };
        self.planner.gone(place);
        match self.planner.any_left() {
            true => Ok(true),
            false => Err(Failure::gone(rank, &gone)),
        }
    }

    /// Sends as many of these tasks as fit into one message; `most`: see
    /// [`rustcluster_core::head::batching::Unit`]. Returns how many.
    pub(super) fn send(
        &mut self,
        cluster: &Cluster,
        place: usize,
        positions: &[usize],
        most: Duration,
        turn: Turn,
    ) -> std::result::Result<usize, Unsent> {
        let rank = self.ranks[place];
        let format = |rank: Rank| cluster.formats.borrow()[rank as usize];
        let (count, form) = match format(rank) {
            Format::Native => self.gather(positions, most)?,
            Format::Xdr => (1, Form::Message),
        };
        // What is long would wait here, and R with it.
        if turn == Turn::Ahead && form != Form::Unit {
            return Ok(0);
        }
        let is_unit = matches!(form, Form::Unit | Form::Long);
        let payload = |on| (is_unit && format(on) == Format::Native).then_some(self.payload);
        let mut hub = cluster.hub.borrow_mut();
        let begun = hub.begin(rank, self.id, None, turn, payload);
        hub.limit_time(self.timeout);
        drop(hub);
        let begun = begun.map_err(|gone| Failure::gone(rank, &gone))?;
        let payload = payload(begun.place);
        // Another may stand in that reads other numbers.
        let (count, form) = match payload {
            None if is_unit => (1, Form::Message),
            _ => (count, form),
        };
        let task = begun.task;
        let written = match payload {
            // A host that has come back, say.
            Some(payload) if !begun.shared => {
                broadcast::share_again(cluster, payload, begun.place, &self.common)
            }
            _ => Ok(()),
        };
        let written =
            written.and_then(|()| self.write(cluster, begun.place, positions.first(), form));
        match written {
            Ok(()) => cluster.hub.borrow_mut().finish(),
            Err(jump) => {
                cluster.hub.borrow_mut().abandon();
                return Err(jump.into());
            }
        }
        let sent = Sent {
            place,
            tasks: positions[..count].to_vec(),
            at: Instant::now(),
            telling: turn == Turn::Last && begun.place == rank && !begun.behind_call,
            recalled: false,
        };
        self.sent.insert(task, sent);
        match turn {
            Turn::First => self.lanes[place].push_front(task),
            Turn::Last | Turn::Ahead => self.lanes[place].push_back(task),
        }
        Ok(count)
    }

    pub(super) fn remove(&mut self, task: TaskId) -> Option<Sent> {
        let sent = self.sent.remove(&task)?;
        self.lanes[sent.place].retain(|&other| other != task);
        Some(sent)
    }

    /// Tasks are to be given out again: whoever has nothing to do is looked at, and last those who may not be
    /// able to begin.
    pub(super) fn wake(&mut self) {
        for detained in [false, true] {
            for place in 0..self.lanes.len() {
                let is_idle = self.lanes[place].is_empty() && self.detained[place] == detained;
                if is_idle && !self.ready.contains(&place) {
                    self.ready.push_back(place);
                }
            }
        }
    }

    /// When all tasks have been given out and some workers have nothing to do, what others have not
    /// begun is asked back.
    fn recall(&mut self, cluster: &Cluster) {
        if self.assignment == Assignment::Round || self.planner.left() > 0 {
            return;
        }
        let lanes = || self.lanes.iter().zip(&self.detained);
        let is_idle =
            |(lane, detained): &(&VecDeque<TaskId>, &bool)| lane.is_empty() && !**detained;
        let idle = lanes().filter(is_idle).count();
        let asked = self.sent.values().filter(|sent| sent.recalled).count();
        // Of those who are detained, the first may not have begun either. If it has, it stays.
        let begun = |detained: bool| usize::from(!detained);
        let waiting = lanes().filter_map(|(lane, &detained)| lane.get(begun(detained)).copied());
        for task in waiting
            .collect::<Vec<_>>()
            .into_iter()
            .take(idle.saturating_sub(asked))
        {
            if let Some(sent) = self.sent.get_mut(&task).filter(|sent| !sent.recalled) {
                sent.recalled = true;
                let rank = self.ranks[sent.place];
                cluster.hub.borrow_mut().recall(rank, task);
            }
        }
    }
}

/// The elements of a unit whose task was lost or took too long, from 1.
/// @noRd
#[extendr]
fn job_tasks(handle: Robj, task: f64) -> Robj {
    with_job(&handle, |_, job| {
        let sent = job.sent.get(&(task as TaskId));
        let tasks = sent.map_or(&[][..], |sent| &sent.tasks);
        let tasks: Vec<i32> = tasks.iter().map(|&at| job.task(at) as i32 + 1).collect();
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
        let Some(sent) = job.sent.get(&task) else {
            return Ok(().into());
        };
        let is_again = |position: &usize| again.contains(&(job.task(*position) as i32 + 1));
        let positions = sent.tasks.iter().copied();
        let (tasks, given_up): (Vec<usize>, Vec<usize>) = positions.partition(is_again);
        for (position, value) in given_up.into_iter().zip(values.values()) {
            let index = job.task(position);
            // SAFETY: the list keeps it alive.
            unsafe { job.put(index, value.get(), true) };
            job.held.remove(&index);
            job.done += 1;
        }
        job.settle(cluster, task, &tasks)?;
        Ok(().into())
    })
}

impl Job {
    /// A unit has ended without an answer, and these tasks of it are to be tried again.
    fn settle(
        &mut self,
        cluster: &Cluster,
        task: TaskId,
        again: &[usize],
    ) -> std::result::Result<(), Unsent> {
        let Some(sent) = self.remove(task) else {
            return Ok(());
        };
        let place = sent.place;
        let rank = self.ranks[place];
        self.planner.dropped(place, false);
        let replaced = cluster.hub.borrow().worker(rank).gone.is_none();
        if self.assignment == Assignment::Round && replaced {
            // Before what follows them: they go on with the random numbers that those before have left.
            for &position in again.iter().rev() {
                self.send(cluster, place, &[position], Duration::ZERO, Turn::First)?;
                self.planner.given_first(place);
            }
        } else {
            self.planner.lost(place, again);
        }
        cluster.hub.borrow_mut().forget(rank, task);
        // All that was with a worker which is gone is told as lost, and in its order.
        if replaced || self.assignment == Assignment::Free {
            self.ready.push_back(place);
        }
        self.wake();
        Ok(())
    }
}

/// What has come of the job: a list of its results, the numbers of those that are errors, and of those
/// that are new since this was last asked.
/// @noRd
#[extendr]
fn job_results(handle: Robj) -> Robj {
    with_job(&handle, |_, job| Ok(job.results()))
}

impl Job {
    /// See [`job_results`].
    pub(super) fn results(&mut self) -> Robj {
        let mut failed = self.failed.clone();
        failed.sort_unstable();
        let fresh = std::mem::take(&mut self.fresh);
        list!(self.results.clone(), failed, fresh).into()
    }
}

/// How far the job is: tasks, those that have ended, and workers that are busy.
/// @noRd
#[extendr]
fn job_progress(handle: Robj) -> Robj {
    with_job(&handle, |_, job| {
        let busy = (0..job.ranks.len())
            .filter(|&at| job.planner.out(at) > 0)
            .count();
        Ok([job.results.len(), job.done, busy]
            .map(|n| n as f64)
            .to_vec()
            .into())
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
