//! How the scheduler receives results. [`ResultFlow`](super::result_flow::ResultFlow) decides how
//! much of them may be sent.

use super::Scheduler;
use super::events::{Demand, Note, Outcome};
use super::task::{Current, Phase, PrefetchedTask, Task};
use super::worker::{WorkerState, current_of};
use crate::protocol::body::Memory;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, BY_REFERENCE, FIRST, Frame, HEADER_LEN, Header, Kind, LAST};
use crate::protocol::ids::{RESTORE, Rank, TaskId};
use crate::protocol::limits::MAX_RESULT_MEMORY;
use bytes::Bytes;
use tracing::trace;

impl Scheduler {
    /// Whether a result waits on its host for credit, because of the limit.
    pub fn is_blocked_on_credit(&self) -> bool {
        self.flow.is_blocked_on_credit()
    }

    /// Bytes of results that the head buffers.
    pub fn buffered(&self) -> usize {
        self.flow.buffered()
    }

    /// Makes this the current task of a worker.
    pub(super) fn occupy(&mut self, rank: Rank, current: Current) {
        self.flow.begin(rank, current.cancelled);
        let worker = &mut self.workers[rank as usize];
        worker.current = Some(current);
        self.agents[worker.agent].active = self.now;
    }

    /// Drops the answer of a worker's current task. The rest of it is discarded on arrival, so that
    /// it takes no room from other results.
    pub(super) fn drop_answer(&mut self, rank: Rank) {
        if let Some(current) = &mut self.workers[rank as usize].current {
            current.cancelled = true;
            self.flow.drop_result(rank);
        }
    }

    /// Sets which answer R waits for.
    pub fn demand(&mut self, demand: Demand) {
        self.flow.demand(demand);
        self.grant();
    }

    /// Sets whether R is blocked in sending.
    pub fn set_unlimited(&mut self, unlimited: bool) {
        self.flow.set_unlimited(unlimited);
        self.grant();
    }

    /// R has taken answers of this many bytes.
    pub fn taken(&mut self, bytes: usize) {
        self.flow.taken(bytes);
        self.grant();
    }

    pub(super) fn on_data(
        &mut self,
        rank: Rank,
        task: TaskId,
        flags: u8,
        chunk: Bytes,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let len = memory.as_ref().map_or(chunk.len(), |memory| memory.len);
        let worker = &mut self.workers[rank as usize];
        if matches!(worker.state, WorkerState::Terminated(_)) {
            // The head has stopped the worker, which its agent may not have known.
            return Ok(());
        }
        let dropped = |next: &PrefetchedTask| {
            let asked = next.cancelled || next.revoked;
            next.task.id == task && asked && flags == LAST | ABORT && chunk.is_empty()
        };
        if worker.next.as_ref().is_some_and(dropped) {
            self.not_started(rank);
            return Ok(());
        }
        let Some(current) = &mut worker.current else {
            return Err(ProtocolError(format!("an answer of idle worker {rank}")));
        };
        if current.task.id != task || !matches!(current.phase, Phase::Running) {
            return Err(ProtocolError(format!(
                "an answer to task {task} from worker {rank}, which has task {}",
                current.task.id
            )));
        }
        worker.stats.bytes_out += (HEADER_LEN + len) as u64;
        if flags & FIRST != 0 {
            current.times.answered = Some(self.now);
            current.times.measured = (self.measure)(&chunk);
        }
        if flags & ABORT != 0 && !current.cancelled {
            return Err(ProtocolError(format!(
                "worker {rank} gave up task {task}, which was not cancelled"
            )));
        }
        self.flow.receive(rank, flags, chunk, memory)?;
        if flags & LAST != 0 {
            self.agents[worker.agent].failures = 0;
            // A set-up call that the worker had completed before leaves no new random number state.
            let sets_seed = task & RESTORE == 0 || current.task.sets_seed;
            let after = current.after.take().filter(|_| sets_seed);
            let is_late_call = current.task.sets_seed;
            if is_late_call && std::mem::take(&mut worker.seed_waits) && after.is_none() {
                let (agent, index) = (worker.agent, worker.index);
                if let Some(seed) = worker.seed.clone() {
                    self.push_control(agent, Frame::new(Kind::Seed, 0, index, 0, seed));
                }
            }
            if let Some((whose, seed)) = after {
                self.set_seed(whose, seed.clone());
                if whose != rank {
                    self.put_seed(whose, seed);
                }
            }
        }
        let worker = &mut self.workers[rank as usize];
        let Some(current) = &mut worker.current else {
            return Ok(());
        };
        if current.cancelled {
            if flags & LAST != 0 {
                self.free(rank);
                self.dispatch(rank);
            }
            self.grant();
            return Ok(());
        }
        if flags & LAST != 0 {
            let answer = self.flow.complete(rank);
            let job = current.task.job;
            current.answered = true;
            self.free(rank);
            let outcome = Outcome::Answer(answer);
            self.notes.push(Note::Done {
                rank,
                task,
                job,
                outcome,
            });
            self.dispatch(rank);
        }
        self.grant();
        Ok(())
    }

