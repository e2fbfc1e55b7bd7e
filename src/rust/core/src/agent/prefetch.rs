//! The prefetch queue: for each worker, the message of the task that it runs next, which waits
//! until the current task has ended.
//!
//! Pure, and independent of the workers' processes: prefetched messages are dropped with a worker
//! that fails, since the head sends them again.

use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, FIRST, Frame, Kind, LAST};
use crate::protocol::limits::SEND_WINDOW;
use std::collections::VecDeque;
use std::mem;

/// Maximum number of prefetched bytes of a worker: the head's send window, and what the agent
/// itself sends, for which the head may have granted credit.
const MAX_PREFETCHED: usize = 2 * SEND_WINDOW;

/// The prefetched task of one worker.
#[derive(Debug, Default)]
struct Prefetched {
    /// The frames of the task.
    frames: VecDeque<Frame>,
    /// All bytes, and those that count for the head's send window.
    bytes: usize,
    counted: usize,
    /// Whether some of the message has arrived, and whether all of it has.
    started: bool,
    whole: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct PrefetchQueue {
    workers: Vec<Prefetched>,
}

impl PrefetchQueue {
    /// The queue of this many workers.
    pub fn new(workers: usize) -> PrefetchQueue {
        PrefetchQueue {
            workers: (0..workers).map(|_| Prefetched::default()).collect(),
        }
    }

    /// Adds a frame of a task that must not start yet. Returns the number of bytes whose credit
    /// goes back to the head, if the message was aborted.
    ///
    /// # Errors
    /// When the frame breaks the protocol. This is checked here because a queued frame may be
    /// passed to a worker at any time.
    pub fn hold(&mut self, frame: Frame) -> Result<Option<usize>, ProtocolError> {
        let header = frame.header;
        let Some(entry) = self.workers.get_mut(header.worker as usize) else {
            return Err(ProtocolError("a frame of an unknown worker".into()));
        };
        let same = |first: &Frame| first.header.task == header.task;
        if !entry.frames.front().is_none_or(same) {
            return Err(ProtocolError("more than one task ahead".into()));
        }
        let len = frame.wire_len();
        if header.kind == Kind::Data {
            let first = header.flags & FIRST != 0;
            if first == entry.started || entry.whole {
                return Err(ProtocolError("a part of no task ahead".into()));
            }
            if header.flags & ABORT != 0 {
                let counted = entry.counted + len;
                *entry = Prefetched::default();
                return Ok(Some(counted));
            }
            entry.started = true;
            entry.whole = header.flags & LAST != 0;
            entry.counted += len;
        } else if entry.started {
            // These frames come before the message.
            return Err(ProtocolError("a frame within a task ahead".into()));
        }
        entry.bytes += len;
        if entry.bytes > MAX_PREFETCHED {
            return Err(ProtocolError("more ahead than there is room for".into()));
        }
        entry.frames.push_back(frame);
        Ok(None)
    }

    /// Drops a task that has arrived completely. Returns the number of bytes whose credit goes back
    /// to the head, if the task was there.
    pub fn withdraw(&mut self, worker: u32, task: u64) -> Option<usize> {
        let entry = self.workers.get_mut(worker as usize)?;
        let front = entry.frames.front()?;
        if front.header.task != task || !entry.whole {
            return None;
        }
        Some(mem::take(entry).counted)
    }

    /// Takes the frames of a worker that has ended its task: they go on to it.
    pub fn take(&mut self, worker: u32) -> VecDeque<Frame> {
        let entry = self.workers.get_mut(worker as usize);
        entry.map(mem::take).unwrap_or_default().frames
    }

    /// Prefetched bytes of a worker.
    pub fn bytes(&self, worker: u32) -> usize {
        let entry = self.workers.get(worker as usize);
        entry.map_or(0, |entry| entry.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::{HEADER_LEN, MAX_BODY, REASSIGNED};
    use bytes::Bytes;

    fn data(task: u64, flags: u8, len: usize) -> Frame {
        Frame::new(Kind::Data, flags, 0, task, vec![0; len].into())
    }

    #[test]
    fn one_message_is_queued_and_passed_on_completely() {
        let mut queue = PrefetchQueue::new(2);
        let seed = Frame::new(Kind::Seed, REASSIGNED, 0, 2, Bytes::new());
        let frames = [seed, data(2, FIRST, 7), data(2, LAST, 9)];
        for frame in &frames {
            assert_eq!(queue.hold(frame.clone()), Ok(None));
        }
        assert_eq!(queue.withdraw(0, 3), None);
        assert_eq!(queue.withdraw(1, 2), None);
        assert_eq!(queue.take(0), frames);
        assert!(queue.take(0).is_empty() && queue.bytes(0) == 0);
    }

    #[test]
    fn a_dropped_message_returns_its_credit() {
        let mut queue = PrefetchQueue::new(1);
        assert_eq!(queue.hold(data(2, FIRST, 7)), Ok(None));
        // The end of the message decides, because an abort may follow.
        assert_eq!(queue.withdraw(0, 2), None);
        let abort = data(2, LAST | ABORT, 0);
        assert_eq!(queue.hold(abort), Ok(Some(2 * HEADER_LEN + 7)));
        assert_eq!(queue.hold(data(3, FIRST | LAST, 7)), Ok(None));
        assert_eq!(queue.withdraw(0, 3), Some(HEADER_LEN + 7));
        assert_eq!(queue.withdraw(0, 3), None);
    }

    #[test]
    fn invalid_prefetched_frames_are_errors() {
        let mut queue = PrefetchQueue::new(1);
        assert!(queue.hold(data(2, 0, 7)).is_err());
        assert!(queue.hold(data(2, LAST | ABORT, 0)).is_err());
        assert_eq!(queue.hold(data(2, FIRST, 7)), Ok(None));
        assert!(queue.hold(data(2, FIRST, 7)).is_err());
        assert!(queue.hold(data(3, FIRST, 7)).is_err());
        let seed = Frame::new(Kind::Seed, 0, 0, 2, Bytes::new());
        assert!(queue.hold(seed).is_err());
        assert_eq!(queue.hold(data(2, LAST, 7)), Ok(None));
        assert!(queue.hold(data(2, 0, 7)).is_err());
        assert!(queue.hold(data(2, LAST | ABORT, 0)).is_err());
    }

    #[test]
    fn a_head_that_heeds_no_window_is_found_out() {
        let mut queue = PrefetchQueue::new(1);
        let mut flags = FIRST;
        for _ in 0..MAX_PREFETCHED / (HEADER_LEN + MAX_BODY) {
            assert_eq!(queue.hold(data(2, flags, MAX_BODY)), Ok(None));
            flags = 0;
        }
        assert!(queue.hold(data(2, 0, MAX_BODY)).is_err());
        let seeds = |_| Frame::new(Kind::Seed, 0, 0, 2, vec![0; MAX_BODY].into());
        let mut queue = PrefetchQueue::new(1);
        assert!((0..40).map(seeds).any(|seed| queue.hold(seed).is_err()));
    }
}
