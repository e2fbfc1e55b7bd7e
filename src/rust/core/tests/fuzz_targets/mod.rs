//! Fuzz targets: one function for each entry point of bytes from untrusted peers. Each takes any
//! bytes, and panics if their effect is not permitted. `core/fuzz` searches for such bytes, and
//! `fuzz_corpus.rs` replays its findings.

use bytes::{Buf, Bytes, BytesMut};
use rustcluster_core::agent::action::Act;
use rustcluster_core::agent::router::Router;
use rustcluster_core::agent::startup::{self, Greeted};
use rustcluster_core::agent::worker_table::Ending;
use rustcluster_core::head::scheduler::Scheduler;
use rustcluster_core::head::scheduler::events::{Demand, Note, Outcome};
use rustcluster_core::head::scheduler::task::Order;
use rustcluster_core::platform::fd;
use rustcluster_core::protocol::control::{
    self, Hello, PROTOCOL, ToAgent, ToHead, WorkerConfig, WorkerReady,
};
use rustcluster_core::protocol::error::ProtocolError;
use rustcluster_core::protocol::frame::{
    self, ABORT, BY_REFERENCE, FIRST, Frame, FrameError, HEADER_LEN, Header, Kind, LAST, MAX_BODY,
    REASSIGNED,
};
use rustcluster_core::protocol::handshake::{Greeting, MAGIC, MAX_NOISE};
use rustcluster_core::protocol::ids::Rank;
use rustcluster_core::protocol::limits::{GRANT, RESULT_WINDOW, SEND_WINDOW};
use rustcluster_core::protocol::noise::{
    Dialer, Introduction, Key, Listener, MAX_UNAUTHENTICATED, OPENING, Verdict,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

type Target = fn(&[u8]);

/// All targets, by the names of their corpora.
pub const TARGETS: [(&str, Target); 6] = [
    ("frames", frames),
    ("messages", messages),
    ("greetings", greetings),
    ("handshake", handshake),
    ("to_head", to_head),
    ("to_agent", to_agent),
];

/// The input's first bytes say how the rest is cut.
fn slices(data: &[u8]) -> Vec<&[u8]> {
    let (cuts, mut rest) = data.split_at(data.len().min(4));
    let mut slices = Vec::new();
    for &cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        // Mostly small, sometimes all there is.
        let len = if cut == u8::MAX {
            rest.len()
        } else {
            usize::from(cut) + 1
        };
        let (slice, later) = rest.split_at(len.min(rest.len()));
        slices.push(slice);
        rest = later;
    }
    slices
}

fn decode_all(buffer: &mut BytesMut, frames: &mut Vec<Frame>) -> Result<(), FrameError> {
    while let Some(frame) = frame::decode(buffer)? {
        assert!(frame.body.len() <= MAX_BODY);
        assert_eq!(frame.body.len(), frame.header.body_len());
        frames.push(frame);
    }
    Ok(())
}

/// Frames are the same however the stream is cut, and what waits for the rest of one takes no more
/// than twice that one.
pub fn frames(data: &[u8]) {
    let slices = slices(data);
    let wire = slices.concat();
    let mut whole = Vec::new();
    let whole_ended = decode_all(&mut BytesMut::from(&wire[..]), &mut whole);

    let mut cut = Vec::new();
    let mut buffer = BytesMut::new();
    let mut ended = Ok(());
    for slice in slices {
        buffer.extend_from_slice(slice);
        ended = decode_all(&mut buffer, &mut cut);
        let largest = (HEADER_LEN + MAX_BODY).max(slice.len());
        assert!(buffer.capacity() <= 2 * largest, "{}", buffer.capacity());
        if ended.is_err() {
            break;
        }
    }
    assert_eq!(ended, whole_ended);
    assert_eq!(cut, whole);

    // What was decoded is what was sent.
    let mut again = BytesMut::new();
    for frame in &whole {
        frame.header.encode(&mut again);
        again.extend_from_slice(&frame.body);
    }
    assert!(wire.starts_with(&again));
}

