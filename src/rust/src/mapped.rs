//! Payloads and answers whose large vectors are mapped by those who read them: see csrc/mapped.c.
//!
//! Such a payload begins with a head of [`HEAD`] bytes: [`MAPPED`], and from its 8th byte on how many
//! bytes the data of the vectors takes up, in the byte order of this machine. The data follows, each
//! vector's from a multiple of [`HEAD`] on, and then the value in R's serialization, with stand-ins
//! for the vectors. Of an answer, whatever it is besides stands in place of the value: see
//! [`crate::unit`].

use crate::stream::{self, Sink};
use crate::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, Rf_error, Rf_protect, Rf_unprotect, CAR, CDR, SEXP};
use rustcluster_core::scheduler::Body;
use rustcluster_core::signals::without_file_size_signal;
use rustcluster_core::worker::Payload;
use rustcluster_core::{cores, limits, sys};
use std::ffi::{c_char, c_int, c_void};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

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
    fn rustcluster_begin_mapped(message: *mut Message, before: *mut Message);
    fn rustcluster_end_mapped(before: *mut Message);
}

/// A message whose vectors are being read: `struct message` of csrc/mapped.c.
#[repr(C)]
struct Message {
    bytes: *const c_void,
    length: usize,
    from: usize,
    data: usize,
    mapping: *mut c_void,
    file: c_int,
    unmappable: c_int,
}

impl Message {
    /// Of which there is none.
    const NONE: Message = Message {
        bytes: std::ptr::null(),
        length: 0,
        from: 0,
        data: 0,
        mapping: std::ptr::null_mut(),
        file: -1,
        unmappable: 0,
    };

    /// One with so many bytes, of which so many are the data of its vectors.
    fn new(length: usize, data: usize, file: Option<&File>) -> Message {
        Message {
            length,
            from: HEAD,
            data,
            file: file.map_or(-1, AsRawFd::as_raw_fd),
            ..Message::NONE
        }
    }
}

/// While this lives, what is read has its vectors in one message. Then it is the turn of the message before,
/// which a finalizer may have interrupted, also if R has jumped in between.
pub struct Reading {
    before: Message,
}

impl Reading {
    fn begin(mut message: Message) -> Reading {
        let mut before = Message::NONE;
        // SAFETY: on R's thread. Copies both, and does not jump.
        unsafe { rustcluster_begin_mapped(&raw mut message, &raw mut before) };
        Reading { before }
    }

    /// Of the memory of an answer, which must live on; `None`: it has no vectors of this form.
    pub fn of(memory: Option<&Memory>) -> Reading {
        Reading::begin(memory.map_or(Message::NONE, |memory| {
            Message::new(memory.len, memory.data, Some(&memory.file))
        }))
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // SAFETY: on R's thread; does not jump.
        unsafe { rustcluster_end_mapped(&raw mut self.before) };
    }
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
    // SAFETY: `data` is the writer of `serialize`, which outlives this call. R may jump out of all
    // that is called here, and this frame holds nothing that is to be dropped then.
    unsafe {
        let writer = &mut *data.cast::<Writer<'_>>();
        let mut bytes = 0.0;
        let all = Rf_protect(rustcluster_stand_ins(writer.object.cast(), &raw mut bytes));
        let mut object = writer.object;
        if all != R_NilValue {
            put_data(all, bytes as u64, writer.sink);
            object = CAR(all);
        }
        writer.fixed = stream::write_fixed(object, writer.sink);
        Rf_unprotect(1);
        R_NilValue
    }
}

/// Writes the head of a payload and the data of its vectors, as `rustcluster_stand_ins` gives them.
///
/// # Safety
/// Under [`unwind::run`]: R may jump.
unsafe fn put_data(all: SEXP, length: u64, sink: &mut dyn Sink) {
    const CHANGED: *const c_char = c"a vector has changed while it was sent".as_ptr();
    // SAFETY: the caller's; this frame holds nothing that is to be dropped when R jumps. The message
    // has no format directive.
    unsafe {
        let mut head = [0; HEAD];
        head[0] = MAPPED;
        head[8..16].copy_from_slice(&length.to_ne_bytes());
        stream::put(sink, &head);
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
                stream::put(sink, piece);
            }
            let padded = length.next_multiple_of(HEAD);
            stream::put(sink, &[0; HEAD][..padded - length]);
            written += padded as u64;
        }
        if written != length {
            Rf_error(CHANGED);
        }
    }
}

/// An answer with so many bytes in large vectors is worth a file of its own.
const LARGE: f64 = 2097152.0;

/// Bytes of an answer that are written before it is looked again at what memory there is: other workers
/// write theirs at the same time.
const STEP: u64 = 16777216;

/// An answer that is put into memory which is shared with the head. Outlives a jump.
pub struct Answer {
    file: File,
    /// What is not long enough to be written alone.
    buffer: Vec<u8>,
    written: u64,
    /// About how many there will be.
    bytes: u64,
    /// From how many on it is to be looked at what memory there is.
    next_look: u64,
    /// Memory is scarce, for one.
    failed: bool,
}

impl Answer {
    /// One of about so many bytes. `None`: it is better sent otherwise, since memory is scarce.
    fn new(bytes: u64) -> Option<Answer> {
        let mut answer = Answer {
            file: sys::memory_file().ok()?,
            buffer: Vec::with_capacity(PIECE),
            written: 0,
            bytes,
            next_look: 0,
            failed: false,
        };
        answer.look(0);
        (!answer.failed).then_some(answer)
    }

