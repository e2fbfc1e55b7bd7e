//! The outbound queue of an agent's stream, which decides what is sent next.
//!
//! Control messages go first, then blobs in turn with the messages of workers. Workers with
//! something to send wait in a queue, each once, and send one chunk at each turn. The bytes of one
//! worker thus never delay another worker's by more than one chunk.
//!
//! A pure state machine: the scheduler has one for each agent.

use super::task::Phase;
use super::worker::Worker;
use crate::head::activity::Moment;
use crate::head::blobs::HostBlobs;
use crate::protocol::control::Facts;
use crate::protocol::dedup::{CacheIndex, SentChunks};
use crate::protocol::frame::{
    ABORT, BY_REFERENCE, FIRST, Frame, HEADER_LEN, Kind, LAST, REASSIGNED,
};
use crate::protocol::ids::BlobId;
use bytes::Bytes;
use std::collections::VecDeque;
use std::mem;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Outbound {
    /// Frames that must follow the one that was returned last.
    together: VecDeque<Frame>,
    /// Control messages, which go first.
    control: VecDeque<Frame>,
    /// Workers with a chunk to send, by their index on the host.
    line: VecDeque<u32>,
    /// Whether each worker is in the queue.
    in_line: Vec<bool>,
    /// The contents of the agent's chunk cache, if it has one.
    cache_index: Option<CacheIndex>,
    /// The blobs that the agent has or is to be sent.
    blobs: HostBlobs,
    /// The host is lost: there is no stream.
    closed: bool,
}

impl Outbound {
    /// The queue for an agent with this many workers.
    pub(super) fn new(workers: usize) -> Outbound {
        Outbound {
            together: VecDeque::new(),
            control: VecDeque::new(),
            line: VecDeque::new(),
            in_line: vec![false; workers],
            cache_index: None,
            blobs: HostBlobs::default(),
            closed: false,
        }
    }

    /// Sets the number of workers of the agent, to which nothing has been sent.
    pub(super) fn set_workers(&mut self, workers: usize) {
        self.in_line = vec![false; workers];
    }

    /// Adds the state of the queue to a bug report.
    pub(super) fn facts(&self, facts: &mut Facts) {
        facts.add("lost", self.closed);
        facts.add("control_frames", self.control.len() + self.together.len());
        facts.add("sendable_workers", self.line.len());
        facts.add_some(
            "dedup_bytes",
            self.cache_index.as_ref().map(CacheIndex::bytes),
        );
    }

    /// Sets the size of the agent's chunk cache in bytes.
    pub(super) fn set_chunk_cache(&mut self, max: usize) {
        self.cache_index = Some(CacheIndex::new(max));
    }

    /// Whether the agent has a chunk cache.
    pub(super) fn has_chunk_cache(&self) -> bool {
        self.cache_index.is_some()
    }

    /// The blobs of this agent.
    pub(super) fn blobs(&self) -> &HostBlobs {
        &self.blobs
    }

    /// Mutable access to the blobs of this agent.
    pub(super) fn blobs_mut(&mut self) -> &mut HostBlobs {
        &mut self.blobs
    }

    /// Whether the host is lost.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Closes the queue, because the host is lost. Returns the bytes of blobs that waited.
    pub(super) fn close(&mut self) -> usize {
        self.closed = true;
        self.together.clear();
        self.control.clear();
        self.line.clear();
        self.in_line.fill(false);
        self.blobs.clear()
    }

    /// Queues the last frame for an agent that is left out.
    pub(super) fn push_last(&mut self, last: Option<Frame>) {
        self.control.extend(last);
    }

    /// Reopens the queue for a reconnected host, whose agent has nothing.
    pub(super) fn reopen(&mut self) {
        self.closed = false;
        self.cache_index = self.cache_index.as_ref().map(CacheIndex::fresh);
    }

    /// Queues a control message.
    pub(super) fn push_control(&mut self, frame: Frame) {
        if !self.closed {
            self.control.push_back(frame);
        }
    }

    /// Adds a worker that has something to send to the queue.
    pub(super) fn line_up(&mut self, worker: &Worker) {
        let at = worker.index as usize;
        if self.may_send(worker) && !mem::replace(&mut self.in_line[at], true) {
            self.line.push_back(worker.index);
        }
    }

    /// Whether the next chunk of a worker may be sent now: the blob that its message begins with is
    /// sent before it.
    fn may_send(&self, worker: &Worker) -> bool {
        let blob = worker.sending().and_then(|task| task.blob);
        let waits = blob.is_some_and(|blob| self.blobs.is_in_flight(blob));
        !waits && worker.can_send()
    }

    /// The next frame that goes before all others, if there is one.
    pub(super) fn next_queued(&mut self) -> Option<Frame> {
        let queued = self.together.pop_front();
        queued.or_else(|| self.control.pop_front())
    }

