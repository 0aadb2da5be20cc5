//! Behind the parsers: a node and a server that are told anything, in any order, by whoever may talk
//! to them. They keep their bounds, and say nothing that cannot be read.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use overlay::dataplane::{Source, TunBatch, UdpBatch, inbound, outbound};
use overlay::node::{MAX_EXTRA_SOCKETS, Netmap, Node, NodeSettings, SocketOrder};
use overlay::server::admin;
use overlay::server::records::{MemberRecord, NetworkRecord, Records, Versioned};
use overlay::server::relay::limit::Limits;
use overlay::server::relay::{Arrival, RelayTable, SocketId, Verdict};
use overlay::server::{Connected, ConnectionId, Decision, Output, Server, Settings};
use overlay::types::{InviteId, NetworkId, NodeId, OverlayRange, PublicKey, SecretKey};
use overlay::wire::control::{
    ClientMessage, Hello, NetmapUpdate, ServerMessage, Welcome, WireCandidate, WirePeer, decode,
    encode,
};
use overlay::wire::disco::{self, DiscoKeys};
use overlay::wire::relay::{Control, RelayKey, data_header};

use super::{Feed, epoch};

/// Events in one play; what comes behind them has no effect.
const EVENTS: usize = 100;
const WALL: u64 = 1_800_000_000;
const RELAY_KEY: [u8; 32] = [9; 32];

/// A node with two peers, told anything by the server, the peers and strangers.
pub(crate) fn node(bytes: &[u8]) {
    let mut feed = Feed::new(bytes);
    let mut world = NodeWorld::new();
    for _ in 0..EVENTS {
        let Some(event) = feed.byte() else { return };
        world.event(event, &mut feed);
        world.drain();
    }
}

struct NodeWorld {
    node: Node,
    now: Instant,
    extra_sockets: usize,
}

fn relay_addr() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 1], 41820))
}

fn endpoint(number: u8) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, number], 4000))
}

fn secret(number: u8) -> SecretKey {
    SecretKey::from_bytes([number; 32])
}

fn wire_peer(number: u8, key: u8) -> WirePeer {
    WirePeer {
        id: u32::from(number),
        name: format!("peer{number}"),
        node_key: secret(key).public().0,
        ipv4: Ipv4Addr::new(10, 77, 0, number),
        ipv6: format!("fd00:1:2::{number:x}").parse().expect("an address"),
        online: true,
        candidates: vec![WireCandidate { kind: 0, endpoint: endpoint(number) }],
        expires: None,
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        network: [7; 8],
        id: 1,
        name: "own".into(),
        ipv4: Ipv4Addr::new(10, 77, 0, 1),
        ipv6: "fd00:1:2::1".parse().expect("an address"),
        ipv4_prefix_len: 20,
        ipv6_prefix_len: 48,
        relay_key: RELAY_KEY,
        relay_port: Some(41820),
        second_port: Some(41821),
        observed: Some(endpoint(1)),
        server_addresses: Vec::new(),
    }
}

impl NodeWorld {
    fn new() -> Self {
        let settings = NodeSettings::default();
        let now = epoch();
        let node = Node::new(secret(1), Netmap::default(), settings, [7; 32], 1, now);
        let mut world = Self { node, now, extra_sockets: 0 };
        world.node.handle_host_endpoints(vec![endpoint(1)], now);
        let peers = vec![wire_peer(2, 2), wire_peer(3, 3)];
        let netmap = Some(NetmapUpdate { to: 1, peers, ..Default::default() });
        let welcome = Some(welcome());
        world.hear(&ServerMessage { welcome, netmap, ..Default::default() });
        world.drain();
        world
    }

