//! A member that lies about inner senders, and everything that was said before said again.

use std::net::Ipv6Addr;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::inbound_all;
use super::*;

/// How many cases there are: what `variable` says, else `default`.
fn cases(variable: &str, default: u32) -> u32 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number of cases"))
}

fn packet_v6(src: Ipv6Addr, dst: Ipv6Addr) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&dst.octets());
    packet
}

#[test]
fn no_inner_source_but_the_peers_own_comes_out() {
    let mut now = epoch();
    let (mut a, mut b) = pair(now);
    let mut rng = StdRng::seed_from_u64(1);
    let own = u32::from(a.addrs.v4);
    let mut sealed = [0; 200];
    let mut spoofed = 0;
    for case in 0..cases("OVERLAY_SPOOFED_CASES", 5_000) {
        // Sessions do not last for ever, and this goes on for long.
        if case % 1_000_000 == 999_999 {
            now = epoch();
            (a, b) = pair(now);
        }
        let source_v4 = match rng.random_range(0..6) {
            0 => Ipv4Addr::BROADCAST,
            1 => Ipv4Addr::from(own ^ (1 << rng.random_range(0..32))),
            2 => Ipv4Addr::from(own.wrapping_add(rng.random_range(1..300))),
            3 => Ipv4Addr::new(127, 0, 0, 1),
            4 => b.addrs.v4,
            _ => Ipv4Addr::from(rng.random::<u32>()),
        };
        let source_v6 = match rng.random_range(0..6) {
            0 => a.addrs.v4.to_ipv6_mapped(),
            1 => a.addrs.v4.to_ipv6_compatible(),
            2 => Ipv6Addr::from(u128::from(a.addrs.v6) ^ (1 << rng.random_range(0..128))),
            3 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, rng.random()),
            4 => Ipv6Addr::LOCALHOST,
            _ => Ipv6Addr::from(rng.random::<u128>()),
        };
        let lie = if rng.random() {
            packet(source_v4, b.addrs.v4, b"")
        } else {
            packet_v6(source_v6, b.addrs.v6)
        };
        if lie[0] == 0x45 && source_v4 == a.addrs.v4 || lie[0] == 0x60 && source_v6 == a.addrs.v6 {
            continue;
        }
        let length = a.peer.lock().session.seal(&lie, &mut sealed, now).unwrap();
        let (came_out, _) = deliver(&b, &a, &sealed[..length], now);
        assert!(came_out.is_empty(), "{lie:02x?}");
        spoofed += 1;
        assert_eq!(b.shared.drops().of(DropReason::BadInnerPacket), 0, "{lie:02x?}");
        if case % 1_000_000 == 999_998 {
            assert_eq!(b.shared.drops().of(DropReason::SpoofedSource), spoofed);
            spoofed = 0;
        }
    }
    assert_eq!(b.shared.drops().of(DropReason::SpoofedSource), spoofed, "each is counted");
    let truth = packet(a.addrs.v4, b.addrs.v4, b"true");
    let length = a.peer.lock().session.seal(&truth, &mut sealed, now).unwrap();
    assert_eq!(deliver(&b, &a, &sealed[..length], now).0, [truth]);
}

