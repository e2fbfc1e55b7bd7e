//! What is sent next over the stream to an agent.
//!
//! Control messages go first, then blobs (payloads) in turn with the messages of workers. Workers with something
//! to send stand in a line, each once, and send one chunk at each turn: bytes of one worker never hold up
//! another's by more than a chunk.
//!
//! A pure state machine, as the scheduler is that holds one for each agent.

use super::task::Phase;
use super::worker::Worker;
use crate::head::activity::Moment;
use crate::head::blobs::Payloads;
use crate::protocol::control::Facts;
use crate::protocol::dedup::{Mirror, Sent};
use crate::protocol::frame::{ABORT, FIRST, Frame, GUEST, HEADER_LEN, Kind, LAST, SHARED};
use crate::protocol::ids::PayloadId;
use bytes::Bytes;
use std::collections::VecDeque;
use std::mem;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Outbound {
    /// Frames that belong together with the one that was given out last.
    together: VecDeque<Frame>,
    /// Go first.
    control: VecDeque<Frame>,
    /// Workers with a chunk to send, by their index on the host.
    line: VecDeque<u32>,
    /// Whether each worker stands in the line.
    in_line: Vec<bool>,
    /// What the agent keeps, if it keeps chunks.
    mirror: Option<Mirror>,
    /// What it has of payloads, or is to be sent.
    payloads: Payloads,
    /// There is no stream, as the host is lost.
    closed: bool,
}

impl Outbound {
    /// To an agent with so many workers.
    pub(super) fn new(workers: usize) -> Outbound {
        Outbound {
            together: VecDeque::new(),
            control: VecDeque::new(),
            line: VecDeque::new(),
            in_line: vec![false; workers],
            mirror: None,
            payloads: Payloads::default(),
            closed: false,
        }
    }

    /// What is known of it, for a bug report.
    pub(super) fn facts(&self, facts: &mut Facts) {
        facts.add("lost", self.closed);
        facts.add("control_frames", self.control.len() + self.together.len());
        facts.add("sendable_workers", self.line.len());
        facts.add_some("dedup_bytes", self.mirror.as_ref().map(Mirror::bytes));
    }

    /// The agent keeps up to so many bytes of chunks.
    pub(super) fn keep_chunks(&mut self, most: usize) {
        self.mirror = Some(Mirror::new(most));
    }

    /// Whether the agent keeps chunks.
    pub(super) fn keeps_chunks(&self) -> bool {
        self.mirror.is_some()
    }

    /// What is known of the payloads of this agent.
    pub(super) fn payloads(&self) -> &Payloads {
        &self.payloads
    }

    /// The same, to be changed.
    pub(super) fn payloads_mut(&mut self) -> &mut Payloads {
        &mut self.payloads
    }

    /// Whether the host is lost.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// The host is lost: nothing is sent any more. Returns the bytes of payloads that waited.
    pub(super) fn close(&mut self) -> usize {
        self.closed = true;
        self.together.clear();
        self.control.clear();
        self.line.clear();
        self.in_line.fill(false);
        self.payloads.clear()
    }

    /// Queues a frame for an agent that is left out, after all: it is the last.
    pub(super) fn push_last(&mut self, last: Option<Frame>) {
        self.control.extend(last);
    }

    /// The host is back with a fresh agent, which has nothing.
    pub(super) fn reopen(&mut self) {
        self.closed = false;
        self.mirror = self.mirror.as_ref().map(Mirror::fresh);
    }

    /// Queues a control message.
    pub(super) fn push_control(&mut self, frame: Frame) {
        if !self.closed {
            self.control.push_back(frame);
        }
    }

    /// Lets a worker that has something to send stand in the line.
    pub(super) fn line_up(&mut self, worker: &Worker) {
        let at = worker.index as usize;
        if self.may_send(worker) && !mem::replace(&mut self.in_line[at], true) {
            self.line.push_back(worker.index);
        }
    }

    /// Whether the next chunk of a worker may be sent now. Its message may begin with a payload that has to be
    /// sent before.
    fn may_send(&self, worker: &Worker) -> bool {
        let payload = worker.sending().and_then(|task| task.payload);
        let waits = payload.is_some_and(|payload| self.payloads.is_on_its_way(payload));
        !waits && worker.can_send()
    }

    /// A frame that goes before all others, if there is one.
    pub(super) fn next_queued(&mut self) -> Option<Frame> {
        let queued = self.together.pop_front();
        queued.or_else(|| self.control.pop_front())
    }

