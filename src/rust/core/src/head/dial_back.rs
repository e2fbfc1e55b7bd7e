//! Agents that dial back: the head's listener, and what is known of strangers.
//!
//! A connection belongs to nobody until it has shown that it holds a launcher's key. Until then it is a
//! stranger: it costs a descriptor, a buffer of at most [`MAX_UNAUTHENTICATED`] bytes and [`STRANGER_TIMEOUT`].
//! There are at most [`MAX_STRANGERS`] of them. If there are more, the oldest is closed once it is [`MIN_AGE`]
//! old, and the others wait in the system's queue: a real agent needs a few milliseconds and comes through.

use crate::agent::linger::{CLUSTER, redial::HAS_ANOTHER};
use crate::head::hub::{Core, SharedCore};
use crate::platform::{signals, socket};
use crate::protocol::control::Facts;
use crate::protocol::noise::{
    Dialled, Introduction, Key, Listener, MAX_UNAUTHENTICATED, Transport, Verdict,
};
use crate::relay;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

/// The most connections that have not been authenticated.
const MAX_STRANGERS: usize = 64;
/// How long a connection may take to authenticate.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection younger than this is not closed in favour of another.
const MIN_AGE: Duration = Duration::from_secs(1);
/// The pause after an accept that has failed, for example because no descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often a free port is looked for that all addresses have.
const PORT_ATTEMPTS: usize = 20;

/// Stands for the address of an agent whose connection a gateway has passed on to a Unix socket.
pub const NO_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

/// A bound socket on which agents are accepted.
#[derive(Debug)]
pub enum Bound {
    /// For agents that reach this machine.
    Tcp(TcpListener),
    /// For agents whose connections a gateway passes on.
    Unix(UnixListener),
}

/// A bound socket in the hub's event loop.
enum Accepting {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Accepting {
    fn new(bound: Bound) -> io::Result<Accepting> {
        Ok(match bound {
            Bound::Tcp(listener) => Accepting::Tcp(tokio::net::TcpListener::from_std(listener)?),
            Bound::Unix(listener) => Accepting::Unix(tokio::net::UnixListener::from_std(listener)?),
        })
    }

    /// Accepts a connection. A Unix socket is served as a TCP socket without an address: it is read, written and shut
    /// down in the same way.
    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        match self {
            Accepting::Tcp(listener) => listener.accept().await,
            Accepting::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let descriptor = OwnedFd::from(stream.into_std()?);
                let stream = TcpStream::from_std(std::net::TcpStream::from(descriptor))?;
                Ok((stream, NO_ADDRESS))
            }
        }
    }
}

/// A dialled agent that was given a slot.
pub struct Connection {
    tcp: std::net::TcpStream,
    transport: Transport,
    /// The address of the other side; [`NO_ADDRESS`] if the connection came through a gateway.
    pub peer: SocketAddr,
    /// What the agent said of itself.
    pub introduction: Introduction,
}

struct Waiting {
    launcher: u32,
    /// The name of an agent that has workers, and looks for a head.
    name: Option<String>,
    agent: usize,
    slot: oneshot::Sender<Connection>,
}

/// How many connections came to what end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Agents that were given a slot.
    pub accepted: u64,
    /// Agents that held the key and were refused.
    pub refused: u64,
    /// Connections that sent something else than an agent with a key does.
    pub not_authentic: u64,
    /// Connections that were closed before they had sent enough.
    pub ended_early: u64,
    /// Connections that took too long, or were closed because there were too many of them.
    pub too_slow: u64,
    /// Connections that could not be accepted.
    pub accept_errors: u64,
}

/// The state of the listener.
#[derive(Default)]
pub struct DialBack {
    waiting: VecDeque<Waiting>,
    /// The hosts that are given an agent first.
    preferred: Vec<usize>,
    keys: Arc<[(u32, Key)]>,
    /// The key of the cluster, with which agents introduce themselves that have lost their head.
    cluster_key: Option<Key>,
    /// The bound addresses.
    addresses: Vec<SocketAddr>,
    /// The number of Unix sockets for gateways.
    sockets: usize,
    to_thread: Option<mpsc::UnboundedSender<Vec<Bound>>>,
    /// See [`Counts`].
    pub counts: Counts,
}

