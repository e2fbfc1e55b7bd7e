//! Functions for R that start and stop the agents and workers of a cluster.

use super::handle::{Cluster, SLICE, rank_of, strings, with_cluster, with_hub};
use crate::codec::batch;
use crate::codec::stream::Format;
use crate::r::failure::Failure;
use extendr_api::prelude::*;
use rustcluster_core::agent::{dial, startup};
use rustcluster_core::head::hub::{HostView, Hub, NO_JOB, Plan, Progress};
use rustcluster_core::head::launch::{Launch, Lingering, Source};
use rustcluster_core::head::scheduler::MAX_SHARED_RESULTS;
use rustcluster_core::platform::{limits, log};
use rustcluster_core::protocol::control::{Linger, Outfile, Secret, Start, StartMode, ToHead};
use rustcluster_core::protocol::ids::Rank;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

/// Checks whether the limits of the system allow this number of workers on this machine.
/// @noRd
#[extendr]
fn limits_check(workers: i32) -> Robj {
    match limits::check(usize::try_from(workers).unwrap_or(0)) {
        Ok(()) => ().into(),
        Err(short) => Failure::new("limits")
            .with("what", short.what)
            .with("needed", short.needed)
            .with("available", short.available)
            .with("reason", short.remedy)
            .into(),
    }
}

/// Starts the log of this session, as `RUSTCLUSTER_LOG` says.
/// @noRd
#[extendr]
fn log_start() -> Robj {
    match log::start(log::Role::Head) {
        Ok(()) => ().into(),
        Err(problem) => Failure::new("bad_argument")
            .with("argument", problem.variable)
            .with("reason", problem.reason)
            .into(),
    }
}

/// Starts the agents of a cluster and returns its handle at once. `hosts`: for each host a list of host,
/// command and env (a named vector; NA removes a variable), or of host and dial, the number of the launcher whose
/// agent dials back (`lingers`: the name of the directory of an agent that has workers and dials to its next head). `buffer_limit`: the bytes of results that the head buffers; further results stay on their
/// hosts.
/// @noRd
#[extendr]
fn hub_start(
    hosts: List,
    package: &str,
    r_version: &str,
    platform: &str,
    buffer_limit: f64,
) -> Robj {
    let parsed: Option<Vec<Launch>> = hosts.values().map(|host| launch_of(&host)).collect();
    let Some(hosts) = parsed else {
        return not_a_description("hosts");
    };
    let hello = startup::hello(package, r_version, platform);
    match Hub::start(hosts, hello, buffer_limit as usize) {
        Ok(mut hub) => {
            hub.measure_with(batch::measure);
            let cluster = Cluster {
                hub: RefCell::new(hub),
                nodes: Cell::new(None),
                plain: Cell::default(),
                last: Cell::new(None),
                called: Cell::new(None),
                open_job: Cell::new(None),
                formats: RefCell::default(),
                messages: RefCell::default(),
                calls: RefCell::default(),
                failures: RefCell::default(),
                sent_by_job: Cell::new((NO_JOB, 0)),
                job: RefCell::new(None),
                rtts: RefCell::default(),
                common: Cell::new(None),
                blobs: RefCell::default(),
                unread: Cell::new(None),
                dropped: RefCell::default(),
                reading: Cell::new(None),
            };
            ExternalPtr::new(cluster).into()
        }
        Err(error) => Failure::new("start_failed")
            .with("reason", error.to_string())
            .into(),
    }
}

