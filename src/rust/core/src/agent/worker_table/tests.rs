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

fn busy() -> Book {
    let mut book = Book::new(1);
    assert_eq!(book.ready(0, [].into(), MS), Ready::Up);
    assert_eq!(
        book.to_worker(&data(1, FIRST | LAST, 9), MS),
        Ok(Route::Forward)
    );
    book
}

#[test]
fn a_small_answer_passes_and_a_large_one_waits_for_the_head() {
    let mut book = busy();
    assert_eq!(
        book.from_worker(&data(1, FIRST, RESULT_WINDOW), MS),
        Ok(Route::Forward)
    );
    assert_eq!(book.from_worker(&data(1, 0, 1), MS), Ok(Route::Hold));
    assert_eq!(book.credit(0, 1, 1), Ok(true));
    assert_eq!(book.from_worker(&data(1, 0, 2), MS), Ok(Route::Hold));
    assert_eq!(book.from_worker(&data(1, LAST, 1), MS), Ok(Route::Forward));
    assert_eq!(book.credit(0, 1, 1), Ok(false));
    assert!(book.from_worker(&data(1, LAST, 1), MS).is_err());
}

#[test]
fn an_answer_before_its_task_is_whole_or_with_flags_of_others_is_the_workers_fault() {
    let mut book = Book::new(1);
    book.ready(0, [].into(), MS);
    assert_eq!(book.to_worker(&data(1, FIRST, 5), MS), Ok(Route::Forward));
    assert!(book.from_worker(&data(1, FIRST | LAST, 1), MS).is_err());
    assert_eq!(book.to_worker(&data(1, LAST, 5), MS), Ok(Route::Forward));
    assert!(book.to_worker(&data(1, LAST, 5), MS).is_err());
    assert!(book.from_worker(&data(1, LAST | ABORT, 0), MS).is_err());
    assert_eq!(
        book.from_worker(&data(1, FIRST | LAST, 1), MS),
        Ok(Route::Forward)
    );
}

#[test]
fn a_cancelled_answer_is_dropped_whole_and_its_end_is_told() {
    let mut book = busy();
    assert_eq!(book.cancel(0, 2, MS), Ok(false));
    assert_eq!(book.cancel(0, 1, MS), Ok(true));
    assert_eq!(book.cancel(0, 1, MS), Ok(false));
    assert_eq!(
        book.from_worker(&data(1, FIRST, 2 * RESULT_WINDOW), MS),
        Ok(Route::Drop)
    );
    assert_eq!(book.from_worker(&data(1, LAST, 1), MS), Ok(Route::Ended));
    assert_eq!(book.cancel(0, 1, MS), Ok(false));
    assert_eq!(book.next_deadline(), None);
    assert_eq!(book.exited(0, true, MS), lost(true));
}

#[test]
fn a_worker_that_does_not_heed_an_interrupt_is_overdue_at_its_deadline() {
    let mut book = busy();
    assert_eq!(book.cancel(0, 1, MS), Ok(true));
    assert_eq!(book.next_deadline(), Some(MS + INTERRUPT_GRACE));
    assert!(book.overdue(INTERRUPT_GRACE).is_empty());
    assert_eq!(book.overdue(MS + INTERRUPT_GRACE), [0]);
    assert!(book.overdue(2 * MS + INTERRUPT_GRACE).is_empty());
    assert_eq!(book.exited(0, true, MS), Ending::Replace);
    assert_eq!(book.ready(0, [].into(), MS), Ready::Up);
    assert_eq!(book.task(0), None);
}

#[test]
fn a_stopping_worker_gets_no_more_tasks() {
    let mut book = busy();
    assert_eq!(book.stop(0, MS), Some(true));
    assert_eq!(book.stop(0, 9 * MS), Some(true));
    assert_eq!(book.next_deadline(), Some(MS + STOP_GRACE));
    assert_eq!(book.to_worker(&data(2, FIRST, 1), MS), Ok(Route::Drop));
    let timed_out = false;
    assert_eq!(book.exited(0, true, MS), Ending::Stopped { timed_out });
    assert!(book.all_gone());
    assert_eq!(book.stop(0, MS), None);
}

#[test]
fn an_idle_worker_has_its_time_to_end_while_the_head_is_there() {
    let idle = || {
        let mut book = Book::new(2);
        book.stop_timeout = Duration::from_secs(5);
        book.ready(0, [].into(), MS);
        assert_eq!(book.stop(0, MS), Some(false));
        // The other worker is starting.
        assert_eq!(book.stop(1, MS), Some(false));
        assert_eq!(book.overdue(MS + STOP_GRACE), [1]);
        let timed_out = false;
        assert_eq!(book.exited(1, true, MS), Ending::Stopped { timed_out });
        book
    };
    let mut book = idle();
    assert!(book.overdue(Duration::from_secs(5)).is_empty());
    assert_eq!(book.overdue(MS + Duration::from_secs(5)), [0]);
    let timed_out = true;
    assert_eq!(book.exited(0, true, MS), Ending::Stopped { timed_out });
    let mut book = idle();
    book.hurry(9 * MS);
    assert_eq!(book.next_end(), Some(9 * MS + STOP_GRACE));
    assert_eq!(book.overdue(9 * MS + STOP_GRACE), [0]);
    let timed_out = false;
    assert_eq!(book.exited(0, true, MS), Ending::Stopped { timed_out });
}

