//! The payloads that an agent holds: what many messages begin with crosses to a host once, and
//! reaches its workers through shared memory.
//!
//! Those that fit into a frame stay in the agent's memory and are sent to workers as they are; the
//! bytes of others are [`super`]'s to put into memory that can be shared. A worker holds the last
//! one that it was given, and is not given it again. A payload is held for as long as the head
//! wants it, and for as long as somebody here [keeps](Payloads::keep) it.
//!
//! Pure: no process, socket or memory but its own.

use super::action::Act;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, FIRST, Frame, Kind, LAST, MAX_BODY, SHARED};
use crate::protocol::ids::PayloadId;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;

#[derive(Debug, Default)]
struct Payload {
    len: usize,
    /// All of its bytes that have come, if they fit into a frame.
    small: BytesMut,
    /// The same once they are complete.
    whole: Bytes,
    complete: bool,
    /// The head has told to forget it.
    forgotten: bool,
    /// So many here need it.
    users: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Payloads {
    payloads: HashMap<PayloadId, Payload>,
    given: Vec<Option<Given>>,
}

/// What a worker's process was last given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Given {
    id: PayloadId,
    /// It is in memory that is shared.
    shared: bool,
}

impl Payloads {
    /// Payloads that are held.
    pub fn count(&self) -> usize {
        self.payloads.len()
    }

    /// For a number of workers.
    pub fn new(workers: usize) -> Payloads {
        Payloads {
            payloads: HashMap::new(),
            given: vec![None; workers],
        }
    }

    /// A chunk has come from the head, or that a payload is to be forgotten.
    ///
    /// # Errors
    /// When the head would not send it.
    pub fn receive(&mut self, frame: Frame, acts: &mut Vec<Act>) -> Result<(), ProtocolError> {
        let (id, flags) = (frame.header.task, frame.header.flags);
        if flags & ABORT != 0 {
            return self.forget(id, acts);
        }
        if flags & FIRST != 0 && self.payloads.insert(id, Payload::default()).is_some() {
            return Err(ProtocolError(format!("payload {id} comes again")));
        }
        let payload = self.payloads.get_mut(&id).filter(|p| !p.complete);
        let Some(payload) = payload.filter(|_| flags & !(FIRST | LAST) == 0) else {
            return Err(ProtocolError(format!("a bad chunk of payload {id}")));
        };
        payload.complete = flags & LAST != 0;
        let was_small = payload.len <= MAX_BODY;
        payload.len = payload.len.saturating_add(frame.body.len());
        let last = payload.complete;
        if payload.len <= MAX_BODY {
            payload.small.extend_from_slice(&frame.body);
            if payload.complete {
                payload.whole = payload.small.split().freeze();
            }
            return Ok(());
        }
        let mut store = |bytes, last| {
            acts.push(Act::Store {
                payload: id,
                bytes,
                last,
            });
        };
        let before = std::mem::take(&mut payload.small);
        if was_small && !before.is_empty() {
            store(before.freeze(), false);
        }
        store(frame.body, last);
        Ok(())
    }

    /// The bytes of a payload that a message may begin with.
    ///
    /// # Errors
    /// When there is no such payload, or not all of it: the head would not name it.
    pub fn len(&self, id: PayloadId) -> Result<usize, ProtocolError> {
        let usable = |p: &&Payload| p.complete && !p.forgotten;
        let payload = self.payloads.get(&id).filter(usable);
        let unknown = || ProtocolError(format!("a message begins with unknown payload {id}"));
        payload.map(|payload| payload.len).ok_or_else(unknown)
    }

    /// The next message to this worker begins with this payload: it is given it unless it has it.
    /// Returns the bytes that go to the worker for it.
    pub fn give(&mut self, worker: u32, id: PayloadId, acts: &mut Vec<Act>) -> usize {
        let Some(payload) = self.payloads.get(&id) else {
            return 0;
        };
        let shared = payload.len > MAX_BODY;
        let given = Some(Given { id, shared });
        if std::mem::replace(&mut self.given[worker as usize], given) == given {
            return 0;
        }
        let whole = FIRST | LAST;
        let (flags, body) = if shared {
            let len = Bytes::copy_from_slice(&(payload.len as u64).to_le_bytes());
            (whole | SHARED, len)
        } else {
            (whole, payload.whole.clone())
        };
        let frame = Frame::new(Kind::Payload, flags, worker, id, body);
        let sent = frame.wire_len();
        acts.push(match shared {
            true => Act::Hand { frame },
            false => Act::ToWorker(frame),
        });
        sent
    }

    /// A process is being made in this place.
    pub fn made(&mut self, worker: u32) {
        self.given[worker as usize] = None;
    }

    /// A payload is needed here for some time, whatever the head says.
    pub fn keep(&mut self, id: PayloadId) {
        if let Some(payload) = self.payloads.get_mut(&id) {
            payload.users += 1;
        }
    }

