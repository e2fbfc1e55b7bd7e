//! The worker table: what each worker of the agent is doing, and which frames may pass.
//!
//! A pure state machine, like the head's scheduler. Frames, exits and the time go in; decisions
//! come out. Processes, sockets and the clock are in [`super`].

use super::linger::Kept;
use crate::protocol::control::{Facts, Setback};
use crate::protocol::error::ProtocolError;
use crate::protocol::frame::{ABORT, BY_REFERENCE, FIRST, Header, LAST};
use crate::protocol::limits::{RESULT_WINDOW, SEND_WINDOW};
use std::collections::VecDeque;
use std::time::Duration;

/// How long an interrupted task may take to end before its worker is killed.
pub const INTERRUPT_GRACE: Duration = Duration::from_secs(2);

/// How long workers may take to end before they are killed, when they are busy or the head has
/// disconnected. It is well under the second within which everything must have ended.
pub const STOP_GRACE: Duration = Duration::from_millis(600);

/// Bit in the numbers of tasks that restore a replacement.
pub const REPLAY: u64 = 1 << 63;

/// The time, since any fixed moment.
pub type Now = Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkerPhase {
    /// Started, not yet ready.
    Starting,
    /// Repeating this many set-up calls of its predecessor.
    Restoring {
        left: usize,
    },
    Idle,
    Busy {
        task: u64,
        /// When the worker had the whole message.
        since: Now,
        /// The task was cancelled or exceeded its time limit: the worker is killed if it has not
        /// answered by then.
        cancelled: Option<Now>,
        /// When the task exceeds its time limit.
        deadline: Option<Now>,
    },
    Terminated,
}

/// An answer in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    Announced,
    /// The head has asked for it.
    Asked,
}

#[derive(Debug)]
struct WorkerEntry {
    phase: WorkerPhase,
    /// The worker was asked to end, and is killed if it has not ended by then.
    stopping: Option<Now>,
    /// The worker was idle when it was asked to end: it may finish its exit handlers.
    may_finish: bool,
    /// An idle worker was killed because it had not ended in time.
    stop_timed_out: bool,
    /// The worker closed its channel, which should be its end, and is killed if it has not ended by
    /// then.
    hung_up: Option<Now>,
    /// The complete message of the current task has been passed on. The worker cannot answer earlier.
    complete: bool,
    /// The time limit of the task whose message comes next or is arriving.
    limit: Option<(u64, Duration)>,
    /// Bytes of the current answer that may still go to the head.
    credit: usize,
    /// The current answer is in shared memory, and has been announced.
    offered: Option<Offer>,
    /// Bytes passed on to the worker and not yet reported to the head.
    passed: usize,
    /// Bytes in flight to the worker that are not the head's: they do not count for its window.
    given: usize,
    /// The worker or one of its predecessors has been ready.
    came_up: bool,
    /// Worker failures that the head has not acknowledged yet. Until then, messages from the head
    /// are meant for the predecessor.
    unacknowledged: u32,
    /// One of these failures has not been reported: the head learns of it with the next report on the worker.
    unreported: bool,
    /// The head of the current task has disconnected.
    left: bool,
    /// How often the worker has failed since it was last ready.
    setbacks: u32,
    /// How long the worker took for the current task, once it has started to answer.
    task_duration: Duration,
    /// How long each of the remaining set-up calls took at first.
    replay_durations: VecDeque<Duration>,
    /// The worker is killed if it makes no progress until then, in starting or with set-up calls.
    progress_by: Option<Now>,
    /// The worker was killed because it made no progress for this long.
    stalled: Duration,
    /// The next pause before a worker is started, if there are pauses.
    pause: Option<Duration>,
    /// When the next worker is started, after a pause.
    restart_at: Option<Now>,
}

impl WorkerEntry {
    /// The worker is ready for the head's tasks.
    fn up(&mut self) {
        self.phase = WorkerPhase::Idle;
        self.unreported = false;
        self.setbacks = 0;
        self.pause = None;
        self.progress_by = None;
        self.replay_durations = VecDeque::new();
    }

    /// How long the worker may make no progress. The host may be much busier now than it was at
    /// first.
    fn allowed(&self, restore_timeout: Option<Duration>) -> Option<Duration> {
        let earlier = self.replay_durations.front().copied().unwrap_or_default();
        Some(restore_timeout?.saturating_add(earlier.saturating_mul(2)))
    }

    /// The worker has made progress in being restored.
    fn progress(&mut self, restore_timeout: Option<Duration>, now: Now) {
        let allowed = self.allowed(restore_timeout);
        self.progress_by = allowed.map(|allowed| now.saturating_add(allowed));
    }
}

