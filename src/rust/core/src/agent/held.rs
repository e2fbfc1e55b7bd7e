//! What the head has sent ahead: the message of the task that a worker is to have next, held until it
//! has ended the one before.
//!
//! Pure, and kept apart from the rest: a worker that is lost takes nothing of it along, since the head
//! sends it again.

use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, FIRST, Frame, Kind, LAST};
use crate::protocol::limits::SEND_WINDOW;
use std::collections::VecDeque;
use std::mem;

/// Bytes that may be held for a worker: the head's window, and what the agent itself sends, which it
/// may have taken for room.
const MOST: usize = 2 * SEND_WINDOW;

/// What is held for one worker.
#[derive(Debug, Default)]
struct Ahead {
    /// Of one task.
    frames: VecDeque<Frame>,
    /// All bytes, and those that the head's window is made less by.
    bytes: usize,
    counted: usize,
    /// Some of the message is there, and all of it.
    begun: bool,
    whole: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Held {
    workers: Vec<Ahead>,
}

impl Held {
    /// For a number of workers.
    pub fn new(workers: usize) -> Held {
        Held {
            workers: (0..workers).map(|_| Ahead::default()).collect(),
        }
    }

    /// Takes in a frame of a task that is not to start yet. Returns the bytes to give back to the head
    /// if the message will not come after all.
    ///
    /// # Errors
    /// When the head would not send it. What is held could be passed on to a worker at any time.
    pub fn hold(&mut self, frame: Frame) -> Result<Option<usize>, ProtocolError> {
        let header = frame.header;
        let Some(ahead) = self.workers.get_mut(header.worker as usize) else {
            return Err(ProtocolError("a frame of an unknown worker".into()));
        };
        let same = |first: &Frame| first.header.task == header.task;
        if !ahead.frames.front().is_none_or(same) {
            return Err(ProtocolError("more than one task ahead".into()));
        }
        let len = frame.wire_len();
        if header.kind == Kind::Data {
            let first = header.flags & FIRST != 0;
            if first == ahead.begun || ahead.whole {
                return Err(ProtocolError("a part of no task ahead".into()));
            }
            if header.flags & ABORT != 0 {
                let counted = ahead.counted + len;
                *ahead = Ahead::default();
                return Ok(Some(counted));
            }
            ahead.begun = true;
            ahead.whole = header.flags & LAST != 0;
            ahead.counted += len;
        } else if ahead.begun {
            // These come before the message.
            return Err(ProtocolError("a frame within a task ahead".into()));
        }
        ahead.bytes += len;
        if ahead.bytes > MOST {
            return Err(ProtocolError("more ahead than there is room for".into()));
        }
        ahead.frames.push_back(frame);
        Ok(None)
    }

    /// Drops a task that has wholly come. Returns the bytes to give back to the head, if it is there.
    pub fn withdraw(&mut self, worker: u32, task: u64) -> Option<usize> {
        let ahead = self.workers.get_mut(worker as usize)?;
        let held = ahead.frames.front()?;
        if held.header.task != task || !ahead.whole {
            return None;
        }
        Some(mem::take(ahead).counted)
    }

    /// The worker has ended its task: this is to go on to it.
    pub fn take(&mut self, worker: u32) -> VecDeque<Frame> {
        let ahead = self.workers.get_mut(worker as usize);
        ahead.map(mem::take).unwrap_or_default().frames
    }

    /// Bytes held for a worker.
    pub fn bytes(&self, worker: u32) -> usize {
        let ahead = self.workers.get(worker as usize);
        ahead.map_or(0, |ahead| ahead.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::{GUEST, HEADER_LEN, MAX_BODY};
    use bytes::Bytes;

    fn data(task: u64, flags: u8, len: usize) -> Frame {
        Frame::new(Kind::Data, flags, 0, task, vec![0; len].into())
    }

    #[test]
    fn one_message_is_held_and_goes_on_whole() {
        let mut held = Held::new(2);
        let seed = Frame::new(Kind::Seed, GUEST, 0, 2, Bytes::new());
        let frames = [seed, data(2, FIRST, 7), data(2, LAST, 9)];
        for frame in &frames {
            assert_eq!(held.hold(frame.clone()), Ok(None));
        }
        assert_eq!(held.withdraw(0, 3), None);
        assert_eq!(held.withdraw(1, 2), None);
        assert_eq!(held.take(0), frames);
        assert!(held.take(0).is_empty() && held.bytes(0) == 0);
    }

    #[test]
    fn what_is_dropped_gives_its_room_back() {
        let mut held = Held::new(1);
        assert_eq!(held.hold(data(2, FIRST, 7)), Ok(None));
        // Its end decides: there is an abort on its way.
        assert_eq!(held.withdraw(0, 2), None);
        let abort = data(2, LAST | ABORT, 0);
        assert_eq!(held.hold(abort), Ok(Some(2 * HEADER_LEN + 7)));
        assert_eq!(held.hold(data(3, FIRST | LAST, 7)), Ok(None));
        assert_eq!(held.withdraw(0, 3), Some(HEADER_LEN + 7));
        assert_eq!(held.withdraw(0, 3), None);
    }

    #[test]
    fn what_no_head_sends_ahead_is_refused() {
        let mut held = Held::new(1);
        assert!(held.hold(data(2, 0, 7)).is_err());
        assert!(held.hold(data(2, LAST | ABORT, 0)).is_err());
        assert_eq!(held.hold(data(2, FIRST, 7)), Ok(None));
        assert!(held.hold(data(2, FIRST, 7)).is_err());
        assert!(held.hold(data(3, FIRST, 7)).is_err());
        let seed = Frame::new(Kind::Seed, 0, 0, 2, Bytes::new());
        assert!(held.hold(seed).is_err());
        assert_eq!(held.hold(data(2, LAST, 7)), Ok(None));
        assert!(held.hold(data(2, 0, 7)).is_err());
        assert!(held.hold(data(2, LAST | ABORT, 0)).is_err());
    }

    #[test]
    fn a_head_that_heeds_no_window_is_found_out() {
        let mut held = Held::new(1);
        let mut flags = FIRST;
        for _ in 0..MOST / (HEADER_LEN + MAX_BODY) {
            assert_eq!(held.hold(data(2, flags, MAX_BODY)), Ok(None));
            flags = 0;
        }
        assert!(held.hold(data(2, 0, MAX_BODY)).is_err());
        let seeds = |_| Frame::new(Kind::Seed, 0, 0, 2, vec![0; MAX_BODY].into());
        let mut held = Held::new(1);
        assert!((0..40).map(seeds).any(|seed| held.hold(seed).is_err()));
    }
}
