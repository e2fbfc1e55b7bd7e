//! Appends records to a run, on a thread of its own, and makes them durable.
//!
//! The thread writes all results that have come meanwhile, short ones together in one record, and then calls
//! `fdatasync()` once for all of them. [`WriterSettings::interval`] is the least time between two of these calls. Only
//! then are the results reported as durable ([`Writer::take_durable`]).

use super::record::{self, Kind, RECORD_HEAD, RecordHead, RunId};
use super::{EXTENSION, ListPayload, MAX_FILE, RESULTS};
use crate::platform::signals::{self, without_file_size_signal};
use crate::protocol::body::Body;
use bytes::Bytes;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a list of short results from which on the list is not extended.
const MAX_LIST: usize = 1 << 20;
/// Bytes of results that may wait to be written. The producer waits beyond that.
const MAX_QUEUE: usize = 64 << 20;
/// Results up to this size are copied into one buffer with other records.
const BUFFER: usize = 256 * 1024;
/// Pause before a failed write is tried again, if failures are waited out.
const RETRY: Duration = Duration::from_secs(1);

/// How a [`Writer`] writes.
#[derive(Clone, Copy, Debug)]
pub struct WriterSettings {
    /// The run.
    pub run: RunId,
    /// The version of R, as `R_VERSION` of its C API.
    pub r_version: u32,
    /// The least time between two calls of `fdatasync()`.
    pub interval: Duration,
    /// Whether to try again while results cannot be written, instead of reporting an error.
    pub waits: bool,
}

#[derive(Debug)]
enum Item {
    List(ListPayload),
    Value {
        element: u32,
        failed: bool,
        body: Body,
    },
}