impl DialBack {
    /// Waits for an agent of this launcher. Agents are given to hosts in the order of these calls.
    pub fn wait(&mut self, launcher: u32, agent: usize) -> oneshot::Receiver<Connection> {
        self.await_dialler(launcher, None, agent)
    }

    /// Waits for the agent of this name, which has workers and has lost its head.
    pub fn wait_for(&mut self, name: &str, agent: usize) -> oneshot::Receiver<Connection> {
        self.await_dialler(CLUSTER, Some(name.to_owned()), agent)
    }

    fn await_dialler(
        &mut self,
        launcher: u32,
        name: Option<String>,
        agent: usize,
    ) -> oneshot::Receiver<Connection> {
        let (slot, connection) = oneshot::channel();
        self.waiting.retain(|waiting| !waiting.slot.is_closed());
        self.waiting.push_back(Waiting {
            launcher,
            name,
            agent,
            slot,
        });
        connection
    }

    /// Agents are given to these hosts before others.
    pub fn prefer(&mut self, agents: &[usize]) {
        self.preferred = agents.to_vec();
    }

    fn take(&mut self, launcher: u32, name: Option<&str>) -> Option<Waiting> {
        self.waiting.retain(|waiting| !waiting.slot.is_closed());
        let of =
            |waiting: &Waiting| waiting.launcher == launcher && waiting.name.as_deref() == name;
        let preferred = |w: &Waiting| of(w) && self.preferred.contains(&w.agent);
        let at = self.waiting.iter().position(preferred);
        let at = at.or_else(|| self.waiting.iter().position(of))?;
        self.waiting.remove(at)
    }

    /// The end of the channel by which the hub's thread receives listeners.
    pub fn open(&mut self) -> mpsc::UnboundedReceiver<Vec<Bound>> {
        let (to_thread, listeners) = mpsc::unbounded_channel();
        self.to_thread = Some(to_thread);
        listeners
    }

    /// Sets the keys of all launchers, and listens on these addresses, too. Returns the port.
    ///
    /// # Errors
    /// When no port of the range is free at all addresses.
    pub fn listen(
        &mut self,
        addresses: &[IpAddr],
        ports: &RangeInclusive<u16>,
        keys: Vec<(u32, Key)>,
    ) -> io::Result<u16> {
        let cluster = self.cluster_key.iter().map(|key| (CLUSTER, key.clone()));
        self.keys = keys.into_iter().chain(cluster).collect();
        if addresses.is_empty() {
            return Ok(self.addresses.first().map_or(0, SocketAddr::port));
        }
        let (port, listeners) = bind(addresses, ports)?;
        let bound = listeners
            .iter()
            .filter_map(|listener| listener.local_addr().ok());
        self.addresses.extend(bound);
        info!(port, ?addresses, "listening for agents");
        self.hand_over(listeners.into_iter().map(Bound::Tcp).collect())?;
        Ok(port)
    }

    /// Sets the key of the cluster. Agents with that key are heard from the next [`DialBack::listen`] on.
    pub fn set_cluster_key(&mut self, key: Key) {
        self.cluster_key = Some(key);
    }

