//! Blobs and answers whose large vectors are mapped by their readers: see csrc/mapped.c.
//!
//! A message of this form starts with the byte [`MAPPED`]. R's serialization of the value follows, with a gap
//! for each large vector: the stream contains an ALTREP object of a class of this package instead, and the data
//! of the vector is in the gap, from a multiple of [`ALIGNED`] on. The list of gaps is at the end, each with
//! its start and its length, and then the number of gaps. Other parts of an answer precede the value: see
//! [`crate::codec::batch`]. All numbers have 8 bytes, in the byte order of this machine.
//!
//! [`Mapper`] inserts the gaps while R serializes. It therefore finds large vectors anywhere, also in
//! environments and in attributes. It relies on how R's binary format writes a vector: flags and length, four
//! bytes each, and then the data, without a copy and in pieces of 8,096 elements.

use super::stream::{self, Sink, Source};
use crate::r::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, Rf_protect, Rf_unprotect, SEXP};
use rustcluster_core::platform::signals::without_file_size_signal;
use rustcluster_core::platform::{limits, memfd, memory};
use rustcluster_core::protocol::body::{Body, Memory};
use rustcluster_core::worker::channel::Blob;
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The first byte of a message of this form: see [`crate::codec::plain`] and [`crate::codec::batch`] for
/// others.
const MAPPED: u8 = 5;

/// Alignment of the data of a vector in bytes. csrc/mapped.c has the same constant.
const ALIGNED: u64 = 64;

/// Minimum size of a vector that is mapped, in bytes. csrc/mapped.c has the same constant.
const LARGE_VECTOR: u64 = 65536;

/// Number of elements of the pieces in which R writes the data of a vector.
const ELEMENTS_AT_ONCE: usize = 8096;

/// Sizes of an entry in the list of gaps, and of a number, in bytes.
const GAP: usize = 16;
const NUMBER: usize = 8;

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_large_bytes(value: *mut c_void, depth: c_int) -> f64;
    fn rustcluster_with_classes(value: *mut c_void) -> SEXP;
    fn rustcluster_without_classes(list: *mut c_void) -> SEXP;
    fn rustcluster_begin_mapped(message: *mut MappedMessage, before: *mut MappedMessage);
    fn rustcluster_end_mapped(before: *mut MappedMessage);
}

/// A message whose vectors are being read: `struct message` of csrc/mapped.c.
#[repr(C)]
struct MappedMessage {
    bytes: *const c_void,
    length: usize,
    mapping: *mut c_void,
    file: c_int,
    unmappable: c_int,
}

impl MappedMessage {
    /// Stands for no message.
    const NONE: MappedMessage = MappedMessage {
        bytes: std::ptr::null(),
        length: 0,
        mapping: std::ptr::null_mut(),
        file: -1,
        unmappable: 0,
    };

    /// Creates the value for a message of this length.
    fn new(length: usize, file: Option<&File>) -> MappedMessage {
        MappedMessage {
            length,
            file: file.map_or(-1, AsRawFd::as_raw_fd),
            ..MappedMessage::NONE
        }
    }
}

/// While this value lives, vectors that are read are those of one message. Its end restores the message before,
/// whose reading a finalizer may have interrupted. That also works if R has jumped in between.
pub struct MappedReading {
    before: MappedMessage,
}

impl MappedReading {
    fn begin(mut message: MappedMessage) -> MappedReading {
        let mut before = MappedMessage::NONE;
        // SAFETY: this runs on R's thread. The function copies both, and does not jump.
        unsafe { rustcluster_begin_mapped(&raw mut message, &raw mut before) };
        MappedReading { before }
    }

    /// Starts to read the vectors of an answer in this memory, which has to outlive the value. `None`: the
    /// answer has no vectors of this form.
    pub fn of(memory: Option<&MappedMemory>) -> MappedReading {
        MappedReading::begin(memory.map_or(MappedMessage::NONE, |memory| {
            MappedMessage::new(memory.len, Some(&memory.file))
        }))
    }
}

