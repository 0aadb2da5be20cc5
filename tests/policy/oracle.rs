//! What the access rules mean, done slowly: packets are put together whole before anybody looks at
//! them, rules are tried one after the other, flows are a list. Shares no code with the filter.

use std::net::IpAddr;

use overlay::wire::filter::WireRule;

/// How a host treats bytes of a packet that two fragments claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overlap {
    /// What came first stays.
    FirstWins,
    /// What came last stays.
    LastWins,
    /// The whole packet is dropped, as Linux does.
    Drops,
}

/// One packet or fragment, told apart from its bytes.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    v6: bool,
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    /// What the first byte of the data is.
    next: u8,
    /// Extension headers in front of the fragment header.
    before: Vec<u8>,
    offset: usize,
    more: bool,
    data: Vec<u8>,
    fragmented: bool,
    bad: bool,
}

/// What a whole packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    Tcp {
        src: u16,
        dst: u16,
        opens: bool,
    },
    Udp {
        src: u16,
        dst: u16,
    },
    EchoRequest,
    EchoReply {
        id: u16,
    },
    /// Protocol of the quoted packet, its source port or identifier, its destination port.
    Error(Option<(u8, u16, u16)>),
    OtherIcmp,
    Other,
}

/// A flow that the receiver started: protocol (1 for echo), own port, other port.
pub(crate) type OwnFlow = (bool, u8, u16, u16);

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from(*bytes.get(at)?) << 8 | u16::from(*bytes.get(at + 1)?))
}

impl Piece {
    /// Reads the IP header and, with IPv6, what stands in front of a fragment header.
    pub(crate) fn read(packet: &[u8]) -> Self {
        let v6 = packet[0] >> 4 == 6;
        if v6 { Self::read_v6(packet) } else { Self::read_v4(packet) }
    }

    fn read_v4(packet: &[u8]) -> Self {
        let header = usize::from(packet[0] & 15) * 4;
        let place = u16_at(packet, 6).unwrap();
        let (offset, more) = (usize::from(place & 0x1fff) * 8, place & 0x2000 != 0);
        let mut bad = false;
        let mut options = &packet[20..header];
        while let [kind, rest @ ..] = options {
            match (*kind, rest.first()) {
                (0, _) => break,
                (1, _) => options = rest,
                (131 | 137, _) | (_, None | Some(0 | 1)) => {
                    bad = true;
                    break;
                }
                (_, Some(len)) if usize::from(*len) > options.len() => {
                    bad = true;
                    break;
                }
                (_, Some(len)) => options = &options[usize::from(*len)..],
            }
        }
        let addr = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap());
        Self {
            v6: false,
            src: addr(12),
            dst: addr(16),
            id: u16_at(packet, 4).unwrap().into(),
            next: packet[9],
            before: Vec::new(),
            offset,
            more,
            data: packet[header..].to_vec(),
            fragmented: more || offset > 0,
            bad,
        }
    }

    fn read_v6(packet: &[u8]) -> Self {
        let addr = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
        let mut piece = Self {
            v6: true,
            src: addr(8),
            dst: addr(24),
            id: 0,
            next: packet[6],
            before: Vec::new(),
            offset: 0,
            more: false,
            data: packet[40..].to_vec(),
            fragmented: false,
            bad: false,
        };
        // Looks for a fragment header behind any number of others.
        let (mut next, mut at, mut last) = (packet[6], 40, None);
        while matches!(next, 0 | 43 | 60) && packet.len() >= at + 2 {
            let len = 8 + usize::from(packet[at + 1]) * 8;
            last = Some(at);
            next = packet[at];
            at += len;
        }
        let Some(header) = packet.get(at..at + 8).filter(|_| next == 44) else { return piece };
        let place = u16_at(header, 2).unwrap();
        piece.offset = usize::from(place & !7);
        piece.more = place & 1 != 0;
        piece.fragmented = piece.more || piece.offset > 0;
        if piece.fragmented {
            piece.id = u32::from_be_bytes(header[4..8].try_into().unwrap());
            piece.before = packet[40..at].to_vec();
            if let Some(last) = last {
                // The header that named the fragment header names what comes behind it.
                piece.before[last - 40] = header[0];
                piece.next = packet[6];
            } else {
                piece.next = header[0];
            }
            piece.data = packet[at + 8..].to_vec();
        }
        piece
    }

    /// Whether a receiver puts this together with `other`.
    fn belongs_to(&self, other: &Self) -> bool {
        let protocol = self.v6 || self.next == other.next;
        (self.v6, self.src, self.dst, self.id) == (other.v6, other.src, other.dst, other.id)
            && protocol
    }
}

