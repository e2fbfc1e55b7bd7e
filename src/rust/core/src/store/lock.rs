//! The lock of a run: one process at a time writes.
//!
//! The lock belongs to an open file (`F_OFD_SETLK`). The system releases it when the process ends in whatever way, also on
//! NFS, but not when the process closes another descriptor of the file, as code that reads or copies the directory does.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

/// The lock of a run, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Who has the lock, in the words of the one who took it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The process.
    pub pid: Option<u32>,
    /// The name of its machine.
    pub host: Option<String>,
}

fn request(kind: libc::c_int) -> libc::flock {
    // SAFETY: all fields of the structure are numbers, for which 0 is valid. For these locks the pid has to be 0.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    request
}

fn owner(file: &mut File) -> Owner {
    let mut text = String::new();
    let mut read = || -> io::Result<()> {
        file.rewind()?;
        file.take(1_000).read_to_string(&mut text)?;
        Ok(())
    };
    if read().is_err() {
        return Owner::default();
    }
    let mut words = text.split_whitespace();
    Owner {
        pid: words.next().and_then(|pid| pid.parse().ok()),
        host: words.next().map(str::to_owned),
    }
}

impl Lock {
    /// Takes the lock, and writes this text into its file: see [`Owner`]. Returns the owner if another process, or
    /// another use of this process, has the lock.
    ///
    /// # Errors
    /// If the file cannot be made, or the file system has no locks.
    pub fn take(path: &Path, text: &str) -> io::Result<Result<Lock, Owner>> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let request = request(libc::F_WRLCK);
        // SAFETY: the descriptor is open, and the request is valid.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EACCES | libc::EAGAIN) => Ok(Err(owner(&mut file))),
                _ => Err(error),
            };
        }
        // The text is for people: a full disk must not keep the lock from being taken.
        let _ = file
            .set_len(0)
            .and_then(|()| file.write_all(text.as_bytes()));
        Ok(Ok(Lock { _file: file }))
    }

    /// Returns who has the lock, if anybody has.
    ///
    /// # Errors
    /// If the file cannot be read, or the file system has no locks.
    pub fn owner(path: &Path) -> io::Result<Option<Owner>> {
        let mut file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let mut request = request(libc::F_RDLCK);
        // SAFETY: the descriptor is open, and the request is valid.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let is_free = request.l_type == libc::F_UNLCK as libc::c_short;
        Ok((!is_free).then(|| owner(&mut file)))
    }
}
