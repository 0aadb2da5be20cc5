//! Split and merge against each other and against slow, obvious code.

use std::collections::BTreeMap;
use std::convert::Infallible;

use proptest::prelude::*;

use super::{FrameHeader, MergeKinds, Segmentation, SegmentationKind, Segments, VIRTIO_HEADER_LEN};
use crate::dataplane::TunBatch;

const BOTH: MergeKinds = MergeKinds { tcp: true, udp: true };
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;
const ECE: u8 = 0x40;

/// What a packet is made of.
#[derive(Debug, Clone)]
struct Spec {
    v6: bool,
    tcp: bool,
    port: u16,
    seq: u32,
    id: u16,
    flags: u8,
    tos: u8,
    options: Vec<u8>,
    payload: Vec<u8>,
}

impl Spec {
    fn tcp(payload: &[u8]) -> Self {
        Self {
            v6: false,
            tcp: true,
            port: 1,
            seq: 1_000,
            id: 7,
            flags: ACK,
            tos: 0,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            payload: payload.to_vec(),
        }
    }

    fn udp(payload: &[u8]) -> Self {
        Self { tcp: false, options: Vec::new(), ..Self::tcp(payload) }
    }

    fn build(&self) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend_from_slice(&self.port.to_be_bytes());
        transport.extend_from_slice(&443u16.to_be_bytes());
        if self.tcp {
            transport.extend_from_slice(&self.seq.to_be_bytes());
            transport.extend_from_slice(&77u32.to_be_bytes());
            let words = u8::try_from(5 + self.options.len() / 4).unwrap();
            transport.extend_from_slice(&[words << 4, self.flags, 1, 2, 0, 0, 0, 0]);
            transport.extend_from_slice(&self.options);
        } else {
            let len = u16::try_from(8 + self.payload.len()).unwrap();
            transport.extend_from_slice(&len.to_be_bytes());
            transport.extend_from_slice(&[0, 0]);
        }
        transport.extend_from_slice(&self.payload);
        let protocol = if self.tcp { 6 } else { 17 };
        let mut ip = Vec::new();
        if self.v6 {
            ip.extend_from_slice(&[0x60 | (self.tos >> 4), self.tos << 4, 1, 2]);
            ip.extend_from_slice(&u16::try_from(transport.len()).unwrap().to_be_bytes());
            ip.extend_from_slice(&[protocol, 64]);
            ip.extend_from_slice(&[0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            ip.extend_from_slice(&[0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        } else {
            ip.extend_from_slice(&[0x45, self.tos]);
            ip.extend_from_slice(&u16::try_from(20 + transport.len()).unwrap().to_be_bytes());
            ip.extend_from_slice(&self.id.to_be_bytes());
            ip.extend_from_slice(&[0x40, 0, 64, protocol, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2]);
            let sum = slow_checksum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let sum = slow_transport_checksum(&ip, &transport, protocol);
        let at = if self.tcp { 16 } else { 6 };
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        ip.extend_from_slice(&transport);
        ip
    }
}

fn slow_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn slow_transport_checksum(ip: &[u8], transport: &[u8], protocol: u8) -> u16 {
    let addresses = if ip[0] >> 4 == 4 { &ip[12..20] } else { &ip[8..40] };
    let mut whole = addresses.to_vec();
    whole.extend_from_slice(&[0, protocol]);
    whole.extend_from_slice(&u16::try_from(transport.len()).unwrap().to_be_bytes());
    whole.extend_from_slice(transport);
    match slow_checksum(&whole) {
        // None at all is what it would mean in a UDP header; RFC 768. TCP has no such rule.
        0 if protocol == 17 => u16::MAX,
        sum => sum,
    }
}

fn segments(frame: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut frame = frame.to_vec();
    let (header, packet) = FrameHeader::parse(&mut frame).ok()?;
    let mut segments = Segments::new(&header, packet).ok()?;
    let mut all = Vec::new();
    while let Some(segment) = segments.next_segment() {
        all.push(segment.to_vec());
        assert!(all.len() <= 65_536, "it ends");
    }
    Some(all)
}

fn batch_of(packets: &[Vec<u8>], kinds: MergeKinds) -> TunBatch {
    let mut batch = TunBatch::default();
    batch.clear(kinds);
    for packet in packets {
        let pushed: Result<(), Infallible> = batch.push(packet.len() + 16, |room| {
            room[..packet.len()].copy_from_slice(packet);
            Ok(packet.len())
        });
        pushed.unwrap();
    }
    batch.finish();
    batch
}

/// The frames as the kernel would get them.
fn frames(batch: &TunBatch) -> Vec<Vec<u8>> {
    let whole = |frame: super::super::Frame<'_>| {
        let mut bytes = frame.head().to_vec();
        frame.pieces().for_each(|piece| bytes.extend_from_slice(piece));
        bytes
    };
    batch.frames().map(whole).collect()
}

/// Merges, cuts again, and wants every packet back, in the order of its flow.
fn check(packets: &[Vec<u8>], kinds: MergeKinds) -> usize {
    let batch = batch_of(packets, kinds);
    let frames = frames(&batch);
    let mut came_out: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for (bytes, frame) in frames.iter().zip(batch.frames()) {
        let cut = segments(bytes).expect("a frame of ours is cut");
        let as_they_came: Vec<Vec<u8>> = frame.packets().map(<[u8]>::to_vec).collect();
        assert!(cut == as_they_came, "cutting undoes merging");
        assert!(bytes.len() <= VIRTIO_HEADER_LEN + 65_535);
        for packet in cut {
            came_out.entry(flow_of(&packet)).or_default().push(packet);
        }
    }
    let mut went_in: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for packet in packets {
        went_in.entry(flow_of(packet)).or_default().push(packet.clone());
    }
    assert!(came_out == went_in, "every flow has its packets, in their order");
    assert_eq!(batch.packets().map(<[u8]>::to_vec).collect::<Vec<_>>(), packets);
    frames.len()
}

fn flow_of(packet: &[u8]) -> Vec<u8> {
    let protocol = if packet[0] >> 4 == 4 { packet[9] } else { packet[6] };
    let ends = if packet[0] >> 4 == 4 { 12..24 } else { 8..44 };
    [&[packet[0] >> 4, protocol], packet.get(ends).unwrap_or_default()].concat()
}

/// A row of packets of one flow, as a program that sends a lot makes them.
fn row(base: &Spec, sizes: &[usize]) -> Vec<Vec<u8>> {
    let mut spec = base.clone();
    let mut packets = Vec::new();
    for size in sizes {
        spec.payload = (0..*size).map(|i| u8::try_from((i * 7 + *size) % 251).unwrap()).collect();
        packets.push(spec.build());
        spec.seq = spec.seq.wrapping_add(u32::try_from(*size).unwrap());
        spec.id = spec.id.wrapping_add(1);
    }
    packets
}

#[test]
fn a_row_of_equal_segments_is_one_frame() {
    for v6 in [false, true] {
        for base in [Spec::tcp(&[]), Spec::udp(&[])] {
            let base = Spec { v6, seq: u32::MAX - 5_000, id: u16::MAX - 3, ..base };
            assert_eq!(check(&row(&base, &[1201; 20]), BOTH), 1, "{base:?}");
            assert_eq!(check(&row(&base, &[1200, 1200, 7]), BOTH), 1, "a short one ends it");
            assert_eq!(check(&row(&base, &[1200, 7, 1200, 1200]), BOTH), 2);
            assert_eq!(check(&row(&base, &[1200, 1201, 1201]), BOTH), 2, "a longer one is new");
            assert_eq!(check(&row(&base, &[1]), BOTH), 1);
            assert_eq!(check(&row(&base, &[1200; 60]), BOTH), 2, "not over 64 KiB");
            assert_eq!(check(&row(&base, &[3; 100]), BOTH), 2, "not over 64 segments");
            assert_eq!(check(&row(&base, &[1200; 20]), MergeKinds::default()), 20);
        }
    }
}

#[test]
fn what_a_receiver_could_tell_apart_is_not_merged() {
    let base = Spec::tcp(&[]);
    let two = |change: &dyn Fn(&mut Spec)| {
        let first = Spec { payload: vec![1; 100], ..base.clone() };
        let mut second = Spec { seq: base.seq + 100, id: base.id + 1, ..first.clone() };
        change(&mut second);
        check(&[first.build(), second.build()], BOTH)
    };
    assert_eq!(two(&|_| {}), 1);
    assert_eq!(two(&|spec| spec.flags |= PSH), 1, "a push ends a train");
    assert_eq!(two(&|spec| spec.seq += 1), 2, "a hole");
    assert_eq!(two(&|spec| spec.id += 1), 2, "a hole in the identifiers");
    assert_eq!(two(&|spec| spec.tos = 3), 2, "congestion experienced");
    assert_eq!(two(&|spec| spec.flags |= FIN), 2);
    assert_eq!(two(&|spec| spec.flags |= CWR), 2);
    assert_eq!(two(&|spec| spec.flags |= ECE), 2);
    assert_eq!(two(&|spec| spec.options[7] = 9), 2, "another time stamp");
    assert_eq!(two(&|spec| spec.port = 2), 2, "another flow");
    assert_eq!(two(&|spec| spec.v6 = true), 2);
    let first = Spec { payload: vec![1; 100], flags: ACK | PSH, ..base.clone() };
    let second = Spec { seq: base.seq + 100, id: base.id + 1, ..first.clone() };
    assert_eq!(check(&[first.build(), second.build()], BOTH), 2, "nothing follows a push");
}

#[test]
fn a_packet_with_a_wrong_checksum_stays_alone() {
    for base in [Spec::tcp(&[]), Spec::udp(&[])] {
        for bad in 0..4 {
            for at in [10, 45, 60] {
                let mut packets = row(&base, &[100; 4]);
                packets[bad][at] ^= 1;
                let frames = check(&packets, BOTH);
                assert!(frames >= 2, "packet {bad} byte {at}: {frames}");
            }
        }
    }
}

#[test]
fn mixed_flows_and_pure_acknowledgements_leave_trains_whole() {
    let data = row(&Spec::tcp(&[]), &[1000; 10]);
    let other = row(&Spec { port: 2, ..Spec::tcp(&[]) }, &[900; 10]);
    let acks = row(&Spec { port: 3, ..Spec::tcp(&[]) }, &[0; 10]);
    let mixed: Vec<Vec<u8>> =
        data.iter().zip(&other).zip(&acks).flat_map(|((a, b), c)| [a, b, c]).cloned().collect();
    assert_eq!(check(&mixed, BOTH), 12);
}

#[test]
fn fragments_other_protocols_and_datagrams_without_checksum_stay_alone() {
    let mut fragments = row(&Spec::udp(&[]), &[100; 3]);
    for fragment in &mut fragments {
        fragment[6] = 0x20;
    }
    assert_eq!(check(&fragments, BOTH), 3);
    let mut icmp = row(&Spec::udp(&[]), &[100; 3]);
    icmp.iter_mut().for_each(|packet| packet[9] = 1);
    assert_eq!(check(&icmp, BOTH), 3);
    let mut unchecked = row(&Spec::udp(&[]), &[100; 3]);
    unchecked.iter_mut().for_each(|packet| packet[26..28].fill(0));
    assert_eq!(check(&unchecked, BOTH), 3);
    let mut options = row(&Spec::udp(&[]), &[100; 3]);
    options.iter_mut().for_each(|packet| packet[0] = 0x46);
    assert_eq!(check(&options, BOTH), 3);
}

#[test]
fn the_first_segment_carries_cwr_and_the_last_push_and_fin() {
    let spec = Spec { flags: ACK | CWR | PSH | FIN, ..Spec::tcp(&[5; 250]) };
    let header = FrameHeader {
        checksum: Some((20, 16)),
        segmentation: Some(Segmentation { kind: SegmentationKind::TcpV4, size: 100 }),
        header_len: 0,
    };
    let mut frame = header.encode().to_vec();
    frame.extend_from_slice(&spec.build());
    let cut = segments(&frame).unwrap();
    let expected: Vec<Vec<u8>> = [(ACK | CWR, 100), (ACK, 100), (ACK | PSH | FIN, 50)]
        .into_iter()
        .enumerate()
        .map(|(i, (flags, len))| {
            let step = u16::try_from(i).unwrap();
            let (seq, id) = (spec.seq + u32::from(step) * 100, spec.id + step);
            Spec { flags, seq, id, payload: vec![5; len], ..spec.clone() }.build()
        })
        .collect();
    assert_eq!(cut, expected);
}

#[test]
fn a_checksum_left_open_is_finished() {
    for (spec, field) in [(Spec::tcp(b"odd"), 16), (Spec::udp(b"even"), 6)] {
        let whole = spec.build();
        let mut open = whole.clone();
        let pseudo = {
            let mut bytes = open[12..20].to_vec();
            bytes.extend_from_slice(&[0, open[9], 0, u8::try_from(open.len() - 20).unwrap()]);
            !slow_checksum(&bytes)
        };
        open[20 + field..22 + field].copy_from_slice(&pseudo.to_be_bytes());
        let checksum = Some((20, u16::try_from(field).unwrap()));
        let header = FrameHeader { checksum, ..FrameHeader::default() };
        let mut frame = header.encode().to_vec();
        frame.extend_from_slice(&open);
        assert_eq!(segments(&frame).unwrap(), [whole]);
    }
}

fn any_packet() -> impl Strategy<Value = (Spec, u8)> {
    let sizes = prop_oneof![4 => Just(100usize), 1 => 0usize..200, 1 => Just(99usize)];
    let flags = prop_oneof![12 => Just(ACK), 2 => Just(ACK | PSH), 1 => any::<u8>()];
    let tos = prop_oneof![9 => Just(0u8), 1 => any::<u8>()];
    (any::<bool>(), any::<bool>(), 0u16..3, sizes, flags, tos, 0u8..40).prop_map(
        |(v6, tcp, port, size, flags, tos, event)| {
            let spec = if tcp { Spec::tcp(&[]) } else { Spec::udp(&[]) };
            (Spec { v6, port, flags, tos, payload: vec![event; size], ..spec }, event)
        },
    )
}

proptest! {
    #[test]
    fn cutting_what_was_merged_gives_back_what_came(
        specs in proptest::collection::vec(any_packet(), 1..80),
        same_family in any::<bool>(),
    ) {
        let mut seqs: BTreeMap<(bool, bool, u16), (u32, u16)> = BTreeMap::new();
        let mut packets = Vec::new();
        for (mut spec, event) in specs {
            spec.v6 &= !same_family;
            let start = (u32::MAX - 3_000, u16::MAX - 20);
            let next = seqs.entry((spec.v6, spec.tcp, spec.port)).or_insert(start);
            if event == 0 {
                next.0 = next.0.wrapping_add(1);
            }
            (spec.seq, spec.id) = *next;
            *next = (
                next.0.wrapping_add(u32::try_from(spec.payload.len()).unwrap()),
                next.1.wrapping_add(if event == 1 { 0 } else { 1 }),
            );
            let mut packet = spec.build();
            if event == 2 {
                let at = packet.len() / 2;
                packet[at] ^= 0x40;
            }
            packets.push(packet);
        }
        check(&packets, BOTH);
    }

    #[test]
    fn no_bytes_make_it_panic(
        mut frame in proptest::collection::vec(0u8.., 0..400),
        kind in 0usize..5,
        version in 0u8..3,
    ) {
        if let Some(byte) = frame.get_mut(1) {
            *byte = [0, 1, 4, 5, 0x81][kind];
        }
        if let Some(byte) = frame.get_mut(VIRTIO_HEADER_LEN) {
            *byte = [*byte, 0x45, 0x60][usize::from(version)];
        }
        for (at, value) in [(0, 1), (3, 0), (5, 0), (7, 0), (9, 0)] {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        let _ = segments(&frame);
        if frame.len() > VIRTIO_HEADER_LEN {
            let packet = frame.split_off(VIRTIO_HEADER_LEN);
            let batch = batch_of(&[packet.clone(), packet], BOTH);
            let _ = frames(&batch);
        }
    }
}
