//! The cluster behind the external pointer of R: its hub, and the state that outlives a call from R.

use super::losses::WorkerFailures;
use super::serialization_cache::{CachedMessage, User};
use super::values::Values;
use crate::codec::stream::{Format, Sink};
use crate::r::failure::Failure;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::hub::Hub;
use rustcluster_core::head::job;
use rustcluster_core::head::retry::Attempts;
use rustcluster_core::head::scheduler::events::RankSet;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// An open job: its engine, and its R values.
pub struct Job {
    pub engine: job::Job,
    pub(super) values: Values,
    /// The failure of the first step, which job_begin() takes, for the next call of job_step().
    pub(super) pending: Option<Unsent>,
}

/// The answers that hub_call() had received when it stopped waiting.
pub(super) struct Called {
    pub(super) values: Robj,
    pub(super) there: Vec<bool>,
    pub(super) next: Robj,
}

/// R's thread waits for at most this time without a check for interrupts in R.
pub const SLICE: Duration = Duration::from_millis(100);

/// The value behind the external pointer. R code that runs during a function of the pointer may call another of
/// its functions. Therefore nothing may be borrowed while R may run code.
pub struct Cluster {
    pub hub: RefCell<Hub>,
    /// The last list of nodes for which a result was requested, with the index of each rank in the list. The
    /// list is kept alive, so that an equal address means the same list. A verb asks for the same list once for
    /// each task: such a request does not depend on the length of the list.
    pub(super) nodes: Cell<Option<(Robj, Vec<u32>, RankSet)>>,
    /// The buffer for messages of [`plain`](crate::codec::plain).
    pub(super) plain: Cell<Vec<u8>>,
    /// The last large message that R has sent to a node.
    pub(super) last: Cell<Option<CachedMessage>>,
    /// For each worker, the format of messages that are not plain.
    pub formats: RefCell<Vec<Format>>,
    /// The messages of tasks that have not been answered, for retries.
    pub messages: RefCell<HashMap<TaskId, SentMessage>>,
    /// The messages of calls that have not been forgotten.
    pub(super) calls: RefCell<HashMap<TaskId, DroppableCall>>,
    /// The retry policies, and the worker failures that R has not acknowledged.
    pub(super) failures: RefCell<WorkerFailures>,
    /// The job that last sent a task, and the number of tasks that it has sent.
    pub(super) sent_by_job: Cell<(JobId, i32)>,
    /// The open job, if a verb of this package runs it, and not a verb of parallel.
    pub job: RefCell<Option<Box<Job>>>,
    /// The round-trip time to workers in seconds, as far as jobs have measured it.
    pub rtts: RefCell<HashMap<Rank, f64>>,
    /// The blob of the values that the tasks of the last job had in common, with the key of its bytes, if they
    /// are short.
    pub(super) common: Cell<Option<(u128, BlobId)>>,
    /// Blobs, each with the job with which it ends.
    pub(super) blobs: RefCell<Vec<(JobId, BlobId)>>,
    /// An answer that R knows of and has yet to take with hub_read().
    pub(super) unread: Cell<Option<Unread>>,
    /// The value of the next hub_called().
    pub(super) called: Cell<Option<Called>>,
    /// The job of a verb that is running and that R does not know of yet: see [`may_begin`].
    pub open_job: Cell<Option<JobId>>,
    /// Calls that were dropped while the hub was in use.
    pub(super) dropped: RefCell<Vec<TaskId>>,
    /// The task whose answer is being read, or could not be read because R jumped, and the index of its node.
    pub reading: Cell<Option<(TaskId, i32)>>,
}

/// The body of an answer, its task, the index of its node and the worker that had the task.
pub(super) struct Unread {
    pub(super) body: Body,
    pub(super) task: TaskId,
    /// The worker to which R gave the task.
    pub(super) rank: Rank,
    pub(super) node_index: i32,
    pub(super) at: Rank,
}

impl Cluster {
    /// Drops the messages of tasks that were cancelled.
    pub(super) fn forget_messages(&self) {
        let mut messages = self.messages.borrow_mut();
        if !messages.is_empty() {
            let hub = self.hub.borrow();
            messages.retain(|&task, _| hub.expects(task));
        }
        drop(messages);
        self.forget_last();
    }

