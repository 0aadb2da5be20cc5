//! Which of two proved paths is better, and whether it is better by enough.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// A path is left for one of the same tier only when that saves this much: below, the difference
/// is noise and switching would only reorder packets.
const MIN_GAIN: Duration = Duration::from_millis(3);

/// Better first: the tier, then the round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Score {
    tier: Tier,
    rtt: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tier {
    /// Both ends on private addresses of one family: no router of a provider is between them.
    Local,
    /// Anything else that is direct.
    Remote,
}

impl Score {
    pub(crate) fn of(remote: SocketAddr, rtt: Duration) -> Self {
        let private = match remote.ip() {
            IpAddr::V4(ip) => ip.is_private(),
            IpAddr::V6(ip) => ip.is_unique_local(),
        };
        Self { tier: if private { Tier::Local } else { Tier::Remote }, rtt }
    }

    /// Whether this path is of a better tier, and not only faster.
    pub(crate) fn is_nearer_than(self, other: Self) -> bool {
        self.tier < other.tier
    }

    /// Whether to leave a working path of score `current` for this one.
    pub(crate) fn clearly_beats(self, current: Self) -> bool {
        if self.tier != current.tier {
            // A local path that is much slower than the remote one is a detour through somebody
            // else's tunnel, whatever its address looks like.
            return if self.tier < current.tier {
                self.rtt <= current.rtt * 2 + MIN_GAIN
            } else {
                self.rtt * 2 + MIN_GAIN < current.rtt
            };
        }
        current.rtt.saturating_sub(self.rtt) > MIN_GAIN.max(current.rtt / 5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(remote: &str, rtt_ms: u64) -> Score {
        Score::of(remote.parse().unwrap(), Duration::from_millis(rtt_ms))
    }

    #[test]
    fn a_local_path_wins_unless_it_is_a_detour() {
        assert!(score("192.168.1.2:1", 5).clearly_beats(score("203.0.113.1:1", 4)));
        assert!(!score("192.168.1.2:1", 80).clearly_beats(score("203.0.113.1:1", 4)));
        assert!(score("203.0.113.1:1", 4).clearly_beats(score("10.1.1.1:1", 80)));
        assert!(!score("203.0.113.1:1", 4).clearly_beats(score("192.168.1.2:1", 5)));
    }

    #[test]
    fn a_small_gain_is_not_worth_a_switch() {
        assert!(!score("203.0.113.1:1", 9).clearly_beats(score("203.0.113.2:1", 10)));
        assert!(!score("203.0.113.1:1", 90).clearly_beats(score("203.0.113.2:1", 100)));
        assert!(score("203.0.113.1:1", 70).clearly_beats(score("203.0.113.2:1", 100)));
    }

    #[test]
    fn two_paths_never_beat_each_other() {
        let paths = ["10.0.0.1:1", "203.0.113.1:1"];
        for a in paths {
            for b in paths {
                for x in 0..60 {
                    for y in 0..60 {
                        let (a, b) = (score(a, x), score(b, y));
                        assert!(!(a.clearly_beats(b) && b.clearly_beats(a)), "{a:?} {b:?}");
                    }
                }
            }
        }
    }
}
