//! The hub's handle for R's thread. It belongs to that thread and never calls R.

use super::connection::Plan;
use super::core::{Core, SPIN_TIME, SPIN_TIME_SINGLE, SharedCore};
use super::futures::{CallEnd, Waker};
use super::grow::progress_of_added;
use super::inbox::{Event, HostFailure, HostView, Inbox, WorkerView};
use super::readiness::ReadinessListener;
use super::thread::run;
use super::writing::{BlobWriting, MessageWriting, NO_JOB};
use crate::head::launch::{Launch, Source};
use crate::head::scheduler::events::{Demand, Outcome, RankSet, Termination};
use crate::head::scheduler::pool::CallLocation;
use crate::head::setup_log_file::SetupLogFile;
use crate::head::task_table::End;
use crate::platform::signals;
use crate::protocol::body::Body;
use crate::protocol::control::{Hello, ToAgent, ToHead, WorkerFailure};
use crate::protocol::error::ProtocolError;
use crate::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::sync::mpsc;

/// The answer that R receives to a task.
#[derive(Debug)]
pub enum Answer {
    /// A task's result has arrived.
    Ready {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The worker that had the task.
        assigned: Rank,
        /// The task that was answered.
        task: TaskId,
        /// The bytes of the result.
        body: Body,
    },
    /// The worker of the task failed. This answer is repeated until [`Hub::try_again`],
    /// [`Hub::give_up`] or [`Hub::forget`] is called.
    Lost {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The worker that had it.
        assigned: Rank,
        /// The task that was lost.
        task: TaskId,
        /// How the worker terminated.
        termination: Arc<Termination>,
    },
    /// The task exceeded its time limit.
    TimedOut {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The task that exceeded its time limit.
        task: TaskId,
    },
    /// The task was revoked before it started: see [`Hub::revoke`].
    Revoked {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The task, which R may give to another worker.
        task: TaskId,
    },
    /// [`Hub::give_up`] was called for the task.
    GivenUp {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The task, which is not retried.
        task: TaskId,
    },
    /// There is no answer yet.
    Pending,
    /// There is no task to wait for.
    NothingSent,
}

/// How far a start has come.
#[derive(Debug)]
pub enum Progress {
    /// Not all workers have come up yet.
    Starting {
        /// Workers that have come up.
        up: usize,
    },
    /// All workers have come up.
    Up,
    /// The agent has refused to start.
    Refused {
        /// The host's index among all.
        host: usize,
        /// The agent's own message.
        reason: ToHead,
    },
    /// A host was lost before its workers came up.
    HostFailed {
        /// The host's index among all.
        host: usize,
        /// Why, and what the agent's command printed.
        failure: HostFailure,
    },
    /// A worker failed before it came up.
    WorkerFailed {
        /// The worker's rank.
        rank: Rank,
        /// How the worker ended.
        failure: WorkerFailure,
    },
}

/// Bits of the numbers of tasks and blobs that one head may use. R reads the numbers as doubles.
const GENERATION_BITS: u32 = 36;

pub(super) struct Inner {
    pub(super) shared_core: Arc<SharedCore>,
    thread: Option<JoinHandle<()>>,
}

/// See the module's documentation. Dropping the hub stops the cluster without waiting for its end.
pub struct Hub {
    /// Not dropped in a forked child, which has neither the thread nor, perhaps, the owner of a
    /// lock.
    pub(super) inner: ManuallyDrop<Inner>,
    /// The process that may use it.
    owner: u32,
    /// Number of workers that the cluster has had.
    pub(super) size: usize,
    /// The first of the hosts that were added last.
    pub(super) newest: usize,
    /// The count of changes at the last [`Hub::receive_any`].
    seen: (u64, RankSet),
    /// The workers that have had tasks of the last job. Other workers may not have what its tasks
    /// need.
    pub(super) members: (JobId, Vec<bool>),
    pub(super) next_task: TaskId,
    /// A message is being written.
    pub(super) writing: Option<MessageWriting>,
    /// Bytes that R has written so far.
    pub(super) written: u64,
    /// A blob is being written.
    pub(super) blob_writing: Option<BlobWriting>,
    pub(super) next_blob: BlobId,
    /// Whether any agent has a chunk cache.
    pub(super) has_chunk_cache: bool,
    /// Listens for the connection of [`Hub::listen_for_readiness`].
    listener: Option<ReadinessListener>,
}

