//! IPv4 packets as a router and a NAT see them: read the flow, change addresses and ports, answer
//! with an ICMP error.
//!
//! Changes are made in place and checksums follow the change (RFC 1624), so that a packet that was
//! broken before is still broken after. No input makes it panic. Fragments after the first carry
//! no ports and are refused, as on NATs that do not reassemble.

mod build;
mod checksum;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

pub use build::{EchoReply, parse_echo_reply};
pub use build::{destination_unreachable, echo_reply, echo_request, time_exceeded};
use checksum::{Change, internet_checksum};

use super::nat::{Flow, Protocol};

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A packet of a flow.
    Flow(Flow),
    /// An ICMP error about an earlier packet, whose flow it quotes.
    Error {
        /// The flow of the quoted packet.
        quoted: Flow,
    },
}

/// The facts of one IPv4 packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The sender in the outer header.
    pub src: Ipv4Addr,
    /// The receiver in the outer header.
    pub dst: Ipv4Addr,
    /// How many routers it may still pass.
    pub ttl: u8,
    /// What it is about.
    pub content: Content,
}

/// Why a packet cannot be handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum PacketError {
    /// Not IP version 4.
    #[error("not an IPv4 packet")]
    NotIpv4,
    /// Ends before its headers do, or its lengths contradict each other.
    #[error("truncated packet")]
    Truncated,
    /// A fragment without the ports.
    #[error("a fragment after the first")]
    Fragment,
    /// Neither UDP, TCP, ICMP echo nor an ICMP error about one of them.
    #[error("a protocol that NATs do not translate")]
    UnknownProtocol,
    /// The new addresses are not IPv4.
    #[error("the new address is not IPv4")]
    ForeignAddress,
}

/// Reads what a NAT has to know of a packet.
///
/// # Errors
/// When it is nothing that a NAT translates.
pub fn summarize(packet: &[u8]) -> Result<Summary, PacketError> {
    let header = Header::read(packet, Extent::Whole)?;
    let content = match header.protocol {
        ICMP if is_error(header.byte(packet, 0)?) => {
            let quote = header.payload + ICMP_HEADER;
            let inner = packet.get(quote..header.end).ok_or(PacketError::Truncated)?;
            let inner_header = Header::read(inner, Extent::Quote)?;
            Content::Error { quoted: inner_header.flow(inner)? }
        }
        _ => Content::Flow(header.flow(packet)?),
    };
    Ok(Summary { src: header.src, dst: header.dst, ttl: header.ttl, content })
}

/// Gives a packet of a flow new addresses and ports.
///
/// # Errors
/// When the packet is of no flow; it may then be changed in part and must be dropped.
pub fn rewrite(packet: &mut [u8], flow: Flow) -> Result<(), PacketError> {
    let header = Header::read(packet, Extent::Whole)?;
    header.rewrite(packet, flow)
}

/// Gives an ICMP error new outer addresses, and the packet that it quotes a new flow.
///
/// # Errors
/// When the packet is no ICMP error; it may then be changed in part and must be dropped.
pub fn rewrite_error(
    packet: &mut [u8],
    src: Ipv4Addr,
    dst: Ipv4Addr,
    quoted: Flow,
) -> Result<(), PacketError> {
    let header = Header::read(packet, Extent::Whole)?;
    if header.protocol != ICMP || !is_error(header.byte(packet, 0)?) {
        return Err(PacketError::UnknownProtocol);
    }
    header.rewrite_addresses(packet, src, dst)?;
    let quote = header.payload + ICMP_HEADER;
    let inner = packet.get_mut(quote..header.end).ok_or(PacketError::Truncated)?;
    Header::read(inner, Extent::Quote)?.rewrite(inner, quoted)?;
    // The quote is a part of what the ICMP checksum covers.
    let message = packet.get_mut(header.payload..header.end).ok_or(PacketError::Truncated)?;
    set16(message, 2, 0)?;
    let checksum = internet_checksum(message);
    set16(message, 2, checksum)
}

