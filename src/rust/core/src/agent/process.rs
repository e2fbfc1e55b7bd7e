//! A worker's process as its agent sees it, and how a separate R process is started for a worker.

use crate::platform::exit::Exit;
use crate::platform::{fd, process, signals};
use crate::protocol::control::{self, Start, WorkerConfig};
use crate::protocol::frame::Frame;
use crate::protocol::send_queue::OutBuf;
use crate::worker::channel::Channel;
use bytes::BytesMut;
use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Maximum number of bytes of a worker's output that error messages show.
const STDERR_TAIL: usize = 4 * 1024;

/// The last [`STDERR_TAIL`] bytes of a worker's output.
#[derive(Debug, Default)]
pub struct Tail {
    bytes: VecDeque<u8>,
    /// The number of bytes at the end that have not been taken.
    fresh: usize,
}

impl Tail {
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(STDERR_TAIL)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(STDERR_TAIL);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
        self.fresh = (self.fresh + bytes.len()).min(STDERR_TAIL);
    }

    pub fn text(&self) -> String {
        self.last(self.bytes.len())
    }

    /// What was written since the last call.
    pub fn take_fresh(&mut self) -> String {
        let fresh = std::mem::take(&mut self.fresh);
        self.last(fresh)
    }

    fn last(&self, len: usize) -> String {
        let start = self.bytes.len().saturating_sub(len);
        let bytes: Vec<u8> = self.bytes.range(start..).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Maximum number of bytes of a line that are buffered until its end.
const MAX_LINE: usize = 64 * 1024;

/// Buffers a worker's output for a file to which others also write. Complete lines are written with one
/// write.
#[derive(Debug, Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// Writes complete lines. A line without an end is buffered, unless it is longer than [`MAX_LINE`].
    pub fn push(&mut self, bytes: &[u8], to: &mut impl Write) -> io::Result<()> {
        let end = bytes.iter().rposition(|byte| *byte == b'\n');
        let (whole, rest) = bytes.split_at(end.map_or(0, |end| end + 1));
        self.0.extend_from_slice(whole);
        let written = if whole.is_empty() {
            Ok(())
        } else {
            self.flush(to)
        };
        self.0.extend_from_slice(rest);
        if self.0.len() < MAX_LINE {
            return written;
        }
        self.flush(to)
    }

    /// Writes the buffered bytes, after which no output follows.
    pub fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&std::mem::take(&mut self.0))
    }
}

/// The queue of frames to be written to a worker, with the descriptors that accompany some of them.
#[derive(Debug, Default)]
pub struct Outgoing {
    /// The parts in order. The descriptor of a part is sent with its first byte.
    parts: VecDeque<(Option<Arc<File>>, OutBuf)>,
    len: usize,
}

impl Outgoing {
    /// Number of queued bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a frame, and a descriptor to be sent with it.
    pub fn push(&mut self, frame: &Frame, along: Option<Arc<File>>) {
        self.len += frame.wire_len();
        if along.is_some() || self.parts.is_empty() {
            self.parts.push_back((along, OutBuf::default()));
        }
        if let Some((_, out)) = self.parts.back_mut() {
            out.push(frame);
        }
    }

    /// Writes as many bytes as the socket takes at once, and returns their number.
    ///
    /// # Errors
    /// The errors of the socket; `WouldBlock` if it is full.
    pub fn write(&mut self, fd: RawFd) -> io::Result<usize> {
        self.write_with(|slices, along| fd::send_with(fd, slices, along))
    }

