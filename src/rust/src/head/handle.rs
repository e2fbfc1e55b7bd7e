//! The cluster that R holds: its hub, and what is remembered between two calls of R.

use super::losses::WorkerFailures;
use super::repeat::{Repeated, User};
use super::values::Values;
use crate::codec::stream::{Format, Sink};
use crate::r::failure::Failure;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::hub::Hub;
use rustcluster_core::head::job;
use rustcluster_core::head::retry::Attempts;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// An open job: its engine, and what it has of R's.
pub struct Job {
    pub engine: job::Job,
    pub(super) values: Values,
    /// What the first step, which job_begin() takes, has left for the next: what R is needed for.
    pub(super) said: Option<Unsent>,
}

/// What hub_call() has had of answers when it stopped to wait.
pub(super) struct Called {
    pub(super) values: Robj,
    pub(super) there: Vec<bool>,
    pub(super) next: Robj,
}

/// R's thread waits in slices of this length, and lets R look for interrupts in between.
pub const SLICE: Duration = Duration::from_millis(100);

/// What an external pointer of ours holds. R code that runs while one of its functions is under
/// way may call another: no borrow is held while R may run code.
pub struct Cluster {
    pub hub: RefCell<Hub>,
    /// The last list of nodes that a result was asked for from any of, with each rank's place in
    /// it. Kept alive, so that the same address means the same list: asking again for the same
    /// one, as a verb does once a task, costs nothing however long it is.
    pub(super) nodes: Cell<Option<(Robj, Vec<u32>)>>,
    /// Buffer for messages of [`plain`](crate::codec::plain).
    pub(super) plain: Cell<Vec<u8>>,
    /// The last large message that R has sent to a node.
    pub(super) last: Cell<Option<Repeated>>,
    /// Of each worker, what it is sent that is not plain.
    pub formats: RefCell<Vec<Format>>,
    /// The messages of tasks that have not been answered, to be sent again if need be.
    pub messages: RefCell<HashMap<TaskId, SentMessage>>,
    /// The same of calls that have not been forgotten.
    pub(super) calls: RefCell<HashMap<TaskId, DroppableCall>>,
    /// How often tasks are retried, and what R is still to be told of that.
    pub(super) failures: RefCell<WorkerFailures>,
    /// The job that last sent something, and how much it has sent.
    pub(super) sent_by_job: Cell<(JobId, i32)>,
    /// The job that is open, if it is one of ours and not a verb of parallel's.
    pub job: RefCell<Option<Box<Job>>>,
    /// Seconds that the round trip to a worker takes, as far as jobs have found out.
    pub rtts: RefCell<HashMap<Rank, f64>>,
    /// What the tasks of the last job had in common, by its serialized form, if that is short.
    pub(super) common: Cell<Option<(u128, BlobId)>>,
    /// Blobs, each with the job that it goes with.
    pub(super) blobs: RefCell<Vec<(JobId, BlobId)>>,
    /// An answer that R has been told of, and is to take with hub_read().
    pub(super) unread: Cell<Option<Unread>>,
    /// What hub_called() is to tell.
    pub(super) called: Cell<Option<Called>>,
    /// The job of a verb that is under way without a note of it in R: see [`may_begin`].
    pub open_job: Cell<Option<JobId>>,
    /// Calls that were dropped while the hub was in use.
    pub(super) dropped: RefCell<Vec<TaskId>>,
    /// The task whose answer is being read, or could not be read because R jumped, and the place of its
    /// node.
    pub reading: Cell<Option<(TaskId, i32)>>,
}

/// The body of an answer, its task, the place of its node and the worker that had the task.
pub(super) struct Unread {
    pub(super) body: Body,
    pub(super) task: TaskId,
    /// The worker that R gave the task to.
    pub(super) rank: Rank,
    pub(super) node_index: i32,
    pub(super) at: Rank,
}

impl Cluster {
    /// Lets go of the messages of tasks that were cancelled.
    pub(super) fn forget_messages(&self) {
        let mut messages = self.messages.borrow_mut();
        if !messages.is_empty() {
            let hub = self.hub.borrow();
            messages.retain(|&task, _| hub.expects(task));
        }
        drop(messages);
        self.forget_last();
    }

    /// Lets go of the message of a task, and returns it.
    pub(super) fn forget_message(&self, task: TaskId) -> Option<SentMessage> {
        let mut message = self.messages.borrow_mut().remove(&task)?;
        if message.user.take().is_some() {
            self.forget_last();
        }
        Some(message)
    }

    /// The last large message, if this one may be the same. It is to be given back with
    /// [`Cluster::keep_last`]: R code that runs in between may send others.
    pub(super) fn take_last(
        &self,
        job: JobId,
        setup_call: Option<u64>,
        message: &Robj,
    ) -> Option<Repeated> {
        let last = self.last.take()?;
        if last.may_be(job, setup_call, message) {
            return Some(last);
        }
        self.last.set(Some(last));
        None
    }

