//! Tasks and answers that consist of small plain values, as most do, in a format of this package. It takes a
//! fraction of the time and memory of R's serialization, which starts with a table of 9 KB for references that
//! plain values do not have. Values that are not small, or not plain (attributes other than names, S4 objects,
//! environments, ALTREP vectors, strings in an encoding of this machine), go through [`stream`].
//!
//! A function of the global environment or of a namespace is part of such a message, in R's serialization. It
//! is serialized for each message and read for each task. No part of it is cached, because C code may change
//! any part of a function in place, and because a namespace may have been reloaded since.
//!
//! All numbers are in the byte order of this machine.

use super::stream;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use extendr_ffi::{
    ALTREP, INTEGER, LENGTH, LOGICAL, R_BaseEnv, R_BaseNamespace, R_CHAR, R_GlobalEnv,
    R_IsNamespaceEnv, R_NaString, R_NamesSymbol, R_NilValue, RAW, REAL, Rboolean, Rf_allocVector,
    Rf_error, Rf_isObject, Rf_isS4, Rf_protect, Rf_setAttrib, Rf_unprotect, SET_STRING_ELT,
    SET_VECTOR_ELT, SEXP, SEXPTYPE, STRING_ELT, TYPEOF, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::protocol::body::Body;
use std::ffi::{c_char, c_int, c_void};

/// The first byte of a message of this form. R's serialization starts with 'A', 'B' or 'X'.
const TASK: u8 = 1;
const PLAIN_ANSWER: u8 = 2;

/// Maximum size of a message of this form, in bytes.
pub const MAX_PLAIN: usize = 32 * 1024;

/// Maximum depth of nested lists.
const DEPTH: u32 = 16;

/// The flag of a vector that has names.
const NAMED: u8 = 0x80;

/// R's `cetype_t`: native, UTF-8, bytes, latin1.
const ENCODINGS: [u8; 4] = [NATIVE, 1, 2, 4];
const NATIVE: u8 = 0;

/// Stands for the length of `NA_character_`.
const NA: u32 = u32::MAX;

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    // R's encodings as numbers: extendr's enum has wrong ones for latin1 and bytes.
    fn Rf_getCharCE(string: SEXP) -> c_int;
    fn Rf_mkCharLenCE(bytes: *const c_char, length: c_int, encoding: c_int) -> SEXP;
    pub fn rustcluster_attributes(value: SEXP) -> c_int;
    pub fn rustcluster_names(value: SEXP) -> SEXP;
    fn rustcluster_closure_env(function: SEXP) -> SEXP;
    pub fn rustcluster_answer(
        value: *mut c_void,
        success: c_int,
        time: *const f64,
        tag: *mut c_void,
    ) -> SEXP;
}

// Writing ---------------------------------------------------------------------------------------

/// The reason why a value was not written.
enum Unfit {
    NotPlain,
    Jump(Jump),
}

/// Returns whether a function's environment is sent by name: the global environment, or a namespace.
///
/// # Safety
/// Must be called on R's thread, with a live function. R does not jump.
unsafe fn is_global(function: SEXP) -> bool {
    // SAFETY: guaranteed by the caller; none of these functions jumps.
    unsafe {
        if TYPEOF(function) != SEXPTYPE::CLOSXP {
            return true;
        }
        let env = rustcluster_closure_env(function);
        env == R_GlobalEnv
            || env == R_BaseNamespace
            || env == R_BaseEnv
            || R_IsNamespaceEnv(env) == Rboolean::TRUE
    }
}

struct PlainWriter<'a> {
    out: &'a mut Vec<u8>,
    /// Maximum length of the output, including what was there before.
    max: usize,
    /// Whether functions may be written.
    functions: bool,
}

type Fits = std::result::Result<(), Unfit>;

