//! Processes: parents, children and their exit. System calls that std does not provide.

use super::exit::Exit;
use super::fd::check;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// The name of this machine.
pub fn hostname() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the length is one less than the buffer's, so the last byte stays zero.
    unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) };
    let end = buffer.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&buffer[..end.unwrap_or(0)]).into_owned()
}

/// The effective user id of this process, which owns the files that it creates.
pub fn user() -> u32 {
    // SAFETY: no memory effects.
    unsafe { libc::geteuid() }
}

/// Whether the parent of this process is `parent`. False once that process has ended.
pub fn is_parent(parent: u32) -> bool {
    std::os::unix::process::parent_id() == parent
}

/// A descriptor that becomes readable when this process's parent ends. `None` if the system does not support
/// pidfds, or the parent is no longer `parent`.
pub fn watch_parent(parent: u32) -> Option<OwnedFd> {
    if !is_parent(parent) {
        return None;
    }
    // SAFETY: pidfd_open has no memory effects; nobody else owns the descriptor.
    let fd = unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, parent, 0) as libc::c_int;
        OwnedFd::from_raw_fd(check(fd).ok()?)
    };
    // If the parent ended before pidfd_open, its process id may have been reused.
    is_parent(parent).then_some(fd)
}

/// A descriptor that becomes readable when a process ends. `None` if there is no such process, or the system does not
/// support pidfds.
pub fn watch(pid: u32) -> Option<OwnedFd> {
    // SAFETY: pidfd_open has no memory effects; nobody else owns the descriptor.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as libc::c_int;
        Some(OwnedFd::from_raw_fd(check(fd).ok()?))
    }
}

/// Makes the kernel kill this process when its parent ends. Ends this process at once if the parent is no
/// longer `parent`.
pub fn die_with_parent(parent: u32) {
    // SAFETY: prctl with these arguments has no memory effects; a forked child may call _exit at any time.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
        if !is_parent(parent) {
            libc::_exit(1);
        }
    }
}

/// Undoes [`die_with_parent`].
pub fn outlive_parent() {
    // SAFETY: prctl with these arguments has no memory effects.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, 0 as libc::c_ulong);
    }
}

/// Makes this process the parent of all descendants that lose theirs.
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

/// Sets the name of this process in lists of processes. The system keeps 15 bytes.
pub fn set_name(name: &std::ffi::CStr) {
    // SAFETY: prctl reads a string that ends with a zero.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
    }
}

/// Adds to this process's niceness.
pub fn renice(increment: i32) {
    // SAFETY: no memory effects. A failure leaves the priority as it was.
    unsafe {
        libc::nice(increment);
    }
}

/// Waits until a child has ended, and does not reap it.
pub fn await_exit(pid: u32) {
    // An interrupted call is repeated; any other failure means that there is nothing to wait for.
    while check_child(libc::P_PID, pid, 0).is_err_and(|e| e.kind() == io::ErrorKind::Interrupted) {}
}

/// A child that has ended, if there is one. The child is not reaped.
pub fn peek_any_exit() -> Option<u32> {
    check_child(libc::P_ALL, 0, libc::WNOHANG).ok().flatten()
}

/// Whether a child has ended. The child is not reaped.
pub fn peek_exit(pid: u32) -> bool {
    check_child(libc::P_PID, pid, libc::WNOHANG).is_ok_and(|ended| ended.is_some())
}

/// A child that has ended, if there is one. The child is not reaped.
fn check_child(which: libc::idtype_t, pid: u32, flags: libc::c_int) -> io::Result<Option<u32>> {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOWAIT | flags;
    // SAFETY: waitid fills the zeroed struct. No process has the id 0, which means that no child has ended.
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

/// Reaps a child that has ended.
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
