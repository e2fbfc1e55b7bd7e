//! How tasks, control messages and payloads come to be sent. What is sent next is for
//! [`Outbound`](super::outbound::Outbound).

use super::outbound::ends_payload;
use super::task::{Current, Next, Phase, Task};
use super::worker::{Worker, WorkerState};
use super::{Agent, Scheduler};
use crate::protocol::control::{self, ToAgent};
use crate::protocol::dedup::Chunk;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{Frame, MAX_BODY};
use crate::protocol::ids::{PayloadId, Rank, TaskId};
use std::mem;
use std::sync::Arc;
use tracing::debug;

impl Scheduler {
    /// From its first task on, an agent keeps up to `most` bytes of chunks.
    pub fn share(&mut self, agent: usize, most: usize) {
        self.agents[agent].out.keep_chunks(most);
    }

    /// Whether an agent keeps chunks.
    pub fn shares(&self, agent: usize) -> bool {
        self.agents[agent].out.keeps_chunks()
    }

    /// Bytes of tasks that were sent or dropped since the last call.
    pub fn take_released(&mut self) -> usize {
        mem::take(&mut self.released)
    }

    /// Queues a control message.
    pub fn send_control(&mut self, agent: usize, message: &ToAgent) -> Result<(), ProtocolError> {
        let frame = control::encode(message).map_err(|error| ProtocolError(error.to_string()))?;
        self.push_control(agent, frame);
        Ok(())
    }

    pub(super) fn push_control(&mut self, agent: usize, frame: Frame) {
        self.agents[agent].out.push_control(frame);
    }

    /// A payload follows in chunks, to the agents of these workers, as far as they are there and do
    /// not have it. Returns whether there is any.
    pub fn begin_payload(&mut self, id: PayloadId, ranks: &[Rank]) -> bool {
        let mut any = false;
        for &rank in ranks {
            let worker = self.workers.get(rank as usize);
            let living = |worker: &&Worker| !matches!(worker.state, WorkerState::Gone(_));
            if let Some(worker) = worker.filter(living) {
                let out = &mut self.agents[worker.agent].out;
                any |= !out.is_closed() && out.payloads_mut().begin(id);
            }
        }
        any
    }

    /// A chunk, at most [`MAX_BODY`] long, of the payload that was begun last. Returns whether it
    /// waits to be sent.
    pub fn append_payload(&mut self, id: PayloadId, chunk: &Chunk, last: bool) -> bool {
        let counted = Arc::new(chunk.bytes.len());
        for agent in &mut self.agents {
            let payloads = agent.out.payloads_mut();
            payloads.append(id, chunk, &counted, last);
        }
        Arc::strong_count(&counted) > 1
    }

    /// The rest of a payload will not come: agents that do not have all of it forget it.
    pub fn abort_payload(&mut self, id: PayloadId) {
        for agent in &mut self.agents {
            agent.out.payloads_mut().abort(id);
        }
    }

    /// No more tasks will begin with it. Those that have been submitted do.
    pub fn drop_payload(&mut self, id: PayloadId) {
        for agent in &mut self.agents {
            agent.out.payloads_mut().drop_payload(id);
        }
    }

