//! The agent's bookkeeping: what each of its workers is doing and what may pass through.
//!
//! A pure state machine, like the head's scheduler: frames, exits and the time go in, decisions come
//! out. Processes, sockets and the clock are in [`super`].

use crate::protocol::control::{Facts, Setback};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, FIRST, Header, LAST, SHARED};
use crate::protocol::ids::RESTORE;
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
    /// How long a task may take.
    timeout: Option<Duration>,
    /// Answers may be in memory that is shared with the head.
    pub shares: bool,
    /// How long an idle worker may take to end when the head stops it.
    pub stop_timeout: Duration,
    /// How long a worker that replaces another may make no progress.
    pub patience: Option<Duration>,
}

impl Book {
    /// A host with `count` workers, all starting, whose tasks may take so long.
    pub fn new(count: usize, timeout: Option<Duration>) -> Book {
        let workers = (0..count)
            .map(|_| Entry {
                phase: Phase::Starting,
                stopping: None,
                may_finish: false,
                stop_timed_out: false,
                hung_up: None,
                complete: false,
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
            timeout,
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

    /// A data frame from the head to a worker.
    ///
    /// # Errors
    /// When the head would not send it.
    pub fn to_worker(&mut self, header: &Header, now: Now) -> Result<Route, ProtocolError> {
        if !self.is_meant(header.worker)? {
            return Ok(Route::Drop);
        }
        // What restores a worker is no task of R's.
        let timeout = self.timeout.filter(|_| header.task & RESTORE == 0);
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
            *deadline = timeout.map(|timeout| now + timeout);
            self.timed |= timeout.is_some();
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
        if !self.timed || self.timeout.is_none() {
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
mod tests {
    use super::*;
    use crate::protocol::frame::Kind;

    const MS: Duration = Duration::from_millis(1);

    fn data(task: u64, flags: u8, len: usize) -> Header {
        Header {
            kind: Kind::Data,
            flags,
            worker: 0,
            task,
            len: len as u32,
        }
    }

    /// One that had been ready is lost.
    fn lost(replaced: bool) -> Ending {
        let setback = Setback::default();
        Ending::Lost { replaced, setback }
    }

    fn busy() -> Book {
        let mut book = Book::new(1, None);
        assert_eq!(book.ready(0, [].into(), MS), Ready::Up);
        assert_eq!(
            book.to_worker(&data(1, FIRST | LAST, 9), MS),
            Ok(Route::Forward)
        );
        book
    }

    #[test]
    fn a_small_answer_passes_and_a_large_one_waits_for_the_head() {
        let mut book = busy();
        assert_eq!(
            book.from_worker(&data(1, FIRST, RESULT_WINDOW), MS),
            Ok(Route::Forward)
        );
        assert_eq!(book.from_worker(&data(1, 0, 1), MS), Ok(Route::Hold));
        assert_eq!(book.credit(0, 1, 1), Ok(true));
        assert_eq!(book.from_worker(&data(1, 0, 2), MS), Ok(Route::Hold));
        assert_eq!(book.from_worker(&data(1, LAST, 1), MS), Ok(Route::Forward));
        assert_eq!(book.credit(0, 1, 1), Ok(false));
        assert!(book.from_worker(&data(1, LAST, 1), MS).is_err());
    }

    #[test]
    fn an_answer_before_its_task_is_whole_or_with_flags_of_others_is_the_workers_fault() {
        let mut book = Book::new(1, None);
        book.ready(0, [].into(), MS);
        assert_eq!(book.to_worker(&data(1, FIRST, 5), MS), Ok(Route::Forward));
        assert!(book.from_worker(&data(1, FIRST | LAST, 1), MS).is_err());
        assert_eq!(book.to_worker(&data(1, LAST, 5), MS), Ok(Route::Forward));
        assert!(book.to_worker(&data(1, LAST, 5), MS).is_err());
        assert!(book.from_worker(&data(1, LAST | ABORT, 0), MS).is_err());
        assert_eq!(
            book.from_worker(&data(1, FIRST | LAST, 1), MS),
            Ok(Route::Forward)
        );
    }

    #[test]
    fn a_cancelled_answer_is_dropped_whole_and_its_end_is_told() {
        let mut book = busy();
        assert_eq!(book.cancel(0, 2, MS), Ok(false));
        assert_eq!(book.cancel(0, 1, MS), Ok(true));
        assert_eq!(book.cancel(0, 1, MS), Ok(false));
        assert_eq!(
            book.from_worker(&data(1, FIRST, 2 * RESULT_WINDOW), MS),
            Ok(Route::Drop)
        );
        assert_eq!(book.from_worker(&data(1, LAST, 1), MS), Ok(Route::Ended));
        assert_eq!(book.cancel(0, 1, MS), Ok(false));
        assert_eq!(book.next_deadline(), None);
        assert_eq!(book.exited(0, true, MS), lost(true));
    }

    #[test]
    fn a_worker_that_does_not_heed_an_interrupt_is_overdue_at_its_deadline() {
        let mut book = busy();
        assert_eq!(book.cancel(0, 1, MS), Ok(true));
        assert_eq!(book.next_deadline(), Some(MS + INTERRUPT_GRACE));
        assert!(book.overdue(INTERRUPT_GRACE).is_empty());
        assert_eq!(book.overdue(MS + INTERRUPT_GRACE), [0]);
        assert!(book.overdue(2 * MS + INTERRUPT_GRACE).is_empty());
        assert_eq!(book.exited(0, true, MS), Ending::Replace);
        assert_eq!(book.ready(0, [].into(), MS), Ready::Up);
        assert_eq!(book.task(0), None);
    }

    #[test]
    fn a_stopping_worker_gets_no_more_tasks() {
        let mut book = busy();
        assert_eq!(book.stop(0, MS), Some(true));
        assert_eq!(book.stop(0, 9 * MS), Some(true));
        assert_eq!(book.next_deadline(), Some(MS + STOP_GRACE));
        assert_eq!(book.to_worker(&data(2, FIRST, 1), MS), Ok(Route::Drop));
        let timed_out = false;
        assert_eq!(book.exited(0, true, MS), Ending::Stopped { timed_out });
        assert!(book.all_gone());
        assert_eq!(book.stop(0, MS), None);
    }

    #[test]
    fn an_idle_worker_has_its_time_to_end_while_the_head_is_there() {
        let idle = || {
            let mut book = Book::new(2, None);
            book.stop_timeout = Duration::from_secs(5);
            book.ready(0, [].into(), MS);
            assert_eq!(book.stop(0, MS), Some(false));
            // The other worker is starting.
            assert_eq!(book.stop(1, MS), Some(false));
            assert_eq!(book.overdue(MS + STOP_GRACE), [1]);
            let timed_out = false;
            assert_eq!(book.exited(1, true, MS), Ending::Stopped { timed_out });
            book
        };
        let mut book = idle();
        assert!(book.overdue(Duration::from_secs(5)).is_empty());
        assert_eq!(book.overdue(MS + Duration::from_secs(5)), [0]);
        let timed_out = true;
        assert_eq!(book.exited(0, true, MS), Ending::Stopped { timed_out });
        let mut book = idle();
        book.hurry(9 * MS);
        assert_eq!(book.next_end(), Some(9 * MS + STOP_GRACE));
        assert_eq!(book.overdue(9 * MS + STOP_GRACE), [0]);
        let timed_out = false;
        assert_eq!(book.exited(0, true, MS), Ending::Stopped { timed_out });
    }

    #[test]
    fn an_aborted_message_leaves_the_worker_idle() {
        let mut book = Book::new(1, None);
        book.ready(0, [].into(), MS);
        assert_eq!(book.to_worker(&data(1, FIRST, 5), MS), Ok(Route::Forward));
        assert_eq!(
            book.to_worker(&data(1, LAST | ABORT, 0), MS),
            Ok(Route::Forward)
        );
        assert_eq!(
            book.to_worker(&data(2, FIRST | LAST, 5), MS),
            Ok(Route::Forward)
        );
        assert!(book.to_worker(&data(3, FIRST | LAST, 5), MS).is_err());
    }

    #[test]
    fn credit_goes_back_once_half_the_window_has_passed() {
        let mut book = busy();
        assert_eq!(book.passed(0, SEND_WINDOW / 2 - 1), None);
        assert_eq!(book.passed(0, 1), Some((1, (SEND_WINDOW / 2) as u32)));
        assert_eq!(book.passed(0, 1), None);
    }

    #[test]
    fn what_the_agent_gives_a_worker_is_no_credit_for_the_head() {
        let mut book = busy();
        book.gave(0, SEND_WINDOW);
        assert_eq!(book.passed(0, SEND_WINDOW), None);
        assert_eq!(book.given(0), 0);
        assert_eq!(book.passed(0, SEND_WINDOW / 2 - 1), None);
        book.gave(0, 10);
        assert_eq!(book.passed(0, 11), Some((1, (SEND_WINDOW / 2) as u32)));
        book.gave(0, 10);
        book.exited(0, true, MS);
        assert_eq!(book.given(0), 0);
    }

    #[test]
    fn a_task_that_is_out_of_time_is_interrupted_and_then_its_worker_is_overdue() {
        let mut book = Book::new(1, Some(10 * MS));
        book.ready(0, [].into(), MS);
        assert_eq!(book.to_worker(&data(1, FIRST, 9), MS), Ok(Route::Forward));
        // The time counts from when the worker has all of the message.
        assert_eq!(book.next_deadline(), None);
        assert_eq!(
            book.to_worker(&data(1, LAST, 9), 5 * MS),
            Ok(Route::Forward)
        );
        assert_eq!(book.next_deadline(), Some(15 * MS));
        assert!(book.out_of_time(14 * MS).is_empty());
        assert!(book.overdue(15 * MS).is_empty());
        assert_eq!(book.out_of_time(15 * MS), [(0, 1)]);
        assert!(book.out_of_time(16 * MS).is_empty());
        let end = 15 * MS + INTERRUPT_GRACE;
        assert_eq!(book.next_deadline(), Some(end));
        assert!(book.overdue(end - MS).is_empty());
        assert_eq!(book.overdue(end), [0]);
        assert_eq!(book.exited(0, true, MS), Ending::Replace);
    }

    #[test]
    fn a_task_that_has_begun_to_answer_is_not_out_of_time() {
        let mut book = Book::new(1, Some(10 * MS));
        book.ready(0, [].into(), MS);
        let whole = data(1, FIRST | LAST, 9);
        assert_eq!(book.to_worker(&whole, MS), Ok(Route::Forward));
        assert_eq!(
            book.from_worker(&data(1, FIRST, RESULT_WINDOW), MS),
            Ok(Route::Forward)
        );
        assert_eq!(book.from_worker(&data(1, LAST, 1), MS), Ok(Route::Hold));
        assert_eq!(book.next_deadline(), None);
        assert!(book.out_of_time(20 * MS).is_empty());
    }

    #[test]
    fn a_lost_worker_is_replaced_and_restored_before_it_is_heard_of() {
        let mut book = busy();
        assert_eq!(book.exited(0, true, MS), lost(true));
        // What was under way to the lost one.
        assert_eq!(book.to_worker(&data(1, LAST, 9), MS), Ok(Route::Drop));
        assert_eq!(book.to_worker(&data(2, FIRST, 9), MS), Ok(Route::Drop));
        assert_eq!(book.ready(0, [MS; 2].into(), MS), Ready::Restoring);
        assert_eq!(book.passed(0, SEND_WINDOW), None);
        let again = |n| data(REPLAY + n, FIRST | LAST, 3);
        assert_eq!(book.from_worker(&again(0), MS), Ok(Route::Drop));
        assert_eq!(book.from_worker(&again(1), MS), Ok(Route::Restored));
        assert_eq!(book.to_worker(&data(2, FIRST, 9), MS), Ok(Route::Drop));
        assert_eq!(book.noted(0), Ok(()));
        assert_eq!(
            book.to_worker(&data(1, FIRST | LAST, 9), MS),
            Ok(Route::Forward)
        );
    }

    /// The end of one that had not been ready, which the head is told.
    fn setback(count: u32, restoring: bool, stalled: Duration, pause: Duration) -> Ending {
        let setback = Setback {
            count,
            restoring,
            stalled: stalled.as_millis() as u64,
            pause: pause.as_millis() as u64,
        };
        Ending::Lost {
            replaced: false,
            setback,
        }
    }

    #[test]
    fn a_worker_that_does_not_come_up_again_is_made_after_growing_pauses() {
        let mut book = busy();
        assert_eq!(book.exited(0, true, MS), lost(true));
        for _ in 1..SETBACKS {
            assert_eq!(book.exited(0, true, MS), Ending::Replace);
        }
        let told = setback(SETBACKS, false, Duration::ZERO, FIRST_PAUSE);
        assert_eq!(book.exited(0, true, MS), told);
        let (mut now, mut pause) = (MS, FIRST_PAUSE);
        for _ in 0..9 {
            assert_eq!(book.next_retry(), Some(now + pause));
            assert!(book.to_retry(now + pause - MS).is_empty());
            // Meanwhile nothing is meant for it.
            assert_eq!(book.to_worker(&data(7, FIRST, 1), now), Ok(Route::Drop));
            now += pause;
            assert_eq!(book.to_retry(now), [0]);
            assert!(book.to_retry(now + pause).is_empty());
            book.made(0, now);
            // The head is told once.
            assert_eq!(book.exited(0, true, now), Ending::Waits);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        assert_eq!(pause, LONGEST_PAUSE);
        now += pause;
        book.to_retry(now);
        assert_eq!(book.ready(0, [MS].into(), now), Ready::Restoring);
        let again = data(REPLAY, FIRST | LAST, 3);
        assert_eq!(book.from_worker(&again, now), Ok(Route::Restored));
        assert_eq!(book.next_retry(), None);
        // All starts anew.
        (0..2).for_each(|_| book.noted(0).unwrap());
        let task = data(8, FIRST | LAST, 3);
        assert_eq!(book.to_worker(&task, now), Ok(Route::Forward));
        assert_eq!(book.exited(0, true, now), lost(true));
        (1..SETBACKS).for_each(|_| assert_eq!(book.exited(0, true, now), Ending::Replace));
        assert_eq!(
            book.exited(0, true, now),
            setback(SETBACKS, false, Duration::ZERO, FIRST_PAUSE)
        );
        // It is not made again when the head has it stopped, nor when the cluster ends.
        assert_eq!(book.stop(0, now), None);
        assert!(book.all_gone() && book.next_retry().is_none());
        // Nor is one that was never there, or whose state is not known.
        let mut book = Book::new(1, None);
        let told = setback(1, false, Duration::ZERO, Duration::ZERO);
        assert_eq!(book.exited(0, true, MS), told);
        assert_eq!(book.next_retry(), None);
        assert_eq!(busy().exited(0, false, MS), lost(false));
    }

    #[test]
    fn a_worker_that_makes_no_progress_while_it_is_restored_is_killed() {
        const PATIENCE: Duration = Duration::from_secs(5);
        let mut book = Book::new(1, None);
        book.patience = Some(PATIENCE);
        // The first start is for the head to bound.
        book.made(0, MS);
        assert!(book.next_deadline().is_none() && book.stalled(9 * PATIENCE).is_empty());
        book.ready(0, [].into(), MS);
        book.exited(0, true, MS);
        book.made(0, MS);
        assert_eq!(book.next_deadline(), Some(MS + PATIENCE));
        assert!(book.stalled(PATIENCE).is_empty());
        assert_eq!(book.stalled(MS + PATIENCE), [0]);
        assert!(book.stalled(2 * PATIENCE).is_empty());
        let told = setback(1, false, PATIENCE, FIRST_PAUSE);
        assert_eq!(book.exited(0, true, MS), told);
        // The second of what is done again took long at first.
        book.to_retry(PATIENCE);
        book.made(0, PATIENCE);
        let mut now = 2 * PATIENCE - MS;
        assert_eq!(book.ready(0, [MS, PATIENCE].into(), now), Ready::Restoring);
        now += PATIENCE + MS;
        assert!(book.stalled(now).is_empty());
        let first = data(REPLAY, FIRST | LAST, 3);
        assert_eq!(book.from_worker(&first, now), Ok(Route::Drop));
        assert_eq!(book.next_deadline(), Some(now + 3 * PATIENCE));
        // Part of an answer is progress.
        now += 3 * PATIENCE - MS;
        let part = data(REPLAY + 1, FIRST, 3);
        assert_eq!(book.from_worker(&part, now), Ok(Route::Drop));
        now += 3 * PATIENCE;
        assert_eq!(book.stalled(now), [0]);
        assert_eq!(book.exited(0, true, now), Ending::Waits);
        assert!(book.next_retry() > Some(now + FIRST_PAUSE));
    }

    #[test]
    fn how_long_a_task_took_does_not_include_waiting_for_the_head() {
        let mut book = busy();
        let mut answer = data(1, FIRST, RESULT_WINDOW);
        assert_eq!(book.from_worker(&answer, 5 * MS), Ok(Route::Forward));
        answer = data(1, LAST, 1);
        assert_eq!(book.from_worker(&answer, 90 * MS), Ok(Route::Hold));
        assert_eq!(book.took(0), 4 * MS);
    }
}
