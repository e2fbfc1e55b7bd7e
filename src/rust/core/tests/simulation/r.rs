//! Simulates R's thread, like `R/task-failures.R`: sends tasks through the hub's handle, waits for their answers,
//! and applies the retry policy after worker failures. Also computes the answers that the hub must return.

use crate::join::Keeps;
use crate::parts::{Effect, End, LARGEST, OnInterrupt, RngUse, Task, group, origin, part};
use crate::{Sim, TakeOrder};
use rand::Rng;
use rustcluster_core::head::hub::{Answer, StartedTask, Turn};
use rustcluster_core::head::retry::{MAX_JOB_ENDS, Policy, Verdict};
use rustcluster_core::head::scheduler::events::{Demand, Note, Outcome, Termination};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::dedup::Chunk;
use rustcluster_core::protocol::frame::MAX_BODY;
use rustcluster_core::protocol::ids::{BlobId, JobId, KEEP, RESTORE, Rank, TaskId};
use rustcluster_core::protocol::limits::{GRANT, RESULT_WINDOW, SEND_WINDOW};
use std::time::Duration;

/// Maximum size of the message of a set-up call.
const LARGEST_SETUP_CALL: usize = 300_000;

/// The message of a task that is being written.
pub struct Message {
    pub task: TaskId,
    sent: usize,
    /// No chunk of it has been submitted yet.
    pub first: bool,
    /// The task is retried.
    again: bool,
    /// It is a set-up call for a worker that has not joined.
    only_logged: bool,
}

/// A blob that R has sent.
pub struct Made {
    pub id: BlobId,
    /// The group of tasks whose messages may begin with it.
    group: TaskId,
    len: usize,
}

/// What the hub reports to R about a task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ready {
    Answer,
    TimedOut,
    GivenUp,
    Revoked,
    Lost,
}

impl Ready {
    /// The task of an answer of the hub, and what the answer reports.
    pub fn of(answer: &Answer) -> Option<(TaskId, Ready)> {
        Some(match answer {
            Answer::Ready { task, .. } => (*task, Ready::Answer),
            Answer::TimedOut { task, .. } => (*task, Ready::TimedOut),
            Answer::GivenUp { task, .. } => (*task, Ready::GivenUp),
            Answer::Revoked { task, .. } => (*task, Ready::Revoked),
            Answer::Lost { task, .. } => (*task, Ready::Lost),
            Answer::Pending | Answer::NothingSent => return None,
        })
    }
}

impl Sim {
    /// A random size of a message or an answer.
    pub fn size(&mut self, answer: bool) -> usize {
        let rng = &mut self.rng;
        let size = match (self.setup.sizes, rng.random_range(0..40)) {
            (2, _) if answer => rng.random_range(1_000_000..LARGEST),
            (0, _) | (_, 0..25) => rng.random_range(0..2_000),
            (_, 25..35) => rng.random_range(0..100_000),
            (_, 35..38) => rng.random_range(0..600_000),
            _ => rng.random_range(0..LARGEST),
        };
        // Sizes at limits are the most likely to fail.
        let size = match rng.random_range(0..60) {
            0 => 0,
            1 => MAX_BODY,
            2 => RESULT_WINDOW,
            3 => RESULT_WINDOW + 1,
            4 if self.setup.sizes > 0 => RESULT_WINDOW + GRANT,
            5 if self.setup.sizes > 0 => SEND_WINDOW,
            _ => size,
        };
        size.min(self.setup.largest)
    }

