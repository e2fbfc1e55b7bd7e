//! Results that a worker saves before it reports them.
//!
//! A worker that sees the directory of the run appends its results to a file of its own there; the head then need not
//! write them. Any other worker writes the results of each answer to a file in a directory of its host. The head
//! removes such a file, through the next message to that host, when it has stored the results. What is left after a
//! failure of the head or of its connection is fetched later.

use super::output::{Item, Output, Series};
use super::record::RunId;
use super::{EXTENSION, RESULTS};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The directory, within the folder of a run on a host, of files that are being written.
const INCOMPLETE: &str = "incomplete";

/// Where a worker saves its results. Part of each message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SaveRequest {
    /// The run.
    pub run: RunId,
    /// The folder for the run in the directory of the host.
    pub folder: String,
    /// The directory of the host: see [`folder`].
    pub host_dir: String,
    /// The directory of the run, as the head names it.
    pub run_dir: String,
    /// The name of the file in the directory of the run by which a worker finds that it sees the directory.
    pub probe: String,
    /// The content of that file.
    pub nonce: String,
    /// The version of R, as `R_VERSION` of its C API.
    pub r_version: u32,
    /// Whether results have to survive a crash of the host.
    pub durable: bool,
    /// Whether the head needs all results in the answers.
    pub values: bool,
    /// Only answers with at least this number of bytes are saved, and only in the directory of the run, where the head
    /// would write them otherwise. 0: all answers are saved, on the host if need be.
    pub least: u64,
    /// Files of the host that are no longer needed.
    pub remove: Vec<String>,
}

const SEPARATOR: char = '\0';

impl SaveRequest {
    /// Returns the request as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let run = String::from_utf8_lossy(&self.run);
        let version = self.r_version.to_string();
        let least = self.least.to_string();
        let flag = |is: bool| if is { "1" } else { "0" };
        let mut fields = vec![
            &*run,
            &self.folder,
            &self.host_dir,
            &self.run_dir,
            &self.probe,
            &self.nonce,
            &version,
            flag(self.durable),
            flag(self.values),
            &least,
        ];
        fields.extend(self.remove.iter().map(String::as_str));
        fields.join("\0").into_bytes()
    }

    /// Parses a request.
    pub fn decode(bytes: &[u8]) -> Option<SaveRequest> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut fields = text.split(SEPARATOR);
        Some(SaveRequest {
            run: fields.next()?.as_bytes().try_into().ok()?,
            folder: fields.next()?.to_owned(),
            host_dir: fields.next()?.to_owned(),
            run_dir: fields.next()?.to_owned(),
            probe: fields.next()?.to_owned(),
            nonce: fields.next()?.to_owned(),
            r_version: fields.next()?.parse().ok()?,
            durable: fields.next()? == "1",
            values: fields.next()? == "1",
            least: fields.next()?.parse().ok()?,
            remove: fields.map(str::to_owned).collect(),
        })
    }

    /// Whether a saver for the other request may serve this one.
    fn is_like(&self, other: &SaveRequest) -> bool {
        let other = SaveRequest {
            remove: self.remove.clone(),
            ..other.clone()
        };
        *self == other
    }
}

/// Where the results of an answer were saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// Nowhere, for this reason.
    Nowhere(String),
    /// In the directory of the run.
    InRun,
    /// In this file of the host.
    OnHost(String),
}

impl Saved {
    /// Returns a number and a text, for a message.
    pub fn encode(&self) -> (u8, &str) {
        match self {
            Saved::Nowhere(reason) => (0, reason),
            Saved::InRun => (1, ""),
            Saved::OnHost(name) => (2, name),
        }
    }

    /// The reverse of [`Saved::encode`].
    pub fn decode(kind: u8, text: String) -> Option<Saved> {
        match kind {
            0 => Some(Saved::Nowhere(text)),
            1 => Some(Saved::InRun),
            2 => Some(Saved::OnHost(text)),
            _ => None,
        }
    }
}

#[derive(Debug)]
enum Place {
    InRun(Series, Option<Output>),
    OnHost { series: Series, count: u64 },
}

/// Saves the results of a worker.
#[derive(Debug)]
pub struct Saver {
    request: SaveRequest,
    pid: u32,
    place: Place,
}

