use super::*;
use crate::head::hub::StartedTask;
use crate::head::retry::is_reported;
use crate::platform::exit::Exit;
use crate::protocol::control::{Setback, WorkerFailure};
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

const JOB: JobId = 7;

fn crash() -> Arc<Termination> {
    Arc::new(Termination::Worker(WorkerFailure {
        pid: 4711,
        exit: Exit::Signal(9),
        tail: String::new(),
        oom: false,
        memory_available: 0,
        setback: Setback::default(),
    }))
}

fn job_end() -> Arc<Termination> {
    Arc::new(Termination::JobEnded("time limit".into()))
}

/// What a worker does with its current message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Answered,
    Unreadable,
    TimedOut,
    /// The worker dies and is replaced.
    Crashes,
    /// The worker dies with its host.
    HostLost,
    /// The worker is stopped.
    Stopped,
}

/// The state of a simulated hub.
#[derive(Default)]
struct State {
    now: Duration,
    termination: Vec<Option<Arc<Termination>>>,
    /// Workers that join while a job waits, the last one first.
    awaited: Vec<Rank>,
    arrivals: u64,
    queues: Vec<VecDeque<TaskId>>,
    /// The tasks of each message that was ever started.
    messages: Vec<Vec<usize>>,
    writing: Option<(Rank, Turn)>,
    /// Losses, which are returned until they are forgotten.
    lost: VecDeque<(Rank, TaskId, Arc<Termination>)>,
    revoked: VecDeque<(Rank, TaskId)>,
    /// Losses that were reported to the codec: the tasks, and those that are retried.
    reported: Vec<(Vec<usize>, Vec<usize>)>,
    answered: Vec<usize>,
    unreadable: bool,
    /// Draining workers, and those that the job has released.
    draining: Vec<Rank>,
    released: BTreeSet<Rank>,
}

/// Simulated workers, which handle each message as `fate` decides.
struct Fake<F> {
    origin: Instant,
    state: RefCell<State>,
    fate: F,
}

impl<F: Fn(Rank, &[usize]) -> Fate> Fake<F> {
    fn new(workers: usize, fate: F) -> Fake<F> {
        let state = State {
            termination: vec![None; workers],
            queues: vec![VecDeque::new(); workers],
            ..State::default()
        };
        Fake {
            origin: Instant::now(),
            state: RefCell::new(state),
            fate,
        }
    }

    fn job(&self, tasks: usize, assignment: Assignment, policy: Policy) -> Job {
        let workers = self.state.borrow().queues.len();
        let slot = |rank| JobWorker {
            rank: rank as Rank,
            host: rank,
            cores: 1,
            rtt: Some(1e-4),
            detained: false,
            absent: self.termination(rank as Rank).is_some(),
        };
        let setup = Setup {
            id: JOB,
            slots: (0..workers).map(slot).collect(),
            tasks,
            assignment,
            order: None,
            singly: false,
            timeout: None,
            policy,
            blob: 1,
            reading: None,
        };
        Job::new(setup, self.now())
    }

    fn step(&self, job: &mut Job) -> Result<bool, Halt<TaskId>> {
        job.step(self, &mut Tasks(self), Duration::from_secs(1), false)
    }

    /// Runs a job to its end. Returns the tasks that have failed.
    fn run(&self, job: &mut Job) -> Result<Vec<usize>, Halt<TaskId>> {
        let mut ended = Vec::new();
        for _ in 0..100_000 {
            match self.step(job) {
                Ok(true) => return Ok(ended),
                Ok(false) => {}
                Err(Halt::Codec(task)) => {
                    let one = job.unreadable(self, &mut Tasks(self), task)?;
                    ended.extend(one);
                }
                Err(Halt::Failed(failed)) => {
                    // Until then, the halt is repeated and the job does not end.
                    let again = self.step(job);
                    assert!(matches!(again, Err(Halt::Failed(said)) if said == failed));
                    ended.extend(failed.tasks());
                    assert_eq!(job.made(), Some(failed));
                }
                Err(halt) => return Err(halt),
            }
        }
        panic!("the job does not end");
    }
}

impl<F: Fn(Rank, &[usize]) -> Fate> Dispatch for Fake<F> {
    fn now(&self) -> Instant {
        self.origin + self.state.borrow().now
    }

    fn termination(&self, rank: Rank) -> Option<Arc<Termination>> {
        self.state.borrow().termination[rank as usize].clone()
    }

    fn is_awaited(&self, rank: Rank) -> bool {
        self.state.borrow().awaited.contains(&rank)
    }

    fn arrivals(&self) -> u64 {
        self.state.borrow().arrivals
    }

