//! Failures of workers and hosts, and how both come back.

use super::events::{Note, Outcome, Termination};
use super::task::{Current, Phase, RestoreMessage, Task};
use super::worker::{Worker, WorkerState};
use super::{MAX_FAILURES_IN_A_ROW, Scheduler};
use crate::protocol::control::{self, ToAgent, WorkerFailure};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{Frame, Kind};
use crate::protocol::ids::{CALLS, RESTORE, Rank};
use crate::protocol::limits::SEND_WINDOW;
use bytes::Bytes;
use std::mem;
use std::sync::Arc;

impl Scheduler {
    /// Whether a lost task awaits a retry decision, for which the tasks behind it wait.
    pub fn awaits_decision(&self) -> bool {
        let mut workers = self.workers.iter();
        workers.any(|worker| worker.awaiting_retry.is_some())
    }

    /// The random number state of a worker, if it is known here.
    pub fn seed(&self, rank: Rank) -> Option<Bytes> {
        self.workers.get(rank as usize)?.seed.clone()
    }

    /// Sets the random number state of a worker.
    pub fn set_seed(&mut self, rank: Rank, seed: Bytes) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.seed = Some(seed);
            self.changed_seeds.push(rank);
        }
    }

    /// The workers whose random number states have been set since the last call.
    pub fn take_changed_seeds(&mut self) -> Vec<Rank> {
        std::mem::take(&mut self.changed_seeds)
    }

    /// Records an error of a task of this worker.
    pub fn failed(&mut self, rank: Rank, why: &str) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.stats.failed(why);
        }
    }

    /// The agent has not joined yet. Its workers are lost until [`Scheduler::agent_back`].
    pub fn await_agent(&mut self, agent: usize) {
        self.agents[agent].awaited = true;
        self.agents[agent].out.close();
        let termination = Termination::Host("it has not joined the cluster yet".to_owned());
        let termination = Arc::new(termination);
        for rank in self.agents[agent].ranks.clone() {
            self.workers[rank as usize].state = WorkerState::Terminated(termination.clone());
            let termination = termination.clone();
            self.notes.push(Note::Terminated { rank, termination });
        }
    }

    /// The agent has been lost, and may come again.
    pub fn await_again(&mut self, agent: usize) {
        self.agents[agent].awaited = true;
    }

    /// The agent will not join: its workers stay lost, for this reason.
    pub fn give_up_awaited(&mut self, agent: usize, reason: &str) {
        self.agents[agent].awaited = false;
        let termination = Arc::new(Termination::Host(reason.to_owned()));
        for rank in self.agents[agent].ranks.clone() {
            let worker = &mut self.workers[rank as usize];
            if matches!(&worker.state, WorkerState::Terminated(t) if t.is_of_host()) {
                worker.state = WorkerState::Terminated(termination.clone());
                let termination = termination.clone();
                self.notes.push(Note::Terminated { rank, termination });
            }
        }
        self.end_calls_of_nobody();
    }

    /// A lost agent has been reconnected: a fresh process that starts its workers anew. Workers
    /// that had terminated before are stopped again; the others come up as at first.
    ///
    /// # Errors
    /// When `start` does not fit into one message.
    pub fn agent_back(&mut self, at: usize, start: &ToAgent) -> Result<(), ProtocolError> {
        let agent = &mut self.agents[at];
        agent.failures = 0;
        agent.awaited = false;
        agent.drain = None;
        agent.out.reopen();
        self.send_control(at, start)?;
        self.send_control(at, &ToAgent::Restores)?;
        for rank in self.agents[at].ranks.clone() {
            let worker = &mut self.workers[rank as usize];
            match &worker.state {
                WorkerState::Terminated(termination) if !termination.is_of_host() => {
                    let stop = ToAgent::StopWorker {
                        worker: worker.index,
                    };
                    self.send_control(at, &stop)?;
                }
                _ => {
                    worker.state = WorkerState::Starting;
                    worker.away = true;
                    worker.seed_waits = false;
                    worker.draining = None;
                    worker.window = SEND_WINDOW;
                }
            }
        }
        Ok(())
    }

    /// Restores a worker of a reconnected host with its set-up calls, one after the other.
    pub fn restore(&mut self, rank: Rank, messages: Vec<RestoreMessage>) {
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

    /// Sends a worker set-up calls that were logged after it had terminated. They follow those of
    /// [`Scheduler::restore`], and the random numbers that they set are those of the worker.
    pub fn restore_more(&mut self, rank: Rank, messages: Vec<RestoreMessage>) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        for message in messages {
            let task = Task::restoring(message, false);
            worker.queue.push_back(Task {
                sets_seed: true,
                ..task
            });
        }
        self.dispatch(rank);
    }

    /// Sends a set-up call of [`Scheduler::restore`] again, because its worker failed and was
    /// replaced. `last`: no other follows.
    /// `sets_seed`: it is one of [`Scheduler::restore_more`].
    pub fn restore_again(
        &mut self,
        rank: Rank,
        message: RestoreMessage,
        last: bool,
        sets_seed: bool,
    ) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        worker.retry_decided(message.0);
        let task = Task::restoring(message, last);
        worker.queue.push_front(Task { sets_seed, ..task });
        self.dispatch(rank);
    }

    /// An agent or its connection has failed: all of its workers are lost.
    pub fn agent_lost(&mut self, agent: usize, reason: &str) {
        self.lose_agent(agent, reason, Termination::Host);
    }

    /// The agent of a batch job, or the connection to it, has failed: its workers have ended with the job.
    pub fn job_lost(&mut self, agent: usize, reason: &str) {
        self.lose_agent(agent, reason, Termination::JobEnded);
    }

    fn lose_agent(&mut self, agent: usize, reason: &str, of: impl FnOnce(String) -> Termination) {
        let out = &mut self.agents[agent].out;
        let before = out.is_closed();
        // This includes what a host that was left out was still to be sent.
        self.released += out.close();
        if before {
            return;
        }
        let drain = self.agents[agent].drain.as_ref();
        let ended = drain.map(|drain| drain.termination.clone());
        let termination = ended.unwrap_or_else(|| Arc::new(of(reason.to_owned())));
        for rank in self.agents[agent].ranks.clone() {
            self.lose(rank, termination.clone());
            self.end_removed(rank);
        }
    }

    pub(super) fn lose(&mut self, rank: Rank, termination: Arc<Termination>) {
        let worker = &mut self.workers[rank as usize];
        if let WorkerState::Terminated(before) = &worker.state {
            // The agent does not restart the worker any more. If its host is reconnected, the
            // worker comes back with it.
            if before.is_tried_again() && !matches!(*termination, Termination::Worker(_)) {
                worker.state = WorkerState::Terminated(termination.clone());
                self.notes.push(Note::Terminated { rank, termination });
            }
            return;
        }
        worker.state = WorkerState::Terminated(termination.clone());
        let drain = self.agents[worker.agent].drain.as_ref();
        match &*termination {
            // The host was given back, which is no failure.
            Termination::JobEnded(_) if drain.is_some_and(|drain| drain.given_back) => {}
            Termination::Worker(failure) => {
                worker.stats.lost(&format!("lost: {failure}"), self.now);
            }
            Termination::Host(reason) => worker
                .stats
                .lost(&format!("lost with its host: {reason}"), self.now),
            Termination::JobEnded(reason) => worker
                .stats
                .lost(&format!("its job ended: {reason}"), self.now),
            Termination::Stopped => {}
        }
        self.notes.push(Note::Terminated {
            rank,
            termination: termination.clone(),
        });
        worker.awaiting_retry = None;
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
                outcome: Outcome::Lost(termination.clone()),
            });
        }
        self.end_calls_of_nobody();
        self.grant();
    }

    /// A worker failed and is being replaced: tasks that wait for it go on waiting.
    pub(super) fn replace(&mut self, rank: Rank, failure: WorkerFailure) {
        let worker = &mut self.workers[rank as usize];
        if matches!(worker.state, WorkerState::Terminated(_)) {
            return;
        }
        let (agent, index) = (worker.agent, worker.index);
        worker.state = WorkerState::Starting;
        worker.stats.lost(&format!("lost: {failure}"), self.now);
        if let Ok(frame) = control::encode(&ToAgent::LossAck { worker: index }) {
            self.push_control(agent, frame);
        }
        let task = self.free(rank);
        let busy = task.is_some();
        self.notes.push(Note::Lost {
            rank,
            failure: failure.clone(),
            task: busy,
        });
        if let Some(task) = task {
            if task.on_behalf_of.is_none() && task.job != CALLS {
                self.workers[rank as usize].awaiting_retry = Some((task.id, task.job));
            }
            self.notes.push(Note::Done {
                rank,
                task: task.id,
                job: task.job,
                outcome: Outcome::Lost(self.termination_of(agent, failure)),
            });
        }
        self.put_back(rank);
        self.grant();
        self.count_failure(agent, busy);
    }

    /// `busy`: the worker had a task.
    pub(super) fn count_failure(&mut self, at: usize, busy: bool) {
        let living = |worker: &Worker| !matches!(worker.state, WorkerState::Terminated(_));
        let mut workers = self.workers.iter();
        let others = workers.any(|worker| worker.agent != at && living(worker));
        let agent = &mut self.agents[at];
        agent.failures += 1;
        // On the last host, tasks that end their workers come to an end by themselves, because each
        // is retried only a few times.
        let bounded = busy && !others;
        if agent.out.is_closed()
            || bounded
            || agent.failures < MAX_FAILURES_IN_A_ROW.max(4 * agent.ranks.len())
        {
            return;
        }
        let reason = format!(
            "{} of its workers were lost in a row, and no task ended in between: it is left out",
            agent.failures
        );
        self.leave_out(at, reason);
    }

    /// Stops an agent and leaves its host out permanently. If that was done before, the stop message remains.
    pub fn leave_out(&mut self, at: usize, reason: String) {
        if !self.agents[at].out.is_closed() {
            self.agent_lost(at, &reason);
            // The stop message is the last one.
            let stop = control::encode(&ToAgent::Stop).ok();
            self.agents[at].out.push_last(stop);
        }
        self.notes.push(Note::LeftOut { agent: at, reason });
    }

    /// A terminated worker has come back, restored by its agent.
    pub(super) fn back(&mut self, rank: Rank, pid: u32) {
        let worker = &mut self.workers[rank as usize];
        worker.state = WorkerState::Up;
        worker.stats.back(self.now);
        worker.window = SEND_WINDOW;
        let (agent, index) = (worker.agent, worker.index);
        // Reassigned tasks may have advanced its random numbers. Unknown states are empty.
        let seed = worker.seed.clone().filter(|seed| !seed.is_empty());
        if let Some(seed) = seed {
            self.push_control(agent, Frame::new(Kind::Seed, 0, index, 0, seed));
        }
        self.notes.push(Note::Back { rank, pid });
        self.dispatch(rank);
    }

    /// Records the random number state that a reassigned task left. If the worker on whose behalf
    /// it ran is back, the worker continues from that state.
    pub(super) fn put_seed(&mut self, rank: Rank, seed: Bytes) {
        let worker = &mut self.workers[rank as usize];
        let is_late_call = |current: &Current| current.task.sets_seed;
        if worker.current.as_ref().is_some_and(is_late_call) {
            // The call was made after the reassigned task.
            worker.seed_waits = true;
            return;
        }
        // A worker that is being restored gets the state at the end.
        let at_rest = worker.current.as_ref().is_none_or(|current| {
            current.task.id & RESTORE != 0 && matches!(current.phase, Phase::Running)
        });
        if matches!(worker.state, WorkerState::Up) && at_rest {
            let (agent, index) = (worker.agent, worker.index);
            self.push_control(agent, Frame::new(Kind::Seed, 0, index, 0, seed));
        }
    }
}
