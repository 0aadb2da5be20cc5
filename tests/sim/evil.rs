//! Who runs the relay is hostile: it drops, keeps back, mixes up, repeats, damages and mislabels what
//! it carries, or says that a peer is gone. And a server that names victims: what a node sends there.
//!
//! Held at every step, as everywhere here: an inner packet comes out once, unchanged, at the right
//! host (`ledger`). The control connection is sealed for the server's key and not at stake here.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use overlay::dataplane::{Target, UdpBatch};
use overlay::lab::nat::NatKind::{self, PortRestricted, Symmetric};
use overlay::node::{Netmap, Node, NodeSettings};
use overlay::types::{CandidateKind, SecretKey};
use overlay::wire::control::{NetmapUpdate, ServerMessage, Welcome, WireCandidate, WirePeer};
use rand::Rng;
use rand::rngs::StdRng;

use crate::check::{check_delivery, check_paths};
use crate::epoch;
use crate::link::Line;
use crate::named::{outage, path_kind, running_with, talk};
use crate::server::{Frame, Sent};
use crate::world::World;

const MS: Duration = Duration::from_millis(1);

/// What the relay does to what it carries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Relay {
    #[default]
    Honest,
    Drops,
    /// For so long.
    KeepsBack(Duration),
    MixesUp,
    /// At once, and again after this.
    Repeats(Duration),
    Damages,
    /// Says that it is from somebody else.
    Mislabels,
}

impl Relay {
    /// What leaves instead of this, and how much later.
    pub(crate) fn harm(self, sent: Sent, rng: &mut StdRng) -> Vec<(Duration, Sent)> {
        let mut sent = sent;
        let Some(bytes) = carried(&mut sent) else { return vec![(Duration::ZERO, sent)] };
        match self {
            Self::Honest => {}
            Self::Drops => return Vec::new(),
            Self::KeepsBack(time) => return vec![(time, sent)],
            Self::MixesUp => return vec![(rng.random_range(0..200) * MS, sent)],
            Self::Repeats(later) => {
                let again = [Duration::ZERO, later].map(|later| (later, sent.clone()));
                return [(Duration::ZERO, sent)].into_iter().chain(again).collect();
            }
            Self::Damages => {
                let at = rng.random_range(8..bytes.len());
                bytes[at] ^= 1 << rng.random_range(0..8);
            }
            Self::Mislabels => bytes[7] ^= 3,
        }
        vec![(Duration::ZERO, sent)]
    }
}

/// The relay datagram in what leaves the server.
fn carried(sent: &mut Sent) -> Option<&mut Vec<u8>> {
    let bytes = match sent {
        Sent::Udp { bytes, .. } | Sent::Link(_, Frame::Relay(bytes)) => bytes,
        Sent::Link(..) => return None,
    };
    (bytes.first() == Some(&0xB2) && bytes.len() > 8).then_some(bytes)
}

const HOSTILE: [Relay; 6] = [
    Relay::Drops,
    Relay::KeepsBack(Duration::from_secs(5)),
    Relay::MixesUp,
    Relay::Repeats(Duration::from_secs(3)),
    Relay::Damages,
    Relay::Mislabels,
];

/// Keys are renewed often, and have to be meanwhile.
fn settings() -> NodeSettings {
    NodeSettings { rekey_after: Duration::from_secs(10), ..NodeSettings::default() }
}

/// What was delivered of these, in parts of a thousand.
fn delivered(world: &World, pings: &[u64]) -> usize {
    let arrived = pings.iter().filter(|ping| world.ledger.ping(**ping).took().is_some()).count();
    arrived * 1_000 / pings.len()
}

#[test]
fn whatever_the_relay_does_a_direct_path_loses_nothing() {
    for relay in HOSTILE {
        let mut world = running_with(&[PortRestricted; 2], settings());
        world.ledger.slack = Duration::from_secs(6);
        let mut pings = talk(&mut world, Duration::from_secs(1), 20 * MS);
        world.relay = relay;
        pings.extend(talk(&mut world, Duration::from_secs(25), 20 * MS));
        for host in 0..2 {
            assert_eq!(path_kind(&world, host, 1 - host), "direct", "{relay:?}");
        }
        world.relay = Relay::Honest;
        pings.extend(talk(&mut world, Duration::from_secs(7), 20 * MS));
        world.run_for(Duration::from_secs(1));
        assert_eq!(outage(&world, &pings), None, "{relay:?}: lost on a direct path");
        check_paths(&world);
    }
}

