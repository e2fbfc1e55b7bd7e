//! The codec of jobs, which knows R: encodes elements into messages and decodes answers into results. The job
//! engine is [`rustcluster_core::head::job`].

use super::handle::{Cluster, SLICE, ToHub};
use super::values::{Storing, Values};
use super::{broadcast, nodes, status};
use crate::codec::stored::{self, Stored};
use crate::codec::stream::{self, BoundedSink, Format, Sink};
use crate::codec::{batch, mapped, plain};
use crate::r::failure::Failure;
use crate::r::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{
    INTEGER_ELT, R_NilValue, Rf_allocVector, Rf_error, Rf_protect, Rf_unprotect, SET_VECTOR_ELT,
    SEXP, SEXPTYPE, TYPEOF, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::head::job::{BatchLoss, Codec, Form, Taken};
use rustcluster_core::head::retry::is_reported;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank, TaskId};
use rustcluster_core::store::save::Saved;
use std::ffi::{c_int, c_void};
use std::time::Duration;

/// Minimum size of an element that is sent alone, in bytes.
const LONG: usize = 64 * 1024;

/// Size of the elements in one message from which on no more elements are added, in bytes.
const FULL: usize = 48 * 1024;

/// The codec of a job on this cluster.
pub(super) struct Encoder<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) job: JobId,
    pub(super) values: &'a mut Values,
}

struct Gathering<'a> {
    values: &'a mut Values,
    indices: &'a [usize],
    count: usize,
    /// The reason why the next element was not added.
    stopped: Option<Form>,
}

unsafe extern "C" fn gather_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the gathering above, which outlives this call. This frame owns nothing that needs to be
    // dropped when R jumps.
    unsafe {
        let gathering = &mut *data.cast::<Gathering<'_>>();
        let values = &mut *gathering.values;
        while gathering.count < gathering.indices.len() && values.message.len() < FULL {
            let index = gathering.indices[gathering.count];
            let before = values.message.len();
            add_number(values.storing.as_ref(), index, &mut values.message);
            add_seed(&values.seed, index, &mut values.message);
            let element = Rf_protect(values.element(index));
            if !batch::append_plain(element, &mut values.message) {
                // If the common list is fixed, elements cannot share a changeable object with it.
                let mut fixed = values.fixed;
                // Skip the serialization of an element that is known to be long.
                let mut long = fixed && stream::min_size_of_value(element) >= LONG;
                if !long {
                    batch::begin_serialized(&mut values.message);
                    let mut sink = BoundedSink::new(&mut values.message, before + LONG - 1);
                    fixed |= stream::write_fixed(element, &mut sink);
                    long = sink.over;
                }
                if !fixed || long {
                    values.message.truncate(before);
                    gathering.stopped = Some(if fixed { Form::Long } else { Form::Single });
                    Rf_unprotect(1);
                    return R_NilValue;
                }
            }
            Rf_unprotect(1);
            gathering.count += 1;
        }
        R_NilValue
    }
}

/// Adds the number of a task's element in the run, if workers save their results.
fn add_number(storing: Option<&Storing>, index: usize, out: &mut Vec<u8>) {
    if let Some(storing) = storing.filter(|storing| storing.saving.is_some()) {
        out.extend_from_slice(&storing.element(index).to_ne_bytes());
    }
}

/// # Safety
/// Must be called under [`unwind::run`].
unsafe fn add_seed(seed: &Robj, index: usize, out: &mut Vec<u8>) {
    if seed.is_null() {
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        let state = seed_of(seed, index);
        for at in 0..batch::SEED as isize {
            let number = match TYPEOF(state) == SEXPTYPE::INTSXP && XLENGTH(state) > at {
                true => INTEGER_ELT(state, at),
                false => 0,
            };
            out.extend_from_slice(&number.to_ne_bytes());
        }
    }
}

/// Returns the seed of a task, which is not protected.
///
/// # Safety
/// Must be called under [`unwind::run`].
unsafe fn seed_of(seed: &Robj, index: usize) -> SEXP {
    // SAFETY: the caller's.
    unsafe { rustcluster_call_with(seed.get().cast(), index as f64 + 1.0) }
}

struct WritingElements<'a> {
    values: &'a mut Values,
    index: usize,
    form: Form,
    format: Format,
    sink: &'a mut dyn Sink,
    prefix: Vec<u8>,
    /// The request to save the result.
    save: Vec<u8>,
}

