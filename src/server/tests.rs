//! The server as its driver sees it, with a store of a few lines and nodes that only keep a netmap.

mod clones;
mod expiry;
mod keys;
mod names;
mod parts;
mod removal;
mod rules;

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::admin::{Answer, Request, RequestError};
use super::*;
use crate::testing::epoch;
use crate::types::{NetworkId, OverlayRange, SecretKey};
use crate::wire::control::{
    Hello, InviteUse, NetmapUpdate, Standing, WireCandidate, WirePeer, decode,
};
use crate::wire::filter::{KIND_ANY, KIND_TCP, WireFilter, WireRule};
use crate::wire::join::JoinLine;

const WALL: u64 = 1_800_000_000;

/// A server, the revision of its store, and what every connection was sent.
struct World {
    server: Server,
    rev: u64,
    now: Instant,
    store_works: bool,
    nodes: BTreeMap<ConnectionId, Node>,
    next_connection: u64,
}

/// What a node knows.
#[derive(Debug, Default)]
struct Node {
    id: Option<u32>,
    name: String,
    epoch: u64,
    peers: BTreeMap<u32, WirePeer>,
    filter: WireFilter,
    refused: Option<RefusedCode>,
    /// In the server's words.
    told: String,
    rival: Option<SocketAddr>,
    node_key: Option<[u8; 32]>,
    standing: Option<Standing>,
    members: Option<u32>,
    unknown: Vec<String>,
    ticks: usize,
    closed: bool,
}

impl Node {
    fn hear(&mut self, message: ServerMessage) {
        if let Some(welcome) = message.welcome {
            self.id = Some(welcome.id);
            self.name = welcome.name;
        }
        if let Some(refused) = message.refused {
            self.refused = Some(refused.reason());
            self.told.clone_from(&refused.message);
        }
        self.ticks += usize::from(message.tick.is_some());
        self.rival = message.rival.or(self.rival);
        self.node_key = message.node_key.or(self.node_key);
        self.standing = message.standing.or(self.standing);
        self.members = message.members.or(self.members);
        self.unknown.extend(message.unknown.into_iter().flatten());
        if let Some(NetmapUpdate {
            from,
            to,
            peers,
            removed,
            own_name,
            filter,
            members,
            forgotten,
        }) = message.netmap
        {
            self.members = members.or(self.members);
            for gone in forgotten.into_iter().flatten() {
                self.peers.remove(&gone);
            }
            match (from, filter) {
                (_, Some(filter)) => self.filter = filter,
                (None, None) => self.filter = WireFilter::default(),
                (Some(_), None) => {}
            }
            match from {
                None => self.peers.clear(),
                Some(from) => assert_eq!(from, self.epoch, "no delta is left out"),
            }
            self.epoch = to;
            for gone in removed {
                self.peers.remove(&gone);
            }
            for peer in peers {
                assert_ne!(Some(peer.id), self.id, "nobody is its own peer");
                self.peers.insert(peer.id, peer);
            }
            self.name = own_name.unwrap_or(std::mem::take(&mut self.name));
        }
    }
}

