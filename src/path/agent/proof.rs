//! May data be trusted to a path? What a path has to prove before it carries data alone, and how it
//! proves it again after it has failed.
//!
//! ```text
//! new --data arrives, a full packet too--> trusted --data is lost--> distrusted
//!  ^   (doubled onto the relay until then)                                |
//!  +------ data that is doubled onto it arrives (a trial) <---------------+
//! ```
//!
//! A ping proves nothing about data: it is short, and does not look like data to a filter. So empty
//! packets of the session go beside the pings, pings are padded to the size of data, and real data
//! is doubled; the peer's count says what of it has arrived.

use std::time::{Duration, Instant};

use rand::Rng;

use super::opener::Cause;
use super::{PathAgent, PathTransmit};
use crate::path::liveness::{Doubt, Suspicion};
use crate::path::mtu::{AGAIN, Base};
use crate::path::{Place, TRAFFIC_TICK, Via};
use crate::types::{SizeCounts, TxId};

/// While data flows, the peer is asked this often what has arrived.
const SAMPLE: Duration = Duration::from_millis(100);
/// The same on a relay path, which nothing replaces.
const RELAY_SAMPLE: Duration = Duration::from_secs(1);
/// Questions of a proof are this far apart,
const PROOF_SPACING: Duration = Duration::from_millis(100);
/// and this far while there is no data to be proved for.
const IDLE_PROOF_SPACING: Duration = Duration::from_millis(450);
/// A new path that nothing speaks against is trusted after this.
const NEW_FOR: Duration = Duration::from_secs(1);
/// A trial lasts at least this long,
const SHORTEST_TRIAL: Duration = Duration::from_millis(300);
/// and has failed after this, or six round trips.
const LONGEST_TRIAL: Duration = Duration::from_millis(2_000);
/// So many datagrams are enough to measure loss.
const TRIAL_UNMEASURED: u32 = 20;
/// In a trial data arrives in so many reports.
const TRIAL_PROOFS: u32 = 3;
/// A path that has failed is tried again after this, twice as long each time,
const PENALTY: Duration = Duration::from_secs(3);
/// up to this.
const LONGEST_PENALTY: Duration = Duration::from_secs(60);
/// Failures are forgotten when the path has worked for so long.
const GOOD_FOR: Duration = Duration::from_secs(120);
/// A trial is passed with no more loss than this, in a thousand; or than the relay has.
const TRIAL_LOSS_PERMILLE: u16 = 100;

/// How far a path is trusted with data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Trust {
    /// It answers; whether it carries data is being found out.
    #[default]
    New,
    /// It carries data.
    Trusted,
    /// It has lost data, and is given none that counts.
    Distrusted,
}

/// A distrusted path gets a copy of everything.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial {
    pub(super) place: Place,
    since: Instant,
}

fn proof_spacing(endpoint: &super::Endpoint) -> Duration {
    if endpoint.delivery.sent_in_proof() == 0 { IDLE_PROOF_SPACING } else { PROOF_SPACING }
}

impl PathAgent {
    /// The largest inner MTU that is of any use here.
    pub fn set_mtu_limit(&mut self, limit: u16) {
        self.mtu_limit = limit;
    }

    /// A link of this machine takes packets of another length now: looks again for what the paths in use
    /// carry, within a second, so that many peers do not ask at once.
    pub fn handle_link_mtu(&mut self, now: Instant) {
        self.relay_mtu.look_again();
        let at = now + Duration::from_millis(self.rng.random_range(0..1_000));
        for endpoint in self.endpoints.values_mut() {
            endpoint.mtu.look_again(self.mtu_limit, at);
        }
    }

    /// What the data plane has sent on a path so far; call it with every ping that leaves, and with
    /// [`Self::handle_traffic`].
    pub fn handle_counts(&mut self, via: Via, sent: SizeCounts, now: Instant) {
        match via.place() {
            Some(place) => {
                if let Some(endpoint) = self.endpoints.get_mut(&place) {
                    endpoint.delivery.handle_sent(sent, now);
                }
            }
            None => self.relay_delivery.handle_sent(sent, now),
        }
    }

