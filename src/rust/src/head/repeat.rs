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

/// Bytes from which on a message is worth it: a shorter blob is sent to each worker as it is.
pub const LARGE: usize = 64 * 1024;

unsafe extern "C" {
    fn rustcluster_same_closure(a: *mut c_void, b: *mut c_void) -> c_int;
}

/// A large message that was sent, and may be sent again.
pub struct Repeated {
    job: JobId,
    setup_call: Option<u64>,
    /// Held, so that the same address means the same object.
    message: Robj,
    /// What it has been made, in each format.
    blobs: Vec<MadeBlob>,
    /// So many others hold this as tasks have the message that have not been answered.
    users: User,
}

/// A task's share in a [`Repeated`] message.
pub type User = Rc<()>;

/// A blob, and the fingerprint of its bytes.
struct MadeBlob {
    format: Format,
    id: BlobId,
    print: (u128, u64),
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

    /// Has the host of this worker have the message, which [may be](Repeated::may_be) the same, as a
    /// blob. `None`: it is not the same. The result names no blob if there is none.
    ///
    /// # Errors
    /// When R jumped. The message may be shared all the same the next time.
    pub fn send_as_blob(
        &mut self,
        cluster: &Cluster,
        owner: Rank,
        message: &Robj,
    ) -> std::result::Result<Option<MessageBlobs>, Jump> {
        // Whoever stands in for it gets the message as it is.
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
        // Code that R ran in between may have changed it.
        if !has && !send_again(cluster, id, print, owner, message, format)? {
            return Ok(None);
        }
        Ok(Some(MessageBlobs::of_one(format, id)))
    }
}

/// Sends a blob to one more host. Returns whether it has been the same bytes: if not, that host does not
/// have it.
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

/// Writes a message to the hub as a blob, or to nowhere. Returns the fingerprint of its bytes.
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

/// Bytes to nowhere after which R is to look for an interrupt.
const BYTES_PER_CHECK: usize = 16 * 1024 * 1024;

/// Takes the fingerprint of what is written.
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
