//! The statistics of each worker, as the head sees them: counters, and when the worker was busy.
//!
//! Pure: the caller supplies the time. The history of a worker has a bounded number of intervals, however long it
//! becomes, because intervals that are short compared to the whole history are merged (see [`WorkerStats::push`]).

use crate::protocol::truncate;
use std::time::Duration;

/// The time since the cluster was started.
pub type Moment = Duration;

/// Maximum number of intervals of a worker.
pub const MAX_INTERVALS: usize = 500;

/// Maximum number of recorded periods in which a worker was lost. Beyond that, the oldest are dropped.
pub const MAX_FAILURES: usize = 50;

/// The initial resolution: shorter intervals are always merged.
const MIN_RESOLUTION: Duration = Duration::from_millis(1);

/// The error message of a worker whose task exceeded its time limit.
pub const TOO_LONG: &str = "a task exceeded its time limit";

/// The activity of a worker in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivityKind {
    /// The worker ran a task.
    Busy,
    /// A message or an answer was being transferred.
    Transfer,
}

/// An interval of a worker's history with one main activity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// What the worker was mostly doing.
    pub kind: ActivityKind,
    /// When the interval starts.
    pub start: Moment,
    /// When the interval ends.
    pub end: Moment,
    /// How long the worker was busy in the interval.
    pub busy: Duration,
    /// Number of tasks that were answered in the interval.
    pub tasks: u64,
}

/// The measurements that a worker writes into its answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// How long the worker was busy.
    pub seconds: f64,
    /// Number of tasks that the answer is for.
    pub tasks: u32,
}

/// Reads the measurements from the first bytes of an answer, if it contains them.
pub type Measure = fn(&[u8]) -> Option<Measured>;

/// The times of a worker's current task.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// When the task became the worker's current task.
    pub assigned: Moment,
    /// When the last part of the message was sent.
    pub sent: Option<Moment>,
    /// When the first part of the answer arrived.
    pub answered: Option<Moment>,
    /// The measurements in the answer.
    pub measured: Option<Measured>,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct WorkerStats {
    /// Number of answered tasks.
    pub tasks: u64,
    /// How long the worker was busy, in total.
    pub busy: Duration,
    /// Bytes of frames to this worker.
    pub bytes_in: u64,
    /// Bytes of frames from this worker.
    pub bytes_out: u64,
    /// How often the worker was lost.
    pub failures: u64,
    /// The last error.
    pub error: Option<String>,
    intervals: Vec<Interval>,
    resolution: Duration,
    lost: Vec<(Moment, Moment)>,
    lost_since: Option<Moment>,
}

impl WorkerStats {
    /// Records that a task of this worker has ended, with or without an answer.
    pub fn ended(&mut self, times: Times, tasks: u64, now: Moment) {
        let answered = times.answered.unwrap_or(now);
        // The worker cannot start a task before its message is complete.
        let sent = times.sent.unwrap_or(answered);
        let measured = times.measured.and_then(|measured| {
            let seconds = Duration::try_from_secs_f64(measured.seconds).ok()?;
            Some(answered.saturating_sub(seconds))
        });
        let began = measured.unwrap_or(sent).max(times.assigned).min(answered);
        let busy = answered.saturating_sub(began);
        self.tasks += tasks;
        self.busy += busy;
        self.push(Interval {
            kind: ActivityKind::Transfer,
            start: times.assigned,
            end: began,
            busy: Duration::ZERO,
            tasks: 0,
        });
        self.push(Interval {
            kind: ActivityKind::Busy,
            start: began,
            end: answered,
            busy,
            tasks,
        });
        self.push(Interval {
            kind: ActivityKind::Transfer,
            start: answered,
            end: now,
            busy: Duration::ZERO,
            tasks: 0,
        });
    }

