use super::*;
use crate::agent::action::Act;
use crate::protocol::send_queue::OutBuf;

fn bytes(frames: &[Frame]) -> BytesMut {
    let mut out = OutBuf::default();
    frames.iter().for_each(|frame| out.push(frame));
    let mut bytes = BytesMut::new();
    while !out.is_empty() {
        let wrote: Result<usize, ()> = out.write_with(|slices| {
            slices
                .iter()
                .for_each(|slice| bytes.extend_from_slice(slice));
            Ok(slices.iter().map(|slice| slice.len()).sum())
        });
        wrote.unwrap();
    }
    bytes
}

fn from_head(router: &mut Router, frame: Frame) -> Vec<Act> {
    let mut acts = Vec::new();
    let now = Duration::ZERO;
    router
        .from_head(&mut bytes(&[frame]), now, &mut acts)
        .unwrap();
    acts
}

fn from_worker(router: &mut Router, frames: &[Frame]) -> Vec<Act> {
    let mut acts = Vec::new();
    let now = Duration::ZERO;
    router
        .from_worker(0, &mut bytes(frames), now, &mut acts)
        .unwrap();
    acts
}

fn ready() -> Frame {
    let tempdir = String::new();
    let ready = true;
    control::encode(&WorkerReady { tempdir, ready }).unwrap()
}

fn data(task: u64, body: &'static [u8]) -> Frame {
    Frame::new(Kind::Data, FIRST | LAST, 0, task, Bytes::from_static(body))
}

fn seed(flags: u8, task: u64, body: &'static [u8]) -> Frame {
    Frame::new(Kind::Seed, flags, 0, task, Bytes::from_static(body))
}

/// One worker that is ready.
fn up() -> Router {
    let mut router = Router::new(1, 0, 1 << 20);
    router.made(0, false, Duration::ZERO);
    let acts = from_worker(&mut router, &[ready()]);
    assert!(matches!(
        acts[..],
        [
            Act::TempDir(..),
            Act::Up {
                replaces: false,
                ..
            }
        ]
    ));
    router
}

fn to_head(acts: &[Act]) -> Vec<&Frame> {
    let frames = acts.iter().filter_map(|act| match act {
        Act::ToHead(frame) => Some(frame),
        _ => None,
    });
    frames.collect()
}

#[test]
fn a_seed_that_is_too_long_for_the_head_is_reported_as_none() {
    let mut router = up();
    from_head(&mut router, data(1, b"task"));
    let long = seed(0, 1, &[7; SEED_TO_HEAD + 1]);
    let acts = from_worker(&mut router, &[long, data(1, b"answer")]);
    let frames = to_head(&acts);
    assert_eq!(*frames[0], seed(0, 1, b""));
    assert_eq!(*frames[1], data(1, b"answer"));
    let restore = router.setup_log.restore(0);
    assert_eq!(restore.seed.unwrap(), [7; SEED_TO_HEAD + 1][..]);
}

#[test]
fn the_seed_after_a_restoring_call_is_kept_unless_the_head_sets_another() {
    let mut router = up();
    from_head(&mut router, data(RESTORE, b"first"));
    let acts = from_worker(
        &mut router,
        &[seed(0, RESTORE, b"left"), data(RESTORE, b"done")],
    );
    assert_eq!(*to_head(&acts)[0], seed(0, RESTORE, b"left"));
    assert_eq!(router.setup_log.restore(0).seed.unwrap(), "left");
    // The head sets it before the worker has ended the call.
    let next = RESTORE | 1;
    from_head(&mut router, data(next, b"second"));
    from_head(&mut router, seed(0, 0, b"set"));
    let acts = from_worker(&mut router, &[seed(0, next, b"left"), data(next, b"done")]);
    assert_eq!(to_head(&acts), [&data(next, b"done")]);
    assert_eq!(router.setup_log.restore(0).seed.unwrap(), "set");
    // Or in between.
    let last = RESTORE | 2;
    from_head(&mut router, data(last, b"third"));
    from_worker(&mut router, &[seed(0, last, b"left")]);
    from_head(&mut router, seed(0, 0, b"set again"));
    from_worker(&mut router, &[data(last, b"done")]);
    assert_eq!(router.setup_log.restore(0).seed.unwrap(), "set again");
}

