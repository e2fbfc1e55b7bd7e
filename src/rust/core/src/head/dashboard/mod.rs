//! The dashboard: a page in the browser with what the cluster is doing, served by the hub's thread.
//!
//! * [`board`]: what is recorded for pages.
//! * [`lanes`]: what each worker did over time, as text.
//! * [`http`]: requests and answers, without I/O.
//! * [`server`]: connections, under limits.
//!
//! [`hub::Figures`](crate::head::hub::Figures) collects the figures when a page asks. A page holds one request: the
//! server answers it after the time that the page asks for, or at once if there is a failure or the cluster stops. There
//! is no timer and nothing is collected while no page asks.

pub mod board;
pub mod http;
pub mod json;
pub mod lanes;
pub mod server;