    fn await_arrival(&self, seen: u64, _: Duration) {
        let state = &mut *self.state.borrow_mut();
        assert_eq!(state.arrivals, seen);
        if let Some(rank) = state.awaited.pop() {
            state.termination[rank as usize] = None;
            state.arrivals += 1;
        }
    }

    fn draining(&self, rank: Rank) -> Option<Arc<Termination>> {
        let drains = self.state.borrow().draining.contains(&rank);
        drains.then(job_end)
    }

    fn release(&self, rank: Rank) {
        self.state.borrow_mut().released.insert(rank);
    }

    fn begin(
        &self,
        rank: Rank,
        job: JobId,
        turn: Turn,
        _: Option<Duration>,
        _: impl FnOnce(Rank) -> Option<BlobId>,
    ) -> Result<StartedTask, Arc<Termination>> {
        assert_eq!(job, JOB);
        if let Some(termination) = self.termination(rank) {
            return Err(termination);
        }
        let state = &mut *self.state.borrow_mut();
        state.writing = Some((rank, turn));
        Ok(StartedTask {
            task: state.messages.len() as TaskId - 1,
            assigned: rank,
            has_blob: true,
            behind_call: false,
            only_logged: false,
        })
    }

    fn finish(&self) {
        let state = &mut *self.state.borrow_mut();
        let (rank, turn) = state.writing.take().unwrap();
        let task = state.messages.len() as TaskId - 1;
        let queue = &mut state.queues[rank as usize];
        match turn {
            Turn::First => queue.push_front(task),
            Turn::Last | Turn::Prefetch => queue.push_back(task),
        }
    }

    fn abandon(&self) {
        panic!("nothing is abandoned");
    }

    fn receive_any(&self, _: &RankSet, _: Duration) -> Answer {
        let state = &mut *self.state.borrow_mut();
        state.now += Duration::from_micros(100);
        if let Some((rank, task, termination)) = state.lost.front().cloned() {
            let assigned = rank;
            return Answer::Lost {
                rank,
                assigned,
                task,
                termination,
            };
        }
        if let Some((rank, task)) = state.revoked.pop_front() {
            return Answer::Revoked { rank, task };
        }
        // The worker that has been busy with the oldest message.
        let mut busy = state.queues.iter().enumerate();
        let first = busy
            .by_ref()
            .filter_map(|(rank, queue)| Some((*queue.front()?, rank)));
        let Some((task, at)) = first.min() else {
            return Answer::NothingSent;
        };
        let rank = at as Rank;
        let fate = (self.fate)(rank, &state.messages[task as usize]);
        state.queues[at].pop_front();
        match fate {
            Fate::Answered | Fate::Unreadable => {
                state.unreadable = fate == Fate::Unreadable;
                let (assigned, body) = (rank, Body::default());
                Answer::Ready {
                    rank,
                    assigned,
                    task,
                    body,
                }
            }
            Fate::TimedOut => Answer::TimedOut { rank, task },
            Fate::Crashes | Fate::HostLost | Fate::Stopped => {
                let termination = match fate {
                    Fate::HostLost => Arc::new(Termination::Host("cut".into())),
                    Fate::Stopped => Arc::new(Termination::Stopped),
                    _ => crash(),
                };
                state.lost.push_back((rank, task, termination.clone()));
                if fate != Fate::Crashes {
                    let rest = state.queues[at].drain(..);
                    state
                        .lost
                        .extend(rest.map(|task| (rank, task, termination.clone())));
                    state.termination[at] = Some(termination.clone());
                }
                let assigned = rank;
                Answer::Lost {
                    rank,
                    assigned,
                    task,
                    termination,
                }
            }
        }
    }

    fn revoke(&self, task: TaskId) {
        let state = &mut *self.state.borrow_mut();
        for (rank, queue) in state.queues.iter_mut().enumerate() {
            if let Some(at) = queue
                .iter()
                .position(|&other| other == task)
                .filter(|&at| at > 0)
            {
                queue.remove(at);
                state.revoked.push_back((rank as Rank, task));
            }
        }
    }

    fn forget(&self, task: TaskId) {
        self.state.borrow_mut().lost.retain(|lost| lost.1 != task);
    }
}

struct Tasks<'a, F>(&'a Fake<F>);

