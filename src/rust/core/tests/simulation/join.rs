//! Hosts that come and go in the simulation: hosts that join late, agents of next jobs and of reconnected hosts, hosts
//! that are added, and workers that are removed.

use crate::Sim;
use crate::host::Host;
use crate::parts::{Effect, End, Task, WorkerFacts, digest, part};
use rand::Rng;
use rustcluster_core::head::hub::{Plan, Progress, Turn};
use rustcluster_core::head::launch::{Launch, Source};
use rustcluster_core::protocol::control::{Hello, Outfile, Start, StartMode};
use rustcluster_core::protocol::ids::{Rank, TaskId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// Maximum number of hosts of a simulation, with those that are added.
const MAX_HOSTS: usize = 12;
/// Maximum size of the message of a set-up call to all workers.
const MAX_COMMON_CALL: usize = 20_000;

/// Whether the head keeps a set-up log, and what for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keeps {
    /// No set-up log: a lost host is lost.
    Nothing,
    /// Hosts may join late, and batch jobs may follow each other.
    ForLate,
    /// As `ForLate`, and lost hosts are reconnected.
    ForAll,
}

/// A path for the file of a set-up log, which is unlinked at once.
pub fn log_path() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("rustcluster-sim-{}-{next}", std::process::id()))
}

pub fn hello() -> Hello {
    Hello {
        protocol: 0,
        package: String::new(),
        r_version: String::new(),
        platform: String::new(),
        big_endian: false,
        pid: 1,
        hostname: String::new(),
        cores: 1,
        memory_total: 0,
        memory_available: 0,
    }
}

pub fn plan(ranks: &[Rank], (chunk_cache, setup_log_limit): (usize, usize)) -> Plan {
    Plan {
        start: Start {
            workers: ranks.len() as u32,
            ranks: ranks.to_vec(),
            mode: StartMode::Fork,
            packages: Vec::new(),
            outfile: Outfile::Discard,
            renice: 0,
            spawn_command: Vec::new(),
            heartbeat_timeout: 0,
            chunk_cache_bytes: chunk_cache as u64,
            state: setup_log_limit as u64,
            setup: 0,
            memory_limit: 0,
            stop_timeout: 0,
            local: true,
            linger: None,
        },
        ranks: ranks.to_vec(),
    }
}

/// What an agent reports of an RNG state.
fn reported(seed: &[u8]) -> &[u8] {
    if seed.len() > 64 { &[] } else { seed }
}

/// The effect of a set-up call with this message.
fn effect_of(task: TaskId, parts: &[bytes::Bytes]) -> Effect {
    let mut hasher = Xxh3::new();
    parts.iter().for_each(|part| hasher.update(part));
    Effect::of(task, &hasher)
}

impl Sim {
    pub fn bounds(&self) -> (usize, usize) {
        let setup = &self.setup;
        (setup.chunk_cache.unwrap_or(0), setup.setup_log_limit)
    }

    /// The head starts the cluster. Some hosts are late.
    pub fn go(&mut self) {
        let keeps = self.setup.keeps;
        if keeps != Keeps::Nothing {
            let (path, max_bytes) = (log_path(), self.setup.head_log_limit);
            let kept = match keeps {
                Keeps::ForAll => self.hub.reconnect(&path, max_bytes, Duration::MAX),
                _ => self.hub.keep_setup_log(&path, max_bytes, Duration::MAX),
            };
            kept.expect("a file");
        }
        self.hub.limit_all(self.setup.timeout);
        for at in 0..self.hosts.len() {
            let dials = keeps != Keeps::Nothing && self.rng.random();
            if dials && self.setup.changes == 0 {
                self.hub.set_dials(at);
            }
            let late = keeps != Keeps::Nothing && self.rng.random_ratio(1, 3);
            if !late {
                self.greet(at);
            }
        }
        let bounds = self.bounds();
        let plans = self
            .hosts
            .iter()
            .map(|host| Some(plan(&host.ranks, bounds)));
        self.hub.go(plans.collect()).expect("plans");
        self.notes();
    }

    /// An agent of this host greets.
    fn greet(&mut self, at: usize) {
        let (stream, host) = (self.setup.stream, &mut self.hosts[at]);
        host.connect(stream);
        for rank in host.ranks.clone() {
            // The worker may have caught up and terminated at once, because it was draining.
            if !self.hub.is_behind(rank) {
                self.catch_up(rank);
            }
            let known = &mut self.facts.workers[rank as usize];
            known.is_away = known.is_terminated;
            known.other_seeds.clear();
            if known.is_away {
                self.away.insert(rank);
                known.begin_again();
            }
        }
        let host = &self.hosts[at];
        self.facts.seen.came_again += usize::from(host.served);
        let served = self.hub.greet(at, hello(), host.served).expect("a plan");
        self.notes();
        if !served {
            self.lose_host(at, "refused");
        }
    }

