use super::events::{Note, Outcome, State};
use super::pool::CallLocation;
use super::task::Order;
use super::*;
use crate::head::activity::{self, Measured};
use crate::platform::exit::Exit;
use crate::protocol::control::{Setback, WorkerFailure};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, FIRST, HEADER_LEN, LAST, MAX_BODY};
use crate::protocol::ids::{CALLS, RESTORE, Rank, TaskId};
use crate::protocol::limits::SEND_WINDOW;
use bytes::Bytes;

mod drain;
mod give_back;

/// Workers that are up, one on each host.
fn up(workers: u32) -> Scheduler {
    let hosts = (0..workers).map(|rank| vec![rank]).collect();
    let mut scheduler = Scheduler::new(hosts, 1 << 20);
    for agent in 0..workers as usize {
        from_agent(
            &mut scheduler,
            agent,
            &ToHead::WorkerUp { worker: 0, pid: 1 },
        );
    }
    scheduler
}

fn from_agent(scheduler: &mut Scheduler, agent: usize, message: &ToHead) {
    let frame = control::encode(message).unwrap();
    scheduler.on_frame(agent, frame).unwrap();
}

fn submit(scheduler: &mut Scheduler, order: Order) {
    let (rank, task) = (order.rank, order.task);
    scheduler.submit(order);
    let chunk = Bytes::from_static(b"message").into();
    scheduler.append(rank, task, chunk, true);
}

fn order(rank: Rank, task: TaskId) -> Order {
    Order {
        rank,
        task,
        job: 1,
        ..Order::default()
    }
}

fn again(rank: Rank, task: TaskId) -> Order {
    Order {
        again: true,
        ..order(rank, task)
    }
}

fn reassigned(rank: Rank, task: TaskId, from: Rank) -> Order {
    Order {
        on_behalf_of: Some(from),
        ..order(rank, task)
    }
}

/// The worker of this host is lost and replaced.
fn replace(scheduler: &mut Scheduler, agent: usize) {
    lose(scheduler, agent, true);
    from_agent(
        scheduler,
        agent,
        &ToHead::WorkerReplaced { worker: 0, pid: 2 },
    );
}

fn lose(scheduler: &mut Scheduler, agent: usize, replaced: bool) {
    let failure = WorkerFailure {
        pid: 1,
        exit: Exit::Signal(9),
        tail: String::new(),
        ..WorkerFailure::default()
    };
    let lost = ToHead::WorkerFailed {
        worker: 0,
        failure,
        replaced,
    };
    from_agent(scheduler, agent, &lost);
}

/// The worker of this host answers, and leaves its random numbers so.
fn answer(scheduler: &mut Scheduler, agent: usize, task: TaskId, seed: Option<&'static [u8]>) {
    if let Some(seed) = seed {
        let seed = Frame::new(Kind::Seed, 0, 0, task, Bytes::from_static(seed));
        scheduler.on_frame(agent, seed).unwrap();
    }
    let answer = Frame::new(Kind::Data, FIRST | LAST, 0, task, Bytes::new());
    scheduler.on_frame(agent, answer).unwrap();
}

/// Tasks and seeds that are sent to a host now.
fn sent(scheduler: &mut Scheduler, agent: usize) -> Vec<(Kind, TaskId, Bytes)> {
    let frames = std::iter::from_fn(|| scheduler.next_frame(agent));
    let frames = frames.filter(|frame| frame.header.kind != Kind::Control);
    frames
        .map(|frame| (frame.header.kind, frame.header.task, frame.body))
        .collect()
}

fn at(scheduler: &mut Scheduler, seconds: u64) {
    scheduler.at(Moment::from_secs(seconds));
}

/// Kinds and times of what a worker was at.
fn history(scheduler: &Scheduler, rank: Rank) -> Vec<(activity::ActivityKind, u64, u64)> {
    let stats = scheduler.stats(rank, true);
    let intervals = stats.intervals().iter();
    intervals
        .map(|i| (i.kind, i.start.as_secs(), i.end.as_secs()))
        .collect()
}

#[test]
fn a_worker_is_busy_from_when_it_has_the_message_until_it_answers() {
    use activity::ActivityKind::{Busy, Transfer};
    let mut s = up(1);
    s.measure_with(|bytes| {
        (bytes == b"7").then_some(Measured {
            seconds: 2.0,
            tasks: 7,
        })
    });
    assert_eq!(s.state(0), State::Idle);
    at(&mut s, 10);
    submit(&mut s, order(0, 1));
    // Sent ahead: it begins when the one before has ended.
    let prefetch = Order {
        prefetch: true,
        ..order(0, 2)
    };
    submit(&mut s, prefetch);
    assert_eq!(s.state(0), State::Busy(1));
    at(&mut s, 12);
    assert_eq!(tasks_sent(&mut s, 0), [1, 2]);
    at(&mut s, 15);
    assert_eq!(s.stats(0, false).busy.as_secs(), 3);
    answer(&mut s, 0, 1, None);
    assert_eq!(s.state(0), State::Busy(2));
    assert_eq!(history(&s, 0), [(Transfer, 10, 12), (Busy, 12, 15)]);
    // This one says how long it took, and for how many.
    at(&mut s, 19);
    let seven = Bytes::from_static(b"7");
    let first = Frame::new(Kind::Data, FIRST, 0, 2, seven);
    s.on_frame(0, first).unwrap();
    at(&mut s, 20);
    let last = Frame::new(Kind::Data, LAST, 0, 2, Bytes::new());
    s.on_frame(0, last).unwrap();
    assert_eq!(s.state(0), State::Idle);
    let parts = history(&s, 0);
    assert_eq!(
        parts[2..],
        [(Transfer, 15, 17), (Busy, 17, 19), (Transfer, 19, 20)]
    );
    let stats = s.stats(0, false);
    assert_eq!((stats.tasks, stats.busy.as_secs()), (8, 5));
    assert!(stats.bytes_in > 0 && stats.bytes_out > 0 && stats.failures == 0);
    assert!(stats.intervals().is_empty());
}

