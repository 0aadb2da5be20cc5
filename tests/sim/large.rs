//! Networks of more nodes than everybody is told of. No loss.

use std::time::Duration;

use overlay::lab::nat::NatKind::PortRestricted;
use overlay::node::NodeSettings;

use crate::check::check_delivery;
use crate::epoch;
use crate::link::Line;
use crate::named::path_kind;
use crate::world::World;

const MS: Duration = Duration::from_millis(1);
const LINE: Duration = Duration::from_millis(10);
/// A host to another by the relay and back.
const RELAY_RTT: Duration = Duration::from_millis(80);
/// A host to the server and back.
const SERVER_RTT: Duration = Duration::from_millis(40);

/// `count` hosts, each behind a NAT of its own, in a network that is large with one node in it.
fn large(count: usize) -> World {
    let mut world = World::new(7, Line::clean(LINE), epoch());
    world.server.set_whole_netmap_up_to(0, epoch());
    for _ in 0..count {
        let edge = world.add_edge(PortRestricted, Line::clean(LINE));
        world.add_host(edge, 5000, NodeSettings::default());
    }
    for host in 0..count {
        world.start_host(host);
    }
    world.run_for(Duration::from_secs(3));
    world
}

fn knows(world: &World, from: usize) -> Vec<usize> {
    let known = world.hosts[from].node().expect("it runs").netmap().peers.keys();
    let host_of = |id| world.hosts.iter().position(|host| host.id() == Some(id));
    known.filter_map(|id| host_of(*id)).collect()
}

fn took(world: &World, ping: u64) -> Duration {
    world.ledger.ping(ping).took().expect("it arrived")
}

#[test]
fn a_first_packet_waits_for_its_peer_and_both_become_direct_and_nobody_else_is_told() {
    let mut world = large(6);
    for host in 0..6 {
        assert!(knows(&world, host).is_empty(), "nobody has asked for anybody");
        let size = world.hosts[host].node().and_then(|node| node.network_size());
        assert!(size.is_some(), "it knows that there are others");
    }
    let pings = [(0, 1), (0, 2), (3, 0)].map(|(from, to)| world.ping(from, to, 100));
    world.run_for(Duration::from_secs(1));
    for ping in pings.into_iter().flatten() {
        let bound = SERVER_RTT + RELAY_RTT * 3 / 2 + 5 * MS;
        assert!(took(&world, ping) <= bound, "{:?}", took(&world, ping));
    }
    world.run_for(Duration::from_secs(2));
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (0, 3), (3, 0)] {
        assert_eq!(path_kind(&world, from, to), "direct", "{from} to {to}");
    }
    assert_eq!(knows(&world, 0), [1, 2, 3]);
    assert_eq!((knows(&world, 1), knows(&world, 4), knows(&world, 5)), (vec![0], vec![], vec![]));
    assert_eq!(world.hosts.iter().map(|host| host.refused).sum::<usize>(), 0, "no false alarm");
    check_delivery(&mut world);
}

#[test]
fn a_pair_that_is_silent_for_long_is_forgotten_and_found_again() {
    let mut world = large(3);
    world.ping(0, 1, 100);
    world.run_for(Duration::from_secs(10 * 60));
    assert_eq!((knows(&world, 0), knows(&world, 1)), (vec![1], vec![0]));
    world.run_for(Duration::from_secs(8 * 60));
    assert_eq!((knows(&world, 0), knows(&world, 1)), (vec![], vec![]));
    let again = world.ping(1, 0, 100).expect("both run");
    world.run_for(Duration::from_secs(1));
    assert!(took(&world, again) <= SERVER_RTT + RELAY_RTT * 3 / 2 + 5 * MS);
    check_delivery(&mut world);
}

#[test]
fn a_pair_in_use_outlives_a_restart_of_the_server_and_hears_of_a_move_after_it() {
    let mut world = large(4);
    world.ping(0, 1, 100);
    world.run_for(Duration::from_secs(3));
    world.kill_server();
    let without = world.ping(0, 1, 100).expect("both run");
    world.run_for(Duration::from_secs(1));
    assert!(took(&world, without) < RELAY_RTT, "directly");
    world.start_server();
    world.run_for(Duration::from_secs(30));
    assert_eq!((knows(&world, 0), knows(&world, 1)), (vec![1], vec![0]));
    world.roam(1, PortRestricted, Line::clean(LINE));
    world.run_for(Duration::from_secs(5));
    let after = world.ping(0, 1, 100).expect("both run");
    world.run_for(Duration::from_secs(1));
    assert!(took(&world, after) < RELAY_RTT, "directly, to another place");
    assert_eq!(path_kind(&world, 0, 1), "direct");
}

#[test]
fn packets_to_an_address_that_nobody_has_and_without_a_server_are_answered_within_a_second() {
    let mut world = large(2);
    let gone = world.hosts[1].address().expect("it has joined");
    assert!(world.remove(1), "it is a member");
    world.run_for(Duration::from_secs(1));
    let send = |world: &mut World| {
        let from = world.hosts[0].address().expect("it has joined");
        let (_, packet) = world.ledger.send((0, from), (1, gone), 100, world.now);
        world.hosts[0].handle_packet(packet);
        world.settle(0);
    };
    send(&mut world);
    world.run_for(SERVER_RTT + 5 * MS);
    assert_eq!(world.hosts[0].refused, 1, "as soon as the server has said so");
    send(&mut world);
    world.run_for(MS);
    assert_eq!(world.hosts[0].refused, 2, "it is remembered for a moment");
    world.kill_server();
    world.run_for(Duration::from_secs(5));
    send(&mut world);
    world.run_for(Duration::from_millis(800));
    assert_eq!(world.hosts[0].refused, 2, "the server may come back");
    world.run_for(Duration::from_millis(200));
    assert_eq!(world.hosts[0].refused, 3);
}
