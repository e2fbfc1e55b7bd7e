//! Sends one message: of a task to its node, or of a call to the first idle worker of several.

use super::handle::{Cluster, MessageBlobs, SentMessage, ToHub, Unsent};
use crate::codec::plain;
use crate::codec::stream::{self, Format, Sink};
use crate::r::failure::Failure;
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::hub::{StartedTask, Turn};
use rustcluster_core::head::retry::Attempts;
use rustcluster_core::protocol::ids::{JobId, Rank, TaskId};
use std::sync::Arc;

/// Sends a message to a node, as a blob if the host has the blob. Returns the task, or `None` for a set-up call
/// of a node that has not joined yet, which is only logged; and the number of bytes that R has serialized for
/// the message alone.
pub(super) fn send(
    cluster: &Cluster,
    owner: Rank,
    job: JobId,
    message: &Robj,
    setup_call: Option<u64>,
    blobs: MessageBlobs,
) -> std::result::Result<(Option<TaskId>, usize), Unsent> {
    let blob = |rank| blobs.of(cluster.format(rank));
    let started = cluster
        .hub
        .borrow_mut()
        .begin(owner, job, setup_call, Turn::Last, blob);
    let started = started.map_err(|termination| Failure::termination(owner, &termination))?;
    let bytes = write(cluster, &started, message)?;
    if started.only_logged {
        return Ok((None, bytes));
    }
    let message = SentMessage {
        message: message.clone(),
        job,
        index: 0,
        setup_call,
        blobs,
        user: None,
        attempts: Attempts::default(),
    };
    cluster.sent(started.task, message);
    Ok((Some(started.task), bytes))
}

/// Writes a call to the hub. `again`: whether this is a retry after a worker failure.
///
/// # Errors
/// If R jumped. The hub then reports the worker failure of a retried call again.
pub(super) fn send_call(
    cluster: &Cluster,
    any_of: &Arc<[Rank]>,
    task: TaskId,
    again: bool,
    message: &Robj,
) -> std::result::Result<(), Jump> {
    let xdr = |&rank: &Rank| cluster.format(rank) == Format::Xdr;
    // All workers can read XDR.
    let format = match any_of.iter().any(xdr) {
        true => Format::Xdr,
        false => Format::Native,
    };
    cluster
        .hub
        .borrow_mut()
        .begin_call(any_of.clone(), task, again);
    let written = send_plain(cluster, format, message).and_then(|sent| match sent {
        true => Ok(()),
        false => stream::serialize(message, format, &mut ToHub(cluster)).map(drop),
    });
    let mut hub = cluster.hub.borrow_mut();
    match written {
        Ok(()) => hub.finish(),
        Err(_) => hub.abandon(),
    }
    written
}

/// Writes a message to the hub if it is plain. Returns whether it is plain.
pub(super) fn send_plain(
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

pub(super) fn is_plain(cluster: &Cluster, message: &Robj) -> std::result::Result<bool, Jump> {
    with_plain(cluster, message, |_| ())
}

/// Runs `then` with the bytes of a message if it is plain. Returns whether it is plain.
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

/// Writes a message to the hub, where its task has started. Returns the number of bytes that R has serialized
/// for it: 0 for a plain message and for a message that is a blob.
pub(super) fn write(
    cluster: &Cluster,
    started: &StartedTask,
    message: &Robj,
) -> std::result::Result<usize, Jump> {
    let written = match started.has_blob {
        // The blob is the complete message.
        true => Ok(0),
        false => write_all(cluster, started.assigned, message),
    };
    let mut hub = cluster.hub.borrow_mut();
    match written {
        Ok(_) => hub.finish(),
        Err(_) => hub.abandon(),
    }
    written
}

fn write_all(
    cluster: &Cluster,
    assigned: Rank,
    message: &Robj,
) -> std::result::Result<usize, Jump> {
    let format = cluster.format(assigned);
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

/// The hub, and the number of bytes that have been written to it.
pub(super) struct Counting<'a> {
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
