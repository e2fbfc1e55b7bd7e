//! The router: the agent's decisions on each frame, and on workers that become ready, exceed a time
//! limit or terminate. Decisions are a list of [`Act`]s.
//!
//! Pure, like its parts: [`worker_table`](super::worker_table), [`setup_log`](super::setup_log),
//! [`prefetch`](super::prefetch), [`blobs`](super::blobs) and [`dedup`](crate::protocol::dedup).

use super::action::Act;
use super::blobs::BlobStore;
use super::linger::Kept;
use super::prefetch::PrefetchQueue;
use super::setup_log::{Restore, SetupLog};
use super::worker_table::{Ending, Now, REPLAY, Ready, Route, WorkerTable};
use crate::protocol::control::{self, Facts, ToAgent, ToHead, WorkerReady};
use crate::protocol::dedup::ChunkCache;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{
    self, ABORT, BY_REFERENCE, CACHE, FIRST, Frame, HEADER_LEN, Header, Kind, LAST, REASSIGNED,
    SAME,
};
use crate::protocol::ids::{BlobId, RESTORE};
use crate::protocol::limits::MAX_RESULT_MEMORY;
use crate::protocol::truncate;
use bytes::{Buf, Bytes, BytesMut};
use std::time::Duration;

/// Maximum length of a random number state that is reported to the head. The states of L'Ecuyer-CMRG, with
/// which `clusterSetRNGStream()` makes its streams, have 28 bytes. Longer states are no streams that a task
/// could continue on another worker.
const SEED_TO_HEAD: usize = 64;

/// Maximum number of set-up calls in one message.
const MAX_LISTED: usize = 1000;

/// See the module's documentation.
#[derive(Debug)]
pub struct Router {
    /// The state of each worker of this host.
    pub worker_table: WorkerTable,
    chunk_cache: ChunkCache,
    blobs: BlobStore,
    setup_log: SetupLog,
    prefetched: PrefetchQueue,
    /// Whether the worker is a replacement.
    replaces: Vec<bool>,
    /// Whether the head has set the random number state that follows the worker's current restoring call.
    is_seed_set: Vec<bool>,
    /// For each worker, its task of a head that has disconnected.
    left: Vec<Option<u64>>,
    /// Workers that the head does not know to be up.
    unknown: Vec<bool>,
    /// Workers whose predecessors have failed since the head has been there.
    failed: Vec<bool>,
    /// Workers that the head has not restored yet.
    unrestored: Vec<bool>,
    /// Workers that were sent the random number state for a reassigned task whose message has not begun.
    seed_ahead: Vec<bool>,
}

fn text(error: impl std::fmt::Display) -> ProtocolError {
    ProtocolError(error.to_string())
}

/// The name of what a set-up call sets.
fn name(body: &[u8]) -> Result<u64, ProtocolError> {
    let name = <[u8; 8]>::try_from(body);
    let name = name.map_err(|_| ProtocolError("a bad name of a state".into()))?;
    Ok(u64::from_le_bytes(name))
}

/// The time limit of a task.
fn limit(frame: &Frame) -> Result<Duration, ProtocolError> {
    let limit = frame.number().map(Duration::from_micros);
    limit.ok_or_else(|| ProtocolError("a bad time limit".into()))
}

/// The frame that announces an answer in shared memory to the head; `bytes`: the body of the frame that will carry
/// the memory.
fn announcement(header: &Header, bytes: &[u8]) -> Result<Frame, ProtocolError> {
    let len = bytes.try_into().map(u64::from_le_bytes);
    if !len.is_ok_and(|len| len <= MAX_RESULT_MEMORY) {
        return Err(ProtocolError("memory of no length".into()));
    }
    let body = Bytes::copy_from_slice(bytes);
    let flags = FIRST | BY_REFERENCE;
    Ok(Frame::new(
        Kind::Data,
        flags,
        header.worker,
        header.task,
        body,
    ))
}

impl Router {
    /// Creates a router for a number of workers. `chunk_cache_bytes`: size of the chunk cache; `state`: maximum size of
    /// the set-up log.
    pub fn new(workers: usize, chunk_cache_bytes: usize, state: usize) -> Router {
        Router {
            worker_table: WorkerTable::new(workers),
            chunk_cache: ChunkCache::new(chunk_cache_bytes),
            blobs: BlobStore::new(workers),
            setup_log: SetupLog::new(workers, state),
            prefetched: PrefetchQueue::new(workers),
            replaces: vec![false; workers],
            is_seed_set: vec![false; workers],
            left: vec![None; workers],
            unknown: vec![false; workers],
            failed: vec![false; workers],
            unrestored: vec![false; workers],
            seed_ahead: vec![false; workers],
        }
    }

