//! What a job needs of the hub: how messages are sent, and how they ended.

use crate::head::hub::{Answer, Hub, StartedTask, Turn};
use crate::head::scheduler::events::{RankSet, Termination};
use crate::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The methods of the hub that a job uses: see [`Hub`] for their documentation.
pub trait Dispatch {
    /// The current time.
    fn now(&self) -> Instant;
    /// The termination reason of a worker, if it has terminated permanently.
    fn termination(&self, rank: Rank) -> Option<Arc<Termination>>;
    /// See [`Hub::is_awaited`].
    fn is_awaited(&self, rank: Rank) -> bool;
    /// See [`Hub::arrivals`].
    fn arrivals(&self) -> u64;
    /// See [`Hub::await_arrival`].
    fn await_arrival(&self, seen: u64, max_time: Duration);
    /// Calls [`Hub::begin`] for a task that is no set-up call, and then [`Hub::limit_time`].
    ///
    /// # Errors
    /// When the worker has terminated.
    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        limit: Option<Duration>,
        blob: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, Arc<Termination>>;
    /// [`Hub::draining`].
    fn draining(&self, _rank: Rank) -> Option<Arc<Termination>> {
        None
    }
    /// [`Hub::release`].
    fn release(&self, _rank: Rank) {}
    /// [`Hub::make_movable`], after [`Dispatch::begin`].
    fn make_movable(&self) {}
    /// [`Hub::finish`].
    fn finish(&self);
    /// [`Hub::abandon`].
    fn abandon(&self);
    /// [`Hub::receive_any`].
    fn receive_any(&self, workers: &RankSet, max_time: Duration) -> Answer;
    /// [`Hub::revoke`].
    fn revoke(&self, task: TaskId);
    /// [`Hub::forget`].
    fn forget(&self, task: TaskId);
}

impl Dispatch for RefCell<Hub> {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn termination(&self, rank: Rank) -> Option<Arc<Termination>> {
        self.borrow().worker(rank).termination
    }

    fn is_awaited(&self, rank: Rank) -> bool {
        self.borrow().is_awaited(rank)
    }

    fn arrivals(&self) -> u64 {
        self.borrow().arrivals()
    }

    fn await_arrival(&self, seen: u64, max_time: Duration) {
        self.borrow().await_arrival(seen, max_time);
    }

    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        limit: Option<Duration>,
        blob: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, Arc<Termination>> {
        let mut hub = self.borrow_mut();
        let started = hub.begin(rank, job, None, turn, blob)?;
        hub.limit_time(limit);
        Ok(started)
    }

    fn draining(&self, rank: Rank) -> Option<Arc<Termination>> {
        self.borrow().draining(rank)
    }

    fn release(&self, rank: Rank) {
        self.borrow_mut().release(rank);
    }

    fn make_movable(&self) {
        self.borrow_mut().make_movable();
    }

    fn finish(&self) {
        self.borrow_mut().finish();
    }

    fn abandon(&self) {
        self.borrow_mut().abandon();
    }

    fn receive_any(&self, workers: &RankSet, max_time: Duration) -> Answer {
        self.borrow_mut().receive_any(workers, max_time)
    }

    fn revoke(&self, task: TaskId) {
        self.borrow_mut().revoke(task);
    }

    fn forget(&self, task: TaskId) {
        self.borrow_mut().forget(task);
    }
}
