//! The head's bookkeeping: which task is where, what may be sent, what has ended.
//!
//! A pure state machine. Frames and commands go in; frames come out of [`Scheduler::next_frame`]
//! when a stream can take them, and notes for R out of [`Scheduler::take_notes`]. There is no
//! socket, clock or thread here (who wants to know when workers were busy tells the time with
//! [`Scheduler::at`]), so that thousands of workers and years of faults can be
//! simulated.
//!
//! Promises kept here: every submitted task gets exactly one [`Note::Done`]; tasks of one worker
//! start in the order of submission and one at a time, and a task that was lost with its worker
//! before those that follow it, if it is submitted again; one that was sent ahead (see
//! [`Order::ahead`]) and has not started is not lost with a worker that is replaced; bytes of one worker never hold up
//! another's by more than a chunk; what the head buffers of large results stays under the limit
//! and a [`GRANT`] (one in shared memory fits under it as a whole), but for one result that R waits for by rank and one for want of any.

use crate::activity::{Measure, Moment, TOO_LONG, Times, Track};
use crate::payloads::Payloads;
use crate::protocol::body::{Body, Memory};
use crate::protocol::control::{self, Loss, ToAgent, ToHead, Usage};
use crate::protocol::dedup::{Chunk, Mirror, Sent};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{
    ABORT, FIRST, Frame, GUEST, HEADER_LEN, Header, Kind, LAST, MAX_BODY, SHARED,
};
use crate::protocol::ids::{CALLS, JobId, PayloadId, RESTORE, Rank, TaskId};
use crate::protocol::limits::{GRANT, MOST_MEMORY, RESULT_WINDOW, SEND_WINDOW};
use bytes::Bytes;
use std::collections::{HashSet, VecDeque};
use std::mem;
use std::sync::Arc;

mod calls;

pub use calls::CallPlace;
use calls::Calls;

/// Large results that flow from a host at a time.
const AT_ONCE: usize = 4;

/// A host on which so many workers (and four times as many as it has: each may be given a task that
/// ends it three times) are lost in a row, without a task that ends in between, is left out, if there
/// is another.
pub const LOSSES_IN_A_ROW: usize = 10;

/// Results in shared memory that are held at a time, but for one that R waits for: each takes a
/// descriptor.
pub const MOST_SHARED: usize = 128;

/// Why a worker is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gone {
    /// Its process ended by itself or was killed.
    Worker(Loss),
    /// Its host's agent, or the way to it, was lost.
    Host(String),
    /// It was stopped on request.
    Stopped,
}

impl Gone {
    /// Whether its agent makes another in its place after a pause.
    pub fn is_tried_again(&self) -> bool {
        matches!(self, Gone::Worker(loss) if loss.setback.pause > 0)
    }
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The worker's answer: a serialized R object, which may well be an R error.
    Answer(Body),
    /// The worker ended before it could answer. If another takes its place, tasks that follow wait
    /// until this one has been submitted again or [`Scheduler::let_go`].
    Lost(Arc<Gone>),
    /// It took longer than it may.
    TimedOut,
    /// The head no longer wants the answer.
    Cancelled,
    /// It was taken back before it had started: see [`Scheduler::recall`].
    Recalled,
}

/// What the rest of the head must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A worker has started and is ready for tasks.
    Up {
        /// The worker's rank.
        rank: Rank,
        /// The worker's process number.
        pid: u32,
    },
    /// A worker was lost; a fresh one is on its way to its place.
    Lost {
        /// The worker's rank.
        rank: Rank,
        /// How the worker ended.
        loss: Loss,
        /// Whether the worker had a task, which is reported by a note of its own.
        task: bool,
    },
    /// A fresh worker has taken the place of one that was lost.
    Replaced {
        /// The worker's rank, which the fresh one has too.
        rank: Rank,
        /// The process number of the fresh worker.
        pid: u32,
        /// Whether the worker before it was killed because it did not respond to an interrupt.
        killed: bool,
    },
    /// A worker that could not be restored at first is there again, as it was.
    Back {
        /// The worker's rank.
        rank: Rank,
        /// The worker's process number.
        pid: u32,
    },
    /// What lasts on a worker is more than its host holds.
    StateNotKept {
        /// The worker's rank.
        rank: Rank,
    },
    /// Its workers were lost again and again: it is to be left alone.
    LeftOut {
        /// The host's index among all.
        agent: usize,
        /// Why, for the user.
        reason: String,
    },
    /// A worker is gone for good.
    Gone {
        /// The worker's rank.
        rank: Rank,
        /// Why it is gone.
        gone: Arc<Gone>,
    },
    /// The process of a worker that is gone has ended.
    Ended {
        /// The worker's rank.
        rank: Rank,
        /// Whether the worker was idle when it was stopped, and was killed because it did not end in time.
        timed_out: bool,
    },
    /// A task has ended.
    Done {
        /// The worker that had the task.
        rank: Rank,
        /// The task that has ended.
        task: TaskId,
        /// The job that the task belongs to.
        job: JobId,
        /// The result, or why there is none.
        outcome: Outcome,
    },
    /// A worker printed something.
    Output {
        /// The worker's rank.
        rank: Rank,
        /// What the worker wrote to its standard output or standard error.
        bytes: Bytes,
    },
    /// What a task that has not ended tells, in chunks.
    Aside {
        /// The task, which has not ended.
        task: TaskId,
        /// The flags of the frame: [`FIRST`] and [`LAST`] delimit a message.
        flags: u8,
        /// A chunk of the message.
        bytes: Bytes,
    },
    /// The agent could not start its workers.
    StartFailed {
        /// The host's index among all.
        agent: usize,
        /// The agent's own message.
        reason: ToHead,
    },
    /// A process that a worker of this agent left goes on.
    LeftBehind {
        /// The host's index among all.
        agent: usize,
        /// The worker that started the process, if it is known.
        rank: Option<Rank>,
        /// The process number on that host.
        pid: u32,
        /// The command line of the process.
        command: String,
    },
    /// The agent cannot go on.
    Failed {
        /// The host's index among all.
        agent: usize,
        /// Why, for the user.
        reason: String,
    },
    /// What workers of this agent take of memory.
    Usage {
        /// The host's index among all.
        agent: usize,
        /// The number of the question: see [`ToAgent::Usage`].
        question: u64,
        /// Workers by rank, with their memory.
        usages: Vec<(Rank, Usage)>,
        /// Whether the answer is complete with these workers.
        last: bool,
    },
}

/// What a worker is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It is being made.
    #[default]
    Starting,
    /// It is up and has no task.
    Idle,
    /// It has this task, or is being sent it.
    Busy(TaskId),
    /// It still has this task, which has been cancelled or took too long.
    Ending(TaskId),
    /// It is brought to the state that the one before it had.
    Restoring,
    /// It ended, or its host was lost, and nothing takes its place.
    Lost,
    /// It was stopped by the head.
    Stopped,
}

/// Whose answer R is waiting for. Large results are asked for accordingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// R waits for no answer.
    Nothing,
    /// R takes the next answer of any worker.
    Any,
    /// R waits for an answer of this worker.
    Rank(Rank),
}

/// A task to be submitted.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// The worker that is to have the task.
    pub rank: Rank,
    /// The task's number.
    pub task: TaskId,
    /// The job that the task belongs to.
    pub job: JobId,
    /// It goes before all others: it was lost with its worker and is submitted again.
    pub again: bool,
    /// What it does to the worker lasts, under this name; 0: under none.
    pub lasts: Option<u64>,
    /// The worker whose task it was, if that is another: it goes on with that one's random numbers,
    /// or begins with new ones if they are not known here, and leaves the worker's own alone. It
    /// does not wait for a lost task of the worker's own to be decided on: R may decide on that only
    /// when it has the answer to this one.
    pub instead_of: Option<Rank>,
    /// It may be sent to its worker's agent while the worker is at the one before. That of another
    /// worker, and one that lasts, never is.
    pub ahead: bool,
    /// Its message begins with this payload, which the worker's agent has.
    pub payload: Option<PayloadId>,
    /// It is a call for whichever of these, which are in order, is free first, and `rank` means nothing.
    /// Its message follows by [`Scheduler::append_call`].
    pub any_of: Option<Arc<[Rank]>>,
}

/// A message by which a worker is restored: its task's number, its name and its chunks.
pub type Restoring = (TaskId, u64, Vec<Chunk>);

#[derive(Debug)]
enum WorkerState {
    Starting,
    Up,
    Gone(Arc<Gone>),
}

#[derive(Debug)]
struct Task {
    id: TaskId,
    job: JobId,
    chunks: VecDeque<Chunk>,
    /// The last chunk has been submitted.
    complete: bool,
    lasts: Option<u64>,
    instead_of: Option<Rank>,
    ahead: bool,
    /// Until it has been named to the agent, what the message begins with.
    payload: Option<PayloadId>,
    /// The worker is to have its known random numbers after it.
    leaves_seed: bool,
}

impl Task {
    /// One of those that bring a worker which is back to the state it had. `last`: it is the last.
    fn restoring((id, name, chunks): Restoring, last: bool) -> Task {
        Task {
            id,
            job: 0,
            chunks: chunks.into(),
            complete: true,
            lasts: Some(name),
            instead_of: None,
            ahead: false,
            payload: None,
            leaves_seed: last,
        }
    }

    /// Whether R's thread counts it among what waits to be sent. It does not wait for calls to be sent.
    fn is_counted(&self) -> bool {
        self.id & RESTORE == 0 && self.job != CALLS
    }

    /// What R's thread counts as waiting to be sent.
    fn queued_bytes(&self) -> usize {
        if !self.is_counted() {
            return 0;
        }
        self.chunks.iter().map(|chunk| chunk.bytes.len()).sum()
    }
}

#[derive(Debug)]
enum Phase {
    /// The message is on its way to the worker. `first`: nothing of it has been sent yet.
    Sending { first: bool },
    /// The worker has the whole message.
    Running,
}

/// The task that occupies a worker.
#[derive(Debug)]
struct Current {
    task: Task,
    phase: Phase,
    /// The answer is not wanted any more; the worker is busy until its agent says so.
    cancelled: bool,
    answer: Body,
    /// Bytes of the answer received, also those dropped again.
    received: usize,
    /// Bytes of the answer that the agent may send in all.
    granted: usize,
    /// In the queue of those who wait for a grant.
    starving: bool,
    /// It has been granted more than the small results' window.
    begun: bool,
    /// It is in shared memory, so many bytes, and comes at once.
    announced: Option<usize>,
    /// The state that the random number generator is to have for it, if that is another worker's.
    before: Option<Bytes>,
    /// The state in which it leaves the generator of this worker.
    after: Option<(Rank, Bytes)>,
    times: Times,
    /// All of the answer has come.
    answered: bool,
}

impl Current {
    fn new(task: Task, before: Option<Bytes>, begun: Moment) -> Current {
        Current {
            task,
            phase: Phase::Sending { first: true },
            cancelled: false,
            answer: Body::default(),
            received: 0,
            granted: RESULT_WINDOW,
            starving: false,
            begun: false,
            announced: None,
            before,
            after: None,
            times: Times {
                begun,
                ..Times::default()
            },
            answered: false,
        }
    }
}

/// The task that waits at the agent, or is on its way there, while its worker is at another.
#[derive(Debug)]
struct Next {
    /// Its chunks are those that have not been sent.
    task: Task,
    phase: Phase,
    /// All chunks, also those that have been sent: until it has started, it may have to be sent to
    /// another worker in that place.
    kept: VecDeque<Chunk>,
    /// What the message begins with.
    payload: Option<PayloadId>,
    /// It is not wanted any more. The agent says whether it had started.
    cancelled: bool,
    /// It is to be had back. If it had started, the agent says nothing.
    recalled: bool,
}

impl Next {
    fn new(task: Task) -> Next {
        Next {
            kept: task.chunks.clone(),
            payload: task.payload,
            task,
            phase: Phase::Sending { first: true },
            cancelled: false,
            recalled: false,
        }
    }

    /// What R's thread counts as waiting to be sent: all of it, as it may be sent once more.
    fn queued_bytes(&self) -> usize {
        self.kept.iter().map(|chunk| chunk.bytes.len()).sum()
    }

    /// As it was before any of it was sent.
    fn unsent(mut self) -> Task {
        self.task.chunks = self.kept;
        self.task.payload = self.payload;
        self.task
    }
}

#[derive(Debug)]
struct Worker {
    agent: usize,
    index: u32,
    state: WorkerState,
    queue: VecDeque<Task>,
    current: Option<Current>,
    /// Only while there is a current one.
    next: Option<Next>,
    /// This task was lost with the worker before. Until it is known what becomes of it, those that
    /// follow wait, but for those that were another worker's.
    undecided: Option<(TaskId, JobId)>,
    /// The state of its random number generator, if that is known here.
    seed: Option<Bytes>,
    /// Bytes that may be sent: see [`SEND_WINDOW`].
    window: usize,
    /// In its agent's `sendable`.
    sendable: bool,
    track: Track,
    /// Its host was lost and is back, and it may not be what it was yet.
    away: bool,
}

