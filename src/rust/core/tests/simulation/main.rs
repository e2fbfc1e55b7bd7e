//! Seeded simulation of a whole cluster: the head's scheduler, the agents' decisions and made-up
//! workers, joined by byte streams that hold little and deliver in slices of any size.
//!
//! There is no process, socket or clock here, so one seed is one history, for ever. A seed that
//! fails is printed; `RUSTCLUSTER_SEED=<n>` replays it alone, `RUSTCLUSTER_LONG_TESTS=1` runs
//! 10,000 of them.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic fails the test"
)]

mod host;
mod jobs;
mod parts;
mod r;
mod worker;

use bytes::Bytes;
use host::{BACKLOG, Fault, Host, READ};
use jobs::Open;
use parts::{End, Facts, LARGEST, Place, Seen, Task, slice};
use r::{Made, Message, Ready, Waiting};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustcluster_core::agent::worker_table::Now;
use rustcluster_core::head::activity::MAX_INTERVALS;
use rustcluster_core::head::hub::Hub;
use rustcluster_core::head::job::Job;
use rustcluster_core::head::scheduler::events::State;
use rustcluster_core::protocol::body::Memory;
use rustcluster_core::protocol::control::{self, ToAgent};
use rustcluster_core::protocol::frame::{
    self, ABORT, BY_REFERENCE, FIRST, Frame, HEADER_LEN, Kind, LAST, MAX_BODY, REASSIGNED,
};
use rustcluster_core::protocol::ids::{JobId, Rank, TaskId};
use rustcluster_core::protocol::limits::SEND_WINDOW;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use worker::Process;

/// As the hub puts together for one write.
const WRITE: usize = 256 * 1024;

/// How R takes answers.
#[derive(Clone, Copy, PartialEq)]
enum TakeOrder {
    ByRank,
    AsTheyCome,
    Mixed,
}

struct Setup {
    workers: usize,
    hosts: usize,
    limit: usize,
    /// Bytes that a stream between head and agent holds.
    stream: usize,
    /// Bytes that a worker's channel holds.
    channel: usize,
    /// 0: small messages and answers, 1: some large, 2: large answers.
    sizes: u32,
    /// Chunks as our own workers and R's side cut them, or of any size.
    whole_chunks: bool,
    order: TakeOrder,
    /// One in so many actions is a fault; 0: none.
    faults: u32,
    /// One in so many tasks does what lasts.
    setup_messages: u32,
    /// How often a lost task is tried again.
    retries: usize,
    /// How long any task may take.
    timeout: Option<Duration>,
    /// Some tasks have time limits of their own.
    limits: bool,
    /// One in so many tasks may be prefetched; 0: none.
    prefetch: u32,
    /// One in so many chances to begin a job is taken.
    jobs: u32,
    /// Bytes of chunks that agents keep, if they do.
    keep: Option<usize>,
    /// Bytes of what lasts that agents hold.
    state: usize,
    /// R may be blocked in sending, so that the limit does not hold.
    blocking: bool,
    slow: bool,
    actions: usize,
    largest: usize,
}

