//! R's thread, as `R/task-failures.R` has it: it sends tasks through the hub's handle, waits for their answers,
//! and carries out what the policy says of those that were lost. What the hub should answer is known here, too.

use crate::parts::{Draws, Effect, End, LARGEST, Manners, Task, group, origin, part};
use crate::{Sim, TakeOrder};
use rand::Rng;
use rustcluster_core::head::hub::{Answer, StartedTask, Turn};
use rustcluster_core::head::retry::{Policy, Verdict};
use rustcluster_core::head::scheduler::events::{Demand, Note, Outcome, Termination};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::dedup::Chunk;
use rustcluster_core::protocol::frame::MAX_BODY;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank, TaskId};
use rustcluster_core::protocol::limits::{GRANT, RESULT_WINDOW, SEND_WINDOW};
use std::time::Duration;

/// Messages that last are shorter.
const LARGEST_SETUP_CALL: usize = 300_000;

/// The message of a task that is being written.
pub struct Message {
    pub task: TaskId,
    sent: usize,
    /// The head has not heard of it.
    pub first: bool,
    /// It has been outstanding before.
    again: bool,
}

/// A blob that R has made.
pub struct Made {
    pub id: BlobId,
    /// The tasks whose messages may begin with it.
    group: TaskId,
    len: usize,
}

/// What there is for R.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ready {
    Answer,
    TimedOut,
    GivenUp,
    Revoked,
    Lost,
}

