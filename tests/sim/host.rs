//! One machine: the real node core with its data plane, driven as the daemon drives them.
//!
//! Knows neither NATs nor lines: it is handed what arrives, and says what leaves.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use overlay::dataplane::{Note, Source, Target, TunBatch, UdpBatch, inbound, outbound};
use overlay::node::{
    Clocks, Event, MAX_EXTRA_SOCKETS, Netmap, Node, NodeKeys, NodeSettings, SocketOrder,
};
use overlay::server::ConnectionId;
use overlay::types::{NodeId, PublicKey, SecretKey, SocketId, Uplink};
use overlay::wire::control::{
    ClientMessage, Hello, InviteUse, NetmapUpdate, RefusedCode, ServerMessage, WirePeer,
};
use overlay::wire::relay::Token;

use crate::control_link::ControlLink;
use crate::quiet::Meter;
use crate::server::Frame;
use crate::uplinks::{Uplinks, interface_number};

/// What leaves a host.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    /// Datagrams, each with where it goes.
    pub(crate) datagrams: Vec<(Target, Vec<u8>)>,
    /// What sockets send that live for one question.
    pub(crate) questions: Vec<(SocketAddr, Vec<u8>)>,
    /// Where datagrams go that die on the way, and the sockets that they leave by.
    pub(crate) openers: Vec<(SocketAddr, SocketId)>,
    /// Control messages.
    pub(crate) messages: Vec<ClientMessage>,
    /// Inner packets that came out of the TUN interface.
    pub(crate) packets: Vec<Vec<u8>>,
    /// News for the log.
    pub(crate) news: Vec<String>,
    /// For the first message of a control connection.
    pub(crate) token: Option<Token>,
    /// The relay goes by another uplink; none for the preferred one.
    pub(crate) uplink: Option<Option<Uplink>>,
    /// The server does not want us.
    pub(crate) refused: bool,
    /// We are no member any more.
    pub(crate) expelled: bool,
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
            && self.openers.is_empty()
            && self.questions.is_empty()
            && self.messages.is_empty()
            && self.packets.is_empty()
            && self.news.is_empty()
            && self.token.is_none()
            && self.uplink.is_none()
            && !(self.refused || self.expelled)
    }
}

