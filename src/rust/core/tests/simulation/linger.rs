//! Heads that vanish in the simulation, and heads that take their clusters over. A head that vanishes may have sent
//! any part of what it had to send. Its agents end the tasks that have begun, while workers and hosts fail as always.

use crate::Sim;
use crate::host::{Host, Link};
use crate::join::{Keeps, hello, log_path, plan};
use crate::parts::{Effect, End, OnInterrupt, RngUse, Task, digest, generation, slice};
use crate::r::check_answer;
use rand::Rng;
use rustcluster_core::head::hub::{Hub, Progress};
use rustcluster_core::head::scheduler::events::Outcome;
use rustcluster_core::protocol::frame::MAX_BODY;
use rustcluster_core::protocol::ids::{CALLS, KEEP, Rank, TaskId};
use rustcluster_core::protocol::send_queue::OutBuf;
use rustcluster_core::protocol::setup_calls::SetupCalls;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// What is known about the change of heads.
#[derive(Default)]
pub struct Change {
    /// Number of answers that heads before this one have had.
    pub answers_before: usize,
    /// Calls for any worker that have not ended.
    pub calls: usize,
    ended_calls: Vec<TaskId>,
    /// The calls whose kept answers have been taken.
    taken: BTreeSet<TaskId>,
    /// The set-up calls of each worker that a head has seen acknowledged.
    acknowledged: BTreeMap<Rank, Vec<Effect>>,
    /// The set-up call that each worker was running when a head took the cluster over. Nobody has seen it acknowledged.
    running: BTreeMap<Rank, u64>,
    /// The head has not taken the cluster over yet.
    pub is_new: bool,
}

impl Sim {
    /// The head vanishes, and another takes the cluster over. Returns whether there is any agent.
    pub fn change_head(&mut self) -> bool {
        match self.rng.random_range(0..3) {
            0 if self.is_free() => {
                self.begin_job(false);
                for _ in 0..self.rng.random_range(0..60) {
                    if self.step_job() {
                        break;
                    }
                }
            }
            1 if self.writing.is_none() => self.submit_calls(),
            _ => {}
        }
        loop {
            self.vanish();
            self.be_without_head();
            let waits = |host: &Host| !host.lost && !host.ranks.is_empty();
            if !self.hosts.iter().any(waits) {
                self.facts.seen.found_none += 1;
                return false;
            }
            if self.take_up() {
                self.facts.seen.taken_over += 1;
                return true;
            }
            self.facts.seen.vanished_early += 1;
        }
    }

    /// R submits calls for the first free worker, whose answers agents keep.
    fn submit_calls(&mut self) {
        for _ in 0..self.rng.random_range(1..6) {
            let ranks = 0..self.setup.workers as Rank;
            let mut any_of: Vec<Rank> = ranks
                .filter(|&rank| !self.is_terminated(rank) && self.rng.random())
                .collect();
            any_of.sort_unstable();
            if any_of.is_empty() {
                continue;
            }
            let id = self.facts.tasks.next() | KEEP;
            let (len, answer_len) = (self.size(false), self.size(true));
            let faults = self.setup.faults > 0;
            self.facts.tasks.push(Task {
                job: CALLS,
                len,
                answer_len,
                stuck: faults && self.rng.random_ratio(1, 12),
                poison: faults && self.rng.random_ratio(1, 30),
                on_interrupt: OnInterrupt::Stop,
                rng_use: RngUse::from_number(self.rng.random()),
                limit: self.setup.timeout,
                complete: true,
                scheduled: true,
                order: None,
                ..Task::new(id)
            });
            assert_eq!(self.hub.number_call() | KEEP, id);
            self.hub.begin_call(any_of.into(), id, false);
            let mut at = 0;
            loop {
                let n = MAX_BODY.min(len - at);
                let chunk = self.chunk(id, at, n);
                at += n;
                self.hub.write_chunk(chunk, at == len);
                if at == len {
                    break;
                }
            }
            self.hub.notify_call(id);
            self.change.calls += 1;
            self.facts.seen.calls += 1;
            self.notes();
            for _ in 0..self.rng.random_range(0..200) {
                let at = self.rng.random_range(0..self.hosts.len());
                self.pump(at);
            }
        }
    }

