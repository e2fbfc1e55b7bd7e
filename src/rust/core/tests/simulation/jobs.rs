//! Jobs: the job engine and its planner, as they are, on the simulated cluster. Messages are made-up bytes here,
//! answers a number of elements. What becomes of lost elements is decided as in `R/job.R`.

use crate::Sim;
use crate::parts::{Draws, End, Manners, Task, part};
use crate::r::{Ready, check_answer};
use rand::Rng;
use rustcluster_core::head::batching::Assignment;
use rustcluster_core::head::hub::{Answer, Begun, Turn};
use rustcluster_core::head::job::{Codec, Dispatch, Form, Halt, Job, Place, Setup, Taken};
use rustcluster_core::head::scheduler::events::{Gone, Want};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::frame::MAX_BODY;
use rustcluster_core::protocol::ids::{JobId, PayloadId, Rank, TaskId};
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// R looks for interrupts so often.
const SLICE: Duration = Duration::from_millis(100);

/// An element of the job that is open.
#[derive(Default)]
struct Element {
    /// The message that it is in.
    out: Option<TaskId>,
    /// It has a result.
    ended: bool,
    losses: usize,
    /// Kills whoever starts it.
    poison: bool,
    /// Never answers.
    stuck: bool,
}

/// The job that is open, besides its engine.
pub struct Open {
    id: JobId,
    ranks: HashSet<Rank>,
    payload: PayloadId,
    /// Bytes of the payload, and the task whose message begins with them.
    len: usize,
    like: TaskId,
    elements: Vec<Element>,
    /// Seconds of a task, about.
    seconds: f64,
    /// Results since somebody asked last.
    began_with: usize,
    /// What [`Codec::gather`] has put together last.
    gathered: (Vec<usize>, Duration),
    /// The message that is being written.
    writing: Option<TaskId>,
    /// The turn of the message that is being given out again.
    again: Option<Option<TaskId>>,
    /// Nothing goes wrong any more.
    calm: bool,
    /// Messages that the engine was told of and that it is to settle.
    undecided: Vec<TaskId>,
}

impl Open {
    /// Whether the job uses this worker.
    pub fn has(&self, rank: Rank) -> bool {
        self.ranks.contains(&rank)
    }
}

/// Why the codec has stopped.
#[derive(Debug)]
pub enum Stop {
    /// R was interrupted.
    Interrupted,
    /// The answer to this message cannot be read.
    Unread(TaskId),
}

/// The job engine's view of the simulation.
struct View<'a>(RefCell<&'a mut Sim>);

struct Elements<'a, 'b>(&'a View<'b>);

impl Sim {
    fn open(&mut self) -> &mut Open {
        self.open.as_mut().expect("a job")
    }

