//! The numbers by which head, agents and workers name tasks, jobs, workers and payloads.

/// Identifies a task, for ever and over all workers of a cluster.
pub type TaskId = u64;
/// In the numbers of tasks by which the head restores workers of a host that is back.
pub const RESTORE: TaskId = 1 << 62;
/// Groups the tasks of one call of a verb, so that they can be cancelled together.
pub type JobId = u64;
/// That of all calls for whoever is free: see `any_of` of the scheduler's orders.
pub const CALLS: JobId = JobId::MAX;
/// A worker's index in its cluster, from 0.
pub type Rank = u32;

/// Identifies a payload, for ever and over all hosts of a cluster. It is never that of other bytes.
pub type PayloadId = u64;
