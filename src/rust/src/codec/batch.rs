//! Batches: tasks of a job that cross together, and their answers. What they have in common, a function
//! and arguments, is the blob with which their message begins, a list of the two.
//!
//! A value is either plain (see [`crate::codec::plain`]) or in R's serialization, whichever its first byte
//! says. All numbers are in the byte order of this machine.

use super::stream::{self, Format, Sink, Source};
use super::{mapped, plain};
use extendr_api::prelude::*;
use extendr_ffi::{Rf_error, SEXP};
use rustcluster_core::head::activity::Measured;
use rustcluster_core::platform::clock;
use rustcluster_core::protocol::body::Body;
use std::ffi::{c_char, c_int};
use std::time::Duration;

/// What a message of this form begins with: see [`crate::codec::plain`] for others.
pub const BATCH: u8 = 3;
pub const BATCH_ANSWER: u8 = 4;

/// The elements are lists of arguments.
pub const SPREAD: u8 = 1;
/// Each element comes with a state of the random number generator.
pub const SEEDED: u8 = 2;
/// The batch stands for a chunk of parallel's: its tasks share the function and the arguments that
/// they have in common, which are read once. Otherwise each task gets objects of its own.
pub const CHUNK: u8 = 4;
/// The tasks share the function, which is read once, and each gets arguments of its own, if these can be
/// copied apart from the function.
pub const FUNCTION: u8 = 8;

/// What a result begins with: its value follows, or that of an error.
pub const VALUE: u8 = 1;
pub const ERROR: u8 = 2;

const PLAIN: u8 = 1;
const SERIALIZED: u8 = 2;
/// Serialized as [`crate::codec::mapped`] has it.
const GAPPED: u8 = 3;

/// Integers of a state of L'Ecuyer's generator, with its kind.
pub const SEED: usize = 7;

/// The beginning of a batch: the elements follow, each after its seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    pub flags: u8,
    pub count: u32,
    /// After so many microseconds those that have not been begun are not to be. 0: never.
    pub max_micros: u32,
}

const HEAD: usize = 10;

impl Head {
    pub fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[BATCH, self.flags]);
        out.extend_from_slice(&self.count.to_ne_bytes());
        out.extend_from_slice(&self.max_micros.to_ne_bytes());
    }

    /// Until when tasks may be begun, by [`clock::coarse_now`], if the first is begun now; `None`: no limit.
    pub fn until(self) -> Option<Duration> {
        let max_micros = Duration::from_micros(self.max_micros.into());
        (!max_micros.is_zero()).then(|| clock::coarse_now() + max_micros)
    }

    /// Puts another count into a message that begins with this.
    pub fn count(message: &mut [u8], count: u32) {
        if let Some(at) = message.get_mut(2..6) {
            at.copy_from_slice(&count.to_ne_bytes());
        }
    }

    /// Takes it off the front of a message, if that is a batch.
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

/// Bytes of what an answer of a batch begins with.
pub const ANSWER_HEAD: usize = 29;

/// The beginning of a batch's answer: the results follow.
#[derive(Clone, Copy, Debug, Default)]
pub struct AnswerHead {
    /// Seconds that the worker was at it.
    pub seconds: f64,
    /// Seconds of it for which it had a core, if it has not waited for anything in between.
    pub computed: Option<f64>,
    /// Seconds before that in which the worker read what the tasks share: see [`CHUNK`].
    pub reading: f64,
    /// Of how many of its tasks, counted from the first.
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

    /// Takes it off the front of an answer, if that is one of a batch.
    pub fn read(body: &mut Body) -> Option<AnswerHead> {
        let mut bytes = [0; ANSWER_HEAD];
        if body.chunks.front()?.first() != Some(&BATCH_ANSWER) || !body.fill(&mut bytes) {
            return None;
        }
        AnswerHead::of(&bytes)
    }

