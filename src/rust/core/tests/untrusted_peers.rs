//! Untrusted peers: a process that is not an agent or a worker of this cluster, or that sends invalid
//! bytes, is reported as such and ended, without consequences for the other peers.
//!
//! The peers are shells and `cat`. Tests that need a real agent start this test's own executable, whose
//! workers return the messages that they receive.

#![allow(
    clippy::exit,
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic fails the test"
)]

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rustcluster_core::agent::{Role, startup};
use rustcluster_core::head::hub::{Answer, Event, HostView, Hub, Plan, Progress, Turn};
use rustcluster_core::head::launch::{self, Launch, Launched, Source};
use rustcluster_core::head::scheduler::events::Termination;
use rustcluster_core::platform::exit::Exit;
use rustcluster_core::platform::memfd;
use rustcluster_core::platform::signals;
use rustcluster_core::protocol::control::{
    self, Hello, Outfile, Start, StartMode, ToAgent, ToHead, WorkerConfig, WorkerReady,
};
use rustcluster_core::protocol::frame::{
    ABORT, BY_REFERENCE, FIRST, Frame, HEADER_LEN, Header, Kind, LAST, MAX_BODY,
};
use rustcluster_core::protocol::handshake::{self, MAGIC};
use rustcluster_core::protocol::ids::Rank;
use rustcluster_core::protocol::limits::SEND_WINDOW;
use rustcluster_core::worker::channel::Channel;
use serde::Serialize;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// Against waiting for ever; not what is tested.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(60);
const SLICE: Duration = Duration::from_millis(100);
const LIMIT: usize = 1 << 20;

// ---- what is sent ----

fn hello() -> Hello {
    startup::hello("0.1.0", "4.2.2", "test")
}

fn wire(frame: &Frame) -> Vec<u8> {
    [&frame.header.to_bytes()[..], &frame.body].concat()
}

fn control(message: &impl Serialize) -> Vec<u8> {
    wire(&control::encode(message).unwrap())
}

fn greeting(hello: Hello) -> Vec<u8> {
    [MAGIC, &control(&ToHead::Hello(hello))].concat()
}

fn data(flags: u8, worker: u32, task: u64, body: &[u8]) -> Vec<u8> {
    wire(&Frame::new(
        Kind::Data,
        flags,
        worker,
        task,
        body.to_vec().into(),
    ))
}

/// A chunk of a blob.
fn blob(flags: u8, id: u64) -> Vec<u8> {
    wire(&Frame::new(
        Kind::Blob,
        flags,
        0,
        id,
        vec![7; 30_000].into(),
    ))
}

/// A header alone, of whatever length.
fn announce(kind: Kind, len: u32) -> Vec<u8> {
    let header = Header {
        kind,
        flags: FIRST,
        worker: 0,
        task: 1,
        len,
    };
    header.to_bytes().to_vec()
}

fn up(worker: u32) -> Vec<u8> {
    control(&ToHead::WorkerUp { worker, pid: 1 })
}

/// Random bytes, of which some seeds begin as a frame of ours might.
fn noise(seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = vec![0; rng.random_range(1..3_000)];
    rng.fill_bytes(&mut bytes);
    let known = rng.random_range(0..6usize).min(bytes.len());
    let start = [rng.random_range(1..6), rng.random_range(0..4), 0, 0, 0, 0];
    bytes[..known].copy_from_slice(&start[..known]);
    bytes
}

// ---- who sends it ----

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rustcluster-untrusted-peers-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A command that sends what is written into the file, once that is opened, and ends when it
    /// is closed.
    fn mouthpiece(&self, name: &str) -> (Launch, Mouth) {
        let path = self.0.join(name);
        let text = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a string that ends with a NUL.
        assert_eq!(unsafe { libc::mkfifo(text.as_ptr(), 0o600) }, 0);
        (shell("exec cat \"$1\"", &path), Mouth(path))
    }
}

/// Where a mouthpiece's words are to be put.
struct Mouth(PathBuf);

