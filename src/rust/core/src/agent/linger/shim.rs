//! The shim of an agent that may outlive its head: the process that ssh or the head has started. The agent is its
//! child, and ends it when the head is gone. Otherwise an ssh connection, which lasts as long as the process that it
//! has started, would last as long as the agent.

use crate::platform::{fd, process, signals};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// The environment variable by which an agent knows that it may outlive its head; its value is the pid of the shim
/// once there is one.
pub const MAY_LINGER: &str = "RUSTCLUSTER_LINGER";

/// Goes on in a child of this process, which becomes the shim. To be called before this process has a second thread.
/// Returns the pid of the shim.
///
/// # Errors
/// When the process cannot be forked.
pub fn start() -> io::Result<u32> {
    let shim = std::process::id();
    let null = File::open("/dev/null")?;
    // SAFETY: this process has one thread, so the child is a complete copy of it.
    signals::with_all_blocked(|| match u32::try_from(unsafe { libc::fork() }) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(0) => Ok(shim),
        // The shim handles no signal: the handlers are those of R.
        Ok(agent) => watch(agent, &null),
    })
}

/// Waits for the agent, and ends as it did.
fn watch(agent: u32, null: &File) -> ! {
    for target in 0..3 {
        let _ = fd::redirect(null.as_raw_fd(), target);
    }
    fd::close_others();
    process::set_name(c"rc-shim");
    process::await_exit(agent);
    let status = match process::reap(agent) {
        crate::platform::exit::Exit::Status(status) => status,
        crate::platform::exit::Exit::Signal(signal) => 128 + signal,
        crate::platform::exit::Exit::Unknown => 1,
    };
    // SAFETY: ends this process without running the exit handlers of R, which are those of the agent.
    unsafe { libc::_exit(status) }
}

/// The pid of the shim; 0 if there is none.
static SHIM: AtomicU32 = AtomicU32::new(0);

/// Remembers the shim that the environment names, which is then no longer needed.
pub fn remember() {
    let shim = std::env::var(MAY_LINGER).ok();
    let shim = shim.and_then(|text| text.parse::<u32>().ok());
    SHIM.store(shim.unwrap_or(0), Ordering::Relaxed);
}

/// Ends the shim, if this process has one: the agent no longer belongs to what has started it.
pub(super) fn end() {
    let shim = Some(SHIM.swap(0, Ordering::Relaxed));
    if let Some(shim) = shim.filter(|&shim| shim > 1 && process::is_parent(shim)) {
        // SAFETY: no memory effects. The session of the shim may end now.
        unsafe { libc::setsid() };
        let _ = signals::kill(shim as i32, libc::SIGKILL);
    }
}
