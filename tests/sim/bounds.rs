//! How soon: bounds in round trips, for lines of very different lengths. No loss.
//!
//! With `h` the way of a host to the internet and `s` the server's, one way each: a packet takes
//! D = h + s + s + h by relay and d = h + h directly. R means there and back.

use std::time::{Duration, Instant};

use overlay::lab::nat::NatKind::{self, FullCone, None, PortRestricted};
use overlay::node::NodeSettings;
use overlay::types::{Candidate, CandidateKind};

use crate::epoch;
use crate::link::Line;
use crate::routing::LAN_LATENCY;
use crate::spot::{Ipv6, Spot};
use crate::world::World;

const MS: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_secs(10);

/// One way, in milliseconds: the first host, the second host, the server.
const LINES: [(u32, u32, u32); 7] =
    [(10, 10, 10), (1, 1, 1), (5, 60, 10), (60, 5, 10), (1, 1, 40), (80, 80, 1), (30, 2, 25)];

/// Two hosts and the times of their lines.
struct Pair {
    world: World,
    relay_rtt: Duration,
    direct_rtt: Duration,
    server_rtt: [Duration; 2],
    name: String,
}

fn pair(kinds: [NatKind; 2], lines: (u32, u32, u32), eager_peers: usize) -> Pair {
    let (first, second, server) = (lines.0 * MS, lines.1 * MS, lines.2 * MS);
    let mut world = World::new(7, Line::clean(server), epoch());
    let settings = NodeSettings { eager_peers, ..NodeSettings::default() };
    for (kind, line) in kinds.into_iter().zip([first, second]) {
        let edge = world.add_edge(kind, Line::clean(line));
        world.add_host(edge, 5000, settings);
    }
    Pair {
        world,
        relay_rtt: (first + second + server * 2) * 2,
        direct_rtt: (first + second) * 2,
        server_rtt: [(first + server) * 2, (second + server) * 2],
        name: format!("{kinds:?} at {lines:?} ms"),
    }
}

impl Pair {
    /// Both run, know each other, and nothing happens any more.
    fn settled(kinds: [NatKind; 2], lines: (u32, u32, u32), eager_peers: usize) -> Self {
        let mut pair = pair(kinds, lines, eager_peers);
        pair.world.start_host(0);
        pair.world.start_host(1);
        pair.world.run_for(LIMIT);
        pair
    }

    fn is_direct(&self, from: usize) -> bool {
        let world = &self.world;
        world.hosts[1 - from]
            .id()
            .is_some_and(|peer| world.hosts[from].path_kind(peer, world.now) == "direct")
    }

    /// When each side is direct, after `start`.
    fn direct_after(&mut self, start: Instant) -> [Duration; 2] {
        let mut took = [Option::None; 2];
        let step = MS / 2;
        while took.contains(&Option::None) {
            for (side, took) in took.iter_mut().enumerate() {
                if took.is_none() && self.is_direct(side) {
                    *took = Some(self.world.now - start);
                }
            }
            self.world.run_for(step);
            assert!(self.world.now - start < LIMIT, "{}: not direct: {took:?}", self.name);
        }
        took.map(Option::unwrap_or_default)
    }

    fn delivered(&self, ping: u64) -> Duration {
        let took = self.world.ledger.ping(ping).took();
        took.unwrap_or_else(|| panic!("{}: the first packet was lost", self.name))
    }
}

#[expect(clippy::print_stdout, reason = "the figures of a run are worth reading")]
fn hold(what: &str, name: &str, took: Duration, bound: Duration) {
    println!("{what}: {name}: {took:?}, bound {bound:?}");
    assert!(took <= bound, "{what}: {name}: {took:?} is over {bound:?}");
}

#[test]
fn a_cold_pair_has_its_first_packet_by_relay_and_the_next_ones_directly() {
    for lines in LINES {
        let mut pair = Pair::settled([PortRestricted; 2], lines, 0);
        assert!(!pair.is_direct(0), "nobody has asked for a path");
        let start = pair.world.now;
        let first = pair.world.ping(0, 1, 100).expect("both run");
        let direct = pair.direct_after(start);
        pair.world.run_for(pair.relay_rtt * 2);
        let (relay, rtt) = (pair.relay_rtt, pair.direct_rtt);
        hold("cold first packet", &pair.name, pair.delivered(first), relay * 3 / 2 + 5 * MS);
        // The peer's answer to the handshake comes by the punched path as well.
        hold("the same, punched", &pair.name, pair.delivered(first), relay / 2 + rtt + 10 * MS);
        hold("called side direct", &pair.name, direct[1], relay / 2 + rtt + 10 * MS);
        // The caller's own ping is answered half a direct round trip later.
        hold("caller's path proved", &pair.name, direct[0], relay / 2 + rtt * 3 / 2 + 10 * MS);
    }
}

