//! The head's side: one thread that does all the socket work, and the handle through which R's
//! thread talks to it.
//!
//! R's thread sends [`Command`]s and reads the inbox in `Shared`; the hub's thread (a tokio
//! current-thread runtime) owns the streams and the [`crate::scheduler::Scheduler`]. Only bytes
//! and plain values cross between them. Never calls R.

mod conn;
mod handle;
mod shared;

pub use handle::{Answer, Hub, Progress};
pub use shared::{Event, HostFailure, HostView, WorkerView};

use crate::frame::Kind;
use crate::launch::Launch;
use crate::message::{Hello, Start, ToAgent};
use crate::outbuf::{MAX_SLICES, OutBuf};
use crate::scheduler::{JobId, Rank, Scheduler, TaskId};
use bytes::Bytes;
use conn::Conn;
use shared::Shared;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::mpsc::UnboundedReceiver;

/// One host of a cluster: how its agent is started and what it is to start.
#[derive(Clone, Debug)]
pub struct Host {
    pub launch: Launch,
    pub start: Start,
    /// The ranks of its workers, in the order of their index there.
    pub ranks: Vec<Rank>,
}

/// What R's thread asks of the hub.
#[derive(Debug)]
pub enum Command {
    Submit {
        rank: Rank,
        task: TaskId,
        job: JobId,
        chunk: Bytes,
        first: bool,
        last: bool,
    },
    CancelTask {
        rank: Rank,
        task: TaskId,
    },
    CancelJob(JobId),
    StopWorkers(Vec<Rank>),
    /// Something in `Shared` has changed that the hub may be waiting for.
    Look,
    Stop,
}

/// Bytes put together for one write.
const WRITE: usize = 256 * 1024;

/// All that the hub's tasks share. Borrowed only between two awaits.
struct Core {
    scheduler: Scheduler,
    conns: Vec<Conn>,
    shared: Arc<Shared>,
    stopping: bool,
}

impl Core {
    fn on_command(&mut self, command: Command) {
        match command {
            Command::Submit {
                rank,
                task,
                job,
                chunk,
                first,
                last,
            } => self.scheduler.submit(rank, task, job, chunk, first, last),
            Command::CancelTask { rank, task } => self.scheduler.cancel_task(rank, task),
            Command::CancelJob(job) => self.scheduler.cancel_job(job),
            Command::StopWorkers(ranks) => {
                for rank in ranks {
                    self.scheduler.stop_worker(rank);
                }
                if !self.scheduler.any_left() {
                    self.stop();
                }
            }
            Command::Look => {}
            Command::Stop => self.stop(),
        }
    }

    fn stop(&mut self) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        for agent in 0..self.conns.len() {
            // Without a greeting there is nobody to tell: the stream's end must do.
            let _ = self.scheduler.send_control(agent, &ToAgent::Stop);
            self.conns[agent].stop.notify_one();
        }
    }

    /// After any change: sends what can be sent, and tells R's thread what it must know.
    fn settle(&mut self) {
        let shared = self.shared.clone();
        loop {
            let taken = shared.taken.swap(0, Ordering::SeqCst);
            if taken > 0 {
                self.scheduler.taken(taken);
            }
            // Said before `want` is read, and R sets `want` before it reads this: one of the two
            // sees the other's.
            let starving = self.scheduler.is_starving();
            shared.starving.store(starving, Ordering::SeqCst);
            if starving {
                self.scheduler.want(shared.wanted());
                let blocked = shared.send_blocked.load(Ordering::SeqCst);
                self.scheduler.set_unlimited(blocked);
            }
            for agent in 0..self.conns.len() {
                self.flush(agent);
            }
            let released = self.scheduler.take_released();
            let notes = self.scheduler.take_notes();
            shared.publish(notes, released);
            // Answers that nobody wants any more have made room.
            if shared.taken.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
    }

    /// Writes to an agent as much as its stream takes now.
    fn flush(&mut self, agent: usize) {
        let conn = &mut self.conns[agent];
        let Some(stream) = conn.stream.clone() else {
            return;
        };
        while !conn.blocked {
            while conn.out.len() < WRITE {
                let Some(frame) = self.scheduler.next_frame(agent) else {
                    break;
                };
                debug_assert!(frame.header.kind != Kind::Output);
                conn.out.push(&frame);
            }
            if conn.out.is_empty() {
                return;
            }
            let written = conn.out.write_with(|slices| {
                debug_assert!(slices.len() <= MAX_SLICES);
                stream.try_write_vectored(slices)
            });
            match written {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    conn.blocked = true;
                    conn.interest.notify_one();
                }
                Err(_) => {
                    // The reading side finds the end of the stream, and why.
                    conn.out = OutBuf::default();
                    return;
                }
            }
        }
    }

    fn fail_host(&mut self, agent: usize, failure: HostFailure) {
        self.scheduler.agent_lost(agent, &failure.reason);
        self.shared.host_failed(agent, failure);
    }
}

/// The hub's thread.
fn run(hosts: Vec<Host>, hello: Hello, shared: &Arc<Shared>, commands: UnboundedReceiver<Command>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let reason = format!("the head's event loop could not be started: {error}");
            for agent in 0..hosts.len() {
                shared.host_failed(agent, HostFailure::new(reason.clone()));
            }
            return;
        }
    };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, serve(hosts, hello, shared.clone(), commands));
}

async fn serve(
    hosts: Vec<Host>,
    hello: Hello,
    shared: Arc<Shared>,
    mut commands: UnboundedReceiver<Command>,
) {
    let ranks = hosts.iter().map(|host| host.ranks.clone()).collect();
    let limit = shared.result_limit;
    let core = Rc::new(RefCell::new(Core {
        scheduler: Scheduler::new(ranks, limit),
        conns: hosts.iter().map(|_| Conn::default()).collect(),
        shared,
        stopping: false,
    }));
    let mut tasks = Vec::new();
    for (agent, host) in hosts.into_iter().enumerate() {
        let task = conn::serve(core.clone(), agent, host, hello.clone());
        tasks.push(tokio::task::spawn_local(task));
    }
    let stopped = async {
        loop {
            // A handle that was dropped without stopping asks for the end all the same.
            let command = commands.recv().await.unwrap_or(Command::Stop);
            let mut core = core.borrow_mut();
            core.on_command(command);
            while let Ok(command) = commands.try_recv() {
                core.on_command(command);
            }
            core.settle();
            if core.stopping {
                return;
            }
        }
    };
    stopped.await;
    // Each connection ends when its agent's process has been waited for.
    for task in tasks {
        let _ = task.await;
    }
}