impl Worker {
    /// It is known what becomes of a task that was lost.
    fn decided(&mut self, id: TaskId) {
        self.undecided = self.undecided.filter(|&(task, _)| task != id);
    }

    /// Takes out of the queue what is to be done next.
    fn next_task(&mut self) -> Option<Task> {
        if self.undecided.is_none() {
            return self.queue.pop_front();
        }
        let stands_in = |task: &Task| task.instead_of.is_some();
        let at = self.queue.iter().position(stands_in)?;
        self.queue.remove(at)
    }

    /// Takes out of the queue what may be sent while the worker is at another task. That one must
    /// have been sent, so that it waits for nothing; and after one that restores the worker, the head
    /// may still have random numbers for it.
    fn task_ahead(&mut self) -> Option<Task> {
        let current = self.current.as_ref()?;
        let runs = matches!(current.phase, Phase::Running) && !current.cancelled;
        if !runs || current.task.id & RESTORE != 0 || self.undecided.is_some() {
            return None;
        }
        let may = |task: &Task| task.ahead && task.lasts.is_none() && task.instead_of.is_none();
        if !self.queue.front().is_some_and(may) {
            return None;
        }
        self.queue.pop_front()
    }

    /// The task whose message is being sent.
    fn sending(&self) -> Option<&Task> {
        let sending = |phase: &Phase| matches!(phase, Phase::Sending { .. });
        let current = self.current.as_ref().filter(|c| sending(&c.phase));
        let next = self.next.as_ref().filter(|n| sending(&n.phase));
        current.map(|c| &c.task).or(next.map(|n| &n.task))
    }

    fn can_send(&self) -> bool {
        self.sending()
            .is_some_and(|task| match task.chunks.front() {
                _ if task.payload.is_some() => self.window >= HEADER_LEN + size_of::<PayloadId>(),
                Some(chunk) => self.window >= HEADER_LEN + chunk.bytes.len(),
                None => task.complete && self.window >= HEADER_LEN,
            })
    }

    /// Takes back what was being sent, of which the agent has a part unless nothing was sent yet.
    /// Returns what the agent is to be told.
    fn abort(&mut self, id: TaskId, first: bool) -> Option<Frame> {
        if first {
            return None;
        }
        self.window = self.window.saturating_sub(HEADER_LEN);
        let flags = LAST | ABORT;
        Some(Frame::new(Kind::Data, flags, self.index, id, Bytes::new()))
    }
}

#[derive(Debug)]
struct Agent {
    ranks: Vec<Rank>,
    /// Frames that belong together with the one that was given out last.
    together: VecDeque<Frame>,
    /// Go first.
    control: VecDeque<Frame>,
    /// Workers with a chunk to send, each once, in turn.
    sendable: VecDeque<Rank>,
    /// What it keeps, if it keeps chunks.
    mirror: Option<Mirror>,
    /// What it has of payloads, or is to be sent.
    payloads: Payloads,
    lost: bool,
    /// Large results that have begun to flow.
    begun: usize,
    /// Losses since a task last ended there.
    losses: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    agents: Vec<Agent>,
    workers: Vec<Worker>,
    notes: Vec<Note>,
    /// Bytes of results held, complete or not, until R takes them.
    buffered: usize,
    /// Bytes granted beyond the small results' window that have not arrived.
    reserved: usize,
    limit: usize,
    starving: VecDeque<Rank>,
    /// As many as there are results in shared memory that have come and are still held, and one more.
    shared: Arc<()>,
    /// Results that were granted more and do not yet need more again.
    flowing: usize,
    /// Whose result is being completed beyond the limit for want of any.
    alone: Option<Rank>,
    want: Want,
    /// R is blocked in sending: results must flow or nothing would ever move again.
    unlimited: bool,
    /// Bytes of tasks that left the queues since the last `take_released`.
    released: usize,
    /// The time of what happens.
    now: Moment,
    measure: Measure,
    calls: Calls,
}

impl Scheduler {
    /// `hosts`: the ranks on each agent. `limit`: bytes of results to buffer.
    pub fn new(hosts: Vec<Vec<Rank>>, limit: usize) -> Scheduler {
        let count = hosts.iter().map(Vec::len).sum();
        let mut places = vec![(0, 0); count];
        for (agent, ranks) in hosts.iter().enumerate() {
            for (index, &rank) in ranks.iter().enumerate() {
                places[rank as usize] = (agent, index as u32);
            }
        }
        Scheduler {
            agents: hosts
                .into_iter()
                .map(|ranks| Agent {
                    ranks,
                    together: VecDeque::new(),
                    control: VecDeque::new(),
                    sendable: VecDeque::new(),
                    mirror: None,
                    payloads: Payloads::default(),
                    lost: false,
                    begun: 0,
                    losses: 0,
                })
                .collect(),
            workers: places
                .into_iter()
                .map(|(agent, index)| Worker {
                    agent,
                    index,
                    state: WorkerState::Starting,
                    queue: VecDeque::new(),
                    current: None,
                    next: None,
                    undecided: None,
                    seed: None,
                    window: SEND_WINDOW,
                    sendable: false,
                    track: Track::default(),
                    away: false,
                })
                .collect(),
            notes: Vec::new(),
            buffered: 0,
            reserved: 0,
            limit,
            starving: VecDeque::new(),
            shared: Arc::new(()),
            flowing: 0,
            alone: None,
            want: Want::Nothing,
            unlimited: false,
            released: 0,
            now: Moment::ZERO,
            measure: |_| None,
            calls: Calls::default(),
        }
    }

    /// All that happens from here on happens at this time.
    pub fn at(&mut self, now: Moment) {
        self.now = now;
    }

    /// How answers say how long they took.
    pub fn measure_with(&mut self, measure: Measure) {
        self.measure = measure;
    }

    /// What a worker is at.
    pub fn state(&self, rank: Rank) -> State {
        let Some(worker) = self.workers.get(rank as usize) else {
            return State::default();
        };
        match (&worker.state, &worker.current) {
            (WorkerState::Gone(gone), _) => match **gone {
                Gone::Stopped => State::Stopped,
                _ => State::Lost,
            },
            (WorkerState::Starting, _) if worker.track.lost_since().is_some() => State::Restoring,
            (WorkerState::Starting, _) => State::Starting,
            (WorkerState::Up, None) => State::Idle,
            (WorkerState::Up, Some(current)) => match current.task.id {
                task if task & RESTORE != 0 => State::Restoring,
                task if current.cancelled => State::Ending(task),
                task => State::Busy(task),
            },
        }
    }

    /// What a worker has been at until now. `history`: also when.
    pub fn track(&self, rank: Rank, history: bool) -> Track {
        let Some(worker) = self.workers.get(rank as usize) else {
            return Track::default();
        };
        let mut track = match history {
            true => worker.track.clone(),
            false => worker.track.counters(),
        };
        if let Some(current) = current_of(worker) {
            track.ended(current.times, 0, self.now);
        }
        track
    }

