//! The forms of a task: as submitted, as the current task of a worker, and as its prefetched task.

use crate::head::activity::{Moment, Times};
use crate::protocol::dedup::Chunk;
use crate::protocol::ids::{BlobId, CALLS, JobId, RESTORE, Rank, TaskId};
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
    /// The task goes before all others of its worker.
    pub first: bool,
    /// The task was lost with its worker and is submitted again: it goes before the tasks that followed it. Several
    /// tasks are lost with a host.
    pub again: bool,
    /// The task is a set-up call. The number names what it sets on the worker; 0: nothing in
    /// particular.
    pub setup_call: Option<u64>,
    /// The worker that the task was first submitted to, if another worker runs it on its behalf.
    /// The task continues that worker's random numbers, or begins new ones if their state is not
    /// known here, and leaves the random numbers of the worker that runs it unchanged. The task
    /// does not wait for the retry decision on a failed task of the worker that runs it: R may
    /// decide on that one only after it has the answer to this one.
    pub on_behalf_of: Option<Rank>,
    /// The task may be prefetched: sent to the agent while the worker still runs the one before.
    /// Reassigned tasks and set-up calls are never prefetched.
    pub prefetch: bool,
    /// Any worker of the job may run the task. If the worker is draining, the task ends as
    /// [`Outcome::Revoked`](super::events::Outcome::Revoked) unless it has started.
    pub movable: bool,
    /// The message of the task begins with this blob, which the worker's agent has.
    pub blob: Option<BlobId>,
    /// The time limit of the task, from when its worker has the whole message. The worker's agent
    /// enforces it.
    pub limit: Option<Duration>,
    /// The task is a call for the first free worker among these ranks, which are in order; `rank`
    /// means nothing then. The message follows by
    /// [`Scheduler::append_call`](super::Scheduler::append_call).
    pub any_of: Option<Arc<[Rank]>>,
}

/// A set-up call that restores a worker: the task's number, its name and its chunks.
pub type RestoreMessage = (TaskId, u64, Vec<Chunk>);

#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: TaskId,
    pub(super) job: JobId,
    /// See [`Order::again`].
    pub(super) again: bool,
    pub(super) chunks: VecDeque<Chunk>,
    /// The last chunk has been submitted.
    pub(super) complete: bool,
    pub(super) setup_call: Option<u64>,
    pub(super) on_behalf_of: Option<Rank>,
    pub(super) prefetch: bool,
    /// See [`Order::movable`].
    pub(super) movable: bool,
    /// The blob that the message begins with, until the reference to it has been sent.
    pub(super) blob: Option<BlobId>,
    /// The time limit of the task.
    pub(super) limit: Option<Duration>,
    /// After this task, the worker is sent its known random number state.
    pub(super) leaves_seed: bool,
    /// The task restores the worker, and the random number state that it leaves is that of the worker.
    pub(super) sets_seed: bool,
}

impl Task {
    /// A set-up call that restores a worker. `last`: no other follows.
    pub(super) fn restoring((id, name, chunks): RestoreMessage, last: bool) -> Task {
        Task {
            id,
            job: 0,
            again: false,
            chunks: chunks.into(),
            complete: true,
            setup_call: Some(name),
            on_behalf_of: None,
            prefetch: false,
            movable: false,
            blob: None,
            limit: None,
            leaves_seed: last,
            sets_seed: false,
        }
    }

    /// Whether R's thread counts the task among those that wait to be sent. It does not wait for
    /// calls.
    pub(super) fn is_counted(&self) -> bool {
        self.id & RESTORE == 0 && self.job != CALLS
    }

    /// The bytes that R's thread counts as waiting to be sent.
    pub(super) fn queued_bytes(&self) -> usize {
        if !self.is_counted() {
            return 0;
        }
        self.chunks.iter().map(|chunk| chunk.bytes.len()).sum()
    }
}

#[derive(Debug)]
pub(super) enum Phase {
    /// The message is being sent to the worker. `first`: nothing of it has been sent yet.
    Sending { first: bool },
    /// The worker has the whole message.
    Running,
}

/// The task that occupies a worker.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) task: Task,
    pub(super) phase: Phase,
    /// The task was cancelled; the worker is busy until its agent reports the end.
    pub(super) cancelled: bool,
    /// The random number state in which the task starts, if it is another worker's.
    pub(super) before: Option<Bytes>,
    /// Why it was cancelled, if it was: it exceeded its time limit.
    pub(super) timed_out: bool,
    /// The random number state that the task leaves, and the worker that it belongs to.
    pub(super) after: Option<(Rank, Bytes)>,
    pub(super) times: Times,
    /// The whole answer has arrived.
    pub(super) answered: bool,
}

impl Current {
    pub(super) fn new(task: Task, before: Option<Bytes>, assigned: Moment) -> Current {
        Current {
            task,
            phase: Phase::Sending { first: true },
            cancelled: false,
            timed_out: false,
            before,
            after: None,
            times: Times {
                assigned,
                ..Times::default()
            },
            answered: false,
        }
    }
}

/// The prefetched task of a worker: it waits at the agent, or is being sent there, while the worker
/// runs another.
#[derive(Debug)]
pub(super) struct PrefetchedTask {
    /// The task, with the chunks that have not been sent.
    pub(super) task: Task,
    pub(super) phase: Phase,
    /// All chunks, including those that were sent: until the task has started, it may have to be
    /// sent again, to a replacement of the worker.
    pub(super) all_chunks: VecDeque<Chunk>,
    /// The blob that the message begins with.
    pub(super) blob: Option<BlobId>,
    /// The task was cancelled. The agent reports whether it had started.
    pub(super) cancelled: bool,
    /// A revoke request is in flight. The agent does not answer if the task has already started.
    pub(super) revoked: bool,
}

impl PrefetchedTask {
    pub(super) fn new(task: Task) -> PrefetchedTask {
        PrefetchedTask {
            all_chunks: task.chunks.clone(),
            blob: task.blob,
            task,
            phase: Phase::Sending { first: true },
            cancelled: false,
            revoked: false,
        }
    }

    /// The bytes that R's thread counts as waiting to be sent: all of the task, because it may be
    /// sent again.
    pub(super) fn queued_bytes(&self) -> usize {
        self.all_chunks.iter().map(|chunk| chunk.bytes.len()).sum()
    }

    /// The task as it was before anything of it was sent.
    pub(super) fn unsent(mut self) -> Task {
        self.task.chunks = self.all_chunks;
        self.task.blob = self.blob;
        self.task
    }
}
