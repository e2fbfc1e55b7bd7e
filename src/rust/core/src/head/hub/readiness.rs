//! A socket by which R code that can only wait for sockets waits for an answer.
//!
//! `socketSelect()` waits for connections in R's own table and does not know the hub. R therefore opens one
//! connection to this process and points it at a worker: the connection has one byte to read exactly while the
//! next answer of that worker has arrived and has not been taken.
//!
//! R never reads the byte: it would have to report the read to the hub, and an interrupt might come between the two.
//! Instead, the hub has a duplicate of the descriptor of R's end, by which it reads the byte itself.

use crate::head::task_table::TaskTable;
use crate::platform::fd;
use crate::protocol::ids::Rank;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

/// Length of the token with which R's connection begins.
pub const TOKEN_LEN: usize = 16;

/// Listens for R's connection.
#[derive(Debug)]
pub struct ReadinessListener {
    listener: TcpListener,
    token: [u8; TOKEN_LEN],
}

impl ReadinessListener {
    /// Listens on a free port of the loopback address.
    ///
    /// # Errors
    /// When the system has no port, descriptor or random bytes left.
    pub fn bind() -> io::Result<ReadinessListener> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let mut token = [0; TOKEN_LEN];
        File::open("/dev/urandom")?.read_exact(&mut token)?;
        Ok(ReadinessListener { listener, token })
    }

    /// The port to connect to.
    ///
    /// # Errors
    /// When the system does not report the port.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    /// The token that R must write first.
    pub fn token(&self) -> &[u8] {
        &self.token
    }

    /// Accepts the connection on which R has written the token. Other connections are closed.
    ///
    /// # Errors
    /// When there is no such connection.
    pub fn accept(self) -> io::Result<Readiness> {
        loop {
            let (mut stream, _) = self.listener.accept()?;
            stream.set_nonblocking(true)?;
            let mut token = [0; TOKEN_LEN];
            // R writes the token before this call, so a connection without anything to read is not R's.
            if stream.read_exact(&mut token).is_ok() && token == self.token {
                stream.set_nodelay(true)?;
                return Ok(Readiness {
                    rs_end: own_socket(stream.peer_addr()?)?,
                    stream,
                    rank: None,
                    at_once: false,
                    readable: false,
                });
            }
        }
    }
}

/// Duplicates the descriptor of this process whose socket is bound to this local address.
fn own_socket(address: SocketAddr) -> io::Result<TcpStream> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // Only sockets are duplicated: closing a duplicate of a file would release the file's locks.
        let is_socket = |link: PathBuf| link.to_string_lossy().starts_with("socket:");
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (Some(number), Ok(true)) = (number, entry.path().read_link().map(is_socket)) else {
            continue;
        };
        // SAFETY: the descriptor was open just now. If another thread has closed it meanwhile, the call fails, or
        // duplicates another descriptor, which is not bound to the address.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        let Ok(duplicate) = descriptor.try_clone_to_owned() else {
            continue;
        };
        let socket = TcpStream::from(duplicate);
        if socket.local_addr().is_ok_and(|local| local == address) {
            return Ok(socket);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// The hub's end of the connection.
#[derive(Debug)]
pub struct Readiness {
    stream: TcpStream,
    rs_end: TcpStream,
    rank: Option<Rank>,
    /// Receiving from the worker does not block: it fails, or continues an answer that was taken before.
    at_once: bool,
    /// A byte has been written and not been read again.
    readable: bool,
}

impl Readiness {
    /// Makes R's end readable if the next answer has arrived; otherwise reads the byte again. Returns whether the
    /// connection still works.
    pub fn update(&mut self, tasks: &TaskTable) -> bool {
        let is_there = self.at_once || self.rank.is_some_and(|rank| tasks.is_next_there(rank));
        if is_there == self.readable {
            return true;
        }
        self.readable = is_there;
        if is_there {
            // The write never blocks, because at most one byte is unread.
            self.stream.write_all(&[1]).is_ok()
        } else {
            recv_now(&self.rs_end)
        }
    }

    /// Points the connection at this worker. `at_once`: receiving from the worker does not block.
    pub fn point_at(&mut self, rank: Rank, at_once: bool) {
        self.rank = Some(rank);
        self.at_once = at_once;
    }
}

/// Reads the byte that was written to the other end, without blocking. Returns whether that succeeded. R's end stays in
/// blocking mode, because R relies on the flag.
fn recv_now(socket: &TcpStream) -> bool {
    let mut byte = [0];
    let result = fd::recv(socket.as_raw_fd(), &mut byte, &mut Vec::new(), false);
    matches!(result, Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::scheduler::events::Outcome;
    use std::time::Duration;

    fn connect(listener: &ReadinessListener, token: &[u8]) -> TcpStream {
        let port = listener.port().unwrap();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(token).unwrap();
        stream
    }

    #[test]
    fn untrusted_peers_are_closed_and_r_is_found_after_them() {
        let listener = ReadinessListener::bind().unwrap();
        let mut silent = connect(&listener, &[]);
        let mut wrong = connect(&listener, &[0; TOKEN_LEN]);
        let token = listener.token().to_vec();
        let _r = connect(&listener, &token);
        listener.accept().unwrap();
        for untrusted_peer in [&mut silent, &mut wrong] {
            untrusted_peer
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            let end = untrusted_peer.read(&mut [0]);
            assert!(
                matches!(end, Ok(0))
                    || end.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset)
            );
        }
    }

    #[test]
    fn without_r_accept_fails() {
        let listener = ReadinessListener::bind().unwrap();
        let _untrusted_peer = connect(&listener, b"no");
        assert!(listener.accept().is_err());
    }

    #[test]
    fn one_byte_is_readable_while_the_next_task_has_ended() {
        let listener = ReadinessListener::bind().unwrap();
        let token = listener.token().to_vec();
        let r = connect(&listener, &token);
        let mut readiness = listener.accept().unwrap();
        r.set_nonblocking(true).unwrap();
        let mut tasks = TaskTable::default();
        tasks.set_workers(2);
        for (task, rank) in [(1, 0), (2, 1), (3, 0)] {
            tasks.begin(task, rank, rank);
            tasks.finish(task, 0);
        }
        let ends = |tasks: &mut TaskTable, task| tasks.ended(task, 0, Outcome::TimedOut).unwrap();
        let there = |readiness: &mut Readiness, tasks: &TaskTable| {
            assert!(readiness.update(tasks) && readiness.update(tasks));
            r.peek(&mut [0; 2]).is_ok_and(|bytes| bytes == 1)
        };
        readiness.point_at(0, false);
        assert!(!there(&mut readiness, &tasks));
        ends(&mut tasks, 2);
        ends(&mut tasks, 3);
        assert!(!there(&mut readiness, &tasks));
        ends(&mut tasks, 1);
        assert!(there(&mut readiness, &tasks));
        tasks.remove(1);
        // The task after it has ended, too.
        assert!(there(&mut readiness, &tasks));
        tasks.remove(3);
        assert!(!there(&mut readiness, &tasks));
        readiness.point_at(1, false);
        assert!(there(&mut readiness, &tasks));
        readiness.point_at(0, false);
        assert!(!there(&mut readiness, &tasks));
        readiness.point_at(0, true);
        assert!(there(&mut readiness, &tasks));
    }
}
