//! A message that goes to many nodes is serialized once where that is known to be safe: `clusterCall`
//! and `clusterExport` make the same message anew for each node, of the same values.
//!
//! Safe means: the values are the very same ones, nothing in them is an environment (or an external
//! pointer) whose content may have changed in between, and it is still the same call of the verb, so
//! that no code of the user's has run that could have changed a value in place.

use crate::plain::{self, rustcluster_attributes, rustcluster_names};
use crate::stream::Format;
use crate::unwind;
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, ALTREP, SEXP, SEXPTYPE, STRING_ELT, TYPEOF, VECTOR_ELT, XLENGTH};
use rustcluster_core::hub::Hub;
use rustcluster_core::scheduler::JobId;
use rustcluster_core::share::Chunk;
use std::cell::RefCell;
use std::ffi::c_void;
use std::time::Duration;

/// A message that was sent.
pub struct Sent {
    job: JobId,
    format: Format,
    /// Held, so that the same address means the same value.
    message: Robj,
    chunks: Vec<Chunk>,
}

impl Sent {
    /// A message in which nothing can change, as it was sent.
    pub fn new(job: JobId, format: Format, message: &Robj, chunks: Vec<Chunk>) -> Sent {
        Sent {
            job,
            format,
            message: message.clone(),
            chunks,
        }
    }

    /// Whether this message would be the same.
    pub fn is(&self, job: JobId, format: Format, message: &Robj) -> bool {
        // SAFETY: on R's thread; both are alive.
        let same = unsafe { same_task(self.message.get(), message.get()) };
        self.job == job && self.format == format && same
    }

    /// Writes it to the hub again.
    ///
    /// # Errors
    /// When R jumped, because of an interrupt.
    pub fn send(
        &self,
        hub: &RefCell<Hub>,
        slice: Duration,
    ) -> std::result::Result<(), unwind::Jump> {
        let mut sending = Sending {
            hub,
            chunks: &self.chunks,
            slice,
        };
        unwind::protect(send_protected, &mut sending).map(drop)
    }
}

struct Sending<'a> {
    hub: &'a RefCell<Hub>,
    chunks: &'a [Chunk],
    slice: Duration,
}

/// Chunks submitted at a time.
const AT_ONCE: usize = 32;

unsafe extern "C" fn send_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the sending of `Sent::send`, which outlives this call. When check_interrupt
    // jumps, this frame holds nothing that is to be dropped.
    unsafe {
        let sending = &*data.cast::<Sending<'_>>();
        for chunks in sending.chunks.chunks(AT_ONCE) {
            let mut wait = sending.hub.borrow_mut().write_chunks(chunks);
            while wait {
                wait = sending.hub.borrow_mut().wait_to_send(sending.slice);
                unwind::check_interrupt();
            }
        }
        R_NilValue
    }
}

/// Values that are looked at to tell a message's size.
const LOOKED_AT: usize = 1_000;

/// Bytes that this message takes at least when it is serialized, as far as a few looks tell.
pub fn least_size(message: &Robj) -> usize {
    // SAFETY: on R's thread, with a live value.
    unsafe { least_size_of_value(message.get()) }
}

/// The same of any value.
///
/// # Safety
/// On R's thread, with a live value. R does not jump.
pub unsafe fn least_size_of_value(value: SEXP) -> usize {
    // SAFETY: the caller's.
    unsafe { least_size_of(value, &mut { LOOKED_AT }) }
}

/// # Safety
/// On R's thread, with a live value. R does not jump.
unsafe fn least_size_of(value: SEXP, looks: &mut usize) -> usize {
    // SAFETY: the caller's; types and lengths are looked at first.
    unsafe {
        // What is computed when it is looked at may be short when it is serialized.
        if *looks == 0 || ALTREP(value) != 0 {
            return 0;
        }
        *looks -= 1;
        let length = |value| usize::try_from(XLENGTH(value)).unwrap_or(0);
        match TYPEOF(value) {
            SEXPTYPE::RAWSXP => length(value),
            SEXPTYPE::LGLSXP | SEXPTYPE::INTSXP => 4 * length(value),
            SEXPTYPE::REALSXP | SEXPTYPE::STRSXP => 8 * length(value),
            SEXPTYPE::CPLXSXP => 16 * length(value),
            SEXPTYPE::VECSXP => {
                let elements = 0..XLENGTH(value).min(LOOKED_AT as isize);
                elements
                    .map(|i| least_size_of(VECTOR_ELT(value, i), looks))
                    .sum()
            }
            _ => 0,
        }
    }
}

/// Whether two messages of parallel's ask for the same, of the very same values. Their lists are made
/// anew for each.
///
/// # Safety
/// On R's thread, with live values. R does not jump.
unsafe fn same_task(a: SEXP, b: SEXP) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let (Some(a), Some(b)) = (plain::task_of(a), plain::task_of(b)) else {
            return false;
        };
        let [(function, arguments, tag), (function_b, arguments_b, tag_b)] =
            [a, b].map(|[function, arguments, tag]| (function, arguments, tag));
        function == function_b
            && TYPEOF(tag) == SEXPTYPE::NILSXP
            && TYPEOF(tag_b) == SEXPTYPE::NILSXP
            && same_elements(arguments, arguments_b)
    }
}

/// # Safety
/// As for [`same_task`].
unsafe fn same_elements(a: SEXP, b: SEXP) -> bool {
    // SAFETY: the caller's; lengths and types are looked at first.
    unsafe {
        let list = |list: SEXP| TYPEOF(list) == SEXPTYPE::VECSXP;
        if !list(a) || !list(b) || XLENGTH(a) != XLENGTH(b) {
            return false;
        }
        let attributes = rustcluster_attributes(a);
        // None, or names alone.
        if attributes > 1 || attributes != rustcluster_attributes(b) {
            return false;
        }
        let length = XLENGTH(a);
        if !(0..length).all(|i| VECTOR_ELT(a, i) == VECTOR_ELT(b, i)) {
            return false;
        }
        if attributes == 0 {
            return true;
        }
        let (names, names_b) = (rustcluster_names(a), rustcluster_names(b));
        (0..length).all(|i| STRING_ELT(names, i) == STRING_ELT(names_b, i))
    }
}
