//! What pages show and no other part of the head keeps: the job that runs, the last failures with their output, and
//! exports. It is in limited memory, and is recorded when something happens that happens seldom.

use crate::head::activity::{Moment, TOO_LONG};
use crate::head::scheduler::events::{Note, Outcome, Termination};
use crate::platform::exit::Exit;
use crate::protocol::control::WorkerFailure;
use crate::protocol::ids::{JobId, Rank, TaskId};
use crate::protocol::truncate;
use crate::store::Gauge;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// Maximum number of different failures.
const MAX_FAILURES: usize = 50;
/// Maximum length of the output that belongs to a failure, in bytes.
const MAX_OUTPUT: usize = 4000;
/// Maximum number of running tasks whose errors are counted.
const MAX_FAILING: usize = 10_000;
/// Maximum number of exports.
const MAX_EXPORTS: usize = 200;

/// The numbers of tasks of a job that have ended, and that have ended without an answer, and of elements of chunks. R's
/// thread sets them, and any thread may read them.
#[derive(Debug, Default)]
pub struct JobGauge {
    done: AtomicUsize,
    unanswered: AtomicUsize,
    elements: AtomicUsize,
}

impl JobGauge {
    /// Sets the number of ended tasks.
    pub fn set(&self, done: usize) {
        self.done.store(done, Ordering::Relaxed);
    }

    /// The number of ended tasks.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Sets the number of elements that are finished: see [`Chunks`].
    pub fn set_elements(&self, finished: usize) {
        self.elements.store(finished, Ordering::Relaxed);
    }

    /// Counts tasks whose worker failed on all attempts, or that exceeded their time limit.
    pub fn add_unanswered(&self, tasks: usize) {
        self.unanswered.fetch_add(tasks, Ordering::Relaxed);
    }
}

/// The results of a job that are stored.
#[derive(Clone, Debug)]
pub struct StoreView {
    /// The directory.
    pub dir: String,
    /// Number of elements.
    pub elements: usize,
    /// Number of results that the directory had before.
    pub before: usize,
    /// What waits to be written.
    pub gauge: Gauge,
}

/// What the tasks of a job are made of, if they are chunks whose elements are counted.
#[derive(Clone, Debug)]
pub struct Chunks {
    /// What an element is called.
    pub noun: String,
    /// Number of elements of all chunks.
    pub elements: usize,
}

/// The job that runs, or the last one.
#[derive(Clone, Debug)]
pub struct JobView {
    /// The job.
    pub id: JobId,
    /// What a task is called.
    pub noun: String,
    /// Number of tasks.
    pub tasks: usize,
    /// See [`Chunks`].
    pub chunks: Option<Chunks>,
    /// Number of ended tasks.
    pub gauge: Arc<JobGauge>,
    /// When the job began.
    pub began: Moment,
    /// When the job ended, if it has.
    pub ended: Option<Moment>,
    /// Number of errors in answers.
    pub errors: u64,
    /// Where the results are stored, if they are.
    pub store: Option<StoreView>,
}

impl JobView {
    /// What is counted: what one is called, the number of all, and the number of those that have ended.
    pub fn counted(&self) -> (&str, usize, usize) {
        let done = self.gauge.done();
        match &self.chunks {
            Some(chunks) if done == self.tasks => (&chunks.noun, chunks.elements, chunks.elements),
            Some(chunks) => {
                let finished = self.gauge.elements.load(Ordering::Relaxed);
                (&chunks.noun, chunks.elements, finished.min(chunks.elements))
            }
            None => (&self.noun, self.tasks, done),
        }
    }

    /// What one of those is called that have failed.
    pub fn failed_noun(&self) -> &str {
        match self.chunks {
            Some(_) => "chunk",
            None => &self.noun,
        }
    }

    /// Number of tasks that have failed.
    pub fn failed(&self) -> u64 {
        self.errors + self.gauge.unanswered.load(Ordering::Relaxed) as u64
    }
}

/// The kind of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// A task raised an error.
    Error,
    /// A task exceeded its time limit.
    Timeout,
    /// A worker failed.
    Worker,
    /// A host was lost or could not be started.
    Host,
}

impl FailureKind {
    /// All kinds.
    pub const ALL: [FailureKind; 4] = [
        FailureKind::Error,
        FailureKind::Timeout,
        FailureKind::Worker,
        FailureKind::Host,
    ];

    /// The name of the kind.
    pub fn name(self) -> &'static str {
        match self {
            FailureKind::Error => "error",
            FailureKind::Timeout => "timeout",
            FailureKind::Worker => "worker",
            FailureKind::Host => "host",
        }
    }
}

