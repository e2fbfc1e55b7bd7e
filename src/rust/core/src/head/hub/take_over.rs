//! Takes the set-up log over from agents that have had another head: the workers of hosts that join or come back later
//! need it. Agents list the set-up calls of their workers, by digests, and send the message of each call once.

use super::client::Hub;
use super::core::Core;
use crate::protocol::control::ToAgent;
use crate::protocol::dedup::Chunk;
use crate::protocol::frame::{ABORT, LAST};
use crate::protocol::ids::{Rank, TaskId};
use crate::protocol::setup_calls::name_of;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// The number of the tasks by which the log names calls of the head before. No task has it.
const BEFORE: TaskId = 1 << 61;

/// A set-up call, and the workers that have completed it as their next one.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    name: u64,
    digest: u128,
    ranks: Vec<Rank>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct TakeOver {
    /// Workers whose agents have not listed their calls yet.
    waiting: BTreeSet<Rank>,
    lists: BTreeMap<Rank, VecDeque<(u64, u128)>>,
    groups: VecDeque<Group>,
    /// The agent that was asked for the message of the first group, and the number of the request.
    asked: Option<(usize, u64)>,
    requests: u64,
    /// The workers whose agents have listed their calls.
    listed: Vec<Rank>,
}

/// The calls of all workers, in an order that is that of each worker. A call that other workers have completed, too,
/// waits until it is the next one of all of them, so that it is in one group.
fn group(mut lists: BTreeMap<Rank, VecDeque<(u64, u128)>>) -> VecDeque<Group> {
    let mut left: HashMap<(u64, u128), usize> = HashMap::new();
    for &call in lists.values().flatten() {
        *left.entry(call).or_default() += 1;
    }
    let mut groups = VecDeque::new();
    loop {
        let mut next: HashMap<(u64, u128), usize> = HashMap::new();
        for &call in lists.values().filter_map(VecDeque::front) {
            *next.entry(call).or_default() += 1;
        }
        let mut fronts = lists.values().filter_map(VecDeque::front);
        let is_next_of_all = |call: &&(u64, u128)| next.get(*call) == left.get(*call);
        let found = fronts.clone().find(is_next_of_all).or(fronts.next());
        let Some(&(name, digest)) = found else {
            return groups;
        };
        let mut ranks = Vec::new();
        for (&rank, list) in &mut lists {
            if list.front() == Some(&(name, digest)) {
                list.pop_front();
                ranks.push(rank);
            }
        }
        if let Some(left) = left.get_mut(&(name, digest)) {
            *left -= ranks.len();
        }
        groups.push_back(Group {
            name,
            digest,
            ranks,
        });
    }
}

impl Hub {
    /// Fills the set-up log from the logs of the agents, which have had another head. After [`Hub::go`].
    pub fn take_over(&mut self) {
        self.core().begin_take_over();
    }

    /// Whether the set-up log has been filled, as far as that is possible; waits up to `max_wait` for that.
    pub fn has_taken_over(&self, max_wait: Duration) -> bool {
        let over = |core: &mut Core| {
            core.advance_take_over();
            (core.take_over.is_none() || core.inbox.closed).then_some(())
        };
        self.inner.shared_core.wait(max_wait, over).is_some()
    }

    /// Gives up filling the set-up log: no host can join.
    pub fn end_take_over(&mut self) {
        let mut core = self.core();
        core.began_take_over = true;
        if core.take_over.take().is_some() {
            if let Some(setup_log) = &mut core.setup_log {
                setup_log.abandon();
                setup_log.miss();
            }
        }
    }
}

impl Core {
    fn begin_take_over(&mut self) {
        let mut take_over = TakeOver::default();
        for (rank, worker) in (0..).zip(&self.inbox.workers) {
            // A worker that its agent will restart has the calls that the agent has logged.
            if self.is_attached(worker.agent) && self.scheduler.is_left(rank) {
                take_over.waiting.insert(rank);
            }
        }
        for agent in 0..self.conns.len() {
            if self.is_attached(agent) {
                let _ = self.scheduler.send_control(agent, &ToAgent::SetupLog);
            }
        }
        self.take_over = Some(take_over);
        self.took_over = true;
        self.began_take_over = true;
        self.pump();
    }

    pub(super) fn on_setup_calls(
        &mut self,
        rank: Rank,
        complete: bool,
        calls: &[(u64, u128)],
        last: bool,
    ) {
        let Some(take_over) = &mut self.take_over else {
            return;
        };
        if !take_over.waiting.contains(&rank) {
            return;
        }
        take_over.lists.entry(rank).or_default().extend(calls);
        if last {
            take_over.waiting.remove(&rank);
        }
        if let Some(setup_log) = self.setup_log.as_mut().filter(|_| !complete) {
            setup_log.miss();
        }
        self.advance_take_over();
    }

