//! The set-up log of the head, from which hosts that reconnect are restored. The head needs its own log because a
//! lost agent takes its log with it (see [`crate::agent::setup_log`]).
//!
//! Set-up calls are written to a file without a name, in the order in which they are sent. The log records which
//! workers have completed each call. A host that has reconnected gets its calls from a mapping of the file, so the
//! log occupies only memory that the system can reclaim. The file contains each blob once.

use crate::platform::signals::without_file_size_signal;
use crate::protocol::control::Facts;
use crate::protocol::dedup::Chunk;
use crate::protocol::ids::{BlobId, Rank, TaskId};
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
struct StoredCall {
    name: u64,
    /// The blob that the message begins with; the rest of the message is at `from`.
    blob: Option<BlobId>,
    from: u64,
    len: u64,
    digest: u128,
    /// Number of workers whose set-up calls contain this call, and one more if the common calls do.
    users: usize,
    /// Workers that have been sent the call and have not answered yet, at first or while they are restored.
    pending: BTreeSet<Rank>,
    /// Workers that have completed the call.
    done: Ranks,
}

/// A set of ranks, as bits.
#[derive(Debug, Default)]
struct Ranks(Vec<u64>);

impl Ranks {
    fn insert(&mut self, rank: Rank) {
        let at = rank as usize / 64;
        self.0.resize(self.0.len().max(at + 1), 0);
        self.0[at] |= 1 << (rank % 64);
    }

    fn contains_all(&self, others: &Ranks) -> bool {
        let mut words = others.0.iter().enumerate();
        words.all(|(at, word)| word & !self.0.get(at).copied().unwrap_or(0) == 0)
    }
}

impl FromIterator<Rank> for Ranks {
    fn from_iter<I: IntoIterator<Item = Rank>>(ranks: I) -> Ranks {
        let mut set = Ranks::default();
        ranks.into_iter().for_each(|rank| set.insert(rank));
        set
    }
}

/// A set-up call to be sent again: its name, and its bytes in parts.
pub type SetupMessage = (u64, Vec<Bytes>);

/// A set-up call to be sent again, with its number in the log.
pub type NumberedCall = (u64, SetupMessage);

/// A blob in the file.
struct Stored {
    from: u64,
    len: u64,
    /// Further messages may begin with the blob.
    wanted: bool,
    /// Number of messages that begin with the blob.
    users: usize,
}

struct OpenStoredCall {
    task: TaskId,
    rank: Rank,
    name: u64,
    blob: Option<BlobId>,
    hash: Xxh3,
    len: u64,
}

/// Writes to the file. Returns whether that succeeded: the disk may be full, or the file may exceed the file size
/// limit.
fn put(file: &File, bytes: &[u8], at: u64) -> bool {
    without_file_size_signal(|| file.write_all_at(bytes, at)).is_ok()
}

/// See the module's documentation.
pub struct SetupLogFile {
    file: File,
    /// The calls by number, in the order in which they were sent.
    messages: BTreeMap<u64, StoredCall>,
    next: u64,
    /// The numbers of the calls that restore each worker.
    workers: HashMap<Rank, SetupCalls<u64>>,
    /// The workers of the cluster.
    members: Ranks,
    /// The numbers of the calls that all workers have completed, which a new worker gets.
    common: SetupCalls<u64>,
    /// The number of the call of each task that is not answered.
    tasks: HashMap<TaskId, u64>,
    /// The first call of each worker that was only logged, because the worker was not there.
    only_logged: HashMap<Rank, u64>,
    /// The calls with which workers are being restored, which remain in the file.
    pinned: HashMap<Rank, Vec<u64>>,
    open: Option<OpenStoredCall>,
    blobs: HashMap<BlobId, Stored>,
    /// The blob that is being written, and its length so far.
    open_blob: Option<(BlobId, u64)>,
    end: u64,
    /// Bytes of the file that are in use.
    stored_bytes: u64,
    max_bytes: u64,
    /// A set-up call is missing from the file: no host can be restored.
    incomplete: bool,
}

