//! What an agent is told and what it wants done.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::path::Via;
use crate::types::{SocketId, TxId};

/// What the agent wants sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathTransmit {
    /// A ping.
    Ping {
        /// On this path.
        via: Via,
        /// Its transaction.
        tx: TxId,
    },
    /// A ping as long as the data that holds an inner packet of `inner` bytes.
    Sized {
        /// On this path.
        via: Via,
        /// Its transaction.
        tx: TxId,
        /// The inner packet.
        inner: u16,
        /// Nobody on the way may cut it.
        whole: bool,
    },
    /// An empty packet of the session, which a filter cannot tell from data.
    Keepalive {
        /// On this path.
        via: Via,
    },
    /// A ping that dies after [`super::OPENER_TTL`] hops.
    Opener {
        /// Towards this endpoint.
        remote: SocketAddr,
        /// By this socket.
        socket: SocketId,
        /// Its transaction.
        tx: TxId,
    },
    /// The answer to a ping.
    Pong {
        /// On the path that the ping came by.
        via: Via,
        /// Of the ping.
        tx: TxId,
    },
    /// Our candidates, by relay: "please probe now".
    CallMeMaybe {
        /// The relay path.
        via: Via,
    },
}

/// What the agent has to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathEvent {
    /// Data goes another way from here on.
    Primary {
        /// Before.
        from: Option<Via>,
        /// After.
        to: Option<Via>,
        /// The cause, for logs and `status`.
        why: &'static str,
    },
}

/// A pong that answered one of our pings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// Its round trip.
    pub rtt: Duration,
    /// The path.
    pub via: Via,
}

/// When data last moved on the primary path, as the data plane counted it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Something was sent to the peer.
    pub sent: Option<Instant>,
    /// Something authenticated arrived from it on the primary path.
    pub heard: Option<Instant>,
}