    /// Something went wrong with a task of this worker.
    pub fn failed(&mut self, rank: Rank, why: &str) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.track.failed(why);
        }
    }

    /// One task less: it was none of R's.
    pub fn uncount(&mut self, rank: Rank) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.track.uncount();
        }
    }

    /// From its first task on, an agent keeps up to `most` bytes of chunks.
    pub fn share(&mut self, agent: usize, most: usize) {
        self.agents[agent].mirror = Some(Mirror::new(most));
    }

    /// What happened since the last call.
    pub fn take_notes(&mut self) -> Vec<Note> {
        mem::take(&mut self.notes)
    }

    /// Bytes of tasks that were sent or dropped since the last call.
    pub fn take_released(&mut self) -> usize {
        mem::take(&mut self.released)
    }

    /// Whether a result waits on its host because of the limit.
    pub fn is_starving(&self) -> bool {
        !self.starving.is_empty()
    }

    /// Bytes of results held.
    pub fn buffered(&self) -> usize {
        self.buffered
    }

    /// Queues a control message.
    pub fn send_control(&mut self, agent: usize, message: &ToAgent) -> Result<(), ProtocolError> {
        let frame = control::encode(message).map_err(|error| ProtocolError(error.to_string()))?;
        self.push_control(agent, frame);
        Ok(())
    }

    fn push_control(&mut self, agent: usize, frame: Frame) {
        if !self.agents[agent].lost {
            self.agents[agent].control.push_back(frame);
        }
    }

    /// A task; its message follows in chunks.
    pub fn submit(&mut self, mut order: Order) {
        if let Some(any_of) = order.any_of.take() {
            return self.submit_call(&order, any_of);
        }
        let Some(worker) = self.workers.get_mut(order.rank as usize) else {
            return;
        };
        if let WorkerState::Gone(gone) = &worker.state {
            self.notes.push(Note::Done {
                rank: order.rank,
                task: order.task,
                job: order.job,
                outcome: Outcome::Lost(gone.clone()),
            });
            return;
        }
        let payloads = &self.agents[worker.agent].payloads;
        if order.payload.is_some_and(|payload| !payloads.has(payload)) {
            // Its host was lost and is back again, without it.
            let gone = Gone::Host("the host was lost, and what it had been sent with it".into());
            self.notes.push(Note::Done {
                rank: order.rank,
                task: order.task,
                job: order.job,
                outcome: Outcome::Lost(Arc::new(gone)),
            });
            return;
        }
        let task = Task {
            id: order.task,
            job: order.job,
            chunks: VecDeque::new(),
            complete: false,
            lasts: order.lasts,
            instead_of: order.instead_of,
            ahead: order.ahead,
            payload: order.payload,
            leaves_seed: false,
        };
        if order.again {
            worker.decided(order.task);
            worker.queue.push_front(task);
        } else {
            worker.queue.push_back(task);
        }
        self.dispatch(order.rank);
    }

    /// A payload follows in chunks, to the agents of these workers, as far as they are there and do
    /// not have it. Returns whether there is any.
    pub fn begin_payload(&mut self, id: PayloadId, ranks: &[Rank]) -> bool {
        let mut any = false;
        for &rank in ranks {
            let worker = self.workers.get(rank as usize);
            let living = |worker: &&Worker| !matches!(worker.state, WorkerState::Gone(_));
            if let Some(worker) = worker.filter(living) {
                let agent = &mut self.agents[worker.agent];
                any |= !agent.lost && agent.payloads.begin(id);
            }
        }
        any
    }

    /// A chunk, at most [`MAX_BODY`] long, of the payload that was begun last. Returns whether it
    /// waits to be sent.
    pub fn append_payload(&mut self, id: PayloadId, chunk: &Chunk, last: bool) -> bool {
        let counted = Arc::new(chunk.bytes.len());
        for agent in &mut self.agents {
            agent.payloads.append(id, chunk, &counted, last);
        }
        Arc::strong_count(&counted) > 1
    }

    /// The rest of a payload will not come: agents that do not have all of it forget it.
    pub fn abort_payload(&mut self, id: PayloadId) {
        for agent in &mut self.agents {
            agent.payloads.abort(id);
        }
    }

    /// No more tasks will begin with it. Those that have been submitted do.
    pub fn drop_payload(&mut self, id: PayloadId) {
        for agent in &mut self.agents {
            agent.payloads.drop_payload(id);
        }
    }

    /// Whether a worker's agent has a payload, so that tasks may begin with it.
    pub fn has_payload(&self, rank: Rank, id: PayloadId) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_some_and(|worker| self.agents[worker.agent].payloads.has(id))
    }

    /// Whether the message that is next to be sent to a worker begins with a payload that has not
    /// been sent yet.
    fn awaits_payload(&self, rank: Rank) -> bool {
        let worker = &self.workers[rank as usize];
        let payload = worker.sending().and_then(|task| task.payload);
        let payloads = &self.agents[worker.agent].payloads;
        payload.is_some_and(|payload| payloads.is_on_its_way(payload))
    }

    /// What an agent is next to be told or sent of payloads, if it is the turn of that.
    fn next_of_payloads(&mut self, at: usize) -> Option<Frame> {
        let (agents, workers) = (&mut self.agents, &self.workers);
        let Agent {
            ranks, payloads, ..
        } = &mut agents[at];
        let begins = |task: &Task, id| task.payload == Some(id);
        let needed = |id: PayloadId| {
            let mut workers = ranks.iter().map(|&rank| &workers[rank as usize]);
            workers.any(|worker| {
                let current = worker.current.as_ref();
                // One that is held at the agent may go on to its worker there later, or be sent again.
                current.is_some_and(|current| begins(&current.task, id))
                    || worker
                        .next
                        .as_ref()
                        .is_some_and(|next| next.payload == Some(id))
                    || worker.queue.iter().any(|task| begins(task, id))
            })
        };
        while let Some((told, released)) = payloads.forget(needed) {
            self.released += released;
            if told.is_some() {
                return told;
            }
        }
        let agent = &mut agents[at];
        let others = agent.sendable.len();
        let (frame, released) = agent.payloads.next(others, agent.mirror.as_mut())?;
        self.released += released;
        if frame.header.flags & LAST != 0 {
            // Messages may have waited for that.
            for rank in self.agents[at].ranks.clone() {
                self.dispatch(rank);
            }
        }
        Some(frame)
    }

    /// An agent that was lost is back, a fresh one that is to make its workers anew. Those that were
    /// gone before are stopped again; the others come up as at first.
    ///
    /// # Errors
    /// When `start` does not fit into one message.
    pub fn agent_back(&mut self, at: usize, start: &ToAgent) -> Result<(), ProtocolError> {
        let agent = &mut self.agents[at];
        agent.lost = false;
        agent.losses = 0;
        agent.mirror = agent.mirror.as_ref().map(Mirror::fresh);
        self.send_control(at, start)?;
        for rank in self.agents[at].ranks.clone() {
            let worker = &mut self.workers[rank as usize];
            match &worker.state {
                WorkerState::Gone(gone) if !matches!(**gone, Gone::Host(_)) => {
                    let stop = ToAgent::StopWorker {
                        worker: worker.index,
                    };
                    self.send_control(at, &stop)?;
                }
                _ => {
                    worker.state = WorkerState::Starting;
                    worker.away = true;
                    worker.window = SEND_WINDOW;
                }
            }
        }
        Ok(())
    }

    /// Whether a worker is no more, for now or for good.
    pub fn is_gone(&self, rank: Rank) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_none_or(|worker| matches!(worker.state, WorkerState::Gone(_)))
    }

    /// Whether an agent had workers that were lost with it, and have not been stopped since.
    pub fn has_lost(&self, agent: usize) -> bool {
        let lost = |worker: &Worker| match &worker.state {
            WorkerState::Gone(gone) => matches!(**gone, Gone::Host(_)),
            _ => false,
        };
        let mut workers = self.workers.iter();
        workers.any(|worker| worker.agent == agent && lost(worker))
    }

    /// Whether an agent has workers to make, and none of them has come up yet.
    pub fn is_starting(&self, agent: usize) -> bool {
        let workers = self.workers.iter().filter(|worker| worker.agent == agent);
        let mut living = workers.filter(|w| !matches!(w.state, WorkerState::Gone(_)));
        let mut any = false;
        let starting = living.all(|worker| {
            any = true;
            matches!(worker.state, WorkerState::Starting)
        });
        any && starting
    }

    /// Whether a worker can be sent tasks.
    pub fn is_up(&self, rank: Rank) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_some_and(|worker| matches!(worker.state, WorkerState::Up))
    }

    /// Bytes that may be sent to a worker now.
    pub fn window(&self, rank: Rank) -> usize {
        let worker = self.workers.get(rank as usize);
        worker.map_or(0, |worker| worker.window)
    }

    /// Whether an agent keeps chunks.
    pub fn shares(&self, agent: usize) -> bool {
        self.agents[agent].mirror.is_some()
    }

    /// All that brings a worker which is back to the state it had, one task after the other.
    pub fn restore(&mut self, rank: Rank, messages: Vec<Restoring>) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        let seed = worker.seed.clone();
        let (agent, index) = (worker.agent, worker.index);
        let count = messages.len();
        for (at, message) in messages.into_iter().enumerate() {
            let task = Task::restoring(message, at + 1 == count);
            worker.queue.push_back(task);
        }
        if count == 0 {
            if let Some(seed) = seed {
                self.push_control(agent, Frame::new(Kind::Seed, 0, index, 0, seed));
            }
        }
        self.dispatch(rank);
    }

    /// One of the tasks of [`Scheduler::restore`], once more: its worker was lost with it, and there is
    /// another. `last`: it is the last of them.
    pub fn restore_again(&mut self, rank: Rank, message: Restoring, last: bool) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        worker.decided(message.0);
        worker.queue.push_front(Task::restoring(message, last));
        self.dispatch(rank);
    }

    /// A chunk, at most [`MAX_BODY`] long, of the message of a task.
    pub fn append(&mut self, rank: Rank, id: TaskId, chunk: Chunk, last: bool) {
        debug_assert!(chunk.bytes.len() <= MAX_BODY);
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        let open = |task: &&mut Task| task.id == id && !task.complete;
        let current = worker.current.as_mut().map(|current| &mut current.task);
        // The last one, the first one if it was submitted again, or the current one.
        let mut task = worker.queue.iter_mut().rev().find(open);
        if task.is_none() {
            task = current.filter(open);
        }
        match task {
            Some(task) => {
                task.complete = last;
                if !chunk.bytes.is_empty() {
                    task.chunks.push_back(chunk);
                }
            }
            None => match &mut worker.next {
                Some(next) if next.task.id == id && !next.task.complete => {
                    next.task.complete = last;
                    if !chunk.bytes.is_empty() {
                        next.kept.push_back(chunk.clone());
                        next.task.chunks.push_back(chunk);
                    }
                }
                // Cancelled or lost while R was still writing it.
                _ => self.released += chunk.bytes.len(),
            },
        }
        self.dispatch(rank);
    }

    /// The task that was lost with its worker, if it is still that which others wait for, will not
    /// be submitted again.
    pub fn let_go(&mut self, rank: Rank, id: TaskId) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.decided(id);
            self.dispatch(rank);
        }
    }

    /// R could not finish writing this task's message; it ends as cancelled.
    pub fn cancel_task(&mut self, rank: Rank, id: TaskId) {
        self.cancel_matching(rank, |task, _| task == id);
    }

    /// Cancels all tasks of `job` that have not ended.
    pub fn cancel_job(&mut self, job: JobId) {
        for rank in 0..self.workers.len() as Rank {
            self.cancel_matching(rank, |_, other| other == job);
        }
    }

    fn cancel_matching(&mut self, rank: Rank, matches: impl Fn(TaskId, JobId) -> bool) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        let mut cancelled = Vec::new();
        let agent = worker.agent;
        let index = worker.index;
        let mut frames = Vec::new();
        let mut running = false;
        let matching = |current: &&mut Current| {
            matches(current.task.id, current.task.job) && !current.cancelled
        };
        // It has ended as lost already.
        let undecided = worker.undecided;
        worker.undecided = undecided.filter(|&(task, job)| !matches(task, job));
        // Before the agent is told of the one that runs: this one would start then.
        let next = worker.next.as_mut();
        let next = next.filter(|n| matches(n.task.id, n.task.job) && !n.cancelled);
        let mut waiting = None;
        if let Some(next) = next {
            waiting = Some((next.task.id, next.task.job));
            self.released += next.queued_bytes();
            match next.phase {
                Phase::Sending { first } => {
                    let task = next.task.id;
                    frames.extend(worker.abort(task, first));
                    worker.next = None;
                }
                Phase::Running => {
                    next.kept.clear();
                    next.cancelled = true;
                    let task = next.task.id;
                    let cancel = ToAgent::Cancel {
                        worker: index,
                        task,
                    };
                    frames.extend(control::encode(&cancel).ok());
                }
            }
        }
        if let Some(current) = worker.current.as_mut().filter(matching) {
            cancelled.push((current.task.id, current.task.job));
            self.released += current.task.queued_bytes();
            match current.phase {
                Phase::Sending { first } => {
                    let (id, times) = (current.task.id, current.times);
                    frames.extend(worker.abort(id, first));
                    worker.current = None;
                    worker.track.ended(times, 0, self.now);
                }
                Phase::Running => {
                    running = true;
                    let task = current.task.id;
                    let cancel = ToAgent::Cancel {
                        worker: index,
                        task,
                    };
                    // A message of two integers fits into a frame.
                    frames.extend(control::encode(&cancel).ok());
                }
            }
        }
        cancelled.extend(waiting);
        if running {
            self.drop_answer(rank);
        }
        let worker = &mut self.workers[rank as usize];
        let mut kept = VecDeque::with_capacity(worker.queue.len());
        for task in mem::take(&mut worker.queue) {
            if matches(task.id, task.job) {
                cancelled.push((task.id, task.job));
                self.released += task.queued_bytes();
            } else {
                kept.push_back(task);
            }
        }
        worker.queue = kept;
        for (task, job) in cancelled {
            let outcome = Outcome::Cancelled;
            self.notes.push(Note::Done {
                rank,
                task,
                job,
                outcome,
            });
        }
        for frame in frames {
            self.push_control(agent, frame);
        }
        self.dispatch(rank);
        self.grant();
    }

    /// Takes back a task that has not started, so that another worker can have it: it ends as
    /// [`Outcome::Recalled`], at once or when its agent has confirmed that. One that has started, or
    /// is the next thing that its worker will do, is left alone.
    pub fn recall(&mut self, rank: Rank, id: TaskId) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        if id & RESTORE != 0 {
            return;
        }
        if let Some(at) = worker.queue.iter().position(|task| task.id == id) {
            if let Some(task) = worker.queue.remove(at) {
                self.released += task.queued_bytes();
                self.recalled(rank, &task);
                self.dispatch(rank);
            }
            return;
        }
        let next = worker.next.as_mut();
        let Some(next) = next.filter(|n| n.task.id == id && !n.cancelled && !n.recalled) else {
            return;
        };
        let agent = worker.agent;
        match next.phase {
            Phase::Sending { first } => {
                let frame = worker.abort(id, first);
                if let Some(next) = worker.next.take() {
                    self.released += next.queued_bytes();
                    self.recalled(rank, &next.task);
                }
                if let Some(frame) = frame {
                    self.push_control(agent, frame);
                }
                self.dispatch(rank);
            }
            Phase::Running => {
                let worker = worker.index;
                let recall = ToAgent::Recall { worker, task: id };
                if let Ok(frame) = control::encode(&recall) {
                    next.recalled = true;
                    self.push_control(agent, frame);
                }
            }
        }
    }

    fn recalled(&mut self, rank: Rank, task: &Task) {
        self.notes.push(Note::Done {
            rank,
            task: task.id,
            job: task.job,
            outcome: Outcome::Recalled,
        });
    }

    /// The worker has ended, and what waited behind its task had not started: it goes on waiting for
    /// the one that takes its place.
    fn put_back(&mut self, rank: Rank) {
        let worker = &mut self.workers[rank as usize];
        match worker.next.take() {
            Some(next) if next.recalled && !next.cancelled => {
                self.released += next.queued_bytes();
                self.recalled(rank, &next.task);
            }
            Some(next) if !next.cancelled => worker.queue.push_front(next.unsent()),
            // It has been told.
            _ => {}
        }
    }

    /// The answer that a worker is at is not wanted. What is still to come of it is dropped, so it
    /// takes no room from others.
    fn drop_answer(&mut self, rank: Rank) {
        if let Some(current) = &mut self.workers[rank as usize].current {
            self.reserved -= current.reserved();
            self.flowing -= usize::from(current.flowing());
            self.buffered -= current.answer.len;
            current.answer = Body::default();
            current.cancelled = true;
            if mem::take(&mut current.begun) {
                self.agents[self.workers[rank as usize].agent].begun -= 1;
            }
        }
    }

    /// Ends a worker, whatever it does. If its host is lost, it does not come back with that.
    pub fn stop_worker(&mut self, rank: Rank) {
        self.end_worker(rank, Arc::new(Gone::Stopped));
    }

    /// Ends a worker for this reason.
    pub fn end_worker(&mut self, rank: Rank, gone: Arc<Gone>) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        if let WorkerState::Gone(before) = &worker.state {
            // Nobody waits for it any more.
            worker.track.back(self.now);
            let tried_again = before.is_tried_again();
            if tried_again || matches!(**before, Gone::Host(_)) {
                worker.state = WorkerState::Gone(gone.clone());
                self.notes.push(Note::Gone { rank, gone });
            }
            if tried_again {
                self.tell_stop(rank);
            }
            return;
        }
        self.tell_stop(rank);
        self.lose(rank, gone);
    }

    fn tell_stop(&mut self, rank: Rank) {
        let worker = &self.workers[rank as usize];
        let (agent, worker) = (worker.agent, worker.index);
        if let Ok(frame) = control::encode(&ToAgent::StopWorker { worker }) {
            self.push_control(agent, frame);
        }
    }

    /// Whether any worker is starting or up, or is tried again by its agent.
    pub fn any_left(&self) -> bool {
        let gone = |worker: &Worker| match &worker.state {
            WorkerState::Gone(gone) => !gone.is_tried_again(),
            _ => false,
        };
        !self.workers.iter().all(gone)
    }

    /// Says whose answer R waits for.
    pub fn want(&mut self, want: Want) {
        self.want = want;
        self.grant();
    }

    /// R is blocked in sending, or no longer.
    pub fn set_unlimited(&mut self, unlimited: bool) {
        self.unlimited = unlimited;
        self.grant();
    }

    /// R took answers of this many bytes.
    pub fn taken(&mut self, bytes: usize) {
        self.buffered -= bytes;
        self.grant();
    }

    /// An agent is gone: everything on it is lost.
    pub fn agent_lost(&mut self, agent: usize, reason: &str) {
        // Also what an agent that was left out was still to be told.
        self.agents[agent].together.clear();
        self.agents[agent].control.clear();
        self.agents[agent].sendable.clear();
        self.released += self.agents[agent].payloads.clear();
        for &rank in &self.agents[agent].ranks {
            self.workers[rank as usize].sendable = false;
        }
        if mem::replace(&mut self.agents[agent].lost, true) {
            return;
        }
        let gone = Arc::new(Gone::Host(reason.to_owned()));
        for rank in self.agents[agent].ranks.clone() {
            self.lose(rank, gone.clone());
        }
    }

    fn lose(&mut self, rank: Rank, gone: Arc<Gone>) {
        let worker = &mut self.workers[rank as usize];
        if let WorkerState::Gone(before) = &worker.state {
            // Its agent does not try it again any more; if its host comes back, it does with that.
            if before.is_tried_again() && !matches!(*gone, Gone::Worker(_)) {
                worker.state = WorkerState::Gone(gone.clone());
                self.notes.push(Note::Gone { rank, gone });
            }
            return;
        }
        worker.state = WorkerState::Gone(gone.clone());
        match &*gone {
            Gone::Worker(loss) => worker.track.lost(&format!("lost: {loss}"), self.now),
            Gone::Host(reason) => worker
                .track
                .lost(&format!("lost with its host: {reason}"), self.now),
            Gone::Stopped => {}
        }
        self.notes.push(Note::Gone {
            rank,
            gone: gone.clone(),
        });
        worker.undecided = None;
        let mut ended: Vec<Task> = self.free(rank).into_iter().collect();
        if let Some(next) = self.workers[rank as usize].next.take() {
            self.released += next.queued_bytes();
            ended.extend((!next.cancelled).then_some(next.task));
        }
        for task in mem::take(&mut self.workers[rank as usize].queue) {
            self.released += task.queued_bytes();
            ended.push(task);
        }
        for task in ended {
            self.notes.push(Note::Done {
                rank,
                task: task.id,
                job: task.job,
                outcome: Outcome::Lost(gone.clone()),
            });
        }
        self.end_calls_of_nobody();
        self.grant();
    }

    /// A worker has ended, and a fresh one will take its place: what waits for it goes on waiting.
    fn replace(&mut self, rank: Rank, loss: Loss) {
        let worker = &mut self.workers[rank as usize];
        if matches!(worker.state, WorkerState::Gone(_)) {
            return;
        }
        let (agent, index) = (worker.agent, worker.index);
        worker.state = WorkerState::Starting;
        worker.track.lost(&format!("lost: {loss}"), self.now);
        if let Ok(frame) = control::encode(&ToAgent::LossNoted { worker: index }) {
            self.push_control(agent, frame);
        }
        let task = self.free(rank);
        let busy = task.is_some();
        self.notes.push(Note::Lost {
            rank,
            loss: loss.clone(),
            task: busy,
        });
        if let Some(task) = task {
            if task.instead_of.is_none() && task.job != CALLS {
                self.workers[rank as usize].undecided = Some((task.id, task.job));
            }
            self.notes.push(Note::Done {
                rank,
                task: task.id,
                job: task.job,
                outcome: Outcome::Lost(Arc::new(Gone::Worker(loss))),
            });
        }
        self.put_back(rank);
        self.grant();
        self.count_loss(agent, busy);
    }

    /// `busy`: the worker had a task.
    fn count_loss(&mut self, at: usize, busy: bool) {
        let living = |worker: &Worker| !matches!(worker.state, WorkerState::Gone(_));
        let mut workers = self.workers.iter();
        let others = workers.any(|worker| worker.agent != at && living(worker));
        let agent = &mut self.agents[at];
        agent.losses += 1;
        // On the last host, tasks that cost their workers come to an end by themselves: each is tried
        // a few times only.
        let bounded = busy && !others;
        if agent.lost || bounded || agent.losses < LOSSES_IN_A_ROW.max(4 * agent.ranks.len()) {
            return;
        }
        let reason = format!(
            "{} of its workers were lost in a row, and no task ended in between: it is left out",
            agent.losses
        );
        self.leave_out(at, reason);
    }

    /// Ends an agent, whose host is not to be taken back.
    pub fn leave_out(&mut self, at: usize, reason: String) {
        // Last of all, the end.
        self.agents[at].control.clear();
        let _ = self.send_control(at, &ToAgent::Stop);
        let control = mem::take(&mut self.agents[at].control);
        self.agent_lost(at, &reason);
        self.agents[at].control = control;
        self.notes.push(Note::LeftOut { agent: at, reason });
    }

    /// Gives an idle worker its next task and lets it be sent.
    fn dispatch(&mut self, rank: Rank) {
        let worker = &mut self.workers[rank as usize];
        if !matches!(worker.state, WorkerState::Up) {
            return;
        }
        if worker.current.is_none() {
            if let Some(next) = worker.next.take() {
                // Its agent has let it start, so what was sent is not needed here any more.
                let mut current = Current::new(next.task, None, self.now);
                let kept = next.kept.iter().map(|chunk| chunk.bytes.len());
                self.released += kept.sum::<usize>() - current.task.queued_bytes();
                current.phase = next.phase;
                if let Phase::Running = current.phase {
                    current.times.sent = Some(self.now);
                }
                current.cancelled = next.cancelled;
                worker.current = Some(current);
            } else if let Some(task) = worker.next_task() {
                let seed = |other: Rank| self.workers.get(other as usize)?.seed.clone();
                let before = task.instead_of.map(|other| seed(other).unwrap_or_default());
                let current = Current::new(task, before, self.now);
                self.workers[rank as usize].current = Some(current);
            } else if let Some(task) = self.call_for(rank) {
                let current = Current::new(task, None, self.now);
                self.workers[rank as usize].current = Some(current);
            }
        }
        let worker = &mut self.workers[rank as usize];
        if worker.next.is_none() {
            worker.next = worker.task_ahead().map(Next::new);
        }
        let waits = self.awaits_payload(rank);
        let worker = &mut self.workers[rank as usize];
        if !waits && !worker.sendable && worker.can_send() {
            worker.sendable = true;
            self.agents[worker.agent].sendable.push_back(rank);
        }
    }

    /// The next frame for an agent's stream, if there is one.
    pub fn next_frame(&mut self, agent: usize) -> Option<Frame> {
        let queued = self.agents[agent].together.pop_front();
        if let Some(frame) = queued.or_else(|| self.agents[agent].control.pop_front()) {
            return Some(frame);
        }
        if let Some(frame) = self.next_of_payloads(agent) {
            return Some(frame);
        }
        while let Some(rank) = self.agents[agent].sendable.pop_front() {
            let waits = self.awaits_payload(rank);
            let worker = &mut self.workers[rank as usize];
            worker.sendable = false;
            // A task may have been cancelled or lost since its worker was put into the queue.
            if waits || !worker.can_send() {
                continue;
            }
            let mut before = None;
            let mut ahead = false;
            let (task, phase, times) = match (&mut worker.current, &mut worker.next) {
                (Some(current), _) if matches!(current.phase, Phase::Sending { .. }) => {
                    before = current.before.take();
                    let times = Some(&mut current.times);
                    (&mut current.task, &mut current.phase, times)
                }
                (_, Some(next)) => {
                    ahead = true;
                    (&mut next.task, &mut next.phase, None)
                }
                _ => continue,
            };
            let Phase::Sending { first } = phase else {
                continue;
            };
            let chunks = &mut task.chunks;
            let payload = task.payload.take();
            let sent = match (&mut self.agents[agent].mirror, payload) {
                (_, Some(payload)) => Sent {
                    flags: SHARED,
                    body: Bytes::copy_from_slice(&payload.to_le_bytes()),
                    len: size_of::<PayloadId>(),
                },
                (Some(mirror), None) => mirror.send(chunks, worker.window - HEADER_LEN),
                (None, None) => {
                    let body = chunks.pop_front().unwrap_or_default().bytes;
                    let len = body.len();
                    Sent {
                        flags: 0,
                        body,
                        len,
                    }
                }
            };
            worker.window -= HEADER_LEN + sent.len;
            if task.is_counted() && payload.is_none() && !ahead {
                self.released += sent.len;
            }
            let mut flags = if mem::replace(first, false) { FIRST } else { 0 };
            if task.complete && task.chunks.is_empty() {
                flags |= LAST;
                *phase = Phase::Running;
                if let Some(times) = times {
                    times.sent = Some(self.now);
                }
            }
            let (flags, id) = (flags | sent.flags, task.id);
            let index = worker.index;
            let frame = Frame::new(Kind::Data, flags, index, id, sent.body);
            worker.track.bytes_in += frame.wire_len() as u64;
            let together = &mut self.agents[agent].together;
            if let Some(seed) = before {
                together.push_back(Frame::new(Kind::Seed, GUEST, index, id, seed));
            }
            if let Some(name) = task.lasts.take() {
                let name = Bytes::copy_from_slice(&name.to_le_bytes());
                together.push_back(Frame::new(Kind::State, 0, index, id, name));
            }
            together.push_back(frame);
            if flags & LAST != 0 {
                let seed = worker.seed.clone();
                if let Some(seed) = seed.filter(|_| task.leaves_seed) {
                    together.push_back(Frame::new(Kind::Seed, 0, index, 0, seed));
                }
            }
            self.dispatch(rank);
            return self.agents[agent].together.pop_front();
        }
        // None of the others has used its turn.
        self.next_of_payloads(agent)
    }

    /// A frame from an agent.
    ///
    /// # Errors
    /// When no agent of ours would send it: the agent is then not to be trusted any further.
    pub fn on_frame(&mut self, agent: usize, frame: Frame) -> Result<(), ProtocolError> {
        self.on_frame_with(agent, frame, None)
    }

    /// The same, with the memory that has come along.
    ///
    /// # Errors
    /// As for [`Scheduler::on_frame`].
    pub fn on_frame_with(
        &mut self,
        agent: usize,
        frame: Frame,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let header = frame.header;
        match header.kind {
            Kind::Control => {
                let message = control::decode(&frame.body)
                    .map_err(|error| ProtocolError(error.to_string()))?;
                self.on_message(agent, message)
            }
            Kind::Data => {
                let rank = self.rank(agent, header.worker)?;
                match header.flags & SHARED {
                    0 => self.on_data(rank, header.task, header.flags, frame.body, None),
                    _ => self.on_shared(rank, &frame, memory),
                }
            }
            Kind::Credit => {
                let rank = self.rank(agent, header.worker)?;
                let worker = &mut self.workers[rank as usize];
                let window = worker.window.saturating_add(header.len as usize);
                // Agents also count what they themselves tell a worker.
                worker.window = window.min(SEND_WINDOW);
                self.dispatch(rank);
                Ok(())
            }
            Kind::Output => {
                let rank = self.rank(agent, header.worker)?;
                let bytes = frame.body;
                self.notes.push(Note::Output { rank, bytes });
                Ok(())
            }
            Kind::Aside => {
                let rank = self.rank(agent, header.worker)?;
                let current = self.workers[rank as usize].current.as_ref();
                let its = |c: &Current| c.task.id == header.task && !c.cancelled;
                if current.is_some_and(its) {
                    self.notes.push(Note::Aside {
                        task: header.task,
                        flags: header.flags,
                        bytes: frame.body,
                    });
                }
                Ok(())
            }
            Kind::Seed => {
                let rank = self.rank(agent, header.worker)?;
                let worker = &mut self.workers[rank as usize];
                if let Some(current) = &mut worker.current {
                    if current.task.id == header.task {
                        let other = current
                            .task
                            .instead_of
                            .filter(|_| header.flags & GUEST != 0);
                        current.after = Some((other.unwrap_or(rank), frame.body));
                    }
                }
                Ok(())
            }
            Kind::Cancel | Kind::State | Kind::Payload => {
                Err(ProtocolError("a frame that is not for the head".into()))
            }
        }
    }

    fn rank(&self, agent: usize, worker: u32) -> Result<Rank, ProtocolError> {
        let ranks = &self.agents[agent].ranks;
        ranks.get(worker as usize).copied().ok_or_else(|| {
            ProtocolError(format!(
                "a frame of worker {worker} on a host with {} workers",
                ranks.len()
            ))
        })
    }

    fn on_message(&mut self, agent: usize, message: ToHead) -> Result<(), ProtocolError> {
        match message {
            ToHead::Hello(_) => return Err(ProtocolError("a second hello".into())),
            ToHead::StartFailed { .. } | ToHead::Limits { .. } => {
                let reason = message;
                self.notes.push(Note::StartFailed { agent, reason });
            }
            ToHead::WorkerUp { worker, pid } => {
                let rank = self.rank(agent, worker)?;
                let worker = &mut self.workers[rank as usize];
                if matches!(worker.state, WorkerState::Starting) {
                    worker.state = WorkerState::Up;
                    worker.track.back(self.now);
                    self.notes.push(Note::Up { rank, pid });
                    self.dispatch(rank);
                }
            }
            ToHead::WorkerLost {
                worker,
                mut loss,
                replaced,
            } => {
                let rank = self.rank(agent, worker)?;
                if loss.setback.pause > 0 && self.workers[rank as usize].away {
                    // Its agent knows a part of what restores it.
                    loss.setback.pause = 0;
                    self.tell_stop(rank);
                }
                if replaced {
                    self.replace(rank, loss);
                } else {
                    let gone = Gone::Worker(loss);
                    if gone.is_tried_again() {
                        self.send_control(agent, &ToAgent::LossNoted { worker })?;
                    }
                    self.lose(rank, Arc::new(gone));
                    self.count_loss(agent, false);
                    let timed_out = false;
                    self.notes.push(Note::Ended { rank, timed_out });
                }
            }
            ToHead::TimedOut { worker, task } => {
                let rank = self.rank(agent, worker)?;
                self.time_out(rank, task);
            }
            ToHead::StateNotKept { worker } => {
                let rank = self.rank(agent, worker)?;
                self.notes.push(Note::StateNotKept { rank });
            }
            ToHead::WorkerReplaced { worker, pid } => {
                let rank = self.rank(agent, worker)?;
                let worker = &mut self.workers[rank as usize];
                let killed = match (&worker.state, &worker.current) {
                    (WorkerState::Gone(gone), _) if gone.is_tried_again() => {
                        self.back(rank, pid);
                        return Ok(());
                    }
                    // Stopped in the meantime.
                    (WorkerState::Gone(_), _) => return Ok(()),
                    (WorkerState::Starting, None) => false,
                    (_, Some(current)) if current.cancelled => true,
                    _ => return Err(ProtocolError("a busy worker was replaced".into())),
                };
                self.free(rank);
                if killed {
                    // What was sent ahead, and may be on its way, went down with the one before.
                    let worker = &self.workers[rank as usize];
                    let (agent, worker) = (worker.agent, worker.index);
                    self.send_control(agent, &ToAgent::LossNoted { worker })?;
                    self.put_back(rank);
                }
                let worker = &mut self.workers[rank as usize];
                worker.state = WorkerState::Up;
                worker.track.back(self.now);
                // What the one before had not read is gone.
                worker.window = SEND_WINDOW;
                self.notes.push(Note::Replaced { rank, pid, killed });
                self.dispatch(rank);
            }
            // That anything came is what counts.
            ToHead::Alive => {}
            ToHead::Failed { reason } => self.notes.push(Note::Failed { agent, reason }),
            ToHead::WorkerStopped { worker, timed_out } => {
                let rank = self.rank(agent, worker)?;
                self.lose(rank, Arc::new(Gone::Stopped));
                self.notes.push(Note::Ended { rank, timed_out });
            }
            ToHead::Usage {
                question,
                workers,
                last,
            } => {
                let of = |(worker, usage)| Ok((self.rank(agent, worker)?, usage));
                let usages: Result<Vec<_>, ProtocolError> = workers.into_iter().map(of).collect();
                self.notes.push(Note::Usage {
                    agent,
                    question,
                    usages: usages?,
                    last,
                });
            }
            ToHead::LeftBehind {
                worker,
                pid,
                command,
            } => {
                let rank = worker.map(|worker| self.rank(agent, worker)).transpose()?;
                self.notes.push(Note::LeftBehind {
                    agent,
                    rank,
                    pid,
                    command,
                });
            }
        }
        Ok(())
    }

    /// A worker that was gone is there again, and its agent has restored it.
    fn back(&mut self, rank: Rank, pid: u32) {
        let worker = &mut self.workers[rank as usize];
        worker.state = WorkerState::Up;
        worker.track.back(self.now);
        worker.window = SEND_WINDOW;
        let (agent, index) = (worker.agent, worker.index);
        // Others may have gone on with its random numbers. States that are not known here are empty.
        let seed = worker.seed.clone().filter(|seed| !seed.is_empty());
        if let Some(seed) = seed {
            self.push_control(agent, Frame::new(Kind::Seed, 0, index, 0, seed));
        }
        self.notes.push(Note::Back { rank, pid });
        self.dispatch(rank);
    }

    /// A task took longer than it may. Its worker is busy until its agent says otherwise.
    fn time_out(&mut self, rank: Rank, id: TaskId) {
        let worker = &mut self.workers[rank as usize];
        let Some(current) = worker.current.as_mut() else {
            return;
        };
        let running = matches!(current.phase, Phase::Running);
        if current.task.id != id || current.cancelled || !running {
            return;
        }
        let job = current.task.job;
        worker.track.failed(TOO_LONG);
        self.drop_answer(rank);
        self.notes.push(Note::Done {
            rank,
            task: id,
            job,
            outcome: Outcome::TimedOut,
        });
        self.grant();
    }

    fn on_data(
        &mut self,
        rank: Rank,
        task: TaskId,
        flags: u8,
        chunk: Bytes,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let len = memory.as_ref().map_or(chunk.len(), |memory| memory.len);
        let worker = &mut self.workers[rank as usize];
        if matches!(worker.state, WorkerState::Gone(_)) {
            // Stopped by us; its agent may not have known.
            return Ok(());
        }
        let dropped = |next: &Next| {
            let asked = next.cancelled || next.recalled;
            next.task.id == task && asked && flags == LAST | ABORT && chunk.is_empty()
        };
        if worker.next.as_ref().is_some_and(dropped) {
            self.not_started(rank);
            return Ok(());
        }
        let Some(current) = &mut worker.current else {
            return Err(ProtocolError(format!("an answer of idle worker {rank}")));
        };
        if current.task.id != task || !matches!(current.phase, Phase::Running) {
            return Err(ProtocolError(format!(
                "an answer to task {task} from worker {rank}, which has task {}",
                current.task.id
            )));
        }
        let before = current.reserved();
        current.received = current.received.saturating_add(len);
        worker.track.bytes_out += (HEADER_LEN + len) as u64;
        if flags & FIRST != 0 {
            current.times.answered = Some(self.now);
            current.times.measured = (self.measure)(&chunk);
        }
        if memory.is_some() {
            // Leave for what it had begun to send otherwise may have been taken for leave to send this.
            current.granted = current.granted.max(current.received);
        }
        self.reserved -= before - current.reserved();
        if current.received > current.granted {
            return Err(ProtocolError(format!(
                "worker {rank} sent {} bytes, {} were granted",
                current.received, current.granted
            )));
        }
        if flags & LAST != 0 {
            self.agents[worker.agent].losses = 0;
            // What restores a worker ends with the state that is known.
            let after = current.after.take().filter(|_| task & RESTORE == 0);
            if let Some((whose, seed)) = after {
                self.workers[whose as usize].seed = Some(seed.clone());
                if whose != rank {
                    self.put_seed(whose, seed);
                }
            }
        }
        let worker = &mut self.workers[rank as usize];
        let Some(current) = &mut worker.current else {
            return Ok(());
        };
        if current.cancelled {
            if flags & LAST != 0 {
                self.free(rank);
                self.dispatch(rank);
            }
            self.grant();
            return Ok(());
        }
        if flags & ABORT != 0 {
            return Err(ProtocolError(format!(
                "worker {rank} gave up task {task}, which was not cancelled"
            )));
        }
        if flags & FIRST != 0 {
            self.buffered -= current.answer.len;
            current.answer = Body::default();
        }
        self.buffered += len;
        match memory {
            Some(memory) => {
                let _counted = Some(self.shared.clone());
                current.answer.len = len;
                current.answer.memory = Some(Memory { _counted, ..memory });
            }
            None => current.answer.push(chunk),
        }
        if flags & LAST != 0 {
            let answer = mem::take(&mut current.answer);
            let job = current.task.job;
            current.answered = true;
            self.free(rank);
            let outcome = Outcome::Answer(answer);
            self.notes.push(Note::Done {
                rank,
                task,
                job,
                outcome,
            });
            self.dispatch(rank);
            self.grant();
        } else {
            if current.granted - current.received < RESULT_WINDOW / 2 {
                self.starves(rank);
            }
            self.grant();
        }
        Ok(())
    }

    /// The answer that this worker is at needs more to be asked for.
    fn starves(&mut self, rank: Rank) {
        let current = self.workers[rank as usize].current.as_mut();
        let Some(current) = current.filter(|current| !current.starving) else {
            return;
        };
        self.flowing -= usize::from(current.flowing());
        current.starving = true;
        match current.begun {
            true => self.starving.push_front(rank),
            false => self.starving.push_back(rank),
        }
    }

    /// An answer in shared memory: it is announced, or it comes.
    fn on_shared(
        &mut self,
        rank: Rank,
        frame: &Frame,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let Header { task, flags, .. } = frame.header;
        let number = frame.number().filter(|&len| len <= MOST_MEMORY);
        let number = number.and_then(|len| usize::try_from(len).ok());
        let Some(len) = number else {
            return Err(ProtocolError("a result of no length".into()));
        };
        let current = self.workers[rank as usize].current.as_mut();
        let current = current.filter(|current| current.task.id == task);
        if flags == LAST | SHARED {
            let announced = current.as_ref().and_then(|current| current.announced);
            let gone = self.is_gone(rank);
            let memory = memory.filter(|memory| memory.len == len);
            if memory.is_none() || !gone && announced != Some(len) {
                return Err(ProtocolError("a result without its memory".into()));
            }
            return self.on_data(rank, task, FIRST | LAST, Bytes::new(), memory);
        }
        if flags != FIRST | SHARED {
            return Err(ProtocolError("a bad announcement of a result".into()));
        }
        self.on_data(rank, task, FIRST, Bytes::new(), None)?;
        let current = self.workers[rank as usize].current.as_mut();
        let Some(current) = current.filter(|current| current.task.id == task) else {
            return Ok(());
        };
        if current.announced.replace(len).is_some() {
            return Err(ProtocolError("a result that is announced twice".into()));
        }
        if !current.cancelled {
            self.starves(rank);
            self.grant();
        }
        Ok(())
    }

    /// The agent has dropped what waited there, as it was told to.
    fn not_started(&mut self, rank: Rank) {
        if let Some(next) = self.workers[rank as usize].next.take() {
            self.released += next.queued_bytes();
            if !next.cancelled {
                self.recalled(rank, &next.task);
            }
        }
        self.dispatch(rank);
    }

    /// What another worker did for this one has left its random numbers so: if it is back in the
    /// meantime, it goes on from there.
    fn put_seed(&mut self, rank: Rank, seed: Bytes) {
        let worker = &self.workers[rank as usize];
        // One that is still being sent what restores it gets them in the end.
        let at_rest = worker.current.as_ref().is_none_or(|current| {
            current.task.id & RESTORE != 0 && matches!(current.phase, Phase::Running)
        });
        if matches!(worker.state, WorkerState::Up) && at_rest {
            let (agent, index) = (worker.agent, worker.index);
            self.push_control(agent, Frame::new(Kind::Seed, 0, index, 0, seed));
        }
    }

    /// Frees a worker of its current task. Returns that if its answer is still wanted.
    fn free(&mut self, rank: Rank) -> Option<Task> {
        let worker = &mut self.workers[rank as usize];
        if let Some(current) = current_of(worker) {
            let (times, answered) = (current.times, current.answered);
            let tasks = times.measured.map_or(1, |measured| measured.tasks.into());
            worker
                .track
                .ended(times, if answered { tasks } else { 0 }, self.now);
        }
        let current = self.workers[rank as usize].current.take()?;
        self.released += current.task.queued_bytes();
        self.buffered -= current.answer.len;
        self.reserved -= current.reserved();
        self.flowing -= usize::from(current.flowing());
        if current.begun {
            self.agents[self.workers[rank as usize].agent].begun -= 1;
        }
        if current.starving {
            self.starving.retain(|&starving| starving != rank);
        }
        self.call_ended(current.task.id);
        (!current.cancelled).then_some(current.task)
    }

    /// Whether more of this large result is to be had now: a few of a host's at a time. All at once would
    /// be complete at the same time, and go through memory instead of the processor's caches; and R
    /// could begin with none before.
    fn may_flow(&self, rank: Rank) -> bool {
        let worker = &self.workers[rank as usize];
        let current = worker.current.as_ref();
        let begun = current.is_none_or(|current| current.begun || current.cancelled);
        begun || self.want == Want::Rank(rank) || self.agents[worker.agent].begun < AT_ONCE
    }

    /// Whether there is room for more of a result, by its place among those that need more. One in shared
    /// memory comes at once, and takes a descriptor.
    fn has_room(&self, at: Option<usize>) -> bool {
        let rank = at.and_then(|at| self.starving.get(at));
        let current = rank.and_then(|&rank| self.workers[rank as usize].current.as_ref());
        let used = self.buffered.saturating_add(self.reserved);
        match current.and_then(|current| current.announced) {
            Some(len) => {
                used.saturating_add(len) <= self.limit
                    && Arc::strong_count(&self.shared) <= MOST_SHARED
            }
            None => used < self.limit,
        }
    }

    /// Asks for more of large results: while there is room, or because R waits for them.
    fn grant(&mut self) {
        while !self.starving.is_empty() {
            let wanted = self.starving.iter().position(|&rank| self.is_wanted(rank));
            let first = self.starving.iter().position(|&rank| self.may_flow(rank));
            let at = match (self.want, wanted) {
                _ if self.unlimited => 0,
                (_, Some(at)) => at,
                _ if self.has_room(first) => match first {
                    Some(at) => at,
                    None => return,
                },
                // One result alone is completed beyond the limit: R takes it as soon as it is.
                (Want::Any, _) if self.flowing == 0 => {
                    let same = |&rank: &Rank| Some(rank) == self.alone;
                    let at = self.starving.iter().position(same).unwrap_or(0);
                    self.alone = Some(self.starving[at]);
                    at
                }
                (Want::Rank(rank), _) => match self.starving.iter().position(|&s| s == rank) {
                    Some(at) => at,
                    None => return,
                },
                _ => return,
            };
            let Some(rank) = self.starving.remove(at) else {
                return;
            };
            let worker = &mut self.workers[rank as usize];
            let Some(current) = &mut worker.current else {
                continue;
            };
            current.starving = false;
            if current.cancelled {
                continue;
            }
            if !mem::replace(&mut current.begun, true) {
                self.agents[worker.agent].begun += 1;
            }
            let before = current.reserved();
            let more = current.announced.unwrap_or(GRANT);
            current.granted = current.granted.saturating_add(more);
            self.reserved += current.reserved() - before;
            self.flowing += usize::from(current.flowing());
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            let frame = Frame::credit(worker.index, current.task.id, more);
            let agent = worker.agent;
            self.push_control(agent, frame);
        }
    }
}

