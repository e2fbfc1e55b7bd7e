//! Seeded simulation of a whole cluster: the head's scheduler, the agents' books and made-up
//! workers, joined by byte streams that hold little and deliver in slices of any size.
//!
//! There is no process, socket or clock here, so one seed is one history, for ever. A seed that
//! fails is printed; `RUSTCLUSTER_SEED=<n>` replays it alone, `RUSTCLUSTER_LONG_TESTS=1` runs
//! 10,000 of them.

use bytes::{Buf, Bytes, BytesMut};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rustcluster_core::agent::replay::Replay;
use rustcluster_core::agent::state::{Book, Ending, Now, REPLAY, Ready, Route};
use rustcluster_core::frame::{
    self, ABORT, FIRST, Frame, GUEST, HEADER_LEN, Header, Kind, LAST, MAX_BODY,
};
use rustcluster_core::message::{self, Exit, Loss, ToAgent, ToHead, WorkerReady};
use rustcluster_core::outbuf::OutBuf;
use rustcluster_core::scheduler::{
    Body, GRANT, Gone, JobId, Note, Order as Submission, Outcome, RESULT_WINDOW, Rank, SEND_WINDOW,
    Scheduler, TaskId, Want,
};
use rustcluster_core::share::{Chunk, Kept};
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::OnceLock;
use std::time::Duration;

/// The largest message or answer of a simulated task: several windows and grants.
const LARGEST: usize = 3_300_000;
/// As the hub puts together for one write.
const WRITE: usize = 256 * 1024;
/// As the agent reads at a time.
const READ: usize = 256 * 1024;
/// Agents stop reading from workers when so much waits for the head. Less than in reality, so
/// that it happens.
const BACKLOG: usize = 512 * 1024;

/// Bytes that messages and answers are cut from, so that they cost nothing to make or compare.
fn pattern() -> &'static Bytes {
    static PATTERN: OnceLock<Bytes> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut bytes = vec![0; LARGEST + 1_000_003];
        StdRng::seed_from_u64(1).fill_bytes(&mut bytes);
        bytes.into()
    })
}

/// Where in the pattern a task's message (or answer) begins. Messages of four tasks in a row are
/// the same, as far as they go.
fn origin(task: TaskId, answer: bool) -> usize {
    let number = if answer { task } else { task / 4 * 4 };
    (number as usize * 2 + usize::from(answer)) * 7_919 % 1_000_003
}

fn part(task: TaskId, answer: bool, from: usize, len: usize) -> Bytes {
    let start = origin(task, answer) + from;
    pattern().slice(start..start + len)
}

/// A byte stream that holds a limited amount.
struct Pipe {
    bytes: BytesMut,
    capacity: usize,
}

impl Pipe {
    fn new(capacity: usize) -> Pipe {
        let bytes = BytesMut::new();
        Pipe { bytes, capacity }
    }

    /// Takes at most `most` bytes off `out`.
    fn pour(&mut self, out: &mut OutBuf, most: usize) -> usize {
        if out.is_empty() {
            return 0;
        }
        let mut room = most.min(self.capacity - self.bytes.len());
        let poured = out.write_with(|slices| {
            let mut written = 0;
            for slice in slices {
                let n = slice.len().min(room);
                self.bytes.extend_from_slice(&slice[..n]);
                room -= n;
                written += n;
            }
            Ok::<_, Infallible>(written)
        });
        poured.unwrap_or_else(|never| match never {})
    }

    fn read(&mut self, into: &mut BytesMut, most: usize) -> usize {
        let n = most.min(self.bytes.len());
        into.extend_from_slice(&self.bytes[..n]);
        self.bytes.advance(n);
        n
    }
}

/// What a worker does when it is interrupted.
#[derive(Clone, Copy, PartialEq)]
enum Manners {
    /// Ends its answer where it is.
    Stop,
    /// Begins its answer anew: R's condition.
    Restart,
    /// Answers as if nothing had happened.
    Ignore,
}

/// A task as those who look on know it.
struct Task {
    rank: Rank,
    job: JobId,
    len: usize,
    answer_len: usize,
    /// Never answers.
    stuck: bool,
    manners: Manners,
    /// All of it was submitted.
    complete: bool,
    started: bool,
    /// R withdrew it.
    withdrawn: bool,
    done: bool,
}

/// A task that a simulated worker is at.
struct Running {
    task: TaskId,
    sent: usize,
    len: usize,
    begun: bool,
    /// Steps before the next chunk.
    pause: u32,
    /// Where the answer is to begin anew, once.
    restart_at: Option<usize>,
    stuck: bool,
    manners: Manners,
}

struct Worker {
    received: BytesMut,
    out: OutBuf,
    incoming: Option<(TaskId, usize)>,
    running: Option<Running>,
    last_started: TaskId,
    /// Reads a few bytes at a time for so many steps.
    slow: u32,
}

/// A worker's process with its agent's end of the channel.
struct Process {
    outgoing: OutBuf,
    down: Pipe,
    up: Pipe,
    held: BytesMut,
    worker: Worker,
    closing: bool,
    closed: bool,
    dead: bool,
}

