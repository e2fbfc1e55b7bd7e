//! A cheap monotonic clock, and the CPU time of this process.

use std::time::Duration;

/// Reads a monotonic clock with the resolution of the kernel's tick, a few milliseconds. A read costs next to
/// nothing.
pub fn coarse_now() -> Duration {
    const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC_COARSE;
    // SAFETY: all zeroes are a valid timespec, which the call fills.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(CLOCK, &raw mut time);
        time
    };
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
    seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// CPU usage of this process.
#[derive(Clone, Copy, Debug)]
pub struct CpuUsage {
    /// CPU time, summed over all cores.
    pub computing: Duration,
    /// Number of voluntary context switches: how often the process gave up its core to wait.
    pub waits: i64,
}

impl CpuUsage {
    /// CPU usage of this process until now.
    pub fn now() -> CpuUsage {
        // SAFETY: all zeroes are a valid rusage, which the call fills.
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
                reason = "a long has 32 bits on some systems"
            )]
            waits: usage.ru_nvcsw.into(),
        }
    }

    /// CPU time of this process since then. `None` if the process has waited for anything since.
    pub fn computed(&self) -> Option<Duration> {
        let now = CpuUsage::now();
        (now.waits == self.waits).then(|| now.computing.saturating_sub(self.computing))
    }
}
