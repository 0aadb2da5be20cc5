//! What a filter has to know of an IP packet, read in full or not at all.
//!
//! A filter and a host that read the same bytes differently are a hole. So whatever could be read
//! in two ways is an [`Evasion`]: headers that are cut off, header bytes that a later fragment
//! could still replace, a source route, a chain of extension headers without end (RFC 791,
//! RFC 1858, RFC 3128, RFC 7112, RFC 8200).

use std::net::IpAddr;

use crate::wire::ip::IpView;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// More extension headers than any program sends.
const MAX_HEADERS: usize = 8;
/// Bytes of the largest IP payload that can be put together of fragments.
const MAX_PAYLOAD: u32 = 65_535;

/// A packet that is broken, or made so that a filter and a host could read it differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a packet that cannot be read in one way only")]
pub struct Evasion;

/// The place of a fragment in its packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Common to all fragments of the packet.
    pub id: u32,
    /// Where its bytes belong.
    pub offset: u32,
    /// How many there are.
    pub len: u32,
    /// What the first byte of the packet's payload is: the protocol, or with IPv6 perhaps an
    /// extension header.
    pub next: u8,
}

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A TCP segment.
    Tcp {
        /// Port of the sender.
        src: u16,
        /// Port of the receiver.
        dst: u16,
        /// The byte of flags.
        flags: u8,
    },
    /// A UDP datagram.
    Udp {
        /// Port of the sender.
        src: u16,
        /// Port of the receiver.
        dst: u16,
    },
    /// An ICMP or ICMPv6 echo request.
    EchoRequest {
        /// Its identifier.
        id: u16,
    },
    /// An ICMP or ICMPv6 echo reply.
    EchoReply {
        /// Its identifier.
        id: u16,
    },
    /// An ICMP or ICMPv6 error, about a packet that the receiver is said to have sent.
    IcmpError {
        /// What that packet carried, when it can be told.
        about: Option<Quoted>,
    },
    /// Any other ICMP or ICMPv6 message.
    Icmp,
    /// Another protocol.
    Other,
    /// A fragment without the headers; its first fragment has them.
    Later,
}

/// The packet that an ICMP error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quoted {
    /// A TCP segment from this port to that one.
    Tcp(u16, u16),
    /// A UDP datagram from this port to that one.
    Udp(u16, u16),
    /// An echo request with this identifier.
    EchoRequest(u16),
}

/// One packet as the filter sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// None for a whole packet.
    pub fragment: Option<Fragment>,
    /// What it carries.
    pub transport: Transport,
}

/// Whether all of a header must be there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    Whole,
    /// The first bytes of a packet, as an ICMP error quotes them.
    Quote,
}

impl Packet {
    /// Reads one packet.
    ///
    /// # Errors
    /// When it is broken or could be read in another way too.
    pub fn parse(bytes: &[u8]) -> Result<Self, Evasion> {
        let view = IpView::parse(bytes).map_err(|_| Evasion)?;
        let bytes = bytes.get(..view.len).ok_or(Evasion)?;
        let body = Body::of(bytes, Depth::Whole)?;
        let transport = match body.fragment {
            Some(fragment) if fragment.offset > 0 => Transport::Later,
            fragment => transport(&body, &view, fragment.is_some())?,
        };
        Ok(Self { src: view.src, dst: view.dst, fragment: body.fragment, transport })
    }

    /// Whether this is IPv6.
    #[must_use]
    pub fn is_ipv6(&self) -> bool {
        self.src.is_ipv6()
    }
}

/// What comes behind the IP header and the extension headers.
struct Body<'p> {
    v6: bool,
    protocol: u8,
    payload: &'p [u8],
    fragment: Option<Fragment>,
}

impl<'p> Body<'p> {
    fn of(bytes: &'p [u8], depth: Depth) -> Result<Self, Evasion> {
        match bytes.first().ok_or(Evasion)? >> 4 {
            4 => Self::of_v4(bytes, depth),
            6 => Self::of_v6(bytes),
            _ => Err(Evasion),
        }
    }

