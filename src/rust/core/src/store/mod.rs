//! The results of a run on disk.
//!
//! A run is a directory. Its folder `results` has files of records, to which one process at a time appends: a new file
//! for each process, and for each [`MAX_FILE`] bytes. A record has the results of one or more elements, in R's own
//! serialization, so that R can read it without this package. [`record`] describes the bytes.
//!
//! A record counts once it is durable. After a crash, the bytes behind the last `fdatasync` may be anything. Each record
//! therefore says how much of its file was durable before it was written: [`Index`] trusts these bytes, and reads and
//! checks the payload of all records behind them. Payloads are checked again whenever they are read.

pub mod lock;
pub mod record;
pub mod save;

mod index;
mod list;
mod output;
mod writer;

pub use index::{Index, State, elements_of_file};
pub use list::ListPayload;
pub use output::{Item, Output, Series};
pub use writer::{Gauge, Writer, WriterSettings};

/// The folder with the files of records.
pub const RESULTS: &str = "results";

/// The extension of a file of records.
pub const EXTENSION: &str = "rcr";

/// Bytes of a file of records from which on the next record goes to another file.
pub const MAX_FILE: u64 = 1 << 30;

#[cfg(test)]
mod tests;