    /// The next frame about blobs, if it is the turn of blobs, and the bytes that no longer wait in
    /// any case. `needed`: whether a message begins with a blob.
    pub(super) fn next_of_blobs(
        &mut self,
        needed: impl Fn(BlobId) -> bool,
    ) -> (Option<Frame>, usize) {
        let mut released = 0;
        while let Some((frame, bytes)) = self.blobs.forget(&needed) {
            released += bytes;
            if frame.is_some() {
                return (frame, released);
            }
        }
        let next = self.blobs.next(self.line.len(), self.cache_index.as_mut());
        let (frame, bytes) = next.unzip();
        (frame, released + bytes.unwrap_or(0))
    }

    /// The worker whose turn it is, by its index on the host.
    pub(super) fn next_in_line(&mut self) -> Option<u32> {
        let next = self.line.pop_front()?;
        self.in_line[next as usize] = false;
        Some(next)
    }

    /// Queues the next chunk of a worker's message, with the frames that belong to it. Returns the
    /// bytes that R counted as waiting, or nothing if the worker has nothing to send: its task may
    /// have been cancelled or lost since the worker was queued.
    pub(super) fn push_chunk(&mut self, worker: &mut Worker, now: Moment) -> Option<usize> {
        if !self.may_send(worker) {
            return None;
        }
        let mut before = None;
        let mut prefetch = false;
        let (task, phase, times) = match (&mut worker.current, &mut worker.next) {
            (Some(current), _) if matches!(current.phase, Phase::Sending { .. }) => {
                before = current.before.take();
                let times = Some(&mut current.times);
                (&mut current.task, &mut current.phase, times)
            }
            (_, Some(next)) => {
                prefetch = true;
                (&mut next.task, &mut next.phase, None)
            }
            _ => return None,
        };
        let Phase::Sending { first } = phase else {
            return None;
        };
        let chunks = &mut task.chunks;
        let blob = task.blob.take();
        let sent = match (&mut self.cache_index, blob) {
            (_, Some(blob)) => SentChunks {
                flags: BY_REFERENCE,
                body: Bytes::copy_from_slice(&blob.to_le_bytes()),
                len: size_of::<BlobId>(),
            },
            (Some(cache_index), None) => cache_index.send(chunks, worker.window - HEADER_LEN),
            (None, None) => {
                let body = chunks.pop_front().unwrap_or_default().bytes;
                let len = body.len();
                SentChunks {
                    flags: 0,
                    body,
                    len,
                }
            }
        };
        worker.window -= HEADER_LEN + sent.len;
        let counts = task.is_counted() && blob.is_none() && !prefetch;
        let released = if counts { sent.len } else { 0 };
        let begins = mem::replace(first, false);
        let mut flags = if begins { FIRST } else { 0 };
        if task.complete && task.chunks.is_empty() {
            flags |= LAST;
            *phase = Phase::Running;
            if let Some(times) = times {
                times.sent = Some(now);
            }
        }
        let (flags, id) = (flags | sent.flags, task.id);
        let index = worker.index;
        let frame = Frame::new(Kind::Data, flags, index, id, sent.body);
        worker.stats.bytes_in += frame.wire_len() as u64;
        if let Some(seed) = before {
            let frame = Frame::new(Kind::Seed, REASSIGNED, index, id, seed);
            self.together.push_back(frame);
        }
        if let Some(name) = task.setup_call.take() {
            let name = Bytes::copy_from_slice(&name.to_le_bytes());
            let frame = Frame::new(Kind::State, 0, index, id, name);
            self.together.push_back(frame);
        }
        if let Some(limit) = task.limit.filter(|_| begins) {
            self.together.push_back(Frame::limit(index, id, limit));
        }
        self.together.push_back(frame);
        if flags & LAST != 0 {
            let seed = worker.seed.clone();
            if let Some(seed) = seed.filter(|_| task.leaves_seed) {
                let frame = Frame::new(Kind::Seed, 0, index, 0, seed);
                self.together.push_back(frame);
            }
        }
        Some(released)
    }
}

/// Whether a frame is the last one of a blob, for which messages may have waited.
pub(super) fn ends_blob(frame: &Frame) -> bool {
    frame.header.flags & (LAST | ABORT) == LAST
}

#[cfg(test)]
mod tests {
    use super::super::task::{Current, Task};
    use super::*;
    use crate::protocol::control::{self, ToAgent};
    use crate::protocol::dedup::Chunk;
    use crate::protocol::ids::TaskId;
    use std::sync::Arc;
    use std::time::Duration;

    const NOW: Moment = Moment::ZERO;

    /// A worker whose task has a message of so many chunks.
    fn worker(index: u32, task: TaskId, chunks: usize) -> Worker {
        let chunks = vec![Chunk::from(Bytes::from_static(b"chunk")); chunks];
        let task = Task::restoring((task, 0, chunks), false);
        let mut worker = Worker::new(0, index);
        worker.current = Some(Current::new(task, None, NOW));
        worker
    }

    fn task_of(worker: &mut Worker) -> &mut Task {
        &mut worker.current.as_mut().unwrap().task
    }

    fn stop() -> Frame {
        control::encode(&ToAgent::Stop).unwrap()
    }