impl World {
    fn new(range: &str) -> Self {
        let range =
            OverlayRange::new(range.parse().unwrap(), "fd12:3456:789a::/48".parse().unwrap());
        let record = NetworkRecord {
            id: NetworkId([7; 8]),
            range: range.unwrap(),
            created: WALL,
            members_last_s: None,
            server_key: None,
        };
        let records = Records {
            network: Versioned { rev: 1, record },
            members: Vec::new(),
            invites: Vec::new(),
            policy: None,
            highest_node: 0,
        };
        let settings = Settings {
            server_key: SecretKey::from_bytes([1; 32]).public(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            whole_netmap_up_to: WHOLE_NETMAP_UP_TO,
        };
        Self {
            server: Server::new(settings, records, [3; 32], epoch(), WALL),
            rev: 1,
            now: epoch(),
            store_works: true,
            nodes: BTreeMap::new(),
            next_connection: 1,
        }
    }

    fn commit(&mut self, decision: Decision) -> Option<Answer> {
        let answer = if self.store_works || decision.changes().is_empty() {
            self.rev += 1;
            self.server.apply(decision, self.rev, WALL)
        } else {
            self.server.give_up(decision);
            None
        };
        self.deliver();
        answer
    }

    fn deliver(&mut self) {
        while let Some(output) = self.server.poll_output() {
            match output {
                Output::Send { connection, message } => {
                    if let Some(node) = self.nodes.get_mut(&connection) {
                        node.hear(decode(&message).unwrap());
                    }
                }
                Output::Close { connection } => {
                    if let Some(node) = self.nodes.get_mut(&connection) {
                        node.closed = true;
                    }
                    self.server.handle_disconnected(connection, WALL);
                }
                Output::Relay(_) => {}
            }
        }
    }

    fn connect(&mut self, machine: u8) -> ConnectionId {
        let connection = ConnectionId(self.next_connection);
        self.next_connection += 1;
        let about = Connected {
            machine_key: PublicKey([machine; 32]),
            observed: "203.0.113.9:1234".parse().unwrap(),
            relay_port: Some(41820),
            second_port: Some(41821),
        };
        self.server.handle_connected(connection, about);
        self.nodes.insert(connection, Node::default());
        connection
    }

    fn say(&mut self, connection: ConnectionId, message: ClientMessage) {
        if let Some(decision) = self.server.handle_message(connection, message, WALL) {
            self.commit(decision);
        }
        self.deliver();
    }

    fn disconnect(&mut self, connection: ConnectionId) {
        self.server.handle_disconnected(connection, WALL);
        if let Some(node) = self.nodes.get_mut(&connection) {
            node.closed = true;
        }
        self.deliver();
    }

    /// Connects the machine and lets it say hello.
    fn enter(&mut self, machine: u8, hello: Hello) -> ConnectionId {
        let connection = self.connect(machine);
        let hello = Some(hello);
        self.say(connection, ClientMessage { hello, ..Default::default() });
        connection
    }

    fn ask(&mut self, request: Request) -> Result<Option<Answer>, RequestError> {
        let decision = self.server.decide(request, WALL)?;
        Ok(self.commit(decision))
    }

    fn invite(&mut self, uses: u32) -> InviteUse {
        let request = Request::Invite { uses, ttl_s: 3600, name: None, tags: Vec::new() };
        let Some(Answer::Invited(invited)) = self.ask(request).unwrap() else {
            panic!("an invite is answered with an invite");
        };
        let line: JoinLine = invited.join.expose().parse().unwrap();
        InviteUse { id: line.invite.0, secret: line.secret, network: line.network.0 }
    }

    /// This invite, or a new one in place of one that has gone with a node.
    fn open_invite(&mut self, invite: InviteUse) -> InviteUse {
        let closed = self.server.invites.check(&invite, WALL).is_err();
        if closed && self.store_works { self.invite(1000) } else { invite }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.server.handle_timeout(self.now);
        self.deliver();
    }

    fn node(&self, connection: ConnectionId) -> &Node {
        &self.nodes[&connection]
    }
}

fn hello(machine: u8, invite: Option<&InviteUse>) -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        software: "test".into(),
        node_key: [machine.wrapping_add(100); 32],
        name: Some("node".into()),
        invite: invite.cloned(),
        candidates: Vec::new(),
        instance: None,
        known: None,
    }
}

#[test]
fn of_two_nodes_with_one_invite_exactly_one_gets_in() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(1);
    let first = world.connect(1);
    let second = world.connect(2);
    for (connection, machine) in [(second, 2), (first, 1)] {
        let hello = Some(hello(machine, Some(&invite)));
        world.say(connection, ClientMessage { hello, ..Default::default() });
    }
    assert_eq!(world.node(second).id, Some(1));
    assert_eq!(world.node(first).refused, Some(RefusedCode::InviteUsedUp));
    assert!(world.node(first).closed);
}

#[test]
fn a_repeated_join_gives_the_same_node_and_costs_no_use() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let first = world.enter(1, hello(1, Some(&invite)));
    let again = world.enter(1, hello(1, Some(&invite)));
    assert_eq!(world.node(first).refused, Some(RefusedCode::Replaced), "the newer one counts");
    assert_eq!(world.node(again).id, world.node(first).id);
    let other = world.enter(2, hello(2, Some(&invite)));
    assert_eq!(world.node(other).id, Some(2), "the second use is still there");
    assert_eq!(world.node(other).name, "node-2");
}

