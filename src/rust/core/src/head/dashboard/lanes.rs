//! What a worker did over time, as one character for each bin of a fixed length. Pure.

use crate::head::activity::{ActivityKind, Interval, Moment, Times, WorkerStats};
use std::time::Duration;

/// Maximum number of bins of an answer.
pub const MAX_BINS: usize = 600;
/// The shortest bin.
pub const MIN_STEP: Duration = Duration::from_millis(100);

/// A worker failure, or the time until its replacement, falls in this bin.
pub const LOST: char = 'x';
/// The worker's messages were mainly being transferred.
pub const TRANSFER: char = 't';

/// Successive bins of the same length. Bin 0 starts when the cluster was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bins {
    /// The first bin.
    pub first: u64,
    /// Number of bins; the last one contains the present.
    pub count: usize,
    /// The length of a bin.
    pub step: Duration,
}

impl Bins {
    /// The bins from `first` to the present, or the last ones of these if there are too many.
    pub fn new(first: u64, step: Duration, now: Moment, max_count: usize) -> Bins {
        let step = step.max(MIN_STEP);
        let last = (now.as_millis() / step.as_millis()) as u64;
        let first = first.clamp(last.saturating_sub(max_count.max(1) as u64 - 1), last);
        Bins {
            first,
            count: (last - first) as usize + 1,
            step,
        }
    }

    fn start(&self) -> Moment {
        let millis = self.step.as_millis() as u64;
        Duration::from_millis(millis.saturating_mul(self.first))
    }
}

/// Sums of what a worker did in a bin.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    busy: f64,
    transfer: f64,
    lost: bool,
}

/// Draws the lanes of workers, one after the other.
#[derive(Debug)]
pub struct Painter {
    bins: Bins,
    now: Moment,
    sums: Vec<Sum>,
}

impl Painter {
    /// Creates a painter.
    pub fn new(bins: Bins, now: Moment) -> Painter {
        Painter {
            bins,
            now,
            sums: vec![Sum::default(); bins.count],
        }
    }

    /// Appends a character for each bin: a digit from 0 to 8 for how much of the bin the worker was busy (in eighths),
    /// [`TRANSFER`] or [`LOST`]. `current`: the times of the task that the worker has now.
    pub fn paint(&mut self, stats: &WorkerStats, current: Option<Times>, lane: &mut String) {
        self.sums.fill(Sum::default());
        let start = self.bins.start();
        let intervals = stats.intervals();
        let from = intervals.partition_point(|interval| interval.end <= start);
        for interval in intervals.iter().skip(from) {
            self.add(interval);
        }
        if let Some(times) = current {
            for interval in under_way(times, self.now) {
                self.add(&interval);
            }
        }
        for &(since, back) in stats.failures() {
            self.lose(since, back);
        }
        if let Some(since) = stats.lost_since() {
            self.lose(since, self.now);
        }
        let step = self.bins.step.as_secs_f64();
        let mut begins = start.as_secs_f64();
        for sum in &self.sums {
            // The present bin is not over.
            let length = step.min(self.now.as_secs_f64() - begins).max(1e-3);
            begins += step;
            let eighths = (8.0 * sum.busy / length).ceil().clamp(0.0, 8.0) as u32;
            let busy = char::from_digit(eighths, 10).unwrap_or('0');
            let character = match sum {
                Sum { lost: true, .. } => LOST,
                Sum { busy, transfer, .. } if transfer > busy && *transfer > 0.25 * length => {
                    TRANSFER
                }
                _ => busy,
            };
            lane.push(character);
        }
    }

    /// The bins that an interval touches: their numbers from the first one, and how much of each.
    fn touched(&self, from: Moment, to: Moment) -> impl Iterator<Item = (usize, f64)> + use<> {
        let (step, count) = (self.bins.step.as_secs_f64(), self.bins.count);
        let start = self.bins.start().as_secs_f64();
        let (from, to) = (from.as_secs_f64() - start, to.as_secs_f64() - start);
        let first = (from / step).max(0.0) as usize;
        (first..count)
            .map(move |bin| {
                let begins = bin as f64 * step;
                (bin, to.min(begins + step) - from.max(begins))
            })
            .take_while(move |&(bin, overlap)| overlap > 0.0 || bin == first && to >= 0.0)
    }