impl Drop for MappedReading {
    fn drop(&mut self) {
        // SAFETY: this runs on R's thread; the function does not jump.
        unsafe { rustcluster_end_mapped(&raw mut self.before) };
    }
}

/// Words of R's serialization format (serialize.c): types of items, flags, and the type of a reference, with
/// which its index is packed.
mod word {
    pub const PAIRLIST: i32 = 2;
    pub const LOGICALS: i32 = 10;
    pub const INTEGERS: i32 = 13;
    pub const REALS: i32 = 14;
    pub const COMPLEXES: i32 = 15;
    pub const RAWS: i32 = 24;
    pub const ALTREP: i32 = 238;
    pub const NIL: i32 = 254;
    pub const REFERENCE: i32 = 255;
    pub const TYPE: i32 = 0xff;
    pub const HAS_ATTRIBUTES: i32 = 1 << 9;
    pub const HAS_TAG: i32 = 1 << 10;
}

/// Returns the class of a vector: the index by which the stream refers to the name of the class, and the bytes
/// of an element. The names of the classes are the first symbols in the stream. The second symbol is the name
/// of the package.
fn class_of(kind: i32) -> Option<(i32, u64)> {
    match kind {
        word::LOGICALS => Some((1, 4)),
        word::INTEGERS => Some((3, 4)),
        word::REALS => Some((4, 8)),
        word::COMPLEXES => Some((5, 16)),
        word::RAWS => Some((6, 1)),
        _ => None,
    }
}
const PACKAGE: i32 = 2;

fn reference(index: i32) -> i32 {
    (index << 8) | word::REFERENCE
}

/// Passes on the bytes of R's serialization, with gaps for the data of large vectors.
pub struct Mapper<S> {
    sink: S,
    /// The number of bytes that have been passed on.
    at: u64,
    /// The last writes of four bytes each, at most four. They may be the flags and the length of a vector whose
    /// data comes next.
    pending: Vec<u8>,
    /// The number of bytes that are still missing in the current gap.
    left: u64,
    /// Whether the vector has no attributes, which R would write behind its data.
    bare: bool,
    gaps: Vec<u8>,
    tail: Vec<u8>,
}

impl<S: Sink> Mapper<S> {
    pub fn new(sink: S) -> Mapper<S> {
        let mut mapper = Mapper {
            sink,
            at: 0,
            pending: Vec::with_capacity(16),
            left: 0,
            bare: false,
            gaps: Vec::new(),
            tail: Vec::new(),
        };
        mapper.pass(&[MAPPED]);
        mapper
    }

    fn pass(&mut self, bytes: &[u8]) -> bool {
        self.at += bytes.len() as u64;
        self.sink.write(bytes)
    }

    fn pass_pending(&mut self, count: usize) -> bool {
        let pending = std::mem::take(&mut self.pending);
        let wait = self.pass(&pending[..count]);
        self.pending = pending;
        self.pending.drain(..count);
        wait
    }

    /// Returns a pending word; 0 is the last one.
    fn word(&self, back: usize) -> Option<i32> {
        let at = self.pending.len().checked_sub(4 * (back + 1))?;
        let bytes = self.pending.get(at..at + 4)?;
        bytes.try_into().ok().map(i32::from_ne_bytes)
    }

