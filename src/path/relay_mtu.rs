//! How long a packet the relay carries to one peer.
//!
//! The relay is there before anything is proved, so full packets go that way until they are known to
//! disappear: a narrow link on either side of the server that neither cuts nor tells. Once there is
//! data on it, a ping as long as a full packet is sent through to the peer and back as a short pong; when
//! none of three is answered, pings of all usual sizes, and the longest one that is answered
//! counts. They may be cut on the way, as data may: what matters is that they arrive.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::mtu::{AGAIN, LINKS, OVERHEAD_V4, OVERHEAD_V6};
use crate::types::{BASE_MTU, TxId};
use crate::wire::relay::DATA_HEADER_LEN;

/// An answer takes this long, or two round trips.
const PATIENCE: Duration = Duration::from_millis(150);
/// The same where the round trip is not known.
const FIRST_PATIENCE: Duration = Duration::from_millis(400);
/// Questions about a full packet alone.
const FULL_TRIES: u32 = 3;
/// Questions about all sizes.
const ALL_TRIES: u32 = 2;
/// A peer that answers nothing is asked again after this, and a path that loses long packets.
const SOON: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    Full(u32),
    All(u32),
}

/// The search on the way by the relay.
#[derive(Debug, Default)]
pub(super) struct RelayMtu {
    phase: Phase,
    next_at: Option<Instant>,
    /// A new search is of no use before,
    rest_until: Option<Instant>,
    /// and not even when long packets are lost before this.
    hurry_from: Option<Instant>,
    /// Long packets were lost since the last search: who waits for one of them sends ever more rarely, and
    /// may send nothing when the next search is allowed.
    lossy: bool,
    open: BTreeMap<TxId, u16>,
    /// Largest in this search.
    best: Option<u16>,
    found: Option<u16>,
}

impl RelayMtu {
    /// Data goes by the relay. `lossy` tells that long packets do not arrive, whatever was found.
    pub(super) fn want(&mut self, lossy: bool, now: Instant) {
        let rests = self.rest_until.is_some_and(|until| now < until);
        self.lossy |= lossy && self.phase == Phase::Idle;
        let hurries = self.lossy && self.hurry_from.is_some_and(|at| at <= now);
        if self.phase == Phase::Idle && (!rests || hurries) {
            self.lossy = false;
            self.phase = Phase::Full(0);
            self.best = None;
            self.next_at = Some(now);
        }
    }

    /// What was found may not be true any more.
    pub(super) fn look_again(&mut self) {
        self.rest_until = None;
    }

    /// When [`Self::take_due`] has something.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.next_at
    }

    /// The lengths of inner packets that are to be asked about now.
    pub(super) fn take_due(&mut self, srtt: Option<Duration>, now: Instant) -> Vec<u16> {
        if self.next_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.next_at = Some(now + srtt.map_or(FIRST_PATIENCE, |srtt| PATIENCE.max(srtt * 2)));
        match self.phase {
            Phase::Idle => self.next_at = None,
            Phase::Full(tries) if tries < FULL_TRIES => {
                self.phase = Phase::Full(tries + 1);
                return vec![BASE_MTU];
            }
            Phase::Full(_) => {
                self.phase = Phase::All(1);
                return sizes();
            }
            Phase::All(tries) if tries < ALL_TRIES => {
                self.phase = Phase::All(tries + 1);
                return sizes().into_iter().filter(|size| self.best < Some(*size)).collect();
            }
            Phase::All(_) => {
                // A peer that answers nothing at all says nothing about lengths.
                let wait = if self.best.is_some() { AGAIN } else { SOON };
                self.finish(wait, now);
            }
        }
        Vec::new()
    }

    /// A question left as ping `tx`.
    pub(super) fn asked(&mut self, tx: TxId, inner: u16) {
        self.open.insert(tx, inner);
    }

    /// A pong arrived.
    pub(super) fn handle_pong(&mut self, tx: TxId, now: Instant) {
        let Some(inner) = self.open.remove(&tx) else { return };
        self.best = self.best.max(Some(inner));
        if inner == BASE_MTU {
            self.finish(AGAIN, now);
        }
    }

    fn finish(&mut self, rest: Duration, now: Instant) {
        self.found = self.best.or(self.found);
        self.phase = Phase::Idle;
        self.next_at = None;
        self.rest_until = Some(now + rest);
        self.hurry_from = Some(now + SOON);
        self.open.clear();
    }

    /// The longest inner packet that gets through, as far as is known.
    pub(super) fn mtu(&self) -> u16 {
        let searching = matches!(self.phase, Phase::All(_));
        // What was found before holds until the whole search says otherwise.
        self.found.max(self.best.filter(|_| searching)).unwrap_or(BASE_MTU)
    }
}

