//! The job engine: gives out all tasks of a job, and collects their answers, on R's thread.
//!
//! There is no R here. [`Planner`] decides who gets which tasks. A [`Codec`] encodes tasks and keeps what is
//! answered. A [`Dispatch`] sends messages and says what became of them: the hub, or a simulated one.
//!
//! What becomes of tasks that end without an answer is not decided here: [`Job::step`] stops with a [`Halt`],
//! and [`Job::settle`] follows.
//!
//! A codec may run R code, which may use the hub. So the engine holds nothing of the hub while it calls the
//! codec: each method of [`Dispatch`] takes what it needs and has given it back when it returns.

use super::batching::{Assignment, Ended, Planner};
use super::hub::{Answer, Begun, Hub, Turn};
use super::scheduler::events::Gone;
use crate::protocol::body::Body;
use crate::protocol::ids::{JobId, PayloadId, Rank, TaskId};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Places that are given something before answers are looked for, at first; then more and more.
const AT_ONCE: usize = 8;
/// How long is then waited for one.
const FIRST: Duration = Duration::from_micros(500);

/// How a message has its tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Several, as [`Codec::gather`] has put them together.
    Unit,
    /// One alone, encoded while it is sent.
    Long,
    /// One alone, with all that it needs: the message does not begin with the payload.
    Message,
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

    /// Whether this worker can be sent anything else than [`Form::Message`].
    fn takes_units(&self, rank: Rank) -> bool;

    /// Puts together as many of these tasks, from the first on, as fit into one message, to be written with
    /// [`Codec::write`]. Returns how many these are, and how the message is to have them. `most`: see
    /// [`super::batching::Unit`].
    ///
    /// # Errors
    /// When a task cannot be encoded.
    fn gather(&mut self, tasks: &[usize], most: Duration) -> Result<(usize, Form), Self::Stop>;

    /// Writes the message that has been begun, for this worker. `task`: its first.
    ///
    /// # Errors
    /// When the message is incomplete.
    fn write(&mut self, place: Rank, task: usize, form: Form) -> Result<(), Self::Stop>;

    /// Sends the payload once more, to the host of this worker, which does not have it.
    ///
    /// # Errors
    /// When the payload is incomplete.
    fn share_again(&mut self, payload: PayloadId, place: Rank) -> Result<(), Self::Stop>;

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
}

/// The hub, as a job uses it: see [`Hub`] for what the methods do.
pub trait Dispatch {
    /// The time.
    fn now(&self) -> Instant;
    /// Why a worker is gone for good, if it is.
    fn gone(&self, rank: Rank) -> Option<Arc<Gone>>;
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
        payload: impl FnOnce(Rank) -> Option<PayloadId>,
    ) -> Result<Begun, Arc<Gone>>;
    /// [`Hub::finish`].
    fn finish(&self);
    /// [`Hub::abandon`].
    fn abandon(&self);
    /// [`Hub::receive_any`].
    fn receive_any(&self, includes: impl Fn(Rank) -> bool, most: Duration) -> Answer;
    /// [`Hub::recall`].
    fn recall(&self, rank: Rank, task: TaskId);
    /// [`Hub::forget`].
    fn forget(&self, rank: Rank, task: TaskId);
}

impl Dispatch for RefCell<Hub> {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn gone(&self, rank: Rank) -> Option<Arc<Gone>> {
        self.borrow().worker(rank).gone
    }

    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        limit: Option<Duration>,
        payload: impl FnOnce(Rank) -> Option<PayloadId>,
    ) -> Result<Begun, Arc<Gone>> {
        let mut hub = self.borrow_mut();
        let begun = hub.begin(rank, job, None, turn, payload)?;
        hub.limit_time(limit);
        Ok(begun)
    }

    fn finish(&self) {
        self.borrow_mut().finish();
    }

    fn abandon(&self) {
        self.borrow_mut().abandon();
    }

    fn receive_any(&self, includes: impl Fn(Rank) -> bool, most: Duration) -> Answer {
        self.borrow_mut().receive_any(includes, most)
    }

    fn recall(&self, rank: Rank, task: TaskId) {
        self.borrow_mut().recall(rank, task);
    }

    fn forget(&self, rank: Rank, task: TaskId) {
        self.borrow_mut().forget(rank, task);
    }
}

