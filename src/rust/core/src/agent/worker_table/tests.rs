use super::restart::{FIRST_PAUSE, LONGEST_PAUSE, SETBACKS};
use super::*;
use crate::protocol::frame::Kind;

const MS: Duration = Duration::from_millis(1);

fn data(task: u64, flags: u8, len: usize) -> Header {
    Header {
        kind: Kind::Data,
        flags,
        worker: 0,
        task,
        len: len as u32,
    }
}

/// One that had been ready is lost.
fn lost(replaced: bool) -> Ending {
    let setback = Setback::default();
    Ending::Lost { replaced, setback }
}

fn busy() -> WorkerTable {
    let mut worker_table = WorkerTable::new(1);
    assert_eq!(worker_table.ready(0, [].into(), MS), Ready::Up);
    assert_eq!(
        worker_table.to_worker(&data(1, FIRST | LAST, 9), MS),
        Ok(Route::Forward)
    );
    worker_table
}

#[test]
fn a_small_answer_passes_and_a_large_one_waits_for_the_head() {
    let mut worker_table = busy();
    assert_eq!(
        worker_table.from_worker(&data(1, FIRST, RESULT_WINDOW), MS),
        Ok(Route::Forward)
    );
    assert_eq!(
        worker_table.from_worker(&data(1, 0, 1), MS),
        Ok(Route::Hold)
    );
    assert_eq!(worker_table.credit(0, 1, 1), Ok(true));
    assert_eq!(
        worker_table.from_worker(&data(1, 0, 2), MS),
        Ok(Route::Hold)
    );
    assert_eq!(
        worker_table.from_worker(&data(1, LAST, 1), MS),
        Ok(Route::Forward)
    );
    assert_eq!(worker_table.credit(0, 1, 1), Ok(false));
    assert!(worker_table.from_worker(&data(1, LAST, 1), MS).is_err());
}

#[test]
fn an_answer_before_its_task_is_whole_or_with_flags_of_others_is_the_workers_fault() {
    let mut worker_table = WorkerTable::new(1);
    worker_table.ready(0, [].into(), MS);
    assert_eq!(
        worker_table.to_worker(&data(1, FIRST, 5), MS),
        Ok(Route::Forward)
    );
    assert!(
        worker_table
            .from_worker(&data(1, FIRST | LAST, 1), MS)
            .is_err()
    );
    assert_eq!(
        worker_table.to_worker(&data(1, LAST, 5), MS),
        Ok(Route::Forward)
    );
    assert!(worker_table.to_worker(&data(1, LAST, 5), MS).is_err());
    assert!(
        worker_table
            .from_worker(&data(1, LAST | ABORT, 0), MS)
            .is_err()
    );
    assert_eq!(
        worker_table.from_worker(&data(1, FIRST | LAST, 1), MS),
        Ok(Route::Forward)
    );
}

#[test]
fn a_cancelled_answer_is_dropped_completely_and_its_end_is_reported() {
    let mut worker_table = busy();
    assert_eq!(worker_table.cancel(0, 2, MS), Ok(false));
    assert_eq!(worker_table.cancel(0, 1, MS), Ok(true));
    assert_eq!(worker_table.cancel(0, 1, MS), Ok(false));
    assert_eq!(
        worker_table.from_worker(&data(1, FIRST, 2 * RESULT_WINDOW), MS),
        Ok(Route::Drop)
    );
    assert_eq!(
        worker_table.from_worker(&data(1, LAST, 1), MS),
        Ok(Route::Ended)
    );
    assert_eq!(worker_table.cancel(0, 1, MS), Ok(false));
    assert_eq!(worker_table.next_deadline(), None);
    assert_eq!(worker_table.exited(0, true, MS), lost(true));
}

