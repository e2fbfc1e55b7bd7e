//! The R values of a job: its elements, and the results that have arrived.

use crate::codec::batch;
use crate::codec::stored::{self, Stored};
use crate::codec::stream::{self, Format};
use crate::r::unwind::Jump;
use extendr_api::prelude::*;
use extendr_ffi::{R_NilValue, Rf_protect, Rf_unprotect, SET_VECTOR_ELT, SEXP};
use rustcluster_core::protocol::body::Body;
use rustcluster_core::store::Writer;
use rustcluster_core::store::save::{SaveRequest, Saved};
use std::collections::{HashMap, HashSet};
use std::ffi::{c_int, c_void};
use std::sync::Arc;

pub(super) enum Elements {
    /// A plain vector.
    Vector(Robj),
    /// A function that returns an element by its index, from 1.
    Function(Robj),
}

impl Elements {
    /// Returns an element, which is not protected.
    ///
    /// # Safety
    /// Must be called under [`unwind::run`](crate::r::unwind::run): R may jump.
    unsafe fn get(&self, index: usize) -> SEXP {
        // SAFETY: guaranteed by the caller; R checks the index. No frame here owns anything that needs to be
        // dropped when R jumps.
        unsafe {
            match self {
                Elements::Vector(vector) => {
                    rustcluster_element(vector.get().cast(), index as isize)
                }
                Elements::Function(function) => {
                    rustcluster_call_with(function.get().cast(), index as f64 + 1.0)
                }
            }
        }
    }
}

/// How long the list of results of a stored job keeps a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// Until the end of the job.
    Always,
    /// Until R has asked for newer results.
    UntilReported,
    /// Results are not read.
    Never,
}

/// Where the results of a stored job go.
pub(super) struct Storing {
    pub(super) writer: Arc<Writer>,
    /// The number of each task's element in the run, from 1, if it is not that of the task.
    elements: Option<Vec<u32>>,
    /// The task of each element, from 0, if `elements` is set.
    tasks: HashMap<u32, usize>,
    pub(super) keep: Keep,
    /// The results that R has got with [`Keep::UntilReported`], from 1.
    reported: Vec<i32>,
    pub(super) saving: Option<Saving>,
}

/// What the workers of a job save.
pub(super) struct Saving {
    /// The request, without files to be removed.
    request: SaveRequest,
    /// The files that hosts no longer need, by host.
    removable: HashMap<u32, Vec<String>>,
    /// The files with results that are not durable here: their hosts, their names, and the number of these results.
    files: Vec<(u32, String, usize)>,
    /// The file of each such result, by its element.
    file_of: HashMap<u32, usize>,
    /// The tasks whose results a worker has saved in the directory of the run, and which R does not know of.
    in_run: Vec<usize>,
    /// Why results were not saved, by host.
    pub(super) unsaved: HashMap<u32, String>,
}

/// Files that are removed with one message.
const MAX_REMOVED: usize = 100;

impl Saving {
    pub(super) fn new(request: SaveRequest) -> Saving {
        Saving {
            request,
            removable: HashMap::new(),
            files: Vec::new(),
            file_of: HashMap::new(),
            in_run: Vec::new(),
            unsaved: HashMap::new(),
        }
    }

    /// Returns what precedes the elements in a message to this host.
    pub(super) fn prefix(&mut self, host: u32) -> Vec<u8> {
        let mut request = self.request.clone();
        if let Some(names) = self.removable.get_mut(&host) {
            let rest = names.split_off(names.len().min(MAX_REMOVED));
            request.remove = std::mem::replace(names, rest);
        }
        let mut out = Vec::new();
        batch::put_sized(&request.encode(), &mut out);
        out
    }

    fn note_durable(&mut self, element: u32) {
        let Some(file) = self.file_of.remove(&element) else {
            return;
        };
        if let Some((host, name, left)) = self.files.get_mut(file) {
            *left -= 1;
            if *left == 0 {
                let name = std::mem::take(name);
                self.removable.entry(*host).or_default().push(name);
            }
        }
    }
}

impl Storing {
    pub(super) fn new(writer: Arc<Writer>, elements: Option<Vec<u32>>, keep: Keep) -> Storing {
        let tasks = elements.iter().flatten().enumerate();
        let tasks = tasks.map(|(task, &element)| (element, task)).collect();
        let reported = Vec::new();
        Storing {
            writer,
            elements,
            tasks,
            keep,
            reported,
            saving: None,
        }
    }

    pub(super) fn element(&self, task: usize) -> u32 {
        let elements = self.elements.as_ref();
        elements
            .and_then(|all| all.get(task).copied())
            .unwrap_or(task as u32 + 1)
    }