impl Hub {
    /// Starts the hub's thread, which starts the agents; [`Hub::greeted`] and [`Hub::go`] follow.
    /// `result_limit`: bytes of results to
    /// buffer.
    ///
    /// # Errors
    /// When the system has no thread or descriptor left.
    pub fn start(hosts: Vec<Launch>, hello: Hello, result_limit: usize) -> io::Result<Hub> {
        let streams = mio::Poll::new()?;
        let registry = streams.registry().try_clone()?;
        let shared_core = Arc::new(SharedCore::new(hosts.len(), result_limit, registry)?);
        for (agent, host) in hosts.iter().enumerate() {
            let dials = matches!(host.source, Source::DialBack { .. });
            let missed = match &host.source {
                Source::Waiting { missed, .. } => Some(*missed),
                Source::DialBack { lingers, .. } => lingers.as_ref().map(|agent| agent.missed),
                Source::Command { .. } => None,
            };
            let mut core = shared_core.core();
            if let Some(missed) = missed {
                core.missed.waits(agent, missed);
            }
            core.conns[agent].dials = dials;
            core.inbox.hosts[agent].name.clone_from(&host.host);
        }
        let theirs = shared_core.clone();
        let (launches, to_launch) = mpsc::unbounded_channel();
        for launch in hosts.into_iter().enumerate() {
            let _ = launches.send(launch);
        }
        shared_core.core().launches = Some(launches);
        let listeners = shared_core.core().dial_back.open();
        let (orders, to_serve) = mpsc::unbounded_channel();
        shared_core.core().orders = Some(orders);
        let body = move || {
            let result = catch_unwind(AssertUnwindSafe(|| {
                run(to_launch, hello, &theirs, streams, (listeners, to_serve));
            }));
            let mut core = theirs.core();
            core.inbox.close(match result {
                Ok(()) => "the cluster was stopped",
                Err(_) => "the head's event loop failed: this is a bug in rustcluster",
            });
            core.changed();
        };
        let thread = signals::with_all_blocked(|| {
            thread::Builder::new()
                .name("rustcluster-hub".into())
                .spawn(body)
        })?;
        let inner = Inner {
            shared_core,
            thread: Some(thread),
        };
        Ok(Hub::new(inner))
    }

    fn new(inner: Inner) -> Hub {
        Hub {
            inner: ManuallyDrop::new(inner),
            owner: std::process::id(),
            size: 0,
            newest: 0,
            seen: (0, RankSet::default()),
            members: (NO_JOB, Vec::new()),
            next_task: 1,
            writing: None,
            written: 0,
            blob_writing: None,
            next_blob: 1,
            has_chunk_cache: false,
            listener: None,
        }
    }

    /// A hub with this many hosts, without a thread that serves them.
    pub(super) fn without_thread(hosts: usize, result_limit: usize) -> io::Result<Hub> {
        let registry = mio::Poll::new()?.registry().try_clone()?;
        let shared_core = Arc::new(SharedCore::new(hosts, result_limit, registry)?);
        Ok(Hub::new(Inner {
            shared_core,
            thread: None,
        }))
    }

    /// Whether this process is a fork of the one that started the cluster. If so, nothing else
    /// may be called.
    pub fn is_forked(&self) -> bool {
        self.owner != std::process::id()
    }

    /// Number of workers that the cluster has had.
    pub fn size(&self) -> usize {
        self.size
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.inner.shared_core.core()
    }

    pub(super) fn shared_core(&self) -> &SharedCore {
        &self.inner.shared_core
    }

