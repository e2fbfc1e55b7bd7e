//! The relay: a process that connects a head to the socket of a lingering agent. It copies its stdin to the socket,
//! and the socket to its stdout.

use super::{directory, socket};
use crate::platform::{fd, process, signals};
use crate::protocol::handshake::MAGIC;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

/// Bytes copied at a time.
const RELAY_BUFFER: usize = 256 * 1024;
/// How often the relay checks whether the process that started it is alive.
const PARENT_CHECK: Duration = Duration::from_millis(250);

/// Connects stdin and stdout of this process to the agent whose directory has this name, until either side ends. The
/// relay prints the magic line when it is connected: what a login shell prints comes before it.
///
/// # Errors
/// When no agent listens there.
pub fn run(name: &str) -> io::Result<()> {
    let parent = std::os::unix::process::parent_id();
    let path = socket(&directory(name)?);
    let socket = UnixStream::connect(&path).map_err(|error| {
        io::Error::other(format!(
            "no agent of the cluster waits on this host: {}: {error}",
            path.display()
        ))
    })?;
    let (stdin, mut stdout) = fd::take_stdio()?;
    signals::outlive(std::os::fd::AsRawFd::as_raw_fd(&stdin));
    signals::ignore(&[libc::SIGPIPE]);
    let to_agent = socket.try_clone()?;
    let copy = move || {
        let _ = copy_stdin(stdin, &to_agent);
        let _ = to_agent.shutdown(Shutdown::Write);
    };
    signals::with_all_blocked(|| thread::Builder::new().spawn(copy))?;
    stdout.write_all(MAGIC)?;
    socket.set_read_timeout(Some(PARENT_CHECK))?;
    let mut buffer = vec![0; RELAY_BUFFER];
    loop {
        match (&socket).read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                if stdout.write_all(&buffer[..n]).is_err() {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // A copy of its descriptors in another process would keep stdin open.
                if !process::is_parent(parent) {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn copy_stdin(mut stdin: File, mut socket: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; RELAY_BUFFER];
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => socket.write_all(&buffer[..n])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