/// The task that a worker is at, if that is one of R's.
fn current_of(worker: &Worker) -> Option<&Current> {
    let current = worker.current.as_ref();
    current.filter(|current| current.task.id & RESTORE == 0)
}

impl Current {
    /// Bytes granted beyond the small results' window, not yet received and still wanted.
    fn reserved(&self) -> usize {
        if self.cancelled {
            return 0;
        }
        self.granted - self.received.clamp(RESULT_WINDOW, self.granted)
    }

    /// More was granted of a large result, and it does not need more yet.
    fn flowing(&self) -> bool {
        !self.cancelled && !self.starving && self.granted > RESULT_WINDOW
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activity::{self, Measured};
    use crate::platform::exit::Exit;
    use crate::protocol::body::Body;
    use crate::protocol::control::Setback;
    use crate::protocol::error::ProtocolError;
    use crate::protocol::ids::{CALLS, RESTORE, Rank, TaskId};
    use crate::protocol::limits::SEND_WINDOW;

    #[test]
    fn a_result_in_crumbs_takes_little_more_than_its_bytes() {
        let mut body = Body::default();
        for i in 0..100_000u32 {
            body.push(Bytes::copy_from_slice(&[i as u8]));
            body.push(Bytes::new());
        }
        body.push(vec![7; MAX_BODY].into());
        assert_eq!(body.len, 100_000 + MAX_BODY);
        assert!(body.chunks.len() < 60, "{}", body.chunks.len());
        let bytes: Vec<u8> = body.chunks.iter().flatten().copied().collect();
        assert_eq!(bytes.len(), body.len);
        assert!((0..100_000).all(|i| bytes[i] == i as u8));
    }

    /// Workers that are up, one on each host.
    fn up(workers: u32) -> Scheduler {
        let hosts = (0..workers).map(|rank| vec![rank]).collect();
        let mut scheduler = Scheduler::new(hosts, 1 << 20);
        for agent in 0..workers as usize {
            tell(
                &mut scheduler,
                agent,
                &ToHead::WorkerUp { worker: 0, pid: 1 },
            );
        }
        scheduler
    }

    fn tell(scheduler: &mut Scheduler, agent: usize, message: &ToHead) {
        let frame = control::encode(message).unwrap();
        scheduler.on_frame(agent, frame).unwrap();
    }

    fn submit(scheduler: &mut Scheduler, order: Order) {
        let (rank, task) = (order.rank, order.task);
        scheduler.submit(order);
        let chunk = Bytes::from_static(b"message").into();
        scheduler.append(rank, task, chunk, true);
    }

    fn order(rank: Rank, task: TaskId) -> Order {
        Order {
            rank,
            task,
            job: 1,
            ..Order::default()
        }
    }

    fn again(rank: Rank, task: TaskId) -> Order {
        Order {
            again: true,
            ..order(rank, task)
        }
    }

    fn moved(rank: Rank, task: TaskId, from: Rank) -> Order {
        Order {
            instead_of: Some(from),
            ..order(rank, task)
        }
    }

    /// The worker of this host is lost and replaced.
    fn replace(scheduler: &mut Scheduler, agent: usize) {
        lose(scheduler, agent, true);
        tell(
            scheduler,
            agent,
            &ToHead::WorkerReplaced { worker: 0, pid: 2 },
        );
    }

    fn lose(scheduler: &mut Scheduler, agent: usize, replaced: bool) {
        let loss = Loss {
            pid: 1,
            exit: Exit::Signal(9),
            tail: String::new(),
            ..Loss::default()
        };
        let lost = ToHead::WorkerLost {
            worker: 0,
            loss,
            replaced,
        };
        tell(scheduler, agent, &lost);
    }

    /// The worker of this host answers, and leaves its random numbers so.
    fn answer(scheduler: &mut Scheduler, agent: usize, task: TaskId, seed: Option<&'static [u8]>) {
        if let Some(seed) = seed {
            let seed = Frame::new(Kind::Seed, 0, 0, task, Bytes::from_static(seed));
            scheduler.on_frame(agent, seed).unwrap();
        }
        let answer = Frame::new(Kind::Data, FIRST | LAST, 0, task, Bytes::new());
        scheduler.on_frame(agent, answer).unwrap();
    }

    /// Tasks and seeds that are sent to a host now.
    fn sent(scheduler: &mut Scheduler, agent: usize) -> Vec<(Kind, TaskId, Bytes)> {
        let frames = std::iter::from_fn(|| scheduler.next_frame(agent));
        let frames = frames.filter(|frame| frame.header.kind != Kind::Control);
        frames
            .map(|frame| (frame.header.kind, frame.header.task, frame.body))
            .collect()
    }

    fn at(scheduler: &mut Scheduler, seconds: u64) {
        scheduler.at(Moment::from_secs(seconds));
    }

    /// Kinds and times of what a worker was at.
    fn history(scheduler: &Scheduler, rank: Rank) -> Vec<(activity::Kind, u64, u64)> {
        let track = scheduler.track(rank, true);
        let intervals = track.intervals().iter();
        intervals
            .map(|i| (i.kind, i.start.as_secs(), i.end.as_secs()))
            .collect()
    }

    #[test]
    fn a_worker_is_busy_from_when_it_has_the_message_until_it_answers() {
        use activity::Kind::{Busy, Transfer};
        let mut s = up(1);
        s.measure_with(|bytes| {
            (bytes == b"7").then_some(Measured {
                seconds: 2.0,
                tasks: 7,
            })
        });
        assert_eq!(s.state(0), State::Idle);
        at(&mut s, 10);
        submit(&mut s, order(0, 1));
        // Sent ahead: it begins when the one before has ended.
        let ahead = Order {
            ahead: true,
            ..order(0, 2)
        };
        submit(&mut s, ahead);
        assert_eq!(s.state(0), State::Busy(1));
        at(&mut s, 12);
        assert_eq!(tasks_sent(&mut s, 0), [1, 2]);
        at(&mut s, 15);
        assert_eq!(s.track(0, false).busy.as_secs(), 3);
        answer(&mut s, 0, 1, None);
        assert_eq!(s.state(0), State::Busy(2));
        assert_eq!(history(&s, 0), [(Transfer, 10, 12), (Busy, 12, 15)]);
        // This one says how long it took, and for how many.
        at(&mut s, 19);
        let seven = Bytes::from_static(b"7");
        let first = Frame::new(Kind::Data, FIRST, 0, 2, seven);
        s.on_frame(0, first).unwrap();
        at(&mut s, 20);
        let last = Frame::new(Kind::Data, LAST, 0, 2, Bytes::new());
        s.on_frame(0, last).unwrap();
        assert_eq!(s.state(0), State::Idle);
        let parts = history(&s, 0);
        assert_eq!(
            parts[2..],
            [(Transfer, 15, 17), (Busy, 17, 19), (Transfer, 19, 20)]
        );
        let track = s.track(0, false);
        assert_eq!((track.tasks, track.busy.as_secs()), (8, 5));
        assert!(track.bytes_in > 0 && track.bytes_out > 0 && track.losses == 0);
        assert!(track.intervals().is_empty());
    }

    #[test]
    fn losses_cancelled_tasks_and_what_restores_are_no_tasks_done() {
        use activity::Kind::Busy;
        let mut s = up(1);
        submit(&mut s, order(0, 1));
        tasks_sent(&mut s, 0);
        at(&mut s, 3);
        lose(&mut s, 0, true);
        assert_eq!(s.state(0), State::Restoring);
        at(&mut s, 5);
        tell(&mut s, 0, &ToHead::WorkerReplaced { worker: 0, pid: 2 });
        let track = s.track(0, true);
        assert_eq!((track.tasks, track.losses), (0, 1));
        assert_eq!(history(&s, 0), [(Busy, 0, 3)]);
        let lost = track.losses().iter();
        let lost: Vec<_> = lost.map(|of| (of.0.as_secs(), of.1.as_secs())).collect();
        assert_eq!(lost, [(3, 5)]);
        assert_eq!(
            track.error.as_deref(),
            Some("lost: pid 1 was killed by signal 9")
        );
        submit(&mut s, again(0, 1));
        tasks_sent(&mut s, 0);
        at(&mut s, 6);
        s.cancel_job(1);
        assert_eq!(s.state(0), State::Ending(1));
        at(&mut s, 8);
        let ended = Frame::new(Kind::Data, LAST | ABORT, 0, 1, Bytes::new());
        s.on_frame(0, ended).unwrap();
        assert_eq!(s.state(0), State::Idle);
        s.restore(0, vec![(RESTORE, 0, vec![Bytes::from_static(b"x").into()])]);
        assert_eq!(s.state(0), State::Restoring);
        tasks_sent(&mut s, 0);
        at(&mut s, 9);
        answer(&mut s, 0, RESTORE, None);
        assert_eq!(history(&s, 0), [(Busy, 0, 3), (Busy, 5, 8)]);
        s.stop_worker(0);
        assert_eq!(s.state(0), State::Stopped);
        let track = s.track(0, false);
        assert_eq!((track.tasks, track.losses, track.busy.as_secs()), (0, 1, 6));
    }

    fn tasks_sent(scheduler: &mut Scheduler, agent: usize) -> Vec<TaskId> {
        let frames = sent(scheduler, agent).into_iter();
        let data = frames.filter(|frame| frame.0 == Kind::Data);
        data.map(|frame| frame.1).collect()
    }

    #[test]
    fn a_lost_task_that_is_submitted_again_goes_before_those_that_follow() {
        let mut scheduler = up(1);
        submit(&mut scheduler, order(0, 1));
        submit(&mut scheduler, order(0, 2));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        replace(&mut scheduler, 0);
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        submit(&mut scheduler, again(0, 1));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        answer(&mut scheduler, 0, 1, None);
        assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
    }

    #[test]
    fn what_follows_a_lost_task_goes_on_when_that_is_let_go_or_cancelled() {
        type End = fn(&mut Scheduler);
        let ends: [End; 3] = [
            |scheduler| scheduler.let_go(0, 1),
            |scheduler| scheduler.cancel_job(7),
            |scheduler| scheduler.cancel_task(0, 1),
        ];
        for end in ends {
            let mut scheduler = up(1);
            let first = Order {
                job: 7,
                ..order(0, 1)
            };
            submit(&mut scheduler, first);
            submit(&mut scheduler, order(0, 2));
            assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
            replace(&mut scheduler, 0);
            scheduler.let_go(0, 2);
            assert_eq!(tasks_sent(&mut scheduler, 0), []);
            scheduler.take_notes();
            end(&mut scheduler);
            assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
            // It had ended before, as lost.
            assert_eq!(scheduler.take_notes(), []);
        }
    }

    #[test]
    fn what_was_another_workers_does_not_wait_for_a_lost_task_to_be_decided_on() {
        let mut scheduler = up(2);
        submit(&mut scheduler, order(0, 1));
        submit(&mut scheduler, order(0, 2));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        replace(&mut scheduler, 0);
        submit(&mut scheduler, moved(0, 3, 1));
        assert_eq!(tasks_sent(&mut scheduler, 0), [3]);
        // Nor does its own loss, or that it is submitted again, end the wait of others.
        replace(&mut scheduler, 0);
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        let third = Order {
            again: true,
            ..moved(0, 3, 1)
        };
        submit(&mut scheduler, third);
        assert_eq!(tasks_sent(&mut scheduler, 0), [3]);
        answer(&mut scheduler, 0, 3, None);
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        submit(&mut scheduler, again(0, 1));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    }

    #[test]
    fn who_stands_in_uses_the_random_numbers_of_the_other_or_new_ones() {
        for (left, found) in [(Some(&b"left"[..]), &b"left"[..]), (None, b"")] {
            let mut scheduler = up(2);
            submit(&mut scheduler, order(0, 1));
            assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
            answer(&mut scheduler, 0, 1, left);
            lose(&mut scheduler, 0, false);
            submit(&mut scheduler, moved(1, 2, 0));
            let frames = sent(&mut scheduler, 1);
            assert_eq!(frames[0], (Kind::Seed, 2, Bytes::from_static(found)));
            assert_eq!((frames[1].0, frames[1].1), (Kind::Data, 2));
        }
    }

    #[test]
    fn a_fresh_worker_has_a_whole_window() {
        let fill = |scheduler: &mut Scheduler, order: Order| {
            let (rank, task) = (order.rank, order.task);
            scheduler.submit(order);
            for _ in 0..2 * SEND_WINDOW / MAX_BODY {
                let chunk = Bytes::from(vec![0; MAX_BODY]).into();
                scheduler.append(rank, task, chunk, false);
            }
            let frames = sent(scheduler, 0).into_iter();
            frames
                .map(|frame| HEADER_LEN + frame.2.len())
                .sum::<usize>()
        };
        let mut scheduler = up(1);
        let whole = fill(&mut scheduler, order(0, 1));
        assert!(whole > SEND_WINDOW - HEADER_LEN - MAX_BODY && whole <= SEND_WINDOW);
        // It is lost with what it had not read.
        replace(&mut scheduler, 0);
        assert_eq!(fill(&mut scheduler, again(0, 1)), whole);
        // It has all of a message, of which its agent has not given back the bytes, and is killed.
        replace(&mut scheduler, 0);
        submit(&mut scheduler, again(0, 1));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        scheduler.cancel_task(0, 1);
        tell(
            &mut scheduler,
            0,
            &ToHead::WorkerReplaced { worker: 0, pid: 2 },
        );
        assert_eq!(fill(&mut scheduler, order(0, 2)), whole);
    }

    #[test]
    fn a_task_that_is_out_of_time_ends_once() {
        let mut scheduler = up(1);
        submit(&mut scheduler, order(0, 1));
        submit(&mut scheduler, order(0, 2));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        scheduler.take_notes();
        let late = ToHead::TimedOut { worker: 0, task: 1 };
        tell(&mut scheduler, 0, &late);
        assert!(matches!(
            scheduler.take_notes()[..],
            [Note::Done {
                task: 1,
                outcome: Outcome::TimedOut,
                ..
            }]
        ));
        scheduler.cancel_task(0, 1);
        tell(&mut scheduler, 0, &late);
        // Its worker is busy until that has heeded the interrupt, or is replaced.
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        tell(
            &mut scheduler,
            0,
            &ToHead::WorkerReplaced { worker: 0, pid: 2 },
        );
        assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
        let notes = scheduler.take_notes();
        assert!(matches!(notes[..], [Note::Replaced { killed: true, .. }]));
    }

    #[test]
    fn what_waits_on_a_host_that_is_left_out_is_lost_once() {
        let mut scheduler = up(2);
        submit(&mut scheduler, order(0, 1));
        submit(&mut scheduler, order(0, 2));
        for _ in 0..LOSSES_IN_A_ROW {
            assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
            replace(&mut scheduler, 0);
            submit(&mut scheduler, again(0, 1));
        }
        let notes = scheduler.take_notes();
        let lost = |id: TaskId| {
            let ends = notes.iter().filter(move |note| match note {
                Note::Done { task, outcome, .. } => {
                    *task == id && matches!(outcome, Outcome::Lost(_))
                }
                _ => false,
            });
            ends.count()
        };
        // Each of its tries, and that which came too late.
        assert_eq!(lost(1), LOSSES_IN_A_ROW + 1);
        assert_eq!(lost(2), 1);
        let left_out = |note: &&Note| matches!(note, Note::LeftOut { agent: 0, .. });
        assert_eq!(notes.iter().filter(left_out).count(), 1);
        let frame = scheduler.next_frame(0).unwrap();
        assert_eq!(
            control::decode::<ToAgent>(&frame.body).unwrap(),
            ToAgent::Stop
        );
        assert_eq!(scheduler.next_frame(0), None);
    }

    #[test]
    fn the_last_host_is_left_out_only_if_its_workers_end_without_a_task() {
        let left_out = |scheduler: &mut Scheduler| {
            let notes = scheduler.take_notes();
            notes
                .iter()
                .any(|note| matches!(note, Note::LeftOut { .. }))
        };
        let mut scheduler = up(1);
        submit(&mut scheduler, order(0, 1));
        for _ in 0..2 * LOSSES_IN_A_ROW {
            assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
            replace(&mut scheduler, 0);
            submit(&mut scheduler, again(0, 1));
        }
        assert!(!left_out(&mut scheduler));
        let mut scheduler = up(1);
        for _ in 0..LOSSES_IN_A_ROW {
            replace(&mut scheduler, 0);
        }
        assert!(left_out(&mut scheduler));
    }

    #[test]
    fn nothing_is_left_for_a_host_that_is_lost_after_it_was_left_out() {
        let mut scheduler = up(1);
        for _ in 0..LOSSES_IN_A_ROW {
            replace(&mut scheduler, 0);
        }
        assert!(!scheduler.any_left());
        scheduler.agent_lost(0, "lost");
        assert_eq!(scheduler.next_frame(0), None);
    }

    #[test]
    fn a_host_that_was_lost_while_its_stream_was_full_is_sent_to_again() {
        let mut s = up(1);
        submit(&mut s, order(0, 1));
        // Its message waits to be sent.
        s.agent_lost(0, "cut");
        s.take_notes();
        s.agent_back(0, &ToAgent::Stop).unwrap();
        tell(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 2 });
        let chunk = Bytes::from_static(b"what lasted").into();
        s.restore(0, vec![(RESTORE, 0, vec![chunk])]);
        assert_eq!(tasks_sent(&mut s, 0), [RESTORE]);
    }

