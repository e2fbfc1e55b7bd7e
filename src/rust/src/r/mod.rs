//! R's jumps, and failures as values.

pub mod failure;
pub mod unwind;
