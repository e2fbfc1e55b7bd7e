//! The job engine: gives out all tasks of a job, and collects their answers, on R's thread.
//!
//! There is no R here. [`Planner`] decides who gets which tasks. A [`Codec`] encodes tasks and keeps what is
//! answered. A [`Dispatch`] sends messages and says what became of them: the hub, or a simulated one.
//!
//! [`Job::step`] retries tasks that were lost, by the job's [`Policy`]: each one alone, since it is not known which
//! task of a message has killed the worker. Only what needs R stops it, with a [`Halt`]: an error, or a result to be
//! made for tasks that have failed.
//!
//! A codec may run R code, which may use the hub. So the engine holds nothing of the hub while it calls the
//! codec: each method of [`Dispatch`] takes what it needs and has given it back when it returns.

use super::batching::{Assignment, Ended, Planner};
use super::hub::{Answer, Hub, StartedTask, Turn};
use super::retry::{Attempts, Policy};
use super::scheduler::events::{RankSet, Termination};
use crate::protocol::body::Body;
use crate::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod unanswered;

pub use unanswered::{BatchLoss, Failed};

/// Places that are given something before answers are looked for, at first; then more and more.
const MAX_STEPS: usize = 8;
/// How long is then waited for one.
const FIRST_ANSWER_WAIT: Duration = Duration::from_micros(500);

/// How a message has its tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Several, as [`Codec::gather`] has put them together.
    Batch,
    /// One alone, encoded while it is sent.
    Long,
    /// One alone, with all that it needs: the message does not begin with the blob.
    Single,
}

/// How many of its tasks an answer has answered, and how that went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    /// Tasks that were done, counted from the first: no more than the message had.
    pub tasks: usize,
    /// For how long the worker was at them.
    pub busy: Duration,
    /// For how long of it the worker had a core, if it has not waited for anything.
    pub computed: Option<Duration>,
    /// How long the worker had read before that what the tasks share.
    pub reading: Duration,
}

/// The tasks' encoding, and what becomes of their answers. Tasks are known by their numbers, from 0.
pub trait Codec {
    /// Why a method could not do its part: R jumped, say.
    type Stop;

    /// Whether this worker can be sent anything else than [`Form::Single`].
    fn takes_batches(&self, rank: Rank) -> bool;

    /// Puts together as many of these tasks, from the first on, as fit into one message, to be written with
    /// [`Codec::write`]. Returns how many these are, and how the message is to have them. `max_time`: see
    /// [`super::batching::Batch`].
    ///
    /// # Errors
    /// When a task cannot be encoded.
    fn gather(&mut self, tasks: &[usize], max_time: Duration) -> Result<(usize, Form), Self::Stop>;

    /// Writes the message that has been begun, for this worker. `task`: its first.
    ///
    /// # Errors
    /// When the message is incomplete.
    fn write(&mut self, assigned: Rank, task: usize, form: Form) -> Result<(), Self::Stop>;

    /// Sends the blob once more, to the host of this worker, which does not have it.
    ///
    /// # Errors
    /// When the blob is incomplete.
    fn resend_blob(&mut self, blob: BlobId, assigned: Rank) -> Result<(), Self::Stop>;

    /// Whether nothing can go wrong with reading this answer.
    fn is_plain(&self, body: &Body) -> bool;

    /// Takes what this worker has answered to a message with these tasks.
    ///
    /// # Errors
    /// When the answer cannot be read. Then no task of it counts as answered.
    fn take(
        &mut self,
        on: Rank,
        task: TaskId,
        tasks: &[usize],
        body: Body,
    ) -> Result<Taken, Self::Stop>;

    /// A message was lost, and that has been dealt with: `again` are those of its tasks that are retried. The others
    /// fail.
    fn lost(&mut self, failure: &BatchLoss, again: &[usize]);
}