struct Host {
    lost: bool,
    ranks: Vec<Rank>,
    out: OutBuf,
    down: Pipe,
    received: BytesMut,
    book: Book,
    kept: Kept,
    processes: Vec<Option<Process>>,
    to_make: VecDeque<(u32, bool)>,
    replacing: Vec<bool>,
    to_head: OutBuf,
    up: Pipe,
    head_received: BytesMut,
}

/// How R takes answers.
#[derive(Clone, Copy, PartialEq)]
enum Order {
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
    order: Order,
    /// One in so many actions is a fault; 0: none.
    faults: u32,
    /// Bytes of chunks that agents keep, if they do.
    keep: Option<usize>,
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
        Setup {
            workers,
            hosts: rng.random_range(1..=workers.min(4)),
            limit: [0, 1, 300_000, 1_000_000, 4_000_000][rng.random_range(0..5)],
            stream: [200, 5_000, 70_000, 250_000][rng.random_range(narrow..4)],
            channel: [100, 5_000, 70_000, 200_000][rng.random_range(narrow..4)],
            sizes,
            whole_chunks: rng.random(),
            order: [Order::ByRank, Order::AsTheyCome, Order::Mixed][rng.random_range(0..3)],
            faults: [0, 200, 40][rng.random_range(0..3)],
            keep: [None, Some(0), Some(150_000), Some(10_000_000)][rng.random_range(0..4)],
            blocking: rng.random_ratio(1, 6),
            slow: rng.random(),
            actions: 800 + 60 * workers,
            largest: LARGEST,
        }
    }
}

/// What has happened.
#[derive(Debug, Default)]
struct Seen {
    answers: usize,
    lost: usize,
    cancelled: usize,
    replaced: usize,
    /// Times that a result waited on its host.
    starved: usize,
}

impl Seen {
    fn add(&mut self, other: &Seen) {
        self.answers += other.answers;
        self.lost += other.lost;
        self.cancelled += other.cancelled;
        self.replaced += other.replaced;
        self.starved += other.starved;
    }
}

struct Message {
    task: TaskId,
    sent: usize,
    first: bool,
}

