//! Submission of messages, control messages and blobs. [`Outbound`](super::outbound::Outbound)
//! decides what is sent next.

use super::outbound::ends_blob;
use super::task::{Current, Phase, PrefetchedTask, Task};
use super::worker::{Worker, WorkerState};
use super::{AgentState, Scheduler};
use crate::protocol::control::{self, ToAgent};
use crate::protocol::dedup::Chunk;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{Frame, MAX_BODY};
use crate::protocol::ids::{BlobId, Rank, TaskId};
use std::mem;
use std::sync::Arc;
use tracing::debug;

impl Scheduler {
    /// Sets the size of an agent's chunk cache in bytes. To be called before the agent's first
    /// task.
    pub fn set_chunk_cache(&mut self, agent: usize, max: usize) {
        self.agents[agent].out.set_chunk_cache(max);
    }

    /// Whether an agent has a chunk cache.
    pub fn has_chunk_cache(&self, agent: usize) -> bool {
        self.agents[agent].out.has_chunk_cache()
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

    /// Begins a blob, whose chunks follow, for the agents of these workers that are connected and
    /// do not have it. Returns whether there is any such agent.
    pub fn begin_blob(&mut self, id: BlobId, ranks: &[Rank]) -> bool {
        let mut any = false;
        for &rank in ranks {
            let worker = self.workers.get(rank as usize);
            let living = |worker: &&Worker| !matches!(worker.state, WorkerState::Terminated(_));
            if let Some(worker) = worker.filter(living) {
                let out = &mut self.agents[worker.agent].out;
                any |= !out.is_closed() && out.blobs_mut().begin(id);
            }
        }
        any
    }

    /// Appends a chunk of at most [`MAX_BODY`] bytes to the blob that was begun last. Returns
    /// whether the chunk waits to be sent.
    pub fn append_blob(&mut self, id: BlobId, chunk: &Chunk, last: bool) -> bool {
        let counted = Arc::new(chunk.bytes.len());
        for agent in &mut self.agents {
            let blobs = agent.out.blobs_mut();
            blobs.append(id, chunk, &counted, last);
        }
        Arc::strong_count(&counted) > 1
    }

    /// Aborts a blob: agents that do not have all of it forget it.
    pub fn abort_blob(&mut self, id: BlobId) {
        for agent in &mut self.agents {
            agent.out.blobs_mut().abort(id);
        }
    }

    /// Drops a blob: no more tasks will begin with it. Those that have been submitted still do.
    pub fn drop_blob(&mut self, id: BlobId) {
        for agent in &mut self.agents {
            agent.out.blobs_mut().drop_blob(id);
        }
    }

    /// Whether a worker's agent has a blob, so that tasks may begin with it.
    pub fn has_blob(&self, rank: Rank, id: BlobId) -> bool {
        let worker = self.workers.get(rank as usize);
        worker.is_some_and(|worker| self.agents[worker.agent].out.blobs().has(id))
    }

    /// The next frame about blobs for an agent, if it is the turn of blobs.
    fn next_of_blobs(&mut self, at: usize) -> Option<Frame> {
        let (agents, workers) = (&mut self.agents, &self.workers);
        let AgentState { ranks, out, .. } = &mut agents[at];
        let begins = |task: &Task, id| task.blob == Some(id);
        let needed = |id: BlobId| {
            let mut workers = ranks.iter().map(|&rank| &workers[rank as usize]);
            workers.any(|worker| {
                let current = worker.current.as_ref();
                // The agent may pass a prefetched task on to its worker later, or the head may send
                // it again.
                current.is_some_and(|current| begins(&current.task, id))
                    || worker
                        .next
                        .as_ref()
                        .is_some_and(|next| next.blob == Some(id))
                    || worker.queue.iter().any(|task| begins(task, id))
            })
        };
        let (frame, released) = out.next_of_blobs(needed);
        self.released += released;
        if frame.as_ref().is_some_and(ends_blob) {
            // Messages may have waited for the end of the blob.
            for rank in self.agents[at].ranks.clone() {
                self.dispatch(rank);
            }
        }
        frame
    }

    /// Appends a chunk of at most [`MAX_BODY`] bytes to the message of a task.
    pub fn append(&mut self, rank: Rank, id: TaskId, chunk: Chunk, last: bool) {
        debug_assert!(chunk.bytes.len() <= MAX_BODY);
        let Some(worker) = self.workers.get_mut(rank as usize) else {
            return;
        };
        let open = |task: &&mut Task| task.id == id && !task.complete;
        let current = worker.current.as_mut().map(|current| &mut current.task);
        // The task is the last of the queue, the first if it was submitted again, or the current
        // one.
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
                        next.all_chunks.push_back(chunk.clone());
                        next.task.chunks.push_back(chunk);
                    }
                }
                // The task was cancelled or lost while R was still writing it.
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
                // The agent has started the task, so that its chunks are not needed here any more.
                let mut current = Current::new(next.task, None, self.now);
                let sizes = next.all_chunks.iter().map(|chunk| chunk.bytes.len());
                self.released += sizes.sum::<usize>() - current.task.queued_bytes();
                current.phase = next.phase;
                if let Phase::Running = current.phase {
                    current.times.sent = Some(self.now);
                }
                current.cancelled = next.cancelled;
                self.occupy(rank, current);
            } else if let Some(task) = worker.next_task() {
                let seed = |other: Rank| self.workers.get(other as usize)?.seed.clone();
                let before = task
                    .on_behalf_of
                    .map(|other| seed(other).unwrap_or_default());
                let current = Current::new(task, before, self.now);
                self.occupy(rank, current);
            } else if let Some(task) = self.call_for(rank) {
                let current = Current::new(task, None, self.now);
                self.occupy(rank, current);
            }
        }
        let worker = &mut self.workers[rank as usize];
        if worker.next.is_none() {
            worker.next = worker.prefetched_task().map(PrefetchedTask::new);
        }
        self.agents[worker.agent].out.line_up(worker);
    }

    /// The next frame for an agent's stream, if there is one.
    pub fn next_frame(&mut self, agent: usize) -> Option<Frame> {
        if let Some(frame) = self.agents[agent].out.next_queued() {
            return Some(frame);
        }
        if let Some(frame) = self.next_of_blobs(agent) {
            return Some(frame);
        }
        while let Some(index) = self.agents[agent].out.next_in_line() {
            let AgentState { ranks, out, .. } = &mut self.agents[agent];
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
        // No worker had a chunk to send.
        self.next_of_blobs(agent)
    }
}
