//! Queue of outgoing frames. Small frames share a buffer, so that many are written by one system
//! call; large bodies are passed on without a copy.

use crate::protocol::frame::{Frame, HEADER_LEN};
use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Bodies up to this size are copied next to their header.
const COPY_BELOW: usize = 4 * 1024;

/// Slices for one vectored write.
pub const MAX_SLICES: usize = 64;

/// Bytes that wait to be written, in order.
#[derive(Debug, Default)]
pub struct OutBuf {
    ready: VecDeque<Bytes>,
    open: BytesMut,
    len: usize,
}

impl OutBuf {
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a frame.
    pub fn push(&mut self, frame: &Frame) {
        self.len += frame.wire_len();
        self.open.reserve(HEADER_LEN);
        frame.header.encode(&mut self.open);
        if frame.body.len() <= COPY_BELOW {
            self.open.extend_from_slice(&frame.body);
        } else {
            self.ready.push_back(self.open.split().freeze());
            self.ready.push_back(frame.body.clone());
        }
    }

    /// Appends bytes as they are.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        self.open.extend_from_slice(bytes);
    }

    /// The bytes to write next, as at most [`MAX_SLICES`] slices, handed to `write`, which
    /// returns how many it took.
    pub fn write_with<E>(
        &mut self,
        write: impl FnOnce(&[IoSlice<'_>]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut used = 0;
        for bytes in self.ready.iter().take(MAX_SLICES) {
            slices[used] = IoSlice::new(bytes);
            used += 1;
        }
        if used < MAX_SLICES && !self.open.is_empty() {
            slices[used] = IoSlice::new(&self.open);
            used += 1;
        }
        let written = write(&slices[..used])?;
        self.advance(written);
        Ok(written)
    }

    fn advance(&mut self, mut written: usize) {
        self.len -= written;
        while written > 0 {
            let Some(front) = self.ready.front_mut() else {
                self.open.advance(written);
                break;
            };
            if written < front.len() {
                front.advance(written);
                break;
            }
            written -= front.len();
            self.ready.pop_front();
        }
        // An empty buffer that once was large gives its memory back.
        if self.len == 0 && self.open.capacity() > 64 * 1024 {
            self.open = BytesMut::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::{self, FIRST, Kind, LAST, MAX_BODY};
    use proptest::prelude::*;
    use std::convert::Infallible;

    proptest! {
        #[test]
        fn pushed_bytes_are_written_completely_and_in_order(
            sizes in prop::collection::vec(prop_oneof![0usize..100, 4000usize..4200, Just(MAX_BODY)], 1..100),
            takes in prop::collection::vec(1usize..200_000, 1..50),
        ) {
            let mut out = OutBuf::default();
            let frames: Vec<Frame> = sizes
                .iter()
                .enumerate()
                .map(|(i, &n)| Frame::new(Kind::Data, FIRST | LAST, 0, i as u64, vec![i as u8; n].into()))
                .collect();
            let mut takes = takes.into_iter().cycle();
            let mut wire = BytesMut::new();
            for frame in &frames {
                out.push(frame);
                let mut take = takes.next().unwrap();
                out.write_with(|slices| {
                    let mut written = 0;
                    for slice in slices {
                        let n = slice.len().min(take);
                        wire.extend_from_slice(&slice[..n]);
                        take -= n;
                        written += n;
                    }
                    Ok::<_, Infallible>(written)
                }).unwrap();
            }
            while !out.is_empty() {
                out.write_with(|slices| {
                    slices.iter().for_each(|slice| wire.extend_from_slice(slice));
                    Ok::<_, Infallible>(slices.iter().map(|slice| slice.len()).sum())
                }).unwrap();
            }
            for expected in frames {
                prop_assert_eq!(frame::decode(&mut wire).unwrap(), Some(expected));
            }
            prop_assert!(wire.is_empty());
        }
    }
}
