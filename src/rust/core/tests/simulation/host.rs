//! Simulated hosts: the agent's decisions (`agent/`) without system calls.

use crate::parts::{Facts, Pipe, generation, part};
use crate::worker::Process;
use bytes::{Bytes, BytesMut};
use rustcluster_core::agent::action::Act;
use rustcluster_core::agent::linger;
use rustcluster_core::agent::linger::Kept;
use rustcluster_core::agent::linger::kept::{ArrivingAnswer, KeptAnswers};
use rustcluster_core::agent::router::Router;
use rustcluster_core::agent::setup_log::ReplayedCall;
use rustcluster_core::agent::worker_table::restart::SETBACKS;
use rustcluster_core::agent::worker_table::{Ending, Now, REPLAY};
use rustcluster_core::platform::exit::Exit;
use rustcluster_core::protocol::control::{self, Start, ToAgent, ToHead, WorkerFailure};
use rustcluster_core::protocol::frame::{
    self, ABORT, BY_REFERENCE, FIRST, Frame, HEADER_LEN, Kind, LAST, MAX_BODY,
};
use rustcluster_core::protocol::ids::{BlobId, KEEP, RESTORE, Rank, TaskId};
use rustcluster_core::protocol::send_queue::OutBuf;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::Path;

/// Maximum number of bytes that the agent reads at a time.
pub const READ: usize = 256 * 1024;
/// An agent stops reading from its workers when this many bytes wait to be sent to the head. Lower
/// than in production, so that the simulation reaches it.
pub const BACKLOG: usize = 512 * 1024;

/// A persistent fault of a host.
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    None,
    /// Its workers crash when they start a task.
    Tasks,
    /// Its workers crash before they are ready.
    Starts,
}

/// What connects an agent to its head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Link {
    /// The head has sent the start request.
    Up,
    /// The agent has accepted another head, whose start request has not arrived.
    Greeting,
    /// The agent waits for another head.
    Down,
}

pub struct Host {
    /// No agent is connected.
    pub lost: bool,
    /// No agent connects any more.
    pub over: bool,
    /// An agent has ended, or none has come.
    pub served: bool,
    /// The agent has got its start request.
    started: bool,
    pub fault: Fault,
    pub ranks: Vec<Rank>,
    pub out: OutBuf,
    pub down: Pipe,
    pub received: BytesMut,
    pub router: Router,
    acts: Vec<Act>,
    /// Blobs in shared memory, and whether they are complete.
    pub stored: HashMap<BlobId, (BytesMut, bool)>,
    pub processes: Vec<Option<Process>>,
    pub to_start: VecDeque<(u32, bool)>,
    pub to_head: OutBuf,
    pub up: Pipe,
    pub head_received: BytesMut,
    pub link: Link,
    /// The head has vanished, and the agent has not noticed it: what the head has written may still arrive.
    pub head_gone: bool,
    kept: KeptAnswers,
    arriving: Vec<ArrivingAnswer>,
    /// The calls whose answers the agent must have kept.
    pub must_keep: BTreeSet<TaskId>,
    /// The calls whose workers were stopped: their kept answers say that they were interrupted.
    pub cut: BTreeSet<TaskId>,
}

impl Host {
    /// A host without an agent.
    pub fn new(ranks: &[Rank], stream: usize) -> Host {
        Host {
            lost: true,
            over: false,
            served: false,
            started: false,
            fault: Fault::None,
            ranks: ranks.to_vec(),
            out: OutBuf::default(),
            down: Pipe::new(stream),
            received: BytesMut::new(),
            router: Router::new(ranks.len(), 0, 0),
            acts: Vec::new(),
            stored: HashMap::new(),
            processes: ranks.iter().map(|_| None).collect(),
            to_start: VecDeque::new(),
            to_head: OutBuf::default(),
            up: Pipe::new(stream),
            head_received: BytesMut::new(),
            link: Link::Up,
            head_gone: false,
            kept: KeptAnswers::new(usize::MAX),
            arriving: ranks.iter().map(|_| ArrivingAnswer::default()).collect(),
            must_keep: BTreeSet::new(),
            cut: BTreeSet::new(),
        }
    }

