//! How results come in: what an agent may send, what waits for R, and what is asked for next.

use super::events::{Note, Outcome, Want};
use super::task::{Next, Phase, Task};
use super::worker::{WorkerState, current_of};
use super::{MOST_SHARED, Scheduler};
use crate::protocol::body::{Body, Memory};
use crate::protocol::dedup::Mirror;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, FIRST, Frame, HEADER_LEN, Header, LAST, SHARED};
use crate::protocol::ids::{RESTORE, Rank, TaskId};
use crate::protocol::limits::{GRANT, MOST_MEMORY, RESULT_WINDOW};
use bytes::Bytes;
use std::mem;
use std::sync::Arc;
use tracing::trace;

/// Large results that flow from a host at a time.
const AT_ONCE: usize = 4;

impl Scheduler {
    /// From its first task on, an agent keeps up to `most` bytes of chunks.
    pub fn share(&mut self, agent: usize, most: usize) {
        self.agents[agent].mirror = Some(Mirror::new(most));
    }

    /// Bytes of tasks that were sent or dropped since the last call.
    pub fn take_released(&mut self) -> usize {
        mem::take(&mut self.released)
    }

    /// Whether a result waits on its host because of the limit.
    pub fn is_starving(&self) -> bool {
        !self.starving.is_empty()
    }

    /// Bytes of results held.
    pub fn buffered(&self) -> usize {
        self.buffered
    }

    /// The answer that a worker is at is not wanted. What is still to come of it is dropped, so it
    /// takes no room from others.
    pub(super) fn drop_answer(&mut self, rank: Rank) {
        if let Some(current) = &mut self.workers[rank as usize].current {
            self.reserved -= current.reserved();
            self.flowing -= usize::from(current.flowing());
            self.buffered -= current.answer.len;
            current.answer = Body::default();
            current.cancelled = true;
            if mem::take(&mut current.begun) {
                self.agents[self.workers[rank as usize].agent].begun -= 1;
            }
        }
    }

    /// Says whose answer R waits for.
    pub fn want(&mut self, want: Want) {
        self.want = want;
        self.grant();
    }

    /// R is blocked in sending, or no longer.
    pub fn set_unlimited(&mut self, unlimited: bool) {
        self.unlimited = unlimited;
        self.grant();
    }

