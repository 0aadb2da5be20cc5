//! What can be seen of an agent from outside; nothing here changes anything.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{PathAgent, Trust};
use crate::path::mtu::BASE_MTU;
use crate::path::{ProbeOutcome, Quality, Via};
use crate::types::CandidateKind;

impl PathAgent {
    /// The smoothed round trip on the primary.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        match self.primary? {
            Via::Direct { remote, .. } => self.endpoints.get(&remote)?.prober.srtt(),
            Via::RelayUdp | Via::RelayTcp => self.relay_prober.srtt(),
        }
    }

    /// Why the primary is what it is, in a sentence.
    #[must_use]
    pub fn why(&self) -> String {
        let tried: Vec<_> = self.outcomes().filter(|(.., o)| *o != ProbeOutcome::Untried).collect();
        let probing = tried.iter().any(|(.., outcome)| *outcome == ProbeOutcome::Probing);
        match self.primary {
            Some(Via::Direct { remote, .. }) => {
                let kind = self.endpoints.get(&remote).map_or("unknown", |e| e.kind.as_str());
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
        self.endpoints.iter().map(|(remote, endpoint)| {
            let prober = &endpoint.prober;
            (*remote, endpoint.kind, prober.sent_pings(), prober.outcome())
        })
    }

    /// How good each path is on which something is known: the direct ones, then the relay.
    #[must_use]
    pub fn quality(&self, now: Instant) -> Vec<Quality> {
        let direct = self.endpoints.iter().filter_map(|(remote, endpoint)| {
            let rtt = endpoint.prober.srtt()?;
            Some(Quality {
                via: Via::Direct { remote: *remote, local: endpoint.local },
                rtt: Some(rtt),
                loss_permille: endpoint.delivery.loss_permille(),
                mtu: endpoint.mtu.found(now),
                trusted: endpoint.trust != Trust::Distrusted,
            })
        });
        let relay = self.relay.map(|via| Quality {
            via,
            rtt: self.relay_prober.srtt(),
            loss_permille: self.relay_delivery.loss_permille(),
            mtu: None,
            trusted: true,
        });
        direct.chain(relay).collect()
    }

    /// Of a thousand datagrams sent on this path in the last seconds, so many did not arrive.
    #[must_use]
    pub fn loss_permille(&self, via: Via) -> Option<u16> {
        match via {
            Via::Direct { remote, .. } => self.endpoints.get(&remote)?.delivery.loss_permille(),
            Via::RelayUdp | Via::RelayTcp => self.relay_delivery.loss_permille(),
        }
    }

    /// The longest inner packet that the primary carries uncut.
    #[must_use]
    pub fn mtu(&self, now: Instant) -> u16 {
        let Some(Via::Direct { remote, .. }) = self.primary else { return BASE_MTU };
        let endpoint = self.endpoints.get(&remote);
        endpoint.and_then(|endpoint| endpoint.mtu.found(now)).unwrap_or(BASE_MTU)
    }
}
