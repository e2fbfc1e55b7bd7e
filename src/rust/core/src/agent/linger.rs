//! How an agent waits for another head when its head disconnects.
//!
//! The agent listens on a Unix socket in a directory that only its user can enter. A head that dials proves that it
//! has the key of the cluster, by the handshake of [`crate::protocol::noise`], before anything else is read from it.
//! The agent accepts a head only while it has none, so that two heads never have the same cluster. The handshake
//! ends with the verdict of the agent; the stream that follows is plain, because it never leaves the host: a
//! [`relay`] process copies it from the socket to the ssh connection of a head on another machine.
//!
//! On the stream, agent and head greet as at the start. The head then sends the start request, as it would to a new
//! agent. The agent, which has workers, answers with their state instead of starting any.
//!
//! An agent that has dialled back to its first head, as those of batch jobs do, also dials the addresses of that head
//! itself, until another head listens there: see [`redial`].

use super::process::Outgoing;
use super::setup_log::ReplayedCall;
use super::{Agent, HEAD_IN, HEAD_OUT, LISTENER, REDIAL, blob_memory};
use crate::platform::{fd, memfd, process};
use crate::protocol::control::{self, Linger, Start, ToAgent, ToHead, WorkerFailure};
use crate::protocol::frame::{self, ABORT, BY_REFERENCE, FIRST, Frame, Header, Kind, LAST};
use crate::protocol::handshake::{MAGIC, Preamble, PreambleState};
use crate::protocol::heartbeat::Heartbeat;
use crate::protocol::ids::{KEEP, TaskId};
use crate::protocol::noise::{self, Introduction, Key, Verdict};
use bytes::Bytes;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use redial::{News, Order, Redial};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tracing::{debug, error, info, warn};

pub mod kept;
pub mod redial;
pub mod relay;
pub mod shim;

/// The number by which the handshake names the key of the cluster. No launcher has it.
pub const CLUSTER: u32 = u32::MAX;

/// What a head is told that dials an agent that has a head.
pub const IN_USE: &str = "the cluster is connected to another session";

/// What a head is told that has lost the cluster to a later head, and would start an agent again.
pub const TAKEN_OVER: &str = "another session has taken over the cluster";

/// The longest path of a Unix socket.
const MAX_PATH: usize = 107;
/// Answers in one message.
const MAX_LISTED: usize = 1000;
/// Connections that have not proved themselves.
const MAX_DIALERS: usize = 8;
/// How long a connection may take to prove itself.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an accepted head may take to send the start request. It waits for its other hosts meanwhile.
const START_TIMEOUT: Duration = Duration::from_secs(600);
/// How an agent introduces itself that takes the place of the one that listens. The generation of its head follows.
const END: &str = "end ";
/// How long that one may take to end, and how often it is checked whether it has.
const END_TIMEOUT: Duration = Duration::from_secs(3);
const END_CHECK: Duration = Duration::from_millis(20);
/// The pause before a child that looks for another head is started again.
const REDIAL_PAUSE: Duration = Duration::from_secs(1);
/// The token of the first connection that has not proved itself. Those of workers are smaller.
pub(super) const FIRST_DIALER: usize = usize::MAX / 2;

/// The directory of the socket of an agent, from the name that the head has given to it: in `/tmp`, which is the same for
/// all processes of a user, or where the environment says, if it is not there.
///
/// # Errors
/// When the name is not the name of a file, or the path of the socket is too long.
pub fn directory(name: &str) -> io::Result<PathBuf> {
    let usual = directory_in(Path::new("/tmp"), name)?;
    if usual.exists() {
        return Ok(usual);
    }
    let other = directory_in(&std::env::temp_dir(), name);
    Ok(other.ok().filter(|other| other.exists()).unwrap_or(usual))
}

fn directory_in(parent: &Path, name: &str) -> io::Result<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.is_empty() || !name.chars().all(plain) {
        return Err(io::Error::other("a bad name of a directory"));
    }
    let directory = parent.join(name);
    let path = socket(&directory);
    if path.as_os_str().len() > MAX_PATH {
        return Err(io::Error::other(format!(
            "the path of the socket is too long: {}; set TMPDIR to a shorter one on that host",
            path.display()
        )));
    }
    Ok(directory)
}

