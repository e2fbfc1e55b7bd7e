//! Calls of R functions that may jump (on an error, an interrupt, a restart).
//!
//! The jump ends in C, below the frames of Rust, which therefore return normally. R's wrapper gets the token of
//! the jump and continues the jump from R, where no frame of Rust is left.

use extendr_api::prelude::*;
use extendr_ffi::{R_MakeUnwindCont, R_PreserveObject, SEXP};
use std::cell::OnceCell;
use std::ffi::{c_int, c_void};

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_unwind_protect(
        function: unsafe extern "C" fn(*mut c_void) -> SEXP,
        data: *mut c_void,
        out: *mut SEXP,
        token: SEXP,
    ) -> c_int;
    fn R_ToplevelExec(function: unsafe extern "C" fn(*mut c_void), data: *mut c_void) -> c_int;
    fn R_CheckUserInterrupt();
}

thread_local! {
    /// The token, which is kept for the life of the process. It is in use from a jump until R continues the
    /// jump, and R does nothing else in between.
    static TOKEN: OnceCell<SEXP> = const { OnceCell::new() };
}

fn token() -> SEXP {
    TOKEN.with(|token| {
        *token.get_or_init(|| {
            // SAFETY: this runs on R's thread; the object is preserved before anything else is allocated.
            unsafe {
                let token = R_MakeUnwindCont();
                R_PreserveObject(token);
                token
            }
        })
    })
}

/// A jump of R. The value is what R's wrapper needs to continue the jump.
pub struct Jump(pub Robj);

/// Calls `function` with `data` and protects its value. The function may call R functions that jump, so that
/// none of its frames may own anything that needs to be dropped.
///
/// # Errors
/// If R jumped.
pub fn protect<T>(
    function: unsafe extern "C" fn(*mut c_void) -> SEXP,
    data: &mut T,
) -> std::result::Result<Robj, Jump> {
    let value = run(function, data)?;
    // SAFETY: this runs on R's thread; nothing was allocated since the function returned the value.
    Ok(unsafe { Robj::from_sexp(value) })
}

/// Does the same as [`protect`], for a function whose value is not needed, or is protected otherwise.
pub fn run<T>(
    function: unsafe extern "C" fn(*mut c_void) -> SEXP,
    data: &mut T,
) -> std::result::Result<SEXP, Jump> {
    let token = token();
    let mut out: SEXP = std::ptr::null_mut();
    let data = std::ptr::from_mut(data).cast();
    // SAFETY: this runs on R's thread; `data` outlives the call; the token is preserved.
    unsafe {
        if rustcluster_unwind_protect(function, data, &raw mut out, token) == 0 {
            Ok(out)
        } else {
            Err(Jump(Robj::from_sexp(token)))
        }
    }
}

/// Discards a pending interrupt of R.
pub fn forget_interrupt() {
    unsafe extern "C" fn check(_: *mut c_void) {
        // SAFETY: this is called by R_ToplevelExec, which catches the jump; this frame owns nothing.
        unsafe { R_CheckUserInterrupt() };
    }
    // SAFETY: this runs on R's thread.
    unsafe { R_ToplevelExec(check, std::ptr::null_mut()) };
}

/// Handles a pending interrupt of R, which jumps. For functions under [`protect`] only.
///
/// # Safety
/// No frame between this one and [`protect`] may own anything that needs to be dropped.
pub unsafe fn check_interrupt() {
    // SAFETY: guaranteed by the caller.
    unsafe { R_CheckUserInterrupt() };
}
