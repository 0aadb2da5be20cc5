//! Hard NATs: what is found by chance, how much that costs, and what is left alone.

use std::time::Duration;

use overlay::lab::nat::NatKind::{self, PortRestricted, Symmetric};
use overlay::node::{NodeSettings, PunchCounters};

use crate::epoch;
use crate::link::Line;
use crate::world::World;

const MS: Duration = Duration::from_millis(1);

/// Two hosts that have just been started, on lines of 10 ms.
fn started(kinds: [NatKind; 2], seed: u64, settings: NodeSettings) -> World {
    let mut world = World::new(seed, Line::clean(10 * MS), epoch());
    for kind in kinds {
        let edge = world.add_edge(kind, Line::clean(10 * MS));
        world.add_host(edge, 5000, settings);
    }
    for host in 0..2 {
        world.start_host(host);
    }
    world
}

fn is_direct(world: &World) -> bool {
    [(0, 1), (1, 0)].into_iter().all(|(from, to)| {
        let peer = world.hosts[to].id();
        peer.is_some_and(|peer| world.hosts[from].path_kind(peer, world.now) == "direct")
    })
}

fn counters(world: &World, host: usize) -> PunchCounters {
    world.hosts[host].node().expect("it runs").punch_counters()
}

fn extra_sockets(world: &World, host: usize) -> usize {
    world.hosts[host].node().expect("it runs").extra_sockets()
}

#[test]
fn a_symmetric_and_a_port_restricted_node_find_each_other_by_chance() {
    let mut late = 0;
    for seed in 0..20 {
        let kinds = [Symmetric, PortRestricted];
        let kinds = if seed % 2 == 0 { kinds } else { [kinds[1], kinds[0]] };
        let (hard, easy) = if seed % 2 == 0 { (0, 1) } else { (1, 0) };
        let mut world = started(kinds, seed, NodeSettings::default());
        let start = world.now;
        let found = world.run_until(Duration::from_secs(12), is_direct);
        let took = world.now - start;
        let (open, probed) = (counters(&world, hard), counters(&world, easy));
        println!("{kinds:?}: {found} after {took:?}, {open:?}, {probed:?}");
        late += usize::from(!found);
        assert!(took > Duration::from_secs(3), "the cheap ways come first");
        assert!(open.sockets <= 256 && open.probes == 0);
        assert!(probed.probes <= 1024 && probed.sockets == 0);
        if !found {
            continue;
        }
        world.run_for(Duration::from_secs(10));
        assert!(is_direct(&world), "and stay");
        assert_eq!(counters(&world, easy).probes, probed.probes, "given up on success");
        assert!((1..=2).contains(&extra_sockets(&world, hard)), "the winner is left");
        // The path by the extra socket is kept alive like any other, and carries data.
        world.run_for(Duration::from_secs(120));
        assert!(is_direct(&world), "for minutes");
        let ping = world.ping(easy, hard, 1_000).expect("both run");
        world.run_for(Duration::from_secs(1));
        assert_eq!(world.ledger.ping(ping).took(), Some(20 * MS), "straight");
    }
    assert!(late <= 2, "{late} of 20 were not direct within 12 s");
}

#[test]
fn roaming_closes_the_sockets_of_the_old_place() {
    let mut world = started([Symmetric, PortRestricted], 3, NodeSettings::default());
    assert!(world.run_until(Duration::from_secs(14), is_direct));
    world.roam(0, NatKind::FullCone, Line::clean(10 * MS));
    world.run_for(Duration::from_secs(3));
    assert_eq!(extra_sockets(&world, 0), 0);
    assert!(is_direct(&world));
}

#[test]
fn a_run_that_finds_nothing_is_not_repeated_for_a_minute() {
    let mut world = started([Symmetric, PortRestricted], 5, NodeSettings::default());
    world.run_for(Duration::from_secs(1));
    world.set_partitioned(0, 1, true);
    world.run_for(Duration::from_secs(59));
    assert_eq!(counters(&world, 1).probes, 1024);
    assert_eq!((extra_sockets(&world, 0), extra_sockets(&world, 1)), (0, 0));
    world.run_for(Duration::from_secs(60));
    assert_eq!(counters(&world, 1).probes, 2 * 1024, "one more");
    world.run_for(Duration::from_secs(240));
    assert_eq!(counters(&world, 1).probes, 2 * 1024, "and then five minutes nothing");
    world.set_partitioned(0, 1, false);
    assert!(world.run_until(Duration::from_secs(120), is_direct), "the next one finds it");
}

#[test]
fn two_symmetric_nodes_are_left_to_the_relay() {
    let mut world = started([Symmetric, Symmetric], 7, NodeSettings::default());
    world.run_for(Duration::from_secs(3));
    let before: Vec<u64> = world.edges.iter().map(crate::edge::Edge::forwarded).collect();
    world.run_for(Duration::from_secs(60));
    for (host, before) in before.into_iter().enumerate() {
        assert_eq!(counters(&world, host), PunchCounters::default());
        assert!(world.edges[host].mappings(world.now) < 40, "few mappings");
        assert!(world.edges[host].forwarded() - before < 200, "and few datagrams in a minute");
    }
    assert!(!is_direct(&world));
}

