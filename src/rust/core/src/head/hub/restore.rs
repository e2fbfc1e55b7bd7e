//! Restoring the workers of a reconnected host.

use super::core::Core;
use super::restore_queue::Active;
use crate::head::scheduler::events::Outcome;
use crate::head::setup_log_file::SetupMessage;
use crate::protocol::dedup::{self, Chunk};
use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::{RESTORE, Rank, TaskId};
use bytes::Bytes;

/// Maximum number of workers that are restored at the same time: the set-up calls that are being
/// sent have their chunks in memory, if not their bytes.
const RESTORES_AT_ONCE: usize = 8;

/// A worker that fails this often while it is being restored is given up.
const MAX_RESTORE_FAILURES: u32 = 3;

impl Core {
    /// A worker has come up. If it had terminated, it is restored.
    pub fn worker_up(&mut self, rank: Rank) {
        let terminated = self.inbox.workers[rank as usize].termination.is_some();
        // The worker may be queued since its host was reconnected before.
        if terminated && !self.restoring.waiting.contains(&rank) {
            self.restoring.waiting.push_back(rank);
        }
        self.restore_next();
    }

    /// The worker has been restored.
    fn back(&mut self, rank: Rank) {
        self.inbox.back(rank);
        self.scheduler.restored(rank);
    }

    fn restore_next(&mut self) {
        while self.restoring.active.len() < RESTORES_AT_ONCE {
            let Some(rank) = self.restoring.waiting.pop_front() else {
                return;
            };
            if !self.scheduler.is_up(rank) {
                // Its host was lost again.
                continue;
            }
            let Some(messages) = self.messages(rank) else {
                // Half a state would silently give wrong results.
                self.scheduler.stop_worker(rank);
                continue;
            };
            let first = RESTORE | self.restoring.next;
            let tasks: Vec<_> = (first..)
                .zip(messages)
                .map(|(task, (name, parts))| (task, name, self.chunks(rank, parts)))
                .collect();
            self.restoring.next += tasks.len() as TaskId;
            let last = tasks.last().map(|task| task.0);
            self.scheduler.restore(rank, tasks);
            match last {
                Some(last) => {
                    let failures = 0;
                    let active = Active {
                        first,
                        last,
                        failures,
                    };
                    self.restoring.active.insert(rank, active);
                }
                None => self.back(rank),
            }
        }
    }

    /// The set-up calls that restore a worker, if the log is complete.
    fn messages(&self, rank: Rank) -> Option<Vec<SetupMessage>> {
        let setup_log = self
            .setup_log
            .as_ref()
            .filter(|setup_log| setup_log.is_complete());
        setup_log.and_then(|setup_log| setup_log.restore(rank).ok())
    }

    fn chunks(&self, rank: Rank, parts: Vec<Bytes>) -> Vec<Chunk> {
        let agent = self.inbox.workers[rank as usize].agent;
        let cut = match self.scheduler.has_chunk_cache(agent) {
            true => dedup::cut_whole,
            false => pieces,
        };
        parts.into_iter().flat_map(cut).collect()
    }

    /// A task has ended. It may be a set-up call that restores a worker.
    pub fn restored(&mut self, rank: Rank, task: TaskId, outcome: &Outcome) {
        let Some(active) = self.restoring.active.get_mut(&rank) else {
            return;
        };
        if !(active.first..=active.last).contains(&task) {
            return;
        }
        match outcome {
            Outcome::Answer(_) if task < active.last => return,
            Outcome::Answer(_) => {
                self.restoring.active.remove(&rank);
                self.back(rank);
            }
            Outcome::Lost(termination) if !self.scheduler.is_terminated(rank) => {
                active.failures += 1;
                let (first, last, failures) = (active.first, active.last, active.failures);
                // The worker's agent restores the replacement as far as this worker was.
                let messages = self
                    .messages(rank)
                    .filter(|_| failures < MAX_RESTORE_FAILURES);
                let message = messages.and_then(|m| m.into_iter().nth((task - first) as usize));
                if let Some((name, parts)) = message {
                    let chunks = self.chunks(rank, parts);
                    let order = (task, name, chunks);
                    return self.scheduler.restore_again(rank, order, task == last);
                }
                self.restoring.active.remove(&rank);
                self.scheduler.end_worker(rank, termination.clone());
            }
            // The worker was lost with its host, which may be reconnected, or permanently.
            Outcome::Lost(_) => {
                self.restoring.active.remove(&rank);
            }
            _ => {
                self.restoring.active.remove(&rank);
                self.scheduler.stop_worker(rank);
            }
        }
        self.restore_next();
    }
}

fn pieces(mut message: Bytes) -> Vec<Chunk> {
    let mut pieces = Vec::new();
    while !message.is_empty() {
        pieces.push(message.split_to(message.len().min(MAX_BODY)).into());
    }
    pieces
}
