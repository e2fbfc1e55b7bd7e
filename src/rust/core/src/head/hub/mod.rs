//! The hub: the thread of the head that starts the agents and serves their connections while R does
//! something else, and the handle through which R's thread sends and receives.
//!
//! Both threads share the state in [`core`], under one lock. It contains only bytes and plain
//! values; nothing here ever calls R.

mod adaptive;
mod by_hand;
mod client;
mod connection;
mod core;
mod dashboard;
mod drain;
mod dump;
mod figures;
mod futures;
mod grow;
mod inbox;
mod join;
mod kept;
mod missed;
mod progress_events;
mod readiness;
mod recent;
mod restore;
mod restore_queue;
mod seeds;
mod serve_host;
mod status;
mod take_over;
mod thread;
mod writer;
mod writing;

pub use adaptive::Arrival;
pub use client::{Answer, Hub, Progress};
pub use connection::Plan;
pub(super) use core::{Core, SharedCore};
pub use dump::Dump;
pub use figures::{FigureQuery, Figures, HostFigures, WorkerFigures, state_name};
pub use futures::{CallEnd, Waker};
pub use inbox::{Event, HostFailure, HostView, WorkerView};
pub use kept::Kept;
pub use recent::RecentEvent;
pub use status::{HostStatus, Status};
pub use writing::{NO_JOB, StartedTask, Turn};
