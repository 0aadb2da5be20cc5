//! Members that renew their node key.

use super::*;

const NEW: [u8; 32] = [42; 32];

fn announce(world: &mut World, connection: ConnectionId, key: [u8; 32], wall: u64) -> Vec<String> {
    let message = ClientMessage { node_key: Some(key), ..Default::default() };
    let decision = world.server.handle_message(connection, message, wall);
    let Some(decision) = decision else { return Vec::new() };
    let events = world.server.events(&decision, "server", wall);
    world.commit(decision);
    events.into_iter().map(|event| format!("{} {}", event.kind, event.actor)).collect()
}

fn pair() -> (World, ConnectionId, ConnectionId) {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(3);
    let first = world.enter(1, hello(1, Some(&invite)));
    let second = world.enter(2, hello(2, Some(&invite)));
    world.pass(Duration::from_secs(1));
    (world, first, second)
}

fn key_seen_by(world: &World, connection: ConnectionId) -> Vec<[u8; 32]> {
    world.node(connection).peers.values().map(|peer| peer.node_key).collect()
}

#[test]
fn a_new_key_is_written_then_confirmed_and_told_to_the_others() {
    let (mut world, first, second) = pair();
    let events = announce(&mut world, first, NEW, WALL);
    assert_eq!(events, ["node-key-changed node 00000001 from 203.0.113.9:1234"]);
    assert_eq!(world.node(first).node_key, Some(NEW), "confirmed");
    world.pass(Duration::from_secs(1));
    assert_eq!(key_seen_by(&world, second), [NEW]);
    assert_eq!(world.server.members.iter().next().unwrap().key_since, WALL);
    assert_eq!(world.node(second).node_key, None);
    // The same again is confirmed again, and is no change.
    assert_eq!(announce(&mut world, first, NEW, WALL), Vec::<String>::new());
    let back = world.enter(1, Hello { node_key: NEW, ..hello(1, None) });
    assert_eq!(world.node(back).refused, None);
}

#[test]
fn what_is_not_on_disk_is_neither_confirmed_nor_told() {
    let (mut world, first, second) = pair();
    world.store_works = false;
    announce(&mut world, first, NEW, WALL);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(first).node_key, None);
    assert_eq!(key_seen_by(&world, second), [[101; 32]]);
    assert!(!world.node(first).closed, "it goes on with its old key");
    world.store_works = true;
    announce(&mut world, first, NEW, WALL + 65);
    assert_eq!(world.node(first).node_key, Some(NEW), "it asks again");
}

#[test]
fn keys_of_others_and_no_keys_are_not_taken_nor_many_in_a_minute() {
    let (mut world, first, second) = pair();
    for bad in [[0; 32], [102; 32]].into_iter().cycle().take(20) {
        assert_eq!(announce(&mut world, first, bad, WALL), Vec::<String>::new());
        assert_eq!(world.node(first).node_key, None);
    }
    let keys = 10..200u8;
    let taken = keys.filter(|key| !announce(&mut world, first, [*key; 32], WALL).is_empty());
    assert_eq!(taken.count(), 5, "at once");
    for (key, wall, taken) in [(7, 30, false), (7, 59, false), (7, 60, true), (8, 61, false)] {
        announce(&mut world, first, [key; 32], WALL + wall);
        assert_eq!(world.node(first).node_key == Some([key; 32]), taken, "{key} after {wall} s");
    }
    announce(&mut world, first, [9; 32], WALL - 10_000);
    world.pass(Duration::from_secs(1));
    assert_eq!(
        key_seen_by(&world, second),
        [[9; 32]],
        "a clock that was set back keeps nobody out"
    );
}

#[test]
fn who_has_not_been_let_in_or_has_been_replaced_changes_no_key() {
    let (mut world, first, second) = pair();
    let stranger = world.connect(3);
    announce(&mut world, stranger, NEW, WALL);
    assert_eq!(world.node(stranger).refused, Some(RefusedCode::BadRequest));
    // What was under way on a connection that another one has replaced comes too late.
    world.enter(1, Hello { node_key: [50; 32], ..hello(1, None) });
    announce(&mut world, first, NEW, WALL);
    world.pass(Duration::from_secs(1));
    assert_eq!(key_seen_by(&world, second), [[50; 32]]);
}