/// A file in the directory of an agent that has no head: when it was written, the agent lost its head.
const LOST: &str = "lost";

/// The socket in the directory of an agent.
pub fn socket(directory: &Path) -> PathBuf {
    directory.join("socket")
}

/// What connects the agent to its head.
#[derive(Debug)]
pub(super) enum Link {
    /// The head has sent the start request.
    Up,
    /// The agent has accepted a head, which has not sent the start request yet.
    Greeting {
        preamble: Option<Preamble>,
        greeted: bool,
        until: Duration,
    },
    /// The agent has no head. It ends then.
    Down { until: Duration },
}

/// A connection that has not proved itself.
struct Dialer {
    stream: UnixStream,
    handshake: noise::Listener,
    until: Duration,
}

/// A connection that has proved itself.
struct Proved {
    introduction: Introduction,
    stream: UnixStream,
    handshake: noise::Listener,
}

/// Makes the directory of the socket. A lost agent of the same host of the cluster may have left it, or may wait there
/// for a head: that agent is ended, because the head has sent its tasks elsewhere. An agent that a later head has taken
/// over is not: the error is then [`io::ErrorKind::ResourceBusy`].
fn make_directory(directory: &Path, key: &Key, generation: u32) -> io::Result<()> {
    let make = || DirBuilder::new().mode(0o700).create(directory);
    let made = match make() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            end_other(directory, key, generation)?;
            make()
        }
        made => made,
    };
    made.map_err(|error| {
        let directory = directory.display();
        io::Error::other(format!("the directory {directory} cannot be made: {error}"))
    })
}

/// The device and the inode of a directory.
fn identity(directory: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(directory).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Ends the agent that listens in a directory, and waits until it has ended.
fn end_other(directory: &Path, key: &Key, generation: u32) -> io::Result<()> {
    let owner = fs::symlink_metadata(directory)?.uid();
    if owner != process::user() {
        let directory = directory.display();
        return Err(io::Error::other(format!(
            "the directory {directory} belongs to another user"
        )));
    }
    let began = Instant::now();
    match ask_to_end(directory, key, generation) {
        Ok(()) => {
            while directory.exists() && began.elapsed() < END_TIMEOUT {
                thread::sleep(END_CHECK);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Err(error),
        Err(_) => {}
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn ask_to_end(directory: &Path, key: &Key, generation: u32) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket(directory))?;
    stream.set_read_timeout(Some(END_TIMEOUT))?;
    let job = format!("{END}{generation}");
    let introduction = Introduction::new(noise::random()?, &process::hostname(), &job);
    let (mut dialer, mut out) =
        noise::Dialer::start(key, CLUSTER, &introduction).map_err(io::Error::other)?;
    let mut buffer = [0u8; 1024];
    loop {
        stream.write_all(&out)?;
        out.clear();
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let verdict = dialer
            .feed(&buffer[..n], &mut out)
            .map_err(io::Error::other)?;
        match verdict {
            None => {}
            Some(Verdict::Refused(reason)) if reason == TAKEN_OVER => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, reason));
            }
            Some(_) => return Ok(()),
        }
    }
}

/// See the module's documentation. Dropping the value removes the directory.
pub(super) struct Lingering {
    directory: PathBuf,
    listener: UnixListener,
    keys: Arc<[(u32, Key)]>,
    pub(super) time: Duration,
    name: String,
    /// The generation of the present head, or of the last one.
    generation: u32,
    dialers: Vec<Option<Dialer>>,
    /// Device and inode of the directory.
    made: Option<(u64, u64)>,
    /// Where the agent looks for another head.
    addresses: Vec<(String, u16)>,
    /// The child that does so.
    redial: Option<Redial>,
    /// When to start that child, while there is no head.
    redial_at: Option<Duration>,
    /// The pids of such children that have not ended.
    relays: Vec<u32>,
    /// The process that made the directory. A forked worker has a copy of this value.
    owner: u32,
}

