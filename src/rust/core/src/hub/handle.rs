//! The handle of R's thread to its hub. Belongs to that thread; never calls R.

use super::shared::{HostView, Shared, WorkerView};
use super::{Command, Event, Host, HostFailure, run};
use crate::frame::MAX_BODY;
use crate::message::{Hello, Loss, ToHead};
use crate::scheduler::{Body, Gone, JobId, Outcome, Rank, TaskId, Want};
use crate::signals;
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Bytes of tasks that may wait to be sent before R's thread waits too.
const SEND_LIMIT: usize = 32 * 1024 * 1024;

/// How long R's thread watches for an answer before it sleeps: about what it takes, to and fro, to
/// put a core to sleep and wake it.
const WATCH: Duration = Duration::from_micros(1000);

/// A job that no verb of ours stands behind: see [`Hub::begin`].
pub const NO_JOB: JobId = 0;

/// What there is for R.
#[derive(Debug)]
pub enum Answer {
    Ready {
        rank: Rank,
        body: Body,
    },
    Lost {
        rank: Rank,
        gone: Arc<Gone>,
    },
    /// Not yet.
    Pending,
    /// There is no task to wait for.
    NothingSent,
}

/// How far a start has come.
#[derive(Debug)]
pub enum Progress {
    Starting {
        up: usize,
    },
    Up,
    /// The agent said why not.
    Refused {
        host: usize,
        reason: ToHead,
    },
    HostFailed {
        host: usize,
        failure: HostFailure,
    },
    WorkerFailed {
        rank: Rank,
        loss: Loss,
    },
}

struct Inner {
    shared: Arc<Shared>,
    commands: UnboundedSender<Command>,
    thread: Option<JoinHandle<()>>,
}

/// See the module's documentation. Dropping it stops the cluster without waiting for that.
pub struct Hub {
    /// Not dropped in a forked child, where the thread and perhaps a lock's owner do not exist.
    inner: ManuallyDrop<Inner>,
    /// The process that may use it.
    owner: u32,
    /// Tasks sent and not received, per worker, in order.
    outstanding: Vec<VecDeque<(TaskId, JobId)>>,
    outstanding_count: usize,
    next_task: TaskId,
    next_job: JobId,
    /// A message is being written.
    writing: Option<Writing>,
    /// How long R has lately waited for answers, on average.
    usual_wait: Duration,
}

#[derive(Debug)]
struct Writing {
    rank: Rank,
    task: TaskId,
    job: JobId,
    buffer: Vec<u8>,
    first: bool,
}

impl Hub {
    /// Starts the hub's thread, which starts the agents. `result_limit`: bytes of results to
    /// buffer.
    ///
    /// # Errors
    /// When the system has no thread or descriptor left.
    pub fn start(hosts: Vec<Host>, hello: Hello, result_limit: usize) -> io::Result<Hub> {
        let workers = hosts.iter().map(|host| host.ranks.len()).sum();
        let shared = Arc::new(Shared::new(workers, hosts.len(), result_limit)?);
        let (commands, receiver) = unbounded_channel();
        let theirs = shared.clone();
        let body = move || {
            let result = catch_unwind(AssertUnwindSafe(|| run(hosts, hello, &theirs, receiver)));
            theirs.close(match result {
                Ok(()) => "the cluster was stopped",
                Err(_) => "the head's event loop failed: this is a bug in rustcluster",
            });
        };
        let thread = signals::with_all_blocked(|| {
            thread::Builder::new()
                .name("rustcluster-hub".into())
                .spawn(body)
        })?;
        let inner = Inner {
            shared,
            commands,
            thread: Some(thread),
        };
        Ok(Hub {
            inner: ManuallyDrop::new(inner),
            owner: std::process::id(),
            outstanding: vec![VecDeque::new(); workers],
            outstanding_count: 0,
            next_task: 1,
            next_job: NO_JOB + 1,
            writing: None,
            usual_wait: Duration::ZERO,
        })
    }

    /// Whether this process is a fork of the one that started the cluster. If so, nothing else
    /// may be called.
    pub fn is_forked(&self) -> bool {
        self.owner != std::process::id()
    }

    /// Workers that the cluster was made with.
    pub fn size(&self) -> usize {
        self.outstanding.len()
    }

    fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    fn command(&self, command: Command) {
        // Fails only when the hub's thread has ended, and then there is nothing to do.
        let _ = self.inner.commands.send(command);
    }

