//! The task that serves one host: launching its agent, greeting it, and finding out why it ended.

use super::core::SharedCore;
use super::inbox::HostFailure;
use crate::agent::linger;
use crate::head::dial_back::{Connection, NO_ADDRESS};
use crate::head::launch::{self, AgentProcess, Launch, Launched, Source};
use crate::platform::exit::Exit;
use crate::protocol::control::{self, Hello, Secret, ToAgent, ToHead};
use crate::protocol::handshake::{Greeting, MAGIC, Preamble, PreambleState};
use crate::protocol::heartbeat::Heartbeat;
use crate::protocol::noise::{self, Introduction, Verdict};
use crate::protocol::send_queue::OutBuf;
use bytes::BytesMut;
use std::cell::RefCell;
use std::io;
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

/// How long an agent's process may take to end once its stream has ended.
const EXIT_TIMEOUT: Duration = Duration::from_millis(950);

/// How long an R process that has not greeted may take to end when it is interrupted.
const INTERRUPT_TIMEOUT: Duration = Duration::from_millis(200);

/// How long an agent may take to end its workers and then its stream once asked, beyond the time
/// that idle workers have, before it is killed together with them. The agent's own grace for busy
/// workers is 0.6 s; the rest is for a busy machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the workers of an agent are not used that has missed a set-up call.
const MISSED: &str = "its workers were ended, because they had missed exports or set-up calls while the host was lost";

/// Bytes of an agent's stderr that error messages show.
const AGENT_STDERR_TAIL: usize = 8 * 1024;

/// How often it is checked whether the set-up log has been taken over.
const TAKE_OVER_CHECK: Duration = Duration::from_millis(50);

/// The first and the longest pause before a lost host is reconnected.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Serves one host: its agent from launch to end, and the agents that replace it if the host is
/// reconnected.
pub async fn serve(shared_core: Arc<SharedCore>, agent: usize, launch: Launch, hello: Hello) {
    serve_agents(&shared_core, agent, launch, hello).await;
    let mut core = shared_core.core();
    core.inbox.hosts[agent].over = true;
    core.changed();
}

async fn serve_agents(shared_core: &Arc<SharedCore>, agent: usize, launch: Launch, hello: Hello) {
    let failure = serve_one(shared_core, agent, &launch, &hello, false).await;
    fail(shared_core, agent, failure);
    let dials = matches!(launch.source, Source::DialBack { .. });
    let lingers = match &launch.source {
        Source::Waiting { .. } => true,
        Source::DialBack { lingers, .. } => lingers.is_some(),
        Source::Command { .. } => false,
    };
    if lingers {
        await_take_over(shared_core, agent).await;
    }
    let mut wait = FIRST_WAIT;
    loop {
        let stop = {
            let core = shared_core.core();
            if !core.takes_back(agent) {
                return;
            }
            core.conns[agent].stop.clone()
        };
        tokio::select! {
            // An agent that dials back may come at any time.
            () = sleep(if dials { Duration::ZERO } else { wait }) => {}
            () = stop.notified() => return,
        }
        let failure = serve_one(shared_core, agent, &launch, &hello, true).await;
        let was_back = shared_core.core().inbox.hosts[agent].failure.is_none();
        wait = if was_back {
            FIRST_WAIT
        } else {
            (2 * wait).min(LONGEST_WAIT)
        };
        fail(shared_core, agent, failure);
    }
}

