//! What lasts on workers, held so that a worker which takes the place of another can be brought to
//! the state that one was in.
//!
//! Messages that last (exports, and what else is called on nodes by name) are held in the order in
//! which each worker got them, from the moment it has answered; a worker that has to be replaced
//! gets them again in that order, and then the last known state of its random number generator.
//! Messages of many workers are the same, so they are cut into blocks, and of equal blocks one is
//! held; what they have in common as a payload is held as such. When what is held passes its bound,
//! the worker whose message it was is no longer restorable: half a state would give wrong results
//! without a word.
//!
//! Pure: no process, socket or clock.

use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::PayloadId;
use crate::protocol::setup_calls::SetupCalls;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::mem;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_128;

/// Large payloads that are held, at most.
const MOST_LARGE: usize = 1_000;

/// Counted for each message and block of a worker besides the bytes themselves.
const OVERHEAD: usize = 64;

/// The most messages for one worker: to do so many again takes seconds.
const MOST_MESSAGES: usize = 100_000;

type Key = u128;

#[derive(Debug)]
struct Message {
    /// What it sets; 0: nothing in particular.
    name: u64,
    /// It begins with this.
    payload: Option<PayloadId>,
    blocks: Vec<Key>,
    /// How long its worker was at it.
    took: Duration,
}

/// A message on its way to a worker that has not answered it.
#[derive(Debug)]
struct Open {
    message: Message,
    /// What does not fill a block yet.
    rest: BytesMut,
    /// The bound was passed.
    too_much: bool,
}

#[derive(Debug, Default)]
struct Memory {
    calls: SetupCalls<Message>,
    open: Option<Open>,
    /// Its random number generator's state after the last task.
    seed: Option<Bytes>,
    /// The same after the task under way.
    next_seed: Option<Bytes>,
    /// Not all of its state is held.
    incomplete: bool,
}

/// A message to be sent again.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Again {
    /// It begins with this payload.
    pub payload: Option<PayloadId>,
    /// The rest, in pieces of at most [`MAX_BODY`] bytes.
    pub pieces: Vec<Bytes>,
    /// How long a worker was at it when it came from the head.
    pub took: Duration,
}

/// What brings a fresh worker to the state of the one before.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Restore {
    /// In order.
    pub messages: Vec<Again>,
    /// The state of the random number generator, if it is known.
    pub seed: Option<Bytes>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Replay {
    blocks: HashMap<Key, (Bytes, usize)>,
    /// Bytes and users of the payloads that messages begin with.
    payloads: HashMap<PayloadId, (usize, usize)>,
    /// Payloads that have lost their last user.
    freed: Vec<PayloadId>,
    workers: Vec<Memory>,
    bytes: usize,
    most: usize,
}

impl Replay {
    /// For a number of workers; holds up to `most` bytes.
    pub fn new(workers: usize, most: usize) -> Replay {
        Replay {
            blocks: HashMap::new(),
            payloads: HashMap::new(),
            freed: Vec::new(),
            workers: (0..workers).map(|_| Memory::default()).collect(),
            bytes: 0,
            most,
        }
    }

    /// Bytes that are held, and that may be.
    pub fn held(&self) -> (usize, usize) {
        (self.bytes, self.most)
    }

    /// Messages that are held of this worker.
    pub fn calls(&self, worker: u32) -> usize {
        let memory = self.workers.get(worker as usize);
        memory.map_or(0, |memory| memory.calls.len())
    }

    /// The next message to this worker lasts.
    pub fn expect(&mut self, worker: u32, name: u64) {
        self.close(worker);
        let Some(memory) = self.workers.get_mut(worker as usize) else {
            return;
        };
        if !memory.incomplete {
            memory.open = Some(Open {
                message: Message {
                    name,
                    payload: None,
                    blocks: Vec::new(),
                    took: Duration::ZERO,
                },
                rest: BytesMut::new(),
                too_much: memory.calls.len() >= MOST_MESSAGES,
            });
        }
    }

