//! How a process ended.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How a process ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The process exited with this status.
    Status(i32),
    /// This signal killed the process.
    Signal(i32),
    /// The exit status is unknown: the process could not be waited for, or there was no process.
    #[default]
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Status(status) => write!(f, "exited with status {status}"),
            Exit::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Exit::Unknown => write!(f, "ended"),
        }
    }
}