    /// Kinds, workers and flags of all that is sent, by these workers.
    fn sent(out: &mut Outbound, workers: &mut [Worker]) -> Vec<(Kind, u32, u8)> {
        let mut frames = Vec::new();
        loop {
            frames.extend(std::iter::from_fn(|| out.next_queued()));
            if let (Some(frame), _) = out.next_of_blobs(|_| true) {
                frames.push(frame);
            } else if let Some(at) = out.next_in_line() {
                let worker = &mut workers[at as usize];
                if out.push_chunk(worker, NOW).is_some() {
                    out.line_up(worker);
                }
            } else {
                break;
            }
        }
        let of = |frame: Frame| (frame.header.kind, frame.header.worker, frame.header.flags);
        frames.into_iter().map(of).collect()
    }

    #[test]
    fn workers_send_a_chunk_at_each_turn_and_queue_once() {
        let mut out = Outbound::new(2);
        let mut workers = [worker(0, 1, 2), worker(1, 2, 2)];
        for worker in &mut workers {
            task_of(worker).setup_call = None;
            out.line_up(worker);
            out.line_up(worker);
        }
        let turns = [(0, FIRST), (1, FIRST), (0, LAST), (1, LAST)];
        let turns = turns.map(|(worker, flags)| (Kind::Data, worker, flags));
        assert_eq!(sent(&mut out, &mut workers), turns);
    }

    #[test]
    fn control_messages_go_first_but_never_between_a_message_and_what_belongs_to_it() {
        let mut out = Outbound::new(1);
        let mut worker = worker(0, 1, 1);
        worker.seed = Some(Bytes::from_static(b"seed"));
        worker.current.as_mut().unwrap().before = Some(Bytes::new());
        task_of(&mut worker).limit = Some(Duration::from_secs(1));
        task_of(&mut worker).leaves_seed = true;
        assert_eq!(out.push_chunk(&mut worker, NOW), Some(5));
        out.push_control(stop());
        let kinds = sent(&mut out, &mut []).into_iter().map(|(kind, ..)| kind);
        let together = [
            Kind::Seed,
            Kind::State,
            Kind::Limit,
            Kind::Data,
            Kind::Seed,
            Kind::Control,
        ];
        assert_eq!(kinds.collect::<Vec<_>>(), together);
        // All of it has been sent.
        assert_eq!(out.push_chunk(&mut worker, NOW), None);
    }

    #[test]
    fn accompanying_frames_go_only_before_the_first_chunk() {
        let mut out = Outbound::new(1);
        let mut workers = [worker(0, 1, 2)];
        task_of(&mut workers[0]).limit = Some(Duration::from_secs(1));
        out.line_up(&workers[0]);
        let kinds = sent(&mut out, &mut workers)
            .into_iter()
            .map(|(kind, ..)| kind);
        let all = [Kind::State, Kind::Limit, Kind::Data, Kind::Data];
        assert_eq!(kinds.collect::<Vec<_>>(), all);
    }

    #[test]
    fn a_worker_whose_window_is_full_does_not_queue() {
        let mut out = Outbound::new(1);
        let mut worker = worker(0, 1, 1);
        worker.window = HEADER_LEN + 4;
        out.line_up(&worker);
        assert_eq!(out.next_in_line(), None);
        worker.window += 1;
        out.line_up(&worker);
        assert_eq!(out.next_in_line(), Some(0));
        assert_eq!(out.push_chunk(&mut worker, NOW), Some(5));
        assert_eq!(worker.window, 0);
    }

    #[test]
    fn a_message_waits_for_the_blob_that_it_begins_with() {
        let mut out = Outbound::new(1);
        let mut workers = [worker(0, 1, 1)];
        task_of(&mut workers[0]).blob = Some(7);
        assert!(out.blobs_mut().begin(7));
        out.line_up(&workers[0]);
        assert_eq!(out.next_in_line(), None);
        let chunk = Chunk::from(Bytes::from_static(b"content"));
        out.blobs_mut().append(7, &chunk, &Arc::new(7), true);
        let (frame, released) = out.next_of_blobs(|_| true);
        assert!(frame.as_ref().is_some_and(ends_blob));
        assert_eq!(released, 7);
        out.line_up(&workers[0]);
        let flags = sent(&mut out, &mut workers)
            .into_iter()
            .map(|(.., flags)| flags);
        assert_eq!(flags.collect::<Vec<_>>(), [0, FIRST | BY_REFERENCE, LAST]);
    }

    #[test]
    fn nothing_is_sent_to_a_lost_host_until_it_reconnects() {
        let mut out = Outbound::new(1);
        let mut workers = [worker(0, 1, 1)];
        out.line_up(&workers[0]);
        out.push_control(stop());
        assert!(out.blobs_mut().begin(7));
        let chunk = Chunk::from(Bytes::from_static(b"content"));
        out.blobs_mut().append(7, &chunk, &Arc::new(7), true);
        assert_eq!(out.close(), 7);
        out.push_control(stop());
        assert!(out.is_closed());
        assert_eq!(sent(&mut out, &mut workers), []);
        // Only the last frame for an agent that is left out is sent.
        out.push_last(Some(stop()));
        assert_eq!(sent(&mut out, &mut workers).len(), 1);
        out.reopen();
        out.line_up(&workers[0]);
        assert_eq!(sent(&mut out, &mut workers).len(), 2);
    }
}
