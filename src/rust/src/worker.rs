//! A worker's functions. One channel a process.

use crate::failure::Failure;
use crate::stream::{self, Sink};
use crate::unwind::{self, Jump};
use extendr_api::prelude::*;
use rustcluster_core::message::WorkerConfig;
use rustcluster_core::signals;
use rustcluster_core::sys;
use rustcluster_core::worker::Channel;
use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

thread_local! {
    static CHANNEL: RefCell<Option<Channel>> = const { RefCell::new(None) };
}

/// Makes `channel` this process's.
pub fn adopt(mut channel: Channel) -> io::Result<()> {
    channel.renumber()?;
    CHANNEL.set(Some(channel));
    Ok(())
}

fn with_channel(body: impl FnOnce(&mut Channel) -> io::Result<Robj>) -> Robj {
    CHANNEL.with_borrow_mut(|channel| {
        let result = match channel {
            Some(channel) => body(channel),
            None => Err(io::Error::other("this process is not a worker")),
        };
        let failed = |error: io::Error| Failure::new("agent_failed").with("reason", error);
        result.unwrap_or_else(|error| failed(error).into())
    })
}

/// In a separate process: takes the channel from stdin and returns the packages to attach.
/// @noRd
#[extendr]
fn worker_connect() -> Robj {
    let connect = || -> io::Result<Robj> {
        let reader = sys::take_stdin()?;
        let stream = UnixStream::from(OwnedFd::from(reader));
        let mut channel = Channel::new(stream, 0);
        let config: WorkerConfig = channel.config()?;
        CHANNEL.set(Some(channel));
        Ok(list!(packages = config.packages).into())
    };
    connect().unwrap_or_else(|error| Failure::new("agent_failed").with("reason", error).into())
}

/// Tells the agent that this worker can take tasks.
/// @noRd
#[extendr]
fn worker_ready(tempdir: &str) -> Robj {
    with_channel(|channel| channel.ready(tempdir.to_owned()).map(Robj::from))
}

/// The next message; `NULL` if there will be none. From its return to the next call of a function
/// here, SIGINT reaches R.
/// @noRd
#[extendr]
fn worker_next() -> Robj {
    signals::block_interrupt();
    // One that came too late for the task before.
    unwind::forget_interrupt();
    let mut body = None;
    let waited = with_channel(|channel| {
        body = channel.next_task()?;
        Ok(().into())
    });
    let Some(body) = body else {
        return waited;
    };
    let message = match stream::unserialize(body) {
        Ok(message) => message,
        Err(Jump(token)) => token,
    };
    signals::unblock_interrupt();
    message
}

/// The channel as R's serialization writes to it. The first failure is kept: there is nobody left
/// to send to.
struct ToAgent(io::Result<()>);

impl Sink for ToAgent {
    fn write(&mut self, bytes: &[u8]) -> bool {
        if self.0.is_ok() {
            self.0 = send(bytes, false);
        }
        false
    }
}

fn send(bytes: &[u8], last: bool) -> io::Result<()> {
    CHANNEL.with_borrow_mut(|channel| match channel {
        Some(channel) => channel.send(bytes, last),
        None => Err(io::Error::other("this process is not a worker")),
    })
}

/// Answers the current message.
/// @noRd
#[extendr]
fn worker_send(answer: Robj) -> Robj {
    let begun = with_channel(|channel| {
        channel.restart();
        Ok(().into())
    });
    if !begun.is_null() {
        return begun;
    }
    let mut sink = ToAgent(Ok(()));
    if let Err(Jump(token)) = stream::serialize(&answer, &mut sink) {
        return token;
    }
    match sink.0.and_then(|()| send(&[], true)) {
        Ok(()) => ().into(),
        Err(error) => Failure::new("agent_failed").with("reason", error).into(),
    }
}

extendr_module! {
    mod worker;
    fn worker_connect;
    fn worker_ready;
    fn worker_next;
    fn worker_send;
}
