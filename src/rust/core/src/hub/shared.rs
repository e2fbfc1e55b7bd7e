//! What R's thread and the hub's thread share: an inbox under a mutex, a few counters, and a
//! socket pair by which the hub wakes R.
//!
//! The mutex is held for map look-ups and queue operations only: never while R code runs, never
//! across an allocation by R, an interrupt check or I/O.

use crate::message::{Hello, ToHead};
use crate::scheduler::{Gone, JobId, Note, Outcome, Rank, TaskId, Want};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Why a host is gone, with what its agent's command printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFailure {
    pub reason: String,
    pub stderr: String,
    pub stdout: String,
}

impl HostFailure {
    pub fn new(reason: String) -> HostFailure {
        HostFailure {
            reason,
            ..HostFailure::default()
        }
    }
}

/// What R shows when it gets to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker was killed because it did not heed an interrupt; a fresh one took its place.
    Replaced { rank: Rank },
    /// A worker printed this.
    Output { rank: Rank, bytes: Bytes },
}

/// A worker as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct WorkerView {
    pub pid: Option<u32>,
    pub gone: Option<Arc<Gone>>,
}

/// A host as R's thread sees it.
#[derive(Clone, Debug, Default)]
pub struct HostView {
    /// The process that was launched: here the agent itself.
    pub pid: Option<u32>,
    pub hello: Option<Hello>,
    pub start_failure: Option<ToHead>,
    pub failure: Option<HostFailure>,
}

#[derive(Default)]
pub struct Inbox {
    /// R waits, or is about to, and is to be woken by the next change.
    pub waiting: bool,
    /// Tasks whose end R wants to know, with the outcome once there is one.
    pub expected: HashMap<TaskId, Option<Outcome>>,
    /// Ended tasks in the order of their ends. May hold tasks that are no longer expected.
    pub ready: VecDeque<(Rank, TaskId)>,
    /// Lost tasks that R has not been told of.
    pub lost: Vec<(JobId, Rank, TaskId)>,
    pub workers: Vec<WorkerView>,
    pub hosts: Vec<HostView>,
    pub events: VecDeque<Event>,
    /// Workers that have come up.
    pub up: usize,
    /// The hub's thread has ended.
    pub closed: bool,
}

/// See the module's documentation.
pub struct Shared {
    inbox: Mutex<Inbox>,
    wake: UnixStream,
    woken: UnixStream,
    /// Bytes of answers that R took since the hub looked.
    pub taken: AtomicUsize,
    /// An answer waits on its host for want of room here: R tells the hub when it makes some.
    pub starving: AtomicBool,
    /// R is blocked in sending.
    pub send_blocked: AtomicBool,
    /// Bytes of tasks submitted and not yet sent.
    pub queued: AtomicUsize,
    want: AtomicU64,
    /// Counts the changes of the inbox, for R's thread to watch without taking the lock.
    changes: AtomicUsize,
    pub result_limit: usize,
}

