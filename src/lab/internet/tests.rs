//! Packets from host to host, and why they do not arrive.

use std::net::SocketAddr;

use super::super::nat::{Flow, NatKind};
use super::*;

const SERVER: usize = 0;
const ALICE: usize = 1;
const BOB: usize = 2;

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn internet(kinds: [NatKind; 2], link: Link) -> Internet {
    let home = |host: u8, kind: NatKind, link: Link| {
        let public = Ipv4Addr::new(203, 0, 113, host);
        let nat = Nat::new(kind, public.into(), u64::from(host));
        let lan_address = Ipv4Addr::new(192, 168, 1, 1);
        let router = (kind != NatKind::None).then_some(Router { lan_address, nat });
        Site { public, router, link }
    };
    let server = home(1, NatKind::None, Link::default());
    let [alice, bob] = kinds;
    let far = Link { udp: UdpPolicy::Allowed, ..link };
    Internet::new(vec![server, home(10, alice, link), home(20, bob, far)], 1)
}

/// An empty UDP packet without checksum.
fn udp(src: &str, dst: &str, ttl: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, ttl, 17, 0, 0];
    packet.resize(28, 0);
    packet[25] = 8;
    let flow = Flow { protocol: Protocol::Udp, src: at(src), dst: at(dst) };
    packet::rewrite(&mut packet, flow).unwrap();
    packet
}

fn flow(packet: &[u8]) -> (String, String) {
    match packet::summarize(packet).unwrap().content {
        Content::Flow(flow) => (flow.src.to_string(), flow.dst.to_string()),
        Content::Error { quoted } => {
            (format!("about {}", quoted.src), format!("about {}", quoted.dst))
        }
    }
}

fn arrivals(internet: &mut Internet, now: Instant) -> Vec<(usize, (String, String))> {
    std::iter::from_fn(|| internet.poll_delivery(now))
        .map(|(site, packet)| (site, flow(&packet)))
        .collect()
}

fn pair(src: &str, dst: &str) -> (String, String) {
    (src.to_owned(), dst.to_owned())
}

#[test]
fn two_hosts_of_the_same_private_address_punch_through_their_nats() {
    let mut internet = internet([NatKind::PortRestricted; 2], Link::default());
    let now = crate::testing::epoch();
    internet.handle_packet(ALICE, udp("192.168.1.2:5000", "203.0.113.20:6000", 64), now);
    assert_eq!(arrivals(&mut internet, now), [], "bob's NAT does not know alice");
    internet.handle_packet(BOB, udp("192.168.1.2:6000", "203.0.113.10:5000", 64), now);
    let expected = (ALICE, pair("203.0.113.20:6000", "192.168.1.2:5000"));
    assert_eq!(arrivals(&mut internet, now), [expected], "alice has opened hers");
    internet.handle_packet(ALICE, udp("192.168.1.2:5000", "203.0.113.20:6000", 64), now);
    let expected = (BOB, pair("203.0.113.10:5000", "192.168.1.2:6000"));
    assert_eq!(arrivals(&mut internet, now), [expected], "and now both are open");
    assert_eq!(internet.drops()[&InternetDrop::Nat(NatDrop::NoMapping)], 1);
}

#[test]
fn a_host_without_nat_is_reached_and_seen_by_its_own_address() {
    let mut internet = internet([NatKind::None; 2], Link::default());
    let now = crate::testing::epoch();
    internet.handle_packet(ALICE, udp("203.0.113.10:5000", "203.0.113.20:6000", 64), now);
    let expected = (BOB, pair("203.0.113.10:5000", "203.0.113.20:6000"));
    assert_eq!(arrivals(&mut internet, now), [expected]);
}

