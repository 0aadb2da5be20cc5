//! Which received packets may reach the kernel as one.
//!
//! A packet joins the open train of its flow only when cutting the train again gives back exactly
//! what came: contiguous sequence numbers, counting identifiers, equal headers otherwise, right
//! checksums. Packets of one flow keep their order; a packet that cannot join closes the train of
//! its flow and leaves those of other flows open.

use std::ops::Range;

use super::checksum;
use super::header::{FrameHeader, Segmentation, SegmentationKind};

/// Flows that are followed at once: more rarely come mixed in one receive call.
const FLOWS: usize = 8;
/// As many as Linux itself merges (`UDP_GRO_CNT_MAX`), and enough to pay for a write.
const MAX_SEGMENTS: usize = 64;
/// The longest packet that the length field of IPv4 can tell.
const MAX_PACKET: usize = 65_535;
const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;
const TCP_ECE: u8 = 0x40;

/// What the interface takes as trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MergeKinds {
    /// TCP segmentation offload.
    pub tcp: bool,
    /// UDP segmentation offload.
    pub udp: bool,
}

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// It starts something new.
    New,
    /// It joins the train that the given item has become or is.
    Join {
        /// Number of the item, as told by [`Merger::opened`].
        item: usize,
        /// Bytes of headers to leave out.
        headers_len: usize,
    },
}

/// The open trains.
#[derive(Debug, Default)]
pub(crate) struct Merger {
    flows: [Option<Flow>; FLOWS],
    /// Tried first: packets of one flow come in rows.
    latest: usize,
    replace_next: usize,
    kinds: MergeKinds,
    offered: Option<Shape>,
}

/// The last packet of an open train, and what is common to all of it.
#[derive(Debug, Clone)]
struct Flow {
    shape: Shape,
    first: Range<usize>,
    item: usize,
    segments: usize,
    len: usize,
    next_seq: u32,
    next_id: u16,
    verified: bool,
}

/// A packet that could be part of a train.
#[derive(Debug, Clone, Copy)]
struct Shape {
    kind: SegmentationKind,
    key: u64,
    transport: usize,
    headers_len: usize,
    payload_len: usize,
    seq: u32,
    id: u16,
    /// Nothing may follow it.
    ends: bool,
    /// Part of a flow, but not of its trains: it only closes them.
    alone: bool,
}

impl Merger {
    pub(crate) fn new(kinds: MergeKinds) -> Self {
        Self { kinds, ..Self::default() }
    }

    /// Closes all trains.
    pub(crate) fn clear(&mut self) {
        self.flows = Default::default();
    }

    /// Decides about the packet at `range` of `arena`. After [`Place::New`] the caller tells
    /// [`Self::opened`] which item it has become.
    pub(crate) fn offer(&mut self, arena: &[u8], range: Range<usize>) -> Place {
        self.offered = None;
        let packet = &arena[range];
        let Some(shape) = Shape::of(packet, self.kinds) else {
            self.clear();
            return Place::New;
        };
        let slot = self.slot_of(shape.key);
        if let Some(slot) = slot
            && let Some(flow) = &mut self.flows[slot]
        {
            self.latest = slot;
            if !shape.alone && flow.takes(arena, packet, &shape) {
                let place = Place::Join { item: flow.item, headers_len: shape.headers_len };
                flow.segments += 1;
                flow.len += shape.payload_len;
                flow.next_seq = flow.next_seq.wrapping_add(seq_len(&shape));
                flow.next_id = flow.next_id.wrapping_add(1);
                if shape.ends || shape.payload_len < flow.shape.payload_len {
                    self.flows[slot] = None;
                }
                return place;
            }
            self.flows[slot] = None;
        }
        if !shape.alone && !shape.ends {
            self.offered = Some(shape);
        }
        Place::New
    }