impl Item {
    fn elements(&self) -> &[u32] {
        match self {
            Item::List(list) => &list.elements,
            Item::Value { element, .. } => std::slice::from_ref(element),
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    items: Vec<Item>,
    list: ListPayload,
    /// Bytes of `items` and `list`, and of what is being written.
    bytes: usize,
    durable: Vec<u32>,
    /// Number of elements that are not durable yet.
    pending: usize,
    error: Option<String>,
    /// The reason why writing is being tried again.
    trouble: Option<String>,
    closing: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to write.
    work: Condvar,
    /// Something has been written.
    written: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module's documentation. Its end waits until all results are durable.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    pid: u32,
}

impl Writer {
    /// Starts to write into a new file of the run in this directory.
    ///
    /// # Errors
    /// If the file or the thread cannot be made.
    pub fn start(dir: &Path, settings: WriterSettings) -> io::Result<Writer> {
        let folder = dir.join(RESULTS);
        fs::create_dir_all(&folder)?;
        let mut output = Output {
            folder,
            settings,
            file: None,
            offset: 0,
            durable: 0,
        };
        output.next_file()?;
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        // Signals are for R's thread.
        let thread = signals::with_all_blocked(|| {
            std::thread::Builder::new()
                .name("rustcluster-run".into())
                .spawn(move || run(&of_thread, output))
        })?;
        Ok(Writer {
            shared,
            thread: Some(thread),
            pid: std::process::id(),
        })
    }

    /// Adds short results: `add` appends their items and their elements.
    pub fn add_short(&self, add: impl FnOnce(&mut ListPayload)) {
        let mut queue = self.shared.queue();
        let (before, count) = (queue.list.items.len(), queue.list.elements.len());
        add(&mut queue.list);
        queue.pending += queue.list.elements.len() - count;
        queue.bytes += queue.list.items.len() - before;
        if queue.list.items.len() > MAX_LIST {
            let list = std::mem::take(&mut queue.list);
            queue.items.push(Item::List(list));
        }
        self.shared.work.notify_one();
    }

    /// Adds a result: R's serialization of a value or of an error.
    pub fn add(&self, element: u32, failed: bool, body: Body) {
        let mut queue = self.shared.queue();
        queue.bytes += body.len;
        queue.pending += 1;
        queue.items.push(Item::Value {
            element,
            failed,
            body,
        });
        self.shared.work.notify_one();
    }

    /// Waits for up to this time while too many bytes wait to be written. Returns whether they still do.
    pub fn wait_for_room(&self, max: Duration) -> bool {
        let queue = self.shared.queue();
        let is_full = |queue: &mut Queue| queue.bytes > MAX_QUEUE && queue.error.is_none();
        let waited = self.shared.written.wait_timeout_while(queue, max, is_full);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        is_full(&mut queue)
    }

    /// Waits for up to this time until all results are durable. Returns whether they are.
    ///
    /// # Errors
    /// If results could not be written: see [`Writer::error`].
    pub fn wait_for_all(&self, max: Duration) -> Result<bool, String> {
        let queue = self.shared.queue();
        let is_busy = |queue: &mut Queue| queue.pending > 0 && queue.error.is_none();
        let waited = self.shared.written.wait_timeout_while(queue, max, is_busy);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &queue.error {
            Some(error) => Err(error.clone()),
            None => Ok(!is_busy(&mut queue)),
        }
    }

    /// Returns the elements that have become durable since the last call.
    pub fn take_durable(&self) -> Vec<u32> {
        std::mem::take(&mut self.shared.queue().durable)
    }

    /// Returns why results could not be written. Nothing is written after that.
    pub fn error(&self) -> Option<String> {
        self.shared.queue().error.clone()
    }

    /// Returns why results cannot be written at present, while that is tried again.
    pub fn trouble(&self) -> Option<String> {
        self.shared.queue().trouble.clone()
    }

    /// Makes the thread end when it has written everything. Returns whether it has ended.
    pub fn close(&self) -> bool {
        self.shared.queue().closing = true;
        self.shared.work.notify_one();
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // A fork of the process does not have the thread.
        if self.pid != std::process::id() {
            return;
        }
        self.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, mut output: Output) {
    let mut synced = Instant::now();
    loop {
        let mut queue = shared.queue();
        while queue.items.is_empty() && queue.list.elements.is_empty() {
            if queue.closing {
                return;
            }
            queue = shared
                .work
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        // Results that come until the next call of fdatasync() are written together.
        loop {
            let left = output.settings.interval.saturating_sub(synced.elapsed());
            if left.is_zero() || queue.closing || queue.bytes > MAX_QUEUE / 2 {
                break;
            }
            let waited = shared.work.wait_timeout(queue, left);
            (queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let mut items = std::mem::take(&mut queue.items);
        let list = std::mem::take(&mut queue.list);
        if !list.elements.is_empty() {
            items.push(Item::List(list));
        }
        let bytes = queue.bytes;
        drop(queue);
        while let Err(error) = output.write(&items) {
            output.drop_file();
            let mut queue = shared.queue();
            if !output.settings.waits || queue.closing {
                queue.error = Some(error.to_string());
                shared.written.notify_all();
                return;
            }
            queue.trouble = Some(error.to_string());
            let _ = shared.work.wait_timeout(queue, RETRY);
        }
        synced = Instant::now();
        let mut queue = shared.queue();
        queue.bytes -= bytes;
        queue.trouble = None;
        for item in &items {
            let elements = item.elements();
            queue.pending -= elements.len();
            queue.durable.extend_from_slice(elements);
        }
        shared.written.notify_all();
    }
}

/// The file to which records are appended.
struct Output {
    folder: PathBuf,
    settings: WriterSettings,
    file: Option<(PathBuf, File)>,
    offset: u64,
    durable: u64,
}

impl Output {
    /// Makes the next file. Its number follows those of all others.
    fn next_file(&mut self) -> io::Result<()> {
        let number = |path: &Path| path.file_stem()?.to_str()?.parse().ok();
        let mut next = 1 + fs::read_dir(&self.folder)?
            .filter_map(|entry| number(&entry.ok()?.path()))
            .max()
            .unwrap_or(0_u32);
        let (path, file) = loop {
            let path = self.folder.join(format!("{next:06}.{EXTENSION}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => next += 1,
                opened => break (path, opened?),
            }
        };
        self.file = Some((path, file));
        self.durable = 0;
        let head = record::file_head(self.settings.run);
        self.offset = head.len() as u64;
        self.put(&head)?;
        // The name of the file must be durable, too.
        File::open(&self.folder)?.sync_all()
    }

    /// Leaves the file, whose end may be incomplete: the next records go to another one.
    fn drop_file(&mut self) {
        let Some((path, file)) = self.file.take() else {
            return;
        };
        // Frees what a full disk needs. Readers do not depend on it.
        let _ = match self.durable > record::FILE_HEAD as u64 {
            true => file.set_len(self.durable),
            false => fs::remove_file(path),
        };
    }

    /// Writes records and makes them durable.
    fn write(&mut self, items: &[Item]) -> io::Result<()> {
        let mut buffer = Vec::new();
        for item in items {
            if self.file.is_none() || self.offset >= MAX_FILE {
                self.flush(&mut buffer)?;
                self.sync()?;
                self.next_file()?;
            }
            self.append(item, &mut buffer)?;
        }
        self.flush(&mut buffer)?;
        self.sync()
    }

    fn append(&mut self, item: &Item, buffer: &mut Vec<u8>) -> io::Result<()> {
        let numbers = record::numbers(item.elements());
        let (kind, failed, head);
        let chunks: Vec<&[u8]> = match item {
            Item::List(list) => {
                (kind, failed) = (Kind::List, false);
                head = list.head(self.settings.r_version);
                vec![&head, &list.items]
            }
            Item::Value {
                failed: is, body, ..
            } => {
                (kind, failed) = (Kind::Value, *is);
                body.chunks.iter().map(Bytes::as_ref).collect()
            }
        };
        let mut hash = Xxh3::new();
        for chunk in &chunks {
            hash.update(chunk);
        }
        let length: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let head = RecordHead {
            kind,
            count: item.elements().len() as u32,
            failed,
            length: length as u64,
            durable: self.durable,
            at: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0.0, |at| at.as_secs_f64()),
            digest: hash.digest128(),
        };
        self.offset += head.size();
        buffer.extend_from_slice(&head.encode(&numbers));
        buffer.extend_from_slice(&numbers);
        for chunk in chunks {
            if buffer.len() + chunk.len() > BUFFER + RECORD_HEAD {
                self.flush(buffer)?;
            }
            if chunk.len() > BUFFER {
                self.put(chunk)?;
            } else {
                buffer.extend_from_slice(chunk);
            }
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some((_, file)) = &mut self.file else {
            return Err(io::Error::other("no file is open"));
        };
        without_file_size_signal(|| file.write_all(bytes))
    }

    fn flush(&mut self, buffer: &mut Vec<u8>) -> io::Result<()> {
        if !buffer.is_empty() {
            self.put(buffer)?;
            buffer.clear();
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some((_, file)) = &self.file {
            file.sync_data()?;
            self.durable = self.offset;
        }
        Ok(())
    }
}
