//! Functions of the agent, for R. A process is at most one agent.

use crate::r::failure::Failure;
use crate::worker::serve;
use extendr_api::prelude::*;
use rustcluster_core::agent::dial;
use rustcluster_core::agent::linger::{relay, shim};
use rustcluster_core::agent::startup::{self, Greeted};
use rustcluster_core::agent::warnings::Warnings;
use rustcluster_core::agent::{Guard, Role};
use rustcluster_core::platform::{elf, fd, limits, log};
use rustcluster_core::protocol::control::{Start, StartMode};
use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

thread_local! {
    static GREETED: RefCell<Option<Greeted>> = const { RefCell::new(None) };
}

fn failed(error: &io::Error) -> Robj {
    Failure::new("agent_failed")
        .with("reason", error.to_string())
        .into()
}

/// The environment variable by which a restarted agent gets the state of its predecessor.
const HANDOVER: &str = "RUSTCLUSTER_HANDOVER";

/// Takes over stdin and stdout, and receives from the head what to start. Returns a list of the packages to
/// attach, of the packages that are left to the workers, and of whether workers are forked. `tempdir`: the
/// temporary directory of this process.
/// @noRd
#[extendr]
fn agent_greet(package: &str, r_version: &str, platform: &str, tempdir: &str) -> Robj {
    ORIGIN.set(Origin::current());
    shim::remember();
    dial::remember();
    log::start_or_say(log::Role::Agent);
    // A job may end before the head greets.
    let warnings = match Warnings::catch() {
        Ok(warnings) => warnings,
        Err(error) => return failed(&error),
    };
    let hello = startup::hello(package, r_version, platform);
    let greeted = match std::env::var(HANDOVER) {
        Ok(text) => Greeted::resume(&text),
        Err(_) => startup::greet(&hello),
    };
    match greeted {
        Ok(mut greeted) => {
            greeted.hello = hello;
            greeted.warnings = warnings;
            greeted.watch_tempdir(tempdir);
            greeted.end_with_head();
            let packages = greeted.start.packages.clone();
            let after = greeted.after.clone();
            let forks = greeted.start.mode == StartMode::Fork;
            GREETED.set(Some(greeted));
            list!(packages = packages, after = after, forks = forks).into()
        }
        Err(error) => failed(&error),
    }
}

/// Goes on in a child of this process, which ends when the head does, so that the child can outlive the head. To be
/// called before this process has a second thread. Returns the pid of the first process.
/// @noRd
#[extendr]
fn agent_split() -> Robj {
    match shim::start() {
        Ok(shim) => (shim as i32).into(),
        Err(error) => failed(&error),
    }
}

/// Connects stdin and stdout of this process to the agent that waits on this host in the directory of this name, until
/// either side ends. Returns `NULL`, or the reason why there is no connection.
/// @noRd
#[extendr]
fn agent_relay(name: &str) -> Robj {
    match relay::run(name) {
        Ok(()) => ().into(),
        Err(error) => error.to_string().into(),
    }
}

/// Connects this process to the head, as the file at `path` says, and makes that connection its stdin and stdout.
/// Returns `NULL`, or the status with which the process has to end; the reason has been written to stderr. To be
/// called before this process has a second thread.
/// @noRd
#[extendr]
fn agent_dial(path: &str) -> Robj {
    match dial::dial(Path::new(path)) {
        Ok(()) => ().into(),
        Err(status) => i32::from(status).into(),
    }
}

/// The environment variables and the working directory with which a process was started, and with which its
/// next program starts, too.
struct Origin {
    variables: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
}

impl Origin {
    fn current() -> Option<Origin> {
        let ours = |name: &OsString| name == HANDOVER || name == "R_SESSION_TMPDIR";
        let variables = std::env::vars_os().filter(|(name, _)| !ours(name));
        Some(Origin {
            variables: variables.collect(),
            directory: std::env::current_dir().ok(),
        })
    }
}

thread_local! {
    static ORIGIN: RefCell<Option<Origin>> = const { RefCell::new(None) };
}

/// The next program of this process, and its stdin and stdout.
struct NextProgram {
    command: Command,
    stdin: File,
    stdout: File,
    /// Removes the temporary directory if R is killed before it has ended. The pipe of the guard is closed by
    /// that end, or by the next program.
    _guard: Guard,
}

/// The program that this process executes when it ends, if any.
static NEXT: Mutex<Option<NextProgram>> = Mutex::new(None);

