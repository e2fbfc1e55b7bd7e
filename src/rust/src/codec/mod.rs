//! How R's values become bytes, and bytes values.

pub mod batch;
pub mod mapped;
pub mod plain;
pub mod stream;
