//! Processes that outlive the process that started them, and the lock that tells whether such a process lives.
//!
//! The lock is one of `fcntl()`. The process takes it between fork and exec, and has it until it ends in whatever way:
//! from the start on, other processes and, on shared file systems, other machines see whether it lives.

use super::{fd, signals};
use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};

/// The environment variable in which a detached process finds the descriptor of its lock.
pub const LOCK_VARIABLE: &str = "RUSTCLUSTER_RUN_LOCK";

/// The smallest descriptor of a lock. Shells, which start R, use smaller ones.
const MIN_LOCK_FD: RawFd = 64;

/// The lock that this process has, by [`keep_lock`]; -1 if it has none.
static KEPT: AtomicI32 = AtomicI32::new(-1);

/// A process to start.
#[derive(Clone, Copy, Debug)]
pub struct Detached<'a> {
    /// The program and its arguments. No shell is involved.
    pub command: &'a [OsString],
    /// Variables to set in the environment, or to remove if the value is `None`.
    pub env: &'a [(OsString, Option<OsString>)],
    /// The working directory.
    pub directory: &'a Path,
    /// The file that the process locks. It is created if it is missing.
    pub lock: &'a Path,
    /// The file to which the process appends stdout and stderr. It is created if it is missing.
    pub log: &'a Path,
    /// Files to rename as soon as the process has the lock: their old and their new paths.
    pub renames: &'a [(PathBuf, PathBuf)],
}

impl Detached<'_> {
    /// Starts the process, in a session of its own without a terminal. Its parent is init: it is no child of this
    /// process. It ignores SIGHUP. Returns its process id, or `None` if another process has the lock.
    ///
    /// # Errors
    /// When the command cannot be run, a file cannot be opened or renamed, or the file system has no locks.
    pub fn start(&self) -> io::Result<Option<u32>> {
        let (program, arguments) = self
            .command
            .split_first()
            .ok_or_else(|| io::Error::other("no command"))?;
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.log)?;
        let lock = open_lock(self.lock)?;
        let lock_fd = lock.as_raw_fd();
        let renames = self
            .renames
            .iter()
            .map(|(from, to)| Ok((c_path(from)?, c_path(to)?)))
            .collect::<io::Result<Vec<_>>>()?;
        let (reader, writer) = fd::pipe()?;
        let writer_fd = writer.as_raw_fd();
        let request = WRITE_REQUEST;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .env(LOCK_VARIABLE, lock_fd.to_string());
        for (name, value) in self.env {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        // SAFETY: fork, setsid, pthread_sigmask, signal, fcntl, rename, close, getpid, write and _exit are async-signal-safe.
        // The descriptors are open in the fork, and the paths are C strings that live until then.
        unsafe {
            command.pre_exec(move || {
                match libc::fork() {
                    -1 => return Err(io::Error::last_os_error()),
                    0 => {}
                    _ => libc::_exit(0),
                }
                libc::setsid();
                signals::reset();
                libc::signal(libc::SIGHUP, libc::SIG_IGN);
                fd::check(libc::fcntl(lock_fd, libc::F_SETLK, &raw const request))?;
                let renamed = fd::check(libc::fcntl(lock_fd, libc::F_SETFD, 0)).and_then(|_| {
                    renames.iter().try_for_each(|(from, to)| {
                        fd::check(libc::rename(from.as_ptr(), to.as_ptr())).map(drop)
                    })
                });
                if let Err(error) = renamed {
                    // The other process hears of the error before this one has ended.
                    libc::close(lock_fd);
                    return Err(error);
                }
                let pid = libc::getpid().to_ne_bytes();
                libc::write(writer_fd, pid.as_ptr().cast(), pid.len());
                Ok(())
            });
        }
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                // A fork fails with the same error if there are too many processes.
                let refused = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
                return if refused && is_locked(self.lock)? {
                    Ok(None)
                } else {
                    Err(error)
                };
            }
        };
        drop(writer);
        // The child has ended already. Other code in R's process may have reaped it.
        let _ = child.wait();
        let mut pid = [0; 4];
        File::from(reader).read_exact(&mut pid)?;
        Ok(Some(u32::from_ne_bytes(pid)))
    }
}

/// The request for a lock of the whole file.
const WRITE_REQUEST: libc::flock = libc::flock {
    l_type: libc::F_WRLCK as libc::c_short,
    l_whence: libc::SEEK_SET as libc::c_short,
    l_start: 0,
    l_len: 0,
    l_pid: 0,
};