    fn event(&mut self, event: u8, feed: &mut Feed<'_>) {
        // The upper half says from whom it comes.
        let number = 2 + (event >> 4) % 4;
        match event & 0x0f {
            0 => {
                if let Ok(message) = decode::<ServerMessage>(feed.part()) {
                    self.hear(&message);
                }
            }
            1 => self.arrive(Source::udp(endpoint(number), None), feed.part()),
            2 => self.arrive(Source::Link, feed.part()),
            3 => {
                let disco = sealed(number, feed.part());
                self.arrive(Source::udp(endpoint(number), None), &disco.unwrap_or_default());
            }
            4 => {
                if let (Some(disco), Some(node)) =
                    (sealed(number, feed.part()), NodeId::new(u32::from(number)))
                {
                    let datagram = [&data_header(node)[..], &disco].concat();
                    let way = if event & 0x40 == 0 {
                        Source::Link
                    } else {
                        Source::udp(relay_addr(), None)
                    };
                    self.arrive(way, &datagram);
                }
            }
            5 => {
                if let Ok(control) = Control::parse(feed.part()) {
                    let key = RelayKey(RELAY_KEY);
                    self.arrive(Source::udp(relay_addr(), None), &control.encode(Some(&key)));
                }
            }
            6 => self.leave(feed.part()),
            7 => self.leave(&packet_to(number)),
            8 => self.hear_of(number, feed.byte().unwrap_or_default()),
            9 => self.node.handle_link_down(self.now),
            10 => self.node.handle_network_change(self.now),
            11 => self.node.handle_wake(event & 0x10 != 0, self.now),
            12 => {
                let from = relay_addr();
                self.node.handle_scratch(from, feed.part(), self.now);
            }
            13 => {
                let known = NodeId::new(u32::from(number));
                let _ = known.map(|id| self.node.request_report(id, self.now));
            }
            _ => self.wait(feed.byte().unwrap_or_default()),
        }
    }

    fn hear(&mut self, message: &ServerMessage) {
        self.node.handle_message(message, relay_addr(), self.now);
    }

    /// A peer is new, has another key or is gone, as the server would say it.
    fn hear_of(&mut self, number: u8, what: u8) {
        let from = self.node.netmap().epoch;
        let to = from.wrapping_add(1);
        let mut update = NetmapUpdate { from: Some(from), to, ..Default::default() };
        match what % 4 {
            0 => update.removed = vec![u32::from(number)],
            1 => update.forgotten = Some(vec![u32::from(number)]),
            _ => update.peers = vec![wire_peer(number, what % 8)],
        }
        self.hear(&ServerMessage { netmap: Some(update), ..Default::default() });
    }

    fn arrive(&mut self, source: Source, datagram: &[u8]) {
        let shared = Arc::clone(self.node.shared());
        let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
        inbound(&shared, &shared.table(), source, datagram, self.now, &mut tun, &mut notes);
        assert!(tun.is_empty(), "nobody here has a session");
        for note in notes {
            self.node.handle_note(note, self.now);
        }
    }

    fn leave(&mut self, packet: &[u8]) {
        let shared = Arc::clone(self.node.shared());
        let (mut batch, mut notes) = (UdpBatch::default(), Vec::new());
        outbound(&shared, &shared.table(), [packet], self.now, &mut batch, &mut notes);
        for note in notes {
            self.node.handle_note(note, self.now);
        }
    }

    fn wait(&mut self, how_long: u8) {
        let turns = 1 + how_long / 32;
        let step = Duration::from_millis(1 << (how_long % 16));
        for _ in 0..turns {
            self.now += step;
            self.node.handle_timeout(self.now);
        }
    }

    fn drain(&mut self) {
        let node = &mut self.node;
        for order in node.take_socket_orders() {
            match order {
                SocketOrder::Open { .. } => self.extra_sockets += 1,
                SocketOrder::Close { .. } => self.extra_sockets -= 1,
            }
        }
        assert!(self.extra_sockets <= MAX_EXTRA_SOCKETS, "extra sockets are bounded");
        let mut batch = UdpBatch::default();
        node.take_datagrams(&mut batch);
        let mut sent = batch.datagrams().count();
        while node.poll_opener().is_some() || node.poll_whole_probe().is_some() {
            sent += 1;
        }
        while node.poll_scratch().is_some() || node.poll_packet().is_some() {
            sent += 1;
        }
        assert!(sent <= 4_000, "a flood: {sent}");
        while let Some(message) = node.poll_message() {
            let text = encode(&message);
            assert_eq!(decode::<ClientMessage>(&text).ok(), Some(message), "it can be read");
        }
        while node.poll_event().is_some() {}
        let saved = serde_json::to_vec(node.netmap()).expect("a netmap can be saved");
        let read: Result<Netmap, _> = serde_json::from_slice(&saved);
        assert!(read.is_ok(), "a saved netmap can be read: {read:?}");
    }
}

