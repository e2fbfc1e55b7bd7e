//! What lasts on workers, held by the head for hosts that may come back: an agent that is lost takes
//! with it what it held (see [`crate::agent::setup_log`]).
//!
//! Messages are written to a file that has no name, in the order in which they are sent, and each
//! knows on which workers it has lasted. A host that is back gets them from a map of the file: they
//! take no memory of the head that the system could not have back. What messages begin with as a
//! payload is in the file once.

use crate::platform::signals::without_file_size_signal;
use crate::protocol::control::Facts;
use crate::protocol::dedup::Chunk;
use crate::protocol::ids::{PayloadId, Rank, TaskId};
use crate::protocol::setup_calls::SetupCalls;
use bytes::Bytes;
use memmap2::Mmap;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

#[derive(Debug)]
struct Message {
    name: u64,
    /// It begins with this; the rest is what follows.
    payload: Option<PayloadId>,
    from: u64,
    len: u64,
    digest: u128,
    /// The number of workers whose set-up calls contain it.
    users: usize,
    /// Sent to these, and not answered yet.
    pending: BTreeSet<Rank>,
}

/// A message that has lasted: its name, and its bytes in parts.
pub type Lasting = (u64, Vec<Bytes>);

/// A payload in the file.
struct Stored {
    from: u64,
    len: u64,
    /// More messages may come to begin with it.
    wanted: bool,
    /// So many messages do.
    users: usize,
}

struct Open {
    task: TaskId,
    rank: Rank,
    name: u64,
    payload: Option<PayloadId>,
    hash: Xxh3,
    len: u64,
}

/// Writes to the file. Returns whether there is room: the disk may be full, or the file larger than this
/// process may make any.
fn put(file: &File, bytes: &[u8], at: u64) -> bool {
    without_file_size_signal(|| file.write_all_at(bytes, at)).is_ok()
}

/// See the module's documentation.
pub struct Spool {
    file: File,
    /// By their numbers, in the order of sending.
    messages: BTreeMap<u64, Message>,
    next: u64,
    /// The numbers of the messages that have lasted on each worker, and still do.
    workers: HashMap<Rank, SetupCalls<u64>>,
    /// The message of each task that is not answered.
    tasks: HashMap<TaskId, u64>,
    open: Option<Open>,
    payloads: HashMap<PayloadId, Stored>,
    /// A payload that is being written, and how much of it has been.
    open_payload: Option<(PayloadId, u64)>,
    end: u64,
    /// Bytes of the file that are taken up.
    held: u64,
    most: u64,
    /// Something that lasts is not in the file.
    incomplete: bool,
}