    /// Whether all agents, or those that were added last, have greeted or failed; waits up to `max_wait` for that.
    pub fn greeted(&self, max_wait: Duration) -> bool {
        let greeted = |core: &mut Core| {
            let mut hosts = core.inbox.hosts.iter().skip(self.newest);
            let known = hosts.all(|host| host.hello.is_some() || host.failure.is_some());
            known.then_some(())
        };
        self.inner.shared_core.wait(max_wait, greeted).is_some()
    }

    /// Turns on reconnection of lost hosts. The head keeps the set-up log in a file of up to
    /// `max_bytes` bytes at `path`. `start_timeout`: how long a reconnected host may take to start.
    /// To be called before [`Hub::go`].
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn reconnect(
        &mut self,
        path: &Path,
        max_bytes: u64,
        start_timeout: Duration,
    ) -> io::Result<()> {
        self.keep_setup_log(path, max_bytes, start_timeout)?;
        self.core().reconnects = true;
        Ok(())
    }

    /// Keeps the set-up log in a file of up to `max_bytes` bytes at `path`, for hosts that join
    /// late. `start_timeout`: how long such a host may take from its greeting to its workers. To be
    /// called before [`Hub::go`].
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn keep_setup_log(
        &mut self,
        path: &Path,
        max_bytes: u64,
        start_timeout: Duration,
    ) -> io::Result<()> {
        let setup_log = SetupLogFile::new(path, max_bytes)?;
        let mut core = self.core();
        core.setup_log = Some(setup_log);
        core.start_timeout = start_timeout;
        Ok(())
    }

    /// Whether a host is reconnected when it is lost.
    pub fn takes_back(&self, agent: usize) -> bool {
        self.core().takes_back(agent)
    }

    /// Sets the time limit of all tasks, from when the worker has the whole message. To be called
    /// before [`Hub::go`].
    pub fn limit_all(&mut self, limit: Option<Duration>) {
        self.core().time_limit = limit;
    }

    /// Sends each agent that has greeted its plan, or, without a plan, the request to end. An agent
    /// that has not greeted yet gets its plan when it greets, if there is a set-up log. The plans
    /// contain all ranks from 0.
    ///
    /// # Errors
    /// When a plan does not fit into one message.
    pub fn go(&mut self, plans: Vec<Option<Plan>>) -> Result<(), ProtocolError> {
        let ranks = |plan: &Option<Plan>| plan.as_ref().map_or(vec![], |plan| plan.ranks.clone());
        let ranks: Vec<Vec<Rank>> = plans.iter().map(ranks).collect();
        self.size = ranks.iter().map(Vec::len).sum();
        let shared_core = self.inner.shared_core.clone();
        let mut core = shared_core.core();
        core.set_ranks(ranks);
        let members = 0..self.size as Rank;
        if let Some(setup_log) = &mut core.setup_log {
            setup_log.set_members(members);
        }
        self.has_chunk_cache = false;
        for (agent, plan) in plans.into_iter().enumerate() {
            match plan {
                Some(plan) => {
                    self.has_chunk_cache |= plan.start.chunk_cache_bytes > 0;
                    core.set_plan(agent, &plan.start);
                    let host = &core.inbox.hosts[agent];
                    let greeted = host.hello.is_some() || host.failure.is_some();
                    if !greeted && core.setup_log.is_some() {
                        core.await_host(agent, plan.start);
                        continue;
                    }
                    let start = ToAgent::Start(plan.start);
                    core.scheduler.send_control(agent, &start)?;
                    core.conns[agent].planned.notify_one();
                }
                None => {
                    core.scheduler.send_control(agent, &ToAgent::Stop)?;
                    core.conns[agent].stop.notify_one();
                }
            }
        }
        core.pump();
        Ok(())
    }

