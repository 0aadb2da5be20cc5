//! So many in a second, and a few at once.

use std::sync::atomic::{AtomicU64, Ordering};

/// What may be done how often.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    /// So many in a second,
    pub(super) per_second: u64,
    /// and so many at once.
    pub(super) burst: u64,
}

/// What has been done of it: when all of it would have been done at the steady rate, in microseconds
/// since any moment (the generic cell rate algorithm). Two threads at the same moment may do one more,
/// which does no harm.
#[derive(Debug, Default)]
pub(super) struct Limit(AtomicU64);

impl Limit {
    /// Whether one more may be done now and `left` more after it; the one counts as done.
    pub(super) fn take(&self, rate: Rate, left: u64, now_us: u64) -> bool {
        let interval = 1_000_000 / rate.per_second;
        let paid_until = self.0.load(Ordering::Relaxed).max(now_us);
        let room = rate.burst.saturating_sub(left).saturating_sub(1);
        let allowed = paid_until <= now_us + interval * room;
        if allowed {
            self.0.store(paid_until + interval, Ordering::Relaxed);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { per_second: 50, burst: 16 };
    const INTERVAL_US: u64 = 20_000;

    fn taken(limit: &Limit, left: u64, now_us: u64) -> usize {
        (0..1_000).filter(|_| limit.take(RATE, left, now_us)).count()
    }

    #[test]
    fn a_limit_refills() {
        let limit = Limit::default();
        assert_eq!(taken(&limit, 0, 0), 16);
        assert_eq!(taken(&limit, 0, INTERVAL_US * 3), 3);
        assert_eq!(taken(&limit, 0, 60_000_000), 16);
    }

    #[test]
    fn who_leaves_some_takes_none_of_the_last() {
        let limit = Limit::default();
        assert_eq!(taken(&limit, 10, 0), 6);
        assert_eq!(taken(&limit, 0, 0), 10);
        assert_eq!(taken(&limit, 10, INTERVAL_US * 10), 0);
    }
}
