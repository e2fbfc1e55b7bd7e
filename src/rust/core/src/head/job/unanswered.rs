//! The tasks of a job that end without an answer: lost with their worker, too long at work, or with an answer that
//! cannot be read.

use super::{Codec, Dispatch, Halt, Job, SentBatch, Stepped};
use crate::head::batching::Assignment;
use crate::head::hub::Turn;
use crate::head::retry::{Attempts, Verdict, log_attempt};
use crate::head::scheduler::events::Termination;
use crate::protocol::ids::{Rank, TaskId};
use std::sync::Arc;
use std::time::Duration;

/// The loss of a message with its worker.
#[derive(Clone, Debug)]
pub struct BatchLoss {
    /// The worker that had it.
    pub assigned: Rank,
    /// How that worker ended.
    pub termination: Arc<Termination>,
    /// How the place of that worker is since then: `None` if a fresh worker has it.
    pub now: Option<Arc<Termination>>,
    /// The message.
    pub task: TaskId,
    /// Its tasks, from 0.
    pub tasks: Vec<usize>,
}

/// Tasks that have failed without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failed {
    /// A message has taken too long.
    TimedOut {
        /// The worker that it was given to.
        rank: Rank,
        /// Its tasks, from 0.
        tasks: Vec<usize>,
    },
    /// This task, from 0, was lost too often: see [`Job::failures`].
    GivenUp(usize),
}

impl Failed {
    /// These tasks, from 0.
    pub fn tasks(&self) -> &[usize] {
        match self {
            Failed::TimedOut { tasks, .. } => tasks,
            Failed::GivenUp(index) => std::slice::from_ref(index),
        }
    }
}

impl Job {
    /// The losses of a task, the first one first.
    pub fn failures(&self, index: usize) -> &[Arc<BatchLoss>] {
        self.attempts.get(&index).map_or(&[], Attempts::failures)
    }

    /// The end of a step after tasks may have failed.
    pub(super) fn failed<S>(&self) -> Result<bool, Halt<S>> {
        match self.failed.front() {
            Some(failed) => Err(Halt::Failed(failed.clone())),
            None => Ok(false),
        }
    }

    /// The results that [`Halt::Failed`] has asked for have been made. Returns whose.
    pub fn made(&mut self) -> Option<Failed> {
        let failed = self.failed.pop_front()?;
        self.done += failed.tasks().len();
        Some(failed)
    }

    /// A message was lost: retries those of its tasks that may be retried, and notes those that have failed.
    pub(super) fn lost<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        failure: BatchLoss,
    ) -> Stepped<(), C> {
        let first = Attempts::default();
        let verdict = |&index: &usize| {
            let attempts = self.attempts.get(&index).unwrap_or(&first);
            attempts.verdict(self.policy, &failure.termination)
        };
        let verdicts: Vec<Verdict> = failure.tasks.iter().map(verdict).collect();
        let attempts = failure
            .tasks
            .iter()
            .map(|&index| self.failures(index).len() + 1);
        let attempt = attempts.max().unwrap_or(1);
        let again = verdicts.contains(&Verdict::Retry);
        if verdicts.contains(&Verdict::Raise) {
            return Err(Halt::Lost(failure));
        }
        let Some(sent) = self.remove(failure.task) else {
            return Ok(());
        };
        log_attempt(failure.task, failure.assigned, attempt, again);
        let retried = |of: &[usize]| -> Vec<usize> {
            let verdicts = of.iter().zip(&verdicts);
            let retried = verdicts.filter(|(_, verdict)| **verdict == Verdict::Retry);
            retried.map(|(&of, _)| of).collect()
        };
        self.give_out(hub, codec, &sent, &retried(&sent.tasks))?;
        hub.forget(failure.task);
        codec.lost(&failure, &retried(&failure.tasks));
        let failure = Arc::new(failure);
        for (&index, verdict) in failure.tasks.iter().zip(verdicts) {
            self.attempts
                .entry(index)
                .or_default()
                .record(failure.clone());
            if verdict == Verdict::GiveUp {
                self.failed.push_back(Failed::GivenUp(index));
            }
        }
        Ok(())
    }

    /// The answer to a message cannot be read. Which of its tasks is the cause is not known: each of several is tried
    /// again alone. Returns the task if it was one: that has ended.
    ///
    /// # Errors
    /// When one of them cannot be sent.
    pub fn unreadable<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        task: TaskId,
    ) -> Stepped<Option<usize>, C> {
        let Some(sent) = self.remove(task) else {
            return Ok(None);
        };
        if let &[position] = &sent.tasks[..] {
            self.give_out(hub, codec, &sent, &[])?;
            self.done += 1;
            return Ok(Some(self.task(position)));
        }
        self.give_out(hub, codec, &sent, &sent.tasks)?;
        Ok(None)
    }

    /// A message has ended without an answer that could be read. `again`: those of its tasks that are to be
    /// given out again, one by one.
    pub(super) fn give_out<C: Codec>(
        &mut self,
        hub: &impl Dispatch,
        codec: &mut C,
        sent: &SentBatch,
        again: &[usize],
    ) -> Stepped<(), C> {
        let slot = sent.slot;
        self.planner.dropped(slot, false);
        let replaced = hub.termination(self.ranks[slot]).is_none();
        if self.assignment == Assignment::Round && replaced {
            // Before what follows them: they go on with the random numbers that those before have left.
            for &position in again.iter().rev() {
                self.send(hub, codec, slot, &[position], Duration::ZERO, Turn::First)?;
                self.planner.given_first(slot);
            }
        } else {
            self.planner.lost(slot, again);
        }
        // All that was with a worker which is gone is told as lost, and in its order.
        if replaced || self.assignment == Assignment::Free {
            self.ready.push_back(slot);
        }
        self.wake();
        Ok(())
    }
}
