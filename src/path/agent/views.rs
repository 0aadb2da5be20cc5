//! What an agent tells: the path of a packet sent now, why that is its primary, and what it has tried.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::PathAgent;
use crate::path::side::Tried;
use crate::path::{Choice, ProbeOutcome, Via};
use crate::types::CandidateKind;

impl PathAgent {
    /// The path that a packet sent now takes, and whether it is doubled.
    #[must_use]
    pub fn choice(&self) -> Choice {
        let duplicate = if self.is_direct() {
            let relay = self.relay.filter(|_| self.doubled || self.doubt.wants_duplicate());
            let trial = self.trial.and_then(|trial| self.direct(trial.place));
            self.second_that_answers().or(relay).or(trial)
        } else {
            let trial = self.trial.map(|trial| trial.place);
            trial.or(self.early.map(|early| early.place)).and_then(|place| self.direct(place))
        };
        let early = self.early.is_some() && duplicate.is_some();
        Choice { primary: self.primary, duplicate, early }
    }

    /// Why the primary is what it is, in a sentence.
    #[must_use]
    pub fn why(&self) -> String {
        let tried: Vec<_> = self.outcomes().filter(|(.., o)| *o != ProbeOutcome::Untried).collect();
        let probing = tried.iter().any(|(.., outcome)| *outcome == ProbeOutcome::Probing);
        match self.primary {
            Some(via @ Via::Direct { .. }) => {
                let endpoint = via.place().and_then(|place| self.endpoints.get(&place));
                let kind = endpoint.map_or("unknown", |endpoint| endpoint.kind.as_str());
                format!("the peer's {kind} candidate answers")
            }
            Some(_) if probing => format!("probing {} candidates", tried.len()),
            Some(_) if tried.is_empty() => "the peer has announced no candidate yet".into(),
            Some(_) => format!("none of {} candidates answered", tried.len()),
            None if probing => format!("probing {} candidates, no relay", tried.len()),
            None => format!("no relay, and {}", self.why),
        }
    }

    /// Whether probes are under way or planned.
    #[must_use]
    pub fn is_trying(&self) -> bool {
        self.endpoints.values().any(|endpoint| endpoint.prober.in_round())
    }

    /// Every endpoint of the peer with how it answered; those that answer come first, guesses
    /// last. Where several sockets of ours sent to one, the best of them counts.
    #[must_use]
    pub fn view(&self, now: Instant) -> Vec<Tried> {
        let mut merged: BTreeMap<SocketAddr, Tried> = BTreeMap::new();
        for (place, state) in &self.endpoints {
            let heard = state.heard.max(state.prober.last_pong());
            let tried = Tried {
                endpoint: place.remote,
                kind: state.kind,
                outcome: state.prober.outcome(),
                pings: state.prober.sent_pings(),
                rtt: state.prober.srtt(),
                heard: heard.map(|at| now.saturating_duration_since(at)),
                no_route: false,
            };
            match merged.remove(&place.remote) {
                Some(other) => merged.insert(place.remote, tried.or_better(other)),
                None => merged.insert(place.remote, tried),
            };
        }
        let mut tried: Vec<Tried> = merged.into_values().collect();
        tried.sort_by_key(Tried::rank);
        tried
    }

    /// The smoothed round trip on this path.
    #[must_use]
    pub fn rtt_on(&self, via: Via) -> Option<Duration> {
        match via.place() {
            Some(place) => self.endpoints.get(&place)?.prober.srtt(),
            None => self.relay_prober.srtt(),
        }
    }

    /// Each endpoint with its kind, the pings sent to it and how it answered.
    pub fn outcomes(&self) -> impl Iterator<Item = (SocketAddr, CandidateKind, u32, ProbeOutcome)> {
        self.endpoints.iter().map(|(place, endpoint)| {
            let prober = &endpoint.prober;
            (place.remote, endpoint.kind, prober.sent_pings(), prober.outcome())
        })
    }
}
