//! Agents that dial back to a real hub, and strangers that dial, too.
//!
//! The agents are this test's own executable; their workers return the messages that they receive.

#![allow(
    clippy::exit,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic fails the test"
)]

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use rustcluster_core::agent::{Role, dial, startup};
use rustcluster_core::gateway;
use rustcluster_core::head::hub::{Answer, Hub, Plan, Turn};
use rustcluster_core::head::launch::{Launch, Lingering, Source};
use rustcluster_core::protocol::control::{Hello, Linger, Outfile, Secret, Start, StartMode};
use rustcluster_core::protocol::ids::Rank;
use rustcluster_core::protocol::noise::{Dialer, Introduction, Key, OPENING, Verdict};
use rustcluster_core::worker::channel::Channel;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Against waiting for ever; not what is tested.
const PATIENCE: Duration = Duration::from_secs(60);
const SLICE: Duration = Duration::from_millis(50);
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const AS_AGENT: &str = "RUSTCLUSTER_TEST_DIALS_BACK";

fn hello() -> Hello {
    startup::hello("0.1.0", "4.2.2", "test")
}

fn key(byte: u8) -> Key {
    Key::new([byte; 32])
}

fn keys() -> Vec<(u32, Key)> {
    vec![(1, key(1)), (2, key(2))]
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// No test: see [`Agent`].
#[test]
fn is_an_agent_when_it_is_asked_to_be() {
    let Some(path) = std::env::var_os(AS_AGENT) else {
        return;
    };
    dial::remember();
    if let Err(status) = dial::dial(PathBuf::from(path).as_path()) {
        std::process::exit(status.into());
    }
    let served = startup::greet(&hello())
        .and_then(startup::Greeted::agent)
        .and_then(|mut agent| agent.run());
    match served {
        Ok(Role::Worker(channel)) => std::process::exit(answer(*channel)),
        Ok(Role::Done) => std::process::exit(0),
        Err(_) => std::process::exit(1),
    }
}

/// A worker: each answer is the task.
fn answer(mut channel: Channel) -> i32 {
    let mut served = channel.ready(String::new(), true);
    while served.is_ok() {
        match channel.next_task() {
            Ok(Some(task)) => {
                let bytes: Vec<u8> = task.body.chunks.into_iter().flatten().collect();
                channel.restart();
                served = channel.send(&bytes, true);
            }
            Ok(None) => return 0,
            Err(error) => served = Err(error),
        }
    }
    1
}

/// An agent that dials back, and the file that it reads.
struct Agent {
    child: Child,
    path: PathBuf,
}

impl Agent {
    fn start(port: u16, launcher: u32, key: u8) -> Agent {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rustcluster-dial-back-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .unwrap();
        let hex = format!("{key:02x}").repeat(32);
        let text = format!("address 127.0.0.1 {port}\nlauncher {launcher}\nkey {hex}\n");
        file.write_all(text.as_bytes()).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "is_an_agent_when_it_is_asked_to_be",
                "--exact",
                "--nocapture",
            ])
            .env(AS_AGENT, &path)
            .env(dial::JOB_NAME, "4711_3")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Agent { child, path }
    }

    /// Waits for its end. Returns its status and what it wrote to its stderr.
    fn end(mut self) -> (Option<i32>, String) {
        let mut text = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut text).unwrap();
        let status = self.child.wait().unwrap().code();
        (status, text)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "agent {}", self.child.id())
    }
}

fn plan(rank: Rank) -> Option<Plan> {
    let start = Start {
        workers: 1,
        ranks: vec![rank],
        mode: StartMode::Fork,
        packages: Vec::new(),
        outfile: Outfile::Discard,
        renice: 0,
        spawn_command: Vec::new(),
        heartbeat_timeout: 20_000,
        chunk_cache_bytes: 0,
        state: 1 << 20,
        setup: 0,
        memory_limit: 0,
        stop_timeout: 600,
        local: false,
        linger: None,
    };
    let ranks = vec![rank];
    Some(Plan { start, ranks })
}

/// A hub that waits for one agent of each of these launchers, and its port.
fn hub(launchers: &[u32]) -> (Hub, u16) {
    let launch = |&launcher: &u32| Launch {
        host: format!("slot of {launcher}"),
        source: Source::DialBack {
            launcher,
            lingers: None,
        },
    };
    let hub = Hub::start(launchers.iter().map(launch).collect(), hello(), 1 << 20).unwrap();
    let port = hub.listen(&[LOCALHOST], &(0..=0), keys()).unwrap();
    (hub, port)
}

