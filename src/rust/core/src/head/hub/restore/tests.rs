use super::super::{Hub, Plan, Turn};
use super::*;
use crate::head::launch::{Launch, Source};
use crate::protocol::control::{
    self, DrainCause, Hello, Outfile, Start, StartMode, ToHead, WorkerFailure,
};
use crate::protocol::frame::{FIRST, Frame, Kind, LAST};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub fn hello() -> Hello {
    Hello {
        protocol: 0,
        package: String::new(),
        r_version: String::new(),
        platform: String::new(),
        big_endian: false,
        pid: 1,
        hostname: String::new(),
        cores: 1,
        memory_total: 0,
        memory_available: 0,
    }
}

fn plan(workers: u32) -> Plan {
    let start = Start {
        workers,
        ranks: (0..workers).collect(),
        mode: StartMode::Fork,
        packages: Vec::new(),
        outfile: Outfile::Discard,
        renice: 0,
        spawn_command: Vec::new(),
        heartbeat_timeout: 0,
        chunk_cache_bytes: 0,
        state: 0,
        setup: 0,
        memory_limit: 0,
        stop_timeout: 0,
        local: false,
        linger: None,
    };
    let ranks = (0..workers).collect();
    Plan { start, ranks }
}

/// A path for the file of a set-up log, which is unlinked at once.
fn log_path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    std::env::temp_dir().join(format!("restore-{}-{}", name.0, name.1))
}

/// A cluster of one worker, whose host has not joined.
fn late() -> Hub {
    late_host(1)
}

/// A cluster of one host, which has not joined.
fn late_host(workers: u32) -> Hub {
    let mut hub = Hub::by_hand(1, 1 << 20).unwrap();
    hub.set_dials(0);
    hub.keep_setup_log(&log_path(), 1 << 20, Duration::MAX)
        .unwrap();
    hub.go(vec![Some(plan(workers))]).unwrap();
    hub
}

/// A cluster of two hosts, with a worker each, of which both have a task of job 1.
pub fn two_hosts() -> Hub {
    let mut hub = Hub::by_hand(2, 1 << 20).unwrap();
    hub.keep_setup_log(&log_path(), 1 << 20, Duration::MAX)
        .unwrap();
    hub.set_dials(0);
    let mut plans = Vec::new();
    for rank in 0..2 {
        assert!(hub.greet(rank, hello(), false).unwrap());
        let mut plan = plan(1);
        plan.ranks = vec![rank as Rank];
        plan.start.ranks.clone_from(&plan.ranks);
        plans.push(Some(plan));
    }
    hub.go(plans).unwrap();
    for rank in 0..2 {
        let up = control::encode(&ToHead::WorkerUp { worker: 0, pid: 7 }).unwrap();
        hub.on_frame(rank, up, None).unwrap();
        assert_eq!(task(&mut hub, rank as Rank, None), rank as Rank);
    }
    hub
}

/// Submits a task of job 1. Returns the worker to which it is assigned.
pub fn task(hub: &mut Hub, rank: Rank, setup_call: Option<u64>) -> Rank {
    let started = hub.begin(rank, 1, setup_call, Turn::Last, |_| None);
    hub.write(b"task");
    hub.finish();
    started.unwrap().assigned
}

/// The agent of a job greets, and its worker is up.
fn join(hub: &mut Hub, again: bool) {
    assert!(hub.greet(0, hello(), again).unwrap());
    from_agent(hub, &ToHead::WorkerUp { worker: 0, pid: 7 });
}

fn from_agent(hub: &mut Hub, message: &ToHead) {
    let frame = control::encode(message).unwrap();
    hub.on_frame(0, frame, None).unwrap();
}

fn begin(hub: &mut Hub, name: u64, message: &[u8]) -> bool {
    let started = hub.begin(0, 1, Some(name), Turn::Last, |_| None).unwrap();
    hub.write(message);
    started.only_logged
}

/// R makes a set-up call on the worker. Returns whether the call is only logged.
fn set_up(hub: &mut Hub, name: u64, message: &[u8]) -> bool {
    let only_logged = begin(hub, name, message);
    hub.finish();
    only_logged
}

