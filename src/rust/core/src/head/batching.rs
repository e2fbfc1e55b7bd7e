//! The planner of a job: decides which tasks a worker gets next, and how many at once.
//!
//! A pure state machine. The head reports which batches have ended and how long they took, and asks for
//! the next batch: tasks that are sent together and answered together. Batches of one task balance the
//! load best, but cost a message for each task. Batches are therefore just large enough for messaging to
//! cost little ([`Planner::size`]). If a worker would be idle while its answer and its next batch are
//! being transferred, one batch is prefetched.
//!
//! With a free assignment, tasks are started in the given order, and batches shrink towards the end, as
//! in factoring (Hummel, Schonberg and Flynn, CACM 35(8), 1992): no batch has more than half of an even
//! share of the remaining tasks. If tasks turn out to be much longer than earlier ones, the rest of a
//! batch is returned ([`Batch::max_time`]).

use std::collections::VecDeque;
use std::time::Duration;

/// Which worker gets which task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assignment {
    /// Any idle worker gets the next task.
    Free,
    /// Tasks are assigned round-robin: the first task to the first slot, and so on.
    Round,
}

/// Maximum number of tasks in one batch.
const MAX_BATCH: usize = 10_000;

/// Maximum number of seconds that a batch may run before its rest is returned.
const MAX_BATCH_SECONDS: f64 = 3600.0;

/// Maximum number of bytes that the answer to a batch should have.
const MAX_TYPICAL_ANSWER: f64 = 128.0 * 1024.0;

/// Minimum ratio of the duration of a batch to the time that the head spends on the batch.
const COST_FACTOR: f64 = 20.0;

/// The same ratio, for each worker: the head is then busy for a quarter of the time at most.
const COST_FACTOR_OF_ALL: f64 = 4.0;

/// Minimum ratio of the duration of a batch to the round-trip time of the worker.
const RTT_FACTOR: f64 = 2.0;

/// Minimum ratio of the duration of a batch to the time to read the blob that its tasks share.
const READ_FACTOR: f64 = 4.0;

/// Estimated seconds that a worker takes to read a byte of the blob. A list of many short vectors takes longer, a
/// long vector less.
const READ_SECONDS_PER_BYTE: f64 = 1e-8;

/// If reading the blob is expected to take this many seconds, even the first batches have several tasks, because
/// measuring the duration of a single task would cost a whole read.
const LONG_READ: f64 = 0.002;

/// Minimum duration of a batch, in seconds.
const MIN_BATCH_SECONDS: f64 = 0.002;

/// Minimum duration of a batch if tasks compute, in seconds. A batch costs the head, the agent and the worker up to
/// 0.4 ms where waking a process is slow. On one machine, the cores that compute pay for that.
const MIN_COMPUTING_SECONDS: f64 = 0.02;

/// The rest of a batch is returned when the batch has taken this many times as long as expected, and also at least
/// [`MIN_OVERTIME`]: its tasks may be long, or the worker may have had only a part of a core.
const OVERTIME_FACTOR: f64 = 4.0;

/// Minimum number of seconds after which the rest of a batch is returned.
const MIN_OVERTIME: f64 = 0.02;

/// A batch is prefetched if a worker would be idle for more than this fraction of its time without it.
const MAX_IDLE: f64 = 0.02;

/// Round-trip time, in seconds, above which a worker is far away, so that it is sent a second task at the beginning.
const FAR_RTT: f64 = 0.005;

/// Tasks count as computing if workers have waited in less than this fraction of the batches. Eight batches without a
/// wait suffice. A single wait does not count, because a page fault may cause it.
const MAX_WAITING: f64 = 0.2;

/// The weight of the last batch in the fraction of batches that have waited.
const WAITING_WEIGHT: f64 = 0.2;

/// The weight of a new measurement in a moving average.
const NEW_WEIGHT: f64 = 0.1;

/// Tasks that are sent together, by their numbers from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The numbers of the tasks, in order.
    pub tasks: Vec<usize>,
    /// The worker is still busy with another batch.
    pub prefetch: bool,
    /// After this time, the worker returns the tasks that it has not started, so that other workers can run them.
    /// Zero: never.
    pub max_time: Duration,
}