/// Puts together what a host would make of `pieces`, in the order in which they came: the meaning
/// of every whole packet, none for one that cannot be read.
pub(crate) fn reassemble(pieces: &[Piece], overlap: Overlap) -> Vec<Option<Meaning>> {
    let mut whole: Vec<Option<Meaning>> = pieces
        .iter()
        .filter(|piece| !piece.fragmented)
        .map(|piece| meaning(piece, &piece.data))
        .collect();
    let mut rest: Vec<&Piece> = pieces.iter().filter(|piece| piece.fragmented).collect();
    while let Some(first) = rest.first().copied() {
        let (own, others): (Vec<&Piece>, Vec<&Piece>) =
            rest.into_iter().partition(|piece| piece.belongs_to(first));
        rest = others;
        whole.extend(join(&own, overlap));
    }
    whole
}

/// Every reading that a host could have: its headers come from any of the first fragments.
fn join(pieces: &[&Piece], overlap: Overlap) -> Vec<Option<Meaning>> {
    let mut bytes: Vec<Option<u8>> = Vec::new();
    let mut ends = Vec::new();
    for (number, piece) in pieces.iter().enumerate() {
        let end = piece.offset + piece.data.len();
        if end > 65_535 || piece.data.is_empty() {
            continue;
        }
        if !piece.more {
            ends.push(end);
        }
        let copy = pieces[..number]
            .iter()
            .any(|before| before.offset == piece.offset && before.data == piece.data);
        bytes.resize(bytes.len().max(end), None);
        for (at, byte) in piece.data.iter().enumerate() {
            let slot = &mut bytes[piece.offset + at];
            match (slot.is_some(), overlap) {
                (true, Overlap::FirstWins) => {}
                (true, Overlap::Drops) if !copy => return Vec::new(),
                _ => *slot = Some(*byte),
            }
        }
    }
    let mut whole = Vec::new();
    for end in ends {
        let data: Option<Vec<u8>> = bytes[..end].iter().copied().collect();
        let Some(data) = data else { continue };
        for first in pieces.iter().filter(|piece| piece.offset == 0) {
            whole.push(meaning(first, &data));
        }
    }
    whole
}

