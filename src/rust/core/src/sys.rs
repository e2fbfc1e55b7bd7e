//! Small wrappers around the system calls that std does not have.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A copy of a descriptor, the lowest free one from 3, closed on exec.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl checks the descriptor; the new one is owned by nobody else.
    unsafe {
        Ok(OwnedFd::from_raw_fd(check(libc::fcntl(
            fd,
            libc::F_DUPFD_CLOEXEC,
            3,
        ))?))
    }
}

/// Makes `target` (0, 1 or 2) refer to what `fd` refers to.
pub fn redirect(fd: RawFd, target: RawFd) -> io::Result<()> {
    // SAFETY: dup2 checks its arguments.
    check(unsafe { libc::dup2(fd, target) }).map(drop)
}

/// Sets or clears O_NONBLOCK.
pub fn set_nonblocking(fd: RawFd, nonblocking: bool) -> io::Result<()> {
    // SAFETY: fcntl checks the descriptor.
    unsafe {
        let flags = check(libc::fcntl(fd, libc::F_GETFL))?;
        let flags = if nonblocking {
            flags | libc::O_NONBLOCK
        } else {
            flags & !libc::O_NONBLOCK
        };
        check(libc::fcntl(fd, libc::F_SETFL, flags)).map(drop)
    }
}

/// A pipe, both ends closed on exec: what is written to the second can be read from the first.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: pipe fills the array; the descriptors are owned by nobody else. Between pipe and
    // fcntl no other thread of ours forks: the agent has one thread, and in the head std's own
    // spawn closes what it did not mean to pass on.
    unsafe {
        check(libc::pipe(fds.as_mut_ptr()))?;
        let ends = (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]));
        for fd in fds {
            check(libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC))?;
        }
        Ok(ends)
    }
}

/// The stream this process was started with: stdin and stdout are taken out of R's reach. What R
/// or anything else prints from now on goes to stderr, and stdin is empty.
pub fn take_stdio() -> io::Result<(File, File)> {
    let reader = take_stdin()?;
    let writer = File::from(duplicate(1)?);
    redirect(2, 1)?;
    Ok((reader, writer))
}

/// Stdin, taken out of R's reach: what R reads from now on is empty.
pub fn take_stdin() -> io::Result<File> {
    let reader = File::from(duplicate(0)?);
    let null = File::open("/dev/null")?;
    redirect(null.as_raw_fd(), 0)?;
    Ok(reader)
}

/// Reads what has arrived, without waiting: `WouldBlock` if nothing has.
pub fn recv_nowait(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are those of the buffer.
    let n = unsafe {
        libc::recv(
            fd,
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes to a socket. A closed peer is an error, never a SIGPIPE, which R's handler would answer
/// with a jump out of our frames.
pub fn send(fd: RawFd, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
    #[cfg(target_os = "linux")]
    const FLAGS: libc::c_int = libc::MSG_NOSIGNAL;
    #[cfg(not(target_os = "linux"))]
    const FLAGS: libc::c_int = 0;
    // SAFETY: IoSlice is guaranteed to be laid out as iovec; an all-zero msghdr is a valid empty
    // one; sendmsg only reads through the pointers.
    let n = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = slices.as_ptr().cast_mut().cast();
        message.msg_iovlen = slices.len() as _;
        libc::sendmsg(fd, &message, FLAGS)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes out what C's stdio holds, so that a forked child does not write it a second time.
pub fn flush_stdio() {
    // SAFETY: a null stream means all streams.
    unsafe { libc::fflush(std::ptr::null_mut()) };
}

/// The name of this machine.
pub fn hostname() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the length is that of the buffer, whose last byte stays zero.
    unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) };
    let end = buffer.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&buffer[..end.unwrap_or(0)]).into_owned()
}

/// A descriptor that becomes readable when this process's parent ends, if the system has such
/// and the parent is still `parent`.
pub fn watch_parent(parent: u32) -> Option<OwnedFd> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: pidfd_open has no memory effects; the descriptor is owned by nobody else.
        unsafe {
            if libc::getppid() as u32 != parent {
                return None;
            }
            let fd = libc::syscall(libc::SYS_pidfd_open, parent, 0) as libc::c_int;
            let fd = check(fd).ok().map(|fd| OwnedFd::from_raw_fd(fd))?;
            // Had the parent ended before, its number could be another's by now.
            (libc::getppid() as u32 == parent).then_some(fd)
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = parent;
        None
    }
}

/// Has the system kill this process when its parent ends. Where the system has no such thing,
/// the end of the channel must do.
pub fn die_with_parent(parent: u32) {
    #[cfg(target_os = "linux")]
    // SAFETY: prctl with these arguments and getppid have no memory effects; _exit is what a
    // forked child may call at any time.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
        if libc::getppid() as u32 != parent {
            libc::_exit(1);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = parent;
}

/// Makes this process the parent of all below it that lose theirs, where the system can.
pub fn adopt_orphans() {
    #[cfg(target_os = "linux")]
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
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOWAIT;
    // SAFETY: waitid fills the struct. Interrupted, it is called again; any other failure means
    // that there is nothing to wait for.
    unsafe {
        while libc::waitid(libc::P_PID, pid as libc::id_t, info.as_mut_ptr(), flags) != 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}

/// A child that has ended, if there is one. It is left to be waited for.
pub fn peek_any_exit() -> Option<u32> {
    peek(libc::P_ALL, 0)
}

/// Whether a child has ended. It is left to be waited for.
pub fn peek_exit(pid: u32) -> bool {
    peek(libc::P_PID, pid).is_some()
}

fn peek(which: libc::idtype_t, pid: u32) -> Option<u32> {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: waitid fills the zeroed struct; WNOWAIT leaves the child to be waited for.
    let pid = unsafe {
        match libc::waitid(which, pid as libc::id_t, info.as_mut_ptr(), flags) {
            0 => info.assume_init().si_pid(),
            _ => 0,
        }
    };
    (pid != 0).then_some(pid as u32)
}

/// Waits for a child that has ended.
pub fn reap(pid: u32) -> crate::message::Exit {
    use crate::message::Exit;
    let mut status = 0;
    // SAFETY: waitpid fills the status.
    let waited = unsafe { libc::waitpid(pid as libc::pid_t, &mut status, 0) };
    if waited != pid as libc::pid_t {
        Exit::Unknown
    } else if libc::WIFSIGNALED(status) {
        Exit::Signal(libc::WTERMSIG(status))
    } else {
        Exit::Status(libc::WEXITSTATUS(status))
    }
}
