//! The head's functions: a [`Hub`] behind an external pointer.

use crate::failure::Failure;
use crate::job::Job;
use crate::mapped::{self, Written};
use crate::repeat::{LARGE, Repeated, User};
use crate::stream::{self, Format, Sink};
use crate::unwind::{self, Jump};
use crate::{plain, status, unit};
use extendr_api::prelude::*;
use extendr_ffi::{
    INTEGER_ELT, R_CHAR, R_NamesSymbol, REAL_ELT, Rf_getAttrib, Rf_protect, Rf_unprotect,
    SET_VECTOR_ELT, SEXP, SEXPTYPE, STRING_ELT, TYPEOF, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::agent;
use rustcluster_core::hub::{Answer, Begun, Event, HostView, Hub, NO_JOB, Plan, Progress, Turn};
use rustcluster_core::launch::Launch;
use rustcluster_core::platform::limits;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::control::{Outfile, Setback, Start, StartMode, ToHead};
use rustcluster_core::protocol::dedup;
use rustcluster_core::protocol::ids::{JobId, PayloadId, Rank, TaskId};
use rustcluster_core::scheduler::{Gone, MOST_SHARED};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::{Duration, Instant};

/// R's thread waits in slices of this length, and lets R look for interrupts in between.
pub const SLICE: Duration = Duration::from_millis(100);

/// What an external pointer of ours holds. R code that runs while one of its functions is under
/// way may call another: no borrow is held while R may run code.
pub struct Cluster {
    pub hub: RefCell<Hub>,
    /// The last list of nodes that a result was asked for from any of, with each rank's place in
    /// it. Kept alive, so that the same address means the same list: asking again for the same
    /// one, as a verb does once a task, costs nothing however long it is.
    nodes: Cell<Option<(Robj, Vec<u32>)>>,
    /// Buffer for messages of [`plain`].
    plain: Cell<Vec<u8>>,
    /// The last large message that R has sent to a node.
    last: Cell<Option<Repeated>>,
    /// Of each worker, what it is sent that is not plain.
    pub formats: RefCell<Vec<Format>>,
    /// The messages of tasks that have not been answered, to be sent again if need be.
    pub messages: RefCell<HashMap<TaskId, Message>>,
    /// The job that last sent something, and how much it has sent.
    sent_by_job: Cell<(JobId, i32)>,
    /// The job that is open, if it is one of ours and not a verb of parallel's.
    pub job: RefCell<Option<Box<Job>>>,
    /// Seconds that the way to a worker and back takes, as far as jobs have found out.
    pub ways: RefCell<HashMap<Rank, f64>>,
    /// What the tasks of the last job had in common, by its serialized form, if that is short.
    common: Cell<Option<(u128, PayloadId)>>,
    /// Payloads, each with the job that it goes with.
    payloads: RefCell<Vec<(JobId, PayloadId)>>,
    /// An answer that R has been told of, and is to take with [`hub_read`].
    unread: Cell<Option<Unread>>,
    /// What hub_called() is to tell.
    called: Cell<Option<Called>>,
    /// The job of a verb that is under way without a note of it in R: see [`may_begin`].
    pub begun: Cell<Option<JobId>>,
    /// Calls that were dropped while the hub was in use.
    dropped: RefCell<Vec<TaskId>>,
    /// The task whose answer is being read, or could not be read because R jumped, and the place of its
    /// node.
    pub reading: Cell<Option<(TaskId, i32)>>,
}

/// The body of an answer, its task, the place of its node and the worker that had the task.
struct Unread {
    body: Body,
    task: TaskId,
    place: i32,
    at: Rank,
}

impl Cluster {
    /// Lets go of the messages of tasks that were cancelled.
    fn forget_messages(&self) {
        let mut messages = self.messages.borrow_mut();
        if !messages.is_empty() {
            let hub = self.hub.borrow();
            messages.retain(|&task, _| hub.expects(task));
        }
        drop(messages);
        self.forget_last();
    }

    /// Lets go of the message of a task, and returns it.
    fn forget_message(&self, task: TaskId) -> Option<Message> {
        let mut message = self.messages.borrow_mut().remove(&task)?;
        if message.user.take().is_some() {
            self.forget_last();
        }
        Some(message)
    }

    /// The last large message, if this one may be the same. It is to be given back with
    /// [`Cluster::keep_last`]: R code that runs in between may send others.
    fn take_last(&self, job: JobId, lasts: Option<u64>, message: &Robj) -> Option<Repeated> {
        let last = self.last.take()?;
        if last.may_be(job, lasts, message) {
            return Some(last);
        }
        self.last.set(Some(last));
        None
    }

    /// This is now the last large message.
    fn keep_last(&self, last: Repeated) {
        if let Some(other) = self.last.replace(Some(last)) {
            self.drop_repeated(&other);
        }
        self.forget_last();
    }

    /// Lets go of the last large message if no task has it any more.
    fn forget_last(&self) {
        match self.last.take() {
            Some(last) if !last.is_used() => self.drop_repeated(&last),
            last => self.last.set(last),
        }
    }

    fn drop_repeated(&self, repeated: &Repeated) {
        for id in repeated.payloads() {
            self.hub.borrow_mut().drop_payload(id);
        }
    }

    /// Lets go of the payloads of a job.
    fn drop_payloads(&self, job: JobId) {
        self.payloads.borrow_mut().retain(|&(other, id)| {
            if other == job {
                self.hub.borrow_mut().drop_payload(id);
            }
            other != job
        });
    }

    /// Cancels the calls that were dropped.
    fn forget_dropped(&self, hub: &mut Hub) {
        for task in self.dropped.take() {
            hub.forget_call(task);
        }
    }

    /// What a worker is sent that is not plain.
    pub fn format(&self, rank: Rank) -> Format {
        let formats = self.formats.borrow();
        formats.get(rank as usize).copied().unwrap_or_default()
    }

    /// A task has been sent; its message is kept for as long as it is outstanding.
    fn sent(&self, task: TaskId, mut message: Message) {
        message.index = match self.sent_by_job.get() {
            (last, index) if last == message.job => index + 1,
            _ => 1,
        };
        self.sent_by_job.set((message.job, message.index));
        self.messages.borrow_mut().insert(task, message);
    }
}

/// A message as payloads, one for each format that it was sent in.
#[derive(Clone, Copy, Default)]
pub struct Shared {
    native: Option<PayloadId>,
    xdr: Option<PayloadId>,
}

impl Shared {
    /// As this payload alone.
    pub fn of_one(format: Format, id: PayloadId) -> Shared {
        let mut shared = Shared::default();
        shared.set(format, id);
        shared
    }

    fn of(&self, format: Format) -> Option<PayloadId> {
        match format {
            Format::Native => self.native,
            Format::Xdr => self.xdr,
        }
    }

    fn set(&mut self, format: Format, id: PayloadId) {
        match format {
            Format::Native => self.native = Some(id),
            Format::Xdr => self.xdr = Some(id),
        }
    }
}

/// A message for as long as its task is outstanding.
pub struct Message {
    /// As it came from R, which shares its values: it costs no memory of its own.
    message: Robj,
    /// The worker that R gave it to.
    owner: Rank,
    job: JobId,
    /// Which of the job's tasks it is, from 1.
    pub index: i32,
    lasts: Option<u64>,
    /// All of it, where its worker's host has it.
    shared: Shared,
    /// It is the last large message, or has been.
    user: Option<User>,
}

/// Why a message has not been sent.
pub enum Unsent {
    Jump(Jump),
    Failure(Failure),
}

impl From<Jump> for Unsent {
    fn from(jump: Jump) -> Unsent {
        Unsent::Jump(jump)
    }
}

impl From<Failure> for Unsent {
    fn from(failure: Failure) -> Unsent {
        Unsent::Failure(failure)
    }
}

impl From<Unsent> for Robj {
    fn from(unsent: Unsent) -> Robj {
        match unsent {
            Unsent::Jump(Jump(token)) => token,
            Unsent::Failure(failure) => failure.into(),
        }
    }
}

/// No place in a list of nodes.
const ABSENT: u32 = u32::MAX;

/// Runs `body` with the cluster behind `handle`, if it can be used.
pub fn with_cluster(
    handle: &Robj,
    body: impl FnOnce(&Cluster) -> std::result::Result<Robj, Failure>,
) -> Robj {
    usable(handle).and_then(body).unwrap_or_else(Robj::from)
}

/// The cluster behind `handle`, if it can be used.
fn usable(handle: &Robj) -> std::result::Result<&Cluster, Failure> {
    let cluster = cluster_of(handle)?;
    let hub = cluster.hub.try_borrow_mut();
    let mut hub = hub.map_err(|_| Failure::new("busy"))?;
    if hub.is_forked() {
        return Err(Failure::new("forked"));
    }
    cluster.forget_dropped(&mut hub);
    Ok(cluster)
}

fn cluster_of(handle: &Robj) -> std::result::Result<&Cluster, Failure> {
    let restored = || Failure::new("restored");
    if !handle.is_external_pointer() {
        return Err(restored());
    }
    // Nil after it has been saved and loaded.
    let pointer: &ExternalPtr<Cluster> = handle.try_into().map_err(|_| restored())?;
    pointer.try_addr().map_err(|_| restored())
}

/// Nobody has the object of a call any more. R runs finalizers whenever something is allocated, and so also
/// while the hub is in use here: then the call is cancelled at the next use.
pub fn drop_call(handle: &Robj, task: TaskId) -> Robj {
    let dropped = || -> std::result::Result<Robj, Failure> {
        let cluster = cluster_of(handle)?;
        let hub = cluster.hub.try_borrow_mut();
        if hub.as_ref().is_ok_and(|hub| hub.is_forked()) {
            return Err(Failure::new("forked"));
        }
        cluster.dropped.borrow_mut().push(task);
        if let Ok(mut hub) = hub {
            cluster.forget_dropped(&mut hub);
        }
        Ok(().into())
    };
    dropped().unwrap_or_else(Robj::from)
}

/// As [`with_cluster`], for what needs the hub alone. It is not in use any more when R makes the result.
fn with_hub<T: Into<Robj>>(
    handle: &Robj,
    body: impl FnOnce(&mut Hub) -> std::result::Result<T, Failure>,
) -> Robj {
    with_cluster(handle, |cluster| {
        let result = body(&mut cluster.hub.borrow_mut())?;
        Ok(result.into())
    })
}

/// A rank of R's, from 1, as one of ours.
pub fn rank_of(hub: &Hub, rank: i32) -> std::result::Result<Rank, Failure> {
    match usize::try_from(rank) {
        Ok(rank) if (1..=hub.size()).contains(&rank) => Ok(rank as Rank - 1),
        _ => Err(Failure::new("bad_argument")
            .with("argument", "node")
            .with("reason", format!("rank {rank} of {}", hub.size()))),
    }
}

fn strings(value: &Robj) -> Vec<String> {
    let all = value.as_str_vector().unwrap_or_default();
    all.into_iter().map(str::to_owned).collect()
}

/// Checks the system's limits for a number of workers on this machine.
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

/// Starts the agents of a cluster and returns its handle at once. `hosts`: a list with an element
/// for each, each a list of host, command, env (named; NA removes). `buffer_limit`: bytes of results
/// that are buffered here before they are left on their hosts.
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
    let hello = agent::hello(package, r_version, platform);
    match Hub::start(hosts, hello, buffer_limit as usize) {
        Ok(mut hub) => {
            hub.measure_with(unit::measure);
            let cluster = Cluster {
                hub: RefCell::new(hub),
                nodes: Cell::new(None),
                plain: Cell::default(),
                last: Cell::new(None),
                called: Cell::new(None),
                begun: Cell::new(None),
                formats: RefCell::default(),
                messages: RefCell::default(),
                sent_by_job: Cell::new((NO_JOB, 0)),
                job: RefCell::new(None),
                ways: RefCell::default(),
                common: Cell::new(None),
                payloads: RefCell::default(),
                unread: Cell::new(None),
                dropped: RefCell::default(),
                reading: Cell::new(None),
            };
            ExternalPtr::new(cluster).into()
        }
        Err(error) => Failure::new("start_failed").with("reason", error).into(),
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
    let env = fields.get("env")?;
    let names = env.names().into_iter().flatten().map(str::to_owned);
    let values = env.as_str_vector().unwrap_or_default();
    let env = names.zip(values).map(|(name, value)| {
        let value = (!value.is_na()).then(|| value.into());
        (name.into(), value)
    });
    let command = strings(fields.get("command")?);
    Some(Launch {
        host: fields.get("host")?.as_str()?.to_owned(),
        command: command.into_iter().map(Into::into).collect(),
        env: env.collect(),
    })
}

/// Whether all agents have greeted or failed; waits a little for that.
/// @noRd
#[extendr]
fn hub_greeted(handle: Robj) -> Robj {
    with_hub(&handle, |hub| Ok(hub.greeted(SLICE)))
}

/// What is known of each host: a list of vectors with an element for each.
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
            hostname = text(&|h| Some(h.hello.as_ref()?.hostname.clone())),
            r_version = text(&|h| Some(h.hello.as_ref()?.r_version.clone())),
            platform = text(&|h| Some(h.hello.as_ref()?.platform.clone())),
            big_endian = number(&|h| Some(f64::from(u8::from(h.hello.as_ref()?.big_endian)))),
            cores = number(&|h| Some(h.hello.as_ref()?.cores.into())),
            memory = number(&|h| Some(h.hello.as_ref()?.memory_total as f64)),
            available = number(&|h| Some(h.hello.as_ref()?.memory_available as f64)),
            greeted = number(&|h| Some(h.greeted?.as_secs_f64())),
            up = number(&|h| Some(h.up?.as_secs_f64())),
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

/// Hosts that are lost are to be taken back. What lasts on their workers is held in a file that is
/// made at `path`, up to `most` bytes. `patience`: seconds that a host may take to start then.
/// @noRd
#[extendr]
fn hub_reconnect(handle: Robj, path: &str, most: f64, patience: f64) -> Robj {
    with_hub(&handle, |hub| {
        let patience = Duration::try_from_secs_f64(patience).unwrap_or(Duration::MAX);
        let made = hub.reconnect(Path::new(path), most as u64, patience);
        made.map_err(|error| Failure::new("start_failed").with("reason", error))
    })
}

/// Tells each agent what to start. `plans`: a list with an element for each, `NULL` for one that
/// is to end, or a list of ranks, packages, outfile, renice, mode, spawn, patience (in milliseconds),
/// keep, state and memory_limit (in bytes; 0 for no limit), timeout (of tasks, in milliseconds; 0 for
/// none), setup (of replaced workers, likewise), stop_timeout (in milliseconds), here (on this machine) and xdr.
/// @noRd
#[extendr]
fn hub_go(handle: Robj, plans: List) -> Robj {
    let parsed: Option<Vec<Option<(Plan, Format)>>> = plans
        .values()
        .map(|plan| match plan.is_null() {
            true => Some(None),
            false => plan_of(&plan).map(Some),
        })
        .collect();
    let Some(plans) = parsed else {
        return not_a_description("plans");
    };
    let mut formats = Vec::new();
    for (plan, format) in plans.iter().flatten() {
        for &rank in &plan.ranks {
            formats.resize(formats.len().max(rank as usize + 1), Format::Native);
            formats[rank as usize] = *format;
        }
    }
    let plans = plans.into_iter().map(|plan| Some(plan?.0)).collect();
    with_cluster(&handle, |cluster| {
        cluster.formats.replace(formats);
        let gone = cluster.hub.borrow_mut().go(plans);
        gone.map_err(|error| Failure::new("start_failed").with("reason", error))?;
        Ok(().into())
    })
}

/// Whether this session may open the files that results in shared memory come in.
fn has_files() -> bool {
    limits::open_files_left().is_some_and(|left| left >= 2 * MOST_SHARED as u64)
}

fn plan_of(plan: &Robj) -> Option<(Plan, Format)> {
    let fields: HashMap<&str, Robj> = plan.as_list()?.iter().collect();
    let ranks = fields.get("ranks")?.as_integer_vector()?;
    let start = Start {
        workers: ranks.len() as u32,
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
        patience: u32::try_from(fields.get("patience")?.as_integer()?).ok()?,
        keep: fields.get("keep")?.as_real()? as u64,
        state: fields.get("state")?.as_real()? as u64,
        timeout: fields.get("timeout")?.as_real()? as u64,
        setup: fields.get("setup")?.as_real()? as u64,
        memory_limit: fields.get("memory_limit")?.as_real()? as u64,
        stop_timeout: fields.get("stop_timeout")?.as_real()? as u64,
        here: fields.get("here")?.as_bool()? && has_files(),
    };
    let format = match fields.get("xdr")?.as_bool()? {
        true => Format::Xdr,
        false => Format::Native,
    };
    let ranks = ranks.into_iter().map(|rank| (rank - 1) as Rank).collect();
    Some((Plan { start, ranks }, format))
}

/// How far a start has come: the number of workers up, waiting a little for more. `tolerant`: what
/// has failed counts as done, and is not an error.
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
                .with(
                    "status",
                    failure.status.map_or_else(String::new, |s| s.to_string()),
                )
                .with("stderr", failure.stderr)
                .with("stdout", failure.stdout),
            Progress::WorkerFailed { rank, loss } => Failure::new("start_failed")
                .with("rank", rank + 1)
                .with(
                    "reason",
                    format!("a worker {} before it was ready", loss.exit),
                )
                .with("stderr", loss.tail),
        };
        Err(failure)
    })
}

