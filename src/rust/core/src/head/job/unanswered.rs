//! Handles messages of a job that end without a readable answer: lost with their worker, timed out, or with an answer
//! that cannot be read.

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
    /// The worker that the message was assigned to.
    pub assigned: Rank,
    /// How that worker terminated.
    pub termination: Arc<Termination>,
    /// The permanent termination of the worker: `None` if the worker was replaced.
    pub now: Option<Arc<Termination>>,
    /// The message.
    pub task: TaskId,
    /// Its tasks, from 0.
    pub tasks: Vec<usize>,
}

/// Tasks that have failed without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failed {
    /// A message exceeded its time limit.
    TimedOut {
        /// The worker that the message was sent to.
        rank: Rank,
        /// Its tasks, from 0.
        tasks: Vec<usize>,
    },
    /// This task, from 0, was lost too often: see [`Job::failures`].
    GivenUp(usize),
}

impl Failed {
    /// The numbers of the failed tasks, from 0.
    pub fn tasks(&self) -> &[usize] {
        match self {
            Failed::TimedOut { tasks, .. } => tasks,
            Failed::GivenUp(index) => std::slice::from_ref(index),
        }
    }
}

impl Job {
    /// The losses of a task, the oldest first.
    pub fn failures(&self, index: usize) -> &[Arc<BatchLoss>] {
        self.attempts.get(&index).map_or(&[], Attempts::failures)
    }

    /// Ends a step in which tasks may have failed.
    pub(super) fn failed<S>(&self) -> Result<bool, Halt<S>> {
        match self.failed.front() {
            Some(failed) => Err(Halt::Failed(failed.clone())),
            None => Ok(false),
        }
    }

    /// Records that the caller has made the results that [`Halt::Failed`] requested. Returns their tasks.
    pub fn made(&mut self) -> Option<Failed> {
        let failed = self.failed.pop_front()?;
        self.ended(failed.tasks().len());
        self.gauge.add_unanswered(failed.tasks().len());
        Some(failed)
    }

    /// Handles the loss of a message: retries those of its tasks that may be retried, and records the others as failed.
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
                .record(failure.clone(), &failure.termination);
            if verdict == Verdict::GiveUp {
                self.failed.push_back(Failed::GivenUp(index));
            }
        }
        Ok(())
    }

    /// Handles an answer that cannot be read. If the message had several tasks, each is retried alone, because it is
    /// not known which of them is the cause. If it had one task, that task ends and is returned.
    ///
    /// # Errors
    /// When a task cannot be sent again.
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
            self.ended(1);
            return Ok(Some(self.task(position)));
        }
        for &position in &sent.tasks {
            let index = self.task(position);
            self.attempts.entry(index).or_default();
        }
        self.give_out(hub, codec, &sent, &sent.tasks)?;
        Ok(None)
    }

    /// Gives tasks back to the planner that were not sent, not started or not answered. Tasks that were lost or could not
    /// be read are sent alone again: they may end every worker that has them.
    pub(super) fn give_back(&mut self, slot: usize, positions: &[usize]) {
        // Most answers are complete.
        if positions.is_empty() {
            return;
        }
        let is_suspect = |position: &usize| self.attempts.contains_key(&self.task(*position));
        let (suspects, others): (Vec<usize>, Vec<usize>) =
            positions.iter().partition(|&p| is_suspect(p));
        if !suspects.is_empty() {
            self.planner.lost(slot, &suspects);
        }
        self.planner.returned(slot, &others);
    }

    /// Updates the planner after a message has ended without a readable answer. `again`: those of its tasks that are
    /// sent again, one by one.
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
            // Send them before the tasks that follow, because each task continues the random numbers of the previous
            // one.
            for &position in again.iter().rev() {
                self.send(hub, codec, slot, &[position], Duration::ZERO, Turn::First)?;
                self.planner.given_first(slot);
            }
        } else {
            self.planner.lost(slot, again);
        }
        // The slot of a terminated worker gets nothing: all its messages are reported as lost, in order.
        if replaced || self.assignment == Assignment::Free {
            self.ready.push_back(slot);
        }
        self.wake();
        Ok(())
    }
}
