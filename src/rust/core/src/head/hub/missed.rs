//! Which hosts have missed a set-up call while they were lost, in a cluster that lingers. The agent of such a host may
//! still wait for the next head. That head must not use its workers, whose variables are older than those of the
//! others. When another worker has completed the call, and before R knows that, the hosts are written to a file beside
//! the record of the cluster, so that the next head knows them however this one ends.

use super::client::Hub;
use super::core::Core;
use super::inbox::Event;
use crate::head::scheduler::events::Outcome;
use crate::protocol::ids::{Rank, TaskId};
use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Missed {
    /// The file; `None`: the cluster does not linger.
    path: Option<PathBuf>,
    hosts: BTreeSet<usize>,
    /// Hosts that were lost before a set-up call had ended there. They have missed it if this head goes on without them.
    in_doubt: BTreeSet<usize>,
    /// Hosts whose agents have had a head before this one.
    before: BTreeSet<usize>,
    /// The set-up calls that have been begun and have not ended.
    open: HashSet<TaskId>,
}

impl Missed {
    /// Whether the host has missed a set-up call.
    pub fn contains(&self, agent: usize) -> bool {
        self.hosts.contains(&agent)
    }

    /// The agent of this host waits for its head; `missed`: the head before has recorded the host.
    pub fn waits(&mut self, agent: usize, missed: bool) {
        self.before.insert(agent);
        if missed {
            self.hosts.insert(agent);
        }
    }

    /// Writes the numbers of the hosts, from 1, a line each. Without such a host there is no file. A crash of the
    /// machine does not undo that, since the agents of other hosts outlive it.
    fn write(&self) -> io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        if self.hosts.is_empty() {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let lines = self.hosts.iter().map(|agent| format!("{}\n", agent + 1));
        let part = path.with_extension("part");
        let mut file = File::create(&part)?;
        file.write_all(lines.collect::<String>().as_bytes())?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        match path.parent() {
            Some(directory) => File::open(directory)?.sync_all(),
            None => Ok(()),
        }
    }
}

impl Hub {
    /// Records in this file from now on which hosts miss set-up calls.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn record_missed(&self, path: &Path) -> io::Result<()> {
        let mut core = self.core();
        core.missed.path = Some(path.to_owned());
        core.missed.write()
    }
}

impl Core {
    /// A set-up call is to be sent, which changes the variables of a worker.
    pub fn setup_call_begins(&mut self, task: TaskId) {
        if self.missed.path.is_some() {
            self.missed.open.insert(task);
        }
    }

    /// A task has ended, of which R does not know yet.
    pub fn record_missed(&mut self, task: TaskId, rank: Rank, outcome: &Outcome) {
        let setup_call = self.missed.open.remove(&task);
        let decides = setup_call || !self.missed.in_doubt.is_empty();
        if self.missed.path.is_none() || !decides {
            return;
        }
        let lost: Vec<usize> = match outcome {
            Outcome::Lost(_) if setup_call => {
                let agent = self.inbox.workers.get(rank as usize).map(|w| w.agent);
                let agent = agent.filter(|&agent| !self.is_attached(agent));
                self.missed.in_doubt.extend(agent);
                return;
            }
            // This head goes on with the hosts that it has.
            Outcome::Answer(_) => {
                let agents = 0..self.conns.len();
                agents.filter(|&agent| !self.is_attached(agent)).collect()
            }
            _ => return,
        };
        let misses = |agent: &usize| match setup_call {
            true => self.inbox.hosts[*agent].hello.is_some() || self.missed.before.contains(agent),
            false => self.missed.in_doubt.contains(agent),
        };
        let lost: Vec<usize> = lost.into_iter().filter(misses).collect();
        let count = self.missed.hosts.len();
        self.missed.hosts.extend(lost);
        self.missed.in_doubt.clear();
        if self.missed.hosts.len() > count {
            self.write_missed();
        }
    }

