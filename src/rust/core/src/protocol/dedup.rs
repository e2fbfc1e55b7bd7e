//! Deduplication of chunks: the head sends bytes that several messages to one remote host contain
//! only once over the link.
//!
//! Messages are cut by content-defined chunking ([`cut`]: FastCDC, Xia et al., USENIX ATC 2016). A function or an
//! argument that many messages share therefore yields the same chunks at any position. The agent keeps received chunks
//! in an LRU cache of limited size ([`ChunkCache`]). The head knows the content of the cache, because it sees the same
//! chunks in the same order ([`CacheIndex`]), and sends the number of a cached chunk instead of the chunk.

use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{CACHE, Frame, MAX_BODY, SAME};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use fastcdc::v2020::{self, MASKS};
use lru::LruCache;
use std::collections::VecDeque;
use std::hash::Hash;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Minimum size of a chunk. Shorter messages are not deduplicated.
const MIN_CHUNK: usize = 1024;
/// Usual size of a chunk: a function of a few kilobytes has some chunks of its own, and the header of a frame adds
/// only 0.5 %.
const USUAL_CHUNK: usize = 4 * 1024;
/// FastCDC's normalization at level 1: chunks below the usual size are cut by a mask with one bit more than longer
/// ones.
const MASK_BELOW: u64 = MASKS[USUAL_CHUNK.ilog2() as usize + 1];
const MASK_ABOVE: u64 = MASKS[USUAL_CHUNK.ilog2() as usize - 1];

/// Bytes counted for a cached chunk besides its content: otherwise, the number of empty chunks would be unlimited.
const ENTRY: usize = 128;

/// A piece of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The content.
    pub bytes: Bytes,
    /// The hash of the content (XXH3, 128 bits), if the chunk may be deduplicated.
    pub key: Option<u128>,
}

impl From<Bytes> for Chunk {
    /// A chunk that is not deduplicated.
    fn from(bytes: Bytes) -> Chunk {
        Chunk { bytes, key: None }
    }
}

/// Cuts chunks off the front of `buffer`. Unless this is the `last` part of a message, bytes whose chunk may continue
/// are left in the buffer.
pub fn cut(buffer: &mut Vec<u8>, last: bool) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut from = 0;
    while last && from < buffer.len() || buffer.len() - from >= MAX_BODY {
        let rest = &buffer[from..];
        let end = end_of_chunk(rest);
        chunks.push(chunk(Bytes::copy_from_slice(&rest[..end])));
        from += end;
    }
    buffer.drain(..from);
    chunks
}

/// Cuts a complete message into the same chunks as [`cut`], without copying it.
pub fn cut_whole(mut message: Bytes) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    while !message.is_empty() {
        let end = end_of_chunk(&message);
        chunks.push(chunk(message.split_to(end)));
    }
    chunks
}

fn end_of_chunk(bytes: &[u8]) -> usize {
    let (below, above) = (MASK_BELOW << 1, MASK_ABOVE << 1);
    let (_, end) = v2020::cut(
        bytes,
        MIN_CHUNK,
        USUAL_CHUNK,
        MAX_BODY,
        MASK_BELOW,
        MASK_ABOVE,
        below,
        above,
    );
    end
}

/// The key of this content.
pub fn key_of(bytes: &[u8]) -> u128 {
    xxh3_128(bytes)
}

/// Computes the key and the length of content that arrives in pieces.
#[derive(Clone, Default)]
pub struct Fingerprint {
    hash: Xxh3,
    len: u64,
}

impl Fingerprint {
    /// Appends a piece of the content.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
    }

    /// Returns the key and the length, which do not depend on how the content was cut into pieces.
    pub fn value(&self) -> (u128, u64) {
        (self.hash.digest128(), self.len)
    }
}

fn chunk(bytes: Bytes) -> Chunk {
    let key = (bytes.len() >= MIN_CHUNK).then(|| key_of(&bytes));
    Chunk { bytes, key }
}

/// An LRU cache of values with sizes.
#[derive(Debug)]
struct BoundedMap<K: Hash + Eq, V> {
    values: LruCache<K, (V, usize)>,
    bytes: usize,
    max: usize,
}

impl<K: Hash + Eq, V> BoundedMap<K, V> {
    fn new(max: usize) -> BoundedMap<K, V> {
        BoundedMap {
            values: LruCache::unbounded(),
            bytes: 0,
            max,
        }
    }

    fn peek(&self, key: &K) -> Option<&V> {
        self.values.peek(key).map(|(value, _)| value)
    }

    /// Returns a value and marks it as recently used.
    fn get(&mut self, key: &K) -> Option<&V> {
        self.values.get(key).map(|(value, _)| value)
    }

    fn insert(&mut self, key: K, value: V, size: usize) {
        let size = size + ENTRY;
        self.bytes += size;
        if let Some((_, replaced)) = self.values.put(key, (value, size)) {
            self.bytes -= replaced;
        }
        while self.bytes > self.max {
            let Some((_, (_, size))) = self.values.pop_lru() else {
                break;
            };
            self.bytes -= size;
        }
    }
}

