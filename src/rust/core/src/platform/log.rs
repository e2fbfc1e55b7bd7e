//! The log of a process: events of crate tracing, one line each, in a file of the process's own.
//!
//! Off unless the environment variable [`DIRECTIVES`] says otherwise; then an event costs one look at a
//! static variable. The subscriber is our own because an agent forks: no lock is held across a write, and a
//! worker gets a file of its own under the descriptor that its agent's had. Events say what happens to
//! which task, worker and host. They never hold what tasks, environment variables or files contain.

use super::signals::without_file_size_signal;
use super::{fd, process};
use std::fmt::{self, Write as _};
use std::fs::{DirBuilder, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Event, Metadata};
use tracing_subscriber::filter::Targets;

/// The environment variable that says what is logged.
pub const DIRECTIVES: &str = "RUSTCLUSTER_LOG";
/// The environment variable that names the directory of the log files. Default: that of temporary files.
pub const DIRECTORY: &str = "RUSTCLUSTER_LOG_DIR";

/// What the process is logged as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An R session that makes clusters.
    Head,
    /// A host's agent.
    Agent,
    /// The worker of this rank, from 0.
    Worker(u32),
}

/// Why nothing is logged although something should be.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// The environment variable that is to blame.
    pub variable: &'static str,
    /// What is wrong with the variable's value.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.variable, self.reason)
    }
}

/// What is logged, and as whose.
#[derive(Debug, Default, PartialEq)]
struct Settings {
    filter: Targets,
    path: PathBuf,
    /// As lines name the process.
    name: String,
}

/// The current settings; null before they are set for the first time. Earlier settings are never freed, because
/// another thread may be reading them.
static SETTINGS: AtomicPtr<Settings> = AtomicPtr::new(std::ptr::null_mut());

/// The log file. When another file replaces it, the descriptor stays the same.
static FILE: OnceLock<File> = OnceLock::new();

fn settings() -> Option<&'static Settings> {
    // SAFETY: null, or from Box::leak in `put`, so valid for ever and never changed.
    unsafe { SETTINGS.load(Ordering::Acquire).as_ref() }
}

fn put(settings: Settings) {
    SETTINGS.store(Box::leak(Box::new(settings)), Ordering::Release);
    // Fails from the second call on, when the subscriber is installed already.
    let _ = tracing::subscriber::set_global_default(Log);
    tracing::callsite::rebuild_interest_cache();
}

/// Begins, changes or ends the log as the environment now says. To be called on the thread that may change
/// the environment.
///
/// # Errors
/// When a variable's value is no good. The log is as it was before.
pub fn start(role: Role) -> Result<(), Problem> {
    let text = |variable: &'static str| match std::env::var(variable) {
        Ok(text) => Ok(Some(text).filter(|text| !text.trim().is_empty())),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(Problem {
            variable,
            reason: "it is no valid text".into(),
        }),
    };
    let Some(directives) = text(DIRECTIVES)? else {
        end();
        return Ok(());
    };
    let filter = parse(&directives).map_err(|reason| Problem {
        variable: DIRECTIVES,
        reason,
    })?;
    let directory = text(DIRECTORY)?.map_or_else(std::env::temp_dir, PathBuf::from);
    if !directory.is_absolute() {
        // Each process has a working directory of its own, and no shell expands "~".
        return Err(Problem {
            variable: DIRECTORY,
            reason: format!("'{}' is not an absolute path", directory.display()),
        });
    }
    let host = process::hostname();
    let pid = std::process::id();
    let path = directory.join(file_name(role, &host, pid));
    let name = match role {
        Role::Head => format!("head@{host}[{pid}]"),
        Role::Agent => format!("agent@{host}[{pid}]"),
        Role::Worker(rank) => format!("worker {}@{host}[{pid}]", u64::from(rank) + 1),
    };
    let settings_now = Settings { filter, path, name };
    // Also if nothing has changed: the file may have been removed.
    open(&directory, &settings_now.path).map_err(|error| Problem {
        variable: DIRECTORY,
        reason: format!("{} cannot be written: {error}", settings_now.path.display()),
    })?;
    if settings() != Some(&settings_now) {
        put(settings_now);
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "log begins");
    Ok(())
}

/// Ends the log. The file stays open.
fn end() {
    if settings().is_some_and(|before| before.filter != Targets::new()) {
        put(Settings::default());
    }
}

/// Like [`start`], for a process that can report a failure only on its standard error. It then runs without a log,
/// because a forked worker must not write to the file of its agent.
pub fn start_or_say(role: Role) {
    if let Err(problem) = start(role) {
        end();
        eprintln!("rustcluster: nothing is logged. {problem}");
    }
}

/// The file that this process logs to, if it does.
pub fn path() -> Option<&'static Path> {
    let path = settings().map(|settings| settings.path.as_path());
    path.filter(|path| !path.as_os_str().is_empty())
}

fn parse(directives: &str) -> Result<Targets, String> {
    let usage = "use a level (error, warn, info, debug, trace), or parts with levels, as in \
                 \"info,rustcluster::head=trace\"";
    // The parser reads 1 to 5 as levels: whoever sets 1 to switch the log on would get errors only.
    let number = |directive: &&str| {
        let level = directive.rsplit('=').next().unwrap_or_default().trim();
        level.parse::<f64>().is_ok()
    };
    if let Some(directive) = directives.split(',').find(number) {
        return Err(format!("'{directive}' has a number for a level; {usage}"));
    }
    let filter: Targets = directives
        .parse()
        .map_err(|_| format!("'{directives}' is no list of directives; {usage}"))?;
    let ours = |target: &str| {
        let mut names = target.split("::");
        names.next() == Some(PREFIX) && names.next().is_none_or(|part| PARTS.contains(&part))
    };
    match filter.iter().find(|(target, _)| !ours(target)) {
        Some((target, _)) => Err(format!(
            "'{target}' is neither a level nor a part of rustcluster ({}); {usage}",
            PARTS.join(", ")
        )),
        None => Ok(filter),
    }
}

