//! What is sent next to an agent: control messages, payloads, and tasks in turn.

use super::task::{Current, Next, Phase, Task};
use super::worker::{Worker, WorkerState};
use super::{Agent, Scheduler};
use crate::protocol::control::{self, ToAgent};
use crate::protocol::dedup::{Chunk, Sent};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{FIRST, Frame, GUEST, HEADER_LEN, Kind, LAST, MAX_BODY, SHARED};
use crate::protocol::ids::{PayloadId, Rank, TaskId};
use bytes::Bytes;
use std::mem;
use std::sync::Arc;
use tracing::debug;

impl Scheduler {
    /// Queues a control message.
    pub fn send_control(&mut self, agent: usize, message: &ToAgent) -> Result<(), ProtocolError> {
        let frame = control::encode(message).map_err(|error| ProtocolError(error.to_string()))?;
        self.push_control(agent, frame);
        Ok(())
    }

    pub(super) fn push_control(&mut self, agent: usize, frame: Frame) {
        if !self.agents[agent].lost {
            self.agents[agent].control.push_back(frame);
        }
    }

    /// A payload follows in chunks, to the agents of these workers, as far as they are there and do
    /// not have it. Returns whether there is any.
    pub fn begin_payload(&mut self, id: PayloadId, ranks: &[Rank]) -> bool {
        let mut any = false;
        for &rank in ranks {
            let worker = self.workers.get(rank as usize);
            let living = |worker: &&Worker| !matches!(worker.state, WorkerState::Gone(_));
            if let Some(worker) = worker.filter(living) {
                let agent = &mut self.agents[worker.agent];
                any |= !agent.lost && agent.payloads.begin(id);
            }
        }
        any
    }

    /// A chunk, at most [`MAX_BODY`] long, of the payload that was begun last. Returns whether it
    /// waits to be sent.
    pub fn append_payload(&mut self, id: PayloadId, chunk: &Chunk, last: bool) -> bool {
        let counted = Arc::new(chunk.bytes.len());
        for agent in &mut self.agents {
            agent.payloads.append(id, chunk, &counted, last);
        }
        Arc::strong_count(&counted) > 1
    }

    /// The rest of a payload will not come: agents that do not have all of it forget it.
    pub fn abort_payload(&mut self, id: PayloadId) {
        for agent in &mut self.agents {
            agent.payloads.abort(id);
        }
    }

    /// No more tasks will begin with it. Those that have been submitted do.
    pub fn drop_payload(&mut self, id: PayloadId) {
        for agent in &mut self.agents {
            agent.payloads.drop_payload(id);
        }
    }