/// The seeds and the messages that the agent is sent. The worker answers the messages, and leaves these seeds.
fn sent(hub: &mut Hub, seed: Option<&'static [u8]>) -> Vec<(TaskId, Vec<u8>)> {
    let mut sent = Vec::new();
    while let Some(frame) = hub.next_frame(0) {
        let task = frame.header.task;
        match frame.header.kind {
            Kind::Data => sent.push((task, frame.body.to_vec())),
            Kind::Seed => sent.push((0, frame.body.to_vec())),
            _ => {}
        }
    }
    for &(task, _) in sent.iter().filter(|(task, _)| *task != 0) {
        if let Some(seed) = seed {
            let body = Bytes::from_static(seed);
            hub.on_frame(0, Frame::new(Kind::Seed, 0, 0, task, body), None)
                .unwrap();
        }
        let answer = Frame::new(Kind::Data, FIRST | LAST, 0, task, Bytes::new());
        hub.on_frame(0, answer, None).unwrap();
    }
    sent
}

fn bodies(sent: Vec<(TaskId, Vec<u8>)>) -> Vec<Vec<u8>> {
    sent.into_iter().map(|(_, body)| body).collect()
}

fn is_back(hub: &Hub) -> bool {
    hub.worker(0).termination.is_none()
}

#[test]
fn a_call_that_is_logged_while_a_worker_is_restored_reaches_it_before_it_joins() {
    let mut hub = late();
    assert!(set_up(&mut hub, 0, b"first"));
    join(&mut hub, false);
    assert!(set_up(&mut hub, 0, b"second"));
    assert_eq!(bodies(sent(&mut hub, None)), [b"first"]);
    assert!(!is_back(&hub));
    assert_eq!(bodies(sent(&mut hub, None)), [b"second"]);
    assert!(is_back(&hub));
    assert!(!set_up(&mut hub, 0, b"third"));
}

#[test]
fn a_call_that_is_begun_before_a_worker_joins_and_ended_after_that_reaches_it() {
    let mut hub = late();
    assert!(begin(&mut hub, 0, b"slow"));
    join(&mut hub, false);
    assert!(is_back(&hub));
    hub.finish();
    assert!(!set_up(&mut hub, 0, b"next"));
    assert_eq!(bodies(sent(&mut hub, None)), [b"slow"]);
    assert_eq!(bodies(sent(&mut hub, None)), [b"next"]);
    assert!(is_back(&hub));
}

#[test]
fn a_call_that_another_supersedes_while_it_restores_a_worker_is_sent_as_it_was() {
    let mut hub = late();
    let (first, second) = ([b'a'; 9000], [b'b'; 9000]);
    assert!(set_up(&mut hub, 3, &first));
    join(&mut hub, false);
    assert!(set_up(&mut hub, 3, &second));
    assert_eq!(bodies(sent(&mut hub, None)), [first]);
    assert_eq!(bodies(sent(&mut hub, None)), [second]);
    assert!(is_back(&hub));
}

#[test]
fn a_call_that_was_only_logged_sets_the_random_numbers_after_those_of_the_worker_before() {
    let mut hub = late();
    join(&mut hub, false);
    set_up(&mut hub, 0, b"call");
    sent(&mut hub, Some(b"its own"));
    assert!(hub.agent_ended(0, "the job has ended"));
    assert!(set_up(&mut hub, 0, b"stream"));
    join(&mut hub, true);
    assert_eq!(
        bodies(sent(&mut hub, Some(b"old"))),
        [&b"call"[..], b"its own"]
    );
    assert_eq!(bodies(sent(&mut hub, Some(b"new stream"))), [b"stream"]);
    assert!(is_back(&hub));
    // The head knows the state that the call has left.
    assert!(hub.agent_ended(0, "the job has ended"));
    join(&mut hub, true);
    assert_eq!(bodies(sent(&mut hub, Some(b"old"))), [b"call"]);
    assert_eq!(
        bodies(sent(&mut hub, Some(b"old"))),
        [&b"stream"[..], b"new stream"]
    );
    assert!(is_back(&hub));
}

#[test]
fn a_call_that_a_worker_has_completed_before_it_was_lost_sets_the_random_numbers_once() {
    let mut hub = late();
    assert!(set_up(&mut hub, 0, b"stream"));
    join(&mut hub, false);
    assert!(set_up(&mut hub, 0, b"second"));
    assert_eq!(bodies(sent(&mut hub, Some(b"new stream"))), [b"stream"]);
    assert!(hub.agent_ended(0, "the job has ended"));
    // Another worker may have continued the stream on its behalf, which must not begin again.
    join(&mut hub, true);
    assert_eq!(
        bodies(sent(&mut hub, Some(b"new stream"))),
        [&b"stream"[..], b"new stream"]
    );
    assert_eq!(bodies(sent(&mut hub, Some(b"next"))), [b"second"]);
    assert!(is_back(&hub));
}

