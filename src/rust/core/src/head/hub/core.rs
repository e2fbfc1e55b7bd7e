//! The state that R's thread and the hub's thread share: one [`Core`] under a lock, and a way to
//! wake each other.
//!
//! Either thread reads and writes the agents' streams, without blocking and with the lock held.
//! While R waits, its thread reads the streams itself, because an answer that passes through
//! another thread takes twice as long. Once R has been busy with something else for a [`TICK`], the
//! hub's thread reads. The lock is never held while R code runs, across an allocation by R, or
//! while a thread sleeps.

use super::connection::Conn;
use super::inbox::{HostFailure, Inbox};
use super::kept::{FIRST_KEPT, KeptQuestion};
use super::missed::Missed;
use super::readiness::Readiness;
use super::recent::Recent;
use super::restore_queue::RestoreQueue;
use super::take_over::TakeOver;
use crate::head::activity::Measure;
use crate::head::dashboard::board::Board;
use crate::head::dashboard::server::Order;
use crate::head::dial_back::DialBack;
use crate::head::launch::Launch;
use crate::head::scheduler::Scheduler;
use crate::head::scheduler::events::{Demand, Note, Outcome, RankSet};
use crate::head::setup_log_file::SetupLogFile;
use crate::platform::{fd, limits, memfd, reserve};
use crate::protocol::body::Memory;
use crate::protocol::control::{Facts, Start, ToAgent};
use crate::protocol::frame::{self, BY_REFERENCE, Frame, Header, Kind, LAST};
use crate::protocol::ids::Rank;
use crate::protocol::send_queue::OutBuf;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tracing::{debug, trace};

/// Bytes put together for one write.
const WRITE: usize = 256 * 1024;
/// Bytes read at a time.
const HUB_READ: usize = 256 * 1024;

/// How long R may leave the streams unread before the hub's thread reads them (at most twice as
/// long).
pub const TICK: Duration = Duration::from_millis(2);

/// How long R's thread spins before it sleeps when it waits for an answer: about as long as a round
/// trip if no thread on it sleeps. Longer spinning would take a core from workers on this machine.
pub const SPIN_TIME: Duration = Duration::from_micros(100);

/// How long R's thread spins if it waits for a single task: there are no other workers to take a
/// core from.
pub const SPIN_TIME_SINGLE: Duration = Duration::from_millis(1);

/// The thread that reads the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StreamReader {
    Hub,
    R,
}

/// The system drops descriptors beyond the limit of open files.
const NO_DESCRIPTOR: &str = "a result whose memory cannot be opened here: too many files are open";

/// The shared memory of a descriptor, if it has this many bytes and nobody can change or truncate
/// it any more.
fn memory_of(descriptor: OwnedFd, len: u64) -> Option<Memory> {
    let file = File::from(descriptor);
    let there = file.metadata().ok()?.len();
    let fits = there == len && memfd::is_sealed(&file);
    let len = usize::try_from(len).ok().filter(|_| fits)?;
    Some(Memory::new(len, Some(Arc::new(file))))
}

/// The state that the creator of a hub controls by hand.
#[derive(Debug, Default)]
pub struct Hand {
    pub now: Duration,
    /// The notes of the scheduler, for the creator to inspect.
    pub notes: Vec<Note>,
    /// Which agents have greeted and not ended.
    pub attached: Vec<bool>,
    /// Receives the hosts that are added.
    pub _launched: Option<UnboundedReceiver<(usize, Launch)>>,
}