    /// How far the start has come; waits up to `most` for a change if it is under way.
    pub fn progress(&self, most: Duration) -> Progress {
        for waited in [false, true] {
            {
                let mut inbox = self.shared().inbox();
                for (host, view) in inbox.hosts.iter().enumerate() {
                    if let Some(reason) = view.start_failure.clone() {
                        return Progress::Refused { host, reason };
                    }
                }
                for (rank, worker) in inbox.workers.iter().enumerate() {
                    if let Some(Gone::Worker(loss)) = worker.gone.as_deref() {
                        let (rank, loss) = (rank as Rank, loss.clone());
                        return Progress::WorkerFailed { rank, loss };
                    }
                }
                for (host, view) in inbox.hosts.iter().enumerate() {
                    if let Some(failure) = view.failure.clone() {
                        return Progress::HostFailed { host, failure };
                    }
                }
                if inbox.up == inbox.workers.len() {
                    return Progress::Up;
                }
                if waited {
                    return Progress::Starting { up: inbox.up };
                }
                inbox.waiting = true;
            }
            self.shared().wait(most);
        }
        Progress::Starting { up: 0 }
    }

    /// A new job: the tasks of one call of a verb.
    pub fn new_job(&mut self) -> JobId {
        self.next_job += 1;
        self.next_job
    }

