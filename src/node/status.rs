//! Read-only views for `status`, tests and logs.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Identity, Node};
use crate::path::Via;
use crate::types::{Candidate, NodeId, NodeName, OverlayAddrs, PublicKey, Uplink};

/// How a peer can be reached at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathKind {
    /// On this path.
    Via(Via),
    /// No path yet, but being tried.
    Connecting,
    /// The server does not see it, and nothing answers.
    Offline,
}

impl PathKind {
    /// The word in `path.kind` of the JSON contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Via(via) => via.kind(),
            Self::Connecting => "connecting",
            Self::Offline => "offline",
        }
    }
}

/// This node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelfStatus {
    /// None before enrolment.
    pub identity: Option<Identity>,
    /// The node key.
    pub public_key: PublicKey,
    /// Whether there is a control connection.
    pub link_up: bool,
    /// Round trip to the relay.
    pub server_rtt: Option<Duration>,
    /// Dropped packets by reason.
    pub drops: Vec<(&'static str, u64)>,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Its addresses.
    pub addrs: OverlayAddrs,
    /// Whether the server sees it, or it answers directly.
    pub online: bool,
    /// The way that a packet sent now would take.
    pub path: PathKind,
    /// Where a direct path leads.
    pub remote: Option<SocketAddr>,
    /// For how long.
    pub since: Duration,
    /// Why, in a sentence.
    pub why: String,
    /// Smoothed round trip on that path.
    pub rtt: Option<Duration>,
    /// The longest inner packet that the path carries uncut, in bytes.
    pub mtu: u16,
    /// Of a thousand datagrams sent on that path in the last seconds, so many did not arrive.
    pub loss_permille: Option<u16>,
    /// The further uplink that the path goes by; none for the preferred one.
    pub uplink: Option<Uplink>,
    /// Inner packets that were too long for the path, and told so to their sender.
    pub too_big: u64,
    /// Inner bytes sent.
    pub tx_bytes: u64,
    /// Inner bytes received.
    pub rx_bytes: u64,
    /// Time since the last handshake.
    pub last_handshake: Option<Duration>,
    /// Whether there is a second session, so that sealing and opening do not wait for one another.
    pub second_session: bool,
}

impl Node {
    /// This node, as it is now.
    #[must_use]
    pub fn self_status(&self) -> SelfStatus {
        SelfStatus {
            identity: self.netmap.identity.clone(),
            public_key: self.keys.public(),
            link_up: self.link_up,
            server_rtt: self.relay.rtt(),
            drops: self.shared.drops().snapshot(),
        }
    }

    /// WireGuard handshakes that made a session, with anybody.
    #[must_use]
    pub fn handshakes(&self) -> u64 {
        self.handshakes
    }

    /// Packets that wait for a session or a path.
    #[must_use]
    pub fn waiting_packets(&self) -> usize {
        self.peers.values().map(|peer| peer.fast.lock().waiting()).sum()
    }

    /// The endpoints of our sockets on the local interfaces.
    #[must_use]
    pub fn host_endpoints(&self) -> &[SocketAddr] {
        &self.host_endpoints
    }

    /// Where we say that we can be reached.
    #[must_use]
    pub fn announced(&self) -> &[Candidate] {
        &self.announced
    }

    /// All peers, by number.
    #[must_use]
    pub fn peer_statuses(&self, now: Instant) -> Vec<PeerStatus> {
        self.peers.keys().filter_map(|id| self.peer_status(*id, now)).collect()
    }

    /// How a peer can be reached at this moment.
    pub(super) fn path_kind(&self, id: NodeId) -> Option<PathKind> {
        let peer = self.peers.get(&id)?;
        Some(match peer.agent.choice().primary {
            Some(via) => PathKind::Via(via),
            // What the server does not see is being tried only while the server itself is away.
            None if self.is_present(id) || (!self.link_up && peer.agent.is_trying()) => {
                PathKind::Connecting
            }
            None => PathKind::Offline,
        })
    }

    /// One peer.
    #[must_use]
    pub fn peer_status(&self, id: NodeId, now: Instant) -> Option<PeerStatus> {
        let peer = self.peers.get(&id)?;
        let info = self.netmap.peers.get(&id)?;
        let primary = peer.agent.choice().primary;
        let path = self.path_kind(id)?;
        let remote = match primary {
            Some(Via::Direct { remote, .. }) => Some(remote),
            Some(Via::RelayUdp) => self.relay.server(),
            Some(Via::RelayTcp) | None => None,
        };
        let why = match path {
            PathKind::Offline => "the server does not see it and it does not answer".to_string(),
            PathKind::Via(_) | PathKind::Connecting => peer.agent.why(),
        };
        let established = peer.fast.lock().session.established();
        let counters = &peer.fast.counters;
        Some(PeerStatus {
            id,
            name: info.name.clone(),
            addrs: info.addrs,
            online: self.is_present(id) || matches!(primary, Some(Via::Direct { .. })),
            path,
            remote,
            since: now.saturating_duration_since(peer.agent.primary_since()),
            why,
            rtt: peer.agent.rtt(),
            mtu: peer.fast.mtu(),
            loss_permille: primary.and_then(|via| peer.agent.loss_permille(via)),
            uplink: match primary {
                Some(Via::Direct { socket, .. }) => self.uplink_of(socket).cloned(),
                Some(Via::RelayUdp) => self.relay_uplink().cloned(),
                Some(Via::RelayTcp) | None => None,
            },
            too_big: counters.too_big.load(Ordering::Relaxed),
            tx_bytes: counters.tx_bytes.load(Ordering::Relaxed),
            rx_bytes: counters.rx_bytes.load(Ordering::Relaxed),
            last_handshake: established.map(|at| now.saturating_duration_since(at)),
            second_session: peer.fast.lock_second().is_some_and(|it| it.session.is_usable(now)),
        })
    }
}
