//! IP packets: of programs on this machine, of peers, and of the kernel with what it says of them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::time::Duration;

use overlay::dataplane::icmp::{self, Trouble};
use overlay::dataplane::offload::{FrameHeader, MergeKinds, Segments};
use overlay::dataplane::{Frame, TunBatch};
use overlay::io::os;
use overlay::lab::nat::Protocol;
use overlay::lab::packet::{self, Content, decrement_ttl, summarize};
use overlay::policy::{Filter, Flows, Packet, Verdict};
use overlay::types::NodeId;
use overlay::wire::filter::{KIND_ICMP, KIND_TCP, KIND_UDP, WireFilter, WireRule};
use overlay::wire::ip::IpView;

use super::{Feed, epoch};

/// Headers of inner packets.
pub(crate) fn ip(bytes: &[u8]) {
    if let Ok(view) = IpView::parse(bytes) {
        assert!(view.len <= bytes.len(), "never more than there is");
        assert_eq!(IpView::parse(&bytes[..view.len]), Ok(view), "what is behind does not count");
    }
}

/// What the TUN interface hands over: a header and a packet or a super-packet.
pub(crate) fn tun(bytes: &[u8]) {
    let mut frame = bytes.to_vec();
    let Ok((header, packet)) = FrameHeader::parse(&mut frame) else { return };
    assert_eq!(FrameHeader::decode(&header.encode()), Ok(header), "a header survives");
    let Ok(IpView { len, .. }) = IpView::parse(packet) else { return };
    let Ok(mut segments) = Segments::new(&header, &mut packet[..len]) else { return };
    let mut count = 0;
    while let Some(segment) = segments.next_segment() {
        assert!(!segment.is_empty() && segment.len() <= len, "a part of the packet");
        count += 1;
        assert!(count <= len, "there is an end");
    }
    assert!(count > 0, "something comes out");
}

/// Packets of peers on their way to the TUN interface: trains are made of them, and cutting a train
/// gives back what came. Two bytes make a packet, of few flows, so that many of them fit together.
pub(crate) fn merge(bytes: &[u8]) {
    let mut feed = Feed::new(bytes);
    let mut places = [(u32::MAX - 3_000, u16::MAX - 20); 4];
    let mut packets = Vec::new();
    while let (Some(shape), Some(event), true) = (feed.byte(), feed.byte(), packets.len() < 200) {
        packets.push(Spec::new(shape, event, &mut places).build(event));
    }
    let kinds = MergeKinds { tcp: true, udp: true };
    let mut batch = TunBatch::default();
    batch.clear(kinds);
    for packet in &packets {
        let pushed = batch.push(packet.len(), |room| {
            room.copy_from_slice(packet);
            Ok::<_, Infallible>(packet.len())
        });
        pushed.expect("nothing here can fail");
    }
    batch.finish();
    let mut out: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for frame in batch.frames() {
        let cut = cut(frame);
        assert!(cut.iter().eq(frame.packets()), "cutting undoes merging");
        for packet in cut {
            out.entry(flow_of(&packet)).or_default().push(packet);
        }
    }
    let mut wanted: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for packet in packets {
        wanted.entry(flow_of(&packet)).or_default().push(packet);
    }
    assert!(out == wanted, "every flow has its packets, in their order");
}

fn cut(frame: Frame<'_>) -> Vec<Vec<u8>> {
    let mut bytes = frame.head().to_vec();
    frame.pieces().for_each(|piece| bytes.extend_from_slice(piece));
    let (header, packet) = FrameHeader::parse(&mut bytes).expect("a header of ours is read");
    let mut segments = Segments::new(&header, packet).expect("a train of ours is cut");
    let mut cut = Vec::new();
    while let Some(segment) = segments.next_segment() {
        cut.push(segment.to_vec());
    }
    cut
}

fn flow_of(packet: &[u8]) -> Vec<u8> {
    let ends = if packet[0] >> 4 == 4 { 9..24 } else { 6..44 };
    packet
        .get(ends)
        .unwrap_or_default()
        .iter()
        .enumerate()
        .map(|(at, byte)| {
            // Neither the time to live nor the sum of an IPv4 header say what flow it is.
            if packet[0] >> 4 == 4 && (1..3).contains(&at) { 0 } else { *byte }
        })
        .collect()
}

