//! What lasts on workers, held by the head for hosts that may come back: an agent that is lost takes
//! with it what it held (see [`crate::agent::replay`]).
//!
//! Messages are written to a file that has no name, in the order in which they are sent, and each
//! knows on which workers it has lasted. A host that is back gets them from a map of the file: they
//! take no memory of the head that the system could not have back.

use crate::scheduler::{Rank, TaskId};
use crate::share::Chunk;
use bytes::Bytes;
use memmap2::Mmap;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

#[derive(Debug)]
struct Message {
    name: u64,
    from: u64,
    len: u64,
    digest: u128,
    /// On these it has lasted, and still does.
    ranks: BTreeSet<Rank>,
    /// Sent, and not answered yet.
    pending: usize,
}

struct Open {
    task: TaskId,
    name: u64,
    hash: Xxh3,
    len: u64,
}

/// See the module's documentation.
pub struct Spool {
    file: File,
    /// In the order of sending; numbered from `first`.
    messages: Vec<Message>,
    /// The message of each task that is not answered.
    tasks: HashMap<TaskId, usize>,
    open: Option<Open>,
    end: u64,
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
            messages: Vec::new(),
            tasks: HashMap::new(),
            open: None,
            end: 0,
            most,
            incomplete: false,
        })
    }

    /// A message begins that is to last, under this name (0: none).
    pub fn begin(&mut self, task: TaskId, name: u64) {
        self.open = Some(Open {
            task,
            name,
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
            let last = self.messages.last().map_or(0, |last| last.len);
            if self.incomplete || self.end + open.len > self.most + last {
                self.incomplete = true;
                return;
            }
            open.hash.update(&chunk.bytes);
            // A full disk, mostly.
            self.incomplete |= self.file.write_all_at(&chunk.bytes, at).is_err();
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
        let last = self.messages.last_mut();
        // To many workers goes the same, one after the other.
        if let Some(last) = last
            .filter(|last| last.digest == digest && last.len == open.len && last.name == open.name)
        {
            last.pending += 1;
        } else if self.end + open.len > self.most {
            self.incomplete = true;
            return;
        } else {
            self.messages.push(Message {
                name: open.name,
                from: self.end,
                len: open.len,
                digest,
                ranks: BTreeSet::new(),
                pending: 1,
            });
            self.end += open.len;
        }
        self.tasks.insert(open.task, self.messages.len() - 1);
    }

    /// The message will not be complete.
    pub fn abandon(&mut self) {
        self.open = None;
    }

    /// A task has ended; `lasts`: with what it did to its worker.
    pub fn ended(&mut self, task: TaskId, rank: Rank, lasts: bool) {
        let Some(at) = self.tasks.remove(&task) else {
            return;
        };
        let message = &mut self.messages[at];
        message.pending -= 1;
        if !lasts {
            return;
        }
        message.ranks.insert(rank);
        let name = message.name;
        if name == 0 {
            return;
        }
        // What was set before to the same name, if nothing in between can have looked at it.
        for earlier in self.messages[..at].iter_mut().rev() {
            if earlier.ranks.contains(&rank) {
                if earlier.name == 0 {
                    break;
                }
                if earlier.name == name {
                    earlier.ranks.remove(&rank);
                    let unused = earlier.ranks.is_empty() && earlier.pending == 0;
                    if unused {
                        let (from, len) = (earlier.from, earlier.len);
                        give_back(&self.file, from, len);
                    }
                    break;
                }
            }
        }
    }

    /// Whether all that lasts is here.
    pub fn is_complete(&self) -> bool {
        !self.incomplete
    }

    /// What has lasted on this worker, in order: names and messages.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn restore(&self, rank: Rank) -> io::Result<Vec<(u64, Bytes)>> {
        if self.end == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: the file has no name, and what is in it is not written again while a message of it
        // may be in use: it only grows, and gives back what no worker has.
        let map = Bytes::from_owner(unsafe { Mmap::map(&self.file)? });
        let of_rank = self.messages.iter().filter(|m| m.ranks.contains(&rank));
        let message = |m: &Message| {
            let from = usize::try_from(m.from).ok()?;
            let to = from.checked_add(usize::try_from(m.len).ok()?)?;
            (to <= map.len()).then(|| (m.name, map.slice(from..to)))
        };
        Ok(of_rank.filter_map(message).collect())
    }
}

/// Has the file system take back what a part of the file takes up, if it can.
fn give_back(file: &File, from: u64, len: u64) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (from, len) = (from as libc::off_t, len as libc::off_t);
        // SAFETY: fallocate has no memory effects. That it fails costs room on the disk alone.
        unsafe { libc::fallocate(file.as_raw_fd(), mode, from, len) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, from, len);
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

    fn send(spool: &mut Spool, task: TaskId, name: u64, message: &[u8]) {
        spool.begin(task, name);
        for part in message.chunks(7) {
            spool.write(&[Bytes::copy_from_slice(part).into()]);
        }
        spool.finish();
    }

    fn restored(spool: &Spool, rank: Rank) -> Vec<Vec<u8>> {
        let messages = spool.restore(rank).unwrap();
        messages.iter().map(|(_, bytes)| bytes.to_vec()).collect()
    }

    #[test]
    fn each_worker_gets_what_lasted_on_it_in_order() {
        let mut spool = spool(1 << 20);
        for rank in 0..3u32 {
            send(&mut spool, u64::from(rank), 0, b"for all of them");
        }
        send(&mut spool, 3, 0, b"for one");
        for rank in 0..3 {
            spool.ended(u64::from(rank), rank, true);
        }
        spool.ended(3, 1, true);
        send(&mut spool, 4, 0, b"interrupted");
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
            send(&mut spool, task, name, text.as_bytes());
            spool.ended(task, 0, true);
        }
        let texts: [&[u8]; 4] = [b"other", b"second", b"uses", b"third"];
        assert_eq!(restored(&spool, 0), texts);
    }

    #[test]
    fn beyond_the_bound_it_is_not_complete() {
        let mut spool = spool(20);
        send(&mut spool, 0, 0, &[1; 20]);
        // The same once more takes no room.
        send(&mut spool, 1, 0, &[1; 20]);
        assert!(spool.is_complete());
        send(&mut spool, 2, 0, &[2; 20]);
        assert!(!spool.is_complete());
    }
}
