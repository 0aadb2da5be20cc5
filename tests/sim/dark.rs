//! Hosts with two uplinks: the internet behind one goes dark while its link and its route stay, or the
//! route goes.

use std::time::{Duration, Instant};

use overlay::lab::nat::NatKind::{self, FullCone, PortRestricted, Symmetric};
use overlay::node::NodeSettings;

use crate::check::{check_delivery, check_paths};
use crate::epoch;
use crate::link::Line;
use crate::named::{assert_outage_below, outage, path_kind, talk};
use crate::spot::Spot;
use crate::world::World;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// A direct path that dies may cost so much.
const DIRECT_OUTAGE: Duration = Duration::from_secs(1);
/// The relay has to be silent for a while, and nobody has asked it for up to a second.
const RELAY_OUTAGE: Duration = Duration::from_millis(1_700);

/// Two hosts, 20 ms from the internet; each with a second uplink if it has a second kind, of another
/// length.
fn switched_off(kinds: [(NatKind, Option<NatKind>); 2], second: Duration) -> World {
    let mut world = World::new(7, Line::clean(10 * MS), epoch());
    for (first, further) in kinds {
        let edge = world.add_edge(first, Line::clean(20 * MS));
        let host = world.add_host(edge, 5000, NodeSettings::default());
        if let Some(kind) = further {
            world.add_second(host, Spot::plain(kind), Line::clean(second));
        }
    }
    world
}

/// The same with both nodes up, and what they need to talk found.
fn running(kinds: [(NatKind, Option<NatKind>); 2], second: Duration) -> World {
    let mut world = switched_off(kinds, second);
    for host in 0..2 {
        world.start_host(host);
    }
    world.run_for(3 * SECOND);
    talk(&mut world, 3 * SECOND, 20 * MS);
    check_paths(&world);
    assert_eq!([0, 1].map(|host| by(&world, host)), [(0, 0); 2]);
    world
}

/// By which uplink of its own data leaves a host for the other, and by which of the other's it gets
/// there; the relay's own uplink counts where it goes by that.
fn by(world: &World, from: usize) -> (usize, usize) {
    let to = 1 - from;
    let node = world.hosts[from].node().expect("it runs");
    let peer = world.hosts[to].id().expect("it has joined");
    let status = node.peer_status(peer, world.now).expect("they are peers");
    let there = status.remote.map_or(0, |remote| {
        let further = &world.edges[world.hosts[to].edge_of(1)];
        usize::from(world.hosts[to].has_second() && further.external == remote.ip())
    });
    (usize::from(status.uplink.is_some()), there)
}

/// The uplink that the relay and the control connection of a host go by.
fn to_server(world: &World, host: usize) -> (usize, usize) {
    let host = &world.hosts[host];
    let relay = host.node().expect("it runs").relay_uplink();
    let link = &host.control_link;
    let connection = link.connection().expect("it is connected");
    (usize::from(relay.is_some()), link.way(connection).interface)
}

/// How often the path between the two has changed, as both see it, and the relay's uplink.
fn changes(world: &World) -> usize {
    world.hosts.iter().map(|host| host.changes).sum()
}

/// A packet each way every 20 ms until this is so; how long that took, and the packets.
fn talk_until(
    world: &mut World,
    limit: Duration,
    done: impl Fn(&World) -> bool,
) -> (Duration, Vec<u64>) {
    let (start, mut pings): (Instant, Vec<u64>) = (world.now, Vec::new());
    while !done(world) {
        assert!(world.now - start < limit, "not within {limit:?}");
        pings.extend(talk(world, 20 * MS, 20 * MS));
    }
    (world.now - start, pings)
}

fn assert_no_loss(world: &mut World, pings: &[u64], what: &str) {
    world.run_for(SECOND);
    assert_eq!(outage(world, pings), None, "{what}");
}

