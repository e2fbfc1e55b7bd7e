//! Hosts that join late, because they were slow or because their batch job had to wait.

use super::client::Hub;
use super::core::Core;
use super::inbox::HostFailure;
use crate::head::setup_log_file::SetupLogFile;
use crate::protocol::control::Start;
use crate::protocol::ids::Rank;
use crate::protocol::noise::Key;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

impl Hub {
    /// Whether hosts come and go: jobs without an assignment use the workers that are there.
    pub fn is_elastic(&self) -> bool {
        self.core().is_elastic
    }

    /// Whether the host of this worker has not joined yet, and still may.
    pub fn is_awaited(&self, rank: Rank) -> bool {
        self.core().is_awaited(rank)
    }

    /// How often a worker has joined late or come back with its host.
    pub fn arrivals(&self) -> u64 {
        self.core().inbox.arrivals
    }

    /// The batch job for which this host waits will not run, or not again: the cluster goes on without the host.
    /// Nothing happens if an agent has joined in the meantime. `quiet`: it is no event.
    pub fn give_up_host(&mut self, agent: usize, reason: String, quiet: bool) {
        self.core().give_up_host(agent, reason, quiet);
    }

    /// Waits up to `max_wait` for more than `seen` arrivals, for a host that will not join, or for
    /// another event that R must know.
    pub fn await_arrival(&self, seen: u64, max_wait: Duration) {
        let news = |core: &mut Core| {
            let inbox = &core.inbox;
            (inbox.arrivals != seen || inbox.has_events() || inbox.closed).then_some(())
        };
        self.inner.shared_core.wait(max_wait, news);
    }

    /// Listens for agents that dial back, on one port of this range at all these addresses; port 0 means any.
    /// `keys`: the number and the key of each launcher, of which a later call names all. A later call without
    /// addresses only sets the keys. Returns the port. The listener ends with the cluster.
    ///
    /// # Errors
    /// When no port of the range is free, or an address is not of this machine.
    pub fn listen(
        &self,
        addresses: &[IpAddr],
        ports: &RangeInclusive<u16>,
        keys: Vec<(u32, Key)>,
    ) -> io::Result<u16> {
        self.core().dial_back.listen(addresses, ports, keys)
    }

    /// Sets the key with which agents introduce themselves that have lost the head before. To be called before
    /// [`Hub::listen`].
    pub fn set_cluster_key(&self, key: Key) {
        self.core().dial_back.set_cluster_key(key);
    }

    /// Listens for agents whose connections a gateway passes on to a Unix socket at this path. [`Hub::listen`] sets
    /// the keys.
    ///
    /// # Errors
    /// When the socket cannot be made there.
    pub fn listen_unix(&self, path: &std::path::Path) -> io::Result<()> {
        self.core().dial_back.listen_unix(path)
    }
}

impl Core {
    /// See [`Hub::give_up_host`].
    pub fn give_up_host(&mut self, agent: usize, reason: String, quiet: bool) {
        if self.conns.get(agent).is_some_and(|conn| conn.awaited) {
            self.conns[agent].permanent = true;
            self.conns[agent].stop.notify_one();
            self.inbox.hosts[agent].adding |= quiet;
            self.give_up_awaited(agent, &HostFailure::new(reason.clone()));
            self.inbox.hosts[agent].failure = Some(HostFailure::new(reason));
            self.inbox.hosts[agent].adding &= !quiet;
            self.pump();
            self.changed();
        }
    }

    /// These workers have been stopped or removed: a host that waits for a job or for its agent, and has no other
    /// workers, need not join.
    pub fn leave_absent(&mut self, ranks: &[Rank]) {
        for &rank in ranks {
            let Some(agent) = self.inbox.workers.get(rank as usize).map(|w| w.agent) else {
                continue;
            };
            if !self.is_attached(agent) && !self.scheduler.has_lost(agent) {
                self.give_up_host(agent, "its workers have been stopped".into(), true);
            }
        }
    }

    /// Whether a host is reconnected when it is lost, or may still join.
    pub fn takes_back(&self, agent: usize) -> bool {
        let complete = self
            .setup_log
            .as_ref()
            .is_some_and(SetupLogFile::is_complete);
        let conn = self.conns.get(agent).filter(|_| complete);
        let wanted = conn.is_some_and(|conn| {
            conn.plan.is_some() && !conn.permanent && (self.reconnects || conn.awaited)
        });
        wanted && self.scheduler.has_lost(agent)
    }

    /// Whether the host of a worker has not joined yet, and still may. A batch job that drains may be followed by
    /// another.
    pub fn is_awaited(&self, rank: Rank) -> bool {
        let worker = self.inbox.workers.get(rank as usize);
        worker.is_some_and(|worker| {
            let host = &self.inbox.hosts[worker.agent];
            let conn = &self.conns[worker.agent];
            let may_follow = conn.dials && !conn.permanent && host.draining.is_some();
            (host.awaited || may_follow)
                && worker.termination.as_ref().is_some_and(|t| t.is_of_host())
        })
    }

    /// The agent has not greeted yet: its workers are lost until it does.
    pub fn await_host(&mut self, agent: usize, plan: Start) {
        self.is_elastic = true;
        self.conns[agent].awaited = true;
        self.conns[agent].plan = Some(plan);
        self.conns[agent].late.notify_one();
        self.inbox.hosts[agent].awaited = true;
        self.scheduler.await_agent(agent);
        self.pump();
    }

    /// The host will not join.
    pub fn give_up_awaited(&mut self, agent: usize, failure: &HostFailure) {
        self.conns[agent].awaited = false;
        if std::mem::take(&mut self.inbox.hosts[agent].awaited) {
            if !self.stopping {
                self.inbox.give_up(agent, failure.clone());
            }
            self.scheduler.give_up_awaited(agent, &failure.reason);
        }
    }

    /// The agent of a batch job has been lost, or has ended with its job. Another may take its place.
    pub fn job_lost(&mut self, agent: usize, reason: &str) {
        self.scheduler.job_lost(agent, reason);
        let conn = &self.conns[agent];
        // Without a plan, the cluster has not been started yet.
        if self.stopping || conn.permanent || conn.plan.is_none() || !self.scheduler.has_lost(agent)
        {
            return;
        }
        self.conns[agent].awaited = true;
        self.inbox.job_lost(agent, reason);
        self.scheduler.await_again(agent);
    }
}