impl Drop for Lingering {
    fn drop(&mut self) {
        if self.owner == std::process::id() && !self.is_superseded() {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

impl Lingering {
    /// Listens for heads.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub(super) fn start(plan: &Linger, registry: &Registry) -> io::Result<Lingering> {
        let key = Key::new(plan.key.0);
        let mut directory = directory(&plan.name)?;
        if let Err(error) = make_directory(&directory, &key, plan.generation) {
            if error.kind() == io::ErrorKind::ResourceBusy {
                return Err(error);
            }
            directory = directory_in(&std::env::temp_dir(), &plan.name)?;
            make_directory(&directory, &key, plan.generation).map_err(|_| error)?;
        }
        // The umask has only removed permissions.
        let listener = UnixListener::bind(socket(&directory)).and_then(|listener| {
            listener.set_nonblocking(true)?;
            let fd = listener.as_raw_fd();
            registry.register(&mut SourceFd(&fd), LISTENER, Interest::READABLE)?;
            Ok(listener)
        });
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => {
                let _ = fs::remove_dir_all(&directory);
                return Err(error);
            }
        };
        Ok(Lingering {
            made: identity(&directory),
            directory,
            listener,
            keys: [(CLUSTER, key)].into(),
            time: Duration::from_millis(plan.milliseconds),
            name: plan.name.clone(),
            generation: plan.generation,
            dialers: (0..MAX_DIALERS).map(|_| None).collect(),
            addresses: plan.addresses.clone(),
            redial: None,
            redial_at: None,
            relays: Vec::new(),
            owner: std::process::id(),
        })
    }

    /// Whether another agent has removed the directory, because this one did not end when it was asked to. Nobody can
    /// reach this one any more.
    pub(super) fn is_superseded(&self) -> bool {
        identity(&self.directory) != self.made
    }

    /// The directory of the socket.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Accepts connections. Those beyond the limit are closed.
    pub(super) fn accept(&mut self, registry: &Registry, now: Duration) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // The system is out of descriptors: whoever dials has to do so again.
                    warn!(%error, "connection not accepted");
                    return;
                }
            };
            let Some(slot) = self.dialers.iter().position(Option::is_none) else {
                continue;
            };
            let fd = stream.as_raw_fd();
            let registered = stream.set_nonblocking(true).and_then(|()| {
                registry.register(
                    &mut SourceFd(&fd),
                    Token(FIRST_DIALER + slot),
                    Interest::READABLE,
                )
            });
            if registered.is_ok() {
                self.dialers[slot] = Some(Dialer {
                    stream,
                    handshake: noise::Listener::new(self.keys.clone()),
                    until: now + PROOF_TIMEOUT,
                });
            }
        }
    }

    /// Reads from a connection. Returns it once it has proved itself.
    fn read(&mut self, slot: usize, registry: &Registry) -> Option<Proved> {
        let dialer = self.dialers.get_mut(slot)?.as_mut()?;
        let mut buffer = [0u8; 1024];
        let proved = loop {
            match (&dialer.stream).read(&mut buffer) {
                Ok(0) => break None,
                Ok(n) => {
                    let mut out = Vec::new();
                    let fed = dialer.handshake.feed(&buffer[..n], &mut out);
                    // The answer is short: a socket that does not take it belongs to a peer that does not read.
                    let sent = (&dialer.stream).write_all(&out).is_ok();
                    match fed {
                        Ok(Some(dialled)) if sent => {
                            break Some(dialled.introduction);
                        }
                        Ok(None) if sent => {}
                        _ => break None,
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(_) => break None,
            }
        };
        let dialer = self.dialers[slot].take()?;
        let fd = dialer.stream.as_raw_fd();
        let _ = registry.deregister(&mut SourceFd(&fd));
        Some(Proved {
            introduction: proved?,
            stream: dialer.stream,
            handshake: dialer.handshake,
        })
    }

    /// Closes connections that have not proved themselves in time.
    fn expire(&mut self, now: Duration) {
        for slot in &mut self.dialers {
            if slot.as_ref().is_some_and(|dialer| dialer.until <= now) {
                *slot = None;
            }
        }
    }

    fn next(&self) -> Option<Duration> {
        let dialers = self.dialers.iter().flatten().map(|dialer| dialer.until);
        dialers.chain(self.redial_at).min()
    }

    /// Whether the agent has dialled back.
    fn dials(&self) -> bool {
        !self.addresses.is_empty()
    }

    /// Starts to look for another head. Returns the pid of the child that does so.
    fn start_redial(&mut self, registry: &Registry) -> io::Result<u32> {
        let order = Order {
            key: &self.keys[0],
            addresses: &self.addresses,
            name: &self.name,
        };
        let redial = Redial::start(&order)?;
        let (pid, fd) = (redial.pid, redial.stream.as_raw_fd());
        self.relays.push(pid);
        registry.register(&mut SourceFd(&fd), REDIAL, Interest::READABLE)?;
        self.redial = Some(redial);
        Ok(pid)
    }

    /// Does not look for another head any more. Returns the stream of the child.
    fn take_redial(&mut self, registry: &Registry) -> Option<UnixStream> {
        self.redial_at = None;
        let stream = self.redial.take()?.stream;
        let fd = stream.as_raw_fd();
        let _ = registry.deregister(&mut SourceFd(&fd));
        Some(stream)
    }
}

impl Agent {
    /// Whether the head may be sent messages.
    pub(super) fn is_linked(&self) -> bool {
        matches!(self.link, Link::Up)
    }

    /// When to call [`Agent::check_link`] next.
    pub(super) fn next_link_check(&self) -> Option<Duration> {
        let lingering = self.lingering.as_ref()?;
        let until = match &self.link {
            Link::Up => None,
            Link::Greeting { until, .. } | Link::Down { until } => {
                Some(*until).filter(|_| !self.ending)
            }
        };
        [until, lingering.next()].into_iter().flatten().min()
    }

    /// Ends the agent if no head has come in time.
    pub(super) fn check_link(&mut self) {
        let now = self.now();
        let Some(lingering) = &mut self.lingering else {
            return;
        };
        lingering.expire(now);
        match &self.link {
            Link::Down { until } if *until <= now && !self.ending => {
                info!("no head has come in time");
                self.end();
            }
            // Nobody else ends an agent whose job is being ended.
            Link::Down { .. } if self.warnings.is_terminated() && !self.ending => {
                info!("the job was ended while no head was connected");
                self.end();
            }
            Link::Down { .. } if lingering.redial_at.is_some_and(|at| at <= now) => {
                lingering.redial_at = None;
                match lingering.start_redial(self.poll.registry()) {
                    Ok(pid) => self.orphans.is_own(pid),
                    Err(error) => {
                        warn!(%error, "the head cannot be dialled");
                        lingering.redial_at = Some(now + REDIAL_PAUSE);
                    }
                }
            }
            Link::Greeting { until, .. } if *until <= now && !self.ending => self.disconnect(),
            _ => {}
        }
    }

    /// The head has disconnected. The agent waits for another head, if it is to, and ends otherwise.
    pub(super) fn disconnect(&mut self) {
        let now = self.now();
        let lingering = self.lingering.as_mut();
        let Some(lingering) = lingering.filter(|_| !self.ending && self.router.is_of_use()) else {
            return self.end();
        };
        let until = now + lingering.time;
        info!(
            seconds = lingering.time.as_secs_f64(),
            "agent has lost its head and waits for another"
        );
        if matches!(self.link, Link::Down { .. }) {
            return;
        }
        let _ = fs::write(lingering.directory.join(LOST), []);
        if lingering.dials() {
            let pause = match self.link {
                Link::Up => Duration::ZERO,
                // A head that was accepted and cannot be used may be there again at once.
                _ => REDIAL_PAUSE,
            };
            lingering.redial_at = Some(now + pause);
        }
        let keeps_log = lingering.dials();
        self.link = Link::Down { until };
        self.close_stream(keeps_log);
        self.heartbeat = None;
        self.usage_survey = None;
        if let Some(parent) = self.parent.take() {
            let fd = parent.as_raw_fd();
            let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        }
        self.looked_for = None;
        shim::end();
        if let Err(error) = self.router.detach(now, &mut self.acts) {
            error!(%error, "the tasks of the head could not be dropped");
            return self.end();
        }
        self.act();
    }

    /// Closes the stream to the head, on which nothing is sent any more. `keeps_log`: whether stderr is the log of a job.
    fn close_stream(&mut self, keeps_log: bool) {
        let registry = self.poll.registry();
        let fd = self.reader.as_raw_fd();
        let _ = registry.deregister(&mut SourceFd(&fd));
        if self.head_blocked {
            let fd = self.writer.as_raw_fd();
            let _ = registry.deregister(&mut SourceFd(&fd));
        }
        if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
            if let Ok(other) = null.try_clone() {
                self.reader = null;
                self.writer = other;
            }
        }
        // An ssh connection lasts as long as somebody has its streams open.
        for target in [1, 2] {
            if !keeps_log {
                let _ = fd::redirect(self.reader.as_raw_fd(), target);
            }
        }
        self.head_blocked = false;
        self.head_waits = false;
        self.head_unread = false;
        self.received.clear();
        self.to_head = Outgoing::default();
    }

    /// A connection that has not proved itself can be read.
    pub(super) fn read_dialer(&mut self, slot: usize) {
        let Some(lingering) = &mut self.lingering else {
            return;
        };
        let Some(proved) = lingering.read(slot, self.poll.registry()) else {
            return;
        };
        let Proved {
            introduction,
            stream,
            handshake,
        } = proved;
        let end = introduction.job.strip_prefix(END);
        let is_later = end.is_some_and(|text| {
            let ours = lingering.generation;
            // The head that greets has not said its own generation yet, which is later than that of the last one.
            let least = match self.link {
                Link::Greeting { .. } => ours.saturating_add(1),
                _ => ours,
            };
            text.parse::<u32>()
                .is_ok_and(|generation| generation >= least)
        });
        let verdict = match self.link {
            _ if self.ending => Verdict::Refused("the agent ends".into()),
            _ if is_later => Verdict::NotNeeded("the agent ends".into()),
            _ if end.is_some() => Verdict::Refused(TAKEN_OVER.into()),
            _ if introduction.problem().is_some() => {
                Verdict::Refused(introduction.problem().unwrap_or_default())
            }
            Link::Down { .. } => Verdict::Accepted,
            _ => Verdict::NotNeeded(IN_USE.into()),
        };
        let mut out = Vec::new();
        let sealed = handshake.finish(&verdict, &mut out).is_ok();
        let sent = sealed && (&stream).write_all(&out).is_ok();
        debug!(?verdict, sent, "head dialled");
        if is_later {
            info!("another agent of this host takes over");
            self.end();
        }
        if sent && verdict == Verdict::Accepted {
            if let Err(error) = self.accept_head(stream) {
                error!(%error, "the head could not be accepted");
                self.disconnect();
            }
        }
    }

    /// The child that looks for another head has reported something.
    pub(super) fn read_redial(&mut self) {
        let now = self.now();
        let Some(lingering) = &mut self.lingering else {
            return;
        };
        let Some(redial) = &lingering.redial else {
            return;
        };
        match redial.read() {
            News::None => {}
            News::Connected => {
                let stream = lingering.take_redial(self.poll.registry());
                let stream = stream.filter(|_| !self.ending);
                let Some(stream) = stream.filter(|_| matches!(self.link, Link::Down { .. })) else {
                    return;
                };
                debug!("a head was reached");
                if let Err(error) = self.accept_head(stream) {
                    error!(%error, "the head could not be accepted");
                    self.disconnect();
                }
            }
            News::Replaced => {
                info!("another agent has taken the place of this one");
                lingering.take_redial(self.poll.registry());
                self.end();
            }
            News::Lost => {
                lingering.take_redial(self.poll.registry());
                lingering.redial_at = Some(now + REDIAL_PAUSE);
            }
        }
    }

    /// Reaps a child that has ended if it has dialled a head. Returns whether it did.
    pub(super) fn reap_relay(&mut self, pid: u32) -> bool {
        let Some(lingering) = &mut self.lingering else {
            return false;
        };
        let Some(at) = lingering.relays.iter().position(|&relay| relay == pid) else {
            return false;
        };
        lingering.relays.remove(at);
        process::reap(pid);
        self.orphans.has_ended(pid);
        true
    }

    fn accept_head(&mut self, stream: UnixStream) -> io::Result<()> {
        if let Some(lingering) = &mut self.lingering {
            lingering.take_redial(self.poll.registry());
        }
        let greeting =
            control::encode(&ToHead::Hello(self.hello.clone())).map_err(io::Error::other)?;
        self.link = Link::Greeting {
            preamble: Some(Preamble::default()),
            greeted: false,
            until: self.now() + START_TIMEOUT,
        };
        self.reader = File::from(OwnedFd::from(stream.try_clone()?));
        self.writer = File::from(OwnedFd::from(stream));
        let fd = self.reader.as_raw_fd();
        let readable = Interest::READABLE;
        let registry = self.poll.registry();
        registry.register(&mut SourceFd(&fd), HEAD_IN, readable)?;
        // Nothing else has been written: the socket has room.
        self.writer.write_all(MAGIC)?;
        self.to_head.push(&greeting, None);
        self.head_unread = true;
        Ok(())
    }

    /// Reads the greeting and the start request of a head that was accepted, from what it has sent.
    ///
    /// # Errors
    /// When they are not those of a head of this version.
    pub(super) fn read_greeting(&mut self) -> io::Result<()> {
        loop {
            let Link::Greeting {
                preamble, greeted, ..
            } = &mut self.link
            else {
                return Ok(());
            };
            if let Some(open) = preamble {
                let bytes = self.received.split();
                match open.feed(&bytes) {
                    PreambleState::Incomplete => return Ok(()),
                    PreambleState::NotOurs => return Err(io::Error::other("no head dialled")),
                    PreambleState::Open(rest) => {
                        self.received.extend_from_slice(&rest);
                        *preamble = None;
                    }
                }
            }
            let Some(frame) = frame::decode(&mut self.received).map_err(io::Error::other)? else {
                return Ok(());
            };
            if frame.header.kind != Kind::Control {
                return Err(io::Error::other("the head did not greet"));
            }
            match control::decode(&frame.body).map_err(io::Error::other)? {
                ToAgent::Hello(other) if !*greeted => {
                    self.hello.check(&other).map_err(io::Error::other)?;
                    info!(head_pid = other.pid, "another head greeted");
                    self.head_pid = other.pid;
                    *greeted = true;
                }
                ToAgent::Start(start) if *greeted => return self.take_up(&start),
                ToAgent::Alive => {}
                // The head uses its other hosts, and stops this one.
                ToAgent::Stop if *greeted => {
                    self.stop();
                    return Ok(());
                }
                _ => return Err(io::Error::other("the head did not greet")),
            }
        }
    }

    /// Goes on with another head, which has sent its start request.
    fn take_up(&mut self, start: &Start) -> io::Result<()> {
        let name = start.linger.as_ref().map(|linger| linger.name.as_str());
        let ours = self.lingering.as_mut();
        let Some(lingering) = ours.filter(|lingering| Some(lingering.name.as_str()) == name) else {
            return Err(io::Error::other("the head means another cluster"));
        };
        if start.workers != self.start.workers {
            return Err(io::Error::other("the head expects other workers"));
        }
        if let Some(linger) = &start.linger {
            lingering.time = Duration::from_millis(linger.milliseconds);
            lingering.generation = linger.generation;
            lingering.addresses.clone_from(&linger.addresses);
        }
        self.warnings.report_again();
        let _ = fs::remove_file(lingering.directory.join(LOST));
        let timeout = Duration::from_millis(start.heartbeat_timeout.into());
        self.heartbeat =
            (!timeout.is_zero()).then(|| Heartbeat::new(timeout, self.epoch.elapsed()));
        self.start.ranks.clone_from(&start.ranks);
        self.link = Link::Up;
        if start.local {
            self.watch_head();
        }
        let pending = self.workers.iter().map(|process| {
            let process = process.as_ref();
            process.map_or(0, |process| process.outgoing.len())
        });
        let pending: Vec<usize> = pending.collect();
        let chunk_cache_bytes = usize::try_from(start.chunk_cache_bytes).unwrap_or(usize::MAX);
        let states = self.router.attach(chunk_cache_bytes, &pending);
        for (worker, state) in (0..).zip(states) {
            let pid = self.workers[worker as usize]
                .as_ref()
                .map(|process| process.pid);
            if state == Kept::Idle {
                self.report_seed(worker);
            }
            if let Some(message) = state.message(worker, pid) {
                self.report(&message);
            }
        }
        info!(head_pid = self.head_pid, "agent goes on with another head");
        self.on_head_bytes();
        Ok(())
    }

    /// Reports the random number state of a worker to a head that does not know it.
    pub(super) fn report_seed(&mut self, worker: u32) {
        let seed = self.router.seed(worker);
        if let Some(seed) = seed.filter(|_| self.is_linked() && !self.ending) {
            let frame = Frame::new(Kind::Seed, 0, worker, 0, seed);
            self.to_head.push(&frame, None);
        }
    }

    /// Sends the message of a set-up call to the head, or that it is not there.
    pub(super) fn send_call(&mut self, request: u64, call: Option<ReplayedCall>) {
        let parts = call.and_then(|call| {
            let blob = call.blob.map(|id| match self.router.small_blob(id) {
                Some(bytes) => Some(vec![bytes]),
                None => self.memories.chunks(id),
            });
            match blob {
                Some(blob) => Some([blob?, call.pieces].concat()),
                None => Some(call.pieces),
            }
        });
        self.send_parts(request, parts);
    }

    /// Sends to the head what it has asked for, or that it is not there.
    pub(super) fn send_parts(&mut self, request: u64, parts: Option<Vec<Bytes>>) {
        if !self.is_linked() || self.ending {
            return;
        }
        for frame in frames_of(request, parts) {
            self.to_head.push(&frame, None);
        }
    }

    /// Takes a part of the answer to a task of a head that has disconnected.
    pub(super) fn keep(&mut self, frame: Frame) {
        let Header {
            worker,
            flags,
            task,
            ..
        } = frame.header;
        let parts = if flags & BY_REFERENCE == 0 {
            vec![frame.body]
        } else {
            let process = self.workers[worker as usize].as_mut();
            let file = process.and_then(|process| process.descriptors.pop_front());
            let memory = file.map(File::from).filter(memfd::is_sealed);
            let Some(parts) = memory.and_then(|memory| blob_memory::read_all(&memory).ok()) else {
                warn!(task, "an answer in shared memory cannot be read");
                return;
            };
            parts
        };
        if let Some(body) = self.arriving[worker as usize].take(flags, parts) {
            self.keep_answer(task, body);
        }
    }

    /// Keeps the whole answer to a task of a head that has disconnected, if the next head may ask for it. The number of
    /// the task tells what the answer belongs to; the answer itself repeats the tag of the task's message.
    fn keep_answer(&mut self, task: TaskId, body: Vec<Bytes>) {
        let Some(lingering) = self.lingering.as_ref().filter(|_| task & KEEP != 0) else {
            return;
        };
        let kept = self.kept.keep(task, body, lingering.directory());
        if let Err(error) = kept {
            error!(task, %error, "an answer could not be kept");
        }
    }

    /// Lists the kept answers for the head.
    pub(super) fn list_kept(&mut self) {
        let answers = self.kept.list();
        let mut parts = answers.chunks(MAX_LISTED).peekable();
        if parts.peek().is_none() {
            let message = ToHead::KeptAnswers {
                answers: Vec::new(),
                last: true,
            };
            return self.report(&message);
        }
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            self.report(&ToHead::KeptAnswers {
                answers: part.to_vec(),
                last,
            });
        }
    }

    /// Watches the process of a head on this machine, whose stream a fork of it may keep open.
    pub(super) fn watch_head(&mut self) {
        let Some(head) = process::watch(self.head_pid) else {
            return;
        };
        let fd = head.as_raw_fd();
        let registry = self.poll.registry();
        if registry
            .register(&mut SourceFd(&fd), super::PARENT, Interest::READABLE)
            .is_ok()
        {
            self.parent = Some(head);
        }
    }

    /// Registers that the stream is writable again, if it was registered for that.
    pub(super) fn head_is_writable(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.head_blocked) {
            let fd = self.writer.as_raw_fd();
            self.poll.registry().deregister(&mut SourceFd(&fd))?;
        }
        Ok(())
    }

    /// Writes `HEAD_OUT` readiness interest.
    pub(super) fn await_writable(&mut self) {
        self.head_blocked = true;
        let fd = self.writer.as_raw_fd();
        let registry = self.poll.registry();
        let registered = registry.register(&mut SourceFd(&fd), HEAD_OUT, Interest::WRITABLE);
        if registered.is_err() {
            self.head_blocked = false;
            self.disconnect();
        }
    }
}