#[test]
fn losses_cancelled_tasks_and_what_restores_are_no_tasks_done() {
    use activity::ActivityKind::Busy;
    let mut s = up(1);
    submit(&mut s, order(0, 1));
    tasks_sent(&mut s, 0);
    at(&mut s, 3);
    lose(&mut s, 0, true);
    assert_eq!(s.state(0), State::Restoring);
    at(&mut s, 5);
    from_agent(&mut s, 0, &ToHead::WorkerReplaced { worker: 0, pid: 2 });
    let stats = s.stats(0, true);
    assert_eq!((stats.tasks, stats.failures), (0, 1));
    assert_eq!(history(&s, 0), [(Busy, 0, 3)]);
    let lost = stats.failures().iter();
    let lost: Vec<_> = lost.map(|of| (of.0.as_secs(), of.1.as_secs())).collect();
    assert_eq!(lost, [(3, 5)]);
    assert_eq!(
        stats.error.as_deref(),
        Some("lost: pid 1 was killed by signal 9")
    );
    submit(&mut s, again(0, 1));
    tasks_sent(&mut s, 0);
    at(&mut s, 6);
    s.cancel_job(1);
    assert_eq!(s.state(0), State::Ending(1));
    at(&mut s, 8);
    let ended = Frame::new(Kind::Data, LAST | ABORT, 0, 1, Bytes::new());
    s.on_frame(0, ended).unwrap();
    assert_eq!(s.state(0), State::Idle);
    s.restore(0, vec![(RESTORE, 0, vec![Bytes::from_static(b"x").into()])]);
    assert_eq!(s.state(0), State::Restoring);
    tasks_sent(&mut s, 0);
    at(&mut s, 9);
    answer(&mut s, 0, RESTORE, None);
    assert_eq!(history(&s, 0), [(Busy, 0, 3), (Busy, 5, 8)]);
    s.stop_worker(0);
    assert_eq!(s.state(0), State::Stopped);
    let stats = s.stats(0, false);
    assert_eq!(
        (stats.tasks, stats.failures, stats.busy.as_secs()),
        (0, 1, 6)
    );
}

fn tasks_sent(scheduler: &mut Scheduler, agent: usize) -> Vec<TaskId> {
    let frames = sent(scheduler, agent).into_iter();
    let data = frames.filter(|frame| frame.0 == Kind::Data);
    data.map(|frame| frame.1).collect()
}

#[test]
fn a_lost_task_that_is_submitted_again_goes_before_those_that_follow() {
    let mut scheduler = up(1);
    submit(&mut scheduler, order(0, 1));
    submit(&mut scheduler, order(0, 2));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    replace(&mut scheduler, 0);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    submit(&mut scheduler, again(0, 1));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    answer(&mut scheduler, 0, 1, None);
    assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
}

#[test]
fn tasks_after_a_lost_one_continue_when_that_is_abandoned_or_cancelled() {
    type End = fn(&mut Scheduler);
    let ends: [End; 3] = [
        |scheduler| scheduler.abandon_task(0, 1),
        |scheduler| scheduler.cancel_job(7),
        |scheduler| scheduler.cancel_task(0, 1),
    ];
    for end in ends {
        let mut scheduler = up(1);
        let first = Order {
            job: 7,
            ..order(0, 1)
        };
        submit(&mut scheduler, first);
        submit(&mut scheduler, order(0, 2));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        replace(&mut scheduler, 0);
        scheduler.abandon_task(0, 2);
        assert_eq!(tasks_sent(&mut scheduler, 0), []);
        scheduler.take_notes();
        end(&mut scheduler);
        assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
        // The first task had already ended as lost.
        assert_eq!(scheduler.take_notes(), []);
    }
}

#[test]
fn tasks_that_were_lost_together_are_submitted_again_in_their_order() {
    let mut scheduler = up(1);
    submit(&mut scheduler, order(0, 4));
    assert_eq!(tasks_sent(&mut scheduler, 0), [4]);
    submit(&mut scheduler, order(0, 5));
    for task in 1..4 {
        submit(&mut scheduler, again(0, task));
    }
    let first = Order {
        first: true,
        ..order(0, 6)
    };
    submit(&mut scheduler, first);
    let mut before = 4;
    for task in [6, 1, 2, 3, 5] {
        answer(&mut scheduler, 0, before, None);
        assert_eq!(tasks_sent(&mut scheduler, 0), [task]);
        before = task;
    }
}

#[test]
fn reassigned_tasks_do_not_wait_for_the_retry_decision_on_a_lost_task() {
    let mut scheduler = up(2);
    submit(&mut scheduler, order(0, 1));
    submit(&mut scheduler, order(0, 2));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    replace(&mut scheduler, 0);
    submit(&mut scheduler, reassigned(0, 3, 1));
    assert_eq!(tasks_sent(&mut scheduler, 0), [3]);
    // Neither its own loss nor its resubmission ends the wait of other tasks.
    replace(&mut scheduler, 0);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    let third = Order {
        again: true,
        ..reassigned(0, 3, 1)
    };
    submit(&mut scheduler, third);
    assert_eq!(tasks_sent(&mut scheduler, 0), [3]);
    answer(&mut scheduler, 0, 3, None);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    submit(&mut scheduler, again(0, 1));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
}

