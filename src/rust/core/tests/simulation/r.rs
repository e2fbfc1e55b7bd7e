//! R's thread and its handle, as in `hub/client.rs` and `R/task-failures.R`: it sends tasks, waits for their
//! answers, and decides what becomes of those that were lost.

use crate::parts::{Draws, Effect, End, LARGEST, Manners, Task, group, origin, part};
use crate::{Sim, TakeOrder};
use rand::Rng;
use rustcluster_core::head::scheduler::events::{Gone, Note, Outcome, Want};
use rustcluster_core::head::scheduler::task::Order;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::dedup::Chunk;
use rustcluster_core::protocol::frame::MAX_BODY;
use rustcluster_core::protocol::ids::{JobId, PayloadId, Rank, TaskId};
use rustcluster_core::protocol::limits::{GRANT, RESULT_WINDOW, SEND_WINDOW};

/// Messages that last are shorter.
const LARGEST_LASTING: usize = 300_000;

/// The message of a task that is being written.
pub struct Message {
    pub task: TaskId,
    sent: usize,
    /// The head has not heard of it.
    pub first: bool,
    order: Order,
    /// It has been outstanding before.
    again: bool,
}

/// A payload that R has made.
pub struct Made {
    pub id: PayloadId,
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
    Recalled,
    Lost { stopped: bool },
}

impl Sim {
    fn size(&mut self, answer: bool) -> usize {
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
        let id = self.facts.tasks.len() as TaskId;
        if self.rng.random_ratio(1, 4) {
            self.job += 1;
        }
        // Mostly the current job, as verbs do; sometimes an older one, or none.
        let job = if self.rng.random_ratio(1, 10) {
            self.rng.random_range(0..=self.job)
        } else {
            self.job
        };
        let faults = self.setup.faults > 0 && !harmless;
        let mut len = self.size(false);
        let answer_len = self.size(true);
        let mut draws = match self.rng.random_range(0..3) {
            0 => Draws::from_number(self.rng.random()),
            _ => Draws::Nothing,
        };
        let mut effect = None;
        if self.rng.random_ratio(1, self.setup.lasting) {
            len = len.clamp(1, LARGEST_LASTING);
            let lasting = Effect::of_task(id, len);
            draws = lasting.draws();
            effect = Some(lasting);
        }
        // R may not have heard that its worker is gone; if it has, another stands in.
        let mut place = owner;
        if self.facts.places[owner as usize].gone && effect.is_none() && self.rng.random() {
            place = self.elsewhere().unwrap_or(owner);
        }
        self.facts.tasks.push(Task {
            owner,
            place,
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
            ahead: self.setup.ahead > 0 && self.rng.random_ratio(1, self.setup.ahead),
            asked_back: false,
            recalled: false,
            complete: false,
            open: false,
            starts: 0,
            started: false,
            losses: 0,
            told: 0,
            began_with: None,
            left: None,
            since: 0,
            end: None,
        });
        self.outstanding[owner as usize].push_back(id);
        self.write(id, false, false);
    }

    /// Begins to write a message. `again`: it goes before all others; `before`: it has been
    /// outstanding before.
    fn write(&mut self, id: TaskId, again: bool, before: bool) {
        let task = &mut self.facts.tasks[id as usize];
        task.complete = false;
        task.started = false;
        task.left = None;
        if !before {
            task.since = self.facts.places[task.owner as usize].told_seeds.len() - 1;
        }
        self.facts.places[task.place as usize].stands_in |= task.is_moved();
        let order = Order {
            rank: task.place,
            task: id,
            job: task.job,
            again,
            lasts: task.effect.map(|effect| effect.name()),
            instead_of: task.is_moved().then_some(task.owner),
            ahead: task.ahead,
            payload: None,
            any_of: None,
        };
        let (place, len) = (task.place, task.len);
        let made = self.share(id, place, len);
        let (payload, sent) = made.map_or((None, 0), |(id, len)| (Some(id), len));
        let order = Order { payload, ..order };
        self.writing = Some(Message {
            task: id,
            sent,
            first: true,
            order,
            again: before,
        });
    }