/// What the names of all parts begin with; the core's own name would say nothing more to users.
const PREFIX: &str = "rustcluster";

/// The parts that log something.
const PARTS: [&str; 4] = ["head", "agent", "worker", "platform"];

fn part_of(metadata: &Metadata<'_>) -> String {
    let target = metadata.target();
    match target.strip_prefix("rustcluster_core") {
        Some(rest) => format!("{PREFIX}{rest}"),
        None => target.to_owned(),
    }
}

fn file_name(role: Role, host: &str, pid: u32) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let host: String = host.chars().filter(|&c| safe(c)).collect();
    let role = match role {
        Role::Head => "head".to_owned(),
        Role::Agent => "agent".to_owned(),
        Role::Worker(rank) => format!("worker{}", u64::from(rank) + 1),
    };
    format!("rustcluster-{host}-{role}-{pid}.log")
}

/// Opens the file for appending. Creates it and its directory if necessary. Refuses files of other users, files
/// that are not regular, and hard links: other users may be able to write to the directory.
fn open(directory: &Path, path: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let file = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.nlink() != 1 || found.uid() != process::user() {
        return Err(io::Error::other("it is not a plain file of this user's"));
    }
    match FILE.get() {
        Some(first) => fd::replace(first.as_raw_fd(), file.as_raw_fd()),
        None => {
            // There is no other thread that opens a log.
            let _ = FILE.set(file);
            Ok(())
        }
    }
}

/// Writes each event that is wanted.
struct Log;

impl Subscriber for Log {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match self.enabled(metadata) {
            true => Interest::always(),
            false => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        settings().is_some_and(|settings| {
            let part = part_of(metadata);
            metadata.is_event() && settings.filter.would_enable(&part, metadata.level())
        })
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // No hint would mean that everything is wanted.
        let filter = settings().map(|settings| &settings.filter);
        let levels = filter.into_iter().flat_map(|filter| {
            let of_parts = filter.iter().map(|(_, level)| level);
            of_parts.chain(filter.default_level())
        });
        Some(levels.max().unwrap_or(LevelFilter::OFF))
    }

    fn event(&self, event: &Event<'_>) {
        let (Some(settings), Some(mut file)) = (settings(), FILE.get()) else {
            return;
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = line(now.unwrap_or_default(), &settings.name, event);
        // One write, so that lines are not mixed. A failure, such as a full disk, cannot be reported anywhere.
        let _ = without_file_size_signal(|| file.write_all(line.as_bytes()));
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn line(now: Duration, name: &str, event: &Event<'_>) -> String {
    let metadata = event.metadata();
    let level = metadata.level();
    let mut fields = Fields(String::new());
    event.record(&mut fields);
    let (time, part) = (utc(now), part_of(metadata));
    let mut line = String::with_capacity(160);
    // Writing to a string cannot fail.
    let _ = write!(line, "{time} {level:>5} {name} {part}:");
    for c in fields.0.chars() {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    line.push('\n');
    line
}

/// The message, and the fields after it.
struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

/// A time since 1970 as in "2026-11-29T04:35:04.123456Z".
fn utc(since: Duration) -> String {
    let seconds = since.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March, so that the day that some do not have is their last: Howard Hinnant's algorithm.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + 400 * era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_micros()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn times_are_dates() {
        let at = |seconds: u64| utc(Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000Z");
        assert_eq!(at(951_868_800), "2000-03-01T00:00:00.000000Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59.000000Z");
        assert_eq!(
            utc(Duration::new(1_795_926_904, 12_345_000)),
            "2026-11-29T04:35:04.012345Z"
        );
    }

    #[test]
    fn directives_are_levels_and_parts_with_levels() {
        let filter = parse("info,rustcluster::head=trace").unwrap();
        assert!(filter.would_enable("rustcluster::agent", &Level::INFO));
        assert!(!filter.would_enable("rustcluster::agent", &Level::DEBUG));
        assert!(filter.would_enable("rustcluster::head::scheduler", &Level::TRACE));
        assert!(parse("off").is_ok() && parse("WARN").is_ok());
    }

    #[test]
    fn a_bad_directive_is_named() {
        for bad in [
            "verbose",
            "rustcluster::head=loud",
            "rustclusters=info",
            "rustcluster::heads=info",
            "info,,x",
            "1",
            " 2",
            "-1",
            "info,rustcluster::head=5",
            "a=b=c",
        ] {
            let reason = parse(bad).unwrap_err();
            assert!(reason.contains("use a level"), "{bad}: {reason}");
        }
    }

    #[test]
    fn a_host_cannot_lead_a_file_out_of_its_directory() {
        let name = file_name(Role::Worker(16), "../no de/x", 7);
        assert_eq!(name, "rustcluster-..nodex-worker17-7.log");
        assert_eq!(file_name(Role::Head, "a", 7), "rustcluster-a-head-7.log");
    }
}
