//! The operating system: processes, descriptors, memory, signals, limits. Knows nothing else of this
//! crate.

pub(crate) mod cgroup;
pub mod clock;
pub mod cores;
pub mod elf;
pub mod exit;
pub mod fd;
pub mod limits;
pub mod log;
pub mod memfd;
pub mod memory;
pub mod page_pool;
pub mod process;
pub mod reserve;
pub mod signals;
