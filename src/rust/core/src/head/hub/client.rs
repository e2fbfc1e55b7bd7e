//! The handle of R's thread to its hub. Belongs to that thread; never calls R.

use super::core::{Core, Shared, WATCH, WATCH_ONE};
use super::futures::{CallEnd, Waker};
use super::inbox::{Event, HostFailure, HostView, Inbox, WorkerView};
use super::readiness::ReadinessListener;
use super::writer::{Sharing, Writing};
use super::{Plan, run};
use crate::head::launch::Launch;
use crate::head::scheduler::events::{Gone, Outcome, Want};
use crate::head::scheduler::pool::CallPlace;
use crate::head::setup_log::Spool;
use crate::head::task_table::End;
use crate::platform::signals;
use crate::protocol::body::Body;
use crate::protocol::control::{Hello, Loss, ToAgent, ToHead};
use crate::protocol::error::ProtocolError;
use crate::protocol::ids::{JobId, PayloadId, Rank, TaskId};
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A job that no verb of parallel stands behind: see [`Hub::begin`].
pub const NO_JOB: JobId = 0;

/// When a task is to be begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// After those that its worker has been given before.
    #[default]
    Last,
    /// The same, and it may be sent while the worker is still at the one before.
    Ahead,
    /// Before those that wait.
    First,
}

/// What there is for R.
#[derive(Debug)]
pub enum Answer {
    /// A task's result has arrived.
    Ready {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The worker that had it.
        place: Rank,
        /// The task that was answered.
        task: TaskId,
        /// The bytes of the result.
        body: Body,
    },
    /// Its worker was lost. That is told until [`Hub::try_again`], [`Hub::give_up`] or [`Hub::forget`]
    /// has followed.
    Lost {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The worker that had it.
        place: Rank,
        /// The task that was lost.
        task: TaskId,
        /// How its worker ended.
        gone: Arc<Gone>,
    },
    /// It took longer than it may.
    TimedOut {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The task that exceeded its time limit.
        task: TaskId,
    },
    /// It was taken back before it had started: see [`Hub::recall`].
    Recalled {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The task, which R may give to another worker.
        task: TaskId,
    },
    /// [`Hub::give_up`] was called for it.
    GivenUp {
        /// The worker that R gave the task to.
        rank: Rank,
        /// The task, which is not tried again.
        task: TaskId,
    },
    /// Not yet.
    Pending,
    /// There is no task to wait for.
    NothingSent,
}

/// A task that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The number that the task has from now on.
    pub task: TaskId,
    /// The worker that gets it.
    pub place: Rank,
    /// Its message begins with the payload. If not, that worker's host does not have it: then either
    /// [`Hub::begin_payload_again`] follows, or all of the message is to be written.
    pub shared: bool,
    /// The worker is at a call, which it ends first.
    pub behind_call: bool,
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
    /// The agent said why not.
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
    /// A worker ended before it came up.
    WorkerFailed {
        /// The worker's rank.
        rank: Rank,
        /// How the worker ended.
        loss: Loss,
    },
}

pub(super) struct Inner {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// See the module's documentation. Dropping it stops the cluster without waiting for that.
pub struct Hub {
    /// Not dropped in a forked child, where the thread and perhaps a lock's owner do not exist.
    pub(super) inner: ManuallyDrop<Inner>,
    /// The process that may use it.
    owner: u32,
    /// Workers that the cluster was made with.
    pub(super) size: usize,
    /// How often anything had changed when [`Hub::receive_any`] looked last.
    seen: u64,
    /// The workers that the last job has given tasks to. Others may not have what its tasks need.
    pub(super) members: (JobId, Vec<bool>),
    pub(super) next_task: TaskId,
    /// A message is being written.
    pub(super) writing: Option<Writing>,
    /// A payload is being written.
    pub(super) sharing: Option<Sharing>,
    pub(super) next_payload: PayloadId,
    /// Some agent keeps chunks.
    pub(super) shares: bool,
    /// Waits for the connection that [`Hub::listen_for_readiness`] is for.
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
        let watched = mio::Poll::new()?;
        let registry = watched.registry().try_clone()?;
        let shared = Arc::new(Shared::new(hosts.len(), result_limit, registry)?);
        let theirs = shared.clone();
        let body = move || {
            let result = catch_unwind(AssertUnwindSafe(|| run(hosts, hello, &theirs, watched)));
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
            shared,
            thread: Some(thread),
        };
        Ok(Hub::new(inner))
    }

