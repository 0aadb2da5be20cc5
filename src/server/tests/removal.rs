//! Removals, and who is waited for.

use super::*;
use crate::server::admin::{Acknowledged, Removal};

/// What a node says of the newest netmap that it was told.
fn applied(world: &mut World, connection: ConnectionId) {
    let applied = Some(world.node(connection).epoch);
    world.say(connection, ClientMessage { applied, ..Default::default() });
}

fn remove(world: &mut World, node: &str) -> Removal {
    match world.ask(Request::Remove { node: node.into() }).unwrap() {
        Some(Answer::Removed(removal)) => *removal,
        other => panic!("a removal is answered with one: {other:?}"),
    }
}

fn progress(world: &mut World, epoch: u64) -> Acknowledged {
    match world.ask(Request::Acknowledged { epoch }).unwrap() {
        Some(Answer::Acknowledged(progress)) => progress,
        other => panic!("progress is answered with progress: {other:?}"),
    }
}

#[test]
fn a_removal_waits_for_every_node_that_is_online_and_names_the_others() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(4);
    let nodes: Vec<_> = (1..=4).map(|m| world.enter(m, hello(m, Some(&invite)))).collect();
    world.disconnect(nodes[3]);
    world.pass(Duration::from_secs(1));
    for node in &nodes[..3] {
        applied(&mut world, *node);
    }
    let removal = remove(&mut world, "node-2");
    assert_eq!((removal.removed.name.as_str(), removal.progress.online), ("node-2", 2));
    assert_eq!(removal.progress.waiting, ["node", "node-3"], "what was in effect before is not it");
    assert_eq!(removal.progress.offline, ["node-4"]);

    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(nodes[0]).epoch, removal.epoch, "it is told in the epoch that was named");
    assert!(!world.node(nodes[0]).peers.contains_key(&2));
    applied(&mut world, nodes[0]);
    let now = progress(&mut world, removal.epoch);
    assert_eq!((now.acknowledged, now.waiting), (1, vec!["node-3".to_string()]));

    // Who comes back gets the whole netmap, and says so too.
    let back = world.enter(4, hello(4, None));
    assert!(progress(&mut world, removal.epoch).waiting.contains(&"node-4".to_string()));
    for node in [nodes[2], back] {
        applied(&mut world, node);
    }
    let done = progress(&mut world, removal.epoch);
    assert_eq!((done.acknowledged, done.online), (3, 3));
    assert!(done.waiting.is_empty() && done.offline.is_empty());
}

#[test]
fn a_node_whose_membership_had_ended_is_gone_already_and_nobody_is_waited_for() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(3);
    let nodes: Vec<_> = (1..=3).map(|m| world.enter(m, hello(m, Some(&invite)))).collect();
    world.ask(Request::Expire { node: "node-3".into(), in_s: Some(10) }).unwrap();
    let over = world.server.decide_expiry(WALL + 10);
    world.commit(over);
    world.pass(Duration::from_secs(1));
    for node in &nodes[..2] {
        applied(&mut world, *node);
    }
    let epoch = world.node(nodes[0]).epoch;
    let removal = remove(&mut world, "node-3");
    assert_eq!((removal.progress.acknowledged, removal.progress.online), (2, 2));
    assert!(removal.progress.waiting.is_empty());
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(nodes[0]).epoch, epoch, "nothing more is told");
    assert!(progress(&mut world, removal.epoch).waiting.is_empty());
    assert_eq!(world.node(nodes[2]).refused, Some(RefusedCode::NotMember));
}

#[test]
fn a_removal_revokes_the_invite_that_would_let_the_node_in_again() {
    let mut world = World::new("10.77.0.0/20");
    let (invite, once) = (world.invite(20), world.invite(1));
    world.enter(1, hello(1, Some(&invite)));
    world.enter(2, hello(2, Some(&once)));
    let decision = world.server.decide(Request::Remove { node: "node".into() }, WALL).unwrap();
    let events = world.server.events(&decision, "administrator uid 0", WALL);
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds, ["node-removed", "invite-revoked"]);
    let Some(Answer::Removed(removal)) = world.commit(decision) else { panic!("a removal") };
    let revoked = removal.invite_revoked.unwrap();
    assert_eq!((revoked.id.0, revoked.used, revoked.uses), (invite.id, 1, 20));
    assert_eq!(revoked.state, "revoked");
    let back = world.enter(1, hello(1, Some(&invite)));
    assert_eq!(world.node(back).refused, Some(RefusedCode::InviteRevoked));
    let other = world.enter(3, hello(3, Some(&invite)));
    assert_eq!(world.node(other).refused, Some(RefusedCode::InviteRevoked));
    // One that lets nobody in is left as it is.
    assert_eq!(remove(&mut world, "node-2").invite_revoked, None);
    let back = world.enter(2, hello(2, Some(&once)));
    assert_eq!(world.node(back).refused, Some(RefusedCode::InviteUsedUp));
}