#[test]
fn a_seed_that_crosses_the_failure_of_its_worker_is_that_of_the_replacement() {
    for is_ready in [false, true] {
        let mut router = up();
        router.exited(0, true, Duration::ZERO);
        router.made(0, true, Duration::ZERO);
        if is_ready {
            from_worker(&mut router, &[ready()]);
            let acts = from_head(&mut router, seed(0, 0, b"seed"));
            assert_eq!(to_worker(&acts), [&seed(0, 0, b"seed")]);
        } else {
            assert!(from_head(&mut router, seed(0, 0, b"seed")).is_empty());
            let acts = from_worker(&mut router, &[ready()]);
            assert_eq!(to_worker(&acts), [&seed(0, 0, b"seed")]);
        }
        // The state of a reassigned task goes down with that task.
        assert!(from_head(&mut router, seed(REASSIGNED, 2, b"other")).is_empty());
        assert_eq!(router.setup_log.restore(0).seed.unwrap(), "seed");
    }
}

#[test]
fn a_fresh_worker_is_restored_before_the_head_hears_of_it() {
    let mut router = up();
    let name = Bytes::copy_from_slice(&3u64.to_le_bytes());
    from_head(&mut router, Frame::new(Kind::State, 0, 0, 1, name));
    from_head(&mut router, data(1, b"export"));
    from_worker(&mut router, &[seed(0, 1, b"seed"), data(1, b"done")]);
    from_head(&mut router, data(2, b"task"));
    let reassigned = seed(REASSIGNED, 2, b"reassigned");
    from_worker(&mut router, &[reassigned]);
    let ending = router.exited(0, true, Duration::ZERO);
    assert!(matches!(ending, Ending::Lost { replaced: true, .. }));
    router.made(0, true, Duration::ZERO);
    let acts = from_worker(&mut router, &[ready()]);
    let [Act::TempDir(..), Act::ToWorker(again), Act::ToWorker(seeds)] = &acts[..] else {
        panic!("{acts:?}");
    };
    assert_eq!(*again, data(REPLAY, b"export"));
    assert_eq!(*seeds, seed(0, 0, b"seed"));
    // The answers to repeated calls are not reported, because the head has got them before.
    let done = [seed(0, REPLAY, b"other"), data(REPLAY, b"done")];
    let acts = from_worker(&mut router, &done);
    assert!(
        matches!(
            acts[..],
            [Act::Up {
                worker: 0,
                replaces: true
            }]
        ),
        "{acts:?}"
    );
    // Frames that were meant for the predecessor are dropped.
    assert!(from_head(&mut router, data(3, b"task")).is_empty());
    let acknowledged = control::encode(&ToAgent::LossAck { worker: 0 }).unwrap();
    from_head(&mut router, acknowledged);
    assert_eq!(from_head(&mut router, data(2, b"task")).len(), 1);
}

fn control(router: &mut Router, message: &ToAgent) -> Vec<Act> {
    from_head(router, control::encode(message).unwrap())
}

fn to_worker(acts: &[Act]) -> Vec<&Frame> {
    let frames = acts.iter().filter_map(|act| match act {
        Act::ToWorker(frame) => Some(frame),
        _ => None,
    });
    frames.collect()
}

fn dropped(task: u64) -> Frame {
    Frame::new(Kind::Data, LAST | ABORT, 0, task, Bytes::new())
}

#[test]
fn a_prefetched_task_waits_for_the_end_of_the_one_before() {
    let mut router = up();
    from_head(&mut router, data(1, b"task"));
    let reassigned = seed(REASSIGNED, 2, b"reassigned");
    let name = Bytes::copy_from_slice(&3u64.to_le_bytes());
    let state = Frame::new(Kind::State, 0, 0, 2, name);
    for frame in [reassigned.clone(), state, data(2, b"next")] {
        assert!(from_head(&mut router, frame).is_empty());
    }
    assert_eq!(router.worker_table.task(0), Some(1));
    let part = Frame::new(Kind::Data, FIRST, 0, 1, Bytes::from_static(b"part"));
    assert!(to_worker(&from_worker(&mut router, &[part])).is_empty());
    let rest = Frame::new(Kind::Data, LAST, 0, 1, Bytes::from_static(b"rest"));
    let acts = from_worker(&mut router, std::slice::from_ref(&rest));
    assert_eq!(to_head(&acts), [&rest]);
    assert_eq!(to_worker(&acts), [&reassigned, &data(2, b"next")]);
    assert_eq!(router.worker_table.task(0), Some(2));
    // The set-up call is the second task.
    from_worker(&mut router, &[data(2, b"done")]);
    let again = router.setup_log.restore(0).messages;
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].pieces, [&b"next"[..]]);
}