    /// Begins a task for a worker; [`Hub::write`] and [`Hub::finish`] follow. A verb that finds
    /// tasks of others on its worker cancels them: they are left over from a call that was
    /// interrupted, and their answers would be taken for its own.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn begin(&mut self, rank: Rank, job: JobId) -> Result<(), Arc<Gone>> {
        self.abandon();
        if let Some(gone) = self.worker(rank).gone {
            return Err(gone);
        }
        let stale = |&(_, other): &(TaskId, JobId)| job != NO_JOB && other != job;
        if self.outstanding[rank as usize].iter().any(stale) {
            let tasks = std::mem::take(&mut self.outstanding[rank as usize]);
            let (stale, kept): (VecDeque<_>, VecDeque<_>) = tasks.into_iter().partition(stale);
            self.outstanding[rank as usize] = kept;
            self.outstanding_count -= stale.len();
            for (task, _) in stale {
                self.forget(task);
                self.command(Command::CancelTask { rank, task });
            }
        }
        let task = self.next_task;
        self.next_task += 1;
        self.writing = Some(Writing {
            rank,
            task,
            job,
            buffer: Vec::new(),
            first: true,
        });
        Ok(())
    }

    /// Appends to the message. Returns whether so much waits to be sent that the caller should
    /// call [`Hub::wait_to_send`] until that says no.
    pub fn write(&mut self, mut bytes: &[u8]) -> bool {
        let Some(writing) = &mut self.writing else {
            return false;
        };
        let mut sent = false;
        while writing.buffer.len() + bytes.len() > MAX_BODY {
            let (now, later) = bytes.split_at(MAX_BODY - writing.buffer.len());
            writing.buffer.extend_from_slice(now);
            bytes = later;
            let next = Vec::with_capacity(MAX_BODY);
            let chunk = std::mem::replace(&mut writing.buffer, next);
            submit(&self.inner, writing, chunk, false);
            sent = true;
        }
        writing.buffer.extend_from_slice(bytes);
        sent && self.must_wait_to_send()
    }

    fn must_wait_to_send(&self) -> bool {
        self.shared().queued.load(Ordering::SeqCst) > SEND_LIMIT
    }

    /// Waits up to `most` for what was written to be sent. Returns whether to wait on.
    pub fn wait_to_send(&mut self, most: Duration) -> bool {
        let shared = self.shared();
        shared.send_blocked.store(true, Ordering::SeqCst);
        if shared.starving.load(Ordering::SeqCst) {
            self.command(Command::Look);
        }
        shared.inbox().waiting = true;
        if self.must_wait_to_send() {
            shared.wait(most);
        }
        let wait = self.must_wait_to_send() && !shared.inbox().closed;
        if !wait {
            shared.send_blocked.store(false, Ordering::SeqCst);
        }
        wait
    }

    /// Ends the message; the task is now outstanding.
    pub fn finish(&mut self) {
        let Some(mut writing) = self.writing.take() else {
            return;
        };
        self.outstanding[writing.rank as usize].push_back((writing.task, writing.job));
        self.outstanding_count += 1;
        let chunk = std::mem::take(&mut writing.buffer);
        submit(&self.inner, &mut writing, chunk, true);
    }

    /// Takes back the message that is being written, if there is one: R could not finish it.
    pub fn abandon(&mut self) {
        self.shared().send_blocked.store(false, Ordering::SeqCst);
        if let Some(writing) = self.writing.take().filter(|writing| !writing.first) {
            let Writing { rank, task, .. } = writing;
            self.forget(task);
            self.command(Command::CancelTask { rank, task });
        }
    }

    /// Drops what there may be of an answer.
    fn forget(&mut self, task: TaskId) {
        let outcome = {
            let mut inbox = self.shared().inbox();
            inbox.lost.retain(|lost| lost.2 != task);
            inbox.expected.remove(&task)
        };
        if let Some(Some(Outcome::Answer(body))) = outcome {
            self.took(body.len);
        }
    }

    fn took(&self, bytes: usize) {
        let shared = self.shared();
        shared.taken.fetch_add(bytes, Ordering::SeqCst);
        if shared.starving.load(Ordering::SeqCst) {
            self.command(Command::Look);
        }
    }

    /// Cancels the job's tasks that have not been received. Returns how many there were.
    pub fn cancel_job(&mut self, job: JobId) -> usize {
        self.abandon();
        // The usual end of a verb.
        if self.outstanding_count == 0 {
            return 0;
        }
        let mut cancelled = Vec::new();
        for tasks in &mut self.outstanding {
            tasks.retain(|&(task, other)| {
                if other == job {
                    cancelled.push(task);
                }
                other != job
            });
        }
        if !cancelled.is_empty() {
            self.outstanding_count -= cancelled.len();
            for &task in &cancelled {
                self.forget(task);
            }
            self.command(Command::CancelJob(job));
        }
        cancelled.len()
    }

    /// The answer to the oldest task outstanding on a worker; waits up to `most` for it. When
    /// another task of the same job is lost, that is told instead, at once.
    pub fn receive(&mut self, rank: Rank, most: Duration) -> Answer {
        let Some(&(task, job)) = self.outstanding[rank as usize].front() else {
            return Answer::NothingSent;
        };
        self.poll(most, Want::Rank(rank), |hub| {
            let mut inbox = hub.shared().inbox();
            if let Some(outcome) = inbox.expected.get_mut(&task).and_then(Option::take) {
                return Some((rank, task, outcome));
            }
            if job == NO_JOB || inbox.lost.is_empty() {
                return None;
            }
            let at = inbox.lost.iter().position(|lost| lost.0 == job)?;
            let (_, rank, task) = inbox.lost[at];
            let outcome = inbox.expected.get_mut(&task).and_then(Option::take)?;
            Some((rank, task, outcome))
        })
    }

    /// The next answer from any of the workers that `includes`, in the order of their arrival;
    /// waits up to `most` for one.
    pub fn receive_any(&mut self, includes: impl Fn(Rank) -> bool, most: Duration) -> Answer {
        if self.outstanding_count == 0 {
            return Answer::NothingSent;
        }
        let answer = self.poll(most, Want::Any, |hub| {
            let mut guard = hub.shared().inbox();
            let inbox = &mut *guard;
            let mut at = 0;
            while let Some(&(rank, task)) = inbox.ready.get(at) {
                let Some(slot) = inbox.expected.get_mut(&task) else {
                    // Received by rank, or cancelled.
                    inbox.ready.remove(at);
                    continue;
                };
                if includes(rank) {
                    inbox.ready.remove(at);
                    if let Some(outcome) = slot.take() {
                        return Some((rank, task, outcome));
                    }
                    continue;
                }
                at += 1;
            }
            None
        });
        if let Answer::Pending = answer {
            let some =
                |(rank, tasks): (usize, &VecDeque<_>)| !tasks.is_empty() && includes(rank as Rank);
            if !self.outstanding.iter().enumerate().any(some) {
                return Answer::NothingSent;
            }
        }
        answer
    }

    fn poll(
        &mut self,
        most: Duration,
        want: Want,
        mut look: impl FnMut(&Hub) -> Option<(Rank, TaskId, Outcome)>,
    ) -> Answer {
        let mut found = look(self);
        if found.is_none() {
            let began = Instant::now();
            found = self.watch(began, &mut look);
            self.usual_wait = (3 * self.usual_wait + began.elapsed()) / 4;
        }
        if found.is_none() {
            let began = Instant::now();
            let shared = self.shared();
            shared.set_want(want);
            if shared.starving.load(Ordering::SeqCst) {
                self.command(Command::Look);
            }
            shared.inbox().waiting = true;
            // Between the first look and `waiting` something may have come.
            found = look(self);
            if found.is_none() {
                self.shared().wait(most);
                found = look(self);
            }
            self.shared().set_want(Want::Nothing);
            self.usual_wait += began.elapsed() / 4;
        }
        let Some((rank, task, outcome)) = found else {
            return Answer::Pending;
        };
        self.settle(rank, task);
        match outcome {
            Outcome::Answer(body) => {
                self.took(body.len);
                Answer::Ready { rank, body }
            }
            Outcome::Lost(gone) => Answer::Lost { rank, gone },
            // Only what R no longer expects is cancelled.
            Outcome::Cancelled => Answer::NothingSent,
        }
    }

    /// Watches for a change without sleeping, if answers have usually come so soon that sleeping
    /// and being woken would take longer than the answer itself. Gives the core away at every
    /// look, to whoever wants it.
    fn watch<T>(&self, began: Instant, look: &mut impl FnMut(&Hub) -> Option<T>) -> Option<T> {
        if self.usual_wait > WATCH {
            return None;
        }
        let mut seen = self.shared().changes();
        while began.elapsed() < WATCH {
            thread::yield_now();
            let changes = self.shared().changes();
            if changes != seen {
                seen = changes;
                let found = look(self);
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    /// A task has ended and R knows it.
    fn settle(&mut self, rank: Rank, task: TaskId) {
        let tasks = &mut self.outstanding[rank as usize];
        if let Some(at) = tasks.iter().position(|&(other, _)| other == task) {
            tasks.remove(at);
            self.outstanding_count -= 1;
        }
        let mut inbox = self.shared().inbox();
        inbox.expected.remove(&task);
        if inbox.ready.front() == Some(&(rank, task)) {
            inbox.ready.pop_front();
        }
        inbox.lost.retain(|lost| lost.2 != task);
        if inbox.expected.is_empty() {
            inbox.ready.clear();
        }
    }

    /// Ends some workers, whatever they do; with the last one, the cluster. What was outstanding
    /// on them is forgotten.
    pub fn stop_workers(&mut self, ranks: Vec<Rank>) {
        for &rank in &ranks {
            let tasks = std::mem::take(&mut self.outstanding[rank as usize]);
            self.outstanding_count -= tasks.len();
            for (task, _) in tasks {
                self.forget(task);
            }
            let mut inbox = self.shared().inbox();
            let worker = &mut inbox.workers[rank as usize];
            worker.gone.get_or_insert_with(|| Arc::new(Gone::Stopped));
        }
        self.command(Command::StopWorkers(ranks));
    }

    /// Ends the cluster.
    pub fn stop(&self) {
        self.command(Command::Stop);
    }

    /// Whether the cluster has ended and nothing of it is left; waits up to `most` for that.
    pub fn is_closed(&mut self, most: Duration) -> bool {
        let closed = {
            let mut inbox = self.shared().inbox();
            inbox.waiting = true;
            inbox.closed
        };
        if !closed {
            self.shared().wait(most);
        }
        let closed = closed || self.shared().inbox().closed;
        if closed {
            if let Some(thread) = self.inner.thread.take() {
                // Its last act was to say that it is closed.
                let _ = thread.join();
            }
        }
        closed
    }

    /// A worker as it is known now.
    pub fn worker(&self, rank: Rank) -> WorkerView {
        let inbox = self.shared().inbox();
        inbox
            .workers
            .get(rank as usize)
            .cloned()
            .unwrap_or_default()
    }

    /// All hosts as they are known now.
    pub fn hosts(&self) -> Vec<HostView> {
        self.shared().inbox().hosts.clone()
    }

    /// What has come to be shown since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        self.shared().inbox().events.drain(..).collect()
    }
}

fn submit(inner: &Inner, writing: &mut Writing, chunk: Vec<u8>, last: bool) {
    let first = std::mem::replace(&mut writing.first, false);
    if first {
        inner.shared.inbox().expected.insert(writing.task, None);
    }
    inner.shared.queued.fetch_add(chunk.len(), Ordering::SeqCst);
    let command = Command::Submit {
        rank: writing.rank,
        task: writing.task,
        job: writing.job,
        chunk: Bytes::from(chunk),
        first,
        last,
    };
    // As in `Hub::command`.
    let _ = inner.commands.send(command);
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
