//! The agent's decisions: what becomes of each frame, of each worker that is ready, out of time or
//! gone. What it makes of them is a list of [`Act`]s.
//!
//! Pure, as are the parts it is made of: [`worker_table`](super::worker_table), [`setup_log`](super::setup_log),
//! [`prefetch`](super::prefetch), [`blobs`](super::blobs) and [`share`](crate::protocol::dedup).

use super::action::Act;
use super::blobs::Payloads;
use super::prefetch::Held;
use super::setup_log::{Replay, Restore};
use super::worker_table::{Book, Ending, Now, REPLAY, Ready, Route};
use crate::protocol::control::{self, Facts, ToAgent, ToHead, WorkerReady};
use crate::protocol::dedup::Kept;
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{
    self, ABORT, FIRST, Frame, GUEST, HEADER_LEN, Header, KEEP, Kind, LAST, SAME, SHARED,
};
use crate::protocol::ids::RESTORE;
use crate::protocol::limits::MOST_MEMORY;
use bytes::{Buf, Bytes, BytesMut};
use std::time::Duration;

/// Longer states of random number generators are not the head's to know: those are no streams that
/// a task could go on with elsewhere. L'Ecuyer-CMRG's, of which `clusterSetRNGStream()` makes its
/// streams, has 28 bytes.
const SEED_TO_HEAD: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub struct Relay {
    /// The state of each worker of this host.
    pub book: Book,
    kept: Kept,
    payloads: Payloads,
    replay: Replay,
    held: Held,
    /// The worker in this place was made to replace another.
    replaces: Vec<bool>,
}

fn text(error: impl std::fmt::Display) -> ProtocolError {
    ProtocolError(error.to_string())
}

/// What a message that lasts sets.
fn name(body: &[u8]) -> Result<u64, ProtocolError> {
    let name = <[u8; 8]>::try_from(body);
    let name = name.map_err(|_| ProtocolError("a bad name of a state".into()))?;
    Ok(u64::from_le_bytes(name))
}

/// How long a task may take.
fn limit(frame: &Frame) -> Result<Duration, ProtocolError> {
    let limit = frame.number().map(Duration::from_micros);
    limit.ok_or_else(|| ProtocolError("a bad time limit".into()))
}

/// What the head is told of an answer in shared memory; `bytes`: of the frame that will bring it.
fn announcement(header: &Header, bytes: &[u8]) -> Result<Frame, ProtocolError> {
    let len = bytes.try_into().map(u64::from_le_bytes);
    if !len.is_ok_and(|len| len <= MOST_MEMORY) {
        return Err(ProtocolError("memory of no length".into()));
    }
    let body = Bytes::copy_from_slice(bytes);
    let flags = FIRST | SHARED;
    Ok(Frame::new(
        Kind::Data,
        flags,
        header.worker,
        header.task,
        body,
    ))
}

impl Relay {
    /// For a number of workers. `keep`: bytes of chunks to keep;
    /// `state`: bytes to hold of what lasts on workers.
    pub fn new(workers: usize, keep: usize, state: usize) -> Relay {
        Relay {
            book: Book::new(workers),
            kept: Kept::new(keep),
            payloads: Payloads::new(workers),
            replay: Replay::new(workers, state),
            held: Held::new(workers),
            replaces: vec![false; workers],
        }
    }

    /// A worker is being made.
    pub fn made(&mut self, worker: u32, replaces: bool, now: Now) {
        self.book.made(worker, now);
        self.replaces[worker as usize] = replaces;
        self.payloads.made(worker);
    }

