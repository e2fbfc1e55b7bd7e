//! Payloads whose large vectors are mapped by those who read them: see csrc/mapped.c.
//!
//! Such a payload begins with a head of [`HEAD`] bytes: [`MAPPED`], and from its 8th byte on how many
//! bytes the data of the vectors takes up, in the byte order of this machine. The data follows, each
//! vector's from a multiple of [`HEAD`] on, and then the value in R's serialization, with stand-ins
//! for the vectors.

use crate::stream::{self, Sink};
use crate::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, Rf_error, Rf_protect, Rf_unprotect, CAR, CDR, SEXP};
use rustcluster_core::scheduler::Body;
use rustcluster_core::worker::Payload;
use std::ffi::{c_char, c_int, c_void};
use std::os::fd::AsRawFd;

/// What a payload of this form begins with: see [`crate::plain`] and [`crate::unit`] for others.
const MAPPED: u8 = 5;

/// Also what the data of vectors is aligned to; csrc/mapped.c has it, too.
const HEAD: usize = 64;

/// Bytes of a vector that are written before interrupts are looked for.
const PIECE: usize = 64 * 1024;

// SEXP is a pointer to a type that is opaque on this side.
#[allow(improper_ctypes)]
unsafe extern "C" {
    fn rustcluster_stand_ins(message: *mut c_void, bytes: *mut f64) -> SEXP;
    fn rustcluster_vector_data(
        list: *mut c_void,
        data: *mut *const c_void,
        bytes: *mut usize,
    ) -> SEXP;
    fn rustcluster_begin_mapped(
        bytes: *const c_void,
        length: usize,
        from: usize,
        data: usize,
        file: c_int,
    );
    fn rustcluster_end_mapped();
}

struct Writer<'a> {
    sink: &'a mut dyn Sink,
    object: SEXP,
    fixed: bool,
}

/// Writes `object` to `sink` as a payload, in this form if it has large vectors, and otherwise in R's
/// serialization. Returns whether nothing in it can change.
///
/// # Errors
/// When R jumped: what was written by then is incomplete.
pub fn serialize(object: &Robj, sink: &mut dyn Sink) -> std::result::Result<bool, Jump> {
    let mut writer = Writer {
        sink,
        // SAFETY: the object is protected by its Robj.
        object: unsafe { object.get() },
        fixed: false,
    };
    unwind::run(write_protected, &mut writer)?;
    Ok(writer.fixed)
}

unsafe extern "C" fn write_protected(data: *mut c_void) -> SEXP {
    const CHANGED: *const c_char = c"a vector has changed while it was sent".as_ptr();
    // SAFETY: `data` is the writer of `serialize`, which outlives this call. R may jump out of all
    // that is called here, and this frame holds nothing that is to be dropped then. The message has
    // no format directive.
    unsafe {
        let writer = &mut *data.cast::<Writer<'_>>();
        let mut bytes = 0.0;
        let all = Rf_protect(rustcluster_stand_ins(writer.object.cast(), &raw mut bytes));
        let mut object = writer.object;
        if all != R_NilValue {
            let length = bytes as u64;
            let mut head = [0; HEAD];
            head[0] = MAPPED;
            head[8..16].copy_from_slice(&length.to_ne_bytes());
            stream::put(writer.sink, &head);
            let mut written = 0;
            let mut rest = CDR(all);
            while rest != R_NilValue {
                let (mut at, mut length) = (std::ptr::null(), 0);
                rest = rustcluster_vector_data(rest.cast(), &raw mut at, &raw mut length);
                if length == 0 {
                    break;
                }
                let bytes = std::slice::from_raw_parts(at.cast::<u8>(), length);
                for piece in bytes.chunks(PIECE) {
                    stream::put(writer.sink, piece);
                }
                let padded = length.next_multiple_of(HEAD);
                stream::put(writer.sink, &[0; HEAD][..padded - length]);
                written += padded as u64;
            }
            if written != length {
                Rf_error(CHANGED);
            }
            object = CAR(all);
        }
        writer.fixed = stream::write_fixed(object, writer.sink);
        Rf_unprotect(1);
        R_NilValue
    }
}

/// Bytes of the data of vectors. `None`: it is not of this form.
fn data(bytes: &[u8]) -> Option<usize> {
    let head = bytes.get(..HEAD).filter(|head| head[0] == MAPPED)?;
    let length = head[8..16].try_into().map(u64::from_ne_bytes).ok()?;
    let length = usize::try_from(length).ok()?;
    (length <= bytes.len() - HEAD).then_some(length)
}

/// The value of a payload, whether it is of this form or in R's serialization; not protected. `map`:
/// its vectors are mapped, if it is in shared memory, and not copied.
///
/// # Safety
/// Under [`unwind::protect`]: R may jump, and then [`end`] is to be called before the payload is
/// dropped.
pub unsafe fn read(payload: &Payload, map: bool) -> SEXP {
    let bytes = &payload.bytes[..];
    // SAFETY: the caller's; this frame holds nothing that is to be dropped when R jumps.
    unsafe {
        let Some(data) = data(bytes) else {
            return stream::read(&mut { bytes });
        };
        let memory = payload.memory.as_ref().filter(|_| map);
        let file = memory.map_or(-1, AsRawFd::as_raw_fd);
        rustcluster_begin_mapped(bytes.as_ptr().cast(), bytes.len(), HEAD, data, file);
        let value = stream::read(&mut &bytes[HEAD + data..]);
        rustcluster_end_mapped();
        value
    }
}

/// There is no payload any more whose vectors could be asked for.
pub fn end() {
    // SAFETY: on R's thread; does not jump.
    unsafe { rustcluster_end_mapped() };
}

/// A message of this form that came with the others instead of through shared memory: in one piece,
/// if there is memory for that. Its vectors are copied.
pub fn inline(body: &mut Body) -> Option<Payload> {
    if body.chunks.front()?.first() != Some(&MAPPED) {
        return None;
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(body.len).ok()?;
    while let Some(chunk) = body.chunks.pop_front() {
        bytes.extend_from_slice(&chunk);
    }
    body.len = 0;
    Some(Payload {
        bytes: bytes.into(),
        ..Payload::default()
    })
}
