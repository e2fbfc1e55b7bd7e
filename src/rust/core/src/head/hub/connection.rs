//! One agent's connection: launching it, greeting it, and finding out why it ended.

use super::core::Shared;
use super::inbox::HostFailure;
use crate::head::launch::{self, AgentProcess, Launch, Launched};
use crate::platform::exit::Exit;
use crate::protocol::control::{self, Hello, Start, ToAgent};
use crate::protocol::handshake::{Greeting, MAGIC};
use crate::protocol::heartbeat::Pulse;
use crate::protocol::send_queue::OutBuf;
use bytes::BytesMut;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

/// How long an agent's process may take to end once its stream has ended.
const EXIT_PATIENCE: Duration = Duration::from_millis(950);

/// How long an R process that has not greeted may take to end when it is told to.
const INTERRUPT_PATIENCE: Duration = Duration::from_millis(200);

/// How long an agent may take to end its workers and then its stream once asked, beyond the time that
/// idle workers have for it, before it is killed, and they with it. Its own grace for busy workers is
/// 0.6 s; the rest is for a busy machine.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of an agent's stderr that error messages show.
const TAIL: usize = 8 * 1024;

/// The parts of a connection that the rest of the hub uses.
#[derive(Default)]
pub struct Conn {
    /// Set once the agent has greeted.
    pub stream: Option<Arc<std::os::unix::net::UnixStream>>,
    pub received: BytesMut,
    /// Those that have come along, and belong to frames that have not been looked at.
    pub descriptors: VecDeque<OwnedFd>,
    pub out: OutBuf,
    /// The stream took no more.
    pub blocked: bool,
    /// What the hub's thread watches the stream for.
    pub watched: Option<mio::Interest>,
    /// How the stream ended.
    pub end: Option<io::Result<()>>,
    /// `end` has been set.
    pub over: Arc<Notify>,
    /// The cluster stops.
    pub stop: Arc<Notify>,
    /// Of an agent on another machine, how long it may be silent; set before `planned`.
    pub patience: Duration,
    /// How long idle workers may take to end.
    pub stop_timeout: Duration,
    /// It has been told what to start.
    pub planned: Arc<Notify>,
    /// When something last came from it, once it serves.
    pub heard: Option<Instant>,
    /// What it was told to start, if it is to be taken back when it is lost.
    pub plan: Option<Start>,
    /// Its end is meant.
    pub for_good: bool,
    /// Bytes that went to the host, and that came from it.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

/// How long to wait before a lost host is tried again: at first, and at most.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Serves one agent from its launch to its end, and if it is to be taken back, those that follow it.
pub async fn serve(shared: Arc<Shared>, agent: usize, launch: Launch, hello: Hello) {
    let failure = serve_one(&shared, agent, &launch, &hello, false).await;
    fail(&shared, agent, failure);
    let mut wait = FIRST_WAIT;
    loop {
        let stop = {
            let core = shared.core();
            if !core.takes_back(agent) {
                return;
            }
            core.conns[agent].stop.clone()
        };
        tokio::select! {
            () = sleep(wait) => {}
            () = stop.notified() => return,
        }
        let failure = serve_one(&shared, agent, &launch, &hello, true).await;
        let was_back = shared.core().inbox.hosts[agent].failure.is_none();
        wait = if was_back {
            FIRST_WAIT
        } else {
            (2 * wait).min(LONGEST_WAIT)
        };
        fail(&shared, agent, failure);
    }
}

/// One agent from its launch to its end, and why it ended. `again`: there was one before.
async fn serve_one(
    shared: &Arc<Shared>,
    agent: usize,
    launch: &Launch,
    hello: &Hello,
    again: bool,
) -> HostFailure {
    let (exit_tx, exit) = oneshot::channel();
    let launched = launch::start(launch, move |status| {
        let _ = exit_tx.send(status);
    });
    let launched = match launched {
        Ok(launched) => launched,
        Err(error) => {
            let program = launch.command.first();
            let program = program.map(|p| p.to_string_lossy().into_owned());
            let program = program.unwrap_or_default();
            let reason = format!("the agent could not be started: {program}: {error}");
            return HostFailure::new(reason);
        }
    };
    let Launched {
        stream,
        stderr,
        process,
    } = launched;
    {
        let mut core = shared.core();
        core.inbox.hosts[agent].pid = Some(process.pid());
        let (host, pid) = (launch.host.as_str(), process.pid());
        info!(agent = agent + 1, host, pid, again, "agent launched");
        core.changed();
    }
    let tail = Rc::new(RefCell::new(Vec::new()));
    if let Ok(stderr) = pipe::Receiver::from_owned_fd(stderr.into()) {
        tokio::task::spawn_local(keep_tail(stderr, tail.clone()));
    }
    let mut greeting = Greeting::default();
    let ended = talk(shared, agent, hello, stream, &mut greeting, again).await;
    // The stream is closed on our side too from here on, which asks the agent to end, if it is
    // still there.
    let ended = ended.and(shared.core().detach(agent));
    let greeted = shared.core().inbox.hosts[agent].hello.is_some();
    let (status, killed) = await_exit(&process, exit, greeted).await;
    // What it wrote last may still be in the pipe.
    tokio::task::yield_now().await;
    let exited = match status {
        Some(_) if killed => "closed its stream, did not end and was killed".to_owned(),
        Some(status) => describe(status),
        None => "did not end when asked to and could not be killed".to_owned(),
    };
    let reason = match ended {
        Ok(()) => format!("the agent's process {exited}"),
        Err(error) => format!("{error} (the agent's process {exited})"),
    };
    HostFailure {
        reason,
        stderr: String::from_utf8_lossy(&tail.borrow()).into_owned(),
        stdout: greeting.noise(),
        status: status.and_then(|status| status.code()),
    }
}

fn fail(shared: &Shared, agent: usize, failure: HostFailure) {
    let mut core = shared.core();
    warn_of(agent, &failure, core.stopping);
    core.look_at_clock();
    core.scheduler.agent_lost(agent, &failure.reason);
    let for_good = core.conns[agent].for_good;
    let known = &mut core.inbox.hosts[agent].failure;
    // Why it was left out says more than how it then ended.
    if known.is_none() || !for_good {
        *known = Some(failure);
    }
    core.settle();
    core.changed();
}

fn warn_of(agent: usize, failure: &HostFailure, stopping: bool) {
    let reason = failure.reason.as_str();
    match stopping {
        true => debug!(agent = agent + 1, reason, "agent ended"),
        false => warn!(agent = agent + 1, reason, "agent lost"),
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Status(code).to_string(),
        (_, Some(signal)) => Exit::Signal(signal).to_string(),
        _ => Exit::Unknown.to_string(),
    }
}

/// How it has ended, and whether it was killed for that.
async fn await_exit(
    process: &Arc<AgentProcess>,
    mut exit: oneshot::Receiver<io::Result<ExitStatus>>,
    greeted: bool,
) -> (Option<ExitStatus>, bool) {
    let known = |waited: Result<io::Result<ExitStatus>, _>| waited.ok().and_then(Result::ok);
    let mut waited = timeout(EXIT_PATIENCE, &mut exit).await;
    let interrupted = waited.is_err() && !greeted;
    if interrupted {
        // It may hang in a profile, and knows nothing of the stream.
        process.interrupt();
        waited = timeout(INTERRUPT_PATIENCE, &mut exit).await;
    }
    if let Ok(waited) = waited {
        return (known(waited), interrupted);
    }
    process.kill();
    let waited = timeout(EXIT_PATIENCE, exit).await;
    (waited.ok().and_then(known), true)
}

async fn keep_tail(stderr: pipe::Receiver, tail: Rc<RefCell<Vec<u8>>>) {
    let mut buffer = vec![0u8; 4096];
    while stderr.readable().await.is_ok() {
        match stderr.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                let mut tail = tail.borrow_mut();
                tail.extend_from_slice(&buffer[..n]);
                let excess = tail.len().saturating_sub(TAIL);
                tail.drain(..excess);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// Greets the agent, and waits for the end of what follows. An error says why the head ended it.
async fn talk(
    shared: &Shared,
    agent: usize,
    hello: &Hello,
    stream: std::os::unix::net::UnixStream,
    greeting: &mut Greeting,
    again: bool,
) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    let (stop, over, start_patience) = {
        let core = shared.core();
        let conn = &core.conns[agent];
        (conn.stop.clone(), conn.over.clone(), core.start_patience)
    };
    let late = async || {
        if !again {
            // R sees to the first start.
            std::future::pending::<()>().await;
        }
        sleep(start_patience).await;
        let seconds = start_patience.as_secs_f64();
        io::Error::other(format!(
            "it was tried again and not up within {seconds} seconds"
        ))
    };
    let received = tokio::select! {
        received = greet(shared, agent, hello, &stream, greeting) => match received? {
            Some(received) => received,
            None => return Ok(()),
        },
        // Nobody has been told to stop yet: the end of the stream says it.
        () = stop.notified() => return Ok(()),
        error = late() => return Err(error),
    };
    let stream = stream.into_std()?;
    {
        let mut core = shared.core();
        if again {
            if core.conns[agent].for_good {
                return Ok(());
            }
            core.agent_back(agent)?;
        }
        core.attach(agent, stream, received);
    }
    let started = async {
        let error = late().await;
        if !shared.core().scheduler.is_starting(agent) {
            std::future::pending::<()>().await;
        }
        error
    };
    let stopped = async {
        stop.notified().await;
        let stop_timeout = {
            let core = shared.core();
            match core.scheduler.is_starting(agent) {
                // It has no idle workers that need time to end.
                true => Duration::ZERO,
                false => core.conns[agent].stop_timeout,
            }
        };
        sleep(stop_timeout + STOP_PATIENCE).await;
    };
    tokio::select! {
        () = over.notified() => Ok(()),
        error = silence(shared, agent) => Err(error),
        error = started => Err(error),
        () = stopped => Err(io::Error::other("the agent did not heed that it was to stop")),
    }
}

/// Tells the agent that the head is alive, and waits for it to be silent for too long. While it
/// loads packages it cannot answer; from its first message after that on, it can.
async fn silence(shared: &Shared, agent: usize) -> io::Error {
    let began = Instant::now();
    let planned = shared.core().conns[agent].planned.clone();
    planned.notified().await;
    let patience = shared.core().conns[agent].patience;
    if patience.is_zero() {
        std::future::pending::<()>().await;
    }
    let mut pulse: Option<Pulse> = None;
    loop {
        sleep(patience / 16).await;
        let mut core = shared.core();
        if core.conns[agent].heard.is_none() {
            continue;
        }
        // What came while this process was stopped counts.
        core.read(agent);
        let now = began.elapsed();
        let pulse = pulse.get_or_insert_with(|| Pulse::new(patience, now));
        if let Some(heard) = core.conns[agent].heard {
            pulse.hear(heard.saturating_duration_since(began));
        }
        if pulse.is_silent(now) {
            let seconds = patience.as_secs_f64();
            return io::Error::other(format!("nothing was heard from it for {seconds} seconds"));
        }
        if pulse.speak(now) {
            let _ = core.scheduler.send_control(agent, &ToAgent::Alive);
            core.settle();
        }
    }
}

/// One read. `None`: nothing there now.
fn read(stream: &UnixStream, received: &mut BytesMut) -> io::Result<Option<usize>> {
    received.reserve(16 * 1024);
    match stream.try_read_buf(received) {
        Ok(n) => Ok(Some(n)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // The agent was killed with bytes of ours unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some(0)),
        Err(error) => Err(error),
    }
}

/// Sends magic and hello, skips what a shell printed, and checks the agent's hello.
/// `None`: it ended first.
async fn greet(
    shared: &Shared,
    agent: usize,
    hello: &Hello,
    stream: &UnixStream,
    greeting: &mut Greeting,
) -> io::Result<Option<BytesMut>> {
    let ours = control::encode(&ToAgent::Hello(hello.clone())).map_err(io::Error::other)?;
    let mut out = OutBuf::default();
    out.push_bytes(MAGIC);
    out.push(&ours);
    while !out.is_empty() {
        stream.writable().await?;
        match out.write_with(|slices| stream.try_write_vectored(slices)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It may have ended at once; what it said is worth more than this error.
            Err(_) => break,
            Ok(_) => {}
        }
    }
    loop {
        stream.readable().await?;
        let mut fresh = BytesMut::new();
        match read(stream, &mut fresh)? {
            None => continue,
            Some(0) => return Ok(None),
            Some(_) => {}
        }
        if let Some(theirs) = greeting.feed(&fresh).map_err(io::Error::other)? {
            hello.check(&theirs).map_err(io::Error::other)?;
            info!(
                agent = agent + 1,
                pid = theirs.pid,
                r_version = theirs.r_version,
                "agent greeted"
            );
            shared.core().inbox.greeted(agent, theirs);
            return Ok(Some(greeting.take_rest()));
        }
    }
}