    /// What a message begins with: its number and its bytes, if it begins with a payload.
    fn share(&mut self, task: TaskId, place: Rank, len: usize) -> Option<(PayloadId, usize)> {
        if self.rng.random_ratio(1, 30) && !self.made.is_empty() {
            let at = self.rng.random_range(0..self.made.len());
            let made = self.made.swap_remove(at);
            self.scheduler.drop_payload(made.id);
            self.notes();
        }
        if self.rng.random_ratio(1, 3) {
            return None;
        }
        let group = group(task);
        let fits = |made: &&Made| made.group == group && made.len <= len;
        let usable = |made: &&Made| self.scheduler.has_payload(place, made.id);
        let made = self.made.iter().filter(fits).find(usable);
        if let Some(made) = made {
            return Some((made.id, made.len));
        }
        // For some of the workers, which may be gone.
        let mut ranks = vec![place];
        for _ in 0..self.rng.random_range(0..self.setup.workers.min(20)) {
            ranks.push(self.rng.random_range(0..self.setup.workers) as Rank);
        }
        let most = match self.rng.random_range(0..3) {
            0 => len,
            _ => self.rng.random_range(0..=len),
        };
        self.next_payload += 1;
        let id = self.next_payload;
        self.scheduler.begin_payload(id, &ranks);
        let gives_up = self.rng.random_ratio(1, 10);
        let mut at = 0;
        loop {
            let n = self.rng.random_range(1..=MAX_BODY).min(most - at);
            let last = at + n == most;
            if last && gives_up {
                self.scheduler.abort_payload(id);
                self.facts.seen.aborted += 1;
                self.notes();
                assert!(!self.scheduler.has_payload(place, id));
                return None;
            }
            let number = (origin(task, false) + at) as u128 * MAX_BODY as u128 * 2 + n as u128;
            let chunk = Chunk {
                bytes: part(task, false, at, n),
                key: self.setup.keep.map(|_| number),
            };
            if self.scheduler.append_payload(id, &chunk, last) {
                self.submitted += n;
            }
            at += n;
            if last {
                break;
            }
            if self.rng.random_ratio(1, 5) {
                let host = self.at[place as usize].0;
                self.flush(host, 100_000);
            }
        }
        let has = self.scheduler.has_payload(place, id);
        self.made.push(Made {
            id,
            group,
            len: most,
        });
        has.then_some((id, most))
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
        let at = origin(id, false) + writing.sent;
        let bytes = part(id, false, writing.sent, n);
        let rank = task.place;
        let begins = std::mem::replace(&mut writing.first, false);
        writing.sent += n;
        let order = begins.then(|| writing.order.clone());
        if last {
            task.complete = true;
            self.writing = None;
        }
        self.submitted += n;
        let number = at as u128 * MAX_BODY as u128 * 2 + n as u128;
        let key = self.setup.keep.map(|_| number);
        let chunk = Chunk { bytes, key };
        if let Some(order) = order {
            assert!(task.end.is_none() && !task.open);
            task.open = true;
            self.scheduler.submit(order);
        }
        self.scheduler.append(rank, id, chunk, last);
        self.notes();
    }

