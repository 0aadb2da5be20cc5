//! Places by several uplinks, ours or the peer's: proved before they are needed, used when the
//! preferred ones fail, and left when those work again.
//!
//! A place is *second* when it goes by a further uplink of either side. It never beats one that is
//! not, however fast it is: the order of the uplinks is the administrator's, and a later one often
//! costs money. While the primary is in doubt, second places that answer get a copy of everything,
//! ahead of the relay; when it is given up, the best of them takes over.
//!
//! Second places are probed when they become known, and kept open while the peer is used.

use std::time::{Duration, Instant};

use rand::Rng;

use super::choose::KEEPALIVE;
use super::opener::Cause;
use super::rounds::{CALL_SPACING, WORTH_A_PATH};
use super::{Endpoint, PathAgent, PathTransmit};
use crate::path::{Place, Via};
use crate::types::{CandidateKind, SocketId, is_of_one_site};

/// Places by one further uplink: a peer has few public endpoints.
const MAX_PLACES: usize = 4;
/// While the primary is in doubt, the others are asked this often.
const ROUSE_SPACING: Duration = Duration::from_millis(250);
/// A place that was heard this long ago needs no keepalive of ours.
const KEPT_OPEN: Duration = Duration::from_secs(20);
/// Waits between rounds for the preferred places while a second one carries data; the last one
/// repeats.
const BACK: [Duration; 5] = [
    Duration::from_secs(3),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(60),
];
/// Nobody waits for places that nobody uses: their first round starts some time within this.
const UNHURRIED: Duration = Duration::from_secs(2);

/// The socket of a further uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// The socket.
    pub socket: SocketId,
    /// Its family.
    pub ipv6: bool,
    /// It is there for the paths that go by it, and gets no new ones.
    pub retiring: bool,
}

/// What an agent keeps about uplinks.
#[derive(Debug, Default)]
pub(super) struct Uplinks {
    lines: Vec<Line>,
    roused_at: Option<Instant>,
    /// When second places are looked after.
    stand_by_at: Option<Instant>,
    /// When the preferred places are tried again, and how often they were.
    back_at: Option<Instant>,
    backs: usize,
}

impl Uplinks {
    pub(super) fn has(&self, socket: SocketId) -> bool {
        self.lines.iter().any(|line| line.socket == socket)
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        self.stand_by_at.into_iter().chain(self.back_at).min()
    }
}

impl PathAgent {
    /// The sockets of all further uplinks.
    pub fn set_uplinks(&mut self, lines: &[Line], now: Instant) {
        if self.uplinks.lines == lines {
            return;
        }
        self.uplinks.lines = lines.to_vec();
        self.spread();
        self.plan_stand_by(now);
    }

    /// Whether data goes by this socket.
    #[must_use]
    pub fn uses_socket(&self, socket: SocketId) -> bool {
        self.primary.and_then(Via::place).is_some_and(|place| place.socket == socket)
    }

    /// The preferred uplink works again: it is tried now.
    pub fn handle_uplink_back(&mut self, now: Instant) {
        if self.on_second() {
            (self.uplinks.back_at, self.uplinks.backs) = (Some(now), 0);
            self.watch_uplinks(now);
        } else if self.wanted && !self.is_direct() {
            // Data went by the relay while no further uplink led to the peer.
            (self.round_at, self.retries) = (None, 0);
            self.start_round(Cause::Wanted, now);
        }
    }

    /// Whether either side has a further uplink.
    pub(super) fn has_uplinks(&self) -> bool {
        !self.uplinks.lines.is_empty()
            || self.endpoints.values().any(|endpoint| endpoint.kind == CandidateKind::Uplink)
    }

