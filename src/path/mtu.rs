//! How long a packet one direct path carries.
//!
//! Two things are asked, with pings padded to the size of sealed data. Does a full packet get
//! through, in fragments if need be? Only then is the path trusted with data. And how long may a
//! datagram be that nobody on the way has to cut? That is the path's MTU: asked upward from nothing,
//! the largest first, as it is the answer nearly everywhere; then all the usual sizes at once
//! (RFC 8899 calls it packetization layer path MTU discovery: no ICMP is needed).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::types::TxId;
use crate::types::{BASE_MTU, SEAL_OVERHEAD};

/// Bytes of all headers around an inner packet on an IPv4 path: IP, UDP, WireGuard.
pub const OVERHEAD_V4: u16 = 20 + 8 + SEAL_OVERHEAD;
/// The same on an IPv6 path.
pub(super) const OVERHEAD_V6: u16 = 40 + 8 + SEAL_OVERHEAD;

/// MTUs of links that are met in the world: tunnels in tunnels, hotels, IPv6, mobile networks,
/// WireGuard, GRE, 6in4, PPPoE, Ethernet, clouds, jumbo frames.
pub(super) const LINKS: [u16; 19] = [
    640, 852, 1_006, 1_124, 1_200, 1_240, 1_280, 1_340, 1_360, 1_400, 1_420, 1_440, 1_460, 1_480,
    1_492, 1_500, 4_000, 8_500, 9_000,
];
/// An answer takes this long, or two round trips.
const PATIENCE: Duration = Duration::from_millis(120);
/// Questions about the largest size alone.
const TOP_TRIES: u32 = 2;
/// Questions about all sizes: three in a row are hardly lost by chance.
const ALL_TRIES: u32 = 3;
/// What was found is looked at again after this, if the path is in use.
pub(super) const AGAIN: Duration = Duration::from_secs(600);
/// Long datagrams that do not arrive although probes of their size do are tried again after this,
/// twice as long each time.
const LOWERED: Duration = Duration::from_secs(10);

/// A question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Question {
    /// Of a datagram that holds an inner packet of this length.
    pub(super) inner: u16,
    /// It must not be cut on the way.
    pub(super) whole: bool,
}

/// Whether a full packet gets through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Base {
    /// Not known yet.
    #[default]
    Unknown,
    /// Yes.
    Fits,
    /// No: what is longer than a question disappears.
    Fails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// The largest size and the full packet.
    Top(u32),
    /// Everything.
    All(u32),
}

/// The search on one path.
#[derive(Debug, Default)]
pub(super) struct MtuSearch {
    limit: u16,
    phase: Phase,
    next_at: Option<Instant>,
    open: BTreeMap<TxId, Question>,
    base: Base,
    base_asked: u32,
    /// Largest in this search.
    best: Option<u16>,
    found: Option<u16>,
    lowered_until: Option<Instant>,
    lowerings: u32,
}

impl MtuSearch {
    /// Begins a search, unless one is under way. `limit` is the largest inner MTU that is of use.
    pub(super) fn start(&mut self, limit: u16, now: Instant) {
        self.limit = limit.max(BASE_MTU);
        self.restart(now);
    }

    fn restart(&mut self, now: Instant) {
        if self.phase == Phase::Idle {
            self.phase = Phase::Top(0);
            self.best = None;
            self.base_asked = 0;
            self.open.clear();
            self.next_at = Some(now);
        }
    }

    /// What was found, or is being looked for, may not be true any more: begins anew at `at`. What has not
    /// been looked for yet stays so.
    pub(super) fn look_again(&mut self, limit: u16, at: Instant) {
        if self.next_at.is_some() {
            self.phase = Phase::Idle;
            self.start(limit, at);
        }
    }

    /// Nobody needs to know at the moment.
    pub(super) fn stop(&mut self) {
        self.phase = Phase::Idle;
        self.next_at = None;
        self.open.clear();
    }

    /// Nobody uses the path: what was found need not be looked at again yet.
    pub(super) fn rest(&mut self, now: Instant) {
        if self.phase == Phase::Idle && self.next_at.is_some_and(|at| at <= now) {
            self.next_at = Some(now + AGAIN);
        }
    }