/// What a packet is made of.
struct Spec {
    v6: bool,
    tcp: bool,
    seq: u32,
    id: u16,
    flags: u8,
    tos: u8,
    payload: usize,
}

impl Spec {
    fn new(shape: u8, event: u8, places: &mut [(u32, u16); 4]) -> Self {
        let (v6, tcp) = (shape & 1 != 0, shape & 2 != 0);
        let place = &mut places[usize::from(shape & 3)];
        let payload = [100, 100, 100, 99, 101, 1, 0, 1400][usize::from(shape >> 2 & 7)];
        let flags = [0x10, 0x18, 0x11, 0x90, 0x50, 0x10, 0x10, 0x04][usize::from(shape >> 5)];
        place.0 = place.0.wrapping_add(u32::from(event == 1));
        let (seq, id) = *place;
        place.0 = seq.wrapping_add(u32::try_from(payload).unwrap_or_default());
        place.1 = id.wrapping_add(u16::from(event != 2));
        Self { v6, tcp, seq, id, flags, tos: if event == 3 { 3 } else { 0 }, payload }
    }

    fn build(&self, event: u8) -> Vec<u8> {
        let mut transport = vec![0, 7, 1, 187];
        if self.tcp {
            transport.extend_from_slice(&self.seq.to_be_bytes());
            transport.extend_from_slice(&[0, 0, 0, 77, 0x80, self.flags, 1, 2, 0, 0, 0, 0]);
            transport.extend_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, u8::from(event == 4)]);
        } else {
            transport.extend_from_slice(&be16(8 + self.payload));
            transport.extend_from_slice(&[0, 0]);
        }
        transport.resize(transport.len() + self.payload, event);
        let protocol = if self.tcp { 6 } else { 17 };
        let mut packet;
        let pseudo: Vec<u8>;
        if self.v6 {
            packet = vec![0x60 | self.tos >> 4, self.tos << 4, 1, 2];
            packet.extend_from_slice(&be16(transport.len()));
            packet.extend_from_slice(&[protocol, 64]);
            packet.extend_from_slice(&[0xfd; 32]);
            pseudo =
                [&packet[8..40], &[0, 0], &be16(transport.len()), &[0, 0, 0, protocol]].concat();
        } else {
            packet = vec![0x45, self.tos];
            packet.extend_from_slice(&be16(20 + transport.len()));
            packet.extend_from_slice(&self.id.to_be_bytes());
            packet.extend_from_slice(&[0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            pseudo = [&packet[12..20], &[0, protocol], &be16(transport.len())].concat();
        }
        let head = transport.len() - self.payload;
        let filled = u16::from_be_bytes([event; 2]);
        let odd = [event].repeat(self.payload % 2);
        let sum = checksum_of([&pseudo[..], &transport[..head], &odd], filled, self.payload / 2);
        let at = if self.tcp { 16 } else { 6 };
        // A datagram never says that it has no sum (RFC 768).
        let sum = if sum == 0 && !self.tcp { u16::MAX } else { sum };
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(&transport);
        // Something is wrong with it.
        if let Some(at) = event.checked_sub(200) {
            let at = usize::from(at) % packet.len();
            // Not its version and length: the caller has read those.
            if !(0..8).contains(&at) {
                packet[at] ^= 0x40;
            }
        }
        packet
    }
}

fn be16(value: usize) -> [u8; 2] {
    u16::try_from(value).unwrap_or_default().to_be_bytes()
}

/// RFC 1071, the slow way.
fn checksum(bytes: &[u8]) -> u16 {
    checksum_of([bytes, &[], &[]], 0, 0)
}