    /// A worker is being made.
    pub fn made(&mut self, worker: u32, replaces: bool, now: Now) {
        self.worker_table.made(worker, now);
        self.replaces[worker as usize] = replaces;
        self.is_seed_set[worker as usize] = false;
        self.seed_ahead[worker as usize] = false;
        self.blobs.made(worker);
    }

    /// Processes whole frames from the head.
    ///
    /// # Errors
    /// When the head would not send them.
    pub fn from_head(
        &mut self,
        received: &mut BytesMut,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        while let Some(frame) = frame::decode(received).map_err(text)? {
            self.on_head_frame(frame, now, acts)?;
            self.release_blobs(acts);
        }
        Ok(())
    }

    /// Releases blobs that no set-up call begins with any more.
    fn release_blobs(&mut self, acts: &mut Vec<Act>) {
        for blob in self.setup_log.take_freed() {
            self.blobs.release(blob, acts);
        }
    }

    fn on_head_frame(
        &mut self,
        mut frame: Frame,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        if frame.header.kind == Kind::Data && frame.header.flags & BY_REFERENCE == 0 {
            self.chunk_cache.receive(&mut frame)?;
        }
        if !self.is_prefetched(&frame)? {
            return self.pass(frame, now, acts);
        }
        let worker = frame.header.worker;
        if let Some(dropped) = self.prefetched.hold(frame)? {
            self.give_back(worker, dropped, acts);
        }
        Ok(())
    }

    /// Whether a frame belongs to a prefetched task.
    fn is_prefetched(&mut self, frame: &Frame) -> Result<bool, ProtocolError> {
        let Header { worker, task, .. } = frame.header;
        match frame.header.kind {
            Kind::Data => {}
            // Other seeds belong to no task.
            Kind::Seed if task != 0 => {}
            Kind::State => {
                name(&frame.body)?;
            }
            Kind::Limit => {
                limit(frame)?;
            }
            _ => return Ok(false),
        }
        let meant = self.worker_table.is_meant(worker)? && task & REPLAY == 0;
        Ok(meant
            && self
                .worker_table
                .task(worker)
                .is_some_and(|busy| busy != task))
    }

    /// Passes the prefetched task to a worker that has ended its task, as if it had just arrived.
    fn pass_prefetched(
        &mut self,
        worker: u32,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        for frame in self.prefetched.take(worker) {
            self.pass(frame, now, acts)?;
        }
        Ok(())
    }

    /// Returns to the head the credit of prefetched bytes that will not reach the worker.
    fn give_back(&mut self, worker: u32, bytes: usize, acts: &mut Vec<Act>) {
        if let Some((task, bytes)) = self.worker_table.passed(worker, bytes) {
            acts.push(Act::ToHead(Frame::credit(worker, task, bytes)));
        }
    }

    /// Drops a prefetched task. Returns whether it was there.
    fn withdraw(&mut self, worker: u32, task: u64, acts: &mut Vec<Act>) -> bool {
        let Some(dropped) = self.prefetched.withdraw(worker, task) else {
            return false;
        };
        let ended = Frame::new(Kind::Data, LAST | ABORT, worker, task, Bytes::new());
        acts.push(Act::ToHead(ended));
        self.give_back(worker, dropped, acts);
        true
    }

    /// Adds the facts about all workers together to a bug report.
    pub fn facts(&self, facts: &mut Facts) {
        let (bytes, max) = self.setup_log.stored();
        facts.add("setup_log_bytes", bytes);
        facts.add("setup_log_limit", max);
        facts.add("dedup_bytes", self.chunk_cache.bytes());
        facts.add("blobs", self.blobs.count());
    }

    /// Adds the facts about a worker to a bug report.
    pub fn worker_facts(&self, worker: u32, now: Now, facts: &mut Facts) {
        self.worker_table.facts(worker, now, facts);
        facts.add("prefetched_bytes", self.prefetched.bytes(worker));
        facts.add("setup_calls", self.setup_log.calls(worker));
        facts.add("setup_log_complete", self.setup_log.is_complete(worker));
    }

    /// Prefetched bytes of a worker.
    pub fn prefetched(&self, worker: u32) -> usize {
        self.prefetched.bytes(worker)
    }