    /// The progress of the start, or of the hosts that were added last; waits up to `max_wait` for its end. `tolerant`: failures do not
    /// end the start, and are found in [`Hub::hosts`] and [`Hub::worker`].
    pub fn progress(&self, tolerant: bool, max_wait: Duration) -> Progress {
        let ended = self.inner.shared_core.wait(max_wait, |core| {
            if self.newest > 0 {
                return progress_of_added(core, self.newest, tolerant);
            }
            let inbox = &core.inbox;
            if tolerant {
                // Workers of awaited hosts are terminated until these join.
                let known = |w: &WorkerView| w.pid.is_some() || w.termination.is_some();
                return inbox.workers.iter().all(known).then_some(Progress::Up);
            }
            for (host, view) in inbox.hosts.iter().enumerate() {
                if let Some(reason) = view.start_failure.clone() {
                    return Some(Progress::Refused { host, reason });
                }
            }
            for (rank, worker) in inbox.workers.iter().enumerate() {
                if let Some(Termination::Worker(failure)) = worker.termination.as_deref() {
                    let (rank, failure) = (rank as Rank, failure.clone());
                    return Some(Progress::WorkerFailed { rank, failure });
                }
            }
            for (host, view) in inbox.hosts.iter().enumerate() {
                if let Some(failure) = view.failure.clone() {
                    return Some(Progress::HostFailed { host, failure });
                }
            }
            let awaited = |w: &&WorkerView| inbox.hosts[w.agent].awaited;
            let awaited = inbox.workers.iter().filter(awaited).count();
            (inbox.up + awaited >= inbox.workers.len()).then_some(Progress::Up)
        });
        ended.unwrap_or_else(|| {
            let core = self.core();
            let up = |w: &&WorkerView| w.pid.is_some() && w.termination.is_none();
            let of_added = core.inbox.workers.iter().filter(|w| w.agent >= self.newest);
            Progress::Starting {
                up: match self.newest {
                    0 => core.inbox.up,
                    _ => of_added.filter(up).count(),
                },
            }
        })
    }

    /// Stops an agent for this reason: the cluster goes on without its host.
    pub fn leave_out(&mut self, agent: usize, reason: String) {
        let mut core = self.core();
        core.leave_out(agent, reason);
        core.pump();
    }

    /// Leaves out the hosts without any worker that is up, and stops workers of other hosts that
    /// are not up.
    pub fn leave_out_late(&mut self, reason: &str) {
        let mut core = self.core();
        for agent in self.newest..core.inbox.hosts.len() {
            let workers = core.inbox.workers.iter().enumerate();
            let of_host =
                workers.filter(|(_, worker)| worker.agent == agent && worker.termination.is_none());
            let (up, late): (Vec<_>, Vec<_>) = of_host
                .map(|(rank, worker)| (rank as Rank, worker.came_up))
                .partition(|&(_, came_up)| came_up);
            match (up.is_empty(), late.is_empty()) {
                (_, true) => {}
                (true, _) => core.leave_out(agent, reason.to_owned()),
                (false, _) => {
                    for (rank, _) in late {
                        core.scheduler.stop_worker(rank);
                    }
                }
            }
        }
        core.pump();
    }

    /// Gives up a failed task: it is not retried, and its answer is [`Answer::GivenUp`].
    pub fn give_up(&mut self, task: TaskId) {
        let mut core = self.core();
        core.inbox.tasks.give_up(task);
        if let Some(assigned) = core.inbox.tasks.assigned(task) {
            core.scheduler.abandon_task(assigned, task);
            core.pump();
        }
    }

    /// Forgets a failed task: its answer is not wanted any more.
    pub fn forget(&mut self, task: TaskId) {
        let mut core = self.core();
        if let Some(assigned) = forget(&mut core, task) {
            core.scheduler.abandon_task(assigned, task);
            core.pump();
        }
    }