impl Mouth {
    /// Opens it, once its command has done so, and greets.
    fn greet(self) -> File {
        let mut mouth = File::options().write(true).open(&self.0).unwrap();
        mouth.write_all(&greeting(hello())).unwrap();
        mouth
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `sh -c script`, with a path as `$1`.
fn shell(script: &str, path: &Path) -> Launch {
    let command = ["sh", "-c", script, "sh"].map(OsString::from);
    Launch {
        host: "stranger".into(),
        source: Source::Command {
            command: command
                .into_iter()
                .chain([path.as_os_str().to_owned()])
                .collect(),
            env: Vec::new(),
        },
    }
}

const AS_AGENT: &str = "RUSTCLUSTER_TEST_AS_AGENT";

/// The command of a real agent, and its environment.
fn agent_command() -> (Vec<OsString>, Vec<(OsString, Option<OsString>)>) {
    let name = "is_an_agent_when_it_is_asked_to_be";
    let command = [
        std::env::current_exe().unwrap().into_os_string(),
        name.into(),
        "--exact".into(),
        "--nocapture".into(),
    ];
    (command.into(), vec![(AS_AGENT.into(), Some("1".into()))])
}

fn real_agent() -> Launch {
    let (command, env) = agent_command();
    Launch {
        host: "real".into(),
        source: Source::Command { command, env },
    }
}

/// No test: see [`real_agent`]. What the test runner prints before is noise to the head.
#[test]
fn is_an_agent_when_it_is_asked_to_be() {
    if std::env::var_os(AS_AGENT).is_none() {
        return;
    }
    let served = startup::greet(&hello())
        .and_then(startup::Greeted::agent)
        .and_then(|mut agent| agent.run());
    match served {
        Ok(Role::Worker(channel)) => std::process::exit(answer(*channel)),
        Ok(Role::Done) => std::process::exit(0),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

/// A task that takes a while.
const SLEEP: &[u8] = b"sleep";
/// A task that is answered in shared memory, with so many bytes.
const SHARE: &[u8] = b"share";
const SHARED_LEN: usize = 100_000;
/// A task that is answered with so many bytes, sent in pieces.
const LARGE: &[u8] = b"large";
const LARGE_LEN: usize = 700_000;
/// A task that never ends where a file of the name that follows is there.
const HANG: &[u8] = b"hang";

/// A worker: each answer is the task, but for those above.
fn answer(mut channel: Channel) -> i32 {
    let mut served = channel.ready(String::new(), true);
    while served.is_ok() {
        match channel.next_task() {
            Ok(Some(task)) => {
                let blob = task.blob.map_or(Bytes::new(), |blob| blob.bytes);
                let chunks = [blob].into_iter().chain(task.body.chunks);
                let bytes: Vec<u8> = chunks.flatten().collect();
                if bytes == SLEEP {
                    thread::sleep(Duration::from_millis(300));
                }
                if let Some(path) = bytes.strip_prefix(HANG) {
                    while Path::new(OsStr::from_bytes(path)).exists() {
                        thread::sleep(Duration::from_millis(20));
                    }
                }
                channel.restart();
                served = if bytes == SHARE {
                    share_answer(&mut channel)
                } else if bytes == LARGE {
                    channel.send(&vec![7; LARGE_LEN], true)
                } else {
                    channel.send(&bytes, true)
                };
            }
            Ok(None) => return 0,
            Err(error) => served = Err(error),
        }
    }
    1
}

fn share_answer(channel: &mut Channel) -> io::Result<()> {
    let mut file = memfd::memory_file()?;
    file.write_all(&[7; SHARED_LEN])?;
    memfd::seal(&file)?;
    let sent = channel.send_shared_answer(&file, SHARED_LEN as u64)?;
    assert!(sent);
    Ok(())
}

fn start(workers: u32) -> Start {
    Start {
        workers,
        ranks: (0..workers.min(16)).collect(),
        mode: StartMode::Fork,
        packages: Vec::new(),
        outfile: Outfile::Discard,
        renice: 0,
        spawn_command: Vec::new(),
        heartbeat_timeout: 0,
        chunk_cache_bytes: 0,
        state: 1 << 20,
        setup: 0,
        memory_limit: 0,
        stop_timeout: 600,
        local: false,
        linger: None,
    }
}

fn plan(ranks: &[Rank]) -> Option<Plan> {
    Some(Plan {
        start: start(ranks.len() as u32),
        ranks: ranks.to_vec(),
    })
}

// ---- what is to be seen of it ----

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < HEARTBEAT_TIMEOUT, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process has ended. Zombies have ended.
fn is_terminated(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next());
    stat.is_empty() || state.is_some_and(|state| "ZX".contains(state))
}

fn expect_terminated(pid: u32) {
    eventually(&format!("the end of process {pid}"), || is_terminated(pid));
}

fn greeted(hub: &Hub) {
    eventually("all have greeted or failed", || hub.greeted(SLICE));
}

fn send(hub: &mut Hub, rank: Rank, bytes: &[u8]) {
    hub.begin(rank, u64::from(rank) + 1, None, Turn::Last, |_| None)
        .unwrap();
    hub.write(bytes);
    hub.finish();
}

fn receive(hub: &mut Hub, rank: Rank) -> Answer {
    let began = Instant::now();
    loop {
        match hub.receive(rank, SLICE) {
            Answer::Pending => assert!(began.elapsed() < HEARTBEAT_TIMEOUT, "no answer of {rank}"),
            answer => return answer,
        }
    }
}

fn expect_answers(hub: &mut Hub, rank: Rank) {
    let task = vec![rank as u8; 100_000];
    send(hub, rank, &task);
    let answer = receive(hub, rank);
    let Answer::Ready { body, .. } = answer else {
        panic!("{answer:?}");
    };
    let bytes: Vec<u8> = body.chunks.into_iter().flatten().collect();
    assert!(bytes == task);
}

/// Why the host of a worker with an answer outstanding was given up.
fn expect_lost(hub: &mut Hub, rank: Rank) -> String {
    match receive(hub, rank) {
        Answer::Lost { termination, .. } => match &*termination {
            Termination::Host(reason) => reason.clone(),
            other => panic!("{other:?}"),
        },
        answer => panic!("{answer:?}"),
    }
}

fn failure(hub: &Hub, host: usize) -> HostView {
    eventually("the host's failure", || hub.hosts()[host].failure.is_some());
    hub.hosts()[host].clone()
}

/// Stops the cluster and sees that nothing is left of what was launched.
fn close(mut hub: Hub) {
    let pids: Vec<u32> = hub.hosts().iter().filter_map(|host| host.pid).collect();
    hub.stop();
    eventually("the cluster's end", || hub.is_closed(SLICE));
    for pid in pids {
        assert!(is_terminated(pid), "process {pid} is left");
    }
}

#[test]
fn who_does_not_greet_is_named_and_ends() {
    let scratch = Scratch::new();
    let said = |name: &str, bytes: &[u8]| {
        let path = scratch.file(name, bytes);
        shell("cat \"$1\"; exec sleep 1000", &path)
    };
    let mut cut = greeting(hello());
    cut.truncate(MAGIC.len() + HEADER_LEN + 10);
    let other = Hello {
        package: "99.0".into(),
        ..hello()
    };
    let boaster = Hello {
        cores: u32::MAX,
        ..hello()
    };
    let nowhere = Path::new("/nonexistent");
    let cases: Vec<(Launch, &str)> = vec![
        (shell("exit 3", nowhere), "exited with status 3"),
        (shell("kill -9 $$", nowhere), "killed by signal 9"),
        (shell("exec yes", nowhere), "prints without end"),
        (
            said("garbage", &[MAGIC, &[0xee; 999]].concat()),
            "unknown frame kind 238",
        ),
        (
            said(
                "huge",
                &[MAGIC, &announce(Kind::Control, u32::MAX)].concat(),
            ),
            "announces a body of 4294967295 bytes",
        ),
        (
            said("order", &[MAGIC, &up(0)].concat()),
            "the agent did not greet",
        ),
        (
            said("version", &greeting(other)),
            "cannot talk to rustcluster 99.0",
        ),
        (said("cores", &greeting(boaster)), "claims 4294967295 cores"),
        (
            shell("cat \"$1\"", &scratch.file("cut", &cut)),
            "exited with status 0",
        ),
    ];
    let (mut launches, expected): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    launches.push(real_agent());
    // It says nothing at all, and does not end: how long to wait is R's business.
    launches.push(shell("exec sleep 1000", nowhere));
    let real = expected.len();
    let mut hub = Hub::start(launches, hello(), LIMIT).unwrap();
    for (host, expected) in expected.iter().enumerate() {
        let host = failure(&hub, host);
        let reason = host.failure.unwrap().reason;
        assert!(reason.contains(expected), "{reason}");
        expect_terminated(host.pid.unwrap());
    }
    eventually("the real agent's greeting", || {
        hub.hosts()[real].hello.is_some()
    });
    let mut plans: Vec<Option<Plan>> = vec![None; real + 2];
    plans[real] = plan(&[0, 1]);
    hub.go(plans).unwrap();
    expect_answers(&mut hub, 1);
    close(hub);
}

#[test]
fn nonsense_after_the_greeting_costs_its_host_and_no_other() {
    let scratch = Scratch::new();
    // What comes when a task is outstanding, and why the host is then given up.
    let mut cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![0; 100], "unknown frame kind 0"),
        (announce(Kind::Data, u32::MAX), "announces a body"),
        (announce(Kind::Output, u32::MAX), "announces a body"),
        (data(FIRST | LAST, 7, 1, b"x"), "worker 7 on a host with 1"),
        (data(FIRST | LAST, u32::MAX, 1, b"x"), "on a host with 1"),
        (
            data(FIRST | LAST, 0, 999_999, b"x"),
            "an answer to task 999999",
        ),
        (wire(&Frame::credit(3, 1, 5)), "worker 3 on a host with 1"),
        (
            wire(&Frame::new(Kind::Cancel, 0, 0, 1, Bytes::default())),
            "a frame that is not for the head",
        ),
        (blob(FIRST | LAST, 1), "a frame that is not for the head"),
        (
            wire(&Frame::blob_reference(0, 2, 1, true)),
            "a bad announcement of a result",
        ),
        (
            data(LAST | BY_REFERENCE, 0, 1, &5u64.to_le_bytes()),
            "a result whose memory cannot be opened here",
        ),
        (
            data(FIRST | BY_REFERENCE, 0, 1, &u64::MAX.to_le_bytes()),
            "a result of no length",
        ),
        (
            control(&ToHead::Failed {
                reason: "it has no more".into(),
            }),
            "it has no more",
        ),
        (control(&ToHead::Hello(hello())), "a second hello"),
        (
            control(&ToHead::WorkerReplaced { worker: 0, pid: 1 }),
            "a busy worker was replaced",
        ),
        (up(9), "worker 9 on a host with 1"),
        (control(&ToAgent::Start(start(1))), "the agent sent"),
        (
            data(FIRST, 0, 0, &[0; MAX_BODY]).repeat(20),
            "an answer to task 0",
        ),
        // Cut in the middle of a frame.
        (announce(Kind::Data, 1000), "exited with status 0"),
        (
            announce(Kind::Data, 1000)[..7].to_vec(),
            "exited with status 0",
        ),
        // Credit that is not due is no harm.
        (wire(&Frame::credit(0, 1, u32::MAX)), "exited with status 0"),
        (up(0), "exited with status 0"),
        (Vec::new(), "exited with status 0"),
    ];
    for seed in 0..24 {
        cases.push((noise(seed), "the agent"));
    }
    let (mut launches, mut mouths) = (Vec::new(), Vec::new());
    for at in 0..cases.len() {
        let (launch, mouth) = scratch.mouthpiece(&format!("mouth{at}"));
        launches.push(launch);
        mouths.push(mouth);
    }
    launches.push(real_agent());
    let real = cases.len() as Rank;
    let mut hub = Hub::start(launches, hello(), LIMIT).unwrap();
    let mut mouths: Vec<File> = mouths.into_iter().map(Mouth::greet).collect();
    greeted(&hub);
    hub.go((0..=real).map(|rank| plan(&[rank])).collect())
        .unwrap();
    for mouth in &mut mouths {
        mouth.write_all(&up(0)).unwrap();
    }
    eventually("all are up", || {
        matches!(hub.progress(false, SLICE), Progress::Up)
    });
    expect_answers(&mut hub, real);
    for (rank, ((bytes, expected), mut mouth)) in cases.iter().zip(mouths).enumerate() {
        let rank = rank as Rank;
        send(&mut hub, rank, b"a task");
        let sent = bytes.clone();
        let sender = thread::spawn(move || {
            // Bytes that are not an error by themselves end with the stream. The stream may close before all
            // are written.
            let _ = mouth.write_all(&sent);
        });
        let reason = expect_lost(&mut hub, rank);
        assert!(reason.contains(expected), "{reason}");
        sender.join().unwrap();
        expect_answers(&mut hub, real);
    }
    for rank in 0..real {
        expect_terminated(failure(&hub, rank as usize).pid.unwrap());
    }
    close(hub);
}

#[test]
fn the_answer_of_an_untrusted_peer_stays_within_what_was_granted() {
    let scratch = Scratch::new();
    let (launch, mouth) = scratch.mouthpiece("mouth");
    let mut hub = Hub::start(vec![launch, real_agent()], hello(), LIMIT).unwrap();
    let mut mouth = mouth.greet();
    greeted(&hub);
    hub.go(vec![plan(&[0]), plan(&[1])]).unwrap();
    mouth.write_all(&up(0)).unwrap();
    eventually("all are up", || {
        matches!(hub.progress(false, SLICE), Progress::Up)
    });
    send(&mut hub, 0, b"a task");
    // The first task of a cluster. Without end, and R does not ask for it.
    let flood = thread::spawn(move || {
        let chunk = data(FIRST, 0, 1, &[7; MAX_BODY]);
        let rest = data(0, 0, 1, &[7; MAX_BODY]);
        let mut sent = mouth.write_all(&chunk);
        for _ in 0..10_000 {
            sent = sent.and_then(|()| mouth.write_all(&rest));
        }
    });
    let reason = failure(&hub, 0).failure.unwrap().reason;
    assert!(reason.contains("were granted"), "{reason}");
    assert_eq!(expect_lost(&mut hub, 0), reason);
    flood.join().unwrap();
    expect_answers(&mut hub, 1);
    close(hub);
}

#[test]
fn a_host_that_never_stops_sending_holds_up_no_other() {
    let scratch = Scratch::new();
    let (flooder, flood) = scratch.mouthpiece("flood");
    let (other, mouth) = scratch.mouthpiece("mouth");
    let launches = vec![flooder, real_agent(), other];
    let mut hub = Hub::start(launches, hello(), LIMIT).unwrap();
    let (mut flood, mouth) = (flood.greet(), mouth.greet());
    greeted(&hub);
    hub.go(vec![plan(&[0]), plan(&[1]), plan(&[2])]).unwrap();
    let flood = thread::spawn(move || {
        let alive = control(&ToHead::Alive).repeat(20_000);
        while flood.write_all(&alive).is_ok() {}
    });
    expect_answers(&mut hub, 1);
    // While R does something else, the hub's thread serves them all.
    drop(mouth);
    let other = failure(&hub, 2);
    assert!(other.failure.unwrap().reason.contains("status 0"));
    expect_answers(&mut hub, 1);
    let flooder = hub.hosts()[0].pid.unwrap();
    // The head has not waited for the flooder to end, and has not been notified of its end.
    signals::kill(-(flooder as i32), libc::SIGKILL).unwrap();
    failure(&hub, 0);
    flood.join().unwrap();
    close(hub);
}

/// Bytes of memory that this process has in use.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.unwrap().split_whitespace().nth(1).unwrap();
    kilobytes.parse::<usize>().unwrap() * 1024
}

