//! What an agent says of itself and its workers for a bug report.

use super::Agent;
use crate::platform::{log, memory};
use crate::protocol::control::{Facts, ToHead};

/// Workers in one message, at most: it has to fit into a frame.
const AT_ONCE: usize = 64;

impl Agent {
    /// Tells the head the state of this agent and of its workers.
    pub(super) fn dump(&mut self, question: u64) {
        let mut all = vec![(None, self.facts())];
        for worker in 0..self.workers.len() as u32 {
            all.push((Some(worker), self.worker_facts(worker)));
        }
        let messages = all.chunks(AT_ONCE);
        let count = messages.len();
        for (at, of) in messages.enumerate() {
            self.tell(&ToHead::Dump {
                question,
                of: of.to_vec(),
                last: at + 1 == count,
            });
        }
    }

    fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        facts.add("agent_pid", std::process::id());
        facts.add_seconds("up_for", self.now());
        facts.add_debug("mode", self.start.mode);
        facts.add("workers", self.start.workers);
        facts.add("ending", self.ending);
        facts.add("workers_to_make", self.to_make.len());
        facts.add("bytes_to_head", self.to_head.len());
        facts.add("head_blocked", self.head_blocked);
        facts.add("bytes_from_head", self.received.len());
        facts.add("shared_memory", self.relay.book.shares);
        self.relay.facts(&mut facts);
        facts.add_seconds("usual_wait", self.usual_wait);
        if let Some((total, available)) = memory::host_memory() {
            facts.add("memory_total", total);
            facts.add("memory_available", available);
        }
        facts.add_some("log", log::path().map(|path| path.display()));
        facts
    }

    fn worker_facts(&self, worker: u32) -> Facts {
        let mut facts = Facts::default();
        self.relay.worker_facts(worker, self.now(), &mut facts);
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