    /// Data flows: asks what has arrived.
    pub(super) fn sample(&mut self, sent: Option<Instant>, now: Instant) {
        let recent = |at: Instant| now.saturating_duration_since(at) <= 4 * TRAFFIC_TICK;
        let Some(via) = self.primary.filter(|_| sent.is_some_and(recent)) else { return };
        let (asked_at, spacing) = match via.place() {
            Some(place) => {
                let endpoint = self.endpoints.get(&place);
                (endpoint.and_then(|endpoint| endpoint.delivery.asked_at()), SAMPLE)
            }
            None => (self.relay_delivery.asked_at(), RELAY_SAMPLE),
        };
        if asked_at.is_none_or(|at| now.saturating_duration_since(at) >= spacing) {
            self.ping(via, now);
        }
    }

    /// Looks after the trust in the paths that carry data.
    pub(super) fn watch(&mut self, now: Instant) {
        self.watch_primary(now);
        self.watch_trial(now);
        self.end_early(now);
        self.ask_for_mtu(now);
    }

    fn watch_primary(&mut self, now: Instant) {
        let Some((via, place)) = self.primary.and_then(|via| Some((via, via.place()?))) else {
            self.doubled = false;
            return;
        };
        let since = self.primary_since;
        let Some(endpoint) = self.endpoints.get_mut(&place) else { return };
        let srtt = endpoint.prober.srtt().unwrap_or_default();
        if endpoint.delivery.large_missing() {
            // Too long for the path, or does it carry no full packet any more either?
            endpoint.mtu.lower(now);
            endpoint.delivery.forgive_large();
            endpoint.delivery.begin_proof();
            endpoint.trust = Trust::New;
        }
        let mut ask = false;
        match endpoint.delivery.suspicion(srtt, now) {
            Suspicion::Dead => {
                let lossy = endpoint.delivery.loss_permille();
                let relay_loss = self.relay_delivery.loss_permille().unwrap_or_default();
                // A relay that loses as much is no help, and none at all is less.
                if self.relay.is_some() && lossy.is_none_or(|loss| loss > relay_loss) {
                    return self.leave(place, "data is lost on the direct path", now);
                }
                ask = endpoint.delivery.next_at(srtt).is_some_and(|at| at <= now);
            }
            Suspicion::Ask => ask = true,
            Suspicion::None | Suspicion::Waiting => {}
        }
        if endpoint.trust == Trust::New {
            let nothing_sent = endpoint.delivery.sent_in_proof() == 0;
            let carries = endpoint.delivery.proofs() > 0
                || !endpoint.delivery.is_reported()
                || now >= since + NEW_FOR.max(srtt * 4) && nothing_sent;
            match endpoint.mtu.base() {
                Base::Fails if self.relay.is_some() => {
                    return self.leave(place, "full packets are lost on the direct path", now);
                }
                Base::Unknown => {}
                Base::Fits | Base::Fails if carries => endpoint.trust = Trust::Trusted,
                Base::Fits | Base::Fails => {}
            }
            let (asked, spacing) = (endpoint.delivery.asked_at(), proof_spacing(endpoint));
            ask |= endpoint.trust == Trust::New
                && asked.is_none_or(|at| now.saturating_duration_since(at) >= spacing);
        } else if now.saturating_duration_since(since) >= GOOD_FOR {
            endpoint.failures = 0;
        }
        self.doubled = endpoint.trust == Trust::New || endpoint.delivery.wants_duplicate(srtt, now);
        let compares = self.doubled && endpoint.delivery.sent_in_proof() > 0;
        if ask {
            self.ask(via, now);
        }
        if let (true, Some(relay)) = (compares, self.relay) {
            // What the relay loses decides whether it is any better.
            let asked = self.relay_delivery.asked_at();
            if asked.is_none_or(|at| now.saturating_duration_since(at) >= RELAY_SAMPLE) {
                self.ping(relay, now);
            }
        }
    }

    /// Asks for a count, behind a packet that has to be in it.
    fn ask(&mut self, via: Via, now: Instant) {
        self.transmits.push_back(PathTransmit::Keepalive { via });
        self.ping(via, now);
    }

    /// A path has become the primary: it proves itself while all is doubled.
    pub(super) fn begin_trust(&mut self, now: Instant) {
        let Some((via, place)) = self.primary.and_then(|via| Some((via, via.place()?))) else {
            return;
        };
        self.trial = None;
        let limit = self.mtu_limit;
        for (other, endpoint) in &mut self.endpoints {
            if *other != place {
                endpoint.mtu.stop();
            }
        }
        let Some(endpoint) = self.endpoints.get_mut(&place) else { return };
        endpoint.trust = Trust::New;
        // Taken because there was nothing else, it has nothing more to wait for.
        endpoint.penalty_until = None;
        endpoint.delivery.begin_proof();
        if endpoint.mtu.found(now).is_none() || endpoint.mtu.next_at().is_none() {
            endpoint.mtu.start(limit, now);
        }
        self.doubled = true;
        self.ask(via, now);
        self.ask_for_mtu(now);
    }