    /// R could not finish the message.
    pub fn abandon(&mut self) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        let id = writing.task;
        self.resume = None;
        self.withdraw(id);
        let rank = self.facts.tasks[id as usize].place;
        if writing.again {
            self.scheduler.let_go(rank, id);
        }
        if !writing.first {
            self.scheduler.cancel_task(rank, id);
        }
        self.notes();
        assert!(
            !self.facts.tasks[id as usize].open,
            "abandoned task {id} lives"
        );
    }

    fn end(&mut self, id: TaskId, end: End) {
        let task = &mut self.facts.tasks[id as usize];
        assert_eq!(task.end, None, "task {id} ends for R again: {end:?}");
        task.end = Some(end);
        let owner = task.owner;
        self.outstanding[owner as usize].retain(|&other| other != id);
    }

    /// R does not want this task any more. What there is of its answer is dropped.
    fn withdraw(&mut self, id: TaskId) {
        if self.facts.tasks[id as usize].end.is_some() {
            // Its job was cancelled while its message was being written.
            return;
        }
        self.end(id, End::Cancelled);
        if let Some(at) = self.ready.iter().position(|&(other, ..)| other == id) {
            if let Some((_, len, _)) = self.ready.remove(at) {
                self.scheduler.taken(len);
            }
        }
        let place = self.facts.tasks[id as usize].place;
        if self.arriving.get(&place).is_some_and(|&(at, _)| at == id) {
            self.arriving.remove(&place);
        }
    }

    pub fn cancel_job(&mut self, job: JobId) {
        // Sometimes as R does it, sometimes with the message still being written.
        let again = self.writing.as_ref().is_some_and(|writing| writing.again);
        if again || self.rng.random() {
            self.abandon();
        }
        let outstanding = self.outstanding.iter().flatten().copied();
        let matching = outstanding.filter(|&task| self.facts.tasks[task as usize].job == job);
        let unborn = self.writing.as_ref().filter(|writing| writing.first);
        let unborn = unborn.map(|writing| writing.task);
        let matching: Vec<TaskId> = matching.filter(|&task| Some(task) != unborn).collect();
        for &task in &matching {
            self.withdraw(task);
        }
        self.scheduler.cancel_job(job);
        self.notes();
        for task in matching {
            let open = self.facts.tasks[task as usize].open;
            assert!(!open, "task {task} outlives its job");
        }
    }

    /// R wants to give one of its tasks to another worker, if it has not started.
    pub fn recall(&mut self) {
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
        self.scheduler.recall(task.place, id);
        self.notes();
    }

    /// A living worker to stand in for one that is gone.
    fn elsewhere(&mut self) -> Option<Rank> {
        let places = self.facts.places.iter().enumerate();
        let living = places.filter(|(_, place)| !place.gone);
        let living: Vec<Rank> = living.map(|(rank, _)| rank as Rank).collect();
        let at = self.rng.random_range(0..living.len().max(1));
        living.get(at).copied()
    }

    /// Takes what R waits for if it is there, or the loss of another task of the same job.
    fn take(&mut self) {
        let at = match self.waiting {
            None => return,
            Some(Waiting::Any) => (!self.ready.is_empty()).then_some(0),
            Some(Waiting::For(owner)) => {
                let Some(&front) = self.outstanding[owner as usize].front() else {
                    self.wait_for(None);
                    return;
                };
                let tasks = &self.facts.tasks;
                let job = tasks[front as usize].job;
                let found = self.ready.iter().position(|&(task, ..)| task == front);
                found.or_else(|| {
                    self.ready.iter().position(|&(task, _, ready)| {
                        let lost = matches!(ready, Ready::Lost { .. });
                        lost && job != 0 && tasks[task as usize].job == job
                    })
                })
            }
        };
        let Some((id, len, ready)) = at.and_then(|at| self.ready.remove(at)) else {
            return;
        };
        let waited = self.waiting;
        self.wait_for(None);
        self.scheduler.taken(len);
        self.moved += 1;
        match ready {
            Ready::Answer => self.end(id, End::Answer),
            Ready::TimedOut => self.end(id, End::TimedOut),
            Ready::GivenUp => self.end(id, End::GivenUp),
            Ready::Recalled => self.end(id, End::Recalled),
            Ready::Lost { stopped } => {
                self.resume = waited;
                self.decide(id, stopped);
            }
        }
        self.notes();
    }

    /// What becomes of a task that was lost.
    fn decide(&mut self, id: TaskId, stopped: bool) {
        // A message that was being written is finished before R waits.
        assert!(self.writing.is_none());
        let task = &mut self.facts.tasks[id as usize];
        task.told += 1;
        assert_eq!(task.told, task.losses);
        if stopped || self.facts.retries == 0 {
            self.fail(id);
            return;
        }
        let place = task.place;
        if task.told > self.facts.retries {
            self.ready.push_back((id, 0, Ready::GivenUp));
            self.scheduler.let_go(place, id);
            return;
        }
        let lasts = task.effect.is_some();
        if self.facts.places[place as usize].gone {
            let elsewhere = if lasts { None } else { self.elsewhere() };
            let Some(elsewhere) = elsewhere else {
                self.fail(id);
                return;
            };
            self.facts.tasks[id as usize].place = elsewhere;
            self.facts.seen.moved += 1;
        }
        let again = self.facts.tasks[id as usize].place == place;
        self.facts.seen.again += usize::from(again);
        self.write(id, again, true);
    }

    /// Nobody can take a lost task: its verb ends with an error.
    fn fail(&mut self, id: TaskId) {
        self.resume = None;
        self.end(id, End::Error);
        let task = &self.facts.tasks[id as usize];
        let job = task.job;
        self.scheduler.let_go(task.place, id);
        if job != 0 {
            self.cancel_job(job);
        }
    }

    pub fn wait_for(&mut self, waiting: Option<Waiting>) {
        self.waiting = waiting;
        self.scheduler.want(match waiting {
            None => Want::Nothing,
            Some(Waiting::Any) => Want::Any,
            Some(Waiting::For(owner)) => {
                let front = self.outstanding[owner as usize].front();
                let place = front.map(|&task| self.facts.tasks[task as usize].place);
                Want::Rank(place.unwrap_or(owner))
            }
        });
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
        for note in self.scheduler.take_notes() {
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
                Note::Gone { rank, gone } => {
                    let place = &mut self.facts.places[rank as usize];
                    // Once; or it is stopped when its host is lost, and does not come back with that; or
                    // its agent, which was to make it again after a pause, is lost or does not do so.
                    let again = std::mem::replace(&mut place.gone, true);
                    let waited = std::mem::replace(&mut place.waits, gone.is_tried_again());
                    let ends_waiting = waited && matches!(*gone, Gone::Host(_));
                    assert!(!again || matches!(*gone, Gone::Stopped) || ends_waiting);
                    (place.current, place.next) = (None, None);
                    self.arriving.remove(&rank);
                }
                Note::Lost { rank, task, .. } => {
                    let place = &mut self.facts.places[rank as usize];
                    assert!(!place.gone);
                    assert_eq!(lost, None, "the loss of a task is not told");
                    lost = task.then_some(rank);
                    place.current = None;
                    place.next_when_lost = place.next.take();
                    self.facts.seen.put_back += usize::from(place.next_when_lost.is_some());
                    self.arriving.remove(&rank);
                }
                Note::Up { rank, .. } => assert!(!self.facts.places[rank as usize].gone),
                Note::Replaced { rank, killed, .. } => {
                    let place = &mut self.facts.places[rank as usize];
                    assert!(!place.gone);
                    assert!(killed || place.current.is_none());
                    place.current = None;
                    let next = place.next.take();
                    self.facts.seen.put_back += usize::from(next.is_some());
                    self.facts.seen.killed += usize::from(killed);
                    self.facts.seen.replaced += usize::from(!killed);
                }
                Note::StateNotKept { rank } => {
                    assert!(!self.facts.places[rank as usize].kept);
                    self.facts.seen.not_kept += 1;
                }
                Note::LeftOut { agent, .. } => {
                    let ranks = &self.hosts[agent].ranks;
                    let gone = |&rank: &Rank| self.facts.places[rank as usize].gone;
                    assert!(ranks.iter().all(gone));
                    self.facts.seen.left_out += 1;
                }
                Note::Ended { .. } => {}
                // Agents make no worker again after a pause here.
                Note::Back { .. }
                | Note::Output { .. }
                | Note::Usage { .. }
                | Note::Dump { .. }
                | Note::Aside { .. }
                | Note::LeftBehind { .. }
                | Note::Failed { .. }
                | Note::StartFailed { .. } => {
                    panic!("{note:?}")
                }
            }
        }
        assert_eq!(lost, None, "the loss of a task is not told");
        self.released += self.scheduler.take_released();
        assert!(
            self.released <= self.submitted,
            "more released than submitted"
        );
        self.take();
        self.check_buffered();
        self.facts.seen.starved += usize::from(self.scheduler.is_starving());
    }

    fn done(&mut self, rank: Rank, id: TaskId, job: JobId, outcome: Outcome, just_lost: bool) {
        let task = &mut self.facts.tasks[id as usize];
        let place = &mut self.facts.places[rank as usize];
        assert!(task.open, "task {id} ended twice: {outcome:?}");
        task.open = false;
        assert_eq!((task.place, task.job), (rank, job));
        let wanted = task.end.is_none();
        let lasts = place.effects.iter().any(|effect| effect.task == id);
        let (ready, held) = match outcome {
            Outcome::Answer(body) => {
                assert!(wanted, "an answer to withdrawn task {id}");
                assert!(task.complete && !task.stuck && !task.poison);
                assert!(task.started);
                assert_eq!(lasts, task.effect.is_some(), "task {id} does not last");
                assert_eq!(self.arriving.remove(&rank), Some((id, body.len)));
                check_answer(id, task.answer_len, &body);
                self.facts.seen.answers += 1;
                self.facts.seen.in_vain += usize::from(task.asked_back);
                self.facts.seen.guests += usize::from(task.is_moved() && !task.draws.is_nothing());
                (Ready::Answer, body.len)
            }
            Outcome::Lost(gone) => {
                assert!(wanted);
                assert!(place.gone || just_lost, "lost to a living worker");
                assert!(!matches!(*gone, Gone::Worker(ref loss) if loss.tail != "killed"));
                assert!(
                    place.gone || place.next_when_lost != Some(id),
                    "task {id} is lost before its turn"
                );
                // With a host the last answers may be lost on their way.
                assert!(!lasts || place.gone, "lost task {id} lasts");
                task.losses += 1;
                self.facts.seen.lost += 1;
                let stopped = matches!(*gone, Gone::Stopped);
                (Ready::Lost { stopped }, 0)
            }
            Outcome::TimedOut => {
                assert!(wanted && self.setup.timeout.is_some());
                assert!(!lasts);
                self.arriving.remove(&rank);
                self.facts.seen.timed_out += 1;
                (Ready::TimedOut, 0)
            }
            Outcome::Recalled => {
                assert!(wanted && task.asked_back);
                assert!(!task.started, "task {id} is recalled and has started");
                task.recalled = true;
                self.facts.seen.recalled += 1;
                (Ready::Recalled, 0)
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
    /// GRANT`; beyond that, one result alone is completed for [`Want::Any`], and for [`Want::Rank`]
    /// one, and, where tasks of several wait for one worker, those which that has to do first, each of
    /// which may be asked for by up to a [`GRANT`] more than it has.
    fn check_buffered(&self) {
        let arriving = self.arriving.values().copied();
        let held = arriving.chain(self.ready.iter().map(|&(task, len, _)| (task, len)));
        let (mut all, mut large, mut others) = (0, 0, 0);
        for (task, len) in held {
            all += len;
            if len > RESULT_WINDOW {
                large += len - RESULT_WINDOW;
                let place = self.facts.tasks[task as usize].place;
                others += usize::from(self.facts.places[place as usize].stands_in);
            }
        }
        assert_eq!(self.scheduler.buffered(), all);
        let ways = match self.setup.order {
            TakeOrder::Mixed => 2,
            _ => 1,
        };
        let most = self.setup.limit + GRANT + (ways + others) * (LARGEST + GRANT);
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

fn check_answer(task: TaskId, len: usize, body: &Body) {
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