/// Waits until this head knows the workers of a cluster that it takes over, and their set-up calls, or is stopped: a lost
/// host cannot be reconnected before.
async fn await_take_over(shared_core: &SharedCore, agent: usize) {
    let (stop, planned) = {
        let core = shared_core.core();
        let conn = &core.conns[agent];
        (conn.stop.clone(), conn.planned.clone())
    };
    let ready = async {
        // An agent that has greeted has taken the notification.
        while shared_core.core().conns[agent].plan.is_none() {
            tokio::select! {
                () = planned.notified() => {}
                () = sleep(FIRST_WAIT) => {}
            }
        }
        while {
            let core = shared_core.core();
            core.take_over.is_some() || !core.began_take_over
        } {
            sleep(TAKE_OVER_CHECK).await;
        }
    };
    let comes_back = {
        let core = shared_core.core();
        // A host that was stopped has taken the notification.
        let conn = &core.conns[agent];
        (core.reconnects || conn.dials) && !conn.permanent
    };
    if comes_back {
        tokio::select! {
            () = ready => {}
            () = stop.notified() => {}
        }
    }
}

/// Serves one agent from launch to end, and returns why it ended. `again`: it reconnects a lost
/// host.
async fn serve_one(
    shared_core: &Arc<SharedCore>,
    agent: usize,
    launch: &Launch,
    hello: &Hello,
    again: bool,
) -> HostFailure {
    let source = match &launch.source {
        Source::Waiting { next, .. } if again => next,
        source => source,
    };
    let (source, key) = match source {
        Source::Waiting {
            name: Some(name),
            key,
            missed,
            ..
        } => return serve_waiting(shared_core, agent, name, (key, *missed), hello).await,
        Source::Waiting {
            relay, key, missed, ..
        } => (&**relay, Some((key, *missed))),
        source => (source, None),
    };
    let (command, env) = match source {
        Source::Command { command, env } => (command, env),
        Source::DialBack { launcher, lingers } => {
            let lingers = lingers.as_ref().filter(|_| !again);
            let missed = lingers.is_some_and(|lingering| lingering.missed);
            let name = lingers.map(|lingering| lingering.name.as_str());
            let dialled = await_dialled(shared_core, agent, *launcher, name).await;
            return match dialled {
                Ok(connection) => {
                    let origin = Origin { again, missed };
                    serve_dialled(shared_core, agent, connection, hello, origin).await
                }
                Err(failure) => failure,
            };
        }
        Source::Waiting { .. } => return HostFailure::new("it cannot be reached".into()),
    };
    let (exit_tx, exit) = oneshot::channel();
    let launched = launch::start(command, env, move |status| {
        let _ = exit_tx.send(status);
    });
    let launched = match launched {
        Ok(launched) => launched,
        Err(error) => {
            let program = command.first();
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
        let mut core = shared_core.core();
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
    let missed = key.is_some_and(|(_, missed)| missed);
    let proof = key.map(|(key, _)| Proof { key, relayed: true });
    let peer = Peer {
        stream,
        proof,
        origin: Origin { again, missed },
    };
    let ended = talk(shared_core, agent, hello, peer, &mut greeting).await;
    let in_use = is_in_use(&ended);
    // From here on the stream is closed on the head's side, which asks the agent to end if it is
    // still running.
    let ended = ended.and(shared_core.core().detach(agent));
    let greeted = shared_core.core().inbox.hosts[agent].hello.is_some();
    let (status, killed) = await_exit(&process, exit, greeted).await;
    // The agent's last output may still be in the pipe.
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
        in_use,
    }
}

/// Waits for an agent that dials back. `lingers`: the name of the agent that has workers and looks for its head. Once the
/// cluster has begun without it, an agent of the launcher is waited for: its job may have been waiting in the queue.
async fn await_dialled(
    shared_core: &SharedCore,
    agent: usize,
    launcher: u32,
    mut lingers: Option<&str>,
) -> Result<Connection, HostFailure> {
    loop {
        let (dialled, stop, late) = {
            let mut core = shared_core.core();
            let conn = &core.conns[agent];
            let (stop, late) = (conn.stop.clone(), conn.late.clone());
            let dialled = match lingers {
                Some(name) => core.dial_back.wait_for(name, agent),
                None => core.dial_back.wait(launcher, agent),
            };
            (dialled, stop, late)
        };
        tokio::select! {
            connection = dialled => {
                let failed = |_| HostFailure::new("the head listens no more".into());
                return connection.map_err(failed);
            }
            () = stop.notified() => {
                let reason = "no agent had dialled back when the host was stopped";
                return Err(HostFailure::new(reason.into()));
            }
            () = late.notified(), if lingers.is_some() => lingers = None,
        }
    }
}

/// Serves an agent that has dialled back, and returns why it ended.
async fn serve_dialled(
    shared_core: &SharedCore,
    agent: usize,
    connection: Connection,
    hello: &Hello,
    origin: Origin,
) -> HostFailure {
    // An agent whose job had waited in the queue has no workers yet.
    let is_new = connection.introduction.lingers.is_empty();
    let missed = origin.missed && !is_new;
    {
        let mut core = shared_core.core();
        let host = &mut core.inbox.hosts[agent];
        let introduction = &connection.introduction;
        host.node = Some(introduction.hostname.clone());
        host.peer = Some(connection.peer).filter(|&peer| peer != NO_ADDRESS);
        host.job = Some(introduction.job.clone()).filter(|job| !job.is_empty());
        core.changed();
    }
    let (stream, relay) = match connection.start() {
        Ok(started) => started,
        Err(error) => {
            return HostFailure::new(format!("the agent's connection was refused: {error}"));
        }
    };
    let mut greeting = Greeting::default();
    let peer = Peer {
        stream,
        proof: None,
        origin: Origin { missed, ..origin },
    };
    let ended = talk(shared_core, agent, hello, peer, &mut greeting).await;
    // From here on the stream is closed on the head's side, which asks the agent to end.
    let ended = ended.and(shared_core.core().detach(agent));
    let closed = relay.finish(EXIT_TIMEOUT).await;
    HostFailure {
        reason: match ended {
            Ok(()) => format!("the agent's connection {closed}"),
            Err(error) => format!("{error} (the agent's connection {closed})"),
        },
        stdout: greeting.noise(),
        ..HostFailure::default()
    }
}

/// Serves an agent on this machine that has waited for its head, and returns why it ended.
async fn serve_waiting(
    shared_core: &SharedCore,
    agent: usize,
    name: &str,
    (key, missed): (&Secret, bool),
    hello: &Hello,
) -> HostFailure {
    let stream = linger::directory(name)
        .and_then(|directory| std::os::unix::net::UnixStream::connect(linger::socket(&directory)));
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => {
            let reason = format!("no agent of the cluster waits on this machine: {error}");
            return HostFailure::new(reason);
        }
    };
    let proof = Some(Proof {
        key,
        relayed: false,
    });
    let peer = Peer {
        stream,
        proof,
        origin: Origin {
            again: false,
            missed,
        },
    };
    let mut greeting = Greeting::default();
    let ended = talk(shared_core, agent, hello, peer, &mut greeting).await;
    let in_use = is_in_use(&ended);
    let ended = ended.and(shared_core.core().detach(agent));
    HostFailure {
        reason: match ended {
            Ok(()) => "the agent has ended".into(),
            Err(error) => error.to_string(),
        },
        in_use,
        ..HostFailure::default()
    }
}