    /// The least busy worker of a job, to run a task on behalf of a terminated worker. `None` if
    /// that worker was stopped, or if the task is a set-up call, which is bound to its worker.
    pub(super) fn elsewhere(
        &self,
        core: &Core,
        rank: Rank,
        termination: &Termination,
        job: JobId,
        setup_call: Option<u64>,
    ) -> Option<Rank> {
        let (last, members) = &self.members;
        let bound = matches!(termination, Termination::Stopped) || setup_call.is_some();
        if bound || job == NO_JOB || *last != job {
            return None;
        }
        if let Some(assigned) = substitute(core, rank, job) {
            return Some(assigned);
        }
        let load = core.inbox.tasks.loads();
        let living = core.inbox.workers.iter().zip(&load).enumerate();
        let living = living.filter(|(rank, (worker, _))| {
            worker.termination.is_none() && members.get(*rank) == Some(&true)
        });
        let drains = |rank: usize| core.scheduler.draining(rank as Rank).is_some();
        let min_loaded = living.min_by_key(|&(rank, (_, load))| (drains(rank), load))?;
        Some(min_loaded.0 as Rank)
    }

    /// Cancels a task whose answer is not wanted any more.
    pub(super) fn cancel_task(&mut self, task: TaskId) {
        let mut core = self.core();
        if let Some(assigned) = forget(&mut core, task) {
            core.scheduler.cancel_task(assigned, task);
            core.pump();
        }
    }

    /// Takes back a task, if it has not started. Its end is then [`Answer::Revoked`]; if it has started, it
    /// is answered as if nothing had been said.
    pub fn revoke(&mut self, task: TaskId) {
        if self.writing.as_ref().is_some_and(|w| w.order.task == task) {
            return;
        }
        let mut core = self.core();
        if let Some(assigned) = core.inbox.tasks.assigned(task) {
            core.scheduler.revoke(assigned, task);
            core.pump();
        }
    }

    /// Cancels the job's tasks that have not been received.
    pub fn cancel_job(&mut self, job: JobId) {
        let is_of_job = |writing: &MessageWriting| writing.order.job == job;
        if self.writing.as_ref().is_some_and(is_of_job) {
            self.abandon();
        }
        let mut core = self.core();
        core.inbox.job = NO_JOB;
        let now = core.began.elapsed();
        core.board.end(job, now);
        if core.scheduler.verb_over() {
            core.pump();
        }
        // The usual end of a verb.
        if core.inbox.tasks.outstanding() == 0 {
            return;
        }
        let owners = 0..self.size as Rank;
        let outstanding = owners.flat_map(|owner| core.inbox.tasks.of_owner(owner));
        let of_job = outstanding.filter(|&(_, other)| other == job);
        let cancelled: Vec<TaskId> = of_job.map(|(task, _)| task).collect();
        if !cancelled.is_empty() {
            for task in cancelled {
                forget(&mut core, task);
            }
            core.scheduler.cancel_job(job);
            core.pump();
        }
    }

    /// The answer to the oldest outstanding task of a worker; waits up to `max_wait` for it. If
    /// another task of the same job is lost, that answer is returned at once.
    pub fn receive(&mut self, rank: Rank, max_wait: Duration) -> Answer {
        let (task, job, assigned) = {
            let core = self.core();
            let tasks = &core.inbox.tasks;
            let Some((task, job)) = tasks.of_owner(rank).next() else {
                return Answer::NothingSent;
            };
            (task, job, tasks.assigned(task).unwrap_or(rank))
        };
        let poll = |core: &mut Core| core.inbox.tasks.take(task, job);
        // The result is demanded from the worker that has the task.
        self.receive_next(max_wait, Demand::Rank(assigned), poll)
    }

    /// The next answer from any of these workers, in the order of their arrival;
    /// waits up to `max_wait` for one.
    pub fn receive_any(&mut self, workers: &RankSet, max_wait: Duration) -> Answer {
        let (changes, outstanding) = {
            let core = self.core();
            (core.changes(), core.inbox.tasks.outstanding())
        };
        self.seen = (changes, workers.clone());
        let includes = |rank| workers.contains(rank);
        if outstanding == 0 {
            return Answer::NothingSent;
        }
        let poll = |core: &mut Core| core.inbox.tasks.take_any(includes);
        match self.receive_next(max_wait, Demand::AnyOf(workers.clone()), poll) {
            Answer::Pending if !self.core().inbox.tasks.any_of(includes) => Answer::NothingSent,
            answer => answer,
        }
    }