impl Setup {
    fn random(rng: &mut StdRng) -> Setup {
        let workers = match rng.random_range(0..4) {
            0 => rng.random_range(1..=3),
            1 => rng.random_range(1..=10),
            _ => rng.random_range(1..=40),
        };
        let sizes = rng.random_range(0..3);
        // Much data through narrow streams would only take long.
        let workers = if sizes == 2 { workers.min(8) } else { workers };
        let narrow = if sizes == 0 { 0 } else { 1 };
        let timeout = [0, 0, 100, 2_000, 20_000][rng.random_range(0..5)];
        Setup {
            workers,
            hosts: rng.random_range(1..=workers.min(4)),
            limit: [0, 1, 300_000, 1_000_000, 4_000_000][rng.random_range(0..5)],
            stream: [200, 5_000, 70_000, 250_000][rng.random_range(narrow..4)],
            channel: [100, 5_000, 70_000, 200_000][rng.random_range(narrow..4)],
            sizes,
            whole_chunks: rng.random(),
            order: match rng.random_range(0..3) {
                0 => TakeOrder::ByRank,
                1 => TakeOrder::AsTheyCome,
                _ => TakeOrder::Mixed,
            },
            faults: [0, 60, 10, 2][rng.random_range(0..4)],
            setup_messages: [2, 6, 30][rng.random_range(0..3)],
            retries: rng.random_range(0..4),
            prefetch: [0, 1, 1, 2][rng.random_range(0..4)],
            jobs: [4, 12, 100][rng.random_range(0..3)],
            timeout: (timeout > 0).then_some(Duration::from_millis(timeout)),
            limits: rng.random_ratio(1, 3),
            keep: [None, Some(0), Some(150_000), Some(10_000_000)][rng.random_range(0..4)],
            state: [0, 10_000, 300_000, 1 << 30, 1 << 30][rng.random_range(0..5)],
            blocking: rng.random_ratio(1, 6),
            slow: rng.random(),
            actions: 800 + 60 * workers,
            largest: LARGEST,
        }
    }
}

struct Sim {
    setup: Setup,
    rng: StdRng,
    now: Now,
    hub: Hub,
    hosts: Vec<Host>,
    /// Where each worker is.
    at: Vec<(usize, u32)>,
    facts: Facts,
    job: JobId,
    /// Tasks sent and not received, by the worker that R gave them to, as the hub should know them.
    outstanding: Vec<VecDeque<TaskId>>,
    /// What R has not taken, in order, with the bytes it holds, as the hub should have it.
    ready: VecDeque<(TaskId, usize, Ready)>,
    /// Bytes the head should hold of answers that are not whole.
    arriving: HashMap<Rank, (TaskId, usize)>,
    writing: Option<Message>,
    /// Blobs that R has not dropped.
    made: Vec<Made>,
    waiting: Option<Waiting>,
    /// What R goes on waiting for when it has decided on a lost task.
    resume: Option<Waiting>,
    /// Anything that moved, ever.
    moved: u64,
    /// The job engine's job that R works at, and what is known of it here.
    engine: Option<Job>,
    open: Option<Open>,
    /// How long the round trip to workers has taken in earlier jobs.
    rtts: HashMap<Rank, f64>,
    /// The beginning of all times.
    origin: Instant,
}

impl Sim {
    fn new(setup: Setup, mut rng: StdRng) -> Sim {
        // Ranks are dealt at random, as they are when hosts are named in turn.
        let mut ranks: Vec<Vec<Rank>> = vec![Vec::new(); setup.hosts];
        for rank in 0..setup.workers {
            let host = if rank < setup.hosts {
                rank
            } else {
                rng.random_range(0..setup.hosts)
            };
            ranks[host].push(rank as Rank);
        }
        let mut at = vec![(0, 0); setup.workers];
        for (host, ranks) in ranks.iter().enumerate() {
            for (index, &rank) in ranks.iter().enumerate() {
                at[rank as usize] = (host, index as u32);
            }
        }
        let bounds = (setup.keep.unwrap_or(0), setup.state);
        let host = |ranks: &Vec<Rank>| Host::new(ranks, setup.stream, bounds);
        let hosts: Vec<Host> = ranks.iter().map(host).collect();
        let hub = Hub::by_hand(ranks, setup.limit, setup.keep, setup.timeout).expect("descriptors");
        Sim {
            hosts,
            hub,
            now: Duration::ZERO,
            at,
            facts: Facts {
                // Their numbers begin with 1.
                tasks: vec![Task {
                    end: Some(End::Cancelled),
                    ..Task::new(0)
                }],
                places: (0..setup.workers).map(|_| Place::new()).collect(),
                retries: setup.retries,
                seen: Seen::default(),
            },
            job: 1,
            outstanding: vec![VecDeque::new(); setup.workers],
            ready: VecDeque::new(),
            arriving: HashMap::new(),
            writing: None,
            made: Vec::new(),
            waiting: None,
            resume: None,
            moved: 0,
            engine: None,
            open: None,
            rtts: HashMap::new(),
            origin: Instant::now(),
            setup,
            rng,
        }
    }

