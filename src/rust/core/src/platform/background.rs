//! Background processes: commands of a batch engine, ssh and guards, which the session starts and does not wait
//! for. A thread of each process feeds its stdin, collects its output and watches its silence, whatever R does.

use super::exit::Exit;
use super::{fd, process, signals};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The last bytes of stderr that are kept.
const MAX_STDERR: usize = 64 * 1024;

/// How a background process is started and watched.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program and its arguments. No shell is involved.
    pub command: Vec<OsString>,
    /// Variables to set in the environment, or to remove if the value is `None`.
    pub env: Vec<(OsString, Option<OsString>)>,
    /// What the process reads from its stdin.
    pub input: Vec<u8>,
    /// Whether stdin stays open after `input`, until [`Background::end_input`] or the end of this process.
    pub open_input: bool,
    /// How often an empty line is written to stdin as a heartbeat.
    pub heartbeat: Option<Duration>,
    /// The process is killed if it prints nothing for this time after its first output.
    pub max_silence: Option<Duration>,
    /// Whether the process is killed when its value is dropped. Otherwise its stdin ends.
    pub kill_on_drop: bool,
    /// Whether the process gets SIGTERM when the thread that started it ends. Its stdin stays open if a fork of
    /// this process outlives it.
    pub end_with_parent: bool,
    /// The first bytes of stdout that are kept.
    pub max_stdout: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            command: Vec::new(),
            env: Vec::new(),
            input: Vec::new(),
            open_input: false,
            heartbeat: None,
            max_silence: None,
            kill_on_drop: true,
            end_with_parent: false,
            max_stdout: 16 << 20,
        }
    }
}

/// What happens to another process when a background process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEnd {
    /// The stdin of the other process ends, and it is killed if the first was killed for its silence: a link
    /// that carries both does not carry the end of stdin.
    EndInput,
    /// The other process is killed.
    Kill,
}

/// What is known of a background process.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How the process ended. `None`: it is running.
    pub exit: Option<Exit>,
    /// The beginning of its stdout.
    pub stdout: Vec<u8>,
    /// The end of its stderr.
    pub stderr: Vec<u8>,
    /// Whether stdout was longer than what is kept.
    pub truncated: bool,
    /// Whether the process was killed because it had printed nothing for too long.
    pub silent: bool,
}

#[derive(Default)]
struct State {
    report: Report,
    /// The process has not been reaped: its pid is its own.
    running: bool,
    /// The process has been reaped, and its output may not have been read to its end.
    reaped: Option<Exit>,
    end_input: bool,
    /// Bytes for stdin that the thread has not taken yet.
    more_input: Vec<u8>,
    links: Vec<(Arc<Shared>, OnEnd)>,
}

struct Shared {
    pid: u32,
    state: Mutex<State>,
    changed: Condvar,
    /// A byte here wakes the thread.
    wake: UnixStream,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full socket wakes the thread, too.
        let _ = fd::send(self.wake.as_raw_fd(), &[io::IoSlice::new(b"w")]);
    }

    fn kill(&self) {
        let state = self.lock();
        if state.running {
            let pid = self.pid as i32;
            let _ = signals::kill(-pid, libc::SIGKILL);
            let _ = signals::kill(pid, libc::SIGKILL);
        }
    }

    fn end_input(&self) {
        self.lock().end_input = true;
        self.wake();
    }

    fn apply(&self, action: OnEnd, silent: bool) {
        self.end_input();
        if silent || action == OnEnd::Kill {
            self.kill();
        }
    }
}

/// A background process. Dropping the value ends it, as its options say; the end of this process ends its stdin.
pub struct Background {
    shared: Arc<Shared>,
    kill_on_drop: bool,
    /// The process that started it. A fork of that process has a copy of this value and must not end anything.
    owner: u32,
}

