//! Dials back to the head: for agents that a batch engine starts.
//!
//! A child connects and becomes the relay. The key is read in the child alone, so that neither the agent nor its
//! workers ever have it. The child is not a child of the agent but an orphan from its start: nothing that the
//! agent does with its children concerns the relay. It ends when either side of it ends.

use crate::platform::{fd, process, signals};
use crate::protocol::noise::{self, Dialer, Introduction, Key, Transport, Verdict};
use crate::relay;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};
use zeroize::Zeroize;

/// How long an attempt at one address may take.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the addresses are tried in turn.
const DIAL_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause between two rounds.
const ROUND_PAUSE: Duration = Duration::from_secs(2);
/// The largest file that is read.
const MAX_FILE: u64 = 64 * 1024;
/// The environment variable by which a job's script names the job.
pub const JOB_NAME: &str = "RUSTCLUSTER_JOB";

/// The status of an agent that the head does not need.
const NOT_NEEDED: u8 = 0;
/// The status of an agent that has failed.
const FAILED: u8 = 1;
/// What the child reports once the agent is connected; other bytes are the status to end with.
const CONNECTED: u8 = 255;

/// Signals that engines send to all processes of a job as a warning, and what terminals send. The agent decides
/// what they mean.
pub(super) const IGNORED: [libc::c_int; 8] = [
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGPIPE,
    libc::SIGQUIT,
    libc::SIGTSTP,
];

/// A key from its 64 hexadecimal digits.
pub fn key_of(text: &str) -> Option<Key> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut key = Key::default();
    for (byte, pair) in key.iter_mut().zip(digits.chunks(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = (16 * digit(pair[0])? + digit(pair[1])?) as u8;
    }
    Some(key)
}

/// What the file for dialling says.
#[derive(Debug)]
struct Target {
    addresses: Vec<(String, u16)>,
    launcher: u32,
    key: Key,
}

impl Target {
    /// Reads the file, which must be readable by the user alone.
    fn read(path: &Path) -> Result<Target, String> {
        let shown = path.display();
        let failed = |error: io::Error| format!("the file {shown} cannot be read: {error}");
        let mut file = File::open(path).map_err(failed)?;
        let facts = file.metadata().map_err(failed)?;
        if facts.uid() != process::user() {
            return Err(format!("the file {shown} belongs to another user"));
        }
        if facts.mode() & 0o077 != 0 {
            let mode = facts.mode() & 0o777;
            return Err(format!(
                "the file {shown} has mode {mode:o} and may be used by other users: its key is not used"
            ));
        }
        if !facts.is_file() || facts.len() > MAX_FILE {
            return Err(format!("{shown} is not a file that a head has written"));
        }
        // With room for all, so that no copy of the key is left behind.
        let mut text = String::with_capacity(MAX_FILE as usize + 1);
        let read = (&mut file).take(MAX_FILE).read_to_string(&mut text);
        let target = read.map_err(failed).and_then(|_| {
            let broken = || format!("{shown} is not a file that a head has written");
            Target::parse(&text).ok_or_else(broken)
        });
        text.zeroize();
        target
    }

    fn parse(text: &str) -> Option<Target> {
        let (mut addresses, mut launcher, mut key) = (Vec::new(), None, None);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next(), words.next()) {
                (Some("address"), Some(host), Some(port)) => {
                    addresses.push((host.to_owned(), port.parse().ok()?));
                }
                (Some("launcher"), Some(number), None) => launcher = Some(number.parse().ok()?),
                (Some("key"), Some(hex), None) => key = Some(key_of(hex)?),
                (None, ..) => {}
                _ => return None,
            }
        }
        Some(Target {
            addresses: Some(addresses).filter(|addresses| !addresses.is_empty())?,
            launcher: launcher?,
            key: key?,
        })
    }
}

/// Why there is no connection.
enum Failure {
    /// The head has answered: there is no point in another attempt.
    Verdict(Verdict),
    /// The address could not be used.
    Attempt(String),
}

/// A connection that the head has accepted.
pub(super) struct Connected {
    pub(super) tcp: TcpStream,
    pub(super) transport: Transport,
    pub(super) received: Vec<u8>,
}

/// What an agent proves to a head, and says of itself.
pub(super) struct Card<'a> {
    /// The number of the key.
    pub(super) launcher: u32,
    pub(super) key: &'a Key,
    pub(super) introduction: &'a Introduction,
    /// How long an attempt at one address may take.
    pub(super) limit: Duration,
}

