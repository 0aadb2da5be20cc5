//! The costly ways to punch, which are tried when nothing else led to a direct path: which one, in
//! which order, and how long one waits for the next.
//!
//! A NAT that gives every destination another random port hides where its node can be reached, and
//! a NAT that lets only answers in hides who knocks. Between the two a path is found by chance, as
//! two people in a room are found to share a birthday: one side opens [`SOCKETS`] sockets, each
//! with a port of its own at the NAT, all opened towards the one endpoint of the other side; that
//! one sends to random ports, each probe a chance of 256 in 64,512. [`PROBES`] of them hit with
//! 98 %. Every probe costs an entry in the table of the prober's own NAT, of which small routers
//! have a few thousand: so there is one run at a time, and [`Budget`] bounds what is alive.
//!
//! The other way is a fresh local port, for a pair that should be easy and was spoiled: a router
//! whose own input is open holds on to a stranger's early datagram (see `agent::opener`), moves the
//! inside port to another one, and Linux goes on to use that for new destinations of the old port.
//! Nobody can see which side it was, so both sides take a fresh one.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::seq::SliceRandom;

use crate::types::source_of;
use crate::wire::punch::{NatHint, Way};

/// Sockets that one side opens.
pub const SOCKETS: usize = 256;
/// Ports that the other side probes in a run, at most.
pub const PROBES: usize = 1024;
/// Time between two probes.
pub const PROBE_SPACING: Duration = Duration::from_millis(10);
/// The cheap ways have this long.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// A run with fewer probes is not worth its noise.
const FEWEST_PROBES: usize = 256;
/// NATs drop an entry without an answer after this (RFC 4787 asks for more, Linux does this).
const ENTRY_LIFETIME: Duration = Duration::from_secs(30);
/// Waits after birthday runs that found nothing; the last one repeats.
const BACKOFF: [Duration; 3] =
    [Duration::from_secs(60), Duration::from_secs(300), Duration::from_secs(1800)];
/// Addresses that are kept account of.
const MAX_TARGETS: usize = 256;
/// The wait after a fresh port did not help: it costs nothing, and another way is next.
const NEXT_WAY: Duration = Duration::from_secs(1);

/// A peer that has taken part before, and does not answer an offer, is asleep or cut off, perhaps only until
/// it binds again: it is asked again after this, and twice as long each time,
const SILENT_WAIT: Duration = Duration::from_secs(2);
/// up to this.
const LONGEST_SILENT_WAIT: Duration = Duration::from_secs(15);
/// So many direct paths, and another one, that begin within
const FREE_SUCCESSES: usize = 3;
/// this time are a pair that flaps,
const FLAPPING: Duration = Duration::from_secs(120);
/// which waits for so long: the entries of its last run are gone by then.
const FLAPPING_WAIT: Duration = ENTRY_LIFETIME.saturating_add(PATIENCE);

/// Two sides do not end a try at the same instant.
const SLACK: Duration = Duration::from_secs(1);

/// Which way fits what the two sides know, and may be wrong about. A hint decides who does what
/// first; only two sides that both give every destination another port are left to the relay: there
/// are 2^32 pairs of ports. `low` tells whether the lower of the two ids offers, which is the same
/// whoever offers next.
#[must_use]
pub fn way(
    offerer: NatHint,
    accepter: NatHint,
    birthday: bool,
    tries: u8,
    low: bool,
) -> Option<Way> {
    use NatHint::Varies;
    let way = match (offerer, accepter) {
        (Varies, Varies) => return None,
        (Varies, _) => Way::OffererOpens,
        (_, Varies) => Way::AccepterOpens,
        // Both look easy, or nobody knows: spoiled perhaps, or the hint is wrong.
        _ if tries == 0 => Way::BothMove,
        _ if tries.is_multiple_of(2) == low => Way::OffererOpens,
        _ => Way::AccepterOpens,
    };
    (birthday || !way.is_birthday()).then_some(way)
}

/// Random ports, none twice before all had their turn.
#[derive(Debug)]
pub struct PortOrder {
    ports: Vec<u16>,
    next: usize,
}