    /// Writes like [`Outgoing::write`], by calling `write` with the bytes and their descriptor.
    ///
    /// # Errors
    /// The errors of `write`.
    pub fn write_with(
        &mut self,
        write: impl FnOnce(&[io::IoSlice<'_>], Option<RawFd>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let Some((along, out)) = self.parts.front_mut() else {
            return Ok(0);
        };
        let with = along.as_ref().map(AsRawFd::as_raw_fd);
        let written = out.write_with(|slices| write(slices, with))?;
        if written > 0 {
            *along = None;
        }
        self.len -= written;
        // The last part is reused: usually it is the only one.
        if out.is_empty() && self.parts.len() > 1 {
            self.parts.pop_front();
        }
        Ok(written)
    }
}

/// Whether the path could be that of a temporary directory of R. The agent removes the directory with its
/// content, so a misbehaving worker must not be able to name another directory.
pub fn is_tempdir(path: &str) -> bool {
    let path = Path::new(path);
    let name = path.file_name().and_then(|name| name.to_str());
    path.is_absolute() && name.is_some_and(|name| name.starts_with("Rtmp"))
}

/// See the module's documentation.
pub struct Process {
    pub pid: u32,
    pub channel: UnixStream,
    /// The worker's stdout and stderr.
    pub output: File,
    pub received: BytesMut,
    /// Received descriptors that belong to frames that have not been passed on.
    pub descriptors: VecDeque<OwnedFd>,
    pub outgoing: Outgoing,
    pub tail: Tail,
    /// Output for the cluster's `outfile`.
    pub lines: Lines,
    pub tempdir: Option<String>,
    /// Send SIGINT once `outgoing` is written.
    pub interrupt: bool,
    /// Close the channel once `outgoing` is written.
    pub closing: bool,
    /// The worker has closed its end of the channel.
    pub hung_up: bool,
    /// The channel is full.
    pub write_blocked: bool,
    /// The agent has killed the worker.
    pub killed: Cell<bool>,
}

/// The result of creating a worker, in either process.
#[allow(
    clippy::large_enum_variant,
    reason = "the value is destructured where it is created"
)]
pub enum NewProcess {
    Parent(Process),
    /// This process is the worker. Only after a fork.
    Child(Channel),
}

impl Process {
    pub fn new(pid: u32, channel: UnixStream, output: OwnedFd) -> io::Result<Process> {
        channel.set_nonblocking(true)?;
        fd::set_nonblocking(output.as_raw_fd(), true)?;
        Ok(Process {
            pid,
            channel,
            output: output.into(),
            received: BytesMut::new(),
            descriptors: VecDeque::new(),
            outgoing: Outgoing::default(),
            tail: Tail::default(),
            lines: Lines::default(),
            tempdir: None,
            interrupt: false,
            closing: false,
            hung_up: false,
            write_blocked: false,
            killed: Cell::new(false),
        })
    }

    /// Sends a signal to the worker alone. A worker that has just ended is no error.
    pub fn signal(&self, signal: libc::c_int) {
        let _ = signals::kill(self.pid as i32, signal);
    }

    /// Whether the worker was killed by another process than the agent, given how it ended.
    pub fn was_killed_by_others(&self, exit: Exit) -> bool {
        exit == Exit::Signal(libc::SIGKILL) && !self.killed.get()
    }

    /// Kills the worker and the processes that it started, except those that left its process group.
    pub fn kill(&self) {
        self.killed.set(true);
        self.kill_group();
    }

    /// Kills the process group like [`Process::kill`], when the worker has ended by itself.
    pub fn kill_group(&self) {
        // The group does not exist if the worker has not created it yet.
        let _ = signals::kill(-(self.pid as i32), libc::SIGKILL);
        self.signal(libc::SIGKILL);
    }
}

