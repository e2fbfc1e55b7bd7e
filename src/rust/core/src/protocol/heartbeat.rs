//! Heartbeats between machines: whether the other side is still connected. Each side sends a heartbeat four times
//! within the heartbeat timeout and treats the other's silence for that long as disconnection. Any
//! message counts as a sign of life. TCP itself notices after about a quarter of an hour that a
//! host was switched off.

use std::time::Duration;

/// One side's view of the connection. Times are counted from any fixed moment.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    heartbeat_timeout: Duration,
    last_received: Duration,
    said: Duration,
}

impl Heartbeat {
    /// `heartbeat_timeout`: how long the other side may be silent.
    pub fn new(heartbeat_timeout: Duration, now: Duration) -> Heartbeat {
        Heartbeat {
            heartbeat_timeout,
            last_received: now,
            said: now,
        }
    }

    /// Records that something has arrived.
    pub fn record_received(&mut self, now: Duration) {
        self.last_received = now;
    }

    /// Whether the other side has been silent for longer than the heartbeat timeout. Everything
    /// that has arrived must have been recorded before: this process may itself have been stopped.
    pub fn is_silent(&self, now: Duration) -> bool {
        now.saturating_sub(self.last_received) > self.heartbeat_timeout
    }

    /// Whether a heartbeat is due. It is then taken as sent.
    pub fn send_due(&mut self, now: Duration) -> bool {
        let due = now >= self.said + self.interval();
        if due {
            self.said = now;
        }
        due
    }

    /// When to check next.
    pub fn next(&self) -> Duration {
        (self.said + self.interval()).min(self.last_received + self.heartbeat_timeout)
    }

    fn interval(&self) -> Duration {
        self.heartbeat_timeout / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn speaks_four_times_in_its_heartbeat_timeout() {
        let mut heartbeat = Heartbeat::new(20 * SECOND, Duration::ZERO);
        let said: Vec<u32> = (0..=20)
            .filter(|&s| heartbeat.send_due(s * SECOND))
            .collect();
        assert_eq!(said, [5, 10, 15, 20]);
    }

    #[test]
    fn silence_is_noticed_and_any_sign_ends_it() {
        let mut heartbeat = Heartbeat::new(20 * SECOND, 3 * SECOND);
        assert!(!heartbeat.is_silent(23 * SECOND));
        assert!(heartbeat.is_silent(24 * SECOND));
        heartbeat.record_received(24 * SECOND);
        assert!(!heartbeat.is_silent(44 * SECOND));
        assert!(heartbeat.is_silent(45 * SECOND));
    }

    #[test]
    fn looks_when_there_is_something_to_do() {
        let mut heartbeat = Heartbeat::new(20 * SECOND, Duration::ZERO);
        assert_eq!(heartbeat.next(), 5 * SECOND);
        assert!(heartbeat.send_due(19 * SECOND));
        assert_eq!(heartbeat.next(), 20 * SECOND);
        heartbeat.record_received(20 * SECOND);
        assert_eq!(heartbeat.next(), 24 * SECOND);
    }
}