#[test]
fn data_goes_straight_as_soon_as_both_nats_are_open() {
    for lines in LINES {
        let mut pair = Pair::settled([PortRestricted; 2], lines, 0);
        let (start, limit) = (pair.world.now, pair.relay_rtt * 3);
        while pair.world.now - start < limit {
            pair.world.ping(0, 1, 100);
            pair.world.run_for(MS);
            // The called side answers.
            if pair.world.direct_data.contains_key(&(0, 1)) {
                pair.world.ping(1, 0, 100);
            }
        }
        let (relay, rtt) = (pair.relay_rtt, pair.direct_rtt);
        let arrived = |from: usize, to: usize| {
            pair.world.direct_data.get(&(from, to)).map_or(limit, |at| *at - start)
        };
        // What is sent at the bound has half a direct round trip to go.
        hold("first direct data", &pair.name, arrived(0, 1), relay / 2 + rtt + 10 * MS);
        hold("data both ways", &pair.name, arrived(1, 0), relay / 2 + rtt * 3 / 2 + 10 * MS);
    }
}

#[test]
fn a_warm_pair_has_its_first_packet_directly() {
    for lines in LINES {
        for kinds in [[PortRestricted; 2], [FullCone, PortRestricted], [None, PortRestricted]] {
            let mut pair = Pair::settled(kinds, lines, 64);
            assert!(pair.is_direct(0) && pair.is_direct(1), "{}: not direct", pair.name);
            let first = pair.world.ping(0, 1, 100).expect("both run");
            pair.world.run_for(pair.relay_rtt * 2);
            hold("warm first packet", &pair.name, pair.delivered(first), pair.direct_rtt / 2 + MS);
        }
    }
}

#[test]
fn who_lets_strangers_in_is_reached_directly_at_once() {
    for lines in LINES {
        for target in [None, FullCone] {
            let mut pair = Pair::settled([PortRestricted, target], lines, 0);
            let start = pair.world.now;
            pair.world.ping(0, 1, 100).expect("both run");
            let direct = pair.direct_after(start);
            // The peer need not be called, but a reflexive candidate might be behind a NAT that an
            // early ping spoils: then the peer's own call comes first.
            let bound = pair.relay_rtt / 2 + pair.direct_rtt * 3 / 2 + 10 * MS;
            let bound = if target == None { pair.direct_rtt + 10 * MS } else { bound };
            hold("open target", &pair.name, direct[0], bound);
        }
    }
}

#[test]
fn the_first_packet_goes_straight_where_nothing_is_in_the_way() {
    for (here, there, server) in LINES {
        let (here, there) = (here * MS, there * MS);
        for target in ["public address", "IPv6", "same home"] {
            let mut world = World::new(7, Line::clean(server * MS), epoch());
            let settings = NodeSettings { eager_peers: 0, ..NodeSettings::default() };
            let plain = Spot::plain(PortRestricted);
            let spot = if target == "IPv6" { Spot { ipv6: Ipv6::Open, ..plain } } else { plain };
            let edge = world.add_spot(spot, Line::clean(here));
            world.add_host(edge, 5000, settings);
            let other = match target {
                "same home" => edge,
                "IPv6" => world.add_spot(spot, Line::clean(there)),
                _ => world.add_edge(None, Line::clean(there)),
            };
            world.add_host(other, 5001, settings);
            world.start_host(0);
            world.start_host(1);
            world.run_for(LIMIT);
            let start = world.now;
            let first = world.ping(0, 1, 100).expect("both run");
            world.run_for(LIMIT);
            let took = world.ledger.ping(first).took().expect("it arrives");
            let straight = world.direct_data.get(&(0, 1)).expect("by the direct path");
            let one_way = if target == "same home" { LAN_LATENCY } else { here + there };
            // Handshake, its answer, and the packet.
            let name = format!("{target}, {here:?} and {there:?}");
            hold("cold first packet", &name, took, one_way * 3 + 2 * MS);
            hold("the same, directly", &name, *straight - start, one_way * 3 + 2 * MS);
        }
    }
}

#[test]
fn a_new_process_is_registered_within_round_trips() {
    for lines in LINES {
        let mut pair = pair([PortRestricted; 2], lines, 64);
        pair.world.start_host(1);
        pair.world.run_for(LIMIT);
        let start = pair.world.now;
        pair.world.start_host(0);
        let outer = |candidates: &[Candidate]| {
            candidates.iter().any(|candidate| candidate.kind == CandidateKind::Reflexive)
        };
        let known =
            |world: &World| world.hosts[0].node().is_some_and(|node| outer(node.announced()));
        assert!(pair.world.run_until(LIMIT, known));
        let rtt = pair.server_rtt[0];
        hold("knows its outer endpoint", &pair.name, pair.world.now - start, rtt + MS);
        assert!(pair.world.run_until(LIMIT, |world| world.hosts[0].id().is_some()));
        // TCP and the question for a token, then hello and welcome with the key exchange.
        hold("registered", &pair.name, pair.world.now - start, rtt * 2 + 20 * MS);
        let told = |world: &World| {
            let peer = world.hosts[0].id().zip(world.hosts[1].node());
            peer.and_then(|(id, node)| node.peer_info(id)).map(|info| outer(&info.candidates))
        };
        assert!(pair.world.run_until(LIMIT, |world| told(world).is_some()));
        assert_eq!(told(&pair.world), Some(true), "with the first that a peer hears of it");
    }
}

