//! What an agent knows of one endpoint of the peer, as one socket of ours reaches it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::PROOF_LIFETIME;
use super::proof::Trust;
use crate::path::mtu::MtuSearch;
use crate::path::probe::Prober;
use crate::path::quality::Delivery;
use crate::path::{Place, Via};
use crate::types::CandidateKind;

/// When the primary dies, another path that was heard this long ago takes over at once.
const JUST_NOW: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) kind: CandidateKind,
    /// Its place in the last call that told it.
    pub(super) rank: usize,
    pub(super) local: Option<IpAddr>,
    pub(super) prober: Prober,
    pub(super) heard: Option<Instant>,
    /// When the peer last pinged us by it.
    pub(super) pinged_at: Option<Instant>,
    pub(super) penalty_until: Option<Instant>,
    pub(super) delivery: Delivery,
    pub(super) mtu: MtuSearch,
    pub(super) trust: Trust,
    /// How often it was left for good reason since it last worked for long.
    pub(super) failures: u32,
}

impl Endpoint {
    pub(super) fn new(kind: CandidateKind) -> Self {
        let guess = matches!(kind, CandidateKind::Predicted | CandidateKind::Static);
        let prober = if guess { Prober::for_guess() } else { Prober::default() };
        Self {
            kind,
            rank: 0,
            local: None,
            prober,
            heard: None,
            pinged_at: None,
            penalty_until: None,
            delivery: Delivery::default(),
            mtu: MtuSearch::default(),
            trust: Trust::default(),
            failures: 0,
        }
    }

    /// The peer says what this endpoint is, which may have been found before: whether it is of a further
    /// uplink, and that a guess of a forwarded port is where the server sees the peer.
    pub(super) fn note_kind(&mut self, kind: CandidateKind) {
        let uplink = CandidateKind::Uplink;
        if (kind == uplink) != (self.kind == uplink) || self.kind == CandidateKind::Static {
            self.kind = kind;
        }
    }

    /// Told in calls only, and the newest call counts.
    pub(super) fn is_told_in_calls(&self) -> bool {
        matches!(self.kind, CandidateKind::Predicted | CandidateKind::Static)
    }

    pub(super) fn via(&self, Place { remote, socket }: Place) -> Via {
        Via::Direct { remote, local: self.local, socket }
    }

    pub(super) fn proved(&self, now: Instant) -> bool {
        let fresh = |at: Option<Instant>| {
            at.is_some_and(|at| now.saturating_duration_since(at) < PROOF_LIFETIME)
        };
        fresh(self.prober.last_pong()) || (self.prober.last_pong().is_some() && fresh(self.heard))
    }

    /// Whether it has failed a moment ago: it is not taken before anything else that there is.
    pub(super) fn is_penalised(&self, now: Instant) -> bool {
        self.penalty_until.is_some_and(|until| until > now)
    }

    pub(super) fn heard_lately(&self, now: Instant) -> bool {
        let last = self.heard.max(self.prober.last_pong());
        last.is_some_and(|at| now.saturating_duration_since(at) < JUST_NOW)
    }

    pub(super) fn forget(&mut self) {
        self.prober.forget();
        self.heard = None;
        self.delivery = Delivery::default();
        self.mtu = MtuSearch::default();
    }
}
