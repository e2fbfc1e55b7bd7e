//! Simulated workers: do in steps what `worker/channel.rs` and R do.

use crate::parts::{Effect, Facts, OnInterrupt, Pipe, RngUse, digest, generation, part};
use bytes::{Bytes, BytesMut};
use rand::Rng;
use rand::rngs::StdRng;
use rustcluster_core::agent::worker_table::{Now, REPLAY};
use rustcluster_core::head::retry::MAX_JOB_ENDS;
use rustcluster_core::protocol::control::{self, WorkerReady};
use rustcluster_core::protocol::frame::{
    self, ABORT, BY_REFERENCE, FIRST, Frame, Header, Kind, LAST, MAX_BODY, REASSIGNED,
};
use rustcluster_core::protocol::ids::{BlobId, RESTORE, Rank, TaskId};
use rustcluster_core::protocol::send_queue::OutBuf;
use std::collections::VecDeque;
use xxhash_rust::xxh3::Xxh3;

/// Whether a message repeats a set-up call, to restore a worker: from the log of its agent, or that of the head.
fn is_repeated(task: TaskId) -> bool {
    task & (REPLAY | RESTORE) != 0
}

/// A message that is being received.
struct Incoming {
    task: TaskId,
    at: usize,
    /// Hashes the message, if it is a set-up call.
    hasher: Option<Box<Xxh3>>,
}

/// The task that a simulated worker runs.
struct Running {
    task: TaskId,
    sent: usize,
    len: usize,
    started: bool,
    /// The task has not started to answer: an interrupt may still prevent it.
    fresh: bool,
    /// Steps before the next chunk.
    pause: u32,
    /// After how many bytes the answer starts again from the beginning, once.
    restart_at: Option<usize>,
    stuck: bool,
    on_interrupt: OnInterrupt,
    rng_use: RngUse,
    effect: Option<Effect>,
}

pub struct Worker {
    received: BytesMut,
    pub out: OutBuf,
    incoming: Option<Incoming>,
    /// The last blob that it received.
    blob: Option<(BlobId, Bytes)>,
    running: Option<Running>,
    /// The effects of its set-up calls.
    pub effects: Vec<Effect>,
    /// Its RNG state; empty: no state.
    pub seed: Bytes,
    /// Its own RNG state while it runs a reassigned task, which uses the state of that task's owner.
    own: Option<Bytes>,
    /// RNG states to set before the next task, and whether they are for a reassigned task.
    seeds_before: Vec<(Bytes, bool)>,
    /// For this many steps, it reads only a few bytes at a time.
    slow: u32,
}

/// A worker's process, with the agent's end of its channel.
pub struct Process {
    pub outgoing: OutBuf,
    /// Shared memory that is sent with frames, in order.
    pub shared_memory: VecDeque<Bytes>,
    pub down: Pipe,
    pub up: Pipe,
    /// Bytes from the worker that the agent has read and not routed yet.
    pub unrouted: BytesMut,
    pub worker: Worker,
    pub closing: bool,
    pub closed: bool,
    pub dead: bool,
    /// The worker is ready for tasks of the head.
    pub is_up: bool,
    /// Bytes in `outgoing` that the agent has added and that do not count for the send window.
    pub bytes_from_agent: usize,
    /// The task whose complete message has been sent to the worker, and since when; and whether the agent
    /// has received a part of its answer.
    pub complete: Option<(TaskId, Now)>,
    pub answering: bool,
    /// The agent has kept all of its answer so far.
    pub kept_from_start: bool,
}

impl Process {
    pub fn new(index: u32, channel: usize, slow: u32) -> Process {
        let tempdir = String::new();
        let ready = control::encode_for(
            index,
            &WorkerReady {
                tempdir,
                ready: true,
            },
        )
        .expect("a frame");
        let mut out = OutBuf::default();
        out.push(&ready);
        Process {
            outgoing: OutBuf::default(),
            shared_memory: VecDeque::new(),
            down: Pipe::new(channel),
            up: Pipe::new(channel),
            unrouted: BytesMut::new(),
            worker: Worker {
                received: BytesMut::new(),
                out,
                incoming: None,
                blob: None,
                running: None,
                effects: Vec::new(),
                seed: Bytes::new(),
                own: None,
                seeds_before: Vec::new(),
                slow,
            },
            closing: false,
            closed: false,
            dead: false,
            is_up: false,
            bytes_from_agent: 0,
            complete: None,
            answering: false,
            kept_from_start: false,
        }
    }

