//! Functions of workers that run tasks, for R. A process has one channel.

use super::batch::ReceivedBatch;
use super::memory_limit::{self, may_map};
use crate::codec::mapped::{self, MappedAnswer, Mapper};
use crate::codec::stream::{self, Format, Sink, Source};
use crate::codec::{batch, plain};
use crate::r::failure::Failure;
use crate::r::first_string;
use crate::r::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, Rf_protect, Rf_unprotect, SEXP, VECTOR_ELT};
use rustcluster_core::platform::{fd, log, signals};
use rustcluster_core::protocol::control::WorkerConfig;
use rustcluster_core::worker::channel::{Channel, Seed, TaskMessage};
use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

thread_local! {
    static CHANNEL: RefCell<Option<Channel>> = const { RefCell::new(None) };
}

/// Makes `channel` the channel of this process, and limits the memory of the process.
pub fn adopt(mut channel: Channel, memory_limit: u64) -> io::Result<()> {
    channel.renumber()?;
    memory_limit::set(memory_limit)?;
    CHANNEL.set(Some(channel));
    Ok(())
}

fn with_channel<T>(body: impl FnOnce(&mut Channel) -> io::Result<T>) -> io::Result<T> {
    CHANNEL.with_borrow_mut(|channel| match channel {
        Some(channel) => body(channel),
        None => Err(io::Error::other("this process is not a worker")),
    })
}

/// In a separate process, takes the channel from stdin and returns the packages to attach.
/// @noRd
#[extendr]
fn worker_connect() -> Robj {
    let connect = || -> io::Result<Robj> {
        let reader = fd::take_stdin()?;
        let stream = UnixStream::from(OwnedFd::from(reader));
        let mut channel = Channel::new(stream, 0);
        let config: WorkerConfig = channel.config()?;
        log::start_or_say(log::Role::Worker(config.rank));
        memory_limit::set(config.memory_limit)?;
        channel.shared_answers = config.shared_answers;
        CHANNEL.set(Some(channel));
        Ok(list!(packages = config.packages).into())
    };
    connect().unwrap_or_else(|error| to_r(error.into()))
}

/// Reports the temporary directory of this worker to the agent, and whether the worker can take tasks.
/// @noRd
#[extendr]
fn worker_ready(tempdir: &str, ready: bool) -> Robj {
    match with_channel(|channel| channel.ready(tempdir.to_owned(), ready)) {
        Ok(()) => ().into(),
        Err(error) => to_r(error.into()),
    }
}

/// The channel, as a sink for R's serialization. The first error is kept: nothing can be sent after it.
struct AnswerSink {
    sent: io::Result<()>,
    /// The answer in shared memory, if it is written there instead.
    shared: Option<Mapper<MappedAnswer>>,
    /// Whether the complete answer has been sent through shared memory.
    done: bool,
}

impl Sink for AnswerSink {
    fn write(&mut self, bytes: &[u8]) -> bool {
        if let Some(shared) = &mut self.shared {
            return shared.write(bytes);
        }
        if self.sent.is_ok() {
            self.sent = send(bytes, false);
        }
        false
    }
}

impl AnswerSink {
    pub(super) fn new() -> AnswerSink {
        AnswerSink {
            sent: Ok(()),
            shared: None,
            done: false,
        }
    }

    fn begin(&mut self) {
        self.shared = None;
        self.sent = with_channel(|channel| {
            channel.restart();
            Ok(())
        });
    }

    /// Puts a value into shared memory: see [`mapped::share`].
    ///
    /// # Safety
    /// The same as for [`mapped::share`].
    unsafe fn share(&mut self, value: SEXP) -> Option<SEXP> {
        let shared_answers = with_channel(|channel| Ok(channel.shared_answers));
        if !may_map() || !shared_answers.unwrap_or(false) {
            return None;
        }
        // SAFETY: guaranteed by the caller.
        let (answer, instead) = unsafe { mapped::share(value) }?;
        self.shared = Some(answer);
        Some(instead)
    }

    /// Sends the complete answer in shared memory. Returns whether that was possible.
    fn send_shared_answer(&mut self) -> bool {
        let Some((file, len)) = self.shared.take().and_then(Mapper::finish) else {
            return false;
        };
        match with_channel(|channel| channel.send_shared_answer(&file, len)) {
            Ok(sent) => self.done = sent,
            Err(error) => self.sent = Err(error),
        }
        self.done || self.sent.is_err()
    }