/// See the module's documentation.
pub struct Core {
    pub scheduler: Scheduler,
    pub conns: Vec<Conn>,
    pub inbox: Inbox,
    /// The head's set-up log, if hosts may join late or be reconnected.
    pub setup_log: Option<SetupLogFile>,
    /// The set-up log is being filled from the logs of agents that have had another head.
    pub take_over: Option<TakeOver>,
    /// The question for answers that agents have kept.
    pub kept: KeptQuestion,
    /// Agents have been asked for set-up calls, which may be on their way.
    pub took_over: bool,
    /// The hosts whose agents the next head must not use.
    pub missed: Missed,
    /// The file of random number states, of a cluster that lingers.
    pub seeds: Option<File>,
    /// The take-over has begun, or is not to begin. Lost hosts come back after it.
    pub began_take_over: bool,
    /// Lost hosts are reconnected.
    pub reconnects: bool,
    /// Hosts come and go: jobs without an assignment use the workers that are there.
    pub is_elastic: bool,
    pub restoring: RestoreQueue,
    /// Sends the hosts that are added to the hub's thread.
    pub launches: Option<UnboundedSender<(usize, Launch)>>,
    /// The agents that dial back.
    pub dial_back: DialBack,
    /// The recent events, for bug reports.
    pub recent: Recent,
    /// What is recorded for pages of the dashboard.
    pub board: Board,
    /// Sends orders to the server of the dashboard.
    pub orders: Option<UnboundedSender<Order>>,
    /// How long a reconnected host may take to start.
    pub start_timeout: Duration,
    /// Maximum number of bytes of results to buffer.
    limit: usize,
    /// Bytes of tasks submitted and not yet sent.
    pub queued: usize,
    /// The cluster is being stopped.
    pub stopping: bool,
    /// The agents wait for another head when this one ends.
    pub lingers: bool,
    /// The session has left the agents to another head.
    pub left: bool,
    /// Registers the streams that the hub's thread serves.
    registry: Registry,
    reader: StreamReader,
    /// R's thread is waiting.
    waiting: bool,
    /// When `waiting` last changed.
    since: Instant,
    /// The hub's thread checks every [`TICK`] whether it has to read.
    ticking: bool,
    /// R's thread sleeps and must be woken by the next change.
    asleep: bool,
    /// Counts the changes of the inbox and of `queued`.
    changes: u64,
    /// The average time that R has lately waited for answers.
    average_wait: Duration,
    /// The start of the cluster, from which times are counted.
    pub began: Instant,
    pub measure: Measure,
    /// The time limit of all tasks.
    pub time_limit: Option<Duration>,
    wake: UnixStream,
    /// The connection on which R code waits that can only wait for sockets.
    pub readiness: Option<Readiness>,
    scratch: Vec<u8>,
    /// In tests: frames and the clock are moved by hand.
    pub hand: Option<Hand>,
}

/// See the module's documentation.
pub struct SharedCore {
    core: Mutex<Core>,
    woken: UnixStream,
    /// R has started to read, and the hub's thread must check when R stops.
    pub taken_over: Notify,
    /// `stopping` was set.
    pub stopped: Notify,
    /// The rules have changed by which hosts are given back.
    pub adapts: Notify,
}