/// Why [`Job::step`] has stopped: what the caller has to decide on. `S`: [`Codec::Stop`].
#[derive(Debug)]
pub enum Halt<S> {
    /// The codec could not do its part.
    Codec(S),
    /// The worker that had a message was lost. That is said again until [`Job::settle`] has followed.
    Lost {
        /// The worker that had it.
        place: Rank,
        /// How that worker ended.
        gone: Arc<Gone>,
        /// The message, for [`Job::settle`].
        task: TaskId,
        /// The first of its tasks, from 0.
        first: Option<usize>,
    },
    /// A message has taken too long: [`Job::settle`] is to follow.
    TimedOut {
        /// The worker that it was given to.
        rank: Rank,
        /// The message, for [`Job::settle`].
        task: TaskId,
        /// The first of its tasks, from 0.
        first: Option<usize>,
    },
    /// A worker that has tasks to do is gone, and no other is to do them.
    Gone {
        /// The worker.
        rank: Rank,
        /// How it ended.
        gone: Arc<Gone>,
    },
    /// Tasks are left and nothing is out. That never happens.
    Stuck,
}

/// A worker of a job, and what is known of it.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The worker.
    pub rank: Rank,
    /// Its host, counted from 0.
    pub host: usize,
    /// The cores of its host, 0 if that is not known.
    pub cores: usize,
    /// Seconds that the way to it and back takes, if that is known.
    pub way: Option<f64>,
    /// See [`Hub::is_detained`].
    pub detained: bool,
}

/// What a job is made of.
#[derive(Debug)]
pub struct Setup {
    /// The job's number.
    pub id: JobId,
    /// Its workers.
    pub places: Vec<Place>,
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
    /// What all tasks have in common.
    pub payload: PayloadId,
    /// Bytes that a worker has to read before the first task of each message.
    pub reading: Option<u64>,
}

/// Tasks that are out together in one message.
#[derive(Debug)]
struct Sent {
    place: usize,
    /// Positions in the order, from 0.
    tasks: Vec<usize>,
    at: Instant,
    /// How long it takes tells how long the way is: it is sent to its own worker, which is idle.
    telling: bool,
    /// It has been asked back.
    recalled: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Job {
    id: JobId,
    /// The worker of each place.
    ranks: Vec<Rank>,
    /// All of these.
    members: HashSet<Rank>,
    payload: PayloadId,
    order: Option<Vec<usize>>,
    tasks: usize,
    assignment: Assignment,
    planner: Planner,
    sent: HashMap<TaskId, Sent>,
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
    /// An answer that a step has left for the next, which may fail to be read.
    unread: Option<(Rank, TaskId, Body)>,
}

type Stepped<T, C> = Result<T, Halt<<C as Codec>::Stop>>;

impl Job {
    /// A job of which nothing has been sent. `now`: by [`Dispatch::now`].
    pub fn new(setup: Setup, now: Instant) -> Job {
        let count = setup.places.len();
        let mut planner = Planner::new(setup.assignment, setup.tasks, count);
        if setup.singly {
            planner.singly();
        }
        if let Some(bytes) = setup.reading {
            planner.expect_reading(bytes);
        }
        for (at, place) in setup.places.iter().enumerate() {
            planner.expect(at, place.way);
            planner.place_on(at, place.host, place.cores);
        }
        let ranks: Vec<Rank> = setup.places.iter().map(|place| place.rank).collect();
        Job {
            id: setup.id,
            members: ranks.iter().copied().collect(),
            ranks,
            payload: setup.payload,
            order: setup.order,
            tasks: setup.tasks,
            assignment: setup.assignment,
            planner,
            sent: HashMap::new(),
            lanes: vec![VecDeque::new(); count],
            at_once: AT_ONCE,
            ready: (0..count).collect(),
            detained: setup.places.iter().map(|place| place.detained).collect(),
            done: 0,
            began: now,
            timeout: setup.timeout,
            unread: None,
        }
    }

