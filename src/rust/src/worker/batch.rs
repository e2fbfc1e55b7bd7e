//! Tasks that came together, in a worker.

use super::memory_limit::may_map;
use crate::codec::batch::{self, AnswerHead};
use crate::codec::mapped;
use crate::codec::stream::{self, BoundedSink};
use extendr_ffi::{
    R_NilValue, R_PreserveObject, R_ReleaseObject, Rf_allocVector, Rf_protect, Rf_unprotect,
    SET_VECTOR_ELT, SEXP, SEXPTYPE, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::platform::clock::{self, CpuUsage};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::worker::channel::Blob;
use std::time::{Duration, Instant};

/// A value that R's garbage collector leaves alone for as long as this lives. On R's thread only.
pub(super) struct Preserved(SEXP);

impl Preserved {
    /// # Safety
    /// Under [`crate::r::unwind::run`], with a protected value: R may jump.
    unsafe fn new(value: SEXP) -> Preserved {
        // SAFETY: the caller's.
        unsafe { R_PreserveObject(value) };
        Preserved(value)
    }
}

impl Drop for Preserved {
    fn drop(&mut self) {
        // SAFETY: on R's thread; preserved when it was made.
        unsafe { R_ReleaseObject(self.0) };
    }
}

/// Bytes of arguments that are copied for each task, at most. Longer ones are read with the function,
/// because their vectors may be mapped.
pub(super) const COPIED: usize = 64 * 1024;

/// Tasks that came together.
pub(super) struct ReceivedBatch {
    head: batch::Head,
    /// What its tasks have in common, a list of the function and of arguments, as bytes.
    common: Blob,
    /// The list, if the tasks share it or its function.
    reused_list: Option<Preserved>,
    /// The arguments in it as bytes, if each task gets its own.
    arguments: Vec<u8>,
    /// How long it took to read that.
    reading_took: Duration,
    pub(super) body: Body,
    began: Instant,
    /// What this process had had of its cores by then.
    usage: CpuUsage,
    /// Until when others are begun, by [`clock::coarse_now`]; `None`: until there are none.
    until: Option<Duration>,
    /// Tasks that have been begun.
    pub(super) started: u32,
    /// An element is being read: if R jumps, those that follow cannot be.
    pub(super) reading: bool,
    /// Results of tasks before the one under way, and perhaps a part of its own.
    pub(super) results: Vec<u8>,
    /// Bytes of those before.
    pub(super) whole: usize,
    pub(super) scratch: Vec<u8>,
}

impl ReceivedBatch {
    pub(super) fn new(head: batch::Head, common: Blob, body: Body) -> ReceivedBatch {
        ReceivedBatch {
            head,
            common,
            reused_list: None,
            arguments: Vec::new(),
            reading_took: Duration::ZERO,
            body,
            began: Instant::now(),
            usage: CpuUsage::now(),
            until: head.until(),
            started: 0,
            reading: false,
            results: Vec::new(),
            whole: 0,
            scratch: Vec::new(),
        }
    }

    pub(super) fn is(&self, flag: u8) -> bool {
        self.head.flags & flag != 0
    }

    /// The function and the arguments that the tasks have in common; not protected. Every task gets
    /// objects of its own, because C code may change them in place, and because what they refer to by
    /// name, such as a namespace, may have been replaced since. [`batch::CHUNK`] and [`batch::FUNCTION`] are
    /// the exceptions.
    ///
    /// # Safety
    /// Under [`crate::r::unwind::run`]: R may jump.
    pub(super) unsafe fn read_common(&mut self) -> SEXP {
        // SAFETY: the caller's; this frame holds nothing that is to be dropped when R jumps.
        unsafe {
            if self.reused_list.is_none() {
                let began = Instant::now();
                let value = Rf_protect(mapped::read(&self.common, may_map()));
                if self.is(batch::CHUNK) || self.is(batch::FUNCTION) && self.copy_arguments(value) {
                    self.reused_list = Some(Preserved::new(value));
                    // The planner is told of the reading apart from the tasks.
                    self.reading_took = began.elapsed();
                    self.began = Instant::now();
                    self.usage = CpuUsage::now();
                    self.until = self.head.until();
                }
                Rf_unprotect(1);
                if self.reused_list.is_none() {
                    return value;
                }
            }
            let reused_list = self
                .reused_list
                .as_ref()
                .map_or(R_NilValue, |reused_list| reused_list.0);
            if self.arguments.is_empty() {
                return reused_list;
            }
            let own = Rf_protect(Rf_allocVector(SEXPTYPE::VECSXP, 2));
            SET_VECTOR_ELT(own, 0, VECTOR_ELT(reused_list, 0));
            SET_VECTOR_ELT(own, 1, stream::read(&mut &self.arguments[..]));
            Rf_unprotect(1);
            own
        }
    }

    /// Makes a copy of the arguments in `common` from which each task gets its own. Returns whether that
    /// can be done: they are short, and refer to nothing that the function may refer to as well.
    ///
    /// # Safety
    /// Under [`crate::r::unwind::run`], with a protected value: R may jump.
    unsafe fn copy_arguments(&mut self, common: SEXP) -> bool {
        // SAFETY: the caller's; this frame holds nothing that is to be dropped when R jumps.
        unsafe {
            let arguments = VECTOR_ELT(common, 1);
            if XLENGTH(arguments) == 0 {
                return true;
            }
            let mut sink = BoundedSink::new(&mut self.arguments, COPIED);
            let copied = stream::write_fixed(arguments, &mut sink) && !sink.over;
            if !copied {
                self.arguments.clear();
                self.head.flags &= !batch::FUNCTION;
            }
            copied
        }
    }

    /// There are more tasks, and this worker is to do them.
    pub(super) fn goes_on(&self) -> bool {
        let is_over = || self.until.is_some_and(|until| clock::coarse_now() > until);
        self.started < self.head.count && !is_over()
    }

    /// What comes before the results.
    pub(super) fn answer_head(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(batch::ANSWER_HEAD);
        AnswerHead {
            seconds: self.began.elapsed().as_secs_f64(),
            computed: self.usage.computed().map(|time| time.as_secs_f64()),
            reading: self.reading_took.as_secs_f64(),
            count: self.started,
        }
        .write(&mut out);
        out
    }
}
