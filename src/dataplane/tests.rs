//! Two nodes' data planes, joined by hand: what is delivered, what dies, and of what.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::offload::{FrameHeader, MergeKinds, Segmentation, SegmentationKind};
use super::{
    EngineKeys, ForwardingTable, MIN_SEAL_BUFFER, Note, Peer, Session, SessionSettings, Shared,
    Source, Target, TunBatch, UdpBatch, flush_pending, inbound, inbound_train, outbound,
    outbound_frame, sender_index,
};
use crate::path::{Choice, Via};
use crate::policy::Filter;
use crate::testing::epoch;
use crate::types::{DropReason, NodeId, OverlayAddrs, OverlayRange, SecretKey, SocketId};
use crate::wire::filter::{KIND_UDP, WireFilter, WireRule};
use crate::wire::relay;

mod copies;
mod hostile;
mod lanes;

const RELAY: &str = "203.0.113.1:41820";

struct Side {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    endpoint: SocketAddr,
    addrs: OverlayAddrs,
}

fn addrs(host: u32) -> OverlayAddrs {
    let range =
        OverlayRange::new("10.77.0.0/20".parse().unwrap(), "fd00:1:2::/48".parse().unwrap());
    range.unwrap().addresses(host).unwrap()
}

fn side(own: u32, other: u32) -> Side {
    let key = |host: u32| SecretKey::from_bytes([u8::try_from(host).unwrap(); 32]);
    let endpoint = |host: u32| SocketAddr::from(([203, 0, 113, u8::try_from(host).unwrap()], 4000));
    let settings = SessionSettings::default();
    let engine = EngineKeys::new(&key(own));
    let session = Session::new(&engine, &key(other).public(), 100 + own, settings);
    let peer = Peer::new(NodeId::new(other).unwrap(), addrs(other), 100 + own, session);
    let via = Via::direct(endpoint(other));
    peer.set_choice(Choice { primary: Some(via), ..Choice::default() });
    let shared = Shared::new(epoch(), &engine);
    let mut table = ForwardingTable::new(Some(addrs(own)), Some(RELAY.parse().unwrap()));
    table.insert(Arc::clone(&peer));
    shared.publish(table);
    Side { shared, peer, endpoint: endpoint(own), addrs: addrs(own) }
}

/// Two sides with a session.
fn pair(now: Instant) -> (Side, Side) {
    let (a, b) = (side(1, 2), side(2, 1));
    let (mut to_b, mut to_a) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
    let from = |side: &Side| side.endpoint.ip();
    let len = a.peer.lock().session.initiate(&mut to_b, now).unwrap();
    let reply = b.peer.lock().session.handle_handshake(&to_b[..len], from(&a), &mut to_a, now);
    let len = reply.unwrap().reply.unwrap();
    let done = a.peer.lock().session.handle_handshake(&to_a[..len], from(&b), &mut to_b, now);
    let done = done.unwrap();
    assert!(done.established);
    // The keepalive behind the handshake is what confirms it to the responder.
    let notes = deliver(&b, &a, &to_b[..done.reply.unwrap()], now).1;
    assert!(matches!(notes[..], [Note::SessionConfirmed(_)]), "{notes:?}");
    (a, b)
}

fn deliver(to: &Side, from: &Side, datagram: &[u8], now: Instant) -> (Vec<Vec<u8>>, Vec<Note>) {
    let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
    let source = Source::udp(from.endpoint, None);
    inbound(&to.shared, &to.shared.table(), source, datagram, now, &mut tun, &mut notes);
    (tun.packets().map(<[u8]>::to_vec).collect(), notes)
}

fn send(from: &Side, packet: &[u8], now: Instant) -> (UdpBatch, Vec<Note>) {
    let (mut out, mut notes) = (UdpBatch::default(), Vec::new());
    outbound(&from.shared, &from.shared.table(), [packet], now, &mut out, &mut notes);
    (out, notes)
}

fn packet(src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&dst.octets());
    packet.extend_from_slice(payload);
    packet
}

fn only_datagram(batch: &UdpBatch) -> Vec<u8> {
    let all: Vec<_> = batch.datagrams().collect();
    assert_eq!(all.len(), 1);
    all[0].1.to_vec()
}

#[test]
fn a_packet_arrives_as_it_was_sent_in_both_directions() {
    let now = epoch();
    let (a, b) = pair(now);
    for (from, to) in [(&a, &b), (&b, &a)] {
        let sent = packet(from.addrs.v4, to.addrs.v4, b"hello");
        let (out, _) = send(from, &sent, now);
        let (received, _) = deliver(to, from, &only_datagram(&out), now);
        assert_eq!(received, [sent]);
    }
}

