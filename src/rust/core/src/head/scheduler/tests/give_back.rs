//! Hosts that are given back when they rest.

use super::*;
use crate::head::scheduler::give_back::GiveBack;

const IDLE: Duration = Duration::from_secs(10);

fn second(s: u64) -> Moment {
    Duration::from_secs(s)
}

/// Agents with a worker each, which have been up since the beginning.
fn adaptive(hosts: usize, min: usize) -> Scheduler {
    let mut s = up(hosts as u32);
    s.give_back_when(GiveBack {
        agents: (0..hosts).collect(),
        min,
        idle: Some(IDLE),
    });
    s.take_notes();
    s
}

/// The hosts that are given back at this time.
fn given_back(s: &mut Scheduler, at: u64) -> Vec<usize> {
    s.at(second(at));
    s.give_back_resting();
    let of = |note| match note {
        Note::GivenBack { agent } => Some(agent),
        _ => None,
    };
    s.take_notes().into_iter().filter_map(of).collect()
}

#[test]
fn a_host_is_given_back_after_its_rest_and_all_but_min_go() {
    let mut s = adaptive(3, 1);
    s.at(second(3));
    submit(&mut s, order(0, 1));
    sent(&mut s, 0);
    assert_eq!(given_back(&mut s, 9), [0; 0]);
    // Worker 0 is busy, and counts as one that is there.
    assert_eq!(given_back(&mut s, 10), [1, 2]);
    assert_eq!((s.state(1), s.state(2)), (State::Waiting, State::Waiting));
    answer(&mut s, 0, 1, None);
    assert_eq!(given_back(&mut s, 100), [0; 0]);
    assert!(!s.is_terminated(0));
    // It is no failure of the worker.
    assert_eq!(s.stats(1, false).failures, 0);
    assert_eq!(s.stats(1, false).error, None);
}

#[test]
fn a_task_begins_the_rest_anew_and_calls_wait_for_a_host_that_was_given_back() {
    let mut s = adaptive(1, 0);
    s.at(second(9));
    submit(&mut s, order(0, 1));
    sent(&mut s, 0);
    s.at(second(15));
    answer(&mut s, 0, 1, None);
    assert_eq!(given_back(&mut s, 24), [0; 0]);
    assert_eq!(given_back(&mut s, 25), [0]);
    s.submit(Order {
        any_of: Some([0].into()),
        ..order(0, 2)
    });
    s.append_call(2, Bytes::from_static(b"call").into(), true);
    let is_end = |note: &Note| matches!(note, Note::Done { .. });
    assert!(!s.take_notes().iter().any(is_end));
    assert_eq!(s.calls_waiting_for(&[1, 0]), (1, vec![false, true]));
    assert_eq!(s.calls_waiting_for(&[1]), (0, vec![false]));
    // Its agent ends, and another comes.
    s.job_lost(0, "ended");
    s.agent_back(0, &ToAgent::Stop).unwrap();
    assert!(!s.take_notes().iter().any(is_end));
    assert_eq!(given_back(&mut s, 100), [0; 0]);
}

#[test]
fn a_worker_of_a_verb_rests_only_if_any_other_may_run_its_tasks_and_none_waits() {
    let mut s = adaptive(2, 0);
    s.reserve_for_verb(0);
    s.reserve_for_verb(1);
    submit(&mut s, order(0, 1));
    submit(
        &mut s,
        Order {
            movable: true,
            ..order(1, 2)
        },
    );
    for (agent, task) in [(0, 1), (1, 2)] {
        sent(&mut s, agent);
        answer(&mut s, agent, task, None);
    }
    s.set_tasks_wait(true);
    assert_eq!(given_back(&mut s, 100), [0; 0]);
    s.set_tasks_wait(false);
    assert_eq!(given_back(&mut s, 100), [1]);
    s.verb_over();
    assert_eq!(given_back(&mut s, 100), [0]);
}
