//! A worker's functions. One channel a process.

use crate::failure::Failure;
use crate::plain::{self, Received};
use crate::stream::{self, Format, Sink, Source};
use crate::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, Rf_protect, Rf_unprotect, SEXP, VECTOR_ELT};
use rustcluster_core::limits;
use rustcluster_core::message::WorkerConfig;
use rustcluster_core::signals;
use rustcluster_core::sys;
use rustcluster_core::worker::{Channel, Seed, Task};
use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

thread_local! {
    static CHANNEL: RefCell<Option<Channel>> = const { RefCell::new(None) };
    /// In bytes; 0: none.
    static MEMORY_LIMIT: Cell<u64> = const { Cell::new(0) };
}

/// Makes `channel` this process's, and limits its memory.
pub fn adopt(mut channel: Channel, memory_limit: u64) -> io::Result<()> {
    channel.renumber()?;
    limit_memory(memory_limit)?;
    CHANNEL.set(Some(channel));
    Ok(())
}

fn limit_memory(bytes: u64) -> io::Result<()> {
    if bytes > 0 {
        limits::limit_memory(bytes)?;
    }
    MEMORY_LIMIT.set(bytes);
    Ok(())
}

/// The bytes of memory that this worker may have; 0 if there is no limit.
/// @noRd
#[extendr]
fn worker_memory_limit() -> f64 {
    MEMORY_LIMIT.get() as f64
}

fn with_channel<T>(body: impl FnOnce(&mut Channel) -> io::Result<T>) -> io::Result<T> {
    CHANNEL.with_borrow_mut(|channel| match channel {
        Some(channel) => body(channel),
        None => Err(io::Error::other("this process is not a worker")),
    })
}

/// In a separate process: takes the channel from stdin and returns the packages to attach.
/// @noRd
#[extendr]
fn worker_connect() -> Robj {
    let connect = || -> io::Result<Robj> {
        let reader = sys::take_stdin()?;
        let stream = UnixStream::from(OwnedFd::from(reader));
        let mut channel = Channel::new(stream, 0);
        let config: WorkerConfig = channel.config()?;
        limit_memory(config.memory_limit)?;
        CHANNEL.set(Some(channel));
        Ok(list!(packages = config.packages).into())
    };
    connect().unwrap_or_else(|error| to_r(error.into()))
}

/// Tells the agent that this worker can take tasks.
/// @noRd
#[extendr]
fn worker_ready(tempdir: &str) -> Robj {
    match with_channel(|channel| channel.ready(tempdir.to_owned())) {
        Ok(()) => ().into(),
        Err(error) => to_r(error.into()),
    }
}

/// The channel as R's serialization writes to it. The first failure is kept: there is nobody left
/// to send to.
struct ToAgent(io::Result<()>);

impl Sink for ToAgent {
    fn write(&mut self, bytes: &[u8]) -> bool {
        if self.0.is_ok() {
            self.0 = send(bytes, false);
        }
        false
    }
}

impl ToAgent {
    fn begin(&mut self) {
        self.0 = with_channel(|channel| {
            channel.restart();
            Ok(())
        });
    }

    fn finish(self) -> std::result::Result<(), Stop> {
        self.0?;
        Ok(send(&[], true)?)
    }
}

fn send(bytes: &[u8], last: bool) -> io::Result<()> {
    with_channel(|channel| channel.send(bytes, last))
}

// SEXP is a pointer to a type that is opaque on this side.
#[allow(improper_ctypes)]
unsafe extern "C" {
    fn rustcluster_take_message(message: *mut c_void) -> c_int;
    fn rustcluster_take_call(function: *mut c_void, arguments: *mut c_void, tag: *mut c_void);
    fn rustcluster_run_task() -> SEXP;
    fn rustcluster_end_task(time: *mut f64) -> SEXP;
    fn rustcluster_set_seed(values: *const c_void, count: c_int, guest: c_int);
    fn rustcluster_seed_changed(values: *mut *const c_int, count: *mut c_int) -> c_int;
    fn rustcluster_is_guest() -> c_int;
    fn rustcluster_own_seed();
}

