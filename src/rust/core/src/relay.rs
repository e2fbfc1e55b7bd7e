//! The relay: copies between an encrypted TCP connection and a local socket. The same code runs in a thread of
//! the head and in a process beside an agent.
//!
//! The relay is one loop over both sockets. Each direction has one buffer: the relay reads a socket only once
//! the bytes before have been written. All bytes that a side has written before its end arrive, unless the
//! connection itself fails. The end of one direction is passed on; the other direction has [`LINGER`] from then
//! on to end, too.

use crate::platform::{fd, socket};
use crate::protocol::noise::{MAX_CONTENT, MAX_SEALED, Opened, Transport};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Messages that are sealed, or opened, at a time.
const MESSAGES: usize = 4;

/// How long the relay waits for the end of the second direction once the local side has ended.
pub const LINGER: Duration = Duration::from_secs(30);

/// Bytes to be written, and how many of them have been.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    written: usize,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.written = 0;
    }

    /// Writes what the writer accepts. Returns whether nothing is left.
    fn write(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<bool> {
        while !self.is_empty() {
            match write(&self.bytes[self.written..]) {
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.clear();
        Ok(true)
    }
}

/// Reads once. `None`: nothing is available.
fn read(mut reader: impl Read, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match reader.read(buffer) {
            Ok(n) => return Ok(Some(n)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

struct Relay<'a> {
    tcp: &'a TcpStream,
    local: &'a UnixStream,
    transport: Transport,
    /// From the local socket.
    plain: Vec<u8>,
    to_tcp: Pending,
    /// From the connection, not yet opened: `sealed[start..end]`.
    sealed: Vec<u8>,
    start: usize,
    end: usize,
    to_local: Pending,
    /// The local side has ended, and when that was.
    local_ended: Option<Instant>,
    /// The local end has been passed on to the peer.
    end_sent: bool,
    /// The peer has ended its direction.
    peer_ended: bool,
    /// The peer's end has been passed on to the local side.
    end_passed: bool,
    /// Nobody reads at the local side any more.
    local_deaf: bool,
    /// Writing to the connection has failed: what arrived before is still delivered.
    broken: Option<io::Error>,
}

/// Copies between the two sockets until both directions have ended. `received`: bytes of the connection that
/// have already been read.
///
/// # Errors
/// When the connection fails, or was tampered with. Both sockets have been shut down then.
pub fn run(
    tcp: &TcpStream,
    local: &UnixStream,
    transport: Transport,
    received: &[u8],
) -> io::Result<()> {
    let result = start(tcp, local, transport, received);
    let _ = local.shutdown(Shutdown::Both);
    let _ = tcp.shutdown(Shutdown::Both);
    result
}

fn start(
    tcp: &TcpStream,
    local: &UnixStream,
    transport: Transport,
    received: &[u8],
) -> io::Result<()> {
    tcp.set_nonblocking(true)?;
    local.set_nonblocking(true)?;
    let mut sealed = vec![0; (MESSAGES * MAX_SEALED).max(received.len() + MAX_SEALED)];
    sealed[..received.len()].copy_from_slice(received);
    let relay = Relay {
        tcp,
        local,
        transport,
        plain: vec![0; MESSAGES * MAX_CONTENT],
        to_tcp: Pending::default(),
        sealed,
        start: 0,
        end: received.len(),
        to_local: Pending::default(),
        local_ended: None,
        end_sent: false,
        peer_ended: false,
        end_passed: false,
        local_deaf: false,
        broken: None,
    };
    relay.run()
}

impl Relay<'_> {
    fn run(mut self) -> io::Result<()> {
        loop {
            self.step_out()?;
            self.step_in()?;
            if self.end_passed && (self.end_sent || self.broken.is_some()) {
                return self.broken.map_or(Ok(()), Err);
            }
            let left = self
                .local_ended
                .map(|ended| LINGER.saturating_sub(ended.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return match self.broken {
                    Some(error) => Err(error),
                    None if self.end_sent => Ok(()),
                    None => Err(io::ErrorKind::TimedOut.into()),
                };
            }
            self.wait(left)?;
        }
    }

    /// Sleeps until a socket is ready for what is to be done next.
    fn wait(&self, max: Option<Duration>) -> io::Result<()> {
        let mut tcp = socket::Interest::default();
        let mut local = socket::Interest::default();
        tcp.write = !self.to_tcp.is_empty();
        local.read = self.to_tcp.is_empty() && self.local_ended.is_none();
        local.write = !self.to_local.is_empty();
        tcp.read = self.to_local.is_empty() && !self.peer_ended;
        socket::wait(
            &[(self.tcp.as_raw_fd(), tcp), (self.local.as_raw_fd(), local)],
            max,
        )
    }

    /// From the local socket to the connection.
    fn step_out(&mut self) -> io::Result<()> {
        loop {
            if self.broken.is_some() {
                self.to_tcp.clear();
            }
            let tcp = self.tcp;
            match self
                .to_tcp
                .write(|bytes| fd::send(tcp.as_raw_fd(), &[io::IoSlice::new(bytes)]))
            {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    self.broken = Some(error);
                    continue;
                }
            }
            if self.local_ended.is_some() {
                if !self.end_sent {
                    self.end_sent = true;
                    let _ = self.tcp.shutdown(Shutdown::Write);
                }
                return Ok(());
            }
            // A reset is how a socket with unread bytes ends.
            let n = match read(self.local, &mut self.plain) {
                Ok(Some(n)) => n,
                Ok(None) => return Ok(()),
                Err(_) => 0,
            };
            if n == 0 {
                self.local_ended = Some(Instant::now());
                self.transport
                    .seal(&[], &mut self.to_tcp.bytes)
                    .map_err(io::Error::other)?;
            }
            for content in self.plain[..n].chunks(MAX_CONTENT) {
                let sealed = self.transport.seal(content, &mut self.to_tcp.bytes);
                sealed.map_err(io::Error::other)?;
            }
        }
    }

    /// From the connection to the local socket.
    fn step_in(&mut self) -> io::Result<()> {
        loop {
            if self.local_deaf {
                self.to_local.clear();
            }
            let local = self.local;
            let written = self
                .to_local
                .write(|bytes| fd::send(local.as_raw_fd(), &[io::IoSlice::new(bytes)]));
            match written {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(_) => {
                    self.local_deaf = true;
                    continue;
                }
            }
            if self.peer_ended {
                if !self.end_passed {
                    self.end_passed = true;
                    let _ = self.local.shutdown(Shutdown::Write);
                }
                return Ok(());
            }
            if self.open()? {
                continue;
            }
            let room = &mut self.sealed[self.end..];
            match read(self.tcp, room) {
                Ok(Some(0)) => self.fail(io::ErrorKind::UnexpectedEof.into()),
                Ok(Some(n)) => self.end += n,
                Ok(None) => return Ok(()),
                Err(error) => self.fail(error),
            }
        }
    }

    /// The connection has failed: nothing more can arrive.
    fn fail(&mut self, error: io::Error) {
        self.peer_ended = true;
        self.broken.get_or_insert(error);
        self.to_tcp.clear();
    }

    /// Opens the complete messages. Returns whether there were any.
    fn open(&mut self) -> io::Result<bool> {
        let first = self.start;
        while !self.peer_ended {
            let sealed = &self.sealed[self.start..self.end];
            match self.transport.open(sealed, &mut self.to_local.bytes) {
                Ok(Opened::Incomplete) => break,
                Ok(Opened::Content(taken)) => self.start += taken,
                Ok(Opened::End(taken)) => {
                    self.start += taken;
                    self.peer_ended = true;
                }
                Err(error) => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, error);
                    self.fail(error);
                }
            }
        }
        let opened = self.start > first || self.peer_ended;
        // Room for at least one message.
        self.sealed.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        Ok(opened)
    }
}

/// Prepares a connection for the relay: small messages are sent at once, and a peer that has vanished is
/// noticed.
///
/// # Errors
/// When the system refuses the options.
pub fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    socket::keep_alive(tcp.as_raw_fd())
}

