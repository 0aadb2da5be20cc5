//! Memberships that end.

use super::*;
use crate::server::admin::NewMembers;
use crate::wire::control::EXPIRY_WARNING_S;

fn expire(world: &mut World, node: &str, in_s: Option<u64>) {
    let request = Request::Expire { node: node.into(), in_s };
    assert!(matches!(world.ask(request), Ok(Some(Answer::Expiring(_)))));
}

/// Has the server look at its clock; returns the lines for the log.
fn look(world: &mut World, wall: u64) -> Vec<String> {
    let decision = world.server.decide_expiry(wall);
    let events = world.server.events(&decision, "server", wall);
    world.commit(decision);
    world.pass(Duration::from_secs(1));
    events.into_iter().map(|event| format!("{} {}", event.kind, event.fields["name"])).collect()
}

fn pair() -> (World, ConnectionId, ConnectionId) {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let first = world.enter(1, hello(1, Some(&invite)));
    let second = world.enter(2, hello(2, Some(&invite)));
    world.pass(Duration::from_secs(1));
    (world, first, second)
}

#[test]
fn a_member_is_warned_of_then_shut_out_and_comes_back_with_more_time() {
    let (mut world, first, second) = pair();
    let time = EXPIRY_WARNING_S + 1_000;
    expire(&mut world, "node", Some(time));
    world.pass(Duration::from_secs(1));
    let ends = WALL + time;
    assert_eq!(world.node(first).standing, Some(Standing { now: WALL, expires: Some(ends) }));
    let told = world.node(second).peers.values().next().unwrap().expires;
    assert_eq!(told, Some(ends), "peers keep to it without the server, too");

    assert!(look(&mut world, WALL + 999).is_empty());
    assert_eq!(look(&mut world, WALL + 1_000), ["node-expires-soon node"]);
    assert!(look(&mut world, ends - 1).is_empty(), "once");
    assert_eq!(world.node(second).peers.len(), 1);
    assert_eq!(look(&mut world, ends), ["node-expired node"]);
    assert!(look(&mut world, ends + 1).is_empty());
    assert!(world.node(second).peers.is_empty(), "nobody is told of it any more");
    assert!(!world.node(first).closed, "it is told, and waits");

    let ticks = world.node(first).ticks;
    world.pass(TICK_INTERVAL);
    assert_eq!(world.node(first).ticks, ticks + 1, "its connection is alive");

    // It can ask nothing, and a new connection of it waits as well.
    world.say(first, ClientMessage { ping: Some(1), ..Default::default() });
    let again = world.enter(1, hello(1, None));
    assert_eq!((world.node(again).id, world.node(again).refused), (None, None));
    // What is over is over, also by a clock that shows an earlier time again, as this one does.
    let over = Some(Standing { now: WALL, expires: Some(WALL) });
    assert_eq!((world.node(first).standing, world.node(again).standing), (over, over));
    assert_eq!(world.node(first).refused, Some(RefusedCode::Replaced), "one of them is enough");
    assert!(world.node(first).closed && !world.node(again).closed);
    let Some(Answer::Nodes(list)) = world.ask(Request::Nodes).unwrap() else { panic!("nodes") };
    assert_eq!((list.nodes[0].expired, list.nodes[0].online), (true, false));

    expire(&mut world, "node", Some(u64::from(u32::MAX) / 100));
    assert!(world.node(again).closed, "come again");
    let back = world.enter(1, hello(1, None));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(back).id, Some(1), "it is who it was");
    assert_eq!(world.node(second).peers.len(), 1);
    expire(&mut world, "node", None);
    assert_eq!(world.server.expiry_due(), None);
}

#[test]
fn an_end_outlives_a_server_that_starts_again_and_a_removal_ends_it() {
    let (mut world, _, _) = pair();
    expire(&mut world, "node", Some(10));
    look(&mut world, WALL + 10);
    let records = Records {
        network: world.server.network.clone(),
        members: world
            .server
            .members
            .iter()
            .map(|record| Versioned { rev: world.rev, record: record.clone() })
            .collect(),
        invites: Vec::new(),
        policy: None,
        highest_node: 2,
    };
    world.server = Server::new(world.server.settings.clone(), records, [4; 32], world.now, WALL);
    world.nodes.clear();
    let other = world.enter(2, hello(2, None));
    let out = world.enter(1, hello(1, None));
    assert!(world.node(other).peers.is_empty());
    assert_eq!((world.node(out).id, world.node(out).closed), (None, false));
    world.ask(Request::Remove { node: "node".into() }).unwrap();
    assert_eq!(world.node(out).refused, Some(RefusedCode::NotMember));
}

