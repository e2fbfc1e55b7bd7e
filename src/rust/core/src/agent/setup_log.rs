//! The set-up log of an agent's workers, from which replacements are restored.
//!
//! Set-up calls (exports, and other calls on nodes by name) are logged in the order in which each
//! worker answered them. A replacement gets them again in that order, and then the last known
//! random number state. Set-up calls of many workers are equal, so they are cut into blocks, and
//! equal blocks are stored once; blobs are stored as such. When the log exceeds its limit, the
//! worker whose call it was cannot be restored any more: half a state would silently give wrong
//! results.
//!
//! Pure: this module uses no process, socket or clock.

use super::blobs::BlobStore;
use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::BlobId;
use crate::protocol::setup_calls::SetupCalls;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::mem;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_128;

/// Maximum number of large blobs in the log.
const MAX_LARGE_BLOBS: usize = 1_000;

/// Bytes counted for each call and block of a worker besides its content.
const OVERHEAD: usize = 64;

/// Maximum number of calls of one worker. Repeating this many takes seconds.
const MAX_CALLS: usize = 100_000;

type Key = u128;

#[derive(Debug)]
struct LoggedCall {
    /// The number of the variable that the call sets; 0 if the call does something else.
    name: u64,
    /// The blob that the message begins with.
    blob: Option<BlobId>,
    blocks: Vec<Key>,
    /// How long the worker took for the call.
    duration: Duration,
}

/// A call that its worker has not answered yet.
#[derive(Debug)]
struct OpenCall {
    message: LoggedCall,
    /// Bytes that do not fill a block yet.
    rest: BytesMut,
    /// The log's limit was exceeded.
    over_limit: bool,
}

#[derive(Debug, Default)]
struct WorkerLog {
    calls: SetupCalls<LoggedCall>,
    open: Option<OpenCall>,
    /// The random number state after the last task.
    seed: Option<Bytes>,
    /// The random number state after the current task.
    next_seed: Option<Bytes>,
    /// The log is incomplete: the worker cannot be restored.
    incomplete: bool,
}

/// What the message of a call consists of.
fn composition(call: &LoggedCall) -> u128 {
    let mut bytes = call.blob.unwrap_or(0).to_le_bytes().to_vec();
    for key in &call.blocks {
        bytes.extend(key.to_le_bytes());
    }
    xxh3_128(&bytes)
}

/// A set-up call to be repeated on a replacement.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReplayedCall {
    /// The blob that the message begins with.
    pub blob: Option<BlobId>,
    /// The rest of the message, in pieces of at most [`MAX_BODY`] bytes.
    pub pieces: Vec<Bytes>,
    /// How long the first worker took for the call.
    pub duration: Duration,
}

/// The set-up calls and the random number state that restore a replacement.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Restore {
    /// The set-up calls, in order.
    pub messages: Vec<ReplayedCall>,
    /// The random number state, if it is known.
    pub seed: Option<Bytes>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct SetupLog {
    blocks: HashMap<Key, (Bytes, usize)>,
    /// The length and the number of users of each blob that messages begin with.
    blobs: HashMap<BlobId, (usize, usize)>,
    /// Blobs without users since the last [`SetupLog::take_freed`].
    freed: Vec<BlobId>,
    workers: Vec<WorkerLog>,
    /// The digests of messages that have been listed, by what the messages consist of.
    digests: HashMap<u128, u128>,
    bytes: usize,
    max: usize,
}

impl SetupLog {
    /// Creates the log of this many workers, of up to `max` bytes.
    pub fn new(workers: usize, max: usize) -> SetupLog {
        SetupLog {
            blocks: HashMap::new(),
            blobs: HashMap::new(),
            freed: Vec::new(),
            workers: (0..workers).map(|_| WorkerLog::default()).collect(),
            digests: HashMap::new(),
            bytes: 0,
            max,
        }
    }

    /// The current and the maximum number of bytes in the log.
    pub fn stored(&self) -> (usize, usize) {
        (self.bytes, self.max)
    }

