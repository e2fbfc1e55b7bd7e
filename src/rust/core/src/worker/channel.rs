//! The worker's side of its channel to the agent: blocking, single-threaded, without R.
//!
//! SIGINT interrupts a running task, so it must reach R while R runs a task and at no other time.
//! SIGINT is blocked from [`Channel::restart`], with which an answer begins, until
//! [`Channel::next_task`] has returned and the task starts. The agent writes a cancel frame before
//! it sends the signal. A signal for a task that is still in the channel's buffer is therefore never
//! lost, because the worker sees the frame before the task starts, and a signal for a task that has
//! ended never interrupts the next task.

use crate::platform::{fd, signals};
use crate::protocol::body::Body;
use crate::protocol::control::{self, WorkerReady};
use crate::protocol::frame::{
    self, ABORT, BY_REFERENCE, FIRST, Frame, Header, Kind, LAST, MAX_BODY, REASSIGNED,
};
use crate::protocol::ids::{BlobId, TaskId};
use crate::protocol::send_queue::OutBuf;
use crate::protocol::truncate;
use bytes::{Bytes, BytesMut};
use memmap2::MmapOptions;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};
use tracing::debug;

/// How long a worker polls for the next task before it sleeps, if recent tasks arrived within this time. The
/// worker yields its core at every poll. Sleeping and being woken would take longer.
const MAX_POLL: Duration = Duration::from_micros(200);

/// Minimum number of cores of a machine on which workers poll. A round trip occupies the head, the agent and
/// a worker: with fewer cores, a worker that polls shares a core with the head's R code, which then takes
/// twice as long.
const MIN_CORES_TO_POLL: usize = 3;

/// Whether the machine has [`MIN_CORES_TO_POLL`] cores. The agent evaluates this before its first fork, so
/// that no worker has to.
pub static MAY_POLL: LazyLock<bool> = LazyLock::new(|| {
    thread::available_parallelism().is_ok_and(|cores| cores.get() >= MIN_CORES_TO_POLL)
});

/// Number of errors of a task, which may be a batch, of which the head is told at once.
const ERRORS_AT_ONCE: u32 = 16;
/// Maximum number of further errors that wait for the answer.
const MAX_HELD: usize = 256;

/// The state of a random number generator: the integers of R's `.Random.seed`, little-endian. Empty
/// if R has no `.Random.seed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Four bytes for each integer.
    pub bytes: Bytes,
    /// The state belongs to another worker, and applies to one reassigned task only.
    pub reassigned: bool,
}

/// A broadcast variable, with which many messages begin. Unless the blob is small, its bytes are in sealed
/// memory that all workers of a host share.
#[derive(Clone, Debug, Default)]
pub struct Blob {
    /// Identifies the bytes for the lifetime of the cluster.
    pub id: BlobId,
    /// The content.
    pub bytes: Bytes,
    /// The shared memory that contains the bytes, if it is shared; it can be mapped again.
    pub memory: Option<Arc<File>>,
}

impl PartialEq for Blob {
    fn eq(&self, other: &Blob) -> bool {
        self.id == other.id && self.bytes == other.bytes
    }
}

impl Eq for Blob {}

/// The message of a task: the bytes of its blob, if it has one, followed by those of its body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskMessage {
    /// The blob with which the message begins, if it has one.
    pub blob: Option<Blob>,
    /// The rest of the message.
    pub body: Body,
}

/// Maximum number of descriptors that were received before the frames to which they belong.
const MAX_DESCRIPTORS: usize = 16;

