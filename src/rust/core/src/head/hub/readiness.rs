//! A socket by which R code that knows sockets alone can wait for an answer.
//!
//! `socketSelect()` waits for connections in R's own table, and knows nothing of the hub. So R opens one
//! connection to this process and points it at a worker: the connection has one byte to be read exactly while the
//! next answer of that worker has arrived and has not been taken.

use crate::head::task_table::TaskTable;
use crate::protocol::ids::Rank;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

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
                    stream,
                    rank: None,
                    readable: false,
                });
            }
        }
    }
}

/// The hub's end of the connection.
#[derive(Debug)]
pub struct Readiness {
    stream: TcpStream,
    rank: Option<Rank>,
    /// A byte has been written and R has not been told to read it.
    readable: bool,
}

impl Readiness {
    /// Makes R's end readable if the next answer is there. Returns whether the connection is still of use.
    pub fn update(&mut self, tasks: &TaskTable) -> bool {
        if self.is_there(tasks) && !self.readable {
            // At most one byte is ever unread, so there is room.
            self.readable = true;
            return self.stream.write_all(&[1]).is_ok();
        }
        true
    }

    /// Points the connection at this worker. Returns whether R has to read a byte, for an answer that has been
    /// taken or is another worker's.
    pub fn point_at(&mut self, rank: Rank, tasks: &TaskTable) -> bool {
        self.rank = Some(rank);
        !self.is_there(tasks) && std::mem::take(&mut self.readable)
    }

    fn is_there(&self, tasks: &TaskTable) -> bool {
        self.rank.is_some_and(|rank| tasks.is_next_there(rank))
    }
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
        let mut r = connect(&listener, &token);
        let mut readiness = listener.accept().unwrap();
        r.set_nonblocking(true).unwrap();
        let mut tasks = TaskTable::default();
        tasks.set_workers(2);
        for (task, rank) in [(1, 0), (2, 1), (3, 0)] {
            tasks.begin(task, rank, rank);
            tasks.finish(task, 0);
        }
        let ends = |tasks: &mut TaskTable, task| tasks.ended(task, 0, Outcome::TimedOut).unwrap();
        assert!(!readiness.point_at(0, &tasks));
        ends(&mut tasks, 2);
        ends(&mut tasks, 3);
        assert!(readiness.update(&tasks));
        assert!(r.read(&mut [0]).is_err());
        ends(&mut tasks, 1);
        assert!(readiness.update(&tasks) && readiness.update(&tasks));
        tasks.remove(1);
        // The one after it is there, too.
        assert!(!readiness.point_at(0, &tasks));
        tasks.remove(3);
        assert!(readiness.point_at(0, &tasks));
        assert_eq!(r.read(&mut [0; 2]).unwrap(), 1);
        assert!(!readiness.point_at(1, &tasks));
        assert!(readiness.update(&tasks));
        assert_eq!(r.read(&mut [0; 2]).unwrap(), 1);
    }
}
