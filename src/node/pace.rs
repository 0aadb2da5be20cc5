//! Paths that nobody has asked for yet are made one after the other: in a network that starts all at
//! once every node would otherwise send to every other in the same second.

use std::time::{Duration, Instant};

use crate::types::{Account, Rate};

/// So many peers start at once in a small network,
pub(super) const BURST: u32 = 4;
/// and then one after the other.
const FEW: Rate = Rate::new(BURST, Duration::from_millis(250));
/// A larger one has more peers than this. There every node is called by others all the time while the
/// network starts,
const SMALL: usize = 8;
/// so it starts one peer at a time.
const MANY: Rate = Rate::new(1, Duration::from_millis(600));
/// Peers that have called put off those who wait by so many turns at the most.
const MAX_TURNS: u32 = 8;

/// Lets peers start, a few at once and then at a steady pace.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Rate,
    started: Account,
    waiting: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self { rate: FEW, started: Account::default(), waiting: false }
    }
}

impl Pace {
    /// Sets the pace for a network of so many peers.
    pub(super) fn set_peers(&mut self, peers: usize) {
        self.rate = if peers <= SMALL { FEW } else { MANY };
    }

    /// Whether one more may start now. If not, [`Self::next_at`] says when to ask again.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let may = self.started.take(self.rate, 1, now);
        self.waiting |= !may;
        may
    }

    /// A peer has called and is answered at once; somebody who waits does so for longer instead.
    pub(super) fn charge(&mut self, now: Instant) {
        self.started.charge(self.rate, 1, MAX_TURNS, now);
    }

    /// When somebody who waits may start.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.started.room_at(self.rate).filter(|_| self.waiting)
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

    const INTERVAL: Duration = Duration::from_millis(250);
    const LARGE_INTERVAL: Duration = Duration::from_millis(600);

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

    #[test]
    fn in_a_large_network_one_starts_after_the_other_and_who_calls_takes_a_turn() {
        let (mut pace, now) = (Pace::default(), epoch());
        pace.set_peers(SMALL + 1);
        assert_eq!((0..20).filter(|_| pace.take(now)).count(), 1);
        assert_eq!(pace.next_at(), Some(now + LARGE_INTERVAL));
        pace.charge(now);
        assert_eq!(pace.next_at(), Some(now + LARGE_INTERVAL * 2));
        (0..100).for_each(|_| pace.charge(now));
        assert_eq!(pace.next_at(), Some(now + LARGE_INTERVAL * MAX_TURNS), "and no more");
        assert!(pace.take(now + LARGE_INTERVAL * MAX_TURNS));
    }
}
