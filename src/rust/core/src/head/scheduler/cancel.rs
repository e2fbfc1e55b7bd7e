//! How tasks and workers are stopped: cancelling, revoking and time limits of tasks, the end of
//! workers.

use super::Scheduler;
use super::events::{Note, Outcome, Termination};
use super::task::{Current, Phase, Task};
use super::worker::WorkerState;
use crate::head::activity::TOO_LONG;
use crate::protocol::control::{self, ToAgent};
use crate::protocol::ids::{JobId, RESTORE, Rank, TaskId};
use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use tracing::debug;

impl Scheduler {
    /// Abandons a task that failed with its worker: it will not be submitted again. Does nothing if
    /// no retry decision on the task is awaited.
    pub fn abandon_task(&mut self, rank: Rank, id: TaskId) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.retry_decided(id);
            self.dispatch(rank);
        }
    }

    /// Cancels a task whose message R could not finish writing.
    pub fn cancel_task(&mut self, rank: Rank, id: TaskId) {
        self.cancel_matching(rank, |task, _| task == id);
    }

    /// Cancels all tasks of `job` that have not ended. Calls that restore a worker belong to no job of R.
    pub fn cancel_job(&mut self, job: JobId) {
        for rank in 0..self.workers.len() as Rank {
            self.cancel_matching(rank, |task, other| other == job && task & RESTORE == 0);
        }
    }

    pub(super) fn cancel_matching(&mut self, rank: Rank, matches: impl Fn(TaskId, JobId) -> bool) {
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
        // The task has ended as lost already.
        let awaiting_retry = worker.awaiting_retry;
        worker.awaiting_retry = awaiting_retry.filter(|&(task, job)| !matches(task, job));
        // The prefetched task is cancelled first: it would start as soon as the agent cancels the
        // running one.
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
                    next.all_chunks.clear();
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
                    self.flow.end(rank);
                    worker.stats.ended(times, 0, self.now);
                }
                Phase::Running => {
                    running = true;
                    let task = current.task.id;
                    let cancel = ToAgent::Cancel {
                        worker: index,
                        task,
                    };
                    // A message of two integers fits into a frame.
                    debug!(task, rank = rank + 1, "running task cancelled");
                    frames.extend(control::encode(&cancel).ok());
                }
            }
        }
        cancelled.extend(waiting);
        if running {
            self.drop_answer(rank);
        }
        let worker = &mut self.workers[rank as usize];
        let mut remaining = VecDeque::with_capacity(worker.queue.len());
        for task in mem::take(&mut worker.queue) {
            if matches(task.id, task.job) {
                cancelled.push((task.id, task.job));
                self.released += task.queued_bytes();
            } else {
                remaining.push_back(task);
            }
        }
        worker.queue = remaining;
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

    /// Revokes a task that has not started, so that another worker can have it. The task ends as
    /// [`Outcome::Revoked`], at once or when its agent has confirmed. A task that has started, or
    /// that the worker runs next, is left alone.
    pub fn revoke(&mut self, rank: Rank, id: TaskId) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        if id & RESTORE != 0 {
            return;
        }
        if let Some(at) = worker.queue.iter().position(|task| task.id == id) {
            if let Some(task) = worker.queue.remove(at) {
                self.released += task.queued_bytes();
                self.revoked(rank, &task);
                self.dispatch(rank);
            }
            return;
        }
        let next = worker.next.as_mut();
        let Some(next) = next.filter(|n| n.task.id == id && !n.cancelled && !n.revoked) else {
            return;
        };
        let agent = worker.agent;
        debug!(task = id, rank = rank + 1, "prefetched task revoked");
        match next.phase {
            Phase::Sending { first } => {
                let frame = worker.abort(id, first);
                if let Some(next) = worker.next.take() {
                    self.released += next.queued_bytes();
                    self.revoked(rank, &next.task);
                }
                if let Some(frame) = frame {
                    self.push_control(agent, frame);
                }
                self.dispatch(rank);
            }
            Phase::Running => {
                let worker = worker.index;
                let revoke = ToAgent::Revoke { worker, task: id };
                if let Ok(frame) = control::encode(&revoke) {
                    next.revoked = true;
                    self.push_control(agent, frame);
                }
            }
        }
    }

    pub(super) fn revoked(&mut self, rank: Rank, task: &Task) {
        self.notes.push(Note::Done {
            rank,
            task: task.id,
            job: task.job,
            outcome: Outcome::Revoked,
        });
    }

    /// Puts the prefetched task of a terminated worker back into the queue, for its replacement: it
    /// had not started.
    pub(super) fn put_back(&mut self, rank: Rank) {
        let worker = &mut self.workers[rank as usize];
        match worker.next.take() {
            Some(next) if next.revoked && !next.cancelled => {
                self.released += next.queued_bytes();
                self.revoked(rank, &next.task);
            }
            Some(next) if !next.cancelled => worker.queue.push_front(next.unsent()),
            // The agent has been notified.
            _ => {}
        }
    }

    /// Stops a worker, whatever it does. If the worker's host is lost, the worker does not come
    /// back with it.
    pub fn stop_worker(&mut self, rank: Rank) {
        self.end_worker(rank, Arc::new(Termination::Stopped));
    }

    /// Stops a worker and records this reason.
    pub fn end_worker(&mut self, rank: Rank, termination: Arc<Termination>) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        if let WorkerState::Terminated(before) = &worker.state {
            // Nobody waits for the worker any more.
            worker.stats.back(self.now);
            let tried_again = before.is_tried_again();
            if tried_again || before.is_of_host() {
                worker.state = WorkerState::Terminated(termination.clone());
                self.notes.push(Note::Terminated { rank, termination });
            }
            if tried_again {
                self.send_stop(rank);
            }
            return;
        }
        self.send_stop(rank);
        self.lose(rank, termination);
    }

    pub(super) fn send_stop(&mut self, rank: Rank) {
        let worker = &self.workers[rank as usize];
        let (agent, worker) = (worker.agent, worker.index);
        if let Ok(frame) = control::encode(&ToAgent::StopWorker { worker }) {
            self.push_control(agent, frame);
        }
    }

    /// A task exceeded its time limit. The worker is busy until its agent reports that it is free.
    pub(super) fn time_out(&mut self, rank: Rank, id: TaskId, output: String) {
        let worker = &mut self.workers[rank as usize];
        let Some(current) = worker.current.as_mut() else {
            return;
        };
        let running = matches!(current.phase, Phase::Running);
        if current.task.id != id || current.cancelled || !running {
            return;
        }
        let job = current.task.job;
        current.timed_out = true;
        worker.stats.failed(TOO_LONG);
        self.drop_answer(rank);
        self.notes.push(Note::TimedOut { rank, output });
        self.notes.push(Note::Done {
            rank,
            task: id,
            job,
            outcome: Outcome::TimedOut,
        });
        self.grant();
    }

    /// The agent has dropped the prefetched task, as the head requested.
    pub(super) fn not_started(&mut self, rank: Rank) {
        if let Some(next) = self.workers[rank as usize].next.take() {
            self.released += next.queued_bytes();
            if !next.cancelled {
                self.revoked(rank, &next.task);
            }
        }
        self.dispatch(rank);
    }
}
