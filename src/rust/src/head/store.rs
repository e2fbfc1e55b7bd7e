//! The results of a run on disk, for R: see [`rustcluster_core::store`].

use super::handle::SLICE;
use super::values::{Keep, Saving, Storing, serialized};
use crate::codec::stored::Stored;
use crate::codec::stream::{self, Sink};
use crate::r::failure::{Failure, Value};
use crate::r::unwind::{self, Jump};
use extendr_api::prelude::*;
use extendr_ffi::{
    INTEGER_ELT, LOGICAL_ELT, R_NilValue, REAL_ELT, Rf_duplicate, Rf_protect, Rf_unprotect,
    SET_VECTOR_ELT, SEXP, SEXPTYPE, TYPEOF, VECTOR_ELT, XLENGTH,
};
use rustcluster_core::head::dashboard::board::StoreView;
use rustcluster_core::platform::detached;
use rustcluster_core::platform::signals::without_file_size_signal;
use rustcluster_core::store::lock::{Lock, Owner};
use rustcluster_core::store::record::{Kind, RunId};
use rustcluster_core::store::save::{self, SaveRequest};
use rustcluster_core::store::{Index, State, Writer, WriterSettings, elements_of_file};
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// A run that R has opened.
struct Store {
    dir: PathBuf,
    run: RunId,
    index: RefCell<Index>,
    /// The writer, and the lock that is released after it.
    writer: RefCell<Option<Arc<Writer>>>,
    lock: RefCell<Option<Lock>>,
    /// The record that was read last: its number, its elements and its payload.
    last: RefCell<Option<(usize, Vec<u32>, Robj)>>,
    /// The position of the element that was read last, in that record.
    last_at: Cell<usize>,
}

impl Drop for Store {
    fn drop(&mut self) {
        // The writer ends first.
        self.writer.take();
    }
}

fn unreadable(error: &std::io::Error) -> Failure {
    Failure::new("run_unreadable").with("reason", error.to_string())
}

/// Returns the failure of a run whose results cannot be written.
pub(super) fn write_failed(reason: impl Into<Value>) -> Failure {
    Failure::new("run_write_failed").with("reason", reason)
}

fn locked(owner: Owner) -> Failure {
    let failure = Failure::new("run_locked").with("pid", owner.pid.map(|pid| pid as i32));
    match owner.host {
        Some(host) => failure.with("host", host),
        None => failure,
    }
}

/// Opens the run with this id. `elements`: the number of its elements. `owner`: the text of the lock, or `""` to
/// read only. Returns an external pointer.
/// @noRd
#[extendr]
fn store_open(dir: &str, run: &str, elements: f64, owner: &str) -> Robj {
    let open = || -> std::result::Result<Store, Failure> {
        let dir = PathBuf::from(dir);
        let lock = match owner {
            "" => None,
            owner => match Lock::take(&dir.join("lock"), owner) {
                Ok(Ok(lock)) => Some(lock),
                Ok(Err(owner)) => return Err(locked(owner)),
                Err(error) => {
                    let reason = format!("cannot lock the directory: {error}");
                    return Err(write_failed(reason));
                }
            },
        };
        let run: RunId = run.as_bytes().try_into().map_err(|_| {
            Failure::new("run_unreadable").with("reason", "the id of the run is damaged")
        })?;
        let index =
            Index::open(&dir, run, elements as usize).map_err(|error| unreadable(&error))?;
        Ok(Store {
            dir,
            run,
            index: RefCell::new(index),
            writer: RefCell::new(None),
            lock: RefCell::new(lock),
            last: RefCell::new(None),
            last_at: Cell::new(0),
        })
    };
    open().map_or_else(Robj::from, |store| ExternalPtr::new(store).into())
}

fn store_of(pointer: &Robj) -> std::result::Result<&Store, Failure> {
    let closed = || Failure::new("run_unreadable").with("reason", "the run was closed");
    if !pointer.is_external_pointer() {
        return Err(closed());
    }
    let pointer: &ExternalPtr<Store> = pointer.try_into().map_err(|_| closed())?;
    pointer.try_addr().map_err(|_| closed())
}