    /// Whether a worker's agent has a payload, so that tasks may begin with it.
    pub fn has_payload(&self, rank: Rank, id: PayloadId) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_some_and(|worker| self.agents[worker.agent].out.payloads().has(id))
    }

    /// What an agent is next to be told or sent of payloads, if it is the turn of that.
    fn next_of_payloads(&mut self, at: usize) -> Option<Frame> {
        let (agents, workers) = (&mut self.agents, &self.workers);
        let Agent { ranks, out, .. } = &mut agents[at];
        let begins = |task: &Task, id| task.payload == Some(id);
        let needed = |id: PayloadId| {
            let mut workers = ranks.iter().map(|&rank| &workers[rank as usize]);
            workers.any(|worker| {
                let current = worker.current.as_ref();
                // One that is held at the agent may go on to its worker there later, or be sent again.
                current.is_some_and(|current| begins(&current.task, id))
                    || worker
                        .next
                        .as_ref()
                        .is_some_and(|next| next.payload == Some(id))
                    || worker.queue.iter().any(|task| begins(task, id))
            })
        };
        let (frame, released) = out.next_of_payloads(needed);
        self.released += released;
        if frame.as_ref().is_some_and(ends_payload) {
            // Messages may have waited for that.
            for rank in self.agents[at].ranks.clone() {
                self.dispatch(rank);
            }
        }
        frame
    }

    /// A chunk, at most [`MAX_BODY`] long, of the message of a task.
    pub fn append(&mut self, rank: Rank, id: TaskId, chunk: Chunk, last: bool) {
        debug_assert!(chunk.bytes.len() <= MAX_BODY);
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        let open = |task: &&mut Task| task.id == id && !task.complete;
        let current = worker.current.as_mut().map(|current| &mut current.task);
        // The last one, the first one if it was submitted again, or the current one.
        let mut task = worker.queue.iter_mut().rev().find(open);
        if task.is_none() {
            task = current.filter(open);
        }
        match task {
            Some(task) => {
                task.complete = last;
                if !chunk.bytes.is_empty() {
                    task.chunks.push_back(chunk);
                }
            }
            None => match &mut worker.next {
                Some(next) if next.task.id == id && !next.task.complete => {
                    next.task.complete = last;
                    if !chunk.bytes.is_empty() {
                        next.kept.push_back(chunk.clone());
                        next.task.chunks.push_back(chunk);
                    }
                }
                // Cancelled or lost while R was still writing it.
                _ => self.released += chunk.bytes.len(),
            },
        }
        self.dispatch(rank);
    }

    /// Gives an idle worker its next task and lets it be sent.
    pub(super) fn dispatch(&mut self, rank: Rank) {
        let worker = &mut self.workers[rank as usize];
        if !matches!(worker.state, WorkerState::Up) {
            return;
        }
        if worker.current.is_none() {
            if let Some(next) = worker.next.take() {
                // Its agent has let it start, so what was sent is not needed here any more.
                let mut current = Current::new(next.task, None, self.now);
                let kept = next.kept.iter().map(|chunk| chunk.bytes.len());
                self.released += kept.sum::<usize>() - current.task.queued_bytes();
                current.phase = next.phase;
                if let Phase::Running = current.phase {
                    current.times.sent = Some(self.now);
                }
                current.cancelled = next.cancelled;
                self.occupy(rank, current);
            } else if let Some(task) = worker.next_task() {
                let seed = |other: Rank| self.workers.get(other as usize)?.seed.clone();
                let before = task.instead_of.map(|other| seed(other).unwrap_or_default());
                let current = Current::new(task, before, self.now);
                self.occupy(rank, current);
            } else if let Some(task) = self.call_for(rank) {
                let current = Current::new(task, None, self.now);
                self.occupy(rank, current);
            }
        }
        let worker = &mut self.workers[rank as usize];
        if worker.next.is_none() {
            worker.next = worker.task_ahead().map(Next::new);
        }
        self.agents[worker.agent].out.line_up(worker);
    }

    /// The next frame for an agent's stream, if there is one.
    pub fn next_frame(&mut self, agent: usize) -> Option<Frame> {
        if let Some(frame) = self.agents[agent].out.next_queued() {
            return Some(frame);
        }
        if let Some(frame) = self.next_of_payloads(agent) {
            return Some(frame);
        }
        while let Some(index) = self.agents[agent].out.next_in_line() {
            let Agent { ranks, out, .. } = &mut self.agents[agent];
            let rank = ranks[index as usize];
            let worker = &mut self.workers[rank as usize];
            let before = worker.sending().map(|task| task.id);
            if let Some(released) = out.push_chunk(worker, self.now) {
                let after = worker.sending().map(|task| task.id);
                if let Some(task) = before.filter(|_| after != before) {
                    debug!(task, rank = rank + 1, "task sent");
                }
                self.released += released;
                self.dispatch(rank);
                return self.agents[agent].out.next_queued();
            }
        }
        // None of the others has used its turn.
        self.next_of_payloads(agent)
    }
}
