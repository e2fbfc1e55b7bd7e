//! What the parts of the simulation have in common: bytes, streams, and what is known of each task
//! and each worker by those who look on.

use bytes::{Buf, Bytes, BytesMut};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rustcluster_core::head::retry::Attempts;
use rustcluster_core::protocol::ids::{JobId, Rank, TaskId};
use rustcluster_core::protocol::send_queue::OutBuf;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::OnceLock;
use std::time::Duration;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

/// The largest message or answer of a simulated task: several windows and grants.
pub const LARGEST: usize = 3_300_000;

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
pub fn origin(task: TaskId, answer: bool) -> usize {
    let number = if answer { task } else { group(task) * 4 };
    (number as usize % 1_000_003 * 2 + usize::from(answer)) * 7_919 % 1_000_003
}

/// The blob with which the messages of these four tasks in a row may begin.
pub fn group(task: TaskId) -> TaskId {
    task / 4
}

pub fn part(task: TaskId, answer: bool, from: usize, len: usize) -> Bytes {
    let start = origin(task, answer) + from;
    pattern().slice(start..start + len)
}

/// A byte stream that holds a limited amount.
pub struct Pipe {
    pub bytes: BytesMut,
    capacity: usize,
}

impl Pipe {
    pub fn new(capacity: usize) -> Pipe {
        let bytes = BytesMut::new();
        Pipe { bytes, capacity }
    }

    /// Takes at most `most` bytes off `out`.
    pub fn pour(&mut self, out: &mut OutBuf, most: usize) -> usize {
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

    pub fn read(&mut self, into: &mut BytesMut, most: usize) -> usize {
        let n = most.min(self.bytes.len());
        into.extend_from_slice(&self.bytes[..n]);
        self.bytes.advance(n);
        n
    }
}

/// What a worker does when it is interrupted.
#[derive(Clone, Copy, PartialEq)]
pub enum Manners {
    /// Ends its answer where it is.
    Stop,
    /// Begins its answer anew: R's condition.
    Restart,
    /// Answers as if nothing had happened.
    Ignore,
}

/// What a task does to the random number generator.
#[derive(Clone, Copy, PartialEq)]
pub enum Draws {
    Nothing,
    /// Numbers of a generator whose state the head may know.
    Short,
    /// Numbers of one whose state it may not.
    Long,
    /// It removes the state.
    Remove,
}

impl Draws {
    pub fn is_nothing(self) -> bool {
        self == Draws::Nothing
    }

    pub fn from_number(number: u64) -> Draws {
        match number % 5 {
            0 => Draws::Long,
            1 | 2 => Draws::Short,
            3 => Draws::Remove,
            _ => Draws::Nothing,
        }
    }

    /// The state after it. Empty: none. `fresh`: what a process without one comes up with.
    pub fn after(self, seed: &Bytes, task: TaskId, fresh: u64) -> Bytes {
        let len = match self {
            Draws::Nothing => return seed.clone(),
            Draws::Remove => return Bytes::new(),
            Draws::Short => 8,
            Draws::Long => 96,
        };
        let before = if seed.is_empty() {
            fresh
        } else {
            xxh3_64(seed)
        };
        let after = xxh3_64_with_seed(&before.to_le_bytes(), task).to_le_bytes();
        after.iter().copied().cycle().take(len).collect()
    }
}

/// What a message does to a worker. It is all in the bytes of the message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effect {
    pub task: TaskId,
    pub hash: u64,
}

impl Effect {
    pub fn of(task: TaskId, hasher: &Xxh3) -> Effect {
        let hash = hasher.digest();
        Effect { task, hash }
    }

    /// Of a whole message.
    pub fn of_task(task: TaskId, len: usize) -> Effect {
        let mut hasher = Xxh3::new();
        hasher.update(&part(task, false, 0, len));
        Effect::of(task, &hasher)
    }

    /// What it sets; 0: it looks at all that is set.
    pub fn name(&self) -> u64 {
        self.hash % 4
    }

    pub fn draws(&self) -> Draws {
        Draws::from_number(self.hash >> 8)
    }
}

/// The state of a worker on which all this lasted, in this order.
pub fn digest(effects: &[Effect]) -> (u64, BTreeMap<u64, u64>) {
    let mut set = BTreeMap::new();
    let mut seen = 0;
    for effect in effects {
        match effect.name() {
            0 => {
                seen = xxh3_64_with_seed(&effect.hash.to_le_bytes(), seen);
                for (name, hash) in &set {
                    seen = xxh3_64_with_seed(&u64::to_le_bytes(name ^ hash), seen);
                }
            }
            name => {
                set.insert(name, effect.hash);
            }
        }
    }
    (seen, set)
}