    /// Whether a step would have no effect.
    pub fn is_idle(&self) -> bool {
        let worker = &self.worker;
        let streams = self.down.bytes.is_empty() && self.up.bytes.is_empty();
        let buffers = self.outgoing.is_empty() && self.unrouted.is_empty() && worker.out.is_empty();
        let at_rest = worker.running.is_none() && !self.dead && !self.closing && !self.closed;
        streams && buffers && at_rest
    }

    /// One step of the simulated worker. Returns how much has moved. `faulty`: the worker crashes when it
    /// starts a task.
    pub fn run(
        &mut self,
        rng: &mut StdRng,
        facts: &mut Facts,
        rank: Rank,
        (max, calm, whole): (usize, bool, bool),
        faulty: bool,
    ) -> u64 {
        let worker = &mut self.worker;
        let max = if worker.slow > 0 && !calm {
            worker.slow -= 1;
            // A few bytes, or none.
            max.min(rng.random_range(0..40))
        } else {
            max
        };
        let mut moved = self.down.read(&mut worker.received, max) as u64;
        while let Some(frame) = frame::decode(&mut worker.received).expect("a frame") {
            let lethal = worker.on_frame(frame, &mut self.shared_memory, rng, facts, rank);
            if lethal || faulty && worker.is_at_a_task() {
                self.dead = true;
                return moved + 1;
            }
        }
        moved += worker.answer(rng, facts, rank, (calm, whole));
        moved += self.up.pour(&mut worker.out, max) as u64;
        let idle = worker.running.is_none() && worker.out.is_empty() && self.down.bytes.is_empty();
        if self.closed && idle {
            self.dead = true;
            moved += 1;
        }
        moved
    }
}

impl Worker {
    fn is_at_a_task(&self) -> bool {
        let running = self.running.as_ref();
        running.is_some_and(|running| running.task & REPLAY == 0)
    }

    /// Returns whether the frame kills the worker.
    fn on_frame(
        &mut self,
        frame: Frame,
        shared_memory: &mut VecDeque<Bytes>,
        rng: &mut StdRng,
        facts: &mut Facts,
        rank: Rank,
    ) -> bool {
        let Header { flags, task, .. } = frame.header;
        match frame.header.kind {
            Kind::Data if flags & ABORT != 0 => {
                assert!(self.running.is_none());
                self.incoming = None;
                self.seeds_before.retain(|seed| !seed.1);
            }
            Kind::Data => {
                // Replayed set-up calls of the agent arrive without waiting for answers.
                let again = task & REPLAY != 0;
                assert!(self.running.is_none() || again, "two tasks at once");
                if let (true, Some(running)) = (again, &self.running) {
                    assert!(running.task & REPLAY != 0);
                    // The running call ends before the next one is read.
                    while self.running.is_some() {
                        self.answer(rng, facts, rank, (true, true));
                    }
                }
                let body = match flags & BY_REFERENCE {
                    0 => frame.body,
                    _ => {
                        let (id, bytes) = self.blob.as_ref().expect("a blob");
                        assert_eq!(Some(*id), frame.number());
                        facts.seen.with_blob += usize::from(!is_repeated(task));
                        facts.seen.replayed_with_blob += usize::from(is_repeated(task));
                        bytes.clone()
                    }
                };
                self.on_data(task, flags, &body, facts);
                if flags & LAST != 0 {
                    return self.start(rng, facts, rank);
                }
            }
            Kind::Blob => {
                self.blob = None;
                let bytes = match flags & BY_REFERENCE {
                    0 => frame.body,
                    _ => shared_memory.pop_front().expect("memory"),
                };
                if flags & ABORT == 0 {
                    self.blob = Some((task, bytes));
                }
            }
            Kind::Seed => self
                .seeds_before
                .push((frame.body, flags & REASSIGNED != 0)),
            Kind::Cancel => self.on_cancel(task, rng),
            kind => panic!("a worker got {kind:?}"),
        }
        false
    }