/// The same of parts, of which only the last may be odd, with this word so many times before it.
fn checksum_of(parts: [&[u8]; 3], word: u16, times: usize) -> u16 {
    let mut sum = u32::from(word) * u32::try_from(times).unwrap_or_default();
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

/// Packets of a peer at the access rules, between packets of our own: headers, extension headers,
/// fragments and quoted packets.
pub(crate) fn filter(bytes: &[u8]) {
    let mut feed = Feed::new(bytes);
    let rule = |kind, ports| WireRule { kind, sources: Some(vec![(2, 2)]), ports };
    let rules = match feed.byte().unwrap_or_default() % 4 {
        0 => vec![rule(KIND_TCP, Some(vec![(80, 80), (443, 500)]))],
        1 => vec![rule(KIND_UDP, Some(vec![(53, 53)])), rule(KIND_ICMP, None)],
        2 => vec![rule(KIND_TCP, None)],
        _ => Vec::new(),
    };
    let filter = Filter::new(&WireFilter { rules: Some(rules) }).expect("there are rules");
    let (mut flows, mut now) = (Flows::default(), epoch());
    let peer = NodeId::new(2).expect("a number");
    while let Some(how) = feed.byte() {
        let packet = feed.part();
        now += Duration::from_millis(u64::from(how >> 1) * 20);
        let read = Packet::parse(packet);
        if how & 1 == 0 {
            let verdict = filter.inbound(peer, packet, &mut flows, now);
            if read.is_err() {
                assert_eq!(verdict, Verdict::Drop, "what can be read in two ways is not let in");
            }
        } else {
            filter.outbound(peer, packet, &mut flows, now);
        }
    }
}

/// Packets that cannot go on, and the answers to them.
pub(crate) fn icmp(bytes: &[u8]) {
    let Some((choice, packet)) = bytes.split_first() else { return };
    let trouble = match choice % 3 {
        0 => Trouble::TooBig { mtu: 1280 },
        1 => Trouble::HostUnreachable,
        _ => Trouble::Prohibited,
    };
    let v4 = packet.first().is_some_and(|byte| byte >> 4 == 4);
    let from: IpAddr = if v4 { [10, 0, 0, 1].into() } else { [0xfd; 16].into() };
    let Some(answer) = icmp::answer(packet, from, trouble) else { return };
    let (asked, told) = (IpView::parse(packet), IpView::parse(&answer));
    let (asked, told) = (asked.expect("it was read"), told.expect("an answer is a packet"));
    assert_eq!((told.src, told.dst, told.len), (from, asked.src, answer.len()));
    assert!(answer.len() <= if v4 { 576 } else { 1280 }, "it fits everywhere");
    assert_eq!(icmp::answer(&answer, from, Trouble::Prohibited), None, "no answer to an answer");
}

/// What the kernel says of interfaces, addresses and routes.
pub(crate) fn netlink(bytes: &[u8]) {
    let _ = os::read_message(bytes);
}

/// Packets at the NATs and routers of the lab.
pub(crate) fn lab(bytes: &[u8]) {
    let _ = packet::parse_echo_reply(bytes);
    let _ = packet::addresses(bytes);
    let from = [192, 0, 2, 1].into();
    for answer in [
        packet::time_exceeded(bytes, from),
        packet::destination_unreachable(bytes, from, 1),
        packet::echo_reply(bytes),
    ] {
        assert!(answer.is_none_or(|it| packet::addresses(&it).is_ok()), "an answer is a packet");
    }
    let mut packet = bytes.to_vec();
    let _ = decrement_ttl(&mut packet);
    match summarize(&packet).map(|summary| (summary.src, summary.dst, summary.content)) {
        Ok((.., Content::Flow(flow))) => {
            let back = flow.reversed();
            // An echo request stays one, whoever it is from then on.
            let echo = flow.protocol == Protocol::IcmpEcho;
            if packet::rewrite(&mut packet, back).is_ok() && !echo {
                let content = summarize(&packet).map(|summary| summary.content);
                assert_eq!(content, Ok(Content::Flow(back)), "a NAT reads what a NAT wrote");
            }
        }
        Ok((src, dst, Content::Error { quoted })) => {
            let _ = packet::rewrite_error(&mut packet, dst, src, quoted.reversed());
        }
        Err(_) => {}
    }
}
