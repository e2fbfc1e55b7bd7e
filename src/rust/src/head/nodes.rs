//! Functions of the head for nodes: a [`Hub`] behind an external pointer.

use super::handle::{
    ABSENT, Called, Cluster, SLICE, Unread, Unsent, cluster_of, may_begin, rank_of, usable,
    with_cluster,
};
use super::send::send;
use super::serialization_cache::{CachedMessage, LARGE};
use super::{broadcast, events, retry, status};
use crate::codec::stream;
use crate::codec::{mapped, plain};
use crate::r::failure::Failure;
use crate::r::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{
    INTEGER_ELT, R_CHAR, R_NamesSymbol, REAL_ELT, Rf_getAttrib, Rf_protect, Rf_unprotect,
    SET_VECTOR_ELT, SEXP, SEXPTYPE, STRING_ELT, TYPEOF, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::head::hub::{Answer, Hub};
use rustcluster_core::head::scheduler::events::RankSet;
use rustcluster_core::protocol::body::Body;
use rustcluster_core::protocol::ids::{JobId, Rank, TaskId};
use rustcluster_core::protocol::setup_calls::name_of;
use std::ffi::{CStr, c_int, c_void};
use std::time::{Duration, Instant};

/// Removes a call whose object was garbage-collected. R runs finalizers at any allocation, and so also while
/// the hub is in use by this package: the call is then cancelled when the hub is next used.
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

/// Sends a message to a node. `setup_call`: the name of the variable that a set-up call sets (`""`: no
/// particular variable), or `NULL` for any other call. Returns `NULL`, or `TRUE` if the node has not joined yet
/// and the set-up call was only logged.
/// @noRd
#[extendr]
fn hub_send(handle: Robj, rank: i32, job: f64, message: Robj, setup_call: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        may_begin(cluster)?;
        let owner = rank_of(&cluster.hub.borrow(), rank)?;
        let job = job as JobId;
        let setup_call = setup_call.as_str().map(name_of);
        let sent = send_to_node(cluster, owner, job, &message, setup_call);
        Ok(match sent {
            Ok(true) => ().into(),
            Ok(false) => true.into(),
            Err(unsent) => unsent.into(),
        })
    })
}

/// Sends a message to a node, as a blob if it equals the last one. Returns whether the node will answer.
fn send_to_node(
    cluster: &Cluster,
    owner: Rank,
    job: JobId,
    message: &Robj,
    setup_call: Option<u64>,
) -> std::result::Result<bool, Unsent> {
    let mut last = cluster.take_last(job, setup_call, message);
    let blobs = match &mut last {
        Some(same) => broadcast::send_as_blob(same, cluster, owner, message).map_err(Unsent::from),
        None => Ok(None),
    };
    let sent = blobs.and_then(|blobs| {
        if blobs.is_none() {
            if let Some(changed) = last.take() {
                cluster.drop_cached(&changed);
            }
        }
        send(
            cluster,
            owner,
            job,
            message,
            setup_call,
            blobs.unwrap_or_default(),
        )
    });
    let sent = sent.map(|(task, bytes)| {
        if last.is_none() && bytes >= LARGE {
            last = Some(CachedMessage::new(job, setup_call, message));
        }
        let mut messages = cluster.messages.borrow_mut();
        if let Some(message) = task.and_then(|task| messages.get_mut(&task)) {
            message.user = last.as_ref().map(CachedMessage::user);
        }
        task.is_some()
    });
    if let Some(last) = last {
        cluster.keep_last(last);
    }
    sent
}

