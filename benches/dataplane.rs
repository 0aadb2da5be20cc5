//! What a packet costs in each step of the data plane: `cargo bench --bench dataplane`.
//!
//! No socket and no interface, so the figures are those of the program alone: sealing and opening
//! a train, cutting a super-packet, joining what was received, finding the route among many.

#![expect(clippy::unwrap_used, reason = "what fails here fails the benchmark")]
#![expect(missing_docs, reason = "criterion's macro makes a public function")]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use overlay::dataplane::offload::{
    FrameHeader, MergeKinds, Segmentation, SegmentationKind, Segments, VIRTIO_HEADER_LEN,
};
use overlay::dataplane::{
    EngineKeys, ForwardingTable, MIN_SEAL_BUFFER, Peer, Session, SessionSettings, Shared, Source,
    TunBatch, UdpBatch, inbound_train, outbound_frame,
};
use overlay::io::clock;
use overlay::path::{Choice, Via};
use overlay::policy::{Filter, Flows, Verdict};
use overlay::types::{NodeId, OverlayAddrs, OverlayRange, SecretKey};
use overlay::wire::filter::{KIND_TCP, KIND_UDP, WireFilter, WireRule};

/// Payload of one segment with an interface MTU of 1420.
const SEGMENT: usize = 1_380;
const SEGMENTS: usize = 44;
const PREFIXES: u32 = 10_000;

struct Side {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    endpoint: SocketAddr,
    addrs: OverlayAddrs,
}

fn addrs(host: u32) -> OverlayAddrs {
    let (v4, v6) = ("10.77.0.0/16".parse().unwrap(), "fd00:1:2::/48".parse().unwrap());
    OverlayRange::new(v4, v6).unwrap().addresses(host).unwrap()
}

fn peer(host: u32, key: &SecretKey, other: &SecretKey) -> Arc<Peer> {
    let engine = EngineKeys::new(key);
    let session = Session::new(&engine, &other.public(), host << 3, SessionSettings::default());
    Peer::new(NodeId::new(host).unwrap(), addrs(host), host << 3, session)
}

fn side(own: u32, other: u32) -> Side {
    let key = |host: u32| SecretKey::from_bytes([u8::try_from(host).unwrap(); 32]);
    let endpoint = |host: u32| SocketAddr::from(([203, 0, 113, u8::try_from(host).unwrap()], 4000));
    let peer = peer(other, &key(own), &key(other));
    peer.set_choice(Choice { primary: Some(Via::direct(endpoint(other))), ..Choice::default() });
    let shared = Shared::new(clock::now(), &EngineKeys::new(&key(own)));
    let mut table = ForwardingTable::new(Some(addrs(own)), None);
    table.insert(Arc::clone(&peer));
    shared.publish(table);
    Side { shared, peer, endpoint: endpoint(own), addrs: addrs(own) }
}

/// Two sides with a session.
fn pair(now: Instant) -> (Side, Side) {
    let (a, b) = (side(1, 2), side(2, 1));
    let (mut to_b, mut to_a) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
    let len = a.peer.lock().session.initiate(&mut to_b, now).unwrap();
    let answer =
        b.peer.lock().session.handle_handshake(&to_b[..len], a.endpoint.ip(), &mut to_a, now);
    let len = answer.unwrap().reply.unwrap();
    let done =
        a.peer.lock().session.handle_handshake(&to_a[..len], b.endpoint.ip(), &mut to_b, now);
    let len = done.unwrap().reply.unwrap();
    let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
    let source = Source::udp(a.endpoint, None);
    inbound_train(
        &b.shared,
        &b.shared.table(),
        source,
        &to_b[..len],
        len,
        now,
        &mut tun,
        &mut notes,
    );
    (a, b)
}

/// Gives two sides that have a session a second one, on which `b` seals.
fn add_second(a: &Side, b: &Side, now: Instant) {
    let keys = [1, 2].map(|host| EngineKeys::new(&SecretKey::from_bytes([host; 32])));
    for (side, own, other) in [(a, &keys[0], &keys[1]), (b, &keys[1], &keys[0])] {
        let make = |index| Session::new(own, &other.public(), index, SessionSettings::default());
        side.peer.prepare_second(own.public(), other.public(), make, now);
    }
    let (mut to_a, mut to_b) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
    let [mut at_a, mut at_b] = [a, b].map(|side| side.peer.lock_second().unwrap());
    let len = at_b.session.initiate(&mut to_a, now).unwrap();
    let answer = at_a.session.handle_handshake(&to_a[..len], b.endpoint.ip(), &mut to_b, now);
    let len = answer.unwrap().reply.unwrap();
    let done = at_b.session.handle_handshake(&to_b[..len], a.endpoint.ip(), &mut to_a, now);
    assert!(done.unwrap().established);
    b.peer.seal_on_second(true);
}