#[test]
fn a_failed_commit_changes_nothing() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(1);
    world.store_works = false;
    let failed = world.enter(1, hello(1, Some(&invite)));
    assert_eq!(world.node(failed).refused, Some(RefusedCode::Unavailable));
    assert!(world.node(failed).told.contains("disk"), "{}", world.node(failed).told);
    assert!(world.server.has_no_members());
    world.store_works = true;
    let node = world.enter(2, hello(2, Some(&invite)));
    assert_eq!(world.node(node).id, Some(1), "the invite was not used, the number not given");
    world.store_works = false;
    assert_eq!(world.ask(Request::Remove { node: "node".into() }).unwrap(), None);
    assert!(!world.node(node).closed && !world.server.has_no_members());
}

#[test]
fn who_is_no_member_is_told_so_and_nothing_else() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(1);
    let code = |world: &mut World, hello| {
        let connection = world.enter(9, hello);
        assert!(world.node(connection).closed);
        world.node(connection).refused
    };
    assert_eq!(code(&mut world, hello(9, None)), Some(RefusedCode::NotMember));
    let mut foreign = invite.clone();
    foreign.network = [0; 8];
    assert_eq!(code(&mut world, hello(9, Some(&foreign))), Some(RefusedCode::WrongNetwork));
    let newer = Hello { min_version: 2, max_version: 3, ..hello(9, Some(&invite)) };
    assert_eq!(code(&mut world, newer), Some(RefusedCode::Version));
    let no_key = Hello { node_key: [0; 32], ..hello(9, Some(&invite)) };
    assert_eq!(code(&mut world, no_key), Some(RefusedCode::BadRequest));
    let connection = world.connect(9);
    world.say(connection, ClientMessage { ping: Some(1), ..Default::default() });
    assert_eq!(world.node(connection).refused, Some(RefusedCode::BadRequest));
}

#[test]
fn what_comes_behind_a_refusal_counts_for_nothing() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(1);
    let connection = world.connect(9);
    let mut say = |message: ClientMessage| {
        let decision = world.server.handle_message(connection, message, WALL);
        let did = decision.is_some();
        if let Some(decision) = decision {
            world.server.apply(decision, 2, WALL);
        }
        (did, std::iter::from_fn(|| world.server.poll_output()).count())
    };
    let ping = || ClientMessage { ping: Some(1), ..Default::default() };
    assert_eq!(say(ping()), (true, 2), "a refusal, and the end");
    for _ in 0..800 {
        assert_eq!(say(ping()), (false, 0));
    }
    let late = ClientMessage { hello: Some(hello(9, Some(&invite))), ..Default::default() };
    assert_eq!(say(late), (false, 0), "not even with an invite");
}

#[test]
fn a_node_cannot_take_the_key_of_another() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    world.enter(1, hello(1, Some(&invite)));
    let thief = world.enter(2, Hello { node_key: [101; 32], ..hello(2, Some(&invite)) });
    assert_eq!(world.node(thief).refused, Some(RefusedCode::BadRequest));
}

#[test]
fn a_stranger_learns_neither_whose_keys_there_are_nor_which_network_it_is() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    world.enter(1, hello(1, Some(&invite)));
    let guess = InviteUse { secret: crate::wire::join::InviteSecret([0; 20]), ..invite };
    let foreign = InviteUse { network: [0; 8], ..guess.clone() };
    for (asked, answer) in [
        (None, RefusedCode::NotMember),
        (Some(&guess), RefusedCode::NotAccepted),
        (Some(&foreign), RefusedCode::NotAccepted),
    ] {
        for node_key in [[101; 32], [102; 32]] {
            let stranger = world.enter(9, Hello { node_key, ..hello(9, asked) });
            assert_eq!(world.node(stranger).refused, Some(answer), "{node_key:?}");
        }
    }
}

