//! How an agent that runs in a batch job learns that its job is about to end: by a signal of the batch engine, or by the
//! clock. The agent reports both to the head, which drains it.

use super::Agent;
use crate::platform::signals::{self, Saved};
use crate::protocol::control::{DrainCause, ToHead};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tracing::{info, warn};

/// Environment variable of agents that were started in a batch job.
pub const IN_JOB: &str = "RUSTCLUSTER_JOB";

/// Environment variables with the end of the job, in seconds since 1970; the first one that is set counts.
const JOB_END: [&str; 2] = ["RUSTCLUSTER_JOB_END", "SLURM_JOB_END_TIME"];

/// The signals by which batch engines announce the end of a job.
const WARNINGS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2];

/// This process catches the signals. R removes the variable [`IN_JOB`] for the workers.
static CATCHES: AtomicBool = AtomicBool::new(false);

/// The agent drains at most so long before the end of its job.
const MAX_MARGIN: Duration = Duration::from_secs(60);

/// The warnings that an agent in a batch job has received, and the end of the job. Outside of jobs there is none of
/// both, and the signals have their usual effects.
#[derive(Default)]
pub struct Warnings {
    signals: Option<Caught>,
    /// When the job ends.
    end: Option<SystemTime>,
    /// When the agent drains because of that.
    drain_at: Option<SystemTime>,
    /// The worst cause that the head knows of.
    reported: Option<DrainCause>,
}

struct Caught {
    terminated: Arc<AtomicBool>,
    warned: Arc<AtomicBool>,
    /// The dispositions before, which workers get back.
    before: Saved,
}

impl Warnings {
    /// Catches the signals, if this process was started in a batch job: R would die of SIGTERM, and would save its
    /// workspace and quit at SIGUSR1. Signals that were blocked for the change of the program are delivered now.
    ///
    /// # Errors
    /// When a handler cannot be installed.
    pub fn catch() -> io::Result<Warnings> {
        if std::env::var_os(IN_JOB).is_none_or(|value| value.is_empty()) {
            return Ok(Warnings::default());
        }
        let caught = Caught {
            terminated: Arc::default(),
            warned: Arc::default(),
            before: signals::save(&WARNINGS),
        };
        // signal_hook also calls the handlers that it finds: R's would end the process.
        signals::ignore(&WARNINGS);
        for signal in WARNINGS {
            let flag = match signal {
                libc::SIGTERM => &caught.terminated,
                _ => &caught.warned,
            };
            signal_hook::flag::register(signal, flag.clone())?;
        }
        CATCHES.store(true, Ordering::Relaxed);
        signals::unblock(&WARNINGS);
        let seconds = JOB_END.iter().find_map(|name| std::env::var(name).ok());
        let seconds = seconds.and_then(|text| text.trim().parse::<u64>().ok());
        let end = seconds.and_then(|s| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(s)));
        info!(?end, "agent runs in a batch job");
        Ok(Warnings {
            signals: Some(caught),
            end,
            drain_at: end.map(|end| drain_at(end, SystemTime::now())),
            reported: None,
        })
    }

    /// Blocks the signals if they are caught: this process is about to become another program, which gets them when it
    /// calls [`Warnings::catch`].
    pub fn block_for_next_program() {
        if CATCHES.load(Ordering::Relaxed) {
            signals::block(&WARNINGS);
        }
    }

    /// Whether the signals are caught.
    pub fn are_caught(&self) -> bool {
        self.signals.is_some()
    }

    /// Whether the job is being ended.
    pub(super) fn is_terminated(&self) -> bool {
        let caught = self.signals.as_ref();
        caught.is_some_and(|caught| caught.terminated.load(Ordering::Relaxed))
    }

    /// The head is another one, which knows of no warning.
    pub(super) fn report_again(&mut self) {
        self.reported = None;
    }

    /// Writes to this socket when a signal arrives.
    pub(super) fn wake_by(&self, socket: &UnixStream) -> io::Result<()> {
        if self.are_caught() {
            for signal in WARNINGS {
                signal_hook::low_level::pipe::register(signal, socket.try_clone()?)?;
            }
        }
        Ok(())
    }

    /// Gives a forked worker the dispositions that this process had before.
    pub(super) fn restore(&self) {
        if let Some(caught) = &self.signals {
            caught.before.restore();
        }
    }

    /// Time until the agent has to look at the clock.
    pub(super) fn due_in(&self, now: SystemTime) -> Option<Duration> {
        let at = self.drain_at.filter(|_| self.reported.is_none())?;
        Some(at.duration_since(now).unwrap_or_default())
    }

    /// The message for the head, if there is something new.
    pub(super) fn next(&mut self, now: SystemTime) -> Option<ToHead> {
        let set = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        let caught = self.signals.as_ref();
        let late = self.drain_at.is_some_and(|at| at <= now);
        let cause = if caught.is_some_and(|caught| set(&caught.terminated)) {
            DrainCause::Terminated
        } else if caught.is_some_and(|caught| set(&caught.warned)) {
            DrainCause::Warned
        } else if late {
            DrainCause::TimeLimit
        } else {
            return None;
        };
        if self.reported >= Some(cause) {
            return None;
        }
        self.reported = Some(cause);
        let left = self.end.filter(|_| cause != DrainCause::Terminated);
        let left = left.map(|end| end.duration_since(now).unwrap_or_default().as_secs());
        let seconds = left.map(|seconds| u32::try_from(seconds).unwrap_or(u32::MAX));
        Some(ToHead::Draining { seconds, cause })
    }
}

