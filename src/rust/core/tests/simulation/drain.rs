//! Drains in the simulation: planned ends of agents and workers, and jobs that the batch engine kills.

use crate::Sim;
use rand::Rng;
use rustcluster_core::head::scheduler::events::State;
use rustcluster_core::protocol::control::{DrainCause, ToHead};
use rustcluster_core::protocol::ids::{Rank, TaskId};

impl Sim {
    /// A random drain: the user removes a worker, an agent announces the end of its job, or a job is killed.
    pub fn drain_something(&mut self, rank: Rank) {
        let (at, _) = self.at[rank as usize];
        match self.rng.random_range(0..6) {
            0..2 => {
                if !self.is_terminated(rank) || self.rng.random_ratio(1, 4) {
                    self.remove_workers(rank);
                }
            }
            // A cluster that lingers has no agents in batch jobs.
            2.. if self.setup.changes > 0 => {}
            2..5 => {
                let host = &mut self.hosts[at];
                if host.lost {
                    return;
                }
                let cause = match self.rng.random_range(0..3) {
                    0 => DrainCause::TimeLimit,
                    1 => DrainCause::Warned,
                    _ => DrainCause::Terminated,
                };
                let seconds = self.rng.random::<bool>().then_some(60);
                host.report(&ToHead::Draining { seconds, cause });
            }
            _ => {
                // The engine kills the job, whether or not it has sent a warning.
                if self.hosts[at].lost || !self.rng.random_ratio(1, 3) {
                    return;
                }
                self.hub.job_ended(at, "killed".into());
                self.notes();
                self.lose_host(at, "the stream ended");
                self.facts.seen.jobs_killed += 1;
            }
        }
        self.notes();
    }

    /// A worker has begun to drain: of the tasks that any worker may run, it may only end the one that it has.
    pub fn begins_to_drain(&mut self, rank: Rank) {
        let state = self.hub.with_scheduler(|scheduler| scheduler.state(rank));
        let known = &mut self.facts.workers[rank as usize];
        if !known.draining {
            known.draining = true;
            known.task_at_drain = match state {
                State::Draining(task) => task,
                State::Busy(task) | State::Ending(task) => Some(task),
                _ => None,
            };
        }
    }

    /// Checks that a message that the head begins to send may start on this worker.
    pub fn check_draining(&self, rank: Rank, id: TaskId) {
        let known = &self.facts.workers[rank as usize];
        let starts_anew = known.draining && self.facts.tasks[id].movable;
        assert!(
            !starts_anew || known.task_at_drain == Some(id),
            "task {id} is sent to draining worker {rank}"
        );
    }
}