    /// Begins a job on some of the workers, with nothing else for R to do meanwhile.
    pub fn begin_job(&mut self, harmless: bool) {
        assert!(self.waiting.is_none() && self.writing.is_none() && self.open.is_none());
        self.resume = None;
        self.job += 1;
        let all = self.rng.random();
        let mut ranks: Vec<Rank> = (0..self.setup.workers as Rank).collect();
        ranks.retain(|&rank| !self.is_gone(rank) && (all || self.rng.random()));
        if ranks.is_empty() {
            return;
        }
        let timeout = (!harmless && self.rng.random_ratio(1, 5))
            .then(|| Duration::from_millis(self.rng.random_range(50..5_000)));
        let singly =
            timeout.is_some() || self.setup.timeout.is_some() || self.rng.random_ratio(1, 8);
        let count = match self.rng.random_range(0..4) {
            0 => self.rng.random_range(1..=ranks.len()),
            1 => self.rng.random_range(1..40),
            _ if singly => self.rng.random_range(1..100),
            _ => self.rng.random_range(1..2_000),
        };
        let assignment = match self.rng.random_range(0..3) {
            0 => Assignment::Round,
            _ => Assignment::Free,
        };
        let order = self.rng.random_ratio(1, 4).then(|| {
            let mut order: Vec<usize> = (0..count).collect();
            for at in (1..count).rev() {
                order.swap(at, self.rng.random_range(0..=at));
            }
            order
        });
        let faults = self.setup.faults > 0 && !harmless;
        let stuck = faults && (timeout.is_some() || self.setup.timeout.is_some());
        let element = |_| Element {
            poison: faults && self.rng.random_ratio(1, 100),
            stuck: stuck && self.rng.random_ratio(1, 100),
            ..Element::default()
        };
        let elements: Vec<Element> = (0..count).map(element).collect();
        let like = self.facts.tasks.len() as TaskId;
        let len = match self.rng.random_range(0..3) {
            0 => 0,
            1 => self.rng.random_range(0..200),
            _ => self.rng.random_range(0..40_000),
        };
        let of_payload = match self.rng.random() {
            true => ranks.clone(),
            // Others do not have it yet.
            false => self.some_ranks(ranks[0]),
        };
        let payload = self.hub.begin_payload(&of_payload, false);
        self.hub.write(&part(like, false, 0, len));
        self.hub.finish_payload();
        self.notes();
        let place = |&rank: &Rank| Place {
            rank,
            host: self.at[rank as usize].0,
            cores: self.rng.random_range(0..5),
            way: match self.rng.random() {
                true => self.ways.get(&rank).copied(),
                false => None,
            },
            detained: singly && self.hub.is_detained(rank),
        };
        let setup = Setup {
            id: self.job,
            places: ranks.iter().map(place).collect(),
            tasks: count,
            assignment,
            order,
            singly,
            timeout,
            payload,
            reading: self
                .rng
                .random_ratio(1, 3)
                .then(|| self.rng.random_range(0..1 << 20)),
        };
        let magnitude = self.rng.random_range(-6..0);
        self.open = Some(Open {
            id: self.job,
            ranks: ranks.into_iter().collect(),
            payload,
            len,
            like,
            elements,
            seconds: 10f64.powi(magnitude),
            began_with: self.facts.seen.elements,
            gathered: (Vec::new(), Duration::ZERO),
            writing: None,
            again: None,
            calm: harmless,
            undecided: Vec::new(),
        });
        self.engine = Some(Job::new(setup, self.origin + self.now));
        self.facts.seen.jobs += 1;
    }

    /// R works at the job that is open, for a while, until that is over. Returns whether it is.
    pub fn step_job(&mut self) -> bool {
        let Some(mut engine) = self.engine.take() else {
            return true;
        };
        let plain_only = self.rng.random_ratio(1, 20);
        let view = View(RefCell::new(self));
        let stepped = engine.step(&view, &mut Elements(&view), SLICE, plain_only);
        let over = match stepped {
            Ok(done) => done,
            Err(halt) => !view.decide(&mut engine, halt),
        };
        self.moved += 1;
        if !over {
            let (tasks, done, _) = engine.progress();
            let open = self.open();
            let ended = open.elements.iter().filter(|element| element.ended).count();
            assert_eq!((tasks, done), (open.elements.len(), ended));
            self.engine = Some(engine);
            return false;
        }
        self.ways.extend(engine.ways());
        let complete = matches!(engine.progress(), (tasks, done, _) if tasks == done);
        self.close_job(complete);
        true
    }

    /// The job that is open is over.
    pub fn close_job(&mut self, complete: bool) {
        self.engine = None;
        let Some(open) = self.open.take() else {
            return;
        };
        if complete {
            assert!(open.elements.iter().all(|e| e.ended && e.out.is_none()));
            self.facts.seen.done += 1;
        }
        let ended = open.elements.iter().filter(|element| element.ended).count();
        assert_eq!(self.facts.seen.elements - open.began_with, ended);
        self.cancel_job(open.id);
        self.hub.drop_payload(open.payload);
        self.notes();
    }

    /// A message has ended, or is not wanted any more: its elements are in none.
    fn ends(&mut self, id: TaskId) {
        let elements = std::mem::take(&mut self.facts.tasks[id as usize].elements);
        for &at in &elements {
            let out = self.open().elements[at].out.take();
            assert_eq!(out, Some(id), "element {at} was elsewhere");
        }
        self.facts.tasks[id as usize].elements = elements;
    }

    /// An element has a result.
    fn result(&mut self, at: usize) {
        let element = &mut self.open().elements[at];
        assert!(
            !std::mem::replace(&mut element.ended, true),
            "element {at} ends again"
        );
        self.facts.seen.elements += 1;
    }