    /// Leaves a direct path that has failed, until it has proved itself again.
    pub(super) fn leave(&mut self, place: Place, why: &'static str, now: Instant) {
        self.distrust(place, now);
        self.doubt = Doubt::default();
        self.choose(why, now);
        self.round_at = None;
        self.retries = 0;
        self.start_round(Cause::Wanted, now);
    }

    /// The path has to wait, and to prove itself before it carries data again.
    pub(super) fn distrust(&mut self, place: Place, now: Instant) {
        let Some(endpoint) = self.endpoints.get_mut(&place) else { return };
        let penalty = PENALTY * 2u32.pow(endpoint.failures.min(6));
        endpoint.failures += 1;
        endpoint.trust = Trust::Distrusted;
        endpoint.penalty_until = Some(now + penalty.min(LONGEST_PENALTY));
        endpoint.delivery.start_over();
        endpoint.mtu = Default::default();
        // Does it answer at all? If not, no trial of it is worth waiting for.
        endpoint.prober.start_round(now);
    }

    /// Starts, goes on with, and ends the trial of a distrusted path.
    fn watch_trial(&mut self, now: Instant) {
        // While a further uplink carries data, the preferred one is what comes back.
        let settled = self.is_direct() && !self.on_second();
        if settled || self.relay.is_none() || !self.wanted {
            self.trial = None;
            return;
        }
        let Some(Trial { place, since }) = self.trial else { return self.start_trial(now) };
        let relay_loss = self.relay_delivery.loss_permille().unwrap_or_default();
        let via = self.direct(place);
        let Some((endpoint, via)) = self.endpoints.get_mut(&place).zip(via) else {
            self.trial = None;
            return;
        };
        let srtt = endpoint.prober.srtt().unwrap_or_default();
        let time = now.saturating_duration_since(since);
        let delivery = &endpoint.delivery;
        let proved = delivery.proofs() >= TRIAL_PROOFS
            || !delivery.is_reported()
            || delivery.sent_in_proof() == 0;
        let loss = delivery.loss_permille();
        // Where much is sent it takes a while to see how much is lost.
        let measured = loss.is_some() || delivery.sent_in_proof() < TRIAL_UNMEASURED;
        let passed = proved
            && measured
            && time >= SHORTEST_TRIAL.max(srtt * 2)
            && endpoint.mtu.base() == Base::Fits
            && endpoint.prober.last_pong().is_some_and(|at| at >= since)
            && !delivery.wants_duplicate(srtt, now)
            && loss.unwrap_or_default() <= TRIAL_LOSS_PERMILLE.max(relay_loss);
        if passed {
            self.trial = None;
            endpoint.trust = Trust::New;
            self.choose("the direct path carries data again", now);
        } else if time >= LONGEST_TRIAL.max(srtt * 6) {
            if endpoint.prober.last_pong().is_none_or(|at| at < since) {
                // The peer was away: that says nothing about the path, and the wait is as before.
                endpoint.failures = endpoint.failures.saturating_sub(1);
            }
            self.trial = None;
            self.distrust(place, now);
        } else if delivery.asked_at().is_none_or(|at| now >= at + PROOF_SPACING) {
            self.ask(via, now);
        }
    }

    fn start_trial(&mut self, now: Instant) {
        let waits = |endpoint: &super::Endpoint| {
            endpoint.trust == Trust::Distrusted && endpoint.penalty_until.is_none_or(|at| at <= now)
        };
        for endpoint in self.endpoints.values_mut().filter(|endpoint| waits(endpoint)) {
            endpoint.penalty_until = None;
        }
        let on_second = self.on_second();
        let candidate = self
            .endpoints
            .iter()
            .filter(|(_, endpoint)| waits(endpoint) && endpoint.proved(now))
            .filter(|(place, _)| !on_second || !self.is_second(**place))
            .min_by_key(|(_, endpoint)| endpoint.prober.srtt())
            .map(|(place, _)| *place);
        let Some(place) = candidate else { return };
        let limit = self.mtu_limit;
        self.trial = Some(Trial { place, since: now });
        if let Some(endpoint) = self.endpoints.get_mut(&place) {
            endpoint.delivery.begin_proof();
            endpoint.mtu.start(limit, now);
        }
        if let Some(via) = self.direct(place) {
            self.ask(via, now);
        }
    }

