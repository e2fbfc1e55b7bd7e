//! What the scheduler reports: notes for R, how tasks and workers ended, what workers are doing.

use crate::protocol::body::Body;
use crate::protocol::control::{Facts, Loss, ToHead, Usage};
use crate::protocol::ids::{JobId, Rank, TaskId};
use bytes::Bytes;
use std::sync::Arc;

/// Why a worker is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gone {
    /// Its process ended by itself or was killed.
    Worker(Loss),
    /// Its host's agent, or the way to it, was lost.
    Host(String),
    /// It was stopped on request.
    Stopped,
}

impl Gone {
    /// Whether its agent makes another in its place after a pause.
    pub fn is_tried_again(&self) -> bool {
        matches!(self, Gone::Worker(loss) if loss.setback.pause > 0)
    }
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The worker's answer: a serialized R object, which may well be an R error.
    Answer(Body),
    /// The worker ended before it could answer. If another takes its place, tasks that follow wait
    /// until this one has been submitted again or [`Scheduler::let_go`](super::Scheduler::let_go).
    Lost(Arc<Gone>),
    /// It took longer than it may.
    TimedOut,
    /// The head no longer wants the answer.
    Cancelled,
    /// It was taken back before it had started: see [`Scheduler::recall`](super::Scheduler::recall).
    Recalled,
}

/// Why a task was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interruption {
    /// The head no longer wants its answer.
    Cancelled,
    /// The task exceeded its time limit.
    TimedOut,
}

/// What the rest of the head must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A worker has started and is ready for tasks.
    Up {
        /// The worker's rank.
        rank: Rank,
        /// The worker's process number.
        pid: u32,
    },
    /// A worker was lost; a fresh one is on its way to its place.
    Lost {
        /// The worker's rank.
        rank: Rank,
        /// How the worker ended.
        loss: Loss,
        /// Whether the worker had a task, which is reported by a note of its own.
        task: bool,
    },
    /// A fresh worker has taken the place of one that was lost.
    Replaced {
        /// The worker's rank, which the fresh one has too.
        rank: Rank,
        /// The process number of the fresh worker.
        pid: u32,
        /// Why the task of the worker before it was interrupted, if that worker ended or was killed because it did not
        /// respond.
        killed: Option<Interruption>,
    },
    /// A worker that could not be restored at first is there again, as it was.
    Back {
        /// The worker's rank.
        rank: Rank,
        /// The worker's process number.
        pid: u32,
    },
    /// What lasts on a worker is more than its host holds.
    StateNotKept {
        /// The worker's rank.
        rank: Rank,
    },
    /// Its workers were lost again and again: it is to be left alone.
    LeftOut {
        /// The host's index among all.
        agent: usize,
        /// Why, for the user.
        reason: String,
    },
    /// A worker is gone for good.
    Gone {
        /// The worker's rank.
        rank: Rank,
        /// Why it is gone.
        gone: Arc<Gone>,
    },
    /// The process of a worker that is gone has ended.
    Ended {
        /// The worker's rank.
        rank: Rank,
        /// Whether the worker was idle when it was stopped, and was killed because it did not end in time.
        timed_out: bool,
    },
    /// A task has ended.
    Done {
        /// The worker that had the task.
        rank: Rank,
        /// The task that has ended.
        task: TaskId,
        /// The job that the task belongs to.
        job: JobId,
        /// The result, or why there is none.
        outcome: Outcome,
    },
    /// A worker printed something.
    Output {
        /// The worker's rank.
        rank: Rank,
        /// What the worker wrote to its standard output or standard error.
        bytes: Bytes,
    },
    /// What a task that has not ended tells, in chunks.
    Aside {
        /// The task, which has not ended.
        task: TaskId,
        /// The flags of the frame: [`FIRST`](crate::protocol::frame::FIRST) and
        /// [`LAST`](crate::protocol::frame::LAST) delimit a message.
        flags: u8,
        /// A chunk of the message.
        bytes: Bytes,
    },
    /// The agent could not start its workers.
    StartFailed {
        /// The host's index among all.
        agent: usize,
        /// The agent's own message.
        reason: ToHead,
    },
    /// A process that a worker of this agent left goes on.
    LeftBehind {
        /// The host's index among all.
        agent: usize,
        /// The worker that started the process, if it is known.
        rank: Option<Rank>,
        /// The process number on that host.
        pid: u32,
        /// The command line of the process.
        command: String,
    },
    /// The agent cannot go on.
    Failed {
        /// The host's index among all.
        agent: usize,
        /// Why, for the user.
        reason: String,
    },
    /// What workers of this agent take of memory.
    Usage {
        /// The host's index among all.
        agent: usize,
        /// The number of the question: see [`ToAgent::Usage`](crate::protocol::control::ToAgent::Usage).
        question: u64,
        /// Workers by rank, with their memory.
        usages: Vec<(Rank, Usage)>,
        /// Whether the answer is complete with these workers.
        last: bool,
    },
    /// What an agent says of itself and its workers.
    Dump {
        /// The host's index among all.
        agent: usize,
        /// The number of the question.
        question: u64,
        /// What is known of the agent, or of the worker with this rank.
        of: Vec<(Option<Rank>, Facts)>,
        /// Whether the answer is complete with these.
        last: bool,
    },
}

/// What a worker is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It is being made.
    #[default]
    Starting,
    /// It is up and has no task.
    Idle,
    /// It has this task, or is being sent it.
    Busy(TaskId),
    /// It still has this task, which has been cancelled or took too long.
    Ending(TaskId),
    /// It is brought to the state that the one before it had.
    Restoring,
    /// It ended, or its host was lost, and nothing takes its place.
    Lost,
    /// It was stopped by the head.
    Stopped,
}

/// Some workers of a cluster. A clone shares its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RankSet(Arc<[u64]>);

impl RankSet {
    /// Whether this worker is one of them.
    pub fn contains(&self, rank: Rank) -> bool {
        let word = self.0.get(rank as usize / 64);
        word.is_some_and(|word| word >> (rank % 64) & 1 == 1)
    }
}

impl FromIterator<Rank> for RankSet {
    fn from_iter<I: IntoIterator<Item = Rank>>(ranks: I) -> RankSet {
        let mut words = Vec::new();
        for rank in ranks {
            let at = rank as usize / 64;
            if words.len() <= at {
                words.resize(at + 1, 0);
            }
            words[at] |= 1 << (rank % 64);
        }
        RankSet(words.into())
    }
}

/// Whose answer R is waiting for. Large results are asked for accordingly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// R waits for no answer.
    Nothing,
    /// R takes the next answer to a task of any of these workers.
    AnyOf(RankSet),
    /// R waits for an answer of this worker.
    Rank(Rank),
}
