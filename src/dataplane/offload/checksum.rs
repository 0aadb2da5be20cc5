//! The Internet checksum (RFC 1071), fast.
//!
//! Words are summed in the byte order of the machine: the one's complement sum of swapped words is
//! the swapped sum, so the result only has to be stored in the same order (RFC 1071 section 2 B).

/// Bytes per round: eight lanes of 32 bits, which compilers turn into vector instructions.
const ROUND: usize = 32;

/// Adds the 16-bit words of `bytes` to `start`. An odd last byte counts as a word with a zero, so
/// only the last of several pieces may be odd.
///
/// Room for carries: 64 bits take the words of 2^32 rounds.
pub(crate) fn sum(bytes: &[u8], start: u64) -> u64 {
    let mut lanes = [0u64; ROUND / 4];
    let (rounds, rest) = bytes.as_chunks::<ROUND>();
    for round in rounds {
        let (words, _) = round.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let mut total = start + lanes.iter().sum::<u64>();
    let (words, last) = rest.as_chunks::<2>();
    for word in words {
        total += u64::from(u16::from_ne_bytes(*word));
    }
    if let [last] = last {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    total
}

/// One 16-bit number, as a term of a sum.
pub(crate) fn word(value: u16) -> u64 {
    u64::from(value.to_be())
}

/// A sum in 16 bits, not complemented: what stands in the checksum field of a packet that the
/// kernel still has to finish. Store it with [`u16::to_ne_bytes`].
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // The loop ends with 16 bits.
    u16::try_from(sum).unwrap_or(u16::MAX)
}

/// The finished checksum of a sum.
pub(crate) fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// Like [`finish`], for TCP and UDP: zero means "no checksum" to UDP, and its other form serves
/// both (RFC 768).
pub(crate) fn finish_transport(sum: u64) -> u16 {
    match finish(sum) {
        0 => u16::MAX,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As RFC 1071 says it, word by word.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }

    proptest::proptest! {
        #[test]
        fn the_fast_sum_is_the_slow_sum(bytes in proptest::collection::vec(0u8.., 0..3000)) {
            proptest::prop_assert_eq!(fold(sum(&bytes, 0)).to_be(), slow(&bytes));
            let (even, odd) = bytes.split_at(bytes.len() / 4 * 2);
            proptest::prop_assert_eq!(fold(sum(odd, sum(even, 0))).to_be(), slow(&bytes));
        }
    }

    #[test]
    fn the_largest_words_do_not_overflow() {
        assert_eq!(fold(sum(&[0xff; 65_535], u64::from(u32::MAX))), slow(&[0xff; 65_535]).to_be());
        assert_eq!(finish_transport(0xffff), 0xffff, "zero is no UDP checksum");
    }
}