#[test]
fn a_reassigned_task_uses_the_seed_of_its_owner_or_a_new_one() {
    for (left, found) in [(Some(&b"left"[..]), &b"left"[..]), (None, b"")] {
        let mut scheduler = up(2);
        submit(&mut scheduler, order(0, 1));
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        answer(&mut scheduler, 0, 1, left);
        lose(&mut scheduler, 0, false);
        submit(&mut scheduler, reassigned(1, 2, 0));
        let frames = sent(&mut scheduler, 1);
        assert_eq!(frames[0], (Kind::Seed, 2, Bytes::from_static(found)));
        assert_eq!((frames[1].0, frames[1].1), (Kind::Data, 2));
    }
}

#[test]
fn a_fresh_worker_has_a_whole_window() {
    let fill = |scheduler: &mut Scheduler, order: Order| {
        let (rank, task) = (order.rank, order.task);
        scheduler.submit(order);
        for _ in 0..2 * SEND_WINDOW / MAX_BODY {
            let chunk = Bytes::from(vec![0; MAX_BODY]).into();
            scheduler.append(rank, task, chunk, false);
        }
        let frames = sent(scheduler, 0).into_iter();
        frames
            .map(|frame| HEADER_LEN + frame.2.len())
            .sum::<usize>()
    };
    let mut scheduler = up(1);
    let whole = fill(&mut scheduler, order(0, 1));
    assert!(whole > SEND_WINDOW - HEADER_LEN - MAX_BODY && whole <= SEND_WINDOW);
    // The worker is lost with the frames that it had not read.
    replace(&mut scheduler, 0);
    assert_eq!(fill(&mut scheduler, again(0, 1)), whole);
    // It has all of a message, of which its agent has not given back the bytes, and is killed.
    replace(&mut scheduler, 0);
    submit(&mut scheduler, again(0, 1));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    scheduler.cancel_task(0, 1);
    scheduler.take_notes();
    from_agent(
        &mut scheduler,
        0,
        &ToHead::WorkerReplaced { worker: 0, pid: 2 },
    );
    let killed = Some(Interruption::Cancelled);
    let notes = scheduler.take_notes();
    assert_eq!(
        notes,
        [Note::Replaced {
            rank: 0,
            pid: 2,
            killed
        }]
    );
    assert_eq!(fill(&mut scheduler, order(0, 2)), whole);
}

#[test]
fn errors_of_running_tasks_are_noted() {
    let mut scheduler = up(1);
    let failed = |task| ToHead::TaskFailed {
        worker: 0,
        task,
        text: "no".into(),
        output: "i = 17".into(),
    };
    let noted = |scheduler: &mut Scheduler, task| {
        scheduler.take_notes();
        from_agent(scheduler, 0, &failed(task));
        scheduler.take_notes()
    };
    assert_eq!(noted(&mut scheduler, 1), []);
    submit(&mut scheduler, order(0, 1));
    submit(&mut scheduler, order(0, 2));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    let note = Note::TaskFailed {
        rank: 0,
        task: 1,
        text: "no".into(),
        output: "i = 17".into(),
    };
    // Each element of a batch may fail.
    assert_eq!(noted(&mut scheduler, 1), std::slice::from_ref(&note));
    assert_eq!(noted(&mut scheduler, 1), [note]);
    assert_eq!(noted(&mut scheduler, 2), []);
    let late = ToHead::TimedOut {
        worker: 0,
        task: 1,
        output: String::new(),
    };
    from_agent(&mut scheduler, 0, &late);
    assert_eq!(noted(&mut scheduler, 1), []);
    let mut scheduler = up(1);
    submit(&mut scheduler, order(0, 1));
    scheduler.cancel_task(0, 1);
    assert_eq!(noted(&mut scheduler, 1), []);
}

#[test]
fn a_task_that_is_out_of_time_ends_once() {
    let mut scheduler = up(1);
    submit(&mut scheduler, order(0, 1));
    submit(&mut scheduler, order(0, 2));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    scheduler.take_notes();
    let late = ToHead::TimedOut {
        worker: 0,
        task: 1,
        output: "converges slowly".into(),
    };
    from_agent(&mut scheduler, 0, &late);
    assert!(matches!(
        scheduler.take_notes()[..],
        [
            Note::TimedOut { rank: 0, .. },
            Note::Done {
                task: 1,
                outcome: Outcome::TimedOut,
                ..
            }
        ]
    ));
    scheduler.cancel_task(0, 1);
    from_agent(&mut scheduler, 0, &late);
    // Its worker is busy until that has heeded the interrupt, or is replaced.
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    from_agent(
        &mut scheduler,
        0,
        &ToHead::WorkerReplaced { worker: 0, pid: 2 },
    );
    assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
    let notes = scheduler.take_notes();
    let killed = Some(Interruption::TimedOut);
    assert_eq!(
        notes,
        [Note::Replaced {
            rank: 0,
            pid: 2,
            killed
        }]
    );
}

/// Time limits that are sent to a host now, in milliseconds, each just before the message of its task.
fn limits_sent(scheduler: &mut Scheduler, agent: usize) -> Vec<(TaskId, u64)> {
    let sent = sent(scheduler, agent);
    let limits = sent.windows(2).filter(|pair| pair[0].0 == Kind::Limit);
    let of = |(_, task, body): &(Kind, TaskId, Bytes)| {
        let micros = <[u8; 8]>::try_from(&body[..]).unwrap();
        (*task, u64::from_le_bytes(micros) / 1000)
    };
    limits
        .map(|pair| {
            assert_eq!((pair[1].0, pair[1].1), (Kind::Data, pair[0].1));
            of(&pair[0])
        })
        .collect()
}