#[test]
fn announced_lengths_take_no_memory() {
    let scratch = Scratch::new();
    let launches_and_mouths = (0..32).map(|at| scratch.mouthpiece(&format!("mouth{at}")));
    let (launches, mouths): (Vec<_>, Vec<_>) = launches_and_mouths.unzip();
    let mut hub = Hub::start(launches, hello(), LIMIT).unwrap();
    let mut mouths: Vec<File> = mouths.into_iter().map(Mouth::greet).collect();
    greeted(&hub);
    hub.go((0..32).map(|rank| plan(&[rank])).collect()).unwrap();
    let before = resident();
    for (at, mouth) in mouths.iter_mut().enumerate() {
        // A message that consists of a text of 2^64 - 1 bytes.
        let mut endless = vec![1, 0, 0, 0];
        endless.extend([0xff; 8]);
        let endless = Frame::new(Kind::Control, FIRST | LAST, 0, 0, endless.into());
        let bytes = match at % 4 {
            // Half of them keep the rest waiting for what they may announce.
            0 | 1 => announce(Kind::Data, MAX_BODY as u32),
            2 => announce(Kind::Data, u32::MAX),
            _ => wire(&endless),
        };
        mouth.write_all(&bytes).unwrap();
    }
    for at in (0..32).filter(|at| at % 4 > 1) {
        failure(&hub, at);
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    drop(mouths);
    for at in 0..32 {
        failure(&hub, at);
    }
    close(hub);
}

#[test]
fn what_an_untrusted_peer_prints_without_end_is_bounded() {
    let scratch = Scratch::new();
    let path = scratch.file("hello", &greeting(hello()));
    let piece = wire(&Frame::new(Kind::Output, 0, 0, 0, vec![b'x'; 999].into()));
    scratch.file("output", &piece.repeat(2_000));
    // There are 40 MB of output when the head goes on.
    let script = "cat \"$1\"; cd \"${1%/*}\"; while [ ! -e go ]; do sleep 0.01; done
        for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do cat output; done";
    let mut hub = Hub::start(vec![shell(script, &path)], hello(), LIMIT).unwrap();
    greeted(&hub);
    hub.go(vec![plan(&[0])]).unwrap();
    scratch.file("go", b"");
    failure(&hub, 0);
    let shown: usize = hub
        .take_events()
        .iter()
        .map(|event| match event {
            Event::Output { bytes, .. } => bytes.len(),
            _ => 0,
        })
        .sum();
    assert!((1 << 20..20 << 20).contains(&shown), "{shown}");
    close(hub);
}

/// A blob for the hosts of these workers. No caller has to wait until it has been sent.
fn share(hub: &mut Hub, ranks: &[Rank], bytes: &[u8], setup_call: bool) -> u64 {
    let id = hub.begin_blob(ranks, setup_call);
    for bytes in bytes.chunks(99_999) {
        while hub.write(bytes) && hub.wait_to_send(SLICE) {}
    }
    hub.finish_blob();
    id
}

/// The answer to a task that begins with a blob is that and the rest.
fn expect_shared(hub: &mut Hub, rank: Rank, id: u64, bytes: &[u8], rest: &[u8]) {
    let started = hub.begin(rank, 1, None, Turn::Last, |_| Some(id)).unwrap();
    assert!(started.has_blob && hub.has_blob(rank, id));
    hub.write(rest);
    hub.finish();
    let Answer::Ready { body, .. } = receive(hub, rank) else {
        panic!("no answer");
    };
    let answer: Vec<u8> = body.chunks.into_iter().flatten().collect();
    assert!(answer == [bytes, rest].concat());
}

#[test]
fn blobs_reach_all_workers_of_all_hosts_and_nothing_is_left_of_them() {
    let mut hub = Hub::start(vec![real_agent(), real_agent()], hello(), LIMIT).unwrap();
    greeted(&hub);
    let mut plans = vec![plan(&[0, 1, 2]), plan(&[3, 4])];
    if let Some(Some(plan)) = plans.get_mut(1) {
        // As one on another machine.
        plan.start.chunk_cache_bytes = 1 << 20;
    }
    hub.go(plans).unwrap();
    for len in [0, 10, MAX_BODY, MAX_BODY + 1, 3_000_000] {
        let bytes: Vec<u8> = (0..len).map(|i| (i / 1000 + i) as u8).collect();
        let id = share(&mut hub, &[0, 1, 2, 3, 4], &bytes, false);
        for rank in 0..5 {
            expect_shared(&mut hub, rank, id, &bytes, b"");
            expect_shared(&mut hub, rank, id, &bytes, b"and the rest");
        }
        // What has been submitted still gets it.
        let started = hub.begin(2, 1, None, Turn::Last, |_| Some(id)).unwrap();
        assert!(started.has_blob);
        hub.finish();
        hub.drop_blob(id);
        assert!(!hub.has_blob(2, id) && !hub.has_blob(3, id));
        let Answer::Ready { body, .. } = receive(&mut hub, 2) else {
            panic!("no answer");
        };
        assert_eq!(body.len, len);
        let started = hub.begin(2, 1, None, Turn::Last, |_| Some(id)).unwrap();
        assert!(!started.has_blob);
        hub.write(b"all of it");
        hub.finish();
        receive(&mut hub, 2);
    }
    // One that is not finished; one for some hosts, which another gets later.
    hub.begin_blob(&[0, 4], false);
    hub.write(&vec![1; 1_000_000]);
    hub.abandon();
    let bytes = vec![2; 500_000];
    let id = share(&mut hub, &[0, 1], &bytes, false);
    expect_shared(&mut hub, 1, id, &bytes, b"");
    let started = hub.begin(3, 1, None, Turn::Last, |_| Some(id)).unwrap();
    assert!(!started.has_blob);
    hub.begin_blob_again(id, 3);
    hub.write(&bytes);
    assert!(hub.finish_blob());
    hub.finish();
    receive(&mut hub, 3);
    expect_shared(&mut hub, 4, id, &bytes, b"rest");
    hub.drop_blob(id);
    // Each worker answers a task after the request to unmap the blob.
    (0..5).for_each(|rank| expect_answers(&mut hub, rank));
    let of_agents = hub.hosts().into_iter().filter_map(|host| host.pid);
    let of_workers = (0..5).filter_map(|rank| hub.worker(rank).pid);
    for pid in of_agents.chain(of_workers).collect::<Vec<u32>>() {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        assert!(!maps.contains("memfd"), "{maps}");
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            let target = fs::read_link(fd.unwrap().path()).unwrap_or_default();
            assert!(!target.to_string_lossy().contains("memfd"), "{target:?}");
        }
    }
    close(hub);
}

