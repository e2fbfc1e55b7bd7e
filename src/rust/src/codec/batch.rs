//! Batches: tasks of a job that are sent together, and their answers. The message of a batch starts with a
//! blob, the list of the function and of the arguments that the tasks have in common.
//!
//! The first byte of a value says whether it is plain (see [`crate::codec::plain`]) or in R's serialization.
//! All numbers are in the byte order of this machine.

use super::stream::{self, Format, Sink, Source};
use super::{mapped, plain};
use extendr_api::prelude::*;
use extendr_ffi::{Rf_error, SEXP};
use rustcluster_core::head::activity::Measured;
use rustcluster_core::platform::clock;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::store::save::Saved;
use std::ffi::{c_char, c_int};
use std::time::Duration;

/// The first byte of a message of this form: see [`crate::codec::plain`] for others.
pub const BATCH: u8 = 3;
pub const BATCH_ANSWER: u8 = 4;

/// The elements are lists of arguments.
pub const SPREAD: u8 = 1;
/// A state of the random number generator precedes each element.
pub const SEEDED: u8 = 2;
/// The batch stands for a chunk of parallel: its tasks share the common function and arguments, which are read
/// once. Without this flag, each task gets objects of its own.
pub const CHUNK: u8 = 4;
/// The tasks share the function, which is read once. Each task gets arguments of its own, if these can be
/// copied without the function.
pub const FUNCTION: u8 = 8;
/// The results are stored: none of them is in the form of [`crate::codec::mapped`], and each but the last has a length,
/// so that they can be stored without being read. See [`crate::codec::stored`].
pub const STORED: u8 = 16;

/// The results are saved by the worker. A request ([`rustcluster_core::store::save`]) follows the head of the batch, after its length, and the number
/// of its element in the run precedes each element. A [`Saved`] follows the head of the answer.
pub const SAVED: u8 = 32;

/// The first byte of a result: a value, or the value of an error, follows.
pub const VALUE: u8 = 1;
pub const ERROR: u8 = 2;

pub(super) const PLAIN: u8 = 1;
pub(super) const SERIALIZED: u8 = 2;
/// The value is serialized as in [`crate::codec::mapped`].
const GAPPED: u8 = 3;
/// The length of the value, 8 bytes, precedes its serialization.
pub(super) const SIZED: u8 = 4;
/// The value is only in the directory of the run, where the worker has saved it.
pub(super) const IN_RUN: u8 = 5;

/// The number of integers in a state of L'Ecuyer's generator, including its kind.
pub const SEED: usize = 7;

/// The head of a batch. The elements follow, each after its seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    pub flags: u8,
    pub count: u32,
    /// Microseconds after which no more tasks of the batch are started; 0 for no limit.
    pub max_micros: u32,
}

/// The size of the head of a batch, in bytes.
pub const HEAD: usize = 10;

impl Head {
    pub fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[BATCH, self.flags]);
        out.extend_from_slice(&self.count.to_ne_bytes());
        out.extend_from_slice(&self.max_micros.to_ne_bytes());
    }

    /// Returns the time by [`clock::coarse_now`] until which tasks may be started, if the first one is started
    /// now. `None`: no limit.
    pub fn until(self) -> Option<Duration> {
        let max_micros = Duration::from_micros(self.max_micros.into());
        (!max_micros.is_zero()).then(|| clock::coarse_now() + max_micros)
    }

    /// Replaces the count in a message that starts with a head.
    pub fn count(message: &mut [u8], count: u32) {
        if let Some(at) = message.get_mut(2..6) {
            at.copy_from_slice(&count.to_ne_bytes());
        }
    }

    /// Takes the head off the front of a message, if the message is a batch.
    pub fn read(body: &mut Body) -> Option<Head> {
        let mut bytes = [0; HEAD];
        if body.chunks.front()?.first() != Some(&BATCH) || !body.fill(&mut bytes) {
            return None;
        }
        let [_, flags, numbers @ ..] = bytes;
        let (count, max_micros) = numbers.split_first_chunk()?;
        Some(Head {
            flags,
            count: u32::from_ne_bytes(*count),
            max_micros: u32::from_ne_bytes(*max_micros.first_chunk()?),
        })
    }
}