    /// The agent of a host ends, or the connection to it, or no agent comes.
    pub fn lose_host(&mut self, at: usize, reason: &str) {
        let host = &mut self.hosts[at];
        host.lost = true;
        host.served = true;
        // Before the take-over, a fresh agent would not get the set-up calls.
        host.over = !self.hub.agent_ended(at, reason) || self.change.is_new;
        self.notes();
        let ranks = &self.hosts[at].ranks;
        assert!(ranks.iter().all(|&rank| self.is_terminated(rank)));
    }

    /// An agent of this host connects, if one may.
    pub fn connect(&mut self, at: usize) {
        let host = &self.hosts[at];
        if !host.lost || host.over {
            return;
        }
        if self.hub.is_permanent(at) {
            return self.lose_host(at, "stopped");
        }
        self.moved += 1;
        self.greet(at);
    }

    /// Something happens to a host without an agent.
    pub fn step_absent(&mut self, at: usize) {
        let host = &self.hosts[at];
        if !host.lost || host.over {
            return;
        }
        match self.rng.random_range(0..300) {
            0..8 => self.connect(at),
            // The agent ends before it has greeted.
            8 => self.lose_host(at, "not up"),
            9 if self.rng.random_ratio(1, 10) => {
                let reason = "the job has been removed".into();
                self.hub.give_up_host(at, reason, false);
                self.notes();
            }
            _ => {}
        }
    }

    /// Checks the workers that have joined or are back since the last call: they have all that was logged.
    pub fn check_arrivals(&mut self) {
        let arrivals = self.hub.arrivals();
        if std::mem::replace(&mut self.arrivals, arrivals) == arrivals {
            return;
        }
        for rank in self.away.clone() {
            if self.hub.worker(rank).termination.is_some() {
                continue;
            }
            self.away.remove(&rank);
            self.facts.seen.joined += 1;
            let known = &mut self.facts.workers[rank as usize];
            assert!(known.is_terminated && known.is_away);
            known.is_terminated = false;
            known.is_away = false;
            assert_eq!(
                digest(&known.effects),
                digest(&known.logged),
                "worker {rank} joins without the whole log: {:?} {:?}",
                known.effects,
                known.logged
            );
            self.facts.seen.joined_with_calls += usize::from(!known.logged.is_empty());
            if !known.is_late {
                known.other_seeds.clear();
                let last = known.reported_seeds.last();
                if let Some(seed) = last.filter(|_| known.reported_seeds.len() > 1) {
                    known.seed = seed.clone();
                }
            }
            self.catch_up(rank);
            for task in self.facts.tasks.iter_mut() {
                if task.end.is_none() && (task.owner == rank || task.assigned == rank) {
                    task.first_seed = None;
                }
            }
        }
    }

    /// A worker has run all calls that were logged for it. The head knows the RNG state that they have left.
    pub fn catch_up(&mut self, rank: Rank) {
        let known = &mut self.facts.workers[rank as usize];
        if !std::mem::take(&mut known.is_late) {
            return;
        }
        let seed = self.hub.with_scheduler(|scheduler| scheduler.seed(rank));
        if let Some(seed) = seed {
            let last = known.reported_seeds.last();
            assert!(
                last == Some(&seed) || seed == reported(&known.seed),
                "the head does not know the random numbers of worker {rank}"
            );
            known.report_seed(seed);
        }
    }

    /// The head has the answer to a call that restores a worker. It knows the RNG state that the call has left, if the
    /// worker had not run the call before.
    pub fn restoring_call_ended(&mut self, rank: Rank, id: TaskId) {
        let seed = self.hub.with_scheduler(|scheduler| scheduler.seed(rank));
        let known = &mut self.facts.workers[rank as usize];
        let left = known.restored_seeds.remove(&id).expect("an answer");
        if let Some(seed) = seed {
            let last = known.reported_seeds.last();
            assert!(
                last == Some(&seed) || seed == reported(&left),
                "the head has another RNG state of worker {rank} than call {id} has left"
            );
            known.report_seed(seed);
        }
    }

