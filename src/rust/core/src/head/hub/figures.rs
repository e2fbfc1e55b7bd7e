//! What pages and `clusterTop()` show, collected when one of them asks.

use super::client::Hub;
use super::core::{Core, SharedCore};
use crate::head::dashboard::board::{Failure, FailureKind, JobView};
use crate::head::dashboard::http::parameter;
use crate::head::dashboard::json::Json;
use crate::head::dashboard::lanes::{Bins, MAX_BINS, Painter};
use crate::head::scheduler::events::State;
use crate::platform::memory::{host_memory, line_bytes};
use crate::protocol::control::Usage;
use crate::protocol::ids::Rank;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::{Instant, sleep_until};

/// Workers whose lanes are drawn before the lock is released.
const WORKERS_AT_A_TIME: usize = 64;
/// Maximum number of characters of all lanes of an answer.
const MAX_CHARACTERS: usize = 1 << 20;
/// Least time from a page's request to an answer with news: many failures must not make many answers.
const LEAST_GAP: Duration = Duration::from_millis(150);
/// The pause between two surveys of the memory of workers: a tenth of a second for each worker, between these. A survey
/// takes a host some 0.3 ms for each worker.
const SURVEY_PAUSES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// What a page asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FigureQuery {
    /// How long to wait for news.
    pub wait: Duration,
    /// The number of the last change of a failure that the page knows.
    pub seen: u64,
    /// The number of changes of exports that the page knows.
    pub exports: u64,
    /// The first bin of the lanes, and the length of a bin. `None`: no lanes.
    pub lanes: Option<(u64, Duration)>,
    /// The worker to describe.
    pub rank: Option<Rank>,
}

impl FigureQuery {
    /// Reads a query. Parameters that are missing or invalid have their defaults.
    pub fn parse(query: &str) -> FigureQuery {
        let millis = |name| parameter::<u64>(query, name).map(Duration::from_millis);
        FigureQuery {
            wait: millis("wait").unwrap_or_default(),
            seen: parameter(query, "seen").unwrap_or_default(),
            exports: parameter(query, "exports").unwrap_or_default(),
            lanes: parameter(query, "first").zip(millis("step")),
            rank: parameter::<Rank>(query, "rank").and_then(|rank| rank.checked_sub(1)),
        }
    }
}

/// The figures of a host.
#[derive(Clone, Debug, Default)]
pub struct HostFigures {
    /// Its name.
    pub name: String,
    /// Its state, as in `clusterHosts()`.
    pub state: &'static str,
    /// Why it is in that state, if there is a reason.
    pub reason: Option<String>,
    /// The batch job of its agent: the id, and the state in the engine's words.
    pub job: Option<(String, Option<String>)>,
    /// Its workers, as ranges of ranks from 1, with both ends.
    pub ranks: Vec<(Rank, Rank)>,
    /// Number of workers, of those that are up, and of those that are busy.
    pub workers: [u64; 3],
    /// Number of tasks that its workers have ended.
    pub done: u64,
    /// Bytes sent to it, and received from it.
    pub bytes: (u64, u64),
    /// Memory of its workers, if it is known.
    pub memory: Option<u64>,
    /// Memory of the machine: all, and what was available when the agent started.
    pub machine: Option<(u64, u64)>,
    /// Number of worker failures.
    pub losses: u64,
}

