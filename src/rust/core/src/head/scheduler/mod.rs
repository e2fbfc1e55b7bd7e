//! The head's scheduler: which task is on which worker, what may be sent next, and how tasks and
//! workers ended.
//!
//! The scheduler is a pure state machine. Frames and commands go in. Frames for an agent come out
//! of [`Scheduler::next_frame`] when its stream can take them, and notes for R come out of
//! [`Scheduler::take_notes`]. The scheduler contains no socket, clock or thread (callers that
//! record when workers were busy set the time with [`Scheduler::at`]), so that thousands of workers
//! and years of faults can be simulated.
//!
//! # Invariants
//!
//! 1. Every submitted task gets exactly one [`Note::Done`].
//! 2. The tasks of one worker start one at a time and in the order of submission, except that a task
//!    that was lost with its worker and is submitted again starts before the tasks that followed it.
//! 3. A prefetched task (see [`Order::prefetch`]) that has not started is not lost with a worker
//!    that is replaced.
//! 4. The bytes of one worker never delay another worker's by more than one chunk.
//! 5. The results that the head buffers, of which a result in shared memory counts as a whole, stay
//!    below the limit plus one [`GRANT`](crate::protocol::limits::GRANT).
//! 6. Only two results may exceed that limit: the one that R waits for by rank, and one that
//!    completes because no other result can.

use crate::head::activity::{Measure, Moment, Times, WorkerStats};
use crate::protocol::body::Memory;
use crate::protocol::control::{self, ToAgent, ToHead};
use crate::protocol::dedup::Chunk;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{BY_REFERENCE, Frame, Kind, REASSIGNED};
use crate::protocol::ids::{RESTORE, Rank, TaskId};
use crate::protocol::limits::SEND_WINDOW;
use events::{Interruption, Note, Outcome, State, Termination};
use std::collections::{HashSet, VecDeque};
use std::mem;
use std::sync::Arc;
use std::time::Duration;
use task::{Current, Order, Task};
use tracing::{debug, trace};
use worker::{Worker, WorkerState, current_of};

mod cancel;
mod drain;
mod dump;
pub mod events;
pub mod give_back;
mod grow;
mod losses;
mod outbound;
pub mod pool;
mod result_flow;
mod results;
mod send;
pub mod task;
mod worker;

use drain::{AgentDrain, Drains};
use give_back::GiveBack;
use outbound::Outbound;
use pool::CallQueue;
use result_flow::ResultFlow;

/// A host is left out after this many worker failures in a row, without a task that ended in
/// between, if there is another host. A host with more workers is left out after four failures for
/// each of its workers, because each worker may be given a task that ends it three times.
pub const MAX_FAILURES_IN_A_ROW: usize = 10;

/// Maximum number of buffered results in shared memory, besides one that R waits for. Each result
/// takes a descriptor.
pub const MAX_SHARED_RESULTS: usize = 128;

#[derive(Debug)]
struct AgentState {
    ranks: Vec<Rank>,
    out: Outbound,
    /// Worker failures since a task last ended on this host.
    failures: usize,
    /// The agent has not joined yet: its workers are terminated until it does.
    awaited: bool,
    drain: Option<AgentDrain>,
    /// When a worker last began or ended a task, or came up.
    active: Moment,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    agents: Vec<AgentState>,
    workers: Vec<Worker>,
    notes: Vec<Note>,
    /// The workers whose random number states have been set.
    changed_seeds: Vec<Rank>,
    flow: ResultFlow,
    /// Bytes of tasks that left the queues since the last [`Scheduler::take_released`].
    released: usize,
    /// The time of the event that is being processed.
    now: Moment,
    measure: Measure,
    /// The time limit of all tasks.
    time_limit: Option<Duration>,
    calls: CallQueue,
    drains: Drains,
    give_back: Vec<GiveBack>,
    /// See [`Scheduler::set_tasks_wait`].
    tasks_wait: bool,
}

impl Scheduler {
    /// `hosts`: the ranks on each agent. `limit`: bytes of results to buffer.
    pub fn new(hosts: Vec<Vec<Rank>>, limit: usize) -> Scheduler {
        let count = hosts.iter().map(Vec::len).sum();
        let mut homes = vec![(0, 0); count];
        for (agent, ranks) in hosts.iter().enumerate() {
            for (index, &rank) in ranks.iter().enumerate() {
                homes[rank as usize] = (agent, index as u32);
            }
        }
        let flow = ResultFlow::new(homes.iter().map(|&(agent, _)| agent).collect(), limit);
        Scheduler {
            agents: hosts.into_iter().map(AgentState::new).collect(),
            workers: homes
                .into_iter()
                .map(|(agent, index)| Worker::new(agent, index))
                .collect(),
            notes: Vec::new(),
            changed_seeds: Vec::new(),
            flow,
            released: 0,
            now: Moment::ZERO,
            measure: |_| None,
            time_limit: None,
            calls: CallQueue::default(),
            drains: Drains::default(),
            give_back: Vec::new(),
            tasks_wait: false,
        }
    }

