//! Networks that are too large to tell everybody of everybody.

use std::collections::BTreeSet;

use super::*;

/// A network in which three nodes are many.
fn large() -> (World, InviteUse) {
    let mut world = World::new("10.77.0.0/24");
    world.server.settings.whole_netmap_up_to = 2;
    let invite = world.invite(100);
    (world, invite)
}

/// A node that can do with a part, and uses these peers.
fn using(machine: u8, invite: &InviteUse, known: &[u32]) -> Hello {
    Hello { known: Some(known.to_vec()), ..hello(machine, Some(invite)) }
}

fn find(texts: &[&str]) -> ClientMessage {
    let find = Some(texts.iter().map(ToString::to_string).collect());
    ClientMessage { find, ..Default::default() }
}

fn knows(world: &World, connection: ConnectionId) -> Vec<u32> {
    world.node(connection).peers.keys().copied().collect()
}

/// Machines 1 to `count`, of which nobody uses anybody; with the numbers 1 to `count`.
fn enter_all(world: &mut World, invite: &InviteUse, count: u8) -> Vec<ConnectionId> {
    let all =
        (1..=count).map(|machine| world.enter(machine, using(machine, invite, &[]))).collect();
    world.pass(Duration::from_secs(1));
    all
}

#[test]
fn nodes_of_a_large_network_are_told_of_whom_they_ask_for_and_these_of_them() {
    let (mut world, invite) = large();
    let nodes = enter_all(&mut world, &invite, 6);
    let (asker, other, third) = (nodes[3], nodes[4], nodes[5]);
    assert!(knows(&world, asker).is_empty(), "nobody was asked for");
    assert_eq!(world.node(asker).members, Some(4), "as many as there were");
    world.pass(TICK_INTERVAL);
    assert_eq!(world.node(asker).members, Some(6));
    assert_eq!(knows(&world, nodes[0]), [2, 3], "who was there when the network became large");

    world.say(asker, find(&["10.77.0.5", "nobody", "10.77.0.99", "8.8.8.8", "00000004"]));
    world.pass(Duration::ZERO);
    assert_eq!(knows(&world, asker), [5], "at once");
    assert_eq!(knows(&world, other), [4], "and the other side too");
    assert!(knows(&world, third).is_empty());
    assert_eq!(world.node(asker).unknown, ["nobody", "10.77.0.99", "8.8.8.8"]);

    let at = WireCandidate { kind: 1, endpoint: "192.168.1.2:5000".parse().unwrap() };
    let moved = ClientMessage { candidates: Some(vec![at]), ..Default::default() };
    let epoch = world.node(third).epoch;
    world.say(other, moved);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.node(asker).peers[&5].candidates, [at]);
    assert_eq!(world.node(third).epoch, epoch, "whom it does not concern is told nothing");
}

#[test]
fn a_pair_is_forgotten_when_neither_side_uses_it() {
    let (mut world, invite) = large();
    let nodes = enter_all(&mut world, &invite, 5);
    world.say(nodes[3], find(&["00000005"]));
    world.say(nodes[4], find(&["00000004"]));
    world.pass(Duration::from_secs(1));
    let unused = |peer| ClientMessage { unused: Some(vec![peer, 77, 0]), ..Default::default() };
    world.say(nodes[3], unused(5));
    world.pass(Duration::from_secs(1));
    assert_eq!((knows(&world, nodes[3]), knows(&world, nodes[4])), (vec![5], vec![4]));
    world.say(nodes[4], unused(4));
    world.pass(Duration::from_secs(1));
    assert_eq!((knows(&world, nodes[3]), knows(&world, nodes[4])), (vec![], vec![]));
    world.say(nodes[3], find(&["node-5"]));
    world.pass(Duration::from_secs(1));
    assert_eq!((knows(&world, nodes[3]), knows(&world, nodes[4])), (vec![5], vec![4]));
}

#[test]
fn what_a_node_uses_it_says_when_it_comes_back_also_to_another_run_of_the_server() {
    let (mut world, invite) = large();
    let nodes = enter_all(&mut world, &invite, 5);
    world.disconnect(nodes[3]);
    let back = world.enter(4, using(4, &invite, &[5, 1, 4, 99]));
    assert_eq!(knows(&world, back), [1, 5], "and neither itself nor a stranger");
    world.pass(Duration::from_secs(1));
    assert_eq!(knows(&world, nodes[4]), [4], "its peers are told who comes");
    assert!(world.node(nodes[4]).peers[&4].online);
    world.disconnect(back);
    world.pass(Duration::from_secs(1));
    assert!(!world.node(nodes[4]).peers[&4].online, "its direct path may work all the same");
}

#[test]
fn a_removal_is_told_to_all_at_once_and_acknowledged_by_all() {
    let (mut world, invite) = large();
    let nodes = enter_all(&mut world, &invite, 5);
    world.say(nodes[3], find(&["00000005"]));
    world.pass(Duration::from_millis(1));
    let removed = world.ask(Request::Remove { node: "00000005".into() }).unwrap();
    let Some(Answer::Removed(removal)) = removed else { panic!("{removed:?}") };
    assert_eq!((removal.progress.acknowledged, removal.progress.online), (0, 4));
    world.pass(Duration::ZERO);
    assert!(knows(&world, nodes[3]).is_empty());
    for node in &nodes[..4] {
        let applied = Some(world.node(*node).epoch);
        world.say(*node, ClientMessage { applied, ..Default::default() });
    }
    let asked = world.ask(Request::Acknowledged { epoch: removal.epoch }).unwrap();
    let Some(Answer::Acknowledged(progress)) = asked else { panic!("{asked:?}") };
    assert_eq!((progress.acknowledged, progress.online), (4, 4));
}