    /// Whether a place goes by a further uplink of either side.
    pub(super) fn is_second(&self, place: Place) -> bool {
        if self.uplinks.has(place.socket) {
            return true;
        }
        let kind = self.endpoints.get(&place).map(|endpoint| endpoint.kind);
        match kind {
            Some(CandidateKind::Uplink) => true,
            // Another port of the peer's further uplink, seen before it was told or behind a NAT that
            // maps by destination.
            Some(CandidateKind::PeerReflexive) => {
                let same_ip = |it: &&Place| it.remote.ip() == place.remote.ip();
                let kinds = || {
                    let same = self.endpoints.iter().filter(|(it, _)| same_ip(it));
                    same.map(|(_, endpoint)| endpoint.kind)
                };
                kinds().any(|kind| kind == CandidateKind::Uplink)
                    && kinds().all(|kind| {
                        matches!(kind, CandidateKind::Uplink | CandidateKind::PeerReflexive)
                    })
            }
            _ => false,
        }
    }

    /// Whether data goes by a further uplink of either side.
    pub(super) fn on_second(&self) -> bool {
        self.primary.and_then(Via::place).is_some_and(|place| self.is_second(place))
    }

    /// Makes a place by each further uplink of what the peer has announced to everybody.
    pub(super) fn spread(&mut self) {
        for line in self.uplinks.lines.iter().filter(|line| !line.retiring) {
            let there = self.endpoints.keys().filter(|place| place.socket == line.socket).count();
            let public: Vec<(Place, CandidateKind)> = self
                .endpoints
                .iter()
                .filter(|(place, endpoint)| {
                    place.socket == SocketId::MAIN
                        && place.remote.is_ipv6() == line.ipv6
                        && !is_of_one_site(place.remote.ip())
                        && matches!(
                            endpoint.kind,
                            CandidateKind::Host
                                | CandidateKind::Reflexive
                                | CandidateKind::PortMapped
                                | CandidateKind::Uplink
                        )
                })
                .map(|(place, endpoint)| (Place { socket: line.socket, ..*place }, endpoint.kind))
                .filter(|(place, _)| !self.endpoints.contains_key(place))
                .take(MAX_PLACES.saturating_sub(there))
                .collect();
            for (place, kind) in public {
                self.endpoints.insert(place, Endpoint::new(kind));
            }
        }
    }

    /// Second places are new: they are probed, at once if the peer is in use.
    pub(super) fn plan_stand_by(&mut self, now: Instant) {
        if !self.has_uplinks() || !self.wanted {
            return;
        }
        let wait = match self.is_used(now) {
            true => Duration::ZERO,
            false => UNHURRIED.mul_f64(self.rng.random_range(0.0..1.0)),
        };
        let at = now + wait;
        let planned = self.uplinks.stand_by_at;
        self.uplinks.stand_by_at = Some(planned.map_or(at, |planned| planned.min(at)));
    }

    fn is_used(&self, now: Instant) -> bool {
        self.used_at.is_some_and(|at| now.saturating_duration_since(at) < WORTH_A_PATH)
    }

    /// Data flows: second places are looked after again.
    pub(super) fn note_used(&mut self, now: Instant) {
        if self.uplinks.stand_by_at.is_none() && self.is_direct() {
            self.plan_stand_by(now);
        }
    }

    /// Does what is due about uplinks.
    pub(super) fn watch_uplinks(&mut self, now: Instant) {
        if self.uplinks.stand_by_at.is_some_and(|at| at <= now) {
            self.uplinks.stand_by_at = None;
            if self.wanted && self.has_uplinks() {
                self.stand_by(now);
            }
        }
        if self.uplinks.back_at.is_some_and(|at| at <= now) {
            self.uplinks.back_at = None;
            if self.wanted && self.on_second() {
                let last = BACK.len() - 1;
                let step = if self.is_used(now) { self.uplinks.backs.min(last) } else { last };
                self.uplinks.backs += 1;
                self.uplinks.back_at = Some(now + BACK[step]);
                self.start_side_round(Cause::Wanted, now);
            }
        }
    }