/// How a task ended for R.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Answer,
    TimedOut,
    /// It was lost too often.
    GivenUp,
    /// It was lost and nobody could take it.
    Error,
    /// R did not want it any more.
    Cancelled,
    /// R took it back before it had started.
    Revoked,
    /// It was lost, and the job engine gives its elements out again.
    Settled,
}

/// A task as those who look on know it.
pub struct Task {
    /// The worker that R gave it to, and the one that has it.
    pub owner: Rank,
    pub place: Rank,
    pub job: JobId,
    pub len: usize,
    pub answer_len: usize,
    /// Never answers.
    pub stuck: bool,
    /// Kills whoever starts it.
    pub poison: bool,
    pub manners: Manners,
    pub draws: Draws,
    /// What it does lasts.
    pub effect: Option<Effect>,
    /// It may be sent while another runs.
    pub prefetch: bool,
    /// How long it may take by its own limit, and in all.
    pub own_limit: Option<Duration>,
    pub limit: Option<Duration>,
    /// R has asked to have it back, and got it.
    pub asked_back: bool,
    pub revoked: bool,
    /// All of it was submitted.
    pub complete: bool,
    /// The scheduler has it and has not said how it ended.
    pub open: bool,
    pub starts: usize,
    /// This try has started.
    pub started: bool,
    /// How often the scheduler said that it was lost, and how often R was told.
    pub failures: usize,
    pub told: usize,
    pub attempts: Attempts<()>,
    /// The random number generator's state at its first start, and how many of them the head had
    /// been told for its owner by then.
    pub began_with: Option<(Bytes, usize)>,
    /// How this try has left the random number generator, if it has used it.
    pub left: Option<Bytes>,
    /// How many the head had been told when it was first submitted.
    pub since: usize,
    pub end: Option<End>,
    /// Its message begins as that of another does, for so many bytes.
    pub begins: (TaskId, usize),
    /// It starts after those with lower numbers that R gave to the same worker; `None`: at any time.
    pub turn: Option<TaskId>,
    /// The job's elements that it stands for, if it is one of the job engine's.
    pub elements: Vec<usize>,
    /// How long its worker may be at it before what it has not begun comes back.
    pub most: Duration,
}

impl Task {
    /// One that does nothing.
    pub fn new(id: TaskId) -> Task {
        Task {
            owner: 0,
            place: 0,
            job: 0,
            len: 0,
            answer_len: 0,
            stuck: false,
            poison: false,
            manners: Manners::Stop,
            draws: Draws::Nothing,
            effect: None,
            prefetch: false,
            own_limit: None,
            limit: None,
            asked_back: false,
            revoked: false,
            complete: false,
            open: false,
            starts: 0,
            started: false,
            failures: 0,
            told: 0,
            attempts: Attempts::default(),
            began_with: None,
            left: None,
            since: 0,
            end: None,
            begins: (id, 0),
            turn: Some(id),
            elements: Vec::new(),
            most: Duration::ZERO,
        }
    }

    pub fn is_reassigned(&self) -> bool {
        self.owner != self.place
    }
}

/// A worker's place: what a worker there would be if none had ever been lost.
pub struct Place {
    /// What lasted.
    pub effects: Vec<Effect>,
    pub seed: Bytes,
    /// What the head has been told of its random number generator.
    pub reported_seeds: Vec<Bytes>,
    /// Tasks that R gave to it start in order.
    pub last_started: TaskId,
    /// R knows that there will be no more workers.
    pub termination: bool,
    /// Its agent is to make one again after a pause.
    pub waits: bool,
    /// Some worker was ready, and how many in a row have ended since before they could do tasks.
    pub came_up: bool,
    pub setbacks: u32,
    /// Tasks of others have been given to it.
    pub is_substitute: bool,
    /// Its state is held.
    pub kept: bool,
    /// The task that the head has sent there and that has not ended for the head, and the one that it
    /// has sent besides.
    pub current: Option<TaskId>,
    pub next: Option<TaskId>,
    /// The same when the last worker was lost.
    pub next_when_lost: Option<TaskId>,
    /// Number of losses whose acknowledgements the head has not sent yet. The agent drops all tasks that
    /// it receives before the acknowledgement.
    pub unacknowledged: usize,
}