    /// What happens while R waits.
    fn happens(&mut self, left: Duration) {
        if self.open().calm {
            let before = self.moved;
            self.sweep();
            if self.moved == before {
                let living = self.hosts.iter().filter(|host| !host.lost);
                let next = living.filter_map(|host| host.relay.book.next_deadline());
                let until = self.now + left;
                self.now = next.min().map_or(until, |next| next.clamp(self.now, until));
                self.tick();
            }
            return;
        }
        let passed = self.rng.random_range(0..=left.as_micros() as u64 / 8 + 10);
        self.now += Duration::from_micros(passed);
        match self.rng.random_range(0..20) {
            0 => self.tick(),
            1 if self.setup.faults > 0 => {
                if self.rng.random_ratio(1, self.setup.faults * 4) {
                    self.fault();
                }
            }
            _ => {
                for _ in 0..=self.hosts.len() / 20 {
                    let at = self.rng.random_range(0..self.hosts.len());
                    for _ in 0..4 {
                        self.pump(at);
                    }
                }
            }
        }
    }
}

impl Dispatch for View<'_> {
    fn now(&self) -> Instant {
        let sim = self.0.borrow();
        sim.origin + sim.now
    }

    fn gone(&self, rank: Rank) -> Option<Arc<Gone>> {
        let sim = self.0.borrow();
        let gone = sim.hub.worker(rank).gone;
        assert_eq!(gone.is_some(), sim.is_gone(rank));
        gone
    }

    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        limit: Option<Duration>,
        payload: impl FnOnce(Rank) -> Option<PayloadId>,
    ) -> Result<Begun, Arc<Gone>> {
        let sim = &mut **self.0.borrow_mut();
        let begun = sim.hub.begin(rank, job, None, turn, payload);
        sim.hub.limit_time(limit);
        if begun.is_ok() {
            sim.withdraw_stale(rank, job);
        }
        sim.notes();
        let begun = begun.inspect_err(|_| assert!(sim.is_gone(rank)))?;
        let id = sim.facts.tasks.len() as TaskId;
        assert_eq!(begun.task, id);
        sim.check_place(rank, begun, false);
        let place = &mut sim.facts.places[begun.place as usize];
        place.stands_in |= begun.place != rank;
        if turn == Turn::Ahead {
            sim.facts.seen.prefetched += 1;
        }
        let answer_len = match sim.rng.random_range(0..30) {
            0 => sim.size(true).min(100_000),
            _ => sim.rng.random_range(0..300),
        };
        let again = sim.open().again.filter(|_| turn == Turn::First);
        sim.facts.tasks.push(Task {
            owner: rank,
            place: begun.place,
            job,
            answer_len,
            manners: match sim.rng.random_range(0..3) {
                0 => Manners::Stop,
                1 => Manners::Restart,
                _ => Manners::Ignore,
            },
            draws: match sim.rng.random_range(0..3) {
                0 => Draws::from_number(sim.rng.random()),
                _ => Draws::Nothing,
            },
            ahead: turn == Turn::Ahead,
            own_limit: limit,
            limit: limit.into_iter().chain(sim.setup.timeout).min(),
            since: sim.facts.places[rank as usize].told_seeds.len() - 1,
            turn: again.unwrap_or(Some(id)),
            ..Task::new(id)
        });
        sim.open().writing = Some(id);
        Ok(begun)
    }

    fn finish(&self) {
        let sim = &mut **self.0.borrow_mut();
        let id = sim.open().writing.take().expect("a message");
        let task = &mut sim.facts.tasks[id as usize];
        task.complete = true;
        task.open = true;
        sim.outstanding[task.owner as usize].push_back(id);
        sim.hub.finish();
        sim.notes();
    }

    fn abandon(&self) {
        let sim = &mut **self.0.borrow_mut();
        let id = sim.open().writing.take().expect("a message");
        sim.withdraw(id);
        sim.ends(id);
        sim.hub.abandon();
        sim.notes();
        assert!(
            !sim.facts.tasks[id as usize].open,
            "abandoned task {id} lives"
        );
    }

    fn receive_any(&self, includes: impl Fn(Rank) -> bool, most: Duration) -> Answer {
        let sim = &mut **self.0.borrow_mut();
        let until = sim.now + most;
        let answer = loop {
            let tasks = &sim.facts.tasks;
            let of_job = |id: TaskId| includes(tasks[id as usize].owner);
            let next = sim.ready.iter().position(|&(id, ..)| of_job(id));
            let answer = sim.hub.receive_any(&includes, Duration::ZERO);
            let found = next.map(|at| (sim.ready[at].0, sim.ready[at].2));
            assert_eq!(Ready::of(&answer), found);
            if let Some(at) = next {
                sim.ready.remove(at);
                break answer;
            }
            let left = until.saturating_sub(sim.now);
            let interrupted = !sim.open().calm && sim.rng.random_ratio(1, 200);
            if left.is_zero() || interrupted || matches!(answer, Answer::NothingSent) {
                return answer;
            }
            sim.hub
                .with_scheduler(|scheduler| scheduler.want(Want::Any));
            sim.happens(left);
            sim.notes();
            sim.hub
                .with_scheduler(|scheduler| scheduler.want(Want::Nothing));
        };
        sim.moved += 1;
        match &answer {
            Answer::Ready { task, .. } => sim.end(*task, End::Answer),
            Answer::TimedOut { task, .. } => {
                sim.end(*task, End::TimedOut);
                sim.open().undecided.push(*task);
            }
            Answer::Recalled { task, .. } => {
                sim.end(*task, End::Recalled);
                sim.ends(*task);
            }
            Answer::Lost { task, .. } => {
                let lost = &mut sim.facts.tasks[*task as usize];
                lost.told += 1;
                assert_eq!(lost.told, lost.losses);
                sim.open().undecided.push(*task);
            }
            // The job gives up none.
            Answer::GivenUp { task, .. } => {
                assert!(sim.facts.tasks[*task as usize].job != sim.job);
                sim.end(*task, End::GivenUp);
            }
            answer => panic!("{answer:?}"),
        }
        sim.notes();
        answer
    }

    fn recall(&self, rank: Rank, task: TaskId) {
        let sim = &mut **self.0.borrow_mut();
        sim.facts.tasks[task as usize].asked_back = true;
        sim.hub.recall(rank, task);
        sim.notes();
    }

    fn forget(&self, rank: Rank, task: TaskId) {
        let sim = &mut **self.0.borrow_mut();
        let undecided = &mut sim.open().undecided;
        let at = undecided.iter().position(|&other| other == task);
        undecided.remove(at.expect("a message that has ended"));
        if sim.facts.tasks[task as usize].end.is_none() {
            sim.end(task, End::Settled);
        }
        sim.hub.forget(rank, task);
        sim.notes();
    }
}