fn is_in_use(ended: &io::Result<()>) -> bool {
    let busy = |error: &io::Error| error.kind() == io::ErrorKind::ResourceBusy;
    ended.as_ref().is_err_and(busy)
}

/// The agent has ended, or will not come.
pub(super) fn fail(shared_core: &SharedCore, agent: usize, mut failure: HostFailure) {
    let mut core = shared_core.core();
    let refusal = core.inbox.hosts[agent].start_failure.as_ref();
    if matches!(refusal, Some(ToHead::StartFailed { reason }) if reason == linger::TAKEN_OVER) {
        // This head has no business there any more.
        core.conns[agent].permanent = true;
        failure = HostFailure::new(linger::TAKEN_OVER.into());
    }
    warn_of(agent, &failure, core.stopping);
    // A host that is left out is reported by the scheduler, and one that drains ends as planned.
    let planned = core.conns[agent].permanent || core.inbox.hosts[agent].draining.is_some();
    if !core.stopping && !planned {
        let now = core.began.elapsed();
        core.board
            .host_failed(agent, &failure.reason, &failure.stderr, now);
    }
    core.update_clock();
    if core.conns[agent].dials {
        core.job_lost(agent, &failure.reason);
    } else {
        core.scheduler.agent_lost(agent, &failure.reason);
        core.conns[agent].awaited &= core.reconnects;
    }
    if !core.takes_back(agent) {
        core.give_up_awaited(agent, &failure);
    }
    let permanent = core.conns[agent].permanent;
    let known = &mut core.inbox.hosts[agent].failure;
    // The reason for leaving the host out says more than how the agent then ended.
    if known.is_none() || !permanent {
        *known = Some(failure);
    }
    core.pump();
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

/// How the process ended, and whether the hub killed it.
async fn await_exit(
    process: &Arc<AgentProcess>,
    mut exit: oneshot::Receiver<io::Result<ExitStatus>>,
    greeted: bool,
) -> (Option<ExitStatus>, bool) {
    let known = |waited: Result<io::Result<ExitStatus>, _>| waited.ok().and_then(Result::ok);
    let mut waited = timeout(EXIT_TIMEOUT, &mut exit).await;
    let interrupted = waited.is_err() && !greeted;
    if interrupted {
        // The process may hang in a profile, and does not read the stream.
        process.interrupt();
        waited = timeout(INTERRUPT_TIMEOUT, &mut exit).await;
    }
    if let Ok(waited) = waited {
        return (known(waited), interrupted);
    }
    process.kill();
    let waited = timeout(EXIT_TIMEOUT, exit).await;
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
                let excess = tail.len().saturating_sub(AGENT_STDERR_TAIL);
                tail.drain(..excess);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// What a head proves to an agent that has waited for it.
struct Proof<'a> {
    /// The key of the cluster.
    key: &'a Secret,
    /// A relay connects both, and prints the magic line once it has.
    relayed: bool,
}

/// The other end of the stream to an agent.
struct Peer<'a> {
    stream: std::os::unix::net::UnixStream,
    proof: Option<Proof<'a>>,
    origin: Origin,
}

