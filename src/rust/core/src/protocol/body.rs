//! The bytes of one message: in chunks, as they arrived, or in shared memory.

use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;

/// Chunks of a result are merged up to this total length. Our own workers fill their chunks; the
/// small chunks of an untrusted peer would take many times the bytes that are counted.
const SMALL_CHUNK: usize = 4 * 1024;

/// Shared memory with a whole result. Nobody can change it.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Bytes of the result.
    pub len: usize,
    /// None in simulations.
    pub file: Option<Arc<File>>,
    /// Counts this result among the buffered ones.
    pub(crate) _counted: Option<Arc<()>>,
}

impl Memory {
    /// Memory that does not count among the buffered results yet.
    pub fn new(len: usize, file: Option<Arc<File>>) -> Memory {
        let _counted = None;
        Memory {
            len,
            file,
            _counted,
        }
    }
}

impl PartialEq for Memory {
    fn eq(&self, other: &Memory) -> bool {
        let same = match (&self.file, &other.file) {
            (Some(file), Some(other)) => Arc::ptr_eq(file, other),
            (file, other) => file.is_none() && other.is_none(),
        };
        same && self.len == other.len
    }
}

impl Eq for Memory {}

/// The bytes of a result, as they arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Body {
    /// The bytes in order, in the pieces that they arrived in.
    pub chunks: VecDeque<Bytes>,
    /// Bytes in all chunks, or in the memory.
    pub len: usize,
    /// The shared memory with all bytes; then there are no chunks.
    pub memory: Option<Memory>,
}

impl Body {
    /// A body with these bytes.
    pub fn from_bytes(bytes: Vec<u8>) -> Body {
        Body {
            len: bytes.len(),
            chunks: [bytes.into()].into(),
            memory: None,
        }
    }

    /// The whole body, if it came in one chunk.
    pub fn whole(&self) -> Option<&[u8]> {
        let [chunk] = self.chunks.as_slices().0 else {
            return None;
        };
        (chunk.len() == self.len).then_some(chunk)
    }

    /// Joins all chunks into one.
    pub fn join(&mut self) {
        if self.chunks.len() > 1 {
            let bytes = self.chunks.make_contiguous().concat();
            self.chunks = [bytes.into()].into();
        }
    }

    /// Drops this many bytes off the front, or all.
    pub fn skip(&mut self, mut count: usize) {
        self.len = self.len.saturating_sub(count);
        while let Some(chunk) = self.chunks.front_mut() {
            if chunk.len() > count {
                return chunk.advance(count);
            }
            count -= chunk.len();
            self.chunks.pop_front();
        }
    }

    /// Takes this many bytes off the front. Returns `None`, and takes nothing, if there are fewer.
    pub fn split_front(&mut self, count: usize) -> Option<Body> {
        let mut front = Body::default();
        if self.memory.is_some() || count > self.len {
            return None;
        }
        while front.len < count {
            let mut chunk = self.chunks.pop_front()?;
            if front.len + chunk.len() > count {
                self.chunks.push_front(chunk.split_off(count - front.len));
            }
            front.len += chunk.len();
            front.chunks.push_back(chunk);
        }
        self.len -= count;
        Some(front)
    }

    /// Adds a chunk that has arrived.
    pub(crate) fn push(&mut self, chunk: Bytes) {
        self.len += chunk.len();
        match self.chunks.back_mut() {
            _ if chunk.is_empty() => {}
            Some(last) if last.len() + chunk.len() <= SMALL_CHUNK => {
                *last = [&last[..], &chunk[..]].concat().into();
            }
            _ => self.chunks.push_back(chunk),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::MAX_BODY;

    #[test]
    fn chunks_are_joined_in_order() {
        let mut body = Body {
            chunks: ["", "ab", "", "c"].map(Bytes::from).into(),
            len: 3,
            memory: None,
        };
        assert_eq!(body.whole(), None);
        body.join();
        assert_eq!(body.whole(), Some(&b"abc"[..]));
        let mut empty = Body::default();
        empty.join();
        assert_eq!(empty, Body::default());
    }

    #[test]
    fn a_result_in_small_chunks_takes_little_more_than_its_bytes() {
        let mut body = Body::default();
        for i in 0..100_000u32 {
            body.push(Bytes::copy_from_slice(&[i as u8]));
            body.push(Bytes::new());
        }
        body.push(vec![7; MAX_BODY].into());
        assert_eq!(body.len, 100_000 + MAX_BODY);
        assert!(body.chunks.len() < 60, "{}", body.chunks.len());
        let bytes: Vec<u8> = body.chunks.iter().flatten().copied().collect();
        assert_eq!(bytes.len(), body.len);
        assert!((0..100_000).all(|i| bytes[i] == i as u8));
    }
}