/// What is left of a packet's life after one router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// It may go on.
    Alive,
    /// It dies here.
    Expired,
}

/// Counts one router: takes 1 from the TTL.
///
/// # Errors
/// When it is no IPv4 packet.
pub fn decrement_ttl(packet: &mut [u8]) -> Result<Ttl, PacketError> {
    let header = Header::read(packet, Extent::Whole)?;
    if header.ttl <= 1 {
        return Ok(Ttl::Expired);
    }
    let before = get16(packet, 8)?;
    let after = before - 0x0100;
    set16(packet, 8, after)?;
    let mut change = Change::default();
    change.word(before, after);
    let checksum = change.apply(get16(packet, 10)?);
    set16(packet, 10, checksum)?;
    Ok(Ttl::Alive)
}

/// The addresses of any IPv4 packet, also of one that [`summarize`] refuses.
///
/// # Errors
/// When it is no IPv4 packet.
pub fn addresses(packet: &[u8]) -> Result<(Ipv4Addr, Ipv4Addr), PacketError> {
    let header = Header::read_any(packet, Extent::Whole)?;
    Ok((header.src, header.dst))
}

/// How much of a packet has to be there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    Whole,
    /// An ICMP error quotes the header and 8 bytes at least (RFC 792).
    Quote,
}

#[derive(Clone, Copy)]
struct Header {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    ttl: u8,
    protocol: u8,
    payload: usize,
    end: usize,
}

impl Header {
    fn read(packet: &[u8], extent: Extent) -> Result<Self, PacketError> {
        let header = Self::read_any(packet, extent)?;
        if get16(packet, 6)? & FRAGMENT_OFFSET != 0 {
            return Err(PacketError::Fragment);
        }
        Ok(header)
    }

    fn read_any(packet: &[u8], extent: Extent) -> Result<Self, PacketError> {
        let first = *packet.first().ok_or(PacketError::Truncated)?;
        if first >> 4 != 4 {
            return Err(PacketError::NotIpv4);
        }
        let payload = usize::from(first & 0x0f) * 4;
        let total = usize::from(get16(packet, 2)?);
        let end = match extent {
            Extent::Whole => total,
            Extent::Quote => total.min(packet.len()),
        };
        if payload < IPV4_HEADER || payload > end || end > packet.len() {
            return Err(PacketError::Truncated);
        }
        Ok(Self {
            src: address(packet, 12)?,
            dst: address(packet, 16)?,
            ttl: *packet.get(8).ok_or(PacketError::Truncated)?,
            protocol: *packet.get(9).ok_or(PacketError::Truncated)?,
            payload,
            end,
        })
    }

    fn byte(&self, packet: &[u8], offset: usize) -> Result<u8, PacketError> {
        let at = self.payload + offset;
        if at >= self.end {
            return Err(PacketError::Truncated);
        }
        packet.get(at).copied().ok_or(PacketError::Truncated)
    }

    /// A 16-bit word of the payload, by its place there.
    fn word(&self, packet: &[u8], offset: usize) -> Result<u16, PacketError> {
        let at = self.payload + offset;
        if at + 2 > self.end {
            return Err(PacketError::Truncated);
        }
        get16(packet, at)
    }

    fn flow(&self, packet: &[u8]) -> Result<Flow, PacketError> {
        let (protocol, src, dst) = match self.protocol {
            UDP => (Protocol::Udp, self.word(packet, 0)?, self.word(packet, 2)?),
            TCP => (Protocol::Tcp, self.word(packet, 0)?, self.word(packet, 2)?),
            ICMP => match self.byte(packet, 0)? {
                ECHO_REQUEST => (Protocol::IcmpEcho, self.word(packet, 4)?, 0),
                ECHO_REPLY => (Protocol::IcmpEcho, 0, self.word(packet, 4)?),
                _ => return Err(PacketError::UnknownProtocol),
            },
            _ => return Err(PacketError::UnknownProtocol),
        };
        let endpoint = |address: Ipv4Addr, port| SocketAddr::new(address.into(), port);
        Ok(Flow { protocol, src: endpoint(self.src, src), dst: endpoint(self.dst, dst) })
    }

