//! How what leaves a host or the server finds its way: lines, NATs, LANs, the control connection.

use std::cmp::Ordering;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use overlay::dataplane::{Source, Target};
use overlay::io::link::GIVEN_UP_AFTER;
use overlay::lab::nat::Outbound;
use overlay::server::ConnectionId;
use overlay::types::SocketId;
use overlay::wire::control::{self, ClientMessage, Hello, ServerMessage};
use overlay::wire::relay::Token;

use crate::edge::is_private;
use crate::host::{FIRST_SCRATCH_PORT, Host, Outgoing};
use crate::link::Line;
use crate::server::{Frame, Sent};
use crate::uplinks::Way;
use crate::world::World;

/// Something under way.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(super) at: Instant,
    seq: u64,
    pub(super) parcel: Parcel,
}

/// What is under way.
#[derive(Debug)]
pub(crate) enum Parcel {
    /// A datagram, about to meet an edge from outside.
    Edge { edge: usize, from: Option<usize>, src: SocketAddr, dst: SocketAddr, bytes: Vec<u8> },
    /// A datagram inside a LAN.
    Lan { from: usize, to: usize, src: SocketAddr, dst: SocketAddr, bytes: Vec<u8> },
    /// A datagram to the server.
    Server { src: SocketAddr, dst: SocketAddr, bytes: Vec<u8> },
    /// What a hostile relay has kept back.
    KeptBack(Sent),
    /// A host asks for a control connection.
    Connect { host: usize, attempt: u64, way: Way, early: Option<(Token, Hello)> },
    /// TCP has led to somebody.
    Tcp { host: usize, attempt: u64, way: Way },
    /// It is made, or nobody listens; perhaps with a hello that is acted on.
    Connected {
        host: usize,
        attempt: u64,
        way: Way,
        connection: Option<ConnectionId>,
        said: Option<Hello>,
    },
    /// The server's TCP gives a connection up if its host has left it.
    GivenUp { host: usize, connection: ConnectionId },
    /// The host's TCP gives a connection up if what it sends still vanishes.
    Unheard { host: usize, connection: ConnectionId },
    /// A frame to the server.
    Up { host: usize, connection: ConnectionId, frame: Frame },
    /// A frame to a host.
    Down { host: usize, connection: ConnectionId, frame: Frame },
}

impl World {
    pub(super) fn launch(&mut self, at: Instant, parcel: Parcel) {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.flights.push(Flight { at, seq, parcel });
    }

    /// Sends off what a host's turn gave.
    pub(super) fn route_host(&mut self, host: usize, going: Outgoing) {
        for text in going.news {
            self.note(&format!("host {host}: {text}"));
        }
        for packet in going.packets {
            let from = self.ledger.arrive(host, &packet, self.now);
            assert!(
                !self.must_know_removed(host, from),
                "host {host} takes a packet of host {from}, which is no member any more"
            );
        }
        if let Some(token) = going.token {
            self.hosts[host].token = Some((token, self.now));
            if let Some(attempt) = self.hosts[host].control_link.handle_token() {
                self.upgrade(host, attempt);
            }
        }
        let connection = self.hosts[host].control_link.connection();
        for message in going.messages {
            if let Some(connection) = connection {
                self.send_up(host, connection, Frame::Control(control::encode(&message)));
            }
        }
        for (remote, bytes) in going.questions {
            self.hosts[host].meter.count(bytes.len(), self.now);
            self.ask(host, remote, bytes);
        }
        for (remote, socket) in going.openers {
            self.hosts[host].meter.count(PING_BYTES, self.now);
            self.open(host, remote, socket);
        }
        for (target, bytes) in going.datagrams {
            match (target, connection) {
                (Target::Udp { remote, socket, local }, _) => {
                    self.hosts[host].meter.count(bytes.len(), self.now);
                    self.send_udp(host, (socket, local), remote, bytes);
                }
                (Target::Link, Some(connection)) => {
                    self.send_up(host, connection, Frame::Relay(bytes));
                }
                (Target::Link, None) => {}
            }
        }
        if let Some(by) = going.uplink {
            self.improve_link(host, by.as_ref());
        }
        if going.refused {
            self.close_link(host);
            self.hosts[host].control_link.retry(self.now);
            let now = self.now;
            self.hosts[host].handle_link_down(now);
        }
    }