    /// Sets the time of all events that follow.
    pub fn at(&mut self, now: Moment) {
        self.now = now;
    }

    /// Sets how the busy time of a worker is read from its answers.
    pub fn measure_with(&mut self, measure: Measure) {
        self.measure = measure;
    }

    /// Sets a time limit for all tasks that are submitted from now on.
    pub fn limit_time(&mut self, limit: Option<Duration>) {
        self.time_limit = limit;
    }

    /// The time limit of a task: the smaller one of its own limit and the limit of all tasks.
    fn limit_of(&self, order: &Order) -> Option<Duration> {
        let limits = [order.limit, self.time_limit];
        limits.into_iter().flatten().min()
    }

    /// The state of a worker.
    pub fn state(&self, rank: Rank) -> State {
        let Some(worker) = self.workers.get(rank as usize) else {
            return State::default();
        };
        match (&worker.state, &worker.current) {
            (WorkerState::Terminated(termination), _) => match **termination {
                Termination::Stopped => State::Stopped,
                _ if termination.is_of_host() && self.is_awaited(rank) => State::Waiting,
                _ => State::Lost,
            },
            (WorkerState::Starting, _) if worker.stats.lost_since().is_some() => State::Restoring,
            (WorkerState::Starting, _) => State::Starting,
            (WorkerState::Up, None) if worker.draining.is_some() => State::Draining(None),
            (WorkerState::Up, None) => State::Idle,
            (WorkerState::Up, Some(current)) => match current.task.id {
                task if task & RESTORE != 0 => State::Restoring,
                task if current.cancelled => State::Ending(task),
                task if worker.draining.is_some() => State::Draining(Some(task)),
                task => State::Busy(task),
            },
        }
    }

    /// The statistics of a worker so far. `history`: include the intervals in which it was busy.
    pub fn stats(&self, rank: Rank, history: bool) -> WorkerStats {
        let Some(worker) = self.workers.get(rank as usize) else {
            return WorkerStats::default();
        };
        let mut stats = match history {
            true => worker.stats.clone(),
            false => worker.stats.counters(),
        };
        if let Some(current) = current_of(worker) {
            stats.ended(current.times, 0, self.now);
        }
        stats
    }

    /// The statistics of a worker, without its current task, and the times of that task.
    pub fn activity(&self, rank: Rank) -> Option<(&WorkerStats, Option<Times>)> {
        let worker = self.workers.get(rank as usize)?;
        Some((
            &worker.stats,
            current_of(worker).map(|current| current.times),
        ))
    }

    /// The notes since the last call.
    pub fn take_notes(&mut self) -> Vec<Note> {
        self.stop_drained();
        mem::take(&mut self.notes)
    }

    /// Submits a task. The chunks of its message follow by [`Scheduler::append`].
    pub fn submit(&mut self, mut order: Order) {
        let limit = self.limit_of(&order);
        if let Some(any_of) = order.any_of.take() {
            return self.submit_call(&order, any_of, limit);
        }
        let Some(worker) = self.workers.get_mut(order.rank as usize) else {
            return;
        };
        worker.movable = order.movable;
        if let WorkerState::Terminated(termination) = &worker.state {
            self.notes.push(Note::Done {
                rank: order.rank,
                task: order.task,
                job: order.job,
                outcome: Outcome::Lost(termination.clone()),
            });
            return;
        }
        let blobs = self.agents[worker.agent].out.blobs();
        if order.blob.is_some_and(|blob| !blobs.has(blob)) {
            // The host was lost and has been reconnected, without this worker.
            let termination =
                Termination::Host("the host was lost, and what it had been sent with it".into());
            self.notes.push(Note::Done {
                rank: order.rank,
                task: order.task,
                job: order.job,
                outcome: Outcome::Lost(Arc::new(termination)),
            });
            return;
        }
        if order.movable && worker.draining.is_some() {
            self.notes.push(Note::Done {
                rank: order.rank,
                task: order.task,
                job: order.job,
                outcome: Outcome::Revoked,
            });
            return;
        }
        let task = Task {
            id: order.task,
            job: order.job,
            again: order.again,
            chunks: VecDeque::new(),
            complete: false,
            setup_call: order.setup_call,
            on_behalf_of: order.on_behalf_of,
            prefetch: order.prefetch,
            movable: order.movable,
            blob: order.blob,
            limit,
            leaves_seed: false,
            sets_seed: false,
        };
        let Order {
            task: id,
            job,
            first,
            again,
            ..
        } = order;
        debug!(
            task = id,
            rank = order.rank + 1,
            job,
            again,
            "task submitted"
        );
        if again {
            worker.retry_decided(id);
            let before = |other: &&Task| other.again && other.id < id;
            let at = worker.queue.iter().take_while(before).count();
            worker.queue.insert(at, task);
        } else if first {
            worker.queue.push_front(task);
        } else {
            worker.queue.push_back(task);
        }
        self.dispatch(order.rank);
    }

