//! The error for bytes that break the protocol.

/// Bytes that break the protocol: no agent of this package sends them.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ProtocolError(pub String);
