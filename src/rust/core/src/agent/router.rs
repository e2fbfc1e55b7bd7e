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
    /// For a number of workers, whose tasks may take so long. `keep`: bytes of chunks to keep;
    /// `state`: bytes to hold of what lasts on workers.
    pub fn new(workers: usize, keep: usize, state: usize, timeout: Option<Duration>) -> Relay {
        Relay {
            book: Book::new(workers, timeout),
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
mod tests {
    use super::*;
    use crate::agent::action::Act;
    use crate::protocol::send_queue::OutBuf;

    fn bytes(frames: &[Frame]) -> BytesMut {
        let mut out = OutBuf::default();
        frames.iter().for_each(|frame| out.push(frame));
        let mut bytes = BytesMut::new();
        while !out.is_empty() {
            let wrote: Result<usize, ()> = out.write_with(|slices| {
                slices
                    .iter()
                    .for_each(|slice| bytes.extend_from_slice(slice));
                Ok(slices.iter().map(|slice| slice.len()).sum())
            });
            wrote.unwrap();
        }
        bytes
    }

    fn from_head(relay: &mut Relay, frame: Frame) -> Vec<Act> {
        let mut acts = Vec::new();
        let now = Duration::ZERO;
        relay
            .from_head(&mut bytes(&[frame]), now, &mut acts)
            .unwrap();
        acts
    }

    fn from_worker(relay: &mut Relay, frames: &[Frame]) -> Vec<Act> {
        let mut acts = Vec::new();
        let now = Duration::ZERO;
        relay
            .from_worker(0, &mut bytes(frames), now, &mut acts)
            .unwrap();
        acts
    }

    fn ready() -> Frame {
        let tempdir = String::new();
        let ready = true;
        control::encode(&WorkerReady { tempdir, ready }).unwrap()
    }

    fn data(task: u64, body: &'static [u8]) -> Frame {
        Frame::new(Kind::Data, FIRST | LAST, 0, task, Bytes::from_static(body))
    }

    fn seed(flags: u8, task: u64, body: &'static [u8]) -> Frame {
        Frame::new(Kind::Seed, flags, 0, task, Bytes::from_static(body))
    }

    /// One worker that is ready.
    fn up() -> Relay {
        let mut relay = Relay::new(1, 0, 1 << 20, None);
        relay.made(0, false, Duration::ZERO);
        let acts = from_worker(&mut relay, &[ready()]);
        assert!(matches!(
            acts[..],
            [
                Act::TempDir(..),
                Act::Up {
                    replaces: false,
                    ..
                }
            ]
        ));
        relay
    }

    fn to_head(acts: &[Act]) -> Vec<&Frame> {
        let frames = acts.iter().filter_map(|act| match act {
            Act::ToHead(frame) => Some(frame),
            _ => None,
        });
        frames.collect()
    }

    #[test]
    fn a_seed_that_the_head_is_not_to_know_is_told_as_none() {
        let mut relay = up();
        from_head(&mut relay, data(1, b"task"));
        let long = seed(0, 1, &[7; SEED_TO_HEAD + 1]);
        let acts = from_worker(&mut relay, &[long, data(1, b"answer")]);
        let frames = to_head(&acts);
        assert_eq!(*frames[0], seed(0, 1, b""));
        assert_eq!(*frames[1], data(1, b"answer"));
        let restore = relay.replay.restore(0);
        assert_eq!(restore.seed.unwrap(), [7; SEED_TO_HEAD + 1][..]);
    }

    #[test]
    fn a_fresh_worker_is_restored_before_the_head_hears_of_it() {
        let mut relay = up();
        let name = Bytes::copy_from_slice(&3u64.to_le_bytes());
        from_head(&mut relay, Frame::new(Kind::State, 0, 0, 1, name));
        from_head(&mut relay, data(1, b"export"));
        from_worker(&mut relay, &[seed(0, 1, b"seed"), data(1, b"done")]);
        from_head(&mut relay, data(2, b"task"));
        let guest = seed(GUEST, 2, b"guest");
        from_worker(&mut relay, &[guest]);
        let ending = relay.exited(0, true, Duration::ZERO);
        assert!(matches!(ending, Ending::Lost { replaced: true, .. }));
        relay.made(0, true, Duration::ZERO);
        let acts = from_worker(&mut relay, &[ready()]);
        let [Act::TempDir(..), Act::ToWorker(again), Act::ToWorker(seeds)] = &acts[..] else {
            panic!("{acts:?}");
        };
        assert_eq!(*again, data(REPLAY, b"export"));
        assert_eq!(*seeds, seed(0, 0, b"seed"));
        // What it does meanwhile was told before.
        let done = [seed(0, REPLAY, b"other"), data(REPLAY, b"done")];
        let acts = from_worker(&mut relay, &done);
        assert!(
            matches!(
                acts[..],
                [Act::Up {
                    worker: 0,
                    replaces: true
                }]
            ),
            "{acts:?}"
        );
        // What was meant for the one before.
        assert!(from_head(&mut relay, data(3, b"task")).is_empty());
        let noted = control::encode(&ToAgent::LossNoted { worker: 0 }).unwrap();
        from_head(&mut relay, noted);
        assert_eq!(from_head(&mut relay, data(2, b"task")).len(), 1);
    }

    fn control(relay: &mut Relay, message: &ToAgent) -> Vec<Act> {
        from_head(relay, control::encode(message).unwrap())
    }

    fn to_worker(acts: &[Act]) -> Vec<&Frame> {
        let frames = acts.iter().filter_map(|act| match act {
            Act::ToWorker(frame) => Some(frame),
            _ => None,
        });
        frames.collect()
    }

    fn dropped(task: u64) -> Frame {
        Frame::new(Kind::Data, LAST | ABORT, 0, task, Bytes::new())
    }

    #[test]
    fn a_task_ahead_waits_for_the_end_of_the_one_before() {
        let mut relay = up();
        from_head(&mut relay, data(1, b"task"));
        let guest = seed(GUEST, 2, b"guest");
        let name = Bytes::copy_from_slice(&3u64.to_le_bytes());
        let state = Frame::new(Kind::State, 0, 0, 2, name);
        for frame in [guest.clone(), state, data(2, b"next")] {
            assert!(from_head(&mut relay, frame).is_empty());
        }
        assert_eq!(relay.book.task(0), Some(1));
        let part = Frame::new(Kind::Data, FIRST, 0, 1, Bytes::from_static(b"part"));
        assert!(to_worker(&from_worker(&mut relay, &[part])).is_empty());
        let rest = Frame::new(Kind::Data, LAST, 0, 1, Bytes::from_static(b"rest"));
        let acts = from_worker(&mut relay, std::slice::from_ref(&rest));
        assert_eq!(to_head(&acts), [&rest]);
        assert_eq!(to_worker(&acts), [&guest, &data(2, b"next")]);
        assert_eq!(relay.book.task(0), Some(2));
        // What lasts is the second.
        from_worker(&mut relay, &[data(2, b"done")]);
        let again = relay.replay.restore(0).messages;
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].pieces, [&b"next"[..]]);
    }

    #[test]
    fn a_task_ahead_is_dropped_unless_it_has_started() {
        let cancel = |task| ToAgent::Cancel { worker: 0, task };
        let recall = |task| ToAgent::Recall { worker: 0, task };
        for message in [cancel(2), recall(2)] {
            let mut relay = up();
            from_head(&mut relay, data(1, b"task"));
            from_head(&mut relay, data(2, b"next"));
            let acts = control(&mut relay, &message);
            assert!(matches!(&acts[..], [Act::ToHead(frame)] if *frame == dropped(2)));
            assert!(control(&mut relay, &message).is_empty());
            let acts = from_worker(&mut relay, &[data(1, b"answer")]);
            assert!(to_worker(&acts).is_empty());
            assert_eq!(relay.book.task(0), None);
        }
        let mut relay = up();
        from_head(&mut relay, data(1, b"task"));
        from_head(&mut relay, data(2, b"next"));
        from_worker(&mut relay, &[data(1, b"answer")]);
        assert!(control(&mut relay, &recall(2)).is_empty());
        let acts = control(&mut relay, &cancel(2));
        assert!(matches!(acts[0], Act::Interrupt { worker: 0, task: 2 }));
        // Of a message that has not wholly come, its abort is the end.
        let part = |task| Frame::new(Kind::Data, FIRST, 0, task, Bytes::from_static(b"part"));
        from_head(&mut relay, part(3));
        assert!(control(&mut relay, &recall(3)).is_empty());
        assert!(from_head(&mut relay, dropped(3)).is_empty());
        from_head(&mut relay, part(4));
        let acts = from_worker(&mut relay, &[data(2, b"answer")]);
        assert_eq!(to_worker(&acts), [&part(4)]);
        let acts = from_head(&mut relay, dropped(4));
        assert_eq!(to_worker(&acts), [&dropped(4)]);
    }

    #[test]
    fn a_task_ahead_goes_down_with_its_worker_and_comes_again() {
        for cancelled in [false, true] {
            let mut relay = up();
            from_head(&mut relay, data(1, b"task"));
            from_head(&mut relay, data(2, b"next"));
            if cancelled {
                control(&mut relay, &ToAgent::Cancel { worker: 0, task: 1 });
            }
            let ending = relay.exited(0, true, Duration::ZERO);
            assert_eq!(ending == Ending::Replace, cancelled);
            assert_eq!(relay.held(0), 0);
            relay.made(0, true, Duration::ZERO);
            assert!(to_worker(&from_worker(&mut relay, &[ready()])).is_empty());
            // Another that was on its way.
            assert!(from_head(&mut relay, data(3, b"late")).is_empty());
            control(&mut relay, &ToAgent::LossNoted { worker: 0 });
            let acts = from_head(&mut relay, data(2, b"next"));
            assert_eq!(to_worker(&acts), [&data(2, b"next")]);
        }
    }

    #[test]
    fn a_task_ahead_has_its_time_from_when_it_starts() {
        let ms = Duration::from_millis;
        let mut relay = Relay::new(1, 0, 0, Some(ms(10)));
        from_worker(&mut relay, &[ready()]);
        from_head(&mut relay, data(1, b"task"));
        from_head(&mut relay, data(2, b"next"));
        let mut acts = Vec::new();
        let mut answer = bytes(&[data(1, b"answer")]);
        relay.from_worker(0, &mut answer, ms(7), &mut acts).unwrap();
        assert_eq!(relay.book.next_deadline(), Some(ms(17)));
    }
    fn payload(flags: u8, id: u64, len: usize) -> Frame {
        Frame::new(Kind::Payload, flags, 0, id, vec![9; len].into())
    }

    #[test]
    fn a_payload_that_lasts_restores_a_worker_though_the_head_has_forgotten_it() {
        let mut relay = up();
        let stored = from_head(&mut relay, payload(FIRST, 5, frame::MAX_BODY));
        assert!(stored.is_empty());
        let stored = from_head(&mut relay, payload(LAST, 5, 9));
        assert!(matches!(
            stored[..],
            [Act::Store { .. }, Act::Store { last: true, .. }]
        ));
        let name = Bytes::copy_from_slice(&3u64.to_le_bytes());
        from_head(&mut relay, Frame::new(Kind::State, 0, 0, 1, name.clone()));
        let acts = from_head(&mut relay, Frame::shared(0, 1, 5, true));
        let [Act::Hand { .. }, Act::ToWorker(task)] = &acts[..] else {
            panic!("{acts:?}");
        };
        assert_eq!(*task, Frame::shared(0, 1, 5, true));
        from_worker(&mut relay, &[data(1, b"done")]);
        let acts = from_head(&mut relay, payload(LAST | ABORT, 5, 0));
        assert!(matches!(acts[..], [Act::ToWorker(_)]), "{acts:?}");
        relay.exited(0, true, Duration::ZERO);
        relay.made(0, true, Duration::ZERO);
        let acts = from_worker(&mut relay, &[ready()]);
        let [
            Act::TempDir(..),
            Act::Hand { .. },
            Act::ToWorker(again),
            Act::ToWorker(taken_back),
        ] = &acts[..]
        else {
            panic!("{acts:?}");
        };
        assert_eq!(*again, Frame::shared(0, REPLAY, 5, true));
        assert_eq!(*taken_back, payload(LAST | ABORT, 5, 0));
        from_worker(&mut relay, &[data(REPLAY, b"done")]);
        // It is set again, to something else.
        let noted = control::encode(&ToAgent::LossNoted { worker: 0 }).unwrap();
        from_head(&mut relay, noted);
        from_head(&mut relay, Frame::new(Kind::State, 0, 0, 2, name));
        from_head(&mut relay, data(2, b"other"));
        let acts = from_worker(&mut relay, &[data(2, b"done")]);
        assert!(matches!(acts[..], [Act::Discard(5), Act::ToHead(_)]));
    }

    #[test]
    fn a_message_that_begins_as_none_of_the_heads_does_is_an_error() {
        let number = Bytes::copy_from_slice(&5u64.to_le_bytes());
        let beginning = |flags, body| Frame::new(Kind::Data, flags | SHARED, 0, 1, body);
        let cases = [
            // There is no such payload.
            Frame::shared(0, 1, 6, true),
            beginning(LAST, number.clone()),
            beginning(FIRST | ABORT, number.clone()),
            beginning(FIRST | SAME, number.clone()),
            beginning(FIRST | KEEP, number.clone()),
            beginning(FIRST, number.slice(1..)),
            beginning(FIRST, Bytes::new()),
            Frame::shared(1, 1, 5, true),
        ];
        for frame in cases {
            let mut relay = up();
            from_head(&mut relay, payload(FIRST | LAST, 5, 9));
            let mut received = bytes(std::slice::from_ref(&frame));
            let result = relay.from_head(&mut received, Duration::ZERO, &mut Vec::new());
            assert!(result.is_err(), "{frame:?}");
        }
    }

    fn memory(task: u64, len: u64) -> Frame {
        let body = Bytes::copy_from_slice(&len.to_le_bytes());
        Frame::new(Kind::Data, FIRST | LAST | SHARED, 0, task, body)
    }

    #[test]
    fn an_answer_in_shared_memory_is_announced_and_comes_when_it_is_asked_for() {
        let mut relay = up();
        relay.book.shares = true;
        from_head(&mut relay, data(1, b"task"));
        let mut held = bytes(&[memory(1, 1 << 40)]);
        let mut acts = Vec::new();
        let read = |relay: &mut Relay, held: &mut BytesMut, acts: &mut Vec<Act>| {
            relay.from_worker(0, held, Duration::ZERO, acts).unwrap();
        };
        read(&mut relay, &mut held, &mut acts);
        read(&mut relay, &mut held, &mut acts);
        assert_eq!(to_head(&acts).len(), 1);
        let announced = to_head(&acts)[0].clone();
        assert_eq!(announced.header.flags, FIRST | SHARED);
        assert_eq!(announced.number(), Some(1 << 40));
        assert_eq!(relay.book.task(0), Some(1));
        acts.clear();
        let asked = from_head(&mut relay, Frame::credit(0, 1, 9));
        assert!(matches!(asked[..], [Act::ReadAgain(0)]));
        read(&mut relay, &mut held, &mut acts);
        let [Act::Along(frame)] = &acts[..] else {
            panic!("{acts:?}");
        };
        assert_eq!(frame.header.flags, LAST | SHARED);
        assert_eq!(relay.book.task(0), None);
        // The next is announced as well; cancelled, it is let go of.
        from_head(&mut relay, data(2, b"task"));
        let mut held = bytes(&[memory(2, 5)]);
        acts.clear();
        read(&mut relay, &mut held, &mut acts);
        assert_eq!(to_head(&acts).len(), 1);
        control(&mut relay, &ToAgent::Cancel { worker: 0, task: 2 });
        acts.clear();
        read(&mut relay, &mut held, &mut acts);
        assert!(matches!(&acts[..], [Act::LetGo(0), Act::ToHead(frame)] if *frame == dropped(2)));
    }

    #[test]
    fn memory_that_nobody_asked_for_is_an_error() {
        let short = Frame::new(
            Kind::Data,
            FIRST | LAST | SHARED,
            0,
            1,
            Bytes::from_static(b"1"),
        );
        let mut part = memory(1, 5);
        part.header.flags = FIRST | SHARED;
        for (shares, frame) in [(false, memory(1, 5)), (true, short), (true, part)] {
            let mut relay = up();
            relay.book.shares = shares;
            from_head(&mut relay, data(1, b"task"));
            let mut held = bytes(&[frame]);
            let result = relay.from_worker(0, &mut held, Duration::ZERO, &mut Vec::new());
            assert!(result.is_err());
        }
    }
}
