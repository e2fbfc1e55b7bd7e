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
pub(super) struct Active {
    /// The number of its first set-up call.
    pub(super) first: TaskId,
    pub(super) last: TaskId,
    pub(super) failures: u32,
}
