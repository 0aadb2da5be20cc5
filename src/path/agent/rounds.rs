//! Rounds of probes: which endpoints are pinged when, and which endpoints there are.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use rand::Rng;

use super::opener::Cause;
use super::{Endpoint, KEEPALIVE, PathAgent, PathTransmit};
use crate::path::probe::{Due, ProbeOutcome};
use crate::path::trickle::with_headers;
use crate::path::{Place, Via, predict};
use crate::types::{CandidateKind, TxId, is_of_one_site, usable_underlay};
use crate::wire::disco::PING_LEN;

/// How many endpoints a peer may teach us by sending from them, beside those it announces.
const MAX_LEARNED: usize = 8;
/// A round is not started over before this: news tends to come in bursts.
const ROUND_SPACING: Duration = Duration::from_secs(1);
/// The peer is asked to probe at most this often.
pub(super) const CALL_SPACING: Duration = Duration::from_secs(2);
/// In so many rounds a call of ours may have come before the peer knew us.
const EARLY_ROUNDS: usize = 3;
/// Waits between rounds while a wanted peer is not direct; the last one repeats.
const RETRY: [Duration; 6] = [
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(30),
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(900),
];
/// While data flows by the relay, the waits do not grow beyond this one.
const IN_USE_RETRY: usize = 3;
/// A peer that was sent to this long ago is worth a path.
pub const WORTH_A_PATH: Duration = Duration::from_secs(180);
/// So many rounds without any path: the peer is away, and may be for months.
const ROUNDS_TO_NOBODY: usize = 6;
/// From then on each of its endpoints gets one ping after this and a part of it that is random. That keeps
/// our NAT open, and the endpoint that it gives us; a peer that comes back does the same, so that
/// two behind NATs find each other without any help.
const ROLL_CALL: Duration = Duration::from_secs(20);

/// Guesses miss by chance, and the next ones may hit: they are made again after this,
const GUESS_AGAIN: Duration = Duration::from_millis(700);
/// so often before the usual waits.
const GUESSES: usize = 4;

impl PathAgent {
    /// The endpoint that a packet came from, learned as peer-reflexive when it is new.
    pub(super) fn learn(
        &mut self,
        place: Place,
        local: Option<IpAddr>,
        now: Instant,
    ) -> Option<&mut Endpoint> {
        if !self.endpoints.contains_key(&place) {
            if !usable_underlay(place.remote) {
                return None;
            }
            let learned: Vec<Place> = self
                .endpoints
                .iter()
                .filter(|(_, endpoint)| endpoint.kind == CandidateKind::PeerReflexive)
                .map(|(place, _)| *place)
                .collect();
            if learned.len() >= MAX_LEARNED {
                // The one that was silent for longest makes room, never one that works.
                let oldest = learned
                    .into_iter()
                    .filter(|place| !self.endpoints[place].proved(now))
                    .min_by_key(|place| self.endpoints[place].heard)?;
                self.endpoints.remove(&oldest);
            }
            self.endpoints.insert(place, Endpoint::new(CandidateKind::PeerReflexive));
        }
        let endpoint = self.endpoints.get_mut(&place)?;
        // What works goes on from the address of ours where its answers arrive. The peer may still send to
        // another one for a moment, and from there no datagram of ours may lead back to it.
        if local.is_some() && !endpoint.proved(now) {
            endpoint.local = local;
        }
        endpoint.heard = Some(now);
        Some(endpoint)
    }

    /// Pings every endpoint that is not proved, and asks the peer to do the same. Soon after the
    /// last round only endpoints that were not in it, or wait in it for longer than they now have
    /// to, are taken in.
    pub(super) fn start_round(&mut self, cause: Cause, now: Instant) {
        let recent = |at: Instant| now.saturating_duration_since(at) < ROUND_SPACING;
        let started = self.round_at.is_some_and(recent) && cause != Cause::Guess;
        let hold = self.hold(cause, now);
        // Those by a fresh port have a time of their own: the call may be older than what we opened.
        let fresh = self.fresh;
        let places = self.endpoints.iter_mut().filter(|(place, _)| Some(place.socket) != fresh);
        for (place, endpoint) in places {
            let hold = if endpoint.wants_opener(place.remote) { hold } else { Duration::ZERO };
            let untried = endpoint.prober.outcome() == ProbeOutcome::Untried;
            let sooner = endpoint.prober.is_held(now + hold);
            let joins = if started { untried || sooner } else { !endpoint.proved(now) };
            if joins {
                endpoint.prober.start_held_round(hold, now);
            }
        }
        if let Some(via) = self.relay {
            if !self.is_direct() {
                self.stuck_since.get_or_insert(now);
            }
            let spacing = if cause == Cause::Guess { GUESS_AGAIN / 2 } else { CALL_SPACING };
            let recent = |at: Instant| now.saturating_duration_since(at) < spacing;
            // Who calls may have missed our first call, and with it what only that says.
            let early = cause == Cause::Called && self.retries < EARLY_ROUNDS;
            let missed = early && self.signalling.has_guesses && !self.called_back;
            self.called_back = missed || self.called_back && started;
            if missed || !self.called_at.is_some_and(recent) {
                self.called_at = Some(now);
                self.transmits.push_back(PathTransmit::CallMeMaybe { via });
            }
            if !started {
                self.relay_prober.start_round(now);
            }
        }
        self.ping_due(now);
        if started {
            return;
        }
        self.round_at = Some(now);
        // Without any path nothing else can help, so the rounds stay close together.
        let in_use =
            self.used_at.is_some_and(|at| now.saturating_duration_since(at) < WORTH_A_PATH);
        let last = match (self.primary, in_use) {
            (None, _) => 1,
            (Some(_), true) => IN_USE_RETRY,
            (Some(_), false) => RETRY.len() - 1,
        };
        let guessing =
            self.endpoints.values().any(|endpoint| endpoint.kind == CandidateKind::Predicted);
        let wait = if guessing && self.guesses < GUESSES {
            GUESS_AGAIN
        } else {
            RETRY[self.retries.min(last)]
        };
        self.retries += 1;
        self.retry_at = Some(now + wait);
    }