    /// Returns, if these bytes are the first of a large vector's data, the number of words that preceded them,
    /// the vector's flags, and its length.
    fn vector(&self, bytes: &[u8]) -> Option<(usize, i32, u64)> {
        let last = self.word(0)?;
        let is_data = |words: usize, length: u64| {
            let flags = self.word(words - 1)?;
            let (_, size) = class_of(flags & word::TYPE)?;
            let first = length.min(ELEMENTS_AT_ONCE as u64).checked_mul(size)?;
            let is_large = length.checked_mul(size)? >= LARGE_VECTOR;
            let is_data = is_large && bytes.len() as u64 == first;
            (is_data && !stream::is_parse_data(bytes)).then_some((words, flags, length))
        };
        let short = u64::try_from(last).ok().and_then(|last| is_data(2, last));
        short.or_else(|| {
            // A long vector has -1 here, and then its length in two words.
            self.word(2).filter(|&mark| mark == -1)?;
            let unsigned = |word: i32| u64::from(word as u32);
            is_data(4, (unsigned(self.word(1)?) << 32) | unsigned(last))
        })
    }

    /// Starts a gap for a vector with these flags and this length.
    fn begin(&mut self, flags: i32, length: u64) -> bool {
        let kind = flags & word::TYPE;
        let Some((class, size)) = class_of(kind) else {
            return false;
        };
        let kept = flags & !(word::TYPE | word::HAS_ATTRIBUTES | word::HAS_TAG);
        let words = [
            kept | word::ALTREP,
            word::PAIRLIST,
            reference(class),
            word::PAIRLIST,
            reference(PACKAGE),
            word::PAIRLIST,
            word::INTEGERS,
            1,
            kind,
            word::NIL,
            word::REALS,
            2,
        ];
        let item = 4 * words.len() as u64 + 2 * NUMBER as u64;
        let end = self.at + item;
        let data = end.next_multiple_of(ALIGNED);
        self.left = length * size;
        self.bare = flags & word::HAS_ATTRIBUTES == 0;
        for number in [end, data - end + self.left] {
            self.gaps.extend_from_slice(&number.to_ne_bytes());
        }
        let mut out = Vec::with_capacity((data - self.at) as usize);
        for word in words {
            out.extend_from_slice(&word.to_ne_bytes());
        }
        for number in [data as f64, length as f64] {
            out.extend_from_slice(&number.to_ne_bytes());
        }
        out.resize((data - self.at) as usize, 0);
        self.pass(&out)
    }

    /// Ends the value. The tail gets the bytes that follow: the pending words, and the list of gaps.
    fn close(&mut self) {
        self.tail = std::mem::take(&mut self.pending);
        self.tail.extend_from_slice(&self.gaps);
        let count = (self.gaps.len() / GAP) as u64;
        self.tail.extend_from_slice(&count.to_ne_bytes());
    }
}

impl<S: Sink> Sink for Mapper<S> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        let mut wait = false;
        if self.left > 0 {
            wait |= self.pass(bytes);
        } else if bytes.len() == 4 {
            if self.pending.len() == 16 {
                wait |= self.pass_pending(4);
            }
            self.pending.extend_from_slice(bytes);
            return wait;
        } else if let Some((words, flags, length)) = self.vector(bytes) {
            let before = self.pending.len() - 4 * words;
            wait |= self.pass_pending(before);
            self.pending.clear();
            wait |= self.begin(flags, length);
            wait |= self.pass(bytes);
        } else {
            wait |= self.pass_pending(self.pending.len());
            return wait | self.pass(bytes);
        }
        self.left = self.left.saturating_sub(bytes.len() as u64);
        if self.left == 0 && self.bare {
            wait |= self.pass(&word::NIL.to_ne_bytes());
        }
        wait
    }

    fn wait(&mut self) -> bool {
        self.sink.wait()
    }
}

struct MappedWriter<'a> {
    mapper: Mapper<&'a mut dyn Sink>,
    object: SEXP,
    fixed: bool,
}

/// Facts about an object that has been written.
#[derive(Clone, Copy, Debug)]
pub struct MappedSize {
    /// Whether nothing in the object can change.
    pub fixed: bool,
    /// The number of bytes that have to be read: all but the data of large vectors.
    pub bytes: u64,
}

