//! So many in a second, and a few at once.

use std::time::{Duration, Instant};

/// What may be done how often.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    /// One more after this,
    pub(super) interval: Duration,
    /// and so many at once.
    pub(super) burst: u32,
}

/// What has been done of it (the generic cell rate algorithm).
#[derive(Debug, Default)]
pub(super) struct Limit {
    /// When all of it would have been done at the steady rate.
    paid_until: Option<Instant>,
}

impl Limit {
    /// Whether one more may be done now and `left` more after it; the one counts as done.
    pub(super) fn take(&mut self, rate: Rate, left: u32, now: Instant) -> bool {
        let paid_until = self.paid_until.map_or(now, |at| at.max(now));
        let room = rate.burst.saturating_sub(left).saturating_sub(1);
        let allowed = paid_until <= now + rate.interval * room;
        if allowed {
            self.paid_until = Some(paid_until + rate.interval);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    const RATE: Rate = Rate { interval: Duration::from_millis(20), burst: 16 };

    fn taken(limit: &mut Limit, left: u32, now: Instant) -> usize {
        (0..1_000).filter(|_| limit.take(RATE, left, now)).count()
    }

    #[test]
    fn a_limit_refills() {
        let mut limit = Limit::default();
        assert_eq!(taken(&mut limit, 0, epoch()), 16);
        assert_eq!(taken(&mut limit, 0, epoch() + RATE.interval * 3), 3);
        assert_eq!(taken(&mut limit, 0, epoch() + Duration::from_secs(60)), 16);
    }

    #[test]
    fn who_leaves_some_takes_none_of_the_last() {
        let mut limit = Limit::default();
        assert_eq!(taken(&mut limit, 10, epoch()), 6);
        assert_eq!(taken(&mut limit, 0, epoch()), 10);
        assert_eq!(taken(&mut limit, 10, epoch() + RATE.interval * 10), 0);
    }
}