impl Ready {
    /// What the hub has told, of which task.
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
    pub fn size(&mut self, answer: bool) -> usize {
        let rng = &mut self.rng;
        let size = match (self.setup.sizes, rng.random_range(0..40)) {
            (2, _) if answer => rng.random_range(1_000_000..LARGEST),
            (0, _) | (_, 0..25) => rng.random_range(0..2_000),
            (_, 25..35) => rng.random_range(0..100_000),
            (_, 35..38) => rng.random_range(0..600_000),
            _ => rng.random_range(0..LARGEST),
        };
        // Boundaries are where mistakes are.
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

    /// Begins a task; [`Sim::write_chunk`] does the rest.
    pub fn begin_task(&mut self, owner: Rank, harmless: bool) {
        if self.rng.random_ratio(1, 60) {
            self.job += 1;
        }
        // Mostly the current job, as verbs do; sometimes an older one, or none.
        let job = if self.rng.random_ratio(1, 30) {
            self.rng.random_range(0..=self.job)
        } else {
            self.job
        };
        let id = self.facts.tasks.len() as TaskId;
        let faults = self.setup.faults > 0 && !harmless;
        let mut len = self.size(false);
        let answer_len = self.size(true);
        let mut draws = match self.rng.random_range(0..3) {
            0 => Draws::from_number(self.rng.random()),
            _ => Draws::Nothing,
        };
        let limits = [None, None, Some(50), Some(500), Some(60_000)];
        let own = limits[self.rng.random_range(0..limits.len())].map(Duration::from_millis);
        let own = own.filter(|_| faults && self.setup.limits);
        let mut effect = None;
        if self.rng.random_ratio(1, self.setup.setup_messages) {
            len = len.clamp(1, LARGEST_SETUP_CALL);
            let setup_messages = Effect::of_task(id, len);
            draws = setup_messages.draws();
            effect = Some(setup_messages);
        }
        let prefetch = self.setup.prefetch > 0 && self.rng.random_ratio(1, self.setup.prefetch);
        let made = self.share(id, owner, len);
        let turn = if prefetch { Turn::Prefetch } else { Turn::Last };
        let setup_call = effect.map(|effect| effect.name());
        let blob = made.map(|made| made.0);
        let started = self.hub.begin(owner, job, setup_call, turn, |_| blob);
        if started.is_ok() {
            self.withdraw_stale(owner, job);
        }
        self.notes();
        let Ok(started) = started else {
            // R says so to whoever wanted it.
            assert!(self.is_terminated(owner), "nobody is gone");
            return;
        };
        assert_eq!(started.task, id);
        self.hub.limit_time(own);
        self.check_place(owner, started, effect.is_some());
        self.facts.tasks.push(Task {
            owner,
            place: started.assigned,
            job,
            len,
            answer_len,
            stuck: faults && self.rng.random_ratio(1, 12),
            poison: faults && self.rng.random_ratio(1, 30),
            manners: match self.rng.random_range(0..3) {
                0 => Manners::Stop,
                1 => Manners::Restart,
                _ => Manners::Ignore,
            },
            draws,
            effect,
            prefetch,
            own_limit: own,
            limit: own.into_iter().chain(self.setup.timeout).min(),
            ..Task::new(id)
        });
        self.write(id, started, made, false);
    }

    /// Only if R knows that a worker is gone, or another is at its tasks, another gets a task.
    pub fn check_place(&self, owner: Rank, started: StartedTask, setup_call: bool) {
        let place = &self.facts.places[started.assigned as usize];
        assert!(
            !place.termination,
            "given to worker {}, which is gone",
            started.assigned
        );
        if started.assigned == owner {
            return;
        }
        assert!(!setup_call, "what lasts is given to another");
        let is_guest = |&&id: &&TaskId| self.facts.tasks[id as usize].place == started.assigned;
        let reassigned = self.outstanding[owner as usize].iter().find(is_guest);
        assert!(
            self.is_terminated(owner) || reassigned.is_some(),
            "worker {owner} lives"
        );
    }

    /// A verb that finds tasks of others on its worker cancels them.
    pub fn withdraw_stale(&mut self, owner: Rank, job: JobId) {
        if job == 0 {
            return;
        }
        let outstanding = self.outstanding[owner as usize].iter().copied();
        let stale = outstanding.filter(|&task| self.facts.tasks[task as usize].job != job);
        for task in stale.collect::<Vec<_>>() {
            self.withdraw(task);
        }
    }

    /// Begins to write a message. `before`: it has been outstanding before.
    fn write(
        &mut self,
        id: TaskId,
        started: StartedTask,
        made: Option<(BlobId, usize)>,
        before: bool,
    ) {
        let task = &mut self.facts.tasks[id as usize];
        task.place = started.assigned;
        task.complete = false;
        task.started = false;
        task.left = None;
        if !before {
            task.since = self.facts.places[task.owner as usize].reported_seeds.len() - 1;
        }
        self.facts.places[task.place as usize].is_substitute |= task.is_reassigned();
        let sent = made.filter(|_| started.has_blob).map_or(0, |made| made.1);
        self.writing = Some(Message {
            task: id,
            sent,
            first: true,
            again: before,
        });
    }

    /// What a message may begin with: a blob's number and its length.
    fn share(&mut self, task: TaskId, place: Rank, len: usize) -> Option<(BlobId, usize)> {
        if self.rng.random_ratio(1, 30) && !self.made.is_empty() {
            let at = self.rng.random_range(0..self.made.len());
            let made = self.made.swap_remove(at);
            self.hub.drop_blob(made.id);
            self.notes();
        }
        if self.rng.random_ratio(1, 3) {
            return None;
        }
        let group = group(task);
        let fits = |made: &&Made| made.group == group && made.len <= len;
        let usable = |made: &&Made| self.hub.has_blob(place, made.id);
        let made = self.made.iter().filter(fits).find(usable);
        if let Some(made) = made {
            return Some((made.id, made.len));
        }
        let ranks = self.some_ranks(place);
        let most = match self.rng.random_range(0..3) {
            0 => len,
            _ => self.rng.random_range(0..=len),
        };
        let id = self.hub.begin_blob(&ranks, false);
        let gives_up = self.rng.random_ratio(1, 10);
        let mut at = 0;
        loop {
            let n = self.rng.random_range(1..=MAX_BODY).min(most - at);
            let last = at + n == most;
            if last && gives_up {
                self.hub.abandon();
                self.facts.seen.aborted += 1;
                self.notes();
                assert!(!self.hub.has_blob(place, id));
                return None;
            }
            self.hub.write_chunk(self.chunk(task, at, n), last);
            at += n;
            if last {
                break;
            }
            if self.rng.random_ratio(1, 5) {
                let host = self.at[place as usize].0;
                self.flush(host, 100_000);
            }
        }
        let has = self.hub.has_blob(place, id);
        self.made.push(Made {
            id,
            group,
            len: most,
        });
        has.then_some((id, most))
    }

    /// This worker and others, which may be gone.
    pub fn some_ranks(&mut self, place: Rank) -> Vec<Rank> {
        let mut ranks = vec![place];
        for _ in 0..self.rng.random_range(0..self.setup.workers.min(20)) {
            ranks.push(self.rng.random_range(0..self.setup.workers) as Rank);
        }
        ranks
    }

    fn chunk(&self, task: TaskId, at: usize, n: usize) -> Chunk {
        let number = (origin(task, false) + at) as u128 * MAX_BODY as u128 * 2 + n as u128;
        Chunk {
            bytes: part(task, false, at, n),
            key: self.setup.keep.map(|_| number),
        }
    }

    /// Submits the next chunk of the message that is being written.
    pub fn write_chunk(&mut self) {
        let Some(writing) = &mut self.writing else {
            return;
        };
        let id = writing.task;
        let task = &mut self.facts.tasks[id as usize];
        let left = task.len - writing.sent;
        let n = if self.setup.whole_chunks || self.rng.random() {
            left.min(MAX_BODY)
        } else {
            self.rng.random_range(0..=left.min(MAX_BODY))
        };
        // The last chunk may be empty, and may follow later.
        let last = n == left && (self.setup.whole_chunks || self.rng.random());
        let (at, again) = (writing.sent, writing.again);
        writing.sent += n;
        if std::mem::replace(&mut writing.first, false) {
            assert!(task.end.is_none() && !task.open);
            task.open = true;
        }
        if last {
            task.complete = true;
            self.writing = None;
            if !again {
                self.outstanding[task.owner as usize].push_back(id);
            }
        }
        self.hub.write_chunk(self.chunk(id, at, n), last);
        self.notes();
    }

    /// R could not finish the message.
    pub fn abandon(&mut self) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        self.resume = None;
        self.withdraw(writing.task);
        self.hub.abandon();
        self.notes();
        let open = self.facts.tasks[writing.task as usize].open;
        assert!(!open, "abandoned task {} lives", writing.task);
    }