struct Sim {
    setup: Setup,
    rng: StdRng,
    now: Now,
    scheduler: Scheduler,
    hosts: Vec<Host>,
    place: Vec<(usize, u32)>,
    gone: Vec<bool>,
    tasks: Vec<Task>,
    job: JobId,
    /// As in the hub's handle: tasks sent and not received.
    outstanding: Vec<VecDeque<TaskId>>,
    /// Ended tasks that R has not taken, in order, with the bytes they hold.
    ready: VecDeque<(TaskId, usize)>,
    /// Bytes the head should hold of answers that are not whole.
    arriving: HashMap<Rank, (TaskId, usize)>,
    writing: Option<Message>,
    waiting: Option<Want>,
    submitted: usize,
    released: usize,
    /// Anything that moved, ever.
    moved: u64,
    seen: Seen,
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
        let mut place = vec![(0, 0); setup.workers];
        for (host, ranks) in ranks.iter().enumerate() {
            for (index, &rank) in ranks.iter().enumerate() {
                place[rank as usize] = (host, index as u32);
            }
        }
        let hosts = ranks.iter().map(|ranks| Host {
            lost: false,
            ranks: ranks.clone(),
            out: OutBuf::default(),
            down: Pipe::new(setup.stream),
            received: BytesMut::new(),
            book: Book::new(ranks.len()),
            kept: Kept::new(setup.keep.unwrap_or(0)),
            processes: ranks.iter().map(|_| None).collect(),
            to_make: (0..ranks.len() as u32)
                .map(|worker| (worker, false))
                .collect(),
            replacing: vec![false; ranks.len()],
            to_head: OutBuf::default(),
            up: Pipe::new(setup.stream),
            head_received: BytesMut::new(),
        });
        let hosts: Vec<Host> = hosts.collect();
        let mut scheduler = Scheduler::new(ranks, setup.limit);
        for agent in 0..hosts.len() {
            if let Some(most) = setup.keep {
                scheduler.share(agent, most);
            }
        }
        Sim {
            hosts,
            scheduler,
            now: Duration::ZERO,
            place,
            gone: vec![false; setup.workers],
            tasks: Vec::new(),
            job: 1,
            outstanding: vec![VecDeque::new(); setup.workers],
            ready: VecDeque::new(),
            arriving: HashMap::new(),
            writing: None,
            waiting: None,
            submitted: 0,
            released: 0,
            moved: 0,
            seen: Seen::default(),
            setup,
            rng,
        }
    }

    // ---- R ----

    fn size(&mut self, answer: bool) -> usize {
        let rng = &mut self.rng;
        let size = match (self.setup.sizes, rng.random_range(0..40)) {
            (2, _) if answer => rng.random_range(1_000_000..LARGEST),
            (0, _) | (_, 0..25) => rng.random_range(0..2_000),
            (_, 25..35) => rng.random_range(0..100_000),
            (_, 35..38) => rng.random_range(0..600_000),
            _ => rng.random_range(0..LARGEST),
        };
        // Boundaries are where mistakes are.
        let size = match rng.random_range(0..60) {
            0 => 0,
            1 => MAX_BODY,
            2 => RESULT_WINDOW,
            3 => RESULT_WINDOW + 1,
            4 if self.setup.sizes > 0 => RESULT_WINDOW + GRANT,
            5 if self.setup.sizes > 0 => SEND_WINDOW,
            _ => size,
        };
        size.min(self.setup.largest)
    }

    fn begin_task(&mut self, rank: Rank, may_be_stuck: bool) {
        let task = self.tasks.len() as TaskId;
        if self.rng.random_ratio(1, 4) {
            self.job += 1;
        }
        // Mostly the current job, as verbs do; sometimes an older one.
        let job = if self.rng.random_ratio(1, 10) {
            self.rng.random_range(0..=self.job)
        } else {
            self.job
        };
        let len = self.size(false);
        let answer_len = self.size(true);
        let stuck = may_be_stuck && self.setup.faults > 0 && self.rng.random_ratio(1, 12);
        let manners = match self.rng.random_range(0..3) {
            0 => Manners::Stop,
            1 => Manners::Restart,
            _ => Manners::Ignore,
        };
        self.tasks.push(Task {
            rank,
            job,
            len,
            answer_len,
            stuck,
            manners,
            complete: false,
            started: false,
            withdrawn: false,
            done: false,
        });
        self.outstanding[rank as usize].push_back(task);
        self.writing = Some(Message {
            task,
            sent: 0,
            first: true,
        });
    }

    /// Submits the next chunk of the message that is being written.
    fn write_chunk(&mut self) {
        let Some(writing) = &mut self.writing else {
            return;
        };
        let task = &mut self.tasks[writing.task as usize];
        let left = task.len - writing.sent;
        let n = if self.setup.whole_chunks || self.rng.random() {
            left.min(MAX_BODY)
        } else {
            self.rng.random_range(0..=left.min(MAX_BODY))
        };
        // The last chunk may be empty, and may follow later.
        let last = n == left && (self.setup.whole_chunks || self.rng.random());
        let at = origin(writing.task, false) + writing.sent;
        let bytes = part(writing.task, false, writing.sent, n);
        let (rank, job) = (task.rank, task.job);
        let first = std::mem::replace(&mut writing.first, false);
        let id = writing.task;
        writing.sent += n;
        if last {
            task.complete = true;
            self.writing = None;
        }
        self.submitted += n;
        let key = self
            .setup
            .keep
            .map(|_| at as u128 * MAX_BODY as u128 * 2 + n as u128);
        let chunk = Chunk { bytes, key };
        self.scheduler.submit(rank, id, job, chunk, first, last);
        self.notes();
    }

    /// R could not finish the message.
    fn abandon(&mut self) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        let task = writing.task;
        self.withdraw(task);
        if writing.first {
            // The head has never heard of it.
            self.tasks[task as usize].done = true;
            return;
        }
        let rank = self.tasks[task as usize].rank;
        self.scheduler.cancel_task(rank, task);
        self.notes();
        assert!(
            self.tasks[task as usize].done,
            "abandoned task {task} lives"
        );
    }

    /// R does not want this task any more. What there is of its answer is dropped.
    fn withdraw(&mut self, task: TaskId) {
        self.tasks[task as usize].withdrawn = true;
        let rank = self.tasks[task as usize].rank as usize;
        self.outstanding[rank].retain(|&other| other != task);
        if let Some(at) = self.ready.iter().position(|&(other, _)| other == task) {
            if let Some((_, len)) = self.ready.remove(at) {
                self.scheduler.taken(len);
            }
        }
        if let Some(&(at, _)) = self.arriving.get(&(rank as Rank)) {
            if at == task {
                self.arriving.remove(&(rank as Rank));
            }
        }
    }

    fn cancel_job(&mut self, job: JobId) {
        // Sometimes as R does it, sometimes with the message still being written.
        if self.rng.random() {
            self.abandon();
        }
        let matching: Vec<TaskId> = self
            .outstanding
            .iter()
            .flatten()
            .copied()
            .filter(|&task| self.tasks[task as usize].job == job)
            .collect();
        let unborn = self.writing.as_ref().filter(|writing| writing.first);
        let unborn = unborn.map(|writing| writing.task);
        for &task in &matching {
            if Some(task) != unborn {
                self.withdraw(task);
            }
        }
        self.scheduler.cancel_job(job);
        self.notes();
        for task in matching {
            let done = self.tasks[task as usize].done || Some(task) == unborn;
            assert!(done, "task {task} outlives its job");
        }
    }

    /// Takes what R waits for if it is there.
    fn take(&mut self) {
        let at = match self.waiting {
            None => return,
            Some(Want::Rank(rank)) => {
                let front = self.outstanding[rank as usize].front().copied();
                match front {
                    Some(front) => self.ready.iter().position(|&(task, _)| task == front),
                    None => {
                        self.want(None);
                        return;
                    }
                }
            }
            Some(_) => (!self.ready.is_empty()).then_some(0),
        };
        if let Some((task, len)) = at.and_then(|at| self.ready.remove(at)) {
            let rank = self.tasks[task as usize].rank as usize;
            self.outstanding[rank].retain(|&other| other != task);
            self.want(None);
            self.scheduler.taken(len);
            self.moved += 1;
        }
    }

    fn want(&mut self, want: Option<Want>) {
        self.waiting = want;
        self.scheduler.want(want.unwrap_or(Want::Nothing));
    }

    /// R comes to wait for an answer.
    fn wait(&mut self) {
        if self.waiting.is_some() || self.writing.is_some() {
            return;
        }
        let by_rank = match self.setup.order {
            Order::ByRank => true,
            Order::AsTheyCome => false,
            Order::Mixed => self.rng.random(),
        };
        let fronts = || self.outstanding.iter().enumerate();
        let mut busy = fronts().filter_map(|(rank, tasks)| Some((*tasks.front()?, rank as Rank)));
        let want = if by_rank {
            // The oldest, or any: R's code may take them in any order.
            let skip = self.rng.random_range(0..3) * self.rng.random_range(0..=self.setup.workers);
            let first = busy.next();
            busy.nth(skip).or(first).map(|(_, rank)| Want::Rank(rank))
        } else {
            busy.next().map(|_| Want::Any)
        };
        if want.is_some() {
            self.want(want);
            self.take();
        }
    }

    /// What the scheduler noted, and all that can be checked after any step.
    fn notes(&mut self) {
        for note in self.scheduler.take_notes() {
            self.moved += 1;
            match note {
                Note::Done {
                    rank,
                    task,
                    job,
                    outcome,
                } => self.done(rank, task, job, outcome),
                Note::Gone { rank, .. } => {
                    assert!(!std::mem::replace(&mut self.gone[rank as usize], true));
                    self.arriving.remove(&rank);
                }
                Note::Up { rank, .. } => assert!(!self.gone[rank as usize]),
                Note::Replaced { rank, .. } => {
                    assert!(!self.gone[rank as usize]);
                    self.seen.replaced += 1;
                }
                Note::Output { .. } | Note::StartFailed { .. } | Note::LeftBehind { .. } => {}
            }
        }
        self.released += self.scheduler.take_released();
        assert!(
            self.released <= self.submitted,
            "more released than submitted"
        );
        self.take();
        self.check_buffered();
        self.seen.starved += usize::from(self.scheduler.is_starving());
    }

    fn done(&mut self, rank: Rank, id: TaskId, job: JobId, outcome: Outcome) {
        let task = &mut self.tasks[id as usize];
        assert!(!task.done, "task {id} ended twice: {outcome:?}");
        task.done = true;
        assert_eq!((task.rank, task.job), (rank, job));
        let held = match outcome {
            Outcome::Answer(body) => {
                assert!(task.started && task.complete);
                assert!(!task.withdrawn, "an answer to withdrawn task {id}");
                assert!(!task.stuck);
                assert_eq!(self.arriving.remove(&rank), Some((id, body.len)));
                let len = task.answer_len;
                check_answer(id, len, &body);
                self.seen.answers += 1;
                body.len
            }
            Outcome::Lost(gone) => {
                assert!(!task.withdrawn);
                assert!(self.gone[rank as usize], "lost to a living worker");
                self.seen.lost += 1;
                assert!(!matches!(*gone, Gone::Worker(ref loss) if loss.tail != "killed"));
                0
            }
            Outcome::Cancelled => {
                assert!(task.withdrawn, "task {id} was cancelled by nobody");
                self.seen.cancelled += 1;
                0
            }
        };
        if !self.tasks[id as usize].withdrawn {
            self.ready.push_back((id, held));
        }
    }

    /// What the head holds: exactly what R has not taken, and within its bound.
    ///
    /// The bound, of the bytes beyond each result's first [`RESULT_WINDOW`] (which comes unasked):
    /// leave is given only while less than the limit is held or on its way, so at most `limit +
    /// GRANT`; beyond that, one result alone is completed for [`Want::Any`], and one for
    /// [`Want::Rank`], each of which may be asked for by up to a [`GRANT`] more than it has.
    fn check_buffered(&self) {
        let arriving = self.arriving.values().map(|&(_, len)| len);
        let held = arriving.chain(self.ready.iter().map(|&(_, len)| len));
        let (mut all, mut large) = (0, 0);
        for len in held {
            all += len;
            large += len.saturating_sub(RESULT_WINDOW);
        }
        assert_eq!(self.scheduler.buffered(), all);
        let ways = if self.setup.order == Order::Mixed {
            2
        } else {
            1
        };
        let most = self.setup.limit + GRANT + ways * (LARGEST + GRANT);
        if !self.setup.blocking {
            assert!(large <= most, "{large} bytes of large results, most {most}");
        }
    }

    // ---- head and agents ----

    fn flush(&mut self, at: usize, most: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        while host.out.len() < WRITE {
            let Some(frame) = self.scheduler.next_frame(at) else {
                break;
            };
            assert!(frame.body.len() <= MAX_BODY);
            host.out.push(&frame);
        }
        self.moved += host.down.pour(&mut host.out, most) as u64;
        self.notes();
    }

    fn head_read(&mut self, at: usize, most: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        self.moved += host.up.read(&mut host.head_received, most) as u64;
        while let Some(frame) = frame::decode(&mut self.hosts[at].head_received).expect("a frame") {
            if frame.header.kind == Kind::Data {
                self.arrives(at, &frame);
            }
            let kind = frame.header;
            if let Err(error) = self.scheduler.on_frame(at, frame) {
                panic!("the head refuses {kind:?}: {error}");
            }
            self.notes();
        }
    }

    fn arrives(&mut self, at: usize, frame: &Frame) {
        let header = &frame.header;
        let rank = self.hosts[at].ranks[header.worker as usize];
        let task = &self.tasks[header.task as usize];
        if self.gone[rank as usize] || task.withdrawn {
            return;
        }
        let entry = self.arriving.entry(rank).or_insert((header.task, 0));
        if header.flags & FIRST != 0 {
            *entry = (header.task, 0);
        }
        assert_eq!(entry.0, header.task, "answers of one worker are mixed");
        entry.1 += frame.body.len();
    }

    fn agent_read(&mut self, at: usize, most: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        self.moved += host.down.read(&mut host.received, most) as u64;
        while let Some(mut frame) = frame::decode(&mut host.received).expect("a frame") {
            if let Err(error) = host.on_head_frame(&mut frame, self.now) {
                panic!("agent {at} refuses {:?}: {error}", frame.header);
            }
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
        host.replacing[worker as usize] = replaces;
        let slow = self.setup.slow && self.rng.random_ratio(1, 5);
        let mut process = Process {
            outgoing: OutBuf::default(),
            down: Pipe::new(self.setup.channel),
            up: Pipe::new(self.setup.channel),
            held: BytesMut::new(),
            worker: Worker {
                received: BytesMut::new(),
                out: OutBuf::default(),
                incoming: None,
                running: None,
                last_started: 0,
                slow: if slow {
                    self.rng.random_range(0..300)
                } else {
                    0
                },
            },
            closing: false,
            closed: false,
            dead: false,
        };
        let tempdir = String::new();
        let ready = message::encode_for(worker, &WorkerReady { tempdir }).expect("a frame");
        process.worker.out.push(&ready);
        host.processes[worker as usize] = Some(process);
    }

    fn overdue(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.lost {
            return;
        }
        for worker in host.book.overdue(self.now) {
            if let Some(process) = &mut host.processes[worker as usize] {
                process.dead = true;
                self.moved += 1;
            }
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
        let passed = if process.dead {
            0
        } else {
            process.down.pour(&mut process.outgoing, most)
        };
        // One window, whatever was withdrawn, and what is not counted: cancel frames.
        let bound = SEND_WINDOW + HEADER_LEN * 64;
        assert!(
            process.outgoing.len() <= bound,
            "{} bytes wait for one worker",
            process.outgoing.len()
        );
        assert!(process.held.len() <= HEADER_LEN + MAX_BODY + READ);
        if process.outgoing.is_empty() && std::mem::take(&mut process.closing) {
            process.closed = true;
        }
        if let Some((task, bytes)) = host.book.passed(worker, passed) {
            host.to_head.push(&Frame::credit(worker, task, bytes));
        }
        self.moved += passed as u64;
        let Some(process) = &mut host.processes[worker as usize] else {
            return;
        };
        if !process.dead {
            let whole = self.setup.whole_chunks;
            let rank = host.ranks[worker as usize];
            self.moved += process.run(&mut self.rng, &mut self.tasks, rank, most, calm, whole);
        }
        self.moved += host.read_worker(worker, most);
        // An exit is noticed a while later.
        let Some(process) = &host.processes[worker as usize] else {
            return;
        };
        if process.dead && (calm || self.rng.random_ratio(1, 4)) {
            self.moved += 1;
            host.on_exit(worker);
        }
        assert!(
            host.to_head.len() <= BACKLOG + 2 * READ + 40 * host.ranks.len(),
            "{} bytes wait for the head",
            host.to_head.len()
        );
    }

    // ---- the history ----

    fn slice(&mut self) -> usize {
        // Of any order of magnitude.
        let magnitude = self.rng.random_range(2..20);
        self.rng.random_range(1..=1usize << magnitude)
    }

    fn chaos(&mut self) {
        for _ in 0..self.setup.actions {
            match self.rng.random_range(0..20) {
                0..4 if self.waiting.is_none() => self.send_something(),
                4 | 5 => self.wait(),
                6 => {
                    self.now += Duration::from_millis(self.rng.random_range(0..300));
                    for at in 0..self.hosts.len() {
                        self.overdue(at);
                    }
                }
                7 if self.setup.faults > 0 => {
                    if self.rng.random_ratio(1, self.setup.faults) || self.rng.random_ratio(1, 60) {
                        self.fault();
                    }
                    if self.waiting.is_some() && self.rng.random_ratio(1, 20) {
                        self.interrupt();
                    }
                }
                8 if self.setup.blocking => {
                    let unlimited = self.writing.is_some() && self.rng.random();
                    self.scheduler.set_unlimited(unlimited);
                    self.notes();
                }
                _ => {
                    let at = self.rng.random_range(0..self.hosts.len());
                    for _ in 0..4 {
                        self.pump(at);
                    }
                }
            }
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
            self.begin_task(rank as Rank, true);
            self.write_chunk();
        }
    }

    /// Ctrl-C while R waits: the job it waits for is given up.
    fn interrupt(&mut self) {
        let job = match self.waiting {
            Some(Want::Rank(rank)) => {
                let front = self.outstanding[rank as usize].front();
                front.map(|&task| self.tasks[task as usize].job)
            }
            _ => Some(self.job),
        };
        self.want(None);
        if let Some(job) = job {
            self.cancel_job(job);
        }
    }

    fn fault(&mut self) {
        let rank = self.rng.random_range(0..self.setup.workers);
        let (at, worker) = self.place[rank];
        match self.rng.random_range(0..20) {
            0..9 => {
                let job = self.rng.random_range(0..=self.job);
                self.cancel_job(job);
            }
            9..12 => {
                let job = self.job;
                self.cancel_job(job);
            }
            12..16 => {
                if let Some(process) = &mut self.hosts[at].processes[worker as usize] {
                    process.dead = true;
                }
            }
            16..18 => {
                self.scheduler.stop_worker(rank as Rank);
                self.notes();
                assert!(self.gone[rank]);
            }
            18 => {
                // Its end of the channel closes, and the process lives on.
                let now = self.now;
                self.hosts[at].book.hung_up(worker, now);
            }
            _ => {
                if self.rng.random_ratio(1, 4) {
                    self.hosts[at].lost = true;
                    self.scheduler.agent_lost(at, "lost");
                    self.notes();
                    let ranks = &self.hosts[at].ranks;
                    assert!(ranks.iter().all(|&rank| self.gone[rank as usize]));
                }
            }
        }
    }

    fn pump(&mut self, at: usize) {
        let n = self.slice();
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
                    let n = self.slice();
                    self.step_worker(at, worker, n, false);
                }
            }
        }
    }

    /// One look at everything, as fast as the streams allow.
    fn sweep(&mut self) {
        const MOST: usize = usize::MAX;
        for at in 0..self.hosts.len() {
            self.flush(at, MOST);
            self.agent_read(at, MOST);
            for worker in 0..self.hosts[at].ranks.len() as u32 {
                self.make(at);
                self.step_worker(at, worker, MOST, true);
            }
            self.agent_write(at, MOST);
            self.head_read(at, MOST);
        }
    }

    /// No more faults: everything must end by itself.
    fn drain(&mut self) {
        while self.writing.is_some() {
            self.write_chunk();
        }
        self.scheduler.set_unlimited(false);
        // R would wait for these for ever, and so would their users.
        let stuck = |task: &&Task| task.stuck && !task.done;
        let jobs: Vec<JobId> = self
            .tasks
            .iter()
            .filter(stuck)
            .map(|task| task.job)
            .collect();
        for job in jobs {
            self.cancel_job(job);
        }
        let mut before = self.moved;
        let mut idle = 0;
        let mut sweeps = 0;
        loop {
            self.wait();
            self.sweep();
            sweeps += 1;
            assert!(sweeps < 2_000_000, "no end in sight");
            if self.moved != before {
                before = self.moved;
                idle = 0;
                continue;
            }
            idle += 1;
            // Only time can help now: workers that were to end and do not are killed.
            let deadlines = self.hosts.iter().filter(|host| !host.lost);
            let next = deadlines.filter_map(|host| host.book.next_deadline()).min();
            if let Some(next) = next {
                self.now = self.now.max(next);
                for at in 0..self.hosts.len() {
                    self.overdue(at);
                }
            } else if self.outstanding.iter().all(VecDeque::is_empty) {
                break;
            }
            assert!(idle < 10, "deadlock: {}", self.describe());
        }
    }

    fn describe(&self) -> String {
        let open = self.tasks.iter().enumerate().filter(|(_, task)| !task.done);
        let open: Vec<_> = open.map(|(id, task)| (id, task.rank)).take(10).collect();
        format!(
            "R waits for {:?}; open (task, rank): {open:?}; held {}; arriving {:?}; starving {}",
            self.waiting,
            self.scheduler.buffered(),
            self.arriving,
            self.scheduler.is_starving(),
        )
    }

    /// After all has ended.
    fn check_rest(&mut self) {
        assert!(self.tasks.iter().all(|task| task.done));
        assert!(self.ready.is_empty() && self.arriving.is_empty());
        assert_eq!(self.scheduler.buffered(), 0);
        assert!(!self.scheduler.is_starving());
        assert_eq!(self.released, self.submitted);
        for at in 0..self.hosts.len() {
            assert_eq!(self.scheduler.next_frame(at), None);
            let host = &self.hosts[at];
            if host.lost {
                continue;
            }
            for (index, &rank) in host.ranks.iter().enumerate() {
                assert_eq!(host.book.task(index as u32), None);
                let process = host.processes[index].is_some();
                assert_eq!(process, !self.gone[rank as usize], "worker {rank}");
            }
        }
        assert_eq!(self.scheduler.any_left(), self.gone.contains(&false));
    }

    fn run(&mut self) {
        self.chaos();
        self.drain();
        self.check_rest();
        // Whoever is left must be as good as new.
        let first = self.tasks.len();
        for rank in 0..self.setup.workers {
            if !self.gone[rank] {
                self.begin_task(rank as Rank, false);
                while self.writing.is_some() {
                    self.write_chunk();
                }
            }
        }
        self.drain();
        self.check_rest();
        assert!(
            self.tasks[first..]
                .iter()
                .all(|task| task.started && !task.withdrawn)
        );
        assert!(
            self.tasks[first..]
                .iter()
                .all(|task| !self.gone[task.rank as usize])
        );
    }
}