    /// When [`Self::take_due`] has something.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.next_at
    }

    /// What is to be asked now on the path to `remote`.
    pub(super) fn take_due(
        &mut self,
        remote: SocketAddr,
        srtt: Duration,
        now: Instant,
    ) -> Vec<Question> {
        if self.next_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        if self.lowered_until.is_some_and(|until| until <= now) {
            self.lowered_until = None;
        }
        if self.base == Base::Unknown && self.base_asked >= ALL_TRIES {
            self.base = Base::Fails;
        }
        match self.phase {
            Phase::Idle => self.restart(now),
            Phase::Top(tries) if tries >= TOP_TRIES => self.phase = Phase::All(0),
            Phase::All(tries) if tries >= ALL_TRIES => {
                self.finish(now);
                return Vec::new();
            }
            Phase::Top(_) | Phase::All(_) => {}
        }
        self.next_at = Some(now + PATIENCE.max(srtt * 2));
        let mut questions = Vec::new();
        // The answer to the largest size answers this one, too, and comes from nearly everywhere.
        if self.base != Base::Fits && self.phase != Phase::Top(0) {
            self.base_asked += 1;
            questions.push(Question { inner: BASE_MTU, whole: false });
        }
        match &mut self.phase {
            Phase::Top(tries) => {
                *tries += 1;
                questions.push(Question { inner: self.limit, whole: true });
            }
            Phase::All(tries) => {
                *tries += 1;
                let mut sizes: Vec<u16> = sizes(remote, self.limit).collect();
                sizes.retain(|size| self.best < Some(*size));
                // The largest first, as the first answer counts at once.
                sizes.reverse();
                questions.extend(sizes.into_iter().map(|inner| Question { inner, whole: true }));
            }
            Phase::Idle => {}
        }
        questions
    }

    /// A question left as ping `tx`.
    pub(super) fn asked(&mut self, tx: TxId, question: Question) {
        self.open.insert(tx, question);
    }

    /// A pong arrived. Returns whether it answers a question.
    pub(super) fn handle_pong(&mut self, tx: TxId, now: Instant) -> bool {
        let Some(Question { inner, whole }) = self.open.remove(&tx) else { return false };
        if inner >= BASE_MTU {
            self.base = Base::Fits;
        }
        if whole {
            self.best = self.best.max(Some(inner));
            self.found = self.found.max(self.best);
            if inner == self.limit {
                self.finish(now);
            }
        }
        true
    }

    fn finish(&mut self, now: Instant) {
        self.found = self.best;
        self.phase = Phase::Idle;
        self.open.clear();
        self.next_at = Some(self.lowered_until.unwrap_or(now + AGAIN));
    }

    /// Datagrams above the base do not arrive, whatever the probes say: none are sent for a while.
    pub(super) fn lower(&mut self, now: Instant) {
        let wait = LOWERED * 2u32.pow(self.lowerings.min(6));
        self.lowerings += 1;
        self.lowered_until = Some(now + wait);
        // Perhaps nothing long gets through any more.
        self.base = Base::Unknown;
        self.phase = Phase::Idle;
        self.restart(now);
    }

    /// Whether a full packet gets through.
    pub(super) fn base(&self) -> Base {
        self.base
    }

    /// The inner MTU that was proved to need no fragments; none when nothing is known.
    pub(super) fn found(&self, now: Instant) -> Option<u16> {
        let lowered = self.lowered_until.is_some_and(|until| until > now);
        if lowered { self.found.map(|found| found.min(BASE_MTU)) } else { self.found }
    }
}