    /// A message to this worker begins with a payload of so many bytes; `last`: it is all of it.
    /// Returns whether the payload is needed from now on, until [`Replay::take_freed`] names it.
    pub fn payload(&mut self, worker: u32, id: PayloadId, len: usize, last: bool) -> bool {
        let memory = self.workers.get_mut(worker as usize);
        let open = memory.and_then(|memory| memory.open.as_mut());
        let Some(open) = open.filter(|open| !open.too_much) else {
            return false;
        };
        debug_assert!(last || open.message.blocks.is_empty());
        let held = self.payloads.contains_key(&id);
        let more = OVERHEAD.saturating_add(if held { 0 } else { len });
        // Each large one is a descriptor.
        let large = self.payloads.values().filter(|(len, _)| *len > MAX_BODY);
        let crowded = !held && len > MAX_BODY && large.count() >= MOST_LARGE;
        if crowded || self.bytes.saturating_add(more) > self.most {
            open.too_much = true;
            return false;
        }
        self.bytes += more;
        open.message.payload = Some(id);
        let (_, users) = self.payloads.entry(id).or_insert((len, 0));
        *users += 1;
        !held
    }

    /// Payloads that are not needed any more since the last call.
    pub fn take_freed(&mut self) -> Vec<PayloadId> {
        mem::take(&mut self.freed)
    }

    /// A piece of a message, at most [`MAX_BODY`] bytes, has been sent to this worker.
    pub fn piece(&mut self, worker: u32, bytes: &Bytes, last: bool) {
        let memory = self.workers.get_mut(worker as usize);
        let Some(mut open) = memory.and_then(|memory| memory.open.take()) else {
            return;
        };
        if !open.too_much {
            if open.rest.is_empty() && (last || bytes.len() == MAX_BODY) {
                self.hold(&mut open, bytes.clone());
            } else {
                // Blocks are cut by their place in the message, however it came.
                let mut bytes = &bytes[..];
                while !bytes.is_empty() || last && !open.rest.is_empty() {
                    let n = bytes.len().min(MAX_BODY - open.rest.len());
                    open.rest.extend_from_slice(&bytes[..n]);
                    bytes = &bytes[n..];
                    if open.rest.len() == MAX_BODY || last && bytes.is_empty() {
                        let block = open.rest.split().freeze();
                        self.hold(&mut open, block);
                    }
                }
            }
        }
        self.workers[worker as usize].open = Some(open);
    }

    fn hold(&mut self, open: &mut Open, bytes: Bytes) {
        if open.too_much || bytes.is_empty() {
            return;
        }
        let key = xxh3_128(&bytes);
        let held = self.blocks.get_mut(&key);
        let more = OVERHEAD + if held.is_some() { 0 } else { bytes.len() };
        if self.bytes + more > self.most {
            open.too_much = true;
            return;
        }
        self.bytes += more;
        match held {
            Some((_, users)) => *users += 1,
            None => {
                self.blocks.insert(key, (bytes, 1));
            }
        }
        open.message.blocks.push(key);
    }

    /// The task under way left its worker's random number generator in this state. Empty: it has
    /// none.
    pub fn seed(&mut self, worker: u32, seed: Bytes) {
        if let Some(memory) = self.workers.get_mut(worker as usize) {
            memory.next_seed = Some(seed);
        }
    }

    /// The head has put this state in place.
    pub fn set_seed(&mut self, worker: u32, seed: Bytes) {
        if let Some(memory) = self.workers.get_mut(worker as usize) {
            memory.seed = Some(seed);
        }
    }