impl<F> Codec for Tasks<'_, F> {
    /// The message whose answer cannot be read.
    type Stop = TaskId;

    fn takes_batches(&self, _: Rank) -> bool {
        true
    }

    fn gather(&mut self, tasks: &[usize], _: Duration) -> Result<(usize, Form), TaskId> {
        let state = &mut *self.0.state.borrow_mut();
        state.messages.push(tasks.to_vec());
        Ok((tasks.len(), Form::Batch))
    }

    fn write(&mut self, _: Rank, task: usize, _: Form) -> Result<(), TaskId> {
        let state = self.0.state.borrow();
        assert_eq!(state.messages.last().unwrap()[0], task);
        Ok(())
    }

    fn resend_blob(&mut self, _: BlobId, _: Rank) -> Result<(), TaskId> {
        panic!("the blob is everywhere");
    }

    fn is_plain(&self, _: &Body) -> bool {
        true
    }

    fn take(&mut self, _: Rank, task: TaskId, tasks: &[usize], _: Body) -> Result<Taken, TaskId> {
        let state = &mut *self.0.state.borrow_mut();
        assert_eq!(state.messages[task as usize], tasks);
        if std::mem::take(&mut state.unreadable) {
            return Err(task);
        }
        state.answered.extend(tasks);
        let busy = Duration::from_micros(1) * tasks.len() as u32;
        Ok(Taken {
            tasks: tasks.len(),
            busy,
            ..Taken::default()
        })
    }

    fn lost(&mut self, failure: &BatchLoss, again: &[usize]) {
        let state = &mut *self.0.state.borrow_mut();
        assert!(is_reported(&failure.termination, failure.now.is_none()) || failure.now.is_some());
        state.reported.push((failure.tasks.clone(), again.to_vec()));
    }
}

fn sorted(mut tasks: Vec<usize>) -> Vec<usize> {
    tasks.sort_unstable();
    tasks
}

fn all_but(tasks: Range<usize>, failed: &[usize]) -> Vec<usize> {
    tasks.filter(|task| !failed.contains(task)).collect()
}

const RESULTS: Policy = Policy {
    retries: 0,
    raises: false,
};

#[test]
fn a_task_that_kills_its_worker_is_retried_alone_and_fails_alone() {
    for assignment in [Assignment::Free, Assignment::Round] {
        let poison = |_, tasks: &[usize]| match tasks.contains(&700) {
            true => Fate::Crashes,
            false => Fate::Answered,
        };
        let hub = Fake::new(2, poison);
        let mut job = hub.job(1000, assignment, Policy::new(2));
        assert_eq!(hub.run(&mut job).unwrap(), [700]);
        let state = hub.state.borrow();
        assert_eq!(sorted(state.answered.clone()), all_but(0..1000, &[700]));
        let failures: Vec<&[usize]> = job
            .failures(700)
            .iter()
            .map(|failure| &failure.tasks[..])
            .collect();
        assert!(
            failures[0].len() > 1 && failures[0].contains(&700),
            "{failures:?}"
        );
        assert_eq!(failures[1..], [[700], [700]]);
        // The other tasks of its batch are retried once, each alone.
        let (batch, again) = &state.reported[0];
        assert_eq!((batch, &batch[..]), (again, failures[0]));
        for &other in batch.iter().filter(|&&task| task != 700) {
            let messages = state.messages.iter().filter(|tasks| tasks.contains(&other));
            let messages: Vec<_> = messages.skip(1).collect();
            assert_eq!(messages, [&[other]]);
            assert_eq!(job.failures(other).len(), 1);
        }
        assert_eq!(state.reported[1], (vec![700], vec![700]));
        assert_eq!(state.reported[2], (vec![700], vec![]));
        assert_eq!(state.reported.len(), 3);
        // Tasks that were never lost have no recorded attempts.
        assert_eq!(job.attempts.len(), batch.len());
    }
}

#[test]
fn without_retries_only_the_lost_tasks_fail() {
    let hub = Fake::new(1, |_, tasks: &[usize]| match tasks.contains(&70) {
        true => Fate::Crashes,
        false => Fate::Answered,
    });
    let mut job = hub.job(100, Assignment::Free, RESULTS);
    let failed = hub.run(&mut job).unwrap();
    let state = hub.state.borrow();
    assert_eq!(state.reported, [(failed.clone(), vec![])]);
    assert!(failed.contains(&70));
    let sent = state.messages.iter().filter(|tasks| tasks.contains(&70));
    assert_eq!(sent.count(), 1);
    assert_eq!(sorted(state.answered.clone()), all_but(0..100, &failed));
}

