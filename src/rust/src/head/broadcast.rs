//! Broadcasts: messages that many nodes get. Such a message is serialized once for each host if possible, and
//! otherwise once for each node.

use super::handle::{Cluster, MessageBlobs, ToHub, Unsent};
use super::send::{is_plain, send};
use super::serialization_cache::{CachedMessage, MadeBlob};
use crate::codec::mapped::{self, MappedSize};
use crate::codec::stream::{self, Format, Sink};
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use rustcluster_core::protocol::dedup::{self, Fingerprint};
use rustcluster_core::protocol::ids::{BlobId, JobId, Rank};

/// Sends a message to these nodes. Returns for each whether it will answer: a set-up call for a node that has
/// not joined yet is only logged. Also returns the bytes of the message.
pub(super) fn broadcast(
    cluster: &Cluster,
    owners: &[Rank],
    job: JobId,
    message: &Robj,
    setup_call: Option<u64>,
) -> std::result::Result<(Vec<bool>, u64), Unsent> {
    let written = || cluster.hub.borrow().written();
    let before = written();
    let mut blobs = MessageBlobs::default();
    if owners.len() > 1 {
        blobs = send_blobs(cluster, owners, job, message, setup_call.is_some())?;
    }
    let mut bytes = written() - before;
    let mut sent = Vec::with_capacity(owners.len());
    for &owner in owners {
        let before = written();
        sent.push(
            send(cluster, owner, job, message, setup_call, blobs)?
                .0
                .is_some(),
        );
        bytes = bytes.max(written() - before);
    }
    Ok((sent, bytes))
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

/// Makes sure that the host of this worker has the message, which [may be](CachedMessage::may_be) the same, as a
/// blob. Returns `None` if the message is not the same. The result names no blob if there is none.
///
/// # Errors
/// If R jumped. The message may still be cached the next time.
pub(super) fn send_as_blob(
    cached: &mut CachedMessage,
    cluster: &Cluster,
    owner: Rank,
    message: &Robj,
) -> std::result::Result<Option<MessageBlobs>, Jump> {
    // The worker that runs the task on behalf of a lost one gets the message as it is.
    if cluster.hub.borrow().worker(owner).termination.is_some() {
        return Ok(Some(MessageBlobs::default()));
    }
    let format = cluster.format(owner);
    let made = cached.blobs.iter().find(|made| made.format == format);
    let Some(&MadeBlob { id, print, .. }) = made else {
        let (id, print) = make_blob(cluster, &[owner], cached.setup_call.is_some(), |hub| {
            print_blob(message, format, Some(hub))
        })?;
        cached.blobs.push(MadeBlob { format, id, print });
        return Ok(Some(MessageBlobs::of_one(format, id)));
    };
    if print_blob(message, format, None)? != print {
        return Ok(None);
    }
    let has = cluster.hub.borrow().has_blob(owner, id);
    // Code that R ran in between may have changed the message.
    if !has && !send_blob_again(cluster, id, print, owner, message, format)? {
        return Ok(None);
    }
    Ok(Some(MessageBlobs::of_one(format, id)))
}

/// Sends a blob to one more host. Returns whether the bytes are still the same; if not, the host does not get
/// the blob.
fn send_blob_again(
    cluster: &Cluster,
    id: BlobId,
    print: (u128, u64),
    owner: Rank,
    message: &Robj,
    format: Format,
) -> std::result::Result<bool, Jump> {
    cluster.hub.borrow_mut().begin_blob_again(id, owner);
    let written = print_blob(message, format, Some(&mut ToHub(cluster)));
    let mut hub = cluster.hub.borrow_mut();
    match written {
        Ok(now) if now == print => {
            hub.finish_blob();
            Ok(true)
        }
        other => {
            hub.abandon();
            other.map(|_| false)
        }
    }
}

/// Writes a message to the hub as a blob, or discards the bytes. Returns the fingerprint of the bytes.
fn print_blob(
    message: &Robj,
    format: Format,
    hub: Option<&mut ToHub<'_>>,
) -> std::result::Result<(u128, u64), Jump> {
    let mut sink = Printing {
        print: Fingerprint::default(),
        hub,
        unchecked: 0,
    };
    write_blob(message, format, &mut sink)?;
    Ok(sink.print.value())
}

/// Number of discarded bytes after which R checks for an interrupt.
const BYTES_PER_CHECK: usize = 16 * 1024 * 1024;

/// Computes the fingerprint of the bytes that are written.
struct Printing<'a, 'b> {
    print: Fingerprint,
    hub: Option<&'a mut ToHub<'b>>,
    unchecked: usize,
}

impl Sink for Printing<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> bool {
        self.print.update(bytes);
        if let Some(hub) = &mut self.hub {
            return hub.write(bytes);
        }
        self.unchecked += bytes.len();
        let due = self.unchecked >= BYTES_PER_CHECK;
        if due {
            self.unchecked = 0;
        }
        due
    }

    fn wait(&mut self) -> bool {
        self.hub.as_mut().is_some_and(|hub| hub.wait())
    }
}
