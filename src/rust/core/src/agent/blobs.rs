//! The blobs of an agent. The head sends a blob once to each host; the host's workers get it
//! through shared memory.
//!
//! Blobs that fit into a frame stay in the agent's memory and are sent to workers as they are. The
//! bytes of larger blobs go to [`super`], which puts them into shared memory. A worker keeps the
//! last blob that it was given, and is not given that one again. A blob is stored as long as the
//! head wants it, and as long as it is [retained](BlobStore::retain) here.
//!
//! Pure: this module uses no process, socket or shared memory.

use super::action::Act;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, BY_REFERENCE, FIRST, Frame, Kind, LAST, MAX_BODY};
use crate::protocol::ids::BlobId;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::fmt;
use xxhash_rust::xxh3::Xxh3;

/// The hash of the bytes of a blob so far.
#[derive(Default)]
struct Hasher(Box<Xxh3>);

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0.digest128())
    }
}

#[derive(Debug, Default)]
struct StoredBlob {
    len: usize,
    /// The bytes that have arrived, if the blob fits into a frame.
    small: BytesMut,
    /// All bytes, once the blob is complete, if it fits into a frame.
    whole: Bytes,
    complete: bool,
    hasher: Hasher,
    /// The head does not need the blob any more.
    forgotten: bool,
    /// Number of users here: see [`BlobStore::retain`].
    users: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct BlobStore {
    blobs: HashMap<BlobId, StoredBlob>,
    given: Vec<Option<Given>>,
}

/// The blob that a worker's process was last given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Given {
    id: BlobId,
    /// The blob is in shared memory.
    shared: bool,
}

impl BlobStore {
    /// Number of stored blobs.
    pub fn count(&self) -> usize {
        self.blobs.len()
    }

    /// The store of a host with this many workers.
    pub fn new(workers: usize) -> BlobStore {
        BlobStore {
            blobs: HashMap::new(),
            given: vec![None; workers],
        }
    }

    /// Processes a chunk of a blob, or the request to forget one.
    ///
    /// # Errors
    /// When the head would not send it.
    pub fn receive(&mut self, frame: Frame, acts: &mut Vec<Act>) -> Result<(), ProtocolError> {
        let (id, flags) = (frame.header.task, frame.header.flags);
        if flags & ABORT != 0 {
            return self.forget(id, acts);
        }
        if flags & FIRST != 0 && self.blobs.insert(id, StoredBlob::default()).is_some() {
            return Err(ProtocolError(format!("blob {id} is sent twice")));
        }
        let blob = self.blobs.get_mut(&id).filter(|p| !p.complete);
        let Some(blob) = blob.filter(|_| flags & !(FIRST | LAST) == 0) else {
            return Err(ProtocolError(format!("unexpected chunk of blob {id}")));
        };
        blob.complete = flags & LAST != 0;
        blob.hasher.0.update(&frame.body);
        let was_small = blob.len <= MAX_BODY;
        blob.len = blob.len.saturating_add(frame.body.len());
        let last = blob.complete;
        if blob.len <= MAX_BODY {
            blob.small.extend_from_slice(&frame.body);
            if blob.complete {
                blob.whole = blob.small.split().freeze();
            }
            return Ok(());
        }
        let mut store = |bytes, last| {
            acts.push(Act::Store {
                blob: id,
                bytes,
                last,
            });
        };
        let before = std::mem::take(&mut blob.small);
        if was_small && !before.is_empty() {
            store(before.freeze(), false);
        }
        store(frame.body, last);
        Ok(())
    }

    /// The length of a blob that a message may begin with.
    ///
    /// # Errors
    /// When the blob does not exist or is incomplete: the head would not refer to it.
    pub fn len(&self, id: BlobId) -> Result<usize, ProtocolError> {
        let usable = |p: &&StoredBlob| p.complete && !p.forgotten;
        let blob = self.blobs.get(&id).filter(usable);
        let unknown = || ProtocolError(format!("a message refers to unknown blob {id}"));
        blob.map(|blob| blob.len).ok_or_else(unknown)
    }