impl SharedCore {
    pub fn new(hosts: usize, limit: usize, registry: Registry) -> io::Result<SharedCore> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        Ok(SharedCore {
            core: Mutex::new(Core {
                scheduler: Scheduler::new(vec![Vec::new(); hosts], limit),
                limit,
                conns: (0..hosts).map(|_| Conn::default()).collect(),
                inbox: Inbox::new(hosts),
                setup_log: None,
                missed: Missed::default(),
                seeds: None,
                take_over: None,
                kept: KeptQuestion::default(),
                took_over: false,
                began_take_over: false,
                reconnects: false,
                is_elastic: false,
                restoring: RestoreQueue::default(),
                launches: None,
                dial_back: DialBack::default(),
                recent: Recent::default(),
                board: Board::default(),
                orders: None,
                start_timeout: Duration::MAX,
                queued: 0,
                stopping: false,
                lingers: false,
                left: false,
                registry,
                reader: StreamReader::Hub,
                waiting: false,
                since: Instant::now(),
                ticking: false,
                asleep: false,
                changes: 0,
                average_wait: Duration::ZERO,
                began: Instant::now(),
                measure: |_| None,
                time_limit: None,
                wake,
                readiness: None,
                scratch: vec![0; HUB_READ],
                hand: None,
            }),
            woken,
            taken_over: Notify::new(),
            stopped: Notify::new(),
            adapts: Notify::new(),
        })
    }

    pub fn core(&self) -> MutexGuard<'_, Core> {
        // Only the hub's thread can have panicked with the lock held: it closes the inbox then.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// R's thread waits until `poll` finds something, for up to `max_wait` or until a signal
    /// arrives. `poll` runs first and after every change.
    pub fn wait<T>(
        &self,
        max_wait: Duration,
        poll: impl FnMut(&mut Core) -> Option<T>,
    ) -> Option<T> {
        self.wait_spinning(max_wait, SPIN_TIME, poll)
    }

    /// As [`SharedCore::wait`]. If answers have usually arrived within `spin`, in which time a
    /// sleep and a wake-up would take longer than the answer itself, R's thread spins for so long
    /// before it sleeps, and yields its core after every poll.
    pub fn wait_spinning<T>(
        &self,
        max_wait: Duration,
        spin: Duration,
        mut poll: impl FnMut(&mut Core) -> Option<T>,
    ) -> Option<T> {
        let mut core = self.core();
        let mut found = poll(&mut core);
        if found.is_some() {
            return found;
        }
        let began = Instant::now();
        let mut seen = core.changes;
        core.begin_reading(began, &self.taken_over);
        let is_usual = core.average_wait <= spin;
        let mut waited = Duration::ZERO;
        let mut interrupted = false;
        loop {
            if core.changes != seen {
                seen = core.changes;
                found = poll(&mut core);
            }
            if found.is_some() || waited >= max_wait || interrupted {
                break;
            }
            if is_usual && waited < spin {
                drop(core);
                thread::yield_now();
                core = self.core();
            } else {
                core.asleep = true;
                let streams = core.streams();
                drop(core);
                interrupted = self.sleep(&streams, max_wait.saturating_sub(waited));
                core = self.core();
                core.asleep = false;
            }
            core.read_all();
            waited = began.elapsed();
        }
        core.average_wait = (3 * core.average_wait + waited) / 4;
        core.end_reading(began + waited);
        found
    }

    /// Sleeps until a stream can be read, the other thread changes something, or a signal arrives.
    /// Returns whether a signal arrived: R then handles it at once.
    fn sleep(&self, streams: &[Arc<UnixStream>], max_wait: Duration) -> bool {
        let interrupted = poll(&[(self, streams)], max_wait);
        self.drain();
        interrupted
    }

    /// Drains the socket that wakes R's thread.
    fn drain(&self) {
        let mut buffer = [0u8; 64];
        let _ = (&self.woken).read(&mut buffer);
    }

    /// R's thread sleeps for up to `max_wait`, until any of these hubs has changed since the given
    /// count of changes, a stream can be read, or a signal arrives.
    pub fn sleep_until_any(hubs: &[(&SharedCore, &(u64, RankSet))], max_wait: Duration) {
        let mut sleeping = Vec::with_capacity(hubs.len());
        let mut changed = false;
        for &(shared_core, (seen, workers)) in hubs {
            let mut core = shared_core.core();
            core.scheduler.demand(Demand::AnyOf(workers.clone()));
            core.pump();
            core.begin_reading(Instant::now(), &shared_core.taken_over);
            changed |= core.changes != *seen;
            core.asleep = true;
            sleeping.push((shared_core, core.streams()));
        }
        if !changed {
            let polled: Vec<_> = sleeping.iter().map(|(hub, fds)| (*hub, &fds[..])).collect();
            poll(&polled, max_wait);
        }
        for (shared_core, _) in sleeping {
            shared_core.drain();
            let mut core = shared_core.core();
            core.asleep = false;
            core.read_all();
            core.scheduler.demand(Demand::Nothing);
            core.end_reading(Instant::now());
        }
    }

    /// Runs in the hub's thread every [`TICK`] while R waits or has just waited. Returns whether to
    /// go on ticking.
    pub fn tick(&self) -> bool {
        let mut core = self.core();
        if core.since.elapsed() < TICK {
            return true;
        }
        core.ticking = false;
        if !core.waiting {
            core.set_reader(StreamReader::Hub);
        }
        // If R waits for longer, it hands over reading itself at the end.
        false
    }
}

/// Sleeps until a stream of one of the hubs can be read, a hub wakes R's thread, or a signal
/// arrives. Returns whether a signal arrived.
fn poll(hubs: &[(&SharedCore, &[Arc<UnixStream>])], max_wait: Duration) -> bool {
    let fds = hubs.iter().flat_map(|(shared_core, streams)| {
        let streams = streams.iter().map(AsRawFd::as_raw_fd);
        streams.chain([shared_core.woken.as_raw_fd()])
    });
    let mut polled: Vec<libc::pollfd> = fds
        .map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let max_wait = libc::c_int::try_from(max_wait.as_millis() + 1).unwrap_or(libc::c_int::MAX);
    // SAFETY: as many valid pollfds as are announced, of descriptors that stay open.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, max_wait) };
    ready < 0
}

