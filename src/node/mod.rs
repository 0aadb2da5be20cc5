//! The node's control plane, as a pure state machine.
//!
//! `handle_*` takes what happened, with the time; `poll_*` and [`Node::take_datagrams`] give what
//! is to be done. After any `handle_*` all of them are drained, then the caller sleeps until
//! [`Node::poll_timeout`]. This file holds fields and queues only; each rule of behaviour has a
//! room of its own:
//!
//! - `control`: what the server says, and what it is told
//! - `relay`: signing on at the relay, and the reflexive address that comes with it
//! - `sighting`: the same address, asked for before there is a control connection, and a token for that
//! - `disco`: probes in and out
//! - `mapped`: endpoints that the router forwards to us, and the proof that it does
//! - `predict`: which ports our NAT will give us next
//! - `punch`: costly ways, agreed on with the peer; `birthday`: our part in them
//! - `sockets`: local ports beside the main one
//! - `uplinks`: several default routes, and which of them the relay goes by; `asks`: what one is asked
//! - `signalling`: how news travels to the peers, and who may send to whom first
//! - `handshake`: WireGuard handshakes in and out; `lanes`: a second session with busy peers
//! - `roam`: other addresses, other routes, and waking up
//! - `netmap`: the network as the server described it, also on disk
//! - `pace`: paths that nobody has asked for are made one after the other
//! - `part`: peers of a large network, asked for when they are needed and let go of afterwards
//! - `peer`: one peer's control state, and publishing it to the data plane
//! - `timers`: everything that happens because time passes
//! - `presence`: who is there
//! - `unreachable`: what programs are told that send to nobody
//! - `standing`: memberships that end
//! - `status`: read-only views
//! - `nat`: what the network in front of us does
//! - `report`: both sides' views of a path, asked for and told
//! - `history`: what became of the paths to a peer
//! - `keys`: our node key and those of the peers, while they are renewed; `keyring`: what they make

mod asks;
mod birthday;
mod control;
mod disco;
mod handshake;
mod history;
mod keyring;
mod keys;
mod lanes;
mod mapped;
mod nat;
mod netmap;
mod pace;
mod part;
mod peer;
mod predict;
mod presence;
mod punch;
mod relay;
mod report;
mod roam;
mod sighting;
mod signalling;
mod sockets;
mod standing;
mod status;
mod timers;
mod unreachable;
mod uplinks;

pub use history::{History, PathChange, PathRecord, PathTimes};
pub use keyring::NodeKeys;
pub use keys::RotateError;
pub use mapped::Knocked;
pub use netmap::{Clocks, Identity, Netmap, NetmapDiff, PeerInfo};
pub use punch::PunchCounters;
pub use report::{Explanation, RemovedPeer};
pub use sockets::{MAX_EXTRA_SOCKETS, SocketOrder};
pub use status::{PathKind, PeerStatus, SelfStatus};
pub use uplinks::UplinkStatus;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::dataplane::{Note, SessionSettings, Shared, Source, Target, UdpBatch};
use crate::path::{Answer, Together, Via};
use crate::policy::Filter;
use crate::types::{BASE_MTU, Candidate, NodeId, OverlayAddrs, PublicKey, SocketId, Uplink};
use crate::wire::control::{ClientMessage, RefusedCode};
use crate::wire::disco::Tag;
use crate::wire::relay::Token;
use keyring::OwnKeys;
use mapped::Mapped;
use nat::FilterTest;
use pace::Pace;
use part::Wanted;
use peer::PeerControl;
use predict::Prediction;
use punch::Punching;
use relay::RelayClient;
use report::Removed;
use sighting::Sighting;
use sockets::Sockets;
use standing::Calendar;
use uplinks::Uplinks;

/// 5 Mbit/s both ways; what acknowledges a bulk transfer of a few hundred.
const SECOND_LANE_FROM: u64 = 64 << 10;

/// What can be set about a node.
#[derive(Debug, Clone, Copy)]
pub struct NodeSettings {
    /// WireGuard keys are renewed after this.
    pub rekey_after: Duration,
    /// In a network of up to so many peers, paths are made before anybody asks for them.
    pub eager_peers: usize,
    /// Look for a path between hard NATs by chance when nothing else has led to one.
    pub birthday_probing: bool,
    /// The largest inner MTU that is looked for on direct paths, in bytes.
    pub max_mtu: u16,
    /// With a peer to and from which so many bytes go in a tenth of a second, a second session is made,
    /// so that sealing and opening do not wait for one another. `u64::MAX` for never.
    pub second_lane_from: u64,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self {
            rekey_after: SessionSettings::default().rekey_after,
            eager_peers: 64,
            birthday_probing: true,
            max_mtu: BASE_MTU,
            second_lane_from: SECOND_LANE_FROM,
        }
    }
}