    fn finish(self) -> std::result::Result<(), Stop> {
        self.sent?;
        if self.done {
            return Ok(());
        }
        Ok(send(&[], true)?)
    }
}

fn send(bytes: &[u8], last: bool) -> io::Result<()> {
    with_channel(|channel| channel.send(bytes, last))
}

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_take_message(message: *mut c_void) -> c_int;
    fn rustcluster_take_call(function: *mut c_void, arguments: *mut c_void, tag: *mut c_void);
    fn rustcluster_take_element(common: *mut c_void, element: *mut c_void, spread: c_int);
    fn rustcluster_run_task(with_time: c_int) -> SEXP;
    fn rustcluster_end_task(time: *mut f64) -> SEXP;
    fn rustcluster_set_seed(values: *const c_void, count: c_int, reassigned: c_int);
    fn rustcluster_seed_changed(values: *mut *const c_int, count: *mut c_int) -> c_int;
    fn rustcluster_is_reassigned() -> c_int;
    fn rustcluster_own_seed();
}

/// The reason why a worker stops serving tasks.
enum Stop {
    /// No more tasks will come.
    Done,
    Jump(Jump),
    Failed(io::Error),
}

impl From<Jump> for Stop {
    fn from(jump: Jump) -> Stop {
        Stop::Jump(jump)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        Stop::Failed(error)
    }
}

fn to_r(stop: Stop) -> Robj {
    // From here on, an interrupt of a task must not end what R does next.
    signals::block_interrupt();
    match stop {
        Stop::Done => ().into(),
        Stop::Jump(Jump(token)) => {
            unwind::forget_interrupt();
            token
        }
        Stop::Failed(error) => Failure::new("agent_failed")
            .with("reason", error.to_string())
            .into(),
    }
}

/// Serves tasks. Returns `NULL` when no more tasks will come, or the token if R jumps. SIGINT reaches R only
/// while a task runs.
/// @noRd
#[extendr]
fn worker_serve() -> Robj {
    loop {
        if let Err(stop) = serve_one() {
            return to_r(stop);
        }
    }
}

/// The current task, without its R objects, so that the value outlives a jump.
struct CurrentTask {
    task: TaskMessage,
    /// The integers of random number generators' states, and whether each state belongs to another worker.
    seeds: Vec<(Vec<c_int>, bool)>,
    sink: AnswerSink,
    done: bool,
    /// The buffer for an answer, reused from task to task.
    answer: Vec<u8>,
    /// The batch to which the task belongs.
    batch: Option<ReceivedBatch>,
}

/// The message of a task that does not arrive in one piece. The part in shared memory is read from there.
struct ReadMessage<'a> {
    task: &'a mut TaskMessage,
    /// The number of bytes of the blob that have been read.
    at: usize,
}

impl Source for ReadMessage<'_> {
    fn fill(&mut self, out: &mut [u8]) -> bool {
        let blob = self.task.blob.as_ref();
        let rest = blob.map_or(&[][..], |blob| &blob.bytes[self.at..]);
        let n = rest.len().min(out.len());
        let (now, later) = out.split_at_mut(n);
        now.copy_from_slice(&rest[..n]);
        self.at += n;
        later.is_empty() || self.task.body.fill(later)
    }
}

/// Returns a message that arrived in one piece.
pub(super) fn whole(task: &TaskMessage) -> Option<&[u8]> {
    match &task.blob {
        Some(blob) if task.body.len == 0 => Some(&blob.bytes),
        Some(_) => None,
        None => task.body.whole(),
    }
}

thread_local! {
    static SPARE_ANSWER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// The format of the current task, and so of its answer.
    static FORMAT: Cell<Format> = const { Cell::new(Format::Native) };
    /// The batch of the task out of which R has jumped.
    static INTERRUPTED: Cell<Option<ReceivedBatch>> = const { Cell::new(None) };
}

fn serve_one() -> std::result::Result<(), Stop> {
    signals::block_interrupt();
    let mut current = match INTERRUPTED.take() {
        Some(batch) => CurrentTask::again(batch),
        None => CurrentTask::next()?,
    };
    let reading = mapped::MappedReading::of(None);
    let ran = match current.batch {
        Some(_) => unwind::run(batch_protected, &mut current),
        None => unwind::run(task_protected, &mut current),
    };
    drop(reading);
    SPARE_ANSWER.set(current.answer);
    if ran.is_err() {
        INTERRUPTED.set(current.batch);
    }
    ran?;
    if current.done {
        return Err(Stop::Done);
    }
    current.sink.finish()
}