    /// Appends an interval, or merges it into the last one if both the last one and the gap between the two are shorter
    /// than the resolution. Two successive intervals and the gap between them are therefore at least as long as the
    /// resolution. If there are too many intervals, the resolution is doubled until half as many remain.
    fn push(&mut self, new: Interval) {
        if new.start >= new.end && new.tasks == 0 {
            return;
        }
        self.resolution = self.resolution.max(MIN_RESOLUTION);
        append(&mut self.intervals, new, self.resolution);
        while self.intervals.len() > MAX_INTERVALS {
            self.resolution *= 2;
            let mut fewer = Vec::with_capacity(MAX_INTERVALS + 1);
            for &interval in &self.intervals {
                append(&mut fewer, interval, self.resolution);
            }
            if fewer.len() <= MAX_INTERVALS / 2 {
                self.intervals = fewer;
            }
        }
    }

    /// A copy without the history.
    #[must_use]
    pub fn counters(&self) -> WorkerStats {
        WorkerStats {
            error: self.error.clone(),
            intervals: Vec::new(),
            lost: Vec::new(),
            ..*self
        }
    }

    /// Records that the worker is lost.
    pub fn lost(&mut self, why: &str, now: Moment) {
        if self.lost_since.is_none() {
            self.lost_since = Some(now);
            self.failures += 1;
        }
        self.failed(why);
    }

    /// Records the error of a task of the worker.
    pub fn failed(&mut self, why: &str) {
        self.error = Some(truncate::beginning(why, truncate::MAX_ERROR).to_owned());
    }

    /// Records that the worker is available again.
    pub fn back(&mut self, now: Moment) {
        if let Some(since) = self.lost_since.take() {
            if self.lost.len() == MAX_FAILURES {
                self.lost.remove(0);
            }
            self.lost.push((since, now));
        }
    }

    /// Since when the worker is lost, if it is.
    pub fn lost_since(&self) -> Option<Moment> {
        self.lost_since
    }

    /// The intervals of the history, in order and without overlaps.
    pub fn intervals(&self) -> &[Interval] {
        &self.intervals
    }

    /// The periods in which the worker was lost, each with its start and end.
    pub fn failures(&self) -> &[(Moment, Moment)] {
        &self.lost
    }
}

