//! Drains: planned ends of agents and workers.
//!
//! A draining worker gets nothing new. Tasks that any worker may run are revoked. Tasks that are bound to the worker,
//! and calls that no available worker may run, still run there. The worker is stopped once it has nothing left, and an
//! agent once all of its workers have terminated.

use super::Scheduler;
use super::events::{Note, Termination};
use super::worker::{Worker, WorkerState};
use crate::platform::exit::Exit;
use crate::protocol::control::{DrainCause, ToAgent, WorkerFailure};
use crate::protocol::ids::{Rank, TaskId};
use std::collections::BTreeSet;
use std::sync::Arc;
use tracing::info;

/// The drain of an agent whose batch job ends.
#[derive(Debug)]
pub(super) struct AgentDrain {
    /// Why the job ends, as far as the agent has announced it.
    pub(super) cause: Option<DrainCause>,
    /// Why workers of the agent terminate from now on.
    pub(super) termination: Arc<Termination>,
    /// The host had nothing to do: see [`super::give_back`].
    pub(super) given_back: bool,
}

/// What has to be checked after each event.
#[derive(Debug, Default)]
pub(super) struct Drains {
    /// Draining workers that have not terminated.
    workers: BTreeSet<Rank>,
    /// Agents with workers that drain or have been drained, which have not been asked to end.
    pub(super) agents: BTreeSet<usize>,
}

impl Drains {
    /// Whether nothing drains.
    pub(super) fn is_empty(&self) -> bool {
        self.workers.is_empty() && self.agents.is_empty()
    }
}

impl Scheduler {
    /// The agent has announced the end of its job. Announcements that add nothing are ignored, so that an agent cannot
    /// fill the memory with notes.
    pub fn drain_agent(&mut self, agent: usize, cause: DrainCause, seconds: Option<u32>) {
        let Some(known) = self.agents.get(agent) else {
            return;
        };
        let before = known.drain.as_ref();
        let known_before = |drain: &AgentDrain| drain.given_back || drain.cause >= Some(cause);
        if known.out.is_closed() || before.is_some_and(known_before) {
            return;
        }
        self.begin_drain(agent, Some(cause), cause.to_string(), seconds);
    }

    /// The batch job of this agent has ended or is about to end, as the batch engine says. To be called before the end
    /// of the agent's stream, if possible: the workers of an agent that was lost before have terminated with their host.
    pub fn job_ended(&mut self, agent: usize, reason: String) {
        let known = self.agents.get(agent);
        if known.is_some_and(|known| known.drain.is_none() && !known.out.is_closed()) {
            self.begin_drain(agent, None, reason, None);
        }
    }

    fn begin_drain(
        &mut self,
        agent: usize,
        cause: Option<DrainCause>,
        reason: String,
        seconds: Option<u32>,
    ) {
        info!(agent = agent + 1, reason, seconds, "agent drains");
        let termination = Arc::new(Termination::JobEnded(reason.clone()));
        self.agents[agent].drain = Some(AgentDrain {
            cause,
            termination: termination.clone(),
            given_back: false,
        });
        self.drains.agents.insert(agent);
        self.notes.push(Note::Draining {
            agent,
            reason,
            seconds,
        });
        for rank in self.agents[agent].ranks.clone() {
            self.drain_worker(rank, &termination);
        }
    }

    /// Drains a worker: it gets nothing new, and terminates for this reason when it has nothing left. A worker that the
    /// user removes stays removed.
    pub fn drain_worker(&mut self, rank: Rank, termination: &Arc<Termination>) {
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        self.drains.workers.insert(rank);
        self.drains.agents.insert(worker.agent);
        if worker.draining.as_deref() != Some(&Termination::Stopped) {
            worker.draining = Some(termination.clone());
        }
        if matches!(worker.state, WorkerState::Terminated(_)) {
            // A worker of a lost host, or one that waits for its restart, does not come back.
            return self.end_removed(rank);
        }
        let next = worker.next.as_ref().map(|next| &next.task);
        let waiting = next.into_iter().chain(&worker.queue);
        let movable: Vec<TaskId> = waiting.filter(|task| task.movable).map(|t| t.id).collect();
        for task in movable {
            self.revoke(rank, task);
        }
        // Calls that waited for another worker may now be bound to this one.
        self.dispatch(rank);
    }

    /// Why a worker terminates when it has nothing left, if it is draining.
    pub fn draining(&self, rank: Rank) -> Option<&Arc<Termination>> {
        self.workers.get(rank as usize)?.draining.as_ref()
    }