fn with_store(
    pointer: &Robj,
    body: impl FnOnce(&Store) -> std::result::Result<Robj, Failure>,
) -> Robj {
    store_of(pointer).and_then(body).unwrap_or_else(Robj::from)
}

/// Returns the process that writes to the run: a list of `pid` and `host`, or `NULL`.
/// @noRd
#[extendr]
fn store_owner(dir: &str) -> Robj {
    match Lock::owner(&Path::new(dir).join("lock")) {
        Ok(None) => ().into(),
        Ok(Some(owner)) => list!(
            pid = owner.pid.map(|pid| pid as i32),
            host = owner.host.unwrap_or_default()
        )
        .into(),
        Err(error) => unreadable(&error).into(),
    }
}

/// Reads what has been written since. `elements`: the number of elements. `checks`: whether to check results that may
/// not be durable.
/// @noRd
#[extendr]
fn store_refresh(store: Robj, elements: f64, checks: bool) -> Robj {
    with_store(&store, |store| {
        let mut index = store.index.borrow_mut();
        index.grow(elements as usize);
        index.refresh(checks).map_err(|error| unreadable(&error))?;
        Ok(().into())
    })
}

/// Returns the state of each element: 0 without a result, 1 with a result, 2 with an error.
/// @noRd
#[extendr]
fn store_states(store: Robj) -> Robj {
    with_store(&store, |store| {
        let index = store.index.borrow();
        let states = (1..=index.len()).map(|element| match index.state(element) {
            State::Missing => 0,
            State::Done => 1,
            State::Failed => 2,
        });
        Ok(states.collect::<Vec<i32>>().into())
    })
}

/// Returns the indices of the elements that have no result (`missing`) or an error (`failed`). `ids`: the number of each
/// element in the run, or `NULL` if these are the first `count` numbers.
/// @noRd
#[extendr]
fn store_which(store: Robj, ids: Robj, count: f64, missing: bool, failed: bool) -> Robj {
    with_store(&store, |store| {
        let index = store.index.borrow();
        let ids = ids.as_integer_slice();
        let count = ids.map_or(count as usize, <[i32]>::len);
        let is_wanted = |at: &usize| {
            let id = ids.map_or(at + 1, |ids| ids[*at] as usize);
            match index.state(id) {
                State::Missing => missing,
                State::Failed => failed,
                State::Done => false,
            }
        };
        let wanted = (0..count).filter(is_wanted).map(|at| at as i32 + 1);
        Ok(wanted.collect::<Vec<i32>>().into())
    })
}

/// Returns whether two vectors of numbers have the same type and the same bits. Does not expand compact vectors.
/// @noRd
#[extendr]
fn same_numbers(a: Robj, b: Robj) -> bool {
    // SAFETY: the vectors are alive, and types and lengths are checked.
    unsafe {
        let (a, b) = (a.get(), b.get());
        let kind = TYPEOF(a);
        if kind != TYPEOF(b) || XLENGTH(a) != XLENGTH(b) {
            return false;
        }
        (0..XLENGTH(a)).all(|at| match kind {
            SEXPTYPE::INTSXP => INTEGER_ELT(a, at) == INTEGER_ELT(b, at),
            SEXPTYPE::LGLSXP => LOGICAL_ELT(a, at) == LOGICAL_ELT(b, at),
            SEXPTYPE::REALSXP => REAL_ELT(a, at).to_bits() == REAL_ELT(b, at).to_bits(),
            _ => false,
        })
    }
}

/// Returns the numbers of elements with a result and with an error.
/// @noRd
#[extendr]
fn store_counts(store: Robj) -> Robj {
    with_store(&store, |store| {
        let index = store.index.borrow();
        let (mut done, mut failed) = (0.0, 0.0);
        for element in 1..=index.len() {
            match index.state(element) {
                State::Missing => {}
                State::Done => done += 1.0,
                State::Failed => failed += 1.0,
            }
        }
        Ok([done, failed].to_vec().into())
    })
}

