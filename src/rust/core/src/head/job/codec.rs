//! What a job needs of R: how tasks are encoded, and how their answers are stored.

use super::BatchLoss;
use crate::protocol::body::Body;
use crate::protocol::ids::{BlobId, Rank, TaskId};
use std::time::Duration;

/// How a message contains its tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Several tasks, combined by [`Codec::gather`].
    Batch,
    /// One task, encoded while it is sent.
    Long,
    /// One task in a self-contained message, which does not begin with the blob.
    Single,
}

/// How many of the message's tasks an answer contains, and the measurements of the worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    /// Number of completed tasks, counted from the first: no more than the message had.
    pub tasks: usize,
    /// How long the worker was busy with the tasks.
    pub busy: Duration,
    /// The CPU time of the tasks, if the worker has not waited for anything.
    pub computed: Option<Duration>,
    /// How long the worker has read the blob before it ran the tasks.
    pub reading: Duration,
}

/// Encodes tasks and stores their answers. Tasks are identified by their numbers, from 0.
pub trait Codec {
    /// The reason why a method failed, for example a jump of R.
    type Stop;

    /// Whether this worker can be sent other forms than [`Form::Single`].
    fn takes_batches(&self, rank: Rank) -> bool;

    /// Combines as many of these tasks, from the first on, as fit into one message, which [`Codec::write`] then
    /// writes. Returns the number of tasks and the form of the message. `max_time`: see [`Batch`](crate::head::batching::Batch).
    ///
    /// # Errors
    /// When a task cannot be encoded.
    fn gather(&mut self, tasks: &[usize], max_time: Duration) -> Result<(usize, Form), Self::Stop>;

    /// Writes the started message, for this worker. `task`: its first task.
    ///
    /// # Errors
    /// When the message is incomplete.
    fn write(&mut self, assigned: Rank, task: usize, form: Form) -> Result<(), Self::Stop>;

    /// Sends the blob again, to the host of this worker, which does not have the blob.
    ///
    /// # Errors
    /// When the blob is incomplete.
    fn resend_blob(&mut self, blob: BlobId, assigned: Rank) -> Result<(), Self::Stop>;

    /// Whether reading this answer cannot fail.
    fn is_plain(&self, body: &Body) -> bool;

    /// Stores this worker's answer to a message with these tasks.
    ///
    /// # Errors
    /// When the answer cannot be read. Then none of its tasks counts as answered.
    fn take(
        &mut self,
        on: Rank,
        task: TaskId,
        tasks: &[usize],
        body: Body,
    ) -> Result<Taken, Self::Stop>;

    /// Reports that a message was lost. `again`: those of its tasks that are retried. The other tasks fail.
    fn lost(&mut self, failure: &BatchLoss, again: &[usize]);
}
