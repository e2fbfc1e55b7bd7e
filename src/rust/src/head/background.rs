//! Background processes, for R.

use super::handle::{SLICE, strings};
use extendr_api::prelude::*;
use rustcluster_core::platform::background::{Background, OnEnd, Options};
use rustcluster_core::platform::exit::Exit;
use std::time::Duration;

/// Runs `with` on the process behind a pointer. `NULL` if there is none: the pointer was saved and loaded.
fn with_background(handle: &Robj, with: impl FnOnce(&Background) -> Robj) -> Robj {
    if !handle.is_external_pointer() {
        return ().into();
    }
    let pointer: Option<&ExternalPtr<Background>> = handle.try_into().ok();
    match pointer.and_then(|pointer| pointer.try_addr().ok()) {
        Some(background) => with(background),
        None => ().into(),
    }
}

fn seconds(number: f64) -> Option<Duration> {
    (number > 0.0)
        .then(|| Duration::try_from_secs_f64(number).ok())
        .flatten()
}

/// Starts a process in the background and returns its handle, or a text that says why it cannot be started.
/// `env`: a named vector; NA removes a variable. `input`: raw bytes for its stdin, which stays open if
/// `open_input`. `heartbeat`: seconds between empty lines on its stdin, or 0. `max_silence`: seconds without
/// output, after its first, after which it is killed, or 0. `kill_on_drop`: whether it is killed when the handle is collected;
/// otherwise its stdin ends, and it gets SIGTERM when this process ends.
/// @noRd
#[extendr]
fn background_start(
    command: Robj,
    env: Robj,
    input: Robj,
    open_input: bool,
    heartbeat: f64,
    max_silence: f64,
    kill_on_drop: bool,
) -> Robj {
    let names = env.names().into_iter().flatten().map(str::to_owned);
    let values = env.as_str_vector().unwrap_or_default();
    let env = names.zip(values).map(|(name, value)| {
        let value = (!value.is_na()).then(|| value.into());
        (name.into(), value)
    });
    let options = Options {
        command: strings(&command).into_iter().map(Into::into).collect(),
        env: env.collect(),
        input: input.as_raw_slice().unwrap_or_default().to_vec(),
        open_input,
        heartbeat: seconds(heartbeat),
        max_silence: seconds(max_silence),
        kill_on_drop,
        end_with_parent: !kill_on_drop,
        ..Options::default()
    };
    match Background::start(options) {
        Ok(background) => ExternalPtr::new(background).into(),
        Err(error) => error.to_string().into(),
    }
}

/// Waits for the end of a background process, or with `or_output` for more on its stdout, at most `wait` seconds
/// or one slice. Returns whether it has ended.
/// @noRd
#[extendr]
fn background_wait(handle: Robj, wait: f64, or_output: bool) -> Robj {
    with_background(&handle, |background| {
        let wait = seconds(wait).unwrap_or_default().min(SLICE);
        background.wait(wait, or_output).into()
    })
}

/// Returns what is known of a background process: pid, status (`NULL` while it runs, `NA` after a signal), signal,
/// stdout and stderr (raw), truncated, silent.
/// @noRd
#[extendr]
fn background_report(handle: Robj) -> Robj {
    with_background(&handle, |background| {
        let report = background.report();
        let (status, signal): (Robj, i32) = match report.exit {
            None => (().into(), 0),
            Some(Exit::Status(status)) => (status.into(), 0),
            Some(Exit::Signal(signal)) => (Rint::na().into(), signal),
            Some(Exit::Unknown) => (Rint::na().into(), 0),
        };
        list!(
            pid = i32::try_from(background.pid()).unwrap_or(0),
            status = status,
            signal = signal,
            stdout = Raw::from_bytes(&report.stdout),
            stderr = Raw::from_bytes(&report.stderr),
            truncated = report.truncated,
            silent = report.silent
        )
        .into()
    })
}

/// Sends a line to a background process whose stdin is open. Returns whether it can still read it.
/// @noRd
#[extendr]
fn background_send(handle: Robj, line: &str) -> Robj {
    with_background(&handle, |background| {
        background.send(format!("{line}\n").as_bytes()).into()
    })
}

/// Ends the stdin of a background process.
/// @noRd
#[extendr]
fn background_end_input(handle: Robj) -> Robj {
    with_background(&handle, |background| {
        background.end_input();
        ().into()
    })
}

/// Kills a background process and its process group.
/// @noRd
#[extendr]
fn background_kill(handle: Robj) -> Robj {
    with_background(&handle, |background| {
        background.kill();
        ().into()
    })
}

/// Ends the stdin of `other`, or with `kill` kills it, once the process behind `handle` has ended. If that was
/// killed for its silence, `other` is killed.
/// @noRd
#[extendr]
fn background_on_end(handle: Robj, other: Robj, kill: bool) -> Robj {
    with_background(&handle, |background| {
        with_background(&other, |other| {
            let action = if kill { OnEnd::Kill } else { OnEnd::EndInput };
            background.on_end(other, action);
            ().into()
        })
    })
}

extendr_module! {
    mod background;
    fn background_start;
    fn background_wait;
    fn background_report;
    fn background_send;
    fn background_end_input;
    fn background_kill;
    fn background_on_end;
}
