//! The serialization cache, for messages that R sends node by node: `sendCall()` in a loop, snow's verbs, and
//! verbs on nodes of several clusters. From the second time on, a large message is a blob, which each host gets
//! once, and whose large vectors the workers map.
//!
//! The bytes of a message decide whether it equals the last one: C code changes values in place, environments
//! change, and code that R runs during serialization may do either. If function and arguments are the same
//! objects, the bytes are compared. Other messages are neither compared nor made a blob, so that a message that
//! is sent once has no additional cost.
//!
//! 1. The first message is sent as it is, and held.
//! 2. A second message that may equal the first becomes a blob, whether it does or not: the blob is that
//!    message. The fingerprint of its bytes is kept.
//! 3. Each further message is serialized only for its fingerprint. If the fingerprints are equal, the message
//!    is the blob, and a host that lacks the blob gets it. If not, the message is treated as a first one.
//!
//! The cache holds one message and its blobs, until all tasks that were sent the message have been answered.

use super::broadcast;
use super::handle::{Cluster, MessageBlobs, ToHub};
use crate::codec::plain::{self, rustcluster_attributes, rustcluster_names};
use crate::codec::stream::{Format, Sink};
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use extendr_ffi::{SEXP, SEXPTYPE, STRING_ELT, TYPEOF, VECTOR_ELT, XLENGTH};
use rustcluster_core::protocol::dedup::Fingerprint;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank};
use std::ffi::{c_int, c_void};
use std::rc::Rc;

/// Minimum size of a cached message, in bytes. A shorter blob would be sent to each worker as it is.
pub const LARGE: usize = 64 * 1024;

unsafe extern "C" {
    fn rustcluster_same_closure(a: *mut c_void, b: *mut c_void) -> c_int;
}

/// A large message that was sent, and may be sent again.
pub struct CachedMessage {
    job: JobId,
    setup_call: Option<u64>,
    /// The message is held, so that an equal address means the same object.
    message: Robj,
    /// The blobs of the message, in each format.
    blobs: Vec<MadeBlob>,
    /// The reference count of this value is the number of outstanding tasks that have the message, plus one.
    users: User,
}

/// Held by an outstanding task that has a [`CachedMessage`] message.
pub type User = Rc<()>;

/// A blob, and the fingerprint of its bytes.
struct MadeBlob {
    format: Format,
    id: BlobId,
    print: (u128, u64),
}

impl CachedMessage {
    /// Creates the value for a message that was sent once.
    pub fn new(job: JobId, setup_call: Option<u64>, message: &Robj) -> CachedMessage {
        CachedMessage {
            job,
            setup_call,
            message: message.clone(),
            blobs: Vec::new(),
            users: User::default(),
        }
    }

    /// Returns whether this message may be the same.
    pub fn may_be(&self, job: JobId, setup_call: Option<u64>, message: &Robj) -> bool {
        // SAFETY: this runs on R's thread; both values are alive.
        let alike = || unsafe { alike_messages(self.message.get(), message.get()) };
        self.job == job && self.setup_call == setup_call && alike()
    }

    /// Returns a value that a task has to hold until the message has been answered.
    pub fn user(&self) -> User {
        self.users.clone()
    }

    /// Returns whether an outstanding task has the message.
    pub fn is_used(&self) -> bool {
        Rc::strong_count(&self.users) > 1
    }

    /// Returns the blobs of the message.
    pub fn blobs(&self) -> impl Iterator<Item = BlobId> + '_ {
        self.blobs.iter().map(|made| made.id)
    }

    /// Makes sure that the host of this worker has the message, which [may be](CachedMessage::may_be) the same, as a
    /// blob. Returns `None` if the message is not the same. The result names no blob if there is none.
    ///
    /// # Errors
    /// If R jumped. The message may still be cached the next time.
    pub fn send_as_blob(
        &mut self,
        cluster: &Cluster,
        owner: Rank,
        message: &Robj,
    ) -> std::result::Result<Option<MessageBlobs>, Jump> {
        // The worker that runs the task on behalf of a lost one gets the message as it is.
        if cluster.hub.borrow().worker(owner).termination.is_some() {
            return Ok(Some(MessageBlobs::default()));
        }
        let format = cluster.format(owner);
        let made = self.blobs.iter().find(|made| made.format == format);
        let Some(&MadeBlob { id, print, .. }) = made else {
            let (id, print) =
                broadcast::make_blob(cluster, &[owner], self.setup_call.is_some(), |hub| {
                    write(message, format, Some(hub))
                })?;
            self.blobs.push(MadeBlob { format, id, print });
            return Ok(Some(MessageBlobs::of_one(format, id)));
        };
        if write(message, format, None)? != print {
            return Ok(None);
        }
        let has = cluster.hub.borrow().has_blob(owner, id);
        // Code that R ran in between may have changed the message.
        if !has && !send_again(cluster, id, print, owner, message, format)? {
            return Ok(None);
        }
        Ok(Some(MessageBlobs::of_one(format, id)))
    }
}

