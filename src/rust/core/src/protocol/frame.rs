//! Frames: the pieces of every byte stream, between head and agent and between agent and worker.
//!
//! A frame is a fixed little-endian header of [`HEADER_LEN`] bytes and a body of at most
//! [`MAX_BODY`] bytes. The announced length is checked against that limit before anything is
//! allocated, so a peer that announces 2^32 bytes costs nothing. No I/O happens here.

use crate::platform::page_pool;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::time::Duration;

/// Bytes of a header: kind (1), flags (1), reserved (2), worker (4), task (8), length (4).
pub const HEADER_LEN: usize = 20;

/// The largest body of one frame. Longer bodies are cut into chunks of this size, which is also
/// the most that one worker's data can delay another's.
pub const MAX_BODY: usize = 64 * 1024;

const _: () = assert!(MAX_BODY <= page_pool::ROOM);

/// First chunk of a body: an incomplete body for the same worker is dropped.
pub const FIRST: u8 = 1;
/// Last chunk of a body.
pub const LAST: u8 = 2;
/// With [`LAST`], towards a worker: drop this message and do not answer it. Towards the head: the
/// task was cancelled and its worker is free again, or the task was dropped before it started.
pub const ABORT: u8 = 4;
/// Towards an agent: put the body into the chunk cache, under the next number. See
/// [`crate::protocol::dedup`].
pub const CACHE: u8 = 8;
/// Towards an agent: the body is a reference to the chunk cache. It has the number of a chunk (8
/// bytes) and how many chunks of successive numbers are meant (4 bytes), which together are no
/// longer than a body.
pub const SAME: u8 = 16;
/// Of a seed: the random number state for one reassigned task, not the worker's own.
pub const REASSIGNED: u8 = 32;

/// The bytes are elsewhere. In the first frame of a message: the body is the number of a blob (8
/// bytes) that the message begins with. In a blob towards a worker: the bytes are in a descriptor
/// that comes with the frame, and the body is their length (8 bytes). In an answer: the same, for
/// the whole answer. Towards the head, a frame with [`FIRST`] alone announces such an answer; the
/// frame with [`LAST`], which brings it, waits until the head asks for it.
pub const BY_REFERENCE: u8 = 64;

/// All flags.
const FLAGS: u8 = FIRST | LAST | ABORT | CACHE | SAME | REASSIGNED | BY_REFERENCE;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A control message (see [`crate::protocol::control`]).
    Control = 1,
    /// A chunk of a serialized R message of `task`, which is opaque here.
    Data = 2,
    /// Credit: permission to send more bytes. A credit frame has no body, the number of bytes is in
    /// `len`. Towards an agent: for the answer to `task`. Towards the head: for the messages to
    /// this worker, of any task.
    Credit = 3,
    /// Output of a worker.
    Output = 4,
    /// Towards a worker: the running task was cancelled.
    Cancel = 5,
    /// The state of a worker's random number generator: R's `.Random.seed` as bytes. Towards a
    /// worker: to be set before the next task. From a worker: the state that the answered task
    /// left. With [`REASSIGNED`] the state is not the worker's own.
    Seed = 6,
    /// Towards an agent: the next message to this worker is a set-up call, which is repeated on a
    /// replacement. The body, 8 bytes, names what the call sets; 0: nothing in particular.
    State = 7,
    /// A chunk of a blob, with which many messages begin; `task` is the blob's number. With
    /// [`ABORT`]: the blob is not needed any more, whether it was sent completely or not.
    Blob = 8,
    /// Towards the head: a progress event of a task, which is opaque here. It is not part of the
    /// answer.
    ProgressEvent = 9,
    /// Towards an agent: the time limit of `task`, whose message comes next, from when its worker
    /// has the whole message. The body, 8 bytes, is a number of microseconds.
    Limit = 10,
    /// From a worker: its task has raised an error. The body is the message in UTF-8. The answer, which follows,
    /// contains the error, too, but only R can read that.
    TaskError = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Control,
            2 => Kind::Data,
            3 => Kind::Credit,
            4 => Kind::Output,
            5 => Kind::Cancel,
            6 => Kind::Seed,
            7 => Kind::State,
            8 => Kind::Blob,
            9 => Kind::ProgressEvent,
            10 => Kind::Limit,
            11 => Kind::TaskError,
            _ => return None,
        })
    }
}

