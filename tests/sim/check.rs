//! What must be true of a world, whatever has happened in it.

use std::time::{Duration, Instant};

use crate::oracle;
use crate::world::World;

/// One packet from every member to every other.
pub(crate) fn talk_once(world: &mut World) {
    for (from, to) in pairs(world) {
        world.ping(from, to, 64);
    }
}

/// Every node sees the way to every other that the oracle knows.
pub(crate) fn check_paths(world: &World) {
    let mut wrong = Vec::new();
    for (from, to) in pairs(world) {
        let peer = world.hosts[to].id().expect("all have joined");
        let kind = world.hosts[from].path_kind(peer, world.now);
        let expected = oracle::expected_path(world, from, to);
        let lucky = kind == "direct" && oracle::may_be_found_by_chance(world, from, to);
        let open = kind == oracle::relay(world, from)
            && (oracle::may_swallow(world, from, to)
                || oracle::needs_further_uplink(world, from, to));
        if kind != expected && !lucky && !open {
            let why = world.hosts[from].why(peer, world.now);
            wrong.push(format!("host {from} to host {to} ({peer}): {kind}, not {expected}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "stuck after quiet time:\n{}", wrong.join("\n"));
}

/// Every node reaches every other, once for each packet. Where data is swallowed, that has to be
/// found out by sending some.
pub(crate) fn check_delivery(world: &mut World) {
    let swallowed: Vec<(usize, usize)> =
        pairs(world).filter(|(a, b)| oracle::may_swallow(world, *a, *b)).collect();
    for _ in 0..if swallowed.is_empty() { 0 } else { TALK } {
        for (from, to) in &swallowed {
            world.ping(*from, *to, 64);
            world.ping(*from, *to, 1_200);
        }
        world.run_for(Duration::from_millis(50));
    }
    let mut pings = Vec::new();
    for (from, to) in pairs(world) {
        pings.push(world.ping(from, to, 64).expect("all have joined and run"));
    }
    world.run_for(Duration::from_secs(2));
    let mut lost = Vec::new();
    for number in pings {
        let ping = world.ledger.ping(number);
        if ping.took().is_none() {
            lost.push(format!("from host {} to host {}", ping.from, ping.to));
        }
    }
    assert!(lost.is_empty(), "pings lost in quiet time: {}", lost.join(", "));
}

/// Every member with every other.
fn pairs(world: &World) -> impl Iterator<Item = (usize, usize)> + use<> {
    let is_member = |host: &usize| {
        let host = &world.hosts[*host];
        host.removed_at.is_none() && host.over_at.is_none()
    };
    let members: Vec<usize> = (0..world.hosts.len()).filter(is_member).collect();
    let others = members.clone();
    let pairs =
        members.into_iter().flat_map(move |a| others.clone().into_iter().map(move |b| (a, b)));
    pairs.filter(|(a, b)| a != b)
}

/// Nobody who has heard of a removal takes or sends packets of who was removed, even if that one
/// starts again with all it had.
pub(crate) fn check_removed(world: &mut World) {
    let hosts = world.hosts.len();
    let removed: Vec<usize> =
        (0..hosts).filter(|host| world.hosts[*host].removed_at.is_some()).collect();
    let mut pings = Vec::new();
    for gone in removed {
        for other in (0..hosts).filter(|other| *other != gone) {
            pings.extend(world.ping(gone, other, 64));
            pings.extend(world.ping(other, gone, 64));
        }
    }
    if pings.is_empty() {
        return;
    }
    world.run_for(Duration::from_secs(2));
    for number in pings {
        let ping = world.ledger.ping(number);
        let arrived = ping.took().is_some();
        assert!(!arrived, "host {} reached host {} after a removal", ping.from, ping.to);
    }
}

/// The server knows every running member by the newest key on its disk, and so does who is told.
pub(crate) fn check_keys(world: &World) {
    for (number, host) in world.hosts.iter().enumerate() {
        let member = host.removed_at.is_none() && host.node().is_some();
        let (true, Some(id)) = (member && host.control_link.connection().is_some(), host.id())
        else {
            continue;
        };
        let keys = host.keys();
        assert!(keys.told, "host {number}: the server has not answered");
        let (stored, own) = (world.server.node_key(id), keys.current.public());
        assert_eq!(stored, Some(own), "host {number}: another key than the server's");
        for (other, peer) in world.hosts.iter().enumerate().filter(|(other, _)| *other != number) {
            let settled = peer.node().filter(|_| peer.control_link.connection().is_some());
            let known = settled.and_then(|node| node.peer_info(id)).map(|info| info.node_key);
            assert!(known.is_none_or(|key| key == own), "host {other} has an old key of {number}");
        }
    }
}

/// Every node that has a server wants to be woken soon: its NAT forgets after 30 s.
pub(crate) fn check_wakeups(world: &World) {
    for (number, host) in world.hosts.iter().enumerate() {
        // Hello, welcome and the first bind have been exchanged by then.
        let long_ago = |at: Instant| world.now.saturating_duration_since(at) > SIGN_ON;
        let signed_on = host.control_link.connected_since().is_some_and(long_ago);
        if host.node().is_some() && host.asleep_until.is_none() && signed_on {
            let in_time = host.wake_at().is_some_and(|at| at <= world.now + LONGEST_SLEEP);
            assert!(in_time, "host {number} has lost a wake-up: {:?}", host.wake_at());
        }
    }
}

/// In the midst of a scenario: who has been undisturbed for half a minute, on lines that lose
/// nothing, gets a packet through within seconds of trying, by whatever way.
pub(crate) fn check_settled(world: &mut World) {
    check_wakeups(world);
    let settled = |world: &World, host: usize| {
        let long_ago = |at: Instant| world.now.saturating_duration_since(at) >= QUIET;
        let host = &world.hosts[host];
        host.node().is_some()
            && host.asleep_until.is_none()
            && long_ago(host.asleep_since)
            // The clocks may have been set, and peers go by what they know.
            && !host.may_end
            && host.control_link.connected_since().is_some_and(long_ago)
            && [0, 1].iter().all(|it| world.edges[host.edge_of(*it)].line.loss_permille == 0)
    };
    let all: Vec<(usize, usize)> = pairs(world).collect();
    let all: Vec<(usize, usize)> =
        all.into_iter().filter(|(a, b)| settled(world, *a) && settled(world, *b)).collect();
    let mut last = Vec::new();
    for _ in 0..TRIES {
        last = all.iter().filter_map(|(a, b)| world.ping(*a, *b, 64)).collect();
        world.run_for(Duration::from_secs(1));
    }
    for number in last {
        let ping = world.ledger.ping(number);
        let (from, to) = (ping.from, ping.to);
        let still = settled(world, from) && settled(world, to);
        let arrived = ping.took().is_some();
        assert!(arrived || !still, "host {from} does not reach host {to} by any way");
    }
}

/// After so long without news every pair must have the best path there is.
pub(crate) const QUIET: Duration = Duration::from_secs(30);
/// Rounds of packets, two seconds of them: a path that loses data is left within one.
const TALK: usize = 40;
/// One packet a second: the bound for the loss of all UDP is 3 s, and one more for the handshake.
const TRIES: usize = 5;
/// Three times the slowest round trip to the server.
const SIGN_ON: Duration = Duration::from_secs(1);
/// The relay is told every 20 s that we are there.
const LONGEST_SLEEP: Duration = Duration::from_secs(21);
