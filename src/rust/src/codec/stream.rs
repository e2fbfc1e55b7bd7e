//! R objects to bytes and back, piece by piece, through R's own serialization.

use crate::r::unwind::{self, Jump};
use bytes::Buf;
use extendr_api::prelude::*;
use extendr_ffi::{
    ALTREP, R_NilValue, R_Serialize, R_Unserialize, R_inpstream_st, R_inpstream_t, R_outpstream_st,
    R_outpstream_t, R_pstream_format_t, Rf_error, SEXP, SEXPTYPE, TYPEOF, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::protocol::body::Body;
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};

/// Version 3 of R's serialization, which keeps ALTREP compact vectors and the native encoding.
const VERSION: c_int = 3;

/// Takes the bytes of a serialized object.
pub trait Sink {
    /// Takes some bytes. Returns whether the caller has to call [`Sink::wait`] until it returns `false`.
    fn write(&mut self, bytes: &[u8]) -> bool;
    /// Waits a little for room. Returns whether there is still no room.
    fn wait(&mut self) -> bool {
        false
    }
}

impl Sink for &mut dyn Sink {
    fn write(&mut self, bytes: &[u8]) -> bool {
        (**self).write(bytes)
    }

    fn wait(&mut self) -> bool {
        (**self).wait()
    }
}

/// Provides the bytes of a serialized object.
pub trait Source {
    /// Fills `out` from the front of the available bytes. Returns whether there were enough.
    fn fill(&mut self, out: &mut [u8]) -> bool;
}

/// Formats of R's serialization.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The byte order of this machine.
    #[default]
    Native,
    /// The network byte order, which all machines can read.
    Xdr,
}

impl Format {
    /// Returns the format of the bytes of an object.
    pub fn of(bytes: &[u8]) -> Format {
        match bytes.first() {
            Some(b'X') => Format::Xdr,
            _ => Format::Native,
        }
    }
}

struct StreamWriter<'a> {
    sink: &'a mut dyn Sink,
    object: SEXP,
    format: Format,
    hook: Hook,
}

/// Writes `object` to `sink`. Returns whether nothing in the object can change.
///
/// # Errors
/// If R jumped. The bytes that were written before the jump are incomplete.
pub fn serialize(
    object: &Robj,
    format: Format,
    sink: &mut dyn Sink,
) -> std::result::Result<bool, Jump> {
    CHANGEABLE.set(false);
    let mut writer = StreamWriter {
        sink,
        // SAFETY: the object is protected by its Robj.
        object: unsafe { object.get() },
        format,
        hook: Some(note_changeable),
    };
    unwind::protect(write_protected, &mut writer)?;
    Ok(!CHANGEABLE.get())
}

/// A function that R calls for every environment but the global environment and those of base and other
/// packages, and for every external pointer and weak reference.
type Hook = Option<unsafe extern "C" fn(SEXP, SEXP) -> SEXP>;

thread_local! {
    /// Whether the object that is being serialized contains something that may change.
    static CHANGEABLE: Cell<bool> = const { Cell::new(false) };
    /// The address of the parse tree of the last source file that was found in the object that is being
    /// serialized.
    static PARSE_DATA: Cell<*const c_void> = const { Cell::new(std::ptr::null()) };
}

/// Returns whether these bytes are the parse tree of a source file. R keeps compiled functions, and with them
/// their source, so that a mapping of a parse tree would stay.
pub fn is_parse_data(bytes: &[u8]) -> bool {
    PARSE_DATA.get() == bytes.as_ptr().cast()
}

unsafe extern "C" {
    fn rustcluster_is_source(value: *mut c_void) -> c_int;
    fn rustcluster_parse_data(value: *mut c_void) -> *const c_void;
}

unsafe extern "C" fn note_changeable(object: SEXP, _: SEXP) -> SEXP {
    // SAFETY: this runs on R's thread; none of these functions jumps.
    unsafe {
        // The environment of a function's source does not change.
        if rustcluster_is_source(object.cast()) == 0 {
            CHANGEABLE.set(true);
        } else {
            PARSE_DATA.set(rustcluster_parse_data(object.cast()));
        }
        R_NilValue
    }
}

/// Takes bytes up to a maximum, and none from the first write on that would exceed it.
pub struct BoundedSink<'a> {
    bytes: &'a mut Vec<u8>,
    max: usize,
    /// Whether there were more bytes than the maximum.
    pub over: bool,
}

