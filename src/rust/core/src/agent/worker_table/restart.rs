//! What the end of a worker means, and when a replacement is started.

use super::{Ending, Now, WorkerPhase, WorkerTable};
use crate::protocol::control::Setback;
use std::time::Duration;

/// After this many consecutive workers that ended before they were restored, the agent pauses
/// before it starts the next one, and reports this to the head.
pub const SETBACKS: u32 = 3;

/// The first of these pauses. Each is twice as long as the one before.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause before another worker is made.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl WorkerTable {
    /// A worker's process has ended, or could not be started. `restorable`: a replacement can be
    /// restored.
    pub fn exited(&mut self, worker: u32, restorable: bool, now: Now) -> Ending {
        let Some(entry) = self.workers.get_mut(worker as usize) else {
            return Ending::Stopped { timed_out: false };
        };
        let phase = std::mem::replace(&mut entry.phase, WorkerPhase::Terminated);
        entry.hung_up = None;
        entry.limit = None;
        entry.progress_by = None;
        entry.passed = 0;
        entry.given = 0;
        let stalled = std::mem::take(&mut entry.stalled);
        if entry.stopping.is_some() {
            let timed_out = entry.stop_timed_out;
            return Ending::Stopped { timed_out };
        }
        let mut setback = Setback::default();
        if matches!(phase, WorkerPhase::Starting | WorkerPhase::Restoring { .. }) {
            entry.setbacks = entry.setbacks.saturating_add(1);
            let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            setback.count = entry.setbacks;
            setback.restoring = matches!(phase, WorkerPhase::Restoring { .. });
            setback.stalled = milliseconds(stalled);
        }
        if !restorable || !entry.came_up {
            // Messages that the head sends to it from now on have no receiver.
            return Ending::Lost {
                replaced: false,
                setback,
            };
        }
        // A worker that made no progress would most likely make none again.
        let pauses = entry.pause.is_some() || !stalled.is_zero() || entry.setbacks >= SETBACKS;
        if setback.count > 0 && pauses {
            let reported = entry.pause.is_some();
            let pause = entry.pause.unwrap_or(FIRST_PAUSE);
            entry.pause = Some((2 * pause).min(LONGEST_PAUSE));
            entry.restart_at = Some(now + pause);
            self.unsettled = true;
            if reported {
                return Ending::Waits;
            }
            // The head acknowledges what it learns of now at once.
            if !std::mem::take(&mut entry.unreported) {
                entry.unacknowledged += 1;
            }
            setback.pause = pause.as_millis() as u64;
            return Ending::Lost {
                replaced: false,
                setback,
            };
        }
        entry.phase = WorkerPhase::Starting;
        match phase {
            WorkerPhase::Starting | WorkerPhase::Restoring { .. } => Ending::Replace,
            WorkerPhase::Busy {
                cancelled: Some(_), ..
            } => {
                // The next task may be in flight, or have arrived. Another head than that of the task sends nothing
                // before it has been told of the worker.
                if !entry.left {
                    entry.unacknowledged += 1;
                    entry.unreported = true;
                }
                Ending::Replace
            }
            _ => {
                entry.unacknowledged += 1;
                Ending::Lost {
                    replaced: true,
                    setback,
                }
            }
        }
    }

    /// When to call [`WorkerTable::to_restart`] next.
    pub fn next_restart(&self) -> Option<Now> {
        let unsettled = self.workers.iter().filter(|_| self.unsettled);
        unsettled.filter_map(|entry| entry.restart_at).min()
    }

    /// Workers that are to be started now, after a pause.
    pub fn to_restart(&mut self, now: Now) -> Vec<u32> {
        let mut due = Vec::new();
        if !self.unsettled {
            return due;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            if entry.restart_at.take_if(|at| *at <= now).is_some() {
                entry.phase = WorkerPhase::Starting;
                due.push(worker as u32);
            }
        }
        due
    }

    /// Workers that have made no progress for too long, in starting or being restored: they are to
    /// be killed. To be called when everything that workers have sent has been processed.
    pub fn stalled(&mut self, now: Now) -> Vec<u32> {
        let restore_timeout = self.restore_timeout;
        let mut stalled = Vec::new();
        if !std::mem::take(&mut self.unsettled) {
            return stalled;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            let starts = matches!(
                entry.phase,
                WorkerPhase::Starting | WorkerPhase::Restoring { .. }
            );
            self.unsettled |= starts || entry.restart_at.is_some();
            if entry.progress_by.take_if(|at| *at <= now).is_some() {
                entry.stalled = entry.allowed(restore_timeout).unwrap_or_default();
                stalled.push(worker as u32);
            }
        }
        stalled
    }

    /// Gives this worker up permanently: it is not started again.
    pub fn give_up(&mut self, worker: u32) {
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            entry.phase = WorkerPhase::Terminated;
            entry.progress_by = None;
        }
    }
}