/// The fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame carries.
    pub kind: Kind,
    /// A union of [`FIRST`], [`LAST`] and the other flags of this module.
    pub flags: u8,
    /// The worker's index on its host, from 0.
    pub worker: u32,
    /// The task, unique within a cluster.
    pub task: u64,
    /// Bytes of the body; for [`Kind::Credit`], which has no body, the number of bytes granted.
    pub len: u32,
}

impl Header {
    /// Bytes of body that follow this header.
    pub fn body_len(&self) -> usize {
        match self.kind {
            Kind::Credit => 0,
            _ => self.len as usize,
        }
    }

    /// Appends the header's bytes to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u8(self.kind as u8);
        out.put_u8(self.flags);
        out.put_u16_le(0);
        out.put_u32_le(self.worker);
        out.put_u64_le(self.task);
        out.put_u32_le(self.len);
    }

    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0u8; HEADER_LEN];
        self.encode(&mut &mut bytes[..]);
        bytes
    }

    /// Reads a header. `Ok(None)` if `bytes` is shorter than a header.
    pub fn decode(mut bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        if bytes.len() < HEADER_LEN {
            return Ok(None);
        }
        let kind = bytes.get_u8();
        let flags = bytes.get_u8();
        let reserved = bytes.get_u16_le();
        let worker = bytes.get_u32_le();
        let task = bytes.get_u64_le();
        let len = bytes.get_u32_le();
        let kind = Kind::from_byte(kind).ok_or(FrameError::UnknownKind(kind))?;
        if reserved != 0 || flags & !FLAGS != 0 {
            return Err(FrameError::BadFlags { flags, reserved });
        }
        let header = Header {
            kind,
            flags,
            worker,
            task,
            len,
        };
        if header.body_len() > MAX_BODY {
            return Err(FrameError::TooLong(len));
        }
        Ok(Some(header))
    }
}

/// A header with its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The fixed part.
    pub header: Header,
    /// At most [`MAX_BODY`] bytes.
    pub body: Bytes,
}

impl Frame {
    /// A frame of `kind` whose length field is that of `body`.
    pub fn new(kind: Kind, flags: u8, worker: u32, task: u64, body: Bytes) -> Frame {
        debug_assert!(body.len() <= MAX_BODY);
        let len = body.len() as u32;
        Frame {
            header: Header {
                kind,
                flags,
                worker,
                task,
                len,
            },
            body,
        }
    }

    /// The first frame of a message to `worker` that begins with a blob. `last`: it is the whole
    /// message.
    pub fn blob_reference(worker: u32, task: u64, blob: u64, last: bool) -> Frame {
        let flags = FIRST | BY_REFERENCE | if last { LAST } else { 0 };
        let body = Bytes::copy_from_slice(&blob.to_le_bytes());
        Frame::new(Kind::Data, flags, worker, task, body)
    }

    /// The frame with the time limit of a task; it is sent before the task's message.
    pub fn limit(worker: u32, task: u64, limit: Duration) -> Frame {
        let limit = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX);
        let body = Bytes::copy_from_slice(&limit.to_le_bytes());
        Frame::new(Kind::Limit, 0, worker, task, body)
    }

    /// The body of this frame as a number, if it is one.
    pub fn number(&self) -> Option<u64> {
        let bytes = <[u8; 8]>::try_from(&self.body[..]).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// Permission for `worker` to send `bytes` more of the body of `task`.
    pub fn credit(worker: u32, task: u64, bytes: u32) -> Frame {
        Frame {
            header: Header {
                kind: Kind::Credit,
                flags: 0,
                worker,
                task,
                len: bytes,
            },
            body: Bytes::new(),
        }
    }

    /// Bytes on the wire.
    pub fn wire_len(&self) -> usize {
        HEADER_LEN + self.body.len()
    }
}

/// Takes one whole frame off the front of `buffer`. `Ok(None)`: more bytes are needed, which is
/// not an error.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let mut rest = &buffer[..];
    let frame = decode_slice(&mut rest)?;
    let (len, left) = (buffer.len(), rest.len());
    match frame {
        Some(_) => buffer.advance(len - left),
        // Room for exactly what was announced, which `Header::decode` has bounded.
        None => buffer.reserve(missing(buffer)),
    }
    Ok(frame)
}

/// Decodes a frame like [`decode`], from a slice.
pub fn decode_slice(bytes: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
    let Some(header) = Header::decode(bytes)? else {
        return Ok(None);
    };
    let len = HEADER_LEN + header.body_len();
    if bytes.len() < len {
        return Ok(None);
    }
    let (whole, rest) = bytes.split_at(len);
    *bytes = rest;
    // Copied, so that a result which waits to be collected does not keep a receive buffer alive.
    let body = page_pool::copy(&whole[HEADER_LEN..]);
    Ok(Some(Frame { header, body }))
}