    /// Begins a task; [`Sim::write_chunk`] writes its message.
    pub fn begin_task(&mut self, owner: Rank, harmless: bool) {
        if self.rng.random_ratio(1, 60) {
            self.job += 1;
        }
        // Mostly of the current job, like tasks of verbs; sometimes of an older job, or of none.
        let job = if self.rng.random_ratio(1, 30) {
            self.rng.random_range(0..=self.job)
        } else {
            self.job
        };
        let id = self.facts.tasks.next();
        let faults = self.setup.faults > 0 && !harmless;
        let mut len = self.size(false);
        let answer_len = self.size(true);
        let mut rng_use = match self.rng.random_range(0..3) {
            0 => RngUse::from_number(self.rng.random()),
            _ => RngUse::Nothing,
        };
        let limits = [None, None, Some(50), Some(500), Some(60_000)];
        let own = limits[self.rng.random_range(0..limits.len())].map(Duration::from_millis);
        let own = own.filter(|_| faults && self.setup.limits);
        let mut effect = None;
        if self.rng.random_ratio(1, self.setup.setup_calls) {
            // The messages of set-up calls to all workers have odd lengths.
            len = len.clamp(2, LARGEST_SETUP_CALL) & !1;
            let of_message = Effect::of_task(id, len);
            rng_use = of_message.rng_use();
            effect = Some(of_message);
        }
        let prefetch = self.setup.prefetch > 0 && self.rng.random_ratio(1, self.setup.prefetch);
        let made = self.blob_for(id, owner, len);
        self.notes();
        let may_log = effect.is_some() && self.hub.is_awaited(owner);
        let turn = if prefetch { Turn::Prefetch } else { Turn::Last };
        let setup_call = effect.map(|effect| effect.name());
        let blob = made.map(|made| made.0);
        let started = self.hub.begin(owner, job, setup_call, turn, |_| blob);
        if started.is_ok() {
            self.withdraw_stale(owner, job);
        }
        self.notes();
        let Ok(started) = started else {
            // R raises an error.
            assert!(
                self.is_terminated(owner),
                "worker {owner} has not terminated"
            );
            return;
        };
        assert_eq!(started.task, id);
        assert_eq!(started.only_logged, may_log);
        self.hub.limit_time(own);
        if !may_log {
            self.check_assigned(owner, started, effect.is_some());
        }
        self.facts.tasks.push(Task {
            owner,
            assigned: started.assigned,
            job,
            len,
            answer_len,
            stuck: faults && self.rng.random_ratio(1, 12),
            poison: faults && self.rng.random_ratio(1, 30),
            on_interrupt: match self.rng.random_range(0..3) {
                0 => OnInterrupt::Stop,
                1 => OnInterrupt::Restart,
                _ => OnInterrupt::Ignore,
            },
            rng_use,
            effect,
            prefetch,
            own_limit: own,
            limit: own.into_iter().chain(self.setup.timeout).min(),
            ..Task::new(id)
        });
        self.write(id, started, made, false);
    }

    /// Checks that a task is reassigned only if its owner has terminated, or if another worker has earlier
    /// tasks of the same owner.
    pub fn check_assigned(&self, owner: Rank, started: StartedTask, setup_call: bool) {
        let known = &self.facts.workers[started.assigned as usize];
        assert!(
            !known.is_terminated,
            "assigned to worker {}, which has terminated",
            started.assigned
        );
        if started.assigned == owner {
            return;
        }
        assert!(!setup_call, "a set-up call is reassigned");
        let is_on_same_worker = |&&id: &&TaskId| self.facts.tasks[id].assigned == started.assigned;
        let reassigned = self.outstanding[owner as usize]
            .iter()
            .find(is_on_same_worker);
        assert!(
            self.is_terminated(owner) || reassigned.is_some(),
            "worker {owner} has not terminated"
        );
    }

    /// A verb cancels the tasks of other jobs that it finds on its worker.
    pub fn withdraw_stale(&mut self, owner: Rank, job: JobId) {
        if job == 0 {
            return;
        }
        let outstanding = self.outstanding[owner as usize].iter().copied();
        let stale = outstanding.filter(|&task| self.facts.tasks[task].job != job);
        for task in stale.collect::<Vec<_>>() {
            self.withdraw(task);
        }
    }

    /// Begins to write a message. `retried`: the task has been outstanding before.
    pub fn write(
        &mut self,
        id: TaskId,
        started: StartedTask,
        made: Option<(BlobId, usize)>,
        retried: bool,
    ) {
        let task = &mut self.facts.tasks[id];
        task.assigned = started.assigned;
        task.complete = false;
        task.started = false;
        task.seed_after = None;
        if !retried {
            task.seeds_at_submission =
                self.facts.workers[task.owner as usize].reported_seeds.len() - 1;
        }
        self.facts.workers[task.assigned as usize].had_reassigned |= task.is_reassigned();
        if !retried {
            self.overtake(started.assigned);
        }
        let sent = made.filter(|_| started.has_blob).map_or(0, |made| made.1);
        self.writing = Some(Message {
            task: id,
            sent,
            first: true,
            again: retried,
            only_logged: started.only_logged,
        });
    }

