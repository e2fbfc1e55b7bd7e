//! Launchers whose jobs come and go with the work, for R.

use super::handle::{rank_of, with_cluster, with_hub};
use crate::r::failure::Failure;
use extendr_api::prelude::*;
use rustcluster_core::head::scheduler::events::State;
use rustcluster_core::head::scheduler::give_back::GiveBack;
use rustcluster_core::protocol::ids::Rank;
use std::collections::HashSet;
use std::time::Duration;

/// Converts indices of hosts of R, from 1.
fn agents_of(agents: &[i32]) -> Vec<usize> {
    let indices = agents.iter().map(|&agent| usize::try_from(agent - 1));
    indices.filter_map(std::result::Result::ok).collect()
}

/// Gives back the hosts `agents` of a launcher, all but `min` of them, after `idle` seconds in which their workers have
/// nothing to do; `Inf`: never.
/// @noRd
#[extendr]
fn hub_adapt(handle: Robj, agents: &[i32], min: i32, idle: f64) -> Robj {
    with_hub(&handle, |hub| {
        hub.adapt(GiveBack {
            agents: agents_of(agents),
            min: usize::try_from(min).unwrap_or(0),
            idle: Duration::try_from_secs_f64(idle).ok(),
        });
        Ok(())
    })
}

/// Gives agents that connect from now on to these hosts first.
/// @noRd
#[extendr]
fn hub_prefer(handle: Robj, agents: &[i32]) -> Robj {
    with_hub(&handle, |hub| {
        hub.prefer(&agents_of(agents));
        Ok(())
    })
}

/// Keeps these nodes, although they have nothing to do, for a verb that is about to send them tasks, until
/// hub_close_job(). Without ranks, ends that.
/// @noRd
#[extendr]
fn hub_hold(handle: Robj, ranks: &[i32]) -> Robj {
    with_hub(&handle, |hub| {
        if ranks.is_empty() {
            hub.release_held();
            return Ok(());
        }
        let ranks: std::result::Result<Vec<Rank>, Failure> =
            ranks.iter().map(|&rank| rank_of(hub, rank)).collect();
        hub.hold(&ranks?);
        Ok(())
    })
}

/// Returns what waits for workers of the hosts `agents`: a list of `tasks`, the number of waiting tasks and calls that
/// may run on some of them, without those for which workers are there or are starting, and `hosts`, whether any of these
/// may run on each.
/// @noRd
#[extendr]
fn hub_demand(handle: Robj, agents: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        let agents = agents_of(agents);
        let hub = cluster.hub.borrow();
        let (workers, known) = (hub.status(false).0, hub.hosts());
        let ranks = 0..workers.len() as Rank;
        let owners: Vec<usize> = ranks.clone().map(|rank| hub.worker(rank).agent).collect();
        // A worker that has come up gets its first task when R sends it one.
        let is_free = |rank: Rank, idle: bool| {
            let state = workers.get(rank as usize).map(|worker| worker.state);
            let host = owners.get(rank as usize).and_then(|&at| known.get(at));
            let starts = matches!(state, Some(State::Starting | State::Restoring));
            let free = starts || idle && matches!(state, Some(State::Idle));
            free && host.is_some_and(|host| host.linked)
        };
        let (mut tasks, mut hosts) = hub.calls_waiting_for(&agents);
        let for_calls = ranks.filter(|&rank| {
            let mut may = agents.iter().zip(&hosts);
            may.any(|(&at, &may)| at == owners[rank as usize] && may) && is_free(rank, false)
        });
        tasks = tasks.saturating_sub(for_calls.count());
        let job = cluster.job.try_borrow().ok();
        let job = job.as_ref().and_then(|job| job.as_ref());
        let job = job.map(|job| &job.engine);
        if let Some(job) = job.filter(|job| job.is_free() && job.left() > 0) {
            let owner = |&rank: &Rank| owners.get(rank as usize).copied();
            let of_job: HashSet<usize> = job.ranks().iter().filter_map(owner).collect();
            let has = |agent: &usize| of_job.contains(agent);
            if agents.iter().any(has) {
                let free = job.ranks().iter().filter(|&&rank| is_free(rank, true));
                tasks += job.left().saturating_sub(free.count());
            }
            for (may, agent) in hosts.iter_mut().zip(&agents) {
                *may |= has(agent);
            }
        }
        Ok(list!(tasks = tasks as f64, hosts = hosts).into())
    })
}

/// Returns the jobs of adaptive launchers of which a worker has come up since the last call: a list of `agent` and
/// `job`, the engine's name for it or NA.
/// @noRd
#[extendr]
fn hub_job_arrivals(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let arrivals = cluster.hub.borrow_mut().take_job_arrivals();
        let agents: Vec<i32> = arrivals.iter().map(|a| a.agent as i32 + 1).collect();
        let clean = |text: String| text.replace('\0', "");
        let jobs: Vec<Option<String>> = arrivals.into_iter().map(|a| a.job.map(clean)).collect();
        Ok(list!(agent = agents, job = jobs).into())
    })
}

extendr_module! {
    mod adaptive;
    fn hub_adapt;
    fn hub_prefer;
    fn hub_hold;
    fn hub_demand;
    fn hub_job_arrivals;
}
