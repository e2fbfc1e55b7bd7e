//! What the hub knows and R has not been told yet.

use super::futures::Calls;
use crate::head::scheduler::events::{Gone, Interruption, Note, Outcome};
use crate::head::task_table::TaskTable;
use crate::protocol::control::{Facts, Hello, Loss, ToHead, Usage};
use crate::protocol::ids::{JobId, Rank};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of output that wait to be shown: while R does something else, nobody takes them.
const OUTPUT_LIMIT: usize = 16 * 1024 * 1024;
/// Counted for each piece of it, besides its bytes.
const OUTPUT_PIECE: usize = 64;

/// Why a host is gone, with what its agent's command printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFailure {
    /// What the hub or the agent says of it.
    pub reason: String,
    /// The end of what the agent's command wrote to its standard error.
    pub stderr: String,
    /// What the agent's command wrote to its standard output before or instead of the greeting.
    pub stdout: String,
    /// With which status the agent's command exited, if it did.
    pub status: Option<i32>,
}

impl HostFailure {
    /// A failure of which the reason alone is known.
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
    /// A worker ended, or was killed because it did not respond to an interrupt; a fresh one took its place.
    Replaced {
        /// The worker's rank, which the fresh one has too.
        rank: Rank,
        /// The process number of the worker that ended.
        pid: u32,
        /// Why its task was interrupted.
        interruption: Interruption,
    },
    /// A worker that could not be restored at first is there again, as it was.
    Back {
        /// The worker's rank.
        rank: Rank,
    },
    /// A worker was lost, without a task of which R hears.
    Lost {
        /// The worker's rank.
        rank: Rank,
        /// How the worker ended.
        loss: Loss,
        /// Whether a fresh worker takes its place.
        replaced: bool,
    },
    /// A host was lost, or is left out.
    HostLost {
        /// The host's index among all.
        agent: usize,
        /// Why the host was lost.
        reason: String,
    },
    /// A host that was lost is back, with all that was on it.
    HostBack {
        /// The host's index among all.
        agent: usize,
    },
    /// What lasts on the workers of this host is more than it holds: workers that are lost there
    /// will not be replaced.
    StateNotKept {
        /// The host's index among all.
        agent: usize,
    },
    /// What lasts is more than the head holds: hosts that are lost will not be taken back.
    SpoolIncomplete,
    /// An idle worker did not end within the time it has when it is stopped, and was killed.
    StopTimedOut {
        /// The worker's rank.
        rank: Rank,
    },
    /// A worker printed this.
    Output {
        /// The worker's rank.
        rank: Rank,
        /// What the worker wrote to its standard output or standard error.
        bytes: Bytes,
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
}

/// A worker as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct WorkerView {
    /// The place of its host among all.
    pub agent: usize,
    /// The process number of the worker on its host, once it is up.
    pub pid: Option<u32>,
    /// It, or one before it in its place, has been up.
    pub came_up: bool,
    /// Why the worker is gone for good, if it is.
    pub gone: Option<Arc<Gone>>,
    /// Its process has ended, and no other takes its place.
    pub ended: bool,
    /// The job that was open when it was lost for good.
    pub gone_in: JobId,
    /// Its memory, when the question of this number was answered.
    pub usage: Option<(u64, Usage)>,
}

/// A host as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct HostView {
    /// The process that was launched: here the agent itself.
    pub pid: Option<u32>,
    /// The agent's greeting, once it has come.
    pub hello: Option<Hello>,
    /// From the start to the greeting.
    pub greeted: Option<Duration>,
    /// From the start to the last worker that came up.
    pub up: Option<Duration>,
    /// The agent's own message, if it could not start its workers.
    pub start_failure: Option<ToHead>,
    /// Why the host was lost, if it was.
    pub failure: Option<HostFailure>,
    /// The last question after its workers' memory that was asked.
    pub asked: u64,
    /// The last question after its workers' memory that was answered.
    pub told: u64,
    /// The last question after its state that was asked.
    pub dump_asked: u64,
    /// The last question after its state that was answered.
    pub dump_told: u64,
    /// The answer to the last question after its state: of the agent, and of its workers by rank.
    pub dump: Vec<(Option<Rank>, Facts)>,
    /// R knows, or will, that it is lost; that its workers' state is not kept.
    told_lost: bool,
    told_state: bool,
}

/// See the module's documentation.
pub struct Inbox {
    began: Instant,
    /// The job that is open.
    pub job: JobId,
    /// Tasks whose end R wants to know.
    pub tasks: TaskTable,
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
    told_spool: bool,
    pub calls: Calls,
}

impl Inbox {
    pub fn new(hosts: usize) -> Inbox {
        Inbox {
            began: Instant::now(),
            job: 0,
            tasks: TaskTable::default(),
            workers: Vec::new(),
            hosts: vec![HostView::default(); hosts],
            events: VecDeque::new(),
            output: 0,
            mute: false,
            up: 0,
            closed: false,
            told_spool: false,
            calls: Calls::default(),
        }
    }