#[test]
fn a_dark_uplink_costs_a_direct_pair_less_than_a_second_and_its_return_nothing() {
    for second in [2 * MS, 60 * MS] {
        let kinds = [(PortRestricted, Some(PortRestricted)), (PortRestricted, None)];
        let mut world = running(kinds, second);
        let mut pings = talk(&mut world, 30 * SECOND, 20 * MS);
        assert_no_loss(&mut world, &pings, "a faster further uplink moves nobody");
        assert_eq!((by(&world, 0), to_server(&world, 0)), ((0, 0), (0, 0)));

        pings = talk(&mut world, SECOND, 20 * MS);
        world.set_dark(0, 0, true);
        pings.extend(talk(&mut world, 10 * SECOND, 20 * MS));
        world.run_for(SECOND);
        assert_outage_below(&world, &pings, DIRECT_OUTAGE, "a dark uplink, direct");
        assert_eq!((by(&world, 0), by(&world, 1)), ((1, 0), (0, 1)), "directly by the other");
        assert_eq!(to_server(&world, 0), (1, 1));
        pings = talk(&mut world, 60 * SECOND, 20 * MS);
        assert_no_loss(&mut world, &pings, "the further uplink is as good");

        world.set_dark(0, 0, false);
        let back = |world: &World| {
            by(world, 0) == (0, 0) && by(world, 1) == (0, 0) && to_server(world, 0) == (0, 0)
        };
        let (took, mut pings) = talk_until(&mut world, 40 * SECOND, back);
        println!("by the preferred uplink again after {took:?}");
        pings.extend(talk(&mut world, 10 * SECOND, 20 * MS));
        assert_no_loss(&mut world, &pings, "the way back");
        check_paths(&world);
    }
}

#[test]
fn a_dark_uplink_costs_a_relayed_pair_two_seconds_and_its_return_what_is_overtaken() {
    for second in [2 * MS, 60 * MS] {
        let mut world = running([(Symmetric, Some(Symmetric)), (Symmetric, None)], second);
        let mut pings = talk(&mut world, SECOND, 20 * MS);
        world.set_dark(0, 0, true);
        pings.extend(talk(&mut world, 10 * SECOND, 20 * MS));
        world.run_for(SECOND);
        assert_outage_below(&world, &pings, RELAY_OUTAGE, "a dark uplink, relayed");
        assert_eq!(path_kind(&world, 0, 1), "relay-udp");
        assert_eq!(to_server(&world, 0), (1, 1));
        pings = talk(&mut world, 60 * SECOND, 20 * MS);
        assert_no_loss(&mut world, &pings, "the further uplink is as good");

        world.set_dark(0, 0, false);
        let (took, mut pings) =
            talk_until(&mut world, 10 * SECOND, |world| to_server(world, 0) == (0, 0));
        println!("the relay by the preferred uplink again after {took:?}");
        pings.extend(talk(&mut world, 10 * SECOND, 20 * MS));
        world.run_for(SECOND);
        // What is under way by a slower uplink is overtaken by the bind, and comes from nowhere then.
        let overtaken = second.saturating_sub(20 * MS);
        assert_outage_below(&world, &pings, overtaken, "the way back");
    }
}

#[test]
fn a_pair_that_only_the_preferred_uplink_joins_is_direct_again_when_that_is_back() {
    for talks in [true, false] {
        let kinds = [(PortRestricted, Some(Symmetric)), (PortRestricted, None)];
        let mut world = running(kinds, 30 * MS);
        world.set_dark(0, 0, true);
        let pings = talk(&mut world, 90 * SECOND, 20 * MS);
        world.run_for(SECOND);
        assert_outage_below(&world, &pings, 2 * SECOND, "only the relay is left");
        assert_eq!((path_kind(&world, 0, 1), to_server(&world, 0)), ("relay-udp", (1, 1)));
        world.set_dark(0, 0, false);
        if talks {
            let direct = |world: &World| path_kind(world, 0, 1) == "direct";
            let (took, pings) = talk_until(&mut world, 8 * SECOND, direct);
            println!("direct again after {took:?}");
            assert_no_loss(&mut world, &pings, "the way back");
        } else {
            world.run_for(20 * SECOND);
        }
        check_paths(&world);
    }
}