/// The hub, as a job uses it: see [`Hub`] for what the methods do.
pub trait Dispatch {
    /// The time.
    fn now(&self) -> Instant;
    /// Why a worker is gone permanently, if it is.
    fn termination(&self, rank: Rank) -> Option<Arc<Termination>>;
    /// [`Hub::begin`], for a task of which nothing lasts, and [`Hub::limit_time`].
    ///
    /// # Errors
    /// When the worker is gone.
    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        limit: Option<Duration>,
        blob: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, Arc<Termination>>;
    /// [`Hub::finish`].
    fn finish(&self);
    /// [`Hub::abandon`].
    fn abandon(&self);
    /// [`Hub::receive_any`].
    fn receive_any(&self, workers: &RankSet, max_time: Duration) -> Answer;
    /// [`Hub::revoke`].
    fn revoke(&self, task: TaskId);
    /// [`Hub::forget`].
    fn forget(&self, task: TaskId);
}

impl Dispatch for RefCell<Hub> {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn termination(&self, rank: Rank) -> Option<Arc<Termination>> {
        self.borrow().worker(rank).termination
    }

    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        limit: Option<Duration>,
        blob: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, Arc<Termination>> {
        let mut hub = self.borrow_mut();
        let started = hub.begin(rank, job, None, turn, blob)?;
        hub.limit_time(limit);
        Ok(started)
    }

    fn finish(&self) {
        self.borrow_mut().finish();
    }

    fn abandon(&self) {
        self.borrow_mut().abandon();
    }

    fn receive_any(&self, workers: &RankSet, max_time: Duration) -> Answer {
        self.borrow_mut().receive_any(workers, max_time)
    }

    fn revoke(&self, task: TaskId) {
        self.borrow_mut().revoke(task);
    }

    fn forget(&self, task: TaskId) {
        self.borrow_mut().forget(task);
    }
}

/// Why [`Job::step`] has stopped: what it needs the caller for. `S`: [`Codec::Stop`].
#[derive(Debug)]
pub enum Halt<S> {
    /// The codec could not do its part.
    Codec(S),
    /// The loss of a message ends the job. That is said again.
    Lost(BatchLoss),
    /// The results of these tasks are to be made. That is said again until [`Job::made`] has followed.
    Failed(Failed),
    /// A worker that has tasks to do is gone, and no other is to do them.
    Terminated {
        /// The worker.
        rank: Rank,
        /// How it ended.
        termination: Arc<Termination>,
    },
    /// Tasks are left and nothing is out. That never happens.
    Stuck,
}

/// A worker of a job, and what is known of it.
#[derive(Clone, Copy, Debug)]
pub struct JobWorker {
    /// The worker.
    pub rank: Rank,
    /// Its host, counted from 0.
    pub host: usize,
    /// The cores of its host, 0 if that is not known.
    pub cores: usize,
    /// Seconds that the round trip to it takes, if that is known.
    pub rtt: Option<f64>,
    /// See [`Hub::is_detained`].
    pub detained: bool,
}

/// What a job is made of.
#[derive(Debug)]
pub struct Setup {
    /// The job's number.
    pub id: JobId,
    /// Its workers.
    pub slots: Vec<JobWorker>,
    /// How many tasks it has.
    pub tasks: usize,
    /// Who gets which.
    pub assignment: Assignment,
    /// The task that is begun at each position; otherwise in their order.
    pub order: Option<Vec<usize>>,
    /// No two tasks go together.
    pub singly: bool,
    /// How long a task may take.
    pub timeout: Option<Duration>,
    /// How often a lost task is retried.
    pub policy: Policy,
    /// What all tasks have in common.
    pub blob: BlobId,
    /// Bytes that a worker has to read before the first task of each message.
    pub reading: Option<u64>,
}

