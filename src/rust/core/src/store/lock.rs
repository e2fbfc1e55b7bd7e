//! The lock of a run: one process at a time writes.
//!
//! The lock is one of `fcntl()`, which the system releases when the process ends in whatever way, also on NFS. It is
//! one of the whole process: closing any descriptor of the file releases it, and the same process may take it twice.
//! [`Lock`] therefore records the runs that this process has locked.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;

/// The files, by device and inode, that this process has locked.
static LOCKED: Mutex<Option<HashSet<(u64, u64)>>> = Mutex::new(None);

fn with_locked<T>(body: impl FnOnce(&mut HashSet<(u64, u64)>) -> T) -> T {
    let mut locked = LOCKED
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    body(locked.get_or_insert_default())
}

/// The lock of a run, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    key: (u64, u64),
    pid: u32,
}

/// Who has the lock, in the words of the one who took it: process id and host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The process.
    pub pid: Option<u32>,
    /// The name of its machine.
    pub host: Option<String>,
}

fn request(kind: libc::c_int) -> libc::flock {
    // SAFETY: all fields of the structure are numbers, for which 0 is valid.
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
        // Look at the file before it is opened: closing it would release the lock of this process.
        let is_ours = |key| with_locked(|locked| locked.contains(&key));
        if let Ok(found) = path.metadata() {
            if is_ours((found.dev(), found.ino())) {
                let pid = Some(std::process::id());
                return Ok(Err(Owner { pid, host: None }));
            }
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let found = file.metadata()?;
        let key = (found.dev(), found.ino());
        let request = request(libc::F_WRLCK);
        // SAFETY: the descriptor is open, and the request is valid.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const request) } != 0 {
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
        with_locked(|locked| locked.insert(key));
        Ok(Ok(Lock {
            _file: file,
            key,
            pid: std::process::id(),
        }))
    }

    /// Returns who has the lock, if anybody has.
    ///
    /// # Errors
    /// If the file cannot be read, or the file system has no locks.
    pub fn owner(path: &Path) -> io::Result<Option<Owner>> {
        let found = match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found?,
        };
        if with_locked(|locked| locked.contains(&(found.dev(), found.ino()))) {
            let pid = Some(std::process::id());
            return Ok(Some(Owner { pid, host: None }));
        }
        let mut file = File::open(path)?;
        let mut request = request(libc::F_RDLCK);
        // SAFETY: the descriptor is open, and the request is valid.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let is_free = request.l_type == libc::F_UNLCK as libc::c_short;
        Ok((!is_free).then(|| owner(&mut file)))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A fork of the process does not have its locks.
        if self.pid == std::process::id() {
            with_locked(|locked| locked.remove(&self.key));
        }
    }
}