    /// Whether any of these workers is neither draining nor terminated.
    pub(super) fn any_available(&self, ranks: &[Rank]) -> bool {
        ranks.iter().any(|&rank| {
            let worker = self.workers.get(rank as usize);
            worker.is_some_and(|worker| {
                let terminated = matches!(worker.state, WorkerState::Terminated(_));
                worker.draining.is_none() && !terminated
            })
        })
    }

    /// How a worker that has failed terminated. Batch engines also send their signals to all processes of a job.
    pub(super) fn termination_of(&self, agent: usize, failure: WorkerFailure) -> Arc<Termination> {
        const OF_ENGINE: [i32; 4] = [libc::SIGTERM, libc::SIGKILL, libc::SIGUSR1, libc::SIGUSR2];
        let by_engine = match failure.exit {
            Exit::Signal(signal) => OF_ENGINE.contains(&signal) && !failure.oom,
            _ => false,
        };
        match &self.agents[agent].drain {
            Some(drain) if by_engine && failure.setback.pause == 0 => drain.termination.clone(),
            _ => Arc::new(Termination::Worker(failure)),
        }
    }

    /// A worker has been lost with its host. If the user was removing the worker, it stays away.
    pub(super) fn end_removed(&mut self, rank: Rank) {
        let worker = &self.workers[rank as usize];
        if worker.draining.as_deref() == Some(&Termination::Stopped) {
            self.stop_worker(rank);
        }
    }

    /// Whether a worker, which is draining, has nothing left to do.
    fn is_drained(&self, rank: Rank) -> bool {
        let worker = &self.workers[rank as usize];
        let has_tasks =
            worker.current.is_some() || worker.next.is_some() || !worker.queue.is_empty();
        !has_tasks
            && worker.awaiting_retry.is_none()
            && !self.is_reserved(rank)
            && !self.has_bound_call(rank)
    }

    /// Stops the draining workers that have nothing left, and the agents whose workers have all terminated.
    pub(super) fn stop_drained(&mut self) {
        if self.drains.is_empty() {
            return;
        }
        for rank in self.drains.workers.iter().copied().collect::<Vec<_>>() {
            let worker = &self.workers[rank as usize];
            let over = match &worker.state {
                WorkerState::Terminated(termination) => !termination.is_tried_again(),
                _ => false,
            };
            match worker.draining.clone() {
                Some(termination) if !over => {
                    if self.is_drained(rank) {
                        info!(rank = rank + 1, "drained worker stops");
                        self.end_worker(rank, termination);
                        self.drains.workers.remove(&rank);
                    }
                }
                _ => {
                    self.drains.workers.remove(&rank);
                }
            }
        }
        for agent in self.drains.agents.iter().copied().collect::<Vec<_>>() {
            self.stop_drained_agent(agent);
        }
    }

    fn stop_drained_agent(&mut self, at: usize) {
        let agent = &self.agents[at];
        let mut ranks = agent.ranks.iter();
        let any_drains = ranks.any(|rank| self.drains.workers.contains(rank));
        let worker = |&rank: &Rank| &self.workers[rank as usize];
        let mut workers = agent.ranks.iter().map(worker);
        let is_terminated = |worker: &Worker| matches!(worker.state, WorkerState::Terminated(_));
        let terminated = workers.clone().all(is_terminated);
        // The agent of a closed stream has been lost or left out.
        let may_end = terminated && !agent.ranks.is_empty() && !agent.out.is_closed();
        let removed = may_end
            && workers.all(|worker| {
                let stopped =
                    |termination: &Arc<Termination>| **termination == Termination::Stopped;
                let before = match &worker.state {
                    WorkerState::Terminated(before) => stopped(before),
                    _ => false,
                };
                worker.draining.as_ref().is_some_and(stopped) || before
            });
        let ends = may_end && (agent.drain.is_some() || removed && self.any_of_agent_draining(at));
        if !any_drains {
            self.drains.agents.remove(&at);
        }
        if ends {
            self.drains.agents.remove(&at);
            info!(agent = at + 1, "drained agent stops");
            // A message without fields fits into a frame.
            let _ = self.send_control(at, &ToAgent::Stop);
            self.notes.push(Note::Drained { agent: at, removed });
        }
    }

    fn any_of_agent_draining(&self, agent: usize) -> bool {
        let mut ranks = self.agents[agent].ranks.iter();
        ranks.any(|&rank| self.draining(rank).is_some())
    }
}
