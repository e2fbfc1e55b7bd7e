//! The memory limit of this worker.

use extendr_api::prelude::*;
use rustcluster_core::platform::limits;
use std::cell::Cell;
use std::io;

thread_local! {
    /// The memory limit in bytes; 0 for no limit.
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

/// Returns the memory limit of this worker in bytes; 0 for no limit.
/// @noRd
#[extendr]
fn worker_memory_limit() -> f64 {
    MEMORY_LIMIT.get() as f64
}

/// Returns whether vectors are mapped. A memory limit counts mappings, too. R does not free mappings when it
/// reaches the limit, but only vectors of its own.
pub(super) fn may_map() -> bool {
    MEMORY_LIMIT.get() == 0
}

extendr_module! {
    mod memory_limit;
    fn worker_memory_limit;
}