fn attempt(tcp: TcpStream, card: &Card<'_>) -> Result<Connected, Failure> {
    let failed = |error: io::Error| {
        Failure::Attempt(match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "it was reached and does not answer".to_owned()
            }
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                "it was reached and has closed the connection: the head may have another key, or be gone"
                    .to_owned()
            }
            _ => error.to_string(),
        })
    };
    let until = Instant::now() + card.limit;
    relay::prepare(&tcp).map_err(failed)?;
    tcp.set_write_timeout(Some(card.limit)).map_err(failed)?;
    let noise = |error: noise::NoiseError| Failure::Attempt(error.to_string());
    let (mut dialer, mut out) =
        Dialer::start(card.key, card.launcher, card.introduction).map_err(noise)?;
    let verdict = loop {
        relay::write_all(&tcp, &out).map_err(failed)?;
        out.clear();
        let left = until.saturating_duration_since(Instant::now());
        let left = left.max(Duration::from_millis(1));
        tcp.set_read_timeout(Some(left)).map_err(failed)?;
        let mut buffer = [0; 4096];
        let n = match (&tcp).read(&mut buffer) {
            Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        if let Some(verdict) = dialer.feed(&buffer[..n], &mut out).map_err(noise)? {
            break verdict;
        }
    };
    if verdict != Verdict::Accepted {
        return Err(Failure::Verdict(verdict));
    }
    let (transport, received) = dialer.finish().map_err(noise)?;
    Ok(Connected {
        tcp,
        transport,
        received,
    })
}

/// Tries each address once, in turn. Returns the connection or the verdict of the first head that answers, or else what
/// the problem of each address is.
pub(super) fn try_all(
    addresses: &[(String, u16)],
    card: &Card<'_>,
) -> Result<Result<Connected, Verdict>, Vec<String>> {
    let mut problems = Vec::new();
    for (host, port) in addresses {
        let found: io::Result<Vec<SocketAddr>> = (host.as_str(), *port)
            .to_socket_addrs()
            .map(Iterator::collect);
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                problems.push(format!("{host} port {port}: {error}"));
                continue;
            }
        };
        for address in found {
            let connected = TcpStream::connect_timeout(&address, card.limit)
                .map_err(|error| Failure::Attempt(error.to_string()))
                .and_then(|tcp| attempt(tcp, card));
            match connected {
                Ok(connected) => return Ok(Ok(connected)),
                Err(Failure::Verdict(verdict)) => return Ok(Err(verdict)),
                Err(Failure::Attempt(problem)) => {
                    problems.push(format!("{host} port {port} ({address}): {problem}"));
                }
            }
        }
    }
    Err(problems)
}

/// Tries all addresses in turn, again and again.
fn connect(target: &Target, introduction: &Introduction) -> Result<Connected, Failure> {
    let began = Instant::now();
    let card = Card {
        launcher: target.launcher,
        key: &target.key,
        introduction,
        limit: ATTEMPT_TIMEOUT,
    };
    let mut round = 0;
    loop {
        round += 1;
        let problems = match try_all(&target.addresses, &card) {
            Ok(answered) => return answered.map_err(Failure::Verdict),
            Err(problems) => problems,
        };
        if began.elapsed() + ROUND_PAUSE > DIAL_TIMEOUT {
            let mut text = format!(
                "this node ({}) cannot reach the head, after {round} rounds in {:.0} seconds:",
                introduction.hostname,
                began.elapsed().as_secs_f64()
            );
            for problem in problems {
                text.push_str("\n  ");
                text.push_str(&problem);
            }
            text.push_str(
                "\nset `address =` of the launcher to an address of the head that this node can reach, \
                 `port =` to a port that firewalls let pass, or use `login =` if nodes cannot reach the \
                 head at all",
            );
            return Err(Failure::Attempt(text));
        }
        thread::sleep(ROUND_PAUSE);
    }
}

fn say(text: &str) {
    // Nobody may read it.
    let _ = writeln!(io::stderr(), "rustcluster: {text}");
}

/// What the child does: connects, reports, and relays. Returns its exit status.
fn child(path: &Path, local: &UnixStream, report: File) -> u8 {
    let mut report = report;
    let mut fail = |text: &str, status: u8| {
        say(text);
        let _ = report.write_all(&[status]);
        status
    };
    let target = match Target::read(path) {
        Ok(target) => target,
        Err(problem) => return fail(&problem, FAILED),
    };
    let incarnation = match noise::random() {
        Ok(incarnation) => incarnation,
        Err(error) => {
            return fail(
                &format!("the system has no random numbers: {error}"),
                FAILED,
            );
        }
    };
    let introduction = Introduction::new(incarnation, &node_name(), &job_name());
    let connected = connect(&target, &introduction);
    drop(target);
    let Connected {
        tcp,
        transport,
        received,
    } = match connected {
        Ok(connected) => connected,
        Err(Failure::Verdict(Verdict::NotNeeded(reason))) => {
            return fail(&format!("this agent is not needed: {reason}"), NOT_NEEDED);
        }
        Err(Failure::Verdict(Verdict::Refused(reason))) => {
            return fail(
                &format!("the head has refused this agent: {reason}"),
                FAILED,
            );
        }
        Err(Failure::Verdict(Verdict::Accepted)) => return fail("no connection", FAILED),
        Err(Failure::Attempt(problem)) => return fail(&problem, FAILED),
    };
    if report.write_all(&[CONNECTED]).is_err() {
        return FAILED;
    }
    drop(report);
    // Nothing of the job's log is kept open, which whoever waits for its end would notice.
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        for target in 0..3 {
            let _ = fd::redirect(null.as_raw_fd(), target);
        }
    }
    u8::from(relay::run(&tcp, local, transport, &received).is_err())
}

