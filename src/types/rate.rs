//! So much at once, and then at a steady pace: how often something may happen.
//!
//! It is the generic cell rate algorithm (ITU-T I.371): all that is kept is the moment until which
//! the steady pace pays for what was taken, so nothing has to be refilled. A [`Rate`] is a constant,
//! an [`Account`] is what somebody has had of it, and a [`SharedAccount`] is one without a lock.
//! None of them knows a clock.

use std::ops::Add;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// So many at once, and one more after each interval: datagrams, bytes, changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    burst: u32,
    interval: Duration,
}

impl Rate {
    /// `burst` at once, and one more after each `interval`.
    #[must_use]
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval }
    }

    /// `burst` at once, and `count` in a second after that; `count` is not zero.
    #[must_use]
    pub const fn per_second(count: u32, burst: u32) -> Self {
        Self { burst, interval: Duration::from_nanos(1_000_000_000 / count as u64) }
    }

    /// So many at once.
    #[must_use]
    pub const fn burst(self) -> u32 {
        self.burst
    }

    /// How long the steady pace takes for so many.
    fn time_of(self, count: u32) -> Duration {
        self.interval * count
    }
}

/// What has been taken at a [`Rate`], in a time that is an [`Instant`] or a [`Duration`] since any
/// moment. It does not know the rate, which may be another one from time to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account<T = Instant> {
    /// When all that was taken would have been at the steady pace; none if nothing was.
    paid_until: Option<T>,
}

impl<T> Default for Account<T> {
    fn default() -> Self {
        Self { paid_until: None }
    }
}

impl<T: Copy + Ord + Add<Duration, Output = T>> Account<T> {
    /// Whether there is room for `count` more now. More than the burst there never is.
    #[must_use]
    pub fn has(&self, rate: Rate, count: u32, now: T) -> bool {
        self.after(rate, count, now).is_some()
    }

    /// Takes `count`, all of them or none, and says which.
    pub fn take(&mut self, rate: Rate, count: u32, now: T) -> bool {
        let after = self.after(rate, count, now);
        self.paid_until = after.or(self.paid_until);
        after.is_some()
    }

    /// Takes `count` whether there is room or not: what comes after waits for longer, but for no
    /// longer than `most` take.
    pub fn charge(&mut self, rate: Rate, count: u32, most: u32, now: T) {
        let after = self.busy_until(now) + rate.time_of(count);
        self.paid_until = Some(after.min(now + rate.time_of(most)));
    }

    /// Whether it is as if nothing had ever been taken.
    #[must_use]
    pub fn is_settled(&self, now: T) -> bool {
        self.busy_until(now) <= now
    }

    /// The same account, or an empty one if no taking at `rate` can have led to this one: then it is of a
    /// clock that was set back, and would keep its owner out for as long. For clocks that can be set.
    #[must_use]
    pub fn unless_set_back(self, rate: Rate, now: T) -> Self {
        let possible = self.busy_until(now) <= now + rate.time_of(rate.burst);
        if possible { self } else { Self::default() }
    }

    fn after(&self, rate: Rate, count: u32, now: T) -> Option<T> {
        let after = self.busy_until(now) + rate.time_of(count);
        (after <= now + rate.time_of(rate.burst)).then_some(after)
    }

    fn busy_until(&self, now: T) -> T {
        self.paid_until.map_or(now, |at| at.max(now))
    }
}

impl Account {
    /// When there is room for one, if anything was ever taken.
    #[must_use]
    pub fn room_at(&self, rate: Rate) -> Option<Instant> {
        let ahead = rate.time_of(rate.burst.saturating_sub(1));
        self.paid_until.map(|at| at.checked_sub(ahead).unwrap_or(at))
    }

    /// `count` that were taken do not count.
    pub fn give_back(&mut self, rate: Rate, count: u32) {
        let less = |at: Instant| at.checked_sub(rate.time_of(count)).unwrap_or(at);
        self.paid_until = self.paid_until.map(less);
    }
}

/// An account without a lock, in nanoseconds since any moment. Two threads at the same moment may
/// take once more than there is room for, which does no harm where it is used.
#[derive(Debug, Default)]
pub struct SharedAccount(AtomicU64);