impl PlainWriter<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Fits {
        if self.out.len() + bytes.len() > self.max {
            return Err(Unfit::NotPlain);
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    fn length(&mut self, length: usize) -> Fits {
        // A length beyond u32 is too long for a message in any case.
        self.bytes(&u32::try_from(length).map_or(NA, |n| n).to_ne_bytes())
    }

    /// # Safety
    /// Must be called on R's thread, with a live value. R does not jump: nothing is allocated, and ALTREP
    /// objects are not inspected.
    unsafe fn value(&mut self, value: SEXP, depth: u32) -> Fits {
        // SAFETY: guaranteed by the caller; lengths and types are checked first.
        unsafe {
            let kind = TYPEOF(value);
            let code = kind as u8;
            let size = match kind {
                SEXPTYPE::NILSXP => return self.bytes(&[code]),
                SEXPTYPE::CLOSXP | SEXPTYPE::BUILTINSXP | SEXPTYPE::SPECIALSXP => {
                    return self.function(value);
                }
                SEXPTYPE::LGLSXP | SEXPTYPE::INTSXP => 4,
                SEXPTYPE::REALSXP => 8,
                SEXPTYPE::RAWSXP => 1,
                SEXPTYPE::STRSXP | SEXPTYPE::VECSXP => 0,
                _ => return Err(Unfit::NotPlain),
            };
            let named = match rustcluster_attributes(value) {
                0 => 0,
                1 => NAMED,
                _ => return Err(Unfit::NotPlain),
            };
            let length = XLENGTH(value) as usize;
            // Each element takes at least one byte.
            if ALTREP(value) != 0 || depth == 0 || length > MAX_PLAIN {
                return Err(Unfit::NotPlain);
            }
            // These bits may be set without any attribute.
            if Rf_isObject(value) == Rboolean::TRUE || Rf_isS4(value) == Rboolean::TRUE {
                return Err(Unfit::NotPlain);
            }
            self.bytes(&[code | named])?;
            self.length(length)?;
            match kind {
                SEXPTYPE::STRSXP => {
                    for i in 0..length {
                        self.string(STRING_ELT(value, i as isize))?;
                    }
                }
                SEXPTYPE::VECSXP => {
                    for i in 0..length {
                        self.value(VECTOR_ELT(value, i as isize), depth - 1)?;
                    }
                }
                // An empty vector has no address that may be used.
                _ if length == 0 => {}
                _ => {
                    let data: *const u8 = match kind {
                        SEXPTYPE::LGLSXP => LOGICAL(value).cast(),
                        SEXPTYPE::INTSXP => INTEGER(value).cast(),
                        SEXPTYPE::REALSXP => REAL(value).cast(),
                        _ => RAW(value).cast(),
                    };
                    self.bytes(std::slice::from_raw_parts(data, length * size))?;
                }
            }
            if named == NAMED {
                self.value(rustcluster_names(value), 1)?;
            }
            Ok(())
        }
    }

    /// # Safety
    /// The same as for [`PlainWriter::value`].
    unsafe fn string(&mut self, string: SEXP) -> Fits {
        // SAFETY: guaranteed by the caller; R's strings have the length that they declare.
        unsafe {
            if string == R_NaString {
                return self.length(NA as usize);
            }
            let length = LENGTH(string) as usize;
            let bytes = std::slice::from_raw_parts(R_CHAR(string).cast::<u8>(), length);
            let encoding = Rf_getCharCE(string) as u8;
            if !ENCODINGS.contains(&encoding) || (encoding == NATIVE && !bytes.is_ascii()) {
                return Err(Unfit::NotPlain);
            }
            self.length(length)?;
            self.bytes(&[encoding])?;
            self.bytes(bytes)
        }
    }

    /// Serializes a function. This is repeated for each message, because C code may have changed any part of
    /// the function in place.
    ///
    /// # Safety
    /// Must be called on R's thread, with a live function.
    unsafe fn function(&mut self, function: SEXP) -> Fits {
        // SAFETY: guaranteed by the caller.
        if !self.functions || !unsafe { is_global(function) } {
            return Err(Unfit::NotPlain);
        }
        // SAFETY: guaranteed by the caller.
        let function = unsafe { Robj::from_sexp(function) };
        let short = stream::serialize_short(&function, MAX_PLAIN).map_err(Unfit::Jump)?;
        let (bytes, _) = short.filter(|(_, fixed)| *fixed).ok_or(Unfit::NotPlain)?;
        self.bytes(&[SEXPTYPE::CLOSXP as u8])?;
        self.length(bytes.len())?;
        self.bytes(&bytes)
    }
}

/// Returns the parts of a message of parallel that asks for a task: function, arguments, tag.
///
/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
pub unsafe fn task_of(message: SEXP) -> Option<[SEXP; 3]> {
    // SAFETY: guaranteed by the caller; lengths and types are checked first.
    unsafe {
        let data = *fields(message, ["type", "data", "tag"])?.get(1)?;
        let kind = fields(message, ["type", "data", "tag"])?[0];
        let is_task = TYPEOF(kind) == SEXPTYPE::STRSXP
            && LENGTH(kind) == 1
            && text(STRING_ELT(kind, 0)) == b"EXEC";
        let [function, arguments, _, tag] = fields(data, ["fun", "args", "return", "tag"])?;
        is_task.then_some([function, arguments, tag])
    }
}

/// # Safety
/// The same as for [`task_of`].
unsafe fn fields<const N: usize>(list: SEXP, names: [&str; N]) -> Option<[SEXP; N]> {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if TYPEOF(list) != SEXPTYPE::VECSXP
            || XLENGTH(list) != N as isize
            || rustcluster_attributes(list) != 1
        {
            return None;
        }
        let given = rustcluster_names(list);
        let same = |i: usize| text(STRING_ELT(given, i as isize)) == names[i].as_bytes();
        (0..N)
            .all(same)
            .then(|| std::array::from_fn(|i| VECTOR_ELT(list, i as isize)))
    }
}

