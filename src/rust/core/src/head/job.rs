//! The job engine: sends all tasks of a job and collects their answers, on R's thread.
//!
//! The engine is independent of R. The [`Planner`] decides which worker gets which tasks. A [`Codec`] encodes tasks and
//! stores answers. A [`Dispatch`] sends messages and reports how they ended: the hub, or a simulated one.
//!
//! [`Job::step`] retries lost tasks by the job's [`Policy`]. Each is retried alone, because it is not known which task
//! of a message has killed the worker. A step stops only if it needs R, and then returns a [`Halt`]: an error, or a
//! request to make the results of failed tasks.
//!
//! A codec may run R code, which may use the hub. The engine therefore borrows nothing of the hub while it calls the
//! codec: each method of [`Dispatch`] releases its borrow when it returns.

use super::batching::{Assignment, Ended, Planner};
use super::dashboard::board::JobGauge;
use super::hub::{Answer, Turn};
use super::retry::{Attempts, Policy};
use super::scheduler::events::{RankSet, Termination};
use crate::protocol::body::Body;
use crate::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod codec;
mod dispatch;
mod unanswered;

pub use codec::{Codec, Form, Taken};
pub use dispatch::Dispatch;
pub use unanswered::{BatchLoss, Failed};

/// Number of slots that are sent a batch before the engine first checks for answers. The number grows until tasks have
/// ended.
const MAX_STEPS: usize = 8;
/// How long the engine then waits for an answer.
const FIRST_ANSWER_WAIT: Duration = Duration::from_micros(500);

/// Why [`Job::step`] has stopped and needs the caller. `S`: [`Codec::Stop`].
#[derive(Debug)]
pub enum Halt<S> {
    /// The codec failed.
    Codec(S),
    /// The loss of a message ends the job. Further steps return the same.
    Lost(BatchLoss),
    /// The caller must make the results of these tasks. Further steps return the same until [`Job::made`] is called.
    Failed(Failed),
    /// A worker with unfinished tasks has terminated, and no other worker may run them.
    Terminated {
        /// The worker.
        rank: Rank,
        /// How the worker terminated.
        termination: Arc<Termination>,
    },
    /// Tasks are left and no message is outstanding, which never happens.
    Stuck,
}

/// A worker of a job, and the properties that the planner uses.
#[derive(Clone, Copy, Debug)]
pub struct JobWorker {
    /// The worker.
    pub rank: Rank,
    /// Its host, counted from 0.
    pub host: usize,
    /// The cores of its host, 0 if unknown.
    pub cores: usize,
    /// The round-trip time to the worker in seconds, if known.
    pub rtt: Option<f64>,
    /// See [`Hub::is_detained`](super::hub::Hub::is_detained).
    pub detained: bool,
    /// The worker has not joined yet. Only for a free assignment.
    pub absent: bool,
}

/// The parameters of a job.
#[derive(Debug)]
pub struct Setup {
    /// The job's number.
    pub id: JobId,
    /// Its workers.
    pub slots: Vec<JobWorker>,
    /// Number of tasks.
    pub tasks: usize,
    /// How tasks are assigned to workers.
    pub assignment: Assignment,
    /// The order in which tasks are started: the task at each position. `None`: by number.
    pub order: Option<Vec<usize>>,
    /// Each message has only one task.
    pub singly: bool,
    /// The time limit of a task.
    pub timeout: Option<Duration>,
    /// How often a lost task is retried.
    pub policy: Policy,
    /// The blob that all tasks share.
    pub blob: BlobId,
    /// Bytes of the blob that a worker must read before the first task of each message.
    pub reading: Option<u64>,
}