impl Background {
    /// Starts the command in a session of its own, so that neither Ctrl-C at the terminal nor the terminal's end
    /// reach it.
    ///
    /// # Errors
    /// When the command cannot be run, or no thread can be started.
    pub fn start(options: Options) -> io::Result<Background> {
        let (program, arguments) = options
            .command
            .split_first()
            .ok_or_else(|| io::Error::other("no command"))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for (name, value) in &options.env {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let end_with_parent = options.end_with_parent;
        // SAFETY: setsid, prctl, pthread_sigmask and signal are async-signal-safe. setsid cannot fail in a fresh fork.
        unsafe {
            command.pre_exec(move || {
                libc::setsid();
                signals::reset();
                if end_with_parent {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as libc::c_ulong);
                }
                Ok(())
            });
        }
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let mut child = command.spawn()?;
        let shared = Arc::new(Shared {
            pid: child.id(),
            state: Mutex::new(State {
                running: true,
                end_input: !options.open_input,
                ..State::default()
            }),
            changed: Condvar::new(),
            wake,
        });
        let background = Background {
            shared: shared.clone(),
            kill_on_drop: options.kill_on_drop,
            owner: std::process::id(),
        };
        let served = Served::new(&mut child, shared.clone(), woken, options);
        let started = served.and_then(|served| spawn(child, shared, served));
        if let Err(error) = started {
            background.kill();
            return Err(error);
        }
        Ok(background)
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// What is known of the process now.
    pub fn report(&self) -> Report {
        self.shared.lock().report.clone()
    }

    /// Waits for the end of the process, or until something is printed to its stdout. Returns whether it has ended.
    pub fn wait(&self, limit: Duration, or_output: bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        let before = state.report.stdout.len();
        loop {
            if state.report.exit.is_some() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || (or_output && state.report.stdout.len() > before) {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Appends to the input of the process. Returns whether the process can still read it.
    pub fn send(&self, bytes: &[u8]) -> bool {
        let open = {
            let mut state = self.shared.lock();
            let open = state.running && !state.end_input;
            if open {
                state.more_input.extend_from_slice(bytes);
            }
            open
        };
        self.shared.wake();
        open
    }

    /// Ends the stdin of the process once its input has been written.
    pub fn end_input(&self) {
        self.shared.end_input();
    }

    /// Kills the process and its process group, if it is still running.
    pub fn kill(&self) {
        self.shared.kill();
    }

    /// Says what happens to `other` when this process has ended.
    pub fn on_end(&self, other: &Background, action: OnEnd) {
        let ended = {
            let mut state = self.shared.lock();
            state.links.push((other.shared.clone(), action));
            state.report.exit.is_some().then_some(state.report.silent)
        };
        if let Some(silent) = ended {
            other.shared.apply(action, silent);
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.owner != std::process::id() {
            return;
        }
        if self.kill_on_drop {
            self.shared.kill();
        }
        self.shared.end_input();
    }
}

/// Starts the thread that serves the process, and the one that waits for its end. Neither SIGCHLD nor waitpid(-1)
/// can be used, because other code in R's process uses them too.
fn spawn(mut child: Child, shared: Arc<Shared>, served: Served) -> io::Result<()> {
    let wait = move || {
        process::await_exit(shared.pid);
        let mut state = shared.lock();
        state.running = false;
        state.reaped = Some(match child.wait() {
            Ok(status) => {
                use std::os::unix::process::ExitStatusExt;
                match (status.code(), status.signal()) {
                    (Some(code), _) => Exit::Status(code),
                    (None, Some(signal)) => Exit::Signal(signal),
                    (None, None) => Exit::Unknown,
                }
            }
            Err(_) => Exit::Unknown,
        });
        drop(state);
        shared.wake();
    };
    let thread = |name: &str| {
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 * 1024)
    };
    signals::with_all_blocked(|| {
        thread("rustcluster-wait").spawn(wait)?;
        thread("rustcluster-side").spawn(move || served.run())
    })
    .map(drop)
}

/// The ends of a process's pipes, and what its thread has to do.
struct Served {
    shared: Arc<Shared>,
    woken: UnixStream,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    options: Options,
    written: usize,
    last_heartbeat: Instant,
    last_output: Option<Instant>,
}

impl Served {
    fn new(
        child: &mut Child,
        shared: Arc<Shared>,
        woken: UnixStream,
        options: Options,
    ) -> io::Result<Served> {
        let served = Served {
            shared,
            woken,
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            stderr: child.stderr.take(),
            options,
            written: 0,
            last_heartbeat: Instant::now(),
            last_output: None,
        };
        let ends = [
            served.stdin.as_ref().map(AsRawFd::as_raw_fd),
            served.stdout.as_ref().map(AsRawFd::as_raw_fd),
            served.stderr.as_ref().map(AsRawFd::as_raw_fd),
        ];
        for end in ends.into_iter().flatten() {
            fd::set_nonblocking(end, true)?;
        }
        Ok(served)
    }

    fn run(mut self) {
        loop {
            self.write();
            self.await_event();
            // In this order: what is set after it was looked at wakes the next round, and what had been printed before
            // the process was reaped is in the pipes.
            self.clear_wake();
            let reaped = self.shared.lock().reaped;
            self.read();
            if let Some(exit) = reaped {
                return self.finish(exit);
            }
            self.check_silence();
        }
    }

    /// Waits until there is something to read or write, or a time has come.
    fn await_event(&self) {
        let entry = |fd: RawFd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let mut polled = vec![entry(self.woken.as_raw_fd(), libc::POLLIN)];
        polled.extend(
            self.stdout
                .as_ref()
                .map(|out| entry(out.as_raw_fd(), libc::POLLIN)),
        );
        polled.extend(
            self.stderr
                .as_ref()
                .map(|err| entry(err.as_raw_fd(), libc::POLLIN)),
        );
        if self.written < self.options.input.len() {
            polled.extend(
                self.stdin
                    .as_ref()
                    .map(|end| entry(end.as_raw_fd(), libc::POLLOUT)),
            );
        }
        let heartbeat = self.options.heartbeat.filter(|_| self.stdin.is_some());
        let times = [
            heartbeat.map(|interval| self.last_heartbeat + interval),
            self.silence_limit(),
        ];
        let wait = times.into_iter().flatten().min().map_or(-1, |next| {
            let left = next.saturating_duration_since(Instant::now());
            // Round up: an early wake-up would be repeated at once.
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        });
        // SAFETY: the array is valid for its length. An error means only that all ends are tried.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, wait) };
    }

    /// When the process will have been silent for too long.
    fn silence_limit(&self) -> Option<Instant> {
        self.last_output?.checked_add(self.options.max_silence?)
    }

    fn clear_wake(&mut self) {
        let mut buffer = [0; 64];
        while self.woken.read(&mut buffer).is_ok_and(|n| n > 0) {}
    }

    /// Writes what stdin takes, and a heartbeat if one is due and nothing waits.
    fn write(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        let input = &mut self.options.input;
        input.append(&mut self.shared.lock().more_input);
        let heartbeat = self.options.heartbeat;
        if heartbeat.is_some_and(|interval| self.last_heartbeat.elapsed() >= interval) {
            self.last_heartbeat = Instant::now();
            if self.written == input.len() {
                input.clear();
                input.push(b'\n');
                self.written = 0;
            }
        }
        while let Some(rest) = input.get(self.written..).filter(|rest| !rest.is_empty()) {
            match stdin.write(rest) {
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The process reads no more.
                Err(_) => {
                    self.stdin = None;
                    return;
                }
            }
        }
        // Free the memory of a large input.
        if input.capacity() > 64 {
            *input = Vec::new();
            self.written = 0;
        }
        let state = self.shared.lock();
        if state.end_input && state.more_input.is_empty() {
            self.stdin = None;
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; 16 * 1024];
        let mut came = false;
        if let Some(stdout) = &mut self.stdout {
            let open = drain(stdout, &mut buffer, |bytes| {
                came = true;
                let report = &mut self.shared.lock().report;
                let room = self.options.max_stdout.saturating_sub(report.stdout.len());
                let kept = bytes.get(..room).unwrap_or(bytes);
                report.stdout.extend_from_slice(kept);
                report.truncated |= kept.len() < bytes.len();
            });
            if !open {
                self.stdout = None;
            }
        }
        if let Some(stderr) = &mut self.stderr {
            let open = drain(stderr, &mut buffer, |bytes| {
                let stderr = &mut self.shared.lock().report.stderr;
                stderr.extend_from_slice(bytes);
                if stderr.len() > 2 * MAX_STDERR {
                    stderr.drain(..stderr.len() - MAX_STDERR);
                }
            });
            if !open {
                self.stderr = None;
            }
        }
        if came {
            self.last_output = Some(Instant::now());
            self.shared.changed.notify_all();
        }
    }

    /// Kills a process that has printed nothing for too long. All that it had printed has been read before: this
    /// process may itself have been stopped.
    fn check_silence(&mut self) {
        let late = self
            .silence_limit()
            .is_some_and(|limit| Instant::now() > limit);
        if late {
            self.options.max_silence = None;
            self.shared.lock().report.silent = true;
            self.shared.kill();
            // The processes of a link that is dead cannot all be told of its end.
            self.follow_links();
        }
    }

    fn follow_links(&self) {
        let (links, silent) = {
            let mut state = self.shared.lock();
            (std::mem::take(&mut state.links), state.report.silent)
        };
        for (other, action) in links {
            other.apply(action, silent);
        }
    }

    fn finish(mut self, exit: Exit) {
        self.stdin = None;
        self.shared.lock().report.exit = Some(exit);
        self.shared.changed.notify_all();
        self.follow_links();
    }
}

/// Reads all that there is. Returns whether more may come.
fn drain(from: &mut impl Read, buffer: &mut [u8], mut take: impl FnMut(&[u8])) -> bool {
    loop {
        match from.read(buffer) {
            Ok(0) => return false,
            Ok(n) => take(buffer.get(..n).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn sh(script: &str, options: Options) -> Background {
        let command = ["sh", "-c", script].map(OsString::from).to_vec();
        Background::start(Options { command, ..options }).unwrap()
    }

    #[test]
    fn a_large_input_goes_through_and_all_output_comes_back() {
        let input: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let cat = sh(
            "cat; echo problem >&2; exit 3",
            Options {
                input: input.clone(),
                ..Options::default()
            },
        );
        assert!(cat.wait(LONG, false));
        let report = cat.report();
        assert_eq!(report.exit, Some(Exit::Status(3)));
        assert!(report.stdout == input && !report.truncated && !report.silent);
        assert_eq!(report.stderr, b"problem\n");
    }

    #[test]
    fn output_is_bounded() {
        let options = Options {
            max_stdout: 1000,
            ..Options::default()
        };
        let loud = sh(
            "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2; echo end >&2",
            options,
        );
        assert!(loud.wait(LONG, false));
        let report = loud.report();
        assert!(report.truncated && report.stdout.len() == 1000);
        assert!(report.stderr.len() <= 2 * MAX_STDERR && report.stderr.ends_with(b"end\n"));
    }

    #[test]
    fn an_open_input_ends_on_request_or_when_the_value_is_dropped() {
        let options = || Options {
            open_input: true,
            kill_on_drop: false,
            ..Options::default()
        };
        let first = sh("cat; echo ended", options());
        let second = sh("cat; echo ended", options());
        assert!(!first.wait(Duration::from_millis(100), false));
        second.end_input();
        assert!(second.wait(LONG, false));
        assert_eq!(second.report().stdout, b"ended\n");
        let pid = first.pid();
        drop(first);
        let deadline = Instant::now() + LONG;
        while signals::kill(pid as i32, 0).is_ok() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_dropped_process_is_killed_with_its_children() {
        let sleeper = sh("sleep 600 & echo $!; wait", Options::default());
        while sleeper.report().stdout.last() != Some(&b'\n') {
            assert!(!sleeper.wait(LONG, true));
        }
        let text = String::from_utf8(sleeper.report().stdout).unwrap();
        let child: u32 = text.trim().parse().unwrap();
        drop(sleeper);
        let deadline = Instant::now() + LONG;
        // The killed child may stay a zombie until somebody reaps it.
        let lives = || {
            std::fs::read_to_string(format!("/proc/{child}/stat"))
                .is_ok_and(|stat| !stat.contains(") Z "))
        };
        while lives() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn heartbeats_are_written_and_silence_ends_the_process() {
        let options = Options {
            open_input: true,
            heartbeat: Some(Duration::from_millis(50)),
            max_silence: Some(Duration::from_secs(1)),
            ..Options::default()
        };
        let linked = sh(
            "cat",
            Options {
                open_input: true,
                ..Options::default()
            },
        );
        let echo = sh(
            "i=0; while [ $i -lt 4 ]; do read x; echo alive; i=$((i+1)); done; sleep 600",
            options,
        );
        echo.on_end(&linked, OnEnd::EndInput);
        assert!(echo.wait(LONG, false));
        let report = echo.report();
        assert!(report.silent);
        assert_eq!(report.exit, Some(Exit::Signal(libc::SIGKILL)));
        assert_eq!(report.stdout, b"alive\nalive\nalive\nalive\n");
        assert!(linked.wait(LONG, false));
    }

    #[test]
    fn no_end_is_missed_beside_the_end_of_the_input() {
        let open_input = || Options {
            open_input: true,
            ..Options::default()
        };
        for _ in 0..300 {
            let process = sh("exec cat", open_input());
            process.end_input();
            process.kill();
            for _ in 0..20 {
                process.shared.wake();
            }
            assert!(process.wait(LONG, false));
        }
    }

    #[test]
    fn the_end_of_one_process_ends_the_input_of_another() {
        let other = sh(
            "cat; echo ended",
            Options {
                open_input: true,
                ..Options::default()
            },
        );
        let one = sh("exit 0", Options::default());
        one.on_end(&other, OnEnd::EndInput);
        assert!(other.wait(LONG, false));
        assert_eq!(other.report().stdout, b"ended\n");
        let late = sh(
            "cat; echo ended",
            Options {
                open_input: true,
                ..Options::default()
            },
        );
        one.on_end(&late, OnEnd::Kill);
        assert!(late.wait(LONG, false));
    }

    #[test]
    fn lines_are_sent_in_order_until_the_input_ends() {
        let cat = sh(
            "cat",
            Options {
                open_input: true,
                ..Options::default()
            },
        );
        let mut expected = Vec::new();
        for i in 0..20_000 {
            let line = format!("order {i}\n");
            assert!(cat.send(line.as_bytes()));
            expected.extend_from_slice(line.as_bytes());
        }
        cat.end_input();
        assert!(!cat.send(b"late\n"));
        assert!(cat.wait(LONG, false));
        assert!(cat.report().stdout == expected);
        assert!(!cat.send(b"late\n"));
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let command = vec![OsString::from("/does/not/exist")];
        let started = Background::start(Options {
            command,
            ..Options::default()
        });
        assert_eq!(
            started.err().map(|error| error.kind()),
            Some(io::ErrorKind::NotFound)
        );
    }
}
