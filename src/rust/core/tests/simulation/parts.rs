//! What the modules of the simulation share: bytes, streams, and the facts about each task and each
//! worker, with which the checks compare what the real code does.

use bytes::{Buf, Bytes, BytesMut};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rustcluster_core::head::retry::Attempts;
use rustcluster_core::protocol::ids::{JobId, KEEP, Rank, TaskId};
use rustcluster_core::protocol::send_queue::OutBuf;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::{Index, IndexMut};
use std::sync::OnceLock;
use std::time::Duration;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

/// Maximum size of a message or an answer of a simulated task: several windows and grants.
pub const LARGEST: usize = 3_300_000;

/// The bytes of which all messages and answers are slices, so that they are cheap to make and to
/// compare.
fn pattern() -> &'static Bytes {
    static PATTERN: OnceLock<Bytes> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut bytes = vec![0; LARGEST + 1_000_003];
        StdRng::seed_from_u64(1).fill_bytes(&mut bytes);
        bytes.into()
    })
}

/// The offset in the pattern at which a task's message (or answer) begins. The messages of four
/// consecutive tasks begin at the same offset: the shorter ones are prefixes of the longer ones.
pub fn origin(task: TaskId, answer: bool) -> usize {
    let number = if answer { task } else { group(task) * 4 };
    (number as usize % 1_000_003 * 2 + usize::from(answer)) * 7_919 % 1_000_003
}

/// The number of the group of four consecutive tasks whose messages may begin with the same blob.
pub fn group(task: TaskId) -> TaskId {
    task / 4
}

/// Returns `len` bytes of a task's message (or answer), from the offset `from`.
pub fn part(task: TaskId, answer: bool, from: usize, len: usize) -> Bytes {
    let start = origin(task, answer) + from;
    pattern().slice(start..start + len)
}

/// A byte stream with a limited capacity.
pub struct Pipe {
    pub bytes: BytesMut,
    capacity: usize,
}

impl Pipe {
    pub fn new(capacity: usize) -> Pipe {
        let bytes = BytesMut::new();
        Pipe { bytes, capacity }
    }

    /// Moves at most `max` bytes from `out` into the stream. Returns their number.
    pub fn pour(&mut self, out: &mut OutBuf, max: usize) -> usize {
        if out.is_empty() {
            return 0;
        }
        let mut room = max.min(self.capacity - self.bytes.len());
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

    /// Moves at most `max` bytes from the stream to `into`. Returns their number.
    pub fn read(&mut self, into: &mut BytesMut, max: usize) -> usize {
        let n = max.min(self.bytes.len());
        into.extend_from_slice(&self.bytes[..n]);
        self.bytes.advance(n);
        n
    }
}

/// What a task does when it is interrupted.
#[derive(Clone, Copy, PartialEq)]
pub enum OnInterrupt {
    /// It ends its answer at once.
    Stop,
    /// It discards its answer and begins another: an R condition.
    Restart,
    /// It ignores the interrupt.
    Ignore,
}

/// How a task uses the random number generator (RNG).
#[derive(Clone, Copy, PartialEq)]
pub enum RngUse {
    Nothing,
    /// It uses a generator whose state is short enough to be reported to the head.
    Short,
    /// It uses a generator whose state is too long to be reported.
    Long,
    /// It removes the RNG state.
    Remove,
}

impl RngUse {
    pub fn is_nothing(self) -> bool {
        self == RngUse::Nothing
    }

    pub fn from_number(number: u64) -> RngUse {
        match number % 5 {
            0 => RngUse::Long,
            1 | 2 => RngUse::Short,
            3 => RngUse::Remove,
            _ => RngUse::Nothing,
        }
    }

