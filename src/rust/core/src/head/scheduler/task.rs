//! A task on its way: as it was submitted, the one that a worker has, and the one sent ahead.

use crate::head::activity::{Moment, Times};
use crate::protocol::dedup::Chunk;
use crate::protocol::ids::{CALLS, JobId, PayloadId, RESTORE, Rank, TaskId};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

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
    /// How long it may take from when its worker has all of its message. The worker's agent ends it then.
    pub limit: Option<Duration>,
    /// It is a call for whichever of these, which are in order, is free first, and `rank` means nothing.
    /// Its message follows by [`Scheduler::append_call`](super::Scheduler::append_call).
    pub any_of: Option<Arc<[Rank]>>,
}

/// A message by which a worker is restored: its task's number, its name and its chunks.
pub type Restoring = (TaskId, u64, Vec<Chunk>);

#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: TaskId,
    pub(super) job: JobId,
    pub(super) chunks: VecDeque<Chunk>,
    /// The last chunk has been submitted.
    pub(super) complete: bool,
    pub(super) lasts: Option<u64>,
    pub(super) instead_of: Option<Rank>,
    pub(super) ahead: bool,
    /// Until it has been named to the agent, what the message begins with.
    pub(super) payload: Option<PayloadId>,
    /// How long it may take.
    pub(super) limit: Option<Duration>,
    /// The worker is to have its known random numbers after it.
    pub(super) leaves_seed: bool,
}

impl Task {
    /// One of those that bring a worker which is back to the state it had. `last`: it is the last.
    pub(super) fn restoring((id, name, chunks): Restoring, last: bool) -> Task {
        Task {
            id,
            job: 0,
            chunks: chunks.into(),
            complete: true,
            lasts: Some(name),
            instead_of: None,
            ahead: false,
            payload: None,
            limit: None,
            leaves_seed: last,
        }
    }

    /// Whether R's thread counts it among what waits to be sent. It does not wait for calls to be sent.
    pub(super) fn is_counted(&self) -> bool {
        self.id & RESTORE == 0 && self.job != CALLS
    }

    /// What R's thread counts as waiting to be sent.
    pub(super) fn queued_bytes(&self) -> usize {
        if !self.is_counted() {
            return 0;
        }
        self.chunks.iter().map(|chunk| chunk.bytes.len()).sum()
    }
}

#[derive(Debug)]
pub(super) enum Phase {
    /// The message is on its way to the worker. `first`: nothing of it has been sent yet.
    Sending { first: bool },
    /// The worker has the whole message.
    Running,
}

/// The task that occupies a worker.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) task: Task,
    pub(super) phase: Phase,
    /// The answer is not wanted any more; the worker is busy until its agent says so.
    pub(super) cancelled: bool,
    /// The state that the random number generator is to have for it, if that is another worker's.
    pub(super) before: Option<Bytes>,
    /// Why it was cancelled, if it was: it exceeded its time limit.
    pub(super) timed_out: bool,
    /// The state in which it leaves the generator of this worker.
    pub(super) after: Option<(Rank, Bytes)>,
    pub(super) times: Times,
    /// All of the answer has come.
    pub(super) answered: bool,
}

impl Current {
    pub(super) fn new(task: Task, before: Option<Bytes>, begun: Moment) -> Current {
        Current {
            task,
            phase: Phase::Sending { first: true },
            cancelled: false,
            timed_out: false,
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
pub(super) struct Next {
    /// Its chunks are those that have not been sent.
    pub(super) task: Task,
    pub(super) phase: Phase,
    /// All chunks, also those that have been sent: until it has started, it may have to be sent to
    /// another worker in that place.
    pub(super) kept: VecDeque<Chunk>,
    /// What the message begins with.
    pub(super) payload: Option<PayloadId>,
    /// It is not wanted any more. The agent says whether it had started.
    pub(super) cancelled: bool,
    /// It is to be had back. If it had started, the agent says nothing.
    pub(super) recalled: bool,
}

impl Next {
    pub(super) fn new(task: Task) -> Next {
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
    pub(super) fn queued_bytes(&self) -> usize {
        self.kept.iter().map(|chunk| chunk.bytes.len()).sum()
    }

    /// As it was before any of it was sent.
    pub(super) fn unsent(mut self) -> Task {
        self.task.chunks = self.kept;
        self.task.payload = self.payload;
        self.task
    }
}