    /// Asks the direct path, if it carries data, whether it still leads to the peer; silence moves
    /// data away within a second.
    pub fn verify(&mut self, now: Instant) {
        if let Some(via @ Via::Direct { .. }) = self.primary {
            self.ping(via, now);
            self.doubt.handle_keepalive(now);
        }
    }

    /// The peer says that it has moved while our path leads to where it was: until something is
    /// heard there, data goes by the relay too, and the new endpoints are tried.
    pub(super) fn handle_peer_moved(&mut self, now: Instant) {
        self.doubt.handle_moved(now);
        self.round_at = None;
        self.start_round(Cause::Called, now);
    }

    /// We can be reached at more addresses than before: there may be a better path, and what was
    /// proved still holds.
    pub fn handle_more_addresses(&mut self, now: Instant) {
        // That our candidates are others has perhaps started one just now.
        if self.wanted && self.round_at != Some(now) {
            self.round_at = None;
            if self.primary.is_none() {
                self.retries = 0;
            }
            self.start_round(Cause::Wanted, now);
        }
    }

    /// Whether a path to this peer is worth probes.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// Whether the path in use was asked for a sign of life, and has not answered yet.
    #[must_use]
    pub fn is_asking(&self) -> bool {
        self.is_direct() && self.doubt.is_asking()
    }

    /// Data to the peer goes by the relay: a pause in the rounds that was meant for an idle peer
    /// ends.
    pub(super) fn note_relayed(&mut self, sent: Instant, now: Instant) {
        self.used_at = self.used_at.max(Some(sent));
        let longest = now + RETRY[IN_USE_RETRY];
        if self.retry_at.is_some_and(|at| at > longest) {
            self.retry_at = Some(longest.min(now + RETRY[0]));
        }
    }

    /// Our own candidates changed: the peer is told, and probes, unless the pair is direct already.
    pub fn handle_own_candidates(&mut self, now: Instant) {
        let settled = self.is_direct() && !self.doubt.is_asking();
        if let (Some(via), false, true) = (self.relay, settled, self.wanted) {
            self.called_at = Some(now);
            self.transmits.push_back(PathTransmit::CallMeMaybe { via });
            // The peer probes when the call arrives, and wants our NAT open then: a fresh ladder,
            // however young the last one is.
            self.round_at = None;
            self.start_round(Cause::ToldBoth, now);
        }
    }

    /// The last round led to nothing.
    pub(super) fn retry(&mut self, now: Instant) {
        if self.primary.is_none() && self.retries >= ROUNDS_TO_NOBODY {
            return self.call_the_roll(now);
        }
        let guessed =
            self.endpoints.values().any(|endpoint| endpoint.kind == CandidateKind::Predicted);
        let cause = if guessed && self.guesses < GUESSES { Cause::Guess } else { Cause::Wanted };
        self.guesses += 1;
        self.start_round(cause, now);
    }

    /// Nobody has answered for long: one ping to each endpoint. What it opens in our NAT is needed as much as
    /// what it may bring back, so it is not held back for an opener.
    fn call_the_roll(&mut self, now: Instant) {
        // A guess of a port is worth nothing by now.
        let lasts = |it: &&mut Endpoint| it.kind != CandidateKind::Predicted;
        for endpoint in self.endpoints.values_mut().filter(lasts) {
            endpoint.prober.start_single(now);
        }
        self.ping_due(now);
        self.retry_at = Some(now + ROLL_CALL.mul_f64(self.rng.random_range(1.0..1.2)));
    }

