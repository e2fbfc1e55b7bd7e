//! What R's thread and the hub's thread share: one [`Core`] under a lock, and a way to wake each
//! other.
//!
//! Either thread reads and writes the agents' streams, without blocking and with the lock held.
//! While R waits it reads them itself: an answer that had to pass through another thread would be
//! twice as long on its way. Once R has been busy with something else for a [`TICK`], the hub's
//! thread does the reading. The lock is never held while R code runs, across an allocation by R, or
//! while anybody sleeps.

use super::by_hand::Hand;
use super::connection::Conn;
use super::inbox::Inbox;
use super::readiness::Readiness;
use super::recent::Recent;
use super::reconnect::Restoring;
use crate::head::activity::Measure;
use crate::head::scheduler::Scheduler;
use crate::head::scheduler::events::{Note, Outcome, RankSet, Want};
use crate::head::setup_log::Spool;
use crate::platform::{fd, limits, memfd, reserve};
use crate::protocol::body::Memory;
use crate::protocol::control::{Facts, ToAgent};
use crate::protocol::frame::{self, Frame, Header, Kind, LAST, SHARED};
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
use tracing::{debug, trace};

/// Bytes put together for one write.
const WRITE: usize = 256 * 1024;
/// Bytes read at a time.
const READ: usize = 256 * 1024;

/// How long R may leave the streams unread, and then some, before the hub's thread reads them.
pub const TICK: Duration = Duration::from_millis(2);

/// How long R's thread watches for an answer before it sleeps: what it usually takes to and fro when
/// nobody on the way sleeps. If it watched for longer, it would take a core from workers of this machine.
pub const WATCH: Duration = Duration::from_micros(100);

/// How long it does so if it waits for a single task: there are no other workers to take a core from.
pub const WATCH_ONE: Duration = Duration::from_millis(1);

/// Who reads the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Hub,
    R,
}

/// The system drops descriptors for which there is no room.
const NO_DESCRIPTOR: &str = "a result whose memory cannot be opened here: too many files are open";

/// The memory behind a descriptor, if it has so many bytes and nobody can change or cut it any more.
fn memory_of(descriptor: OwnedFd, len: u64) -> Option<Memory> {
    let file = File::from(descriptor);
    let there = file.metadata().ok()?.len();
    let fits = there == len && memfd::is_sealed(&file);
    let len = usize::try_from(len).ok().filter(|_| fits)?;
    Some(Memory::new(len, Some(Arc::new(file))))
}

/// See the module's documentation.
pub struct Core {
    pub scheduler: Scheduler,
    pub conns: Vec<Conn>,
    pub inbox: Inbox,
    /// What lasts on workers, if hosts are to be taken back.
    pub spool: Option<Spool>,
    pub restoring: Restoring,
    /// What happened last, for bug reports.
    pub recent: Recent,
    /// How long a host that is tried again may take to start.
    pub start_patience: Duration,
    /// Bytes of results to buffer.
    limit: usize,
    /// Bytes of tasks submitted and not yet sent.
    pub queued: usize,
    /// The end has been asked for.
    pub stopping: bool,
    /// What the hub's thread watches.
    registry: Registry,
    reader: Reader,
    /// R waits.
    waiting: bool,
    /// When `waiting` last changed.
    since: Instant,
    /// The hub's thread looks every [`TICK`] whether it has to read.
    ticking: bool,
    /// R sleeps and is to be woken by the next change.
    asleep: bool,
    /// Counts the changes of the inbox and of `queued`.
    changes: u64,
    /// How long R has lately waited for answers, on average.
    usual_wait: Duration,
    /// The beginning of all times.
    pub began: Instant,
    pub measure: Measure,
    /// How long any task may take.
    pub time_limit: Option<Duration>,
    wake: UnixStream,
    /// The connection by which R code waits that knows sockets alone.
    pub readiness: Option<Readiness>,
    scratch: Vec<u8>,
    /// Its maker moves what would go over streams, and the clock.
    pub hand: Option<Hand>,
}

