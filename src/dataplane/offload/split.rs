//! A packet from the TUN interface to the packets that go over the wire.
//!
//! Segments are made in place and one at a time: the headers of the next one are written over the
//! end of the one before, which must have been sealed by then. Nothing is copied but headers.

use super::checksum;
use super::header::{FrameHeader, Segmentation, SegmentationKind};
use crate::types::DropReason;

/// Bytes of the longest headers that are cut: IPv4 and TCP with all options, or IPv6 with a few extensions.
const MAX_HEADERS: usize = 192;
const TCP_FIN_PSH: u8 = 0x09;
const TCP_CWR: u8 = 0x80;

/// The packets of one frame. Take each with [`Self::next_segment`].
#[derive(Debug)]
pub struct Segments<'p> {
    packet: &'p mut [u8],
    cut: Option<Cut>,
    done: bool,
}

/// How to make the segments of a super-packet.
#[derive(Debug)]
struct Cut {
    /// As they were in the super-packet.
    headers: [u8; MAX_HEADERS],
    headers_len: usize,
    /// Where the TCP or UDP header starts.
    transport: usize,
    size: usize,
    is_tcp: bool,
    is_v4: bool,
    /// Sum of the addresses and the protocol, which are the same in all segments.
    pseudo: u64,
    index: usize,
}

impl<'p> Segments<'p> {
    /// Looks at `packet`, whose length is the one in its IP header, and at what the virtio header
    /// said. A checksum that the kernel left open is finished here.
    ///
    /// # Errors
    /// When the two do not fit together.
    pub fn new(header: &FrameHeader, packet: &'p mut [u8]) -> Result<Self, DropReason> {
        let cut = match (header.segmentation, header.checksum) {
            (Some(segmentation), Some((start, _))) => {
                Some(Cut::new(segmentation, usize::from(start), packet)?)
            }
            // The kernel never leaves the checksum of a super-packet alone.
            (Some(_), None) => return Err(DropReason::BadInnerPacket),
            (None, Some((start, offset))) => {
                finish_checksum(packet, usize::from(start), usize::from(offset))?;
                None
            }
            (None, None) => None,
        };
        Ok(Self { packet, cut, done: false })
    }

    /// The next packet, ready for the wire; the one before is overwritten.
    pub fn next_segment(&mut self) -> Option<&[u8]> {
        if self.done {
            return None;
        }
        let Some(cut) = &mut self.cut else {
            self.done = true;
            return Some(self.packet);
        };
        let start = cut.index * cut.size;
        let left = self.packet.len() - cut.headers_len - start;
        let payload_len = left.min(cut.size);
        self.done = left <= cut.size;
        let segment = &mut self.packet[start..start + cut.headers_len + payload_len];
        cut.stamp(segment, self.done);
        cut.index += 1;
        Some(segment)
    }
}

impl Cut {
    fn new(
        segmentation: Segmentation,
        transport: usize,
        packet: &[u8],
    ) -> Result<Self, DropReason> {
        let bad = DropReason::BadInnerPacket;
        let version = packet.first().ok_or(bad)? >> 4;
        let is_v4 = match (segmentation.kind, version) {
            (SegmentationKind::TcpV4 | SegmentationKind::Udp, 4) => true,
            (SegmentationKind::TcpV6 | SegmentationKind::Udp, 6) => false,
            _ => return Err(bad),
        };
        let is_tcp = segmentation.kind != SegmentationKind::Udp;
        if transport < if is_v4 { 20 } else { 40 } || (is_v4 && header_len_v4(packet) != transport)
        {
            return Err(bad);
        }
        let transport_len =
            if is_tcp { usize::from(packet.get(transport + 12).ok_or(bad)? >> 4) * 4 } else { 8 };
        let headers_len = transport + transport_len;
        let minimum = if is_tcp { 20 } else { 8 };
        if transport_len < minimum || headers_len > MAX_HEADERS || headers_len >= packet.len() {
            return Err(bad);
        }
        let mut headers = [0; MAX_HEADERS];
        headers[..headers_len].copy_from_slice(&packet[..headers_len]);
        let addresses = if is_v4 { &packet[12..20] } else { &packet[8..40] };
        let protocol = if is_tcp { 6 } else { 17 };
        let pseudo = checksum::sum(addresses, checksum::word(protocol));
        let size = usize::from(segmentation.size);
        Ok(Self { headers, headers_len, transport, size, is_tcp, is_v4, pseudo, index: 0 })
    }

    /// Writes the headers of segment `self.index` to its front.
    fn stamp(&self, segment: &mut [u8], last: bool) {
        let len = segment.len();
        segment[..self.headers_len].copy_from_slice(&self.headers[..self.headers_len]);
        let number = u32::try_from(self.index).unwrap_or(u32::MAX);
        let (ip, transport) = segment.split_at_mut(self.transport);
        if self.is_v4 {
            put(ip, 2, word_of(len));
            let id = u16::from_be_bytes([ip[4], ip[5]]);
            // Identifiers count up and wrap, as the kernel's own segmentation does it.
            put(ip, 4, id.wrapping_add(word_of(self.index)));
            put(ip, 10, 0);
            let sum = checksum::finish(checksum::sum(ip, 0));
            ip[10..12].copy_from_slice(&sum.to_ne_bytes());
        } else {
            put(ip, 4, word_of(len - 40));
        }
        // Only in UDP a sum of zero means that there is none (RFC 768).
        let finish = if self.is_tcp { checksum::finish } else { checksum::finish_transport };
        let field = if self.is_tcp {
            let step = number.wrapping_mul(u32::try_from(self.size).unwrap_or(0));
            let seq = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            transport[4..8].copy_from_slice(&seq.wrapping_add(step).to_be_bytes());
            if !last {
                transport[13] &= !TCP_FIN_PSH;
            }
            if self.index > 0 {
                transport[13] &= !TCP_CWR;
            }
            16
        } else {
            put(transport, 4, word_of(transport.len()));
            6
        };
        put(transport, field, 0);
        let sum = self.pseudo + checksum::word(word_of(transport.len()));
        let sum = finish(checksum::sum(transport, sum));
        transport[field..field + 2].copy_from_slice(&sum.to_ne_bytes());
    }
}

fn header_len_v4(packet: &[u8]) -> usize {
    packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4)
}

/// A length or count that the packet's own 16-bit length bounds.
fn word_of(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// The field holds the sum of the pseudo-header; the rest is added and the whole complemented.
fn finish_checksum(packet: &mut [u8], start: usize, offset: usize) -> Result<(), DropReason> {
    let summed = packet.get(start..).ok_or(DropReason::BadInnerPacket)?;
    let sum = checksum::finish_transport(checksum::sum(summed, 0));
    let field =
        packet.get_mut(start + offset..start + offset + 2).ok_or(DropReason::BadInnerPacket)?;
    field.copy_from_slice(&sum.to_ne_bytes());
    Ok(())
}