    /// A fresh agent connects.
    pub fn connect(&mut self, stream: usize) {
        assert!(self.lost && !self.over);
        *self = Host {
            lost: false,
            served: self.served,
            fault: self.fault,
            ..Host::new(&self.ranks, stream)
        };
    }

    /// The agent waits for its start request. Returns whether it has one.
    fn start(&mut self) -> bool {
        if self.started {
            return true;
        }
        let Some(frame) = frame::decode(&mut self.received).expect("a frame") else {
            return false;
        };
        match control::decode(&frame.body).expect("a message") {
            ToAgent::Start(start) => {
                assert_eq!(start.ranks, self.ranks);
                let bounds = (start.chunk_cache_bytes as usize, start.state as usize);
                self.router = Router::new(self.ranks.len(), bounds.0, bounds.1);
                self.router.worker_table.shared_answers = start.local;
                self.arriving = self
                    .ranks
                    .iter()
                    .map(|_| ArrivingAnswer::default())
                    .collect();
                self.to_start = (0..start.workers).map(|worker| (worker, false)).collect();
                self.started = true;
            }
            ToAgent::Stop => self.lost = true,
            message => panic!("{message:?} before the start"),
        }
        self.started
    }

    pub fn read_head(&mut self, max: usize, now: Now, facts: &mut Facts) -> u64 {
        let moved = self.down.read(&mut self.received, max);
        if !self.start() || !self.is_accepted() {
            return moved as u64;
        }
        let result = self
            .router
            .from_head(&mut self.received, now, &mut self.acts);
        self.act(now, facts);
        if let Err(error) = result {
            panic!("an agent refuses what the head sent: {error}");
        }
        moved as u64
    }

    /// The agent has noticed that its head has vanished, and waits for another. Before its start, it ends.
    pub fn disconnect(&mut self, stream: usize, now: Now, facts: &mut Facts) {
        self.head_gone = false;
        self.received.clear();
        self.to_head = OutBuf::default();
        (self.down, self.up) = (Pipe::new(stream), Pipe::new(stream));
        if !self.started || !self.router.is_of_use() {
            self.lost = true;
            return;
        }
        self.link = Link::Down;
        let detached = self.router.detach(now, &mut self.acts);
        detached.expect("tasks that the head has sent");
        self.act(now, facts);
    }

    /// The agent accepts another head.
    pub fn accept(&mut self) {
        assert!(self.link == Link::Down && !self.head_gone && self.received.is_empty());
        self.link = Link::Greeting;
    }

    /// Reads the start request of another head. Returns whether it has arrived.
    fn is_accepted(&mut self) -> bool {
        if self.link != Link::Greeting {
            return true;
        }
        let Some(frame) = frame::decode(&mut self.received).expect("a frame") else {
            return false;
        };
        match control::decode(&frame.body).expect("a message") {
            ToAgent::Start(start) => self.take_up(&start),
            ToAgent::Stop => self.lost = true,
            message => panic!("{message:?} before the start"),
        }
        !self.lost
    }

    /// The agent goes on with another head.
    fn take_up(&mut self, start: &Start) {
        assert_eq!(start.ranks, self.ranks);
        self.link = Link::Up;
        let pending = self.processes.iter().map(|process| {
            let process = process.as_ref();
            process.map_or(0, |process| process.outgoing.len())
        });
        let pending: Vec<usize> = pending.collect();
        let states = self
            .router
            .attach(start.chunk_cache_bytes as usize, &pending);
        for (worker, state) in (0..).zip(states) {
            if state == Kept::Idle {
                self.report_seed(worker);
            }
            let process = self.processes[worker as usize].as_mut();
            let pid = process.map(|process| {
                process.is_up |= matches!(state, Kept::Idle | Kept::Busy);
                worker + 1000
            });
            if let Some(message) = state.message(worker, pid) {
                self.report(&message);
            }
        }
    }

    fn report_seed(&mut self, worker: u32) {
        if let Some(seed) = self.router.seed(worker).filter(|_| self.link == Link::Up) {
            self.to_head
                .push(&Frame::new(Kind::Seed, 0, worker, 0, seed));
        }
    }

    fn send(&mut self, frame: &Frame) {
        if self.link == Link::Up {
            self.to_head.push(frame);
        }
    }

    /// Sends parts that the head has asked for.
    fn send_parts(&mut self, request: u64, parts: Option<Vec<Bytes>>) {
        for frame in linger::frames_of(request, parts) {
            self.send(&frame);
        }
    }