/// # Safety
/// The same as for [`task_of`], with a string.
unsafe fn text<'a>(string: SEXP) -> &'a [u8] {
    // SAFETY: guaranteed by the caller.
    unsafe { std::slice::from_raw_parts(R_CHAR(string).cast::<u8>(), LENGTH(string) as usize) }
}

/// Writes a message of parallel to `out` if it is plain. Returns whether it is plain.
///
/// # Errors
/// If R jumped.
pub fn write_task(message: &Robj, out: &mut Vec<u8>) -> std::result::Result<bool, Jump> {
    // SAFETY: this runs on R's thread; the Robj keeps all of the message alive.
    unsafe {
        let Some(parts) = task_of(message.get()) else {
            return Ok(false);
        };
        write(TASK, &[], parts.iter().copied(), true, out)
    }
}

/// Writes an answer to `out` if it is plain. Returns whether it is plain.
///
/// # Safety
/// Must be called on R's thread, with live values. R does not jump.
pub unsafe fn write_answer(value: SEXP, time: &[f64; 5], tag: SEXP, out: &mut Vec<u8>) -> bool {
    let mut head = [0; 40];
    for (at, seconds) in head.chunks_exact_mut(8).zip(time) {
        at.copy_from_slice(&seconds.to_ne_bytes());
    }
    // SAFETY: guaranteed by the caller. Only a function could make R jump.
    unsafe {
        matches!(
            write(PLAIN_ANSWER, &head, [tag, value].into_iter(), false, out),
            Ok(true)
        )
    }
}

/// Returns the duration in seconds that an answer of this form contains.
pub fn elapsed(bytes: &[u8]) -> Option<f64> {
    let (&form, rest) = bytes.split_first()?;
    // The order is that of R's proc.time(): user, system, elapsed.
    let seconds = rest.get(16..24).filter(|_| form == PLAIN_ANSWER)?;
    Some(f64::from_ne_bytes(seconds.try_into().ok()?))
}

/// # Safety
/// Must be called on R's thread, with live values.
unsafe fn write(
    form: u8,
    head: &[u8],
    values: impl Iterator<Item = SEXP>,
    functions: bool,
    out: &mut Vec<u8>,
) -> std::result::Result<bool, Jump> {
    out.clear();
    let max = MAX_PLAIN;
    let mut writer = PlainWriter {
        out,
        max,
        functions,
    };
    let mut written = writer.bytes(&[form]).and_then(|()| writer.bytes(head));
    for value in values {
        // SAFETY: guaranteed by the caller.
        written = written.and_then(|()| unsafe { writer.value(value, DEPTH) });
    }
    match written {
        Ok(()) => Ok(true),
        Err(Unfit::NotPlain) => Ok(false),
        Err(Unfit::Jump(jump)) => Err(jump),
    }
}

