//! The agent: one process per host that starts workers, routes messages between them and the head,
//! and ensures that nothing outlives the cluster.
//!
//! The agent runs one thread with one mio loop, and no R code meanwhile. It never blocks on a peer.
//! When the head asks for the end, or its stream ends for whatever reason, the agent ends every
//! worker and then itself.
//!
//! Readiness is edge-triggered: the system does not announce bytes again that are left in a stream.
//! A stream is therefore read until the system says `WouldBlock`, or is recorded as unread. A short
//! read does not mean that the stream is empty: `recvmsg` stops behind bytes that carry a
//! descriptor.

pub mod action;
mod blob_memory;
pub mod blobs;
pub mod dial;
mod dump;
mod fork;
mod guard;
mod head_io;
pub mod linger;
mod orphans;
pub mod prefetch;
mod process;
pub mod router;
pub mod setup_log;
pub mod startup;
mod supervisor;
mod usage;
pub mod warnings;
mod worker_io;
pub mod worker_table;

use crate::platform::memory::OutOfMemory;
use crate::platform::{self, fd, limits, reserve, signals};
use crate::protocol::control::{Hello, Outfile, Start, ToHead};
use crate::protocol::frame::{FIRST, Header, Kind, LAST};
use crate::protocol::heartbeat::Heartbeat;
use crate::protocol::limits::SEND_WINDOW;
use crate::worker::channel::Channel;
use action::Act;
use blob_memory::{BlobMemory, Memories};
use bytes::BytesMut;
pub use guard::Guard;
use linger::kept::{ArrivingAnswer, KeptAnswers};
use linger::{FIRST_DIALER, Lingering, Link};
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use orphans::Orphans;
use process::{Outgoing, Process, Tail};
use router::Router;
use startup::{Greeted, open_outfile};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use tracing::{debug, error, info, trace, warn};
use usage::UsageSurvey;
use warnings::Warnings;
use worker_table::REPLAY;

const HEAD_IN: Token = Token(0);
const HEAD_OUT: Token = Token(1);
const SIGNALS: Token = Token(2);
const PARENT: Token = Token(3);
const LISTENER: Token = Token(4);
const REDIAL: Token = Token(5);
const FIRST_WORKER: usize = 6;

/// While this many bytes wait for the head, the agent reads nothing more from workers.
const HEAD_BACKLOG: usize = 4 * 1024 * 1024;
/// Bytes that may wait for a worker: the head's send window, and what the agent itself sends, for
/// which the head may have granted credit.
const WORKER_BACKLOG: usize = 2 * SEND_WINDOW;
/// Bytes read at a time.
const AGENT_READ: usize = 256 * 1024;
/// Consecutive reads of one stream before the others have their turn.
const AGENT_READS: usize = 4;
/// Maximum number of descriptors from a worker that wait for the frames that they belong to.
const MAX_WORKER_DESCRIPTORS: usize = 4;
/// Pause before a retry when the system is out of resources.
const WAIT: Duration = Duration::from_millis(10);
/// How often the agent checks whether its parent, the head, is alive, where the system cannot
/// report it.
const PARENT_CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// How long the agent sleeps at most before it compares the end of its job with the system's clock, which may be set.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// How long the agent polls for events before it sleeps: about as long as a short task and its
/// messages take.
const AGENT_SPIN_TIME: Duration = Duration::from_micros(100);

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
    /// The system is out of resources for the head's stream: writing is retried soon.
    head_waits: bool,
    /// The head has disconnected or has asked for the end.
    ending: bool,
    /// The head has disconnected, or the agent has failed.
    disconnected: bool,
    start: Start,
    outfile: Option<File>,
    router: Router,
    /// The memory of the blobs.
    memories: Memories,
    /// The router's pending actions; empty except while a message is processed.
    acts: Vec<Act>,
    workers: Vec<Option<Process>>,
    /// Workers that are to be started; `true` for a replacement.
    to_make: VecDeque<(u32, bool)>,
    /// Workers with bytes waiting to be written.
    dirty: Vec<u32>,
    /// The head's stream may contain more than the last read took.
    head_unread: bool,
    /// Workers whose streams may contain more than the last read took, each once.
    unread: Vec<u32>,
    is_unread: Vec<bool>,
    signals: UnixStream,
    asked_to_end: Arc<AtomicBool>,
    /// The heartbeat of a head on another machine.
    heartbeat: Option<Heartbeat>,
    /// Becomes readable when the process of a head on this machine ends.
    parent: Option<OwnedFd>,
    /// The pid of the head, if it is this process's parent and has to be checked periodically.
    looked_for: Option<u32>,
    saved: signals::Saved,
    link: Link,
    /// How the agent waits for another head, if it does.
    lingering: Option<Lingering>,
    /// The answers to tasks of heads that have disconnected, and those that are arriving, by worker.
    kept: KeptAnswers,
    arriving: Vec<ArrivingAnswer>,
    hello: Hello,
    head_pid: u32,
    guard: Guard,
    /// Temporary directories of ended workers that could not be removed.
    unremoved: Vec<String>,
    orphans: Orphans,
    /// The memory survey that the head has asked for.
    usage_survey: Option<UsageSurvey>,
    warnings: Warnings,
    memory: OutOfMemory,
    epoch: Instant,
    /// The average time that the agent has lately waited for events.
    average_wait: Duration,
    scratch: Vec<u8>,
}

