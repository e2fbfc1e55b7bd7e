//! Starts an agent by a command whose stdin and stdout are the stream to the agent.

use crate::platform::signals;
use crate::protocol::control::Secret;
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
    /// The name of the agent's host in messages.
    pub host: String,
    /// Where the agent comes from.
    pub source: Source,
}

/// An agent that has workers and looks for its head.
#[derive(Clone, Debug)]
pub struct Lingering {
    /// The name of the agent's directory.
    pub name: String,
    /// The agent has missed a set-up call: it is ended when it comes.
    pub missed: bool,
}

/// Where an agent comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The head starts a process whose stdin and stdout are the stream.
    Command {
        /// The program and its arguments. No shell is involved.
        command: Vec<OsString>,
        /// Variables to set in the environment, or to remove if the value is `None`.
        env: Vec<(OsString, Option<OsString>)>,
    },
    /// An agent of this launcher dials back: see [`dial_back`](crate::head::dial_back).
    DialBack {
        /// The number of the launcher.
        launcher: u32,
        /// The agent that has lost the head before, if the cluster has had one.
        lingers: Option<Lingering>,
    },
    /// The agent waits for its head: see [`linger`](crate::agent::linger).
    Waiting {
        /// The name of the agent's directory, if the agent is on this machine.
        name: Option<String>,
        /// The agent has missed a set-up call: it is ended.
        missed: bool,
        /// The key of the cluster.
        key: Secret,
        /// The command that connects to the agent, if the agent is on another machine.
        relay: Box<Source>,
        /// Where another agent comes from, once this one is lost.
        next: Box<Source>,
    },
}

/// A started agent.
pub struct Launched {
    /// The head's end of the agent's stdin and stdout.
    pub stream: UnixStream,
    /// Standard error of the agent's command.
    pub stderr: ChildStderr,
    /// The process of the agent's command.
    pub process: Arc<AgentProcess>,
}

/// The process that a launch started. Any thread can kill it. The lock ensures that no signal is
/// sent once the process has been reaped and its pid may have been reused.
#[derive(Debug)]
pub struct AgentProcess {
    pid: u32,
    running: Mutex<bool>,
}

impl AgentProcess {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Interrupts the process and its process group. If the process runs R, R then removes its
    /// temporary directory and ends. SIGUSR2 would have the same effect, but R would save its workspace
    /// in the working directory.
    pub fn interrupt(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running {
            let _ = signals::kill(-(self.pid as i32), libc::SIGINT);
        }
    }

    /// Kills the process and its process group, if the process is still running.
    pub fn kill(&self) {
        // Both this method and the waiting thread keep the lock only for two system calls.
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running {
            let pid = self.pid as i32;
            let _ = signals::kill(-pid, libc::SIGKILL);
            let _ = signals::kill(pid, libc::SIGKILL);
        }
    }
}

/// Starts the command in a session of its own, so that neither Ctrl-C at the head's terminal nor
/// the terminal's end reach it. Once the process has ended and been reaped, `on_exit` is called on
/// another thread.
///
/// # Errors
/// When the command cannot be run.
pub fn start(
    command: &[OsString],
    env: &[(OsString, Option<OsString>)],
    on_exit: impl FnOnce(io::Result<ExitStatus>) + Send + 'static,
) -> io::Result<Launched> {
    let (program, arguments) = command
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
    for (name, value) in env {
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

/// Whether `text` is the address of an interface of this machine. Of the loopback addresses, only the
/// usual one of each family counts, because others may be forwarded to other machines.
pub fn is_own_address(text: &str) -> bool {
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.is_loopback() => ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST,
        // A socket can be bound only to an address of this machine.
        Ok(ip) => !ip.is_unspecified() && UdpSocket::bind((ip, 0)).is_ok(),
        Err(_) => false,
    }
}

/// Starts a thread that waits for the child. Neither SIGCHLD nor waitpid(-1) can be used, because other
/// code in R's process uses them too.
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
