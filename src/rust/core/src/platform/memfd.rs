//! Sealed files in memory, which processes share and nobody can change.

use super::fd::check;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Creates an anonymous file in memory.
///
/// # Errors
/// When the system has no descriptor or memory left.
pub fn memory_file() -> io::Result<File> {
    let make = |flags| {
        let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the string ends with a NUL; nobody else owns the descriptor.
        unsafe {
            let fd = libc::memfd_create(c"rustcluster".as_ptr(), flags);
            check(fd).map(|fd| File::from_raw_fd(fd))
        }
    };
    match make(libc::MFD_NOEXEC_SEAL) {
        // Kernels before 6.3 do not know this flag.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => make(0),
        made => made,
    }
}

/// Seals a [`memory_file`]: nobody can change it any more.
///
/// # Errors
/// When the file is mapped for writing.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: fcntl checks its arguments.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// Whether a file is sealed: nobody can write to it, shrink it or grow it. Only a [`memory_file`] can be
/// sealed.
pub fn is_sealed(file: &File) -> bool {
    let needed = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    // SAFETY: fcntl checks its arguments.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & needed == needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sealed_file_cannot_be_written() {
        let mut file = memory_file().unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        seal(&file).unwrap();
        // SAFETY: the mapping is not used.
        assert!(unsafe { memmap2::MmapMut::map_mut(&file) }.is_err());
        // Opening the file again through /proc does not make it writable either.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let again = File::options().write(true).open(path).unwrap();
        assert!(again.write_all_at(b"x", 0).is_err());
    }
}