/// Where an agent comes from.
#[derive(Clone, Copy)]
struct Origin {
    /// The agent reconnects a lost host.
    again: bool,
    /// The agent has workers that have missed a set-up call: see [`missed`](super::missed).
    missed: bool,
}

/// Greets the agent, and waits for the end of its stream. An error says why the head ended it.
async fn talk(
    shared_core: &SharedCore,
    agent: usize,
    hello: &Hello,
    peer: Peer<'_>,
    greeting: &mut Greeting,
) -> io::Result<()> {
    let Peer {
        stream,
        proof,
        origin: Origin { again, missed },
    } = peer;
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    let has_waited = proof.is_some();
    let (stop, over, start_timeout) = {
        let core = shared_core.core();
        let conn = &core.conns[agent];
        (conn.stop.clone(), conn.over.clone(), core.start_timeout)
    };
    let late = async |joins: bool| {
        sleep(start_timeout).await;
        // R limits the time of the start of the cluster.
        while !(joins || shared_core.core().conns[agent].awaited) {
            sleep(FIRST_WAIT).await;
        }
        let seconds = start_timeout.as_secs_f64();
        let what = if again {
            "it was tried again and"
        } else {
            "it was"
        };
        io::Error::other(format!("{what} not up within {seconds} seconds"))
    };
    let received = tokio::select! {
        received = greet(shared_core, agent, hello, (&stream, proof, missed), greeting) => match received? {
            Some(received) => received,
            None => return Ok(()),
        },
        // No stop request has been sent yet: the end of the stream stops the agent.
        () = stop.notified() => return Ok(()),
        error = late(again) => return Err(error),
    };
    let stream = stream.into_std()?;
    let joins = {
        let mut core = shared_core.core();
        let joins = again || core.conns[agent].awaited;
        if joins {
            if core.conns[agent].permanent {
                return Ok(());
            }
            if has_waited && !again {
                // Its workers have their set-up calls, and are not to be restored. A fresh agent may take its place.
                return Err(io::Error::other("its agent has not answered in time"));
            }
            let theirs = core.inbox.hosts[agent].hello.as_ref();
            if !again && theirs.is_some_and(|theirs| theirs.big_endian != hello.big_endian) {
                let reason =
                    "a host that joins after the start must have the byte order of this machine";
                return Err(io::Error::other(reason));
            }
            core.agent_back(agent)?;
        }
        core.attach(agent, stream, received);
        joins
    };
    let started = async {
        if !joins {
            std::future::pending::<()>().await;
        }
        let error = late(joins).await;
        if !shared_core.core().scheduler.is_starting(agent) {
            std::future::pending::<()>().await;
        }
        error
    };
    let stopped = async {
        stop.notified().await;
        let stop_timeout = {
            let core = shared_core.core();
            match core.scheduler.is_starting(agent) {
                // The agent has no idle workers that need time to end.
                true => Duration::ZERO,
                false => core.conns[agent].stop_timeout,
            }
        };
        sleep(stop_timeout + STOP_TIMEOUT).await;
    };
    tokio::select! {
        () = over.notified() => Ok(()),
        error = silence(shared_core, agent) => Err(error),
        error = started => Err(error),
        () = stopped => Err(io::Error::other("the agent did not heed that it was to stop")),
    }
}