/// Tasks that are out together in one message.
///
/// `slot` and [`Job::lanes`] do not say where the message is: that is the hub's to know, and it forgets a message with
/// its end. They say whose share of the work it is, for the planner's estimates, in the order in which that place
/// begins its messages, which is not the order in which they were sent.
#[derive(Debug)]
struct SentBatch {
    slot: usize,
    /// Positions in the order, from 0.
    tasks: Vec<usize>,
    at: Instant,
    /// How long it takes tells how long the way is: it is sent to its own worker, which is idle.
    telling: bool,
    /// It has been asked back.
    revoked: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Job {
    id: JobId,
    /// The worker of each place.
    ranks: Vec<Rank>,
    /// All of these.
    members: RankSet,
    blob: BlobId,
    order: Option<Vec<usize>>,
    tasks: usize,
    assignment: Assignment,
    planner: Planner,
    sent: HashMap<TaskId, SentBatch>,
    /// Those that are out at each place, in the order in which they are begun.
    lanes: Vec<VecDeque<TaskId>>,
    /// Places that are given something between two looks at what has come.
    at_once: usize,
    /// Places that may be given more.
    ready: VecDeque<usize>,
    /// Places whose worker may still be at a task that took too long or was cancelled: others may have what
    /// waits for it.
    detained: Vec<bool>,
    done: usize,
    began: Instant,
    timeout: Option<Duration>,
    policy: Policy,
    /// Of the tasks that were lost.
    attempts: HashMap<usize, Attempts<Arc<BatchLoss>>>,
    /// Tasks whose results are to be made.
    failed: VecDeque<Failed>,
    /// An answer that a step has left for the next, which may fail to be read.
    unread: Option<(Rank, TaskId, Body)>,
}

type Stepped<T, C> = Result<T, Halt<<C as Codec>::Stop>>;

impl Job {
    /// A job of which nothing has been sent. `now`: by [`Dispatch::now`].
    pub fn new(setup: Setup, now: Instant) -> Job {
        let count = setup.slots.len();
        let mut planner = Planner::new(setup.assignment, setup.tasks, count);
        if setup.singly {
            planner.singly();
        }
        if let Some(bytes) = setup.reading {
            planner.expect_reading(bytes);
        }
        for (at, slot) in setup.slots.iter().enumerate() {
            planner.expect(at, slot.rtt);
            planner.place_on(at, slot.host, slot.cores);
        }
        let ranks: Vec<Rank> = setup.slots.iter().map(|slot| slot.rank).collect();
        Job {
            id: setup.id,
            members: ranks.iter().copied().collect(),
            ranks,
            blob: setup.blob,
            order: setup.order,
            tasks: setup.tasks,
            assignment: setup.assignment,
            planner,
            sent: HashMap::new(),
            lanes: vec![VecDeque::new(); count],
            at_once: MAX_STEPS,
            ready: (0..count).collect(),
            detained: setup.slots.iter().map(|slot| slot.detained).collect(),
            done: 0,
            began: now,
            timeout: setup.timeout,
            policy: setup.policy,
            attempts: HashMap::new(),
            failed: VecDeque::new(),
            unread: None,
        }
    }

    /// The job's number.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// How often a lost task is retried.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// How long the round trip to each worker has taken, in seconds.
    pub fn rtts(&self) -> impl Iterator<Item = (Rank, f64)> + '_ {
        let ranks = self.ranks.iter().enumerate();
        ranks.filter_map(|(slot, &rank)| Some((rank, self.planner.rtt(slot)?)))
    }

    /// The tasks of a message that is out: the first one's number, from 0, and how many.
    pub fn at(&self, task: TaskId) -> Option<(usize, usize)> {
        let tasks = &self.sent.get(&task)?.tasks;
        Some((self.task(*tasks.first()?), tasks.len()))
    }