#[test]
fn a_spoofed_source_and_a_foreign_destination_are_dropped_and_counted() {
    let now = epoch();
    let (a, b) = pair(now);
    let stranger = Ipv4Addr::new(10, 77, 0, 9);
    // Towards b's address a packet always goes to b; its source is what a pretends.
    let spoofed = packet(stranger, b.addrs.v4, b"");
    let (out, _) = send(&a, &spoofed, now);
    assert_eq!(deliver(&b, &a, &only_datagram(&out), now).0, Vec::<Vec<u8>>::new());
    assert_eq!(b.shared.drops().of(DropReason::SpoofedSource), 1);

    // A packet to somebody else, sealed for b all the same.
    let mut sealed = vec![0; 200];
    let foreign = packet(a.addrs.v4, stranger, b"");
    let len = a.peer.lock().session.seal(&foreign, &mut sealed, now).unwrap();
    assert_eq!(deliver(&b, &a, &sealed[..len], now).0, Vec::<Vec<u8>>::new());
    assert_eq!(b.shared.drops().of(DropReason::NoRoute), 1);
}

/// Gives a side these rules.
fn set_rules(side: &Side, rules: Vec<WireRule>) {
    let mut table = ForwardingTable::new(Some(side.addrs), Some(RELAY.parse().unwrap()));
    table.filter = Filter::new(&WireFilter { rules: Some(rules) }).map(Arc::new);
    table.insert(Arc::clone(&side.peer));
    side.shared.publish(table);
}

#[test]
fn what_rules_refuse_is_counted_and_answered_and_own_flows_come_back() {
    let now = epoch();
    let (a, b) = pair(now);
    let udp =
        |src: u16, dst: u16| [&src.to_be_bytes()[..], &dst.to_be_bytes(), &[0, 8, 0, 0]].concat();
    let port = WireRule { kind: KIND_UDP, sources: None, ports: Some(vec![(53, 53)]) };
    set_rules(&b, vec![port]);
    let carry = |from: &Side, to: &Side, src, dst| {
        let sent = packet(from.addrs.v4, to.addrs.v4, &udp(src, dst));
        deliver(to, from, &only_datagram(&send(from, &sent, now).0), now)
    };
    assert_eq!(carry(&a, &b, 9000, 53).0.len(), 1, "a rule allows it");
    let (received, notes) = carry(&a, &b, 53, 9000);
    assert_eq!(received.len(), 0);
    let [Note::Refused(answer)] = &notes[..] else { panic!("{notes:?}") };
    assert_eq!((answer[9], answer[20], answer[21]), (1, 3, 13), "administratively prohibited");
    assert_eq!(answer[16..20], a.addrs.v4.octets());
    assert_eq!(b.shared.drops().of(DropReason::Filtered), 1);

    // The sender has rules too, and hears the answer: it is about a flow of its own.
    set_rules(&a, Vec::new());
    carry(&a, &b, 53, 9000);
    let (out, _) = send(&b, answer, now);
    assert_eq!(deliver(&a, &b, &only_datagram(&out), now).0, std::slice::from_ref(answer));

    // What b asks for is answered; its own answers to a do not count as asking.
    assert_eq!(carry(&b, &a, 7000, 7001).0.len(), 0, "a lets nothing in");
    assert_eq!(carry(&a, &b, 7001, 7000).0.len(), 1);
    assert_eq!(carry(&a, &b, 9000, 53).0.len(), 1);
    assert_eq!(carry(&b, &a, 53, 9000).0.len(), 1, "a asked for it");
    set_rules(&b, Vec::new());
    assert_eq!(carry(&b, &a, 53, 9000).0.len(), 1);
    assert_eq!(carry(&a, &b, 9000, 53).0.len(), 0, "the rule is gone, and so is the flow");
    assert_eq!(carry(&a, &b, 7001, 7000).0.len(), 1, "b's own flow is not");
}

#[test]
fn refused_packets_are_answered_with_measure() {
    let now = epoch();
    let (a, b) = pair(now);
    set_rules(&b, Vec::new());
    let answers: usize = (0..1_000)
        .map(|_| {
            let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, &[0; 8]), now);
            deliver(&b, &a, &only_datagram(&out), now).1.len()
        })
        .sum();
    assert!((1..100).contains(&answers), "{answers}");
    assert_eq!(b.shared.drops().of(DropReason::Filtered), 1_000);
}

