//! Memberships that end, as the node tells people of them.

use std::time::Instant;

use super::Daemon;
use crate::server::admin::rfc3339;
use crate::wire::control::EXPIRY_WARNING_S;

const DAY_S: u64 = 86_400;

impl Daemon {
    /// Says in the log what is new about memberships that end.
    pub(super) fn note_standing(&mut self, now: Instant) {
        let warnings = self.standing_warnings(now);
        for warning in warnings.iter().filter(|warning| !self.said.contains(warning)) {
            tracing::warn!("{warning}");
        }
        self.said = warnings;
    }

    /// Whose membership has ended or will soon: ours, and of peers where we had to end it ourselves.
    pub(super) fn standing_warnings(&self, now: Instant) -> Vec<String> {
        let netmap = self.node.netmap();
        let Some(time) = self.node.server_time(now) else { return Vec::new() };
        let remedy = |name: &str| format!("on the server: overlay server expire {name} --in 180d");
        let name = netmap.identity.as_ref().map_or("NODE", |own| own.name.as_str());
        let own = netmap.expires.and_then(|ends| {
            let at = rfc3339(ends);
            if ends <= time {
                return Some(format!(
                    "the membership of this node ended at {at}: no peer talks to it; with more time \
                     it is let in at once, {}",
                    remedy(name)
                ));
            }
            let days = (ends - time).div_ceil(DAY_S);
            let soon = ends - time <= EXPIRY_WARNING_S;
            soon.then(|| {
                format!("the membership of this node ends at {at}, {days} d from now; {}", remedy(name))
            })
        });
        let peers = netmap.peers.values().filter_map(|peer| {
            let ends = peer.expires.filter(|ends| *ends <= time)?;
            let (name, at) = (peer.name.as_str(), rfc3339(ends));
            Some(format!("the membership of {name} ended at {at}; {}", remedy(name)))
        });
        own.into_iter().chain(peers).collect()
    }
}
