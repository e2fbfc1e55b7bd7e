//! How often tasks are retried, and which losses R has not been told of.

use crate::r::failure::Failure;
use rustcluster_core::head::retry::Policy;
use rustcluster_core::protocol::ids::JobId;

/// The policies of a cluster, and the losses that R has not been told of.
#[derive(Default)]
pub(super) struct WorkerFailures {
    /// Of all that have none of their own.
    pub(super) default: Policy,
    /// Of one job, which is open.
    pub(super) of_job: Option<(JobId, Policy)>,
    /// What was dealt with, with the job of the task. Stays until R has noted it: R may be interrupted before.
    pub(super) unreported: Vec<(JobId, Failure)>,
}

impl WorkerFailures {
    pub(super) fn policy(&self, job: JobId) -> Policy {
        match self.of_job {
            Some((of, policy)) if of == job => policy,
            _ => self.default,
        }
    }

    /// A loss has been dealt with, of which R is to be told.
    pub(super) fn report(&mut self, job: JobId, worker_failure: Failure) {
        self.unreported.push((job, worker_failure));
    }

    /// A job has ended. Nobody is to be told any more what became of its tasks.
    pub(super) fn close(&mut self, job: JobId) {
        self.of_job = self.of_job.filter(|&(of, _)| of != job);
        self.unreported.retain(|&(of, _)| of != job);
    }

    /// Whether R is to be told of a loss before it gets anything else.
    pub(super) fn any_unreported(&self) -> bool {
        !self.unreported.is_empty()
    }
}
