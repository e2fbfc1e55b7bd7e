//! Which tasks of a job a worker is given next, and how many at once.
//!
//! A pure state machine: the head tells it what has ended and how long that took, and asks it for
//! the next batch, a few tasks that cross together and are answered together. One task a batch is the
//! fairest and costs a message for each; so batches are as large as it takes for the messages not to
//! matter, and no larger ([`Planner::size`]). Where a worker would be idle while its answer and the
//! next batch are on their way, one batch is prefetched.
//!
//! Where the assignment is free, tasks are begun in the given order, and batches get smaller towards
//! the end, as in factoring (Hummel, Schonberg and Flynn, CACM 35(8), 1992): no batch has more than a
//! half of what would be left for each worker. Tasks may turn out to be much longer than those before
//! them: then the rest of the batch comes back ([`Batch::max_time`]).

use std::collections::VecDeque;
use std::time::Duration;

/// Who gets which task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assignment {
    /// Whoever is free.
    Free,
    /// The tasks go round: the first to the first place, and so on, and begin anew after the last.
    Round,
}

/// Tasks in one batch, at most.
const MAX_BATCH: usize = 10_000;

/// Seconds that a batch may be at work before its rest comes back, at most.
const MAX_BATCH_SECONDS: f64 = 3600.0;

/// Bytes of answers that a batch should not be longer than.
const TYPICAL_ANSWER: f64 = 128.0 * 1024.0;

/// A batch should take so many times as long as the head is busy with it, and as many times for each
/// place as all together: the head then is busy for a quarter of the time at most.
const COST: f64 = 20.0;
const COST_OF_ALL: f64 = 4.0;

/// A batch should take so many times as long as a message to the worker and back.
const ROUND_TRIPS: f64 = 2.0;

/// A batch should take so many times as long as it takes to read what its tasks share.
const READINGS: f64 = 4.0;

/// Seconds in which a worker reads a byte of it, roughly: a list of many short vectors takes longer, a long
/// vector less.
const READING_OF_BYTE: f64 = 1e-8;

/// If reading is expected to take so many seconds, the first batches already have several tasks: to find out
/// with one of them how long tasks take would cost a reading.
const LONG_READING: f64 = 0.002;

/// Seconds that a batch should take at least, and if tasks compute: what it costs the head, the agent
/// and the worker, 0.4 ms where waking a process is slow, is then taken from the cores that compute,
/// if they are those of one machine.
const GRAIN: f64 = 0.002;
const GRAIN_OF_COMPUTING: f64 = 0.02;

/// The rest of a batch comes back when it has taken so many times as long as was thought, and so many
/// seconds: it may be one of those that are long, or have had a part of a core only.
const OVER: f64 = 4.0;
const MIN_OVERTIME: f64 = 0.02;

/// A batch is prefetched if a worker would be idle for more than this part of its time without it.
const IDLE: f64 = 0.02;

/// Seconds that the round trip to a worker takes if it is on another host: then a second task is sent
/// to it at the beginning.
const FAR: f64 = 0.005;

/// Tasks are taken for computing if a worker has waited for something in less than this part of the
/// batches. It is so after eight in which none has: a page that is to be fetched may make one wait.
const WAITING: f64 = 0.2;
const SLEEP_NEW: f64 = 0.2;

/// How much a measurement counts beside all before it.
const NEW: f64 = 0.1;

/// Tasks that cross together, by their numbers from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The numbers of the tasks, in order.
    pub tasks: Vec<usize>,
    /// The worker is still at another.
    pub prefetch: bool,
    /// If the worker has been at it for so long, those that it has not begun are to come back, for
    /// others to do them. Zero: never.
    pub max_time: Duration,
}

/// How a batch that was answered went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended {
    /// Tasks of it that have been done.
    pub tasks: usize,
    /// For how long the worker was at it.
    pub busy: Duration,
    /// From when it was sent until it was answered, if it was not prefetched.
    pub turnaround: Option<Duration>,
    /// Bytes of the answer.
    pub bytes: usize,
    /// For how long of it the worker had a core, if it has not waited for anything.
    pub computed: Option<Duration>,
    /// How long the worker had read before that what the tasks of a batch share.
    pub reading: Duration,
}