impl Spool {
    /// Holds up to `most` bytes in a file that is made at `path` and has no name from then on.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn new(path: &Path, most: u64) -> io::Result<Spool> {
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        let file = options.mode(0o600).open(path)?;
        std::fs::remove_file(path)?;
        Ok(Spool {
            file,
            messages: BTreeMap::new(),
            next: 0,
            workers: HashMap::new(),
            tasks: HashMap::new(),
            open: None,
            payloads: HashMap::new(),
            open_payload: None,
            end: 0,
            held: 0,
            most,
            incomplete: false,
        })
    }

    /// What is known of it, for a bug report.
    pub fn facts(&self, facts: &mut Facts) {
        facts.add("setup_log_calls", self.messages.len());
        facts.add("setup_log_bytes", self.held);
        facts.add("setup_log_limit", self.most);
        facts.add("setup_log_complete", self.is_complete());
    }

    /// A payload begins with which messages begin that are to last.
    pub fn begin_payload(&mut self, id: PayloadId) {
        self.open_payload = Some((id, 0));
    }

    /// Some of the payload.
    pub fn write_payload(&mut self, chunks: &[Chunk]) {
        let Some((_, len)) = &mut self.open_payload else {
            return;
        };
        for chunk in chunks {
            let at = self.end + *len;
            *len += chunk.bytes.len() as u64;
            if self.incomplete || self.held + *len > self.most {
                self.incomplete = true;
                return;
            }
            self.incomplete |= !put(&self.file, &chunk.bytes, at);
        }
    }

    /// The payload is complete.
    pub fn finish_payload(&mut self) {
        let Some((id, len)) = self.open_payload.take() else {
            return;
        };
        let stored = Stored {
            from: self.end,
            len,
            wanted: true,
            users: 0,
        };
        self.payloads.insert(id, stored);
        self.end += len;
        self.held += len;
    }

    /// The payload will not be complete.
    pub fn abandon_payload(&mut self) {
        self.open_payload = None;
    }

    /// Whether messages that last can begin with this payload.
    pub fn has_payload(&self, id: PayloadId) -> bool {
        self.payloads.get(&id).is_some_and(|stored| stored.wanted)
    }

    /// No more messages will begin with it.
    pub fn drop_payload(&mut self, id: PayloadId) {
        if let Some(stored) = self.payloads.get_mut(&id) {
            stored.wanted = false;
            self.clear_payload(id);
        }
    }

    /// Lets go of a payload that no message begins with or may come to.
    fn clear_payload(&mut self, id: PayloadId) {
        let unused = |stored: &Stored| !stored.wanted && stored.users == 0;
        if self.payloads.get(&id).is_some_and(unused) {
            if let Some(stored) = self.payloads.remove(&id) {
                if give_back(&self.file, stored.from, stored.len) {
                    self.held -= stored.len;
                }
            }
        }
    }

    /// A message to this worker begins that is to last, under this name (0: none). It begins with
    /// this payload.
    pub fn begin(&mut self, task: TaskId, rank: Rank, name: u64, payload: Option<PayloadId>) {
        self.open = Some(Open {
            task,
            rank,
            name,
            payload,
            hash: Xxh3::new(),
            len: 0,
        });
    }

    /// Some of the message.
    pub fn write(&mut self, chunks: &[Chunk]) {
        let Some(open) = &mut self.open else {
            return;
        };
        for chunk in chunks {
            let at = self.end + open.len;
            open.len += chunk.bytes.len() as u64;
            // It may turn out to be the same as the last one.
            let last = self
                .messages
                .values()
                .next_back()
                .map_or(0, |last| last.len);
            if self.incomplete || self.held + open.len > self.most + last {
                self.incomplete = true;
                return;
            }
            open.hash.update(&chunk.bytes);
            self.incomplete |= !put(&self.file, &chunk.bytes, at);
        }
    }

    /// The message is complete.
    pub fn finish(&mut self) {
        let Some(open) = self.open.take() else {
            return;
        };
        if self.incomplete {
            return;
        }
        let digest = open.hash.digest128();
        let same = |last: &Message| {
            last.digest == digest
                && last.len == open.len
                && last.name == open.name
                && last.payload == open.payload
        };
        // To many workers goes the same, one after the other. To the same worker it is said once more.
        let workers = &self.workers;
        let ran = |number| {
            let calls = workers.get(&open.rank);
            let last = calls.and_then(|calls| calls.iter().next_back());
            last.is_some_and(|(_, &last)| last == number)
        };
        let last = self.messages.iter_mut().next_back();
        let last = last.filter(|(number, last)| {
            same(last) && !last.pending.contains(&open.rank) && !ran(**number)
        });
        if let Some((&number, last)) = last {
            last.pending.insert(open.rank);
            self.tasks.insert(open.task, number);
        } else if self.held + open.len > self.most {
            self.incomplete = true;
        } else {
            if let Some(id) = open.payload {
                match self.payloads.get_mut(&id) {
                    Some(stored) => stored.users += 1,
                    // Not all of the message is here.
                    None => self.incomplete = true,
                }
            }
            let message = Message {
                name: open.name,
                payload: open.payload,
                from: self.end,
                len: open.len,
                digest,
                users: 0,
                pending: [open.rank].into(),
            };
            self.messages.insert(self.next, message);
            self.tasks.insert(open.task, self.next);
            self.next += 1;
            self.end += open.len;
            self.held += open.len;
        }
    }

    /// The message will not be complete.
    pub fn abandon(&mut self) {
        self.open = None;
    }

    /// A task has ended; `lasts`: with what it did to its worker.
    pub fn ended(&mut self, task: TaskId, rank: Rank, lasts: bool) {
        let Some(number) = self.tasks.remove(&task) else {
            return;
        };
        let Some(message) = self.messages.get_mut(&number) else {
            return;
        };
        message.pending.remove(&rank);
        if !lasts {
            return self.clear(number);
        }
        message.users += 1;
        let calls = self.workers.entry(rank).or_default();
        if let Some(superseded) = calls.record(message.name, number) {
            if let Some(message) = self.messages.get_mut(&superseded) {
                message.users -= 1;
            }
            self.clear(superseded);
        }
    }

    /// Lets go of a message that no worker has or may come to have.
    fn clear(&mut self, number: u64) {
        let unused = |m: &Message| m.users == 0 && m.pending.is_empty();
        if self.messages.get(&number).is_some_and(unused) {
            if let Some(message) = self.messages.remove(&number) {
                if give_back(&self.file, message.from, message.len) {
                    self.held -= message.len;
                }
                if let Some(id) = message.payload {
                    if let Some(stored) = self.payloads.get_mut(&id) {
                        stored.users = stored.users.saturating_sub(1);
                    }
                    self.clear_payload(id);
                }
            }
        }
    }

    /// Whether all that lasts is here.
    pub fn is_complete(&self) -> bool {
        !self.incomplete
    }

    /// What has lasted on this worker, in order.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn restore(&self, rank: Rank) -> io::Result<Vec<Lasting>> {
        if self.end == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: the file has no name, and what is in it is not written again while a message of it
        // may be in use: it only grows, and gives back what no worker has.
        let map = Bytes::from_owner(unsafe { Mmap::map(&self.file)? });
        let part = |from: u64, len: u64| {
            let from = usize::try_from(from).ok()?;
            let to = from.checked_add(usize::try_from(len).ok()?)?;
            (to <= map.len()).then(|| map.slice(from..to))
        };
        let stored = |number: &u64| {
            let message = self.messages.get(number)?;
            let payload = match message.payload {
                Some(id) => Some(self.payloads.get(&id)?),
                None => None,
            };
            let payload = payload.map(|stored| (stored.from, stored.len));
            let parts = payload.into_iter().chain([(message.from, message.len)]);
            let parts: Option<Vec<Bytes>> = parts.map(|(from, len)| part(from, len)).collect();
            Some((message.name, parts?))
        };
        let calls = self.workers.get(&rank);
        let calls = calls.into_iter().flat_map(SetupCalls::iter);
        let messages: Option<Vec<Lasting>> = calls.map(|(_, number)| stored(number)).collect();
        messages.ok_or_else(|| io::Error::other("the file is too short"))
    }
}