    fn send_udp(
        &mut self,
        host: usize,
        (socket, local): (SocketId, Option<IpAddr>),
        dst: SocketAddr,
        bytes: Vec<u8>,
    ) {
        let Some((interface, src)) = self.hosts[host].source_of(socket, dst, local) else { return };
        let edge = self.hosts[host].edge_of(interface);
        if is_private(dst.ip()) || dst == src || self.edges[edge].owns_ipv6(dst.ip()) {
            // Homes use the same private range: what is meant for another home stays in this one.
            self.send_in_lan((host, edge), src, dst, bytes);
            return;
        }
        if self.hosts[host].udp_blocked {
            return;
        }
        let now = self.now;
        match self.edges[edge].outbound(src, dst, now) {
            Some(Outbound::Forward(flow)) => self.send_out(edge, Some(host), flow.src, dst, bytes),
            Some(Outbound::Hairpin(flow)) => {
                self.send_in_lan((host, edge), flow.src, flow.dst, bytes);
            }
            None => {}
        }
    }

    /// A datagram that passes the own edge, and dies in the internet.
    fn open(&mut self, host: usize, dst: SocketAddr, socket: SocketId) {
        let source = self.hosts[host].source_of(socket, dst, None);
        let Some((interface, src)) = source else { return };
        let edge = self.hosts[host].edge_of(interface);
        if !is_private(dst.ip()) && !self.hosts[host].udp_blocked {
            let now = self.now;
            let _ = self.edges[edge].outbound(src, dst, now);
        }
    }

    /// A question of a socket that has never sent anything.
    fn ask(&mut self, host: usize, dst: SocketAddr, bytes: Vec<u8>) {
        let Some(interface) = self.hosts[host].gateway() else { return };
        let edge = self.hosts[host].edge_of(interface);
        self.hosts[host].scratch_ports += 1;
        let src =
            SocketAddr::new(self.hosts[host].address_of(interface), self.hosts[host].scratch_ports);
        let now = self.now;
        if !self.hosts[host].udp_blocked
            && let Some(Outbound::Forward(flow)) = self.edges[edge].outbound(src, dst, now)
        {
            self.send_out(edge, Some(host), flow.src, dst, bytes);
        }
    }

    fn send_in_lan(
        &mut self,
        (from, edge): (usize, usize),
        src: SocketAddr,
        dst: SocketAddr,
        bytes: Vec<u8>,
    ) {
        let mut hosts = self.hosts.iter();
        let to = hosts.position(|host| host.is_behind(edge) && host.socket_at(dst).is_some());
        if let Some(to) = to {
            let at = self.now + LAN_LATENCY;
            self.launch(at, Parcel::Lan { from, to, src, dst, bytes });
        }
    }

    /// Over the internet, from an edge.
    fn send_out(
        &mut self,
        edge: usize,
        from: Option<usize>,
        src: SocketAddr,
        dst: SocketAddr,
        bytes: Vec<u8>,
    ) {
        if self.edges[edge].dark {
            return;
        }
        let here = self.edges[edge].line;
        if dst.ip() == self.server.address() {
            let there = self.server_line;
            self.fly(here, there, &Parcel::Server { src, dst, bytes });
        } else {
            self.send_to_edge(here, from, src, dst, bytes);
        }
    }

    fn send_to_edge(
        &mut self,
        here: Line,
        from: Option<usize>,
        src: SocketAddr,
        dst: SocketAddr,
        bytes: Vec<u8>,
    ) {
        let Some(edge) = self.edges.iter().position(|edge| edge.owns(dst.ip())) else {
            self.strays += bytes.len();
            return;
        };
        let there = self.edges[edge].line;
        self.fly(here, there, &Parcel::Edge { edge, from, src, dst, bytes });
    }

    /// Over two lines: each may lose, double or delay it.
    fn fly(&mut self, here: Line, there: Line, parcel: &Parcel) {
        for first in here.delays(&mut self.rng) {
            for second in there.delays(&mut self.rng) {
                let at = self.now + first + second;
                self.launch(at, parcel.copy());
            }
        }
    }

    /// Sends off what the server gave.
    pub(super) fn route_server(&mut self) {
        self.note_over();
        for sent in self.server.take_sent() {
            for (later, sent) in self.relay.harm(sent, &mut self.rng) {
                if later.is_zero() {
                    self.route_sent(sent);
                } else {
                    self.launch(self.now + later, Parcel::KeptBack(sent));
                }
            }
        }
    }

    fn route_sent(&mut self, sent: Sent) {
        match sent {
            Sent::Udp { from, to, bytes } => {
                let line = self.server_line;
                self.send_to_edge(line, None, from, to, bytes);
            }
            Sent::Link(connection, frame) => {
                let mut hosts = self.hosts.iter();
                let host = hosts.position(|host| {
                    host.control_link.connection().or(host.control_link.opening) == Some(connection)
                });
                if let Some(host) = host {
                    self.send_down(host, connection, frame);
                }
            }
        }
    }