    /// The tasks of a message that is out.
    pub fn tasks_of(&self, task: TaskId) -> Cow<'_, [usize]> {
        let sent = self.sent.get(&task);
        self.indices(sent.map_or(&[], |sent| &sent.tasks))
    }

    /// How far the job is: tasks, those that have ended, and workers that are busy.
    pub fn progress(&self) -> (usize, usize, usize) {
        let slots = 0..self.ranks.len();
        let busy = slots.filter(|&at| self.planner.out(at) > 0).count();
        (self.tasks, self.done, busy)
    }

    fn task(&self, position: usize) -> usize {
        self.order
            .as_ref()
            .map_or(position, |order| order[position])
    }

    /// The tasks at these positions of the order.
    fn indices<'a>(&self, positions: &'a [usize]) -> Cow<'a, [usize]> {
        match &self.order {
            None => positions.into(),
            Some(order) => positions.iter().map(|&at| order[at]).collect(),
        }
    }

    fn since_began(&self, hub: &impl Dispatch) -> Duration {
        hub.now().saturating_duration_since(self.began)
    }

    /// Gives tasks out and takes answers, for so long at most, or until there is something else to do first.
    /// Returns whether all tasks have ended. `plain_only`: an answer that may fail to be read is left for the
    /// next step. Returns early after a loss, for whoever is to be told of that.
    ///
    /// # Errors
    /// What the caller is needed for.
    pub fn step<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        max_time: Duration,
        plain_only: bool,
    ) -> Stepped<bool, C> {
        if !self.failed.is_empty() {
            return self.failed();
        }
        let until = hub.now() + max_time;
        if self.planner.may_resume(self.since_began(hub)) {
            self.wake();
        }
        let mut answered = false;
        if let Some((assigned, task, body)) = self.unread.take() {
            self.take(hub, codec, assigned, task, body)?;
        }
        loop {
            // While answers come, those who have answered are given more at once, and others are not
            // begun with: it is they who are quick, and have the function and its memory at hand.
            let count = if answered { 1 } else { self.at_once };
            answered = false;
            for _ in 0..count {
                let Some(slot) = self.ready.pop_front() else {
                    break;
                };
                if let Err(halt) = self.fill(hub, codec, slot) {
                    self.ready.push_back(slot);
                    return Err(halt);
                }
            }
            if self.done == self.tasks {
                return Ok(true);
            }
            self.revoke(hub);
            let mut left = until.saturating_duration_since(hub.now());
            if left.is_zero() {
                return Ok(false);
            }
            if !self.ready.is_empty() {
                // The first answers tell how large batches should be: worth waiting for, as long as not
                // much time is lost by that if they do not come.
                left = match self.planner.knows() {
                    true => Duration::ZERO,
                    false => FIRST_ANSWER_WAIT,
                };
                self.at_once = match self.planner.knows() {
                    true => MAX_STEPS,
                    false => 2 * self.at_once,
                };
            }
            match hub.receive_any(&self.members, left) {
                Answer::Ready {
                    assigned,
                    task,
                    body,
                    ..
                } => {
                    if plain_only && !codec.is_plain(&body) {
                        self.unread = Some((assigned, task, body));
                        return Ok(false);
                    }
                    self.take(hub, codec, assigned, task, body)?;
                    answered = true;
                }
                Answer::Pending | Answer::NothingSent if !self.ready.is_empty() => {}
                // Until it is time, or a signal has come.
                Answer::Pending => return Ok(false),
                Answer::NothingSent => return Err(self.none_out(hub)),
                // It was sent to the worker before the job, which has sent it nothing yet.
                Answer::Lost { task, .. } if !self.sent.contains_key(&task) => hub.forget(task),
                Answer::Lost {
                    assigned,
                    task,
                    termination,
                    ..
                } => {
                    let failure = BatchLoss {
                        assigned,
                        now: hub.termination(assigned),
                        termination,
                        task,
                        tasks: self.tasks_of(task).into_owned(),
                    };
                    self.lost(hub, codec, failure)?;
                    return self.failed();
                }
                Answer::TimedOut { rank, task } => {
                    if let Some(sent) = self.remove(task) {
                        self.detained[sent.slot] = true;
                        let tasks = self.indices(&sent.tasks).into_owned();
                        self.give_out(hub, codec, &sent, &[])?;
                        self.failed.push_back(Failed::TimedOut { rank, tasks });
                        return self.failed();
                    }
                }
                Answer::Revoked { task, .. } => {
                    if let Some(sent) = self.remove(task) {
                        self.planner.dropped(sent.slot, true);
                        self.planner.returned(sent.slot, &sent.tasks);
                        self.wake();
                    }
                }
                Answer::GivenUp { .. } => {}
            }
        }
    }

    /// What was outstanding on a node that has been stopped, in the middle of the job, is forgotten.
    fn none_out<S>(&self, hub: &impl Dispatch) -> Halt<S> {
        let ranks = self.lanes.iter().zip(&self.ranks);
        let ranks = ranks.filter(|(lane, _)| !lane.is_empty());
        let ranks = ranks.map(|(_, &rank)| rank);
        let mut terminated = ranks.filter_map(|rank| Some((rank, hub.termination(rank)?)));
        terminated
            .next()
            .map_or(Halt::Stuck, |(rank, termination)| Halt::Terminated {
                rank,
                termination,
            })
    }

    /// Sends a place what it is to have now.
    fn fill<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        slot: usize,
    ) -> Stepped<(), C> {
        if self.is_terminated(hub, slot)? {
            return Ok(());
        }
        loop {
            let began = hub.now();
            let now = began.saturating_duration_since(self.began);
            let Some(batch) = self.planner.next(slot, now) else {
                return Ok(());
            };
            let turn = if batch.prefetch {
                Turn::Prefetch
            } else {
                Turn::Last
            };
            let sent = self.send(hub, codec, slot, &batch.tasks, batch.max_time, turn);
            let count = match &sent {
                Ok(count) => *count,
                Err(_) => 0,
            };
            if count < batch.tasks.len() {
                self.planner.returned(slot, &batch.tasks[count..]);
            }
            if count == 0 {
                self.planner.dropped(slot, true);
            } else {
                self.planner.shortened(slot, count);
            }
            if sent? == 0 {
                return Ok(());
            }
            self.planner
                .took(hub.now().saturating_duration_since(began));
        }
    }

    /// Whether the worker of this place is gone, and others are there to do its part.
    fn is_terminated<S>(&mut self, hub: &impl Dispatch, slot: usize) -> Result<bool, Halt<S>> {
        if self.assignment == Assignment::Round {
            return Ok(false);
        }
        let rank = self.ranks[slot];
        let Some(termination) = hub.termination(rank) else {
            return Ok(false);
        };
        self.planner.close(slot);
        match self.planner.any_left() {
            true => Ok(true),
            false => Err(Halt::Terminated { rank, termination }),
        }
    }

    /// Sends as many of these tasks as fit into one message; `max_time`: see [`super::batching::Batch`]. Returns
    /// how many.
    fn send<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        slot: usize,
        positions: &[usize],
        max_time: Duration,
        turn: Turn,
    ) -> Stepped<usize, C> {
        let rank = self.ranks[slot];
        let (count, form) = match codec.takes_batches(rank) {
            true => codec
                .gather(&self.indices(positions), max_time)
                .map_err(Halt::Codec)?,
            false => (1, Form::Single),
        };
        // What is long would wait here, and R with it.
        if turn == Turn::Prefetch && form != Form::Batch {
            return Ok(0);
        }
        let is_batch = matches!(form, Form::Batch | Form::Long);
        let blob = |on| (is_batch && codec.takes_batches(on)).then_some(self.blob);
        let started = hub
            .begin(rank, self.id, turn, self.timeout, blob)
            .map_err(|termination| Halt::Terminated { rank, termination })?;
        let blob = blob(started.assigned);
        // Another may stand in that reads other numbers.
        let (count, form) = match blob {
            None if is_batch => (1, Form::Single),
            _ => (count, form),
        };
        let task = started.task;
        let written = match blob {
            // A host that has come back, say.
            Some(blob) if !started.has_blob => codec.resend_blob(blob, started.assigned),
            _ => Ok(()),
        };
        let first = positions.first().map_or(0, |&position| self.task(position));
        match written.and_then(|()| codec.write(started.assigned, first, form)) {
            Ok(()) => hub.finish(),
            Err(stop) => {
                hub.abandon();
                return Err(Halt::Codec(stop));
            }
        }
        let sent = SentBatch {
            slot,
            tasks: positions[..count].to_vec(),
            at: hub.now(),
            telling: turn == Turn::Last && started.assigned == rank && !started.behind_call,
            revoked: false,
        };
        self.sent.insert(task, sent);
        match turn {
            Turn::First => self.lanes[slot].push_front(task),
            Turn::Last | Turn::Prefetch => self.lanes[slot].push_back(task),
        }
        Ok(count)
    }

    /// Takes what this worker has answered.
    fn take<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        on: Rank,
        task: TaskId,
        body: Body,
    ) -> Stepped<(), C> {
        let Some(sent) = self.remove(task) else {
            return Ok(());
        };
        self.detained[sent.slot] = false;
        let now = hub.now();
        let bytes = body.len;
        let taken = match codec.take(on, task, &self.indices(&sent.tasks), body) {
            Ok(taken) => taken,
            Err(stop) => {
                // The caller finds out why first: see [`Job::unreadable`].
                self.lanes[sent.slot].push_front(task);
                self.sent.insert(task, sent);
                return Err(Halt::Codec(stop));
            }
        };
        let turnaround = sent.telling.then(|| now.saturating_duration_since(sent.at));
        let ended = Ended {
            tasks: taken.tasks,
            busy: taken.busy,
            turnaround,
            bytes,
            computed: taken.computed,
            reading: taken.reading,
        };
        let at = self.since_began(hub);
        self.planner.ended(sent.slot, ended, at);
        let rest = sent.tasks.get(taken.tasks..).unwrap_or_default();
        if !rest.is_empty() {
            self.planner.returned(sent.slot, rest);
        }
        self.done += taken.tasks;
        if !rest.is_empty() || self.planner.may_resume(at) {
            self.wake();
        }
        self.ready.push_front(sent.slot);
        Ok(())
    }

    fn remove(&mut self, task: TaskId) -> Option<SentBatch> {
        let sent = self.sent.remove(&task)?;
        self.lanes[sent.slot].retain(|&other| other != task);
        Some(sent)
    }

    /// Tasks are to be given out again: whoever has nothing to do is looked at, and last those who may not be
    /// able to begin.
    fn wake(&mut self) {
        let mut idle: Vec<bool> = self.lanes.iter().map(VecDeque::is_empty).collect();
        for &slot in &self.ready {
            idle[slot] = false;
        }
        let idle = |&slot: &usize| idle[slot];
        let (last, first): (Vec<usize>, Vec<usize>) = (0..self.lanes.len())
            .filter(idle)
            .partition(|&slot| self.detained[slot]);
        self.ready.extend(first);
        self.ready.extend(last);
    }

    /// When all tasks have been given out and some workers have nothing to do, what others have not
    /// begun is asked back.
    fn revoke(&mut self, hub: &impl Dispatch) {
        if self.assignment == Assignment::Round || self.planner.left() > 0 {
            return;
        }
        let lanes = || self.lanes.iter().zip(&self.detained);
        let is_idle =
            |(lane, detained): &(&VecDeque<TaskId>, &bool)| lane.is_empty() && !**detained;
        let idle = lanes().filter(is_idle).count();
        let asked = self.sent.values().filter(|sent| sent.revoked).count();
        // Of those who are detained, the first may not have begun either. If it has, it stays.
        let started = |detained: bool| usize::from(!detained);
        let waiting = lanes().filter_map(|(lane, &detained)| lane.get(started(detained)).copied());
        for task in waiting
            .collect::<Vec<_>>()
            .into_iter()
            .take(idle.saturating_sub(asked))
        {
            if let Some(sent) = self.sent.get_mut(&task).filter(|sent| !sent.revoked) {
                sent.revoked = true;
                hub.revoke(task);
            }
        }
    }
}

#[cfg(test)]
mod tests;
