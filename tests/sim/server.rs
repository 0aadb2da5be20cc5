//! The server: the real core and relay table over a store of a few lines.
//!
//! Killing it forgets everything but the records, which are written when they are decided.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use overlay::server::admin::{Answer, Request};
use overlay::server::fresh::{Freshness, Tokens};
use overlay::server::records::{ExpiryNoted, Key, NetworkRecord, Record, Records, Versioned};
use overlay::server::relay::limit::Limits;
use overlay::server::relay::{Arrival, RelayChange, RelayTable, SocketId, Verdict, Way};
use overlay::server::{Connected, ConnectionId, Decision, Output, Server, Settings};
use overlay::types::{NetworkId, NodeId, OverlayRange, PublicKey, SecretKey};
use overlay::wire::control::{self, ClientMessage, InviteUse};
use overlay::wire::join::JoinLine;
use overlay::wire::relay::Token;

use crate::host::spread;

/// What travels on a control connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// An encoded control message.
    Control(Vec<u8>),
    /// A relay datagram.
    Relay(Vec<u8>),
    /// The other end has closed it.
    Closed,
}

/// What leaves the server.
#[derive(Debug, Clone)]
pub(crate) enum Sent {
    /// A datagram from one of its UDP sockets.
    Udp {
        /// From this endpoint.
        from: SocketAddr,
        /// To this one.
        to: SocketAddr,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A frame on a connection.
    Link(ConnectionId, Frame),
}

/// The server's first address in the simulated internet.
const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const MAIN_PORT: u16 = 41820;
const SECOND_PORT: u16 = 41821;
const KNOCK_PORT: u16 = 50_000;
const MAIN: SocketId = SocketId(0);

#[derive(Debug)]
struct Running {
    server: Server,
    relay: RelayTable,
    /// The number of the first connection of this life.
    first_connection: u64,
    nodes: BTreeMap<ConnectionId, NodeId>,
    fresh: Freshness,
    keys: BTreeMap<ConnectionId, PublicKey>,
}

/// The machine that the server runs on.
#[derive(Debug)]
pub(crate) struct ServerHost {
    running: Option<Running>,
    records: BTreeMap<Key, Versioned<Record>>,
    rev: u64,
    highest_node: u32,
    next_connection: u64,
    lives: u64,
    seed: u64,
    address: IpAddr,
    epoch: Instant,
    /// How far its wall clock was set forward or back.
    clock_shift_s: i64,
    whole_netmap_up_to: usize,
    sent: Vec<Sent>,
    /// Whose membership has ended, or goes on again.
    over: Vec<(NodeId, bool)>,
}

impl ServerHost {
    /// A machine on which the server runs for the first time.
    pub(crate) fn new(seed: u64, now: Instant) -> Self {
        let range = OverlayRange::new(
            "10.77.0.0/20".parse().expect("a range"),
            "fd12:3456:789a::/48".parse().expect("a range"),
        );
        let range = range.expect("both ranges are large enough");
        let network = NetworkRecord {
            id: NetworkId([7; 8]),
            range,
            created: WALL,
            members_last_s: None,
            server_key: None,
        };
        let record = Versioned { rev: 1, record: Record::Network(network) };
        let mut host = Self {
            running: None,
            records: BTreeMap::from([(Key::Network, record)]),
            rev: 1,
            highest_node: 0,
            next_connection: 1,
            lives: 0,
            seed,
            address: SERVER.into(),
            epoch: now,
            clock_shift_s: 0,
            whole_netmap_up_to: overlay::server::WHOLE_NETMAP_UP_TO,
            sent: Vec::new(),
            over: Vec::new(),
        };
        host.start(now);
        host
    }