    /// Number of logged calls of this worker.
    pub fn calls(&self, worker: u32) -> usize {
        let memory = self.workers.get(worker as usize);
        memory.map_or(0, |memory| memory.calls.len())
    }

    /// Announces that the next message to this worker is a set-up call.
    pub fn expect(&mut self, worker: u32, name: u64) {
        self.close(worker);
        let Some(memory) = self.workers.get_mut(worker as usize) else {
            return;
        };
        if !memory.incomplete {
            memory.open = Some(OpenCall {
                message: LoggedCall {
                    name,
                    blob: None,
                    blocks: Vec::new(),
                    duration: Duration::ZERO,
                },
                rest: BytesMut::new(),
                over_limit: memory.calls.len() >= MAX_CALLS,
            });
        }
    }

    /// Records that a message to this worker begins with a blob of `len` bytes; `last`: the blob is the
    /// whole message. Returns whether the blob must be retained from now on, until
    /// [`SetupLog::take_freed`] returns it.
    pub fn blob(&mut self, worker: u32, id: BlobId, len: usize, last: bool) -> bool {
        let memory = self.workers.get_mut(worker as usize);
        let open = memory.and_then(|memory| memory.open.as_mut());
        let Some(open) = open.filter(|open| !open.over_limit) else {
            return false;
        };
        debug_assert!(last || open.message.blocks.is_empty());
        let stored = self.blobs.contains_key(&id);
        let more = OVERHEAD.saturating_add(if stored { 0 } else { len });
        // Each large blob takes a descriptor.
        let large = self.blobs.values().filter(|(len, _)| *len > MAX_BODY);
        let crowded = !stored && len > MAX_BODY && large.count() >= MAX_LARGE_BLOBS;
        if crowded || self.bytes.saturating_add(more) > self.max {
            open.over_limit = true;
            return false;
        }
        self.bytes += more;
        open.message.blob = Some(id);
        let (_, users) = self.blobs.entry(id).or_insert((len, 0));
        *users += 1;
        !stored
    }

    /// Blobs that have lost their last user since the last call.
    pub fn take_freed(&mut self) -> Vec<BlobId> {
        mem::take(&mut self.freed)
    }

    /// Appends a piece of a message, of at most [`MAX_BODY`] bytes, that was sent to this worker.
    pub fn piece(&mut self, worker: u32, bytes: &Bytes, last: bool) {
        let memory = self.workers.get_mut(worker as usize);
        let Some(mut open) = memory.and_then(|memory| memory.open.take()) else {
            return;
        };
        if !open.over_limit {
            if open.rest.is_empty() && (last || bytes.len() == MAX_BODY) {
                self.append(&mut open, bytes.clone());
            } else {
                // Blocks are cut at fixed offsets, however the message arrived.
                let mut bytes = &bytes[..];
                while !bytes.is_empty() || last && !open.rest.is_empty() {
                    let n = bytes.len().min(MAX_BODY - open.rest.len());
                    open.rest.extend_from_slice(&bytes[..n]);
                    bytes = &bytes[n..];
                    if open.rest.len() == MAX_BODY || last && bytes.is_empty() {
                        let block = open.rest.split().freeze();
                        self.append(&mut open, block);
                    }
                }
            }
        }
        self.workers[worker as usize].open = Some(open);
    }

    fn append(&mut self, open: &mut OpenCall, bytes: Bytes) {
        if open.over_limit || bytes.is_empty() {
            return;
        }
        let key = xxh3_128(&bytes);
        let stored = self.blocks.get_mut(&key);
        let more = OVERHEAD + if stored.is_some() { 0 } else { bytes.len() };
        if self.bytes + more > self.max {
            open.over_limit = true;
            return;
        }
        self.bytes += more;
        match stored {
            Some((_, users)) => *users += 1,
            None => {
                self.blocks.insert(key, (bytes, 1));
            }
        }
        open.message.blocks.push(key);
    }

    /// Records the random number state after the current task. Empty: R has no `.Random.seed`.
    pub fn seed(&mut self, worker: u32, seed: Bytes) {
        if let Some(memory) = self.workers.get_mut(worker as usize) {
            memory.next_seed = Some(seed);
        }
    }