fn check_answer(task: TaskId, len: usize, body: &Body) {
    assert_eq!(body.len, len, "task {task}");
    let mut at = 0;
    for chunk in &body.chunks {
        assert!(
            *chunk == part(task, true, at, chunk.len()),
            "task {task} at {at}"
        );
        at += chunk.len();
    }
    assert_eq!(at, len);
}

/// The agent, as in `agent/mod.rs`, without its system calls.
impl Host {
    fn on_head_frame(&mut self, frame: &mut Frame, now: Now) -> Result<(), String> {
        if frame.header.kind == Kind::Data {
            let kept = self.kept.receive(frame);
            kept.map_err(|error| error.to_string())?;
        }
        let header = &frame.header;
        match header.kind {
            Kind::Data => {
                let route = self
                    .book
                    .to_worker(header)
                    .map_err(|error| error.to_string())?;
                if route == Route::Forward {
                    self.send_worker(header.worker, frame);
                }
            }
            Kind::Credit => {
                let worker = header.worker;
                let credit = self.book.credit(worker, header.task, header.len);
                credit.map_err(|error| error.to_string())?;
            }
            Kind::Control => match message::decode(&frame.body).map_err(|e| e.to_string())? {
                ToAgent::Cancel { worker, task } => {
                    let cancel = self.book.cancel(worker, task, now);
                    if cancel.map_err(|error| error.to_string())? {
                        self.interrupt(worker, task);
                    }
                }
                ToAgent::Alive => {}
                ToAgent::StopWorker { worker } => {
                    if let Some(busy) = self.book.stop(worker, now) {
                        if let Some(task) = self.book.task(worker).filter(|_| busy) {
                            self.interrupt(worker, task);
                        }
                        if let Some(process) = &mut self.processes[worker as usize] {
                            process.closing = true;
                        }
                    }
                }
                other => return Err(format!("{other:?}")),
            },
            Kind::Output | Kind::Cancel => return Err("not for an agent".into()),
        }
        Ok(())
    }

