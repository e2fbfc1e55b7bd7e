//! The state of calls for the first free worker, and which of them need R's attention.

use super::progress_events::ProgressEvents;
use crate::head::scheduler::events::{Outcome, Termination};
use crate::protocol::ids::{Rank, TaskId};
use std::collections::HashMap;
use std::sync::Arc;

/// Wakes R's event loop to check the calls, from any thread.
pub type Waker = Box<dyn Fn() + Send>;

/// How a call has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallEnd {
    /// The worker that had the call, or one that might have had it.
    pub rank: Rank,
    /// The call's result, or why there is none.
    pub outcome: Outcome,
}

#[derive(Debug, Default)]
struct CallState {
    end: Option<CallEnd>,
    /// R wants to be notified as soon as the call has ended.
    notify: bool,
    progress_events: ProgressEvents,
}

/// See the module's documentation.
#[derive(Default)]
pub struct CallTable {
    known: HashMap<TaskId, CallState>,
    /// Calls that have ended and need R's attention.
    attention: Vec<TaskId>,
    waker: Option<Waker>,
    /// R has been woken and has not checked since.
    woken: bool,
}

impl CallTable {
    /// Expects the end of a call, which may be a retry.
    pub fn expect(&mut self, task: TaskId) {
        self.attention.retain(|&other| other != task);
        let call = self.known.entry(task).or_default();
        call.end = None;
        // Its worker failed.
        call.progress_events.drop_incomplete(task);
    }

    pub fn expects(&self, task: TaskId) -> bool {
        self.known.contains_key(&task)
    }

    /// R wants to know as soon as it has ended.
    pub fn notify(&mut self, task: TaskId) {
        if let Some(call) = self.known.get_mut(&task) {
            call.notify = true;
            if call.end.is_some() {
                self.alert(task);
            }
        }
    }

    pub fn is_awaited(&self, task: TaskId) -> bool {
        self.known.get(&task).is_some_and(|call| call.notify)
    }

    /// An expected call has ended.
    pub fn ended(&mut self, rank: Rank, task: TaskId, outcome: Outcome) {
        let Some(call) = self.known.get_mut(&task) else {
            return;
        };
        // A failed call may have to be retried.
        let alert = call.notify || !matches!(outcome, Outcome::Answer(_));
        call.end = Some(CallEnd { rank, outcome });
        if alert {
            self.alert(task);
        }
    }

    /// Records a part of a progress event.
    pub fn progress(&mut self, task: TaskId, flags: u8, bytes: &[u8]) {
        if let Some(call) = self.known.get_mut(&task) {
            call.progress_events.add(task, flags, bytes, usize::MAX);
        }
    }

    /// Takes all progress events of a call since the last time.
    pub fn take_progress_events(&mut self, task: TaskId) -> Vec<Vec<u8>> {
        let call = self.known.get_mut(&task);
        call.map(|call| call.progress_events.take())
            .unwrap_or_default()
    }

    fn alert(&mut self, task: TaskId) {
        if !self.attention.contains(&task) {
            self.attention.push(task);
        }
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.as_ref().filter(|_| !self.woken) {
            self.woken = true;
            waker();
        }
    }

    /// Sets the function that wakes R's event loop.
    pub fn wake_with(&mut self, waker: Waker) {
        self.waker = Some(waker);
        self.woken = false;
        if !self.attention.is_empty() {
            self.wake();
        }
    }

    /// The calls that need R's attention: each is returned until that is done.
    pub fn take_attention(&mut self) -> Vec<TaskId> {
        self.woken = false;
        self.attention.clone()
    }

    /// Whether this call or any other needs R's attention.
    pub fn any_for(&self, task: TaskId) -> bool {
        let progress = |call: &CallState| call.end.is_some() || !call.progress_events.is_empty();
        let ended = self.known.get(&task).is_none_or(progress);
        ended || !self.attention.is_empty()
    }

    pub fn end(&self, task: TaskId) -> Option<CallEnd> {
        self.known.get(&task)?.end.clone()
    }

    /// Forgets a call. Returns the bytes of its answer.
    pub fn forget(&mut self, task: TaskId) -> usize {
        self.attention.retain(|&other| other != task);
        match self.known.remove(&task).and_then(|call| call.end) {
            Some(CallEnd {
                outcome: Outcome::Answer(body),
                ..
            }) => body.len,
            _ => 0,
        }
    }

    /// The hub's thread ends.
    pub fn close(&mut self, termination: &Arc<Termination>) {
        let open = |(&task, call): (&TaskId, &CallState)| call.end.is_none().then_some(task);
        let open: Vec<TaskId> = self.known.iter().filter_map(open).collect();
        for task in open {
            self.ended(0, task, Outcome::Lost(termination.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::hub::progress_events::LIMIT;
    use crate::protocol::frame::{FIRST, LAST};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn body(bytes: &'static [u8]) -> Outcome {
        let mut body = crate::protocol::body::Body::default();
        body.chunks.push_back(bytes.into());
        body.len = bytes.len();
        Outcome::Answer(body)
    }

    #[test]
    fn r_is_woken_once_until_it_has_looked() {
        let mut calls = CallTable::default();
        let woken = Arc::new(AtomicUsize::new(0));
        let count = woken.clone();
        calls.wake_with(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        for task in 1..=4 {
            calls.expect(task);
        }
        calls.notify(2);
        calls.notify(3);
        // No notification was requested for this one.
        calls.ended(0, 1, body(b"1"));
        assert_eq!(woken.load(Ordering::Relaxed), 0);
        calls.ended(0, 2, body(b"2"));
        calls.ended(0, 3, body(b"3"));
        assert_eq!(woken.load(Ordering::Relaxed), 1);
        assert_eq!(calls.take_attention(), [2, 3]);
        assert_eq!(calls.forget(2), 1);
        // One that was lost is to be decided on, watched or not.
        calls.ended(0, 4, Outcome::Lost(Arc::new(Termination::Stopped)));
        assert_eq!(woken.load(Ordering::Relaxed), 2);
        assert_eq!(calls.take_attention(), [3, 4]);
        calls.expect(4);
        assert_eq!(calls.take_attention(), [3]);
    }

    #[test]
    fn progress_events_of_a_call_are_complete_and_bounded() {
        let mut calls = CallTable::default();
        calls.expect(1);
        calls.progress(1, FIRST, b"a");
        assert!(calls.take_progress_events(1).is_empty());
        calls.progress(1, LAST, b"b");
        calls.progress(1, FIRST | LAST, b"c");
        calls.progress(1, FIRST, b"lost with its worker");
        calls.expect(1);
        assert_eq!(
            calls.take_progress_events(1),
            [b"ab".to_vec(), b"c".to_vec()]
        );
        let large = vec![0; LIMIT / 2];
        for _ in 0..3 {
            calls.progress(1, FIRST | LAST, &large);
        }
        assert_eq!(calls.take_progress_events(1).len(), 2);
        calls.progress(1, FIRST | LAST, b"there is room again");
        assert_eq!(calls.take_progress_events(1).len(), 1);
        calls.progress(2, FIRST | LAST, b"of nobody");
        assert!(calls.take_progress_events(2).is_empty());
    }
}
