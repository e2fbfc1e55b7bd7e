//! R's own ways: jumps, and failures as values.

pub mod failure;
pub mod unwind;