    /// Listens on a Unix socket at `path`, too, for the connections that a gateway passes on. The directory of the
    /// path decides who can connect.
    ///
    /// # Errors
    /// When the socket cannot be made there.
    pub fn listen_unix(&mut self, path: &Path) -> io::Result<()> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        self.hand_over(vec![Bound::Unix(listener)])?;
        self.sockets += 1;
        info!("listening for agents behind a gateway");
        Ok(())
    }

    /// Gives listeners to the hub's thread.
    fn hand_over(&self, listeners: Vec<Bound>) -> io::Result<()> {
        match self.to_thread.as_ref().map(|to| to.send(listeners)) {
            Some(Ok(())) => Ok(()),
            _ => Err(io::Error::other("the cluster has been stopped")),
        }
    }

    /// Adds the facts to a bug report.
    pub fn facts(&self, facts: &mut Facts) {
        if self.addresses.is_empty() && self.sockets == 0 {
            return;
        }
        facts.add("sockets_of_gateways", self.sockets);
        let addresses: Vec<String> = self.addresses.iter().map(SocketAddr::to_string).collect();
        facts.add("listens_on", addresses.join(" "));
        facts.add("waiting_for_agents", self.waiting.len());
        facts.add("dialled_accepted", self.counts.accepted);
        facts.add("dialled_refused", self.counts.refused);
        facts.add("strangers_not_authentic", self.counts.not_authentic);
        facts.add("strangers_ended_early", self.counts.ended_early);
        facts.add("strangers_too_slow", self.counts.too_slow);
        facts.add("accept_errors", self.counts.accept_errors);
    }
}

