//! The memory of this host that this process may use, and the detection of out-of-memory kills.
//!
//! Never calls R; safe to call from any thread.

use super::cgroup::{self, Version};

/// The memory of this host that this process may use, in bytes: `(total, available)`.
///
/// The numbers come from /proc/meminfo and are capped by the limits of the process's control groups (v2 and
/// v1). `None` where there is no /proc/meminfo.
pub fn host_memory() -> Option<(u64, u64)> {
    let meminfo = parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = cgroup::directories("memory").into_iter().map(|level| {
        let at = &level.directory;
        let (limit, current, cache) = match level.version {
            Version::V2 => ("memory.max", "memory.current", "inactive_file"),
            Version::V1 => (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
        };
        MemoryGroup {
            limit: cgroup::read_number(at, limit),
            current: cgroup::read_number(at, current),
            reclaimable: cgroup::read_field(at, "memory.stat", cache),
        }
    });
    Some(restrict_memory(meminfo, groups))
}

/// Detects whether a process was killed by the kernel's out-of-memory killer, which uses SIGKILL and counts
/// its kills.
#[derive(Debug)]
pub struct OutOfMemory {
    /// The kernel's count when it was last read.
    seen: Option<u64>,
    /// Counted kills that no killed process has been matched with yet. The kernel may kill several processes
    /// before the first is examined.
    unclaimed: u64,
}

impl OutOfMemory {
    /// Starts counting: earlier kills are ignored.
    pub fn start_counting() -> OutOfMemory {
        OutOfMemory {
            seen: oom_kills(),
            unclaimed: 0,
        }
    }

    /// Whether a process that was killed by SIGKILL from outside was probably killed by the out-of-memory
    /// killer.
    pub fn explains_kill(&mut self) -> bool {
        self.explains(oom_kills(), host_memory())
    }

    fn explains(&mut self, count: Option<u64>, memory: Option<(u64, u64)>) -> bool {
        if let (Some(seen), Some(count)) = (self.seen, count) {
            self.unclaimed += count.saturating_sub(seen);
        }
        self.seen = count.or(self.seen);
        let counted = self.unclaimed > 0;
        self.unclaimed = self.unclaimed.saturating_sub(1);
        // Low memory is the fallback where kills are not counted, or the process was in another group.
        counted || memory.is_some_and(|(total, available)| available < total / 50)
    }
}

/// Number of out-of-memory kills in the group of our processes.
fn oom_kills() -> Option<u64> {
    let groups = cgroup::directories("memory").into_iter().map(|level| {
        let file = match level.version {
            Version::V2 => "memory.events",
            Version::V1 => "memory.oom_control",
        };
        cgroup::read_field(&level.directory, file, OOM_KILL)
    });
    let vmstat = || std::fs::read_to_string("/proc/vmstat").ok();
    oom_kills_from(groups, vmstat)
}

const OOM_KILL: &str = "oom_kill";

/// Uses the innermost group that has a count, which is the group of our processes. It counts their kills,
/// and in v2 those in the groups below, whichever group's limit was exceeded; the groups above would add the
/// kills of other processes. The count of the whole machine is the fallback.
fn oom_kills_from(
    mut groups: impl Iterator<Item = Option<u64>>,
    vmstat: impl FnOnce() -> Option<String>,
) -> Option<u64> {
    groups
        .find_map(|count| count)
        .or_else(|| cgroup::field(&vmstat()?, OOM_KILL))
}

/// The memory values of one level of the control groups.
#[derive(Clone, Copy, Debug, Default)]
struct MemoryGroup {
    limit: Option<u64>,
    current: Option<u64>,
    /// Page cache, which counts as used, but is reclaimed when memory is needed.
    reclaimable: Option<u64>,
}

/// Total and available bytes from the text of /proc/meminfo.
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let bytes = |name| line_bytes(text, name);
    let total = bytes("MemTotal:")?;
    // Kernels before 3.14 have no MemAvailable; free memory and page cache approximate it.
    let available = bytes("MemAvailable:").or_else(|| {
        let cache = bytes("Buffers:").unwrap_or(0) + bytes("Cached:").unwrap_or(0);
        Some(bytes("MemFree:")? + cache)
    })?;
    Some((total, available.min(total)))
}

/// Caps the memory of the host by the limits of the groups. A group without a limit restricts nothing: v1
/// writes "no limit" as a number near 2^63, which exceeds any machine's memory and so needs no special case.
fn restrict_memory(
    (mut total, mut available): (u64, u64),
    groups: impl Iterator<Item = MemoryGroup>,
) -> (u64, u64) {
    for group in groups {
        let Some(limit) = group.limit else { continue };
        total = total.min(limit);
        let used = group.current.unwrap_or(0);
        let used = used.saturating_sub(group.reclaimable.unwrap_or(0));
        available = available.min(limit.saturating_sub(used));
    }
    (total, available)
}

