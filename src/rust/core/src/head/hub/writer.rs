//! How R's thread writes messages of tasks and calls, and blobs.

use super::client::{Hub, substitute};
use super::core::Core;
use super::writing::{
    BlobWriting, MessageWriting, NO_JOB, StartedTask, Turn, submit, submit_blob, take_chunks,
};
use crate::head::scheduler::events::Termination;
use crate::head::scheduler::task::Order;
use crate::protocol::dedup::Chunk;
use crate::protocol::frame::MAX_BODY;
use crate::protocol::ids::{BlobId, CALLS, JobId, Rank, TaskId};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of tasks that may wait to be sent before R's thread waits too.
pub(super) const SEND_LIMIT: usize = 8 * 1024 * 1024;

/// Bytes of a message that are searched together for chunk boundaries.
pub(super) const CUT_AFTER: usize = 4 * MAX_BODY;

impl Hub {
    /// Begins a task for a worker; [`Hub::write`] and [`Hub::finish`] follow. `setup_call`: the
    /// task is a set-up call, which sets this name (0: none). `blob`: given the worker that gets
    /// the task, the finished blob that the message begins with. A verb cancels older tasks on its
    /// workers: they are left over from an interrupted call, and their answers would be taken for
    /// its own. If the worker failed during this job, another worker runs the task on its behalf.
    ///
    /// # Errors
    /// When the worker has terminated.
    pub fn begin(
        &mut self,
        rank: Rank,
        job: JobId,
        setup_call: Option<u64>,
        turn: Turn,
        blob: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, Arc<Termination>> {
        self.abandon();
        if self.members.0 != job || self.members.1.is_empty() {
            self.members = (job, vec![false; self.size]);
        }
        let (assigned, stale, only_logged) = {
            let mut core = self.core();
            core.inbox.job = job;
            let only_logged = setup_call.is_some() && core.is_awaited(rank);
            let workers = &core.inbox.workers;
            let worker = workers.get(rank as usize).cloned().unwrap_or_default();
            let assigned = match worker.termination {
                Some(_) if only_logged => rank,
                // The call sets up this worker, whatever others still run on its behalf.
                None if setup_call.is_some() => rank,
                // If the worker is back while others still run its tasks, they go on with them, in
                // order.
                None => substitute(&core, rank, job).unwrap_or(rank),
                Some(termination) => {
                    let just_now = worker.terminated_in == job;
                    let substitute = || self.elsewhere(&core, rank, &termination, job, setup_call);
                    just_now.then(substitute).flatten().ok_or(termination)?
                }
            };
            let of_owner = core.inbox.tasks.of_owner(rank);
            let stale = of_owner.filter(|&(_, other)| job != NO_JOB && other != job);
            let stale = stale.collect::<Vec<_>>();
            if job != NO_JOB && !only_logged {
                // A draining worker must not end when its stale tasks are cancelled.
                core.scheduler.reserve_for_verb(assigned);
            }
            (assigned, stale, only_logged)
        };
        self.members.1[rank as usize] = true;
        for (task, _) in stale {
            self.cancel_task(task);
        }
        let behind_call = {
            let core = self.core();
            core.scheduler.is_at_call(assigned)
        };
        let task = self.next_task;
        self.next_task += 1;
        let order = Order {
            rank: assigned,
            task,
            job,
            setup_call,
            prefetch: turn == Turn::Prefetch,
            first: turn == Turn::First,
            ..Order::default()
        };
        let mut writing = MessageWriting::new(order, rank, false);
        writing.only_logged = only_logged;
        let has_blob = self.write_order(writing, blob(assigned));
        Ok(StartedTask {
            task,
            assigned,
            has_blob,
            behind_call,
            only_logged,
        })
    }

    /// Sets the time limit of the task that was begun last, from when its worker has the whole
    /// message; `None`: only the limit of all tasks.
    pub fn limit_time(&mut self, limit: Option<Duration>) {
        if let Some(writing) = &mut self.writing {
            writing.order.limit = limit;
        }
    }

    /// As [`Hub::begin`], for a failed task: on the replacement of its worker, or, if there is
    /// none, on another worker.
    ///
    /// # Errors
    /// When there is no worker for it: the worker that had it last, and why that terminated.
    pub fn try_again(
        &mut self,
        rank: Rank,
        task: TaskId,
        setup_call: Option<u64>,
        blob: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, (Rank, Arc<Termination>)> {
        self.abandon();
        let (job, before, assigned) = {
            let mut core = self.core();
            let tasks = &core.inbox.tasks;
            let job = tasks.job(task).unwrap_or(NO_JOB);
            let before = tasks.assigned(task).unwrap_or(rank);
            let worker = core.inbox.workers.get(before as usize);
            let assigned = match worker.and_then(|worker| worker.termination.clone()) {
                None => before,
                Some(termination) => {
                    let substitute = self.elsewhere(&core, rank, &termination, job, setup_call);
                    substitute.ok_or((before, termination))?
                }
            };
            core.inbox.tasks.retry_decided(task);
            (job, before, assigned)
        };
        let order = Order {
            rank: assigned,
            task,
            job,
            again: assigned == before,
            setup_call,
            ..Order::default()
        };
        let writing = MessageWriting::new(order, rank, true);
        let has_blob = self.write_order(writing, blob(assigned));
        Ok(StartedTask {
            task,
            assigned,
            has_blob,
            behind_call: false,
            only_logged: false,
        })
    }

    /// Starts a message. Returns whether the message begins with the blob.
    fn write_order(&mut self, mut writing: MessageWriting, blob: Option<BlobId>) -> bool {
        if writing.order.rank != writing.owner {
            writing.order.on_behalf_of = Some(writing.owner);
        }
        writing.wanted = blob;
        let has_blob = writing.attach_blob(&self.core());
        self.writing = Some(writing);
        has_blob
    }

    /// Begins a blob for the hosts of these workers; [`Hub::write`] and [`Hub::finish_blob`]
    /// follow. Then messages to these workers can begin with it. `setup_call`: some of these
    /// messages are set-up calls.
    pub fn begin_blob(&mut self, ranks: &[Rank], setup_call: bool) -> BlobId {
        self.abandon();
        let id = self.next_blob;
        self.next_blob += 1;
        let mut core = self.core();
        core.scheduler.begin_blob(id, ranks);
        let setup_log = core.setup_log.as_mut().filter(|_| setup_call);
        let logged = setup_log.is_some();
        if let Some(setup_log) = setup_log {
            setup_log.begin_blob(id);
        }
        drop(core);
        self.blob_writing = Some(BlobWriting {
            id,
            buffer: Vec::new(),
            logged,
        });
        id
    }

    /// Sends the same blob again, for the host of this worker alone, which does not have it. If a
    /// task has been begun for it and nothing of its message written, the message then begins with
    /// the blob, as [`Hub::finish_blob`] returns.
    pub fn begin_blob_again(&mut self, id: BlobId, rank: Rank) {
        self.abandon_blob();
        self.core().scheduler.begin_blob(id, &[rank]);
        self.blob_writing = Some(BlobWriting {
            id,
            buffer: Vec::new(),
            logged: false,
        });
    }

    /// Ends the blob: messages can begin with it. Returns whether the message of the task that has
    /// been begun, if there is one, does.
    pub fn finish_blob(&mut self) -> bool {
        self.submit(true);
        self.end_blob()
    }

    /// The whole blob has been submitted.
    fn end_blob(&mut self) -> bool {
        let Some(blob_writing) = self.blob_writing.take() else {
            return false;
        };
        let shared_core = self.inner.shared_core.clone();
        let mut core = shared_core.core();
        if let Some(setup_log) = core.setup_log.as_mut().filter(|_| blob_writing.logged) {
            setup_log.finish_blob();
        }
        core.check_setup_log();
        let writing = self.writing.as_mut();
        writing.is_some_and(|writing| writing.attach_blob(&core))
    }

    /// Whether a message to this worker can begin with this blob, because its host has the blob.
    pub fn has_blob(&self, rank: Rank, id: BlobId) -> bool {
        self.core().scheduler.has_blob(rank, id)
    }

    /// Drops a blob: no more messages will begin with it. Messages that have been finished still
    /// do, whenever they are sent.
    pub fn drop_blob(&mut self, id: BlobId) {
        let mut core = self.core();
        core.scheduler.drop_blob(id);
        if let Some(setup_log) = &mut core.setup_log {
            setup_log.drop_blob(id);
        }
        core.pump();
    }

    /// Abandons the blob that is being written, if there is one.
    fn abandon_blob(&mut self) {
        let Some(blob_writing) = self.blob_writing.take() else {
            return;
        };
        let mut core = self.core();
        core.scheduler.abort_blob(blob_writing.id);
        if let Some(setup_log) = core.setup_log.as_mut().filter(|_| blob_writing.logged) {
            setup_log.abandon_blob();
        }
        core.scheduler.set_unlimited(false);
        core.pump();
    }

    /// Appends to the blob or message that is being written. If it returns true, too many bytes wait to be sent: the
    /// caller should then call [`Hub::wait_to_send`] until that returns false.
    pub fn write(&mut self, mut bytes: &[u8]) -> bool {
        let full = if self.has_chunk_cache {
            CUT_AFTER
        } else {
            MAX_BODY
        };
        let mut sent = false;
        self.written += bytes.len() as u64;
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
        // A retried task goes before the tasks that wait behind it: they are not sent until it has been written.
        let writing = self.writing.as_ref();
        let waits = writing.is_none_or(|writing| !writing.is_call() && !writing.again);
        sent && waits && self.core().queued > SEND_LIMIT
    }

    /// Number of bytes that R has written to messages and blobs so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    pub(super) fn buffer(&mut self) -> Option<&mut Vec<u8>> {
        match (&mut self.blob_writing, &mut self.writing) {
            (Some(blob_writing), _) => Some(&mut blob_writing.buffer),
            (None, Some(writing)) => Some(&mut writing.buffer),
            (None, None) => None,
        }
    }

    /// Submits the buffer; all of it if it is the `last` part of a blob.
    fn submit(&mut self, last: bool) {
        if let Some(blob_writing) = &mut self.blob_writing {
            let chunks = take_chunks(&mut blob_writing.buffer, self.has_chunk_cache, last);
            submit_blob(
                &mut self.inner.shared_core.core(),
                blob_writing,
                chunks,
                last,
            );
        } else if let Some(writing) = &mut self.writing {
            let chunks = take_chunks(&mut writing.buffer, self.has_chunk_cache, false);
            submit(&mut self.inner.shared_core.core(), writing, chunks, false);
        }
    }

    /// Waits up to `max_wait` for written bytes to be sent. Returns whether to go on waiting.
    pub fn wait_to_send(&mut self, max_wait: Duration) -> bool {
        // Results must be received even if R blocks in sending: the workers that have to read the
        // sent bytes may be blocked in writing results.
        let mut core = self.core();
        core.scheduler.set_unlimited(true);
        core.pump();
        drop(core);
        // While a task awaits R's decision on a retry, the tasks behind it are not sent: R must go on.
        let room = |core: &mut Core| {
            let goes_on = core.inbox.closed || core.scheduler.awaits_decision();
            (core.queued <= SEND_LIMIT || goes_on).then_some(())
        };
        let wait = self.inner.shared_core.wait(max_wait, room).is_none();
        if !wait {
            self.core().scheduler.set_unlimited(false);
        }
        wait
    }

    /// Ends the message; the task is now outstanding.
    pub fn finish(&mut self) {
        let has_chunk_cache = self.has_chunk_cache;
        self.finish_with(|writing| take_chunks(&mut writing.buffer, has_chunk_cache, true));
    }

    /// Ends the message with the chunks that `rest` makes of it.
    fn finish_with(&mut self, rest: impl FnOnce(&mut MessageWriting) -> Vec<Chunk>) {
        let Some(mut writing) = self.writing.take() else {
            return;
        };
        let chunks = rest(&mut writing);
        let mut core = self.core();
        submit(&mut core, &mut writing, chunks, true);
        let order = &writing.order;
        if !writing.again && !writing.is_call() && !writing.only_logged {
            core.inbox.tasks.finish(order.task, order.job);
        }
        if let Some(setup_log) = &mut core.setup_log {
            setup_log.finish();
            if writing.only_logged {
                setup_log.logged(order.task, order.rank);
                core.catch_up(writing.order.rank);
                core.pump();
            }
        }
        core.check_setup_log();
    }

    /// Appends a chunk as it is to the blob or message that is being written, and ends that if the
    /// chunk is the `last`.
    pub(super) fn write_as_it_is(&mut self, chunk: Chunk, last: bool) {
        if let Some(blob_writing) = &mut self.blob_writing {
            submit_blob(
                &mut self.inner.shared_core.core(),
                blob_writing,
                vec![chunk],
                last,
            );
            if last {
                self.end_blob();
            }
        } else if last {
            self.finish_with(|_| vec![chunk]);
        } else if let Some(writing) = &mut self.writing {
            submit(
                &mut self.inner.shared_core.core(),
                writing,
                vec![chunk],
                false,
            );
        }
    }

    /// Abandons the message and the blob that are being written, if there are any: R could not
    /// finish them.
    pub fn abandon(&mut self) {
        self.abandon_blob();
        let Some(writing) = self.writing.take() else {
            return;
        };
        let task = writing.order.task;
        if writing.is_call() {
            self.forget_call(task);
            if let Some(end) = writing.end {
                let mut core = self.core();
                core.inbox.calls.expect(task);
                core.inbox.calls.ended(end.rank, task, end.outcome);
            }
            return;
        }
        if let Some(setup_log) = &mut self.core().setup_log {
            setup_log.abandon();
        }
        if !writing.first {
            self.core().scheduler.set_unlimited(false);
            self.cancel_task(task);
        } else if writing.again {
            // The code that would decide on a retry was interrupted.
            self.forget(task);
        }
    }

    /// Begins a call for the first free one of these workers, which are in order; [`Hub::write`]
    /// and [`Hub::finish`] follow. `again`: the call failed and is retried, before all others.
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
        let mut writing = MessageWriting::new(order, 0, again);
        writing.end = end;
        self.writing = Some(writing);
    }

    /// A number for a call that has not been sent yet.
    pub fn number_call(&mut self) -> TaskId {
        let task = self.next_task;
        self.next_task += 1;
        task
    }

    /// Whether a message has been begun and not finished.
    pub fn is_writing(&self) -> bool {
        self.writing.is_some() || self.blob_writing.is_some()
    }
}