    pub fn end(&mut self, id: TaskId, end: End) {
        let task = &mut self.facts.tasks[id as usize];
        assert_eq!(task.end, None, "task {id} ends for R again: {end:?}");
        task.end = Some(end);
        let owner = task.owner;
        self.outstanding[owner as usize].retain(|&other| other != id);
    }

    /// R does not want this task any more. What there is of its answer is dropped.
    pub fn withdraw(&mut self, id: TaskId) {
        self.end(id, End::Cancelled);
        self.ready.retain(|&(other, ..)| other != id);
        let place = self.facts.tasks[id as usize].place;
        if self.arriving.get(&place).is_some_and(|&(at, _)| at == id) {
            self.arriving.remove(&place);
        }
    }

    pub fn cancel_job(&mut self, job: JobId) {
        let is_of_job = |writing: &Message| self.facts.tasks[writing.task as usize].job == job;
        // Sometimes with another's message still being written.
        if self.writing.as_ref().is_some_and(is_of_job) || self.rng.random() {
            self.abandon();
        }
        let outstanding = self.outstanding.iter().flatten().copied();
        let matching = outstanding.filter(|&task| self.facts.tasks[task as usize].job == job);
        let matching: Vec<TaskId> = matching.collect();
        for &task in &matching {
            self.withdraw(task);
        }
        self.hub.cancel_job(job);
        self.notes();
        for task in matching {
            let open = self.facts.tasks[task as usize].open;
            assert!(!open, "task {task} outlives its job");
        }
    }

