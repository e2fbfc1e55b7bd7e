//! Hosts that are added to a running cluster.
//!
//! [`Hub::add_hosts`] launches their agents. Once these have greeted, [`Hub::go_more`] adds their workers: as for hosts
//! that join late, the workers are terminated until they have the set-up log of the cluster. What happens to added hosts
//! is no event until [`Hub::added`]: R adds them in one call, which fails as a whole.

use super::client::{Hub, Progress};
use super::connection::{Conn, Plan};
use super::core::Core;
use super::inbox::WorkerView;
use crate::head::launch::{Launch, Source};
use crate::head::scheduler::events::Termination;
use crate::head::setup_log_file::SetupLogFile;
use crate::protocol::control::ToAgent;
use crate::protocol::ids::Rank;
use std::io;
use std::time::Duration;

impl Hub {
    /// Launches the agents of further hosts. [`Hub::greeted`] and [`Hub::progress`] are about these hosts from now on.
    ///
    /// # Errors
    /// When the cluster is ending.
    pub fn add_hosts(&mut self, hosts: Vec<Launch>) -> io::Result<()> {
        let shared_core = self.inner.shared_core.clone();
        let mut core = shared_core.core();
        if core.stopping || core.inbox.closed {
            return Err(io::Error::other("the cluster has been stopped"));
        }
        self.newest = core.conns.len();
        for host in hosts {
            let agent = core.conns.len();
            core.conns.push(Conn {
                dials: matches!(host.source, Source::DialBack { .. }),
                ..Conn::default()
            });
            core.inbox.add_host(&host.host);
            core.scheduler.add_agent();
            let launched = core
                .launches
                .as_ref()
                .map(|launches| launches.send((agent, host)));
            if !matches!(launched, Some(Ok(()))) {
                return Err(io::Error::other("the hub's thread has ended"));
            }
        }
        Ok(())
    }

    /// Whether the log has all set-up calls, which the workers of further hosts need.
    pub fn has_setup_log(&self) -> bool {
        let core = self.core();
        core.setup_log
            .as_ref()
            .is_some_and(SetupLogFile::is_complete)
    }

    /// Adds the workers of the hosts of the last [`Hub::add_hosts`]: a plan for each of these hosts. Their ranks follow
    /// those of the cluster. A host that has not greeted joins late. `like`: whether the set-up calls of a worker can be
    /// compared with those of others, since they have the same format.
    ///
    /// # Errors
    /// When a plan does not fit into one message, or the ranks are not the next ones.
    pub fn go_more(
        &mut self,
        plans: Vec<Option<Plan>>,
        like: impl Fn(Rank) -> bool,
    ) -> io::Result<()> {
        let shared_core = self.inner.shared_core.clone();
        let mut core = shared_core.core();
        let core = &mut *core;
        let members = core.members(like);
        let was_elastic = core.is_elastic;
        for (agent, plan) in (self.newest..).zip(plans) {
            let Some(plan) = plan else {
                core.leave_out(agent, "it is not used".to_owned());
                continue;
            };
            let ranks = core.scheduler.add_workers(agent, plan.ranks.len());
            core.inbox.add_workers(agent, ranks.len());
            self.size += ranks.len();
            self.members.1.resize(self.size, false);
            if ranks != plan.ranks {
                return Err(io::Error::other("these ranks are not the next ones"));
            }
            if let Some(setup_log) = &mut core.setup_log {
                for &rank in &ranks {
                    setup_log.begin_worker(rank, members.iter().copied(), None);
                }
            }
            self.has_chunk_cache |= plan.start.chunk_cache_bytes > 0;
            core.set_plan(agent, &plan.start);
            core.await_host(agent, plan.start);
            let host = &core.inbox.hosts[agent];
            if let Some(failure) = host.failure.clone() {
                core.give_up_awaited(agent, &failure);
            } else if core.is_attached(agent) {
                core.agent_joins(agent)?;
            }
        }
        if let Some(setup_log) = &mut core.setup_log {
            let ranks = 0..core.inbox.workers.len() as Rank;
            let new = |&rank: &Rank| core.inbox.workers[rank as usize].agent >= self.newest;
            setup_log.set_members(members.into_iter().chain(ranks.filter(new)));
        }
        core.is_elastic = was_elastic || core.conns.iter().any(|conn| conn.awaited || conn.dials);
        core.pump();
        Ok(())
    }

    /// The hosts that were added are hosts like all others: what happens to them from now on is reported.
    pub fn added(&mut self) {
        let mut core = self.core();
        for host in &mut core.inbox.hosts {
            host.adding = false;
        }
    }

    /// Whether the agents of all hosts from this one on have ended for good; waits up to `max_wait` for that.
    pub fn are_over(&self, first: usize, max_wait: Duration) -> bool {
        let over = |core: &mut Core| {
            let mut hosts = core.inbox.hosts.iter().skip(first);
            (core.inbox.closed || hosts.all(|host| host.over)).then_some(())
        };
        self.inner.shared_core.wait(max_wait, over).is_some()
    }
}

/// The progress of the workers of added hosts, which end their start when they have the set-up log.
pub(super) fn progress_of_added(core: &Core, newest: usize, tolerant: bool) -> Option<Progress> {
    let inbox = &core.inbox;
    if !tolerant {
        for (host, view) in inbox.hosts.iter().enumerate().skip(newest) {
            if let Some(reason) = view.start_failure.clone() {
                return Some(Progress::Refused { host, reason });
            }
        }
        for (rank, worker) in inbox.workers.iter().enumerate() {
            let failure = match worker.termination.as_deref() {
                Some(Termination::Worker(failure)) if worker.agent >= newest => failure.clone(),
                _ => continue,
            };
            let rank = rank as Rank;
            return Some(Progress::WorkerFailed { rank, failure });
        }
        for (host, view) in inbox.hosts.iter().enumerate().skip(newest) {
            if let Some(failure) = view.failure.clone() {
                return Some(Progress::HostFailed { host, failure });
            }
        }
    }
    let joins = |worker: &WorkerView| {
        let host = &inbox.hosts[worker.agent];
        let joining = host.awaited && host.hello.is_some() && host.failure.is_none();
        match worker.termination.as_deref() {
            Some(termination) => joining && termination.is_of_host(),
            None => worker.pid.is_none(),
        }
    };
    let mut new = inbox.workers.iter().filter(|w| w.agent >= newest);
    (!new.any(joins)).then_some(Progress::Up)
}

impl Core {
    /// The workers that have not terminated, or may come back.
    fn members(&self, like: impl Fn(Rank) -> bool) -> Vec<Rank> {
        let ranks = 0..self.inbox.workers.len() as Rank;
        let is_member = |&rank: &Rank| {
            let worker = &self.inbox.workers[rank as usize];
            let back = |t: &Termination| t.is_of_host() && self.takes_back(worker.agent);
            like(rank) && worker.termination.as_deref().is_none_or(back)
        };
        ranks.filter(is_member).collect()
    }

    /// Sends the plan to the agent of an added host, which has greeted: its workers join.
    fn agent_joins(&mut self, agent: usize) -> io::Result<()> {
        let Some(start) = self.conns[agent].plan.clone() else {
            return Err(io::Error::other("it was not part of the cluster"));
        };
        self.conns[agent].awaited = false;
        let sent = self.scheduler.agent_back(agent, &ToAgent::Start(start));
        sent.map_err(io::Error::other)?;
        self.conns[agent].planned.notify_one();
        Ok(())
    }
}