    fn pass(
        &mut self,
        mut frame: Frame,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        let header = frame.header;
        let worker = header.worker;
        match header.kind {
            Kind::Data if header.flags & BY_REFERENCE != 0 => {
                self.on_blob_reference(frame, now, acts)?;
            }
            Kind::Blob => {
                self.chunk_cache.receive(&mut frame)?;
                self.blobs.receive(frame, acts)?;
            }
            Kind::Data => {
                if self.worker_table.to_worker(&frame.header, now)? == Route::Forward {
                    self.seed_ahead[worker as usize] = false;
                    if header.flags & ABORT == 0 {
                        let last = header.flags & LAST != 0;
                        self.setup_log.piece(worker, &frame.body, last);
                    } else {
                        self.setup_log.done(worker, false, Duration::ZERO);
                    }
                    acts.push(Act::ToWorker(frame));
                }
            }
            Kind::Seed => {
                if self.worker_table.is_meant(worker)? {
                    if header.flags & REASSIGNED == 0 {
                        self.setup_log.set_seed(worker, frame.body.clone());
                        let task = self.worker_table.task(worker);
                        self.is_seed_set[worker as usize] =
                            task.is_some_and(|task| task & RESTORE != 0);
                    } else {
                        self.seed_ahead[worker as usize] = true;
                    }
                    acts.push(Act::ToWorker(frame));
                } else if header.flags & REASSIGNED == 0 && header.task == 0 {
                    // The worker has failed, which the head did not know: the state is that of its replacement.
                    self.setup_log.set_seed(worker, frame.body.clone());
                    if self.worker_table.was_restored(worker) {
                        acts.push(Act::ToWorker(frame));
                    }
                }
            }
            Kind::State => {
                let name = name(&frame.body)?;
                if self.worker_table.is_meant(worker)? {
                    self.setup_log.expect(worker, name);
                }
            }
            Kind::Limit => {
                let limit = limit(&frame)?;
                self.worker_table.limit(worker, header.task, limit)?;
            }
            Kind::Credit => {
                if self.worker_table.credit(worker, header.task, header.len)? {
                    acts.push(Act::ReadAgain(worker));
                }
            }
            Kind::Control => {
                let message = control::decode(&frame.body).map_err(text)?;
                self.on_message(&message, now, acts)?;
            }
            Kind::Output | Kind::Cancel | Kind::ProgressEvent | Kind::TaskError => {
                return Err(ProtocolError("a frame that is not for an agent".into()));
            }
        }
        Ok(())
    }

    /// A message begins with a blob.
    fn on_blob_reference(
        &mut self,
        frame: Frame,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        let Header { worker, flags, .. } = frame.header;
        let begins = flags & FIRST != 0 && flags & (ABORT | CACHE | SAME) == 0;
        let Some(blob) = frame.number().filter(|_| begins) else {
            return Err(ProtocolError("a bad beginning of a message".into()));
        };
        let len = self.blobs.len(blob)?;
        if self.worker_table.to_worker(&frame.header, now)? == Route::Forward {
            self.seed_ahead[worker as usize] = false;
            let last = flags & LAST != 0;
            if self.setup_log.blob(worker, blob, len, last) {
                self.blobs.retain(blob);
            }
            let given = self.blobs.give(worker, blob, acts);
            self.worker_table.gave(worker, given);
            acts.push(Act::ToWorker(frame));
        }
        Ok(())
    }

    fn on_message(
        &mut self,
        message: &ToAgent,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        match *message {
            ToAgent::Cancel { worker, task } => {
                if !self.withdraw(worker, task, acts)
                    && self.worker_table.cancel(worker, task, now)?
                {
                    acts.push(Act::Interrupt { worker, task });
                    // The rest of the answer is dropped without being asked for.
                    acts.push(Act::ReadAgain(worker));
                }
            }
            ToAgent::Revoke { worker, task } => {
                self.worker_table.is_meant(worker)?;
                self.withdraw(worker, task, acts);
            }
            ToAgent::LossAck { worker } => self.worker_table.loss_acknowledged(worker)?,
            ToAgent::StopWorker { worker } => self.stop(worker, now, acts),
            ToAgent::Stop => acts.push(Act::End),
            ToAgent::Usage { question } => acts.push(Act::Usage { question }),
            ToAgent::Dump { question } => acts.push(Act::Dump { question }),
            ToAgent::SetupLog => self.list_setup_calls(acts),
            ToAgent::KeptAnswers => acts.push(Act::ListKept),
            ToAgent::KeptAnswer { number, request } => {
                acts.push(Act::SendKept { number, request });
            }
            ToAgent::DropAnswer { number } => acts.push(Act::DropKept(number)),
            ToAgent::SetupCall {
                worker,
                digest,
                request,
            } => acts.push(Act::SendCall {
                request,
                call: self.setup_log.find(worker, digest),
            }),
            ToAgent::Restores => self.unrestored.fill(true),
            ToAgent::Restored { worker } => {
                if let Some(unrestored) = self.unrestored.get_mut(worker as usize) {
                    *unrestored = false;
                }
            }
            // A heartbeat: receiving it is enough.
            ToAgent::Alive => {}
            ToAgent::Hello(_) | ToAgent::Start(_) => {
                return Err(ProtocolError("a second greeting".into()));
            }
        }
        Ok(())
    }