    /// The RNG state after the task; empty: no state. `fresh`: the seed of a process that has no state.
    pub fn after(self, seed: &Bytes, task: TaskId, fresh: u64) -> Bytes {
        let len = match self {
            RngUse::Nothing => return seed.clone(),
            RngUse::Remove => return Bytes::new(),
            RngUse::Short => 8,
            RngUse::Long => 96,
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

/// The effect of a set-up call on a worker. The bytes of its message determine it.
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

    /// The effect of a whole message.
    pub fn of_task(task: TaskId, len: usize) -> Effect {
        let mut hasher = Xxh3::new();
        hasher.update(&part(task, false, 0, len));
        Effect::of(task, &hasher)
    }

    /// The variable that the call sets; 0: the call reads all variables.
    pub fn name(&self) -> u64 {
        self.hash % 4
    }

    pub fn rng_use(&self) -> RngUse {
        RngUse::from_number(self.hash >> 8)
    }
}

/// The state of a worker on which set-up calls had these effects, in this order.
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
    /// Its worker failed on all attempts.
    GivenUp,
    /// Its worker failed, and no other worker could run it.
    Error,
    /// R cancelled it.
    Cancelled,
    /// R revoked it before it started.
    Revoked,
    /// Its worker failed. The job engine has forgotten it and sends its elements in other messages.
    Forgotten,
    /// R removed the worker to which it had given it.
    Removed,
    /// A set-up call of a worker that had not joined: it was logged.
    Logged,
    /// The head has vanished.
    Vanished,
}

/// The numbers of the tasks of a head begin with this multiple of its generation.
const GENERATION_BITS: u32 = 36;

/// The head that has numbered a task.
pub fn generation(id: TaskId) -> usize {
    ((id & !KEEP) >> GENERATION_BITS) as usize
}

/// The facts about the tasks of all heads, by their numbers. All but the index is about the tasks of the present head.
pub struct Tasks(Vec<Vec<Task>>);

impl Tasks {
    /// The tasks of the first head: none.
    pub fn new() -> Tasks {
        let mut tasks = Tasks(Vec::new());
        tasks.next_head();
        tasks
    }

    /// Another head begins to number tasks.
    pub fn next_head(&mut self) {
        // The numbers begin with 1.
        self.0.push(vec![Task {
            end: Some(End::Cancelled),
            ..Task::new(0)
        }]);
    }

    /// The number of heads before the present one.
    pub fn generation(&self) -> usize {
        self.0.len() - 1
    }

    fn present(&self) -> &Vec<Task> {
        &self.0[self.0.len() - 1]
    }

    /// The number of the next task.
    pub fn next(&self) -> TaskId {
        ((self.generation() as TaskId) << GENERATION_BITS) + self.present().len() as TaskId
    }

    pub fn len(&self) -> usize {
        self.present().len()
    }

    pub fn push(&mut self, task: Task) {
        let last = self.generation();
        self.0[last].push(task);
    }

    pub fn get(&self, id: TaskId) -> Option<&Task> {
        self.0
            .get(generation(id))?
            .get((id & !KEEP) as usize & ((1 << GENERATION_BITS) - 1))
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Task> {
        self.present().iter()
    }

    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, Task> {
        let last = self.generation();
        self.0[last].iter_mut()
    }
}

impl Index<TaskId> for Tasks {
    type Output = Task;

    fn index(&self, id: TaskId) -> &Task {
        self.get(id).expect("a task")
    }
}

impl IndexMut<TaskId> for Tasks {
    fn index_mut(&mut self, id: TaskId) -> &mut Task {
        let at = (id & !KEEP) as usize & ((1 << GENERATION_BITS) - 1);
        &mut self.0[generation(id)][at]
    }
}

/// The facts about a task.
pub struct Task {
    /// The worker to which R gave it, and the worker to which it is assigned.
    pub owner: Rank,
    pub assigned: Rank,
    pub job: JobId,
    pub len: usize,
    pub answer_len: usize,
    /// It never answers.
    pub stuck: bool,
    /// It kills each worker that starts it.
    pub poison: bool,
    pub on_interrupt: OnInterrupt,
    pub rng_use: RngUse,
    /// Its effect, if it is a set-up call.
    pub effect: Option<Effect>,
    /// It may be prefetched.
    pub prefetch: bool,
    /// Any worker of its job may run it.
    pub movable: bool,
    /// Its own time limit, and the lower one of this and the limit of the cluster.
    pub own_limit: Option<Duration>,
    pub limit: Option<Duration>,
    /// R has requested to revoke it, and it has been revoked.
    pub revoke_requested: bool,
    pub revoked: bool,
    /// Its whole message was submitted.
    pub complete: bool,
    /// The scheduler has it and has not reported its end.
    pub scheduled: bool,
    /// How often it has started.
    pub starts: usize,
    /// The current attempt has started.
    pub started: bool,
    /// How many worker failures of it the scheduler has reported to the hub, and the hub to R.
    pub failures: usize,
    pub reported_failures: usize,
    pub attempts: Attempts<()>,
    /// How often it was lost because the job of its worker ended.
    pub job_ends: usize,
    /// The RNG state at its first start, and the number of RNG states of its owner that had been
    /// reported to the head by then.
    pub first_seed: Option<(Bytes, usize)>,
    /// The RNG state after the current attempt, if that has changed it.
    pub seed_after: Option<Bytes>,
    /// The index of the last RNG state of its owner that had been reported to the head when it was first
    /// submitted.
    pub seeds_at_submission: usize,
    pub end: Option<End>,
    /// Another task and a number of bytes: its message has these first bytes of the message of that one.
    pub prefix: (TaskId, usize),
    /// It starts after tasks of the same owner with lower numbers; `None`: at any time.
    pub order: Option<TaskId>,
    /// It was lost with its host, and R has not decided yet whether it is tried again.
    pub lost_with_host: bool,
    /// The elements of the job that its message contains, if the job engine has sent it.
    pub elements: Vec<usize>,
    /// How long the worker may run it before it returns the elements that it has not started.
    pub time_budget: Duration,
}

impl Task {
    /// A task without any effect.
    pub fn new(id: TaskId) -> Task {
        Task {
            owner: 0,
            assigned: 0,
            job: 0,
            len: 0,
            answer_len: 0,
            stuck: false,
            poison: false,
            on_interrupt: OnInterrupt::Stop,
            rng_use: RngUse::Nothing,
            effect: None,
            prefetch: false,
            movable: false,
            own_limit: None,
            limit: None,
            revoke_requested: false,
            revoked: false,
            complete: false,
            scheduled: false,
            starts: 0,
            started: false,
            failures: 0,
            reported_failures: 0,
            attempts: Attempts::default(),
            job_ends: 0,
            first_seed: None,
            seed_after: None,
            seeds_at_submission: 0,
            end: None,
            prefix: (id, 0),
            order: Some(id),
            lost_with_host: false,
            elements: Vec::new(),
            time_budget: Duration::ZERO,
        }
    }