    #[test]
    fn what_restores_a_worker_does_not_change_which_random_numbers_it_goes_on_with() {
        let mut s = up(1);
        submit(&mut s, order(0, 1));
        tasks_sent(&mut s, 0);
        answer(&mut s, 0, 1, Some(b"its own"));
        for pid in 2..4 {
            s.agent_lost(0, "cut");
            s.agent_back(0, &ToAgent::Stop).unwrap();
            tell(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid });
            let chunk = Bytes::from_static(b"what lasted").into();
            s.restore(0, vec![(RESTORE, 0, vec![chunk])]);
            let seed = (Kind::Seed, 0, Bytes::from_static(b"its own"));
            assert_eq!(sent(&mut s, 0).last(), Some(&seed));
            answer(&mut s, 0, RESTORE, Some(b"of the replay"));
        }
    }

    #[test]
    fn a_worker_that_is_stopped_while_its_host_is_lost_is_not_made_again() {
        let mut s = Scheduler::new(vec![vec![0, 1]], 1 << 20);
        s.agent_lost(0, "cut");
        assert!(s.has_lost(0));
        s.stop_worker(0);
        s.agent_back(0, &ToAgent::Stop).unwrap();
        tell(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 3 });
        assert!(!s.is_up(0));
        assert!(s.is_starting(0));
        tell(&mut s, 0, &ToHead::WorkerUp { worker: 1, pid: 4 });
        assert!(s.is_up(1) && !s.is_starting(0) && !s.has_lost(0));
    }

    #[test]
    fn a_worker_that_is_back_goes_on_where_who_stood_in_left_its_random_numbers() {
        let mut s = up(2);
        submit(&mut s, order(0, 1));
        tasks_sent(&mut s, 0);
        answer(&mut s, 0, 1, Some(b"before"));
        s.agent_lost(0, "cut");
        submit(&mut s, moved(1, 2, 0));
        tasks_sent(&mut s, 1);
        s.agent_back(0, &ToAgent::Stop).unwrap();
        tell(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 2 });
        let seed = |seed| (Kind::Seed, 0, Bytes::from_static(seed));
        let chunk = Bytes::from_static(b"what lasted").into();
        s.restore(0, vec![(RESTORE, 0, vec![chunk])]);
        assert_eq!(sent(&mut s, 0).last(), Some(&seed(b"before")));
        let left = Frame::new(Kind::Seed, GUEST, 0, 2, Bytes::from_static(b"after"));
        s.on_frame(1, left).unwrap();
        answer(&mut s, 1, 2, None);
        assert_eq!(sent(&mut s, 0), [seed(b"after")]);
        // Nor has that become the other's.
        assert!(sent(&mut s, 1).is_empty());
    }

    /// The worker of this host cannot be restored now; its agent tries it again.
    fn cannot_be_restored(scheduler: &mut Scheduler, agent: usize) {
        let setback = Setback {
            count: 3,
            restoring: true,
            stalled: 0,
            pause: 1_000,
        };
        let loss = Loss {
            setback,
            ..Loss::default()
        };
        let lost = ToHead::WorkerLost {
            worker: 0,
            loss,
            replaced: false,
        };
        tell(scheduler, agent, &lost);
    }

    #[test]
    fn a_worker_that_is_tried_again_fails_its_tasks_and_comes_back_with_its_random_numbers() {
        let mut s = up(2);
        submit(&mut s, order(0, 1));
        tasks_sent(&mut s, 0);
        answer(&mut s, 0, 1, Some(b"before"));
        submit(&mut s, order(0, 2));
        s.take_notes();
        cannot_be_restored(&mut s, 0);
        let notes = s.take_notes();
        assert!(matches!(notes[0], Note::Gone { rank: 0, .. }));
        assert!(matches!(
            notes[1],
            Note::Done {
                task: 2,
                outcome: Outcome::Lost(_),
                ..
            }
        ));
        assert_eq!(s.state(0), State::Lost);
        assert!(s.any_left() && !s.has_lost(0));
        // Another one goes on with its random numbers.
        submit(&mut s, moved(1, 3, 0));
        tasks_sent(&mut s, 1);
        let left = Frame::new(Kind::Seed, GUEST, 0, 3, Bytes::from_static(b"after"));
        s.on_frame(1, left).unwrap();
        answer(&mut s, 1, 3, None);
        sent(&mut s, 0);
        tell(&mut s, 0, &ToHead::WorkerReplaced { worker: 0, pid: 9 });
        let back = |note: &Note| *note == Note::Back { rank: 0, pid: 9 };
        assert!(s.take_notes().iter().any(back));
        assert_eq!(s.state(0), State::Idle);
        let seed = (Kind::Seed, 0, Bytes::from_static(b"after"));
        assert_eq!(sent(&mut s, 0), [seed]);
        submit(&mut s, order(0, 4));
        assert_eq!(tasks_sent(&mut s, 0), [4]);
    }

    #[test]
    fn a_worker_that_is_tried_again_is_so_with_its_host_and_not_when_it_is_stopped() {
        let mut s = up(2);
        for agent in 0..2 {
            cannot_be_restored(&mut s, agent);
        }
        assert!(s.any_left());
        s.agent_lost(0, "cut");
        assert!(s.has_lost(0));
        s.agent_back(0, &ToAgent::Stop).unwrap();
        tell(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 2 });
        assert!(s.is_up(0));
        // Half of what its host has is no state to go on with.
        s.take_notes();
        cannot_be_restored(&mut s, 0);
        let for_good = |note: &Note| match note {
            Note::Gone { gone, .. } => !gone.is_tried_again(),
            _ => false,
        };
        assert!(s.take_notes().iter().any(for_good));
        s.stop_worker(1);
        assert_eq!(s.state(1), State::Stopped);
        assert!(!s.any_left());
        tell(&mut s, 1, &ToHead::WorkerReplaced { worker: 0, pid: 3 });
        assert_eq!(s.state(1), State::Stopped);
    }

    fn ahead(rank: Rank, task: TaskId) -> Order {
        Order {
            ahead: true,
            ..order(rank, task)
        }
    }

    /// The agent has dropped a task that had not started.
    fn dropped(scheduler: &mut Scheduler, task: TaskId) -> Result<(), ProtocolError> {
        let dropped = Frame::new(Kind::Data, LAST | ABORT, 0, task, Bytes::new());
        scheduler.on_frame(0, dropped)
    }

    /// Tasks that have ended since the last call, and how.
    fn ends(scheduler: &mut Scheduler) -> Vec<(TaskId, &'static str)> {
        let ends = scheduler.take_notes().into_iter();
        let ends = ends.filter_map(|note| match note {
            Note::Done { task, outcome, .. } => Some((task, outcome)),
            _ => None,
        });
        let name = |outcome| match outcome {
            Outcome::Answer(_) => "answer",
            Outcome::Lost(_) => "lost",
            Outcome::TimedOut => "timed out",
            Outcome::Cancelled => "cancelled",
            Outcome::Recalled => "recalled",
        };
        ends.map(|(task, outcome)| (task, name(outcome))).collect()
    }

    /// What an agent is told besides tasks.
    fn told(scheduler: &mut Scheduler) -> Vec<ToAgent> {
        let frames = std::iter::from_fn(|| scheduler.next_frame(0));
        let control = frames.filter(|frame| frame.header.kind == Kind::Control);
        control
            .map(|frame| control::decode(&frame.body).unwrap())
            .collect()
    }

    /// One worker that is at task 1, while task 2 waits at its agent.
    fn one_ahead() -> Scheduler {
        let mut s = up(1);
        submit(&mut s, order(0, 1));
        submit(&mut s, ahead(0, 2));
        submit(&mut s, ahead(0, 3));
        assert_eq!(tasks_sent(&mut s, 0), [1, 2]);
        s
    }

    #[test]
    fn one_task_is_sent_ahead_and_then_the_next() {
        let mut s = one_ahead();
        answer(&mut s, 0, 1, None);
        assert_eq!(tasks_sent(&mut s, 0), [3]);
        answer(&mut s, 0, 2, None);
        answer(&mut s, 0, 3, None);
        assert_eq!(ends(&mut s), [1, 2, 3].map(|task| (task, "answer")));
    }

    #[test]
    fn what_is_not_meant_to_be_is_not_sent_ahead() {
        let lasting = Order {
            lasts: Some(0),
            ..ahead(0, 2)
        };
        let others = Order {
            instead_of: Some(1),
            ..ahead(0, 2)
        };
        for second in [order(0, 2), lasting, others] {
            let mut s = up(2);
            submit(&mut s, order(0, 1));
            submit(&mut s, second);
            submit(&mut s, ahead(0, 3));
            assert_eq!(tasks_sent(&mut s, 0), [1]);
            answer(&mut s, 0, 1, None);
            assert_eq!(tasks_sent(&mut s, 0), [2, 3]);
        }
    }

    #[test]
    fn a_task_that_waited_at_the_agent_is_not_lost_with_its_worker() {
        let mut s = one_ahead();
        replace(&mut s, 0);
        assert_eq!(ends(&mut s), [(1, "lost")]);
        assert_eq!(tasks_sent(&mut s, 0), []);
        submit(&mut s, again(0, 1));
        assert_eq!(tasks_sent(&mut s, 0), [1, 2]);
        answer(&mut s, 0, 1, None);
        replace(&mut s, 0);
        // It had started.
        assert_eq!(ends(&mut s), [(1, "answer"), (2, "lost")]);
        s.let_go(0, 2);
        assert_eq!(tasks_sent(&mut s, 0), [3]);
        lose(&mut s, 0, false);
        assert_eq!(ends(&mut s), [(3, "lost")]);
    }

    #[test]
    fn with_a_worker_that_is_gone_both_are_lost() {
        let mut s = one_ahead();
        s.stop_worker(0);
        assert_eq!(ends(&mut s), [1, 2, 3].map(|task| (task, "lost")));
        assert_eq!(dropped(&mut s, 2), Ok(()));
    }

    #[test]
    fn a_task_that_waited_is_sent_again_after_a_kill_and_what_was_on_its_way_is_not_meant() {
        let mut s = one_ahead();
        s.cancel_task(0, 1);
        tell(&mut s, 0, &ToHead::WorkerReplaced { worker: 0, pid: 2 });
        let first: Vec<Frame> = std::iter::from_fn(|| s.next_frame(0)).collect();
        let noted = control::encode(&ToAgent::LossNoted { worker: 0 }).unwrap();
        assert_eq!(first[1], noted);
        let tasks = first[2..].iter().map(|frame| frame.header.task);
        assert_eq!(tasks.collect::<Vec<_>>(), [2, 3]);
        assert_eq!(ends(&mut s), [(1, "cancelled")]);
    }

    #[test]
    fn a_cancel_of_both_frees_the_worker_when_the_agent_has_said_so_of_each() {
        for crossed in [false, true] {
            let mut s = one_ahead();
            s.cancel_job(1);
            let all = [1, 2, 3].map(|task| (task, "cancelled"));
            assert_eq!(ends(&mut s), all);
            // What has not started first.
            let cancels = [2, 1].map(|task| ToAgent::Cancel { worker: 0, task });
            assert_eq!(told(&mut s), cancels);
            submit(&mut s, ahead(0, 4));
            if crossed {
                answer(&mut s, 0, 1, None);
                assert_eq!(tasks_sent(&mut s, 0), []);
                answer(&mut s, 0, 2, None);
            } else {
                assert_eq!(dropped(&mut s, 2), Ok(()));
                assert_eq!(tasks_sent(&mut s, 0), []);
                answer(&mut s, 0, 1, None);
            }
            assert_eq!(tasks_sent(&mut s, 0), [4]);
            assert_eq!(ends(&mut s), []);
        }
    }

    #[test]
    fn a_task_is_recalled_unless_it_has_started() {
        let mut s = one_ahead();
        s.recall(0, 1);
        s.recall(0, 2);
        s.recall(0, 2);
        assert_eq!(told(&mut s), [ToAgent::Recall { worker: 0, task: 2 }]);
        assert_eq!(ends(&mut s), []);
        assert_eq!(dropped(&mut s, 2), Ok(()));
        assert_eq!(ends(&mut s), [(2, "recalled")]);
        // In its place.
        assert_eq!(tasks_sent(&mut s, 0), [3]);
        s.recall(0, 3);
        answer(&mut s, 0, 1, None);
        answer(&mut s, 0, 3, None);
        assert_eq!(ends(&mut s), [(1, "answer"), (3, "answer")]);
        // It has not been sent, or not wholly.
        submit(&mut s, order(0, 4));
        s.submit(ahead(0, 5));
        s.append(0, 5, Bytes::from_static(b"part").into(), false);
        submit(&mut s, ahead(0, 6));
        assert_eq!(tasks_sent(&mut s, 0), [4, 5]);
        s.recall(0, 6);
        s.recall(0, 5);
        assert_eq!(ends(&mut s), [(6, "recalled"), (5, "recalled")]);
        let abort = Frame::new(Kind::Data, LAST | ABORT, 0, 5, Bytes::new());
        assert_eq!(s.next_frame(0), Some(abort));
        // The worker is lost before the agent could answer.
        submit(&mut s, ahead(0, 7));
        assert_eq!(tasks_sent(&mut s, 0), [7]);
        s.recall(0, 7);
        replace(&mut s, 0);
        assert_eq!(ends(&mut s), [(4, "lost"), (7, "recalled")]);
    }

    #[test]
    fn an_agent_that_drops_what_it_was_not_told_to_is_none_of_ours() {
        assert!(dropped(&mut one_ahead(), 2).is_err());
        let mut s = one_ahead();
        s.recall(0, 2);
        assert!(dropped(&mut s, 1).is_err());
        assert!(dropped(&mut s, 3).is_err());
    }

    #[test]
    fn the_message_of_a_task_ahead_counts_as_waiting_until_that_has_started() {
        let message = b"message".len();
        let mut s = one_ahead();
        assert_eq!(s.take_released(), message);
        replace(&mut s, 0);
        assert_eq!(s.take_released(), 0);
        s.let_go(0, 1);
        assert_eq!(tasks_sent(&mut s, 0), [2, 3]);
        assert_eq!(s.take_released(), message);
        s.cancel_task(0, 3);
        assert_eq!(s.take_released(), message);
        assert_eq!(dropped(&mut s, 3), Ok(()));
        s.submit(ahead(0, 4));
        s.append(0, 4, Bytes::from_static(b"message").into(), false);
        assert_eq!(tasks_sent(&mut s, 0), [4]);
        assert_eq!(s.take_released(), 0);
        answer(&mut s, 0, 2, None);
        assert_eq!(s.take_released(), message);
    }

    /// A call for whoever of these is free.
    fn call(scheduler: &mut Scheduler, task: TaskId, any_of: &[Rank], again: bool) {
        scheduler.submit(Order {
            task,
            job: CALLS,
            again,
            any_of: Some(any_of.into()),
            ..Order::default()
        });
        scheduler.append_call(task, Bytes::from_static(b"message").into(), true);
    }

    #[test]
    fn calls_go_to_whoever_is_free_in_their_order() {
        let mut scheduler = up(2);
        for task in 1..=4 {
            call(&mut scheduler, task, &[0, 1], false);
        }
        call(&mut scheduler, 5, &[1], false);
        let mut first = tasks_sent(&mut scheduler, 0);
        first.extend(tasks_sent(&mut scheduler, 1));
        first.sort_unstable();
        assert_eq!(first, [1, 2]);
        assert_eq!(scheduler.call_place(3), CallPlace::Waiting);
        let CallPlace::With(rank) = scheduler.call_place(1) else {
            panic!("call 1 is with nobody");
        };
        answer(&mut scheduler, rank as usize, 1, None);
        assert_eq!(tasks_sent(&mut scheduler, rank as usize), [3]);
        assert_eq!(scheduler.call_place(1), CallPlace::Nowhere);
        // A task of the worker's own goes before calls that wait.
        submit(&mut scheduler, order(rank, 9));
        answer(&mut scheduler, rank as usize, 3, None);
        assert_eq!(tasks_sent(&mut scheduler, rank as usize), [9]);
        assert_eq!(scheduler.take_released(), b"message".len());
    }

    #[test]
    fn a_verbs_workers_are_given_no_calls_but_one_that_is_waited_for() {
        let mut scheduler = up(1);
        scheduler.keep_for_verb(0);
        call(&mut scheduler, 1, &[0], false);
        call(&mut scheduler, 2, &[0], false);
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        scheduler.await_call(Some(2));
        assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
        scheduler.await_call(None);
        answer(&mut scheduler, 0, 2, None);
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        scheduler.verb_over();
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    }

    #[test]
    fn a_lost_call_holds_up_nobody_and_goes_first_when_it_is_tried_again() {
        let mut scheduler = up(1);
        for task in 1..=3 {
            call(&mut scheduler, task, &[0], false);
        }
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        replace(&mut scheduler, 0);
        assert_eq!(ends(&mut scheduler), [(1, "lost")]);
        assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
        call(&mut scheduler, 1, &[0], true);
        answer(&mut scheduler, 0, 2, None);
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        // With the last of its workers all end.
        ends(&mut scheduler);
        lose(&mut scheduler, 0, false);
        assert_eq!(ends(&mut scheduler), [(1, "lost"), (3, "lost")]);
        call(&mut scheduler, 4, &[0], false);
        assert_eq!(ends(&mut scheduler), [(4, "lost")]);
    }

    #[test]
    fn a_call_can_be_cancelled_wherever_it_is() {
        let mut scheduler = up(1);
        for task in 1..=3 {
            call(&mut scheduler, task, &[0], false);
        }
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        scheduler.cancel_call(2);
        scheduler.cancel_call(1);
        assert_eq!(scheduler.call_place(1), CallPlace::Nowhere);
        let given_up = Frame::new(Kind::Data, LAST | ABORT, 0, 1, Bytes::new());
        scheduler.on_frame(0, given_up).unwrap();
        assert_eq!(tasks_sent(&mut scheduler, 0), [3]);
    }

    #[test]
    fn a_worker_that_is_back_takes_no_calls_before_it_is_what_it_was() {
        let mut scheduler = up(2);
        scheduler.agent_lost(0, "gone");
        scheduler.agent_back(0, &ToAgent::Alive).unwrap();
        tell(&mut scheduler, 0, &ToHead::WorkerUp { worker: 0, pid: 3 });
        call(&mut scheduler, 1, &[0], false);
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        scheduler.restored(0);
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    }
}