unsafe extern "C" fn write_alone(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the writing above, which outlives this call. This frame owns nothing that needs to be
    // dropped when R jumps.
    unsafe {
        let writing = &mut *data.cast::<WritingElements<'_>>();
        let values = &mut *writing.values;
        let element = Rf_protect(values.element(writing.index));
        if writing.form == Form::Single {
            let common = values.common.get();
            let spread = c_int::from(values.flags & batch::SPREAD != 0);
            let message = if values.seed.is_null() {
                rustcluster_message(common.cast(), element.cast(), spread)
            } else {
                let args = Rf_protect(rustcluster_arguments(common.cast(), element.cast(), spread));
                let call = Rf_protect(Rf_allocVector(SEXPTYPE::VECSXP, 3));
                SET_VECTOR_ELT(call, 0, VECTOR_ELT(common, 0));
                SET_VECTOR_ELT(call, 1, args);
                SET_VECTOR_ELT(call, 2, seed_of(&values.seed, writing.index));
                let message = rustcluster_message(values.seeded.get().cast(), call.cast(), 1);
                Rf_unprotect(2);
                message
            };
            stream::write(Rf_protect(message), writing.format, writing.sink);
            Rf_unprotect(1);
        } else {
            let prefix = &mut writing.prefix;
            batch::Head {
                flags: values.flags,
                count: 1,
                max_micros: 0,
            }
            .write(prefix);
            prefix.append(&mut writing.save);
            add_number(values.storing.as_ref(), writing.index, prefix);
            add_seed(&values.seed, writing.index, prefix);
            writing.sink.write(prefix);
            batch::write_serialized(element, writing.sink);
        }
        Rf_unprotect(1);
        R_NilValue
    }
}

struct Taking<'a> {
    values: &'a mut Values,
    indices: &'a [usize],
    body: Body,
    /// Whether the vectors of the answer are in memory that is shared with the worker.
    shared: bool,
    /// The head of the answer, if it is the answer to a batch.
    head: Option<batch::AnswerHead>,
    count: usize,
    /// The results to be stored, by their tasks, each with whether it is an error.
    stored: Vec<(usize, Stored, bool)>,
    /// The bytes of a result while R reads or writes it.
    being_read: Body,
    being_written: Vec<u8>,
    /// Where the worker has saved the results.
    saved: Option<Saved>,
    /// Whether the answer, which is not the answer to a batch, is an error.
    single_failed: bool,
    cluster: &'a Cluster,
    on: Rank,
}

/// Takes the answer to a batch whose results are stored.
///
/// # Safety
/// Must be called under [`unwind::run`]: R may jump. This frame then owns nothing that needs to be dropped.
unsafe fn take_stored(taking: &mut Taking<'_>) {
    const DAMAGED: *const std::ffi::c_char = c"damaged message".as_ptr();
    let count = taking.head.map_or(0, |head| head.count as usize);
    let storing = taking.values.storing.as_ref();
    let is_saved = storing.is_some_and(|storing| storing.saving.is_some());
    // SAFETY: guaranteed by the caller.
    unsafe {
        if is_saved {
            taking.saved = batch::take_saved(&mut taking.body);
            if taking.saved.is_none() {
                Rf_error(DAMAGED);
            }
        }
        while taking.count < taking.indices.len().min(count) {
            let index = taking.indices[taking.count];
            if !take_one_stored(taking, index) {
                Rf_error(DAMAGED);
            }
            let (reads, failed) = match taking.stored.last() {
                Some((_, Stored::InRun, _)) => (false, false),
                Some((_, _, failed)) => (taking.values.reads() || *failed, *failed),
                None => (false, false),
            };
            if reads {
                let value = match taking.stored.last() {
                    Some((_, Stored::Plain(_), _)) => plain::read_value(&taking.values.scratch),
                    _ => stream::read(&mut taking.being_read),
                };
                let value = Rf_protect(value);
                taking.values.put(index, value, failed);
                if failed && !taking.values.reads() {
                    status::note_error(taking.cluster, taking.on, value, true);
                }
                Rf_unprotect(1);
            }
            taking.count += 1;
        }
    }
}

/// Takes the next result. Returns `false` if the answer is damaged.
fn take_one_stored(taking: &mut Taking<'_>, index: usize) -> bool {
    let Some((stored, failed)) = stored::take_result(&mut taking.body) else {
        return false;
    };
    if taking.values.reads() || failed {
        match &stored {
            Stored::Plain(body) => {
                let scratch = &mut taking.values.scratch;
                scratch.clear();
                body.chunks
                    .iter()
                    .for_each(|chunk| scratch.extend_from_slice(chunk));
            }
            Stored::Serialized(body) => taking.being_read = body.clone(),
            Stored::InRun => {}
        }
    }
    taking.stored.push((index, stored, failed));
    true
}

