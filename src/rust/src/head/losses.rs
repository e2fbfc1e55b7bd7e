//! How often tasks are retried, and which worker failures R has not acknowledged.

use crate::r::failure::Failure;
use rustcluster_core::head::retry::Policy;
use rustcluster_core::protocol::ids::JobId;

/// The retry policies of a cluster, and the worker failures that R has not acknowledged.
#[derive(Default)]
pub(super) struct WorkerFailures {
    /// The policy of all tasks without another policy.
    pub(super) default: Policy,
    /// The policy of one job, which is open.
    pub(super) of_job: Option<(JobId, Policy)>,
    /// Worker failures that were handled, with the job of the task. Each stays until R has acknowledged it,
    /// because an interrupt may keep R from doing so.
    pub(super) unreported: Vec<(JobId, Failure)>,
}

impl WorkerFailures {
    pub(super) fn policy(&self, job: JobId) -> Policy {
        match self.of_job {
            Some((of, policy)) if of == job => policy,
            _ => self.default,
        }
    }

    /// Adds a worker failure that was handled, for R.
    pub(super) fn report(&mut self, job: JobId, worker_failure: Failure) {
        self.unreported.push((job, worker_failure));
    }

    /// Drops the policy and the worker failures of a job that has ended.
    pub(super) fn close(&mut self, job: JobId) {
        self.of_job = self.of_job.filter(|&(of, _)| of != job);
        self.unreported.retain(|&(of, _)| of != job);
    }

    /// Returns whether R has to be notified of a worker failure before it gets any other result.
    pub(super) fn any_unreported(&self) -> bool {
        !self.unreported.is_empty()
    }
}