    fn of_v4(bytes: &'p [u8], depth: Depth) -> Result<Self, Evasion> {
        let header_len = usize::from(bytes.first().ok_or(Evasion)? & 0x0f) * 4;
        if header_len < 20 {
            return Err(Evasion);
        }
        let options = bytes.get(20..header_len).ok_or(Evasion)?;
        if depth == Depth::Whole && has_source_route(options) {
            return Err(Evasion);
        }
        let payload = bytes.get(header_len..).ok_or(Evasion)?;
        let (id, place) = (word(bytes, 4)?, word(bytes, 6)?);
        let protocol = *bytes.get(9).ok_or(Evasion)?;
        let more = place & 0x2000 != 0;
        let offset = u32::from(place & 0x1fff) * 8;
        let fragment = fragment(u32::from(id), offset, more, payload, protocol, depth)?;
        Ok(Self { v6: false, protocol, payload, fragment })
    }

    fn of_v6(bytes: &'p [u8]) -> Result<Self, Evasion> {
        let mut next = *bytes.get(6).ok_or(Evasion)?;
        let mut rest = bytes.get(40..).ok_or(Evasion)?;
        let (mut found, mut seen) = (None, false);
        for position in 0..=MAX_HEADERS {
            let len = match next {
                // Only right behind the IPv6 header (RFC 8200 section 4.1).
                HOP_BY_HOP if position > 0 => return Err(Evasion),
                HOP_BY_HOP | DESTINATION_OPTIONS => options_len(rest)?,
                // With segments left the packet is not for the address in its header.
                ROUTING if *rest.get(3).ok_or(Evasion)? != 0 => return Err(Evasion),
                ROUTING => options_len(rest)?,
                // A packet is cut once.
                FRAGMENT if seen => return Err(Evasion),
                FRAGMENT => 8,
                protocol => {
                    return Ok(Self { v6: true, protocol, payload: rest, fragment: found });
                }
            };
            let (header, behind) = rest.split_at_checked(len).ok_or(Evasion)?;
            if next == FRAGMENT {
                seen = true;
                let place = word(header, 2)?;
                let id = u32::from(word(header, 4)?) << 16 | u32::from(word(header, 6)?);
                let (offset, more) = (u32::from(place & 0xfff8), place & 1 != 0);
                let first = *header.first().ok_or(Evasion)?;
                // One fragment that is everything stands for itself (RFC 6946).
                if more || offset > 0 {
                    found = fragment(id, offset, more, behind, first, Depth::Whole)?;
                }
                if offset > 0 {
                    return Ok(Self {
                        v6: true,
                        protocol: first,
                        payload: behind,
                        fragment: found,
                    });
                }
            }
            next = *header.first().ok_or(Evasion)?;
            rest = behind;
        }
        Err(Evasion)
    }
}

/// A fragment that fits into a packet and leaves no gap of less than eight bytes.
fn fragment(
    id: u32,
    offset: u32,
    more: bool,
    payload: &[u8],
    next: u8,
    depth: Depth,
) -> Result<Option<Fragment>, Evasion> {
    if !more && offset == 0 {
        return Ok(None);
    }
    let len = u32::try_from(payload.len()).map_err(|_| Evasion)?;
    let fits = len > 0 && offset + len <= MAX_PAYLOAD && (!more || len.is_multiple_of(8));
    if depth == Depth::Whole && !fits {
        return Err(Evasion);
    }
    Ok(Some(Fragment { id, offset, len, next }))
}

/// Loose or strict source route (RFC 791 section 3.1), or options that cannot be read.
fn has_source_route(mut options: &[u8]) -> bool {
    while let Some(kind) = options.first() {
        let len = match kind {
            0 => return false,
            1 => 1,
            131 | 137 => return true,
            _ => match options.get(1) {
                Some(len) if *len >= 2 => usize::from(*len),
                _ => return true,
            },
        };
        match options.get(len..) {
            Some(rest) => options = rest,
            None => return true,
        }
    }
    false
}