    fn send_worker(&mut self, worker: u32, frame: &Frame) {
        if let Some(process) = &mut self.processes[worker as usize] {
            process.outgoing.push(frame);
        }
    }

    fn interrupt(&mut self, worker: u32, task: u64) {
        let frame = Frame::new(Kind::Cancel, 0, worker, task, Bytes::new());
        self.send_worker(worker, &frame);
    }

    fn tell(&mut self, message: &ToHead) {
        self.to_head
            .push(&message::encode(message).expect("a frame"));
    }

    fn read_worker(&mut self, worker: u32, most: usize) -> u64 {
        if self.to_head.len() >= BACKLOG {
            return 0;
        }
        let mut moved = self.pass_on(worker);
        if let Some(process) = &mut self.processes[worker as usize] {
            if process.held.len() < HEADER_LEN + MAX_BODY {
                moved += process.up.read(&mut process.held, most.min(READ)) as u64;
                moved += self.pass_on(worker);
            }
        }
        moved
    }

    /// Passes on the whole frames that are held, up to one that must wait.
    fn pass_on(&mut self, worker: u32) -> u64 {
        let mut moved = 0;
        while let Some(process) = &mut self.processes[worker as usize] {
            let held = &mut process.held;
            let Some(mut header) = Header::decode(held).expect("a header") else {
                break;
            };
            header.worker = worker;
            if held.len() < HEADER_LEN + header.body_len() {
                break;
            }
            let route = match header.kind {
                Kind::Data => self.book.from_worker(&header).expect("an answer"),
                _ => Route::Drop,
            };
            if route == Route::Hold {
                break;
            }
            held.advance(HEADER_LEN);
            let body = held.split_to(header.body_len()).freeze();
            moved += 1;
            match route {
                Route::Forward => self.to_head.push(&Frame { header, body }),
                Route::Ended => {
                    let (flags, task) = (LAST | ABORT, header.task);
                    let ended = Frame::new(Kind::Data, flags, worker, task, Bytes::new());
                    self.to_head.push(&ended);
                }
                Route::Drop | Route::Hold => {}
            }
            if header.kind == Kind::Control && self.book.ready(worker) {
                let pid = worker + 1000;
                self.tell(&if self.replacing[worker as usize] {
                    ToHead::WorkerReplaced { worker, pid }
                } else {
                    ToHead::WorkerUp { worker, pid }
                });
            }
        }
        moved
    }