fn go(hub: &mut Hub, hosts: u32) {
    eventually("all have greeted", || hub.greeted(SLICE));
    for host in hub.hosts() {
        assert_eq!(host.failure, None);
    }
    hub.go((0..hosts).map(plan).collect()).unwrap();
}

fn expect_answers(hub: &mut Hub, rank: Rank, bytes: &[u8]) {
    hub.begin(rank, u64::from(rank) + 1, None, Turn::Last, |_| None)
        .unwrap();
    hub.write(bytes);
    hub.finish();
    let began = Instant::now();
    loop {
        match hub.receive(rank, SLICE) {
            Answer::Pending => assert!(began.elapsed() < PATIENCE, "no answer of {rank}"),
            Answer::Ready { body, .. } => {
                let got: Vec<u8> = body.chunks.into_iter().flatten().collect();
                assert!(got == bytes);
                return;
            }
            answer => panic!("{answer:?}"),
        }
    }
}

fn close(mut hub: Hub) {
    hub.stop();
    eventually("the cluster's end", || hub.is_closed(SLICE));
}

fn fact(hub: &Hub, name: &str) -> u64 {
    let dump = hub.dump(u64::MAX, Duration::ZERO, true).unwrap();
    let found = dump.cluster.0.iter().find(|(fact, _)| fact == name);
    found.map_or(0, |(_, value)| value.parse().unwrap())
}

fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(17).fill_bytes(&mut bytes);
    bytes
}

#[test]
fn agents_of_two_launchers_get_the_slots_of_theirs_and_end_with_the_cluster() {
    let (mut hub, port) = hub(&[1, 2]);
    let agents = [(2, 2), (1, 1)].map(|(launcher, key)| Agent::start(port, launcher, key));
    go(&mut hub, 2);
    let hosts = hub.hosts();
    for host in &hosts {
        assert_eq!(host.job.as_deref(), Some("4711_3"));
        assert_eq!(
            host.node,
            host.hello.as_ref().map(|hello| hello.hostname.clone())
        );
        assert_eq!(host.peer.unwrap().ip(), LOCALHOST);
    }
    let pids: Vec<u32> = agents.iter().map(|agent| agent.child.id()).collect();
    let greeted: Vec<u32> = hosts
        .iter()
        .filter_map(|host| Some(host.hello.as_ref()?.pid))
        .collect();
    assert_eq!(greeted, [pids[1], pids[0]]);
    for rank in 0..2 {
        for len in [1, 70_000, 5_000_000] {
            expect_answers(&mut hub, rank, &random(len));
        }
    }
    // There is no third slot.
    let (status, text) = Agent::start(port, 1, 1).end();
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("no free slot"), "{text}");
    assert_eq!(fact(&hub, "dialled_accepted"), 2);
    assert_eq!(fact(&hub, "dialled_refused"), 1);
    close(hub);
    for agent in agents {
        let (status, text) = agent.end();
        assert_eq!(status, Some(0), "{text}");
    }
}

#[test]
fn a_killed_agent_is_lost_at_once_and_the_others_stay() {
    let (mut hub, port) = hub(&[1, 1]);
    let mut agents = vec![Agent::start(port, 1, 1), Agent::start(port, 1, 1)];
    go(&mut hub, 2);
    let killed = hub.hosts()[0].hello.as_ref().unwrap().pid;
    let at = agents
        .iter()
        .position(|agent| agent.child.id() == killed)
        .unwrap();
    agents.remove(at).child.kill().unwrap();
    eventually("the loss", || hub.hosts()[0].failure.is_some());
    let reason = hub.hosts()[0].failure.clone().unwrap().reason;
    assert!(reason.contains("connection was closed"), "{reason}");
    expect_answers(&mut hub, 1, b"still there");
    close(hub);
}

/// A hub that waits for the agent of this name, which has lost its head. `byte`: of the key of the cluster.
fn hub_again(name: &str, port: u16, byte: u8) -> Hub {
    let launch = Launch {
        host: "slot".to_owned(),
        source: Source::DialBack {
            launcher: 1,
            lingers: Some(Lingering {
                name: name.to_owned(),
                missed: false,
            }),
        },
    };
    let mut hub = Hub::start(vec![launch], hello(), 1 << 20).unwrap();
    hub.follow(1);
    hub.set_cluster_key(key(byte));
    hub.listen(&[LOCALHOST], &(port..=port), Vec::new())
        .unwrap();
    hub
}