/// How a batch that was answered went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended {
    /// Number of tasks of the batch that have been completed.
    pub tasks: usize,
    /// How long the worker was busy with the batch.
    pub busy: Duration,
    /// The time between sending and answer, if the batch was not prefetched.
    pub turnaround: Option<Duration>,
    /// Bytes of the answer.
    pub bytes: usize,
    /// The CPU time of the batch, if the worker has not waited for anything.
    pub computed: Option<Duration>,
    /// How long the worker has read the blob before it ran the batch.
    pub reading: Duration,
}

/// Tasks that have not been assigned to a batch.
#[derive(Debug)]
struct Queue {
    /// Lost tasks, which are sent one by one, because one of them may kill its worker each time.
    again: VecDeque<usize>,
    /// Tasks of batches that were returned.
    returned: VecDeque<usize>,
    next: usize,
    step: usize,
    end: usize,
}

impl Queue {
    fn len(&self) -> usize {
        self.again.len()
            + self.returned.len()
            + self.end.saturating_sub(self.next).div_ceil(self.step)
    }

    fn take(&mut self, count: usize) -> Vec<usize> {
        match self.again.pop_front() {
            Some(task) => vec![task],
            None => std::iter::from_fn(|| self.pop()).take(count).collect(),
        }
    }

    fn pop(&mut self) -> Option<usize> {
        self.returned.pop_front().or_else(|| {
            let task = self.next;
            (task < self.end).then(|| self.next += self.step)?;
            Some(task)
        })
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// Number of tasks of each outstanding batch, the running one first.
    out: VecDeque<usize>,
    /// The round-trip time in seconds: the time between sending and answer in which the worker was not busy.
    round_trip: Option<f64>,
    /// When the running batch was sent or, if it was prefetched, when the previous one was answered.
    since: f64,
    close: bool,
    host: usize,
}

/// The host of some of the slots.
#[derive(Debug, Default)]
struct Host {
    cores: usize,
    /// Number of slots whose workers are not terminated.
    living: usize,
    /// Number of slots with outstanding batches.
    active: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Planner {
    assignment: Assignment,
    /// One queue, or one for each slot.
    queues: Vec<Queue>,
    slots: Vec<Slot>,
    hosts: Vec<Host>,
    /// The fraction of recent batches that have waited.
    waiting: f64,
    /// Slots have been refused work because the cores of their host are busy.
    rests: bool,
    /// Each batch has one task.
    singly: bool,
    /// Average duration of recent tasks, in seconds.
    recent: Option<f64>,
    /// Total duration of all completed tasks, in seconds.
    seconds: f64,
    /// Number of completed tasks.
    done: usize,
    /// Average number of bytes of a task's answer.
    bytes: f64,
    /// Average number of seconds that the head spends on a batch.
    cost: f64,
    /// Average number of seconds that a worker takes to read the blob.
    reading: f64,
    /// The minimum round-trip time of all slots, in seconds.
    rtt: f64,
}

impl Planner {
    /// Creates a planner for a number of tasks and of slots. There must be at least one slot.
    pub fn new(assignment: Assignment, tasks: usize, slots: usize) -> Planner {
        let queue = |first, step| Queue {
            again: VecDeque::new(),
            returned: VecDeque::new(),
            next: first,
            step,
            end: tasks,
        };
        Planner {
            assignment,
            queues: match assignment {
                Assignment::Free => vec![queue(0, 1)],
                Assignment::Round => (0..slots).map(|at| queue(at, slots)).collect(),
            },
            slots: (0..slots).map(|_| Slot::default()).collect(),
            hosts: vec![Host {
                living: slots,
                ..Host::default()
            }],
            waiting: 1.0,
            rests: false,
            singly: false,
            recent: None,
            seconds: 0.0,
            done: 0,
            bytes: 0.0,
            cost: 0.0,
            reading: 0.0,
            rtt: 0.0,
        }
    }

    /// Sets the host of a slot, counted from 0, and the number of cores of that host, 0 if it is not known.
    pub fn set_host(&mut self, slot: usize, host: usize, cores: usize) {
        if self.hosts.len() <= host {
            self.hosts.resize_with(host + 1, Host::default);
        }
        self.hosts[host].cores = cores;
        let before = std::mem::replace(&mut self.slots[slot].host, host);
        self.hosts[before].living -= 1;
        self.hosts[host].living += 1;
    }