#[test]
fn a_worker_that_does_not_heed_an_interrupt_is_overdue_at_its_deadline() {
    let mut worker_table = busy();
    assert_eq!(worker_table.cancel(0, 1, MS), Ok(true));
    assert_eq!(worker_table.next_deadline(), Some(MS + INTERRUPT_GRACE));
    assert!(worker_table.overdue(INTERRUPT_GRACE).is_empty());
    assert_eq!(worker_table.overdue(MS + INTERRUPT_GRACE), [0]);
    assert!(worker_table.overdue(2 * MS + INTERRUPT_GRACE).is_empty());
    assert_eq!(worker_table.exited(0, true, MS), Ending::Replace);
    assert_eq!(worker_table.ready(0, [].into(), MS), Ready::Up);
    assert_eq!(worker_table.task(0), None);
}

#[test]
fn a_stopping_worker_gets_no_more_tasks() {
    let mut worker_table = busy();
    assert_eq!(worker_table.stop(0, MS), Some(true));
    assert_eq!(worker_table.stop(0, 9 * MS), Some(true));
    assert_eq!(worker_table.next_deadline(), Some(MS + STOP_GRACE));
    assert_eq!(
        worker_table.to_worker(&data(2, FIRST, 1), MS),
        Ok(Route::Drop)
    );
    let timed_out = false;
    assert_eq!(
        worker_table.exited(0, true, MS),
        Ending::Stopped { timed_out }
    );
    assert!(worker_table.all_terminated());
    assert_eq!(worker_table.stop(0, MS), None);
}

#[test]
fn an_idle_worker_has_its_time_to_end_while_the_head_is_there() {
    let idle = || {
        let mut worker_table = WorkerTable::new(2);
        worker_table.stop_timeout = Duration::from_secs(5);
        worker_table.ready(0, [].into(), MS);
        assert_eq!(worker_table.stop(0, MS), Some(false));
        // The other worker is starting.
        assert_eq!(worker_table.stop(1, MS), Some(false));
        assert_eq!(worker_table.overdue(MS + STOP_GRACE), [1]);
        let timed_out = false;
        assert_eq!(
            worker_table.exited(1, true, MS),
            Ending::Stopped { timed_out }
        );
        worker_table
    };
    let mut worker_table = idle();
    assert!(worker_table.overdue(Duration::from_secs(5)).is_empty());
    assert_eq!(worker_table.overdue(MS + Duration::from_secs(5)), [0]);
    let timed_out = true;
    assert_eq!(
        worker_table.exited(0, true, MS),
        Ending::Stopped { timed_out }
    );
    let mut worker_table = idle();
    worker_table.hurry(9 * MS);
    assert_eq!(worker_table.next_end(), Some(9 * MS + STOP_GRACE));
    assert_eq!(worker_table.overdue(9 * MS + STOP_GRACE), [0]);
    let timed_out = false;
    assert_eq!(
        worker_table.exited(0, true, MS),
        Ending::Stopped { timed_out }
    );
}

#[test]
fn an_aborted_message_leaves_the_worker_idle() {
    let mut worker_table = WorkerTable::new(1);
    worker_table.ready(0, [].into(), MS);
    assert_eq!(
        worker_table.to_worker(&data(1, FIRST, 5), MS),
        Ok(Route::Forward)
    );
    assert_eq!(
        worker_table.to_worker(&data(1, LAST | ABORT, 0), MS),
        Ok(Route::Forward)
    );
    assert_eq!(
        worker_table.to_worker(&data(2, FIRST | LAST, 5), MS),
        Ok(Route::Forward)
    );
    assert!(
        worker_table
            .to_worker(&data(3, FIRST | LAST, 5), MS)
            .is_err()
    );
}

#[test]
fn credit_goes_back_once_half_the_window_has_passed() {
    let mut worker_table = busy();
    assert_eq!(worker_table.passed(0, SEND_WINDOW / 2 - 1), None);
    assert_eq!(
        worker_table.passed(0, 1),
        Some((1, (SEND_WINDOW / 2) as u32))
    );
    assert_eq!(worker_table.passed(0, 1), None);
}