#[test]
fn a_loss_that_ends_the_job_is_returned_again_and_nothing_is_retried() {
    let crashes = (Fate::Crashes, Policy::new(0));
    let stopped = (Fate::Stopped, Policy::new(1000));
    for (fate, policy) in [crashes, stopped, (Fate::Stopped, RESULTS)] {
        let hub = Fake::new(1, |_, tasks: &[usize]| match tasks.contains(&5) {
            true => fate,
            false => Fate::Answered,
        });
        let mut job = hub.job(10, Assignment::Free, policy);
        let Err(Halt::Lost(failure)) = hub.run(&mut job) else {
            panic!("{fate:?} does not end the job");
        };
        assert!(failure.tasks.contains(&5));
        assert_eq!(failure.now.is_some(), fate == Fate::Stopped);
        let sent = hub.state.borrow().messages.len();
        for _ in 0..3 {
            let again = hub.step(&mut job);
            assert!(matches!(again, Err(Halt::Lost(said)) if said.task == failure.task));
        }
        let state = hub.state.borrow();
        assert_eq!(state.messages.len(), sent);
        assert!(state.reported.is_empty() && job.attempts.is_empty());
    }
}

#[test]
fn a_task_that_timed_out_is_not_retried() {
    let hub = Fake::new(2, |_, tasks: &[usize]| match tasks.contains(&50) {
        true => Fate::TimedOut,
        false => Fate::Answered,
    });
    let mut job = hub.job(100, Assignment::Free, Policy::new(3));
    let failed = hub.run(&mut job).unwrap();
    assert!(failed.contains(&50));
    let state = hub.state.borrow();
    assert_eq!(sorted(state.answered.clone()), all_but(0..100, &failed));
    assert!(state.reported.is_empty());
}

#[test]
fn an_unreadable_answer_fails_only_its_task() {
    let hub = Fake::new(2, |_, tasks: &[usize]| match tasks.contains(&50) {
        true => Fate::Unreadable,
        false => Fate::Answered,
    });
    let mut job = hub.job(100, Assignment::Free, Policy::new(0));
    assert_eq!(hub.run(&mut job).unwrap(), [50]);
    let answered = hub.state.borrow().answered.clone();
    assert_eq!(sorted(answered), all_but(0..100, &[50]));
}

proptest! {
    #[test]
    fn each_task_ends_once_and_is_retried_up_to_the_maximum(
        workers in 1_usize..5,
        tasks in 1_usize..300,
        round: bool,
        retries in 0_usize..4,
        raises: bool,
        fates in proptest::collection::vec(0_u8..40, 1..200),
    ) {
        let at = std::cell::Cell::new(0);
        let hub = Fake::new(workers, |_, _: &[usize]| {
            let fate = fates[at.get() % fates.len()];
            at.set(at.get() + 1);
            match fate {
                // Bounds the loop.
                _ if at.get() > 2000 => Fate::Answered,
                0 => Fate::HostLost,
                1 => Fate::TimedOut,
                2 => Fate::Unreadable,
                3 if at.get() % 7 == 0 => Fate::Stopped,
                4..12 => Fate::Crashes,
                _ => Fate::Answered,
            }
        });
        let policy = Policy { retries, raises: raises && retries == 0 };
        let assignment = if round { Assignment::Round } else { Assignment::Free };
        let mut job = hub.job(tasks, assignment, policy);
        let ended = hub.run(&mut job);
        let state = hub.state.borrow();
        let failed = match ended {
            Ok(failed) => failed,
            Err(Halt::Terminated { rank, .. }) => {
                prop_assert!(hub.termination(rank).is_some());
                return Ok(());
            }
            Err(Halt::Lost(failure)) => {
                prop_assert!(policy.raises || *failure.termination == Termination::Stopped);
                return Ok(());
            }
            Err(halt) => panic!("{halt:?}"),
        };
        let ends = [&state.answered[..], &failed].concat();
        prop_assert_eq!(sorted(ends), (0..tasks).collect::<Vec<_>>());
        for task in 0..tasks {
            let failures = job.failures(task);
            let reported = state.reported.iter().filter(|(lost, _)| lost.contains(&task));
            let reported: Vec<bool> = reported.map(|(_, again)| again.contains(&task)).collect();
            // The recorded losses are those that were reported, and each except the last permitted one is retried.
            prop_assert_eq!(reported.len(), failures.len());
            prop_assert!(failures.len() <= retries + 1);
            for (number, again) in reported.into_iter().enumerate() {
                prop_assert_eq!(again, number < retries);
            }
            prop_assert!(failures.len() <= retries || failed.contains(&task));
            // A task that was lost is sent alone.
            prop_assert!(failures.iter().skip(1).all(|failure| failure.tasks == [task]));
        }
        let lost: BTreeSet<usize> = state.reported.iter().flat_map(|reported| reported.0.clone()).collect();
        // The others were in messages that could not be read.
        let recorded = job.attempts.values().filter(|attempts| !attempts.failures().is_empty());
        prop_assert_eq!(recorded.count(), lost.len());
    }
}