impl Agent {
    fn new(mut greeted: Greeted) -> io::Result<Agent> {
        let shared_answers = greeted.shared_answers();
        info!(
            workers = greeted.start.workers,
            mode = ?greeted.start.mode,
            head_pid = greeted.head_pid,
            shared_answers,
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
        let lingers = greeted.start.linger.is_some();
        let ends: &[libc::c_int] = match (greeted.warnings.are_caught(), lingers) {
            // The head ends an agent whose job is about to end, once its tasks have ended.
            (true, _) => &[libc::SIGHUP],
            (false, false) => &[libc::SIGTERM, libc::SIGHUP],
            (false, true) => &[libc::SIGTERM],
        };
        if lingers {
            // The session that the agent was started from may end.
            signals::ignore(&[libc::SIGHUP]);
        }
        for &signal in ends {
            signal_hook::flag::register(signal, asked_to_end.clone())?;
        }
        // After the flags: who is woken by the pipe finds them set.
        for &signal in ends.iter().chain(&[libc::SIGCHLD]) {
            signal_hook::low_level::pipe::register(signal, signals_out.try_clone()?)?;
        }
        greeted.warnings.wake_by(&signals_out)?;
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
        let heartbeat_timeout = Duration::from_millis(greeted.start.heartbeat_timeout.into());
        let setup = Duration::from_millis(greeted.start.setup);
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut router = Router::new(
            count as usize,
            bytes(greeted.start.chunk_cache_bytes),
            bytes(greeted.start.state),
        );
        router.worker_table.shared_answers = shared_answers;
        router.worker_table.stop_timeout = Duration::from_millis(greeted.start.stop_timeout);
        router.worker_table.restore_timeout = (!setup.is_zero()).then_some(setup);
        let kept = KeptAnswers::new(bytes(greeted.start.state));
        let linger = greeted.start.linger.as_ref();
        let lingering = linger
            .map(|linger| Lingering::start(linger, poll.registry()))
            .transpose();
        let lingering = match lingering {
            Ok(lingering) => lingering,
            Err(error) => {
                let reason = error.to_string();
                let _ = greeted.report(&ToHead::StartFailed { reason });
                return Err(error);
            }
        };
        let mut guard = greeted.guard;
        if let Some(lingering) = &lingering {
            guard.watch_socket(&lingering.directory().to_string_lossy());
        }
        let mut agent = Agent {
            heartbeat: (!heartbeat_timeout.is_zero())
                .then(|| Heartbeat::new(heartbeat_timeout, Duration::ZERO)),
            poll,
            reader: greeted.reader,
            writer: greeted.writer,
            received: greeted.received,
            to_head: Outgoing::default(),
            head_blocked: false,
            head_waits: false,
            ending: false,
            disconnected: false,
            outfile,
            router,
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
            parent,
            looked_for: unwatched.then_some(greeted.head_pid),
            saved,
            guard,
            link: Link::Up,
            lingering,
            kept,
            arriving: (0..count).map(|_| ArrivingAnswer::default()).collect(),
            hello: greeted.hello,
            head_pid: greeted.head_pid,
            unremoved: Vec::new(),
            orphans: Orphans::adopt(),
            usage_survey: None,
            warnings: greeted.warnings,
            memory: OutOfMemory::start_counting(),
            epoch: Instant::now(),
            average_wait: Duration::ZERO,
            scratch: vec![0; AGENT_READ],
        };
        // The parent of an agent that may outlive its head is its shim.
        if agent.lingering.is_some() && agent.start.local {
            agent.watch_head();
        }
        Ok(agent)
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

    /// Waits for events, up to `timeout`. The agent polls for a while before it sleeps if events
    /// have lately come faster than a sleep and a wake-up take, and at most one worker is busy,
    /// from which polling could take a core. It yields its core after every poll.
    fn wait(&mut self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        events.clear();
        if timeout == Some(Duration::ZERO) {
            return self.poll.poll(events, timeout);
        }
        let began = Instant::now();
        let max_spin = timeout.map_or(AGENT_SPIN_TIME, |timeout| timeout.min(AGENT_SPIN_TIME));
        if self.average_wait <= max_spin && self.router.worker_table.at_most_one_is_busy() {
            while began.elapsed() < max_spin {
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
        // The average is bounded, so that after a pause a few short waits are enough to return to
        // polling.
        self.average_wait =
            ((3 * self.average_wait + began.elapsed()) / 4).min(4 * AGENT_SPIN_TIME);
        Ok(())
    }

    /// Runs until the cluster has ended, or, in a forked worker, until the worker has been forked.
    ///
    /// # Errors
    /// When a system call fails irrecoverably. The workers then end with the agent.
    pub fn run(&mut self) -> io::Result<Role> {
        let mut events = Events::with_capacity(1024);
        // Bytes that came together with the greeting.
        self.on_head_bytes();
        // The signal may have arrived before the agent could see it.
        self.check_warnings();
        loop {
            if let Some(channel) = self.make_some()? {
                return Ok(Role::Worker(Box::new(channel)));
            }
            let can_read =
                self.head_unread || !self.unread.is_empty() && self.to_head.len() < HEAD_BACKLOG;
            let timeout = if self.to_make.is_empty() && !can_read && self.usage_survey.is_none() {
                let heartbeat = self.heartbeat.as_ref().filter(|_| !self.disconnected);
                let shutdown_drain = self.orphans.deadline();
                let deadline = if self.to_head.len() < HEAD_BACKLOG {
                    self.router.worker_table.next_deadline()
                } else {
                    self.router.worker_table.next_end()
                };
                let again = self.head_waits.then(|| self.now() + WAIT);
                let parent = self.looked_for.filter(|_| !self.disconnected);
                let check_parent = parent.map(|_| self.now() + PARENT_CHECK_INTERVAL);
                let restart = self
                    .router
                    .worker_table
                    .next_restart()
                    .filter(|_| !self.ending);
                let warning = self.warnings.due_in(SystemTime::now());
                let deadlines = [
                    self.next_link_check(),
                    warning.map(|left| self.now() + left.min(LONGEST_SLEEP)),
                    deadline,
                    heartbeat.map(Heartbeat::next),
                    shutdown_drain,
                    again,
                    check_parent,
                    restart,
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
            // Output goes first: what a worker printed before its answer belongs to the answered
            // task.
            for Token(token) in events.iter().map(Event::token) {
                if (FIRST_WORKER..FIRST_DIALER).contains(&token) && (token - FIRST_WORKER) % 2 == 1
                {
                    self.read_output(((token - FIRST_WORKER) / 2) as u32);
                }
            }
            let mut ended = false;
            for event in &events {
                match event.token() {
                    HEAD_IN => self.head_unread = true,
                    HEAD_OUT => self.head_is_writable()?,
                    SIGNALS => ended = true,
                    PARENT => self.disconnect(),
                    LISTENER => {
                        let now = self.now();
                        let mut superseded = false;
                        if let Some(lingering) = &mut self.lingering {
                            lingering.accept(self.poll.registry(), now);
                            superseded = lingering.is_superseded();
                        }
                        if superseded {
                            info!("another agent of this host has taken over");
                            self.end();
                        }
                    }
                    REDIAL => self.read_redial(),
                    Token(token) if token >= FIRST_DIALER => {
                        self.read_dialer(token - FIRST_DIALER);
                    }
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
                self.disconnect();
            }
            if reserve::was_used() {
                let limits = limits::memory_limits();
                self.fail(&format!("the agent has no memory left{limits}"));
            }
            self.check_warnings();
            self.check_heartbeat();
            self.check_link();
            // While the head does not read, a task may have been answered in time and its answer
            // not have been processed.
            let now = self.now();
            let mut overdue = self.router.worker_table.overdue(now);
            if self.to_head.len() < HEAD_BACKLOG {
                self.router.out_of_time(now, &mut self.acts);
                self.act();
                overdue.extend(self.router.worker_table.stalled(now));
            }
            let any_overdue = !overdue.is_empty();
            for worker in overdue {
                if let Some(process) = &self.workers[worker as usize] {
                    let rank = self.number(worker);
                    warn!(rank, pid = process.pid, "worker out of time, killed");
                    process.kill();
                }
            }
            // Code in a worker may have shut down the socket of signals, which a fork shares with
            // its agent: then ends of workers are not reported, so they are polled.
            if any_overdue {
                self.on_signals();
            }
            if !self.ending {
                let due = self.router.worker_table.to_restart(now);
                self.to_make
                    .extend(due.into_iter().map(|worker| (worker, true)));
            }
            for worker in std::mem::take(&mut self.dirty) {
                self.write_worker(worker);
            }
            self.count_memory();
            self.write_head();
            let over =
                self.ending && self.to_make.is_empty() && self.router.worker_table.all_terminated();
            if over && self.is_drained() {
                self.remove_again();
                return Ok(Role::Done);
            }
        }
    }

    /// Reads the memory use of the next worker. Each takes a while if the worker is large, so other
    /// work goes on in between.
    fn count_memory(&mut self) {
        if self.ending {
            self.usage_survey = None;
        }
        let workers = &self.workers;
        let pid = |worker: u32| Some(workers.get(worker as usize)?.as_ref()?.pid);
        let due = self
            .usage_survey
            .as_mut()
            .and_then(|usage_survey| usage_survey.next(pid));
        if let Some(message) = due {
            if let ToHead::Usage { last: true, .. } = &message {
                self.usage_survey = None;
            }
            self.report(&message);
        }
    }

    /// Executes the pending actions.
    fn act(&mut self) {
        let mut acts = std::mem::take(&mut self.acts);
        for act in acts.drain(..) {
            match act {
                Act::ToHead(frame) if !self.ending && self.is_linked() => {
                    self.log_frame("to head", &frame.header);
                    self.to_head.push(&frame, None);
                }
                Act::ToHead(_) => {}
                Act::Keep(frame) => self.keep(frame),
                Act::Along(frame) => self.pass_memory(&frame),
                Act::LetGo(worker) => {
                    if let Some(process) = &mut self.workers[worker as usize] {
                        process.descriptors.pop_front();
                    }
                }
                Act::Report(mut message) => {
                    match &mut message {
                        ToHead::TimedOut { worker, output, .. } => {
                            self.read_output(*worker);
                            if let Some(process) = &self.workers[*worker as usize] {
                                *output = process.tail.text();
                            }
                        }
                        ToHead::TaskFailed { worker, output, .. } => {
                            self.read_output(*worker);
                            if let Some(process) = &mut self.workers[*worker as usize] {
                                *output = process.tail.take_fresh();
                            }
                        }
                        _ => {}
                    }
                    self.report(&message);
                }
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
                        // Output until now belongs to the task before, which has ended.
                        if let Some(process) = &mut self.workers[worker as usize] {
                            process.tail = Tail::default();
                            // A pending interrupt was meant for the task before, too.
                            process.interrupt = false;
                        }
                    }
                    self.send_worker(worker, &frame, None);
                    // The agent's own set-up log restores a replacement: a mistake there is not the
                    // head's.
                    let of_head = kind == Kind::Data && task & REPLAY == 0;
                    if of_head && !self.has_room(worker) {
                        eprintln!(
                            "rustcluster agent: more for worker {worker} than it has room for"
                        );
                        self.end();
                    }
                }
                Act::Store { blob, bytes, last } => {
                    let stored = self.memories.store(blob, bytes, last);
                    if let Err(error) = stored {
                        self.fail(&format!("no memory for what workers share: {error}"));
                    }
                }
                Act::Hand { frame } => {
                    // The blob is stored, or this host is about to fail for lack of memory.
                    match self.memories.get(frame.header.task) {
                        Some(BlobMemory::Shared(file)) => {
                            let file = Some(file.clone());
                            self.send_worker(frame.header.worker, &frame, file);
                        }
                        Some(BlobMemory::Private(chunks)) => {
                            let chunks = chunks.clone();
                            self.send_blob(&frame.header, frame.wire_len(), &chunks);
                        }
                        None => {}
                    }
                }
                Act::Discard(blob) => self.memories.discard(blob),
                Act::Up { worker, replaces } => self.report_up(worker, replaces),
                Act::Interrupt { worker, task } => {
                    debug!(rank = self.number(worker), task, "worker interrupted");
                    self.interrupt(worker, task);
                }
                Act::ReadAgain(worker) => self.read_again(worker),
                Act::Close(worker) => {
                    debug!(rank = self.number(worker), "worker asked to stop");
                    self.close(worker);
                }
                Act::TempDir(worker, tempdir) => {
                    if let Some(process) = &mut self.workers[worker as usize] {
                        self.orphans.ready(worker, process.pid, &tempdir);
                        process.tempdir = Some(tempdir).filter(|path| process::is_tempdir(path));
                        let tempdir = process.tempdir.as_deref().unwrap_or_default();
                        self.guard.has_tempdir(worker, process.pid, tempdir);
                    }
                }
                Act::Usage { question } => {
                    self.usage_survey = Some(UsageSurvey::new(question, self.workers.len() as u32));
                }
                Act::Dump { question } => self.dump(question),
                Act::SendCall { request, call } => self.send_call(request, call),
                Act::ListKept => self.list_kept(),
                Act::SendKept { number, request } => {
                    let answer = self.kept.read(number);
                    self.send_parts(request, answer);
                }
                Act::DropKept(number) => self.kept.drop_answer(number),
                Act::End => self.stop(),
            }
        }
        // The buffer is reused.
        self.acts = acts;
    }

    /// Reports to the head why this host fails, and ends.
    fn fail(&mut self, reason: &str) {
        let reason = reason.to_owned();
        error!(reason, "agent cannot go on");
        self.report(&ToHead::Failed { reason });
        self.end();
    }

    /// Ends all workers within the promised second, because the head has disconnected or the agent
    /// has failed.
    fn end(&mut self) {
        self.stop();
        if !std::mem::replace(&mut self.disconnected, true) {
            self.router.worker_table.hurry(self.now());
        }
    }

    /// Ends all workers, and with them the agent. Idle workers have time to run exit handlers.
    fn stop(&mut self) {
        if std::mem::replace(&mut self.ending, true) {
            return;
        }
        info!("agent ends");
        let now = self.now();
        for worker in 0..self.workers.len() as u32 {
            if self.workers[worker as usize].is_some() {
                self.router.stop(worker, now, &mut self.acts);
            }
        }
        self.act();
    }
}

/// Whether an error means that the system is out of buffers or descriptors for messages.
fn is_out_of_resources(error: &io::Error) -> bool {
    let wants = [libc::ETOOMANYREFS, libc::ENOMEM, libc::ENOBUFS];
    error
        .raw_os_error()
        .is_some_and(|code| wants.contains(&code))
}