    fn task(&self, element: u32) -> Option<usize> {
        match self.elements {
            Some(_) => self.tasks.get(&element).copied(),
            None => (element as usize).checked_sub(1),
        }
    }

    /// Takes the results of a worker of this host, which were saved there.
    pub(super) fn take(
        &mut self,
        host: u32,
        saved: Option<Saved>,
        results: Vec<(usize, Stored, bool)>,
    ) {
        let elements: Vec<u32> = match saved {
            Some(Saved::OnHost(_)) => results.iter().map(|one| self.element(one.0)).collect(),
            _ => Vec::new(),
        };
        if let (Some(saving), Some(saved)) = (&mut self.saving, saved) {
            match saved {
                Saved::InRun => {
                    return saving.in_run.extend(results.iter().map(|one| one.0));
                }
                Saved::OnHost(name) => {
                    let file = saving.files.len();
                    saving
                        .file_of
                        .extend(elements.iter().map(|&one| (one, file)));
                    saving.files.push((host, name, elements.len()));
                }
                Saved::Nowhere(reason) if reason.is_empty() => {}
                Saved::Nowhere(reason) => {
                    saving.unsaved.entry(host).or_insert(reason);
                }
            }
        }
        self.store(results);
    }

    /// Stores the results of these tasks, each with whether it is an error.
    pub(super) fn store(&self, results: Vec<(usize, Stored, bool)>) {
        let mut others = Vec::new();
        self.writer.add_short(|list| {
            for (task, stored, failed) in results {
                match stored {
                    Stored::Plain(mut body) if !failed => {
                        body.join();
                        let bytes = body.whole().unwrap_or_default();
                        if stored::append_plain(bytes, list).is_some() {
                            list.elements.push(self.element(task));
                        }
                    }
                    Stored::Plain(body) | Stored::Serialized(body) => {
                        others.push((self.element(task), failed, body));
                    }
                    // The worker has stored it.
                    Stored::InRun => {}
                }
            }
        });
        for (element, failed, body) in others {
            self.writer.add(element, failed, body);
        }
    }
}

/// Returns R's serialization of a value.
///
/// # Errors
/// If R jumped.
pub(super) fn serialized(value: &Robj) -> std::result::Result<Body, Jump> {
    let mut bytes = Vec::new();
    stream::serialize(value, Format::Native, &mut bytes)?;
    Ok(Body::from_bytes(bytes))
}

/// The R objects of a job: its tasks and its results.
pub struct Values {
    /// The list of the function and of the common arguments.
    pub(super) common: Robj,
    /// The flags of [`batch::Head`].
    pub(super) flags: u8,
    /// Whether the common list contains no object whose identity matters, such as an environment. An element
    /// then cannot refer to such an object of the list.
    pub(super) fixed: bool,
    pub(super) elements: Elements,
    /// A function that returns the seed of a task by its index, or `NULL`.
    pub(super) seed: Robj,
    /// A list of the function that runs a task with a seed, if a message cannot contain the seed, and of no
    /// arguments.
    pub(super) seeded: Robj,
    /// The list of results, with an element for each task.
    pub(super) results: Robj,
    /// Elements that a user's function has made, by their indices, until they are answered. The function is
    /// called once for each element, even if a task is revoked or retried.
    pub(super) unanswered: HashMap<usize, Robj>,
    /// The indices of tasks whose result is an error, from 1.
    pub(super) failed: Vec<i32>,
    /// Those of `failed` whose task has returned the error, and has not raised it.
    pub(super) returned: HashSet<i32>,
    /// Whether a value of class `"try-error"` counts as an error, as for tasks in parallel. Elements of chunks
    /// and of lapply() may have such values.
    by_class: bool,
    /// The name of a task in warnings.
    pub(super) noun: String,
    /// The indices of tasks that have been answered since R last asked for results, from 1.
    pub(super) fresh: Vec<i32>,
    pub(super) scratch: Vec<u8>,
    pub(super) message: Vec<u8>,
    pub(super) storing: Option<Storing>,
}

