//! Tests of the gateway with real sockets, and a head that is a thread of the test.

use super::*;
use std::net::{Ipv4Addr, TcpStream as StdTcp};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdUnix};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

const LONG: Duration = Duration::from_secs(60);

static DIRECTORIES: AtomicU32 = AtomicU32::new(0);

struct Running {
    directory: PathBuf,
    listener: StdListener,
    input: Option<StdUnix>,
    output: io::BufReader<StdUnix>,
    port: u16,
    thread: JoinHandle<io::Result<End>>,
}

fn start(change: impl FnOnce(&mut Settings)) -> Running {
    let number = DIRECTORIES.fetch_add(1, Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("rcgw-{}-{number}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let mut settings = Settings {
        socket: directory.join("head"),
        address: Ipv4Addr::LOCALHOST.into(),
        ports: (0, 0),
        heartbeat_timeout: LONG,
        max_connections: 8,
        cancel: None,
        directory: directory.clone(),
    };
    change(&mut settings);
    let listener = StdListener::bind(&settings.socket).unwrap();
    let (input, theirs) = StdUnix::pair().unwrap();
    let (output, their_output) = StdUnix::pair().unwrap();
    let thread = thread::spawn(move || run(&settings, theirs, their_output));
    let mut output = io::BufReader::new(output);
    let mut line = String::new();
    io::BufRead::read_line(&mut output, &mut line).unwrap();
    let port = line.trim().strip_prefix("port ").unwrap().parse().unwrap();
    let input = Some(input);
    Running {
        directory,
        listener,
        input,
        output,
        port,
        thread,
    }
}

impl Running {
    fn connect(&self) -> (StdTcp, StdUnix) {
        let agent = StdTcp::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        agent.set_read_timeout(Some(LONG)).unwrap();
        let (head, _) = self.listener.accept().unwrap();
        head.set_read_timeout(Some(LONG)).unwrap();
        (agent, head)
    }

    fn end(&mut self) {
        self.input = None;
    }
}

fn exact(from: &mut impl Read, n: usize) -> Vec<u8> {
    let mut buffer = vec![0; n];
    from.read_exact(&mut buffer).unwrap();
    buffer
}

#[test]
fn bytes_and_ends_go_both_ways() {
    let mut gateway = start(|_| ());
    let (mut agent, mut head) = gateway.connect();
    agent.write_all(b"from the agent").unwrap();
    assert_eq!(exact(&mut head, 14), b"from the agent");
    head.write_all(b"from the head").unwrap();
    assert_eq!(exact(&mut agent, 13), b"from the head");
    // The other direction stays open.
    agent.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(head.read(&mut [0; 9]).unwrap(), 0);
    head.write_all(b"still there").unwrap();
    assert_eq!(exact(&mut agent, 11), b"still there");
    drop(head);
    assert_eq!(agent.read(&mut [0; 9]).unwrap(), 0);
    gateway.end();
    assert_eq!(gateway.thread.join().unwrap().unwrap(), End::Closed);
    assert!(!gateway.directory.exists());
}

#[test]
fn large_streams_go_through_unchanged_while_the_receiver_is_slow() {
    let mut gateway = start(|_| ());
    let (mut agent, mut head) = gateway.connect();
    let bytes: Vec<u8> = (0..20_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let sent = bytes.clone();
    let writer = thread::spawn(move || {
        agent.write_all(&sent).unwrap();
        agent
    });
    // Both buffers are full before the first read.
    thread::sleep(Duration::from_millis(200));
    assert!(exact(&mut head, bytes.len()) == bytes);
    let mut agent = writer.join().unwrap();
    let sent = bytes.clone();
    let writer = thread::spawn(move || head.write_all(&sent).unwrap());
    assert!(exact(&mut agent, bytes.len()) == bytes);
    writer.join().unwrap();
    gateway.end();
    gateway.thread.join().unwrap().unwrap();
}

#[test]
fn the_number_of_connections_is_bounded_and_freed() {
    let mut gateway = start(|settings| settings.max_connections = 2);
    let first = gateway.connect();
    let second = gateway.connect();
    let mut third = StdTcp::connect((Ipv4Addr::LOCALHOST, gateway.port)).unwrap();
    third.set_read_timeout(Some(LONG)).unwrap();
    assert!(matches!(third.read(&mut [0; 9]), Ok(0) | Err(_)));
    drop(first);
    // The gateway needs a moment to see that the first connection has ended.
    let deadline = Instant::now() + LONG;
    gateway.listener.set_nonblocking(true).unwrap();
    while gateway.listener.accept().is_err() {
        assert!(Instant::now() < deadline);
        let _again = StdTcp::connect((Ipv4Addr::LOCALHOST, gateway.port)).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    drop(second);
    gateway.end();
    gateway.thread.join().unwrap().unwrap();
}

#[test]
fn a_stranger_that_the_head_has_left_does_not_keep_its_connection() {
    let mut gateway = start(|settings| {
        settings.heartbeat_timeout = Duration::from_millis(400);
    });
    let mut input = gateway.input.as_ref().unwrap().try_clone().unwrap();
    let beats = thread::spawn(move || {
        while input.write_all(b"\n").is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    });
    let (mut stranger, head) = gateway.connect();
    drop(head);
    assert_eq!(stranger.read(&mut [0; 9]).unwrap(), 0);
    // The gateway closes its end for reading, too: a write fails sooner or later.
    let deadline = Instant::now() + LONG;
    thread::sleep(Duration::from_millis(500));
    while stranger.write_all(b"x").is_ok() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(20));
    }
    // The clone of the input is still open.
    gateway
        .input
        .take()
        .unwrap()
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    assert_eq!(gateway.thread.join().unwrap().unwrap(), End::Closed);
    beats.join().unwrap();
}

#[test]
fn a_silent_head_ends_the_gateway_which_cancels_and_removes() {
    let script = std::env::temp_dir().join(format!("rcgw-cancel-{}", std::process::id()));
    let cancelled = script.with_extension("done");
    fs::write(&script, format!("echo done >'{}'\n", cancelled.display())).unwrap();
    let mut gateway = start(|settings| {
        settings.heartbeat_timeout = Duration::from_millis(400);
        settings.cancel = Some(script.clone());
    });
    let mut session = Command::new("sh")
        .args(["-c", "read x", gateway.directory.to_str().unwrap()])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stranger = Command::new("sh")
        .args(["-c", "read x"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let pids = format!("{}\n{}\nnonsense\n1\n-1\n", session.id(), stranger.id());
    fs::write(gateway.directory.join("pids"), pids).unwrap();
    let (mut agent, _head) = gateway.connect();
    // Heartbeats keep the gateway alive for longer than its limit.
    for _ in 0..16 {
        gateway.input.as_mut().unwrap().write_all(b"\n").unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    assert!(!gateway.thread.is_finished());
    assert!(matches!(agent.read(&mut [0; 9]), Ok(0) | Err(_)));
    assert_eq!(gateway.thread.join().unwrap().unwrap(), End::Silent);
    assert_eq!(fs::read_to_string(&cancelled).unwrap(), "done\n");
    assert!(!gateway.directory.exists());
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(session.wait().unwrap().signal(), Some(libc::SIGTERM));
    assert!(stranger.try_wait().unwrap().is_none());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    let mut said = String::new();
    gateway.output.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("alive\n"), "{said}");
    let _ = fs::remove_file(script);
    let _ = fs::remove_file(cancelled);
}

#[test]
fn bytes_of_the_head_are_signs_of_life() {
    let mut gateway = start(|settings| settings.heartbeat_timeout = Duration::from_millis(400));
    let (mut agent, mut head) = gateway.connect();
    for _ in 0..16 {
        head.write_all(b"x").unwrap();
        exact(&mut agent, 1);
        thread::sleep(Duration::from_millis(50));
    }
    assert!(!gateway.thread.is_finished());
    gateway.end();
    assert_eq!(gateway.thread.join().unwrap().unwrap(), End::Closed);
}

#[test]
fn a_range_without_a_free_port_is_an_error() {
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let settings = Settings {
        socket: "/nowhere".into(),
        address: Ipv4Addr::LOCALHOST.into(),
        ports: (port, port),
        heartbeat_timeout: LONG,
        max_connections: 8,
        cancel: None,
        directory: PathBuf::new(),
    };
    let failed = run(&settings, io::empty(), io::sink()).unwrap_err();
    assert!(
        failed.to_string().contains(&format!("port {port}")),
        "{failed}"
    );
}
