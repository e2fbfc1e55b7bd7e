//! Files in memory that nobody can change any more: what processes share.

use super::fd::check;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// A file in memory alone that has no name.
///
/// # Errors
/// When the system has no descriptor or memory left.
pub fn memory_file() -> io::Result<File> {
    let make = |flags| {
        let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a string that ends with a NUL; the descriptor is owned by nobody else.
        unsafe {
            let fd = libc::memfd_create(c"rustcluster".as_ptr(), flags);
            check(fd).map(|fd| File::from_raw_fd(fd))
        }
    };
    match make(libc::MFD_NOEXEC_SEAL) {
        // An older system does not know that flag.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => make(0),
        made => made,
    }
}

/// Sees to it that nobody changes a [`memory_file`] any more.
///
/// # Errors
/// When somebody else has it mapped to write to it.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: fcntl checks its arguments.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// Whether nobody can change a file, nor cut it, any more. Only of a [`memory_file`] can that be said.
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
    fn nobody_can_write_to_what_is_sealed() {
        let mut file = memory_file().unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        seal(&file).unwrap();
        // SAFETY: what comes of it is not used.
        assert!(unsafe { memmap2::MmapMut::map_mut(&file) }.is_err());
        // Nor through the system's list of descriptors.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let again = File::options().write(true).open(path).unwrap();
        assert!(again.write_all_at(b"x", 0).is_err());
    }
}
