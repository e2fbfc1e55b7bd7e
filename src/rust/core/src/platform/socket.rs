//! Options of sockets, waiting for two of them, and the addresses of this machine. System calls that std does not provide.

use super::fd::check;
use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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

/// Ends listening, also in processes that were forked from this one and have the socket.
pub fn stop_listening(fd: RawFd) {
    // SAFETY: shutdown() accepts any descriptor number and any socket.
    unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
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

/// Interfaces of this machine alone: of containers and virtual machines.
const VIRTUAL: [&str; 4] = ["docker", "virbr", "veth", "br-"];

/// The addresses by which other machines may reach this one, in the order of its interfaces; IPv4 first.
pub fn own_addresses() -> Vec<IpAddr> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: on success, `list` is a list that freeifaddrs() frees below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Vec::new();
    }
    let mut found: Vec<IpAddr> = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: an element of the list, which lives until freeifaddrs(). Its name is a C string.
        let (interface, name) = unsafe { (&*next, CStr::from_ptr((*next).ifa_name)) };
        next = interface.ifa_next;
        let name = name.to_string_lossy();
        let up = interface.ifa_flags & libc::IFF_UP as libc::c_uint != 0;
        if interface.ifa_addr.is_null() || !up || VIRTUAL.iter().any(|v| name.starts_with(v)) {
            continue;
        }
        // SAFETY: the family says which type of address follows.
        let address = unsafe {
            match i32::from((*interface.ifa_addr).sa_family) {
                libc::AF_INET => {
                    let address = *interface.ifa_addr.cast::<libc::sockaddr_in>();
                    IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)))
                }
                libc::AF_INET6 => {
                    let address = *interface.ifa_addr.cast::<libc::sockaddr_in6>();
                    IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr))
                }
                _ => continue,
            }
        };
        // An address of a link needs the name of an interface of the other machine.
        let of_link = matches!(address, IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80);
        if !address.is_loopback() && !of_link {
            found.push(address);
        }
    }
    // SAFETY: the list of getifaddrs(), which is not used any more.
    unsafe { libc::freeifaddrs(list) };
    found.sort_by_key(IpAddr::is_ipv6);
    found
}