    /// The whole frames that have come from the head.
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
            self.let_go(acts);
        }
        Ok(())
    }

    /// Lets go of payloads that nothing which lasts begins with any more.
    fn let_go(&mut self, acts: &mut Vec<Act>) {
        for payload in self.replay.take_freed() {
            self.payloads.release(payload, acts);
        }
    }

    fn on_head_frame(
        &mut self,
        mut frame: Frame,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        if frame.header.kind == Kind::Data && frame.header.flags & SHARED == 0 {
            self.kept.receive(&mut frame)?;
        }
        if !self.is_ahead(&frame)? {
            return self.pass(frame, now, acts);
        }
        let worker = frame.header.worker;
        if let Some(dropped) = self.held.hold(frame)? {
            self.give_back(worker, dropped, acts);
        }
        Ok(())
    }

    /// Whether a frame is of a task that is to start when its worker has ended the one that it is at.
    fn is_ahead(&mut self, frame: &Frame) -> Result<bool, ProtocolError> {
        let Header { worker, task, .. } = frame.header;
        match frame.header.kind {
            Kind::Data => {}
            // Others are of no task.
            Kind::Seed if task != 0 => {}
            Kind::State => {
                name(&frame.body)?;
            }
            Kind::Limit => {
                limit(frame)?;
            }
            _ => return Ok(false),
        }
        let meant = self.book.is_meant(worker)? && task & REPLAY == 0;
        Ok(meant && self.book.task(worker).is_some_and(|busy| busy != task))
    }

    /// The worker has ended its task: the next one goes on to it, as if it had just come.
    fn pass_held(
        &mut self,
        worker: u32,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        for frame in self.held.take(worker) {
            self.pass(frame, now, acts)?;
        }
        Ok(())
    }

    /// Bytes that were held will not reach the worker.
    fn give_back(&mut self, worker: u32, bytes: usize, acts: &mut Vec<Act>) {
        if let Some((task, bytes)) = self.book.passed(worker, bytes) {
            acts.push(Act::ToHead(Frame::credit(worker, task, bytes)));
        }
    }

    /// Drops a task that has not started, if it is held. Returns whether it was.
    fn withdraw(&mut self, worker: u32, task: u64, acts: &mut Vec<Act>) -> bool {
        let Some(dropped) = self.held.withdraw(worker, task) else {
            return false;
        };
        let ended = Frame::new(Kind::Data, LAST | ABORT, worker, task, Bytes::new());
        acts.push(Act::ToHead(ended));
        self.give_back(worker, dropped, acts);
        true
    }

    /// What is known of all workers together.
    pub fn facts(&self, facts: &mut Facts) {
        let (bytes, most) = self.replay.held();
        facts.add("setup_log_bytes", bytes);
        facts.add("setup_log_limit", most);
        facts.add("dedup_bytes", self.kept.bytes());
        facts.add("blobs", self.payloads.count());
    }

    /// What is known of a worker.
    pub fn worker_facts(&self, worker: u32, now: Now, facts: &mut Facts) {
        self.book.facts(worker, now, facts);
        facts.add("prefetched_bytes", self.held.bytes(worker));
        facts.add("setup_calls", self.replay.calls(worker));
        facts.add("setup_log_complete", self.replay.is_complete(worker));
    }

    /// Bytes that are held for a worker.
    pub fn held(&self, worker: u32) -> usize {
        self.held.bytes(worker)
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
            Kind::Data if header.flags & SHARED != 0 => self.on_shared(frame, now, acts)?,
            Kind::Payload => {
                self.kept.receive(&mut frame)?;
                self.payloads.receive(frame, acts)?;
            }
            Kind::Data => {
                if self.book.to_worker(&frame.header, now)? == Route::Forward {
                    if header.flags & ABORT == 0 {
                        let last = header.flags & LAST != 0;
                        self.replay.piece(worker, &frame.body, last);
                    } else {
                        self.replay.done(worker, false, Duration::ZERO);
                    }
                    acts.push(Act::ToWorker(frame));
                }
            }
            Kind::Seed => {
                if self.book.is_meant(worker)? {
                    if header.flags & GUEST == 0 {
                        self.replay.set_seed(worker, frame.body.clone());
                    }
                    acts.push(Act::ToWorker(frame));
                }
            }
            Kind::State => {
                let name = name(&frame.body)?;
                if self.book.is_meant(worker)? {
                    self.replay.expect(worker, name);
                }
            }
            Kind::Limit => {
                let limit = limit(&frame)?;
                self.book.limit(worker, header.task, limit)?;
            }
            Kind::Credit => {
                if self.book.credit(worker, header.task, header.len)? {
                    acts.push(Act::ReadAgain(worker));
                }
            }
            Kind::Control => {
                let message = control::decode(&frame.body).map_err(text)?;
                self.on_message(&message, now, acts)?;
            }
            Kind::Output | Kind::Cancel | Kind::Aside => {
                return Err(ProtocolError("a frame that is not for an agent".into()));
            }
        }
        Ok(())
    }

    /// A message begins with a payload.
    fn on_shared(
        &mut self,
        frame: Frame,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        let Header { worker, flags, .. } = frame.header;
        let begins = flags & FIRST != 0 && flags & (ABORT | KEEP | SAME) == 0;
        let Some(payload) = frame.number().filter(|_| begins) else {
            return Err(ProtocolError("a bad beginning of a message".into()));
        };
        let len = self.payloads.len(payload)?;
        if self.book.to_worker(&frame.header, now)? == Route::Forward {
            let last = flags & LAST != 0;
            if self.replay.payload(worker, payload, len, last) {
                self.payloads.keep(payload);
            }
            let given = self.payloads.give(worker, payload, acts);
            self.book.gave(worker, given);
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
                if !self.withdraw(worker, task, acts) && self.book.cancel(worker, task, now)? {
                    acts.push(Act::Interrupt { worker, task });
                    // What is left of the answer is dropped without being asked for.
                    acts.push(Act::ReadAgain(worker));
                }
            }
            ToAgent::Recall { worker, task } => {
                self.book.is_meant(worker)?;
                self.withdraw(worker, task, acts);
            }
            ToAgent::LossNoted { worker } => self.book.noted(worker)?,
            ToAgent::StopWorker { worker } => self.stop(worker, now, acts),
            ToAgent::Stop => acts.push(Act::End),
            ToAgent::Usage { question } => acts.push(Act::Usage { question }),
            ToAgent::Dump { question } => acts.push(Act::Dump { question }),
            // That anything came is what counts.
            ToAgent::Alive => {}
            ToAgent::Hello(_) | ToAgent::Start(_) => {
                return Err(ProtocolError("a second greeting".into()));
            }
        }
        Ok(())
    }

    /// A worker is to end, whatever it does.
    pub fn stop(&mut self, worker: u32, now: Now, acts: &mut Vec<Act>) {
        let Some(busy) = self.book.stop(worker, now) else {
            return;
        };
        self.held.take(worker);
        if let Some(task) = self.book.task(worker).filter(|_| busy) {
            acts.push(Act::Interrupt { worker, task });
        }
        acts.push(Act::Close(worker));
    }

    /// The whole frames in `held`, which have come from a worker, up to one that must wait.
    ///
    /// # Errors
    /// When a worker of ours would not send them. What came before is among the acts.
    pub fn from_worker(
        &mut self,
        worker: u32,
        held: &mut BytesMut,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        while let Some(mut header) = Header::decode(held).map_err(text)? {
            if held.len() < HEADER_LEN + header.body_len() {
                break;
            }
            // Whatever it says, it is this worker.
            header.worker = worker;
            let route = match header.kind {
                Kind::Data => self.book.from_worker(&header, now)?,
                _ => Route::Forward,
            };
            if route == Route::Announce {
                let bytes = &held[HEADER_LEN..][..header.body_len()];
                acts.push(Act::ToHead(announcement(&header, bytes)?));
            }
            if matches!(route, Route::Hold | Route::Announce) {
                break;
            }
            held.advance(HEADER_LEN);
            let body = held.split_to(header.body_len());
            match header.kind {
                Kind::Data => {
                    self.on_answer(&header, route, body, acts);
                    if header.flags & LAST != 0 {
                        self.pass_held(worker, now, acts)?;
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
                // The head leaves out what it does not want any more.
                Kind::Aside => {
                    if header.task & REPLAY == 0 && self.book.task(worker) == Some(header.task) {
                        let body = body.freeze();
                        acts.push(Act::ToHead(Frame { header, body }));
                    }
                }
                _ => return Err(ProtocolError("a frame that is not for an agent".into())),
            }
        }
        Ok(())
    }

    fn on_answer(&mut self, header: &Header, route: Route, body: BytesMut, acts: &mut Vec<Act>) {
        let (worker, task) = (header.worker, header.task);
        if header.flags & LAST != 0 && task & REPLAY == 0 {
            let lasts = route == Route::Forward;
            if self.replay.done(worker, lasts, self.book.took(worker)) {
                acts.push(Act::Tell(ToHead::StateNotKept { worker }));
            }
            self.let_go(acts);
        }
        let shared = header.flags & SHARED != 0;
        if shared && route != Route::Forward {
            acts.push(Act::LetGo(worker));
        }
        match route {
            Route::Restored => self.up(worker, acts),
            Route::Forward if shared => acts.push(Act::Along(Frame {
                header: Header {
                    flags: LAST | SHARED,
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

    fn on_seed(&mut self, header: Header, body: &[u8], acts: &mut Vec<Act>) {
        let worker = header.worker;
        // What is done again has been reported before.
        if self.book.task(worker).is_none() {
            return;
        }
        // Nor is it the state that the worker is to have when the head has restored it.
        if header.task & RESTORE != 0 {
            return;
        }
        if header.flags & GUEST == 0 {
            self.replay.seed(worker, Bytes::copy_from_slice(body));
        }
        // Without a word the head would take the one before for the state that this task has left.
        let known = if body.len() <= SEED_TO_HEAD {
            body
        } else {
            &[]
        };
        let known = Bytes::copy_from_slice(known);
        let frame = Frame::new(Kind::Seed, header.flags & GUEST, worker, header.task, known);
        acts.push(Act::ToHead(frame));
    }

    fn on_ready(
        &mut self,
        worker: u32,
        now: Now,
        acts: &mut Vec<Act>,
    ) -> Result<(), ProtocolError> {
        let again = match self.replaces[worker as usize] {
            true => self.replay.restore(worker),
            false => Restore::default(),
        };
        let took = again.messages.iter().map(|message| message.took).collect();
        let state = self.book.ready(worker, took, now);
        if state == Ready::Already {
            return Err(ProtocolError("a worker is ready twice".into()));
        }
        for (number, message) in (REPLAY..).zip(again.messages) {
            let count = message.pieces.len();
            if let Some(payload) = message.payload {
                let given = self.payloads.give(worker, payload, acts);
                self.book.gave(worker, given);
                let shared = Frame::shared(worker, number, payload, count == 0);
                acts.push(Act::ToWorker(shared));
            }
            for (at, body) in message.pieces.into_iter().enumerate() {
                let begins = at == 0 && message.payload.is_none();
                let first = if begins { FIRST } else { 0 };
                let last = if at + 1 == count { LAST } else { 0 };
                let frame = Frame::new(Kind::Data, first | last, worker, number, body);
                acts.push(Act::ToWorker(frame));
            }
        }
        self.payloads.take_back(worker, acts);
        if let Some(seed) = again.seed {
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

    /// Tasks that are out of time by now.
    pub fn out_of_time(&mut self, now: Now, acts: &mut Vec<Act>) {
        for (worker, task) in self.book.out_of_time(now) {
            acts.push(Act::Tell(ToHead::TimedOut { worker, task }));
            acts.push(Act::Interrupt { worker, task });
            acts.push(Act::ReadAgain(worker));
        }
    }

    /// A worker's process has ended, or could not be made. `may_replace`: the host is to go on.
    pub fn exited(&mut self, worker: u32, may_replace: bool, now: Now) -> Ending {
        // What is thereby freed is let go of when something next comes from the head.
        self.replay.lost(worker);
        // The head sends it again, to whoever takes the worker's place.
        self.held.take(worker);
        let restorable = may_replace && self.replay.is_complete(worker);
        self.book.exited(worker, restorable, now)
    }
}

#[cfg(test)]
mod tests;
