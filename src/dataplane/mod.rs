//! The data plane: packet functions over shared per-peer state.
//!
//! Follow a packet out: TUN frame -> [`outbound_frame`] (route, cut, seal) -> [`UdpBatch`]. In: UDP
//! train -> [`inbound_train`] (classify, open, source check) -> [`TunBatch`]. Buffers and the
//! time come in as arguments; two threads, the simulator and the tests call the same functions.
//!
//! What cannot be decided here (a handshake, disco, no session yet) becomes a [`Note`] for the
//! control plane. The control plane publishes a [`ForwardingTable`] and each peer's path; locks
//! are held per peer and direction only (`lanes`). No socket, no file, no clock.

mod attempt;
mod batch;
mod filter;
mod gate;
pub mod icmp;
mod inbound;
mod lanes;
pub mod offload;
mod outbound;
mod path_counts;
mod peer;
mod session;
mod sessions;
mod table;
mod traffic;
mod tun_batch;

pub use batch::{Run, Target, UdpBatch};
pub use inbound::{inbound, inbound_all, inbound_train};
pub(crate) use outbound::send_datagram;
pub use outbound::{flush_pending, outbound, outbound_frame, send_keepalive};
pub use path_counts::PathCounts;
pub use peer::{LockedPeer, Peer, PeerCounters, Records};
pub(crate) use session::sender_index;
pub use session::{
    EngineKeys, HandshakeOutcome, MIN_SEAL_BUFFER, Session, SessionSettings, handshake_sender,
};
pub(crate) use sessions::SLOT_MASK;
pub use table::ForwardingTable;
pub use traffic::Traffic;
pub use tun_batch::{Frame, TunBatch};

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::path::Via;
use crate::types::{DropCounters, NodeId, Rate, SharedAccount, SocketId};
use gate::Gate;

/// Where a datagram came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From a UDP socket.
    Udp {
        /// The sender's endpoint.
        remote: SocketAddr,
        /// Our address that it was sent to, when the kernel told.
        local: Option<IpAddr>,
        /// The socket of ours that it came to.
        socket: SocketId,
    },
    /// A relay frame on the control connection.
    Link,
}

impl Source {
    /// From this endpoint to the main socket.
    #[must_use]
    pub fn udp(remote: SocketAddr, local: Option<IpAddr>) -> Self {
        Self::Udp { remote, local, socket: SocketId::MAIN }
    }
}

/// Something for the control plane.
#[derive(Debug)]
pub enum Note {
    /// A handshake, disco or relay control message. `relayed` is its sender when it came in a
    /// relay frame; the frame's header is gone already.
    Control {
        /// Where from.
        source: Source,
        /// Through the relay, from whom.
        relayed: Option<NodeId>,
        /// The message.
        datagram: Vec<u8>,
    },
    /// A packet to an address whose owner the server may know; it waits.
    PeerWanted(Vec<u8>),
    /// There are packets for this peer and no session or no path.
    SessionWanted(NodeId),
    /// An answer to the sender of a packet that cannot go on as it is, for the TUN interface.
    Answer(Vec<u8>),
    /// The same to the sender of a packet that is too long for the path to this peer.
    TooBig {
        /// Whom the packet was for.
        peer: NodeId,
        /// Bytes of a packet that the answer says the path carries.
        mtu: u16,
        /// The answer.
        answer: Vec<u8>,
    },
    /// An answer to the peer whose packet the access rules refused.
    Refused(Vec<u8>),
    /// The first packet to this peer after a pause was sent: watch its path.
    Active(NodeId),
    /// The first packet of a new session was opened: both sides have it.
    SessionConfirmed(NodeId),
    /// Data arrived under keys that we do not have: somebody talks to an earlier life of ours.
    UnknownSession {
        /// The way it came.
        via: Via,
        /// Through the relay, from whom.
        relayed: Option<NodeId>,
    },
    /// What a sender of handshakes gets in a flood of them: whoever has a socket sends it back at
    /// once, since there may be many.
    Cookie {
        /// Where the handshake came from.
        source: Source,
        /// The datagram.
        reply: [u8; 64],
    },
    /// Authenticated data arrived by another way than the primary.
    HeardOn {
        /// The peer.
        peer: NodeId,
        /// The way.
        via: Via,
    },
}

