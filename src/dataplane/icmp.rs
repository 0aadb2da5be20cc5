//! Answers to packets that cannot go on, as a router gives them: ICMP (RFC 792, RFC 1191, RFC 1812)
//! and ICMPv6 (RFC 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::offload::checksum;
use crate::wire::ip::IpView;

/// Why a packet cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// It is longer than this many bytes, and must not be cut.
    TooBig {
        /// Bytes that fit.
        mtu: u16,
    },
    /// Nothing is known of the way to its destination.
    HostUnreachable,
    /// A rule forbids it.
    Prohibited,
}

/// An answer about an IPv4 packet has no more bytes (RFC 1812 section 4.3.2.3).
const LONGEST_V4: usize = 576;
/// Nor one about an IPv6 packet, so that it fits every link (RFC 4443 section 2.4 c).
const LONGEST_V6: usize = 1_280;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
const HOPS: u8 = 64;

/// The answer to the sender of `packet`, from address `from`; none where no answer is allowed.
///
/// Never answered (RFC 1812 section 4.3.2.7, RFC 4443 section 2.4 e): an error or a redirect, a
/// fragment that is not the first, what is meant for many or comes from no single host. A packet
/// that may be cut is not too big.
#[must_use]
pub fn answer(packet: &[u8], from: IpAddr, trouble: Trouble) -> Option<Vec<u8>> {
    let view = IpView::parse(packet).ok()?;
    let packet = &packet[..view.len];
    match (view.src, view.dst, from) {
        (IpAddr::V4(src), IpAddr::V4(dst), IpAddr::V4(from)) => {
            let silent = src.is_unspecified()
                || src.is_broadcast()
                || src.is_multicast()
                || src.is_loopback()
                || dst.is_broadcast()
                || dst.is_multicast();
            let cuttable = matches!(trouble, Trouble::TooBig { .. }) && packet[6] & 0x40 == 0;
            (!silent && !cuttable && answers_v4(packet))
                .then(|| build_v4(packet, from, src, trouble))
        }
        (IpAddr::V6(src), IpAddr::V6(dst), IpAddr::V6(from)) => {
            let silent = src.is_unspecified()
                || src.is_multicast()
                || src.is_loopback()
                // Path MTU discovery of multicast is the one exception, and not carried here.
                || dst.is_multicast();
            (!silent && answers_v6(packet)).then(|| build_v6(packet, from, src, trouble))
        }
        _ => None,
    }
}

/// Whether this IPv4 packet may be answered about.
fn answers_v4(packet: &[u8]) -> bool {
    let later_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0;
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    // Only questions and their answers may be answered about: errors and redirects are between.
    let kind = packet.get(header_len).copied();
    let error = packet[9] == ICMP && kind.is_none_or(|kind| matches!(kind, 3..=5 | 11 | 12));
    !later_fragment && !error
}

/// Whether this IPv6 packet may be answered about.
fn answers_v6(packet: &[u8]) -> bool {
    let (mut next, mut at) = (packet[6], 40);
    loop {
        let len = match (next, packet.get(at..at + 8)) {
            // Hop-by-hop options, routing, destination options (RFC 8200 section 4).
            (0 | 43 | 60, Some(header)) => 8 + usize::from(header[1]) * 8,
            (44, Some(header)) if u16::from_be_bytes([header[2], header[3]]) & !7 != 0 => {
                return false;
            }
            (44, Some(_)) => 8,
            (0 | 43 | 44 | 60, None) => return false,
            (ICMP_V6, _) => {
                // Below 128 are the errors; 137 is a redirect.
                return packet.get(at).is_some_and(|kind| *kind >= 128 && *kind != 137);
            }
            _ => return true,
        };
        next = packet[at];
        at += len;
    }
}

