//! The agent: one process a host that makes workers, relays between them and the head, and sees
//! to it that nothing outlives the cluster.
//!
//! One thread, one mio loop, no R while it runs. It never blocks on a peer. When the head asks
//! for the end, or its stream ends for whatever reason, every worker is ended and then the agent.
//!
//! Readiness is edge-triggered: what is left in a stream is not announced again. A stream is
//! therefore read until the system says `WouldBlock`, or is noted to be read again. A short read
//! does not mean that the stream is empty: `recvmsg` stops behind bytes that carry a descriptor.

pub mod action;
mod blob_memory;
pub mod blobs;
mod dump;
mod fork;
mod guard;
mod head_io;
mod memory_report;
mod orphans;
pub mod prefetch;
mod process;
pub mod router;
pub mod setup_log;
pub mod startup;
mod supervisor;
mod worker_io;
pub mod worker_table;

use crate::platform::memory::OutOfMemory;
use crate::platform::{self, fd, limits, reserve, signals};
use crate::protocol::control::{Outfile, Start, ToHead};
use crate::protocol::frame::{FIRST, Header, Kind, LAST};
use crate::protocol::heartbeat::Pulse;
use crate::protocol::limits::SEND_WINDOW;
use crate::worker::channel::Channel;
use action::Act;
use blob_memory::{Memories, Memory};
use bytes::BytesMut;
pub use guard::Guard;
use memory_report::Census;
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use orphans::Strays;
use process::{Outgoing, Process, Tail};
use router::Relay;
use startup::{Greeted, open_outfile};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};
use tracing::{debug, error, info, trace, warn};
use worker_table::REPLAY;

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

/// Signals whose handling the agent changes, and that its forks get back as they were.
const CHANGED: [libc::c_int; 6] = [
    libc::SIGXFSZ,
    libc::SIGCHLD,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGPIPE,
    libc::SIGINT,
];

/// How [`Agent::run`] ends.
pub enum Role {
    /// This process is a forked worker.
    Worker(Box<Channel>),
    /// The cluster is over, and all workers have ended.
    Done,
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

impl Agent {
    fn new(greeted: Greeted) -> io::Result<Agent> {
        let shares = greeted.shares();
        info!(
            workers = greeted.start.workers,
            mode = ?greeted.start.mode,
            head_pid = greeted.head_pid,
            shares,
            "agent starts its workers"
        );
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
        let setup = Duration::from_millis(greeted.start.setup);
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut relay = Relay::new(
            count as usize,
            bytes(greeted.start.keep),
            bytes(greeted.start.state),
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

    /// The rank of a worker as R counts it.
    fn number(&self, worker: u32) -> u64 {
        u64::from(self.start.rank(worker)) + 1
    }

    /// The first and the last frame of a message are worth more than those in between.
    fn log_frame(&self, what: &'static str, header: &Header) {
        let Header {
            worker,
            kind,
            flags,
            task,
            len,
            ..
        } = *header;
        match kind == Kind::Data && flags & LAST != 0 {
            true => debug!(
                task,
                rank = self.number(worker),
                flags,
                bytes = len,
                "message {what}"
            ),
            false => trace!(
                task,
                rank = self.number(worker),
                ?kind,
                flags,
                bytes = len,
                "frame {what}"
            ),
        }
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
                    let rank = self.number(worker);
                    warn!(rank, pid = process.pid, "worker out of time, killed");
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

    /// Does what was decided.
    fn act(&mut self) {
        let mut acts = std::mem::take(&mut self.acts);
        for act in acts.drain(..) {
            match act {
                Act::ToHead(frame) if !self.ending => {
                    self.log_frame("to head", &frame.header);
                    self.to_head.push(&frame, None);
                }
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
                    self.log_frame("to worker", &frame.header);
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
                Act::Interrupt { worker, task } => {
                    debug!(rank = self.number(worker), task, "worker interrupted");
                    self.interrupt(worker, task);
                }
                Act::ReadAgain(worker) => self.read_again(worker),
                Act::Close(worker) => {
                    debug!(rank = self.number(worker), "worker told to end");
                    self.close(worker);
                }
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
                Act::Dump { question } => self.dump(question),
                Act::End => self.stop(),
            }
        }
        // Its room serves again.
        self.acts = acts;
    }

    /// Tells the head why this host cannot go on, and ends.
    fn fail(&mut self, reason: &str) {
        let reason = reason.to_owned();
        error!(reason, "agent cannot go on");
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
        info!("agent ends");
        let now = self.now();
        for worker in 0..self.workers.len() as u32 {
            if self.workers[worker as usize].is_some() {
                self.relay.stop(worker, now, &mut self.acts);
            }
        }
        self.act();
    }
}

/// Whether the system has not enough of something for bytes, or descriptors, to be on their way.
fn is_want(error: &io::Error) -> bool {
    let wants = [libc::ETOOMANYREFS, libc::ENOMEM, libc::ENOBUFS];
    error
        .raw_os_error()
        .is_some_and(|code| wants.contains(&code))
}