/// Listens for agents that dial back, on one port between `port_from` and `port_to` (0 for any) at all
/// `addresses`. `keys`: the key of each launcher, in hexadecimal, by the number of the launcher. A later call
/// without addresses only sets the keys. Returns a list with the port.
/// @noRd
#[extendr]
fn hub_listen(
    handle: Robj,
    addresses: Vec<String>,
    port_from: i32,
    port_to: i32,
    keys: Vec<String>,
) -> Robj {
    let bad = |argument: &str, reason: String| {
        Failure::new("bad_argument")
            .with("argument", argument)
            .with("reason", reason)
    };
    with_hub(&handle, |hub| {
        let parsed: std::result::Result<Vec<IpAddr>, String> = addresses
            .iter()
            .map(|text| text.parse().map_err(|_| format!("{text} is no IP address")))
            .collect();
        let parsed = parsed.map_err(|reason| bad("address", reason))?;
        let port = |port: i32| {
            let parsed = u16::try_from(port);
            parsed.map_err(|_| bad("port", format!("{port} is no port number")))
        };
        let ports = port(port_from)?..=port(port_to)?;
        let parsed_keys = (1u32..).zip(&keys).map(|(launcher, key)| {
            let key = dial::key_of(key).ok_or_else(|| bad("keys", "not a key".into()))?;
            Ok((launcher, key))
        });
        let parsed_keys: std::result::Result<Vec<_>, Failure> = parsed_keys.collect();
        match hub.listen(&parsed, &ports, parsed_keys?) {
            Ok(port) => Ok(Listening(port)),
            Err(error) => {
                let ports = match (ports.start(), ports.end()) {
                    (0, _) => "any port".to_owned(),
                    (from, to) if from == to => format!("port {from}"),
                    (from, to) => format!("a port from {from} to {to}"),
                };
                Err(Failure::new("start_failed").with(
                    "reason",
                    format!(
                        "cannot listen at {} on {ports}: {error}",
                        addresses.join(", ")
                    ),
                ))
            }
        }
    })
}

/// Sets the key of a cluster that lingers, in hexadecimal: agents use it when they have lost their head. To be called
/// before hub_listen().
/// @noRd
#[extendr]
fn hub_cluster_key(handle: Robj, key: &str) -> Robj {
    with_hub(&handle, |hub| {
        let key = dial::key_of(key).ok_or_else(|| {
            Failure::new("bad_argument")
                .with("argument", "key")
                .with("reason", "not a key")
        })?;
        hub.set_cluster_key(key);
        Ok(())
    })
}

/// Listens for agents whose connections a gateway passes on to a Unix socket at `path`. hub_listen() sets the keys.
/// @noRd
#[extendr]
fn hub_listen_unix(handle: Robj, path: &str) -> Robj {
    with_hub(&handle, |hub| {
        hub.listen_unix(Path::new(path)).map_err(|error| {
            let reason = format!("cannot listen on the socket {path}: {error}");
            Failure::new("start_failed").with("reason", reason)
        })
    })
}

/// The result of `hub_listen()`.
struct Listening(u16);

impl From<Listening> for Robj {
    fn from(listening: Listening) -> Robj {
        list!(port = i32::from(listening.0)).into()
    }
}

fn not_a_description(argument: &str) -> Robj {
    Failure::new("bad_argument")
        .with("argument", argument)
        .with("reason", "not a description of hosts")
        .into()
}

fn launch_of(host: &Robj) -> Option<Launch> {
    let fields: HashMap<&str, Robj> = host.as_list()?.iter().collect();
    let name = fields.get("host")?.as_str()?.to_owned();
    if let Some(dial) = fields.get("dial").filter(|dial| !dial.is_null()) {
        let launcher = u32::try_from(dial.as_integer()?).ok()?;
        let lingers = fields.get("lingers").filter(|name| !name.is_null());
        let lingers = match lingers {
            Some(name) => Some(Lingering {
                name: name.as_str()?.to_owned(),
                missed: fields.get("missed")?.as_bool()?,
            }),
            None => None,
        };
        let source = Source::DialBack { launcher, lingers };
        return Some(Launch { host: name, source });
    }
    let source = command_of(&fields)?;
    let Some(waiting) = fields.get("waiting").filter(|waiting| !waiting.is_null()) else {
        return Some(Launch { host: name, source });
    };
    let waiting: HashMap<&str, Robj> = waiting.as_list()?.iter().collect();
    let own = fields.get("local")?.as_bool()?;
    let directory = waiting.get("name")?.as_str()?.to_owned();
    let source = Source::Waiting {
        name: own.then_some(directory),
        missed: fields.get("missed")?.as_bool()?,
        key: Secret(*dial::key_of(waiting.get("key")?.as_str()?)?),
        relay: Box::new(command_of(&waiting)?),
        next: Box::new(source),
    };
    Some(Launch { host: name, source })
}