/// The size of the head of an answer, in bytes.
pub const ANSWER_HEAD: usize = 29;

/// The head of the answer to a batch. The results follow.
#[derive(Clone, Copy, Debug, Default)]
pub struct AnswerHead {
    /// The duration of the batch in seconds.
    pub seconds: f64,
    /// The seconds of that time for which the worker had a core, if it has not waited for anything in between.
    pub computed: Option<f64>,
    /// The seconds, not part of the duration, in which the worker read the objects that the tasks share: see
    /// [`CHUNK`].
    pub reading: f64,
    /// The number of answered tasks, from the first task of the batch.
    pub count: u32,
}

impl AnswerHead {
    pub fn write(self, out: &mut Vec<u8>) {
        out.push(BATCH_ANSWER);
        out.extend_from_slice(&self.seconds.to_ne_bytes());
        out.extend_from_slice(&self.computed.unwrap_or(f64::NAN).to_ne_bytes());
        out.extend_from_slice(&self.reading.to_ne_bytes());
        out.extend_from_slice(&self.count.to_ne_bytes());
    }

    /// Takes the head off the front of an answer, if the answer is that of a batch.
    pub fn read(body: &mut Body) -> Option<AnswerHead> {
        let mut bytes = [0; ANSWER_HEAD];
        if body.chunks.front()?.first() != Some(&BATCH_ANSWER) || !body.fill(&mut bytes) {
            return None;
        }
        AnswerHead::of(&bytes)
    }

    /// Parses the head of an answer, if the answer is that of a batch.
    fn of(bytes: &[u8]) -> Option<AnswerHead> {
        let (&kind, rest) = bytes.split_first()?;
        let (seconds, rest) = rest.split_first_chunk().filter(|_| kind == BATCH_ANSWER)?;
        let (computed, rest) = rest.split_first_chunk()?;
        let (reading, count) = rest.split_first_chunk()?;
        let computed = f64::from_ne_bytes(*computed);
        Some(AnswerHead {
            seconds: f64::from_ne_bytes(*seconds),
            computed: (!computed.is_nan()).then_some(computed),
            reading: f64::from_ne_bytes(*reading),
            count: u32::from_ne_bytes(*count.first_chunk()?),
        })
    }
}

/// Returns the duration that the first bytes of an answer contain. An answer in R's serialization contains it
/// at its end, and has none here.
pub fn measure(bytes: &[u8]) -> Option<Measured> {
    let batch = AnswerHead::of(bytes).map(|head| Measured {
        seconds: head.seconds,
        tasks: head.count,
    });
    let alone = || plain::elapsed(bytes).map(|seconds| Measured { seconds, tasks: 1 });
    batch.or_else(alone)
}

/// Returns whether an answer has the result of one task, in the form of [`plain`].
pub fn is_plain_result(bytes: &[u8]) -> bool {
    AnswerHead::of(bytes).is_some_and(|head| head.count == 1)
        && bytes.get(ANSWER_HEAD + 1) == Some(&PLAIN)
}

/// Appends a value to `out` if it is plain. Returns whether it is plain.
///
/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
pub unsafe fn append_plain(value: SEXP, out: &mut Vec<u8>) -> bool {
    let before = out.len();
    out.extend_from_slice(&[PLAIN, 0, 0, 0, 0]);
    // SAFETY: guaranteed by the caller.
    if !unsafe { plain::append_value(value, out) } {
        out.truncate(before);
        return false;
    }
    let length = (out.len() - before - 5) as u32;
    out[before + 1..before + 5].copy_from_slice(&length.to_ne_bytes());
    true
}

/// Writes the first byte of a value that is not plain. [`stream::write`] or [`stream::serialize`] follows.
pub fn begin_serialized(sink: &mut dyn Sink) {
    sink.write(&[SERIALIZED]);
}

/// Writes a value that is not plain.
///
/// # Safety
/// Must be called under [`crate::r::unwind::protect`], with a protected value: R may jump.
pub unsafe fn write_serialized(value: SEXP, sink: &mut dyn Sink) {
    begin_serialized(sink);
    // SAFETY: guaranteed by the caller.
    unsafe { stream::write(value, Format::Native, sink) };
}