/// Closes all descriptors but the standard ones and these.
pub(super) fn close_others(keep: &[RawFd]) {
    let open: Vec<RawFd> = match fs::read_dir("/dev/fd") {
        Ok(entries) => entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect(),
        Err(_) => (0..1024).collect(),
    };
    for fd in open {
        if fd > 2 && !keep.contains(&fd) {
            // SAFETY: this process is a fork that uses none of the descriptors that it closes.
            unsafe { libc::close(fd) };
        }
    }
}

/// Ends this process at once. No exit handler of the program that it is a fork of runs.
pub(super) fn exit_now(status: u8) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status.into()) }
}

/// Connects this process to the head, as the file at `path` says, and makes that connection its stdin and
/// stdout. Its stdout before, the job's log, gives way to its stderr.
///
/// # Errors
/// The status to end with, when there is no connection. The reason was written to stderr.
pub fn dial(path: &Path) -> Result<(), u8> {
    let failed = |error: io::Error| {
        say(&format!("the agent cannot dial back: {error}"));
        FAILED
    };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let (report, report_end) = fd::pipe().map_err(failed)?;
    start_relay(path, theirs, report_end).map_err(failed)?;
    let mut status = [FAILED];
    match File::from(report).read_exact(&mut status) {
        Ok(()) if status == [CONNECTED] => {}
        Ok(()) => return Err(status[0]),
        Err(_) => return Err(failed(io::Error::other("the relay was killed"))),
    }
    for target in [0, 1] {
        fd::redirect(ours.as_raw_fd(), target).map_err(failed)?;
    }
    Ok(())
}

fn start_relay(path: &Path, local: UnixStream, report: OwnedFd) -> io::Result<()> {
    fd::flush_stdio();
    // SAFETY: R has one thread. Its child uses the memory that it has inherited, and calls no R.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid > 0 {
        // The relay alone keeps them, so that the agent notices its end.
        drop((local, report));
        process::reap(pid as u32);
        return Ok(());
    }
    // SAFETY: as above.
    let grandchild = unsafe { libc::fork() };
    if grandchild != 0 {
        exit_now(u8::from(grandchild < 0));
    }
    signals::ignore(&IGNORED);
    process::set_name(c"rustcluster-rly");
    close_others(&[local.as_raw_fd(), report.as_raw_fd()]);
    let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        child(path, &local, File::from(report))
    }));
    exit_now(status.unwrap_or(FAILED));
}

/// The name of the job. R removes the variable, which is not for the workers: see [`remember`].
pub(super) fn job_name() -> String {
    let remembered = JOB.get().cloned();
    remembered.unwrap_or_else(|| std::env::var(JOB_NAME).unwrap_or_default())
}

/// Remembers the name of the job, by which an agent introduces itself again if it loses its head.
pub fn remember() {
    let _ = JOB.set(std::env::var(JOB_NAME).unwrap_or_default());
}

static JOB: OnceLock<String> = OnceLock::new();

/// The node's name in the batch engine's own words, which may differ from that of the machine.
pub(super) fn node_name() -> String {
    let name = std::env::var("SLURMD_NODENAME");
    name.unwrap_or_else(|_| process::hostname())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const KEY: &str = "00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00fF";

    #[test]
    fn a_file_of_a_head_is_understood_and_others_are_not() {
        let text = format!("address ::1 4000\naddress host.name 4001\nlauncher 3\nkey {KEY}\n");
        let target = Target::parse(&text).unwrap();
        let expected = [("::1".to_owned(), 4000), ("host.name".to_owned(), 4001)];
        assert_eq!(target.addresses, expected);
        assert_eq!((target.launcher, target.key[1]), (3, 255));
        for (old, new) in [
            ("4000", "70000"),
            ("launcher 3\n", ""),
            ("00ff", "0g"),
            ("00ff", ""),
            ("address", "addresses"),
            ("key ", "# "),
        ] {
            assert!(
                Target::parse(&text.replacen(old, new, 1)).is_none(),
                "{new}"
            );
        }
        assert!(Target::parse(&format!("launcher 3\nkey {KEY}\n")).is_none());
        assert!(key_of(&"é".repeat(32)).is_none());
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let name = format!("rustcluster-dial-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let text = format!("address 127.0.0.1 4000\nlauncher 3\nkey {KEY}\n");
        fs::write(&path, text).unwrap();
        for (mode, works) in [(0o640, false), (0o602, false), (0o600, true), (0o400, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let read = Target::read(&path);
            assert_eq!(read.is_ok(), works, "{mode:o}: {read:?}");
        }
        fs::remove_file(&path).unwrap();
        let problem = Target::read(&path).unwrap_err();
        assert!(problem.contains("cannot be read"), "{problem}");
    }
}
