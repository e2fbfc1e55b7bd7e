//! Orphans: processes that a worker started, that moved to a process group of their own, and that
//! outlive the worker.
//!
//! The agent is a "subreaper" (on Linux only): the system makes it the parent of all orphans below
//! it, so that it can see them. The agent does not kill orphans, because somebody may have meant
//! them to go on, but reports each of them to the head. It waits for those that end, because nobody
//! else would.

use super::Agent;
use crate::platform::process;
use crate::protocol::control::ToHead;
use crate::protocol::handshake::ENDS_WITH_HEAD;
use crate::protocol::truncate;
use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::time::Duration;

/// How long the agent may wait at its end: for its final output to reach the head, and for
/// processes that were killed with their workers to end. Together with the grace of workers it is
/// less than the second within which everything must have ended.
const SHUTDOWN_DRAIN: Duration = Duration::from_millis(200);

/// Maximum length of a command line in a report to the head.
const COMMAND: usize = 200;

/// The variable that R sets in the environment of each session, which the processes of the session inherit.
const SESSION: &str = "R_SESSION_TMPDIR";

/// A worker that has been ready, by its temporary directory.
struct Owner {
    worker: u32,
    pid: u32,
    ended: bool,
}

/// See the module's documentation.
pub struct Orphans {
    /// Children of this process that did not come from workers. Whoever started them may wait for
    /// them.
    own: HashSet<u32>,
    /// The process groups of all workers, including ended ones. Processes in them are killed with
    /// their workers.
    groups: HashSet<u32>,
    /// See [`ENDS_WITH_HEAD`]. The workers, forks of this process, have the same.
    head: Option<Vec<u8>>,
    owners: HashMap<Vec<u8>, Owner>,
    reported: HashSet<u32>,
    /// A process has ended, so that its children may have become this process's.
    reaped: bool,
    /// When the shutdown drain ends.
    shutdown_drain: Option<Duration>,
    /// Whether there is final output.
    pub final_output: bool,
}

/// A child that has not been reported yet.
struct Orphan {
    worker: Option<u32>,
    pid: u32,
    command: String,
}

impl Orphans {
    /// Makes this process the parent of orphans. To be called when it has all children of its own,
    /// other than workers.
    pub fn adopt() -> Orphans {
        process::adopt_orphans();
        Orphans {
            own: children().into_iter().collect(),
            groups: HashSet::new(),
            head: variable_of(std::process::id(), ENDS_WITH_HEAD),
            owners: HashMap::new(),
            reported: HashSet::new(),
            reaped: false,
            shutdown_drain: None,
            final_output: false,
        }
    }

    /// Records a worker.
    pub fn made(&mut self, pid: u32) {
        self.groups.insert(pid);
    }

    /// Records the temporary directory of a worker, by which processes that it starts are
    /// recognised.
    pub fn ready(&mut self, worker: u32, pid: u32, tempdir: &str) {
        let ended = false;
        let owner = Owner { worker, pid, ended };
        self.owners.insert(tempdir.as_bytes().to_vec(), owner);
    }

    /// Records a child that this process has started, and that is no worker.
    pub fn is_own(&mut self, pid: u32) {
        self.own.insert(pid);
    }

    /// Such a child has been reaped: its pid may be reused.
    pub fn has_ended(&mut self, pid: u32) {
        self.own.remove(&pid);
    }

    fn is_known(&self, pid: u32) -> bool {
        self.own.contains(&pid) || self.reported.contains(&pid)
    }

    /// A child that is no worker has ended. Waits for it if it came from a worker; returns whether
    /// it did.
    pub fn reap(&mut self, pid: u32) -> bool {
        let adopted = !self.own.contains(&pid) && children().contains(&pid);
        if adopted {
            self.remove(pid);
        }
        adopted
    }

    fn remove(&mut self, pid: u32) {
        process::reap(pid);
        // The pid may be reused.
        self.reported.remove(&pid);
        self.reaped = true;
    }