#[test]
fn a_removed_node_is_out_at_once_and_stays_out() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(3);
    let staying = world.enter(1, hello(1, Some(&invite)));
    let leaving = world.enter(2, hello(2, Some(&invite)));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(staying).peers.len(), 1);
    world.ask(Request::Remove { node: "10.77.0.2".into() }).unwrap();
    assert_eq!(world.node(leaving).refused, Some(RefusedCode::NotMember));
    world.pass(Duration::from_millis(50));
    assert!(world.node(staying).peers.is_empty());
    let again = world.enter(2, hello(2, None));
    assert_eq!(world.node(again).refused, Some(RefusedCode::NotMember));
    let same_line = world.enter(2, hello(2, Some(&invite)));
    assert_eq!(world.node(same_line).refused, Some(RefusedCode::InviteRevoked));
    let invite = world.invite(1);
    let joined = world.enter(2, hello(2, Some(&invite)));
    assert_eq!(world.node(joined).id, Some(3), "a new node, with a number of its own");
    let unknown = world.ask(Request::Remove { node: "nobody".into() });
    assert_eq!(unknown, Err(RequestError::UnknownNode { node: "nobody".into() }));
}

#[test]
fn a_new_node_key_is_stored_and_told_to_the_others() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let peer = world.enter(1, hello(1, Some(&invite)));
    world.enter(2, hello(2, Some(&invite)));
    world.enter(2, Hello { node_key: [99; 32], ..hello(2, None) });
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(peer).peers[&2].node_key, [99; 32]);
}

#[test]
fn a_full_network_says_so() {
    let mut world = World::new("10.77.0.0/29");
    let invite = world.invite(10);
    for machine in 1..=6 {
        world.enter(machine, hello(machine, Some(&invite)));
    }
    let late = world.enter(7, hello(7, Some(&invite)));
    assert_eq!(world.node(late).refused, Some(RefusedCode::NetworkFull));
}

#[test]
fn every_connection_hears_a_tick_and_its_ping() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(1);
    let connection = world.enter(1, hello(1, Some(&invite)));
    world.pass(Duration::from_secs(1));
    let at = world.server.poll_timeout();
    assert_eq!(at, epoch() + TICK_INTERVAL, "nothing else is pending");
    world.server.handle_timeout(at);
    let message = ClientMessage { ping: Some(5), ..Default::default() };
    assert!(world.server.handle_message(connection, message, WALL).is_none());
    let mut heard = Vec::new();
    while let Some(Output::Send { message, .. }) = world.server.poll_output() {
        heard.push(decode::<ServerMessage>(&message).unwrap());
    }
    assert_eq!(heard.len(), 2);
    assert_eq!(heard[0].tick, Some(world.node(connection).epoch));
    assert_eq!(heard[1].pong, Some(5));
}

#[test]
fn peers_are_told_where_the_relay_saw_a_node_before_it_tells_them() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let alice = world.enter(1, hello(1, Some(&invite)));
    let at = |kind, text: &str| WireCandidate { kind, endpoint: text.parse().unwrap() };
    let host = at(1, "192.168.1.2:5000");
    let bob = world.enter(2, Hello { candidates: vec![host], ..hello(2, Some(&invite)) });
    world.pass(Duration::from_secs(1));
    let node = NodeId::new(2).unwrap();
    let announced = vec![at(2, "203.0.113.9:7"), host];
    for (seen, expected) in [
        ("203.0.113.9:6", vec![at(2, "203.0.113.9:6"), host]),
        ("203.0.113.9:7", announced.clone()),
        ("10.77.0.9:7", announced.clone()),
        ("127.0.0.1:7", announced.clone()),
    ] {
        world.server.note_reflexive(node, seen.parse().unwrap());
        world.pass(Duration::from_secs(1));
        assert_eq!(world.node(alice).peers[&2].candidates, expected, "{seen}");
    }
    let epoch = world.node(alice).epoch;
    world.say(bob, ClientMessage { candidates: Some(announced), ..Default::default() });
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(alice).epoch, epoch, "the node says the same: nothing is new");
}