unsafe extern "C" fn read_payload(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the slice of `unserialized`, which outlives this call. This frame owns nothing that needs to be
    // dropped when R jumps.
    unsafe { stream::read(&mut *data.cast::<&[u8]>()) }
}

fn unserialized(payload: &[u8]) -> std::result::Result<Robj, Jump> {
    unwind::protect(read_payload, &mut { payload })
}

/// Returns a record: its elements, and the list of their results.
fn read_record(
    store: &Store,
    number: usize,
) -> std::result::Result<std::result::Result<(Vec<u32>, Robj), Jump>, Failure> {
    let index = store.index.borrow();
    let read = index.read(number).map_err(|error| {
        let failure = Failure::new("run_damaged").with("reason", error.to_string());
        match index.path_of(number) {
            Some(path) => failure.with("file", path.to_string_lossy()),
            None => failure,
        }
    });
    let (head, elements, payload) = read?;
    drop(index);
    Ok(unserialized(&payload).map(|value| match head.kind {
        Kind::List => (elements, value),
        Kind::Value => (elements, List::from_values([value]).into()),
    }))
}

fn value_at(values: &Robj, at: usize) -> Option<Robj> {
    // SAFETY: this runs on R's thread; type and length are checked, and the Robj keeps the list alive.
    unsafe {
        let list = values.get();
        let is_inside = TYPEOF(list) == SEXPTYPE::VECSXP && (at as isize) < XLENGTH(list);
        is_inside.then(|| Robj::from_sexp(VECTOR_ELT(list, at as isize)))
    }
}

/// Returns a list of the result of an element and of whether it is an error, or `NULL` without a result.
/// @noRd
#[extendr]
fn store_read(store: Robj, element: f64) -> Robj {
    with_store(&store, |store| {
        let element = element as usize;
        let (number, state) = {
            let index = store.index.borrow();
            (index.record_of(element), index.state(element))
        };
        let Some(number) = number else {
            return Ok(().into());
        };
        let is_last = store
            .last
            .borrow()
            .as_ref()
            .is_some_and(|last| last.0 == number);
        if !is_last {
            match read_record(store, number)? {
                Ok((elements, values)) => {
                    store.last.replace(Some((number, elements, values)));
                }
                Err(Jump(token)) => return Ok(token),
            }
        }
        let last = store.last.borrow();
        let Some((_, elements, values)) = last.as_ref() else {
            return Ok(().into());
        };
        // Elements are mostly read one after the other.
        let is_at = |&at: &usize| elements.get(at).is_some_and(|&one| one as usize == element);
        let next = Some(store.last_at.get() + 1).filter(is_at);
        let at = next.or_else(|| (0..elements.len()).find(is_at));
        store.last_at.set(at.unwrap_or(0));
        let value = at.and_then(|at| value_at(values, at)).unwrap_or_default();
        Ok(list!(value, state == State::Failed).into())
    })
}

/// Returns the numbers of the elements in a file of records; none if it is no file of this run.
/// @noRd
#[extendr]
fn file_elements(path: &str, run: &str) -> Robj {
    let elements = run
        .as_bytes()
        .try_into()
        .ok()
        .map(|run| elements_of_file(Path::new(path), run).unwrap_or_default());
    let elements = elements.unwrap_or_default().into_iter();
    elements
        .map(|element| element as i32)
        .collect::<Vec<i32>>()
        .into()
}

struct Filling<'a> {
    out: SEXP,
    index: &'a Index,
    number: usize,
    elements: &'a [u32],
    kind: Kind,
    payload: &'a [u8],
    positions: &'a dyn Fn(u32) -> Option<usize>,
}