#[test]
fn a_packet_to_nobody_is_answered() {
    let now = epoch();
    let (a, _) = pair(now);
    let nobody = Ipv4Addr::new(10, 77, 0, 9);
    let (out, notes) = send(&a, &packet(a.addrs.v4, nobody, &[0; 8]), now);
    let [Note::Answer(answer)] = &notes[..] else { panic!("{notes:?}") };
    assert_eq!((answer[9], answer[20], answer[21]), (1, 3, 1), "host unreachable");
    assert_eq!(answer[12..16], nobody.octets(), "from where nobody is");
    assert!(out.is_empty());
}

#[test]
fn replayed_damaged_and_unknown_packets_are_dropped_and_counted() {
    let now = epoch();
    let (a, b) = pair(now);
    let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, b"x"), now);
    let good = only_datagram(&out);
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let mut unknown = good.clone();
    unknown[5..8].copy_from_slice(&[9, 9, 9]);
    assert_eq!(deliver(&b, &a, &damaged, now).0.len(), 0);
    assert_eq!(deliver(&b, &a, &unknown, now).0.len(), 0);
    assert_eq!(deliver(&b, &a, &good, now).0.len(), 1);
    assert_eq!(deliver(&b, &a, &good, now).0.len(), 0);
    let drops = b.shared.drops();
    assert_eq!(drops.of(DropReason::Undecryptable), 1);
    assert_eq!(drops.of(DropReason::UnknownSession), 1);
    assert_eq!(drops.of(DropReason::Replayed), 1);
}

#[test]
fn without_a_session_packets_wait_and_one_session_is_asked_for() {
    let now = epoch();
    let (a, b) = (side(1, 2), side(2, 1));
    let sent: Vec<_> = (0..3u8).map(|i| packet(a.addrs.v4, b.addrs.v4, &[i])).collect();
    let mut asked = 0;
    for packet in &sent {
        let (out, notes) = send(&a, packet, now);
        assert!(out.is_empty());
        asked += notes.iter().filter(|note| matches!(note, Note::SessionWanted(_))).count();
    }
    assert_eq!(asked, 1, "one note, however many packets");
    let mut initiation = [0; MIN_SEAL_BUFFER];
    let mut answer = [0; MIN_SEAL_BUFFER];
    let ip: IpAddr = a.endpoint.ip();
    let len = a.peer.lock().session.initiate(&mut initiation, now).unwrap();
    let reply =
        b.peer.lock().session.handle_handshake(&initiation[..len], ip, &mut answer, now).unwrap();
    a.peer
        .lock()
        .session
        .handle_handshake(&answer[..reply.reply.unwrap()], ip, &mut initiation, now)
        .unwrap();
    let mut out = UdpBatch::default();
    flush_pending(&a.shared, &a.shared.table(), &a.peer, now, &mut out);
    let datagrams: Vec<Vec<u8>> = out.datagrams().map(|(_, bytes)| bytes.to_vec()).collect();
    let received: Vec<Vec<u8>> =
        datagrams.iter().flat_map(|bytes| deliver(&b, &a, bytes, now).0).collect();
    assert_eq!(received, sent, "all of them, in order");
}

#[test]
fn a_waiting_packet_is_given_up_after_three_seconds() {
    let now = epoch();
    let a = side(1, 2);
    for i in 0..100u8 {
        send(&a, &packet(a.addrs.v4, addrs(2).v4, &[i]), now);
    }
    assert_eq!(a.shared.drops().of(DropReason::QueueFull), 100 - 64, "the queue has a bound");
    let later = now + Duration::from_secs(4);
    assert!(!a.peer.lock().expire_pending(a.shared.drops(), later));
    assert_eq!(a.shared.drops().of(DropReason::NoPath), 64);
}

#[test]
fn relayed_packets_come_only_from_the_relay_and_only_from_their_sender() {
    let now = epoch();
    let (a, b) = pair(now);
    a.peer.set_choice(Choice { primary: Some(Via::RelayUdp), ..Choice::default() });
    let frame = |out: &UdpBatch| {
        let mut frame = only_datagram(out);
        assert_eq!(relay::parse_data(&frame).unwrap().0, NodeId::new(2).unwrap(), "for b");
        // What the server does: whom it is for becomes whom it is from.
        frame[..relay::DATA_HEADER_LEN]
            .copy_from_slice(&relay::data_header(NodeId::new(1).unwrap()));
        frame
    };
    let from_relay = |side: &Side, frame: &[u8]| {
        let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
        let source = Source::udp(RELAY.parse().unwrap(), None);
        inbound(&side.shared, &side.shared.table(), source, frame, now, &mut tun, &mut notes);
        tun.packets().count()
    };
    let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, b"1"), now);
    assert_eq!(from_relay(&b, &frame(&out)), 1);
    let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, b"2"), now);
    assert_eq!(deliver(&b, &a, &frame(&out), now).0.len(), 0, "not from the relay's address");
    let mut wrong = frame(&out);
    wrong[..relay::DATA_HEADER_LEN].copy_from_slice(&relay::data_header(NodeId::new(7).unwrap()));
    assert_eq!(from_relay(&b, &wrong), 0, "in the name of somebody else");
    assert_eq!(b.shared.drops().of(DropReason::BadRelayFrame), 2);
}