    /// Sends the pings of all rounds that are due; the first ones of a round leave in the same
    /// instant as its call-me-maybe.
    pub(super) fn ping_due(&mut self, now: Instant) {
        let due: Vec<(Place, Option<IpAddr>, Due)> = self
            .endpoints
            .iter_mut()
            .filter_map(|(place, e)| Some((*place, e.local, e.prober.take_due(now)?)))
            .collect();
        let guess = |(place, ..): &(Place, _, _)| {
            self.endpoints.get(place).is_some_and(|e| e.kind == CandidateKind::Predicted)
        };
        let (mut guesses, sure): (Vec<_>, Vec<_>) = due.into_iter().partition(guess);
        guesses.sort_by_key(|(place, ..)| self.endpoints.get(place).map(|it| it.rank));
        let guesses = predict::order(guesses, self.signalling.doubles);
        for (place, local, due) in sure.into_iter().chain(guesses) {
            let Place { remote, socket } = place;
            let via = Via::Direct { remote, local, socket };
            match due {
                _ if !self.may_send(via, PING_LEN, now) => {}
                Due::Ping => drop(self.ping(via, now)),
                Due::Opener => self.open(place, now),
            }
        }
        if self.relay_prober.take_due(now).is_some()
            && let Some(relay) = self.relay
        {
            self.ping(relay, now);
        }
    }

    /// On a short way the opener arrives, and is answered like any ping.
    fn open(&mut self, place: Place, now: Instant) {
        let tx = TxId(self.rng.random());
        if let Some(endpoint) = self.endpoints.get_mut(&place) {
            endpoint.prober.opened(tx, now);
        }
        let Place { remote, socket } = place;
        self.transmits.push_back(PathTransmit::Opener { remote, socket, tx });
    }

    /// Whether a probe, an answer or a handshake of `len` bytes may go there: by relay and to what
    /// has proved itself always.
    pub(super) fn may_send(&mut self, via: Via, len: usize, now: Instant) -> bool {
        let (Some(place), Via::Direct { remote, .. }) = (via.place(), via) else { return true };
        self.endpoints.get(&place).is_some_and(|endpoint| endpoint.proved(now))
            || with_headers(len, remote.ip())
                .is_some_and(|bytes| self.may_spend(bytes, remote.ip(), now))
    }

    /// Whether so many bytes, headers and all, may go to an address that has proved nothing.
    pub(super) fn may_spend(&mut self, bytes: u32, to: IpAddr, now: Instant) -> bool {
        let all = self.together.as_ref().filter(|_| !is_of_one_site(to.to_canonical()));
        // What the one refuses is not on the other one's account.
        self.trickle.has_bytes(bytes, to, now)
            && all.is_none_or(|all| all.take_bytes(bytes, to, now))
            && self.trickle.take_bytes(bytes, to, now)
    }

    /// What is sent to us by UDP is lost until the server sees us send by the control connection, and
    /// we may have nothing to send: nothing arrives that could be answered.
    pub(super) fn show_that_udp_failed(&mut self, now: Instant) {
        if self.used_at.is_some_and(|at| now.saturating_duration_since(at) < KEEPALIVE) {
            self.ping(Via::RelayTcp, now);
        }
    }

    pub(super) fn ping(&mut self, via: Via, now: Instant) -> TxId {
        let tx = TxId(self.rng.random());
        match via.place() {
            Some(place) => {
                if let Some(endpoint) = self.endpoints.get_mut(&place) {
                    endpoint.prober.sent(tx, now);
                    endpoint.delivery.handle_ping(tx, now);
                }
            }
            None => {
                self.relay_prober.sent(tx, now);
                self.relay_delivery.handle_ping(tx, now);
            }
        }
        self.transmits.push_back(PathTransmit::Ping { via, tx });
        tx
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;
    use crate::types::{Candidate, SocketId};

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_path_that_works_leaves_from_where_its_answers_arrive() {
        let now = epoch();
        let remote: std::net::SocketAddr = "203.0.113.10:4000".parse().unwrap();
        let [old, new] = ["192.168.1.11", "192.168.2.210"].map(|ip| ip.parse().ok());
        let by = |local| Via::Direct { remote, local, socket: SocketId::MAIN };
        let mut agent = PathAgent::new([1; 32], now);
        agent.set_candidates(&[Candidate::new(remote, CandidateKind::Host)], now);
        agent.set_wanted(true, now);
        agent.handle_timeout(now);
        let answer = |agent: &mut PathAgent, local, now| {
            while let Some(transmit) = agent.poll_transmit() {
                if let PathTransmit::Ping { tx, .. } = transmit {
                    agent.handle_pong(tx, by(local), None, now);
                }
            }
            agent.primary
        };
        // Until something has answered, the peer's pings show an address as good as any.
        agent.handle_ping(TxId([7; 12]), by(old), now);
        assert_eq!(answer(&mut agent, new, now), Some(by(new)));

        // The peer asks, and sends data, at the address that we had.
        let now = now + MS;
        agent.handle_ping(TxId([8; 12]), by(old), now);
        let pong = agent.poll_transmit();
        assert!(matches!(pong, Some(PathTransmit::Pong { via, .. }) if via == by(old)), "{pong:?}");
        agent.handle_authenticated(by(old), now);
        agent.handle_timeout(now);
        assert_eq!(agent.primary, Some(by(new)));
        assert!(agent.endpoints.values().all(|endpoint| endpoint.local == new));

        // An answer there says that it works from there.
        agent.ping(by(old), now);
        assert_eq!(answer(&mut agent, old, now + MS), Some(by(old)));
    }
}