/// Writes all bytes to a blocking connection.
///
/// # Errors
/// The errors of the connection.
pub fn write_all(tcp: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    let mut tcp = tcp;
    tcp.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::noise::{Dialer, Introduction, Key, Listener, Verdict};
    use std::net::TcpListener;
    use std::thread::{self, JoinHandle};

    fn transports() -> (Transport, Transport) {
        let key = Key::new([7; 32]);
        let introduction = Introduction::new([0; 16], "", "");
        let (mut dialer, first) = Dialer::start(&key, 0, &introduction).unwrap();
        let mut listener = Listener::new([(0, key)].into());
        let (mut second, mut third, mut fourth) = (Vec::new(), Vec::new(), Vec::new());
        listener.feed(&first, &mut second).unwrap();
        dialer.feed(&second, &mut third).unwrap();
        listener.feed(&third, &mut Vec::new()).unwrap();
        let head = listener.finish(&Verdict::Accepted, &mut fourth).unwrap();
        dialer.feed(&fourth, &mut Vec::new()).unwrap();
        (dialer.finish().unwrap().0, head)
    }

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    type Running = JoinHandle<io::Result<()>>;

    fn relay(tcp: TcpStream, transport: Transport) -> (UnixStream, Running) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let running = thread::spawn(move || {
            prepare(&tcp)?;
            run(&tcp, &theirs, transport, &[])
        });
        (ours, running)
    }

    /// Two local sockets with two relays between them.
    fn relays() -> (UnixStream, Running, UnixStream, Running) {
        let (one, other) = transports();
        let (near, far) = connection();
        let (a, a_running) = relay(near, one);
        let (b, b_running) = relay(far, other);
        (a, a_running, b, b_running)
    }

    fn bytes(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|at| (at / 251 + at) as u8 ^ seed).collect()
    }

    #[test]
    fn all_bytes_arrive_in_both_directions_before_the_ends() {
        let (a, a_running, b, b_running) = relays();
        for len in [0, 1, MAX_CONTENT, 20_000_000] {
            let (to_b, to_a) = (bytes(len, 1), bytes(len, 2));
            thread::scope(|scope| {
                scope.spawn(|| (&a).write_all(&to_b).unwrap());
                scope.spawn(|| (&b).write_all(&to_a).unwrap());
                scope.spawn(|| {
                    let mut got = vec![0; len];
                    (&a).read_exact(&mut got).unwrap();
                    assert!(got == to_a);
                });
                let mut got = vec![0; len];
                (&b).read_exact(&mut got).unwrap();
                assert!(got == to_b);
            });
        }
        // One half ends, the other goes on.
        (&a).write_all(b"last words").unwrap();
        a.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        (&b).read_to_end(&mut got).unwrap();
        assert_eq!(got, b"last words");
        (&b).write_all(b"answer").unwrap();
        drop(b);
        got.clear();
        (&a).read_to_end(&mut got).unwrap();
        assert_eq!(got, b"answer");
        a_running.join().unwrap().unwrap();
        b_running.join().unwrap().unwrap();
    }

    #[test]
    fn what_was_written_before_a_process_dies_arrives() {
        let (a, a_running, b, b_running) = relays();
        let last = bytes(3_000_000, 5);
        let sent = last.clone();
        let writer = thread::spawn(move || {
            (&a).write_all(&sent).unwrap();
            // Closed with all that the relay has not read yet.
            drop(a);
        });
        let mut got = Vec::new();
        (&b).read_to_end(&mut got).unwrap();
        assert!(got == last);
        drop(b);
        writer.join().unwrap();
        a_running.join().unwrap().unwrap();
        b_running.join().unwrap().unwrap();
    }

    #[test]
    fn a_connection_that_breaks_or_is_changed_ends_both_directions() {
        for garbage in [None, Some([0xff; 70_000])] {
            let (one, _) = transports();
            let (near, mut far) = connection();
            let (mut a, running) = relay(near, one);
            a.write_all(b"hello").unwrap();
            if let Some(garbage) = garbage {
                // The relay may close the connection before all was written.
                let _ = far.write_all(&garbage);
            }
            far.shutdown(Shutdown::Write).unwrap();
            let mut got = Vec::new();
            let _ = a.read_to_end(&mut got);
            assert!(got.is_empty());
            assert!(running.join().unwrap().is_err());
            // Nothing is accepted any more.
            assert!(a.write_all(b"more").is_err());
        }
    }
}