    /// Whether there is room for what is left of it, if it is time to look: at least for so many bytes and
    /// [`STEP`] more.
    fn look(&mut self, bytes: u64) {
        if self.written + bytes < self.next_look || self.failed {
            return;
        }
        self.next_look = self.written + bytes + STEP;
        let left = self.bytes.saturating_sub(self.written).max(bytes + STEP);
        let plenty = |(all, available): (u64, u64)| left <= available / 8 && all / 16 <= available;
        self.failed = !limits::may_make_file(self.written.saturating_add(left))
            || !cores::host_memory().is_some_and(plenty);
    }

    fn put(&mut self, bytes: &[u8]) {
        let file = &mut self.file;
        let write = || file.write_all(bytes);
        self.failed = self.failed || without_file_size_signal(write).is_err();
    }

    fn flush(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        self.put(&buffer);
        self.buffer = buffer;
        self.buffer.clear();
    }

    /// All of it is there: its memory, which nobody can change any more, and its length. `None`: there
    /// was not enough memory.
    pub fn finish(mut self) -> Option<(File, u64)> {
        self.flush();
        let whole = !self.failed && sys::seal(&self.file).is_ok();
        whole.then_some((self.file, self.written))
    }
}

impl Sink for Answer {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.look(bytes.len() as u64);
        self.written += bytes.len() as u64;
        if self.buffer.len() + bytes.len() > PIECE {
            self.flush();
        }
        if bytes.len() < PIECE {
            self.buffer.extend_from_slice(bytes);
        } else {
            self.put(bytes);
        }
        false
    }
}

/// If a value has large vectors, and there is memory for that: puts their data into `answer`, and
/// returns the value with stand-ins for them, which is to be written behind them; it is not protected.
///
/// # Safety
/// Under [`unwind::run`], with a protected value: R may jump.
pub unsafe fn share(value: SEXP, answer: &mut Option<Answer>) -> Option<SEXP> {
    // SAFETY: the caller's; this frame holds nothing that is to be dropped when R jumps.
    unsafe {
        let mut bytes = 0.0;
        let all = Rf_protect(rustcluster_stand_ins(value.cast(), &raw mut bytes));
        if bytes >= LARGE {
            *answer = Answer::new(bytes as u64);
        }
        if let Some(answer) = answer {
            put_data(all, bytes as u64, answer);
        }
        Rf_unprotect(1);
        answer.as_ref().map(|_| CAR(all))
    }
}

/// The memory of an answer whose vectors are to be mapped.
pub struct Memory {
    file: Arc<File>,
    len: usize,
    /// Bytes of the data of vectors.
    data: usize,
}

/// The memory of an answer, if it is in shared memory; what is behind the data of its vectors is then
/// in `body`. If it makes no sense, there is nothing in `body`.
pub fn open(body: &mut Body) -> Option<Memory> {
    let memory = body.memory.take()?;
    let (file, len) = (memory.file?, memory.len);
    body.len = 0;
    let opened = || -> io::Result<(usize, Vec<u8>)> {
        let mut head = [0; HEAD];
        file.read_exact_at(&mut head, 0)?;
        let data = data(&head, len).ok_or(io::ErrorKind::InvalidData)?;
        let mut rest = Vec::new();
        rest.try_reserve_exact(len - HEAD - data)?;
        rest.resize(len - HEAD - data, 0);
        file.read_exact_at(&mut rest, (HEAD + data) as u64)?;
        Ok((data, rest))
    };
    let (data, rest) = opened().ok()?;
    body.len = rest.len();
    body.chunks.push_back(rest.into());
    Some(Memory { file, len, data })
}

/// Bytes of the data of vectors in a payload of so many bytes, given its beginning. `None`: it is not of
/// this form.
fn data(bytes: &[u8], len: usize) -> Option<usize> {
    let head = bytes.get(..HEAD).filter(|head| head[0] == MAPPED)?;
    let length = head[8..16].try_into().map(u64::from_ne_bytes).ok()?;
    let length = usize::try_from(length).ok()?;
    (length <= len.checked_sub(HEAD)?).then_some(length)
}

/// The value of a payload, whether it is of this form or in R's serialization; not protected. `map`:
/// its vectors are mapped, if it is in shared memory, and not copied.
///
/// # Safety
/// Under [`unwind::protect`], with a [`Reading`] outside of it that ends before the payload is dropped: R
/// may jump.
pub unsafe fn read(payload: &Payload, map: bool) -> SEXP {
    let bytes = &payload.bytes[..];
    // SAFETY: the caller's; this frame holds nothing that is to be dropped when R jumps.
    unsafe {
        let Some(data) = data(bytes, bytes.len()) else {
            return stream::read(&mut { bytes });
        };
        let memory = payload.memory.as_ref().filter(|_| map);
        let mut message = Message::new(bytes.len(), data, memory.map(|file| &**file));
        message.bytes = bytes.as_ptr().cast();
        let mut before = Message::NONE;
        rustcluster_begin_mapped(&raw mut message, &raw mut before);
        let value = Rf_protect(stream::read(&mut &bytes[HEAD + data..]));
        rustcluster_end_mapped(&raw mut before);
        Rf_unprotect(1);
        value
    }
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
