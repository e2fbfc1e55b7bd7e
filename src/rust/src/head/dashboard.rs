//! The dashboard, for R: opening it, what R reports for it, and its figures for `clusterTop()`.

use super::handle::{with_cluster, with_hub};
use super::status::text;
use crate::r::failure::Failure;
use extendr_api::prelude::*;
use rustcluster_core::head::dashboard::board::FailureKind;
use rustcluster_core::head::dashboard::server::Site;
use rustcluster_core::head::hub::{FigureQuery, HostFigures};

fn failed(error: &std::io::Error) -> Failure {
    Failure::new("dashboard_failed").with("reason", error.to_string())
}

/// Serves the dashboard at this address of this machine. `port`: 0 for any free port. `names`: further names in the
/// `Host` header under which the page may be asked for. Returns a list of the port, the token and whether the address is
/// a loopback address.
/// @noRd
#[extendr]
fn hub_dashboard_open(handle: Robj, host: &str, port: i32, names: Vec<String>) -> Robj {
    with_cluster(&handle, |cluster| {
        let port = u16::try_from(port).unwrap_or(0);
        let site = Site::open(host, port, &names).map_err(|error| failed(&error))?;
        let port = site.port().map_err(|error| failed(&error))?;
        let token = site.token().to_owned();
        let loopback = site.is_loopback();
        let opened = cluster.hub.borrow_mut().open_dashboard(site);
        opened.map_err(|error| failed(&error))?;
        Ok(list!(port = i32::from(port), token = token, loopback = loopback).into())
    })
}

/// Allows requests for the dashboard under another name of the host.
/// @noRd
#[extendr]
fn hub_dashboard_allow(handle: Robj, name: &str) -> Robj {
    with_hub(&handle, |hub| {
        hub.allow_dashboard_at(name.to_ascii_lowercase())
            .map_err(|error| failed(&error))
    })
}

/// Serves no dashboard any more.
/// @noRd
#[extendr]
fn hub_dashboard_close(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        hub.close_dashboard().map_err(|error| failed(&error))
    })
}

/// Returns whether a page is open, so that R has to report what only R knows.
/// @noRd
#[extendr]
fn hub_watched(handle: Robj) -> Robj {
    with_hub(&handle, |hub| Ok(hub.is_watched()))
}

/// Sets what R knows of batch jobs: the indices of their hosts, from 1, their ids and their states.
/// @noRd
#[extendr]
fn hub_batch_jobs(handle: Robj, hosts: &[i32], ids: Vec<String>, states: Vec<String>) -> Robj {
    with_hub(&handle, |hub| {
        let agents = hosts
            .iter()
            .filter_map(|&host| usize::try_from(host - 1).ok());
        let jobs = agents.zip(ids).zip(states);
        hub.set_batch_jobs(
            jobs.map(|((agent, id), state)| (agent, id, state))
                .collect(),
        );
        Ok(())
    })
}

/// Returns the figures of the dashboard: a list of vectors and lists.
/// @noRd
#[extendr]
fn hub_figures(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let figures = cluster.hub.borrow().figures(&FigureQuery::default());
        let number = |of: &dyn Fn(&HostFigures) -> f64| -> Vec<f64> {
            figures.hosts.iter().map(of).collect()
        };
        let names: Vec<String> = figures.hosts.iter().map(|host| clean(&host.name)).collect();
        let states: Vec<&str> = figures.hosts.iter().map(|host| host.state).collect();
        let memory: Vec<Option<f64>> = figures
            .hosts
            .iter()
            .map(|host| host.memory.map(|bytes| bytes as f64))
            .collect();
        let reasons: Vec<Option<String>> = figures
            .hosts
            .iter()
            .map(|host| text(host.reason.as_ref()))
            .collect();
        let hosts = list!(
            host = names,
            state = states,
            reason = reasons,
            workers = number(&|host| host.workers[0] as f64),
            up = number(&|host| host.workers[1] as f64),
            busy = number(&|host| host.workers[2] as f64),
            done = number(&|host| host.done as f64),
            bytes_in = number(&|host| host.bytes.0 as f64),
            bytes_out = number(&|host| host.bytes.1 as f64),
            memory = memory,
            losses = number(&|host| host.losses as f64)
        );
        let job: Robj = match &figures.job {
            None => ().into(),
            Some(job) => {
                let store = job.store.as_ref().map(|store| clean(&store.dir));
                let (noun, all, done) = job.counted();
                list!(
                    noun = noun,
                    tasks = all as f64,
                    done = done as f64,
                    failed = job.failed() as f64,
                    failed_noun = job.failed_noun(),
                    seconds = figures.job_seconds(job),
                    ended = job.ended.is_some(),
                    store = store
                )
                .into()
            }
        };
        let failures = figures.failures.iter();
        let failures: Vec<Robj> = failures
            .map(|failure| {
                list!(
                    kind = failure.kind.name(),
                    at = failure.at.as_secs_f64(),
                    count = failure.count as f64,
                    rank = failure.rank.map(|rank| rank as i32 + 1),
                    host = failure.agent.map(|agent| agent as i32 + 1),
                    text = clean(&failure.text),
                    output = clean(&failure.output)
                )
                .into()
            })
            .collect();
        let counts = FailureKind::ALL.iter().zip(figures.counts);
        let counts: Vec<f64> = counts.map(|(_, count)| count as f64).collect();
        let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
        let (_, resident, machine) = figures.head;
        Ok(list!(
            now = figures.now,
            stopped = figures.stopped,
            states = figures.states.as_str(),
            hosts = hosts,
            done = figures.totals.0 as f64,
            busy = figures.totals.1,
            losses = figures.totals.2 as f64,
            job = job,
            waiting = figures.calls.0 as f64,
            running = figures.calls.1 as f64,
            queued = figures.queued as f64,
            memory = bytes(resident),
            available = bytes(machine.map(|(_, available)| available)),
            counts = counts,
            failures = List::from_values(failures)
        )
        .into())
    })
}

/// R cannot have a NUL in a text.
fn clean(text: &str) -> String {
    text.replace('\0', "")
}

extendr_module! {
    mod dashboard;
    fn hub_dashboard_open;
    fn hub_dashboard_allow;
    fn hub_dashboard_close;
    fn hub_watched;
    fn hub_batch_jobs;
    fn hub_figures;
}