#[test]
fn an_aborted_message_leaves_the_worker_idle() {
    let mut book = Book::new(1);
    book.ready(0, [].into(), MS);
    assert_eq!(book.to_worker(&data(1, FIRST, 5), MS), Ok(Route::Forward));
    assert_eq!(
        book.to_worker(&data(1, LAST | ABORT, 0), MS),
        Ok(Route::Forward)
    );
    assert_eq!(
        book.to_worker(&data(2, FIRST | LAST, 5), MS),
        Ok(Route::Forward)
    );
    assert!(book.to_worker(&data(3, FIRST | LAST, 5), MS).is_err());
}

#[test]
fn credit_goes_back_once_half_the_window_has_passed() {
    let mut book = busy();
    assert_eq!(book.passed(0, SEND_WINDOW / 2 - 1), None);
    assert_eq!(book.passed(0, 1), Some((1, (SEND_WINDOW / 2) as u32)));
    assert_eq!(book.passed(0, 1), None);
}

#[test]
fn what_the_agent_gives_a_worker_is_no_credit_for_the_head() {
    let mut book = busy();
    book.gave(0, SEND_WINDOW);
    assert_eq!(book.passed(0, SEND_WINDOW), None);
    assert_eq!(book.given(0), 0);
    assert_eq!(book.passed(0, SEND_WINDOW / 2 - 1), None);
    book.gave(0, 10);
    assert_eq!(book.passed(0, 11), Some((1, (SEND_WINDOW / 2) as u32)));
    book.gave(0, 10);
    book.exited(0, true, MS);
    assert_eq!(book.given(0), 0);
}

#[test]
fn a_task_that_is_out_of_time_is_interrupted_and_then_its_worker_is_overdue() {
    let mut book = Book::new(1);
    book.ready(0, [].into(), MS);
    book.limit(0, 1, 10 * MS).unwrap();
    assert_eq!(book.to_worker(&data(1, FIRST, 9), MS), Ok(Route::Forward));
    // The time counts from when the worker has all of the message.
    assert_eq!(book.next_deadline(), None);
    assert_eq!(
        book.to_worker(&data(1, LAST, 9), 5 * MS),
        Ok(Route::Forward)
    );
    assert_eq!(book.next_deadline(), Some(15 * MS));
    assert!(book.out_of_time(14 * MS).is_empty());
    assert!(book.overdue(15 * MS).is_empty());
    assert_eq!(book.out_of_time(15 * MS), [(0, 1)]);
    assert!(book.out_of_time(16 * MS).is_empty());
    let end = 15 * MS + INTERRUPT_GRACE;
    assert_eq!(book.next_deadline(), Some(end));
    assert!(book.overdue(end - MS).is_empty());
    assert_eq!(book.overdue(end), [0]);
    assert_eq!(book.exited(0, true, MS), Ending::Replace);
}

#[test]
fn a_task_that_has_begun_to_answer_is_not_out_of_time() {
    let mut book = Book::new(1);
    book.ready(0, [].into(), MS);
    book.limit(0, 1, 10 * MS).unwrap();
    let whole = data(1, FIRST | LAST, 9);
    assert_eq!(book.to_worker(&whole, MS), Ok(Route::Forward));
    assert_eq!(
        book.from_worker(&data(1, FIRST, RESULT_WINDOW), MS),
        Ok(Route::Forward)
    );
    assert_eq!(book.from_worker(&data(1, LAST, 1), MS), Ok(Route::Hold));
    assert_eq!(book.next_deadline(), None);
    assert!(book.out_of_time(20 * MS).is_empty());
}

#[test]
fn a_lost_worker_is_replaced_and_restored_before_it_is_heard_of() {
    let mut book = busy();
    assert_eq!(book.exited(0, true, MS), lost(true));
    // What was under way to the lost one.
    assert_eq!(book.to_worker(&data(1, LAST, 9), MS), Ok(Route::Drop));
    assert_eq!(book.to_worker(&data(2, FIRST, 9), MS), Ok(Route::Drop));
    assert_eq!(book.ready(0, [MS; 2].into(), MS), Ready::Restoring);
    assert_eq!(book.passed(0, SEND_WINDOW), None);
    let again = |n| data(REPLAY + n, FIRST | LAST, 3);
    assert_eq!(book.from_worker(&again(0), MS), Ok(Route::Drop));
    assert_eq!(book.from_worker(&again(1), MS), Ok(Route::Restored));
    assert_eq!(book.to_worker(&data(2, FIRST, 9), MS), Ok(Route::Drop));
    assert_eq!(book.noted(0), Ok(()));
    assert_eq!(
        book.to_worker(&data(1, FIRST | LAST, 9), MS),
        Ok(Route::Forward)
    );
}

