//! Interfaces to the operating system: processes, descriptors, memory, signals, limits. No module here
//! depends on the rest of this crate.

pub mod background;
pub(crate) mod cgroup;
pub mod clock;
pub mod cores;
pub mod detached;
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
pub mod socket;