    /// A call has ended for its head, which does not try it again.
    pub fn call_ended(&mut self, rank: Rank, id: TaskId, outcome: &Outcome) {
        let task = &mut self.facts.tasks[id];
        assert!(std::mem::take(&mut task.scheduled), "call {id} ends twice");
        let end = match outcome {
            Outcome::Answer(body) => {
                assert!(task.started && task.assigned == rank);
                check_answer(id, task.answer_len, body);
                self.facts.seen.answers += 1;
                End::Answer
            }
            Outcome::TimedOut => End::TimedOut,
            _ => End::Error,
        };
        assert_eq!(task.end.replace(end), None);
        if !matches!(outcome, Outcome::Answer(_)) {
            self.arriving.remove(&rank);
        }
        self.change.ended_calls.push(id);
    }

    /// R takes the calls that have ended.
    pub fn forget_calls(&mut self) {
        for id in std::mem::take(&mut self.change.ended_calls) {
            self.change.calls -= 1;
            self.hub.forget_call(id);
            let rank = self.facts.tasks[id].assigned;
            if self.arriving.get(&rank).is_some_and(|&(at, _)| at == id) {
                self.arriving.remove(&rank);
            }
        }
    }

    /// The head vanishes, whatever it does.
    fn vanish(&mut self) {
        for (rank, known) in (0..).zip(&self.facts.workers) {
            let is_there = !known.is_terminated || known.is_away;
            if !self.change.is_new && is_there && !known.is_late {
                let mut acknowledged = known.logged.clone();
                let running = self.change.running.get(&rank);
                if let Some(at) = acknowledged
                    .iter()
                    .rposition(|effect| Some(&effect.hash) == running)
                {
                    acknowledged.remove(at);
                }
                self.change.acknowledged.insert(rank, acknowledged);
            } else if !self.change.is_new {
                self.change.acknowledged.remove(&rank);
            }
        }
        self.writing = None;
        self.waiting = None;
        self.resume = None;
        self.engine = None;
        self.open_job = None;
        self.made.clear();
        self.ready.clear();
        self.arriving.clear();
        self.away.clear();
        self.outstanding.iter_mut().for_each(VecDeque::clear);
        self.change.calls = 0;
        self.change.ended_calls.clear();
        for task in self.facts.tasks.iter_mut() {
            task.end.get_or_insert(End::Vanished);
            task.scheduled = false;
        }
        for host in self.hosts.iter_mut().filter(|host| !host.lost) {
            host.head_gone = host.link != Link::Down;
            host.out = OutBuf::default();
            host.head_received.clear();
        }
        // Nothing reaches the head any more.
        self.hub = Hub::by_hand(self.hosts.len(), self.setup.limit).expect("descriptors");
    }

    /// A while without a head, until all agents have noticed.
    fn be_without_head(&mut self) {
        for _ in 0..self.rng.random_range(0..600) {
            let at = self.rng.random_range(0..self.hosts.len());
            self.pump_without_head(at);
        }
        for at in 0..self.hosts.len() {
            while self.hosts[at].head_gone && !self.hosts[at].lost {
                self.read_the_rest(at);
            }
        }
        for host in self.hosts.iter_mut().filter(|host| host.lost) {
            host.served = true;
        }
    }

    /// An agent reads what its head had written, or notices that the head has vanished.
    fn read_the_rest(&mut self, at: usize) {
        let n = slice(&mut self.rng);
        let host = &mut self.hosts[at];
        // The connection may break with bytes on their way.
        let breaks = self.rng.random_ratio(1, 30);
        if host.down.bytes.is_empty() || breaks {
            host.disconnect(self.setup.stream, self.now, &mut self.facts);
        } else {
            host.read_head(n, self.now, &mut self.facts);
        }
    }

    fn pump_without_head(&mut self, at: usize) {
        if self.hosts[at].lost {
            return;
        }
        match self.rng.random_range(0..12) {
            0 | 1 if self.hosts[at].head_gone => self.read_the_rest(at),
            2 => self.start_worker(at),
            3 => {
                self.now += Duration::from_millis(self.rng.random_range(0..300));
                self.tick();
            }
            4 if self.setup.faults > 0 && self.rng.random_ratio(1, 20) => {
                let worker = self.rng.random_range(0..self.hosts[at].ranks.len().max(1));
                if let Some(Some(process)) = self.hosts[at].processes.get_mut(worker) {
                    process.dead = true;
                }
            }
            5 if self.setup.faults > 0 && self.rng.random_ratio(1, 100) => {
                self.hosts[at].lost = true;
            }
            _ => self.step_workers(at),
        }
    }

