//! The agent's stream to and from its head.

use super::linger::Link;
use super::process::Outgoing;
use super::{AGENT_READS, Agent, is_out_of_resources};
use crate::platform::fd;
use crate::protocol::control::{self, ToHead};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use tracing::{error, info, trace};

impl Agent {
    /// Sends a heartbeat to the head if one is due, and ends if the head has been silent for too
    /// long.
    pub(super) fn check_heartbeat(&mut self) {
        let now = self.now();
        let Some(heartbeat) = self.heartbeat.as_mut().filter(|_| !self.disconnected) else {
            return;
        };
        if heartbeat.is_silent(now) {
            error!("head silent for too long");
            eprintln!(
                "rustcluster agent: received nothing from the head within `heartbeat_timeout`"
            );
            self.disconnect();
        } else if heartbeat.send_due(now) && self.to_head.is_empty() {
            // Bytes that wait to be sent are a sign of life themselves.
            self.report(&ToHead::Alive);
        }
    }

    pub(super) fn report(&mut self, message: &ToHead) {
        // Every field is bounded, so this cannot fail; were it to, the head would rather miss a
        // message than its agent.
        let wanted = (!self.ending || *message == ToHead::Alive) && self.is_linked();
        match control::encode(message) {
            Ok(frame) if wanted => self.to_head.push(&frame, None),
            _ => {}
        }
    }

    /// Reports to the head something that it must know even while the agent ends.
    pub(super) fn report_last(&mut self, message: &ToHead) {
        if let Some(frame) = control::encode(message).ok().filter(|_| self.is_linked()) {
            self.to_head.push(&frame, None);
            self.orphans.final_output |= self.ending;
        }
    }

    pub(super) fn read_head(&mut self) {
        for _ in 0..AGENT_READS {
            match self.reader.read(&mut self.scratch) {
                Ok(0) => {
                    info!("head closed its stream");
                    return self.disconnect();
                }
                Ok(n) => {
                    trace!(bytes = n, "read from head");
                    let now = self.epoch.elapsed();
                    if let Some(heartbeat) = &mut self.heartbeat {
                        heartbeat.record_received(now);
                    }
                    self.received.extend_from_slice(&self.scratch[..n]);
                    self.on_head_bytes();
                    if self.disconnected || matches!(self.link, Link::Down { .. }) {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.disconnect(),
            }
        }
        self.head_unread = true;
    }

    pub(super) fn on_head_bytes(&mut self) {
        if !self.is_linked() {
            if let Err(error) = self.read_greeting() {
                error!(%error, "the head was not accepted");
                self.disconnect();
            }
            return;
        }
        let (now, received) = (self.epoch.elapsed(), &mut self.received);
        let result = self.router.from_head(received, now, &mut self.acts);
        self.act();
        if let Err(error) = result {
            error!(%error, "the head broke the protocol");
            eprintln!("rustcluster agent: {error}");
            self.disconnect();
        }
    }

    pub(super) fn write_head(&mut self) {
        self.head_waits = false;
        while !self.to_head.is_empty() && !self.head_blocked {
            let writer = &mut self.writer;
            match self.to_head.write_with(|slices, along| match along {
                Some(_) => fd::send_with(writer.as_raw_fd(), slices, along),
                None => writer.write_vectored(slices),
            }) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.await_writable();
                }
                // Descriptors in flight are counted for all processes of a user.
                Err(error) if is_out_of_resources(&error) => {
                    self.head_waits = true;
                    return;
                }
                Err(_) => {
                    self.to_head = Outgoing::default();
                    self.disconnect();
                }
            }
        }
    }
}