#[test]
fn a_task_has_the_shorter_of_its_own_time_limit_and_that_of_all() {
    let cases = [
        (None, None, None),
        (Some(5), None, Some(5)),
        (None, Some(9), Some(9)),
        (Some(5), Some(9), Some(5)),
        (Some(9), Some(5), Some(5)),
    ];
    for (own, all, limit) in cases {
        let mut s = up(1);
        s.limit_time(all.map(Duration::from_millis));
        let limited = Order {
            limit: own.map(Duration::from_millis),
            ..order(0, 1)
        };
        submit(&mut s, limited);
        let limits: Vec<_> = limit.map(|limit| (1, limit)).into_iter().collect();
        assert_eq!(limits_sent(&mut s, 0), limits);
        answer(&mut s, 0, 1, None);
        call(&mut s, 2, &[0], false);
        let all: Vec<_> = all.map(|limit| (2, limit)).into_iter().collect();
        assert_eq!(limits_sent(&mut s, 0), all);
    }
}

#[test]
fn restoring_calls_have_no_time_limit() {
    let mut s = up(1);
    s.limit_time(Some(Duration::from_millis(1)));
    let chunk = Bytes::from_static(b"export").into();
    s.restore(0, vec![(RESTORE | 1, 0, vec![chunk])]);
    let kinds = sent(&mut s, 0).into_iter().map(|(kind, ..)| kind);
    assert_eq!(kinds.collect::<Vec<_>>(), [Kind::State, Kind::Data]);
}

#[test]
fn a_task_that_is_sent_again_has_its_time_limit_again() {
    let mut s = up(1);
    submit(&mut s, order(0, 1));
    let limited = Order {
        limit: Some(Duration::from_millis(7)),
        ..prefetch(0, 2)
    };
    submit(&mut s, limited);
    assert_eq!(limits_sent(&mut s, 0), [(2, 7)]);
    replace(&mut s, 0);
    s.abandon_task(0, 1);
    assert_eq!(limits_sent(&mut s, 0), [(2, 7)]);
}

#[test]
fn queued_tasks_of_a_host_that_is_left_out_are_lost_once() {
    let mut scheduler = up(2);
    submit(&mut scheduler, order(0, 1));
    submit(&mut scheduler, order(0, 2));
    for _ in 0..MAX_FAILURES_IN_A_ROW {
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        replace(&mut scheduler, 0);
        submit(&mut scheduler, again(0, 1));
    }
    let notes = scheduler.take_notes();
    let lost = |id: TaskId| {
        let ends = notes.iter().filter(move |note| match note {
            Note::Done { task, outcome, .. } => *task == id && matches!(outcome, Outcome::Lost(_)),
            _ => false,
        });
        ends.count()
    };
    // Each of its tries, and that which came too late.
    assert_eq!(lost(1), MAX_FAILURES_IN_A_ROW + 1);
    assert_eq!(lost(2), 1);
    let left_out = |note: &&Note| matches!(note, Note::LeftOut { agent: 0, .. });
    assert_eq!(notes.iter().filter(left_out).count(), 1);
    let frame = scheduler.next_frame(0).unwrap();
    assert_eq!(
        control::decode::<ToAgent>(&frame.body).unwrap(),
        ToAgent::Stop
    );
    assert_eq!(scheduler.next_frame(0), None);
}

#[test]
fn the_last_host_is_left_out_only_if_its_workers_end_without_a_task() {
    let left_out = |scheduler: &mut Scheduler| {
        let notes = scheduler.take_notes();
        notes
            .iter()
            .any(|note| matches!(note, Note::LeftOut { .. }))
    };
    let mut scheduler = up(1);
    submit(&mut scheduler, order(0, 1));
    for _ in 0..2 * MAX_FAILURES_IN_A_ROW {
        assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
        replace(&mut scheduler, 0);
        submit(&mut scheduler, again(0, 1));
    }
    assert!(!left_out(&mut scheduler));
    let mut scheduler = up(1);
    for _ in 0..MAX_FAILURES_IN_A_ROW {
        replace(&mut scheduler, 0);
    }
    assert!(left_out(&mut scheduler));
}

#[test]
fn nothing_is_left_for_a_host_that_is_lost_after_it_was_left_out() {
    let mut scheduler = up(1);
    for _ in 0..MAX_FAILURES_IN_A_ROW {
        replace(&mut scheduler, 0);
    }
    assert!(!scheduler.any_left());
    scheduler.agent_lost(0, "lost");
    assert_eq!(scheduler.next_frame(0), None);
}

#[test]
fn a_host_that_was_lost_while_its_stream_was_full_is_sent_to_again() {
    let mut s = up(1);
    submit(&mut s, order(0, 1));
    // Its message waits to be sent.
    s.agent_lost(0, "cut");
    s.take_notes();
    s.agent_back(0, &ToAgent::Stop).unwrap();
    from_agent(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 2 });
    let chunk = Bytes::from_static(b"what lasted").into();
    s.restore(0, vec![(RESTORE, 0, vec![chunk])]);
    assert_eq!(tasks_sent(&mut s, 0), [RESTORE]);
}

#[test]
fn restoring_calls_do_not_change_the_seed_of_a_worker() {
    let mut s = up(1);
    submit(&mut s, order(0, 1));
    tasks_sent(&mut s, 0);
    answer(&mut s, 0, 1, Some(b"its own"));
    for pid in 2..4 {
        s.agent_lost(0, "cut");
        s.agent_back(0, &ToAgent::Stop).unwrap();
        from_agent(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid });
        let chunk = Bytes::from_static(b"what lasted").into();
        s.restore(0, vec![(RESTORE, 0, vec![chunk])]);
        let seed = (Kind::Seed, 0, Bytes::from_static(b"its own"));
        assert_eq!(sent(&mut s, 0).last(), Some(&seed));
        answer(&mut s, 0, RESTORE, Some(b"of the replay"));
    }
}

