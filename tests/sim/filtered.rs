//! Paths that let questions through and lose data, with bounds in virtual time.

use std::time::Duration;

use overlay::lab::nat::NatKind::PortRestricted;

use crate::link::Line;
use crate::named::{assert_outage_below, outage, path_kind, running};
use crate::world::{Filter, World};

const MS: Duration = Duration::from_millis(1);
/// Of a datagram that holds a full packet, and of no question.
const FULL: usize = 1_000;

/// Packets of both sizes each way every 10 ms.
fn talk(world: &mut World, time: Duration) -> Vec<u64> {
    let until = world.now + time;
    let mut pings = Vec::new();
    while world.now < until {
        for (from, to) in [(0, 1), (1, 0)] {
            pings.extend([100, 1_200].into_iter().filter_map(|len| world.ping(from, to, len)));
        }
        world.run_for(10 * MS);
    }
    pings
}

fn changes(world: &World) -> Vec<String> {
    let log = world.log();
    let lines: Vec<String> =
        log.borrow().iter().filter(|it| it.contains(" -> ")).cloned().collect();
    lines
}

#[test]
fn a_path_that_loses_data_only_costs_less_than_a_second_and_comes_back_without_loss() {
    let filters = [
        ("data, both ways", Filter { data: true, ..Filter::default() }),
        ("data, one way", Filter { data: true, from: Some(0), ..Filter::default() }),
        ("full packets, both ways", Filter { min_len: FULL, ..Filter::default() }),
        ("full packets, one way", Filter { min_len: FULL, from: Some(1), ..Filter::default() }),
        ("full data", Filter { min_len: FULL, data: true, ..Filter::default() }),
        ("everything, one way", Filter { from: Some(0), ..Filter::default() }),
        ("everything", Filter::default()),
    ];
    for (what, filter) in filters {
        let mut world = running(&[PortRestricted; 2]);
        let before = talk(&mut world, Duration::from_secs(1));
        world.run_for(200 * MS);
        assert_eq!(outage(&world, &before), None, "{what}: lost without a cause");
        world.filters.push(filter);
        let pings = talk(&mut world, Duration::from_secs(6));
        world.run_for(200 * MS);
        assert_outage_below(&world, &pings, Duration::from_secs(1), what);
        let sender = filter.from.unwrap_or(0);
        assert_eq!(path_kind(&world, sender, 1 - sender), "relay-udp", "{what}");

        world.filters.clear();
        let pings = talk(&mut world, Duration::from_secs(40));
        world.run_for(200 * MS);
        assert_eq!(
            outage(&world, &pings),
            None,
            "{what}: lost on the way back: {:?}",
            changes(&world)
        );
        for (from, to) in [(0, 1), (1, 0)] {
            assert_eq!(path_kind(&world, from, to), "direct", "{what}: {:?}", changes(&world));
        }
    }
}

#[test]
fn a_path_that_never_carries_data_is_not_used_though_it_answers() {
    for filter in
        [Filter { data: true, ..Filter::default() }, Filter { min_len: FULL, ..Filter::default() }]
    {
        let mut world = World::new(7, Line::clean(10 * MS), crate::epoch());
        world.filters.push(filter);
        for _ in 0..2 {
            let edge = world.add_edge(PortRestricted, Line::clean(10 * MS));
            world.add_host(edge, 5000, overlay::node::NodeSettings::default());
        }
        for host in 0..2 {
            world.start_host(host);
        }
        world.run_for(500 * MS);
        let pings = talk(&mut world, Duration::from_secs(60));
        world.run_for(200 * MS);
        assert_eq!(outage(&world, &pings), None, "{filter:?}: {:?}", changes(&world));
        assert_eq!(path_kind(&world, 0, 1), "relay-udp", "{filter:?}");
        // To it and away from it once on each side; copies of data were enough to tell later on.
        let direct = changes(&world).iter().filter(|it| it.contains("direct")).count();
        assert!(direct <= 4, "{:?}", changes(&world));
    }
}

#[test]
fn five_percent_of_loss_is_no_reason_to_leave_a_path() {
    let mut world = running(&[PortRestricted; 2]);
    for edge in &mut world.edges {
        edge.line.loss_permille = 25;
    }
    let before = changes(&world).len();
    let pings = talk(&mut world, Duration::from_secs(120));
    let lost = pings.iter().filter(|it| world.ledger.ping(**it).took().is_none()).count();
    println!("{lost} of {} lost", pings.len());
    assert!(lost * 10 < pings.len(), "{lost} of {} lost", pings.len());
    assert_eq!(changes(&world).len(), before, "{:?}", changes(&world));
}

#[test]
fn much_loss_is() {
    let mut world = running(&[PortRestricted; 2]);
    // On the direct path only: the server's line and the way to it stay as they are.
    let lossy = |world: &mut World, on: bool| {
        world.loss_between_hosts = if on { 400 } else { 0 };
    };
    lossy(&mut world, true);
    let pings = talk(&mut world, Duration::from_secs(10));
    assert_eq!(path_kind(&world, 0, 1), "relay-udp", "{:?}", changes(&world));
    let late = &pings[pings.len() / 2..];
    assert_eq!(outage(&world, &late[..late.len() - 100]), None, "{:?}", changes(&world));
    lossy(&mut world, false);
    talk(&mut world, Duration::from_secs(40));
    assert_eq!(path_kind(&world, 0, 1), "direct", "{:?}", changes(&world));
    assert!(changes(&world).len() <= 10, "no flapping: {:?}", changes(&world));
}