    /// Whether slots that were refused work may ask again, because tasks now wait, or take longer than expected.
    /// True once for each refusal.
    pub fn may_resume(&mut self, now: Duration) -> bool {
        let now = now.as_secs_f64();
        let is_long = || {
            self.task(now)
                .is_some_and(|task| 2.0 * task > MIN_COMPUTING_SECONDS)
        };
        self.rests && (!self.is_computing() || is_long()) && std::mem::take(&mut self.rests)
    }

    /// Whether recent tasks have only computed.
    fn is_computing(&self) -> bool {
        self.waiting < MAX_WAITING
    }

    /// Whether an idle slot should stay idle, because the cores of its host are busy with tasks so short that batches
    /// have several. More processes would only share the cores, and lose the contents of the caches to each other.
    fn should_rest(&self, slot: usize, size: usize) -> bool {
        let host = &self.hosts[self.slots[slot].host];
        let busy = host.cores > 0 && host.active > host.cores;
        self.assignment == Assignment::Free && busy && size > 1 && self.is_computing()
    }

    fn living(&self) -> usize {
        self.hosts.iter().map(|host| host.living).sum()
    }

    /// Number of slots that have a core, or of all slots if tasks wait: see [`Planner::should_rest`].
    fn useful(&self) -> usize {
        let of_host = |host: &Host| match host.cores {
            0 => host.living,
            cores => host.living.min(cores + 1),
        };
        match self.is_computing() {
            true => self.hosts.iter().map(of_host).sum(),
            false => self.living(),
        }
    }

    /// Sets the round-trip time of a slot, if it is known: see [`Planner::rtt`].
    pub fn expect(&mut self, slot: usize, rtt: Option<f64>) {
        self.slots[slot].round_trip = rtt;
    }

    /// Sets the size of the blob that a worker must read before the tasks of a batch.
    pub fn expect_reading(&mut self, bytes: u64) {
        self.reading = READ_SECONDS_PER_BYTE * bytes as f64;
    }

    /// The round-trip time of a slot in seconds, if it is known.
    pub fn rtt(&self, slot: usize) -> Option<f64> {
        self.slots[slot].round_trip
    }

    /// Limits batches to one task from now on.
    pub fn singly(&mut self) {
        self.singly = true;
    }

    fn queue(&mut self, slot: usize) -> &mut Queue {
        match self.assignment {
            Assignment::Free => &mut self.queues[0],
            Assignment::Round => &mut self.queues[slot],
        }
    }

    /// Number of tasks that have not been assigned to a batch.
    pub fn left(&self) -> usize {
        self.queues.iter().map(Queue::len).sum()
    }

    /// Whether the duration of tasks is known.
    pub fn knows(&self) -> bool {
        self.done > 0
    }

    /// Returns the next batch for this slot, if it should get one now. The caller returns tasks that cannot be
    /// sent with the others by [`Planner::returned`]. `now`: the time since a fixed moment.
    pub fn next(&mut self, slot: usize, now: Duration) -> Option<Batch> {
        let now = now.as_secs_f64();
        let prefetch = !self.slots[slot].out.is_empty();
        if self.slots[slot].close || self.queue(slot).len() == 0 {
            return None;
        }
        let task = self.task(now).filter(|_| !self.singly);
        let may_prefetch = match task {
            Some(task) => self.may_prefetch(slot, task),
            None => self.is_far(slot),
        };
        if prefetch && !may_prefetch {
            return None;
        }
        let size = match task {
            Some(task) => self.size(slot, task),
            None if self.reading > LONG_READ && !self.singly => {
                self.half_share().clamp(1, MAX_BATCH)
            }
            None => 1,
        };
        if !prefetch && self.should_rest(slot, size) {
            self.rests = true;
            return None;
        }
        let tasks = self.queue(slot).take(size);
        let at = &mut self.slots[slot];
        at.out.push_back(tasks.len());
        if !prefetch {
            at.since = now;
            self.hosts[at.host].active += 1;
        }
        let max_time = match self.assignment {
            Assignment::Free if tasks.len() > 1 => {
                let expected = OVERTIME_FACTOR * task.unwrap_or(0.0) * tasks.len() as f64;
                // The worker that gets the returned tasks must read the blob again.
                let min_time = MIN_OVERTIME
                    .max(READ_FACTOR * self.reading)
                    .min(MAX_BATCH_SECONDS);
                Duration::from_secs_f64(expected.clamp(min_time, MAX_BATCH_SECONDS))
            }
            _ => Duration::ZERO,
        };
        Some(Batch {
            tasks,
            prefetch,
            max_time,
        })
    }