fn packet_to(number: u8) -> [u8; 21] {
    [0x45, 0, 0, 21, 0, 0, 0, 0, 64, 17, 0, 0, 10, 77, 0, 1, 10, 77, 0, number, 1]
}

/// A disco message, sealed as the peer of this number would.
fn sealed(number: u8, message: &[u8]) -> Option<Vec<u8>> {
    let keys = match number {
        2 => DiscoKeys::derive(&secret(2), &secret(1).public()),
        _ => DiscoKeys::derive(&secret(3), &secret(1).public()),
    };
    let message = disco::Message::decode(message).ok()?;
    Some(keys.seal(&message, [7; 24]))
}

/// A server with three members, told anything by members, strangers and the administrator.
pub(crate) fn server(bytes: &[u8]) {
    let mut feed = Feed::new(bytes);
    let mut world = ServerWorld::new(feed.byte().unwrap_or_default());
    for _ in 0..EVENTS {
        let Some(event) = feed.byte() else { return };
        world.event(event, &mut feed);
        world.deliver();
    }
}

struct ServerWorld {
    server: Server,
    relay: RelayTable,
    now: Instant,
    wall: u64,
    rev: u64,
    /// The newest connection of each machine.
    connections: [ConnectionId; 6],
    next: u64,
}

impl ServerWorld {
    fn new(choice: u8) -> Self {
        let range = if choice & 1 == 0 { "10.77.0.0/29" } else { "10.77.0.0/20" };
        let range = OverlayRange::new(
            range.parse().expect("a prefix"),
            "fd00:1:2::/48".parse().expect("a prefix"),
        );
        let record = NetworkRecord {
            id: NetworkId([7; 8]),
            range: range.expect("a range"),
            created: WALL,
            members_last_s: None,
            server_key: None,
        };
        let members = (1..=3).map(|number| Versioned { rev: 1, record: member(number) }).collect();
        let records = Records {
            network: Versioned { rev: 1, record },
            members,
            invites: Vec::new(),
            policy: None,
            highest_node: 3,
        };
        let settings = Settings {
            server_key: secret(9).public(),
            addresses: vec!["192.0.2.1".parse().expect("an address")],
            whole_netmap_up_to: if choice & 2 == 0 { 256 } else { 2 },
        };
        let mut world = Self {
            server: Server::new(settings, records, [3; 32], epoch(), WALL),
            relay: RelayTable::new(Limits::default(), [3; 32]),
            now: epoch(),
            wall: WALL,
            rev: 1,
            connections: [ConnectionId(0); 6],
            next: 1,
        };
        world.deliver();
        for machine in 1..=3 {
            world.connect(machine);
            world.say(machine, hello(machine));
        }
        world
    }

    fn event(&mut self, event: u8, feed: &mut Feed<'_>) {
        let machine = (event >> 4) % 6;
        let connection = self.connections[usize::from(machine)];
        match event & 0x0f {
            0..=2 => {
                if let Ok(message) = decode::<ClientMessage>(feed.part()) {
                    self.say(machine, message);
                }
            }
            3 => self.connect(machine),
            4 => self.server.handle_disconnected(connection, self.wall),
            5 => {
                self.connect(machine);
                self.say(machine, hello(machine));
            }
            6..=8 => {
                let Ok(request) = serde_json::from_slice::<admin::Request>(feed.part()) else {
                    return;
                };
                if let Ok(decision) = self.server.decide(request, self.wall) {
                    self.commit(decision, true);
                }
            }
            9 | 10 => {
                let mut datagram = feed.part().to_vec();
                let arrival =
                    Arrival { socket: SocketId(0), source: endpoint(machine), local: None };
                let asked = datagram.len();
                let verdict = self.relay.handle_datagram(&mut datagram, arrival, self.now);
                if let Verdict::Reply { bytes, .. } | Verdict::Knock { bytes, .. } = verdict {
                    assert!(bytes.len() <= asked, "never more bytes out than in");
                }
            }
            11 => {
                let mut datagram = feed.part().to_vec();
                if let Some(node) = NodeId::new(u32::from(machine)) {
                    let _ = self.relay.handle_from(node, &mut datagram, self.now);
                }
            }
            12 => {
                if let Some(node) = NodeId::new(u32::from(machine)) {
                    self.server.note_reflexive(node, endpoint(feed.byte().unwrap_or_default()));
                }
            }
            _ => self.wait(feed.byte().unwrap_or_default()),
        }
    }

