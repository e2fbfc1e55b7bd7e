//! Status and statistics of workers and hosts. The hub knows all of it, except for the memory use,
//! which it asks the agents for.

use super::client::Hub;
use super::core::Core;
use crate::head::activity::{Measure, WorkerStats};
use crate::head::scheduler::events::State;
use crate::protocol::control::{ToAgent, Usage};
use crate::protocol::ids::Rank;
use std::time::Duration;

/// The current status of a worker.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What the worker is doing.
    pub state: State,
    /// The process number of the worker on its host, if it is up.
    pub pid: Option<u32>,
    /// What the worker has done so far.
    pub stats: WorkerStats,
}

/// The traffic of a host's stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostStatus {
    /// Bytes sent to the host.
    pub bytes_in: u64,
    /// Bytes received from the host.
    pub bytes_out: u64,
}

impl Hub {
    /// Sets how the busy time of a worker is read from its answers. To be called before
    /// [`Hub::go`].
    pub fn measure_with(&mut self, measure: Measure) {
        self.core().measure = measure;
    }

    /// The status of all workers, and how long the cluster has existed. `history`: include the
    /// intervals in which they were busy.
    pub fn status(&self, history: bool) -> (Vec<Status>, Duration) {
        let mut core = self.core();
        core.update_clock();
        let workers = core.inbox.workers.iter().enumerate();
        let status = |(rank, worker): (usize, &super::WorkerView)| Status {
            state: core.state_of(rank as Rank),
            pid: worker.pid.filter(|_| worker.termination.is_none()),
            stats: core.scheduler.stats(rank as Rank, history),
        };
        (workers.map(status).collect(), core.began.elapsed())
    }

    /// The traffic of all hosts' streams.
    pub fn host_status(&self) -> Vec<HostStatus> {
        let core = self.core();
        let status = |conn: &super::connection::Conn| HostStatus {
            bytes_in: conn.bytes_in,
            bytes_out: conn.bytes_out,
        };
        core.conns.iter().map(status).collect()
    }

    /// Whether a worker still runs a task that was cancelled or exceeded its time limit, or is
    /// being restored: its messages wait for that.
    pub fn is_detained(&self, rank: Rank) -> bool {
        let state = self.core().scheduler.state(rank);
        matches!(state, State::Ending(_) | State::Restoring)
    }

    /// Asks the hosts of these workers for the memory use of their workers; [`Hub::usage`] has the
    /// answer.
    pub fn ask_usage(&self, ranks: &[Rank]) -> u64 {
        self.core().ask_usage(ranks)
    }

    /// The memory use of each worker, as far as it is known, once all hosts that were asked have
    /// answered or terminated. Waits up to `max_wait` for that; `anyway`: returns what is known
    /// then.
    pub fn usage(
        &self,
        question: u64,
        max_wait: Duration,
        anyway: bool,
    ) -> Option<Vec<Option<Usage>>> {
        let usages = |core: &Core| {
            let workers = core.inbox.workers.iter();
            // The dashboard may have asked again since: a later answer does as well.
            let of = |usage: &(u64, Usage)| (usage.0 >= question).then_some(usage.1);
            workers.map(|w| w.usage.as_ref().and_then(of)).collect()
        };
        let answered = self.shared_core().wait(max_wait, |core| {
            let hosts = core.inbox.hosts.iter().zip(&core.conns);
            let mut asked = hosts.filter(|(host, _)| host.asked >= question);
            let all =
                asked.all(|(host, conn)| host.answered_question >= question || conn.end.is_some());
            all.then(|| usages(core))
        });
        answered.or_else(|| anyway.then(|| usages(&self.core())))
    }
}

impl Core {
    /// Asks the hosts of these workers for the memory use of their workers. Returns the number of the question.
    pub(super) fn ask_usage(&mut self, ranks: &[Rank]) -> u64 {
        let question = self.inbox.hosts.iter().map(|host| host.asked).max();
        let question = question.unwrap_or(0) + 1;
        for &rank in ranks {
            let agent = self.inbox.workers[rank as usize].agent;
            let serves = self.conns[agent].stream.is_some() && !self.scheduler.is_terminated(rank);
            if serves && self.inbox.hosts[agent].asked < question {
                let ask = ToAgent::Usage { question };
                if self.scheduler.send_control(agent, &ask).is_ok() {
                    self.inbox.hosts[agent].asked = question;
                }
            }
        }
        self.pump();
        question
    }
}
