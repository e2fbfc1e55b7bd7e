//! The agent's bookkeeping: what each of its workers is doing and what may pass through.
//!
//! A pure state machine, like the head's scheduler: frames, exits and the time go in, decisions come
//! out. Processes, sockets and the clock are in [`super`].

use crate::protocol::control::{Facts, Setback};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, FIRST, Header, LAST, SHARED};
use crate::protocol::limits::{RESULT_WINDOW, SEND_WINDOW};
use std::collections::VecDeque;
use std::time::Duration;

/// How long an interrupted task may take to end before its worker is killed.
pub const INTERRUPT_GRACE: Duration = Duration::from_secs(2);

/// How long workers may take to end before they are killed, when they are busy or the head is gone.
/// Well under the second within which everything must be gone.
pub const STOP_GRACE: Duration = Duration::from_millis(600);

/// In the numbers of tasks by which a worker is brought to the state of the one before it.
pub const REPLAY: u64 = 1 << 63;

/// After so many workers in a row that ended before they were restored, the next is made after a pause,
/// and the head is told.
pub const SETBACKS: u32 = 3;

/// The first of these pauses. Each is twice as long as the one before.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause before another worker is made.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The time, since any fixed moment.
pub type Now = Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Made, not yet ready.
    Starting,
    /// Doing so many tasks again that the one before it had done.
    Restoring {
        left: usize,
    },
    Idle,
    Busy {
        task: u64,
        /// When its worker had all of its message.
        since: Now,
        /// Cancelled, or out of time: its worker is killed if it has not answered by then.
        cancelled: Option<Now>,
        /// When it will be out of time.
        deadline: Option<Now>,
    },
    Gone,
}

/// An answer in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    Announced,
    /// The head wants it.
    Asked,
}

#[derive(Debug)]
struct Entry {
    phase: Phase,
    /// Asked to end, and killed if it has not by then.
    stopping: Option<Now>,
    /// The worker was idle when it was asked to end: it may finish its exit handlers.
    may_finish: bool,
    /// An idle worker was killed because it had not ended in time.
    stop_timed_out: bool,
    /// It closed its channel, which should be its end, and is killed if that is not so by then.
    hung_up: Option<Now>,
    /// The whole message of the current task has passed: before that there is no answer.
    complete: bool,
    /// How long this task, whose message comes next or is coming, may take.
    limit: Option<(u64, Duration)>,
    /// Bytes of the current answer that may still go to the head.
    credit: usize,
    /// The current answer is in shared memory, and has been announced.
    offered: Option<Offer>,
    /// Bytes passed on to the worker and not yet reported to the head.
    passed: usize,
    /// Bytes on their way to the worker that are not the head's: they do not count for its window.
    given: usize,
    /// It, or one before it in its place, has been ready.
    came_up: bool,
    /// Ends that the head has been or will be told of and may not know yet: what it sends until then was
    /// meant for the one before.
    unnoted: u32,
    /// How often it has ended since it was last ready for the head's tasks.
    setbacks: u32,
    /// How long the worker was at the current task, once it has begun to answer.
    took: Duration,
    /// How long each of the tasks that restore it took at first; those that it has done are gone.
    again: VecDeque<Duration>,
    /// It is killed if it makes no progress, in starting or with these tasks, until then.
    progress_by: Option<Now>,
    /// It was killed because it made none for so long.
    stalled: Duration,
    /// Workers are made here after pauses, of which the next is so long.
    pause: Option<Duration>,
    /// When the next is made.
    retry: Option<Now>,
}

impl Entry {
    /// It can be given tasks of the head's.
    fn up(&mut self) {
        self.phase = Phase::Idle;
        self.setbacks = 0;
        self.pause = None;
        self.progress_by = None;
        self.again = VecDeque::new();
    }

    /// How long it may make no progress: the host may be much busier than it was at first.
    fn allowed(&self, patience: Option<Duration>) -> Option<Duration> {
        let took = self.again.front().copied().unwrap_or_default();
        Some(patience?.saturating_add(took.saturating_mul(2)))
    }

    /// It has made some progress with what restores it.
    fn progress(&mut self, patience: Option<Duration>, now: Now) {
        let allowed = self.allowed(patience);
        self.progress_by = allowed.map(|allowed| now.saturating_add(allowed));
    }
}

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Pass the frame on to the head.
    Forward,
    /// Leave it where it is until the head asks for more.
    Hold,
    /// The same, and tell the head that it is there.
    Announce,
    /// Discard the frame: nobody waits for it.
    Drop,
    /// Drop it and tell the head that the cancelled task has ended.
    Ended,
    /// Drop it: the worker is now as far as the one before it was.
    Restored,
}

