//! Invites that do not exist: how often one source may try, and what is written down of it.
//!
//! An invite's secret has 160 bits, so this is about work and about being told. There is no limit
//! for all sources together: it would let one stranger keep everybody out.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// Wrong invites of one source in a minute; after these even a right one is not looked at.
const PER_SOURCE: u32 = 10;
const MINUTE_S: u64 = 60;
/// Sources that are kept account of.
const MAX_SOURCES: usize = 1024;

/// The account of wrong invites.
#[derive(Debug, Default)]
pub(super) struct Guesses {
    /// The minute in which a source was wrong last, and how often.
    by_source: BTreeMap<IpAddr, (u64, u32)>,
    told_at: Option<u64>,
    untold: u64,
}

impl Guesses {
    /// Whether an invite that comes from there is looked at.
    pub(super) fn allows(&self, source: IpAddr, wall: u64) -> bool {
        self.by_source
            .get(&source)
            .is_none_or(|(minute, wrong)| *minute != wall / MINUTE_S || *wrong < PER_SOURCE)
    }

    /// One was wrong, or not looked at. Once in a minute tells how many there were since the last
    /// time, for the log of events: a flood must not fill the disk.
    pub(super) fn note(&mut self, source: IpAddr, wall: u64) -> Option<u64> {
        let now = wall / MINUTE_S;
        if self.by_source.len() >= MAX_SOURCES && !self.by_source.contains_key(&source) {
            self.by_source.retain(|_, (minute, _)| *minute == now);
            if self.by_source.len() >= MAX_SOURCES {
                self.by_source.pop_first();
            }
        }
        let (minute, wrong) = self.by_source.entry(source).or_default();
        if *minute != now {
            (*minute, *wrong) = (now, 0);
        }
        *wrong = wrong.saturating_add(1);
        self.untold += 1;
        if self.told_at.is_some_and(|at| wall < at + MINUTE_S && wall >= at) {
            return None;
        }
        self.told_at = Some(wall);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_guesses_waits_for_the_next_minute_and_others_do_not() {
        let mut guesses = Guesses::default();
        let [bad, good] = ["192.0.2.1", "192.0.2.2"].map(|ip| ip.parse().unwrap());
        let told: Vec<_> = (0..100).filter_map(|_| guesses.note(bad, 600)).collect();
        assert_eq!(told, [1], "one line");
        assert!(!guesses.allows(bad, 659) && guesses.allows(good, 659));
        assert!(guesses.allows(bad, 660));
        assert_eq!(guesses.note(bad, 660), Some(100), "what was not told before");
    }

    #[test]
    fn a_few_mistakes_are_allowed() {
        let mut guesses = Guesses::default();
        let ip = "192.0.2.1".parse().unwrap();
        for _ in 1..PER_SOURCE {
            guesses.note(ip, 0);
            assert!(guesses.allows(ip, 0));
        }
    }

    #[test]
    fn many_sources_cost_no_more_than_a_table() {
        let mut guesses = Guesses::default();
        for n in 0..100_000u32 {
            guesses.note(IpAddr::from(n.to_be_bytes()), 0);
        }
        assert_eq!(guesses.by_source.len(), MAX_SOURCES);
    }
}
