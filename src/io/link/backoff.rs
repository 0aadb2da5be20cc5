//! How long a node waits before it connects to its server again.

use std::time::Duration;

use rand::Rng;

/// The first wait after a loss; every next one is up to three times the last.
const MIN_WAIT: Duration = Duration::from_millis(200);
/// A thousand nodes spread over this come back to a restarted server within seconds, and no
/// faster than it can serve them.
const MAX_WAIT: Duration = Duration::from_secs(6);

/// Growing, jittered waits.
#[derive(Debug)]
pub struct Backoff {
    longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { longest: MIN_WAIT }
    }
}

impl Backoff {
    /// It has worked: the next wait is a short one.
    pub fn reset(&mut self) {
        self.longest = MIN_WAIT;
    }

    /// The wait until the next attempt.
    pub fn next_wait(&mut self) -> Duration {
        let low = MIN_WAIT.as_secs_f64();
        let high = self.longest.as_secs_f64().max(low * 1.01);
        self.longest = (self.longest * 3).min(MAX_WAIT);
        Duration::from_secs_f64(rand::rng().random_range(low..high))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit_and_start_over() {
        let mut backoff = Backoff::default();
        assert!(backoff.next_wait() < MIN_WAIT * 2);
        for _ in 0..100 {
            let wait = backoff.next_wait();
            assert!(wait >= MIN_WAIT && wait <= MAX_WAIT, "{wait:?}");
        }
        assert_eq!(backoff.longest, MAX_WAIT);
        backoff.reset();
        assert!(backoff.next_wait() < MIN_WAIT * 2);
    }
}