    /// The job's number.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// How long the way to each worker and back has taken, in seconds.
    pub fn ways(&self) -> impl Iterator<Item = (Rank, f64)> + '_ {
        let ranks = self.ranks.iter().enumerate();
        ranks.filter_map(|(place, &rank)| Some((rank, self.planner.way(place)?)))
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
        let places = 0..self.ranks.len();
        let busy = places.filter(|&at| self.planner.out(at) > 0).count();
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
    /// next step.
    ///
    /// # Errors
    /// What the caller has to decide on.
    pub fn step<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        most: Duration,
        plain_only: bool,
    ) -> Stepped<bool, C> {
        let until = hub.now() + most;
        if self.planner.may_resume(self.since_began(hub)) {
            self.wake();
        }
        let mut answered = false;
        if let Some((place, task, body)) = self.unread.take() {
            self.take(hub, codec, place, task, body)?;
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
                if let Err(halt) = self.fill(hub, codec, place) {
                    self.ready.push_back(place);
                    return Err(halt);
                }
            }
            if self.done == self.tasks {
                return Ok(true);
            }
            self.recall(hub);
            let mut left = until.saturating_duration_since(hub.now());
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
            match hub.receive_any(|rank| self.members.contains(&rank), left) {
                Answer::Ready {
                    place, task, body, ..
                } => {
                    if plain_only && !codec.is_plain(&body) {
                        self.unread = Some((place, task, body));
                        return Ok(false);
                    }
                    self.take(hub, codec, place, task, body)?;
                    answered = true;
                }
                Answer::Pending | Answer::NothingSent if !self.ready.is_empty() => {}
                // Until it is time, or a signal has come.
                Answer::Pending => return Ok(false),
                Answer::NothingSent => return Err(self.none_out(hub)),
                // It was sent to the worker before the job, which has sent it nothing yet.
                Answer::Lost { rank, task, .. } | Answer::TimedOut { rank, task }
                    if !self.sent.contains_key(&task) =>
                {
                    hub.forget(rank, task);
                }
                Answer::Lost {
                    place, task, gone, ..
                } => {
                    return Err(Halt::Lost {
                        place,
                        gone,
                        task,
                        first: self.first_of(task),
                    });
                }
                Answer::TimedOut { rank, task } => {
                    if let Some(sent) = self.sent.get(&task) {
                        self.detained[sent.place] = true;
                    }
                    return Err(Halt::TimedOut {
                        rank,
                        task,
                        first: self.first_of(task),
                    });
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
    fn none_out<S>(&self, hub: &impl Dispatch) -> Halt<S> {
        let ranks = self.lanes.iter().zip(&self.ranks);
        let ranks = ranks.filter(|(lane, _)| !lane.is_empty());
        let ranks = ranks.map(|(_, &rank)| rank);
        let mut gone = ranks.filter_map(|rank| Some((rank, hub.gone(rank)?)));
        gone.next()
            .map_or(Halt::Stuck, |(rank, gone)| Halt::Gone { rank, gone })
    }

    fn first_of(&self, task: TaskId) -> Option<usize> {
        Some(self.at(task)?.0)
    }

    /// Sends a place what it is to have now.
    fn fill<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        place: usize,
    ) -> Stepped<(), C> {
        if self.is_gone(hub, place)? {
            return Ok(());
        }
        loop {
            let began = hub.now();
            let now = began.saturating_duration_since(self.began);
            let Some(unit) = self.planner.next(place, now) else {
                return Ok(());
            };
            let turn = if unit.ahead { Turn::Ahead } else { Turn::Last };
            let sent = self.send(hub, codec, place, &unit.tasks, unit.most, turn);
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
            self.planner
                .took(hub.now().saturating_duration_since(began));
        }
    }

    /// Whether the worker of this place is gone, and others are there to do its part.
    fn is_gone<S>(&mut self, hub: &impl Dispatch, place: usize) -> Result<bool, Halt<S>> {
        if self.assignment == Assignment::Round {
            return Ok(false);
        }
        let rank = self.ranks[place];
        let Some(gone) = hub.gone(rank) else {
            return Ok(false);
        };
        self.planner.gone(place);
        match self.planner.any_left() {
            true => Ok(true),
            false => Err(Halt::Gone { rank, gone }),
        }
    }

    /// Sends as many of these tasks as fit into one message; `most`: see [`super::batching::Unit`]. Returns
    /// how many.
    fn send<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        place: usize,
        positions: &[usize],
        most: Duration,
        turn: Turn,
    ) -> Stepped<usize, C> {
        let rank = self.ranks[place];
        let (count, form) = match codec.takes_units(rank) {
            true => codec
                .gather(&self.indices(positions), most)
                .map_err(Halt::Codec)?,
            false => (1, Form::Message),
        };
        // What is long would wait here, and R with it.
        if turn == Turn::Ahead && form != Form::Unit {
            return Ok(0);
        }
        let is_unit = matches!(form, Form::Unit | Form::Long);
        let payload = |on| (is_unit && codec.takes_units(on)).then_some(self.payload);
        let begun = hub
            .begin(rank, self.id, turn, self.timeout, payload)
            .map_err(|gone| Halt::Gone { rank, gone })?;
        let payload = payload(begun.place);
        // Another may stand in that reads other numbers.
        let (count, form) = match payload {
            None if is_unit => (1, Form::Message),
            _ => (count, form),
        };
        let task = begun.task;
        let written = match payload {
            // A host that has come back, say.
            Some(payload) if !begun.shared => codec.share_again(payload, begun.place),
            _ => Ok(()),
        };
        let first = positions.first().map_or(0, |&position| self.task(position));
        match written.and_then(|()| codec.write(begun.place, first, form)) {
            Ok(()) => hub.finish(),
            Err(stop) => {
                hub.abandon();
                return Err(Halt::Codec(stop));
            }
        }
        let sent = Sent {
            place,
            tasks: positions[..count].to_vec(),
            at: hub.now(),
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
        self.detained[sent.place] = false;
        let now = hub.now();
        let bytes = body.len;
        let taken = match codec.take(on, task, &self.indices(&sent.tasks), body) {
            Ok(taken) => taken,
            Err(stop) => {
                // The caller decides on all of it: see settle().
                self.lanes[sent.place].push_front(task);
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
        self.planner.ended(sent.place, ended, at);
        let rest = sent.tasks.get(taken.tasks..).unwrap_or_default();
        if !rest.is_empty() {
            self.planner.returned(sent.place, rest);
        }
        self.done += taken.tasks;
        if !rest.is_empty() || self.planner.may_resume(at) {
            self.wake();
        }
        self.ready.push_front(sent.place);
        Ok(())
    }

    fn remove(&mut self, task: TaskId) -> Option<Sent> {
        let sent = self.sent.remove(&task)?;
        self.lanes[sent.place].retain(|&other| other != task);
        Some(sent)
    }

    /// Tasks are to be given out again: whoever has nothing to do is looked at, and last those who may not be
    /// able to begin.
    fn wake(&mut self) {
        let mut idle: Vec<bool> = self.lanes.iter().map(VecDeque::is_empty).collect();
        for &place in &self.ready {
            idle[place] = false;
        }
        let idle = |&place: &usize| idle[place];
        let (last, first): (Vec<usize>, Vec<usize>) = (0..self.lanes.len())
            .filter(idle)
            .partition(|&place| self.detained[place]);
        self.ready.extend(first);
        self.ready.extend(last);
    }

    /// When all tasks have been given out and some workers have nothing to do, what others have not
    /// begun is asked back.
    fn recall(&mut self, hub: &impl Dispatch) {
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
                hub.recall(self.ranks[sent.place], task);
            }
        }
    }

    /// A message has ended without an answer that could be read. `again`: those of its tasks that are to be
    /// tried again, one by one; the others have ended.
    ///
    /// # Errors
    /// When one of them cannot be sent.
    pub fn settle<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        task: TaskId,
        again: &[usize],
    ) -> Stepped<(), C> {
        let Some(sent) = self.remove(task) else {
            return Ok(());
        };
        let is_again = |&position: &usize| again.contains(&self.task(position));
        let again: Vec<usize> = sent.tasks.iter().copied().filter(is_again).collect();
        self.done += sent.tasks.len() - again.len();
        let place = sent.place;
        let rank = self.ranks[place];
        self.planner.dropped(place, false);
        let replaced = hub.gone(rank).is_none();
        if self.assignment == Assignment::Round && replaced {
            // Before what follows them: they go on with the random numbers that those before have left.
            for &position in again.iter().rev() {
                self.send(hub, codec, place, &[position], Duration::ZERO, Turn::First)?;
                self.planner.given_first(place);
            }
        } else {
            self.planner.lost(place, &again);
        }
        hub.forget(rank, task);
        // All that was with a worker which is gone is told as lost, and in its order.
        if replaced || self.assignment == Assignment::Free {
            self.ready.push_back(place);
        }
        self.wake();
        Ok(())
    }
}