/// What it means that a worker is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// It was so before.
    Already,
    /// The head may send it tasks.
    Up,
    /// It is to do some tasks again first.
    Restoring,
}

/// What an exit means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was asked to.
    Stopped {
        /// Whether the worker was idle, and was killed because it did not end in time.
        timed_out: bool,
    },
    /// It was not: the head must know.
    Lost {
        /// Whether a fresh worker takes its place at once.
        replaced: bool,
        /// How far the worker had come, and what was done about it.
        setback: Setback,
    },
    /// The head knows that there is none; another is made after a pause.
    Waits,
    /// It ended, or was killed, while a cancelled task kept it busy, or before it was what the one
    /// before it had been: a fresh worker takes its place.
    Replace,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Book {
    workers: Vec<Entry>,
    /// Some worker may have a deadline. Mostly none has, and then none is looked for.
    timed: bool,
    /// Some worker may be starting, restored or to be made again after a pause. Mostly none is.
    unsettled: bool,
    /// Answers may be in memory that is shared with the head.
    pub shares: bool,
    /// How long an idle worker may take to end when the head stops it.
    pub stop_timeout: Duration,
    /// How long a worker that replaces another may make no progress.
    pub patience: Option<Duration>,
}

impl Book {
    /// A host with `count` workers, all starting.
    pub fn new(count: usize) -> Book {
        let workers = (0..count)
            .map(|_| Entry {
                phase: Phase::Starting,
                stopping: None,
                may_finish: false,
                stop_timed_out: false,
                hung_up: None,
                complete: false,
                limit: None,
                credit: 0,
                offered: None,
                passed: 0,
                given: 0,
                came_up: false,
                unnoted: 0,
                setbacks: 0,
                took: Duration::ZERO,
                again: VecDeque::new(),
                progress_by: None,
                stalled: Duration::ZERO,
                pause: None,
                retry: None,
            })
            .collect();
        Book {
            workers,
            timed: false,
            unsettled: false,
            shares: false,
            stop_timeout: STOP_GRACE,
            patience: None,
        }
    }

    /// What is known of a worker, for a bug report.
    pub fn facts(&self, worker: u32, now: Now, facts: &mut Facts) {
        let Some(entry) = self.workers.get(worker as usize) else {
            return;
        };
        match entry.phase {
            Phase::Starting => facts.add("state", "starting"),
            Phase::Restoring { left } => {
                facts.add("state", "restoring");
                facts.add("restore_calls_left", left);
            }
            Phase::Idle => facts.add("state", "idle"),
            Phase::Busy {
                task,
                since,
                cancelled,
                deadline,
            } => {
                facts.add("state", "busy");
                facts.add("task", task);
                facts.add_seconds("busy_for", now.saturating_sub(since));
                facts.add("message_complete", entry.complete);
                facts.add("credit", entry.credit);
                let left = |at: Now| format!("{:.3}", at.saturating_sub(now).as_secs_f64());
                facts.add_some("killed_in", cancelled.map(left));
                facts.add_some("timeout_in", deadline.map(left));
                if let Some(offer) = entry.offered {
                    facts.add_debug("shared_result", offer);
                }
            }
            Phase::Gone => facts.add("state", "gone"),
        }
        facts.add("stopping", entry.stopping.is_some());
        facts.add("hung_up", entry.hung_up.is_some());
        facts.add("came_up", entry.came_up);
        facts.add("unacknowledged_losses", entry.unnoted);
        facts.add("setbacks", entry.setbacks);
        facts.add("bytes_to_report", entry.passed);
        facts.add("bytes_of_agent", entry.given);
        facts.add("waits_for_retry", entry.retry.is_some());
    }

