//! The number of cores that this process may use.
//!
//! The number follows `parallelly::availableCores()`, which R users know: the cores that the system
//! allows (affinity and control groups), or fewer if a scheduler or a test harness gave this job
//! fewer. This crate ignores the R option `mc.cores`: the R code takes the smaller of that option
//! and of [`usable_cores`] (parallel itself sets the option from `MC_CORES`).
//!
//! Never calls R; safe to call from any thread.

/// The number of cores this process may use, at least 1.
///
/// The smaller of the system's limit (CPU affinity and control group quotas) and the limit in the
/// environment variables of schedulers; see [`usable_cores_with`].
pub fn usable_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    // The fallback variables are meant for machines where nobody has set a limit.
    let limited = online_cores().is_some_and(|online| allowed < online);
    usable_cores_with(allowed, |name| {
        if limited && FALLBACK.contains(&name) {
            return None;
        }
        std::env::var(name).ok()
    })
}

const FALLBACK: [&str; 2] = [
    "R_PARALLELLY_AVAILABLECORES_FALLBACK",
    "R_FUTURE_AVAILABLECORES_FALLBACK",
];

/// The pure part of [`usable_cores`]. `system`: the cores that the system allows. `env`: the
/// environment.
///
/// The variables are those of `parallelly::availableCores()`, and the smallest number wins:
///
/// - Slurm: `SLURM_CPUS_PER_TASK`; else, on one node, `SLURM_CPUS_ON_NODE`; else, on several,
///   the first of `SLURM_TASKS_PER_NODE` (such as `4(x2),3`);
/// - PBS: `PBS_NUM_PPN`, else `NCPUS`; Grid Engine: `NSLOTS`; LSF: `LSB_DJOB_NUMPROC`;
///   PJM (Fujitsu): `PJM_VNODE_CORE`, else `PJM_PROC_BY_NODE`;
/// - `BIOCPARALLEL_WORKER_NUMBER`; at most 4 on Bioconductor's build machines
///   (`IS_BIOC_BUILD_MACHINE` true, or `BBS_HOME` set);
/// - at most 2 under `R CMD check --as-cran` (`_R_CHECK_LIMIT_CORES_` set and not false);
/// - if none of these is set, `R_PARALLELLY_AVAILABLECORES_FALLBACK`.
///
/// A variable whose value is not a number is ignored, and so is a number below 1, for which
/// parallelly fails. The result never exceeds `system`: a job that was given 8 slots by a scheduler
/// that does not enforce them still has only the machine's cores.
pub fn usable_cores_with(system: usize, env: impl Fn(&str) -> Option<String>) -> usize {
    let number = |name: &str| env(name).as_deref().and_then(parse_integer);
    let cores = |name: &str| number(name).and_then(positive);

    let limits = [
        slurm(&env),
        cores("PBS_NUM_PPN").or_else(|| cores("NCPUS")),
        cores("NSLOTS"),
        cores("LSB_DJOB_NUMPROC"),
        cores("PJM_VNODE_CORE").or_else(|| cores("PJM_PROC_BY_NODE")),
        cores("BIOCPARALLEL_WORKER_NUMBER"),
        bioconductor(&env),
        check_limit(&env),
    ];
    let limit = limits.into_iter().flatten().min();
    let limit = limit.or_else(|| FALLBACK.into_iter().find_map(cores));
    limit.map_or(system, |cores| cores.min(system)).max(1)
}

/// Reads text like R's `as.integer()`: trims blanks, cuts off decimals, accepts exponents and
/// hexadecimal numbers.
fn parse_integer(text: &str) -> Option<i64> {
    let text = text.trim();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let value = match digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
    {
        Some(hex) if hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            i64::from_str_radix(hex, 16).ok()?
        }
        Some(_) => return None,
        // The other texts that f64 accepts ("inf", "nan") start with a letter.
        None if digits.starts_with(|first: char| first.is_ascii_digit() || first == '.') => {
            let value = digits.parse::<f64>().ok()?;
            // R reads a number beyond the range of its integers as NA.
            if value > f64::from(i32::MAX) {
                return None;
            }
            value as i64
        }
        None => return None,
    };
    (value <= i64::from(i32::MAX)).then_some(sign * value)
}

fn positive(value: i64) -> Option<usize> {
    usize::try_from(value).ok().filter(|&value| value > 0)
}