impl Core {
    /// Adds the facts about both threads to a bug report.
    pub fn facts(&self, facts: &mut Facts) {
        facts.add("stopping", self.stopping);
        facts.add_debug("reader", self.reader);
        facts.add("r_is_waiting", self.waiting);
        facts.add("queued_bytes", self.queued);
        facts.add_seconds("average_wait", self.average_wait);
    }

    /// The number of changes of the inbox and of `queued`.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    fn begin_reading(&mut self, now: Instant, taken_over: &Notify) {
        self.waiting = true;
        self.since = now;
        self.set_reader(StreamReader::R);
        if !self.ticking {
            self.ticking = true;
            taken_over.notify_one();
        }
        self.read_all();
    }

    fn end_reading(&mut self, now: Instant) {
        self.waiting = false;
        self.since = now;
        if !self.ticking {
            self.set_reader(StreamReader::Hub);
        }
    }

    fn set_reader(&mut self, reader: StreamReader) {
        if self.reader != reader {
            trace!(?reader, "another thread reads the streams");
            self.reader = reader;
            for agent in 0..self.conns.len() {
                self.update_interest(agent);
            }
        }
    }

    /// Registers what the hub's thread has to wait for on a stream.
    fn update_interest(&mut self, agent: usize) {
        let conn = &mut self.conns[agent];
        let reads = self.reader == StreamReader::Hub && conn.end.is_none();
        let wanted = match (reads, conn.blocked) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        };
        let Some(stream) = conn.stream.as_ref().filter(|_| conn.interest != wanted) else {
            return;
        };
        let fd = stream.as_raw_fd();
        let mut source = SourceFd(&fd);
        let token = Token(agent);
        let done = match (conn.interest, wanted) {
            (None, Some(interest)) => self.registry.register(&mut source, token, interest),
            (Some(_), Some(interest)) => self.registry.reregister(&mut source, token, interest),
            _ => self.registry.deregister(&mut source),
        };
        match done {
            Ok(()) => conn.interest = wanted,
            Err(error) => self.end(agent, Err(error)),
        }
    }

    /// Sets the workers of each agent. Nothing has been sent to any.
    pub fn set_ranks(&mut self, ranks: Vec<Vec<Rank>>) {
        self.inbox.set_workers(&ranks);
        let rules = self.scheduler.rules().to_vec();
        self.scheduler = Scheduler::new(ranks, self.limit);
        for rule in rules {
            self.scheduler.give_back_when(rule);
        }
        self.scheduler.measure_with(self.measure);
        self.scheduler.limit_time(self.time_limit);
        self.update_clock();
        for agent in 0..self.conns.len() {
            if let Some(failure) = &self.inbox.hosts[agent].failure {
                self.scheduler.agent_lost(agent, &failure.reason);
            }
        }
    }

    /// Sets what follows for a connection from the plan of its agent.
    pub fn set_plan(&mut self, agent: usize, start: &Start) {
        let conn = &mut self.conns[agent];
        conn.heartbeat_timeout = Duration::from_millis(start.heartbeat_timeout.into());
        conn.stop_timeout = Duration::from_millis(start.stop_timeout);
        if self.reconnects || conn.dials {
            self.is_elastic |= conn.dials;
            conn.plan = Some(start.clone());
        }
        self.lingers |= start.linger.is_some();
        if start.chunk_cache_bytes > 0 {
            let max_bytes = usize::try_from(start.chunk_cache_bytes).unwrap_or(usize::MAX);
            self.scheduler.set_chunk_cache(agent, max_bytes);
        }
    }

    /// Sets the time of events to now.
    pub fn update_clock(&mut self) {
        let now = self.hand.as_ref().map(|hand| hand.now);
        self.scheduler
            .at(now.unwrap_or_else(|| self.began.elapsed()));
    }

    /// Attaches the stream to an agent that has greeted, and the bytes that came with the greeting.
    pub fn attach(&mut self, agent: usize, stream: UnixStream, received: bytes::BytesMut) {
        let conn = &mut self.conns[agent];
        conn.stream = Some(Arc::new(stream));
        conn.received = received;
        self.inbox.hosts[agent].linked = true;
        self.update_interest(agent);
        self.on_bytes(agent);
        self.pump();
        // If R's thread sleeps, it does not know the stream yet.
        self.changed();
    }

    /// Whether an agent has greeted and its stream has not ended.
    pub fn is_attached(&self, agent: usize) -> bool {
        match &self.hand {
            Some(hand) => hand.attached.get(agent) == Some(&true),
            None => self.conns[agent].stream.is_some(),
        }
    }

    /// A lost host has been reconnected: its new agent has greeted.
    ///
    /// # Errors
    /// When the head does not know what the agent is to start.
    pub fn agent_back(&mut self, agent: usize) -> io::Result<()> {
        let conn = &mut self.conns[agent];
        let Some(start) = conn.plan.clone() else {
            return Err(io::Error::other("it was not part of the cluster"));
        };
        conn.end = None;
        conn.out = OutBuf::default();
        conn.descriptors.clear();
        conn.last_received = None;
        conn.interest = None;
        conn.awaited = false;
        conn.planned.notify_one();
        let back = self.scheduler.agent_back(agent, &ToAgent::Start(start));
        back.map_err(io::Error::other)
    }

    /// Closes the stream, for the agent and for all copies of the head's descriptor.
    pub fn detach(&mut self, agent: usize) -> io::Result<()> {
        let conn = &mut self.conns[agent];
        let end = conn.end.take().unwrap_or(Ok(()));
        conn.end = Some(Ok(()));
        conn.blocked = false;
        conn.out = OutBuf::default();
        conn.descriptors.clear();
        self.update_interest(agent);
        self.inbox.hosts[agent].linked = false;
        if let Some(stream) = self.conns[agent].stream.take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        end
    }

    /// Records that the stream has ended, by itself or because of invalid data.
    fn end(&mut self, agent: usize, result: io::Result<()>) {
        let conn = &mut self.conns[agent];
        if conn.end.is_none() {
            debug!(agent = agent + 1, ?result, "stream ended");
            conn.end = Some(result);
            conn.blocked = false;
            conn.over.notify_one();
            self.update_interest(agent);
        }
    }

    fn streams(&self) -> Vec<Arc<UnixStream>> {
        let open = self.conns.iter().filter(|conn| conn.end.is_none());
        open.filter_map(|conn| conn.stream.clone()).collect()
    }

    fn read_all(&mut self) {
        for agent in 0..self.conns.len() {
            self.read(agent);
        }
    }

    /// Reads what is available, up to [`HUB_READ`] bytes. Returns whether there may be more.
    pub fn read(&mut self, agent: usize) -> bool {
        let conn = &mut self.conns[agent];
        let Some(stream) = conn.stream.as_deref().filter(|_| conn.end.is_none()) else {
            return false;
        };
        if reserve::was_used() {
            // Buffered results of this host are dropped with it.
            let reason = format!(
                "this session has no memory left for it{}",
                limits::memory_limits()
            );
            self.end(agent, Err(io::Error::other(reason)));
            return false;
        }
        let mut came = Vec::new();
        match fd::recv(stream.as_raw_fd(), &mut self.scratch, &mut came, false) {
            Ok(0) => self.end(agent, Ok(())),
            Ok(n) => {
                if !conn.heartbeat_timeout.is_zero() {
                    conn.last_received = Some(Instant::now());
                }
                conn.bytes_out += n as u64;
                conn.descriptors.extend(came);
                let scratch = std::mem::take(&mut self.scratch);
                self.update_clock();
                self.take_in(agent, &scratch[..n]);
                self.scratch = scratch;
                self.pump();
                return true;
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => {}
                io::ErrorKind::Interrupted => return true,
                // The agent was killed before it read all that the head had sent.
                io::ErrorKind::ConnectionReset => self.end(agent, Ok(())),
                _ => self.end(agent, Err(error)),
            },
        }
        false
    }

    /// Processes the frames in the bytes that have arrived. The beginning of an incomplete frame is
    /// buffered until the rest arrives; complete frames are not copied for that.
    fn take_in(&mut self, agent: usize, mut bytes: &[u8]) {
        loop {
            let received = &mut self.conns[agent].received;
            let frame = if received.is_empty() {
                frame::decode_slice(&mut bytes)
            } else {
                let missing = frame::missing(received).min(bytes.len());
                received.extend_from_slice(&bytes[..missing]);
                bytes = &bytes[missing..];
                frame::decode(received)
            };
            let result = match frame {
                Ok(Some(frame)) => self.on_frame(agent, frame),
                Ok(None) if bytes.is_empty() => return,
                // The whole header has arrived, or the frame begins with these bytes.
                Ok(None) => {
                    let received = &mut self.conns[agent].received;
                    if received.is_empty() {
                        received.extend_from_slice(bytes);
                        bytes = &[];
                    }
                    continue;
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = result {
                let error = io::Error::other(format!("the agent sent {error}"));
                return self.end(agent, Err(error));
            }
        }
    }

    fn on_frame(&mut self, agent: usize, frame: Frame) -> Result<(), String> {
        let Header { kind, flags, .. } = frame.header;
        if kind == Kind::Blob && !self.took_over {
            return Err("a frame that is not for the head".into());
        }
        let mut memory = None;
        if kind == Kind::Data && flags == LAST | BY_REFERENCE {
            let Some(descriptor) = self.conns[agent].descriptors.pop_front() else {
                return Err(NO_DESCRIPTOR.into());
            };
            memory = frame.number().and_then(|len| memory_of(descriptor, len));
        }
        let taken = self.scheduler.on_frame_with(agent, frame, memory);
        taken.map_err(|error| error.to_string())
    }

    fn on_bytes(&mut self, agent: usize) {
        let received = std::mem::take(&mut self.conns[agent].received);
        self.take_in(agent, &received);
    }

    /// The stream is writable again.
    pub fn on_writable(&mut self, agent: usize) {
        self.conns[agent].blocked = false;
        self.pump();
        self.update_interest(agent);
    }

    /// To be called after any change: sends what can be sent, and records what R must know.
    pub fn pump(&mut self) {
        self.update_clock();
        loop {
            for agent in 0..self.conns.len() {
                self.flush(agent);
            }
            self.record_changed_seeds();
            let released = self.scheduler.take_released();
            let notes = self.scheduler.take_notes();
            if released == 0 && notes.is_empty() {
                return;
            }
            self.queued -= released;
            if let Some(hand) = &mut self.hand {
                hand.notes.extend(notes.iter().cloned());
            }
            for note in notes {
                self.recent.note(&note, self.began);
                self.board.note(&note, || self.began.elapsed());
                match &note {
                    Note::LeftOut { agent, .. } => {
                        // An agent that does not end on request is killed.
                        self.conns[*agent].permanent = true;
                        self.conns[*agent].stop.notify_one();
                    }
                    // Another job may take its place. Until the agent has ended, calls wait for that.
                    Note::Drained {
                        agent,
                        removed: false,
                    } => {
                        let conn = &self.conns[*agent];
                        if conn.dials && !conn.permanent && conn.plan.is_some() {
                            self.scheduler.await_again(*agent);
                        }
                    }
                    Note::Drained {
                        agent,
                        removed: true,
                    } => {
                        self.conns[*agent].permanent = true;
                        self.conns[*agent].stop.notify_one();
                    }
                    Note::Failed { agent, reason } => {
                        self.end(*agent, Err(io::Error::other(reason.clone())));
                    }
                    // A worker may fail while it waits to be restored.
                    Note::Up { rank, .. } | Note::Replaced { rank, .. } => {
                        self.has_current_agent(self.inbox.workers[*rank as usize].agent);
                        self.worker_up(*rank);
                    }
                    Note::SetupCalls {
                        rank,
                        complete,
                        calls,
                        last,
                    } => self.on_setup_calls(*rank, *complete, calls, *last),
                    Note::SetupCall {
                        request,
                        flags,
                        bytes,
                    } if *request < FIRST_KEPT => self.on_setup_call(*request, *flags, bytes),
                    Note::SetupCall {
                        request,
                        flags,
                        bytes,
                    } => self.kept.receive(*request, *flags, bytes),
                    Note::KeptAnswers {
                        agent,
                        answers,
                        last,
                    } => self.kept.list(*agent, answers, *last),
                    Note::Done {
                        rank,
                        task,
                        outcome,
                        ..
                    } => {
                        self.record_missed(*task, *rank, outcome);
                        if let Some(setup_log) = &mut self.setup_log {
                            let setup_call = matches!(outcome, Outcome::Answer(_));
                            setup_log.ended(*task, *rank, setup_call);
                        }
                        self.restored(*rank, *task, outcome);
                    }
                    _ => {}
                }
                let dropped = self.inbox.note(note);
                if dropped > 0 {
                    self.scheduler.taken(dropped);
                }
            }
            self.changed();
        }
    }

    /// Notifies R if the set-up log is incomplete, so that lost hosts cannot be reconnected any
    /// more.
    pub fn check_setup_log(&mut self) {
        let incomplete = |setup_log: &SetupLogFile| !setup_log.is_complete();
        if self.setup_log.as_ref().is_some_and(incomplete) {
            if self.reconnects || self.is_elastic {
                self.inbox.setup_log_incomplete();
            } else if let Some(setup_log) = &mut self.setup_log {
                // No worker is being restored. Only hosts that are added would need the log.
                setup_log.discard();
            }
            for agent in 0..self.conns.len() {
                if self.inbox.hosts[agent].awaited {
                    let reason = "it had not joined when the set-up log reached its limit";
                    self.leave_out(agent, reason.to_owned());
                    self.give_up_awaited(agent, &HostFailure::new(reason.to_owned()));
                }
            }
        }
    }

    /// Leaves out a host for this reason. It has no idle workers that need time to end.
    pub fn leave_out(&mut self, agent: usize, reason: String) {
        self.scheduler.leave_out(agent, reason);
        if let Some(conn) = self.conns.get_mut(agent) {
            conn.stop_timeout = Duration::ZERO;
        }
    }

    /// Whether any worker is starting, up, or may come back.
    pub fn any_left(&self) -> bool {
        let mut agents = 0..self.conns.len();
        self.scheduler.any_left() || agents.any(|agent| self.takes_back(agent))
    }

    /// Wakes R's thread, if it sleeps, because something has changed.
    pub fn changed(&mut self) {
        self.changes += 1;
        if std::mem::take(&mut self.asleep) {
            // A full socket means that R's thread has been woken already.
            let _ = (&self.wake).write(&[1]);
        }
        self.update_readiness();
    }

    /// Lets the connection show whether the answer that R's code waits for is there.
    pub fn update_readiness(&mut self) {
        let readiness = self.readiness.as_mut();
        if readiness.is_some_and(|readiness| !readiness.update(&self.inbox.tasks)) {
            // R has closed its end.
            self.readiness = None;
        }
    }

    /// Writes to an agent as much as its stream accepts now.
    fn flush(&mut self, agent: usize) {
        let conn = &mut self.conns[agent];
        let Some(stream) = conn.stream.as_deref() else {
            return;
        };
        while !conn.blocked {
            while conn.out.len() < WRITE {
                let Some(frame) = self.scheduler.next_frame(agent) else {
                    break;
                };
                conn.bytes_in += frame.wire_len() as u64;
                conn.out.push(&frame);
            }
            if conn.out.is_empty() {
                return;
            }
            match conn
                .out
                .write_with(|slices| fd::send(stream.as_raw_fd(), slices))
            {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    conn.blocked = conn.end.is_none();
                    self.update_interest(agent);
                    return;
                }
                Err(error) => {
                    conn.out = OutBuf::default();
                    let kind = error.kind();
                    // The reader finds the end of the stream and its reason. Otherwise the stream
                    // is open, and what is not written here would be missing.
                    if !matches!(
                        kind,
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                    ) {
                        self.end(agent, Err(error));
                    }
                    return;
                }
            }
        }
    }

    /// Disconnects from the agents, which wait for another head.
    pub fn leave(&mut self, stopped: &Notify) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        self.left = true;
        self.board.ending.notify_waiters();
        debug!("head leaves the cluster");
        for agent in 0..self.conns.len() {
            self.conns[agent].permanent = true;
            self.conns[agent].stop.notify_one();
            self.end(agent, Ok(()));
        }
        stopped.notify_one();
    }

    /// Stops the cluster.
    pub fn stop(&mut self, stopped: &Notify) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        self.board.ending.notify_waiters();
        debug!("cluster stops");
        for agent in 0..self.conns.len() {
            // An agent that has not greeted receives no message: the end of the stream stops it.
            let _ = self.scheduler.send_control(agent, &ToAgent::Stop);
            self.conns[agent].permanent = true;
            self.conns[agent].stop.notify_one();
        }
        self.pump();
        stopped.notify_one();
    }
}