/// A reference that is sent instead of some chunks.
#[derive(Debug, Default)]
pub struct SentChunks {
    /// The flags of the frame.
    pub flags: u8,
    /// The body of the frame.
    pub body: Bytes,
    /// Bytes that the worker receives.
    pub len: usize,
}

/// The head's index of an agent's chunk cache.
#[derive(Debug)]
pub struct CacheIndex {
    numbers: BoundedMap<u128, u64>,
    next: u64,
}

impl CacheIndex {
    /// Bytes that the agent keeps.
    pub fn bytes(&self) -> usize {
        self.numbers.bytes
    }

    /// The index of a cache of up to `max` bytes.
    pub fn new(max: usize) -> CacheIndex {
        CacheIndex {
            numbers: BoundedMap::new(max),
            next: 0,
        }
    }

    /// The index for a reconnected agent, whose cache is empty.
    #[must_use]
    pub fn fresh(&self) -> CacheIndex {
        CacheIndex::new(self.numbers.max)
    }

    /// Takes the content of one frame off the front of `chunks`: as many chunks as the agent has in
    /// a row, or one. The chunks have at most `max` bytes, if the first one has.
    pub fn send(&mut self, chunks: &mut VecDeque<Chunk>, max: usize) -> SentChunks {
        let Some(chunk) = chunks.pop_front() else {
            return SentChunks::default();
        };
        let len = chunk.bytes.len();
        let Some(key) = chunk.key else {
            return SentChunks {
                flags: 0,
                body: chunk.bytes,
                len,
            };
        };
        let Some(&first) = self.numbers.get(&key) else {
            self.numbers.insert(key, self.next, len);
            self.next += 1;
            return SentChunks {
                flags: CACHE,
                body: chunk.bytes,
                len,
            };
        };
        let (mut count, mut len) = (1u32, len);
        while let Some(chunk) = chunks.front() {
            let number = chunk.key.and_then(|key| self.numbers.peek(&key));
            let longer = len + chunk.bytes.len();
            if number != Some(&(first + u64::from(count))) || longer > max.min(MAX_BODY) {
                break;
            }
            if let Some(key) = chunks.pop_front().and_then(|chunk| chunk.key) {
                self.numbers.get(&key);
            }
            count += 1;
            len = longer;
        }
        let mut body = BytesMut::with_capacity(12);
        body.put_u64_le(first);
        body.put_u32_le(count);
        SentChunks {
            flags: SAME,
            body: body.freeze(),
            len,
        }
    }
}

/// The chunk cache of an agent.
#[derive(Debug)]
pub struct ChunkCache {
    chunks: BoundedMap<u64, Bytes>,
    next: u64,
}

impl ChunkCache {
    /// The size of the cached chunks, in bytes.
    pub fn bytes(&self) -> usize {
        self.chunks.bytes
    }

    /// A cache of up to `max` bytes.
    pub fn new(max: usize) -> ChunkCache {
        ChunkCache {
            chunks: BoundedMap::new(max),
            next: 0,
        }
    }

    /// Replaces the references in a data frame from the head by the chunks themselves, and adds new
    /// chunks to the cache.
    ///
    /// # Errors
    /// When the frame refers to a chunk that is not in the cache.
    pub fn receive(&mut self, frame: &mut Frame) -> Result<(), ProtocolError> {
        let flags = frame.header.flags;
        if flags & SAME != 0 {
            let bytes = self.look_up(&frame.body).ok_or_else(|| {
                ProtocolError("a frame refers to chunks that are not in the cache".into())
            })?;
            frame.header.len = bytes.len() as u32;
            frame.body = bytes;
        } else if flags & CACHE != 0 {
            let size = frame.body.len();
            self.chunks.insert(self.next, frame.body.clone(), size);
            self.next += 1;
        }
        frame.header.flags = flags & !(SAME | CACHE);
        Ok(())
    }