/// Has the file system take back what a part of the file takes up. Returns whether it has done so.
fn give_back(file: &File, from: u64, len: u64) -> bool {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (from, len) = (from as libc::off_t, len as libc::off_t);
    if len == 0 {
        // Of which the system knows nothing to give back.
        return true;
    }
    // SAFETY: fallocate has no memory effects. That it fails costs room on the disk alone.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, from, len) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool(most: u64) -> Spool {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("spool-{}-{}", name.0, name.1));
        let spool = Spool::new(&path, most).unwrap();
        assert!(!path.exists());
        spool
    }

    fn send(spool: &mut Spool, task: TaskId, rank: Rank, name: u64, message: &[u8]) {
        send_with(spool, task, rank, name, None, message);
    }

    fn send_with(
        spool: &mut Spool,
        task: TaskId,
        rank: Rank,
        name: u64,
        payload: Option<PayloadId>,
        message: &[u8],
    ) {
        spool.begin(task, rank, name, payload);
        for part in message.chunks(7) {
            spool.write(&[Bytes::copy_from_slice(part).into()]);
        }
        spool.finish();
    }

    fn restored(spool: &Spool, rank: Rank) -> Vec<Vec<u8>> {
        let messages = spool.restore(rank).unwrap();
        messages.iter().map(|(_, parts)| parts.concat()).collect()
    }

    #[test]
    fn each_worker_gets_what_lasted_on_it_in_order() {
        let mut spool = spool(1 << 20);
        for rank in 0..3u32 {
            send(&mut spool, u64::from(rank), rank, 0, b"for all of them");
        }
        send(&mut spool, 3, 1, 0, b"for one");
        for rank in 0..3 {
            spool.ended(u64::from(rank), rank, true);
        }
        spool.ended(3, 1, true);
        send(&mut spool, 4, 1, 0, b"interrupted");
        spool.ended(4, 1, false);
        assert_eq!(restored(&spool, 0), [b"for all of them"]);
        assert_eq!(restored(&spool, 1), [&b"for all of them"[..], b"for one"]);
        assert_eq!(restored(&spool, 9), Vec::<Vec<u8>>::new());
        assert_eq!(spool.end, 15 + 7 + 11);
    }

    #[test]
    fn a_value_that_is_set_again_takes_the_place_of_the_one_before() {
        let mut spool = spool(1 << 20);
        let messages = [
            (7, "first"),
            (8, "other"),
            (7, "second"),
            (0, "uses"),
            (7, "third"),
        ];
        for (task, (name, text)) in (0..).zip(messages) {
            send(&mut spool, task, 0, name, text.as_bytes());
            spool.ended(task, 0, true);
        }
        let texts: [&[u8]; 4] = [b"other", b"second", b"uses", b"third"];
        assert_eq!(restored(&spool, 0), texts);
    }

    #[test]
    fn beyond_the_bound_it_is_not_complete() {
        let mut spool = spool(20);
        send(&mut spool, 0, 0, 0, &[1; 20]);
        // The same for another worker takes no room.
        send(&mut spool, 1, 1, 0, &[1; 20]);
        assert!(spool.is_complete());
        send(&mut spool, 2, 0, 0, &[2; 20]);
        assert!(!spool.is_complete());
    }

    #[test]
    fn what_messages_begin_with_is_there_once_and_for_as_long_as_one_of_them() {
        let mut spool = spool(130);
        let store = |spool: &mut Spool, id: PayloadId, byte: u8| {
            spool.begin_payload(id);
            spool.write_payload(&[Bytes::from(vec![byte; 60]).into()]);
            spool.write_payload(&[Bytes::from(vec![byte; 40]).into()]);
            spool.finish_payload();
        };
        store(&mut spool, 5, 5);
        for rank in 0..3u32 {
            let task = u64::from(rank);
            let rest: &[u8] = if rank == 2 { b"more" } else { b"" };
            send_with(&mut spool, task, rank, 7, Some(5), rest);
            spool.ended(task, rank, true);
        }
        spool.drop_payload(5);
        assert!(spool.is_complete() && !spool.has_payload(5));
        assert_eq!(restored(&spool, 1), [[5; 100]]);
        assert_eq!(restored(&spool, 2), [[&[5; 100][..], b"more"].concat()]);
        assert_eq!(spool.held, 104);
        // Values that take its place.
        for rank in 0..3u32 {
            let task = 10 + u64::from(rank);
            send(&mut spool, task, rank, 7, b"other");
            spool.ended(task, rank, true);
        }
        assert_eq!((spool.held, spool.payloads.len()), (5, 0));
        // One that no message begins with, and one that is not completed.
        store(&mut spool, 6, 6);
        spool.drop_payload(6);
        spool.begin_payload(7);
        spool.write_payload(&[Bytes::from(vec![7; 60]).into()]);
        spool.abandon_payload();
        assert_eq!((spool.held, spool.is_complete()), (5, true));
        assert_eq!(restored(&spool, 0), [b"other"]);
    }

    #[test]
    fn what_is_said_to_a_worker_twice_is_done_twice() {
        let mut spool = spool(1 << 20);
        for task in 0..3u64 {
            for rank in 0..2 {
                let task = 2 * task + u64::from(rank);
                send(&mut spool, task, rank, 0, b"x <- x + 1");
                // The second before it is answered.
                if task != 2 {
                    spool.ended(task, rank, true);
                }
            }
        }
        spool.ended(2, 0, true);
        assert_eq!(restored(&spool, 0).len(), 3);
        assert_eq!(restored(&spool, 1).len(), 3);
        assert_eq!(spool.messages.len(), 3);
    }

    #[test]
    fn what_no_worker_has_any_more_does_not_count() {
        let mut spool = spool(50);
        for task in 0..1000u64 {
            send(&mut spool, task, 0, 7, &task.to_le_bytes().repeat(3));
            spool.ended(task, 0, true);
        }
        for task in 1000..2000u64 {
            send(&mut spool, task, 0, 0, &task.to_le_bytes().repeat(3));
            spool.ended(task, 0, false);
        }
        assert!(spool.is_complete());
        assert_eq!(restored(&spool, 0), [999u64.to_le_bytes().repeat(3)]);
        assert_eq!((spool.messages.len(), spool.tasks.len()), (1, 0));
    }
}