impl Codec for Elements<'_, '_> {
    type Stop = Stop;

    fn takes_units(&self, rank: Rank) -> bool {
        // Those of the other kind of R are as many as they were.
        rank % 7 != 3
    }

    fn gather(&mut self, tasks: &[usize], most: Duration) -> Result<(usize, Form), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        assert!(!tasks.is_empty());
        if !sim.open().calm && sim.rng.random_ratio(1, 300) {
            return Err(Stop::Interrupted);
        }
        let (count, form) = match sim.rng.random_range(0..12) {
            0 => (1, Form::Long),
            1 => (1, Form::Message),
            2 => (sim.rng.random_range(1..=tasks.len()), Form::Unit),
            _ => (tasks.len(), Form::Unit),
        };
        sim.open().gathered = (tasks[..count].to_vec(), most);
        Ok((count, form))
    }

    fn write(&mut self, place: Rank, first: usize, form: Form) -> Result<(), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        let (gathered, most) = std::mem::take(&mut sim.open().gathered);
        let elements = match form {
            Form::Unit => gathered,
            Form::Long | Form::Message => vec![first],
        };
        assert_eq!(elements.first(), Some(&first));
        let open = sim.open.as_mut().expect("a job");
        let id = open.writing.expect("a message");
        for &at in &elements {
            let element = &mut open.elements[at];
            assert!(!element.ended, "element {at} has a result");
            assert_eq!(
                element.out.replace(id),
                None,
                "element {at} is given out twice"
            );
        }
        sim.facts.seen.together += usize::from(elements.len() > 1);
        let (poison, stuck) = (
            elements.iter().any(|&at| open.elements[at].poison),
            elements.iter().any(|&at| open.elements[at].stuck),
        );
        let begins = match form {
            Form::Unit | Form::Long => (open.like, open.len),
            Form::Message => (id, 0),
        };
        let rest = match sim.rng.random_range(0..20) {
            0 => sim.rng.random_range(0..3 * MAX_BODY),
            _ => sim.rng.random_range(0..2_000),
        };
        let task = &mut sim.facts.tasks[id as usize];
        assert_eq!(task.place, place);
        task.begins = begins;
        task.len = begins.1 + rest;
        task.elements = elements;
        task.most = if form == Form::Unit {
            most
        } else {
            Duration::ZERO
        };
        task.poison = poison;
        task.stuck = stuck;
        let message = part(id, false, begins.1, rest);
        let cut = sim.rng.random_range(0..=rest);
        sim.hub.write(&message[..cut]);
        let stops = !sim.open().calm && sim.rng.random_ratio(1, 300);
        if !stops {
            sim.hub.write(&message[cut..]);
        }
        sim.facts.tasks[id as usize].open = sim.hub.expects(id);
        sim.notes();
        if stops {
            return Err(Stop::Interrupted);
        }
        Ok(())
    }

    fn share_again(&mut self, payload: PayloadId, place: Rank) -> Result<(), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        let (like, len) = (sim.open().like, sim.open().len);
        assert_eq!(payload, sim.open().payload);
        assert!(!sim.hub.has_payload(place, payload));
        sim.facts.seen.payloads_again += 1;
        sim.hub.begin_payload_again(payload, place);
        sim.hub.write(&part(like, false, 0, len));
        sim.hub.finish_payload();
        sim.notes();
        Ok(())
    }

    fn is_plain(&self, _: &Body) -> bool {
        self.0.0.borrow_mut().rng.random()
    }

    fn take(&mut self, on: Rank, task: TaskId, tasks: &[usize], body: Body) -> Result<Taken, Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        let known = &sim.facts.tasks[task as usize];
        assert_eq!(known.place, on);
        assert_eq!(known.elements, tasks, "the answer is one to other elements");
        assert_eq!(known.end, Some(End::Answer));
        let comes_back = !known.most.is_zero() && sim.rng.random_ratio(1, 10);
        check_answer(task, known.answer_len, &body);
        if !sim.open().calm && sim.rng.random_ratio(1, 60) {
            sim.open().undecided.push(task);
            return Err(Stop::Unread(task));
        }
        let count = match comes_back {
            true => sim.rng.random_range(1..=tasks.len()),
            false => tasks.len(),
        };
        sim.facts.seen.come_back += usize::from(count < tasks.len());
        sim.ends(task);
        for &at in &tasks[..count] {
            sim.result(at);
        }
        let seconds = sim.open().seconds * count as f64 * sim.rng.random_range(0.1..10.0);
        let busy = Duration::from_secs_f64(seconds);
        Ok(Taken {
            tasks: count,
            busy,
            computed: sim.rng.random::<bool>().then_some(busy),
            reading: Duration::ZERO,
        })
    }
}