impl BoundedSink<'_> {
    /// Creates a sink that appends to `bytes`, which may have some already.
    pub fn new(bytes: &mut Vec<u8>, max: usize) -> BoundedSink<'_> {
        let over = false;
        BoundedSink { bytes, max, over }
    }
}

impl Sink for BoundedSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.over |= self.bytes.len() + bytes.len() > self.max;
        if !self.over {
            self.bytes.extend_from_slice(bytes);
        }
        false
    }
}

/// Returns the serialized form of an object, if it has at most `max` bytes, and whether nothing in the object
/// can change.
///
/// # Errors
/// If R jumped.
pub fn serialize_short(
    object: &Robj,
    max: usize,
) -> std::result::Result<Option<(Vec<u8>, bool)>, Jump> {
    let mut bytes = Vec::new();
    let mut sink = BoundedSink::new(&mut bytes, max);
    let fixed = serialize(object, Format::Native, &mut sink)?;
    let over = sink.over;
    Ok((!over).then_some((bytes, fixed)))
}

/// Number of values that are visited to estimate an object's size.
const LOOKED_AT: usize = 1_000;

/// Returns a lower bound of the size of an object when it is serialized, from a limited number of its values.
pub fn min_size(object: &Robj) -> usize {
    // SAFETY: this runs on R's thread, with a live value.
    unsafe { min_size_of_value(object.get()) }
}

/// Does the same as [`min_size`], for any value.
///
/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
pub unsafe fn min_size_of_value(value: SEXP) -> usize {
    // SAFETY: guaranteed by the caller.
    unsafe { min_size_of(value, &mut { LOOKED_AT }) }
}

/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
unsafe fn min_size_of(value: SEXP, visits: &mut usize) -> usize {
    // SAFETY: guaranteed by the caller; types and lengths are checked first.
    unsafe {
        // An ALTREP object, which is computed on access, may be short when it is serialized.
        if *visits == 0 || ALTREP(value) != 0 {
            return 0;
        }
        *visits -= 1;
        let length = |value| usize::try_from(XLENGTH(value)).unwrap_or(0);
        match TYPEOF(value) {
            SEXPTYPE::RAWSXP => length(value),
            SEXPTYPE::LGLSXP | SEXPTYPE::INTSXP => 4 * length(value),
            SEXPTYPE::REALSXP | SEXPTYPE::STRSXP => 8 * length(value),
            SEXPTYPE::CPLXSXP => 16 * length(value),
            SEXPTYPE::VECSXP => {
                let elements = 0..XLENGTH(value).min(LOOKED_AT as isize);
                elements
                    .map(|i| min_size_of(VECTOR_ELT(value, i), visits))
                    .sum()
            }
            _ => 0,
        }
    }
}

unsafe extern "C" fn write_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the writer of `serialize`, which outlives this call. This frame owns nothing that needs
    // to be dropped.
    unsafe {
        let writer = data.cast::<StreamWriter<'_>>();
        let writer = &mut *writer;
        write_with(
            writer.object,
            writer.format,
            writer.sink,
            writer.hook,
            VERSION,
        );
        R_NilValue
    }
}

/// Does the same as [`serialize`], for functions under [`unwind::protect`].
///
/// # Safety
/// R may jump out of this function; `object` must be protected.
pub unsafe fn write(object: SEXP, format: Format, sink: &mut dyn Sink) {
    // SAFETY: guaranteed by the caller.
    unsafe { write_with(object, format, sink, None, VERSION) }
}

/// Does the same as [`write()`] in the native format and in version 2, in which equal vectors have equal bytes.
///
/// # Safety
/// The same as for [`write()`].
pub unsafe fn write_in_version_2(object: SEXP, sink: &mut dyn Sink) {
    // SAFETY: guaranteed by the caller.
    unsafe { write_with(object, Format::Native, sink, None, 2) }
}

/// Does the same as [`write()`], and returns whether nothing in the object can change.
///
/// # Safety
/// The same as for [`write()`].
pub unsafe fn write_fixed(object: SEXP, sink: &mut dyn Sink) -> bool {
    CHANGEABLE.set(false);
    PARSE_DATA.set(std::ptr::null());
    // SAFETY: guaranteed by the caller.
    unsafe {
        write_with(object, Format::Native, sink, Some(note_changeable), VERSION);
    }
    !CHANGEABLE.get()
}