#[test]
fn a_host_without_room_for_shared_memory_is_sent_as_much_without() {
    let real = real_agent();
    // Files may not be longer than that; those in memory are files.
    let script = "ulimit -f 200; exec \"$@\"";
    let (command, env) = agent_command();
    let limited = Launch {
        host: "limited".into(),
        source: Source::Command {
            command: ["sh", "-c", script, "sh"]
                .map(OsString::from)
                .into_iter()
                .chain(command)
                .collect(),
            env,
        },
    };
    let mut hub = Hub::start(vec![limited, real], hello(), LIMIT).unwrap();
    greeted(&hub);
    hub.go(vec![plan(&[0]), plan(&[1])]).unwrap();
    expect_answers(&mut hub, 0);
    let bytes = vec![3; 5_000_000];
    let id = share(&mut hub, &[0, 1], &bytes, false);
    // More often than the head's window would take if that counted what the agent gives.
    for _ in 0..3 {
        for rank in 0..2 {
            expect_shared(&mut hub, rank, id, &bytes, b"rest");
        }
        let other = share(&mut hub, &[0, 1], &bytes[..100_000], false);
        expect_shared(&mut hub, 0, other, &bytes[..100_000], b"");
        hub.drop_blob(other);
        expect_answers(&mut hub, 0);
    }
    hub.drop_blob(id);
    expect_answers(&mut hub, 0);
    close(hub);
}