/// Binds one port at all addresses.
fn bind(addresses: &[IpAddr], ports: &RangeInclusive<u16>) -> io::Result<(u16, Vec<TcpListener>)> {
    let bind_all = |port: u16| -> io::Result<(u16, Vec<TcpListener>)> {
        let mut listeners: Vec<TcpListener> = Vec::new();
        let mut port = port;
        for &address in addresses {
            let listener = TcpListener::bind(SocketAddr::new(address, port))?;
            listener.set_nonblocking(true)?;
            port = listener.local_addr()?.port();
            listeners.push(listener);
        }
        Ok((port, listeners))
    };
    let any = *ports.start() == 0;
    let attempts: Box<dyn Iterator<Item = u16>> = match any {
        true => Box::new(std::iter::repeat_n(0, PORT_ATTEMPTS)),
        false => Box::new(ports.clone()),
    };
    let mut last = io::Error::from(io::ErrorKind::InvalidInput);
    for port in attempts {
        match bind_all(port) {
            Ok(bound) => return Ok(bound),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            // Such a port is not free for this user.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !any => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// The connections that have not been authenticated, by age.
#[derive(Default)]
struct Strangers {
    open: VecDeque<(u64, Instant, Rc<Notify>)>,
    next: u64,
}

/// Serves the listeners that arrive on the channel until it is dropped.
pub async fn serve(
    shared_core: Arc<SharedCore>,
    mut listeners: mpsc::UnboundedReceiver<Vec<Bound>>,
) {
    let strangers = Rc::new(RefCell::new(Strangers::default()));
    let mut tasks = tokio::task::JoinSet::new();
    while let Some(new) = listeners.recv().await {
        for listener in new {
            match Accepting::new(listener) {
                Ok(listener) => {
                    let accepting = accept_all(shared_core.clone(), listener, strangers.clone());
                    tasks.spawn_local(accepting);
                }
                Err(error) => warn!(%error, "listener failed"),
            }
        }
    }
}

async fn accept_all(
    shared_core: Arc<SharedCore>,
    listener: Accepting,
    strangers: Rc<RefCell<Strangers>>,
) {
    // Dropped with this task: the connections end with the listener.
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        make_room(&strangers).await;
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                shared_core.core().dial_back.counts.accept_errors += 1;
                debug!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let closed = Rc::new(Notify::new());
        let id = {
            let mut strangers = strangers.borrow_mut();
            strangers.next += 1;
            let id = strangers.next;
            strangers
                .open
                .push_back((id, Instant::now(), closed.clone()));
            id
        };
        let (shared_core, strangers) = (shared_core.clone(), strangers.clone());
        tasks.spawn_local(async move {
            let authenticated = tokio::select! {
                known = timeout(STRANGER_TIMEOUT, authenticate(&shared_core, tcp)) => known.ok(),
                () = closed.notified() => None,
            };
            strangers
                .borrow_mut()
                .open
                .retain(|stranger| stranger.0 != id);
            match authenticated {
                Some(Ok((tcp, noise, dialled))) => {
                    admit(&shared_core, tcp, noise, dialled, peer).await;
                }
                Some(Err(end)) => {
                    debug!(%peer, ?end, "a stranger was refused");
                    let counts = &mut shared_core.core().dial_back.counts;
                    match end {
                        End::NotAuthentic => counts.not_authentic += 1,
                        End::Early => counts.ended_early += 1,
                    }
                }
                None => shared_core.core().dial_back.counts.too_slow += 1,
            }
        });
    }
}

/// Waits until there is room for one more stranger, if need be by closing the oldest.
async fn make_room(strangers: &RefCell<Strangers>) {
    loop {
        let age = {
            let mut strangers = strangers.borrow_mut();
            if strangers.open.len() < MAX_STRANGERS {
                return;
            }
            let Some((_, since, closed)) = strangers.open.front() else {
                return;
            };
            let age = since.elapsed();
            if age >= MIN_AGE {
                closed.notify_one();
                strangers.open.pop_front();
                return;
            }
            age
        };
        // Others may leave before.
        sleep((MIN_AGE.saturating_sub(age)).min(Duration::from_millis(20))).await;
    }
}

#[derive(Debug)]
enum End {
    NotAuthentic,
    Early,
}

async fn authenticate(
    shared_core: &SharedCore,
    tcp: TcpStream,
) -> Result<(TcpStream, Listener, Dialled), End> {
    let _ = tcp.set_nodelay(true);
    let keys = shared_core.core().dial_back.keys.clone();
    let mut noise = Listener::new(keys);
    let mut buffer = [0; 512];
    const _: () = assert!(512 < MAX_UNAUTHENTICATED);
    loop {
        tcp.readable().await.map_err(|_| End::Early)?;
        let n = match tcp.try_read(&mut buffer) {
            Ok(0) => return Err(End::Early),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return Err(End::Early),
        };
        let mut out = Vec::new();
        let dialled = noise.feed(&buffer[..n], &mut out);
        let dialled = dialled.map_err(|_| End::NotAuthentic)?;
        write_all(&tcp, &out).await.map_err(|_| End::Early)?;
        if let Some(dialled) = dialled {
            return Ok((tcp, noise, dialled));
        }
    }
}

async fn write_all(tcp: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        tcp.writable().await?;
        match tcp.try_write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Gives an authenticated agent a slot, or tells it why there is none.
async fn admit(
    shared_core: &SharedCore,
    tcp: TcpStream,
    noise: Listener,
    dialled: Dialled,
    peer: SocketAddr,
) {
    let Dialled {
        launcher,
        introduction,
    } = dialled;
    let problem = introduction.problem();
    let (name, pid) = match introduction.lingers.rsplit_once(' ') {
        Some((name, pid)) if launcher == CLUSTER => (Some(name), pid.parse::<u32>().ok()),
        _ => (None, None),
    };
    let waiting = match &problem {
        Some(_) => None,
        None => shared_core.core().dial_back.take(launcher, name),
    };
    let verdict = match (problem, &waiting) {
        (Some(problem), _) => Verdict::Refused(problem),
        (None, Some(_)) => Verdict::Accepted,
        (None, None) if launcher == CLUSTER => {
            let host = name.and_then(host_of);
            let verdict = host.map(|agent| shared_core.core().refuse_lingering(agent, pid));
            verdict.unwrap_or_else(|| Verdict::Refused("the cluster has no such agent".to_owned()))
        }
        (None, None) => Verdict::NotNeeded(
            "the cluster has no free slot for this agent: it has as many as it asked for, or was \
             stopped"
                .to_owned(),
        ),
    };
    let (node, job) = (introduction.hostname.clone(), introduction.job.clone());
    // Before the agent knows it.
    if waiting.is_none() {
        info!(launcher, %peer, node, job, ?verdict, "agent refused");
        shared_core.core().dial_back.counts.refused += 1;
    }
    let mut out = Vec::new();
    let given = async {
        let transport = noise.finish(&verdict, &mut out).map_err(io::Error::other)?;
        let written = timeout(STRANGER_TIMEOUT, write_all(&tcp, &out)).await;
        written.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let tcp = tcp.into_std()?;
        if peer != NO_ADDRESS {
            tcp.set_nodelay(true)?;
            socket::keep_alive(tcp.as_raw_fd())?;
        }
        Ok::<_, io::Error>((transport, tcp))
    };
    let given = given.await;
    let Some(waiting) = waiting else {
        return;
    };
    let mut core = shared_core.core();
    match given {
        Ok((transport, tcp)) => {
            info!(agent = waiting.agent + 1, launcher, %peer, node, job, "agent dialled");
            core.dial_back.counts.accepted += 1;
            // If the slot is not waited for any more, the connection ends here.
            let _ = waiting.slot.send(Connection {
                tcp,
                transport,
                peer,
                introduction,
            });
        }
        Err(error) => {
            debug!(%peer, %error, "an agent was lost before it had its slot");
            core.dial_back.counts.ended_early += 1;
            core.dial_back.waiting.push_front(waiting);
        }
    }
}

/// The index of the host of an agent, from the name of its directory, which ends with the number of the host.
fn host_of(name: &str) -> Option<usize> {
    let (_, number) = name.rsplit_once('-')?;
    number.parse::<usize>().ok()?.checked_sub(1)
}

impl Core {
    /// Tells an agent that has lost this head why it has no place here. If it was the agent of its host, that host is
    /// given up: this head has sent its tasks elsewhere, and the agent waits for another head.
    fn refuse_lingering(&mut self, agent: usize, pid: Option<u32>) -> Verdict {
        let Some(host) = self.inbox.hosts.get(agent) else {
            return Verdict::Refused("the cluster has no such host".to_owned());
        };
        let is_known = host.hello.as_ref().map(|hello| Some(hello.pid) == pid);
        if self.is_attached(agent) {
            // It may have noticed the end of the connection before this head.
            return match is_known {
                Some(false) => Verdict::Refused(HAS_ANOTHER.to_owned()),
                _ => Verdict::NotNeeded("the agent is connected".to_owned()),
            };
        }
        // The workers of this agent are of no use to any head: those of others have newer variables, or this host is
        // waited for, and its workers are made anew.
        if self.missed.contains(agent) || (is_known.is_none() && self.conns[agent].awaited) {
            return Verdict::Refused(HAS_ANOTHER.to_owned());
        }
        if is_known == Some(true) {
            let reason = "its connection has failed, and it waits for another session (`linger`)";
            self.give_up_host(agent, reason.to_owned(), false);
        }
        Verdict::NotNeeded("the session goes on without this host".to_owned())
    }
}

/// The relay of one connection, in a thread of its own.
pub struct Relay {
    tcp: std::net::TcpStream,
    ended: oneshot::Receiver<io::Result<()>>,
}

impl Connection {
    /// Starts the relay. Returns it with the head's end of the agent's stream.
    ///
    /// # Errors
    /// When the system has no thread or descriptor left.
    pub fn start(self) -> io::Result<(UnixStream, Relay)> {
        let Connection { tcp, transport, .. } = self;
        let (ours, theirs) = UnixStream::pair()?;
        let (on_end, ended) = oneshot::channel();
        let handle = tcp.try_clone()?;
        let body = move || {
            let result = relay::run(&tcp, &theirs, transport, &[]);
            let _ = on_end.send(result);
        };
        signals::with_all_blocked(|| {
            thread::Builder::new()
                .name("rustcluster-relay".into())
                .stack_size(256 * 1024)
                .spawn(body)
        })?;
        Ok((ours, Relay { tcp: handle, ended }))
    }
}

impl Relay {
    /// Waits until the connection has ended, for at most `max`, after which it is cut. Returns how it ended.
    pub async fn finish(mut self, max: Duration) -> String {
        let ended = match timeout(max, &mut self.ended).await {
            Ok(ended) => ended.ok(),
            Err(_) => {
                let _ = self.tcp.shutdown(Shutdown::Both);
                return "was cut, because the agent did not end it".to_owned();
            }
        };
        match ended {
            Some(Ok(())) => "was closed".to_owned(),
            Some(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                "ended without notice: the agent, its node or the network has failed".to_owned()
            }
            Some(Err(error)) => format!("failed: {error}"),
            None => "ended".to_owned(),
        }
    }
}
