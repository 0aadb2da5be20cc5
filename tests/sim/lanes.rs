//! A second session with busy peers: made when there is something to do both ways, and no reason to lose
//! a packet, whatever becomes of either side.

use std::time::Duration;

use overlay::lab::nat::NatKind::{self, PortRestricted, Symmetric};
use overlay::node::NodeSettings;

use crate::check::{check_delivery, check_paths};
use crate::named::{assert_outage_below, outage, path_kind, running, running_with, talk};
use crate::world::World;

const MS: Duration = Duration::from_millis(1);
/// Directly and by relay.
const PAIRS: [(NatKind, &str); 2] = [(PortRestricted, "direct"), (Symmetric, "relay-udp")];

/// Any traffic is enough for a second session, and keys are renewed every five seconds.
fn settings() -> NodeSettings {
    NodeSettings {
        second_lane_from: 1,
        rekey_after: Duration::from_secs(5),
        ..NodeSettings::default()
    }
}

/// Whether each of the first two hosts has a second session with the other.
fn second_sessions(world: &World) -> [bool; 2] {
    [(0, 1), (1, 0)].map(|(host, other): (usize, usize)| {
        let peer = world.hosts[other].id().expect("it has joined");
        let node = world.hosts[host].node().expect("it runs");
        node.peer_status(peer, world.now).expect("they are peers").second_session
    })
}

#[test]
fn a_busy_pair_makes_a_second_session_and_loses_nothing_over_many_renewals() {
    for (kind, path) in PAIRS {
        let mut world = running_with(&[kind; 2], settings());
        assert_eq!(second_sessions(&world), [false; 2], "{path}: nobody has said anything yet");
        let mut pings = talk(&mut world, Duration::from_secs(1), 20 * MS);
        assert_eq!(second_sessions(&world), [true; 2], "{path}");
        pings.extend(talk(&mut world, Duration::from_secs(60), 20 * MS));
        world.run_for(Duration::from_secs(1));
        assert_eq!(outage(&world, &pings), None, "{path}: not one packet is lost");
        assert_eq!(path_kind(&world, 0, 1), path);
        let handshakes: u64 =
            world.hosts.iter().filter_map(|host| host.node()).map(|node| node.handshakes()).sum();
        assert!((20..40).contains(&handshakes), "{path}: two for each renewal, {handshakes}");
    }
}

#[test]
fn one_way_traffic_and_an_older_peer_have_one_session() {
    let mut world = running_with(&[PortRestricted; 2], settings());
    for _ in 0..100 {
        world.ping(1, 0, 200);
        world.run_for(20 * MS);
    }
    assert_eq!(second_sessions(&world), [false; 2], "one way");

    let mut world = running_with(&[PortRestricted; 2], NodeSettings::default());
    let pings = talk(&mut world, Duration::from_secs(3), 20 * MS);
    assert_eq!(second_sessions(&world), [false; 2], "too little to do");
    assert_eq!(outage(&world, &pings), None);

    // What is said of a peer in its pings is said of older ones by their silence.
    let never = NodeSettings { second_lane_from: u64::MAX, ..settings() };
    let mut world = running(&[PortRestricted]);
    for (number, settings) in [(1, never), (2, settings())] {
        let edge = world.add_edge(PortRestricted, crate::link::Line::clean(10 * MS));
        let host = world.add_host(edge, 5000, settings);
        assert_eq!(host, number);
        world.start_host(host);
    }
    world.run_for(Duration::from_secs(3));
    let mut pings = Vec::new();
    for _ in 0..300 {
        pings.extend(world.ping(1, 2, 200));
        pings.extend(world.ping(2, 1, 200));
        world.run_for(20 * MS);
    }
    let older = world.hosts[1].id().expect("it has joined");
    let status = world.hosts[2].node().and_then(|node| node.peer_status(older, world.now));
    assert!(!status.expect("they are peers").second_session);
    assert_eq!(outage(&world, &pings), None);
}

#[test]
fn a_node_that_restarts_under_traffic_is_talked_to_again_at_once() {
    for (kind, path) in PAIRS {
        for restarted in [0, 1] {
            let mut world = running_with(&[kind; 2], settings());
            talk(&mut world, Duration::from_secs(1), 20 * MS);
            assert_eq!(second_sessions(&world), [true; 2], "{path}");
            world.stop_host(restarted);
            world.start_host(restarted);
            let pings = talk(&mut world, Duration::from_secs(6), 20 * MS);
            world.run_for(Duration::from_secs(1));
            let what = format!("{path}, host {restarted} restarts");
            assert_outage_below(&world, &pings, Duration::from_millis(1_500), &what);
            assert_eq!(second_sessions(&world), [true; 2], "{what}: and has both sessions");
            check_delivery(&mut world);
        }
    }
}

#[test]
fn new_node_keys_end_the_second_session_and_no_packet_is_lost() {
    for (kind, path) in PAIRS {
        for renews in [0, 1] {
            let mut world = running_with(&[kind; 2], settings());
            talk(&mut world, Duration::from_secs(1), 20 * MS);
            assert!(world.rotate(renews), "{path}");
            let pings = talk(&mut world, Duration::from_secs(200), 50 * MS);
            world.run_for(Duration::from_secs(1));
            assert_eq!(outage(&world, &pings), None, "{path}: not one packet is lost");
            assert_eq!(second_sessions(&world), [true; 2], "{path}: under the new keys");
            check_paths(&world);
        }
    }
}
