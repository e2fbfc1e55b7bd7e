//! Drains of workers and agents.

use super::*;
use crate::protocol::control::DrainCause;
use proptest::prelude::*;

fn movable(rank: Rank, task: TaskId) -> Order {
    Order {
        movable: true,
        prefetch: true,
        ..order(rank, task)
    }
}

/// A call for the first free worker among these.
fn call(scheduler: &mut Scheduler, task: TaskId, any_of: &[Rank]) {
    scheduler.submit(Order {
        any_of: Some(any_of.into()),
        ..order(0, task)
    });
    scheduler.append_call(task, Bytes::from_static(b"call").into(), true);
}

fn stopped() -> Arc<Termination> {
    Arc::new(Termination::Stopped)
}

fn announce(scheduler: &mut Scheduler, agent: usize, cause: DrainCause) {
    let seconds = Some(30);
    from_agent(scheduler, agent, &ToHead::Draining { seconds, cause });
}

/// The control messages that are sent to a host now.
fn controls(scheduler: &mut Scheduler, agent: usize) -> Vec<ToAgent> {
    let frames = std::iter::from_fn(|| scheduler.next_frame(agent));
    let frames = frames.filter(|frame| frame.header.kind == Kind::Control);
    frames.map(|f| control::decode(&f.body).unwrap()).collect()
}

/// How tasks ended.
fn ends(notes: Vec<Note>) -> Vec<(TaskId, Outcome)> {
    let end = |note| match note {
        Note::Done { task, outcome, .. } => Some((task, outcome)),
        _ => None,
    };
    notes.into_iter().filter_map(end).collect()
}

#[test]
fn an_idle_draining_worker_is_stopped_at_once_and_its_removed_agent_ends() {
    let mut s = up(2);
    s.take_notes();
    s.drain_worker(1, &stopped());
    let notes = s.take_notes();
    let terminated = Note::Terminated {
        rank: 1,
        termination: stopped(),
    };
    let drained = Note::Drained {
        agent: 1,
        removed: true,
    };
    assert_eq!(notes, [terminated, drained]);
    let stop = ToAgent::StopWorker { worker: 0 };
    assert_eq!(controls(&mut s, 1), [stop, ToAgent::Stop]);
    assert_eq!(controls(&mut s, 0), []);
    assert_eq!((s.state(0), s.state(1)), (State::Idle, State::Stopped));
    assert!(!s.has_lost(1) && s.take_notes().is_empty());
}

#[test]
fn a_draining_worker_ends_its_task_and_gives_back_those_that_any_worker_may_run() {
    let mut s = up(2);
    for task in 1..=3 {
        submit(&mut s, movable(0, task));
    }
    // The first one runs, the second one is prefetched, and the third one waits.
    let tasks: Vec<TaskId> = sent(&mut s, 0).into_iter().map(|sent| sent.1).collect();
    assert_eq!(tasks, [1, 2]);
    s.take_notes();
    announce(&mut s, 0, DrainCause::TimeLimit);
    assert_eq!(s.state(0), State::Draining(Some(1)));
    assert_eq!(ends(s.take_notes()), [(3, Outcome::Revoked)]);
    let revoke = ToAgent::Revoke { worker: 0, task: 2 };
    assert_eq!(controls(&mut s, 0), [revoke]);
    let dropped = Frame::new(Kind::Data, LAST | ABORT, 0, 2, Bytes::new());
    s.on_frame(0, dropped).unwrap();
    assert_eq!(ends(s.take_notes()), [(2, Outcome::Revoked)]);
    // What arrives too late is given back, too.
    submit(&mut s, movable(0, 4));
    assert_eq!(ends(s.take_notes()), [(4, Outcome::Revoked)]);
    assert_eq!(sent(&mut s, 0), []);
    answer(&mut s, 0, 1, None);
    let notes = s.take_notes();
    let ended = Arc::new(Termination::JobEnded("time limit".into()));
    assert!(notes.contains(&Note::Terminated {
        rank: 0,
        termination: ended,
    }));
    assert!(notes.contains(&Note::Drained {
        agent: 0,
        removed: false,
    }));
    let stop = ToAgent::StopWorker { worker: 0 };
    assert_eq!(controls(&mut s, 0), [stop, ToAgent::Stop]);
}