/// One machine.
#[derive(Debug)]
pub(crate) struct Host {
    /// Which edge it is behind.
    pub(crate) edge: usize,
    /// The endpoint of its UDP socket, as it sees it itself.
    pub(crate) endpoint: SocketAddr,
    /// Its IPv6 endpoint.
    pub(crate) ipv6: Option<SocketAddr>,
    /// Its interfaces beside the one that all this is about.
    pub(crate) uplinks: Uplinks,
    /// The endpoint that its router forwards to it,
    pub(crate) mapped: Option<SocketAddr>,
    /// as it does whenever it is asked.
    pub(crate) forwarded: bool,
    /// Its edge lets no UDP of this host through.
    pub(crate) udp_blocked: bool,
    /// It is suspended until then,
    pub(crate) asleep_until: Option<Instant>,
    /// and has been since; or was woken then.
    pub(crate) asleep_since: Instant,
    /// What TCP keeps for it while it is suspended.
    pub(crate) held_frames: Vec<(ConnectionId, Frame)>,
    /// When the administrator ended its membership.
    pub(crate) removed_at: Option<Instant>,
    /// When the server ended its membership until it has more time,
    pub(crate) over_at: Option<Instant>,
    /// which it may do.
    pub(crate) may_end: bool,
    /// It has heard of its removal, and does not start again.
    pub(crate) expelled: bool,
    /// It is of a version that knows no second key of a peer: one that has another is made anew.
    pub(crate) forgets_old_keys: bool,
    /// How often data to a peer, or the relay, has begun to go another way.
    pub(crate) changes: usize,
    /// What it has sent by UDP.
    pub(crate) meter: Meter,
    /// What the server's reflector gave out, and when.
    pub(crate) token: Option<(Token, Instant)>,
    /// Its control connection.
    pub(crate) control_link: ControlLink,
    /// Its machine key, for the server.
    pub(crate) machine_key: PublicKey,
    /// With what it joins.
    pub(crate) invite: Option<InviteUse>,
    /// On its disk.
    keys: NodeKeys,
    rotations: u64,
    /// What its node is told.
    pub(crate) settings: NodeSettings,
    node: Option<Node>,
    disk: Netmap,
    lives: u64,
    seed: u64,
    from_tun: VecDeque<Vec<u8>>,
    out: UdpBatch,
    /// When the node wants to be woken, and what for.
    due: Option<(Instant, &'static str)>,
    idle_turns: u32,
    /// Ports of sockets that live for one question.
    pub(crate) scratch_ports: u16,
    /// Packets of its programs that were answered with ICMP.
    pub(crate) refused: usize,
    extra_sockets: BTreeSet<SocketId>,
    /// Sockets of further uplinks, each with its interface.
    pub(crate) lines: BTreeMap<SocketId, usize>,
}

impl Host {
    /// A machine that is switched off. `seed` decides its keys and all it draws.
    pub(crate) fn new(
        seed: u64,
        edge: usize,
        endpoint: SocketAddr,
        settings: NodeSettings,
    ) -> Self {
        Self {
            edge,
            endpoint,
            ipv6: None,
            uplinks: Uplinks::default(),
            mapped: None,
            forwarded: false,
            udp_blocked: false,
            asleep_until: None,
            asleep_since: crate::epoch(),
            held_frames: Vec::new(),
            removed_at: None,
            over_at: None,
            may_end: false,
            expelled: false,
            forgets_old_keys: false,
            changes: 0,
            meter: Meter::default(),
            token: None,
            control_link: ControlLink::new(seed),
            machine_key: SecretKey::from_bytes(spread(seed, 1)).public(),
            invite: None,
            keys: SecretKey::from_bytes(spread(seed, 2)).into(),
            rotations: 0,
            settings,
            node: None,
            disk: Netmap::default(),
            lives: 0,
            seed,
            from_tun: VecDeque::new(),
            out: UdpBatch::default(),
            due: None,
            idle_turns: 0,
            scratch_ports: FIRST_SCRATCH_PORT,
            refused: 0,
            extra_sockets: BTreeSet::new(),
            lines: BTreeMap::new(),
        }
    }

    /// Starts the node with what it had saved.
    pub(crate) fn start(&mut self, server: SocketAddr, wall: u64, now: Instant) {
        if self.node.is_some() {
            return;
        }
        self.lives += 1;
        let endpoints = self.endpoints();
        let mut node = Node::new(
            self.keys.clone(),
            self.disk.clone(),
            self.settings,
            spread(self.seed, 100 + self.lives),
            self.lives << 32,
            now,
        );
        node.guess_server_time(wall, now);
        if self.has_second() {
            node.handle_uplinks(self.known_uplinks(), now);
            self.uplinks.last_gateway = self.gateway();
        }
        node.handle_host_endpoints(endpoints, now);
        if let Some(mapped) = self.mapped {
            node.handle_mapped(vec![(mapped, true)], now);
        }
        node.ask_reflectors(&[server], now);
        self.node = Some(node);
        self.control_link.start(now);
        self.refresh();
    }

    /// Kills the node; the netmap survives in the form that the disk knows.
    pub(crate) fn stop(&mut self, wall: u64, now: Instant) {
        let Some(node) = self.node.take() else { return };
        let mut netmap = node.netmap().clone();
        netmap.clocks = node.server_time(now).map(|server| Clocks { server, own: wall });
        let text = serde_json::to_string(&netmap).expect("a netmap can be saved");
        self.disk = serde_json::from_str(&text).expect("a saved netmap can be read");
        self.control_link.stop();
        self.from_tun.clear();
        self.extra_sockets.clear();
        self.lines.clear();
        self.due = None;
    }

    pub(crate) fn node_mut(&mut self) -> Option<&mut Node> {
        self.node.as_mut()
    }

