//! What the hub knows and R has not been told yet.

use crate::message::{Hello, ToHead};
use crate::scheduler::{Gone, JobId, Note, Outcome, Rank, TaskId};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of output that wait to be shown: while R does something else, nobody takes them.
const OUTPUT_LIMIT: usize = 16 * 1024 * 1024;
/// Counted for each piece of it, besides its bytes.
const OUTPUT_PIECE: usize = 64;

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
}

/// See the module's documentation.
pub struct Inbox {
    began: Instant,
    /// Tasks whose end R wants to know, with the outcome once there is one.
    expected: HashMap<TaskId, Option<Outcome>>,
    /// Ended tasks in the order of their ends. May hold tasks that are no longer expected.
    ready: VecDeque<(Rank, TaskId)>,
    /// Lost tasks that R has not been told of.
    lost: Vec<(JobId, Rank, TaskId)>,
    pub workers: Vec<WorkerView>,
    pub hosts: Vec<HostView>,
    events: VecDeque<Event>,
    /// Bytes of output among the events, as they are counted.
    output: usize,
    /// Whether output is left out, since too much waited.
    mute: bool,
    /// Workers that have come up.
    pub up: usize,
    /// The hub's thread has ended.
    pub closed: bool,
}

impl Inbox {
    pub fn new(hosts: usize) -> Inbox {
        Inbox {
            began: Instant::now(),
            expected: HashMap::new(),
            ready: VecDeque::new(),
            lost: Vec::new(),
            workers: Vec::new(),
            hosts: vec![HostView::default(); hosts],
            events: VecDeque::new(),
            output: 0,
            mute: false,
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
            Note::Replaced { rank, pid } => {
                self.workers[rank as usize].pid = Some(pid);
                self.events.push_back(Event::Replaced { rank });
            }
            Note::Gone { rank, gone } => self.workers[rank as usize].gone = Some(gone),
            Note::Done {
                rank,
                task,
                job,
                outcome,
            } => match self.expected.get_mut(&task) {
                Some(slot) => {
                    if matches!(outcome, Outcome::Lost(_)) {
                        self.lost.push((job, rank, task));
                    }
                    *slot = Some(outcome);
                    self.ready.push_back((rank, task));
                }
                None => {
                    if let Outcome::Answer(body) = outcome {
                        return body.len;
                    }
                }
            },
            Note::Output { rank, bytes } => self.printed(rank, bytes),
            Note::StartFailed { agent, reason } => self.hosts[agent].start_failure = Some(reason),
        }
        0
    }

    fn printed(&mut self, rank: Rank, bytes: Bytes) {
        if self.mute {
            return;
        }
        self.output += bytes.len() + OUTPUT_PIECE;
        self.mute = self.output > OUTPUT_LIMIT;
        self.events.push_back(Event::Output { rank, bytes });
        if self.mute {
            let bytes =
                Bytes::from_static(b"\n... too much output to be kept: the rest is left out\n");
            self.events.push_back(Event::Output { rank, bytes });
        }
    }

    /// What has come to be shown since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.output = 0;
        self.mute = false;
        self.events.drain(..).collect()
    }

    /// R wants to know of this task's end.
    pub fn expect(&mut self, task: TaskId) {
        self.expected.insert(task, None);
    }

    /// The end of this task, or else the loss of another of the same job, unless that is 0.
    pub fn take(
        &mut self,
        rank: Rank,
        task: TaskId,
        job: JobId,
    ) -> Option<(Rank, TaskId, Outcome)> {
        if let Some(outcome) = self.expected.get_mut(&task).and_then(Option::take) {
            return Some((rank, task, outcome));
        }
        if job == 0 || self.lost.is_empty() {
            return None;
        }
        let at = self.lost.iter().position(|lost| lost.0 == job)?;
        let (_, rank, task) = self.lost[at];
        let outcome = self.expected.get_mut(&task).and_then(Option::take)?;
        Some((rank, task, outcome))
    }

    /// The first task to have ended of the workers that `includes`.
    pub fn take_any(&mut self, includes: impl Fn(Rank) -> bool) -> Option<(Rank, TaskId, Outcome)> {
        let mut at = 0;
        while let Some(&(rank, task)) = self.ready.get(at) {
            let Some(slot) = self.expected.get_mut(&task) else {
                // Received by rank, or cancelled.
                self.ready.remove(at);
                continue;
            };
            if includes(rank) {
                self.ready.remove(at);
                if let Some(outcome) = slot.take() {
                    return Some((rank, task, outcome));
                }
                continue;
            }
            at += 1;
        }
        None
    }

    /// R knows how this task ended, or does not want to. Returns what there is of an answer.
    pub fn forget(&mut self, rank: Rank, task: TaskId) -> usize {
        let outcome = self.expected.remove(&task).flatten();
        if self.ready.front() == Some(&(rank, task)) {
            self.ready.pop_front();
        }
        self.lost.retain(|lost| lost.2 != task);
        if self.expected.is_empty() {
            self.ready.clear();
        }
        match outcome {
            Some(Outcome::Answer(body)) => body.len,
            _ => 0,
        }
    }

    /// The hub's thread ends. Normally nothing is left to be lost by then.
    pub fn close(&mut self, reason: &str) {
        let gone = Arc::new(Gone::Host(reason.to_owned()));
        for worker in &mut self.workers {
            worker.gone.get_or_insert_with(|| gone.clone());
        }
        for slot in self.expected.values_mut() {
            slot.get_or_insert_with(|| Outcome::Lost(gone.clone()));
        }
        self.closed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_that_nobody_takes_is_bounded_and_its_end_is_told() {
        let mut inbox = Inbox::new(1);
        inbox.set_workers(&[vec![0]]);
        let bytes = Bytes::from(vec![b'x'; 1000]);
        let printed = |rank, bytes: &Bytes| Note::Output {
            rank,
            bytes: bytes.clone(),
        };
        for _ in 0..OUTPUT_LIMIT / 500 {
            inbox.note(printed(0, &bytes));
        }
        inbox.note(Note::Replaced { rank: 0, pid: 1 });
        let events = inbox.take_events();
        assert!(events.len() <= OUTPUT_LIMIT / 1000 + 2);
        assert_eq!(events.last(), Some(&Event::Replaced { rank: 0 }));
        let Event::Output { bytes: told, .. } = &events[events.len() - 2] else {
            panic!("{:?}", events.last());
        };
        assert!(told.ends_with(b"left out\n"));
        // Once it is shown there is room again.
        inbox.note(printed(0, &bytes));
        assert_eq!(inbox.take_events(), [Event::Output { rank: 0, bytes }]);
    }
}