/// The figures of a worker.
#[derive(Clone, Debug, Default)]
pub struct WorkerFigures {
    /// The worker.
    pub rank: Rank,
    /// Its host.
    pub agent: usize,
    /// Its state, as in `clusterStatus()`.
    pub state: &'static str,
    /// Its process.
    pub pid: Option<u32>,
    /// How long it has had its task, in seconds.
    pub task_seconds: Option<f64>,
    /// Number of ended tasks.
    pub done: u64,
    /// Busy seconds.
    pub busy: f64,
    /// Bytes sent to it alone, and received from it.
    pub bytes: (u64, u64),
    /// Its memory, if it is known.
    pub memory: Option<u64>,
    /// How often it has failed.
    pub losses: u64,
    /// Its last error.
    pub error: Option<String>,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Seconds since the cluster was made.
    pub now: f64,
    /// Seconds since 1970.
    pub time: f64,
    /// The cluster is being stopped, or has been.
    pub stopped: bool,
    /// The workers wait for another session when this one ends.
    pub lingers: bool,
    /// This session has left the workers to another one.
    pub left: bool,
    /// The hosts.
    pub hosts: Vec<HostFigures>,
    /// A letter for the state of each worker: see [`state_letter`].
    pub states: String,
    /// The first bin of the lanes, the length of a bin, and the lane of each worker.
    pub lanes: Option<(Bins, Vec<String>)>,
    /// Tasks that have ended, their busy seconds, and worker failures.
    pub totals: (u64, f64, u64),
    /// The job that runs, or the last one.
    pub job: Option<JobView>,
    /// Number of calls that wait for a worker, and that workers have.
    pub calls: (usize, usize),
    /// Bytes of tasks that wait to be sent.
    pub queued: u64,
    /// The head's process: its number and its memory; and the memory of its machine, all and available.
    pub head: (u32, Option<u64>, Option<(u64, u64)>),
    /// The number of failures of each kind.
    pub counts: [u64; FailureKind::ALL.len()],
    /// The failures that the page does not know.
    pub failures: Vec<Failure>,
    /// The number of the last change of a failure.
    pub changes: u64,
    /// The exports with their bytes, if the page does not know all of them, and the number of their changes.
    pub exports: (Option<Vec<(String, u64)>>, u64),
    /// The worker that was asked for.
    pub worker: Option<WorkerFigures>,
}

/// The name of a state, as in `clusterStatus()`.
pub fn state_name(state: State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Idle => "idle",
        State::Busy(_) => "busy",
        State::Ending(_) => "ending",
        State::Draining(_) => "draining",
        State::Restoring => "restoring",
        State::Waiting => "waiting",
        State::Lost => "lost",
        State::Stopped => "stopped",
    }
}

/// A letter for a state: the first one of its name, and `o` for `stopped`.
pub fn state_letter(state: State) -> char {
    match state {
        State::Stopped => 'o',
        state => state_name(state).chars().next().unwrap_or('?'),
    }
}

impl SharedCore {
    /// Waits until there is a failure that the page does not know, the cluster stops, or this time is over.
    pub async fn wait_for_news(&self, query: &FigureQuery, max: Duration) {
        let (news, ending) = {
            let core = self.core();
            (core.board.news.clone(), core.board.ending.clone())
        };
        let asked = Instant::now();
        let (earliest, latest) = (asked + LEAST_GAP.min(max), asked + max);
        loop {
            let (failed, ended) = (news.notified(), ending.notified());
            tokio::pin!(failed, ended);
            // From here on a notification is not missed.
            failed.as_mut().enable();
            ended.as_mut().enable();
            let (stopping, is_news) = {
                let core = self.core();
                (core.stopping, core.board.changes() > query.seen)
            };
            let until = if is_news { earliest } else { latest };
            if stopping || Instant::now() >= until {
                return;
            }
            tokio::select! {
                () = sleep_until(until) => {}
                () = ended => {}
                () = failed, if !is_news => {}
            }
        }
    }

    /// Collects the figures for a page.
    pub fn figures(&self, query: &FigureQuery) -> Figures {
        let mut figures = {
            let mut core = self.core();
            let now = core.began.elapsed();
            core.board.watched = Some(now);
            core.survey(now);
            figures_of(&core, query)
        };
        if let Some((first, step)) = query.lanes {
            figures.lanes = Some(self.lanes(first, step));
        }
        figures.head = head_memory();
        figures
    }

    /// Draws the lanes of all workers. The lock is released in between, because R may want it.
    fn lanes(&self, first: u64, step: Duration) -> (Bins, Vec<String>) {
        let (now, count) = {
            let core = self.core();
            (core.began.elapsed(), core.inbox.workers.len())
        };
        let max_bins = MAX_BINS.min(MAX_CHARACTERS / count.max(1));
        let bins = Bins::new(first, step, now, max_bins);
        let mut painter = Painter::new(bins, now);
        let mut lanes = Vec::with_capacity(count);
        while lanes.len() < count {
            let core = self.core();
            let end = count.min(lanes.len() + WORKERS_AT_A_TIME);
            for rank in lanes.len()..end {
                let mut lane = String::with_capacity(bins.count);
                if let Some((stats, current)) = core.scheduler.activity(rank as Rank) {
                    painter.paint(stats, current, &mut lane);
                }
                lanes.push(lane);
            }
        }
        (bins, lanes)
    }
}

