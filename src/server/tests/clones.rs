//! Two machines with the same keys.

use super::*;

fn run(machine: u8, instance: u64) -> Hello {
    Hello { instance: Some(instance), ..hello(machine, None) }
}

fn cloned(world: &mut World) -> bool {
    let Some(Answer::Nodes(list)) = world.ask(Request::Nodes).unwrap() else { panic!("nodes") };
    list.nodes[0].cloned
}

/// A network with one node, whose first run is number 1.
fn joined() -> (World, ConnectionId) {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let first = Hello { invite: Some(invite), ..run(1, 1) };
    let connection = world.enter(1, first);
    (world, connection)
}

#[test]
fn two_machines_that_take_turns_are_found_and_one_stays() {
    let (mut world, _) = joined();
    world.enter(1, run(1, 2));
    let staying = world.enter(1, run(1, 1));
    assert!(!cloned(&mut world), "once may be a hello that was long on its way");

    let connection = world.connect(1);
    let message = ClientMessage { hello: Some(run(1, 2)), ..Default::default() };
    let decision = world.server.handle_message(connection, message, WALL).unwrap();
    let events = world.server.events(&decision, "server", WALL);
    assert_eq!(events.iter().map(|event| &*event.kind).collect::<Vec<_>>(), ["node-cloned"]);
    assert_eq!(events[0].fields["name"], "node");
    world.commit(decision);
    assert_eq!(world.node(connection).refused, Some(RefusedCode::Cloned));
    assert!(!world.node(staying).closed, "who is there stays");
    assert_eq!(world.node(staying).rival, Some("203.0.113.9:1234".parse().unwrap()));
    assert!(cloned(&mut world));

    let epoch = world.server.distribution.epoch();
    for _ in 0..10 {
        let again = world.enter(1, run(1, 2));
        assert_eq!(world.node(again).refused, Some(RefusedCode::Cloned));
        world.pass(Duration::from_secs(1));
    }
    assert!(world.server.distribution.epoch() <= epoch + 1, "the others hear nothing of it");
    // When the one that was kept ends, the other is the node.
    world.disconnect(staying);
    let other = world.enter(1, run(1, 2));
    assert_eq!(world.node(other).refused, None);
}

#[test]
fn a_machine_that_moves_or_starts_again_is_no_clone() {
    let (mut world, _) = joined();
    // The old connection is half open each time.
    for _ in 0..20 {
        let moved = world.enter(1, run(1, 1));
        assert_eq!(world.node(moved).refused, None);
    }
    for start in 2..30 {
        let started = world.enter(1, run(1, start));
        assert_eq!(world.node(started).refused, None, "start {start}");
    }
    assert!(!cloned(&mut world));
}

#[test]
fn a_hello_that_was_long_on_its_way_is_no_clone() {
    let (mut world, _) = joined();
    world.enter(1, run(1, 2));
    let late = world.enter(1, run(1, 1));
    // Its sender has ended, so its connection ends as well.
    world.disconnect(late);
    let back = world.enter(1, run(1, 2));
    assert_eq!(world.node(back).refused, None);
    assert!(!cloned(&mut world));
}

#[test]
fn a_node_that_tells_no_number_takes_its_place_as_ever() {
    let (mut world, _) = joined();
    for _ in 0..5 {
        for hello in [hello(1, None), run(1, 1)] {
            let connection = world.enter(1, hello);
            assert_eq!(world.node(connection).refused, None);
        }
    }
}