/// What ends the serving of tasks.
enum Stop {
    /// There will be no more.
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
    // Whatever R does next, it is not for a task's interrupt to end it.
    signals::block_interrupt();
    match stop {
        Stop::Done => ().into(),
        Stop::Jump(Jump(token)) => {
            unwind::forget_interrupt();
            token
        }
        Stop::Failed(error) => Failure::new("agent_failed").with("reason", error).into(),
    }
}

/// Serves tasks until there will be no more, which gives `NULL`, or R jumps. SIGINT reaches R while
/// a task runs and at no other time.
/// @noRd
#[extendr]
fn worker_serve() -> Robj {
    loop {
        if let Err(stop) = serve_one() {
            return to_r(stop);
        }
    }
}

/// One task: what of it is not R's, and therefore outlives a jump.
struct Turn {
    task: Task,
    /// Integers of random number generators' states, and whether they are another's.
    seeds: Vec<(Vec<c_int>, bool)>,
    sink: ToAgent,
    done: bool,
    kept: Kept,
}

/// What is kept from task to task for [`plain`]: functions, and room for an answer.
#[derive(Default)]
struct Kept {
    received: Received,
    answer: Vec<u8>,
}

/// All of a task's message, when it does not come in one piece. What is in shared memory is read
/// from there.
struct Message<'a> {
    task: &'a mut Task,
    /// Bytes of the payload that have been read.
    at: usize,
}

impl Source for Message<'_> {
    fn fill(&mut self, out: &mut [u8]) -> bool {
        let payload = self.task.payload.as_ref();
        let rest = payload.map_or(&[][..], |payload| &payload.bytes[self.at..]);
        let n = rest.len().min(out.len());
        let (now, later) = out.split_at_mut(n);
        now.copy_from_slice(&rest[..n]);
        self.at += n;
        later.is_empty() || self.task.body.fill(later)
    }
}

/// A message that came in one piece.
fn whole(task: &Task) -> Option<&[u8]> {
    match &task.payload {
        Some(payload) if task.body.len == 0 => Some(&payload.bytes),
        Some(_) => None,
        None => task.body.whole(),
    }
}

thread_local! {
    static KEPT: Cell<Kept> = Cell::default();
    /// That of the task under way, and so of its answer.
    static FORMAT: Cell<Format> = const { Cell::new(Format::Native) };
}

fn serve_one() -> std::result::Result<(), Stop> {
    signals::block_interrupt();
    // One that came too late for the task before.
    unwind::forget_interrupt();
    let mut turn = Turn {
        task: with_channel(Channel::next_task)?.ok_or(Stop::Done)?,
        seeds: with_channel(|channel| Ok(channel.take_seeds().iter().map(integers).collect()))?,
        sink: ToAgent(Ok(())),
        done: false,
        kept: KEPT.take(),
    };
    let first = match &turn.task.payload {
        Some(payload) => Some(&payload.bytes),
        None => turn.task.body.chunks.front(),
    };
    FORMAT.set(Format::of(first.map_or(&[], |bytes| bytes)));
    let ran = unwind::run(turn_protected, &mut turn);
    KEPT.set(turn.kept);
    ran?;
    if turn.done {
        return Err(Stop::Done);
    }
    turn.sink.finish()
}

unsafe extern "C" fn turn_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the turn of `serve_one`, which outlives this call. R may jump out of all
    // that is called here, and this frame holds nothing that is to be dropped then.
    unsafe {
        let turn = data.cast::<Turn>();
        match whole(&(*turn).task) {
            Some(bytes) if plain::is_plain(bytes) => {
                let call = Rf_protect(plain::read_task(bytes, &mut (*turn).kept.received));
                let part = |i| VECTOR_ELT(call, i).cast();
                rustcluster_take_call(part(0), part(1), part(2));
            }
            _ => {
                let task = &mut (*turn).task;
                let message = Rf_protect(stream::read(&mut Message { task, at: 0 }));
                (*turn).done = rustcluster_take_message(message.cast()) == 0;
            }
        }
        Rf_unprotect(1);
        if (*turn).done {
            return R_NilValue;
        }
        for (values, guest) in &(*turn).seeds {
            let count = values.len() as c_int;
            rustcluster_set_seed(values.as_ptr().cast(), count, c_int::from(*guest));
        }
        signals::unblock_interrupt();
        let value = Rf_protect(rustcluster_run_task());
        let mut time = [0.0; 5];
        let tag = Rf_protect(rustcluster_end_task(time.as_mut_ptr()));
        (*turn).sink.begin();
        leave_seed();
        let native = FORMAT.get() == Format::Native;
        if native && plain::write_answer(value, &time, tag, &mut (*turn).kept.answer) {
            (*turn).sink.write(&(*turn).kept.answer);
        } else {
            write_slowly(value, true, &time, tag, &mut (*turn).sink);
        }
        Rf_unprotect(2);
        R_NilValue
    }
}