#[test]
fn a_new_key_is_no_second_machine_and_a_second_machine_does_not_change_the_key() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(3);
    let run = |key: u8, instance| Hello {
        node_key: [key; 32],
        instance: Some(instance),
        ..hello(1, Some(&invite))
    };
    let connection = world.enter(1, run(10, 1));
    for key in 11..30 {
        let wall = WALL + u64::from(key) * 100;
        announce(&mut world, connection, [key; 32], wall);
        assert_eq!(world.node(connection).node_key, Some([key; 32]));
    }
    let again = world.enter(1, run(30, 1));
    assert_eq!(world.node(again).refused, None, "the same machine with its newest key");

    // Two machines of one identity, each of which has renewed its key.
    world.enter(1, run(40, 2));
    let staying = world.enter(1, run(30, 1));
    let turned_away = world.enter(1, run(40, 2));
    assert_eq!(world.node(turned_away).refused, Some(RefusedCode::Cloned));
    assert!(!world.node(staying).closed);
    announce(&mut world, turned_away, [41; 32], WALL + 1_000_000);
    let stored = world.server.members.iter().next().unwrap().node_key;
    assert_eq!(stored.0, [30; 32], "that of the machine which stays");
}

#[test]
fn a_node_that_comes_back_with_another_key_and_name_leaves_a_line_for_each() {
    let (mut world, _, _) = pair();
    let connection = world.connect(1);
    let hello = Hello { node_key: NEW, name: Some("carol".into()), ..hello(1, None) };
    let message = ClientMessage { hello: Some(hello), ..Default::default() };
    let decision = world.server.handle_message(connection, message, WALL).unwrap();
    let events = world.server.events(&decision, "server", WALL);
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(kinds, ["node-renamed", "node-key-changed"]);
    assert!(events.iter().all(|event| event.fields["name"] == "carol"), "{events:?}");
    world.commit(decision);
}

#[test]
fn who_connects_again_and_again_with_another_key_or_name_writes_no_more_than_one_a_minute() {
    let (mut world, first, second) = pair();
    let own = world.node(first).id;
    let mut come = |wall: u64, key: u8, name: &str| {
        let connection = world.connect(1);
        let hello = Hello { node_key: [key; 32], name: Some(name.into()), ..hello(1, None) };
        let message = ClientMessage { hello: Some(hello), ..Default::default() };
        let decision = world.server.handle_message(connection, message, wall).unwrap();
        let wrote = !decision.changes().is_empty();
        world.commit(decision);
        (connection, wrote, world.node(connection).refused)
    };
    let wrote = (0..100u8)
        .map(|n| come(WALL, 110 + n, &format!("a{n}")))
        .inspect(|(_, wrote, refused)| {
            assert_eq!(*refused, (!wrote).then_some(RefusedCode::TooOften));
        })
        .filter(|(_, wrote, _)| *wrote)
        .count();
    assert_eq!(wrote, 5);
    // With the key that the server has it is let in as often as it comes, whatever it is called.
    for n in 0..100 {
        let (connection, wrote, refused) = come(WALL, 114, &format!("b{n}"));
        assert_eq!((wrote, refused), (false, None), "{n}");
        assert!(connection > first);
    }
    let (_, wrote, refused) = come(WALL + 60, 120, "c");
    assert_eq!((wrote, refused), (true, None), "after a minute");
    let (last, wrote, refused) = come(WALL + 61, 120, "d");
    assert_eq!((wrote, refused), (false, None));
    // On a connection that stands it is the same account; the others have their own.
    assert_eq!(announce(&mut world, last, [121; 32], WALL + 62), Vec::<String>::new());
    assert_eq!(announce(&mut world, last, [121; 32], WALL + 120).len(), 1);
    assert_eq!(announce(&mut world, second, NEW, WALL).len(), 1);
    assert_eq!(world.node(last).id, own);
}
