//! The dashboard, for R's thread: opening it, and what R reports for pages.

use super::client::Hub;
use crate::head::dashboard::board::{Chunks, JobGauge, JobView, StoreView};
use crate::head::dashboard::server::{Order, Site};
use crate::protocol::ids::{JobId, Rank};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A page that has asked within this time is open.
const WATCHING: Duration = Duration::from_secs(35);

impl Hub {
    /// Serves the dashboard from now on, instead of an earlier one.
    ///
    /// # Errors
    /// When the cluster has been stopped.
    pub fn open_dashboard(&mut self, site: Site) -> io::Result<()> {
        self.order(Order::Open(site))?;
        self.core().board.open = true;
        Ok(())
    }

    /// Serves no dashboard any more.
    ///
    /// # Errors
    /// When the cluster has been stopped.
    pub fn close_dashboard(&mut self) -> io::Result<()> {
        self.core().board.open = false;
        self.order(Order::Close)
    }

    /// Allows requests for the dashboard under another name of the host.
    ///
    /// # Errors
    /// When the cluster has been stopped.
    pub fn allow_dashboard_at(&mut self, name: String) -> io::Result<()> {
        self.order(Order::Allow(name))
    }

    fn order(&self, order: Order) -> io::Result<()> {
        let core = self.core();
        let sent = core.orders.as_ref().map(|orders| orders.send(order));
        match sent {
            Some(Ok(())) if !core.stopping => Ok(()),
            _ => Err(io::Error::other("the cluster has been stopped")),
        }
    }

    /// Whether a page is open: whether R has to report what only R knows.
    pub fn is_watched(&self) -> bool {
        let core = self.core();
        let now = core.began.elapsed();
        let recently = |watched: Duration| now.saturating_sub(watched) < WATCHING;
        core.board.open && core.board.watched.is_some_and(recently)
    }

    /// A job has begun. `before`: the results that the store had.
    pub fn job_began(
        &self,
        id: JobId,
        noun: &str,
        tasks: usize,
        chunks: Option<Chunks>,
        gauge: Arc<JobGauge>,
        store: Option<StoreView>,
    ) {
        let mut core = self.core();
        let began = core.began.elapsed();
        core.board.begin(JobView {
            id,
            noun: noun.to_owned(),
            tasks,
            chunks,
            gauge,
            began,
            ended: None,
            errors: 0,
            store,
        });
    }

    /// A variable of this name was exported, in a message of this many bytes.
    pub fn exported(&self, name: &str, bytes: u64) {
        self.core().board.exported(name, bytes);
    }

    /// Sets what R knows of the batch jobs of hosts: index of the host, id, and state in the engine's words.
    pub fn set_batch_jobs(&self, jobs: Vec<(usize, String, String)>) {
        self.core().board.batch_jobs = jobs;
    }

    /// Records an error that is the answer to a task of this worker. `raised`: whether the task has raised it, so that
    /// the hub knew of it before.
    pub fn failed(&self, rank: Rank, why: &str, raised: bool) {
        let mut core = self.core();
        core.scheduler.failed(rank, why);
        if !raised {
            let now = core.began.elapsed();
            core.board.error_returned(rank, why, now);
        }
    }
}