    pub fn set_workers(&mut self, ranks: &[Vec<Rank>]) {
        let workers = ranks.iter().map(Vec::len).sum();
        self.workers = vec![WorkerView::default(); workers];
        self.tasks.set_workers(workers);
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
                let worker = &mut self.workers[rank as usize];
                // That of a host which is back is up once it is what it was.
                self.up += usize::from(worker.gone.is_none());
                worker.pid = Some(pid);
                worker.came_up = true;
                self.hosts[worker.agent].up = Some(self.began.elapsed());
            }
            Note::Replaced { rank, pid, killed } => {
                let before = self.workers[rank as usize].pid.replace(pid);
                if let Some(interruption) = killed {
                    let pid = before.unwrap_or_default();
                    self.events.push_back(Event::Replaced {
                        rank,
                        pid,
                        interruption,
                    });
                }
            }
            Note::Back { rank, pid } => {
                self.workers[rank as usize].pid = Some(pid);
                self.back(rank);
                self.events.push_back(Event::Back { rank });
            }
            Note::Lost { rank, loss, task } => {
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
            Note::Ended { rank, timed_out } => {
                self.workers[rank as usize].ended = true;
                if timed_out {
                    self.events.push_back(Event::StopTimedOut { rank });
                }
            }
            Note::Done {
                rank,
                task,
                outcome,
                ..
            } if self.calls.expects(task) => self.calls.ended(rank, task, outcome),
            Note::Done {
                task, job, outcome, ..
            } => {
                if let Err(Outcome::Answer(body)) = self.tasks.ended(task, job, outcome) {
                    return body.len;
                }
            }
            Note::LeftBehind {
                agent,
                rank,
                pid,
                command,
            } => self.events.push_back(Event::LeftBehind {
                agent,
                rank,
                pid,
                command,
            }),
            Note::Output { rank, bytes } => self.printed(rank, bytes),
            Note::Usage {
                agent,
                question,
                usages,
                last,
            } => {
                for (rank, usage) in usages {
                    self.workers[rank as usize].usage = Some((question, usage));
                }
                if last {
                    self.hosts[agent].told = question;
                }
            }
            Note::Dump {
                agent,
                question,
                of,
                last,
            } => {
                let workers = self.workers.iter().filter(|worker| worker.agent == agent);
                let most = workers.count() + 1;
                let host = &mut self.hosts[agent];
                // No more than was asked for is held.
                if question == host.dump_asked && host.dump.len() + of.len() <= most {
                    host.dump.extend(of);
                    if last {
                        host.dump_told = question;
                    }
                }
            }
            Note::Aside { task, flags, bytes } => self.calls.told(task, flags, &bytes),
            // Its stream is ended for that reason.
            Note::Failed { .. } => {}
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

    /// Whether something has come to be shown.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// What has come to be shown since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.output = 0;
        self.mute = false;
        self.events.drain(..).collect()
    }

    fn gone(&mut self, rank: Rank, gone: Arc<Gone>) {
        let worker = &mut self.workers[rank as usize];
        let came_up = worker.came_up;
        worker.gone_in = self.job;
        let agent = worker.agent;
        match &*gone {
            Gone::Worker(loss) if came_up => self.events.push_back(Event::Lost {
                rank,
                loss: loss.clone(),
                replaced: false,
            }),
            Gone::Host(reason)
                if came_up && !std::mem::replace(&mut self.hosts[agent].told_lost, true) =>
            {
                let reason = reason.clone();
                self.events.push_back(Event::HostLost { agent, reason });
            }
            _ => {}
        }
        self.workers[rank as usize].gone = Some(gone);
        // It may have been the last that the others waited for.
        self.look_whether_back(rank);
    }

    /// A worker that was gone is there again, and what it was.
    pub fn back(&mut self, rank: Rank) {
        self.workers[rank as usize].gone = None;
        self.workers[rank as usize].ended = false;
        self.look_whether_back(rank);
    }

    /// Tells R if the host of this worker was lost and no worker of it is waited for any more.
    fn look_whether_back(&mut self, rank: Rank) {
        let agent = self.workers[rank as usize].agent;
        let of_host = || self.workers.iter().filter(|w| w.agent == agent);
        let lost = |w: &WorkerView| matches!(w.gone.as_deref(), Some(Gone::Host(_)));
        let waited_for = of_host().any(lost);
        let any = of_host().any(|w| w.gone.is_none());
        if any && !waited_for && self.hosts[agent].told_lost {
            self.hosts[agent].failure = None;
            self.hosts[agent].told_lost = false;
            self.events.push_back(Event::HostBack { agent });
        }
    }

    /// Hosts that are lost will not be taken back.
    pub fn spool_incomplete(&mut self) {
        if !std::mem::replace(&mut self.told_spool, true) {
            self.events.push_back(Event::SpoolIncomplete);
        }
    }

    /// The hub's thread ends. Normally nothing is left to be lost by then.
    pub fn close(&mut self, reason: &str) {
        let gone = Arc::new(Gone::Host(reason.to_owned()));
        for worker in &mut self.workers {
            worker.gone.get_or_insert_with(|| gone.clone());
        }
        self.tasks.close(&gone);
        self.calls.close(&gone);
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
        inbox.note(Note::Up { rank: 0, pid: 1 });
        let interruption = Interruption::TimedOut;
        inbox.note(Note::Replaced {
            rank: 0,
            pid: 2,
            killed: Some(interruption),
        });
        let events = inbox.take_events();
        assert!(events.len() <= OUTPUT_LIMIT / 1000 + 2);
        let replaced = Event::Replaced {
            rank: 0,
            pid: 1,
            interruption,
        };
        assert_eq!(events.last(), Some(&replaced));
        let Event::Output { bytes: told, .. } = &events[events.len() - 2] else {
            panic!("{:?}", events.last());
        };
        assert!(told.ends_with(b"left out\n"));
        // Once it is shown there is room again.
        inbox.note(printed(0, &bytes));
        assert_eq!(inbox.take_events(), [Event::Output { rank: 0, bytes }]);
    }
}