    /// A worker of this host has come up. If the host had missed a set-up call, this is a new agent, which has ended
    /// the one before.
    pub fn has_current_agent(&mut self, agent: usize) {
        self.missed.in_doubt.remove(&agent);
        if self.missed.hosts.remove(&agent) {
            self.write_missed();
        }
    }

    fn write_missed(&mut self) {
        if let Err(error) = self.missed.write() {
            let path = self.missed.path.iter().map(|path| path.display());
            let reason = path.map(|path| format!("{path}: {error}")).collect();
            self.inbox.push_event(Event::NotRecorded { reason });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::restore::tests::{hello, task, two_hosts};
    use super::*;
    use crate::protocol::control::{self, ToHead};
    use crate::protocol::frame::{FIRST, Frame, Kind, LAST};
    use bytes::Bytes;

    /// A cluster of two hosts that lingers, and the file.
    fn lingering(name: &str) -> (Hub, PathBuf) {
        let mut hub = two_hosts();
        for rank in 0..2 {
            answer(&mut hub, rank);
        }
        let path = std::env::temp_dir().join(format!("{}-{name}.missed", std::process::id()));
        hub.record_missed(&path).unwrap();
        (hub, path)
    }

    /// The worker of this host answers what it has been sent.
    fn answer(hub: &mut Hub, agent: usize) {
        while let Some(frame) = hub.next_frame(agent) {
            if frame.header.kind == Kind::Data {
                let task = frame.header.task;
                let answer = Frame::new(Kind::Data, FIRST | LAST, 0, task, Bytes::new());
                hub.on_frame(agent, answer, None).unwrap();
            }
        }
    }

    fn recorded(path: &Path) -> Option<String> {
        fs::read_to_string(path).ok()
    }

    #[test]
    fn a_lost_host_misses_the_next_setup_call_until_it_has_another_agent() {
        let (mut hub, path) = lingering("lost");
        task(&mut hub, 0, Some(1));
        task(&mut hub, 1, Some(1));
        answer(&mut hub, 0);
        answer(&mut hub, 1);
        hub.agent_ended(0, "lost");
        task(&mut hub, 1, None);
        answer(&mut hub, 1);
        assert_eq!(recorded(&path), None);
        task(&mut hub, 1, Some(2));
        assert_eq!(recorded(&path), None);
        answer(&mut hub, 1);
        assert_eq!(recorded(&path).as_deref(), Some("1\n"));
        assert!(hub.greet(0, hello(), true).unwrap());
        assert_eq!(recorded(&path).as_deref(), Some("1\n"));
        let up = control::encode(&ToHead::WorkerUp { worker: 0, pid: 9 }).unwrap();
        hub.on_frame(0, up, None).unwrap();
        assert_eq!(recorded(&path), None);
    }

    #[test]
    fn a_host_that_is_lost_during_a_setup_call_has_missed_it_once_the_head_goes_on() {
        for first in [0, 1] {
            let (mut hub, path) = lingering(&format!("during-{first}"));
            task(&mut hub, 0, Some(1));
            task(&mut hub, 1, Some(1));
            if first == 0 {
                answer(&mut hub, 0);
                hub.agent_ended(1, "lost");
                assert_eq!(recorded(&path), None);
                task(&mut hub, 0, None);
            } else {
                hub.agent_ended(1, "lost");
            }
            answer(&mut hub, 0);
            assert_eq!(recorded(&path).as_deref(), Some("2\n"));
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn no_host_misses_a_call_that_no_worker_completes() {
        let (mut hub, path) = lingering("all");
        task(&mut hub, 0, Some(1));
        task(&mut hub, 1, Some(1));
        hub.agent_ended(1, "lost");
        // The head does not know yet that it has lost the other host, too.
        task(&mut hub, 0, Some(2));
        hub.agent_ended(0, "lost");
        assert_eq!(recorded(&path), None);
    }
}