    /// The worker has ended its task, which took so long; `lasts`: as it was meant to. Returns whether
    /// it has just become a worker that cannot be restored.
    pub fn done(&mut self, worker: u32, lasts: bool, took: Duration) -> bool {
        let Some(memory) = self.workers.get_mut(worker as usize) else {
            return false;
        };
        if let Some(seed) = memory.next_seed.take() {
            memory.seed = Some(seed);
        }
        if !lasts {
            self.close(worker);
            return false;
        }
        let Some(mut open) = memory.open.take() else {
            return false;
        };
        open.message.took = took;
        let full = self.bytes + OVERHEAD > self.most;
        if open.too_much || full {
            memory.incomplete = true;
            let calls: Vec<Message> = memory.calls.take().collect();
            self.bytes -= OVERHEAD * calls.len();
            for message in calls.iter().chain([&open.message]) {
                self.release(message);
            }
            return true;
        }
        if open.message.blocks.is_empty() && open.message.payload.is_none() {
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

    /// The worker's process has ended: the message it was at has not lasted.
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

    fn release(&mut self, message: &Message) {
        if let Some(id) = message.payload {
            self.bytes -= OVERHEAD;
            if let Some((len, users)) = self.payloads.get_mut(&id) {
                *users -= 1;
                if *users == 0 {
                    self.bytes -= *len;
                    self.payloads.remove(&id);
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

    /// Whether all of this worker's state is held.
    pub fn is_complete(&self, worker: u32) -> bool {
        let memory = self.workers.get(worker as usize);
        memory.is_some_and(|memory| !memory.incomplete)
    }

    /// What a worker in this place is to be given.
    pub fn restore(&self, worker: u32) -> Restore {
        let Some(memory) = self.workers.get(worker as usize) else {
            return Restore::default();
        };
        let block = |key: &Key| Some(self.blocks.get(key)?.0.clone());
        let again = |message: &Message| Again {
            payload: message.payload,
            pieces: message.blocks.iter().filter_map(block).collect(),
            took: message.took,
        };
        Restore {
            messages: memory
                .calls
                .iter()
                .map(|(_, message)| again(message))
                .collect(),
            seed: memory.seed.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn give(replay: &mut Replay, worker: u32, name: u64, message: &[u8], piece: usize) -> bool {
        replay.expect(worker, name);
        send(replay, worker, message, piece);
        replay.done(worker, true, Duration::ZERO)
    }

    fn send(replay: &mut Replay, worker: u32, message: &[u8], piece: usize) {
        let mut pieces = message.chunks(piece).peekable();
        while let Some(bytes) = pieces.next() {
            let bytes = Bytes::copy_from_slice(bytes);
            replay.piece(worker, &bytes, pieces.peek().is_none());
        }
    }

    fn restored(replay: &Replay, worker: u32) -> Vec<Vec<u8>> {
        let restore = replay.restore(worker);
        let whole = |message: &Again| message.pieces.concat();
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
    fn what_many_workers_got_is_held_once() {
        let mut replay = Replay::new(64, 1_500_000);
        let message = noise(1, 1_000_000);
        for worker in 0..64 {
            // However the message was cut on its way.
            let piece = [MAX_BODY, 1_000, 50_000][worker as usize % 3];
            assert!(!give(&mut replay, worker, 0, &message, piece));
        }
        for worker in 0..64 {
            assert_eq!(restored(&replay, worker), std::slice::from_ref(&message));
        }
        assert_eq!(replay.blocks.len(), 1_000_000usize.div_ceil(MAX_BODY));
    }

    #[test]
    fn an_interrupted_or_lost_message_does_not_last_and_is_let_go() {
        let mut replay = Replay::new(1, 1 << 20);
        give(&mut replay, 0, 0, b"kept", 9);
        let held = replay.bytes;
        replay.expect(0, 0);
        send(&mut replay, 0, &noise(2, 200_000), MAX_BODY);
        assert!(!replay.done(0, false, Duration::ZERO));
        replay.expect(0, 0);
        send(&mut replay, 0, &noise(3, 200_000), MAX_BODY);
        replay.lost(0);
        // A task that is not expected to last does not.
        send(&mut replay, 0, b"task", 9);
        assert!(!replay.done(0, true, Duration::ZERO));
        assert_eq!(restored(&replay, 0), [b"kept"]);
        assert_eq!(replay.bytes, held);
    }

    #[test]
    fn a_name_that_is_set_again_takes_no_more_room() {
        let mut replay = Replay::new(1, 1 << 20);
        for i in 0..100 {
            give(&mut replay, 0, 7, &noise(i, 300_000), MAX_BODY);
            give(&mut replay, 0, 8, b"other", 9);
        }
        assert_eq!(
            restored(&replay, 0),
            [noise(99, 300_000), b"other".to_vec()]
        );
        // What may have used the value keeps it.
        give(&mut replay, 0, 0, b"uses", 9);
        give(&mut replay, 0, 7, b"new", 9);
        assert_eq!(restored(&replay, 0).len(), 4);
    }

    #[test]
    fn beyond_the_bound_a_worker_is_not_restorable_and_others_are() {
        let mut replay = Replay::new(2, 100_000 + 3 * OVERHEAD);
        assert!(!give(&mut replay, 0, 0, &noise(1, 50_000), MAX_BODY));
        assert!(!give(&mut replay, 1, 0, b"small", 9));
        assert!(give(&mut replay, 0, 0, &noise(2, 60_000), MAX_BODY));
        assert!(!replay.is_complete(0));
        assert_eq!(restored(&replay, 0), Vec::<Vec<u8>>::new());
        // Said once.
        assert!(!give(&mut replay, 0, 0, b"more", 9));
        assert!(replay.is_complete(1));
        assert_eq!(restored(&replay, 1), [b"small"]);
        // Its room is free again.
        assert!(!give(&mut replay, 1, 0, &noise(2, 60_000), MAX_BODY));
    }

    #[test]
    fn a_payload_counts_once_and_is_needed_until_its_last_message_is_let_go() {
        let mut replay = Replay::new(3, 10_000);
        for worker in 0..3 {
            replay.expect(worker, 7);
            let first = replay.payload(worker, 1, 9_000, false);
            assert_eq!(first, worker == 0);
            replay.piece(worker, &Bytes::from_static(b"rest"), true);
            assert!(!replay.done(worker, true, Duration::ZERO));
        }
        let again = Again {
            took: Duration::ZERO,
            payload: Some(1),
            pieces: vec![Bytes::from_static(b"rest")],
        };
        assert_eq!(replay.restore(2).messages, [again]);
        // What takes its place.
        for worker in 0..3 {
            assert_eq!(replay.take_freed(), []);
            give(&mut replay, worker, 7, b"other", 9);
        }
        assert_eq!(replay.take_freed(), [1]);
        // One that is interrupted, one that is not to last, and one that is too long.
        replay.expect(0, 0);
        assert!(replay.payload(0, 2, 100, true));
        assert!(!replay.done(0, false, Duration::ZERO));
        assert_eq!(replay.take_freed(), [2]);
        assert!(!replay.payload(0, 3, 100, true));
        assert!(!replay.done(0, true, Duration::ZERO));
        replay.expect(0, 0);
        assert!(!replay.payload(0, 4, 10_000, true));
        assert!(replay.done(0, true, Duration::ZERO));
        assert!(!replay.is_complete(0));
        assert_eq!(replay.take_freed(), []);
    }

    #[test]
    fn the_seed_is_that_after_the_last_task_that_ended() {
        let mut replay = Replay::new(1, 1 << 20);
        assert_eq!(replay.restore(0).seed, None);
        replay.seed(0, Bytes::from_static(b"one"));
        assert_eq!(replay.restore(0).seed, None);
        replay.done(0, true, Duration::ZERO);
        replay.seed(0, Bytes::from_static(b"two"));
        replay.lost(0);
        assert_eq!(replay.restore(0).seed.as_deref(), Some(&b"one"[..]));
        replay.seed(0, Bytes::from_static(b"three"));
        replay.done(0, false, Duration::ZERO);
        assert_eq!(replay.restore(0).seed.as_deref(), Some(&b"three"[..]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_held_is_what_was_given_and_within_the_bound(
            most in 0usize..400_000,
            steps in prop::collection::vec((0u32..4, 0u64..3, 0u64..5, any::<bool>(), 0u32..10), 1..40),
        ) {
            let mut replay = Replay::new(4, most);
            type Messages = Vec<(u64, Vec<u8>)>;
            let mut model: Vec<Option<Messages>> = vec![Some(Vec::new()); 4];
            for (worker, name, seed, short, fate) in steps {
                let message = noise(seed, if short { 50 } else { 40_000 + 15_000 * seed as usize });
                replay.expect(worker, name);
                send(&mut replay, worker, &message, MAX_BODY);
                let memory = &mut model[worker as usize];
                match fate {
                    0 => replay.lost(worker),
                    1 => prop_assert!(!replay.done(worker, false, Duration::ZERO)),
                    _ => if replay.done(worker, true, Duration::ZERO) {
                        *memory = None;
                    } else if let Some(messages) = memory {
                        let recent = messages.iter().enumerate().rev();
                        let mut settings = recent.take_while(|(_, m)| name != 0 && m.0 != 0);
                        let same = settings.find(|(_, m)| m.0 == name).map(|(at, _)| at);
                        same.map(|at| messages.remove(at));
                        messages.push((name, message));
                    }
                }
                prop_assert!(replay.bytes <= most);
            }
            for (worker, messages) in model.iter().enumerate() {
                prop_assert_eq!(replay.is_complete(worker as u32), messages.is_some());
                let messages = messages.iter().flatten().map(|m| m.1.clone()).collect::<Vec<_>>();
                prop_assert_eq!(restored(&replay, worker as u32), messages);
            }
            for worker in 0..4 {
                replay.workers[worker].incomplete = true;
                let calls: Vec<Message> = replay.workers[worker].calls.take().collect();
                replay.bytes -= OVERHEAD * calls.len();
                calls.iter().for_each(|message| replay.release(message));
            }
            prop_assert_eq!(replay.bytes, 0);
            prop_assert!(replay.blocks.is_empty());
        }
    }
}