#[test]
fn an_agent_that_has_lost_its_head_is_accepted_by_a_head_with_the_key_alone() {
    let name = format!("rustcluster-again-{}-1", std::process::id());
    let (mut hub, port) = hub(&[1]);
    let agent = Agent::start(port, 1, 1);
    eventually("it has greeted", || hub.greeted(SLICE));
    let lingering = |generation| {
        let mut plan = plan(0).unwrap();
        plan.start.linger = Some(Linger {
            milliseconds: 60_000,
            name: name.clone(),
            key: Secret([7; 32]),
            generation,
            addresses: vec![("127.0.0.1".to_owned(), port)],
        });
        vec![Some(plan)]
    };
    hub.go(lingering(0)).unwrap();
    expect_answers(&mut hub, 0, b"before");
    let pid = hub.worker(0).pid;
    hub.leave();
    eventually("the head has left", || hub.is_closed(SLICE));
    drop(hub);
    let other_key = hub_again(&name, port, 8);
    eventually("an agent with another key is refused", || {
        fact(&other_key, "strangers_not_authentic") > 1
    });
    assert!(other_key.hosts()[0].hello.is_none());
    close(other_key);
    let other_name = hub_again("rustcluster-other-1", port, 7);
    eventually("an agent of another name is refused", || {
        fact(&other_name, "dialled_refused") > 1
    });
    assert!(other_name.hosts()[0].hello.is_none());
    close(other_name);
    let mut hub = hub_again(&name, port, 7);
    eventually("it has greeted again", || hub.greeted(SLICE));
    hub.go(lingering(1)).unwrap();
    expect_answers(&mut hub, 0, &random(5_000_000));
    assert_eq!(hub.worker(0).pid, pid);
    assert_eq!(hub.hosts()[0].job.as_deref(), Some("4711_3"));
    close(hub);
    let (status, text) = agent.end();
    assert_eq!(status, Some(0), "{text}");
}

/// A gateway that passes connections on to a socket in its directory.
struct Gateway {
    port: u16,
    /// The gateway ends with it.
    input: UnixStream,
    thread: thread::JoinHandle<std::io::Result<gateway::End>>,
}

impl Gateway {
    fn start(directory: PathBuf) -> Gateway {
        let settings = gateway::Settings {
            socket: directory.join("head"),
            address: LOCALHOST,
            ports: (0, 0),
            heartbeat_timeout: PATIENCE,
            max_connections: 8,
            cancel: None,
            directory,
        };
        let (input, theirs) = UnixStream::pair().unwrap();
        let (output, their_output) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || gateway::run(&settings, theirs, their_output));
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).unwrap();
        let port = line.trim().strip_prefix("port ").unwrap().parse().unwrap();
        Gateway {
            port,
            input,
            thread,
        }
    }
}