fn command_of(fields: &HashMap<&str, Robj>) -> Option<Source> {
    let env = fields.get("env")?;
    let names = env.names().into_iter().flatten().map(str::to_owned);
    let values = env.as_str_vector().unwrap_or_default();
    let env = names.zip(values).map(|(name, value)| {
        let value = (!value.is_na()).then(|| value.into());
        (name.into(), value)
    });
    let command = strings(fields.get("command")?);
    Some(Source::Command {
        command: command.into_iter().map(Into::into).collect(),
        env: env.collect(),
    })
}

/// Returns whether all agents have greeted or failed; waits up to one slice for that.
/// @noRd
#[extendr]
fn hub_greeted(handle: Robj) -> Robj {
    with_hub(&handle, |hub| Ok(hub.greeted(SLICE)))
}

/// Returns the known facts of all hosts: a list of vectors with an element for each host.
/// @noRd
#[extendr]
fn hub_hosts(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let hosts = cluster.hub.borrow().hosts();
        let text = |of: &dyn Fn(&HostView) -> Option<String>| -> Vec<Option<String>> {
            let clean = |text: String| text.replace('\0', "");
            hosts.iter().map(|host| of(host).map(clean)).collect()
        };
        let number = |of: &dyn Fn(&HostView) -> Option<f64>| -> Vec<Option<f64>> {
            hosts.iter().map(of).collect()
        };
        let refusal = |host: &HostView| host.start_failure.as_ref().map(refusal);
        Ok(list!(
            node = text(&|h| h.node.clone()),
            peer = text(&|h| Some(h.peer?.ip().to_string())),
            job = text(&|h| h.job.clone()),
            hostname = text(&|h| Some(h.hello.as_ref()?.hostname.clone())),
            r_version = text(&|h| Some(h.hello.as_ref()?.r_version.clone())),
            platform = text(&|h| Some(h.hello.as_ref()?.platform.clone())),
            big_endian = number(&|h| Some(f64::from(u8::from(h.hello.as_ref()?.big_endian)))),
            cores = number(&|h| Some(h.hello.as_ref()?.cores.into())),
            memory = number(&|h| Some(h.hello.as_ref()?.memory_total as f64)),
            available = number(&|h| Some(h.hello.as_ref()?.memory_available as f64)),
            greeted = number(&|h| Some(h.greeted?.as_secs_f64())),
            up = number(&|h| Some(h.up?.as_secs_f64())),
            jobs_lost = number(&|h| Some(h.jobs_lost.into())),
            in_use = number(&|h| Some(f64::from(u8::from(h.failure.as_ref()?.in_use)))),
            awaited = number(&|h| Some(f64::from(u8::from(h.awaited)))),
            linked = number(&|h| Some(f64::from(u8::from(h.linked)))),
            draining = text(&|h| h.draining.clone()),
            reason = text(&|h| refusal(h).or(Some(h.failure.as_ref()?.reason.clone()))),
            status = number(&|h| Some(h.failure.as_ref()?.status?.into())),
            stderr = text(&|h| Some(h.failure.as_ref()?.stderr.clone())),
            stdout = text(&|h| Some(h.failure.as_ref()?.stdout.clone()))
        )
        .into())
    })
}