    pub(super) fn on_setup_call(&mut self, request: u64, flags: u8, bytes: &Bytes) {
        let (Some(take_over), Some(setup_log)) = (&mut self.take_over, &mut self.setup_log) else {
            return;
        };
        if take_over.asked.is_none_or(|(_, asked)| asked != request) {
            return;
        }
        if flags & ABORT != 0 {
            setup_log.abandon();
            setup_log.miss();
        } else {
            setup_log.write(&[Chunk::from(bytes.clone())]);
        }
        if flags & LAST != 0 {
            if let Some(group) = take_over.groups.pop_front() {
                setup_log.finish_for(BEFORE, &group.ranks);
            }
            take_over.asked = None;
            self.advance_take_over();
        }
    }

    /// Asks for the next message.
    fn advance_take_over(&mut self) {
        let agents = 0..self.conns.len();
        let attached: Vec<bool> = agents.map(|agent| self.is_attached(agent)).collect();
        let (Some(take_over), Some(setup_log)) = (&mut self.take_over, &mut self.setup_log) else {
            self.take_over = None;
            return;
        };
        let scheduler = &self.scheduler;
        let workers = &self.inbox.workers;
        let is_there = |rank: Rank| {
            let worker = workers.get(rank as usize);
            worker.is_some_and(|worker| attached[worker.agent])
        };
        // A worker that has terminated in the meantime.
        take_over
            .waiting
            .retain(|&rank| is_there(rank) && scheduler.is_left(rank));
        if !take_over.waiting.is_empty() {
            return;
        }
        if let Some((agent, _)) = take_over.asked {
            if attached[agent] {
                return;
            }
            // The agent was lost while it sent the message.
            setup_log.abandon();
            take_over.asked = None;
        }
        if !take_over.lists.is_empty() {
            take_over.listed = take_over.lists.keys().copied().collect();
            setup_log.set_members(take_over.listed.iter().copied());
            take_over.groups = group(std::mem::take(&mut take_over.lists));
        }
        while let Some(group) = take_over.groups.front().filter(|_| setup_log.is_complete()) {
            let Some(&rank) = group.ranks.iter().find(|&&rank| is_there(rank)) else {
                // The call is of workers that are lost.
                take_over.groups.pop_front();
                continue;
            };
            let agent = workers[rank as usize].agent;
            take_over.requests += 1;
            let request = take_over.requests;
            take_over.asked = Some((agent, request));
            setup_log.begin(BEFORE, rank, group.name, None);
            let index = scheduler.index(rank);
            let message = ToAgent::SetupCall {
                worker: index,
                digest: group.digest,
                request,
            };
            let _ = self.scheduler.send_control(agent, &message);
            return;
        }
        // Workers of hosts that are lost get the calls of all others when they come back. A worker that has terminated,
        // whose host is there, has had no calls since, and gets none.
        let mut members = take_over.listed.clone();
        members.retain(|&rank| is_there(rank) && !scheduler.is_terminated(rank));
        if members.is_empty() {
            members = std::mem::take(&mut take_over.listed);
        }
        let ranks = 0..workers.len() as Rank;
        for rank in ranks.filter(|&rank| !is_there(rank)) {
            // The stream of random numbers of another worker must not be drawn from twice: see `seeds`.
            let own = Some(name_of(".Random.seed"));
            setup_log.begin_worker(rank, members.iter().copied(), own);
            members.push(rank);
        }
        self.take_over = None;
        self.changed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_all_workers_are_grouped_in_the_order_of_each() {
        // The workers have different random number streams (name 5).
        let lists = [
            (0, vec![(5, 1), (1, 7), (0, 8), (2, 9)]),
            (1, vec![(5, 2), (1, 7), (2, 9)]),
            (4, vec![(0, 8)]),
            (6, vec![]),
        ];
        let lists = lists.map(|(rank, calls)| (rank, calls.into()));
        let groups = group(lists.into());
        let expected = [
            (5, 1, vec![0]),
            (5, 2, vec![1]),
            (1, 7, vec![0, 1]),
            (0, 8, vec![0, 4]),
            (2, 9, vec![0, 1]),
        ];
        let expected = expected.map(|(name, digest, ranks)| Group {
            name,
            digest,
            ranks,
        });
        assert_eq!(groups, expected);
        assert!(group(BTreeMap::new()).is_empty());
    }
}