    /// Reports which set-up calls the workers have completed.
    fn list_setup_calls(&mut self, acts: &mut Vec<Act>) {
        for worker in 0..self.left.len() as u32 {
            let complete = self.setup_log.is_listed_whole(worker);
            let calls = self.setup_log.list(worker, &self.blobs);
            let mut parts = calls.chunks(MAX_LISTED).peekable();
            let mut part: &[_] = parts.next().unwrap_or_default();
            loop {
                let next = parts.next();
                acts.push(Act::Report(ToHead::SetupCalls {
                    worker,
                    complete,
                    calls: part.to_vec(),
                    last: next.is_none(),
                }));
                match next {
                    Some(next) => part = next,
                    None => break,
                }
            }
        }
    }

    /// The bytes of a blob that fits into a frame.
    pub fn small_blob(&self, blob: BlobId) -> Option<Bytes> {
        self.blobs.small(blob)
    }

    /// Stops a worker, whatever it does.
    pub fn stop(&mut self, worker: u32, now: Now, acts: &mut Vec<Act>) {
        let Some(busy) = self.worker_table.stop(worker, now) else {
            return;
        };
        self.prefetched.take(worker);
        if let Some(task) = self.worker_table.task(worker).filter(|_| busy) {
            acts.push(Act::Interrupt { worker, task });
        }
        acts.push(Act::Close(worker));
    }

    /// Processes the whole frames in `received`, which came from a worker, up to one that must
    /// wait.
    ///
    /// # Errors
    /// When the frames break the protocol. What came before is among the acts.
    pub fn from_worker(
        &mut self,
        worker: u32,
        received: &mut BytesMut,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        while let Some(mut header) = Header::decode(received).map_err(text)? {
            if received.len() < HEADER_LEN + header.body_len() {
                break;
            }
            // The header's index is not trusted.
            header.worker = worker;
            let route = match header.kind {
                Kind::Data => self.worker_table.from_worker(&header, now)?,
                _ => Route::Forward,
            };
            if route == Route::Announce {
                let bytes = &received[HEADER_LEN..][..header.body_len()];
                acts.push(Act::ToHead(announcement(&header, bytes)?));
            }
            if matches!(route, Route::Hold | Route::Announce) {
                break;
            }
            received.advance(HEADER_LEN);
            let body = received.split_to(header.body_len());
            match header.kind {
                Kind::Data => {
                    self.on_answer(&header, route, body, acts);
                    if header.flags & LAST != 0 {
                        self.pass_prefetched(worker, now, acts)?;
                    }
                }
                Kind::Control => {
                    let ready: WorkerReady = control::decode(&body).map_err(text)?;
                    acts.push(Act::TempDir(worker, ready.tempdir));
                    if ready.ready {
                        self.on_ready(worker, now, acts)?;
                    }
                }
                Kind::Seed => self.on_seed(header, &body, acts),
                // The head drops progress events that it does not want.
                Kind::ProgressEvent => {
                    if self.is_for_head(&header) {
                        let body = body.freeze();
                        acts.push(Act::ToHead(Frame { header, body }));
                    }
                }
                Kind::TaskError => {
                    if self.is_for_head(&header) {
                        let message = String::from_utf8_lossy(&body);
                        acts.push(Act::Report(ToHead::TaskFailed {
                            worker,
                            task: header.task,
                            text: truncate::beginning(&message, truncate::MAX_ERROR).to_owned(),
                            output: String::new(),
                        }));
                    }
                }
                _ => return Err(ProtocolError("a frame that is not for an agent".into())),
            }
        }
        Ok(())
    }

