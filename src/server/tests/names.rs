//! Who gives a node its name: itself, or the administrator; and names that mean rights.

use super::*;

fn rename(node: &str, name: &str) -> Request {
    Request::Rename { node: node.into(), name: name.parse().unwrap() }
}

/// Connects the machine with a wish; returns its connection and what that leaves in the log.
fn enter_as(
    world: &mut World,
    machine: u8,
    wish: &str,
    invite: Option<&InviteUse>,
) -> (ConnectionId, Vec<String>) {
    let connection = world.connect(machine);
    let hello = Some(Hello { name: Some(wish.into()), ..hello(machine, invite) });
    let message = ClientMessage { hello, ..Default::default() };
    let decision = world.server.handle_message(connection, message, WALL).unwrap();
    let events = world.server.events(&decision, "server", WALL);
    world.commit(decision);
    world.pass(Duration::from_secs(1));
    let kinds = events.into_iter().map(|event| event.kind);
    (connection, kinds.filter(|kind| kind.starts_with("node-")).collect())
}

/// An invite that gives this name.
fn named_invite(world: &mut World, uses: u32, name: &str) -> InviteUse {
    let name = Some(name.parse().unwrap());
    let request = Request::Invite { uses, ttl_s: 3600, name, tags: Vec::new() };
    let Some(Answer::Invited(invited)) = world.ask(request).unwrap() else { panic!("an invite") };
    let line: JoinLine = invited.join.expose().parse().unwrap();
    InviteUse { id: line.invite.0, secret: line.secret, network: line.network.0 }
}

#[test]
fn a_name_from_the_administrator_is_not_undone_by_a_wish() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let first = world.enter(1, hello(1, Some(&invite)));
    let peer = world.enter(2, hello(2, Some(&invite)));
    world.ask(rename("node", "bob")).unwrap();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(first).name, "bob", "it is told its own new name");
    assert_eq!(world.node(peer).peers[&1].name, "bob");
    let taken = world.ask(rename("bob", "node-2"));
    assert_eq!(taken, Err(RequestError::NameTaken { name: "node-2".parse().unwrap() }));
    // Nor is it given away by an invite: the node that joins with that would be called otherwise.
    let name = |name: &str| Some(name.parse().unwrap());
    let invite = |name| Request::Invite { uses: 1, ttl_s: 3600, name, tags: Vec::new() };
    let taken = world.ask(invite(name("node-2")));
    assert_eq!(taken, Err(RequestError::NameTaken { name: "node-2".parse().unwrap() }));
    assert!(world.ask(invite(name("node-3"))).is_ok(), "nobody has that name");
    let again = world.enter(1, hello(1, None));
    assert_eq!(world.node(again).name, "bob");
    let (wish, events) = enter_as(&mut world, 1, "carol", None);
    assert_eq!((world.node(wish).name.as_str(), events.len()), ("bob", 0));
    let (own, events) = enter_as(&mut world, 2, "carol", None);
    assert_eq!(
        (world.node(own).name.as_str(), &events[..]),
        ("carol", &["node-renamed".into()][..])
    );

    // The name of an invite is the administrator's, too; and so is one that it has and is given.
    let invite = named_invite(&mut world, 1, "dave");
    let (dave, _) = enter_as(&mut world, 3, "laptop", Some(&invite));
    assert_eq!(world.node(dave).name, "dave");
    let decision = world.server.decide(rename("carol", "carol"), WALL).unwrap();
    let events = world.server.events(&decision, "administrator uid 0", WALL);
    assert_eq!(events[0].kind, "node-renamed");
    world.commit(decision);
    for (machine, name) in [(3, "dave"), (2, "carol")] {
        let (still, _) = enter_as(&mut world, machine, "other", None);
        assert_eq!(world.node(still).name, name);
    }
}

#[test]
fn no_wish_gets_a_name_that_access_rules_know() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(9);
    let (alice, _) = enter_as(&mut world, 1, "alice", Some(&invite));
    enter_as(&mut world, 2, "bob", Some(&invite));
    let text = "[groups]\nadmins = ['alice', 'carol', 'carol-2']\n\
                [[rules]]\nfrom = 'admins'\nto = 'any'\nprotocol = 'any'\n";
    world.ask(Request::PolicySet { text: text.into() }).unwrap();
    let admins = |world: &World, node| {
        let Some(rules) = &world.node(node).filter.rules else { panic!("no rules") };
        rules.first().and_then(|rule| rule.sources.clone()).unwrap_or_default()
    };
    let (_, events) = enter_as(&mut world, 2, "carol", None);
    assert_eq!(events, ["node-name-refused", "node-renamed"]);
    assert_eq!(world.node(alice).name, "alice", "who has it keeps it");
    assert_eq!(world.node(alice).peers[&2].name, "carol-3");
    assert_eq!(admins(&world, alice), [(1, 1)]);

    // Nor when it is free again, by a new one or one that is there; the same wish is refused once.
    world.ask(Request::Remove { node: "alice".into() }).unwrap();
    let invite = world.invite(9);
    let (thief, events) = enter_as(&mut world, 3, "alice", Some(&invite));
    assert_eq!((world.node(thief).name.as_str(), events.len()), ("alice-2", 2));
    assert_eq!(events, ["node-joined", "node-name-refused"]);
    let (bob, events) = enter_as(&mut world, 2, "alice", None);
    assert_eq!((world.node(bob).name.as_str(), events.len()), ("alice-3", 2));
    let (bob, events) = enter_as(&mut world, 2, "alice", None);
    assert_eq!((world.node(bob).name.as_str(), events.len()), ("alice-3", 0));
    assert!(admins(&world, thief).is_empty());

    // The administrator gives it: by an invite, of which one node has that name, and by `rename`.
    let carol = named_invite(&mut world, 2, "carol");
    let (first, events) = enter_as(&mut world, 4, "laptop", Some(&carol));
    assert_eq!(
        (world.node(first).name.as_str(), &events[..]),
        ("carol", &["node-joined".into()][..])
    );
    let (second, _) = enter_as(&mut world, 5, "laptop", Some(&carol));
    assert_eq!(world.node(second).name, "carol-3", "rules know another carol-2");
    world.ask(rename("alice-2", "alice")).unwrap();
    world.pass(Duration::from_secs(1));
    assert_eq!(admins(&world, bob), [(3, 4)]);

    // Without the rules a name is a name.
    world.ask(Request::PolicyClear).unwrap();
    let (free, events) = enter_as(&mut world, 2, "carol-2", None);
    assert_eq!(
        (world.node(free).name.as_str(), &events[..]),
        ("carol-2", &["node-renamed".into()][..])
    );
}
