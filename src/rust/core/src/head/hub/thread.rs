//! The hub's thread: it starts the agents and serves their streams while R's thread does not.

use super::adaptive;
use super::core::{SharedCore, TICK};
use super::inbox::HostFailure;
use super::serve_host;
use crate::head::dashboard::server::{self as dashboard, Order};
use crate::head::dial_back;
use crate::head::dial_back::Bound;
use crate::head::launch::Launch;
use crate::protocol::control::Hello;
use mio::Events;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;

/// What R's thread sends: sockets on which agents dial back, and orders to the server of the dashboard.
pub(super) type Receivers = (UnboundedReceiver<Vec<Bound>>, UnboundedReceiver<Order>);

/// The hub's thread.
pub(super) fn run(
    launches: UnboundedReceiver<(usize, Launch)>,
    hello: Hello,
    shared_core: &Arc<SharedCore>,
    streams: mio::Poll,
    receivers: Receivers,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build();
    let served = runtime.and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        local.block_on(
            &runtime,
            serve(launches, hello, shared_core.clone(), streams, receivers),
        )
    });
    if let Err(error) = served {
        let reason = format!("the head's event loop failed: {error}");
        let mut core = shared_core.core();
        for host in &mut core.inbox.hosts {
            host.failure = Some(HostFailure::new(reason.clone()));
        }
        core.changed();
    }
}

async fn serve(
    mut launches: UnboundedReceiver<(usize, Launch)>,
    hello: Hello,
    shared_core: Arc<SharedCore>,
    streams: mio::Poll,
    (listeners, orders): Receivers,
) -> io::Result<()> {
    // SAFETY: a mio::Poll owns its descriptor and keeps the same one for as long as it lives.
    let streams = unsafe { AsyncFd::register_with_interest(streams, Interest::READABLE)? };
    let watcher = tokio::task::spawn_local(serve_streams(shared_core.clone(), streams));
    let ticker = tokio::task::spawn_local(tick(shared_core.clone()));
    let giver = tokio::task::spawn_local(adaptive::give_back(shared_core.clone()));
    let listener = tokio::task::spawn_local(dial_back::serve(shared_core.clone(), listeners));
    let over = Rc::new(Notify::new());
    let pages = dashboard::serve(shared_core.clone(), orders, over.clone());
    let pages = tokio::task::spawn_local(pages);
    let mut tasks = Vec::new();
    loop {
        tokio::select! {
            // The first hosts are launched in any case: each of them is stopped in its turn.
            biased;
            Some((agent, host)) = launches.recv() => {
                let task = serve_host::serve(shared_core.clone(), agent, host, hello.clone());
                tasks.push(tokio::task::spawn_local(task));
            }
            () = shared_core.stopped.notified() => break,
        }
    }
    listener.abort();
    // Each connection task ends when its agent's process has been waited for.
    for task in tasks {
        let _ = task.await;
    }
    over.notify_one();
    let _ = pages.await;
    watcher.abort();
    ticker.abort();
    giver.abort();
    Ok(())
}

/// Consecutive reads of one stream before the others, and the hub's other tasks, have their turn:
/// an agent that never stops sending must delay nothing but itself.
const HUB_READS: usize = 16;

/// Serves the streams while R's thread does not.
async fn serve_streams(
    shared_core: Arc<SharedCore>,
    mut streams: AsyncFd<mio::Poll>,
) -> io::Result<()> {
    let mut events = Events::with_capacity(64);
    // Streams that may contain more than was read of them, which the system will not announce
    // again.
    let mut unread: Vec<usize> = Vec::new();
    loop {
        if unread.is_empty() {
            let mut ready = streams.readable_mut().await?;
            poll(ready.get_inner_mut(), &mut events)?;
            if events.is_empty() {
                ready.clear_ready();
            }
        } else {
            poll(streams.get_mut(), &mut events)?;
        }
        for event in &events {
            let agent = event.token().0;
            if event.is_writable() || event.is_write_closed() {
                shared_core.core().on_writable(agent);
            }
            let readable = event.is_readable() || event.is_read_closed();
            if readable && !unread.contains(&agent) {
                unread.push(agent);
            }
        }
        // The lock is released after each read, because R may want it.
        unread.retain(|&agent| (0..HUB_READS).all(|_| shared_core.core().read(agent)));
        if !unread.is_empty() {
            tokio::task::yield_now().await;
        }
    }
}

fn poll(streams: &mut mio::Poll, events: &mut Events) -> io::Result<()> {
    loop {
        match streams.poll(events, Some(Duration::ZERO)) {
            // An interrupted call returns no events, although there may be some.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            polled => return polled,
        }
    }
}

/// Takes over reading from R's thread when R does something else.
async fn tick(shared_core: Arc<SharedCore>) {
    loop {
        shared_core.taken_over.notified().await;
        loop {
            tokio::time::sleep(TICK).await;
            if !shared_core.tick() {
                break;
            }
        }
    }
}
