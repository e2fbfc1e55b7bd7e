//! The memory survey: how much memory the workers of an agent use.

use crate::platform::memory::line_bytes;
use crate::protocol::control::{ToHead, Usage};
use std::fs;

/// Maximum number of workers in one message.
const MAX_WORKERS: usize = 1000;

/// A survey in progress, which reads the memory use of one worker after the other.
#[derive(Debug)]
pub struct UsageSurvey {
    question: u64,
    next: u32,
    end: u32,
    found: Vec<(u32, Usage)>,
}

impl UsageSurvey {
    /// Starts a survey of `end` workers.
    pub fn new(question: u64, end: u32) -> UsageSurvey {
        UsageSurvey {
            question,
            next: 0,
            end,
            found: Vec::new(),
        }
    }

    /// Reads the memory use of the next worker. Returns a message to the head if one is due. `pid`: the pid of a
    /// worker, if the worker exists.
    pub fn next(&mut self, pid: impl Fn(u32) -> Option<u32>) -> Option<ToHead> {
        if self.next < self.end {
            let usage = pid(self.next).and_then(of_process);
            self.found.extend(usage.map(|usage| (self.next, usage)));
            self.next += 1;
        }
        let last = self.next == self.end;
        (last || self.found.len() == MAX_WORKERS).then(|| ToHead::Usage {
            question: self.question,
            workers: std::mem::take(&mut self.found),
            last,
        })
    }
}

/// The memory use of a process, if the system has the files that report it.
fn of_process(pid: u32) -> Option<Usage> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
    let status = || fs::read_to_string(format!("/proc/{pid}/status"));
    let text = rollup.or_else(|_| status()).ok()?;
    let usage = Usage {
        resident: line_bytes(&text, "Rss:").or_else(|| line_bytes(&text, "VmRSS:"))?,
        proportional: line_bytes(&text, "Pss:").unwrap_or(0),
    };
    Some(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_their_complete_names() {
        let text = "5-7 rollup\nRss:      2048 kB\nPss:  10 kB\nPss_Dirty: 7 kB\nSwap: x kB\n";
        assert_eq!(line_bytes(text, "Rss:"), Some(2048 * 1024));
        assert_eq!(line_bytes(text, "Pss:"), Some(10 * 1024));
        assert_eq!(line_bytes(text, "VmRSS:"), None);
        assert_eq!(line_bytes(text, "Swap:"), None);
    }

    #[test]
    fn this_process_uses_memory_and_an_ended_process_none() {
        let usage = of_process(std::process::id()).unwrap();
        assert!(usage.resident > 100_000 && usage.proportional <= usage.resident);
        assert_eq!(of_process(u32::MAX), None);
    }

    #[test]
    fn all_workers_are_reported_in_several_messages_of_which_the_last_is_marked() {
        let mut usage_survey = UsageSurvey::new(7, 2_500);
        let mut reported = Vec::new();
        loop {
            let this = std::process::id();
            // Every fifth worker does not exist.
            let message = usage_survey.next(|worker| (worker % 5 > 0).then_some(this));
            let Some(ToHead::Usage {
                workers,
                last,
                question: 7,
            }) = message
            else {
                continue;
            };
            reported.extend(workers.iter().map(|of| of.0));
            if last {
                break;
            }
            assert_eq!(workers.len(), MAX_WORKERS);
        }
        let existing: Vec<u32> = (0..2_500).filter(|worker| worker % 5 > 0).collect();
        assert!(reported == existing || reported.is_empty());
        let none = UsageSurvey::new(7, 0).next(|_| None);
        assert!(matches!(none, Some(ToHead::Usage { last: true, .. })));
    }
}
