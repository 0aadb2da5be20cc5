//! Datagrams in a row that go the same way, put together.

use std::ops::Range;

use crate::server::relay::Way;
use crate::types::MAX_TRAIN_BYTES;

/// Each with its way, where it is, and the length of its datagrams: all but the last are as long; and whether
/// the last one stays alone.
#[derive(Debug, Default)]
pub(super) struct Trains(pub(super) Vec<(Way, Range<usize>, usize)>, bool);

impl Trains {
    /// Adds the datagram at `range`, as a train of its own if it is to travel alone.
    pub(super) fn push(&mut self, way: Way, range: Range<usize>, alone: bool) {
        let len = range.len();
        let joins = !std::mem::replace(&mut self.1, alone) && !alone;
        if let Some((before, whole, segment)) = self.0.last_mut()
            && joins
            && *before == way
            && whole.end == range.start
            && len <= *segment
            && whole.len().is_multiple_of((*segment).max(1))
            && whole.len() + len <= MAX_TRAIN_BYTES
        {
            whole.end = range.end;
        } else {
            self.0.push((way, range, len));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::ConnectionId;

    #[test]
    fn equal_ones_in_a_row_form_a_train_and_a_shorter_one_or_a_gap_ends_it() {
        let ways = [Way::Link(ConnectionId(1)), Way::Link(ConnectionId(2))];
        let mut trains = Trains::default();
        // Way and length; the fifth was dropped.
        let datagrams = [(0, 100), (0, 100), (0, 60), (0, 60), (9, 60), (0, 60), (0, 90), (1, 90)];
        let mut start = 0;
        for (way, len) in datagrams {
            if let Some(way) = ways.get(way) {
                trains.push(*way, start..start + len, false);
            }
            start += len;
        }
        let lens: Vec<_> = trains.0.iter().map(|(_, range, len)| (range.len(), *len)).collect();
        assert_eq!(lens, [(260, 100), (60, 60), (60, 60), (90, 90), (90, 90)]);
        let mut trains = Trains::default();
        (0..100)
            .for_each(|number| trains.push(ways[0], number * 1_400..(number + 1) * 1_400, false));
        let lens: Vec<_> = trains.0.iter().map(|(_, range, _)| range.len()).collect();
        assert_eq!(lens, [64_400, 64_400, 11_200], "never more than one call can send");
        let mut trains = Trains::default();
        (0..5).for_each(|number| trains.push(ways[0], number * 10..number * 10 + 10, number == 2));
        let lens: Vec<_> = trains.0.iter().map(|(_, range, _)| range.len()).collect();
        assert_eq!(lens, [20, 10, 20], "one that travels alone");
    }
}
