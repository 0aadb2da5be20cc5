//! How many datagrams of data went one way on one path, by size.

use super::sizes::{BASE_MTU, SEAL_OVERHEAD};

/// Datagrams of data since the path was first used, in classes of their length; they wrap around.
///
/// A path may carry one class and not another: what has room for a question need not have room for
/// a full packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SizeCounts(pub [u32; Self::CLASSES]);

impl SizeCounts {
    /// Short ones; full ones at the inner MTU that every path has; and those that only a path of a
    /// larger MTU gets.
    pub const CLASSES: usize = 3;
    /// The class of short datagrams.
    pub const SHORT: usize = 0;
    /// The class of datagrams that hold a packet of up to 1280 bytes.
    pub const FULL: usize = 1;
    /// The class of datagrams that hold a larger packet.
    pub const LARGE: usize = 2;

    /// The class of a datagram of `len` bytes.
    #[must_use]
    pub const fn class_of(len: usize) -> usize {
        (len >= SHORTEST_FULL) as usize + (len > LONGEST_FULL) as usize
    }

    /// Counts `datagrams` of `len` bytes.
    pub fn count(&mut self, len: usize, datagrams: u32) {
        let count = &mut self.0[Self::class_of(len)];
        *count = count.wrapping_add(datagrams);
    }

    /// Adds what another has counted.
    pub fn add(&mut self, other: Self) {
        for (count, more) in self.0.iter_mut().zip(other.0) {
            *count = count.wrapping_add(more);
        }
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self(std::array::from_fn(|class| self.0[class].wrapping_sub(earlier.0[class])))
    }

    /// Datagrams of all classes.
    #[must_use]
    pub fn total(self) -> u32 {
        self.0.into_iter().fold(0, u32::wrapping_add)
    }
}

/// In bytes; shorter ones pass wherever a question passes.
const SHORTEST_FULL: usize = 1_000;
/// Bytes of the packet that every path takes, sealed.
const LONGEST_FULL: usize = (BASE_MTU + SEAL_OVERHEAD) as usize;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_has_a_class_and_counts_survive_the_wrap() {
        for (len, class) in [(0, 0), (999, 0), (1_000, 1), (1_312, 1), (1_313, 2), (9_000, 2)] {
            assert_eq!(SizeCounts::class_of(len), class, "{len}");
        }
        let before = SizeCounts([u32::MAX, 0, 7]);
        let mut after = before;
        after.count(32, 3);
        after.count(1_400, 1);
        assert_eq!(after.since(before), SizeCounts([3, 0, 1]));
        assert_eq!(after.since(before).total(), 4);
    }
}