    /// This is now the last large message.
    pub(super) fn keep_last(&self, last: Repeated) {
        if let Some(other) = self.last.replace(Some(last)) {
            self.drop_repeated(&other);
        }
        self.forget_last();
    }

    /// Lets go of the last large message if no task has it any more.
    fn forget_last(&self) {
        match self.last.take() {
            Some(last) if !last.is_used() => self.drop_repeated(&last),
            last => self.last.set(last),
        }
    }

    pub(super) fn drop_repeated(&self, repeated: &Repeated) {
        for id in repeated.blobs() {
            self.hub.borrow_mut().drop_blob(id);
        }
    }

    /// Lets go of the blobs of a job.
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

    /// Lets go of the message of a call.
    pub(super) fn forget_message_of_call(&self, task: TaskId) {
        let call = self.calls.borrow_mut().remove(&task);
        // What is released of R's, after the table is free again.
        drop(call);
    }

    /// What a worker is sent that is not plain.
    pub fn format(&self, rank: Rank) -> Format {
        let formats = self.formats.borrow();
        formats.get(rank as usize).copied().unwrap_or_default()
    }

    /// A task has been sent; its message is kept for as long as it is outstanding.
    pub(super) fn sent(&self, task: TaskId, mut message: SentMessage) {
        message.index = match self.sent_by_job.get() {
            (last, index) if last == message.job => index + 1,
            _ => 1,
        };
        self.sent_by_job.set((message.job, message.index));
        self.messages.borrow_mut().insert(task, message);
    }
}

/// A message as blobs, one for each format that it was sent in.
#[derive(Clone, Copy, Default)]
pub struct MessageBlobs {
    native: Option<BlobId>,
    xdr: Option<BlobId>,
}

impl MessageBlobs {
    /// As this blob alone.
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

/// A message for as long as its task is outstanding.
pub struct SentMessage {
    /// As it came from R, which shares its values: it costs no memory of its own.
    pub(super) message: Robj,
    pub(super) job: JobId,
    /// Which of the job's tasks it is, from 1.
    pub index: i32,
    pub(super) setup_call: Option<u64>,
    /// All of it, where its worker's host has it.
    pub(super) blobs: MessageBlobs,
    /// It is the last large message, or has been.
    pub(super) user: Option<User>,
    /// How often it was lost.
    pub(super) attempts: Attempts<Failure>,
}

/// A call for as long as it is not forgotten.
pub(super) struct DroppableCall {
    /// As of [`SentMessage`].
    pub(super) message: Robj,
    /// The workers that may have it, in order.
    pub(super) any_of: Arc<[Rank]>,
    /// What warnings call it.
    pub(super) what: String,
    /// How often it was lost.
    pub(super) attempts: Attempts<Failure>,
}

/// Why a message has not been sent.
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

/// No place in a list of nodes.
pub(super) const ABSENT: u32 = u32::MAX;

/// Runs `body` with the cluster behind `handle`, if it can be used.
pub fn with_cluster(
    handle: &Robj,
    body: impl FnOnce(&Cluster) -> std::result::Result<Robj, Failure>,
) -> Robj {
    usable(handle).and_then(body).unwrap_or_else(Robj::from)
}

/// The cluster behind `handle`, if it can be used.
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
    // Nil after it has been saved and loaded.
    let pointer: &ExternalPtr<Cluster> = handle.try_into().map_err(|_| restored())?;
    pointer.try_addr().map_err(|_| restored())
}

/// As [`with_cluster`], for what needs the hub alone. It is not in use any more when R makes the result.
pub(super) fn with_hub<T: Into<Robj>>(
    handle: &Robj,
    body: impl FnOnce(&mut Hub) -> std::result::Result<T, Failure>,
) -> Robj {
    with_cluster(handle, |cluster| {
        let result = body(&mut cluster.hub.borrow_mut())?;
        Ok(result.into())
    })
}

/// A rank of R's, from 1, as one of ours.
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

/// The hub as R's serialization writes to it.
pub struct ToHub<'a>(pub &'a Cluster);

impl Sink for ToHub<'_> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.0.hub.borrow_mut().write(bytes)
    }

    fn wait(&mut self) -> bool {
        self.0.hub.borrow_mut().wait_to_send(SLICE)
    }
}

/// Whether a message may be sent. Code that R runs while it serializes one, a finalizer say, may send none: the
/// first one would be lost.
pub fn may_send(cluster: &Cluster) -> std::result::Result<(), Failure> {
    match cluster.hub.borrow().is_writing() {
        true => Err(Failure::new("busy")),
        false => Ok(()),
    }
}

/// Whether a verb may send its first message. A finalizer that R runs in the middle of another verb
/// would take that one's answers. A verb that takes longer is noted in R, which then refuses others by
/// itself.
pub fn may_begin(cluster: &Cluster) -> std::result::Result<(), Failure> {
    match cluster.open_job.get() {
        Some(job) => Err(Failure::new("busy").with("begun", job)),
        None => may_send(cluster),
    }
}
