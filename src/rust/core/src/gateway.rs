//! The gateway: a process on a login node that passes the connections of agents on to a head outside of the
//! cluster. The gateway has no key: what it copies was encrypted by the agent for the head, or the reverse.
//!
//! The head holds the gateway's stdin and writes a heartbeat there. When stdin ends, or is silent for too long,
//! the head is lost: the gateway cancels the jobs, closes all connections and ends.

use crate::platform::signals;
use crate::protocol::heartbeat::Heartbeat;
use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::LocalSet;
use tracing::{debug, info};

/// Bytes that are read at once. One buffer serves all connections.
const CHUNK: usize = 512 * 1024;

/// How long the gateway waits for the cancel script.
const MAX_CANCEL: Duration = Duration::from_secs(60);

/// How long the gateway waits before it accepts again when the system has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What a gateway does.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The socket that ssh forwards to the head.
    pub socket: PathBuf,
    /// The address to listen on.
    pub address: IpAddr,
    /// The range of ports to choose from. (0, 0): any free port.
    pub ports: (u16, u16),
    /// How long the head may be silent.
    pub heartbeat_timeout: Duration,
    /// The maximum number of connections at a time. More are closed at once.
    pub max_connections: usize,
    /// The script that `sh` runs when the head is lost.
    pub cancel: Option<PathBuf>,
    /// The gateway's own directory, which the gateway removes at its end. Its file `pids` lists the processes of
    /// the head's other sessions, which are ended with a head that is silent.
    pub directory: PathBuf,
}

/// Why a gateway has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The head has closed the gateway's stdin.
    Closed,
    /// The head was silent for longer than the heartbeat timeout.
    Silent,
}

/// Runs a gateway. The first line that it writes to `output` is `port` with the number; further lines are
/// heartbeats.
///
/// # Errors
/// When no port of the range is free.
pub fn run(
    settings: &Settings,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
) -> io::Result<End> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let signs = read_signs(input)?;
    let lines = write_lines(output)?;
    let local = LocalSet::new();
    let end = local.block_on(&runtime, serve(settings, signs, &lines));
    // This closes all connections.
    drop(local);
    drop(runtime);
    if let Ok(end) = end {
        info!(?end, "gateway ends");
        if let Some(script) = &settings.cancel {
            cancel(script);
        }
        if end == End::Silent {
            end_sessions(&settings.directory);
        }
    }
    remove_directory(&settings.directory);
    end
}

/// A sign of life of the head.
enum Sign {
    Heartbeat,
    End,
}

/// Reads stdin in a thread of its own.
fn read_signs(mut input: impl Read + Send + 'static) -> io::Result<UnboundedReceiver<Sign>> {
    let (sender, receiver) = unbounded_channel();
    let read = move || {
        let mut buffer = [0; 256];
        loop {
            let sign = match input.read(&mut buffer) {
                Ok(0) => Sign::End,
                Ok(_) => Sign::Heartbeat,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => Sign::End,
            };
            let ended = matches!(sign, Sign::End);
            if sender.send(sign).is_err() || ended {
                return;
            }
        }
    };
    spawn("rustcluster-in", read)?;
    Ok(receiver)
}

/// Writes lines in a thread of its own. A line is dropped if the output is blocked.
fn write_lines(mut output: impl Write + Send + 'static) -> io::Result<SyncSender<String>> {
    let (sender, receiver) = sync_channel::<String>(4);
    let write = move || {
        for line in receiver {
            if writeln!(output, "{line}")
                .and_then(|()| output.flush())
                .is_err()
            {
                return;
            }
        }
    };
    spawn("rustcluster-out", write)?;
    Ok(sender)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new()
        .name(name.to_owned())
        .stack_size(128 * 1024);
    signals::with_all_blocked(|| thread.spawn(run)).map(drop)
}

/// What all connections share.
struct Shared {
    /// The buffer for bytes that are written at once.
    chunk: RefCell<Vec<u8>>,
    /// Whether the head has sent something to an agent since the last check.
    heard: Cell<bool>,
    count: Cell<usize>,
    /// How long a connection may rest once one side has closed its end.
    linger: Duration,
}