fn message_of<M: Serialize + DeserializeOwned + PartialEq + Debug>(body: &[u8]) {
    let Ok(message) = control::decode::<M>(body) else {
        return;
    };
    let frame = control::encode(&message).expect("what came in one frame fits into one");
    assert_eq!(&frame.body[..], body);
    assert_eq!(
        control::decode::<M>(&frame.body).expect("the same"),
        message
    );
}

/// A control message is an error or exactly what its bytes say.
pub fn messages(data: &[u8]) {
    let Some((which, body)) = data.split_first() else {
        return;
    };
    match which % 4 {
        0 => message_of::<ToHead>(body),
        1 => message_of::<ToAgent>(body),
        2 => message_of::<WorkerReady>(body),
        _ => message_of::<WorkerConfig>(body),
    }
}

/// Nobody without the key is authenticated: neither a dialer by the head, which keeps no more than it may of
/// what a stranger sends, nor a head by a dialer. The first byte says whether the opening comes first.
pub fn handshake(data: &[u8]) {
    let key = Key::new([7; 32]);
    let keys = [(0, key.clone()), (1, Key::new([8; 32]))].into();
    let introduction = Introduction::new([0; 16], "host", "job");
    let Some((&first, data)) = data.split_first() else {
        return;
    };
    let opening = match first % 2 {
        0 => Vec::new(),
        _ => [OPENING, &[0; 4]].concat(),
    };
    let mut listener = Listener::new(keys);
    let mut out = Vec::new();
    let mut count = 0;
    for piece in [&opening[..]].into_iter().chain(slices(data)) {
        count += piece.len();
        match listener.feed(piece, &mut out) {
            Ok(dialled) => assert_eq!(dialled, None),
            Err(_) => break,
        }
        assert!(count <= MAX_UNAUTHENTICATED && out.is_empty());
    }
    assert!(listener.finish(&Verdict::Accepted, &mut out).is_err());

    let (mut dialer, _) = Dialer::start(&key, 0, &introduction).expect("random numbers");
    for piece in slices(data) {
        match dialer.feed(piece, &mut out) {
            Ok(verdict) => assert_eq!(verdict, None),
            Err(_) => break,
        }
    }
    assert!(out.is_empty());
    assert!(dialer.finish().is_err());
}

/// A hello of the version that the targets are.
fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        package: "0.1.0".into(),
        r_version: "4.2.2".into(),
        ..Hello::default()
    }
}

/// What the agent makes of a head that sends `wire` and then nothing more.
fn greet_agent(wire: &[u8]) -> io::Result<Greeted> {
    let (ours, theirs) = UnixStream::pair()?;
    let reader = File::from(OwnedFd::from(theirs.try_clone()?));
    let writer = File::from(OwnedFd::from(theirs.try_clone()?));
    thread::scope(|scope| {
        let head = scope.spawn(|| {
            let mut rest = wire;
            while !rest.is_empty() {
                // The agent may have closed the stream.
                let Ok(sent) = fd::send(ours.as_raw_fd(), &[IoSlice::new(rest)]) else {
                    return;
                };
                rest = &rest[sent..];
            }
            let _ = ours.shutdown(Shutdown::Write);
        });
        let greeted = startup::greet_over(reader, writer, &hello());
        let _ = theirs.shutdown(Shutdown::Both);
        head.join().expect("no panic");
        greeted
    })
}