/// The decision on a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Pass the frame on to the head.
    Forward,
    /// Leave it where it is until the head asks for more.
    Hold,
    /// Leave the frame where it is, and announce it to the head.
    Announce,
    /// Discard the frame: it is not needed.
    Drop,
    /// Discard the frame, and report to the head that the cancelled task has ended.
    Ended,
    /// Drop the frame: the worker has been restored.
    Restored,
}

/// What to do with a worker that reports that it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// The worker was ready before.
    Already,
    /// The head may send tasks to the worker.
    Up,
    /// The worker repeats set-up calls first.
    Restoring,
}

/// What the end of a worker means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The worker was asked to end.
    Stopped {
        /// Whether the worker was idle, and was killed because it did not end in time.
        timed_out: bool,
    },
    /// The worker failed: the head must know.
    Lost {
        /// Whether a replacement is started at once.
        replaced: bool,
        /// How far the worker had come, and what was done about it.
        setback: Setback,
    },
    /// The head knows that there is no worker; another is started after a pause.
    Waits,
    /// The worker ended while a cancelled task kept it busy, or before it was restored: it is
    /// replaced.
    Replace,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct WorkerTable {
    workers: Vec<WorkerEntry>,
    /// Some worker may have a deadline. Usually none has, and then deadlines are not checked.
    timed: bool,
    /// Some worker may be starting, being restored, or waiting for its restart. Usually none is.
    unsettled: bool,
    /// Answers may use memory that is shared with the head.
    pub shared_answers: bool,
    /// How long an idle worker may take to end when the head stops it.
    pub stop_timeout: Duration,
    /// How long a replacement may make no progress.
    pub restore_timeout: Option<Duration>,
}

impl WorkerTable {
    /// A host with `count` workers, all starting.
    pub fn new(count: usize) -> WorkerTable {
        let workers = (0..count)
            .map(|_| WorkerEntry {
                phase: WorkerPhase::Starting,
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
                unacknowledged: 0,
                unreported: false,
                left: false,
                setbacks: 0,
                task_duration: Duration::ZERO,
                replay_durations: VecDeque::new(),
                progress_by: None,
                stalled: Duration::ZERO,
                pause: None,
                restart_at: None,
            })
            .collect();
        WorkerTable {
            workers,
            timed: false,
            unsettled: false,
            shared_answers: false,
            stop_timeout: STOP_GRACE,
            restore_timeout: None,
        }
    }

    /// Adds the facts about a worker to a bug report.
    pub fn facts(&self, worker: u32, now: Now, facts: &mut Facts) {
        let Some(entry) = self.workers.get(worker as usize) else {
            return;
        };
        match entry.phase {
            WorkerPhase::Starting => facts.add("state", "starting"),
            WorkerPhase::Restoring { left } => {
                facts.add("state", "restoring");
                facts.add("setup_calls_to_replay", left);
            }
            WorkerPhase::Idle => facts.add("state", "idle"),
            WorkerPhase::Busy {
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
                facts.add_some("kill_in", cancelled.map(left));
                facts.add_some("timeout_in", deadline.map(left));
                if let Some(offer) = entry.offered {
                    facts.add_debug("shared_memory_result", offer);
                }
            }
            WorkerPhase::Terminated => facts.add("state", "terminated"),
        }
        facts.add("stopping", entry.stopping.is_some());
        facts.add("hung_up", entry.hung_up.is_some());
        facts.add("was_ready", entry.came_up);
        facts.add("unacknowledged_failures", entry.unacknowledged);
        facts.add("setbacks", entry.setbacks);
        facts.add("credit_to_report", entry.passed);
        facts.add("bytes_from_agent", entry.given);
        facts.add("awaiting_restart", entry.restart_at.is_some());
    }