/// Has the agent told in which state the task leaves the random number generator, if it has used it.
///
/// # Safety
/// Under [`unwind::run`]. SIGINT must be blocked.
unsafe fn leave_seed() {
    // SAFETY: the caller's; R may jump out of what is called here, and this frame then holds nothing
    // that is to be dropped.
    unsafe {
        let guest = rustcluster_is_guest() != 0;
        let (mut values, mut count) = (std::ptr::null(), 0);
        if rustcluster_seed_changed(&raw mut values, &raw mut count) != 0 {
            tell_seed(values, count, guest);
        }
        rustcluster_own_seed();
    }
}

fn integers(seed: &Seed) -> (Vec<c_int>, bool) {
    let values = seed.bytes.chunks_exact(size_of::<c_int>());
    let value = |bytes: &[u8]| bytes.try_into().map_or(0, c_int::from_le_bytes);
    (values.map(value).collect(), seed.guest)
}

/// # Safety
/// There must be as many values as are announced.
unsafe fn tell_seed(values: *const c_int, count: c_int, guest: bool) {
    let values = match usize::try_from(count) {
        // SAFETY: the caller's.
        Ok(count) if count > 0 => unsafe { std::slice::from_raw_parts(values, count) },
        _ => &[],
    };
    let bytes = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    // Without a channel there is nobody to tell.
    let _ = with_channel(|channel| {
        channel.leave_seed(Seed { bytes, guest });
        Ok(())
    });
}

/// # Safety
/// Under [`unwind::run`], with protected values.
unsafe fn write_slowly(value: SEXP, success: bool, time: &[f64; 5], tag: SEXP, sink: &mut ToAgent) {
    // SAFETY: the caller's; R may jump, and this frame holds nothing that is to be dropped then.
    unsafe {
        let success = c_int::from(success);
        let answer = plain::rustcluster_answer(value.cast(), success, time.as_ptr(), tag.cast());
        stream::write(Rf_protect(answer), FORMAT.get(), sink);
        Rf_unprotect(1);
    }
}

/// Answers the task that R jumped out of with this error.
/// @noRd
#[extendr]
fn worker_fail(value: Robj) -> Robj {
    let fail = || {
        if !with_channel(|channel| Ok(channel.is_busy()))? {
            return Err(io::Error::other("there is no task to be answered").into());
        }
        let mut turn = Failed {
            // SAFETY: the Robj keeps the object alive.
            value: unsafe { value.get() },
            sink: ToAgent(Ok(())),
        };
        unwind::run(failed_protected, &mut turn)?;
        turn.sink.finish()
    };
    match fail() {
        Ok(()) => ().into(),
        Err(stop) => to_r(stop),
    }
}

struct Failed {
    value: SEXP,
    sink: ToAgent,
}

unsafe extern "C" fn failed_protected(data: *mut c_void) -> SEXP {
    // SAFETY: as in turn_protected.
    unsafe {
        let turn = data.cast::<Failed>();
        let mut time = [0.0; 5];
        let tag = Rf_protect(rustcluster_end_task(time.as_mut_ptr()));
        (*turn).sink.begin();
        leave_seed();
        write_slowly((*turn).value, false, &time, tag, &mut (*turn).sink);
        Rf_unprotect(1);
        R_NilValue
    }
}

extendr_module! {
    mod worker;
    fn worker_memory_limit;
    fn worker_connect;
    fn worker_ready;
    fn worker_serve;
    fn worker_fail;
}