#[test]
fn frames_of_the_agent_itself_grant_no_credit_to_the_head() {
    let mut worker_table = busy();
    worker_table.gave(0, SEND_WINDOW);
    assert_eq!(worker_table.passed(0, SEND_WINDOW), None);
    assert_eq!(worker_table.given(0), 0);
    assert_eq!(worker_table.passed(0, SEND_WINDOW / 2 - 1), None);
    worker_table.gave(0, 10);
    assert_eq!(
        worker_table.passed(0, 11),
        Some((1, (SEND_WINDOW / 2) as u32))
    );
    worker_table.gave(0, 10);
    worker_table.exited(0, true, MS);
    assert_eq!(worker_table.given(0), 0);
}

#[test]
fn a_task_that_is_out_of_time_is_interrupted_and_then_its_worker_is_overdue() {
    let mut worker_table = WorkerTable::new(1);
    worker_table.ready(0, [].into(), MS);
    worker_table.limit(0, 1, 10 * MS).unwrap();
    assert_eq!(
        worker_table.to_worker(&data(1, FIRST, 9), MS),
        Ok(Route::Forward)
    );
    // The time counts from when the worker has all of the message.
    assert_eq!(worker_table.next_deadline(), None);
    assert_eq!(
        worker_table.to_worker(&data(1, LAST, 9), 5 * MS),
        Ok(Route::Forward)
    );
    assert_eq!(worker_table.next_deadline(), Some(15 * MS));
    assert!(worker_table.out_of_time(14 * MS).is_empty());
    assert!(worker_table.overdue(15 * MS).is_empty());
    assert_eq!(worker_table.out_of_time(15 * MS), [(0, 1)]);
    assert!(worker_table.out_of_time(16 * MS).is_empty());
    let end = 15 * MS + INTERRUPT_GRACE;
    assert_eq!(worker_table.next_deadline(), Some(end));
    assert!(worker_table.overdue(end - MS).is_empty());
    assert_eq!(worker_table.overdue(end), [0]);
    assert_eq!(worker_table.exited(0, true, MS), Ending::Replace);
}

#[test]
fn a_task_that_has_started_to_answer_does_not_time_out() {
    let mut worker_table = WorkerTable::new(1);
    worker_table.ready(0, [].into(), MS);
    worker_table.limit(0, 1, 10 * MS).unwrap();
    let whole = data(1, FIRST | LAST, 9);
    assert_eq!(worker_table.to_worker(&whole, MS), Ok(Route::Forward));
    assert_eq!(
        worker_table.from_worker(&data(1, FIRST, RESULT_WINDOW), MS),
        Ok(Route::Forward)
    );
    assert_eq!(
        worker_table.from_worker(&data(1, LAST, 1), MS),
        Ok(Route::Hold)
    );
    assert_eq!(worker_table.next_deadline(), None);
    assert!(worker_table.out_of_time(20 * MS).is_empty());
}

#[test]
fn a_failed_worker_is_replaced_and_restored_before_it_is_reported() {
    let mut worker_table = busy();
    assert_eq!(worker_table.exited(0, true, MS), lost(true));
    // Frames that were in flight to the failed worker are dropped.
    assert_eq!(
        worker_table.to_worker(&data(1, LAST, 9), MS),
        Ok(Route::Drop)
    );
    assert_eq!(
        worker_table.to_worker(&data(2, FIRST, 9), MS),
        Ok(Route::Drop)
    );
    assert_eq!(worker_table.ready(0, [MS; 2].into(), MS), Ready::Restoring);
    assert_eq!(worker_table.passed(0, SEND_WINDOW), None);
    let again = |n| data(REPLAY + n, FIRST | LAST, 3);
    assert_eq!(worker_table.from_worker(&again(0), MS), Ok(Route::Drop));
    assert_eq!(worker_table.from_worker(&again(1), MS), Ok(Route::Restored));
    assert_eq!(
        worker_table.to_worker(&data(2, FIRST, 9), MS),
        Ok(Route::Drop)
    );
    assert_eq!(worker_table.loss_acknowledged(0), Ok(()));
    assert_eq!(
        worker_table.to_worker(&data(1, FIRST | LAST, 9), MS),
        Ok(Route::Forward)
    );
}

