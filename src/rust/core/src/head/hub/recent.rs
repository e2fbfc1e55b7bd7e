//! What the scheduler has reported, for the log and for bug reports: who and why, and nothing that tasks or
//! their workers said.

use crate::head::scheduler::events::{Note, Outcome, Termination};
use crate::protocol::ids::{Rank, TaskId};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tracing::{debug, info, warn};

/// Events that are remembered.
const MAX_EVENTS: usize = 200;

/// Something that is not part of a task's usual life.
#[derive(Clone, Debug, PartialEq)]
pub struct RecentEvent {
    /// When, since the cluster began.
    pub at: Duration,
    /// What happened.
    pub what: &'static str,
    /// The host's index among all, if the event is one of a host.
    pub agent: Option<usize>,
    /// The worker, if the event is one of a worker.
    pub rank: Option<Rank>,
    /// The task, if the event is one of a task.
    pub task: Option<TaskId>,
    /// How it came to that; empty if there is no more to say.
    pub why: String,
}

/// The last events, in order.
#[derive(Debug, Default)]
pub struct Recent(VecDeque<RecentEvent>);

impl Recent {
    /// Logs a note, and remembers it if it is unusual. `began`: when the cluster did.
    pub fn note(&mut self, note: &Note, began: Instant) {
        // What is part of every start, task or interrupt is only logged, and costs nothing if it is not.
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
        // As R counts.
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

    /// The events that are remembered, oldest first.
    pub fn events(&self) -> impl Iterator<Item = &RecentEvent> {
        self.0.iter()
    }
}

fn why(termination: &Termination) -> String {
    match termination {
        Termination::Worker(failure) => failure.to_string(),
        Termination::Host(reason) => reason.clone(),
        Termination::Stopped => "stopped".into(),
    }
}

/// What is to be said of a note; `None` of what is usual, or belongs to tasks.
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
        Note::Back { rank, pid } => worker("worker back", rank, format!("pid {pid}")),
        Note::StateNotLogged { rank } => worker("set-up log full", rank, String::new()),
        Note::Terminated { rank, termination } => worker("worker gone", rank, why(termination)),
        Note::Ended {
            rank,
            timed_out: true,
        } => worker("worker killed, slow to stop", rank, String::new()),
        Note::LeftOut { agent, reason } => host("host left out", agent, reason.clone()),
        // The reason may name packages and paths, which the user asked for; R has it.
        Note::StartFailed { agent, .. } => host("host not started", agent, String::new()),
        Note::Failed { agent, reason } => host("agent failed", agent, reason.clone()),
        // The command line is the user's.
        Note::LeftBehind {
            agent, rank, pid, ..
        } => of(
            "process left behind",
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
        | Note::Ended { .. }
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
    fn what_is_remembered_is_bounded_and_unusual() {
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
    fn what_workers_and_processes_said_is_left_out() {
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
        let told: Vec<_> = recent.events().map(|event| format!("{event:?}")).collect();
        assert_eq!(told.len(), 2);
        assert!(
            told.iter().all(|event| !event.contains("secret")),
            "{told:?}"
        );
    }
}