/// What a packet with the headers of `head` and this data carries; none when it is broken.
fn meaning(head: &Piece, data: &[u8]) -> Option<Meaning> {
    if head.bad {
        return None;
    }
    let whole = [head.before.as_slice(), data].concat();
    let (mut next, mut rest) = (head.next, whole.as_slice());
    let (mut headers, mut fragment_headers) = (0, u8::from(head.fragmented));
    while head.v6 && matches!(next, 0 | 43 | 44 | 60) {
        let header = rest.get(..8)?;
        let len = if next == 44 { 8 } else { 8 + usize::from(header[1]) * 8 };
        fragment_headers += u8::from(next == 44);
        let nested = next == 44 && (u16_at(header, 2)? & 0xfff9 != 0 || fragment_headers > 1);
        let strange = (next == 0 && headers > 0) || (next == 43 && header[3] != 0) || nested;
        headers += 1;
        if strange || headers > 8 {
            return None;
        }
        next = header[0];
        rest = rest.get(len..)?;
    }
    match (next, head.v6) {
        (6, _) => {
            let len = usize::from(*rest.get(12)? >> 4) * 4;
            if len < 20 || rest.len() < len {
                return None;
            }
            let opens = rest[13] & 0x16 == 0x02;
            Some(Meaning::Tcp { src: u16_at(rest, 0)?, dst: u16_at(rest, 2)?, opens })
        }
        (17, _) => {
            rest.get(7)?;
            Some(Meaning::Udp { src: u16_at(rest, 0)?, dst: u16_at(rest, 2)? })
        }
        (1, false) | (58, true) => {
            rest.get(7)?;
            let id = u16_at(rest, 4)?;
            Some(match (head.v6, rest[0]) {
                (false, 8) | (true, 128) => Meaning::EchoRequest,
                (false, 0) | (true, 129) => Meaning::EchoReply { id },
                (false, 3 | 4 | 5 | 11 | 12) | (true, 0..128) => {
                    Meaning::Error(quoted(&rest[8..], head))
                }
                _ => Meaning::OtherIcmp,
            })
        }
        _ => Some(Meaning::Other),
    }
}

/// The flow that an ICMP error is about.
fn quoted(quote: &[u8], head: &Piece) -> Option<(u8, u16, u16)> {
    // An IP header and eight bytes.
    let least = if head.v6 { 48 } else { 28 };
    if quote.len() < least || !matches!((quote[0], head.v6), (0x45, false) | (0x60..0x70, true)) {
        return None;
    }
    let inner = Piece::read(quote);
    if (inner.src, inner.dst) != (head.dst, head.src)
        || inner.offset > 0
        || head.fragmented
        || inner.data.len() < 8
    {
        return None;
    }
    match inner.next {
        6 | 17 => Some((inner.next, u16_at(&inner.data, 0)?, u16_at(&inner.data, 2)?)),
        1 if !head.v6 && inner.data[0] == 8 => Some((1, u16_at(&inner.data, 4)?, 0)),
        58 if head.v6 && inner.data[0] == 128 => Some((1, u16_at(&inner.data, 4)?, 0)),
        _ => None,
    }
}

/// Whether rules and flows let in what `peer` sends.
pub(crate) fn allows(
    rules: &[WireRule],
    peer: u32,
    v6: bool,
    own: &[OwnFlow],
    meaning: Option<Meaning>,
) -> bool {
    let by_rule = |protocol: u8, port: Option<u16>| {
        rules.iter().any(|rule| {
            let from = rule.sources.as_ref().is_none_or(|runs| {
                runs.iter().any(|(first, last)| (*first..=*last).contains(&peer))
            });
            let to = rule.ports.as_ref().is_none_or(|runs| {
                let inside =
                    |port| runs.iter().any(|(first, last)| (*first..=*last).contains(&port));
                port.is_some_and(inside)
            });
            from && (rule.kind == 0 || rule.kind == protocol && to)
        })
    };
    let ours = |protocol, own_port, other| own.contains(&(v6, protocol, own_port, other));
    if by_rule(0, None) {
        return true;
    }
    match meaning {
        None | Some(Meaning::Other) => false,
        Some(Meaning::Tcp { src, dst, opens }) => {
            by_rule(6, Some(dst)) || !opens && ours(6, dst, src)
        }
        Some(Meaning::Udp { src, dst }) => by_rule(17, Some(dst)) || ours(17, dst, src),
        Some(Meaning::EchoReply { id }) => by_rule(1, Some(0)) || ours(1, id, 0),
        Some(Meaning::EchoRequest | Meaning::OtherIcmp) => by_rule(1, Some(0)),
        Some(Meaning::Error(about)) => {
            by_rule(1, Some(0))
                || about.is_some_and(|(protocol, local, remote)| {
                    ours(protocol, local, remote) || protocol != 1 && by_rule(protocol, Some(local))
                })
        }
    }
}
