//! The elements of a job as R has them: how they become messages, and answers its results.

use super::handle::{Cluster, SLICE, ToHub, Unsent};
use super::job::Job;
use super::{nodes, status};
use crate::codec::stream::{self, Bounded, Format, Sink};
use crate::codec::{batch, mapped};
use crate::r::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{
    INTEGER_ELT, R_NilValue, Rf_allocVector, Rf_protect, Rf_unprotect, SET_VECTOR_ELT, SEXP,
    SEXPTYPE, TYPEOF, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::head::batching::Ended;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::ids::{Rank, TaskId};
use std::ffi::{c_int, c_void};
use std::time::{Duration, Instant};

/// An element of so many bytes goes alone.
const LONG: usize = 64 * 1024;

/// Bytes of elements in one message, beyond which no more are added.
const FULL: usize = 48 * 1024;

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

/// How elements cross.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As [`Job::message`] has them.
    Unit,
    /// One alone, serialized as it is sent.
    Long,
    /// One in a message of parallel's: it holds what may change, as what is common may, and they may
    /// hold the same.
    Message,
}

pub(super) struct Gathering<'a> {
    job: &'a mut Job,
    indices: Vec<usize>,
    pub(super) count: usize,
    /// Why the next one has not been added.
    pub(super) stopped: Option<Form>,
}