    /// Keeps a part of the answer to a task of a head that has vanished.
    fn keep(&mut self, frame: Frame, facts: &Facts) {
        let (worker, flags, task) = (frame.header.worker, frame.header.flags, frame.header.task);
        let parts = match flags & BY_REFERENCE {
            0 => vec![frame.body],
            _ => {
                let len = facts.tasks[task].answer_len;
                let at = (0..len).step_by(MAX_BODY);
                at.map(|at| part(task, true, at, MAX_BODY.min(len - at)))
                    .collect()
            }
        };
        let process = self.processes[worker as usize].as_mut().expect("a process");
        if flags & FIRST != 0 {
            process.kept_from_start = true;
        }
        if self.router.worker_table.is_stopping(worker) {
            self.cut.insert(task);
        } else if flags & LAST != 0 && process.kept_from_start && task & KEEP != 0 {
            assert!(self.must_keep.insert(task), "call {task} ends twice");
        }
        let whole = self.arriving[worker as usize].take(flags, parts);
        if let Some(body) = whole.filter(|_| task & KEEP != 0) {
            let kept = self.kept.keep(task, body, Path::new("/nonexistent"));
            kept.expect("memory");
        }
    }

    /// The message of a set-up call, which the head has asked for.
    fn call(&self, call: ReplayedCall) -> Option<Vec<Bytes>> {
        let blob = match call.blob {
            None => Vec::new(),
            Some(id) => match self.router.small_blob(id) {
                Some(bytes) => vec![bytes],
                None => {
                    let (bytes, complete) = self.stored.get(&id)?;
                    assert!(complete);
                    bytes.chunks(MAX_BODY).map(Bytes::copy_from_slice).collect()
                }
            },
        };
        Some([blob, call.pieces].concat())
    }

    /// Carries out the decisions of the router.
    fn act(&mut self, now: Now, facts: &mut Facts) {
        for act in std::mem::take(&mut self.acts) {
            match act {
                Act::ToHead(frame) | Act::Along(frame) => {
                    self.check(&frame, facts);
                    self.send(&frame);
                }
                Act::Keep(frame) => {
                    self.check(&frame, facts);
                    self.keep(frame, facts);
                }
                // There is no descriptor to close in the simulation.
                Act::LetGo(worker) => assert!((worker as usize) < self.ranks.len()),
                Act::Report(message) => {
                    match message {
                        ToHead::TimedOut { worker, task, .. } => {
                            self.check_time(worker, task, now, facts);
                        }
                        ToHead::SetupCalls { worker, .. } => {
                            let process = self.processes[worker as usize].as_ref();
                            let running = process.and_then(|process| process.complete);
                            let running = running.and_then(|(task, _)| facts.tasks.get(task));
                            let rank = self.ranks[worker as usize];
                            facts.workers[rank as usize].listed_running =
                                running.and_then(|task| task.effect);
                        }
                        ToHead::StateNotLogged { worker } => {
                            let rank = self.ranks[worker as usize];
                            assert!(facts.workers[rank as usize].is_logged, "reported twice");
                            facts.workers[rank as usize].is_logged = false;
                        }
                        _ => {}
                    }
                    self.report(&message);
                }
                Act::ToWorker(frame) => self.send_worker(&frame, now),
                Act::Store { blob, bytes, last } => {
                    let (stored, complete) = self.stored.entry(blob).or_default();
                    assert!(
                        !std::mem::replace(complete, last),
                        "blob {blob} is already complete"
                    );
                    stored.extend_from_slice(&bytes);
                }
                Act::Hand { frame } => {
                    let (bytes, complete) = &self.stored[&frame.header.task];
                    assert!(*complete && frame.number() == Some(bytes.len() as u64));
                    let worker = frame.header.worker as usize;
                    if let Some(process) = &mut self.processes[worker] {
                        process.shared_memory.push_back(bytes.clone().freeze());
                    }
                    self.send_worker(&frame, now);
                }
                Act::Discard(blob) => {
                    assert!(self.stored.remove(&blob).is_some());
                }
                Act::Up { worker, replaces } => self.report_up(worker, replaces, facts),
                Act::Interrupt { worker, task } => {
                    let frame = Frame::new(Kind::Cancel, 0, worker, task, Bytes::new());
                    self.send_worker(&frame, now);
                }
                // Each step reads all that can be read.
                Act::ReadAgain(_) => {}
                Act::Close(worker) => {
                    if let Some(process) = &mut self.processes[worker as usize] {
                        process.closing = true;
                    }
                }
                Act::TempDir(worker, _) => {
                    let rank = self.ranks[worker as usize];
                    facts.workers[rank as usize].was_ready = true;
                }
                // The simulated head does not request these.
                Act::Usage { .. } | Act::Dump { .. } => {}
                Act::SendCall { request, call } => {
                    let parts = call.and_then(|call| self.call(call));
                    self.send_parts(request, parts);
                }
                Act::ListKept => {
                    let answers = self.kept.list();
                    self.report(&ToHead::KeptAnswers {
                        answers,
                        last: true,
                    });
                }
                Act::SendKept { number, request } => {
                    let parts = self.kept.read(number);
                    self.send_parts(request, parts);
                }
                Act::DropKept(number) => self.kept.drop_answer(number),
                Act::End => self.lost = true,
            }
        }
    }

