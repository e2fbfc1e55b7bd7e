//! Calls for whoever is free first. They wait here, and not each for one worker, until a worker has
//! nothing else to do; from then on they are tasks as others are, but that a lost one is nobody's to
//! wait for.

use super::{
    Arc, Chunk, HashSet, Note, Order, Outcome, Scheduler, Task, VecDeque, Worker, WorkerState,
};
use crate::protocol::control::Facts;
use crate::protocol::ids::{CALLS, Rank, TaskId};
use std::time::Duration;
use tracing::debug;

/// Where a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallPlace {
    /// It waits for a free worker.
    Waiting,
    /// This worker has it.
    With(Rank),
    /// It has ended.
    Nowhere,
}

/// A call that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    task: Task,
    /// In order.
    any_of: Arc<[Rank]>,
}

#[derive(Debug, Default)]
pub(super) struct Calls {
    waiting: VecDeque<Waiting>,
    /// R waits for this one. It may be given to a worker that is kept for a verb: R does not give that
    /// anything in the meantime.
    awaited: Option<TaskId>,
    /// R will take their results as soon as they are there, whatever the limit.
    wanted: HashSet<TaskId>,
    /// Workers that the verb under way uses.
    kept: HashSet<Rank>,
}

impl Calls {
    /// What is known of all calls, for a bug report.
    pub(super) fn facts(&self, facts: &mut Facts) {
        facts.add("calls_waiting", self.waiting.len());
        facts.add("calls_wanted", self.wanted.len());
        facts.add_some("call_awaited", self.awaited);
        facts.add("workers_kept_for_verb", self.kept.len());
    }

    /// Whether the result of what this worker is at is to come whatever the limit: because R wants it, or
    /// because a call that R wants waits for a worker.
    pub(super) fn want(&self, worker: &Worker) -> bool {
        worker.current.as_ref().is_some_and(|current| {
            let mut waiting = self.waiting.iter();
            let behind = |call: &Waiting| self.wanted.contains(&call.task.id);
            let is_wanted = self.wanted.contains(&current.task.id);
            current.task.job == CALLS && (is_wanted || waiting.any(behind))
        })
    }
}

impl Scheduler {
    pub(super) fn submit_call(
        &mut self,
        order: &Order,
        any_of: Arc<[Rank]>,
        limit: Option<Duration>,
    ) {
        let id = order.task;
        let again = order.again;
        let task = Task {
            id,
            job: CALLS,
            chunks: VecDeque::new(),
            complete: false,
            lasts: None,
            instead_of: None,
            ahead: false,
            payload: None,
            limit,
            leaves_seed: false,
        };
        debug!(task = id, again, workers = any_of.len(), "call submitted");
        let call = Waiting { task, any_of };
        match again {
            true => self.calls.waiting.push_front(call),
            false => self.calls.waiting.push_back(call),
        }
        self.end_calls_of_nobody();
    }

    /// A chunk, at most [`MAX_BODY`](crate::protocol::frame::MAX_BODY) long, of the message of a call.
    pub fn append_call(&mut self, id: TaskId, chunk: Chunk, last: bool) {
        let mut waiting = self.calls.waiting.iter_mut();
        // Cancelled or ended otherwise while R was still writing it, if it is not there.
        if let Some(call) = waiting.find(|call| call.task.id == id) {
            call.task.complete = last;
            if !chunk.bytes.is_empty() {
                call.task.chunks.push_back(chunk);
            }
        }
        if last {
            self.hand_out();
        }
    }

    /// Nobody wants this call's result any more.
    pub fn cancel_call(&mut self, id: TaskId) {
        self.calls.wanted.remove(&id);
        self.calls.waiting.retain(|call| call.task.id != id);
        if let CallPlace::With(rank) = self.call_place(id) {
            self.cancel_matching(rank, |task, _| task == id);
        }
    }

    /// Where a call is.
    pub fn call_place(&self, id: TaskId) -> CallPlace {
        if self.calls.waiting.iter().any(|call| call.task.id == id) {
            return CallPlace::Waiting;
        }
        let has = |worker: &Worker| {
            let current = worker.current.as_ref();
            current.is_some_and(|current| current.task.id == id && !current.cancelled)
        };
        match self.workers.iter().position(has) {
            Some(rank) => CallPlace::With(rank as Rank),
            None => CallPlace::Nowhere,
        }
    }

