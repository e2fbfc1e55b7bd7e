//! The agent's functions. One agent a process.

use crate::failure::Failure;
use crate::worker;
use extendr_api::prelude::*;
use rustcluster_core::agent::{self, Greeted, Role};
use rustcluster_core::limits;
use rustcluster_core::message::{Start, StartMode};
use std::cell::RefCell;
use std::io;

thread_local! {
    static GREETED: RefCell<Option<Greeted>> = const { RefCell::new(None) };
}

fn failed(error: &io::Error) -> Robj {
    Failure::new("agent_failed").with("reason", error).into()
}

/// Takes over stdin and stdout and learns from the head what to start: a list of the packages to
/// attach and whether workers will be forked. `tempdir`: that of this process.
/// @noRd
#[extendr]
fn agent_greet(package: &str, r_version: &str, platform: &str, tempdir: &str) -> Robj {
    match agent::greet(&agent::hello(package, r_version, platform)) {
        Ok(mut greeted) => {
            greeted.watch_tempdir(tempdir);
            let packages = greeted.start.packages.clone();
            let forks = greeted.start.mode == StartMode::Fork;
            GREETED.set(Some(greeted));
            list!(packages = packages, forks = forks).into()
        }
        Err(error) => failed(&error),
    }
}

/// Tells the head that nothing can be started, and why.
/// @noRd
#[extendr]
fn agent_fail(reason: &str) -> Robj {
    match GREETED
        .take()
        .map(|greeted| greeted.fail(reason.to_owned()))
    {
        Some(Err(error)) => failed(&error),
        _ => ().into(),
    }
}

/// What a worker must be able to allocate beyond what it begins with.
const ROOM: u64 = 16 << 20;

/// Why workers cannot begin under their memory limit: forks have what this process has.
fn too_low(start: &Start) -> Option<String> {
    let counted = limits::memory_counted().filter(|_| start.mode == StartMode::Fork)?;
    let limit = start.memory_limit;
    (limit > 0 && limit < counted.saturating_add(ROOM)).then(|| {
        format!(
            "a `memory_limit` of {:.0} MB is too low: with the packages that it starts with, a \
             worker has {:.0} MB before its first task",
            limit as f64 / 1e6,
            counted as f64 / 1e6
        )
    })
}

/// Makes the workers and serves them. Returns `TRUE` in a forked worker, `FALSE` when the cluster
/// is over.
/// @noRd
#[extendr]
fn agent_run() -> Robj {
    let Some(greeted) = GREETED.take() else {
        return failed(&io::Error::other("the head has not been greeted"));
    };
    let limit = greeted.start.memory_limit;
    if let Some(reason) = too_low(&greeted.start).or_else(|| greeted.outfile_problem()) {
        return match greeted.fail(reason) {
            Ok(()) => false.into(),
            Err(error) => failed(&error),
        };
    }
    let served = greeted.agent().and_then(|mut agent| agent.run());
    // The agent's value has been dropped here, in a fork too, and with it all descriptors that
    // are not the worker's own.
    match served {
        Ok(Role::Done) => false.into(),
        Ok(Role::Worker(channel)) => match worker::adopt(*channel, limit) {
            Ok(()) => true.into(),
            Err(error) => failed(&error),
        },
        Err(error) => failed(&error),
    }
}

extendr_module! {
    mod agent;
    fn agent_greet;
    fn agent_fail;
    fn agent_run;
}
