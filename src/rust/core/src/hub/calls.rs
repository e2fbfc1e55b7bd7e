//! What is known of calls for whoever is free, and of what R is to do about them.

use crate::scheduler::{Gone, Outcome, Rank, TaskId};
use std::collections::HashMap;
use std::sync::Arc;

/// Has R's event loop look at the calls, from any thread.
pub type Waker = Box<dyn Fn() + Send>;

/// How a call has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallEnd {
    /// The worker that had it, or one that might have.
    pub rank: Rank,
    pub outcome: Outcome,
}

#[derive(Debug, Default)]
struct Call {
    end: Option<CallEnd>,
    /// R wants to know as soon as it has ended.
    watched: bool,
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
        self.known.entry(task).or_default().end = None;
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
        let ended = self.known.get(&task).is_none_or(|call| call.end.is_some());
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