#[test]
fn an_expired_member_holds_one_connection_however_many_it_makes() {
    let (mut world, first, _) = pair();
    expire(&mut world, "node", Some(10));
    look(&mut world, WALL + 10);
    let made: Vec<ConnectionId> = (0..50).map(|_| world.enter(1, hello(1, None))).collect();
    let open = |id: &&ConnectionId| !world.node(**id).closed;
    let open: Vec<_> = [first].iter().chain(&made).filter(open).copied().collect();
    assert_eq!(open, made[49..]);
    assert_eq!(world.server.waiting(NodeId::new(1).unwrap()), made[49..]);
    assert_eq!(world.server.connections.len(), 2, "its last one, and the other member's");
}

#[test]
fn times_that_make_no_sense_are_turned_down() {
    let (mut world, _, _) = pair();
    for in_s in [Some(0), Some(u64::MAX)] {
        let request = Request::Expire { node: "node".into(), in_s };
        assert_eq!(world.ask(request).unwrap_err(), RequestError::BadExpiry);
    }
}

#[test]
fn who_joins_has_the_time_of_the_network_and_who_is_there_keeps_its_own() {
    let (mut world, first, _) = pair();
    let set = |world: &mut World, in_s| {
        let decision = world.server.decide(Request::ExpireNew { in_s }, WALL).unwrap();
        let lines = world.server.events(&decision, "uid 0", WALL);
        let answer = world.commit(decision);
        assert_eq!(
            answer,
            Some(Answer::ExpiringNew(NewMembers { schema: 1, members_last_s: in_s }))
        );
        lines.into_iter().map(|it| format!("{} {}", it.kind, it.fields["members-last"])).collect()
    };
    let lines: Vec<String> = set(&mut world, Some(1_000));
    assert_eq!(lines, ["network-expiry-set 1000 s"]);
    let invite = world.invite(2);
    let third = world.enter(3, hello(3, Some(&invite)));
    let ends = |world: &World, at| world.node(at).standing.and_then(|it| it.expires);
    assert_eq!((ends(&world, first), ends(&world, third)), (None, Some(WALL + 1_000)));
    assert_eq!(world.server.expiry_due(), Some(WALL + 1_000 - EXPIRY_WARNING_S));
    // To come back is not to join.
    let again = world.enter(1, hello(1, None));
    assert_eq!(ends(&world, again), None);

    assert!(set(&mut world, Some(1_000)).is_empty(), "the same again is no change");
    assert_eq!(set(&mut world, None), ["network-expiry-set for ever"]);
    let fourth = world.enter(4, hello(4, Some(&invite)));
    assert_eq!(ends(&world, fourth), None);
    for in_s in [Some(0), Some(u64::MAX)] {
        let refused = world.ask(Request::ExpireNew { in_s }).unwrap_err();
        assert_eq!(refused, RequestError::BadExpiry);
    }
}

#[test]
fn in_a_large_network_an_expired_node_is_nobody_until_it_has_more_time() {
    let mut world = World::new("10.77.0.0/24");
    world.server.settings.whole_netmap_up_to = 2;
    let invite = world.invite(100);
    let uses = |machine, known: &[u32]| Hello {
        known: Some(known.to_vec()),
        ..hello(machine, Some(&invite))
    };
    let nodes: Vec<ConnectionId> =
        (1..=5).map(|machine| world.enter(machine, uses(machine, &[]))).collect();
    let asker = nodes[4];
    let find = |world: &mut World| {
        let find = Some(vec!["10.77.0.4".to_string()]);
        world.say(asker, ClientMessage { find, ..Default::default() });
        world.pass(Duration::from_secs(1));
        (world.node(asker).peers.contains_key(&4), world.node(asker).unknown.len())
    };
    assert_eq!(find(&mut world), (true, 0));
    expire(&mut world, "10.77.0.4", Some(10));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(asker).peers[&4].expires, Some(WALL + 10));
    look(&mut world, WALL + 10);
    assert!(!world.node(asker).peers.contains_key(&4), "told at once");
    assert_eq!(find(&mut world), (false, 1), "and that there is none");
    expire(&mut world, "10.77.0.4", None);
    assert!(world.node(nodes[3]).closed);
    world.enter(4, uses(4, &[5]));
    world.pass(Duration::from_secs(1));
    assert!(world.node(asker).peers.contains_key(&4), "it uses us");
    assert_eq!(find(&mut world), (true, 1));
}