#[test]
fn one_run_at_a_time_and_never_more_entries_than_one_leaves() {
    let mut direct = Vec::new();
    for seed in 7..11 {
        let mut world = World::new(seed, Line::clean(10 * MS), epoch());
        for kind in [PortRestricted, Symmetric, Symmetric, Symmetric, Symmetric, Symmetric] {
            let edge = world.add_edge(kind, Line::clean(10 * MS));
            world.add_host(edge, 5000, NodeSettings::default());
        }
        for host in 0..6 {
            world.start_host(host);
        }
        let mut probes = vec![0];
        for second in 1..=120 {
            world.run_for(Duration::from_secs(1));
            probes.push(counters(&world, 0).probes);
            let window = probes[second] - probes[second.saturating_sub(30)];
            assert!(window <= 1024 + 100, "{window} probes in 30 s");
            assert!(probes[second] - probes[second - 1] <= 101, "a hundred a second");
            assert!(extra_sockets(&world, 0) == 0);
        }
        let found = |world: &World| {
            let kind = |to: usize| {
                let peer = world.hosts[to].id().expect("it has joined");
                world.hosts[0].path_kind(peer, world.now)
            };
            (1..6).filter(|to| kind(*to) == "direct").count()
        };
        direct.push(found(&world));
        // A run finds nothing now and then, and is not repeated for a minute.
        let all = world.run_until(Duration::from_secs(60), |world| found(world) == 5);
        assert!(all, "seed {seed}: {} of 5 have had their turn", found(&world));
    }
    let soon: usize = direct.iter().sum();
    assert!(soon >= 4 * direct.len(), "most within two minutes: {direct:?} of 5");
}

#[test]
fn a_pair_that_an_open_input_has_spoiled_moves_to_a_fresh_port() {
    for spoiled in [[true, false], [false, true], [true, true]] {
        let mut world = World::new(11, Line::clean(10 * MS), epoch());
        for open in spoiled {
            let edge = world.add_edge(PortRestricted, Line::clean(10 * MS));
            if open {
                world.edges[edge].open_input(11);
            }
            world.add_host(edge, 5000, NodeSettings::default());
        }
        for (host, open) in spoiled.into_iter().enumerate() {
            let stranger = (world.edges[1 - host].external, 5000).into();
            if open {
                let now = world.now;
                world.edges[host].spoil(stranger, 5000, now);
            }
        }
        for host in 0..2 {
            world.start_host(host);
        }
        let start = world.now;
        world.run_for(Duration::from_millis(2_900));
        assert!(!is_direct(&world), "spoiled it is: {spoiled:?}");
        assert!(world.run_until(Duration::from_secs(5), is_direct), "{spoiled:?}");
        println!("{spoiled:?}: direct after {:?}", world.now - start);
        let fresh: u64 = (0..2).map(|host| counters(&world, host).sockets).sum();
        assert!(fresh <= 2, "one or two fresh ports: {fresh}");
        world.run_for(Duration::from_secs(60));
        assert!(is_direct(&world), "and stays");
    }
}

/// Asks for the peer until the two have noticed that their path is gone, and are direct again: by data, or by
/// what `overlay ping` sends. Returns how long that took, or the limit.
fn back_after(world: &mut World, by_data: bool, limit: Duration) -> Duration {
    let (start, peer) = (world.now, world.hosts[1].id().expect("it has joined"));
    let mut lost = false;
    while world.now < start + limit {
        if by_data {
            world.ping(0, 1, 100);
        } else {
            let now = world.now;
            world.hosts[0].node_mut().expect("it runs").ping(peer, 1, now);
            world.settle(0);
        }
        let next = |world: &World| is_direct(world) == lost;
        if world.run_until(500 * MS, next) {
            if lost {
                return world.now - start;
            }
            lost = true;
        }
    }
    limit
}

#[test]
fn a_path_between_hard_nats_that_is_lost_is_found_again_soon() {
    let limit = Duration::from_secs(120);
    let mut times = Vec::new();
    for seed in 0..20 {
        let kinds = [Symmetric, PortRestricted];
        let kinds = if seed % 2 == 0 { kinds } else { [kinds[1], kinds[0]] };
        let easy = if seed % 2 == 0 { 1 } else { 0 };
        let mut world = started(kinds, seed, NodeSettings::default());
        assert!(world.run_until(Duration::from_secs(90), is_direct), "seed {seed}");
        world.run_for(Duration::from_secs(if seed % 4 < 2 { 3 } else { 100 }));
        for round in 0..3 {
            // Both routers forget all at once, the relay's way back included.
            world.edges.iter_mut().for_each(crate::edge::Edge::flush);
            let before = counters(&world, easy);
            let took = back_after(&mut world, seed % 8 < 4, limit);
            let after = counters(&world, easy);
            let runs = after.birthday_runs - before.birthday_runs;
            println!("{kinds:?} {round}: {took:?}, {} probes", after.probes - before.probes);
            assert!(after.probes - before.probes <= 1024 * runs && runs <= 2, "{runs} runs");
            times.push(took);
            world.run_for(Duration::from_secs(3));
        }
    }
    times.sort();
    let late = times.iter().filter(|took| **took > Duration::from_secs(36)).count();
    println!("median {:?}, 36 s or more: {late} of {}, all: {times:?}", times[30], times.len());
    assert!(times[30] <= Duration::from_secs(15), "{times:?}");
    // A run finds nothing now and then, and is not repeated for a minute.
    assert!(late <= 3 && times.iter().all(|took| *took < limit), "{times:?}");
}