    /// Starts it with its records.
    pub(crate) fn start(&mut self, now: Instant) {
        if self.running.is_some() {
            return;
        }
        self.lives += 1;
        let settings = Settings {
            server_key: SecretKey::from_bytes(spread(self.seed, 4)).public(),
            addresses: vec!["203.0.113.1".parse().expect("an address")],
            whole_netmap_up_to: self.whole_netmap_up_to,
        };
        let seed = spread(self.seed, 200 + self.lives);
        let server = Server::new(settings, self.read_records(), seed, now, self.wall(now));
        let secret = spread(self.seed, 300 + self.lives);
        let tokens = Tokens::new(spread(self.seed, 400 + self.lives), now);
        let relay = RelayTable::new(Limits::default(), secret).with_tokens(tokens.clone());
        self.running = Some(Running {
            server,
            relay,
            first_connection: self.next_connection,
            nodes: BTreeMap::new(),
            fresh: Freshness::new(tokens),
            keys: BTreeMap::new(),
        });
        self.drain(now);
    }

    /// Starts it anew with another setting.
    pub(crate) fn set_whole_netmap_up_to(&mut self, nodes: usize, now: Instant) {
        self.whole_netmap_up_to = nodes;
        self.kill();
        self.start(now);
    }

    /// Kills it; the operating system ends its connections.
    pub(crate) fn kill(&mut self) {
        self.running = None;
        self.sent.clear();
    }

    fn read_records(&self) -> Records {
        let mut network = None;
        let (mut members, mut invites, mut policy) = (Vec::new(), Vec::new(), None);
        for Versioned { rev, record } in self.records.values().cloned() {
            match record {
                Record::Network(record) => network = Some(Versioned { rev, record }),
                Record::Member(record) => members.push(Versioned { rev, record }),
                Record::Invite(record) => invites.push(Versioned { rev, record }),
                Record::Policy(record) => policy = Some(Versioned { rev, record }),
            }
        }
        let network = network.expect("the network is never deleted");
        Records { network, members, invites, policy, highest_node: self.highest_node }
    }

    /// Its wall clock, in Unix seconds. Those of the hosts show the same.
    pub(crate) fn wall(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.epoch).as_secs();
        (WALL + passed).saturating_add_signed(self.clock_shift_s)
    }

    /// Sets its wall clock forward or back.
    pub(crate) fn shift_clock(&mut self, seconds: i64) {
        self.clock_shift_s = seconds;
    }

    /// Whether the server runs.
    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Where it is in the internet.
    pub(crate) fn address(&self) -> IpAddr {
        self.address
    }

    /// The machine gets the next address.
    pub(crate) fn relocate(&mut self) {
        if let IpAddr::V4(address) = self.address {
            self.address = Ipv4Addr::from(u32::from(address) + 1).into();
        }
    }