impl PortOrder {
    /// All ports that a NAT gives out, shuffled.
    pub fn new(rng: &mut impl Rng) -> Self {
        let mut ports: Vec<u16> = (1024..=u16::MAX).collect();
        ports.shuffle(rng);
        Self { ports, next: 0 }
    }

    /// The next one.
    pub fn take(&mut self) -> u16 {
        let port = self.ports[self.next];
        self.next = (self.next + 1) % self.ports.len();
        port
    }
}

/// Keeps the entries that our probes leave in our NAT under [`PROBES`], however many runs there are.
#[derive(Debug, Default)]
pub struct Budget {
    /// The end of each recent run, and its probes.
    spent: Vec<(Instant, usize)>,
}

impl Budget {
    /// A run that sent so many probes is over.
    pub fn spend(&mut self, probes: usize, now: Instant) {
        self.spent.retain(|(at, _)| now.saturating_duration_since(*at) < ENTRY_LIFETIME);
        if probes > 0 {
            self.spent.push((now, probes));
        }
    }

    /// The probes that a run may send now; none when there are too few.
    #[must_use]
    pub fn probes(&self, now: Instant) -> Option<usize> {
        let alive = |at: Instant| now.saturating_duration_since(at) < ENTRY_LIFETIME;
        let spent: usize =
            self.spent.iter().filter(|(at, _)| alive(*at)).map(|(_, probes)| probes).sum();
        let left = PROBES.saturating_sub(spent);
        (left >= FEWEST_PROBES).then_some(left)
    }
}

/// When an address may be probed again, whoever claims it. A peer may lie about where it is, and
/// have others do the same: a run that has led to no path there counts for all of them.
#[derive(Debug, Default)]
pub struct Targets(BTreeMap<IpAddr, (usize, Instant)>);

impl Targets {
    /// Whether a run towards this address may start now. It counts as one that finds nothing, unless
    /// [`Self::found`] says otherwise.
    pub fn start(&mut self, address: IpAddr, now: Instant) -> bool {
        let address = source_of(address);
        if !self.0.contains_key(&address) && self.0.len() >= MAX_TARGETS {
            self.0.retain(|_, (_, not_before)| *not_before > now);
            if self.0.len() >= MAX_TARGETS {
                return false;
            }
        }
        let (runs, not_before) = self.0.entry(address).or_insert((0, now));
        if *not_before > now {
            return false;
        }
        *not_before = now + BACKOFF[(*runs).min(BACKOFF.len() - 1)];
        *runs += 1;
        true
    }

    /// Whether a run towards this address could start now.
    #[must_use]
    pub fn allows(&self, address: IpAddr, now: Instant) -> bool {
        self.0.get(&source_of(address)).is_none_or(|(_, not_before)| *not_before <= now)
    }

    /// There is a path to a peer at this address.
    pub fn found(&mut self, address: IpAddr) {
        self.0.remove(&source_of(address));
    }
}

/// How it went with one peer so far.
#[derive(Debug, Default)]
pub struct History {
    tries: u8,
    failed_runs: usize,
    /// No try before this, whoever starts it.
    not_before: Option<Instant>,
    /// We start none before this.
    ask_at: Option<Instant>,
    /// It has said something about a run once.
    takes_part: bool,
    /// Offers that it has not answered, in a row; the wait is for it.
    silences: u32,
    /// When the last direct paths began, the newest last.
    succeeded_at: VecDeque<Instant>,
}

impl History {
    /// Ways that were tried since the last success.
    #[must_use]
    pub fn tries(&self) -> u8 {
        self.tries
    }