#[test]
fn garbage_makes_no_path_and_takes_none_away() {
    let now = epoch();
    let (a, b) = pair(now);
    let sent = packet(a.addrs.v4, b.addrs.v4, b"once");
    let datagram = only_datagram(&send(&a, &sent, now).0);
    assert_eq!(deliver(&b, &a, &datagram, now).0, [sent]);
    let real = Via::direct(a.endpoint);
    let arrived = |via: Via| b.peer.records().arrived.of(via).total();
    assert_eq!(arrived(real), 2, "the keepalive of the handshake, and this");
    let by = |endpoint: SocketAddr, datagrams: &[&[u8]]| {
        let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
        let (table, source) = (b.shared.table(), Source::udp(endpoint, None));
        let datagrams = datagrams.iter().copied();
        inbound_all(&b.shared, &table, source, datagrams, now, &mut tun, &mut notes);
        assert!(tun.is_empty());
    };
    // A counter of before with anything behind it; one to come; keys that are none.
    let mut old = datagram.clone();
    old[16..].fill(7);
    let (mut new, mut other) = (old.clone(), old.clone());
    new[8] ^= 0x40;
    other[4] ^= 0x80;
    for port in 1..=100 {
        let endpoint = SocketAddr::from(([198, 51, 100, 1], port));
        by(endpoint, &[&old, &new, &other, &old]);
        assert_eq!(arrived(Via::direct(endpoint)), 0);
    }
    let drops = |reason| b.shared.drops().of(reason);
    let reasons = [DropReason::Replayed, DropReason::Undecryptable, DropReason::UnknownSession];
    assert_eq!(reasons.map(drops), [200, 100, 100], "it was what it should be");
    assert_eq!(arrived(real), 2, "the path is as it was");

    // The first that comes by a new path may be a second copy: it counts once the peer asks.
    let new_path: SocketAddr = "198.51.100.9:9".parse().unwrap();
    b.peer.records().arrived.report(Via::direct(new_path));
    by(new_path, &[&datagram]);
    assert_eq!(arrived(Via::direct(new_path)), 1);
    // Or beside data that decrypts.
    let newer_path: SocketAddr = "198.51.100.10:9".parse().unwrap();
    let mut keepalive = [0; MIN_SEAL_BUFFER];
    let length = a.peer.lock().session.seal(b"", &mut keepalive, now).unwrap();
    by(newer_path, &[&keepalive[..length], &datagram]);
    assert_eq!(arrived(Via::direct(newer_path)), 2);
}

#[test]
fn what_is_said_again_by_another_way_changes_nothing() {
    let now = epoch();
    let (a, b) = (side(1, 2), side(2, 1));
    let (mut to_b, mut to_a) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
    let call = a.peer.lock().session.initiate(&mut to_b, now).unwrap();
    let shake = |side: &Side, message: &[u8]| {
        let mut out = [0; MIN_SEAL_BUFFER];
        let from = "192.0.2.9".parse().unwrap();
        side.peer.lock().session.handle_handshake(message, from, &mut out, now)
    };
    let answered =
        b.peer.lock().session.handle_handshake(&to_b[..call], a.endpoint.ip(), &mut to_a, now);
    let answer = answered.unwrap().reply.unwrap();
    let mut keepalive = [0; MIN_SEAL_BUFFER];
    let done = a.peer.lock().session.handle_handshake(
        &to_a[..answer],
        b.endpoint.ip(),
        &mut keepalive,
        now,
    );
    let keepalive = keepalive[..done.unwrap().reply.unwrap()].to_vec();
    deliver(&b, &a, &keepalive, now);

    let frame = |from: u32, datagram: &[u8]| {
        [&relay::data_header(NodeId::new(from).unwrap())[..], datagram].concat()
    };
    let by_relay = |to: &Side, framed: &[u8]| {
        let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
        let source = Source::udp(RELAY.parse().unwrap(), None);
        inbound(&to.shared, &to.shared.table(), source, framed, now, &mut tun, &mut notes);
        tun.packets().count()
    };
    let rounds: u32 = cases("OVERLAY_REPLAYED_CASES", 2_000);
    for round in 0..rounds {
        // The handshake, both halves, once more.
        if round % 100 == 0 {
            assert!(shake(&b, &to_b[..call]).is_err(), "an old initiation");
        }
        assert!(shake(&a, &to_a[..answer]).is_err(), "an old response");
        let (from, to, id) = if round % 2 == 0 { (&a, &b, 1) } else { (&b, &a, 2) };
        let sent = packet(from.addrs.v4, to.addrs.v4, &round.to_be_bytes());
        let datagram = only_datagram(&send(from, &sent, now).0);
        assert_eq!(deliver(to, from, &datagram, now).0, [sent], "the first time, round {round}");
        assert_eq!(deliver(to, from, &datagram, now).0, Vec::<Vec<u8>>::new());
        assert_eq!(by_relay(to, &frame(id, &datagram)), 0);
    }
    for side in [&a, &b] {
        assert_eq!(side.shared.drops().of(DropReason::Replayed), u64::from(rounds));
        assert!(side.peer.lock().session.is_usable(now));
    }
}