/// Packets every few milliseconds each way for a while, and how long after now the last one of
/// each direction was sent that did not arrive, or took longer than it does by relay.
fn resumes(pair: &mut Pair) -> [Duration; 2] {
    let (span, on_time) = (Duration::from_secs(1), pair.relay_rtt / 2 + 5 * MS);
    let world = &mut pair.world;
    let (start, mut sent) = (world.now, [Vec::new(), Vec::new()]);
    while world.now - start < span {
        for (from, sent) in sent.iter_mut().enumerate() {
            sent.extend(world.ping(from, 1 - from, 100).map(|ping| (ping, world.now - start)));
        }
        world.run_for(2 * MS);
    }
    world.run_for(Duration::from_secs(1));
    sent.map(|sent| {
        let took = |ping: u64| world.ledger.ping(ping).took();
        let late = |(ping, _): &&(u64, Duration)| took(*ping).is_none_or(|took| took > on_time);
        let last = sent.iter().rfind(late).map_or(Duration::ZERO, |(_, at)| *at + 2 * MS);
        assert!(sent.len() > 400 && last < span, "late or lost until {last:?}");
        last
    })
}

#[test]
fn a_node_with_a_new_address_is_heard_by_relay_after_half_a_round_trip() {
    for lines in LINES {
        for kind in [PortRestricted, NatKind::Symmetric] {
            let mut pair = Pair::settled([kind; 2], lines, 64);
            resumes(&mut pair);
            pair.world.roam(0, kind, Line::clean(lines.0 * MS));
            let [to_peer, from_peer] = resumes(&mut pair);
            let (server, relay) = (pair.server_rtt[0], pair.relay_rtt);
            hold("a new address, its own packets", &pair.name, to_peer, server / 2 + 50 * MS);
            // The peer sends to the old address until it is told, by relay.
            hold("the same, the peer's", &pair.name, from_peer, relay / 2 + 50 * MS);
        }
    }
}

#[test]
fn who_wakes_up_is_back_after_a_round_trip() {
    for lines in LINES {
        let sleeps = [20, 60, 600]
            .map(|slept| [PortRestricted, NatKind::Symmetric].map(|kind| (kind, slept)));
        for (kind, slept) in sleeps.into_iter().flatten() {
            let mut pair = Pair::settled([kind; 2], lines, 64);
            resumes(&mut pair);
            pair.world.sleep(0, Duration::from_secs(slept));
            pair.world.run_for(Duration::from_secs(slept));
            assert!(pair.world.hosts[0].asleep_until.is_none(), "awake");
            let start = pair.world.now;
            pair.world.direct_data.clear();
            let back = resumes(&mut pair);
            let name = format!("{}, {slept} s", pair.name);
            let (server, relay) = (pair.server_rtt[0] + 100 * MS, pair.relay_rtt);
            // WireGuard's keys end after three minutes: a handshake needs a round trip, and the peer
            // may use it when it has heard something under it.
            let keys = [relay + 10 * MS, relay * 3 / 2 + 10 * MS];
            let [own, peers] = if slept > 180 { keys } else { [server; 2] };
            hold("awake, its own packets", &name, back[0], own);
            hold("awake, the peer's packets", &name, back[1], peers);
            // A cold pair has data both ways after the same time.
            let both = |it: &World| [(0, 1), (1, 0)].map(|way| it.direct_data.get(&way).copied());
            let direct = both(&pair.world).map(|at| at.map_or(LIMIT, |at| at - start));
            let bound = pair.relay_rtt / 2 + pair.direct_rtt * 3 / 2 + 10 * MS;
            if kind == PortRestricted {
                hold("awake, direct data", &name, direct[0].max(direct[1]), bound);
            }
        }
    }
}

#[test]
fn two_that_call_at_the_same_time_have_keys_as_soon_as_one_alone() {
    for lines in LINES {
        for quarters in 0..2 {
            let mut pair = Pair::settled([NatKind::Symmetric; 2], lines, 0);
            let (relay, later) = (pair.relay_rtt, pair.relay_rtt * quarters / 4);
            let first = pair.world.ping(0, 1, 100).expect("both run");
            pair.world.run_for(later);
            let second = pair.world.ping(1, 0, 100).expect("both run");
            pair.world.run_for(relay * 3);
            let bound = relay * 3 / 2 + 5 * MS;
            let name = format!("{}, {later:?} apart", pair.name);
            hold("calls that cross, the first", &name, pair.delivered(first), bound);
            hold("calls that cross, the other", &name, pair.delivered(second), bound);
        }
    }
}