pub(super) unsafe extern "C" fn gather_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the gathering above, which outlives this call. This frame holds nothing that
    // is to be dropped when R jumps.
    unsafe {
        let gathering = &mut *data.cast::<Gathering<'_>>();
        let job = &mut *gathering.job;
        while gathering.count < gathering.indices.len() && job.message.len() < FULL {
            let index = gathering.indices[gathering.count];
            let before = job.message.len();
            add_seed(&job.seed, index, &mut job.message);
            let element = Rf_protect(job.element(index));
            if !batch::append_plain(element, &mut job.message) {
                // If what is common cannot change, they cannot have in common what does.
                let mut fixed = job.fixed;
                // What is seen to be long is not serialized to find that out.
                let mut long = fixed && stream::least_size_of_value(element) >= LONG;
                if !long {
                    batch::begin_serialized(&mut job.message);
                    let mut sink = Bounded::new(&mut job.message, before + LONG - 1);
                    fixed |= stream::write_fixed(element, &mut sink);
                    long = sink.over;
                }
                if !fixed || long {
                    job.message.truncate(before);
                    gathering.stopped = Some(if fixed { Form::Long } else { Form::Message });
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

/// # Safety
/// Under [`unwind::run`].
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

/// The seed of a task, not protected.
///
/// # Safety
/// Under [`unwind::run`].
unsafe fn seed_of(seed: &Robj, index: usize) -> SEXP {
    // SAFETY: the caller's.
    unsafe { rustcluster_call_with(seed.get().cast(), index as f64 + 1.0) }
}

pub(super) struct Writing<'a> {
    job: &'a mut Job,
    index: usize,
    form: Form,
    format: Format,
    sink: &'a mut dyn Sink,
    prefix: Vec<u8>,
}

pub(super) unsafe extern "C" fn write_alone(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the writing above, which outlives this call. This frame holds nothing that
    // is to be dropped when R jumps.
    unsafe {
        let writing = &mut *data.cast::<Writing<'_>>();
        let job = &mut *writing.job;
        let element = Rf_protect(job.element(writing.index));
        if writing.form == Form::Message {
            let common = job.common.get();
            let spread = c_int::from(job.flags & batch::SPREAD != 0);
            let message = if job.seed.is_null() {
                rustcluster_message(common.cast(), element.cast(), spread)
            } else {
                let args = Rf_protect(rustcluster_arguments(common.cast(), element.cast(), spread));
                let call = Rf_protect(Rf_allocVector(SEXPTYPE::VECSXP, 3));
                SET_VECTOR_ELT(call, 0, VECTOR_ELT(common, 0));
                SET_VECTOR_ELT(call, 1, args);
                SET_VECTOR_ELT(call, 2, seed_of(&job.seed, writing.index));
                let message = rustcluster_message(job.seeded.get().cast(), call.cast(), 1);
                Rf_unprotect(2);
                message
            };
            stream::write(Rf_protect(message), writing.format, writing.sink);
            Rf_unprotect(1);
        } else {
            let prefix = &mut writing.prefix;
            batch::Head {
                flags: job.flags,
                count: 1,
                most: 0,
            }
            .write(prefix);
            add_seed(&job.seed, writing.index, prefix);
            writing.sink.write(prefix);
            batch::write_serialized(element, writing.sink);
        }
        Rf_unprotect(1);
        R_NilValue
    }
}

pub(super) struct Taking<'a> {
    pub(super) job: &'a mut Job,
    indices: Vec<usize>,
    body: Body,
    /// Its vectors are in memory that is shared with the worker.
    shared: bool,
    /// What the answer begins with, if it is one of a unit.
    pub(super) head: Option<batch::AnswerHead>,
    pub(super) count: usize,
}

pub(super) unsafe extern "C" fn take_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the taking above, which outlives this call. This frame holds nothing that is
    // to be dropped when R jumps.
    unsafe {
        let taking = &mut *data.cast::<Taking<'_>>();
        let job = &mut *taking.job;
        let Some(head) = batch::AnswerHead::read(&mut taking.body) else {
            let answer = nodes::read_body(&mut taking.body, taking.shared);
            let answer = Rf_protect(answer);
            let value = rustcluster_answer_value(answer.cast());
            let failed = rustcluster_answer_failed(answer.cast()) != 0;
            job.put(taking.indices[0], value, failed);
            Rf_unprotect(1);
            taking.count = 1;
            return R_NilValue;
        };
        taking.head = Some(head);
        while taking.count < taking.indices.len().min(head.count as usize) {
            let mut kind = [0];
            batch::read_bytes(&mut taking.body, &mut kind);
            let value = batch::read_value(&mut taking.body, &mut job.scratch);
            job.put(taking.indices[taking.count], value, kind[0] == batch::ERROR);
            taking.count += 1;
        }
        R_NilValue
    }
}

unsafe extern "C" fn check(_: *mut c_void) -> SEXP {
    // SAFETY: under unwind::run; this frame holds nothing.
    unsafe {
        unwind::check_interrupt();
        R_NilValue
    }
}

impl Job {
    pub(super) fn write(
        &mut self,
        cluster: &Cluster,
        on: Rank,
        position: Option<&usize>,
        form: Form,
    ) -> std::result::Result<(), Jump> {
        let index = position.map_or(0, |&position| self.task(position));
        match form {
            Form::Unit => {
                if cluster.hub.borrow_mut().write(&self.message) {
                    // Not much is under way for what is this short.
                    while cluster.hub.borrow_mut().wait_to_send(SLICE) {
                        unwind::run(check, &mut ())?;
                    }
                }
                Ok(())
            }
            Form::Long | Form::Message => {
                let mut writing = Writing {
                    job: self,
                    index,
                    form,
                    format: cluster.formats.borrow()[on as usize],
                    sink: &mut ToHub(cluster),
                    prefix: Vec::new(),
                };
                unwind::run(write_alone, &mut writing).map(drop)
            }
        }
    }

    /// Puts as many of these tasks as fit into one message.
    pub(super) fn gather(
        &mut self,
        positions: &[usize],
        most: Duration,
    ) -> std::result::Result<(usize, Form), Jump> {
        self.message.clear();
        let head = batch::Head {
            flags: self.flags,
            count: 0,
            most: u32::try_from(most.as_micros()).unwrap_or(0),
        };
        head.write(&mut self.message);
        let mut gathering = Gathering {
            indices: positions.iter().map(|&at| self.task(at)).collect(),
            job: self,
            count: 0,
            stopped: None,
        };
        unwind::run(gather_protected, &mut gathering)?;
        let (count, stopped) = (gathering.count, gathering.stopped);
        match stopped {
            Some(form) if count == 0 => Ok((1, form)),
            _ => {
                batch::Head::count(&mut self.message, count as u32);
                Ok((count, Form::Unit))
            }
        }
    }

    /// Takes a unit's answer, which this worker has given.
    pub(super) fn take(
        &mut self,
        cluster: &Cluster,
        on: Rank,
        task: TaskId,
        mut body: Body,
    ) -> std::result::Result<(), Unsent> {
        let Some(sent) = self.remove(task) else {
            return Ok(());
        };
        self.detained[sent.place] = false;
        let now = Instant::now();
        let bytes = body.len;
        let indices: Vec<usize> = sent.tasks.iter().map(|&at| self.task(at)).collect();
        let memory = mapped::open(&mut body);
        let mut taking = Taking {
            job: self,
            indices,
            shared: memory.is_some(),
            body,
            head: None,
            count: 0,
        };
        let (failed, fresh) = (taking.job.failed.len(), taking.job.fresh.len());
        cluster.reading.set(Some((task, 0)));
        let reading = mapped::Reading::of(memory.as_ref());
        let taken = unwind::run(take_protected, &mut taking);
        drop(reading);
        let (head, count) = (taking.head.unwrap_or_default(), taking.count);
        if let Err(jump) = taken {
            // R decides on all of it: see job_settle().
            self.failed.truncate(failed);
            self.fresh.truncate(fresh);
            self.lanes[sent.place].push_front(task);
            self.sent.insert(task, sent);
            return Err(jump.into());
        }
        cluster.reading.set(None);
        if let Some(last) = self.failed[failed..].last() {
            // SAFETY: on R's thread; the list keeps it alive, and has as many elements.
            unsafe {
                let value = VECTOR_ELT(self.results.get(), *last as isize - 1);
                status::note_error(cluster, on, value);
            }
        }
        if !self.held.is_empty() {
            for &at in sent.tasks.iter().take(count) {
                let index = self.task(at);
                self.held.remove(&index);
            }
        }
        let turnaround = sent.telling.then(|| now.duration_since(sent.at));
        let time = |seconds| Duration::try_from_secs_f64(seconds).ok();
        let ended = Ended {
            tasks: count,
            busy: time(head.seconds).unwrap_or_default(),
            turnaround,
            bytes,
            computed: head.computed.and_then(time),
            reading: time(head.reading).unwrap_or_default(),
        };
        let at = self.now();
        self.planner.ended(sent.place, ended, at);
        if count < sent.tasks.len() {
            self.planner.returned(sent.place, &sent.tasks[count..]);
        }
        self.done += count;
        if count < sent.tasks.len() || self.planner.may_resume(at) {
            self.wake();
        }
        self.ready.push_front(sent.place);
        Ok(())
    }

    /// An element, not protected.
    ///
    /// # Safety
    /// As for [`Elements::get`].
    unsafe fn element(&mut self, index: usize) -> SEXP {
        // SAFETY: the caller's.
        unsafe {
            match self.held.get(&index) {
                Some(element) => element.get(),
                None => {
                    let element = Rf_protect(self.elements.get(index));
                    if let Elements::Function(_) = self.elements {
                        self.held.insert(index, Robj::from_sexp(element));
                    }
                    Rf_unprotect(1);
                    element
                }
            }
        }
    }

    /// Notes a result, which may be that the task `failed`. The value need not be protected.
    pub(super) fn put(&mut self, index: usize, value: SEXP, failed: bool) {
        // SAFETY: on R's thread; the list has as many elements as there are tasks; none of these
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
    fn rustcluster_message(common: *mut c_void, element: *mut c_void, spread: c_int) -> SEXP;
    fn rustcluster_arguments(common: *mut c_void, element: *mut c_void, spread: c_int) -> SEXP;
    fn rustcluster_element(vector: *mut c_void, at: isize) -> SEXP;
    fn rustcluster_call_with(function: *mut c_void, number: f64) -> SEXP;
    fn rustcluster_is_error(value: *mut c_void) -> c_int;
    fn rustcluster_answer_value(answer: *mut c_void) -> SEXP;
    fn rustcluster_answer_failed(answer: *mut c_void) -> c_int;
}
