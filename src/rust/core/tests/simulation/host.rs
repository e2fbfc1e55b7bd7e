//! Simulated hosts: the agent, as in `agent/`, without its system calls.

use crate::parts::{Facts, Pipe};
use crate::worker::Process;
use bytes::{Bytes, BytesMut};
use rustcluster_core::agent::action::Act;
use rustcluster_core::agent::router::Router;
use rustcluster_core::agent::worker_table::restart::SETBACKS;
use rustcluster_core::agent::worker_table::{Ending, Now, REPLAY};
use rustcluster_core::platform::exit::Exit;
use rustcluster_core::protocol::control::{self, ToHead, WorkerFailure};
use rustcluster_core::protocol::frame::{ABORT, Frame, HEADER_LEN, Kind, LAST, MAX_BODY};
use rustcluster_core::protocol::ids::{BlobId, Rank};
use rustcluster_core::protocol::send_queue::OutBuf;
use std::collections::{HashMap, VecDeque};

/// As the agent reads at a time.
pub const READ: usize = 256 * 1024;
/// Agents stop reading from workers when so much waits for the head. Less than in reality, so
/// that it happens.
pub const BACKLOG: usize = 512 * 1024;

/// What ails a host.
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    None,
    /// Workers end when they start a task.
    Tasks,
    /// They end before they can be given one.
    Starts,
}

pub struct Host {
    pub lost: bool,
    pub fault: Fault,
    pub ranks: Vec<Rank>,
    pub out: OutBuf,
    pub down: Pipe,
    pub received: BytesMut,
    pub router: Router,
    acts: Vec<Act>,
    /// Blobs in memory that is shared, with those that are complete.
    pub stored: HashMap<BlobId, (BytesMut, bool)>,
    pub processes: Vec<Option<Process>>,
    pub to_make: VecDeque<(u32, bool)>,
    pub to_head: OutBuf,
    pub up: Pipe,
    pub head_received: BytesMut,
}

impl Host {
    pub fn new(ranks: &[Rank], stream: usize, (keep, state): (usize, usize)) -> Host {
        let workers = ranks.len() as u32;
        let mut router = Router::new(ranks.len(), keep, state);
        router.worker_table.shared_answers = true;
        Host {
            lost: false,
            fault: Fault::None,
            ranks: ranks.to_vec(),
            out: OutBuf::default(),
            down: Pipe::new(stream),
            received: BytesMut::new(),
            router,
            acts: Vec::new(),
            stored: HashMap::new(),
            processes: ranks.iter().map(|_| None).collect(),
            to_make: (0..workers).map(|worker| (worker, false)).collect(),
            to_head: OutBuf::default(),
            up: Pipe::new(stream),
            head_received: BytesMut::new(),
        }
    }

    pub fn read_head(&mut self, most: usize, now: Now, facts: &mut Facts) -> u64 {
        let moved = self.down.read(&mut self.received, most);
        let result = self
            .router
            .from_head(&mut self.received, now, &mut self.acts);
        self.act(now, facts);
        if let Err(error) = result {
            panic!("an agent refuses what the head sent: {error}");
        }
        moved as u64
    }

    /// Does what was decided.
    fn act(&mut self, now: Now, facts: &mut Facts) {
        for act in std::mem::take(&mut self.acts) {
            match act {
                Act::ToHead(frame) => {
                    self.check(&frame, facts);
                    self.to_head.push(&frame);
                }
                Act::Along(frame) => {
                    self.check(&frame, facts);
                    self.to_head.push(&frame);
                }
                // There is none but in thought.
                Act::LetGo(worker) => assert!((worker as usize) < self.ranks.len()),
                Act::Report(message) => {
                    match message {
                        ToHead::TimedOut { worker, task } => {
                            self.check_time(worker, task, now, facts);
                        }
                        ToHead::StateNotLogged { worker } => {
                            let rank = self.ranks[worker as usize];
                            assert!(facts.places[rank as usize].kept, "said twice");
                            facts.places[rank as usize].kept = false;
                        }
                        _ => {}
                    }
                    self.report(&message);
                }
                Act::ToWorker(frame) => self.send_worker(&frame, now),
                Act::Store { blob, bytes, last } => {
                    let (stored, complete) = self.stored.entry(blob).or_default();
                    assert!(!std::mem::replace(complete, last), "payload {blob}");
                    stored.extend_from_slice(&bytes);
                }
                Act::Hand { frame } => {
                    let (bytes, complete) = &self.stored[&frame.header.task];
                    assert!(*complete && frame.number() == Some(bytes.len() as u64));
                    let worker = frame.header.worker as usize;
                    if let Some(process) = &mut self.processes[worker] {
                        process.along.push_back(bytes.clone().freeze());
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
                // All that can be read is read at every step.
                Act::ReadAgain(_) => {}
                Act::Close(worker) => {
                    if let Some(process) = &mut self.processes[worker as usize] {
                        process.closing = true;
                    }
                }
                Act::TempDir(worker, _) => {
                    let rank = self.ranks[worker as usize];
                    facts.places[rank as usize].came_up = true;
                }
                // It is not asked.
                Act::Usage { .. } | Act::Dump { .. } => {}
                Act::End => self.lost = true,
            }
        }
    }

    /// What lasts on a worker, and how it leaves its random numbers, is what is known when its agent
    /// has passed on the end of an answer.
    fn check(&mut self, frame: &Frame, facts: &mut Facts) {
        let header = &frame.header;
        let worker = header.worker as usize;
        let process = self.processes[worker].as_mut().expect("a process");
        if header.kind != Kind::Data {
            return;
        }
        if process.complete.is_none_or(|(task, _)| task != header.task) {
            // It waited here, and has been dropped.
            assert_eq!(header.flags, LAST | ABORT);
            assert!(!facts.tasks[header.task as usize].started);
            return;
        }
        process.answering = true;
        if header.flags & LAST == 0 {
            return;
        }
        process.complete = None;
        process.answering = false;
        let place = &mut facts.places[self.ranks[worker] as usize];
        place.seed = process.worker.seed.clone();
        let effect = facts.tasks[header.task as usize].effect;
        if header.flags & ABORT == 0 {
            place.effects.extend(effect);
        } else {
            // What an interrupted or late task may have done does not count.
            let effects = &mut process.worker.effects;
            effects.retain(|effect| effect.task != header.task);
        }
    }

    /// A task may take so long from when its worker has all of it, and is not out of time once it
    /// has begun to answer.
    fn check_time(&self, worker: u32, task: u64, now: Now, facts: &Facts) {
        let process = self.processes[worker as usize].as_ref();
        let process = process.expect("a process");
        let limit = facts.tasks[task as usize].limit.expect("a time limit");
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
                process.given += frame.wire_len();
            } else if header.flags & LAST != 0 {
                process.complete = (header.flags & ABORT == 0).then_some((header.task, now));
            }
        }
    }