/// Writes `object` to `sink` as a message of this form.
///
/// # Errors
/// If R jumped. The bytes that were written before the jump are incomplete.
pub fn serialize(object: &Robj, sink: &mut dyn Sink) -> std::result::Result<MappedSize, Jump> {
    let mut writer = MappedWriter {
        mapper: Mapper::new(sink),
        // SAFETY: the object is protected by its Robj.
        object: unsafe { object.get() },
        fixed: false,
    };
    unwind::run(write_protected, &mut writer)?;
    let in_gaps: usize = gaps(&writer.mapper.gaps).map(|(at, to)| to - at).sum();
    Ok(MappedSize {
        fixed: writer.fixed,
        bytes: writer.mapper.at - in_gaps as u64,
    })
}

unsafe extern "C" fn write_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the writer of `serialize`, which outlives this call. R may jump out of any function
    // that is called here, and this frame owns nothing that needs to be dropped then.
    unsafe {
        let writer = &mut *data.cast::<MappedWriter<'_>>();
        let all = Rf_protect(rustcluster_with_classes(writer.object.cast()));
        let mapper = &mut writer.mapper;
        writer.fixed = stream::write_fixed(all, mapper);
        mapper.close();
        stream::put(mapper.sink, &mapper.tail);
        Rf_unprotect(1);
        R_NilValue
    }
}

/// Minimum size of the large vectors of an answer that gets a file of its own, in bytes.
const LARGE_ANSWER: f64 = 2_097_152.0;

/// Bytes of an answer that are written between two checks of the available memory. Other workers write their
/// answers at the same time.
const STEP: u64 = 16_777_216;

/// Bytes that are written to the file at a time.
const PIECE: usize = 64 * 1024;

/// An answer that is written into memory that the head shares. The value outlives a jump.
pub struct MappedAnswer {
    file: File,
    /// Bytes that are too few to be written alone.
    buffer: Vec<u8>,
    written: u64,
    /// The approximate final number of bytes.
    bytes: u64,
    /// The number of bytes at which the available memory is checked next.
    next_check: u64,
    /// Whether the answer has failed, for example because memory is scarce.
    failed: bool,
}

impl MappedAnswer {
    /// Creates an answer of about this number of bytes. Returns `None` if memory is scarce: the answer is then
    /// better sent through the stream.
    fn new(bytes: u64) -> Option<MappedAnswer> {
        let mut answer = MappedAnswer {
            file: memfd::memory_file().ok()?,
            buffer: Vec::with_capacity(PIECE),
            written: 0,
            bytes,
            next_check: 0,
            failed: false,
        };
        answer.check_room(0);
        (!answer.failed).then_some(answer)
    }