/// Starts a worker as a separate R process, whose stdin is its channel. `handled`: the signal dispositions
/// before the agent changed them, which the worker gets back.
pub fn spawn(
    start: &Start,
    worker: u32,
    shared_answers: bool,
    handled: signals::Saved,
) -> io::Result<NewProcess> {
    let (ours, theirs) = UnixStream::pair()?;
    let (output, output_end) = fd::pipe()?;
    let Some((program, arguments)) = start.spawn_command.split_first() else {
        return Err(io::Error::other("no command to start a worker"));
    };
    let parent = std::process::id();
    let renice = start.renice;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(output_end.try_clone()?))
        .stderr(Stdio::from(output_end))
        .process_group(0);
    // SAFETY: between fork and exec only prctl, getppid, nice, pthread_sigmask, sigaction, signal and
    // _exit are called, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            process::die_with_parent(parent);
            process::renice(renice);
            // The new program inherits ignored signals.
            handled.restore();
            signals::reset();
            Ok(())
        });
    }
    // The handle is dropped: the agent waits for its children by pid.
    let pid = command.spawn()?.id();
    let mut process = Process::new(pid, ours, output)?;
    let config = WorkerConfig {
        packages: start.packages.clone(),
        memory_limit: start.memory_limit,
        shared_answers,
        rank: start.rank(worker),
    };
    let frame = control::encode_for(worker, &config).map_err(io::Error::other)?;
    process.outgoing.push(&frame, None);
    Ok(NewProcess::Parent(process))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::memfd;

    #[test]
    fn only_temporary_directories_of_r_are_removed() {
        assert!(is_tempdir("/tmp/RtmpA1b2C3"));
        for path in ["/", "", "/home/Rtmp/x", "RtmpA1b2C3", "/tmp/RtmpA1b2C3/.."] {
            assert!(!is_tempdir(path), "{path}");
        }
    }

    #[test]
    fn a_tail_keeps_the_last_bytes() {
        let mut tail = Tail::default();
        tail.push(b"start ");
        tail.push(&[b'x'; STDERR_TAIL - 1]);
        assert_eq!(tail.text().len(), STDERR_TAIL);
        tail.push(b"end");
        assert_eq!(tail.text().len(), STDERR_TAIL);
        assert!(tail.text().ends_with("xend"));
        tail.push(&[b'y'; 3 * STDERR_TAIL]);
        assert_eq!(tail.text(), "y".repeat(STDERR_TAIL));
        assert_eq!(tail.take_fresh(), tail.text());
        tail.push(b"new");
        assert_eq!((&*tail.take_fresh(), &*tail.take_fresh()), ("new", ""));
        assert!(tail.text().ends_with("ynew"));
    }

    #[test]
    fn a_line_is_written_when_it_is_complete_or_too_long() {
        let mut lines = Lines::default();
        let mut file = Vec::new();
        lines.push(b"one", &mut file).unwrap();
        assert_eq!(file, b"");
        lines.push(b" line\nand\nan", &mut file).unwrap();
        assert_eq!(file, b"one line\nand\n");
        lines.push(b"other", &mut file).unwrap();
        lines.flush(&mut file).unwrap();
        lines.flush(&mut file).unwrap();
        assert_eq!(file, b"one line\nand\nanother");
        lines.push(&[b'x'; MAX_LINE - 1], &mut file).unwrap();
        assert_eq!(file.len(), 20);
        lines.push(b"x", &mut file).unwrap();
        assert_eq!(file.len(), 20 + MAX_LINE);
    }

    #[test]
    fn descriptors_are_sent_with_the_frames_that_they_belong_to() {
        use crate::protocol::frame::{self, Kind, MAX_BODY};
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut outgoing = Outgoing::default();
        let files: Vec<_> = (0..30)
            .map(|_| Arc::new(memfd::memory_file().unwrap()))
            .collect();
        let mut frames = Vec::new();
        for (at, file) in files.iter().enumerate() {
            let body = vec![at as u8; [10, MAX_BODY, 5_000][at % 3]];
            let frame = Frame::new(Kind::Data, 0, 0, at as u64, body.into());
            // Every other frame has a descriptor.
            let along = (at % 2 == 0).then(|| file.clone());
            outgoing.push(&frame, along);
            frames.push(frame);
        }
        let (mut received, mut came, mut buffer) = (BytesMut::new(), Vec::new(), [0; 16 * 1024]);
        let (mut decoded, mut taken) = (Vec::new(), 0);
        while decoded.len() < frames.len() {
            while !outgoing.is_empty() && outgoing.write(ours.as_raw_fd()).is_ok() {}
            let n = fd::recv(theirs.as_raw_fd(), &mut buffer, &mut came, true).unwrap();
            received.extend_from_slice(&buffer[..n]);
            while let Some(frame) = frame::decode(&mut received).unwrap() {
                taken += usize::from(frame.header.task % 2 == 0);
                decoded.push(frame);
                // The descriptor has arrived by the time that its frame is complete.
                assert!(came.len() >= taken);
            }
        }
        assert_eq!((decoded, came.len(), outgoing.len()), (frames, 15, 0));
        // Nothing references the files any more.
        assert!(files.iter().all(|file| Arc::strong_count(file) == 1));
    }
}