    fn report(&mut self, message: &ToHead) {
        self.to_head
            .push(&control::encode(message).expect("a frame"));
    }

    fn report_up(&mut self, worker: u32, replaces: bool, facts: &mut Facts) {
        let rank = self.ranks[worker as usize];
        let place = &mut facts.places[rank as usize];
        place.setbacks = 0;
        facts.seen.restored += usize::from(replaces && !place.effects.is_empty());
        let process = self.processes[worker as usize].as_mut();
        process.expect("a process").is_up = true;
        let pid = worker + 1000;
        self.report(&if replaces {
            ToHead::WorkerReplaced { worker, pid }
        } else {
            ToHead::WorkerUp { worker, pid }
        });
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Now, facts: &mut Facts) -> u64 {
        let mut moved = 0;
        self.router.out_of_time(now, &mut self.acts);
        moved += self.acts.len() as u64;
        self.act(now, facts);
        for worker in self.router.worker_table.overdue(now) {
            if let Some(process) = &mut self.processes[worker as usize] {
                process.dead = true;
                moved += 1;
            }
        }
        moved
    }

    pub fn read_worker(&mut self, worker: u32, most: usize, now: Now, facts: &mut Facts) -> u64 {
        if self.to_head.len() >= BACKLOG {
            return 0;
        }
        let mut moved = self.pass_on(worker, now, facts);
        if let Some(process) = &mut self.processes[worker as usize] {
            if process.held.len() < HEADER_LEN + MAX_BODY {
                moved += process.up.read(&mut process.held, most.min(READ)) as u64;
                moved += self.pass_on(worker, now, facts);
            }
        }
        moved
    }

    /// Passes on the whole frames that are held, up to one that must wait.
    fn pass_on(&mut self, worker: u32, now: Now, facts: &mut Facts) -> u64 {
        let Some(process) = &mut self.processes[worker as usize] else {
            return 0;
        };
        let mut held = std::mem::take(&mut process.held);
        let before = held.len();
        let result = self
            .router
            .from_worker(worker, &mut held, now, &mut self.acts);
        result.expect("what a worker may send");
        let moved = before - held.len();
        if let Some(process) = &mut self.processes[worker as usize] {
            process.held = held;
        }
        self.act(now, facts);
        moved as u64
    }

    pub fn on_exit(&mut self, worker: u32, now: Now, facts: &mut Facts) {
        // An answer that was whole before the end still counts, if there is room for it.
        while self.read_worker(worker, READ, now, facts) > 0 {}
        let process = self.processes[worker as usize].take().expect("a process");
        let rank = self.ranks[worker as usize];
        let place = &mut facts.places[rank as usize];
        place.setbacks += u32::from(!process.is_up);
        let may_be_replaced = place.kept && place.came_up && place.setbacks < SETBACKS;
        match self.router.exited(worker, true, now) {
            Ending::Stopped { timed_out } => {
                self.report(&ToHead::WorkerStopped { worker, timed_out });
            }
            Ending::Replace => {
                assert!(may_be_replaced);
                self.to_make.push_back((worker, true));
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
                    self.to_make.push_back((worker, true));
                }
            }
        }
    }
}
