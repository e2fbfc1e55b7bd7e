//! Starting an agent: a command line whose stdin and stdout are the stream to it.

use crate::platform::signals;
use crate::protocol::handshake::ENDS_WITH_HEAD;
use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// How to start an agent.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The name of its host in messages.
    pub host: String,
    /// The program and its arguments. No shell is involved.
    pub command: Vec<OsString>,
    /// Set in the environment, or with `None` removed from it.
    pub env: Vec<(OsString, Option<OsString>)>,
}

/// A started agent.
pub struct Launched {
    /// Our end of its stdin and stdout.
    pub stream: UnixStream,
    /// Standard error of the agent's command.
    pub stderr: ChildStderr,
    /// The process of the agent's command.
    pub process: Arc<AgentProcess>,
}

/// The process that a launch started. It can be killed from any thread, and only while it is
/// that process: the number is not given back before the lock says so.
#[derive(Debug)]
pub struct AgentProcess {
    pid: u32,
    running: Mutex<bool>,
}

impl AgentProcess {
    /// The process number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Interrupts it and its process group: R, if that is what runs, then removes its temporary
    /// directory and ends. R would do so at SIGUSR2 as well, but leave its workspace in the working
    /// directory.
    pub fn interrupt(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running {
            let _ = signals::kill(-(self.pid as i32), libc::SIGINT);
        }
    }

    /// Kills it and its process group, if it still runs.
    pub fn kill(&self) {
        // The lock is held for two system calls, by this and by the thread that waits.
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running {
            let pid = self.pid as i32;
            let _ = signals::kill(-pid, libc::SIGKILL);
            let _ = signals::kill(pid, libc::SIGKILL);
        }
    }
}

/// Starts the command in a session of its own, so that neither Ctrl-C at the head's terminal nor
/// the terminal's end reach it. `on_exit` is called, on another thread, once it has ended and
/// been waited for.
///
/// # Errors
/// When the command cannot be run.
pub fn start(
    launch: &Launch,
    on_exit: impl FnOnce(io::Result<ExitStatus>) + Send + 'static,
) -> io::Result<Launched> {
    let (program, arguments) = launch
        .command
        .split_first()
        .ok_or_else(|| io::Error::other("no command to start the agent"))?;
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::from(theirs.try_clone()?))
        .stdout(Stdio::from(theirs))
        .stderr(Stdio::piped())
        .env(ENDS_WITH_HEAD, std::process::id().to_string());
    for (name, value) in &launch.env {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    // SAFETY: setsid, pthread_sigmask and signal are async-signal-safe. setsid cannot fail in a
    // fresh fork.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            signals::reset();
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let stderr = child
        .stderr
        .take()
        .ok_or_else(|| io::Error::other("no stderr"))?;
    let process = Arc::new(AgentProcess {
        pid: child.id(),
        running: Mutex::new(true),
    });
    wait_for(child, process.clone(), on_exit)?;
    Ok(Launched {
        stream: ours,
        stderr,
        process,
    })
}

/// Whether `text` is the address of an interface of this machine. Of the loopback's only the usual
/// one counts: others may be forwarded to other machines.
pub fn is_own_address(text: &str) -> bool {
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.is_loopback() => ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST,
        // A socket can be bound to no other.
        Ok(ip) => !ip.is_unspecified() && UdpSocket::bind((ip, 0)).is_ok(),
        Err(_) => false,
    }
}

/// A thread that sleeps in wait(). Neither SIGCHLD nor waitpid(-1) would do: in R's process both
/// belong to others too.
fn wait_for(
    mut child: Child,
    process: Arc<AgentProcess>,
    on_exit: impl FnOnce(io::Result<ExitStatus>) + Send + 'static,
) -> io::Result<()> {
    let wait = move || {
        crate::platform::process::await_exit(process.pid);
        let status = {
            let mut running = process
                .running
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *running = false;
            child.wait()
        };
        on_exit(status);
    };
    signals::with_all_blocked(|| {
        thread::Builder::new()
            .name("rustcluster-wait".into())
            .stack_size(128 * 1024)
            .spawn(wait)
    })
    .map(drop)
}