impl CurrentTask {
    pub(super) fn new(task: TaskMessage, batch: Option<ReceivedBatch>) -> CurrentTask {
        CurrentTask {
            task,
            seeds: Vec::new(),
            sink: AnswerSink::new(),
            done: false,
            answer: SPARE_ANSWER.take(),
            batch,
        }
    }

    fn next() -> std::result::Result<CurrentTask, Stop> {
        // Discard an interrupt that came too late for the previous task.
        unwind::forget_interrupt();
        let mut task = with_channel(Channel::next_task)?.ok_or(Stop::Done)?;
        let seeds =
            with_channel(|channel| Ok(channel.take_seeds().iter().map(integers).collect()))?;
        let batch = match task.blob.take() {
            Some(blob) => match batch::Head::read(&mut task.body) {
                Some(head) => Some(ReceivedBatch::new(
                    head,
                    blob,
                    std::mem::take(&mut task.body),
                )),
                None => {
                    task.blob = Some(blob);
                    None
                }
            },
            None => {
                plain::join(&mut task.body);
                task.blob = mapped::inline(&mut task.body);
                None
            }
        };
        let first = match &task.blob {
            Some(blob) => Some(&blob.bytes),
            None => task.body.chunks.front(),
        };
        FORMAT.set(Format::of(first.map_or(&[], |bytes| bytes)));
        let current = CurrentTask::new(task, batch);
        Ok(CurrentTask { seeds, ..current })
    }

    /// Continues with a batch.
    fn again(batch: ReceivedBatch) -> CurrentTask {
        CurrentTask::new(TaskMessage::default(), Some(batch))
    }
}

/// # Safety
/// Must be called under [`unwind::run`].
unsafe fn put_seeds(seeds: &[(Vec<c_int>, bool)]) {
    for (values, reassigned) in seeds {
        let count = values.len() as c_int;
        // SAFETY: guaranteed by the caller; this frame owns nothing that needs to be dropped when R jumps.
        unsafe { rustcluster_set_seed(values.as_ptr().cast(), count, c_int::from(*reassigned)) };
    }
}

unsafe extern "C" fn task_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the task of `serve_one`, which outlives this call. R may jump out of any function that
    // is called here, and this frame owns nothing that needs to be dropped then.
    unsafe {
        let current = data.cast::<CurrentTask>();
        match whole(&(*current).task) {
            Some(bytes) if plain::is_plain(bytes) => {
                let call = Rf_protect(plain::read_task(bytes));
                let part = |i| VECTOR_ELT(call, i).cast();
                rustcluster_take_call(part(0), part(1), part(2));
            }
            _ => {
                let task = &mut (*current).task;
                let message = match &task.blob {
                    Some(blob) if task.body.len == 0 => mapped::read(blob, may_map()),
                    _ => stream::read(&mut ReadMessage { task, at: 0 }),
                };
                let message = Rf_protect(message);
                (*current).done = rustcluster_take_message(message.cast()) == 0;
            }
        }
        Rf_unprotect(1);
        if (*current).done {
            return R_NilValue;
        }
        put_seeds(&(*current).seeds);
        signals::unblock_interrupt();
        let value = Rf_protect(rustcluster_run_task(1));
        let mut time = [0.0; 5];
        let tag = Rf_protect(rustcluster_end_task(time.as_mut_ptr()));
        (*current).sink.begin();
        leave_seed();
        let native = FORMAT.get() == Format::Native;
        if native && plain::write_answer(value, &time, tag, &mut (*current).answer) {
            (*current).sink.write(&(*current).answer);
        } else {
            write_slowly(value, true, &time, tag, &mut (*current).sink);
        }
        Rf_unprotect(2);
        R_NilValue
    }
}