#[test]
fn what_the_udp_relay_does_not_carry_goes_by_the_control_connection() {
    let now = epoch();
    let (a, b) = pair(now);
    a.peer.set_choice(Choice { primary: Some(Via::RelayUdp), ..Choice::default() });
    a.peer.set_mtu(1_056);
    let sent_to = |payload: usize| {
        let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, &vec![7; payload]), now);
        let (target, bytes) = out.datagrams().next().expect("it leaves");
        (target, relay::asks_for_link(bytes))
    };
    let udp = Target::Udp { remote: RELAY.parse().unwrap(), local: None, socket: SocketId::MAIN };
    assert_eq!(sent_to(1_260), (udp, false), "there is no connection");
    a.peer.set_long_by_link(true);
    assert_eq!(sent_to(1_036), (udp, false));
    assert_eq!(sent_to(1_037), (Target::Link, true));
    a.peer.set_choice(Choice { primary: Some(Via::RelayTcp), ..Choice::default() });
    assert_eq!(sent_to(1_037), (Target::Link, false), "the receiver has its own way");
}

#[test]
fn multicast_and_garbage_from_the_interface_die_quietly() {
    let now = epoch();
    let (a, _) = pair(now);
    send(&a, &packet(a.addrs.v4, Ipv4Addr::new(224, 0, 0, 251), b""), now);
    send(&a, &[0x60; 10], now);
    send(&a, &packet(a.addrs.v4, Ipv4Addr::new(10, 77, 9, 9), b""), now);
    let drops = a.shared.drops();
    assert_eq!(drops.of(DropReason::Multicast), 1);
    assert_eq!(drops.of(DropReason::BadInnerPacket), 1);
    assert_eq!(drops.of(DropReason::NoRoute), 1);
}

/// A super-packet of the kernel: TCP over IPv4 with `payload`, to be cut at 100 bytes.
fn super_packet(src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let segmentation = Some(Segmentation { kind: SegmentationKind::TcpV4, size: 100 });
    let header = FrameHeader { checksum: Some((20, 16)), segmentation, header_len: 40 };
    let mut inner = vec![0, 80, 1, 187, 0, 0, 0, 9, 0, 0, 0, 7, 0x50, 0x10, 1, 0, 0, 0, 0, 0];
    inner.extend_from_slice(payload);
    let mut ip = packet(src, dst, &inner);
    ip[9] = 6;
    // What the kernel leaves in the field: the sum of addresses, protocol and length.
    let words = ip[12..20].chunks(2).map(|pair| u32::from(pair[0]) * 256 + u32::from(pair[1]));
    let mut sum: u32 = words.sum::<u32>() + 6 + u32::try_from(inner.len()).unwrap();
    sum = (sum & 0xffff) + (sum >> 16);
    ip[36..38].copy_from_slice(&u16::try_from(sum).unwrap().to_be_bytes());
    [header.encode().as_slice(), &ip].concat()
}

