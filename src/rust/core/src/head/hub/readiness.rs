//! A socket by which R code that knows sockets alone can wait for an answer.
//!
//! `socketSelect()` waits for connections in R's own table, and knows nothing of the hub. So R opens one
//! connection to this process and points it at a task: the connection has one byte to be read exactly while that
//! task's end has arrived and has not been taken.
//!
//! R never reads the byte. It would have to tell that it has, and an interrupt may come between the two: so the
//! hub has a duplicate of the descriptor of R's end, by which it takes the byte back.

use super::inbox::Inbox;
use crate::platform::fd;
use crate::protocol::ids::TaskId;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

/// Bytes that a connection begins with, to show that it is R's.
pub const TOKEN_LEN: usize = 16;

/// Waits for R's connection.
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
    /// When the system does not tell.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    /// What R has to write first.
    pub fn token(&self) -> &[u8] {
        &self.token
    }

    /// The connection that R has opened and written the token to. Others that have come are closed.
    ///
    /// # Errors
    /// When there is no such connection.
    pub fn accept(self) -> io::Result<Readiness> {
        loop {
            let (mut stream, _) = self.listener.accept()?;
            stream.set_nonblocking(true)?;
            let mut token = [0; TOKEN_LEN];
            // R has written before it calls this, so a connection that has nothing to read is not R's.
            if stream.read_exact(&mut token).is_ok() && token == self.token {
                stream.set_nodelay(true)?;
                return Ok(Readiness {
                    rs_end: own_socket(stream.peer_addr()?)?,
                    stream,
                    task: None,
                    readable: false,
                });
            }
        }
    }
}

/// A duplicate of the descriptor of this process that is bound to a local address.
fn own_socket(address: SocketAddr) -> io::Result<TcpStream> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // Only sockets are duplicated: to close a duplicate of a file would give up the file's locks.
        let is_socket = |link: PathBuf| link.to_string_lossy().starts_with("socket:");
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (Some(number), Ok(true)) = (number, entry.path().read_link().map(is_socket)) else {
            continue;
        };
        // SAFETY: it was open just now. Should another thread have closed it meanwhile, the call fails, or
        // duplicates another one, which is not bound to the address.
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
    task: Option<TaskId>,
    /// A byte has been written and not been taken back.
    readable: bool,
}

impl Readiness {
    /// Makes R's end readable if the task has ended, and takes the byte back if not. Returns whether the
    /// connection is still of use.
    pub fn update(&mut self, inbox: &Inbox) -> bool {
        let ended = self.task.is_some_and(|task| inbox.has_ended(task));
        if ended == self.readable {
            return true;
        }
        self.readable = ended;
        if ended {
            // There is room, since at most one byte is ever unread.
            self.stream.write_all(&[1]).is_ok()
        } else {
            recv_now(&self.rs_end)
        }
    }

    /// Points the connection at another task, or at none.
    pub fn point_at(&mut self, task: Option<TaskId>) {
        self.task = task;
    }
}

/// Takes the byte that has been written to the other end. Whether that has worked. R's end is blocking, and stays so:
/// the flag is R's.
fn recv_now(socket: &TcpStream) -> bool {
    let mut byte = [0];
    let result = fd::recv(socket.as_raw_fd(), &mut byte, &mut Vec::new(), false);
    matches!(result, Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::scheduler::events::{Gone, Note, Outcome};
    use crate::protocol::control::Loss;
    use std::sync::Arc;
    use std::time::Duration;

    fn connect(listener: &ReadinessListener, token: &[u8]) -> TcpStream {
        let port = listener.port().unwrap();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(token).unwrap();
        stream
    }

    #[test]
    fn strangers_are_closed_and_r_is_found_behind_them() {
        let listener = ReadinessListener::bind().unwrap();
        let mut silent = connect(&listener, &[]);
        let mut wrong = connect(&listener, &[0; TOKEN_LEN]);
        let token = listener.token().to_vec();
        let _r = connect(&listener, &token);
        listener.accept().unwrap();
        for stranger in [&mut silent, &mut wrong] {
            stranger
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            let end = stranger.read(&mut [0]);
            assert!(
                matches!(end, Ok(0))
                    || end.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset)
            );
        }
    }

    #[test]
    fn without_r_there_is_no_connection() {
        let listener = ReadinessListener::bind().unwrap();
        let _stranger = connect(&listener, b"no");
        assert!(listener.accept().is_err());
    }

    #[test]
    fn there_is_one_byte_while_the_task_has_ended() {
        let listener = ReadinessListener::bind().unwrap();
        let token = listener.token().to_vec();
        let r = connect(&listener, &token);
        let mut readiness = listener.accept().unwrap();
        r.set_nonblocking(true).unwrap();
        let mut inbox = Inbox::new(1);
        inbox.set_workers(&[vec![0]]);
        let ends = |inbox: &mut Inbox, task| {
            inbox.note(Note::Done {
                rank: 0,
                task,
                job: 0,
                outcome: Outcome::Lost(Arc::new(Gone::Worker(Loss::default()))),
            });
        };
        for task in [1, 2] {
            inbox.expect(task, 0);
        }
        let there = |readiness: &mut Readiness, inbox: &Inbox| {
            assert!(readiness.update(inbox) && readiness.update(inbox));
            r.peek(&mut [0; 2]).is_ok_and(|bytes| bytes == 1)
        };
        readiness.point_at(Some(1));
        assert!(!there(&mut readiness, &inbox));
        ends(&mut inbox, 2);
        assert!(!there(&mut readiness, &inbox));
        ends(&mut inbox, 1);
        assert!(there(&mut readiness, &inbox));
        inbox.forget(1);
        assert!(!there(&mut readiness, &inbox));
        readiness.point_at(Some(2));
        assert!(there(&mut readiness, &inbox));
        readiness.point_at(None);
        assert!(!there(&mut readiness, &inbox));
    }
}