#[test]
fn candidates_inside_the_overlay_are_left_out() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let peer = world.enter(1, hello(1, Some(&invite)));
    let at = |text: &str| WireCandidate { kind: 1, endpoint: text.parse().unwrap() };
    let candidates = vec![at("10.77.0.9:1"), at("192.168.1.2:1"), at("127.0.0.1:1")];
    world.enter(2, Hello { candidates, ..hello(2, Some(&invite)) });
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(peer).peers[&2].candidates, vec![at("192.168.1.2:1")]);
}

/// Rules that let the node `admin` do everything, and everybody reach the web nodes at `port`.
fn rules(admin: &str, port: u16) -> String {
    format!(
        "[groups]\nadmins = '{admin}'\nweb = 'tag:web'\n\
         [[rules]]\nfrom = 'admins'\nto = 'any'\nprotocol = 'any'\n\
         [[rules]]\nfrom = 'any'\nto = 'web'\nprotocol = 'tcp'\nports = {port}\n"
    )
}

#[test]
fn each_node_is_told_its_rules_and_every_change_of_them() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(2);
    let alice = world.enter(1, hello(1, Some(&invite)));
    let bob = world.enter(2, hello(2, Some(&invite)));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(bob).filter, WireFilter::default(), "everybody may, at first");

    world.ask(Request::PolicySet { text: rules("node", 443) }).unwrap();
    world.pass(Duration::from_secs(1));
    let admin = WireRule { kind: KIND_ANY, sources: Some(vec![(1, 1)]), ports: None };
    let web = WireRule { kind: KIND_TCP, sources: None, ports: Some(vec![(443, 443)]) };
    let filter = |rules: &[&WireRule]| WireFilter {
        rules: Some(rules.iter().map(|rule| (*rule).clone()).collect()),
    };
    assert_eq!(world.node(bob).filter, filter(&[&admin]));

    let tags = vec!["web".parse().unwrap()];
    world.ask(Request::Tag { node: "node-2".into(), tags }).unwrap();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(bob).filter, filter(&[&admin, &web]));
    assert_eq!(world.node(alice).filter, filter(&[&admin]));

    world.ask(Request::Rename { node: "node".into(), name: "root".parse().unwrap() }).unwrap();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(bob).filter, filter(&[&web]), "the admin is called something else");

    let again = world.enter(2, hello(2, None));
    assert_eq!(world.node(again).filter, filter(&[&web]), "a login is told at once");
    world.ask(Request::PolicyClear).unwrap();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(again).filter, WireFilter::default());
    world.ask(Request::PolicySet { text: rules("root", 80) }).unwrap();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.node(alice).filter, filter(&[&admin]), "rules can come back");
}

#[test]
fn an_invite_gives_its_tags_to_the_node_that_joins() {
    let mut world = World::new("10.77.0.0/20");
    let tags = vec!["web".parse().unwrap(), "web".parse().unwrap(), "db".parse().unwrap()];
    let request = Request::Invite { uses: 1, ttl_s: 3600, name: None, tags };
    let Some(Answer::Invited(invited)) = world.ask(request).unwrap() else { panic!("an invite") };
    let line: JoinLine = invited.join.expose().parse().unwrap();
    let invite = InviteUse { id: line.invite.0, secret: line.secret, network: line.network.0 };
    world.enter(1, hello(1, Some(&invite)));
    let Some(Answer::Nodes(list)) = world.ask(Request::Nodes).unwrap() else { panic!("nodes") };
    let tags: Vec<String> = list.nodes[0].tags.iter().map(ToString::to_string).collect();
    assert_eq!(tags, ["tag:db", "tag:web"], "each once");
}

#[test]
fn rules_that_make_no_sense_or_fail_their_tests_are_not_set() {
    let mut world = World::new("10.77.0.0/20");
    let test = "[[tests]]\nfrom = 'a'\nto = 'b'\nprotocol = 'icmp'\nexpect = 'allow'\n";
    for (text, said) in [("[[rule]]", "line 1, column 3: unknown key"), (test, "line 1 fails")] {
        let refused = world.ask(Request::PolicySet { text: text.into() });
        let Err(RequestError::BadPolicy { reason }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains(said), "{reason}");
    }
    let Some(Answer::Policy(shown)) = world.ask(Request::PolicyShow).unwrap() else {
        panic!("a policy")
    };
    assert_eq!((shown.text, shown.rules), (None, 0));
}