impl Note {
    /// Whether nothing says it again, if it is lost.
    #[must_use]
    pub fn is_said_once(&self) -> bool {
        matches!(self, Self::SessionWanted(_) | Self::Active(_) | Self::SessionConfirmed(_))
    }
}

/// What the threads and the control plane of one node share.
#[derive(Debug)]
pub struct Shared {
    table: ArcSwap<ForwardingTable>,
    drops: DropCounters,
    sent: Traffic,
    received: Traffic,
    base: Instant,
    unknown_noted: SharedAccount,
    unroutable_answered: SharedAccount,
    peers_wanted: SharedAccount,
    gate: Gate,
}

impl Shared {
    /// Shared state with an empty table. `base` is where activity stamps start, `keys` are whose
    /// handshakes are let in.
    #[must_use]
    pub fn new(base: Instant, keys: &EngineKeys) -> Arc<Self> {
        Arc::new(Self {
            table: ArcSwap::from_pointee(ForwardingTable::default()),
            drops: DropCounters::default(),
            sent: Traffic::default(),
            received: Traffic::default(),
            base,
            unknown_noted: SharedAccount::default(),
            unroutable_answered: SharedAccount::default(),
            peers_wanted: SharedAccount::default(),
            gate: Gate::new(keys),
        })
    }

    /// Lets handshakes for these keys of ours in, and for no others.
    pub(crate) fn let_in<'k>(&self, keys: impl Iterator<Item = &'k EngineKeys>) {
        self.gate.let_in(keys);
    }

    /// The table of this moment; take it once per batch.
    #[must_use]
    pub fn table(&self) -> Arc<ForwardingTable> {
        self.table.load_full()
    }

    /// Publishes a new table.
    pub fn publish(&self, table: ForwardingTable) {
        self.table.store(Arc::new(table));
    }

    /// Why packets died.
    #[must_use]
    pub fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// Inner packets that were sent.
    #[must_use]
    pub fn sent(&self) -> &Traffic {
        &self.sent
    }

    /// Inner packets that came in, and were let in.
    #[must_use]
    pub fn received(&self) -> &Traffic {
        &self.received
    }

    /// `now` as a number for an atomic: milliseconds since the start, never zero.
    #[must_use]
    pub fn stamp(&self, now: Instant) -> u64 {
        u64::try_from(self.since_start(now).as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    fn since_start(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.base)
    }

    /// Whether a packet of an unknown session may be noted now.
    fn may_note_unknown(&self, now: Instant) -> bool {
        self.unknown_noted.take(UNKNOWN_NOTES, 1, self.since_start(now))
    }

    /// Whether a packet to an address that nobody has may be answered now.
    fn may_answer_unroutable(&self, now: Instant) -> bool {
        self.unroutable_answered.take(UNROUTABLE_ANSWERS, 1, self.since_start(now))
    }

    /// Whether one more packet to an unknown peer may wait for it.
    fn may_want_peer(&self, now: Instant) -> bool {
        self.peers_wanted.take(PEERS_WANTED, 1, self.since_start(now))
    }

    /// The instant of a stamp; zero is never.
    #[must_use]
    pub fn unstamp(&self, stamp: u64) -> Option<Instant> {
        (stamp != 0).then(|| self.base + Duration::from_millis(stamp - 1))
    }
}

/// Notes of unknown sessions: anybody can send such packets.
const UNKNOWN_NOTES: Rate = Rate::per_second(10, 1);
/// Answers to packets that go nowhere: as many as a program that tries addresses can wait for.
const UNROUTABLE_ANSWERS: Rate = Rate::per_second(50, 1);
/// Packets that wait for unknown peers: the first ones to some dozens at once. A program that sends to
/// nobody for ever must not keep the control plane busy.
const PEERS_WANTED: Rate = Rate::per_second(640, 64);

#[cfg(test)]
mod tests;
