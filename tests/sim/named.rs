//! Scenarios with a name and a bound in virtual time.

use std::time::{Duration, Instant};

use overlay::lab::nat::NatKind::{self, FullCone, PortRestricted, Symmetric};
use overlay::node::NodeSettings;

use crate::check::{check_delivery, check_paths};
use crate::epoch;
use crate::link::Line;
use crate::world::World;

const MS: Duration = Duration::from_millis(1);

/// Hosts behind NATs of these kinds, each on a line of `host` one way, and the server on one of
/// `server`.
fn world(kinds: &[NatKind], host: Duration, server: Duration, settings: NodeSettings) -> World {
    let mut world = World::new(7, Line::clean(server), epoch());
    for kind in kinds {
        let edge = world.add_edge(*kind, Line::clean(host));
        world.add_host(edge, 5000, settings);
    }
    world
}

/// The same with all nodes up and three seconds gone: direct is 20 ms one way, the relay 40 ms.
pub(crate) fn running(kinds: &[NatKind]) -> World {
    running_with(kinds, NodeSettings::default())
}

pub(crate) fn running_with(kinds: &[NatKind], settings: NodeSettings) -> World {
    let mut world = world(kinds, 10 * MS, 10 * MS, settings);
    for host in 0..kinds.len() {
        world.start_host(host);
    }
    world.run_for(Duration::from_secs(3));
    check_paths(&world);
    world
}

pub(crate) fn path_kind(world: &World, from: usize, to: usize) -> &'static str {
    let peer = world.hosts[to].id().expect("it has joined");
    world.hosts[from].path_kind(peer, world.now)
}

fn knows(world: &World, from: usize, to: usize) -> bool {
    let node = world.hosts[from].node();
    let id = world.hosts[to].id();
    node.zip(id).is_some_and(|(node, id)| node.peer_info(id).is_some_and(|peer| peer.online))
}

/// One packet each way every `spacing`, for `time`; the numbers of all of them.
pub(crate) fn talk(world: &mut World, time: Duration, spacing: Duration) -> Vec<u64> {
    let until = world.now + time;
    let mut pings = Vec::new();
    while world.now < until {
        pings.extend(world.ping(0, 1, 200));
        pings.extend(world.ping(1, 0, 200));
        world.run_for(spacing);
    }
    pings
}

/// When the first of the lost packets was sent, and when the last one.
pub(crate) fn outage(world: &World, pings: &[u64]) -> Option<(Instant, Instant)> {
    let lost = pings.iter().map(|number| world.ledger.ping(*number));
    let times: Vec<Instant> =
        lost.filter(|ping| ping.took().is_none()).map(|ping| ping.sent_at).collect();
    times.first().copied().zip(times.last().copied())
}

#[expect(clippy::print_stdout, reason = "the figures of a run are worth reading")]
pub(crate) fn assert_outage_below(world: &World, pings: &[u64], bound: Duration, what: &str) {
    let outage = outage(world, pings).map_or(Duration::ZERO, |(first, last)| last - first);
    println!("{what}: packets lost for {outage:?}, bound {bound:?}");
    assert!(outage <= bound, "{what}: packets were lost for {outage:?}");
}

