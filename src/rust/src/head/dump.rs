//! The state of a cluster for a bug report, for R.

use super::handle::{SLICE, with_cluster};
use extendr_api::prelude::*;
use rustcluster_core::head::hub::{Dump, RecentEvent};
use rustcluster_core::protocol::control::Facts;
use std::time::Duration;

/// Requests the state of all agents. Returns the number of the request.
/// @noRd
#[extendr]
fn hub_ask_dump(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let question = cluster.hub.borrow().ask_dump();
        Ok((question as f64).into())
    })
}

/// Returns the answers of the agents to a request, and the state of the head. Returns `NULL` if answers are
/// missing; waits up to `max` seconds for them. `anyway`: whether to return an incomplete state instead of
/// `NULL`. The value is a list with the cluster (a named character vector), the hosts and the workers (lists of
/// such vectors), the agents (for each a list of such vectors, named by the ranks of the workers; 0 is the
/// agent itself), and the last events (a list of vectors).
/// @noRd
#[extendr]
fn hub_dump(handle: Robj, question: f64, max: f64, anyway: bool) -> Robj {
    with_cluster(&handle, |cluster| {
        let max = Duration::try_from_secs_f64(max).unwrap_or_default();
        let max = max.min(SLICE);
        let dump = cluster.hub.borrow().dump(question as u64, max, anyway);
        Ok(dump.map_or_else(|| ().into(), to_r))
    })
}

fn to_r(dump: Dump) -> Robj {
    let agents = dump.agents.into_iter().map(|of| {
        let ranks = of.iter().map(|(rank, _)| rank.map_or(0, |rank| rank + 1));
        let names: Vec<String> = ranks.map(|rank| rank.to_string()).collect();
        let mut facts: Robj = all(of.into_iter().map(|(_, facts)| facts).collect());
        // This cannot fail: there are as many names as elements.
        let _ = facts.set_names(names);
        facts
    });
    list!(
        cluster = named(dump.cluster),
        hosts = all(dump.hosts),
        workers = all(dump.workers),
        agents = List::from_values(agents.collect::<Vec<Robj>>()),
        events = events(&dump.events)
    )
    .into()
}

fn all(facts: Vec<Facts>) -> Robj {
    List::from_values(facts.into_iter().map(named).collect::<Vec<Robj>>()).into()
}

fn named(facts: Facts) -> Robj {
    let (names, values): (Vec<String>, Vec<String>) = facts.0.into_iter().unzip();
    // R's strings cannot contain NUL, and the text comes from untrusted peers.
    let clean = |text: String| text.replace('\0', "");
    let mut robj = Robj::from(values.into_iter().map(clean).collect::<Vec<_>>());
    // This cannot fail: there are as many names as values.
    let _ = robj.set_names(names.into_iter().map(clean).collect::<Vec<_>>());
    robj
}

fn events(events: &[RecentEvent]) -> Robj {
    let number = |of: &dyn Fn(&RecentEvent) -> Option<i32>| -> Vec<Option<i32>> {
        events.iter().map(of).collect()
    };
    let why = events.iter().map(|event| event.why.replace('\0', ""));
    list!(
        at = events
            .iter()
            .map(|event| event.at.as_secs_f64())
            .collect::<Vec<_>>(),
        what = events.iter().map(|event| event.what).collect::<Vec<_>>(),
        host = number(&|event| event.agent.map(|at| at as i32 + 1)),
        rank = number(&|event| event.rank.map(|rank| rank as i32 + 1)),
        task = events
            .iter()
            .map(|event| event.task.map(|task| task as f64))
            .collect::<Vec<Option<f64>>>(),
        why = why.collect::<Vec<_>>()
    )
    .into()
}

extendr_module! {
    mod dump;
    fn hub_ask_dump;
    fn hub_dump;
}
