use super::*;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Simulates a job in which a message takes `rtt` each way. Returns the seconds until the last answer, and how
/// often each task was done.
fn run(planner: &mut Planner, times: &[f64], rtt: f64, cost: f64) -> (f64, Vec<u32>) {
    let slots = planner.slots.len();
    let nanos = |seconds: f64| (seconds * 1e9) as u64;
    let mut free = vec![0.0f64; slots];
    let mut done = vec![0; times.len()];
    // Of each answer: its time, its slot and the index of its batch.
    let mut answers = BinaryHeap::new();
    let mut batches: Vec<(Vec<usize>, usize, f64, f64, bool)> = Vec::new();
    let mut now = 0.0f64;
    let mut waiting: Vec<usize> = (0..slots).collect();
    loop {
        for slot in std::mem::take(&mut waiting) {
            while let Some(batch) = planner.next(slot, Duration::from_secs_f64(now)) {
                now += cost;
                planner.record_cost(Duration::from_secs_f64(cost));
                let begins = free[slot].max(now + rtt);
                let (mut busy, mut count) = (0.0, 0);
                for &task in &batch.tasks {
                    if count > 0 && !batch.max_time.is_zero() && busy > batch.max_time.as_secs_f64()
                    {
                        break;
                    }
                    busy += times[task];
                    count += 1;
                }
                free[slot] = begins + busy;
                answers.push(Reverse((nanos(begins + busy + rtt), slot, batches.len())));
                batches.push((batch.tasks, count, now, busy, batch.prefetch));
            }
        }
        let Some(Reverse((at, slot, batch))) = answers.pop() else {
            return (now, done);
        };
        now = now.max(at as f64 / 1e9);
        let (tasks, count, sent, busy, prefetch) = &batches[batch];
        let (tasks, rest) = tasks.split_at(*count);
        tasks.iter().for_each(|&task| done[task] += 1);
        planner.ended(
            slot,
            Ended {
                tasks: tasks.len(),
                busy: Duration::from_secs_f64(*busy),
                turnaround: (!prefetch).then(|| Duration::from_secs_f64(now - sent)),
                bytes: 10 * tasks.len(),
                computed: None,
                reading: Duration::ZERO,
            },
            Duration::from_secs_f64(now),
        );
        waiting.push(slot);
        if !rest.is_empty() {
            planner.returned(slot, rest);
            waiting.extend((0..slots).filter(|&at| at != slot && planner.out(at) == 0));
        }
    }
}

fn greedy(times: &[f64], slots: usize) -> f64 {
    let mut free: BinaryHeap<Reverse<u64>> = (0..slots).map(|_| Reverse(0)).collect();
    let mut end = 0;
    for time in times {
        let Some(Reverse(at)) = free.pop() else { break };
        let at = at + (time * 1e9) as u64;
        end = end.max(at);
        free.push(Reverse(at));
    }
    end as f64 / 1e9
}

fn exponential(seed: u64, count: usize, mean: f64, max_time: f64) -> Vec<f64> {
    let mut random = StdRng::seed_from_u64(seed);
    let time = |_| (-mean * (1.0 - random.random::<f64>()).ln()).min(max_time);
    (0..count).map(time).collect()
}

#[test]
fn uneven_tasks_end_as_soon_as_with_batches_of_one_task() {
    for seed in 0..20 {
        let times = exponential(seed, 400, 0.05, 0.5);
        let mut planner = Planner::new(Assignment::Free, 400, 32);
        let (end, _) = run(&mut planner, &times, 1e-4, 3e-5);
        let bound = greedy(&times, 32);
        assert!(end < 1.03 * bound, "{end} {bound}");
    }
}

#[test]
fn many_short_tasks_need_few_messages_and_end_together() {
    let times = exponential(1, 100_000, 1e-5, 1e-4);
    let mut planner = Planner::new(Assignment::Free, times.len(), 16);
    let (end, _) = run(&mut planner, &times, 1e-4, 3e-5);
    let bound = greedy(&times, 16);
    assert!(end < 1.25 * bound, "{end} {bound}");
}

#[test]
fn long_tasks_after_short_ones_are_shared_by_all_workers() {
    for (short, long, slots) in [(200, 6, 2), (5000, 40, 4), (2000, 8, 8), (8, 92, 8)] {
        let mut times = vec![2e-6; short];
        times.extend(vec![0.1; long]);
        let mut planner = Planner::new(Assignment::Free, times.len(), slots);
        let (end, _) = run(&mut planner, &times, 1e-4, 3e-5);
        let bound = greedy(&times, slots);
        assert!(end < bound + 0.11, "{short} {long} {slots}: {end} {bound}");
    }
}

#[test]
fn prefetching_hides_a_long_round_trip_time() {
    for assignment in [Assignment::Free, Assignment::Round] {
        let times = vec![0.01; 6400];
        let mut planner = Planner::new(assignment, times.len(), 64);
        let (end, _) = run(&mut planner, &times, 0.025, 5e-5);
        assert!(end < 1.2, "{assignment:?} {end}");
    }
}

