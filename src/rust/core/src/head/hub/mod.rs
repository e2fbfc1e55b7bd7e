//! The head's side: one thread that starts the agents and sees to them while R does something else,
//! and the handle through which R's thread sends and receives.
//!
//! What both need is in [`core`], under one lock. Only bytes and plain values are in it; nothing
//! here ever calls R.

mod by_hand;
mod client;
mod connection;
mod core;
mod dump;
mod futures;
mod inbox;
mod readiness;
mod recent;
mod reconnect;
mod status;
mod writer;

pub use client::{Answer, Begun, Hub, NO_JOB, Progress, Turn};
pub use dump::Dump;
pub use futures::{CallEnd, Waker};
pub use inbox::{Event, HostFailure, HostView, WorkerView};
pub use recent::RecentEvent;
pub use status::{HostStatus, Status};

use crate::head::launch::Launch;
use crate::protocol::control::{Hello, Start};
use crate::protocol::ids::Rank;
use core::{Shared, TICK};
use mio::Events;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What one host's agent is to start.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The start message for the agent.
    pub start: Start,
    /// The ranks of its workers, in the order of their index there.
    pub ranks: Vec<Rank>,
}

/// The hub's thread.
fn run(hosts: Vec<Launch>, hello: Hello, shared: &Arc<Shared>, watched: mio::Poll) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build();
    let count = hosts.len();
    let served = runtime.and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, serve(hosts, hello, shared.clone(), watched))
    });
    if let Err(error) = served {
        let reason = format!("the head's event loop failed: {error}");
        let mut core = shared.core();
        for agent in 0..count {
            core.inbox.hosts[agent].failure = Some(HostFailure::new(reason.clone()));
        }
        core.changed();
    }
}

async fn serve(
    hosts: Vec<Launch>,
    hello: Hello,
    shared: Arc<Shared>,
    watched: mio::Poll,
) -> io::Result<()> {
    // SAFETY: a mio::Poll owns its descriptor and keeps the same one for as long as it lives.
    let watched = unsafe { AsyncFd::register_with_interest(watched, Interest::READABLE)? };
    let watcher = tokio::task::spawn_local(watch(shared.clone(), watched));
    let ticker = tokio::task::spawn_local(tick(shared.clone()));
    let mut tasks = Vec::new();
    for (agent, host) in hosts.into_iter().enumerate() {
        let task = connection::serve(shared.clone(), agent, host, hello.clone());
        tasks.push(tokio::task::spawn_local(task));
    }
    shared.stopped.notified().await;
    // Each connection ends when its agent's process has been waited for.
    for task in tasks {
        let _ = task.await;
    }
    watcher.abort();
    ticker.abort();
    Ok(())
}

/// Reads of one stream before the others, and the hub's other tasks, have their turn: an agent that
/// never stops sending must hold up nothing but itself.
const READS: usize = 16;

/// Serves the streams that R's thread does not.
async fn watch(shared: Arc<Shared>, mut watched: AsyncFd<mio::Poll>) -> io::Result<()> {
    let mut events = Events::with_capacity(64);
    // Streams that may hold more than was read of them, which will not be announced again.
    let mut unread: Vec<usize> = Vec::new();
    loop {
        if unread.is_empty() {
            let mut ready = watched.readable_mut().await?;
            poll(ready.get_inner_mut(), &mut events)?;
            if events.is_empty() {
                ready.clear_ready();
            }
        } else {
            poll(watched.get_mut(), &mut events)?;
        }
        for event in &events {
            let agent = event.token().0;
            if event.is_writable() || event.is_write_closed() {
                shared.core().on_writable(agent);
            }
            let readable = event.is_readable() || event.is_read_closed();
            if readable && !unread.contains(&agent) {
                unread.push(agent);
            }
        }
        // Each time under the lock anew: R may want it.
        unread.retain(|&agent| (0..READS).all(|_| shared.core().read(agent)));
        if !unread.is_empty() {
            tokio::task::yield_now().await;
        }
    }
}

fn poll(watched: &mut mio::Poll, events: &mut Events) -> io::Result<()> {
    loop {
        match watched.poll(events, Some(Duration::ZERO)) {
            // No events, but that does not mean that there are none.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            polled => return polled,
        }
    }
}

/// Takes over the reading from R's thread when that has found something else to do.
async fn tick(shared: Arc<Shared>) {
    loop {
        shared.taken_over.notified().await;
        loop {
            tokio::time::sleep(TICK).await;
            if !shared.tick() {
                break;
            }
        }
    }
}