fn build_v4(packet: &[u8], from: Ipv4Addr, to: Ipv4Addr, trouble: Trouble) -> Vec<u8> {
    let (code, mtu) = match trouble {
        Trouble::TooBig { mtu } => (4, mtu),
        Trouble::HostUnreachable => (1, 0),
        Trouble::Prohibited => (13, 0),
    };
    let quote = &packet[..packet.len().min(LONGEST_V4 - 28)];
    let len = u16::try_from(28 + quote.len()).unwrap_or(u16::MAX).to_be_bytes();
    // Precedence 6, internetwork control (RFC 1812 section 4.3.2.5).
    let mut bytes = vec![0x45, 0xc0, len[0], len[1], 0, 0, 0, 0, HOPS, ICMP, 0, 0];
    bytes.extend_from_slice(&from.octets());
    bytes.extend_from_slice(&to.octets());
    let sum = checksum::finish(checksum::sum(&bytes, 0)).to_ne_bytes();
    bytes[10..12].copy_from_slice(&sum);
    bytes.extend_from_slice(&[3, code, 0, 0, 0, 0]);
    bytes.extend_from_slice(&mtu.to_be_bytes());
    bytes.extend_from_slice(quote);
    let sum = checksum::finish(checksum::sum(&bytes[20..], 0)).to_ne_bytes();
    bytes[22..24].copy_from_slice(&sum);
    bytes
}

