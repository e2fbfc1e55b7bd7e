//! A worker's side of its channel to the agent: blocking, single-threaded, no R in it.
//!
//! SIGINT is how a running task is interrupted, so it must reach R while R runs a task and at no
//! other time. It is blocked from [`Channel::restart`], with which an answer begins, until
//! [`Channel::next_task`] has returned and the task starts. The agent writes a cancel frame before
//! it sends the signal: a signal for a task that is still in the channel's buffer is therefore never
//! lost (the frame is seen before the task starts), and one for a task that has ended is never felt
//! by the next.

use crate::frame::{self, FIRST, Frame, GUEST, Header, Kind, LAST, MAX_BODY};
use crate::message::{self, WorkerReady};
use crate::outbuf::OutBuf;
use crate::scheduler::{Body, TaskId};
use crate::signals;
use crate::sys;
use bytes::{Bytes, BytesMut};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

/// If the next task has lately come so soon, a worker watches for it that long before it sleeps,
/// and gives its core away at every look: to sleep and to be woken would take longer.
const WATCH: Duration = Duration::from_micros(300);

/// The state of a random number generator: the integers of R's `.Random.seed`,
/// little-endian; none if there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    pub bytes: Bytes,
    /// It is not this worker's, and for one task alone.
    pub guest: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    index: u32,
    received: BytesMut,
    /// The task that R has and has not answered.
    task: Option<TaskId>,
    /// A chunk of the answer has been sent.
    begun: bool,
    outgoing: Vec<u8>,
    /// To be put in place before the next task, one after the other.
    seeds_before: Vec<Seed>,
    /// What the task has left, to be told with its answer.
    seed_after: Option<Seed>,
    /// How long the agent has lately let wait for what comes next, on average.
    usual_wait: Duration,
}

impl Channel {
    /// Takes over the stream to the agent. SIGINT is blocked from here on.
    pub fn new(stream: UnixStream, index: u32) -> Channel {
        signals::block_interrupt();
        Channel {
            stream,
            index,
            received: BytesMut::new(),
            task: None,
            begun: false,
            outgoing: Vec::new(),
            seeds_before: Vec::new(),
            seed_after: None,
            usual_wait: Duration::ZERO,
        }
    }

    /// Moves the stream to the lowest free descriptor: in a fork of an agent with many workers
    /// its number may be beyond what `select()` in user code can take.
    ///
    /// # Errors
    /// When descriptors have run out.
    pub fn renumber(&mut self) -> io::Result<()> {
        self.stream = UnixStream::from(sys::duplicate(self.stream.as_raw_fd())?);
        Ok(())
    }

