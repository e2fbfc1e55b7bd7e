//! What each worker has been at, as the head sees it: counters, and when it was busy.
//!
//! Pure: the time is told. A worker's history takes a bounded number of intervals however long it
//! is: those that are too short to matter beside all of it are put together (see [`WorkerStats::push`]).

use std::time::Duration;

/// The time, since the cluster was begun.
pub type Moment = Duration;

/// Intervals of a worker, at most.
pub const MAX_INTERVALS: usize = 500;

/// Times for which a worker was lost, at most: then the oldest are forgotten.
pub const MAX_FAILURES: usize = 50;

/// Intervals that are shorter are put together from the beginning on.
const FINEST: Duration = Duration::from_millis(1);

/// What is kept of an error's text.
const TEXT: usize = 1000;

/// What is said of a worker whose task took too long.
pub const TOO_LONG: &str = "a task exceeded its time limit";

/// What a worker had to do with a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivityKind {
    /// It was at it.
    Busy,
    /// Message or answer were on their way.
    Transfer,
}

/// A time in which a worker was mostly of use for the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// What the worker was mostly doing.
    pub kind: ActivityKind,
    /// When the interval starts.
    pub start: Moment,
    /// When the interval ends.
    pub end: Moment,
    /// For how long in between it was busy.
    pub busy: Duration,
    /// Tasks that were answered in it.
    pub tasks: u64,
}

/// What an answer says of itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// For how long its worker was at it.
    pub seconds: f64,
    /// Tasks that it answers.
    pub tasks: u32,
}

/// Finds that in the first bytes of an answer, if it is there.
pub type Measure = fn(&[u8]) -> Option<Measured>;

/// When what happened with a task that a worker has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// It is this worker's turn to have it.
    pub assigned: Moment,
    /// All of the message was sent.
    pub sent: Option<Moment>,
    /// The first of the answer came.
    pub answered: Option<Moment>,
    /// What the answer said of itself.
    pub measured: Option<Measured>,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct WorkerStats {
    /// Tasks that were answered.
    pub tasks: u64,
    /// For how long the worker was busy, in total.
    pub busy: Duration,
    /// Bytes of frames to this worker.
    pub bytes_in: u64,
    /// Bytes of frames from this worker.
    pub bytes_out: u64,
    /// How often it was lost.
    pub failures: u64,
    /// The last thing that went wrong.
    pub error: Option<String>,
    intervals: Vec<Interval>,
    resolution: Duration,
    lost: Vec<(Moment, Moment)>,
    lost_since: Option<Moment>,
}

impl WorkerStats {
    /// A task is over for this worker, answered or not.
    pub fn ended(&mut self, times: Times, tasks: u64, now: Moment) {
        let answered = times.answered.unwrap_or(now);
        // Without all of its message it has not begun.
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

    /// Appends an interval, or makes it a part of the last, if that and the gap between them are shorter
    /// than the resolution. So no two successive ones together are shorter, with the gap between them.
    /// Whenever there are too many, the resolution is doubled until there are half as many.
    fn push(&mut self, new: Interval) {
        if new.start >= new.end && new.tasks == 0 {
            return;
        }
        self.resolution = self.resolution.max(FINEST);
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

    /// Without the history.
    #[must_use]
    pub fn counters(&self) -> WorkerStats {
        WorkerStats {
            error: self.error.clone(),
            intervals: Vec::new(),
            lost: Vec::new(),
            ..*self
        }
    }

    /// It is gone.
    pub fn lost(&mut self, why: &str, now: Moment) {
        if self.lost_since.is_none() {
            self.lost_since = Some(now);
            self.failures += 1;
        }
        self.failed(why);
    }

    /// Something went wrong with a task of it.
    pub fn failed(&mut self, why: &str) {
        let mut end = why.len().min(TEXT);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        self.error = why.get(..end).map(str::to_owned);
    }

    /// It is there again.
    pub fn back(&mut self, now: Moment) {
        if let Some(since) = self.lost_since.take() {
            if self.lost.len() == MAX_FAILURES {
                self.lost.remove(0);
            }
            self.lost.push((since, now));
        }
    }

    /// Since when it is gone, if it is.
    pub fn lost_since(&self) -> Option<Moment> {
        self.lost_since
    }

    /// In order, without overlaps.
    pub fn intervals(&self) -> &[Interval] {
        &self.intervals
    }

    /// From when to when it was lost.
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn times(assigned: u64, sent: u64, answered: u64) -> Times {
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
    fn a_task_is_transfer_work_and_transfer() {
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
    fn what_the_worker_has_measured_counts() {
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
        // It cannot have been at it for longer than it had it.
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
    fn a_task_that_was_never_sent_is_transfer_alone() {
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
    fn losses_begin_and_end_and_the_oldest_are_forgotten() {
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
        stats.failed(&"é".repeat(TEXT));
        assert_eq!(stats.error, Some("é".repeat(TEXT / 2)));
        stats.failed(&format!("x{}", "é".repeat(TEXT)));
        assert_eq!(stats.error.map(|text| text.len()), Some(TEXT - 1));
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