impl SharedAccount {
    /// Takes `count`, all of them or none, and says which.
    pub fn take(&self, rate: Rate, count: u32, now: Duration) -> bool {
        let paid_until = Duration::from_nanos(self.0.load(Ordering::Relaxed));
        let after = Account { paid_until: Some(paid_until) }.after(rate, count, now);
        if let Some(after) = after {
            self.0.store(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        after.is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::epoch;

    const RATE: Rate = Rate::per_second(50, 16);
    const INTERVAL: Duration = Duration::from_millis(20);

    fn taken(account: &mut Account<Duration>, now: Duration) -> usize {
        (0..1_000).filter(|_| account.take(RATE, 1, now)).count()
    }

    #[test]
    fn an_account_refills() {
        let mut account = Account::default();
        assert_eq!(taken(&mut account, Duration::ZERO), 16);
        assert_eq!(taken(&mut account, INTERVAL * 3), 3);
        assert!(!account.is_settled(INTERVAL * 18) && account.is_settled(INTERVAL * 19));
        assert_eq!(taken(&mut account, Duration::from_secs(60)), 16);
    }

    #[test]
    fn who_asks_for_room_for_more_leaves_the_last_to_others() {
        let mut account = Account::default();
        let leaves_ten = |account: &mut Account<Duration>, now| {
            (0..1_000).filter(|_| account.has(RATE, 11, now) && account.take(RATE, 1, now)).count()
        };
        assert_eq!(leaves_ten(&mut account, Duration::ZERO), 6);
        assert_eq!(taken(&mut account, Duration::ZERO), 10);
        assert_eq!(leaves_ten(&mut account, INTERVAL * 10), 0);
    }

    #[test]
    fn there_is_room_when_it_says_so_and_what_is_given_back_can_be_taken() {
        let (mut account, now) = (Account::default(), epoch());
        assert_eq!(account.room_at(RATE), None);
        while account.take(RATE, 1, now) {}
        assert_eq!(account.room_at(RATE), Some(now + INTERVAL));
        account.give_back(RATE, 2);
        assert!(account.take(RATE, 2, now) && !account.take(RATE, 1, now));
    }

    #[test]
    fn what_is_charged_puts_off_and_not_without_end() {
        let (mut account, now) = (Account::default(), epoch());
        (0..17).for_each(|_| account.charge(RATE, 1, 20, now));
        assert_eq!(account.room_at(RATE), Some(now + INTERVAL * 2));
        (0..100).for_each(|_| account.charge(RATE, 1, 20, now));
        assert_eq!(account.room_at(RATE), Some(now + INTERVAL * 5));
    }

    fn any_rate() -> impl Strategy<Value = Rate> {
        let interval = 1..5_000_000_000_u64;
        (1..50_u32, interval).prop_map(|(burst, ns)| Rate::new(burst, Duration::from_nanos(ns)))
    }

    /// How many are wanted, and how long after the last time, in thousandths of an interval.
    fn any_wishes() -> impl Strategy<Value = Vec<(u32, u32)>> {
        prop::collection::vec((0..60_u32, prop_oneof![Just(0), 0..3_000_u32, 0..90_000_u32]), 1..60)
    }

    fn thousandths(rate: Rate, of_interval: u32) -> Duration {
        rate.interval * of_interval / 1_000
    }

    proptest! {
        #[test]
        fn in_no_span_is_more_taken_than_the_burst_and_what_the_pace_gives(
            rate in any_rate(),
            wishes in any_wishes(),
        ) {
            let (mut account, mut now) = (Account::default(), Duration::ZERO);
            let mut taken = Vec::new();
            for (count, pause) in wishes {
                now += thousandths(rate, pause);
                if account.take(rate, count, now) {
                    taken.push((now, count));
                }
            }
            for first in 0..taken.len() {
                let mut sum = 0;
                for (at, count) in &taken[first..] {
                    sum += count;
                    let earned = rate.time_of(sum.saturating_sub(rate.burst));
                    prop_assert!(*at - taken[first].0 >= earned, "{sum} in {taken:?}");
                }
            }
        }

        #[test]
        fn nobody_waits_for_longer_than_the_pace_takes_for_what_it_wants(
            rate in any_rate(),
            wishes in any_wishes(),
        ) {
            let (mut account, mut now) = (Account::default(), epoch());
            for (count, pause) in wishes {
                now += thousandths(rate, pause);
                let possible = count <= rate.burst;
                let has = account.has(rate, count, now);
                let before = account;
                prop_assert_eq!(account.take(rate, count, now), has);
                prop_assert!(has || account == before, "what is refused costs nothing");
                prop_assert_eq!(account.has(rate, count, now + rate.time_of(count)), possible);
                prop_assert!(account.has(rate, rate.burst, now + rate.time_of(rate.burst)));
            }
        }

        #[test]
        fn a_clock_that_goes_back_gives_nothing_away(rate in any_rate(), wishes in any_wishes()) {
            let mut account = Account::default();
            let (mut sum, mut earliest, mut latest) = (0, Duration::MAX, Duration::ZERO);
            for (count, at) in wishes {
                let now = thousandths(rate, at);
                (earliest, latest) = (earliest.min(now), latest.max(now));
                sum += if account.take(rate, count, now) { count } else { 0 };
            }
            prop_assert!(latest - earliest >= rate.time_of(sum.saturating_sub(rate.burst)));
        }

        #[test]
        fn a_clock_that_is_set_back_keeps_nobody_out(
            rate in any_rate(),
            wishes in any_wishes(),
            back in 0..1_000_000_u32,
        ) {
            let (mut account, mut now) = (Account::default(), rate.interval * 1_000);
            for (count, pause) in wishes {
                now += thousandths(rate, pause);
                account.take(rate, count, now);
                prop_assert_eq!(account.unless_set_back(rate, now), account, "it was not");
            }
            let now = now.saturating_sub(thousandths(rate, back));
            let later = now + rate.time_of(rate.burst);
            prop_assert!(account.unless_set_back(rate, now).has(rate, rate.burst, later));
        }

        #[test]
        fn a_shared_account_decides_like_one_of_its_own(
            rate in any_rate(),
            wishes in any_wishes(),
        ) {
            let (shared, mut own, mut now) = (SharedAccount::default(), Account::default(), epoch());
            for (count, pause) in wishes {
                now += thousandths(rate, pause);
                let since = now.duration_since(epoch());
                prop_assert_eq!(shared.take(rate, count, since), own.take(rate, count, now));
            }
        }
    }
}
