//! How R's thread writes messages: of tasks, of calls, and payloads.

use super::client::{Begun, Hub, NO_JOB, Turn, stand_in};
use super::core::Core;
use super::futures::CallEnd;
use crate::head::scheduler::events::Gone;
use crate::head::scheduler::task::Order;
use crate::protocol::dedup::{self, Chunk};
use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::{CALLS, JobId, PayloadId, Rank, TaskId};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of tasks that may wait to be sent before R's thread waits too.
pub(super) const SEND_LIMIT: usize = 8 * 1024 * 1024;

/// Bytes of a message that are looked at together for where to cut them.
pub(super) const CUT: usize = 4 * MAX_BODY;

#[derive(Debug)]
pub(super) struct Writing {
    pub(super) order: Order,
    /// The worker that R gave it to.
    owner: Rank,
    /// It has been outstanding before.
    again: bool,
    /// The payload that it is to begin with, if its host gets it.
    wanted: Option<PayloadId>,
    buffer: Vec<u8>,
    first: bool,
    /// How a call that is tried again has ended: so it has if it cannot be written.
    end: Option<CallEnd>,
}

/// A payload that is being written.
#[derive(Debug)]
pub(super) struct Sharing {
    id: PayloadId,
    buffer: Vec<u8>,
    /// It is new, and what lasts begins with it.
    spooled: bool,
}

impl Writing {
    pub(super) fn new(order: Order, owner: Rank, again: bool) -> Writing {
        Writing {
            order,
            owner,
            again,
            wanted: None,
            buffer: Vec::new(),
            first: true,
            end: None,
        }
    }

    fn is_call(&self) -> bool {
        self.order.any_of.is_some()
    }

    /// Lets the message begin with the payload that it is to begin with, if that is possible and
    /// nothing of it has been submitted. Returns whether it does.
    pub(super) fn share(&mut self, core: &Core) -> bool {
        if self.first {
            let order = &self.order;
            // Without it in the file, its host could not be taken back.
            let spool = core.spool.as_ref().filter(|_| order.lasts.is_some());
            let spooled = |id| spool.is_none_or(|s| !s.is_complete() || s.has_payload(id));
            let has = |&id: &PayloadId| core.scheduler.has_payload(order.rank, id) && spooled(id);
            self.order.payload = self.wanted.filter(has);
        }
        self.order.payload.is_some()
    }
}

/// Takes from the buffer what is to be submitted next; all of it if it is the `last`.
fn take_chunks(buffer: &mut Vec<u8>, shares: bool, last: bool) -> Vec<Chunk> {
    if shares {
        return dedup::cut(buffer, last);
    }
    let room = if last { 0 } else { MAX_BODY };
    let buffer = std::mem::replace(buffer, Vec::with_capacity(room));
    vec![Bytes::from(buffer).into()]
}

fn submit_payload(core: &mut Core, sharing: &Sharing, mut chunks: Vec<Chunk>, last: bool) {
    if last && chunks.is_empty() {
        chunks.push(Chunk::default());
    }
    if let Some(spool) = core.spool.as_mut().filter(|_| sharing.spooled) {
        spool.write_payload(&chunks);
    }
    let count = chunks.len();
    for (at, chunk) in chunks.into_iter().enumerate() {
        let last = last && at + 1 == count;
        if core.scheduler.append_payload(sharing.id, &chunk, last) {
            core.queued += chunk.bytes.len();
        }
    }
    core.settle();
}

fn submit(core: &mut Core, writing: &mut Writing, mut chunks: Vec<Chunk>, last: bool) {
    if last && chunks.is_empty() {
        chunks.push(Chunk::default());
    }
    if writing.is_call() {
        return submit_call(core, writing, chunks, last);
    }
    if std::mem::replace(&mut writing.first, false) {
        let order = &writing.order;
        core.inbox
            .tasks
            .begin(order.task, writing.owner, order.rank);
        if let (Some(spool), Some(name)) = (&mut core.spool, writing.order.lasts) {
            let order = &writing.order;
            spool.begin(order.task, order.rank, name, order.payload);
        }
        core.scheduler.submit(writing.order.clone());
    }
    let &Order { rank, task, .. } = &writing.order;
    if let Some(spool) = &mut core.spool {
        spool.write(&chunks);
    }
    let count = chunks.len();
    for (at, chunk) in chunks.into_iter().enumerate() {
        core.queued += chunk.bytes.len();
        let last = last && at + 1 == count;
        core.scheduler.append(rank, task, chunk, last);
    }
    core.settle();
}

