//! Packets that a router or the lab makes itself: ICMP errors and echoes.

use std::net::Ipv4Addr;

use super::{
    ECHO_REPLY, ECHO_REQUEST, Extent, Header, ICMP, ICMP_HEADER, IPV4_HEADER, TIME_EXCEEDED,
    UNREACHABLE, internet_checksum, is_error, set16,
};

/// The ICMP error of router `from` about a packet whose TTL ran out.
///
/// Nothing for a packet that no error may be sent about (RFC 1122 section 3.2.2).
pub fn time_exceeded(packet: &[u8], from: Ipv4Addr) -> Option<Vec<u8>> {
    icmp_error(packet, from, TIME_EXCEEDED, 0)
}

/// The ICMP error of `from` about a packet that it cannot deliver; `code` as in RFC 792.
///
/// Nothing for a packet that no error may be sent about (RFC 1122 section 3.2.2).
pub fn destination_unreachable(packet: &[u8], from: Ipv4Addr, code: u8) -> Option<Vec<u8>> {
    icmp_error(packet, from, UNREACHABLE, code)
}

/// The answer to an ICMP echo request; nothing if the packet is none.
pub fn echo_reply(packet: &[u8]) -> Option<Vec<u8>> {
    let header = Header::read(packet, Extent::Whole).ok()?;
    if header.protocol != ICMP || header.byte(packet, 0).ok()? != ECHO_REQUEST {
        return None;
    }
    let mut message = packet.get(header.payload..header.end)?.to_vec();
    *message.first_mut()? = ECHO_REPLY;
    Some(datagram(header.dst, header.src, finish(message)?))
}

/// An ICMP echo request without IP header, as a raw socket wants it.
pub fn echo_request(id: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![ECHO_REQUEST, 0, 0, 0];
    message.extend_from_slice(&id.to_be_bytes());
    message.extend_from_slice(&seq.to_be_bytes());
    message.extend_from_slice(payload);
    let checksum = internet_checksum(&message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// What identifies the answer to an echo request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EchoReply {
    /// Who answers.
    pub from: Ipv4Addr,
    /// The identifier of the request.
    pub id: u16,
    /// The sequence number of the request.
    pub seq: u16,
}

/// Reads an ICMP echo reply with its IP header; nothing if the packet is none.
pub fn parse_echo_reply(packet: &[u8]) -> Option<EchoReply> {
    let header = Header::read(packet, Extent::Whole).ok()?;
    if header.protocol != ICMP || header.byte(packet, 0).ok()? != ECHO_REPLY {
        return None;
    }
    let id = header.word(packet, 4).ok()?;
    let seq = header.word(packet, 6).ok()?;
    Some(EchoReply { from: header.src, id, seq })
}

fn icmp_error(packet: &[u8], from: Ipv4Addr, icmp_type: u8, code: u8) -> Option<Vec<u8>> {
    let header = Header::read(packet, Extent::Whole).ok()?;
    let about_error = header.protocol == ICMP && header.byte(packet, 0).is_ok_and(is_error);
    if about_error || header.dst.is_multicast() || header.dst.is_broadcast() {
        return None;
    }
    let mut message = vec![icmp_type, code, 0, 0, 0, 0, 0, 0];
    let quoted = header.end.min(QUOTED - ICMP_HEADER - IPV4_HEADER);
    message.extend_from_slice(packet.get(..quoted)?);
    Some(datagram(from, header.src, finish(message)?))
}

fn finish(mut message: Vec<u8>) -> Option<Vec<u8>> {
    set16(&mut message, 2, 0).ok()?;
    let checksum = internet_checksum(&message);
    set16(&mut message, 2, checksum).ok()?;
    Some(message)
}

fn datagram(src: Ipv4Addr, dst: Ipv4Addr, payload: Vec<u8>) -> Vec<u8> {
    let total = u16::try_from(IPV4_HEADER + payload.len()).unwrap_or(u16::MAX);
    let mut packet = vec![0x45, 0xc0];
    packet.extend_from_slice(&total.to_be_bytes());
    packet.extend_from_slice(&[0, 0, 0, 0, INITIAL_TTL, ICMP, 0, 0]);
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&dst.octets());
    let checksum = internet_checksum(&packet);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(payload);
    packet
}

/// A router quotes as much as fits into 576 bytes (RFC 1812 section 4.3.2.3).
const QUOTED: usize = 576;

/// What Linux gives its own ICMP messages.
const INITIAL_TTL: u8 = 64;