    /// R's thread sleeps for up to `max_wait`, until any of these hubs has something new since its
    /// last [`Hub::receive_any`], or a signal arrives.
    pub fn wait_for_any(hubs: &[&Hub], max_wait: Duration) {
        let hubs: Vec<_> = hubs
            .iter()
            .map(|hub| (hub.shared_core(), &hub.seen))
            .collect();
        SharedCore::sleep_until_any(&hubs, max_wait);
    }

    /// Starts to listen for a connection of R's that shows when an answer has arrived. Returns the
    /// port on the loopback address, and the bytes that R must write there first.
    ///
    /// # Errors
    /// When the system has no port or descriptor left.
    pub fn listen_for_readiness(&mut self) -> io::Result<(u16, Vec<u8>)> {
        let listener = self.listener.insert(ReadinessListener::bind()?);
        Ok((listener.port()?, listener.token().to_vec()))
    }

    /// Accepts the connection that R has opened, which replaces an earlier one.
    ///
    /// # Errors
    /// When there is none.
    pub fn accept_readiness(&mut self) -> io::Result<()> {
        let none = || io::Error::from(io::ErrorKind::NotConnected);
        let readiness = self.listener.take().ok_or_else(none)?.accept()?;
        self.core().readiness = Some(readiness);
        Ok(())
    }

    /// From now on, R's connection has a byte to be read while the next answer of this worker is
    /// available. Returns whether R has to read a byte first; `None`: there is no connection.
    pub fn point_readiness_at(&mut self, rank: Rank, at_once: bool) -> bool {
        let mut core = self.core();
        let Some(readiness) = &mut core.readiness else {
            return false;
        };
        readiness.point_at(rank, at_once);
        let tasks = &core.inbox.tasks;
        let next = tasks.of_owner(rank).next();
        if let Some(assigned) = next.and_then(|(task, _)| tasks.assigned(task)) {
            // A large result is sent only on demand.
            core.scheduler.demand(Demand::Rank(assigned));
            core.pump();
        }
        core.update_readiness();
        core.readiness.is_some()
    }

    /// The next task of this worker, the worker that the task was assigned to and the termination reason of that
    /// worker, if the task was lost.
    pub fn next_loss(&self, rank: Rank) -> Option<(TaskId, Rank, Arc<Termination>)> {
        let core = self.core();
        let tasks = &core.inbox.tasks;
        let (task, _) = tasks.of_owner(rank).next()?;
        Some((task, tasks.assigned(task)?, tasks.failure(task)?))
    }

    fn receive_next(
        &mut self,
        max_wait: Duration,
        demand: Demand,
        poll: impl Fn(&mut Core) -> Option<(Rank, TaskId, End)>,
    ) -> Answer {
        let mut core = self.core();
        let mut found = poll(&mut core);
        if found.is_none() {
            core.scheduler.demand(demand);
            core.pump();
            let spin = match core.inbox.tasks.outstanding() {
                1 => SPIN_TIME_SINGLE,
                _ => SPIN_TIME,
            };
            drop(core);
            found = self.inner.shared_core.wait_spinning(max_wait, spin, poll);
            core = self.core();
            core.scheduler.demand(Demand::Nothing);
        }
        let Some((rank, task, end)) = found else {
            return Answer::Pending;
        };
        if let End::Outcome(Outcome::Lost(termination)) = end {
            let assigned = core.inbox.tasks.assigned(task).unwrap_or(rank);
            return Answer::Lost {
                rank,
                assigned,
                task,
                termination,
            };
        }
        let removed = core.inbox.tasks.remove(task);
        let assigned = removed.map_or(rank, |(assigned, _)| assigned);
        if let End::Outcome(Outcome::Answer(body)) = &end {
            release_results(&mut core, body.len);
        }
        core.update_readiness();
        drop(core);
        match end {
            End::Outcome(Outcome::Answer(body)) => Answer::Ready {
                rank,
                assigned,
                task,
                body,
            },
            End::Outcome(Outcome::TimedOut) => Answer::TimedOut { rank, task },
            End::Outcome(Outcome::Revoked) => Answer::Revoked { rank, task },
            End::GivenUp => Answer::GivenUp { rank, task },
            // Only tasks that R no longer expects are cancelled.
            End::Outcome(Outcome::Cancelled | Outcome::Lost(_)) => Answer::NothingSent,
        }
    }