/// R does not wait for calls to be sent: their bytes are held until a worker is free.
fn submit_call(core: &mut Core, writing: &mut Writing, chunks: Vec<Chunk>, last: bool) {
    let task = writing.order.task;
    if std::mem::replace(&mut writing.first, false) {
        core.inbox.calls.expect(task);
        core.scheduler.submit(writing.order.clone());
    }
    let count = chunks.len();
    for (at, chunk) in chunks.into_iter().enumerate() {
        let last = last && at + 1 == count;
        core.scheduler.append_call(task, chunk, last);
    }
    if last && core.inbox.calls.is_watched(task) {
        core.scheduler.want_call(task);
    }
    core.settle();
}

impl Hub {
    /// Begins a task for a worker; [`Hub::write`] and [`Hub::finish`] follow. `lasts`: what it does
    /// there lasts, under this name (0: none). A verb that finds tasks of others on its worker
    /// cancels them: they are left over from a call that was interrupted, and their answers would be
    /// taken for its own. If the worker was lost in the course of this very job, another stands in.
    /// `payload`: of the worker that gets the task, the payload that its message is to begin with,
    /// which has been finished.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn begin(
        &mut self,
        rank: Rank,
        job: JobId,
        lasts: Option<u64>,
        turn: Turn,
        payload: impl FnOnce(Rank) -> Option<PayloadId>,
    ) -> Result<Begun, Arc<Gone>> {
        self.abandon();
        if self.members.0 != job || self.members.1.is_empty() {
            self.members = (job, vec![false; self.size]);
        }
        let (place, stale) = {
            let mut core = self.core();
            core.inbox.job = job;
            let workers = &core.inbox.workers;
            let worker = workers.get(rank as usize).cloned().unwrap_or_default();
            let place = match worker.gone {
                // If it is back while others are still at its tasks, they go on with them, in order.
                None => stand_in(&core, rank, job).unwrap_or(rank),
                Some(gone) => {
                    let just_now = worker.gone_in == job;
                    let stand_in = || self.elsewhere(&core, rank, &gone, job, lasts);
                    just_now.then(stand_in).flatten().ok_or(gone)?
                }
            };
            let of_owner = core.inbox.tasks.of_owner(rank);
            let stale = of_owner.filter(|&(_, other)| job != NO_JOB && other != job);
            (place, stale.collect::<Vec<_>>())
        };
        self.members.1[rank as usize] = true;
        for (task, _) in stale {
            self.cancel_task(rank, task);
        }
        let behind_call = {
            let mut core = self.core();
            if job != NO_JOB {
                core.scheduler.keep_for_verb(place);
            }
            core.scheduler.is_at_call(place)
        };
        let task = self.next_task;
        self.next_task += 1;
        let order = Order {
            rank: place,
            task,
            job,
            lasts,
            ahead: turn == Turn::Ahead,
            again: turn == Turn::First,
            ..Order::default()
        };
        let shared = self.write_order(order, rank, false, payload(place));
        Ok(Begun {
            task,
            place,
            shared,
            behind_call,
        })
    }

    /// The task that was begun last may take so long from when its worker has all of its message; `None`: as long
    /// as any task may.
    pub fn limit_time(&mut self, limit: Option<Duration>) {
        if let Some(writing) = &mut self.writing {
            writing.order.limit = limit;
        }
    }

    /// As [`Hub::begin`], for a task that was lost: with the worker that takes the place of the lost
    /// one, or if there is none, with another.
    ///
    /// # Errors
    /// When there is nobody to take it: the worker that had it last, and what became of that.
    pub fn try_again(
        &mut self,
        rank: Rank,
        task: TaskId,
        lasts: Option<u64>,
        payload: impl FnOnce(Rank) -> Option<PayloadId>,
    ) -> Result<Begun, (Rank, Arc<Gone>)> {
        self.abandon();
        let (job, before, place) = {
            let mut core = self.core();
            let tasks = &core.inbox.tasks;
            let job = tasks.job(task).unwrap_or(NO_JOB);
            let before = tasks.place(task).unwrap_or(rank);
            let worker = core.inbox.workers.get(before as usize);
            let place = match worker.and_then(|worker| worker.gone.clone()) {
                None => before,
                Some(gone) => {
                    let stand_in = self.elsewhere(&core, rank, &gone, job, lasts);
                    stand_in.ok_or((before, gone))?
                }
            };
            core.inbox.tasks.decided(task);
            (job, before, place)
        };
        let order = Order {
            rank: place,
            task,
            job,
            again: place == before,
            lasts,
            ..Order::default()
        };
        let shared = self.write_order(order, rank, true, payload(place));
        Ok(Begun {
            task,
            place,
            shared,
            behind_call: false,
        })
    }

    /// The message of this task, which R gave to `owner`, is written next. `again`: it has been
    /// outstanding before. Returns whether it begins with the payload.
    fn write_order(
        &mut self,
        mut order: Order,
        owner: Rank,
        again: bool,
        payload: Option<PayloadId>,
    ) -> bool {
        if order.rank != owner {
            order.instead_of = Some(owner);
        }
        let mut writing = Writing::new(order, owner, again);
        writing.wanted = payload;
        let shared = writing.share(&self.core());
        self.writing = Some(writing);
        shared
    }

    /// Begins a payload for the hosts of these workers, with which messages to them can then begin;
    /// [`Hub::write`] and [`Hub::finish_payload`] follow. `lasts`: what some of these do lasts.
    pub fn begin_payload(&mut self, ranks: &[Rank], lasts: bool) -> PayloadId {
        self.abandon();
        let id = self.next_payload;
        self.next_payload += 1;
        let mut core = self.core();
        core.scheduler.begin_payload(id, ranks);
        let spool = core.spool.as_mut().filter(|_| lasts);
        let spooled = spool.is_some();
        if let Some(spool) = spool {
            spool.begin_payload(id);
        }
        drop(core);
        self.sharing = Some(Sharing {
            id,
            buffer: Vec::new(),
            spooled,
        });
        id
    }

    /// Begins the very same payload once more, for the host of this worker alone, which does not have
    /// it. If a task has been begun for that and nothing of its message written, that then begins
    /// with it, as [`Hub::finish_payload`] tells.
    pub fn begin_payload_again(&mut self, id: PayloadId, rank: Rank) {
        self.abandon_payload();
        self.core().scheduler.begin_payload(id, &[rank]);
        self.sharing = Some(Sharing {
            id,
            buffer: Vec::new(),
            spooled: false,
        });
    }

    /// Ends the payload: messages can begin with it. Returns whether that of the task which has been
    /// begun, if there is one, does.
    pub fn finish_payload(&mut self) -> bool {
        self.submit(true);
        self.end_payload()
    }

    /// All of the payload has been submitted.
    fn end_payload(&mut self) -> bool {
        let Some(sharing) = self.sharing.take() else {
            return false;
        };
        let shared = self.inner.shared.clone();
        let mut core = shared.core();
        if let Some(spool) = core.spool.as_mut().filter(|_| sharing.spooled) {
            spool.finish_payload();
        }
        core.look_at_spool();
        let writing = self.writing.as_mut();
        writing.is_some_and(|writing| writing.share(&core))
    }

    /// Whether a message to this worker can begin with this payload: its host has it.
    pub fn has_payload(&self, rank: Rank, id: PayloadId) -> bool {
        self.core().scheduler.has_payload(rank, id)
    }

    /// No more messages will begin with it. Those of tasks that have been finished do, whenever they
    /// are sent.
    pub fn drop_payload(&mut self, id: PayloadId) {
        let mut core = self.core();
        core.scheduler.drop_payload(id);
        if let Some(spool) = &mut core.spool {
            spool.drop_payload(id);
        }
        core.settle();
    }

    /// Takes back the payload that is being written, if there is one.
    fn abandon_payload(&mut self) {
        let Some(sharing) = self.sharing.take() else {
            return;
        };
        let mut core = self.core();
        core.scheduler.abort_payload(sharing.id);
        if let Some(spool) = core.spool.as_mut().filter(|_| sharing.spooled) {
            spool.abandon_payload();
        }
        core.scheduler.set_unlimited(false);
        core.settle();
    }

    /// Appends to the payload or message that is being written. Returns whether so much waits to be
    /// sent that the caller should call [`Hub::wait_to_send`] until that says no.
    pub fn write(&mut self, mut bytes: &[u8]) -> bool {
        let full = if self.shares { CUT } else { MAX_BODY };
        let mut sent = false;
        while let Some(buffer) = self.buffer() {
            let room = full - buffer.len().min(full);
            if bytes.len() <= room {
                buffer.extend_from_slice(bytes);
                break;
            }
            let (now, later) = bytes.split_at(room);
            buffer.extend_from_slice(now);
            bytes = later;
            self.submit(false);
            sent = true;
        }
        let waits = self.writing.as_ref().is_none_or(|w| !w.is_call());
        sent && waits && self.core().queued > SEND_LIMIT
    }

    pub(super) fn buffer(&mut self) -> Option<&mut Vec<u8>> {
        match (&mut self.sharing, &mut self.writing) {
            (Some(sharing), _) => Some(&mut sharing.buffer),
            (None, Some(writing)) => Some(&mut writing.buffer),
            (None, None) => None,
        }
    }

    /// Submits what is in the buffer; all of it if it is the `last` of a payload.
    fn submit(&mut self, last: bool) {
        if let Some(sharing) = &mut self.sharing {
            let chunks = take_chunks(&mut sharing.buffer, self.shares, last);
            submit_payload(&mut self.inner.shared.core(), sharing, chunks, last);
        } else if let Some(writing) = &mut self.writing {
            let chunks = take_chunks(&mut writing.buffer, self.shares, false);
            submit(&mut self.inner.shared.core(), writing, chunks, false);
        }
    }

    /// Waits up to `most` for what was written to be sent. Returns whether to wait on.
    pub fn wait_to_send(&mut self, most: Duration) -> bool {
        // Results must flow, whatever waits already: the workers that are to read what is sent may
        // be blocked in writing them.
        let mut core = self.core();
        core.scheduler.set_unlimited(true);
        core.settle();
        drop(core);
        let room = |core: &mut Core| (core.queued <= SEND_LIMIT || core.inbox.closed).then_some(());
        let wait = self.inner.shared.wait(most, room).is_none();
        if !wait {
            self.core().scheduler.set_unlimited(false);
        }
        wait
    }

    /// Ends the message; the task is now outstanding.
    pub fn finish(&mut self) {
        let shares = self.shares;
        self.finish_with(|writing| take_chunks(&mut writing.buffer, shares, true));
    }

    /// Ends the message with what `rest` makes of it.
    fn finish_with(&mut self, rest: impl FnOnce(&mut Writing) -> Vec<Chunk>) {
        let Some(mut writing) = self.writing.take() else {
            return;
        };
        let chunks = rest(&mut writing);
        let mut core = self.core();
        submit(&mut core, &mut writing, chunks, true);
        if !writing.again && !writing.is_call() {
            let order = &writing.order;
            core.inbox.tasks.finish(order.task, order.job);
        }
        if let Some(spool) = &mut core.spool {
            spool.finish();
        }
        core.look_at_spool();
    }

    /// Appends to the payload or message that is being written what is to be sent as it is, and ends that if
    /// it is the `last`.
    pub(super) fn write_as_it_is(&mut self, chunk: Chunk, last: bool) {
        if let Some(sharing) = &mut self.sharing {
            submit_payload(&mut self.inner.shared.core(), sharing, vec![chunk], last);
            if last {
                self.end_payload();
            }
        } else if last {
            self.finish_with(|_| vec![chunk]);
        } else if let Some(writing) = &mut self.writing {
            submit(&mut self.inner.shared.core(), writing, vec![chunk], false);
        }
    }

    /// Takes back the message and the payload that are being written, if there are any: R could not
    /// finish them.
    pub fn abandon(&mut self) {
        self.abandon_payload();
        let Some(writing) = self.writing.take() else {
            return;
        };
        let (owner, task) = (writing.owner, writing.order.task);
        if writing.is_call() {
            self.forget_call(task);
            if let Some(end) = writing.end {
                let mut core = self.core();
                core.inbox.calls.expect(task);
                core.inbox.calls.ended(end.rank, task, end.outcome);
            }
            return;
        }
        if let Some(spool) = &mut self.core().spool {
            spool.abandon();
        }
        if !writing.first {
            self.core().scheduler.set_unlimited(false);
            self.cancel_task(owner, task);
        }
        if writing.again {
            // Whoever would decide on it has been interrupted in doing so.
            self.forget(owner, task);
        }
    }

    /// Begins a call for whichever of these workers, which are in order, is free first; [`Hub::write`] and
    /// [`Hub::finish`] follow. `again`: it was lost and is tried again, before all others.
    pub fn begin_call(&mut self, any_of: Arc<[Rank]>, task: TaskId, again: bool) {
        self.abandon();
        let end = if again { self.call_end(task) } else { None };
        let order = Order {
            task,
            job: CALLS,
            again,
            any_of: Some(any_of),
            ..Order::default()
        };
        let mut writing = Writing::new(order, 0, again);
        writing.end = end;
        self.writing = Some(writing);
    }

    /// The number of a call that is still to be sent.
    pub fn number_call(&mut self) -> TaskId {
        let task = self.next_task;
        self.next_task += 1;
        task
    }

    /// Whether a message has been begun and not finished.
    pub fn is_writing(&self) -> bool {
        self.writing.is_some() || self.sharing.is_some()
    }
}
