//! Processes: parents and children, and how they end. System calls that std does not have.

use super::exit::Exit;
use super::fd::check;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// The name of this machine.
pub fn hostname() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the length is that of the buffer, whose last byte stays zero.
    unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) };
    let end = buffer.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&buffer[..end.unwrap_or(0)]).into_owned()
}

/// The number of the user whose files this process makes.
pub fn user() -> u32 {
    // SAFETY: no memory effects.
    unsafe { libc::geteuid() }
}

/// Whether the parent of this process is `parent`: not any more once that has ended.
pub fn is_parent(parent: u32) -> bool {
    std::os::unix::process::parent_id() == parent
}

/// A descriptor that becomes readable when this process's parent ends, if the system has such
/// and the parent is still `parent`.
pub fn watch_parent(parent: u32) -> Option<OwnedFd> {
    if !is_parent(parent) {
        return None;
    }
    // SAFETY: pidfd_open has no memory effects; the descriptor is owned by nobody else.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, parent, 0) as libc::c_int;
        OwnedFd::from_raw_fd(check(fd).ok()?)
    };
    // Had the parent ended before, its number could be another's by now.
    is_parent(parent).then_some(fd)
}

/// Has the kernel kill this process when its parent ends.
pub fn die_with_parent(parent: u32) {
    // SAFETY: prctl with these arguments has no memory effects; _exit is what a
    // forked child may call at any time.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
        if !is_parent(parent) {
            libc::_exit(1);
        }
    }
}

/// Makes this process the parent of all below it that lose theirs.
pub fn adopt_orphans() {
    // SAFETY: prctl with these arguments has no memory effects.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1 as libc::c_ulong);
    }
}

/// Makes this process the leader of a process group of its own.
pub fn own_process_group() {
    // SAFETY: no memory effects.
    unsafe { libc::setpgid(0, 0) };
}

/// Adds to this process's niceness.
pub fn renice(increment: i32) {
    // SAFETY: no memory effects. A failure leaves the priority as it was.
    unsafe {
        libc::nice(increment);
    }
}

/// Waits until a child has ended, and leaves it to be waited for.
pub fn await_exit(pid: u32) {
    // Interrupted, it is called again; any other failure means that there is nothing to wait for.
    while check_child(libc::P_PID, pid, 0).is_err_and(|e| e.kind() == io::ErrorKind::Interrupted) {}
}

/// A child that has ended, if there is one. It is left to be waited for.
pub fn peek_any_exit() -> Option<u32> {
    check_child(libc::P_ALL, 0, libc::WNOHANG).ok().flatten()
}

/// Whether a child has ended. It is left to be waited for.
pub fn peek_exit(pid: u32) -> bool {
    check_child(libc::P_PID, pid, libc::WNOHANG).is_ok_and(|ended| ended.is_some())
}

/// A child that has ended, which is left to be waited for.
fn check_child(which: libc::idtype_t, pid: u32, flags: libc::c_int) -> io::Result<Option<u32>> {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOWAIT | flags;
    // SAFETY: waitid fills the zeroed struct, in which no process has the number 0.
    let pid = unsafe {
        check(libc::waitid(
            which,
            pid as libc::id_t,
            info.as_mut_ptr(),
            flags,
        ))?;
        info.assume_init().si_pid()
    };
    Ok((pid != 0).then_some(pid as u32))
}

/// Waits for a child that has ended.
pub fn reap(pid: u32) -> Exit {
    let mut status = 0;
    // SAFETY: waitpid fills the status.
    let waited = unsafe { libc::waitpid(pid as libc::pid_t, &raw mut status, 0) };
    if waited != pid as libc::pid_t {
        Exit::Unknown
    } else if libc::WIFSIGNALED(status) {
        Exit::Signal(libc::WTERMSIG(status))
    } else {
        Exit::Status(libc::WEXITSTATUS(status))
    }
}
