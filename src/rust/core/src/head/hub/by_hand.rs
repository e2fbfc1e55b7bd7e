//! A hub without a thread, streams or a clock, for simulations: its creator moves the frames and sets the time. All
//! other code is that of the real hub.
//!
//! No frame arrives while such a hub waits, so callers pass a waiting time of zero.

use super::client::Hub;
use super::core::Hand;
use super::inbox::HostFailure;
use super::serve_host;
use crate::head::scheduler::Scheduler;
use crate::head::scheduler::events::Note;
use crate::protocol::body::Memory;
use crate::protocol::control::Hello;
use crate::protocol::dedup::Chunk;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::Frame;
use crate::protocol::ids::Rank;
use bytes::Bytes;
use std::io;
use std::time::Duration;
use tokio::sync::mpsc;

impl Hub {
    /// Creates a hub with this many hosts, of which none has greeted. [`Hub::greet`] and [`Hub::go`] follow.
    /// `result_limit`: bytes of results to buffer.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn by_hand(hosts: usize, result_limit: usize) -> io::Result<Hub> {
        let hub = Hub::without_thread(hosts, result_limit)?;
        let (launches, launched) = mpsc::unbounded_channel();
        let mut core = hub.core();
        core.launches = Some(launches);
        core.hand = Some(Hand {
            attached: vec![false; hosts],
            _launched: Some(launched),
            ..Hand::default()
        });
        drop(core);
        Ok(hub)
    }

    /// The agent of this host is in a batch job and dials back: see [`Source::DialBack`].
    ///
    /// [`Source::DialBack`]: crate::head::launch::Source::DialBack
    pub fn set_dials(&mut self, agent: usize) {
        self.core().conns[agent].dials = true;
    }

    /// An agent has greeted. `again`: it takes the place of an agent that has ended. Returns whether the agent may
    /// serve; if not, its stream is closed and [`Hub::agent_ended`] follows.
    ///
    /// # Errors
    /// When the head does not know what the agent is to start.
    pub fn greet(&mut self, agent: usize, hello: Hello, again: bool) -> io::Result<bool> {
        let mut core = self.core();
        core.update_clock();
        core.inbox.greeted(agent, hello);
        if again || core.conns[agent].awaited {
            if core.conns[agent].permanent {
                return Ok(false);
            }
            core.agent_back(agent)?;
        }
        if let Some(hand) = &mut core.hand {
            hand.attached
                .resize(hand.attached.len().max(agent + 1), false);
            hand.attached[agent] = true;
        }
        core.pump();
        core.changed();
        Ok(true)
    }

    /// The agent or the stream to it has ended, or no agent will come. Returns whether another agent may take its
    /// place.
    pub fn agent_ended(&mut self, agent: usize, reason: &str) -> bool {
        let shared_core = self.inner.shared_core.clone();
        if let Some(attached) = shared_core
            .core()
            .hand
            .as_mut()
            .and_then(|hand| hand.attached.get_mut(agent))
        {
            *attached = false;
        }
        serve_host::fail(&shared_core, agent, HostFailure::new(reason.to_owned()));
        let mut core = shared_core.core();
        let takes_back = core.takes_back(agent);
        core.inbox.hosts[agent].over = !takes_back;
        takes_back
    }

    /// Whether no agent of this host may join or come back any more.
    pub fn is_permanent(&self, agent: usize) -> bool {
        self.core().conns[agent].permanent
    }

    /// Whether set-up calls were logged for this worker that it has not completed.
    pub fn is_behind(&self, rank: Rank) -> bool {
        let core = self.core();
        let setup_log = core.setup_log.as_ref();
        setup_log.is_some_and(|setup_log| setup_log.is_behind(rank))
    }

    /// The messages of the set-up calls with which a worker would be restored now, in order.
    ///
    /// # Errors
    /// When the file of the set-up log cannot be mapped.
    pub fn logged_setup_calls(&self, rank: Rank) -> io::Result<Vec<Vec<Bytes>>> {
        let core = self.core();
        let calls = core
            .setup_log
            .as_ref()
            .map(|setup_log| setup_log.restore(rank))
            .transpose()?;
        Ok(calls
            .into_iter()
            .flatten()
            .map(|(_, parts)| parts)
            .collect())
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
