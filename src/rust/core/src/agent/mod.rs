//! The agent: one process a host that makes workers, relays between them and the head, and sees
//! to it that nothing outlives the cluster.
//!
//! One thread, one mio loop, no R while it runs. It never blocks on a peer. When the head asks
//! for the end, or its stream ends for whatever reason, every worker is ended and then the agent.
//!
//! Readiness is edge-triggered: what is left in a stream is not announced again. A stream is
//! therefore read until the system says `WouldBlock`, or is noted to be read again. A short read
//! does not mean that the stream is empty: `recvmsg` stops behind bytes that carry a descriptor.

mod fork;
mod guard;
pub mod held;
mod memory;
pub mod payload;
mod process;
pub mod relay;
pub mod replay;
pub mod state;
mod strays;
mod usage;

use crate::platform::memory::OutOfMemory;
use crate::platform::{self, cores, fd, limits, memfd, reserve, signals};
use crate::protocol::control::{
    self, Handover, Hello, Loss, Outfile, Start, StartMode, ToAgent, ToHead,
};
use crate::protocol::frame::{self, FIRST, Frame, Header, Kind, LAST, MAX_BODY};
use crate::protocol::handshake::{MAGIC, Preamble, PreambleState};
use crate::protocol::heartbeat::Pulse;
use crate::protocol::limits::SEND_WINDOW;
use crate::protocol::send_queue::OutBuf;
use crate::worker::Channel;
use bytes::{Bytes, BytesMut};
pub use guard::Guard;
use memory::{Memories, Memory};
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use process::{Made, Outgoing, Process, Tail};
use relay::{Act, Relay};
use state::{Ending, REPLAY};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use strays::Strays;
use usage::Census;

const HEAD_IN: Token = Token(0);
const HEAD_OUT: Token = Token(1);
const SIGNALS: Token = Token(2);
const PARENT: Token = Token(3);
const FIRST_WORKER: usize = 4;

/// While this much waits for the head, nothing more is read from workers.
const HEAD_BACKLOG: usize = 4 * 1024 * 1024;
/// Bytes that may wait for a worker: the head's window, and what the agent itself sends, which it may
/// have taken for room.
const WORKER_BACKLOG: usize = 2 * SEND_WINDOW;
/// Bytes read at a time.
const READ: usize = 256 * 1024;
/// Reads of one stream before the others have their turn.
const READS: usize = 4;
/// Descriptors that may have come from a worker and wait for the frames that they belong to.
const MOST_DESCRIPTORS: usize = 4;
/// For the system to have room again.
const WAIT: Duration = Duration::from_millis(10);
/// How often the agent looks whether its parent, the head, is still there, where the system cannot tell.
const LOOK_FOR_PARENT: Duration = Duration::from_millis(200);
/// How long the agent polls for events before it sleeps: what a short task and its messages take.
const WATCH: Duration = Duration::from_micros(100);
/// Open files besides one for each worker that answers in shared memory take.
const MORE_FILES: u64 = 16;
/// Workers made between two looks at the streams.
const MAKE_AT_ONCE: usize = 8;

/// Signals whose handling the agent changes, and that its forks get back as they were.
const CHANGED: [libc::c_int; 6] = [
    libc::SIGXFSZ,
    libc::SIGCHLD,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGPIPE,
    libc::SIGINT,
];

/// An agent that has talked to its head and not yet made workers.
pub struct Greeted {
    reader: File,
    writer: File,
    received: BytesMut,
    /// What the head wants.
    pub start: Start,
    head_pid: u32,
    /// The head's numbers are written as ours are.
    same_order: bool,
    guard: Guard,
    /// Packages that were found out before this process became the program that it is.
    pub after: Vec<String>,
}

/// How [`Agent::run`] ends.
pub enum Role {
    /// This process is a forked worker.
    Worker(Box<Channel>),
    /// The cluster is over, and all workers have ended.
    Done,
}

/// Facts about this process for the other side.
pub fn hello(package: &str, r_version: &str, platform: &str) -> Hello {
    let (memory_total, memory_available) = platform::memory::host_memory().unwrap_or((0, 0));
    Hello {
        protocol: control::PROTOCOL,
        package: package.to_owned(),
        r_version: r_version.to_owned(),
        platform: platform.to_owned(),
        big_endian: cfg!(target_endian = "big"),
        pid: std::process::id(),
        hostname: platform::process::hostname(),
        cores: cores::usable_cores() as u32,
        memory_total,
        memory_available,
    }
}

/// Takes over stdin and stdout and waits for the head to say what it wants.
///
/// # Errors
/// When the head is gone, is another version, or is no head.
pub fn greet(hello: &Hello) -> io::Result<Greeted> {
    let (reader, writer) = fd::take_stdio()?;
    greet_over(reader, writer, hello)
}

