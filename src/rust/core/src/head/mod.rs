//! The head's side: which task is where, what is sent to which host, and the thread that does it.

pub mod activity;
pub mod batching;
pub mod blobs;
pub mod dashboard;
pub mod dial_back;
pub mod guard_process;
pub mod hub;
pub mod job;
pub mod launch;
pub mod retry;
pub mod scheduler;
mod setup_log_file;
pub mod task_table;