    fn one_way(&self, host: usize, way: Way) -> Duration {
        let edge = self.hosts[host].edge_of(way.interface);
        self.edges[edge].line.latency + self.server_line.latency
    }

    fn send_up(&mut self, host: usize, connection: ConnectionId, frame: Frame) {
        let way = self.hosts[host].control_link.way(connection);
        let soonest = self.now + self.one_way(host, way);
        let at = self.hosts[host].control_link.up_free_at.map_or(soonest, |at| at.max(soonest));
        self.hosts[host].control_link.up_free_at = Some(at);
        self.launch(at, Parcel::Up { host, connection, frame });
    }

    fn send_down(&mut self, host: usize, connection: ConnectionId, frame: Frame) {
        let way = self.hosts[host].control_link.way(connection);
        let soonest = self.now + self.one_way(host, way);
        let at = self.hosts[host].control_link.down_free_at.map_or(soonest, |at| at.max(soonest));
        self.hosts[host].control_link.down_free_at = Some(at);
        self.launch(at, Parcel::Down { host, connection, frame });
    }

    /// Somebody who is nobody's host sends this, as from there.
    pub(crate) fn forge(&mut self, src: SocketAddr, dst: SocketAddr, bytes: Vec<u8>) {
        self.send_to_edge(Line::clean(Duration::ZERO), None, src, dst, bytes);
    }

    /// The host's end of its connection is gone; the server hears of it.
    pub(super) fn close_link(&mut self, host: usize) {
        if let Some(connection) = self.hosts[host].control_link.connection() {
            self.send_up(host, connection, Frame::Closed);
        }
    }

    /// The host is elsewhere or asleep and says no goodbye on its connection: the server keeps that
    /// until there is another one, or for as long as TCP waits for a tick to be taken.
    pub(super) fn leave_link(&mut self, host: usize) {
        if let Some(connection) = self.hosts[host].control_link.connection() {
            self.launch(self.now + GIVEN_UP_AFTER, Parcel::GivenUp { host, connection });
        }
    }

    /// The server's end is gone; the host hears of it.
    pub(super) fn tell_server_gone(&mut self, host: usize) {
        if let Some(connection) = self.hosts[host].control_link.connection() {
            self.send_down(host, connection, Frame::Closed);
        }
    }

    /// Starts a control connection: TCP and the question for a token side by side, then the upgrade
    /// with the key exchange in it.
    pub(super) fn connect(&mut self, host: usize, attempt: u64) {
        let (server, now) = (self.server.control_endpoint(), self.now);
        self.hosts[host].ask_token(server, now);
        self.settle(host);
        let ways: Vec<(usize, bool)> = self.hosts[host].leads_out().collect();
        if !ways.iter().any(|(_, preferred)| *preferred) {
            // The kernel knows no way, and says so at once.
            return self.hosts[host].control_link.handle_failed(attempt, now);
        }
        for (interface, preferred) in ways {
            let way = Way { interface, bound: !preferred };
            let favoured = self.hosts[host].control_link.favoured == Some(interface);
            let later = if preferred || favoured { Duration::ZERO } else { FURTHER_DELAY };
            if !preferred {
                self.hosts[host].control_link.try_another(later);
            }
            self.knock(host, attempt, way, later);
        }
    }

    /// Starts TCP by one way, a little later.
    pub(super) fn knock(&mut self, host: usize, attempt: u64, way: Way, later: Duration) {
        if !self.hosts[host].control_link.cut {
            let at = self.now + later + self.one_way(host, way) * 2;
            self.launch(at, Parcel::Tcp { host, attempt, way });
        }
    }

    /// The first message of the key exchange leaves by a further uplink. Seen from another address a token
    /// is worth nothing.
    fn upgrade_by(&mut self, host: usize, attempt: u64, way: Way) {
        let at = self.now + self.one_way(host, way);
        self.launch(at, Parcel::Connect { host, attempt, way, early: None });
    }

    /// The first message of the key exchange leaves, with the hello in it if there is a token.
    pub(super) fn upgrade(&mut self, host: usize, attempt: u64) {
        let Some(interface) = self.hosts[host].gateway() else { return };
        let way = Way { interface, bound: false };
        let early = self.hosts[host].token.take();
        let early = early.filter(|(_, at)| self.now - *at < TOKEN_USABLE);
        let early = early.and_then(|(token, _)| Some((token, self.hosts[host].hello()?.hello?)));
        let at = self.now + self.one_way(host, way);
        self.launch(at, Parcel::Connect { host, attempt, way, early });
    }

