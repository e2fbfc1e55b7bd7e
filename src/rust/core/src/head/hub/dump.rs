//! The state of a cluster for a bug report: the state of the head and the reports of the agents.

use super::client::Hub;
use super::core::Core;
use super::recent::RecentEvent;
use crate::platform::log;
use crate::protocol::control::{Facts, ToAgent};
use crate::protocol::ids::Rank;
use std::time::Duration;

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    /// The head's facts about the cluster as a whole.
    pub cluster: Facts,
    /// The head's facts about each host.
    pub hosts: Vec<Facts>,
    /// The head's facts about each worker, by rank.
    pub workers: Vec<Facts>,
    /// The recent events.
    pub events: Vec<RecentEvent>,
    /// For each host, the report of its agent about itself and its workers. Empty if the agent has not reported.
    pub agents: Vec<Vec<(Option<Rank>, Facts)>>,
}

impl Hub {
    /// Asks all connected agents for their state; [`Hub::dump`] returns the answers. Returns the number of the
    /// question.
    pub fn ask_dump(&self) -> u64 {
        let mut core = self.core();
        let question = core.inbox.hosts.iter().map(|host| host.dump_asked).max();
        let question = question.unwrap_or(0) + 1;
        for agent in 0..core.conns.len() {
            let conn = &core.conns[agent];
            let ask = ToAgent::Dump { question };
            if conn.stream.is_some()
                && conn.end.is_none()
                && core.scheduler.send_control(agent, &ask).is_ok()
            {
                let host = &mut core.inbox.hosts[agent];
                host.dump_asked = question;
                host.dump.clear();
            }
        }
        core.pump();
        question
    }

    /// Returns the state of the cluster once all asked agents have answered or terminated. Waits up to `max`.
    /// `anyway`: after that time, returns the state that is known.
    pub fn dump(&self, question: u64, max: Duration, anyway: bool) -> Option<Dump> {
        let answered = self.shared_core().wait(max, |core| {
            let mut hosts = core.inbox.hosts.iter().zip(&core.conns);
            let done = hosts.all(|(host, conn)| {
                host.dump_asked != question || host.dump_answered >= question || conn.end.is_some()
            });
            done.then(|| dump_of(core, question))
        });
        answered.or_else(|| anyway.then(|| dump_of(&self.core(), question)))
    }
}

fn dump_of(core: &Core, question: u64) -> Dump {
    let mut cluster = Facts::default();
    cluster.add_seconds("uptime", core.began.elapsed());
    core.facts(&mut cluster);
    core.scheduler.facts(&mut cluster);
    core.dial_back.facts(&mut cluster);
    if let Some(setup_log) = &core.setup_log {
        setup_log.facts(&mut cluster);
    }
    cluster.add_some("log", log::path().map(|path| path.display()));
    let hosts = (0..core.conns.len()).map(|agent| {
        let mut facts = Facts::default();
        host_facts(core, agent, &mut facts);
        core.scheduler.agent_facts(agent, &mut facts);
        facts
    });
    let workers = core.inbox.workers.iter().enumerate();
    let workers = workers.map(|(rank, worker)| {
        let mut facts = Facts::default();
        facts.add("host", worker.agent + 1);
        facts.add_some("pid", worker.pid.filter(|_| worker.termination.is_none()));
        core.scheduler.worker_facts(rank as Rank, &mut facts);
        facts
    });
    let agents = core
        .inbox
        .hosts
        .iter()
        .map(|host| match host.dump_answered == question {
            true => host.dump.clone(),
            false => Vec::new(),
        });
    Dump {
        hosts: hosts.collect(),
        workers: workers.collect(),
        events: core.recent.events().cloned().collect(),
        agents: agents.collect(),
        cluster,
    }
}

fn host_facts(core: &Core, agent: usize, facts: &mut Facts) {
    let (conn, host) = (&core.conns[agent], &core.inbox.hosts[agent]);
    let state = match (&conn.end, &conn.stream) {
        (None, None) => "not connected",
        (None, Some(_)) => "connected",
        (Some(_), _) => "ended",
    };
    facts.add("connection", state);
    facts.add_some("launched_pid", host.pid);
    facts.add_some("node", host.node.as_ref());
    facts.add_some("peer", host.peer);
    facts.add_some("job", host.job.as_ref());
    if let Some(hello) = &host.hello {
        facts.add("agent_pid", hello.pid);
        facts.add("r_version", &hello.r_version);
        facts.add("platform", &hello.platform);
        facts.add("big_endian", hello.big_endian);
        facts.add("cores", hello.cores);
        facts.add("memory_total", hello.memory_total);
    }
    facts.add("bytes_in", conn.bytes_in);
    facts.add("bytes_out", conn.bytes_out);
    facts.add("bytes_to_send", conn.out.len());
    facts.add("bytes_received", conn.received.len());
    facts.add("blocked", conn.blocked);
    facts.add("reconnects", conn.plan.is_some() && !conn.permanent);
    facts.add_seconds("heartbeat_timeout", conn.heartbeat_timeout);
    if let Some(last_received) = conn.last_received {
        facts.add_seconds("silent_for", last_received.elapsed());
    }
    // The output of the agent's command is left out.
    let failure = host.failure.as_ref();
    facts.add_some("failure", failure.map(|failure| &failure.reason));
}