#[test]
fn a_worker_that_is_stopped_while_its_host_is_lost_is_not_made_again() {
    let mut s = Scheduler::new(vec![vec![0, 1]], 1 << 20);
    s.agent_lost(0, "cut");
    assert!(s.has_lost(0));
    s.stop_worker(0);
    s.agent_back(0, &ToAgent::Stop).unwrap();
    from_agent(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 3 });
    assert!(!s.is_up(0));
    assert!(s.is_starting(0));
    from_agent(&mut s, 0, &ToHead::WorkerUp { worker: 1, pid: 4 });
    assert!(s.is_up(1) && !s.is_starting(0) && !s.has_lost(0));
}

#[test]
fn a_worker_that_is_back_goes_on_where_who_stood_in_left_its_random_numbers() {
    let mut s = up(2);
    submit(&mut s, order(0, 1));
    tasks_sent(&mut s, 0);
    answer(&mut s, 0, 1, Some(b"before"));
    s.agent_lost(0, "cut");
    submit(&mut s, reassigned(1, 2, 0));
    tasks_sent(&mut s, 1);
    s.agent_back(0, &ToAgent::Stop).unwrap();
    from_agent(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 2 });
    let seed = |seed| (Kind::Seed, 0, Bytes::from_static(seed));
    let chunk = Bytes::from_static(b"what lasted").into();
    s.restore(0, vec![(RESTORE, 0, vec![chunk])]);
    assert_eq!(sent(&mut s, 0).last(), Some(&seed(b"before")));
    let left = Frame::new(Kind::Seed, REASSIGNED, 0, 2, Bytes::from_static(b"after"));
    s.on_frame(1, left).unwrap();
    answer(&mut s, 1, 2, None);
    assert_eq!(sent(&mut s, 0), [seed(b"after")]);
    // Nor has that become the other's.
    assert!(sent(&mut s, 1).is_empty());
}

/// The worker of this host cannot be restored now; its agent tries it again.
fn cannot_be_restored(scheduler: &mut Scheduler, agent: usize) {
    let setback = Setback {
        count: 3,
        restoring: true,
        stalled: 0,
        pause: 1_000,
    };
    let failure = WorkerFailure {
        setback,
        ..WorkerFailure::default()
    };
    let lost = ToHead::WorkerFailed {
        worker: 0,
        failure,
        replaced: false,
    };
    from_agent(scheduler, agent, &lost);
}

#[test]
fn a_worker_that_is_tried_again_fails_its_tasks_and_comes_back_with_its_random_numbers() {
    let mut s = up(2);
    submit(&mut s, order(0, 1));
    tasks_sent(&mut s, 0);
    answer(&mut s, 0, 1, Some(b"before"));
    submit(&mut s, order(0, 2));
    s.take_notes();
    cannot_be_restored(&mut s, 0);
    let notes = s.take_notes();
    assert!(matches!(notes[0], Note::Terminated { rank: 0, .. }));
    assert!(matches!(
        notes[1],
        Note::Done {
            task: 2,
            outcome: Outcome::Lost(_),
            ..
        }
    ));
    assert_eq!(s.state(0), State::Lost);
    assert!(s.any_left() && !s.has_lost(0));
    // Another one goes on with its random numbers.
    submit(&mut s, reassigned(1, 3, 0));
    tasks_sent(&mut s, 1);
    let left = Frame::new(Kind::Seed, REASSIGNED, 0, 3, Bytes::from_static(b"after"));
    s.on_frame(1, left).unwrap();
    answer(&mut s, 1, 3, None);
    sent(&mut s, 0);
    from_agent(&mut s, 0, &ToHead::WorkerReplaced { worker: 0, pid: 9 });
    let back = |note: &Note| *note == Note::Back { rank: 0, pid: 9 };
    assert!(s.take_notes().iter().any(back));
    assert_eq!(s.state(0), State::Idle);
    let seed = (Kind::Seed, 0, Bytes::from_static(b"after"));
    assert_eq!(sent(&mut s, 0), [seed]);
    submit(&mut s, order(0, 4));
    assert_eq!(tasks_sent(&mut s, 0), [4]);
}

#[test]
fn a_worker_that_is_tried_again_is_so_with_its_host_and_not_when_it_is_stopped() {
    let mut s = up(2);
    for agent in 0..2 {
        cannot_be_restored(&mut s, agent);
    }
    assert!(s.any_left());
    s.agent_lost(0, "cut");
    assert!(s.has_lost(0));
    s.agent_back(0, &ToAgent::Stop).unwrap();
    from_agent(&mut s, 0, &ToHead::WorkerUp { worker: 0, pid: 2 });
    assert!(s.is_up(0));
    // Half of what its host has is no state to go on with.
    s.take_notes();
    cannot_be_restored(&mut s, 0);
    let permanent = |note: &Note| match note {
        Note::Terminated { termination, .. } => !termination.is_tried_again(),
        _ => false,
    };
    assert!(s.take_notes().iter().any(permanent));
    s.stop_worker(1);
    assert_eq!(s.state(1), State::Stopped);
    assert!(!s.any_left());
    from_agent(&mut s, 1, &ToHead::WorkerReplaced { worker: 0, pid: 3 });
    assert_eq!(s.state(1), State::Stopped);
}

fn prefetch(rank: Rank, task: TaskId) -> Order {
    Order {
        prefetch: true,
        ..order(rank, task)
    }
}

/// The agent has dropped a task that had not started.
fn dropped(scheduler: &mut Scheduler, task: TaskId) -> Result<(), ProtocolError> {
    let dropped = Frame::new(Kind::Data, LAST | ABORT, 0, task, Bytes::new());
    scheduler.on_frame(0, dropped)
}

