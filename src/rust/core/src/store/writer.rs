//! Appends records to a run, on a thread of its own, and makes them durable.
//!
//! The thread writes all results that have come meanwhile, short ones together in one record, and then calls
//! `fdatasync()` once for all of them. [`WriterSettings::interval`] is the least time between two of these calls. Only
//! then are the results reported as durable ([`Writer::take_durable`]).

use super::output::{Item, Output, Series};
use super::record::RunId;
use super::{ListPayload, RESULTS};
use crate::platform::signals;
use crate::protocol::body::Body;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of a list of short results from which on the list is not extended.
const MAX_LIST: usize = 1 << 20;
/// Bytes of results that may wait to be written. The producer waits beyond that.
const MAX_QUEUE: usize = 64 << 20;
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

/// Shows the state of a writer to other threads, also after its end.
#[derive(Clone, Debug)]
pub struct Gauge(Arc<Shared>);

impl Gauge {
    /// The number of results that are not durable yet, and why they cannot be written.
    pub fn read(&self) -> (usize, Option<String>) {
        let queue = self.0.queue();
        let trouble = queue.error.as_ref().or(queue.trouble.as_ref());
        (queue.pending, trouble.cloned())
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
        let series = Series {
            folder,
            run: settings.run,
            r_version: settings.r_version,
            name: None,
            durable: true,
        };
        let output = Output::start(series)?;
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        // Signals are for R's thread.
        let thread = signals::with_all_blocked(|| {
            std::thread::Builder::new()
                .name("rustcluster-run".into())
                .spawn(move || run(&of_thread, output, settings))
        })?;
        Ok(Writer {
            shared,
            thread: Some(thread),
            pid: std::process::id(),
        })
    }

    /// Shows the state of the writer to other threads.
    pub fn gauge(&self) -> Gauge {
        Gauge(self.shared.clone())
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
        // A gauge may live on, and needs none of what could not be written.
        let mut queue = self.shared.queue();
        queue.items = Vec::new();
        queue.list = ListPayload::default();
    }
}

fn run(shared: &Shared, mut output: Output, settings: WriterSettings) {
    let mut synced = Instant::now();
    loop {
        let mut queue = shared.queue();
        while queue.items.is_empty() && queue.list.elements.is_empty() {
            if queue.closing {
                output.remove_if_empty();
                return;
            }
            queue = shared
                .work
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        // Results that come until the next call of fdatasync() are written together.
        loop {
            let left = settings.interval.saturating_sub(synced.elapsed());
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
            if !settings.waits || queue.closing {
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
