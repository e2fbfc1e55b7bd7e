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
//! [`Order::ahead`]) and has not started is not lost with a worker that is replaced; bytes of one
//! worker never hold up another's by more than a chunk; what the head buffers of large results stays
//! under the limit and a [`GRANT`](crate::protocol::limits::GRANT) (one in shared memory fits under it
//! as a whole), but for one result that R waits for by rank and one for want of any.

use crate::head::activity::{Measure, Moment, Track};
use crate::protocol::body::Memory;
use crate::protocol::control::{self, ToAgent, ToHead};
use crate::protocol::dedup::Chunk;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{Frame, GUEST, Kind, SHARED};
use crate::protocol::ids::{RESTORE, Rank};
use crate::protocol::limits::SEND_WINDOW;
use events::{Gone, Interruption, Note, Outcome, State};
use std::collections::{HashSet, VecDeque};
use std::mem;
use std::sync::Arc;
use std::time::Duration;
use task::{Current, Order, Task};
use tracing::{debug, trace};
use worker::{Worker, WorkerState, current_of};

mod cancel;
mod dump;
pub mod events;
mod outbound;
pub mod pool;
mod recovery;
mod result_flow;
mod results;
mod send;
pub mod task;
mod worker;

use outbound::Outbound;
use pool::Calls;
use result_flow::ResultFlow;

/// A host on which so many workers (and four times as many as it has: each may be given a task that
/// ends it three times) are lost in a row, without a task that ends in between, is left out, if there
/// is another.
pub const LOSSES_IN_A_ROW: usize = 10;

/// Results in shared memory that are held at a time, but for one that R waits for: each takes a
/// descriptor.
pub const MOST_SHARED: usize = 128;

#[derive(Debug)]
struct Agent {
    ranks: Vec<Rank>,
    out: Outbound,
    /// Losses since a task last ended there.
    losses: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    agents: Vec<Agent>,
    workers: Vec<Worker>,
    notes: Vec<Note>,
    flow: ResultFlow,
    /// Bytes of tasks that left the queues since the last `take_released`.
    released: usize,
    /// The time of what happens.
    now: Moment,
    measure: Measure,
    /// How long any task may take.
    time_limit: Option<Duration>,
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
        let flow = ResultFlow::new(places.iter().map(|&(agent, _)| agent).collect(), limit);
        Scheduler {
            agents: hosts
                .into_iter()
                .map(|ranks| Agent {
                    out: Outbound::new(ranks.len()),
                    ranks,
                    losses: 0,
                })
                .collect(),
            workers: places
                .into_iter()
                .map(|(agent, index)| Worker::new(agent, index))
                .collect(),
            notes: Vec::new(),
            flow,
            released: 0,
            now: Moment::ZERO,
            measure: |_| None,
            time_limit: None,
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

    /// No task that is submitted from here on may take longer than that.
    pub fn limit_time(&mut self, limit: Option<Duration>) {
        self.time_limit = limit;
    }

    /// How long a task may take: no longer than its own limit and than any task.
    fn limit_of(&self, order: &Order) -> Option<Duration> {
        let limits = [order.limit, self.time_limit];
        limits.into_iter().flatten().min()
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

    /// What happened since the last call.
    pub fn take_notes(&mut self) -> Vec<Note> {
        mem::take(&mut self.notes)
    }

    /// A task; its message follows in chunks.
    pub fn submit(&mut self, mut order: Order) {
        let limit = self.limit_of(&order);
        if let Some(any_of) = order.any_of.take() {
            return self.submit_call(&order, any_of, limit);
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
        let payloads = self.agents[worker.agent].out.payloads();
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
            limit,
            leaves_seed: false,
        };
        let Order {
            task: id,
            job,
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
        if order.again {
            worker.decided(order.task);
            worker.queue.push_front(task);
        } else {
            worker.queue.push_back(task);
        }
        self.dispatch(order.rank);
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

    /// Whether any worker is starting or up, or is tried again by its agent.
    pub fn any_left(&self) -> bool {
        let gone = |worker: &Worker| match &worker.state {
            WorkerState::Gone(gone) => !gone.is_tried_again(),
            _ => false,
        };
        !self.workers.iter().all(gone)
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
                trace!(rank = rank + 1, bytes = header.len, "worker has read");
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
            Kind::Cancel | Kind::State | Kind::Limit | Kind::Payload => {
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
                    (WorkerState::Starting, None) => None,
                    (_, Some(current)) if current.timed_out => Some(Interruption::TimedOut),
                    (_, Some(current)) if current.cancelled => Some(Interruption::Cancelled),
                    _ => return Err(ProtocolError("a busy worker was replaced".into())),
                };
                self.free(rank);
                if killed.is_some() {
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