#[test]
fn each_link_delays_and_order_is_kept() {
    let delay = Duration::from_millis(20);
    let mut internet = internet([NatKind::None; 2], Link { delay, ..Link::default() });
    let now = crate::testing::epoch();
    for port in 1..=9 {
        let dst = format!("203.0.113.20:{port}");
        internet.handle_packet(ALICE, udp("203.0.113.10:5000", &dst, 64), now);
    }
    internet.handle_packet(ALICE, udp("203.0.113.10:5000", "203.0.113.1:1", 64), now);
    assert_eq!(internet.poll_timeout(), Some(now + delay), "the server has no delay");
    assert_eq!(arrivals(&mut internet, now + delay).len(), 1);
    assert_eq!(arrivals(&mut internet, now + delay * 2 - Duration::from_nanos(1)), []);
    let ports: Vec<String> =
        arrivals(&mut internet, now + delay * 2).into_iter().map(|it| it.1.1).collect();
    let expected: Vec<String> = (1..=9).map(|port| format!("203.0.113.20:{port}")).collect();
    assert_eq!(ports, expected);
}

#[test]
fn a_packet_with_ttl_two_opens_its_nat_and_dies_before_the_other() {
    let mut internet = internet([NatKind::PortRestricted; 2], Link::default());
    let now = crate::testing::epoch();
    internet.handle_packet(ALICE, udp("192.168.1.2:5000", "203.0.113.20:6000", 2), now);
    let error = (ALICE, pair("about 192.168.1.2:5000", "about 203.0.113.20:6000"));
    assert_eq!(arrivals(&mut internet, now), [error], "the internet's router says so");
    internet.handle_packet(BOB, udp("192.168.1.2:6000", "203.0.113.10:5000", 64), now);
    assert_eq!(arrivals(&mut internet, now).len(), 1, "alice's NAT was opened");
}

#[test]
fn blocked_udp_is_dropped_in_both_directions_and_only_there() {
    let link = Link { udp: UdpPolicy::Blocked, ..Link::default() };
    let mut internet = internet([NatKind::None; 2], link);
    let now = crate::testing::epoch();
    internet.handle_packet(ALICE, udp("203.0.113.10:1", "203.0.113.1:2", 64), now);
    internet.handle_packet(SERVER, udp("203.0.113.1:2", "203.0.113.10:1", 64), now);
    assert_eq!(arrivals(&mut internet, now), []);
    assert_eq!(internet.drops()[&InternetDrop::UdpBlocked], 2);
    internet.handle_packet(BOB, udp("203.0.113.20:1", "203.0.113.1:2", 64), now);
    assert_eq!(arrivals(&mut internet, now).len(), 1, "bob's line is another one");
}

#[test]
fn loss_takes_its_part_of_the_packets() {
    let mut internet = internet([NatKind::None; 2], Link { loss: 0.25, ..Link::default() });
    let now = crate::testing::epoch();
    for _ in 0..1000 {
        internet.handle_packet(ALICE, udp("203.0.113.10:1", "203.0.113.1:2", 64), now);
    }
    let arrived = arrivals(&mut internet, now).len();
    assert!((700..800).contains(&arrived), "a quarter of 1000 is lost, {arrived} arrived");
}

#[test]
fn the_home_router_answers_for_itself_and_nobody_else_does() {
    let mut internet = internet([NatKind::FullCone; 2], Link::default());
    let now = crate::testing::epoch();
    internet.handle_packet(ALICE, udp("192.168.1.2:5000", "192.168.1.1:5351", 64), now);
    let error = (ALICE, pair("about 192.168.1.2:5000", "about 192.168.1.1:5351"));
    assert_eq!(arrivals(&mut internet, now), [error], "no port mapping service there");
    internet.handle_packet(ALICE, udp("192.168.1.2:5000", "198.51.100.1:7", 64), now);
    let error = (ALICE, pair("about 192.168.1.2:5000", "about 198.51.100.1:7"));
    assert_eq!(arrivals(&mut internet, now), [error], "no such network");
    assert_eq!(internet.drops()[&InternetDrop::NoRoute], 1);
}
