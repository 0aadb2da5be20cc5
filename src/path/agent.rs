//! The path agent of one peer: what arrives, what time brings, and which path is chosen.
//!
//! The model is in the parent's documentation. `rounds` probes, `choose` picks the primary; whether
//! it is alive is the business of `liveness`.

mod choose;
mod early;
mod endpoint;
mod measured;
mod messages;
mod opener;
mod proof;
mod rounds;
mod sockets;
mod uplinks;
mod views;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::liveness::Doubt;
use super::probe::Prober;
use super::quality::Delivery;
use super::relay_mtu::RelayMtu;
use super::soonest::Soonest;
use super::trickle::{Together, Trickle};
use super::{Place, Via};
use crate::types::{
    BASE_MTU, Candidate, CandidateKind, MAX_CANDIDATES, SizeCounts, SocketId, TxId, usable_underlay,
};
use crate::wire::disco::{PING_LEN, PONG_LEN};
use choose::{KEEPALIVE, relay_cause};
use early::Early;
pub use early::{EARLY_BYTES, UNDERLAY_BYTES};
use endpoint::Endpoint;
pub use messages::{Answer, PathEvent, PathTransmit, Traffic};
use opener::Cause;
pub use opener::{OPENER_TTL, Signalling};
use proof::{Trial, Trust};
pub use rounds::WORTH_A_PATH;
pub use uplinks::Line;
use uplinks::Uplinks;

/// An endpoint that answered this long ago, and was not heard since, has to prove itself again.
const PROOF_LIFETIME: Duration = Duration::from_secs(60);
/// A proved path is not checked again for this long when the peer pings it.
const RECENT_PROOF: Duration = Duration::from_secs(5);
/// Pings that come so close together are no keepalives.
const HASTE: Duration = Duration::from_millis(150);
/// Two pings to one endpoint are at least this far apart, whatever asks for them.
const PING_SPACING: Duration = Duration::from_millis(20);

/// Keeps the candidates of one peer and picks its primary path.
#[derive(Debug)]
pub struct PathAgent {
    rng: StdRng,
    wanted: bool,
    signalling: Signalling,
    endpoints: BTreeMap<Place, Endpoint>,
    relay: Option<Via>,
    relay_prober: Prober,
    relay_delivery: Delivery,
    relay_mtu: RelayMtu,
    mtu_limit: u16,
    /// Data is doubled onto the relay, for a reason that `proof` knows.
    doubled: bool,
    trial: Option<Trial>,
    early: Option<Early>,
    /// When copies were last sent to an endpoint that had not answered.
    early_at: Option<Instant>,
    /// When the server told candidates that were new.
    told_at: Option<Instant>,
    primary: Option<Via>,
    primary_since: Instant,
    why: &'static str,
    doubt: Doubt,
    last_switch: Option<Instant>,
    round_at: Option<Instant>,
    called_at: Option<Instant>,
    /// A call of the peer in this round was answered with another one of ours.
    called_back: bool,
    call_epoch: u64,
    retry_at: Option<Instant>,
    retries: usize,
    used_at: Option<Instant>,
    guesses: usize,
    keepalive_at: Option<Instant>,
    /// Since when the cheap ways are tried in vain.
    stuck_since: Option<Instant>,
    /// An extra socket by which the peer is tried, too.
    fresh: Option<SocketId>,
    uplinks: Uplinks,
    trickle: Trickle,
    /// That of all peers, if there is one.
    together: Option<Together>,
    transmits: VecDeque<PathTransmit>,
    events: VecDeque<PathEvent>,
}