/// The end of a worker that had not been ready, as reported to the head.
fn setback(count: u32, restoring: bool, stalled: Duration, pause: Duration) -> Ending {
    let setback = Setback {
        count,
        restoring,
        stalled: stalled.as_millis() as u64,
        pause: pause.as_millis() as u64,
    };
    Ending::Lost {
        replaced: false,
        setback,
    }
}

#[test]
fn a_worker_that_does_not_come_up_again_is_made_after_growing_pauses() {
    let mut worker_table = busy();
    assert_eq!(worker_table.exited(0, true, MS), lost(true));
    for _ in 1..SETBACKS {
        assert_eq!(worker_table.exited(0, true, MS), Ending::Replace);
    }
    let failed = setback(SETBACKS, false, Duration::ZERO, FIRST_PAUSE);
    assert_eq!(worker_table.exited(0, true, MS), failed);
    let (mut now, mut pause) = (MS, FIRST_PAUSE);
    for _ in 0..9 {
        assert_eq!(worker_table.next_restart(), Some(now + pause));
        assert!(worker_table.to_restart(now + pause - MS).is_empty());
        // Meanwhile nothing is meant for it.
        assert_eq!(
            worker_table.to_worker(&data(7, FIRST, 1), now),
            Ok(Route::Drop)
        );
        now += pause;
        assert_eq!(worker_table.to_restart(now), [0]);
        assert!(worker_table.to_restart(now + pause).is_empty());
        worker_table.made(0, now);
        // The failure is reported to the head once.
        assert_eq!(worker_table.exited(0, true, now), Ending::Waits);
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
    assert_eq!(pause, LONGEST_PAUSE);
    now += pause;
    worker_table.to_restart(now);
    assert_eq!(worker_table.ready(0, [MS].into(), now), Ready::Restoring);
    let again = data(REPLAY, FIRST | LAST, 3);
    assert_eq!(worker_table.from_worker(&again, now), Ok(Route::Restored));
    assert_eq!(worker_table.next_restart(), None);
    // All starts anew.
    (0..2).for_each(|_| worker_table.loss_acknowledged(0).unwrap());
    let task = data(8, FIRST | LAST, 3);
    assert_eq!(worker_table.to_worker(&task, now), Ok(Route::Forward));
    assert_eq!(worker_table.exited(0, true, now), lost(true));
    (1..SETBACKS).for_each(|_| assert_eq!(worker_table.exited(0, true, now), Ending::Replace));
    assert_eq!(
        worker_table.exited(0, true, now),
        setback(SETBACKS, false, Duration::ZERO, FIRST_PAUSE)
    );
    // The worker is not started again when the head stops it, nor when the cluster ends.
    assert_eq!(worker_table.stop(0, now), None);
    assert!(worker_table.all_terminated() && worker_table.next_restart().is_none());
    // Nor is a worker started again that never came up, or whose state is not known.
    let mut worker_table = WorkerTable::new(1);
    let failed = setback(1, false, Duration::ZERO, Duration::ZERO);
    assert_eq!(worker_table.exited(0, true, MS), failed);
    assert_eq!(worker_table.next_restart(), None);
    assert_eq!(busy().exited(0, false, MS), lost(false));
}

#[test]
fn a_worker_that_makes_no_progress_while_it_is_restored_is_killed() {
    const RESTORE_TIMEOUT: Duration = Duration::from_secs(5);
    let mut worker_table = WorkerTable::new(1);
    worker_table.restore_timeout = Some(RESTORE_TIMEOUT);
    // The first start is for the head to bound.
    worker_table.made(0, MS);
    assert!(
        worker_table.next_deadline().is_none()
            && worker_table.stalled(9 * RESTORE_TIMEOUT).is_empty()
    );
    worker_table.ready(0, [].into(), MS);
    worker_table.exited(0, true, MS);
    worker_table.made(0, MS);
    assert_eq!(worker_table.next_deadline(), Some(MS + RESTORE_TIMEOUT));
    assert!(worker_table.stalled(RESTORE_TIMEOUT).is_empty());
    assert_eq!(worker_table.stalled(MS + RESTORE_TIMEOUT), [0]);
    assert!(worker_table.stalled(2 * RESTORE_TIMEOUT).is_empty());
    let failed = setback(1, false, RESTORE_TIMEOUT, FIRST_PAUSE);
    assert_eq!(worker_table.exited(0, true, MS), failed);
    // The second of the repeated calls took long at first.
    worker_table.to_restart(RESTORE_TIMEOUT);
    worker_table.made(0, RESTORE_TIMEOUT);
    let mut now = 2 * RESTORE_TIMEOUT - MS;
    assert_eq!(
        worker_table.ready(0, [MS, RESTORE_TIMEOUT].into(), now),
        Ready::Restoring
    );
    now += RESTORE_TIMEOUT + MS;
    assert!(worker_table.stalled(now).is_empty());
    let first = data(REPLAY, FIRST | LAST, 3);
    assert_eq!(worker_table.from_worker(&first, now), Ok(Route::Drop));
    assert_eq!(
        worker_table.next_deadline(),
        Some(now + 3 * RESTORE_TIMEOUT)
    );
    // Part of an answer is progress.
    now += 3 * RESTORE_TIMEOUT - MS;
    let part = data(REPLAY + 1, FIRST, 3);
    assert_eq!(worker_table.from_worker(&part, now), Ok(Route::Drop));
    now += 3 * RESTORE_TIMEOUT;
    assert_eq!(worker_table.stalled(now), [0]);
    assert_eq!(worker_table.exited(0, true, now), Ending::Waits);
    assert!(worker_table.next_restart() > Some(now + FIRST_PAUSE));
}

#[test]
fn how_long_a_task_took_does_not_include_waiting_for_the_head() {
    let mut worker_table = busy();
    let mut answer = data(1, FIRST, RESULT_WINDOW);
    assert_eq!(
        worker_table.from_worker(&answer, 5 * MS),
        Ok(Route::Forward)
    );
    answer = data(1, LAST, 1);
    assert_eq!(worker_table.from_worker(&answer, 90 * MS), Ok(Route::Hold));
    assert_eq!(worker_table.task_duration(0), 4 * MS);
}

#[test]
fn a_failure_that_the_head_learns_of_with_a_pause_is_acknowledged_once() {
    let mut worker_table = busy();
    let now = Duration::ZERO;
    assert!(worker_table.cancel(0, 1, now).unwrap());
    // It is killed because it does not heed the interrupt, and those that follow do not come up.
    (0..SETBACKS).for_each(|_| assert_eq!(worker_table.exited(0, true, now), Ending::Replace));
    let failed = setback(SETBACKS, false, Duration::ZERO, FIRST_PAUSE);
    assert_eq!(worker_table.exited(0, true, now), failed);
    worker_table.loss_acknowledged(0).unwrap();
    assert_eq!(worker_table.to_restart(FIRST_PAUSE), [0]);
    worker_table.ready(0, VecDeque::new(), now);
    assert!(worker_table.is_meant(0).unwrap());
}

#[test]
fn what_a_worker_that_is_being_restored_has_not_read_takes_no_credit() {
    let mut worker_table = busy();
    let now = Duration::ZERO;
    worker_table.exited(0, true, now);
    worker_table.ready(0, [Duration::ZERO].into(), now);
    assert_eq!(worker_table.attach(0, SEND_WINDOW), Kept::Starting);
    assert_eq!(worker_table.given(0), 0);
}
