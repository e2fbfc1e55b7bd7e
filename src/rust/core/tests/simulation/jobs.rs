//! Runs the real job engine, with its planner, on the simulated cluster. Messages and answers are synthetic bytes;
//! the codec decides how many elements an answer contains.

use crate::Sim;
use crate::parts::{End, OnInterrupt, RngUse, Task, WorkerFacts, part};
use crate::r::{Ready, check_answer};
use rand::Rng;
use rustcluster_core::head::batching::Assignment;
use rustcluster_core::head::hub::{Answer, StartedTask, Turn};
use rustcluster_core::head::job::{
    BatchLoss, Codec, Dispatch, Failed, Form, Halt, Job, JobWorker, Setup, Taken,
};
use rustcluster_core::head::retry::{MAX_JOB_ENDS, Policy};
use rustcluster_core::head::scheduler::events::{Demand, RankSet, Termination};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::frame::MAX_BODY;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank, TaskId};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The interval at which R checks for interrupts.
const SLICE: Duration = Duration::from_millis(100);

/// The facts about an element of the open job.
#[derive(Default)]
struct Element {
    /// The outstanding message that contains it.
    out: Option<TaskId>,
    /// It has a result.
    ended: bool,
    failures: usize,
    /// How many of these do not count as attempts.
    job_ends: usize,
    /// It has failed without an answer, and R has not made its result yet.
    failed: bool,
    /// It kills each worker that starts it.
    poison: bool,
    /// It never answers.
    stuck: bool,
}

/// The facts about the open job.
pub struct OpenJob {
    id: JobId,
    blob: BlobId,
    /// Length of the blob, and the task of whose message it is the beginning.
    len: usize,
    like: TaskId,
    elements: Vec<Element>,
    /// Approximate time that an element takes, in seconds.
    seconds: f64,
    /// Number of results of earlier jobs.
    results_before: usize,
    /// The elements and the time budget of the last call of [`Codec::gather`].
    gathered: (Vec<usize>, Duration),
    /// The message that is being written.
    writing: Option<TaskId>,
    /// The `order` of the lost message whose elements are being sent again.
    again: Option<Option<TaskId>>,
    /// No faults and no interrupts happen.
    calm: bool,
    policy: Policy,
    /// Lost messages that have been reported to the engine and that it has not forgotten yet.
    awaiting_retry: Vec<TaskId>,
}

/// Why the codec stops.
#[derive(Debug)]
pub enum Stop {
    /// R was interrupted.
    Interrupted,
    /// The answer to this message cannot be read.
    Unread(TaskId),
}

/// The simulation as the job engine's [`Dispatch`].
struct View<'a>(RefCell<&'a mut Sim>);

/// The simulation as the job engine's [`Codec`].
struct Elements<'a, 'b>(&'a View<'b>);

impl Sim {
    fn open_job(&mut self) -> &mut OpenJob {
        self.open_job.as_mut().expect("a job")
    }