    /// Where a call is.
    pub fn call_location(&self, task: TaskId) -> CallLocation {
        self.core().scheduler.call_location(task)
    }

    /// How a call has ended, if it has. The answer stays until [`Hub::forget_call`] or a retry.
    pub fn call_end(&self, task: TaskId) -> Option<CallEnd> {
        self.core().inbox.calls.end(task)
    }

    /// Forgets a call. If it has not ended, it is cancelled.
    pub fn forget_call(&mut self, task: TaskId) {
        let mut core = self.core();
        let bytes = core.inbox.calls.forget(task);
        core.scheduler.cancel_call(task);
        core.pump();
        release_results(&mut core, bytes);
    }

    /// Requests that R is woken as soon as this call has ended.
    pub fn notify_call(&mut self, task: TaskId) {
        let mut core = self.core();
        core.inbox.calls.notify(task);
        core.scheduler.demand_call(task);
        core.pump();
    }

    /// Takes the progress events of a call since the last time.
    pub fn call_progress_events(&mut self, task: TaskId) -> Vec<Vec<u8>> {
        self.core().inbox.calls.take_progress_events(task)
    }

    /// The calls that need R's attention: those that have ended and were to be notified, and those
    /// that failed.
    pub fn calls_to_check(&mut self) -> Vec<TaskId> {
        self.core().inbox.calls.take_attention()
    }

    /// Sets the function that wakes R's event loop to check the calls.
    pub fn wake_with(&mut self, waker: Waker) {
        self.core().inbox.calls.wake_with(waker);
    }

    /// Waits up to `max_wait` for the end of this call, or until another call needs R's attention.
    pub fn wait_for_call(&mut self, task: TaskId, max_wait: Duration) {
        let mut core = self.core();
        core.scheduler.demand_call(task);
        core.scheduler.await_call(Some(task));
        core.pump();
        drop(core);
        let done = |core: &mut Core| core.inbox.calls.any_for(task).then_some(());
        self.inner.shared_core.wait(max_wait, done);
        let mut core = self.core();
        core.scheduler.await_call(None);
        core.pump();
    }

    /// Stops some workers, whatever they do; with the last one, the cluster. Their outstanding
    /// tasks are forgotten.
    pub fn stop_workers(&mut self, ranks: &[Rank]) {
        let shared_core = self.inner.shared_core.clone();
        let mut core = shared_core.core();
        for &rank in ranks {
            let tasks: Vec<_> = core.inbox.tasks.of_owner(rank).collect();
            for (task, _) in tasks {
                if let Some(assigned) = forget(&mut core, task).filter(|&assigned| assigned != rank)
                {
                    core.scheduler.cancel_task(assigned, task);
                }
            }
            core.scheduler.stop_worker(rank);
        }
        core.pump();
        core.leave_absent(ranks);
        if !core.any_left() {
            core.stop(&shared_core.stopped);
        }
    }

