//! What the agent knows of each endpoint, for those who have to explain its choice.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::PathAgent;
use crate::path::side::Tried;

impl PathAgent {
    /// Every endpoint of the peer with how it answered; those that answer come first, guesses
    /// last.
    #[must_use]
    pub fn view(&self, now: Instant) -> Vec<Tried> {
        let mut tried: Vec<Tried> = self
            .endpoints
            .iter()
            .map(|(endpoint, state)| {
                let heard = state.heard.max(state.prober.last_pong());
                Tried {
                    endpoint: *endpoint,
                    kind: state.kind,
                    outcome: state.prober.outcome(),
                    pings: state.prober.sent_pings(),
                    rtt: state.prober.srtt(),
                    heard: heard.map(|at| now.saturating_duration_since(at)),
                }
            })
            .collect();
        tried.sort_by_key(Tried::rank);
        tried
    }

    /// The smoothed round trip to this endpoint, or by relay.
    #[must_use]
    pub fn rtt_of(&self, remote: Option<SocketAddr>) -> Option<Duration> {
        match remote {
            Some(remote) => self.endpoints.get(&remote)?.prober.srtt(),
            None => self.relay_prober.srtt(),
        }
    }
}