    /// Records the effects and the RNG state of a worker. They count from when its agent has forwarded the
    /// end of the answer.
    fn check(&mut self, frame: &Frame, facts: &mut Facts) {
        let header = &frame.header;
        let worker = header.worker as usize;
        let process = self.processes[worker].as_mut().expect("a process");
        if header.kind != Kind::Data {
            return;
        }
        if process.complete.is_none_or(|(task, _)| task != header.task) {
            // The agent has dropped the prefetched task.
            assert_eq!(header.flags, LAST | ABORT);
            assert!(!facts.tasks[header.task].started);
            return;
        }
        process.answering = true;
        if header.flags & FIRST != 0 {
            process.kept_from_start = false;
        }
        if header.flags & LAST == 0 {
            return;
        }
        process.complete = None;
        process.answering = false;
        let known = &mut facts.workers[self.ranks[worker] as usize];
        known.seed = process.worker.seed.clone();
        if header.task & RESTORE != 0 {
            assert_eq!(header.flags & ABORT, 0);
            let seed = known.seed.clone();
            known.restored_seeds.insert(header.task, seed);
            known.effects.extend(process.worker.effects.last());
            return;
        }
        let task = &facts.tasks[header.task];
        let effect = task.effect;
        if header.flags & ABORT == 0 {
            known.effects.extend(effect);
        } else {
            // The effect of an interrupted or late task does not count.
            let effects = &mut process.worker.effects;
            effects.retain(|effect| effect.task != header.task);
        }
    }

    /// Checks that a task timed out rightly. Its time limit is measured from when its worker has the
    /// complete message, and no longer applies once it has started to answer.
    fn check_time(&self, worker: u32, task: u64, now: Now, facts: &Facts) {
        let process = self.processes[worker as usize].as_ref();
        let process = process.expect("a process");
        let limit = facts.tasks[task].limit.expect("a time limit");
        let (complete, since) = process.complete.expect("a task");
        assert_eq!(complete, task);
        assert!(since + limit <= now, "task {task} is out of time too early");
        assert!(!process.answering, "task {task} has ended in time");
    }

    fn send_worker(&mut self, frame: &Frame, now: Now) {
        let header = &frame.header;
        if let Some(process) = &mut self.processes[header.worker as usize] {
            process.outgoing.push(frame);
            if header.kind != Kind::Data || header.task & REPLAY != 0 {
                process.bytes_from_agent += frame.wire_len();
            } else if header.flags & LAST != 0 {
                process.complete = (header.flags & ABORT == 0).then_some((header.task, now));
            }
        }
    }

    pub fn report(&mut self, message: &ToHead) {
        self.send(&control::encode(message).expect("a frame"));
    }

    fn report_up(&mut self, worker: u32, replaces: bool, facts: &mut Facts) {
        let rank = self.ranks[worker as usize];
        let known = &mut facts.workers[rank as usize];
        known.setbacks = 0;
        facts.seen.restored += usize::from(replaces && !known.effects.is_empty());
        let process = self.processes[worker as usize].as_mut();
        process.expect("a process").is_up = true;
        let pid = worker + 1000;
        if self.router.is_unknown_to_head(worker) {
            self.report_seed(worker);
        }
        let replaces = self.router.introduce(worker, replaces);
        self.report(&if replaces {
            ToHead::WorkerReplaced { worker, pid }
        } else {
            ToHead::WorkerUp { worker, pid }
        });
    }