#[test]
fn a_prefetched_task_is_dropped_unless_it_has_started() {
    let cancel = |task| ToAgent::Cancel { worker: 0, task };
    let revoke = |task| ToAgent::Revoke { worker: 0, task };
    for message in [cancel(2), revoke(2)] {
        let mut router = up();
        from_head(&mut router, data(1, b"task"));
        from_head(&mut router, data(2, b"next"));
        let acts = control(&mut router, &message);
        assert!(matches!(&acts[..], [Act::ToHead(frame)] if *frame == dropped(2)));
        assert!(control(&mut router, &message).is_empty());
        let acts = from_worker(&mut router, &[data(1, b"answer")]);
        assert!(to_worker(&acts).is_empty());
        assert_eq!(router.worker_table.task(0), None);
    }
    let mut router = up();
    from_head(&mut router, data(1, b"task"));
    from_head(&mut router, data(2, b"next"));
    from_worker(&mut router, &[data(1, b"answer")]);
    assert!(control(&mut router, &revoke(2)).is_empty());
    let acts = control(&mut router, &cancel(2));
    assert!(matches!(acts[0], Act::Interrupt { worker: 0, task: 2 }));
    // An abort ends a message that has arrived incompletely.
    let part = |task| Frame::new(Kind::Data, FIRST, 0, task, Bytes::from_static(b"part"));
    from_head(&mut router, part(3));
    assert!(control(&mut router, &revoke(3)).is_empty());
    assert!(from_head(&mut router, dropped(3)).is_empty());
    from_head(&mut router, part(4));
    let acts = from_worker(&mut router, &[data(2, b"answer")]);
    assert_eq!(to_worker(&acts), [&part(4)]);
    let acts = from_head(&mut router, dropped(4));
    assert_eq!(to_worker(&acts), [&dropped(4)]);
}

#[test]
fn a_prefetched_task_goes_down_with_its_worker_and_comes_again() {
    for cancelled in [false, true] {
        let mut router = up();
        from_head(&mut router, data(1, b"task"));
        from_head(&mut router, data(2, b"next"));
        if cancelled {
            control(&mut router, &ToAgent::Cancel { worker: 0, task: 1 });
        }
        let ending = router.exited(0, true, Duration::ZERO);
        assert_eq!(ending == Ending::Replace, cancelled);
        assert_eq!(router.prefetched(0), 0);
        router.made(0, true, Duration::ZERO);
        assert!(to_worker(&from_worker(&mut router, &[ready()])).is_empty());
        // Another that was on its way.
        assert!(from_head(&mut router, data(3, b"late")).is_empty());
        control(&mut router, &ToAgent::LossAck { worker: 0 });
        let acts = from_head(&mut router, data(2, b"next"));
        assert_eq!(to_worker(&acts), [&data(2, b"next")]);
    }
}

#[test]
fn a_prefetched_task_has_its_time_from_when_it_starts() {
    let ms = Duration::from_millis;
    let mut router = up();
    from_head(&mut router, Frame::limit(0, 1, ms(5)));
    from_head(&mut router, data(1, b"task"));
    from_head(&mut router, Frame::limit(0, 2, ms(10)));
    from_head(&mut router, data(2, b"next"));
    assert_eq!(router.worker_table.next_deadline(), Some(ms(5)));
    let mut acts = Vec::new();
    let mut answer = bytes(&[data(1, b"answer")]);
    router
        .from_worker(0, &mut answer, ms(7), &mut acts)
        .unwrap();
    assert_eq!(router.worker_table.next_deadline(), Some(ms(17)));
}