    /// Sends the questions of the MTU search that are due.
    fn ask_for_mtu(&mut self, now: Instant) {
        let primary = self.primary.and_then(Via::place);
        for place in primary.into_iter().chain(self.trial.map(|trial| trial.place)) {
            self.ask_for_mtu_of(place, now);
        }
    }

    fn ask_for_mtu_of(&mut self, place: Place, now: Instant) {
        let Some(via) = self.direct(place) else { return };
        let Some(endpoint) = self.endpoints.get_mut(&place) else { return };
        let used = |at: Instant| now.saturating_duration_since(at) < AGAIN;
        if !self.used_at.is_some_and(used) {
            endpoint.mtu.rest(now);
        }
        let srtt = endpoint.prober.srtt().unwrap_or_default();
        for question in endpoint.mtu.take_due(place.remote, srtt, now) {
            let tx = TxId(self.rng.random());
            endpoint.mtu.asked(tx, question);
            endpoint.prober.opened(tx, now);
            let (inner, whole) = (question.inner, question.whole);
            self.transmits.push_back(PathTransmit::Sized { via, tx, inner, whole });
        }
    }

    /// The direct path to an endpoint.
    pub(super) fn direct(&self, place: Place) -> Option<Via> {
        Some(self.endpoints.get(&place)?.via(place))
    }

    /// When [`Self::watch`] has something to do.
    pub(super) fn next_proof(&self) -> Option<Instant> {
        let of = |place: Place| self.endpoints.get(&place);
        if let Some(place) = self.primary.and_then(Via::place) {
            let endpoint = of(place)?;
            let srtt = endpoint.prober.srtt().unwrap_or_default();
            let new = endpoint.trust == Trust::New;
            let asked = endpoint.delivery.asked_at().filter(|_| new);
            let ask = asked.map(|at| at + proof_spacing(endpoint));
            let doubt = endpoint.delivery.next_at(srtt);
            let tried = if self.on_second() { self.next_trial() } else { None };
            return [ask, doubt, endpoint.mtu.next_at(), tried].into_iter().flatten().min();
        }
        self.next_trial()
    }

    /// When a path that has failed is tried, or its trial goes on.
    fn next_trial(&self) -> Option<Instant> {
        let of = |place: Place| self.endpoints.get(&place);
        let spaced = |at: Option<Instant>| at.map(|at| at + PROOF_SPACING);
        match (self.primary, self.trial) {
            (_, Some(trial)) => {
                let endpoint = of(trial.place)?;
                let ask = spaced(endpoint.delivery.asked_at());
                ask.into_iter().chain(endpoint.mtu.next_at()).min()
            }
            (Some(_), None) if self.wanted && self.relay.is_some() => {
                let waiting = self.endpoints.values().filter(|it| it.trust == Trust::Distrusted);
                waiting.filter_map(|endpoint| endpoint.penalty_until).min()
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;
    use crate::types::{Candidate, CandidateKind};

    /// How often a path counts as failed that was left once and is on trial for 20 s; `answers` to
    /// short pings or is silent.
    fn failures_after_trials(answers: bool) -> u32 {
        let remote = "203.0.113.10:4000".parse().unwrap();
        let place = Place::main(remote);
        let mut agent = PathAgent::new([1; 32], epoch());
        agent.set_relay(Some(Via::RelayUdp), epoch());
        agent.set_candidates(&[Candidate::new(remote, CandidateKind::Host)], epoch());
        agent.set_wanted(true, epoch());
        let (mut left, mut trials, mut before) = (false, 0, false);
        for ms in (0..20_000).step_by(10) {
            let now = epoch() + Duration::from_millis(ms);
            agent.handle_timeout(now);
            while let Some(transmit) = agent.poll_transmit() {
                if let PathTransmit::Ping { via, tx } = transmit
                    && (!left || answers)
                {
                    agent.handle_pong(tx, via, None, now);
                }
            }
            if agent.is_direct() {
                assert!(!left, "full packets do not get through");
                agent.leave(place, "for the test", now);
                left = true;
            }
            trials += usize::from(agent.trial.is_some() && !before);
            before = agent.trial.is_some();
        }
        assert!(left && trials >= 2, "{trials} trials");
        agent.endpoints[&place].failures
    }

    #[test]
    fn a_trial_says_nothing_while_the_peer_is_away_and_counts_when_it_answers() {
        assert_eq!(failures_after_trials(false), 1);
        assert_eq!(failures_after_trials(true), 3);
    }
}
