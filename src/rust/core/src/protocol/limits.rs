//! How much may be sent before the receiver asks for more, and how large a result may be.

/// Bytes of frames of tasks that may be on the way to a worker before its agent has passed them
/// on. Counted over all its tasks, so that those withdrawn half sent do not pile up in the agent
/// of a worker that does not read.
pub const SEND_WINDOW: usize = 1024 * 1024;
/// Bytes of a result that an agent sends without being asked: results up to here are "small".
pub const RESULT_WINDOW: usize = 256 * 1024;
/// Bytes of a large result that the head asks for at a time.
pub const GRANT: usize = 1024 * 1024;

/// Bytes of a result in shared memory, at most: sums of them are numbers, too.
pub const MOST_MEMORY: u64 = 1 << 47;