/// Leaves out a host for this reason; 0: all hosts of which no worker has come up, and elsewhere the workers
/// that have not.
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

/// Whether a host is lost and is going to be tried again.
/// @noRd
#[extendr]
fn hub_takes_back(handle: Robj, agent: i32) -> Robj {
    with_hub(&handle, |hub| {
        Ok(usize::try_from(agent - 1).is_ok_and(|agent| hub.takes_back(agent)))
    })
}

/// Why each worker is gone: a list of failures, `NULL` for those that are not gone.
/// @noRd
#[extendr]
fn hub_gone(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let gone: Vec<Option<Failure>> = {
            let hub = cluster.hub.borrow();
            let ranks = 0..hub.size() as Rank;
            ranks
                .map(|rank| Some(Failure::gone(rank, &*hub.worker(rank).gone?)))
                .collect()
        };
        let gone = gone
            .into_iter()
            .map(|gone| gone.map_or_else(|| ().into(), Robj::from));
        Ok(List::from_values(gone).into())
    })
}

/// The hub as R's serialization writes to it.
pub struct ToHub<'a>(pub &'a Cluster);

impl Sink for ToHub<'_> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.0.hub.borrow_mut().write(bytes)
    }

    fn wait(&mut self) -> bool {
        self.0.hub.borrow_mut().wait_to_send(SLICE)
    }
}