/// Sends heartbeats to the agent, and returns when the agent has been silent for too long. An agent
/// cannot answer while it loads packages, so silence counts only from its first message after that.
async fn silence(shared_core: &SharedCore, agent: usize) -> io::Error {
    let began = Instant::now();
    let planned = shared_core.core().conns[agent].planned.clone();
    planned.notified().await;
    let heartbeat_timeout = shared_core.core().conns[agent].heartbeat_timeout;
    if heartbeat_timeout.is_zero() {
        std::future::pending::<()>().await;
    }
    let mut heartbeat: Option<Heartbeat> = None;
    loop {
        sleep(heartbeat_timeout / 16).await;
        let mut core = shared_core.core();
        if core.conns[agent].last_received.is_none() {
            continue;
        }
        // Bytes that arrived while this process was stopped count.
        core.read(agent);
        let now = began.elapsed();
        let heartbeat = heartbeat.get_or_insert_with(|| Heartbeat::new(heartbeat_timeout, now));
        if let Some(last_received) = core.conns[agent].last_received {
            heartbeat.record_received(last_received.saturating_duration_since(began));
        }
        if heartbeat.is_silent(now) {
            let seconds = heartbeat_timeout.as_secs_f64();
            return io::Error::other(format!("nothing was heard from it for {seconds} seconds"));
        }
        if heartbeat.send_due(now) {
            let _ = core.scheduler.send_control(agent, &ToAgent::Alive);
            core.pump();
        }
    }
}