#[test]
fn the_random_numbers_of_a_worker_that_drains_while_it_is_restored_do_not_begin_again() {
    let mut hub = late();
    assert!(set_up(&mut hub, 0, b"stream"));
    join(&mut hub, false);
    let (seconds, cause) = (None, DrainCause::TimeLimit);
    from_agent(&mut hub, &ToHead::Draining { seconds, cause });
    assert_eq!(bodies(sent(&mut hub, Some(b"new stream"))), [b"stream"]);
    assert!(!is_back(&hub));
    assert!(hub.agent_ended(0, "the job has ended"));
    join(&mut hub, true);
    assert_eq!(
        bodies(sent(&mut hub, Some(b"old"))),
        [&b"stream"[..], b"new stream"]
    );
    assert!(is_back(&hub));
}

#[test]
fn a_draining_worker_that_ends_while_it_is_restored_leaves_nothing_for_the_next_one() {
    let mut hub = late();
    assert!(set_up(&mut hub, 0, b"first"));
    join(&mut hub, false);
    assert!(set_up(&mut hub, 0, b"second"));
    let (seconds, cause) = (None, DrainCause::TimeLimit);
    from_agent(&mut hub, &ToHead::Draining { seconds, cause });
    assert_eq!(bodies(sent(&mut hub, None)), [b"first"]);
    assert!(hub.agent_ended(0, "the job has ended"));
    join(&mut hub, true);
    assert!(!is_back(&hub));
    assert_eq!(bodies(sent(&mut hub, None)), [b"first"]);
    assert_eq!(bodies(sent(&mut hub, None)), [b"second"]);
    assert!(is_back(&hub));
}

#[test]
fn a_worker_that_is_replaced_while_it_waits_to_be_restored_joins() {
    let workers = RESTORES_AT_ONCE as u32 + 1;
    let mut hub = late_host(workers);
    assert!(set_up(&mut hub, 0, b"call"));
    assert!(hub.greet(0, hello(), false).unwrap());
    for rank in 1..workers {
        let started = hub.begin(rank, 1, Some(0), Turn::Last, |_| None);
        assert!(started.unwrap().only_logged);
        hub.write(b"call");
        hub.finish();
    }
    for worker in 0..workers {
        from_agent(&mut hub, &ToHead::WorkerUp { worker, pid: 7 });
    }
    let worker = workers - 1;
    let failure = WorkerFailure::default();
    let replaced = true;
    from_agent(
        &mut hub,
        &ToHead::WorkerFailed {
            worker,
            failure,
            replaced,
        },
    );
    // Those before it are restored while it is being replaced.
    while let Some(frame) = hub.next_frame(0) {
        let Frame { header, .. } = frame;
        if header.kind == Kind::Data {
            let answer = Frame::new(
                Kind::Data,
                FIRST | LAST,
                header.worker,
                header.task,
                Bytes::new(),
            );
            hub.on_frame(0, answer, None).unwrap();
        }
    }
    assert!(hub.worker(0).termination.is_none());
    from_agent(&mut hub, &ToHead::WorkerReplaced { worker, pid: 8 });
    while let Some(frame) = hub.next_frame(0) {
        let Frame { header, .. } = frame;
        if header.kind == Kind::Data {
            assert_eq!(header.worker, worker);
            let answer = Frame::new(Kind::Data, FIRST | LAST, worker, header.task, Bytes::new());
            hub.on_frame(0, answer, None).unwrap();
        }
    }
    assert!(hub.worker(worker).termination.is_none());
}

#[test]
fn a_setup_call_is_that_of_a_worker_which_is_back_while_others_run_its_tasks() {
    let mut hub = two_hosts();
    assert!(hub.agent_ended(0, "the job has ended"));
    assert_eq!(task(&mut hub, 0, None), 1);
    join(&mut hub, true);
    assert!(is_back(&hub));
    // Tasks go on in order.
    assert_eq!(task(&mut hub, 0, None), 1);
    assert_eq!(task(&mut hub, 0, Some(0)), 0);
}

#[test]
fn a_task_is_retried_on_another_worker_after_hosts_were_added() {
    let mut hub = two_hosts();
    let command = Source::Command {
        command: Vec::new(),
        env: Vec::new(),
    };
    let host = String::new();
    let source = command;
    hub.add_hosts(vec![Launch { host, source }]).unwrap();
    let mut added = plan(1);
    added.ranks = vec![2];
    added.start.ranks = vec![2];
    hub.go_more(vec![Some(added)], |_| true).unwrap();
    assert!(hub.agent_ended(0, "the job has ended"));
    let started = hub.try_again(0, 1, None, |_| None).unwrap();
    assert_eq!(started.assigned, 1);
}