fn refusal(reason: &ToHead) -> String {
    match reason {
        ToHead::Limits {
            what,
            needed,
            available,
            remedy,
        } => format!(
            "not enough {what} for so many workers: {needed} needed, {available} available; {remedy}"
        ),
        ToHead::StartFailed { reason } => reason.clone(),
        _ => String::new(),
    }
}

/// Keeps the set-up log in a file at `path`, up to `max_bytes` bytes, so that hosts can join after the start.
/// `start_timeout`: the number of seconds that such a host may take. `reconnects`: whether lost hosts are
/// reconnected, too.
/// @noRd
#[extendr]
fn hub_keep_setup_log(
    handle: Robj,
    path: &str,
    max_bytes: f64,
    start_timeout: f64,
    reconnects: bool,
) -> Robj {
    with_hub(&handle, |hub| {
        let start_timeout = Duration::try_from_secs_f64(start_timeout).unwrap_or(Duration::MAX);
        let (path, max_bytes) = (Path::new(path), max_bytes as u64);
        let made = match reconnects {
            true => hub.reconnect(path, max_bytes, start_timeout),
            false => hub.keep_setup_log(path, max_bytes, start_timeout),
        };
        made.map_err(|error| Failure::new("start_failed").with("reason", error.to_string()))
    })
}

/// Returns the ranks of the workers whose hosts have not joined yet, and still may. With `wait`, waits up to one
/// slice until a worker joins.
/// @noRd
#[extendr]
fn hub_awaited(handle: Robj, wait: bool) -> Robj {
    with_hub(&handle, |hub| {
        if wait {
            hub.await_arrival(hub.arrivals(), SLICE);
        }
        let ranks = (0..hub.size() as Rank).filter(|&rank| hub.is_awaited(rank));
        Ok(ranks.map(|rank| rank as i32 + 1).collect::<Vec<i32>>())
    })
}

/// Sends each agent its plan. `plans`: for each agent `NULL`, which stops it, or a list of ranks, packages,
/// outfile, renice, mode, spawn, heartbeat_timeout (in milliseconds), chunk_cache_bytes, setup_log_bytes and
/// memory_limit (in bytes; 0 for no limit), setup (the time limit of a replacement's start, in milliseconds; 0
/// for none), stop_timeout (in milliseconds), local (whether the host is this machine) and xdr. `timeout`: the
/// time limit of a task in seconds.
/// @noRd
#[extendr]
fn hub_go(handle: Robj, plans: List, timeout: f64) -> Robj {
    let Some((plans, formats)) = plans_of(&plans) else {
        return not_a_description("plans");
    };
    with_cluster(&handle, |cluster| {
        let mut known = Vec::new();
        set_formats(&mut known, &formats);
        cluster.formats.replace(known);
        let mut hub = cluster.hub.borrow_mut();
        hub.limit_all(Duration::try_from_secs_f64(timeout).ok());
        hub.go(plans)
            .map_err(|error| Failure::new("start_failed").with("reason", error.to_string()))?;
        Ok(().into())
    })
}

type Plans = (Vec<Option<Plan>>, Vec<(Rank, Format)>);

/// Returns the plans of agents, and the format of each of their workers.
fn plans_of(plans: &List) -> Option<Plans> {
    let parsed: Option<Vec<Option<(Plan, Format)>>> = plans
        .values()
        .map(|plan| match plan.is_null() {
            true => Some(None),
            false => plan_of(&plan).map(Some),
        })
        .collect();
    let parsed = parsed?;
    let of = |(plan, format): &(Plan, Format)| {
        let format = *format;
        plan.ranks
            .iter()
            .map(move |&rank| (rank, format))
            .collect::<Vec<_>>()
    };
    let formats = parsed.iter().flatten().flat_map(of).collect();
    let plans = parsed.into_iter().map(|plan| Some(plan?.0)).collect();
    Some((plans, formats))
}

fn set_formats(known: &mut Vec<Format>, formats: &[(Rank, Format)]) {
    for &(rank, format) in formats {
        known.resize(known.len().max(rank as usize + 1), Format::Native);
        known[rank as usize] = format;
    }
}

