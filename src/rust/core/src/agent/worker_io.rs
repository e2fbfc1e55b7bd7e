//! How an agent writes to its workers and reads from them.

use super::{
    AGENT_READS, Agent, FIRST_WORKER, HEAD_BACKLOG, MAX_WORKER_DESCRIPTORS, WORKER_BACKLOG,
    is_out_of_resources,
};
use crate::platform::{fd, memfd};
use crate::protocol::control::{Outfile, StartMode};
use crate::protocol::frame::{self, FIRST, Frame, Header, Kind, LAST, MAX_BODY};
use bytes::{Bytes, BytesMut};
use mio::unix::SourceFd;
use mio::{Interest, Token};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Maximum number of unprocessed bytes of a worker: the agent reads no more while a complete frame waits.
const HEADER_AND_BODY: usize = frame::HEADER_LEN + MAX_BODY;

impl Agent {
    pub(super) fn read_again(&mut self, worker: u32) {
        if !std::mem::replace(&mut self.is_unread[worker as usize], true) {
            self.unread.push(worker);
        }
    }

    /// Passes on an answer in shared memory. If the memory is missing, has another length or is not sealed,
    /// the worker is killed and its task is lost, because a worker runs user code and cannot be trusted.
    pub(super) fn pass_memory(&mut self, frame: &Frame) {
        let linked = self.is_linked();
        let Some(process) = &mut self.workers[frame.header.worker as usize] else {
            return;
        };
        let file = process.descriptors.pop_front().map(File::from);
        let len = |file: &File| file.metadata().ok().map(|data| data.len());
        let is_right = |file: &File| len(file) == frame.number() && memfd::is_sealed(file);
        match file.filter(is_right) {
            Some(file) if !self.ending && linked => {
                self.to_head.push(frame, Some(Arc::new(file)));
            }
            Some(_) => {}
            None => process.kill(),
        }
    }

    /// Interrupts a task by a cancel frame followed by SIGINT: see [`crate::worker::channel`].
    pub(super) fn interrupt(&mut self, worker: u32, task: u64) {
        if let Some(process) = &mut self.workers[worker as usize] {
            process.interrupt = true;
            let frame = Frame::new(Kind::Cancel, 0, worker, task, Bytes::new());
            self.send_worker(worker, &frame, None);
        }
    }

    pub(super) fn close(&mut self, worker: u32) {
        if let Some(process) = &mut self.workers[worker as usize] {
            process.closing = true;
            self.dirty.push(worker);
            // R is still starting. An interrupt makes R end and remove its temporary directory.
            if self.start.mode == StartMode::Spawn && process.tempdir.is_none() {
                process.signal(libc::SIGINT);
            }
        }
    }

    pub(super) fn send_worker(&mut self, worker: u32, frame: &Frame, along: Option<Arc<File>>) {
        if let Some(process) = &mut self.workers[worker as usize] {
            process.outgoing.push(frame, along);
            self.dirty.push(worker);
        }
    }

    /// Sends a blob that could not be put into shared memory, in as many frames as needed. `counted`: bytes
    /// that already count as sent.
    pub(super) fn send_blob(&mut self, header: &Header, counted: usize, chunks: &[Bytes]) {
        let Header { worker, task, .. } = *header;
        let mut bytes = 0;
        for (at, chunk) in chunks.iter().enumerate() {
            let first = if at == 0 { FIRST } else { 0 };
            let last = if at + 1 == chunks.len() { LAST } else { 0 };
            let frame = Frame::new(Kind::Blob, first | last, worker, task, chunk.clone());
            bytes += frame.wire_len();
            self.send_worker(worker, &frame, None);
        }
        // The frame that would have carried the shared memory has been counted.
        self.router
            .worker_table
            .gave(worker, bytes.saturating_sub(counted));
    }

    /// Whether the queue to a worker has room. The check protects this host's memory from a head that ignores
    /// windows.
    pub(super) fn has_room(&self, worker: u32) -> bool {
        let process = self.workers[worker as usize].as_ref();
        let max = WORKER_BACKLOG.saturating_add(self.router.worker_table.given(worker));
        process.is_none_or(|process| process.outgoing.len() <= max)
    }

    pub(super) fn write_worker(&mut self, worker: u32) {
        let Some(process) = &mut self.workers[worker as usize] else {
            return;
        };
        let mut passed = 0;
        while !process.outgoing.is_empty() {
            let fd = process.channel.as_raw_fd();
            match process.outgoing.write(fd) {
                Ok(n) => passed += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The agent fails, because the worker would wait forever for the frame.
                Err(error) if is_out_of_resources(&error) => {
                    self.fail(&format!("no memory to send to workers: {error}"));
                    return;
                }
                // The channel is full, or the worker has ended, which its exit will report.
                Err(_) => break,
            }
        }
        // Poll for writability only while the queue is not empty: otherwise every message that a worker
        // reads would wake the agent.
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
        match self.router.worker_table.passed(worker, passed) {
            Some((task, bytes)) if !self.ending && self.is_linked() => {
                self.to_head.push(&Frame::credit(worker, task, bytes), None);
            }
            _ => {}
        }
    }

    pub(super) fn read_worker(&mut self, worker: u32) {
        if self.read_some_of_worker(worker) {
            self.read_again(worker);
        }
    }

    /// Reads a bounded number of times. Returns whether there may be more that can be processed now.
    pub(super) fn read_some_of_worker(&mut self, worker: u32) -> bool {
        if self.to_head.len() >= HEAD_BACKLOG && !self.ending {
            return true;
        }
        let Some(process) = &mut self.workers[worker as usize] else {
            return false;
        };
        // Process the buffered bytes first; more is read only once they have been passed on.
        let mut received = std::mem::take(&mut process.received);
        let mut broken = self.on_worker_bytes(worker, &mut received);
        let mut more = true;
        for _ in 0..AGENT_READS {
            // The rest is read once the head grants credit for the waiting frame.
            more = received.len() < HEADER_AND_BODY && !broken;
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
                    received.extend_from_slice(&self.scratch[..n]);
                    process.descriptors.extend(came);
                    broken = process.descriptors.len() > MAX_WORKER_DESCRIPTORS
                        || self.on_worker_bytes(worker, &mut received);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => {
                    more = false;
                    // Any other result means that the worker has closed its end of the channel, which
                    // happens only when the worker ends.
                    let empty = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
                    process.hung_up |= !read.as_ref().is_err_and(empty);
                    break;
                }
            }
        }
        let Some(process) = &mut self.workers[worker as usize] else {
            return false;
        };
        process.received = received;
        // The worker's exit reports the rest.
        if broken {
            process.kill();
        } else if process.hung_up {
            self.router
                .worker_table
                .hung_up(worker, self.epoch.elapsed());
        }
        more && !broken
    }

    /// Passes on the complete frames in `received`, up to one that must wait. Returns whether the worker
    /// violated the protocol.
    fn on_worker_bytes(&mut self, worker: u32, received: &mut BytesMut) -> bool {
        let now = self.now();
        let result = self
            .router
            .from_worker(worker, received, now, &mut self.acts);
        self.act();
        result.is_err()
    }

    pub(super) fn read_output(&mut self, worker: u32) {
        let linked = self.is_linked();
        let Some(process) = &mut self.workers[worker as usize] else {
            return;
        };
        // Bounded, so that a worker that never stops printing does not stop the others.
        for _ in 0..AGENT_READS {
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
                    if self.start.outfile == Outfile::Console && !self.disconnected && linked {
                        // The shutdown also waits for the output of exit handlers.
                        self.orphans.final_output |= self.ending;
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
}