/// As [`greet`], over any stream.
///
/// # Errors
/// When the head is gone, is another version, or is no head.
pub fn greet_over(mut reader: File, mut writer: File, hello: &Hello) -> io::Result<Greeted> {
    let greeting = control::encode(&ToHead::Hello(hello.clone())).map_err(io::Error::other)?;
    let mut out = OutBuf::default();
    out.push_bytes(MAGIC);
    out.push(&greeting);
    while !out.is_empty() {
        out.write_with(|slices| writer.write_vectored(slices))?;
    }
    let mut preamble = Preamble::default();
    let mut buffer = [0u8; 4096];
    let mut received = loop {
        let n = read_some(&mut reader, &mut buffer)?;
        match preamble.feed(&buffer[..n]) {
            PreambleState::Open(rest) => break BytesMut::from(&rest[..]),
            PreambleState::Incomplete => {}
            PreambleState::NotOurs => return Err(io::Error::other("no head at the other end")),
        }
    };
    let mut head = None;
    loop {
        while let Some(frame) = frame::decode(&mut received).map_err(io::Error::other)? {
            if frame.header.kind != Kind::Control {
                return Err(io::Error::other("the head did not greet"));
            }
            match control::decode(&frame.body).map_err(io::Error::other)? {
                ToAgent::Hello(other) => {
                    hello.check(&other).map_err(io::Error::other)?;
                    head = Some((other.pid, other.big_endian == hello.big_endian));
                }
                ToAgent::Start(start) => {
                    let Some((head_pid, same_order)) = head else {
                        return Err(io::Error::other("the head did not greet"));
                    };
                    // Before packages are loaded: from here on, what an end leaves is removed.
                    let guard = Guard::start(start.workers as usize);
                    return Ok(Greeted {
                        guard,
                        reader,
                        writer,
                        received,
                        start,
                        head_pid,
                        same_order,
                        after: Vec::new(),
                    });
                }
                _ => return Err(io::Error::other("the head gave up")),
            }
        }
        let n = read_some(&mut reader, &mut buffer)?;
        received.extend_from_slice(&buffer[..n]);
    }
}

fn read_some(reader: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Ok(0) => return Err(io::Error::other("the head is gone")),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Greeted {
    /// From here on this process ends when the head does, also while R loads packages: the guard then removes
    /// what is left. For a process that runs nothing else.
    pub fn end_with_head(&self) {
        // Where it cannot, the end is noticed once packages are loaded.
        let _ = signals::end_with(self.reader.as_raw_fd());
    }

    /// This process has that temporary directory: it is removed even if the agent is killed.
    pub fn watch_tempdir(&mut self, tempdir: &str) {
        if process::is_tempdir(tempdir) {
            self.guard.watch_tempdir(tempdir);
        }
    }

    /// What [`Greeted::resume`] needs, as text, the head's stream, which has to be stdin and stdout there, and
    /// the guard, which is to live until this process is the other program.
    ///
    /// # Errors
    /// When the text is too long.
    pub fn hand_over(self, after: Vec<String>) -> io::Result<(String, File, File, Guard)> {
        signals::outlive(self.reader.as_raw_fd());
        let handover = Handover {
            start: self.start,
            head_pid: self.head_pid,
            same_order: self.same_order,
            received: self.received.to_vec(),
            after,
        };
        let frame = control::encode(&handover).map_err(io::Error::other)?;
        let text = frame.body.iter().map(|byte| format!("{byte:02x}"));
        Ok((text.collect(), self.reader, self.writer, self.guard))
    }

    /// Goes on where another program in this process has handed over.
    ///
    /// # Errors
    /// When the text is damaged, or descriptors cannot be changed.
    pub fn resume(text: &str) -> io::Result<Greeted> {
        let damaged = || io::Error::other("a damaged handover");
        let pairs = text.as_bytes().chunks(2);
        let bytes: Option<Vec<u8>> = pairs
            .map(|pair| {
                let pair = std::str::from_utf8(pair).ok()?;
                u8::from_str_radix(pair, 16).ok()
            })
            .collect();
        let handover: Handover =
            control::decode(&bytes.ok_or_else(damaged)?).map_err(io::Error::other)?;
        let (reader, writer) = fd::take_stdio()?;
        Ok(Greeted {
            guard: Guard::start(handover.start.workers as usize),
            reader,
            writer,
            received: BytesMut::from(&handover.received[..]),
            start: handover.start,
            head_pid: handover.head_pid,
            same_order: handover.same_order,
            after: handover.after,
        })
    }

    /// Tells the head that nothing was or will be started, and why.
    ///
    /// # Errors
    /// When the head is gone.
    pub fn fail(mut self, reason: String) -> io::Result<()> {
        self.tell(&ToHead::StartFailed { reason })
    }

    fn tell(&mut self, message: &ToHead) -> io::Result<()> {
        let frame = control::encode(message).map_err(io::Error::other)?;
        let mut out = OutBuf::default();
        out.push(&frame);
        while !out.is_empty() {
            out.write_with(|slices| self.writer.write_vectored(slices))?;
        }
        Ok(())
    }

    /// Why the cluster's `outfile` cannot be written here, if that is so.
    pub fn outfile_problem(&self) -> Option<String> {
        let Outfile::File(path) = &self.start.outfile else {
            return None;
        };
        let error = open_outfile(path).err()?;
        Some(format!(
            "its `outfile` {path} cannot be opened or made there: {error}"
        ))
    }

    /// Whether workers may give their answers in memory that is shared with the head: it is the process
    /// at the other end of the stream, and there are descriptors enough.
    fn shares(&self) -> bool {
        let Start {
            here,
            memory_limit,
            workers,
            ..
        } = self.start;
        let maker = || fd::maker_of_pair(self.writer.as_raw_fd());
        let near = here && self.same_order && maker() == Some(self.head_pid);
        let needed = limits::open_files_needed(workers as usize) + u64::from(workers) + MORE_FILES;
        let enough = || limits::raise_open_files(needed).is_ok_and(|files| files >= needed);
        near && memory_limit == 0 && enough()
    }

    /// Checks this host's limits and becomes the agent proper; on a shortfall the head is told
    /// and nothing is started.
    ///
    /// # Errors
    /// When a stream cannot be watched, or the limits are too low.
    pub fn agent(mut self) -> io::Result<Agent> {
        let workers = self.start.workers as usize;
        if let Err(short) = limits::check(workers) {
            let message = short.remedy.clone();
            self.tell(&ToHead::Limits {
                what: short.what.to_owned(),
                needed: short.needed,
                available: short.available,
                remedy: short.remedy,
            })?;
            return Err(io::Error::other(message));
        }
        limits::raise_open_files(limits::open_files_needed(workers))?;
        Agent::new(self)
    }
}

/// See the module's documentation.
pub struct Agent {
    poll: Poll,
    reader: File,
    writer: File,
    received: BytesMut,
    to_head: Outgoing,
    head_blocked: bool,
    /// The system has no room for more on its way to the head: it is tried again soon.
    head_waits: bool,
    /// The head is gone or has asked for the end.
    ending: bool,
    /// The head is gone, or the agent cannot go on.
    alone: bool,
    start: Start,
    outfile: Option<File>,
    relay: Relay,
    /// The bytes of payloads.
    memories: Memories,
    /// What it makes of what has come; empty but for a moment.
    acts: Vec<Act>,
    workers: Vec<Option<Process>>,
    /// Workers yet to be made; `true` for one that replaces another.
    to_make: VecDeque<(u32, bool)>,
    /// Workers with bytes waiting to be written.
    dirty: Vec<u32>,
    /// The head's stream may hold more than the last look took.
    head_unread: bool,
    /// Workers that may have more to read than the last look took, each once.
    unread: Vec<u32>,
    is_unread: Vec<bool>,
    signals: UnixStream,
    asked_to_end: Arc<AtomicBool>,
    /// Of a head on another machine.
    pulse: Option<Pulse>,
    _parent: Option<OwnedFd>,
    /// The head, which is this process's parent and is to be looked for again and again.
    looked_for: Option<u32>,
    saved: signals::Saved,
    guard: Guard,
    /// Temporary directories of workers that have ended, which could not be removed.
    unremoved: Vec<String>,
    strays: Strays,
    /// What the head wants to know of the workers' memory.
    census: Option<Census>,
    memory: OutOfMemory,
    epoch: Instant,
    /// How long the agent has lately waited for events.
    usual_wait: Duration,
    scratch: Vec<u8>,
}

fn open_outfile(path: &str) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}