    /// Removes the message of a task and returns it.
    pub(super) fn forget_message(&self, task: TaskId) -> Option<SentMessage> {
        let mut message = self.messages.borrow_mut().remove(&task)?;
        if message.user.take().is_some() {
            self.forget_last();
        }
        Some(message)
    }

    /// Takes the last large message, if this message may be the same. The caller gives it back by
    /// [`Cluster::keep_last`], because R code that runs in between may send other messages.
    pub(super) fn take_last(
        &self,
        job: JobId,
        setup_call: Option<u64>,
        message: &Robj,
    ) -> Option<CachedMessage> {
        let last = self.last.take()?;
        if last.may_be(job, setup_call, message) {
            return Some(last);
        }
        self.last.set(Some(last));
        None
    }

    /// Sets the last large message.
    pub(super) fn keep_last(&self, last: CachedMessage) {
        if let Some(other) = self.last.replace(Some(last)) {
            self.drop_cached(&other);
        }
        self.forget_last();
    }

    /// Drops the last large message if no outstanding task has it.
    fn forget_last(&self) {
        match self.last.take() {
            Some(last) if !last.is_used() => self.drop_cached(&last),
            last => self.last.set(last),
        }
    }

    pub(super) fn drop_cached(&self, cached: &CachedMessage) {
        for id in cached.blobs() {
            self.hub.borrow_mut().drop_blob(id);
        }
    }

    /// Drops the blobs of a job.
    pub(super) fn drop_blobs(&self, job: JobId) {
        self.blobs.borrow_mut().retain(|&(other, id)| {
            if other == job {
                self.hub.borrow_mut().drop_blob(id);
            }
            other != job
        });
    }

    /// Cancels the calls that were dropped.
    pub(super) fn forget_dropped(&self, hub: &mut Hub) {
        for task in self.dropped.take() {
            hub.forget_call(task);
            self.forget_message_of_call(task);
        }
    }

    /// Drops the message of a call.
    pub(super) fn forget_message_of_call(&self, task: TaskId) {
        let call = self.calls.borrow_mut().remove(&task);
        // Release R objects only when the table is no longer borrowed.
        drop(call);
    }

    /// Returns the format in which a worker is sent messages that are not plain.
    pub fn format(&self, rank: Rank) -> Format {
        let formats = self.formats.borrow();
        formats.get(rank as usize).copied().unwrap_or_default()
    }

    /// Records that a task was sent, with its message, which is kept while the task is outstanding.
    pub(super) fn sent(&self, task: TaskId, mut message: SentMessage) {
        message.index = match self.sent_by_job.get() {
            (last, index) if last == message.job => index + 1,
            _ => 1,
        };
        self.sent_by_job.set((message.job, message.index));
        self.messages.borrow_mut().insert(task, message);
    }
}

/// The blobs of a message, one for each format in which it was sent.
#[derive(Clone, Copy, Default)]
pub struct MessageBlobs {
    native: Option<BlobId>,
    xdr: Option<BlobId>,
}

impl MessageBlobs {
    /// Creates the value for a message that is this one blob.
    pub fn of_one(format: Format, id: BlobId) -> MessageBlobs {
        let mut blobs = MessageBlobs::default();
        blobs.set(format, id);
        blobs
    }

    pub(super) fn of(&self, format: Format) -> Option<BlobId> {
        match format {
            Format::Native => self.native,
            Format::Xdr => self.xdr,
        }
    }

    pub(super) fn set(&mut self, format: Format, id: BlobId) {
        match format {
            Format::Native => self.native = Some(id),
            Format::Xdr => self.xdr = Some(id),
        }
    }
}

/// A message, while its task is outstanding.
pub struct SentMessage {
    /// The message as R passed it. Its values are shared with R, so that it needs no memory of its own.
    pub(super) message: Robj,
    pub(super) job: JobId,
    /// The index of the task among the tasks of its job, from 1.
    pub index: i32,
    pub(super) setup_call: Option<u64>,
    /// The blobs that contain the complete message, for hosts that have them.
    pub(super) blobs: MessageBlobs,
    /// Set if this is, or was, the last large message.
    pub(super) user: Option<User>,
    /// The worker failures of the task.
    pub(super) attempts: Attempts<Failure>,
}

