//! The header in front of every packet of a TUN device with offloads: 10 bytes in the machine's
//! byte order, the legacy form of the virtio network header (virtio 1.2 section 5.1.6).

/// Bytes of the header.
pub const VIRTIO_HEADER_LEN: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const NONE: u8 = 0;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;
const UDP: u8 = 5;
/// Beside a TCP type: the flow uses ECN, and the first segment alone carries CWR.
const ECN: u8 = 0x80;

/// Bytes that are no header of a kind that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a virtio network header of a kind that is understood")]
pub struct UnknownHeader;

/// What is cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentationKind {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over either: each segment is a datagram.
    Udp,
}

/// How a super-packet is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segmentation {
    /// What it is.
    pub kind: SegmentationKind,
    /// Payload bytes of each segment but the last; never zero.
    pub size: u16,
}

impl Segmentation {
    /// An upper bound of the length of a segment of the super-packet `packet`, by its headers; the
    /// whole length where they make no sense.
    #[must_use]
    pub fn longest(&self, packet: &[u8]) -> usize {
        let ip = match self.kind {
            _ if packet.first().is_some_and(|first| first >> 4 == 6) => 40,
            _ => packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4),
        };
        let transport = match self.kind {
            SegmentationKind::Udp => Some(8),
            SegmentationKind::TcpV4 | SegmentationKind::TcpV6 => {
                packet.get(ip + 12).map(|offset| usize::from(offset >> 4) * 4)
            }
        };
        transport.map_or(packet.len(), |transport| ip + transport + usize::from(self.size))
    }
}

/// What the header says of the packet behind it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FrameHeader {
    /// Where the sum for an unfinished checksum starts, and how far behind that the field is.
    pub checksum: Option<(u16, u16)>,
    /// Set for a super-packet.
    pub segmentation: Option<Segmentation>,
    /// Length of all headers; a hint only, kernels write wrong ones on forwarded packets.
    pub header_len: u16,
}

impl FrameHeader {
    /// Reads the header at the start of `frame`, and gives the packet behind it.
    ///
    /// # Errors
    /// When it is cut short, or of a kind that was never asked for.
    pub fn parse(frame: &mut [u8]) -> Result<(Self, &mut [u8]), UnknownHeader> {
        let (header, packet) =
            frame.split_first_chunk_mut::<VIRTIO_HEADER_LEN>().ok_or(UnknownHeader)?;
        Ok((Self::decode(header)?, packet))
    }

    /// Reads a header that stands alone.
    ///
    /// # Errors
    /// When it is of a kind that was never asked for.
    pub fn decode(header: &[u8; VIRTIO_HEADER_LEN]) -> Result<Self, UnknownHeader> {
        let [flags, kind, l0, l1, s0, s1, c0, c1, o0, o1] = *header;
        let size = u16::from_ne_bytes([s0, s1]);
        let kind = match kind & !ECN {
            NONE => None,
            TCP_V4 => Some(SegmentationKind::TcpV4),
            TCP_V6 => Some(SegmentationKind::TcpV6),
            UDP => Some(SegmentationKind::Udp),
            _ => return Err(UnknownHeader),
        };
        if kind.is_some() && size == 0 {
            return Err(UnknownHeader);
        }
        let checksum = (u16::from_ne_bytes([c0, c1]), u16::from_ne_bytes([o0, o1]));
        Ok(Self {
            checksum: (flags & NEEDS_CHECKSUM != 0).then_some(checksum),
            segmentation: kind.map(|kind| Segmentation { kind, size }),
            header_len: u16::from_ne_bytes([l0, l1]),
        })
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; VIRTIO_HEADER_LEN] {
        let kind = match self.segmentation.map(|segmentation| segmentation.kind) {
            None => NONE,
            Some(SegmentationKind::TcpV4) => TCP_V4,
            Some(SegmentationKind::TcpV6) => TCP_V6,
            Some(SegmentationKind::Udp) => UDP,
        };
        let flags = if self.checksum.is_some() { NEEDS_CHECKSUM } else { 0 };
        let (start, offset) = self.checksum.unwrap_or_default();
        let size = self.segmentation.map_or(0, |segmentation| segmentation.size);
        let [l, s, c, o] = [self.header_len, size, start, offset].map(u16::to_ne_bytes);
        [flags, kind, l[0], l[1], s[0], s[1], c[0], c[1], o[0], o[1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_and_zeros_are_a_plain_packet() {
        for segmentation in [
            None,
            Some(Segmentation { kind: SegmentationKind::TcpV4, size: 1 }),
            Some(Segmentation { kind: SegmentationKind::TcpV6, size: 1400 }),
            Some(Segmentation { kind: SegmentationKind::Udp, size: 65_535 }),
        ] {
            let header = FrameHeader { checksum: Some((20, 16)), segmentation, header_len: 40 };
            let mut frame = header.encode().to_vec();
            frame.extend_from_slice(b"packet");
            let (parsed, packet) = FrameHeader::parse(&mut frame).unwrap();
            assert_eq!((parsed, &*packet), (header, b"packet".as_slice()));
        }
        assert_eq!(FrameHeader::default().encode(), [0; VIRTIO_HEADER_LEN]);
    }

    #[test]
    fn what_was_never_asked_for_is_refused() {
        let mut header = [0; VIRTIO_HEADER_LEN];
        assert!(FrameHeader::parse(&mut header[..9]).is_err(), "cut short");
        header[1] = TCP_V4;
        assert!(FrameHeader::parse(&mut header).is_err(), "segments of no size");
        header[4] = 1;
        assert!(FrameHeader::parse(&mut header).is_ok());
        header[1] = TCP_V4 | ECN;
        assert!(FrameHeader::parse(&mut header).is_ok());
        header[1] = 3;
        assert!(FrameHeader::parse(&mut header).is_err(), "fragmentation offload");
    }
}