    fn look_up(&mut self, mut body: &[u8]) -> Option<Bytes> {
        let first = body.try_get_u64_le().ok()?;
        let count = body.try_get_u32_le().ok()?;
        if count == 1 {
            return self.chunks.get(&first).cloned();
        }
        let mut bytes = BytesMut::new();
        for number in first..first.checked_add(count.into())? {
            bytes.extend_from_slice(self.chunks.get(&number)?);
            if bytes.len() > MAX_BODY {
                return None;
            }
        }
        (count > 0).then(|| bytes.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::Kind;
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{RngCore, SeedableRng};

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        bytes
    }

    /// Cuts a message that arrives in pieces, like the hub.
    fn cut_in_pieces(message: &[u8], piece: usize) -> Vec<Chunk> {
        let mut buffer = Vec::new();
        let mut chunks = Vec::new();
        for piece in message.chunks(piece) {
            buffer.extend_from_slice(piece);
            chunks.extend(cut(&mut buffer, false));
        }
        chunks.extend(cut(&mut buffer, true));
        assert!(buffer.is_empty());
        chunks
    }

    fn wire(
        cache_index: &mut CacheIndex,
        chunk_cache: &mut ChunkCache,
        chunks: &[Chunk],
    ) -> (usize, Vec<u8>) {
        let (mut crossed, mut received) = (0, Vec::new());
        let mut chunks: VecDeque<Chunk> = chunks.iter().cloned().collect();
        while !chunks.is_empty() {
            let max = 2_000 * chunks.len();
            let shortest = chunks[0].bytes.len();
            let sent = cache_index.send(&mut chunks, max);
            assert!(sent.len <= max.max(shortest));
            let mut frame = Frame::new(Kind::Data, sent.flags, 0, 1, sent.body);
            crossed += frame.wire_len();
            chunk_cache.receive(&mut frame).unwrap();
            assert_eq!(frame.header.flags, 0);
            assert_eq!(frame.header.body_len(), sent.len);
            assert_eq!(frame.body.len(), sent.len);
            received.extend_from_slice(&frame.body);
        }
        (crossed, received)
    }

    proptest! {
        #[test]
        fn chunks_are_the_message_however_it_comes(
            len in 0usize..300_000, piece in 1usize..200_000, runs in any::<bool>(),
        ) {
            let mut message = noise(len as u64, len);
            if runs {
                message[len / 4..len / 2].fill(0);
            }
            let chunks = cut_in_pieces(&message, piece);
            prop_assert_eq!(&cut_in_pieces(&message, len + 1), &chunks);
            prop_assert_eq!(&cut_whole(Bytes::from(message.clone())), &chunks);
            prop_assert!(chunks.iter().all(|c| !c.bytes.is_empty() && c.bytes.len() <= MAX_BODY));
            let whole: Vec<u8> = chunks.iter().flat_map(|c| c.bytes.to_vec()).collect();
            prop_assert_eq!(whole, message);
        }

        #[test]
        fn messages_arrive_unchanged_with_any_cache_size(
            max in 0usize..400_000, which in prop::collection::vec(0u64..6, 1..30),
        ) {
            let (mut cache_index, mut chunk_cache) = (CacheIndex::new(max), ChunkCache::new(max));
            for seed in which {
                let message = noise(seed, 20_000 + 17_000 * seed as usize);
                let (_, received) = wire(&mut cache_index, &mut chunk_cache, &cut_in_pieces(&message, 70_000));
                prop_assert_eq!(received, message);
                prop_assert!(chunk_cache.chunks.bytes <= max);
                prop_assert_eq!(chunk_cache.chunks.bytes, cache_index.numbers.bytes);
            }
        }
    }

    #[test]
    fn chunks_that_messages_share_are_sent_once() {
        let (mut cache_index, mut chunk_cache) =
            (CacheIndex::new(1 << 24), ChunkCache::new(1 << 24));
        let common = noise(1, 1_000_000);
        let mut crossed = 0;
        for seed in 0..64 {
            let mut message = noise(100 + seed, 100 + 13 * seed as usize);
            message.extend_from_slice(&common);
            message.extend(noise(200 + seed, 500));
            let (bytes, received) = wire(
                &mut cache_index,
                &mut chunk_cache,
                &cut_in_pieces(&message, 70_000),
            );
            assert_eq!(received, message);
            crossed += bytes;
        }
        assert!(crossed < 2 * common.len(), "{crossed}");
    }

    #[test]
    fn fingerprints_are_those_of_the_content() {
        let message = noise(1, 300_000);
        let of = |message: &[u8], piece: usize| {
            let mut print = Fingerprint::default();
            for piece in message.chunks(piece) {
                print.update(piece);
            }
            print.value()
        };
        let whole = (key_of(&message), 300_000);
        for piece in [4, 999, 64_768, 300_000] {
            assert_eq!(of(&message, piece), whole);
        }
        let mut changed = message.clone();
        changed[299_999] ^= 1;
        assert_ne!(of(&changed, 4), whole);
        assert_ne!(of(&message[..299_999], 4), whole);
    }

    #[test]
    fn the_number_of_cached_empty_chunks_is_limited() {
        let mut chunk_cache = ChunkCache::new(100 * ENTRY);
        for _ in 0..1_000 {
            let mut frame = Frame::new(Kind::Data, CACHE, 0, 1, Bytes::new());
            chunk_cache.receive(&mut frame).unwrap();
        }
        assert_eq!(chunk_cache.chunks.values.len(), 100);
    }

    #[test]
    fn a_reference_to_an_unknown_chunk_is_an_error() {
        let mut chunk_cache = ChunkCache::new(1 << 20);
        for body in [&[0u8; 12][..], &[0xff; 12], &[0; 11], &[]] {
            let mut frame = Frame::new(Kind::Data, SAME, 0, 1, Bytes::copy_from_slice(body));
            assert!(chunk_cache.receive(&mut frame).is_err());
        }
    }
}