#[test]
fn a_limit_that_no_head_sends_is_an_error() {
    let short = Frame::new(Kind::Limit, 0, 0, 1, Bytes::from_static(b"1234567"));
    let busy = Frame::limit(0, 1, Duration::ZERO);
    for (started, frame) in [(false, short.clone()), (true, short), (true, busy)] {
        let mut router = up();
        if started {
            from_head(&mut router, data(1, b"task"));
        }
        let mut received = bytes(&[frame]);
        let result = router.from_head(&mut received, Duration::ZERO, &mut Vec::new());
        assert!(result.is_err());
    }
}

fn blob(flags: u8, id: u64, len: usize) -> Frame {
    Frame::new(Kind::Blob, flags, 0, id, vec![9; len].into())
}

#[test]
fn a_blob_of_a_setup_call_restores_a_worker_though_the_head_has_forgotten_it() {
    let mut router = up();
    let stored = from_head(&mut router, blob(FIRST, 5, frame::MAX_BODY));
    assert!(stored.is_empty());
    let stored = from_head(&mut router, blob(LAST, 5, 9));
    assert!(matches!(
        stored[..],
        [Act::Store { .. }, Act::Store { last: true, .. }]
    ));
    let name = Bytes::copy_from_slice(&3u64.to_le_bytes());
    from_head(&mut router, Frame::new(Kind::State, 0, 0, 1, name.clone()));
    let acts = from_head(&mut router, Frame::blob_reference(0, 1, 5, true));
    let [Act::Hand { .. }, Act::ToWorker(task)] = &acts[..] else {
        panic!("{acts:?}");
    };
    assert_eq!(*task, Frame::blob_reference(0, 1, 5, true));
    from_worker(&mut router, &[data(1, b"done")]);
    let acts = from_head(&mut router, blob(LAST | ABORT, 5, 0));
    assert!(matches!(acts[..], [Act::ToWorker(_)]), "{acts:?}");
    router.exited(0, true, Duration::ZERO);
    router.made(0, true, Duration::ZERO);
    let acts = from_worker(&mut router, &[ready()]);
    let [
        Act::TempDir(..),
        Act::Hand { .. },
        Act::ToWorker(again),
        Act::ToWorker(taken_back),
    ] = &acts[..]
    else {
        panic!("{acts:?}");
    };
    assert_eq!(*again, Frame::blob_reference(0, REPLAY, 5, true));
    assert_eq!(*taken_back, blob(LAST | ABORT, 5, 0));
    from_worker(&mut router, &[data(REPLAY, b"done")]);
    // The variable is set again, to another value.
    let acknowledged = control::encode(&ToAgent::LossAck { worker: 0 }).unwrap();
    from_head(&mut router, acknowledged);
    from_head(&mut router, Frame::new(Kind::State, 0, 0, 2, name));
    from_head(&mut router, data(2, b"other"));
    let acts = from_worker(&mut router, &[data(2, b"done")]);
    assert!(matches!(acts[..], [Act::Discard(5), Act::ToHead(_)]));
}

#[test]
fn a_message_that_begins_as_none_of_the_heads_does_is_an_error() {
    let number = Bytes::copy_from_slice(&5u64.to_le_bytes());
    let beginning = |flags, body| Frame::new(Kind::Data, flags | BY_REFERENCE, 0, 1, body);
    let cases = [
        // There is no such blob.
        Frame::blob_reference(0, 1, 6, true),
        beginning(LAST, number.clone()),
        beginning(FIRST | ABORT, number.clone()),
        beginning(FIRST | SAME, number.clone()),
        beginning(FIRST | CACHE, number.clone()),
        beginning(FIRST, number.slice(1..)),
        beginning(FIRST, Bytes::new()),
        Frame::blob_reference(1, 1, 5, true),
    ];
    for frame in cases {
        let mut router = up();
        from_head(&mut router, blob(FIRST | LAST, 5, 9));
        let mut received = bytes(std::slice::from_ref(&frame));
        let result = router.from_head(&mut received, Duration::ZERO, &mut Vec::new());
        assert!(result.is_err(), "{frame:?}");
    }
}