#[test]
fn a_port_restricted_pair_talks_by_relay_at_once_and_directly_soon() {
    // Relay: 10 + 10 + 10 + 10 ms one way. Direct: 10 + 10 ms one way.
    let (relay_rtt, direct_rtt) = (80 * MS, 40 * MS);
    let mut world = world(&[PortRestricted; 2], 10 * MS, 10 * MS, NodeSettings::default());
    world.start_host(0);
    world.run_for(Duration::from_secs(2));
    world.start_host(1);
    let limit = Duration::from_secs(5);
    assert!(world.run_until(limit, |world| knows(world, 1, 0) && world.hosts[1].id().is_some()));
    let first = world.ping(1, 0, 100).expect("the second node knows the first");
    assert!(world.run_until(limit, |world| knows(world, 0, 1)));
    let met_at = world.now;
    let both =
        |world: &World| path_kind(world, 0, 1) == "direct" && path_kind(world, 1, 0) == "direct";
    assert!(world.run_until(limit, both), "the pair is punched");
    let direct = world.now - met_at;
    let bound = relay_rtt / 2 + direct_rtt + 10 * MS;
    println!("direct both ways {direct:?} after both know each other, bound {bound:?}");
    assert!(direct <= bound, "direct after {direct:?}");
    world.run_for(relay_rtt);
    let delivered = world.ledger.ping(first).took().expect("it arrived");
    println!("first packet after {delivered:?}, relay round trip {relay_rtt:?}");
    assert!(delivered <= relay_rtt * 3 / 2 + 5 * MS, "first packet after {delivered:?}");
    check_delivery(&mut world);
}

/// Two hosts start, the second one so much later, and have time to find each other.
fn meet(world: &mut World, gap: Duration) {
    world.start_host(0);
    world.run_for(gap);
    world.start_host(1);
    world.run_for(Duration::from_secs(3));
}

#[test]
fn routers_with_an_open_input_are_not_spoiled() {
    // Far from the server, near to it, and very different ways to it.
    for (first, second) in [(10, 10), (60, 5), (5, 60), (1, 1)] {
        for open in [[true, true], [true, false], [false, true]] {
            for gap in [0, 1, 7, 30, 100, 2_000] {
                let mut world = World::new(7, Line::clean(10 * MS), epoch());
                for (open, ms) in open.into_iter().zip([first, second]) {
                    let edge = world.add_edge(PortRestricted, Line::clean(ms * MS));
                    if open {
                        world.edges[edge].open_input(11);
                    }
                    world.add_host(edge, 5000, NodeSettings::default());
                }
                meet(&mut world, gap * MS);
                println!("open {open:?}, {first} and {second} ms, the second {gap} ms later");
                check_paths(&world);
            }
        }
    }
}

#[test]
fn a_nat_that_counts_does_not_spoil_an_open_input() {
    for (first, second) in [(10, 10), (60, 5), (5, 60), (1, 1)] {
        for counting in [0, 1] {
            for gap in [0, 1, 7, 30, 100, 450, 2_000] {
                let mut world = World::new(7, Line::clean(10 * MS), epoch());
                for (number, ms) in [first, second].into_iter().enumerate() {
                    let edge = world.add_edge(PortRestricted, Line::clean(ms * MS));
                    if number == counting {
                        world.edges[edge].sequential(21);
                    } else {
                        world.edges[edge].open_input(11);
                    }
                    world.add_host(edge, 5000, NodeSettings::default());
                }
                meet(&mut world, gap * MS);
                println!("{counting} counts, {first} and {second} ms, the second {gap} ms later");
                check_paths(&world);
            }
        }
    }
}

#[test]
fn the_next_ports_of_a_nat_that_counts_are_guessed() {
    // The other side guesses too, or has one port and a filter; who is first may be either.
    for (sequential, bound) in [
        ([true, false], Duration::from_secs(1)),
        ([false, true], Duration::from_secs(1)),
        ([true, true], Duration::from_secs(3)),
    ] {
        for gap in [0, 30, 200, 5_000, 40_000] {
            let mut world = World::new(7, Line::clean(10 * MS), epoch());
            for (number, sequential) in (0..).zip(sequential) {
                let edge = world.add_edge(PortRestricted, Line::clean(10 * MS));
                if sequential {
                    world.edges[edge].sequential(21 + number);
                }
                world.add_host(edge, 5000, NodeSettings::default());
            }
            world.start_host(0);
            world.run_for(gap * MS);
            world.start_host(1);
            let limit = Duration::from_secs(5);
            let met = |world: &World| {
                world.hosts[1].id().is_some() && knows(world, 1, 0) && knows(world, 0, 1)
            };
            assert!(world.run_until(limit, met));
            let met_at = world.now;
            let both = |world: &World| {
                path_kind(world, 0, 1) == "direct" && path_kind(world, 1, 0) == "direct"
            };
            let found = world.run_until(Duration::from_secs(20), both);
            let took = world.now - met_at;
            println!("sequential {sequential:?}, {gap} ms later: {found} after {took:?}");
            assert!(found && took <= bound);
            check_delivery(&mut world);
        }
    }
}