/// Sends the same message to nodes, in this order, and waits up to one slice for their answers. Returns the
/// list of their values: the job is then closed, no R code has run, and no interrupt was handled. Returns
/// `NULL`, without having done anything, if the nodes are of several clusters or contain a node twice. Returns
/// `TRUE` if hub_called() has the answers that have arrived.
/// @noRd
#[extendr]
fn hub_call(handle: Robj, nodes: Robj, job: f64, message: Robj, setup_call: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        may_begin(cluster)?;
        let Ok(ranks) = ranks_of(&nodes) else {
            return Ok(().into());
        };
        let mut node_indices = vec![ABSENT; cluster.hub.borrow().size()];
        let mut owners = Vec::with_capacity(ranks.len());
        for (at, &rank) in ranks.iter().enumerate() {
            let owner = rank_of(&cluster.hub.borrow(), rank)?;
            let node_index = &mut node_indices[owner as usize];
            if *node_index != ABSENT {
                return Ok(().into());
            }
            *node_index = at as u32;
            owners.push(owner);
        }
        let job = job as JobId;
        let variable = setup_call.as_str();
        let setup_call = variable.map(name_of);
        cluster.open_job.set(Some(job));
        let (sent, bytes) = match broadcast::broadcast(cluster, &owners, job, &message, setup_call)
        {
            Ok(sent) => sent,
            Err(unsent) => return Ok(unsent.into()),
        };
        if let Some(variable) = variable.filter(|name| !matches!(*name, "" | ".Random.seed")) {
            cluster.hub.borrow().exported(variable, bytes);
        }
        let began = Instant::now();
        let mut called = Called {
            values: List::new(owners.len()).into(),
            there: sent.iter().map(|sent| !sent).collect(),
            next: ().into(),
        };
        let mut missing = sent.iter().filter(|sent| **sent).count();
        let workers = owners.iter().copied().collect();
        let unreported = || cluster.failures.borrow().any_unreported();
        // Stop for R, which handles interrupts and acknowledges worker failures.
        while missing > 0 && called.next.is_null() && !unreported() && began.elapsed() < SLICE {
            let answer = {
                let mut hub = cluster.hub.borrow_mut();
                hub.receive_any(&workers, SLICE)
            };
            match answered(cluster, answer, |rank| {
                node_indices[rank as usize] as i32 + 1
            }) {
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

/// Stores the value of an answer that was read with the index of its node. Returns whether it is an answer.
fn take_value(answer: &Robj, called: &mut Called) -> bool {
    // SAFETY: this runs on R's thread, with live values. Only this function has `values`, which is as long as
    // `there`. Types and lengths are checked first.
    unsafe {
        let list = |value: SEXP, min| TYPEOF(value) == SEXPTYPE::VECSXP && XLENGTH(value) >= min;
        let answer = answer.get();
        if !list(answer, 2) || !list(VECTOR_ELT(answer, 1), 2) {
            return false;
        }
        let node_index = VECTOR_ELT(answer, 0);
        if TYPEOF(node_index) != SEXPTYPE::INTSXP || XLENGTH(node_index) != 1 {
            return false;
        }
        let at = INTEGER_ELT(node_index, 0) - 1;
        let Some(there) = usize::try_from(at)
            .ok()
            .and_then(|at| called.there.get_mut(at))
        else {
            return false;
        };
        *there = true;
        // The first element is the type of the answer.
        SET_VECTOR_ELT(
            called.values.get(),
            at as isize,
            VECTOR_ELT(VECTOR_ELT(answer, 1), 1),
        );
        true
    }
}

/// Returns the answers that hub_call() has received: the list of their values, for each node whether its value
/// is there, and the last result if it was no answer, as hub_receive_any() returns it, or `NULL`.
/// @noRd
#[extendr]
fn hub_called(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        cluster.open_job.set(None);
        Ok(match cluster.called.take() {
            Some(called) => list!(called.values, called.there, called.next).into(),
            None => ().into(),
        })
    })
}

/// Removes a task after a worker failure whose result is no longer needed.
/// @noRd
#[extendr]
fn hub_forget(handle: Robj, task: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let task = task as TaskId;
        cluster.forget_message(task);
        cluster.hub.borrow_mut().forget(task);
        Ok(().into())
    })
}

/// Returns the message of a task that ended without an answer. `last`: whether this is the last request for it.
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