#[test]
fn a_node_cannot_acknowledge_what_it_was_not_told() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let boaster = world.enter(1, hello(1, Some(&invite)));
    world.enter(2, hello(2, Some(&invite)));
    world.pass(Duration::from_secs(1));
    world.say(boaster, ClientMessage { applied: Some(u64::MAX), ..Default::default() });
    let removal = remove(&mut world, "node-2");
    assert_eq!(removal.progress.waiting, ["node"]);
    // A new connection knows nothing of what an earlier one said.
    world.pass(Duration::from_secs(1));
    applied(&mut world, boaster);
    assert!(progress(&mut world, removal.epoch).waiting.is_empty());
    world.enter(1, hello(1, None));
    assert_eq!(progress(&mut world, removal.epoch).waiting, ["node"]);
}

#[test]
fn a_removed_node_stays_out_of_a_server_that_starts_again() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    world.enter(1, hello(1, Some(&invite)));
    world.enter(2, hello(2, Some(&invite)));
    remove(&mut world, "node-2");
    let left = world.server.members.iter().cloned();
    let records = Records {
        network: world.server.network.clone(),
        members: left.map(|record| Versioned { rev: world.rev, record }).collect(),
        invites: Vec::new(),
        policy: None,
        highest_node: 2,
    };
    world.server =
        Server::new(world.server.settings.clone(), records, [4; 32], world.now, WALL + 60);
    world.nodes.clear();
    let out = world.enter(2, hello(2, None));
    assert_eq!(world.node(out).refused, Some(RefusedCode::NotMember));
    let back = world.enter(1, hello(1, None));
    assert_eq!(world.node(back).peers, BTreeMap::new(), "who was offline hears it by its absence");
}

/// A server with so many nodes online, which hear nothing; the number is also the connection's.
fn crowd(nodes: u16) -> World {
    let mut world = World::new("10.64.0.0/16");
    let invite = world.invite(nodes.into());
    for number in 1..=nodes {
        let connection = ConnectionId(number.into());
        let mut key = [1; 32];
        key[..2].copy_from_slice(&number.to_le_bytes());
        let about = Connected {
            machine_key: PublicKey(key),
            observed: "203.0.113.9:1234".parse().unwrap(),
            relay_port: None,
            second_port: None,
        };
        world.server.handle_connected(connection, about);
        let hello = Some(Hello { node_key: key, ..hello(1, Some(&invite)) });
        world.say(connection, ClientMessage { hello, ..Default::default() });
    }
    world
}

/// The worst moment for a removal is right after other news went out. The time is the virtual one
/// for which changes are gathered and the real one in which the server works; it is printed for the
/// record.
#[test]
fn a_thousand_nodes_are_told_of_a_removal_within_a_second() {
    const NODES: u16 = 1_000;
    const REMOVALS: u16 = 100;
    let mut world = crowd(NODES);
    let mut times = Vec::new();
    for number in 1..=REMOVALS {
        world.pass(Duration::from_secs(1));
        let endpoint = SocketAddr::new("192.0.2.7".parse().unwrap(), number);
        let candidates = Some(vec![WireCandidate { kind: 1, endpoint }]);
        let news = ClientMessage { candidates, ..Default::default() };
        world.say(ConnectionId(NODES.into()), news);
        world.pass(Duration::ZERO);

        let start = crate::io::clock::now();
        let request = Request::Remove { node: format!("{number:08x}") };
        let decision = world.server.decide(request, WALL).unwrap();
        world.rev += 1;
        world.server.apply(decision, world.rev, WALL);
        let due = world.server.distribution.flush_at().expect("there is news").max(world.now);
        world.server.handle_timeout(due);
        let mut told = 0;
        while let Some(output) = world.server.poll_output() {
            told += u16::from(matches!(output, Output::Send { .. }));
        }
        let worked = crate::io::clock::now().saturating_duration_since(start);
        assert!(told > NODES - number, "{told} messages: all that stay, and who is removed");
        times.push(due.saturating_duration_since(world.now) + worked);
        world.now = due;
    }
    times.sort_unstable();
    let (p50, p99) = (times[49], times[98]);
    println!("1,000 nodes are told of a removal after {p50:?} (p50), {p99:?} (p99)");
    assert!(p99 <= Duration::from_secs(1), "{p99:?}");
}