impl Place {
    pub fn new() -> Place {
        Place {
            effects: Vec::new(),
            seed: Bytes::new(),
            reported_seeds: vec![Bytes::new()],
            last_started: 0,
            termination: false,
            waits: false,
            came_up: false,
            setbacks: 0,
            is_substitute: false,
            kept: true,
            current: None,
            next: None,
            next_when_lost: None,
            unacknowledged: 0,
        }
    }
}

/// All that those who look on know.
pub struct Facts {
    pub tasks: Vec<Task>,
    pub places: Vec<Place>,
    pub retries: usize,
    pub seen: Seen,
}

/// What has happened.
#[derive(Debug, Default)]
pub struct Seen {
    pub answers: usize,
    pub cancelled: usize,
    pub timed_out: usize,
    /// Tasks that were lost, and of those ones that were submitted again, to the same place and to
    /// another.
    pub lost: usize,
    pub again: usize,
    pub moved: usize,
    /// And those that ended so.
    pub given_up: usize,
    pub errors: usize,
    /// Workers: lost and replaced, killed for not heeding an interrupt, brought to the state of one
    /// before.
    pub replaced: usize,
    pub killed: usize,
    pub restored: usize,
    pub not_logged: usize,
    /// Answered tasks that began with another worker's random numbers.
    pub reassigned: usize,
    pub left_out: usize,
    /// Answers that came in shared memory.
    pub in_memory: usize,
    /// Times that a result waited on its host.
    pub blocked: usize,
    /// Tasks that were prefetched; of those, ones that were sent again since their worker was lost,
    /// and ones that were dropped before they started.
    pub prefetch: usize,
    pub put_back: usize,
    pub dropped: usize,
    /// Tasks that R got back, and ones that it asked for in vain.
    pub revoked: usize,
    pub in_vain: usize,
    /// Messages that began with a blob, and of those ones that restored a worker; blobs that
    /// were not completed.
    pub shared: usize,
    pub shared_again: usize,
    pub aborted: usize,
    /// Jobs of the job engine, those that were done, and elements that got a result.
    pub jobs: usize,
    pub done: usize,
    pub elements: usize,
    /// Messages with several elements, ones that were prefetched, and ones of which a part came back.
    pub together: usize,
    pub prefetched: usize,
    pub come_back: usize,
    /// Messages that were lost, took too long or could not be read.
    pub settled: usize,
    /// Blobs that were sent once more.
    pub blobs_again: usize,
}

impl Seen {
    pub fn counts(&self) -> [usize; 32] {
        [
            self.answers,
            self.cancelled,
            self.timed_out,
            self.lost,
            self.again,
            self.moved,
            self.given_up,
            self.errors,
            self.replaced,
            self.killed,
            self.restored,
            self.not_logged,
            self.reassigned,
            self.left_out,
            self.in_memory,
            self.blocked,
            self.prefetch,
            self.put_back,
            self.dropped,
            self.revoked,
            self.in_vain,
            self.shared,
            self.shared_again,
            self.aborted,
            self.jobs,
            self.done,
            self.elements,
            self.together,
            self.prefetched,
            self.come_back,
            self.settled,
            self.blobs_again,
        ]
    }

    pub fn add(&mut self, other: &Seen) {
        let theirs = other.counts();
        let ours = [
            &mut self.answers,
            &mut self.cancelled,
            &mut self.timed_out,
            &mut self.lost,
            &mut self.again,
            &mut self.moved,
            &mut self.given_up,
            &mut self.errors,
            &mut self.replaced,
            &mut self.killed,
            &mut self.restored,
            &mut self.not_logged,
            &mut self.reassigned,
            &mut self.left_out,
            &mut self.in_memory,
            &mut self.blocked,
            &mut self.prefetch,
            &mut self.put_back,
            &mut self.dropped,
            &mut self.revoked,
            &mut self.in_vain,
            &mut self.shared,
            &mut self.shared_again,
            &mut self.aborted,
            &mut self.jobs,
            &mut self.done,
            &mut self.elements,
            &mut self.together,
            &mut self.prefetched,
            &mut self.come_back,
            &mut self.settled,
            &mut self.blobs_again,
        ];
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            *ours += theirs;
        }
    }
}

/// Any order of magnitude.
pub fn slice(rng: &mut StdRng) -> usize {
    let magnitude = rng.random_range(2..20);
    rng.random_range(1..=1usize << magnitude)
}
