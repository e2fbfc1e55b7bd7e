//! The agent's bookkeeping: what each of its workers is doing and what may pass through.
//!
//! A pure state machine, like [`crate::scheduler`]: frames, exits and the time go in, decisions
//! come out. Processes, sockets and the clock are in [`super`].

use crate::frame::{ABORT, FIRST, Header, LAST};
use crate::scheduler::{ProtocolError, RESULT_WINDOW, SEND_WINDOW};
use std::time::Duration;

/// How long an interrupted task may take to end before its worker is killed.
pub const INTERRUPT_GRACE: Duration = Duration::from_secs(2);

/// How long workers may take to end when the cluster stops before they are killed. Well under
/// the second within which everything must be gone.
pub const STOP_GRACE: Duration = Duration::from_millis(600);

/// The time, since any fixed moment.
pub type Now = Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Made, not yet ready.
    Starting,
    Idle,
    Busy {
        task: u64,
        /// Cancelled: its worker is killed if it has not answered by then.
        cancelled: Option<Now>,
    },
    Gone,
}

#[derive(Debug)]
struct Entry {
    phase: Phase,
    /// Asked to end, and killed if it has not by then.
    stopping: Option<Now>,
    /// It closed its channel, which should be its end, and is killed if that is not so by then.
    hung_up: Option<Now>,
    /// The whole message of the current task has passed: before that there is no answer.
    complete: bool,
    /// Bytes of the current answer that may still go to the head.
    credit: usize,
    /// Bytes passed on to the worker and not yet reported to the head.
    passed: usize,
}

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Forward,
    /// Leave it where it is until the head asks for more.
    Hold,
    Drop,
    /// Drop it and tell the head that the cancelled task has ended.
    Ended,
}

/// What an exit means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was asked to.
    Stopped,
    /// It was not: the head must know.
    Lost,
    /// It ended, or was killed, while a cancelled task kept it busy: a fresh worker takes its
    /// place.
    Replace,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Book {
    workers: Vec<Entry>,
    /// Some worker may have a deadline. Mostly none has, and then none is looked for.
    timed: bool,
}

impl Book {
    /// A host with `count` workers, all starting.
    pub fn new(count: usize) -> Book {
        let workers = (0..count)
            .map(|_| Entry {
                phase: Phase::Starting,
                stopping: None,
                hung_up: None,
                complete: false,
                credit: 0,
                passed: 0,
            })
            .collect();
        Book {
            workers,
            timed: false,
        }
    }

    fn entry(&mut self, worker: u32) -> Result<&mut Entry, ProtocolError> {
        let count = self.workers.len();
        self.workers
            .get_mut(worker as usize)
            .ok_or_else(|| ProtocolError(format!("worker {worker} of {count}")))
    }

    /// A worker is ready. Returns whether it was starting.
    pub fn ready(&mut self, worker: u32) -> bool {
        match self.workers.get_mut(worker as usize) {
            Some(entry) if entry.phase == Phase::Starting => {
                entry.phase = Phase::Idle;
                true
            }
            _ => false,
        }
    }