    /// The running node.
    pub(crate) fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The node's number, once it has one.
    pub(crate) fn id(&self) -> Option<NodeId> {
        let netmap = self.node.as_ref().map_or(&self.disk, Node::netmap);
        netmap.identity.as_ref().map(|identity| identity.id)
    }

    /// The overlay address, once it has one.
    pub(crate) fn address(&self) -> Option<Ipv4Addr> {
        let netmap = self.node.as_ref().map_or(&self.disk, Node::netmap);
        netmap.identity.as_ref().map(|identity| identity.addrs.v4)
    }

    /// The endpoint of one of its sockets at an interface, as the host sees it itself; none when it is not
    /// open or not bound there.
    fn endpoint_of(&self, socket: SocketId, interface: usize) -> Option<SocketAddr> {
        let address = self.address_of(interface);
        if socket == SocketId::MAIN {
            return Some(SocketAddr::new(address, self.endpoint.port()));
        }
        let port = FIRST_EXTRA_PORT + socket.number() % EXTRA_PORTS;
        let open = match self.lines.get(&socket) {
            Some(bound) => *bound == interface,
            None => self.extra_sockets.contains(&socket),
        };
        open.then(|| SocketAddr::new(address, port))
    }

    /// The interface by which a datagram leaves for `remote`, and the endpoint that it is from; `local` is
    /// the address of ours that is asked for. The main socket is one for each family.
    pub(crate) fn source_of(
        &self,
        socket: SocketId,
        remote: SocketAddr,
        local: Option<IpAddr>,
    ) -> Option<(usize, SocketAddr)> {
        let interface = self.interface_towards(socket, remote)?;
        let source = match remote {
            SocketAddr::V6(_) if socket == SocketId::MAIN => self.ipv6,
            SocketAddr::V6(_) => None,
            SocketAddr::V4(_) => {
                let wanted = [0, 1].into_iter().find(|it| Some(self.address_of(*it)) == local);
                self.endpoint_of(socket, wanted.unwrap_or(interface))
            }
        };
        Some((interface, source?))
    }

    /// The socket that is bound to this endpoint.
    pub(crate) fn socket_at(&self, endpoint: SocketAddr) -> Option<SocketId> {
        if self.ipv6 == Some(endpoint) {
            return Some(SocketId::MAIN);
        }
        let interface = [0, 1].into_iter().find(|it| self.address_of(*it) == endpoint.ip())?;
        let all = self.extra_sockets.iter().chain(self.lines.keys()).copied();
        all.chain([SocketId::MAIN]).find(|it| self.endpoint_of(*it, interface) == Some(endpoint))
    }

    /// When the node wants to be woken.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.due.map(|(at, _)| at)
    }

    /// The first message on a new connection; what was queued for an older one is in it.
    pub(crate) fn hello(&mut self) -> Option<ClientMessage> {
        let node = self.node.as_mut()?;
        while node.poll_message().is_some() {}
        Some(node.hello(None, self.invite.clone()))
    }

    /// The same when the server has had this hello.
    pub(crate) fn confirmation(&mut self, said: &Hello) -> Option<ClientMessage> {
        let node = self.node.as_mut()?;
        while node.poll_message().is_some() {}
        node.confirmation(said)
    }

    /// Asks the server's reflector for a token, unless there is one. A turn must follow.
    pub(crate) fn ask_token(&mut self, server: SocketAddr, now: Instant) {
        if let Some(node) = self.node.as_mut().filter(|_| self.token.is_none()) {
            node.ask_tokens(&[server], now);
            self.refresh();
        }
    }

    /// A program on this machine sends an inner packet.
    pub(crate) fn handle_packet(&mut self, packet: Vec<u8>) {
        self.from_tun.push_back(packet);
    }