impl Shared {
    pub fn new(workers: usize, hosts: usize, result_limit: usize) -> io::Result<Shared> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let inbox = Inbox {
            workers: vec![WorkerView::default(); workers],
            hosts: vec![HostView::default(); hosts],
            ..Inbox::default()
        };
        Ok(Shared {
            inbox: Mutex::new(inbox),
            wake,
            woken,
            taken: AtomicUsize::new(0),
            starving: AtomicBool::new(false),
            send_blocked: AtomicBool::new(false),
            queued: AtomicUsize::new(0),
            want: AtomicU64::new(0),
            changes: AtomicUsize::new(0),
            result_limit,
        })
    }

    pub fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // A panic while it was held would have been in our own few lines: the data is whole.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wanted(&self) -> Want {
        match self.want.load(Ordering::SeqCst) {
            0 => Want::Nothing,
            1 => Want::Any,
            rank => Want::Rank((rank - 2) as Rank),
        }
    }

    pub fn set_want(&self, want: Want) {
        let code = match want {
            Want::Nothing => 0,
            Want::Any => 1,
            Want::Rank(rank) => u64::from(rank) + 2,
        };
        self.want.store(code, Ordering::SeqCst);
    }

    fn change(&self, change: impl FnOnce(&mut Inbox)) {
        let waiting = {
            let mut inbox = self.inbox();
            change(&mut inbox);
            self.changes.fetch_add(1, Ordering::Release);
            std::mem::take(&mut inbox.waiting)
        };
        if waiting {
            // Full means that R has been woken already.
            let _ = (&self.wake).write(&[1]);
        }
    }

    /// Makes known what the scheduler noted, and that `released` bytes of tasks have gone.
    pub fn publish(&self, notes: Vec<Note>, released: usize) {
        if released > 0 {
            self.queued.fetch_sub(released, Ordering::SeqCst);
        }
        let unblocked = released > 0 && self.send_blocked.load(Ordering::SeqCst);
        if notes.is_empty() && !unblocked {
            return;
        }
        let mut dropped = 0;
        self.change(|inbox| {
            for note in notes {
                match note {
                    Note::Up { rank, pid } => {
                        inbox.up += 1;
                        inbox.workers[rank as usize].pid = Some(pid);
                    }
                    Note::Replaced { rank, pid } => {
                        inbox.workers[rank as usize].pid = Some(pid);
                        inbox.events.push_back(Event::Replaced { rank });
                    }
                    Note::Gone { rank, gone } => inbox.workers[rank as usize].gone = Some(gone),
                    Note::Done {
                        rank,
                        task,
                        job,
                        outcome,
                    } => match inbox.expected.get_mut(&task) {
                        Some(slot) => {
                            if matches!(outcome, Outcome::Lost(_)) {
                                inbox.lost.push((job, rank, task));
                            }
                            *slot = Some(outcome);
                            inbox.ready.push_back((rank, task));
                        }
                        None => {
                            if let Outcome::Answer(body) = outcome {
                                dropped += body.len;
                            }
                        }
                    },
                    Note::Output { rank, bytes } => {
                        inbox.events.push_back(Event::Output { rank, bytes });
                    }
                    Note::StartFailed { agent, reason } => {
                        inbox.hosts[agent].start_failure = Some(reason);
                    }
                }
            }
        });
        if dropped > 0 {
            self.taken.fetch_add(dropped, Ordering::SeqCst);
        }
    }

    pub fn set_agent_pid(&self, agent: usize, pid: u32) {
        self.change(|inbox| inbox.hosts[agent].pid = Some(pid));
    }

    pub fn set_agent_hello(&self, agent: usize, hello: Hello) {
        self.change(|inbox| inbox.hosts[agent].hello = Some(hello));
    }

    pub fn host_failed(&self, agent: usize, failure: HostFailure) {
        self.change(|inbox| inbox.hosts[agent].failure = Some(failure));
    }

    /// The hub's thread ends. Normally nothing is left to be lost by then.
    pub fn close(&self, reason: &str) {
        self.change(|inbox| {
            let gone = Arc::new(Gone::Host(reason.to_owned()));
            for worker in &mut inbox.workers {
                worker.gone.get_or_insert_with(|| gone.clone());
            }
            for slot in inbox.expected.values_mut() {
                slot.get_or_insert_with(|| Outcome::Lost(gone.clone()));
            }
            inbox.closed = true;
        });
    }

    pub fn changes(&self) -> usize {
        self.changes.load(Ordering::Acquire)
    }

    /// Sleeps until the hub changes something, `most` has passed, or a signal arrives. The
    /// caller has set `waiting` while it held the inbox, so nothing is missed.
    pub fn wait(&self, most: Duration) {
        let mut poll = libc::pollfd {
            fd: self.woken.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let most = libc::c_int::try_from(most.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: one valid pollfd. A signal ends the wait with EINTR, which is wanted: R then
        // gets to handle it at once.
        let ready = unsafe { libc::poll(&mut poll, 1, most) };
        if ready > 0 {
            let mut buffer = [0u8; 64];
            let _ = (&self.woken).read(&mut buffer);
        }
    }
}
