//! The serialization cache, for messages that R sends node by node: `sendCall()` in a loop, snow's verbs, and
//! verbs on nodes of several clusters. From the second time on, a large message is a blob, which each host gets
//! once, and whose large vectors the workers map.
//!
//! The bytes of a message decide whether it equals the last one: C code changes values in place, environments
//! change, and code that R runs during serialization may do either. If function and arguments are the same
//! objects, the bytes are compared. Other messages are neither compared nor made a blob, so that a message that
//! is sent once has no additional cost.
//!
//! 1. The first message is sent as it is, and cached.
//! 2. A second message that may equal the first becomes a blob, whether it does or not: the blob is that
//!    message. The fingerprint of its bytes is stored.
//! 3. Each further message is serialized only for its fingerprint. If the fingerprints are equal, the message
//!    is the blob, and a host that lacks the blob gets it. If not, the message is treated as a first one.
//!
//! The cache contains one message and its blobs, until all tasks that were sent the message have been answered.

use crate::codec::plain::{self, rustcluster_attributes, rustcluster_names};
use crate::codec::stream::Format;
use extendr_api::prelude::*;
use extendr_ffi::{SEXP, SEXPTYPE, STRING_ELT, TYPEOF, VECTOR_ELT, XLENGTH};
use rustcluster_core::protocol::ids::{BlobId, JobId};
use std::ffi::{c_int, c_void};
use std::rc::Rc;

/// Minimum size of a cached message, in bytes. A shorter blob would be sent to each worker as it is.
pub const LARGE: usize = 64 * 1024;

unsafe extern "C" {
    fn rustcluster_same_closure(a: *mut c_void, b: *mut c_void) -> c_int;
}

/// A large message that was sent, and may be sent again.
pub struct CachedMessage {
    pub(super) job: JobId,
    pub(super) setup_call: Option<u64>,
    /// The message is kept alive, so that an equal address means the same object.
    message: Robj,
    /// The blobs of the message, in each format.
    pub(super) blobs: Vec<MadeBlob>,
    /// The reference count of this value is the number of outstanding tasks that have the message, plus one.
    users: User,
}

/// A reference of an outstanding task to its [`CachedMessage`].
pub type User = Rc<()>;

/// A blob, and the fingerprint of its bytes.
pub(super) struct MadeBlob {
    pub(super) format: Format,
    pub(super) id: BlobId,
    pub(super) print: (u128, u64),
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