    /// Something arrives.
    pub(super) fn deliver(&mut self, parcel: Parcel) {
        let now = self.now;
        let Some(parcel) = self.gets_through(parcel) else { return };
        match parcel {
            Parcel::Edge { edge, from, src, dst, bytes } => {
                if self.edges[edge].dark {
                    return;
                }
                let Some(flow) = self.edges[edge].inbound(src, dst, now) else { return };
                if flow.dst.is_ipv4() && flow.dst.port() > FIRST_SCRATCH_PORT {
                    let ip = flow.dst.ip();
                    let mut hosts = self.hosts.iter();
                    let at = |host: &Host| {
                        [0, 1]
                            .into_iter()
                            .any(|it| host.edge_of(it) == edge && host.address_of(it) == ip)
                    };
                    let to = hosts.position(at);
                    if let Some(to) = to.filter(|to| self.hosts[*to].hears_udp()) {
                        self.hosts[to].handle_scratch(src, &bytes, now);
                        self.settle(to);
                    }
                    return;
                }
                let mut hosts = self.hosts.iter();
                let to = hosts
                    .position(|host| host.is_behind(edge) && host.socket_at(flow.dst).is_some());
                let Some(to) = to.filter(|to| self.hosts[*to].hears_udp()) else { return };
                if from.is_none_or(|from| self.passes(from, to, &bytes)) {
                    self.hand_in(to, src, flow.dst, &bytes);
                }
            }
            Parcel::Lan { from, to, src, dst, bytes } => {
                if self.passes(from, to, &bytes) {
                    self.hand_in(to, src, dst, &bytes);
                }
            }
            Parcel::Server { src, dst, bytes } => {
                self.server.handle_datagram(src, dst, bytes, now);
                self.route_server();
            }
            Parcel::Tcp { host, way, .. } | Parcel::Connect { host, way, .. }
                if !self.leads_out(host, way.interface) => {}
            Parcel::Tcp { host, attempt, way } if way.bound => self.upgrade_by(host, attempt, way),
            Parcel::Tcp { host, attempt, way }
                if self.hosts[host].control_link.is_better(attempt) =>
            {
                self.upgrade_by(host, attempt, way);
            }
            Parcel::Tcp { host, attempt, .. } => {
                let known = self.hosts[host].token.is_some();
                let awake = self.hosts[host].asleep_until.is_none();
                if awake && self.hosts[host].control_link.handle_tcp(attempt, known, now) {
                    self.upgrade(host, attempt);
                }
            }
            Parcel::Connect { host, attempt, way, early } => self.accept(host, attempt, way, early),
            Parcel::Connected { host, connection, way, .. }
                if !self.leads_out(host, way.interface) =>
            {
                if let Some(connection) = connection {
                    self.launch(now + GIVEN_UP_AFTER, Parcel::GivenUp { host, connection });
                }
            }
            Parcel::Connected { host, attempt, connection: None, .. } => {
                self.hosts[host].control_link.handle_failed(attempt, now);
            }
            Parcel::Connected { host, attempt, connection: Some(connection), said, .. } => {
                let awake = self.hosts[host].asleep_until.is_none();
                let replaced = self.hosts[host].control_link.connection();
                let wanted =
                    awake && self.hosts[host].control_link.handle_opened(attempt, connection, now);
                if let Some(connection) = replaced.filter(|_| wanted) {
                    // It ends when the server has heard of the new one.
                    self.launch(now + GIVEN_UP_AFTER, Parcel::GivenUp { host, connection });
                }
                let first = match said {
                    Some(said) => self.hosts[host].confirmation(&said),
                    None => self.hosts[host].hello(),
                };
                match first.filter(|_| wanted) {
                    Some(hello) => {
                        let frame = Frame::Control(control::encode(&hello));
                        self.send_up(host, connection, frame);
                    }
                    None => self.send_up(host, connection, Frame::Closed),
                }
            }
            Parcel::GivenUp { host, connection } => {
                let asleep = self.hosts[host].asleep_until.is_some();
                if asleep || self.hosts[host].control_link.connection() != Some(connection) {
                    self.deliver_up(host, connection, Frame::Closed);
                    // TCP says so to whoever wakes up and sends.
                    self.send_down(host, connection, Frame::Closed);
                }
            }
            Parcel::Unheard { host, connection } => self.give_up(host, connection),
            Parcel::KeptBack(sent) => self.route_sent(sent),
            Parcel::Up { host, connection, frame } => self.deliver_up(host, connection, frame),
            Parcel::Down { host, connection, frame } => self.deliver_down(host, connection, frame),
        }
    }