/// Whether a message may be sent. Code that R runs while it serializes one, a finalizer say, may send none: the
/// first one would be lost.
pub fn may_send(cluster: &Cluster) -> std::result::Result<(), Failure> {
    match cluster.hub.borrow().is_writing() {
        true => Err(Failure::new("busy")),
        false => Ok(()),
    }
}

/// Whether a verb may send its first message. A finalizer that R runs in the middle of another verb would take that one's
/// answers. A verb that takes longer is noted in R, which then refuses others by itself.
pub fn may_begin(cluster: &Cluster) -> std::result::Result<(), Failure> {
    match cluster.begun.get() {
        Some(job) => Err(Failure::new("busy").with("begun", job)),
        None => may_send(cluster),
    }
}

/// Sends a message to a node. `lasts`: `NULL`, or that what it does there lasts, and the name of what
/// it sets there (`""`: of nothing in particular).
/// @noRd
#[extendr]
fn hub_send(handle: Robj, rank: i32, job: f64, message: Robj, lasts: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        may_begin(cluster)?;
        let owner = rank_of(&cluster.hub.borrow(), rank)?;
        let job = job as JobId;
        let lasts = lasts.as_str().map(name_of);
        let sent = send_to_node(cluster, owner, job, &message, lasts);
        Ok(sent.map_or_else(Robj::from, |()| ().into()))
    })
}

