//! Events of workers and hosts, for R.

use super::handle::{Cluster, with_cluster};
use crate::r::failure::Failure;
use extendr_api::prelude::*;
use rustcluster_core::head::hub::Event;
use rustcluster_core::head::scheduler::events::Interruption;

/// Returns the events that R has to show, in the order in which they happened, as a list of failures, or
/// `NULL`.
/// @noRd
#[extendr]
fn hub_events(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| Ok(events(cluster)))
}

/// Returns the progress events of tasks that have arrived since the last call, as a list of raw vectors. They
/// are recorded from the first call on.
/// @noRd
#[extendr]
fn hub_take_progress(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let events = cluster.hub.borrow().take_progress();
        Ok(List::from_values(events.iter().map(|event| Raw::from_bytes(event))).into())
    })
}

pub(super) fn events(cluster: &Cluster) -> Robj {
    let events = cluster.hub.borrow().take_events();
    if events.is_empty() {
        return ().into();
    }
    let shown = events.into_iter().map(|event| match event {
        Event::Replaced {
            rank,
            pid,
            interruption,
        } => {
            let reason = match interruption {
                Interruption::Cancelled => "its task was cancelled",
                Interruption::TimedOut => "its task had exceeded its time limit",
            };
            Failure::new("worker_replaced")
                .with("rank", rank + 1)
                .with("pid", pid)
                .with("reason", reason)
        }
        Event::Back { rank } => Failure::new("worker_back").with("rank", rank + 1),
        Event::Lost {
            rank,
            failure,
            replaced,
        } => Failure::lost(rank, &failure, failure.setback).with("replaced", replaced),
        Event::HostGivenUp {
            agent,
            joined,
            failure,
        } => Failure::new("host_failed")
            .with("agent", agent + 1)
            .with("given_up", true)
            .with("joined", joined)
            .with("reason", failure.reason)
            .with("status", failure.status)
            .with("stderr", failure.stderr)
            .with("stdout", failure.stdout),
        Event::HostLost { agent, reason } => Failure::new("host_failed")
            .with("agent", agent + 1)
            .with("reason", reason),
        Event::HostDraining {
            agent,
            reason,
            seconds,
        } => {
            let failure = Failure::new("host_draining")
                .with("agent", agent + 1)
                .with("reason", reason);
            match seconds {
                Some(seconds) => failure.with("seconds", f64::from(seconds)),
                None => failure,
            }
        }
        Event::HostBack { agent } => Failure::new("host_back").with("agent", agent + 1),
        Event::HostJoined { agent } => Failure::new("host_joined").with("agent", agent + 1),
        Event::StopTimedOut { rank } => Failure::new("stop_timeout").with("rank", rank + 1),
        Event::SetupLogIncomplete => Failure::new("state_not_kept"),
        Event::NotRecorded { reason } => Failure::new("not_recorded").with("reason", reason),
        Event::StateNotLogged { agent } => Failure::new("state_not_kept").with("agent", agent + 1),
        Event::LeftBehind {
            agent,
            rank,
            pid,
            command,
        } => {
            let failure = Failure::new("left_behind")
                .with("agent", agent + 1)
                .with("pid", pid)
                .with("command", command);
            match rank {
                Some(rank) => failure.with("rank", rank + 1),
                None => failure,
            }
        }
        Event::Output { rank, bytes } => Failure::new("output")
            .with("rank", rank + 1)
            .with("text", String::from_utf8_lossy(&bytes)),
    });
    List::from_values(shown.map(Robj::from)).into()
}

extendr_module! {
    mod events;
    fn hub_events;
    fn hub_take_progress;
}