#[test]
fn a_pair_finds_its_direct_path_whatever_the_relay_does() {
    for relay in HOSTILE {
        let mut world = World::new(7, Line::clean(10 * MS), epoch());
        world.ledger.slack = Duration::from_secs(6);
        world.relay = relay;
        for _ in 0..2 {
            let edge = world.add_edge(PortRestricted, Line::clean(10 * MS));
            world.add_host(edge, 5000, settings());
        }
        world.start_host(0);
        world.run_for(Duration::from_secs(2));
        world.start_host(1);
        let start = world.now;
        let both = |world: &World| {
            [(0, 1), (1, 0)].into_iter().all(|(from, to)| {
                let peer = world.hosts[to].id();
                peer.is_some_and(|peer| world.hosts[from].path_kind(peer, world.now) == "direct")
            })
        };
        assert!(world.run_until(Duration::from_secs(5), both), "{relay:?}: not direct in 5 s");
        println!("{relay:?}: direct after {:?}", world.now - start);
        check_delivery(&mut world);
    }
}

#[test]
fn what_a_hostile_relay_carries_comes_out_once_unchanged_or_not_at_all() {
    for (relay, least) in [
        (Relay::Drops, 0),
        (Relay::KeepsBack(Duration::from_secs(5)), 0),
        (Relay::MixesUp, 990),
        (Relay::Repeats(Duration::from_secs(3)), 1_000),
        (Relay::Damages, 0),
        (Relay::Mislabels, 0),
    ] {
        let mut world = running_with(&[Symmetric; 2], settings());
        world.ledger.slack = Duration::from_secs(6);
        talk(&mut world, Duration::from_secs(1), 20 * MS);
        world.relay = relay;
        let pings = talk(&mut world, Duration::from_secs(25), 20 * MS);
        world.run_for(Duration::from_secs(6));
        let part = delivered(&world, &pings);
        println!("{relay:?}: {part} of 1000 arrived");
        assert!(part >= least, "{relay:?}: {part} of 1000");
        if matches!(relay, Relay::Damages | Relay::Mislabels) {
            assert_eq!(part, 0, "{relay:?}: nothing of it is believed");
        }
        world.relay = Relay::Honest;
        world.run_for(Duration::from_secs(5));
        check_delivery(&mut world);
    }
}

/// The server says of every peer of a host that it is gone, whatever is true.
fn lie_that_peers_are_gone(world: &mut World, host: usize) {
    let Some(node) = world.hosts[host].node() else { return };
    let netmap = node.netmap();
    let gone = netmap.peers.iter().map(|(id, info)| WirePeer {
        id: id.number(),
        name: info.name.to_string(),
        node_key: info.node_key.0,
        ipv4: info.addrs.v4,
        ipv6: info.addrs.v6,
        online: false,
        candidates: Vec::new(),
        expires: info.expires,
    });
    let update = NetmapUpdate {
        from: Some(netmap.epoch),
        to: netmap.epoch,
        peers: gone.collect(),
        ..NetmapUpdate::default()
    };
    let message = ServerMessage { netmap: Some(update), ..ServerMessage::default() };
    let (server, now) = (world.server.control_endpoint(), world.now);
    world.hosts[host].handle_message(&message, server, now);
    world.settle(host);
}

#[test]
fn a_server_that_says_the_peer_is_gone_does_not_end_a_direct_path() {
    let mut world = running_with(&[PortRestricted; 2], settings());
    let mut pings = talk(&mut world, Duration::from_secs(1), 20 * MS);
    for round in 0..20 {
        lie_that_peers_are_gone(&mut world, round % 2);
        pings.extend(talk(&mut world, Duration::from_secs(1), 20 * MS));
    }
    world.run_for(Duration::from_secs(1));
    assert_eq!(outage(&world, &pings), None, "not one packet, over two renewals of keys");
    assert_eq!(path_kind(&world, 0, 1), "direct");
    assert_eq!(path_kind(&world, 1, 0), "direct");
}

