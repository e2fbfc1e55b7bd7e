//! The inbox: what the hub knows and has not reported to R yet.

use super::adaptive::Arrival;
use super::futures::CallTable;
use super::progress_events::{LIMIT, ProgressEvents};
use crate::head::scheduler::events::{Interruption, Note, Outcome, Termination};
use crate::head::task_table::TaskTable;
use crate::protocol::control::{Facts, Hello, ToHead, Usage, WorkerFailure};
use crate::protocol::ids::{JobId, Rank};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum number of bytes of output that wait to be shown: nobody takes them while R does
/// something else.
const OUTPUT_LIMIT: usize = 16 * 1024 * 1024;
/// Bytes counted for each piece of output besides its content.
const OUTPUT_PIECE: usize = 64;

/// Why a host was lost, with the output of its agent's command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFailure {
    /// The reason that the hub or the agent gives.
    pub reason: String,
    /// The end of what the agent's command wrote to its standard error.
    pub stderr: String,
    /// What the agent's command wrote to its standard output before or instead of the greeting.
    pub stdout: String,
    /// The exit status of the agent's command, if it exited.
    pub status: Option<i32>,
    /// The agent has refused this head, because it has another.
    pub in_use: bool,
}

impl HostFailure {
    /// A failure of which only the reason is known.
    pub fn new(reason: String) -> HostFailure {
        HostFailure {
            reason,
            ..HostFailure::default()
        }
    }
}

/// Events, which R shows when it next checks for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker ended, or was killed because it did not respond to an interrupt, and was replaced.
    Replaced {
        /// The rank of the worker and of its replacement.
        rank: Rank,
        /// The process number of the worker that ended.
        pid: u32,
        /// Why its task was interrupted.
        interruption: Interruption,
    },
    /// A worker that could not be restored at first has been restored.
    Back {
        /// The worker's rank.
        rank: Rank,
    },
    /// A worker failed without a task that R waits for.
    Lost {
        /// The worker's rank.
        rank: Rank,
        /// How the worker ended.
        failure: WorkerFailure,
        /// Whether the worker is replaced.
        replaced: bool,
    },
    /// A host that was to join, or to come back with another batch job, will not.
    HostGivenUp {
        /// The host's index among all.
        agent: usize,
        /// Whether the host was a part of the cluster before.
        joined: bool,
        /// Why, and what the agent's command printed.
        failure: HostFailure,
    },
    /// A host was lost, or is left out.
    HostLost {
        /// The host's index among all.
        agent: usize,
        /// Why the host was lost.
        reason: String,
    },
    /// A host drains: its batch job ends.
    HostDraining {
        /// The host's index among all.
        agent: usize,
        /// Why the job ends.
        reason: String,
        /// Seconds until the end, if they are known.
        seconds: Option<u32>,
    },
    /// A lost host has been reconnected and its workers restored.
    HostBack {
        /// The host's index among all.
        agent: usize,
    },
    /// A host has joined late, and its workers have the cluster's state.
    HostJoined {
        /// The host's index among all.
        agent: usize,
    },
    /// The set-up log of this host exceeds its limit: workers that fail there will not be replaced.
    StateNotLogged {
        /// The host's index among all.
        agent: usize,
    },
    /// The head's set-up log exceeds its limit: lost hosts will not be reconnected.
    SetupLogIncomplete,
    /// What a session that takes over the cluster must know could not be written.
    NotRecorded {
        /// The file and the error.
        reason: String,
    },
    /// A stopped idle worker did not end within `stop_timeout` and was killed.
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
}

/// A worker as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct WorkerView {
    /// The index of the worker's host among all.
    pub agent: usize,
    /// The process number of the worker on its host, once it is up.
    pub pid: Option<u32>,
    /// The worker or one of its predecessors has been up.
    pub came_up: bool,
    /// Why the worker terminated, if it has.
    pub termination: Option<Arc<Termination>>,
    /// The worker's process has ended, and there is no replacement.
    pub ended: bool,
    /// The job that was open when the worker terminated.
    pub terminated_in: JobId,
    /// The worker's memory use, when the question of this number was answered.
    pub usage: Option<(u64, Usage)>,
}

