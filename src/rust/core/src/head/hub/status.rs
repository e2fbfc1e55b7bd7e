//! What the hub knows of what workers are at and have been at. It is known anyway, but for their
//! memory, which their agents are asked for.

use super::client::Hub;
use super::core::Core;
use crate::head::activity::{Measure, Track};
use crate::head::scheduler::events::State;
use crate::protocol::control::{ToAgent, Usage};
use crate::protocol::ids::Rank;
use std::time::Duration;

/// A worker as it is now.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What the worker is doing.
    pub state: State,
    /// The process number of the worker on its host, if it is up.
    pub pid: Option<u32>,
    /// What the worker has done so far.
    pub track: Track,
}

/// What went over a host's stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostStatus {
    /// Bytes sent to the host.
    pub bytes_in: u64,
    /// Bytes received from the host.
    pub bytes_out: u64,
}

impl Hub {
    /// How answers say how long they took. To be called before [`Hub::go`].
    pub fn measure_with(&mut self, measure: Measure) {
        self.core().measure = measure;
    }

    /// All workers as they are now, and how long the cluster has been there. `history`: also when they
    /// were busy.
    pub fn status(&self, history: bool) -> (Vec<Status>, Duration) {
        let mut core = self.core();
        core.look_at_clock();
        let workers = core.inbox.workers.iter().enumerate();
        let status = |(rank, worker): (usize, &super::WorkerView)| {
            let state = core.scheduler.state(rank as Rank);
            // A host that is back is restored before it is there for R.
            let restoring = worker.gone.is_some() && state == State::Idle;
            Status {
                state: if restoring { State::Restoring } else { state },
                pid: worker.pid.filter(|_| worker.gone.is_none()),
                track: core.scheduler.track(rank as Rank, history),
            }
        };
        (workers.map(status).collect(), core.began.elapsed())
    }

    /// What went over the streams of all hosts.
    pub fn host_status(&self) -> Vec<HostStatus> {
        let core = self.core();
        let status = |conn: &super::connection::Conn| HostStatus {
            bytes_in: conn.bytes_in,
            bytes_out: conn.bytes_out,
        };
        core.conns.iter().map(status).collect()
    }

    /// Something went wrong with a task of this worker.
    pub fn failed(&self, rank: Rank, why: &str) {
        self.core().scheduler.failed(rank, why);
    }

    /// Whether a worker is still at a task that took too long or was cancelled, or is brought to the state of the
    /// worker before it: what it is sent waits for that.
    pub fn is_detained(&self, rank: Rank) -> bool {
        let state = self.core().scheduler.state(rank);
        matches!(state, State::Ending(_) | State::Restoring)
    }

    /// Asks the hosts of these workers what memory their workers take; [`Hub::usage`] has the answer.
    pub fn ask_usage(&self, ranks: &[Rank]) -> u64 {
        let mut core = self.core();
        let question = core.inbox.hosts.iter().map(|host| host.asked).max();
        let question = question.unwrap_or(0) + 1;
        for &rank in ranks {
            let agent = core.inbox.workers[rank as usize].agent;
            let serves = core.conns[agent].stream.is_some() && !core.scheduler.is_gone(rank);
            if serves && core.inbox.hosts[agent].asked < question {
                let ask = ToAgent::Usage { question };
                if core.scheduler.send_control(agent, &ask).is_ok() {
                    core.inbox.hosts[agent].asked = question;
                }
            }
        }
        core.settle();
        question
    }

    /// What memory each worker takes, as far as that is known, once all hosts that were asked have
    /// answered or are gone. Waits up to `most` for that; `anyway`: what is known then is all.
    pub fn usage(&self, question: u64, most: Duration, anyway: bool) -> Option<Vec<Option<Usage>>> {
        let usages = |core: &Core| {
            let workers = core.inbox.workers.iter();
            let of = |usage: &(u64, Usage)| (usage.0 == question).then_some(usage.1);
            workers.map(|w| w.usage.as_ref().and_then(of)).collect()
        };
        let answered = self.shared().wait(most, |core| {
            let hosts = core.inbox.hosts.iter().zip(&core.conns);
            let mut asked = hosts.filter(|(host, _)| host.asked == question);
            let all = asked.all(|(host, conn)| host.told >= question || conn.end.is_some());
            all.then(|| usages(core))
        });
        answered.or_else(|| anyway.then(|| usages(&self.core())))
    }
}