    /// Whether a worker is at a call.
    pub fn is_at_call(&self, rank: Rank) -> bool {
        let current = self.workers.get(rank as usize);
        let current = current.and_then(|worker| worker.current.as_ref());
        current.is_some_and(|current| current.task.job == CALLS)
    }

    /// R will take this call's result as soon as it is there.
    pub fn want_call(&mut self, id: TaskId) {
        if self.calls.wanted.insert(id) {
            self.grant();
        }
    }

    /// R waits for this call, or for none any more.
    pub fn await_call(&mut self, id: Option<TaskId>) {
        if self.calls.awaited != id {
            self.calls.awaited = id;
            self.hand_out();
        }
    }

    /// The result of a call has been told to R, or will not be.
    pub(super) fn call_ended(&mut self, id: TaskId) {
        self.calls.wanted.remove(&id);
    }

    /// The verb under way uses this worker: it is given no calls until [`Scheduler::verb_over`]. What
    /// the verb finds out about how long its tasks take is then true.
    pub fn keep_for_verb(&mut self, rank: Rank) {
        self.calls.kept.insert(rank);
    }

    /// The verb is over. Returns whether calls have waited for that.
    pub fn verb_over(&mut self) -> bool {
        self.calls.kept.clear();
        let waiting = !self.calls.waiting.is_empty();
        self.hand_out();
        waiting
    }

    /// A worker of a host that is back is what it was.
    pub fn restored(&mut self, rank: Rank) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.away = false;
            self.dispatch(rank);
        }
    }

    /// Takes the call that this worker, which is up and has nothing to do, is to have now.
    pub(super) fn call_for(&mut self, rank: Rank) -> Option<Task> {
        let worker = &self.workers[rank as usize];
        if worker.away || worker.undecided.is_some() || self.calls.waiting.is_empty() {
            return None;
        }
        let kept = self.calls.kept.contains(&rank);
        let awaited = self.calls.awaited;
        let may = |call: &Waiting| {
            let its_turn = !kept || awaited == Some(call.task.id);
            its_turn && call.task.complete && call.any_of.binary_search(&rank).is_ok()
        };
        let at = self.calls.waiting.iter().position(may)?;
        let call = self.calls.waiting.remove(at)?;
        Some(call.task)
    }

    /// Lets those who have nothing to do take the calls that wait, in turn on hosts.
    fn hand_out(&mut self) {
        while !self.calls.waiting.is_empty() {
            let mut idle = vec![Vec::new(); self.agents.len()];
            for (rank, worker) in self.workers.iter().enumerate() {
                let up = matches!(worker.state, WorkerState::Up);
                if up && worker.current.is_none() && worker.queue.is_empty() {
                    idle[worker.agent].push(rank as Rank);
                }
            }
            // First where most have nothing to do.
            idle.sort_by_key(|ranks| std::cmp::Reverse(ranks.len()));
            let before = self.calls.waiting.len();
            for rank in idle.into_iter().flatten() {
                self.dispatch(rank);
                if self.calls.waiting.len() < before {
                    break;
                }
            }
            if self.calls.waiting.len() == before {
                return;
            }
        }
    }

    /// Calls of which no worker is left end as lost.
    pub(super) fn end_calls_of_nobody(&mut self) {
        let mut lost = Vec::new();
        for call in &self.calls.waiting {
            let gone = |&rank: &Rank| match &self.workers.get(rank as usize)?.state {
                WorkerState::Gone(gone) => Some((rank, gone.clone())),
                _ => None,
            };
            let gone: Option<Vec<_>> = call.any_of.iter().map(gone).collect();
            if let Some((rank, gone)) = gone.and_then(|mut gone| gone.pop()) {
                lost.push((rank, call.task.id, gone));
            }
        }
        for (rank, task, gone) in lost {
            self.calls.waiting.retain(|call| call.task.id != task);
            self.notes.push(Note::Done {
                rank,
                task,
                job: CALLS,
                outcome: Outcome::Lost(gone),
            });
        }
    }
}