unsafe extern "C" fn batch_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the task of `serve_one`, which outlives this call. R may jump out of any function that
    // is called here, and this frame owns nothing that needs to be dropped then.
    unsafe {
        let current = &mut *data.cast::<CurrentTask>();
        let Some(batch) = &mut current.batch else {
            return R_NilValue;
        };
        if batch.started == 0 {
            put_seeds(&current.seeds);
        }
        signals::unblock_interrupt();
        loop {
            batch.started += 1;
            batch.reading = true;
            if batch.is(batch::SAVED) {
                let mut element = [0; 4];
                batch::read_bytes(&mut batch.body, &mut element);
                batch.elements.push(u32::from_ne_bytes(element));
            }
            if batch.is(batch::SEEDED) {
                let seed = batch::read_seed(&mut batch.body);
                rustcluster_set_seed(seed.as_ptr().cast(), batch::SEED as c_int, 1);
            }
            let element = Rf_protect(batch::read_value(&mut batch.body, &mut batch.scratch));
            batch.reading = false;
            let common = Rf_protect(batch.read_common());
            let spread = c_int::from(batch.is(batch::SPREAD));
            rustcluster_take_element(common.cast(), element.cast(), spread);
            let value = Rf_protect(rustcluster_run_task(0));
            if !batch.goes_on() {
                end_batch(batch, &mut current.sink, Some(value));
                Rf_unprotect(3);
                return R_NilValue;
            }
            batch.results.push(batch::VALUE);
            if !batch::append_plain(value, &mut batch.results) {
                batch.append_result(value);
            }
            batch.whole = batch.results.len();
            Rf_unprotect(3);
        }
    }
}

/// Writes the answer to a batch. `last`: the value of the last task, which is not among the results.
///
/// # Safety
/// Must be called under [`unwind::run`], with a protected value.
unsafe fn end_batch(batch: &mut ReceivedBatch, sink: &mut AnswerSink, last: Option<SEXP>) {
    // SAFETY: guaranteed by the caller; everything in this frame that needs to be dropped is dropped before R
    // may jump.
    unsafe {
        let mut time = [0.0; 5];
        rustcluster_end_task(time.as_mut_ptr());
        sink.begin();
        if batch.is(batch::SEEDED) {
            rustcluster_own_seed();
        } else {
            leave_seed();
        }
        if batch.is(batch::SAVED) {
            if let Some(value) = last {
                batch.results.push(batch::VALUE);
                if !batch::append_plain(value, &mut batch.results) {
                    batch.append_result(value);
                }
            }
            let (head, results) = batch.save();
            sink.write(&head);
            for chunk in &results.chunks {
                sink.write(chunk);
            }
            return;
        }
        batch.scratch.clear();
        let plain = last.is_some_and(|value| batch::append_plain(value, &mut batch.scratch));
        if let Some(value) = last.filter(|_| !plain && !batch.is(batch::STORED)) {
            if let Some(instead) = sink.share(value) {
                Rf_protect(instead);
                write_results(batch, sink);
                sink.write(&[batch::VALUE]);
                batch::write_gapped(instead, sink);
                Rf_unprotect(1);
                if sink.send_shared_answer() {
                    return;
                }
            }
        }
        write_results(batch, sink);
        if let Some(value) = last {
            sink.write(&[batch::VALUE]);
            if plain {
                sink.write(&batch.scratch);
            } else {
                batch::write_serialized(value, sink);
            }
        }
    }
}

fn write_results(batch: &ReceivedBatch, sink: &mut AnswerSink) {
    sink.write(&batch.answer_head());
    sink.write(&batch.results);
}

/// Makes the agent report the state in which the task leaves the random number generator, if the task has used
/// it.
///
/// # Safety
/// Must be called under [`unwind::run`], with SIGINT blocked.
unsafe fn leave_seed() {
    // SAFETY: guaranteed by the caller; R may jump out of the functions that are called here, and this frame
    // then owns nothing that needs to be dropped.
    unsafe {
        let reassigned = rustcluster_is_reassigned() != 0;
        let (mut values, mut count) = (std::ptr::null(), 0);
        if rustcluster_seed_changed(&raw mut values, &raw mut count) != 0 {
            report_seed(values, count, reassigned);
        }
        rustcluster_own_seed();
    }
}

fn integers(seed: &Seed) -> (Vec<c_int>, bool) {
    let values = seed.bytes.chunks_exact(size_of::<c_int>());
    let value = |bytes: &[u8]| bytes.try_into().map_or(0, c_int::from_le_bytes);
    (values.map(value).collect(), seed.reassigned)
}

/// # Safety
/// `values` must have `count` elements.
unsafe fn report_seed(values: *const c_int, count: c_int, reassigned: bool) {
    let values = match usize::try_from(count) {
        // SAFETY: guaranteed by the caller.
        Ok(count) if count > 0 => unsafe { std::slice::from_raw_parts(values, count) },
        _ => &[],
    };
    let bytes = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    // Without a channel the state is not needed.
    let _ = with_channel(|channel| {
        channel.leave_seed(Seed { bytes, reassigned });
        Ok(())
    });
}