    /// The endpoint that control connections go to.
    pub(crate) fn control_endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.address, MAIN_PORT)
    }

    /// Ends a membership; tells whether there was a server to do so.
    pub(crate) fn remove(&mut self, node: NodeId, now: Instant) -> bool {
        let wall = self.wall(now);
        let Some(running) = &mut self.running else { return false };
        let request = Request::Remove { node: node.to_string() };
        let decision = running.server.decide(request, wall).expect("members can be removed");
        assert!(matches!(self.commit(decision, now), Some(Answer::Removed(_))));
        true
    }

    /// Sets in how many seconds a membership ends, if ever; tells whether there was a server to do so.
    pub(crate) fn expire(&mut self, node: NodeId, in_s: Option<u64>, now: Instant) -> bool {
        let wall = self.wall(now);
        let Some(running) = &mut self.running else { return false };
        let request = Request::Expire { node: node.to_string(), in_s };
        let decision = running.server.decide(request, wall).expect("members can have an end");
        assert!(matches!(self.commit(decision, now), Some(Answer::Expiring(_))));
        true
    }

    /// Ends the memberships whose time has come, as the daemon does.
    fn note_expiry(&mut self, now: Instant) {
        let wall = self.wall(now);
        let mut looks = 0;
        while let Some(running) = &mut self.running
            && running.server.expiry_due().is_some_and(|due| due <= wall)
        {
            let decision = running.server.decide_expiry(wall);
            self.commit(decision, now);
            looks += 1;
            assert!(looks < 4, "the end of a membership is noted once");
        }
    }

    fn expiry_at(&self) -> Option<Instant> {
        let due = self.running.as_ref()?.server.expiry_due()?;
        let seconds = due.checked_add_signed(-self.clock_shift_s)?.saturating_sub(WALL);
        self.epoch.checked_add(Duration::from_secs(seconds))
    }

    /// Whose membership has ended since the last call, and who has more time.
    pub(crate) fn take_over(&mut self) -> Vec<(NodeId, bool)> {
        std::mem::take(&mut self.over)
    }

    /// The node key that is written down for a node.
    pub(crate) fn node_key(&self, node: NodeId) -> Option<PublicKey> {
        match &self.records.get(&Key::Member(node))?.record {
            Record::Member(member) => Some(member.node_key),
            _ => None,
        }
    }

    /// Makes an invite for `uses` nodes.
    pub(crate) fn invite(&mut self, uses: u32, now: Instant) -> InviteUse {
        let wall = self.wall(now);
        let running = self.running.as_mut().expect("invites are made while the server runs");
        let request = Request::Invite { uses, ttl_s: 24 * 3600, name: None, tags: Vec::new() };
        let decision = running.server.decide(request, wall).expect("a plain invite is fine");
        let Some(Answer::Invited(invited)) = self.commit(decision, now) else {
            panic!("an invite is answered with an invite");
        };
        let line: JoinLine = invited.join.expose().parse().expect("a join line can be read");
        InviteUse { id: line.invite.0, secret: line.secret.clone(), network: line.network.0 }
    }

    fn commit(&mut self, decision: Decision, now: Instant) -> Option<Answer> {
        let wall = self.wall(now);
        self.rev += 1;
        for change in decision.changes() {
            let stored = self.records.get(&change.key).map_or(0, |stored| stored.rev);
            assert_eq!(stored, change.expected_rev, "no decision is made on old records");
            if let Key::Member(node) = change.key {
                self.highest_node = self.highest_node.max(node.number());
            }
            if let Some(Record::Member(member)) = &change.record {
                self.over.push((member.id, member.expiry_noted == ExpiryNoted::Over));
            }
            match &change.record {
                Some(record) => {
                    let record = Versioned { rev: self.rev, record: record.clone() };
                    self.records.insert(change.key, record);
                }
                None => drop(self.records.remove(&change.key)),
            }
        }
        let answer = self.running.as_mut()?.server.apply(decision, self.rev, wall);
        self.drain(now);
        answer
    }

    /// A control connection is made; none when nobody listens. Tells whether a hello that has come with
    /// this token counts.
    pub(crate) fn accept(
        &mut self,
        machine_key: PublicKey,
        observed: SocketAddr,
        token: Option<Token>,
        now: Instant,
    ) -> Option<(ConnectionId, bool)> {
        let running = self.running.as_mut()?;
        let connection = ConnectionId(self.next_connection);
        self.next_connection += 1;
        let about = Connected {
            machine_key,
            observed,
            relay_port: Some(MAIN_PORT),
            second_port: Some(SECOND_PORT),
        };
        running.server.handle_connected(connection, about);
        running.keys.insert(connection, machine_key);
        let source = observed.ip();
        let taken = token.is_some_and(|it| running.fresh.take(machine_key, &it, source, now));
        Some((connection, taken))
    }

    /// Whether a connection was made in this life of the server.
    pub(crate) fn knows(&self, connection: ConnectionId) -> bool {
        self.running.as_ref().is_some_and(|running| running.first_connection <= connection.0)
    }

    /// A frame arrives on a connection.
    pub(crate) fn handle_frame(&mut self, connection: ConnectionId, frame: Frame, now: Instant) {
        let wall = self.wall(now);
        let Some(running) = &mut self.running else { return };
        match frame {
            Frame::Control(bytes) => {
                let message: ClientMessage =
                    control::decode(&bytes).expect("nodes send what the server can read");
                if let Some(key) = running.keys.remove(&connection) {
                    running.fresh.note(key, now);
                }
                if let Some(decision) = running.server.handle_message(connection, message, wall) {
                    self.commit(decision, now);
                }
            }
            Frame::Relay(mut bytes) => {
                if let Some(sender) = running.nodes.get(&connection) {
                    let verdict = running.relay.handle_from(*sender, &mut bytes, now);
                    self.carry_out(verdict, bytes, None);
                }
            }
            Frame::Closed => running.server.handle_disconnected(connection, wall),
        }
        self.drain(now);
    }

    /// A datagram arrives at one of the UDP ports.
    pub(crate) fn handle_datagram(
        &mut self,
        source: SocketAddr,
        to: SocketAddr,
        mut bytes: Vec<u8>,
        now: Instant,
    ) {
        let socket = match to.port() {
            MAIN_PORT => MAIN,
            SECOND_PORT => MAIN.other_port(),
            _ => return,
        };
        let Some(running) = &mut self.running else { return };
        let arrival = Arrival { socket, source, local: Some(self.address) };
        let verdict = running.relay.handle_datagram(&mut bytes, arrival, now);
        while let Some((node, endpoint)) = running.relay.poll_sighting() {
            running.server.note_reflexive(node, endpoint);
        }
        self.carry_out(verdict, bytes, Some(source));
        self.drain(now);
    }

    fn carry_out(&mut self, verdict: Verdict, bytes: Vec<u8>, source: Option<SocketAddr>) {
        match verdict {
            Verdict::Reply { bytes, from } => {
                let to = source.expect("only datagrams are answered");
                let bytes = bytes.to_vec();
                self.sent.push(Sent::Udp { from: self.endpoint_of(from), to, bytes });
            }
            Verdict::Knock { bytes, to } => {
                let from = SocketAddr::new(self.address, KNOCK_PORT);
                self.sent.push(Sent::Udp { from, to, bytes: bytes.to_vec() });
            }
            Verdict::Forward(Way::Udp(arrival) | Way::Unproved(arrival)) => {
                let from = self.endpoint_of(arrival.socket);
                self.sent.push(Sent::Udp { from, to: arrival.source, bytes });
            }
            Verdict::Forward(Way::Link(connection)) => {
                self.sent.push(Sent::Link(connection, Frame::Relay(bytes)));
            }
            Verdict::Drop(_) => {}
        }
    }

    fn endpoint_of(&self, socket: SocketId) -> SocketAddr {
        SocketAddr::new(self.address, if socket == MAIN { MAIN_PORT } else { SECOND_PORT })
    }

    fn drain(&mut self, now: Instant) {
        let wall = self.wall(now);
        let Some(running) = &mut self.running else { return };
        running.server.handle_timeout(now);
        while let Some(output) = running.server.poll_output() {
            match output {
                Output::Send { connection, message } => {
                    self.sent.push(Sent::Link(connection, Frame::Control(message)));
                }
                Output::Close { connection } => {
                    self.sent.push(Sent::Link(connection, Frame::Closed));
                    running.server.handle_disconnected(connection, wall);
                }
                Output::Relay(change) => {
                    match &change {
                        RelayChange::Online { node, connection, .. } => {
                            running.nodes.insert(*connection, *node);
                        }
                        RelayChange::Offline { connection, .. } => {
                            running.nodes.remove(connection);
                        }
                        RelayChange::Member(_) | RelayChange::Removed(_) => {}
                    }
                    running.relay.apply(change);
                }
            }
        }
    }

    /// When the server wants its turn.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let timer = self.running.as_ref().map(|running| running.server.poll_timeout());
        timer.into_iter().chain(self.expiry_at()).min()
    }

    /// Gives the server its turn.
    ///
    /// # Panics
    /// When it wants another one at once.
    pub(crate) fn turn(&mut self, now: Instant) {
        self.note_expiry(now);
        self.drain(now);
        assert!(self.poll_timeout().is_none_or(|at| at > now), "the server's timer stands still");
    }

    /// What leaves the server.
    pub(crate) fn take_sent(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.sent)
    }
}

/// The wall clock at the start, in Unix seconds.
const WALL: u64 = 1_800_000_000;