    /// Estimates the duration of a task in seconds. The estimate tends to be too long, because a batch that takes
    /// longer than expected delays the end. The first tasks to end are short ones, so the time that other tasks
    /// have been running counts too (the maximum likelihood estimate for censored exponential durations).
    fn task(&self, now: f64) -> Option<f64> {
        let recent = self.recent?;
        let running = self.slots.iter().filter(|slot| !slot.out.is_empty());
        let before = |slot: &Slot| slot.round_trip.unwrap_or(self.rtt) + self.reading;
        let passed = |slot: &Slot| now - slot.since - before(slot);
        let running: f64 = running
            .map(|slot| passed(slot).max(0.0) * self.core_fraction(slot))
            .sum();
        let mean = (self.seconds + running) / self.done as f64;
        Some(recent.max(mean).max(1e-9))
    }

    /// The fraction of a core that a slot has if tasks compute.
    fn core_fraction(&self, slot: &Slot) -> f64 {
        let host = &self.hosts[slot.host];
        if self.is_computing() && host.cores > 0 && host.active > host.cores {
            host.cores as f64 / host.active as f64
        } else {
            1.0
        }
    }

    /// Number of tasks with which a batch is large enough for messaging to cost little.
    fn enough(&self, slot: usize, task: f64) -> f64 {
        let round_trip = self.slots[slot].round_trip.unwrap_or(0.0);
        let rtt = RTT_FACTOR * round_trip;
        let work = COST_FACTOR.max(COST_FACTOR_OF_ALL * self.living() as f64) * self.cost;
        let min_duration = match self.is_computing() {
            true => MIN_COMPUTING_SECONDS,
            false => MIN_BATCH_SECONDS,
        };
        let reading = READ_FACTOR * self.reading;
        (rtt.max(work).max(min_duration).max(reading) / task)
            .min(MAX_TYPICAL_ANSWER / self.bytes.max(1.0))
    }

    /// Half of an even share of the remaining tasks, for a free assignment.
    fn half_share(&self) -> usize {
        self.queues[0].len() / (2 * self.useful().max(1))
    }

    fn size(&self, slot: usize, task: f64) -> usize {
        let fair = match self.assignment {
            Assignment::Free => {
                let len = self.queues[0].len();
                // One running and one prefetched batch must together cover the round-trip time.
                let round_trip = self.slots[slot].round_trip.unwrap_or(0.0);
                let filling = (round_trip / 2.0 / task) as usize;
                let filling = filling.min(len.div_ceil(self.useful().max(1)));
                // Do not leave tasks to another worker if they are shorter than its reading of the blob.
                let reading = (self.reading / task) as usize;
                self.half_share().max(filling).max(reading.min(len))
            }
            Assignment::Round => self.queues[slot].len(),
        };
        fair.min(MAX_BATCH)
            .min(self.enough(slot, task) as usize)
            .max(1)
    }

    /// Whether a second task may be sent to this slot before the duration of tasks is known.
    fn is_far(&self, slot: usize) -> bool {
        let at = &self.slots[slot];
        let enough = self.left() > 2 * self.living();
        enough
            && !self.singly
            && at.out.len() == 1
            && at.round_trip.is_some_and(|rtt| rtt > FAR_RTT)
    }

    /// Whether a second batch may be sent to this slot.
    fn may_prefetch(&self, slot: usize, task: f64) -> bool {
        let at = &self.slots[slot];
        let (1, Some(rtt), Some(running)) = (at.out.len(), at.round_trip, at.out.front()) else {
            return false;
        };
        let batch = self.reading + *running as f64 * task;
        let queue = match self.assignment {
            Assignment::Free => &self.queues[0],
            Assignment::Round => return rtt > MAX_IDLE * batch,
        };
        // Towards the end, a prefetched batch may have to wait for a long task while other workers are idle.
        let max_time = match queue.len() > 2 * self.living() {
            true => MAX_IDLE * batch,
            false => batch,
        };
        rtt > max_time
    }