/// Sends a message to a node, as a payload if it is the same as the last one.
fn send_to_node(
    cluster: &Cluster,
    owner: Rank,
    job: JobId,
    message: &Robj,
    lasts: Option<u64>,
) -> std::result::Result<(), Unsent> {
    let mut last = cluster.take_last(job, lasts, message);
    let shared = match &mut last {
        Some(same) => same.share(cluster, owner, message).map_err(Unsent::from),
        None => Ok(None),
    };
    let sent = shared.and_then(|shared| {
        if shared.is_none() {
            if let Some(changed) = last.take() {
                cluster.drop_repeated(&changed);
            }
        }
        send(
            cluster,
            owner,
            job,
            message,
            lasts,
            shared.unwrap_or_default(),
        )
    });
    let sent = sent.map(|(task, bytes)| {
        if last.is_none() && bytes >= LARGE {
            last = Some(Repeated::new(job, lasts, message));
        }
        if let Some(message) = cluster.messages.borrow_mut().get_mut(&task) {
            message.user = last.as_ref().map(Repeated::user);
        }
    });
    if let Some(last) = last {
        cluster.keep_last(last);
    }
    sent
}

/// Sends a message to a node, as a payload if its host has it. Returns its task, and how many bytes R has
/// serialized for it alone.
fn send(
    cluster: &Cluster,
    owner: Rank,
    job: JobId,
    message: &Robj,
    lasts: Option<u64>,
    shared: Shared,
) -> std::result::Result<(TaskId, usize), Unsent> {
    let payload = |place| shared.of(cluster.format(place));
    let begun = cluster
        .hub
        .borrow_mut()
        .begin(owner, job, lasts, Turn::Last, payload);
    let begun = begun.map_err(|gone| Failure::gone(owner, &gone))?;
    let bytes = write(cluster, &begun, message)?;
    let message = Message {
        message: message.clone(),
        owner,
        job,
        index: 0,
        lasts,
        shared,
        user: None,
    };
    cluster.sent(begun.task, message);
    Ok((begun.task, bytes))
}

/// What hub_call() has had of answers when it stopped to wait.
struct Called {
    values: Robj,
    there: Vec<bool>,
    next: Robj,
}

/// Sends the same message to nodes, in this order, and waits a little for their answers. Returns a list of
/// their values: the job is closed then, no code of R's has run, and no interrupt has been heeded. `NULL`, and nothing
/// has been done: the nodes are of several clusters, or some are there twice. `TRUE`: hub_called() tells what is there.
/// @noRd
#[extendr]
fn hub_call(handle: Robj, nodes: Robj, job: f64, message: Robj, lasts: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        may_begin(cluster)?;
        let Ok(ranks) = ranks_of(&nodes) else {
            return Ok(().into());
        };
        let mut places = vec![ABSENT; cluster.hub.borrow().size()];
        let mut owners = Vec::with_capacity(ranks.len());
        for (at, &rank) in ranks.iter().enumerate() {
            let owner = rank_of(&cluster.hub.borrow(), rank)?;
            let place = &mut places[owner as usize];
            if *place != ABSENT {
                return Ok(().into());
            }
            *place = at as u32;
            owners.push(owner);
        }
        let job = job as JobId;
        let lasts = lasts.as_str().map(name_of);
        cluster.begun.set(Some(job));
        if let Err(unsent) = broadcast(cluster, &owners, job, &message, lasts) {
            return Ok(unsent.into());
        }
        let began = Instant::now();
        let mut called = Called {
            values: List::new(owners.len()).into(),
            there: vec![false; owners.len()],
            next: ().into(),
        };
        let mut missing = owners.len();
        // R then looks for interrupts.
        while missing > 0 && called.next.is_null() && began.elapsed() < SLICE {
            let answer = {
                let mut hub = cluster.hub.borrow_mut();
                hub.receive_any(|rank| places[rank as usize] != ABSENT, SLICE)
            };
            match answered(cluster, answer, |rank| places[rank as usize] as i32 + 1) {
                Ok(answer) => match take_value(&answer, &mut called) {
                    true => missing -= 1,
                    false => called.next = answer,
                },
                Err(failure) => called.next = failure.into(),
            }
        }
        if missing == 0 && !cluster.hub.borrow().has_events() {
            close_job(cluster, job);
            return Ok(called.values);
        }
        cluster.called.set(Some(called));
        Ok(true.into())
    })
}

/// Puts the value of an answer that was read with its place among the others. Returns whether it is one.
fn take_value(answer: &Robj, called: &mut Called) -> bool {
    // SAFETY: on R's thread, with live values; `values` is ours alone, and as long as `there`. Types and lengths are
    // looked at first.
    unsafe {
        let list =
            |value: SEXP, least| TYPEOF(value) == SEXPTYPE::VECSXP && XLENGTH(value) >= least;
        let answer = answer.get();
        if !list(answer, 2) || !list(VECTOR_ELT(answer, 1), 2) {
            return false;
        }
        let place = VECTOR_ELT(answer, 0);
        if TYPEOF(place) != SEXPTYPE::INTSXP || XLENGTH(place) != 1 {
            return false;
        }
        let at = INTEGER_ELT(place, 0) - 1;
        let Some(there) = usize::try_from(at)
            .ok()
            .and_then(|at| called.there.get_mut(at))
        else {
            return false;
        };
        *there = true;
        // After its type.
        SET_VECTOR_ELT(
            called.values.get(),
            at as isize,
            VECTOR_ELT(VECTOR_ELT(answer, 1), 1),
        );
        true
    }
}