    /// The packet that was offered last, now at `range`, has become this item.
    pub(crate) fn opened(&mut self, range: Range<usize>, item: usize) {
        let Some(shape) = self.offered.take() else { return };
        let slot = self.flows.iter().position(Option::is_none).unwrap_or_else(|| {
            self.replace_next = (self.replace_next + 1) % FLOWS;
            self.replace_next
        });
        self.latest = slot;
        self.flows[slot] = Some(Flow {
            len: range.len(),
            first: range,
            item,
            segments: 1,
            next_seq: shape.seq.wrapping_add(seq_len(&shape)),
            next_id: shape.id.wrapping_add(1),
            verified: false,
            shape,
        });
    }

    fn slot_of(&self, key: u64) -> Option<usize> {
        let is_it = |flow: &Option<Flow>| flow.as_ref().is_some_and(|flow| flow.shape.key == key);
        if is_it(&self.flows[self.latest]) {
            return Some(self.latest);
        }
        self.flows.iter().position(is_it)
    }
}

impl Flow {
    /// Whether `packet` may follow. Verifies the first packet of the train too, once.
    fn takes(&mut self, arena: &[u8], packet: &[u8], shape: &Shape) -> bool {
        let first = &arena[self.first.clone()];
        let fits = shape.kind == self.shape.kind
            && shape.headers_len == self.shape.headers_len
            && shape.payload_len <= self.shape.payload_len
            && self.len + shape.payload_len <= MAX_PACKET
            && self.segments < MAX_SEGMENTS
            && (!shape.is_tcp() || shape.seq == self.next_seq)
            && (!is_v4(packet) || shape.id == self.next_id)
            && same_headers(first, packet, shape);
        if !fits || !is_right(packet, shape) {
            return false;
        }
        self.verified = self.verified || is_right(first, &self.shape);
        self.verified
    }
}

impl Shape {
    /// None for what belongs to no flow that can be told.
    fn of(packet: &[u8], kinds: MergeKinds) -> Option<Self> {
        let (transport, protocol, id) = match packet.first()? {
            0x45 => {
                let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff;
                if packet.len() < 28 || fragment != 0 {
                    return None;
                }
                (20, packet[9], u16::from_be_bytes([packet[4], packet[5]]))
            }
            first if first >> 4 == 6 && packet.len() >= 48 => (40, packet[6], 0),
            _ => return None,
        };
        let v4 = transport == 20;
        let addresses = if v4 { &packet[12..20] } else { &packet[8..40] };
        let ports = &packet[transport..transport + 4];
        // Two flows with one key only hold each other up: headers are compared in full as well.
        let key = addresses.as_chunks::<4>().0.iter().chain(ports.as_chunks::<4>().0).fold(
            u64::from(protocol),
            |key, word| {
                (key ^ u64::from(u32::from_ne_bytes(*word)))
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .rotate_left(29)
            },
        );
        let (kind, headers_len, seq, ends, alone) = match protocol {
            6 if kinds.tcp && packet.len() >= transport + 20 => {
                let tcp = &packet[transport..];
                let kind = if v4 { SegmentationKind::TcpV4 } else { SegmentationKind::TcpV6 };
                let headers_len = usize::from(tcp[12] >> 4) * 4;
                if headers_len < 20 || headers_len > tcp.len() {
                    return None;
                }
                let plain = tcp[13] & !(TCP_PSH | TCP_ECE) == TCP_ACK && tcp[12] & 0x0f == 0;
                let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
                let empty = headers_len == tcp.len();
                let ends = tcp[13] & TCP_PSH != 0;
                (kind, transport + headers_len, seq, ends, !plain || empty)
            }
            17 if kinds.udp => {
                let udp = &packet[transport..];
                let whole = usize::from(u16::from_be_bytes([udp[4], udp[5]])) == udp.len();
                let alone = !whole || udp.len() == 8 || udp[6..8] == [0, 0];
                (SegmentationKind::Udp, transport + 8, 0, false, alone)
            }
            _ => return None,
        };
        let payload_len = packet.len() - headers_len;
        Some(Self { kind, key, transport, headers_len, payload_len, seq, id, ends, alone })
    }