/// Returns an answer as `recvData()` returns it, which is not protected. `shared`: whether its vectors are in
/// the memory that is being read: see [`mapped::MappedReading`].
///
/// # Safety
/// Must be called under [`unwind::protect`]: R may jump.
pub unsafe fn read_body(body: &mut Body, shared: bool) -> SEXP {
    // SAFETY: guaranteed by the caller; this frame owns nothing that needs to be dropped.
    unsafe {
        match body.whole().filter(|bytes| plain::is_plain(bytes)) {
            _ if shared => mapped::unwrap(stream::read(body)),
            Some(bytes) => plain::read_answer(bytes),
            None => stream::read(body),
        }
    }
}

/// Returns an answer as `recvData()` returns it or, if `node_index` is not 0, with the index of its node, as
/// `recvOneData()` does.
///
/// # Errors
/// If R jumped.
pub fn read_answer(mut body: Body, node_index: i32) -> std::result::Result<Robj, Jump> {
    struct Reading<'a> {
        body: &'a mut Body,
        shared: bool,
        node_index: i32,
    }
    unsafe extern "C" fn read(data: *mut c_void) -> SEXP {
        // SAFETY: `data` is the reading below, which outlives this call. This frame owns nothing that needs to
        // be dropped when R jumps.
        unsafe {
            let reading = data.cast::<Reading<'_>>();
            let answer = read_body((*reading).body, (*reading).shared);
            if (*reading).node_index == 0 {
                return answer;
            }
            let answer = Rf_protect(answer);
            let indexed = rustcluster_indexed_answer((*reading).node_index, answer.cast());
            Rf_unprotect(1);
            indexed
        }
    }
    plain::join(&mut body);
    let memory = mapped::open(&mut body);
    let mut reading = Reading {
        body: &mut body,
        shared: memory.is_some(),
        node_index,
    };
    let _reading = mapped::MappedReading::of(memory.as_ref());
    unwind::protect(read, &mut reading)
}

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_indexed_answer(node_index: c_int, answer: *mut c_void) -> SEXP;
}

/// Returns the answer of a node to the oldest outstanding message. Returns `TRUE` if the answer has arrived and
/// hub_read() takes it, and `NULL` if it has not arrived or R has to acknowledge a worker failure first.
/// @noRd
#[extendr]
fn hub_receive(handle: Robj, rank: i32) -> Robj {
    with_cluster(&handle, |cluster| {
        if cluster.failures.borrow().any_unreported() {
            return Ok(().into());
        }
        let rank = rank_of(&cluster.hub.borrow(), rank)?;
        if is_unread(cluster, |owner| (owner == rank).then_some(0)) {
            return Ok(true.into());
        }
        let answer = cluster.hub.borrow_mut().receive(rank, SLICE);
        answered(cluster, answer, |_| 0)
    })
}

/// Returns an answer for R: with the index of its node, or without it if the index is 0.
pub(super) fn answered(
    cluster: &Cluster,
    answer: Answer,
    node_index: impl Fn(Rank) -> i32,
) -> std::result::Result<Robj, Failure> {
    let ended = |failure: Failure, rank: Rank, task: TaskId| {
        let messages = cluster.messages.borrow();
        let index = messages.get(&task).map_or(0, |message| message.index);
        Err(failure
            .with("node_index", node_index(rank))
            .with("task", task)
            .with("index", index))
    };
    let of_rank = |kind: &str, rank: Rank| Failure::new(kind).with("rank", rank + 1);
    match answer {
        Answer::Ready {
            rank,
            assigned: at,
            task,
            mut body,
        } => {
            let node_index = node_index(rank);
            plain::join(&mut body);
            let unread = Unread {
                body,
                task,
                rank,
                node_index,
                at,
            };
            if unread.body.whole().is_some_and(plain::is_plain) {
                return Ok(take_answer(cluster, unread));
            }
            // For an answer that may fail to be read, R sets up a handler, which costs more than everything
            // else that R does for a plain answer.
            cluster.unread.set(Some(unread));
            Ok(true.into())
        }
        Answer::Lost {
            rank,
            assigned: at,
            task,
            termination,
        } => retry::task_lost(cluster, (rank, at), node_index(rank), task, &termination),
        Answer::TimedOut { rank, task } => ended(of_rank("timeout", rank), rank, task),
        Answer::Revoked { rank, task } => ended(of_rank("revoked", rank), rank, task),
        Answer::GivenUp { rank, task } => {
            let messages = cluster.messages.borrow();
            let message = messages.get(&task).ok_or_else(|| Failure::new("no_task"))?;
            let failure = retry::given_up(&message.attempts).with("rank", rank + 1);
            drop(messages);
            ended(failure, rank, task)
        }
        Answer::Pending => Ok(().into()),
        Answer::NothingSent => Err(Failure::new("no_task")),
    }
}

