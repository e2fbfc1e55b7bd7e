//! Recent events of the scheduler, for the log and for bug reports. Events contain workers and reasons, but no output
//! of tasks or workers.

use crate::head::scheduler::events::{Note, Outcome, Termination};
use crate::protocol::ids::{Rank, TaskId};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tracing::{debug, info, warn};

/// Maximum number of recorded events.
const MAX_EVENTS: usize = 200;

/// An event that is not part of the normal life cycle of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct RecentEvent {
    /// When the event happened, since the start of the cluster.
    pub at: Duration,
    /// What happened.
    pub what: &'static str,
    /// The index of the host, if the event concerns a host.
    pub agent: Option<usize>,
    /// The worker, if the event concerns a worker.
    pub rank: Option<Rank>,
    /// The task, if the event concerns a task.
    pub task: Option<TaskId>,
    /// The reason; empty if there is none.
    pub why: String,
}

/// The last events, in order.
#[derive(Debug, Default)]
pub struct Recent(VecDeque<RecentEvent>);

impl Recent {
    /// Logs a note, and records it if it is unusual. `began`: when the cluster started.
    pub fn note(&mut self, note: &Note, began: Instant) {
        // Notes of every start, task or interrupt are only logged, and cost nothing if logging is off.
        match note {
            Note::Up { rank, pid } => return info!(rank = rank + 1, pid, "worker up"),
            Note::Done {
                rank,
                task,
                outcome,
                ..
            } => match outcome {
                Outcome::Answer(body) => {
                    return debug!(task, rank = rank + 1, bytes = body.len, "task answered");
                }
                Outcome::Cancelled => return debug!(task, rank = rank + 1, "task cancelled"),
                Outcome::Revoked => return debug!(task, rank = rank + 1, "task revoked"),
                Outcome::Lost(_) | Outcome::TimedOut => {}
            },
            _ => {}
        }
        let Some(event) = event(note, began) else {
            return;
        };
        let RecentEvent {
            what, task, why, ..
        } = &event;
        // R counts hosts and workers from 1.
        let (agent, rank) = (
            event.agent.map(|at| at + 1),
            event.rank.map(|rank| rank + 1),
        );
        let why = Some(why.as_str()).filter(|why| !why.is_empty());
        match note {
            Note::Lost { .. }
            | Note::LeftOut { .. }
            | Note::Failed { .. }
            | Note::StartFailed { .. } => {
                warn!(task, rank, agent, why, "{what}");
            }
            _ => info!(task, rank, agent, why, "{what}"),
        }
        if self.0.len() == MAX_EVENTS {
            self.0.pop_front();
        }
        self.0.push_back(event);
    }

    /// The recorded events, oldest first.
    pub fn events(&self) -> impl Iterator<Item = &RecentEvent> {
        self.0.iter()
    }
}

fn why(termination: &Termination) -> String {
    match termination {
        Termination::Worker(failure) => failure.to_string(),
        Termination::Host(reason) => reason.clone(),
        Termination::Stopped => "stopped".into(),
        Termination::JobEnded(reason) => format!("its job ended: {reason}"),
    }
}