/// The first byte: which side is greeted, and whether the magic line is put before the rest.
pub fn greetings(data: &[u8]) {
    let Some((&how, rest)) = data.split_first() else {
        return;
    };
    let slices = slices(rest);
    let magic = if how & 2 != 0 { MAGIC } else { b"" };
    if how & 1 != 0 {
        let wire = [magic, &slices.concat()].concat();
        if let Ok(greeted) = greet_agent(&wire) {
            assert!(wire.windows(MAGIC.len()).any(|window| window == MAGIC));
            let _ = greeted.start.workers;
        }
        return;
    }
    let mut greeting = Greeting::default();
    let mut fed = 0;
    for slice in [magic].into_iter().chain(slices) {
        fed += slice.len();
        match greeting.feed(slice) {
            Ok(None) => assert!(fed <= MAX_NOISE + MAGIC.len() + HEADER_LEN + MAX_BODY),
            Ok(Some(theirs)) => {
                let _ = hello().check(&theirs);
                assert!(greeting.take_rest().len() <= slice.len());
                break;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                break;
            }
        }
    }
    // Each byte may become a replacement character of three.
    assert!(greeting.noise().len() <= 3 * (MAX_NOISE + 257));
}

/// Bytes that a program of a few bytes a step is read from. At its end they are zeros.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn next(&mut self) -> Option<u8> {
        (!self.0.is_empty()).then(|| self.0.get_u8())
    }

    fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// The bytes of a frame that may be valid: a few bytes of the script make many. Some sizes stand
    /// for frames about blobs and time limits.
    fn frame(&mut self, kinds: [Kind; 4]) -> Vec<u8> {
        let what = self.byte();
        let mut kind = kinds[usize::from(what >> 6)];
        let flags = what & 31;
        let (target, size) = (self.byte(), self.byte());
        if size == 252 {
            let (worker, task) = (u32::from(target >> 5), u64::from(target & 31));
            let last = flags & LAST != 0;
            let mut shared = Frame::blob_reference(worker, task, task % 4, last);
            shared.header.flags |= flags & !FIRST;
            return wire(&shared);
        }
        if size == 251 {
            let (worker, task) = (u32::from(target >> 5), u64::from(target & 31));
            return wire(&Frame::limit(
                worker,
                task,
                Duration::from_secs(flags.into()),
            ));
        }
        if size == 253 {
            kind = Kind::Blob;
        }
        let len = match size {
            0..128 => u32::from(size),
            128..250 => (u32::from(size) - 127) * 512,
            250..254 => MAX_BODY as u32,
            254 => MAX_BODY as u32 + 1,
            255 => u32::MAX,
        };
        let header = Header {
            kind,
            flags,
            worker: u32::from(target >> 5),
            task: u64::from(target & 31),
            len,
        };
        let mut wire = header.to_bytes().to_vec();
        if header.body_len() <= MAX_BODY {
            wire.resize(HEADER_LEN + header.body_len(), b'x');
        }
        wire
    }

    /// A control message from its variant's number and its fields' bytes.
    fn control(&mut self) -> Vec<u8> {
        let mut body = u32::from(self.byte()).to_le_bytes().to_vec();
        body.extend(u32::from(self.byte()).to_le_bytes());
        let len = self.byte();
        body.extend_from_slice(self.take(len.into()));
        let frame = Frame::new(Kind::Control, FIRST | LAST, 0, 0, body.into());
        [&frame.header.to_bytes()[..], &frame.body].concat()
    }
}

/// As the hub, of which R asks for nothing in particular: two hosts of two workers.
struct Head {
    scheduler: Scheduler,
    received: BytesMut,
    next_task: u64,
    /// Ends of tasks that are still to come.
    open: HashMap<u64, Rank>,
    /// Bytes of the answers that R has not taken.
    answers: usize,
    submitted: usize,
}

const LIMIT: usize = 300_000;
const RANKS: Rank = 4;

impl Head {
    fn new() -> Head {
        let mut scheduler = Scheduler::new(vec![vec![0, 2], vec![1, 3]], LIMIT);
        for agent in 0..2 {
            for worker in 0..2 {
                let up = ToHead::WorkerUp { worker, pid: 1 };
                let frame = control::encode(&up).expect("a small message");
                scheduler.on_frame(agent, frame).expect("in order");
            }
        }
        let mut head = Head {
            scheduler,
            received: BytesMut::new(),
            next_task: 1,
            open: HashMap::new(),
            answers: 0,
            submitted: 0,
        };
        for rank in [0, 1, 2, 0] {
            head.submit(rank, 10);
        }
        head.send();
        head
    }