/// The inner MTUs worth a question on the path to `remote`.
fn sizes(remote: SocketAddr, limit: u16) -> impl Iterator<Item = u16> {
    let overhead = if remote.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 };
    let links = LINKS.into_iter().map(move |link| link - overhead);
    links.filter(move |inner| *inner < limit).chain([limit])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::epoch;

    /// Plays a search on a path that carries datagrams of inner MTU `whole` uncut, and `cut` in
    /// fragments; every `drop_nth` answer is lost. Returns the search, the questions and the time.
    fn play(
        v6: bool,
        limit: u16,
        whole: u16,
        cut: u16,
        drop_nth: usize,
    ) -> (MtuSearch, usize, Duration) {
        let remote = if v6 { "[2001:db8::1]:1" } else { "192.0.2.1:1" }.parse().unwrap();
        let mut search = MtuSearch::default();
        let (mut now, mut asked) = (epoch(), 0usize);
        search.start(limit, now);
        while search.phase != Phase::Idle {
            now = search.next_at().unwrap();
            for question in search.take_due(remote, Duration::from_millis(20), now) {
                asked += 1;
                let tx = TxId(std::array::from_fn(|i| asked.to_le_bytes()[i % 8]));
                search.asked(tx, question);
                let fits = question.inner <= if question.whole { whole } else { cut };
                if fits && (drop_nth == 0 || !asked.is_multiple_of(drop_nth)) {
                    let known = search.found(now);
                    assert!(search.handle_pong(tx, now));
                    // No smaller size counts on the way to it.
                    assert!(drop_nth != 0 || known.is_none() || known == search.found(now));
                }
            }
        }
        (search, asked, now - epoch())
    }

    #[test]
    fn the_usual_path_is_known_after_one_question() {
        let (search, asked, _) = play(false, 1_440, 1_440, 1_440, 0);
        assert_eq!((search.found(epoch()), search.base(), asked), (Some(1_440), Base::Fits, 1));
    }

    #[test]
    fn a_narrow_path_is_told_from_one_that_swallows_what_is_long() {
        let hotel = 1_124 - OVERHEAD_V4;
        let (search, _, took) = play(false, 1_440, hotel, 9_000, 0);
        assert_eq!((search.found(epoch()), search.base()), (Some(hotel), Base::Fits));
        assert!(took < Duration::from_millis(800), "{took:?}");
        let (search, ..) = play(false, 1_440, hotel, hotel, 0);
        assert_eq!((search.found(epoch()), search.base()), (Some(hotel), Base::Fails));
    }

    #[test]
    fn what_does_not_arrive_is_not_sent_for_a_while() {
        let (mut search, ..) = play(false, 8_940, 8_940, 9_000, 0);
        assert_eq!(search.found(epoch()), Some(8_940));
        let now = epoch() + Duration::from_secs(2);
        search.lower(now);
        assert_eq!(search.found(now), Some(BASE_MTU));
        assert_eq!(search.found(now + LOWERED), Some(8_940));
        search.lower(now + LOWERED);
        assert_eq!(search.found(now + LOWERED * 2), Some(BASE_MTU), "longer the second time");
    }

    #[test]
    fn another_mtu_of_the_link_is_found_without_a_wait() {
        let (mut search, ..) = play(false, 1_440, 1_440, 9_000, 0);
        for (limit, whole) in [(1_440, 1_280 - OVERHEAD_V4), (8_940, 8_940), (8_940, 1_440)] {
            let begin = epoch() + Duration::from_secs(30);
            assert!(search.next_at().unwrap() > begin + AGAIN / 2, "not by itself");
            // Also when it comes in the middle of the search that the last one has started.
            search.look_again(limit, begin);
            search.take_due("192.0.2.1:1".parse().unwrap(), Duration::ZERO, begin);
            search.look_again(limit, begin);
            let took = go_on(&mut search, begin, whole);
            assert_eq!(search.found(begin), Some(whole), "with {limit}");
            assert!(took < Duration::from_secs(1), "{took:?}");
        }
        let mut untouched = MtuSearch::default();
        untouched.look_again(1_440, epoch());
        assert_eq!(untouched.next_at(), None, "nobody has asked for it");
    }

    /// Plays a search to its end where datagrams of inner MTU `whole` pass. Returns how long it took.
    fn go_on(search: &mut MtuSearch, begin: Instant, whole: u16) -> Duration {
        let remote = "192.0.2.1:1".parse().unwrap();
        let (mut now, mut asked) = (begin, 0u8);
        while search.phase != Phase::Idle {
            now = search.next_at().unwrap();
            for question in search.take_due(remote, Duration::from_millis(20), now) {
                asked += 1;
                search.asked(TxId([asked; 12]), question);
                if question.inner <= whole || !question.whole {
                    search.handle_pong(TxId([asked; 12]), now);
                }
            }
        }
        now - begin
    }

    proptest! {
        #[test]
        fn the_result_is_never_more_than_the_path_carries_nor_a_step_less(
            v6: bool,
            limit in BASE_MTU..=8_920,
            whole in 600u16..9_000,
            drop_nth in prop::sample::select(vec![0usize, 5, 7, 11]),
        ) {
            let (search, asked, took) = play(v6, limit, whole, 9_000, drop_nth);
            let remote: SocketAddr = if v6 { "[::1]:1" } else { "127.0.0.1:1" }.parse().unwrap();
            let expected = sizes(remote, limit).filter(|size| *size <= whole).max();
            prop_assert!(search.found(epoch()) <= expected);
            if drop_nth == 0 {
                prop_assert_eq!(search.found(epoch()), expected);
            }
            prop_assert!(asked < 80 && took < Duration::from_secs(1), "{asked}, {took:?}");
        }
    }
}