    fn add(&mut self, interval: &Interval) {
        let length = interval.end.saturating_sub(interval.start).as_secs_f64();
        if length <= 0.0 {
            return;
        }
        let density = (interval.busy.as_secs_f64() / length).min(1.0);
        for (bin, overlap) in self.touched(interval.start, interval.end) {
            let (sum, overlap) = (&mut self.sums[bin], overlap.max(0.0));
            sum.busy += overlap * density;
            if interval.kind == ActivityKind::Transfer {
                sum.transfer += overlap * (1.0 - density);
            }
        }
    }

    fn lose(&mut self, since: Moment, back: Moment) {
        if back < self.bins.start() {
            return;
        }
        for (bin, _) in self.touched(since, back) {
            self.sums[bin].lost = true;
        }
    }
}

/// The intervals of a task that has not ended.
fn under_way(times: Times, now: Moment) -> impl Iterator<Item = Interval> {
    let sent = times.sent.unwrap_or(now);
    let answered = times.answered.unwrap_or(now).max(sent);
    let interval = |kind, start: Moment, end: Moment| Interval {
        kind,
        start,
        end,
        busy: match kind {
            ActivityKind::Busy => end.saturating_sub(start),
            ActivityKind::Transfer => Duration::ZERO,
        },
        tasks: 0,
    };
    [
        interval(ActivityKind::Transfer, times.assigned, sent),
        interval(ActivityKind::Busy, sent, answered),
        interval(ActivityKind::Transfer, answered, now),
    ]
    .into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::activity::tests::{ms, times};
    use proptest::prelude::*;

    fn lane(stats: &WorkerStats, current: Option<Times>, first: u64, now: u64) -> String {
        let bins = Bins::new(first, ms(1000), ms(now), MAX_BINS);
        let mut lane = String::new();
        Painter::new(bins, ms(now)).paint(stats, current, &mut lane);
        lane
    }

    #[test]
    fn bins_show_how_busy_a_worker_was() {
        let mut stats = WorkerStats::default();
        stats.ended(times(1000, 1000, 3500), 1, ms(3500));
        assert_eq!(lane(&stats, None, 0, 5000), "088400");
        assert_eq!(lane(&stats, None, 3, 5000), "400");
        // The present bin is compared with the part of it that is over.
        assert_eq!(lane(&stats, None, 0, 3500), "0888");
    }

    #[test]
    fn a_task_that_runs_is_shown_as_busy_until_now() {
        let stats = WorkerStats::default();
        let current = Times {
            assigned: ms(500),
            sent: Some(ms(2000)),
            ..Times::default()
        };
        assert_eq!(lane(&stats, Some(current), 0, 4200), "tt888");
        let unsent = Times {
            assigned: ms(500),
            ..Times::default()
        };
        assert_eq!(lane(&stats, Some(unsent), 0, 1900), "tt");
    }

    #[test]
    fn short_losses_are_visible() {
        let mut stats = WorkerStats::default();
        stats.ended(times(0, 0, 4000), 1, ms(4000));
        stats.lost("killed", ms(1200));
        stats.back(ms(1200));
        stats.lost("killed", ms(3200));
        assert_eq!(lane(&stats, None, 0, 4500), "8x8xx");
        assert_eq!(lane(&stats, None, 2, 4500), "8xx");
    }

    #[test]
    fn bins_are_limited() {
        let bins = Bins::new(0, ms(1), ms(1_000_000), 240);
        assert_eq!((bins.step, bins.count, bins.first), (MIN_STEP, 240, 9761));
        let bins = Bins::new(u64::MAX, ms(1000), ms(10_500), 240);
        assert_eq!((bins.first, bins.count), (10, 1));
        let bins = Bins::new(5, ms(1000), ms(0), 0);
        assert_eq!((bins.first, bins.count), (0, 1));
    }

    proptest! {
        #[test]
        fn lanes_have_a_character_for_each_bin(
            steps in prop::collection::vec((0u64..5_000, 0u64..5_000, 0u64..5_000), 0..60),
            first in 0u64..200, step in 100u64..5_000, later in 0u64..10_000, max in 1usize..300,
        ) {
            let mut stats = WorkerStats::default();
            let mut now = 0;
            for &(idle, to, at) in &steps {
                let (assigned, sent) = (now + idle, now + idle + to);
                now = sent + at;
                stats.ended(times(assigned, sent, now), 1, ms(now));
            }
            let now = ms(now + later);
            let bins = Bins::new(first, ms(step), now, max);
            let mut lane = String::new();
            Painter::new(bins, now).paint(&stats, None, &mut lane);
            prop_assert_eq!(lane.chars().count(), bins.count);
            prop_assert!(bins.count <= max);
            prop_assert!(lane.chars().all(|c| c == TRANSFER || ('0'..='8').contains(&c)));
        }
    }
}
