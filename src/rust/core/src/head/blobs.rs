//! The blobs of one agent, as the head sees them: which blobs the agent knows, and which chunks have yet to be sent.
//! A blob, with which many messages begin, is sent to each host once.
//!
//! A blob is sent while it is being made, in turn with the messages of workers, and before any message that begins
//! with it. When a blob is dropped, its agent is notified once no queued message begins with it.
//! [`crate::agent::blobs`] and [`crate::worker::channel`] describe how agents and workers use blobs.

use crate::protocol::dedup::{CacheIndex, Chunk, SentChunks};
use crate::protocol::frame::{ABORT, FIRST, Frame, Kind, LAST, MAX_BODY};
use crate::protocol::ids::BlobId;
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Counts the bytes of a chunk in the head's memory once, however many agents the chunk waits for.
type Counted = Arc<usize>;

/// The number of bytes that are freed, if this was the last agent that they waited for.
fn release(counted: Counted) -> usize {
    Arc::into_inner(counted).unwrap_or(0)
}

#[derive(Debug)]
struct Stream {
    id: BlobId,
    chunks: VecDeque<Chunk>,
    counted: VecDeque<Counted>,
    /// No chunk of the blob has been sent yet.
    first: bool,
    /// The last chunk has been appended.
    complete: bool,
}

impl Stream {
    fn end(self) -> usize {
        self.counted.into_iter().map(release).sum()
    }
}

#[derive(Debug, Default)]
struct BlobState {
    complete: bool,
    /// The agent knows the blob.
    announced: bool,
    dropped: bool,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct HostBlobs {
    known: HashMap<BlobId, BlobState>,
    /// The blobs to be sent, one after the other.
    streams: VecDeque<Stream>,
    /// Turns of workers since the last chunk.
    turns: usize,
    /// Number of known blobs that have been dropped.
    dropped: usize,
}

impl HostBlobs {
    /// Starts a blob, whose chunks follow. Returns whether the blob was unknown.
    pub fn begin(&mut self, id: BlobId) -> bool {
        if self.known.contains_key(&id) {
            return false;
        }
        self.known.insert(id, BlobState::default());
        self.streams.push_back(Stream {
            id,
            chunks: VecDeque::new(),
            counted: VecDeque::new(),
            first: true,
            complete: false,
        });
        true
    }

    /// Appends a chunk of at most [`MAX_BODY`] bytes, if the blob is incomplete.
    pub fn append(&mut self, id: BlobId, chunk: &Chunk, counted: &Counted, last: bool) {
        let open = |stream: &&mut Stream| stream.id == id && !stream.complete;
        let Some(stream) = self.streams.iter_mut().find(open) else {
            return;
        };
        if !chunk.bytes.is_empty() {
            stream.chunks.push_back(chunk.clone());
            stream.counted.push_back(counted.clone());
        }
        if last {
            stream.complete = true;
            self.known.entry(id).or_default().complete = true;
        }
    }

    /// Whether messages may begin with this blob.
    pub fn has(&self, id: BlobId) -> bool {
        let state = self.known.get(&id);
        state.is_some_and(|state| state.complete && !state.dropped)
    }

    /// Whether chunks of this blob have yet to be sent to the agent.
    pub fn is_in_flight(&self, id: BlobId) -> bool {
        self.streams.iter().any(|stream| stream.id == id)
    }

    /// Aborts an incomplete blob.
    pub fn abort(&mut self, id: BlobId) {
        if self.known.get(&id).is_some_and(|state| !state.complete) {
            self.drop_blob(id);
        }
    }

    /// Drops a blob: no more messages will begin with it.
    pub fn drop_blob(&mut self, id: BlobId) {
        if let Some(state) = self.known.get_mut(&id) {
            self.dropped += usize::from(!state.dropped);
            state.dropped = true;
        }
    }

    /// Forgets a dropped blob, if there is one with which no queued message begins. `needed`: whether a queued
    /// message begins with a blob. Returns the frame that notifies the agent, if the agent knows the blob, and the
    /// number of released bytes.
    pub fn forget(&mut self, needed: impl Fn(BlobId) -> bool) -> Option<(Option<Frame>, usize)> {
        if self.dropped == 0 {
            return None;
        }
        let mut known = self.known.iter();
        let unneeded = known.find(|&(&id, state)| state.dropped && !needed(id));
        let id = *unneeded?.0;
        let state = self.known.remove(&id)?;
        self.dropped -= 1;
        let at = self.streams.iter().position(|stream| stream.id == id);
        let stream = at.and_then(|at| self.streams.remove(at));
        let notify = || Frame::new(Kind::Blob, LAST | ABORT, 0, id, Bytes::new());
        Some((state.announced.then(notify), stream.map_or(0, Stream::end)))
    }

