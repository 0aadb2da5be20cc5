//! The choice of the primary: which proved path is best, and when the one in use is left.

use std::time::{Duration, Instant};

use rand::Rng;

use super::proof::Trust;
use super::{Endpoint, PathAgent, PathEvent};
use crate::path::liveness::{Doubt, Suspicion};
use crate::path::score::Score;
use crate::path::{Place, Via};

/// One switch between paths of the same tier in this time (no flapping).
const SWITCH_SPACING: Duration = Duration::from_secs(10);
/// NAT bindings live 30 s on the worst common routers: this and its jitter of two seconds leave
/// time for the answer to be asked for again.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(25);

/// Why data goes another way when there is another way by the relay, or none.
pub(super) fn relay_cause(before: Option<Via>, after: Option<Via>) -> &'static str {
    match (before, after) {
        (None, _) => "the relay leads to the peer",
        (Some(_), None) => "the relay does not lead to the peer any more",
        (Some(_), Some(Via::RelayTcp)) => "UDP does not reach the relay any more",
        (Some(_), Some(_)) => "UDP reaches the relay",
    }
}

impl PathAgent {
    /// Makes the best path the primary, if it is better by enough.
    pub(super) fn choose(&mut self, why: &'static str, now: Instant) {
        let has_relay = self.relay.is_some();
        let usable = |endpoint: &Endpoint| {
            let bad = endpoint.is_penalised(now) || endpoint.trust == Trust::Distrusted;
            // Where there is nothing else, a bad path is better than none.
            endpoint.proved(now) && !(has_relay && bad)
        };
        let best = self
            .endpoints
            .iter()
            .filter(|(_, endpoint)| usable(endpoint))
            .filter_map(|(place, endpoint)| {
                let score = self.score(*place, endpoint)?;
                Some((endpoint.is_penalised(now), score, endpoint.via(*place)))
            })
            .min()
            .map(|(_, score, via)| (score, via));
        let current = self.primary.and_then(Via::place).and_then(|place| {
            let endpoint = self.endpoints.get(&place).filter(|endpoint| usable(endpoint))?;
            Some((self.score(place, endpoint)?, endpoint.via(place)))
        });
        let next = match (best, current) {
            (Some((better, via)), Some((score, same))) => {
                let settled = self
                    .last_switch
                    .is_none_or(|at| now.saturating_duration_since(at) >= SWITCH_SPACING);
                let nearer = better.is_nearer_than(score);
                if better.clearly_beats(score) && (settled || nearer) {
                    Some(via)
                } else {
                    self.instead_of_a_doubted(now).or(Some(same))
                }
            }
            (Some((_, via)), None) => Some(via),
            (None, _) => self.relay,
        };
        if next == self.primary {
            return;
        }
        let from = std::mem::replace(&mut self.primary, next);
        let moved = match (from, next) {
            (Some(a), Some(b)) => !a.is_same(b),
            _ => true,
        };
        if !moved {
            return;
        }
        if self.doubt.doubled_since().is_some()
            && let Some(place) = from.and_then(Via::place)
            && let Some(endpoint) = self.endpoints.get_mut(&place)
        {
            // It still owes an answer, and counts for nothing until it comes.
            endpoint.heard = None;
            endpoint.prober.prove_again(now);
        }
        self.primary_since = now;
        self.why = why;
        self.doubt = Doubt::default();
        if self.is_direct() {
            self.last_switch = Some(now);
            self.retries = 0;
            self.guesses = 0;
            self.retry_at = None;
            self.stuck_since = None;
            self.postpone_keepalive(now);
            self.begin_trust(now);
        } else {
            self.keepalive_at = None;
            self.doubled = false;
        }
        self.note_primary(now);
        self.events.push_back(PathEvent::Primary { from, to: next, why });
    }

    /// Why a path is taken that has just answered.
    pub(super) fn answer_cause(&self) -> &'static str {
        match self.primary {
            None => "the first path answered",
            Some(_) => "a better path answered",
        }
    }

    fn score(&self, place: Place, endpoint: &Endpoint) -> Option<Score> {
        let score = Score::of(place.remote, endpoint.prober.srtt()?);
        Some(if self.is_second(place) { score.of_further_uplink() } else { score })
    }

    /// While the primary owes an answer for so long that data is doubled: the best path that did
    /// answer in this time.
    fn instead_of_a_doubted(&self, now: Instant) -> Option<Via> {
        let since = self.doubt.doubled_since()?;
        let on_second = self.on_second();
        let has_relay = self.relay.is_some();
        self.endpoints
            .iter()
            .filter(|(_, endpoint)| !(has_relay && endpoint.is_penalised(now)))
            .filter(|(_, endpoint)| endpoint.prober.last_pong().is_some_and(|at| at >= since))
            // A second one gets copies until the doubt is over: it may cost money.
            .filter(|(place, _)| on_second || !self.is_second(**place))
            .filter_map(|(place, endpoint)| {
                let score = self.score(*place, endpoint)?;
                Some((score, endpoint.via(*place)))
            })
            .min()
            .map(|(_, via)| via)
    }

    pub(super) fn act_on(&mut self, suspicion: Suspicion, now: Instant) {
        let Some((via, place)) = self.primary.and_then(|via| Some((via, via.place()?))) else {
            return;
        };
        self.rouse(now);
        match suspicion {
            Suspicion::None | Suspicion::Waiting => {}
            Suspicion::Ask => {
                self.doubt.handle_asked(now);
                self.ping(via, now);
            }
            Suspicion::Dead => {
                // Whatever killed it may have killed the others too, and they were not watched:
                // only what was heard just now counts, the rest proves itself again.
                for endpoint in self.endpoints.values_mut().filter(|e| !e.heard_lately(now)) {
                    endpoint.forget();
                }
                if let Some(endpoint) = self.endpoints.get_mut(&place) {
                    endpoint.forget();
                }
                self.leave(place, "the direct path went silent", now);
            }
        }
    }

    pub(super) fn keep_alive(&mut self, now: Instant) {
        let Some(via @ Via::Direct { .. }) = self.primary else { return };
        if self.wanted {
            self.ping(via, now);
            self.doubt.handle_keepalive(now);
            self.postpone_keepalive(now);
        }
    }

    pub(super) fn postpone_keepalive(&mut self, now: Instant) {
        let jitter = Duration::from_millis(self.rng.random_range(0..2_000));
        self.keepalive_at = Some(now + KEEPALIVE + jitter);
    }
}
