//! Paths that nobody has asked for yet are made one after the other: in a network that starts all at
//! once every node would otherwise send to every other in the same second.

use std::time::{Duration, Instant};

/// So many peers at once.
pub(super) const BURST: u32 = 4;
/// One more after each of these.
const INTERVAL: Duration = Duration::from_millis(250);

/// Lets peers start, a few at once and then at a steady pace (the generic cell rate algorithm).
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When all that has started would have done so at the steady pace.
    paid_until: Option<Instant>,
    waiting: bool,
}

impl Pace {
    /// Whether one more may start now. If not, [`Self::next_at`] says when to ask again.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let paid_until = self.paid_until.map_or(now, |at| at.max(now));
        if paid_until > now + INTERVAL * (BURST - 1) {
            self.waiting = true;
            return false;
        }
        self.paid_until = Some(paid_until + INTERVAL);
        true
    }

    /// When somebody who waits may start.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.paid_until.filter(|_| self.waiting).map(|at| at - INTERVAL * (BURST - 1))
    }

    /// Everybody who waits asks again.
    pub(super) fn ask_again(&mut self) {
        self.waiting = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    #[test]
    fn a_few_start_at_once_and_the_others_in_turn() {
        let mut pace = Pace::default();
        let mut now = epoch();
        assert_eq!((0..20).filter(|_| pace.take(now)).count(), 4);
        for _ in 0..10 {
            now = pace.next_at().expect("somebody waits");
            pace.ask_again();
            assert!(pace.take(now) && !pace.take(now), "one at a time");
        }
        assert_eq!(now, epoch() + INTERVAL * 10);
        pace.ask_again();
        assert_eq!(pace.next_at(), None, "nobody waits");
    }
}