/// See the module's documentation.
pub struct Shared {
    core: Mutex<Core>,
    woken: UnixStream,
    /// R has begun to read and the hub's thread is to look after it.
    pub taken_over: Notify,
    /// `stopping` was set.
    pub stopped: Notify,
}

impl Shared {
    pub fn new(hosts: usize, limit: usize, registry: Registry) -> io::Result<Shared> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        Ok(Shared {
            core: Mutex::new(Core {
                scheduler: Scheduler::new(vec![Vec::new(); hosts], limit),
                limit,
                conns: (0..hosts).map(|_| Conn::default()).collect(),
                inbox: Inbox::new(hosts),
                spool: None,
                restoring: Restoring::default(),
                recent: Recent::default(),
                start_patience: Duration::MAX,
                queued: 0,
                stopping: false,
                registry,
                reader: Reader::Hub,
                waiting: false,
                since: Instant::now(),
                ticking: false,
                asleep: false,
                changes: 0,
                usual_wait: Duration::ZERO,
                began: Instant::now(),
                measure: |_| None,
                time_limit: None,
                wake,
                readiness: None,
                scratch: vec![0; READ],
                hand: None,
            }),
            woken,
            taken_over: Notify::new(),
            stopped: Notify::new(),
        })
    }

    pub fn core(&self) -> MutexGuard<'_, Core> {
        // A panic while it was held would have been the hub's: it then closes the inbox.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// R's thread waits, up to `most` or until a signal comes, for `look` to find something. It
    /// looks at first and after every change.
    pub fn wait<T>(&self, most: Duration, look: impl FnMut(&mut Core) -> Option<T>) -> Option<T> {
        self.wait_watching(most, WATCH, look)
    }

    /// If answers have usually come within `watch`, so soon that to sleep and to be woken would take longer
    /// than the answer itself, R's thread does not sleep for so long, but gives its core away at every
    /// look.
    pub fn wait_watching<T>(
        &self,
        most: Duration,
        watch: Duration,
        mut look: impl FnMut(&mut Core) -> Option<T>,
    ) -> Option<T> {
        let mut core = self.core();
        let mut found = look(&mut core);
        if found.is_some() {
            return found;
        }
        let began = Instant::now();
        let mut seen = core.changes;
        core.begin_reading(began, &self.taken_over);
        let is_usual = core.usual_wait <= watch;
        let mut waited = Duration::ZERO;
        let mut interrupted = false;
        loop {
            if core.changes != seen {
                seen = core.changes;
                found = look(&mut core);
            }
            if found.is_some() || waited >= most || interrupted {
                break;
            }
            if is_usual && waited < watch {
                drop(core);
                thread::yield_now();
                core = self.core();
            } else {
                core.asleep = true;
                let streams = core.streams();
                drop(core);
                interrupted = self.sleep(&streams, most.saturating_sub(waited));
                core = self.core();
                core.asleep = false;
            }
            core.read_all();
            waited = began.elapsed();
        }
        core.usual_wait = (3 * core.usual_wait + waited) / 4;
        core.end_reading(began + waited);
        found
    }

    /// Sleeps until a stream can be read, the other thread changes something, or a signal comes,
    /// which is what is returned: R then gets to handle it at once.
    fn sleep(&self, streams: &[Arc<UnixStream>], most: Duration) -> bool {
        let interrupted = poll(&[(self, streams)], most);
        self.drain();
        interrupted
    }

    /// Empties the socket by which R's thread is woken.
    fn drain(&self) {
        let mut buffer = [0u8; 64];
        let _ = (&self.woken).read(&mut buffer);
    }

    /// R's thread sleeps, up to `most`, until any of these hubs has changed since the count of changes
    /// that comes with it, a stream can be read, or a signal comes.
    pub fn sleep_until_any(hubs: &[(&Shared, &(u64, RankSet))], most: Duration) {
        let mut sleeping = Vec::with_capacity(hubs.len());
        let mut changed = false;
        for &(shared, (seen, workers)) in hubs {
            let mut core = shared.core();
            core.scheduler.want(Want::AnyOf(workers.clone()));
            core.settle();
            core.begin_reading(Instant::now(), &shared.taken_over);
            changed |= core.changes != *seen;
            core.asleep = true;
            sleeping.push((shared, core.streams()));
        }
        if !changed {
            let polled: Vec<_> = sleeping.iter().map(|(hub, fds)| (*hub, &fds[..])).collect();
            poll(&polled, most);
        }
        for (shared, _) in sleeping {
            shared.drain();
            let mut core = shared.core();
            core.asleep = false;
            core.read_all();
            core.scheduler.want(Want::Nothing);
            core.end_reading(Instant::now());
        }
    }

    /// What the hub's thread does every [`TICK`] while R waits or has just done so. Returns whether
    /// to go on with it.
    pub fn tick(&self) -> bool {
        let mut core = self.core();
        if core.since.elapsed() < TICK {
            return true;
        }
        core.ticking = false;
        if !core.waiting {
            core.set_reader(Reader::Hub);
        }
        // Whoever waits for long gives the reading back when that is over.
        false
    }
}