unsafe extern "C" fn fill_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the filling below, which outlives this call. This frame owns nothing that needs to be dropped
    // when R jumps. Positions are within the list, and types and lengths are checked.
    unsafe {
        let filling = &mut *data.cast::<Filling<'_>>();
        unwind::check_interrupt();
        let value = Rf_protect(stream::read(&mut { filling.payload }));
        for (at, &element) in filling.elements.iter().enumerate() {
            let is_current = filling.index.record_of(element as usize) == Some(filling.number);
            let Some(position) = (filling.positions)(element).filter(|_| is_current) else {
                continue;
            };
            let result = match filling.kind {
                Kind::Value => value,
                Kind::List
                    if TYPEOF(value) == SEXPTYPE::VECSXP && (at as isize) < XLENGTH(value) =>
                {
                    VECTOR_ELT(value, at as isize)
                }
                Kind::List => R_NilValue,
            };
            SET_VECTOR_ELT(filling.out, position as isize, result);
        }
        Rf_unprotect(1);
        R_NilValue
    }
}

/// Returns a list of the list of the results of these elements, `NULL` where there is none, and of the indices of
/// results that are damaged, which the run then forgets. `elements`: integers from 1, or `NULL` for all.
/// @noRd
#[extendr]
fn store_values(store: Robj, elements: Robj) -> Robj {
    with_store(&store, |store| {
        let mut index = store.index.borrow_mut();
        let wanted = elements.as_integer_slice();
        let count = wanted.map_or(index.len(), <[i32]>::len);
        let mut at = vec![u32::MAX; index.len() + 1];
        for i in 0..count {
            let element = wanted.map_or(i + 1, |wanted| wanted[i] as usize);
            if let Some(slot) = at.get_mut(element) {
                *slot = i as u32;
            }
        }
        let positions = |element: u32| {
            let at = at.get(element as usize).copied();
            at.filter(|&at| at != u32::MAX).map(|at| at as usize)
        };
        let mut needed = vec![false; index.records()];
        for element in (1..=index.len()).filter(|&element| at[element] != u32::MAX) {
            if let Some(number) = index.record_of(element) {
                needed[number] = true;
            }
        }
        let mut out: Robj = List::new(count).into();
        let mut damaged: Vec<i32> = Vec::new();
        for number in (0..needed.len()).filter(|&number| needed[number]) {
            match index.read(number) {
                Ok((head, elements, payload)) => {
                    // SAFETY: this runs on R's thread.
                    let out = unsafe { out.get_mut() };
                    let mut filling = Filling {
                        out,
                        index: &index,
                        number,
                        elements: &elements,
                        kind: head.kind,
                        payload: &payload,
                        positions: &positions,
                    };
                    if let Err(Jump(token)) = unwind::run(fill_protected, &mut filling) {
                        return Ok(token);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::OutOfMemory => {
                    return Err(unreadable(&error));
                }
                Err(_) => {
                    let of_record = (1..=index.len())
                        .filter(|&element| index.record_of(element) == Some(number));
                    let lost = of_record.filter_map(|element| positions(element as u32));
                    damaged.extend(lost.map(|at| at as i32 + 1));
                    index.drop_record(number);
                }
            }
        }
        drop(index);
        Ok(list!(out, damaged).into())
    })
}

/// Forgets the results of these elements that are damaged.
/// @noRd
#[extendr]
fn store_check(store: Robj, elements: &[i32]) -> Robj {
    with_store(&store, |store| {
        let mut index = store.index.borrow_mut();
        for &element in elements {
            let number = usize::try_from(element)
                .ok()
                .and_then(|at| index.record_of(at));
            if let Some(number) = number.filter(|&number| index.read(number).is_err()) {
                index.drop_record(number);
            }
        }
        Ok(().into())
    })
}

/// Starts to write results. `interval`: the least time in seconds between two calls of `fdatasync()`. `waits`: whether
/// to try again while results cannot be written.
/// @noRd
#[extendr]
fn store_write(store: Robj, r_version: i32, interval: f64, waits: bool) -> Robj {
    with_store(&store, |store| {
        let settings = WriterSettings {
            run: store.run,
            r_version: r_version as u32,
            interval: Duration::try_from_secs_f64(interval).unwrap_or_default(),
            waits,
        };
        let writer = Writer::start(&store.dir, settings);
        let writer = writer.map_err(|error| write_failed(error.to_string()))?;
        store.writer.replace(Some(Arc::new(writer)));
        Ok(().into())
    })
}

/// Stores the result of an element. `failed`: whether it is an error.
/// @noRd
#[extendr]
fn store_put(store: Robj, element: i32, value: Robj, failed: bool) -> Robj {
    with_store(&store, |store| {
        let writer = store.writer.borrow().clone();
        let Some(writer) = writer else {
            return Err(write_failed("the run was closed"));
        };
        let body = match serialized(&value) {
            Ok(body) => body,
            Err(Jump(token)) => return Ok(token),
        };
        let storing = Storing::new(writer, None, Keep::Never);
        let task = (element as usize).saturating_sub(1);
        storing.store(vec![(task, Stored::Serialized(body), failed)]);
        Ok(().into())
    })
}

/// Waits for up to one slice until more results may be stored. Returns whether they may.
/// @noRd
#[extendr]
fn store_room(store: Robj) -> Robj {
    with_store(&store, |store| {
        let writer = store.writer.borrow().clone();
        let Some(writer) = writer else {
            return Err(write_failed("the run was closed"));
        };
        let is_full = writer.wait_for_room(SLICE);
        match writer.error() {
            Some(reason) => Err(write_failed(reason)),
            None => Ok((!is_full).into()),
        }
    })
}

/// Waits for up to one slice until all results are durable. Returns whether they are.
/// @noRd
#[extendr]
fn store_flush(store: Robj) -> Robj {
    with_store(&store, |store| {
        let writer = store.writer.borrow().clone();
        let flushed = writer.map_or(Ok(true), |writer| writer.wait_for_all(SLICE));
        let flushed = flushed.map_err(write_failed)?;
        Ok(flushed.into())
    })
}

/// Returns why results cannot be written at present, or `""`.
/// @noRd
#[extendr]
fn store_trouble(store: Robj) -> Robj {
    with_store(&store, |store| {
        let writer = store.writer.borrow();
        let trouble = writer.as_ref().and_then(|writer| writer.trouble());
        Ok(trouble.unwrap_or_default().into())
    })
}

/// Renames a file, whose content and name then survive a crash of the machine.
fn rename_durably(from: &Path, to: &Path) -> std::io::Result<()> {
    detached::sync(from)?;
    std::fs::rename(from, to)?;
    detached::sync(to.parent().unwrap_or(Path::new(".")))
}

/// Writes a file: it has either its old content or these bytes. `durable`: whether also after a crash of the machine.
/// @noRd
#[extendr]
fn write_durably(bytes: Robj, path: &str, durable: bool) -> Robj {
    let bytes = bytes.as_raw_slice().unwrap_or_default();
    let path = Path::new(path);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&new)?;
        without_file_size_signal(|| file.write_all(bytes))?;
        if !durable {
            return std::fs::rename(&new, path);
        }
        rename_durably(&new, path)
    };
    match write() {
        Ok(()) => ().into(),
        Err(error) => {
            // A file that was not written completely takes space that a full disk needs.
            let _ = std::fs::remove_file(&new);
            write_failed(error.to_string()).into()
        }
    }
}