/// See the module's documentation.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    index: u32,
    /// Large answers may be sent in shared memory.
    pub shared_answers: bool,
    received: BytesMut,
    /// Received descriptors that belong to frames that have not been decoded.
    descriptors: VecDeque<OwnedFd>,
    /// The last blob that the agent has sent.
    blob: Option<Blob>,
    /// The beginning of a blob that the agent is sending without shared memory.
    partial_blob: Vec<u8>,
    /// The task that R is running and has not answered.
    task: Option<TaskId>,
    /// A chunk of the answer has been sent.
    answer_started: bool,
    outgoing: Vec<u8>,
    /// The number of errors of the current task, which may be a batch, that the head has been told of at once.
    errors_told: u32,
    /// Errors of the current task that are sent with its answer.
    errors_held: Vec<Frame>,
    /// Seeds to set before the next task, in order.
    seeds_before: Vec<Seed>,
    /// The seed after the task, to be sent with its answer.
    seed_after: Option<Seed>,
    /// How long the worker has recently waited for the agent, on average.
    average_wait: Duration,
    /// The id of the process that serves tasks.
    owner: u32,
}

/// Maps the shared memory of a blob.
fn map(file: &File, len: u64) -> io::Result<Bytes> {
    // Reading beyond the end of the file would kill the process.
    if file.metadata()?.len() != len {
        return Err(io::Error::other("a blob of unexpected length"));
    }
    // SAFETY: the file has no name, and the agent has sealed it, so nobody writes to it or truncates it.
    // The mapping is private and read-only.
    let map = unsafe { MmapOptions::new().map_copy_read_only(file)? };
    // The advice is optional, so its failure is ignored.
    let _ = map.advise(memmap2::Advice::Sequential);
    Ok(Bytes::from_owner(map))
}

impl Channel {
    /// Takes over the stream to the agent. SIGINT is blocked from here on.
    pub fn new(stream: UnixStream, index: u32) -> Channel {
        signals::block_interrupt();
        Channel {
            stream,
            index,
            shared_answers: false,
            received: BytesMut::new(),
            descriptors: VecDeque::new(),
            blob: None,
            partial_blob: Vec::new(),
            task: None,
            answer_started: false,
            outgoing: Vec::new(),
            errors_told: 0,
            errors_held: Vec::new(),
            seeds_before: Vec::new(),
            seed_after: None,
            average_wait: Duration::ZERO,
            owner: std::process::id(),
        }
    }

    /// Moves the stream to the lowest free descriptor. In a fork of an agent with many workers, its
    /// number may be too large for `select()` in user code.
    ///
    /// # Errors
    /// When no descriptor is free.
    pub fn renumber(&mut self) -> io::Result<()> {
        self.stream = self.stream.try_clone()?;
        Ok(())
    }

    /// This worker's index on its host.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Reports the temporary directory of this worker to the agent, and whether the worker can take tasks.
    ///
    /// # Errors
    /// When the agent has terminated.
    pub fn ready(&mut self, tempdir: String, ready: bool) -> io::Result<()> {
        self.owner = std::process::id();
        debug!(ready, "worker reports to its agent");
        let message = WorkerReady { tempdir, ready };
        let frame = control::encode_for(self.index, &message).map_err(io::Error::other)?;
        self.write(&[&frame])
    }

    /// Reads one control message, before the first task.
    ///
    /// # Errors
    /// When the agent has terminated or sends another kind of frame.
    pub fn config<M: serde::de::DeserializeOwned>(&mut self) -> io::Result<M> {
        match self.frame()? {
            Some(frame) if frame.header.kind == Kind::Control => {
                control::decode(&frame.body).map_err(io::Error::other)
            }
            _ => Err(io::Error::other("no configuration from the agent")),
        }
    }