/// The length of an extension header that has one in its second byte.
fn options_len(rest: &[u8]) -> Result<usize, Evasion> {
    Ok(8 + usize::from(*rest.get(1).ok_or(Evasion)?) * 8)
}

fn word(bytes: &[u8], at: usize) -> Result<u16, Evasion> {
    let bytes: [u8; 2] =
        bytes.get(at..at + 2).and_then(|two| two.try_into().ok()).ok_or(Evasion)?;
    Ok(u16::from_be_bytes(bytes))
}

/// Reads the transport header, all of which must be there.
fn transport(body: &Body<'_>, view: &IpView, is_fragment: bool) -> Result<Transport, Evasion> {
    let payload = body.payload;
    match (body.protocol, body.v6) {
        (TCP, _) => {
            let header_len = usize::from(*payload.get(12).ok_or(Evasion)? >> 4) * 4;
            if header_len < 20 || payload.len() < header_len {
                return Err(Evasion);
            }
            let flags = *payload.get(13).ok_or(Evasion)?;
            Ok(Transport::Tcp { src: word(payload, 0)?, dst: word(payload, 2)?, flags })
        }
        (UDP, _) if payload.len() < 8 => Err(Evasion),
        (UDP, _) => Ok(Transport::Udp { src: word(payload, 0)?, dst: word(payload, 2)? }),
        (ICMP, false) | (ICMPV6, true) if payload.len() < 8 => Err(Evasion),
        (ICMP, false) | (ICMPV6, true) => icmp(body, view, is_fragment),
        _ => Ok(Transport::Other),
    }
}

fn icmp(body: &Body<'_>, view: &IpView, is_fragment: bool) -> Result<Transport, Evasion> {
    let (kind, id) = (*body.payload.first().ok_or(Evasion)?, word(body.payload, 4)?);
    Ok(match (body.v6, kind) {
        (false, 8) | (true, 128) => Transport::EchoRequest { id },
        (false, 0) | (true, 129) => Transport::EchoReply { id },
        // Unreachable, quench, redirect, time exceeded, parameter problem; ICMPv6 errors are all
        // below 128 (RFC 4443 section 2.1).
        (false, 3 | 4 | 5 | 11 | 12) | (true, 0..=127) => {
            let quote = body.payload.get(8..).filter(|_| !is_fragment);
            Transport::IcmpError { about: quote.and_then(|quote| quoted(quote, view)) }
        }
        _ => Transport::Icmp,
    })
}

/// What an ICMP error is about, if its receiver can have sent that to its sender.
fn quoted(quote: &[u8], outer: &IpView) -> Option<Quoted> {
    let addresses = match (quote.first()? >> 4, outer.dst, outer.src) {
        (4, IpAddr::V4(own), IpAddr::V4(peer)) => {
            quote.get(12..16)? == own.octets() && quote.get(16..20)? == peer.octets()
        }
        (6, IpAddr::V6(own), IpAddr::V6(peer)) => {
            quote.get(8..24)? == own.octets() && quote.get(24..40)? == peer.octets()
        }
        _ => false,
    };
    let body = Body::of(quote, Depth::Quote).ok()?;
    if !addresses || body.fragment.is_some_and(|fragment| fragment.offset > 0) {
        return None;
    }
    // An error quotes eight bytes of what it is about at least (RFC 792, RFC 4443).
    let quote = body.payload.get(..8)?;
    let (src, dst) = (word(quote, 0).ok()?, word(quote, 2).ok()?);
    match (body.protocol, body.v6) {
        (TCP, _) => Some(Quoted::Tcp(src, dst)),
        (UDP, _) => Some(Quoted::Udp(src, dst)),
        (ICMP, false) | (ICMPV6, true) => {
            let request = if body.v6 { 128 } else { 8 };
            let id = word(quote, 4).ok()?;
            (*quote.first()? == request).then_some(Quoted::EchoRequest(id))
        }
        _ => None,
    }
}