fn memory(task: u64, len: u64) -> Frame {
    let body = Bytes::copy_from_slice(&len.to_le_bytes());
    Frame::new(Kind::Data, FIRST | LAST | BY_REFERENCE, 0, task, body)
}

#[test]
fn an_answer_in_shared_memory_is_announced_and_comes_when_it_is_asked_for() {
    let mut router = up();
    router.worker_table.shared_answers = true;
    from_head(&mut router, data(1, b"task"));
    let mut received = bytes(&[memory(1, 1 << 40)]);
    let mut acts = Vec::new();
    let read = |router: &mut Router, received: &mut BytesMut, acts: &mut Vec<Act>| {
        router
            .from_worker(0, received, Duration::ZERO, acts)
            .unwrap();
    };
    read(&mut router, &mut received, &mut acts);
    read(&mut router, &mut received, &mut acts);
    assert_eq!(to_head(&acts).len(), 1);
    let announced = to_head(&acts)[0].clone();
    assert_eq!(announced.header.flags, FIRST | BY_REFERENCE);
    assert_eq!(announced.number(), Some(1 << 40));
    assert_eq!(router.worker_table.task(0), Some(1));
    acts.clear();
    let asked = from_head(&mut router, Frame::credit(0, 1, 9));
    assert!(matches!(asked[..], [Act::ReadAgain(0)]));
    read(&mut router, &mut received, &mut acts);
    let [Act::Along(frame)] = &acts[..] else {
        panic!("{acts:?}");
    };
    assert_eq!(frame.header.flags, LAST | BY_REFERENCE);
    assert_eq!(router.worker_table.task(0), None);
    // The next answer is announced as well; it is dropped once the task is cancelled.
    from_head(&mut router, data(2, b"task"));
    let mut received = bytes(&[memory(2, 5)]);
    acts.clear();
    read(&mut router, &mut received, &mut acts);
    assert_eq!(to_head(&acts).len(), 1);
    control(&mut router, &ToAgent::Cancel { worker: 0, task: 2 });
    acts.clear();
    read(&mut router, &mut received, &mut acts);
    assert!(matches!(&acts[..], [Act::LetGo(0), Act::ToHead(frame)] if *frame == dropped(2)));
}

#[test]
fn memory_that_nobody_asked_for_is_an_error() {
    let short = Frame::new(
        Kind::Data,
        FIRST | LAST | BY_REFERENCE,
        0,
        1,
        Bytes::from_static(b"1"),
    );
    let mut part = memory(1, 5);
    part.header.flags = FIRST | BY_REFERENCE;
    for (shared_answers, frame) in [(false, memory(1, 5)), (true, short), (true, part)] {
        let mut router = up();
        router.worker_table.shared_answers = shared_answers;
        from_head(&mut router, data(1, b"task"));
        let mut received = bytes(&[frame]);
        let result = router.from_worker(0, &mut received, Duration::ZERO, &mut Vec::new());
        assert!(result.is_err());
    }
}

#[test]
fn a_task_that_has_begun_is_ended_without_its_head() {
    let mut router = up();
    from_head(&mut router, data(1, b"task"));
    // The next task is prefetched, and is dropped with its head.
    assert!(from_head(&mut router, data(2, b"next")).is_empty());
    let mut acts = Vec::new();
    router.detach(Duration::ZERO, &mut acts).unwrap();
    assert!(matches!(acts[..], [Act::ReadAgain(0)]));
    // A long answer needs no credit.
    let long = Bytes::from(vec![7; frame::MAX_BODY]);
    let first = Frame::new(Kind::Data, FIRST, 0, 1, long.clone());
    let more = Frame::new(Kind::Data, 0, 0, 1, long);
    let mut frames = vec![first];
    frames.resize(20, more);
    let acts = from_worker(&mut router, &frames);
    assert!(acts.len() == 20 && acts.iter().all(|act| matches!(act, Act::Keep(_))));
    // Another head comes before the end. It is told that the worker is up once the task has ended.
    assert_eq!(router.attach(0, &[0]), [Kept::Busy]);
    assert!(router.is_unknown_to_head(0));
    let last = Frame::new(Kind::Data, LAST, 0, 1, Bytes::new());
    let acts = from_worker(&mut router, &[last]);
    assert!(matches!(
        acts[..],
        [Act::Keep(_), Act::Up { worker: 0, .. }]
    ));
    assert!(!router.introduce(0, false) && !router.is_unknown_to_head(0));
    assert!(router.introduce(0, true));
    let acts = from_head(&mut router, data(1 << 36, b"task"));
    assert!(matches!(&acts[..], [Act::ToWorker(frame)] if frame.header.task == 1 << 36));
    let acts = from_worker(&mut router, &[data(1 << 36, b"answer")]);
    assert!(matches!(acts[..], [Act::ToHead(_)]));
}