/// A failure, or several equal ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The number of the failure.
    pub id: u64,
    /// The number of its last change.
    pub change: u64,
    /// The kind.
    pub kind: FailureKind,
    /// When it last happened.
    pub at: Moment,
    /// How often it happened.
    pub count: u64,
    /// The last worker to which it happened.
    pub rank: Option<Rank>,
    /// The host, if it is a host that failed.
    pub agent: Option<usize>,
    /// What happened.
    pub text: String,
    /// The last output of the worker or of the agent's command.
    pub output: String,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Board {
    /// The job that runs, or the last one.
    pub job: Option<JobView>,
    failures: VecDeque<Failure>,
    changes: u64,
    ids: u64,
    counts: [u64; FailureKind::ALL.len()],
    /// The number of errors of running tasks. They count in the job with the answer: tasks whose worker fails run again.
    failing: HashMap<TaskId, u64>,
    exports: BTreeMap<String, u64>,
    export_changes: u64,
    /// What R knows of batch jobs: the index of the host, the job's id and its state.
    pub batch_jobs: Vec<(usize, String, String)>,
    /// When a page last asked.
    pub watched: Option<Moment>,
    /// When the hosts were last asked for the memory of their workers on behalf of a page.
    pub surveyed: Option<Moment>,
    /// Whether R has opened a dashboard.
    pub open: bool,
    /// Wakes requests of pages that wait for a failure.
    pub news: Arc<Notify>,
    /// Wakes requests of pages that wait, because the cluster stops.
    pub ending: Arc<Notify>,
}

impl Board {
    /// A job has begun.
    pub fn begin(&mut self, job: JobView) {
        self.job = Some(job);
    }

    /// A job has ended.
    pub fn end(&mut self, id: JobId, now: Moment) {
        let job = self.job.as_mut().filter(|job| job.id == id);
        if let Some(job) = job.filter(|job| job.ended.is_none()) {
            job.ended = Some(now);
        }
    }

    /// A variable of this name was exported, in a message of this many bytes.
    pub fn exported(&mut self, name: &str, bytes: u64) {
        if self.exports.len() < MAX_EXPORTS || self.exports.contains_key(name) {
            self.exports.insert(name.to_owned(), bytes);
            self.export_changes += 1;
        }
    }

    /// The exports, and the number of their changes.
    pub fn exports(&self) -> (&BTreeMap<String, u64>, u64) {
        (&self.exports, self.export_changes)
    }

    /// The answer to a task of this worker is an error that the task has not raised: the value of `try()`, for example.
    pub fn error_returned(&mut self, rank: Rank, text: &str, now: Moment) {
        let job = self.job.as_mut().filter(|job| job.ended.is_none());
        if let Some(job) = job {
            job.errors += 1;
        }
        self.add(FailureKind::Error, Some(rank), None, text, "", now);
    }

    /// A task of this worker raised an error.
    fn error_raised(&mut self, rank: Rank, task: TaskId, text: &str, output: &str, now: Moment) {
        if self.failing.len() == MAX_FAILING {
            self.failing.clear();
        }
        *self.failing.entry(task).or_default() += 1;
        self.add(FailureKind::Error, Some(rank), None, text, output, now);
    }

    fn ended(&mut self, task: TaskId, job: JobId, outcome: &Outcome) {
        let errors = self.failing.remove(&task).unwrap_or_default();
        let job = self
            .job
            .as_mut()
            .filter(|now| now.id == job && now.ended.is_none());
        if let (Some(job), Outcome::Answer(_)) = (job, outcome) {
            job.errors += errors;
        }
    }

    /// A task of this worker exceeded its time limit. The job itself counts tasks without an answer.
    fn timed_out(&mut self, rank: Rank, output: &str, now: Moment) {
        self.add(
            FailureKind::Timeout,
            Some(rank),
            None,
            TOO_LONG,
            output,
            now,
        );
    }

    /// A host was lost or could not be started.
    pub fn host_failed(&mut self, agent: usize, reason: &str, output: &str, now: Moment) {
        self.add(FailureKind::Host, None, Some(agent), reason, output, now);
    }

