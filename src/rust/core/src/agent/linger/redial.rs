//! How an agent that dialled back looks for another head: a child of the agent dials the addresses of the head before,
//! again and again. Once a head has accepted it, the child is the relay of the connection, as the one of the first
//! connection is: see [`dial`].

use crate::agent::dial::{self, Card};
use crate::platform::{fd, process, signals, socket};
use crate::protocol::noise::{self, Introduction, Key, Verdict};
use crate::relay;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long an attempt at one address may take.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// The pause between two rounds.
const ROUND_PAUSE: Duration = Duration::from_secs(1);

/// What the child reports once a head has accepted the agent. The bytes of the head follow.
const CONNECTED: u8 = b'C';
/// What the child reports when the head has another agent in this one's place.
const REPLACED: u8 = b'R';

/// What an agent is told that looks for a head, when the head has another agent in its place.
pub const HAS_ANOTHER: &str = "another agent has taken the place of this one";

/// What the child needs to know.
pub(super) struct Order<'a> {
    /// The number of the key, and the key.
    pub(super) key: &'a (u32, Key),
    pub(super) addresses: &'a [(String, u16)],
    /// The name of the agent's directory.
    pub(super) name: &'a str,
}

/// What the child has reported.
pub(super) enum News {
    /// Nothing yet.
    None,
    /// A head has accepted the agent.
    Connected,
    /// The head has another agent in this one's place.
    Replaced,
    /// The child has ended.
    Lost,
}

/// The child, as the agent sees it. Dropping the value ends the child.
pub(super) struct Redial {
    pub(super) stream: UnixStream,
    pub(super) pid: u32,
}

impl Redial {
    /// Forks the child.
    ///
    /// # Errors
    /// When no descriptor or process is available.
    pub(super) fn start(order: &Order<'_>) -> io::Result<Redial> {
        let (stream, theirs) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let agent = std::process::id();
        fd::flush_stdio();
        // The handlers of signals are those of R and of the agent, and must not run in the child.
        let pid = signals::with_all_blocked(|| {
            // SAFETY: the agent has one thread, so the child is a complete copy of it.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                let run = || child(order, &theirs, agent);
                let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
                dial::exit_now(u8::from(!matches!(status, Ok(Ok(())))));
            }
            pid
        });
        match u32::try_from(pid) {
            Ok(pid) => Ok(Redial { stream, pid }),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Reads what the child has reported.
    pub(super) fn read(&self) -> News {
        let mut report = [0];
        loop {
            return match (&self.stream).read(&mut report) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => News::None,
                Ok(1) if report == [CONNECTED] => News::Connected,
                Ok(1) if report == [REPLACED] => News::Replaced,
                _ => News::Lost,
            };
        }
    }
}

/// What the child does. It writes no log: the file of the agent's log is closed here.
fn child(order: &Order<'_>, mut local: &UnixStream, agent: u32) -> io::Result<()> {
    // While no head is connected, nothing of the agent has to be delivered.
    process::die_with_parent(agent);
    signals::ignore(&dial::IGNORED);
    process::set_name(c"rustcluster-rly");
    dial::close_others(&[local.as_raw_fd()]);
    // SAFETY: no memory effects. Signals to the group of the agent do not reach the child.
    unsafe { libc::setsid() };
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for target in 0..3 {
        fd::redirect(null.as_raw_fd(), target)?;
    }
    let mut introduction =
        Introduction::new(noise::random()?, &dial::node_name(), &dial::job_name());
    introduction.lingers = format!("{} {agent}", order.name);
    let card = Card {
        launcher: order.key.0,
        key: &order.key.1,
        introduction: &introduction,
        limit: ATTEMPT_TIMEOUT,
    };
    loop {
        match dial::try_all(order.addresses, &card) {
            Ok(Ok(connected)) => {
                // What the agent writes last has to be delivered.
                process::outlive_parent();
                local.write_all(&[CONNECTED])?;
                let dial::Connected {
                    tcp,
                    transport,
                    received,
                } = connected;
                return relay::run(&tcp, local, transport, &received);
            }
            Ok(Err(Verdict::Refused(reason))) if reason == HAS_ANOTHER => {
                return local.write_all(&[REPLACED]);
            }
            // The head is another one's, or is not ready yet, or there is none.
            Ok(Err(_)) | Err(_) => {}
        }
        if has_ended(local)? {
            return Ok(());
        }
    }
}

/// Pauses. Returns whether the agent does not wait for a head any more: it writes nothing before.
fn has_ended(mut local: &UnixStream) -> io::Result<bool> {
    let read = socket::Interest {
        read: true,
        write: false,
    };
    let none = socket::Interest::default();
    let fd = local.as_raw_fd();
    socket::wait(&[(fd, read), (fd, none)], Some(ROUND_PAUSE))?;
    local.set_nonblocking(true)?;
    let ended = local.read(&mut [0]).is_ok();
    local.set_nonblocking(false)?;
    Ok(ended)
}
