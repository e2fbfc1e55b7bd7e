//! Calls that run on the first free worker. A call waits here, rather than in the queue of a
//! worker, until a worker has nothing else to do. From then on it is a task like others, except
//! that no other task waits for the retry decision on it.

use super::{
    Arc, Chunk, HashSet, Note, Order, Outcome, Scheduler, Task, VecDeque, Worker, WorkerState,
};
use crate::protocol::control::{Facts, ToAgent};
use crate::protocol::ids::{CALLS, Rank, TaskId};
use std::time::Duration;
use tracing::debug;

/// Where a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallLocation {
    /// The call waits for a free worker.
    Waiting,
    /// This worker has the call.
    With(Rank),
    /// The call has ended.
    Nowhere,
}

/// A call that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    task: Task,
    /// The workers that may run the call, in order.
    any_of: Arc<[Rank]>,
}

#[derive(Debug, Default)]
pub(super) struct CallQueue {
    waiting: VecDeque<Waiting>,
    /// R waits for this call. The call may be given to a worker that is reserved for a verb,
    /// because R sends that worker nothing in the meantime.
    awaited: Option<TaskId>,
    /// R takes the results of these calls as soon as they are complete, whatever the limit.
    demanded: HashSet<TaskId>,
    /// Workers that are reserved for the current verb.
    reserved: HashSet<Rank>,
}

impl CallQueue {
    /// Adds the facts about all calls to a bug report.
    pub(super) fn facts(&self, facts: &mut Facts) {
        facts.add("calls_waiting", self.waiting.len());
        facts.add("calls_demanded", self.demanded.len());
        facts.add_some("call_awaited", self.awaited);
        facts.add("workers_reserved", self.reserved.len());
    }

    /// Whether the result of this worker's task must arrive whatever the limit: R demands it, or a
    /// call that R demands waits for a worker.
    pub(super) fn is_demanded(&self, worker: &Worker) -> bool {
        worker.current.as_ref().is_some_and(|current| {
            let mut waiting = self.waiting.iter();
            let behind = |call: &Waiting| self.demanded.contains(&call.task.id);
            let is_demanded = self.demanded.contains(&current.task.id);
            current.task.job == CALLS && (is_demanded || waiting.any(behind))
        })
    }
}