/// Launches the agents of further hosts. `hosts`: as for hub_start(). From now on hub_greeted(), hub_progress() and
/// hub_leave_out() with agent 0 are about these hosts.
/// @noRd
#[extendr]
fn hub_add_hosts(handle: Robj, hosts: List) -> Robj {
    let parsed: Option<Vec<Launch>> = hosts.values().map(|host| launch_of(&host)).collect();
    let Some(hosts) = parsed else {
        return not_a_description("hosts");
    };
    with_hub(&handle, |hub| {
        if !hub.has_setup_log() {
            return Err(Failure::new("start_failed").with(
                "reason",
                "the set-up log of the cluster is incomplete: increase `setup_log_limit`",
            ));
        }
        hub.add_hosts(hosts)
            .map_err(|error| Failure::new("start_failed").with("reason", error.to_string()))
    })
}

/// Sends each agent of the hosts that were added its plan, as hub_go() does. The ranks of the workers follow those of
/// the cluster.
/// @noRd
#[extendr]
fn hub_go_more(handle: Robj, plans: List) -> Robj {
    let Some((plans, formats)) = plans_of(&plans) else {
        return not_a_description("plans");
    };
    with_cluster(&handle, |cluster| {
        let mut hub = cluster.hub.borrow_mut();
        // The messages to workers with another byte order are others.
        let like = |rank: Rank| cluster.format(rank) == Format::Native;
        let gone = hub.go_more(plans, like);
        gone.map_err(|error| Failure::new("start_failed").with("reason", error.to_string()))?;
        set_formats(&mut cluster.formats.borrow_mut(), &formats);
        cluster.nodes.set(None);
        Ok(().into())
    })
}

/// The hosts that were added are part of the cluster: what happens to them from now on is reported.
/// @noRd
#[extendr]
fn hub_added(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        hub.added();
        Ok(())
    })
}

/// Returns whether the agents of all hosts after the first `count` have ended; waits up to one slice for that.
/// @noRd
#[extendr]
fn hub_are_over(handle: Robj, count: i32) -> Robj {
    with_hub(&handle, |hub| {
        Ok(hub.are_over(usize::try_from(count).unwrap_or(0), SLICE))
    })
}

/// Returns whether this session may open the files in which results in shared memory arrive.
fn has_files() -> bool {
    limits::open_files_left().is_some_and(|left| left >= 2 * MAX_SHARED_RESULTS as u64)
}

fn plan_of(plan: &Robj) -> Option<(Plan, Format)> {
    let fields: HashMap<&str, Robj> = plan.as_list()?.iter().collect();
    let ranks = fields.get("ranks")?.as_integer_vector()?;
    let ranks: Vec<Rank> = ranks.into_iter().map(|rank| (rank - 1) as Rank).collect();
    let start = Start {
        workers: ranks.len() as u32,
        ranks: ranks.clone(),
        mode: match fields.get("mode")?.as_str()? {
            "spawn" => StartMode::Spawn,
            _ => StartMode::Fork,
        },
        packages: strings(fields.get("packages")?),
        outfile: match fields.get("outfile")?.as_str()? {
            "" => Outfile::Console,
            "/dev/null" => Outfile::Discard,
            path => Outfile::File(path.to_owned()),
        },
        renice: fields.get("renice")?.as_integer()?,
        spawn_command: strings(fields.get("spawn")?),
        heartbeat_timeout: u32::try_from(fields.get("heartbeat_timeout")?.as_integer()?).ok()?,
        chunk_cache_bytes: fields.get("chunk_cache_bytes")?.as_real()? as u64,
        state: fields.get("setup_log_bytes")?.as_real()? as u64,
        setup: fields.get("setup")?.as_real()? as u64,
        memory_limit: fields.get("memory_limit")?.as_real()? as u64,
        stop_timeout: fields.get("stop_timeout")?.as_real()? as u64,
        local: fields.get("local")?.as_bool()? && has_files(),
        linger: match fields.get("linger").filter(|linger| !linger.is_null()) {
            Some(linger) => Some(linger_of(linger)?),
            None => None,
        },
    };
    let format = match fields.get("xdr")?.as_bool()? {
        true => Format::Xdr,
        false => Format::Native,
    };
    Some((Plan { start, ranks }, format))
}

