//! What a job has of R's: its elements, and the results that have come.

use extendr_api::prelude::*;
use extendr_ffi::{Rf_protect, Rf_unprotect, SET_VECTOR_ELT, SEXP};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};

pub(super) enum Elements {
    /// A plain vector.
    Vector(Robj),
    /// A function of the number of an element, from 1.
    Function(Robj),
}

impl Elements {
    /// An element, not protected.
    ///
    /// # Safety
    /// Under [`unwind::run`]: R may jump.
    unsafe fn get(&self, index: usize) -> SEXP {
        // SAFETY: the caller's; R checks what it is asked for. No frame here holds what is to be
        // dropped when R jumps.
        unsafe {
            match self {
                Elements::Vector(vector) => {
                    rustcluster_element(vector.get().cast(), index as isize)
                }
                Elements::Function(function) => {
                    rustcluster_call_with(function.get().cast(), index as f64 + 1.0)
                }
            }
        }
    }
}

/// What a job has of R's.
pub struct Values {
    /// The list of function and common arguments.
    pub(super) common: Robj,
    /// Of [`batch::Head`].
    pub(super) flags: u8,
    /// The common list refers to nothing whose identity matters, such as an environment, so that no
    /// element can share such a thing with it.
    pub(super) fixed: bool,
    pub(super) elements: Elements,
    /// A function that gives the seed of a task, or `NULL`.
    pub(super) seed: Robj,
    /// A list of the function by which a task is run with a seed where that cannot be sent apart, and of
    /// no arguments.
    pub(super) seeded: Robj,
    /// A list with an element for each task.
    pub(super) results: Robj,
    /// Elements that user code has made, by their numbers, until they are answered: it is asked once for
    /// each, also if that comes back or is lost.
    pub(super) unanswered: HashMap<usize, Robj>,
    /// Tasks whose result is an error, from 1.
    pub(super) failed: Vec<i32>,
    /// A value of class `"try-error"` is an error, too, as parallel has it for its tasks. Elements of parallel's
    /// chunks and of lapply() may have such values.
    by_class: bool,
    /// What warnings call a task.
    pub(super) noun: String,
    /// Tasks that have been answered since R last asked, from 1.
    pub(super) fresh: Vec<i32>,
    pub(super) scratch: Vec<u8>,
    pub(super) message: Vec<u8>,
}

impl Values {
    /// Of a job with so many tasks, of which nothing has been answered.
    pub(super) fn new(
        count: usize,
        elements: Elements,
        common: Robj,
        flags: u8,
        fixed: bool,
        by_class: bool,
        setting: impl Fn(&'static str) -> Robj,
    ) -> Values {
        Values {
            common,
            flags,
            fixed,
            elements,
            seed: setting("seed"),
            seeded: setting("seeded"),
            results: List::new(count).into(),
            unanswered: HashMap::new(),
            failed: Vec::new(),
            by_class,
            noun: setting("noun").as_str().unwrap_or("task").to_owned(),
            fresh: Vec::new(),
            scratch: Vec::new(),
            message: Vec::new(),
        }
    }

    /// What has come: a list of the results, the numbers of those that are errors, and of those that are
    /// new since this was last asked.
    pub(super) fn results(&mut self) -> Robj {
        let mut failed = self.failed.clone();
        failed.sort_unstable();
        let fresh = std::mem::take(&mut self.fresh);
        list!(self.results.clone(), failed, fresh).into()
    }

    /// A task has ended without an answer, and this is its result.
    pub(super) fn fail(&mut self, index: usize, value: &Robj) {
        // SAFETY: the Robj keeps it alive.
        unsafe { self.put(index, value.get(), true) };
        self.unanswered.remove(&index);
    }

    /// An element, not protected.
    ///
    /// # Safety
    /// As for [`Elements::get`].
    pub(super) unsafe fn element(&mut self, index: usize) -> SEXP {
        // SAFETY: the caller's.
        unsafe {
            match self.unanswered.get(&index) {
                Some(element) => element.get(),
                None => {
                    let element = Rf_protect(self.elements.get(index));
                    if let Elements::Function(_) = self.elements {
                        self.unanswered.insert(index, Robj::from_sexp(element));
                    }
                    Rf_unprotect(1);
                    element
                }
            }
        }
    }

    /// Notes a result, which may be that the task `failed`. The value need not be protected.
    ///
    /// # Safety
    /// On R's thread, with a live value.
    pub(super) unsafe fn put(&mut self, index: usize, value: SEXP, failed: bool) {
        // SAFETY: the caller's; the list has as many elements as there are tasks; none of these
        // functions jumps or allocates.
        unsafe {
            SET_VECTOR_ELT(self.results.get_mut(), index as isize, value);
            if failed || self.by_class && rustcluster_is_error(value.cast()) != 0 {
                self.failed.push(index as i32 + 1);
            }
        }
        self.fresh.push(index as i32 + 1);
    }
}

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_element(vector: *mut c_void, at: isize) -> SEXP;
    fn rustcluster_is_error(value: *mut c_void) -> c_int;
    fn rustcluster_call_with(function: *mut c_void, number: f64) -> SEXP;
}