    /// A datagram, or a relay frame on the control connection, arrived. A turn must follow.
    pub(crate) fn handle_datagram(
        &mut self,
        source: Source,
        datagram: &[u8],
        now: Instant,
        going: &mut Outgoing,
    ) {
        let Some(node) = &mut self.node else { return };
        let shared = Arc::clone(node.shared());
        let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
        inbound(&shared, &shared.table(), source, datagram, now, &mut tun, &mut notes);
        going.packets.extend(tun.packets().map(<[u8]>::to_vec));
        hand_over(node, notes, now);
    }

    /// An answer arrived at a scratch socket. A turn must follow.
    pub(crate) fn handle_scratch(&mut self, remote: SocketAddr, datagram: &[u8], now: Instant) {
        if let Some(node) = &mut self.node {
            node.handle_scratch(remote, datagram, now);
        }
    }

    /// A message of the server arrived. A turn must follow.
    pub(crate) fn handle_message(
        &mut self,
        message: &ServerMessage,
        server: SocketAddr,
        now: Instant,
    ) {
        if let Some(node) = &mut self.node {
            let forgotten = self.forgets_old_keys.then(|| gone_first(node, message)).flatten();
            for message in forgotten.iter().chain([message]) {
                node.handle_message(message, server, now);
            }
        }
    }

    /// The control connection is gone.
    pub(crate) fn handle_link_down(&mut self, now: Instant) {
        if let Some(node) = &mut self.node {
            node.handle_link_down(now);
            self.refresh();
        }
    }

    /// The machine has another address.
    pub(crate) fn handle_roam(&mut self, edge: usize, endpoint: SocketAddr, now: Instant) {
        if self.has_second() {
            self.readdress(edge, endpoint, now);
            return self.refresh();
        }
        self.edge = edge;
        self.endpoint = endpoint;
        let endpoints = self.endpoints();
        if let Some(node) = &mut self.node {
            // Two homes may give the same private address, but never without a moment between.
            node.handle_host_endpoints(Vec::new(), now);
            node.handle_host_endpoints(endpoints, now);
            self.refresh();
        }
    }

    /// The node renews its key, if it may: first on disk, then in the node. Tells whether it did.
    pub(crate) fn rotate(&mut self, now: Instant) -> bool {
        let Some(node) = &mut self.node else { return false };
        if node.may_rotate(now).is_err() {
            return false;
        }
        self.rotations += 1;
        let current = SecretKey::from_bytes(spread(self.seed, 1_000 + self.rotations));
        let previous = Some(std::mem::replace(&mut self.keys.current, current.clone()));
        self.keys = NodeKeys { current: current.clone(), previous, told: false };
        node.rotate(current, now).expect("it may");
        self.refresh();
        true
    }

    /// The keys on its disk.
    pub(crate) fn keys(&self) -> &NodeKeys {
        &self.keys
    }

    /// The machine was suspended for long enough that its daemon noticed.
    pub(crate) fn handle_wake(&mut self, now: Instant) {
        if let Some(node) = &mut self.node {
            node.handle_wake(true, now);
            self.refresh();
        }
    }

    /// The router forwards a port to this machine, or does so no more.
    pub(crate) fn handle_mapped(&mut self, mapped: Option<SocketAddr>, now: Instant) {
        self.mapped = mapped;
        if let Some(node) = &mut self.node {
            node.handle_mapped(mapped.map(|at| (at, true)).into_iter().collect(), now);
            self.refresh();
        }
    }

    /// Whether a datagram from the internet gets to it.
    pub(crate) fn hears_udp(&self) -> bool {
        !self.udp_blocked && self.asleep_until.is_none()
    }