impl Agent {
    fn new(greeted: Greeted) -> io::Result<Agent> {
        let shares = greeted.shares();
        let poll = Poll::new()?;
        let registry = poll.registry();
        fd::set_nonblocking(greeted.writer.as_raw_fd(), true)?;
        let fd = greeted.reader.as_raw_fd();
        signals::outlive(fd);
        fd::set_nonblocking(fd, true)?;
        registry.register(&mut SourceFd(&fd), HEAD_IN, Interest::READABLE)?;
        let saved = signals::save(&CHANGED);
        let (signals_in, signals_out) = UnixStream::pair()?;
        signals_in.set_nonblocking(true)?;
        let asked_to_end = Arc::new(AtomicBool::new(false));
        for signal in [libc::SIGTERM, libc::SIGHUP] {
            signal_hook::flag::register(signal, asked_to_end.clone())?;
        }
        // After the flags: who is woken by the pipe finds them set.
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGHUP] {
            signal_hook::low_level::pipe::register(signal, signals_out.try_clone()?)?;
        }
        // Beyond the limit of file sizes, a write fails and the agent does something else.
        signals::ignore(&[libc::SIGPIPE, libc::SIGINT, libc::SIGXFSZ]);
        let fd = signals_in.as_raw_fd();
        registry.register(&mut SourceFd(&fd), SIGNALS, Interest::READABLE)?;
        // A head on this machine may die while a fork of it keeps the stream open.
        let parent = platform::process::watch_parent(greeted.head_pid);
        if let Some(parent) = &parent {
            let fd = parent.as_raw_fd();
            registry.register(&mut SourceFd(&fd), PARENT, Interest::READABLE)?;
        }
        let unwatched = parent.is_none() && platform::process::is_parent(greeted.head_pid);
        let count = greeted.start.workers;
        let outfile = match &greeted.start.outfile {
            Outfile::File(path) => Some(open_outfile(path)?),
            _ => None,
        };
        let patience = Duration::from_millis(greeted.start.patience.into());
        let timeout = Duration::from_millis(greeted.start.timeout);
        let setup = Duration::from_millis(greeted.start.setup);
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut relay = Relay::new(
            count as usize,
            bytes(greeted.start.keep),
            bytes(greeted.start.state),
            (!timeout.is_zero()).then_some(timeout),
        );
        relay.book.shares = shares;
        relay.book.stop_timeout = Duration::from_millis(greeted.start.stop_timeout);
        relay.book.patience = (!setup.is_zero()).then_some(setup);
        Ok(Agent {
            pulse: (!patience.is_zero()).then(|| Pulse::new(patience, Duration::ZERO)),
            poll,
            reader: greeted.reader,
            writer: greeted.writer,
            received: greeted.received,
            to_head: Outgoing::default(),
            head_blocked: false,
            head_waits: false,
            ending: false,
            alone: false,
            outfile,
            relay,
            memories: Memories::default(),
            acts: Vec::new(),
            start: greeted.start,
            workers: (0..count).map(|_| None).collect(),
            to_make: (0..count).map(|worker| (worker, false)).collect(),
            dirty: Vec::new(),
            head_unread: false,
            unread: Vec::new(),
            is_unread: vec![false; count as usize],
            signals: signals_in,
            asked_to_end,
            _parent: parent,
            looked_for: unwatched.then_some(greeted.head_pid),
            saved,
            guard: greeted.guard,
            unremoved: Vec::new(),
            strays: Strays::adopt(),
            census: None,
            memory: OutOfMemory::watch(),
            epoch: Instant::now(),
            usual_wait: Duration::ZERO,
            scratch: vec![0; READ],
        })
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Waits for events, up to `timeout`. If they have lately come so soon that to sleep and to be woken would take
    /// longer, and there is at most one busy worker from which a core could be taken, the agent polls for a while
    /// before it sleeps, and yields its core after every look.
    fn wait(&mut self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        events.clear();
        if timeout == Some(Duration::ZERO) {
            return self.poll.poll(events, timeout);
        }
        let began = Instant::now();
        let most = timeout.map_or(WATCH, |timeout| timeout.min(WATCH));
        if self.usual_wait <= most && self.relay.book.at_most_one_is_busy() {
            while began.elapsed() < most {
                self.poll.poll(events, Some(Duration::ZERO))?;
                if !events.is_empty() {
                    break;
                }
                thread::yield_now();
            }
        }
        if events.is_empty() {
            self.poll.poll(events, timeout)?;
        }
        // Bounded: after a pause a few short waits tell that messages come soon again.
        self.usual_wait = ((3 * self.usual_wait + began.elapsed()) / 4).min(4 * WATCH);
        Ok(())
    }