fn linger_of(linger: &Robj) -> Option<Linger> {
    let fields: HashMap<&str, Robj> = linger.as_list()?.iter().collect();
    let hosts = strings(fields.get("addresses")?);
    let port = u16::try_from(fields.get("port")?.as_integer()?).ok()?;
    Some(Linger {
        milliseconds: (1000.0 * fields.get("seconds")?.as_real()?).ceil() as u64,
        name: fields.get("name")?.as_str()?.to_owned(),
        key: Secret(*dial::key_of(fields.get("key")?.as_str()?)?),
        generation: u32::try_from(fields.get("generation")?.as_integer()?).ok()?,
        addresses: hosts.into_iter().map(|host| (host, port)).collect(),
    })
}

/// Makes the numbers of tasks of this head differ from those of the heads that the cluster has had, of which there are
/// `generation`. To be called before hub_go().
/// @noRd
#[extendr]
fn hub_follow(handle: Robj, generation: i32) -> Robj {
    with_hub(&handle, |hub| {
        hub.follow(u32::try_from(generation).unwrap_or(0));
        Ok(())
    })
}

/// Writes what the next head needs to know of lost hosts: the numbers of those that miss a set-up call, because they are
/// lost, to the file `missed`, and the random number states of all workers to the file `seeds`.
/// @noRd
#[extendr]
fn hub_record(handle: Robj, missed: &str, seeds: &str) -> Robj {
    let not_written = |path: &str, error: std::io::Error| {
        let reason = format!("the file {path} cannot be written: {error}");
        Failure::new("start_failed").with("reason", reason)
    };
    with_hub(&handle, |hub| {
        let recorded = hub.record_missed(Path::new(missed));
        recorded.map_err(|error| not_written(missed, error))?;
        let recorded = hub.record_seeds(Path::new(seeds));
        recorded.map_err(|error| not_written(seeds, error))
    })
}

/// Writes the random number state `seed`, with which a worker is to begin that has not joined yet, to the file of
/// hub_record().
/// @noRd
#[extendr]
fn hub_record_first_seed(handle: Robj, rank: i32, seed: &[i32]) -> Robj {
    with_hub(&handle, |hub| {
        let bytes: Vec<u8> = seed.iter().flat_map(|value| value.to_ne_bytes()).collect();
        if let Some(rank) = u32::try_from(rank)
            .ok()
            .and_then(|rank| rank.checked_sub(1))
        {
            hub.record_first_seed(rank, &bytes);
        }
        Ok(())
    })
}

/// Takes the random number states of workers of lost hosts from the file `path`. To be called after hub_go().
/// @noRd
#[extendr]
fn hub_take_seeds(handle: Robj, path: &str) -> Robj {
    with_hub(&handle, |hub| {
        hub.take_seeds(Path::new(path)).map_err(|error| {
            let reason = format!("the file {path} cannot be read: {error}");
            Failure::new("start_failed").with("reason", reason)
        })
    })
}

/// Fills the set-up log from the logs of the agents, which have had another head. Returns whether that is done; waits up
/// to one slice for it. `begin`: whether to begin it. `end`: whether to give it up.
/// @noRd
#[extendr]
fn hub_take_over(handle: Robj, begin: bool, end: bool) -> Robj {
    with_hub(&handle, |hub| {
        if begin {
            hub.take_over();
        }
        if end {
            hub.end_take_over();
        }
        Ok(hub.has_taken_over(SLICE))
    })
}

