//! Checks whether the system's limits allow a number of workers, before anything is started.
//!
//! A limit that is met half-way through a start shows as an obscure failure of some fork or pipe,
//! with hundreds of processes to take down again. So each limit is read beforehand, and the first
//! that is too small is reported with the number needed, the number available, and a remedy.
//! A limit that cannot be read counts as sufficient: the check never refuses a start that might work.
//!
//! Never calls R; safe to call from any thread.

use crate::platform::cgroup;
use crate::platform::fd;
use crate::platform::memory::line_bytes;
use std::io;

/// Descriptors that the agent needs for each worker: the agent's end of the worker's stream, and the
/// worker's output.
const FILES_PER_WORKER: u64 = 2;
/// Descriptors that the agent needs besides: standard streams, poll, signals, cached blobs, R's own.
const FILES_RESERVE: u64 = 64;
/// Bytes of address space that the head or an agent needs for itself: a reserve, threads' stacks, buffers.
const ADDRESS_SPACE: u64 = 32 << 20;
/// Processes and threads besides the workers: the agent, its guard, the hub's thread, and some spare
/// ones for other programs that the user starts meanwhile.
const PROCESSES_RESERVE: u64 = 16;

/// A limit of the system that is too small for the requested workers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not enough {what}: {needed} needed, {available} available; {remedy}")]
pub struct Shortfall {
    /// The limited resource, for example "open files" or "processes".
    pub what: &'static str,
    /// The amount that the workers need.
    pub needed: u64,
    /// The amount that is available.
    pub available: u64,
    /// What the user can do about it.
    pub remedy: String,
}

/// A limit and its current use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The maximum.
    pub limit: u64,
    /// The amount in use.
    pub used: u64,
}

impl Room {
    /// The amount that is left.
    pub fn left(self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// The known limits of a system. `None` means unknown or unlimited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemLimits {
    /// Open files of a process: the hard limit, or the value to which a privileged process may raise
    /// the hard limit.
    pub open_files: Option<u64>,
    /// Processes and threads of this user (RLIMIT_NPROC); `None` for users who are exempt.
    pub user_processes: Option<Room>,
    /// Processes and threads of each control group this process is in, innermost first.
    pub group_processes: Vec<Room>,
    /// Process numbers of the system (kernel.pid_max).
    pub pids: Option<Room>,
    /// Threads of the system (kernel.threads-max).
    pub threads: Option<Room>,
    /// Bytes of address space of this process (RLIMIT_AS).
    pub address_space: Option<Room>,
}

impl SystemLimits {
    /// Reads the limits of this system and their current use.
    pub fn now() -> SystemLimits {
        platform::limits()
    }
}

/// Checks whether the known limits of this system allow `workers` more workers.
///
/// # Errors
/// The first limit that is too small.
pub fn check(workers: usize) -> Result<(), Shortfall> {
    check_with(&SystemLimits::now(), workers)
}

/// The pure part of [`check`].
///
/// # Errors
/// The first limit that is too small.
pub fn check_with(limits: &SystemLimits, workers: usize) -> Result<(), Shortfall> {
    let files = open_files_needed(workers);
    if let Some(available) = limits.open_files.filter(|&available| available < files) {
        return Err(Shortfall {
            what: "open files",
            needed: files,
            available,
            remedy: "raise the hard limit of open files (ulimit -Hn, nofile in \
                     /etc/security/limits.conf), or start fewer workers"
                .to_owned(),
        });
    }

    let needed = (workers as u64).saturating_add(PROCESSES_RESERVE);
    let processes = |room: &Room, remedy: &str| {
        if room.left() >= needed {
            return Ok(());
        }
        Err(Shortfall {
            what: "processes",
            needed,
            available: room.left(),
            remedy: format!(
                "{} of {} are in use: {remedy}, or start fewer workers",
                room.used, room.limit
            ),
        })
    };
    if let Some(room) = &limits.user_processes {
        processes(
            room,
            "raise the user's limit of processes (ulimit -u, nproc in /etc/security/limits.conf)",
        )?;
    }
    for room in &limits.group_processes {
        processes(
            room,
            "raise pids.max of the control group (TasksMax in systemd, --pids-limit in containers)",
        )?;
    }
    if let Some(room) = &limits.pids {
        processes(room, "raise the kernel's limit (sysctl kernel.pid_max)")?;
    }
    if let Some(room) = &limits.threads {
        processes(room, "raise the kernel's limit (sysctl kernel.threads-max)")?;
    }
    let short = |room: &Room| room.left() < ADDRESS_SPACE;
    if let Some(room) = limits.address_space.filter(short) {
        return Err(Shortfall {
            what: "MB of address space",
            needed: ADDRESS_SPACE >> 20,
            available: room.left() >> 20,
            remedy: format!(
                "{} of {} MB are in use: raise the limit of virtual memory (ulimit -v)",
                room.used >> 20,
                room.limit >> 20
            ),
        });
    }
    Ok(())
}

/// Number of open files that an agent with `workers` workers needs.
pub fn open_files_needed(workers: usize) -> u64 {
    (workers as u64)
        .saturating_mul(FILES_PER_WORKER)
        .saturating_add(FILES_RESERVE)
}

/// Raises this process's soft limit of open files to `needed`, or as far as permitted, and returns the
/// limit. The limit is never lowered, and not raised beyond `needed`: a process that passes descriptors
/// above 1023 to select() fails, and children inherit the limit.
///
/// # Errors
/// The errors of getrlimit and setrlimit.
pub fn raise_open_files(needed: u64) -> io::Result<u64> {
    platform::raise_open_files(needed)
}

/// Number of further files that this process may open, if it can be read.
pub fn open_files_left() -> Option<u64> {
    let open = std::fs::read_dir("/dev/fd").ok()?.count() as u64;
    let limit = raise_open_files(0).ok()?;
    Some(Room { limit, used: open }.left())
}

/// Limits the private writable memory of this process (heap and data, whether used or not) to `bytes`:
/// allocations beyond the limit fail. Only Linux enforces it.
///
/// # Errors
/// The errors of getrlimit and setrlimit.
pub fn limit_memory(bytes: u64) -> io::Result<()> {
    platform::limit_memory(bytes)
}

/// Whether the file size limit of this process allows a file of `bytes` bytes.
pub fn may_make_file(bytes: u64) -> bool {
    platform::soft_limit(libc::RLIMIT_FSIZE).is_none_or(|max| bytes <= max)
}

/// The memory limits of this process, as the end of a sentence that says that no memory is left. Empty if
/// there are no limits.
pub fn memory_limits() -> String {
    let names = [
        ("ulimit -v", libc::RLIMIT_AS),
        ("ulimit -d", libc::RLIMIT_DATA),
    ];
    let limits = names.into_iter().filter_map(|(name, which)| {
        let limit = platform::soft_limit(which)?;
        Some(format!("{name}: {} MB", limit >> 20))
    });
    match limits.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => none,
        limits => format!(" (its limits: {limits})"),
    }
}

