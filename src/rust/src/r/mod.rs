//! R's jumps, failures as values, and strings.

pub mod failure;
pub mod unwind;

use extendr_ffi::{LENGTH, R_CHAR, SEXP, SEXPTYPE, STRING_ELT, TYPEOF};
use std::ffi::CStr;

/// The first string of a character vector; `None` for other values.
///
/// # Safety
/// Must be called on R's thread, with a live value. R does not jump.
pub unsafe fn first_string(value: SEXP) -> Option<String> {
    // SAFETY: guaranteed by the caller; type and length are checked before the element is read.
    unsafe {
        if TYPEOF(value) != SEXPTYPE::STRSXP || LENGTH(value) == 0 {
            return None;
        }
        let text = CStr::from_ptr(R_CHAR(STRING_ELT(value, 0)));
        Some(text.to_string_lossy().into_owned())
    }
}