fn slurm(env: &impl Fn(&str) -> Option<String>) -> Option<usize> {
    let number = |name: &str| env(name).as_deref().and_then(parse_integer);
    if let Some(cores) = number("SLURM_CPUS_PER_TASK") {
        return positive(cores);
    }
    let nodes = number("SLURM_JOB_NUM_NODES")
        .or_else(|| number("SLURM_NNODES"))
        .unwrap_or(1);
    if nodes == 1 {
        number("SLURM_CPUS_ON_NODE").and_then(positive)
    } else {
        first_count(&env("SLURM_TASKS_PER_NODE")?)
    }
}

/// The first number of Slurm's "4(x2),3", because the script runs on the job's first node. `None`
/// if any part of the text is invalid.
fn first_count(text: &str) -> Option<usize> {
    let mut first = None;
    for part in text.split(',') {
        let part: String = part.chars().filter(|c| !c.is_whitespace()).collect();
        if part.is_empty() {
            continue;
        }
        let count = match part.split_once("(x") {
            Some((count, times)) => {
                times.strip_suffix(')')?.parse::<u32>().ok()?;
                count
            }
            None => &part,
        };
        let count = count.parse::<u32>().ok()?;
        first = first.or(Some(count));
    }
    first.and_then(|count| positive(i64::from(count)))
}

/// Bioconductor's build machines allow at most four cores. `BBS_HOME` is the path of the build system,
/// so any path counts.
fn bioconductor(env: &impl Fn(&str) -> Option<String>) -> Option<usize> {
    let machine = env("IS_BIOC_BUILD_MACHINE")
        .is_some_and(|value| matches!(value.trim(), "T" | "TRUE" | "true" | "True"));
    let home = env("BBS_HOME")
        .is_some_and(|value| !matches!(value.trim(), "" | "F" | "FALSE" | "false" | "False"));
    (machine || home).then_some(4)
}

/// `R CMD check --as-cran` allows two cores, whatever the value of the variable ("TRUE", "warn",
/// "error").
fn check_limit(env: &impl Fn(&str) -> Option<String>) -> Option<usize> {
    let value = env("_R_CHECK_LIMIT_CORES_")?.to_lowercase();
    (!value.is_empty() && value != "false").then_some(2)
}

