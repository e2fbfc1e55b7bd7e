//! How an agent creates its workers, and how it handles the end of a worker.

use super::process::{self, NewProcess, Process};
use super::worker_table::Ending;
use super::{AGENT_READS, Agent, FIRST_WORKER, fork};
use crate::platform::{self, log, reserve};
use crate::protocol::control::{StartMode, ToHead, WorkerFailure};
use crate::worker::channel::Channel;
use mio::unix::SourceFd;
use mio::{Interest, Token};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use tracing::{debug, info};

/// Maximum number of workers that are created between two polls of the streams.
const MAX_STARTS: usize = 8;

impl Agent {
    /// Creates the next few workers. Returns `Some` in a forked worker.
    pub(super) fn make_some(&mut self) -> io::Result<Option<Channel>> {
        for _ in 0..MAX_STARTS {
            let Some((worker, replaces)) = self.to_make.pop_front() else {
                break;
            };
            if self.ending {
                self.router.worker_table.give_up(worker);
                continue;
            }
            if self.router.worker_table.is_stopping(worker) {
                self.router.worker_table.give_up(worker);
                let timed_out = false;
                self.report(&ToHead::WorkerStopped { worker, timed_out });
                continue;
            }
            self.router.made(worker, replaces, self.now());
            let made = match self.start.mode {
                StartMode::Fork => self.fork(worker),
                StartMode::Spawn => {
                    let (shared_answers, signals) =
                        (self.router.worker_table.shared_answers, self.saved.clone());
                    process::spawn(&self.start, worker, shared_answers, signals)
                }
            };
            match made {
                Ok(NewProcess::Child(channel)) => return Ok(Some(channel)),
                Ok(NewProcess::Parent(process)) => {
                    let rank = self.number(worker);
                    debug!(rank, pid = process.pid, replaces, "worker started");
                    self.guard.made(worker, process.pid);
                    self.orphans.made(process.pid);
                    let token = FIRST_WORKER + 2 * worker as usize;
                    let registry = self.poll.registry();
                    let fd = process.channel.as_raw_fd();
                    registry.register(&mut SourceFd(&fd), Token(token), Interest::READABLE)?;
                    let fd = process.output.as_raw_fd();
                    registry.register(&mut SourceFd(&fd), Token(token + 1), Interest::READABLE)?;
                    self.workers[worker as usize] = Some(process);
                    // Send the configuration to a separate process at once.
                    self.write_worker(worker);
                }
                Err(error) => {
                    let failure = WorkerFailure {
                        tail: format!("a worker could not be started: {error}"),
                        ..WorkerFailure::default()
                    };
                    self.lost(worker, failure);
                }
            }
        }
        Ok(None)
    }

    pub(super) fn fork(&mut self, worker: u32) -> io::Result<NewProcess> {
        let made = fork::fork(worker, self.router.worker_table.shared_answers)?;
        if let NewProcess::Child(_) = made {
            self.saved.restore();
            self.warnings.restore();
            log::start_or_say(log::Role::Worker(self.start.rank(worker)));
            // The reserve would count towards the worker's memory limit.
            reserve::release();
            platform::process::renice(self.start.renice);
        }
        Ok(made)
    }

    /// Reports a worker to the head, which may send tasks to it from now on.
    pub(super) fn report_up(&mut self, worker: u32, replaces: bool) {
        let Some(process) = &self.workers[worker as usize] else {
            return;
        };
        let pid = process.pid;
        debug!(rank = self.number(worker), pid, replaces, "worker up");
        if self.router.is_unknown_to_head(worker) {
            self.report_seed(worker);
        }
        let replaces = self.router.introduce(worker, replaces);
        let message = if replaces {
            ToHead::WorkerReplaced { worker, pid }
        } else {
            ToHead::WorkerUp { worker, pid }
        };
        self.report(&message);
    }