fn append(intervals: &mut Vec<Interval>, mut new: Interval, resolution: Duration) {
    let length = |of: &Interval| of.end.saturating_sub(of.start);
    if let Some(last) = intervals.last_mut() {
        new.start = new.start.max(last.end);
        new.end = new.end.max(new.start);
        let gap = new.start.saturating_sub(last.end);
        if gap.max(length(last)) < resolution {
            if length(&new) > length(last) {
                last.kind = new.kind;
            }
            last.end = new.end;
            last.busy += new.busy;
            last.tasks += new.tasks;
            return;
        }
    }
    intervals.push(new);
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(in crate::head) const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    pub(in crate::head) fn times(assigned: u64, sent: u64, answered: u64) -> Times {
        Times {
            assigned: ms(assigned),
            sent: Some(ms(sent)),
            answered: Some(ms(answered)),
            measured: None,
        }
    }

    fn kinds(stats: &WorkerStats) -> Vec<(ActivityKind, u128, u128)> {
        let intervals = stats.intervals().iter();
        intervals
            .map(|i| (i.kind, i.start.as_millis(), i.end.as_millis()))
            .collect()
    }

    #[test]
    fn a_task_is_recorded_as_transfer_busy_and_transfer() {
        let mut stats = WorkerStats::default();
        stats.ended(times(10, 20, 120), 1, ms(150));
        let parts = [
            (ActivityKind::Transfer, 10, 20),
            (ActivityKind::Busy, 20, 120),
            (ActivityKind::Transfer, 120, 150),
        ];
        assert_eq!(kinds(&stats), parts);
        assert_eq!((stats.tasks, stats.busy), (1, ms(100)));
    }

    #[test]
    fn the_measurements_of_the_worker_are_used() {
        let mut stats = WorkerStats::default();
        let seconds = 0.03;
        let measured = Some(Measured { seconds, tasks: 7 });
        let of = Times {
            measured,
            ..times(0, 10, 100)
        };
        stats.ended(of, 7, ms(100));
        assert_eq!(
            kinds(&stats),
            [
                (ActivityKind::Transfer, 0, 70),
                (ActivityKind::Busy, 70, 100)
            ]
        );
        // The worker cannot have been busy for longer than it had the task.
        for seconds in [1e300, f64::NAN, -1.0, 5.0] {
            let mut stats = WorkerStats::default();
            let measured = Some(Measured { seconds, tasks: 1 });
            let of = Times {
                measured,
                ..times(50, 60, 100)
            };
            stats.ended(of, 1, ms(100));
            assert!(stats.busy <= ms(50));
        }
    }

    #[test]
    fn a_task_that_was_never_sent_is_recorded_as_transfer_only() {
        let mut stats = WorkerStats::default();
        let of = Times {
            assigned: ms(5),
            ..Times::default()
        };
        stats.ended(of, 0, ms(50));
        assert_eq!(kinds(&stats), [(ActivityKind::Transfer, 5, 50)]);
        assert_eq!((stats.tasks, stats.busy), (0, Duration::ZERO));
    }

    #[test]
    fn losses_start_and_end_and_the_oldest_are_dropped() {
        let mut stats = WorkerStats::default();
        for at in 0..2 * MAX_FAILURES as u64 {
            stats.lost("killed", ms(10 * at));
            stats.lost("killed", ms(10 * at + 1));
            assert_eq!(stats.lost_since(), Some(ms(10 * at)));
            stats.back(ms(10 * at + 5));
            stats.back(ms(10 * at + 6));
        }
        assert_eq!(stats.failures, 2 * MAX_FAILURES as u64);
        assert_eq!(stats.failures().len(), MAX_FAILURES);
        assert_eq!(stats.failures().last(), Some(&(ms(990), ms(995))));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let mut stats = WorkerStats::default();
        stats.failed(&"é".repeat(truncate::MAX_ERROR));
        assert_eq!(stats.error, Some("é".repeat(truncate::MAX_ERROR / 2)));
        stats.failed(&format!("x{}", "é".repeat(truncate::MAX_ERROR)));
        assert_eq!(
            stats.error.map(|text| text.len()),
            Some(truncate::MAX_ERROR - 1)
        );
    }

    proptest! {
        #[test]
        fn histories_are_bounded_ordered_and_lose_no_work(
            steps in prop::collection::vec((0u64..50_000, 0u64..50_000, 0u64..50_000, 0u64..5_000), 1..4_000),
        ) {
            let mut stats = WorkerStats::default();
            let micros = Duration::from_micros;
            let (mut now, mut busy) = (Duration::ZERO, Duration::ZERO);
            for &(idle, to, at, from) in &steps {
                let assigned = now + micros(idle);
                let sent = assigned + micros(to);
                let answered = sent + micros(at);
                now = answered + micros(from);
                busy += micros(at);
                let (sent, answered) = (Some(sent), Some(answered));
                stats.ended(Times { assigned, sent, answered, measured: None }, 1, now);
                prop_assert!(stats.intervals().len() <= MAX_INTERVALS);
            }
            let intervals = stats.intervals();
            prop_assert!(intervals.windows(2).all(|two| two[0].end <= two[1].start));
            prop_assert!(intervals.iter().all(|i| i.start <= i.end && i.busy <= i.end - i.start));
            prop_assert_eq!(intervals.iter().map(|i| i.busy).sum::<Duration>(), busy);
            prop_assert_eq!(intervals.iter().map(|i| i.tasks).sum::<u64>(), steps.len() as u64);
            prop_assert_eq!((stats.busy, stats.tasks), (busy, steps.len() as u64));
        }
    }
}
