//! File descriptors: their flags, and how they are sent over a socket. System calls that std does not provide.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Turns the result of a system call into its error if the call failed.
pub(super) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Marks all descriptors except 0, 1 and 2 as close-on-exec.
pub fn close_others_on_exec() {
    let open = std::fs::read_dir("/dev/fd").map(|entries| {
        let names = entries.flatten().map(|entry| entry.file_name());
        names
            .filter_map(|name| name.to_str()?.parse().ok())
            .collect()
    });
    let open: Vec<RawFd> = open.unwrap_or_else(|_| (3..1024).collect());
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // SAFETY: fcntl checks the descriptor.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Closes all descriptors except 0, 1 and 2, in a forked process that uses none of them any more.
pub fn close_others() {
    let open: Vec<RawFd> = match std::fs::read_dir("/dev/fd") {
        Ok(entries) => entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect(),
        Err(_) => (3..1024).collect(),
    };
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // SAFETY: the caller uses and drops none of the descriptors any more.
        unsafe { libc::close(fd) };
    }
}

/// Makes `target` a duplicate of `fd`.
pub fn redirect(fd: RawFd, target: RawFd) -> io::Result<()> {
    // SAFETY: dup2 checks its arguments.
    check(unsafe { libc::dup2(fd, target) }).map(drop)
}

/// Makes `target` a duplicate of `fd` that is closed on exec.
pub fn replace(target: RawFd, fd: RawFd) -> io::Result<()> {
    redirect(fd, target)?;
    // SAFETY: fcntl checks the descriptor.
    check(unsafe { libc::fcntl(target, libc::F_SETFD, libc::FD_CLOEXEC) }).map(drop)
}

/// Sets or clears O_NONBLOCK.
pub fn set_nonblocking(fd: RawFd, nonblocking: bool) -> io::Result<()> {
    set_flag(fd, libc::O_NONBLOCK, nonblocking)
}

/// Sets or clears O_ASYNC: whether SIGIO reports events on a descriptor.
pub fn set_async(fd: RawFd, is_async: bool) -> io::Result<()> {
    set_flag(fd, libc::O_ASYNC, is_async)
}

fn set_flag(fd: RawFd, flag: libc::c_int, on: bool) -> io::Result<()> {
    // SAFETY: fcntl checks the descriptor.
    unsafe {
        let flags = check(libc::fcntl(fd, libc::F_GETFL))?;
        let flags = if on { flags | flag } else { flags & !flag };
        check(libc::fcntl(fd, libc::F_SETFL, flags)).map(drop)
    }
}

/// Creates a pipe as `(reader, writer)`. Both ends are closed on exec.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (writer, reader) = mio::unix::pipe::new()?;
    writer.set_nonblocking(false)?;
    reader.set_nonblocking(false)?;
    Ok((reader.into(), writer.into()))
}

/// Takes stdin and stdout, the stream with which this process was started, away from R. From now on, output
/// of R and of other code goes to stderr, and stdin is empty.
pub fn take_stdio() -> io::Result<(File, File)> {
    let reader = take_stdin()?;
    let writer = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    redirect(2, 1)?;
    Ok((reader, writer))
}

/// Takes stdin away from R. From now on, R reads an empty stdin.
pub fn take_stdin() -> io::Result<File> {
    let reader = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let null = File::open("/dev/null")?;
    redirect(null.as_raw_fd(), 0)?;
    Ok(reader)
}

/// Maximum number of descriptors in one message. The system closes descriptors for which there is no room.
const MAX_MESSAGE_DESCRIPTORS: usize = 4;

/// Room for the control message that carries descriptors, as aligned as a `cmsghdr` must be.
type Control = [u64; 8];

const fn control_len(count: usize) -> usize {
    // SAFETY: CMSG_SPACE only computes a size.
    unsafe { libc::CMSG_SPACE((count * size_of::<RawFd>()) as libc::c_uint) as usize }
}

const _: () = assert!(control_len(MAX_MESSAGE_DESCRIPTORS) <= size_of::<Control>());

/// Reads from a socket, together with the descriptors that were sent, which are closed on exec. With `wait`
/// the call blocks until something arrives; otherwise the error is `WouldBlock` if nothing has arrived.
pub fn recv(
    fd: RawFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
    wait: bool,
) -> io::Result<usize> {
    const FLAGS: libc::c_int = libc::MSG_CMSG_CLOEXEC;
    let flags = FLAGS | if wait { 0 } else { libc::MSG_DONTWAIT };
    let mut control: Control = [0; 8];
    let mut slice = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: an all-zero msghdr is a valid empty one; its pointers outlive the call, and its lengths are
    // those of the buffers. The macros walk only the headers that the system has filled in. Nobody else
    // owns the received descriptors.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut slice;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = control_len(MAX_MESSAGE_DESCRIPTORS) as _;
        let n = libc::recvmsg(fd, &raw mut message, flags);
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let first = libc::CMSG_DATA(header).cast::<RawFd>();
                for at in 0..bytes / size_of::<RawFd>() {
                    let fd = OwnedFd::from_raw_fd(first.add(at).read_unaligned());
                    descriptors.push(fd);
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
        Ok(n)
    }
}