#[test]
fn a_direct_path_that_dies_under_traffic_costs_a_second() {
    let mut world = running(&[PortRestricted; 2]);
    let mut pings = talk(&mut world, Duration::from_secs(2), 20 * MS);
    world.set_partitioned(0, 1, true);
    pings.extend(talk(&mut world, Duration::from_secs(5), 20 * MS));
    world.run_for(Duration::from_secs(1));
    assert_outage_below(&world, &pings, Duration::from_secs(1), "direct path dies");
    assert_eq!(path_kind(&world, 0, 1), "relay-udp");
    world.set_partitioned(0, 1, false);
    pings = talk(&mut world, Duration::from_secs(30), 100 * MS);
    world.run_for(Duration::from_secs(1));
    assert_eq!(path_kind(&world, 0, 1), "direct", "the path is taken up again");
    assert_eq!(outage(&world, &pings), None, "the way back loses nothing");
}

/// Whether a host believes that UDP reaches the server.
fn udp_of(world: &World, host: usize) -> Option<bool> {
    world.hosts[host].node().and_then(|node| node.facts(world.now).udp)
}

#[test]
fn udp_that_is_blocked_under_traffic_costs_three_seconds() {
    let mut world = running(&[PortRestricted; 2]);
    let mut pings = talk(&mut world, Duration::from_secs(2), 20 * MS);
    world.hosts[0].udp_blocked = true;
    pings.extend(talk(&mut world, Duration::from_secs(10), 20 * MS));
    world.run_for(Duration::from_secs(1));
    assert_outage_below(&world, &pings, Duration::from_secs(3), "UDP is blocked");
    assert_eq!(udp_of(&world, 0), Some(false), "the control connection stands");
    assert_eq!(path_kind(&world, 0, 1), "relay-tcp");
}

/// One host asks, the other one only answers what arrives, for `time`; the longest time without an answer.
fn longest_silence(world: &mut World, time: Duration) -> Duration {
    let until = world.now + time;
    let (mut asked, mut answered) = (Vec::new(), Vec::new());
    let (mut last, mut longest) = (world.now, Duration::ZERO);
    while world.now < until {
        asked.extend(world.ping(0, 1, 200));
        world.run_for(20 * MS);
        let arrived = |world: &World, number: &u64| world.ledger.ping(*number).took().is_some();
        let questions = asked.extract_if(.., |number| arrived(world, number)).count();
        for _ in 0..questions {
            answered.extend(world.ping(1, 0, 200));
        }
        if answered.extract_if(.., |number| arrived(world, number)).count() > 0 {
            last = world.now;
        }
        longest = longest.max(world.now - last);
    }
    longest
}

#[test]
fn who_has_only_answers_to_send_notices_that_udp_is_blocked() {
    // With both, one notices when the other one has.
    for (blocked, bound) in [(&[0][..], 4), (&[1], 4), (&[0, 1], 6)] {
        let mut world = running(&[PortRestricted; 2]);
        assert!(longest_silence(&mut world, Duration::from_secs(2)) < 200 * MS);
        for host in blocked {
            world.hosts[*host].udp_blocked = true;
        }
        let silence = longest_silence(&mut world, Duration::from_secs(20));
        println!("UDP of {blocked:?} is blocked: {silence:?} without an answer");
        assert!(silence < Duration::from_secs(bound), "{blocked:?}: {silence:?}");
    }
}