/// Appends a value that is not plain after its length.
///
/// # Safety
/// The same as for [`write_serialized`].
pub unsafe fn append_sized(value: SEXP, out: &mut Vec<u8>) {
    out.extend_from_slice(&[SIZED, 0, 0, 0, 0, 0, 0, 0, 0]);
    let from = out.len();
    // SAFETY: guaranteed by the caller.
    unsafe { stream::write(value, Format::Native, out) };
    let length = (out.len() - from) as u64;
    out[from - 8..from].copy_from_slice(&length.to_ne_bytes());
}

/// Writes the object that [`mapped::share`] has returned in place of a value.
///
/// # Safety
/// The same as for [`write_serialized`].
pub unsafe fn write_gapped(instead: SEXP, sink: &mut dyn Sink) {
    sink.write(&[GAPPED]);
    // SAFETY: guaranteed by the caller.
    unsafe { stream::write(instead, Format::Native, sink) };
}

/// Takes bytes off the front of a body.
///
/// # Safety
/// Must be called under [`crate::r::unwind::protect`]: R jumps if there are too few bytes.
pub unsafe fn read_bytes(body: &mut Body, out: &mut [u8]) {
    const CUT_BATCH: *const c_char = c"a message that is cut short".as_ptr();
    if !body.fill(out) {
        // SAFETY: this jumps; the message has no format directive.
        unsafe { Rf_error(CUT_BATCH) };
    }
}

/// Takes bytes off the front of a body, after their length.
pub fn take_sized(body: &mut Body) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    if !body.fill(&mut length) {
        return None;
    }
    let length = u32::from_ne_bytes(length) as usize;
    if length > body.len {
        return None;
    }
    let mut bytes = vec![0; length];
    body.fill(&mut bytes).then_some(bytes)
}

/// Appends bytes after their length.
pub fn put_sized(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(bytes.len() as u32).to_ne_bytes());
    out.extend_from_slice(bytes);
}

/// Appends where results were saved.
pub fn put_saved(saved: &Saved, out: &mut Vec<u8>) {
    let (kind, text) = saved.encode();
    out.push(kind);
    put_sized(text.as_bytes(), out);
}

/// The reverse of [`put_saved`].
pub fn take_saved(body: &mut Body) -> Option<Saved> {
    let mut kind = [0];
    if !body.fill(&mut kind) {
        return None;
    }
    let text = String::from_utf8(take_sized(body)?).ok()?;
    Saved::decode(kind[0], text)
}

/// Takes a state of the random number generator off the front of a body.
///
/// # Safety
/// The same as for [`read_bytes`].
pub unsafe fn read_seed(body: &mut Body) -> [c_int; SEED] {
    let mut bytes = [0; 4 * SEED];
    // SAFETY: guaranteed by the caller.
    unsafe { read_bytes(body, &mut bytes) };
    std::array::from_fn(|i| {
        let at = &bytes[4 * i..4 * i + 4];
        at.try_into().map_or(0, c_int::from_ne_bytes)
    })
}

/// Takes a value off the front of a body. The value is not protected. `scratch`: a buffer that the caller
/// keeps.
///
/// # Safety
/// The same as for [`read_bytes`]; R also jumps if the bytes are no value.
pub unsafe fn read_value(body: &mut Body, scratch: &mut Vec<u8>) -> SEXP {
    const DAMAGED_BATCH: *const c_char = c"damaged message".as_ptr();
    // SAFETY: guaranteed by the caller. No frame here owns anything that needs to be dropped when R jumps.
    unsafe {
        let mut kind = [0];
        read_bytes(body, &mut kind);
        match kind[0] {
            SERIALIZED => stream::read(body),
            SIZED => {
                read_bytes(body, &mut [0; 8]);
                stream::read(body)
            }
            GAPPED => mapped::unwrap(stream::read(body)),
            PLAIN => {
                let mut length = [0; 4];
                read_bytes(body, &mut length);
                let length = u32::from_ne_bytes(length) as usize;
                if length > plain::MAX_PLAIN {
                    Rf_error(DAMAGED_BATCH);
                }
                scratch.resize(length, 0);
                read_bytes(body, scratch);
                plain::read_value(scratch)
            }
            _ => Rf_error(DAMAGED_BATCH),
        }
    }
}

impl Sink for Vec<u8> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.extend_from_slice(bytes);
        false
    }
}
