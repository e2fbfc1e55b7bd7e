//! A hub without a thread, streams or a clock, for simulations: its creator moves the frames and sets the time. All
//! other code is that of the real hub.
//!
//! No frame arrives while such a hub waits, so callers pass a waiting time of zero.

use super::client::Hub;
use super::core::Hand;
use crate::head::scheduler::Scheduler;
use crate::head::scheduler::events::Note;
use crate::protocol::body::Memory;
use crate::protocol::dedup::Chunk;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::Frame;
use crate::protocol::ids::Rank;
use std::io;
use std::time::Duration;

impl Hub {
    /// Creates a hub whose hosts, with workers of these ranks, are all connected. `result_limit`: bytes of results to
    /// buffer. `chunk_cache_bytes`: size of each agent's chunk cache, if agents have one.
    /// `time_limit`: see [`Hub::limit_all`].
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn by_hand(
        ranks: Vec<Vec<Rank>>,
        result_limit: usize,
        chunk_cache_bytes: Option<usize>,
        time_limit: Option<Duration>,
    ) -> io::Result<Hub> {
        let hosts = ranks.len();
        let mut hub = Hub::without_thread(hosts, result_limit)?;
        hub.size = ranks.iter().map(Vec::len).sum();
        hub.has_chunk_cache = chunk_cache_bytes.is_some();
        let mut core = hub.core();
        core.hand = Some(Hand::default());
        core.time_limit = time_limit;
        core.set_ranks(ranks);
        if let Some(max_bytes) = chunk_cache_bytes {
            for agent in 0..hosts {
                core.scheduler.set_chunk_cache(agent, max_bytes);
            }
        }
        drop(core);
        Ok(hub)
    }

    /// Sets the time.
    pub fn set_clock(&mut self, now: Duration) {
        if let Some(hand) = &mut self.core().hand {
            hand.now = now;
        }
    }

    /// Returns the next frame to send to an agent.
    pub fn next_frame(&mut self, agent: usize) -> Option<Frame> {
        self.core().scheduler.next_frame(agent)
    }

    /// Handles a frame of an agent; `memory`: the shared memory that was sent with the frame.
    ///
    /// # Errors
    /// When the frame violates the protocol.
    pub fn on_frame(
        &mut self,
        agent: usize,
        frame: Frame,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let mut core = self.core();
        core.update_clock();
        let taken = core.scheduler.on_frame_with(agent, frame, memory);
        core.pump();
        taken
    }

    /// Takes the notes of the scheduler since the last call. The hub has already handled them.
    pub fn take_notes(&mut self) -> Vec<Note> {
        let mut core = self.core();
        core.pump();
        let hand = core.hand.as_mut();
        hand.map(|hand| std::mem::take(&mut hand.notes))
            .unwrap_or_default()
    }

    /// Calls `body` with the scheduler.
    pub fn with_scheduler<T>(&self, body: impl FnOnce(&mut Scheduler) -> T) -> T {
        let mut core = self.core();
        let result = body(&mut core.scheduler);
        core.pump();
        result
    }

    /// Number of bytes of tasks and blobs that have been submitted and not yet sent.
    pub fn queued(&self) -> usize {
        self.core().queued
    }

    /// Appends a chunk like [`Hub::write`], but sends it unchanged. The `last` chunk completes the message or blob that
    /// is being written.
    pub fn write_chunk(&mut self, chunk: Chunk, last: bool) {
        self.write_as_it_is(chunk, last);
    }
}