/// What hub_call() has had of answers: a list of their values; of which nodes these are there; and what came that is no
/// answer, as hub_receive_any() returns it, or `NULL`.
/// @noRd
#[extendr]
fn hub_called(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        cluster.begun.set(None);
        Ok(match cluster.called.take() {
            Some(called) => list!(called.values, called.there, called.next).into(),
            None => ().into(),
        })
    })
}

fn broadcast(
    cluster: &Cluster,
    owners: &[Rank],
    job: JobId,
    message: &Robj,
    lasts: Option<u64>,
) -> std::result::Result<(), Unsent> {
    let mut shared = Shared::default();
    if owners.len() > 1 {
        shared = share(cluster, owners, job, message, lasts.is_some())?;
    }
    for &owner in owners {
        send(cluster, owner, job, message, lasts, shared)?;
    }
    Ok(())
}

/// Sends a message that is not plain to the hosts of these workers, as a payload for each format.
fn share(
    cluster: &Cluster,
    owners: &[Rank],
    job: JobId,
    message: &Robj,
    lasts: bool,
) -> std::result::Result<Shared, Jump> {
    let mut shared = Shared::default();
    for format in [Format::Native, Format::Xdr] {
        let of_format = owners.iter().copied();
        let of_format = of_format.filter(|&owner| cluster.format(owner) == format);
        let ranks: Vec<Rank> = of_format.collect();
        let plain = format == Format::Native && is_plain(cluster, message)?;
        if ranks.len() < 2 || plain {
            continue;
        }
        let write = |hub: &mut ToHub<'_>| write_payload(message, format, hub);
        let (id, ()) = make_payload(cluster, &ranks, lasts, write)?;
        cluster.payloads.borrow_mut().push((job, id));
        shared.set(format, id);
    }
    Ok(shared)
}

/// Writes a message as a payload of this format.
///
/// # Errors
/// When R jumped: what was written by then is incomplete.
pub fn write_payload(
    message: &Robj,
    format: Format,
    sink: &mut dyn Sink,
) -> std::result::Result<(), Jump> {
    match format {
        Format::Native => mapped::serialize(message, sink).map(drop),
        Format::Xdr => stream::serialize(message, format, sink).map(drop),
    }
}

/// Sends to the hosts of these workers what `write` writes, as a payload. Returns that and what `write`
/// does. `lasts`: what some messages that begin with it do lasts.
///
/// # Errors
/// When R jumped: there is no payload then.
pub fn make_payload<T>(
    cluster: &Cluster,
    ranks: &[Rank],
    lasts: bool,
    write: impl FnOnce(&mut ToHub<'_>) -> std::result::Result<T, Jump>,
) -> std::result::Result<(PayloadId, T), Jump> {
    let id = cluster.hub.borrow_mut().begin_payload(ranks, lasts);
    match write(&mut ToHub(cluster)) {
        Ok(value) => {
            cluster.hub.borrow_mut().finish_payload();
            Ok((id, value))
        }
        Err(jump) => {
            cluster.hub.borrow_mut().abandon();
            Err(jump)
        }
    }
}

/// What a job's tasks have in common is kept from job to job up to this size.
const SMALL: usize = 64 * 1024;

/// Sends what the tasks of a job have in common to the hosts of these workers.
///
/// # Errors
/// When R jumped.
pub fn share_common(
    cluster: &Cluster,
    ranks: &[Rank],
    job: JobId,
    common: &Robj,
) -> std::result::Result<(PayloadId, Written), Jump> {
    let short = match stream::least_size(common) <= SMALL {
        true => stream::serialize_short(common, SMALL)?,
        false => None,
    };
    let written = |(bytes, fixed): &(Vec<u8>, bool)| Written {
        fixed: *fixed,
        bytes: bytes.len() as u64,
    };
    let key = short.as_ref().map(|(bytes, _)| dedup::key_of(bytes));
    if let (Some(short), Some((last, id))) = (&short, cluster.common.get()) {
        let has = |&rank: &Rank| cluster.hub.borrow().has_payload(rank, id);
        if key == Some(last) && ranks.iter().all(has) {
            return Ok((id, written(short)));
        }
    }
    let (id, written) = make_payload(cluster, ranks, false, |sink| match short {
        Some(short) => {
            sink.write(&short.0);
            Ok(written(&short))
        }
        None => mapped::serialize(common, sink),
    })?;
    match key {
        Some(key) => {
            if let Some((_, last)) = cluster.common.replace(Some((key, id))) {
                cluster.hub.borrow_mut().drop_payload(last);
            }
        }
        None => cluster.payloads.borrow_mut().push((job, id)),
    }
    Ok((id, written))
}

/// Sends it once more, to the host of this worker, which does not have it.
///
/// # Errors
/// When R jumped.
pub fn share_again(
    cluster: &Cluster,
    id: PayloadId,
    place: Rank,
    common: &Robj,
) -> std::result::Result<(), Jump> {
    cluster.hub.borrow_mut().begin_payload_again(id, place);
    mapped::serialize(common, &mut ToHub(cluster))?;
    cluster.hub.borrow_mut().finish_payload();
    Ok(())
}

/// Writes a message to the hub, where its task has begun. Returns how many bytes R has serialized for that:
/// none for a plain one, or if it is a payload.
fn write(cluster: &Cluster, begun: &Begun, message: &Robj) -> std::result::Result<usize, Jump> {
    let written = match begun.shared {
        // The payload is all of it.
        true => Ok(0),
        false => write_all(cluster, begun.place, message),
    };
    let mut hub = cluster.hub.borrow_mut();
    match written {
        Ok(_) => hub.finish(),
        Err(_) => hub.abandon(),
    }
    written
}

fn write_all(cluster: &Cluster, place: Rank, message: &Robj) -> std::result::Result<usize, Jump> {
    let format = cluster.format(place);
    if send_plain(cluster, format, message)? {
        return Ok(0);
    }
    let mut sink = Counting {
        hub: ToHub(cluster),
        bytes: 0,
    };
    stream::serialize(message, format, &mut sink)?;
    Ok(sink.bytes)
}

/// The hub, and how many bytes have been written to it.
struct Counting<'a> {
    hub: ToHub<'a>,
    bytes: usize,
}