    /// Gives a worker the blob that its next message begins with, unless the worker has it. Returns
    /// the number of bytes that are sent to the worker for it.
    pub fn give(&mut self, worker: u32, id: BlobId, acts: &mut Vec<Act>) -> usize {
        let Some(blob) = self.blobs.get(&id) else {
            return 0;
        };
        let shared = blob.len > MAX_BODY;
        let given = Some(Given { id, shared });
        if std::mem::replace(&mut self.given[worker as usize], given) == given {
            return 0;
        }
        let whole = FIRST | LAST;
        let (flags, body) = if shared {
            let len = Bytes::copy_from_slice(&(blob.len as u64).to_le_bytes());
            (whole | BY_REFERENCE, len)
        } else {
            (whole, blob.whole.clone())
        };
        let frame = Frame::new(Kind::Blob, flags, worker, id, body);
        let sent = frame.wire_len();
        acts.push(match shared {
            true => Act::Hand { frame },
            false => Act::ToWorker(frame),
        });
        sent
    }

    /// A new process is being started for this worker: it has no blob.
    pub fn made(&mut self, worker: u32) {
        self.given[worker as usize] = None;
    }

    /// Retains a blob until [`BlobStore::release`], even if the head forgets it.
    pub fn retain(&mut self, id: BlobId) {
        if let Some(blob) = self.blobs.get_mut(&id) {
            blob.users += 1;
        }
    }

    /// Releases a blob that was retained.
    pub fn release(&mut self, id: BlobId, acts: &mut Vec<Act>) {
        if let Some(blob) = self.blobs.get_mut(&id) {
            blob.users = blob.users.saturating_sub(1);
            self.drop_unused(id, acts);
        }
    }

    /// The head has disconnected: it forgets all of its blobs. The numbers of another head's blobs differ from those
    /// that are [retained](BlobStore::retain).
    pub fn detach(&mut self, acts: &mut Vec<Act>) {
        for blob in self.blobs.values_mut() {
            blob.forgotten = true;
        }
        for worker in 0..self.given.len() as u32 {
            self.take_back(worker, acts);
        }
        let ids: Vec<BlobId> = self.blobs.keys().copied().collect();
        for id in ids {
            self.drop_unused(id, acts);
        }
    }

    /// The state of a hash of a message after the blob with which the message begins.
    pub fn hasher(&self, id: BlobId) -> Option<Xxh3> {
        Some((*self.blobs.get(&id)?.hasher.0).clone())
    }

    /// The bytes of a complete blob that fits into a frame.
    pub fn small(&self, id: BlobId) -> Option<Bytes> {
        let blob = self.blobs.get(&id);
        let blob = blob.filter(|blob| blob.complete && blob.len <= MAX_BODY);
        blob.map(|blob| blob.whole.clone())
    }

    fn forget(&mut self, id: BlobId, acts: &mut Vec<Act>) -> Result<(), ProtocolError> {
        let blob = self.blobs.get_mut(&id).filter(|p| !p.forgotten);
        let Some(blob) = blob else {
            return Err(ProtocolError(format!(
                "request to forget unknown blob {id}"
            )));
        };
        blob.forgotten = true;
        for worker in 0..self.given.len() as u32 {
            self.take_back(worker, acts);
        }
        self.drop_unused(id, acts);
        Ok(())
    }

    /// Makes a worker unmap its blob if no message of the head will begin with it any more: the
    /// memory would stay allocated as long as the worker has it.
    pub fn take_back(&mut self, worker: u32, acts: &mut Vec<Act>) {
        let blobs = &self.blobs;
        let forgotten = |given: &mut Given| {
            let blob = blobs.get(&given.id);
            given.shared && blob.is_none_or(|blob| blob.forgotten)
        };
        if let Some(given) = self.given[worker as usize].take_if(forgotten) {
            let flags = LAST | ABORT;
            let frame = Frame::new(Kind::Blob, flags, worker, given.id, Bytes::new());
            acts.push(Act::ToWorker(frame));
        }
    }