    /// Waits for the next task. `None`: the agent has closed the channel or terminated.
    ///
    /// # Errors
    /// When the channel breaks or carries an invalid frame.
    pub fn next_task(&mut self) -> io::Result<Option<TaskMessage>> {
        signals::block_interrupt();
        if self.task.is_some() {
            // An interrupt took R out of the task before it could answer.
            self.send(&[], true)?;
        }
        let mut next = TaskMessage::default();
        let mut incoming = None;
        while let Some(frame) = self.frame()? {
            let header = frame.header;
            match header.kind {
                Kind::Data if header.flags & ABORT != 0 => {
                    incoming = None;
                    // The aborted task will not run, so neither will its seed be needed.
                    self.seeds_before.retain(|seed| !seed.reassigned);
                }
                Kind::Data => {
                    if header.flags & FIRST != 0 {
                        next = TaskMessage::default();
                        incoming = Some(header.task);
                    }
                    if incoming != Some(header.task) {
                        return Err(io::Error::other("a chunk of an unknown task"));
                    }
                    if header.flags & BY_REFERENCE != 0 {
                        let named = |blob: &&Blob| Some(blob.id) == frame.number();
                        let blob = self.blob.as_ref().filter(named);
                        let missing = || io::Error::other("a message refers to an unknown blob");
                        next.blob = Some(blob.ok_or_else(missing)?.clone());
                    } else {
                        next.body.len += frame.body.len();
                        next.body.chunks.push_back(frame.body);
                    }
                    if header.flags & LAST != 0 {
                        self.task = incoming.take();
                        self.answer_started = false;
                        self.errors_told = 0;
                        self.errors_held.clear();
                        // Discard the signal before looking for the cancel frame; otherwise a signal
                        // that arrives in between would be lost. See the module's documentation.
                        signals::discard_interrupt();
                        debug!(task = header.task, bytes = next.body.len, "task received");
                        if self.cancelled()? {
                            debug!(task = header.task, "task was cancelled before it started");
                            self.send(&[], true)?;
                            self.seeds_before.retain(|seed| !seed.reassigned);
                            next = TaskMessage::default();
                            continue;
                        }
                        return Ok(Some(next));
                    }
                }
                Kind::Blob => {
                    // Drop the previous blob first, so that the two do not occupy memory at once.
                    self.blob = None;
                    if header.flags & ABORT == 0 {
                        self.blob = self.receive_blob(frame)?;
                    }
                }
                Kind::Seed => {
                    let reassigned = header.flags & REASSIGNED != 0;
                    let bytes = frame.body;
                    self.seeds_before.push(Seed { bytes, reassigned });
                }
                // The cancelled task has already ended.
                Kind::Cancel => {}
                _ => return Err(io::Error::other("a frame that is not for a worker")),
            }
        }
        Ok(None)
    }

    /// Handles a frame of a blob. Returns the blob if this is its last frame.
    fn receive_blob(&mut self, frame: Frame) -> io::Result<Option<Blob>> {
        let Header {
            task: id, flags, ..
        } = frame.header;
        if flags & BY_REFERENCE == 0 {
            let memory = None;
            if flags & (FIRST | LAST) == FIRST | LAST {
                let bytes = frame.body;
                return Ok(Some(Blob { id, bytes, memory }));
            }
            if flags & FIRST != 0 {
                self.partial_blob = Vec::new();
            }
            let more = self.partial_blob.try_reserve(frame.body.len());
            more.map_err(|_| io::Error::other("no memory for what all tasks have in common"))?;
            self.partial_blob.extend_from_slice(&frame.body);
            if flags & LAST == 0 {
                return Ok(None);
            }
            let bytes = Bytes::from(std::mem::take(&mut self.partial_blob));
            return Ok(Some(Blob { id, bytes, memory }));
        }
        let descriptor = self.descriptors.pop_front();
        let (Some(descriptor), Some(len)) = (descriptor, frame.number()) else {
            return Err(io::Error::other("a blob without its shared memory"));
        };
        let memory = File::from(descriptor);
        let bytes = map(&memory, len)?;
        let memory = Some(Arc::new(memory));
        Ok(Some(Blob { id, bytes, memory }))
    }

    /// Takes the seeds to set, in order, before the received task.
    pub fn take_seeds(&mut self) -> Vec<Seed> {
        std::mem::take(&mut self.seeds_before)
    }

    /// Records the seed after the task, which is sent with the end of the answer.
    pub fn leave_seed(&mut self, seed: Seed) {
        self.seed_after = Some(seed);
    }

    /// Whether a cancel frame for the current task has already arrived.
    fn cancelled(&mut self) -> io::Result<bool> {
        if self.received.is_empty() {
            let mut buffer = [0u8; 4 * 1024];
            match self.recv(&mut buffer, false) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                read => self.received.extend_from_slice(&buffer[..read?]),
            }
        }
        // While a worker is restored, the next set-up call may follow instead of a cancel frame.
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