    /// Whether the peer may start another try now; its clock may have run a little ahead.
    #[must_use]
    pub fn allows(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| at <= now + SLACK)
    }

    /// When we may start another try, for a pair that has waited since `stuck`.
    #[must_use]
    pub fn due_at(&self, stuck: Instant) -> Instant {
        (stuck + PATIENCE).max(self.not_before.max(self.ask_at).unwrap_or(stuck))
    }

    /// Whether the peer has said something about a run before.
    #[must_use]
    pub fn takes_part(&self) -> bool {
        self.takes_part
    }

    /// The peer says something about a run: what was held against its silence does not count.
    pub fn hear(&mut self) {
        self.takes_part = true;
        if std::mem::take(&mut self.silences) > 0 {
            self.not_before = None;
            self.failed_runs = 0;
        }
    }

    /// An offer was not answered. Who is known to take part is asleep, or cut off, and asked again
    /// soon; anybody else may not know the message, and is asked ever more rarely.
    pub fn note_silence(&mut self, now: Instant) {
        let silences = self.silences;
        if self.takes_part {
            let wait = SILENT_WAIT * 2u32.pow(silences.min(3));
            self.not_before = Some(now + wait.min(LONGEST_SILENT_WAIT));
        } else {
            self.fail(true, now);
        }
        self.silences = silences.saturating_add(1);
    }

    /// The peer is busy. We ask again after this; it may ask us before, or two that are both told to wait
    /// would refuse each other in turn.
    pub fn ask_again(&mut self, wait: Duration, now: Instant) {
        self.ask_at = Some(now + wait);
    }

    /// Nothing was tried, but it has to wait.
    pub fn postpone(&mut self, wait: Duration, now: Instant) {
        self.not_before = Some(now + wait);
    }

    /// A way starts; the peer has counted so many before.
    pub fn start(&mut self, peer_tries: u8) {
        self.tries = self.tries.max(peer_tries).saturating_add(1);
    }

    /// A way has found nothing.
    pub fn fail(&mut self, costly: bool, now: Instant) {
        self.silences = 0;
        let wait = if costly {
            self.failed_runs += 1;
            BACKOFF[(self.failed_runs - 1).min(BACKOFF.len() - 1)]
        } else {
            NEXT_WAY
        };
        self.not_before = Some(now + wait);
    }

    /// There is a direct path. When it is lost, another try may follow at once; in a pair that flaps
    /// it waits until the entries of this one are gone.
    pub fn succeed(&mut self, now: Instant) {
        let mut succeeded_at = std::mem::take(&mut self.succeeded_at);
        let recent = |at: &Instant| now.saturating_duration_since(*at) < FLAPPING;
        let flaps = succeeded_at.len() == FREE_SUCCESSES && succeeded_at.iter().all(recent);
        if succeeded_at.len() == FREE_SUCCESSES {
            succeeded_at.pop_front();
        }
        succeeded_at.push_back(now);
        *self = Self {
            not_before: flaps.then(|| now + FLAPPING_WAIT),
            takes_part: self.takes_part,
            succeeded_at,
            ..Self::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::testing::epoch;

    #[test]
    fn the_side_whose_ports_vary_opens_sockets() {
        use NatHint::{Steady, Unknown, Varies};
        for other in [Steady, Unknown] {
            for tries in 0..5 {
                assert_eq!(way(Varies, other, true, tries, true), Some(Way::OffererOpens));
                assert_eq!(way(other, Varies, true, tries, true), Some(Way::AccepterOpens));
                assert_eq!(way(Varies, other, false, tries, true), None, "switched off");
            }
        }
        assert_eq!(way(Varies, Varies, true, 0, true), None);
    }

    #[test]
    fn a_hint_never_forbids_a_way() {
        use NatHint::{Steady, Unknown};
        for (a, b) in [(Steady, Steady), (Unknown, Steady), (Unknown, Unknown)] {
            let ways = |low| (0..3).filter_map(|tries| way(a, b, true, tries, low)).collect();
            let by_low: Vec<Way> = ways(true);
            assert_eq!(by_low, [Way::BothMove, Way::AccepterOpens, Way::OffererOpens]);
            let by_high: Vec<Way> = ways(false);
            assert_eq!(by_high, [Way::BothMove, Way::OffererOpens, Way::AccepterOpens]);
            assert_eq!(way(a, b, false, 0, true), Some(Way::BothMove), "costs nothing");
            assert_eq!(way(a, b, false, 1, true), None);
        }
    }

    #[test]
    fn no_port_comes_twice_before_all_have_come() {
        let mut order = PortOrder::new(&mut StdRng::seed_from_u64(1));
        let count = usize::from(u16::MAX) - 1024 + 1;
        let ports: Vec<u16> = (0..count).map(|_| order.take()).collect();
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), count);
        assert!(ports.iter().all(|port| *port >= 1024));
        assert_eq!(order.take(), ports[0]);
    }

    #[test]
    fn runs_one_after_the_other_never_leave_more_entries_than_one() {
        let (mut budget, start) = (Budget::default(), epoch());
        assert_eq!(budget.probes(start), Some(PROBES));
        budget.spend(700, start);
        assert_eq!(budget.probes(start), Some(PROBES - 700));
        budget.spend(PROBES - 700, start + Duration::from_secs(3));
        assert_eq!(budget.probes(start + Duration::from_secs(29)), None);
        assert_eq!(budget.probes(start + Duration::from_secs(30)), Some(700));
        assert_eq!(budget.probes(start + Duration::from_secs(33)), Some(PROBES));
    }

    #[test]
    fn an_address_is_probed_ever_more_rarely_whoever_claims_it() {
        let (mut targets, start) = (Targets::default(), epoch());
        let victim: IpAddr = "192.0.2.1".parse().unwrap();
        // Somebody claims it each second, for two hours.
        let runs: Vec<u64> =
            (0..7_200).filter(|s| targets.start(victim, start + Duration::from_secs(*s))).collect();
        assert_eq!(runs, [0, 60, 360, 2_160, 3_960, 5_760]);
        let end = start + Duration::from_secs(7_200);
        assert!(targets.start("192.0.2.2".parse().unwrap(), end), "another one");
        targets.found(victim);
        assert!(targets.start(victim, end), "it was a peer's after all");
        let many = (0..100_000u32).map(|n| IpAddr::from((n + 0x0100_0000).to_be_bytes()));
        assert!(many.filter(|ip| targets.start(*ip, end)).count() <= MAX_TARGETS);
    }

    #[test]
    fn what_fails_waits_longer_each_time() {
        let (mut history, now) = (History::default(), epoch());
        assert_eq!(history.due_at(now), now + PATIENCE);
        history.fail(false, now);
        assert_eq!(history.due_at(now), now + PATIENCE, "a second way may follow");
        for minutes in [1, 5, 30, 30] {
            history.start(0);
            history.fail(true, now);
            let at = now + Duration::from_secs(minutes * 60);
            assert_eq!(history.due_at(now), at);
            assert!(!history.allows(now) && history.allows(at));
        }
        history.succeed(now);
        assert_eq!(history.tries(), 0);
    }
    #[test]
    fn a_success_ends_the_waits_and_a_pair_that_flaps_has_some() {
        let (mut history, now) = (History::default(), epoch());
        let at = |s| now + Duration::from_secs(s);
        history.fail(true, now);
        history.succeed(at(5));
        assert_eq!(history.due_at(at(7)), at(7) + PATIENCE, "lost: as fast as the first time");
        let mut runs = 0;
        let mut s = 7;
        while s < 607 {
            history.succeed(at(s));
            runs += 1;
            while !history.allows(at(s)) {
                s += 1;
            }
            s += PATIENCE.as_secs();
        }
        assert!(runs <= 20, "at most one in 30 s: {runs} in 600 s");
        history.succeed(at(1_000));
        assert_eq!(history.due_at(at(1_001)), at(1_001) + PATIENCE, "it has settled");
    }

    #[test]
    fn silence_is_held_against_a_peer_only_until_it_speaks() {
        let (mut history, now) = (History::default(), epoch());
        history.note_silence(now);
        history.note_silence(now);
        assert_eq!(history.due_at(now), now + BACKOFF[1], "it may not know the message");
        history.hear();
        assert!(history.allows(now), "it does");
        for wait in [2, 4, 8, 15, 15] {
            history.note_silence(now);
            let again = now + Duration::from_secs(wait).max(PATIENCE);
            assert_eq!(history.due_at(now), again, "asleep, for now");
        }
        history.hear();
        assert!(history.allows(now));
        history.fail(true, now);
        history.hear();
        assert_eq!(history.due_at(now), now + BACKOFF[0], "a run that found nothing counts");
    }
}