    /// When something has to be done here.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        let timers = [self.wake_at(), self.control_link.poll_timeout()];
        self.asleep_until.or_else(|| timers.into_iter().flatten().min())
    }

    /// Gives the node its turn if it is due, and collects what wants to leave.
    ///
    /// # Panics
    /// When the node wants to be woken in the past again and again and does nothing then.
    pub(crate) fn turn(&mut self, connection: Option<ConnectionId>, now: Instant) -> Outgoing {
        let mut going = Outgoing::default();
        self.send_packets(now);
        let Some(node) = &mut self.node else { return going };
        // What has become due since is seen below, and is the next turn's business.
        let due = self.due.filter(|(at, _)| *at <= now);
        if due.is_some() {
            node.handle_timeout(now);
        }
        self.collect(connection, &mut going);
        let next = self.node.as_ref().and_then(Node::poll_timeout);
        self.due = next;
        let again = next.filter(|(at, _)| *at <= now);
        if let (Some((_, before)), Some((at, after)), true) = (due, again, going.is_empty()) {
            self.idle_turns += 1;
            assert!(
                self.idle_turns < 2,
                "a busy loop: woken for {before:?}, did nothing, wants to be woken for {after:?} \
                 {:?} ago",
                now - at
            );
        } else {
            self.idle_turns = 0;
        }
        going
    }

    fn send_packets(&mut self, now: Instant) {
        let Some(node) = &mut self.node else { return self.from_tun.clear() };
        if self.from_tun.is_empty() {
            return;
        }
        let shared = Arc::clone(node.shared());
        let (mut batch, mut notes) = (UdpBatch::default(), Vec::new());
        let packets = self.from_tun.iter().map(Vec::as_slice);
        outbound(&shared, &shared.table(), packets, now, &mut batch, &mut notes);
        self.from_tun.clear();
        for (target, datagram) in batch.datagrams() {
            self.out.push_bytes(target, datagram);
        }
        hand_over(node, notes, now);
    }

    fn collect(&mut self, connection: Option<ConnectionId>, going: &mut Outgoing) {
        let Some(node) = &mut self.node else { return };
        for order in node.take_socket_orders() {
            let told = format!("{order:?}");
            let news = match order {
                SocketOrder::Open { socket, device: Some(device), .. } => {
                    self.lines.insert(socket, interface_number(&device)).is_none()
                }
                SocketOrder::Open { socket, .. } => self.extra_sockets.insert(socket),
                SocketOrder::Close { socket } => {
                    self.lines.remove(&socket).is_some() || self.extra_sockets.remove(&socket)
                }
            };
            assert!(news, "{told} was carried out before");
        }
        assert!(self.lines.len() <= 2, "one socket for each interface");
        assert!(self.extra_sockets.len() <= MAX_EXTRA_SOCKETS, "extra sockets are bounded");
        assert_eq!(self.extra_sockets.len(), node.extra_sockets());
        let take = |batch: &UdpBatch, going: &mut Outgoing| {
            let all = batch.datagrams().map(|(target, datagram)| (target, datagram.to_vec()));
            going.datagrams.extend(all);
        };
        while let Some(question) = node.poll_scratch() {
            going.questions.push(question);
        }
        while let Some(opener) = node.poll_opener() {
            going.openers.push((opener.remote, opener.socket));
        }
        take(&self.out, going);
        self.out.clear();
        while let Some(probe) = node.poll_whole_probe() {
            let target = Target::Udp { remote: probe.remote, local: None, socket: probe.socket };
            going.datagrams.push((target, probe.datagram));
        }
        while let Some(answer) = node.poll_packet() {
            // Programs here send what may be cut, so they are told nothing else.
            let unreachable = [answer.get(20..22), answer.get(40..42)];
            self.refused += 1;
            assert!(unreachable.contains(&Some(&[3, 1])) || unreachable.contains(&Some(&[1, 3])));
        }
        node.take_datagrams(&mut self.out);
        take(&self.out, going);
        self.out.clear();
        while let Some(message) = node.poll_message() {
            if connection.is_some() {
                going.messages.push(message);
            }
        }
        while let Some(event) = node.poll_event() {
            match event {
                Event::KeyTold => self.keys.told = true,
                Event::KeyRetired => self.keys.previous = None,
                Event::Token { token, .. } => going.token = Some(token),
                Event::Uplink(by) => {
                    self.changes += 1;
                    let device = by.as_ref().map_or("the preferred uplink", |it| &it.device);
                    going.news.push(format!("the relay by {device}"));
                    going.uplink = Some(by);
                }
                Event::Path { peer, from, to, why } => {
                    self.changes += 1;
                    let show = |via: Option<overlay::path::Via>| {
                        via.map_or_else(|| "nothing".to_string(), |via| via.to_string())
                    };
                    going.news.push(format!("{peer}: {} -> {}, {why}", show(from), show(to)));
                }
                Event::Refused(code, why) => {
                    going.news.push(format!("refused: {why}"));
                    going.refused = true;
                    going.expelled |= code == RefusedCode::NotMember;
                }
                Event::Identity(_)
                | Event::Rules
                | Event::PeerKeys
                | Event::Standing
                | Event::Save
                | Event::Mtu { .. }
                | Event::Pinged { .. }
                | Event::Knocked(_)
                | Event::Reported(_)
                | Event::Rival(_) => {}
            }
        }
        if going.expelled && node.netmap().identity.is_some() {
            assert!(self.removed_at.is_some(), "only who was removed is told so");
            self.expelled = true;
        }
        going.expelled &= self.expelled;
        assert!(going.datagrams.len() <= MAX_DATAGRAMS, "a flood: {}", going.datagrams.len());
        assert!(going.messages.len() <= MAX_MESSAGES, "the message queue has a bound");
    }

    pub(crate) fn refresh(&mut self) {
        self.due = self.node.as_ref().and_then(Node::poll_timeout);
    }

    /// The node's view of the way to a peer, in the word of the JSON contract.
    pub(crate) fn path_kind(&self, peer: NodeId, now: Instant) -> &'static str {
        let status = self.node.as_ref().and_then(|node| node.peer_status(peer, now));
        status.map_or("unknown", |status| status.path.as_str())
    }

    /// The node's own word on why the path to a peer is what it is, and what it tried.
    pub(crate) fn why(&self, peer: NodeId, now: Instant) -> String {
        let status = self.node.as_ref().and_then(|node| node.peer_status(peer, now));
        status.map_or_else(String::new, |status| {
            format!("{}, for {:?}, online {}", status.why, status.since, status.online)
        })
    }
}