    /// Another head takes the cluster over. Returns whether it has not vanished meanwhile.
    fn take_up(&mut self) -> bool {
        self.begin_head();
        let ends_early = self.rng.random_ratio(1, 4);
        let max_steps = self.rng.random_range(1..2_000);
        for _ in 0..max_steps {
            let at = self.rng.random_range(0..self.hosts.len());
            self.pump(at);
            if self.setup.faults > 0 && self.rng.random_ratio(1, 500) {
                self.fault();
            }
            let progress = self.hub.progress(true, Duration::ZERO);
            if matches!(progress, Progress::Up) && !ends_early {
                break;
            }
        }
        if ends_early && self.rng.random() {
            return false;
        }
        self.hub.take_over();
        self.notes();
        let mut steps = 0;
        while !self.hub.has_taken_over(Duration::ZERO) {
            let at = self.rng.random_range(0..self.hosts.len());
            self.pump(at);
            steps += 1;
            if steps > 100_000 {
                self.sweep();
            }
            assert!(steps < 101_000, "the set-up calls are not taken over");
            if ends_early && steps > 100 {
                return false;
            }
        }
        self.notes();
        self.end_of_take_over();
        // Tasks without an end would keep their workers.
        for process in self.hosts.iter_mut().flat_map(|host| &mut host.processes) {
            self.moved += u64::from(process.as_mut().is_some_and(|p| p.worker.unstick()));
        }
        if self.rng.random() {
            self.check_kept();
        }
        true
    }

    /// A head connects to the agents that wait.
    fn begin_head(&mut self) {
        let setup = &self.setup;
        self.facts.tasks.next_head();
        let generation = self.facts.tasks.generation() as u32;
        self.hub = Hub::by_hand(self.hosts.len(), setup.limit).expect("descriptors");
        self.hub.set_clock(self.now);
        self.hub.follow(generation);
        let (path, max_bytes) = (log_path(), setup.head_log_limit);
        let kept = match setup.keeps {
            Keeps::ForAll => self.hub.reconnect(&path, max_bytes, Duration::MAX),
            _ => self.hub.keep_setup_log(&path, max_bytes, Duration::MAX),
        };
        kept.expect("a file");
        self.hub.limit_all(setup.timeout);
        self.arrivals = 0;
        self.change.answers_before = self.facts.seen.answers;
        self.change.is_new = true;
        self.facts
            .workers
            .iter_mut()
            .for_each(super::parts::WorkerFacts::next_head);
        for at in 0..self.hosts.len() {
            let host = &mut self.hosts[at];
            // Lost hosts come again only after the take-over.
            host.over = host.lost;
            if host.lost {
                self.hub.agent_ended(at, "no agent waits");
            } else {
                host.accept();
                let served = self.hub.greet(at, hello(), false);
                assert!(served.expect("an agent"));
            }
        }
        let bounds = self.bounds();
        let plans = self.hosts.iter().map(|host| {
            let ranks = Some(&host.ranks).filter(|ranks| !ranks.is_empty())?;
            Some(plan(ranks, bounds))
        });
        self.hub.go(plans.collect()).expect("plans");
        self.notes();
    }

    /// The head has the set-up calls of all workers, as far as there are any.
    fn end_of_take_over(&mut self) {
        self.change.is_new = false;
        for at in 0..self.hosts.len() {
            let takes_back = self.hub.takes_back(at);
            let host = &mut self.hosts[at];
            host.over = host.lost && !takes_back;
        }
        if !self.hub.has_setup_log() {
            return;
        }
        let ranks = 0..self.setup.workers as Rank;
        let (there, lost): (Vec<Rank>, Vec<Rank>) =
            ranks.partition(|&rank| !self.hosts[self.at[rank as usize].0].lost);
        self.change.running.clear();
        for &rank in &there {
            let logged = self.logged(rank);
            // Its agent restarts a worker with the calls that it had.
            if !self.is_terminated(rank) || self.facts.workers[rank as usize].awaits_restart {
                if let Some(running) = self.check_log(rank, &logged) {
                    self.change.running.insert(rank, running.hash);
                }
                self.facts.seen.taken_over_with_calls += usize::from(!logged.is_empty());
            }
            self.facts.workers[rank as usize].logged = logged;
        }
        let there: BTreeSet<Rank> = there
            .into_iter()
            .filter(|&rank| !self.is_terminated(rank))
            .collect();
        let of_one = there.first().map(|&rank| self.logged(rank));
        let expected = (there, of_one.unwrap_or_default());
        for rank in lost {
            let logged = self.logged(rank);
            self.check_common(&logged, &expected);
            self.facts.seen.lost_with_calls += usize::from(!logged.is_empty());
            self.facts.workers[rank as usize].logged = logged;
        }
    }