    /// The blob that a message may begin with, and its length. May create or drop blobs.
    fn blob_for(&mut self, task: TaskId, rank: Rank, len: usize) -> Option<(BlobId, usize)> {
        if self.rng.random_ratio(1, 30) && !self.made.is_empty() {
            let at = self.rng.random_range(0..self.made.len());
            let made = self.made.swap_remove(at);
            self.hub.drop_blob(made.id);
            self.notes();
        }
        if self.rng.random_ratio(1, 3) {
            return None;
        }
        let group = group(self.begins_like(task));
        let fits = |made: &&Made| made.group == group && made.len <= len;
        let awaited = self.hub.is_awaited(rank);
        let usable = |made: &&Made| awaited || self.hub.has_blob(rank, made.id);
        let made = self.made.iter().filter(fits).find(usable);
        if let Some(made) = made {
            return Some((made.id, made.len));
        }
        let ranks = self.some_ranks(rank);
        let max = match self.rng.random_range(0..3) {
            0 => len,
            _ => self.rng.random_range(0..=len),
        };
        let logged = self.setup.keeps != Keeps::Nothing && self.rng.random();
        let id = self.hub.begin_blob(&ranks, logged);
        let abandons = self.rng.random_ratio(1, 10);
        let mut at = 0;
        loop {
            let n = self.rng.random_range(1..=MAX_BODY).min(max - at);
            let last = at + n == max;
            if last && abandons {
                self.hub.abandon();
                self.facts.seen.aborted_blobs += 1;
                self.notes();
                assert!(!self.hub.has_blob(rank, id));
                return None;
            }
            self.hub.write_chunk(self.chunk(task, at, n), last);
            at += n;
            if last {
                break;
            }
            if self.rng.random_ratio(1, 5) {
                let host = self.at[rank as usize].0;
                self.flush(host, 100_000);
            }
        }
        let has = awaited || self.hub.has_blob(rank, id);
        self.made.push(Made {
            id,
            group,
            len: max,
        });
        has.then_some((id, max))
    }

    /// This worker and others, which may have terminated.
    pub fn some_ranks(&mut self, rank: Rank) -> Vec<Rank> {
        let mut ranks = vec![rank];
        for _ in 0..self.rng.random_range(0..self.setup.workers.min(20)) {
            ranks.push(self.rng.random_range(0..self.setup.workers) as Rank);
        }
        ranks
    }

    /// The task whose message this one is like. All of the message is like that of another task, or only its blob, which
    /// is sent in other ways.
    fn begins_like(&self, task: TaskId) -> TaskId {
        match self.facts.tasks.get(task) {
            Some(known) if known.prefix.1 == known.len => known.prefix.0,
            _ => task,
        }
    }

    pub fn chunk(&self, task: TaskId, at: usize, n: usize) -> Chunk {
        let like = self.begins_like(task);
        let number = (origin(like, false) + at) as u128 * MAX_BODY as u128 * 2 + n as u128;
        Chunk {
            bytes: part(like, false, at, n),
            key: self.setup.chunk_cache.map(|_| number),
        }
    }

    /// R submits a task to a worker before it decides on those that were lost with its host: they do not start in order
    /// any more, because the tasks of a host that is back do not wait for such decisions. R decides on the lost tasks of
    /// a worker before it takes an answer of that worker, so that it has no reason yet to expect their effects.
    pub fn overtake(&mut self, rank: Rank) {
        for task in self.facts.tasks.iter_mut() {
            if task.lost_with_host && task.assigned == rank {
                task.order = None;
            }
        }
    }