/// Tasks that have ended since the last call, and how.
fn ends(scheduler: &mut Scheduler) -> Vec<(TaskId, &'static str)> {
    let ends = scheduler.take_notes().into_iter();
    let ends = ends.filter_map(|note| match note {
        Note::Done { task, outcome, .. } => Some((task, outcome)),
        _ => None,
    });
    let name = |outcome| match outcome {
        Outcome::Answer(_) => "answer",
        Outcome::Lost(_) => "lost",
        Outcome::TimedOut => "timed out",
        Outcome::Cancelled => "cancelled",
        Outcome::Revoked => "revoked",
    };
    ends.map(|(task, outcome)| (task, name(outcome))).collect()
}

/// The control messages to the first agent.
fn control_messages(scheduler: &mut Scheduler) -> Vec<ToAgent> {
    let frames = std::iter::from_fn(|| scheduler.next_frame(0));
    let control = frames.filter(|frame| frame.header.kind == Kind::Control);
    control
        .map(|frame| control::decode(&frame.body).unwrap())
        .collect()
}

/// One worker that is at task 1, while task 2 waits at its agent.
fn one_prefetched() -> Scheduler {
    let mut s = up(1);
    submit(&mut s, order(0, 1));
    submit(&mut s, prefetch(0, 2));
    submit(&mut s, prefetch(0, 3));
    assert_eq!(tasks_sent(&mut s, 0), [1, 2]);
    s
}

#[test]
fn one_task_is_prefetched_and_then_the_next() {
    let mut s = one_prefetched();
    answer(&mut s, 0, 1, None);
    assert_eq!(tasks_sent(&mut s, 0), [3]);
    answer(&mut s, 0, 2, None);
    answer(&mut s, 0, 3, None);
    assert_eq!(ends(&mut s), [1, 2, 3].map(|task| (task, "answer")));
}

#[test]
fn only_tasks_marked_for_prefetching_are_prefetched() {
    let setup_messages = Order {
        setup_call: Some(0),
        ..prefetch(0, 2)
    };
    let others = Order {
        on_behalf_of: Some(1),
        ..prefetch(0, 2)
    };
    for second in [order(0, 2), setup_messages, others] {
        let mut s = up(2);
        submit(&mut s, order(0, 1));
        submit(&mut s, second);
        submit(&mut s, prefetch(0, 3));
        assert_eq!(tasks_sent(&mut s, 0), [1]);
        answer(&mut s, 0, 1, None);
        assert_eq!(tasks_sent(&mut s, 0), [2, 3]);
    }
}

#[test]
fn a_task_that_waited_at_the_agent_is_not_lost_with_its_worker() {
    let mut s = one_prefetched();
    replace(&mut s, 0);
    assert_eq!(ends(&mut s), [(1, "lost")]);
    assert_eq!(tasks_sent(&mut s, 0), []);
    submit(&mut s, again(0, 1));
    assert_eq!(tasks_sent(&mut s, 0), [1, 2]);
    answer(&mut s, 0, 1, None);
    replace(&mut s, 0);
    // It had started.
    assert_eq!(ends(&mut s), [(1, "answer"), (2, "lost")]);
    s.abandon_task(0, 2);
    assert_eq!(tasks_sent(&mut s, 0), [3]);
    lose(&mut s, 0, false);
    assert_eq!(ends(&mut s), [(3, "lost")]);
}

#[test]
fn with_a_worker_that_is_terminated_both_are_lost() {
    let mut s = one_prefetched();
    s.stop_worker(0);
    assert_eq!(ends(&mut s), [1, 2, 3].map(|task| (task, "lost")));
    assert_eq!(dropped(&mut s, 2), Ok(()));
}

#[test]
fn a_task_that_waited_is_sent_again_after_a_kill_and_what_was_in_flight_is_not_meant() {
    let mut s = one_prefetched();
    s.cancel_task(0, 1);
    from_agent(&mut s, 0, &ToHead::WorkerReplaced { worker: 0, pid: 2 });
    let first: Vec<Frame> = std::iter::from_fn(|| s.next_frame(0)).collect();
    let ack = control::encode(&ToAgent::LossAck { worker: 0 }).unwrap();
    assert_eq!(first[1], ack);
    let tasks = first[2..].iter().map(|frame| frame.header.task);
    assert_eq!(tasks.collect::<Vec<_>>(), [2, 3]);
    assert_eq!(ends(&mut s), [(1, "cancelled")]);
}

#[test]
fn cancelling_both_tasks_frees_the_worker_once_the_agent_has_confirmed_each() {
    for crossed in [false, true] {
        let mut s = one_prefetched();
        s.cancel_job(1);
        let all = [1, 2, 3].map(|task| (task, "cancelled"));
        assert_eq!(ends(&mut s), all);
        // The task that has not started is cancelled first.
        let cancels = [2, 1].map(|task| ToAgent::Cancel { worker: 0, task });
        assert_eq!(control_messages(&mut s), cancels);
        submit(&mut s, prefetch(0, 4));
        if crossed {
            answer(&mut s, 0, 1, None);
            assert_eq!(tasks_sent(&mut s, 0), []);
            answer(&mut s, 0, 2, None);
        } else {
            assert_eq!(dropped(&mut s, 2), Ok(()));
            assert_eq!(tasks_sent(&mut s, 0), []);
            answer(&mut s, 0, 1, None);
        }
        assert_eq!(tasks_sent(&mut s, 0), [4]);
        assert_eq!(ends(&mut s), []);
    }
}

