//! What happens when a worker or a host is lost, and when it is back.

use super::events::{Gone, Note, Outcome};
use super::task::{Phase, Restoring, Task};
use super::worker::{Worker, WorkerState};
use super::{LOSSES_IN_A_ROW, Scheduler};
use crate::protocol::control::{self, Loss, ToAgent};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{Frame, Kind};
use crate::protocol::ids::{CALLS, RESTORE, Rank};
use crate::protocol::limits::SEND_WINDOW;
use bytes::Bytes;
use std::mem;
use std::sync::Arc;

impl Scheduler {
    /// Something went wrong with a task of this worker.
    pub fn failed(&mut self, rank: Rank, why: &str) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.track.failed(why);
        }
    }

    /// An agent that was lost is back, a fresh one that is to make its workers anew. Those that were
    /// gone before are stopped again; the others come up as at first.
    ///
    /// # Errors
    /// When `start` does not fit into one message.
    pub fn agent_back(&mut self, at: usize, start: &ToAgent) -> Result<(), ProtocolError> {
        let agent = &mut self.agents[at];
        agent.losses = 0;
        agent.out.reopen();
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

    /// An agent is gone: everything on it is lost.
    pub fn agent_lost(&mut self, agent: usize, reason: &str) {
        let out = &mut self.agents[agent].out;
        let before = out.is_closed();
        // Also what an agent that was left out was still to be told.
        self.released += out.close();
        if before {
            return;
        }
        let gone = Arc::new(Gone::Host(reason.to_owned()));
        for rank in self.agents[agent].ranks.clone() {
            self.lose(rank, gone.clone());
        }
    }

    pub(super) fn lose(&mut self, rank: Rank, gone: Arc<Gone>) {
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
    pub(super) fn replace(&mut self, rank: Rank, loss: Loss) {
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
    pub(super) fn count_loss(&mut self, at: usize, busy: bool) {
        let living = |worker: &Worker| !matches!(worker.state, WorkerState::Gone(_));
        let mut workers = self.workers.iter();
        let others = workers.any(|worker| worker.agent != at && living(worker));
        let agent = &mut self.agents[at];
        agent.losses += 1;
        // On the last host, tasks that cost their workers come to an end by themselves: each is tried
        // a few times only.
        let bounded = busy && !others;
        if agent.out.is_closed()
            || bounded
            || agent.losses < LOSSES_IN_A_ROW.max(4 * agent.ranks.len())
        {
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
        let before = self.agents[at].out.is_closed();
        self.agent_lost(at, &reason);
        if !before {
            // Last of all, the end.
            let stop = control::encode(&ToAgent::Stop).ok();
            self.agents[at].out.push_last(stop);
        }
        self.notes.push(Note::LeftOut { agent: at, reason });
    }

    /// A worker that was gone is there again, and its agent has restored it.
    pub(super) fn back(&mut self, rank: Rank, pid: u32) {
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

    /// What another worker did for this one has left its random numbers so: if it is back in the
    /// meantime, it goes on from there.
    pub(super) fn put_seed(&mut self, rank: Rank, seed: Bytes) {
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
}
