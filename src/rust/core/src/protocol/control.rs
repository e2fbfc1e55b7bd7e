//! Control messages: what head and agent send each other besides tasks and results.
//!
//! This is the only module that knows bincode. The crate is complete but no longer maintained
//! (RUSTSEC-2025-0141), so it is pinned, decodes under a size limit, and stays behind
//! [`encode`] and [`decode`].

use crate::platform::exit::Exit;
use crate::protocol::frame::{FIRST, Frame, Kind, LAST, MAX_BODY};
use crate::protocol::ids::Rank;
use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Version of the wire protocol. Head and agent must have the same.
pub const PROTOCOL: u32 = 13;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<MAX_BODY>> = bincode::config::standard()
    .with_little_endian()
    .with_fixed_int_encoding()
    .with_limit::<MAX_BODY>();

/// How each side introduces itself: the first message on a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's [`PROTOCOL`].
    pub protocol: u32,
    /// Version of the rustcluster package.
    pub package: String,
    /// Version of R, as in "4.2.2".
    pub r_version: String,
    /// The platform as R names it, as in "x86_64-pc-linux-gnu".
    pub platform: String,
    /// Whether the sender's machine stores the most significant byte first.
    pub big_endian: bool,
    /// The sender's process number.
    pub pid: u32,
    /// The host's own name for itself.
    pub hostname: String,
    /// Cores that this process may use.
    pub cores: u32,
    /// Bytes of memory, 0 if unknown.
    pub memory_total: u64,
    /// Bytes of memory that new processes may take, 0 if unknown.
    pub memory_available: u64,
}

impl Hello {
    /// Checks whether the two sides can talk to each other. The error names both.
    pub fn check(&self, other: &Hello) -> Result<(), String> {
        if self.protocol != other.protocol || self.package != other.package {
            return Err(format!(
                "rustcluster {} (protocol {}) on {} cannot talk to rustcluster {} (protocol {}) on {}: \
                 install the same version on both",
                self.package,
                self.protocol,
                self.hostname,
                other.package,
                other.protocol,
                other.hostname
            ));
        }
        Ok(())
    }
}

/// The start method: how an agent starts its workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartMode {
    /// `fork()` of the agent.
    Fork,
    /// A separate R process.
    Spawn,
}

/// Where the output of workers goes. The tail that error messages show is recorded in any case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outfile {
    /// Nowhere else.
    Discard,
    /// To the head's console.
    Console,
    /// Appended to this file on the worker's host.
    File(String),
}

/// How an agent waits for its head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Linger {
    /// How many milliseconds the agent waits for a head before it ends.
    pub milliseconds: u64,
    /// The name of the directory on the agent's host that contains its socket: see
    /// [`linger`](crate::agent::linger).
    pub name: String,
    /// The key of the cluster, which a head must prove to have.
    pub key: Secret,
    /// The number of heads that the cluster has had before.
    pub generation: u32,
    /// The addresses and ports at which an agent that dials back looks for another head. Empty: the agent waits to be
    /// dialled.
    pub addresses: Vec<(String, u16)>,
}

/// A key, which is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(...)")
    }
}

/// A start request to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// How many workers to start.
    pub workers: u32,
    /// The ranks of the workers in the cluster, in the order of their index on this host: how the log names them.
    pub ranks: Vec<Rank>,
    /// How to make them.
    pub mode: StartMode,
    /// Packages to attach before the first worker is made.
    pub packages: Vec<String>,
    /// Where the output of the workers goes.
    pub outfile: Outfile,
    /// Added to the niceness of each worker.
    pub renice: i32,
    /// The command that starts one spawned worker.
    pub spawn_command: Vec<String>,
    /// Milliseconds of silence after which each side treats the other as disconnected; 0: no
    /// heartbeats, only the end of the stream counts.
    pub heartbeat_timeout: u32,
    /// Size of the agent's chunk cache in bytes (see [`crate::protocol::dedup`]); 0: none.
    pub chunk_cache_bytes: u64,
    /// Maximum size of the set-up log in bytes, from which the agent restores replacements.
    pub state: u64,
    /// Milliseconds that a replacement may take to start, and that each repeated set-up call may
    /// take beyond its first duration; 0: no limit.
    pub setup: u64,
    /// Memory limit of a worker in bytes; 0: none.
    pub memory_limit: u64,
    /// Milliseconds that an idle worker may take to end when the head stops it.
    pub stop_timeout: u64,
    /// The head is on this machine: large answers may use shared memory.
    pub local: bool,
    /// Whether the agent waits for another head when its head disconnects, and how. Otherwise the agent ends.
    pub linger: Option<Linger>,
}

