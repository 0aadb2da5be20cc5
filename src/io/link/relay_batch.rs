//! Relay datagrams that have arrived together.

use std::ops::Range;

/// Datagrams in their order, one behind the other in one buffer.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct RelayBatch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl RelayBatch {
    /// Adds one.
    pub fn push(&mut self, datagram: &[u8]) {
        self.bytes.extend_from_slice(datagram);
        self.ends.push(self.bytes.len());
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is none, or there are empty ones only.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Where each of them is in [`Self::bytes_mut`].
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(self.ends.iter().copied()).map(|(start, end)| start..end)
    }

    /// The datagrams.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.ranges().map(|range| &self.bytes[range])
    }

    /// All of them, one behind the other.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}