/// Returns whether R knows of an answer of one of these workers that it has not read because of an interrupt.
/// `node_index`: returns the current index of the worker's node, if that is one of these.
pub(super) fn is_unread(cluster: &Cluster, node_index: impl Fn(Rank) -> Option<i32>) -> bool {
    let mut unread = cluster.unread.take();
    let now = unread.as_ref().and_then(|unread| node_index(unread.rank));
    if let (Some(unread), Some(now)) = (&mut unread, now) {
        unread.node_index = now;
    }
    cluster.unread.set(unread);
    now.is_some()
}

fn take_answer(cluster: &Cluster, unread: Unread) -> Robj {
    let Unread {
        body,
        task,
        node_index,
        at,
        ..
    } = unread;
    cluster.reading.set(Some((task, node_index)));
    match read_answer(body, node_index) {
        Ok(answer) => {
            cluster.reading.set(None);
            cluster.forget_message(task);
            status::note_failure(cluster, at, &answer);
            answer
        }
        Err(Jump(token)) => token,
    }
}

/// Returns the number of the task whose answer is being read or could not be read, and the index of its node.
/// Returns `NULL` if there is no such task.
/// @noRd
#[extendr]
fn hub_reading(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        Ok(match cluster.reading.get() {
            Some((task, node_index)) => [task as f64, f64::from(node_index)].into_robj(),
            None => ().into(),
        })
    })
}

/// Returns the answer for which hub_receive() or hub_receive_any() has returned `TRUE`.
/// @noRd
#[extendr]
fn hub_read(handle: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        let unread = cluster.unread.take();
        Ok(unread.map_or_else(|| ().into(), |unread| take_answer(cluster, unread)))
    })
}

/// Returns the next answer of any of these nodes: a list of the index of the node and of the answer. `TRUE` and
/// `NULL` have the same meanings as for hub_receive().
/// @noRd
#[extendr]
fn hub_receive_any(handle: Robj, nodes: Robj) -> Robj {
    with_cluster(&handle, |cluster| {
        if cluster.failures.borrow().any_unreported() {
            return Ok(().into());
        }
        let size = cluster.hub.borrow().size();
        let (node_indices, workers) = match cluster.nodes.take() {
            // SAFETY: the addresses are compared, and not used.
            Some((known, node_indices, workers)) if unsafe { known.get() == nodes.get() } => {
                (node_indices, workers)
            }
            _ => {
                let node_indices = node_indices_of(&nodes, size)?;
                let workers = present(&node_indices);
                (node_indices, workers)
            }
        };
        let node_index = |rank: Rank| node_indices.get(rank as usize).copied().unwrap_or(ABSENT);
        let known = |rank| Some(node_index(rank)).filter(|&at| at != ABSENT);
        let result = if is_unread(cluster, |rank| known(rank).map(|at| at as i32)) {
            Ok(true.into())
        } else {
            let mut hub = cluster.hub.borrow_mut();
            let answer = hub.receive_any(&workers, SLICE);
            drop(hub);
            answered(cluster, answer, |rank| node_index(rank) as i32)
        };
        cluster.nodes.set(Some((nodes, node_indices, workers)));
        result
    })
}