/// A call, until it is forgotten.
pub(super) struct DroppableCall {
    /// The message: see [`SentMessage`].
    pub(super) message: Robj,
    /// The workers that may run the call, in order.
    pub(super) any_of: Arc<[Rank]>,
    /// The name of the call in warnings.
    pub(super) what: String,
    /// The worker failures of the call.
    pub(super) attempts: Attempts<Failure>,
}

/// The reason why a message was not sent.
pub enum Unsent {
    Jump(Jump),
    Failure(Failure),
}

impl From<Jump> for Unsent {
    fn from(jump: Jump) -> Unsent {
        Unsent::Jump(jump)
    }
}

impl From<Failure> for Unsent {
    fn from(failure: Failure) -> Unsent {
        Unsent::Failure(failure)
    }
}

impl From<Unsent> for Robj {
    fn from(unsent: Unsent) -> Robj {
        match unsent {
            Unsent::Jump(Jump(token)) => token,
            Unsent::Failure(failure) => failure.into(),
        }
    }
}

/// The index of a node that is not in the list.
pub(super) const ABSENT: u32 = u32::MAX;

/// Runs `body` with the cluster behind `handle`, if the cluster can be used.
pub fn with_cluster(
    handle: &Robj,
    body: impl FnOnce(&Cluster) -> std::result::Result<Robj, Failure>,
) -> Robj {
    usable(handle).and_then(body).unwrap_or_else(Robj::from)
}

/// Returns the cluster behind `handle`, if it can be used.
pub(super) fn usable(handle: &Robj) -> std::result::Result<&Cluster, Failure> {
    let cluster = cluster_of(handle)?;
    let hub = cluster.hub.try_borrow_mut();
    let mut hub = hub.map_err(|_| Failure::new("busy"))?;
    if hub.is_forked() {
        return Err(Failure::new("forked"));
    }
    cluster.forget_dropped(&mut hub);
    Ok(cluster)
}

pub(super) fn cluster_of(handle: &Robj) -> std::result::Result<&Cluster, Failure> {
    let restored = || Failure::new("restored");
    if !handle.is_external_pointer() {
        return Err(restored());
    }
    // The pointer is nil after it has been saved and loaded.
    let pointer: &ExternalPtr<Cluster> = handle.try_into().map_err(|_| restored())?;
    pointer.try_addr().map_err(|_| restored())
}

/// Runs `body` with the hub of a cluster: see [`with_cluster`]. The hub is released before R makes the result.
pub(super) fn with_hub<T: Into<Robj>>(
    handle: &Robj,
    body: impl FnOnce(&mut Hub) -> std::result::Result<T, Failure>,
) -> Robj {
    with_cluster(handle, |cluster| {
        let result = body(&mut cluster.hub.borrow_mut())?;
        Ok(result.into())
    })
}

/// Converts a rank of R, from 1, to a rank of the core.
pub fn rank_of(hub: &Hub, rank: i32) -> std::result::Result<Rank, Failure> {
    match usize::try_from(rank) {
        Ok(rank) if (1..=hub.size()).contains(&rank) => Ok(rank as Rank - 1),
        _ => Err(Failure::new("bad_argument")
            .with("argument", "node")
            .with("reason", format!("rank {rank} of {}", hub.size()))),
    }
}

pub(super) fn strings(value: &Robj) -> Vec<String> {
    let all = value.as_str_vector().unwrap_or_default();
    all.into_iter().map(str::to_owned).collect()
}

/// The hub, as a sink for R's serialization.
pub struct ToHub<'a>(pub &'a Cluster);

impl Sink for ToHub<'_> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.0.hub.borrow_mut().write(bytes)
    }

    fn wait(&mut self) -> bool {
        self.0.hub.borrow_mut().wait_to_send(SLICE)
    }
}

/// Checks that a message may be sent. Code that R runs during a serialization, such as a finalizer, must not
/// send another message: the first one would be lost.
pub fn may_send(cluster: &Cluster) -> std::result::Result<(), Failure> {
    match cluster.hub.borrow().is_writing() {
        true => Err(Failure::new("busy")),
        false => Ok(()),
    }
}

/// Checks that a verb may send its first message. A finalizer that R runs during another verb would take the
/// answers of that verb. R itself records a verb that takes longer, and then refuses other verbs.
pub fn may_begin(cluster: &Cluster) -> std::result::Result<(), Failure> {
    match cluster.open_job.get() {
        Some(job) => Err(Failure::new("busy").with("begun", job)),
        None => may_send(cluster),
    }
}
