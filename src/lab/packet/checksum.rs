//! The internet checksum, in full (RFC 1071) and by difference (RFC 1624).

use std::net::Ipv4Addr;

/// The checksum of `bytes`; the checksum field must be zero in them.
pub(super) fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u16::from_be_bytes([high, low]),
        [high] => u16::from_be_bytes([high, 0]),
        _ => 0,
    });
    !fold(words.map(u64::from).sum())
}

/// The difference that some replaced words make to a checksum.
#[derive(Clone, Copy, Default)]
pub(super) struct Change {
    sum: u64,
}

impl Change {
    pub(super) fn word(&mut self, before: u16, after: u16) {
        self.sum += u64::from(!before) + u64::from(after);
    }

    pub(super) fn address(&mut self, before: Ipv4Addr, after: Ipv4Addr) {
        let (before, after) = (before.octets(), after.octets());
        for at in [0, 2] {
            self.word(
                u16::from_be_bytes([before[at], before[at + 1]]),
                u16::from_be_bytes([after[at], after[at + 1]]),
            );
        }
    }

    /// The checksum after the change.
    pub(super) fn apply(self, checksum: u16) -> u16 {
        !fold(u64::from(!checksum) + self.sum)
    }
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}