    /// What an answer of a batch begins with.
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

/// What an answer says of how long it took, by its first bytes. One in R's serialization says it at its
/// end.
pub fn measure(bytes: &[u8]) -> Option<Measured> {
    let batch = AnswerHead::of(bytes).map(|head| Measured {
        seconds: head.seconds,
        tasks: head.count,
    });
    let alone = || plain::elapsed(bytes).map(|seconds| Measured { seconds, tasks: 1 });
    batch.or_else(alone)
}

/// Whether an answer has the result of one task, in the form of [`plain`].
pub fn is_plain_result(bytes: &[u8]) -> bool {
    AnswerHead::of(bytes).is_some_and(|head| head.count == 1)
        && bytes.get(ANSWER_HEAD + 1) == Some(&PLAIN)
}

/// Appends a value to `out` if it is plain. Returns whether it is.
///
/// # Safety
/// On R's thread, with a live value. R does not jump.
pub unsafe fn append_plain(value: SEXP, out: &mut Vec<u8>) -> bool {
    let before = out.len();
    out.extend_from_slice(&[PLAIN, 0, 0, 0, 0]);
    // SAFETY: the caller's.
    if !unsafe { plain::append_value(value, out) } {
        out.truncate(before);
        return false;
    }
    let length = (out.len() - before - 5) as u32;
    out[before + 1..before + 5].copy_from_slice(&length.to_ne_bytes());
    true
}

/// Writes what a value that is not plain begins with; [`stream::write`] or [`stream::serialize`]
/// follows.
pub fn begin_serialized(sink: &mut dyn Sink) {
    sink.write(&[SERIALIZED]);
}

/// Writes a value that is not plain.
///
/// # Safety
/// Under [`crate::r::unwind::protect`], with a protected value: R may jump.
pub unsafe fn write_serialized(value: SEXP, sink: &mut dyn Sink) {
    begin_serialized(sink);
    // SAFETY: the caller's.
    unsafe { stream::write(value, Format::Native, sink) };
}

/// Writes what [`mapped::share`] gives in place of a value.
///
/// # Safety
/// As for [`write_serialized`].
pub unsafe fn write_gapped(instead: SEXP, sink: &mut dyn Sink) {
    sink.write(&[GAPPED]);
    // SAFETY: the caller's.
    unsafe { stream::write(instead, Format::Native, sink) };
}

/// Takes some bytes off the front.
///
/// # Safety
/// Under [`crate::r::unwind::protect`]: R jumps if there are fewer.
pub unsafe fn read_bytes(body: &mut Body, out: &mut [u8]) {
    const CUT_BATCH: *const c_char = c"a message that is cut short".as_ptr();
    if !body.fill(out) {
        // SAFETY: jumps; the message has no format directive.
        unsafe { Rf_error(CUT_BATCH) };
    }
}

/// A state of the random number generator.
///
/// # Safety
/// As for [`read_bytes`].
pub unsafe fn read_seed(body: &mut Body) -> [c_int; SEED] {
    let mut bytes = [0; 4 * SEED];
    // SAFETY: the caller's.
    unsafe { read_bytes(body, &mut bytes) };
    std::array::from_fn(|i| {
        let at = &bytes[4 * i..4 * i + 4];
        at.try_into().map_or(0, c_int::from_ne_bytes)
    })
}

/// Takes a value off the front; it is not protected. `scratch`: kept by the caller.
///
/// # Safety
/// As for [`read_bytes`]; R jumps also if it is no value.
pub unsafe fn read_value(body: &mut Body, scratch: &mut Vec<u8>) -> SEXP {
    const DAMAGED_BATCH: *const c_char = c"a message that is damaged".as_ptr();
    // SAFETY: the caller's. No frame here holds what is to be dropped when R jumps.
    unsafe {
        let mut kind = [0];
        read_bytes(body, &mut kind);
        match kind[0] {
            SERIALIZED => stream::read(body),
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