impl SetupLogFile {
    /// Creates a log of up to `max_bytes` bytes. The file is created at `path` and unlinked at once.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn new(path: &Path, max_bytes: u64) -> io::Result<SetupLogFile> {
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        let file = options.mode(0o600).open(path)?;
        std::fs::remove_file(path)?;
        Ok(SetupLogFile {
            file,
            messages: BTreeMap::new(),
            next: 0,
            workers: HashMap::new(),
            members: Ranks::default(),
            common: SetupCalls::default(),
            tasks: HashMap::new(),
            only_logged: HashMap::new(),
            pinned: HashMap::new(),
            open: None,
            blobs: HashMap::new(),
            open_blob: None,
            end: 0,
            stored_bytes: 0,
            max_bytes,
            incomplete: false,
        })
    }

    /// Adds the state of the log to a bug report.
    pub fn facts(&self, facts: &mut Facts) {
        facts.add("setup_log_calls", self.messages.len());
        facts.add("setup_log_bytes", self.stored_bytes);
        facts.add("setup_log_limit", self.max_bytes);
        facts.add("setup_log_complete", self.is_complete());
    }

    /// Starts a blob with which set-up calls begin.
    pub fn begin_blob(&mut self, id: BlobId) {
        self.open_blob = Some((id, 0));
    }

    /// Appends to the blob.
    pub fn write_blob(&mut self, chunks: &[Chunk]) {
        let Some((_, len)) = &mut self.open_blob else {
            return;
        };
        for chunk in chunks {
            let at = self.end + *len;
            *len += chunk.bytes.len() as u64;
            if self.incomplete || self.stored_bytes + *len > self.max_bytes {
                self.incomplete = true;
                return;
            }
            self.incomplete |= !put(&self.file, &chunk.bytes, at);
        }
    }

    /// Completes the blob.
    pub fn finish_blob(&mut self) {
        let Some((id, len)) = self.open_blob.take() else {
            return;
        };
        let stored = Stored {
            from: self.end,
            len,
            wanted: true,
            users: 0,
        };
        self.blobs.insert(id, stored);
        self.end += len;
        self.stored_bytes += len;
    }

    /// Discards the incomplete blob.
    pub fn abandon_blob(&mut self) {
        self.open_blob = None;
    }

    /// Whether the log has this blob, so that set-up calls can begin with it.
    pub fn has_blob(&self, id: BlobId) -> bool {
        self.blobs.get(&id).is_some_and(|stored| stored.wanted)
    }

    /// Records that no further message will begin with the blob.
    pub fn drop_blob(&mut self, id: BlobId) {
        if let Some(stored) = self.blobs.get_mut(&id) {
            stored.wanted = false;
            self.clear_blob(id);
        }
    }

    /// Frees a blob if no message begins with it and none will.
    fn clear_blob(&mut self, id: BlobId) {
        let unused = |stored: &Stored| !stored.wanted && stored.users == 0;
        if self.blobs.get(&id).is_some_and(unused) {
            if let Some(stored) = self.blobs.remove(&id) {
                if punch_hole(&self.file, stored.from, stored.len) {
                    self.stored_bytes -= stored.len;
                }
            }
        }
    }

    /// Starts a set-up call to this worker, with this name (0: none), which begins with this blob.
    pub fn begin(&mut self, task: TaskId, rank: Rank, name: u64, blob: Option<BlobId>) {
        self.open = Some(OpenStoredCall {
            task,
            rank,
            name,
            blob,
            hash: Xxh3::new(),
            len: 0,
        });
    }

    /// Appends to the message.
    pub fn write(&mut self, chunks: &[Chunk]) {
        let Some(open) = &mut self.open else {
            return;
        };
        for chunk in chunks {
            let at = self.end + open.len;
            open.len += chunk.bytes.len() as u64;
            // The message may turn out to equal the last one, and then needs no room of its own.
            let last = self
                .messages
                .values()
                .next_back()
                .map_or(0, |last| last.len);
            if self.incomplete || self.stored_bytes + open.len > self.max_bytes + last {
                self.incomplete = true;
                return;
            }
            open.hash.update(&chunk.bytes);
            self.incomplete |= !put(&self.file, &chunk.bytes, at);
        }
    }

    /// Completes the message.
    pub fn finish(&mut self) {
        let Some(open) = self.open.take() else {
            return;
        };
        if self.incomplete {
            return;
        }
        let digest = open.hash.digest128();
        let same = |last: &StoredCall| {
            last.digest == digest
                && last.len == open.len
                && last.name == open.name
                && last.blob == open.blob
        };
        // Equal messages to several workers in a row are stored once. A worker that gets an equal message twice runs
        // it twice.
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
        } else if self.stored_bytes + open.len > self.max_bytes {
            self.incomplete = true;
        } else {
            if let Some(id) = open.blob {
                match self.blobs.get_mut(&id) {
                    Some(stored) => stored.users += 1,
                    // The blob is missing, so the message cannot be restored.
                    None => self.incomplete = true,
                }
            }
            let message = StoredCall {
                name: open.name,
                blob: open.blob,
                from: self.end,
                len: open.len,
                digest,
                users: 0,
                pending: [open.rank].into(),
                done: Ranks::default(),
            };
            self.messages.insert(self.next, message);
            self.tasks.insert(open.task, self.next);
            self.next += 1;
            self.end += open.len;
            self.stored_bytes += open.len;
        }
    }

    /// Discards the incomplete message.
    pub fn abandon(&mut self) {
        self.open = None;
    }

    /// Records that a task has ended; `setup_call`: the set-up call completed.
    pub fn ended(&mut self, task: TaskId, rank: Rank, setup_call: bool) {
        let Some(number) = self.tasks.remove(&task) else {
            return;
        };
        let Some(message) = self.messages.get_mut(&number) else {
            return;
        };
        message.pending.remove(&rank);
        if !setup_call {
            return self.clear(number);
        }
        message.users += 1;
        message.done.insert(rank);
        let calls = self.workers.entry(rank).or_default();
        let superseded = calls.record(message.name, number);
        let mut in_common = None;
        if message.done.contains_all(&self.members) && !is_in(&self.common, number) {
            message.users += 1;
            in_common = self.common.record(message.name, number);
        }
        for superseded in superseded.into_iter().chain(in_common) {
            self.release(superseded);
        }
    }

    /// Completes a message of [`SetupLogFile::begin`] with this task, which is of a head before: all of these workers
    /// have completed the call.
    pub fn finish_for(&mut self, task: TaskId, ranks: &[Rank]) {
        self.finish();
        let Some(number) = self.tasks.remove(&task) else {
            return;
        };
        for &rank in ranks {
            if let Some(message) = self.messages.get_mut(&number) {
                message.pending.insert(rank);
            }
        }
        for &rank in ranks {
            self.tasks.insert(task, number);
            self.ended(task, rank, true);
        }
    }

    /// Records that a set-up call is missing.
    pub fn miss(&mut self) {
        self.incomplete = true;
    }

    /// Records that a set-up call was not sent to its worker, which gets the call when it joins.
    pub fn logged(&mut self, task: TaskId, rank: Rank) {
        // Without a number, the call is missing from the file.
        let number = self.tasks.get(&task).copied().unwrap_or(u64::MAX);
        self.only_logged.entry(rank).or_insert(number);
        self.ended(task, rank, true);
    }

    /// Whether calls were logged for this worker that it has not completed.
    pub fn is_behind(&self, rank: Rank) -> bool {
        self.only_logged.contains_key(&rank)
    }

    /// Records that a worker has completed one of the calls that were only logged for it, and all before that one. If
    /// the worker is lost now, the random number state that the call has left is that of its successor.
    pub fn caught_up_to(&mut self, rank: Rank, number: u64) {
        let Some(&first) = self.only_logged.get(&rank) else {
            return;
        };
        if number < first {
            return;
        }
        match self.numbers(rank, |other| other > number).into_iter().min() {
            Some(next) => self.only_logged.insert(rank, next),
            None => self.only_logged.remove(&rank),
        };
    }

    /// Records that a worker has completed all of its calls.
    pub fn caught_up(&mut self, rank: Rank) {
        self.only_logged.remove(&rank);
    }

    /// One user less has this call.
    fn release(&mut self, number: u64) {
        if let Some(message) = self.messages.get_mut(&number) {
            message.users = message.users.saturating_sub(1);
        }
        self.clear(number);
    }

    /// Sets the workers of the cluster.
    pub fn set_members(&mut self, ranks: impl IntoIterator<Item = Rank>) {
        self.members = ranks.into_iter().collect();
    }

    /// Adds a worker to a cluster with these `members`: the calls that all of them have completed are its set-up calls,
    /// as if it had completed them, too.
    ///
    /// `but`: the name of what each worker has of its own, although its calls may equal those of all others if there are
    /// few of them.
    pub fn begin_worker(
        &mut self,
        rank: Rank,
        members: impl IntoIterator<Item = Rank>,
        but: Option<u64>,
    ) {
        self.set_members(members);
        self.update_common();
        let common = self.common.iter().map(|(name, &n)| (name, n));
        let common: Vec<(u64, u64)> = common.filter(|&(name, _)| Some(name) != but).collect();
        let before = self.workers.remove(&rank);
        let mut calls = SetupCalls::default();
        for (name, number) in common {
            calls.record(name, number);
            if let Some(message) = self.messages.get_mut(&number) {
                message.users += 1;
                message.done.insert(rank);
            }
        }
        self.workers.insert(rank, calls);
        for number in before
            .into_iter()
            .flat_map(|mut before| before.take().collect::<Vec<_>>())
        {
            self.release(number);
        }
        self.members.insert(rank);
    }

    /// Adds the calls that all workers have completed that are left: others have terminated since.
    fn update_common(&mut self) {
        let known: BTreeSet<u64> = self.common.iter().map(|(_, &number)| number).collect();
        let members = &self.members;
        let all = self.messages.iter_mut().filter(|(number, message)| {
            known.contains(number) || message.done.contains_all(members)
        });
        let mut common = SetupCalls::default();
        let mut superseded = Vec::new();
        for (&number, message) in all {
            message.users += usize::from(!known.contains(&number));
            superseded.extend(common.record(message.name, number));
        }
        self.common = common;
        for number in superseded {
            self.release(number);
        }
    }

    /// Frees a message if no worker has completed it and none will.
    fn clear(&mut self, number: u64) {
        let unused = |m: &StoredCall| m.users == 0 && m.pending.is_empty();
        if self.messages.get(&number).is_some_and(unused) {
            if let Some(message) = self.messages.remove(&number) {
                if punch_hole(&self.file, message.from, message.len) {
                    self.stored_bytes -= message.len;
                }
                if let Some(id) = message.blob {
                    if let Some(stored) = self.blobs.get_mut(&id) {
                        stored.users = stored.users.saturating_sub(1);
                    }
                    self.clear_blob(id);
                }
            }
        }
    }

    /// Frees the disk space of an incomplete log. No worker must be in the middle of being restored.
    pub fn discard(&mut self) {
        if self.incomplete && self.end > 0 {
            // Messages that have been cut off end beyond the last complete one. Only whole pages are freed.
            let page = 1 << 21;
            punch_hole(
                &self.file,
                0,
                (self.end + self.max_bytes).next_multiple_of(page) + page,
            );
            self.messages.clear();
            self.workers.clear();
            self.tasks.clear();
            self.blobs.clear();
            self.common = SetupCalls::default();
            (self.end, self.stored_bytes) = (0, 0);
        }
    }

    /// Whether the log contains all set-up calls.
    pub fn is_complete(&self) -> bool {
        !self.incomplete
    }

    /// The calls that restore this worker, in order.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn restore(&self, rank: Rank) -> io::Result<Vec<SetupMessage>> {
        let numbers = self.numbers(rank, |_| true);
        let map = self.map()?;
        let messages = numbers.iter().map(|&number| self.message(&map, number));
        messages.collect()
    }

    /// The calls that this worker has completed itself, in order. [`SetupLogFile::later_calls`] follow.
    /// [`SetupLogFile::unpin`] follows when the worker does not need them any more.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn completed_calls(&mut self, rank: Rank) -> io::Result<Vec<NumberedCall>> {
        let end = self.only_logged.get(&rank).copied().unwrap_or(u64::MAX);
        self.pin(rank, |number| number < end)
    }

    /// The calls of this worker after the one with the number `after`: those that were only logged.
    /// [`SetupLogFile::unpin`] follows when the worker does not need them any more.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn later_calls(&mut self, rank: Rank, after: Option<u64>) -> io::Result<Vec<NumberedCall>> {
        let Some(&first) = self.only_logged.get(&rank) else {
            return Ok(Vec::new());
        };
        self.pin(rank, |number| {
            number >= first && after.is_none_or(|after| number > after)
        })
    }

    /// The call with this number, which is pinned.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn call(&self, number: u64) -> io::Result<SetupMessage> {
        self.message(&self.map()?, number)
    }

    /// The worker is not being restored any more.
    pub fn unpin(&mut self, rank: Rank) {
        for number in self.pinned.remove(&rank).into_iter().flatten() {
            if let Some(message) = self.messages.get_mut(&number) {
                message.pending.remove(&rank);
            }
            self.clear(number);
        }
    }

    fn pin(&mut self, rank: Rank, which: impl Fn(u64) -> bool) -> io::Result<Vec<NumberedCall>> {
        let numbers = self.numbers(rank, which);
        if numbers.is_empty() {
            return Ok(Vec::new());
        }
        let map = self.map()?;
        let mut calls = Vec::with_capacity(numbers.len());
        for &number in &numbers {
            calls.push((number, self.message(&map, number)?));
        }
        for number in &numbers {
            if let Some(message) = self.messages.get_mut(number) {
                message.pending.insert(rank);
            }
        }
        self.pinned.entry(rank).or_default().extend(numbers);
        Ok(calls)
    }

    fn numbers(&self, rank: Rank, which: impl Fn(u64) -> bool) -> Vec<u64> {
        let calls = self.workers.get(&rank);
        let numbers = calls
            .into_iter()
            .flat_map(SetupCalls::iter)
            .map(|(_, &number)| number);
        numbers.filter(|&number| which(number)).collect()
    }

    fn map(&self) -> io::Result<Bytes> {
        if self.end == 0 {
            // An empty file cannot be mapped.
            return Ok(Bytes::new());
        }
        // SAFETY: the file has no name. It only grows, and only unused parts are freed, so no part is changed while a
        // message in it may be in use.
        Ok(Bytes::from_owner(unsafe { Mmap::map(&self.file)? }))
    }

    fn message(&self, map: &Bytes, number: u64) -> io::Result<SetupMessage> {
        let part = |from: u64, len: u64| {
            let from = usize::try_from(from).ok()?;
            let to = from.checked_add(usize::try_from(len).ok()?)?;
            (to <= map.len()).then(|| map.slice(from..to))
        };
        let stored = || {
            let message = self.messages.get(&number)?;
            let blob = match message.blob {
                Some(id) => Some(self.blobs.get(&id)?),
                None => None,
            };
            let blob = blob.map(|stored| (stored.from, stored.len));
            let parts = blob.into_iter().chain([(message.from, message.len)]);
            let parts: Option<Vec<Bytes>> = parts.map(|(from, len)| part(from, len)).collect();
            Some((message.name, parts?))
        };
        stored().ok_or_else(|| io::Error::other("the file is too short"))
    }
}