fn online_cores() -> Option<usize> {
    // SAFETY: sysconf only reads its argument.
    let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(online).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(system: usize, variables: &[(&str, &str)]) -> usize {
        usable_cores_with(system, |name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_variables_the_system_decides() {
        assert_eq!(with(16, &[]), 16);
        assert_eq!(with(1, &[]), 1);
        assert_eq!(with(0, &[]), 1);
    }

    #[test]
    fn the_variable_of_each_scheduler_is_read() {
        for name in [
            "SLURM_CPUS_PER_TASK",
            "SLURM_CPUS_ON_NODE",
            "PBS_NUM_PPN",
            "NCPUS",
            "NSLOTS",
            "LSB_DJOB_NUMPROC",
            "PJM_VNODE_CORE",
            "PJM_PROC_BY_NODE",
            "BIOCPARALLEL_WORKER_NUMBER",
            "R_PARALLELLY_AVAILABLECORES_FALLBACK",
            "R_FUTURE_AVAILABLECORES_FALLBACK",
        ] {
            assert_eq!(with(16, &[(name, "3")]), 3, "{name}");
            assert_eq!(with(16, &[(name, "15")]), 15, "{name}");
            assert_eq!(with(16, &[(name, "16")]), 16, "{name}");
            assert_eq!(with(16, &[(name, "17")]), 16, "{name}: more than there are");
        }
    }

    #[test]
    fn the_smallest_limit_wins() {
        assert_eq!(with(16, &[("NSLOTS", "8"), ("PBS_NUM_PPN", "4")]), 4);
        assert_eq!(
            with(16, &[("NSLOTS", "8"), ("_R_CHECK_LIMIT_CORES_", "TRUE")]),
            2
        );
    }

    #[test]
    fn invalid_values_are_ignored() {
        for value in [
            "",
            " ",
            "abc",
            "0",
            "-1",
            "-0",
            "0.5",
            "inf",
            "infinity",
            "nan",
            "NA",
            "TRUE",
            "3x",
            "3 4",
            "0x",
            "0xg",
            "0x-4",
            "--3",
            "+-3",
            "3000000000",
            "1e99",
            "0xffffffff",
            "99999999999999999999999",
            "\u{0663}",
            "%d",
        ] {
            for name in ["NSLOTS", "SLURM_CPUS_PER_TASK", "NCPUS"] {
                assert_eq!(with(16, &[(name, value)]), 16, "{name}={value:?}");
            }
        }
    }

    #[test]
    fn numbers_as_r_reads_them() {
        for (value, expected) in [
            (" 4 ", 4),
            ("\t4\n", 4),
            ("2.7", 2),
            ("1e1", 10),
            ("0x10", 16),
            ("+5", 5),
            ("007", 7),
        ] {
            assert_eq!(with(100, &[("NSLOTS", value)]), expected, "{value:?}");
        }
    }

    #[test]
    fn pbs_and_pjm_prefer_the_first() {
        assert_eq!(with(16, &[("PBS_NUM_PPN", "6"), ("NCPUS", "2")]), 6);
        assert_eq!(with(16, &[("PBS_NUM_PPN", "x"), ("NCPUS", "2")]), 2);
        assert_eq!(
            with(16, &[("PJM_VNODE_CORE", "6"), ("PJM_PROC_BY_NODE", "2")]),
            6
        );
    }

    #[test]
    fn slurm_by_number_of_nodes() {
        let on_node = ("SLURM_CPUS_ON_NODE", "6");
        let per_node = ("SLURM_TASKS_PER_NODE", "4(x2),3");
        assert_eq!(
            with(16, &[("SLURM_CPUS_PER_TASK", "2"), on_node, per_node]),
            2
        );
        assert_eq!(with(16, &[on_node, per_node]), 6);
        assert_eq!(
            with(16, &[("SLURM_JOB_NUM_NODES", "1"), on_node, per_node]),
            6
        );
        assert_eq!(
            with(16, &[("SLURM_JOB_NUM_NODES", "3"), on_node, per_node]),
            4
        );
        assert_eq!(with(16, &[("SLURM_NNODES", "3"), on_node, per_node]), 4);
        assert_eq!(with(16, &[("SLURM_JOB_NUM_NODES", "3"), on_node]), 16);
    }

    #[test]
    fn slurm_counts_by_node() {
        for (text, expected) in [
            ("3", Some(3)),
            ("3,4", Some(3)),
            ("3(x2)", Some(3)),
            (" 3 (x2) , 4", Some(3)),
            (",5", Some(5)),
            ("", None),
            ("x", None),
            ("3,x", None),
            ("3(x)", None),
            ("3(x2", None),
            ("(x2)", None),
            ("0", None),
            ("-2", None),
        ] {
            assert_eq!(first_count(text), expected, "{text:?}");
        }
    }

    #[test]
    fn bioconductor_build_machines_get_four_cores() {
        for value in ["TRUE", "true", "T"] {
            assert_eq!(with(16, &[("IS_BIOC_BUILD_MACHINE", value)]), 4);
        }
        for value in ["FALSE", "", "no"] {
            assert_eq!(with(16, &[("IS_BIOC_BUILD_MACHINE", value)]), 16);
        }
        assert_eq!(with(16, &[("BBS_HOME", "/home/biocbuild/BBS")]), 4);
        assert_eq!(with(16, &[("BBS_HOME", "")]), 16);
        assert_eq!(with(3, &[("BBS_HOME", "/x")]), 3);
    }

    #[test]
    fn r_cmd_check_gets_two_cores() {
        for value in ["TRUE", "true", "warn", "error", "1"] {
            assert_eq!(with(16, &[("_R_CHECK_LIMIT_CORES_", value)]), 2);
        }
        for value in ["FALSE", "false", ""] {
            assert_eq!(with(16, &[("_R_CHECK_LIMIT_CORES_", value)]), 16);
        }
    }

    #[test]
    fn the_fallback_counts_only_if_no_other_variable_is_set() {
        let fallback = ("R_PARALLELLY_AVAILABLECORES_FALLBACK", "1");
        assert_eq!(with(16, &[fallback]), 1);
        assert_eq!(with(16, &[fallback, ("NSLOTS", "4")]), 4);
        assert_eq!(with(16, &[fallback, ("NSLOTS", "junk")]), 1);
    }

    #[test]
    fn this_machine_has_cores() {
        let cores = usable_cores();
        assert!(cores >= 1);
        assert!(cores <= std::thread::available_parallelism().map_or(1, usize::from));
    }
}