    /// The next frame, and the number of bytes that it releases. `None` if it is the turn of one of the other senders.
    pub fn next(
        &mut self,
        others: usize,
        cache_index: Option<&mut CacheIndex>,
    ) -> Option<(Frame, usize)> {
        let stream = self.streams.front_mut()?;
        if stream.chunks.is_empty() && !stream.complete {
            return None;
        }
        if self.turns < others {
            self.turns += 1;
            return None;
        }
        self.turns = 0;
        let before = stream.chunks.len();
        let sent = match cache_index {
            Some(cache_index) => cache_index.send(&mut stream.chunks, MAX_BODY),
            None => SentChunks {
                body: stream.chunks.pop_front().unwrap_or_default().bytes,
                ..SentChunks::default()
            },
        };
        let count = before - stream.chunks.len();
        let released = stream.counted.drain(..count).map(release).sum();
        let mut flags = sent.flags;
        if std::mem::replace(&mut stream.first, false) {
            flags |= FIRST;
        }
        let id = stream.id;
        self.known.entry(id).or_default().announced = true;
        if stream.complete && stream.chunks.is_empty() {
            flags |= LAST;
            self.streams.pop_front();
        }
        let frame = Frame::new(Kind::Blob, flags, 0, id, sent.body);
        Some((frame, released))
    }

    /// Forgets all blobs, because the agent is lost. Returns the number of released bytes.
    pub fn clear(&mut self) -> usize {
        let streams = std::mem::take(&mut self.streams);
        *self = HostBlobs::default();
        streams.into_iter().map(Stream::end).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::ids::BlobId;

    fn append(all: &mut [HostBlobs], id: BlobId, len: usize, last: bool) {
        let chunk = Chunk::from(Bytes::from(vec![0; len]));
        let counted = Arc::new(len);
        for blobs in all {
            blobs.append(id, &chunk, &counted, last);
        }
    }

    fn flags(next: Option<(Frame, usize)>) -> Option<(u8, usize)> {
        next.map(|(frame, released)| (frame.header.flags, released))
    }

    #[test]
    fn a_chunk_is_released_when_it_was_sent_to_the_last_agent() {
        let mut all = [
            HostBlobs::default(),
            HostBlobs::default(),
            HostBlobs::default(),
        ];
        all.iter_mut().for_each(|blobs| assert!(blobs.begin(1)));
        append(&mut all, 1, 10, false);
        append(&mut all, 1, 20, false);
        assert!(!all[0].has(1));
        append(&mut all, 1, 0, true);
        assert!(all[0].has(1) && all[0].is_in_flight(1));
        assert_eq!(flags(all[0].next(0, None)), Some((FIRST, 0)));
        assert_eq!(all[1].clear(), 0);
        assert_eq!(flags(all[2].next(0, None)), Some((FIRST, 10)));
        assert_eq!(flags(all[0].next(0, None)), Some((LAST, 0)));
        assert_eq!(flags(all[2].next(0, None)), Some((LAST, 20)));
        assert_eq!(flags(all[0].next(0, None)), None);
        assert!(all[0].has(1) && !all[0].is_in_flight(1) && !all[1].has(1));
        assert!(!all[0].begin(1) && all[1].begin(1));
    }

    #[test]
    fn blobs_take_turns_with_workers() {
        let mut blobs = [HostBlobs::default()];
        blobs[0].begin(1);
        assert_eq!(flags(blobs[0].next(0, None)), None);
        (0..3).for_each(|_| append(&mut blobs, 1, 10, false));
        let turns: Vec<bool> = (0..7).map(|_| blobs[0].next(2, None).is_some()).collect();
        assert_eq!(turns, [false, false, true, false, false, true, false]);
    }

    #[test]
    fn an_agent_is_notified_of_a_dropped_blob_once_no_message_needs_it() {
        let mut blobs = [HostBlobs::default()];
        blobs[0].begin(1);
        append(&mut blobs, 1, 10, true);
        assert!(blobs[0].forget(|_| false).is_none());
        blobs[0].drop_blob(1);
        blobs[0].drop_blob(1);
        assert!(!blobs[0].has(1));
        assert!(blobs[0].forget(|id| id == 1).is_none());
        blobs[0].next(0, None);
        let (frame, released) = blobs[0].forget(|_| false).unwrap();
        assert_eq!((frame.unwrap().header.flags, released), (LAST | ABORT, 0));
        assert!(blobs[0].forget(|_| false).is_none());
        // No chunk has been sent.
        blobs[0].begin(2);
        append(&mut blobs, 2, 10, false);
        blobs[0].abort(2);
        assert_eq!(blobs[0].forget(|_| false), Some((None, 10)));
        // A complete blob is not aborted.
        blobs[0].begin(3);
        append(&mut blobs, 3, 10, true);
        blobs[0].abort(3);
        assert!(blobs[0].has(3));
    }
}
