//! The numbers by which head, agents and workers name tasks, jobs, workers and blobs.

/// Identifies a task. The number is unique over all workers of a cluster and its whole life.
pub type TaskId = u64;
/// Bit in the numbers of tasks that restore workers of a reconnected host.
pub const RESTORE: TaskId = 1 << 62;
/// Bit in the numbers of tasks whose answers an agent keeps for the next head, if it has none. R reads the numbers as
/// doubles, which are exact up to 2^53.
pub const KEEP: TaskId = 1 << 52;
/// Groups the tasks of one call of a verb, so that they can be cancelled together.
pub type JobId = u64;
/// The job of all calls for the first free worker: see `any_of` of the scheduler's orders.
pub const CALLS: JobId = JobId::MAX;
/// A worker's index in its cluster, from 0.
pub type Rank = u32;

/// Identifies a blob. The number is unique over all hosts of a cluster and its whole life; it never
/// names other bytes.
pub type BlobId = u64;