impl Sink for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.bytes += bytes.len();
        self.hub.write(bytes)
    }

    fn wait(&mut self) -> bool {
        self.hub.wait()
    }
}

/// A number for the name of what a message sets; 0 for none.
fn name_of(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    if name.is_empty() {
        0
    } else {
        hasher.finish().max(1)
    }
}

/// Sends a task again that was lost.
/// @noRd
#[extendr]
fn hub_try_again(handle: Robj, task: f64) -> Robj {
    let task = task as TaskId;
    with_cluster(&handle, |cluster| {
        let (message, owner, lasts, shared) = match cluster.messages.borrow().get(&task) {
            Some(m) => (m.message.clone(), m.owner, m.lasts, m.shared),
            None => return Err(Failure::new("no_task")),
        };
        let payload = |place| shared.of(cluster.format(place));
        let begun = cluster
            .hub
            .borrow_mut()
            .try_again(owner, task, lasts, payload);
        let begun = begun.map_err(|(place, gone)| Failure::gone(place, &gone))?;
        let written = write(cluster, &begun, &message).map_err(Unsent::from);
        Ok(written.map_or_else(Robj::from, |_| ().into()))
    })
}

/// A task that was lost is not tried again: who asks for its answer is told so.
/// @noRd
#[extendr]
fn hub_give_up(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let task = task as TaskId;
        if let Some(message) = cluster.messages.borrow().get(&task) {
            cluster.hub.borrow_mut().give_up(message.owner, task);
        }
        Ok(().into())
    })
}

/// Nobody wants to know any more what became of a task that was lost.
/// @noRd
#[extendr]
fn hub_forget(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let task = task as TaskId;
        if let Some(message) = cluster.forget_message(task) {
            cluster.hub.borrow_mut().forget(message.owner, task);
        }
        Ok(().into())
    })
}

/// The message of a task that ended without an answer. `last`: it is not asked for again.
/// @noRd
#[extendr]
fn hub_message(handle: Robj, task: f64, last: bool) -> Robj {
    with_cluster(&handle, |cluster| {
        let task = task as TaskId;
        let message = match last {
            true => cluster.forget_message(task).map(|known| known.message),
            false => {
                let messages = cluster.messages.borrow();
                messages.get(&task).map(|known| known.message.clone())
            }
        };
        message.ok_or_else(|| Failure::new("no_task"))
    })
}

/// Writes a message to the hub if it is plain. Returns whether it is.
pub fn send_plain(
    cluster: &Cluster,
    format: Format,
    message: &Robj,
) -> std::result::Result<bool, Jump> {
    if format != Format::Native {
        return Ok(false);
    }
    with_plain(cluster, message, |bytes| {
        cluster.hub.borrow_mut().write(bytes);
    })
}

fn is_plain(cluster: &Cluster, message: &Robj) -> std::result::Result<bool, Jump> {
    with_plain(cluster, message, |_| ())
}

/// Runs `then` with the bytes of a message that is plain. Returns whether it is.
fn with_plain(
    cluster: &Cluster,
    message: &Robj,
    then: impl FnOnce(&[u8]),
) -> std::result::Result<bool, Jump> {
    let mut bytes = cluster.plain.take();
    let written = plain::write_task(message, &mut bytes);
    if let Ok(true) = written {
        then(&bytes);
    }
    cluster.plain.set(bytes);
    written
}

/// An answer as `recvData()` gives it, not protected. `shared`: its vectors are in the memory that is
/// being read, see [`mapped::Reading`].
///
/// # Safety
/// Under [`unwind::protect`]: R may jump.
pub unsafe fn read_body(body: &mut Body, shared: bool) -> SEXP {
    // SAFETY: the caller's; this frame holds nothing that is to be dropped.
    unsafe {
        match body.whole().filter(|bytes| plain::is_plain(bytes)) {
            _ if shared => mapped::unwrap(stream::read(body)),
            Some(bytes) => plain::read_answer(bytes),
            None => stream::read(body),
        }
    }
}

/// An answer as `recvData()` gives it; with a node's place, from 1 and not 0, as `recvOneData()` does.
///
/// # Errors
/// When R jumped.
pub fn read_answer(mut body: Body, place: i32) -> std::result::Result<Robj, Jump> {
    struct Reading<'a> {
        body: &'a mut Body,
        shared: bool,
        place: i32,
    }
    unsafe extern "C" fn read(data: *mut c_void) -> SEXP {
        // SAFETY: `data` is the reading below, which outlives this call. This frame holds nothing
        // that is to be dropped when R jumps.
        unsafe {
            let reading = data.cast::<Reading<'_>>();
            let answer = read_body((*reading).body, (*reading).shared);
            if (*reading).place == 0 {
                return answer;
            }
            let answer = Rf_protect(answer);
            let placed = rustcluster_placed((*reading).place, answer.cast());
            Rf_unprotect(1);
            placed
        }
    }
    let memory = mapped::open(&mut body);
    let mut reading = Reading {
        body: &mut body,
        shared: memory.is_some(),
        place,
    };
    let _reading = mapped::Reading::of(memory.as_ref());
    unwind::protect(read, &mut reading)
}

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_placed(place: c_int, answer: *mut c_void) -> SEXP;
}

/// The answer of a node to the oldest message sent to it. `TRUE`: it is there, and to be taken with
/// hub_read().
/// @noRd
#[extendr]
fn hub_receive(handle: Robj, rank: i32) -> Robj {
    with_cluster(&handle, |cluster| {
        let answer = {
            let mut hub = cluster.hub.borrow_mut();
            let rank = rank_of(&hub, rank)?;
            hub.receive(rank, SLICE)
        };
        answered(cluster, answer, |_| 0)
    })
}

/// What became of the worker that had a task.
pub fn loss(cluster: &Cluster, place: Rank, gone: &Gone) -> Failure {
    match gone {
        Gone::Worker(loss) => {
            let now = cluster.hub.borrow().worker(place).gone;
            let last = match now.as_deref() {
                Some(Gone::Worker(last)) => last.setback,
                _ => Setback::default(),
            };
            Failure::lost(place, loss, last).with("replaced", now.is_none())
        }
        gone => Failure::gone(place, gone),
    }
}

