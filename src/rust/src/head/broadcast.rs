//! Broadcasts: messages that many nodes get. Such a message is serialized once for each host if possible, and
//! otherwise once for each node.

use super::handle::{Cluster, MessageBlobs, ToHub, Unsent};
use super::nodes::{is_plain, send, send_plain};
use crate::codec::mapped::{self, MappedSize};
use crate::codec::stream::{self, Format, Sink};
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::head::hub::StartedTask;
use rustcluster_core::protocol::dedup;
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank};

pub(super) fn broadcast(
    cluster: &Cluster,
    owners: &[Rank],
    job: JobId,
    message: &Robj,
    setup_call: Option<u64>,
) -> std::result::Result<(), Unsent> {
    let mut blobs = MessageBlobs::default();
    if owners.len() > 1 {
        blobs = send_blobs(cluster, owners, job, message, setup_call.is_some())?;
    }
    for &owner in owners {
        send(cluster, owner, job, message, setup_call, blobs)?;
    }
    Ok(())
}

/// Sends a message that is not plain to the hosts of these workers, as one blob for each format.
pub(super) fn send_blobs(
    cluster: &Cluster,
    owners: &[Rank],
    job: JobId,
    message: &Robj,
    setup_call: bool,
) -> std::result::Result<MessageBlobs, Jump> {
    let mut blobs = MessageBlobs::default();
    for format in [Format::Native, Format::Xdr] {
        let of_format = owners.iter().copied();
        let of_format = of_format.filter(|&owner| cluster.format(owner) == format);
        let ranks: Vec<Rank> = of_format.collect();
        let plain = format == Format::Native && is_plain(cluster, message)?;
        if ranks.len() < 2 || plain {
            continue;
        }
        let write = |hub: &mut ToHub<'_>| write_blob(message, format, hub);
        let (id, ()) = make_blob(cluster, &ranks, setup_call, write)?;
        cluster.blobs.borrow_mut().push((job, id));
        blobs.set(format, id);
    }
    Ok(blobs)
}

/// Writes a message in this format, as the bytes of a blob.
///
/// # Errors
/// If R jumped. The bytes that were written before the jump are incomplete.
pub fn write_blob(
    message: &Robj,
    format: Format,
    sink: &mut dyn Sink,
) -> std::result::Result<(), Jump> {
    match format {
        Format::Native => mapped::serialize(message, sink).map(drop),
        Format::Xdr => stream::serialize(message, format, sink).map(drop),
    }
}

/// Sends the bytes that `write` writes to the hosts of these workers, as a blob. Returns the id of the blob and
/// the value of `write`. `setup_call`: whether messages of set-up calls start with the blob.
///
/// # Errors
/// If R jumped. The blob does not exist then.
pub fn make_blob<T>(
    cluster: &Cluster,
    ranks: &[Rank],
    setup_call: bool,
    write: impl FnOnce(&mut ToHub<'_>) -> std::result::Result<T, Jump>,
) -> std::result::Result<(BlobId, T), Jump> {
    let id = cluster.hub.borrow_mut().begin_blob(ranks, setup_call);
    match write(&mut ToHub(cluster)) {
        Ok(value) => {
            cluster.hub.borrow_mut().finish_blob();
            Ok((id, value))
        }
        Err(jump) => {
            cluster.hub.borrow_mut().abandon();
            Err(jump)
        }
    }
}

/// Maximum size of a common blob that is kept from job to job, in bytes.
pub(super) const SMALL_MESSAGE: usize = 64 * 1024;

/// Sends the values that the tasks of a job have in common to the hosts of these workers, as a blob.
///
/// # Errors
/// If R jumped.
pub fn send_common_blob(
    cluster: &Cluster,
    ranks: &[Rank],
    job: JobId,
    common: &Robj,
) -> std::result::Result<(BlobId, MappedSize), Jump> {
    let short = match stream::min_size(common) <= SMALL_MESSAGE {
        true => stream::serialize_short(common, SMALL_MESSAGE)?,
        false => None,
    };
    let written = |(bytes, fixed): &(Vec<u8>, bool)| MappedSize {
        fixed: *fixed,
        bytes: bytes.len() as u64,
    };
    let key = short.as_ref().map(|(bytes, _)| dedup::key_of(bytes));
    if let (Some(short), Some((last, id))) = (&short, cluster.common.get()) {
        let has = |&rank: &Rank| cluster.hub.borrow().has_blob(rank, id);
        if key == Some(last) && ranks.iter().all(has) {
            return Ok((id, written(short)));
        }
    }
    let (id, written) = make_blob(cluster, ranks, false, |sink| match short {
        Some(short) => {
            sink.write(&short.0);
            Ok(written(&short))
        }
        None => mapped::serialize(common, sink),
    })?;
    match key {
        Some(key) => {
            if let Some((_, last)) = cluster.common.replace(Some((key, id))) {
                cluster.hub.borrow_mut().drop_blob(last);
            }
        }
        None => cluster.blobs.borrow_mut().push((job, id)),
    }
    Ok((id, written))
}

/// Sends a blob again, to the host of this worker, which lacks it.
///
/// # Errors
/// If R jumped.
pub fn resend_blob(
    cluster: &Cluster,
    id: BlobId,
    assigned: Rank,
    common: &Robj,
) -> std::result::Result<(), Jump> {
    cluster.hub.borrow_mut().begin_blob_again(id, assigned);
    mapped::serialize(common, &mut ToHub(cluster))?;
    cluster.hub.borrow_mut().finish_blob();
    Ok(())
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