    /// Ends what [`Payloads::keep`] has begun.
    pub fn release(&mut self, id: PayloadId, acts: &mut Vec<Act>) {
        if let Some(payload) = self.payloads.get_mut(&id) {
            payload.users = payload.users.saturating_sub(1);
            self.drop_unused(id, acts);
        }
    }

    fn forget(&mut self, id: PayloadId, acts: &mut Vec<Act>) -> Result<(), ProtocolError> {
        let payload = self.payloads.get_mut(&id).filter(|p| !p.forgotten);
        let Some(payload) = payload else {
            return Err(ProtocolError(format!("unknown payload {id} is forgotten")));
        };
        payload.forgotten = true;
        for worker in 0..self.given.len() as u32 {
            self.take_back(worker, acts);
        }
        self.drop_unused(id, acts);
        Ok(())
    }

    /// Has a worker let go of the shared memory that it was given if no message of the head's will
    /// begin with it any more: it would be taken up for as long as the worker has it.
    pub fn take_back(&mut self, worker: u32, acts: &mut Vec<Act>) {
        let payloads = &self.payloads;
        let forgotten = |given: &mut Given| {
            let payload = payloads.get(&given.id);
            given.shared && payload.is_none_or(|payload| payload.forgotten)
        };
        if let Some(given) = self.given[worker as usize].take_if(forgotten) {
            let flags = LAST | ABORT;
            let frame = Frame::new(Kind::Payload, flags, worker, given.id, Bytes::new());
            acts.push(Act::ToWorker(frame));
        }
    }