unsafe extern "C" fn take_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the taking above, which outlives this call. This frame owns nothing that needs to be
    // dropped when R jumps.
    unsafe {
        let taking = &mut *data.cast::<Taking<'_>>();
        let values = &mut *taking.values;
        let Some(head) = batch::AnswerHead::read(&mut taking.body) else {
            let answer = nodes::read_body(&mut taking.body, taking.shared);
            let answer = Rf_protect(answer);
            let value = rustcluster_answer_value(answer.cast());
            let failed = rustcluster_answer_failed(answer.cast()) != 0;
            values.put(taking.indices[0], value, failed);
            if values.storing.is_some() {
                stream::write(value, Format::Native, &mut taking.being_written);
            }
            Rf_unprotect(1);
            if failed && !values.reads() {
                status::note_error(taking.cluster, taking.on, value, true);
            }
            taking.single_failed = failed;
            taking.count = 1;
            return R_NilValue;
        };
        taking.head = Some(head);
        if values.storing.is_some() {
            take_stored(taking);
            return R_NilValue;
        }
        while taking.count < taking.indices.len().min(head.count as usize) {
            let mut kind = [0];
            batch::read_bytes(&mut taking.body, &mut kind);
            let value = batch::read_value(&mut taking.body, &mut values.scratch);
            values.put(taking.indices[taking.count], value, kind[0] == batch::ERROR);
            taking.count += 1;
        }
        R_NilValue
    }
}

unsafe extern "C" fn check(_: *mut c_void) -> SEXP {
    // SAFETY: this runs under unwind::run, and this frame owns nothing.
    unsafe {
        unwind::check_interrupt();
        R_NilValue
    }
}

