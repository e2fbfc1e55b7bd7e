//! Bringing the workers of a host that is back to the state they had.

use super::shared::Core;
use super::spool::Lasting;
use crate::protocol::dedup::{self, Chunk};
use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::{RESTORE, Rank, TaskId};
use crate::scheduler::Outcome;
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};

/// So many workers are restored at the same time: what is sent to one has its chunks in memory, if not
/// their bytes.
const AT_ONCE: usize = 8;

/// A worker that is lost so often while it is being restored is given up.
const LOSSES: u32 = 3;

#[derive(Default)]
pub struct Restoring {
    waiting: VecDeque<Rank>,
    active: HashMap<Rank, Active>,
    next: TaskId,
}

/// A worker that is being restored.
struct Active {
    /// Of its tasks.
    first: TaskId,
    last: TaskId,
    losses: u32,
}

impl Core {
    /// A worker has come up. If it is one that was gone, it is to be restored.
    pub fn worker_up(&mut self, rank: Rank) {
        let gone = self.inbox.workers[rank as usize].gone.is_some();
        // It may wait since its host was there before.
        if gone && !self.restoring.waiting.contains(&rank) {
            self.restoring.waiting.push_back(rank);
        }
        self.restore_next();
    }

    /// The worker is what it was.
    fn back(&mut self, rank: Rank) {
        self.inbox.back(rank);
        self.scheduler.restored(rank);
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
            let Some(messages) = self.messages(rank) else {
                // Half a state would give wrong results without a word.
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
                    let losses = 0;
                    let active = Active {
                        first,
                        last,
                        losses,
                    };
                    self.restoring.active.insert(rank, active);
                }
                None => self.back(rank),
            }
        }
    }

    /// What a worker is restored by, if all of that is held.
    fn messages(&self, rank: Rank) -> Option<Vec<Lasting>> {
        let spool = self.spool.as_ref().filter(|spool| spool.is_complete());
        spool.and_then(|spool| spool.restore(rank).ok())
    }

    fn chunks(&self, rank: Rank, parts: Vec<Bytes>) -> Vec<Chunk> {
        let agent = self.inbox.workers[rank as usize].agent;
        let cut = match self.scheduler.shares(agent) {
            true => dedup::cut_whole,
            false => pieces,
        };
        parts.into_iter().flat_map(cut).collect()
    }

    /// A task has ended, which may be one of those that restore a worker.
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
            Outcome::Lost(gone) if !self.scheduler.is_gone(rank) => {
                active.losses += 1;
                let (first, last, losses) = (active.first, active.last, active.losses);
                // Its agent brings the next worker as far as this one was.
                let messages = self.messages(rank).filter(|_| losses < LOSSES);
                let message = messages.and_then(|m| m.into_iter().nth((task - first) as usize));
                if let Some((name, parts)) = message {
                    let chunks = self.chunks(rank, parts);
                    let order = (task, name, chunks);
                    return self.scheduler.restore_again(rank, order, task == last);
                }
                self.restoring.active.remove(&rank);
                self.scheduler.end_worker(rank, gone.clone());
            }
            // With its host, which may be back again, or for good.
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