    /// Records the random number state that the head has set.
    pub fn set_seed(&mut self, worker: u32, seed: Bytes) {
        if let Some(memory) = self.workers.get_mut(worker as usize) {
            memory.seed = Some(seed);
            memory.next_seed = None;
        }
    }

    /// The random number state of this worker after its last task, if it is known.
    pub fn current_seed(&self, worker: u32) -> Option<Bytes> {
        self.workers.get(worker as usize)?.seed.clone()
    }

    /// Records that the worker has ended its task after `duration`; `setup_call`: a set-up call completed.
    /// Returns whether this made the log of the worker incomplete, so that it cannot be restored.
    pub fn done(&mut self, worker: u32, setup_call: bool, duration: Duration) -> bool {
        let Some(memory) = self.workers.get_mut(worker as usize) else {
            return false;
        };
        if let Some(seed) = memory.next_seed.take() {
            memory.seed = Some(seed);
        }
        if !setup_call {
            self.close(worker);
            return false;
        }
        let Some(mut open) = memory.open.take() else {
            return false;
        };
        open.message.duration = duration;
        let full = self.bytes + OVERHEAD > self.max;
        if open.over_limit || full {
            memory.incomplete = true;
            let calls: Vec<LoggedCall> = memory.calls.take().collect();
            self.bytes -= OVERHEAD * calls.len();
            for message in calls.iter().chain([&open.message]) {
                self.release(message);
            }
            return true;
        }
        if open.message.blocks.is_empty() && open.message.blob.is_none() {
            return false;
        }
        let superseded = memory.calls.record(open.message.name, open.message);
        self.bytes += OVERHEAD;
        if let Some(superseded) = superseded {
            self.bytes -= OVERHEAD;
            self.release(&superseded);
        }
        false
    }

    /// Records that the worker's process has ended: its current call is not logged.
    pub fn lost(&mut self, worker: u32) {
        self.close(worker);
        if let Some(memory) = self.workers.get_mut(worker as usize) {
            memory.next_seed = None;
        }
    }

    fn close(&mut self, worker: u32) {
        let memory = self.workers.get_mut(worker as usize);
        if let Some(open) = memory.and_then(|memory| memory.open.take()) {
            self.release(&open.message);
        }
    }

    fn release(&mut self, message: &LoggedCall) {
        if let Some(id) = message.blob {
            self.bytes -= OVERHEAD;
            if let Some((len, users)) = self.blobs.get_mut(&id) {
                *users -= 1;
                if *users == 0 {
                    self.bytes -= *len;
                    self.blobs.remove(&id);
                    self.freed.push(id);
                }
            }
        }
        for key in &message.blocks {
            self.bytes -= OVERHEAD;
            if let Some((bytes, users)) = self.blocks.get_mut(key) {
                *users -= 1;
                if *users == 0 {
                    self.bytes -= bytes.len();
                    self.blocks.remove(key);
                }
            }
        }
    }

    /// Whether the log of this worker is complete.
    pub fn is_complete(&self, worker: u32) -> bool {
        let memory = self.workers.get(worker as usize);
        memory.is_some_and(|memory| !memory.incomplete)
    }

    /// Whether [`SetupLog::list`] has all calls of this worker. The call that the worker is running may have exceeded the
    /// limit.
    pub fn is_listed_whole(&self, worker: u32) -> bool {
        let memory = self.workers.get(worker as usize);
        let open = memory.and_then(|memory| memory.open.as_ref());
        self.is_complete(worker) && open.is_none_or(|open| !open.over_limit)
    }

    /// The calls that restore this worker, in order: their names and digests. The call that the worker is running is
    /// the last one. Equal calls have equal digests, on all hosts, whether or not their messages begin with blobs.
    pub fn list(&mut self, worker: u32, blobs: &BlobStore) -> Vec<(u64, u128)> {
        let mut digests = mem::take(&mut self.digests);
        let calls = self.logged(worker).map(|(name, call)| {
            let digest = digests.entry(composition(call));
            (name, *digest.or_insert_with(|| self.digest(call, blobs)))
        });
        let calls = calls.collect();
        self.digests = digests;
        calls
    }