#[test]
fn both_sides_have_two_uplinks_and_any_of_them_may_go_dark() {
    let both = (PortRestricted, Some(PortRestricted));
    for dark in [
        vec![(0, 0)],
        vec![(1, 0)],
        vec![(0, 0), (1, 0)],
        vec![(0, 1), (1, 0)],
        vec![(0, 1), (1, 1)],
    ] {
        let mut world = running([both; 2], 30 * MS);
        let mut pings = talk(&mut world, SECOND, 20 * MS);
        for (host, interface) in &dark {
            world.set_dark(*host, *interface, true);
        }
        pings.extend(talk(&mut world, 10 * SECOND, 20 * MS));
        world.run_for(SECOND);
        let what = format!("dark: {dark:?}");
        assert_outage_below(&world, &pings, DIRECT_OUTAGE, &what);
        let live = [0, 1].map(|host| usize::from(dark.contains(&(host, 0))));
        assert_eq!(by(&world, 0), (live[0], live[1]), "{what}");
        assert_eq!(by(&world, 1), (live[1], live[0]), "{what}");
        check_paths(&world);
        for (host, interface) in &dark {
            world.set_dark(*host, *interface, false);
        }
        let back = |world: &World| by(world, 0) == (0, 0) && by(world, 1) == (0, 0);
        let (_, pings) = talk_until(&mut world, 40 * SECOND, back);
        assert_no_loss(&mut world, &pings, &what);
        check_delivery(&mut world);
    }
}

#[test]
fn an_uplink_that_comes_and_goes_moves_traffic_rarely() {
    for (first, second, kind) in
        [(PortRestricted, PortRestricted, "direct"), (Symmetric, Symmetric, "relay-udp")]
    {
        let mut world = running([(first, Some(second)), (first, None)], 30 * MS);
        let before = changes(&world);
        let mut lost = Vec::new();
        // Ten minutes: dark for seven seconds, lit for fourteen.
        for _ in 0..30 {
            world.set_dark(0, 0, true);
            let mut pings = talk(&mut world, 7 * SECOND, 50 * MS);
            world.set_dark(0, 0, false);
            pings.extend(talk(&mut world, 13 * SECOND, 50 * MS));
            world.run_for(SECOND);
            let (first, last) = outage(&world, &pings).unwrap_or((world.now, world.now));
            lost.push(last - first);
        }
        let moves = changes(&world) - before;
        let interrupted = lost.iter().filter(|lost| !lost.is_zero()).count();
        println!(
            "{kind}: {moves} changes of path, {interrupted} of 30 times interrupted: {lost:?}"
        );
        assert!(lost.iter().all(|lost| *lost <= RELAY_OUTAGE), "{kind}: {lost:?}");
        assert!(interrupted <= 15, "{kind}: interrupted {interrupted} times: {lost:?}");
        assert!(moves <= 65, "{kind}: {moves} changes of path");
    }
}

#[test]
fn the_further_uplink_may_go_dark_unnoticed() {
    for kind in [PortRestricted, Symmetric] {
        let mut world = running([(kind, Some(kind)), (kind, None)], 2 * MS);
        let before = changes(&world);
        let mut pings = talk(&mut world, SECOND, 20 * MS);
        world.set_dark(0, 1, true);
        pings.extend(talk(&mut world, 60 * SECOND, 20 * MS));
        world.set_dark(0, 1, false);
        pings.extend(talk(&mut world, 30 * SECOND, 20 * MS));
        assert_no_loss(&mut world, &pings, "nothing goes by it");
        assert_eq!(changes(&world), before);
    }
}

#[test]
fn routes_come_and_go_under_traffic() {
    let kinds = [(PortRestricted, Some(PortRestricted)), (PortRestricted, None)];
    let mut world = running(kinds, 30 * MS);
    // Nobody used the further one until now.
    let mut pings = talk(&mut world, SECOND, 20 * MS);
    world.set_route(0, 1, false);
    pings.extend(talk(&mut world, 10 * SECOND, 20 * MS));
    world.set_route(0, 1, true);
    pings.extend(talk(&mut world, 10 * SECOND, 20 * MS));
    assert_no_loss(&mut world, &pings, "the further uplink goes and comes");

    let mut pings = talk(&mut world, SECOND, 20 * MS);
    world.set_route(0, 0, false);
    pings.extend(talk(&mut world, 30 * SECOND, 20 * MS));
    world.run_for(SECOND);
    // The peer sends to where we were until something of ours comes by another way.
    assert_outage_below(&world, &pings, 200 * MS, "the preferred route goes");
    check_paths(&world);
    assert_eq!((by(&world, 0), to_server(&world, 0)), ((0, 0), (0, 1)), "it is the only one");

    let mut pings = talk(&mut world, SECOND, 20 * MS);
    world.set_route(0, 0, true);
    pings.extend(talk(&mut world, 30 * SECOND, 20 * MS));
    world.run_for(SECOND);
    assert_outage_below(&world, &pings, 200 * MS, "the preferred route comes back");
    check_paths(&world);
    assert_eq!((by(&world, 0), by(&world, 1)), ((0, 0), (0, 0)));
    assert_eq!(to_server(&world, 0), (0, 0));
}