    /// Checks, at intervals of [`STEP`] bytes, whether there is room for the rest of the answer, and at least
    /// for `bytes` and [`STEP`] more.
    fn check_room(&mut self, bytes: u64) {
        if self.written + bytes < self.next_check || self.failed {
            return;
        }
        self.next_check = self.written + bytes + STEP;
        let left = self.bytes.saturating_sub(self.written).max(bytes + STEP);
        let plenty = |(all, available): (u64, u64)| left <= available / 8 && all / 16 <= available;
        self.failed = !limits::may_make_file(self.written.saturating_add(left))
            || !memory::host_memory().is_some_and(plenty);
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

    /// Ends the answer. Returns its memory, which nobody can change any more, and its length, or `None` if
    /// there was not enough memory.
    fn finish(mut self) -> Option<(File, u64)> {
        self.flush();
        let whole = !self.failed && memfd::seal(&self.file).is_ok();
        whole.then_some((self.file, self.written))
    }
}

impl Mapper<MappedAnswer> {
    /// Ends the answer: see [`MappedAnswer::finish`].
    pub fn finish(mut self) -> Option<(File, u64)> {
        self.close();
        let tail = std::mem::take(&mut self.tail);
        self.sink.write(&tail);
        self.sink.finish()
    }
}

impl Sink for MappedAnswer {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.check_room(bytes.len() as u64);
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

/// Returns, if a value has large vectors and there is enough memory, an answer in shared memory, and the object
/// to be written there in place of the value, which is not protected.
///
/// # Safety
/// Must be called under [`unwind::run`], with a protected value: R may jump.
pub unsafe fn share(value: SEXP) -> Option<(Mapper<MappedAnswer>, SEXP)> {
    // SAFETY: guaranteed by the caller; this frame owns nothing that needs to be dropped when R jumps.
    unsafe {
        let bytes = rustcluster_large_bytes(value.cast(), 0);
        if bytes < LARGE_ANSWER {
            return None;
        }
        let instead = rustcluster_with_classes(value.cast());
        Some((Mapper::new(MappedAnswer::new(bytes as u64)?), instead))
    }
}

/// Returns the value in place of which [`share`] has returned this object, as it was read. R jumps if the
/// object is of another kind.
///
/// # Safety
/// Must be called under [`unwind::run`].
pub unsafe fn unwrap(value: SEXP) -> SEXP {
    // SAFETY: guaranteed by the caller.
    unsafe { rustcluster_without_classes(value.cast()) }
}

/// The memory of an answer whose vectors are to be mapped.
pub struct MappedMemory {
    file: Arc<File>,
    len: usize,
}

/// Returns the gaps in a list, as their starts and ends.
fn gaps(list: &[u8]) -> impl Iterator<Item = (usize, usize)> + '_ {
    let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_ne_bytes) as usize;
    list.chunks_exact(GAP).map(move |gap| {
        let (at, len) = gap.split_at(NUMBER);
        (number(at), number(at).saturating_add(number(len)))
    })
}

/// Returns whether the gaps are in ascending order, do not overlap, and end at `end` at the latest.
fn are_in_order(list: &[u8], end: usize) -> bool {
    let mut before = 1;
    gaps(list).all(|(at, to)| {
        let is = before <= at && to <= end;
        before = to;
        is
    }) && before <= end
}

/// Returns where the list of gaps starts in a message of this length, given the last bytes of the message.
fn list_begin(len: usize, last: [u8; NUMBER]) -> Option<usize> {
    let count = usize::try_from(u64::from_ne_bytes(last)).ok()?;
    let list = count.checked_mul(GAP)?.checked_add(NUMBER)?;
    len.checked_sub(list).filter(|&begin| begin >= 1)
}

/// Puts an answer of this form, whose bytes have been copied, into shared memory again. Other answers are returned as they
/// are.
///
/// # Errors
/// When the system has no memory.
pub fn in_memory(body: Body) -> io::Result<Body> {
    let is_mapped = |bytes: &[u8]| bytes.first() == Some(&MAPPED);
    if body.memory.is_some() || !body.chunks.front().is_some_and(|chunk| is_mapped(chunk)) {
        return Ok(body);
    }
    let mut file = memfd::memory_file()?;
    for chunk in &body.chunks {
        file.write_all(chunk)?;
    }
    memfd::seal(&file)?;
    Ok(Body {
        chunks: [].into(),
        len: body.len,
        memory: Some(Memory::new(body.len, Some(Arc::new(file)))),
    })
}