#[test]
fn a_first_message_that_is_said_again_after_a_restart_ends_nothing() {
    // What the engine remembers of the other side's time stamps ends with the process.
    for restarted in [0, 1] {
        let mut world = running_with(&[NatKind::None; 2], settings());
        talk(&mut world, Duration::from_secs(12), 50 * MS);
        // Now the other side calls.
        world.stop_host(1);
        world.start_host(1);
        talk(&mut world, Duration::from_secs(12), 50 * MS);
        let to = restarted;
        let calls: Vec<Vec<u8>> = std::mem::take(&mut world.calls)
            .into_iter()
            .filter(|((_, called), _)| *called == to)
            .map(|(_, call)| call)
            .collect();
        world.stop_host(restarted);
        world.start_host(restarted);
        world.run_for(Duration::from_secs(3));
        let target = world.hosts[to].endpoint;
        let stranger: SocketAddr = "198.51.100.66:4000".parse().expect("an endpoint");
        let own = world.hosts[1 - to].endpoint;
        let (mut pings, mut forged) = (Vec::new(), 0);
        world.strays = 0;
        for _ in 0..100 {
            for call in &calls {
                // From anywhere, and as from where it once came from.
                for source in [stranger, own] {
                    world.forge(source, target, call.clone());
                    forged += 1;
                }
            }
            pings.extend(talk(&mut world, 50 * MS, 25 * MS));
        }
        world.run_for(Duration::from_secs(1));
        println!("{forged} forged of {} calls, {} bytes went astray", calls.len(), world.strays);
        assert!(!calls.is_empty(), "there were handshakes");
        assert_eq!(outage(&world, &pings), None, "not one packet is lost");
        assert_eq!((path_kind(&world, 0, 1), path_kind(&world, 1, 0)), ("direct", "direct"));
        // An answer is shorter than its question, and probes are a trickle.
        assert!(world.strays <= forged / 2 * 148 + 25_000, "{} bytes", world.strays);
    }
}

/// Who claims an address need not be there, and others may say the same.
#[test]
fn two_peers_at_one_address_are_probed_for_like_one() {
    let mut world = World::new(5, Line::clean(10 * MS), epoch());
    let (easy, hard) = (
        world.add_edge(PortRestricted, Line::clean(10 * MS)),
        world.add_edge(Symmetric, Line::clean(10 * MS)),
    );
    for (edge, port) in [(easy, 5000), (hard, 5000), (hard, 5001)] {
        world.add_host(edge, port, NodeSettings::default());
    }
    (0..3).for_each(|host| world.start_host(host));
    world.run_for(Duration::from_secs(1));
    [1, 2].into_iter().for_each(|host| world.set_partitioned(0, host, true));
    let probes = |world: &World| world.hosts[0].node().expect("it runs").punch_counters().probes;
    let mut sent = Vec::new();
    for seconds in [59, 240, 300] {
        world.run_for(Duration::from_secs(seconds));
        sent.push(probes(&world));
    }
    println!("probes after 1, 5 and 10 minutes: {sent:?}");
    assert_eq!(sent[0], 1_024, "there was a run");
    assert!(sent[1] <= 2 * 1_024 && sent[2] <= 3 * 1_024, "ever more rarely: {sent:?}");
    [1, 2].into_iter().for_each(|host| world.set_partitioned(0, host, false));
    let direct = |world: &World| (1..3).all(|host| path_kind(world, 0, host) == "direct");
    assert!(world.run_until(Duration::from_secs(3_000), direct), "and found in the end");
}