impl Core {
    /// Asks the hosts for the memory of their workers, if that is due.
    fn survey(&mut self, now: Duration) {
        let count = u32::try_from(self.inbox.workers.len()).unwrap_or(u32::MAX);
        let (min, max) = SURVEY_PAUSES;
        let pause = (Duration::from_millis(100) * count).clamp(min, max);
        let is_due = |last: Duration| now.saturating_sub(last) >= pause;
        if !self.stopping && self.board.surveyed.is_none_or(is_due) {
            self.board.surveyed = Some(now);
            let ranks: Vec<Rank> = (0..count).collect();
            self.ask_usage(&ranks);
        }
    }

    /// The state of a worker, as `clusterStatus()` reports it.
    pub(super) fn state_of(&self, rank: Rank) -> State {
        let state = self.scheduler.state(rank);
        let worker = self.inbox.workers.get(rank as usize);
        // A reconnected host is restored before R can use it.
        match worker.is_some_and(|worker| worker.termination.is_some()) && state == State::Idle {
            true => State::Restoring,
            false => state,
        }
    }
}

fn memory_of(usage: Option<&(u64, Usage)>) -> Option<u64> {
    let (_, usage) = usage?;
    let bytes = match usage.proportional {
        0 => usage.resident,
        bytes => bytes,
    };
    (bytes > 0).then_some(bytes)
}

fn figures_of(core: &Core, query: &FigureQuery) -> Figures {
    let board = &core.board;
    let mut hosts: Vec<HostFigures> = (0..core.conns.len())
        .map(|agent| host_of(core, agent))
        .collect();
    let mut states = String::with_capacity(core.inbox.workers.len());
    let (mut done, mut busy, mut losses) = (0, Duration::ZERO, 0);
    let mut stopped_workers = vec![0; hosts.len()];
    for (at, worker) in core.inbox.workers.iter().enumerate() {
        let rank = at as Rank;
        let state = core.state_of(rank);
        states.push(state_letter(state));
        let Some(host) = hosts.get_mut(worker.agent) else {
            continue;
        };
        match host.ranks.last_mut() {
            Some((_, last)) if *last == rank => *last = rank + 1,
            _ => host.ranks.push((rank + 1, rank + 1)),
        }
        let is_up = !matches!(
            state,
            State::Lost | State::Stopped | State::Waiting | State::Starting
        );
        let is_busy = matches!(
            state,
            State::Busy(_) | State::Ending(_) | State::Draining(Some(_))
        );
        for (count, is) in host.workers.iter_mut().zip([true, is_up, is_busy]) {
            *count += u64::from(is);
        }
        stopped_workers[worker.agent] += u64::from(state == State::Stopped);
        if let Some(bytes) = memory_of(worker.usage.as_ref()).filter(|_| is_up) {
            *host.memory.get_or_insert(0) += bytes;
        }
        if let Some((stats, _)) = core.scheduler.activity(rank) {
            host.done += stats.tasks;
            host.losses += stats.failures;
            done += stats.tasks;
            busy += stats.busy;
            losses += stats.failures;
        }
    }
    for (host, stopped) in hosts.iter_mut().zip(stopped_workers) {
        if core.stopping || stopped > 0 && stopped == host.workers[0] {
            host.state = "stopped";
        }
    }
    let (exports, export_changes) = board.exports();
    let exports = (export_changes > query.exports).then(|| {
        exports
            .iter()
            .map(|(name, &bytes)| (name.clone(), bytes))
            .collect()
    });
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    Figures {
        now: core.began.elapsed().as_secs_f64(),
        time: time.map_or(0.0, |time| time.as_secs_f64()),
        stopped: core.stopping || core.inbox.closed,
        lingers: core.lingers,
        left: core.left,
        hosts,
        states,
        lanes: None,
        totals: (done, busy.as_secs_f64(), losses),
        job: board.job.clone(),
        calls: core.scheduler.count_calls(),
        queued: core.queued as u64,
        head: (0, None, None),
        counts: FailureKind::ALL.map(|kind| board.count(kind)),
        failures: board.failures_since(query.seen).cloned().collect(),
        changes: board.changes(),
        exports: (exports, export_changes),
        worker: query.rank.and_then(|rank| worker_of(core, rank)),
    }
}

