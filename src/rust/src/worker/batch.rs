//! Batches in a worker: tasks that arrived together.

use super::memory_limit::may_map;
use crate::codec::batch::{self, AnswerHead};
use crate::codec::stream::{self, BoundedSink};
use crate::codec::{mapped, stored};
use extendr_ffi::{
    R_NilValue, R_PreserveObject, R_ReleaseObject, Rf_allocVector, Rf_protect, Rf_unprotect,
    SET_VECTOR_ELT, SEXP, SEXPTYPE, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::platform::clock::{self, CpuUsage};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::store::save::{SaveRequest, Saved, Saver};
use rustcluster_core::worker::channel::Blob;
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// A value that R's garbage collector keeps while this lives. For R's thread only.
pub(super) struct Preserved(SEXP);

impl Preserved {
    /// # Safety
    /// Must be called under [`crate::r::unwind::run`], with a protected value: R may jump.
    unsafe fn new(value: SEXP) -> Preserved {
        // SAFETY: guaranteed by the caller.
        unsafe { R_PreserveObject(value) };
        Preserved(value)
    }
}

impl Drop for Preserved {
    fn drop(&mut self) {
        // SAFETY: this runs on R's thread; the value was preserved when it was made.
        unsafe { R_ReleaseObject(self.0) };
    }
}

/// Maximum size of arguments that are copied for each task, in bytes. Larger arguments are read together with
/// the function, because their vectors may be mapped.
pub(super) const COPIED: usize = 64 * 1024;

/// Results of fewer bytes are part of the answer also if the worker has saved them in the directory of the run.
const SHORT: usize = 64 * 1024;

thread_local! {
    static SAVER: RefCell<Option<Saver>> = const { RefCell::new(None) };
}

fn with_saver<T>(request: &SaveRequest, body: impl FnOnce(&mut Saver) -> T) -> T {
    SAVER.with_borrow_mut(|saver| {
        let current = saver.take().filter(|saver| saver.serves(request));
        body(saver.insert(current.unwrap_or_else(|| Saver::new(request))))
    })
}

/// A batch, and how far its tasks have been run.
pub(super) struct ReceivedBatch {
    head: batch::Head,
    /// The serialized list of the function and of the arguments that the tasks have in common.
    common: Blob,
    /// The list, if the tasks share it or its function.
    reused_list: Option<Preserved>,
    /// The serialized arguments of the list, if each task gets its own.
    arguments: Vec<u8>,
    /// The time that reading the list took.
    reading_took: Duration,
    pub(super) body: Body,
    began: Instant,
    /// The CPU time of this process when the batch started.
    usage: CpuUsage,
    /// The time until which tasks are started, by [`clock::coarse_now`]; `None` for no limit.
    until: Option<Duration>,
    /// The number of tasks that have been started.
    pub(super) started: u32,
    /// Whether an element is being read. If R jumps then, the elements that follow cannot be read.
    pub(super) reading: bool,
    /// Results of the tasks before the current one, and perhaps a part of its own result.
    pub(super) results: Vec<u8>,
    /// The number of bytes of the complete results.
    pub(super) whole: usize,
    pub(super) scratch: Vec<u8>,
    /// Where the results are saved.
    pub(super) save: Option<SaveRequest>,
    /// The numbers of the elements in the run, if the results are saved.
    pub(super) elements: Vec<u32>,
    /// Whether the last element was interrupted.
    pub(super) interrupted: bool,
}

impl ReceivedBatch {
    pub(super) fn new(head: batch::Head, common: Blob, mut body: Body) -> ReceivedBatch {
        let saves = head.flags & batch::SAVED != 0;
        let save = saves.then(|| batch::take_sized(&mut body)).flatten();
        ReceivedBatch {
            save: save.and_then(|bytes| SaveRequest::decode(&bytes)),
            elements: Vec::new(),
            interrupted: false,
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

    /// Reads the function and the arguments that the tasks have in common; the list is not protected. Every
    /// task gets objects of its own, because C code may change them in place, and because objects to which they
    /// refer by name, such as a namespace, may have been replaced since. The exceptions are [`batch::CHUNK`]
    /// and [`batch::FUNCTION`].
    ///
    /// # Safety
    /// Must be called under [`crate::r::unwind::run`]: R may jump.
    pub(super) unsafe fn read_common(&mut self) -> SEXP {
        // SAFETY: guaranteed by the caller; this frame owns nothing that needs to be dropped when R jumps.
        unsafe {
            if self.reused_list.is_none() {
                let began = Instant::now();
                let value = Rf_protect(mapped::read(&self.common, may_map()));
                if self.is(batch::CHUNK) || self.is(batch::FUNCTION) && self.copy_arguments(value) {
                    self.reused_list = Some(Preserved::new(value));
                    // The time for reading is reported separately from that of the tasks.
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

    /// Makes a copy of the arguments in `common`, from which each task gets its own. Returns whether that is
    /// possible: the arguments must be short, and must not refer to anything that the function may also refer
    /// to.
    ///
    /// # Safety
    /// Must be called under [`crate::r::unwind::run`], with a protected value: R may jump.
    unsafe fn copy_arguments(&mut self, common: SEXP) -> bool {
        // SAFETY: guaranteed by the caller; this frame owns nothing that needs to be dropped when R jumps.
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

    /// Saves the complete results. Returns the head of the answer, and its results. The time that saving takes counts as
    /// that of reading: batches are so long that both take a small part of the time.
    pub(super) fn save(&mut self) -> (Vec<u8>, Body) {
        let (seconds, computed) = self.took();
        let began = Instant::now();
        let (prefix, results) = self.saved();
        let reading = self.reading_took + began.elapsed();
        let mut head = self.head_of_answer(seconds, computed, reading);
        head.extend_from_slice(&prefix);
        (head, results)
    }

    fn saved(&mut self) -> (Vec<u8>, Body) {
        // Copies of the body share its bytes.
        let mut results = Body::from_bytes(std::mem::take(&mut self.results));
        let mut prefix = Vec::new();
        let Some(request) = &self.save else {
            return (prefix, results);
        };
        Saver::remove(request);
        // An element that was interrupted has no result. If the head takes the answer, it stores all of that.
        let complete = self
            .elements
            .len()
            .saturating_sub(usize::from(self.interrupted));
        let complete = self.elements.get(..complete).unwrap_or_default();
        let is_short = (results.len as u64) < request.least;
        let items = (!is_short).then(|| stored::items_of(results.clone(), complete));
        let saved = match items {
            None => Saved::Nowhere(String::new()),
            Some(Some(items)) => with_saver(request, |saver| saver.save(&items)),
            Some(None) => Saved::Nowhere("the results cannot be stored".into()),
        };
        let saved = match self.interrupted {
            true => Saved::Nowhere(String::new()),
            false => saved,
        };
        let is_needed = request.values || results.len < SHORT;
        if saved == Saved::InRun && !is_needed {
            let count = self.elements.len();
            results = stored::without_values(results.clone(), count).unwrap_or(results);
        }
        batch::put_saved(&saved, &mut prefix);
        (prefix, results)
    }

    /// Appends a value that is not plain to the results.
    ///
    /// # Safety
    /// Must be called under [`crate::r::unwind::run`], with a protected value: R may jump.
    pub(super) unsafe fn append_result(&mut self, value: SEXP) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            if self.is(batch::STORED) {
                batch::append_sized(value, &mut self.results);
            } else {
                batch::write_serialized(value, &mut self.results);
            }
        }
    }

    /// Returns whether there are more tasks that this worker has to run.
    pub(super) fn goes_on(&self) -> bool {
        let is_over = || self.until.is_some_and(|until| clock::coarse_now() > until);
        self.started < self.head.count && !is_over()
    }

    /// Returns the duration of the tasks so far, and their CPU time.
    fn took(&self) -> (f64, Option<f64>) {
        let computed = self.usage.computed().map(|time| time.as_secs_f64());
        (self.began.elapsed().as_secs_f64(), computed)
    }

    /// Returns the head of the answer, which precedes the results.
    pub(super) fn answer_head(&self) -> Vec<u8> {
        let (seconds, computed) = self.took();
        self.head_of_answer(seconds, computed, self.reading_took)
    }

    fn head_of_answer(&self, seconds: f64, computed: Option<f64>, reading: Duration) -> Vec<u8> {
        let mut out = Vec::with_capacity(batch::ANSWER_HEAD);
        AnswerHead {
            seconds,
            computed,
            reading: reading.as_secs_f64(),
            count: self.started,
        }
        .write(&mut out);
        out
    }
}