    /// R took answers of this many bytes.
    pub fn taken(&mut self, bytes: usize) {
        self.buffered -= bytes;
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
        if matches!(worker.state, WorkerState::Gone(_)) {
            // Stopped by us; its agent may not have known.
            return Ok(());
        }
        let dropped = |next: &Next| {
            let asked = next.cancelled || next.recalled;
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
        let before = current.reserved();
        current.received = current.received.saturating_add(len);
        worker.track.bytes_out += (HEADER_LEN + len) as u64;
        if flags & FIRST != 0 {
            current.times.answered = Some(self.now);
            current.times.measured = (self.measure)(&chunk);
        }
        if memory.is_some() {
            // Leave for what it had begun to send otherwise may have been taken for leave to send this.
            current.granted = current.granted.max(current.received);
        }
        self.reserved -= before - current.reserved();
        if current.received > current.granted {
            return Err(ProtocolError(format!(
                "worker {rank} sent {} bytes, {} were granted",
                current.received, current.granted
            )));
        }
        if flags & LAST != 0 {
            self.agents[worker.agent].losses = 0;
            // What restores a worker ends with the state that is known.
            let after = current.after.take().filter(|_| task & RESTORE == 0);
            if let Some((whose, seed)) = after {
                self.workers[whose as usize].seed = Some(seed.clone());
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
        if flags & ABORT != 0 {
            return Err(ProtocolError(format!(
                "worker {rank} gave up task {task}, which was not cancelled"
            )));
        }
        if flags & FIRST != 0 {
            self.buffered -= current.answer.len;
            current.answer = Body::default();
        }
        self.buffered += len;
        match memory {
            Some(memory) => {
                let _counted = Some(self.shared.clone());
                current.answer.len = len;
                current.answer.memory = Some(Memory { _counted, ..memory });
            }
            None => current.answer.push(chunk),
        }
        if flags & LAST != 0 {
            let answer = mem::take(&mut current.answer);
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
            self.grant();
        } else {
            if current.granted - current.received < RESULT_WINDOW / 2 {
                self.starves(rank);
            }
            self.grant();
        }
        Ok(())
    }

    /// The answer that this worker is at needs more to be asked for.
    fn starves(&mut self, rank: Rank) {
        let current = self.workers[rank as usize].current.as_mut();
        let Some(current) = current.filter(|current| !current.starving) else {
            return;
        };
        self.flowing -= usize::from(current.flowing());
        current.starving = true;
        match current.begun {
            true => self.starving.push_front(rank),
            false => self.starving.push_back(rank),
        }
    }

    /// An answer in shared memory: it is announced, or it comes.
    pub(super) fn on_shared(
        &mut self,
        rank: Rank,
        frame: &Frame,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let Header { task, flags, .. } = frame.header;
        let number = frame.number().filter(|&len| len <= MOST_MEMORY);
        let number = number.and_then(|len| usize::try_from(len).ok());
        let Some(len) = number else {
            return Err(ProtocolError("a result of no length".into()));
        };
        let current = self.workers[rank as usize].current.as_mut();
        let current = current.filter(|current| current.task.id == task);
        if flags == LAST | SHARED {
            let announced = current.as_ref().and_then(|current| current.announced);
            let gone = self.is_gone(rank);
            let memory = memory.filter(|memory| memory.len == len);
            if memory.is_none() || !gone && announced != Some(len) {
                return Err(ProtocolError("a result without its memory".into()));
            }
            return self.on_data(rank, task, FIRST | LAST, Bytes::new(), memory);
        }
        if flags != FIRST | SHARED {
            return Err(ProtocolError("a bad announcement of a result".into()));
        }
        self.on_data(rank, task, FIRST, Bytes::new(), None)?;
        let current = self.workers[rank as usize].current.as_mut();
        let Some(current) = current.filter(|current| current.task.id == task) else {
            return Ok(());
        };
        if current.announced.replace(len).is_some() {
            return Err(ProtocolError("a result that is announced twice".into()));
        }
        if !current.cancelled {
            self.starves(rank);
            self.grant();
        }
        Ok(())
    }

    /// Frees a worker of its current task. Returns that if its answer is still wanted.
    pub(super) fn free(&mut self, rank: Rank) -> Option<Task> {
        let worker = &mut self.workers[rank as usize];
        if let Some(current) = current_of(worker) {
            let (times, answered) = (current.times, current.answered);
            let tasks = times.measured.map_or(1, |measured| measured.tasks.into());
            worker
                .track
                .ended(times, if answered { tasks } else { 0 }, self.now);
        }
        let current = self.workers[rank as usize].current.take()?;
        self.released += current.task.queued_bytes();
        self.buffered -= current.answer.len;
        self.reserved -= current.reserved();
        self.flowing -= usize::from(current.flowing());
        if current.begun {
            self.agents[self.workers[rank as usize].agent].begun -= 1;
        }
        if current.starving {
            self.starving.retain(|&starving| starving != rank);
        }
        self.call_ended(current.task.id);
        (!current.cancelled).then_some(current.task)
    }

    /// Whether more of this large result is to be had now: a few of a host's at a time. All at once would
    /// be complete at the same time, and go through memory instead of the processor's caches; and R
    /// could begin with none before.
    fn may_flow(&self, rank: Rank) -> bool {
        let worker = &self.workers[rank as usize];
        let current = worker.current.as_ref();
        let begun = current.is_none_or(|current| current.begun || current.cancelled);
        begun || self.want == Want::Rank(rank) || self.agents[worker.agent].begun < AT_ONCE
    }

    /// Whether there is room for more of a result, by its place among those that need more. One in shared
    /// memory comes at once, and takes a descriptor.
    fn has_room(&self, at: Option<usize>) -> bool {
        let rank = at.and_then(|at| self.starving.get(at));
        let current = rank.and_then(|&rank| self.workers[rank as usize].current.as_ref());
        let used = self.buffered.saturating_add(self.reserved);
        match current.and_then(|current| current.announced) {
            Some(len) => {
                used.saturating_add(len) <= self.limit
                    && Arc::strong_count(&self.shared) <= MOST_SHARED
            }
            None => used < self.limit,
        }
    }

    /// Asks for more of large results: while there is room, or because R waits for them.
    pub(super) fn grant(&mut self) {
        while !self.starving.is_empty() {
            let wanted = self.starving.iter().position(|&rank| self.is_wanted(rank));
            let first = self.starving.iter().position(|&rank| self.may_flow(rank));
            let at = match (self.want, wanted) {
                _ if self.unlimited => 0,
                (_, Some(at)) => at,
                _ if self.has_room(first) => match first {
                    Some(at) => at,
                    None => return,
                },
                // One result alone is completed beyond the limit: R takes it as soon as it is.
                (Want::Any, _) if self.flowing == 0 => {
                    let same = |&rank: &Rank| Some(rank) == self.alone;
                    let at = self.starving.iter().position(same).unwrap_or(0);
                    self.alone = Some(self.starving[at]);
                    at
                }
                (Want::Rank(rank), _) => match self.starving.iter().position(|&s| s == rank) {
                    Some(at) => at,
                    None => return,
                },
                _ => return,
            };
            let Some(rank) = self.starving.remove(at) else {
                return;
            };
            let worker = &mut self.workers[rank as usize];
            let Some(current) = &mut worker.current else {
                continue;
            };
            current.starving = false;
            if current.cancelled {
                continue;
            }
            if !mem::replace(&mut current.begun, true) {
                self.agents[worker.agent].begun += 1;
            }
            let before = current.reserved();
            let more = current.announced.unwrap_or(GRANT);
            current.granted = current.granted.saturating_add(more);
            self.reserved += current.reserved() - before;
            self.flowing += usize::from(current.flowing());
            trace!(
                task = current.task.id,
                rank = rank + 1,
                bytes = more,
                "credit granted"
            );
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            let frame = Frame::credit(worker.index, current.task.id, more);
            let agent = worker.agent;
            self.push_control(agent, frame);
        }
    }
}