/// Reads the bytes from a line of a file in /proc, such as "VmRSS:   123 kB".
pub fn line_bytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let mut words = rest.split_whitespace();
    let kilobytes: u64 = words.next()?.parse().ok()?;
    words.next().filter(|&suffix| suffix == "kB")?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_counted_in_the_innermost_group() {
        let vmstat = || Some("nr_free_pages 5\noom_kill 9\n".to_owned());
        let none = || -> Option<String> { None };
        assert_eq!(
            oom_kills_from([None, Some(3), Some(7)].into_iter(), vmstat),
            Some(3)
        );
        assert_eq!(oom_kills_from([None, None].into_iter(), vmstat), Some(9));
        assert_eq!(oom_kills_from([].into_iter(), none), None);
        assert_eq!(
            oom_kills_from([].into_iter(), || Some("oom_kill x".into())),
            None
        );
        let events = "low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(cgroup::field(events, OOM_KILL), Some(1));
        let control = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n";
        assert_eq!(cgroup::field(control, OOM_KILL), Some(4));
        // Kernels before 4.13.
        assert_eq!(
            cgroup::field("oom_kill_disable 0\nunder_oom 0\n", OOM_KILL),
            None
        );
    }

    #[test]
    fn a_kill_is_explained_by_a_counted_kill_or_by_low_memory() {
        let plenty = Some((1000, 500));
        let mut memory = OutOfMemory {
            seen: Some(3),
            unclaimed: 0,
        };
        assert!(!memory.explains(Some(3), plenty));
        // Two kills at once explain two processes.
        assert!(memory.explains(Some(5), plenty));
        assert!(memory.explains(Some(5), plenty));
        assert!(!memory.explains(Some(5), plenty));
        assert!(memory.explains(Some(5), Some((1000, 19))));
        assert!(!memory.explains(Some(5), Some((1000, 20))));
        assert!(!memory.explains(None, None));
        assert!(memory.explains(Some(6), None));
        // A count that falls belongs to another group.
        assert!(!memory.explains(Some(0), plenty));
        assert!(memory.explains(Some(1), plenty));
        let mut unknown = OutOfMemory {
            seen: None,
            unclaimed: 0,
        };
        assert!(!unknown.explains(Some(8), plenty));
        assert!(unknown.explains(Some(9), plenty));
    }

    const MEMINFO: &str = "MemTotal:       1000 kB\nMemFree:         200 kB\n\
        MemAvailable:    700 kB\nBuffers:          50 kB\nCached:          100 kB\n";

    #[test]
    fn meminfo() {
        assert_eq!(parse_meminfo(MEMINFO), Some((1_024_000, 716_800)));
        let old = MEMINFO.replace("MemAvailable", "Other");
        assert_eq!(parse_meminfo(&old), Some((1_024_000, 350 * 1024)));
        for text in [
            "",
            "MemTotal:",
            "MemTotal: x kB\nMemAvailable: 1 kB",
            "MemTotal: 10\nMemAvailable: 1",
            "MemTotal: 10 kB\n",
            "MemTotal: 99999999999999999999 kB\nMemAvailable: 1 kB",
            "MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB",
            "XMemTotal: 10 kB\nMemAvailable: 1 kB",
        ] {
            assert_eq!(parse_meminfo(text), None, "{text:?}");
        }
    }

    #[test]
    fn groups_restrict_memory() {
        let group = |limit, current, reclaimable| MemoryGroup {
            limit,
            current,
            reclaimable,
        };
        let restrict =
            |groups: &[MemoryGroup]| restrict_memory((1000, 700), groups.iter().copied());
        assert_eq!(restrict(&[]), (1000, 700));
        assert_eq!(restrict(&[group(None, Some(999), None)]), (1000, 700));
        assert_eq!(
            restrict(&[group(Some(1 << 62), Some(9), None)]),
            (1000, 700)
        );
        assert_eq!(restrict(&[group(Some(500), Some(100), None)]), (500, 400));
        assert_eq!(
            restrict(&[group(Some(500), Some(100), Some(60))]),
            (500, 460)
        );
        assert_eq!(restrict(&[group(Some(500), Some(600), None)]), (500, 0));
        assert_eq!(restrict(&[group(Some(500), None, None)]), (500, 500));
        // The tightest level of the path counts, whichever it is.
        let levels = [
            group(Some(900), Some(850), None),
            group(Some(400), Some(100), None),
        ];
        assert_eq!(restrict(&levels), (400, 50));
    }

    #[test]
    fn this_machine_has_memory() {
        let (total, available) = host_memory().expect("/proc/meminfo");
        assert!(available > 0 && available <= total);
    }
}
