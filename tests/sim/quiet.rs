//! How much nodes send: when nothing happens, and when everything starts at once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use overlay::lab::nat::NatKind::{self, None, PortRestricted, Symmetric};
use overlay::node::NodeSettings;

use crate::epoch;
use crate::link::Line;
use crate::world::World;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Counts what leaves a host.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// All datagrams.
    pub(crate) datagrams: usize,
    /// Their bytes, without IP and UDP headers.
    pub(crate) bytes: usize,
    /// The most datagrams within any one second.
    pub(crate) busiest: usize,
    last: VecDeque<Instant>,
}

impl Meter {
    pub(crate) fn count(&mut self, bytes: usize, now: Instant) {
        self.datagrams += 1;
        self.bytes += bytes;
        self.last.push_back(now);
        while self.last.front().is_some_and(|at| now.saturating_duration_since(*at) >= SECOND) {
            self.last.pop_front();
        }
        self.busiest = self.busiest.max(self.last.len());
    }
}

fn network(kinds: impl IntoIterator<Item = NatKind>) -> World {
    let mut world = World::new(7, Line::clean(10 * MS), epoch());
    for kind in kinds {
        let edge = world.add_edge(kind, Line::clean(10 * MS));
        world.add_host(edge, 5000, NodeSettings::default());
    }
    for host in 0..world.hosts.len() {
        world.start_host(host);
        world.run_for(20 * MS);
    }
    world
}

/// Lets an hour pass and returns each host's datagrams and bytes in it.
fn an_hour(world: &mut World) -> Vec<(usize, usize)> {
    let read = |world: &World| -> Vec<(usize, usize)> {
        world.hosts.iter().map(|host| (host.meter.datagrams, host.meter.bytes)).collect()
    };
    let before = read(world);
    world.run_for(Duration::from_secs(3600));
    read(world)
        .into_iter()
        .zip(before)
        .map(|(now, then)| (now.0 - then.0, now.1 - then.1))
        .collect()
}

#[test]
fn an_idle_pair_sends_one_small_packet_per_keepalive() {
    for (kinds, direct) in
        [([PortRestricted; 2], true), ([None, PortRestricted], true), ([Symmetric; 2], false)]
    {
        let mut world = network(kinds);
        world.run_for(Duration::from_secs(60));
        for (host, (datagrams, bytes)) in an_hour(&mut world).into_iter().enumerate() {
            println!("{kinds:?}, host {host}: {datagrams} datagrams, {bytes} bytes in an hour");
            // One every 20 s for the relay, and one every 25 s or more for the peer; without a
            // direct path, a round of probes now and then.
            let (to_relay, to_peer) = (3600 / 20 + 2, if direct { 3600 / 25 + 8 } else { 5 * 30 });
            assert!(datagrams <= to_relay + to_peer, "{kinds:?}: host {host} sent {datagrams}");
            assert!(bytes <= datagrams * 120, "{kinds:?}: {bytes} bytes in {datagrams} datagrams");
        }
    }
}

#[test]
fn a_network_that_starts_at_once_is_no_flood() {
    for (nodes, bound) in [(7, 160), (32, 200)] {
        let mut world = network(std::iter::repeat_n(PortRestricted, nodes));
        world.run_for(Duration::from_secs(5));
        let busiest = world.hosts.iter().map(|host| host.meter.busiest).max().unwrap_or(0);
        let bytes = world.hosts.iter().map(|host| host.meter.bytes).max().unwrap_or(0);
        println!("{nodes} nodes: one sends up to {busiest} datagrams in a second, {bytes} bytes");
        assert!(busiest <= bound, "{nodes} nodes: {busiest} datagrams in a second");
    }
}

#[test]
fn a_packet_to_a_peer_that_is_offline_does_not_start_a_search_without_end() {
    let mut world = network([PortRestricted; 2]);
    world.run_for(Duration::from_secs(10));
    world.stop_host(1);
    // So long it is expected back.
    world.run_for(Duration::from_secs(16 * 60));
    world.ping(0, 1, 64).expect("it is known");
    // That long it counts as in use.
    world.run_for(Duration::from_secs(190));
    let (datagrams, _) = an_hour(&mut world)[0];
    println!(
        "{datagrams} datagrams in an hour, with one packet to a peer that is offline before it"
    );
    assert!(datagrams <= 3600 / 20 + 2, "{datagrams} datagrams in an hour");
}