impl Saver {
    /// Creates a saver for this request.
    pub fn new(request: &SaveRequest) -> Saver {
        let probe = Path::new(&request.run_dir).join(&request.probe);
        let sees_run = fs::read_to_string(probe).is_ok_and(|found| found == request.nonce);
        // Pids repeat, on other hosts and after a while.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let nanos = since.map_or(0, |since| since.as_nanos());
        let pid = std::process::id();
        let series = Series {
            folder: match sees_run {
                true => Path::new(&request.run_dir).join(RESULTS),
                false => folder_of(request),
            },
            run: request.run,
            r_version: request.r_version,
            name: Some(format!("w{pid}-{nanos:x}-")),
            // What is in the run is reported as durable.
            durable: request.durable || sees_run,
        };
        Saver {
            request: request.clone(),
            pid,
            place: match sees_run {
                true => Place::InRun(series, None),
                false => Place::OnHost { series, count: 0 },
            },
        }
    }

    /// Whether this saver may serve the request.
    pub fn serves(&self, request: &SaveRequest) -> bool {
        // A forked worker has the saver of the process that it was forked from.
        self.pid == std::process::id() && request.is_like(&self.request)
    }

    /// Saves the results of an answer.
    pub fn save(&mut self, items: &[Item]) -> Saved {
        let is_optional = self.request.least > 0;
        if is_optional && matches!(self.place, Place::OnHost { .. }) {
            return Saved::Nowhere(String::new());
        }
        let saved = match &mut self.place {
            Place::InRun(series, output) => append(series, output, items).map(|()| Saved::InRun),
            Place::OnHost { series, count } => {
                *count += 1;
                write_alone(series, *count, items).map(Saved::OnHost)
            }
        };
        saved.unwrap_or_else(|error| {
            // The head will say why it cannot write them either.
            let reason = if is_optional {
                String::new()
            } else {
                error.to_string()
            };
            Saved::Nowhere(reason)
        })
    }

    /// Removes files that are no longer needed.
    pub fn remove(request: &SaveRequest) {
        let folder = folder_of(request);
        for name in &request.remove {
            // A name with a separator is none of ours.
            if !name.contains('/') && name.ends_with(EXTENSION) {
                let _ = fs::remove_file(folder.join(name));
            }
        }
    }
}

/// Returns the folder of a host with this name, for the files of a run. `host_dir`: a path, which may start with `~/`, or `""` for the
/// user's cache.
pub fn folder(host_dir: &str, name: &str) -> PathBuf {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = || variable("HOME").unwrap_or_else(std::env::temp_dir);
    let dir = match (host_dir, host_dir.strip_prefix("~/")) {
        ("", _) => {
            let cache = variable("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache"));
            cache.join("rustcluster").join("results")
        }
        (_, Some(rest)) => home().join(rest),
        (path, None) => PathBuf::from(path),
    };
    dir.join(name)
}

fn folder_of(request: &SaveRequest) -> PathBuf {
    folder(&request.host_dir, &request.folder)
}

fn append(series: &Series, output: &mut Option<Output>, items: &[Item]) -> io::Result<()> {
    let mut current = match output.take() {
        Some(current) => current,
        None => Output::start(series.clone())?,
    };
    let written = current.write(items);
    if written.is_err() {
        current.drop_file();
    } else {
        *output = Some(current);
    }
    written
}

/// Writes results to a file of their own, which has its name only once it is complete: others fetch and remove files.
fn write_alone(series: &Series, count: u64, items: &[Item]) -> io::Result<String> {
    let folder = series.folder.join(INCOMPLETE);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)?;
    let name = series.name.as_deref().unwrap_or_default();
    let mut output = Output::start(Series {
        folder,
        name: Some(format!("{name}{count}-")),
        ..series.clone()
    })?;
    let moved = output.write(items).and_then(|()| {
        let path = output
            .path()
            .and_then(|path| Some((path, path.file_name()?)));
        let (path, name) = path.ok_or_else(|| io::Error::other("no file was made"))?;
        fs::rename(path, series.folder.join(name))?;
        if series.durable {
            File::open(&series.folder)?.sync_all()?;
        }
        Ok(name.to_string_lossy().into_owned())
    });
    if moved.is_err() {
        output.drop_file();
    }
    moved
}