/// Reads once. `None`: nothing is available.
fn read(stream: &UnixStream, received: &mut BytesMut) -> io::Result<Option<usize>> {
    received.reserve(16 * 1024);
    match stream.try_read_buf(received) {
        Ok(n) => Ok(Some(n)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // The agent was killed before it read all that the head had sent.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some(0)),
        Err(error) => Err(error),
    }
}

/// Proves to an agent that has waited for its head that this head has the key of the cluster. Returns what the agent
/// has sent after its verdict. `None`: it ended first.
async fn prove(
    proof: &Proof<'_>,
    stream: &UnixStream,
    hello: &Hello,
) -> io::Result<Option<BytesMut>> {
    let mut preamble = proof.relayed.then(Preamble::default);
    let introduction = Introduction::new(noise::random()?, &hello.hostname, "");
    let key = noise::Key::new(proof.key.0);
    let (mut dialer, mut out) =
        noise::Dialer::start(&key, linger::CLUSTER, &introduction).map_err(io::Error::other)?;
    loop {
        while !out.is_empty() {
            stream.writable().await?;
            match stream.try_write(&out) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => out.clear(),
                Ok(n) => drop(out.drain(..n)),
            }
        }
        stream.readable().await?;
        let mut fresh = BytesMut::new();
        match read(stream, &mut fresh)? {
            None => continue,
            Some(0) => return Ok(None),
            Some(_) => {}
        }
        if let Some(open) = &mut preamble {
            match open.feed(&fresh) {
                PreambleState::Incomplete => continue,
                PreambleState::NotOurs => {
                    return Err(io::Error::other("what was started prints without end"));
                }
                PreambleState::Open(rest) => {
                    fresh = BytesMut::from(&rest[..]);
                    preamble = None;
                }
            }
        }
        match dialer.feed(&fresh, &mut out).map_err(io::Error::other)? {
            None => {}
            Some(Verdict::Accepted) => break,
            Some(Verdict::NotNeeded(reason)) => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, reason));
            }
            Some(Verdict::Refused(reason)) => return Err(io::Error::other(reason)),
        }
    }
    // The stream goes on without encryption: see `agent::linger`.
    let (_, received) = dialer.finish().map_err(io::Error::other)?;
    Ok(Some(BytesMut::from(&received[..])))
}

/// Asks an agent that has greeted to end, and waits until it has.
async fn end_agent(stream: &UnixStream) -> io::Result<()> {
    let stop = control::encode(&ToAgent::Stop).map_err(io::Error::other)?;
    let mut out = OutBuf::default();
    out.push(&stop);
    while !out.is_empty() {
        stream.writable().await?;
        match out.write_with(|slices| stream.try_write_vectored(slices)) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
    let mut ignored = BytesMut::new();
    loop {
        stream.readable().await?;
        if read(stream, &mut ignored)? == Some(0) {
            return Ok(());
        }
        ignored.clear();
    }
}

/// Sends magic and hello, skips what a shell printed, and checks the agent's hello.
/// `None`: it ended first.
async fn greet(
    shared_core: &SharedCore,
    agent: usize,
    hello: &Hello,
    (stream, proof, missed): (&UnixStream, Option<Proof<'_>>, bool),
    greeting: &mut Greeting,
) -> io::Result<Option<BytesMut>> {
    let mut fresh = BytesMut::new();
    if let Some(proof) = &proof {
        match prove(proof, stream, hello).await? {
            Some(received) => fresh = received,
            None => return Ok(None),
        }
    }
    let ours = control::encode(&ToAgent::Hello(hello.clone())).map_err(io::Error::other)?;
    let mut out = OutBuf::default();
    out.push_bytes(MAGIC);
    out.push(&ours);
    while !out.is_empty() {
        stream.writable().await?;
        match out.write_with(|slices| stream.try_write_vectored(slices)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The agent may have ended at once; its output is worth more than this error.
            Err(_) => break,
            Ok(_) => {}
        }
    }
    loop {
        if fresh.is_empty() {
            stream.readable().await?;
            match read(stream, &mut fresh)? {
                None => continue,
                Some(0) => return Ok(None),
                Some(_) => {}
            }
        }
        if let Some(theirs) = greeting.feed(&fresh.split()).map_err(io::Error::other)? {
            hello.check(&theirs).map_err(io::Error::other)?;
            if missed {
                let _ = timeout(STOP_TIMEOUT, end_agent(stream)).await;
                return Err(io::Error::other(MISSED));
            }
            info!(
                agent = agent + 1,
                pid = theirs.pid,
                r_version = theirs.r_version,
                "agent greeted"
            );
            shared_core.core().inbox.greeted(agent, theirs);
            return Ok(Some(greeting.take_rest()));
        }
    }
}