/// The event to record for a note; `None` if the note is usual or contains output of tasks.
fn event(note: &Note, began: Instant) -> Option<RecentEvent> {
    let of = |what, agent, rank, why| RecentEvent {
        at: began.elapsed(),
        what,
        agent,
        rank,
        task: None,
        why,
    };
    let worker = |what, rank: &Rank, why| of(what, None, Some(*rank), why);
    let host = |what, agent: &usize, why| of(what, Some(*agent), None, why);
    Some(match note {
        Note::Lost { rank, failure, .. } => worker("worker lost", rank, failure.to_string()),
        Note::Replaced { rank, pid, killed } => {
            let killed = match killed {
                Some(_) => ", after an interrupt",
                None => "",
            };
            worker("worker replaced", rank, format!("pid {pid}{killed}"))
        }
        Note::Back { rank, pid } => worker("worker restarted", rank, format!("pid {pid}")),
        Note::StateNotLogged { rank } => worker("set-up log full", rank, String::new()),
        Note::Terminated { rank, termination } => {
            worker("worker terminated", rank, why(termination))
        }
        Note::Ended {
            rank,
            timed_out: true,
        } => worker("worker killed, slow to stop", rank, String::new()),
        Note::Draining { agent, reason, .. } => host("host draining", agent, reason.clone()),
        Note::GivenBack { agent } => host("host given back", agent, String::new()),
        Note::Drained { agent, .. } => host("host drained", agent, String::new()),
        Note::LeftOut { agent, reason } => host("host left out", agent, reason.clone()),
        // The reason is left out, because it may name the user's packages and paths; R reports it.
        Note::StartFailed { agent, .. } => host("host not started", agent, String::new()),
        Note::Failed { agent, reason } => host("agent failed", agent, reason.clone()),
        // The command line is left out, because it is the user's.
        Note::LeftBehind {
            agent, rank, pid, ..
        } => of(
            "process detached",
            Some(*agent),
            *rank,
            format!("pid {pid}"),
        ),
        Note::Done {
            rank,
            task,
            outcome,
            ..
        } => {
            let (what, why) = match outcome {
                Outcome::Lost(termination) => ("task lost", why(termination)),
                Outcome::TimedOut => ("task timed out", String::new()),
                Outcome::Answer(_) | Outcome::Cancelled | Outcome::Revoked => return None,
            };
            RecentEvent {
                task: Some(*task),
                ..worker(what, rank, why)
            }
        }
        Note::Up { .. }
        | Note::Kept { .. }
        | Note::SetupCalls { .. }
        | Note::SetupCall { .. }
        | Note::KeptAnswers { .. }
        | Note::Ended { .. }
        | Note::TimedOut { .. }
        | Note::TaskFailed { .. }
        | Note::Output { .. }
        | Note::ProgressEvent { .. }
        | Note::Usage { .. }
        | Note::Dump { .. } => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::body::Body;
    use crate::protocol::control::WorkerFailure;

    fn lost(tail: &str) -> WorkerFailure {
        WorkerFailure {
            pid: 7,
            tail: tail.into(),
            ..WorkerFailure::default()
        }
    }

    #[test]
    fn only_unusual_events_are_recorded_up_to_a_maximum() {
        let (mut recent, began) = (Recent::default(), Instant::now());
        let answered = Note::Done {
            rank: 0,
            task: 1,
            job: 1,
            outcome: Outcome::Answer(Body::default()),
        };
        recent.note(&answered, began);
        assert_eq!(recent.events().count(), 0);
        for pid in 0..MAX_EVENTS as u32 + 5 {
            recent.note(&Note::Up { rank: 2, pid }, began);
            recent.note(&Note::Back { rank: 2, pid }, began);
        }
        assert_eq!(recent.events().count(), MAX_EVENTS);
        assert_eq!(recent.events().next().unwrap().why, "pid 5");
    }

    #[test]
    fn output_and_command_lines_are_not_recorded() {
        let (mut recent, began) = (Recent::default(), Instant::now());
        let notes = [
            Note::Lost {
                rank: 0,
                failure: lost("secret"),
                task: true,
            },
            Note::LeftBehind {
                agent: 0,
                rank: Some(0),
                pid: 8,
                command: "secret".into(),
            },
            Note::Output {
                rank: 0,
                bytes: bytes::Bytes::from_static(b"secret"),
            },
        ];
        for note in &notes {
            recent.note(note, began);
        }
        let events: Vec<_> = recent.events().map(|event| format!("{event:?}")).collect();
        assert_eq!(events.len(), 2);
        assert!(
            events.iter().all(|event| !event.contains("secret")),
            "{events:?}"
        );
    }
}