impl Codec for Encoder<'_> {
    type Stop = Jump;

    fn takes_batches(&self, rank: Rank) -> bool {
        self.cluster.format(rank) == Format::Native
    }

    fn gather(
        &mut self,
        tasks: &[usize],
        max_time: Duration,
    ) -> std::result::Result<(usize, Form), Jump> {
        self.values.message.clear();
        let head = batch::Head {
            flags: self.values.flags,
            count: 0,
            max_micros: u32::try_from(max_time.as_micros()).unwrap_or(0),
        };
        head.write(&mut self.values.message);
        let mut gathering = Gathering {
            values: self.values,
            indices: tasks,
            count: 0,
            stopped: None,
        };
        unwind::run(gather_protected, &mut gathering)?;
        let (count, stopped) = (gathering.count, gathering.stopped);
        match stopped {
            Some(form) if count == 0 => Ok((1, form)),
            _ => {
                batch::Head::count(&mut self.values.message, count as u32);
                Ok((count, Form::Batch))
            }
        }
    }

    fn write(&mut self, assigned: Rank, task: usize, form: Form) -> std::result::Result<(), Jump> {
        let hub = &self.cluster.hub;
        let host = hub.borrow().worker(assigned).agent as u32;
        let storing = self.values.storing.as_mut();
        let saving = storing.and_then(|storing| storing.saving.as_mut());
        let save = saving.map_or_else(Vec::new, |saving| saving.prefix(host));
        match form {
            Form::Batch => {
                let message = &self.values.message;
                let (head, elements) = message.split_at(batch::HEAD.min(message.len()));
                hub.borrow_mut().write(head);
                if !save.is_empty() {
                    hub.borrow_mut().write(&save);
                }
                if hub.borrow_mut().write(elements) {
                    // Little data is in flight for messages this short.
                    while hub.borrow_mut().wait_to_send(SLICE) {
                        unwind::run(check, &mut ())?;
                    }
                }
                Ok(())
            }
            Form::Long | Form::Single => {
                let mut writing = WritingElements {
                    values: self.values,
                    index: task,
                    form,
                    format: self.cluster.format(assigned),
                    sink: &mut ToHub(self.cluster),
                    prefix: Vec::new(),
                    save,
                };
                unwind::run(write_alone, &mut writing).map(drop)
            }
        }
    }

    fn resend_blob(&mut self, blob: BlobId, assigned: Rank) -> std::result::Result<(), Jump> {
        broadcast::resend_blob(self.cluster, blob, assigned, &self.values.common)
    }

    fn is_plain(&self, body: &Body) -> bool {
        body.whole().is_some_and(batch::is_plain_result)
    }

    fn take(
        &mut self,
        on: Rank,
        task: TaskId,
        tasks: &[usize],
        mut body: Body,
    ) -> std::result::Result<Taken, Jump> {
        let (failed, fresh) = (self.values.failed.len(), self.values.fresh.len());
        plain::join(&mut body);
        let memory = mapped::open(&mut body);
        let mut taking = Taking {
            values: self.values,
            indices: tasks,
            shared: memory.is_some(),
            body,
            head: None,
            count: 0,
            stored: Vec::new(),
            being_read: Body::default(),
            being_written: Vec::new(),
            saved: None,
            single_failed: false,
            cluster: self.cluster,
            on,
        };
        self.cluster.reading.set(Some((task, 0)));
        let reading = mapped::MappedReading::of(memory.as_ref());
        let taken = unwind::run(take_protected, &mut taking);
        drop(reading);
        let (head, count) = (taking.head.unwrap_or_default(), taking.count);
        let mut stored = std::mem::take(&mut taking.stored);
        let single = std::mem::take(&mut taking.being_written);
        if !single.is_empty() {
            let single = Stored::Serialized(Body::from_bytes(single));
            stored.push((tasks[0], single, taking.single_failed));
        }
        let saved = taking.saved.take();
        drop(taking);
        let values = &mut *self.values;
        if let Err(jump) = taken {
            // R finds the reason, and then calls job_unreadable().
            values.failed.truncate(failed);
            values.fresh.truncate(fresh);
            return Err(jump);
        }
        self.cluster.reading.set(None);
        if let Some(storing) = &mut values.storing {
            let host = self.cluster.hub.borrow().worker(on).agent as u32;
            storing.take(host, saved, stored);
            // Results arrive only as fast as they can be written.
            storing.writer.wait_for_room(SLICE);
        }
        let errors = values.failed[failed..].iter();
        for &index in errors.filter(|_| values.reads()) {
            // SAFETY: this runs on R's thread; the list keeps the value alive, and has as many elements.
            unsafe {
                let value = VECTOR_ELT(values.results.get(), index as isize - 1);
                let raised = !values.returned.contains(&index);
                status::note_error(self.cluster, on, value, raised);
            }
        }
        if !values.unanswered.is_empty() {
            for index in tasks.iter().take(count) {
                values.unanswered.remove(index);
            }
        }
        let time = |seconds| Duration::try_from_secs_f64(seconds).ok();
        Ok(Taken {
            tasks: count,
            busy: time(head.seconds).unwrap_or_default(),
            computed: head.computed.and_then(time),
            reading: time(head.reading).unwrap_or_default(),
        })
    }

    fn lost(&mut self, failure: &BatchLoss, again: &[usize]) {
        if is_reported(&failure.termination, failure.now.is_none()) {
            // Tasks that are not retried have an error of their own.
            let reported = if again.is_empty() {
                &failure.tasks
            } else {
                again
            };
            let warning = loss_of_batch(failure, reported)
                .with("noun", &self.values.noun)
                .with("again", !again.is_empty());
            self.cluster.failures.borrow_mut().report(self.job, warning);
        }
    }
}

/// Returns the indices of tasks as R counts them, from 1.
pub(super) fn numbers(tasks: &[usize]) -> Vec<i32> {
    tasks.iter().map(|&index| index as i32 + 1).collect()
}

/// Returns a worker failure for R, with these tasks of the lost batch.
pub(super) fn loss_of_batch(failure: &BatchLoss, tasks: &[usize]) -> Failure {
    let first = failure.tasks.first().map_or(0, |first| first + 1);
    Failure::worker_failure(
        failure.assigned,
        &failure.termination,
        failure.now.as_deref(),
    )
    .with("task", failure.task)
    .with("index", first)
    .with("elements", numbers(tasks))
}

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_message(common: *mut c_void, element: *mut c_void, spread: c_int) -> SEXP;
    fn rustcluster_arguments(common: *mut c_void, element: *mut c_void, spread: c_int) -> SEXP;
    fn rustcluster_call_with(function: *mut c_void, number: f64) -> SEXP;
    fn rustcluster_answer_value(answer: *mut c_void) -> SEXP;
    fn rustcluster_answer_failed(answer: *mut c_void) -> c_int;
}