/// Renames a file durably.
/// @noRd
#[extendr]
fn replace_durably(from: &str, to: &str) -> Robj {
    match rename_durably(Path::new(from), Path::new(to)) {
        Ok(()) => ().into(),
        Err(error) => write_failed(error.to_string()).into(),
    }
}

/// Returns whether this is the pointer of a store that is open in this session.
/// @noRd
#[extendr]
fn store_is_open(store: Robj) -> bool {
    store_of(&store).is_ok()
}

/// Returns the address of an object.
/// @noRd
#[extendr]
fn object_address(object: Robj) -> String {
    // SAFETY: the address is not used to reach the object.
    format!("{:p}", unsafe { object.get() })
}

/// Ends writing, once all results are durable or cannot be written, and releases the lock.
/// @noRd
#[extendr]
fn store_close(store: Robj) -> Robj {
    with_store(&store, |store| {
        store.writer.take();
        store.lock.take();
        Ok(().into())
    })
}

/// Returns where the results of a job are stored, by its settings: `store`, the run, or `NULL`; `ids`, the number of
/// each task's element in the run, or `NULL` if these are the numbers of the tasks; `keep`: `"always"`,
/// `"until_reported"` or `"never"`, see [`Keep`]; `save`, see [`save_request`].
pub(super) fn storing(
    setting: &impl Fn(&'static str) -> Robj,
) -> std::result::Result<Option<Storing>, Failure> {
    let pointer = setting("store");
    if pointer.is_null() {
        return Ok(None);
    }
    let writer = store_of(&pointer)?.writer.borrow().clone();
    let Some(writer) = writer else {
        return Err(write_failed("the run was closed"));
    };
    let ids = setting("ids");
    let ids = ids.as_integer_slice();
    let ids = ids.map(|ids| ids.iter().map(|&id| id as u32).collect());
    let keep = match setting("keep").as_str() {
        Some("until_reported") => Keep::UntilReported,
        Some("never") => Keep::Never,
        _ => Keep::Always,
    };
    let mut storing = Storing::new(writer, ids, keep);
    storing.saving = save_request(&setting("save"))?.map(Saving::new);
    Ok(Some(storing))
}

/// Returns what pages show of the store of a job. `tasks`: the number of results that are missing.
pub(super) fn view_of(
    pointer: &Robj,
    elements: usize,
    tasks: usize,
    storing: Option<&Storing>,
) -> Option<StoreView> {
    let dir = store_of(pointer).ok()?.dir.display().to_string();
    let gauge = storing?.writer.gauge();
    Some(StoreView {
        dir,
        elements,
        before: elements.saturating_sub(tasks),
        gauge,
    })
}

/// Returns how workers save their results. `save`: `NULL`, or a list of the strings `run`, `folder`, `host_dir`, `run_dir`,
/// `probe` and `nonce`, the numbers `r_version` and `least`, and the flags `durable` and `values`: see [`SaveRequest`].
fn save_request(save: &Robj) -> std::result::Result<Option<SaveRequest>, Failure> {
    if save.is_null() {
        return Ok(None);
    }
    let bad = || write_failed("the settings are damaged");
    let all = save.as_list().ok_or_else(bad)?;
    let all: std::collections::HashMap<&str, Robj> = all.iter().collect();
    let text = |name: &str| {
        let value = all.get(name).and_then(Robj::as_str);
        value.map(str::to_owned).ok_or_else(bad)
    };
    let flag = |name: &str| all.get(name).and_then(Robj::as_bool).unwrap_or(false);
    Ok(Some(SaveRequest {
        run: text("run")?.as_bytes().try_into().map_err(|_| bad())?,
        folder: text("folder")?,
        host_dir: text("host_dir")?,
        run_dir: text("run_dir")?,
        probe: text("probe")?,
        nonce: text("nonce")?,
        r_version: all
            .get("r_version")
            .and_then(Robj::as_integer)
            .map_or(0, |version| version as u32),
        durable: flag("durable"),
        values: flag("values"),
        least: all
            .get("least")
            .and_then(Robj::as_real)
            .map_or(0, |least| least as u64),
        remove: Vec::new(),
    }))
}

/// Returns the folder of this host with this name for saved results.
/// @noRd
#[extendr]
fn saved_folder(host_dir: &str, name: &str) -> String {
    save::folder(host_dir, name).to_string_lossy().into_owned()
}

/// Hashes R's serialization of a value, without its first bytes, which contain the version of R.
struct HashSink {
    hash: Xxh3,
    skip: usize,
    /// Whether a vector may have been written whose flags say that it was extended in place.
    may_be_grown: bool,
}

/// Whether these bytes may be the flags of a vector that R has extended in place (`GROWABLE_MASK`). A copy of the
/// vector does not have that flag.
fn may_be_grown(bytes: &[u8]) -> bool {
    const GROWN: u32 = 1 << (12 + 5);
    let Ok(word) = bytes.try_into().map(u32::from_ne_bytes) else {
        return false;
    };
    let is_vector = matches!(word & 0xff, 10 | 13..=16 | 19 | 20 | 24);
    is_vector && word & GROWN != 0 && word >> 28 == 0
}

/// Bytes of the head of R's serialization, version 2.
const SERIALIZATION_HEAD: usize = 14;

impl Sink for HashSink {
    fn write(&mut self, bytes: &[u8]) -> bool {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.hash.update(&bytes[skipped..]);
        self.may_be_grown |= may_be_grown(bytes);
        false
    }
}

struct Hashing<'a> {
    values: SEXP,
    whole: bool,
    sink: HashSink,
    out: &'a mut Vec<u8>,
}

