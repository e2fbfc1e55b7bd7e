//! Messages of tasks and calls, and blobs, while R's thread writes them: what has been written so far, and how its
//! chunks are submitted to the scheduler.

use super::core::Core;
use super::futures::CallEnd;
use crate::head::scheduler::task::Order;
use crate::protocol::dedup::{self, Chunk};
use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::{BlobId, JobId, Rank, TaskId};
use bytes::Bytes;

/// A job that no verb of parallel stands behind: see [`Hub::begin`](super::Hub::begin).
pub const NO_JOB: JobId = 0;

/// The position of a task in its worker's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// After the tasks that the worker has been given before.
    #[default]
    Last,
    /// After the tasks that the worker has been given before; the task may be prefetched.
    Prefetch,
    /// Before the tasks that wait.
    First,
}

/// A task whose message can now be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartedTask {
    /// The number of the task.
    pub task: TaskId,
    /// The worker that gets the task.
    pub assigned: Rank,
    /// Whether the message begins with the blob. If not, the worker's host does not have the blob:
    /// either [`begin_blob_again()`](super::Hub::begin_blob_again) follows, or the whole message must be written.
    pub has_blob: bool,
    /// The worker runs a call, which it completes first.
    pub behind_call: bool,
    /// The worker has not joined yet: its set-up call is only logged, and there is no answer.
    pub only_logged: bool,
}

#[derive(Debug)]
pub(super) struct MessageWriting {
    pub(super) order: Order,
    /// The worker that R gave the task to.
    pub(super) owner: Rank,
    /// The task is a retry.
    pub(super) again: bool,
    /// The worker has not joined yet: the set-up call is only logged.
    pub(super) only_logged: bool,
    /// The blob that the message begins with, if the host gets it.
    pub(super) wanted: Option<BlobId>,
    pub(super) buffer: Vec<u8>,
    pub(super) first: bool,
    /// How a call had ended that is retried: it ends so again if the message cannot be written.
    pub(super) end: Option<CallEnd>,
}

/// A blob that is being written.
#[derive(Debug)]
pub(super) struct BlobWriting {
    pub(super) id: BlobId,
    pub(super) buffer: Vec<u8>,
    /// The blob is new, and set-up calls begin with it.
    pub(super) logged: bool,
}

impl MessageWriting {
    pub(super) fn new(order: Order, owner: Rank, again: bool) -> MessageWriting {
        MessageWriting {
            order,
            owner,
            again,
            only_logged: false,
            wanted: None,
            buffer: Vec::new(),
            first: true,
            end: None,
        }
    }

    pub(super) fn is_call(&self) -> bool {
        self.order.any_of.is_some()
    }

    /// Makes the message begin with its blob, if that is possible and nothing of the message has
    /// been submitted. Returns whether it does.
    pub(super) fn attach_blob(&mut self, core: &Core) -> bool {
        if self.first {
            let order = &self.order;
            // A blob that is missing in the file could not be restored on a reconnected host.
            let setup_log = core
                .setup_log
                .as_ref()
                .filter(|_| order.setup_call.is_some());
            let logged = |id| setup_log.is_none_or(|s| !s.is_complete() || s.has_blob(id));
            let sent = |id| self.only_logged || core.scheduler.has_blob(order.rank, id);
            let has = |&id: &BlobId| sent(id) && logged(id);
            self.order.blob = self.wanted.filter(has);
        }
        self.order.blob.is_some()
    }
}

/// Takes from the buffer the chunks to be submitted next; all of it if it is the `last` part.
pub(super) fn take_chunks(buffer: &mut Vec<u8>, has_chunk_cache: bool, last: bool) -> Vec<Chunk> {
    if has_chunk_cache {
        return dedup::cut(buffer, last);
    }
    let room = if last { 0 } else { MAX_BODY };
    let buffer = std::mem::replace(buffer, Vec::with_capacity(room));
    vec![Bytes::from(buffer).into()]
}

pub(super) fn submit_blob(
    core: &mut Core,
    blob_writing: &BlobWriting,
    mut chunks: Vec<Chunk>,
    last: bool,
) {
    if last && chunks.is_empty() {
        chunks.push(Chunk::default());
    }
    if let Some(setup_log) = core.setup_log.as_mut().filter(|_| blob_writing.logged) {
        setup_log.write_blob(&chunks);
    }
    let count = chunks.len();
    for (at, chunk) in chunks.into_iter().enumerate() {
        let last = last && at + 1 == count;
        if core.scheduler.append_blob(blob_writing.id, &chunk, last) {
            core.queued += chunk.bytes.len();
        }
    }
    core.pump();
}

pub(super) fn submit(
    core: &mut Core,
    writing: &mut MessageWriting,
    mut chunks: Vec<Chunk>,
    last: bool,
) {
    if last && chunks.is_empty() {
        chunks.push(Chunk::default());
    }
    if writing.is_call() {
        return submit_call(core, writing, chunks, last);
    }
    let first = std::mem::replace(&mut writing.first, false);
    if first {
        let order = &writing.order;
        if !writing.only_logged {
            core.inbox
                .tasks
                .begin(order.task, writing.owner, order.rank);
            if order.setup_call.is_some() {
                core.setup_call_begins(order.task);
            }
        }
        if let (Some(setup_log), Some(name)) = (&mut core.setup_log, writing.order.setup_call) {
            let order = &writing.order;
            setup_log.begin(order.task, order.rank, name, order.blob);
        }
        if !writing.only_logged {
            core.scheduler.submit(writing.order.clone());
        }
    }
    let &Order { rank, task, .. } = &writing.order;
    if let Some(setup_log) = &mut core.setup_log {
        setup_log.write(&chunks);
    }
    if writing.only_logged {
        return;
    }
    let count = chunks.len();
    for (at, chunk) in chunks.into_iter().enumerate() {
        core.queued += chunk.bytes.len();
        let last = last && at + 1 == count;
        core.scheduler.append(rank, task, chunk, last);
    }
    core.pump();
}

/// Submits a part of a call. R does not wait for calls to be sent: their bytes stay here until a
/// worker is free.
fn submit_call(core: &mut Core, writing: &mut MessageWriting, chunks: Vec<Chunk>, last: bool) {
    let task = writing.order.task;
    if std::mem::replace(&mut writing.first, false) {
        core.inbox.calls.expect(task);
        core.scheduler.submit(writing.order.clone());
    }
    let count = chunks.len();
    for (at, chunk) in chunks.into_iter().enumerate() {
        let last = last && at + 1 == count;
        core.scheduler.append_call(task, chunk, last);
    }
    if last && core.inbox.calls.is_awaited(task) {
        core.scheduler.demand_call(task);
    }
    core.pump();
}