// ---- the agent ----

/// A real agent, and how it ends.
struct Seen {
    launched: Launched,
    exit: Receiver<Option<i32>>,
}

impl Seen {
    fn new() -> Seen {
        let (report, exit) = mpsc::channel();
        let (command, env) = agent_command();
        let launched = launch::start(&command, &env, move |status| {
            let _ = report.send(status.unwrap().code());
        });
        Seen {
            launched: launched.unwrap(),
            exit,
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        // The peer may have closed the stream.
        let _ = self.launched.stream.write_all(bytes);
    }

    /// The next message that is in what it says.
    fn record_received(&mut self) -> ToHead {
        let mut header = [0; HEADER_LEN];
        self.launched.stream.read_exact(&mut header).unwrap();
        let header = Header::decode(&header).unwrap().unwrap();
        let mut body = vec![0; header.body_len()];
        self.launched.stream.read_exact(&mut body).unwrap();
        control::decode(&body).unwrap()
    }

    /// Greets it and has it make a worker. Returns the worker's pid.
    fn greet(&mut self, start: Start) -> u32 {
        self.say(&[MAGIC, &control(&ToAgent::Hello(hello()))].concat());
        let mut seen = Vec::new();
        while !seen.ends_with(MAGIC) {
            let mut byte = [0];
            self.launched.stream.read_exact(&mut byte).unwrap();
            seen.extend(byte);
        }
        assert!(matches!(self.record_received(), ToHead::Hello(_)));
        self.say(&control(&ToAgent::Start(start)));
        match self.record_received() {
            ToHead::WorkerUp { worker: 0, pid } => pid,
            other => panic!("{other:?}"),
        }
    }

    /// Its end, which is its own doing.
    fn expect_end(mut self) {
        let ended = self.exit.recv_timeout(HEARTBEAT_TIMEOUT);
        if ended.is_err() {
            self.launched.process.kill();
        }
        let mut said = String::new();
        let _ = self.launched.stderr.read_to_string(&mut said);
        assert!(matches!(ended, Ok(Some(_))), "{ended:?} {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn an_agent_ends_when_its_head_is_untrusted() {
    let start_nothing = [
        MAGIC,
        &control(&ToAgent::Hello(hello())),
        &control(&ToAgent::Start(start(u32::MAX))),
    ];
    let other = Hello {
        protocol: 77,
        ..hello()
    };
    let mut cases = vec![
        vec![b'y'; 2 * handshake::MAX_NOISE],
        [MAGIC, &[0xee; 99]].concat(),
        [MAGIC, &announce(Kind::Control, u32::MAX)].concat(),
        [MAGIC, &control(&ToAgent::Start(start(1)))].concat(),
        [MAGIC, &control(&ToAgent::Hello(other))].concat(),
        [MAGIC, &data(FIRST | LAST, 0, 1, b"x")].concat(),
        // More workers than any host can have.
        start_nothing.concat(),
    ];
    cases.extend((100..104).map(|seed| [MAGIC, &noise(seed)].concat()));
    for bytes in cases {
        let mut agent = Seen::new();
        agent.say(&bytes);
        let _ = agent.launched.stream.shutdown(std::net::Shutdown::Write);
        agent.expect_end();
    }
}

#[test]
fn an_agent_whose_head_loses_its_mind_takes_its_workers_along() {
    let more_than_the_window = {
        let mut bytes = data(FIRST, 0, 1, &[1; MAX_BODY]);
        bytes.extend(data(0, 0, 1, &[1; MAX_BODY]).repeat(40 * SEND_WINDOW / MAX_BODY));
        bytes
    };
    let mut cases = vec![
        vec![0xee; 500],
        announce(Kind::Data, u32::MAX),
        data(FIRST | LAST, 5, 1, b"x"),
        // The rest of a task that has no beginning.
        data(LAST, 0, 1, b"x"),
        data(FIRST | LAST, 0, 1, b"x").repeat(2),
        wire(&Frame::credit(u32::MAX, 1, 5)),
        wire(&Frame::new(Kind::Output, 0, 0, 1, Bytes::default())),
        control(&ToAgent::Cancel { worker: 3, task: 1 }),
        control(&ToAgent::Hello(hello())),
        control(&ToAgent::Start(start(1))),
        control(&up(0)),
        wire(&Frame::blob_reference(0, 1, 7, true)),
        [blob(FIRST, 7), wire(&Frame::blob_reference(0, 1, 7, true))].concat(),
        blob(LAST, 7),
        blob(LAST | ABORT, 7),
        blob(FIRST | LAST, 7).repeat(2),
        announce(Kind::Blob, u32::MAX),
        // Of which there is no end.
        [blob(FIRST, 7), blob(0, 7).repeat(100)].concat(),
    ];
    cases.extend((200..204).map(noise));
    for (at, bytes) in cases.into_iter().enumerate() {
        let mut agent = Seen::new();
        let worker = agent.greet(start(1));
        agent.say(&bytes);
        // Random bytes may be the beginning of something.
        let _ = agent.launched.stream.shutdown(std::net::Shutdown::Write);
        agent.expect_end();
        println!("case {at}");
        expect_terminated(worker);
    }
    // A worker that reads nothing, and a head that does not mind.
    let mut agent = Seen::new();
    let worker = agent.greet(start(1));
    // The worker is there until its agent ends.
    signals::kill(worker as i32, libc::SIGSTOP).unwrap();
    agent.say(&more_than_the_window);
    agent.expect_end();
    expect_terminated(worker);
}

// ---- the workers ----

#[test]
fn a_worker_that_is_none_is_killed_and_its_agent_is_not_the_worse_for_it() {
    let scratch = Scratch::new();
    let ready = control(&WorkerReady {
        ready: true,
        tempdir: scratch.0.to_string_lossy().into_owned(),
    });
    let cases = [
        vec![0xee; 300],
        [MAGIC, b"and more"].concat(),
        announce(Kind::Data, u32::MAX),
        announce(Kind::Control, u32::MAX),
        data(FIRST | LAST, 0, 1, b"x"),
        wire(&Frame::credit(0, 1, 5)),
        wire(&Frame::new(Kind::Cancel, 0, 0, 1, Bytes::default())),
        control(&ToHead::Alive),
        ready.repeat(2),
        [&ready[..], &data(FIRST | LAST, 0, 1, b"x")].concat(),
    ];
    for (at, bytes) in cases.iter().enumerate() {
        let path = scratch.file(&format!("worker{at}"), bytes);
        let mut wanted = start(2);
        wanted.mode = StartMode::Spawn;
        // The channel is the worker's stdin. The second of them does nothing.
        let script = "if mkdir \"$1.made\" 2>/dev/null; then cat \"$1\" >&0; fi; exec sleep 1000";
        let path = path.to_string_lossy().into_owned();
        let command = ["sh", "-c", script, "sh", &path].map(str::to_owned);
        wanted.spawn_command = command.into();
        let ranks = vec![0, 1];
        let mut hub = Hub::start(vec![real_agent()], hello(), LIMIT).unwrap();
        greeted(&hub);
        hub.go(vec![Some(Plan {
            start: wanted,
            ranks,
        })])
        .unwrap();
        let lost = |hub: &Hub| {
            // One that had been ready is replaced, by one that does nothing.
            let replaced = hub.take_events().into_iter().find_map(|event| match event {
                Event::Lost { rank, failure, .. } => Some((rank, failure)),
                _ => None,
            });
            let termination = |rank| match hub.worker(rank).termination.as_deref() {
                Some(Termination::Worker(failure)) => Some((rank, failure.clone())),
                _ => None,
            };
            replaced.or_else(|| [0, 1].into_iter().find_map(termination))
        };
        let mut found = None;
        eventually("the worker's loss", || {
            found = lost(&hub);
            found.is_some()
        });
        let (rank, failure) = found.unwrap();
        assert_eq!(failure.exit, Exit::Signal(9), "case {at}");
        expect_terminated(failure.pid);
        assert!(hub.worker(1 - rank).termination.is_none());
        assert!(hub.hosts()[0].failure.is_none());
        close(hub);
        // What it had named as its temporary directory is none of R's.
        assert!(scratch.0.exists());
    }
}

#[test]
fn a_worker_that_loses_its_mind_over_a_task_costs_that_task_and_no_host() {
    let scratch = Scratch::new();
    let ready = control(&WorkerReady {
        ready: true,
        tempdir: String::new(),
    });
    let ready = scratch.file("ready", &ready);
    let cases = [
        vec![0xee; 300],
        announce(Kind::Data, u32::MAX),
        // Cut off in the middle of an answer, and then something else.
        [&announce(Kind::Data, 10)[..], &[0xee; 300]].concat(),
        data(FIRST | LAST, 0, 2, b"of another task"),
        // What agents alone may say of a task.
        data(LAST | ABORT, 0, 1, b""),
        // The message is not yet whole.
        data(FIRST | LAST, 0, 1, b"an answer"),
    ];
    for (at, bytes) in cases.iter().enumerate() {
        let path = scratch.file(&format!("worker{at}"), bytes);
        let mut wanted = start(2);
        wanted.mode = StartMode::Spawn;
        // The configuration and the beginning of a task are read before.
        let config = WorkerConfig {
            packages: wanted.packages.clone(),
            memory_limit: wanted.memory_limit,
            shared_answers: true,
            rank: 0,
        };
        let read = control(&config).len() + 12;
        let script =
            format!("cat \"$1\" >&0; head -c {read} >/dev/null; cat \"$2\" >&0; exec sleep 1000");
        let [ready, path] = [&ready, &path].map(|path| path.to_string_lossy().into_owned());
        let command = ["sh", "-c", &script, "sh", &ready, &path].map(str::to_owned);
        wanted.spawn_command = command.into();
        let mut hub = Hub::start(vec![real_agent()], hello(), LIMIT).unwrap();
        greeted(&hub);
        hub.go(vec![Some(Plan {
            start: wanted,
            ranks: vec![0, 1],
        })])
        .unwrap();
        eventually("both are up", || {
            matches!(hub.progress(false, SLICE), Progress::Up)
        });
        let first = hub.worker(0).pid;
        hub.begin(0, 1, None, Turn::Last, |_| None).unwrap();
        hub.write(&[7; 2 * MAX_BODY]);
        if at + 1 < cases.len() {
            hub.finish();
        } else {
            eventually("the worker's loss", || hub.worker(0).pid != first);
            hub.finish();
        }
        let answer = receive(&mut hub, 0);
        let Answer::Lost {
            rank: 0,
            termination,
            ..
        } = answer
        else {
            panic!("case {at}: {answer:?}");
        };
        let Termination::Worker(failure) = &*termination else {
            panic!("case {at}: {termination:?}");
        };
        assert_eq!(failure.exit, Exit::Signal(9), "case {at}");
        expect_terminated(failure.pid);
        let other = hub.worker(1).termination;
        assert!(other.is_none(), "case {at}: {other:?}");
        assert!(hub.hosts()[0].failure.is_none());
        close(hub);
    }
}

#[test]
fn tasks_that_wait_at_an_agent_are_done_in_order_or_had_back() {
    let mut hub = Hub::start(vec![real_agent()], hello(), LIMIT).unwrap();
    greeted(&hub);
    hub.go(vec![plan(&[0])]).unwrap();
    eventually("it is up", || {
        matches!(hub.progress(false, SLICE), Progress::Up)
    });
    let large = vec![7; 3 * SEND_WINDOW];
    let messages = [SLEEP, b"waits there", b"had back from here", &large, SLEEP];
    let send = |hub: &mut Hub, message: &&[u8]| {
        let task = hub
            .begin(0, 1, None, Turn::Prefetch, |_| None)
            .unwrap()
            .task;
        hub.write(message);
        hub.finish();
        task
    };
    let tasks: Vec<u64> = messages.iter().map(|m| send(&mut hub, m)).collect();
    // While the first runs: one that waits at the agent, and one that has not been sent.
    thread::sleep(Duration::from_millis(100));
    hub.revoke(tasks[0]);
    hub.revoke(tasks[1]);
    hub.revoke(tasks[2]);
    for (at, &expected) in tasks.iter().enumerate() {
        let answer = receive(&mut hub, 0);
        match answer {
            Answer::Revoked { rank: 0, task } if at == 1 || at == 2 => {
                assert_eq!(task, expected);
                assert!(!hub.expects(task));
            }
            Answer::Ready { task, body, .. } if at != 1 && at != 2 => {
                assert_eq!(task, expected);
                let bytes: Vec<u8> = body.chunks.into_iter().flatten().collect();
                assert!(bytes == messages[at]);
            }
            answer => panic!("task {at}: {answer:?}"),
        }
        hub.revoke(expected);
    }
    assert!(matches!(receive(&mut hub, 0), Answer::NothingSent));
    // And with its process, what waits behind a task is not lost.
    let tasks: Vec<u64> = [SLEEP, b"next"].iter().map(|m| send(&mut hub, m)).collect();
    thread::sleep(Duration::from_millis(100));
    let pid = hub.worker(0).pid.unwrap();
    kill(pid);
    let answer = receive(&mut hub, 0);
    assert!(matches!(answer, Answer::Lost { task, .. } if task == tasks[0]));
    hub.forget(tasks[0]);
    let answer = receive(&mut hub, 0);
    assert!(matches!(answer, Answer::Ready { task, .. } if task == tasks[1]));
    close(hub);
}

// ---- what is read and written ----

/// A task whose effect lasts, and its answer's length.
fn setup_messages(hub: &mut Hub, rank: Rank, message: &[u8]) -> usize {
    hub.begin(rank, 1, Some(0), Turn::Last, |_| None).unwrap();
    hub.write(message);
    hub.finish();
    match receive(hub, rank) {
        Answer::Ready { body, .. } => body.len,
        answer => panic!("{answer:?}"),
    }
}

fn kill(pid: u32) {
    // A process of ours, or its number that nobody else has yet.
    let _ = signals::kill(pid as i32, libc::SIGKILL);
}

/// Kills a worker and waits for its replacement.
fn expect_replaced(hub: &Hub, rank: Rank) {
    let pid = hub.worker(rank).pid.unwrap();
    kill(pid);
    eventually("another worker", || hub.worker(rank).pid != Some(pid));
    assert!(hub.worker(rank).termination.is_none());
}

fn bring_up(hub: &mut Hub, start: Start) {
    greeted(hub);
    let ranks = (0..start.workers).collect();
    hub.go(vec![Some(Plan { start, ranks })]).unwrap();
    eventually("all are up", || {
        matches!(hub.progress(false, SLICE), Progress::Up)
    });
}

#[test]
fn answers_with_descriptors_among_others_are_all_read() {
    // What a fresh worker repeats is answered at once, so that its channel holds many answers. Reading
    // stops behind each that carries a descriptor, although there is more.
    let mut hub = Hub::start(vec![real_agent()], hello(), LIMIT).unwrap();
    let local = Start {
        local: true,
        linger: None,
        ..start(3)
    };
    bring_up(&mut hub, local);
    for rank in 0..3 {
        for _ in 0..10 {
            assert_eq!(setup_messages(&mut hub, rank, SHARE), SHARED_LEN);
            assert_eq!(setup_messages(&mut hub, rank, b"small"), 5);
            assert_eq!(setup_messages(&mut hub, rank, SHARE), SHARED_LEN);
            assert_eq!(setup_messages(&mut hub, rank, LARGE), LARGE_LEN);
        }
    }
    for _ in 0..4 {
        for rank in 0..3 {
            expect_replaced(&hub, rank);
        }
        for rank in 0..3 {
            expect_answers(&mut hub, rank);
            assert_eq!(setup_messages(&mut hub, rank, b"after"), 5);
        }
    }
    close(hub);
}

#[test]
fn a_restore_that_does_not_end_is_given_up_and_tried_again() {
    let scratch = Scratch::new();
    let path = scratch.0.join("hang");
    let task = [HANG, path.as_os_str().as_bytes()].concat();
    let mut hub = Hub::start(vec![real_agent()], hello(), LIMIT).unwrap();
    let bounded = Start {
        setup: 300,
        ..start(2)
    };
    bring_up(&mut hub, bounded);
    assert_eq!(setup_messages(&mut hub, 0, &task), task.len());
    scratch.file("hang", b"");
    let before = hub.worker(0).pid;
    kill(before.unwrap());
    eventually("the end of the restore", || {
        hub.worker(0).termination.is_some()
    });
    let Some(Termination::Worker(failure)) = hub.worker(0).termination.as_deref().cloned() else {
        panic!("{:?}", hub.worker(0).termination);
    };
    assert_eq!(failure.exit, Exit::Signal(9));
    assert!(failure.setback.restoring && failure.setback.pause == 1_000);
    assert!(failure.setback.stalled >= 300);
    let reports = |event: &Event| matches!(event, Event::Lost { rank: 0, replaced: false, failure: other } if *other == failure);
    assert!(hub.take_events().iter().any(reports));
    assert!(hub.begin(0, 1, None, Turn::Last, |_| None).is_err());
    expect_answers(&mut hub, 1);
    // What was wrong there is over.
    fs::remove_file(&path).unwrap();
    eventually("another worker", || hub.worker(0).termination.is_none());
    assert!(hub.worker(0).pid.is_some() && hub.worker(0).pid != before);
    assert!(hub.take_events().contains(&Event::Back { rank: 0 }));
    for rank in 0..2 {
        expect_answers(&mut hub, rank);
    }
    close(hub);
}

#[test]
fn a_worker_that_is_to_be_tried_again_does_not_keep_its_cluster() {
    let scratch = Scratch::new();
    let path = scratch.0.join("hang");
    let task = [HANG, path.as_os_str().as_bytes()].concat();
    for stops_all in [true, false] {
        let mut hub = Hub::start(vec![real_agent()], hello(), LIMIT).unwrap();
        let bounded = Start {
            setup: 100,
            ..start(2)
        };
        bring_up(&mut hub, bounded);
        setup_messages(&mut hub, 0, &task);
        scratch.file("hang", b"");
        kill(hub.worker(0).pid.unwrap());
        eventually("the end of the restore", || {
            hub.worker(0).termination.is_some()
        });
        if !stops_all {
            // It is stopped while it is waited for, and does not come back.
            hub.stop_workers(&[0]);
            assert_eq!(
                hub.worker(0).termination.as_deref(),
                Some(&Termination::Stopped)
            );
            fs::remove_file(&path).unwrap();
            thread::sleep(Duration::from_millis(1_500));
            assert_eq!(
                hub.worker(0).termination.as_deref(),
                Some(&Termination::Stopped)
            );
            expect_answers(&mut hub, 1);
        }
        close(hub);
        let _ = fs::remove_file(&path);
    }
}
