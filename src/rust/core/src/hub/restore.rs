//! Bringing the workers of a host that is back to the state they had.

use super::shared::Core;
use crate::frame::MAX_BODY;
use crate::scheduler::{Outcome, RESTORE, Rank, TaskId};
use crate::share::{self, Chunk};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};

/// So many workers are restored at the same time: what is sent to one has its chunks in memory, if not
/// their bytes.
const AT_ONCE: usize = 8;

#[derive(Default)]
pub struct Restoring {
    waiting: VecDeque<Rank>,
    /// The last task of each that is being restored.
    active: HashMap<Rank, TaskId>,
    next: TaskId,
}

impl Core {
    /// A worker has come up. If it is one that was gone, it is to be restored.
    pub fn worker_up(&mut self, rank: Rank) {
        if self.inbox.workers[rank as usize].gone.is_some() {
            self.restoring.waiting.push_back(rank);
            self.restore_next();
        }
    }

    fn restore_next(&mut self) {
        while self.restoring.active.len() < AT_ONCE {
            let Some(rank) = self.restoring.waiting.pop_front() else {
                return;
            };
            if !self.scheduler.is_up(rank) {
                // Its host was lost again.
                continue;
            }
            let agent = self.inbox.workers[rank as usize].agent;
            let spool = self.spool.as_ref().filter(|spool| spool.is_complete());
            let messages = spool.and_then(|spool| spool.restore(rank).ok());
            let Some(messages) = messages else {
                // Half a state would give wrong results without a word.
                self.scheduler.stop_worker(rank);
                continue;
            };
            let shares = self.scheduler.shares(agent);
            let mut tasks = Vec::new();
            for (name, message) in messages {
                let chunks = if shares {
                    share::cut_whole(message)
                } else {
                    pieces(message)
                };
                tasks.push((RESTORE | self.restoring.next, name, chunks));
                self.restoring.next += 1;
            }
            let last = tasks.last().map(|task| task.0);
            self.scheduler.restore(rank, tasks);
            match last {
                Some(last) => {
                    self.restoring.active.insert(rank, last);
                }
                None => self.inbox.back(rank),
            }
        }
    }

    /// A task has ended, which may be one of those that restore a worker.
    pub fn restored(&mut self, rank: Rank, task: TaskId, outcome: &Outcome) {
        if task & RESTORE == 0 || !self.restoring.active.contains_key(&rank) {
            return;
        }
        match outcome {
            Outcome::Answer(_) => {
                if self.restoring.active.get(&rank) == Some(&task) {
                    self.restoring.active.remove(&rank);
                    self.inbox.back(rank);
                }
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