    fn submit(&mut self, rank: Rank, len: usize) {
        let task = self.next_task;
        self.next_task += 1;
        self.open.insert(task, rank);
        let chunk = Bytes::from(vec![0; len]).into();
        self.scheduler.submit(Order {
            rank,
            task,
            job: task / 4,
            setup_call: (len % 3 == 0).then_some(task % 2),
            on_behalf_of: (len % 5 == 0).then_some((rank + 1) % RANKS),
            prefetch: len % 2 == 0,
            ..Order::default()
        });
        self.scheduler.append(rank, task, chunk, true);
        self.submitted += 1;
    }

    /// All streams take all there is.
    fn send(&mut self) {
        for agent in 0..2 {
            while self.scheduler.next_frame(agent).is_some() {}
        }
    }

    fn pump(&mut self) {
        for note in self.scheduler.take_notes() {
            let Note::Done { task, outcome, .. } = note else {
                continue;
            };
            assert!(self.open.remove(&task).is_some(), "task {task} ended twice");
            if let Outcome::Answer(body) = outcome {
                let bytes: usize = body.chunks.iter().map(Bytes::len).sum();
                assert_eq!(bytes, body.len);
                assert!(
                    body.chunks.len() <= 2 + body.len / 2048,
                    "too many small chunks"
                );
                self.answers += body.len;
            }
        }
        // The answers that R has are all that is not bounded by the limit: of each, what agents
        // may send unasked.
        let max = LIMIT + GRANT + self.submitted * RESULT_WINDOW;
        assert!(self.scheduler.buffered() <= max);
        assert!(self.answers <= self.scheduler.buffered());
    }

    /// As the hub does with what it has read from the first host.
    fn receive(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        self.received.extend_from_slice(bytes);
        let text = |error: FrameError| ProtocolError(error.to_string());
        while let Some(frame) = frame::decode(&mut self.received).map_err(text)? {
            let received = self.scheduler.on_frame(0, frame);
            self.pump();
            received?;
        }
        assert!(self.received.capacity() <= 2 * (HEADER_LEN + MAX_BODY));
        Ok(())
    }

    fn end(mut self) {
        self.scheduler.taken(self.answers);
        self.answers = 0;
        self.scheduler.agent_lost(0, "it is a stranger");
        self.pump();
        // The other host is as it was.
        self.submit(1, 10);
        let served = |head: &mut Head| head.open.values().any(|rank| rank % 2 == 1);
        assert!(served(&mut self));
        self.send();
        self.scheduler.agent_lost(1, "that is all");
        self.pump();
        assert!(self.open.is_empty(), "tasks that never end");
        assert_eq!(self.scheduler.buffered(), 0);
        assert!(!self.scheduler.any_left() && !self.scheduler.is_blocked_on_credit());
    }
}

/// A stream from an agent after the handshake, while R goes about its work.
pub fn to_head(data: &[u8]) {
    let mut script = Script(data);
    let mut head = Head::new();
    while let Some(step) = script.next() {
        let operand = step >> 4;
        let rank = Rank::from(operand) % RANKS;
        let received = match step & 15 {
            0..=3 => {
                let kinds = [Kind::Data, Kind::Credit, Kind::Output, Kind::Seed];
                let wire = script.frame(kinds);
                head.receive(&wire)
            }
            4..=6 => {
                let wire = script.control();
                head.receive(&wire)
            }
            7 | 8 => {
                let len = script.byte().into();
                head.receive(script.take(len))
            }
            step => {
                let scheduler = &mut head.scheduler;
                match step {
                    9 => head.submit(rank, usize::from(operand) * 1000),
                    10 => head.send(),
                    11 => {
                        scheduler.taken(head.answers);
                        head.answers = 0;
                    }
                    12 => scheduler.cancel_job(operand.into()),
                    13 => scheduler.cancel_task(rank, operand.into()),
                    14 => scheduler.demand(if operand > 7 {
                        Demand::Nothing
                    } else {
                        Demand::AnyOf((0..8).collect())
                    }),
                    _ if operand == 0 => scheduler.stop_worker(rank),
                    _ => scheduler.revoke(rank, operand.into()),
                }
                head.pump();
                Ok(())
            }
        };
        if received.is_err() {
            break;
        }
    }
    head.end();
}