    fn on_exit(&mut self, worker: u32) {
        // An answer that was whole before the end still counts, if there is room for it.
        while self.read_worker(worker, READ) > 0 {}
        self.processes[worker as usize] = None;
        match self.book.exited(worker) {
            Ending::Stopped => self.tell(&ToHead::WorkerStopped { worker }),
            Ending::Replace => self.to_make.push_back((worker, true)),
            Ending::Lost => self.tell(&ToHead::WorkerLost {
                worker,
                loss: Loss {
                    pid: worker + 1000,
                    exit: Exit::Signal(9),
                    tail: "killed".into(),
                    memory_available: 0,
                    oom: false,
                },
            }),
        }
    }
}

impl Process {
    /// One step of the simulated worker. Returns whether anything moved.
    fn run(
        &mut self,
        rng: &mut StdRng,
        tasks: &mut [Task],
        rank: Rank,
        most: usize,
        calm: bool,
        whole: bool,
    ) -> u64 {
        let worker = &mut self.worker;
        let most = if worker.slow > 0 && !calm {
            worker.slow -= 1;
            // A few bytes, or none at all.
            most.min(rng.random_range(0..40))
        } else {
            most
        };
        let mut moved = self.down.read(&mut worker.received, most) as u64;
        while let Some(frame) = frame::decode(&mut worker.received).expect("a frame") {
            worker.on_frame(frame, rng, tasks, rank);
        }
        moved += worker.answer(rng, calm, whole);
        moved += self.up.pour(&mut worker.out, most) as u64;
        let idle = worker.running.is_none() && worker.out.is_empty() && self.down.bytes.is_empty();
        if self.closed && idle {
            self.dead = true;
            moved += 1;
        }
        moved
    }
}

