//! What is known of calls for whoever is free, and of what R is to do about them.

use crate::protocol::frame::{FIRST, LAST};
use crate::protocol::ids::{Rank, TaskId};
use crate::scheduler::{Gone, Outcome};
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of what a call has told that wait for R: what it tells beyond is left out.
const ASIDES_LIMIT: usize = 16 * 1024 * 1024;

/// Has R's event loop look at the calls, from any thread.
pub type Waker = Box<dyn Fn() + Send>;

/// How a call has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallEnd {
    /// The worker that had it, or one that might have.
    pub rank: Rank,
    /// The call's result, or why there is none.
    pub outcome: Outcome,
}

#[derive(Debug, Default)]
struct Call {
    end: Option<CallEnd>,
    /// R wants to know as soon as it has ended.
    watched: bool,
    /// What it has told that R has not taken, each in one piece; the last may not be complete.
    asides: Vec<Vec<u8>>,
    /// Bytes of these.
    told: usize,
    /// The last of these is complete.
    whole: bool,
}

impl Call {
    /// Its worker was lost before it had told all of it.
    fn drop_incomplete(&mut self) {
        if !self.whole {
            self.asides.pop();
            self.told = self.asides.iter().map(Vec::len).sum();
            self.whole = true;
        }
    }
}

/// See the module's documentation.
#[derive(Default)]
pub struct Calls {
    known: HashMap<TaskId, Call>,
    /// Those that have ended and that R is to do something about.
    attention: Vec<TaskId>,
    waker: Option<Waker>,
    /// R has been woken and has not looked since.
    woken: bool,
}

impl Calls {
    /// A call is on its way, perhaps once more.
    pub fn expect(&mut self, task: TaskId) {
        self.attention.retain(|&other| other != task);
        let call = self.known.entry(task).or_default();
        call.end = None;
        call.drop_incomplete();
    }

    pub fn expects(&self, task: TaskId) -> bool {
        self.known.contains_key(&task)
    }

    /// R wants to know as soon as it has ended.
    pub fn watch(&mut self, task: TaskId) {
        if let Some(call) = self.known.get_mut(&task) {
            call.watched = true;
            if call.end.is_some() {
                self.alert(task);
            }
        }
    }

    pub fn is_watched(&self, task: TaskId) -> bool {
        self.known.get(&task).is_some_and(|call| call.watched)
    }

    /// A call that is expected has ended.
    pub fn ended(&mut self, rank: Rank, task: TaskId, outcome: Outcome) {
        let Some(call) = self.known.get_mut(&task) else {
            return;
        };
        // What is lost may have to be tried again.
        let alert = call.watched || !matches!(outcome, Outcome::Answer(_));
        call.end = Some(CallEnd { rank, outcome });
        if alert {
            self.alert(task);
        }
    }

    /// A call has told something before its end.
    pub fn told(&mut self, task: TaskId, flags: u8, bytes: &[u8]) {
        let Some(call) = self.known.get_mut(&task) else {
            return;
        };
        if flags & FIRST != 0 {
            call.drop_incomplete();
            if call.told + bytes.len() > ASIDES_LIMIT {
                return;
            }
            call.asides.push(Vec::new());
            call.whole = false;
        }
        if let Some(aside) = call.asides.last_mut().filter(|_| !call.whole) {
            aside.extend_from_slice(bytes);
            call.told += bytes.len();
            call.whole = flags & LAST != 0;
        }
    }

    /// All that a call has told since this was last asked.
    pub fn take_asides(&mut self, task: TaskId) -> Vec<Vec<u8>> {
        let Some(call) = self.known.get_mut(&task) else {
            return Vec::new();
        };
        let rest = match call.whole {
            true => call.asides.len(),
            false => call.asides.len().saturating_sub(1),
        };
        let left = call.asides.split_off(rest);
        call.told = left.iter().map(Vec::len).sum();
        std::mem::replace(&mut call.asides, left)
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

    /// From now on R's event loop is woken so.
    pub fn wake_with(&mut self, waker: Waker) {
        self.waker = Some(waker);
        self.woken = false;
        if !self.attention.is_empty() {
            self.wake();
        }
    }

    /// The calls that R is to do something about: each is told until that is done.
    pub fn take_attention(&mut self) -> Vec<TaskId> {
        self.woken = false;
        self.attention.clone()
    }

    /// Whether R has something to do: about this call or any other.
    pub fn any_for(&self, task: TaskId) -> bool {
        let told = |call: &Call| call.end.is_some() || !call.asides.is_empty() && call.whole;
        let ended = self.known.get(&task).is_none_or(told);
        ended || !self.attention.is_empty()
    }

    pub fn end(&self, task: TaskId) -> Option<CallEnd> {
        self.known.get(&task)?.end.clone()
    }

    /// R knows how it ended, or does not want to. Returns the bytes of its answer.
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
    pub fn close(&mut self, gone: &Arc<Gone>) {
        let open = |(&task, call): (&TaskId, &Call)| call.end.is_none().then_some(task);
        let open: Vec<TaskId> = self.known.iter().filter_map(open).collect();
        for task in open {
            self.ended(0, task, Outcome::Lost(gone.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn body(bytes: &'static [u8]) -> Outcome {
        let mut body = crate::protocol::body::Body::default();
        body.chunks.push_back(bytes.into());
        body.len = bytes.len();
        Outcome::Answer(body)
    }

    #[test]
    fn r_is_woken_once_until_it_has_looked() {
        let mut calls = Calls::default();
        let woken = Arc::new(AtomicUsize::new(0));
        let count = woken.clone();
        calls.wake_with(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        for task in 1..=4 {
            calls.expect(task);
        }
        calls.watch(2);
        calls.watch(3);
        // Nobody wants to know of this one.
        calls.ended(0, 1, body(b"1"));
        assert_eq!(woken.load(Ordering::Relaxed), 0);
        calls.ended(0, 2, body(b"2"));
        calls.ended(0, 3, body(b"3"));
        assert_eq!(woken.load(Ordering::Relaxed), 1);
        assert_eq!(calls.take_attention(), [2, 3]);
        assert_eq!(calls.forget(2), 1);
        // One that was lost is to be decided on, watched or not.
        calls.ended(0, 4, Outcome::Lost(Arc::new(Gone::Stopped)));
        assert_eq!(woken.load(Ordering::Relaxed), 2);
        assert_eq!(calls.take_attention(), [3, 4]);
        calls.expect(4);
        assert_eq!(calls.take_attention(), [3]);
    }

    #[test]
    fn what_a_call_tells_is_whole_or_nothing_and_bounded() {
        let mut calls = Calls::default();
        calls.expect(1);
        calls.told(1, FIRST, b"a");
        assert!(calls.take_asides(1).is_empty());
        calls.told(1, LAST, b"b");
        calls.told(1, FIRST | LAST, b"c");
        calls.told(1, FIRST, b"lost with its worker");
        calls.expect(1);
        assert_eq!(calls.take_asides(1), [b"ab".to_vec(), b"c".to_vec()]);
        let large = vec![0; ASIDES_LIMIT / 2];
        for _ in 0..3 {
            calls.told(1, FIRST | LAST, &large);
        }
        assert_eq!(calls.take_asides(1).len(), 2);
        calls.told(1, FIRST | LAST, b"there is room again");
        assert_eq!(calls.take_asides(1).len(), 1);
        calls.told(2, FIRST | LAST, b"of nobody");
        assert!(calls.take_asides(2).is_empty());
    }
}
