//! How much may be sent before the receiver asks for more, and how large a result may be.

/// Bytes of task frames that may be sent to a worker before its agent has passed them on. The
/// window covers all tasks of the worker, so that tasks withdrawn half sent do not pile up in the
/// agent if the worker does not read.
pub const SEND_WINDOW: usize = 1024 * 1024;
/// Bytes of a result that an agent sends without being asked: results up to here are "small".
pub const RESULT_WINDOW: usize = 256 * 1024;
/// Bytes of a large result that the head grants at a time.
pub const GRANT: usize = 1024 * 1024;

/// Maximum length of a result in shared memory, so that sums of lengths do not overflow.
pub const MAX_RESULT_MEMORY: u64 = 1 << 47;