/// What the interface hands over: one TCP super-packet with its virtio header.
fn super_packet(from: &Side, to: &Side) -> Vec<u8> {
    let len = u16::try_from(40 + SEGMENT * SEGMENTS).unwrap();
    let header = FrameHeader {
        checksum: Some((20, 16)),
        segmentation: Some(Segmentation {
            kind: SegmentationKind::TcpV4,
            size: u16::try_from(SEGMENT).unwrap(),
        }),
        header_len: 40,
    };
    let mut frame = header.encode().to_vec();
    frame.extend_from_slice(&[0x45, 0]);
    frame.extend_from_slice(&len.to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend_from_slice(&from.addrs.v4.octets());
    frame.extend_from_slice(&to.addrs.v4.octets());
    // Ports, numbers, a header of 20 bytes with ACK, a window, no checksum yet.
    frame.extend_from_slice(&[4, 0, 5, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.resize(VIRTIO_HEADER_LEN + usize::from(len), 7);
    frame
}

/// The super-packet's own packets, one behind the other.
fn cut(mut frame: Vec<u8>) -> Vec<Vec<u8>> {
    let (header, packet) = FrameHeader::parse(&mut frame).unwrap();
    let mut segments = Segments::new(&header, packet).unwrap();
    let mut packets = Vec::new();
    while let Some(segment) = segments.next_segment() {
        packets.push(segment.to_vec());
    }
    packets
}

fn trains(c: &mut Criterion) {
    let now = clock::now();
    let (a, b) = pair(now);
    let frame = super_packet(&a, &b);
    let (table, far_table) = (a.shared.table(), b.shared.table());
    let (mut out, mut notes) = (UdpBatch::default(), Vec::new());
    let mut group = c.benchmark_group("train of 44 packets");
    group.throughput(Throughput::Elements(SEGMENTS as u64));

    group.bench_function("split", |bench| {
        bench.iter_batched_ref(
            || frame.clone(),
            |frame| {
                let (header, packet) = FrameHeader::parse(frame).unwrap();
                let mut segments = Segments::new(&header, packet).unwrap();
                while let Some(segment) = segments.next_segment() {
                    black_box(segment);
                }
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("outbound", |bench| {
        bench.iter_batched_ref(
            || frame.clone(),
            |frame| {
                out.clear();
                outbound_frame(&a.shared, &table, frame, now, &mut out, &mut notes);
            },
            BatchSize::SmallInput,
        );
    });
    let kinds = MergeKinds { tcp: true, udp: true };
    let packets = cut(frame.clone());
    let mut tun = TunBatch::default();
    group.bench_function("merge", |bench| {
        bench.iter(|| {
            tun.clear(kinds);
            for packet in &packets {
                let copied: Result<(), ()> = tun.push(packet.len(), |room| {
                    room.copy_from_slice(packet);
                    Ok(packet.len())
                });
                copied.unwrap();
            }
            tun.finish();
        });
    });
    let source = Source::udp(a.endpoint, None);
    group.bench_function("inbound", |bench| {
        bench.iter_batched(
            // Each train is sealed anew: a packet is opened once.
            || {
                let mut batch = UdpBatch::default();
                outbound_frame(&a.shared, &table, &mut frame.clone(), now, &mut batch, &mut vec![]);
                batch.runs().map(|(run, bytes)| (run.segment, bytes.to_vec())).collect::<Vec<_>>()
            },
            |runs| {
                tun.clear(kinds);
                for (segment, bytes) in &runs {
                    let (to, notes) = (&mut tun, &mut notes);
                    inbound_train(&b.shared, &far_table, source, bytes, *segment, now, to, notes);
                }
                tun.finish();
                assert_eq!(tun.packets().count(), SEGMENTS, "all of it was opened");
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// One thread seals for a peer while another one opens from it, as much as that.
fn both_ways(c: &mut Criterion) {
    const TRAINS: usize = 50;
    let now = clock::now();
    let mut group = c.benchmark_group("50 trains sealed and 50 opened at once");
    group.throughput(Throughput::Elements((2 * TRAINS * SEGMENTS) as u64));
    for (name, sessions) in [("one session", 1), ("two sessions", 2)] {
        let (a, b) = pair(now);
        if sessions == 2 {
            add_second(&a, &b, now);
        }
        let (frame, back) = (super_packet(&a, &b), super_packet(&b, &a));
        let (table, far_table) = (a.shared.table(), b.shared.table());
        let (mut out, mut tun) = (UdpBatch::default(), TunBatch::default());
        let source = Source::udp(b.endpoint, None);
        let seal = |out: &mut UdpBatch| {
            for _ in 0..TRAINS {
                out.clear();
                outbound_frame(&a.shared, &table, &mut frame.clone(), now, out, &mut vec![]);
            }
        };
        let mut open = |sealed: &UdpBatch| {
            for (run, bytes) in sealed.runs() {
                tun.clear(MergeKinds { tcp: true, udp: true });
                let notes = &mut vec![];
                inbound_train(&a.shared, &table, source, bytes, run.segment, now, &mut tun, notes);
                assert_eq!(tun.packets().count(), bytes.len().div_ceil(run.segment));
            }
        };
        group.bench_function(name, |bench| {
            bench.iter_batched(
                || {
                    let mut sealed = UdpBatch::default();
                    for _ in 0..TRAINS {
                        let (frame, notes) = (&mut back.clone(), &mut vec![]);
                        outbound_frame(&b.shared, &far_table, frame, now, &mut sealed, notes);
                    }
                    sealed
                },
                |sealed| {
                    std::thread::scope(|scope| {
                        scope.spawn(|| seal(&mut out));
                        open(&sealed);
                    });
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn routes(c: &mut Criterion) {
    let (own, other) = (SecretKey::from_bytes([1; 32]), SecretKey::from_bytes([2; 32]));
    let mut table = ForwardingTable::new(None, None);
    // Two prefixes each, one in either family.
    for host in 2..2 + PREFIXES / 2 {
        table.insert(peer(host, &own, &other));
    }
    let mut hosts = (2..2 + PREFIXES / 2).cycle().step_by(977);
    let mut group = c.benchmark_group("route among 10,000 prefixes");
    group.bench_function("a known address", |bench| {
        bench.iter_batched(
            || IpAddr::V4(addrs(hosts.next().unwrap()).v4),
            |dst| assert!(table.route(black_box(dst)).is_some()),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("an unknown address", |bench| {
        let dst = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
        bench.iter(|| assert!(table.route(black_box(dst)).is_none()));
    });
    group.finish();
}

/// A verdict among a hundred rules: by a rule, as the answer of an own flow, and none.
fn filter(c: &mut Criterion) {
    let rules: Vec<WireRule> = (0..100u16)
        .map(|number| WireRule {
            kind: if number % 2 == 0 { KIND_TCP } else { KIND_UDP },
            sources: Some(vec![(u32::from(number), u32::from(number) + 50)]),
            ports: Some(vec![(number * 100, number * 100 + 50)]),
        })
        .collect();
    let filter = Filter::new(&WireFilter { rules: Some(rules) }).unwrap();
    let (own, other) = (addrs(1), addrs(60));
    let peer = NodeId::new(60).unwrap();
    let tcp = |from: OverlayAddrs, to: OverlayAddrs, ports: [u16; 2], flags: u8| {
        let mut packet = vec![0x45, 0, 4, 216, 0, 0, 0x40, 0, 64, 6, 0, 0];
        packet.extend(from.v4.octets());
        packet.extend(to.v4.octets());
        packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        packet.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        packet.resize(1_240, 7);
        packet
    };
    let (mut flows, now) = (Flows::default(), clock::now());
    filter.outbound(peer, &tcp(own, other, [40_000, 9], 2), &mut flows, now);
    let mut group = c.benchmark_group("verdict with 100 rules");
    for (name, packet, expected) in [
        ("by a rule", tcp(other, own, [5_000, 2_010], 0x10), Verdict::Allow),
        ("answer of an own flow", tcp(other, own, [9, 40_000], 0x10), Verdict::Allow),
        ("refused", tcp(other, own, [5_000, 22], 0x10), Verdict::Refuse),
    ] {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let verdict = filter.inbound(peer, black_box(&packet), &mut flows, now);
                assert_eq!(verdict, expected);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, trains, both_ways, routes, filter);
criterion_main!(benches);