#[test]
fn a_route_that_follows_the_dark_leaves_what_works() {
    let kinds = [(PortRestricted, Some(PortRestricted)), (PortRestricted, None)];
    let mut world = running(kinds, 30 * MS);
    world.set_dark(0, 0, true);
    talk(&mut world, 10 * SECOND, 20 * MS);
    assert_eq!((by(&world, 0), to_server(&world, 0)), ((1, 0), (1, 1)));
    let mut pings = talk(&mut world, SECOND, 20 * MS);
    world.set_route(0, 0, false);
    pings.extend(talk(&mut world, 30 * SECOND, 20 * MS));
    world.run_for(SECOND);
    assert_outage_below(&world, &pings, SECOND / 2, "the dark one loses its route");
    assert_eq!((by(&world, 0), to_server(&world, 0)), ((0, 0), (0, 1)), "it is the only one");
    // The dark one is preferred again, and has to be found out again.
    let mut pings = talk(&mut world, SECOND, 20 * MS);
    world.set_route(0, 0, true);
    pings.extend(talk(&mut world, 30 * SECOND, 20 * MS));
    world.run_for(SECOND);
    assert_outage_below(&world, &pings, RELAY_OUTAGE, "a dark uplink becomes the preferred one");
    assert_eq!((by(&world, 0), to_server(&world, 0)), ((1, 0), (1, 1)));
}

#[test]
fn a_node_starts_behind_a_dark_uplink() {
    for kind in [PortRestricted, FullCone, Symmetric] {
        let mut world = switched_off([(kind, Some(kind)), (kind, None)], 30 * MS);
        world.start_host(1);
        world.run_for(SECOND);
        world.set_dark(0, 0, true);
        world.start_host(0);
        let met = |world: &World| {
            world.hosts[0].id().is_some() && world.hosts[0].control_link.connection().is_some()
        };
        assert!(world.run_until(2 * SECOND, met), "a further uplink is tried after a second");
        talk(&mut world, 3 * SECOND, 20 * MS);
        let pings = talk(&mut world, 10 * SECOND, 20 * MS);
        assert_no_loss(&mut world, &pings, "three seconds later all works");
        assert_eq!(to_server(&world, 0), (1, 1));
        check_paths(&world);
        world.set_dark(0, 0, false);
        let back = |world: &World| {
            (by(world, 0), by(world, 1), to_server(world, 0)) == ((0, 0), (0, 0), (0, 0))
        };
        let (took, pings) = talk_until(&mut world, 40 * SECOND, back);
        println!("{kind}: the preferred uplink after {took:?}");
        assert_no_loss(&mut world, &pings, "the way there");
    }
}

#[test]
fn a_server_that_restarts_while_an_uplink_is_dark_is_found_by_the_other() {
    for kind in [PortRestricted, Symmetric] {
        for dark_first in [true, false] {
            let mut world = running([(kind, Some(kind)), (kind, None)], 30 * MS);
            if dark_first {
                world.set_dark(0, 0, true);
                talk(&mut world, 10 * SECOND, 20 * MS);
            }
            world.kill_server();
            world.run_for(SECOND);
            world.set_dark(0, 0, true);
            world.run_for(SECOND);
            world.start_server();
            world.run_for(20 * SECOND);
            let pings = talk(&mut world, 5 * SECOND, 20 * MS);
            assert_no_loss(&mut world, &pings, "twenty seconds later all works");
            assert_eq!(to_server(&world, 0), (1, 1));
            check_paths(&world);
        }
    }
}

#[test]
fn an_idle_uplink_costs_a_packet_in_twenty_seconds() {
    let sent = |world: &World| world.hosts[0].meter.datagrams;
    let hour = |further: Option<NatKind>| {
        let mut world = switched_off([(PortRestricted, further), (PortRestricted, None)], 30 * MS);
        world.start_host(0);
        world.start_host(1);
        world.run_for(600 * SECOND);
        let before = sent(&world);
        world.run_for(3_600 * SECOND);
        sent(&world) - before
    };
    let (one, two) = (hour(None), hour(Some(PortRestricted)));
    println!("datagrams of an idle hour: {one} with one uplink, {two} with two");
    assert!(two - one <= 3_600 / 20 + 5, "{one} with one uplink, {two} with two");
}