    /// The first message of a key exchange is at the server.
    fn accept(&mut self, host: usize, attempt: u64, way: Way, early: Option<(Token, Hello)>) {
        let public = self.edges[self.hosts[host].edge_of(way.interface)].external;
        let observed = SocketAddr::new(public, 50_000);
        let key = self.hosts[host].machine_key;
        let token = early.as_ref().map(|(token, _)| *token);
        let accepted = self.server.accept(key, observed, token, self.now);
        let (connection, taken) = (accepted.map(|(id, _)| id), accepted.is_some_and(|it| it.1));
        let said = early.map(|(_, hello)| hello).filter(|_| taken);
        if let Some(connection) = connection {
            self.hosts[host].control_link.note_way(connection, way);
        }
        let at = self.now + self.one_way(host, way);
        let news = Parcel::Connected { host, attempt, way, connection, said: said.clone() };
        self.launch(at, news);
        if let Some((connection, hello)) = connection.zip(said) {
            self.hosts[host].control_link.handle_opening(attempt, connection);
            let message = ClientMessage { hello: Some(hello), ..ClientMessage::default() };
            let frame = Frame::Control(control::encode(&message));
            self.server.handle_frame(connection, frame, self.now);
            self.route_server();
        }
    }

    fn deliver_up(&mut self, host: usize, connection: ConnectionId, frame: Frame) {
        if self.hosts[host].control_link.cut && frame != Frame::Closed {
            return;
        }
        if !self.server.knows(connection) && frame != Frame::Closed {
            // The connection is of an earlier life of the server.
            self.send_down(host, connection, Frame::Closed);
            return;
        }
        self.server.handle_frame(connection, frame, self.now);
        self.route_server();
    }

    pub(super) fn deliver_down(&mut self, host: usize, connection: ConnectionId, frame: Frame) {
        let now = self.now;
        if self.hosts[host].asleep_until.is_some() {
            self.hosts[host].held_frames.push((connection, frame));
            return;
        }
        if self.hosts[host].control_link.cut
            || !self.hosts[host].control_link.handle_heard(connection, now)
        {
            return;
        }
        match frame {
            Frame::Control(bytes) => {
                let message: ServerMessage =
                    control::decode(&bytes).expect("the server sends what nodes can read");
                if message.welcome.is_some() {
                    self.note(&format!("host {host}: connected to the server"));
                }
                let server = self.server.control_endpoint();
                self.hosts[host].handle_message(&message, server, now);
            }
            Frame::Relay(bytes) => self.hand_over(host, Source::Link, &bytes),
            Frame::Closed => {
                self.note(&format!("host {host}: lost the server"));
                self.hosts[host].control_link.retry(now);
                self.hosts[host].handle_link_down(now);
            }
        }
        self.settle(host);
    }

    fn hand_in(&mut self, host: usize, remote: SocketAddr, at: SocketAddr, bytes: &[u8]) {
        if self.hosts[host].asleep_until.is_some() {
            return;
        }
        // The socket may have been closed while the datagram was in the LAN.
        let Some(socket) = self.hosts[host].socket_at(at) else { return };
        let local = Some(at.ip());
        self.hand_over(host, Source::Udp { remote, local, socket }, bytes);
        self.settle(host);
    }

    fn hand_over(&mut self, host: usize, source: Source, bytes: &[u8]) {
        let mut going = Outgoing::default();
        self.hosts[host].handle_datagram(source, bytes, self.now, &mut going);
        self.route_host(host, going);
    }
}

impl Parcel {
    /// A second copy of a datagram.
    fn copy(&self) -> Self {
        match self {
            Self::Edge { edge, from, src, dst, bytes } => {
                let (edge, from, src, dst) = (*edge, *from, *src, *dst);
                Self::Edge { edge, from, src, dst, bytes: bytes.clone() }
            }
            Self::Server { src, dst, bytes } => {
                Self::Server { src: *src, dst: *dst, bytes: bytes.clone() }
            }
            _ => unreachable!("only datagrams on the internet are doubled"),
        }
    }
}

// The heap gives the largest first: the earliest flight, and of two the one that left first.
impl Ord for Flight {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.seq).cmp(&(self.at, self.seq))
    }
}

impl PartialOrd for Flight {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Flight {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Flight {}

/// One hop in a home.
pub(crate) const LAN_LATENCY: Duration = Duration::from_millis(1);
/// A token is used when it is no older than this.
const TOKEN_USABLE: Duration = Duration::from_secs(5);
/// A further uplink is tried so much later than the preferred one.
const FURTHER_DELAY: Duration = Duration::from_secs(1);
/// What an opener has, as any ping.
const PING_BYTES: usize = 60;