/// What R gets of an answer: with the place of its node, or without if that is 0.
fn answered(
    cluster: &Cluster,
    answer: Answer,
    place: impl Fn(Rank) -> i32,
) -> std::result::Result<Robj, Failure> {
    let ended = |failure: Failure, rank: Rank, task: TaskId| {
        let messages = cluster.messages.borrow();
        let index = messages.get(&task).map_or(0, |message| message.index);
        Err(failure
            .with("place", place(rank))
            .with("task", task)
            .with("index", index))
    };
    let of_rank = |kind: &str, rank: Rank| Failure::new(kind).with("rank", rank + 1);
    match answer {
        Answer::Ready {
            rank,
            place: at,
            task,
            body,
        } => {
            let place = place(rank);
            let unread = Unread {
                body,
                task,
                place,
                at,
            };
            if unread.body.whole().is_some_and(plain::is_plain) {
                return Ok(take_answer(cluster, unread));
            }
            // R is asked to have a handler for what may go wrong with the others, which costs more than
            // all else that it does for a plain one.
            cluster.unread.set(Some(unread));
            Ok(true.into())
        }
        Answer::Lost {
            rank,
            place,
            task,
            gone,
        } => ended(loss(cluster, place, &gone), rank, task),
        Answer::TimedOut { rank, task } => ended(of_rank("timeout", rank), rank, task),
        Answer::Recalled { rank, task } => ended(of_rank("recalled", rank), rank, task),
        Answer::GivenUp { rank, task } => ended(of_rank("task_failed", rank), rank, task),
        Answer::Pending => Ok(().into()),
        Answer::NothingSent => Err(Failure::new("no_task")),
    }
}

fn take_answer(cluster: &Cluster, unread: Unread) -> Robj {
    let Unread {
        body,
        task,
        place,
        at,
    } = unread;
    cluster.reading.set(Some((task, place)));
    match read_answer(body, place) {
        Ok(answer) => {
            cluster.reading.set(None);
            cluster.forget_message(task);
            status::note_failure(cluster, at, &answer);
            answer
        }
        Err(Jump(token)) => token,
    }
}

/// The number of the task whose answer is being read or could not be read, and the place of its node.
/// `NULL`: there is none.
/// @noRd
#[extendr]
fn hub_reading(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        Ok(match cluster.reading.get() {
            Some((task, place)) => [task as f64, f64::from(place)].into_robj(),
            None => ().into(),
        })
    })
}

/// The answer that hub_receive() or hub_receive_any() has told of.
/// @noRd
#[extendr]
fn hub_read(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let unread = cluster.unread.take();
        Ok(unread.map_or_else(|| ().into(), |unread| take_answer(cluster, unread)))
    })
}

/// The next answer of any of these nodes: a list of its place among them and the answer. `TRUE`: as with
/// hub_receive().
/// @noRd
#[extendr]
fn hub_receive_any(handle: Robj, nodes: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let size = cluster.hub.borrow().size();
        let places = match cluster.nodes.take() {
            // SAFETY: addresses are compared, not used.
            Some((known, places)) if unsafe { known.get() == nodes.get() } => places,
            _ => places_of(&nodes, size)?,
        };
        let place = |rank: Rank| places.get(rank as usize).copied().unwrap_or(ABSENT);
        let answer = {
            let mut hub = cluster.hub.borrow_mut();
            hub.receive_any(|rank| place(rank) != ABSENT, SLICE)
        };
        let result = answered(cluster, answer, |rank| place(rank) as i32);
        cluster.nodes.set(Some((nodes, places)));
        result
    })
}

/// As hub_receive_any(), without waiting, for nodes that may be of several clusters: those of this one
/// have these ranks, and these places in the list of nodes. Of equal ranks the first place counts.
/// @noRd
#[extendr]
fn hub_look(handle: Robj, ranks: &[i32], places: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        let mut of_ranks = vec![ABSENT; cluster.hub.borrow().size()];
        for (&rank, &place) in ranks.iter().zip(places) {
            let rank = rank_of(&cluster.hub.borrow(), rank)?;
            let known = &mut of_ranks[rank as usize];
            *known = (*known).min(place as u32);
        }
        let place = |rank: Rank| of_ranks.get(rank as usize).copied().unwrap_or(ABSENT);
        let answer = {
            let mut hub = cluster.hub.borrow_mut();
            hub.receive_any(|rank| place(rank) != ABSENT, Duration::ZERO)
        };
        answered(cluster, answer, |rank| place(rank) as i32)
    })
}

/// Sleeps a little, or until hub_look() may find something in one of these clusters.
/// @noRd
#[extendr]
fn hubs_wait(handles: List) -> Robj {
    let handles: Vec<Robj> = handles.values().collect();
    let wait = || -> std::result::Result<(), Failure> {
        let mut hubs = Vec::with_capacity(handles.len());
        for handle in &handles {
            let hub = usable(handle)?.hub.try_borrow();
            hubs.push(hub.map_err(|_| Failure::new("busy"))?);
        }
        let hubs: Vec<&Hub> = hubs.iter().map(|hub| &**hub).collect();
        Hub::wait_for_any(&hubs, SLICE);
        Ok(())
    };
    wait().map_or_else(Robj::from, |()| ().into())
}

/// The rank of each of these nodes, if they are all of one cluster.
/// @noRd
#[extendr]
fn cluster_ranks(nodes: Robj) -> Robj {
    match ranks_of(&nodes) {
        Ok(ranks) => ranks.into(),
        Err(failure) => failure.into(),
    }
}

fn ranks_of(nodes: &Robj) -> std::result::Result<Vec<i32>, Failure> {
    let bad = |reason: &str| {
        Failure::new("bad_argument")
            .with("argument", "cl")
            .with("reason", reason)
    };
    let several = || Failure::new("several_clusters");
    // SAFETY: on R's thread, with a live value that nothing changes meanwhile; types and lengths are looked at first,
    // and none of these functions of R's jumps or allocates. Addresses of handles are compared, not used.
    unsafe {
        let list = nodes.get();
        if TYPEOF(list) != SEXPTYPE::VECSXP {
            return Err(bad("not a list of nodes"));
        }
        let mut first = None;
        let rank = |i: isize| {
            let node = VECTOR_ELT(list, i);
            if TYPEOF(node) != SEXPTYPE::VECSXP {
                return Err(bad("not a list of nodes"));
            }
            // Nodes of other packages have no handle.
            let handle = field(node, c"handle").ok_or_else(several)?;
            let own = TYPEOF(handle) == SEXPTYPE::ENVSXP;
            if !own || *first.get_or_insert(handle) != handle {
                return Err(several());
            }
            let rank = field(node, c"rank").filter(|&rank| XLENGTH(rank) == 1);
            Ok(match rank.map(|rank| (TYPEOF(rank), rank)) {
                Some((SEXPTYPE::INTSXP, rank)) => INTEGER_ELT(rank, 0),
                Some((SEXPTYPE::REALSXP, rank)) => REAL_ELT(rank, 0) as i32,
                _ => 0,
            })
        };
        (0..XLENGTH(list)).map(rank).collect()
    }
}

