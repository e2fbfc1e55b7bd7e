//! Failures as values: lists with typed fields and a class, by which R recognizes them (`isFailure()` in
//! R/boundary.R), and from which R makes classed conditions (R/conditions.R).

use extendr_api::prelude::*;
use rustcluster_core::head::scheduler::events::Termination;
use rustcluster_core::platform::exit::Exit;
use rustcluster_core::protocol::control::{Setback, WorkerFailure};
use rustcluster_core::protocol::ids::Rank;
use std::borrow::Cow;

/// The class of a failure in R.
const CLASS: &str = "rustcluster_rust_failure";

/// A field of a failure. It contains no R object, because failures are made while the hub is in use, when R may
/// run no code.
#[derive(Clone, Debug)]
pub enum Value {
    /// `TRUE` or `FALSE`.
    Flag(bool),
    /// An integer; `NA` if it is unknown.
    Integer(Option<i32>),
    /// A double.
    Number(f64),
    /// A string.
    Text(String),
    /// Indices of elements, from 1.
    Integers(Vec<i32>),
    /// A list of failures.
    Failures(Vec<Failure>),
}

impl From<bool> for Value {
    fn from(flag: bool) -> Value {
        Value::Flag(flag)
    }
}

impl From<i32> for Value {
    fn from(number: i32) -> Value {
        Value::Integer(Some(number))
    }
}

impl From<Option<i32>> for Value {
    fn from(number: Option<i32>) -> Value {
        Value::Integer(number)
    }
}

/// Ranks and process ids.
impl From<u32> for Value {
    fn from(number: u32) -> Value {
        i32::try_from(number).map_or(Value::Number(f64::from(number)), Value::from)
    }
}

/// Positions.
impl From<usize> for Value {
    fn from(number: usize) -> Value {
        i32::try_from(number).map_or(Value::Number(number as f64), Value::from)
    }
}

/// Numbers of tasks and jobs, and bytes. R always gets a double.
impl From<u64> for Value {
    fn from(number: u64) -> Value {
        Value::Number(number as f64)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Value {
        Value::Number(number)
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

impl From<&String> for Value {
    fn from(text: &String) -> Value {
        Value::Text(text.clone())
    }
}

impl From<Cow<'_, str>> for Value {
    fn from(text: Cow<'_, str>) -> Value {
        Value::Text(text.into_owned())
    }
}

impl From<Vec<i32>> for Value {
    fn from(numbers: Vec<i32>) -> Value {
        Value::Integers(numbers)
    }
}

impl From<Vec<Failure>> for Value {
    fn from(failures: Vec<Failure>) -> Value {
        Value::Failures(failures)
    }
}

impl From<&[Failure]> for Value {
    fn from(failures: &[Failure]) -> Value {
        Value::Failures(failures.to_vec())
    }
}

impl From<Value> for Robj {
    fn from(value: Value) -> Robj {
        match value {
            Value::Flag(flag) => flag.into(),
            Value::Integer(number) => number.into(),
            Value::Number(number) => number.into(),
            // R's strings cannot contain NUL, but the output of a worker may.
            Value::Text(text) => text.replace('\0', "").into(),
            Value::Integers(numbers) => numbers.into(),
            Value::Failures(failures) => {
                List::from_values(failures.into_iter().map(Robj::from)).into()
            }
        }
    }
}

/// A failure: the end of the condition's class, and the fields.
#[derive(Clone, Debug)]
pub struct Failure(Vec<(&'static str, Value)>);

impl Failure {
    pub fn new(kind: &str) -> Failure {
        Failure(vec![("kind", kind.into())])
    }

    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Failure {
        self.0.push((name, value.into()));
        self
    }

    /// Returns the failure for a worker that has terminated and that no other worker replaces. R counts ranks
    /// from 1.
    pub fn termination(rank: Rank, termination: &Termination) -> Failure {
        match termination {
            Termination::Worker(worker_failure) => {
                Failure::lost(rank, worker_failure, worker_failure.setback).with("replaced", false)
            }
            Termination::Host(reason) => Failure::new("host_failed")
                .with("rank", rank + 1)
                .with("reason", reason),
            Termination::Stopped => Failure::new("stopped").with("rank", rank + 1),
            Termination::JobEnded(reason) => Failure::new("job_ended")
                .with("rank", rank + 1)
                .with("reason", reason),
        }
    }

    /// Returns a worker failure. `now`: the reason why the worker is not replaced, if it is not.
    pub fn worker_failure(
        assigned: Rank,
        termination: &Termination,
        now: Option<&Termination>,
    ) -> Failure {
        match (termination, now) {
            (Termination::Worker(worker_failure), Some(Termination::Worker(last))) => {
                Failure::lost(assigned, worker_failure, last.setback).with("replaced", false)
            }
            (Termination::Worker(worker_failure), _) => {
                Failure::lost(assigned, worker_failure, Setback::default())
                    .with("replaced", now.is_none())
            }
            (termination, _) => Failure::termination(assigned, termination),
        }
    }

    /// Returns the failure for a lost worker. `last`: the setback (failed starts or restores) after which the
    /// worker counts as lost.
    pub fn lost(rank: Rank, worker_failure: &WorkerFailure, last: Setback) -> Failure {
        let setback = worker_failure.setback;
        let seconds = |milliseconds: u64| milliseconds as f64 / 1000.0;
        let reason = match worker_failure.pid {
            0 => "could not be started".to_owned(),
            _ => worker_failure.exit.to_string(),
        };
        let failure = Failure::new("worker_lost")
            .with("rank", rank + 1)
            .with("pid", worker_failure.pid)
            .with("reason", reason)
            .with("setbacks", setback.count)
            .with("restoring", setback.restoring)
            .with("stalled", seconds(setback.stalled))
            .with("retry", seconds(last.pause))
            .with("memory_available", worker_failure.memory_available)
            .with("oom", worker_failure.oom)
            .with("stderr", &worker_failure.tail);
        match worker_failure.exit {
            Exit::Status(status) => failure.with("status", status),
            Exit::Signal(signal) => failure.with("signal", signal),
            Exit::Unknown => failure,
        }
    }
}

impl From<Failure> for Robj {
    fn from(failure: Failure) -> Robj {
        let (names, values): (Vec<_>, Vec<_>) = failure.0.into_iter().unzip();
        let mut robj: Robj = List::from_values(values.into_iter().map(Robj::from)).into();
        // This cannot fail: there are as many names as values, and a list may have any class.
        let _ = robj.set_names(names);
        let _ = robj.set_class([CLASS]);
        robj
    }
}