    fn connect(&mut self, machine: u8) {
        let connection = ConnectionId(self.next);
        self.next += 1;
        let about = Connected {
            machine_key: PublicKey([machine; 32]),
            observed: endpoint(machine),
            relay_port: Some(41820),
            second_port: None,
        };
        self.connections[usize::from(machine)] = connection;
        self.server.handle_connected(connection, about);
    }

    fn say(&mut self, machine: u8, message: ClientMessage) {
        let connection = self.connections[usize::from(machine)];
        // Some of what is decided cannot be written.
        let written = message.ping.is_none_or(|ping| ping % 2 == 0);
        if let Some(decision) = self.server.handle_message(connection, message, self.wall) {
            self.commit(decision, written);
        }
    }

    fn commit(&mut self, decision: Decision, written: bool) {
        let _ = self.server.events(&decision, "root", self.wall);
        if written || decision.changes().is_empty() {
            self.rev += 1;
            if let Some(answer) = self.server.apply(decision, self.rev, self.wall) {
                assert!(serde_json::to_string(&answer).is_ok(), "an answer can be printed");
            }
        } else {
            self.server.give_up(decision);
        }
    }

    fn wait(&mut self, how_long: u8) {
        let step = Duration::from_millis(1 << (how_long % 24));
        self.now += step;
        self.wall += step.as_secs();
        self.server.handle_timeout(self.now);
        if how_long >= 128 {
            let decision = self.server.decide_expiry(self.wall);
            self.commit(decision, true);
            let decision = self.server.decide_seen(self.wall);
            self.commit(decision, true);
        }
    }

    fn deliver(&mut self) {
        let mut count = 0;
        while let Some(output) = self.server.poll_output() {
            count += 1;
            assert!(count < 10_000, "there is an end");
            match output {
                Output::Send { message, .. } => {
                    let read = decode::<ServerMessage>(&message);
                    assert!(read.is_ok(), "what the server says can be read: {read:?}");
                }
                Output::Close { connection } => {
                    self.server.handle_disconnected(connection, self.wall);
                }
                Output::Relay(change) => self.relay.apply(change),
            }
        }
        let (members, online) = self.server.population();
        assert!(online <= members, "{online} of {members} members are online");
    }
}

fn member(number: u8) -> MemberRecord {
    MemberRecord {
        id: NodeId::new(u32::from(number)).expect("a number"),
        machine_key: PublicKey([number; 32]),
        node_key: PublicKey([100 + number; 32]),
        name: format!("node{number}").parse().expect("a name"),
        wish: None,
        host: u32::from(number),
        joined: WALL,
        last_seen: WALL,
        invite: InviteId([1; 4]),
        tags: Vec::new(),
        key_since: WALL,
        expires: None,
        expiry_noted: Default::default(),
        named: false,
    }
}

fn hello(machine: u8) -> ClientMessage {
    let hello = Hello {
        min_version: 1,
        max_version: 1,
        software: "test".into(),
        node_key: [100 + machine; 32],
        name: Some(format!("node{machine}")),
        invite: None,
        candidates: Vec::new(),
        instance: Some(u64::from(machine)),
        known: (machine == 3).then(Vec::new),
    };
    ClientMessage { hello: Some(hello), ..Default::default() }
}