#[test]
fn without_birthday_probing_a_symmetric_and_a_port_restricted_node_stay_on_the_relay() {
    let settings = NodeSettings { birthday_probing: false, ..NodeSettings::default() };
    let mut world = running_with(&[Symmetric, PortRestricted], settings);
    let pings = talk(&mut world, Duration::from_secs(120), 500 * MS);
    world.run_for(Duration::from_secs(1));
    assert_eq!(path_kind(&world, 0, 1), "relay-udp");
    assert_eq!(path_kind(&world, 1, 0), "relay-udp");
    assert_eq!(outage(&world, &pings), None, "the relay loses nothing");
}

#[test]
fn direct_pairs_lose_nothing_when_the_server_dies_and_renew_their_keys() {
    let settings = NodeSettings { rekey_after: Duration::from_secs(10), ..NodeSettings::default() };
    let mut world = running_with(&[PortRestricted; 2], settings);
    let mut pings = talk(&mut world, Duration::from_secs(1), 20 * MS);
    world.kill_server();
    pings.extend(talk(&mut world, Duration::from_secs(60), 50 * MS));
    world.run_for(Duration::from_secs(1));
    assert_eq!(outage(&world, &pings), None, "not one packet is lost, over six renewals of keys");
    assert_eq!(udp_of(&world, 0), None, "a server that is away says nothing of UDP");
    assert_eq!(path_kind(&world, 0, 1), "direct");
}

#[test]
fn a_server_that_restarts_interrupts_relayed_pairs_for_seconds_only() {
    let mut world = running(&[Symmetric, Symmetric]);
    let mut pings = talk(&mut world, Duration::from_secs(1), 20 * MS);
    world.kill_server();
    pings.extend(talk(&mut world, Duration::from_secs(1), 20 * MS));
    world.start_server();
    pings.extend(talk(&mut world, Duration::from_secs(15), 20 * MS));
    world.run_for(Duration::from_secs(1));
    assert_outage_below(&world, &pings, Duration::from_secs(4), "server restarts");
    check_paths(&world);
    check_delivery(&mut world);
}

#[test]
fn a_node_that_restarts_without_the_server_finds_its_peers_again() {
    for restarted in [0, 1] {
        let mut world = running(&[PortRestricted, FullCone]);
        world.kill_server();
        world.run_for(Duration::from_secs(2));
        world.stop_host(restarted);
        world.run_for(Duration::from_secs(1));
        world.start_host(restarted);
        world.run_for(Duration::from_secs(5));
        check_paths(&world);
        check_delivery(&mut world);
    }
}

#[test]
fn a_restarted_node_is_talked_to_under_new_keys_at_once() {
    // Its peers hold sessions that it has lost, whichever side made them.
    for restarted in [0, 1] {
        let mut world = running(&[PortRestricted; 2]);
        world.stop_host(restarted);
        world.start_host(restarted);
        world.run_for(Duration::from_secs(2));
        check_delivery(&mut world);
    }
}

#[test]
fn keys_due_for_renewal_without_a_path_do_not_wake_the_node() {
    let settings = NodeSettings { rekey_after: Duration::from_secs(5), ..NodeSettings::default() };
    let mut world = running_with(&[Symmetric, Symmetric], settings);
    talk(&mut world, Duration::from_secs(4), 100 * MS);
    world.kill_server();
    // The world fails on a timer that stands still.
    world.run_for(Duration::from_secs(60));
    world.start_server();
    world.run_for(Duration::from_secs(15));
    check_delivery(&mut world);
}

#[test]
fn a_node_that_roams_under_traffic_is_back_soon() {
    let mut world = running(&[PortRestricted; 2]);
    let mut pings = talk(&mut world, Duration::from_secs(1), 20 * MS);
    world.roam(0, PortRestricted, Line::clean(10 * MS));
    let from_roamed: Vec<u64> = talk(&mut world, Duration::from_secs(5), 20 * MS);
    pings.extend(&from_roamed);
    world.run_for(Duration::from_secs(1));
    check_paths(&world);
    assert_outage_below(&world, &pings, Duration::from_secs(1), "a node roams");
}
