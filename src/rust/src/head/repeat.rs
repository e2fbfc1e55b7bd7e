//! Messages that R sends node by node: `sendCall()` in a loop, snow's verbs, verbs over nodes of several
//! clusters. From the second time on, a large message is a blob, which each host gets once and whose
//! large vectors its workers map.
//!
//! Its bytes decide whether a message is the same as the last one: C code changes values in place,
//! environments change, and code that R runs while it serializes may do either. That function and arguments
//! are the same objects is only a reason to look at the bytes, because making a blob of every large
//! message, or comparing it, would cost those who send each message once.
//!
//! 1. The first message is sent as it is, and held.
//! 2. A second one that may be the same becomes a blob, whether it is the same or not: the blob is
//!    that message. The fingerprint of its bytes is kept.
//! 3. Any further one is serialized for its fingerprint alone. If that is the blob's, the message is,
//!    too; a host that does not have the blob gets it. If not, it is a first message.
//!
//! One message is held, and its blob, for as long as a task that was sent it has not been answered.

use crate::codec::plain::{self, rustcluster_attributes, rustcluster_names};
use crate::codec::stream::Format;
use extendr_api::prelude::*;
use extendr_ffi::{SEXP, SEXPTYPE, STRING_ELT, TYPEOF, VECTOR_ELT, XLENGTH};
use rustcluster_core::protocol::ids::{BlobId, JobId};
use std::ffi::{c_int, c_void};
use std::rc::Rc;

/// Bytes from which on a message is worth it: a shorter blob is sent to each worker as it is.
pub const LARGE: usize = 64 * 1024;

unsafe extern "C" {
    fn rustcluster_same_closure(a: *mut c_void, b: *mut c_void) -> c_int;
}

/// A large message that was sent, and may be sent again.
pub struct Repeated {
    pub(super) job: JobId,
    pub(super) setup_call: Option<u64>,
    /// Held, so that the same address means the same object.
    message: Robj,
    /// What it has been made, in each format.
    pub(super) blobs: Vec<MadeBlob>,
    /// So many others hold this as tasks have the message that have not been answered.
    users: User,
}

/// A task's share in a [`Repeated`] message.
pub type User = Rc<()>;

/// A blob, and the fingerprint of its bytes.
pub(super) struct MadeBlob {
    pub(super) format: Format,
    pub(super) id: BlobId,
    pub(super) print: (u128, u64),
}

impl Repeated {
    /// A message that was sent once.
    pub fn new(job: JobId, setup_call: Option<u64>, message: &Robj) -> Repeated {
        Repeated {
            job,
            setup_call,
            message: message.clone(),
            blobs: Vec::new(),
            users: User::default(),
        }
    }

    /// Whether this message may be the same.
    pub fn may_be(&self, job: JobId, setup_call: Option<u64>, message: &Robj) -> bool {
        // SAFETY: on R's thread; both are alive.
        let alike = || unsafe { alike_messages(self.message.get(), message.get()) };
        self.job == job && self.setup_call == setup_call && alike()
    }

    /// To be held for as long as a task that was sent the message has not been answered.
    pub fn user(&self) -> User {
        self.users.clone()
    }

    /// Whether there is such a task.
    pub fn is_used(&self) -> bool {
        Rc::strong_count(&self.users) > 1
    }

    /// Its blobs.
    pub fn blobs(&self) -> impl Iterator<Item = BlobId> + '_ {
        self.blobs.iter().map(|made| made.id)
    }
}

/// Whether two messages may be the same. Of those of parallel's that ask for a task, the lists are made
/// anew for each.
///
/// # Safety
/// On R's thread, with live values. R does not jump.
unsafe fn alike_messages(a: SEXP, b: SEXP) -> bool {
    // SAFETY: the caller's.
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
/// As for [`alike_messages`].
unsafe fn alike(a: SEXP, b: SEXP) -> bool {
    // SAFETY: the caller's; types are looked at first.
    unsafe {
        let closure = |value: SEXP| TYPEOF(value) == SEXPTYPE::CLOSXP;
        // A function that a loop makes anew for each node.
        a == b || (closure(a) && closure(b) && rustcluster_same_closure(a.cast(), b.cast()) != 0)
    }
}

/// # Safety
/// As for [`alike_messages`].
unsafe fn alike_lists(a: SEXP, b: SEXP) -> bool {
    // SAFETY: the caller's; lengths and types are looked at first.
    unsafe {
        let list = |list: SEXP| TYPEOF(list) == SEXPTYPE::VECSXP;
        if a == b {
            return true;
        }
        if !list(a) || !list(b) || XLENGTH(a) != XLENGTH(b) {
            return false;
        }
        let attributes = rustcluster_attributes(a);
        // None, or names alone.
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
