//! Which way to one peer.
//!
//! A [`PathAgent`] keeps the candidates of one peer, probes them, and says which path a packet
//! sent now should take: its *primary*. It knows no keys and no sockets: the node seals and sends
//! what [`PathAgent::poll_transmit`] gives, and hands in what arrives.
//!
//! The model, in the order of a connection's life:
//!
//! 1. Data goes by relay at once, whenever there is one. Nothing waits for probing.
//! 2. A *round* sends pings to every candidate at the same time, a short ladder each, together
//!    with a call-me-maybe by relay that makes the peer do the same: both NATs are opened by the
//!    outgoing ping, and let the other's ping in. Who moves first sends an *opener*, a ping that
//!    dies on the way, so that it does not reach the other's NAT before that is open.
//! 3. A ping that arrives is answered by a pong *and*, when its path is not proved, by a ping on
//!    the same path (a triggered check, RFC 8445 section 7.3.1.4). Its source becomes a
//!    peer-reflexive candidate: behind a symmetric NAT that is the only endpoint that works.
//! 4. A path is *proved* by a pong to our own ping. Only proved paths carry data; the best of them
//!    is the primary, with hysteresis.
//! 5. A path carries data alone once data and a full packet have arrived on it; until then all is
//!    doubled onto the relay. What demotes a path is silence while we send, or data that the peer
//!    does not get: data is doubled while in doubt, and moves to the relay when the doubt stays.
//!    A path that was left proves itself with copies of data before it carries any alone.
//! 6. A relayed peer in use is tried again, ever more rarely; a network change or news of the peer
//!    starts over.
//! 7. A pair that stays on the relay for seconds agrees on a costlier way (`birthday`).

mod agent;
pub mod birthday;
mod liveness;
mod mtu;
mod nat;
pub mod predict;
mod probe;
mod quality;
mod relay_mtu;
mod score;
pub mod side;
mod soonest;
#[cfg(test)]
mod tests;
mod trickle;
pub mod verdict;

pub use agent::{
    Answer, EARLY_BYTES, Line, OPENER_TTL, PathAgent, PathEvent, PathTransmit, Signalling, Traffic,
    UNDERLAY_BYTES, WORTH_A_PATH,
};
pub use mtu::OVERHEAD_V4;
pub use nat::{Filtering, Mapping, NatFacts, NatKind};
pub use probe::ProbeOutcome;
pub use soonest::Soonest;
pub use trickle::Together;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::types::SocketId;

/// While data flows the node tells each agent this often what the data plane counted: short
/// against the second that the death of a path may cost.
pub const TRAFFIC_TICK: Duration = Duration::from_millis(100);

/// One way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// Straight to this endpoint, from `local` when the kernel said where it arrived.
    Direct {
        /// The peer's endpoint.
        remote: SocketAddr,
        /// Our address on that path, so that an answer leaves by where the question came in.
        local: Option<IpAddr>,
        /// The socket of ours that it goes by.
        socket: SocketId,
    },
    /// By the server, in UDP datagrams.
    RelayUdp,
    /// By the server, on the control connection.
    RelayTcp,
}

impl Via {
    /// The direct path to an endpoint by the main socket.
    #[must_use]
    pub fn direct(remote: SocketAddr) -> Self {
        Self::Direct { remote, local: None, socket: SocketId::MAIN }
    }

    /// The endpoint and the socket of a direct path: what tells it from all others.
    pub(crate) fn place(self) -> Option<Place> {
        match self {
            Self::Direct { remote, socket, .. } => Some(Place { remote, socket }),
            Self::RelayUdp | Self::RelayTcp => None,
        }
    }

    /// Whether it is the same path as another, whichever address of ours was asked on it.
    pub(crate) fn is_same(self, other: Self) -> bool {
        match (self, other) {
            (Self::Direct { .. }, Self::Direct { .. }) => self.place() == other.place(),
            (one, other) => one == other,
        }
    }

    /// The word in `path.kind` of the JSON contract.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Direct { .. } => "direct",
            Self::RelayUdp => "relay-udp",
            Self::RelayTcp => "relay-tcp",
        }
    }

    /// Whether this is a relay path.
    #[must_use]
    pub fn is_relay(self) -> bool {
        !matches!(self, Self::Direct { .. })
    }
}

impl std::fmt::Display for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Direct { remote, .. } => write!(f, "direct {remote}"),
            Self::RelayUdp => f.write_str("relay-udp"),
            Self::RelayTcp => f.write_str("relay-tcp"),
        }
    }
}

/// An endpoint of the peer, as one socket of ours reaches it. Behind a NAT two sockets that send to
/// one endpoint are on two paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) remote: SocketAddr,
    pub(crate) socket: SocketId,
}

impl Place {
    /// The endpoint, reached by the main socket.
    pub(crate) fn main(remote: SocketAddr) -> Self {
        Self { remote, socket: SocketId::MAIN }
    }
}

/// What a packet to a peer should do now: published to the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Choice {
    /// The path of data; none when there is no way to the peer.
    pub primary: Option<Via>,
    /// A second path that gets a copy of everything while the first is in doubt. WireGuard's
    /// replay window takes the doubles out.
    pub duplicate: Option<Via>,
    /// The second path has not answered yet: it gets [`EARLY_BYTES`] at the most.
    pub early: bool,
}
