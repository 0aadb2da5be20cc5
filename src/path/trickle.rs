//! How much goes to an address for which only the peer vouches.
//!
//! A peer may lie about where it is, and a datagram about where it comes from: probes and their
//! answers go to whoever has that address. So an address that has proved nothing gets a first
//! handful, for all its ports together, and then a trickle. Copies of data that go there before its
//! answer (see `agent::early`) are on the same account.
//!
//! Several peers may lie together, or the server for all of them: so what goes to a public address
//! is on an account of the whole node as well, until any peer has answered from there. Peers behind
//! one NAT then have an account each. Private addresses are many homes' own, and stay with the peers.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::types::{Account, Rate, SharedAccount, source_of};

/// Bytes at once: 240 pings, more than all candidates and guesses of a hard NAT's first rounds.
const BURST: u32 = 22_400;
/// And then 600 in a second. With the burst that is less than 1,000 bytes a second in any minute.
const TRICKLE: Rate = Rate::new(BURST, INTERVAL);
const INTERVAL: Duration = Duration::from_nanos(1_666_667);
/// Bytes of the headers of UDP with IPv4,
const V4_HEADERS: u32 = 28;
/// and with IPv6.
const V6_HEADERS: u32 = 48;
/// Addresses that are kept account of. A peer has a few; one that claims more waits.
const MAX_SOURCES: usize = 64;

/// Places in the account of a node. Addresses that share one share what may go there.
const PLACES: usize = 4096;
/// An address from which a peer answered so many seconds ago is no stranger's.
const ANSWER_LIFETIME_S: u64 = 120;

/// The account of one peer.
#[derive(Debug, Default)]
pub(super) struct Trickle {
    /// Bytes that were sent to each source.
    sent: BTreeMap<IpAddr, Account>,
}

impl Trickle {
    /// Whether one more datagram of `len` bytes may go to this address, which has proved nothing.
    #[cfg(test)]
    fn take(&mut self, len: usize, to: IpAddr, now: Instant) -> bool {
        with_headers(len, to).is_some_and(|bytes| self.take_bytes(bytes, to, now))
    }

    /// Whether so many bytes, headers and all, may go there now; takes nothing.
    pub(super) fn has_bytes(&self, bytes: u32, to: IpAddr, now: Instant) -> bool {
        let sent = self.sent.get(&source_of(to)).copied().unwrap_or_default();
        sent.has(TRICKLE, bytes, now)
    }

    /// Takes so many bytes, headers and all: all of them, or none.
    pub(super) fn take_bytes(&mut self, bytes: u32, to: IpAddr, now: Instant) -> bool {
        let source = source_of(to);
        if !self.sent.contains_key(&source) && self.sent.len() >= MAX_SOURCES {
            self.sent.retain(|_, sent| !sent.is_settled(now));
            if self.sent.len() >= MAX_SOURCES {
                return false;
            }
        }
        self.sent.entry(source).or_default().take(TRICKLE, bytes, now)
    }
}

/// Bytes of a datagram on the wire.
pub(super) fn with_headers(len: usize, to: IpAddr) -> Option<u32> {
    let headers = if source_of(to).is_ipv4() { V4_HEADERS } else { V6_HEADERS };
    u32::try_from(len).ok()?.checked_add(headers)
}

/// The account of all peers of a node together: a table of fixed size, shared by their agents.
#[derive(Debug, Clone)]
pub struct Together(Arc<Table>);

#[derive(Debug)]
struct Table {
    /// Chooses the places: nobody outside can know which addresses share one.
    seed: u64,
    origin: Instant,
    places: Box<[Place]>,
}

#[derive(Debug, Default)]
struct Place {
    /// Bytes that were sent there, in time since the table's origin.
    sent: SharedAccount,
    /// The last address of a peer's answer, as 32 bits of its hash, and 32 bits of seconds and one.
    answered: AtomicU64,
}

impl Together {
    /// An account on which nothing is.
    #[must_use]
    pub fn new(seed: u64, now: Instant) -> Self {
        let places = (0..PLACES).map(|_| Place::default()).collect();
        Self(Arc::new(Table { seed, origin: now, places }))
    }

    fn place(&self, of: IpAddr) -> (&Place, u64) {
        let mut hasher = DefaultHasher::new();
        (self.0.seed, source_of(of)).hash(&mut hasher);
        let hash = hasher.finish();
        (&self.0.places[hash as usize % PLACES], hash >> 32)
    }

