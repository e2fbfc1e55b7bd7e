//! How an agent starts: it exchanges hellos with the head, receives the start request, and may hand over to
//! the R process that becomes the agent.

use super::guard::Guard;
use super::warnings::Warnings;
use super::{Agent, process};
use crate::platform::{self, cores, fd, limits, signals};
use crate::protocol::control::{self, Handover, Hello, Outfile, Start, ToAgent, ToHead};
use crate::protocol::frame::{self, Kind};
use crate::protocol::handshake::{MAGIC, Preamble, PreambleState};
use crate::protocol::send_queue::OutBuf;
use bytes::BytesMut;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use tracing::info;

/// Spare open files that answers in shared memory need, besides one for each worker.
const SPARE_FILES: u64 = 16;

/// An agent that has completed the handshake with its head and not yet created workers.
pub struct Greeted {
    pub(super) reader: File,
    pub(super) writer: File,
    pub(super) received: BytesMut,
    /// The start request of the head.
    pub start: Start,
    pub(super) head_pid: u32,
    /// The head and the agent have the same byte order.
    same_order: bool,
    pub(super) guard: Guard,
    /// The batch engine's warnings, if this process runs in a job.
    pub warnings: Warnings,
    /// Packages that the program before the handover has determined.
    pub after: Vec<String>,
    /// How this process introduces itself to a head.
    pub hello: Hello,
}

/// Builds the hello, which describes this process to the other side.
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

/// Takes over stdin and stdout and waits for the start request of the head.
///
/// # Errors
/// When the head has terminated, has another version, or the peer is not a head.
pub fn greet(hello: &Hello) -> io::Result<Greeted> {
    let (reader, writer) = fd::take_stdio()?;
    greet_over(reader, writer, hello)
}

/// Performs the handshake like [`greet`], over any stream.
///
/// # Errors
/// When the head has terminated, has another version, or the peer is not a head.
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
                    info!(head_pid, "head greeted");
                    // Start the guard before packages are loaded, so that it cleans up whenever this
                    // process ends.
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
                        hello: hello.clone(),
                        warnings: Warnings::default(),
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
            Ok(0) => return Err(io::Error::other("the head has closed the connection")),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Greeted {
    /// Makes this process end when the head does, even while R loads packages. The guard then cleans up. Only
    /// for a process that runs nothing else.
    pub fn end_with_head(&self) {
        // If the stream does not support SIGIO, the end is noticed once packages are loaded.
        let _ = signals::end_with(self.reader.as_raw_fd());
    }

    /// Lists the temporary directory of this process at the guard, which removes it even if the agent is
    /// killed.
    pub fn watch_tempdir(&mut self, tempdir: &str) {
        if process::is_tempdir(tempdir) {
            self.guard.watch_tempdir(tempdir);
        }
    }

    /// Returns the text that [`Greeted::resume`] needs, the two directions of the head's stream, which must be
    /// stdin and stdout of the other program, and the guard, which must live until the other program runs.
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

    /// Continues where the previous program of this process has handed over.
    ///
    /// # Errors
    /// When the text is damaged, or descriptors cannot be redirected.
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
            hello: Hello::default(),
            warnings: Warnings::default(),
        })
    }

    /// Reports to the head that nothing was or will be started, and why.
    ///
    /// # Errors
    /// When the head has terminated.
    pub fn fail(mut self, reason: String) -> io::Result<()> {
        self.report(&ToHead::StartFailed { reason })
    }

    pub(super) fn report(&mut self, message: &ToHead) -> io::Result<()> {
        let frame = control::encode(message).map_err(io::Error::other)?;
        let mut out = OutBuf::default();
        out.push(&frame);
        while !out.is_empty() {
            out.write_with(|slices| self.writer.write_vectored(slices))?;
        }
        Ok(())
    }

    /// The reason why the cluster's `outfile` cannot be opened on this host, if there is one.
    pub fn outfile_problem(&self) -> Option<String> {
        let Outfile::File(path) = &self.start.outfile else {
            return None;
        };
        let error = open_outfile(path).err()?;
        Some(format!(
            "its `outfile` {path} cannot be opened or made there: {error}"
        ))
    }

    /// Whether workers may answer in memory that is shared with the head. The head must be the process at
    /// the other end of the stream, and there must be enough descriptors.
    pub(super) fn shared_answers(&self) -> bool {
        let Start {
            local,
            memory_limit,
            workers,
            ..
        } = self.start;
        let maker = || fd::maker_of_pair(self.writer.as_raw_fd());
        let same_host = local && self.same_order && maker() == Some(self.head_pid);
        let needed = limits::open_files_needed(workers as usize) + u64::from(workers) + SPARE_FILES;
        let enough = || limits::raise_open_files(needed).is_ok_and(|files| files >= needed);
        same_host && memory_limit == 0 && enough()
    }

    /// Checks this host's limits and creates the agent. A shortfall is reported to the head, and nothing is
    /// started.
    ///
    /// # Errors
    /// When a stream cannot be registered for polling, or a limit is too low.
    pub fn agent(mut self) -> io::Result<Agent> {
        let workers = self.start.workers as usize;
        if let Err(short) = limits::check(workers) {
            let message = short.remedy.clone();
            self.report(&ToHead::Limits {
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

pub(super) fn open_outfile(path: &str) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}

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