/// Appends a value to `out` if it is plain and contains no function. Returns whether it was appended.
///
/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
pub unsafe fn append_value(value: SEXP, out: &mut Vec<u8>) -> bool {
    let before = out.len();
    let max = before + MAX_PLAIN;
    let mut writer = PlainWriter {
        out,
        max,
        functions: false,
    };
    // SAFETY: guaranteed by the caller.
    let written = unsafe { writer.value(value, DEPTH) }.is_ok();
    if !written {
        out.truncate(before);
    }
    written
}

// Reading ---------------------------------------------------------------------------------------

/// Reads from the front of a message. Its functions may jump, as R's errors do. Therefore neither this value
/// nor any frame of its functions owns anything that needs to be dropped.
struct PlainReader<'a> {
    bytes: &'a [u8],
}

impl PlainReader<'_> {
    unsafe fn bad(&self) -> ! {
        const DAMAGED: *const c_char = c"damaged or truncated message".as_ptr();
        // SAFETY: this jumps; the message has no format directive.
        unsafe { Rf_error(DAMAGED) }
    }

    unsafe fn take(&mut self, n: usize) -> &[u8] {
        if n > self.bytes.len() {
            // SAFETY: guaranteed by the caller.
            unsafe { self.bad() };
        }
        let (now, later) = self.bytes.split_at(n);
        self.bytes = later;
        now
    }

    unsafe fn byte(&mut self) -> u8 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.take(1)[0] }
    }

    unsafe fn u32(&mut self) -> u32 {
        let mut number = [0; 4];
        // SAFETY: guaranteed by the caller.
        number.copy_from_slice(unsafe { self.take(4) });
        u32::from_ne_bytes(number)
    }

    unsafe fn f64(&mut self) -> f64 {
        let mut number = [0; 8];
        // SAFETY: guaranteed by the caller.
        number.copy_from_slice(unsafe { self.take(8) });
        f64::from_ne_bytes(number)
    }

    /// Reads a value, which is not protected.
    unsafe fn value(&mut self, depth: u32) -> SEXP {
        // SAFETY: this runs under unwind::protect. Each allocated object is protected while others are
        // allocated, and nothing is written beyond the length with which an object was made.
        unsafe {
            let code = self.byte();
            let kind = code & !NAMED;
            if kind == SEXPTYPE::NILSXP as u8 {
                return R_NilValue;
            }
            if kind == SEXPTYPE::CLOSXP as u8 {
                return self.function();
            }
            let length = self.u32() as usize;
            if length > self.bytes.len() || depth == 0 {
                self.bad();
            }
            let value = if kind == SEXPTYPE::STRSXP as u8 {
                let value = Rf_protect(Rf_allocVector(SEXPTYPE::STRSXP, length as isize));
                for i in 0..length {
                    SET_STRING_ELT(value, i as isize, self.string());
                }
                value
            } else if kind == SEXPTYPE::VECSXP as u8 {
                let value = Rf_protect(Rf_allocVector(SEXPTYPE::VECSXP, length as isize));
                for i in 0..length {
                    SET_VECTOR_ELT(value, i as isize, self.value(depth - 1));
                }
                value
            } else if kind == SEXPTYPE::LGLSXP as u8 {
                self.numbers(SEXPTYPE::LGLSXP, length, 4, |value| LOGICAL(value).cast())
            } else if kind == SEXPTYPE::INTSXP as u8 {
                self.numbers(SEXPTYPE::INTSXP, length, 4, |value| INTEGER(value).cast())
            } else if kind == SEXPTYPE::REALSXP as u8 {
                self.numbers(SEXPTYPE::REALSXP, length, 8, |value| REAL(value).cast())
            } else if kind == SEXPTYPE::RAWSXP as u8 {
                self.numbers(SEXPTYPE::RAWSXP, length, 1, |value| RAW(value).cast())
            } else {
                self.bad()
            };
            if code & NAMED != 0 {
                let names = Rf_protect(self.value(1));
                if TYPEOF(names) != SEXPTYPE::STRSXP || XLENGTH(names) != length as isize {
                    self.bad();
                }
                Rf_setAttrib(value, R_NamesSymbol, names);
                Rf_unprotect(1);
            }
            Rf_unprotect(1);
            value
        }
    }

    /// Reads a vector of numbers, which is protected.
    unsafe fn numbers(
        &mut self,
        kind: SEXPTYPE,
        length: usize,
        size: usize,
        data: impl Fn(SEXP) -> *mut u8,
    ) -> SEXP {
        // SAFETY: `take` returns as many bytes as the vector has.
        unsafe {
            let value = Rf_protect(Rf_allocVector(kind, length as isize));
            let from = self.take(length * size);
            if length > 0 {
                std::ptr::copy_nonoverlapping(from.as_ptr(), data(value), from.len());
            }
            value
        }
    }

    unsafe fn string(&mut self) -> SEXP {
        // SAFETY: this runs under unwind::protect. The bytes are those that R had as a string in the same
        // encoding; others are an error of R.
        unsafe {
            let length = self.u32();
            if length == NA {
                return R_NaString;
            }
            let encoding = self.byte();
            if !ENCODINGS.contains(&encoding) {
                self.bad();
            }
            let bytes = self.take(length as usize);
            Rf_mkCharLenCE(bytes.as_ptr().cast(), bytes.len() as c_int, encoding.into())
        }
    }

    unsafe fn function(&mut self) -> SEXP {
        // SAFETY: this runs under unwind::protect.
        unsafe {
            let length = self.u32() as usize;
            if length > self.bytes.len() {
                self.bad();
            }
            let (mut bytes, later) = self.bytes.split_at(length);
            self.bytes = later;
            stream::read(&mut bytes)
        }
    }
}