/// The end of one that had not been ready, which the head is told.
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
    let mut book = busy();
    assert_eq!(book.exited(0, true, MS), lost(true));
    for _ in 1..SETBACKS {
        assert_eq!(book.exited(0, true, MS), Ending::Replace);
    }
    let told = setback(SETBACKS, false, Duration::ZERO, FIRST_PAUSE);
    assert_eq!(book.exited(0, true, MS), told);
    let (mut now, mut pause) = (MS, FIRST_PAUSE);
    for _ in 0..9 {
        assert_eq!(book.next_retry(), Some(now + pause));
        assert!(book.to_retry(now + pause - MS).is_empty());
        // Meanwhile nothing is meant for it.
        assert_eq!(book.to_worker(&data(7, FIRST, 1), now), Ok(Route::Drop));
        now += pause;
        assert_eq!(book.to_retry(now), [0]);
        assert!(book.to_retry(now + pause).is_empty());
        book.made(0, now);
        // The head is told once.
        assert_eq!(book.exited(0, true, now), Ending::Waits);
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
    assert_eq!(pause, LONGEST_PAUSE);
    now += pause;
    book.to_retry(now);
    assert_eq!(book.ready(0, [MS].into(), now), Ready::Restoring);
    let again = data(REPLAY, FIRST | LAST, 3);
    assert_eq!(book.from_worker(&again, now), Ok(Route::Restored));
    assert_eq!(book.next_retry(), None);
    // All starts anew.
    (0..2).for_each(|_| book.noted(0).unwrap());
    let task = data(8, FIRST | LAST, 3);
    assert_eq!(book.to_worker(&task, now), Ok(Route::Forward));
    assert_eq!(book.exited(0, true, now), lost(true));
    (1..SETBACKS).for_each(|_| assert_eq!(book.exited(0, true, now), Ending::Replace));
    assert_eq!(
        book.exited(0, true, now),
        setback(SETBACKS, false, Duration::ZERO, FIRST_PAUSE)
    );
    // It is not made again when the head has it stopped, nor when the cluster ends.
    assert_eq!(book.stop(0, now), None);
    assert!(book.all_gone() && book.next_retry().is_none());
    // Nor is one that was never there, or whose state is not known.
    let mut book = Book::new(1);
    let told = setback(1, false, Duration::ZERO, Duration::ZERO);
    assert_eq!(book.exited(0, true, MS), told);
    assert_eq!(book.next_retry(), None);
    assert_eq!(busy().exited(0, false, MS), lost(false));
}

#[test]
fn a_worker_that_makes_no_progress_while_it_is_restored_is_killed() {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut book = Book::new(1);
    book.patience = Some(PATIENCE);
    // The first start is for the head to bound.
    book.made(0, MS);
    assert!(book.next_deadline().is_none() && book.stalled(9 * PATIENCE).is_empty());
    book.ready(0, [].into(), MS);
    book.exited(0, true, MS);
    book.made(0, MS);
    assert_eq!(book.next_deadline(), Some(MS + PATIENCE));
    assert!(book.stalled(PATIENCE).is_empty());
    assert_eq!(book.stalled(MS + PATIENCE), [0]);
    assert!(book.stalled(2 * PATIENCE).is_empty());
    let told = setback(1, false, PATIENCE, FIRST_PAUSE);
    assert_eq!(book.exited(0, true, MS), told);
    // The second of what is done again took long at first.
    book.to_retry(PATIENCE);
    book.made(0, PATIENCE);
    let mut now = 2 * PATIENCE - MS;
    assert_eq!(book.ready(0, [MS, PATIENCE].into(), now), Ready::Restoring);
    now += PATIENCE + MS;
    assert!(book.stalled(now).is_empty());
    let first = data(REPLAY, FIRST | LAST, 3);
    assert_eq!(book.from_worker(&first, now), Ok(Route::Drop));
    assert_eq!(book.next_deadline(), Some(now + 3 * PATIENCE));
    // Part of an answer is progress.
    now += 3 * PATIENCE - MS;
    let part = data(REPLAY + 1, FIRST, 3);
    assert_eq!(book.from_worker(&part, now), Ok(Route::Drop));
    now += 3 * PATIENCE;
    assert_eq!(book.stalled(now), [0]);
    assert_eq!(book.exited(0, true, now), Ending::Waits);
    assert!(book.next_retry() > Some(now + FIRST_PAUSE));
}

#[test]
fn how_long_a_task_took_does_not_include_waiting_for_the_head() {
    let mut book = busy();
    let mut answer = data(1, FIRST, RESULT_WINDOW);
    assert_eq!(book.from_worker(&answer, 5 * MS), Ok(Route::Forward));
    answer = data(1, LAST, 1);
    assert_eq!(book.from_worker(&answer, 90 * MS), Ok(Route::Hold));
    assert_eq!(book.took(0), 4 * MS);
}