    /// The primary is another one.
    pub(super) fn note_primary(&mut self, now: Instant) {
        self.uplinks.backs = 0;
        self.uplinks.back_at = self.on_second().then(|| now + BACK[0]);
        if self.is_direct() && self.is_used(now) {
            self.plan_stand_by(now);
        }
    }

    /// Keeps second places open while the peer is used, and probes those that have not answered.
    fn stand_by(&mut self, now: Instant) {
        let others: Vec<(Place, bool, bool)> = self
            .endpoints
            .iter()
            .filter(|(place, _)| self.is_second(**place))
            .map(|(place, endpoint)| {
                let last = endpoint.heard.max(endpoint.prober.last_pong());
                let lately = last.is_some_and(|at| now.saturating_duration_since(at) < KEPT_OPEN);
                (*place, endpoint.proved(now), lately)
            })
            .collect();
        if others.iter().any(|(_, proved, _)| !proved) {
            self.start_side_round(Cause::Wanted, now);
        }
        for (place, ..) in others.iter().filter(|(_, proved, lately)| *proved && !lately) {
            if let Some(via) = self.direct(*place) {
                self.ping(via, now);
            }
        }
        if self.is_used(now) && !others.is_empty() {
            let jitter = Duration::from_millis(self.rng.random_range(0..2_000));
            self.uplinks.stand_by_at = Some(now + KEEPALIVE - KEEPALIVE / 4 + jitter);
        }
    }

    /// Pings what is not proved while data goes on as it does, and asks the peer to do the same.
    pub(super) fn start_side_round(&mut self, cause: Cause, now: Instant) {
        let hold = self.hold(cause, now);
        for (place, endpoint) in &mut self.endpoints {
            if endpoint.proved(now) || endpoint.prober.in_round() {
                continue;
            }
            let hold = if endpoint.wants_opener(place.remote) { hold } else { Duration::ZERO };
            endpoint.prober.start_held_round(hold, now);
        }
        let recent = |at: Instant| now.saturating_duration_since(at) < CALL_SPACING;
        if let Some(via) = self.relay.filter(|_| cause != Cause::Called)
            && !self.called_at.is_some_and(recent)
        {
            self.called_at = Some(now);
            self.transmits.push_back(PathTransmit::CallMeMaybe { via });
        }
        self.ping_due(now);
    }

    /// The primary owes an answer: do the others have one?
    pub(super) fn rouse(&mut self, now: Instant) {
        let recent = |at: Instant| now.saturating_duration_since(at) < ROUSE_SPACING;
        let Some(since) = self.doubt.doubled_since() else { return };
        if !self.has_uplinks() || self.uplinks.roused_at.is_some_and(recent) {
            return;
        }
        self.uplinks.roused_at = Some(now);
        let primary = self.primary.and_then(Via::place);
        let on_second = self.on_second();
        let asked: Vec<Place> = self
            .endpoints
            .iter()
            .filter(|(place, endpoint)| {
                let answered = endpoint.prober.last_pong().is_some_and(|at| at >= since);
                Some(**place) != primary
                    && !answered
                    && endpoint.prober.last_pong().is_some()
                    && (on_second || self.is_second(**place))
            })
            .map(|(place, _)| *place)
            .collect();
        for place in asked {
            if let Some(via) = self.direct(place) {
                self.ping(via, now);
            }
        }
        self.start_side_round(Cause::Wanted, now);
    }

    /// The second place that has answered since the primary came into doubt.
    pub(super) fn second_that_answers(&self) -> Option<Via> {
        let since = self.doubt.doubled_since()?;
        let primary = self.primary.and_then(Via::place);
        self.endpoints
            .iter()
            .filter(|(place, endpoint)| {
                Some(**place) != primary
                    && endpoint.prober.last_pong().is_some_and(|at| at >= since)
                    && self.is_second(**place)
            })
            .min_by_key(|(_, endpoint)| endpoint.prober.srtt())
            .map(|(place, endpoint)| endpoint.via(*place))
    }
}
