//! The retry policy for tasks that were lost with their worker: one policy for verbs, jobs and calls.
//!
//! Pure. A [`Policy`] is known before the first task is sent; [`Attempts`] is kept with each task until its end.
//!
//! 1. Only [`Outcome::Lost`](super::scheduler::events::Outcome::Lost) is a loss. A task that exceeded its time limit,
//!    was cancelled, was revoked or raised an error is never retried.
//! 2. A lost task is retried `retries` times. With the next loss the task fails, and other tasks continue.
//! 3. With a policy that raises, the first loss ends the verb or the call with that loss as its error.
//! 4. A task of a stopped worker ends its verb or call whatever the policy, because the worker will not be replaced.
//! 5. A task that was lost because its worker's batch job ended is sent again, and the loss does not count as an attempt.
//!    After [`MAX_JOB_ENDS`] such losses, further ones count.
//! 6. A loss causes a warning only if the worker is replaced. The permanent loss of a host or worker is an event, which
//!    is reported once and not for each of its tasks.

use super::scheduler::events::Termination;
use crate::protocol::ids::{Rank, TaskId};
use tracing::info;

/// Maximum number of losses of a task by the end of a batch job that do not count as attempts: a task that takes longer
/// than each job must fail at last.
pub const MAX_JOB_ENDS: usize = 5;

/// How often a lost task is retried. All tasks of a verb, a job or a call have the same policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Maximum number of times that a task is sent again after a loss.
    pub retries: usize,
    /// The first loss is the error of the whole verb or call.
    pub raises: bool,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy::new(0)
    }
}

impl Policy {
    /// The policy of a cluster with this many `retries`. Without retries, the first loss is an error.
    pub fn new(retries: usize) -> Policy {
        Policy {
            retries,
            raises: retries == 0,
        }
    }
}

/// What happens to a lost task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The task is sent again.
    Retry,
    /// The task fails; other tasks go on.
    GiveUp,
    /// The loss is the error of the verb or the call that the task belongs to.
    Raise,
}

/// The losses of one task, each described by an `L`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempts<L> {
    failures: Vec<L>,
    /// Recorded losses that do not count as attempts.
    uncounted: usize,
}

impl<L> Default for Attempts<L> {
    fn default() -> Attempts<L> {
        Attempts {
            failures: Vec::new(),
            uncounted: 0,
        }
    }
}

impl<L> Attempts<L> {
    /// Decides what happens to the task if it is lost for this reason. Changes nothing: the caller may be interrupted
    /// while it carries out the verdict, and then asks again.
    pub fn verdict(&self, policy: Policy, termination: &Termination) -> Verdict {
        if matches!(termination, Termination::Stopped) {
            Verdict::Raise
        } else if self.is_uncounted(termination) {
            Verdict::Retry
        } else if policy.raises {
            Verdict::Raise
        } else if self.failures.len() - self.uncounted < policy.retries {
            Verdict::Retry
        } else {
            Verdict::GiveUp
        }
    }

    /// Whether a loss for this reason does not count as an attempt.
    fn is_uncounted(&self, termination: &Termination) -> bool {
        matches!(termination, Termination::JobEnded(_)) && self.uncounted < MAX_JOB_ENDS
    }

    /// Records a loss for this reason, whose verdict has been carried out.
    pub fn record(&mut self, failure: L, termination: &Termination) {
        self.uncounted += usize::from(self.is_uncounted(termination));
        self.failures.push(failure);
    }

    /// All recorded losses, the oldest first.
    pub fn failures(&self) -> &[L] {
        &self.failures
    }
}

/// Whether a loss causes a warning of its own. `replaced`: the worker was replaced.
pub fn is_reported(termination: &Termination, replaced: bool) -> bool {
    replaced && matches!(termination, Termination::Worker(_))
}