    /// Submits the next chunk of the message that is being written.
    pub fn write_chunk(&mut self) {
        let Some(writing) = &mut self.writing else {
            return;
        };
        let id = writing.task;
        let task = &mut self.facts.tasks[id];
        let left = task.len - writing.sent;
        let n = if self.setup.whole_chunks || self.rng.random() {
            left.min(MAX_BODY)
        } else {
            self.rng.random_range(0..=left.min(MAX_BODY))
        };
        // The last chunk may be empty, and may follow later.
        let last = n == left && (self.setup.whole_chunks || self.rng.random());
        let (at, again, only_logged) = (writing.sent, writing.again, writing.only_logged);
        writing.sent += n;
        if std::mem::replace(&mut writing.first, false) && !only_logged {
            assert!(task.end.is_none() && !task.scheduled);
            task.scheduled = true;
        }
        if last {
            task.complete = true;
            self.writing = None;
            if only_logged {
                task.end = Some(End::Logged);
                self.facts.seen.only_logged += 1;
                let known = &mut self.facts.workers[task.owner as usize];
                known.logged.extend(task.effect);
                known.is_late = true;
            } else if !again {
                self.outstanding[task.owner as usize].push_back(id);
            }
        }
        self.hub.write_chunk(self.chunk(id, at, n), last);
        self.notes();
    }