    /// A data frame from the head to a worker.
    ///
    /// # Errors
    /// When the head would not send it.
    pub fn to_worker(&mut self, header: &Header) -> Result<Route, ProtocolError> {
        let entry = self.entry(header.worker)?;
        if entry.phase == Phase::Gone || entry.stopping.is_some() {
            return Ok(Route::Drop);
        }
        match entry.phase {
            Phase::Idle if header.flags & FIRST != 0 => {
                entry.phase = Phase::Busy {
                    task: header.task,
                    cancelled: None,
                };
                entry.credit = RESULT_WINDOW;
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
        entry.complete = header.flags & LAST != 0;
        if header.flags & ABORT != 0 {
            entry.phase = Phase::Idle;
        }
        Ok(Route::Forward)
    }

    /// Bytes have reached a worker. Returns the credit to give back to the head, if it is time.
    pub fn passed(&mut self, worker: u32, bytes: usize) -> Option<(u64, u32)> {
        let entry = self.workers.get_mut(worker as usize)?;
        entry.passed += bytes;
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

    /// A data frame from a worker.
    ///
    /// # Errors
    /// When a worker of ours would not send it.
    pub fn from_worker(&mut self, header: &Header) -> Result<Route, ProtocolError> {
        let entry = self.entry(header.worker)?;
        let Phase::Busy { task, cancelled } = entry.phase else {
            return Err(ProtocolError("an answer from an idle worker".into()));
        };
        if task != header.task {
            return Err(ProtocolError("an answer to another task".into()));
        }
        // The head would take the whole host for broken.
        if !entry.complete || header.flags & !(FIRST | LAST) != 0 {
            return Err(ProtocolError("an answer that no worker gives".into()));
        }
        let len = header.body_len();
        let last = header.flags & LAST != 0;
        if cancelled.is_some() {
            if last {
                entry.phase = Phase::Idle;
                return Ok(Route::Ended);
            }
            return Ok(Route::Drop);
        }
        if len > entry.credit {
            return Ok(Route::Hold);
        }
        entry.credit -= len;
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
            } if *busy == task && cancelled.is_none() => {
                *cancelled = Some(now + INTERRUPT_GRACE);
                self.timed = true;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// A worker is asked to end. Returns whether it is still there, and whether it is busy.
    pub fn stop(&mut self, worker: u32, now: Now) -> Option<bool> {
        let entry = self.workers.get_mut(worker as usize)?;
        if entry.phase == Phase::Gone {
            return None;
        }
        entry.stopping.get_or_insert(now + STOP_GRACE);
        self.timed = true;
        Some(matches!(entry.phase, Phase::Busy { .. }))
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

    /// A worker's process has ended.
    pub fn exited(&mut self, worker: u32) -> Ending {
        let Some(entry) = self.workers.get_mut(worker as usize) else {
            return Ending::Stopped;
        };
        let phase = std::mem::replace(&mut entry.phase, Phase::Gone);
        entry.hung_up = None;
        entry.passed = 0;
        if entry.stopping.is_some() {
            return Ending::Stopped;
        }
        match phase {
            Phase::Busy {
                cancelled: Some(_), ..
            } => {
                entry.phase = Phase::Starting;
                Ending::Replace
            }
            _ => Ending::Lost,
        }
    }

    /// Whether all workers are gone.
    pub fn all_gone(&self) -> bool {
        self.workers.iter().all(|entry| entry.phase == Phase::Gone)
    }

    fn deadline(entry: &Entry) -> Option<Now> {
        let cancelled = match entry.phase {
            Phase::Gone => return None,
            Phase::Busy { cancelled, .. } => cancelled,
            _ => None,
        };
        let deadlines = [cancelled, entry.stopping, entry.hung_up];
        deadlines.into_iter().flatten().min()
    }

    /// When [`Book::overdue`] should next be asked.
    pub fn next_deadline(&self) -> Option<Now> {
        if !self.timed {
            return None;
        }
        self.workers.iter().filter_map(Book::deadline).min()
    }

    /// Workers whose time is up: they are to be killed. Each is named again only after a second,
    /// which a killed process should not need.
    pub fn overdue(&mut self, now: Now) -> Vec<u32> {
        let mut overdue = Vec::new();
        if !std::mem::take(&mut self.timed) {
            return overdue;
        }
        for (worker, entry) in self.workers.iter_mut().enumerate() {
            let deadline = Book::deadline(entry);
            self.timed |= deadline.is_some();
            if deadline.is_none_or(|at| at > now) {
                continue;
            }
            overdue.push(worker as u32);
            let again = Some(now + Duration::from_secs(1));
            let cancelled = match &mut entry.phase {
                Phase::Busy { cancelled, .. } => Some(cancelled),
                _ => None,
            };
            let deadlines = [&mut entry.stopping, &mut entry.hung_up];
            for deadline in deadlines.into_iter().chain(cancelled) {
                if deadline.is_some() {
                    *deadline = again;
                }
            }
        }
        overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Kind;

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

    fn busy() -> Book {
        let mut book = Book::new(1);
        assert!(book.ready(0));
        assert_eq!(
            book.to_worker(&data(1, FIRST | LAST, 9)),
            Ok(Route::Forward)
        );
        book
    }

    #[test]
    fn a_small_answer_passes_and_a_large_one_waits_for_the_head() {
        let mut book = busy();
        assert_eq!(
            book.from_worker(&data(1, FIRST, RESULT_WINDOW)),
            Ok(Route::Forward)
        );
        assert_eq!(book.from_worker(&data(1, 0, 1)), Ok(Route::Hold));
        assert_eq!(book.credit(0, 1, 1), Ok(true));
        assert_eq!(book.from_worker(&data(1, 0, 2)), Ok(Route::Hold));
        assert_eq!(book.from_worker(&data(1, LAST, 1)), Ok(Route::Forward));
        assert_eq!(book.credit(0, 1, 1), Ok(false));
        assert!(book.from_worker(&data(1, LAST, 1)).is_err());
    }

    #[test]
    fn an_answer_before_its_task_is_whole_or_with_flags_of_others_is_the_workers_fault() {
        let mut book = Book::new(1);
        book.ready(0);
        assert_eq!(book.to_worker(&data(1, FIRST, 5)), Ok(Route::Forward));
        assert!(book.from_worker(&data(1, FIRST | LAST, 1)).is_err());
        assert_eq!(book.to_worker(&data(1, LAST, 5)), Ok(Route::Forward));
        assert!(book.to_worker(&data(1, LAST, 5)).is_err());
        assert!(book.from_worker(&data(1, LAST | ABORT, 0)).is_err());
        assert_eq!(
            book.from_worker(&data(1, FIRST | LAST, 1)),
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
            book.from_worker(&data(1, FIRST, 2 * RESULT_WINDOW)),
            Ok(Route::Drop)
        );
        assert_eq!(book.from_worker(&data(1, LAST, 1)), Ok(Route::Ended));
        assert_eq!(book.cancel(0, 1, MS), Ok(false));
        assert_eq!(book.next_deadline(), None);
        assert_eq!(book.exited(0), Ending::Lost);
    }

    #[test]
    fn a_worker_that_does_not_heed_an_interrupt_is_overdue_at_its_deadline() {
        let mut book = busy();
        assert_eq!(book.cancel(0, 1, MS), Ok(true));
        assert_eq!(book.next_deadline(), Some(MS + INTERRUPT_GRACE));
        assert!(book.overdue(INTERRUPT_GRACE).is_empty());
        assert_eq!(book.overdue(MS + INTERRUPT_GRACE), [0]);
        assert!(book.overdue(2 * MS + INTERRUPT_GRACE).is_empty());
        assert_eq!(book.exited(0), Ending::Replace);
        assert!(book.ready(0));
        assert_eq!(book.task(0), None);
    }

    #[test]
    fn a_stopping_worker_gets_no_more_tasks() {
        let mut book = busy();
        assert_eq!(book.stop(0, MS), Some(true));
        assert_eq!(book.stop(0, 9 * MS), Some(true));
        assert_eq!(book.next_deadline(), Some(MS + STOP_GRACE));
        assert_eq!(book.to_worker(&data(2, FIRST, 1)), Ok(Route::Drop));
        assert_eq!(book.exited(0), Ending::Stopped);
        assert!(book.all_gone());
        assert_eq!(book.stop(0, MS), None);
    }

    #[test]
    fn an_aborted_message_leaves_the_worker_idle() {
        let mut book = Book::new(1);
        book.ready(0);
        assert_eq!(book.to_worker(&data(1, FIRST, 5)), Ok(Route::Forward));
        assert_eq!(
            book.to_worker(&data(1, LAST | ABORT, 0)),
            Ok(Route::Forward)
        );
        assert_eq!(
            book.to_worker(&data(2, FIRST | LAST, 5)),
            Ok(Route::Forward)
        );
        assert!(book.to_worker(&data(3, FIRST | LAST, 5)).is_err());
    }

    #[test]
    fn credit_goes_back_once_half_the_window_has_passed() {
        let mut book = busy();
        assert_eq!(book.passed(0, SEND_WINDOW / 2 - 1), None);
        assert_eq!(book.passed(0, 1), Some((1, (SEND_WINDOW / 2) as u32)));
        assert_eq!(book.passed(0, 1), None);
    }
}
