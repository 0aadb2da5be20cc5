//! Without a server: what direct paths do when there is nothing else.

use std::time::Duration;

use overlay::lab::nat::NatKind::{None, PortRestricted};
use overlay::node::NodeSettings;

use crate::check::check_delivery;
use crate::epoch;
use crate::link::Line;
use crate::named::{path_kind, running, talk};
use crate::world::World;

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_path_that_answers_again_carries_at_once_what_has_no_other_way() {
    let mut world = running(&[PortRestricted; 2]);
    world.kill_server();
    talk(&mut world, Duration::from_secs(10), 20 * MS);
    for blackout in 0..8 {
        world.set_partitioned(0, 1, true);
        talk(&mut world, Duration::from_secs(1), 20 * MS);
        world.set_partitioned(0, 1, false);
        // Both sides ask every 200 ms or so.
        talk(&mut world, 500 * MS, 20 * MS);
        let pings = talk(&mut world, Duration::from_millis(8_500), 20 * MS);
        world.run_for(100 * MS);
        let lost = pings.iter().filter(|it| world.ledger.ping(**it).took().is_none()).count();
        assert_eq!(lost, 0, "of {} packets after blackout {blackout}", pings.len());
    }
}

fn is_direct(world: &World) -> bool {
    path_kind(world, 0, 1) == "direct" && path_kind(world, 1, 0) == "direct"
}

#[test]
fn paths_that_nobody_has_used_lately_outlive_the_server_in_a_large_network_too() {
    let mut world = World::new(7, Line::clean(10 * MS), epoch());
    for _ in 0..2 {
        let edge = world.add_edge(PortRestricted, Line::clean(10 * MS));
        let settings = NodeSettings { eager_peers: 0, ..NodeSettings::default() };
        let host = world.add_host(edge, 5000, settings);
        world.start_host(host);
    }
    world.run_for(Duration::from_secs(3));
    talk(&mut world, Duration::from_secs(5), 100 * MS);
    assert!(is_direct(&world));
    world.run_for(Duration::from_secs(240));
    world.kill_server();
    world.run_for(Duration::from_secs(600));
    assert!(is_direct(&world));
    let first = world.ping(0, 1, 100).expect("both run");
    // Keys of ten minutes ago are no good, and a handshake takes a round trip.
    world.run_for(100 * MS);
    assert!(world.ledger.ping(first).took().is_some(), "the first packet after ten minutes");
}

#[test]
fn a_peer_that_is_away_costs_a_ping_now_and_then_and_is_found_when_it_comes_back() {
    for both_go in [true, false] {
        let mut world = running(&[PortRestricted; 2]);
        world.kill_server();
        world.stop_host(1);
        if both_go {
            world.stop_host(0);
            world.run_for(Duration::from_secs(60));
            world.start_host(0);
        }
        world.run_for(Duration::from_secs(120));
        let pings = |world: &World| -> Vec<u32> {
            let peer = world.hosts[1].id().expect("it has joined");
            let node = world.hosts[0].node().expect("it runs");
            let tried = node.explain(peer, |_| true, world.now).expect("it is known").own.tried;
            tried.iter().map(|tried| tried.pings).collect()
        };
        let before = pings(&world);
        world.run_for(Duration::from_secs(3600));
        let after = pings(&world);
        let sent: Vec<u32> = after.iter().zip(&before).map(|(now, then)| now - then).collect();
        println!("pings to nobody in an hour: {sent:?}, both were away: {both_go}");
        let bounds = 3600 / 24..=3600 / 20;
        assert!(sent.iter().all(|sent| bounds.contains(sent)), "{sent:?} in an hour");
        world.start_host(1);
        assert!(world.run_until(Duration::from_secs(2), is_direct), "it asks everybody at once");
        check_delivery(&mut world);
    }
}

#[test]
fn two_that_have_lost_each_other_for_hours_meet_again() {
    for blackout in [100, 600, 3_600, 20_000] {
        let mut world = running(&[PortRestricted; 2]);
        world.kill_server();
        world.set_partitioned(0, 1, true);
        world.run_for(Duration::from_secs(blackout));
        world.set_partitioned(0, 1, false);
        assert!(world.run_until(Duration::from_secs(25), is_direct), "after {blackout} s");
        check_delivery(&mut world);
    }
}

#[test]
fn the_cable_that_is_put_in_again_starts_a_round() {
    for seconds in [40, 44, 48, 52, 300] {
        let mut world = World::new(7, Line::clean(10 * MS), epoch());
        let edge = world.add_edge(None, Line::clean(10 * MS));
        for port in [5000, 5001] {
            let host = world.add_host(edge, port, NodeSettings::default());
            world.start_host(host);
        }
        world.run_for(Duration::from_secs(3));
        world.kill_server();
        world.run_for(Duration::from_secs(10));
        assert!(is_direct(&world));
        let look = |world: &mut World, there: bool| {
            let endpoint = world.hosts[0].endpoint;
            let (now, host) = (world.now, &mut world.hosts[0]);
            let node = host.node_mut().expect("it runs");
            node.handle_host_endpoints(there.then_some(endpoint).into_iter().collect(), now);
            host.refresh();
            world.settle(0);
        };
        world.set_partitioned(0, 1, true);
        look(&mut world, false);
        world.run_for(Duration::from_secs(seconds));
        world.set_partitioned(0, 1, false);
        look(&mut world, true);
        assert!(world.run_until(100 * MS, is_direct), "after {seconds} s without a cable");
    }
}