    fn on_data(&mut self, task: TaskId, flags: u8, body: &Bytes, facts: &Facts) {
        let again = is_repeated(task);
        if flags & FIRST != 0 {
            assert!(self.incoming.is_none(), "a message within a message");
            let setup_call = again || facts.tasks[task].effect.is_some();
            self.incoming = Some(Incoming {
                task,
                at: 0,
                hasher: setup_call.then(Box::default),
            });
        }
        let incoming = self.incoming.as_mut().expect("a chunk of no task");
        assert_eq!(incoming.task, task);
        if !again {
            let (like, max) = facts.tasks[task].prefix;
            let n = body.len().min(max.saturating_sub(incoming.at));
            let begin = part(like, false, incoming.at, n);
            let rest = part(task, false, incoming.at + n, body.len() - n);
            assert!(body[..n] == begin, "task {task} has another blob");
            assert!(
                body[n..] == rest,
                "task {task} arrives with another message"
            );
        }
        incoming.at += body.len();
        if let Some(hasher) = &mut incoming.hasher {
            hasher.update(body);
        }
    }

    /// Starts the task whose message is complete. Returns whether the task kills the worker.
    fn start(&mut self, rng: &mut StdRng, facts: &mut Facts, rank: Rank) -> bool {
        let Incoming { task, at, hasher } = self.incoming.take().expect("a message");
        let effect = hasher.map(|hasher| Effect::of(task, &hasher));
        for (seed, reassigned) in std::mem::take(&mut self.seeds_before) {
            let before = std::mem::replace(&mut self.seed, seed);
            if reassigned {
                self.own.get_or_insert(before);
            }
        }
        let mut running = Running {
            task,
            sent: 0,
            len: 0,
            started: false,
            fresh: true,
            pause: rng.random_range(0..4),
            restart_at: None,
            stuck: false,
            on_interrupt: OnInterrupt::Stop,
            rng_use: RngUse::Nothing,
            effect,
        };
        if let (true, Some(effect)) = (is_repeated(task), effect) {
            running.len = effect.hash as usize % 3_000;
            running.rng_use = effect.rng_use();
            self.running = Some(running);
            return false;
        }
        self.check_start(task, facts, rank);
        let state = &mut facts.tasks[task];
        assert_eq!(at, state.len);
        assert_eq!(effect, state.effect);
        running.len = state.answer_len;
        running.rng_use = state.rng_use;
        running.stuck = state.stuck;
        running.on_interrupt = state.on_interrupt;
        let restart = running.len > 0 && rng.random_ratio(1, 10);
        running.restart_at = restart.then(|| rng.random_range(0..running.len));
        self.running = Some(running);
        state.poison
    }

    /// Checks that the worker has the state in which the task must start.
    fn check_start(&self, id: TaskId, facts: &mut Facts, rank: Rank) {
        if facts.workers[rank as usize].is_terminated {
            // The head has stopped or abandoned this worker, which has not been notified. The task may be
            // assigned to another one by now.
            return;
        }
        if generation(id) < facts.tasks.generation() {
            return self.check_start_for_nobody(id, facts, rank);
        }
        let owner = facts.tasks[id].owner;
        let reported_seeds = facts.workers[owner as usize].reported_seeds.clone();
        let known = &mut facts.workers[rank as usize];
        let task = &mut facts.tasks[id];
        assert_eq!(task.assigned, rank);
        assert!(task.complete);
        assert!(!task.revoked, "revoked task {id} starts");
        assert!(
            task.starts <= task.failures,
            "task {id} starts once too often"
        );
        assert!(
            task.failures - task.job_ends.min(MAX_JOB_ENDS) <= facts.retries,
            "task {id} is tried too often"
        );
        task.starts += 1;
        assert!(!std::mem::replace(&mut task.started, true), "started twice");
        assert_eq!(
            digest(&self.effects),
            digest(&known.effects),
            "worker {rank} has another state than expected before task {id}: {:?} {:?}",
            self.effects,
            known.effects
        );
        let seed = self.own.as_ref().unwrap_or(&self.seed);
        if known.other_seeds.contains(seed) {
            known.seed = seed.clone();
        }
        known.other_seeds.clear();
        assert_eq!(
            seed, &known.seed,
            "worker {rank}'s random numbers at task {id}"
        );
        if task.is_reassigned() {
            assert!(
                self.own.is_some(),
                "reassigned task {id} uses its worker's random numbers"
            );
            let usable = &reported_seeds[task.seeds_at_submission..];
            assert!(usable.contains(&self.seed), "reassigned task {id}");
        } else {
            assert!(self.own.is_none());
            let order = task.order.unwrap_or(known.last_started);
            if order >= known.ordered_from {
                assert!(
                    order >= known.last_started,
                    "task {id} starts on worker {rank} after task {}",
                    known.last_started
                );
                known.last_started = order;
            }
        }
        match &task.first_seed {
            Some((seed, count)) if !task.is_reassigned() || *count == reported_seeds.len() => {
                // In its first attempt it may not have been a reassigned task.
                let is_known = !task.is_reassigned() || reported_seeds.last() == Some(seed);
                assert!(
                    !is_known || *seed == self.seed,
                    "task {id} begins with other random numbers than at first"
                );
            }
            Some(_) => {}
            None => task.first_seed = Some((self.seed.clone(), reported_seeds.len())),
        }
    }