    fn rewrite(&self, packet: &mut [u8], flow: Flow) -> Result<(), PacketError> {
        let (IpAddr::V4(src), IpAddr::V4(dst)) = (flow.src.ip(), flow.dst.ip()) else {
            return Err(PacketError::ForeignAddress);
        };
        let mut change = self.rewrite_addresses(packet, src, dst)?;
        match self.protocol {
            UDP | TCP => {
                self.rewrite_word(packet, 0, flow.src.port(), &mut change)?;
                self.rewrite_word(packet, 2, flow.dst.port(), &mut change)?;
            }
            _ => {
                // No address is in the sum of an ICMP message.
                change = Change::default();
                let id = match self.byte(packet, 0)? {
                    ECHO_REQUEST => flow.src.port(),
                    _ => flow.dst.port(),
                };
                self.rewrite_word(packet, 4, id, &mut change)?;
            }
        }
        self.rewrite_payload_checksum(packet, change)
    }

    /// Returns the change, which is also a change of the pseudo header.
    fn rewrite_addresses(
        &self,
        packet: &mut [u8],
        src: Ipv4Addr,
        dst: Ipv4Addr,
    ) -> Result<Change, PacketError> {
        let mut change = Change::default();
        for (offset, before, after) in [(12, self.src, src), (16, self.dst, dst)] {
            change.address(before, after);
            let place = packet.get_mut(offset..offset + 4).ok_or(PacketError::Truncated)?;
            place.copy_from_slice(&after.octets());
        }
        let checksum = change.apply(get16(packet, 10)?);
        set16(packet, 10, checksum)?;
        Ok(change)
    }

    fn rewrite_word(
        &self,
        packet: &mut [u8],
        offset: usize,
        after: u16,
        change: &mut Change,
    ) -> Result<(), PacketError> {
        change.word(self.word(packet, offset)?, after);
        set16(packet, self.payload + offset, after)
    }

    fn rewrite_payload_checksum(
        &self,
        packet: &mut [u8],
        change: Change,
    ) -> Result<(), PacketError> {
        let offset = match self.protocol {
            UDP => 6,
            TCP => 16,
            _ => 2,
        };
        // A quoted TCP header may end before its checksum.
        let Ok(before) = self.word(packet, offset) else {
            return Ok(());
        };
        let after = match self.protocol {
            // Zero says that the sender made no checksum (RFC 768).
            UDP if before == 0 => return Ok(()),
            UDP => match change.apply(before) {
                0 => 0xffff,
                sum => sum,
            },
            _ => change.apply(before),
        };
        set16(packet, self.payload + offset, after)
    }
}

fn is_error(icmp_type: u8) -> bool {
    matches!(icmp_type, UNREACHABLE | SOURCE_QUENCH | TIME_EXCEEDED | PARAMETER_PROBLEM)
}

fn get16(bytes: &[u8], offset: usize) -> Result<u16, PacketError> {
    let word = bytes.get(offset..).and_then(|rest| rest.first_chunk::<2>());
    word.map(|word| u16::from_be_bytes(*word)).ok_or(PacketError::Truncated)
}

fn set16(bytes: &mut [u8], offset: usize, value: u16) -> Result<(), PacketError> {
    let place = bytes.get_mut(offset..offset + 2).ok_or(PacketError::Truncated)?;
    place.copy_from_slice(&value.to_be_bytes());
    Ok(())
}

fn address(bytes: &[u8], offset: usize) -> Result<Ipv4Addr, PacketError> {
    let octets = bytes.get(offset..).and_then(|rest| rest.first_chunk::<4>());
    octets.map(|octets| Ipv4Addr::from(*octets)).ok_or(PacketError::Truncated)
}

const IPV4_HEADER: usize = 20;
const ICMP_HEADER: usize = 8;
const FRAGMENT_OFFSET: u16 = 0x1fff;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const SOURCE_QUENCH: u8 = 4;
const ECHO_REQUEST: u8 = 8;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;

#[cfg(test)]
mod tests;