impl Shared {
    fn new(linger: Duration) -> Rc<Shared> {
        Rc::new(Shared {
            chunk: RefCell::new(vec![0; CHUNK]),
            heard: Cell::new(false),
            count: Cell::new(0),
            linger,
        })
    }
}

async fn serve(
    settings: &Settings,
    mut signs: UnboundedReceiver<Sign>,
    lines: &SyncSender<String>,
) -> io::Result<End> {
    let listener = listen(settings.address, settings.ports)?;
    let port = listener.local_addr()?.port();
    // The channel is empty.
    let _ = lines.try_send(format!("port {port}"));
    info!(port, "gateway listens");
    let shared = Shared::new(settings.heartbeat_timeout);
    let began = Instant::now();
    let mut heartbeat = Heartbeat::new(settings.heartbeat_timeout, Duration::ZERO);
    loop {
        let next = tokio::time::Instant::from_std(began + heartbeat.next());
        tokio::select! {
            // Signs of life come first: this process may have been stopped for a while.
            biased;
            sign = signs.recv() => match sign {
                Some(Sign::Heartbeat) => heartbeat.record_received(began.elapsed()),
                Some(Sign::End) | None => return Ok(End::Closed),
            },
            () = tokio::time::sleep_until(next) => {
                // The thread that reads stdin may have been stopped with this one.
                if began.elapsed() > heartbeat.next() + settings.heartbeat_timeout / 4 {
                    tokio::time::sleep(settings.heartbeat_timeout / 8).await;
                }
                while let Ok(sign) = signs.try_recv() {
                    match sign {
                        Sign::Heartbeat => heartbeat.record_received(began.elapsed()),
                        Sign::End => return Ok(End::Closed),
                    }
                }
                if shared.heard.take() {
                    heartbeat.record_received(began.elapsed());
                }
                if heartbeat.send_due(began.elapsed()) {
                    let _ = lines.try_send("alive".to_owned());
                }
                if heartbeat.is_silent(began.elapsed()) {
                    return Ok(End::Silent);
                }
            },
            accepted = listener.accept() => match accepted {
                Ok((agent, peer)) => {
                    if shared.count.get() >= settings.max_connections {
                        debug!(%peer, "too many connections");
                        continue;
                    }
                    debug!(%peer, "connection accepted");
                    shared.count.set(shared.count.get() + 1);
                    let (shared, socket) = (shared.clone(), settings.socket.clone());
                    tokio::task::spawn_local(async move {
                        if let Err(error) = pass_on(agent, &socket, &shared).await {
                            debug!(%peer, %error, "connection failed");
                        }
                        shared.count.set(shared.count.get() - 1);
                    });
                }
                // The peer has gone, or there are no descriptors left.
                Err(error) => {
                    debug!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// Listens on the first free port of the range.
fn listen(address: IpAddr, (from, to): (u16, u16)) -> io::Result<TcpListener> {
    let mut failure = None;
    for port in from..=to {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.set_reuseaddr(true)?;
        match socket
            .bind((address, port).into())
            .and_then(|()| socket.listen(1024))
        {
            Ok(listener) => return Ok(listener),
            Err(error) => failure = Some(error),
        }
    }
    let why = failure.map_or_else(
        || "the range is empty".to_owned(),
        |error| error.to_string(),
    );
    let ports = if from == to {
        format!("port {from}")
    } else {
        format!("any port from {from} to {to}")
    };
    Err(io::Error::other(format!(
        "cannot listen on {address}, {ports}: {why}"
    )))
}

/// Copies between an agent and the head, until both have closed their ends.
async fn pass_on(agent: TcpStream, socket: &Path, shared: &Shared) -> io::Result<()> {
    agent.set_nodelay(true)?;
    let head = UnixStream::connect(socket).await?;
    let (agent_reader, agent_writer) = agent.into_split();
    let (head_reader, head_writer) = head.into_split();
    let moved = Notify::new();
    let upwards = copy(agent_reader, head_writer, shared, &moved, false);
    let downwards = copy(head_reader, agent_writer, shared, &moved, true);
    tokio::pin!(upwards, downwards);
    // A failure ends the connection. After the end of one side the other may go on, but not rest for long: it may
    // never end.
    tokio::select! {
        ended = &mut upwards => {
            ended?;
            unless_idle(downwards, &moved, shared.linger).await
        }
        ended = &mut downwards => {
            ended?;
            unless_idle(upwards, &moved, shared.linger).await
        }
    }
}

/// Waits for `copying`, while bytes move.
async fn unless_idle(
    mut copying: impl Future<Output = io::Result<()>> + Unpin,
    moved: &Notify,
    limit: Duration,
) -> io::Result<()> {
    loop {
        let idle = tokio::time::sleep(limit);
        tokio::select! {
            ended = &mut copying => return ended,
            () = moved.notified() => {}
            () = idle => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// One end of a connection, from which the gateway reads.
trait Source {
    async fn readable(&self) -> io::Result<()>;
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// One end of a connection, to which the gateway writes. Dropping it ends the stream.
trait Sink {
    async fn writable(&self) -> io::Result<()>;
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;
}

macro_rules! ends {
    ($reader:ty, $writer:ty) => {
        impl Source for $reader {
            async fn readable(&self) -> io::Result<()> {
                <$reader>::readable(self).await
            }
            fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
                <$reader>::try_read(self, buffer)
            }
        }
        impl Sink for $writer {
            async fn writable(&self) -> io::Result<()> {
                <$writer>::writable(self).await
            }
            fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
                <$writer>::try_write(self, bytes)
            }
        }
    };
}

ends!(
    tokio::net::tcp::OwnedReadHalf,
    tokio::net::tcp::OwnedWriteHalf
);
ends!(
    tokio::net::unix::OwnedReadHalf,
    tokio::net::unix::OwnedWriteHalf
);

/// Copies one direction until its end, and passes the end on. Only what the receiver does not take at once needs a
/// buffer of its own.
async fn copy(
    from: impl Source,
    to: impl Sink,
    shared: &Shared,
    moved: &Notify,
    from_head: bool,
) -> io::Result<()> {
    loop {
        from.readable().await?;
        let rest = {
            let mut chunk = shared.chunk.borrow_mut();
            let n = match from.try_read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            let mut left = chunk.get(..n).unwrap_or_default();
            while !left.is_empty() {
                match to.try_write(left) {
                    Ok(written) => left = left.get(written..).unwrap_or_default(),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            left.to_vec()
        };
        if from_head {
            shared.heard.set(true);
        }
        moved.notify_one();
        let mut rest = rest.as_slice();
        while !rest.is_empty() {
            to.writable().await?;
            match to.try_write(rest) {
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    moved.notify_one();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Runs the cancel script, and kills it if it takes too long.
fn cancel(script: &Path) {
    let null = Stdio::null;
    let started = Command::new("sh")
        .arg(script)
        .stdin(null())
        .stdout(null())
        .stderr(null())
        .spawn();
    let Ok(mut child) = started else { return };
    let deadline = Instant::now() + MAX_CANCEL;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Ends the head's other sessions, whose stdin a dead link leaves open. A pid may belong to another process by now:
/// the command of each session names the directory.
fn end_sessions(directory: &Path) {
    let listed = fs::read_to_string(directory.join("pids")).unwrap_or_default();
    for pid in listed
        .lines()
        .filter_map(|line| line.trim().parse::<i32>().ok())
    {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let named = String::from_utf8_lossy(&command).contains(&*directory.to_string_lossy());
        if named && pid > 1 && pid.unsigned_abs() != std::process::id() {
            let _ = signals::kill(pid, libc::SIGTERM);
        }
    }
}

fn remove_directory(directory: &Path) {
    // A path that is not absolute would be a mistake, and remove what is not ours.
    if directory.is_absolute() && directory.parent().is_some() {
        let _ = fs::remove_dir_all(directory);
    }
}

#[cfg(test)]
mod tests;