/// Does the same as hub_receive_any(), without waiting, for nodes that may be of several clusters. `ranks` and
/// `node_indices` belong to the nodes of this cluster. If a rank occurs twice, its first index counts.
/// @noRd
#[extendr]
fn hub_poll(handle: Robj, ranks: &[i32], node_indices: &[i32]) -> Robj {
    with_cluster(&handle, |cluster| {
        if cluster.failures.borrow().any_unreported() {
            return Ok(().into());
        }
        let mut of_ranks = vec![ABSENT; cluster.hub.borrow().size()];
        for (&rank, &node_index) in ranks.iter().zip(node_indices) {
            let rank = rank_of(&cluster.hub.borrow(), rank)?;
            let known = &mut of_ranks[rank as usize];
            *known = (*known).min(node_index as u32);
        }
        let node_index = |rank: Rank| of_ranks.get(rank as usize).copied().unwrap_or(ABSENT);
        let known = |rank| Some(node_index(rank)).filter(|&at| at != ABSENT);
        if is_unread(cluster, |rank| known(rank).map(|at| at as i32)) {
            return Ok(true.into());
        }
        let answer = {
            let mut hub = cluster.hub.borrow_mut();
            hub.receive_any(&present(&of_ranks), Duration::ZERO)
        };
        answered(cluster, answer, |rank| node_index(rank) as i32)
    })
}

/// Returns the ranks that have an index among the nodes.
fn present(node_indices: &[u32]) -> RankSet {
    let ranks = (0..).zip(node_indices);
    let present = ranks.filter(|&(_, &node_index)| node_index != ABSENT);
    present.map(|(rank, _)| rank).collect()
}

/// Waits up to one slice, or until hub_poll() may find an answer in one of these clusters.
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

/// Returns the rank of each of these nodes, if all are nodes of one cluster.
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
    // SAFETY: this runs on R's thread, with a live value that nothing changes meanwhile. Types and lengths are
    // checked first, and none of these functions of R jumps or allocates. The addresses of handles are
    // compared, and not used.
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

/// Returns the element with this name of a list.
///
/// # Safety
/// Must be called on R's thread, with a live list.
unsafe fn field(list: SEXP, name: &CStr) -> Option<SEXP> {
    // SAFETY: guaranteed by the caller; types and lengths are checked first.
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

/// Returns the index of each rank, from 1, in a list of nodes.
fn node_indices_of(nodes: &Robj, size: usize) -> std::result::Result<Vec<u32>, Failure> {
    let bad = |reason: &str| {
        Failure::new("bad_argument")
            .with("argument", "cl")
            .with("reason", reason)
    };
    let mut node_indices = vec![ABSENT; size];
    for (at, rank) in ranks_of(nodes)?.into_iter().enumerate() {
        match usize::try_from(rank) {
            Ok(rank) if (1..=size).contains(&rank) => {
                let node_index = &mut node_indices[rank - 1];
                *node_index = (*node_index).min(at as u32 + 1);
            }
            _ => return Err(bad("a node's rank is out of range")),
        }
    }
    Ok(node_indices)
}

/// Cancels the rest of a job.
pub fn close_job(cluster: &Cluster, job: JobId) {
    cluster.open_job.set(None);
    // The nodes refer to the handle, which would never be garbage-collected.
    cluster.nodes.set(None);
    if let Some(job) = cluster.job.take() {
        cluster.rtts.borrow_mut().extend(job.engine.rtts());
    }
    cluster.hub.borrow_mut().cancel_job(job);
    cluster.drop_blobs(job);
    cluster.failures.borrow_mut().close(job);
    cluster.forget_messages();
}

/// Cancels the rest of a job. Returns the events that R has to show.
/// @noRd
#[extendr]
fn hub_close_job(handle: Robj, job: f64) -> Robj {
    with_cluster(&handle, |cluster| {
        let job = job as JobId;
        // A job that was refused because another one is running need not be closed.
        if cluster.open_job.get().is_some_and(|started| started != job) {
            return Ok(().into());
        }
        close_job(cluster, job);
        // An interrupt has prevented R from taking these.
        cluster.unread.set(None);
        cluster.called.set(None);
        Ok(events::events(cluster))
    })
}

extendr_module! {
    mod nodes;
    fn hub_send;
    fn hub_call;
    fn hub_called;
    fn hub_forget;
    fn hub_message;
    fn hub_receive;
    fn hub_reading;
    fn hub_read;
    fn hub_receive_any;
    fn hub_poll;
    fn hubs_wait;
    fn cluster_ranks;
    fn hub_close_job;
}