    /// Handles all ended children except workers like [`Orphans::reap`].
    pub fn reap_all(&mut self, is_worker: impl Fn(u32) -> bool) {
        for pid in children() {
            let ended = |pid| stat_of(pid).is_some_and(|stat| stat.has_ended());
            if !self.own.contains(&pid) && !is_worker(pid) && ended(pid) {
                self.remove(pid);
            }
        }
    }

    /// Children to be reported, and whether there are others that were killed and have not quite
    /// ended: their children may follow. `unowned`: include those whose worker is not known.
    fn scan(&mut self, unowned: bool, is_worker: impl Fn(u32) -> bool) -> (Vec<Orphan>, bool) {
        let mut orphans = Vec::new();
        let mut dying = false;
        for pid in children() {
            if self.is_known(pid) || is_worker(pid) {
                continue;
            }
            let Some(stat) = stat_of(pid) else {
                continue;
            };
            if stat.has_ended() || self.groups.contains(&stat.group) {
                dying = true;
                continue;
            }
            // An agent of a cluster that a worker made, or its connection, ends with that worker.
            let head = variable_of(pid, ENDS_WITH_HEAD);
            if head.is_some() && head != self.head {
                dying = true;
                continue;
            }
            let owner = variable_of(pid, SESSION).and_then(|session| self.owners.get(&session));
            let Some(command) = command_of(pid) else {
                dying = true;
                continue;
            };
            if !owner.map_or(unowned, |owner| owner.ended) {
                continue;
            }
            self.reported.insert(pid);
            orphans.push(Orphan {
                worker: owner.map(|owner| owner.worker),
                pid,
                command,
            });
        }
        (orphans, dying)
    }

    /// When to call [`Agent::is_drained`] next.
    pub fn deadline(&self) -> Option<Duration> {
        self.shutdown_drain
    }
}

impl Agent {
    /// Reports the orphans of an ended worker to the head.
    pub(super) fn report_orphans(&mut self, ended: u32) {
        for owner in self.orphans.owners.values_mut() {
            owner.ended |= owner.pid == ended;
        }
        // At the end of the agent, all orphans are scanned together.
        if !self.ending {
            self.find_orphans(true);
        }
    }

    /// Reports further orphans of ended workers to the head.
    pub(super) fn report_more_orphans(&mut self) {
        if std::mem::take(&mut self.orphans.reaped) && !self.ending {
            self.find_orphans(false);
        }
    }

    /// Reports orphans. Returns whether there may be more of them.
    fn find_orphans(&mut self, unowned: bool) -> bool {
        let workers = &self.workers;
        let is_worker = |pid| workers.iter().flatten().any(|process| process.pid == pid);
        let (orphans, dying) = self.orphans.scan(unowned, is_worker);
        for Orphan {
            worker,
            pid,
            command,
        } in orphans
        {
            let message = ToHead::LeftBehind {
                worker,
                pid,
                command,
            };
            self.report_last(&message);
        }
        dying
    }

    /// Whether all orphans have been reported to the head, or cannot be reported. Call when all workers have
    /// terminated.
    pub(super) fn is_drained(&mut self) -> bool {
        let now = self.now();
        let deadline = *self
            .orphans
            .shutdown_drain
            .get_or_insert(now + SHUTDOWN_DRAIN);
        if now >= deadline {
            return true;
        }
        let dying = self.find_orphans(true);
        self.write_head();
        // Without final output, bytes that have not been sent yet are of no use to anybody.
        !dying && (!self.orphans.final_output || self.to_head.is_empty())
    }
}

/// The children of this thread, including ended ones. The system assigns adopted processes to the first thread of a
/// process; children of other threads must be waited for by those threads.
fn children() -> Vec<u32> {
    let me = std::process::id();
    if let Ok(text) = std::fs::read_to_string(format!("/proc/{me}/task/{me}/children")) {
        let numbers = text.split_ascii_whitespace();
        return numbers.filter_map(|pid| pid.parse().ok()).collect();
    }
    // The kernel was built without that file. If there are several threads, nothing else shows to which of them
    // a child belongs.
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let ours = |&pid: &u32| threads == 1 && stat_of(pid).is_some_and(|stat| stat.parent == me);
    pids.filter(ours).collect()
}