    /// Processes an answer in shared memory: its announcement, or the memory itself.
    pub(super) fn on_shared_answer(
        &mut self,
        rank: Rank,
        frame: &Frame,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let Header { task, flags, .. } = frame.header;
        let number = frame.number().filter(|&len| len <= MAX_RESULT_MEMORY);
        let number = number.and_then(|len| usize::try_from(len).ok());
        let Some(len) = number else {
            return Err(ProtocolError("a result of no length".into()));
        };
        if flags == LAST | BY_REFERENCE {
            let announced = self.flow.announced(rank);
            let terminated = self.is_terminated(rank);
            let memory = memory.filter(|memory| memory.len == len);
            if memory.is_none() || !terminated && announced != Some(len) {
                return Err(ProtocolError("a result without its memory".into()));
            }
            return self.on_data(rank, task, FIRST | LAST, Bytes::new(), memory);
        }
        if flags != FIRST | BY_REFERENCE {
            return Err(ProtocolError("a bad announcement of a result".into()));
        }
        self.on_data(rank, task, FIRST, Bytes::new(), None)?;
        self.flow.announce(rank, len)?;
        self.grant();
        Ok(())
    }

    /// Ends the current task of a worker. Returns the task if its answer is still wanted.
    pub(super) fn free(&mut self, rank: Rank) -> Option<Task> {
        let worker = &mut self.workers[rank as usize];
        if let Some(current) = current_of(worker) {
            let (times, answered) = (current.times, current.answered);
            let tasks = times.measured.map_or(1, |measured| measured.tasks.into());
            worker
                .stats
                .ended(times, if answered { tasks } else { 0 }, self.now);
        }
        let worker = &mut self.workers[rank as usize];
        let current = worker.current.take()?;
        self.agents[worker.agent].active = self.now;
        self.released += current.task.queued_bytes();
        self.flow.end(rank);
        self.call_ended(current.task.id);
        (!current.cancelled).then_some(current.task)
    }

    /// Grants credit for large results, while there is room or because R waits for them.
    pub(super) fn grant(&mut self) {
        if !self.flow.is_blocked_on_credit() {
            return;
        }
        let awaited = self.flow.awaited();
        loop {
            let (workers, calls) = (&self.workers, &self.calls);
            let is_demanded = |rank: Rank| calls.is_demanded(&workers[rank as usize]);
            let is_awaited = |rank: Rank| {
                workers[rank as usize].has_task_of(rank, &awaited) || calls.awaits_worker(rank)
            };
            let Some((rank, more)) = self.flow.next_grant(is_demanded, is_awaited) else {
                return;
            };
            let worker = &self.workers[rank as usize];
            if let Some(current) = &worker.current {
                trace!(
                    task = current.task.id,
                    rank = rank + 1,
                    bytes = more,
                    "credit granted"
                );
                let frame = Frame::credit(worker.index, current.task.id, more);
                self.push_control(worker.agent, frame);
            }
        }
    }
}