#[test]
fn bound_tasks_still_run_on_a_draining_worker() {
    let mut s = up(2);
    submit(&mut s, order(0, 1));
    submit(&mut s, order(0, 2));
    s.drain_worker(0, &stopped());
    submit(&mut s, order(0, 3));
    for task in 1..=3 {
        assert_eq!(sent(&mut s, 0).len(), 1);
        assert!(!s.is_terminated(0));
        answer(&mut s, 0, task, None);
        let ends = ends(s.take_notes());
        assert!(matches!(ends[..], [(id, Outcome::Answer(_))] if id == task));
    }
    assert_eq!(s.state(0), State::Stopped);
}

#[test]
fn a_verb_keeps_its_draining_workers_until_it_is_over() {
    let mut s = up(1);
    s.reserve_for_verb(0);
    s.drain_worker(0, &stopped());
    s.take_notes();
    assert_eq!(s.state(0), State::Draining(None));
    assert!(s.verb_over());
    s.take_notes();
    assert_eq!(s.state(0), State::Stopped);
    assert!(!s.verb_over());
}

#[test]
fn calls_go_to_other_workers_and_only_the_last_ones_drain_with_calls() {
    let mut s = up(2);
    call(&mut s, 1, &[0, 1]);
    call(&mut s, 2, &[0, 1]);
    call(&mut s, 3, &[0, 1]);
    let first = |s: &mut Scheduler, agent| sent(s, agent).last().map(|sent| sent.1);
    assert_eq!((first(&mut s, 0), first(&mut s, 1)), (Some(1), Some(2)));
    s.drain_worker(0, &stopped());
    answer(&mut s, 0, 1, None);
    s.take_notes();
    assert_eq!(s.state(0), State::Stopped);
    // The last worker drains, too: nobody else can run the call.
    s.drain_worker(1, &stopped());
    answer(&mut s, 1, 2, None);
    s.take_notes();
    assert_eq!(s.state(1), State::Draining(Some(3)));
    assert_eq!(first(&mut s, 1), Some(3));
    answer(&mut s, 1, 3, None);
    s.take_notes();
    assert_eq!(s.state(1), State::Stopped);
}

#[test]
fn a_task_that_is_cut_off_by_the_end_of_its_job_is_lost_for_that_reason() {
    let mut s = up(2);
    submit(&mut s, order(0, 1));
    submit(&mut s, order(1, 2));
    sent(&mut s, 0);
    announce(&mut s, 0, DrainCause::Warned);
    announce(&mut s, 0, DrainCause::Terminated);
    s.take_notes();
    s.agent_lost(0, "the connection was closed");
    s.agent_lost(1, "the connection was closed");
    let ended = Termination::JobEnded("cancelled or preempted".into());
    let host = Termination::Host("the connection was closed".into());
    let lost = |termination| Outcome::Lost(Arc::new(termination));
    assert_eq!(ends(s.take_notes()), [(1, lost(ended)), (2, lost(host))]);
    assert!(s.has_lost(0) && s.has_lost(1));
    // A requeued job brings its agent back.
    s.agent_back(0, &ToAgent::Alive).unwrap();
    from_agent(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 3 });
    s.restored(0);
    submit(&mut s, movable(0, 5));
    assert_eq!(s.state(0), State::Busy(5));
}

#[test]
fn a_signal_to_all_processes_of_a_job_counts_as_its_end_and_a_crash_does_not() {
    for (exit, by_engine) in [(Exit::Signal(15), true), (Exit::Signal(11), false)] {
        let mut s = up(1);
        submit(&mut s, order(0, 1));
        sent(&mut s, 0);
        announce(&mut s, 0, DrainCause::Terminated);
        let failure = WorkerFailure {
            exit,
            ..WorkerFailure::default()
        };
        let lost = ToHead::WorkerFailed {
            worker: 0,
            failure,
            replaced: true,
        };
        from_agent(&mut s, 0, &lost);
        let ends = ends(s.take_notes());
        let [(1, Outcome::Lost(termination))] = &ends[..] else {
            panic!("{ends:?}");
        };
        let job_ended = matches!(**termination, Termination::JobEnded(_));
        assert_eq!(job_ended, by_engine, "{exit:?}");
    }
}