/// Makes a message of this form one chunk. On its way to another machine a message is cut into chunks by its content,
/// whatever its length.
pub fn join(body: &mut Body) {
    let first = body.chunks.iter().find(|chunk| !chunk.is_empty());
    if first.is_some_and(|chunk| is_plain(chunk)) {
        body.join();
    }
}

/// Returns whether a message is of this form.
pub fn is_plain(bytes: &[u8]) -> bool {
    matches!(bytes.first(), Some(&(TASK | PLAIN_ANSWER)))
}

/// Returns a task's function, arguments and tag, in one list that is not protected.
///
/// # Safety
/// Must be called under [`crate::r::unwind::protect`]: R may jump.
pub unsafe fn read_task(bytes: &[u8]) -> SEXP {
    let mut reader = PlainReader { bytes };
    // SAFETY: guaranteed by the caller.
    unsafe {
        if reader.byte() != TASK {
            reader.bad();
        }
        let parts = Rf_protect(Rf_allocVector(SEXPTYPE::VECSXP, 3));
        for i in 0..3 {
            SET_VECTOR_ELT(parts, i, reader.value(DEPTH));
        }
        Rf_unprotect(1);
        parts
    }
}

/// Returns a value that [`append_value`] has written. The value is not protected.
///
/// # Safety
/// Must be called under [`crate::r::unwind::protect`]: R may jump.
pub unsafe fn read_value(bytes: &[u8]) -> SEXP {
    let mut reader = PlainReader { bytes };
    // SAFETY: guaranteed by the caller.
    unsafe { reader.value(DEPTH) }
}

/// Returns an answer as parallel's `recvData()` returns it. The answer is not protected.
///
/// # Safety
/// Must be called under [`crate::r::unwind::protect`]: R may jump.
pub unsafe fn read_answer(bytes: &[u8]) -> SEXP {
    let mut reader = PlainReader { bytes };
    // SAFETY: guaranteed by the caller.
    unsafe {
        if reader.byte() != PLAIN_ANSWER {
            reader.bad();
        }
        let time: [f64; 5] = std::array::from_fn(|_| reader.f64());
        let tag = Rf_protect(reader.value(DEPTH));
        let value = Rf_protect(reader.value(DEPTH));
        let answer = rustcluster_answer(value.cast(), 1, time.as_ptr(), tag.cast());
        Rf_unprotect(2);
        answer
    }
}