/// Sends a blob to one more host. Returns whether the bytes are still the same; if not, the host does not get
/// the blob.
fn send_again(
    cluster: &Cluster,
    id: BlobId,
    print: (u128, u64),
    owner: Rank,
    message: &Robj,
    format: Format,
) -> std::result::Result<bool, Jump> {
    cluster.hub.borrow_mut().begin_blob_again(id, owner);
    let written = write(message, format, Some(&mut ToHub(cluster)));
    let mut hub = cluster.hub.borrow_mut();
    match written {
        Ok(now) if now == print => {
            hub.finish_blob();
            Ok(true)
        }
        other => {
            hub.abandon();
            other.map(|_| false)
        }
    }
}

/// Writes a message to the hub as a blob, or discards the bytes. Returns the fingerprint of the bytes.
pub(super) fn write(
    message: &Robj,
    format: Format,
    hub: Option<&mut ToHub<'_>>,
) -> std::result::Result<(u128, u64), Jump> {
    let mut sink = Printing {
        print: Fingerprint::default(),
        hub,
        unchecked: 0,
    };
    broadcast::write_blob(message, format, &mut sink)?;
    Ok(sink.print.value())
}

/// Number of discarded bytes after which R checks for an interrupt.
const BYTES_PER_CHECK: usize = 16 * 1024 * 1024;

/// Computes the fingerprint of the bytes that are written.
struct Printing<'a, 'b> {
    print: Fingerprint,
    hub: Option<&'a mut ToHub<'b>>,
    unchecked: usize,
}

impl Sink for Printing<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.print.update(bytes);
        if let Some(hub) = &mut self.hub {
            return hub.write(bytes);
        }
        self.unchecked += bytes.len();
        let due = self.unchecked >= BYTES_PER_CHECK;
        if due {
            self.unchecked = 0;
        }
        due
    }

    fn wait(&mut self) -> bool {
        self.hub.as_mut().is_some_and(|hub| hub.wait())
    }
}

/// Returns whether two messages may be the same. The lists in parallel's messages for tasks are new objects in
/// each message.
///
/// # Safety
/// Must be called on R's thread, with live values. R does not jump.
unsafe fn alike_messages(a: SEXP, b: SEXP) -> bool {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if a == b {
            return true;
        }
        let (Some(a), Some(b)) = (plain::task_of(a), plain::task_of(b)) else {
            return false;
        };
        let [function, arguments, tag] = a;
        let [function_b, arguments_b, tag_b] = b;
        alike(function, function_b) && alike(tag, tag_b) && alike_lists(arguments, arguments_b)
    }
}

/// # Safety
/// The same as for [`alike_messages`].
unsafe fn alike(a: SEXP, b: SEXP) -> bool {
    // SAFETY: guaranteed by the caller; types are checked first.
    unsafe {
        let closure = |value: SEXP| TYPEOF(value) == SEXPTYPE::CLOSXP;
        // A loop may create an equal function for each node.
        a == b || (closure(a) && closure(b) && rustcluster_same_closure(a.cast(), b.cast()) != 0)
    }
}

/// # Safety
/// The same as for [`alike_messages`].
unsafe fn alike_lists(a: SEXP, b: SEXP) -> bool {
    // SAFETY: guaranteed by the caller; lengths and types are checked first.
    unsafe {
        let list = |list: SEXP| TYPEOF(list) == SEXPTYPE::VECSXP;
        if a == b {
            return true;
        }
        if !list(a) || !list(b) || XLENGTH(a) != XLENGTH(b) {
            return false;
        }
        let attributes = rustcluster_attributes(a);
        // The lists may have no attributes but names.
        if attributes > 1 || attributes != rustcluster_attributes(b) {
            return false;
        }
        let length = XLENGTH(a);
        if !(0..length).all(|i| alike(VECTOR_ELT(a, i), VECTOR_ELT(b, i))) {
            return false;
        }
        if attributes == 0 {
            return true;
        }
        let (names, names_b) = (rustcluster_names(a), rustcluster_names(b));
        (0..length).all(|i| STRING_ELT(names, i) == STRING_ELT(names_b, i))
    }
}
