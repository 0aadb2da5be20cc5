//! The node's control plane, as a pure state machine.
//!
//! `handle_*` takes what happened, with the time; `poll_*` and [`Node::take_datagrams`] give what
//! is to be done. After any `handle_*` all of them are drained, then the caller sleeps until
//! [`Node::poll_timeout`]. This file holds fields and queues only; each rule of behaviour has a
//! room of its own:
//!
//! - `control`: what the server says, and what it is told
//! - `relay`: signing on at the relay, and the reflexive address that comes with it
//! - `disco`: probes in and out
//! - `predict`: which ports our NAT will give us next
//! - `sockets`: local ports beside the main one
//! - `signalling`: how news travels to the peers, and who may send to whom first
//! - `handshake`: WireGuard handshakes in and out
//! - `netmap`: the network as the server described it, also on disk
//! - `peer`: one peer's control state, and publishing it to the data plane
//! - `timers`: everything that happens because time passes
//! - `reach`: what programs are told that send to nobody
//! - `status`: read-only views

mod control;
mod disco;
mod handshake;
mod netmap;
mod peer;
mod predict;
mod reach;
mod relay;
mod signalling;
mod sockets;
mod status;
mod timers;

pub use netmap::{Identity, Netmap, NetmapDiff, PeerInfo};
pub use sockets::{MAX_EXTRA_SOCKETS, SocketOrder};
pub use status::{PathKind, PeerStatus, SelfStatus};

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::dataplane::{EngineKeys, Note, SessionSettings, Shared, UdpBatch};
use crate::path::{Answer, Via};
use crate::policy::Filter;
use crate::types::{Candidate, NodeId, PublicKey, SecretKey, SocketId};
use crate::wire::control::{ClientMessage, RefusedCode};
use crate::wire::disco::Tag;
use peer::PeerControl;
use predict::Prediction;
use relay::RelayClient;
use sockets::Sockets;

/// What can be set about a node.
#[derive(Debug, Clone, Copy)]
pub struct NodeSettings {
    /// WireGuard keys are renewed after this.
    pub rekey_after: Duration,
    /// In a network of up to so many peers, paths are made before anybody asks for them.
    pub eager_peers: usize,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self { rekey_after: SessionSettings::default().rekey_after, eager_peers: 64 }
    }
}

/// News for the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The node's own addresses or range are new: configure the interface.
    Identity(Identity),
    /// Something that must survive a restart changed.
    Save,
    /// The access rules changed: they must be on disk before anything else happens, since a node
    /// that starts without them is open.
    Rules,
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
    /// An answer to [`Node::ping`].
    Pinged {
        /// The number that the ping was given.
        token: u64,
        /// The round trip and the path.
        answer: Answer,
    },
    /// The server ended this membership, or does not know it.
    Refused(RefusedCode, String),
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

/// One node.
#[derive(Debug)]
pub struct Node {
    settings: NodeSettings,
    rng: StdRng,
    node_key: SecretKey,
    engine: EngineKeys,
    shared: Arc<Shared>,
    netmap: Netmap,
    filter: Option<Arc<Filter>>,
    peers: BTreeMap<NodeId, PeerControl>,
    peers_by_tag: BTreeMap<Tag, NodeId>,
    peers_by_key: BTreeMap<PublicKey, NodeId>,
    relay: RelayClient,
    link_up: bool,
    host_endpoints: Vec<SocketAddr>,
    announced: Vec<Candidate>,
    /// Since when the server knows the endpoint that our NAT gives us.
    announced_at: Option<Instant>,
    call_epoch: u64,
    open_pings: BTreeMap<crate::types::TxId, (u64, Instant)>,
    traffic_tick_at: Option<Instant>,
    engine_tick_at: Option<Instant>,
    datagrams: UdpBatch,
    prediction: Prediction,
    sockets: Sockets,
    openers: VecDeque<Opener>,
    scratch: VecDeque<(SocketAddr, Vec<u8>)>,
    packets: VecDeque<Vec<u8>>,
    messages: VecDeque<ClientMessage>,
    events: VecDeque<Event>,
}

impl Node {
    /// A node that knows what `netmap` says and is connected to nobody.
    ///
    /// `seed` is the source of all randomness but session keys. `call_epoch` must be higher than in
    /// any earlier life of this node: milliseconds of wall-clock time will do.
    #[must_use]
    pub fn new(
        node_key: SecretKey,
        netmap: Netmap,
        settings: NodeSettings,
        seed: [u8; 32],
        call_epoch: u64,
        now: Instant,
    ) -> Self {
        let mut node = Self {
            settings,
            rng: StdRng::from_seed(seed),
            engine: EngineKeys::new(&node_key),
            node_key,
            shared: Shared::new(now),
            netmap: Netmap::default(),
            filter: None,
            peers: BTreeMap::new(),
            peers_by_tag: BTreeMap::new(),
            peers_by_key: BTreeMap::new(),
            relay: RelayClient::default(),
            link_up: false,
            host_endpoints: Vec::new(),
            announced: Vec::new(),
            announced_at: None,
            call_epoch,
            open_pings: BTreeMap::new(),
            traffic_tick_at: None,
            engine_tick_at: None,
            datagrams: UdpBatch::default(),
            prediction: Prediction::default(),
            sockets: Sockets::default(),
            openers: VecDeque::new(),
            scratch: VecDeque::new(),
            packets: VecDeque::new(),
            messages: VecDeque::new(),
            events: VecDeque::new(),
        };
        node.restore(netmap, now);
        node
    }

    /// What the data plane's threads work on.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
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
            Note::SessionWanted(peer) => self.handle_session_wanted(peer, now),
            Note::Active(peer) => self.handle_active(peer, now),
            Note::SessionConfirmed(peer) => self.handle_session_up(peer, now),
            Note::Answer(packet) => self.answer(packet),
            Note::Refused(answer) => self.handle_refused(&answer, now),
            Note::HeardOn { peer, via } => self.handle_heard(peer, via, now),
            Note::UnknownSession { via, relayed } => self.handle_stale(via, relayed, now),
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

    /// An IP packet for this machine, to be written to the TUN interface; call until none.
    pub fn poll_packet(&mut self) -> Option<Vec<u8>> {
        self.packets.pop_front()
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
