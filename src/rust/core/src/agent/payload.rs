//! The payloads that an agent holds: what many messages begin with crosses to a host once, and
//! reaches its workers through shared memory.
//!
//! Those that fit into a frame stay in the agent's memory and are sent to workers as they are; the
//! bytes of others are [`super`]'s to put into memory that can be shared. A worker holds the last
//! one that it was given, and is not given it again. A payload is held for as long as the head
//! wants it, and for as long as somebody here [keeps](Payloads::keep) it.
//!
//! Pure: no process, socket or memory but its own.

use super::relay::Act;
use crate::frame::{ABORT, FIRST, Frame, Kind, LAST, MAX_BODY, SHARED};
use crate::payloads::PayloadId;
use crate::scheduler::ProtocolError;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;

#[derive(Debug, Default)]
struct Payload {
    len: usize,
    /// All of its bytes, if they fit into a frame.
    small: BytesMut,
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
    /// What each worker's process was last given.
    given: Vec<Option<PayloadId>>,
}

impl Payloads {
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
        let given = &mut self.given[worker as usize];
        if given.replace(id) == Some(id) {
            return 0;
        }
        let whole = FIRST | LAST;
        let small = payload.len <= MAX_BODY;
        let frame = if small {
            let bytes = Bytes::copy_from_slice(&payload.small);
            Frame::new(Kind::Payload, whole, worker, id, bytes)
        } else {
            let len = Bytes::copy_from_slice(&(payload.len as u64).to_le_bytes());
            Frame::new(Kind::Payload, whole | SHARED, worker, id, len)
        };
        let sent = frame.wire_len();
        acts.push(match small {
            true => Act::ToWorker(frame),
            false => Act::Hand { frame },
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

    /// Has a worker let go of what it was given if no message of the head's will begin with it any
    /// more: it would take up memory for as long as the worker has it. Returns the bytes that go to
    /// the worker for it.
    pub fn take_back(&mut self, worker: u32, acts: &mut Vec<Act>) -> usize {
        let given = &mut self.given[worker as usize];
        let forgotten = |id: &PayloadId| self.payloads.get(id).is_none_or(|p| p.forgotten);
        let Some(id) = given.take_if(|id| forgotten(id)) else {
            return 0;
        };
        let frame = Frame::new(Kind::Payload, LAST | ABORT, worker, id, Bytes::new());
        let sent = frame.wire_len();
        acts.push(Act::ToWorker(frame));
        sent
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