    /// Acts on deadlines that have passed.
    pub fn tick(&mut self, now: Now, facts: &mut Facts) -> u64 {
        let mut moved = 0;
        self.router.out_of_time(now, &mut self.acts);
        moved += self.acts.len() as u64;
        self.act(now, facts);
        for worker in self.router.worker_table.to_restart(now) {
            self.to_start.push_back((worker, true));
            moved += 1;
        }
        for worker in self.router.worker_table.overdue(now) {
            if let Some(process) = &mut self.processes[worker as usize] {
                process.dead = true;
                moved += 1;
            }
        }
        moved
    }

    pub fn read_worker(&mut self, worker: u32, max: usize, now: Now, facts: &mut Facts) -> u64 {
        if self.to_head.len() >= BACKLOG {
            return 0;
        }
        let mut moved = self.pass_on(worker, now, facts);
        if let Some(process) = &mut self.processes[worker as usize] {
            if process.unrouted.len() < HEADER_LEN + MAX_BODY {
                moved += process.up.read(&mut process.unrouted, max.min(READ)) as u64;
                moved += self.pass_on(worker, now, facts);
            }
        }
        moved
    }

    /// Routes the complete frames that have been read from a worker, up to one that must wait.
    fn pass_on(&mut self, worker: u32, now: Now, facts: &mut Facts) -> u64 {
        let Some(process) = &mut self.processes[worker as usize] else {
            return 0;
        };
        let mut unrouted = std::mem::take(&mut process.unrouted);
        let before = unrouted.len();
        let result = self
            .router
            .from_worker(worker, &mut unrouted, now, &mut self.acts);
        result.expect("what a worker may send");
        let moved = before - unrouted.len();
        if let Some(process) = &mut self.processes[worker as usize] {
            process.unrouted = unrouted;
        }
        self.act(now, facts);
        self.check_end(worker, facts);
        moved as u64
    }

    /// A cancelled task of a head that has vanished ends without a word.
    fn check_end(&mut self, worker: u32, facts: &mut Facts) {
        let Some(process) = &mut self.processes[worker as usize] else {
            return;
        };
        let ended = |(task, _): &mut _| self.router.worker_table.task(worker) != Some(*task);
        if let Some((task, _)) = process.complete.take_if(ended) {
            assert!(generation(task) < facts.tasks.generation() || self.link != Link::Up);
            process.answering = false;
            process.worker.effects.retain(|effect| effect.task != task);
            let known = &mut facts.workers[self.ranks[worker as usize] as usize];
            known.seed = process.worker.seed.clone();
        }
    }

    pub fn on_exit(&mut self, worker: u32, now: Now, facts: &mut Facts) {
        // An answer that was complete before the exit still counts, if the backlog has room for it.
        while self.read_worker(worker, READ, now, facts) > 0 {}
        let process = self.processes[worker as usize].take().expect("a process");
        self.arriving[worker as usize].drop_parts();
        let rank = self.ranks[worker as usize];
        let known = &mut facts.workers[rank as usize];
        known.setbacks += u32::from(!process.is_up);
        let may_be_replaced = known.is_logged && known.was_ready && known.setbacks < SETBACKS;
        match self.router.exited(worker, true, now) {
            Ending::Stopped { timed_out } => {
                self.report(&ToHead::WorkerStopped { worker, timed_out });
            }
            Ending::Replace => {
                assert!(may_be_replaced);
                self.to_start.push_back((worker, true));
            }
            Ending::Waits => assert!(!may_be_replaced),
            Ending::Lost { replaced, setback } => {
                assert_eq!(replaced, may_be_replaced, "worker {rank}");
                let failure = WorkerFailure {
                    pid: worker + 1000,
                    exit: Exit::Signal(9),
                    tail: "killed".into(),
                    setback,
                    ..WorkerFailure::default()
                };
                self.report(&ToHead::WorkerFailed {
                    worker,
                    failure,
                    replaced,
                });
                if replaced {
                    self.to_start.push_back((worker, true));
                }
            }
        }
    }
}