    fn is_terminated(&self, rank: Rank) -> bool {
        self.facts.places[rank as usize].termination
    }

    // ---- head and agents ----

    fn flush(&mut self, at: usize, most: usize) {
        if self.hosts[at].lost {
            return;
        }
        while self.hosts[at].out.len() < WRITE {
            let Some(frame) = self.hub.next_frame(at) else {
                break;
            };
            assert!(frame.body.len() <= MAX_BODY);
            self.leaves(at, &frame);
            self.hosts[at].out.push(&frame);
        }
        let host = &mut self.hosts[at];
        self.moved += host.down.pour(&mut host.out, most) as u64;
        self.notes();
    }

    /// What the head may send: one task after the other, and one further ahead.
    fn leaves(&mut self, at: usize, frame: &Frame) {
        let header = &frame.header;
        if header.kind == Kind::Control {
            let message = control::decode(&frame.body).expect("a message");
            if let ToAgent::LossAck { worker } = message {
                let rank = self.hosts[at].ranks[worker as usize];
                self.facts.places[rank as usize].unacknowledged -= 1;
            }
            return;
        }
        if header.kind != Kind::Data {
            return;
        }
        let rank = self.hosts[at].ranks[header.worker as usize];
        let place = &mut self.facts.places[rank as usize];
        if place.unacknowledged > 0 {
            return;
        }
        let id = header.task;
        if header.flags & ABORT != 0 {
            if place.next == Some(id) {
                place.next = None;
                self.facts.seen.dropped += 1;
            } else if place.current == Some(id) {
                assert_eq!(place.next, None);
                place.current = None;
            }
            return;
        }
        if header.flags & FIRST == 0 {
            assert!(place.current == Some(id) || place.next == Some(id));
            return;
        }
        if place.current.is_none() {
            place.current = Some(id);
            return;
        }
        let task = &self.facts.tasks[id as usize];
        assert!(task.prefetch && task.effect.is_none() && !task.is_reassigned());
        assert_eq!(place.next, None, "two tasks ahead");
        place.next = Some(id);
        self.facts.seen.prefetch += 1;
    }

    fn head_read(&mut self, at: usize, most: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        self.moved += host.up.read(&mut host.head_received, most) as u64;
        while let Some(frame) = frame::decode(&mut self.hosts[at].head_received).expect("a frame") {
            self.arrives(at, &frame);
            let header = frame.header;
            self.hub.set_clock(self.now);
            let brings = header.kind == Kind::Data && header.flags == LAST | BY_REFERENCE;
            let memory = brings.then(|| {
                self.facts.seen.in_memory += 1;
                Memory::new(frame.number().expect("a length") as usize, None)
            });
            if let Err(error) = self.hub.on_frame(at, frame, memory) {
                panic!("the head refuses {header:?}: {error}");
            }
            self.notes();
        }
    }

    /// What the head should make of a frame.
    fn arrives(&mut self, at: usize, frame: &Frame) {
        let header = &frame.header;
        if !matches!(header.kind, Kind::Data | Kind::Seed) {
            return;
        }
        let rank = self.hosts[at].ranks[header.worker as usize];
        let task = &self.facts.tasks[header.task as usize];
        if self.is_terminated(rank) {
            return;
        }
        let place = &mut self.facts.places[rank as usize];
        if header.kind == Kind::Data && header.flags & LAST != 0 {
            if place.next == Some(header.task) {
                // It has been dropped before it started.
                assert!(header.flags & ABORT != 0 && !task.started);
                place.next = None;
                self.facts.seen.dropped += 1;
                return;
            }
            assert_eq!(place.current, Some(header.task));
            place.current = place.next.take();
        }
        if header.kind == Kind::Seed {
            assert_eq!(header.flags & REASSIGNED != 0, task.is_reassigned());
            return;
        }
        if let (true, Some(seed)) = (header.flags & LAST != 0, &task.left) {
            // Those of a moved task are its owner's.
            let seeds = &mut self.facts.places[task.owner as usize].reported_seeds;
            seeds.push(match seed.len() {
                0..=64 => seed.clone(),
                _ => Bytes::new(),
            });
        }
        if !task.open {
            return;
        }
        let entry = self.arriving.entry(rank).or_insert((header.task, 0));
        if header.flags & FIRST != 0 {
            *entry = (header.task, 0);
        }
        assert_eq!(entry.0, header.task, "answers of one worker are mixed");
        entry.1 += match header.flags & BY_REFERENCE {
            0 => frame.body.len(),
            _ if header.flags & LAST != 0 => frame.number().expect("a length") as usize,
            _ => 0,
        };
    }