#[test]
fn tasks_with_large_answers_are_sent_one_by_one() {
    let mut planner = Planner::new(Assignment::Free, 1000, 2);
    planner.record_cost(Duration::from_millis(1));
    planner.next(0, Duration::ZERO);
    planner.ended(
        0,
        Ended {
            tasks: 1,
            busy: Duration::from_micros(1),
            turnaround: Some(Duration::from_millis(1)),
            bytes: 1 << 20,
            computed: None,
            reading: Duration::ZERO,
        },
        Duration::from_millis(1),
    );
    assert_eq!(
        planner
            .next(0, Duration::from_millis(1))
            .map(|batch| batch.tasks.len()),
        Some(1)
    );
}

#[test]
fn short_computations_use_no_more_workers_than_there_are_cores() {
    let mut planner = Planner::new(Assignment::Free, 100_000, 100);
    for slot in 0..100 {
        planner.set_host(slot, 0, 2);
    }
    let ended = |slept: bool| Ended {
        tasks: 1,
        busy: Duration::from_micros(1),
        turnaround: Some(Duration::from_micros(100)),
        bytes: 10,
        computed: (!slept).then_some(Duration::from_micros(1)),
        reading: Duration::ZERO,
    };
    planner.record_cost(Duration::from_micros(30));
    let ms = Duration::from_millis;
    for _ in 0..8 {
        planner.next(0, ms(1));
        planner.ended(0, ended(false), ms(1));
    }
    let started = (0..100)
        .filter(|&at| planner.next(at, ms(1)).is_some())
        .count();
    assert_eq!(started, 3);
    assert!(!planner.may_resume(ms(1)));
    // The started tasks seem to be long.
    assert!(planner.may_resume(ms(10_000)));
    assert!((0..100).all(|at| planner.next(at, ms(1)).is_none()));
    // Tasks wait now, so others can compute meanwhile.
    planner.ended(0, ended(true), ms(2));
    planner.next(0, ms(2));
    planner.ended(0, ended(true), ms(2));
    assert!(planner.may_resume(ms(2)));
    assert!(!planner.may_resume(ms(2)));
    let started = (0..100)
        .filter(|&at| planner.next(at, ms(2)).is_some())
        .count();
    assert!(started > 90, "{started}");
}

#[test]
fn workers_that_share_cores_do_not_make_computations_appear_longer() {
    let mut planner = Planner::new(Assignment::Free, 10_000, 40);
    for slot in 0..40 {
        planner.set_host(slot, 0, 2);
    }
    let ms = Duration::from_millis;
    for slot in 0..40 {
        assert!(planner.next(slot, ms(0)).is_some());
    }
    // All workers share two cores.
    let ended = Ended {
        tasks: 1,
        busy: ms(8),
        turnaround: Some(ms(8)),
        bytes: 10,
        computed: Some(Duration::from_micros(400)),
        reading: Duration::ZERO,
    };
    (0..40).for_each(|slot| planner.ended(slot, ended, ms(8)));
    let batches: Vec<Batch> = (0..40).filter_map(|at| planner.next(at, ms(8))).collect();
    assert_eq!(batches.len(), 3);
    assert!(
        batches.iter().all(|batch| batch.tasks.len() == 50),
        "{batches:?}"
    );
}

proptest! {
    #[test]
    fn each_task_is_done_once(
        tasks in 0usize..3_000, slots in 1usize..40, seed in any::<u64>(), free in any::<bool>(),
        rtt in 0.0f64..0.03, mean in 1e-6f64..0.02,
    ) {
        let assignment = if free { Assignment::Free } else { Assignment::Round };
        let times = exponential(seed, tasks, mean, 1.0);
        let mut planner = Planner::new(assignment, tasks, slots);
        let (_, done) = run(&mut planner, &times, rtt, 2e-5);
        prop_assert!(done.iter().all(|&count| count == 1));
        prop_assert_eq!(planner.left(), 0);
    }

    #[test]
    fn returned_and_lost_tasks_go_first_and_to_their_slot(
        tasks in 10usize..100, slots in 1usize..10,
    ) {
        let mut planner = Planner::new(Assignment::Round, tasks, slots);
        let batch = planner.next(0, Duration::ZERO).unwrap();
        planner.dropped(0, false);
        planner.returned(0, &batch.tasks);
        prop_assert_eq!(&planner.next(0, Duration::ZERO).unwrap().tasks, &batch.tasks);
        planner.dropped(0, false);
        planner.lost(0, &[2 * slots, 0]);
        for task in [0, 2 * slots] {
            prop_assert_eq!(planner.next(0, Duration::ZERO).unwrap().tasks, [task]);
            planner.dropped(0, false);
        }
        planner.close(0);
        prop_assert_eq!(planner.next(0, Duration::ZERO), None);
    }
}