unsafe extern "C" fn hash_protected(data: *mut c_void) -> SEXP {
    // SAFETY: `data` is the hashing below, which outlives this call. This frame owns nothing that needs to be dropped
    // when R jumps.
    unsafe {
        let hashing = &mut *data.cast::<Hashing<'_>>();
        let count = if hashing.whole {
            1
        } else {
            XLENGTH(hashing.values)
        };
        for at in 0..count {
            hashing.sink.hash.reset();
            let number = |kind: SEXPTYPE, bytes: &[u8], sink: &mut HashSink| {
                // As R serializes a vector of one number.
                sink.hash.update(&(kind as u32).to_ne_bytes());
                sink.hash.update(&1_u32.to_ne_bytes());
                sink.hash.update(bytes);
            };
            let sink = &mut hashing.sink;
            match TYPEOF(hashing.values) {
                kind @ SEXPTYPE::INTSXP if !hashing.whole => {
                    number(kind, &INTEGER_ELT(hashing.values, at).to_ne_bytes(), sink);
                }
                kind @ SEXPTYPE::LGLSXP if !hashing.whole => {
                    number(kind, &LOGICAL_ELT(hashing.values, at).to_ne_bytes(), sink);
                }
                kind @ SEXPTYPE::REALSXP if !hashing.whole => {
                    number(kind, &REAL_ELT(hashing.values, at).to_ne_bytes(), sink);
                }
                _ => {
                    sink.skip = SERIALIZATION_HEAD;
                    let value = match hashing.whole {
                        true => hashing.values,
                        false => rustcluster_element(hashing.values.cast(), at),
                    };
                    stream::write_in_version_2(Rf_protect(value), sink);
                    if std::mem::take(&mut sink.may_be_grown) {
                        sink.hash.reset();
                        sink.skip = SERIALIZATION_HEAD;
                        stream::write_in_version_2(Rf_protect(Rf_duplicate(value)), sink);
                        sink.may_be_grown = false;
                        Rf_unprotect(1);
                    }
                    Rf_unprotect(1);
                }
            }
            let digest = hashing.sink.hash.digest128();
            hashing.out.extend_from_slice(&digest.to_ne_bytes());
        }
        R_NilValue
    }
}