#[test]
fn agents_reach_a_hub_through_a_gateway_and_are_lost_with_it() {
    let name = format!("rustcluster-behind-{}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    fs::create_dir(&directory).unwrap();
    let launch = || Launch {
        host: "slot".to_owned(),
        source: Source::DialBack {
            launcher: 1,
            lingers: None,
        },
    };
    let mut hub = Hub::start(vec![launch(), launch()], hello(), 1 << 20).unwrap();
    hub.listen(&[], &(0..=0), keys()).unwrap();
    hub.listen_unix(&directory.join("head")).unwrap();
    assert!(hub.listen_unix(&directory.join("head")).is_err());
    let gateway = Gateway::start(directory.clone());
    let agents = [1, 1].map(|key| Agent::start(gateway.port, 1, key));
    // A stranger is refused through the gateway, too.
    let mut stranger = TcpStream::connect((LOCALHOST, gateway.port)).unwrap();
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    stranger.write_all(&random(600)).unwrap();
    assert!(matches!(stranger.read(&mut [0]), Ok(0) | Err(_)));
    go(&mut hub, 2);
    assert!(hub.hosts().iter().all(|host| host.peer.is_none()));
    for rank in 0..2 {
        for len in [1, 70_000, 5_000_000] {
            expect_answers(&mut hub, rank, &random(len));
        }
    }
    assert_eq!(fact(&hub, "strangers_not_authentic"), 1);
    assert_eq!(fact(&hub, "sockets_of_gateways"), 1);
    drop(gateway.input);
    let end = gateway.thread.join().unwrap();
    assert_eq!(end.unwrap(), gateway::End::Closed);
    assert!(!directory.exists());
    eventually("the loss", || {
        hub.hosts().iter().all(|host| host.failure.is_some())
    });
    for agent in agents {
        agent.end();
    }
    close(hub);
}

/// The handshake of a dialer up to its "ready", and the bytes that it has sent.
fn half_handshake(port: u16, key: &Key) -> (TcpStream, Vec<u8>, Vec<u8>) {
    let introduction = Introduction::new([1; 16], "stranger", "");
    let (mut dialer, first) = Dialer::start(key, 1, &introduction).unwrap();
    let mut tcp = TcpStream::connect((LOCALHOST, port)).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    tcp.write_all(&first).unwrap();
    let mut buffer = [0; 200];
    let n = tcp.read(&mut buffer).unwrap_or(0);
    let mut ready = Vec::new();
    if n > 0 {
        assert_eq!(
            dialer.feed(&buffer[..n], &mut ready).unwrap(),
            None::<Verdict>
        );
    }
    (tcp, first, ready)
}

fn rss() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn strangers_have_no_effect_but_a_counter() {
    let (mut hub, port) = hub(&[1, 1]);
    let _first = Agent::start(port, 1, 1);
    eventually("the first agent", || {
        hub.hosts().iter().any(|host| host.hello.is_some())
    });
    let before = rss();
    let connect = || TcpStream::connect((LOCALHOST, port)).unwrap();
    let idle: Vec<TcpStream> = (0..500).map(|_| connect()).collect();
    // Random bytes: at once, and after the opening.
    let bytes = random(1_000_000);
    for opening in [&b""[..], OPENING] {
        for piece in bytes.chunks(100_000) {
            let mut tcp = connect();
            let _ = tcp.write_all(opening);
            let _ = tcp.write_all(piece);
        }
    }
    eventually("the random bytes are refused", || {
        fact(&hub, "strangers_not_authentic") + fact(&hub, "strangers_ended_early") >= 20
    });
    let before_wrong = fact(&hub, "strangers_not_authentic");
    // A wrong key is not answered, a right one is; the replay of its bytes gets no further.
    let (_, _, ready) = half_handshake(port, &key(9));
    assert!(ready.is_empty());
    let (mut tcp, first, ready) = half_handshake(port, &key(1));
    assert!(!ready.is_empty());
    let mut replay = connect();
    replay.write_all(&[first, ready].concat()).unwrap();
    replay.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    let _ = replay.read_to_end(&mut rest);
    assert_eq!(fact(&hub, "dialled_accepted"), 1);
    eventually("both are counted", || {
        fact(&hub, "strangers_not_authentic") >= before_wrong + 2
    });
    tcp.write_all(b"not ready at all, not ready at all")
        .unwrap();
    // A real agent comes through.
    let _second = Agent::start(port, 1, 1);
    go(&mut hub, 2);
    for rank in 0..2 {
        expect_answers(&mut hub, rank, &random(100_000));
    }
    let more = rss().saturating_sub(before);
    assert!(more < 16 * 1024, "{more} KB more");
    assert!(fact(&hub, "strangers_too_slow") > 0);
    assert_eq!(fact(&hub, "dialled_accepted"), 2);
    drop(idle);
    close(hub);
    let refused = TcpStream::connect((LOCALHOST, port));
    assert!(refused.is_err(), "the listener is closed with the cluster");
}

#[test]
fn a_taken_port_and_a_foreign_address_are_errors() {
    let (hub, port) = hub(&[1]);
    assert!(hub.listen(&[LOCALHOST], &(port..=port), keys()).is_err());
    let foreign = "192.0.2.1".parse().unwrap();
    assert!(hub.listen(&[foreign], &(0..=0), keys()).is_err());
    // Only keys.
    assert_eq!(hub.listen(&[], &(0..=0), keys()).unwrap(), port);
    let next = port.saturating_add(20);
    let found = hub.listen(&[LOCALHOST], &(port..=next), keys()).unwrap();
    assert!(found > port);
    close(hub);
}
