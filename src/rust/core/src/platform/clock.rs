//! Time that is cheap to ask for, and the time that this process has computed.

use std::time::Duration;

/// A time that is never set back, in the steps of the kernel's own clock, some milliseconds: asking for
/// it costs next to nothing.
pub fn coarse_now() -> Duration {
    const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC_COARSE;
    // SAFETY: all zeroes are a timespec, which the call fills.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(CLOCK, &raw mut time);
        time
    };
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
    seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// What this process has had of its cores.
#[derive(Clone, Copy, Debug)]
pub struct CpuUsage {
    /// For how long it has had one, or several at a time.
    pub computing: Duration,
    /// How often it has given up its core to wait for something.
    pub waits: i64,
}

impl CpuUsage {
    /// What this process has had until now.
    pub fn now() -> CpuUsage {
        // SAFETY: all zeroes are a rusage, and the call fills it.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
            usage
        };
        let duration = |time: libc::timeval| {
            let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
            seconds + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
        };
        CpuUsage {
            computing: duration(usage.ru_utime) + duration(usage.ru_stime),
            #[allow(
                clippy::useless_conversion,
                reason = "a long is of 32 bits on some systems"
            )]
            waits: usage.ru_nvcsw.into(),
        }
    }

    /// For how long this process has been computing since then, if it has not waited for anything.
    pub fn computed(&self) -> Option<Duration> {
        let now = CpuUsage::now();
        (now.waits == self.waits).then(|| now.computing.saturating_sub(self.computing))
    }
}
