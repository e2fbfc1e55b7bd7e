//! Creates a worker by fork, which takes milliseconds and shares memory until it is written to.

use super::process::{NewProcess, Process};
use crate::platform::{fd, process, signals};
use crate::worker::channel::{Channel, MAY_POLL};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

/// Forks a worker. The child writes its stdout and stderr to its output pipe, leads a process group, dies
/// with its parent, and blocks SIGINT until its first task. The child closes the descriptors that it has
/// inherited from the agent when it drops its copy of the agent.
///
/// # Errors
/// When no descriptor or process is available.
pub fn fork(worker: u32, shared_answers: bool) -> io::Result<NewProcess> {
    let (ours, theirs) = UnixStream::pair()?;
    let (output, output_end) = fd::pipe()?;
    fd::flush_stdio();
    let parent = std::process::id();
    LazyLock::force(&MAY_POLL);
    // The child must not handle SIGINT before its own handlers are restored.
    signals::block_interrupt();
    // SAFETY: the agent has one thread, so the child is a complete copy of it.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => {
            let error = io::Error::last_os_error();
            signals::unblock_interrupt();
            Err(error)
        }
        0 => {
            process::own_process_group();
            process::die_with_parent(parent);
            drop(ours);
            drop(output);
            fd::redirect(output_end.as_raw_fd(), 1)?;
            fd::redirect(output_end.as_raw_fd(), 2)?;
            let mut channel = Channel::new(theirs, worker);
            channel.shared_answers = shared_answers;
            Ok(NewProcess::Child(channel))
        }
        pid => {
            signals::unblock_interrupt();
            Ok(NewProcess::Parent(Process::new(pid as u32, ours, output)?))
        }
    }
}
