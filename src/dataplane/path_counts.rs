//! How much data went to or came from one peer, by path.

use crate::path::{Place, Via};
use crate::types::SizeCounts;

/// Paths that are counted apart; the one that was used least lately makes room.
const MAX_PATHS: usize = 8;

/// Counts by path, the path in use first.
#[derive(Debug, Default)]
pub struct PathCounts {
    counts: Vec<(Option<Place>, SizeCounts)>,
}

/// All relay paths are one: what leaves by UDP may arrive by TCP.
fn key_of(via: Via) -> Option<Place> {
    via.place()
}

impl PathCounts {
    /// Adds what a run of packets has counted.
    pub(super) fn add(&mut self, via: Via, counts: SizeCounts) {
        let key = key_of(via);
        let at = self.counts.iter().position(|(path, _)| *path == key).unwrap_or_else(|| {
            self.counts.truncate(MAX_PATHS - 1);
            self.counts.push((key, SizeCounts::default()));
            self.counts.len() - 1
        });
        self.counts[..=at].rotate_right(1);
        if let Some((_, sum)) = self.counts.first_mut() {
            sum.add(counts);
        }
    }

    /// What was counted on a path.
    #[must_use]
    pub fn of(&self, via: Via) -> SizeCounts {
        let key = key_of(via);
        let found = self.counts.iter().find(|(path, _)| *path == key);
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
        assert_eq!(counts.counts.len(), MAX_PATHS);
        assert_eq!((of(&counts, via(1)), of(&counts, via(99)), of(&counts, via(2))), (93, 1, 0));
    }
}