    /// Whether the head waits for the task of this frame of a worker.
    fn is_for_head(&self, header: &Header) -> bool {
        let its = self.worker_table.task(header.worker);
        header.task & REPLAY == 0 && its == Some(header.task)
    }

    fn on_answer(&mut self, header: &Header, route: Route, body: BytesMut, acts: &mut Vec<Act>) {
        let (worker, task) = (header.worker, header.task);
        if header.flags & LAST != 0 && task & REPLAY == 0 {
            self.is_seed_set[worker as usize] = false;
            let setup_call = route == Route::Forward;
            if self
                .setup_log
                .done(worker, setup_call, self.worker_table.task_duration(worker))
            {
                acts.push(Act::Report(ToHead::StateNotLogged { worker }));
            }
            self.release_blobs(acts);
        }
        let shared = header.flags & BY_REFERENCE != 0;
        if shared && route != Route::Forward {
            acts.push(Act::LetGo(worker));
        }
        match route {
            Route::Restored => self.up(worker, acts),
            // The head that has sent the task is gone.
            Route::Forward if self.left[worker as usize] == Some(task) => {
                acts.push(Act::Keep(Frame {
                    header: *header,
                    body: body.freeze(),
                }));
                self.end_left(header, acts);
            }
            Route::Ended if self.left[worker as usize] == Some(task) => self.end_left(header, acts),
            Route::Forward if shared => acts.push(Act::Along(Frame {
                header: Header {
                    flags: LAST | BY_REFERENCE,
                    ..*header
                },
                body: body.freeze(),
            })),
            Route::Forward => acts.push(Act::ToHead(Frame {
                header: *header,
                body: body.freeze(),
            })),
            Route::Ended => {
                let ended = Frame::new(Kind::Data, LAST | ABORT, worker, task, Bytes::new());
                acts.push(Act::ToHead(ended));
            }
            Route::Drop | Route::Hold | Route::Announce => {}
        }
    }

    /// A worker may have ended the task of a head that has disconnected.
    fn end_left(&mut self, header: &Header, acts: &mut Vec<Act>) {
        let worker = header.worker;
        if header.flags & LAST != 0 {
            self.left[worker as usize] = None;
            if self.unknown[worker as usize] {
                self.up(worker, acts);
            }
        }
    }

    fn on_seed(&mut self, header: Header, body: &[u8], acts: &mut Vec<Act>) {
        let worker = header.worker;
        // Repeated set-up calls were reported the first time.
        if self.worker_table.task(worker).is_none() {
            return;
        }
        if self.is_seed_set[worker as usize] {
            return;
        }
        if header.flags & REASSIGNED == 0 {
            self.setup_log.seed(worker, Bytes::copy_from_slice(body));
        }
        // Without this report, the head would take the previous state for the one that this task
        // left.
        let known = if body.len() <= SEED_TO_HEAD {
            body
        } else {
            &[]
        };
        let known = Bytes::copy_from_slice(known);
        let frame = Frame::new(
            Kind::Seed,
            header.flags & REASSIGNED,
            worker,
            header.task,
            known,
        );
        acts.push(Act::ToHead(frame));
    }

    fn on_ready(
        &mut self,
        worker: u32,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        let restore = match self.replaces[worker as usize] {
            true => self.setup_log.restore(worker),
            false => Restore::default(),
        };
        let durations = restore
            .messages
            .iter()
            .map(|message| message.duration)
            .collect();
        let state = self.worker_table.ready(worker, durations, now);
        if state == Ready::Already {
            return Err(ProtocolError("a worker is ready twice".into()));
        }
        for (number, message) in (REPLAY..).zip(restore.messages) {
            let count = message.pieces.len();
            if let Some(blob) = message.blob {
                let given = self.blobs.give(worker, blob, acts);
                self.worker_table.gave(worker, given);
                let shared = Frame::blob_reference(worker, number, blob, count == 0);
                acts.push(Act::ToWorker(shared));
            }
            for (at, body) in message.pieces.into_iter().enumerate() {
                let begins = at == 0 && message.blob.is_none();
                let first = if begins { FIRST } else { 0 };
                let last = if at + 1 == count { LAST } else { 0 };
                let frame = Frame::new(Kind::Data, first | last, worker, number, body);
                acts.push(Act::ToWorker(frame));
            }
        }
        self.blobs.take_back(worker, acts);
        if let Some(seed) = restore.seed {
            acts.push(Act::ToWorker(Frame::new(Kind::Seed, 0, worker, 0, seed)));
        }
        if state == Ready::Up {
            self.up(worker, acts);
        }
        Ok(())
    }

