//! How an agent makes its workers, and what it does when one ends.

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

/// Workers made between two looks at the streams.
const MAKE_AT_ONCE: usize = 8;

impl Agent {
    /// Makes the next few workers. `Some` in a forked one.
    pub(super) fn make_some(&mut self) -> io::Result<Option<Channel>> {
        for _ in 0..MAKE_AT_ONCE {
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
                    // A separate process is told at once what to load.
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
            log::start_or_say(log::Role::Worker(self.start.rank(worker)));
            // It would count for the worker's memory limit.
            reserve::release();
            platform::process::renice(self.start.renice);
        }
        Ok(made)
    }

    /// The head may send it tasks.
    pub(super) fn report_up(&mut self, worker: u32, replaces: bool) {
        let Some(process) = &self.workers[worker as usize] else {
            return;
        };
        let pid = process.pid;
        debug!(rank = self.number(worker), pid, replaces, "worker up");
        let message = if replaces {
            ToHead::WorkerReplaced { worker, pid }
        } else {
            ToHead::WorkerUp { worker, pid }
        };
        self.report(&message);
    }

    /// A child ended, or somebody wants the agent to.
    pub(super) fn on_signals(&mut self) {
        let mut buffer = [0u8; 256];
        while matches!(self.signals.read(&mut buffer), Ok(n) if n > 0) {}
        // One after another; all are looked at only if the next to be waited for is not ours, as a
        // child that a package started may be.
        while let Some(pid) = platform::process::peek_any_exit() {
            let ours = |process: &Option<Process>| process.as_ref().is_some_and(|p| p.pid == pid);
            match self.workers.iter().position(ours) {
                Some(worker) => self.on_exit(worker as u32),
                None if self.guard.reap(pid) || self.orphans.reap(pid) => {}
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

    /// Removes a temporary directory. What was killed with its worker may still be writing to it: then it is
    /// tried again later. Returns whether it is gone.
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
        // An answer that was whole before the end still counts, and so does final output.
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
        // Before the process is reaped, so that its number cannot be another's. This also ends
        // what it started and did not wait for.
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
            // Already gone if it ended in good order.
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

    /// A worker has ended, or could not be made.
    pub(super) fn lost(&mut self, worker: u32, mut failure: WorkerFailure) {
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