impl CallQueue {
    /// Whether the call that R waits for has to wait until this worker is free.
    pub(super) fn awaits_worker(&self, rank: Rank) -> bool {
        let Some(awaited) = self.awaited else {
            return false;
        };
        let mut waiting = self.waiting.iter();
        let call = waiting.find(|call| call.task.id == awaited);
        call.is_some_and(|call| call.any_of.binary_search(&rank).is_ok())
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
            again,
            chunks: VecDeque::new(),
            complete: false,
            setup_call: None,
            on_behalf_of: None,
            prefetch: false,
            movable: false,
            blob: None,
            limit,
            leaves_seed: false,
            sets_seed: false,
        };
        debug!(task = id, again, workers = any_of.len(), "call submitted");
        let call = Waiting { task, any_of };
        match again {
            true => self.calls.waiting.push_front(call),
            false => self.calls.waiting.push_back(call),
        }
        self.end_calls_of_nobody();
    }

    /// The number of calls that wait for a worker, and of those that workers have.
    pub fn count_calls(&self) -> (usize, usize) {
        let current = self
            .workers
            .iter()
            .filter_map(|worker| worker.current.as_ref());
        let with_workers = current.filter(|current| current.task.job == CALLS);
        (self.calls.waiting.len(), with_workers.count())
    }

    /// Appends a chunk of at most [`MAX_BODY`](crate::protocol::frame::MAX_BODY) bytes to the
    /// message of a call.
    pub fn append_call(&mut self, id: TaskId, chunk: Chunk, last: bool) {
        let mut waiting = self.calls.waiting.iter_mut();
        // The call may have been cancelled or have ended while R was still writing it.
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

    /// Cancels a call.
    pub fn cancel_call(&mut self, id: TaskId) {
        self.calls.demanded.remove(&id);
        self.calls.waiting.retain(|call| call.task.id != id);
        if let CallLocation::With(rank) = self.call_location(id) {
            self.cancel_matching(rank, |task, _| task == id);
        }
    }

    /// Number of waiting calls that workers of these agents may run, and whether those of each agent may run any.
    pub fn calls_waiting_for(&self, agents: &[usize]) -> (usize, Vec<bool>) {
        let (mut count, mut each) = (0, vec![false; agents.len()]);
        // Most calls may run on the same workers.
        let mut last: Option<(&[Rank], bool)> = None;
        for call in &self.calls.waiting {
            let any_of = &call.any_of[..];
            let may = match last {
                Some((before, may)) if before == any_of => may,
                _ => {
                    let mut may = false;
                    for worker in any_of.iter().filter_map(|&r| self.workers.get(r as usize)) {
                        if let Some(at) = agents.iter().position(|&agent| agent == worker.agent) {
                            each[at] = true;
                            may = true;
                        }
                    }
                    may
                }
            };
            last = Some((any_of, may));
            count += usize::from(may);
        }
        (count, each)
    }

    /// Where a call is.
    pub fn call_location(&self, id: TaskId) -> CallLocation {
        if self.calls.waiting.iter().any(|call| call.task.id == id) {
            return CallLocation::Waiting;
        }
        let has = |worker: &Worker| {
            let current = worker.current.as_ref();
            current.is_some_and(|current| current.task.id == id && !current.cancelled)
        };
        match self.workers.iter().position(has) {
            Some(rank) => CallLocation::With(rank as Rank),
            None => CallLocation::Nowhere,
        }
    }

    /// Whether a worker is at a call.
    pub fn is_at_call(&self, rank: Rank) -> bool {
        let current = self.workers.get(rank as usize);
        let current = current.and_then(|worker| worker.current.as_ref());
        current.is_some_and(|current| current.task.job == CALLS)
    }

    /// R takes the result of this call as soon as it is complete.
    pub fn demand_call(&mut self, id: TaskId) {
        if self.calls.demanded.insert(id) {
            self.grant();
        }
    }

    /// Sets the call that R waits for, if any.
    pub fn await_call(&mut self, id: Option<TaskId>) {
        if self.calls.awaited != id {
            self.calls.awaited = id;
            self.hand_out();
            self.grant();
        }
    }

    /// The result of a call has been reported to R, or never will be.
    pub(super) fn call_ended(&mut self, id: TaskId) {
        self.calls.demanded.remove(&id);
    }

    /// Reserves a worker for the current verb: the worker is given no calls until
    /// [`Scheduler::verb_over`], so that the verb's measurements of its tasks are undisturbed.
    pub fn reserve_for_verb(&mut self, rank: Rank) {
        self.calls.reserved.insert(rank);
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.movable = false;
        }
    }

    /// The verb is over. Returns whether calls, or the ends of draining workers, have waited for its end.
    pub fn verb_over(&mut self) -> bool {
        self.calls.reserved.clear();
        self.tasks_wait = false;
        let waiting = !self.calls.waiting.is_empty() || !self.drains.is_empty();
        self.hand_out();
        waiting
    }

    /// A worker of a reconnected host has been restored.
    pub fn restored(&mut self, rank: Rank) {
        if let Some(worker) = self.workers.get_mut(rank as usize) {
            worker.away = false;
            let (agent, worker) = (worker.agent, worker.index);
            self.agents[agent].active = self.now;
            // The message is short.
            let _ = self.send_control(agent, &ToAgent::Restored { worker });
            self.dispatch(rank);
        }
    }

    /// Takes the next call for this worker, which is up and idle.
    pub(super) fn call_for(&mut self, rank: Rank) -> Option<Task> {
        let worker = &self.workers[rank as usize];
        if worker.away || self.calls.waiting.is_empty() {
            return None;
        }
        // R decides on a retry only when it waits for that task. If R waits for a call, the call has to go first.
        let reserved = self.calls.reserved.contains(&rank) || worker.awaiting_retry.is_some();
        let awaited = self.calls.awaited;
        let drains = worker.draining.is_some();
        let may = |call: &Waiting| {
            let its_turn = !reserved || awaited == Some(call.task.id);
            let here = call.any_of.binary_search(&rank).is_ok();
            its_turn && call.task.complete && here && !(drains && self.any_available(&call.any_of))
        };
        let at = self.calls.waiting.iter().position(may)?;
        let call = self.calls.waiting.remove(at)?;
        Some(call.task)
    }

    /// Gives waiting calls to idle workers, in turn on hosts.
    fn hand_out(&mut self) {
        while !self.calls.waiting.is_empty() {
            let mut idle = vec![Vec::new(); self.agents.len()];
            for (rank, worker) in self.workers.iter().enumerate() {
                let up = matches!(worker.state, WorkerState::Up);
                let waits = worker.queue.is_empty() || worker.awaiting_retry.is_some();
                if up && worker.current.is_none() && waits {
                    idle[worker.agent].push(rank as Rank);
                }
            }
            // Hosts with more idle workers come first.
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

    /// Whether the agent of a worker has not joined yet.
    pub fn is_awaited(&self, rank: Rank) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_some_and(|worker| self.agents[worker.agent].awaited)
    }

    /// Ends the reservation of a worker: the current verb has no more tasks for it.
    pub fn release_from_verb(&mut self, rank: Rank) {
        self.calls.reserved.remove(&rank);
    }

    /// Whether the current verb has reserved this worker.
    pub(super) fn is_reserved(&self, rank: Rank) -> bool {
        self.calls.reserved.contains(&rank)
    }

    /// Whether a call waits that this worker may run, and that no available worker may run.
    pub(super) fn has_bound_call(&self, rank: Rank) -> bool {
        let mut waiting = self.calls.waiting.iter();
        waiting.any(|call| {
            call.any_of.binary_search(&rank).is_ok() && !self.any_available(&call.any_of)
        })
    }

    /// Ends as lost the calls that no worker is left for.
    pub(super) fn end_calls_of_nobody(&mut self) {
        let mut lost = Vec::new();
        for call in &self.calls.waiting {
            let terminated = |&rank: &Rank| match &self.workers.get(rank as usize)?.state {
                WorkerState::Terminated(termination) if !self.is_awaited(rank) => {
                    Some((rank, termination.clone()))
                }
                _ => None,
            };
            let all: Option<Vec<_>> = call.any_of.iter().map(terminated).collect();
            if let Some((rank, termination)) = all.and_then(|mut all| all.pop()) {
                lost.push((rank, call.task.id, termination));
            }
        }
        for (rank, task, termination) in lost {
            self.calls.waiting.retain(|call| call.task.id != task);
            self.notes.push(Note::Done {
                rank,
                task,
                job: CALLS,
                outcome: Outcome::Lost(termination),
            });
        }
    }
}