impl View<'_> {
    /// What R decides on what the engine has stopped for. Returns whether the job goes on.
    fn decide(&self, engine: &mut Job, halt: Halt<Stop>) -> bool {
        let (task, lost) = match halt {
            Halt::Codec(Stop::Interrupted) => return false,
            Halt::Codec(Stop::Unread(task)) | Halt::TimedOut { task, .. } => (task, None),
            Halt::Lost { task, gone, .. } => (task, Some(gone)),
            Halt::Gone { rank, .. } => {
                assert!(self.0.borrow().is_gone(rank));
                return false;
            }
            Halt::Stuck => panic!("tasks are left and nothing is out"),
        };
        let tasks = engine.tasks_of(task).into_owned();
        let mut again = Vec::new();
        {
            let sim = &mut **self.0.borrow_mut();
            assert!(!tasks.is_empty());
            assert_eq!(sim.facts.tasks[task as usize].elements, tasks);
            let retries = sim.facts.retries;
            if let Some(gone) = &lost {
                if matches!(**gone, Gone::Stopped) || retries == 0 {
                    return false;
                }
            }
            let unread = sim.facts.tasks[task as usize].end == Some(End::Answer);
            sim.ends(task);
            for &at in &tasks {
                let element = &mut sim.open().elements[at];
                element.losses += usize::from(lost.is_some());
                if lost.is_some() && element.losses <= retries || unread && tasks.len() > 1 {
                    again.push(at);
                } else {
                    sim.result(at);
                }
            }
            sim.facts.seen.settled += 1;
            // What follows waits for what becomes of lost tasks, but not of answers that cannot be read.
            let turn = sim.facts.tasks[task as usize].turn.filter(|_| !unread);
            sim.open().again = Some(turn);
        }
        let settled = engine.settle(self, &mut Elements(self), task, &again);
        self.0.borrow_mut().open().again = None;
        match settled {
            Ok(()) => true,
            Err(Halt::Codec(Stop::Interrupted) | Halt::Gone { .. }) => false,
            Err(halt) => panic!("{halt:?}"),
        }
    }
}