/// Disconnects from the agents, which wait for another head.
/// @noRd
#[extendr]
fn hub_leave(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        hub.leave();
        Ok(())
    })
}

/// Returns the number of workers that are ready; waits up to one slice for more. `tolerant`: whether failed
/// hosts and workers count as done, instead of being an error.
/// @noRd
#[extendr]
fn hub_progress(handle: Robj, tolerant: bool) -> Robj {
    with_hub(&handle, |hub| {
        let failure = match hub.progress(tolerant, SLICE) {
            Progress::Starting { up } => return Ok(up as i32),
            Progress::Up => return Ok(hub.size() as i32),
            Progress::Refused { host, reason } => match reason {
                ToHead::Limits {
                    what,
                    needed,
                    available,
                    remedy,
                } => Failure::new("limits")
                    .with("agent", host + 1)
                    .with("what", what)
                    .with("needed", needed)
                    .with("available", available)
                    .with("reason", remedy),
                ToHead::StartFailed { reason } => Failure::new("start_failed")
                    .with("agent", host + 1)
                    .with("reason", reason),
                _ => Failure::new("start_failed").with("agent", host + 1),
            },
            Progress::HostFailed { host, failure } => Failure::new("start_failed")
                .with("agent", host + 1)
                .with("reason", failure.reason)
                .with("status", failure.status)
                .with("stderr", failure.stderr)
                .with("stdout", failure.stdout),
            Progress::WorkerFailed { rank, failure } => Failure::new("start_failed")
                .with("rank", rank + 1)
                .with(
                    "reason",
                    format!("a worker {} before it was ready", failure.exit),
                )
                .with("stderr", failure.tail),
        };
        Err(failure)
    })
}

/// Leaves out a host, for this reason. With agent 0, leaves out all hosts without a ready worker and, on the
/// other hosts, the workers that are not ready.
/// @noRd
#[extendr]
fn hub_leave_out(handle: Robj, agent: i32, reason: &str) -> Robj {
    with_hub(&handle, |hub| {
        match usize::try_from(agent - 1) {
            Ok(agent) => hub.leave_out(agent, reason.to_owned()),
            Err(_) => hub.leave_out_late(reason),
        }
        Ok(())
    })
}

/// Gives up a host that waits for a batch job, for this reason. Nothing happens if its agent has joined meanwhile.
/// `quiet`: whether the caller reports it.
/// @noRd
#[extendr]
fn hub_give_up_host(handle: Robj, agent: i32, reason: &str, quiet: bool) -> Robj {
    with_hub(&handle, |hub| {
        if let Ok(agent) = usize::try_from(agent - 1) {
            hub.give_up_host(agent, reason.to_owned(), quiet);
        }
        Ok(())
    })
}

/// Returns whether a host is lost and will be reconnected.
/// @noRd
#[extendr]
fn hub_reconnects(handle: Robj, agent: i32) -> Robj {
    with_hub(&handle, |hub| {
        Ok(usize::try_from(agent - 1).is_ok_and(|agent| hub.takes_back(agent)))
    })
}

/// Returns why each worker has terminated: a list of failures, with `NULL` for workers that run.
/// @noRd
#[extendr]
fn hub_terminations(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let termination: Vec<Option<Failure>> = {
            let hub = cluster.hub.borrow();
            let ranks = 0..hub.size() as Rank;
            ranks
                .map(|rank| Some(Failure::termination(rank, &*hub.worker(rank).termination?)))
                .collect()
        };
        let termination = termination
            .into_iter()
            .map(|termination| termination.map_or_else(|| ().into(), Robj::from));
        Ok(List::from_values(termination).into())
    })
}

/// Stops these nodes. The cluster is stopped with its last node.
/// @noRd
#[extendr]
fn hub_stop_nodes(handle: Robj, ranks: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        let mut hub = cluster.hub.borrow_mut();
        let ranks: std::result::Result<Vec<Rank>, Failure> =
            ranks.iter().map(|&rank| rank_of(&hub, rank)).collect();
        hub.stop_workers(&ranks?);
        drop(hub);
        cluster.forget_messages();
        Ok(().into())
    })
}