impl Start {
    /// The rank of the worker with this index; the index itself if the head has not sent ranks.
    pub fn rank(&self, worker: u32) -> Rank {
        let rank = self.ranks.get(worker as usize);
        rank.copied().unwrap_or(worker)
    }
}

impl fmt::Display for WorkerFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let oom = if self.oom {
            ", it seems for want of memory"
        } else {
            ""
        };
        if self.pid != 0 {
            write!(f, "pid {} ", self.pid)?;
        }
        write!(f, "{}{oom}", self.exit)
    }
}

/// How far a worker had come that ended before it was ready for tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setback {
    /// The number of consecutive workers of this rank that ended so; 0: this worker had been ready.
    pub count: u32,
    /// The worker had started and was being restored.
    pub restoring: bool,
    /// The agent killed the worker because it made no progress for this many milliseconds; 0: the
    /// agent did not kill it.
    pub stalled: u64,
    /// Milliseconds until the agent starts another worker; 0: at once, or never.
    pub pause: u64,
}

/// A worker failure: a worker ended without having been stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerFailure {
    /// The process number that the worker had, 0 if no process could be started.
    pub pid: u32,
    /// How the process ended.
    pub exit: Exit,
    /// The end of the worker's output.
    pub tail: String,
    /// Bytes of memory available on the host after the worker's end, 0 if unknown.
    pub memory_available: u64,
    /// The out-of-memory killer has probably killed the worker.
    pub oom: bool,
    /// How far the worker had come, if it was not ready for tasks.
    pub setback: Setback,
}

/// Head to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// The head's half of the greeting: the first message on the stream.
    Hello(Hello),
    /// The start request, which follows the greeting once.
    Start(Start),
    /// Interrupt `worker` if it still runs `task`; drop the task if it has not started.
    Cancel {
        /// The worker's index on its host.
        worker: u32,
        /// The task whose answer the head no longer wants.
        task: u64,
    },
    /// The head acknowledges the failure of a worker that is being replaced. Messages that the head
    /// sent to the worker before this one were meant for the failed worker.
    LossAck {
        /// The worker's index on its host.
        worker: u32,
    },
    /// End this worker, whatever it does.
    StopWorker {
        /// The worker's index on its host.
        worker: u32,
    },
    /// End all workers, then the agent.
    Stop,
    /// A heartbeat of the head.
    Alive,
    /// Revoke `task`: drop it if it has not started, and report that like a cancelled task.
    /// Otherwise do nothing.
    Revoke {
        /// The worker's index on its host.
        worker: u32,
        /// The task that another worker is to run.
        task: u64,
    },
    /// Asks for the memory use of the workers.
    Usage {
        /// A number that the answer repeats.
        question: u64,
    },
    /// Asks for the state of the agent and of its workers.
    Dump {
        /// A number that the answer repeats.
        question: u64,
    },
    /// Asks which set-up calls the workers have completed: [`ToHead::SetupCalls`].
    SetupLog,
    /// Asks for the message of a set-up call, which the agent sends in frames of kind
    /// [`Blob`](crate::protocol::frame::Kind::Blob).
    SetupCall {
        /// The index on its host of a worker that has completed the call.
        worker: u32,
        /// The digest of the call.
        digest: u128,
        /// A number that the frames repeat.
        request: u64,
    },
    /// Asks which answers the agent has kept while it had no head: [`ToHead::KeptAnswers`].
    KeptAnswers,
    /// Asks for an answer that the agent has kept, which the agent sends like [`ToAgent::SetupCall`].
    KeptAnswer {
        /// The number of the answer.
        number: u64,
        /// A number that the frames repeat.
        request: u64,
    },
    /// The head has this answer: the agent drops it.
    DropAnswer {
        /// The number of the answer.
        number: u64,
    },
    /// The head restores each worker of this agent before it uses the worker: [`ToAgent::Restored`] follows then.
    Restores,
    /// The head has restored this worker: the worker has all set-up calls.
    Restored {
        /// The worker's index on its host.
        worker: u32,
    },
}

/// Memory use of a process in bytes; unknown values are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The resident set size.
    pub resident: u64,
    /// The proportional set size: memory that is shared counts in proportion.
    pub proportional: u64,
}

/// State for a bug report: names and values as text. Never what tasks, environment variables or files contain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts(pub Vec<(String, String)>);

impl Facts {
    /// Adds a value under its name.
    pub fn add(&mut self, name: &str, value: impl fmt::Display) {
        self.0.push((name.to_owned(), value.to_string()));
    }

    /// Adds a value as the code writes it.
    pub fn add_debug(&mut self, name: &str, value: impl fmt::Debug) {
        self.0.push((name.to_owned(), format!("{value:?}")));
    }

    /// Adds a value, if there is one.
    pub fn add_some(&mut self, name: &str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }

    /// Adds a time in seconds.
    pub fn add_seconds(&mut self, name: &str, value: Duration) {
        self.add(name, format_args!("{:.3}", value.as_secs_f64()));
    }
}

/// Why an agent drains: its batch job is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DrainCause {
    /// The time limit of the job is near.
    TimeLimit,
    /// The batch engine has sent a warning: SIGUSR1 or SIGUSR2.
    Warned,
    /// The batch engine has sent SIGTERM: the job was cancelled or preempted.
    Terminated,
}

impl fmt::Display for DrainCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DrainCause::TimeLimit => "time limit",
            DrainCause::Warned => "warning of the batch system",
            DrainCause::Terminated => "cancelled or preempted",
        })
    }
}

/// Agent to head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHead {
    /// The agent's half of the greeting: the first message on the stream.
    Hello(Hello),
    /// Nothing was started.
    StartFailed {
        /// Why, for the user.
        reason: String,
    },
    /// Nothing was started: the host's limits are too low.
    Limits {
        /// The resource that is short.
        what: String,
        /// How many of it the workers need.
        needed: u64,
        /// How many of it the host has left.
        available: u64,
        /// What the user can do about it.
        remedy: String,
    },
    /// A worker has started and is ready for tasks.
    WorkerUp {
        /// The worker's index on its host.
        worker: u32,
        /// The worker's process number.
        pid: u32,
    },
    /// A worker has not ended the task that it began for the head before. [`ToHead::WorkerUp`] follows when it has.
    WorkerKept {
        /// The worker's index on its host.
        worker: u32,
        /// The worker's process number.
        pid: u32,
    },
    /// A worker ended without being asked to.
    WorkerFailed {
        /// The worker's index on its host.
        worker: u32,
        /// How the worker ended.
        failure: WorkerFailure,
        /// Whether the agent is starting a replacement.
        replaced: bool,
    },
    /// The task exceeded its time limit: its worker is interrupted, and killed if it does not
    /// respond.
    TimedOut {
        /// The worker's index on its host.
        worker: u32,
        /// The task that exceeded its time limit.
        task: u64,
        /// The end of what the worker has written to its standard output and standard error.
        output: String,
    },
    /// The task raised an error. Its answer follows.
    TaskFailed {
        /// The worker's index on its host.
        worker: u32,
        /// The task.
        task: u64,
        /// The beginning of the message of the error.
        text: String,
        /// The end of what the worker has written to its standard output and standard error since its last error.
        output: String,
    },
    /// The set-up log of this worker exceeds the limit: the worker will not be replaced.
    StateNotLogged {
        /// The worker's index on its host.
        worker: u32,
    },
    /// A replacement is ready, restored to the state of its predecessor, which failed or was killed
    /// because it did not respond to an interrupt.
    WorkerReplaced {
        /// The worker's index on its host.
        worker: u32,
        /// The process number of the replacement.
        pid: u32,
    },
    /// The worker ended because it was asked to.
    WorkerStopped {
        /// The worker's index on its host.
        worker: u32,
        /// Whether the worker was idle, did not end within [`Start::stop_timeout`], and was killed.
        timed_out: bool,
    },
    /// A heartbeat of the agent.
    Alive,
    /// The job of the agent is about to end: the agent and its workers must be drained.
    Draining {
        /// Seconds until the end, if they are known.
        seconds: Option<u32>,
        /// Why the job ends.
        cause: DrainCause,
    },
    /// A process that a worker started is still running after the worker's end.
    LeftBehind {
        /// The index of the worker that started the process, if it is known.
        worker: Option<u32>,
        /// The process number on this host.
        pid: u32,
        /// The command line of the process.
        command: String,
    },
    /// The agent has failed and ends everything.
    Failed {
        /// Why, for the user.
        reason: String,
    },
    /// The set-up calls that restore a worker, in order.
    SetupCalls {
        /// The worker's index on its host.
        worker: u32,
        /// Whether the log of the worker is complete.
        complete: bool,
        /// The number of the variable that each call sets, and its digest.
        calls: Vec<(u64, u128)>,
        /// Whether the answer for this worker is complete with these calls.
        last: bool,
    },
    /// The answers that the agent has kept while it had no head.
    KeptAnswers {
        /// The number and the task of each answer, and when the task ended, in milliseconds of the host's clock.
        answers: Vec<(u64, u64, u64)>,
        /// Whether the list is complete with these answers.
        last: bool,
    },
    /// The memory use of some workers.
    Usage {
        /// The number of the question that this answers.
        question: u64,
        /// Workers by their index on this host, with their memory.
        workers: Vec<(u32, Usage)>,
        /// Whether the answer is complete with these workers.
        last: bool,
    },
    /// The state of the agent and of some workers.
    Dump {
        /// The number of the question that this answers.
        question: u64,
        /// The facts about the agent, or about the worker with this index.
        of: Vec<(Option<u32>, Facts)>,
        /// Whether the answer is complete with these.
        last: bool,
    },
}