/// Writes to a socket. A closed peer is an error and never a SIGPIPE, because R's handler for SIGPIPE would
/// jump out of our frames.
pub fn send(fd: RawFd, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
    send_with(fd, slices, None)
}

/// Writes to a socket like [`send`], and sends the descriptor `along` with the first byte.
pub fn send_with(fd: RawFd, slices: &[io::IoSlice<'_>], along: Option<RawFd>) -> io::Result<usize> {
    let mut control: Control = [0; 8];
    const FLAGS: libc::c_int = libc::MSG_NOSIGNAL;
    // SAFETY: IoSlice is guaranteed to be laid out as iovec; an all-zero msghdr is a valid empty
    // one; sendmsg only reads through the pointers. The control message has room for a header and a
    // descriptor.
    let n = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = slices.as_ptr().cast_mut().cast();
        message.msg_iovlen = slices.len() as _;
        if let Some(along) = along {
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = control_len(1) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            if !header.is_null() {
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as libc::c_uint) as _;
                libc::CMSG_DATA(header)
                    .cast::<RawFd>()
                    .write_unaligned(along);
            }
        }
        libc::sendmsg(fd, &raw const message, FLAGS)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// The id of the process that created the socket pair to which `fd` belongs, if the system reports it.
pub fn maker_of_pair(fd: RawFd) -> Option<u32> {
    // SAFETY: all zeroes are a valid ucred, which the call fills; the length is that of the ucred.
    unsafe {
        let mut peer: libc::ucred = std::mem::zeroed();
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        let (level, name) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
        let out = (&raw mut peer).cast();
        check(libc::getsockopt(fd, level, name, out, &raw mut len)).ok()?;
        u32::try_from(peer.pid).ok()
    }
}

/// Flushes the buffers of C's stdio, so that a forked child does not write them a second time.
pub fn flush_stdio() {
    // SAFETY: a null stream means all streams.
    unsafe { libc::fflush(std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::memfd::{memory_file, seal};
    use std::io::{IoSlice, Read, Write};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    fn is_open(fd: RawFd) -> bool {
        // SAFETY: no memory effects.
        unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
    }

    #[test]
    fn a_descriptor_is_received_with_its_bytes_and_closed_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file = memory_file().unwrap();
        file.write_all(b"in memory").unwrap();
        seal(&file).unwrap();
        let slices = [IoSlice::new(b"one"), IoSlice::new(b"two")];
        let along = Some(file.as_raw_fd());
        assert_eq!(send(ours.as_raw_fd(), &slices).unwrap(), 6);
        assert_eq!(send_with(ours.as_raw_fd(), &slices, along).unwrap(), 6);
        drop(file);
        let (mut buffer, mut came, mut n) = ([0; 64], Vec::new(), 0);
        while n < 12 {
            n += recv(theirs.as_raw_fd(), &mut buffer[n..], &mut came, true).unwrap();
        }
        assert_eq!(&buffer[..n], b"onetwoonetwo");
        let none = recv(theirs.as_raw_fd(), &mut buffer, &mut came, false);
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(came.len(), 1);
        // SAFETY: no memory effects.
        let flags = unsafe { libc::fcntl(came[0].as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        let mut file = File::from(came.remove(0));
        let mut text = [0; 9];
        file.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"in memory");
        assert_eq!(file.read(&mut buffer).unwrap(), 0);
        assert!(file.write_all_at(b"x", 0).is_err());
        assert!(file.set_len(3).is_err() && file.set_len(30).is_err());
    }

    #[test]
    fn excess_descriptors_are_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..9).map(|_| memory_file().unwrap()).collect();
        let mut control = [0u64; 16];
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: as in send_with, with room for them all.
        unsafe {
            let mut slice = libc::iovec {
                iov_base: b"x".as_ptr().cast_mut().cast(),
                iov_len: 1,
            };
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut slice;
            message.msg_iovlen = 1;
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = control_len(fds.len()) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN((4 * fds.len()) as libc::c_uint) as _;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            std::ptr::copy_nonoverlapping(fds.as_ptr(), data, fds.len());
            assert_eq!(libc::sendmsg(ours.as_raw_fd(), &raw const message, 0), 1);
        }
        drop(files);
        let mut came = Vec::new();
        recv(theirs.as_raw_fd(), &mut [0; 9], &mut came, true).unwrap();
        // The padding of the control message may fit one more.
        assert!(came.len() <= MAX_MESSAGE_DESCRIPTORS + 1, "{}", came.len());
        let fds: Vec<RawFd> = came.iter().map(AsRawFd::as_raw_fd).collect();
        assert!(fds.iter().all(|&fd| is_open(fd)));
    }
}