    /// Records that the oldest batch of this slot has been answered.
    pub fn ended(&mut self, slot: usize, ended: Ended, now: Duration) {
        self.waiting +=
            WAITING_WEIGHT * (f64::from(u8::from(ended.computed.is_none())) - self.waiting);
        let at = &mut self.slots[slot];
        at.out.pop_front();
        if at.out.is_empty() {
            self.hosts[at.host].active -= 1;
        }
        at.since = now.as_secs_f64();
        let busy = ended.busy.as_secs_f64();
        let reading = ended.reading.as_secs_f64();
        if let Some(turnaround) = ended.turnaround {
            let rtt = (turnaround.as_secs_f64() - busy - reading).max(0.0);
            // The minimum is the latency of the link; a longer time means that a process was busy.
            at.round_trip = Some(match at.round_trip {
                Some(before) if rtt > before => before + NEW_WEIGHT * (rtt - before),
                _ => rtt,
            });
            self.rtt = match self.done {
                0 => rtt,
                _ => self.rtt.min(rtt),
            };
        }
        if ended.tasks == 0 {
            return;
        }
        let count = ended.tasks as f64;
        // Use the CPU time, so that other processes on the cores do not make a task appear longer.
        let work = ended
            .computed
            .map_or(busy, |time| busy.min(time.as_secs_f64()));
        let (task, bytes) = (work / count, ended.bytes as f64 / count);
        let mix = |before: f64, now: f64| before + NEW_WEIGHT * (now - before);
        self.recent = Some(self.recent.map_or(task, |before| mix(before, task)));
        self.bytes = match self.done {
            0 => bytes,
            _ => mix(self.bytes, bytes).max(bytes.min(self.bytes)),
        };
        self.reading = match self.done {
            0 => reading,
            _ => mix(self.reading, reading),
        };
        self.seconds += work;
        self.done += ended.tasks;
    }

    /// Records that a batch of this slot has ended without an answer: the last one if `last`, else the oldest one.
    pub fn dropped(&mut self, slot: usize, last: bool) {
        let at = &mut self.slots[slot];
        let dropped = if last {
            at.out.pop_back()
        } else {
            at.out.pop_front()
        };
        if dropped.is_some() && at.out.is_empty() {
            self.hosts[at.host].active -= 1;
        }
    }

    /// Records that a task was sent to this slot again, before its outstanding batches.
    pub fn given_first(&mut self, slot: usize) {
        let at = &mut self.slots[slot];
        if at.out.is_empty() {
            self.hosts[at.host].active += 1;
        }
        at.out.push_front(1);
    }

    /// Records that only `tasks` tasks of the last batch of this slot have been sent.
    pub fn shortened(&mut self, slot: usize, tasks: usize) {
        if let Some(last) = self.slots[slot].out.back_mut() {
            *last = tasks;
        }
    }

    /// Returns tasks of this slot that have not been started. They are assigned again, in this order, before the
    /// tasks that have not been assigned yet.
    pub fn returned(&mut self, slot: usize, tasks: &[usize]) {
        let queue = self.queue(slot);
        for &task in tasks.iter().rev() {
            queue.returned.push_front(task);
        }
    }

    /// Returns tasks of this slot that were lost with their worker. They are assigned again one by one, in order
    /// and before all others.
    pub fn lost(&mut self, slot: usize, tasks: &[usize]) {
        let again = &mut self.queue(slot).again;
        again.extend(tasks);
        again.make_contiguous().sort_unstable();
    }

    /// Closes this slot: it gets no more batches. Tasks that are bound to it stay in its queue.
    pub fn close(&mut self, slot: usize) {
        let at = &mut self.slots[slot];
        if !std::mem::replace(&mut at.close, true) {
            self.hosts[at.host].living -= 1;
        }
    }

    /// Gives a closed slot batches again.
    pub fn open(&mut self, slot: usize) {
        let at = &mut self.slots[slot];
        if std::mem::replace(&mut at.close, false) {
            self.hosts[at.host].living += 1;
        }
    }

    /// Whether any slot is open.
    pub fn any_left(&self) -> bool {
        self.living() > 0
    }

    /// Number of outstanding batches of this slot.
    pub fn out(&self, slot: usize) -> usize {
        self.slots[slot].out.len()
    }

    /// Records how long the head was busy with one batch.
    pub fn record_cost(&mut self, time: Duration) {
        let time = time.as_secs_f64();
        self.cost = match self.cost {
            0.0 => time,
            before => before + NEW_WEIGHT * (time - before),
        };
    }
}

#[cfg(test)]
mod tests;