    /// Handles signals: a child has ended, or the agent has been asked to end.
    pub(super) fn on_signals(&mut self) {
        let mut buffer = [0u8; 256];
        while matches!(self.signals.read(&mut buffer), Ok(n) if n > 0) {}
        // Handle one child after another. All workers are checked only if the next child is unknown, for
        // example a child that a package started.
        while let Some(pid) = platform::process::peek_any_exit() {
            let ours = |process: &Option<Process>| process.as_ref().is_some_and(|p| p.pid == pid);
            match self.workers.iter().position(ours) {
                Some(worker) => self.on_exit(worker as u32),
                None if self.guard.reap(pid) || self.reap_relay(pid) || self.orphans.reap(pid) => {}
                None => {
                    self.check_all();
                    break;
                }
            }
        }
        self.report_more_orphans();
        if self.asked_to_end.load(Ordering::Relaxed) {
            self.end();
        }
    }

    fn check_all(&mut self) {
        for worker in 0..self.workers.len() as u32 {
            let ended = match &self.workers[worker as usize] {
                Some(process) => platform::process::peek_exit(process.pid),
                None => false,
            };
            if ended {
                self.on_exit(worker);
            }
        }
        let workers = &self.workers;
        self.orphans
            .reap_all(|pid| workers.iter().flatten().any(|process| process.pid == pid));
    }

    /// Removes a temporary directory. Returns whether the directory does not exist any more. A failure is
    /// retried later, because processes that were killed with the worker may still be writing to it.
    pub(super) fn remove(&mut self, tempdir: String) -> bool {
        let removed = std::fs::remove_dir_all(&tempdir);
        let left = removed.is_err_and(|error| error.kind() != io::ErrorKind::NotFound);
        if left {
            self.unremoved.push(tempdir);
        }
        !left
    }

    pub(super) fn remove_again(&mut self) {
        for tempdir in std::mem::take(&mut self.unremoved) {
            self.remove(tempdir);
        }
    }

    fn on_exit(&mut self, worker: u32) {
        self.remove_again();
        // An answer that was complete before the end still counts, and so does final output.
        for _ in 0..AGENT_READS {
            if !self.read_some_of_worker(worker) {
                break;
            }
        }
        self.read_output(worker);
        let Some(mut process) = self.workers[worker as usize].take() else {
            return;
        };
        if let Some(file) = &mut self.outfile {
            let _ = process.lines.flush(file);
        }
        // Kill the group before the process is reaped, while its pid cannot be reused. This also ends
        // processes that the worker started and did not wait for.
        process.kill_group();
        self.guard
            .ended(worker, process.tempdir.as_deref().unwrap_or_default());
        let exit = platform::process::reap(process.pid);
        self.report_orphans(process.pid);
        let registry = self.poll.registry();
        for fd in [process.channel.as_raw_fd(), process.output.as_raw_fd()] {
            let _ = registry.deregister(&mut SourceFd(&fd));
        }
        if let Some(tempdir) = process.tempdir.take() {
            // A worker that exits normally has already removed its directory.
            if self.remove(tempdir) {
                self.guard.cleared(worker);
            }
        }
        let failure = WorkerFailure {
            pid: process.pid,
            exit,
            tail: process.tail.text(),
            oom: process.was_killed_by_others(exit) && self.memory.explains_kill(),
            ..WorkerFailure::default()
        };
        self.lost(worker, failure);
    }

    /// Handles the failure of a worker, which has ended or could not be created.
    pub(super) fn lost(&mut self, worker: u32, mut failure: WorkerFailure) {
        self.arriving[worker as usize].drop_parts();
        let ending = self.router.exited(worker, !self.ending, self.now());
        let (rank, pid, exit) = (self.number(worker), failure.pid, failure.exit);
        info!(rank, pid, %exit, oom = failure.oom, ?ending, "worker ended");
        match ending {
            Ending::Stopped { timed_out } => {
                let message = ToHead::WorkerStopped { worker, timed_out };
                match timed_out {
                    true => self.report_last(&message),
                    false => self.report(&message),
                }
            }
            Ending::Replace => self.to_make.push_back((worker, true)),
            Ending::Waits => {}
            Ending::Lost { replaced, setback } => {
                failure.memory_available =
                    platform::memory::host_memory().map_or(0, |memory| memory.1);
                failure.setback = setback;
                self.report(&ToHead::WorkerFailed {
                    worker,
                    failure,
                    replaced,
                });
                if replaced {
                    self.to_make.push_back((worker, true));
                }
            }
        }
    }
}