    /// What is next to be told or sent of payloads, if it is the turn of that; with the bytes that do not wait any
    /// more in any case. `needed`: whether a message begins with a payload.
    pub(super) fn next_of_payloads(
        &mut self,
        needed: impl Fn(PayloadId) -> bool,
    ) -> (Option<Frame>, usize) {
        let mut released = 0;
        while let Some((told, bytes)) = self.payloads.forget(&needed) {
            released += bytes;
            if told.is_some() {
                return (told, released);
            }
        }
        let next = self.payloads.next(self.line.len(), self.mirror.as_mut());
        let (frame, bytes) = next.unzip();
        (frame, released + bytes.unwrap_or(0))
    }

    /// The worker whose turn it is, by its index on the host.
    pub(super) fn next_in_line(&mut self) -> Option<u32> {
        let next = self.line.pop_front()?;
        self.in_line[next as usize] = false;
        Some(next)
    }

    /// Queues the next chunk of a worker's message, with what belongs to it. Returns the bytes of it that R counted
    /// as waiting; nothing if the worker has nothing to send: its task may have been cancelled or lost since it
    /// was put in the line.
    pub(super) fn push_chunk(&mut self, worker: &mut Worker, now: Moment) -> Option<usize> {
        if !self.may_send(worker) {
            return None;
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
            _ => return None,
        };
        let Phase::Sending { first } = phase else {
            return None;
        };
        let chunks = &mut task.chunks;
        let payload = task.payload.take();
        let sent = match (&mut self.mirror, payload) {
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
        let counts = task.is_counted() && payload.is_none() && !ahead;
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
        worker.track.bytes_in += frame.wire_len() as u64;
        if let Some(seed) = before {
            let frame = Frame::new(Kind::Seed, GUEST, index, id, seed);
            self.together.push_back(frame);
        }
        if let Some(name) = task.lasts.take() {
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

/// Whether a frame is the last of a payload's, for which messages may have waited.
pub(super) fn ends_payload(frame: &Frame) -> bool {
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
            if let (Some(frame), _) = out.next_of_payloads(|_| true) {
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
    fn workers_send_a_chunk_at_each_turn_and_stand_in_line_once() {
        let mut out = Outbound::new(2);
        let mut workers = [worker(0, 1, 2), worker(1, 2, 2)];
        for worker in &mut workers {
            task_of(worker).lasts = None;
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
    fn what_belongs_to_a_message_goes_before_its_first_chunk_alone() {
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
    fn a_worker_whose_window_is_full_does_not_stand_in_line() {
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
    fn a_message_waits_for_the_payload_that_it_begins_with() {
        let mut out = Outbound::new(1);
        let mut workers = [worker(0, 1, 1)];
        task_of(&mut workers[0]).payload = Some(7);
        assert!(out.payloads_mut().begin(7));
        out.line_up(&workers[0]);
        assert_eq!(out.next_in_line(), None);
        let chunk = Chunk::from(Bytes::from_static(b"payload"));
        out.payloads_mut().append(7, &chunk, &Arc::new(7), true);
        let (frame, released) = out.next_of_payloads(|_| true);
        assert!(frame.as_ref().is_some_and(ends_payload));
        assert_eq!(released, 7);
        out.line_up(&workers[0]);
        let flags = sent(&mut out, &mut workers)
            .into_iter()
            .map(|(.., flags)| flags);
        assert_eq!(flags.collect::<Vec<_>>(), [0, FIRST | SHARED, LAST]);
    }

    #[test]
    fn nothing_is_sent_to_a_host_that_is_lost_until_it_is_back() {
        let mut out = Outbound::new(1);
        let mut workers = [worker(0, 1, 1)];
        out.line_up(&workers[0]);
        out.push_control(stop());
        assert!(out.payloads_mut().begin(7));
        let chunk = Chunk::from(Bytes::from_static(b"payload"));
        out.payloads_mut().append(7, &chunk, &Arc::new(7), true);
        assert_eq!(out.close(), 7);
        out.push_control(stop());
        assert!(out.is_closed());
        assert_eq!(sent(&mut out, &mut workers), []);
        // But for what ends one that is left out.
        out.push_last(Some(stop()));
        assert_eq!(sent(&mut out, &mut workers).len(), 1);
        out.reopen();
        out.line_up(&workers[0]);
        assert_eq!(sent(&mut out, &mut workers).len(), 2);
    }
}