fn host_of(core: &Core, agent: usize) -> HostFigures {
    let (conn, host) = (&core.conns[agent], &core.inbox.hosts[agent]);
    let failure = host.failure.as_ref();
    let state = match () {
        () if host.awaited => "waiting",
        () if failure.is_some() && host.up.is_none() => "failed",
        () if failure.is_some() => "lost",
        () if host.draining.is_some() => "draining",
        () if host.hello.is_none() => "starting",
        () => "up",
    };
    let known = core.board.batch_jobs.iter().find(|(at, ..)| *at == agent);
    let job = match (known, &host.job) {
        (Some((_, id, state)), _) => Some((id.clone(), Some(state.clone()))),
        (None, Some(id)) => Some((id.clone(), None)),
        (None, None) => None,
    };
    let memory = |total: u64, available: u64| (total > 0).then_some((total, available));
    HostFigures {
        name: host.node.clone().unwrap_or_else(|| host.name.clone()),
        state,
        reason: match state {
            "draining" => host.draining.clone(),
            "up" | "starting" => None,
            _ => failure.map(|failure| failure.reason.clone()),
        },
        job,
        bytes: (conn.bytes_in, conn.bytes_out),
        machine: host
            .hello
            .as_ref()
            .and_then(|hello| memory(hello.memory_total, hello.memory_available)),
        ..HostFigures::default()
    }
}

fn worker_of(core: &Core, rank: Rank) -> Option<WorkerFigures> {
    let worker = core.inbox.workers.get(rank as usize)?;
    let (stats, current) = core.scheduler.activity(rank)?;
    let now = core.began.elapsed();
    Some(WorkerFigures {
        rank,
        agent: worker.agent,
        state: state_name(core.state_of(rank)),
        pid: worker.pid.filter(|_| worker.termination.is_none()),
        task_seconds: current.map(|times| now.saturating_sub(times.assigned).as_secs_f64()),
        done: stats.tasks,
        busy: stats.busy.as_secs_f64(),
        bytes: (stats.bytes_in, stats.bytes_out),
        memory: memory_of(worker.usage.as_ref()),
        losses: stats.failures,
        error: stats.error.clone(),
    })
}

fn head_memory() -> (u32, Option<u64>, Option<(u64, u64)>) {
    let status = std::fs::read_to_string("/proc/self/status");
    let resident = status.ok().and_then(|text| line_bytes(&text, "VmRSS:"));
    (std::process::id(), resident, host_memory())
}

impl Hub {
    /// Collects the figures without lanes.
    pub fn figures(&self, query: &FigureQuery) -> Figures {
        self.shared_core().figures(query)
    }
}

impl Figures {
    /// Writes the figures for the page.
    pub fn write(&self, json: &mut Json) {
        json.open('{');
        json.name("now").decimal(self.now);
        json.name("time").decimal(self.time);
        json.name("stopped").flag(self.stopped);
        json.name("lingers").flag(self.lingers);
        json.name("left").flag(self.left);
        json.name("states").text(&self.states);
        json.name("hosts").open('[');
        for host in &self.hosts {
            host.write(json);
        }
        json.close(']');
        if let Some((bins, lanes)) = &self.lanes {
            json.name("first").number(bins.first);
            json.name("step").number(bins.step.as_millis() as u64);
            json.name("lanes").open('[');
            for lane in lanes {
                json.text(lane);
            }
            json.close(']');
        }
        let (done, busy, losses) = self.totals;
        json.name("done").number(done);
        json.name("busy").decimal(busy);
        json.name("losses").number(losses);
        if let Some(job) = &self.job {
            json.name("job");
            self.write_job(job, json);
        }
        json.name("calls").open('[').number(self.calls.0 as u64);
        json.number(self.calls.1 as u64).close(']');
        json.name("queued").number(self.queued);
        let (pid, resident, machine) = self.head;
        json.name("head").open('{');
        json.name("pid").number(u64::from(pid));
        json.name("memory").some_number(resident);
        json.name("total")
            .some_number(machine.map(|(total, _)| total));
        json.name("available")
            .some_number(machine.map(|(_, available)| available));
        json.close('}');
        json.name("counts").open('{');
        for (kind, &count) in FailureKind::ALL.iter().zip(&self.counts) {
            json.name(kind.name()).number(count);
        }
        json.close('}');
        json.name("changes").number(self.changes);
        json.name("failures").open('[');
        for failure in &self.failures {
            write_failure(failure, json);
        }
        json.close(']');
        json.name("exportChanges").number(self.exports.1);
        if let Some(exports) = &self.exports.0 {
            json.name("exports").open('[');
            for (name, bytes) in exports {
                json.open('[').text(name).number(*bytes).close(']');
            }
            json.close(']');
        }
        if let Some(worker) = &self.worker {
            json.name("worker");
            worker.write(json);
        }
        json.close('}');
    }

