//! How much data went to or came from one peer, by path.

use crate::path::{Place, Via};
use crate::types::SizeCounts;

/// Direct paths that are counted apart; the one that was used least lately makes room.
const MAX_PATHS: usize = 8;

/// Counts by path.
#[derive(Debug, Default)]
pub struct PathCounts {
    /// All relay paths are one: what leaves by UDP may arrive by TCP.
    relay: SizeCounts,
    /// Direct paths, the one in use first.
    direct: Vec<(Place, SizeCounts)>,
}

impl PathCounts {
    /// Adds what a run of packets has counted.
    pub(super) fn add(&mut self, via: Via, counts: SizeCounts) {
        let Some(place) = via.place() else { return self.relay.add(counts) };
        let at = self.direct.iter().position(|(path, _)| *path == place).unwrap_or_else(|| {
            self.direct.truncate(MAX_PATHS - 1);
            self.direct.push((place, SizeCounts::default()));
            self.direct.len() - 1
        });
        self.direct[..=at].rotate_right(1);
        if let Some((_, sum)) = self.direct.first_mut() {
            sum.add(counts);
        }
    }

    /// Adds what nothing vouches for: it makes no path, and keeps none in use.
    pub(super) fn add_known(&mut self, via: Via, counts: SizeCounts) {
        let Some(place) = via.place() else { return self.relay.add(counts) };
        if let Some((_, sum)) = self.direct.iter_mut().find(|(path, _)| *path == place) {
            sum.add(counts);
        }
    }

    /// What was counted on a path that the other end asks for. It is known from here on, as far as
    /// there is room: a question may be a recording, and takes the place of no path with data.
    pub fn report(&mut self, via: Via) -> SizeCounts {
        if let Some(place) = via.place()
            && self.direct.iter().all(|(path, _)| *path != place)
        {
            if self.direct.len() == MAX_PATHS {
                self.direct.pop_if(|(_, counts)| *counts == SizeCounts::default());
            }
            if self.direct.len() < MAX_PATHS {
                self.direct.push((place, SizeCounts::default()));
            }
        }
        self.of(via)
    }

    /// What was counted on a path.
    #[must_use]
    pub fn of(&self, via: Via) -> SizeCounts {
        let Some(place) = via.place() else { return self.relay };
        let found = self.direct.iter().find(|(path, _)| *path == place);
        found.map_or(SizeCounts::default(), |(_, counts)| *counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_counted_apart_and_only_so_many() {
        let via = |port| Via::direct(([192, 0, 2, 1], port).into());
        let one = SizeCounts([1, 0, 0]);
        let mut counts = PathCounts::default();
        for port in [1, 2, 1, 1] {
            counts.add(via(port), one);
        }
        counts.add(Via::RelayTcp, one);
        counts.add(Via::RelayUdp, one);
        let of = |counts: &PathCounts, via| counts.of(via).total();
        assert_eq!(
            [via(1), via(2), via(3), Via::RelayUdp].map(|via| of(&counts, via)),
            [3, 1, 0, 2]
        );
        for port in 10..100 {
            counts.add(via(port), one);
            counts.add(via(1), one);
        }
        assert_eq!(counts.direct.len(), MAX_PATHS);
        assert_eq!((of(&counts, via(1)), of(&counts, via(99)), of(&counts, via(2))), (93, 1, 0));
    }

    #[test]
    fn what_nothing_vouches_for_counts_on_known_paths_and_takes_no_place() {
        let via = |port| Via::direct(([192, 0, 2, 1], port).into());
        let (none, one) = (SizeCounts::default(), SizeCounts([0, 1, 0]));
        let mut counts = PathCounts::default();
        counts.add_known(via(1), one);
        assert_eq!((counts.of(via(1)), counts.direct.len()), (none, 0));
        assert_eq!(counts.report(via(1)), none);
        counts.add_known(via(1), one);
        assert_eq!(counts.report(via(1)), one, "somebody has asked for it");
        counts.add(via(2), one);
        counts.add_known(Via::RelayTcp, one);
        assert_eq!(counts.report(Via::RelayUdp), one, "there is one relay, it needs no room");

        for port in 10..100 {
            counts.report(via(port));
        }
        counts.add_known(via(99), one);
        assert_eq!(counts.of(via(99)), one, "of those without data the last has its place");
        assert_eq!(counts.direct.len(), MAX_PATHS);
        for port in 100..110 {
            counts.add_known(via(port), one);
            assert_eq!(counts.report(via(port)), none, "the last has data");
        }
        assert_eq!([1, 2].map(|port| counts.of(via(port))), [one; 2], "these are still here");
        for port in 3..9 {
            counts.add(via(port), one);
        }
        let seen = [1, 2, 3, 4, 5, 6, 7, 8, 99].map(|port| counts.of(via(port)).total());
        assert_eq!(seen, [1, 1, 1, 1, 1, 1, 1, 1, 0], "what came with data has all the room");
    }
}