    /// Reads some bytes, and keeps the descriptors that were sent with them.
    fn recv(&mut self, buffer: &mut [u8], wait: bool) -> io::Result<usize> {
        let mut came = Vec::new();
        let n = fd::recv(self.stream.as_raw_fd(), buffer, &mut came, wait)?;
        self.descriptors.extend(came);
        if self.descriptors.len() > MAX_DESCRIPTORS {
            self.descriptors.clear();
            return Err(io::Error::other("unexpected descriptors"));
        }
        Ok(n)
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut buffer = [0u8; 16 * 1024];
        let began = Instant::now();
        let poll = *MAY_POLL && self.average_wait <= MAX_POLL;
        let n = loop {
            let again = poll && began.elapsed() < MAX_POLL;
            match self.recv(&mut buffer, !again) {
                Ok(n) => break n,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => thread::yield_now(),
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => break 0,
                    _ => return Err(error),
                },
            }
        };
        // The bound lets a few short waits after a long pause suffice to resume polling.
        self.average_wait = ((3 * self.average_wait + began.elapsed()) / 4).min(4 * MAX_POLL);
        self.received.extend_from_slice(&buffer[..n]);
        Ok(n)
    }

    /// Whether R is running a task that is not answered.
    pub fn is_busy(&self) -> bool {
        self.task.is_some()
    }

    /// Starts or restarts an answer. Frames of an earlier attempt do not count, because the first frame of
    /// an answer replaces them. Blocks SIGINT.
    pub fn restart(&mut self) {
        signals::block_interrupt();
        self.answer_started = false;
        self.outgoing.clear();
    }

    /// Appends to the answer of the current task; `last` completes the answer. SIGINT must be blocked.
    ///
    /// # Errors
    /// When the agent has terminated.
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
            debug!(task, "task answered");
            self.task = None;
        }
        Ok(())
    }

    /// Sends a progress event of the current task to the head: see [`Kind::ProgressEvent`]. Returns whether
    /// there is a current task.
    ///
    /// # Errors
    /// When the agent has terminated.
    pub fn report(&mut self, bytes: &[u8]) -> io::Result<bool> {
        // A fork of the worker inherits the channel and must not use it.
        let Some(task) = self.task.filter(|_| self.owner == std::process::id()) else {
            return Ok(false);
        };
        let count = bytes.chunks(MAX_BODY).count();
        for (at, chunk) in bytes.chunks(MAX_BODY).enumerate() {
            let first = if at == 0 { FIRST } else { 0 };
            let last = if at + 1 == count { LAST } else { 0 };
            let body = Bytes::copy_from_slice(chunk);
            let frame = Frame::new(Kind::ProgressEvent, first | last, self.index, task, body);
            self.write(&[&frame])?;
        }
        Ok(true)
    }

    /// Tells the head that the current task has raised an error with this message: see [`Kind::TaskError`]. Each of
    /// the first [`ERRORS_AT_ONCE`] is sent at once, and the others with the answer: the elements of a batch may fail
    /// faster than errors can be sent one by one.
    ///
    /// # Errors
    /// When the agent has terminated.
    pub fn raised(&mut self, message: &str) -> io::Result<()> {
        // A fork of the worker inherits the channel and must not use it.
        let Some(task) = self.task.filter(|_| self.owner == std::process::id()) else {
            return Ok(());
        };
        let text = truncate::beginning(message, truncate::MAX_ERROR);
        let body = Bytes::copy_from_slice(text.as_bytes());
        let frame = Frame::new(Kind::TaskError, 0, self.index, task, body);
        if self.errors_told < ERRORS_AT_ONCE {
            self.errors_told += 1;
            return self.write(&[&frame]);
        }
        self.errors_held.push(frame);
        if self.errors_held.len() < MAX_HELD {
            return Ok(());
        }
        self.tell_held()
    }

    fn tell_held(&mut self) -> io::Result<()> {
        let held = std::mem::take(&mut self.errors_held);
        self.write(&held.iter().collect::<Vec<_>>())
    }

    fn flush(&mut self, task: TaskId, last: bool) -> io::Result<()> {
        let first = !std::mem::replace(&mut self.answer_started, true);
        let flags = if first { FIRST } else { 0 } | if last { LAST } else { 0 };
        let body = Bytes::from(std::mem::take(&mut self.outgoing));
        let answer = Frame::new(Kind::Data, flags, self.index, task, body);
        if last {
            self.tell_held()?;
        }
        let seed = if last { self.take_seed(task) } else { None };
        match seed {
            Some(seed) => self.write(&[&seed, &answer]),
            None => self.write(&[&answer]),
        }
    }

    /// Takes the frame with the seed after the task, if there is one.
    fn take_seed(&mut self, task: TaskId) -> Option<Frame> {
        let seed = self.seed_after.take()?;
        let flags = if seed.reassigned { REASSIGNED } else { 0 };
        Some(Frame::new(Kind::Seed, flags, self.index, task, seed.bytes))
    }

    /// Answers the current task with the content of this sealed memory. SIGINT must be blocked. Returns
    /// whether the memory could be sent; otherwise the caller must send the answer in frames.
    ///
    /// # Errors
    /// When the agent has terminated.
    pub fn send_shared_answer(&mut self, memory: &File, len: u64) -> io::Result<bool> {
        let Some(task) = self.task else {
            return Ok(true);
        };
        self.tell_held()?;
        if let Some(seed) = self.take_seed(task) {
            self.write(&[&seed])?;
        }
        let body = Bytes::copy_from_slice(&len.to_le_bytes());
        let frame = Frame::new(
            Kind::Data,
            FIRST | LAST | BY_REFERENCE,
            self.index,
            task,
            body,
        );
        let mut out = OutBuf::default();
        out.push(&frame);
        let fd = self.stream.as_raw_fd();
        let mut along = Some(memory.as_raw_fd());
        while !out.is_empty() {
            match out.write_with(|slices| fd::send_with(fd, slices, along)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => along = None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The system limits the number of descriptors in flight.
                Err(error) if along.is_some() && error.raw_os_error() != Some(libc::EPIPE) => {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        debug!(task, bytes = len, "task answered in shared memory");
        self.task = None;
        Ok(true)
    }

    fn write(&mut self, frames: &[&Frame]) -> io::Result<()> {
        let mut out = OutBuf::default();
        for frame in frames {
            out.push(frame);
        }
        while !out.is_empty() {
            match out.write_with(|slices| fd::send(self.stream.as_raw_fd(), slices)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::memfd;
    use std::io::{IoSlice, Write};

    struct Agent(UnixStream);

    impl Agent {
        fn new() -> (Agent, Channel) {
            let (ours, theirs) = UnixStream::pair().unwrap();
            (Agent(ours), Channel::new(theirs, 0))
        }

        fn send(&self, frame: &Frame, along: Option<&File>) {
            let header = frame.header.to_bytes();
            let slices = [IoSlice::new(&header), IoSlice::new(&frame.body)];
            let along = along.map(AsRawFd::as_raw_fd);
            let sent = fd::send_with(self.0.as_raw_fd(), &slices, along).unwrap();
            assert_eq!(sent, frame.wire_len());
        }

        fn hand(&self, id: BlobId, bytes: &[u8], announced: usize) {
            let mut file = memfd::memory_file().unwrap();
            file.write_all(bytes).unwrap();
            memfd::seal(&file).unwrap();
            let len = Bytes::copy_from_slice(&(announced as u64).to_le_bytes());
            let frame = Frame::new(Kind::Blob, FIRST | LAST | BY_REFERENCE, 0, id, len);
            self.send(&frame, Some(&file));
        }
    }

    fn next(channel: &mut Channel) -> (Vec<u8>, Vec<u8>) {
        let task = channel.next_task().unwrap().unwrap();
        channel.send(b"answer", true).unwrap();
        let blob = task.blob.map(|blob| blob.bytes.to_vec());
        let chunks = task.body.chunks.into_iter().flatten();
        (blob.unwrap_or_default(), chunks.collect())
    }

    fn data(task: u64, flags: u8, bytes: &'static [u8]) -> Frame {
        Frame::new(Kind::Data, flags, 0, task, Bytes::from_static(bytes))
    }

    #[test]
    fn messages_begin_with_the_blob_that_they_refer_to() {
        let (agent, mut channel) = Agent::new();
        let large = vec![7; 200_000];
        agent.hand(3, &large, large.len());
        agent.send(&Frame::blob_reference(0, 1, 3, true), None);
        assert_eq!(next(&mut channel), (large.clone(), Vec::new()));
        agent.send(&Frame::blob_reference(0, 2, 3, false), None);
        agent.send(&data(2, 0, b"inline "), None);
        agent.send(&data(2, LAST, b"part"), None);
        assert_eq!(next(&mut channel), (large, b"inline part".to_vec()));
        agent.send(&data(3, FIRST | LAST, b"no blob"), None);
        assert_eq!(next(&mut channel), (Vec::new(), b"no blob".to_vec()));
        let small = Bytes::from_static(b"small");
        let small = Frame::new(Kind::Blob, FIRST | LAST, 0, 4, small);
        agent.send(&small, None);
        agent.send(&Frame::blob_reference(0, 4, 4, true), None);
        assert_eq!(next(&mut channel), (b"small".to_vec(), Vec::new()));
        assert!(channel.blob.is_some() && channel.descriptors.is_empty());
        // The agent withdraws the blob.
        agent.send(&data(9, LAST | ABORT, b""), None);
        agent.send(
            &Frame::new(Kind::Blob, LAST | ABORT, 0, 4, Bytes::new()),
            None,
        );
        agent.send(&data(5, FIRST | LAST, b"x"), None);
        next(&mut channel);
        assert_eq!(channel.blob, None);
        agent.send(&Frame::blob_reference(0, 6, 4, true), None);
        assert!(channel.next_task().is_err());
    }

    #[test]
    fn each_of_many_blobs_in_a_row_belongs_to_its_task() {
        let (agent, mut channel) = Agent::new();
        let sender = thread::spawn(move || {
            for id in 0..60u64 {
                agent.hand(id, &vec![id as u8; 70_000], 70_000);
                agent.send(&Frame::blob_reference(0, id, id, true), None);
            }
            agent
        });
        for id in 0..60 {
            assert_eq!(next(&mut channel).0, vec![id as u8; 70_000]);
            assert!(channel.descriptors.len() <= 2);
        }
        sender.join().unwrap();
    }

    #[test]
    fn a_blob_without_its_memory_or_of_another_length_is_an_error() {
        for announced in [0, 99_999, 100_001, usize::MAX] {
            let (agent, mut channel) = Agent::new();
            agent.hand(3, &[1; 100_000], announced);
            agent.send(&Frame::blob_reference(0, 1, 3, true), None);
            assert!(channel.next_task().is_err());
        }
        let (agent, mut channel) = Agent::new();
        let frame = Frame::new(
            Kind::Blob,
            FIRST | LAST | BY_REFERENCE,
            0,
            3,
            Bytes::copy_from_slice(&5u64.to_le_bytes()),
        );
        agent.send(&frame, None);
        assert!(channel.next_task().is_err());
    }

    #[test]
    fn an_answer_in_shared_memory_is_sent_with_its_descriptor_after_the_seed() {
        let (agent, mut channel) = Agent::new();
        agent.send(&data(3, FIRST | LAST, b"task"), None);
        channel.next_task().unwrap().unwrap();
        let mut file = memfd::memory_file().unwrap();
        file.write_all(b"in memory").unwrap();
        assert!(!memfd::is_sealed(&file));
        memfd::seal(&file).unwrap();
        assert!(memfd::is_sealed(&file));
        let bytes = Bytes::from_static(b"seed");
        channel.leave_seed(Seed {
            bytes,
            reassigned: false,
        });
        channel.restart();
        assert!(channel.send_shared_answer(&file, 9).unwrap());
        assert!(!channel.is_busy());
        let (mut buffer, mut came, mut received) = ([0; 99], Vec::new(), BytesMut::new());
        let mut frames = Vec::new();
        while frames.len() < 2 {
            let n = fd::recv(agent.0.as_raw_fd(), &mut buffer, &mut came, true).unwrap();
            received.extend_from_slice(&buffer[..n]);
            while let Some(frame) = frame::decode(&mut received).unwrap() {
                frames.push(frame);
            }
        }
        assert_eq!(frames[0].header.kind, Kind::Seed);
        assert_eq!(frames[1].header.flags, FIRST | LAST | BY_REFERENCE);
        assert_eq!((frames[1].number(), came.len()), (Some(9), 1));
        // The next answer is like any other.
        agent.send(&data(4, FIRST | LAST, b"task"), None);
        assert_eq!(next(&mut channel).1, b"task");
        // Without a task, nothing is sent; without an agent, sending is an error.
        assert!(channel.send_shared_answer(&file, 9).unwrap());
        agent.send(&data(5, FIRST | LAST, b"task"), None);
        channel.next_task().unwrap().unwrap();
        drop(agent);
        assert!(channel.send_shared_answer(&file, 9).is_err());
    }

    #[test]
    fn unexpected_descriptors_are_closed() {
        let (agent, mut channel) = Agent::new();
        let (mine, theirs) = UnixStream::pair().unwrap();
        let along = File::from(OwnedFd::from(theirs));
        let sender = thread::spawn(move || {
            for _ in 0..=MAX_DESCRIPTORS {
                agent.send(&data(9, LAST | ABORT, b""), Some(&along));
            }
            agent
        });
        assert!(channel.next_task().is_err());
        assert!(channel.descriptors.is_empty());
        drop(channel);
        drop(sender.join().unwrap());
        // The last copy of the other end is closed.
        let end = fd::recv(mine.as_raw_fd(), &mut [0; 9], &mut Vec::new(), true);
        assert_eq!(end.unwrap(), 0);
    }

    #[test]
    fn errors_of_tasks_are_told_and_cut() {
        let (agent, mut channel) = Agent::new();
        channel.raised("no task").unwrap();
        agent.send(&data(3, FIRST | LAST, b"task"), None);
        channel.next_task().unwrap().unwrap();
        channel.raised(&"é".repeat(truncate::MAX_ERROR)).unwrap();
        let (mut buffer, mut received) = ([0; 2000], BytesMut::new());
        let n = fd::recv(agent.0.as_raw_fd(), &mut buffer, &mut Vec::new(), true).unwrap();
        received.extend_from_slice(&buffer[..n]);
        let frame = frame::decode(&mut received).unwrap().unwrap();
        assert_eq!((frame.header.kind, frame.header.task), (Kind::TaskError, 3));
        let text = "é".repeat(truncate::MAX_ERROR / 2);
        assert_eq!((&frame.body[..], received.len()), (text.as_bytes(), 0));
        // Further ones come with the answer, before its end.
        let count = ERRORS_AT_ONCE as usize + MAX_HELD + 10;
        let worker = thread::spawn(move || {
            for _ in 1..count {
                channel.raised("no").unwrap();
            }
            assert_eq!(channel.errors_held.len(), 10);
            channel.restart();
            channel.send(b"answer", true).unwrap();
            assert!(channel.errors_held.is_empty());
            channel
        });
        let mut kinds = Vec::new();
        while kinds.last() != Some(&Kind::Data) {
            let n = fd::recv(agent.0.as_raw_fd(), &mut buffer, &mut Vec::new(), true).unwrap();
            received.extend_from_slice(&buffer[..n]);
            while let Some(frame) = frame::decode(&mut received).unwrap() {
                kinds.push(frame.header.kind);
            }
        }
        assert_eq!(kinds.len(), count);
        let mut channel = worker.join().unwrap();
        agent.send(&data(4, FIRST | LAST, b"task"), None);
        channel.next_task().unwrap().unwrap();
        assert_eq!(channel.errors_told, 0);
    }
}
