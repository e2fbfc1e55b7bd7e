//! Takes the answers that agents have kept while they had no head.

use super::client::Hub;
use super::core::Core;
use crate::protocol::body::Body;
use crate::protocol::control::ToAgent;
use crate::protocol::frame::{ABORT, LAST};
use crate::protocol::ids::TaskId;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::time::Duration;

/// The first number of a request for an answer. Those for set-up calls are smaller.
pub const FIRST_KEPT: u64 = 1 << 62;

/// An answer that an agent has kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The index of the agent's host.
    pub agent: usize,
    /// The number of the answer there.
    pub number: u64,
    /// The task that was answered.
    pub task: TaskId,
    /// When the task ended, in milliseconds of the host's clock.
    pub ended: u64,
}

/// The question for kept answers, and for one of them.
#[derive(Debug, Default)]
pub struct KeptQuestion {
    /// Agents that have not listed all of their answers.
    waiting: BTreeSet<usize>,
    listed: Vec<Kept>,
    /// The last request for an answer: its agent, and its number.
    asked: (usize, u64),
    body: Body,
    /// The answer has arrived as a whole, or is not there.
    there: Option<bool>,
}

impl KeptQuestion {
    pub fn list(&mut self, agent: usize, answers: &[(u64, TaskId, u64)], last: bool) {
        if !self.waiting.contains(&agent) {
            return;
        }
        let of = |&(number, task, ended): &(u64, TaskId, u64)| Kept {
            agent,
            number,
            task,
            ended,
        };
        self.listed.extend(answers.iter().map(of));
        if last {
            self.waiting.remove(&agent);
        }
    }

    pub fn receive(&mut self, request: u64, flags: u8, bytes: &Bytes) {
        if self.asked.1 != request || self.there.is_some() {
            return;
        }
        self.body.push(bytes.clone());
        if flags & LAST != 0 {
            self.there = Some(flags & ABORT == 0);
        }
    }
}

impl Hub {
    /// Asks all agents which answers they have kept.
    pub fn ask_kept(&mut self) {
        let mut core = self.core();
        core.took_over = true;
        core.kept.listed.clear();
        core.kept.waiting.clear();
        for agent in 0..core.conns.len() {
            if core.is_attached(agent)
                && core
                    .scheduler
                    .send_control(agent, &ToAgent::KeptAnswers)
                    .is_ok()
            {
                core.kept.waiting.insert(agent);
            }
        }
        core.pump();
    }

    /// The answers that agents have kept, in the order in which they ended; waits up to `max_wait` for the agents.
    pub fn kept(&self, max_wait: Duration) -> Option<Vec<Kept>> {
        let listed = |core: &mut Core| {
            let waiting: BTreeSet<usize> = core.kept.waiting.iter().copied().collect();
            let all = waiting.into_iter().all(|agent| !core.is_attached(agent));
            (all || core.inbox.closed).then(|| core.kept.listed.clone())
        };
        let mut listed = self.inner.shared_core.wait(max_wait, listed)?;
        listed.sort_by_key(|kept| (kept.ended, kept.agent, kept.number));
        Some(listed)
    }

    /// Asks an agent for an answer.
    pub fn ask_answer(&mut self, agent: usize, number: u64) {
        let mut core = self.core();
        let request = core.kept.asked.1.max(FIRST_KEPT) + 1;
        core.kept.asked = (agent, request);
        core.kept.body = Body::default();
        core.kept.there = None;
        let message = ToAgent::KeptAnswer { number, request };
        let _ = core.scheduler.send_control(agent, &message);
        core.pump();
    }

    /// The answer that was asked for: `None` if it has not arrived after `max_wait`, and `Some(None)` if it is not there
    /// any more.
    pub fn answer(&self, max_wait: Duration) -> Option<Option<Body>> {
        let arrived = |core: &mut Core| match core.kept.there {
            Some(true) => Some(Some(core.kept.body.clone())),
            Some(false) => Some(None),
            None => {
                let lost = !core.is_attached(core.kept.asked.0) || core.inbox.closed;
                lost.then_some(None)
            }
        };
        self.inner.shared_core.wait(max_wait, arrived)
    }

    /// Lets an agent drop an answer, which has been read.
    pub fn drop_answer(&mut self, agent: usize, number: u64) {
        let mut core = self.core();
        core.kept.body = Body::default();
        core.kept.there = None;
        let message = ToAgent::DropAnswer { number };
        let _ = core.scheduler.send_control(agent, &message);
        core.pump();
    }
}
