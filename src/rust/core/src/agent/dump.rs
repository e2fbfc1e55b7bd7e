//! The state of an agent and its workers, for a bug report.

use super::Agent;
use crate::platform::{log, memory};
use crate::protocol::control::{Facts, ToHead};

/// Maximum number of workers in one message, which then fits into a frame.
const MAX_WORKERS: usize = 16;

impl Agent {
    /// Reports the state of this agent and of its workers to the head.
    pub(super) fn dump(&mut self, question: u64) {
        self.report(&ToHead::Dump {
            question,
            of: vec![(None, self.facts())],
            last: self.workers.is_empty(),
        });
        let workers: Vec<u32> = (0..self.workers.len() as u32).collect();
        for some in workers.chunks(MAX_WORKERS) {
            let facts = |&worker: &u32| (Some(worker), self.worker_facts(worker));
            let message = ToHead::Dump {
                question,
                of: some.iter().map(facts).collect(),
                last: some.last() == workers.last(),
            };
            self.report(&message);
        }
    }

    fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        facts.add("agent_pid", std::process::id());
        facts.add_seconds("uptime", self.now());
        facts.add_debug("start_method", self.start.mode);
        facts.add("workers", self.start.workers);
        facts.add("ending", self.ending);
        facts.add("workers_to_start", self.to_make.len());
        facts.add("bytes_to_head", self.to_head.len());
        facts.add("head_blocked", self.head_blocked);
        facts.add("bytes_from_head", self.received.len());
        facts.add("shared_memory", self.router.worker_table.shared_answers);
        self.router.facts(&mut facts);
        facts.add_seconds("average_wait", self.average_wait);
        if let Some((total, available)) = memory::host_memory() {
            facts.add("memory_total", total);
            facts.add("memory_available", available);
        }
        facts.add_some("log", log::path().map(|path| path.display()));
        facts
    }

    fn worker_facts(&self, worker: u32) -> Facts {
        let mut facts = Facts::default();
        self.router.worker_facts(worker, self.now(), &mut facts);
        if let Some(process) = &self.workers[worker as usize] {
            facts.add("pid", process.pid);
            facts.add("bytes_to_worker", process.outgoing.len());
            facts.add("bytes_from_worker", process.received.len());
            facts.add("write_blocked", process.write_blocked);
            facts.add("interrupt_due", process.interrupt);
            facts.add("killed", process.killed.get());
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::control;

    #[test]
    fn a_message_with_the_maximum_of_workers_and_facts_fits_into_a_frame() {
        // A busy worker has no more facts, and none with longer names or values.
        let mut facts = Facts::default();
        for _ in 0..32 {
            facts.add("unacknowledged_failures_of_it", u64::MAX);
        }
        let of = (0..MAX_WORKERS as u32).map(|worker| (Some(worker), facts.clone()));
        let message = ToHead::Dump {
            question: 1,
            of: of.collect(),
            last: true,
        };
        control::encode(&message).unwrap();
    }
}