/// The agent's decisions, and as little of the rest as they need.
struct Host {
    router: Router,
    received: BytesMut,
    /// What has come from each worker and waits.
    undecoded: [BytesMut; WORKERS],
    now: Duration,
    /// Workers that are to be made.
    starting: Vec<u32>,
    /// Bytes on their way to each worker.
    forwarded: [usize; WORKERS],
    /// Blobs in memory that is shared.
    stored: Vec<u64>,
    acts: Vec<Act>,
}

const WORKERS: usize = 3;

impl Host {
    fn receive(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        self.received.extend_from_slice(bytes);
        let result = self
            .router
            .from_head(&mut self.received, self.now, &mut self.acts);
        self.act();
        if result.is_ok() {
            assert!(self.received.capacity() <= 2 * (HEADER_LEN + MAX_BODY));
        }
        for worker in 0..WORKERS as u32 {
            let max = 2 * SEND_WINDOW + HEADER_LEN + MAX_BODY;
            assert!(self.router.prefetched(worker) <= max);
        }
        result
    }

    fn act(&mut self) {
        for act in std::mem::take(&mut self.acts) {
            match act {
                Act::Store { blob, .. } => self.stored.push(blob),
                Act::Discard(blob) => {
                    assert!(self.stored.contains(&blob));
                    self.stored.retain(|&stored| stored != blob);
                }
                Act::ToWorker(frame) | Act::Hand { frame } => {
                    assert_eq!(frame.header.body_len(), frame.body.len());
                    assert!(frame.body.len() <= MAX_BODY);
                    self.forwarded[frame.header.worker as usize] += frame.wire_len();
                }
                Act::ToHead(frame) => {
                    assert!((frame.header.worker as usize) < WORKERS);
                    let shared =
                        frame.header.flags == FIRST | BY_REFERENCE && frame.number().is_some();
                    let flags = frame.header.flags & !(FIRST | LAST | ABORT | REASSIGNED);
                    assert!(shared || flags == 0);
                }
                Act::Along(frame) => {
                    assert!((frame.header.worker as usize) < WORKERS);
                    assert!(frame.header.flags == LAST | BY_REFERENCE && frame.number().is_some());
                }
                Act::Interrupt { worker, task } => {
                    assert_eq!(self.router.worker_table.task(worker), Some(task));
                }
                Act::ReadAgain(worker) => self.record_received(worker, &[]),
                Act::Up { worker, .. }
                | Act::Close(worker)
                | Act::LetGo(worker)
                | Act::TempDir(worker, _) => {
                    assert!((worker as usize) < WORKERS);
                }
                Act::Report(message) => assert!(control::encode(&message).is_ok()),
                Act::SendCall { call, .. } => {
                    let pieces = call.into_iter().flat_map(|call| call.pieces);
                    assert!(pieces.map(|piece| piece.len()).all(|len| len <= MAX_BODY));
                }
                Act::Keep(frame) => assert!((frame.header.worker as usize) < WORKERS),
                Act::ListKept | Act::SendKept { .. } | Act::DropKept(_) => {}
                Act::Usage { .. } | Act::Dump { .. } | Act::End => {}
            }
        }
    }

    /// A worker that sends nonsense is killed; the others are none the wiser.
    fn record_received(&mut self, worker: u32, bytes: &[u8]) {
        if self.starting.contains(&worker) {
            return;
        }
        let undecoded = &mut self.undecoded[worker as usize];
        undecoded.extend_from_slice(bytes);
        let mut bytes = std::mem::take(undecoded);
        let result = self
            .router
            .from_worker(worker, &mut bytes, self.now, &mut self.acts);
        self.undecoded[worker as usize] = bytes;
        self.act();
        if result.is_err() {
            self.exit(worker);
        }
    }