#[test]
fn a_super_packet_leaves_as_one_run_and_arrives_as_one_train() {
    let now = epoch();
    let (a, b) = pair(now);
    let payload: Vec<u8> = (0..450u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let mut frame = super_packet(a.addrs.v4, b.addrs.v4, &payload);
    let (mut out, mut notes) = (UdpBatch::default(), Vec::new());
    outbound_frame(&a.shared, &a.shared.table(), &mut frame, now, &mut out, &mut notes);
    let runs: Vec<_> = out.runs().map(|(run, bytes)| (run.segment, bytes.to_vec())).collect();
    assert_eq!(runs.len(), 1, "all for one call");
    assert_eq!((runs[0].0, runs[0].1.len()), (172, 4 * 172 + 122));
    let mut tun = TunBatch::default();
    tun.clear(MergeKinds { tcp: true, udp: true });
    let source = Source::udp(a.endpoint, None);
    let (stride, train) = (runs[0].0, &runs[0].1);
    let table = b.shared.table();
    inbound_train(&b.shared, &table, source, train, stride, now, &mut tun, &mut notes);
    tun.finish();
    let frames: Vec<_> = tun.frames().collect();
    assert_eq!(frames.len(), 1, "one write");
    assert_eq!(frames[0].kind(), Some(SegmentationKind::TcpV4));
    assert_eq!(frames[0].packets().count(), 5);
    assert_eq!(frames[0].pieces().collect::<Vec<_>>().concat(), payload);
    assert_eq!(b.peer.counters.rx_bytes.load(std::sync::atomic::Ordering::Relaxed), 450 + 5 * 40);
}

#[test]
fn a_broken_frame_is_counted_and_does_no_harm() {
    let now = epoch();
    let (a, b) = pair(now);
    let whole = super_packet(a.addrs.v4, b.addrs.v4, &[7; 450]);
    for len in 0..whole.len() {
        let (mut out, mut notes) = (UdpBatch::default(), Vec::new());
        let mut frame = whole[..len].to_vec();
        outbound_frame(&a.shared, &a.shared.table(), &mut frame, now, &mut out, &mut notes);
        assert!(out.is_empty(), "{len}");
    }
    assert_eq!(a.shared.drops().of(DropReason::BadInnerPacket), whole.len() as u64);
}

proptest::proptest! {
    #[test]
    fn no_datagram_makes_the_data_plane_panic(
        mut bytes in proptest::collection::vec(0u8.., 0..300),
        kind in 0usize..6,
    ) {
        let now = epoch();
        let a = side(1, 2);
        if let (Some(first), true) = (bytes.first_mut(), kind < 5) {
            *first = [1, 2, 4, 0xb1, 0xb2][kind];
        }
        for source in [Source::Link, Source::udp(RELAY.parse().unwrap(), None)] {
            let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
            inbound(&a.shared, &a.shared.table(), source, &bytes, now, &mut tun, &mut notes);
            proptest::prop_assert_eq!(tun.packets().count(), 0);
        }
        send(&a, &bytes, now);
    }
}

#[test]
fn a_packet_too_big_for_the_path_goes_on_and_its_sender_is_told_but_not_too_often() {
    let now = epoch();
    let (a, b) = pair(now);
    a.peer.set_mtu(1_360);
    let mut whole = packet(a.addrs.v4, b.addrs.v4, &[7; 1_341]);
    whole[6] = 0x40;
    let mut told = 0;
    for _ in 0..100 {
        let (out, notes) = send(&a, &whole, now);
        assert_eq!(deliver(&b, &a, &only_datagram(&out), now).0, [whole.clone()]);
        for note in notes {
            let Note::TooBig { answer, mtu: 1_360, .. } = note else { continue };
            assert_eq!(&answer[12..16], b.addrs.v4.octets());
            assert_eq!(
                (answer[20], answer[21], &answer[26..28]),
                (3, 4, &1_360u16.to_be_bytes()[..])
            );
            told += 1;
        }
    }
    assert!((1..50).contains(&told), "told {told} times");
    assert_eq!(a.peer.counters.too_big.load(std::sync::atomic::Ordering::Relaxed), 100);
    let fits = packet(a.addrs.v4, b.addrs.v4, &[7; 1_340]);
    let (_, notes) = send(&a, &fits, now + Duration::from_secs(5));
    assert!(!notes.iter().any(|note| matches!(note, Note::TooBig { .. })), "{notes:?}");
}

#[test]
fn what_is_sent_and_what_arrives_is_counted_by_path_and_size_a_second_copy_too() {
    let now = epoch();
    let (a, b) = pair(now);
    let via = Via::direct;
    let before = b.peer.records().arrived.of(via(a.endpoint));
    let mut sent = Vec::new();
    for len in [10, 1_200, 1_380] {
        let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, &vec![1; len]), now);
        sent.push(only_datagram(&out));
    }
    assert_eq!(a.peer.records().sent.of(via(b.endpoint)).0, [1, 1, 1]);
    for datagram in sent.iter().chain(&sent[..1]) {
        deliver(&b, &a, datagram, now);
    }
    let mut forged = sent[0].clone();
    forged[40] ^= 1;
    forged[8] ^= 0x40;
    deliver(&b, &a, &forged, now);
    let arrived = b.peer.records().arrived.of(via(a.endpoint)).since(before);
    assert_eq!(arrived.0, [2, 1, 1], "the copy counts, the forgery does not");
}
