//! Node keys are renewed under traffic, and nobody loses a packet by it.

use std::time::Duration;

use overlay::lab::nat::NatKind::{self, PortRestricted, Symmetric};

use crate::check::{check_delivery, check_keys, check_paths};
use crate::named::{outage, path_kind, running, running_with, talk};
use crate::world::World;

const MS: Duration = Duration::from_millis(1);
/// For so long an old key is accepted.
const OVERLAP: Duration = Duration::from_secs(180);
/// What is under way arrives within this, also by relay.
const UNDER_WAY: Duration = Duration::from_millis(100);
/// Straight, by relay over UDP; what holds for one pair must hold for both.
const PAIRS: [(NatKind, &str); 2] = [(PortRestricted, "direct"), (Symmetric, "relay-udp")];

fn assert_nothing_lost(world: &mut World, pings: &[u64], what: &str) {
    assert!(!pings.is_empty());
    world.run_for(UNDER_WAY);
    let lost = outage(world, pings).map(|(first, last)| last - first);
    assert_eq!(lost, None, "{what}: lost packets, over {lost:?}");
}

/// The rest of the overlap goes by under traffic; then the old keys are gone.
fn assert_old_keys_go(world: &mut World, what: &str) {
    let pings = talk(world, OVERLAP * 2, 500 * MS);
    assert_nothing_lost(world, &pings, what);
    check_keys(world);
    for host in &world.hosts {
        assert!(host.keys().previous.is_none(), "{what}: an old key is kept for ever");
    }
}

#[test]
fn no_packet_is_lost_when_one_key_or_both_are_renewed() {
    for (kind, path) in PAIRS {
        for rotating in [&[0][..], &[1], &[0, 1]] {
            let what = format!("{path}, {rotating:?}");
            let mut world = running(&[kind; 2]);
            assert_eq!(path_kind(&world, 0, 1), path);
            let mut pings = talk(&mut world, 200 * MS, 5 * MS);
            let before: Vec<_> = world.hosts.iter().map(|it| it.keys().current.public()).collect();
            for host in rotating {
                assert!(world.rotate(*host), "{what}");
            }
            pings.extend(talk(&mut world, Duration::from_secs(2), 5 * MS));
            assert_nothing_lost(&mut world, &pings, &what);
            check_keys(&world);
            for (host, before) in before.iter().enumerate() {
                let renewed = world.hosts[host].keys().current.public() != *before;
                assert_eq!(renewed, rotating.contains(&host), "{what}");
            }
            assert_eq!(path_kind(&world, 0, 1), path, "the path is the one it was");
            assert_old_keys_go(&mut world, &what);
        }
    }
}

#[test]
fn keys_that_are_renewed_a_moment_apart_cost_nothing_either() {
    for (kind, path) in PAIRS {
        for apart in [1, 9, 15, 21, 35, 60] {
            let mut world = running(&[kind; 2]);
            assert!(world.rotate(0));
            let mut pings = talk(&mut world, apart * MS, MS);
            assert!(world.rotate(1));
            pings.extend(talk(&mut world, Duration::from_secs(7), 20 * MS));
            assert_nothing_lost(&mut world, &pings, &format!("{path}, {apart} ms apart"));
            check_keys(&world);
        }
    }
}

#[test]
fn a_session_that_is_renewed_at_the_same_time_is_no_trouble() {
    let settings =
        overlay::node::NodeSettings { rekey_after: Duration::from_secs(5), ..Default::default() };
    let mut world = running_with(&[PortRestricted; 2], settings);
    for round in 0..3 {
        for host in [0, 1] {
            assert!(world.rotate(host), "round {round}");
            let pings = talk(&mut world, Duration::from_secs(200), 200 * MS);
            assert_nothing_lost(&mut world, &pings, "sessions are renewed every 5 s");
        }
    }
}

#[test]
fn a_key_is_not_renewed_twice_at_a_time_nor_without_the_server() {
    let mut world = running(&[PortRestricted; 2]);
    assert!(world.rotate(0));
    world.run_for(Duration::from_secs(10));
    assert!(!world.rotate(0), "the last time is not over");
    world.kill_server();
    world.run_for(OVERLAP);
    assert!(!world.rotate(0) && !world.rotate(1), "nobody could be told");
    world.start_server();
    world.run_for(Duration::from_secs(10));
    assert!(world.rotate(0) && world.rotate(1));
    world.run_for(Duration::from_secs(10));
    check_keys(&world);
    check_delivery(&mut world);
}

