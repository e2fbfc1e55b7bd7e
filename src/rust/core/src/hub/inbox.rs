//! What the hub knows and R has not been told yet.

use crate::message::{Hello, Loss, ToHead};
use crate::scheduler::{Gone, JobId, Note, Outcome, Rank, TaskId};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a host is gone, with what its agent's command printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFailure {
    pub reason: String,
    pub stderr: String,
    pub stdout: String,
}

impl HostFailure {
    pub fn new(reason: String) -> HostFailure {
        HostFailure {
            reason,
            ..HostFailure::default()
        }
    }
}

/// What R shows when it gets to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker was killed because it did not heed an interrupt; a fresh one took its place.
    Replaced { rank: Rank },
    /// A worker was lost, without a task of which R hears. `replaced`: a fresh one takes its place.
    Lost {
        rank: Rank,
        loss: Loss,
        replaced: bool,
    },
    /// A host was lost, or is left out.
    HostLost { agent: usize, reason: String },
    /// What lasts on the workers of this host is more than it holds: workers that are lost there
    /// will not be replaced.
    StateNotKept { agent: usize },
    /// A worker printed this.
    Output { rank: Rank, bytes: Bytes },
}

/// A worker as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct WorkerView {
    /// The place of its host among all.
    pub agent: usize,
    pub pid: Option<u32>,
    pub gone: Option<Arc<Gone>>,
    /// The job that was open when it was lost for good.
    pub gone_in: JobId,
}

/// A host as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct HostView {
    /// The process that was launched: here the agent itself.
    pub pid: Option<u32>,
    pub hello: Option<Hello>,
    /// From the start to the greeting, and to the last worker that came up.
    pub greeted: Option<Duration>,
    pub up: Option<Duration>,
    pub start_failure: Option<ToHead>,
    pub failure: Option<HostFailure>,
    /// R knows, or will, that it is lost; that its workers' state is not kept.
    told_lost: bool,
    told_state: bool,
}

/// How a task ended, as far as R is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Outcome(Outcome),
    /// It was lost too often, and is not tried again.
    GivenUp,
}

#[derive(Debug)]
struct Expected {
    /// The worker that R gave it to.
    owner: Rank,
    end: Option<End>,
}

/// See the module's documentation.
pub struct Inbox {
    began: Instant,
    /// The job that is open.
    pub job: JobId,
    /// Tasks whose end R wants to know.
    expected: HashMap<TaskId, Expected>,
    /// Ended tasks, with their owners, in the order of their ends. May hold tasks that are no longer
    /// expected.
    ready: VecDeque<(Rank, TaskId)>,
    /// Lost tasks that R has not been told of.
    lost: Vec<(JobId, Rank, TaskId)>,
    pub workers: Vec<WorkerView>,
    pub hosts: Vec<HostView>,
    pub events: VecDeque<Event>,
    /// Workers that have come up.
    pub up: usize,
    /// The hub's thread has ended.
    pub closed: bool,
}

impl Inbox {
    pub fn new(hosts: usize) -> Inbox {
        Inbox {
            began: Instant::now(),
            job: 0,
            expected: HashMap::new(),
            ready: VecDeque::new(),
            lost: Vec::new(),
            workers: Vec::new(),
            hosts: vec![HostView::default(); hosts],
            events: VecDeque::new(),
            up: 0,
            closed: false,
        }
    }

    pub fn set_workers(&mut self, ranks: &[Vec<Rank>]) {
        let workers = ranks.iter().map(Vec::len).sum();
        self.workers = vec![WorkerView::default(); workers];
        for (agent, ranks) in ranks.iter().enumerate() {
            for &rank in ranks {
                self.workers[rank as usize].agent = agent;
            }
        }
    }

    /// An agent has greeted.
    pub fn greeted(&mut self, agent: usize, hello: Hello) {
        let host = &mut self.hosts[agent];
        host.hello = Some(hello);
        host.greeted = Some(self.began.elapsed());
    }

