//! The memory limit of this worker.

use extendr_api::prelude::*;
use rustcluster_core::platform::limits;
use std::cell::Cell;
use std::io;

thread_local! {
    /// In bytes; 0: none.
    static MEMORY_LIMIT: Cell<u64> = const { Cell::new(0) };
}

/// Limits the memory of this process to this many bytes; 0: no limit.
pub(super) fn set(bytes: u64) -> io::Result<()> {
    if bytes > 0 {
        limits::limit_memory(bytes)?;
    }
    MEMORY_LIMIT.set(bytes);
    Ok(())
}

/// The bytes of memory that this worker may have; 0 if there is no limit.
/// @noRd
#[extendr]
fn worker_memory_limit() -> f64 {
    MEMORY_LIMIT.get() as f64
}

/// Whether vectors may be mapped. A memory limit counts mapped memory, and R frees only vectors of its own when it
/// runs into the limit.
pub(super) fn may_map() -> bool {
    MEMORY_LIMIT.get() == 0
}

extendr_module! {
    mod memory_limit;
    fn worker_memory_limit;
}