/// Drains these nodes: they get no new tasks, and are stopped when they have none left.
/// @noRd
#[extendr]
fn hub_drain(handle: Robj, ranks: &[i32]) -> Robj {
    with_hub(&handle, |hub| {
        let ranks: std::result::Result<Vec<Rank>, Failure> =
            ranks.iter().map(|&rank| rank_of(hub, rank)).collect();
        hub.drain(&ranks?);
        Ok(())
    })
}

/// Removes these nodes at once. Other nodes run their tasks.
/// @noRd
#[extendr]
fn hub_remove(handle: Robj, ranks: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        let mut hub = cluster.hub.borrow_mut();
        let ranks: std::result::Result<Vec<Rank>, Failure> =
            ranks.iter().map(|&rank| rank_of(&hub, rank)).collect();
        hub.remove(&ranks?);
        drop(hub);
        cluster.forget_messages();
        Ok(().into())
    })
}

/// Returns whether the processes of these nodes, which have been stopped, have ended; waits up to one slice for
/// that.
/// @noRd
#[extendr]
fn hub_ended(handle: Robj, ranks: &[i32]) -> Robj {
    with_hub(&handle, |hub| {
        let ranks: std::result::Result<Vec<Rank>, Failure> =
            ranks.iter().map(|&rank| rank_of(hub, rank)).collect();
        Ok(hub.have_ended(&ranks?, SLICE))
    })
}

/// Stops the cluster.
/// @noRd
#[extendr]
fn hub_stop(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        hub.stop();
        Ok(())
    })
}

/// Returns whether nothing is left of a stopped cluster; waits up to one slice for that.
/// @noRd
#[extendr]
fn hub_closed(handle: Robj) -> Robj {
    with_hub(&handle, |hub| Ok(hub.is_closed(SLICE)))
}

/// Returns the pid of each worker; NA for workers that have terminated.
/// @noRd
#[extendr]
fn hub_pids(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        let pids = (0..hub.size() as Rank).map(|rank| {
            let worker = hub.worker(rank);
            let pid = worker.pid.filter(|_| worker.termination.is_none());
            pid.map(|pid| pid as i32)
        });
        Ok(pids.collect::<Vec<Option<i32>>>())
    })
}

/// Returns the pid of each agent.
/// @noRd
#[extendr]
fn hub_agent_pids(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        let hosts = hub.hosts();
        let running = |host: &&HostView| host.failure.is_none();
        // For another host, the process that was launched here is ssh.
        let pid = |host: &HostView| host.hello.as_ref().map(|hello| hello.pid).or(host.pid);
        let pids = hosts.iter().filter(running).filter_map(pid);
        Ok(pids.map(|pid| pid as i32).collect::<Vec<i32>>())
    })
}

extendr_module! {
    mod start;
    fn limits_check;
    fn log_start;
    fn hub_start;
    fn hub_listen;
    fn hub_cluster_key;
    fn hub_listen_unix;
    fn hub_greeted;
    fn hub_hosts;
    fn hub_keep_setup_log;
    fn hub_awaited;
    fn hub_go;
    fn hub_add_hosts;
    fn hub_go_more;
    fn hub_added;
    fn hub_are_over;
    fn hub_progress;
    fn hub_follow;
    fn hub_record;
    fn hub_record_first_seed;
    fn hub_take_seeds;
    fn hub_take_over;
    fn hub_leave;
    fn hub_leave_out;
    fn hub_give_up_host;
    fn hub_reconnects;
    fn hub_terminations;
    fn hub_stop_nodes;
    fn hub_drain;
    fn hub_remove;
    fn hub_ended;
    fn hub_stop;
    fn hub_closed;
    fn hub_pids;
    fn hub_agent_pids;
}
