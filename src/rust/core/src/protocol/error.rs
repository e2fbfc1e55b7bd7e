//! The error for bytes that break the protocol.

/// Something that no agent of ours would send.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ProtocolError(pub String);