/// Returns the memory of an answer, if the answer is in shared memory. `body` gets the stream of the answer,
/// without the gaps, or nothing if the answer is malformed.
pub fn open(body: &mut Body) -> Option<MappedMemory> {
    let memory = body.memory.take()?;
    let (file, len) = (memory.file?, memory.len);
    body.len = 0;
    let piece = |from: usize, to: usize| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(to - from)?;
        bytes.resize(to - from, 0);
        file.read_exact_at(&mut bytes, from as u64)?;
        Ok(bytes)
    };
    let opened = || -> io::Result<Vec<Vec<u8>>> {
        let bad = || io::Error::from(io::ErrorKind::InvalidData);
        let last = len.checked_sub(NUMBER).ok_or_else(bad)?;
        let count = piece(last, len)?.try_into().map_err(|_| bad())?;
        let end = list_begin(len, count).ok_or_else(bad)?;
        if piece(0, 1)? != [MAPPED] {
            return Err(bad());
        }
        let list = piece(end, last)?;
        if !are_in_order(&list, end) {
            return Err(bad());
        }
        let begins = std::iter::once(1).chain(gaps(&list).map(|gap| gap.1));
        let ends = gaps(&list).map(|gap| gap.0).chain(std::iter::once(end));
        begins.zip(ends).map(|(from, to)| piece(from, to)).collect()
    };
    for piece in opened().ok()? {
        body.len += piece.len();
        body.chunks.push_back(piece.into());
    }
    Some(MappedMemory { file, len })
}

/// The stream of a message of this form, without the gaps. Owns nothing that needs to be dropped, because R may
/// jump while the stream is read.
struct Gapped<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The list of gaps that have not been reached.
    gaps: &'a [u8],
}

impl Gapped<'_> {
    /// Returns `None` if the message is not of this form.
    fn new(bytes: &[u8]) -> Option<Gapped<'_>> {
        let last = *bytes.last_chunk()?;
        let end = list_begin(bytes.len(), last).filter(|_| bytes[0] == MAPPED)?;
        let gaps = bytes.get(end..bytes.len() - NUMBER)?;
        are_in_order(gaps, end).then_some(Gapped {
            bytes: &bytes[..end],
            at: 1,
            gaps,
        })
    }
}

impl Source for Gapped<'_> {
    fn fill(&mut self, mut out: &mut [u8]) -> bool {
        while !out.is_empty() {
            let next = gaps(self.gaps).next();
            let until = next.map_or(self.bytes.len(), |gap| gap.0);
            if self.at == until {
                let Some((_, end)) = next else {
                    return false;
                };
                self.at = end;
                self.gaps = &self.gaps[GAP..];
                continue;
            }
            let n = out.len().min(until - self.at);
            let (now, later) = out.split_at_mut(n);
            now.copy_from_slice(&self.bytes[self.at..self.at + n]);
            self.at += n;
            out = later;
        }
        true
    }
}

/// Returns the value of a blob of this form or in R's serialization. The value is not protected. `map`: whether
/// the vectors of a blob in shared memory are mapped, and not copied.
///
/// # Safety
/// Must be called under [`unwind::protect`], with a [`MappedReading`] outside of it that ends before the blob
/// is dropped: R may jump.
pub unsafe fn read(blob: &Blob, map: bool) -> SEXP {
    let bytes = &blob.bytes[..];
    // SAFETY: guaranteed by the caller; this frame owns nothing that needs to be dropped when R jumps.
    unsafe {
        let Some(mut stream) = Gapped::new(bytes) else {
            return stream::read(&mut { bytes });
        };
        let memory = blob.memory.as_ref().filter(|_| map);
        let mut message = MappedMessage::new(bytes.len(), memory.map(|file| &**file));
        message.bytes = bytes.as_ptr().cast();
        let mut before = MappedMessage::NONE;
        rustcluster_begin_mapped(&raw mut message, &raw mut before);
        let value = Rf_protect(unwrap(stream::read(&mut stream)));
        rustcluster_end_mapped(&raw mut before);
        Rf_unprotect(1);
        value
    }
}

/// Returns a message of this form that arrived through the stream instead of shared memory, in one piece, if
/// there is enough memory for that. Its vectors are copied when it is read.
pub fn inline(body: &mut Body) -> Option<Blob> {
    if body.chunks.front()?.first() != Some(&MAPPED) {
        return None;
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(body.len).ok()?;
    while let Some(chunk) = body.chunks.pop_front() {
        bytes.extend_from_slice(&chunk);
    }
    body.len = 0;
    Some(Blob {
        bytes: bytes.into(),
        ..Blob::default()
    })
}