/// The element of this name in a list.
///
/// # Safety
/// On R's thread, with a live list.
unsafe fn field(list: SEXP, name: &CStr) -> Option<SEXP> {
    // SAFETY: the caller's; types and lengths are looked at first.
    unsafe {
        let names = Rf_getAttrib(list, R_NamesSymbol);
        let count = XLENGTH(list);
        if TYPEOF(names) != SEXPTYPE::STRSXP || XLENGTH(names) != count {
            return None;
        }
        let is_named = |&i: &isize| CStr::from_ptr(R_CHAR(STRING_ELT(names, i))) == name;
        (0..count).find(is_named).map(|i| VECTOR_ELT(list, i))
    }
}

/// Each rank's place, from 1, in a list of nodes.
fn places_of(nodes: &Robj, size: usize) -> std::result::Result<Vec<u32>, Failure> {
    let bad = |reason: &str| {
        Failure::new("bad_argument")
            .with("argument", "cl")
            .with("reason", reason)
    };
    let mut places = vec![ABSENT; size];
    for (at, rank) in ranks_of(nodes)?.into_iter().enumerate() {
        match usize::try_from(rank) {
            Ok(rank) if (1..=size).contains(&rank) => {
                let place = &mut places[rank - 1];
                *place = (*place).min(at as u32 + 1);
            }
            _ => return Err(bad("a node's rank is out of range")),
        }
    }
    Ok(places)
}

/// Stops these nodes; with the last ones the cluster.
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

/// Whether the processes of these nodes, which have been stopped, have ended; waits a little for that.
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

/// Whether nothing is left of a stopped cluster; waits a little for that.
/// @noRd
#[extendr]
fn hub_closed(handle: Robj) -> Robj {
    with_hub(&handle, |hub| Ok(hub.is_closed(SLICE)))
}

/// The pid of each worker, NA for those that are gone.
/// @noRd
#[extendr]
fn hub_pids(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        let pids = (0..hub.size() as Rank).map(|rank| {
            let worker = hub.worker(rank);
            let pid = worker.pid.filter(|_| worker.gone.is_none());
            pid.map(|pid| pid as i32)
        });
        Ok(pids.collect::<Vec<Option<i32>>>())
    })
}

/// The pid of each agent.
/// @noRd
#[extendr]
fn hub_agent_pids(handle: Robj) -> Robj {
    with_hub(&handle, |hub| {
        let hosts = hub.hosts();
        let running = |host: &&HostView| host.failure.is_none();
        // What was launched for another host is the ssh to it.
        let pid = |host: &HostView| host.hello.as_ref().map(|hello| hello.pid).or(host.pid);
        let pids = hosts.iter().filter(running).filter_map(pid);
        Ok(pids.map(|pid| pid as i32).collect::<Vec<i32>>())
    })
}

/// What there is to be shown: a list of failures, in the order in which they came, or `NULL`.
/// @noRd
#[extendr]
fn hub_events(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| Ok(events(cluster)))
}

/// Cancels what is left of a job.
pub fn close_job(cluster: &Cluster, job: JobId) {
    cluster.begun.set(None);
    // Nodes hold the handle, which would never be collected.
    cluster.nodes.set(None);
    if let Some(job) = cluster.job.take() {
        cluster.ways.borrow_mut().extend(job.ways());
    }
    cluster.hub.borrow_mut().cancel_job(job);
    cluster.drop_payloads(job);
    cluster.forget_messages();
}

/// Cancels what is left of a job. Returns what there is to be shown.
/// @noRd
#[extendr]
fn hub_close_job(handle: Robj, job: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let job = job as JobId;
        // One that was refused because another is under way has nothing to be closed.
        if cluster.begun.get().is_some_and(|begun| begun != job) {
            return Ok(().into());
        }
        close_job(cluster, job);
        // R was interrupted before it took them.
        cluster.unread.set(None);
        cluster.called.set(None);
        Ok(events(cluster))
    })
}

fn events(cluster: &Cluster) -> Robj {
    let events = cluster.hub.borrow().take_events();
    if events.is_empty() {
        return ().into();
    }
    let shown = events.into_iter().map(|event| match event {
        Event::Replaced { rank } => Failure::new("worker_replaced").with("rank", rank + 1),
        Event::Back { rank } => Failure::new("worker_back").with("rank", rank + 1),
        Event::Lost {
            rank,
            loss,
            replaced,
        } => Failure::lost(rank, &loss, loss.setback).with("replaced", replaced),
        Event::HostLost { agent, reason } => Failure::new("host_failed")
            .with("agent", agent + 1)
            .with("reason", reason),
        Event::HostBack { agent } => Failure::new("host_back").with("agent", agent + 1),
        Event::StopTimedOut { rank } => Failure::new("stop_timeout").with("rank", rank + 1),
        Event::SpoolIncomplete => Failure::new("state_not_kept"),
        Event::StateNotKept { agent } => Failure::new("state_not_kept").with("agent", agent + 1),
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
    mod head;
    fn limits_check;
    fn hub_start;
    fn hub_greeted;
    fn hub_hosts;
    fn hub_reconnect;
    fn hub_go;
    fn hub_takes_back;
    fn hub_progress;
    fn hub_leave_out;
    fn hub_gone;
    fn hub_send;
    fn hub_call;
    fn hub_called;
    fn hub_try_again;
    fn hub_give_up;
    fn hub_forget;
    fn hub_message;
    fn hub_receive;
    fn hub_receive_any;
    fn hub_look;
    fn hubs_wait;
    fn hub_read;
    fn hub_reading;
    fn cluster_ranks;
    fn hub_stop_nodes;
    fn hub_ended;
    fn hub_stop;
    fn hub_closed;
    fn hub_pids;
    fn hub_agent_pids;
    fn hub_events;
    fn hub_close_job;
}