    /// Begins a job on some of the workers. R does nothing else until it ends. `harmless`: without faults.
    pub fn begin_job(&mut self, harmless: bool) {
        assert!(self.waiting.is_none() && self.writing.is_none() && self.open_job.is_none());
        self.resume = None;
        self.job += 1;
        let all = self.rng.random();
        let assignment = match self.rng.random_range(0..3) {
            0 => Assignment::Round,
            _ => Assignment::Free,
        };
        let takes_absent = assignment == Assignment::Free && self.hub.is_elastic();
        let mut ranks: Vec<Rank> = (0..self.setup.workers as Rank).collect();
        // Without other workers, a job whose workers drain ends with an error.
        let drains = |known: &WorkerFacts| harmless && known.draining;
        ranks.retain(|&rank| {
            let known = &self.facts.workers[rank as usize];
            let absent = takes_absent && known.is_terminated && known.is_of_host;
            (!known.is_terminated || absent) && !drains(known) && (all || self.rng.random())
        });
        let usable = |&rank: &Rank| !self.is_terminated(rank) || self.hub.is_awaited(rank);
        if !ranks.iter().any(usable) {
            return;
        }
        let absent = ranks.iter().any(|&rank| self.is_terminated(rank));
        self.facts.seen.jobs_with_absent += usize::from(absent);
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
        let like = self.facts.tasks.next();
        let len = match self.rng.random_range(0..3) {
            0 => 0,
            1 => self.rng.random_range(0..200),
            _ => self.rng.random_range(0..40_000),
        };
        let of_blob = match self.rng.random() {
            true => ranks.clone(),
            // Not all workers of the job have it yet.
            false => self.some_ranks(ranks[0]),
        };
        let blob = self.hub.begin_blob(&of_blob, false);
        self.hub.write(&part(like, false, 0, len));
        self.hub.finish_blob();
        self.notes();
        // Without retries, worker failures may be raised as errors.
        let policy = Policy {
            retries: self.facts.retries,
            raises: self.facts.retries == 0 && self.rng.random(),
        };
        let slot = |&rank: &Rank| JobWorker {
            rank,
            host: self.at[rank as usize].0,
            cores: self.rng.random_range(0..5),
            rtt: match self.rng.random() {
                true => self.rtts.get(&rank).copied(),
                false => None,
            },
            detained: singly && self.hub.is_detained(rank),
            absent: self.facts.workers[rank as usize].is_terminated,
        };
        let setup = Setup {
            id: self.job,
            slots: ranks.iter().map(slot).collect(),
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
        self.open_job = Some(OpenJob {
            id: self.job,
            blob,
            len,
            like,
            elements,
            seconds: 10f64.powi(magnitude),
            results_before: self.facts.seen.elements,
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

    /// R runs the open job for a while. Returns whether the job has ended.
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
            let open = self.open_job();
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

    /// Closes the open job. `complete`: whether all elements must have a result.
    pub fn close_job(&mut self, complete: bool) {
        self.engine = None;
        let Some(open) = self.open_job.take() else {
            return;
        };
        if complete {
            assert!(open.elements.iter().all(|e| e.ended && e.out.is_none()));
            self.facts.seen.jobs_done += 1;
        }
        let ended = open.elements.iter().filter(|element| element.ended).count();
        assert_eq!(self.facts.seen.elements - open.results_before, ended);
        self.cancel_job(open.id);
        self.hub.drop_blob(open.blob);
        self.notes();
    }

    /// A message has ended or was withdrawn: it no longer contains its elements. Returns them.
    fn return_elements(&mut self, id: TaskId) -> Vec<usize> {
        let elements = std::mem::take(&mut self.facts.tasks[id].elements);
        for &at in &elements {
            let out = self.open_job().elements[at].out.take();
            assert_eq!(out, Some(id), "element {at} is in another message");
        }
        self.facts.tasks[id].elements.clone_from(&elements);
        elements
    }

    /// Records that an element has failed without an answer.
    fn fail_element(&mut self, at: usize) {
        let element = &mut self.open_job().elements[at];
        assert!(!element.ended && !std::mem::replace(&mut element.failed, true));
    }

    /// Records that an element has a result.
    fn finish_element(&mut self, at: usize) {
        let element = &mut self.open_job().elements[at];
        assert!(
            !std::mem::replace(&mut element.ended, true),
            "element {at} ends again"
        );
        self.facts.seen.elements += 1;
    }

    /// Simulates what happens while R waits for at most `left`.
    fn pass_time(&mut self, left: Duration) {
        if self.open_job().calm {
            let before = self.moved;
            self.sweep();
            if self.moved == before {
                let next = self.next_deadline();
                let until = self.now + left;
                self.now = next.map_or(until, |next| next.clamp(self.now, until));
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

    fn is_awaited(&self, rank: Rank) -> bool {
        self.0.borrow().hub.is_awaited(rank)
    }

    fn arrivals(&self) -> u64 {
        self.0.borrow().hub.arrivals()
    }

    fn await_arrival(&self, seen: u64, max: Duration) {
        let sim = &mut **self.0.borrow_mut();
        let until = sim.now + max;
        while sim.hub.arrivals() == seen && sim.now < until {
            sim.pass_time(until.saturating_sub(sim.now));
            sim.notes();
        }
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
        let id = sim.facts.tasks.next();
        assert_eq!(started.task, id);
        sim.check_assigned(rank, started, false);
        let known = &mut sim.facts.workers[started.assigned as usize];
        known.had_reassigned |= started.assigned != rank;
        if turn == Turn::Prefetch {
            sim.facts.seen.prefetched_messages += 1;
        }
        let answer_len = match sim.rng.random_range(0..30) {
            0 => sim.size(true).min(100_000),
            _ => sim.rng.random_range(0..300),
        };
        let again = sim.open_job().again.filter(|_| turn == Turn::First);
        sim.facts.tasks.push(Task {
            owner: rank,
            assigned: started.assigned,
            job,
            answer_len,
            on_interrupt: match sim.rng.random_range(0..3) {
                0 => OnInterrupt::Stop,
                1 => OnInterrupt::Restart,
                _ => OnInterrupt::Ignore,
            },
            rng_use: match sim.rng.random_range(0..3) {
                0 => RngUse::from_number(sim.rng.random()),
                _ => RngUse::Nothing,
            },
            prefetch: turn == Turn::Prefetch,
            own_limit: limit,
            limit: limit.into_iter().chain(sim.setup.timeout).min(),
            seeds_at_submission: sim.facts.workers[rank as usize].reported_seeds.len() - 1,
            order: again.unwrap_or(Some(id)),
            ..Task::new(id)
        });
        if again.is_none() {
            sim.overtake(started.assigned);
        }
        sim.open_job().writing = Some(id);
        Ok(started)
    }

    fn draining(&self, rank: Rank) -> Option<Arc<Termination>> {
        self.0.borrow().hub.draining(rank)
    }

    fn release(&self, rank: Rank) {
        let sim = &mut **self.0.borrow_mut();
        sim.hub.release(rank);
        sim.notes();
    }

    fn make_movable(&self) {
        let sim = &mut **self.0.borrow_mut();
        let id = sim.open_job().writing.expect("a message");
        let task = &mut sim.facts.tasks[id];
        task.movable = !task.is_reassigned();
        sim.hub.make_movable();
    }

    fn finish(&self) {
        let sim = &mut **self.0.borrow_mut();
        let id = sim.open_job().writing.take().expect("a message");
        let task = &mut sim.facts.tasks[id];
        task.complete = true;
        task.scheduled = true;
        sim.outstanding[task.owner as usize].push_back(id);
        sim.hub.finish();
        sim.notes();
    }

    fn abandon(&self) {
        let sim = &mut **self.0.borrow_mut();
        let id = sim.open_job().writing.take().expect("a message");
        sim.withdraw(id);
        sim.return_elements(id);
        sim.hub.abandon();
        sim.notes();
        assert!(
            !sim.facts.tasks[id].scheduled,
            "abandoned task {id} is still scheduled"
        );
    }

    fn receive_any(&self, workers: &RankSet, max: Duration) -> Answer {
        let sim = &mut **self.0.borrow_mut();
        let until = sim.now + max;
        let answer = loop {
            let tasks = &sim.facts.tasks;
            let of_job = |id: TaskId| workers.contains(tasks[id].owner);
            let next = sim.ready.iter().position(|&(id, ..)| of_job(id));
            let answer = sim.hub.receive_any(workers, Duration::ZERO);
            let found = next.map(|at| (sim.ready[at].0, sim.ready[at].2));
            assert_eq!(Ready::of(&answer), found);
            if let Some(at) = next {
                sim.ready.remove(at);
                break answer;
            }
            let left = until.saturating_sub(sim.now);
            let interrupted = !sim.open_job().calm && sim.rng.random_ratio(1, 200);
            if left.is_zero() || interrupted || matches!(answer, Answer::NothingSent) {
                return answer;
            }
            sim.hub
                .with_scheduler(|scheduler| scheduler.demand(Demand::AnyOf(workers.clone())));
            sim.pass_time(left);
            sim.notes();
            sim.hub
                .with_scheduler(|scheduler| scheduler.demand(Demand::Nothing));
        };
        sim.moved += 1;
        match &answer {
            Answer::Ready { task, .. } => sim.end(*task, End::Answer),
            Answer::TimedOut { task, .. } => {
                sim.end(*task, End::TimedOut);
                for at in sim.return_elements(*task) {
                    sim.fail_element(at);
                }
            }
            Answer::Revoked { task, .. } => {
                sim.end(*task, End::Revoked);
                sim.return_elements(*task);
            }
            Answer::Lost { task, .. } => {
                let lost = &mut sim.facts.tasks[*task];
                lost.reported_failures += 1;
                assert_eq!(lost.reported_failures, lost.failures);
                // Later tasks wait until the engine has decided about these elements.
                let order = lost.order;
                sim.open_job().again = Some(order);
                sim.open_job().awaiting_retry.push(*task);
                sim.return_elements(*task);
            }
            // The engine abandons no task, so this one is of another job.
            Answer::GivenUp { task, .. } => {
                assert!(sim.facts.tasks[*task].job != sim.job);
                sim.end(*task, End::GivenUp);
            }
            answer => panic!("{answer:?}"),
        }
        sim.notes();
        answer
    }

    fn revoke(&self, task: TaskId) {
        let sim = &mut **self.0.borrow_mut();
        sim.facts.tasks[task].revoke_requested = true;
        sim.hub.revoke(task);
        sim.notes();
    }

    fn forget(&self, task: TaskId) {
        let sim = &mut **self.0.borrow_mut();
        let awaiting_retry = &mut sim.open_job().awaiting_retry;
        let at = awaiting_retry.iter().position(|&other| other == task);
        awaiting_retry.remove(at.expect("a lost message"));
        sim.open_job().again = None;
        sim.end(task, End::Forgotten);
        sim.hub.forget(task);
        sim.notes();
    }
}

impl Codec for Elements<'_, '_> {
    type Stop = Stop;

    fn takes_batches(&self, rank: Rank) -> bool {
        // Some workers have an R version that does not take batches.
        rank % 7 != 3
    }

    fn gather(&mut self, tasks: &[usize], max: Duration) -> Result<(usize, Form), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        assert!(!tasks.is_empty());
        if !sim.open_job().calm && sim.rng.random_ratio(1, 300) {
            return Err(Stop::Interrupted);
        }
        let (count, form) = match sim.rng.random_range(0..12) {
            0 => (1, Form::Long),
            1 => (1, Form::Single),
            2 => (sim.rng.random_range(1..=tasks.len()), Form::Batch),
            _ => (tasks.len(), Form::Batch),
        };
        sim.open_job().gathered = (tasks[..count].to_vec(), max);
        Ok((count, form))
    }

    fn write(&mut self, rank: Rank, first: usize, form: Form) -> Result<(), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        let (gathered, max) = std::mem::take(&mut sim.open_job().gathered);
        let elements = match form {
            Form::Batch => gathered,
            Form::Long | Form::Single => vec![first],
        };
        assert_eq!(elements.first(), Some(&first));
        let open = sim.open_job.as_mut().expect("a job");
        let id = open.writing.expect("a message");
        for &at in &elements {
            let element = &mut open.elements[at];
            assert!(!element.ended && !element.failed, "element {at} has ended");
            assert_eq!(
                element.out.replace(id),
                None,
                "element {at} is in two messages"
            );
        }
        sim.facts.seen.batches += usize::from(elements.len() > 1);
        let (poison, stuck) = (
            elements.iter().any(|&at| open.elements[at].poison),
            elements.iter().any(|&at| open.elements[at].stuck),
        );
        let prefix = match form {
            Form::Batch | Form::Long => (open.like, open.len),
            Form::Single => (id, 0),
        };
        let rest = match sim.rng.random_range(0..20) {
            0 => sim.rng.random_range(0..3 * MAX_BODY),
            _ => sim.rng.random_range(0..2_000),
        };
        let task = &mut sim.facts.tasks[id];
        assert_eq!(task.assigned, rank);
        task.prefix = prefix;
        task.len = prefix.1 + rest;
        task.elements = elements;
        task.time_budget = if form == Form::Batch {
            max
        } else {
            Duration::ZERO
        };
        task.poison = poison;
        task.stuck = stuck;
        let message = part(id, false, prefix.1, rest);
        let cut = sim.rng.random_range(0..=rest);
        sim.hub.write(&message[..cut]);
        let stops = !sim.open_job().calm && sim.rng.random_ratio(1, 300);
        if !stops {
            sim.hub.write(&message[cut..]);
        }
        sim.facts.tasks[id].scheduled = sim.hub.expects(id);
        sim.notes();
        if stops {
            return Err(Stop::Interrupted);
        }
        Ok(())
    }

    fn resend_blob(&mut self, blob: BlobId, rank: Rank) -> Result<(), Stop> {
        let sim = &mut **self.0.0.borrow_mut();
        let (like, len) = (sim.open_job().like, sim.open_job().len);
        assert_eq!(blob, sim.open_job().blob);
        assert!(!sim.hub.has_blob(rank, blob));
        sim.facts.seen.blobs_resent += 1;
        sim.hub.begin_blob_again(blob, rank);
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
        let known = &sim.facts.tasks[task];
        assert_eq!(known.assigned, on);
        assert_eq!(known.elements, tasks, "the answer is for other elements");
        assert_eq!(known.end, Some(End::Answer));
        let returns_part = !known.time_budget.is_zero() && sim.rng.random_ratio(1, 10);
        check_answer(task, known.answer_len, &body);
        if !sim.open_job().calm && sim.rng.random_ratio(1, 60) {
            return Err(Stop::Unread(task));
        }
        let count = match returns_part {
            true => sim.rng.random_range(1..=tasks.len()),
            false => tasks.len(),
        };
        sim.facts.seen.partly_returned += usize::from(count < tasks.len());
        sim.return_elements(task);
        for &at in &tasks[..count] {
            sim.finish_element(at);
        }
        let seconds = sim.open_job().seconds * count as f64 * sim.rng.random_range(0.1..10.0);
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
        let lost = &sim.facts.tasks[failure.task];
        assert_eq!(
            (lost.assigned, lost.end),
            (failure.assigned, Some(End::Forgotten))
        );
        assert_eq!(lost.elements, failure.tasks);
        assert_eq!(failure.now.is_some(), sim.is_terminated(failure.assigned));
        assert_ne!(*failure.termination, Termination::Stopped);
        let Policy { retries, raises } = sim.open_job().policy;
        let job_ended = matches!(*failure.termination, Termination::JobEnded(_));
        assert!(!raises || job_ended);
        for &at in &failure.tasks {
            let element = &mut sim.open_job().elements[at];
            element.failures += 1;
            let uncounted = job_ended && element.job_ends < MAX_JOB_ENDS;
            element.job_ends += usize::from(uncounted);
            let retried = uncounted || element.failures - element.job_ends <= retries;
            assert_eq!(
                again.contains(&at),
                retried,
                "element {at} is lost for time {}",
                element.failures
            );
            if !retried {
                sim.fail_element(at);
            }
        }
        sim.facts.seen.failed_messages += 1;
    }
}

impl View<'_> {
    /// Does what R does when the engine stops. Returns whether the job continues.
    fn go_on(&self, engine: &mut Job, halt: Halt<Stop>) -> bool {
        match halt {
            Halt::Codec(Stop::Unread(task)) => self.unread(engine, task),
            Halt::Failed(failed) => {
                let sim = &mut **self.0.borrow_mut();
                // R may be interrupted before it makes the results.
                if sim.rng.random() {
                    return true;
                }
                sim.facts.seen.failed_messages +=
                    usize::from(matches!(failed, Failed::TimedOut { .. }));
                for &at in failed.tasks() {
                    let failures = engine.failures(at);
                    let element = &sim.open_job().elements[at];
                    assert!(element.failed);
                    assert_eq!(failures.len(), element.failures);
                    assert!(failures.iter().all(|failure| failure.tasks.contains(&at)));
                    // Each retry is a message with this element alone.
                    assert!(failures.iter().skip(1).all(|failure| failure.tasks == [at]));
                    sim.finish_element(at);
                }
                assert_eq!(engine.made(), Some(failed));
                true
            }
            Halt::Lost(failure) => {
                let sim = &mut **self.0.borrow_mut();
                assert!(
                    sim.open_job().policy.raises || *failure.termination == Termination::Stopped
                );
                false
            }
            Halt::Codec(Stop::Interrupted) => false,
            Halt::Terminated { rank, .. } => {
                let sim = self.0.borrow();
                assert!(sim.is_terminated(rank) || sim.facts.workers[rank as usize].draining);
                false
            }
            Halt::Stuck => panic!("tasks remain and no message is outstanding"),
        }
    }

    /// The answer to this message cannot be read. Returns whether the job continues.
    fn unread(&self, engine: &mut Job, task: TaskId) -> bool {
        let elements = {
            let sim = &mut **self.0.borrow_mut();
            sim.facts.seen.failed_messages += 1;
            // No other task waits for a decision about it.
            sim.open_job().again = Some(None);
            sim.return_elements(task)
        };
        assert_eq!(*engine.tasks_of(task), elements);
        let ended = engine.unreadable(self, &mut Elements(self), task);
        let sim = &mut **self.0.borrow_mut();
        sim.open_job().again = None;
        match (ended, &elements[..]) {
            (Ok(Some(ended)), &[at]) => {
                assert_eq!(ended, at);
                sim.finish_element(at);
                true
            }
            (Ok(None), &[_, _, ..]) => true,
            (Err(Halt::Codec(Stop::Interrupted) | Halt::Terminated { .. }), _) => false,
            (ended, elements) => panic!("{ended:?} of {elements:?}"),
        }
    }
}