/// The state of a process, as the system reports it.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    parent: u32,
    group: u32,
}

impl Stat {
    /// Parses the text of /proc/PID/stat. A name may contain any characters, including parentheses and blanks.
    fn parse(text: &str) -> Option<Stat> {
        let (_, rest) = text.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        Some(Stat {
            state: *fields.next()?.as_bytes().first()?,
            parent: fields.next()?.parse().ok()?,
            group: fields.next()?.parse().ok()?,
        })
    }

    fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

fn stat_of(pid: u32) -> Option<Stat> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    Stat::parse(&String::from_utf8_lossy(&text))
}

/// The value of a variable in the environment that a process was started with.
fn variable_of(pid: u32, name: &str) -> Option<Vec<u8>> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut variables = environment.split(|&byte| byte == 0);
    variables.find_map(|variable| {
        let value = variable.strip_prefix(name.as_bytes())?;
        value.strip_prefix(b"=").map(<[u8]>::to_vec)
    })
}

/// `None` while the process executes another program or is about to end, because its command and its worker
/// cannot be determined then.
fn command_of(pid: u32) -> Option<String> {
    let file = std::fs::File::open(format!("/proc/{pid}/cmdline")).ok()?;
    let mut bytes = Vec::new();
    file.take(4 * COMMAND as u64).read_to_end(&mut bytes).ok()?;
    (!bytes.is_empty()).then(|| command_text(&bytes))
}

/// Formats a command line for a report: on one line, and no longer than [`COMMAND`] bytes.
fn command_text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end_matches('\0');
    let blank = |c: char| if c.is_control() { ' ' } else { c };
    let mut text: String = text.chars().map(blank).collect();
    if text.len() > COMMAND {
        let dots = "...";
        text = truncate::beginning(&text, COMMAND - dots.len()).to_owned() + dots;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_is_read_behind_the_name() {
        let stat = Stat::parse("12 (a) S 1 (b) R 34 56 7 0 -1\n");
        assert_eq!(
            stat,
            Some(Stat {
                state: b'R',
                parent: 34,
                group: 56
            })
        );
        assert!(Stat::parse("12 (sh) Z 3 4").unwrap().has_ended());
        assert!(!Stat::parse("12 (sh) D 3 4").unwrap().has_ended());
        for text in [
            "",
            "12 (sh)",
            "12 (sh) ",
            "12 (sh) S",
            "12 (sh) S x 4",
            ") ",
        ] {
            assert_eq!(Stat::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn commands_are_shown_on_a_line_of_bounded_length() {
        assert_eq!(command_text(b"sleep\x00300\x00"), "sleep 300");
        assert_eq!(command_text(b"sh\0-c\0a\nb\x1b[1m\0"), "sh -c a b [1m");
        assert_eq!(command_text(b""), "");
        assert_eq!(command_text(b"\xff"), "\u{fffd}");
        let long = command_text("\u{e4}".repeat(300).as_bytes());
        assert!(
            long.len() <= COMMAND && long.ends_with("\u{e4}..."),
            "{long}"
        );
        assert_eq!(command_text(&[b'x'; COMMAND]).len(), COMMAND);
    }

    #[test]
    fn a_process_is_found_and_known_by_its_session() {
        let mut command = std::process::Command::new("sleep");
        let mut child = command
            .arg("300")
            .env("R_SESSION_TMPDIR", "/tmp/Rtmp7")
            .spawn()
            .unwrap();
        let pid = child.id();
        // The arguments may appear only shortly after the process has started.
        while command_of(pid).as_deref() != Some("sleep 300") {
            std::thread::yield_now();
        }
        let stat = stat_of(pid).unwrap();
        assert_eq!(stat.parent, std::process::id());
        assert_eq!(variable_of(pid, SESSION), Some(b"/tmp/Rtmp7".to_vec()));
        assert_eq!(variable_of(pid, "R_SESSION"), None);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(stat_of(pid), None);
        assert_eq!(variable_of(pid, SESSION), None);
    }
}
