//! R's jumps, failures as values, and strings.

pub mod failure;
pub mod unwind;

use extendr_ffi::{LENGTH, R_CHAR, SEXP, SEXPTYPE, STRING_ELT, TYPEOF};
use std::ffi::{CStr, c_int, c_void};

unsafe extern "C" {
    fn rustcluster_is_latin1(string: *mut c_void) -> c_int;
}

/// The first string of a character vector; `None` for other values. Bytes that are not UTF-8 are replaced.
///
/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
pub unsafe fn first_string(value: SEXP) -> Option<String> {
    // SAFETY: guaranteed by the caller; type and length are checked before the element is read.
    unsafe {
        if TYPEOF(value) != SEXPTYPE::STRSXP || LENGTH(value) == 0 {
            return None;
        }
        let string = STRING_ELT(value, 0);
        let text = CStr::from_ptr(R_CHAR(string));
        if rustcluster_is_latin1(string.cast()) != 0 {
            return Some(text.to_bytes().iter().copied().map(char::from).collect());
        }
        Some(text.to_string_lossy().into_owned())
    }
}