impl Worker {
    fn on_frame(&mut self, frame: Frame, rng: &mut StdRng, tasks: &mut [Task], rank: Rank) {
        let Header { flags, task, .. } = frame.header;
        match frame.header.kind {
            Kind::Data if flags & ABORT != 0 => {
                assert!(self.running.is_none());
                self.incoming = None;
            }
            Kind::Data => {
                assert!(self.running.is_none(), "two tasks at once");
                if flags & FIRST != 0 {
                    assert!(self.incoming.is_none(), "a message within a message");
                    self.incoming = Some((task, 0));
                }
                let Some((incoming, at)) = &mut self.incoming else {
                    panic!("a chunk of no task");
                };
                assert_eq!(*incoming, task);
                let expected = part(task, false, *at, frame.body.len());
                assert!(frame.body == expected, "task {task} arrives changed");
                *at += frame.body.len();
                if flags & LAST != 0 {
                    let state = &mut tasks[task as usize];
                    assert_eq!(*at, state.len);
                    assert_eq!(state.rank, rank);
                    assert!(state.complete);
                    assert!(
                        !std::mem::replace(&mut state.started, true),
                        "started twice"
                    );
                    assert!(task >= self.last_started, "tasks start out of order");
                    self.last_started = task;
                    self.incoming = None;
                    let len = state.answer_len;
                    let restart = len > 0 && rng.random_ratio(1, 10);
                    self.running = Some(Running {
                        task,
                        sent: 0,
                        len,
                        begun: false,
                        pause: rng.random_range(0..4),
                        restart_at: restart.then(|| rng.random_range(0..len)),
                        stuck: state.stuck,
                        manners: state.manners,
                    });
                }
            }
            Kind::Cancel => match &mut self.running {
                Some(running) if running.task == task => match running.manners {
                    Manners::Stop => {
                        running.len = running.sent;
                        running.stuck = false;
                    }
                    Manners::Restart => {
                        running.sent = 0;
                        running.begun = false;
                        running.stuck = false;
                    }
                    Manners::Ignore => {}
                },
                // It has ended.
                _ => {}
            },
            kind => panic!("a worker got {kind:?}"),
        }
    }

