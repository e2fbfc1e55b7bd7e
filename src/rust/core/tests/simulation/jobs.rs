//! Jobs: the job engine and its planner, as they are, on the simulated cluster. Messages are made-up bytes here,
//! answers a number of elements.

use crate::Sim;
use crate::parts::{Draws, End, Manners, Task, part};
use crate::r::{Ready, check_answer};
use rand::Rng;
use rustcluster_core::head::batching::Assignment;
use rustcluster_core::head::hub::{Answer, StartedTask, Turn};
use rustcluster_core::head::job::{
    BatchLoss, Codec, Dispatch, Failed, Form, Halt, Job, JobWorker, Setup, Taken,
};
use rustcluster_core::head::retry::Policy;
use rustcluster_core::head::scheduler::events::{Demand, RankSet, Termination};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::frame::MAX_BODY;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::cell::RefCell;
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
    failures: usize,
    /// It has failed, and its result is to be made.
    failed: bool,
    /// Kills whoever starts it.
    poison: bool,
    /// Never answers.
    stuck: bool,
}

/// The job that is open, besides its engine.
pub struct Open {
    id: JobId,
    blob: BlobId,
    /// Bytes of the blob, and the task whose message begins with them.
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
    policy: Policy,
    /// Messages that the engine was told are lost and that it is to forget.
    awaiting_retry: Vec<TaskId>,
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
        ranks.retain(|&rank| !self.is_terminated(rank) && (all || self.rng.random()));
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
        let of_blob = match self.rng.random() {
            true => ranks.clone(),
            // Others do not have it yet.
            false => self.some_ranks(ranks[0]),
        };
        let blob = self.hub.begin_blob(&of_blob, false);
        self.hub.write(&part(like, false, 0, len));
        self.hub.finish_blob();
        self.notes();
        // Without retries failures may be results.
        let policy = Policy {
            retries: self.facts.retries,
            raises: self.facts.retries == 0 && self.rng.random(),
        };
        let place = |&rank: &Rank| JobWorker {
            rank,
            host: self.at[rank as usize].0,
            cores: self.rng.random_range(0..5),
            rtt: match self.rng.random() {
                true => self.rtts.get(&rank).copied(),
                false => None,
            },
            detained: singly && self.hub.is_detained(rank),
        };
        let setup = Setup {
            id: self.job,
            slots: ranks.iter().map(place).collect(),
            tasks: count,
            assignment,
            order,
            singly,
            timeout,
            policy,
            blob,
            reading: self
                .rng
                .random_ratio(1, 3)
                .then(|| self.rng.random_range(0..1 << 20)),
        };
        let magnitude = self.rng.random_range(-6..0);
        self.open = Some(Open {
            id: self.job,
            blob,
            len,
            like,
            elements,
            seconds: 10f64.powi(magnitude),
            began_with: self.facts.seen.elements,
            gathered: (Vec::new(), Duration::ZERO),
            writing: None,
            again: None,
            calm: harmless,
            policy,
            awaiting_retry: Vec::new(),
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
            Err(halt) => !view.go_on(&mut engine, halt),
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
        self.rtts.extend(engine.rtts());
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
        self.hub.drop_blob(open.blob);
        self.notes();
    }

    /// A message has ended, or is not wanted any more: its elements are in none.
    fn ends(&mut self, id: TaskId) -> Vec<usize> {
        let elements = std::mem::take(&mut self.facts.tasks[id as usize].elements);
        for &at in &elements {
            let out = self.open().elements[at].out.take();
            assert_eq!(out, Some(id), "element {at} was elsewhere");
        }
        self.facts.tasks[id as usize].elements.clone_from(&elements);
        elements
    }

    /// An element has failed without an answer.
    fn fails(&mut self, at: usize) {
        let element = &mut self.open().elements[at];
        assert!(!element.ended && !std::mem::replace(&mut element.failed, true));
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
                let next = living.filter_map(|host| host.router.worker_table.next_deadline());
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

    fn termination(&self, rank: Rank) -> Option<Arc<Termination>> {
        let sim = self.0.borrow();
        let termination = sim.hub.worker(rank).termination;
        assert_eq!(termination.is_some(), sim.is_terminated(rank));
        termination
    }

    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        limit: Option<Duration>,
        blob: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, Arc<Termination>> {
        let sim = &mut **self.0.borrow_mut();
        let started = sim.hub.begin(rank, job, None, turn, blob);
        sim.hub.limit_time(limit);
        if started.is_ok() {
            sim.withdraw_stale(rank, job);
        }
        sim.notes();
        let started = started.inspect_err(|_| assert!(sim.is_terminated(rank)))?;
        let id = sim.facts.tasks.len() as TaskId;
        assert_eq!(started.task, id);
        sim.check_place(rank, started, false);
        let place = &mut sim.facts.places[started.assigned as usize];
        place.is_substitute |= started.assigned != rank;
        if turn == Turn::Prefetch {
            sim.facts.seen.prefetched += 1;
        }
        let answer_len = match sim.rng.random_range(0..30) {
            0 => sim.size(true).min(100_000),
            _ => sim.rng.random_range(0..300),
        };
        let again = sim.open().again.filter(|_| turn == Turn::First);
        sim.facts.tasks.push(Task {
            owner: rank,
            place: started.assigned,
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
            prefetch: turn == Turn::Prefetch,
            own_limit: limit,
            limit: limit.into_iter().chain(sim.setup.timeout).min(),
            since: sim.facts.places[rank as usize].reported_seeds.len() - 1,
            turn: again.unwrap_or(Some(id)),
            ..Task::new(id)
        });
        sim.open().writing = Some(id);
        Ok(started)
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

    fn receive_any(&self, workers: &RankSet, most: Duration) -> Answer {
        let sim = &mut **self.0.borrow_mut();
        let until = sim.now + most;
        let answer = loop {
            let tasks = &sim.facts.tasks;
            let of_job = |id: TaskId| workers.contains(tasks[id as usize].owner);
            let next = sim.ready.iter().position(|&(id, ..)| of_job(id));
            let answer = sim.hub.receive_any(workers, Duration::ZERO);
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
                .with_scheduler(|scheduler| scheduler.demand(Demand::AnyOf(workers.clone())));
            sim.happens(left);
            sim.notes();
            sim.hub
                .with_scheduler(|scheduler| scheduler.demand(Demand::Nothing));
        };
        sim.moved += 1;
        match &answer {
            Answer::Ready { task, .. } => sim.end(*task, End::Answer),
            Answer::TimedOut { task, .. } => {
                sim.end(*task, End::TimedOut);
                for at in sim.ends(*task) {
                    sim.fails(at);
                }
            }
            Answer::Revoked { task, .. } => {
                sim.end(*task, End::Revoked);
                sim.ends(*task);
            }
            Answer::Lost { task, .. } => {
                let lost = &mut sim.facts.tasks[*task as usize];
                lost.told += 1;
                assert_eq!(lost.told, lost.failures);
                // What follows waits for what becomes of these.
                let turn = lost.turn;
                sim.open().again = Some(turn);
                sim.open().awaiting_retry.push(*task);
                sim.ends(*task);
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

    fn revoke(&self, task: TaskId) {
        let sim = &mut **self.0.borrow_mut();
        sim.facts.tasks[task as usize].asked_back = true;
        sim.hub.revoke(task);
        sim.notes();
    }

    fn forget(&self, task: TaskId) {
        let sim = &mut **self.0.borrow_mut();
        let awaiting_retry = &mut sim.open().awaiting_retry;
        let at = awaiting_retry.iter().position(|&other| other == task);
        awaiting_retry.remove(at.expect("a message that was lost"));
        sim.open().again = None;
        sim.end(task, End::Settled);
        sim.hub.forget(task);
        sim.notes();
    }
}

impl Codec for Elements<'_, '_> {
    type Stop = Stop;

    fn takes_batches(&self, rank: Rank) -> bool {
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
            1 => (1, Form::Single),
            2 => (sim.rng.random_range(1..=tasks.len()), Form::Batch),
            _ => (tasks.len(), Form::Batch),
        };
        sim.open().gathered = (tasks[..count].to_vec(), most);
        Ok((count, form))
    }

    fn write(&mut self, place: Rank, first: usize, form: Form) -> Result<(), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        let (gathered, most) = std::mem::take(&mut sim.open().gathered);
        let elements = match form {
            Form::Batch => gathered,
            Form::Long | Form::Single => vec![first],
        };
        assert_eq!(elements.first(), Some(&first));
        let open = sim.open.as_mut().expect("a job");
        let id = open.writing.expect("a message");
        for &at in &elements {
            let element = &mut open.elements[at];
            assert!(
                !element.ended && !element.failed,
                "element {at} is not to be done"
            );
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
            Form::Batch | Form::Long => (open.like, open.len),
            Form::Single => (id, 0),
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
        task.most = if form == Form::Batch {
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

    fn resend_blob(&mut self, blob: BlobId, place: Rank) -> Result<(), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        let (like, len) = (sim.open().like, sim.open().len);
        assert_eq!(blob, sim.open().blob);
        assert!(!sim.hub.has_blob(place, blob));
        sim.facts.seen.blobs_again += 1;
        sim.hub.begin_blob_again(blob, place);
        sim.hub.write(&part(like, false, 0, len));
        sim.hub.finish_blob();
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

    fn lost(&mut self, failure: &BatchLoss, again: &[usize]) {
        let sim = &mut **self.0.0.borrow_mut();
        let lost = &sim.facts.tasks[failure.task as usize];
        assert_eq!(
            (lost.place, lost.end),
            (failure.assigned, Some(End::Settled))
        );
        assert_eq!(lost.elements, failure.tasks);
        assert_eq!(failure.now.is_some(), sim.is_terminated(failure.assigned));
        assert_ne!(*failure.termination, Termination::Stopped);
        let Policy { retries, raises } = sim.open().policy;
        assert!(!raises);
        for &at in &failure.tasks {
            let element = &mut sim.open().elements[at];
            element.failures += 1;
            let retried = element.failures <= retries;
            assert_eq!(
                again.contains(&at),
                retried,
                "element {at} is lost for time {}",
                element.failures
            );
            if !retried {
                sim.fails(at);
            }
        }
        sim.facts.seen.settled += 1;
    }
}

impl View<'_> {
    /// What R does when the engine needs it. Returns whether the job goes on.
    fn go_on(&self, engine: &mut Job, halt: Halt<Stop>) -> bool {
        match halt {
            Halt::Codec(Stop::Unread(task)) => self.unread(engine, task),
            Halt::Failed(failed) => {
                let sim = &mut **self.0.borrow_mut();
                // R may be interrupted before it has made the results.
                if sim.rng.random() {
                    return true;
                }
                sim.facts.seen.settled += usize::from(matches!(failed, Failed::TimedOut { .. }));
                for &at in failed.tasks() {
                    let failures = engine.failures(at);
                    let element = &sim.open().elements[at];
                    assert!(element.failed);
                    assert_eq!(failures.len(), element.failures);
                    assert!(failures.iter().all(|failure| failure.tasks.contains(&at)));
                    // Each retry is one of this element alone.
                    assert!(failures.iter().skip(1).all(|failure| failure.tasks == [at]));
                    sim.result(at);
                }
                assert_eq!(engine.made(), Some(failed));
                true
            }
            Halt::Lost(failure) => {
                let sim = &mut **self.0.borrow_mut();
                assert!(sim.open().policy.raises || *failure.termination == Termination::Stopped);
                false
            }
            Halt::Codec(Stop::Interrupted) => false,
            Halt::Terminated { rank, .. } => {
                assert!(self.0.borrow().is_terminated(rank));
                false
            }
            Halt::Stuck => panic!("tasks are left and nothing is out"),
        }
    }

    /// The answer to this message cannot be read. Returns whether the job goes on.
    fn unread(&self, engine: &mut Job, task: TaskId) -> bool {
        let elements = {
            let sim = &mut **self.0.borrow_mut();
            sim.facts.seen.settled += 1;
            // Nothing waits for what becomes of it.
            sim.open().again = Some(None);
            sim.ends(task)
        };
        assert_eq!(*engine.tasks_of(task), elements);
        let ended = engine.unreadable(self, &mut Elements(self), task);
        let sim = &mut **self.0.borrow_mut();
        sim.open().again = None;
        match (ended, &elements[..]) {
            (Ok(Some(ended)), &[at]) => {
                assert_eq!(ended, at);
                sim.result(at);
                true
            }
            (Ok(None), &[_, _, ..]) => true,
            (Err(Halt::Codec(Stop::Interrupted) | Halt::Terminated { .. }), _) => false,
            (ended, elements) => panic!("{ended:?} of {elements:?}"),
        }
    }
}