/// # Safety
/// Must be called under [`unwind::run`], with protected values.
unsafe fn write_slowly(
    value: SEXP,
    success: bool,
    time: &[f64; 5],
    tag: SEXP,
    sink: &mut AnswerSink,
) {
    // SAFETY: guaranteed by the caller; R may jump, and this frame then owns nothing that needs to be dropped.
    unsafe {
        let success = c_int::from(success);
        let answer = plain::rustcluster_answer(value.cast(), success, time.as_ptr(), tag.cast());
        Rf_protect(answer);
        let native = FORMAT.get() == Format::Native;
        if let Some(instead) = native.then(|| sink.share(answer)).flatten() {
            stream::write(Rf_protect(instead), Format::Native, sink);
            Rf_unprotect(1);
            if sink.send_shared_answer() {
                Rf_unprotect(1);
                return;
            }
        }
        stream::write(answer, FORMAT.get(), sink);
        Rf_unprotect(1);
    }
}

/// Answers the task out of which R has jumped with this error. `interrupted`: whether an interrupt was the
/// reason. The remaining tasks of its batch are then not started.
/// @noRd
#[extendr]
fn worker_fail(value: Robj, interrupted: bool) -> Robj {
    let fail = || {
        if !with_channel(|channel| Ok(channel.is_busy()))? {
            return Err(io::Error::other("there is no task to be answered").into());
        }
        // SAFETY: this runs on R's thread; the Robj keeps the object alive.
        let text = unsafe { first_string(value.get()) }.unwrap_or_default();
        // The head ignores this if it has interrupted the task.
        with_channel(|channel| channel.raised(text.trim_end()))?;
        let batch = INTERRUPTED.take();
        let mut failed = FailedTask {
            // SAFETY: the Robj keeps the object alive.
            value: unsafe { value.get() },
            sink: AnswerSink::new(),
            batch,
            goes_on: false,
            interrupted,
        };
        unwind::run(failed_protected, &mut failed)?;
        if failed.goes_on {
            INTERRUPTED.set(failed.batch);
            return Ok(());
        }
        failed.sink.finish()
    };
    match fail() {
        Ok(()) => ().into(),
        Err(stop) => to_r(stop),
    }
}

/// In a worker, sends a progress event of the current task to the head. Returns whether there is a current
/// task.
/// @noRd
#[extendr]
fn worker_report(bytes: Raw) -> Robj {
    match with_channel(|channel| channel.report(bytes.as_slice())) {
        Ok(sent) => sent.into(),
        Err(_) => false.into(),
    }
}

/// In a worker, tells the head of an error that the current task has raised and whose answer is a value. `message`: a
/// string, or any other value if the error has none. Returns whether there is a channel to the head.
/// @noRd
#[extendr]
fn worker_raised(message: Robj) -> Robj {
    // SAFETY: this runs on R's thread; the Robj keeps the object alive.
    let text = unsafe { first_string(message.get()) }.unwrap_or_default();
    with_channel(|channel| channel.raised(text.trim_end()))
        .is_ok()
        .into()
}

struct FailedTask {
    value: SEXP,
    sink: AnswerSink,
    batch: Option<ReceivedBatch>,
    /// Whether there are more tasks in the batch.
    goes_on: bool,
    interrupted: bool,
}

unsafe extern "C" fn failed_protected(data: *mut c_void) -> SEXP {
    // SAFETY: the same as in task_protected.
    unsafe {
        let failed = &mut *data.cast::<FailedTask>();
        if let Some(batch) = &mut failed.batch {
            batch.results.truncate(batch.whole);
            batch.results.push(batch::ERROR);
            batch.append_result(failed.value);
            batch.whole = batch.results.len();
            failed.goes_on = batch.goes_on() && !batch.reading && !failed.interrupted;
            batch.interrupted = failed.interrupted;
            if !failed.goes_on {
                end_batch(batch, &mut failed.sink, None);
            }
            return R_NilValue;
        }
        let mut time = [0.0; 5];
        let tag = Rf_protect(rustcluster_end_task(time.as_mut_ptr()));
        failed.sink.begin();
        leave_seed();
        write_slowly(failed.value, false, &time, tag, &mut failed.sink);
        Rf_unprotect(1);
        R_NilValue
    }
}

extendr_module! {
    mod serve;
    fn worker_connect;
    fn worker_ready;
    fn worker_serve;
    fn worker_fail;
    fn worker_raised;
    fn worker_report;
}