#[test]
fn a_peer_that_was_away_comes_back_with_the_old_key_and_learns_the_new_one() {
    for (kind, path) in PAIRS {
        let mut world = running(&[kind; 2]);
        world.stop_host(1);
        world.run_for(Duration::from_secs(1));
        assert!(world.rotate(0));
        world.run_for(OVERLAP * 2);
        assert!(world.hosts[0].keys().previous.is_some(), "host 1 knows no other");
        world.start_host(1);
        world.run_for(Duration::from_secs(30));
        check_paths(&world);
        check_delivery(&mut world);
        assert_old_keys_go(&mut world, path);
    }
}

#[test]
fn a_peer_without_a_server_talks_on_under_the_old_key() {
    let mut world = running(&[PortRestricted; 2]);
    world.cut_link(1);
    world.run_for(Duration::from_secs(1));
    assert!(world.rotate(0));
    // Sessions are renewed several times in this.
    let pings = talk(&mut world, Duration::from_secs(500), 500 * MS);
    assert_nothing_lost(&mut world, &pings, "cut off from the server");
    // The same with everything but what is on disk gone, and from either side.
    for host in [0, 1] {
        world.stop_host(host);
        world.start_host(host);
        world.run_for(Duration::from_secs(20));
        assert_eq!(path_kind(&world, 0, 1), "direct", "host {host} started again");
        let pings = talk(&mut world, Duration::from_secs(2), 50 * MS);
        assert_nothing_lost(&mut world, &pings, "both are there");
    }
    world.hosts[1].control_link.cut = false;
    let pings = talk(&mut world, Duration::from_secs(20), 20 * MS);
    assert_nothing_lost(&mut world, &pings, "it learns the new key");
    assert_old_keys_go(&mut world, "cut off from the server");
}

#[test]
fn a_node_that_is_killed_at_any_step_comes_back_with_a_key_that_the_server_knows() {
    for (kind, path) in PAIRS {
        for after in 0..8 {
            let mut world = running(&[kind; 2]);
            assert!(world.rotate(0));
            world.run_for(5 * MS * after);
            world.stop_host(0);
            world.run_for(Duration::from_secs(1));
            world.start_host(0);
            world.run_for(Duration::from_secs(30));
            check_keys(&world);
            check_paths(&world);
            check_delivery(&mut world);
            world.run_for(OVERLAP * 2);
            let old = world.hosts[0].keys().previous.is_some();
            assert!(!old, "{path}, killed after {} ms: the old key is kept for ever", 5 * after);
            check_delivery(&mut world);
        }
    }
}

#[test]
fn a_server_that_is_killed_at_any_step_costs_a_direct_pair_nothing() {
    for after in 0..12 {
        let mut world = running(&[PortRestricted; 2]);
        assert!(world.rotate(0));
        let mut pings = talk(&mut world, 5 * MS * after, 5 * MS);
        world.kill_server();
        pings.extend(talk(&mut world, Duration::from_secs(3), 20 * MS));
        world.start_server();
        pings.extend(talk(&mut world, Duration::from_secs(20), 20 * MS));
        assert_nothing_lost(&mut world, &pings, &format!("killed after {} ms", 5 * after));
        check_keys(&world);
    }
}

#[test]
fn a_peer_that_knows_of_one_key_only_makes_a_new_session_at_once() {
    for (kind, path) in PAIRS {
        let mut world = running(&[kind; 2]);
        world.hosts[1].forgets_old_keys = true;
        assert!(world.rotate(0));
        let pings = talk(&mut world, Duration::from_secs(3), 5 * MS);
        world.run_for(UNDER_WAY);
        let lost = outage(&world, &pings).map_or(Duration::ZERO, |(first, last)| last - first);
        println!("{path}: a peer of an older version loses packets for {lost:?}");
        assert!(lost <= Duration::from_secs(1), "{path}: packets were lost for {lost:?}");
        world.run_for(Duration::from_secs(30));
        check_paths(&world);
        check_delivery(&mut world);
    }
}

#[test]
fn in_a_network_of_eight_all_renew_their_keys_at_once() {
    let mut world = running(&[PortRestricted; 8]);
    let mut pings = talk(&mut world, 100 * MS, 10 * MS);
    for host in 0..8 {
        assert!(world.rotate(host));
    }
    for _ in 0..200 {
        for (from, to) in [(0, 1), (2, 3), (4, 5), (6, 7), (1, 6), (7, 0)] {
            pings.extend(world.ping(from, to, 100));
        }
        world.run_for(10 * MS);
    }
    assert_nothing_lost(&mut world, &pings, "eight at once");
    check_keys(&world);
    world.run_for(OVERLAP * 2);
    check_paths(&world);
    check_delivery(&mut world);
}
