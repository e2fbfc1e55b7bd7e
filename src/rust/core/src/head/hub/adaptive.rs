//! Launchers whose jobs come and go with the work: what R asks and sets, and the thread's part.

use super::client::Hub;
use super::core::{Core, SharedCore};
use crate::head::scheduler::give_back::GiveBack;
use crate::head::setup_log_file::SetupLogFile;
use crate::protocol::ids::Rank;
use std::sync::Arc;
use std::time::Duration;

/// How often the hub's thread checks whether hosts rest: this part of the shortest rest, within these limits.
const CHECKS_PER_REST: u32 = 8;
const MIN_CHECK: Duration = Duration::from_millis(10);
const MAX_CHECK: Duration = Duration::from_secs(5);

/// An agent of a batch job of which a worker has come up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The host's index among all.
    pub agent: usize,
    /// The engine's name for the job, if the agent knows it.
    pub job: Option<String>,
}

impl Hub {
    /// Hosts of a launcher whose jobs come and go: they are given back when they rest, and it is no event that one
    /// joins.
    pub fn adapt(&mut self, rule: GiveBack) {
        let mut core = self.core();
        for &agent in &rule.agents {
            if let Some(host) = core.inbox.hosts.get_mut(agent) {
                host.adaptive = true;
            }
        }
        core.scheduler.give_back_when(rule);
        drop(core);
        self.inner.shared_core.adapts.notify_one();
    }

    /// The next agents that dial back are given to these hosts first.
    pub fn prefer(&mut self, agents: &[usize]) {
        self.core().dial_back.prefer(agents);
    }

    /// Keeps these workers for a verb that will have tasks for them, until the verb is over: see [`Hub::cancel_job`].
    pub fn hold(&mut self, ranks: &[Rank]) {
        let mut core = self.core();
        for &rank in ranks {
            core.scheduler.reserve_for_verb(rank);
        }
    }

    /// Ends [`Hub::hold`].
    pub fn release_held(&mut self) {
        let mut core = self.core();
        if core.scheduler.verb_over() {
            core.pump();
        }
    }

    /// See [`crate::head::scheduler::Scheduler::set_tasks_wait`].
    pub fn set_tasks_wait(&mut self, wait: bool) {
        self.core().scheduler.set_tasks_wait(wait);
    }

    /// Number of waiting calls that workers of these hosts may run, and whether those of each host may run any.
    pub fn calls_waiting_for(&self, agents: &[usize]) -> (usize, Vec<bool>) {
        self.core().scheduler.calls_waiting_for(agents)
    }

    /// The jobs of adaptive launchers of which a worker has come up since the last call.
    pub fn take_job_arrivals(&mut self) -> Vec<Arrival> {
        std::mem::take(&mut self.core().inbox.job_arrivals)
    }
}

impl Core {
    /// Gives back the hosts that have rested for long enough. Without a complete set-up log they could not come back.
    fn give_back_resting(&mut self) {
        let complete = self
            .setup_log
            .as_ref()
            .is_some_and(SetupLogFile::is_complete);
        if complete && !self.stopping {
            self.update_clock();
            if self.scheduler.give_back_resting() {
                self.pump();
            }
        }
    }
}

/// Gives back hosts that rest, whatever R does.
pub(super) async fn give_back(shared_core: Arc<SharedCore>) {
    loop {
        let idle = shared_core.core().scheduler.min_idle();
        match idle {
            None => shared_core.adapts.notified().await,
            Some(idle) => {
                let pause = (idle / CHECKS_PER_REST).clamp(MIN_CHECK, MAX_CHECK);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = shared_core.adapts.notified() => continue,
                }
                shared_core.core().give_back_resting();
            }
        }
    }
}