/// Whether the last calls contain this one.
fn is_in(calls: &SetupCalls<u64>, number: u64) -> bool {
    let mut newer = calls
        .iter()
        .rev()
        .take_while(|&(_, &other)| other >= number);
    newer.any(|(_, &other)| other == number)
}

/// Frees the disk space of a part of the file. Returns whether that succeeded.
fn punch_hole(file: &File, from: u64, len: u64) -> bool {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (from, len) = (from as libc::off_t, len as libc::off_t);
    if len == 0 {
        // The system rejects an empty part.
        return true;
    }
    // SAFETY: fallocate has no memory effects. A failure costs only disk space.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, from, len) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn setup_log(max_bytes: u64) -> SetupLogFile {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("setup-log-{}-{}", name.0, name.1));
        let setup_log = SetupLogFile::new(&path, max_bytes).unwrap();
        assert!(!path.exists());
        setup_log
    }

    fn send(setup_log: &mut SetupLogFile, task: TaskId, rank: Rank, name: u64, message: &[u8]) {
        send_with(setup_log, task, rank, name, None, message);
    }

    fn send_with(
        setup_log: &mut SetupLogFile,
        task: TaskId,
        rank: Rank,
        name: u64,
        blob: Option<BlobId>,
        message: &[u8],
    ) {
        setup_log.begin(task, rank, name, blob);
        for part in message.chunks(7) {
            setup_log.write(&[Bytes::copy_from_slice(part).into()]);
        }
        setup_log.finish();
    }

    fn restored(setup_log: &SetupLogFile, rank: Rank) -> Vec<Vec<u8>> {
        let messages = setup_log.restore(rank).unwrap();
        messages.iter().map(|(_, parts)| parts.concat()).collect()
    }

    #[test]
    fn each_worker_is_restored_from_its_completed_calls_in_order() {
        let mut setup_log = setup_log(1 << 20);
        for rank in 0..3u32 {
            send(&mut setup_log, u64::from(rank), rank, 0, b"for all of them");
        }
        send(&mut setup_log, 3, 1, 0, b"for one");
        for rank in 0..3 {
            setup_log.ended(u64::from(rank), rank, true);
        }
        setup_log.ended(3, 1, true);
        send(&mut setup_log, 4, 1, 0, b"interrupted");
        setup_log.ended(4, 1, false);
        assert_eq!(restored(&setup_log, 0), [b"for all of them"]);
        assert_eq!(
            restored(&setup_log, 1),
            [&b"for all of them"[..], b"for one"]
        );
        assert_eq!(restored(&setup_log, 9), Vec::<Vec<u8>>::new());
        assert_eq!(setup_log.end, 15 + 7 + 11);
    }

    #[test]
    fn a_value_that_is_set_again_supersedes_the_earlier_one() {
        let mut setup_log = setup_log(1 << 20);
        let messages = [
            (7, "first"),
            (8, "other"),
            (7, "second"),
            (0, "uses"),
            (7, "third"),
        ];
        for (task, (name, text)) in (0..).zip(messages) {
            send(&mut setup_log, task, 0, name, text.as_bytes());
            setup_log.ended(task, 0, true);
        }
        let texts: [&[u8]; 4] = [b"other", b"second", b"uses", b"third"];
        assert_eq!(restored(&setup_log, 0), texts);
    }

    #[test]
    fn a_log_that_exceeds_its_limit_is_not_complete() {
        let mut setup_log = setup_log(20);
        send(&mut setup_log, 0, 0, 0, &[1; 20]);
        // An equal call to another worker takes no room.
        send(&mut setup_log, 1, 1, 0, &[1; 20]);
        assert!(setup_log.is_complete());
        send(&mut setup_log, 2, 0, 0, &[2; 20]);
        assert!(!setup_log.is_complete());
        let blocks = |setup_log: &SetupLogFile| setup_log.file.metadata().unwrap().blocks();
        assert!(blocks(&setup_log) > 0);
        setup_log.discard();
        assert_eq!(blocks(&setup_log), 0);
        send(&mut setup_log, 3, 0, 0, &[3; 10]);
        setup_log.ended(0, 0, true);
        assert_eq!(blocks(&setup_log), 0);
        assert!(!setup_log.is_complete());
    }

    #[test]
    fn a_blob_is_stored_once_until_its_last_message_is_superseded() {
        let mut setup_log = setup_log(130);
        let store = |setup_log: &mut SetupLogFile, id: BlobId, byte: u8| {
            setup_log.begin_blob(id);
            setup_log.write_blob(&[Bytes::from(vec![byte; 60]).into()]);
            setup_log.write_blob(&[Bytes::from(vec![byte; 40]).into()]);
            setup_log.finish_blob();
        };
        store(&mut setup_log, 5, 5);
        for rank in 0..3u32 {
            let task = u64::from(rank);
            let rest: &[u8] = if rank == 2 { b"more" } else { b"" };
            send_with(&mut setup_log, task, rank, 7, Some(5), rest);
            setup_log.ended(task, rank, true);
        }
        setup_log.drop_blob(5);
        assert!(setup_log.is_complete() && !setup_log.has_blob(5));
        assert_eq!(restored(&setup_log, 1), [[5; 100]]);
        assert_eq!(restored(&setup_log, 2), [[&[5; 100][..], b"more"].concat()]);
        assert_eq!(setup_log.stored_bytes, 104);
        // Other values supersede the messages.
        for rank in 0..3u32 {
            let task = 10 + u64::from(rank);
            send(&mut setup_log, task, rank, 7, b"other");
            setup_log.ended(task, rank, true);
        }
        assert_eq!((setup_log.stored_bytes, setup_log.blobs.len()), (5, 0));
        // A blob that no message begins with, and a blob that is not completed.
        store(&mut setup_log, 6, 6);
        setup_log.drop_blob(6);
        setup_log.begin_blob(7);
        setup_log.write_blob(&[Bytes::from(vec![7; 60]).into()]);
        setup_log.abandon_blob();
        assert_eq!((setup_log.stored_bytes, setup_log.is_complete()), (5, true));
        assert_eq!(restored(&setup_log, 0), [b"other"]);
    }

    #[test]
    fn a_call_that_a_worker_got_twice_is_restored_twice() {
        let mut setup_log = setup_log(1 << 20);
        for task in 0..3u64 {
            for rank in 0..2 {
                let task = 2 * task + u64::from(rank);
                send(&mut setup_log, task, rank, 0, b"x <- x + 1");
                // The second call of one worker is answered only after the third is sent.
                if task != 2 {
                    setup_log.ended(task, rank, true);
                }
            }
        }
        setup_log.ended(2, 0, true);
        assert_eq!(restored(&setup_log, 0).len(), 3);
        assert_eq!(restored(&setup_log, 1).len(), 3);
        assert_eq!(setup_log.messages.len(), 3);
    }

    #[test]
    fn superseded_and_interrupted_calls_do_not_count() {
        let mut setup_log = setup_log(50);
        for task in 0..1000u64 {
            send(&mut setup_log, task, 0, 7, &task.to_le_bytes().repeat(3));
            setup_log.ended(task, 0, true);
        }
        for task in 1000..2000u64 {
            send(&mut setup_log, task, 0, 0, &task.to_le_bytes().repeat(3));
            setup_log.ended(task, 0, false);
        }
        assert!(setup_log.is_complete());
        assert_eq!(restored(&setup_log, 0), [999u64.to_le_bytes().repeat(3)]);
        assert_eq!((setup_log.messages.len(), setup_log.tasks.len()), (1, 0));
    }

    fn complete(setup_log: &mut SetupLogFile, task: TaskId, ranks: &[Rank], name: u64, text: &str) {
        for (&rank, task) in ranks.iter().zip(task..) {
            send(setup_log, task, rank, name, text.as_bytes());
        }
        for (&rank, task) in ranks.iter().zip(task..) {
            setup_log.ended(task, rank, true);
        }
    }

    #[test]
    fn a_new_worker_gets_the_calls_that_all_workers_have_completed() {
        let mut setup_log = setup_log(1 << 20);
        setup_log.set_members(0..3);
        complete(&mut setup_log, 10, &[0, 1, 2], 7, "value");
        complete(&mut setup_log, 20, &[0, 1], 0, "for a part");
        complete(&mut setup_log, 30, &[0, 1, 2], 0, "uses");
        complete(&mut setup_log, 40, &[2], 8, "for one");
        // Two workers have not completed it.
        send(&mut setup_log, 50, 0, 0, b"interrupted");
        send(&mut setup_log, 51, 1, 0, b"interrupted");
        setup_log.ended(50, 0, true);
        setup_log.ended(51, 1, false);
        setup_log.begin_worker(3, 0..3, None);
        assert_eq!(restored(&setup_log, 3), [&b"value"[..], b"uses"]);
        // From now on it counts, too.
        complete(&mut setup_log, 60, &[0, 1, 2], 0, "without the new one");
        complete(&mut setup_log, 70, &[0, 1, 2, 3], 0, "with it");
        setup_log.begin_worker(4, 0..4, None);
        assert_eq!(
            restored(&setup_log, 4),
            [&b"value"[..], b"uses", b"with it"]
        );
        assert_eq!(
            restored(&setup_log, 3),
            [&b"value"[..], b"uses", b"with it"]
        );
    }

    #[test]
    fn parts_do_not_supersede_the_values_of_all() {
        let mut setup_log = setup_log(1 << 20);
        setup_log.set_members(0..2);
        complete(&mut setup_log, 10, &[0, 1], 7, "all");
        complete(&mut setup_log, 20, &[0], 7, "first");
        complete(&mut setup_log, 30, &[1], 7, "second");
        assert_eq!(restored(&setup_log, 0), [b"first"]);
        setup_log.begin_worker(2, 0..2, None);
        assert_eq!(restored(&setup_log, 2), [b"all"]);
        // The last value of all is the one that counts.
        complete(&mut setup_log, 40, &[0, 1, 2], 7, "again");
        setup_log.begin_worker(3, 0..3, None);
        assert_eq!(restored(&setup_log, 3), [b"again"]);
        assert_eq!(setup_log.messages.len(), 1);
        assert_eq!(setup_log.stored_bytes, 5);
    }

    #[test]
    fn workers_that_are_gone_do_not_count() {
        let mut setup_log = setup_log(1 << 20);
        setup_log.set_members(0..3);
        complete(&mut setup_log, 10, &[0, 1], 7, "old");
        complete(&mut setup_log, 20, &[0, 1, 2], 0, "all");
        complete(&mut setup_log, 30, &[0, 1], 7, "new");
        setup_log.begin_worker(3, [0, 1], None);
        assert_eq!(restored(&setup_log, 3), [&b"old"[..], b"all", b"new"]);
        assert_eq!(restored(&setup_log, 0), restored(&setup_log, 3));
    }

    #[test]
    fn a_new_worker_of_an_unused_cluster_gets_nothing() {
        let mut setup_log = setup_log(1 << 20);
        setup_log.set_members(0..70);
        setup_log.begin_worker(70, 0..70, None);
        assert_eq!(restored(&setup_log, 70), Vec::<Vec<u8>>::new());
        complete(&mut setup_log, 10, &(0..71).collect::<Vec<_>>(), 0, "all");
        complete(
            &mut setup_log,
            100,
            &(0..70).collect::<Vec<_>>(),
            0,
            "not the last",
        );
        setup_log.begin_worker(71, 0..71, None);
        assert_eq!(restored(&setup_log, 71), [b"all"]);
    }
}
