//! The state of one worker in the scheduler.

use super::events::{RankSet, Termination};
use super::task::{Current, Phase, PrefetchedTask, Task};
use crate::head::activity::WorkerStats;
use crate::protocol::frame::{ABORT, Frame, HEADER_LEN, Kind, LAST};
use crate::protocol::ids::{BlobId, CALLS, JobId, RESTORE, Rank, TaskId};
use crate::protocol::limits::SEND_WINDOW;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;

#[derive(Debug)]
pub(super) enum WorkerState {
    Starting,
    Up,
    Terminated(Arc<Termination>),
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) agent: usize,
    pub(super) index: u32,
    pub(super) state: WorkerState,
    pub(super) queue: VecDeque<Task>,
    pub(super) current: Option<Current>,
    /// The prefetched task. There is one only while there is a current task.
    pub(super) next: Option<PrefetchedTask>,
    /// A task that failed with the predecessor of this worker and awaits a retry decision. Until
    /// then the tasks that follow it wait, except those on behalf of another worker.
    pub(super) awaiting_retry: Option<(TaskId, JobId)>,
    /// The worker's random number state, if it is known here.
    pub(super) seed: Option<Bytes>,
    /// A reassigned task has left that state while a late set-up call ran. The worker is sent the state after the call,
    /// unless the call leaves another.
    pub(super) seed_waits: bool,
    /// Bytes that may be sent to the worker: see [`SEND_WINDOW`].
    pub(super) window: usize,
    pub(super) stats: WorkerStats,
    /// The worker's host was lost and reconnected, and the worker has not been restored yet.
    pub(super) away: bool,
    /// The worker is draining: why it terminates when it has no more tasks.
    pub(super) draining: Option<Arc<Termination>>,
    /// Any worker of the job could have run the last task: see [`Order::movable`](super::task::Order::movable).
    pub(super) movable: bool,
}

impl Worker {
    /// Whether the worker is starting, up, or about to be restarted by its agent.
    pub(super) fn is_left(&self) -> bool {
        match &self.state {
            WorkerState::Terminated(termination) => termination.is_tried_again(),
            _ => true,
        }
    }

    /// A worker that is starting. `index`: its index on its host.
    pub(super) fn new(agent: usize, index: u32) -> Worker {
        Worker {
            agent,
            index,
            state: WorkerState::Starting,
            queue: VecDeque::new(),
            current: None,
            next: None,
            awaiting_retry: None,
            seed: None,
            seed_waits: false,
            window: SEND_WINDOW,
            stats: WorkerStats::default(),
            away: false,
            draining: None,
            movable: false,
        }
    }

    /// Whether the worker with this `rank` has a task of one of these owners: its own task, or one that it runs on
    /// behalf of another worker. All tasks before that one have to end first.
    pub(super) fn has_task_of(&self, rank: Rank, owners: &RankSet) -> bool {
        let current = self.current.as_ref().map(|current| &current.task);
        let next = self.next.as_ref().map(|next| &next.task);
        let mut tasks = current.into_iter().chain(next).chain(&self.queue);
        tasks.any(|task| {
            let owner = task.on_behalf_of.unwrap_or(rank);
            task.job != CALLS && owners.contains(owner)
        })
    }

    /// A failed task is retried or abandoned: tasks need no longer wait for it.
    pub(super) fn retry_decided(&mut self, id: TaskId) {
        self.awaiting_retry = self.awaiting_retry.filter(|&(task, _)| task != id);
    }

    /// Takes the next task out of the queue.
    pub(super) fn next_task(&mut self) -> Option<Task> {
        if self.awaiting_retry.is_none() {
            return self.queue.pop_front();
        }
        let is_reassigned = |task: &Task| task.on_behalf_of.is_some();
        let at = self.queue.iter().position(is_reassigned)?;
        self.queue.remove(at)
    }

    /// Takes out of the queue the task that may be prefetched. The current task must have been sent
    /// completely, so that it waits for nothing. Nothing is prefetched behind a task that restores
    /// the worker, because the head may still have random numbers for the worker.
    pub(super) fn prefetched_task(&mut self) -> Option<Task> {
        let current = self.current.as_ref()?;
        let runs = matches!(current.phase, Phase::Running) && !current.cancelled;
        if !runs || current.task.id & RESTORE != 0 || self.awaiting_retry.is_some() {
            return None;
        }
        let may =
            |task: &Task| task.prefetch && task.setup_call.is_none() && task.on_behalf_of.is_none();
        if !self.queue.front().is_some_and(may) {
            return None;
        }
        self.queue.pop_front()
    }

    /// The task whose message is being sent.
    pub(super) fn sending(&self) -> Option<&Task> {
        let sending = |phase: &Phase| matches!(phase, Phase::Sending { .. });
        let current = self.current.as_ref().filter(|c| sending(&c.phase));
        let next = self.next.as_ref().filter(|n| sending(&n.phase));
        current.map(|c| &c.task).or(next.map(|n| &n.task))
    }

    pub(super) fn can_send(&self) -> bool {
        self.sending()
            .is_some_and(|task| match task.chunks.front() {
                _ if task.blob.is_some() => self.window >= HEADER_LEN + size_of::<BlobId>(),
                Some(chunk) => self.window >= HEADER_LEN + chunk.bytes.len(),
                None => task.complete && self.window >= HEADER_LEN,
            })
    }

    /// Aborts the message that was being sent. Returns the frame that makes the agent discard its
    /// part of the message, or `None` if nothing was sent yet (`first`).
    pub(super) fn abort(&mut self, id: TaskId, first: bool) -> Option<Frame> {
        if first {
            return None;
        }
        self.window = self.window.saturating_sub(HEADER_LEN);
        let flags = LAST | ABORT;
        Some(Frame::new(Kind::Data, flags, self.index, id, Bytes::new()))
    }
}

/// The current task of a worker, if it is one of R's.
pub(super) fn current_of(worker: &Worker) -> Option<&Current> {
    let current = worker.current.as_ref();
    current.filter(|current| current.task.id & RESTORE == 0)
}
