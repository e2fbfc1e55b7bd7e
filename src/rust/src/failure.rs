//! Failures as values: a named character vector, from which R makes a classed condition
//! (R/conditions.R).

use extendr_api::prelude::*;
use rustcluster_core::platform::exit::Exit;
use rustcluster_core::protocol::control::{Loss, Setback};
use rustcluster_core::protocol::ids::Rank;
use rustcluster_core::scheduler::Gone;

/// What went wrong: the end of the condition's class, and what it carries.
pub struct Failure(Vec<(&'static str, String)>);

impl Failure {
    pub fn new(kind: &str) -> Failure {
        Failure(vec![("kind", kind.to_owned())])
    }

    pub fn with(mut self, name: &'static str, value: impl ToString) -> Failure {
        self.0.push((name, value.to_string()));
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
            .with(
                "restoring",
                if setback.restoring { "TRUE" } else { "FALSE" },
            )
            .with("stalled", seconds(setback.stalled))
            .with("retry", seconds(last.pause))
            .with("memory_available", loss.memory_available)
            .with("oom", if loss.oom { "TRUE" } else { "FALSE" })
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
        // R's strings hold no NUL; what a worker prints may.
        let clean = values.iter().map(|value| value.replace('\0', ""));
        let mut robj = Robj::from(clean.collect::<Vec<_>>());
        // Cannot fail: as many names as values.
        let _ = robj.set_names(names);
        robj
    }
}