/// Logs that an attempt at a task ended with its worker. For a batch, `attempt` is the largest attempt number of its
/// tasks.
pub fn log_attempt(task: TaskId, assigned: Rank, attempt: usize, again: bool) {
    info!(task, rank = assigned + 1, attempt, again, "attempt failed");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::exit::Exit;
    use crate::protocol::control::{Setback, WorkerFailure};
    use proptest::prelude::*;

    fn crash() -> Termination {
        Termination::Worker(WorkerFailure {
            pid: 4711,
            exit: Exit::Signal(9),
            tail: String::new(),
            oom: false,
            memory_available: 0,
            setback: Setback::default(),
        })
    }

    fn host() -> Termination {
        Termination::Host("the connection was closed".into())
    }

    /// Returns the verdicts on these losses, each recorded by its number, until the task has ended.
    fn verdicts(policy: Policy, failures: &[Termination]) -> (Vec<Verdict>, Attempts<usize>) {
        let mut attempts = Attempts::default();
        let mut verdicts = Vec::new();
        for (number, termination) in failures.iter().enumerate() {
            let verdict = attempts.verdict(policy, termination);
            verdicts.push(verdict);
            if verdict == Verdict::Raise {
                break;
            }
            attempts.record(number, termination);
            if verdict == Verdict::GiveUp {
                break;
            }
        }
        (verdicts, attempts)
    }

    #[test]
    fn a_task_fails_with_the_loss_after_its_last_retry() {
        use Verdict::{GiveUp, Retry};
        let failures = vec![crash(); 9];
        let (decided, attempts) = verdicts(Policy::new(2), &failures);
        assert_eq!(decided, [Retry, Retry, GiveUp]);
        assert_eq!(attempts.failures(), [0, 1, 2]);
        assert_eq!(verdicts(Policy::new(1), &failures).0, [Retry, GiveUp]);
    }

    #[test]
    fn without_retries_a_loss_is_an_error_unless_the_policy_does_not_raise() {
        let (decided, attempts) = verdicts(Policy::new(0), &[crash()]);
        assert_eq!(decided, [Verdict::Raise]);
        assert!(attempts.failures().is_empty());
        let results = Policy {
            raises: false,
            ..Policy::new(0)
        };
        assert_eq!(verdicts(results, &[host()]).0, [Verdict::GiveUp]);
    }

    #[test]
    fn a_stopped_worker_ends_the_verb_whatever_the_policy() {
        for retries in [0, 1, 1_000_000] {
            for raises in [false, true] {
                let policy = Policy { retries, raises };
                assert_eq!(
                    verdicts(policy, &[Termination::Stopped]).0,
                    [Verdict::Raise]
                );
            }
        }
        let failures = [crash(), Termination::Stopped];
        let decided = verdicts(Policy::new(5), &failures).0;
        assert_eq!(decided, [Verdict::Retry, Verdict::Raise]);
    }

    fn job_end() -> Termination {
        Termination::JobEnded("time limit".into())
    }

    #[test]
    fn the_end_of_a_job_is_no_attempt_until_it_has_happened_too_often() {
        use Verdict::{GiveUp, Raise, Retry};
        for policy in [Policy::new(0), Policy::new(1)] {
            let losses = vec![job_end(); MAX_JOB_ENDS + 9];
            let (decided, attempts) = verdicts(policy, &losses);
            let mut expected = vec![Retry; MAX_JOB_ENDS];
            match policy.raises {
                true => expected.push(Raise),
                false => expected.extend([Retry, GiveUp]),
            }
            assert_eq!(decided, expected);
            assert!(attempts.failures().len() >= MAX_JOB_ENDS);
        }
        let losses = [job_end(), crash(), job_end(), crash(), crash()];
        assert_eq!(
            verdicts(Policy::new(1), &losses).0,
            [Retry, Retry, Retry, GiveUp]
        );
        assert!(!is_reported(&job_end(), true));
    }

    #[test]
    fn the_verdict_is_the_same_until_it_has_been_carried_out() {
        let mut attempts = Attempts::default();
        for _ in 0..3 {
            assert_eq!(attempts.verdict(Policy::new(1), &crash()), Verdict::Retry);
        }
        attempts.record((), &crash());
        assert_eq!(attempts.verdict(Policy::new(1), &crash()), Verdict::GiveUp);
    }

    #[test]
    fn only_the_loss_of_a_replaced_worker_causes_a_warning() {
        assert!(is_reported(&crash(), true));
        assert!(!is_reported(&crash(), false));
        assert!(!is_reported(&host(), true));
        assert!(!is_reported(&Termination::Stopped, true));
    }

    proptest! {
        #[test]
        fn ends_of_jobs_change_no_other_verdict(
            retries in 0_usize..6,
            raises: bool,
            kinds in proptest::collection::vec(0_u8..3, 0..12),
        ) {
            let policy = Policy { retries, raises };
            let losses: Vec<Termination> = kinds
                .iter()
                .map(|kind| match kind {
                    0 => job_end(),
                    1 => host(),
                    _ => crash(),
                })
                .collect();
            // Few enough ends of jobs do not count.
            prop_assume!(losses.iter().filter(|&loss| *loss == job_end()).count() <= MAX_JOB_ENDS);
            let others: Vec<Termination> = losses.iter().filter(|&loss| *loss != job_end()).cloned().collect();
            let (decided, _) = verdicts(policy, &losses);
            let pairs = decided.iter().zip(&losses);
            let (of_jobs, rest): (Vec<_>, Vec<_>) = pairs.partition(|(_, loss)| **loss == job_end());
            prop_assert!(of_jobs.iter().all(|(verdict, _)| **verdict == Verdict::Retry));
            let rest: Vec<Verdict> = rest.into_iter().map(|(verdict, _)| *verdict).collect();
            prop_assert_eq!(rest, verdicts(policy, &others).0);
        }

        #[test]
        fn a_task_is_started_at_most_once_more_than_it_may_be_retried(
            retries in 0_usize..6,
            raises: bool,
            kinds in proptest::collection::vec(0_u8..8, 0..12),
        ) {
            let failures: Vec<Termination> = kinds
                .iter()
                .map(|kind| match kind {
                    0 => Termination::Stopped,
                    1 | 2 => host(),
                    _ => crash(),
                })
                .collect();
            let policy = Policy { retries, raises };
            let (decided, attempts) = verdicts(policy, &failures);
            let retried = decided.iter().filter(|&&verdict| verdict == Verdict::Retry).count();
            let stopped = failures.iter().position(|termination| *termination == Termination::Stopped);
            // Each loss before a stop is retried, up to the maximum.
            let before = stopped.unwrap_or(failures.len());
            prop_assert_eq!(retried, if raises { 0 } else { before.min(retries) });
            // Only the last verdict ends the task.
            prop_assert!(decided.iter().rev().skip(1).all(|&verdict| verdict == Verdict::Retry));
            match decided.last() {
                None => prop_assert!(failures.is_empty()),
                Some(Verdict::Raise) => prop_assert!(raises || stopped == Some(decided.len() - 1)),
                Some(Verdict::GiveUp) => {
                    prop_assert!(!raises);
                    prop_assert_eq!(attempts.failures().len(), retries + 1);
                }
                Some(Verdict::Retry) => prop_assert_eq!(decided.len(), failures.len()),
            }
            // Each loss whose verdict was carried out is recorded once, in order.
            let count = decided.len() - usize::from(decided.last() == Some(&Verdict::Raise));
            prop_assert_eq!(attempts.failures(), &(0..count).collect::<Vec<_>>()[..]);
        }
    }
}