#[test]
fn a_task_that_has_arrived_in_part_is_dropped_with_its_head() {
    let mut router = up();
    let part = Frame::new(Kind::Data, FIRST, 0, 1, Bytes::from_static(b"part"));
    from_head(&mut router, part);
    let mut acts = Vec::new();
    router.detach(Duration::ZERO, &mut acts).unwrap();
    let is_abort = |frame: &Frame| frame.header.flags == LAST | ABORT && frame.header.task == 1;
    assert!(matches!(&acts[..], [Act::ToWorker(frame)] if is_abort(frame)));
    assert_eq!(router.attach(0, &[0]), [Kept::Idle]);
    assert!(!router.is_unknown_to_head(0));
}

#[test]
fn set_up_calls_survive_their_head_and_can_be_listed() {
    let mut router = up();
    let name = |name: u64| Bytes::copy_from_slice(&name.to_le_bytes());
    for (task, called) in [(1, 7), (2, 0)] {
        let state = Frame::new(Kind::State, 0, 0, task, name(called));
        from_head(&mut router, state);
        from_head(&mut router, data(task, b"call"));
        from_worker(&mut router, &[data(task, b"done")]);
    }
    router.detach(Duration::ZERO, &mut Vec::new()).unwrap();
    assert_eq!(router.attach(0, &[0]), [Kept::Idle]);
    let acts = from_head(&mut router, control::encode(&ToAgent::SetupLog).unwrap());
    let [
        Act::Report(ToHead::SetupCalls {
            complete: true,
            calls,
            last: true,
            ..
        }),
    ] = &acts[..]
    else {
        panic!("{acts:?}");
    };
    let names: Vec<u64> = calls.iter().map(|&(name, _)| name).collect();
    assert_eq!(names, [7, 0]);
    let ask = |digest| ToAgent::SetupCall {
        worker: 0,
        digest,
        request: 5,
    };
    let acts = from_head(&mut router, control::encode(&ask(calls[0].1)).unwrap());
    let [Act::SendCall { request: 5, call }] = &acts[..] else {
        panic!("{acts:?}");
    };
    assert_eq!(call.as_ref().unwrap().pieces, [&b"call"[..]]);
    let acts = from_head(&mut router, control::encode(&ask(1)).unwrap());
    assert!(matches!(acts[..], [Act::SendCall { call: None, .. }]));
}

#[test]
fn what_comes_before_a_message_is_dropped_with_its_head() {
    let mut router = up();
    let name = Bytes::copy_from_slice(&7u64.to_le_bytes());
    let seed = Frame::new(Kind::Seed, REASSIGNED, 0, 1, Bytes::from_static(b"seed"));
    from_head(&mut router, seed);
    from_head(&mut router, Frame::new(Kind::State, 0, 0, 1, name));
    let mut acts = Vec::new();
    router.detach(Duration::ZERO, &mut acts).unwrap();
    // The worker forgets the seed.
    let is_abort = |frame: &Frame| frame.header.flags == LAST | ABORT;
    assert!(matches!(&acts[..], [Act::ToWorker(frame)] if is_abort(frame)));
    router.attach(0, &[0]);
    // The first task of the next head is no set-up call.
    from_head(&mut router, data(1 << 36, b"task"));
    from_worker(&mut router, &[data(1 << 36, b"answer")]);
    let acts = from_head(&mut router, control::encode(&ToAgent::SetupLog).unwrap());
    assert!(
        matches!(&acts[..], [Act::Report(ToHead::SetupCalls { calls, .. })] if calls.is_empty())
    );
    // Nothing is left that another head would have to drop.
    let mut acts = Vec::new();
    router.detach(Duration::ZERO, &mut acts).unwrap();
    assert!(acts.is_empty());
}

