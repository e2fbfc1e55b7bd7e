//! Seeded simulation of a whole cluster: the real hub, scheduler and job engine of the head, the real
//! decisions of the agents, and simulated workers. They are connected by byte streams with small
//! capacities, which deliver slices of any size.
//!
//! The simulation has no processes, sockets or clocks, so that a seed always produces the same sequence
//! of events. A seed that fails is printed. `RUSTCLUSTER_SEED=<n>` replays one seed;
//! `RUSTCLUSTER_LONG_TESTS=1` runs 10,000 seeds.
//!
//! [`Facts`] records what the checks need to know about each task and each worker.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic fails the test"
)]

mod drain;
mod host;
mod jobs;
mod join;
mod linger;
mod parts;
mod r;
mod worker;

use bytes::Bytes;
use host::{BACKLOG, Fault, Host, Link, READ};
use jobs::OpenJob;
use join::Keeps;
use linger::Change;
use parts::End;
use parts::{Facts, LARGEST, Seen, Tasks, WorkerFacts, generation, slice};
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
use rustcluster_core::protocol::ids::{JobId, KEEP, RESTORE, Rank, TaskId};
use rustcluster_core::protocol::limits::SEND_WINDOW;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};
use worker::Process;

/// Maximum number of bytes that the hub collects for one write.
const WRITE: usize = 256 * 1024;

/// The order in which R takes answers.
#[derive(Clone, Copy, PartialEq)]
enum TakeOrder {
    ByRank,
    AsTheyCome,
    Mixed,
}

/// The parameters of a simulation.
struct Setup {
    workers: usize,
    hosts: usize,
    /// `buffer_limit` of the head, in bytes.
    limit: usize,
    /// Capacity of a stream between head and agent, in bytes.
    stream: usize,
    /// Capacity of a worker's channel, in bytes.
    channel: usize,
    /// 0: small messages and answers, 1: some large, 2: large answers.
    sizes: u32,
    /// Whether chunks have their maximum size, as in production, or any size.
    whole_chunks: bool,
    order: TakeOrder,
    /// One in this many chances for a fault is taken; 0: none.
    faults: u32,
    /// One in this many tasks is a set-up call.
    setup_calls: u32,
    /// How often a task is retried after worker failures.
    retries: usize,
    /// The time limit of all tasks.
    timeout: Option<Duration>,
    /// Whether some tasks have time limits of their own.
    limits: bool,
    /// One in this many tasks may be prefetched; 0: none.
    prefetch: u32,
    /// One in this many chances to begin a job is taken.
    jobs: u32,
    /// Size of the chunk caches of agents in bytes, if they have one.
    chunk_cache: Option<usize>,
    /// Maximum size of the set-up log of an agent, in bytes.
    setup_log_limit: usize,
    /// Whether the head keeps a set-up log, and its maximum size in bytes.
    keeps: Keeps,
    head_log_limit: u64,
    /// Whether R may be blocked in sending, which suspends the buffer limit.
    blocking: bool,
    /// Whether some workers read slowly.
    slow: bool,
    /// Number of random actions.
    actions: usize,
    /// Maximum size of a message or an answer, in bytes.
    largest: usize,
    /// How often the head vanishes and another takes the cluster over.
    changes: u32,
}

