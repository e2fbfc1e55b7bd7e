//! What the scheduler reports: notes for R, how tasks and workers ended, what workers are doing.

use crate::protocol::body::Body;
use crate::protocol::control::{Facts, ToHead, Usage, WorkerFailure};
use crate::protocol::ids::{JobId, Rank, TaskId};
use bytes::Bytes;
use std::sync::Arc;

/// Why a worker terminated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Termination {
    /// The worker's process ended by itself or was killed.
    Worker(WorkerFailure),
    /// The agent of the worker's host failed, or the connection to it.
    Host(String),
    /// The worker was stopped on request.
    Stopped,
    /// The batch job that the worker belonged to ended, for this reason. Tasks that are lost with the worker do not
    /// count as attempts: see [`Attempts`](crate::head::retry::Attempts).
    JobEnded(String),
}

impl Termination {
    /// Whether the worker's agent starts a replacement after a pause.
    pub fn is_tried_again(&self) -> bool {
        matches!(self, Termination::Worker(failure) if failure.setback.pause > 0)
    }

    /// Whether the worker terminated together with its agent, and comes back if the host is reconnected.
    pub fn is_of_host(&self) -> bool {
        matches!(self, Termination::Host(_) | Termination::JobEnded(_))
    }
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The worker's answer: a serialized R object, which may well be an R error.
    Answer(Body),
    /// The worker terminated before it could answer. If it is replaced, the tasks that follow wait
    /// until this one has been submitted again or [abandoned](super::Scheduler::abandon_task).
    Lost(Arc<Termination>),
    /// The task exceeded its time limit.
    TimedOut,
    /// The head no longer wants the answer.
    Cancelled,
    /// The task was revoked before it started: see [`Scheduler::revoke`](super::Scheduler::revoke) and
    /// [`Order::movable`](super::task::Order::movable).
    Revoked,
}

/// Why a task was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interruption {
    /// The head no longer wants its answer.
    Cancelled,
    /// The task exceeded its time limit.
    TimedOut,
}

/// What the scheduler reports to the rest of the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A worker has started and is ready for tasks.
    Up {
        /// The worker's rank.
        rank: Rank,
        /// The worker's process number.
        pid: u32,
    },
    /// A worker that comes up when it has ended the task that it began for the head before.
    Kept {
        /// The worker's rank.
        rank: Rank,
        /// The worker's process number.
        pid: u32,
    },
    /// The set-up calls that restore a worker, or some of them.
    SetupCalls {
        /// The worker's rank.
        rank: Rank,
        /// Whether the agent's log of the worker is complete.
        complete: bool,
        /// The number of the variable that each call sets, and its digest.
        calls: Vec<(u64, u128)>,
        /// Whether these are the last ones.
        last: bool,
    },
    /// A part of the message of a set-up call that the head has asked for.
    SetupCall {
        /// The number of the request.
        request: u64,
        /// The flags of the frame.
        flags: u8,
        /// The bytes.
        bytes: Bytes,
    },
    /// Answers that an agent has kept while it had no head.
    KeptAnswers {
        /// The host's index among all.
        agent: usize,
        /// The number and the task of each answer, and when the task ended, in milliseconds of the host's clock.
        answers: Vec<(u64, TaskId, u64)>,
        /// Whether these are the last ones.
        last: bool,
    },
    /// A worker failed, and its agent is starting a replacement.
    Lost {
        /// The worker's rank.
        rank: Rank,
        /// How the worker ended.
        failure: WorkerFailure,
        /// Whether the worker had a task. The task has a note of its own.
        task: bool,
    },
    /// A replacement of a failed worker is ready.
    Replaced {
        /// The rank of the worker and of its replacement.
        rank: Rank,
        /// The process number of the replacement.
        pid: u32,
        /// Why the task of the worker before it was interrupted, if that worker ended or was killed because it did not
        /// respond.
        killed: Option<Interruption>,
    },
    /// A worker that could not be restored at first has been restored.
    Back {
        /// The worker's rank.
        rank: Rank,
        /// The worker's process number.
        pid: u32,
    },
    /// The set-up log of a worker exceeds its host's limit: the worker cannot be replaced.
    StateNotLogged {
        /// The worker's rank.
        rank: Rank,
    },
    /// The workers of a host failed repeatedly: the host is left out.
    LeftOut {
        /// The host's index among all.
        agent: usize,
        /// Why, for the user.
        reason: String,
    },
    /// An agent drains: its batch job is about to end.
    Draining {
        /// The host's index among all.
        agent: usize,
        /// Why the job ends.
        reason: String,
        /// Seconds until the end, if they are known.
        seconds: Option<u32>,
    },
    /// A host has nothing to do and is given back: its agent ends, and its batch job with it.
    GivenBack {
        /// The host's index among all.
        agent: usize,
    },
    /// All workers of a draining agent have terminated, and the agent was asked to end.
    Drained {
        /// The host's index among all.
        agent: usize,
        /// The user has removed all workers of the host.
        removed: bool,
    },
    /// A worker has terminated.
    Terminated {
        /// The worker's rank.
        rank: Rank,
        /// Why the worker terminated.
        termination: Arc<Termination>,
    },
    /// The process of a terminated worker has ended.
    Ended {
        /// The worker's rank.
        rank: Rank,
        /// Whether the worker was idle when it was stopped, and was killed because it did not end in time.
        timed_out: bool,
    },
    /// A task exceeded its time limit. The note of its end follows.
    TimedOut {
        /// The worker's rank.
        rank: Rank,
        /// The end of the worker's output.
        output: String,
    },
    /// A task raised an error, or an element of its batch. The note of its end follows.
    TaskFailed {
        /// The worker's rank.
        rank: Rank,
        /// The task.
        task: TaskId,
        /// The message of the error.
        text: String,
        /// The end of the worker's output.
        output: String,
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
    /// A chunk of a progress event, from a task that has not ended.
    ProgressEvent {
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
    /// A process that a worker of this agent started is still running after the worker's end.
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
    /// The agent has failed.
    Failed {
        /// The host's index among all.
        agent: usize,
        /// Why, for the user.
        reason: String,
    },
    /// The memory use of workers of this agent.
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
    /// An agent's report about itself and its workers.
    Dump {
        /// The host's index among all.
        agent: usize,
        /// The number of the question.
        question: u64,
        /// The facts about the agent, or about the worker with this rank.
        of: Vec<(Option<Rank>, Facts)>,
        /// Whether the answer is complete with these.
        last: bool,
    },
}

/// The state of a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// The worker is starting.
    #[default]
    Starting,
    /// The worker is up and has no task.
    Idle,
    /// The worker has this task, or is being sent it.
    Busy(TaskId),
    /// The worker still has this task, which was cancelled or exceeded its time limit.
    Ending(TaskId),
    /// The worker is draining: it gets no new tasks. It still has this task, if any.
    Draining(Option<TaskId>),
    /// The worker is being restored to the state of its predecessor.
    Restoring,
    /// The worker's host has not joined the cluster yet.
    Waiting,
    /// The worker terminated, or its host was lost, and it has no replacement.
    Lost,
    /// The head stopped the worker.
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

/// Which answer R is waiting for. Grants for large results follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// R waits for no answer.
    Nothing,
    /// R takes the next answer to a task of any of these workers.
    AnyOf(RankSet),
    /// R waits for an answer of this worker.
    Rank(Rank),
}
