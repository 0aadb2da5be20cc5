//! Who sends to whose NAT first, and how the first one avoids to spoil it.
//!
//! A router whose own input is open (a Linux box that masquerades and accepts everything) remembers
//! a stranger's datagram that it had nowhere to deliver to. The memory owns the pair of endpoints:
//! the inside host's own datagram to that stranger is then moved to another port, and the pair fails
//! for as long as somebody keeps probing. So who sends first opens only its own NAT, with a ping
//! that dies after [`OPENER_TTL`] hops, and *holds* the pings that reach the other side until that
//! has opened its NAT too:
//!
//! - The peer called us: it has opened before it called. No hold.
//! - The server tells both sides at the same instant: the way from peer to peer is not longer than
//!   the difference of their ways to the server (the triangle inequality), so a moment for the
//!   machines' own delays is enough.
//! - Only our call tells the peer: our round trip to the server is enough, by the same inequality.
//! - A datagram of the peer arrived on the path: its NAT is open. The hold ends.
//!
//! All that holds only when the peer knows the endpoint that our NAT gives us. Until that is sure,
//! nothing of the peer proves that it has opened its NAT for us. Behind a NAT that counts the
//! server never knows it: only our call tells the peer the ports that come next, and it may have to
//! wait until we have looked where the NAT stands.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Endpoint, PathAgent};
use crate::types::{CandidateKind, is_of_one_site};

/// Hops that an opener lives: through the home's router, and not into another home.
pub const OPENER_TTL: u8 = 2;

/// What two machines that are told something at the same time may differ in acting on it.
const MOMENT: Duration = Duration::from_millis(8);
/// The shortest hold for a peer that has to be called.
const SHORTEST_CALL: Duration = Duration::from_millis(40);
/// The hold while the way to the server was not measured, or there is none.
const UNMEASURED: Duration = Duration::from_millis(400);
/// What we announced is known to the peer after this, or two round trips to the server.
const SETTLE: Duration = Duration::from_millis(50);

/// How news travels between us and the peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signalling {
    /// Our round trip to the server.
    pub server_rtt: Option<Duration>,
    /// Since when the server knows the endpoint that our NAT gives us; none while it does not.
    pub announced_at: Option<Instant>,
    /// How late the server may tell the peer what it tells us, when the peer acts on that at once;
    /// none when it waits to be called.
    pub lag: Option<Duration>,
    /// Our NAT hands out a port for each destination, in order: only our calls tell where we are.
    pub counts: bool,
    /// Our calls say more than the server knows: ports that we guess, or that may be forwarded.
    pub has_guesses: bool,
    /// Of the two sides, one sends to guessed ports in another order, so that their guesses meet.
    pub doubles: bool,
}

/// Why a round starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The peer asked for it.
    Called,
    /// The server told us and the peer something at the same time.
    ToldBoth,
    /// We want it, and call the peer.
    Wanted,
    /// The same, and soon after the last one: the last guesses missed.
    Guess,
}

impl PathAgent {
    /// Takes how news travels; the next round is timed by it.
    pub fn set_signalling(&mut self, signalling: Signalling) {
        self.signalling = signalling;
    }

    /// How long pings into the peer's NAT wait in a round of this cause.
    pub(super) fn hold(&self, cause: Cause, now: Instant) -> Duration {
        let Signalling { server_rtt, announced_at, lag, counts, .. } = self.signalling;
        let call = server_rtt.map_or(UNMEASURED, |rtt| rtt.max(SHORTEST_CALL));
        if counts {
            // With the look at the NAT.
            return call + server_rtt.unwrap_or_default();
        }
        let settle = SETTLE.max(server_rtt.unwrap_or_default() * 2);
        let settled = announced_at.is_some_and(|at| now.saturating_duration_since(at) >= settle);
        match (cause, lag) {
            (Cause::Called, _) if settled => Duration::ZERO,
            // What is new is just what the server tells both.
            (Cause::ToldBoth, Some(lag)) if announced_at.is_some() => MOMENT + lag,
            _ => call,
        }
    }
}

impl Endpoint {
    /// Whether a NAT is likely in front of this endpoint that an early ping could spoil. Host
    /// candidates are behind none, and mapped ports are let in by the router itself.
    pub(super) fn wants_opener(&self, remote: SocketAddr) -> bool {
        let behind_nat = match self.kind {
            CandidateKind::Reflexive
            | CandidateKind::PeerReflexive
            | CandidateKind::Predicted
            | CandidateKind::Uplink => true,
            CandidateKind::Host | CandidateKind::PortMapped | CandidateKind::Static => false,
        };
        behind_nat && !is_of_one_site(remote.ip())
    }
}
