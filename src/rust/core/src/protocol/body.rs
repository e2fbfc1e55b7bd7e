//! The bytes of one message: in chunks, as they arrived, or in shared memory.

use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;

/// Chunks of a result are not held apart if they are no longer than this together. Our workers fill
/// theirs; those of another would take many times the bytes that are counted.
const SMALL: usize = 4 * 1024;

/// Shared memory with a whole result. Nobody can change it.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Bytes of the result.
    pub len: usize,
    /// None in simulations.
    pub file: Option<Arc<File>>,
    /// By which those that are held are counted.
    pub(crate) _counted: Option<Arc<()>>,
}

impl Memory {
    /// Memory that is not counted yet among the results held.
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
    /// All of them are there, and none in chunks.
    pub memory: Option<Memory>,
}

impl Body {
    /// All of it, if it came in one chunk.
    pub fn whole(&self) -> Option<&[u8]> {
        let [chunk] = self.chunks.as_slices().0 else {
            return None;
        };
        (chunk.len() == self.len).then_some(chunk)
    }

    /// Drops so many bytes off the front, or all.
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

    /// Adds a chunk that has arrived.
    pub(crate) fn push(&mut self, chunk: Bytes) {
        self.len += chunk.len();
        match self.chunks.back_mut() {
            _ if chunk.is_empty() => {}
            Some(last) if last.len() + chunk.len() <= SMALL => {
                *last = [&last[..], &chunk[..]].concat().into();
            }
            _ => self.chunks.push_back(chunk),
        }
    }
}
