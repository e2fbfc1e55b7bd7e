//! Flow control of results: how much of which result an agent may send now.
//!
//! An agent sends the first [`RESULT_WINDOW`] bytes of a result without being asked. Of a larger result the
//! head then asks for a [`GRANT`] at a time, or, if it is in shared memory, for all of it at once. The head
//! asks while what it buffers, and what is granted and has not arrived, is below the limit. Beyond the limit
//! it asks only for what R waits for.
//!
//! A pure state machine. Like the scheduler, which owns it, it contains no I/O and no clock. It
//! knows workers by rank and hosts by index, and nothing of tasks.

use super::MAX_SHARED_RESULTS;
use super::events::{Demand, RankSet};
use crate::protocol::body::{Body, Memory};
use crate::protocol::control::Facts;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{FIRST, LAST};
use crate::protocol::ids::Rank;
use crate::protocol::limits::{GRANT, RESULT_WINDOW};
use bytes::Bytes;
use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;

/// Maximum number of large results of one host that stream at a time.
const MAX_STREAMING: usize = 4;

/// The result of the task that a worker has.
#[derive(Debug)]
struct Incoming {
    /// The part of the result that has arrived.
    body: Body,
    /// The result is not wanted any more: bytes that still arrive are discarded.
    dropped: bool,
    /// Bytes that have arrived, including discarded ones.
    received: usize,
    /// Total bytes that the agent may send.
    granted: usize,
    /// The result is in the queue of those that are blocked on credit.
    blocked: bool,
    /// The result has been granted more than the first window.
    beyond_window: bool,
    /// The length of the result, if it was announced in shared memory; it arrives as a whole.
    announced: Option<usize>,
}

impl Incoming {
    /// Bytes granted beyond the first window that have not arrived and are still wanted.
    fn reserved(&self) -> usize {
        if self.dropped {
            return 0;
        }
        self.granted - self.received.clamp(RESULT_WINDOW, self.granted)
    }