impl Setup {
    fn random(rng: &mut StdRng) -> Setup {
        let workers = match rng.random_range(0..4) {
            0 => rng.random_range(1..=3),
            1 => rng.random_range(1..=10),
            _ => rng.random_range(1..=40),
        };
        let sizes = rng.random_range(0..3);
        // Much data through narrow streams would only take a long time.
        let workers = if sizes == 2 { workers.min(8) } else { workers };
        let narrow = if sizes == 0 { 0 } else { 1 };
        let timeout = [0, 0, 100, 2_000, 20_000][rng.random_range(0..5)];
        let changes = [0, 0, 1, 3][rng.random_range(0..4)];
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
            setup_calls: [2, 6, 30][rng.random_range(0..3)],
            retries: rng.random_range(0..4),
            prefetch: [0, 1, 1, 2][rng.random_range(0..4)],
            jobs: [4, 12, 100][rng.random_range(0..3)],
            timeout: (timeout > 0).then_some(Duration::from_millis(timeout)),
            limits: rng.random_ratio(1, 3),
            chunk_cache: [None, Some(1), Some(150_000), Some(10_000_000)][rng.random_range(0..4)],
            setup_log_limit: [0, 10_000, 300_000, 1 << 30, 1 << 30][rng.random_range(0..5)],
            keeps: match rng.random_range(0..4) {
                0 if changes == 0 => Keeps::Nothing,
                0..3 => Keeps::ForLate,
                _ => Keeps::ForAll,
            },
            head_log_limit: [200_000, 1 << 30, 1 << 30, 1 << 30][rng.random_range(0..4)],
            blocking: rng.random_ratio(1, 6),
            slow: rng.random(),
            actions: 800 + 60 * workers,
            largest: LARGEST,
            changes,
        }
    }
}

struct Sim {
    setup: Setup,
    rng: StdRng,
    now: Now,
    hub: Hub,
    hosts: Vec<Host>,
    /// The host of each worker, and its index there.
    at: Vec<(usize, u32)>,
    facts: Facts,
    job: JobId,
    /// Tasks whose answers R has not taken, by owner, as the hub must know them.
    outstanding: Vec<VecDeque<TaskId>>,
    /// What the hub must have ready for R, in order, with its size in bytes.
    ready: VecDeque<(TaskId, usize, Ready)>,
    /// The incomplete answer of each worker: its task, and the bytes that the head must have of it.
    arriving: HashMap<Rank, (TaskId, usize)>,
    writing: Option<Message>,
    /// The blobs that R has not dropped.
    made: Vec<Made>,
    waiting: Option<Waiting>,
    /// What R continues to wait for after its decision about a lost task.
    resume: Option<Waiting>,
    /// Counts all progress: bytes that moved, and events.
    moved: u64,
    /// The job engine of the open job, and the facts about that job.
    engine: Option<Job>,
    open_job: Option<OpenJob>,
    /// The round-trip times to workers in earlier jobs, in seconds.
    rtts: HashMap<Rank, f64>,
    /// The instant at which the simulated time is 0.
    origin: Instant,
    /// The workers that are started by an agent and not restored yet, and how often workers have joined.
    away: BTreeSet<Rank>,
    arrivals: u64,
    /// What is known about the change of heads.
    change: Change,
}