    /// Checks the state in which a task of a head that has vanished starts.
    fn check_start_for_nobody(&self, id: TaskId, facts: &mut Facts, rank: Rank) {
        let known = &mut facts.workers[rank as usize];
        let task = &mut facts.tasks[id];
        assert!(task.complete);
        assert!(!std::mem::replace(&mut task.started, true), "started twice");
        assert_eq!(digest(&self.effects), digest(&known.effects));
        let seed = self.own.as_ref().unwrap_or(&self.seed);
        if known.other_seeds.contains(seed) {
            known.seed = seed.clone();
        }
        assert_eq!(seed, &known.seed);
        facts.seen.started_without_head += 1;
    }

    /// A stuck task ends at last.
    pub fn unstick(&mut self) -> bool {
        let running = self.running.as_mut();
        running.is_some_and(|running| std::mem::take(&mut running.stuck))
    }

    fn on_cancel(&mut self, task: TaskId, rng: &mut StdRng) {
        match &mut self.running {
            Some(running) if running.task == task => {
                if running.fresh && rng.random() {
                    // The worker reads the frame before it starts the task.
                    running.stuck = false;
                    running.len = 0;
                    running.rng_use = RngUse::Nothing;
                    running.effect = None;
                    running.restart_at = None;
                    return;
                }
                match running.on_interrupt {
                    OnInterrupt::Stop => {
                        running.len = running.sent;
                        running.stuck = false;
                    }
                    OnInterrupt::Restart => {
                        running.sent = 0;
                        running.started = false;
                        running.stuck = false;
                    }
                    OnInterrupt::Ignore => {}
                }
            }
            // The task has ended.
            _ => {}
        }
    }

    fn answer(
        &mut self,
        rng: &mut StdRng,
        facts: &mut Facts,
        rank: Rank,
        (calm, whole): (bool, bool),
    ) -> u64 {
        let Some(running) = &mut self.running else {
            return 0;
        };
        let again = is_repeated(running.task);
        if running.stuck || self.out.len() > MAX_BODY && running.task & REPLAY == 0 {
            return 0;
        }
        running.fresh = false;
        if running.pause > 0 && !calm {
            running.pause -= 1;
            return 1;
        }
        if running.restart_at.is_some_and(|at| running.sent >= at) {
            running.restart_at = None;
            running.sent = 0;
            running.started = false;
        }
        // Some large answers are sent in memory that is shared with the head.
        let shared = !again && !running.started && running.len > MAX_BODY && rng.random_ratio(1, 3);
        let left = running.len - running.sent;
        let n = if whole || again {
            left.min(MAX_BODY)
        } else {
            rng.random_range(1..=MAX_BODY).min(left)
        };
        let first = !std::mem::replace(&mut running.started, true);
        let last = n == left || shared;
        let kind = if shared { BY_REFERENCE } else { 0 };
        let flags = kind | if first { FIRST } else { 0 } | if last { LAST } else { 0 };
        let task = running.task;
        let body = match again {
            true => part(0, true, 0, n),
            false if shared => Bytes::copy_from_slice(&(running.len as u64).to_le_bytes()),
            false => part(task, true, running.sent, n),
        };
        running.sent += n;
        running.pause = rng.random_range(0..3);
        if last {
            let after = running.rng_use.after(&self.seed, task, rng.random());
            if after != self.seed {
                if !again && !facts.workers[rank as usize].is_terminated {
                    facts.tasks[task].seed_after = Some(after.clone());
                }
                let flags = if self.own.is_some() { REASSIGNED } else { 0 };
                self.out
                    .push(&Frame::new(Kind::Seed, flags, 0, task, after.clone()));
            }
            self.seed = self.own.take().unwrap_or(after);
            self.effects.extend(running.effect);
            self.running = None;
        }
        // The agent replaces the worker index 0 by that of the channel.
        self.out.push(&Frame::new(Kind::Data, flags, 0, task, body));
        1
    }
}