#[test]
fn a_task_is_revoked_unless_it_has_started() {
    let mut s = one_prefetched();
    s.revoke(0, 1);
    s.revoke(0, 2);
    s.revoke(0, 2);
    assert_eq!(
        control_messages(&mut s),
        [ToAgent::Revoke { worker: 0, task: 2 }]
    );
    assert_eq!(ends(&mut s), []);
    assert_eq!(dropped(&mut s, 2), Ok(()));
    assert_eq!(ends(&mut s), [(2, "revoked")]);
    // The next task is prefetched instead.
    assert_eq!(tasks_sent(&mut s, 0), [3]);
    s.revoke(0, 3);
    answer(&mut s, 0, 1, None);
    answer(&mut s, 0, 3, None);
    assert_eq!(ends(&mut s), [(1, "answer"), (3, "answer")]);
    // It has not been sent, or not wholly.
    submit(&mut s, order(0, 4));
    s.submit(prefetch(0, 5));
    s.append(0, 5, Bytes::from_static(b"part").into(), false);
    submit(&mut s, prefetch(0, 6));
    assert_eq!(tasks_sent(&mut s, 0), [4, 5]);
    s.revoke(0, 6);
    s.revoke(0, 5);
    assert_eq!(ends(&mut s), [(6, "revoked"), (5, "revoked")]);
    let abort = Frame::new(Kind::Data, LAST | ABORT, 0, 5, Bytes::new());
    assert_eq!(s.next_frame(0), Some(abort));
    // The worker is lost before the agent could answer.
    submit(&mut s, prefetch(0, 7));
    assert_eq!(tasks_sent(&mut s, 0), [7]);
    s.revoke(0, 7);
    replace(&mut s, 0);
    assert_eq!(ends(&mut s), [(4, "lost"), (7, "revoked")]);
}

#[test]
fn an_agent_that_drops_a_task_without_a_request_is_an_error() {
    assert!(dropped(&mut one_prefetched(), 2).is_err());
    let mut s = one_prefetched();
    s.revoke(0, 2);
    assert!(dropped(&mut s, 1).is_err());
    assert!(dropped(&mut s, 3).is_err());
}

#[test]
fn the_message_of_a_prefetched_task_counts_as_waiting_until_that_has_started() {
    let message = b"message".len();
    let mut s = one_prefetched();
    assert_eq!(s.take_released(), message);
    replace(&mut s, 0);
    assert_eq!(s.take_released(), 0);
    s.abandon_task(0, 1);
    assert_eq!(tasks_sent(&mut s, 0), [2, 3]);
    assert_eq!(s.take_released(), message);
    s.cancel_task(0, 3);
    assert_eq!(s.take_released(), message);
    assert_eq!(dropped(&mut s, 3), Ok(()));
    s.submit(prefetch(0, 4));
    s.append(0, 4, Bytes::from_static(b"message").into(), false);
    assert_eq!(tasks_sent(&mut s, 0), [4]);
    assert_eq!(s.take_released(), 0);
    answer(&mut s, 0, 2, None);
    assert_eq!(s.take_released(), message);
}

/// A call for any of these workers.
fn call(scheduler: &mut Scheduler, task: TaskId, any_of: &[Rank], again: bool) {
    scheduler.submit(Order {
        task,
        job: CALLS,
        again,
        any_of: Some(any_of.into()),
        ..Order::default()
    });
    scheduler.append_call(task, Bytes::from_static(b"message").into(), true);
}

#[test]
fn calls_go_to_free_workers_in_their_order() {
    let mut scheduler = up(2);
    for task in 1..=4 {
        call(&mut scheduler, task, &[0, 1], false);
    }
    call(&mut scheduler, 5, &[1], false);
    let mut first = tasks_sent(&mut scheduler, 0);
    first.extend(tasks_sent(&mut scheduler, 1));
    first.sort_unstable();
    assert_eq!(first, [1, 2]);
    assert_eq!(scheduler.call_location(3), CallLocation::Waiting);
    let CallLocation::With(rank) = scheduler.call_location(1) else {
        panic!("no worker has call 1");
    };
    answer(&mut scheduler, rank as usize, 1, None);
    assert_eq!(tasks_sent(&mut scheduler, rank as usize), [3]);
    assert_eq!(scheduler.call_location(1), CallLocation::Nowhere);
    // A task of the worker's own goes before calls that wait.
    submit(&mut scheduler, order(rank, 9));
    answer(&mut scheduler, rank as usize, 3, None);
    assert_eq!(tasks_sent(&mut scheduler, rank as usize), [9]);
    assert_eq!(scheduler.take_released(), b"message".len());
}

#[test]
fn a_verbs_workers_are_given_no_calls_but_one_that_is_waited_for() {
    let mut scheduler = up(1);
    scheduler.reserve_for_verb(0);
    call(&mut scheduler, 1, &[0], false);
    call(&mut scheduler, 2, &[0], false);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    scheduler.await_call(Some(2));
    assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
    scheduler.await_call(None);
    answer(&mut scheduler, 0, 2, None);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    scheduler.verb_over();
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
}

#[test]
fn a_call_that_r_waits_for_passes_tasks_that_wait_for_a_retry_decision() {
    let mut scheduler = up(1);
    submit(&mut scheduler, order(0, 1));
    submit(&mut scheduler, order(0, 2));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    replace(&mut scheduler, 0);
    assert_eq!(ends(&mut scheduler), [(1, "lost")]);
    call(&mut scheduler, 3, &[0], false);
    call(&mut scheduler, 4, &[0], false);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    scheduler.await_call(Some(4));
    assert_eq!(tasks_sent(&mut scheduler, 0), [4]);
    scheduler.await_call(None);
    answer(&mut scheduler, 0, 4, None);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    submit(&mut scheduler, again(0, 1));
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    answer(&mut scheduler, 0, 1, None);
    assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
}