    fn worker_failed(&mut self, rank: Rank, failure: &WorkerFailure, now: Moment) {
        let oom = match failure.oom {
            true => "; probably by the out-of-memory killer",
            false => "",
        };
        let name = match failure.exit {
            Exit::Signal(libc::SIGABRT) => " (SIGABRT)",
            Exit::Signal(libc::SIGBUS) => " (SIGBUS)",
            Exit::Signal(libc::SIGKILL) => " (SIGKILL)",
            Exit::Signal(libc::SIGSEGV) => " (SIGSEGV)",
            Exit::Signal(libc::SIGTERM) => " (SIGTERM)",
            _ => "",
        };
        let text = format!("{}{name}{oom}", failure.exit);
        self.add(
            FailureKind::Worker,
            Some(rank),
            None,
            &text,
            &failure.tail,
            now,
        );
    }

    /// Records a note of the scheduler, if it is about a failure. Returns whether it is. `now` is called only then:
    /// most notes are answers.
    pub fn note(&mut self, note: &Note, now: impl FnOnce() -> Moment) -> bool {
        match note {
            Note::Lost { rank, failure, .. } => self.worker_failed(*rank, failure, now()),
            Note::Terminated { rank, termination } => match &**termination {
                Termination::Worker(failure) => self.worker_failed(*rank, failure, now()),
                _ => return false,
            },
            Note::TimedOut { rank, output } => self.timed_out(*rank, output, now()),
            Note::TaskFailed {
                rank,
                task,
                text,
                output,
            } => self.error_raised(*rank, *task, text, output, now()),
            Note::Done {
                task, job, outcome, ..
            } => {
                // Fast path: most tasks raise no error.
                if !self.failing.is_empty() {
                    self.ended(*task, *job, outcome);
                }
                return false;
            }
            Note::LeftOut { agent, reason } => self.host_failed(*agent, reason, "", now()),
            _ => return false,
        }
        true
    }

    fn add(
        &mut self,
        kind: FailureKind,
        rank: Option<Rank>,
        agent: Option<usize>,
        text: &str,
        output: &str,
        now: Moment,
    ) {
        self.counts[kind as usize] += 1;
        self.changes += 1;
        let (text, output) = (
            truncate::beginning(text.trim_end(), truncate::MAX_ERROR),
            truncate::end(output.trim_end(), MAX_OUTPUT),
        );
        let same = |failure: &Failure| {
            // Each task may print something else before the same error.
            let same_output = match kind {
                FailureKind::Error => true,
                FailureKind::Worker | FailureKind::Timeout => {
                    failure.output == output || failure.rank == rank
                }
                FailureKind::Host => failure.output == output,
            };
            failure.kind == kind && failure.agent == agent && failure.text == text && same_output
        };
        let known = self.failures.iter().position(same);
        let failure = match known.and_then(|at| self.failures.remove(at)) {
            Some(failure) => Failure {
                change: self.changes,
                count: failure.count + 1,
                at: now,
                rank,
                output: output.to_owned(),
                ..failure
            },
            None => {
                if self.failures.len() == MAX_FAILURES {
                    self.failures.pop_front();
                }
                self.ids += 1;
                Failure {
                    id: self.ids,
                    change: self.changes,
                    kind,
                    at: now,
                    count: 1,
                    rank,
                    agent,
                    text: text.to_owned(),
                    output: output.to_owned(),
                }
            }
        };
        self.failures.push_back(failure);
        self.news.notify_waiters();
    }

    /// The failures that have changed since the change of this number, the last one last.
    pub fn failures_since(&self, change: u64) -> impl Iterator<Item = &Failure> {
        self.failures
            .iter()
            .filter(move |failure| failure.change > change)
    }