/// When an agent drains whose job ends at `end`.
fn drain_at(end: SystemTime, now: SystemTime) -> SystemTime {
    let rest = end.duration_since(now).unwrap_or_default();
    end.checked_sub(MAX_MARGIN.min(rest / 4)).unwrap_or(end)
}

impl Agent {
    /// Reports to the head that the job is about to end, if that is new. The agent then goes on until the head ends it.
    pub(super) fn check_warnings(&mut self) {
        if let Some(message) = self.warnings.next(SystemTime::now()) {
            warn!(?message, "job is about to end");
            self.report(&message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn limited(end: u64, now: u64) -> Warnings {
        Warnings {
            end: Some(at(end)),
            drain_at: Some(drain_at(at(end), at(now))),
            ..Warnings::default()
        }
    }

    fn caught() -> (Warnings, Arc<AtomicBool>, Arc<AtomicBool>) {
        let (terminated, warned) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        let caught = Caught {
            terminated: terminated.clone(),
            warned: warned.clone(),
            before: signals::save(&[]),
        };
        let warnings = Warnings {
            signals: Some(caught),
            ..limited(1_000, 0)
        };
        (warnings, terminated, warned)
    }

    #[test]
    fn the_end_of_a_job_is_announced_once_before_it_comes() {
        let mut warnings = limited(1_000, 0);
        assert_eq!(warnings.due_in(at(900)), Some(Duration::from_secs(40)));
        assert_eq!(warnings.next(at(939)), None);
        let draining = ToHead::Draining {
            seconds: Some(60),
            cause: DrainCause::TimeLimit,
        };
        assert_eq!(warnings.next(at(940)), Some(draining));
        assert_eq!(warnings.next(at(999)), None);
        assert_eq!(warnings.due_in(at(999)), None);
    }

    #[test]
    fn a_worse_cause_is_announced_after_another_and_never_the_reverse() {
        let (mut warnings, terminated, warned) = caught();
        assert_eq!(warnings.next(at(100)), None);
        warned.store(true, Ordering::Relaxed);
        let draining = |seconds, cause| Some(ToHead::Draining { seconds, cause });
        let warning = draining(Some(900), DrainCause::Warned);
        assert_eq!(warnings.next(at(100)), warning);
        assert_eq!(warnings.next(at(980)), None);
        terminated.store(true, Ordering::Relaxed);
        let end = draining(None, DrainCause::Terminated);
        assert_eq!(warnings.next(at(980)), end);
        assert_eq!(warnings.next(at(981)), None);
    }

    #[test]
    fn agents_outside_of_jobs_catch_nothing() {
        assert!(std::env::var_os(IN_JOB).is_none());
        let mut warnings = Warnings::catch().unwrap();
        assert!(!warnings.are_caught());
        assert_eq!(warnings.due_in(at(0)), None);
        assert_eq!(warnings.next(SystemTime::now()), None);
    }

    proptest! {
        #[test]
        fn the_margin_is_a_minute_or_a_quarter_of_the_rest(now in 0_u64..1 << 40, rest in 0_u64..1 << 20) {
            let margin = at(now + rest).duration_since(drain_at(at(now + rest), at(now))).unwrap();
            prop_assert_eq!(margin, MAX_MARGIN.min(Duration::from_secs(rest) / 4));
        }

        #[test]
        fn an_end_in_the_past_or_never_is_harmless(end: u64, now in 0_u64..1 << 40) {
            if let Some(end) = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(end)) {
                prop_assert!(drain_at(end, at(now)) <= end);
            }
        }
    }
}