/// Bytes of this process that count towards [`limit_memory`], if they can be read.
pub fn memory_counted() -> Option<u64> {
    parse_counted(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The pure part of [`memory_counted`], from the text of /proc/self/status.
fn parse_counted(status: &str) -> Option<u64> {
    line_bytes(status, "VmData:")
}

mod platform {
    use super::{Room, SystemLimits, cgroup, fd, io, line_bytes};
    use std::fs;
    use std::path::Path;

    pub(super) fn limit_memory(bytes: u64) -> io::Result<()> {
        let mut limit = get(libc::RLIMIT_DATA)?;
        // An existing hard limit cannot be exceeded.
        limit.rlim_max = limit.rlim_max.min(bytes as libc::rlim_t);
        limit.rlim_cur = limit.rlim_max.min(limit.rlim_cur);
        set(libc::RLIMIT_DATA, limit)
    }

    pub(super) fn limits() -> SystemLimits {
        let mut limits = SystemLimits {
            open_files: get(libc::RLIMIT_NOFILE)
                .ok()
                .and_then(|limit| finite(limit.rlim_max)),
            ..SystemLimits::default()
        };
        linux_limits(&mut limits, Path::new("/proc"));
        limits
    }

    /// Completes `limits` with the values that are read from `proc`.
    pub(super) fn linux_limits(limits: &mut SystemLimits, proc: &Path) {
        let number = |path: &str| -> Option<u64> {
            fs::read_to_string(proc.join(path))
                .ok()?
                .trim()
                .parse()
                .ok()
        };
        let status = fs::read_to_string(proc.join("self/status")).unwrap_or_default();
        let users = fs::read_to_string(proc.join("self/uid_map"));
        // Root and capabilities inside a user namespace (a rootless container) do not lift limits.
        let genuine = users.map_or(true, |map| maps_all_users(&map));
        let capabilities = if genuine {
            Capabilities::parse(&status)
        } else {
            Capabilities::default()
        };

        if capabilities.resource {
            // A privileged process may raise its own hard limit up to the kernel's maximum.
            limits.open_files = match (limits.open_files, number("sys/fs/nr_open")) {
                (Some(hard), Some(max)) => Some(hard.max(max)),
                _ => None,
            };
        }
        let used = line_bytes(&status, "VmSize:");
        limits.address_space = soft_limit(libc::RLIMIT_AS)
            .zip(used)
            .map(|(limit, used)| Room { limit, used });
        // SAFETY: getuid has no arguments and cannot fail.
        let user = unsafe { libc::getuid() };
        let exempt = capabilities.resource || capabilities.admin || (genuine && user == 0);
        // fork() checks the soft limit, which is not raised because packages on workers expect it
        // unchanged.
        let limit = soft_limit(libc::RLIMIT_NPROC);
        if let (false, Some(limit)) = (exempt, limit) {
            limits.user_processes = tasks_of(proc, user).map(|used| Room { limit, used });
        }

        for level in cgroup::directories("pids") {
            let limit = cgroup::read_number(&level.directory, "pids.max");
            let used = cgroup::read_number(&level.directory, "pids.current");
            if let (Some(limit), Some(used)) = (limit, used) {
                limits.group_processes.push(Room { limit, used });
            }
        }

        // Threads also use process ids, so one count serves both limits.
        let used = fs::read_to_string(proc.join("loadavg"))
            .ok()
            .as_deref()
            .and_then(tasks_in_loadavg);
        let room = |path: &str| {
            Some(Room {
                limit: number(path)?,
                used: used?,
            })
        };
        limits.pids = room("sys/kernel/pid_max");
        limits.threads = room("sys/kernel/threads-max");
    }

    /// Number of all tasks of the system, from the fourth field of /proc/loadavg, "running/all".
    pub(super) fn tasks_in_loadavg(text: &str) -> Option<u64> {
        let (_, all) = text.split_whitespace().nth(3)?.split_once('/')?;
        all.parse().ok()
    }

    /// Whether the text of /proc/self/uid_map describes the initial user namespace.
    pub(super) fn maps_all_users(map: &str) -> bool {
        map.split_whitespace().eq(["0", "0", "4294967295"])
    }

    #[derive(Debug, Default, PartialEq, Eq)]
    pub(super) struct Capabilities {
        /// CAP_SYS_RESOURCE
        pub(super) resource: bool,
        /// CAP_SYS_ADMIN
        pub(super) admin: bool,
    }

    impl Capabilities {
        /// Parses the text of /proc/self/status.
        pub(super) fn parse(status: &str) -> Capabilities {
            let set = status
                .lines()
                .find_map(|line| line.strip_prefix("CapEff:"))
                .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
                .unwrap_or(0);
            Capabilities {
                resource: set & (1 << 24) != 0,
                admin: set & (1 << 21) != 0,
            }
        }
    }

    /// Number of processes and threads of a user. A user's own processes are listed even if /proc is mounted
    /// with hidepid.
    fn tasks_of(proc: &Path, user: u32) -> Option<u64> {
        let tasks = fs::read_dir(proc)
            .ok()?
            .flatten()
            .filter(|entry| {
                let name = entry.file_name();
                name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
            })
            // A process that has ended meanwhile cannot be read and does not count.
            .filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok())
            .filter_map(|status| user_and_threads(&status))
            .filter(|&(owner, _)| owner == user)
            .map(|(_, threads)| threads)
            .sum();
        Some(tasks)
    }

    /// The real user id, by which RLIMIT_NPROC counts, and the number of threads, from the status of a
    /// process.
    pub(super) fn user_and_threads(status: &str) -> Option<(u32, u64)> {
        let first = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))?
                .split_whitespace()
                .next()
        };
        Some((
            first("Uid:")?.parse().ok()?,
            first("Threads:")?.parse().ok()?,
        ))
    }

    fn finite(limit: libc::rlim_t) -> Option<u64> {
        #[allow(
            clippy::unnecessary_cast,
            reason = "rlim_t is narrower than u64 on some 32-bit systems"
        )]
        (limit != libc::RLIM_INFINITY).then_some(limit as u64)
    }

    #[cfg(target_env = "gnu")]
    type Resource = libc::__rlimit_resource_t;
    #[cfg(not(target_env = "gnu"))]
    type Resource = libc::c_int;

    /// Reads a soft limit. `None` if there is no limit.
    pub(super) fn soft_limit(which: Resource) -> Option<u64> {
        get(which).ok().and_then(|limit| finite(limit.rlim_cur))
    }

    fn get(which: Resource) -> io::Result<libc::rlimit> {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the pointer refers to a live rlimit, which the call fills.
        fd::check(unsafe { libc::getrlimit(which, &raw mut limit) })?;
        Ok(limit)
    }

    fn set(which: Resource, limit: libc::rlimit) -> io::Result<()> {
        // SAFETY: the pointer refers to a live rlimit, which the call only reads.
        fd::check(unsafe { libc::setrlimit(which, &raw const limit) }).map(drop)
    }

    pub(super) fn raise_open_files(needed: u64) -> io::Result<u64> {
        let limit = get(libc::RLIMIT_NOFILE)?;
        let soft = finite(limit.rlim_cur).unwrap_or(u64::MAX);
        if soft >= needed {
            return Ok(soft);
        }
        let wanted = libc::rlim_t::try_from(needed).unwrap_or(libc::RLIM_INFINITY);
        if wanted > limit.rlim_max {
            // Only privileged processes may raise the hard limit.
            let both = libc::rlimit {
                rlim_cur: wanted,
                rlim_max: wanted,
            };
            if set(libc::RLIMIT_NOFILE, both).is_ok() {
                return Ok(needed);
            }
        }
        let reachable = libc::rlimit {
            rlim_cur: wanted.min(limit.rlim_max),
            rlim_max: limit.rlim_max,
        };
        set(libc::RLIMIT_NOFILE, reachable)?;
        Ok(finite(reachable.rlim_cur).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(limit: u64, used: u64) -> Option<Room> {
        Some(Room { limit, used })
    }

    #[test]
    fn counted_memory_is_read_from_status() {
        let status = "Name:\tR\nVmData:\t   51200 kB\nVmStk:\t 132 kB\n";
        assert_eq!(parse_counted(status), Some(51200 * 1024));
        for status in [
            "",
            "VmData:\n",
            "VmData:\t x kB\n",
            "VmData:\t 5\n",
            "VmStk:\t 5 kB\n",
        ] {
            assert_eq!(parse_counted(status), None, "{status:?}");
        }
        assert!(memory_counted().is_some());
    }

    #[test]
    fn unknown_limits_count_as_sufficient() {
        for workers in [0, 1, 1_000_000, usize::MAX] {
            assert_eq!(check_with(&SystemLimits::default(), workers), Ok(()));
        }
    }

    #[test]
    fn open_files_are_checked_on_both_sides_of_the_limit() {
        let limits = |open_files| SystemLimits {
            open_files: Some(open_files),
            ..SystemLimits::default()
        };
        assert_eq!(open_files_needed(100), 264);
        assert_eq!(check_with(&limits(264), 100), Ok(()));
        let short = check_with(&limits(263), 100).unwrap_err();
        assert_eq!(
            (short.what, short.needed, short.available),
            ("open files", 264, 263)
        );
        assert!(short.remedy.contains("ulimit -Hn"));
    }

    #[test]
    fn processes_are_checked_on_both_sides_of_each_limit() {
        type Set = fn(&mut SystemLimits, Room);
        let cases: [(Set, &str); 4] = [
            (
                |limits, room| limits.user_processes = Some(room),
                "ulimit -u",
            ),
            (|limits, room| limits.group_processes.push(room), "pids.max"),
            (|limits, room| limits.pids = Some(room), "kernel.pid_max"),
            (
                |limits, room| limits.threads = Some(room),
                "kernel.threads-max",
            ),
        ];
        for (set, remedy) in cases {
            let check = |limit| {
                let mut limits = SystemLimits::default();
                set(&mut limits, Room { limit, used: 50 });
                check_with(&limits, 100)
            };
            assert_eq!(check(166), Ok(()), "{remedy}");
            let short = check(165).unwrap_err();
            assert_eq!(
                (short.what, short.needed, short.available),
                ("processes", 116, 115),
                "{remedy}"
            );
            assert!(short.remedy.contains(remedy), "{}", short.remedy);
            assert!(short.remedy.contains("50 of 165"), "{}", short.remedy);
        }
    }

    #[test]
    fn address_space_is_checked_on_both_sides_of_the_limit() {
        let check = |used| {
            let limit = 500 << 20;
            let address_space = Some(Room { limit, used });
            let limits = SystemLimits {
                address_space,
                ..SystemLimits::default()
            };
            check_with(&limits, 100)
        };
        assert_eq!(check(468 << 20), Ok(()));
        let short = check(469 << 20).unwrap_err();
        assert_eq!((short.needed, short.available), (32, 31));
        assert!(short.remedy.contains("ulimit -v"), "{}", short.remedy);
    }

    #[test]
    fn every_group_of_the_path_counts() {
        let wide = Room {
            limit: 9000,
            used: 0,
        };
        let narrow = Room { limit: 20, used: 9 };
        for groups in [vec![wide, narrow], vec![narrow, wide]] {
            let limits = SystemLimits {
                group_processes: groups,
                ..SystemLimits::default()
            };
            assert_eq!(check_with(&limits, 100).unwrap_err().available, 11);
        }
    }

    #[test]
    fn more_used_than_allowed_leaves_none() {
        let limits = SystemLimits {
            user_processes: room(10, 20),
            ..SystemLimits::default()
        };
        assert_eq!(check_with(&limits, 1).unwrap_err().available, 0);
    }

    #[test]
    fn huge_numbers_do_not_overflow() {
        let limits = SystemLimits {
            open_files: Some(1000),
            pids: room(u64::MAX, 0),
            ..SystemLimits::default()
        };
        let short = check_with(&limits, usize::MAX).unwrap_err();
        assert_eq!((short.needed, short.available), (u64::MAX, 1000));
    }

    #[test]
    fn a_shortfall_reads_as_a_sentence() {
        let short = Shortfall {
            what: "open files",
            needed: 264,
            available: 100,
            remedy: "start fewer".to_owned(),
        };
        assert_eq!(
            short.to_string(),
            "not enough open files: 264 needed, 100 available; start fewer"
        );
    }

    #[test]
    fn the_limits_of_this_machine_allow_a_worker() {
        assert_eq!(check(1), Ok(()));
    }

    mod unix {
        use super::super::platform::{
            Capabilities, linux_limits, maps_all_users, tasks_in_loadavg, user_and_threads,
        };
        use super::super::*;
        use std::fs;

        #[test]
        fn raising_open_files_never_lowers_and_never_fails_below_the_hard_limit() {
            let before = raise_open_files(0).unwrap();
            assert_eq!(raise_open_files(before).unwrap(), before);
            assert!(raise_open_files(before.saturating_sub(1)).unwrap() >= before);
            let max = SystemLimits::now().open_files.unwrap_or(u64::MAX);
            if before < max {
                assert_eq!(raise_open_files(before + 1).unwrap(), before + 1);
            }
        }

        #[test]
        fn user_namespaces() {
            assert!(maps_all_users("         0          0 4294967295\n"));
            for map in ["", "0 1000 1\n", "0 1000 1\n1 100000 65536\n"] {
                assert!(!maps_all_users(map), "{map:?}");
            }
        }

        #[test]
        fn loadavg() {
            assert_eq!(tasks_in_loadavg("0.00 0.01 0.05 2/83 5037\n"), Some(83));
            for text in ["", "0.00 0.01 0.05", "0 0 0 2 5037", "0 0 0 2/x 5037"] {
                assert_eq!(tasks_in_loadavg(text), None, "{text:?}");
            }
        }

        #[test]
        fn status() {
            let status = "Name:\tR\nUid:\t1000\t0\t0\t0\nThreads:\t3\nCapEff:\t0000000001000000\n";
            assert_eq!(user_and_threads(status), Some((1000, 3)));
            assert_eq!(user_and_threads("Uid:\nThreads:\t1\n"), None);
            assert_eq!(user_and_threads("Uid:\t1\n"), None);
            assert_eq!(user_and_threads(""), None);
            let parsed = |text| {
                let found = Capabilities::parse(text);
                (found.resource, found.admin)
            };
            assert_eq!(parsed(status), (true, false));
            assert_eq!(parsed("CapEff:\t0000000000200000\n"), (false, true));
            assert_eq!(parsed("CapEff:\tzz\n"), (false, false));
            assert_eq!(parsed(""), (false, false));
        }

        #[test]
        fn an_empty_proc_is_unknown() {
            let proc =
                std::env::temp_dir().join(format!("rustcluster-proc-{}", std::process::id()));
            fs::create_dir_all(proc.join("sys/kernel")).unwrap();
            let mut limits = SystemLimits::default();
            linux_limits(&mut limits, &proc);
            assert_eq!((limits.pids, limits.threads), (None, None));

            fs::write(proc.join("loadavg"), "0 0 0 1/83 9\n").unwrap();
            fs::write(proc.join("sys/kernel/pid_max"), "32768\n").unwrap();
            fs::write(proc.join("sys/kernel/threads-max"), "junk\n").unwrap();
            linux_limits(&mut limits, &proc);
            assert_eq!(limits.pids.unwrap().left(), 32768 - 83);
            assert_eq!(limits.threads, None);
            fs::remove_dir_all(&proc).unwrap();
        }
    }
}