    /// A worker is being made.
    pub fn made(&mut self, worker: u32, now: Now) {
        let patience = self.patience;
        self.unsettled = true;
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            // R sees to the first start.
            entry.progress_by = patience.filter(|_| entry.came_up).map(|p| now + p);
        }
    }

    /// How long a worker was at its current task, once it has begun to answer.
    pub fn took(&self, worker: u32) -> Duration {
        let entry = self.workers.get(worker as usize);
        entry.map_or(Duration::ZERO, |entry| entry.took)
    }

    fn entry(&mut self, worker: u32) -> Result<&mut Entry, ProtocolError> {
        let count = self.workers.len();
        self.workers
            .get_mut(worker as usize)
            .ok_or_else(|| ProtocolError(format!("worker {worker} of {count}")))
    }

    /// A worker is ready, and has tasks to do again, each of which took so long at first.
    pub fn ready(&mut self, worker: u32, again: VecDeque<Duration>, now: Now) -> Ready {
        let patience = self.patience;
        match self.workers.get_mut(worker as usize) {
            Some(entry) if entry.phase == Phase::Starting => {
                entry.came_up = true;
                if !again.is_empty() {
                    entry.phase = Phase::Restoring { left: again.len() };
                    entry.again = again;
                    entry.progress(patience, now);
                    return Ready::Restoring;
                }
                entry.up();
                Ready::Up
            }
            _ => Ready::Already,
        }
    }

    /// The head knows of a loss.
    ///
    /// # Errors
    /// When there is no such worker.
    pub fn noted(&mut self, worker: u32) -> Result<(), ProtocolError> {
        let entry = self.entry(worker)?;
        entry.unnoted = entry.unnoted.saturating_sub(1);
        Ok(())
    }

    /// Whether a worker is to end.
    pub fn is_stopping(&self, worker: u32) -> bool {
        let entry = self.workers.get(worker as usize);
        entry.is_some_and(|entry| entry.stopping.is_some())
    }

    /// Whether what the head sends to a worker is meant for that worker.
    ///
    /// # Errors
    /// When there is no such worker.
    pub fn is_meant(&mut self, worker: u32) -> Result<bool, ProtocolError> {
        let entry = self.entry(worker)?;
        let there = entry.phase != Phase::Gone && entry.stopping.is_none();
        Ok(there && entry.unnoted == 0)
    }

    /// The task whose message comes next may take so long.
    ///
    /// # Errors
    /// When the worker has a task.
    pub fn limit(&mut self, worker: u32, task: u64, limit: Duration) -> Result<(), ProtocolError> {
        if !self.is_meant(worker)? {
            return Ok(());
        }
        let entry = self.entry(worker)?;
        if entry.phase != Phase::Idle {
            let phase = entry.phase;
            return Err(ProtocolError(format!(
                "a time limit for worker {worker}, which is {phase:?}"
            )));
        }
        entry.limit = Some((task, limit));
        Ok(())
    }

    /// A data frame from the head to a worker.
    ///
    /// # Errors
    /// When the head would not send it.
    pub fn to_worker(&mut self, header: &Header, now: Now) -> Result<Route, ProtocolError> {
        if !self.is_meant(header.worker)? {
            return Ok(Route::Drop);
        }
        let entry = self.entry(header.worker)?;
        match entry.phase {
            Phase::Idle if header.flags & FIRST != 0 && header.task & REPLAY == 0 => {
                entry.phase = Phase::Busy {
                    task: header.task,
                    since: now,
                    cancelled: None,
                    deadline: None,
                };
                entry.credit = RESULT_WINDOW;
                entry.offered = None;
            }
            Phase::Busy { task, .. }
                if task == header.task && header.flags & FIRST == 0 && !entry.complete => {}
            phase => {
                return Err(ProtocolError(format!(
                    "task {} for worker {}, which is {phase:?}",
                    header.task, header.worker
                )));
            }
        }
        let whole = header.flags & LAST != 0;
        entry.complete = whole;
        if let (
            Phase::Busy {
                deadline, since, ..
            },
            true,
        ) = (&mut entry.phase, whole)
        {
            *since = now;
            entry.took = Duration::ZERO;
            let limit = entry.limit.take_if(|(task, _)| *task == header.task);
            *deadline = limit.map(|(_, limit)| now.saturating_add(limit));
            self.timed |= limit.is_some();
        }
        let entry = self.entry(header.worker)?;
        if header.flags & ABORT != 0 {
            entry.phase = Phase::Idle;
        }
        Ok(Route::Forward)
    }

    /// Bytes have reached a worker. Returns the credit to give back to the head, if it is time.
    pub fn passed(&mut self, worker: u32, bytes: usize) -> Option<(u64, u32)> {
        let entry = self.workers.get_mut(worker as usize)?;
        // What the agent itself gives a worker is not the head's.
        if matches!(entry.phase, Phase::Starting | Phase::Restoring { .. }) {
            return None;
        }
        let given = bytes.min(entry.given);
        entry.given -= given;
        entry.passed += bytes - given;
        if entry.passed < SEND_WINDOW / 2 {
            return None;
        }
        let passed = std::mem::take(&mut entry.passed);
        // Of whatever task: the window is the worker's.
        let task = match entry.phase {
            Phase::Busy { task, .. } => task,
            _ => 0,
        };
        Some((task, u32::try_from(passed).unwrap_or(u32::MAX)))
    }

    /// Bytes that have reached a worker and are still to be given back to the head.
    pub fn unreported(&self, worker: u32) -> usize {
        let entry = self.workers.get(worker as usize);
        entry.map_or(0, |entry| entry.passed)
    }

    /// The agent gives a worker so many bytes of its own accord.
    pub fn gave(&mut self, worker: u32, bytes: usize) {
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            // While it is being restored, nothing counts.
            if matches!(entry.phase, Phase::Idle | Phase::Busy { .. }) {
                entry.given += bytes;
            }
        }
    }

    /// Bytes on their way to a worker that the agent has given it.
    pub fn given(&self, worker: u32) -> usize {
        let entry = self.workers.get(worker as usize);
        entry.map_or(0, |entry| entry.given)
    }

    /// A data frame from a worker.
    ///
    /// # Errors
    /// When a worker of ours would not send it.
    pub fn from_worker(&mut self, header: &Header, now: Now) -> Result<Route, ProtocolError> {
        let shared = header.flags & SHARED != 0;
        if shared && (!self.shares || header.flags != FIRST | LAST | SHARED) {
            return Err(ProtocolError("memory that nobody asked for".into()));
        }
        let patience = self.patience;
        let entry = self.entry(header.worker)?;
        let last = header.flags & LAST != 0;
        if let Phase::Restoring { left } = &mut entry.phase {
            if header.task & REPLAY == 0 {
                return Err(ProtocolError(
                    "an answer to a task of the worker before".into(),
                ));
            }
            *left -= usize::from(last);
            if *left == 0 {
                entry.up();
                return Ok(Route::Restored);
            }
            if last {
                entry.again.pop_front();
            }
            entry.progress(patience, now);
            return Ok(Route::Drop);
        }
        let Phase::Busy {
            task,
            since,
            cancelled,
            deadline,
        } = &mut entry.phase
        else {
            return Err(ProtocolError("an answer from an idle worker".into()));
        };
        if *task != header.task {
            return Err(ProtocolError("an answer to another task".into()));
        }
        // The head would take the whole host for broken.
        if !entry.complete || header.flags & !(FIRST | LAST | SHARED) != 0 {
            return Err(ProtocolError("an answer that no worker gives".into()));
        }
        // It has done what it had to. How long its answer has to wait for the head is not its fault.
        *deadline = None;
        if entry.took.is_zero() {
            entry.took = now.saturating_sub(*since);
        }
        let len = header.body_len();
        if cancelled.is_some() {
            if last {
                entry.phase = Phase::Idle;
                return Ok(Route::Ended);
            }
            return Ok(Route::Drop);
        }
        if shared {
            match entry.offered {
                None => {
                    entry.offered = Some(Offer::Announced);
                    return Ok(Route::Announce);
                }
                Some(Offer::Announced) => return Ok(Route::Hold),
                Some(Offer::Asked) => {}
            }
        } else if len > entry.credit {
            return Ok(Route::Hold);
        } else {
            entry.credit -= len;
        }
        if last {
            entry.phase = Phase::Idle;
        }
        Ok(Route::Forward)
    }

    /// The head asks for more of an answer. Returns whether that is for the current task.
    pub fn credit(&mut self, worker: u32, task: u64, bytes: u32) -> Result<bool, ProtocolError> {
        let entry = self.entry(worker)?;
        let current = matches!(entry.phase, Phase::Busy { task: busy, .. } if busy == task);
        if current {
            entry.credit = entry.credit.saturating_add(bytes as usize);
            entry.offered = entry.offered.map(|_| Offer::Asked);
        }
        Ok(current)
    }

    /// The head cancels a task. Returns whether its worker is to be interrupted.
    pub fn cancel(&mut self, worker: u32, task: u64, now: Now) -> Result<bool, ProtocolError> {
        let entry = self.entry(worker)?;
        match &mut entry.phase {
            Phase::Busy {
                task: busy,
                cancelled,
                ..
            } if *busy == task && cancelled.is_none() => {
                *cancelled = Some(now + INTERRUPT_GRACE);
                self.timed = true;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Tasks that are out of time: their workers are to be interrupted. Each is named once.
    pub fn out_of_time(&mut self, now: Now) -> Vec<(u32, u64)> {
        let mut out = Vec::new();
        if !self.timed {
            return out;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            if let Phase::Busy {
                task,
                cancelled: cancelled @ None,
                deadline: Some(deadline),
                ..
            } = &mut entry.phase
            {
                if *deadline <= now {
                    *cancelled = Some(now + INTERRUPT_GRACE);
                    out.push((worker as u32, *task));
                }
            }
        }
        out
    }

    /// A worker is asked to end. Returns whether it is still there, and whether it is busy.
    pub fn stop(&mut self, worker: u32, now: Now) -> Option<bool> {
        let entry = self.workers.get_mut(worker as usize)?;
        entry.retry = None;
        if entry.phase == Phase::Gone {
            return None;
        }
        if entry.stopping.is_none() {
            entry.may_finish = entry.phase == Phase::Idle;
            let grace = match entry.may_finish {
                true => self.stop_timeout,
                false => STOP_GRACE,
            };
            entry.stopping = Some(now + grace);
        }
        self.timed = true;
        Some(matches!(entry.phase, Phase::Busy { .. }))
    }

    /// The head is gone: workers that were asked to end have no more time than [`STOP_GRACE`].
    pub fn hurry(&mut self, now: Now) {
        for entry in &mut self.workers {
            entry.may_finish = false;
            entry.stopping = entry.stopping.map(|at| at.min(now + STOP_GRACE));
        }
    }

    /// A worker has closed its end of the channel.
    pub fn hung_up(&mut self, worker: u32, now: Now) {
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            entry.hung_up.get_or_insert(now + INTERRUPT_GRACE);
            self.timed = true;
        }
    }

    /// The task a worker has.
    pub fn task(&self, worker: u32) -> Option<u64> {
        match self.workers.get(worker as usize)?.phase {
            Phase::Busy { task, .. } => Some(task),
            _ => None,
        }
    }

    /// Whether no two workers have tasks.
    pub fn at_most_one_is_busy(&self) -> bool {
        let is_busy = |entry: &&Entry| matches!(entry.phase, Phase::Busy { .. });
        self.workers.iter().filter(is_busy).nth(1).is_none()
    }

    /// A worker's process has ended, or could not be made. `restorable`: another can be made what it was.
    pub fn exited(&mut self, worker: u32, restorable: bool, now: Now) -> Ending {
        let Some(entry) = self.workers.get_mut(worker as usize) else {
            return Ending::Stopped { timed_out: false };
        };
        let phase = std::mem::replace(&mut entry.phase, Phase::Gone);
        entry.hung_up = None;
        entry.limit = None;
        entry.progress_by = None;
        entry.passed = 0;
        entry.given = 0;
        let stalled = std::mem::take(&mut entry.stalled);
        if entry.stopping.is_some() {
            let timed_out = entry.stop_timed_out;
            return Ending::Stopped { timed_out };
        }
        let mut setback = Setback::default();
        if matches!(phase, Phase::Starting | Phase::Restoring { .. }) {
            entry.setbacks = entry.setbacks.saturating_add(1);
            let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            setback.count = entry.setbacks;
            setback.restoring = matches!(phase, Phase::Restoring { .. });
            setback.stalled = milliseconds(stalled);
        }
        if !restorable || !entry.came_up {
            // What the head sends to it from now on has nobody to go to.
            return Ending::Lost {
                replaced: false,
                setback,
            };
        }
        // One that made no progress would most likely make none again.
        let pauses = entry.pause.is_some() || !stalled.is_zero() || entry.setbacks >= SETBACKS;
        if setback.count > 0 && pauses {
            let told = entry.pause.is_some();
            let pause = entry.pause.unwrap_or(FIRST_PAUSE);
            entry.pause = Some((2 * pause).min(LONGEST_PAUSE));
            entry.retry = Some(now + pause);
            self.unsettled = true;
            if told {
                return Ending::Waits;
            }
            entry.unnoted += 1;
            setback.pause = pause.as_millis() as u64;
            return Ending::Lost {
                replaced: false,
                setback,
            };
        }
        entry.phase = Phase::Starting;
        match phase {
            Phase::Starting | Phase::Restoring { .. } => Ending::Replace,
            Phase::Busy {
                cancelled: Some(_), ..
            } => {
                // The next task may be on its way, or have come.
                entry.unnoted += 1;
                Ending::Replace
            }
            _ => {
                entry.unnoted += 1;
                Ending::Lost {
                    replaced: true,
                    setback,
                }
            }
        }
    }

    /// When [`Book::to_retry`] should next be asked.
    pub fn next_retry(&self) -> Option<Now> {
        let unsettled = self.workers.iter().filter(|_| self.unsettled);
        unsettled.filter_map(|entry| entry.retry).min()
    }

    /// Workers that are to be made now, after a pause.
    pub fn to_retry(&mut self, now: Now) -> Vec<u32> {
        let mut due = Vec::new();
        if !self.unsettled {
            return due;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            if entry.retry.take_if(|at| *at <= now).is_some() {
                entry.phase = Phase::Starting;
                due.push(worker as u32);
            }
        }
        due
    }

    /// Workers that have made no progress in starting, or with what restores them, for too long: they
    /// are to be killed. To be asked when all that has come from workers has been looked at.
    pub fn stalled(&mut self, now: Now) -> Vec<u32> {
        let patience = self.patience;
        let mut stalled = Vec::new();
        if !std::mem::take(&mut self.unsettled) {
            return stalled;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            let starts = matches!(entry.phase, Phase::Starting | Phase::Restoring { .. });
            self.unsettled |= starts || entry.retry.is_some();
            if entry.progress_by.take_if(|at| *at <= now).is_some() {
                entry.stalled = entry.allowed(patience).unwrap_or_default();
                stalled.push(worker as u32);
            }
        }
        stalled
    }

    /// There will be no worker in this place.
    pub fn give_up(&mut self, worker: u32) {
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            entry.phase = Phase::Gone;
            entry.progress_by = None;
        }
    }

    /// Whether all workers are gone.
    pub fn all_gone(&self) -> bool {
        self.workers.iter().all(|entry| entry.phase == Phase::Gone)
    }

    /// When it is to be killed.
    fn end_by(entry: &Entry) -> Option<Now> {
        let cancelled = match entry.phase {
            Phase::Gone => return None,
            Phase::Busy { cancelled, .. } => cancelled,
            _ => None,
        };
        let ends = [cancelled, entry.stopping, entry.hung_up];
        ends.into_iter().flatten().min()
    }

    /// When its task is out of time.
    fn task_by(entry: &Entry) -> Option<Now> {
        match entry.phase {
            Phase::Busy {
                cancelled: None,
                deadline,
                ..
            } => deadline,
            _ => None,
        }
    }

    /// When [`Book::overdue`], [`Book::out_of_time`] and [`Book::stalled`] should next be asked.
    pub fn next_deadline(&self) -> Option<Now> {
        let unsettled = self.workers.iter().filter(|_| self.unsettled);
        let progress = unsettled.filter_map(|entry| entry.progress_by);
        if !self.timed {
            return progress.min();
        }
        let both = |entry| [Book::end_by(entry), Book::task_by(entry)];
        let ends = self.workers.iter().flat_map(both).flatten();
        ends.chain(progress).min()
    }

    /// When [`Book::overdue`] should next be asked.
    pub fn next_end(&self) -> Option<Now> {
        let workers = self.workers.iter().filter(|_| self.timed);
        workers.filter_map(Book::end_by).min()
    }

    /// Workers whose time is up: they are to be killed. Each is named again only after a second,
    /// which a killed process should not need.
    pub fn overdue(&mut self, now: Now) -> Vec<u32> {
        let mut overdue = Vec::new();
        if !std::mem::take(&mut self.timed) {
            return overdue;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            let end = Book::end_by(entry);
            self.timed |= end.is_some() || Book::task_by(entry).is_some();
            if end.is_none_or(|at| at > now) {
                continue;
            }
            overdue.push(worker as u32);
            entry.stop_timed_out |= entry.may_finish;
            let again = Some(now + Duration::from_secs(1));
            let cancelled = match &mut entry.phase {
                Phase::Busy { cancelled, .. } => Some(cancelled),
                _ => None,
            };
            let ends = [&mut entry.stopping, &mut entry.hung_up];
            for end in ends.into_iter().chain(cancelled) {
                if end.is_some() {
                    *end = again;
                }
            }
        }
        overdue
    }
}

#[cfg(test)]
mod tests;