#[test]
fn a_lost_call_holds_up_nobody_and_goes_first_when_it_is_tried_again() {
    let mut scheduler = up(1);
    for task in 1..=3 {
        call(&mut scheduler, task, &[0], false);
    }
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    replace(&mut scheduler, 0);
    assert_eq!(ends(&mut scheduler), [(1, "lost")]);
    assert_eq!(tasks_sent(&mut scheduler, 0), [2]);
    call(&mut scheduler, 1, &[0], true);
    answer(&mut scheduler, 0, 2, None);
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    // All tasks end with the last worker of the host.
    ends(&mut scheduler);
    lose(&mut scheduler, 0, false);
    assert_eq!(ends(&mut scheduler), [(1, "lost"), (3, "lost")]);
    call(&mut scheduler, 4, &[0], false);
    assert_eq!(ends(&mut scheduler), [(4, "lost")]);
}

#[test]
fn a_call_can_be_cancelled_wherever_it_is() {
    let mut scheduler = up(1);
    for task in 1..=3 {
        call(&mut scheduler, task, &[0], false);
    }
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
    scheduler.cancel_call(2);
    scheduler.cancel_call(1);
    assert_eq!(scheduler.call_location(1), CallLocation::Nowhere);
    let given_up = Frame::new(Kind::Data, LAST | ABORT, 0, 1, Bytes::new());
    scheduler.on_frame(0, given_up).unwrap();
    assert_eq!(tasks_sent(&mut scheduler, 0), [3]);
}

#[test]
fn a_worker_that_is_back_takes_no_calls_before_it_is_what_it_was() {
    let mut scheduler = up(2);
    scheduler.agent_lost(0, "gone");
    scheduler.agent_back(0, &ToAgent::Alive).unwrap();
    from_agent(&mut scheduler, 0, &ToHead::WorkerUp { worker: 0, pid: 3 });
    call(&mut scheduler, 1, &[0], false);
    assert_eq!(tasks_sent(&mut scheduler, 0), []);
    scheduler.restored(0);
    assert_eq!(tasks_sent(&mut scheduler, 0), [1]);
}

#[test]
fn workers_that_are_added_get_the_next_ranks_and_tasks_once_they_have_joined() {
    let mut s = up(2);
    submit(&mut s, order(0, 1));
    s.add_agent();
    assert_eq!(s.add_workers(2, 2), [2, 3]);
    s.await_agent(2);
    assert_eq!((s.state(2), s.state(3)), (State::Waiting, State::Waiting));
    s.take_notes();
    s.agent_back(2, &ToAgent::Alive).unwrap();
    for worker in 0..2 {
        from_agent(&mut s, 2, &ToHead::WorkerUp { worker, pid: 7 });
    }
    let up = |note: &Note| matches!(note, Note::Up { rank: 2 | 3, .. });
    assert_eq!(s.take_notes().iter().filter(|note| up(note)).count(), 2);
    s.restore(2, vec![]);
    s.restored(2);
    // The others have what they had.
    assert_eq!((s.state(0), s.state(2)), (State::Busy(1), State::Idle));
    submit(&mut s, order(2, 2));
    assert_eq!(tasks_sent(&mut s, 2), [2]);
    answer(&mut s, 2, 2, None);
    let done = |note: &Note| {
        matches!(
            note,
            Note::Done {
                rank: 2,
                task: 2,
                ..
            }
        )
    };
    assert!(s.take_notes().iter().any(done));
    // A frame of a worker that the agent does not have.
    let frame = control::encode(&ToHead::WorkerUp { worker: 2, pid: 7 }).unwrap();
    assert!(s.on_frame(2, frame).is_err());
}

#[test]
fn a_host_that_is_left_out_twice_is_still_told_to_stop() {
    let mut s = up(2);
    s.leave_out(0, "first".into());
    s.leave_out(0, "second".into());
    let stop = control::encode(&ToAgent::Stop).unwrap();
    assert_eq!(s.next_frame(0), Some(stop));
    assert_eq!(s.next_frame(0), None);
}

#[test]
fn the_end_of_no_job_does_not_end_the_calls_that_restore_a_worker() {
    let mut s = up(1);
    s.restore(0, vec![(RESTORE, 0, Vec::new())]);
    sent(&mut s, 0);
    s.take_notes();
    s.cancel_job(0);
    assert!(s.take_notes().is_empty());
    answer(&mut s, 0, RESTORE, None);
    assert!(matches!(
        s.take_notes()[..],
        [Note::Done {
            outcome: Outcome::Answer(_),
            ..
        }]
    ));
}

#[test]
fn a_late_setup_call_leaves_the_random_numbers_of_a_reassigned_task_or_its_own() {
    for left in [None, Some(&b"of the call"[..])] {
        let mut s = up(2);
        submit(&mut s, reassigned(1, 1, 0));
        sent(&mut s, 1);
        s.restore_more(0, vec![(RESTORE, 0, Vec::new())]);
        sent(&mut s, 0);
        let seed = Frame::new(Kind::Seed, REASSIGNED, 0, 1, Bytes::from_static(b"moved"));
        s.on_frame(1, seed).unwrap();
        answer(&mut s, 1, 1, None);
        assert_eq!(sent(&mut s, 0), []);
        answer(&mut s, 0, RESTORE, left);
        let expected = left.unwrap_or(b"moved");
        assert_eq!(s.seed(0).unwrap(), expected);
        let moved = (Kind::Seed, 0, Bytes::from_static(b"moved"));
        assert_eq!(
            sent(&mut s, 0),
            if left.is_none() { vec![moved] } else { vec![] }
        );
    }
}
