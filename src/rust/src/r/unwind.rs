//! Calling R functions that may jump (on an error, an interrupt, a restart).
//!
//! The jump ends in C, below our frames, so that they return normally. R's wrapper gets the
//! token and takes the jump up again from R, where no frame of ours is left.

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
    /// Kept for the life of the process. A token is in use from a jump until R has taken it up,
    /// and R does nothing else in between.
    static TOKEN: OnceCell<SEXP> = const { OnceCell::new() };
}

fn token() -> SEXP {
    TOKEN.with(|token| {
        *token.get_or_init(|| {
            // SAFETY: on R's thread; the object is preserved before anything else is allocated.
            unsafe {
                let token = R_MakeUnwindCont();
                R_PreserveObject(token);
                token
            }
        })
    })
}

/// R jumped; the value is what R's wrapper needs to take the jump up.
pub struct Jump(pub Robj);

/// Calls `function` with `data` and protects its value. It may call R functions that jump, so no
/// frame of it may hold anything that is to be dropped.
///
/// # Errors
/// When R jumped.
pub fn protect<T>(
    function: unsafe extern "C" fn(*mut c_void) -> SEXP,
    data: &mut T,
) -> std::result::Result<Robj, Jump> {
    let value = run(function, data)?;
    // SAFETY: on R's thread; nothing was allocated since the function returned it.
    Ok(unsafe { Robj::from_sexp(value) })
}

/// [`protect`] for a function whose value is not wanted, or protected otherwise.
pub fn run<T>(
    function: unsafe extern "C" fn(*mut c_void) -> SEXP,
    data: &mut T,
) -> std::result::Result<SEXP, Jump> {
    let token = token();
    let mut out: SEXP = std::ptr::null_mut();
    let data = std::ptr::from_mut(data).cast();
    // SAFETY: on R's thread; `data` outlives the call; the token is preserved.
    unsafe {
        if rustcluster_unwind_protect(function, data, &raw mut out, token) == 0 {
            Ok(out)
        } else {
            Err(Jump(Robj::from_sexp(token)))
        }
    }
}

/// Lets an interrupt that R has noted but not acted upon come to nothing.
pub fn forget_interrupt() {
    unsafe extern "C" fn check(_: *mut c_void) {
        // SAFETY: called by R_ToplevelExec, which catches the jump; this frame holds nothing.
        unsafe { R_CheckUserInterrupt() };
    }
    // SAFETY: on R's thread.
    unsafe { R_ToplevelExec(check, std::ptr::null_mut()) };
}

/// Takes an interrupt if there is one. Jumps: for functions under [`protect`] only.
///
/// # Safety
/// No frame between this and [`protect`] may hold anything that is to be dropped.
pub unsafe fn check_interrupt() {
    // SAFETY: the caller's.
    unsafe { R_CheckUserInterrupt() };
}