/// Anything that can happen to a network of eight machines.
#[derive(Debug, Clone)]
enum Event {
    Enter(u8),
    Leave(u8),
    Move(u8, u16),
    Remove(u8),
    Rename(u8, u8),
    Rekey(u8, u8),
    Tag(u8, bool),
    Policy(Option<u8>),
    StoreFails(bool),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let machine = 1..9u8;
    prop_oneof![
        4 => machine.clone().prop_map(Event::Enter),
        1 => machine.clone().prop_map(Event::Leave),
        2 => (machine.clone(), 1..9u16).prop_map(|(m, port)| Event::Move(m, port)),
        1 => machine.clone().prop_map(Event::Remove),
        1 => (machine.clone(), 0..4u8).prop_map(|(m, name)| Event::Rename(m, name)),
        1 => (machine.clone(), 200..210u8).prop_map(|(m, key)| Event::Rekey(m, key)),
        1 => (machine, any::<bool>()).prop_map(|(m, web)| Event::Tag(m, web)),
        1 => proptest::option::of(1..4u8).prop_map(Event::Policy),
        1 => any::<bool>().prop_map(Event::StoreFails),
        4 => (0..200u64).prop_map(Event::Pass),
    ]
}

proptest! {
    #[test]
    fn deltas_in_order_give_the_same_as_the_whole_netmap_and_no_address_twice(
        events in proptest::collection::vec(event(), 1..60)
    ) {
        let mut world = World::new("10.77.0.0/29");
        let mut invite = world.invite(1000);
        let mut connections = BTreeMap::new();
        for event in events {
            match event {
                Event::Enter(machine) => {
                    let connection = world.enter(machine, hello(machine, Some(&invite)));
                    connections.insert(machine, connection);
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
                Event::Remove(number) => {
                    let node = format!("{number:08x}");
                    let _ = world.ask(Request::Remove { node });
                    invite = world.open_invite(invite);
                }
                Event::Rename(number, name) => {
                    let (node, name) = (format!("{number:08x}"), format!("name-{name}"));
                    let _ = world.ask(Request::Rename { node, name: name.parse().unwrap() });
                }
                Event::Rekey(machine, key) => {
                    let hello = Hello { node_key: [key; 32], ..hello(machine, Some(&invite)) };
                    let connection = world.enter(machine, hello);
                    connections.insert(machine, connection);
                }
                Event::Tag(number, web) => {
                    let tags = web.then(|| "web".parse().unwrap()).into_iter().collect();
                    let _ = world.ask(Request::Tag { node: format!("{number:08x}"), tags });
                }
                Event::Policy(port) => {
                    let request = port.map_or(Request::PolicyClear, |port| Request::PolicySet {
                        text: rules(&format!("name-{port}"), port.into()),
                    });
                    world.ask(request).unwrap();
                }
                Event::StoreFails(fails) => world.store_works = !fails,
                Event::Pass(ms) => world.pass(Duration::from_millis(ms)),
            }
        }
        world.pass(Duration::from_secs(1));
        let addresses: Vec<u32> = world.server.members.iter().map(|member| member.host).collect();
        let mut unique = addresses.clone();
        unique.sort_unstable();
        unique.dedup();
        prop_assert_eq!(addresses.len(), unique.len(), "an address was given twice");
        for node in world.nodes.values().filter(|node| !node.closed) {
            let Some(id) = node.id.and_then(NodeId::new) else { continue };
            let mut fresh = Node { id: node.id, ..Node::default() };
            let filter = world.server.access.whole_for(id, &world.server.members);
            let whole = world.server.distribution.full(id, filter.as_deref());
            fresh.hear(decode(&whole).unwrap());
            prop_assert_eq!(&node.peers, &fresh.peers);
            prop_assert_eq!(&node.filter, &fresh.filter);
            prop_assert_eq!(node.epoch, fresh.epoch);
            let name = &world.server.members.of(id).unwrap().record.name;
            prop_assert_eq!(node.name.as_str(), name.as_str());
        }
    }
}