    /// Whether a worker's agent has a payload, so that tasks may begin with it.
    pub fn has_payload(&self, rank: Rank, id: PayloadId) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_some_and(|worker| self.agents[worker.agent].payloads.has(id))
    }

    /// Whether the message that is next to be sent to a worker begins with a payload that has not
    /// been sent yet.
    fn awaits_payload(&self, rank: Rank) -> bool {
        let worker = &self.workers[rank as usize];
        let payload = worker.sending().and_then(|task| task.payload);
        let payloads = &self.agents[worker.agent].payloads;
        payload.is_some_and(|payload| payloads.is_on_its_way(payload))
    }

    /// What an agent is next to be told or sent of payloads, if it is the turn of that.
    fn next_of_payloads(&mut self, at: usize) -> Option<Frame> {
        let (agents, workers) = (&mut self.agents, &self.workers);
        let Agent {
            ranks, payloads, ..
        } = &mut agents[at];
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
        while let Some((told, released)) = payloads.forget(needed) {
            self.released += released;
            if told.is_some() {
                return told;
            }
        }
        let agent = &mut agents[at];
        let others = agent.sendable.len();
        let (frame, released) = agent.payloads.next(others, agent.mirror.as_mut())?;
        self.released += released;
        if frame.header.flags & LAST != 0 {
            // Messages may have waited for that.
            for rank in self.agents[at].ranks.clone() {
                self.dispatch(rank);
            }
        }
        Some(frame)
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
                worker.current = Some(current);
            } else if let Some(task) = worker.next_task() {
                let seed = |other: Rank| self.workers.get(other as usize)?.seed.clone();
                let before = task.instead_of.map(|other| seed(other).unwrap_or_default());
                let current = Current::new(task, before, self.now);
                self.workers[rank as usize].current = Some(current);
            } else if let Some(task) = self.call_for(rank) {
                let current = Current::new(task, None, self.now);
                self.workers[rank as usize].current = Some(current);
            }
        }
        let worker = &mut self.workers[rank as usize];
        if worker.next.is_none() {
            worker.next = worker.task_ahead().map(Next::new);
        }
        let waits = self.awaits_payload(rank);
        let worker = &mut self.workers[rank as usize];
        if !waits && !worker.sendable && worker.can_send() {
            worker.sendable = true;
            self.agents[worker.agent].sendable.push_back(rank);
        }
    }

    /// The next frame for an agent's stream, if there is one.
    pub fn next_frame(&mut self, agent: usize) -> Option<Frame> {
        let queued = self.agents[agent].together.pop_front();
        if let Some(frame) = queued.or_else(|| self.agents[agent].control.pop_front()) {
            return Some(frame);
        }
        if let Some(frame) = self.next_of_payloads(agent) {
            return Some(frame);
        }
        while let Some(rank) = self.agents[agent].sendable.pop_front() {
            let waits = self.awaits_payload(rank);
            let worker = &mut self.workers[rank as usize];
            worker.sendable = false;
            // A task may have been cancelled or lost since its worker was put into the queue.
            if waits || !worker.can_send() {
                continue;
            }
            let mut before = None;
            let mut ahead = false;
            let (task, phase, times) = match (&mut worker.current, &mut worker.next) {
                (Some(current), _) if matches!(current.phase, Phase::Sending { .. }) => {
                    before = current.before.take();
                    let times = Some(&mut current.times);
                    (&mut current.task, &mut current.phase, times)
                }
                (_, Some(next)) => {
                    ahead = true;
                    (&mut next.task, &mut next.phase, None)
                }
                _ => continue,
            };
            let Phase::Sending { first } = phase else {
                continue;
            };
            let chunks = &mut task.chunks;
            let payload = task.payload.take();
            let sent = match (&mut self.agents[agent].mirror, payload) {
                (_, Some(payload)) => Sent {
                    flags: SHARED,
                    body: Bytes::copy_from_slice(&payload.to_le_bytes()),
                    len: size_of::<PayloadId>(),
                },
                (Some(mirror), None) => mirror.send(chunks, worker.window - HEADER_LEN),
                (None, None) => {
                    let body = chunks.pop_front().unwrap_or_default().bytes;
                    let len = body.len();
                    Sent {
                        flags: 0,
                        body,
                        len,
                    }
                }
            };
            worker.window -= HEADER_LEN + sent.len;
            if task.is_counted() && payload.is_none() && !ahead {
                self.released += sent.len;
            }
            let mut flags = if mem::replace(first, false) { FIRST } else { 0 };
            if task.complete && task.chunks.is_empty() {
                flags |= LAST;
                *phase = Phase::Running;
                if let Some(times) = times {
                    times.sent = Some(self.now);
                }
            }
            let (flags, id) = (flags | sent.flags, task.id);
            if flags & LAST != 0 {
                debug!(task = id, rank = rank + 1, ahead, "task sent");
            }
            let index = worker.index;
            let frame = Frame::new(Kind::Data, flags, index, id, sent.body);
            worker.track.bytes_in += frame.wire_len() as u64;
            let together = &mut self.agents[agent].together;
            if let Some(seed) = before {
                together.push_back(Frame::new(Kind::Seed, GUEST, index, id, seed));
            }
            if let Some(name) = task.lasts.take() {
                let name = Bytes::copy_from_slice(&name.to_le_bytes());
                together.push_back(Frame::new(Kind::State, 0, index, id, name));
            }
            together.push_back(frame);
            if flags & LAST != 0 {
                let seed = worker.seed.clone();
                if let Some(seed) = seed.filter(|_| task.leaves_seed) {
                    together.push_back(Frame::new(Kind::Seed, 0, index, 0, seed));
                }
            }
            self.dispatch(rank);
            return self.agents[agent].together.pop_front();
        }
        // None of the others has used its turn.
        self.next_of_payloads(agent)
    }
}