    fn drop_unused(&mut self, id: BlobId, acts: &mut Vec<Act>) {
        let unused = |p: &StoredBlob| p.forgotten && p.users == 0;
        if self.blobs.get(&id).is_some_and(unused) {
            if let Some(blob) = self.blobs.remove(&id) {
                if blob.len > MAX_BODY {
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

    fn chunk(id: BlobId, flags: u8, len: usize) -> Frame {
        Frame::new(Kind::Blob, flags, 0, id, vec![id as u8; len].into())
    }

    fn receive(blobs: &mut BlobStore, frames: &[Frame]) -> Result<Vec<Act>, ProtocolError> {
        let mut acts = Vec::new();
        for frame in frames {
            blobs.receive(frame.clone(), &mut acts)?;
        }
        Ok(acts)
    }

    fn forget(id: BlobId) -> Frame {
        chunk(id, LAST | ABORT, 0)
    }

    #[test]
    fn a_small_blob_is_sent_to_each_worker_once() {
        let mut blobs = BlobStore::new(2);
        let frames = [chunk(1, FIRST, MAX_BODY - 3), chunk(1, LAST, 3)];
        assert!(receive(&mut blobs, &frames).unwrap().is_empty());
        assert_eq!(blobs.len(1), Ok(MAX_BODY));
        for worker in 0..2 {
            let mut acts = Vec::new();
            assert!(blobs.give(worker, 1, &mut acts) > MAX_BODY);
            let [Act::ToWorker(frame)] = &acts[..] else {
                panic!("{acts:?}");
            };
            assert_eq!((frame.header.worker, frame.header.task), (worker, 1));
            assert_eq!(frame.body, vec![1; MAX_BODY]);
            assert_eq!(blobs.give(worker, 1, &mut acts), 0);
            assert_eq!(acts.len(), 1);
        }
        // A new process has no blob, and a worker has only the last one.
        blobs.made(0);
        assert!(blobs.give(0, 1, &mut Vec::new()) > 0);
        receive(&mut blobs, &[chunk(2, FIRST | LAST, 0)]).unwrap();
        assert!(blobs.give(0, 2, &mut Vec::new()) > 0);
        assert!(blobs.give(0, 1, &mut Vec::new()) > 0);
    }

    #[test]
    fn a_large_blob_is_stored_and_shared() {
        let mut blobs = BlobStore::new(1);
        let frames = [
            chunk(1, FIRST, MAX_BODY - 3),
            chunk(1, 0, 4),
            chunk(1, LAST, 5),
        ];
        let acts = receive(&mut blobs, &frames).unwrap();
        let stored = acts.iter().map(|act| match act {
            Act::Store {
                blob: 1,
                bytes,
                last,
            } => (bytes.len(), *last),
            act => panic!("{act:?}"),
        });
        let stored: Vec<_> = stored.collect();
        assert_eq!(stored, [(MAX_BODY - 3, false), (4, false), (5, true)]);
        let mut acts = Vec::new();
        blobs.give(0, 1, &mut acts);
        let [Act::Hand { frame }] = &acts[..] else {
            panic!("{acts:?}");
        };
        assert_eq!(frame.number(), Some(MAX_BODY as u64 + 6));
    }

    #[test]
    fn a_blob_that_is_forgotten_is_there_for_as_long_as_it_is_needed() {
        let mut blobs = BlobStore::new(2);
        receive(&mut blobs, &[chunk(1, FIRST | LAST, MAX_BODY)]).unwrap();
        receive(&mut blobs, &[chunk(2, FIRST, MAX_BODY), chunk(2, LAST, 1)]).unwrap();
        for id in [1, 2] {
            blobs.retain(id);
            blobs.give(0, id, &mut Vec::new());
        }
        // A worker that has the blob is asked to unmap it.
        let acts = receive(&mut blobs, &[forget(2)]).unwrap();
        assert!(matches!(&acts[..], [Act::ToWorker(frame)] if *frame == forget(2)));
        assert!(blobs.len(2).is_err());
        let mut acts = Vec::new();
        assert!(blobs.give(1, 2, &mut acts) > 0);
        blobs.take_back(1, &mut acts);
        blobs.release(2, &mut acts);
        assert!(matches!(
            acts[..],
            [Act::Hand { .. }, Act::ToWorker(_), Act::Discard(2)]
        ));
        blobs.release(1, &mut acts);
        assert_eq!((blobs.len(1), acts.len()), (Ok(MAX_BODY), 3));
        assert!(receive(&mut blobs, &[forget(1)]).unwrap().is_empty());
        assert!(blobs.blobs.is_empty());
    }

    #[test]
    fn invalid_blob_frames_are_errors() {
        let whole = chunk(1, FIRST | LAST, 9);
        let cases: Vec<Vec<Frame>> = vec![
            vec![chunk(1, 0, 9)],
            vec![chunk(1, LAST, 9)],
            vec![forget(1)],
            vec![whole.clone(), whole.clone()],
            vec![whole.clone(), chunk(1, 0, 9)],
            vec![whole.clone(), forget(1), forget(1)],
            vec![chunk(1, FIRST, 9), forget(1), chunk(1, LAST, 9)],
            vec![chunk(1, FIRST | BY_REFERENCE, 9)],
        ];
        for frames in cases {
            assert!(
                receive(&mut BlobStore::new(1), &frames).is_err(),
                "{frames:?}"
            );
        }
        let mut blobs = BlobStore::new(1);
        receive(&mut blobs, &[chunk(1, FIRST, 9)]).unwrap();
        assert!(blobs.len(1).is_err() && blobs.len(2).is_err());
    }

    proptest! {
        #[test]
        fn workers_have_what_they_are_to_have_and_nothing_is_left(
            steps in prop::collection::vec((0u8..6, 1u64..5, 0u32..3), 1..80),
        ) {
            let mut blobs = BlobStore::new(3);
            // The blobs that the head, each worker and the store have.
            let (mut known, mut retained) = ([false; 5], [0usize; 5]);
            let mut has = [None; 3];
            let mut stored = std::collections::HashSet::new();
            for (what, id, worker) in steps {
                let mut acts = Vec::new();
                let at = id as usize;
                match what {
                    // The number may be reused once it is free.
                    0 if !known[at] && retained[at] == 0 => {
                        let len = if id % 2 == 0 { 9 } else { MAX_BODY };
                        let frames = [chunk(id, FIRST, len), chunk(id, LAST, 9)];
                        acts = receive(&mut blobs, &frames).unwrap();
                        known[at] = true;
                    }
                    1 if known[at] => {
                        acts = receive(&mut blobs, &[forget(id)]).unwrap();
                        known[at] = false;
                    }
                    2 if known[at] => {
                        blobs.retain(id);
                        retained[at] += 1;
                    }
                    3 if retained[at] > 0 => {
                        blobs.release(id, &mut acts);
                        retained[at] -= 1;
                    }
                    4 => {
                        blobs.made(worker);
                        has[worker as usize] = None;
                    }
                    _ if known[at] || retained[at] > 0 => {
                        blobs.give(worker, id, &mut acts);
                        if !known[at] {
                            blobs.take_back(worker, &mut acts);
                        }
                    }
                    _ => {}
                }
                for act in acts {
                    match act {
                        Act::Store { blob, .. } => {
                            stored.insert(blob);
                        }
                        Act::Discard(blob) => prop_assert!(stored.remove(&blob)),
                        Act::ToWorker(frame) | Act::Hand { frame } => {
                            let Frame { header, .. } = frame;
                            let has = &mut has[header.worker as usize];
                            if header.flags & ABORT != 0 {
                                prop_assert_eq!(has.take(), Some(header.task));
                            } else {
                                *has = Some(header.task);
                                let shared = header.flags & BY_REFERENCE != 0;
                                prop_assert_eq!(shared, header.task % 2 == 1);
                                prop_assert!(!shared || stored.contains(&header.task));
                            }
                        }
                        act => panic!("{act:?}"),
                    }
                }
                let given = blobs.given.iter().map(|given| given.map(|given| given.id));
                prop_assert_eq!(given.collect::<Vec<_>>(), has);
                // Workers keep small blobs.
                for id in has.into_iter().flatten() {
                    prop_assert!(id % 2 == 0 || known[id as usize]);
                }
                for id in 1..5 {
                    let there = known[id] || retained[id] > 0;
                    prop_assert_eq!(blobs.blobs.contains_key(&(id as u64)), there);
                    prop_assert_eq!(stored.contains(&(id as u64)), there && id % 2 == 1);
                }
            }
        }
    }
}
