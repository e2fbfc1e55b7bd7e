//! Detached processes and their locks, for R.

use super::handle::strings;
use extendr_api::prelude::*;
use rustcluster_core::platform::detached::{self, Detached};
use std::io;
use std::path::{Path, PathBuf};

/// Returns the value, or a text that says what went wrong.
fn value_or_text(result: io::Result<Robj>) -> Robj {
    result.unwrap_or_else(|error| error.to_string().into())
}

/// Starts a process that outlives this session, in a session of its own. It locks the file `lock` until it ends,
/// appends its output to the file `log`, and renames the files `from` to `to` once it has the lock. Returns its pid,
/// `NULL` if another process has the lock, or a text that says why the process cannot be started. `env`: a named
/// vector; NA removes a variable.
/// @noRd
#[extendr]
fn detached_start(
    command: Robj,
    env: Robj,
    directory: &str,
    lock: &str,
    log: &str,
    from: Robj,
    to: Robj,
) -> Robj {
    let command: Vec<_> = strings(&command).into_iter().map(Into::into).collect();
    let names = env.names().into_iter().flatten().map(str::to_owned);
    let values = env.as_str_vector().unwrap_or_default();
    let env: Vec<_> = names
        .zip(values)
        .map(|(name, value)| {
            let value = (!value.is_na()).then(|| value.into());
            (name.into(), value)
        })
        .collect();
    let paths = |paths: &Robj| strings(paths).into_iter().map(PathBuf::from);
    let renames: Vec<_> = paths(&from).zip(paths(&to)).collect();
    let process = Detached {
        command: &command,
        env: &env,
        directory: Path::new(directory),
        lock: Path::new(lock),
        log: Path::new(log),
        renames: &renames,
    };
    value_or_text(process.start().map(|pid| match pid {
        Some(pid) => i32::try_from(pid).unwrap_or(0).into(),
        None => ().into(),
    }))
}

/// Keeps the lock with which this detached process was started. Returns `NULL`, or a text that says why there is no
/// lock.
/// @noRd
#[extendr]
fn detached_keep_lock() -> Robj {
    let lock = std::env::var(detached::LOCK_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| io::Error::other("this process was not started by startRun()"));
    value_or_text(lock.and_then(detached::keep_lock).map(|()| ().into()))
}

/// Returns whether any process has this lock, or a text that says why that is unknown.
/// @noRd
#[extendr]
fn detached_is_locked(lock: &str) -> Robj {
    value_or_text(detached::is_locked(Path::new(lock)).map(Into::into))
}

/// Waits until the content of a file, or the entries of a directory, would survive a crash of the machine. Returns
/// `NULL`, or a text that says why that failed.
/// @noRd
#[extendr]
fn file_sync(path: &str) -> Robj {
    value_or_text(detached::sync(Path::new(path)).map(|()| ().into()))
}

extendr_module! {
    mod detached;
    fn detached_start;
    fn detached_keep_lock;
    fn detached_is_locked;
    fn file_sync;
}