    /// Takes in what the scheduler noted. Returns the bytes of answers that nobody expects.
    pub fn note(&mut self, note: Note) -> usize {
        match note {
            Note::Up { rank, pid } => {
                self.up += 1;
                let worker = &mut self.workers[rank as usize];
                worker.pid = Some(pid);
                self.hosts[worker.agent].up = Some(self.began.elapsed());
            }
            Note::Replaced { rank, pid, killed } => {
                self.workers[rank as usize].pid = Some(pid);
                if killed {
                    self.events.push_back(Event::Replaced { rank });
                }
            }
            Note::Lost { rank, loss, task } => {
                self.workers[rank as usize].pid = None;
                if !task {
                    self.events.push_back(Event::Lost {
                        rank,
                        loss,
                        replaced: true,
                    });
                }
            }
            Note::StateNotKept { rank } => {
                let agent = self.workers[rank as usize].agent;
                if !std::mem::replace(&mut self.hosts[agent].told_state, true) {
                    self.events.push_back(Event::StateNotKept { agent });
                }
            }
            Note::LeftOut { agent, reason } => {
                let failure = &mut self.hosts[agent].failure;
                failure.get_or_insert_with(|| HostFailure::new(reason));
            }
            Note::Gone { rank, gone } => self.gone(rank, gone),
            Note::Done {
                task, job, outcome, ..
            } => match self.expected.get_mut(&task) {
                Some(expected) => {
                    if matches!(outcome, Outcome::Lost(_)) {
                        self.lost.push((job, expected.owner, task));
                    }
                    self.ready.push_back((expected.owner, task));
                    expected.end = Some(End::Outcome(outcome));
                }
                None => {
                    if let Outcome::Answer(body) = outcome {
                        return body.len;
                    }
                }
            },
            Note::Output { rank, bytes } => self.events.push_back(Event::Output { rank, bytes }),
            Note::StartFailed { agent, reason } => self.hosts[agent].start_failure = Some(reason),
        }
        0
    }

    fn gone(&mut self, rank: Rank, gone: Arc<Gone>) {
        let worker = &mut self.workers[rank as usize];
        let was_up = worker.pid.is_some();
        worker.gone_in = self.job;
        let agent = worker.agent;
        match &*gone {
            Gone::Worker(loss) if was_up => self.events.push_back(Event::Lost {
                rank,
                loss: loss.clone(),
                replaced: false,
            }),
            Gone::Host(reason)
                if was_up && !std::mem::replace(&mut self.hosts[agent].told_lost, true) =>
            {
                let reason = reason.clone();
                self.events.push_back(Event::HostLost { agent, reason });
            }
            _ => {}
        }
        self.workers[rank as usize].gone = Some(gone);
    }

    /// R wants to know of the end of this task, which it gave to `owner`.
    pub fn expect(&mut self, task: TaskId, owner: Rank) {
        self.expected.insert(task, Expected { owner, end: None });
    }

    fn take_end(&mut self, task: TaskId) -> Option<(Rank, TaskId, End)> {
        let expected = self.expected.get_mut(&task)?;
        Some((expected.owner, task, expected.end.take()?))
    }

    /// The end of this task, or else the loss of another of the same job, unless that is 0.
    pub fn take(&mut self, task: TaskId, job: JobId) -> Option<(Rank, TaskId, End)> {
        let end = self.take_end(task);
        if end.is_some() || job == 0 || self.lost.is_empty() {
            return end;
        }
        let at = self.lost.iter().position(|lost| lost.0 == job)?;
        self.take_end(self.lost[at].2)
    }

    /// The first task to have ended of the workers that `includes`.
    pub fn take_any(&mut self, includes: impl Fn(Rank) -> bool) -> Option<(Rank, TaskId, End)> {
        let mut at = 0;
        while let Some(&(owner, task)) = self.ready.get(at) {
            if !self.expected.contains_key(&task) {
                // Received by rank, or cancelled.
                self.ready.remove(at);
                continue;
            }
            if includes(owner) {
                self.ready.remove(at);
                if let end @ Some(_) = self.take_end(task) {
                    return end;
                }
                continue;
            }
            at += 1;
        }
        None
    }

    /// R has been told that this task was lost, and decides what becomes of it.
    pub fn told(&mut self, task: TaskId) {
        self.ready.retain(|ready| ready.1 != task);
        self.lost.retain(|lost| lost.2 != task);
    }

    /// R does not try this task again; it is told so when it asks for the answer.
    pub fn give_up(&mut self, task: TaskId) {
        if let Some(expected) = self.expected.get_mut(&task) {
            expected.end = Some(End::GivenUp);
            self.ready.push_back((expected.owner, task));
        }
    }

    /// R knows how this task ended, or does not want to. Returns what there is of an answer.
    pub fn forget(&mut self, task: TaskId) -> usize {
        let end = self.expected.remove(&task).and_then(|e| e.end);
        if self.ready.front().is_some_and(|ready| ready.1 == task) {
            self.ready.pop_front();
        }
        if !self.lost.is_empty() {
            self.lost.retain(|lost| lost.2 != task);
        }
        if self.expected.is_empty() {
            self.ready.clear();
        }
        match end {
            Some(End::Outcome(Outcome::Answer(body))) => body.len,
            _ => 0,
        }
    }

    /// The hub's thread ends. Normally nothing is left to be lost by then.
    pub fn close(&mut self, reason: &str) {
        let gone = Arc::new(Gone::Host(reason.to_owned()));
        for worker in &mut self.workers {
            worker.gone.get_or_insert_with(|| gone.clone());
        }
        for expected in self.expected.values_mut() {
            let lost = || End::Outcome(Outcome::Lost(gone.clone()));
            expected.end.get_or_insert_with(lost);
        }
        self.closed = true;
    }
}
