//! Memberships that end, as the node tells people of them.

use std::time::Instant;

use super::Daemon;
use crate::server::admin::rfc3339;
use crate::wire::control::EXPIRY_WARNING_S;

const HOUR_S: u64 = 3_600;
const DAY_S: u64 = 24 * HOUR_S;

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
            let left = ends - time;
            let soon = left <= EXPIRY_WARNING_S;
            soon.then(|| {
                let when = from_now(left);
                format!("the membership of this node ends at {at}, {when}; {}", remedy(name))
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

/// When something is that is so many seconds away. Not to the minute: each change is said in the log.
fn from_now(seconds: u64) -> String {
    if seconds <= HOUR_S {
        "within the hour".to_owned()
    } else if seconds <= DAY_S {
        format!("{} h from now", seconds.div_ceil(HOUR_S))
    } else {
        format!("{} d from now", seconds.div_ceil(DAY_S))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closer_the_finer() {
        let times = [3, HOUR_S, HOUR_S + 1, DAY_S, DAY_S + 1, 10 * DAY_S].map(from_now);
        let said = ["within the hour", "within the hour", "2 h from now", "24 h from now"];
        assert_eq!((&times[..4], times[4].as_str()), (&said.map(String::from)[..], "2 d from now"));
        assert_eq!(times[5], "10 d from now");
    }
}