/// Returns hashes of 16 bytes each (XXH3, 128 bits), as one raw vector: of each element of a vector without a class, or
/// of the value if `whole` is `TRUE`. Equal values have equal hashes, also in other versions of R.
/// @noRd
#[extendr]
fn content_hashes(values: Robj, whole: bool) -> Robj {
    let mut out = Vec::new();
    let mut hashing = Hashing {
        // SAFETY: the Robj keeps the value alive.
        values: unsafe { values.get() },
        whole,
        sink: HashSink {
            hash: Xxh3::new(),
            skip: 0,
            may_be_grown: false,
        },
        out: &mut out,
    };
    match unwind::run(hash_protected, &mut hashing) {
        Ok(_) => Raw::from_bytes(&out).into(),
        Err(Jump(token)) => token,
    }
}

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_element(vector: *mut c_void, at: isize) -> SEXP;
}

extendr_module! {
    mod store;
    fn store_open;
    fn store_owner;
    fn store_refresh;
    fn store_states;
    fn store_counts;
    fn store_which;
    fn same_numbers;
    fn store_read;
    fn store_values;
    fn store_write;
    fn store_check;
    fn store_put;
    fn store_flush;
    fn store_trouble;
    fn store_close;
    fn replace_durably;
    fn saved_folder;
    fn file_elements;
    fn write_durably;
    fn store_is_open;
    fn store_room;
    fn object_address;
    fn content_hashes;
}