    /// This worker's index on its host.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Tells the agent that this worker can take tasks.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn ready(&mut self, tempdir: String) -> io::Result<()> {
        let frame =
            message::encode_for(self.index, &WorkerReady { tempdir }).map_err(io::Error::other)?;
        self.write(&[&frame])
    }

    /// Reads one control message, before the first task.
    ///
    /// # Errors
    /// When the agent is gone or sends something else.
    pub fn config<M: serde::de::DeserializeOwned>(&mut self) -> io::Result<M> {
        match self.frame()? {
            Some(frame) if frame.header.kind == Kind::Control => {
                message::decode(&frame.body).map_err(io::Error::other)
            }
            _ => Err(io::Error::other("no configuration from the agent")),
        }
    }

    /// Waits for the next task. `None`: the agent wants no more, or is gone.
    ///
    /// # Errors
    /// When the channel breaks or carries something that is not a frame.
    pub fn next_task(&mut self) -> io::Result<Option<Body>> {
        signals::block_interrupt();
        if self.task.is_some() {
            // An interrupt took R out of the task before it could answer.
            self.send(&[], true)?;
        }
        let mut body = Body::default();
        let mut incoming = None;
        while let Some(frame) = self.frame()? {
            let header = frame.header;
            match header.kind {
                Kind::Data if header.flags & frame::ABORT != 0 => {
                    incoming = None;
                    // That of a task which will not come.
                    self.seeds_before.retain(|seed| !seed.guest);
                }
                Kind::Data => {
                    if header.flags & FIRST != 0 {
                        body = Body::default();
                        incoming = Some(header.task);
                    }
                    if incoming != Some(header.task) {
                        return Err(io::Error::other("a chunk of an unknown task"));
                    }
                    body.len += frame.body.len();
                    body.chunks.push_back(frame.body);
                    if header.flags & LAST != 0 {
                        self.task = incoming.take();
                        self.begun = false;
                        // First forget, then look: see the module's documentation.
                        signals::discard_interrupt();
                        if self.cancelled()? {
                            self.send(&[], true)?;
                            self.seeds_before.retain(|seed| !seed.guest);
                            body = Body::default();
                            continue;
                        }
                        return Ok(Some(body));
                    }
                }
                Kind::Seed => {
                    let guest = header.flags & GUEST != 0;
                    let bytes = frame.body;
                    self.seeds_before.push(Seed { bytes, guest });
                }
                // Of a task that has ended.
                Kind::Cancel => {}
                _ => return Err(io::Error::other("a frame that is not for a worker")),
            }
        }
        Ok(None)
    }

    /// The seeds to be put in place, one after the other, before the task that has come.
    pub fn take_seeds(&mut self) -> Vec<Seed> {
        std::mem::take(&mut self.seeds_before)
    }

    /// The task leaves this seed; it is told with the end of its answer.
    pub fn leave_seed(&mut self, seed: Seed) {
        self.seed_after = Some(seed);
    }

    /// Whether a cancel frame for the current task has already arrived.
    fn cancelled(&mut self) -> io::Result<bool> {
        if self.received.is_empty() {
            let mut buffer = [0u8; 4 * 1024];
            match sys::recv_nowait(self.stream.as_raw_fd(), &mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                read => self.received.extend_from_slice(&buffer[..read?]),
            }
        }
        // What may follow besides is the next of the tasks by which this worker is restored.
        let next = Header::decode(&self.received).map_err(io::Error::other)?;
        if next.is_none_or(|header| header.kind != Kind::Cancel) {
            return Ok(false);
        }
        let frame = self.buffered()?;
        Ok(frame.is_some_and(|frame| Some(frame.header.task) == self.task))
    }

    fn buffered(&mut self) -> io::Result<Option<Frame>> {
        frame::decode(&mut self.received).map_err(io::Error::other)
    }

    /// The next frame. `None` at the end of the stream.
    fn frame(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(Some(frame));
            }
            if self.fill()? == 0 {
                return Ok(None);
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut buffer = [0u8; 16 * 1024];
        let began = Instant::now();
        let watch = self.usual_wait <= WATCH;
        let n = loop {
            let read = if watch && began.elapsed() < WATCH {
                sys::recv_nowait(self.stream.as_raw_fd(), &mut buffer)
            } else {
                self.stream.read(&mut buffer)
            };
            match read {
                Ok(n) => break n,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => thread::yield_now(),
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => break 0,
                    _ => return Err(error),
                },
            }
        };
        self.usual_wait = (3 * self.usual_wait + began.elapsed()) / 4;
        self.received.extend_from_slice(&buffer[..n]);
        Ok(n)
    }

    /// Whether R has a task that is not answered.
    pub fn is_busy(&self) -> bool {
        self.task.is_some()
    }

    /// An answer starts, or starts anew: what was sent of it does not count. SIGINT is blocked from
    /// here on.
    pub fn restart(&mut self) {
        signals::block_interrupt();
        self.begun = false;
        self.outgoing.clear();
    }

    /// Appends to the current task's answer; `last` ends it. SIGINT must be blocked.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn send(&mut self, mut bytes: &[u8], last: bool) -> io::Result<()> {
        let Some(task) = self.task else {
            return Ok(());
        };
        while self.outgoing.len() + bytes.len() > MAX_BODY {
            let (now, later) = bytes.split_at(MAX_BODY - self.outgoing.len());
            self.outgoing.extend_from_slice(now);
            self.flush(task, false)?;
            bytes = later;
        }
        self.outgoing.extend_from_slice(bytes);
        if last {
            self.flush(task, true)?;
            self.task = None;
        }
        Ok(())
    }

    fn flush(&mut self, task: TaskId, last: bool) -> io::Result<()> {
        let first = !std::mem::replace(&mut self.begun, true);
        let flags = if first { FIRST } else { 0 } | if last { LAST } else { 0 };
        let body = Bytes::from(std::mem::take(&mut self.outgoing));
        let answer = Frame::new(Kind::Data, flags, self.index, task, body);
        let seed = if last { self.seed_after.take() } else { None };
        match seed {
            Some(seed) => {
                let flags = if seed.guest { GUEST } else { 0 };
                let seed = Frame::new(Kind::Seed, flags, self.index, task, seed.bytes);
                self.write(&[&seed, &answer])
            }
            None => self.write(&[&answer]),
        }
    }

    fn write(&mut self, frames: &[&Frame]) -> io::Result<()> {
        let mut out = OutBuf::default();
        for frame in frames {
            out.push(frame);
        }
        while !out.is_empty() {
            match out.write_with(|slices| sys::send(self.stream.as_raw_fd(), slices)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}