/// The inner MTUs worth a question, the largest first, as the first answer counts at once: the narrow
/// link may be in either family.
fn sizes() -> Vec<u16> {
    let header = u16::try_from(DATA_HEADER_LEN).unwrap_or(u16::MAX);
    let of_link = move |link: u16| [OVERHEAD_V4, OVERHEAD_V6].map(|it| link - it - header);
    let narrow = LINKS.into_iter().flat_map(of_link).filter(|inner| *inner < BASE_MTU);
    let mut sizes: Vec<u16> = narrow.chain([BASE_MTU]).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    /// Plays a search on a way that carries inner packets of up to `carries`; every `drop_nth` answer
    /// is lost. Returns the questions and the time.
    fn play(
        search: &mut RelayMtu,
        carries: u16,
        drop_nth: usize,
        start: Instant,
    ) -> (usize, Duration) {
        let (mut now, mut asked, mut pending) = (start, 0usize, Vec::new());
        while search.phase != Phase::Idle {
            now = search.next_at().unwrap();
            for (tx, at) in std::mem::take(&mut pending) {
                search.handle_pong(tx, at);
            }
            for inner in search.take_due(Some(Duration::from_millis(40)), now) {
                asked += 1;
                let tx = TxId(std::array::from_fn(|i| asked.to_le_bytes()[i % 8]));
                search.asked(tx, inner);
                if inner <= carries && (drop_nth == 0 || !asked.is_multiple_of(drop_nth)) {
                    pending.push((tx, now));
                }
            }
        }
        (asked, now - start)
    }

    #[test]
    fn a_way_that_carries_full_packets_is_asked_once_in_ten_minutes() {
        let mut search = RelayMtu::default();
        search.want(false, epoch());
        let (asked, _) = play(&mut search, 1_400, 0, epoch());
        assert_eq!((search.mtu(), asked), (BASE_MTU, 1));
        search.want(false, epoch() + AGAIN / 2);
        assert_eq!(search.next_at(), None, "it is known");
        search.want(false, epoch() + AGAIN * 2);
        assert!(search.next_at().is_some(), "another look");
    }

    #[test]
    fn a_narrow_link_on_the_way_is_found_and_so_is_its_end() {
        for (link, overhead) in [(1_124, 68), (1_280, 68), (1_340, 68), (1_280, 88), (640, 88)] {
            let mut search = RelayMtu::default();
            search.want(false, epoch());
            let carries = link - overhead;
            let (asked, took) = play(&mut search, carries, 0, epoch());
            assert_eq!(search.mtu(), carries, "{link}");
            assert!(asked < 50 && took < Duration::from_secs(1), "{asked}, {took:?}");
            let later = epoch() + AGAIN * 2;
            search.want(false, later);
            play(&mut search, 1_400, 0, later);
            assert_eq!(search.mtu(), BASE_MTU);
        }
    }

    #[test]
    fn lost_answers_make_it_no_larger_and_silence_says_nothing() {
        for drop_nth in [2, 3, 5] {
            let mut search = RelayMtu::default();
            search.want(false, epoch());
            play(&mut search, 1_056, drop_nth, epoch());
            assert!((900..=1_056).contains(&search.mtu()), "{drop_nth}: {}", search.mtu());
        }
        let mut search = RelayMtu::default();
        search.want(false, epoch());
        play(&mut search, 0, 0, epoch());
        assert_eq!(search.mtu(), BASE_MTU, "the peer is away");
    }

    #[test]
    fn long_packets_that_do_not_arrive_are_reason_to_look_again_but_not_all_the_time() {
        let mut search = RelayMtu::default();
        search.want(true, epoch());
        play(&mut search, 1_400, 0, epoch());
        search.want(true, epoch() + SOON / 2);
        assert_eq!(search.next_at(), None);
        let later = epoch() + SOON + FIRST_PATIENCE;
        search.want(true, later);
        play(&mut search, 1_056, 0, later);
        assert_eq!(search.mtu(), 1_056);
        let later = later + AGAIN * 2;
        search.want(false, later);
        let (_, took) = play(&mut search, 0, 0, later);
        search.want(true, later + took);
        assert_eq!(search.next_at(), None, "nobody answers, and packets are lost");
    }

    #[test]
    fn packets_that_were_lost_while_a_search_was_not_allowed_are_not_forgotten() {
        let mut search = RelayMtu::default();
        search.want(false, epoch());
        play(&mut search, 1_400, 0, epoch());
        search.want(true, epoch() + SOON / 2);
        // A transport sends again after a while, and that is all that it sends.
        let later = epoch() + SOON + FIRST_PATIENCE;
        search.want(false, later);
        play(&mut search, 1_056, 0, later);
        assert_eq!(search.mtu(), 1_056);
        search.want(false, later + SOON * 2);
        assert_eq!(search.next_at(), None, "and count once");
    }

    #[test]
    fn another_look_at_a_narrow_way_takes_nothing_from_what_is_known() {
        let (mut search, mut now) = (RelayMtu::default(), epoch());
        search.want(false, now);
        play(&mut search, 1_056, 0, now);
        now += AGAIN * 2;
        search.want(false, now);
        while search.phase != Phase::Idle {
            now = search.next_at().unwrap();
            for (number, inner) in search.take_due(None, now).into_iter().enumerate() {
                let tx = TxId([number as u8; 12]);
                search.asked(tx, inner);
                if inner <= 1_056 {
                    search.handle_pong(tx, now);
                }
                assert_eq!(search.mtu(), 1_056);
            }
        }
    }
}