    fn agent_read(&mut self, at: usize, most: usize) {
        let host = &mut self.hosts[at];
        if !host.lost {
            self.moved += host.read_head(most, self.now, &mut self.facts);
        }
    }

    fn agent_write(&mut self, at: usize, most: usize) {
        let host = &mut self.hosts[at];
        if !host.lost {
            self.moved += host.up.pour(&mut host.to_head, most) as u64;
        }
    }

    fn make(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        let Some((worker, replaces)) = host.to_make.pop_front() else {
            return;
        };
        self.moved += 1;
        host.router.made(worker, replaces, self.now);
        let slow = self.setup.slow && self.rng.random_ratio(1, 5);
        let slow = if slow {
            self.rng.random_range(0..300)
        } else {
            0
        };
        let process = Process::new(worker, self.setup.channel, slow);
        host.processes[worker as usize] = Some(process);
    }

    fn tick(&mut self) {
        for host in self.hosts.iter_mut().filter(|host| !host.lost) {
            self.moved += host.tick(self.now, &mut self.facts);
        }
    }

    /// One step of a worker's process and of its agent's with it. `at_most` bytes to and fro.
    fn step_worker(&mut self, at: usize, worker: u32, most: usize, calm: bool) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        let Some(process) = &mut host.processes[worker as usize] else {
            return;
        };
        if process.is_idle() {
            return;
        }
        if host.fault == Fault::Starts && !process.is_up && self.rng.random_ratio(1, 3) {
            process.dead = true;
        }
        let passed = if process.dead {
            0
        } else {
            process.down.pour(&mut process.outgoing, most)
        };
        let held = host.router.prefetched(worker);
        // One window, whatever was withdrawn, and what is not counted.
        let bound = SEND_WINDOW + HEADER_LEN * 64 + process.given;
        assert!(
            process.outgoing.len() + held <= bound,
            "{} bytes wait for one worker, {held} of them ahead",
            process.outgoing.len() + held
        );
        if process.outgoing.is_empty() {
            process.given = 0;
        }
        assert!(process.held.len() <= HEADER_LEN + MAX_BODY + READ);
        if process.outgoing.is_empty() && std::mem::take(&mut process.closing) {
            process.closed = true;
        }
        if let Some((task, bytes)) = host.router.worker_table.passed(worker, passed) {
            host.to_head.push(&Frame::credit(worker, task, bytes));
        }
        self.moved += passed as u64;
        let Some(process) = &mut host.processes[worker as usize] else {
            return;
        };
        if !process.dead {
            let manner = (most, calm, self.setup.whole_chunks);
            let rank = host.ranks[worker as usize];
            let faulty = host.fault == Fault::Tasks;
            self.moved += process.run(&mut self.rng, &mut self.facts, rank, manner, faulty);
        }
        self.moved += host.read_worker(worker, most, self.now, &mut self.facts);
        // An exit is noticed a while later.
        let Some(process) = &host.processes[worker as usize] else {
            return;
        };
        if process.dead && (calm || self.rng.random_ratio(1, 4)) {
            self.moved += 1;
            host.on_exit(worker, self.now, &mut self.facts);
        }
        assert!(
            host.to_head.len() <= BACKLOG + 2 * READ + 200 * host.ranks.len(),
            "{} bytes wait for the head",
            host.to_head.len()
        );
    }

    // ---- the history ----

    fn chaos(&mut self) {
        for _ in 0..self.setup.actions {
            match self.rng.random_range(0..20) {
                10 if self.is_free() && self.rng.random_ratio(1, self.setup.jobs) => self.run_job(),
                0..4 if self.waiting.is_none() => {
                    for _ in 0..=self.setup.workers / 1_000 {
                        self.send_something();
                    }
                }
                4 | 5 => self.wait(),
                6 => {
                    self.now += Duration::from_millis(self.rng.random_range(0..300));
                    self.tick();
                }
                9 if self.setup.prefetch > 0 => self.revoke(),
                7 if self.setup.faults > 0 => {
                    if self.rng.random_ratio(1, self.setup.faults) || self.rng.random_ratio(1, 60) {
                        for _ in 0..=self.setup.workers / 200 {
                            self.fault();
                        }
                    }
                    if self.waiting.is_some() && self.rng.random_ratio(1, 20) {
                        self.interrupt();
                    }
                }
                8 if self.setup.blocking => {
                    let unlimited = self.writing.is_some() && self.rng.random();
                    self.hub
                        .with_scheduler(|scheduler| scheduler.set_unlimited(unlimited));
                    self.notes();
                }
                _ => {
                    for _ in 0..=self.hosts.len() / 20 {
                        let at = self.rng.random_range(0..self.hosts.len());
                        for _ in 0..4 {
                            self.pump(at);
                        }
                    }
                }
            }
        }
    }

    /// R is not in the middle of anything.
    fn is_free(&self) -> bool {
        self.waiting.is_none() && self.writing.is_none() && self.resume.is_none()
    }

    fn run_job(&mut self) {
        self.begin_job(false);
        let heartbeat_timeout = self.rng.random_range(1..300);
        let over = (0..heartbeat_timeout).any(|_| self.step_job());
        if !over {
            // Ctrl-C.
            self.close_job(false);
        }
    }

    fn send_something(&mut self) {
        if self.writing.is_some() {
            if self.rng.random_ratio(1, 40) {
                self.abandon();
                return;
            }
            let chunks = self.rng.random_range(1..30);
            for _ in 0..chunks {
                self.write_chunk();
            }
            return;
        }
        let rank = self.rng.random_range(0..self.setup.workers);
        // Also to workers that are gone: R may not have heard of it yet.
        if self.outstanding[rank].len() < 3 {
            self.begin_task(rank as Rank, false);
            self.write_chunk();
        }
    }

    /// Ctrl-C while R waits: the job it waits for is given up.
    fn interrupt(&mut self) {
        let job = match self.waiting {
            Some(Waiting::For(rank)) => {
                let front = self.outstanding[rank as usize].front();
                front.map(|&task| self.facts.tasks[task as usize].job)
            }
            _ => Some(self.job),
        };
        self.wait_for(None);
        if let Some(job) = job {
            self.cancel_job(job);
        }
    }

    fn fault(&mut self) {
        let rank = self.rng.random_range(0..self.setup.workers) as Rank;
        let (at, worker) = self.at[rank as usize];
        match self.rng.random_range(0..20) {
            // R is at one job.
            0..5 if self.open.is_some() => {}
            0..2 => {
                let job = self.rng.random_range(0..=self.job);
                self.cancel_job(job);
            }
            2..5 => {
                let job = self.job;
                self.cancel_job(job);
            }
            5..12 => {
                // Whoever it hits, or who has most to read.
                let waiting = |process: &&mut Process| process.outgoing.len();
                let processes = &mut self.hosts[at].processes;
                let process = match self.rng.random() {
                    true => processes[worker as usize].as_mut(),
                    false => processes.iter_mut().flatten().max_by_key(waiting),
                };
                if let Some(process) = process {
                    process.dead = true;
                }
            }
            12 | 13 => {
                self.hub
                    .with_scheduler(|scheduler| scheduler.stop_worker(rank));
                self.notes();
                assert!(self.is_terminated(rank));
            }
            14 | 15 => {
                // Its end of the channel closes, and the process lives on.
                if self.hosts[at].processes[worker as usize].is_some() {
                    let now = self.now;
                    self.hosts[at].router.worker_table.hung_up(worker, now);
                }
            }
            16 | 17 => {
                let host = &mut self.hosts[at];
                host.fault = match (host.fault, self.rng.random_range(0..3)) {
                    (Fault::None, 0) => Fault::Starts,
                    (Fault::None, _) => Fault::Tasks,
                    _ => Fault::None,
                };
            }
            _ => {
                if self
                    .rng
                    .random_ratio(1, 3 + self.setup.workers as u32 / 100)
                {
                    self.hosts[at].lost = true;
                    self.hub
                        .with_scheduler(|scheduler| scheduler.agent_lost(at, "lost"));
                    self.notes();
                    let ranks = &self.hosts[at].ranks;
                    assert!(ranks.iter().all(|&rank| self.is_terminated(rank)));
                }
            }
        }
    }

    fn pump(&mut self, at: usize) {
        let n = slice(&mut self.rng);
        match self.rng.random_range(0..10) {
            0 => self.flush(at, n),
            1 => self.agent_read(at, n),
            2 => self.agent_write(at, n),
            3 => self.head_read(at, n),
            4 => self.make(at),
            _ => {
                let count = self.hosts[at].ranks.len();
                for _ in 0..count.min(8) {
                    let worker = self.rng.random_range(0..count) as u32;
                    let n = slice(&mut self.rng);
                    self.step_worker(at, worker, n, false);
                }
            }
        }
    }

    /// One look at everything, as fast as the streams allow.
    fn sweep(&mut self) {
        const MAX_STEP: usize = usize::MAX;
        for at in 0..self.hosts.len() {
            self.flush(at, MAX_STEP);
            self.agent_read(at, MAX_STEP);
            for worker in 0..self.hosts[at].ranks.len() as u32 {
                self.make(at);
                self.step_worker(at, worker, MAX_STEP, true);
            }
            self.agent_write(at, MAX_STEP);
            self.head_read(at, MAX_STEP);
        }
    }

    fn write_all(&mut self) {
        while self.writing.is_some() {
            self.write_chunk();
        }
    }

    /// R takes what is there, and then waits for something that is not.
    fn take_all(&mut self) {
        while self.waiting.is_none() && !self.outstanding.iter().all(VecDeque::is_empty) {
            self.wait();
            self.write_all();
        }
    }

    /// No more faults, but for those of faulty hosts: everything must end by itself.
    fn drain(&mut self) {
        self.write_all();
        self.hub
            .with_scheduler(|scheduler| scheduler.set_unlimited(false));
        // R would wait for these for ever, and so would their users.
        let tasks = self.facts.tasks.iter();
        let stuck = tasks.filter(|task| task.stuck && task.limit.is_none() && task.end.is_none());
        let jobs: Vec<JobId> = stuck.map(|task| task.job).collect();
        for job in jobs {
            self.cancel_job(job);
        }
        let mut before = self.moved;
        let mut idle = 0;
        let mut sweeps = 0;
        loop {
            self.take_all();
            self.sweep();
            sweeps += 1;
            assert!(sweeps < 2_000_000, "no end in sight");
            if self.moved != before {
                before = self.moved;
                idle = 0;
                continue;
            }
            idle += 1;
            // Only time can help now: tasks that are out of time, and workers that were to end and
            // do not.
            let living = self.hosts.iter().filter(|host| !host.lost);
            let next = living.filter_map(|host| host.router.worker_table.next_deadline());
            if let Some(next) = next.min() {
                self.now = self.now.max(next);
                self.tick();
            } else if self.outstanding.iter().all(VecDeque::is_empty) {
                break;
            }
            // R waits in slices, and says anew in each what it waits for.
            self.wait_for(self.waiting);
            assert!(idle < 10, "deadlock: {}", self.describe());
        }
    }

    /// A job in which nothing goes wrong, but for those that other tasks have brought about.
    fn run_calm_job(&mut self) {
        assert!(self.outstanding.iter().all(VecDeque::is_empty));
        self.wait_for(None);
        let done = self.facts.seen.done;
        self.begin_job(true);
        let expected = done + usize::from(self.engine.is_some());
        let mut steps = 0;
        while !self.step_job() {
            steps += 1;
            assert!(steps < 100_000, "no end in sight: {}", self.describe());
        }
        assert_eq!(self.facts.seen.done, expected);
    }

    fn describe(&self) -> String {
        let tasks = self.facts.tasks.iter().enumerate();
        let open = tasks.filter(|(_, task)| task.end.is_none());
        let open = open.map(|(id, task)| (id, task.owner, task.place, task.open));
        let open: Vec<_> = open.take(10).collect();
        format!(
            "R waits for {:?}; open (task, owner, place, with the scheduler): {open:?}; held {}; \
             arriving {:?}; starving {}; ready {:?}",
            self.waiting,
            self.hub.with_scheduler(|scheduler| scheduler.buffered()),
            self.arriving,
            self.hub
                .with_scheduler(|scheduler| scheduler.is_blocked_on_credit()),
            self.ready,
        )
    }

    /// R needs no blob any more: agents hold those by which they restore workers.
    fn drop_blobs(&mut self) {
        for made in std::mem::take(&mut self.made) {
            self.hub.drop_blob(made.id);
        }
        let mut before = u64::MAX;
        while std::mem::replace(&mut before, self.moved) != self.moved {
            self.sweep();
        }
        for host in self.hosts.iter().filter(|host| !host.lost) {
            let bytes: usize = host.stored.values().map(|stored| stored.0.len()).sum();
            assert!(bytes <= self.setup.state, "{bytes} bytes are left");
        }
    }

    /// What is told of what workers have been at.
    fn check_stats(&self) {
        let stats = (0..self.facts.places.len()).map(|rank| {
            let rank = rank as Rank;
            let stats = self
                .hub
                .with_scheduler(|scheduler| scheduler.stats(rank, true));
            (rank, stats)
        });
        let mut answers = 0;
        for (rank, stats) in stats {
            answers += stats.tasks as usize;
            assert!(stats.busy <= self.now);
            let intervals = stats.intervals();
            assert!(intervals.len() <= MAX_INTERVALS);
            assert!(intervals.windows(2).all(|two| two[0].end <= two[1].start));
            assert!(
                intervals
                    .iter()
                    .all(|i| i.start <= i.end && i.end <= self.now)
            );
            assert_eq!(intervals.iter().map(|i| i.busy).sum::<Now>(), stats.busy);
            let state = self.hub.with_scheduler(|scheduler| scheduler.state(rank));
            let termination = matches!(state, State::Lost | State::Stopped);
            assert_eq!(
                termination,
                self.is_terminated(rank),
                "worker {rank} is {state:?}"
            );
        }
        assert_eq!(answers, self.facts.seen.answers);
    }

    /// After all has ended.
    fn check_rest(&mut self) {
        let tasks = &self.facts.tasks;
        assert!(tasks.iter().all(|task| task.end.is_some() && !task.open));
        assert!(self.ready.is_empty() && self.arriving.is_empty());
        self.hub.with_scheduler(|scheduler| {
            assert_eq!(scheduler.buffered(), 0);
            assert!(!scheduler.is_blocked_on_credit());
        });
        assert_eq!(self.hub.queued(), 0);
        self.check_stats();
        for at in 0..self.hosts.len() {
            assert_eq!(self.hub.next_frame(at), None);
            let host = &self.hosts[at];
            if host.lost {
                continue;
            }
            for (index, &rank) in host.ranks.iter().enumerate() {
                assert_eq!(host.router.worker_table.task(index as u32), None);
                let process = host.processes[index].is_some();
                assert_eq!(process, !self.is_terminated(rank), "worker {rank}");
                if process {
                    // All room is given back, or about to be.
                    assert_eq!(host.router.prefetched(index as u32), 0);
                    let reported = self.hub.with_scheduler(|scheduler| scheduler.window(rank));
                    let room = reported + host.router.worker_table.unreported(index as u32);
                    assert!(room >= SEND_WINDOW, "worker {rank} has room for {room}");
                }
            }
        }
        let mut places = self.facts.places.iter();
        let any_left = places.any(|place| !place.termination || place.waits);
        let left = self.hub.with_scheduler(|scheduler| scheduler.any_left());
        assert_eq!(left, any_left);
    }

    fn run(&mut self) {
        self.chaos();
        self.drain();
        self.drop_blobs();
        self.check_rest();
        // Whoever is left must be as good as new.
        for host in &mut self.hosts {
            host.fault = Fault::None;
        }
        let first = self.facts.tasks.len();
        for rank in 0..self.setup.workers as Rank {
            if !self.is_terminated(rank) {
                self.begin_task(rank, true);
                self.write_all();
            }
        }
        self.drain();
        self.run_calm_job();
        self.drop_blobs();
        self.check_rest();
        let ends = self.facts.tasks.iter();
        let good = |end: Option<End>| matches!(end, Some(End::Answer | End::Revoked));
        assert!(ends.clone().skip(first).all(|task| good(task.end)));
        let ended = |end: End| ends.clone().filter(|task| task.end == Some(end)).count();
        self.facts.seen.given_up = ended(End::GivenUp);
        self.facts.seen.errors = ended(End::Error);
    }
}