/// The same as a removal: what a node that knows one key of each peer makes of another key.
fn gone_first(node: &Node, message: &ServerMessage) -> Option<ServerMessage> {
    let (update, epoch) = (message.netmap.as_ref()?, node.netmap().epoch);
    let other_key = |peer: &&WirePeer| {
        let known = NodeId::new(peer.id).and_then(|id| node.peer_info(id));
        known.is_some_and(|known| known.node_key.0 != peer.node_key)
    };
    let removed = update.peers.iter().filter(other_key).map(|peer| peer.id).collect();
    let netmap = NetmapUpdate { from: Some(epoch), to: epoch, removed, ..Default::default() };
    Some(ServerMessage { netmap: Some(netmap), ..Default::default() })
}

/// What the data plane leaves to the control plane.
fn hand_over(node: &mut Node, notes: Vec<Note>, now: Instant) {
    for note in notes {
        node.handle_note(note, now);
    }
}

/// Thirty-two bytes for one purpose.
pub(crate) fn spread(seed: u64, purpose: u64) -> [u8; 32] {
    let mut bytes = [0x5a; 32];
    // Not the first byte: keys made of this ignore its low bits (RFC 7748 section 5).
    bytes[8..16].copy_from_slice(&seed.to_le_bytes());
    bytes[16..24].copy_from_slice(&purpose.to_le_bytes());
    bytes
}

/// Above all ports of main sockets.
const FIRST_EXTRA_PORT: u16 = 20_000;
/// Far more than there are at a time, so that no two have one port.
const EXTRA_PORTS: u16 = 10_000;

/// Above all ports of extra sockets.
pub(crate) const FIRST_SCRATCH_PORT: u16 = 30_000;

/// The most datagrams of one turn: every peer's queue of waiting packets, doubled, and probes.
const MAX_DATAGRAMS: usize = 1_000;
/// The most control messages of one turn.
const MAX_MESSAGES: usize = 16;