/// Sleeps until one of the hubs' streams can be read, one of them wakes R's thread, or a signal comes,
/// which is what is returned.
fn poll(hubs: &[(&Shared, &[Arc<UnixStream>])], most: Duration) -> bool {
    let fds = hubs.iter().flat_map(|(shared, streams)| {
        let streams = streams.iter().map(AsRawFd::as_raw_fd);
        streams.chain([shared.woken.as_raw_fd()])
    });
    let mut polled: Vec<libc::pollfd> = fds
        .map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let most = libc::c_int::try_from(most.as_millis() + 1).unwrap_or(libc::c_int::MAX);
    // SAFETY: as many valid pollfds as are announced, of descriptors that stay open.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, most) };
    ready < 0
}

impl Core {
    /// What is known of both threads, for a bug report.
    pub fn facts(&self, facts: &mut Facts) {
        facts.add("stopping", self.stopping);
        facts.add_debug("reader", self.reader);
        facts.add("r_waits", self.waiting);
        facts.add("queued_bytes", self.queued);
        facts.add_seconds("usual_wait", self.usual_wait);
    }

    /// How often the inbox or `queued` has changed.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    fn begin_reading(&mut self, now: Instant, taken_over: &Notify) {
        self.waiting = true;
        self.since = now;
        self.set_reader(Reader::R);
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
            self.set_reader(Reader::Hub);
        }
    }

    fn set_reader(&mut self, reader: Reader) {
        if self.reader != reader {
            trace!(?reader, "another thread reads the streams");
            self.reader = reader;
            for agent in 0..self.conns.len() {
                self.watch(agent);
            }
        }
    }

    /// Lets the hub's thread watch a stream for what it is to do there.
    fn watch(&mut self, agent: usize) {
        let conn = &mut self.conns[agent];
        let reads = self.reader == Reader::Hub && conn.end.is_none();
        let wanted = match (reads, conn.blocked) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        };
        let Some(stream) = conn.stream.as_ref().filter(|_| conn.watched != wanted) else {
            return;
        };
        let fd = stream.as_raw_fd();
        let mut source = SourceFd(&fd);
        let token = Token(agent);
        let done = match (conn.watched, wanted) {
            (None, Some(interest)) => self.registry.register(&mut source, token, interest),
            (Some(_), Some(interest)) => self.registry.reregister(&mut source, token, interest),
            _ => self.registry.deregister(&mut source),
        };
        match done {
            Ok(()) => conn.watched = wanted,
            Err(error) => self.end(agent, Err(error)),
        }
    }

    /// The workers of each agent are known now. Nothing has been sent to any.
    pub fn set_ranks(&mut self, ranks: Vec<Vec<Rank>>) {
        self.inbox.set_workers(&ranks);
        self.scheduler = Scheduler::new(ranks, self.limit);
        self.scheduler.measure_with(self.measure);
        self.scheduler.limit_time(self.time_limit);
        self.look_at_clock();
        for agent in 0..self.conns.len() {
            if let Some(failure) = &self.inbox.hosts[agent].failure {
                self.scheduler.agent_lost(agent, &failure.reason);
            }
        }
    }

    /// All that happens from here on happens now.
    pub fn look_at_clock(&mut self) {
        let now = self.hand.as_ref().map(|hand| hand.now);
        self.scheduler
            .at(now.unwrap_or_else(|| self.began.elapsed()));
    }

    /// The stream to an agent that has greeted, and what came with the greeting.
    pub fn attach(&mut self, agent: usize, stream: UnixStream, received: bytes::BytesMut) {
        let conn = &mut self.conns[agent];
        conn.stream = Some(Arc::new(stream));
        conn.received = received;
        self.watch(agent);
        self.on_bytes(agent);
        self.settle();
        // R, if it sleeps, does not know the stream yet.
        self.changed();
    }

    /// A fresh agent has greeted where one was lost.
    ///
    /// # Errors
    /// When nothing is known of what it is to start.
    pub fn agent_back(&mut self, agent: usize) -> io::Result<()> {
        let conn = &mut self.conns[agent];
        let Some(start) = conn.plan.clone() else {
            return Err(io::Error::other("it was not part of the cluster"));
        };
        conn.end = None;
        conn.out = OutBuf::default();
        conn.descriptors.clear();
        conn.heard = None;
        conn.watched = None;
        conn.planned.notify_one();
        let back = self.scheduler.agent_back(agent, &ToAgent::Start(start));
        back.map_err(io::Error::other)
    }

    /// Closes the stream, for the agent too, and whoever has a copy of our end.
    pub fn detach(&mut self, agent: usize) -> io::Result<()> {
        let conn = &mut self.conns[agent];
        let end = conn.end.take().unwrap_or(Ok(()));
        conn.end = Some(Ok(()));
        conn.blocked = false;
        conn.out = OutBuf::default();
        conn.descriptors.clear();
        self.watch(agent);
        if let Some(stream) = self.conns[agent].stream.take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        end
    }

    /// The stream has ended, by itself or because what it carried made no sense.
    fn end(&mut self, agent: usize, result: io::Result<()>) {
        let conn = &mut self.conns[agent];
        if conn.end.is_none() {
            debug!(agent = agent + 1, ?result, "stream ended");
            conn.end = Some(result);
            conn.blocked = false;
            conn.over.notify_one();
            self.watch(agent);
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

    /// Reads what is there now, up to [`READ`] bytes. Returns whether there may be more.
    pub fn read(&mut self, agent: usize) -> bool {
        let conn = &mut self.conns[agent];
        let Some(stream) = conn.stream.as_deref().filter(|_| conn.end.is_none()) else {
            return false;
        };
        if reserve::was_used() {
            // What is held of this host's results goes with the host.
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
                if !conn.patience.is_zero() {
                    conn.heard = Some(Instant::now());
                }
                conn.bytes_out += n as u64;
                conn.descriptors.extend(came);
                let scratch = std::mem::take(&mut self.scratch);
                self.look_at_clock();
                self.take_in(agent, &scratch[..n]);
                self.scratch = scratch;
                self.settle();
                return true;
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => {}
                io::ErrorKind::Interrupted => return true,
                // The agent was killed with bytes of ours unread.
                io::ErrorKind::ConnectionReset => self.end(agent, Ok(())),
                _ => self.end(agent, Err(error)),
            },
        }
        false
    }

    /// Takes in the frames in what has come. What is there of another is kept until the rest comes; all
    /// others are not copied for that.
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
                // All of its header is there now, or it is the first of what has come.
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
        let mut memory = None;
        if kind == Kind::Data && flags == LAST | SHARED {
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

    /// The stream takes bytes again.
    pub fn on_writable(&mut self, agent: usize) {
        self.conns[agent].blocked = false;
        self.settle();
        self.watch(agent);
    }

    /// After any change: sends what can be sent, and takes note of what R must know.
    pub fn settle(&mut self) {
        self.look_at_clock();
        loop {
            for agent in 0..self.conns.len() {
                self.flush(agent);
            }
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
                match &note {
                    Note::LeftOut { agent, .. } => {
                        // If it does not end when asked to, it is ended.
                        self.conns[*agent].for_good = true;
                        self.conns[*agent].stop.notify_one();
                    }
                    Note::Failed { agent, reason } => {
                        self.end(*agent, Err(io::Error::other(reason.clone())));
                    }
                    Note::Up { rank, .. } => self.worker_up(*rank),
                    Note::Done {
                        rank,
                        task,
                        outcome,
                        ..
                    } => {
                        if let Some(spool) = &mut self.spool {
                            let lasts = matches!(outcome, Outcome::Answer(_));
                            spool.ended(*task, *rank, lasts);
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

    /// R is to know when hosts will not be taken back any more.
    pub fn look_at_spool(&mut self) {
        let incomplete = |spool: &Spool| !spool.is_complete();
        if self.spool.as_ref().is_some_and(incomplete) {
            self.inbox.spool_incomplete();
        }
    }

    /// Whether a host that is lost is tried again.
    pub fn takes_back(&self, agent: usize) -> bool {
        let complete = self.spool.as_ref().is_some_and(Spool::is_complete);
        let conn = self.conns.get(agent).filter(|_| complete);
        let wanted = conn.is_some_and(|conn| conn.plan.is_some() && !conn.for_good);
        wanted && self.scheduler.has_lost(agent)
    }

    /// Leaves out a host for this reason. It has no idle workers that need time to end.
    pub fn leave_out(&mut self, agent: usize, reason: String) {
        self.scheduler.leave_out(agent, reason);
        if let Some(conn) = self.conns.get_mut(agent) {
            conn.stop_timeout = Duration::ZERO;
        }
    }

    /// Whether any worker is starting or up, or may be again.
    pub fn any_left(&self) -> bool {
        let mut agents = 0..self.conns.len();
        self.scheduler.any_left() || agents.any(|agent| self.takes_back(agent))
    }

    /// Wakes R, if it sleeps, to look at what has changed.
    pub fn changed(&mut self) {
        self.changes += 1;
        if std::mem::take(&mut self.asleep) {
            // Full means that R has been woken already.
            let _ = (&self.wake).write(&[1]);
        }
        self.update_readiness();
    }

    /// Lets the connection show whether the answer that R's code waits for is there.
    pub fn update_readiness(&mut self) {
        if let Some(readiness) = &mut self.readiness
            && !readiness.update(&self.inbox.tasks)
        {
            // R has closed its end.
            self.readiness = None;
        }
    }

    /// Writes to an agent as much as its stream takes now.
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
                    self.watch(agent);
                    return;
                }
                Err(error) => {
                    conn.out = OutBuf::default();
                    let kind = error.kind();
                    // Who reads finds the end of the stream, and why. Otherwise it is open, and what is
                    // left out here would be missing.
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

    /// Ends the cluster.
    pub fn stop(&mut self, stopped: &Notify) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        debug!("cluster stops");
        for agent in 0..self.conns.len() {
            // Without a greeting there is nobody to tell: the stream's end must do.
            let _ = self.scheduler.send_control(agent, &ToAgent::Stop);
            self.conns[agent].for_good = true;
            self.conns[agent].stop.notify_one();
        }
        self.settle();
        stopped.notify_one();
    }
}
