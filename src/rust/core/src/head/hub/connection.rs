//! What the hub knows of a host's connection, and what its agent is to start.

use crate::protocol::control::Start;
use crate::protocol::ids::Rank;
use crate::protocol::send_queue::OutBuf;
use bytes::BytesMut;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// The start request for the agent of one host, and the ranks of its workers.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The start message for the agent.
    pub start: Start,
    /// The ranks of its workers, in the order of their index there.
    pub ranks: Vec<Rank>,
}

/// The parts of a connection that the rest of the hub uses.
#[derive(Default)]
pub struct Conn {
    /// Set once the agent has greeted.
    pub stream: Option<Arc<std::os::unix::net::UnixStream>>,
    pub received: BytesMut,
    /// Descriptors that have arrived and belong to frames that have not been processed.
    pub descriptors: VecDeque<OwnedFd>,
    pub out: OutBuf,
    /// The stream is not writable.
    pub blocked: bool,
    /// The readiness that the hub's thread is registered for.
    pub interest: Option<mio::Interest>,
    /// How the stream ended.
    pub end: Option<io::Result<()>>,
    /// `end` has been set.
    pub over: Arc<Notify>,
    /// Notified when the cluster stops.
    pub stop: Arc<Notify>,
    /// The heartbeat timeout of an agent on another machine; set before `planned`.
    pub heartbeat_timeout: Duration,
    /// How long idle workers may take to end.
    pub stop_timeout: Duration,
    /// Notified when the start request has been sent to the agent.
    pub planned: Arc<Notify>,
    /// Notified when the cluster has begun without the agent.
    pub late: Arc<Notify>,
    /// When the agent last sent something, once it serves.
    pub last_received: Option<Instant>,
    /// The start request of the agent, if its host may join late or be reconnected.
    pub plan: Option<Start>,
    /// The agent's end is intended: it is not reconnected.
    pub permanent: bool,
    /// The agent is in a batch job and dials back. If it is lost, its job may come again, or another.
    pub dials: bool,
    /// The agent had not greeted when the others were started: it joins the cluster later.
    pub awaited: bool,
    /// Bytes that went to the host, and that came from it.
    pub bytes_in: u64,
    pub bytes_out: u64,
}
