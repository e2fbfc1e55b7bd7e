//! Restoring the workers of a reconnected host.

use super::core::Core;
use super::restore_queue::Active;
use crate::head::scheduler::events::Outcome;
use crate::head::scheduler::task::RestoreMessage;
use crate::head::setup_log_file::{NumberedCall, SetupLogFile};
use crate::protocol::dedup::{self, Chunk};
use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::{RESTORE, Rank, TaskId};
use bytes::Bytes;
use std::io;

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
        let is_known =
            self.restoring.waiting.contains(&rank) || self.restoring.active.contains_key(&rank);
        if terminated && !is_known {
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
                // Its host was lost again, or the worker is being replaced.
                continue;
            }
            let Some(calls) = self.setup_calls(|setup_log| setup_log.completed_calls(rank)) else {
                // Half a state would silently give wrong results.
                self.scheduler.stop_worker(rank);
                continue;
            };
            let messages = self.number(rank, calls);
            let active = self.restoring.active.entry(rank).or_default();
            active.leaves_seed = active.calls.last().map(|&(task, _)| task);
            let none = messages.is_empty();
            self.scheduler.restore(rank, messages);
            if none {
                self.all_sent(rank);
            }
        }
    }

    /// A set-up call was logged for a worker that had not joined. If the worker has joined since the call was begun, it
    /// gets the call now. A worker that is being restored gets the call before it joins.
    pub fn catch_up(&mut self, rank: Rank) {
        let is_back = self.inbox.workers[rank as usize].termination.is_none();
        // A worker that has terminated since gets the call when it joins again.
        let is_there = is_back && !self.scheduler.is_terminated(rank);
        if !is_there || self.restoring.active.contains_key(&rank) {
            return;
        }
        let is_back = true;
        let active = Active {
            is_back,
            ..Active::default()
        };
        self.restoring.active.insert(rank, active);
        self.all_sent(rank);
    }

    /// The worker has completed the set-up calls that it was sent. Others may have been logged since.
    fn all_sent(&mut self, rank: Rank) {
        if self.scheduler.is_terminated(rank) {
            // It was draining. If another takes its place, that one is restored anew.
            self.end_restore(rank);
            return;
        }
        let after = self
            .restoring
            .active
            .get(&rank)
            .and_then(|active| active.calls.last());
        let after = after.map(|&(_, number)| number);
        let setup_log = self.setup_log.as_ref();
        let is_behind = setup_log.is_some_and(|setup_log| setup_log.is_behind(rank));
        let more = match is_behind {
            true => self.setup_calls(|setup_log| setup_log.later_calls(rank, after)),
            false => Some(Vec::new()),
        };
        match more {
            Some(calls) if calls.is_empty() => {
                let was_back = self.end_restore(rank);
                if let Some(setup_log) = &mut self.setup_log {
                    setup_log.caught_up(rank);
                }
                if !was_back {
                    self.back(rank);
                }
            }
            Some(calls) => {
                let messages = self.number(rank, calls);
                self.scheduler.restore_more(rank, messages);
            }
            None => {
                self.end_restore(rank);
                self.scheduler.stop_worker(rank);
            }
        }
    }

    /// The worker is not being restored any more. Returns whether it was back before.
    fn end_restore(&mut self, rank: Rank) -> bool {
        if let Some(setup_log) = &mut self.setup_log {
            setup_log.unpin(rank);
        }
        let active = self.restoring.active.remove(&rank);
        active.is_some_and(|active| active.is_back)
    }

    /// Set-up calls of the log, if the log is complete.
    fn setup_calls<T>(
        &mut self,
        calls: impl FnOnce(&mut SetupLogFile) -> io::Result<T>,
    ) -> Option<T> {
        let setup_log = self
            .setup_log
            .as_mut()
            .filter(|setup_log| setup_log.is_complete());
        setup_log.and_then(|setup_log| calls(setup_log).ok())
    }

    /// Gives set-up calls the numbers of tasks.
    fn number(&mut self, rank: Rank, calls: Vec<NumberedCall>) -> Vec<RestoreMessage> {
        let mut messages = Vec::with_capacity(calls.len());
        for (number, (name, parts)) in calls {
            let task = RESTORE | self.restoring.next;
            self.restoring.next += 1;
            let active = self.restoring.active.entry(rank).or_default();
            active.calls.push((task, number));
            messages.push((task, name, self.chunks(rank, parts)));
        }
        messages
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
        let Some(at) = active.calls.iter().position(|&(known, _)| known == task) else {
            return;
        };
        if let (Outcome::Answer(_), Some(setup_log)) = (outcome, &mut self.setup_log) {
            setup_log.caught_up_to(rank, active.calls[at].1);
        }
        match outcome {
            Outcome::Answer(_) if at + 1 < active.calls.len() => return,
            Outcome::Answer(_) => self.all_sent(rank),
            Outcome::Lost(termination) if !self.scheduler.is_terminated(rank) => {
                active.failures += 1;
                let (number, failures) = (active.calls[at].1, active.failures);
                let last = active.leaves_seed == Some(task);
                let sets_seed = active.leaves_seed.is_none_or(|last| task > last);
                // The worker's agent restores the replacement as far as this worker was.
                let call = self.setup_calls(|setup_log| setup_log.call(number));
                if let Some((name, parts)) = call.filter(|_| failures < MAX_RESTORE_FAILURES) {
                    let chunks = self.chunks(rank, parts);
                    let order = (task, name, chunks);
                    return self.scheduler.restore_again(rank, order, last, sets_seed);
                }
                self.end_restore(rank);
                self.scheduler.end_worker(rank, termination.clone());
            }
            // The worker was lost with its host, which may be reconnected, or permanently.
            Outcome::Lost(termination) => {
                let was_back = self.end_restore(rank);
                if was_back && termination.is_tried_again() {
                    // Its agent does not know the call.
                    self.scheduler.stop_worker(rank);
                }
            }
            _ => {
                self.end_restore(rank);
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

#[cfg(test)]
pub(super) mod tests;