    pub fn is_reassigned(&self) -> bool {
        self.owner != self.assigned
    }
}

/// The facts about a worker of some rank, as if no worker of that rank had ever failed.
pub struct WorkerFacts {
    /// The effects of its set-up calls.
    pub effects: Vec<Effect>,
    /// Its RNG state.
    pub seed: Bytes,
    /// Its RNG states that have been reported to the head.
    pub reported_seeds: Vec<Bytes>,
    /// The highest `order` of the tasks that have started: its own tasks start in order.
    pub last_started: TaskId,
    /// Its own tasks start in order from this one on: none do after the worker was restarted after a pause, because R
    /// may send others before it decides on those that were lost.
    pub ordered_from: TaskId,
    /// R knows that it has terminated and is not replaced.
    pub is_terminated: bool,
    /// Its agent restarts it after a pause.
    pub awaits_restart: bool,
    /// It, or a predecessor, was ready; and how many consecutive workers have ended since then before they
    /// were ready.
    pub was_ready: bool,
    pub setbacks: u32,
    /// Reassigned tasks have been assigned to it.
    pub had_reassigned: bool,
    /// Its set-up log is complete.
    pub is_logged: bool,
    /// The task that the head has sent and that has not ended for the head, and the prefetched one.
    pub current: Option<TaskId>,
    pub prefetched: Option<TaskId>,
    /// The prefetched task at the last worker failure.
    pub prefetched_at_failure: Option<TaskId>,
    /// Number of worker failures that the head has not acknowledged yet. The agent drops all tasks that
    /// it receives before the acknowledgement.
    pub unacknowledged: usize,
    /// The effects of its set-up calls that the head knows: those with which it is restored.
    pub logged: Vec<Effect>,
    /// The effect of the set-up call that it was running when its agent listed its set-up calls for another head.
    pub listed_running: Option<Effect>,
    /// Its agent starts it, and the head has not restored it yet.
    pub is_away: bool,
    /// It terminated with its host.
    pub is_of_host: bool,
    /// Set-up calls were logged for it that it has not run.
    pub is_late: bool,
    /// The states that its calls have left with which the head restores it.
    pub restored_seeds: BTreeMap<TaskId, Bytes>,
    /// States that reassigned tasks have left since it is back, and that it may have been sent.
    pub other_seeds: Vec<Bytes>,
    /// It is draining, and the task that it had when the drain began.
    pub draining: bool,
    pub task_at_drain: Option<TaskId>,
}

impl WorkerFacts {
    pub fn new() -> WorkerFacts {
        WorkerFacts {
            effects: Vec::new(),
            seed: Bytes::new(),
            reported_seeds: vec![Bytes::new()],
            last_started: 0,
            ordered_from: 0,
            is_terminated: false,
            awaits_restart: false,
            was_ready: false,
            setbacks: 0,
            had_reassigned: false,
            is_logged: true,
            current: None,
            prefetched: None,
            prefetched_at_failure: None,
            unacknowledged: 0,
            logged: Vec::new(),
            listed_running: None,
            is_away: false,
            is_of_host: false,
            is_late: false,
            restored_seeds: BTreeMap::new(),
            other_seeds: Vec::new(),
            draining: false,
            task_at_drain: None,
        }
    }

