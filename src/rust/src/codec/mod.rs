//! Codecs: R values to bytes, and bytes to R values.

pub mod batch;
pub mod mapped;
pub mod plain;
pub mod stored;
pub mod stream;