/// Number of bytes that are missing to complete the header, or the frame, that `bytes` begin with.
pub fn missing(bytes: &[u8]) -> usize {
    let wanted = match Header::decode(bytes) {
        Ok(Some(header)) => HEADER_LEN + header.body_len(),
        _ => HEADER_LEN,
    };
    wanted.saturating_sub(bytes.len())
}

/// Bytes that are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No [`Kind`] has this number.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// A flag that does not exist is set, or a reserved byte is not zero.
    #[error("unknown frame flags {flags:#x}, reserved {reserved:#x}")]
    BadFlags {
        /// The flags as received.
        flags: u8,
        /// The reserved bytes as received.
        reserved: u16,
    },
    /// The body would be longer than [`MAX_BODY`].
    #[error("a frame announces a body of {0} bytes, more than the limit of {MAX_BODY}")]
    TooLong(u32),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        (
            prop_oneof![
                Just(Kind::Control),
                Just(Kind::Data),
                Just(Kind::Output),
                Just(Kind::Cancel),
                Just(Kind::Seed),
                Just(Kind::State),
                Just(Kind::Blob),
                Just(Kind::Limit)
            ],
            0u8..128,
            any::<u32>(),
            any::<u64>(),
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..64),
                prop::collection::vec(any::<u8>(), 8000..9000),
                Just(vec![7u8; MAX_BODY])
            ],
        )
            .prop_map(|(kind, flags, worker, task, body)| {
                Frame::new(kind, flags, worker, task, body.into())
            })
    }

    proptest! {
        #[test]
        fn any_sequence_of_frames_survives_any_cutting(
            frames in prop::collection::vec(any_frame(), 0..8),
            cuts in prop::collection::vec(1usize..70_000, 0..40),
        ) {
            let mut wire = BytesMut::new();
            for frame in &frames {
                frame.header.encode(&mut wire);
                wire.extend_from_slice(&frame.body);
            }
            let mut received = BytesMut::new();
            let mut decoded = Vec::new();
            let mut cuts = cuts.into_iter();
            while !wire.is_empty() {
                let n = cuts.next().unwrap_or(usize::MAX).min(wire.len());
                received.extend_from_slice(&wire.split_to(n));
                while let Some(frame) = decode(&mut received).unwrap() {
                    decoded.push(frame);
                }
            }
            prop_assert_eq!(decoded, frames);
            prop_assert!(received.is_empty());
        }

        #[test]
        fn random_bytes_never_panic_and_never_allocate_more_than_a_frame(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer) {}
            prop_assert!(buffer.capacity() <= 2 * (HEADER_LEN + MAX_BODY));
        }
    }

    #[test]
    fn golden_header() {
        let header = Header {
            kind: Kind::Data,
            flags: FIRST | LAST,
            worker: 0x0102_0304,
            task: 0x0506_0708_090a_0b0c,
            len: 0x1000,
        };
        let bytes = header.to_bytes();
        assert_eq!(
            bytes,
            [
                2, 3, 0, 0, 4, 3, 2, 1, 0x0c, 0x0b, 0x0a, 9, 8, 7, 6, 5, 0, 0x10, 0, 0
            ]
        );
        assert_eq!(Header::decode(&bytes), Ok(Some(header)));
    }

    #[test]
    fn a_length_above_the_limit_is_refused_and_one_at_the_limit_is_not() {
        let mut header = Frame::new(Kind::Data, 0, 0, 0, Bytes::new()).header;
        header.len = MAX_BODY as u32;
        assert!(Header::decode(&header.to_bytes()).is_ok());
        header.len = MAX_BODY as u32 + 1;
        assert_eq!(
            Header::decode(&header.to_bytes()),
            Err(FrameError::TooLong(header.len))
        );
        header.len = u32::MAX;
        assert!(Header::decode(&header.to_bytes()).is_err());
    }

    #[test]
    fn unknown_kinds_and_flags_are_refused() {
        let mut bytes = Frame::credit(1, 2, 3).header.to_bytes();
        assert!(Header::decode(&bytes).is_ok());
        bytes[1] = 128;
        assert!(Header::decode(&bytes).is_err());
        bytes[1] = 0;
        bytes[2] = 1;
        assert!(Header::decode(&bytes).is_err());
        bytes[2] = 0;
        bytes[0] = 0;
        assert_eq!(Header::decode(&bytes), Err(FrameError::UnknownKind(0)));
    }
}