impl Sim {
    fn new(setup: Setup, mut rng: StdRng) -> Sim {
        // Ranks are distributed at random: hosts may be listed in any order, several times.
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
        let host = |ranks: &Vec<Rank>| Host::new(ranks, setup.stream);
        let hosts: Vec<Host> = ranks.iter().map(host).collect();
        let hub = Hub::by_hand(setup.hosts, setup.limit).expect("descriptors");
        let mut sim = Sim {
            hosts,
            hub,
            now: Duration::ZERO,
            at,
            facts: Facts {
                tasks: Tasks::new(),
                workers: (0..setup.workers).map(|_| WorkerFacts::new()).collect(),
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
            open_job: None,
            rtts: HashMap::new(),
            origin: Instant::now(),
            away: BTreeSet::new(),
            arrivals: 0,
            change: Change::default(),
            setup,
            rng,
        };
        sim.go();
        sim
    }

    fn is_terminated(&self, rank: Rank) -> bool {
        self.facts.workers[rank as usize].is_terminated
    }

    // ---- head and agents ----

    /// The head writes to an agent.
    fn flush(&mut self, at: usize, max: usize) {
        if self.hosts[at].lost {
            return;
        }
        while self.hosts[at].out.len() < WRITE {
            let Some(frame) = self.hub.next_frame(at) else {
                break;
            };
            assert!(frame.body.len() <= MAX_BODY);
            self.check_sent(at, &frame);
            self.hosts[at].out.push(&frame);
        }
        let host = &mut self.hosts[at];
        self.moved += host.down.pour(&mut host.out, max) as u64;
        self.notes();
    }

    /// Checks that the head sends one task after the other to each worker, and prefetches at most one.
    fn check_sent(&mut self, at: usize, frame: &Frame) {
        let header = &frame.header;
        if header.kind == Kind::Control {
            let message = control::decode(&frame.body).expect("a message");
            if let ToAgent::LossAck { worker } = message {
                let rank = self.hosts[at].ranks[worker as usize];
                let unacknowledged = &mut self.facts.workers[rank as usize].unacknowledged;
                // The loss of a worker that has terminated is acknowledged, but not noted again.
                *unacknowledged = unacknowledged.saturating_sub(1);
            }
            return;
        }
        if header.kind != Kind::Data {
            return;
        }
        let rank = self.hosts[at].ranks[header.worker as usize];
        let id = header.task;
        if id & RESTORE != 0 {
            return;
        }
        if header.flags & FIRST != 0 && header.flags & ABORT == 0 {
            self.check_draining(rank, id);
            if id & KEEP != 0 {
                let task = &mut self.facts.tasks[id];
                (task.owner, task.assigned) = (rank, rank);
            }
        }
        let known = &mut self.facts.workers[rank as usize];
        if known.unacknowledged > 0 {
            return;
        }
        if header.flags & ABORT != 0 {
            if known.prefetched == Some(id) {
                known.prefetched = None;
                self.facts.seen.dropped += 1;
            } else if known.current == Some(id) {
                assert_eq!(known.prefetched, None);
                known.current = None;
            }
            return;
        }
        if header.flags & FIRST == 0 {
            assert!(known.current == Some(id) || known.prefetched == Some(id));
            return;
        }
        if known.current.is_none() {
            known.current = Some(id);
            return;
        }
        let task = &self.facts.tasks[id];
        assert!(task.prefetch && task.effect.is_none() && !task.is_reassigned());
        assert_eq!(known.prefetched, None, "two prefetched tasks");
        known.prefetched = Some(id);
        self.facts.seen.prefetched_tasks += 1;
    }

    /// The head reads from an agent.
    fn head_read(&mut self, at: usize, max: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        self.moved += host.up.read(&mut host.head_received, max) as u64;
        while let Some(frame) = frame::decode(&mut self.hosts[at].head_received).expect("a frame") {
            self.record_received(at, &frame);
            let header = frame.header;
            self.hub.set_clock(self.now);
            let brings = header.kind == Kind::Data && header.flags == LAST | BY_REFERENCE;
            let memory = brings.then(|| {
                self.facts.seen.in_shared_memory += 1;
                Memory::new(frame.number().expect("a length") as usize, None)
            });
            if let Err(error) = self.hub.on_frame(at, frame, memory) {
                panic!("the head refuses {header:?}: {error}");
            }
            self.notes();
        }
    }

    /// Records what the head must do with a frame.
    fn record_received(&mut self, at: usize, frame: &Frame) {
        let header = &frame.header;
        if !matches!(header.kind, Kind::Data | Kind::Seed) {
            return;
        }
        let rank = self.hosts[at].ranks[header.worker as usize];
        if header.task & RESTORE != 0 || self.is_terminated(rank) {
            return;
        }
        if header.kind == Kind::Seed {
            if header.task == 0 {
                return self.introduced(rank, &frame.body);
            }
            if generation(header.task) < self.facts.tasks.generation() {
                return;
            }
        }
        assert_eq!(
            generation(header.task),
            self.facts.tasks.generation(),
            "a head gets an answer to a task of another"
        );
        let task = &self.facts.tasks[header.task];
        let known = &mut self.facts.workers[rank as usize];
        if header.kind == Kind::Data && header.flags & LAST != 0 {
            if known.prefetched == Some(header.task) {
                // The agent has dropped the prefetched task.
                assert!(header.flags & ABORT != 0 && !task.started);
                known.prefetched = None;
                self.facts.seen.dropped += 1;
                return;
            }
            assert_eq!(known.current, Some(header.task));
            known.current = known.prefetched.take();
        }
        if header.kind == Kind::Seed {
            assert_eq!(header.flags & REASSIGNED != 0, task.is_reassigned());
            return;
        }
        if let (true, Some(seed)) = (header.flags & LAST != 0, &task.seed_after) {
            // The RNG state after a reassigned task is its owner's.
            let owner = &mut self.facts.workers[task.owner as usize];
            let reported = match seed.len() {
                0..=64 => seed.clone(),
                _ => Bytes::new(),
            };
            if task.owner != rank && (!owner.is_terminated || owner.is_away) {
                owner.other_seeds.push(reported.clone());
            }
            owner.reported_seeds.push(reported);
        }
        if !task.scheduled {
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

    fn agent_read(&mut self, at: usize, max: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        self.moved += host.read_head(max, self.now, &mut self.facts);
        if self.hosts[at].lost {
            // The agent was asked to end.
            self.lose_host(at, "ended");
        }
    }

    fn agent_write(&mut self, at: usize, max: usize) {
        let host = &mut self.hosts[at];
        if !host.lost {
            self.moved += host.up.pour(&mut host.to_head, max) as u64;
        }
    }

    /// An agent starts the next worker that it has to start.
    fn start_worker(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        let Some((worker, replaces)) = host.to_start.pop_front() else {
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

    /// One step of a worker's process, and of its agent with that worker. Transfers at most `max` bytes in
    /// each direction. `calm`: without delays.
    fn step_worker(&mut self, at: usize, worker: u32, max: usize, calm: bool) {
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
            process.down.pour(&mut process.outgoing, max)
        };
        let prefetched = host.router.prefetched(worker);
        // The send window also covers withdrawn tasks. Frames of the agent are not counted.
        let bound = SEND_WINDOW + HEADER_LEN * 64 + process.bytes_from_agent;
        assert!(
            process.outgoing.len() + prefetched <= bound,
            "{} bytes wait for one worker, {prefetched} of them prefetched",
            process.outgoing.len() + prefetched
        );
        if process.outgoing.is_empty() {
            process.bytes_from_agent = 0;
        }
        assert!(process.unrouted.len() <= HEADER_LEN + MAX_BODY + READ);
        if process.outgoing.is_empty() && std::mem::take(&mut process.closing) {
            process.closed = true;
        }
        let given = host.router.worker_table.passed(worker, passed);
        if let Some((task, bytes)) = given.filter(|_| host.link == Link::Up) {
            host.to_head.push(&Frame::credit(worker, task, bytes));
        }
        self.moved += passed as u64;
        let Some(process) = &mut host.processes[worker as usize] else {
            return;
        };
        if !process.dead {
            let pace = (max, calm, self.setup.whole_chunks);
            let rank = host.ranks[worker as usize];
            let faulty = host.fault == Fault::Tasks;
            self.moved += process.run(&mut self.rng, &mut self.facts, rank, pace, faulty);
        }
        self.moved += host.read_worker(worker, max, self.now, &mut self.facts);
        // The agent notices an exit after some time.
        let Some(process) = &host.processes[worker as usize] else {
            return;
        };
        if process.dead && (calm || self.rng.random_ratio(1, 4)) {
            self.moved += 1;
            host.on_exit(worker, self.now, &mut self.facts);
        }
        // What a new head asks for is sent as a whole.
        let asked_for = if self.setup.changes > 0 { LARGEST } else { 0 };
        let max_backlog = BACKLOG + 2 * READ + 200 * host.ranks.len() + asked_for;
        assert!(
            host.to_head.len() <= max_backlog,
            "{} bytes wait for the head",
            host.to_head.len()
        );
    }

    // ---- the sequence of events ----

    /// Random actions and faults.
    fn chaos(&mut self, actions: usize) {
        for _ in 0..actions {
            match self.rng.random_range(0..20) {
                10 if self.is_free() && self.rng.random_ratio(1, self.setup.jobs) => self.run_job(),
                11 if self.is_free() && self.rng.random_ratio(1, 40) => {
                    match self.rng.random_range(0..3) {
                        0 => self.add_workers(),
                        _ => self.set_up_all(),
                    }
                }
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

    /// Whether R neither waits nor writes.
    fn is_free(&self) -> bool {
        self.waiting.is_none() && self.writing.is_none() && self.resume.is_none()
    }

    fn run_job(&mut self) {
        self.begin_job(false);
        let max_steps = self.rng.random_range(1..300);
        let over = (0..max_steps).any(|_| self.step_job());
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
        // Also to terminated workers: R may not know yet that they have terminated.
        if self.outstanding[rank].len() < 3 {
            self.begin_task(rank as Rank, false);
            self.write_chunk();
        }
    }

    /// Ctrl-C while R waits: R cancels the job that it waits for.
    fn interrupt(&mut self) {
        let job = match self.waiting {
            Some(Waiting::For(rank)) => {
                let front = self.outstanding[rank as usize].front();
                front.map(|&task| self.facts.tasks[task].job)
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
        match self.rng.random_range(0..22) {
            20 | 21 => self.drain_something(rank),
            // R runs a job of the job engine, which closes it.
            0..5 if self.open_job.is_some() => {}
            0..2 => {
                let job = self.rng.random_range(0..=self.job);
                self.cancel_job(job);
            }
            2..5 => {
                let job = self.job;
                self.cancel_job(job);
            }
            5..12 => {
                // Any worker, or the one that has most to read.
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
                // The worker closes its channel, but its process continues to run.
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
                let one_in = 3 + self.setup.workers as u32 / 100;
                if self.rng.random_ratio(1, one_in) && !self.hosts[at].lost {
                    self.lose_host(at, "lost");
                }
            }
        }
    }

    /// A random step of a host or of the head.
    fn pump(&mut self, at: usize) {
        if self.hosts[at].lost {
            return self.step_absent(at);
        }
        let n = slice(&mut self.rng);
        match self.rng.random_range(0..10) {
            0 => self.flush(at, n),
            1 => self.agent_read(at, n),
            2 => self.agent_write(at, n),
            3 => self.head_read(at, n),
            4 => self.start_worker(at),
            _ => self.step_workers(at),
        }
    }

    /// A step of some workers of a host.
    fn step_workers(&mut self, at: usize) {
        let count = self.hosts[at].ranks.len();
        for _ in 0..count.min(8) {
            let worker = self.rng.random_range(0..count) as u32;
            let n = slice(&mut self.rng);
            self.step_worker(at, worker, n, false);
        }
    }

    /// One step of everything, as fast as the streams allow.
    fn sweep(&mut self) {
        const MAX_STEP: usize = usize::MAX;
        for at in 0..self.hosts.len() {
            self.connect(at);
            self.flush(at, MAX_STEP);
            self.agent_read(at, MAX_STEP);
            for worker in 0..self.hosts[at].ranks.len() as u32 {
                self.start_worker(at);
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

    /// R takes all that is ready, and then waits for the next answer.
    fn take_all(&mut self) {
        while self.waiting.is_none() && !self.outstanding.iter().all(VecDeque::is_empty) {
            self.wait();
            self.write_all();
        }
    }

    /// Runs without further faults, except those of faulty hosts, until all tasks have ended. Panics if
    /// there is a deadlock.
    fn drain(&mut self) {
        self.write_all();
        self.hub
            .with_scheduler(|scheduler| scheduler.set_unlimited(false));
        // These would never end.
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
            if sweeps == 20_000 {
                // Workers that never come up are restarted again and again.
                self.hosts
                    .iter_mut()
                    .for_each(|host| host.fault = Fault::None);
            }
            if self.moved != before {
                before = self.moved;
                idle = 0;
                continue;
            }
            idle += 1;
            // Only deadlines can cause progress now: of tasks, and of workers that were asked to end.
            if let Some(next) = self.next_deadline() {
                self.now = self.now.max(next);
                self.tick();
            } else if self.outstanding.iter().all(VecDeque::is_empty) {
                break;
            }
            // R waits in slices, and reports its demand in each of them.
            self.wait_for(self.waiting);
            assert!(idle < 10, "deadlock: {}", self.describe());
        }
    }

    /// When the next task or the next worker of an agent must have ended.
    pub fn next_deadline(&self) -> Option<Now> {
        let living = self.hosts.iter().filter(|host| !host.lost);
        let next = living.flat_map(|host| {
            let table = &host.router.worker_table;
            [table.next_deadline(), table.next_restart()]
        });
        next.flatten().min()
    }

    /// Runs a job without further faults.
    fn run_calm_job(&mut self) {
        assert!(self.outstanding.iter().all(VecDeque::is_empty));
        self.wait_for(None);
        let done = self.facts.seen.jobs_done;
        self.begin_job(true);
        let expected = done + usize::from(self.engine.is_some());
        let mut steps = 0;
        while !self.step_job() {
            steps += 1;
            assert!(steps < 100_000, "no end in sight: {}", self.describe());
        }
        assert_eq!(self.facts.seen.jobs_done, expected);
    }

    fn describe(&self) -> String {
        let tasks = self.facts.tasks.iter().enumerate();
        let open = tasks.filter(|(_, task)| task.end.is_none());
        let open = open.map(|(id, task)| (id, task.owner, task.assigned, task.scheduled));
        let open: Vec<_> = open.take(10).collect();
        format!(
            "R waits for {:?}; open (task, owner, assigned worker, scheduled): {open:?}; buffered {}; \
             arriving {:?}; blocked on credit {}; ready {:?}",
            self.waiting,
            self.hub.with_scheduler(|scheduler| scheduler.buffered()),
            self.arriving,
            self.hub
                .with_scheduler(|scheduler| scheduler.is_blocked_on_credit()),
            self.ready,
        )
    }

    /// R drops all blobs. Agents may retain only the blobs in their set-up logs.
    fn drop_blobs(&mut self) {
        for made in std::mem::take(&mut self.made) {
            self.hub.drop_blob(made.id);
        }
        let mut before = u64::MAX;
        loop {
            while std::mem::replace(&mut before, self.moved) != self.moved {
                self.sweep();
            }
            // Workers that were stopped may have to be killed.
            let Some(next) = self.next_deadline() else {
                break;
            };
            self.now = self.now.max(next);
            self.tick();
            before = u64::MAX;
        }
        for host in self.hosts.iter().filter(|host| !host.lost) {
            let bytes: usize = host.stored.values().map(|stored| stored.0.len()).sum();
            assert!(
                bytes <= self.setup.setup_log_limit,
                "{bytes} bytes of blobs remain"
            );
        }
    }

    /// Checks the statistics of the workers.
    fn check_stats(&self) {
        let stats = (0..self.facts.workers.len()).map(|rank| {
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
            let terminated = matches!(state, State::Lost | State::Stopped | State::Waiting);
            assert_eq!(
                terminated,
                self.is_terminated(rank),
                "worker {rank} is {state:?}"
            );
        }
        let before = self.change.answers_before;
        assert_eq!(answers, self.facts.seen.answers - before);
    }

    /// Checks that nothing remains after all tasks have ended.
    fn check_rest(&mut self) {
        let tasks = &self.facts.tasks;
        assert!(
            tasks
                .iter()
                .all(|task| task.end.is_some() && !task.scheduled)
        );
        assert!(self.ready.is_empty() && self.arriving.is_empty());
        self.hub.with_scheduler(|scheduler| {
            assert_eq!(scheduler.buffered(), 0);
            assert!(!scheduler.is_blocked_on_credit());
        });
        assert_eq!(self.hub.queued(), 0);
        self.check_stats();
        for at in 0..self.hosts.len() {
            if self.hosts[at].lost {
                continue;
            }
            assert_eq!(self.hub.next_frame(at), None);
            let host = &self.hosts[at];
            for (index, &rank) in host.ranks.iter().enumerate() {
                assert_eq!(host.router.worker_table.task(index as u32), None);
                let process = host.processes[index].is_some();
                assert_eq!(process, !self.is_terminated(rank), "worker {rank}");
                if process {
                    // The whole send window has been returned, or is about to be.
                    assert_eq!(host.router.prefetched(index as u32), 0);
                    let reported = self.hub.with_scheduler(|scheduler| scheduler.window(rank));
                    let window = reported + host.router.worker_table.unreported(index as u32);
                    assert!(
                        window >= SEND_WINDOW,
                        "worker {rank} has a window of {window}"
                    );
                }
            }
        }
        let mut workers = self.facts.workers.iter();
        let any_left = workers.any(|known| !known.is_terminated || known.awaits_restart);
        let left = self.hub.with_scheduler(|scheduler| scheduler.any_left());
        assert_eq!(left, any_left);
    }

    /// Runs the whole simulation.
    fn run(&mut self) {
        self.chaos(self.setup.actions);
        for _ in 0..self.setup.changes {
            if !self.change_head() {
                return;
            }
            self.chaos(self.setup.actions / 4);
        }
        self.drain();
        self.drop_blobs();
        self.check_rest();
        // The remaining workers must still work.
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
        self.check_kept();
        let ends = self.facts.tasks.iter();
        let good = |end: Option<End>| matches!(end, Some(End::Answer | End::Revoked));
        assert!(ends.clone().skip(first).all(|task| good(task.end)));
        let ended = |end: End| ends.clone().filter(|task| task.end == Some(end)).count();
        self.facts.seen.given_up = ended(End::GivenUp);
        self.facts.seen.errors = ended(End::Error);
    }
}

/// Prints the seed if a test fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let seed = self.0;
            eprintln!("seed {seed} fails; RUSTCLUSTER_SEED={seed} replays it alone");
        }
    }
}

/// The seed that the environment sets.
fn chosen() -> Option<u64> {
    let seed = std::env::var("RUSTCLUSTER_SEED").ok()?;
    Some(seed.parse().expect("RUSTCLUSTER_SEED is a number"))
}

fn is_long() -> bool {
    std::env::var("RUSTCLUSTER_LONG_TESTS").is_ok_and(|long| long == "1")
}

/// Seeds that have found faults which are rare: a lost host without the calls of all others after a take-over, running
/// calls beyond the limit of the log, calls that failed after they were listed, and tasks of lost hosts in another order.
const FOUND: [u64; 7] = [15_869, 19_124, 11_517, 14_491, 11_271, 15_280, 16_956];

#[test]
fn every_task_ends_exactly_once_whatever_happens() {
    let seeds: Vec<u64> = match chosen() {
        Some(seed) => vec![seed],
        None if is_long() => (0..10_000).chain(FOUND).collect(),
        None => (0..320).chain(FOUND).collect(),
    };
    let run = |seeds: &mut dyn Iterator<Item = u64>| {
        let mut seen = Seen::default();
        for seed in seeds {
            let _named = Named(seed);
            let mut rng = StdRng::seed_from_u64(seed);
            let setup = Setup::random(&mut rng);
            let mut sim = Sim::new(setup, rng);
            sim.run();
            seen.add(&sim.facts.seen);
        }
        seen
    };
    // What a seed does depends neither on other seeds nor on time.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut seen = Seen::default();
    std::thread::scope(|scope| {
        let part = |thread| seeds.iter().copied().skip(thread).step_by(threads);
        let start = |thread| scope.spawn(move || run(&mut part(thread)));
        let running: Vec<_> = (0..threads).map(start).collect();
        for thread in running {
            match thread.join() {
                Ok(part) => seen.add(&part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    eprintln!("{seen:?}");
    // Each kind of event must happen, or the simulation would not test it.
    let few = seen.counts().iter().any(|&count| count < 2);
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
        setup_calls: 4,
        retries: 2,
        timeout: Some(Duration::from_secs(60)),
        limits: true,
        prefetch: 2,
        jobs: 50,
        chunk_cache: Some(1_000_000),
        setup_log_limit: 10_000_000,
        keeps: Keeps::ForAll,
        head_log_limit: 1 << 30,
        blocking: false,
        slow: true,
        actions: if is_long() { 1_000_000 } else { 15_000 },
        largest: if is_long() { 400_000 } else { 20_000 },
        changes: 0,
    };
    let mut sim = Sim::new(setup, rng);
    sim.run();
    eprintln!("{:?}", sim.facts.seen);
}