impl PathAgent {
    /// An agent without any candidate. `seed` decides its transaction ids.
    #[must_use]
    pub fn new(seed: [u8; 32], now: Instant) -> Self {
        Self {
            rng: StdRng::from_seed(seed),
            wanted: false,
            signalling: Signalling::default(),
            endpoints: BTreeMap::new(),
            relay: None,
            relay_prober: Prober::default(),
            relay_delivery: Delivery::default(),
            relay_mtu: RelayMtu::default(),
            mtu_limit: BASE_MTU,
            doubled: false,
            trial: None,
            early: None,
            early_at: None,
            told_at: None,
            primary: None,
            primary_since: now,
            why: "nothing was tried yet",
            doubt: Doubt::default(),
            last_switch: None,
            round_at: None,
            called_at: None,
            called_back: false,
            call_epoch: 0,
            retry_at: None,
            retries: 0,
            used_at: None,
            guesses: 0,
            keepalive_at: None,
            stuck_since: None,
            fresh: None,
            uplinks: Uplinks::default(),
            trickle: Trickle::default(),
            together: None,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// What goes to addresses that have proved nothing is on this account, too: that of all peers.
    pub fn share_account(&mut self, together: Together) {
        self.together = Some(together);
    }

    // ---- what the node tells -------------------------------------------------------------------

    /// Whether a direct path to this peer is worth probes and keepalives.
    pub fn set_wanted(&mut self, wanted: bool, now: Instant) {
        if wanted && !self.wanted {
            self.wanted = true;
            let told = self.told_at == Some(now);
            self.start_round(if told { Cause::ToldBoth } else { Cause::Wanted }, now);
            if self.keepalive_at.is_none() {
                // The path in use is kept open again, if it is still there.
                self.verify(now);
            }
        }
        if self.wanted && !wanted {
            self.forget_extra_sockets(now);
            self.stuck_since = None;
        }
        self.wanted = wanted;
    }

    /// Which relay path there is to the peer, if any.
    pub fn set_relay(&mut self, relay: Option<Via>, now: Instant) {
        if relay == self.relay {
            return;
        }
        let appeared = self.relay.is_none() && relay.is_some();
        // UDP leaves this place again: nothing else tells that a direct path may work now.
        let udp = self.relay == Some(Via::RelayTcp) && relay == Some(Via::RelayUdp);
        let udp_failed = self.relay == Some(Via::RelayUdp) && relay == Some(Via::RelayTcp);
        let why = relay_cause(self.relay, relay);
        self.relay = relay;
        self.relay_prober.forget();
        if relay.is_none() {
            self.stuck_since = None;
        }
        self.relay_delivery = Delivery::default();
        self.relay_mtu = RelayMtu::default();
        self.choose(why, now);
        if udp_failed {
            self.show_that_udp_failed(now);
        }
        if (appeared || udp && !self.is_direct()) && self.wanted {
            self.start_round(Cause::Wanted, now);
        }
    }

    /// Takes the peer's announced candidates; those it no longer announces are dropped unless they
    /// work.
    pub fn set_candidates(&mut self, candidates: &[Candidate], now: Instant) {
        let announced: BTreeMap<Place, CandidateKind> = candidates
            .iter()
            .filter(|candidate| usable_underlay(candidate.endpoint))
            .take(MAX_CANDIDATES)
            .map(|candidate| (Place::main(candidate.endpoint), candidate.kind))
            .collect();
        let uplinks = &self.uplinks;
        self.endpoints.retain(|place, endpoint| {
            let by_line = uplinks.has(place.socket);
            announced.contains_key(place)
                || by_line && announced.contains_key(&Place::main(place.remote))
                || endpoint.kind == CandidateKind::PeerReflexive
                || endpoint.is_told_in_calls()
                || endpoint.proved(now)
        });
        let mut fresh = false;
        for (place, kind) in announced {
            fresh |= !self.endpoints.contains_key(&place);
            self.endpoints.entry(place).or_insert_with(|| Endpoint::new(kind)).note_kind(kind);
        }
        self.spread();
        if !fresh {
            return;
        }
        self.told_at = Some(now);
        if self.is_direct() {
            // The peer's NAT has given it another endpoint, perhaps in place of ours.
            self.verify(now);
            self.plan_stand_by(now);
        } else if self.wanted {
            self.start_round(Cause::ToldBoth, now);
        }
    }

    /// The peer asks us to probe; `candidates` are where it may be reached.
    pub fn handle_call_me_maybe(&mut self, epoch: u64, candidates: &[Candidate], now: Instant) {
        if epoch < self.call_epoch {
            return;
        }
        let moved = self.call_epoch != 0 && epoch > self.call_epoch;
        self.call_epoch = epoch;
        // Guesses age fast: the newest ones replace all others.
        let called = |remote: SocketAddr| candidates.iter().any(|it| it.endpoint == remote);
        self.endpoints.retain(|place, endpoint| {
            !endpoint.is_told_in_calls() || endpoint.proved(now) || called(place.remote)
        });
        for (rank, candidate) in candidates.iter().take(MAX_CANDIDATES).enumerate() {
            if usable_underlay(candidate.endpoint) && self.endpoints.len() < 2 * MAX_CANDIDATES {
                let endpoint = self.endpoints.entry(Place::main(candidate.endpoint));
                let endpoint = endpoint.or_insert_with(|| Endpoint::new(candidate.kind));
                endpoint.rank = rank;
                endpoint.note_kind(candidate.kind);
            }
        }
        self.spread();
        if self.is_direct() {
            // The peer is not direct, or it has moved: does our path still lead to it?
            self.verify(now);
            if moved {
                self.handle_peer_moved(now);
            } else if self.has_uplinks() {
                self.start_side_round(Cause::Called, now);
            }
        } else {
            self.start_round(Cause::Called, now);
            self.open_fresh(now);
        }
    }

    /// Whether this endpoint is one of the peer's.
    #[must_use]
    pub fn knows(&self, remote: SocketAddr) -> bool {
        self.endpoints.keys().any(|place| place.remote == remote)
    }

    /// The local network changed: nothing that was proved holds.
    pub fn handle_network_change(&mut self, now: Instant) {
        self.forget_extra_sockets(now);
        self.stuck_since = None;
        // What goes by a line goes on: it was proved by the socket that it has still.
        let uplinks = &self.uplinks;
        self.endpoints.retain(|place, endpoint| {
            uplinks.has(place.socket) || endpoint.kind != CandidateKind::PeerReflexive
        });
        for (place, endpoint) in &mut self.endpoints {
            endpoint.local = None;
            if uplinks.has(place.socket) {
                continue;
            }
            endpoint.forget();
            endpoint.penalty_until = None;
            (endpoint.trust, endpoint.failures) = (Trust::default(), 0);
        }
        self.relay_prober.forget();
        self.relay_delivery = Delivery::default();
        self.relay_mtu = RelayMtu::default();
        (self.trial, self.early, self.early_at) = (None, None, None);
        self.doubt = Doubt::default();
        self.choose("the local network changed", now);
        self.round_at = None;
        self.called_at = None;
        self.retries = 0;
        self.guesses = 0;
        if self.wanted {
            self.start_round(Cause::Wanted, now);
        }
    }

    /// A ping of the peer arrived: answer it, and check the path from our side.
    pub fn handle_ping(&mut self, tx: TxId, via: Via, now: Instant) {
        if self.may_send(via, PONG_LEN, now) {
            self.transmits.push_back(PathTransmit::Pong { via, tx });
        }
        let (Some(place), Via::Direct { local, .. }) = (via.place(), via) else { return };
        // One side's keepalive serves both, as long as nothing is in doubt.
        let settled =
            self.primary.is_some_and(|primary| primary.is_same(via)) && self.doubt.is_calm();
        let Some(endpoint) = self.learn(place, local, now) else { return };
        let recently = |at: Option<Instant>, within: Duration| {
            at.is_some_and(|at| now.saturating_duration_since(at) < within)
        };
        let checked = settled
            || recently(endpoint.prober.last_pong(), RECENT_PROOF)
            || recently(endpoint.prober.last_sent(), PING_SPACING);
        let reached_out = endpoint.prober.sent_pings() > 0;
        // A peer that is content asks once in a while. One that does not hear our answers asks again
        // and again, and its call may have been lost.
        let hasty = recently(endpoint.pinged_at.replace(now), HASTE);
        let doubtful = settled && hasty && !recently(endpoint.prober.last_pong(), RECENT_PROOF);
        if !checked {
            // The triggered check: the peer's NAT is open for us at this moment.
            endpoint.prober.start_round(now);
            if endpoint.prober.take_due(now).is_some() && self.may_send(via, PING_LEN, now) {
                self.ping(via, now);
            }
        }
        if reached_out {
            self.begin_early(place, now);
        }
        if doubtful {
            self.verify(now);
        } else if settled {
            self.postpone_keepalive(now);
        }
    }

    /// A pong arrived, with the count of our data that the peer has got on this path if it keeps
    /// one. Returns its round trip when it answers a ping of ours on that very path.
    pub fn handle_pong(
        &mut self,
        tx: TxId,
        via: Via,
        arrived: Option<SizeCounts>,
        now: Instant,
    ) -> Option<Answer> {
        let rtt = match via {
            Via::Direct { remote, local, socket } => {
                let endpoint = self.learn(Place { remote, socket }, local, now)?;
                let rtt = endpoint.prober.handle_pong(tx, now)?;
                endpoint.local = local.or(endpoint.local);
                endpoint.delivery.handle_pong(tx, arrived, now);
                endpoint.mtu.handle_pong(tx, now);
                if let Some(together) = &self.together {
                    together.note_answer(remote.ip(), now);
                }
                rtt
            }
            Via::RelayUdp | Via::RelayTcp => {
                self.relay_delivery.handle_pong(tx, arrived, now);
                self.relay_mtu.handle_pong(tx, now);
                self.relay_prober.handle_pong(tx, now)?
            }
        };
        if self.primary.is_some_and(|primary| primary.is_same(via)) {
            self.doubt.handle_heard();
            self.postpone_keepalive(now);
        }
        self.choose(self.answer_cause(), now);
        self.watch(now);
        Some(Answer { rtt, via })
    }

    /// Something else that only the peer can have sent arrived from `via`.
    pub fn handle_authenticated(&mut self, via: Via, now: Instant) {
        if let Via::Direct { remote, local, socket } = via
            && let Some(endpoint) = self.learn(Place { remote, socket }, local, now)
            && endpoint.prober.last_pong().is_none()
            && (!endpoint.prober.in_round() || endpoint.prober.is_held(now))
        {
            endpoint.prober.start_round(now);
        }
    }

    /// What the data plane counted since the last call; call it every [`super::TRAFFIC_TICK`]
    /// while data flows.
    pub fn handle_traffic(&mut self, traffic: Traffic, now: Instant) {
        self.sample(traffic.sent, now);
        let Some(place) = self.primary.and_then(Via::place) else {
            self.doubt = Doubt::default();
            if let Some(sent) = traffic.sent {
                self.note_relayed(sent, now);
                self.note_relay_mtu(now);
            }
            return;
        };
        self.used_at = self.used_at.max(traffic.sent);
        self.note_used(now);
        let Some(endpoint) = self.endpoints.get_mut(&place) else { return };
        if let Some(heard) = traffic.heard {
            endpoint.heard = endpoint.heard.max(Some(heard));
        }
        let heard = endpoint.heard.max(endpoint.prober.last_pong());
        let srtt = endpoint.prober.srtt().unwrap_or_default();
        self.doubt.handle_traffic(traffic.sent, heard, now);
        let suspicion = self.doubt.suspicion(srtt, endpoint.delivery.floods(), now);
        self.act_on(suspicion, now);
        if traffic.sent.is_some_and(|sent| now.saturating_duration_since(sent) < KEEPALIVE)
            && self.doubt.is_calm()
        {
            self.postpone_keepalive(now);
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.ping_due(now);
        self.ask_for_relay_mtu(now);
        if let Some(place) = self.primary.and_then(Via::place) {
            let endpoint = self.endpoints.get(&place);
            let srtt = endpoint.and_then(|endpoint| endpoint.prober.srtt()).unwrap_or_default();
            let floods = endpoint.is_some_and(|endpoint| endpoint.delivery.floods());
            let suspicion = self.doubt.suspicion(srtt, floods, now);
            self.act_on(suspicion, now);
        }
        if self.keepalive_at.is_some_and(|at| at <= now) {
            self.keepalive_at = None;
            self.keep_alive(now);
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            if self.wanted && !self.is_direct() {
                self.retry(now);
            }
        }
        self.choose("the path stopped answering", now);
        self.watch(now);
        self.watch_uplinks(now);
    }

    /// Pings the peer on the path that data takes; the pong is handed out by
    /// [`Self::handle_pong`] as always.
    pub fn ping_primary(&mut self, now: Instant) -> Option<(TxId, Via)> {
        let via = self.primary?;
        Some((self.ping(via, now), via))
    }

    fn is_direct(&self) -> bool {
        matches!(self.primary, Some(Via::Direct { .. }))
    }

    // ---- what the node asks --------------------------------------------------------------------

    /// What wants sending; call until none.
    pub fn poll_transmit(&mut self) -> Option<PathTransmit> {
        self.transmits.pop_front()
    }

    /// What happened; call until none.
    pub fn poll_event(&mut self) -> Option<PathEvent> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] has something to do, and what.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let mut soonest = Soonest::default();
        for endpoint in self.endpoints.values() {
            soonest.add(endpoint.prober.next_at(), "path probe");
        }
        soonest.add(self.relay_prober.next_at(), "relay probe");
        soonest.add(self.relay_mtu.next_at(), "relay path MTU");
        soonest.add(self.doubt.next_at(), "path in doubt");
        soonest.add(self.keepalive_at, "path keepalive");
        soonest.add(self.retry_at, "next round of probes");
        soonest.add(self.next_proof(), "path to be proved");
        soonest.add(self.uplinks.next_at(), "other uplinks");
        soonest.add(self.early.map(|early| early.ends_at()), "end of copies before an answer");
        soonest.get()
    }

    /// Since when the primary is what it is.
    #[must_use]
    pub fn primary_since(&self) -> Instant {
        self.primary_since
    }
}
