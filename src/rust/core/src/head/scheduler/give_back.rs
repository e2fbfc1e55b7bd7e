//! Hosts of batch jobs that are given back when they rest: their agents end, and their jobs with them.
//!
//! A host rests while none of its workers has anything to do. A worker of a verb that assigns tasks to workers does not
//! rest before the verb is over, because its next task may come at any time.

use super::drain::AgentDrain;
use super::events::{Note, Termination};
use super::worker::WorkerState;
use super::{AgentState, Scheduler};
use crate::protocol::ids::Rank;
use std::sync::Arc;
use std::time::Duration;
use tracing::info;

/// What workers of a host say that was given back.
const GIVEN_BACK: &str = "it had nothing to do and was given back";

/// The hosts of one launcher, and when they are given back.
#[derive(Clone, Debug)]
pub struct GiveBack {
    /// The hosts, by their index among all.
    pub agents: Vec<usize>,
    /// So many hosts are never given back.
    pub min: usize,
    /// How long a host rests before it is given back; `None`: hosts are not given back.
    pub idle: Option<Duration>,
}

impl Scheduler {
    /// Sets when hosts are given back. A launcher with the same hosts is replaced.
    pub fn give_back_when(&mut self, rule: GiveBack) {
        self.give_back.retain(|other| other.agents != rule.agents);
        self.give_back.push(rule);
    }

    /// The rules of [`Scheduler::give_back_when`].
    pub fn rules(&self) -> &[GiveBack] {
        &self.give_back
    }

    /// How long the shortest rest is after which a host is given back, if there is any.
    pub fn min_idle(&self) -> Option<Duration> {
        self.give_back.iter().filter_map(|rule| rule.idle).min()
    }

    /// Whether unassigned tasks of a verb wait: its workers then do not rest, although R may be busy with other things
    /// before it sends them a task.
    pub fn set_tasks_wait(&mut self, wait: bool) {
        self.tasks_wait = wait;
    }

    /// Gives back the hosts that have rested for long enough, the one with the longest rest first. The current time is
    /// that of [`Scheduler::at`]. Returns whether there was any.
    pub fn give_back_resting(&mut self) -> bool {
        let mut any = false;
        for rule in self.give_back.clone() {
            let Some(idle) = rule.idle else {
                continue;
            };
            let there = |&&at: &&usize| self.agents.get(at).is_some_and(AgentState::is_there);
            let spare = rule.agents.iter().filter(there).count();
            let mut spare = spare.saturating_sub(rule.min);
            let rests = |&at: &usize| self.rests_since(at).map(|since| (since, at));
            let mut resting: Vec<_> = rule.agents.iter().filter_map(rests).collect();
            resting.sort_unstable();
            for (since, at) in resting {
                if spare == 0 || self.now.saturating_sub(since) < idle {
                    break;
                }
                self.give_back_agent(at);
                spare -= 1;
                any = true;
            }
        }
        any
    }

    /// Since when a host rests, if it does.
    fn rests_since(&self, at: usize) -> Option<Duration> {
        let agent = self.agents.get(at).filter(|agent| agent.is_there())?;
        let mut any_up = false;
        for &rank in &agent.ranks {
            match &self.workers[rank as usize].state {
                WorkerState::Up if self.rests(rank) => any_up = true,
                WorkerState::Terminated(termination) if !termination.is_tried_again() => {}
                _ => return None,
            }
        }
        any_up.then_some(agent.active)
    }

    fn rests(&self, rank: Rank) -> bool {
        let worker = &self.workers[rank as usize];
        let has_tasks =
            worker.current.is_some() || worker.next.is_some() || !worker.queue.is_empty();
        let may_get_one = self.is_reserved(rank) && (!worker.movable || self.tasks_wait);
        let waits = worker.awaiting_retry.is_some() || worker.away;
        !(has_tasks || may_get_one || waits)
    }

    fn give_back_agent(&mut self, at: usize) {
        info!(agent = at + 1, "resting host is given back");
        let termination = Arc::new(Termination::JobEnded(GIVEN_BACK.to_owned()));
        self.agents[at].drain = Some(AgentDrain {
            cause: None,
            termination: termination.clone(),
            given_back: true,
        });
        // Another job may bring the host back: calls wait for it.
        self.agents[at].awaited = true;
        self.drains.agents.insert(at);
        self.notes.push(Note::GivenBack { agent: at });
        for rank in self.agents[at].ranks.clone() {
            self.release_from_verb(rank);
            self.drain_worker(rank, &termination);
        }
    }
}

impl AgentState {
    /// Whether the agent serves, and is not about to end.
    fn is_there(&self) -> bool {
        !self.awaited && self.drain.is_none() && !self.out.is_closed()
    }
}