#[test]
fn an_agent_cannot_flood_the_head_with_announcements() {
    let mut s = up(1);
    s.reserve_for_verb(0);
    s.take_notes();
    for _ in 0..1_000 {
        for cause in [
            DrainCause::Terminated,
            DrainCause::TimeLimit,
            DrainCause::Warned,
        ] {
            announce(&mut s, 0, cause);
        }
    }
    assert_eq!(s.take_notes().len(), 1);
}

#[test]
fn a_removed_worker_of_a_lost_host_does_not_come_back() {
    let mut s = up(2);
    s.agent_lost(0, "cut");
    assert!(s.has_lost(0));
    s.drain_worker(0, &stopped());
    assert!(!s.has_lost(0));
    submit(&mut s, order(1, 1));
    s.drain_worker(1, &stopped());
    s.agent_lost(1, "cut");
    assert!(!s.has_lost(1));
    assert_eq!((s.state(0), s.state(1)), (State::Stopped, State::Stopped));
}

proptest! {
    /// Bound and movable tasks, answers and drains in any order: each task ends once, no movable task starts on a
    /// draining worker, and all draining workers end.
    #[test]
    fn each_task_ends_once_whenever_workers_drain(steps in proptest::collection::vec((0_u32..3, 0_u8..6), 1..80)) {
        let mut s = up(3);
        s.take_notes();
        let mut draining = [false; 3];
        let mut running = [const { Vec::new() }; 3];
        let mut orders: Vec<Order> = Vec::new();
        let mut ended: Vec<TaskId> = Vec::new();
        let mut revokes = Vec::new();
        let rest = (0..400).map(|step| (step % 3, 5));
        for (rank, action) in steps.into_iter().chain(rest) {
            let at = rank as usize;
            match action {
                0 | 1 => {
                    let task = orders.len() as TaskId + 1;
                    let new = if action == 0 { order(rank, task) } else { movable(rank, task) };
                    orders.push(new.clone());
                    submit(&mut s, new);
                }
                2 => {
                    draining[at] = true;
                    s.drain_worker(rank, &stopped());
                }
                3 => {
                    draining[at] = true;
                    announce(&mut s, at, DrainCause::Terminated);
                }
                _ => if !running[at].is_empty() && !s.is_terminated(rank) {
                    answer(&mut s, at, running[at].remove(0), None);
                },
            }
            ended.extend(ends(s.take_notes()).into_iter().map(|end| end.0));
            while let Some(frame) = s.next_frame(at) {
                let task = frame.header.task;
                match frame.header.kind {
                    Kind::Data => {
                        prop_assert!(!draining[at] || !orders[task as usize - 1].movable);
                        running[at].push(task);
                    }
                    Kind::Control => if let ToAgent::Revoke { task, .. } = control::decode(&frame.body).unwrap() {
                        revokes.push((at, task));
                    },
                    _ => {}
                }
            }
            for (at, task) in revokes.drain(..) {
                // The agent drops the task unless it has started.
                if running[at].first() != Some(&task) {
                    running[at].retain(|&other| other != task);
                    let dropped = Frame::new(Kind::Data, LAST | ABORT, 0, task, Bytes::new());
                    s.on_frame(at, dropped).unwrap();
                }
            }
            ended.extend(ends(s.take_notes()).into_iter().map(|end| end.0));
        }
        ended.sort_unstable();
        prop_assert_eq!(ended, (1..=orders.len() as TaskId).collect::<Vec<_>>());
        for rank in 0..3 {
            prop_assert_eq!(s.is_terminated(rank), draining[rank as usize]);
        }
    }
}