fn build_v6(packet: &[u8], from: Ipv6Addr, to: Ipv6Addr, trouble: Trouble) -> Vec<u8> {
    let (kind, code, mtu) = match trouble {
        // No IPv6 link is narrower (RFC 8200 section 5).
        Trouble::TooBig { mtu } => (2, 0, u32::from(mtu.max(1_280))),
        Trouble::HostUnreachable => (1, 3, 0),
        Trouble::Prohibited => (1, 1, 0),
    };
    let quote = &packet[..packet.len().min(LONGEST_V6 - 48)];
    let len = u16::try_from(8 + quote.len()).unwrap_or(u16::MAX);
    let [high, low] = len.to_be_bytes();
    let mut bytes = vec![0x60, 0, 0, 0, high, low, ICMP_V6, HOPS];
    bytes.extend_from_slice(&from.octets());
    bytes.extend_from_slice(&to.octets());
    bytes.extend_from_slice(&[kind, code, 0, 0]);
    bytes.extend_from_slice(&mtu.to_be_bytes());
    bytes.extend_from_slice(quote);
    let pseudo = checksum::word(len) + checksum::word(u16::from(ICMP_V6));
    let sum = checksum::finish(checksum::sum(&bytes[8..], pseudo)).to_ne_bytes();
    bytes[42..44].copy_from_slice(&sum);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const V4: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];
    const BIG: Trouble = Trouble::TooBig { mtu: 1_064 };

    fn v4(protocol: u8, flags: u16, payload: &[u8]) -> Vec<u8> {
        let [high, low] = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let [f, o] = flags.to_be_bytes();
        let mut packet = vec![0x45, 0, high, low, 0, 0, f, o, 64, protocol, 0, 0];
        packet.extend(V4[0].octets());
        packet.extend(V4[1].octets());
        packet.extend_from_slice(payload);
        packet
    }

    fn addrs_v6() -> [Ipv6Addr; 2] {
        ["fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()]
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let [high, low] = u16::try_from(payload.len()).unwrap().to_be_bytes();
        let mut packet = vec![0x60, 0, 0, 0, high, low, next, 64];
        packet.extend(addrs_v6()[0].octets());
        packet.extend(addrs_v6()[1].octets());
        packet.extend_from_slice(payload);
        packet
    }

    /// Words summed as RFC 1071 says it.
    fn sums_up(bytes: &[u8], pseudo: u32) -> bool {
        let mut sum = pseudo;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum == 0xffff
    }

    #[test]
    fn the_fields_are_those_of_the_standards() {
        let packet = v4(17, 0x4000, &[7; 1_300]);
        let cases =
            [(BIG, 4, 1_064), (Trouble::HostUnreachable, 1, 0), (Trouble::Prohibited, 13, 0)];
        for (trouble, code, mtu) in cases {
            let reply = answer(&packet, V4[1].into(), trouble).unwrap();
            let view = IpView::parse(&reply).unwrap();
            assert_eq!((view.src, view.dst, view.len), (V4[1].into(), V4[0].into(), 576));
            assert_eq!((reply[9], reply[20], reply[21]), (1, 3, code));
            assert_eq!(u16::from_be_bytes([reply[26], reply[27]]), mtu);
            assert_eq!(reply[28..], packet[..548]);
            assert!(sums_up(&reply[..20], 0) && sums_up(&reply[20..], 0));
        }
        let packet = v6(6, &[7; 1_400]);
        let [own, peer] = addrs_v6();
        for (trouble, kind, code, mtu) in [
            (Trouble::TooBig { mtu: 1_420 }, 2, 0, 1_420u32),
            (BIG, 2, 0, 1_280),
            (Trouble::HostUnreachable, 1, 3, 0),
            (Trouble::Prohibited, 1, 1, 0),
        ] {
            let reply = answer(&packet, peer.into(), trouble).unwrap();
            let view = IpView::parse(&reply).unwrap();
            assert_eq!((view.src, view.dst, view.len), (peer.into(), own.into(), 1_280));
            assert_eq!((reply[6], reply[40], reply[41]), (58, kind, code));
            assert_eq!(reply[44..48], mtu.to_be_bytes());
            assert_eq!(reply[48..], packet[..1_232]);
            assert!(sums_up(&reply[8..], u32::try_from(reply.len()).unwrap() - 40 + 58));
        }
    }

    #[test]
    fn errors_late_fragments_and_strange_addresses_are_not_answered() {
        let from = V4[1].into();
        for kind in 0..=255u8 {
            let allowed = answer(&v4(1, 0x4000, &[kind; 8]), from, BIG).is_some();
            assert_eq!(allowed, !matches!(kind, 3..=5 | 11 | 12), "ICMP {kind}");
            let reply = answer(&v6(58, &[kind; 8]), addrs_v6()[1].into(), BIG);
            assert_eq!(reply.is_some(), kind >= 128 && kind != 137, "ICMPv6 {kind}");
        }
        assert_eq!(answer(&v4(17, 0x4001, b""), from, BIG), None, "a late fragment");
        assert!(answer(&v4(17, 0x6000, b""), from, BIG).is_some(), "the first one");
        assert_eq!(answer(&v4(17, 0, b""), from, BIG), None, "it may be cut");
        assert!(answer(&v4(17, 0, b""), from, Trouble::Prohibited).is_some());
        for (at, octets) in
            [(12, [0, 0, 0, 0]), (12, [224, 0, 0, 1]), (16, [255; 4]), (12, [127; 4])]
        {
            let mut packet = v4(17, 0x4000, b"");
            packet[at..at + 4].copy_from_slice(&octets);
            assert_eq!(answer(&packet, from, BIG), None, "{octets:?} at {at}");
        }
        let fragment = |offset: u8| [17, 0, 0, offset, 0, 0, 0, 1];
        let peer = addrs_v6()[1].into();
        assert!(answer(&v6(44, &fragment(1)), peer, BIG).is_some());
        assert_eq!(answer(&v6(44, &fragment(8)), peer, BIG), None);
        let behind_options = [[58, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(answer(&v6(60, &behind_options), peer, BIG), None, "an error behind options");
        assert_eq!(answer(&v6(17, b""), from, BIG), None, "the other family");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_and_no_answer_is_answered(
            bytes in proptest::collection::vec(0u8.., 0..120),
            six: bool,
        ) {
            let mut packet = if six { v6(0, &bytes) } else { v4(1, 0x4000, &bytes) };
            if six && let [_, .., last] = bytes[..] {
                packet[6] = last;
            }
            let from: IpAddr = if six { addrs_v6()[1].into() } else { V4[1].into() };
            for trouble in [BIG, Trouble::HostUnreachable, Trouble::Prohibited] {
                if let Some(reply) = answer(&packet, from, trouble) {
                    let longest = if six { LONGEST_V6 } else { LONGEST_V4 };
                    prop_assert!(reply.len() <= longest);
                    prop_assert_eq!(answer(&reply, from, trouble), None);
                }
                let _ = answer(&bytes, from, trouble);
            }
        }
    }
}