    /// The head has learned its RNG state from a call with which it was restored.
    pub fn report_seed(&mut self, seed: Bytes) {
        // At first, no state is known, and the head restores none.
        if self.reported_seeds.len() == 1 || self.reported_seeds.last() != Some(&seed) {
            self.reported_seeds.push(seed);
        }
    }

    /// Another head knows nothing of it.
    pub fn next_head(&mut self) {
        self.reported_seeds = vec![Bytes::new()];
        self.restored_seeds.clear();
        self.logged.clear();
        self.listed_running = None;
        self.is_terminated = false;
        self.awaits_restart = false;
        self.is_away = false;
        self.is_of_host = false;
        self.is_late = false;
        (self.current, self.prefetched) = (None, None);
        self.prefetched_at_failure = None;
        self.unacknowledged = 0;
        self.draining = false;
        self.task_at_drain = None;
    }

    /// Another agent starts it anew.
    pub fn begin_again(&mut self) {
        self.effects.clear();
        self.seed = Bytes::new();
        self.awaits_restart = false;
        self.was_ready = false;
        self.setbacks = 0;
        self.is_logged = true;
        (self.current, self.prefetched) = (None, None);
        self.prefetched_at_failure = None;
        self.unacknowledged = 0;
        self.draining = false;
        self.task_at_drain = None;
    }
}

/// The facts about the whole cluster.
pub struct Facts {
    pub tasks: Tasks,
    pub workers: Vec<WorkerFacts>,
    pub retries: usize,
    pub seen: Seen,
}

/// How often each kind of event has happened.
#[derive(Debug, Default)]
pub struct Seen {
    pub answers: usize,
    pub cancelled: usize,
    pub timed_out: usize,
    /// Tasks whose worker failed, and of those the ones that were retried on a worker of the same
    /// rank and of another rank.
    pub lost: usize,
    pub retried: usize,
    pub moved_by_retry: usize,
    /// Tasks that ended with `End::GivenUp` and with `End::Error`.
    pub given_up: usize,
    pub errors: usize,
    /// Workers that failed and were replaced, that were killed because they ignored an interrupt, and that
    /// were restored; and workers whose set-up log became incomplete.
    pub replaced: usize,
    pub killed: usize,
    pub restored: usize,
    pub not_logged: usize,
    /// Reassigned tasks that were answered and used the RNG of their owner.
    pub reassigned: usize,
    /// Hosts that were left out.
    pub hosts_left_out: usize,
    /// Answers that came in shared memory.
    pub in_shared_memory: usize,
    /// Steps after which a result was blocked on credit.
    pub blocked: usize,
    /// Tasks that were prefetched; of those, the ones that were queued again after a worker
    /// failure, and the ones that were dropped before they started.
    pub prefetched_tasks: usize,
    pub requeued: usize,
    pub dropped: usize,
    /// Tasks that were revoked, and tasks that were answered despite a revoke request.
    pub revoked: usize,
    pub revoked_too_late: usize,
    /// Messages of tasks and of replayed set-up calls that began with a blob; blobs that were not
    /// completed.
    pub with_blob: usize,
    pub replayed_with_blob: usize,
    pub aborted_blobs: usize,
    /// Jobs of the job engine, complete jobs, and elements with a result.
    pub jobs: usize,
    pub jobs_done: usize,
    pub elements: usize,
    /// Messages with several elements, prefetched messages, and messages of which the worker returned
    /// a part.
    pub batches: usize,
    pub prefetched_messages: usize,
    pub partly_returned: usize,
    /// Messages whose worker failed, that timed out, or whose answer could not be read.
    pub failed_messages: usize,
    /// Blobs that were sent again.
    pub blobs_resent: usize,
    /// Workers that the user removed, agents that announced the end of their job, those of them that ended after
    /// their tasks, and jobs that were killed.
    pub removed: usize,
    pub announced: usize,
    pub drained: usize,
    pub jobs_killed: usize,
    /// Tasks that were revoked because of a drain, and losses that did not count as attempts.
    pub revoked_by_drain: usize,
    pub uncounted: usize,
    /// Workers that joined late or came back, those of them that had set-up calls, and agents that took the place of
    /// others.
    pub joined: usize,
    pub joined_with_calls: usize,
    pub came_again: usize,
    /// Set-up calls to all workers, and set-up calls that were only logged.
    pub common_calls: usize,
    pub only_logged: usize,
    /// Additions of hosts, and those that failed.
    pub added: usize,
    pub not_added: usize,
    /// Jobs with workers that had not joined.
    pub jobs_with_absent: usize,
    /// Heads that took a cluster over, those that vanished before they had, and heads that found no agent.
    pub taken_over: usize,
    pub vanished_early: usize,
    pub found_none: usize,
    /// Workers that had a task of the head before, and tasks of a head before that started without it.
    pub kept_workers: usize,
    pub started_without_head: usize,
    /// Workers of the head before that had set-up calls, and lost ones whose calls the head has from others.
    pub taken_over_with_calls: usize,
    pub lost_with_calls: usize,
    /// Calls for any worker, and answers that were kept and taken.
    pub calls: usize,
    pub kept_answers: usize,
}

impl Seen {
    pub fn counts(&self) -> [usize; 55] {
        [
            self.answers,
            self.cancelled,
            self.timed_out,
            self.lost,
            self.retried,
            self.moved_by_retry,
            self.given_up,
            self.errors,
            self.replaced,
            self.killed,
            self.restored,
            self.not_logged,
            self.reassigned,
            self.hosts_left_out,
            self.in_shared_memory,
            self.blocked,
            self.prefetched_tasks,
            self.requeued,
            self.dropped,
            self.revoked,
            self.revoked_too_late,
            self.with_blob,
            self.replayed_with_blob,
            self.aborted_blobs,
            self.jobs,
            self.jobs_done,
            self.elements,
            self.batches,
            self.prefetched_messages,
            self.partly_returned,
            self.failed_messages,
            self.blobs_resent,
            self.removed,
            self.announced,
            self.drained,
            self.jobs_killed,
            self.revoked_by_drain,
            self.uncounted,
            self.joined,
            self.joined_with_calls,
            self.came_again,
            self.common_calls,
            self.only_logged,
            self.added,
            self.not_added,
            self.jobs_with_absent,
            self.taken_over,
            self.vanished_early,
            self.found_none,
            self.kept_workers,
            self.started_without_head,
            self.taken_over_with_calls,
            self.lost_with_calls,
            self.calls,
            self.kept_answers,
        ]
    }

