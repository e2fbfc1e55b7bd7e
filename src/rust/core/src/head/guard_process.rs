//! The guard of the jobs of a batch engine: a process that outlives the head and cancels its jobs.
//!
//! The guard's stdin is a socket whose other end belongs to the head alone. The guard reads orders from it, and ends
//! the jobs when the socket is closed: when the head releases it, and when the head dies.

use crate::platform::signals;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// A running guard. Dropping it releases the guard, which then ends the jobs by itself.
#[derive(Debug)]
pub struct GuardProcess {
    /// `None` once the guard has been released.
    orders: Option<UnixStream>,
    ended: Arc<Ended>,
    pid: u32,
}

#[derive(Debug, Default)]
struct Ended {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl GuardProcess {
    /// Starts the command in a session of its own, so that neither Ctrl-C at the head's terminal nor the terminal's
    /// end reach it.
    ///
    /// # Errors
    /// When the command cannot be run.
    pub fn start(command: &[OsString]) -> io::Result<Self> {
        let (program, arguments) = command
            .split_first()
            .ok_or_else(|| io::Error::other("no command to start the guard"))?;
        // Both ends are close-on-exec: no other process that the head starts keeps them open.
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: setsid, prctl, pthread_sigmask and signal are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                signals::reset();
                // A process that was forked from the head, and outlives it, keeps the socket open. The signal says
                // that the head is dead nevertheless.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as libc::c_ulong);
                Ok(())
            });
        }
        let mut child = command.spawn()?;
        let pid = child.id();
        let ended = Arc::new(Ended::default());
        let seen = ended.clone();
        thread::Builder::new()
            .name("guard-exit".into())
            .stack_size(64 * 1024)
            .spawn(move || {
                let _ = child.wait();
                *seen.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
                seen.changed.notify_all();
            })?;
        Ok(Self {
            orders: Some(ours),
            ended,
            pid,
        })
    }

    /// The process id of the guard.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a line to the guard.
    ///
    /// # Errors
    /// When the guard has ended or has been released, or does not read what was sent before.
    pub fn send(&self, line: &str) -> io::Result<()> {
        let orders = self
            .orders
            .as_ref()
            .ok_or_else(|| io::Error::other("the guard has been released"))?;
        let text = format!("{line}\n");
        // SAFETY: the pointer and the length are those of `text`. write() would raise SIGPIPE, which R turns into an
        // error.
        let sent = unsafe {
            libc::send(
                orders.as_raw_fd(),
                text.as_ptr().cast(),
                text.len(),
                libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) if sent == text.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WouldBlock.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Tells the guard to end the jobs, and itself.
    pub fn release(&mut self) {
        self.orders = None;
    }

    /// Waits up to `max` for the end of the guard. Returns whether it has ended.
    pub fn wait(&self, max: Duration) -> bool {
        let ended = self.ended.ended.lock();
        let ended = ended.unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .ended
            .changed
            .wait_timeout_while(ended, max, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(30);

    fn shell(script: &str) -> GuardProcess {
        GuardProcess::start(&["sh".into(), "-c".into(), script.into()]).unwrap()
    }

    fn scratch(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("guard-{}-{name}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    #[test]
    fn a_guard_gets_lines_and_ends_when_it_is_released() {
        let path = scratch("lines");
        let mut guard = shell(&format!("cat >{}", path.display()));
        guard.send("submit 1 2").unwrap();
        guard.send("query 3").unwrap();
        assert!(
            !guard.wait(Duration::from_millis(50)),
            "nothing has released the guard"
        );
        guard.release();
        assert!(guard.wait(LONG));
        assert_eq!(fs::read_to_string(&path).unwrap(), "submit 1 2\nquery 3\n");
        fs::remove_file(path).unwrap();
        assert!(guard.send("late").is_err());
    }

    #[test]
    fn a_line_to_a_dead_guard_is_an_error_and_no_signal() {
        let guard = shell("exit 0");
        assert!(guard.wait(LONG));
        assert!(guard.send("query 1").is_err());
    }

    #[test]
    fn a_guard_that_does_not_read_blocks_nobody() {
        let mut guard = shell("sleep 600");
        let line = "x".repeat(1000);
        let begun = Instant::now();
        while guard.send(&line).is_ok() {
            assert!(begun.elapsed() < LONG);
        }
        guard.release();
        // SAFETY: no memory effects; the guard has not been reaped.
        unsafe { libc::kill(-(guard.pid() as i32), libc::SIGKILL) };
        assert!(guard.wait(LONG));
    }

    #[test]
    fn no_other_process_keeps_a_guard_alive() {
        let mut guard = shell("cat >/dev/null");
        let mut other = Command::new("sleep").arg("30").spawn().unwrap();
        guard.release();
        let ended = guard.wait(Duration::from_secs(20));
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(ended);
    }
}
