//! Which workers of reconnected hosts wait to be restored, and which are being restored.

use crate::protocol::ids::{Rank, TaskId};
use std::collections::{HashMap, VecDeque};

/// See the module's documentation.
#[derive(Default)]
pub struct RestoreQueue {
    pub(super) waiting: VecDeque<Rank>,
    pub(super) active: HashMap<Rank, Active>,
    pub(super) next: TaskId,
}

/// A worker that is being restored.
#[derive(Default)]
pub(super) struct Active {
    /// The tasks that repeat its set-up calls, in order, and the numbers of these calls in the log.
    pub(super) calls: Vec<(TaskId, u64)>,
    /// The last task before which the worker had terminated: its known random number state follows.
    pub(super) leaves_seed: Option<TaskId>,
    pub(super) failures: u32,
    /// The worker was back before: it gets a call that was logged while it came back.
    pub(super) is_back: bool,
}