/// Tasks that have not been given out.
#[derive(Debug)]
struct Queue {
    /// They were lost. One of them may cost its worker each time, so they go one by one.
    again: VecDeque<usize>,
    /// They were given out and came back.
    back: VecDeque<usize>,
    next: usize,
    step: usize,
    end: usize,
}

impl Queue {
    fn len(&self) -> usize {
        self.again.len() + self.back.len() + self.end.saturating_sub(self.next).div_ceil(self.step)
    }

    fn take(&mut self, count: usize) -> Vec<usize> {
        match self.again.pop_front() {
            Some(task) => vec![task],
            None => std::iter::from_fn(|| self.pop()).take(count).collect(),
        }
    }

    fn pop(&mut self) -> Option<usize> {
        self.back.pop_front().or_else(|| {
            let task = self.next;
            (task < self.end).then(|| self.next += self.step)?;
            Some(task)
        })
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// Tasks of each batch that is out, the running one first.
    out: VecDeque<usize>,
    /// Seconds from a batch's sending to its answer in which the worker was not at it: the way there
    /// and back.
    round_trip: Option<f64>,
    /// When the running batch was sent, or, if that was ahead, when the one before was answered.
    since: f64,
    close: bool,
    host: usize,
}

/// A host of some of the places.
#[derive(Debug, Default)]
struct Host {
    cores: usize,
    /// Places that are not gone.
    living: usize,
    /// Places with something to do.
    active: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Planner {
    assignment: Assignment,
    /// One, or one for each place.
    queues: Vec<Queue>,
    slots: Vec<Slot>,
    hosts: Vec<Host>,
    /// Which part of the batches has lately slept.
    sleep: f64,
    /// Places have been refused work because their host is busy.
    rests: bool,
    /// Tasks that are given out one by one.
    singly: bool,
    /// Seconds of a task: lately, and of all so far.
    recent: Option<f64>,
    seconds: f64,
    done: usize,
    /// Bytes of a task's answer.
    bytes: f64,
    /// Seconds that the head is busy with a batch.
    cost: f64,
    /// Seconds in which a worker reads what the tasks of a batch share.
    reading: f64,
    /// The least time that the way has taken, to any place.
    rtt: f64,
}

impl Planner {
    /// For a number of tasks and of places, of which there must be one.
    pub fn new(assignment: Assignment, tasks: usize, slots: usize) -> Planner {
        let queue = |first, step| Queue {
            again: VecDeque::new(),
            back: VecDeque::new(),
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
            sleep: 1.0,
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

    /// On which host, counted from 0, a place is, and how many cores that has, 0 if it is not known.
    pub fn place_on(&mut self, slot: usize, host: usize, cores: usize) {
        if self.hosts.len() <= host {
            self.hosts.resize_with(host + 1, Host::default);
        }
        self.hosts[host].cores = cores;
        let before = std::mem::replace(&mut self.slots[slot].host, host);
        self.hosts[before].living -= 1;
        self.hosts[host].living += 1;
    }

    /// Whether those that were refused work are to be asked again, once: tasks wait for something now, or
    /// take longer than was thought.
    pub fn may_resume(&mut self, now: Duration) -> bool {
        let now = now.as_secs_f64();
        let is_long = || {
            self.task(now)
                .is_some_and(|task| 2.0 * task > GRAIN_OF_COMPUTING)
        };
        self.rests && (!self.is_computing() || is_long()) && std::mem::take(&mut self.rests)
    }

    /// Tasks have lately done nothing but compute.
    fn is_computing(&self) -> bool {
        self.sleep < WAITING
    }

    /// Whether a place with nothing to do is to be left so: its host's cores are all busy with tasks
    /// so short that several cross together. More processes would only take turns, and each have its
    /// memory fetched anew.
    fn is_to_rest(&self, slot: usize, size: usize) -> bool {
        let host = &self.hosts[self.slots[slot].host];
        let busy = host.cores > 0 && host.active > host.cores;
        self.assignment == Assignment::Free && busy && size > 1 && self.is_computing()
    }

    fn living(&self) -> usize {
        self.hosts.iter().map(|host| host.living).sum()
    }

    /// Places that there is a core for, or all if tasks wait for something: see [`Planner::is_to_rest`].
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

    /// How long the round trip to a place has taken, as far as it is known: see [`Planner::rtt`].
    pub fn expect(&mut self, slot: usize, rtt: Option<f64>) {
        self.slots[slot].round_trip = rtt;
    }

    /// The tasks of a batch share what the worker has to read first, which has so many bytes.
    pub fn expect_reading(&mut self, bytes: u64) {
        self.reading = READING_OF_BYTE * bytes as f64;
    }

    /// Seconds that the round trip to a place takes, if that is known.
    pub fn rtt(&self, slot: usize) -> Option<f64> {
        self.slots[slot].round_trip
    }

    /// From now on batches have one task.
    pub fn singly(&mut self) {
        self.singly = true;
    }

    fn queue(&mut self, slot: usize) -> &mut Queue {
        match self.assignment {
            Assignment::Free => &mut self.queues[0],
            Assignment::Round => &mut self.queues[slot],
        }
    }

    /// Tasks that have not been given out.
    pub fn left(&self) -> usize {
        self.queues.iter().map(Queue::len).sum()
    }

    /// Whether it is known how long tasks take.
    pub fn knows(&self) -> bool {
        self.done > 0
    }

    /// What this place gets next, if it is to get anything now. Tasks of it that cannot be sent
    /// with the others are given back with [`Planner::returned`]. `now`: time since some beginning.
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
            None if self.reading > LONG_READING && !self.singly => self.even().clamp(1, MAX_BATCH),
            None => 1,
        };
        if !prefetch && self.is_to_rest(slot, size) {
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
                let expected = OVER * task.unwrap_or(0.0) * tasks.len() as f64;
                // What comes back costs another reading.
                let min_time = MIN_OVERTIME
                    .max(READINGS * self.reading)
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

    /// Seconds that a task is expected to take. Rather too many: a batch that takes longer than was
    /// thought holds up the end. The first tasks to end are short ones: the time that others have
    /// been running counts too (the maximum likelihood for exponential times of which some are cut).
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

    /// Which part of a core a place has, if tasks compute.
    fn core_fraction(&self, slot: &Slot) -> f64 {
        let host = &self.hosts[slot.host];
        if self.is_computing() && host.cores > 0 && host.active > host.cores {
            host.cores as f64 / host.active as f64
        } else {
            1.0
        }
    }

    /// Tasks with which a batch is large enough for its message not to matter.
    fn enough(&self, slot: usize, task: f64) -> f64 {
        let round_trip = self.slots[slot].round_trip.unwrap_or(0.0);
        let rtt = ROUND_TRIPS * round_trip;
        let work = COST.max(COST_OF_ALL * self.living() as f64) * self.cost;
        let grain = match self.is_computing() {
            true => GRAIN_OF_COMPUTING,
            false => GRAIN,
        };
        let reading = READINGS * self.reading;
        (rtt.max(work).max(grain).max(reading) / task).min(TYPICAL_ANSWER / self.bytes.max(1.0))
    }

    /// Half of an even share of what is left, where the assignment is free.
    fn even(&self) -> usize {
        self.queues[0].len() / (2 * self.useful().max(1))
    }

    fn size(&self, slot: usize, task: f64) -> usize {
        let fair = match self.assignment {
            Assignment::Free => {
                let len = self.queues[0].len();
                // With one that runs and one ahead, shorter ones would not fill the way.
                let round_trip = self.slots[slot].round_trip.unwrap_or(0.0);
                let filling = (round_trip / 2.0 / task) as usize;
                let filling = filling.min(len.div_ceil(self.useful().max(1)));
                // What takes no longer than another worker would read is better not shared with it.
                let reading = (self.reading / task) as usize;
                self.even().max(filling).max(reading.min(len))
            }
            Assignment::Round => self.queues[slot].len(),
        };
        fair.min(MAX_BATCH)
            .min(self.enough(slot, task) as usize)
            .max(1)
    }

    /// Whether a second task may be sent to this place before anything is known of how long they take.
    fn is_far(&self, slot: usize) -> bool {
        let at = &self.slots[slot];
        let enough = self.left() > 2 * self.living();
        enough && !self.singly && at.out.len() == 1 && at.round_trip.is_some_and(|rtt| rtt > FAR)
    }

    /// Whether a second batch may be sent to this place.
    fn may_prefetch(&self, slot: usize, task: f64) -> bool {
        let at = &self.slots[slot];
        let (1, Some(rtt), Some(running)) = (at.out.len(), at.round_trip, at.out.front()) else {
            return false;
        };
        let batch = self.reading + *running as f64 * task;
        let queue = match self.assignment {
            Assignment::Free => &self.queues[0],
            Assignment::Round => return rtt > IDLE * batch,
        };
        // Towards the end it may have to wait for a task that takes long while others are idle.
        let max_time = match queue.len() > 2 * self.living() {
            true => IDLE * batch,
            false => batch,
        };
        rtt > max_time
    }

    /// The oldest batch of this place has been answered.
    pub fn ended(&mut self, slot: usize, ended: Ended, now: Duration) {
        self.sleep += SLEEP_NEW * (f64::from(u8::from(ended.computed.is_none())) - self.sleep);
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
            // The least is what the way takes; what is more is that somebody was busy.
            at.round_trip = Some(match at.round_trip {
                Some(before) if rtt > before => before + NEW * (rtt - before),
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
        // Others on its cores do not make a task longer: with fewer at a time it will be as short.
        let work = ended
            .computed
            .map_or(busy, |time| busy.min(time.as_secs_f64()));
        let (task, bytes) = (work / count, ended.bytes as f64 / count);
        let mix = |before: f64, now: f64| before + NEW * (now - before);
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

    /// The batch of this place that was given out last, or the oldest one if that is lost, has ended
    /// in another way.
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

    /// A task of this place has been given out again, before all that it has been given.
    pub fn given_first(&mut self, slot: usize) {
        let at = &mut self.slots[slot];
        if at.out.is_empty() {
            self.hosts[at.host].active += 1;
        }
        at.out.push_front(1);
    }

    /// Only so many tasks of the batch that was given out last have been sent.
    pub fn shortened(&mut self, slot: usize, tasks: usize) {
        if let Some(last) = self.slots[slot].out.back_mut() {
            *last = tasks;
        }
    }

    /// These tasks of this place, in this order, have not been begun and are to be given out again,
    /// before those that have not been given out.
    pub fn returned(&mut self, slot: usize, tasks: &[usize]) {
        let queue = self.queue(slot);
        for &task in tasks.iter().rev() {
            queue.back.push_front(task);
        }
    }

    /// These tasks of this place were lost with their worker and are to be given out again, one by one
    /// and in their order before all others.
    pub fn lost(&mut self, slot: usize, tasks: &[usize]) {
        let again = &mut self.queue(slot).again;
        again.extend(tasks);
        again.make_contiguous().sort_unstable();
    }

    /// No more is to go to this place. What is bound to it stays.
    pub fn close(&mut self, slot: usize) {
        let at = &mut self.slots[slot];
        if !std::mem::replace(&mut at.close, true) {
            self.hosts[at.host].living -= 1;
        }
    }

    /// Whether anybody is left.
    pub fn any_left(&self) -> bool {
        self.living() > 0
    }

    /// Batches that are out at this place.
    pub fn out(&self, slot: usize) -> usize {
        self.slots[slot].out.len()
    }

    /// The head was busy for so long with one batch.
    pub fn took(&mut self, time: Duration) {
        let time = time.as_secs_f64();
        self.cost = match self.cost {
            0.0 => time,
            before => before + NEW * (time - before),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    /// Seconds until the last answer, if each place takes a batch from when it has it, and a message
    /// takes `rtt` each way; and how often each task was done.
    fn run(planner: &mut Planner, times: &[f64], rtt: f64, cost: f64) -> (f64, Vec<u32>) {
        let slots = planner.slots.len();
        let nanos = |seconds: f64| (seconds * 1e9) as u64;
        let mut free = vec![0.0f64; slots];
        let mut done = vec![0; times.len()];
        // Of answers: when, where, when sent, how long it took, which.
        let mut answers = BinaryHeap::new();
        let mut batches: Vec<(Vec<usize>, usize, f64, f64, bool)> = Vec::new();
        let mut now = 0.0f64;
        let mut waiting: Vec<usize> = (0..slots).collect();
        loop {
            for slot in std::mem::take(&mut waiting) {
                while let Some(batch) = planner.next(slot, Duration::from_secs_f64(now)) {
                    now += cost;
                    planner.took(Duration::from_secs_f64(cost));
                    let begins = free[slot].max(now + rtt);
                    let (mut busy, mut count) = (0.0, 0);
                    for &task in &batch.tasks {
                        if count > 0
                            && !batch.max_time.is_zero()
                            && busy > batch.max_time.as_secs_f64()
                        {
                            break;
                        }
                        busy += times[task];
                        count += 1;
                    }
                    free[slot] = begins + busy;
                    answers.push(Reverse((nanos(begins + busy + rtt), slot, batches.len())));
                    batches.push((batch.tasks, count, now, busy, batch.prefetch));
                }
            }
            let Some(Reverse((at, slot, batch))) = answers.pop() else {
                return (now, done);
            };
            now = now.max(at as f64 / 1e9);
            let (tasks, count, sent, busy, prefetch) = &batches[batch];
            let (tasks, rest) = tasks.split_at(*count);
            tasks.iter().for_each(|&task| done[task] += 1);
            planner.ended(
                slot,
                Ended {
                    tasks: tasks.len(),
                    busy: Duration::from_secs_f64(*busy),
                    turnaround: (!prefetch).then(|| Duration::from_secs_f64(now - sent)),
                    bytes: 10 * tasks.len(),
                    computed: None,
                    reading: Duration::ZERO,
                },
                Duration::from_secs_f64(now),
            );
            waiting.push(slot);
            if !rest.is_empty() {
                planner.returned(slot, rest);
                waiting.extend((0..slots).filter(|&at| at != slot && planner.out(at) == 0));
            }
        }
    }

    fn greedy(times: &[f64], slots: usize) -> f64 {
        let mut free: BinaryHeap<Reverse<u64>> = (0..slots).map(|_| Reverse(0)).collect();
        let mut end = 0;
        for time in times {
            let Some(Reverse(at)) = free.pop() else { break };
            let at = at + (time * 1e9) as u64;
            end = end.max(at);
            free.push(Reverse(at));
        }
        end as f64 / 1e9
    }

    fn exponential(seed: u64, count: usize, mean: f64, max_time: f64) -> Vec<f64> {
        let mut random = StdRng::seed_from_u64(seed);
        let time = |_| (-mean * (1.0 - random.random::<f64>()).ln()).min(max_time);
        (0..count).map(time).collect()
    }

    #[test]
    fn uneven_tasks_end_as_soon_as_if_each_were_given_out_alone() {
        for seed in 0..20 {
            let times = exponential(seed, 400, 0.05, 0.5);
            let mut planner = Planner::new(Assignment::Free, 400, 32);
            let (end, _) = run(&mut planner, &times, 1e-4, 3e-5);
            let bound = greedy(&times, 32);
            assert!(end < 1.03 * bound, "{end} {bound}");
        }
    }

    #[test]
    fn many_short_tasks_take_few_messages_and_end_together() {
        let times = exponential(1, 100_000, 1e-5, 1e-4);
        let mut planner = Planner::new(Assignment::Free, times.len(), 16);
        let (end, _) = run(&mut planner, &times, 1e-4, 3e-5);
        let bound = greedy(&times, 16);
        assert!(end < 1.25 * bound, "{end} {bound}");
    }

    #[test]
    fn long_tasks_after_short_ones_are_for_all() {
        for (short, long, slots) in [(200, 6, 2), (5000, 40, 4), (2000, 8, 8), (8, 92, 8)] {
            let mut times = vec![2e-6; short];
            times.extend(vec![0.1; long]);
            let mut planner = Planner::new(Assignment::Free, times.len(), slots);
            let (end, _) = run(&mut planner, &times, 1e-4, 3e-5);
            let bound = greedy(&times, slots);
            assert!(end < bound + 0.11, "{short} {long} {slots}: {end} {bound}");
        }
    }

    #[test]
    fn a_long_rtt_is_hidden() {
        for assignment in [Assignment::Free, Assignment::Round] {
            let times = vec![0.01; 6400];
            let mut planner = Planner::new(assignment, times.len(), 64);
            let (end, _) = run(&mut planner, &times, 0.025, 5e-5);
            assert!(end < 1.2, "{assignment:?} {end}");
        }
    }

    #[test]
    fn large_answers_come_one_by_one() {
        let mut planner = Planner::new(Assignment::Free, 1000, 2);
        planner.took(Duration::from_millis(1));
        planner.next(0, Duration::ZERO);
        planner.ended(
            0,
            Ended {
                tasks: 1,
                busy: Duration::from_micros(1),
                turnaround: Some(Duration::from_millis(1)),
                bytes: 1 << 20,
                computed: None,
                reading: Duration::ZERO,
            },
            Duration::from_millis(1),
        );
        assert_eq!(
            planner
                .next(0, Duration::from_millis(1))
                .map(|batch| batch.tasks.len()),
            Some(1)
        );
    }

    #[test]
    fn no_more_workers_than_cores_take_turns_with_short_computations() {
        let mut planner = Planner::new(Assignment::Free, 100_000, 100);
        for slot in 0..100 {
            planner.place_on(slot, 0, 2);
        }
        let ended = |slept: bool| Ended {
            tasks: 1,
            busy: Duration::from_micros(1),
            turnaround: Some(Duration::from_micros(100)),
            bytes: 10,
            computed: (!slept).then_some(Duration::from_micros(1)),
            reading: Duration::ZERO,
        };
        planner.took(Duration::from_micros(30));
        let ms = Duration::from_millis;
        for _ in 0..8 {
            planner.next(0, ms(1));
            planner.ended(0, ended(false), ms(1));
        }
        let started = (0..100)
            .filter(|&at| planner.next(at, ms(1)).is_some())
            .count();
        assert_eq!(started, 3);
        assert!(!planner.may_resume(ms(1)));
        // Those that have begun are at long ones, it seems.
        assert!(planner.may_resume(ms(10_000)));
        assert!((0..100).all(|at| planner.next(at, ms(1)).is_none()));
        // They wait for something now: then others can compute.
        planner.ended(0, ended(true), ms(2));
        planner.next(0, ms(2));
        planner.ended(0, ended(true), ms(2));
        assert!(planner.may_resume(ms(2)));
        assert!(!planner.may_resume(ms(2)));
        let started = (0..100)
            .filter(|&at| planner.next(at, ms(2)).is_some())
            .count();
        assert!(started > 90, "{started}");
    }

    #[test]
    fn computations_are_as_short_as_they_are_without_the_others() {
        let mut planner = Planner::new(Assignment::Free, 10_000, 40);
        for slot in 0..40 {
            planner.place_on(slot, 0, 2);
        }
        let ms = Duration::from_millis;
        for slot in 0..40 {
            assert!(planner.next(slot, ms(0)).is_some());
        }
        // All of them take turns on two cores.
        let ended = Ended {
            tasks: 1,
            busy: ms(8),
            turnaround: Some(ms(8)),
            bytes: 10,
            computed: Some(Duration::from_micros(400)),
            reading: Duration::ZERO,
        };
        (0..40).for_each(|slot| planner.ended(slot, ended, ms(8)));
        let batches: Vec<Batch> = (0..40).filter_map(|at| planner.next(at, ms(8))).collect();
        assert_eq!(batches.len(), 3);
        assert!(
            batches.iter().all(|batch| batch.tasks.len() == 50),
            "{batches:?}"
        );
    }

    proptest! {
        #[test]
        fn each_task_is_given_out_once(
            tasks in 0usize..3_000, slots in 1usize..40, seed in any::<u64>(), free in any::<bool>(),
            rtt in 0.0f64..0.03, mean in 1e-6f64..0.02,
        ) {
            let assignment = if free { Assignment::Free } else { Assignment::Round };
            let times = exponential(seed, tasks, mean, 1.0);
            let mut planner = Planner::new(assignment, tasks, slots);
            let (_, done) = run(&mut planner, &times, rtt, 2e-5);
            prop_assert!(done.iter().all(|&count| count == 1));
            prop_assert_eq!(planner.left(), 0);
        }

        #[test]
        fn what_comes_back_goes_first_and_to_its_place(
            tasks in 10usize..100, slots in 1usize..10,
        ) {
            let mut planner = Planner::new(Assignment::Round, tasks, slots);
            let batch = planner.next(0, Duration::ZERO).unwrap();
            planner.dropped(0, false);
            planner.returned(0, &batch.tasks);
            prop_assert_eq!(&planner.next(0, Duration::ZERO).unwrap().tasks, &batch.tasks);
            planner.dropped(0, false);
            planner.lost(0, &[2 * slots, 0]);
            for task in [0, 2 * slots] {
                prop_assert_eq!(planner.next(0, Duration::ZERO).unwrap().tasks, [task]);
                planner.dropped(0, false);
            }
            planner.close(0);
            prop_assert_eq!(planner.next(0, Duration::ZERO), None);
        }
    }
}