#[test]
fn workers_that_were_not_restored_are_stopped_with_their_head() {
    let mut router = up();
    let control = |message| control::encode(&message).unwrap();
    from_head(&mut router, control(ToAgent::Restores));
    assert!(!router.is_of_use());
    from_head(&mut router, data(RESTORE | 1, b"call"));
    let mut acts = Vec::new();
    router.detach(Duration::ZERO, &mut acts).unwrap();
    assert!(matches!(
        acts[..],
        [
            Act::Interrupt { worker: 0, .. },
            Act::Close(0),
            Act::ReadAgain(0)
        ]
    ));
    assert_eq!(router.attach(0, &[0]), [Kept::Stopped]);

    let mut router = up();
    from_head(&mut router, control(ToAgent::Restores));
    from_head(&mut router, control(ToAgent::Restored { worker: 0 }));
    assert!(router.is_of_use());
    router.detach(Duration::ZERO, &mut Vec::new()).unwrap();
    assert_eq!(router.attach(0, &[0]), [Kept::Idle]);
}

#[test]
fn a_worker_that_a_head_knows_is_replaced_and_not_introduced_again() {
    let mut router = up();
    from_head(&mut router, data(1, b"task"));
    router.detach(Duration::ZERO, &mut Vec::new()).unwrap();
    assert_eq!(router.attach(0, &[0]), [Kept::Busy]);
    from_worker(&mut router, &[data(1, b"answer")]);
    assert!(!router.introduce(0, false));
    // It does not heed an interrupt, and is killed.
    from_head(&mut router, data(1 << 36, b"task"));
    let task = 1 << 36;
    let cancel = ToAgent::Cancel { worker: 0, task };
    from_head(&mut router, control::encode(&cancel).unwrap());
    assert_eq!(router.exited(0, true, Duration::ZERO), Ending::Replace);
    assert!(router.introduce(0, true));
}

#[test]
fn a_call_has_the_same_digest_with_and_without_a_blob() {
    let mut router = up();
    let name = Bytes::copy_from_slice(&0u64.to_le_bytes());
    let blob = Frame::new(Kind::Blob, FIRST | LAST, 0, 5, Bytes::from_static(b"same "));
    from_head(&mut router, blob);
    for (task, begins) in [(1, true), (2, false)] {
        from_head(
            &mut router,
            Frame::new(Kind::State, 0, 0, task, name.clone()),
        );
        if begins {
            from_head(&mut router, Frame::blob_reference(0, task, 5, false));
            let rest = Frame::new(Kind::Data, LAST, 0, task, Bytes::from_static(b"call"));
            from_head(&mut router, rest);
        } else {
            from_head(&mut router, data(task, b"same call"));
        }
        from_worker(&mut router, &[data(task, b"done")]);
    }
    let acts = from_head(&mut router, control::encode(&ToAgent::SetupLog).unwrap());
    let [Act::Report(ToHead::SetupCalls { calls, .. })] = &acts[..] else {
        panic!("{acts:?}");
    };
    assert!(calls.len() == 2 && calls[0] == calls[1], "{calls:?}");
}

#[test]
fn errors_are_reported_for_the_task_that_runs() {
    let mut router = up();
    let raised = |task, text: &'static str| {
        Frame::new(
            Kind::TaskError,
            0,
            0,
            task,
            Bytes::from_static(text.as_bytes()),
        )
    };
    assert!(from_worker(&mut router, &[raised(5, "no task")]).is_empty());
    from_head(&mut router, data(5, b"task"));
    let acts = from_worker(&mut router, &[raised(4, "other"), raised(5, "no")]);
    let [
        Act::Report(ToHead::TaskFailed {
            worker: 0,
            task: 5,
            text,
            ..
        }),
    ] = &acts[..]
    else {
        panic!("{acts:?}");
    };
    assert_eq!(text, "no");
    // The error ends no task.
    let acts = from_worker(&mut router, &[data(5, b"answer")]);
    assert!(acts.iter().any(|act| matches!(act, Act::ToHead(_))));
}