/// News for the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The node's own addresses or range are new: configure the interface.
    Identity(Identity),
    /// Something that must survive a restart changed.
    Save,
    /// The access rules changed: they must be on disk before the server is told that they are in effect,
    /// since a node that starts without them is open.
    Rules,
    /// A peer has a new key: it must be on disk before it is used, since the peer may forget the old
    /// one as soon as it hears from us under the new one.
    PeerKeys,
    /// Our membership, or that of a peer, ends at another time than before, or has ended.
    Standing,
    /// The server has stored our new key.
    KeyTold,
    /// Our old key is needed no more.
    KeyRetired,
    /// Data to a peer goes another way.
    Path {
        /// The peer.
        peer: NodeId,
        /// Before.
        from: Option<Via>,
        /// After.
        to: Option<Via>,
        /// The cause.
        why: &'static str,
    },
    /// The path to a peer carries longer or only shorter packets uncut than before.
    Mtu {
        /// The peer's addresses.
        addrs: OverlayAddrs,
        /// The longest inner packet, in bytes.
        mtu: u16,
    },
    /// An answer to [`Node::ping`].
    Pinged {
        /// The number that the ping was given.
        token: u64,
        /// The round trip and the path.
        answer: Answer,
    },
    /// What came of [`Node::knock`].
    Knocked(Knocked),
    /// A server's reflector vouches for the first message of a connection to it.
    Token {
        /// The server.
        server: IpAddr,
        /// For the next seconds.
        token: Token,
    },
    /// A peer told how it sees the ways between us.
    Reported(NodeId),
    /// The server ended this membership, or does not know it.
    Refused(RefusedCode, String),
    /// The relay is reached by this uplink from here on; none for the preferred one.
    Uplink(Option<Uplink>),
    /// Another machine with our keys wanted in, from there; the server turned it away.
    Rival(SocketAddr),
}

/// A datagram that opens our own NAT and dies before it reaches the peer's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opener {
    /// Towards this endpoint.
    pub remote: SocketAddr,
    /// By this socket.
    pub socket: SocketId,
    /// With this time to live (IPv4) or hop limit (IPv6).
    pub ttl: u8,
    /// The bytes.
    pub datagram: Vec<u8>,
}

/// A datagram that nobody on the way may cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholeProbe {
    /// To this endpoint.
    pub remote: SocketAddr,
    /// By this socket.
    pub socket: SocketId,
    /// The bytes.
    pub datagram: Vec<u8>,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    settings: NodeSettings,
    rng: StdRng,
    /// Of this run, for the server.
    instance: u64,
    keys: OwnKeys,
    shared: Arc<Shared>,
    netmap: Netmap,
    filter: Option<Arc<Filter>>,
    peers: BTreeMap<NodeId, PeerControl>,
    peers_by_tag: BTreeMap<Tag, NodeId>,
    peers_by_key: BTreeMap<PublicKey, NodeId>,
    relay: RelayClient,
    pace: Pace,
    calendar: Calendar,
    wanted: Wanted,
    link_up: bool,
    host_endpoints: Vec<SocketAddr>,
    /// Whether they have been told at all; there may be none.
    looked_at_host: bool,
    /// Where the server sees us, if that is no address of ours.
    reflexive: Option<SocketAddr>,
    mapped: Mapped,
    announced: Vec<Candidate>,
    /// Since when the server knows the endpoint that our NAT gives us.
    announced_at: Option<Instant>,
    call_epoch: u64,
    asked_server_at: Option<Instant>,
    open_pings: BTreeMap<crate::types::TxId, (u64, Instant)>,
    traffic_tick_at: Option<Instant>,
    engine_tick_at: Option<Instant>,
    datagrams: UdpBatch,
    sighting: Sighting,
    prediction: Prediction,
    filter_test: FilterTest,
    removed: Removed,
    sockets: Sockets,
    uplinks: Uplinks,
    punching: Punching,
    /// What may go to addresses for which only peers vouch.
    together: Together,
    openers: VecDeque<Opener>,
    whole_probes: VecDeque<WholeProbe>,
    scratch: VecDeque<(SocketAddr, Vec<u8>)>,
    packets: VecDeque<unreachable::Answer>,
    messages: VecDeque<ClientMessage>,
    events: VecDeque<Event>,
    /// Handshakes that made a session.
    handshakes: u64,
}