unsafe fn write_with(
    object: SEXP,
    format: Format,
    sink: &mut dyn Sink,
    hook: Hook,
    version: c_int,
) {
    // SAFETY: guaranteed by the caller. This frame and those of the callbacks own nothing that needs to be
    // dropped when R jumps.
    unsafe {
        let mut sink = sink;
        let mut stream = R_outpstream_st {
            data: (&raw mut sink).cast(),
            type_: match format {
                Format::Native => R_pstream_format_t::R_pstream_binary_format,
                Format::Xdr => R_pstream_format_t::R_pstream_xdr_format,
            },
            version,
            OutChar: Some(out_char),
            OutBytes: Some(out_bytes),
            OutPersistHookFunc: hook,
            OutPersistHookData: R_NilValue,
        };
        R_Serialize(object, &raw mut stream);
    }
}

unsafe extern "C" fn out_char(stream: R_outpstream_t, byte: c_int) {
    let mut byte = byte as u8;
    // SAFETY: the same as for out_bytes.
    unsafe { out_bytes(stream, (&raw mut byte).cast(), 1) };
}

unsafe extern "C" fn out_bytes(stream: R_outpstream_t, bytes: *mut c_void, len: c_int) {
    // SAFETY: R passes the sink of this module and `len` readable bytes. When R jumps, this frame owns nothing
    // that needs to be dropped.
    unsafe {
        let sink = (*stream).data.cast::<&mut dyn Sink>();
        let bytes = std::slice::from_raw_parts(bytes.cast::<u8>(), len.max(0) as usize);
        put(&mut **sink, bytes);
    }
}

/// Writes some bytes, and waits while there is no room for more.
///
/// # Safety
/// Must be called under [`unwind::protect`]: R jumps on an interrupt.
pub unsafe fn put(sink: &mut dyn Sink, bytes: &[u8]) {
    let mut wait = sink.write(bytes);
    while wait {
        wait = sink.wait();
        // SAFETY: guaranteed by the caller; this frame owns nothing that needs to be dropped.
        unsafe { unwind::check_interrupt() };
    }
}

/// Reads an object, which is not protected.
///
/// # Safety
/// Must be called under [`unwind::protect`]: R jumps, for example with an error if the bytes are no R object or
/// too few.
pub unsafe fn read(source: &mut dyn Source) -> SEXP {
    // SAFETY: guaranteed by the caller. This frame and those of the callbacks own nothing that needs to be
    // dropped when R jumps.
    unsafe {
        let mut source = source;
        let mut stream = R_inpstream_st {
            data: (&raw mut source).cast(),
            type_: R_pstream_format_t::R_pstream_any_format,
            InChar: Some(in_char),
            InBytes: Some(in_bytes),
            InPersistHookFunc: None,
            InPersistHookData: R_NilValue,
            native_encoding: [0; 64],
            nat2nat_obj: std::ptr::null_mut(),
            nat2utf8_obj: std::ptr::null_mut(),
        };
        R_Unserialize(&raw mut stream)
    }
}

unsafe extern "C" fn in_char(stream: R_inpstream_t) -> c_int {
    let mut byte = 0u8;
    // SAFETY: the same as for in_bytes.
    unsafe { in_bytes(stream, (&raw mut byte).cast(), 1) };
    c_int::from(byte)
}

unsafe extern "C" fn in_bytes(stream: R_inpstream_t, bytes: *mut c_void, len: c_int) {
    const CUT_SHORT: *const c_char = c"the serialized object is cut short".as_ptr();
    // SAFETY: R passes the source of this module and room for `len` bytes. Rf_error jumps; this frame then owns
    // nothing that needs to be dropped. The message has no format directive.
    unsafe {
        let source = (*stream).data.cast::<&mut dyn Source>();
        let out = std::slice::from_raw_parts_mut(bytes.cast::<u8>(), len.max(0) as usize);
        if !(*source).fill(out) {
            Rf_error(CUT_SHORT);
        }
    }
}

impl Source for Body {
    fn fill(&mut self, mut out: &mut [u8]) -> bool {
        if self.len < out.len() {
            return false;
        }
        self.len -= out.len();
        while !out.is_empty() {
            let Some(chunk) = self.chunks.front_mut() else {
                return false;
            };
            let n = chunk.len().min(out.len());
            let (now, later) = out.split_at_mut(n);
            chunk.copy_to_slice(now);
            out = later;
            if chunk.is_empty() {
                self.chunks.pop_front();
            }
        }
        true
    }
}

impl Source for &[u8] {
    fn fill(&mut self, out: &mut [u8]) -> bool {
        if self.len() < out.len() {
            return false;
        }
        let (now, later) = self.split_at(out.len());
        out.copy_from_slice(now);
        *self = later;
        true
    }
}