/// Opens the file of a lock, with a descriptor that shells do not use.
fn open_lock(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    // SAFETY: fcntl returns a new descriptor, which nothing else owns.
    unsafe {
        let fd = fd::check(libc::fcntl(
            file.as_raw_fd(),
            libc::F_DUPFD_CLOEXEC,
            MIN_LOCK_FD,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Makes this process, which [`Detached::start`] has started, keep its lock until it ends. Processes that this process
/// starts do not inherit the descriptor.
///
/// # Errors
/// When there is no such descriptor.
pub fn keep_lock(lock: RawFd) -> io::Result<()> {
    // SAFETY: fcntl checks the descriptor.
    fd::check(unsafe { libc::fcntl(lock, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    KEPT.store(lock, Ordering::Relaxed);
    Ok(())
}

/// Returns whether any process has the lock. There is no lock without its file.
///
/// # Errors
/// When the file cannot be read, or the file system has no locks.
pub fn is_locked(path: &Path) -> io::Result<bool> {
    let found = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found?,
    };
    // A process that opens and closes the file of its own lock loses the lock.
    if is_kept(found.dev(), found.ino()) {
        return Ok(true);
    }
    let file = File::open(path)?;
    let mut request = WRITE_REQUEST;
    // SAFETY: the descriptor is open, and the request is valid.
    fd::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut request) })?;
    Ok(request.l_type != libc::F_UNLCK as libc::c_short)
}

/// Returns whether this process has the lock of the file with this device and inode.
fn is_kept(device: u64, inode: u64) -> bool {
    let kept = KEPT.load(Ordering::Relaxed);
    if kept < 0 {
        return false;
    }
    // SAFETY: the structure is valid for fstat, which checks the descriptor; all its fields are numbers.
    unsafe {
        let mut status: libc::stat = std::mem::zeroed();
        libc::fstat(kept, &raw mut status) == 0 && (status.st_dev, status.st_ino) == (device, inode)
    }
}

/// Waits until the content of a file, or the entries of a directory, would survive a crash of the machine.
///
/// # Errors
/// When the file cannot be written.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::thread;
    use std::time::{Duration, Instant};

    const LONG: Duration = Duration::from_secs(30);

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("detached-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("new"), "state").unwrap();
            Directory(path)
        }

        fn start(&self, script: &str) -> io::Result<Option<u32>> {
            let command = ["sh", "-c", script].map(OsString::from);
            Detached {
                command: &command,
                env: &[(OsString::from("WORD"), Some(OsString::from("said")))],
                directory: &self.0,
                lock: &self.0.join("lock"),
                log: &self.0.join("log"),
                renames: &[(self.0.join("new"), self.0.join("state"))],
            }
            .start()
        }

        fn is_locked(&self) -> bool {
            is_locked(&self.0.join("lock")).unwrap()
        }

        fn log(&self) -> String {
            fs::read_to_string(self.0.join("log")).unwrap()
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn wait(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + LONG;
        while !condition() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_detached_process_has_its_lock_until_it_is_killed() {
        let directory = Directory::new("lock");
        assert!(!directory.is_locked());
        let pid = directory
            .start("echo $WORD; pwd; exec sleep 600")
            .unwrap()
            .unwrap();
        assert!(directory.is_locked());
        assert_eq!(fs::read(directory.0.join("state")).unwrap(), b"state");
        wait(|| directory.log().ends_with("lock\n"));
        assert!(directory.log().starts_with("said\n"));
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<u32> = stat
            .rsplit(") ")
            .next()
            .unwrap()
            .split(' ')
            .skip(1)
            .take(3)
            .map(|field| field.parse().unwrap())
            .collect();
        // The parent is another process. The process leads its group and its session.
        assert_ne!(fields[0], std::process::id());
        assert_eq!(fields[1..], [pid, pid]);
        fs::write(directory.0.join("new"), "other").unwrap();
        assert!(directory.start("echo second").unwrap().is_none());
        assert_eq!(fs::read(directory.0.join("state")).unwrap(), b"state");
        signals::kill(pid as i32, libc::SIGHUP).unwrap();
        assert!(directory.is_locked());
        signals::kill(pid as i32, libc::SIGKILL).unwrap();
        wait(|| !directory.is_locked());
        assert!(directory.start("echo third").unwrap().is_some());
        assert_eq!(fs::read(directory.0.join("state")).unwrap(), b"other");
        wait(|| directory.log().ends_with("third\n"));
    }

    #[test]
    fn what_cannot_be_started_is_an_error_and_changes_nothing() {
        let directory = Directory::new("error");
        fs::remove_file(directory.0.join("new")).unwrap();
        let error = directory.start("echo no").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!directory.is_locked());
        assert_eq!(directory.log(), "");
    }

    #[test]
    fn files_and_directories_can_be_synced() {
        let directory = Directory::new("sync");
        sync(&directory.0.join("new")).unwrap();
        sync(&directory.0).unwrap();
        assert!(sync(&directory.0.join("missing")).is_err());
        assert!(!is_locked(&directory.0.join("missing")).unwrap());
    }
}