    fn exit(&mut self, worker: u32) {
        if self.starting.contains(&worker) {
            return;
        }
        self.undecoded[worker as usize].clear();
        match self.router.exited(worker, true, self.now) {
            Ending::Replace | Ending::Lost { replaced: true, .. } => self.starting.push(worker),
            _ => {}
        }
    }

    fn make(&mut self, worker: u32, replaces: bool) {
        self.router.made(worker, replaces, self.now);
        let tempdir = String::new();
        let ready = control::encode(&WorkerReady {
            tempdir,
            ready: true,
        })
        .expect("a small message");
        self.record_received(worker, &wire(&ready));
    }
}

fn wire(frame: &Frame) -> Vec<u8> {
    [&frame.header.to_bytes(), &frame.body[..]].concat()
}

/// A stream from a head after the handshake, while workers go about theirs.
pub fn to_agent(data: &[u8]) {
    let mut script = Script(data);
    let mut router = Router::new(WORKERS, 200_000, 300_000);
    router.worker_table.shared_answers = data.first().is_some_and(|byte| byte & 1 == 1);
    let mut host = Host {
        router,
        received: BytesMut::new(),
        undecoded: Default::default(),
        now: Duration::ZERO,
        starting: Vec::new(),
        forwarded: [0; WORKERS],
        stored: Vec::new(),
        acts: Vec::new(),
    };
    for worker in 0..WORKERS as u32 {
        host.make(worker, false);
    }
    while let Some(step) = script.next() {
        let worker = u32::from(step >> 4) % WORKERS as u32;
        let received = match step & 15 {
            0..=4 => {
                let kinds = [Kind::Data, Kind::Seed, Kind::Credit, Kind::State];
                let wire = script.frame(kinds);
                host.receive(&wire)
            }
            5 | 6 => {
                let wire = script.control();
                host.receive(&wire)
            }
            7 | 8 => {
                let len = script.byte().into();
                host.receive(script.take(len))
            }
            9 | 10 => {
                let mut wire = script.frame([Kind::Data, Kind::Data, Kind::Seed, Kind::Control]);
                // To one of those tasks by which it is restored, sometimes: the highest bit.
                if wire.len() >= HEADER_LEN && wire[8] % 2 == 1 {
                    wire[15] |= 0x80;
                }
                host.record_received(worker, &wire);
                Ok(())
            }
            11 => {
                let bytes = std::mem::take(&mut host.forwarded[worker as usize]);
                if let Some((_, credit)) = host.router.worker_table.passed(worker, bytes) {
                    assert!(credit as usize >= bytes);
                }
                Ok(())
            }
            12 => {
                // The answer that a worker of ours would give.
                if let Some(task) = host.router.worker_table.task(worker) {
                    let answer = Bytes::from_static(b"x");
                    let answer = Frame::new(Kind::Data, FIRST | LAST, worker, task, answer);
                    host.record_received(worker, &wire(&answer));
                }
                Ok(())
            }
            13 => {
                host.now += Duration::from_millis(700);
                host.router.out_of_time(host.now, &mut host.acts);
                host.act();
                for worker in host.router.worker_table.overdue(host.now) {
                    host.exit(worker);
                }
                Ok(())
            }
            14 => {
                if let Some(worker) = host.starting.pop() {
                    host.make(worker, true);
                }
                Ok(())
            }
            _ => {
                host.router.worker_table.hung_up(worker, host.now);
                Ok(())
            }
        };
        if received.is_err() {
            break;
        }
    }
    for worker in 0..WORKERS as u32 {
        host.router.stop(worker, host.now, &mut host.acts);
        host.router.exited(worker, true, host.now);
    }
    assert!(host.router.worker_table.all_terminated());
}
