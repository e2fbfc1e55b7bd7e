//! Finds the control groups of this process and reads their values.
//!
//! The module supports v2 (one tree), v1 (one tree per controller), and machines with both. The limit
//! of a group applies to all groups below it, so a reader has to check the process's own group and
//! each of its parents: [`directories`] lists them all.
//!
//! Never calls R; safe to call from any thread.

use std::fs;
use std::path::{Path, PathBuf};

/// One level of the hierarchy. The version decides how its files are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Level {
    pub(crate) directory: PathBuf,
    pub(crate) version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V1,
    V2,
}

/// The directories of this process's groups for `controller` ("memory", "pids"), in both versions,
/// innermost first.
pub(crate) fn directories(controller: &str) -> Vec<Level> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    directories_from(
        &read("/proc/self/cgroup"),
        &read("/proc/self/mountinfo"),
        controller,
    )
}

/// The pure part of [`directories`], from the texts of /proc/self/cgroup and /proc/self/mountinfo.
fn directories_from(cgroup: &str, mountinfo: &str, controller: &str) -> Vec<Level> {
    let mut levels = Vec::new();
    for line in cgroup.lines() {
        // "4:memory:/user.slice", "0::/user.slice" in v2.
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = if id == "0" && controllers.is_empty() {
            Version::V2
        } else if controllers.split(',').any(|name| name == controller) {
            Version::V1
        } else {
            continue;
        };
        let Some(mount) = mountinfo
            .lines()
            .filter_map(Mount::parse)
            .find(|mount| mount.holds(version, controller))
        else {
            continue;
        };
        let top = PathBuf::from(&mount.point);
        let mut directory = top.clone();
        // In a container, the root of the mount is often the container's own group, while the path
        // may still be the host's. A path that is not below the root is taken to be the mount itself.
        if let Ok(below) = Path::new(path).strip_prefix(&mount.root) {
            // Component by component: pushing an empty path would add a slash to the end.
            if below.components().all(|part| part.as_os_str() != "..") {
                directory.extend(below.components());
            }
        }
        loop {
            levels.push(Level {
                directory: directory.clone(),
                version,
            });
            if directory == top || !directory.pop() {
                break;
            }
        }
    }
    levels
}

/// The fields of a line of mountinfo that matter here.
struct Mount {
    root: String,
    point: String,
    kind: String,
    options: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Mount> {
        // "31 23 0:28 / /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory";
        // the number of fields before the hyphen varies.
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let mut right = right.split(' ');
        Some(Mount {
            root: unescape(left.next()?),
            point: unescape(left.next()?),
            kind: right.next()?.to_owned(),
            options: right.nth(1)?.to_owned(),
        })
    }

    fn holds(&self, version: Version, controller: &str) -> bool {
        match version {
            Version::V2 => self.kind == "cgroup2",
            Version::V1 => {
                self.kind == "cgroup" && self.options.split(',').any(|option| option == controller)
            }
        }
    }
}

/// Decodes blanks, tabs, newlines and backslashes, which mountinfo writes as three octal digits.
fn unescape(field: &str) -> String {
    field
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// Reads a number from a file of a group. `None` for "max", for invalid text and for a file that cannot
/// be read, because an unknown limit counts as no limit.
pub(crate) fn read_number(directory: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(directory.join(file))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Reads a value from a file of "name value" lines, such as memory.stat.
pub(crate) fn read_field(directory: &Path, file: &str, name: &str) -> Option<u64> {
    field(&fs::read_to_string(directory.join(file)).ok()?, name)
}

/// The pure part of [`read_field`], from the file's text.
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str =
        "28 1 0:25 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    fn paths(cgroup: &str, mountinfo: &str, controller: &str) -> Vec<String> {
        directories_from(cgroup, mountinfo, controller)
            .into_iter()
            .map(|level| level.directory.display().to_string())
            .collect()
    }

    #[test]
    fn v2_lists_the_group_and_its_parents() {
        let levels = directories_from("0::/user.slice/job\n", V2, "memory");
        assert!(levels.iter().all(|level| level.version == Version::V2));
        assert_eq!(
            paths("0::/user.slice/job\n", V2, "memory"),
            [
                "/sys/fs/cgroup/user.slice/job",
                "/sys/fs/cgroup/user.slice",
                "/sys/fs/cgroup"
            ]
        );
        assert_eq!(paths("0::/\n", V2, "pids"), ["/sys/fs/cgroup"]);
    }

    #[test]
    fn v1_takes_the_controllers_own_tree_and_the_unified_one() {
        let cgroup = "8:pids:/\n4:memory:/job\n0::/\n";
        assert_eq!(
            paths(cgroup, V1, "memory"),
            [
                "/sys/fs/cgroup/memory/job",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/unified"
            ]
        );
        assert_eq!(
            paths(cgroup, V1, "pids"),
            ["/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified"]
        );
    }

    #[test]
    fn a_path_in_a_container_is_resolved_below_the_root_of_the_mount() {
        let mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        assert_eq!(
            paths("4:memory:/docker/abc/job\n", mounts, "memory"),
            ["/sys/fs/cgroup/memory/job", "/sys/fs/cgroup/memory"]
        );
        // A path that is not below the root stands for the mount itself.
        for path in ["/elsewhere", "/../x"] {
            assert_eq!(
                paths(&format!("4:memory:{path}\n"), mounts, "memory"),
                ["/sys/fs/cgroup/memory"]
            );
        }
        assert_eq!(paths("0::/../..\n", V2, "memory"), ["/sys/fs/cgroup"]);
    }

    #[test]
    fn invalid_text_yields_no_group() {
        for (cgroup, mounts) in [
            ("", ""),
            ("0::/x\n", ""),
            ("", V2),
            ("0:\nnonsense\n::\n", V2),
            ("0::/x\n", "28 1 0:25 - cgroup2\n - \n"),
            ("5:cpu:/\n", V1),
        ] {
            assert!(directories_from(cgroup, mounts, "memory").is_empty());
        }
    }

    #[test]
    fn mount_points_with_blanks_are_decoded() {
        let mounts = "1 1 0:1 / /cg\\040x rw - cgroup2 none rw\n";
        assert_eq!(paths("0::/\n", mounts, "pids"), ["/cg x"]);
    }

    #[test]
    fn numbers_and_fields_are_read_from_files() {
        let directory = std::env::temp_dir().join(format!("rustcluster-cg-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for (text, expected) in [
            ("123\n", Some(123)),
            ("max\n", None),
            ("", None),
            ("-1\n", None),
            ("12x", None),
        ] {
            fs::write(directory.join("value"), text).unwrap();
            assert_eq!(read_number(&directory, "value"), expected, "{text:?}");
        }
        fs::write(directory.join("stat"), "anon 5\ninactive_file 7\nbad\n").unwrap();
        assert_eq!(read_field(&directory, "stat", "inactive_file"), Some(7));
        assert_eq!(read_field(&directory, "stat", "bad"), None);
        assert_eq!(read_field(&directory, "missing", "anon"), None);
        assert_eq!(read_number(&directory, "missing"), None);
        fs::remove_dir_all(&directory).unwrap();
    }
}