    fn passed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.0.origin)
    }

    /// A peer has answered from there.
    pub(super) fn note_answer(&self, from: IpAddr, now: Instant) {
        let (place, tag) = self.place(from);
        let seconds = (self.passed(now).as_secs() + 1) & u64::from(u32::MAX);
        place.answered.store(tag << 32 | seconds, Ordering::Relaxed);
    }

    /// Whether so many more bytes, headers and all, may go to this public address.
    pub(super) fn take_bytes(&self, bytes: u32, to: IpAddr, now: Instant) -> bool {
        let (place, tag) = self.place(to);
        let passed = self.passed(now);
        let answered = place.answered.load(Ordering::Relaxed);
        let (of, at) = (answered >> 32, answered & u64::from(u32::MAX));
        if at != 0 && of == tag && passed.as_secs() + 1 < at + ANSWER_LIFETIME_S {
            return true;
        }
        place.sent.take(TRICKLE, bytes, passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    /// With the headers of IPv4 100 bytes, with those of IPv6 120.
    const LEN: usize = 72;

    #[test]
    fn an_address_gets_a_handful_and_then_a_trickle_whatever_its_ports() {
        let mut trickle = Trickle::default();
        let now = epoch();
        let count = |trickle: &mut Trickle, ip: &str, now| {
            let ip = ip.parse().unwrap();
            (0..1_000).filter(|_| trickle.take(LEN, ip, now)).count() as u32
        };
        assert_eq!(count(&mut trickle, "192.0.2.1", now), BURST / 100);
        assert_eq!(count(&mut trickle, "192.0.2.2", now), BURST / 100, "another address");
        assert_eq!(count(&mut trickle, "192.0.2.1", now + INTERVAL * 399), 3);
        assert_eq!(count(&mut trickle, "2001:db8::1", now), BURST / 120);
        assert_eq!(count(&mut trickle, "2001:db8::2", now), 0, "one home has one /64");
        assert_eq!(count(&mut trickle, "::ffff:192.0.2.2", now), 0, "the same address");
    }

    #[test]
    fn copies_are_paid_for_like_the_datagrams_that_could_go_instead() {
        let mut trickle = Trickle::default();
        let now = epoch();
        let ip = "192.0.2.1".parse().unwrap();
        assert!(!trickle.take_bytes(BURST + 1, ip, now), "more than there ever is");
        assert!(trickle.take_bytes(BURST - 250, ip, now));
        assert!(!trickle.take_bytes(251, ip, now), "all or nothing");
        assert!(trickle.take(LEN, ip, now) && trickle.take(LEN, ip, now));
        assert!(!trickle.take(LEN, ip, now));
        assert!(!trickle.take_bytes(1_000, ip, now + INTERVAL * 949));
        assert!(trickle.take_bytes(1_000, ip, now + INTERVAL * 950));
    }

    #[test]
    fn no_minute_sees_more_than_a_thousand_bytes_a_second() {
        for datagram in [65, 95, 148, 1_400] {
            let mut trickle = Trickle::default();
            let ip = "192.0.2.1".parse().unwrap();
            let tries = (0..60_000).map(|ms| epoch() + Duration::from_millis(ms));
            let taken = tries.filter(|now| trickle.take(datagram, ip, *now)).count();
            let rate = taken * (datagram + 28) / 60;
            assert!((900..=1_000).contains(&rate), "{rate} bytes a second of {datagram} each");
        }
    }

    #[test]
    fn who_claims_to_be_everywhere_is_nowhere() {
        let mut trickle = Trickle::default();
        let now = epoch();
        let take = |trickle: &mut Trickle, n: u8| trickle.take(LEN, [192, 0, 2, n].into(), now);
        let sent = (0..=255u8).filter(|n| take(&mut trickle, *n)).count();
        assert_eq!(sent, MAX_SOURCES);
        let later = now + INTERVAL * 100;
        assert!(trickle.take(LEN, [198, 51, 100, 1].into(), later), "later there is room");
    }

    #[test]
    fn a_node_has_one_account_for_an_address_until_somebody_answers_there() {
        let now = epoch();
        let together = Together::new(7, now);
        let count = |ip: &str, now| {
            let ip = ip.parse().unwrap();
            (0..1_000).filter(|_| together.take_bytes(100, ip, now)).count() as u32
        };
        assert_eq!(count("192.0.2.1", now), BURST / 100);
        assert_eq!(count("192.0.2.1", now), 0);
        assert_eq!(count("192.0.2.1", now + INTERVAL * 399), 3);
        assert_eq!(count("2001:db8::1", now), BURST / 100);
        assert_eq!(count("2001:db8::2", now), 0, "one home has one /64");
        together.note_answer("192.0.2.1".parse().unwrap(), now);
        assert_eq!(count("192.0.2.1", now), 1_000);
        let later = now + Duration::from_secs(ANSWER_LIFETIME_S);
        assert_eq!(count("192.0.2.1", later), BURST / 100, "it has fallen silent");
    }

    #[test]
    fn an_answer_from_one_address_opens_no_other() {
        let now = epoch();
        let together = Together::new(7, now);
        let address = |n: u32| IpAddr::from((0x0100_0000 + n).to_be_bytes());
        (0..10_000).for_each(|n| together.note_answer(address(n), now));
        for n in 10_000..20_000 {
            assert!(!together.take_bytes(BURST + 1, address(n), now), "{n}");
        }
    }
}