    /// A worker is being started.
    pub fn made(&mut self, worker: u32, now: Now) {
        let restore_timeout = self.restore_timeout;
        self.unsettled = true;
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            // The head limits the time of the first start.
            entry.progress_by = restore_timeout.filter(|_| entry.came_up).map(|p| now + p);
        }
    }

    /// How long a worker was at its current task, once it has begun to answer.
    pub fn task_duration(&self, worker: u32) -> Duration {
        let entry = self.workers.get(worker as usize);
        entry.map_or(Duration::ZERO, |entry| entry.task_duration)
    }

    fn entry(&mut self, worker: u32) -> Result<&mut WorkerEntry, ProtocolError> {
        let count = self.workers.len();
        self.workers
            .get_mut(worker as usize)
            .ok_or_else(|| ProtocolError(format!("worker {worker} of {count}")))
    }

    /// A worker is ready, and repeats set-up calls, which took these `durations` at first.
    pub fn ready(&mut self, worker: u32, durations: VecDeque<Duration>, now: Now) -> Ready {
        let restore_timeout = self.restore_timeout;
        match self.workers.get_mut(worker as usize) {
            Some(entry) if entry.phase == WorkerPhase::Starting => {
                entry.came_up = true;
                if !durations.is_empty() {
                    entry.phase = WorkerPhase::Restoring {
                        left: durations.len(),
                    };
                    entry.replay_durations = durations;
                    entry.progress(restore_timeout, now);
                    return Ready::Restoring;
                }
                entry.up();
                Ready::Up
            }
            _ => Ready::Already,
        }
    }

    /// The head has acknowledged a worker failure.
    ///
    /// # Errors
    /// When there is no such worker.
    pub fn loss_acknowledged(&mut self, worker: u32) -> Result<(), ProtocolError> {
        let entry = self.entry(worker)?;
        entry.unacknowledged = entry.unacknowledged.saturating_sub(1);
        Ok(())
    }

    /// Whether a worker was asked to end.
    pub fn is_stopping(&self, worker: u32) -> bool {
        let entry = self.workers.get(worker as usize);
        entry.is_some_and(|entry| entry.stopping.is_some())
    }

    /// Whether messages of the head are meant for this worker, and not for its predecessor.
    ///
    /// # Errors
    /// When there is no such worker.
    pub fn is_meant(&mut self, worker: u32) -> Result<bool, ProtocolError> {
        let entry = self.entry(worker)?;
        let there = entry.phase != WorkerPhase::Terminated && entry.stopping.is_none();
        Ok(there && entry.unacknowledged == 0)
    }

    /// Whether a worker is ready, and has been sent its set-up log if it is a replacement.
    pub fn was_restored(&self, worker: u32) -> bool {
        let entry = self.workers.get(worker as usize);
        entry.is_some_and(|entry| {
            let is_ready = matches!(
                entry.phase,
                WorkerPhase::Restoring { .. } | WorkerPhase::Idle
            );
            is_ready && entry.stopping.is_none()
        })
    }

    /// Sets the time limit of the task whose message comes next.
    ///
    /// # Errors
    /// When the worker has a task.
    pub fn limit(&mut self, worker: u32, task: u64, limit: Duration) -> Result<(), ProtocolError> {
        if !self.is_meant(worker)? {
            return Ok(());
        }
        let entry = self.entry(worker)?;
        if entry.phase != WorkerPhase::Idle {
            let phase = entry.phase;
            return Err(ProtocolError(format!(
                "a time limit for worker {worker}, which is {phase:?}"
            )));
        }
        entry.limit = Some((task, limit));
        Ok(())
    }

    /// Decides on a data frame from the head to a worker.
    ///
    /// # Errors
    /// When the head would not send it.
    pub fn to_worker(&mut self, header: &Header, now: Now) -> Result<Route, ProtocolError> {
        if !self.is_meant(header.worker)? {
            return Ok(Route::Drop);
        }
        let entry = self.entry(header.worker)?;
        match entry.phase {
            WorkerPhase::Idle if header.flags & FIRST != 0 && header.task & REPLAY == 0 => {
                entry.phase = WorkerPhase::Busy {
                    task: header.task,
                    since: now,
                    cancelled: None,
                    deadline: None,
                };
                entry.credit = RESULT_WINDOW;
                entry.left = false;
                entry.offered = None;
            }
            WorkerPhase::Busy { task, .. }
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
            WorkerPhase::Busy {
                deadline, since, ..
            },
            true,
        ) = (&mut entry.phase, whole)
        {
            *since = now;
            entry.task_duration = Duration::ZERO;
            let limit = entry.limit.take_if(|(task, _)| *task == header.task);
            *deadline = limit.map(|(_, limit)| now.saturating_add(limit));
            self.timed |= limit.is_some();
        }
        let entry = self.entry(header.worker)?;
        if header.flags & ABORT != 0 {
            entry.phase = WorkerPhase::Idle;
        }
        Ok(Route::Forward)
    }

    /// Bytes have reached a worker. Returns the credit to give back to the head, if it is time.
    pub fn passed(&mut self, worker: u32, bytes: usize) -> Option<(u64, u32)> {
        let entry = self.workers.get_mut(worker as usize)?;
        // Bytes that the agent itself sends do not count as the head's.
        if matches!(
            entry.phase,
            WorkerPhase::Starting | WorkerPhase::Restoring { .. }
        ) {
            return None;
        }
        let given = bytes.min(entry.given);
        entry.given -= given;
        entry.passed += bytes - given;
        if entry.passed < SEND_WINDOW / 2 {
            return None;
        }
        let passed = std::mem::take(&mut entry.passed);
        // The window belongs to the worker, not to a task.
        let task = match entry.phase {
            WorkerPhase::Busy { task, .. } => task,
            _ => 0,
        };
        Some((task, u32::try_from(passed).unwrap_or(u32::MAX)))
    }

    /// Bytes that have reached a worker and whose credit has not been returned to the head.
    pub fn unreported(&self, worker: u32) -> usize {
        let entry = self.workers.get(worker as usize);
        entry.map_or(0, |entry| entry.passed)
    }

    /// The agent sends a worker this many bytes of its own accord.
    pub fn gave(&mut self, worker: u32, bytes: usize) {
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            // While the worker is being restored, nothing counts.
            if matches!(entry.phase, WorkerPhase::Idle | WorkerPhase::Busy { .. }) {
                entry.given += bytes;
            }
        }
    }

    /// Bytes in flight to a worker that the agent itself has sent.
    pub fn given(&self, worker: u32) -> usize {
        let entry = self.workers.get(worker as usize);
        entry.map_or(0, |entry| entry.given)
    }

    /// Decides on a data frame from a worker.
    ///
    /// # Errors
    /// When a worker of ours would not send it.
    pub fn from_worker(&mut self, header: &Header, now: Now) -> Result<Route, ProtocolError> {
        let shared = header.flags & BY_REFERENCE != 0;
        if shared && (!self.shared_answers || header.flags != FIRST | LAST | BY_REFERENCE) {
            return Err(ProtocolError("unexpected shared memory".into()));
        }
        let restore_timeout = self.restore_timeout;
        let entry = self.entry(header.worker)?;
        let last = header.flags & LAST != 0;
        if let WorkerPhase::Restoring { left } = &mut entry.phase {
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
                entry.replay_durations.pop_front();
            }
            entry.progress(restore_timeout, now);
            return Ok(Route::Drop);
        }
        let WorkerPhase::Busy {
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
        // The head would treat the whole host as failed.
        if !entry.complete || header.flags & !(FIRST | LAST | BY_REFERENCE) != 0 {
            return Err(ProtocolError("an answer that no worker gives".into()));
        }
        // The worker has finished the task: it is not responsible for how long the answer waits for
        // the head.
        *deadline = None;
        if entry.task_duration.is_zero() {
            entry.task_duration = now.saturating_sub(*since);
        }
        let len = header.body_len();
        if cancelled.is_some() {
            if last {
                entry.phase = WorkerPhase::Idle;
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
            entry.phase = WorkerPhase::Idle;
        }
        Ok(Route::Forward)
    }

    /// The head grants credit for an answer. Returns whether that is for the current task.
    pub fn credit(&mut self, worker: u32, task: u64, bytes: u32) -> Result<bool, ProtocolError> {
        let entry = self.entry(worker)?;
        let current = matches!(entry.phase, WorkerPhase::Busy { task: busy, .. } if busy == task);
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
            WorkerPhase::Busy {
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

    /// Tasks that have exceeded their time limits: their workers are to be interrupted. Each task
    /// is returned once.
    pub fn out_of_time(&mut self, now: Now) -> Vec<(u32, u64)> {
        let mut out = Vec::new();
        if !self.timed {
            return out;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            if let WorkerPhase::Busy {
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

    /// A worker is asked to end. Returns `None` if it has ended already, or whether it is busy.
    pub fn stop(&mut self, worker: u32, now: Now) -> Option<bool> {
        let entry = self.workers.get_mut(worker as usize)?;
        entry.restart_at = None;
        if entry.phase == WorkerPhase::Terminated {
            return None;
        }
        if entry.stopping.is_none() {
            entry.may_finish = entry.phase == WorkerPhase::Idle;
            let grace = match entry.may_finish {
                true => self.stop_timeout,
                false => STOP_GRACE,
            };
            entry.stopping = Some(now + grace);
        }
        self.timed = true;
        Some(matches!(entry.phase, WorkerPhase::Busy { .. }))
    }

    /// The head has disconnected: workers that were asked to end have no more time than
    /// [`STOP_GRACE`].
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
            WorkerPhase::Busy { task, .. } => Some(task),
            _ => None,
        }
    }

    /// Whether no two workers have tasks.
    pub fn at_most_one_is_busy(&self) -> bool {
        let is_busy = |entry: &&WorkerEntry| matches!(entry.phase, WorkerPhase::Busy { .. });
        self.workers.iter().filter(is_busy).nth(1).is_none()
    }

    /// Whether all workers have terminated.
    pub fn all_terminated(&self) -> bool {
        self.workers
            .iter()
            .all(|entry| entry.phase == WorkerPhase::Terminated)
    }

    /// Whether a worker has the whole message of its task.
    pub fn is_complete(&self, worker: u32) -> bool {
        let entry = self.workers.get(worker as usize);
        entry.is_some_and(|entry| entry.complete)
    }

    /// The head of a worker's task has disconnected. The worker may answer without credit.
    pub fn leave(&mut self, worker: u32) {
        if let Some(entry) = self.workers.get_mut(worker as usize) {
            entry.left = true;
            entry.credit = usize::MAX;
            entry.offered = Some(Offer::Asked);
        }
    }

    /// Another head takes over this worker. `pending`: the bytes that the worker has not read, which do not count for
    /// the window of that head.
    pub fn attach(&mut self, worker: u32, pending: usize) -> Kept {
        let Some(entry) = self.workers.get_mut(worker as usize) else {
            return Kept::Terminated;
        };
        entry.unacknowledged = 0;
        entry.unreported = false;
        entry.limit = None;
        entry.passed = 0;
        // While a worker is being restored, nothing counts.
        let counts = matches!(entry.phase, WorkerPhase::Idle | WorkerPhase::Busy { .. });
        entry.given = if counts { pending } else { 0 };
        match entry.phase {
            _ if entry.stopping.is_some() => Kept::Stopped,
            WorkerPhase::Idle => Kept::Idle,
            WorkerPhase::Busy { .. } => Kept::Busy,
            WorkerPhase::Starting | WorkerPhase::Restoring { .. } => Kept::Starting,
            WorkerPhase::Terminated if entry.restart_at.is_some() => Kept::Starting,
            WorkerPhase::Terminated => Kept::Terminated,
        }
    }

    /// When the worker is to be killed.
    fn end_by(entry: &WorkerEntry) -> Option<Now> {
        let cancelled = match entry.phase {
            WorkerPhase::Terminated => return None,
            WorkerPhase::Busy { cancelled, .. } => cancelled,
            _ => None,
        };
        let ends = [cancelled, entry.stopping, entry.hung_up];
        ends.into_iter().flatten().min()
    }

    /// When the worker's task exceeds its time limit.
    fn task_by(entry: &WorkerEntry) -> Option<Now> {
        match entry.phase {
            WorkerPhase::Busy {
                cancelled: None,
                deadline,
                ..
            } => deadline,
            _ => None,
        }
    }

    /// When to call [`WorkerTable::overdue`], [`WorkerTable::out_of_time`] and
    /// [`WorkerTable::stalled`] next.
    pub fn next_deadline(&self) -> Option<Now> {
        let unsettled = self.workers.iter().filter(|_| self.unsettled);
        let progress = unsettled.filter_map(|entry| entry.progress_by);
        if !self.timed {
            return progress.min();
        }
        let both = |entry| [WorkerTable::end_by(entry), WorkerTable::task_by(entry)];
        let ends = self.workers.iter().flat_map(both).flatten();
        ends.chain(progress).min()
    }

    /// When to call [`WorkerTable::overdue`] next.
    pub fn next_end(&self) -> Option<Now> {
        let workers = self.workers.iter().filter(|_| self.timed);
        workers.filter_map(WorkerTable::end_by).min()
    }

    /// Workers that are to be killed. Each is returned again only after a second, which a killed
    /// process should not need.
    pub fn overdue(&mut self, now: Now) -> Vec<u32> {
        let mut overdue = Vec::new();
        if !std::mem::take(&mut self.timed) {
            return overdue;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            let end = WorkerTable::end_by(entry);
            self.timed |= end.is_some() || WorkerTable::task_by(entry).is_some();
            if end.is_none_or(|at| at > now) {
                continue;
            }
            overdue.push(worker as u32);
            entry.stop_timed_out |= entry.may_finish;
            let again = Some(now + Duration::from_secs(1));
            let cancelled = match &mut entry.phase {
                WorkerPhase::Busy { cancelled, .. } => Some(cancelled),
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

pub mod restart;
#[cfg(test)]
mod tests;
