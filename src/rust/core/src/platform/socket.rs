//! Options of sockets, and waiting for two of them. System calls that std does not provide.

use super::fd::check;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// Seconds of silence after which the system asks whether the peer is still there, seconds between two such
/// questions, and the number of unanswered questions after which the connection fails.
const KEEP_ALIVE: [libc::c_int; 3] = [30, 10, 4];

/// Makes the system notice a peer that has vanished while nothing is sent.
///
/// # Errors
/// When `fd` is no TCP socket.
pub fn keep_alive(fd: RawFd) -> io::Result<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    let options = [libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL, libc::TCP_KEEPCNT];
    for (option, value) in options.into_iter().zip(KEEP_ALIVE) {
        set(fd, libc::IPPROTO_TCP, option, value)?;
    }
    Ok(())
}

fn set(fd: RawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let value: *const libc::c_int = &raw const value;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is an int that lives during the call, of the length given.
    check(unsafe { libc::setsockopt(fd, level, option, value.cast(), len) }).map(drop)
}

/// What to wait for on a socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct Interest {
    /// Something can be read, or the end.
    pub read: bool,
    /// Something can be written.
    pub write: bool,
}

/// Waits until one of the sockets is ready, a signal arrives, or `max` has passed. A socket without an interest
/// is left out.
///
/// # Errors
/// The errors of poll(2).
pub fn wait(sockets: &[(RawFd, Interest); 2], max: Option<Duration>) -> io::Result<()> {
    let mut polled = sockets.map(|(fd, interest)| {
        let read = if interest.read { libc::POLLIN } else { 0 };
        let write = if interest.write { libc::POLLOUT } else { 0 };
        libc::pollfd {
            fd: if interest.read || interest.write {
                fd
            } else {
                -1
            },
            events: read | write,
            revents: 0,
        }
    });
    let milliseconds = max.map_or(-1, |max| {
        libc::c_int::try_from(max.as_millis() + 1).unwrap_or(libc::c_int::MAX)
    });
    // SAFETY: as many valid pollfds as are announced.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), 2, milliseconds) };
    match check(ready) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}
