//! Whether the other side is still there. Each side says that it is alive four times in the time
//! after which it takes the other's silence for its end; whatever arrives counts as a sign of life.
//! TCP's own patience with a host that was switched off is a quarter of an hour.

use std::time::Duration;

/// One side's view. Times are counted from any fixed moment.
#[derive(Clone, Debug)]
pub struct Pulse {
    patience: Duration,
    heard: Duration,
    said: Duration,
}

impl Pulse {
    /// `patience`: how long the other side may be silent.
    pub fn new(patience: Duration, now: Duration) -> Pulse {
        Pulse {
            patience,
            heard: now,
            said: now,
        }
    }

    /// Something has arrived.
    pub fn hear(&mut self, now: Duration) {
        self.heard = now;
    }

    /// Whether the other side has been silent for too long. Before this is asked, all that has
    /// arrived must have been heard: this process may itself have been stopped.
    pub fn is_silent(&self, now: Duration) -> bool {
        now.saturating_sub(self.heard) > self.patience
    }

    /// Whether to say now that this side is alive; it is then taken as said.
    pub fn speak(&mut self, now: Duration) -> bool {
        let due = now >= self.said + self.interval();
        if due {
            self.said = now;
        }
        due
    }

    /// When next to look.
    pub fn next(&self) -> Duration {
        (self.said + self.interval()).min(self.heard + self.patience)
    }

    fn interval(&self) -> Duration {
        self.patience / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn speaks_four_times_in_its_patience() {
        let mut pulse = Pulse::new(20 * SECOND, Duration::ZERO);
        let said: Vec<u32> = (0..=20).filter(|&s| pulse.speak(s * SECOND)).collect();
        assert_eq!(said, [5, 10, 15, 20]);
    }

    #[test]
    fn silence_is_noticed_and_any_sign_ends_it() {
        let mut pulse = Pulse::new(20 * SECOND, 3 * SECOND);
        assert!(!pulse.is_silent(23 * SECOND));
        assert!(pulse.is_silent(24 * SECOND));
        pulse.hear(24 * SECOND);
        assert!(!pulse.is_silent(44 * SECOND));
        assert!(pulse.is_silent(45 * SECOND));
    }

    #[test]
    fn looks_when_there_is_something_to_do() {
        let mut pulse = Pulse::new(20 * SECOND, Duration::ZERO);
        assert_eq!(pulse.next(), 5 * SECOND);
        assert!(pulse.speak(19 * SECOND));
        assert_eq!(pulse.next(), 20 * SECOND);
        pulse.hear(20 * SECOND);
        assert_eq!(pulse.next(), 24 * SECOND);
    }
}
