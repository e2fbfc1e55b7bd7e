//! Which hosts have missed a set-up call while they were lost, in a cluster that lingers. The agent of such a host may
//! still wait for the next head. That head must not use its workers, whose variables are older than those of the
//! others. The hosts are written to a file beside the record of the cluster before the call is sent, so that the next
//! head knows them however this one ends.

use super::client::Hub;
use super::core::Core;
use super::inbox::Event;
use crate::protocol::ids::{Rank, TaskId};
use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Missed {
    /// The file; `None`: the cluster does not linger.
    path: Option<PathBuf>,
    hosts: BTreeSet<usize>,
    /// The set-up calls that have been begun and have not ended.
    open: HashSet<TaskId>,
}

impl Missed {
    /// Whether the host has missed a set-up call.
    pub fn contains(&self, agent: usize) -> bool {
        self.hosts.contains(&agent)
    }

    /// Adds a host of which the head before has recorded that.
    pub fn add(&mut self, agent: usize) {
        self.hosts.insert(agent);
    }

    /// Writes the numbers of the hosts, from 1, a line each. Without such a host there is no file.
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
        fs::write(&part, lines.collect::<String>())?;
        fs::rename(&part, path)
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
    /// A set-up call is to be sent, or to be logged. Hosts that are lost miss it, unless all are lost.
    pub fn setup_call_begins(&mut self, task: TaskId) {
        if self.missed.path.is_none() {
            return;
        }
        self.missed.open.insert(task);
        let agents = 0..self.conns.len();
        let (attached, lost): (Vec<usize>, Vec<usize>) =
            agents.partition(|&agent| self.is_attached(agent));
        if attached.is_empty() {
            return;
        }
        let had_agent = |&agent: &usize| self.inbox.hosts[agent].hello.is_some();
        let lost = lost.into_iter().filter(had_agent).collect();
        self.miss(lost);
    }

    /// A task has ended; `lost`: its worker has terminated.
    pub fn setup_call_ended(&mut self, task: TaskId, rank: Rank, lost: bool) {
        if !self.missed.open.remove(&task) || !lost {
            return;
        }
        let agent = self.inbox.workers.get(rank as usize).map(|w| w.agent);
        let agent = agent.filter(|&agent| !self.is_attached(agent));
        self.miss(agent.into_iter().collect());
    }

    /// A worker of this host has come up. If the host had missed a set-up call, this is a new agent, which has ended
    /// the one before.
    pub fn has_current_agent(&mut self, agent: usize) {
        if self.missed.hosts.remove(&agent) {
            self.write_missed();
        }
    }

    fn miss(&mut self, agents: Vec<usize>) {
        let before = self.missed.hosts.len();
        self.missed.hosts.extend(agents);
        if self.missed.hosts.len() > before {
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