    fn answer(&mut self, rng: &mut StdRng, calm: bool, whole: bool) -> u64 {
        let Some(running) = &mut self.running else {
            return 0;
        };
        if running.stuck || self.out.len() > MAX_BODY {
            return 0;
        }
        if running.pause > 0 && !calm {
            running.pause -= 1;
            return 1;
        }
        if running.restart_at.is_some_and(|at| running.sent >= at) {
            running.restart_at = None;
            running.sent = 0;
            running.begun = false;
        }
        let left = running.len - running.sent;
        let n = if whole {
            left.min(MAX_BODY)
        } else {
            rng.random_range(1..=MAX_BODY).min(left)
        };
        let first = !std::mem::replace(&mut running.begun, true);
        let last = n == left;
        let flags = if first { FIRST } else { 0 } | if last { LAST } else { 0 };
        let body = part(running.task, true, running.sent, n);
        running.sent += n;
        running.pause = rng.random_range(0..3);
        // The agent knows whose channel this is.
        let frame = Frame::new(Kind::Data, flags, 0, running.task, body);
        self.out.push(&frame);
        if last {
            self.running = None;
        }
        1
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

#[test]
fn every_task_ends_exactly_once_whatever_happens() {
    let long = std::env::var("RUSTCLUSTER_LONG_TESTS").is_ok_and(|long| long == "1");
    let seeds = match chosen() {
        Some(seed) => seed..seed + 1,
        None if long => 0..10_000,
        None => 0..300,
    };
    let mut seen = Seen::default();
    for seed in seeds {
        let _named = Named(seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let setup = Setup::random(&mut rng);
        let mut sim = Sim::new(setup, rng);
        sim.run();
        seen.add(&sim.seen);
    }
    // A simulation in which nothing happens would find nothing.
    let counts = [
        seen.answers,
        seen.lost,
        seen.cancelled,
        seen.replaced,
        seen.starved,
    ];
    let few = counts.iter().any(|&count| count < 100);
    assert!(!few || chosen().is_some(), "{seen:?}");
}

#[test]
fn a_thousand_workers_on_several_hosts() {
    let seed = chosen().unwrap_or(1_000);
    let _named = Named(seed);
    let rng = StdRng::seed_from_u64(seed);
    let setup = Setup {
        workers: 1_000,
        hosts: 7,
        limit: 2_000_000,
        stream: 200_000,
        channel: 50_000,
        sizes: 1,
        whole_chunks: false,
        order: Order::Mixed,
        faults: 20,
        keep: Some(1_000_000),
        blocking: false,
        slow: true,
        actions: 30_000,
        largest: 400_000,
    };
    Sim::new(setup, rng).run();
}