/// Executes the next program. `exit()` calls this function when R has ended.
extern "C" fn become_next() {
    let Some(mut next) = NEXT.lock().ok().and_then(|mut next| next.take()) else {
        return;
    };
    fd::flush_stdio();
    Warnings::block_for_next_program();
    // Close all files of packages: the next program must not inherit them.
    fd::close_others_on_exec();
    let stdin = fd::redirect(next.stdin.as_raw_fd(), 0);
    let streams = stdin.and_then(|()| fd::redirect(next.stdout.as_raw_fd(), 1));
    let error = streams.map_or_else(|error| error, |()| next.command.exec());
    eprintln!("the agent could not start anew: {error}");
}

/// Makes this process execute `command` when it ends. The caller then ends R. The new program continues with
/// the same head, and leaves the packages `after` to the workers.
/// @noRd
#[extendr]
fn agent_restart(command: Vec<String>, after: Vec<String>) -> Robj {
    let prepare = || -> io::Result<()> {
        let missing = || io::Error::other("the head has not been greeted");
        let greeted = GREETED.take().ok_or_else(missing)?;
        let origin = ORIGIN.take().ok_or_else(missing)?;
        let (program, arguments) = command.split_first().ok_or_else(missing)?;
        let (text, stdin, stdout, guard) = greeted.hand_over(after)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(origin.variables)
            .env(HANDOVER, text);
        if let Some(directory) = origin.directory {
            command.current_dir(directory);
        }
        let next = NextProgram {
            command,
            stdin,
            stdout,
            _guard: guard,
        };
        *NEXT.lock().map_err(|_| missing())? = Some(next);
        // SAFETY: the function exists as long as the process, and does not unwind.
        if unsafe { libc::atexit(become_next) } != 0 {
            return Err(io::Error::other("no room for another function at exit"));
        }
        Ok(())
    };
    match prepare() {
        Ok(()) => ().into(),
        Err(error) => failed(&error),
    }
}

/// Makes the agent start workers as separate R sessions, because this process must not be forked.
/// @noRd
#[extendr]
fn agent_spawn() {
    GREETED.with_borrow_mut(|greeted| {
        if let Some(greeted) = greeted {
            greeted.start.mode = StartMode::Spawn;
        }
    });
}

/// Returns whether the code in a shared object can read values that differ between processes. Returns `FALSE`
/// if that is unknown.
/// @noRd
#[extendr]
fn code_reads_sources(path: &str) -> bool {
    let bytes = std::fs::read(path).ok();
    bytes.and_then(|bytes| elf::reads_sources(&bytes)) == Some(true)
}

/// Reports to the head that nothing can be started, and the reason.
/// @noRd
#[extendr]
fn agent_fail(reason: &str) -> Robj {
    match GREETED
        .take()
        .map(|greeted| greeted.fail(reason.to_owned()))
    {
        Some(Err(error)) => failed(&error),
        _ => ().into(),
    }
}

/// Bytes that a worker must be able to allocate beyond what it has at its start.
const SPARE_MEMORY: u64 = 16 << 20;

/// Returns an error message if the memory limit is too low for workers: forks start with the memory of this
/// process.
fn too_low(start: &Start) -> Option<String> {
    let counted = limits::memory_counted().filter(|_| start.mode == StartMode::Fork)?;
    let limit = start.memory_limit;
    (limit > 0 && limit < counted.saturating_add(SPARE_MEMORY)).then(|| {
        format!(
            "a `memory_limit` of {:.0} MB is too low: with the packages that it starts with, a \
             worker has {:.0} MB before its first task",
            limit as f64 / 1e6,
            counted as f64 / 1e6
        )
    })
}

/// Starts the workers and serves them. Returns `TRUE` in a forked worker, and `FALSE` in the agent when the
/// cluster has ended.
/// @noRd
#[extendr]
fn agent_run() -> Robj {
    let Some(greeted) = GREETED.take() else {
        return failed(&io::Error::other("the head has not been greeted"));
    };
    let limit = greeted.start.memory_limit;
    if let Some(reason) = too_low(&greeted.start).or_else(|| greeted.outfile_problem()) {
        return match greeted.fail(reason) {
            Ok(()) => false.into(),
            Err(error) => failed(&error),
        };
    }
    let served = greeted.agent().and_then(|mut agent| agent.run());
    // The agent's value has been dropped here, in a fork, too, and with it all descriptors that do not belong
    // to the worker.
    match served {
        Ok(Role::Done) => false.into(),
        Ok(Role::Worker(channel)) => match serve::adopt(*channel, limit) {
            Ok(()) => true.into(),
            Err(error) => failed(&error),
        },
        Err(error) => failed(&error),
    }
}

extendr_module! {
    mod agent;
    fn agent_greet;
    fn agent_split;
    fn agent_relay;
    fn agent_dial;
    fn agent_restart;
    fn agent_spawn;
    fn code_reads_sources;
    fn agent_fail;
    fn agent_run;
}