    fn write_job(&self, job: &JobView, json: &mut Json) {
        json.open('{');
        json.name("id").number(job.id);
        let (noun, all, done) = job.counted();
        json.name("noun").text(noun);
        json.name("tasks").number(all as u64);
        json.name("done").number(done as u64);
        json.name("failed").number(job.failed());
        json.name("seconds").decimal(self.job_seconds(job));
        json.name("ended").flag(job.ended.is_some());
        json.name("failedNoun").text(job.failed_noun());
        if let Some(store) = &job.store {
            let (waiting, trouble) = store.gauge.read();
            json.name("store").open('{');
            json.name("dir").text(&store.dir);
            json.name("elements").number(store.elements as u64);
            json.name("before").number(store.before as u64);
            json.name("waiting").number(waiting as u64);
            json.name("trouble").some_text(trouble.as_deref());
            json.close('}');
        }
        json.close('}');
    }

    /// How long a job has run, in seconds.
    pub fn job_seconds(&self, job: &JobView) -> f64 {
        let end = job.ended.map_or(self.now, |ended| ended.as_secs_f64());
        (end - job.began.as_secs_f64()).max(0.0)
    }
}

impl HostFigures {
    fn write(&self, json: &mut Json) {
        json.open('{');
        json.name("name").text(&self.name);
        json.name("state").text(self.state);
        json.name("reason").some_text(self.reason.as_deref());
        if let Some((id, state)) = &self.job {
            json.name("job").text(id);
            json.name("jobState").some_text(state.as_deref());
        }
        json.name("ranks").open('[');
        for &(from, to) in &self.ranks {
            json.open('[').number(u64::from(from));
            json.number(u64::from(to)).close(']');
        }
        json.close(']');
        for (name, count) in ["workers", "up", "busy"].into_iter().zip(self.workers) {
            json.name(name).number(count);
        }
        json.name("done").number(self.done);
        json.name("in").number(self.bytes.0);
        json.name("out").number(self.bytes.1);
        json.name("memory").some_number(self.memory);
        json.name("total")
            .some_number(self.machine.map(|(total, _)| total));
        json.name("losses").number(self.losses);
        json.close('}');
    }
}

impl WorkerFigures {
    fn write(&self, json: &mut Json) {
        json.open('{');
        json.name("rank").number(u64::from(self.rank) + 1);
        json.name("host").number(self.agent as u64);
        json.name("state").text(self.state);
        json.name("pid").some_number(self.pid.map(u64::from));
        json.name("taskSeconds");
        match self.task_seconds {
            Some(seconds) => json.decimal(seconds),
            None => json.null(),
        };
        json.name("done").number(self.done);
        json.name("busy").decimal(self.busy);
        json.name("in").number(self.bytes.0);
        json.name("out").number(self.bytes.1);
        json.name("memory").some_number(self.memory);
        json.name("losses").number(self.losses);
        json.name("error").some_text(self.error.as_deref());
        json.close('}');
    }
}

fn write_failure(failure: &Failure, json: &mut Json) {
    json.open('{');
    json.name("id").number(failure.id);
    json.name("kind").text(failure.kind.name());
    json.name("at").decimal(failure.at.as_secs_f64());
    json.name("count").number(failure.count);
    json.name("rank")
        .some_number(failure.rank.map(|rank| u64::from(rank) + 1));
    json.name("host")
        .some_number(failure.agent.map(|agent| agent as u64));
    json.name("text").text(&failure.text);
    json.name("output").text(&failure.output);
    json.close('}');
}
