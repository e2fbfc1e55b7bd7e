//! What memory the workers of an agent take.

use crate::platform::memory::line_bytes;
use crate::protocol::control::{ToHead, Usage};
use std::fs;

/// Workers in one message, at most.
const WORKERS_AT_ONCE: usize = 1000;

/// Workers that are looked at one after the other.
#[derive(Debug)]
pub struct MemorySurvey {
    question: u64,
    next: u32,
    end: u32,
    found: Vec<(u32, Usage)>,
}

impl MemorySurvey {
    /// Of so many workers.
    pub fn new(question: u64, end: u32) -> MemorySurvey {
        MemorySurvey {
            question,
            next: 0,
            end,
            found: Vec::new(),
        }
    }

    /// Looks at the next worker. Returns what is to be told, if it is time for that. `pid`: of a
    /// worker, if it is there.
    pub fn next(&mut self, pid: impl Fn(u32) -> Option<u32>) -> Option<ToHead> {
        if self.next < self.end {
            let usage = pid(self.next).and_then(of_process);
            self.found.extend(usage.map(|usage| (self.next, usage)));
            self.next += 1;
        }
        let last = self.next == self.end;
        (last || self.found.len() == WORKERS_AT_ONCE).then(|| ToHead::Usage {
            question: self.question,
            workers: std::mem::take(&mut self.found),
            last,
        })
    }
}

/// What the system says of a process, where it has files that do.
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
    fn lines_are_found_by_their_whole_names() {
        let text = "5-7 rollup\nRss:      2048 kB\nPss:  10 kB\nPss_Dirty: 7 kB\nSwap: x kB\n";
        assert_eq!(line_bytes(text, "Rss:"), Some(2048 * 1024));
        assert_eq!(line_bytes(text, "Pss:"), Some(10 * 1024));
        assert_eq!(line_bytes(text, "VmRSS:"), None);
        assert_eq!(line_bytes(text, "Swap:"), None);
    }

    #[test]
    fn this_process_takes_memory_and_one_that_is_terminated_none() {
        let usage = of_process(std::process::id()).unwrap();
        assert!(usage.resident > 100_000 && usage.proportional <= usage.resident);
        assert_eq!(of_process(u32::MAX), None);
    }

    #[test]
    fn all_are_told_in_pieces_and_the_last_piece_says_so() {
        let mut memory_survey = MemorySurvey::new(7, 2_500);
        let mut told = Vec::new();
        loop {
            let this = std::process::id();
            // Every fifth is not there.
            let message = memory_survey.next(|worker| (worker % 5 > 0).then_some(this));
            let Some(ToHead::Usage {
                workers,
                last,
                question: 7,
            }) = message
            else {
                continue;
            };
            told.extend(workers.iter().map(|of| of.0));
            if last {
                break;
            }
            assert_eq!(workers.len(), WORKERS_AT_ONCE);
        }
        let there: Vec<u32> = (0..2_500).filter(|worker| worker % 5 > 0).collect();
        assert!(told == there || told.is_empty());
        let none = MemorySurvey::new(7, 0).next(|_| None);
        assert!(matches!(none, Some(ToHead::Usage { last: true, .. })));
    }
}