    fn up(&self, worker: u32, acts: &mut Vec<Act>) {
        let replaces = self.replaces[worker as usize];
        acts.push(Act::Up { worker, replaces });
    }

    /// Whether another head has any use for the workers: half a state would silently give wrong results.
    pub fn is_of_use(&self) -> bool {
        self.unrestored.contains(&false)
    }

    /// The head has disconnected. Workers end the tasks that they have begun; all others are dropped. Workers that the
    /// head has not restored are stopped.
    ///
    /// # Errors
    /// When the tasks of the head broke the protocol.
    pub fn detach(&mut self, now: Now, acts: &mut Vec<Act>) -> Result<(), ProtocolError> {
        for worker in 0..self.left.len() as u32 {
            self.prefetched.take(worker);
            if self.unrestored[worker as usize] {
                self.stop(worker, now, acts);
            }
            let Some(task) = self.worker_table.task(worker) else {
                // The message of a task may not have begun, although what comes before it has arrived.
                self.setup_log.lost(worker);
                if std::mem::take(&mut self.seed_ahead[worker as usize]) {
                    let abort = Frame::new(Kind::Data, LAST | ABORT, worker, 0, Bytes::new());
                    acts.push(Act::ToWorker(abort));
                }
                continue;
            };
            if self.worker_table.is_complete(worker) {
                self.left[worker as usize] = Some(task);
                self.worker_table.leave(worker);
                acts.push(Act::ReadAgain(worker));
            } else {
                let abort = Frame::new(Kind::Data, LAST | ABORT, worker, task, Bytes::new());
                self.pass(abort, now, acts)?;
            }
        }
        self.blobs.detach(acts);
        self.release_blobs(acts);
        Ok(())
    }

    /// Another head takes over. Returns the state of each worker. `pending`: the bytes that each worker has not read.
    pub fn attach(&mut self, chunk_cache_bytes: usize, pending: &[usize]) -> Vec<Kept> {
        self.chunk_cache = ChunkCache::new(chunk_cache_bytes);
        let workers = (0..).zip(pending);
        let kept: Vec<Kept> = workers
            .map(|(worker, &pending)| self.worker_table.attach(worker, pending))
            .collect();
        self.failed.fill(false);
        for (unknown, kept) in self.unknown.iter_mut().zip(&kept) {
            *unknown = matches!(kept, Kept::Busy | Kept::Starting);
        }
        kept
    }

    /// Whether the head does not know that this worker is up.
    pub fn is_unknown_to_head(&self, worker: u32) -> bool {
        self.unknown.get(worker as usize) == Some(&true)
    }

    /// The head is told that a worker is up, which is a replacement or not. Returns whether the head is to be told of a
    /// replacement: it has known the worker before, or has been told of its failure.
    pub fn introduce(&mut self, worker: u32, replaces: bool) -> bool {
        let unknown = self.unknown.get_mut(worker as usize);
        let was_unknown = unknown.is_some_and(std::mem::take);
        replaces && (!was_unknown || self.failed.get(worker as usize) == Some(&true))
    }

    /// The random number state of a worker, if the head can set it.
    pub fn seed(&self, worker: u32) -> Option<Bytes> {
        let seed = self.setup_log.current_seed(worker)?;
        Some(seed).filter(|seed| seed.len() <= SEED_TO_HEAD)
    }

    /// Ends tasks that have exceeded their time limits.
    pub fn out_of_time(&mut self, now: Now, acts: &mut Vec<Act>) {
        for (worker, task) in self.worker_table.out_of_time(now) {
            let output = String::new();
            acts.push(Act::Report(ToHead::TimedOut {
                worker,
                task,
                output,
            }));
            acts.push(Act::Interrupt { worker, task });
            acts.push(Act::ReadAgain(worker));
        }
    }

    /// A worker's process has ended, or could not be started. `may_replace`: the host goes on.
    pub fn exited(&mut self, worker: u32, may_replace: bool, now: Now) -> Ending {
        // Blobs that this frees are released with the next message from the head.
        self.setup_log.lost(worker);
        // The head sends the prefetched task again, to the replacement.
        self.prefetched.take(worker);
        self.left[worker as usize] = None;
        let restorable = may_replace && self.setup_log.is_complete(worker);
        let ending = self.worker_table.exited(worker, restorable, now);
        if matches!(ending, Ending::Lost { .. }) {
            self.failed[worker as usize] = true;
        }
        ending
    }
}

#[cfg(test)]
mod tests;
