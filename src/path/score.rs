//! Which of two proved paths is better, and whether it is better by enough.

use std::net::SocketAddr;
use std::time::Duration;

use crate::types::is_private;

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
    /// By an uplink that one side prefers another one to.
    Second,
}

impl Score {
    pub(crate) fn of(remote: SocketAddr, rtt: Duration) -> Self {
        Self { tier: if is_private(remote.ip()) { Tier::Local } else { Tier::Remote }, rtt }
    }

    /// The same path, when it goes by an uplink that one side prefers another one to.
    pub(crate) fn of_further_uplink(self) -> Self {
        Self { tier: Tier::Second, ..self }
    }

    /// Whether this path is of a better tier, and not only faster.
    pub(crate) fn is_nearer_than(self, other: Self) -> bool {
        self.tier < other.tier
    }

    /// Whether to leave a working path of score `current` for this one.
    pub(crate) fn clearly_beats(self, current: Self) -> bool {
        if self.tier == Tier::Second || current.tier == Tier::Second {
            // Not a matter of speed: the administrator has set the order, and it may be one of price.
            if self.tier != current.tier {
                return self.tier < current.tier;
            }
        } else if self.tier != current.tier {
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
    fn a_further_uplink_is_for_when_the_others_fail() {
        let slow = score("203.0.113.1:1", 600);
        let fast = score("203.0.113.2:1", 10).of_further_uplink();
        assert!(slow.clearly_beats(fast) && slow.is_nearer_than(fast) && slow < fast);
        assert!(!fast.clearly_beats(slow));
        let faster = score("203.0.113.3:1", 5).of_further_uplink();
        assert!(faster.clearly_beats(fast), "but among them the faster one is better");
    }

    #[test]
    fn two_paths_never_beat_each_other() {
        let paths = ["10.0.0.1:1", "203.0.113.1:1"];
        for a in paths {
            for b in paths {
                for x in 0..60 {
                    for y in 0..60 {
                        let (a, b) = (score(a, x), score(b, y));
                        let second = [a.of_further_uplink(), b.of_further_uplink()];
                        for (a, b) in [(a, b), (a, second[1]), (second[0], second[1])] {
                            assert!(!(a.clearly_beats(b) && b.clearly_beats(a)), "{a:?} {b:?}");
                        }
                    }
                }
            }
        }
    }
}