    /// The call of this worker with this digest, which has been listed.
    pub fn find(&self, worker: u32, wanted: u128) -> Option<ReplayedCall> {
        let is_wanted = |call: &LoggedCall| self.digests.get(&composition(call)) == Some(&wanted);
        let (_, call) = self.logged(worker).find(|(_, call)| is_wanted(call))?;
        Some(self.again(call))
    }

    /// The digest of the message of a call.
    fn digest(&self, call: &LoggedCall, blobs: &BlobStore) -> u128 {
        let blob = call.blob.and_then(|id| blobs.hasher(id));
        let mut hasher = blob.unwrap_or_default();
        for (bytes, _) in call.blocks.iter().filter_map(|key| self.blocks.get(key)) {
            hasher.update(bytes);
        }
        hasher.digest128()
    }

    fn logged(&self, worker: u32) -> impl Iterator<Item = (u64, &LoggedCall)> {
        let memory = self.workers.get(worker as usize);
        let done = memory.into_iter().flat_map(|memory| memory.calls.iter());
        let open = memory.and_then(|memory| memory.open.as_ref());
        let open = open.filter(|open| !open.over_limit && open.rest.is_empty());
        done.chain(open.map(|open| (open.message.name, &open.message)))
    }

    fn again(&self, message: &LoggedCall) -> ReplayedCall {
        let block = |key: &Key| Some(self.blocks.get(key)?.0.clone());
        ReplayedCall {
            blob: message.blob,
            pieces: message.blocks.iter().filter_map(block).collect(),
            duration: message.duration,
        }
    }

