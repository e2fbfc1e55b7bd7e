//! What the scheduler knows of one worker.

use super::events::Gone;
use super::task::{Current, Next, Phase, Task};
use crate::head::activity::Track;
use crate::protocol::frame::{ABORT, Frame, HEADER_LEN, Kind, LAST};
use crate::protocol::ids::{JobId, PayloadId, RESTORE, TaskId};
use crate::protocol::limits::SEND_WINDOW;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;

#[derive(Debug)]
pub(super) enum WorkerState {
    Starting,
    Up,
    Gone(Arc<Gone>),
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) agent: usize,
    pub(super) index: u32,
    pub(super) state: WorkerState,
    pub(super) queue: VecDeque<Task>,
    pub(super) current: Option<Current>,
    /// Only while there is a current one.
    pub(super) next: Option<Next>,
    /// This task was lost with the worker before. Until it is known what becomes of it, those that
    /// follow wait, but for those that were another worker's.
    pub(super) undecided: Option<(TaskId, JobId)>,
    /// The state of its random number generator, if that is known here.
    pub(super) seed: Option<Bytes>,
    /// Bytes that may be sent: see [`SEND_WINDOW`].
    pub(super) window: usize,
    pub(super) track: Track,
    /// Its host was lost and is back, and it may not be what it was yet.
    pub(super) away: bool,
}

impl Worker {
    /// A worker that is starting. `index`: among those of its agent.
    pub(super) fn new(agent: usize, index: u32) -> Worker {
        Worker {
            agent,
            index,
            state: WorkerState::Starting,
            queue: VecDeque::new(),
            current: None,
            next: None,
            undecided: None,
            seed: None,
            window: SEND_WINDOW,
            track: Track::default(),
            away: false,
        }
    }

    /// It is known what becomes of a task that was lost.
    pub(super) fn decided(&mut self, id: TaskId) {
        self.undecided = self.undecided.filter(|&(task, _)| task != id);
    }

    /// Takes out of the queue what is to be done next.
    pub(super) fn next_task(&mut self) -> Option<Task> {
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
    pub(super) fn task_ahead(&mut self) -> Option<Task> {
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
    pub(super) fn sending(&self) -> Option<&Task> {
        let sending = |phase: &Phase| matches!(phase, Phase::Sending { .. });
        let current = self.current.as_ref().filter(|c| sending(&c.phase));
        let next = self.next.as_ref().filter(|n| sending(&n.phase));
        current.map(|c| &c.task).or(next.map(|n| &n.task))
    }

    pub(super) fn can_send(&self) -> bool {
        self.sending()
            .is_some_and(|task| match task.chunks.front() {
                _ if task.payload.is_some() => self.window >= HEADER_LEN + size_of::<PayloadId>(),
                Some(chunk) => self.window >= HEADER_LEN + chunk.bytes.len(),
                None => task.complete && self.window >= HEADER_LEN,
            })
    }

    /// Takes back what was being sent, of which the agent has a part unless nothing was sent yet.
    /// Returns what the agent is to be told.
    pub(super) fn abort(&mut self, id: TaskId, first: bool) -> Option<Frame> {
        if first {
            return None;
        }
        self.window = self.window.saturating_sub(HEADER_LEN);
        let flags = LAST | ABORT;
        Some(Frame::new(Kind::Data, flags, self.index, id, Bytes::new()))
    }
}

/// The task that a worker is at, if that is one of R's.
pub(super) fn current_of(worker: &Worker) -> Option<&Current> {
    let current = worker.current.as_ref();
    current.filter(|current| current.task.id & RESTORE == 0)
}
