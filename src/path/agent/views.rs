//! What an agent tells people: why its primary is what it is, and what it has tried.

use std::net::SocketAddr;

use super::PathAgent;
use crate::path::{ProbeOutcome, Via};
use crate::types::CandidateKind;

impl PathAgent {
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

    /// Each endpoint with its kind, the pings sent to it and how it answered.
    pub fn outcomes(&self) -> impl Iterator<Item = (SocketAddr, CandidateKind, u32, ProbeOutcome)> {
        self.endpoints.iter().map(|(place, endpoint)| {
            let prober = &endpoint.prober;
            (place.remote, endpoint.kind, prober.sent_pings(), prober.outcome())
        })
    }
}