    /// The state from which a replacement of this worker is restored.
    pub fn restore(&self, worker: u32) -> Restore {
        let Some(memory) = self.workers.get(worker as usize) else {
            return Restore::default();
        };
        Restore {
            messages: memory
                .calls
                .iter()
                .map(|(_, message)| self.again(message))
                .collect(),
            seed: memory.seed.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn give(
        setup_log: &mut SetupLog,
        worker: u32,
        name: u64,
        message: &[u8],
        piece: usize,
    ) -> bool {
        setup_log.expect(worker, name);
        send(setup_log, worker, message, piece);
        setup_log.done(worker, true, Duration::ZERO)
    }

    fn send(setup_log: &mut SetupLog, worker: u32, message: &[u8], piece: usize) {
        let mut pieces = message.chunks(piece).peekable();
        while let Some(bytes) = pieces.next() {
            let bytes = Bytes::copy_from_slice(bytes);
            setup_log.piece(worker, &bytes, pieces.peek().is_none());
        }
    }

    fn restored(setup_log: &SetupLog, worker: u32) -> Vec<Vec<u8>> {
        let restore = setup_log.restore(worker);
        let whole = |message: &ReplayedCall| message.pieces.concat();
        for message in &restore.messages {
            let mut pieces = message.pieces.iter();
            assert!(pieces.all(|piece| piece.len() <= MAX_BODY));
        }
        restore.messages.iter().map(whole).collect()
    }

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        // Cheap, and different in each block for each seed.
        let byte = |i: usize| (i as u64 / 1000 + 31 * seed) as u8 ^ i as u8;
        (0..len).map(byte).collect()
    }

    #[test]
    fn equal_calls_of_many_workers_are_stored_once() {
        let mut setup_log = SetupLog::new(64, 1_500_000);
        let message = noise(1, 1_000_000);
        for worker in 0..64 {
            // The size of the pieces does not matter.
            let piece = [MAX_BODY, 1_000, 50_000][worker as usize % 3];
            assert!(!give(&mut setup_log, worker, 0, &message, piece));
        }
        for worker in 0..64 {
            assert_eq!(restored(&setup_log, worker), std::slice::from_ref(&message));
        }
        assert_eq!(setup_log.blocks.len(), 1_000_000usize.div_ceil(MAX_BODY));
    }

    #[test]
    fn an_interrupted_or_lost_call_is_not_logged_and_its_memory_is_freed() {
        let mut setup_log = SetupLog::new(1, 1 << 20);
        give(&mut setup_log, 0, 0, b"kept", 9);
        let stored = setup_log.bytes;
        setup_log.expect(0, 0);
        send(&mut setup_log, 0, &noise(2, 200_000), MAX_BODY);
        assert!(!setup_log.done(0, false, Duration::ZERO));
        setup_log.expect(0, 0);
        send(&mut setup_log, 0, &noise(3, 200_000), MAX_BODY);
        setup_log.lost(0);
        // A task that was not announced as a set-up call is not logged.
        send(&mut setup_log, 0, b"task", 9);
        assert!(!setup_log.done(0, true, Duration::ZERO));
        assert_eq!(restored(&setup_log, 0), [b"kept"]);
        assert_eq!(setup_log.bytes, stored);
    }

    #[test]
    fn a_variable_that_is_set_again_takes_no_more_memory() {
        let mut setup_log = SetupLog::new(1, 1 << 20);
        for i in 0..100 {
            give(&mut setup_log, 0, 7, &noise(i, 300_000), MAX_BODY);
            give(&mut setup_log, 0, 8, b"other", 9);
        }
        assert_eq!(
            restored(&setup_log, 0),
            [noise(99, 300_000), b"other".to_vec()]
        );
        // A call that may have used the value keeps the value in the log.
        give(&mut setup_log, 0, 0, b"uses", 9);
        give(&mut setup_log, 0, 7, b"new", 9);
        assert_eq!(restored(&setup_log, 0).len(), 4);
    }

    #[test]
    fn a_worker_that_exceeds_the_limit_is_not_restorable_but_others_are() {
        let mut setup_log = SetupLog::new(2, 100_000 + 3 * OVERHEAD);
        assert!(!give(&mut setup_log, 0, 0, &noise(1, 50_000), MAX_BODY));
        assert!(!give(&mut setup_log, 1, 0, b"small", 9));
        assert!(give(&mut setup_log, 0, 0, &noise(2, 60_000), MAX_BODY));
        assert!(!setup_log.is_complete(0));
        assert_eq!(restored(&setup_log, 0), Vec::<Vec<u8>>::new());
        // The log reports that only once.
        assert!(!give(&mut setup_log, 0, 0, b"more", 9));
        assert!(setup_log.is_complete(1));
        assert_eq!(restored(&setup_log, 1), [b"small"]);
        // The memory of its calls is free again.
        assert!(!give(&mut setup_log, 1, 0, &noise(2, 60_000), MAX_BODY));
    }

    #[test]
    fn a_running_call_that_exceeds_the_limit_makes_the_list_incomplete() {
        let blobs = BlobStore::new(1);
        let mut setup_log = SetupLog::new(1, 1_000);
        give(&mut setup_log, 0, 0, b"logged", 9);
        setup_log.expect(0, 0);
        send(&mut setup_log, 0, &noise(1, 100), MAX_BODY);
        assert!(setup_log.is_listed_whole(0));
        assert_eq!(setup_log.list(0, &blobs).len(), 2);
        setup_log.expect(0, 0);
        send(&mut setup_log, 0, &noise(2, 2_000), MAX_BODY);
        assert_eq!(setup_log.list(0, &blobs).len(), 1);
        assert!(setup_log.is_complete(0) && !setup_log.is_listed_whole(0));
        assert!(!setup_log.done(0, false, Duration::ZERO));
        assert!(setup_log.is_listed_whole(0));
    }

    #[test]
    fn a_blob_counts_once_and_is_needed_until_its_last_call_is_dropped() {
        let mut setup_log = SetupLog::new(3, 10_000);
        for worker in 0..3 {
            setup_log.expect(worker, 7);
            let first = setup_log.blob(worker, 1, 9_000, false);
            assert_eq!(first, worker == 0);
            setup_log.piece(worker, &Bytes::from_static(b"rest"), true);
            assert!(!setup_log.done(worker, true, Duration::ZERO));
        }
        let again = ReplayedCall {
            duration: Duration::ZERO,
            blob: Some(1),
            pieces: vec![Bytes::from_static(b"rest")],
        };
        assert_eq!(setup_log.restore(2).messages, [again]);
        // Other values supersede the calls with the blob.
        for worker in 0..3 {
            assert_eq!(setup_log.take_freed(), []);
            give(&mut setup_log, worker, 7, b"other", 9);
        }
        assert_eq!(setup_log.take_freed(), [1]);
        // An interrupted call, a task that is no set-up call, and a call that is too long.
        setup_log.expect(0, 0);
        assert!(setup_log.blob(0, 2, 100, true));
        assert!(!setup_log.done(0, false, Duration::ZERO));
        assert_eq!(setup_log.take_freed(), [2]);
        assert!(!setup_log.blob(0, 3, 100, true));
        assert!(!setup_log.done(0, true, Duration::ZERO));
        setup_log.expect(0, 0);
        assert!(!setup_log.blob(0, 4, 10_000, true));
        assert!(setup_log.done(0, true, Duration::ZERO));
        assert!(!setup_log.is_complete(0));
        assert_eq!(setup_log.take_freed(), []);
    }

    #[test]
    fn the_restored_seed_is_the_one_after_the_last_task_that_ended() {
        let mut setup_log = SetupLog::new(1, 1 << 20);
        assert_eq!(setup_log.restore(0).seed, None);
        setup_log.seed(0, Bytes::from_static(b"one"));
        assert_eq!(setup_log.restore(0).seed, None);
        setup_log.done(0, true, Duration::ZERO);
        setup_log.seed(0, Bytes::from_static(b"two"));
        setup_log.lost(0);
        assert_eq!(setup_log.restore(0).seed.as_deref(), Some(&b"one"[..]));
        setup_log.seed(0, Bytes::from_static(b"three"));
        setup_log.done(0, false, Duration::ZERO);
        assert_eq!(setup_log.restore(0).seed.as_deref(), Some(&b"three"[..]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_log_restores_the_given_calls_and_stays_below_its_limit(
            max in 0usize..400_000,
            steps in prop::collection::vec((0u32..4, 0u64..3, 0u64..5, any::<bool>(), 0u32..10), 1..40),
        ) {
            let mut setup_log = SetupLog::new(4, max);
            type Messages = Vec<(u64, Vec<u8>)>;
            let mut model: Vec<Option<Messages>> = vec![Some(Vec::new()); 4];
            for (worker, name, seed, short, fate) in steps {
                let message = noise(seed, if short { 50 } else { 40_000 + 15_000 * seed as usize });
                setup_log.expect(worker, name);
                send(&mut setup_log, worker, &message, MAX_BODY);
                let memory = &mut model[worker as usize];
                match fate {
                    0 => setup_log.lost(worker),
                    1 => prop_assert!(!setup_log.done(worker, false, Duration::ZERO)),
                    _ => if setup_log.done(worker, true, Duration::ZERO) {
                        *memory = None;
                    } else if let Some(messages) = memory {
                        let recent = messages.iter().enumerate().rev();
                        let mut settings = recent.take_while(|(_, m)| name != 0 && m.0 != 0);
                        let same = settings.find(|(_, m)| m.0 == name).map(|(at, _)| at);
                        same.map(|at| messages.remove(at));
                        messages.push((name, message));
                    }
                }
                prop_assert!(setup_log.bytes <= max);
            }
            for (worker, messages) in model.iter().enumerate() {
                prop_assert_eq!(setup_log.is_complete(worker as u32), messages.is_some());
                let messages = messages.iter().flatten().map(|m| m.1.clone()).collect::<Vec<_>>();
                prop_assert_eq!(restored(&setup_log, worker as u32), messages);
            }
            for worker in 0..4 {
                setup_log.workers[worker].incomplete = true;
                let calls: Vec<LoggedCall> = setup_log.workers[worker].calls.take().collect();
                setup_log.bytes -= OVERHEAD * calls.len();
                calls.iter().for_each(|message| setup_log.release(message));
            }
            prop_assert_eq!(setup_log.bytes, 0);
            prop_assert!(setup_log.blocks.is_empty());
        }
    }
}