    /// R wants to give one of its tasks to another worker, if it has not started.
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
        let task = &mut self.facts.tasks[id as usize];
        task.asked_back = true;
        self.hub.revoke(id);
        self.notes();
    }

    /// Which of what has ended R gets next if it waits so.
    fn next_ready(&self, waiting: Waiting) -> Option<usize> {
        let Waiting::For(owner) = waiting else {
            return (!self.ready.is_empty()).then_some(0);
        };
        let &front = self.outstanding[owner as usize].front()?;
        let tasks = &self.facts.tasks;
        let job = tasks[front as usize].job;
        let found = self.ready.iter().position(|&(task, ..)| task == front);
        found.or_else(|| {
            self.ready.iter().position(|&(task, _, ready)| {
                ready == Ready::Lost && job != 0 && tasks[task as usize].job == job
            })
        })
    }

    /// Takes what R waits for if it is there, or the loss of another task of the same job.
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
        // Now and then R asks in vain.
        if at.is_none() && !self.rng.random_ratio(1, 50) {
            return;
        }
        let answer = match waiting {
            Waiting::Any => {
                let all = (0..self.facts.places.len() as Rank).collect();
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
                self.decide(id, termination);
            }
        }
        self.notes();
    }

    /// What becomes of a task that was lost.
    fn decide(&mut self, id: TaskId, termination: &Termination) {
        // A message that was being written is finished before R waits.
        assert!(self.writing.is_none());
        let task = &mut self.facts.tasks[id as usize];
        task.told += 1;
        assert_eq!(task.told, task.failures);
        let policy = Policy::new(self.facts.retries);
        let verdict = task.attempts.verdict(policy, termination);
        if verdict == Verdict::Raise {
            self.fail(id);
            return;
        }
        task.attempts.record(());
        let (owner, before, len, own) = (task.owner, task.place, task.len, task.own_limit);
        let setup_call = task.effect.map(|effect| effect.name());
        if verdict == Verdict::GiveUp {
            self.ready.push_back((id, 0, Ready::GivenUp));
            self.hub.give_up(id);
            return;
        }
        let made = self.share(id, before, len);
        let blob = made.map(|made| made.0);
        let started = match self.hub.try_again(owner, id, setup_call, |_| blob) {
            Ok(started) => started,
            Err((place, _)) => {
                assert!(place == before && self.is_terminated(before));
                self.fail(id);
                return;
            }
        };
        assert_eq!(started.task, id);
        self.hub.limit_time(own);
        if started.assigned == before {
            self.facts.seen.again += 1;
        } else {
            self.check_place(before, started, setup_call.is_some());
            self.facts.seen.moved += 1;
        }
        self.write(id, started, made, true);
    }

    /// Nobody can take a lost task: its verb ends with an error.
    fn fail(&mut self, id: TaskId) {
        self.resume = None;
        self.end(id, End::Error);
        let task = &self.facts.tasks[id as usize];
        let job = task.job;
        self.hub.forget(id);
        if job != 0 {
            self.cancel_job(job);
        }
    }

    pub fn wait_for(&mut self, waiting: Option<Waiting>) {
        self.waiting = waiting;
        let demand = match waiting {
            None => Demand::Nothing,
            Some(Waiting::Any) => Demand::AnyOf((0..self.facts.places.len() as Rank).collect()),
            Some(Waiting::For(owner)) => {
                let front = self.outstanding[owner as usize].front();
                let place = front.map(|&task| self.facts.tasks[task as usize].place);
                Demand::Rank(place.unwrap_or(owner))
            }
        };
        self.hub
            .with_scheduler(|scheduler| scheduler.demand(demand));
    }

    /// R comes to wait for an answer.
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
            // The oldest, or any: R's code may take them in any order.
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

    /// What the scheduler noted, and all that can be checked after any step.
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
                    let place = &mut self.facts.places[rank as usize];
                    // Once; or it is stopped when its host is lost, and does not come back with that; or
                    // its agent, which was to make it again after a pause, is lost or does not do so.
                    let again = std::mem::replace(&mut place.termination, true);
                    let waited = std::mem::replace(&mut place.waits, termination.is_tried_again());
                    place.unacknowledged += usize::from(place.waits);
                    let ends_waiting = waited && matches!(*termination, Termination::Host(_));
                    assert!(!again || matches!(*termination, Termination::Stopped) || ends_waiting);
                    (place.current, place.next) = (None, None);
                    self.arriving.remove(&rank);
                }
                Note::Lost { rank, task, .. } => {
                    let place = &mut self.facts.places[rank as usize];
                    assert!(!place.termination);
                    assert_eq!(lost, None, "the loss of a task is not told");
                    lost = task.then_some(rank);
                    place.current = None;
                    place.unacknowledged += 1;
                    place.next_when_lost = place.next.take();
                    self.facts.seen.put_back += usize::from(place.next_when_lost.is_some());
                    self.arriving.remove(&rank);
                }
                Note::Up { rank, .. } => assert!(!self.facts.places[rank as usize].termination),
                Note::Replaced { rank, killed, .. } => {
                    let place = &mut self.facts.places[rank as usize];
                    assert!(!place.termination);
                    assert!(killed.is_some() || place.current.is_none());
                    place.current = None;
                    let next = place.next.take();
                    place.unacknowledged += usize::from(killed.is_some());
                    self.facts.seen.put_back += usize::from(next.is_some());
                    self.facts.seen.killed += usize::from(killed.is_some());
                    self.facts.seen.replaced += usize::from(killed.is_none());
                }
                Note::StateNotLogged { rank } => {
                    assert!(!self.facts.places[rank as usize].kept);
                    self.facts.seen.not_logged += 1;
                }
                Note::LeftOut { agent, .. } => {
                    let ranks = &self.hosts[agent].ranks;
                    let termination = |&rank: &Rank| self.facts.places[rank as usize].termination;
                    assert!(ranks.iter().all(termination));
                    self.facts.seen.left_out += 1;
                }
                Note::Ended { .. } => {}
                // Agents make no worker again after a pause here.
                Note::Back { .. }
                | Note::Output { .. }
                | Note::Usage { .. }
                | Note::Dump { .. }
                | Note::ProgressEvent { .. }
                | Note::LeftBehind { .. }
                | Note::Failed { .. }
                | Note::StartFailed { .. } => {
                    panic!("{note:?}")
                }
            }
        }
        assert_eq!(lost, None, "the loss of a task is not told");
        self.take();
        self.check_buffered();
        let blocked = self
            .hub
            .with_scheduler(|scheduler| scheduler.is_blocked_on_credit());
        self.facts.seen.blocked += usize::from(blocked);
    }

    fn done(&mut self, rank: Rank, id: TaskId, job: JobId, outcome: Outcome, just_lost: bool) {
        let task = &mut self.facts.tasks[id as usize];
        let place = &mut self.facts.places[rank as usize];
        assert!(task.open, "task {id} ended twice: {outcome:?}");
        task.open = false;
        assert_eq!((task.place, task.job), (rank, job));
        let wanted = task.end.is_none();
        let setup_call = place.effects.iter().any(|effect| effect.task == id);
        let (ready, held) = match outcome {
            Outcome::Answer(body) => {
                assert!(wanted, "an answer to withdrawn task {id}");
                assert!(task.complete && !task.stuck && !task.poison);
                assert!(task.started);
                assert_eq!(setup_call, task.effect.is_some(), "task {id} does not last");
                assert_eq!(self.arriving.remove(&rank), Some((id, body.len)));
                check_answer(id, task.answer_len, &body);
                self.facts.seen.answers += 1;
                self.facts.seen.in_vain += usize::from(task.asked_back);
                self.facts.seen.reassigned +=
                    usize::from(task.is_reassigned() && !task.draws.is_nothing());
                (Ready::Answer, body.len)
            }
            Outcome::Lost(termination) => {
                assert!(wanted);
                assert!(place.termination || just_lost, "lost to a living worker");
                assert!(
                    !matches!(*termination, Termination::Worker(ref failure) if failure.tail != "killed")
                );
                assert!(
                    place.termination || place.next_when_lost != Some(id),
                    "task {id} is lost before its turn"
                );
                // With a host the last answers may be lost on their way.
                assert!(!setup_call || place.termination, "lost task {id} lasts");
                task.failures += 1;
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
                assert!(wanted && task.asked_back);
                assert!(!task.started, "task {id} is recalled and has started");
                task.revoked = true;
                self.facts.seen.revoked += 1;
                (Ready::Revoked, 0)
            }
            Outcome::Cancelled => {
                assert_eq!(task.end, Some(End::Cancelled), "cancelled by nobody");
                self.facts.seen.cancelled += 1;
                return;
            }
        };
        self.ready.push_back((id, held, ready));
    }

    /// What the head holds: exactly what R has not taken, and within its bound.
    ///
    /// The bound, of the bytes beyond each result's first [`RESULT_WINDOW`] (which comes unasked):
    /// leave is given only while less than the limit is held or on its way, so at most `limit +
    /// GRANT`; beyond that, one result alone is completed for [`Want::AnyOf`], and for [`Want::Rank`]
    /// one, and, where tasks of several wait for one worker, those which that has to do first, each of
    /// which may be asked for by up to a [`GRANT`] more than it has.
    fn check_buffered(&mut self) {
        let arriving = self.arriving.values().copied();
        let held = arriving.chain(self.ready.iter().map(|&(task, len, _)| (task, len)));
        let (mut all, mut large, mut others) = (0, 0, 0);
        for (task, len) in held {
            all += len;
            if len > RESULT_WINDOW {
                large += len - RESULT_WINDOW;
                let place = self.facts.tasks[task as usize].place;
                others += usize::from(self.facts.places[place as usize].is_substitute);
            }
        }
        let buffered = self.hub.with_scheduler(|scheduler| scheduler.buffered());
        assert_eq!(buffered, all);
        let rtts = match self.setup.order {
            TakeOrder::Mixed => 2,
            // Jobs take them as they come.
            TakeOrder::ByRank if self.facts.seen.jobs > 0 => 2,
            _ => 1,
        };
        let most = self.setup.limit + GRANT + (rtts + others) * (LARGEST + GRANT);
        if !self.setup.blocking {
            assert!(large <= most, "{large} bytes of large results, most {most}");
        }
    }
}

/// Whose answer R waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Waiting {
    Any,
    /// The oldest of those given to this worker.
    For(Rank),
}

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