/// The frames that answer a request of the head with these parts, or with `None`: they are not there.
pub fn frames_of(request: u64, parts: Option<Vec<Bytes>>) -> Vec<Frame> {
    let Some(parts) = parts.filter(|parts| !parts.is_empty()) else {
        return vec![Frame::new(
            Kind::Blob,
            LAST | ABORT,
            0,
            request,
            Bytes::new(),
        )];
    };
    let count = parts.len();
    let frames = parts.into_iter().enumerate().map(|(at, part)| {
        let first = if at == 0 { FIRST } else { 0 };
        let last = if at + 1 == count { LAST } else { 0 };
        Frame::new(Kind::Blob, first | last, 0, request, part)
    });
    frames.collect()
}

/// The state of a worker for a head that is new to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The worker is ready for tasks.
    Idle,
    /// The worker has not ended a task of the head before.
    Busy,
    /// The worker is starting, or being restored.
    Starting,
    /// The worker was stopped by the head before.
    Stopped,
    /// The worker has terminated, and is not replaced.
    Terminated,
}

impl Kept {
    /// What a head is told of a worker in this state, whose process has this pid. `None`: the worker reports itself when
    /// it is ready.
    pub fn message(self, worker: u32, pid: Option<u32>) -> Option<ToHead> {
        Some(match (self, pid) {
            (Kept::Idle, Some(pid)) => ToHead::WorkerUp { worker, pid },
            (Kept::Busy, Some(pid)) => ToHead::WorkerKept { worker, pid },
            (Kept::Stopped, _) => ToHead::WorkerStopped {
                worker,
                timed_out: false,
            },
            (Kept::Terminated, _) => ToHead::WorkerFailed {
                worker,
                failure: WorkerFailure {
                    tail: "the worker ended while its host was not connected to a session, and \
                           could not be restored"
                        .into(),
                    ..WorkerFailure::default()
                },
                replaced: false,
            },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::control::Secret;

    #[test]
    fn an_agent_that_has_not_ended_in_time_leaves_the_directory_to_its_successor() {
        let poll = mio::Poll::new().unwrap();
        let plan = Linger {
            name: format!("rustcluster-test-{}", std::process::id()),
            key: Secret([7; 32]),
            milliseconds: 1000,
            generation: 1,
            addresses: Vec::new(),
        };
        // Nobody reads from its socket, as if it were stopped.
        let first = Lingering::start(&plan, poll.registry()).unwrap();
        assert!(!first.is_superseded());
        let second = Lingering::start(&plan, poll.registry()).unwrap();
        assert!(first.is_superseded() && !second.is_superseded());
        // Its listener has been dialled, which lets it notice that when it goes on.
        assert!(first.listener.accept().is_ok());
        drop(first);
        assert!(socket(second.directory()).exists());
        let directory = second.directory().to_owned();
        drop(second);
        assert!(!directory.exists());
    }
}