/// A node in a network of liars, without a world around it.
fn surrounded(peers: u32, now: Instant) -> Node {
    let key = SecretKey::from_bytes([1; 32]);
    let settings = NodeSettings::default();
    let mut node = Node::new(key, Netmap::default(), settings, [2; 32], 1, now);
    node.handle_host_endpoints(vec!["192.0.2.77:5000".parse().expect("an endpoint")], now);
    let welcome = Welcome {
        version: 1,
        network: [7; 8],
        id: 1,
        name: "node".into(),
        ipv4: "10.77.0.1".parse().expect("an address"),
        ipv6: "fd12:3456:789a::1".parse().expect("an address"),
        ipv4_prefix_len: 20,
        ipv6_prefix_len: 48,
        relay_key: [3; 32],
        relay_port: Some(41820),
        second_port: None,
        observed: None,
        server_addresses: Vec::new(),
    };
    let welcome = ServerMessage { welcome: Some(welcome), ..ServerMessage::default() };
    node.handle_message(&welcome, server(), now);
    assert!(peers <= 64, "paths to more are not made before somebody asks");
    node
}

fn server() -> SocketAddr {
    "203.0.113.1:41820".parse().expect("an endpoint")
}

/// Each of the peers claims other ports of the victim.
fn claims(peers: u32, round: u16, victim: IpAddr) -> Vec<WirePeer> {
    (2..2 + peers)
        .map(|id| {
            let low = u8::try_from(id).expect("few peers");
            let port = |n: u16| 1024 + (round * 24 + n).wrapping_mul(7).wrapping_add(id as u16);
            WirePeer {
                id,
                name: format!("liar{id}"),
                node_key: SecretKey::from_bytes([low; 32]).public().0,
                ipv4: [10, 77, 0, low].into(),
                ipv6: format!("fd12:3456:789a::{low:x}").parse().expect("an address"),
                online: true,
                candidates: (0..16)
                    .map(|n| WireCandidate {
                        kind: CandidateKind::Reflexive.code(),
                        endpoint: SocketAddr::new(victim, port(n)),
                    })
                    .collect(),
                expires: None,
            }
        })
        .collect()
}

/// Bytes, headers and all, and datagrams that leave for the victim within a minute, when so many
/// peers are said to be there, anew as often as that.
fn sent_to_a_victim(peers: u32, every: Duration) -> (usize, usize) {
    let (start, span) = (epoch(), Duration::from_secs(60));
    let victim: IpAddr = "198.51.100.7".parse().expect("an address");
    let mut node = surrounded(peers, start);
    let (mut now, mut claim_at, mut told, mut round) = (start, start, None, 0);
    let (mut bytes, mut datagrams, mut batch) = (0, 0, UdpBatch::default());
    while now < start + span {
        if now >= claim_at {
            claim_at = now + every;
            round += 1;
            let to = u64::from(round);
            let from = told.replace(to);
            let peers = claims(peers, round, victim);
            let update = NetmapUpdate { from, to, peers, ..NetmapUpdate::default() };
            let message = ServerMessage { netmap: Some(update), ..ServerMessage::default() };
            node.handle_message(&message, server(), now);
        }
        node.handle_timeout(now);
        // Openers die on the way.
        while node.poll_opener().is_some() {}
        while node.poll_event().is_some() || node.poll_message().is_some() {}
        node.take_datagrams(&mut batch);
        for (target, datagram) in batch.datagrams() {
            if let Target::Udp { remote, .. } = target
                && remote.ip() == victim
            {
                bytes += datagram.len() + 28;
                datagrams += 1;
            }
        }
        assert!(node.poll_whole_probe().is_none(), "to nobody");
        now += 10 * MS;
    }
    (bytes, datagrams)
}

#[test]
fn a_victim_that_all_peers_claim_to_be_hears_less_than_a_kilobyte_a_second_of_a_node() {
    for peers in [1, 8, 60] {
        for every in [200, 1_000, 5_000, 30_000] {
            let (bytes, datagrams) = sent_to_a_victim(peers, every * MS);
            println!("{peers} peers, every {every} ms: {bytes} bytes, {datagrams} datagrams");
            // An endpoint that is not named any more a moment later is not pinged.
            let named_for_long = every >= 5_000;
            assert!(datagrams > 0 || !named_for_long, "an address may be the right one");
            assert!(bytes <= 60_000, "{peers} peers, every {every} ms: {bytes} bytes in a minute");
        }
    }
}