#[test]
fn workers_that_join_during_a_free_job_take_part_and_a_job_without_workers_waits() {
    for present in [0, 1] {
        let fake = Fake::new(3, |_, _| Fate::Answered);
        let away = Arc::new(Termination::Host("it has not joined".into()));
        {
            let state = &mut *fake.state.borrow_mut();
            for rank in present..3 {
                state.termination[rank] = Some(away.clone());
            }
            state.awaited = (present as Rank..3).collect();
        }
        let mut job = fake.job(200, Assignment::Free, Policy::new(2));
        if present == 1 {
            // One joins in the middle of the job, by itself.
            fake.state.borrow_mut().awaited.clear();
            let mut steps = 0;
            loop {
                steps += 1;
                if steps == 2 {
                    let state = &mut *fake.state.borrow_mut();
                    state.termination[2] = None;
                    state.arrivals += 1;
                }
                if job
                    .step(&fake, &mut Tasks(&fake), Duration::from_micros(20), false)
                    .unwrap()
                {
                    break;
                }
            }
        } else {
            assert_eq!(fake.run(&mut job).unwrap(), []);
        }
        let answered = sorted(fake.state.borrow().answered.clone());
        assert_eq!(answered, (0..200).collect::<Vec<_>>());
    }
}

#[test]
fn a_job_whose_last_worker_is_lost_fails_unless_another_may_join() {
    let died = || Arc::new(Termination::Host("the connection was closed".into()));
    let fake = Fake::new(2, |_, _| Fate::Answered);
    fake.state.borrow_mut().termination = vec![Some(died()), Some(died())];
    let mut job = fake.job(3, Assignment::Free, Policy::new(2));
    let halt = job.step(&fake, &mut Tasks(&fake), Duration::from_secs(1), false);
    assert!(matches!(halt, Err(Halt::Terminated { .. })), "{halt:?}");
    fake.state.borrow_mut().awaited = vec![1];
    let mut job = fake.job(3, Assignment::Free, Policy::new(2));
    assert_eq!(fake.run(&mut job).unwrap(), []);
}

#[test]
fn a_draining_worker_gets_nothing_and_the_others_complete_the_job() {
    let fake = Fake::new(3, |rank, _| {
        assert_ne!(rank, 1, "a draining worker has a task");
        Fate::Answered
    });
    fake.state.borrow_mut().draining = vec![1];
    let mut job = fake.job(50, Assignment::Free, Policy::new(0));
    assert_eq!(fake.run(&mut job).unwrap(), []);
    let state = fake.state.borrow();
    let answered: BTreeSet<usize> = state.answered.iter().copied().collect();
    assert_eq!(answered, (0..50).collect());
    assert_eq!(state.released, BTreeSet::from([1]));
}

#[test]
fn messages_of_the_last_workers_that_drain_end_before_the_error() {
    let fake = Fake::new(2, |_, _| Fate::Answered);
    let mut job = fake.job(100_000, Assignment::Free, Policy::new(0));
    // Some messages are out when both workers begin to drain.
    let zero = Duration::ZERO;
    assert!(!job.step(&fake, &mut Tasks(&fake), zero, false).unwrap());
    let sent: usize = fake.state.borrow().messages.iter().map(Vec::len).sum();
    assert!(sent > 0 && sent < 100_000);
    fake.state.borrow_mut().draining = vec![0, 1];
    let error = fake.run(&mut job).unwrap_err();
    let Halt::Terminated { termination, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(termination, job_end());
    assert!(fake.state.borrow().answered.len() >= sent);
}

#[test]
fn a_job_whose_last_message_is_on_a_draining_worker_is_complete() {
    let fake = Fake::new(1, |_, _| Fate::Answered);
    let mut job = fake.job(1, Assignment::Free, Policy::new(0));
    assert!(
        !job.step(&fake, &mut Tasks(&fake), Duration::ZERO, false)
            .unwrap()
    );
    fake.state.borrow_mut().draining = vec![0];
    assert_eq!(fake.run(&mut job).unwrap(), []);
}

#[test]
fn jobs_that_are_bound_to_their_nodes_go_on_where_workers_drain() {
    let fake = Fake::new(2, |_, _| Fate::Answered);
    fake.state.borrow_mut().draining = vec![0, 1];
    let mut job = fake.job(20, Assignment::Round, Policy::new(0));
    assert_eq!(fake.run(&mut job).unwrap(), []);
    assert_eq!(fake.state.borrow().answered.len(), 20);
}