/// A host as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct HostView {
    /// The name of the host in messages.
    pub name: String,
    /// The machine of an agent that has dialled back, as it names itself.
    pub node: Option<String>,
    /// The address from which the agent has dialled back.
    pub peer: Option<std::net::SocketAddr>,
    /// The batch engine's name for the job of an agent that has dialled back, if the agent knows it.
    pub job: Option<String>,
    /// The process that was launched: on this machine the agent itself.
    pub pid: Option<u32>,
    /// The agent's greeting, once it has come.
    pub hello: Option<Hello>,
    /// From the start of the cluster to that of a host that was added later.
    pub added: Duration,
    /// From the start of the host to the greeting.
    pub greeted: Option<Duration>,
    /// From the start of the host to the last worker that came up.
    pub up: Option<Duration>,
    /// The agent's own message, if it could not start its workers.
    pub start_failure: Option<ToHead>,
    /// Why the host was lost, if it was.
    pub failure: Option<HostFailure>,
    /// The agent had not greeted when the others were started, or its batch job has ended; it may still join.
    pub awaited: bool,
    /// How many agents of batch jobs have been lost.
    pub jobs_lost: u32,
    /// Why the host is draining or has been drained: its batch job ends, or the user removes it.
    pub draining: Option<String>,
    /// The number of the last memory question that was asked.
    pub asked: u64,
    /// The number of the last memory question that was answered.
    pub answered_question: u64,
    /// The last question after its state that was asked.
    pub dump_asked: u64,
    /// The last question after its state that was answered.
    pub dump_answered: u64,
    /// The answer to the last question after its state: of the agent, and of its workers by rank.
    pub dump: Vec<(Option<Rank>, Facts)>,
    /// The stream of an agent is attached.
    pub linked: bool,
    /// Jobs of the host come and go with the work: it is no event that it joins.
    pub adaptive: bool,
    /// A worker of the present agent has come up.
    job_arrived: bool,
    /// The host is being added to the cluster: nothing is reported.
    pub adding: bool,
    /// The agent has ended for good.
    pub over: bool,
    /// Whether the loss of the host, and an incomplete set-up log, have been reported to R or will be.
    reported_lost: bool,
    reported_state: bool,
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
    /// Bytes of output among the events, as counted against the limit.
    output: usize,
    /// Whether output is left out, since too much waited.
    mute: bool,
    /// Whether R wants progress events of tasks that are no calls.
    pub wants_progress: bool,
    /// Progress events of these tasks.
    progress_events: ProgressEvents,
    /// Workers that have come up.
    pub up: usize,
    /// How often a worker has joined or come back.
    pub arrivals: u64,
    /// The hub's thread has ended.
    pub closed: bool,
    reported_setup_log: bool,
    /// Jobs of adaptive launchers of which a worker has come up, until R takes them.
    pub job_arrivals: Vec<Arrival>,
    pub calls: CallTable,
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
            wants_progress: false,
            progress_events: ProgressEvents::default(),
            up: 0,
            arrivals: 0,
            closed: false,
            reported_setup_log: false,
            job_arrivals: Vec::new(),
            calls: CallTable::default(),
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

    /// Adds a host to the cluster.
    pub fn add_host(&mut self, name: &str) {
        self.hosts.push(HostView {
            name: name.to_owned(),
            adding: true,
            added: self.began.elapsed(),
            ..HostView::default()
        });
    }

    /// Adds workers of this host.
    pub fn add_workers(&mut self, agent: usize, count: usize) {
        let worker = WorkerView {
            agent,
            ..WorkerView::default()
        };
        self.workers.resize(self.workers.len() + count, worker);
        self.tasks.add_workers(count);
    }

    /// An agent has greeted.
    pub fn greeted(&mut self, agent: usize, hello: Hello) {
        let host = &mut self.hosts[agent];
        host.hello = Some(hello);
        host.draining = None;
        host.job_arrived = false;
        host.greeted = Some(self.began.elapsed().saturating_sub(host.added));
    }

    /// Processes a note of the scheduler. Returns the bytes of answers that nobody expects.
    pub fn note(&mut self, note: Note) -> usize {
        match note {
            Note::Up { rank, pid } => {
                let worker = &mut self.workers[rank as usize];
                // A worker of a reconnected host counts as up once it has been restored.
                self.up += usize::from(worker.termination.is_none());
                worker.pid = Some(pid);
                worker.came_up = true;
                let agent = worker.agent;
                let host = &mut self.hosts[agent];
                host.up = Some(self.began.elapsed().saturating_sub(host.added));
                if host.adaptive && !std::mem::replace(&mut host.job_arrived, true) {
                    let job = host.job.clone();
                    self.job_arrivals.push(Arrival { agent, job });
                }
            }
            // The core has processed these.
            Note::SetupCalls { .. } | Note::SetupCall { .. } | Note::KeptAnswers { .. } => {}
            Note::Kept { rank, pid } => self.workers[rank as usize].pid = Some(pid),
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
            Note::Lost {
                rank,
                failure,
                task,
            } => {
                if !task {
                    self.events.push_back(Event::Lost {
                        rank,
                        failure,
                        replaced: true,
                    });
                }
            }
            Note::StateNotLogged { rank } => {
                let agent = self.workers[rank as usize].agent;
                if !std::mem::replace(&mut self.hosts[agent].reported_state, true) {
                    self.events.push_back(Event::StateNotLogged { agent });
                }
            }
            Note::LeftOut { agent, reason } => {
                let failure = &mut self.hosts[agent].failure;
                failure.get_or_insert_with(|| HostFailure::new(reason));
            }
            Note::Draining {
                agent,
                reason,
                seconds,
            } => {
                self.hosts[agent].draining = Some(reason.clone());
                self.events.push_back(Event::HostDraining {
                    agent,
                    reason,
                    seconds,
                });
            }
            Note::GivenBack { agent } => {
                self.hosts[agent].draining = Some("nothing to do".into());
            }
            Note::Drained { agent, removed } => {
                let draining = &mut self.hosts[agent].draining;
                if removed {
                    draining.get_or_insert_with(|| "removed".into());
                }
            }
            Note::Terminated { rank, termination } => self.terminated(rank, termination),
            Note::Ended { rank, timed_out } => {
                self.workers[rank as usize].ended = true;
                if timed_out {
                    self.events.push_back(Event::StopTimedOut { rank });
                }
            }
            // A page shows it.
            Note::TimedOut { .. } | Note::TaskFailed { .. } => {}
            Note::Done {
                rank,
                task,
                outcome,
                ..
            } if self.calls.expects(task) => self.calls.ended(rank, task, outcome),
            Note::Done {
                task, job, outcome, ..
            } => {
                self.progress_events.drop_incomplete(task);
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
                    self.hosts[agent].answered_question = question;
                }
            }
            Note::Dump {
                agent,
                question,
                of,
                last,
            } => {
                let workers = self.workers.iter().filter(|worker| worker.agent == agent);
                let max = workers.count() + 1;
                let host = &mut self.hosts[agent];
                // Facts that were not requested are dropped, so that an agent cannot fill the memory.
                if question == host.dump_asked && host.dump.len() + of.len() <= max {
                    host.dump.extend(of);
                    if last {
                        host.dump_answered = question;
                    }
                }
            }
            Note::ProgressEvent { task, flags, bytes } if self.calls.expects(task) => {
                self.calls.progress(task, flags, &bytes);
            }
            Note::ProgressEvent { task, flags, bytes } => {
                if self.wants_progress {
                    self.progress_events.add(task, flags, &bytes, LIMIT);
                }
            }
            // Its stream is closed for that reason.
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

    /// Whether there are events for R to show.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty() || !self.progress_events.is_empty()
    }

    /// Takes the events since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.output = 0;
        self.mute = false;
        self.events.drain(..).collect()
    }

    /// Takes the progress events of tasks since the last call.
    pub fn take_progress(&mut self) -> Vec<Vec<u8>> {
        self.progress_events.take()
    }

    fn terminated(&mut self, rank: Rank, termination: Arc<Termination>) {
        let worker = &mut self.workers[rank as usize];
        let agent = worker.agent;
        let came_up = worker.came_up && !self.hosts[agent].adding;
        worker.terminated_in = self.job;
        match &*termination {
            Termination::Worker(failure) if came_up => self.events.push_back(Event::Lost {
                rank,
                failure: failure.clone(),
                replaced: false,
            }),
            Termination::Host(reason)
                if came_up && !std::mem::replace(&mut self.hosts[agent].reported_lost, true) =>
            {
                let reason = reason.clone();
                self.events.push_back(Event::HostLost { agent, reason });
            }
            // The drain has been reported.
            Termination::JobEnded(_) if self.hosts[agent].draining.is_some() => {
                self.hosts[agent].reported_lost |= came_up;
            }
            _ => {}
        }
        self.workers[rank as usize].termination = Some(termination);
        // The worker may have been the last that a reconnected host waited for.
        self.check_whether_back(rank);
    }

    /// A terminated worker is back and has been restored.
    pub fn back(&mut self, rank: Rank) {
        let worker = &mut self.workers[rank as usize];
        worker.termination = None;
        worker.ended = false;
        self.arrivals += 1;
        self.up += usize::from(self.hosts[worker.agent].awaited);
        self.check_whether_back(rank);
    }

    /// Reports that the host of this worker is back, if it was lost and none of its workers is
    /// waited for any more.
    fn check_whether_back(&mut self, rank: Rank) {
        let agent = self.workers[rank as usize].agent;
        let host = &self.hosts[agent];
        if !host.awaited && !host.reported_lost {
            return;
        }
        let of_host = || self.workers.iter().filter(|w| w.agent == agent);
        let lost = |w: &WorkerView| w.termination.as_ref().is_some_and(|t| t.is_of_host());
        let waited_for = of_host().any(lost);
        let any = of_host().any(|w| w.termination.is_none());
        if any && !waited_for && std::mem::take(&mut self.hosts[agent].awaited) {
            self.hosts[agent].failure = None;
            self.hosts[agent].reported_lost = false;
            if !self.hosts[agent].adding && !self.hosts[agent].adaptive {
                self.events.push_back(Event::HostJoined { agent });
            }
        }
        if any && !waited_for && self.hosts[agent].reported_lost {
            self.hosts[agent].failure = None;
            self.hosts[agent].reported_lost = false;
            self.events.push_back(Event::HostBack { agent });
        }
    }

    /// The agent of a batch job has been lost, or has ended with its job, and another is awaited.
    pub fn job_lost(&mut self, agent: usize, reason: &str) {
        let host = &mut self.hosts[agent];
        // A drain has been reported.
        let report =
            !host.adding && !host.awaited && host.draining.is_none() && !host.reported_lost;
        host.awaited = true;
        host.reported_lost = true;
        host.jobs_lost += 1;
        if report {
            let reason = reason.to_owned();
            self.events.push_back(Event::HostLost { agent, reason });
        }
    }

    /// A host that was awaited will not join.
    pub fn give_up(&mut self, agent: usize, failure: HostFailure) {
        let host = &mut self.hosts[agent];
        host.awaited = false;
        host.reported_lost = true;
        if !host.adding {
            let joined = host.jobs_lost > 0;
            self.events.push_back(Event::HostGivenUp {
                agent,
                joined,
                failure,
            });
        }
    }

    /// Reports an event to R.
    pub fn push_event(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// Reports once that lost hosts will not be reconnected.
    pub fn setup_log_incomplete(&mut self) {
        if !std::mem::replace(&mut self.reported_setup_log, true) {
            self.events.push_back(Event::SetupLogIncomplete);
        }
    }

    /// The hub's thread ends. Usually nothing is outstanding by then.
    pub fn close(&mut self, reason: &str) {
        let termination = Arc::new(Termination::Host(reason.to_owned()));
        for worker in &mut self.workers {
            worker
                .termination
                .get_or_insert_with(|| termination.clone());
        }
        self.tasks.close(&termination);
        self.calls.close(&termination);
        self.closed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::{FIRST, LAST};

    #[test]
    fn output_that_is_not_taken_is_bounded_and_reported_as_truncated() {
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
        let Event::Output { bytes: notice, .. } = &events[events.len() - 2] else {
            panic!("{:?}", events.last());
        };
        assert!(notice.ends_with(b"left out\n"));
        // Once the output is taken, there is room again.
        inbox.note(printed(0, &bytes));
        assert_eq!(inbox.take_events(), [Event::Output { rank: 0, bytes }]);
    }

    #[test]
    fn progress_of_tasks_is_taken_in_whole_events_and_bounded() {
        let mut inbox = Inbox::new(1);
        inbox.set_workers(&[vec![0]]);
        let report = |inbox: &mut Inbox, task, flags, bytes: &[u8]| {
            let bytes = Bytes::copy_from_slice(bytes);
            inbox.note(Note::ProgressEvent { task, flags, bytes });
        };
        report(&mut inbox, 1, FIRST | LAST, b"nobody wants it");
        inbox.wants_progress = true;
        report(&mut inbox, 1, FIRST, b"a");
        report(&mut inbox, 2, FIRST | LAST, b"b");
        report(&mut inbox, 1, LAST, b"c");
        report(&mut inbox, 2, FIRST, b"its worker dies");
        assert_eq!(inbox.take_progress(), [b"b".to_vec(), b"ac".to_vec()]);
        inbox.note(Note::Done {
            rank: 0,
            task: 2,
            job: 1,
            outcome: Outcome::TimedOut,
        });
        report(&mut inbox, 2, LAST, b"of nothing");
        assert!(inbox.take_progress().is_empty());
        let large = vec![0; LIMIT / 2];
        for _ in 0..3 {
            report(&mut inbox, 3, FIRST | LAST, &large);
        }
        report(&mut inbox, 4, FIRST, &large);
        assert_eq!(inbox.take_progress().len(), 2);
        report(&mut inbox, 3, FIRST, &large);
        report(&mut inbox, 3, 0, &large);
        report(&mut inbox, 3, LAST, &large);
        assert!(inbox.take_progress().is_empty());
        report(&mut inbox, 3, FIRST | LAST, b"there is room again");
        assert_eq!(inbox.take_progress().len(), 1);
    }
}
