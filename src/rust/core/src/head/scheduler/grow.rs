//! Agents and workers that are added to a running cluster.

use super::worker::Worker;
use super::{AgentState, Outbound, Scheduler};
use crate::head::activity::Moment;
use crate::protocol::ids::Rank;

impl AgentState {
    /// An agent with workers of these ranks.
    pub(super) fn new(ranks: Vec<Rank>) -> AgentState {
        AgentState {
            out: Outbound::new(ranks.len()),
            ranks,
            failures: 0,
            awaited: false,
            drain: None,
            active: Moment::ZERO,
        }
    }
}

impl Scheduler {
    /// Adds an agent. Its workers follow by [`Scheduler::add_workers`].
    pub fn add_agent(&mut self) {
        self.agents.push(AgentState::new(Vec::new()));
        self.flow.add_host();
    }

    /// Adds workers to an agent to which nothing has been sent. They get the next ranks, which are returned.
    pub fn add_workers(&mut self, agent: usize, count: usize) -> Vec<Rank> {
        let first = self.workers.len() as Rank;
        let ranks: Vec<Rank> = (first..).take(count).collect();
        for index in 0..count as u32 {
            self.workers.push(Worker::new(agent, index));
            self.flow.add_worker(agent);
        }
        self.agents[agent].out.set_workers(count);
        self.agents[agent].ranks.clone_from(&ranks);
        ranks
    }
}
