//! Progress events that wait for R: what tasks report before their results.

use crate::protocol::frame::{FIRST, LAST};
use crate::protocol::ids::TaskId;
use std::collections::HashMap;

/// Maximum number of bytes that wait: further events are dropped.
pub const LIMIT: usize = 16 * 1024 * 1024;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct ProgressEvents {
    /// Each in one piece.
    complete: Vec<Vec<u8>>,
    /// Events of which a part has arrived, by the task.
    incomplete: HashMap<TaskId, Vec<u8>>,
    /// Bytes of both.
    bytes: usize,
}

impl ProgressEvents {
    /// Records a part of an event. An event that begins while there is no room is dropped. `max`: the maximum number of
    /// bytes that wait when an event has begun.
    pub fn add(&mut self, task: TaskId, flags: u8, bytes: &[u8], max: usize) {
        if flags & FIRST != 0 {
            self.drop_incomplete(task);
            if self.bytes + bytes.len() > LIMIT {
                return;
            }
            self.incomplete.insert(task, Vec::new());
        }
        let Some(event) = self.incomplete.get_mut(&task) else {
            return;
        };
        event.extend_from_slice(bytes);
        self.bytes += bytes.len();
        if self.bytes > max {
            self.drop_incomplete(task);
        } else if flags & LAST != 0 {
            let event = std::mem::take(event);
            self.incomplete.remove(&task);
            self.complete.push(event);
        }
    }

    /// Drops an event whose end has not arrived.
    pub fn drop_incomplete(&mut self, task: TaskId) {
        if let Some(event) = self.incomplete.remove(&task) {
            self.bytes -= event.len();
        }
    }

    /// Takes all complete events since the last call.
    pub fn take(&mut self) -> Vec<Vec<u8>> {
        self.bytes = self.incomplete.values().map(Vec::len).sum();
        std::mem::take(&mut self.complete)
    }

    /// Whether there is no complete event.
    pub fn is_empty(&self) -> bool {
        self.complete.is_empty()
    }
}
