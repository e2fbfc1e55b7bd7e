//! The scheduler's state for a bug report.

use super::Scheduler;
use super::task::{Current, Phase, Task};
use super::worker::WorkerState;
use crate::protocol::control::Facts;
use crate::protocol::ids::{CALLS, JobId, Rank};

fn job(job: JobId) -> String {
    match job {
        CALLS => "call".into(),
        number => number.to_string(),
    }
}

fn phase(phase: &Phase) -> &'static str {
    match phase {
        Phase::Sending { first: true } => "to be sent",
        Phase::Sending { first: false } => "being sent",
        Phase::Running => "sent",
    }
}

fn bytes(task: &Task) -> usize {
    task.chunks.iter().map(|chunk| chunk.bytes.len()).sum()
}

impl Scheduler {
    /// Adds the facts about the cluster as a whole.
    pub fn facts(&self, facts: &mut Facts) {
        self.flow.facts(facts);
        facts.add("undelivered_notes", self.notes.len());
        self.calls.facts(facts);
    }

    /// Adds the facts about a host's agent.
    pub fn agent_facts(&self, at: usize, facts: &mut Facts) {
        if let Some(agent) = self.agents.get(at) {
            agent.out.facts(facts);
            facts.add("consecutive_worker_failures", agent.failures);
            facts.add("draining", agent.drain.is_some());
            self.flow.host_facts(at, facts);
        }
    }

    /// Adds the facts about a worker.
    pub fn worker_facts(&self, rank: Rank, facts: &mut Facts) {
        let Some(worker) = self.workers.get(rank as usize) else {
            return;
        };
        let state = match &worker.state {
            WorkerState::Starting => "starting",
            WorkerState::Up if worker.current.is_some() => "busy",
            WorkerState::Up => "idle",
            WorkerState::Terminated(termination) if termination.is_tried_again() => {
                "awaiting restart"
            }
            WorkerState::Terminated(_) => "terminated",
        };
        facts.add("state", state);
        facts.add("queue", worker.queue.len());
        facts.add("queue_bytes", worker.queue.iter().map(bytes).sum::<usize>());
        if let Some(current) = &worker.current {
            self.current_facts(current, facts);
            self.flow.result_facts(rank, facts);
        }
        if let Some(next) = &worker.next {
            facts.add("prefetched_task", next.task.id);
            facts.add("prefetched_message", phase(&next.phase));
            facts.add("prefetched_cancelled", next.cancelled);
            facts.add("prefetched_revoked", next.revoked);
        }
        facts.add_some(
            "awaiting_retry_decision",
            worker.awaiting_retry.map(|(task, _)| task),
        );
        facts.add("send_window", worker.window);
        facts.add("awaiting_restore", worker.away);
        facts.add("draining", worker.draining.is_some());
        let stats = &worker.stats;
        facts.add("tasks_done", stats.tasks);
        facts.add("worker_failures", stats.failures);
        facts.add("bytes_in", stats.bytes_in);
        facts.add("bytes_out", stats.bytes_out);
    }

    fn current_facts(&self, current: &Current, facts: &mut Facts) {
        facts.add("task", current.task.id);
        facts.add("job", job(current.task.job));
        facts.add("message", phase(&current.phase));
        facts.add("message_bytes_to_send", bytes(&current.task));
        facts.add("cancelled", current.cancelled);
        facts.add_seconds("task_for", self.now.saturating_sub(current.times.assigned));
    }
}