    fn new(inner: Inner) -> Hub {
        Hub {
            inner: ManuallyDrop::new(inner),
            owner: std::process::id(),
            size: 0,
            seen: 0,
            members: (NO_JOB, Vec::new()),
            next_task: 1,
            writing: None,
            sharing: None,
            next_payload: 1,
            shares: false,
            listener: None,
        }
    }

    /// A hub with so many hosts, and without a thread that serves them.
    pub(super) fn without_thread(hosts: usize, result_limit: usize) -> io::Result<Hub> {
        let registry = mio::Poll::new()?.registry().try_clone()?;
        let shared = Arc::new(Shared::new(hosts, result_limit, registry)?);
        Ok(Hub::new(Inner {
            shared,
            thread: None,
        }))
    }

    /// Whether this process is a fork of the one that started the cluster. If so, nothing else
    /// may be called.
    pub fn is_forked(&self) -> bool {
        self.owner != std::process::id()
    }

    /// Workers that the cluster was made with.
    pub fn size(&self) -> usize {
        self.size
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.inner.shared.core()
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    /// Whether all agents have greeted or failed; waits up to `most` for that.
    pub fn greeted(&self, most: Duration) -> bool {
        let greeted = |core: &mut Core| {
            let mut hosts = core.inbox.hosts.iter();
            let known = hosts.all(|host| host.hello.is_some() || host.failure.is_some());
            known.then_some(())
        };
        self.inner.shared.wait(most, greeted).is_some()
    }

    /// Hosts that are lost are to be taken back. What lasts on their workers is held in a file that is
    /// made at `path`, up to `most` bytes. `patience`: how long a host may take to start once it is
    /// tried again. To be called before [`Hub::go`].
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn reconnect(&mut self, path: &Path, most: u64, patience: Duration) -> io::Result<()> {
        let spool = Spool::new(path, most)?;
        let mut core = self.core();
        core.spool = Some(spool);
        core.start_patience = patience;
        Ok(())
    }

    /// Whether a host that is lost is tried again.
    pub fn takes_back(&self, agent: usize) -> bool {
        self.core().takes_back(agent)
    }

    /// How long any task may take from when its worker has all of its message. To be called before [`Hub::go`].
    pub fn limit_all(&mut self, limit: Option<Duration>) {
        self.core().time_limit = limit;
    }

    /// Tells each agent that has greeted what to start, or, without a plan, to end. The ranks of
    /// all plans are those from 0 to their number.
    ///
    /// # Errors
    /// When a plan does not fit into one message.
    pub fn go(&mut self, plans: Vec<Option<Plan>>) -> Result<(), ProtocolError> {
        let ranks = |plan: &Option<Plan>| plan.as_ref().map_or(vec![], |plan| plan.ranks.clone());
        let ranks: Vec<Vec<Rank>> = plans.iter().map(ranks).collect();
        self.size = ranks.iter().map(Vec::len).sum();
        let shared = self.inner.shared.clone();
        let mut core = shared.core();
        core.set_ranks(ranks);
        self.shares = false;
        for (agent, plan) in plans.into_iter().enumerate() {
            match plan {
                Some(plan) => {
                    let patience = Duration::from_millis(plan.start.patience.into());
                    core.conns[agent].patience = patience;
                    core.conns[agent].stop_timeout = Duration::from_millis(plan.start.stop_timeout);
                    if core.spool.is_some() {
                        core.conns[agent].plan = Some(plan.start.clone());
                    }
                    if plan.start.keep > 0 {
                        self.shares = true;
                        let most = usize::try_from(plan.start.keep).unwrap_or(usize::MAX);
                        core.scheduler.share(agent, most);
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
        core.settle();
        Ok(())
    }

    /// How far the start has come; waits up to `most` for its end. `tolerant`: what has failed is
    /// left to be found in [`Hub::hosts`] and [`Hub::worker`].
    pub fn progress(&self, tolerant: bool, most: Duration) -> Progress {
        let ended = self.inner.shared.wait(most, |core| {
            let inbox = &core.inbox;
            if tolerant {
                let known = |w: &WorkerView| w.pid.is_some() || w.gone.is_some();
                return inbox.workers.iter().all(known).then_some(Progress::Up);
            }
            for (host, view) in inbox.hosts.iter().enumerate() {
                if let Some(reason) = view.start_failure.clone() {
                    return Some(Progress::Refused { host, reason });
                }
            }
            for (rank, worker) in inbox.workers.iter().enumerate() {
                if let Some(Gone::Worker(loss)) = worker.gone.as_deref() {
                    let (rank, loss) = (rank as Rank, loss.clone());
                    return Some(Progress::WorkerFailed { rank, loss });
                }
            }
            for (host, view) in inbox.hosts.iter().enumerate() {
                if let Some(failure) = view.failure.clone() {
                    return Some(Progress::HostFailed { host, failure });
                }
            }
            (inbox.up == inbox.workers.len()).then_some(Progress::Up)
        });
        ended.unwrap_or_else(|| Progress::Starting {
            up: self.core().inbox.up,
        })
    }

    /// Ends an agent for this reason: the cluster goes on without its host.
    pub fn leave_out(&mut self, agent: usize, reason: String) {
        let mut core = self.core();
        core.leave_out(agent, reason);
        core.settle();
    }

    /// Leaves out the hosts of which no worker has come up, and elsewhere ends those that have not.
    pub fn leave_out_late(&mut self, reason: &str) {
        let mut core = self.core();
        for agent in 0..core.inbox.hosts.len() {
            let workers = core.inbox.workers.iter().enumerate();
            let of_host =
                workers.filter(|(_, worker)| worker.agent == agent && worker.gone.is_none());
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
        core.settle();
    }

    /// A task that was lost is not tried again: who asks for its answer is told so.
    pub fn give_up(&mut self, rank: Rank, task: TaskId) {
        let mut core = self.core();
        core.inbox.tasks.give_up(task);
        let place = core.inbox.tasks.place(task).unwrap_or(rank);
        core.scheduler.let_go(place, task);
        core.settle();
    }

    /// Nobody wants to know any more what became of a task that was lost.
    pub fn forget(&mut self, rank: Rank, task: TaskId) {
        let mut core = self.core();
        let place = core
            .inbox
            .tasks
            .remove(task)
            .map_or(rank, |(place, _)| place);
        core.scheduler.let_go(place, task);
        core.settle();
    }

    /// The worker that R gave a task to.
    pub fn owner(&self, task: TaskId) -> Option<Rank> {
        self.core().inbox.tasks.owner(task)
    }

    /// Of the workers that a job uses, the one with the least to do, to stand in for one that is gone,
    /// unless that was stopped, or the task is bound to it by what lasts there.
    pub(super) fn elsewhere(
        &self,
        core: &Core,
        rank: Rank,
        gone: &Gone,
        job: JobId,
        lasts: Option<u64>,
    ) -> Option<Rank> {
        let (last, members) = &self.members;
        let bound = matches!(gone, Gone::Stopped) || lasts.is_some();
        if bound || job == NO_JOB || *last != job {
            return None;
        }
        if let Some(place) = stand_in(core, rank, job) {
            return Some(place);
        }
        let load = core.inbox.tasks.loads();
        let living = core.inbox.workers.iter().zip(&load).enumerate();
        let living = living.filter(|(rank, (worker, _))| worker.gone.is_none() && members[*rank]);
        let least = living.min_by_key(|&(_, (_, load))| load)?;
        Some(least.0 as Rank)
    }

    /// Cancels a task, of which nothing more is wanted.
    pub(super) fn cancel_task(&mut self, rank: Rank, task: TaskId) {
        let mut core = self.core();
        let place = forget(&mut core, task).unwrap_or(rank);
        core.scheduler.cancel_task(place, task);
        core.settle();
    }

    /// Takes back the task that R gave to `rank`, if it has not started. Its end is then
    /// [`Answer::Recalled`]; if it has started, it is answered as if nothing had been said.
    pub fn recall(&mut self, rank: Rank, task: TaskId) {
        if self.writing.as_ref().is_some_and(|w| w.order.task == task) {
            return;
        }
        let mut core = self.core();
        let place = core.inbox.tasks.place(task).unwrap_or(rank);
        core.scheduler.recall(place, task);
        core.settle();
    }

    /// Cancels the job's tasks that have not been received.
    pub fn cancel_job(&mut self, job: JobId) {
        let is_of_job = |writing: &Writing| writing.order.job == job;
        if self.writing.as_ref().is_some_and(is_of_job) {
            self.abandon();
        }
        let mut core = self.core();
        core.inbox.job = NO_JOB;
        if core.scheduler.verb_over() {
            core.settle();
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
            core.settle();
        }
    }

    /// The answer to the oldest task outstanding on a worker; waits up to `most` for it. When
    /// another task of the same job is lost, that is told instead, at once.
    pub fn receive(&mut self, rank: Rank, most: Duration) -> Answer {
        let (task, job, place) = {
            let core = self.core();
            let tasks = &core.inbox.tasks;
            let Some((task, job)) = tasks.of_owner(rank).next() else {
                return Answer::NothingSent;
            };
            (task, job, tasks.place(task).unwrap_or(rank))
        };
        let look = |core: &mut Core| core.inbox.tasks.take(task, job);
        // Its result is asked for where the task is.
        self.receive_next(most, Want::Rank(place), look)
    }

    /// The next answer from any of the workers that `includes`, in the order of their arrival;
    /// waits up to `most` for one.
    pub fn receive_any(&mut self, includes: impl Fn(Rank) -> bool, most: Duration) -> Answer {
        let (changes, outstanding) = {
            let core = self.core();
            (core.changes(), core.inbox.tasks.outstanding())
        };
        self.seen = changes;
        if outstanding == 0 {
            return Answer::NothingSent;
        }
        let look = |core: &mut Core| core.inbox.tasks.take_any(&includes);
        match self.receive_next(most, Want::Any, look) {
            Answer::Pending if !self.core().inbox.tasks.any_of(&includes) => Answer::NothingSent,
            answer => answer,
        }
    }

    /// R's thread sleeps, up to `most`, until any of these hubs has something that it did not have when
    /// [`Hub::receive_any`] looked last, or a signal comes.
    pub fn wait_for_any(hubs: &[&Hub], most: Duration) {
        let hubs: Vec<_> = hubs.iter().map(|hub| (hub.shared(), hub.seen)).collect();
        Shared::sleep_until_any(&hubs, most);
    }

    /// Begins to listen for a connection of R's that shows when an answer has arrived. Returns the port to
    /// connect to on the loopback address, and what is to be written there first.
    ///
    /// # Errors
    /// When the system has no port or descriptor left.
    pub fn listen_for_readiness(&mut self) -> io::Result<(u16, Vec<u8>)> {
        let listener = self.listener.insert(ReadinessListener::bind()?);
        Ok((listener.port()?, listener.token().to_vec()))
    }

    /// Takes the connection that R has opened, in place of the one before.
    ///
    /// # Errors
    /// When there is none.
    pub fn accept_readiness(&mut self) -> io::Result<()> {
        let none = || io::Error::from(io::ErrorKind::NotConnected);
        let readiness = self.listener.take().ok_or_else(none)?.accept()?;
        self.core().readiness = Some(readiness);
        Ok(())
    }

    /// From now on R's connection has a byte to be read while the next answer of this worker is there. `at_once`:
    /// receiving from the worker does not wait. Returns whether there is a connection.
    pub fn point_readiness_at(&mut self, rank: Rank, at_once: bool) -> bool {
        let mut core = self.core();
        let Some(readiness) = &mut core.readiness else {
            return false;
        };
        readiness.point_at(rank, at_once);
        let tasks = &core.inbox.tasks;
        let next = tasks.of_owner(rank).next();
        if let Some(place) = next.and_then(|(task, _)| tasks.place(task)) {
            // A large result is sent only if it is asked for.
            core.scheduler.want(Want::Rank(place));
            core.settle();
        }
        core.update_readiness();
        core.readiness.is_some()
    }

    /// The next task of this worker, the worker that had the task, and why that is gone, if the task was lost.
    pub fn next_loss(&self, rank: Rank) -> Option<(TaskId, Rank, Arc<Gone>)> {
        let core = self.core();
        let tasks = &core.inbox.tasks;
        let (task, _) = tasks.of_owner(rank).next()?;
        Some((task, tasks.place(task)?, tasks.loss(task)?))
    }

    fn receive_next(
        &mut self,
        most: Duration,
        want: Want,
        look: impl Fn(&mut Core) -> Option<(Rank, TaskId, End)>,
    ) -> Answer {
        let mut core = self.core();
        let mut found = look(&mut core);
        if found.is_none() {
            core.scheduler.want(want);
            core.settle();
            let watch = match core.inbox.tasks.outstanding() {
                1 => WATCH_ONE,
                _ => WATCH,
            };
            drop(core);
            found = self.inner.shared.wait_watching(most, watch, look);
            core = self.core();
            core.scheduler.want(Want::Nothing);
        }
        let Some((rank, task, end)) = found else {
            return Answer::Pending;
        };
        if let End::Outcome(Outcome::Lost(gone)) = end {
            let place = core.inbox.tasks.place(task).unwrap_or(rank);
            return Answer::Lost {
                rank,
                place,
                task,
                gone,
            };
        }
        let removed = core.inbox.tasks.remove(task);
        let place = removed.map_or(rank, |(place, _)| place);
        if let End::Outcome(Outcome::Answer(body)) = &end {
            took(&mut core, body.len);
        }
        core.update_readiness();
        drop(core);
        match end {
            End::Outcome(Outcome::Answer(body)) => Answer::Ready {
                rank,
                place,
                task,
                body,
            },
            End::Outcome(Outcome::TimedOut) => Answer::TimedOut { rank, task },
            End::Outcome(Outcome::Recalled) => Answer::Recalled { rank, task },
            End::GivenUp => Answer::GivenUp { rank, task },
            // Only what R no longer expects is cancelled.
            End::Outcome(Outcome::Cancelled | Outcome::Lost(_)) => Answer::NothingSent,
        }
    }

    /// Where a call is.
    pub fn call_place(&self, task: TaskId) -> CallPlace {
        self.core().scheduler.call_place(task)
    }

    /// How a call has ended, if it has; told until [`Hub::forget_call`], or until it is tried again.
    pub fn call_end(&self, task: TaskId) -> Option<CallEnd> {
        self.core().inbox.calls.end(task)
    }

    /// R knows how a call ended, or does not want to: if it has not ended, it is cancelled.
    pub fn forget_call(&mut self, task: TaskId) {
        let mut core = self.core();
        let bytes = core.inbox.calls.forget(task);
        core.scheduler.cancel_call(task);
        core.settle();
        took(&mut core, bytes);
    }

    /// R is to be woken as soon as this call has ended.
    pub fn watch_call(&mut self, task: TaskId) {
        let mut core = self.core();
        core.inbox.calls.watch(task);
        core.scheduler.want_call(task);
        core.settle();
    }

    /// What a call has told before its end, since this was last asked.
    pub fn call_asides(&mut self, task: TaskId) -> Vec<Vec<u8>> {
        self.core().inbox.calls.take_asides(task)
    }

    /// The calls about which R has something to do.
    pub fn calls_to_look_at(&mut self) -> Vec<TaskId> {
        self.core().inbox.calls.take_attention()
    }

    /// From now on, R is woken so to look at them.
    pub fn wake_with(&mut self, waker: Waker) {
        self.core().inbox.calls.wake_with(waker);
    }

    /// Waits up to `most` for the end of this call, or until there is something to do about another.
    pub fn wait_for_call(&mut self, task: TaskId, most: Duration) {
        let mut core = self.core();
        core.scheduler.want_call(task);
        core.scheduler.await_call(Some(task));
        core.settle();
        drop(core);
        let done = |core: &mut Core| core.inbox.calls.any_for(task).then_some(());
        self.inner.shared.wait(most, done);
        let mut core = self.core();
        core.scheduler.await_call(None);
        core.settle();
    }

    /// Ends some workers, whatever they do; with the last one, the cluster. What was outstanding
    /// on them is forgotten.
    pub fn stop_workers(&mut self, ranks: &[Rank]) {
        let shared = self.inner.shared.clone();
        let mut core = shared.core();
        for &rank in ranks {
            let tasks: Vec<_> = core.inbox.tasks.of_owner(rank).collect();
            for (task, _) in tasks {
                if let Some(place) = forget(&mut core, task).filter(|&place| place != rank) {
                    core.scheduler.cancel_task(place, task);
                }
            }
            core.scheduler.stop_worker(rank);
        }
        core.settle();
        if !core.any_left() {
            core.stop(&shared.stopped);
        }
    }

    /// Whether the processes of these workers, which have been stopped, have ended; waits up to `most`
    /// for that.
    pub fn have_ended(&self, ranks: &[Rank], most: Duration) -> bool {
        let ended = |core: &mut Core| {
            let Inbox {
                workers,
                hosts,
                closed,
                ..
            } = &core.inbox;
            let ended = |&rank: &Rank| match workers.get(rank as usize) {
                Some(worker) => worker.ended || hosts[worker.agent].failure.is_some(),
                None => true,
            };
            (*closed || ranks.iter().all(ended)).then_some(())
        };
        self.inner.shared.wait(most, ended).is_some()
    }

    /// Ends the cluster.
    pub fn stop(&self) {
        self.core().stop(&self.inner.shared.stopped);
    }

    /// Whether the cluster has ended and nothing of it is left; waits up to `most` for that.
    pub fn is_closed(&mut self, most: Duration) -> bool {
        let closed = |core: &mut Core| core.inbox.closed.then_some(());
        let closed = self.inner.shared.wait(most, closed).is_some();
        if closed {
            if let Some(thread) = self.inner.thread.take() {
                // Its last act was to say that it is closed.
                let _ = thread.join();
            }
        }
        closed
    }

    /// Whether the end of this task is to be asked for.
    pub fn expects(&self, task: TaskId) -> bool {
        self.core().inbox.tasks.contains(task)
    }

    /// A worker as it is known now.
    pub fn worker(&self, rank: Rank) -> WorkerView {
        let core = self.core();
        let worker = core.inbox.workers.get(rank as usize);
        worker.cloned().unwrap_or_default()
    }

    /// All hosts as they are known now.
    pub fn hosts(&self) -> Vec<HostView> {
        self.core().inbox.hosts.clone()
    }

    /// Whether something has come to be shown.
    pub fn has_events(&self) -> bool {
        self.core().inbox.has_events()
    }

    /// What has come to be shown since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        self.core().inbox.take_events()
    }
}

/// Drops what there may be of an answer. Returns the worker that has had the task.
fn forget(core: &mut Core, task: TaskId) -> Option<Rank> {
    let (place, bytes) = core.inbox.tasks.remove(task)?;
    took(core, bytes);
    Some(place)
}

/// The worker that has a task which R gave to this one. Tasks that were one worker's go on one after the
/// other with its random numbers.
pub(super) fn stand_in(core: &Core, rank: Rank, job: JobId) -> Option<Rank> {
    let mut places = core.inbox.tasks.reassigned(rank, job);
    places.find(|&place| core.inbox.workers[place as usize].gone.is_none())
}

/// There is room for other results.
pub(super) fn took(core: &mut Core, bytes: usize) {
    if bytes > 0 {
        core.scheduler.taken(bytes);
        core.settle();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if self.is_forked() {
            return;
        }
        self.stop();
        // SAFETY: dropped once, here, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.inner) };
    }
}