/// An outstanding message and its tasks.
///
/// `slot` and [`Job::outstanding`] do not record which worker has the message: the hub knows that until the message
/// ends. They record which slot's share of the work the message is, for the planner's estimates, in the order in which
/// the slot starts its messages. That order differs from the order of sending.
#[derive(Debug)]
struct SentBatch {
    slot: usize,
    /// The tasks, as positions in the order, from 0.
    tasks: Vec<usize>,
    at: Instant,
    /// The turnaround of the message measures the round-trip time: the message was sent to its own worker, which was
    /// idle.
    measures_rtt: bool,
    /// A revoke request has been sent.
    revoked: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Job {
    id: JobId,
    /// The worker of each slot.
    ranks: Vec<Rank>,
    /// The workers of all slots.
    members: RankSet,
    blob: BlobId,
    order: Option<Vec<usize>>,
    tasks: usize,
    assignment: Assignment,
    planner: Planner,
    sent: HashMap<TaskId, SentBatch>,
    /// The outstanding messages of each slot, in the order in which they are started.
    outstanding: Vec<VecDeque<TaskId>>,
    /// Number of slots that are sent a batch between two checks for answers.
    at_once: usize,
    /// Slots that may get another batch.
    ready: VecDeque<usize>,
    /// Slots whose worker may still be running a task that timed out or was cancelled. Messages that wait for such a
    /// worker are revoked for other workers.
    detained: Vec<bool>,
    /// Slots whose worker has not joined yet, or has terminated. They take part again once it is there.
    absent: Vec<bool>,
    /// [`Dispatch::arrivals`] when `absent` was last compared with the hub.
    arrivals: u64,
    done: usize,
    /// Shows `done` to other threads.
    gauge: Arc<JobGauge>,
    began: Instant,
    timeout: Option<Duration>,
    policy: Policy,
    /// The attempts at each task that was lost or was in a message that could not be read. Such a task is sent alone.
    attempts: HashMap<usize, Attempts<Arc<BatchLoss>>>,
    /// Failed tasks whose results the caller has not made yet.
    failed: VecDeque<Failed>,
    /// An answer that a step has left for the next one, because reading it may fail.
    unread: Option<(Rank, TaskId, Body)>,
}

/// Whether a worker can be sent tasks.
fn is_available(hub: &impl Dispatch, rank: Rank) -> bool {
    hub.termination(rank).is_none() && hub.draining(rank).is_none()
}

type Stepped<T, C> = Result<T, Halt<<C as Codec>::Stop>>;

impl Job {
    /// Creates a job. `now`: by [`Dispatch::now`].
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
            planner.set_host(at, slot.host, slot.cores);
            if slot.absent {
                planner.close(at);
            }
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
            outstanding: vec![VecDeque::new(); count],
            at_once: MAX_STEPS,
            ready: (0..count).filter(|&at| !setup.slots[at].absent).collect(),
            detained: setup.slots.iter().map(|slot| slot.detained).collect(),
            absent: setup.slots.iter().map(|slot| slot.absent).collect(),
            arrivals: u64::MAX,
            done: 0,
            gauge: Arc::default(),
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

    /// The measured round-trip time of each worker, in seconds.
    pub fn rtts(&self) -> impl Iterator<Item = (Rank, f64)> + '_ {
        let ranks = self.ranks.iter().enumerate();
        ranks.filter_map(|(slot, &rank)| Some((rank, self.planner.rtt(slot)?)))
    }

    /// The tasks of an outstanding message: the number of the first one, from 0, and how many.
    pub fn at(&self, task: TaskId) -> Option<(usize, usize)> {
        let tasks = &self.sent.get(&task)?.tasks;
        Some((self.task(*tasks.first()?), tasks.len()))
    }