/// Says which seed it was when a test fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let seed = self.0;
            eprintln!("seed {seed} fails; RUSTCLUSTER_SEED={seed} replays it alone");
        }
    }
}

fn chosen() -> Option<u64> {
    let seed = std::env::var("RUSTCLUSTER_SEED").ok()?;
    Some(seed.parse().expect("RUSTCLUSTER_SEED is a number"))
}

fn is_long() -> bool {
    std::env::var("RUSTCLUSTER_LONG_TESTS").is_ok_and(|long| long == "1")
}

#[test]
fn every_task_ends_exactly_once_whatever_happens() {
    let seeds = match chosen() {
        Some(seed) => seed..seed + 1,
        None if is_long() => 0..10_000,
        None => 0..320,
    };
    let mut seen = Seen::default();
    for seed in seeds {
        let _named = Named(seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let setup = Setup::random(&mut rng);
        let mut sim = Sim::new(setup, rng);
        sim.run();
        seen.add(&sim.facts.seen);
    }
    eprintln!("{seen:?}");
    // A simulation in which nothing happens would find nothing.
    let few = seen.counts().iter().any(|&count| count < 5);
    assert!(!few || chosen().is_some(), "{seen:?}");
}

#[test]
fn ten_thousand_workers_on_a_hundred_hosts() {
    let seed = chosen().unwrap_or(1_000);
    let _named = Named(seed);
    let rng = StdRng::seed_from_u64(seed);
    let setup = Setup {
        workers: 10_000,
        hosts: 100,
        limit: 2_000_000,
        stream: 200_000,
        channel: 50_000,
        sizes: 1,
        whole_chunks: false,
        order: TakeOrder::Mixed,
        faults: 5,
        setup_messages: 4,
        retries: 2,
        timeout: Some(Duration::from_secs(60)),
        limits: true,
        prefetch: 2,
        jobs: 50,
        keep: Some(1_000_000),
        state: 10_000_000,
        blocking: false,
        slow: true,
        actions: if is_long() { 1_000_000 } else { 15_000 },
        largest: if is_long() { 400_000 } else { 20_000 },
    };
    let mut sim = Sim::new(setup, rng);
    sim.run();
    eprintln!("{:?}", sim.facts.seen);
}