    fn is_tcp(&self) -> bool {
        self.kind != SegmentationKind::Udp
    }
}

fn is_v4(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first >> 4 == 4)
}

fn seq_len(shape: &Shape) -> u32 {
    u32::try_from(shape.payload_len).unwrap_or(0)
}

/// Whether all header fields that do not count up are equal. Both have these headers.
fn same_headers(a: &[u8], b: &[u8], shape: &Shape) -> bool {
    let same = |range: Range<usize>| a[range.clone()] == b[range];
    let ip = if is_v4(a) {
        same(0..2) && same(6..10) && same(12..20)
    } else {
        same(0..4) && same(6..40)
    };
    let at = shape.transport;
    ip && a[0] == b[0]
        && same(at..at + 4)
        && (!shape.is_tcp()
            || same(at + 8..at + 13)
                && (a[at + 13] ^ b[at + 13]) & !TCP_PSH == 0
                && same(at + 14..at + 16)
                && same(at + 18..shape.headers_len))
}

/// Whether the checksums of a packet are right: a train is trusted as a whole.
fn is_right(packet: &[u8], shape: &Shape) -> bool {
    let (ip, transport) = packet.split_at(shape.transport);
    let addresses = if is_v4(packet) {
        if checksum::finish(checksum::sum(ip, 0)) != 0 {
            return false;
        }
        &ip[12..20]
    } else {
        &ip[8..40]
    };
    let pseudo = pseudo_sum(addresses, shape.is_tcp(), transport.len());
    checksum::finish(checksum::sum(transport, pseudo)) == 0
}

fn pseudo_sum(addresses: &[u8], is_tcp: bool, transport_len: usize) -> u64 {
    let protocol = if is_tcp { 6 } else { 17 };
    let len = u16::try_from(transport_len).unwrap_or(u16::MAX);
    checksum::sum(addresses, checksum::word(protocol) + checksum::word(len))
}

/// Writes virtio header and packet headers of a train to the end of `heads`.
///
/// `first` and `last` are its first and last packet, `payload_len` the payload of all. They have
/// been merged, so they are whole.
pub(crate) fn train_head(first: &[u8], last: &[u8], payload_len: usize, heads: &mut Vec<u8>) {
    let Some(shape) = Shape::of(first, MergeKinds { tcp: true, udp: true }) else { return };
    let word = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
    let (field, is_tcp) = if shape.is_tcp() { (16, true) } else { (6, false) };
    let size = word(shape.payload_len);
    let header = FrameHeader {
        checksum: Some((word(shape.transport), field)),
        segmentation: Some(Segmentation { kind: shape.kind, size }),
        header_len: word(shape.headers_len),
    };
    heads.extend_from_slice(&header.encode());
    let start = heads.len();
    heads.extend_from_slice(&first[..shape.headers_len]);
    let (ip, transport) = heads[start..].split_at_mut(shape.transport);
    let len = shape.headers_len + payload_len;
    let addresses = if is_v4(ip) {
        ip[2..4].copy_from_slice(&word(len).to_be_bytes());
        ip[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(ip, 0));
        ip[10..12].copy_from_slice(&sum.to_ne_bytes());
        &ip[12..20]
    } else {
        ip[4..6].copy_from_slice(&word(len - 40).to_be_bytes());
        &ip[8..40]
    };
    let transport_len = len - shape.transport;
    if is_tcp {
        transport[13] |= last[shape.transport + 13] & TCP_PSH;
    } else {
        transport[4..6].copy_from_slice(&word(transport_len).to_be_bytes());
    }
    // Not complemented: the kernel adds the rest when it cuts the train, or never.
    let sum = checksum::fold(pseudo_sum(addresses, is_tcp, transport_len));
    let field = usize::from(field);
    transport[field..field + 2].copy_from_slice(&sum.to_ne_bytes());
}