    /// The number of the last change of a failure.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// The number of failures of a kind.
    pub fn count(&self, kind: FailureKind) -> u64 {
        self.counts[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::body::Body;
    use std::time::Duration;

    const NOW: Moment = Duration::from_secs(1);

    fn job_of(tasks: usize) -> JobView {
        JobView {
            id: 7,
            noun: "task".into(),
            tasks,
            chunks: None,
            gauge: Arc::default(),
            began: NOW,
            ended: None,
            errors: 0,
            store: None,
        }
    }

    #[test]
    fn equal_failures_are_one_and_the_oldest_are_dropped() {
        let mut board = Board::default();
        for _ in 0..1000 {
            board.error_returned(3, "Error in f(i): no\n", NOW);
        }
        board.error_returned(4, "other", NOW);
        let last = Note::TaskFailed {
            rank: 5,
            task: 9,
            text: "Error in f(i): no".into(),
            output: "i = 17\n".into(),
        };
        assert!(board.note(&last, || NOW));
        let all: Vec<_> = board.failures_since(0).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(
            (all[1].count, all[1].rank, &*all[1].text),
            (1001, Some(5), "Error in f(i): no")
        );
        assert_eq!((&*all[0].output, &*all[1].output), ("", "i = 17"));
        assert_eq!(board.failures_since(1001).count(), 1);
        assert_eq!(board.failures_since(board.changes()).count(), 0);
        assert_eq!(board.count(FailureKind::Error), 1002);
        for i in 0..2 * MAX_FAILURES {
            board.host_failed(i, "gone", "", NOW);
        }
        assert_eq!(board.failures_since(0).count(), MAX_FAILURES);
    }

    #[test]
    fn worker_failures_have_their_output() {
        let mut board = Board::default();
        let failure = WorkerFailure {
            tail: format!("{}é*** caught segfault ***\n", "x".repeat(2 * MAX_OUTPUT)),
            oom: true,
            ..WorkerFailure::default()
        };
        let lost = Note::Lost {
            rank: 0,
            failure,
            task: true,
        };
        assert!(board.note(&lost, || NOW));
        let shown = board.failures_since(0).next().unwrap();
        assert!(shown.output.ends_with("segfault ***") && shown.output.len() <= MAX_OUTPUT);
        assert!(shown.text.contains("out-of-memory"));
        let stopped = Note::Terminated {
            rank: 0,
            termination: Arc::new(Termination::Stopped),
        };
        assert!(!board.note(&stopped, || NOW));
    }

    #[test]
    fn errors_count_in_the_job_that_runs() {
        let mut board = Board::default();
        board.begin(job_of(10));
        board.error_returned(0, "no", NOW);
        board.timed_out(0, "iteration 7\n", NOW);
        assert_eq!(
            board.failures_since(1).next().unwrap().output,
            "iteration 7"
        );
        board.job.as_ref().unwrap().gauge.add_unanswered(1);
        board.end(6, 2 * NOW);
        board.end(7, 2 * NOW);
        board.end(7, 3 * NOW);
        board.error_returned(0, "no", NOW);
        let job = board.job.unwrap();
        assert_eq!((job.failed(), job.ended), (2, Some(2 * NOW)));
    }

    #[test]
    fn errors_count_once_although_their_task_is_run_again() {
        let mut board = Board::default();
        board.begin(job_of(10));
        let raised = |task| Note::TaskFailed {
            rank: 0,
            task,
            text: "no".into(),
            output: String::new(),
        };
        let done = |task, job, outcome| Note::Done {
            rank: 0,
            task,
            job,
            outcome,
        };
        let answer = || Outcome::Answer(Body::default());
        // Two elements of the batch have failed before its worker does, and do so again.
        for outcome in [Outcome::Lost(Arc::new(Termination::Stopped)), answer()] {
            for _ in 0..2 {
                assert!(board.note(&raised(1), || NOW));
            }
            assert_eq!(board.job.as_ref().unwrap().failed(), 0);
            assert!(!board.note(&done(1, 7, outcome), || NOW));
        }
        assert_eq!(board.job.as_ref().unwrap().failed(), 2);
        // Answers to calls outside of the job.
        board.note(&raised(2), || NOW);
        board.note(&done(2, 8, answer()), || NOW);
        board.note(&done(3, 7, answer()), || NOW);
        assert_eq!(board.job.as_ref().unwrap().failed(), 2);
        assert_eq!(board.count(FailureKind::Error), 5);
        assert!(board.failing.is_empty());
        for task in 0..2 * MAX_FAILING as u64 {
            board.note(&raised(task), || NOW);
        }
        assert_eq!(board.failing.len(), MAX_FAILING);
    }

    #[test]
    fn elements_of_chunks_count_instead_of_tasks() {
        let mut job = job_of(2);
        job.gauge.set(1);
        assert_eq!(job.counted(), ("task", 2, 1));
        job.chunks = Some(Chunks {
            noun: "row".into(),
            elements: 30,
        });
        job.gauge.set_elements(17);
        assert_eq!(job.counted(), ("row", 30, 17));
        job.gauge.set(2);
        assert_eq!(job.counted(), ("row", 30, 30));
    }

    #[test]
    fn exports_are_limited_and_replaced_by_name() {
        let mut board = Board::default();
        for i in 0..2 * MAX_EXPORTS {
            board.exported(&format!("x{i}"), 1);
        }
        board.exported("x0", 5);
        let (exports, changes) = board.exports();
        assert_eq!(
            (exports.len(), exports["x0"], changes),
            (MAX_EXPORTS, 5, MAX_EXPORTS as u64 + 1)
        );
    }
}