    pub fn add(&mut self, other: &Seen) {
        let theirs = other.counts();
        let ours = [
            &mut self.answers,
            &mut self.cancelled,
            &mut self.timed_out,
            &mut self.lost,
            &mut self.retried,
            &mut self.moved_by_retry,
            &mut self.given_up,
            &mut self.errors,
            &mut self.replaced,
            &mut self.killed,
            &mut self.restored,
            &mut self.not_logged,
            &mut self.reassigned,
            &mut self.hosts_left_out,
            &mut self.in_shared_memory,
            &mut self.blocked,
            &mut self.prefetched_tasks,
            &mut self.requeued,
            &mut self.dropped,
            &mut self.revoked,
            &mut self.revoked_too_late,
            &mut self.with_blob,
            &mut self.replayed_with_blob,
            &mut self.aborted_blobs,
            &mut self.jobs,
            &mut self.jobs_done,
            &mut self.elements,
            &mut self.batches,
            &mut self.prefetched_messages,
            &mut self.partly_returned,
            &mut self.failed_messages,
            &mut self.blobs_resent,
            &mut self.removed,
            &mut self.announced,
            &mut self.drained,
            &mut self.jobs_killed,
            &mut self.revoked_by_drain,
            &mut self.uncounted,
            &mut self.joined,
            &mut self.joined_with_calls,
            &mut self.came_again,
            &mut self.common_calls,
            &mut self.only_logged,
            &mut self.added,
            &mut self.not_added,
            &mut self.jobs_with_absent,
            &mut self.taken_over,
            &mut self.vanished_early,
            &mut self.found_none,
            &mut self.kept_workers,
            &mut self.started_without_head,
            &mut self.taken_over_with_calls,
            &mut self.lost_with_calls,
            &mut self.calls,
            &mut self.kept_answers,
        ];
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            *ours += theirs;
        }
    }
}

/// A random number of bytes, of any order of magnitude.
pub fn slice(rng: &mut StdRng) -> usize {
    let magnitude = rng.random_range(2..20);
    rng.random_range(1..=1usize << magnitude)
}