    /// R fails to finish the message.
    pub fn abandon(&mut self) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        self.resume = None;
        self.withdraw(writing.task);
        self.hub.abandon();
        self.notes();
        let open = self.facts.tasks[writing.task].scheduled;
        assert!(!open, "abandoned task {} is still scheduled", writing.task);
    }

    /// Records the end of a task for R.
    pub fn end(&mut self, id: TaskId, end: End) {
        let task = &mut self.facts.tasks[id];
        assert_eq!(task.end, None, "task {id} ends for R again: {end:?}");
        task.end = Some(end);
        let owner = task.owner;
        self.outstanding[owner as usize].retain(|&other| other != id);
    }

    /// R cancels a task. The received part of its answer is discarded.
    pub fn withdraw(&mut self, id: TaskId) {
        self.end(id, End::Cancelled);
        self.ready.retain(|&(other, ..)| other != id);
        let rank = self.facts.tasks[id].assigned;
        if self.arriving.get(&rank).is_some_and(|&(at, _)| at == id) {
            self.arriving.remove(&rank);
        }
    }

    /// R cancels all tasks of a job.
    pub fn cancel_job(&mut self, job: JobId) {
        let is_of_job = |writing: &Message| self.facts.tasks[writing.task].job == job;
        // Sometimes while the message of another job is being written.
        if self.writing.as_ref().is_some_and(is_of_job) || self.rng.random() {
            self.abandon();
        }
        let outstanding = self.outstanding.iter().flatten().copied();
        let matching = outstanding.filter(|&task| self.facts.tasks[task].job == job);
        let matching: Vec<TaskId> = matching.collect();
        for &task in &matching {
            self.withdraw(task);
        }
        self.hub.cancel_job(job);
        self.notes();
        for task in matching {
            let open = self.facts.tasks[task].scheduled;
            assert!(!open, "task {task} outlives its job");
        }
    }

    /// R requests to revoke a task.
    pub fn revoke(&mut self) {
        let owner = self.rng.random_range(0..self.setup.workers);
        let tasks = &self.outstanding[owner];
        if tasks.is_empty() {
            return;
        }
        let id = tasks[self.rng.random_range(0..tasks.len())];
        if self.writing.as_ref().is_some_and(|w| w.task == id) {
            return;
        }
        let task = &mut self.facts.tasks[id];
        task.revoke_requested = true;
        self.hub.revoke(id);
        self.notes();
    }

    /// The index in `ready` of what R must get next if it waits for `waiting`.
    fn next_ready(&self, waiting: Waiting) -> Option<usize> {
        let Waiting::For(owner) = waiting else {
            return (!self.ready.is_empty()).then_some(0);
        };
        let &front = self.outstanding[owner as usize].front()?;
        let tasks = &self.facts.tasks;
        let job = tasks[front].job;
        let found = self.ready.iter().position(|&(task, ..)| task == front);
        found.or_else(|| {
            self.ready.iter().position(|&(task, _, ready)| {
                ready == Ready::Lost && job != 0 && tasks[task].job == job
            })
        })
    }

    /// Takes what R waits for, if it is ready, or the loss of another task of the same job.
    fn take(&mut self) {
        let Some(waiting) = self.waiting else {
            return;
        };
        let none = |owner: Rank| self.outstanding[owner as usize].is_empty();
        if matches!(waiting, Waiting::For(owner) if none(owner)) {
            self.wait_for(None);
            return;
        }
        let at = self.next_ready(waiting);
        // Sometimes R asks although nothing is ready.
        if at.is_none() && !self.rng.random_ratio(1, 50) {
            return;
        }
        let answer = match waiting {
            Waiting::Any => {
                let all = (0..self.facts.workers.len() as Rank).collect();
                self.hub.receive_any(&all, Duration::ZERO)
            }
            Waiting::For(owner) => self.hub.receive(owner, Duration::ZERO),
        };
        let Some((id, _, ready)) = at.and_then(|at| self.ready.remove(at)) else {
            assert!(
                matches!(answer, Answer::Pending | Answer::NothingSent),
                "{answer:?}"
            );
            let nothing = matches!(answer, Answer::NothingSent);
            self.wait_for(if nothing { None } else { Some(waiting) });
            return;
        };
        assert_eq!(
            Ready::of(&answer),
            Some((id, ready)),
            "R waits for {waiting:?}, and gets {answer:?}"
        );
        self.wait_for(None);
        self.moved += 1;
        match ready {
            Ready::Answer => self.end(id, End::Answer),
            Ready::TimedOut => self.end(id, End::TimedOut),
            Ready::GivenUp => self.end(id, End::GivenUp),
            Ready::Revoked => self.end(id, End::Revoked),
            Ready::Lost => {
                let Answer::Lost { termination, .. } = &answer else {
                    panic!("{answer:?}");
                };
                self.resume = Some(waiting);
                self.decide_retry(id, termination);
            }
        }
        self.notes();
    }

    /// Applies the retry policy to a task whose worker failed.
    fn decide_retry(&mut self, id: TaskId, termination: &Termination) {
        // R finishes the message that it writes before it waits.
        assert!(self.writing.is_none());
        let task = &mut self.facts.tasks[id];
        task.reported_failures += 1;
        task.lost_with_host = false;
        assert_eq!(task.reported_failures, task.failures);
        let policy = Policy::new(self.facts.retries);
        let verdict = task.attempts.verdict(policy, termination);
        if matches!(termination, Termination::JobEnded(_)) {
            let uncounted = task.job_ends < MAX_JOB_ENDS;
            assert!(!uncounted || verdict == Verdict::Retry);
            task.job_ends += 1;
            self.facts.seen.uncounted += usize::from(uncounted);
        } else if verdict == Verdict::Retry {
            let counted = task.failures - task.job_ends.min(MAX_JOB_ENDS);
            assert!(counted <= self.facts.retries);
        }
        if verdict == Verdict::Raise {
            self.fail(id);
            return;
        }
        task.attempts.record((), termination);
        let (owner, before, len, own) = (task.owner, task.assigned, task.len, task.own_limit);
        let setup_call = task.effect.map(|effect| effect.name());
        if verdict == Verdict::GiveUp {
            self.ready.push_back((id, 0, Ready::GivenUp));
            self.hub.give_up(id);
            return;
        }
        let made = self.blob_for(id, before, len);
        let blob = made.map(|made| made.0);
        let started = match self.hub.try_again(owner, id, setup_call, |_| blob) {
            Ok(started) => started,
            Err((rank, _)) => {
                assert!(rank == before && self.is_terminated(before));
                self.fail(id);
                return;
            }
        };
        assert_eq!(started.task, id);
        self.hub.limit_time(own);
        if started.assigned == before {
            self.facts.seen.retried += 1;
        } else {
            self.check_assigned(before, started, setup_call.is_some());
            self.facts.seen.moved_by_retry += 1;
        }
        self.write(id, started, made, true);
    }

    /// No worker can run a lost task: its verb ends with an error.
    fn fail(&mut self, id: TaskId) {
        self.resume = None;
        self.end(id, End::Error);
        let task = &self.facts.tasks[id];
        let job = task.job;
        self.hub.forget(id);
        if job != 0 {
            self.cancel_job(job);
        }
    }

    /// Sets what R waits for, and reports the demand to the scheduler.
    pub fn wait_for(&mut self, waiting: Option<Waiting>) {
        self.waiting = waiting;
        let demand = match waiting {
            None => Demand::Nothing,
            Some(Waiting::Any) => Demand::AnyOf((0..self.facts.workers.len() as Rank).collect()),
            Some(Waiting::For(owner)) => {
                let front = self.outstanding[owner as usize].front();
                let rank = front.map(|&task| self.facts.tasks[task].assigned);
                Demand::Rank(rank.unwrap_or(owner))
            }
        };
        self.hub
            .with_scheduler(|scheduler| scheduler.demand(demand));
    }

    /// R starts to wait for an answer.
    pub fn wait(&mut self) {
        if self.waiting.is_some() || self.writing.is_some() {
            return;
        }
        let waits = |waiting: &Waiting| match waiting {
            Waiting::Any => self.outstanding.iter().any(|tasks| !tasks.is_empty()),
            Waiting::For(owner) => !self.outstanding[*owner as usize].is_empty(),
        };
        if let Some(waiting) = self.resume.take().filter(waits) {
            self.wait_for(Some(waiting));
            self.take();
            return;
        }
        let by_rank = match self.setup.order {
            TakeOrder::ByRank => true,
            TakeOrder::AsTheyCome => false,
            TakeOrder::Mixed => self.rng.random(),
        };
        let fronts = || self.outstanding.iter().enumerate();
        let mut busy = fronts().filter_map(|(rank, tasks)| Some((*tasks.front()?, rank as Rank)));
        let waiting = if by_rank {
            // The oldest task or any other: R code may take answers in any order.
            let skip = self.rng.random_range(0..3) * self.rng.random_range(0..=self.setup.workers);
            let first = busy.next();
            let chosen = busy.nth(skip).or(first);
            chosen.map(|(_, rank)| Waiting::For(rank))
        } else {
            busy.next().map(|_| Waiting::Any)
        };
        if waiting.is_some() {
            self.wait_for(waiting);
            self.take();
        }
    }

    /// Processes the notes of the scheduler, and checks what must be true after each step.
    pub fn notes(&mut self) {
        let mut lost = None;
        for note in self.hub.take_notes() {
            self.moved += 1;
            match note {
                Note::Done {
                    rank,
                    task,
                    job,
                    outcome,
                } => {
                    let just_lost = lost.take() == Some(rank);
                    self.done(rank, task, job, outcome, just_lost);
                }
                Note::Terminated { rank, termination } => {
                    let known = &mut self.facts.workers[rank as usize];
                    // A worker terminates once, with two exceptions: a worker of a lost host is stopped, and
                    // a worker that awaits its restart loses its host.
                    let again = std::mem::replace(&mut known.is_terminated, true);
                    let was_away = std::mem::take(&mut known.is_away);
                    let of_host = termination.is_of_host();
                    let was_of_host = std::mem::replace(&mut known.is_of_host, of_host);
                    self.away.remove(&rank);
                    let waited =
                        std::mem::replace(&mut known.awaits_restart, termination.is_tried_again());
                    known.unacknowledged += usize::from(known.awaits_restart);
                    let ends_waiting = waited && termination.is_of_host();
                    // Or its host comes again, or does not.
                    let of_host = was_away || was_of_host && of_host;
                    let stopped = matches!(*termination, Termination::Stopped);
                    assert!(!again || stopped || ends_waiting || of_host);
                    (known.current, known.prefetched) = (None, None);
                    self.arriving.remove(&rank);
                }
                Note::Lost { rank, task, .. } => {
                    let known = &mut self.facts.workers[rank as usize];
                    assert!(!known.is_terminated || known.is_away);
                    assert_eq!(lost, None, "the loss of a task is not reported");
                    lost = task.then_some(rank);
                    known.current = None;
                    known.unacknowledged += 1;
                    known.prefetched_at_failure = known.prefetched.take();
                    self.facts.seen.requeued += usize::from(known.prefetched_at_failure.is_some());
                    self.arriving.remove(&rank);
                }
                Note::Up { rank, .. } => {
                    let known = &self.facts.workers[rank as usize];
                    assert!(!known.is_terminated || known.is_away);
                }
                Note::Replaced { rank, killed, .. } => {
                    let known = &mut self.facts.workers[rank as usize];
                    assert!(!known.is_terminated || known.is_away);
                    assert!(killed.is_some() || known.current.is_none());
                    known.current = None;
                    let next = known.prefetched.take();
                    known.unacknowledged += usize::from(killed.is_some());
                    self.facts.seen.requeued += usize::from(next.is_some());
                    self.facts.seen.killed += usize::from(killed.is_some());
                    self.facts.seen.replaced += usize::from(killed.is_none());
                }
                Note::StateNotLogged { rank } => {
                    assert!(!self.facts.workers[rank as usize].is_logged);
                    self.facts.seen.not_logged += 1;
                }
                Note::LeftOut { agent, .. } => {
                    let ranks = &self.hosts[agent].ranks;
                    let is_terminated =
                        |&rank: &Rank| self.facts.workers[rank as usize].is_terminated;
                    assert!(ranks.iter().all(is_terminated));
                    self.facts.seen.hosts_left_out += 1;
                }
                Note::Ended { .. } | Note::TimedOut { .. } => {}
                Note::Draining { agent, .. } => {
                    for rank in self.hosts[agent].ranks.clone() {
                        self.begins_to_drain(rank);
                    }
                    self.facts.seen.announced += 1;
                }
                Note::Drained { agent, .. } => {
                    let mut ranks = self.hosts[agent].ranks.iter();
                    assert!(ranks.all(|&rank| self.is_terminated(rank)));
                    self.facts.seen.drained += 1;
                }
                Note::Back { rank, .. } => self.restarted(rank),
                Note::Kept { rank, .. } => {
                    assert!(!self.facts.workers[rank as usize].is_terminated);
                    self.facts.seen.kept_workers += 1;
                }
                Note::SetupCalls { .. } | Note::SetupCall { .. } | Note::KeptAnswers { .. } => {}
                // No host is given back.
                Note::GivenBack { .. }
                | Note::Output { .. }
                | Note::Usage { .. }
                | Note::Dump { .. }
                | Note::ProgressEvent { .. }
                | Note::TaskFailed { .. }
                | Note::LeftBehind { .. }
                | Note::Failed { .. }
                | Note::StartFailed { .. } => {
                    panic!("{note:?}")
                }
            }
        }
        assert_eq!(lost, None, "the loss of a task is not reported");
        self.forget_calls();
        self.check_arrivals();
        self.take();
        self.check_buffered();
        let blocked = self
            .hub
            .with_scheduler(|scheduler| scheduler.is_blocked_on_credit());
        self.facts.seen.blocked += usize::from(blocked);
    }

    /// Checks the end of a task that the scheduler reports. `just_lost`: its worker has just failed.
    fn done(&mut self, rank: Rank, id: TaskId, job: JobId, outcome: Outcome, just_lost: bool) {
        if id & RESTORE != 0 {
            if matches!(outcome, Outcome::Answer(_)) {
                self.restoring_call_ended(rank, id);
                if !self.is_terminated(rank) {
                    self.catch_up(rank);
                }
            }
            return;
        }
        if id & KEEP != 0 {
            return self.call_ended(rank, id, &outcome);
        }
        let task = &mut self.facts.tasks[id];
        let known = &mut self.facts.workers[rank as usize];
        assert!(task.scheduled, "task {id} ended twice: {outcome:?}");
        task.scheduled = false;
        assert_eq!((task.assigned, task.job), (rank, job));
        let wanted = task.end.is_none();
        let setup_call = known.effects.iter().any(|effect| effect.task == id);
        let (ready, bytes) = match outcome {
            Outcome::Answer(body) => {
                assert!(wanted, "an answer to withdrawn task {id}");
                assert!(task.complete && !task.stuck && !task.poison);
                assert!(task.started);
                assert_eq!(
                    setup_call,
                    task.effect.is_some(),
                    "the effect of task {id} is missing or unexpected"
                );
                assert_eq!(self.arriving.remove(&rank), Some((id, body.len)));
                check_answer(id, task.answer_len, &body);
                known.logged.extend(task.effect);
                self.facts.seen.answers += 1;
                self.facts.seen.revoked_too_late += usize::from(task.revoke_requested);
                self.facts.seen.reassigned +=
                    usize::from(task.is_reassigned() && !task.rng_use.is_nothing());
                (Ready::Answer, body.len)
            }
            Outcome::Lost(_) | Outcome::Revoked if task.end == Some(End::Removed) => return,
            Outcome::Lost(termination) => {
                assert!(wanted);
                assert!(
                    known.is_terminated || just_lost,
                    "lost, but its worker has not failed"
                );
                assert!(
                    !matches!(*termination, Termination::Worker(ref failure) if failure.tail != "killed")
                );
                assert!(
                    known.is_terminated || known.prefetched_at_failure != Some(id),
                    "task {id} is lost although it was only prefetched"
                );
                // If the host is lost, the last answers may be lost with it.
                assert!(
                    !setup_call || known.is_terminated,
                    "lost task {id} has had an effect"
                );
                task.failures += 1;
                task.lost_with_host = termination.is_of_host();
                self.facts.seen.lost += 1;
                (Ready::Lost, 0)
            }
            Outcome::TimedOut => {
                assert!(wanted && task.limit.is_some());
                assert!(!setup_call);
                self.arriving.remove(&rank);
                self.facts.seen.timed_out += 1;
                (Ready::TimedOut, 0)
            }
            Outcome::Revoked => {
                assert!(wanted && (task.revoke_requested || task.movable && known.draining));
                self.facts.seen.revoked_by_drain += usize::from(!task.revoke_requested);
                assert!(!task.started, "task {id} is revoked and has started");
                task.revoked = true;
                self.facts.seen.revoked += 1;
                (Ready::Revoked, 0)
            }
            Outcome::Cancelled => {
                let requested = matches!(task.end, Some(End::Cancelled | End::Removed));
                assert!(requested, "cancelled without a request");
                self.facts.seen.cancelled += 1;
                return;
            }
        };
        self.ready.push_back((id, bytes, ready));
    }

    /// Checks that the head buffers exactly what R has not taken, and no more than its bound.
    ///
    /// The bound is for the bytes of large results beyond the first [`RESULT_WINDOW`] of each, which
    /// arrives without credit. Credit is granted only while buffered and granted bytes are below the limit,
    /// so that they are at most `limit + GRANT`. Some results are completed regardless of the limit: one
    /// for [`Demand::AnyOf`]; for [`Demand::Rank`] one, and, if reassigned tasks wait for the same worker,
    /// those that it runs first. Each of these may be granted up to a [`GRANT`] more than its size.
    fn check_buffered(&mut self) {
        let arriving = self.arriving.values().copied();
        let results = arriving.chain(self.ready.iter().map(|&(task, len, _)| (task, len)));
        let (mut all, mut large, mut others) = (0, 0, 0);
        for (task, len) in results {
            all += len;
            if len > RESULT_WINDOW {
                large += len - RESULT_WINDOW;
                let rank = self.facts.tasks[task].assigned;
                others += usize::from(self.facts.workers[rank as usize].had_reassigned);
            }
        }
        let buffered = self.hub.with_scheduler(|scheduler| scheduler.buffered());
        assert_eq!(buffered, all);
        let demanded = match self.setup.order {
            TakeOrder::Mixed => 2,
            // Jobs take results in any order.
            TakeOrder::ByRank if self.facts.seen.jobs > 0 => 2,
            _ => 1,
        };
        let max =
            self.setup.limit + GRANT + (demanded + others + self.change.calls) * (LARGEST + GRANT);
        if !self.setup.blocking {
            assert!(large <= max, "{large} bytes of large results, max {max}");
        }
    }
}

/// Which answer R waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Waiting {
    Any,
    /// That of the oldest task of this owner.
    For(Rank),
}

/// Checks that an answer is complete and has the bytes of this task.
pub fn check_answer(task: TaskId, len: usize, body: &Body) {
    assert_eq!(body.len, len, "task {task}");
    if let Some(memory) = &body.memory {
        assert!(body.chunks.is_empty());
        return assert_eq!(memory.len, len);
    }
    let mut at = 0;
    for chunk in &body.chunks {
        assert!(
            *chunk == part(task, true, at, chunk.len()),
            "task {task} at {at}"
        );
        at += chunk.len();
    }
    assert_eq!(at, len);
}