    /// R makes a set-up call on all workers that there are or that may come.
    pub fn set_up_all(&mut self) {
        let first = self.facts.tasks.next();
        // The messages of other set-up calls have even lengths.
        let len = self.rng.random_range(0..MAX_COMMON_CALL / 2) * 2 + 1;
        let job = self.job;
        let name = Effect::of_task(first, len).name();
        let made = self.rng.random::<bool>().then(|| {
            let all: Vec<Rank> = (0..self.setup.workers as Rank).collect();
            let (blob, count) = (self.hub.begin_blob(&all, true), len / 2);
            self.hub.write(&part(first, false, 0, count));
            self.hub.finish_blob();
            (blob, count)
        });
        self.notes();
        for owner in 0..self.setup.workers as Rank {
            if self.is_terminated(owner) && !self.hub.is_awaited(owner) {
                continue;
            }
            let id = self.facts.tasks.next();
            let started = self.hub.begin(owner, job, Some(name), Turn::Last, |_| {
                made.map(|made| made.0)
            });
            self.withdraw_stale(owner, job);
            self.notes();
            let started = started.expect("a worker");
            assert_eq!((started.task, started.assigned), (id, owner));
            let mut effect = Effect::of_task(first, len);
            effect.task = id;
            self.facts.tasks.push(Task {
                owner,
                assigned: owner,
                job,
                len,
                answer_len: self.rng.random_range(0..300),
                rng_use: effect.rng_use(),
                effect: Some(effect),
                limit: self.setup.timeout,
                prefix: (first, len),
                ..Task::new(id)
            });
            self.write(id, started, made, false);
            while self.writing.is_some() {
                self.write_chunk();
                if self.rng.random_ratio(1, 4) {
                    let at = self.rng.random_range(0..self.hosts.len());
                    self.pump(at);
                }
            }
        }
        if let Some((blob, _)) = made {
            self.hub.drop_blob(blob);
            self.notes();
        }
        self.facts.seen.common_calls += 1;
    }

    /// R adds hosts.
    pub fn add_workers(&mut self) {
        if self.hosts.len() >= MAX_HOSTS.max(self.setup.hosts + 1) || !self.hub.has_setup_log() {
            return;
        }
        let before = self.hosts.len();
        let count = self.rng.random_range(1..=2);
        let launches = (0..count).map(|_| Launch {
            host: String::new(),
            source: match self.rng.random::<bool>() && self.setup.changes == 0 {
                true => Source::DialBack {
                    launcher: 0,
                    lingers: None,
                },
                false => Source::Command {
                    command: Vec::new(),
                    env: Vec::new(),
                },
            },
        });
        let launches: Vec<Launch> = launches.collect();
        self.hub.add_hosts(launches).expect("the cluster goes on");
        for _ in 0..count {
            self.hosts.push(Host::new(&[], self.setup.stream));
        }
        self.notes();
        // Some agents greet, some end, and some are late.
        for at in before..before + count {
            for _ in 0..self.rng.random_range(0..20) {
                let other = self.rng.random_range(0..self.hosts.len());
                self.pump(other);
            }
            match self.rng.random_range(0..12) {
                0 => self.lose_host(at, "not up"),
                1 | 2 => {}
                _ => self.connect(at),
            }
        }
        if self.rng.random_ratio(1, 8) {
            return self.remove_added(before);
        }
        let expected = self.expected_calls();
        let mut plans = Vec::new();
        for at in before..before + count {
            let ranks: Vec<Rank> = (self.setup.workers as Rank..)
                .take(self.rng.random_range(1..=4))
                .collect();
            if self.rng.random_ratio(1, 12) {
                plans.push(None);
                continue;
            }
            for index in 0..ranks.len() {
                self.at.push((at, index as u32));
                self.facts.workers.push(WorkerFacts::new());
                self.outstanding.push(VecDeque::new());
            }
            self.setup.workers += ranks.len();
            self.hosts[at].ranks.clone_from(&ranks);
            self.hosts[at].processes = ranks.iter().map(|_| None).collect();
            plans.push(Some(plan(&ranks, self.bounds())));
        }
        self.hub.go_more(plans, |_| true).expect("the next ranks");
        let new: Vec<Rank> = (before..before + count)
            .flat_map(|at| self.hosts[at].ranks.clone())
            .collect();
        for &rank in &new {
            let calls = self.logged(rank);
            self.check_common(&calls, &expected);
            self.facts.workers[rank as usize].logged = calls;
        }
        self.notes();
        assert!(new.iter().all(|&rank| self.is_terminated(rank)));
        let there = |&&rank: &&Rank| !self.hosts[self.at[rank as usize].0].lost;
        let there: Vec<Rank> = new.iter().filter(there).copied().collect();
        for &rank in &there {
            self.facts.workers[rank as usize].is_away = true;
        }
        self.away.extend(there);
        let tolerant = self.rng.random();
        let max_steps = self.rng.random_range(1..400);
        for _ in 0..max_steps {
            for _ in 0..4 {
                let at = self.rng.random_range(0..self.hosts.len());
                self.pump(at);
            }
            match self.hub.progress(tolerant, Duration::ZERO) {
                Progress::Starting { .. } => {}
                Progress::Up => {
                    self.hub.added();
                    self.facts.seen.added += 1;
                    return;
                }
                _ => break,
            }
        }
        match tolerant && self.rng.random() {
            // R has waited for long enough.
            true => {
                self.hub.leave_out_late("late");
                self.notes();
                self.hub.added();
                self.facts.seen.added += 1;
            }
            false => self.remove_added(before),
        }
    }