    /// Whether the processes of these stopped workers have ended; waits up to `max_wait` for that.
    pub fn have_ended(&self, ranks: &[Rank], max_wait: Duration) -> bool {
        let ended = |core: &mut Core| {
            let Inbox {
                workers,
                hosts,
                closed,
                ..
            } = &core.inbox;
            let ended = |&rank: &Rank| match workers.get(rank as usize) {
                // The agent of a removed host ends, too.
                Some(worker) => {
                    let at = worker.agent;
                    // A worker of a host that waits for its agent has no process.
                    let absent = core.conns[at].awaited
                        && !core.is_attached(at)
                        && worker.termination.as_ref().is_some_and(|t| !t.is_of_host());
                    absent
                        || worker.ended && !core.conns[at].permanent
                        || hosts[at].failure.is_some()
                }
                None => true,
            };
            (*closed || ranks.iter().all(ended)).then_some(())
        };
        self.inner.shared_core.wait(max_wait, ended).is_some()
    }

    /// Stops the cluster.
    pub fn stop(&self) {
        self.core().stop(&self.inner.shared_core.stopped);
    }

    /// Disconnects from the agents, which wait for another head.
    pub fn leave(&self) {
        self.core().leave(&self.inner.shared_core.stopped);
    }

    /// Makes the numbers of tasks and blobs differ from those of the heads before. `generation`: the number of heads
    /// that the cluster has had. To be called before [`Hub::go`].
    pub fn follow(&mut self, generation: u32) {
        self.next_task = (TaskId::from(generation) << GENERATION_BITS) + 1;
        self.next_blob = (BlobId::from(generation) << GENERATION_BITS) + 1;
    }

    /// Whether the cluster has ended and nothing of it is left; waits up to `max_wait` for that.
    pub fn is_closed(&mut self, max_wait: Duration) -> bool {
        let closed = |core: &mut Core| core.inbox.closed.then_some(());
        let closed = self.inner.shared_core.wait(max_wait, closed).is_some();
        if closed {
            if let Some(thread) = self.inner.thread.take() {
                // The thread's last action was to report that it has closed.
                let _ = thread.join();
            }
        }
        closed
    }

    /// Whether R is to ask for the answer to this task.
    pub fn expects(&self, task: TaskId) -> bool {
        self.core().inbox.tasks.contains(task)
    }

    /// The known state of a worker.
    pub fn worker(&self, rank: Rank) -> WorkerView {
        let core = self.core();
        let worker = core.inbox.workers.get(rank as usize);
        worker.cloned().unwrap_or_default()
    }

    /// The known state of all hosts.
    pub fn hosts(&self) -> Vec<HostView> {
        self.core().inbox.hosts.clone()
    }

    /// Whether there are events for R to show.
    pub fn has_events(&self) -> bool {
        self.core().inbox.has_events()
    }

    /// Takes the progress events of tasks, each a serialized R object. They are recorded from the first call on.
    pub fn take_progress(&self) -> Vec<Vec<u8>> {
        let inbox = &mut self.core().inbox;
        inbox.wants_progress = true;
        inbox.take_progress()
    }

    /// Takes the events since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        self.core().inbox.take_events()
    }
}

/// Drops a task and the part of its answer that has arrived. Returns the worker that had the task.
fn forget(core: &mut Core, task: TaskId) -> Option<Rank> {
    let (assigned, bytes) = core.inbox.tasks.remove(task)?;
    release_results(core, bytes);
    Some(assigned)
}

/// The worker that runs a task on behalf of this one. Further tasks of this worker follow there,
/// because they continue its random numbers one after the other.
pub(super) fn substitute(core: &Core, rank: Rank, job: JobId) -> Option<Rank> {
    let mut substitutes = core.inbox.tasks.reassigned(rank, job);
    substitutes.find(|&assigned| core.inbox.workers[assigned as usize].termination.is_none())
}

/// R has taken results of this many bytes: there is room for others.
pub(super) fn release_results(core: &mut Core, bytes: usize) {
    if bytes > 0 {
        core.scheduler.taken(bytes);
        core.pump();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if self.is_forked() {
            return;
        }
        let lingers = self.core().lingers;
        match lingers {
            true => self.leave(),
            false => self.stop(),
        }
        // SAFETY: dropped once, here, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.inner) };
    }
}
