//! Signal masks and dispositions. All unsafe code that concerns signals is in this module.

use crate::platform::fd;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

/// A set with the given signals.
fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set; sigaddset gets an initialized one and fails
    // harmlessly on a bad signal number.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

fn mask(how: libc::c_int, set: &libc::sigset_t) -> libc::sigset_t {
    let mut old = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both pointers are valid; with a valid `how` the call cannot fail and fills `old`.
    unsafe {
        libc::pthread_sigmask(how, set, old.as_mut_ptr());
        old.assume_init()
    }
}

/// Runs `start` with all signals blocked in this thread. The threads that `start` creates therefore
/// never handle a signal: R's handlers must run in R's thread.
pub fn with_all_blocked<T>(start: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initializes the set.
    let all = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        all.assume_init()
    };
    let old = mask(libc::SIG_SETMASK, &all);
    let result = start();
    mask(libc::SIG_SETMASK, &old);
    result
}

/// Unblocks all signals and resets SIGINT. Call between fork and exec: the spawning thread blocks all
/// signals, and R >= 4.6 keeps an inherited SIG_IGN for SIGINT. The agent ignores SIGINT, and so does a
/// head that a script started in the background.
pub fn reset() {
    mask(libc::SIG_SETMASK, &set_of(&[]));
    // SAFETY: SIG_DFL is a valid disposition.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
}

/// The stream whose end ends this process; -1 if there is none.
static STREAM: AtomicI32 = AtomicI32::new(-1);

/// Handles SIGIO: ends the process if the stream has hung up. Calls only async-signal-safe functions.
extern "C" fn on_stream(_: libc::c_int) {
    let mut polled = libc::pollfd {
        fd: STREAM.load(Ordering::Relaxed),
        events: HUNG_UP,
        revents: 0,
    };
    // SAFETY: the pollfd is valid; the errno of the interrupted code is restored.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        if libc::poll(&raw mut polled, 1, 0) == 1 && polled.revents & !libc::POLLNVAL != 0 {
            libc::_exit(1);
        }
        *errno = before;
    }
}

const HUNG_UP: libc::c_short = libc::POLLRDHUP;

/// Ends this process at once when the other side of `stream` ends, until [`outlive`] is called. This works
/// whatever code runs, which may not read the stream for a long time. The process cleans nothing up.
///
/// # Errors
/// When the descriptor does not support SIGIO.
pub fn end_with(stream: RawFd) -> io::Result<()> {
    STREAM.store(stream, Ordering::Relaxed);
    // SAFETY: the handler is async-signal-safe, and interrupted calls are restarted; fcntl checks the
    // descriptor.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_stream as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGIO, &raw const action, std::ptr::null_mut());
        if libc::fcntl(stream, libc::F_SETOWN, libc::getpid()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    fd::set_async(stream, true)?;
    // The stream may have ended before the handler was installed.
    on_stream(libc::SIGIO);
    Ok(())
}

/// Undoes [`end_with`]. The handler stays installed without effect, because a signal may still be pending.
pub fn outlive(stream: RawFd) {
    // A descriptor that does not support SIGIO has sent none.
    let _ = fd::set_async(stream, false);
    STREAM.store(-1, Ordering::Relaxed);
}

/// Blocks these signals, which stay pending.
pub fn block(signals: &[libc::c_int]) {
    mask(libc::SIG_BLOCK, &set_of(signals));
}

/// Unblocks these signals. Pending ones are delivered at once.
pub fn unblock(signals: &[libc::c_int]) {
    mask(libc::SIG_UNBLOCK, &set_of(signals));
}

/// Keeps SIGINT pending instead of letting R handle it.
pub fn block_interrupt() {
    mask(libc::SIG_BLOCK, &set_of(&[libc::SIGINT]));
}

/// Lets R handle SIGINT again. R handles a pending SIGINT at once.
pub fn unblock_interrupt() {
    mask(libc::SIG_UNBLOCK, &set_of(&[libc::SIGINT]));
}

/// Discards a pending SIGINT. SIGINT must be blocked.
pub fn discard_interrupt() {
    discard(&set_of(&[libc::SIGINT]), libc::SIGINT);
}

/// Discards `signal` if it is pending. `set` must contain only `signal`, and the signal must be blocked in
/// all threads.
fn discard(set: &libc::sigset_t, signal: libc::c_int) {
    let mut pending = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigpending fills the set; sigwait gets valid pointers and returns at once, because
    // the signal is pending and blocked in the only thread that could take it.
    unsafe {
        if libc::sigpending(pending.as_mut_ptr()) == 0
            && libc::sigismember(pending.as_ptr(), signal) == 1
        {
            let mut taken = 0;
            libc::sigwait(set, &raw mut taken);
        }
    }
}

/// Writes to a file without receiving SIGXFSZ, which ends a process whose file exceeds the file size limit
/// (`ulimit -f`). The limit also applies to files in memory.
///
/// # Errors
/// The errors of `write`: EFBIG at the limit.
pub fn without_file_size_signal<T>(write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let signal = set_of(&[libc::SIGXFSZ]);
    let old = mask(libc::SIG_BLOCK, &signal);
    let written = write();
    let too_large = |error: &io::Error| error.raw_os_error() == Some(libc::EFBIG);
    // SAFETY: reads a set that pthread_sigmask has filled.
    let was_blocked = unsafe { libc::sigismember(&raw const old, libc::SIGXFSZ) } == 1;
    if !was_blocked {
        if written.as_ref().is_err_and(too_large) {
            discard(&signal, libc::SIGXFSZ);
        }
        mask(libc::SIG_SETMASK, &old);
    }
    written
}

/// Saved signal dispositions, which a child restores.
#[derive(Clone)]
pub struct Saved(Vec<(libc::c_int, libc::sigaction)>);

/// Saves the current dispositions of these signals.
pub fn save(signals: &[libc::c_int]) -> Saved {
    let current = |&signal: &libc::c_int| {
        let mut action = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: a null new action only reads the old one into a valid pointer.
        let read = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
        // SAFETY: filled on success.
        (read == 0).then(|| (signal, unsafe { action.assume_init() }))
    };
    Saved(signals.iter().filter_map(current).collect())
}

impl Saved {
    /// Restores the saved dispositions.
    pub fn restore(&self) {
        for (signal, action) in &self.0 {
            // SAFETY: the action came from sigaction for the same signal.
            unsafe { libc::sigaction(*signal, action, std::ptr::null_mut()) };
        }
    }
}

/// Ignores these signals.
pub fn ignore(signals: &[libc::c_int]) {
    for &signal in signals {
        // SAFETY: SIG_IGN is a valid disposition.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Sends a signal to a process, or to a process group if `pid` is negative.
///
/// # Errors
/// The errors of kill(2), for example ESRCH if there is no such process.
pub fn kill(pid: i32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: kill has no memory effects in this process.
    fd::check(unsafe { libc::kill(pid, signal) }).map(drop)
}