    /// Serves until the cluster is over, or, in a forked worker, until that exists.
    ///
    /// # Errors
    /// When the system fails in a way that leaves nothing to do. Workers then end with the agent.
    pub fn run(&mut self) -> io::Result<Role> {
        let mut events = Events::with_capacity(1024);
        // What came together with the greeting.
        self.on_head_bytes();
        loop {
            if let Some(channel) = self.make_some()? {
                return Ok(Role::Worker(Box::new(channel)));
            }
            let can_read =
                self.head_unread || !self.unread.is_empty() && self.to_head.len() < HEAD_BACKLOG;
            let timeout = if self.to_make.is_empty() && !can_read && self.census.is_none() {
                let pulse = self.pulse.as_ref().filter(|_| !self.alone);
                let farewell = self.strays.deadline();
                let deadline = if self.to_head.len() < HEAD_BACKLOG {
                    self.relay.book.next_deadline()
                } else {
                    self.relay.book.next_end()
                };
                let again = self.head_waits.then(|| self.now() + WAIT);
                let parent = self.looked_for.filter(|_| !self.alone);
                let look = parent.map(|_| self.now() + LOOK_FOR_PARENT);
                let retry = self.relay.book.next_retry().filter(|_| !self.ending);
                let deadlines = [
                    deadline,
                    pulse.map(Pulse::next),
                    farewell,
                    again,
                    look,
                    retry,
                ];
                let next = deadlines.into_iter().flatten().min();
                next.map(|at| at.saturating_sub(self.now()) + Duration::from_millis(1))
            } else {
                Some(Duration::ZERO)
            };
            match self.wait(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            // First: what a worker printed before it answered is not of the task that follows.
            for Token(token) in events.iter().map(Event::token) {
                if token >= FIRST_WORKER && (token - FIRST_WORKER) % 2 == 1 {
                    self.read_output(((token - FIRST_WORKER) / 2) as u32);
                }
            }
            let mut ended = false;
            for event in &events {
                match event.token() {
                    HEAD_IN => self.head_unread = true,
                    HEAD_OUT => {
                        self.head_blocked = false;
                        let fd = self.writer.as_raw_fd();
                        self.poll.registry().deregister(&mut SourceFd(&fd))?;
                    }
                    SIGNALS => ended = true,
                    PARENT => self.end(),
                    Token(token) => {
                        let worker = ((token - FIRST_WORKER) / 2) as u32;
                        if (token - FIRST_WORKER) % 2 == 1 {
                            continue;
                        }
                        if event.is_readable() || event.is_read_closed() {
                            self.read_worker(worker);
                        }
                        if event.is_writable() {
                            self.dirty.push(worker);
                        }
                    }
                }
            }
            if std::mem::take(&mut self.head_unread) {
                self.read_head();
            }
            if self.to_head.len() < HEAD_BACKLOG {
                for worker in std::mem::take(&mut self.unread) {
                    self.is_unread[worker as usize] = false;
                    self.read_worker(worker);
                    self.read_output(worker);
                }
            }
            if ended {
                self.on_signals();
            }
            if self
                .looked_for
                .is_some_and(|parent| !platform::process::is_parent(parent))
            {
                self.end();
            }
            if reserve::was_used() {
                let limits = limits::memory_limits();
                self.fail(&format!("the agent has no memory left{limits}"));
            }
            self.feel_pulse();
            // While the head does not take what there is, a task may have been answered in time and
            // the answer not been looked at.
            let now = self.now();
            let mut overdue = self.relay.book.overdue(now);
            if self.to_head.len() < HEAD_BACKLOG {
                self.relay.out_of_time(now, &mut self.acts);
                self.act();
                overdue.extend(self.relay.book.stalled(now));
            }
            let any_overdue = !overdue.is_empty();
            for worker in overdue {
                if let Some(process) = &self.workers[worker as usize] {
                    process.kill();
                }
            }
            // Their ends are not told of if code in a worker has shut down the socket of signals, which a fork shares
            // with its agent.
            if any_overdue {
                self.on_signals();
            }
            if !self.ending {
                let due = self.relay.book.to_retry(now);
                self.to_make
                    .extend(due.into_iter().map(|worker| (worker, true)));
            }
            for worker in std::mem::take(&mut self.dirty) {
                self.write_worker(worker);
            }
            self.count_memory();
            self.write_head();
            let over = self.ending && self.to_make.is_empty() && self.relay.book.all_gone();
            if over && self.has_said_farewell() {
                self.remove_again();
                return Ok(Role::Done);
            }
        }
    }

    /// Tells the head that this side is alive, and ends if nothing shows that the head is.
    fn feel_pulse(&mut self) {
        let now = self.now();
        let Some(pulse) = self.pulse.as_mut().filter(|_| !self.alone) else {
            return;
        };
        if pulse.is_silent(now) {
            eprintln!("rustcluster agent: nothing was heard from the head for too long");
            self.end();
        } else if pulse.speak(now) && self.to_head.is_empty() {
            // What waits to be sent is a sign of life itself.
            self.tell(&ToHead::Alive);
        }
    }

    /// Looks at the memory of the next worker: of a large one that takes a while, and the others are not
    /// to wait for all.
    fn count_memory(&mut self) {
        if self.ending {
            self.census = None;
        }
        let workers = &self.workers;
        let pid = |worker: u32| Some(workers.get(worker as usize)?.as_ref()?.pid);
        let told = self.census.as_mut().and_then(|census| census.next(pid));
        if let Some(message) = told {
            if let ToHead::Usage { last: true, .. } = &message {
                self.census = None;
            }
            self.tell(&message);
        }
    }

    /// Makes the next few workers. `Some` in a forked one.
    fn make_some(&mut self) -> io::Result<Option<Channel>> {
        for _ in 0..MAKE_AT_ONCE {
            let Some((worker, replaces)) = self.to_make.pop_front() else {
                break;
            };
            if self.ending {
                self.relay.book.give_up(worker);
                continue;
            }
            if self.relay.book.is_stopping(worker) {
                self.relay.book.give_up(worker);
                let timed_out = false;
                self.tell(&ToHead::WorkerStopped { worker, timed_out });
                continue;
            }
            self.relay.made(worker, replaces, self.now());
            let made = match self.start.mode {
                StartMode::Fork => self.fork(worker),
                StartMode::Spawn => {
                    let (shares, signals) = (self.relay.book.shares, self.saved.clone());
                    process::spawn(&self.start, worker, shares, signals)
                }
            };
            match made {
                Ok(Made::Child(channel)) => return Ok(Some(channel)),
                Ok(Made::Parent(process)) => {
                    self.guard.made(worker, process.pid);
                    self.strays.made(process.pid);
                    let token = FIRST_WORKER + 2 * worker as usize;
                    let registry = self.poll.registry();
                    let fd = process.channel.as_raw_fd();
                    registry.register(&mut SourceFd(&fd), Token(token), Interest::READABLE)?;
                    let fd = process.output.as_raw_fd();
                    registry.register(&mut SourceFd(&fd), Token(token + 1), Interest::READABLE)?;
                    self.workers[worker as usize] = Some(process);
                    // A separate process is told at once what to load.
                    self.write_worker(worker);
                }
                Err(error) => {
                    let loss = Loss {
                        tail: format!("a worker could not be started: {error}"),
                        ..Loss::default()
                    };
                    self.lost(worker, loss);
                }
            }
        }
        Ok(None)
    }

    fn fork(&mut self, worker: u32) -> io::Result<Made> {
        let made = fork::fork(worker, self.relay.book.shares)?;
        if let Made::Child(_) = made {
            self.saved.restore();
            // It would count for the worker's memory limit.
            reserve::release();
            platform::process::renice(self.start.renice);
        }
        Ok(made)
    }

    fn read_again(&mut self, worker: u32) {
        if !std::mem::replace(&mut self.is_unread[worker as usize], true) {
            self.unread.push(worker);
        }
    }

    fn tell(&mut self, message: &ToHead) {
        // Every field is bounded, so this cannot fail; were it to, the head would rather miss a
        // message than its agent.
        let wanted = !self.ending || *message == ToHead::Alive;
        match control::encode(message) {
            Ok(frame) if wanted => self.to_head.push(&frame, None),
            _ => {}
        }
    }

    /// Tells the head something that it must know even while the agent ends.
    fn tell_last(&mut self, message: &ToHead) {
        if let Ok(frame) = control::encode(message) {
            self.to_head.push(&frame, None);
            self.strays.last_words |= self.ending;
        }
    }

    fn read_head(&mut self) {
        for _ in 0..READS {
            match self.reader.read(&mut self.scratch) {
                Ok(0) => return self.end(),
                Ok(n) => {
                    let now = self.epoch.elapsed();
                    if let Some(pulse) = &mut self.pulse {
                        pulse.hear(now);
                    }
                    self.received.extend_from_slice(&self.scratch[..n]);
                    self.on_head_bytes();
                    if self.alone {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.end(),
            }
        }
        self.head_unread = true;
    }

    fn on_head_bytes(&mut self) {
        let (now, received) = (self.epoch.elapsed(), &mut self.received);
        let result = self.relay.from_head(received, now, &mut self.acts);
        self.act();
        if let Err(error) = result {
            eprintln!("rustcluster agent: {error}");
            self.end();
        }
    }

    /// Does what was decided.
    fn act(&mut self) {
        let mut acts = std::mem::take(&mut self.acts);
        for act in acts.drain(..) {
            match act {
                Act::ToHead(frame) if !self.ending => self.to_head.push(&frame, None),
                Act::ToHead(_) => {}
                Act::Along(frame) => self.pass_memory(&frame),
                Act::LetGo(worker) => {
                    if let Some(process) = &mut self.workers[worker as usize] {
                        process.descriptors.pop_front();
                    }
                }
                Act::Tell(message) => self.tell(&message),
                Act::ToWorker(frame) => {
                    let Header {
                        kind,
                        flags,
                        worker,
                        task,
                        ..
                    } = frame.header;
                    if kind == Kind::Data && flags & FIRST != 0 {
                        // What was printed by now is of the task before, which has ended.
                        if let Some(process) = &mut self.workers[worker as usize] {
                            process.tail = Tail::default();
                            // An interrupt was meant for that, too, and must not follow this one.
                            process.interrupt = false;
                        }
                    }
                    self.send_worker(worker, &frame, None);
                    // What a fresh worker is restored by is the agent's own, and no fault of the head's.
                    let of_head = kind == Kind::Data && task & REPLAY == 0;
                    if of_head && !self.has_room(worker) {
                        eprintln!(
                            "rustcluster agent: more for worker {worker} than it has room for"
                        );
                        self.end();
                    }
                }
                Act::Store {
                    payload,
                    bytes,
                    last,
                } => {
                    let stored = self.memories.store(payload, bytes, last);
                    if let Err(error) = stored {
                        self.fail(&format!("no memory for what workers share: {error}"));
                    }
                }
                Act::Hand { frame } => {
                    // It is there, or this host is about to end for want of it.
                    match self.memories.get(frame.header.task) {
                        Some(Memory::Shared(file)) => {
                            let file = Some(file.clone());
                            self.send_worker(frame.header.worker, &frame, file);
                        }
                        Some(Memory::Private(chunks)) => {
                            let chunks = chunks.clone();
                            self.send_payload(&frame.header, frame.wire_len(), &chunks);
                        }
                        None => {}
                    }
                }
                Act::Discard(payload) => self.memories.discard(payload),
                Act::Up { worker, replaces } => self.tell_up(worker, replaces),
                Act::Interrupt { worker, task } => self.interrupt(worker, task),
                Act::ReadAgain(worker) => self.read_again(worker),
                Act::Close(worker) => self.close(worker),
                Act::TempDir(worker, tempdir) => {
                    if let Some(process) = &mut self.workers[worker as usize] {
                        self.strays.ready(worker, process.pid, &tempdir);
                        process.tempdir = Some(tempdir).filter(|path| process::is_tempdir(path));
                        let tempdir = process.tempdir.as_deref().unwrap_or_default();
                        self.guard.has_tempdir(worker, process.pid, tempdir);
                    }
                }
                Act::Usage { question } => {
                    self.census = Some(Census::new(question, self.workers.len() as u32));
                }
                Act::End => self.stop(),
            }
        }
        // Its room serves again.
        self.acts = acts;
    }

    /// Passes on an answer in shared memory. A worker is user code: if somebody could still change the
    /// memory, or it is not there, the worker is killed, and its task lost with it.
    fn pass_memory(&mut self, frame: &Frame) {
        let Some(process) = &mut self.workers[frame.header.worker as usize] else {
            return;
        };
        let file = process.descriptors.pop_front().map(File::from);
        let len = |file: &File| file.metadata().ok().map(|data| data.len());
        let is_right = |file: &File| len(file) == frame.number() && memfd::is_sealed(file);
        match file.filter(is_right) {
            Some(file) if !self.ending => self.to_head.push(frame, Some(Arc::new(file))),
            Some(_) => {}
            None => process.kill(),
        }
    }

    /// A cancel frame, then SIGINT: see [`crate::worker`].
    fn interrupt(&mut self, worker: u32, task: u64) {
        if let Some(process) = &mut self.workers[worker as usize] {
            process.interrupt = true;
            let frame = Frame::new(Kind::Cancel, 0, worker, task, Bytes::new());
            self.send_worker(worker, &frame, None);
        }
    }

    fn close(&mut self, worker: u32) {
        if let Some(process) = &mut self.workers[worker as usize] {
            process.closing = true;
            self.dirty.push(worker);
            // R is still starting. When it is interrupted it ends, and removes its temporary directory.
            if self.start.mode == StartMode::Spawn && process.tempdir.is_none() {
                process.signal(libc::SIGINT);
            }
        }
    }

    /// Tells the head why this host cannot go on, and ends.
    fn fail(&mut self, reason: &str) {
        let reason = reason.to_owned();
        self.tell(&ToHead::Failed { reason });
        self.end();
    }

    /// The head is gone, or the agent cannot go on: ends all workers within the second that is promised.
    fn end(&mut self) {
        self.stop();
        if !std::mem::replace(&mut self.alone, true) {
            self.relay.book.hurry(self.now());
        }
    }

    /// Ends all workers, and with them the agent. Idle workers have their time to run exit handlers.
    fn stop(&mut self) {
        if std::mem::replace(&mut self.ending, true) {
            return;
        }
        let now = self.now();
        for worker in 0..self.workers.len() as u32 {
            if self.workers[worker as usize].is_some() {
                self.relay.stop(worker, now, &mut self.acts);
            }
        }
        self.act();
    }

    fn send_worker(&mut self, worker: u32, frame: &Frame, along: Option<Arc<File>>) {
        if let Some(process) = &mut self.workers[worker as usize] {
            process.outgoing.push(frame, along);
            self.dirty.push(worker);
        }
    }

    /// Sends a payload that could not be put into shared memory, in as many frames as it takes. `counted`:
    /// bytes of it that count as given already.
    fn send_payload(&mut self, header: &Header, counted: usize, chunks: &[Bytes]) {
        let Header { worker, task, .. } = *header;
        let mut bytes = 0;
        for (at, chunk) in chunks.iter().enumerate() {
            let first = if at == 0 { FIRST } else { 0 };
            let last = if at + 1 == chunks.len() { LAST } else { 0 };
            let frame = Frame::new(Kind::Payload, first | last, worker, task, chunk.clone());
            bytes += frame.wire_len();
            self.send_worker(worker, &frame, None);
        }
        // The frame that would have gone with the shared memory has been counted.
        self.relay.book.gave(worker, bytes.saturating_sub(counted));
    }

    /// A head that heeds no window could fill this host's memory.
    fn has_room(&self, worker: u32) -> bool {
        let process = self.workers[worker as usize].as_ref();
        let most = WORKER_BACKLOG.saturating_add(self.relay.book.given(worker));
        process.is_none_or(|process| process.outgoing.len() <= most)
    }

    fn write_worker(&mut self, worker: u32) {
        let Some(process) = &mut self.workers[worker as usize] else {
            return;
        };
        let mut passed = 0;
        while !process.outgoing.is_empty() {
            let fd = process.channel.as_raw_fd();
            match process.outgoing.write(fd) {
                Ok(n) => passed += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The worker would wait for it for ever.
                Err(error) if is_want(&error) => {
                    self.fail(&format!("no memory to send to workers: {error}"));
                    return;
                }
                // Not writable now; or the worker is gone, which its exit will tell.
                Err(_) => break,
            }
        }
        // Writability is asked for only while there is something to write: otherwise every
        // message that a worker reads would wake the agent.
        if process.outgoing.is_empty() == process.write_blocked {
            process.write_blocked = !process.write_blocked;
            let interest = if process.write_blocked {
                Interest::READABLE | Interest::WRITABLE
            } else {
                Interest::READABLE
            };
            let token = Token(FIRST_WORKER + 2 * worker as usize);
            let fd = process.channel.as_raw_fd();
            let mut source = SourceFd(&fd);
            let _ = self
                .poll
                .registry()
                .reregister(&mut source, token, interest);
        }
        if process.outgoing.is_empty() {
            if std::mem::take(&mut process.interrupt) {
                process.signal(libc::SIGINT);
            }
            if std::mem::take(&mut process.closing) {
                // A worker that waits for a task sees the end of the stream and ends.
                let _ = process.channel.shutdown(std::net::Shutdown::Write);
            }
        }
        match self.relay.book.passed(worker, passed) {
            Some((task, bytes)) if !self.ending => {
                self.to_head.push(&Frame::credit(worker, task, bytes), None);
            }
            _ => {}
        }
    }

    fn write_head(&mut self) {
        self.head_waits = false;
        while !self.to_head.is_empty() && !self.head_blocked {
            let writer = &mut self.writer;
            match self.to_head.write_with(|slices, along| match along {
                Some(_) => fd::send_with(writer.as_raw_fd(), slices, along),
                None => writer.write_vectored(slices),
            }) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.head_blocked = true;
                    let fd = self.writer.as_raw_fd();
                    let writable = Interest::WRITABLE;
                    let registry = self.poll.registry();
                    if registry
                        .register(&mut SourceFd(&fd), HEAD_OUT, writable)
                        .is_err()
                    {
                        self.end();
                    }
                }
                // Descriptors on their way are counted for all processes of a user.
                Err(error) if is_want(&error) => {
                    self.head_waits = true;
                    return;
                }
                Err(_) => {
                    self.to_head = Outgoing::default();
                    self.end();
                }
            }
        }
    }

    fn read_worker(&mut self, worker: u32) {
        if self.read_some_of_worker(worker) {
            self.read_again(worker);
        }
    }

    /// Reads a bounded number of times. Returns whether there may be more that can be dealt with.
    fn read_some_of_worker(&mut self, worker: u32) -> bool {
        if self.to_head.len() >= HEAD_BACKLOG && !self.ending {
            return true;
        }
        let Some(process) = &mut self.workers[worker as usize] else {
            return false;
        };
        // What is held is dealt with first: only when it has gone is more read.
        let mut held = std::mem::take(&mut process.received);
        let mut broken = self.on_worker_bytes(worker, &mut held);
        let mut more = true;
        for _ in 0..READS {
            // The rest is read when the head asks for what waits here.
            more = held.len() < HEADER_AND_BODY && !broken;
            if !more || self.to_head.len() >= HEAD_BACKLOG && !self.ending {
                break;
            }
            let Some(process) = &mut self.workers[worker as usize] else {
                return false;
            };
            let mut came = Vec::new();
            let fd = process.channel.as_raw_fd();
            match fd::recv(fd, &mut self.scratch, &mut came, false) {
                Ok(n) if n > 0 => {
                    held.extend_from_slice(&self.scratch[..n]);
                    process.descriptors.extend(came);
                    broken = process.descriptors.len() > MOST_DESCRIPTORS
                        || self.on_worker_bytes(worker, &mut held);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => {
                    more = false;
                    // Otherwise its end of the channel is closed, which only its own end should do.
                    let empty = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
                    process.hung_up |= !read.as_ref().is_err_and(empty);
                    break;
                }
            }
        }
        let Some(process) = &mut self.workers[worker as usize] else {
            return false;
        };
        process.received = held;
        // Its exit, by itself or by this, tells the rest.
        if broken {
            process.kill();
        } else if process.hung_up {
            self.relay.book.hung_up(worker, self.epoch.elapsed());
        }
        more && !broken
    }

    /// Passes on the whole frames in `held`, up to one that must wait. Returns whether the worker
    /// sent what none of ours would.
    fn on_worker_bytes(&mut self, worker: u32, held: &mut BytesMut) -> bool {
        let now = self.now();
        let result = self.relay.from_worker(worker, held, now, &mut self.acts);
        self.act();
        result.is_err()
    }

    /// The head may send it tasks.
    fn tell_up(&mut self, worker: u32, replaces: bool) {
        let Some(process) = &self.workers[worker as usize] else {
            return;
        };
        let pid = process.pid;
        let message = if replaces {
            ToHead::WorkerReplaced { worker, pid }
        } else {
            ToHead::WorkerUp { worker, pid }
        };
        self.tell(&message);
    }

    fn read_output(&mut self, worker: u32) {
        let Some(process) = &mut self.workers[worker as usize] else {
            return;
        };
        // Bounded, so that a worker that never stops printing does not stop the others.
        for _ in 0..READS {
            if self.to_head.len() >= HEAD_BACKLOG && !self.ending {
                break;
            }
            match process.output.read(&mut self.scratch) {
                Ok(0) => return,
                Ok(n) => {
                    let bytes = &self.scratch[..n];
                    process.tail.push(bytes);
                    if let Some(file) = &mut self.outfile {
                        // A full disk must not end the computation.
                        let _ = process.lines.push(bytes, file);
                    }
                    if self.start.outfile == Outfile::Console && !self.alone {
                        // Also what exit handlers print.
                        self.strays.last_words |= self.ending;
                        for chunk in bytes.chunks(MAX_BODY) {
                            let body = Bytes::copy_from_slice(chunk);
                            self.to_head
                                .push(&Frame::new(Kind::Output, 0, worker, 0, body), None);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
        self.read_again(worker);
    }

    /// A child ended, or somebody wants the agent to.
    fn on_signals(&mut self) {
        let mut buffer = [0u8; 256];
        while matches!(self.signals.read(&mut buffer), Ok(n) if n > 0) {}
        // One after another; all are looked at only if the next to be waited for is not ours, as a
        // child that a package started may be.
        while let Some(pid) = platform::process::peek_any_exit() {
            let ours = |process: &Option<Process>| process.as_ref().is_some_and(|p| p.pid == pid);
            match self.workers.iter().position(ours) {
                Some(worker) => self.on_exit(worker as u32),
                None if self.guard.reap(pid) || self.strays.reap(pid) => {}
                None => {
                    self.look_at_all();
                    break;
                }
            }
        }
        self.report_more_strays();
        if self.asked_to_end.load(Ordering::Relaxed) {
            self.end();
        }
    }

    fn look_at_all(&mut self) {
        for worker in 0..self.workers.len() as u32 {
            let ended = match &self.workers[worker as usize] {
                Some(process) => platform::process::peek_exit(process.pid),
                None => false,
            };
            if ended {
                self.on_exit(worker);
            }
        }
        let workers = &self.workers;
        self.strays
            .reap_all(|pid| workers.iter().flatten().any(|process| process.pid == pid));
    }

    /// Removes a temporary directory. What was killed with its worker may still be writing to it: then it is
    /// tried again later. Returns whether it is gone.
    fn remove(&mut self, tempdir: String) -> bool {
        let removed = std::fs::remove_dir_all(&tempdir);
        let left = removed.is_err_and(|error| error.kind() != io::ErrorKind::NotFound);
        if left {
            self.unremoved.push(tempdir);
        }
        !left
    }

    fn remove_again(&mut self) {
        for tempdir in std::mem::take(&mut self.unremoved) {
            self.remove(tempdir);
        }
    }

    fn on_exit(&mut self, worker: u32) {
        self.remove_again();
        // An answer that was whole before the end still counts, and so do last words.
        for _ in 0..READS {
            if !self.read_some_of_worker(worker) {
                break;
            }
        }
        self.read_output(worker);
        let Some(mut process) = self.workers[worker as usize].take() else {
            return;
        };
        if let Some(file) = &mut self.outfile {
            let _ = process.lines.flush(file);
        }
        // Before the process is reaped, so that its number cannot be another's. This also ends
        // what it started and did not wait for.
        process.kill_group();
        self.guard
            .ended(worker, process.tempdir.as_deref().unwrap_or_default());
        let exit = platform::process::reap(process.pid);
        self.report_strays(process.pid);
        let registry = self.poll.registry();
        for fd in [process.channel.as_raw_fd(), process.output.as_raw_fd()] {
            let _ = registry.deregister(&mut SourceFd(&fd));
        }
        if let Some(tempdir) = process.tempdir.take() {
            // Already gone if it ended in good order.
            if self.remove(tempdir) {
                self.guard.cleared(worker);
            }
        }
        let loss = Loss {
            pid: process.pid,
            exit,
            tail: process.tail.text(),
            oom: process.was_killed_by_others(exit) && self.memory.explains_kill(),
            ..Loss::default()
        };
        self.lost(worker, loss);
    }

    /// A worker has ended, or could not be made.
    fn lost(&mut self, worker: u32, mut loss: Loss) {
        match self.relay.exited(worker, !self.ending, self.now()) {
            Ending::Stopped { timed_out } => {
                let message = ToHead::WorkerStopped { worker, timed_out };
                match timed_out {
                    true => self.tell_last(&message),
                    false => self.tell(&message),
                }
            }
            Ending::Replace => self.to_make.push_back((worker, true)),
            Ending::Waits => {}
            Ending::Lost { replaced, setback } => {
                loss.memory_available =
                    platform::memory::host_memory().map_or(0, |memory| memory.1);
                loss.setback = setback;
                self.tell(&ToHead::WorkerLost {
                    worker,
                    loss,
                    replaced,
                });
                if replaced {
                    self.to_make.push_back((worker, true));
                }
            }
        }
    }
}

/// Whether the system has not enough of something for bytes, or descriptors, to be on their way.
fn is_want(error: &io::Error) -> bool {
    let wants = [libc::ETOOMANYREFS, libc::ENOMEM, libc::ENOBUFS];
    error
        .raw_os_error()
        .is_some_and(|code| wants.contains(&code))
}

/// More than this is not read from a worker while a frame of it waits.
const HEADER_AND_BODY: usize = frame::HEADER_LEN + MAX_BODY;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_handover_is_refused_before_stdin_is_taken() {
        for text in ["", "0", "zz", "ff", "é", "00000000"] {
            assert!(Greeted::resume(text).is_err(), "{text}");
        }
    }
}