    /// Whether a worker has terminated, permanently or until its agent or host is tried again.
    pub fn is_terminated(&self, rank: Rank) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_none_or(|worker| matches!(worker.state, WorkerState::Terminated(_)))
    }

    /// Whether an agent had workers that were lost with it and have not been stopped since.
    pub fn has_lost(&self, agent: usize) -> bool {
        let lost = |worker: &Worker| match &worker.state {
            WorkerState::Terminated(termination) => termination.is_of_host(),
            _ => false,
        };
        let mut workers = self.workers.iter();
        workers.any(|worker| worker.agent == agent && lost(worker))
    }

    /// Whether an agent is starting workers and none of them is up yet.
    pub fn is_starting(&self, agent: usize) -> bool {
        let workers = self.workers.iter().filter(|worker| worker.agent == agent);
        let mut living = workers.filter(|w| !matches!(w.state, WorkerState::Terminated(_)));
        let mut any = false;
        let starting = living.all(|worker| {
            any = true;
            matches!(worker.state, WorkerState::Starting)
        });
        any && starting
    }

    /// The index of a worker on its host.
    pub fn index(&self, rank: Rank) -> u32 {
        let worker = self.workers.get(rank as usize);
        worker.map_or(0, |worker| worker.index)
    }

    /// Whether a worker can be sent tasks.
    pub fn is_up(&self, rank: Rank) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_some_and(|worker| matches!(worker.state, WorkerState::Up))
    }

    /// Bytes that may be sent to a worker now: the rest of its send window.
    pub fn window(&self, rank: Rank) -> usize {
        let worker = self.workers.get(rank as usize);
        worker.map_or(0, |worker| worker.window)
    }

    /// Whether any worker is starting, up, or about to be restarted by its agent.
    pub fn any_left(&self) -> bool {
        self.workers.iter().any(Worker::is_left)
    }

    /// Whether a worker is starting, up, or about to be restarted by its agent.
    pub fn is_left(&self, rank: Rank) -> bool {
        self.workers.get(rank as usize).is_some_and(Worker::is_left)
    }

    /// Processes a frame from an agent.
    ///
    /// # Errors
    /// When the frame breaks the protocol: the agent must not be trusted any further.
    pub fn on_frame(&mut self, agent: usize, frame: Frame) -> Result<(), ProtocolError> {
        self.on_frame_with(agent, frame, None)
    }

    /// As [`Scheduler::on_frame`], with the shared memory that came with the frame.
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
                match header.flags & BY_REFERENCE {
                    0 => self.on_data(rank, header.task, header.flags, frame.body, None),
                    _ => self.on_shared_answer(rank, &frame, memory),
                }
            }
            Kind::Credit => {
                let rank = self.rank(agent, header.worker)?;
                let worker = &mut self.workers[rank as usize];
                let window = worker.window.saturating_add(header.len as usize);
                trace!(rank = rank + 1, bytes = header.len, "worker has read");
                // Agents also count the bytes that they themselves send to a worker.
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
            Kind::ProgressEvent => {
                let rank = self.rank(agent, header.worker)?;
                if self.is_wanted(rank, header.task) {
                    self.notes.push(Note::ProgressEvent {
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
                if header.task == 0 {
                    // The state that the worker had when the head before disconnected.
                    self.set_seed(rank, frame.body);
                } else if let Some(current) = &mut worker.current {
                    if current.task.id == header.task {
                        let other = current
                            .task
                            .on_behalf_of
                            .filter(|_| header.flags & REASSIGNED != 0);
                        current.after = Some((other.unwrap_or(rank), frame.body));
                    }
                }
                Ok(())
            }
            Kind::Blob => {
                self.notes.push(Note::SetupCall {
                    request: header.task,
                    flags: header.flags,
                    bytes: frame.body,
                });
                Ok(())
            }
            Kind::Cancel | Kind::State | Kind::Limit | Kind::TaskError => {
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

    /// Whether the worker runs this task, and its answer is wanted.
    fn is_wanted(&self, rank: Rank, task: TaskId) -> bool {
        let current = self.workers[rank as usize].current.as_ref();
        let over = |current: &Current| current.cancelled || current.timed_out;
        current.is_some_and(|current| current.task.id == task && !over(current))
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
                    worker.stats.back(self.now);
                    self.agents[agent].active = self.now;
                    self.notes.push(Note::Up { rank, pid });
                    self.dispatch(rank);
                }
            }
            ToHead::WorkerKept { worker, pid } => {
                let rank = self.rank(agent, worker)?;
                if matches!(self.workers[rank as usize].state, WorkerState::Starting) {
                    self.notes.push(Note::Kept { rank, pid });
                }
            }
            ToHead::WorkerFailed {
                worker,
                mut failure,
                replaced,
            } => {
                let rank = self.rank(agent, worker)?;
                if failure.setback.pause > 0 && self.workers[rank as usize].away {
                    // The agent knows only a part of the worker's set-up log.
                    failure.setback.pause = 0;
                    self.send_stop(rank);
                }
                if replaced {
                    self.replace(rank, failure);
                } else {
                    let termination = self.termination_of(agent, failure);
                    if termination.is_tried_again() {
                        self.send_control(agent, &ToAgent::LossAck { worker })?;
                    }
                    self.lose(rank, termination);
                    self.count_failure(agent, false);
                    let timed_out = false;
                    self.notes.push(Note::Ended { rank, timed_out });
                }
            }
            ToHead::TimedOut {
                worker,
                task,
                output,
            } => {
                let rank = self.rank(agent, worker)?;
                self.time_out(rank, task, output);
            }
            ToHead::TaskFailed {
                worker,
                task,
                text,
                output,
            } => {
                let rank = self.rank(agent, worker)?;
                if self.is_wanted(rank, task) {
                    self.notes.push(Note::TaskFailed {
                        rank,
                        task,
                        text,
                        output,
                    });
                }
            }
            ToHead::StateNotLogged { worker } => {
                let rank = self.rank(agent, worker)?;
                self.notes.push(Note::StateNotLogged { rank });
            }
            ToHead::WorkerReplaced { worker, pid } => {
                let rank = self.rank(agent, worker)?;
                let worker = &mut self.workers[rank as usize];
                let killed = match (&worker.state, &worker.current) {
                    (WorkerState::Terminated(termination), _) if termination.is_tried_again() => {
                        self.back(rank, pid);
                        return Ok(());
                    }
                    // The worker was stopped in the meantime.
                    (WorkerState::Terminated(_), _) => return Ok(()),
                    (WorkerState::Starting, None) => None,
                    (_, Some(current)) if current.timed_out => Some(Interruption::TimedOut),
                    (_, Some(current)) if current.cancelled => Some(Interruption::Cancelled),
                    _ => return Err(ProtocolError("a busy worker was replaced".into())),
                };
                self.free(rank);
                if killed.is_some() {
                    // A prefetched task, which may still be in flight, was lost with the worker
                    // before.
                    let worker = &self.workers[rank as usize];
                    let (agent, worker) = (worker.agent, worker.index);
                    self.send_control(agent, &ToAgent::LossAck { worker })?;
                    self.put_back(rank);
                }
                let worker = &mut self.workers[rank as usize];
                worker.state = WorkerState::Up;
                worker.stats.back(self.now);
                // Unread bytes of the worker before were dropped with it.
                worker.window = SEND_WINDOW;
                self.notes.push(Note::Replaced { rank, pid, killed });
                self.dispatch(rank);
            }
            // A heartbeat: receiving it is enough.
            ToHead::Alive => {}
            ToHead::Draining { seconds, cause } => self.drain_agent(agent, cause, seconds),
            ToHead::Failed { reason } => self.notes.push(Note::Failed { agent, reason }),
            ToHead::WorkerStopped { worker, timed_out } => {
                let rank = self.rank(agent, worker)?;
                self.lose(rank, Arc::new(Termination::Stopped));
                self.notes.push(Note::Ended { rank, timed_out });
            }
            ToHead::SetupCalls {
                worker,
                complete,
                calls,
                last,
            } => {
                let rank = self.rank(agent, worker)?;
                self.notes.push(Note::SetupCalls {
                    rank,
                    complete,
                    calls,
                    last,
                });
            }
            ToHead::KeptAnswers { answers, last } => self.notes.push(Note::KeptAnswers {
                agent,
                answers,
                last,
            }),
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
            ToHead::Dump { question, of, last } => {
                let ranked = |(worker, facts): (Option<u32>, _)| {
                    let rank = worker.map(|worker| self.rank(agent, worker)).transpose()?;
                    Ok((rank, facts))
                };
                let of: Result<Vec<_>, ProtocolError> = of.into_iter().map(ranked).collect();
                self.notes.push(Note::Dump {
                    agent,
                    question,
                    of: of?,
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
}

#[cfg(test)]
mod tests;