    /// The tasks of an outstanding message.
    pub fn tasks_of(&self, task: TaskId) -> Cow<'_, [usize]> {
        let sent = self.sent.get(&task);
        self.indices(sent.map_or(&[], |sent| &sent.tasks))
    }

    /// The progress of the job: the numbers of all tasks, ended tasks, and busy workers.
    pub fn progress(&self) -> (usize, usize, usize) {
        let slots = 0..self.ranks.len();
        let busy = slots.filter(|&at| self.planner.out(at) > 0).count();
        (self.tasks, self.done, busy)
    }

    /// The number of ended tasks, for other threads.
    pub fn gauge(&self) -> Arc<JobGauge> {
        self.gauge.clone()
    }

    /// Counts tasks that have ended.
    fn ended(&mut self, tasks: usize) {
        self.done += tasks;
        self.gauge.set(self.done);
    }

    /// Number of tasks that have not been assigned to a worker.
    pub fn left(&self) -> usize {
        self.planner.left()
    }

    /// The workers of the job.
    pub fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// Whether any worker may run any of the tasks.
    pub fn is_free(&self) -> bool {
        self.assignment == Assignment::Free
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

    /// Sends tasks and takes answers for up to `max_time`. Returns whether all tasks have ended. Returns early after a
    /// loss, so that the caller can report it, and after a signal. `plain_only`: an answer whose reading may fail is
    /// left for the next step.
    ///
    /// # Errors
    /// When the caller is needed: see [`Halt`].
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
        self.admit(hub);
        let mut answered = false;
        if let Some((assigned, task, body)) = self.unread.take() {
            self.take(hub, codec, assigned, task, body)?;
        }
        loop {
            // While answers arrive, workers that have answered get more at once, before the others start:
            // they are quick, and have the function and its memory in their caches.
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
                // The first answers determine how large batches should be. That is worth a wait that costs
                // little time if no answer arrives.
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
                // The time is over, or a signal has arrived.
                Answer::Pending => return Ok(false),
                Answer::NothingSent if self.awaits(hub) => {
                    hub.await_arrival(self.arrivals, left);
                    return Ok(false);
                }
                Answer::NothingSent => return Err(self.none_out(hub)),
                // The message is not one of this job: it was sent to the worker before.
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
                        self.give_back(sent.slot, &sent.tasks);
                        self.wake();
                    }
                }
                Answer::GivenUp { .. } => {}
            }
        }
    }

    /// Lets slots take part whose worker has joined, or has come back.
    fn admit(&mut self, hub: &impl Dispatch) {
        let arrivals = hub.arrivals();
        if std::mem::replace(&mut self.arrivals, arrivals) == arrivals {
            return;
        }
        for slot in 0..self.absent.len() {
            if self.absent[slot] && is_available(hub, self.ranks[slot]) {
                self.absent[slot] = false;
                self.planner.open(slot);
                self.ready.push_back(slot);
            }
        }
    }

    /// Whether a worker of the job may still join.
    fn awaits(&self, hub: &impl Dispatch) -> bool {
        let absent = self.absent.iter().zip(&self.ranks);
        let mut absent = absent.filter(|&(absent, _)| *absent);
        absent.any(|(_, &rank)| hub.is_awaited(rank) || is_available(hub, rank))
    }

    /// Explains why no message is outstanding: the hub forgets the messages of a node that is stopped during the job.
    fn none_out<S>(&self, hub: &impl Dispatch) -> Halt<S> {
        let slots = self.outstanding.iter().zip(&self.absent).zip(&self.ranks);
        let slots = slots.filter(|((queue, absent), _)| !queue.is_empty() || **absent);
        let ranks = slots.map(|(_, &rank)| rank);
        let terminated = ranks.filter_map(|rank| Some((rank, hub.termination(rank)?)));
        let ends =
            |&rank: &Rank| Some((rank, hub.termination(rank).or_else(|| hub.draining(rank))?));
        terminated
            .chain(self.ranks.iter().filter_map(ends))
            .next()
            .map_or(Halt::Stuck, |(rank, termination)| Halt::Terminated {
                rank,
                termination,
            })
    }

    /// Sends a slot the batches that it should get now.
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
                self.give_back(slot, &batch.tasks[count..]);
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
                .record_cost(hub.now().saturating_duration_since(began));
        }
    }

    /// Whether the worker of this slot has terminated and other workers can run its tasks.
    fn is_terminated<S>(&mut self, hub: &impl Dispatch, slot: usize) -> Result<bool, Halt<S>> {
        if self.assignment == Assignment::Round {
            return Ok(false);
        }
        let rank = self.ranks[slot];
        let ended = hub.termination(rank);
        let Some(termination) = ended.or_else(|| hub.draining(rank)) else {
            return Ok(false);
        };
        self.planner.close(slot);
        self.absent[slot] = true;
        if self.outstanding[slot].is_empty() {
            hub.release(rank);
        }
        match self.planner.any_left() || self.awaits(hub) || self.is_draining(hub) {
            true => Ok(true),
            false => Err(Halt::Terminated { rank, termination }),
        }
    }

    /// Whether a draining worker still has messages, or has answered the last task.
    fn is_draining(&self, hub: &impl Dispatch) -> bool {
        let mut slots = self.outstanding.iter().zip(&self.ranks);
        let has_messages = slots.any(|(queue, &rank)| {
            let drains = || hub.termination(rank).is_none() && hub.draining(rank).is_some();
            !queue.is_empty() && drains()
        });
        has_messages || self.done == self.tasks
    }

    /// Sends as many of these tasks as fit into one message, and returns their number. `max_time`: see
    /// [`super::batching::Batch`].
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
        // Sending a long message to a busy worker would block, and R with it.
        if turn == Turn::Prefetch && form != Form::Batch {
            return Ok(0);
        }
        let is_batch = matches!(form, Form::Batch | Form::Long);
        let blob = |on| (is_batch && codec.takes_batches(on)).then_some(self.blob);
        let started = hub
            .begin(rank, self.id, turn, self.timeout, blob)
            .map_err(|termination| Halt::Terminated { rank, termination })?;
        if self.assignment == Assignment::Free {
            hub.make_movable();
        }
        let blob = blob(started.assigned);
        // The task may be reassigned to a worker with another number format, which takes no batches.
        let (count, form) = match blob {
            None if is_batch => (1, Form::Single),
            _ => (count, form),
        };
        let task = started.task;
        let written = match blob {
            // For example, a host that has reconnected does not have the blob.
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
            measures_rtt: turn == Turn::Last && started.assigned == rank && !started.behind_call,
            revoked: false,
        };
        self.sent.insert(task, sent);
        match turn {
            Turn::First => self.outstanding[slot].push_front(task),
            Turn::Last | Turn::Prefetch => self.outstanding[slot].push_back(task),
        }
        Ok(count)
    }

    /// Takes an answer of this worker.
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
                // The message stays outstanding until the caller knows the reason: see [`Job::unreadable`].
                self.outstanding[sent.slot].push_front(task);
                self.sent.insert(task, sent);
                return Err(Halt::Codec(stop));
            }
        };
        let turnaround = sent
            .measures_rtt
            .then(|| now.saturating_duration_since(sent.at));
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
        self.give_back(sent.slot, rest);
        self.ended(taken.tasks);
        if !rest.is_empty() || self.planner.may_resume(at) {
            self.wake();
        }
        self.ready.push_front(sent.slot);
        Ok(())
    }

    fn remove(&mut self, task: TaskId) -> Option<SentBatch> {
        let sent = self.sent.remove(&task)?;
        self.outstanding[sent.slot].retain(|&other| other != task);
        Some(sent)
    }

    /// Makes all idle slots ready, because there are tasks to send again. Slots whose worker may still be busy come
    /// last.
    fn wake(&mut self) {
        let mut idle: Vec<bool> = self.outstanding.iter().map(VecDeque::is_empty).collect();
        for &slot in &self.ready {
            idle[slot] = false;
        }
        let idle = |&slot: &usize| idle[slot];
        let (last, first): (Vec<usize>, Vec<usize>) = (0..self.outstanding.len())
            .filter(idle)
            .partition(|&slot| self.detained[slot]);
        self.ready.extend(first);
        self.ready.extend(last);
    }

    /// Revokes messages that workers have not started, if all tasks have been sent and other workers are idle.
    fn revoke(&mut self, hub: &impl Dispatch) {
        if self.assignment == Assignment::Round || self.planner.left() > 0 {
            return;
        }
        let queues = || self.outstanding.iter().zip(&self.detained);
        let is_idle =
            |(queue, detained): &(&VecDeque<TaskId>, &bool)| queue.is_empty() && !**detained;
        let idle = queues().filter(is_idle).count();
        let asked = self.sent.values().filter(|sent| sent.revoked).count();
        // A detained worker may not have started its first message either. If it has, the request has no effect.
        let started = |detained: bool| usize::from(!detained);
        let waiting =
            queues().filter_map(|(queue, &detained)| queue.get(started(detained)).copied());
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