    fn drop_unused(&mut self, id: PayloadId, acts: &mut Vec<Act>) {
        let unused = |p: &Payload| p.forgotten && p.users == 0;
        if self.payloads.get(&id).is_some_and(unused) {
            if let Some(payload) = self.payloads.remove(&id) {
                if payload.len > MAX_BODY {
                    acts.push(Act::Discard(id));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(id: PayloadId, flags: u8, len: usize) -> Frame {
        Frame::new(Kind::Payload, flags, 0, id, vec![id as u8; len].into())
    }

    fn receive(payloads: &mut Payloads, frames: &[Frame]) -> Result<Vec<Act>, ProtocolError> {
        let mut acts = Vec::new();
        for frame in frames {
            payloads.receive(frame.clone(), &mut acts)?;
        }
        Ok(acts)
    }

    fn forget(id: PayloadId) -> Frame {
        chunk(id, LAST | ABORT, 0)
    }

    #[test]
    fn what_fits_into_a_frame_is_given_as_it_is_and_once() {
        let mut payloads = Payloads::new(2);
        let frames = [chunk(1, FIRST, MAX_BODY - 3), chunk(1, LAST, 3)];
        assert!(receive(&mut payloads, &frames).unwrap().is_empty());
        assert_eq!(payloads.len(1), Ok(MAX_BODY));
        for worker in 0..2 {
            let mut acts = Vec::new();
            assert!(payloads.give(worker, 1, &mut acts) > MAX_BODY);
            let [Act::ToWorker(frame)] = &acts[..] else {
                panic!("{acts:?}");
            };
            assert_eq!((frame.header.worker, frame.header.task), (worker, 1));
            assert_eq!(frame.body, vec![1; MAX_BODY]);
            assert_eq!(payloads.give(worker, 1, &mut acts), 0);
            assert_eq!(acts.len(), 1);
        }
        // A fresh process has none; and a worker has the last one only.
        payloads.made(0);
        assert!(payloads.give(0, 1, &mut Vec::new()) > 0);
        receive(&mut payloads, &[chunk(2, FIRST | LAST, 0)]).unwrap();
        assert!(payloads.give(0, 2, &mut Vec::new()) > 0);
        assert!(payloads.give(0, 1, &mut Vec::new()) > 0);
    }

    #[test]
    fn what_does_not_is_stored_and_handed_over() {
        let mut payloads = Payloads::new(1);
        let frames = [
            chunk(1, FIRST, MAX_BODY - 3),
            chunk(1, 0, 4),
            chunk(1, LAST, 5),
        ];
        let acts = receive(&mut payloads, &frames).unwrap();
        let stored = acts.iter().map(|act| match act {
            Act::Store {
                payload: 1,
                bytes,
                last,
            } => (bytes.len(), *last),
            act => panic!("{act:?}"),
        });
        let stored: Vec<_> = stored.collect();
        assert_eq!(stored, [(MAX_BODY - 3, false), (4, false), (5, true)]);
        let mut acts = Vec::new();
        payloads.give(0, 1, &mut acts);
        let [Act::Hand { frame }] = &acts[..] else {
            panic!("{acts:?}");
        };
        assert_eq!(frame.number(), Some(MAX_BODY as u64 + 6));
    }

    #[test]
    fn a_payload_that_is_forgotten_is_there_for_as_long_as_it_is_needed() {
        let mut payloads = Payloads::new(2);
        receive(&mut payloads, &[chunk(1, FIRST | LAST, MAX_BODY)]).unwrap();
        receive(
            &mut payloads,
            &[chunk(2, FIRST, MAX_BODY), chunk(2, LAST, 1)],
        )
        .unwrap();
        for id in [1, 2] {
            payloads.keep(id);
            payloads.give(0, id, &mut Vec::new());
        }
        // Who has it is told to let go of it.
        let acts = receive(&mut payloads, &[forget(2)]).unwrap();
        assert!(matches!(&acts[..], [Act::ToWorker(frame)] if *frame == forget(2)));
        assert!(payloads.len(2).is_err());
        let mut acts = Vec::new();
        assert!(payloads.give(1, 2, &mut acts) > 0);
        payloads.take_back(1, &mut acts);
        payloads.release(2, &mut acts);
        assert!(matches!(
            acts[..],
            [Act::Hand { .. }, Act::ToWorker(_), Act::Discard(2)]
        ));
        payloads.release(1, &mut acts);
        assert_eq!((payloads.len(1), acts.len()), (Ok(MAX_BODY), 3));
        assert!(receive(&mut payloads, &[forget(1)]).unwrap().is_empty());
        assert!(payloads.payloads.is_empty());
    }

    #[test]
    fn what_no_head_sends_is_an_error() {
        let whole = chunk(1, FIRST | LAST, 9);
        let cases: Vec<Vec<Frame>> = vec![
            vec![chunk(1, 0, 9)],
            vec![chunk(1, LAST, 9)],
            vec![forget(1)],
            vec![whole.clone(), whole.clone()],
            vec![whole.clone(), chunk(1, 0, 9)],
            vec![whole.clone(), forget(1), forget(1)],
            vec![chunk(1, FIRST, 9), forget(1), chunk(1, LAST, 9)],
            vec![chunk(1, FIRST | SHARED, 9)],
        ];
        for frames in cases {
            assert!(
                receive(&mut Payloads::new(1), &frames).is_err(),
                "{frames:?}"
            );
        }
        let mut payloads = Payloads::new(1);
        receive(&mut payloads, &[chunk(1, FIRST, 9)]).unwrap();
        assert!(payloads.len(1).is_err() && payloads.len(2).is_err());
    }

    proptest! {
        #[test]
        fn workers_have_what_they_are_to_have_and_nothing_is_left(
            steps in prop::collection::vec((0u8..6, 1u64..5, 0u32..3), 1..80),
        ) {
            let mut payloads = Payloads::new(3);
            // As the head, each worker and this side of the wire know it.
            let (mut known, mut kept) = ([false; 5], [0usize; 5]);
            let mut has = [None; 3];
            let mut stored = std::collections::HashSet::new();
            for (what, id, worker) in steps {
                let mut acts = Vec::new();
                let at = id as usize;
                match what {
                    // Once its number is free.
                    0 if !known[at] && kept[at] == 0 => {
                        let len = if id % 2 == 0 { 9 } else { MAX_BODY };
                        let frames = [chunk(id, FIRST, len), chunk(id, LAST, 9)];
                        acts = receive(&mut payloads, &frames).unwrap();
                        known[at] = true;
                    }
                    1 if known[at] => {
                        acts = receive(&mut payloads, &[forget(id)]).unwrap();
                        known[at] = false;
                    }
                    2 if known[at] => {
                        payloads.keep(id);
                        kept[at] += 1;
                    }
                    3 if kept[at] > 0 => {
                        payloads.release(id, &mut acts);
                        kept[at] -= 1;
                    }
                    4 => {
                        payloads.made(worker);
                        has[worker as usize] = None;
                    }
                    _ if known[at] || kept[at] > 0 => {
                        payloads.give(worker, id, &mut acts);
                        if !known[at] {
                            payloads.take_back(worker, &mut acts);
                        }
                    }
                    _ => {}
                }
                for act in acts {
                    match act {
                        Act::Store { payload, .. } => {
                            stored.insert(payload);
                        }
                        Act::Discard(payload) => prop_assert!(stored.remove(&payload)),
                        Act::ToWorker(frame) | Act::Hand { frame } => {
                            let Frame { header, .. } = frame;
                            let has = &mut has[header.worker as usize];
                            if header.flags & ABORT != 0 {
                                prop_assert_eq!(has.take(), Some(header.task));
                            } else {
                                *has = Some(header.task);
                                let shared = header.flags & SHARED != 0;
                                prop_assert_eq!(shared, header.task % 2 == 1);
                                prop_assert!(!shared || stored.contains(&header.task));
                            }
                        }
                        act => panic!("{act:?}"),
                    }
                }
                let given = payloads.given.iter().map(|given| given.map(|given| given.id));
                prop_assert_eq!(given.collect::<Vec<_>>(), has);
                // Small ones are let them.
                for id in has.into_iter().flatten() {
                    prop_assert!(id % 2 == 0 || known[id as usize]);
                }
                for id in 1..5 {
                    let there = known[id] || kept[id] > 0;
                    prop_assert_eq!(payloads.payloads.contains_key(&(id as u64)), there);
                    prop_assert_eq!(stored.contains(&(id as u64)), there && id % 2 == 1);
                }
            }
        }
    }
}