    /// Whether the result is streaming: it was granted more than the first window and has credit
    /// left.
    fn streams(&self) -> bool {
        !self.dropped && !self.blocked && self.granted > RESULT_WINDOW
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct ResultFlow {
    /// Maximum number of bytes to buffer.
    limit: usize,
    /// The result of each worker's task, by rank.
    incoming: Vec<Option<Incoming>>,
    /// The host of each worker.
    hosts: Vec<usize>,
    /// Results of each host that have been granted more than the first window.
    beyond_window: Vec<usize>,
    /// Buffered bytes, of complete and incomplete results, until R takes them.
    buffered: usize,
    /// Bytes granted beyond the first windows that have not arrived.
    reserved: usize,
    /// Workers whose results are blocked on credit.
    blocked: VecDeque<Rank>,
    /// Number of results that are streaming.
    streaming: usize,
    /// The worker whose result completes beyond the limit, because no other result can.
    over_limit: Option<Rank>,
    /// Counts the buffered results in shared memory: one reference for each, and one more.
    shared_results: Arc<()>,
    demand: Demand,
    /// R is blocked in sending: results must arrive, or head and workers would wait for each other.
    unlimited: bool,
}

impl ResultFlow {
    /// `hosts`: the host of each worker. `limit`: bytes to buffer.
    pub(super) fn new(hosts: Vec<usize>, limit: usize) -> ResultFlow {
        let count = hosts.iter().max().map_or(0, |last| last + 1);
        ResultFlow {
            limit,
            incoming: hosts.iter().map(|_| None).collect(),
            hosts,
            beyond_window: vec![0; count],
            buffered: 0,
            reserved: 0,
            blocked: VecDeque::new(),
            streaming: 0,
            over_limit: None,
            shared_results: Arc::new(()),
            demand: Demand::Nothing,
            unlimited: false,
        }
    }

    /// Adds a host.
    pub(super) fn add_host(&mut self) {
        self.beyond_window.push(0);
    }

    /// Adds a worker of this host, with the next rank.
    pub(super) fn add_worker(&mut self, host: usize) {
        self.incoming.push(None);
        self.hosts.push(host);
        self.beyond_window
            .resize(self.beyond_window.len().max(host + 1), 0);
    }

    /// Adds the facts about all results to a bug report.
    pub(super) fn facts(&self, facts: &mut Facts) {
        facts.add_debug("demand", &self.demand);
        facts.add("results_buffered", self.buffered);
        facts.add("results_granted", self.reserved);
        facts.add("buffer_limit", self.limit);
        facts.add("results_blocked_on_credit", self.blocked.len());
        facts.add("results_streaming", self.streaming);
        facts.add("unlimited", self.unlimited);
    }

    /// Adds the facts about the result of a worker's task to a bug report.
    pub(super) fn result_facts(&self, rank: Rank, facts: &mut Facts) {
        if let Some(incoming) = self.of(rank) {
            facts.add("result_bytes", incoming.received);
            facts.add("result_granted", incoming.granted);
            facts.add("blocked_on_credit", incoming.blocked);
            facts.add_some("shared_memory_result", incoming.announced);
        }
    }

    /// Adds the facts about the results of a host to a bug report.
    pub(super) fn host_facts(&self, host: usize, facts: &mut Facts) {
        facts.add_some("large_results_started", self.beyond_window.get(host));
    }

    /// A worker has a task, whose result may arrive from now on. `dropped`: the result is not
    /// wanted.
    pub(super) fn begin(&mut self, rank: Rank, dropped: bool) {
        self.end(rank);
        if let Some(incoming) = self.incoming.get_mut(rank as usize) {
            *incoming = Some(Incoming {
                body: Body::default(),
                dropped,
                received: 0,
                granted: RESULT_WINDOW,
                blocked: false,
                beyond_window: false,
                announced: None,
            });
        }
    }

    /// The worker has no task any more. The buffered part of its result is discarded.
    pub(super) fn end(&mut self, rank: Rank) {
        self.drop_result(rank);
        let ended = self.incoming.get_mut(rank as usize).and_then(Option::take);
        if ended.is_some_and(|incoming| incoming.blocked) {
            self.blocked.retain(|&blocked| blocked != rank);
        }
    }

    /// The result is not wanted any more: it takes no room from others.
    pub(super) fn drop_result(&mut self, rank: Rank) {
        let Some(incoming) = self
            .incoming
            .get_mut(rank as usize)
            .and_then(Option::as_mut)
        else {
            return;
        };
        self.reserved -= incoming.reserved();
        self.streaming -= usize::from(incoming.streams());
        self.buffered -= incoming.body.len;
        incoming.body = Body::default();
        incoming.dropped = true;
        if mem::take(&mut incoming.beyond_window) {
            self.beyond_window[self.hosts[rank as usize]] -= 1;
        }
    }

    /// A part of the result has arrived, with [`FIRST`] and [`LAST`] among its flags: a chunk, or the memory
    /// that holds all of it.
    ///
    /// # Errors
    /// When it was not granted.
    pub(super) fn receive(
        &mut self,
        rank: Rank,
        flags: u8,
        chunk: Bytes,
        memory: Option<Memory>,
    ) -> Result<(), ProtocolError> {
        let Some(incoming) = self
            .incoming
            .get_mut(rank as usize)
            .and_then(Option::as_mut)
        else {
            return Err(ProtocolError(format!("a result of idle worker {rank}")));
        };
        let len = memory.as_ref().map_or(chunk.len(), |memory| memory.len);
        let before = incoming.reserved();
        incoming.received = incoming.received.saturating_add(len);
        if memory.is_some() {
            // The agent may have taken credit for an earlier part of the result as credit for this
            // one.
            incoming.granted = incoming.granted.max(incoming.received);
        }
        self.reserved -= before - incoming.reserved();
        if incoming.received > incoming.granted {
            return Err(ProtocolError(format!(
                "worker {rank} sent {} bytes, {} were granted",
                incoming.received, incoming.granted
            )));
        }
        if incoming.dropped {
            return Ok(());
        }
        if flags & FIRST != 0 {
            self.buffered -= incoming.body.len;
            incoming.body = Body::default();
        }
        self.buffered += len;
        match memory {
            Some(memory) => {
                let _counted = Some(self.shared_results.clone());
                incoming.body.len = len;
                incoming.body.memory = Some(Memory { _counted, ..memory });
            }
            None => incoming.body.push(chunk),
        }
        if flags & LAST == 0 && incoming.granted - incoming.received < RESULT_WINDOW / 2 {
            self.block(rank);
        }
        Ok(())
    }

    /// The worker announces a result of this length in shared memory.
    ///
    /// # Errors
    /// When the result was announced before.
    pub(super) fn announce(&mut self, rank: Rank, len: usize) -> Result<(), ProtocolError> {
        let incoming = self
            .incoming
            .get_mut(rank as usize)
            .and_then(Option::as_mut);
        let Some(incoming) = incoming else {
            return Ok(());
        };
        if incoming.announced.replace(len).is_some() {
            return Err(ProtocolError("a result that is announced twice".into()));
        }
        if !incoming.dropped {
            self.block(rank);
        }
        Ok(())
    }

    /// The bytes of the result of this worker, if it is in shared memory.
    pub(super) fn announced(&self, rank: Rank) -> Option<usize> {
        self.of(rank)?.announced
    }

    /// Takes the complete result. Its bytes count as buffered until [`ResultFlow::taken`].
    pub(super) fn complete(&mut self, rank: Rank) -> Body {
        let incoming = self
            .incoming
            .get_mut(rank as usize)
            .and_then(Option::as_mut);
        incoming.map_or_else(Body::default, |incoming| mem::take(&mut incoming.body))
    }

    /// R has taken results of this many bytes.
    pub(super) fn taken(&mut self, bytes: usize) {
        self.buffered -= bytes;
    }

    /// Sets which result R waits for.
    pub(super) fn demand(&mut self, demand: Demand) {
        self.demand = demand;
    }

    /// Sets whether R is blocked in sending.
    pub(super) fn set_unlimited(&mut self, unlimited: bool) {
        self.unlimited = unlimited;
    }

    /// Whether a result is blocked on credit.
    pub(super) fn is_blocked_on_credit(&self) -> bool {
        !self.blocked.is_empty()
    }

    /// Bytes of results that are buffered.
    pub(super) fn buffered(&self) -> usize {
        self.buffered
    }

    /// The workers for whose answers R waits, if it waits for any of them.
    pub(super) fn awaited(&self) -> RankSet {
        match &self.demand {
            Demand::AnyOf(ranks) => ranks.clone(),
            _ => RankSet::default(),
        }
    }

    /// The next grant: a worker, and how many more bytes of its result the agent may send.
    /// `is_demanded`: whether R takes the result of a worker as soon as it is complete, whatever
    /// the limit.
    pub(super) fn next_grant(
        &mut self,
        is_demanded: impl Fn(Rank) -> bool,
        is_awaited: impl Fn(Rank) -> bool,
    ) -> Option<(Rank, u32)> {
        loop {
            let at = self.next_blocked(&is_demanded, &is_awaited)?;
            let rank = self.blocked.remove(at)?;
            let incoming = self.incoming[rank as usize].as_mut();
            let Some(incoming) = incoming else {
                continue;
            };
            incoming.blocked = false;
            if incoming.dropped {
                continue;
            }
            if !mem::replace(&mut incoming.beyond_window, true) {
                self.beyond_window[self.hosts[rank as usize]] += 1;
            }
            let before = incoming.reserved();
            let more = incoming.announced.unwrap_or(GRANT);
            incoming.granted = incoming.granted.saturating_add(more);
            self.reserved += incoming.reserved() - before;
            self.streaming += usize::from(incoming.streams());
            return Some((rank, u32::try_from(more).unwrap_or(u32::MAX)));
        }
    }

    /// The position in the queue of the result that gets the next grant, if there is room for it or
    /// R waits for it.
    fn next_blocked(
        &mut self,
        is_demanded: impl Fn(Rank) -> bool,
        is_awaited: impl Fn(Rank) -> bool,
    ) -> Option<usize> {
        if self.blocked.is_empty() {
            return None;
        }
        if self.unlimited {
            return Some(0);
        }
        if let Some(at) = self.blocked.iter().position(|&rank| is_demanded(rank)) {
            return Some(at);
        }
        let first = self.blocked.iter().position(|&rank| self.may_stream(rank));
        if self.has_room(first) {
            return first;
        }
        match &self.demand {
            Demand::Rank(rank) => self.blocked.iter().position(|blocked| blocked == rank),
            // A single result completes beyond the limit: R takes it as soon as it is complete, or it frees a worker for
            // the call that R waits for.
            _ if self.streaming == 0 => {
                let same = |&rank: &Rank| Some(rank) == self.over_limit && is_awaited(rank);
                let same = self.blocked.iter().position(same);
                let any = || self.blocked.iter().position(|&rank| is_awaited(rank));
                let at = same.or_else(any)?;
                self.over_limit = self.blocked.get(at).copied();
                Some(at)
            }
            _ => None,
        }
    }

    /// Whether this result may stream now: only a few of a host's results do at a time. If all
    /// streamed at once, all would complete at the same time: they would leave the processor's
    /// caches before R reads them, and R could not begin with any of them earlier.
    fn may_stream(&self, rank: Rank) -> bool {
        let beyond_window = self
            .of(rank)
            .is_none_or(|incoming| incoming.beyond_window || incoming.dropped);
        beyond_window
            || self.demand == Demand::Rank(rank)
            || self.beyond_window[self.hosts[rank as usize]] < MAX_STREAMING
    }

    /// Whether there is room for more of a result, given by its position in the queue. A result in
    /// shared memory arrives as a whole and takes a descriptor.
    fn has_room(&self, at: Option<usize>) -> bool {
        let rank = at.and_then(|at| self.blocked.get(at));
        let used = self.buffered.saturating_add(self.reserved);
        match rank.and_then(|&rank| self.announced(rank)) {
            Some(len) => {
                used.saturating_add(len) <= self.limit
                    && Arc::strong_count(&self.shared_results) <= MAX_SHARED_RESULTS
            }
            None => used < self.limit,
        }
    }

    fn of(&self, rank: Rank) -> Option<&Incoming> {
        self.incoming.get(rank as usize)?.as_ref()
    }

    /// Queues a result that needs credit. A streaming result goes first.
    fn block(&mut self, rank: Rank) {
        let incoming = self
            .incoming
            .get_mut(rank as usize)
            .and_then(Option::as_mut);
        let Some(incoming) = incoming.filter(|incoming| !incoming.blocked) else {
            return;
        };
        self.streaming -= usize::from(incoming.streams());
        incoming.blocked = true;
        match incoming.beyond_window {
            true => self.blocked.push_front(rank),
            false => self.blocked.push_back(rank),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const W: usize = RESULT_WINDOW;

    /// Workers with a task each, all on one host.
    fn flow(workers: usize, limit: usize) -> ResultFlow {
        let mut flow = ResultFlow::new(vec![0; workers], limit);
        (0..workers as Rank).for_each(|rank| flow.begin(rank, false));
        flow
    }

    fn chunk(len: usize) -> Bytes {
        vec![0; len].into()
    }

    /// The first window of a result that is larger.
    fn first(flow: &mut ResultFlow, rank: Rank) {
        flow.receive(rank, FIRST, chunk(W), None).unwrap();
    }

    /// Workers that are granted more now.
    fn grants(flow: &mut ResultFlow) -> Vec<Rank> {
        let awaited = flow.awaited();
        let is_awaited = |rank| awaited.contains(rank);
        let grants = std::iter::from_fn(|| flow.next_grant(|_| false, is_awaited));
        grants.map(|(rank, _)| rank).collect()
    }

    #[test]
    fn a_small_result_needs_no_grant_and_counts_until_it_is_taken() {
        let mut flow = flow(1, 0);
        flow.receive(0, FIRST | LAST, chunk(W), None).unwrap();
        assert!(!flow.is_blocked_on_credit());
        assert_eq!(flow.complete(0).len, W);
        flow.end(0);
        assert_eq!(flow.buffered(), W);
        flow.taken(W);
        assert_eq!(flow.buffered(), 0);
    }

    #[test]
    fn a_large_result_is_granted_more_before_it_has_used_what_it_has() {
        let mut flow = flow(1, 10 * W);
        flow.receive(0, FIRST, chunk(W / 2), None).unwrap();
        assert!(!flow.is_blocked_on_credit());
        flow.receive(0, 0, chunk(1), None).unwrap();
        assert_eq!(
            flow.next_grant(|_| false, |_| false),
            Some((0, GRANT as u32))
        );
        assert_eq!(flow.next_grant(|_| false, |_| false), None);
        let rest = W / 2 - 1 + GRANT;
        flow.receive(0, 0, chunk(rest), None).unwrap();
        assert!(flow.receive(0, LAST, chunk(1), None).is_err());
    }

    #[test]
    fn nothing_is_granted_beyond_the_limit_until_r_takes_buffered_results() {
        let mut flow = flow(2, 2 * W);
        first(&mut flow, 0);
        // Granted bytes count as well.
        assert_eq!(grants(&mut flow), [0]);
        first(&mut flow, 1);
        assert_eq!(grants(&mut flow), []);
        flow.receive(0, LAST, chunk(GRANT), None).unwrap();
        flow.complete(0);
        flow.end(0);
        assert_eq!(grants(&mut flow), []);
        flow.taken(W + GRANT);
        assert_eq!(grants(&mut flow), [1]);
    }

    #[test]
    fn for_want_of_any_one_result_alone_is_completed_beyond_the_limit() {
        let mut flow = flow(2, 0);
        first(&mut flow, 0);
        first(&mut flow, 1);
        assert_eq!(grants(&mut flow), []);
        flow.demand(Demand::AnyOf((0..9).collect()));
        for _ in 0..3 {
            assert_eq!(grants(&mut flow), [0]);
            flow.receive(0, 0, chunk(GRANT), None).unwrap();
        }
        assert_eq!(grants(&mut flow), [0]);
        flow.end(0);
        assert_eq!(grants(&mut flow), [1]);
    }

    #[test]
    fn beyond_the_limit_a_result_frees_a_worker_for_the_call_that_r_waits_for() {
        let mut flow = flow(3, 0);
        first(&mut flow, 0);
        first(&mut flow, 1);
        first(&mut flow, 2);
        assert_eq!(grants(&mut flow), []);
        let may_run_the_call = |rank| rank > 0;
        assert_eq!(
            flow.next_grant(|_| false, may_run_the_call),
            Some((1, GRANT as u32))
        );
        assert_eq!(flow.next_grant(|_| false, may_run_the_call), None);
        flow.receive(1, 0, chunk(GRANT), None).unwrap();
        assert_eq!(
            flow.next_grant(|_| false, may_run_the_call),
            Some((1, GRANT as u32))
        );
    }

    #[test]
    fn only_a_result_that_r_waits_for_is_granted_beyond_the_limit() {
        let mut flow = flow(3, 0);
        (0..3).for_each(|rank| first(&mut flow, rank));
        flow.demand(Demand::Rank(1));
        assert_eq!(grants(&mut flow), [1]);
        flow.demand(Demand::Nothing);
        assert_eq!(
            flow.next_grant(|rank| rank == 2, |_| false),
            Some((2, GRANT as u32))
        );
        assert_eq!(flow.next_grant(|rank| rank == 2, |_| false), None);
        flow.set_unlimited(true);
        assert_eq!(grants(&mut flow), [0]);
    }

    #[test]
    fn few_results_of_a_host_are_streamed_at_a_time_and_those_first() {
        let hosts = [vec![0; MAX_STREAMING + 1], vec![1]].concat();
        let last = MAX_STREAMING as Rank;
        let mut flow = ResultFlow::new(hosts, 1 << 30);
        for rank in 0..=last + 1 {
            flow.begin(rank, false);
            first(&mut flow, rank);
        }
        let beyond_window: Vec<Rank> = (0..last).chain([last + 1]).collect();
        assert_eq!(grants(&mut flow), beyond_window);
        flow.receive(1, 0, chunk(GRANT), None).unwrap();
        assert_eq!(grants(&mut flow), [1]);
        // A dropped result makes room, like one that has ended.
        flow.drop_result(0);
        assert_eq!(grants(&mut flow), [last]);
    }

    #[test]
    fn a_dropped_result_holds_nothing_and_is_not_asked_for() {
        let mut flow = flow(2, 2 * W);
        first(&mut flow, 0);
        first(&mut flow, 1);
        assert_eq!(flow.buffered(), 2 * W);
        flow.drop_result(0);
        assert_eq!(flow.buffered(), W);
        assert_eq!(grants(&mut flow), [1]);
        // Granted bytes may still arrive, but no more.
        assert!(flow.receive(0, 0, chunk(1), None).is_err());
        flow.end(0);
        flow.begin(0, true);
        flow.receive(0, FIRST, chunk(W), None).unwrap();
        assert_eq!((flow.buffered(), flow.is_blocked_on_credit()), (W, false));
    }

    #[test]
    fn a_result_that_begins_anew_replaces_what_came_of_it() {
        let mut flow = flow(1, 1 << 30);
        flow.receive(0, FIRST, chunk(9), None).unwrap();
        flow.receive(0, FIRST | LAST, chunk(5), None).unwrap();
        assert_eq!((flow.buffered(), flow.complete(0).len), (5, 5));
    }

    #[test]
    fn a_result_in_shared_memory_is_granted_as_a_whole() {
        let len = 5 * GRANT;
        for (limit, granted) in [(len - 1, &[][..]), (len, &[0][..])] {
            let mut flow = flow(1, limit);
            flow.receive(0, FIRST, Bytes::new(), None).unwrap();
            flow.announce(0, len).unwrap();
            assert_eq!(flow.announced(0), Some(len));
            assert_eq!(grants(&mut flow), granted);
            assert!(flow.announce(0, len).is_err());
        }
    }

    #[test]
    fn a_result_that_ends_while_it_is_blocked_is_granted_nothing() {
        let mut flow = flow(1, 0);
        first(&mut flow, 0);
        assert!(flow.is_blocked_on_credit());
        flow.end(0);
        assert!(!flow.is_blocked_on_credit());
        assert_eq!(flow.buffered(), 0);
        assert!(flow.receive(0, FIRST, chunk(1), None).is_err());
        flow.set_unlimited(true);
        assert_eq!(grants(&mut flow), []);
    }
}