/// The configuration of a spawned worker: the agent's first message to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// Packages to attach before the first task.
    pub packages: Vec<String>,
    /// As in [`Start`].
    pub memory_limit: u64,
    /// Large answers may use memory that is shared with the head.
    pub shared_answers: bool,
    /// The worker's rank in the cluster.
    pub rank: Rank,
}

/// The state that an agent hands over when it replaces its own process image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The start request of the agent.
    pub start: Start,
    /// The head's process number.
    pub head_pid: u32,
    /// Head and agent have the same byte order.
    pub same_order: bool,
    /// Bytes from the head that have been read and not processed.
    pub received: Vec<u8>,
    /// Packages that each worker attaches itself.
    pub after: Vec<String>,
}

/// The state of a worker while it starts, and once it can take tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReady {
    /// The worker's temporary directory, which the agent removes if the worker cannot.
    pub tempdir: String,
    /// The worker can take tasks. Before that it is still loading packages.
    pub ready: bool,
}

/// A control message that could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("bad control message: {0}")]
pub struct MessageError(String);

/// Puts a message into a control frame.
///
/// # Errors
/// When it does not fit into one frame.
pub fn encode<M: Serialize>(message: &M) -> Result<Frame, MessageError> {
    encode_for(0, message)
}

/// Encodes a message like [`encode`], with a worker in the header.
///
/// # Errors
/// When it does not fit into one frame.
pub fn encode_for<M: Serialize>(worker: u32, message: &M) -> Result<Frame, MessageError> {
    let body = bincode::serde::encode_to_vec(message, CONFIG)
        .map_err(|error| MessageError(error.to_string()))?;
    if body.len() > MAX_BODY {
        return Err(MessageError(format!(
            "{} bytes, more than a frame's {MAX_BODY}",
            body.len()
        )));
    }
    let flags = FIRST | LAST;
    Ok(Frame::new(
        Kind::Control,
        flags,
        worker,
        0,
        Bytes::from(body),
    ))
}

/// Reads the body of a control frame, all of it.
///
/// # Errors
/// When the bytes are not exactly one `M`.
pub fn decode<M: DeserializeOwned>(body: &[u8]) -> Result<M, MessageError> {
    let (message, used) = bincode::serde::decode_from_slice(body, CONFIG)
        .map_err(|error| MessageError(error.to_string()))?;
    if used != body.len() {
        return Err(MessageError(format!(
            "{} bytes follow its end",
            body.len() - used
        )));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::exit::Exit;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            protocol: PROTOCOL,
            package: "0.1.0".into(),
            r_version: "4.2.2".into(),
            hostname: "head".into(),
            cores: 4,
            ..Hello::default()
        }
    }

    #[test]
    fn messages_survive_the_wire() {
        let messages = [
            ToHead::Hello(hello()),
            ToHead::WorkerFailed {
                worker: 7,
                failure: WorkerFailure {
                    pid: 12,
                    exit: Exit::Signal(9),
                    tail: "Error in \u{2018}f\u{2019}: 100%s".into(),
                    memory_available: 1 << 40,
                    oom: true,
                    setback: Setback {
                        count: 3,
                        restoring: true,
                        stalled: 120_000,
                        pause: 1_000,
                    },
                },
                replaced: true,
            },
            ToHead::LeftBehind {
                worker: Some(3),
                pid: 17,
                command: "sleep 300".into(),
            },
        ];
        for message in messages {
            let frame = encode(&message).unwrap();
            assert_eq!(decode::<ToHead>(&frame.body).unwrap(), message);
            let mut longer = frame.body.to_vec();
            longer.push(0);
            assert!(decode::<ToHead>(&longer).is_err());
            assert!(decode::<ToHead>(&frame.body[..frame.body.len() - 1]).is_err());
        }
    }

    #[test]
    fn a_message_that_does_not_fit_a_frame_is_an_error() {
        let reason = "x".repeat(MAX_BODY);
        assert!(encode(&ToHead::StartFailed { reason }).is_err());
    }

    #[test]
    fn versions_that_differ_are_named() {
        let mut other = hello();
        assert!(hello().check(&other).is_ok());
        other.package = "0.2.0".into();
        other.hostname = "node1".into();
        let message = hello().check(&other).unwrap_err();
        for part in ["0.1.0", "0.2.0", "head", "node1"] {
            assert!(message.contains(part), "{message}");
        }
    }

    proptest! {
        #[test]
        fn random_bodies_are_errors_not_panics(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<ToHead>(&body);
            let _ = decode::<ToAgent>(&body);
            let _ = decode::<WorkerReady>(&body);
        }

    }
}