    /// Checks the set-up calls that a head has taken over: those that the worker has completed, with the one that it was
    /// running when its agent listed them, which is returned. That call may have failed since, and the head before has not
    /// seen its end: the state of the worker and that of the log are both right. Those that the head before saw
    /// acknowledged are among the calls.
    fn check_log(&self, rank: Rank, logged: &[Effect]) -> Option<Effect> {
        let known = &self.facts.workers[rank as usize];
        let running = known.listed_running;
        let with_running: Vec<Effect> = known.effects.iter().copied().chain(running).collect();
        let is_of = |effects: &[Effect]| digest(logged) == digest(effects);
        assert!(
            is_of(&known.effects) || is_of(&with_running),
            "the head has other set-up calls of worker {rank}: {logged:?} {with_running:?}"
        );
        let running = running.filter(|&running| !known.effects.contains(&running));
        if let Some(acknowledged) = self.change.acknowledged.get(&rank) {
            // Others may be among them that the head had cancelled.
            let mut needed = SetupCalls::default();
            for effect in acknowledged {
                needed.record(effect.name(), effect.hash);
            }
            let mut completed = known.effects.iter();
            let mut needed = needed.iter().map(|(_, hash)| hash);
            let all = needed.all(|hash| completed.any(|effect| effect.hash == *hash));
            assert!(
                all,
                "worker {rank} misses set-up calls of its last head: {:?} {acknowledged:?}",
                known.effects
            );
        }
        running
    }

    /// The head is told the RNG state of a worker that it has not known.
    pub fn introduced(&mut self, rank: Rank, seed: &bytes::Bytes) {
        let known = &mut self.facts.workers[rank as usize];
        assert!(
            known.seed == seed || known.other_seeds.contains(seed),
            "the head is told other random numbers of worker {rank}"
        );
        known.reported_seeds.push(seed.clone());
    }

    /// A worker was restarted after a pause.
    pub fn restarted(&mut self, rank: Rank) {
        let known = &mut self.facts.workers[rank as usize];
        assert!(known.is_terminated && known.awaits_restart);
        known.is_terminated = false;
        known.awaits_restart = false;
        known.ordered_from = TaskId::MAX;
        if let Some(last) = known.reported_seeds.last().filter(|last| !last.is_empty()) {
            known.seed = last.clone();
        }
        for task in self.facts.tasks.iter_mut() {
            if task.end.is_none() && (task.owner == rank || task.assigned == rank) {
                task.first_seed = None;
            }
        }
    }

    /// R takes the answers that agents have kept: all of them, each once.
    pub fn check_kept(&mut self) {
        let must: Vec<BTreeSet<TaskId>> = self.hosts.iter().map(|h| h.must_keep.clone()).collect();
        self.hub.ask_kept();
        let listed = self.sweep_until(|hub| hub.kept(Duration::ZERO));
        for (at, must) in must.into_iter().enumerate() {
            let listed = listed.iter().filter(|kept| kept.agent == at);
            let listed: BTreeSet<TaskId> = listed.map(|kept| kept.task).collect();
            let host = &self.hosts[at];
            assert!(
                listed
                    .iter()
                    .all(|task| host.must_keep.contains(task) || host.cut.contains(task)),
                "answers of others: {listed:?}"
            );
            // If the agent is another now, they were lost with it.
            let mut must = must.intersection(&host.must_keep);
            assert!(
                host.lost || must.all(|task| listed.contains(task)),
                "answers are missing"
            );
        }
        for kept in listed {
            assert!(generation(kept.task) < self.facts.tasks.generation());
            self.hub.ask_answer(kept.agent, kept.number);
            let Some(body) = self.sweep_until(|hub| hub.answer(Duration::ZERO)) else {
                assert!(self.hosts[kept.agent].lost, "an answer is not there");
                continue;
            };
            if !self.hosts[kept.agent].cut.contains(&kept.task) {
                check_answer(kept.task, self.facts.tasks[kept.task].answer_len, &body);
            }
            assert!(self.change.taken.insert(kept.task), "an answer comes twice");
            self.hub.drop_answer(kept.agent, kept.number);
            self.hosts[kept.agent].must_keep.remove(&kept.task);
            self.facts.seen.kept_answers += 1;
        }
    }

    fn sweep_until<T>(&mut self, found: impl Fn(&Hub) -> Option<T>) -> T {
        for _ in 0..100_000 {
            if let Some(found) = found(&self.hub) {
                return found;
            }
            self.sweep();
            self.notes();
        }
        panic!("no answer of an agent");
    }
}