    /// R ends what it has started of hosts that could not be added.
    fn remove_added(&mut self, before: usize) {
        for at in before..self.hosts.len() {
            self.hub.leave_out(at, "addWorkers() has failed".into());
            self.notes();
        }
        let mut steps = 0;
        while !self.hub.are_over(before, Duration::ZERO) {
            for at in 0..self.hosts.len() {
                self.pump(at);
                if self.hosts[at].lost && self.hub.is_permanent(at) {
                    self.connect(at);
                }
            }
            steps += 1;
            assert!(steps < 100_000, "an agent of a failed addition goes on");
        }
        self.hub.added();
        let mut hosts = self.hosts[before..].iter();
        assert!(hosts.all(|host| host.lost && host.over));
        self.facts.seen.not_added += 1;
    }

    /// The set-up calls that would restore a worker now.
    pub fn logged(&self, rank: Rank) -> Vec<Effect> {
        let calls = self.hub.logged_setup_calls(rank).expect("a mapping");
        calls.iter().map(|parts| effect_of(0, parts)).collect()
    }

    /// The workers whose calls new workers get if all of them have completed them, and the calls that one of them would
    /// be restored with.
    fn expected_calls(&self) -> (BTreeSet<Rank>, Vec<Effect>) {
        let is_member = |&rank: &Rank| match self.hub.worker(rank).termination {
            None => true,
            Some(termination) => {
                termination.is_of_host() && self.hub.takes_back(self.at[rank as usize].0)
            }
        };
        let members: BTreeSet<Rank> = (0..self.setup.workers as Rank).filter(is_member).collect();
        let calls = members.first().map(|&rank| self.logged(rank));
        (members, calls.unwrap_or_default())
    }

    /// Checks the set-up calls of a new worker: those that all members have completed, in their order.
    pub fn check_common(
        &self,
        calls: &[Effect],
        (members, of_one): &(BTreeSet<Rank>, Vec<Effect>),
    ) {
        if members.is_empty() {
            return;
        }
        let by_all = |call: &&Effect| {
            let has = |rank: &Rank| {
                let logged = &self.facts.workers[*rank as usize].logged;
                logged.iter().any(|other| other.hash == call.hash)
            };
            members.iter().all(has)
        };
        assert!(
            calls.iter().all(|call| by_all(&call)),
            "a new worker gets a call that not all have completed"
        );
        let order: BTreeMap<u64, usize> = of_one
            .iter()
            .enumerate()
            .map(|(at, call)| (call.hash, at))
            .collect();
        let places: Vec<usize> = calls
            .iter()
            .filter_map(|call| order.get(&call.hash).copied())
            .collect();
        assert!(
            places.is_sorted(),
            "the set-up calls of a new worker are in another order"
        );
        for call in of_one.iter().filter(by_all) {
            let same_name = |other: &&Effect| call.name() != 0 && other.name() == call.name();
            let has = calls.iter().any(|other| other.hash == call.hash)
                || calls.iter().any(|other| same_name(&other));
            assert!(has, "a new worker misses a call that all have completed");
        }
    }

    /// R removes some workers, after their tasks or at once.
    pub fn remove_workers(&mut self, rank: Rank) {
        let mut ranks = BTreeSet::from([rank]);
        let (at, _) = self.at[rank as usize];
        if self.rng.random_ratio(1, 3) {
            ranks.extend(&self.hosts[at].ranks);
        }
        let ranks: Vec<Rank> = ranks.into_iter().collect();
        let others = (0..self.setup.workers as Rank)
            .any(|rank| !ranks.contains(&rank) && !self.is_terminated(rank));
        if !others {
            return;
        }
        self.facts.seen.removed += ranks.len();
        if self.rng.random_ratio(2, 3) {
            self.hub.drain(&ranks);
            for rank in ranks {
                if !self.is_terminated(rank) {
                    self.begins_to_drain(rank);
                }
            }
            return self.notes();
        }
        // Its tasks are forgotten.
        for &rank in &ranks {
            for task in self.outstanding[rank as usize].clone() {
                self.forget_removed(task);
            }
        }
        self.hub.remove(&ranks);
        self.notes();
        assert!(ranks.iter().all(|&rank| self.is_terminated(rank)));
    }

    fn forget_removed(&mut self, id: TaskId) {
        self.withdraw(id);
        self.facts.tasks[id].end = Some(End::Removed);
    }
}
