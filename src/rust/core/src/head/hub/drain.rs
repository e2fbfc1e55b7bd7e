//! Drains, for R: see [`crate::head::scheduler`].

use super::client::Hub;
use crate::head::scheduler::events::Termination;
use crate::protocol::ids::Rank;
use std::sync::Arc;

/// Why a task was lost that ran on a worker which the user removed.
const REMOVED: &str = "removed";

impl Hub {
    /// Removes some workers after their tasks. Agents whose workers have all been removed end, too.
    pub fn drain(&mut self, ranks: &[Rank]) {
        let mut core = self.core();
        let termination = Arc::new(Termination::Stopped);
        for &rank in ranks {
            core.scheduler.drain_worker(rank, &termination);
        }
        core.pump();
        core.leave_absent(ranks);
    }

    /// Removes some workers at once. Their tasks are forgotten: R gets no answers to them, and no other worker runs
    /// them. Their calls are lost as with the end of a batch job, so that other workers run those that are not bound to
    /// them.
    pub fn remove(&mut self, ranks: &[Rank]) {
        let mut core = self.core();
        let stopped = Arc::new(Termination::Stopped);
        let removed = Arc::new(Termination::JobEnded(REMOVED.into()));
        for &rank in ranks {
            core.scheduler.drain_worker(rank, &stopped);
            core.scheduler.end_worker(rank, removed.clone());
        }
        drop(core);
        self.stop_workers(ranks);
    }

    /// The batch job of this host has ended or is about to end, as the batch engine says.
    pub fn job_ended(&mut self, agent: usize, reason: String) {
        let mut core = self.core();
        core.scheduler.job_ended(agent, reason);
        core.pump();
    }

    /// Why a worker terminates when it has nothing left, if it is draining.
    pub fn draining(&self, rank: Rank) -> Option<Arc<Termination>> {
        self.core().scheduler.draining(rank).cloned()
    }

    /// The current verb has no more tasks for this worker, which may then be stopped if it is draining.
    pub fn release(&mut self, rank: Rank) {
        let mut core = self.core();
        core.scheduler.release_from_verb(rank);
        core.pump();
    }

    /// Any worker of the job may run the task that was begun last.
    pub fn make_movable(&mut self) {
        if let Some(writing) = &mut self.writing {
            writing.order.movable = writing.order.on_behalf_of.is_none();
        }
    }
}