#[test]
fn a_node_of_an_older_version_is_told_of_everybody() {
    let (mut world, invite) = large();
    let nodes = enter_all(&mut world, &invite, 4);
    let old = world.enter(9, hello(9, Some(&invite)));
    world.pass(Duration::from_secs(1));
    assert_eq!(knows(&world, old), [1, 2, 3, 4]);
    assert_eq!(world.node(old).members, None);
    world.enter(5, using(5, &invite, &[]));
    world.pass(Duration::from_secs(1));
    assert_eq!(knows(&world, old), [1, 2, 3, 4, 6]);
    assert!(knows(&world, nodes[3]).is_empty());
    world.say(nodes[3], find(&["00000005"]));
    world.pass(Duration::from_secs(1));
    assert_eq!(knows(&world, nodes[3]), [5]);
}

/// Anything that can happen to a large network of eight machines.
#[derive(Debug, Clone)]
enum Event {
    Enter(u8, Vec<u32>),
    Leave(u8),
    Move(u8, u16),
    Find(u8, u32),
    Unused(u8, u32),
    Remove(u8),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let machine = 1..9u8;
    let peer = 1..12u32;
    prop_oneof![
        4 => (machine.clone(), proptest::collection::vec(peer.clone(), 0..4))
            .prop_map(|(m, known)| Event::Enter(m, known)),
        1 => machine.clone().prop_map(Event::Leave),
        2 => (machine.clone(), 1..9u16).prop_map(|(m, port)| Event::Move(m, port)),
        4 => (machine.clone(), peer.clone()).prop_map(|(m, peer)| Event::Find(m, peer)),
        3 => (machine.clone(), peer).prop_map(|(m, peer)| Event::Unused(m, peer)),
        1 => machine.prop_map(Event::Remove),
        4 => (0..200u64).prop_map(Event::Pass),
    ]
}

fn is_member(world: &World, id: u32) -> bool {
    NodeId::new(id).is_some_and(|id| world.server.members.of(id).is_some())
}

proptest! {
    #[test]
    fn what_a_node_knows_is_true_and_known_to_both_sides(
        events in proptest::collection::vec(event(), 1..80)
    ) {
        let (mut world, mut invite) = large();
        let mut connections = BTreeMap::new();
        // What each machine has asked for and not let go of since it connected.
        let mut uses: BTreeMap<u8, BTreeSet<u32>> = BTreeMap::new();
        for event in events {
            match event {
                Event::Enter(machine, known) => {
                    let connection = world.enter(machine, using(machine, &invite, &known));
                    connections.insert(machine, connection);
                    // What does not exist yet cannot be used.
                    let is_there = |id: &u32| is_member(&world, *id);
                    uses.insert(machine, known.into_iter().filter(is_there).collect());
                }
                Event::Leave(machine) => {
                    if let Some(connection) = connections.remove(&machine) {
                        world.disconnect(connection);
                    }
                }
                Event::Move(machine, port) => {
                    if let Some(connection) = connections.get(&machine) {
                        let endpoint = SocketAddr::new("192.168.1.2".parse().unwrap(), port);
                        let candidates = Some(vec![WireCandidate { kind: 1, endpoint }]);
                        world.say(*connection, ClientMessage { candidates, ..Default::default() });
                    }
                }
                Event::Find(machine, peer) => {
                    if let Some(connection) = connections.get(&machine) {
                        world.say(*connection, find(&[&format!("{peer:08x}")]));
                        if is_member(&world, peer) {
                            uses.entry(machine).or_default().insert(peer);
                        }
                    }
                }
                Event::Unused(machine, peer) => {
                    if let Some(connection) = connections.get(&machine) {
                        let unused = Some(vec![peer]);
                        world.say(*connection, ClientMessage { unused, ..Default::default() });
                        uses.entry(machine).or_default().remove(&peer);
                    }
                }
                Event::Remove(number) => {
                    let _ = world.ask(Request::Remove { node: format!("{number:08x}") });
                    invite = world.open_invite(invite);
                }
                Event::Pass(ms) => world.pass(Duration::from_millis(ms)),
            }
        }
        world.pass(Duration::from_secs(1));
        let open = |machine: &u8| {
            let node = &world.nodes[connections.get(machine)?];
            (!node.closed).then_some(node)
        };
        let described = |id: u32| {
            let text = world.server.distribution.described(NodeId::new(id)?)?;
            Some(decode::<WirePeer>(text).unwrap())
        };
        for machine in 1..9 {
            let Some(node) = open(&machine) else { continue };
            let Some(own) = node.id else { continue };
            for (id, peer) in &node.peers {
                prop_assert_eq!(Some(peer.clone()), described(*id), "{} of {}", own, id);
            }
            let in_part = |id| world.server.distribution.parts.contains(NodeId::new(id).unwrap());
            let others = (1..9).filter_map(|other| Some((other, open(&other)?)));
            for (_, other) in others.filter(|_| in_part(own)) {
                let Some(id) = other.id.filter(|id| *id != own) else { continue };
                if uses[&machine].contains(&id) && described(id).is_some() {
                    prop_assert!(node.peers.contains_key(&id), "{} asked for {}", own, id);
                }
                // Who is told of everybody knows more.
                if in_part(id) {
                    let known = (node.peers.contains_key(&id), other.peers.contains_key(&own));
                    prop_assert_eq!(known.0, known.1, "{} and {}", own, id);
                }
            }
        }
    }
}
