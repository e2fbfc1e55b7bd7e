//! Hosts that join late, because they were slow or because their batch job had to wait.

use super::client::Hub;
use super::core::Core;
use crate::protocol::ids::Rank;
use crate::protocol::noise::Key;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

impl Hub {
    /// Whether hosts come and go: jobs without an assignment use the workers that are there.
    pub fn is_elastic(&self) -> bool {
        self.core().is_elastic
    }

    /// Whether the host of this worker has not joined yet, and still may.
    pub fn is_awaited(&self, rank: Rank) -> bool {
        self.core().is_awaited(rank)
    }

    /// How often a worker has joined late or come back with its host.
    pub fn arrivals(&self) -> u64 {
        self.core().inbox.arrivals
    }

    /// Waits up to `max_wait` for more than `seen` arrivals, for a host that will not join, or for
    /// another event that R must know.
    pub fn await_arrival(&self, seen: u64, max_wait: Duration) {
        let news = |core: &mut Core| {
            let inbox = &core.inbox;
            (inbox.arrivals != seen || inbox.has_events() || inbox.closed).then_some(())
        };
        self.inner.shared_core.wait(max_wait, news);
    }

    /// Listens for agents that dial back, on one port of this range at all these addresses; port 0 means any.
    /// `keys`: the number and the key of each launcher, of which a later call names all. A later call without
    /// addresses only sets the keys. Returns the port. The listener ends with the cluster.
    ///
    /// # Errors
    /// When no port of the range is free, or an address is not of this machine.
    pub fn listen(
        &self,
        addresses: &[IpAddr],
        ports: &RangeInclusive<u16>,
        keys: Vec<(u32, Key)>,
    ) -> io::Result<u16> {
        self.core().dial_back.listen(addresses, ports, keys)
    }
}
