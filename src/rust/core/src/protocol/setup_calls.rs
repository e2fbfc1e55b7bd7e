//! The set-up calls of one worker, and which of them are still needed to restore its state.
//!
//! The agent and the head each keep a log: the agent in memory, for workers that it replaces; the head in a file, for
//! hosts that are lost. Each log stores a call in its own form (`C`). Both logs share the rule in this module that
//! decides which calls a fresh worker must be sent.
//!
//! A call either sets one variable, whose name is represented by a number, or does something else (name 0). A call that
//! sets a variable supersedes the call that set the same variable before, unless a call of name 0 lies between, because
//! that call may have used the value.

use std::hash::{DefaultHasher, Hash, Hasher};

/// How many calls back the earlier value of a variable is searched for. The bound limits the cost of a call. A call
/// that is not found is sent once more, which changes nothing.
const MAX_LOOK_BACK: usize = 1_000;

/// Returns a number for the name of the variable that a message sets; 0 for no name.
pub fn name_of(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    if name.is_empty() {
        0
    } else {
        hasher.finish().max(1)
    }
}

/// The calls that restore the state of one worker, in the order in which the worker ran them.
#[derive(Debug)]
pub struct SetupCalls<C> {
    calls: Vec<(u64, C)>,
}

impl<C> Default for SetupCalls<C> {
    fn default() -> SetupCalls<C> {
        SetupCalls { calls: Vec::new() }
    }
}

impl<C> SetupCalls<C> {
    /// Adds a call that the worker has completed. `name`: the number of the variable that the call sets, or 0. Returns
    /// the superseded call.
    pub fn record(&mut self, name: u64, call: C) -> Option<C> {
        let recent = self.calls.iter().enumerate().rev().take(MAX_LOOK_BACK);
        let mut settings = recent.take_while(|(_, (earlier, _))| name != 0 && *earlier != 0);
        let same = settings.find(|(_, (earlier, _))| *earlier == name);
        let superseded = same.map(|(at, _)| at).map(|at| self.calls.remove(at).1);
        self.calls.push((name, call));
        superseded
    }

    /// The calls in order, each with its name.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &C)> {
        self.calls.iter().map(|(name, call)| (*name, call))
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Removes all calls and returns them.
    pub fn take(&mut self) -> impl Iterator<Item = C> {
        std::mem::take(&mut self.calls)
            .into_iter()
            .map(|(_, call)| call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn recorded(names: &[u64]) -> (Vec<usize>, Vec<usize>) {
        let mut calls = SetupCalls::default();
        let superseded = names.iter().enumerate();
        let superseded = superseded.filter_map(|(at, &name)| calls.record(name, at));
        let superseded = superseded.collect();
        (calls.iter().map(|(_, &at)| at).collect(), superseded)
    }

    #[test]
    fn a_variable_that_is_set_again_supersedes_its_earlier_value() {
        assert_eq!(recorded(&[7, 8, 7, 7]), (vec![1, 3], vec![0, 2]));
    }

    #[test]
    fn a_value_that_another_call_may_have_used_is_kept() {
        assert_eq!(recorded(&[7, 0, 7, 8, 7]), (vec![0, 1, 3, 4], vec![2]));
        assert_eq!(recorded(&[0, 0]), (vec![0, 1], vec![]));
    }

    #[test]
    fn take_removes_all_calls() {
        let mut calls = SetupCalls::default();
        calls.record(0, "a");
        calls.record(1, "b");
        assert_eq!(calls.take().collect::<Vec<_>>(), ["a", "b"]);
        assert!(calls.is_empty());
        assert_eq!(calls.record(1, "c"), None);
        assert_eq!(calls.len(), 1);
    }

    type Variables = HashMap<u64, usize>;

    /// Runs calls on a worker whose calls of name 0 read all variables. Returns the final values, and the values that
    /// each call of name 0 has read.
    fn run(calls: impl Iterator<Item = (u64, usize)>) -> (Variables, Vec<Vec<(u64, usize)>>) {
        let mut variables = Variables::new();
        let mut seen = Vec::new();
        for (name, value) in calls {
            if name == 0 {
                let mut now: Vec<_> = variables
                    .iter()
                    .map(|(&name, &value)| (name, value))
                    .collect();
                now.sort_unstable();
                seen.push(now);
            } else {
                variables.insert(name, value);
            }
        }
        (variables, seen)
    }

    proptest! {
        #[test]
        fn the_remaining_calls_restore_the_same_state(
            names in prop::collection::vec(0u64..5, 0..60),
        ) {
            let mut calls = SetupCalls::default();
            for (value, &name) in names.iter().enumerate() {
                calls.record(name, value);
            }
            let all = names.iter().copied().enumerate().map(|(value, name)| (name, value));
            prop_assert_eq!(run(calls.iter().map(|(name, &value)| (name, value))), run(all));
            // Each variable is set at most once between two calls of name 0.
            let recorded: Vec<u64> = calls.iter().map(|(name, _)| name).collect();
            for part in recorded.split(|&name| name == 0) {
                let mut once = part.to_vec();
                once.sort_unstable();
                once.dedup();
                prop_assert_eq!(once.len(), part.len());
            }
        }
    }
}
