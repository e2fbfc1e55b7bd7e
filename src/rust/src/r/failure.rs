//! Failures as values: a list with typed fields and a class of its own, by which R recognizes it
//! (`isFailure()` in R/boundary.R) and makes a classed condition of it (R/conditions.R).

use extendr_api::prelude::*;
use rustcluster_core::head::scheduler::events::Gone;
use rustcluster_core::platform::exit::Exit;
use rustcluster_core::protocol::control::{Loss, Setback};
use rustcluster_core::protocol::ids::Rank;
use std::borrow::Cow;

/// The class of a failure in R.
const CLASS: &str = "rustcluster_rust_failure";

/// A field of a failure. Nothing of R's: failures are made while the hub is in use, when R may run no code.
#[derive(Clone, Debug)]
pub enum Value {
    /// `TRUE` or `FALSE`.
    Flag(bool),
    /// An integer; `NA` if it is not known.
    Integer(Option<i32>),
    /// A double.
    Number(f64),
    /// A string.
    Text(String),
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

/// Ranks, processes.
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

/// Numbers of tasks and jobs, bytes: always a double.
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
            // R's strings hold no NUL; what a worker prints may.
            Value::Text(text) => text.replace('\0', "").into(),
            Value::Failures(failures) => {
                List::from_values(failures.into_iter().map(Robj::from)).into()
            }
        }
    }
}

/// What went wrong: the end of the condition's class, and what it carries.
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

    /// A worker that is no more, and that no other replaces. Ranks are counted from 1 in R.
    pub fn gone(rank: Rank, gone: &Gone) -> Failure {
        match gone {
            Gone::Worker(loss) => Failure::lost(rank, loss, loss.setback).with("replaced", false),
            Gone::Host(reason) => Failure::new("host_failed")
                .with("rank", rank + 1)
                .with("reason", reason),
            Gone::Stopped => Failure::new("stopped").with("rank", rank + 1),
        }
    }

    /// `last`: that of the loss after which the worker's place is as it is now.
    pub fn lost(rank: Rank, loss: &Loss, last: Setback) -> Failure {
        let setback = loss.setback;
        let seconds = |milliseconds: u64| milliseconds as f64 / 1000.0;
        let reason = match loss.pid {
            0 => "could not be started".to_owned(),
            _ => loss.exit.to_string(),
        };
        let failure = Failure::new("worker_lost")
            .with("rank", rank + 1)
            .with("pid", loss.pid)
            .with("reason", reason)
            .with("setbacks", setback.count)
            .with("restoring", setback.restoring)
            .with("stalled", seconds(setback.stalled))
            .with("retry", seconds(last.pause))
            .with("memory_available", loss.memory_available)
            .with("oom", loss.oom)
            .with("stderr", &loss.tail);
        match loss.exit {
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
        // Cannot fail: as many names as values, and a list may have any class.
        let _ = robj.set_names(names);
        let _ = robj.set_class([CLASS]);
        robj
    }
}