impl Node {
    /// A node that knows what `netmap` says and is connected to nobody.
    ///
    /// `seed` is the source of all randomness but session keys. `call_epoch` must be higher than in
    /// any earlier life of this node: [`Netmap::next_call_epoch`].
    #[must_use]
    pub fn new(
        keys: impl Into<NodeKeys>,
        netmap: Netmap,
        settings: NodeSettings,
        seed: [u8; 32],
        call_epoch: u64,
        now: Instant,
    ) -> Self {
        let keys = OwnKeys::new(keys.into(), now);
        let mut node = Self {
            settings,
            rng: StdRng::from_seed(seed),
            // From another stream, so that it tells nothing of the first.
            instance: other_stream(seed, 0xff).random(),
            shared: keys.new_shared(now),
            keys,
            netmap: Netmap::default(),
            filter: None,
            peers: BTreeMap::new(),
            peers_by_tag: BTreeMap::new(),
            peers_by_key: BTreeMap::new(),
            relay: RelayClient::default(),
            pace: Pace::default(),
            calendar: Calendar::default(),
            wanted: Wanted::default(),
            link_up: false,
            host_endpoints: Vec::new(),
            looked_at_host: false,
            reflexive: None,
            mapped: Mapped::default(),
            announced: Vec::new(),
            announced_at: None,
            call_epoch,
            asked_server_at: None,
            open_pings: BTreeMap::new(),
            traffic_tick_at: None,
            engine_tick_at: None,
            datagrams: UdpBatch::default(),
            sighting: Sighting::default(),
            prediction: Prediction::default(),
            filter_test: FilterTest::default(),
            removed: Removed::default(),
            sockets: Sockets::default(),
            uplinks: Uplinks::default(),
            punching: Punching::default(),
            together: Together::new(other_stream(seed, 0x5a).random(), now),
            openers: VecDeque::new(),
            whole_probes: VecDeque::new(),
            scratch: VecDeque::new(),
            packets: VecDeque::new(),
            messages: VecDeque::new(),
            events: VecDeque::new(),
            handshakes: 0,
        };
        node.restore(netmap, now);
        node
    }

    /// What the data plane's threads work on.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Changes what may change while the node runs; it counts for what is decided from now on.
    pub fn set_wishes(&mut self, birthday_probing: bool, eager_peers: usize) {
        self.settings = NodeSettings { birthday_probing, eager_peers, ..self.settings };
    }

    /// The largest inner MTU that is looked for on direct paths from now on, in bytes.
    pub fn set_mtu_limit(&mut self, limit: u16) {
        self.settings.max_mtu = limit;
        for peer in self.peers.values_mut() {
            peer.agent.set_mtu_limit(limit);
        }
    }

    /// A link of this machine takes packets of another length now.
    pub fn handle_link_mtu(&mut self, now: Instant) {
        self.peers.values_mut().for_each(|peer| peer.agent.handle_link_mtu(now));
    }

    /// What our last calls to peers were numbered with, to be saved.
    #[must_use]
    pub fn call_epoch(&self) -> u64 {
        self.call_epoch
    }

    /// The network as it is known, to be saved.
    #[must_use]
    pub fn netmap(&self) -> &Netmap {
        &self.netmap
    }

    /// Takes a note of the data plane.
    pub fn handle_note(&mut self, note: Note, now: Instant) {
        match note {
            Note::Control { source, relayed, datagram } => {
                self.handle_datagram(source, relayed, &datagram, now);
            }
            Note::PeerWanted(packet) => self.handle_peer_wanted(packet, now),
            Note::SessionWanted(peer) => self.handle_session_wanted(peer, now),
            Note::Active(peer) => self.handle_active(peer, now),
            Note::SessionConfirmed(peer) => self.handle_session_up(peer, now),
            Note::Answer(packet) => self.answer(packet, None),
            Note::TooBig { peer, mtu, answer } => self.answer(answer, Some((peer, mtu))),
            Note::Refused(answer) => self.handle_refused(&answer, now),
            Note::HeardOn { peer, via } => self.handle_heard(peer, via, now),
            Note::UnknownSession { via, relayed } => self.handle_stale(via, relayed, now),
            Note::Cookie { source: Source::Udp { remote, local, socket }, reply } => {
                self.datagrams.push_bytes(Target::Udp { remote, local, socket }, &reply);
            }
            // Relayed handshakes are limited by their sender, and asked for no cookie.
            Note::Cookie { source: Source::Link, .. } => {}
        }
    }

    /// Moves the datagrams that want sending into `out`, which is empty after this if there were
    /// none.
    pub fn take_datagrams(&mut self, out: &mut UdpBatch) {
        out.clear();
        std::mem::swap(out, &mut self.datagrams);
    }

    /// A datagram with a short life; call until none, before [`Self::take_datagrams`].
    pub fn poll_opener(&mut self) -> Option<Opener> {
        self.openers.pop_front()
    }

    /// A datagram that must not be cut on its way; call until none.
    pub fn poll_whole_probe(&mut self) -> Option<WholeProbe> {
        self.whole_probes.pop_front()
    }

    /// A message for the server; call until none. Dropped by the caller when there is no link.
    pub fn poll_message(&mut self) -> Option<ClientMessage> {
        self.messages.pop_front()
    }

    /// News; call until none.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
}

/// A source of randomness beside that of `seed`.
fn other_stream(seed: [u8; 32], mask: u8) -> StdRng {
    StdRng::from_seed(seed.map(|byte| byte ^ mask))
}