impl Values {
    /// Creates the values of a job, none of whose tasks has been answered.
    pub(super) fn new(
        elements: Elements,
        common: Robj,
        flags: u8,
        fixed: bool,
        by_class: bool,
        setting: impl Fn(&'static str) -> Robj,
    ) -> Values {
        Values {
            common,
            flags,
            fixed,
            elements,
            seed: setting("seed"),
            seeded: setting("seeded"),
            results: ().into(),
            unanswered: HashMap::new(),
            failed: Vec::new(),
            returned: HashSet::new(),
            by_class,
            noun: setting("noun").as_str().unwrap_or("task").to_owned(),
            fresh: Vec::new(),
            scratch: Vec::new(),
            message: Vec::new(),
            storing: None,
        }
    }

    /// Makes room for this number of results, which `storing` stores.
    pub(super) fn with_results(self, count: usize, storing: Option<Storing>) -> Values {
        let mut values = Values { storing, ..self };
        values.results = List::new(if values.reads() { count } else { 0 }).into();
        values
    }

    /// Records the results that have become durable as new ones.
    pub(super) fn note_durable(&mut self) {
        let Some(storing) = &mut self.storing else {
            return;
        };
        let durable = storing.writer.take_durable();
        let tasks = durable.iter().filter_map(|&element| storing.task(element));
        self.fresh.extend(tasks.map(|task| task as i32 + 1));
        if let Some(saving) = &mut storing.saving {
            let in_run = saving.in_run.drain(..);
            self.fresh.extend(in_run.map(|task| task as i32 + 1));
            if !saving.file_of.is_empty() {
                durable
                    .into_iter()
                    .for_each(|element| saving.note_durable(element));
            }
        }
    }

    /// Whether the values of results are read.
    pub(super) fn reads(&self) -> bool {
        self.storing
            .as_ref()
            .is_none_or(|storing| storing.keep != Keep::Never)
    }

    /// Returns a list of the results, of the indices of those that are errors, and of the indices of those that
    /// are new since the last call.
    pub(super) fn results(&mut self) -> Robj {
        let mut failed = self.failed.clone();
        failed.sort_unstable();
        let fresh = std::mem::take(&mut self.fresh);
        if let Some(storing) = &mut self.storing {
            if storing.keep == Keep::UntilReported {
                for &index in &storing.reported {
                    // SAFETY: this runs on R's thread; the list has an element for each task.
                    unsafe {
                        let results = self.results.get_mut();
                        SET_VECTOR_ELT(results, index as isize - 1, R_NilValue);
                    }
                }
                storing.reported.clone_from(&fresh);
            }
        }
        list!(self.results.clone(), failed, fresh).into()
    }

    /// Sets the result of a task that has ended without an answer.
    ///
    /// # Errors
    /// If R jumped.
    pub(super) fn fail(&mut self, index: usize, value: &Robj) -> std::result::Result<(), Jump> {
        if let Some(storing) = &self.storing {
            let body = serialized(value)?;
            storing.store(vec![(index, Stored::Serialized(body), true)]);
        }
        // SAFETY: the Robj keeps the value alive.
        unsafe { self.put(index, value.get(), true) };
        self.unanswered.remove(&index);
        Ok(())
    }

    /// Returns an element, which is not protected.
    ///
    /// # Safety
    /// The same as for [`Elements::get`].
    pub(super) unsafe fn element(&mut self, index: usize) -> SEXP {
        // SAFETY: the caller's.
        unsafe {
            match self.unanswered.get(&index) {
                Some(element) => element.get(),
                None => {
                    let element = Rf_protect(self.elements.get(index));
                    if let Elements::Function(_) = self.elements {
                        self.unanswered.insert(index, Robj::from_sexp(element));
                    }
                    Rf_unprotect(1);
                    element
                }
            }
        }
    }

    /// Stores a result. `failed`: whether the task has failed. The value need not be protected.
    ///
    /// # Safety
    /// Must be called on R's thread, with a live value.
    pub(super) unsafe fn put(&mut self, index: usize, value: SEXP, failed: bool) {
        // SAFETY: guaranteed by the caller; the list has an element for each task; none of these functions
        // jumps or allocates.
        unsafe {
            if self.reads() {
                SET_VECTOR_ELT(self.results.get_mut(), index as isize, value);
            }
            let index = index as i32 + 1;
            if failed {
                self.failed.push(index);
            } else if self.by_class && rustcluster_is_error(value.cast()) != 0 {
                self.failed.push(index);
                self.returned.insert(index);
            }
        }
        // Stored results are reported once they are durable.
        if self.storing.is_none() {
            self.fresh.push(index as i32 + 1);
        }
    }
}

#[allow(
    improper_ctypes,
    reason = "SEXP points to a type that is opaque on this side"
)]
unsafe extern "C" {
    fn rustcluster_element(vector: *mut c_void, at: isize) -> SEXP;
    fn rustcluster_is_error(value: *mut c_void) -> c_int;
    fn rustcluster_call_with(function: *mut c_void, number: f64) -> SEXP;
}
