//! Is the first message of a connection a new one, or a recording of an old one?
//!
//! The first Noise message may hold the hello, and acting on it at once saves a round trip. Anybody on
//! the way could say it again later, so it counts only with a token that the reflector gave out to
//! the same address in the last seconds, and once. A token is the time and a MAC over time and
//! address, under a key of this run of the server: nothing is kept for it, and none of an
//! earlier run is good. What is kept is when each machine key was last let in, for as long as a token
//! lives. A message counts only with a younger token than that, so neither what was heard before
//! counts again, nor what was held back on its way while its sender connected without it.
//! (RFC 8446 section 8 does the same for TLS.)

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use blake2::digest::consts::U10;
use blake2::digest::{KeyInit, Mac};

use crate::types::{PublicKey, source_of};
use crate::wire::relay::{TOKEN_LEN, Token};

/// So long after its question a token is good. The connection is made meanwhile.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(10);
/// Machine keys that are remembered; of more, none gets in by its first message alone.
const REMEMBERED: usize = 16_384;
/// Of a token: milliseconds of this run, which a MAC follows.
const TIME_LEN: usize = 6;

/// Makes tokens and knows its own.
#[derive(Clone, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct Tokens {
    key: [u8; 32],
    #[zeroize(skip)]
    start: Instant,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens(***)")
    }
}

impl Tokens {
    /// `key` must be a random one in each run of a server.
    #[must_use]
    pub fn new(key: [u8; 32], start: Instant) -> Self {
        Self { key, start }
    }

    /// A token for who asks from `source`.
    #[must_use]
    pub fn issue(&self, source: IpAddr, now: Instant) -> Token {
        let millis = now.saturating_duration_since(self.start).as_millis();
        let [.., a, b, c, d, e, f] = millis.to_be_bytes();
        let time = [a, b, c, d, e, f];
        let mut token = [0; TOKEN_LEN];
        token[..TIME_LEN].copy_from_slice(&time);
        token[TIME_LEN..].copy_from_slice(&self.mac(time, source).finalize().into_bytes());
        Token(token)
    }

    /// When a token was given out, if that was to `source` and a moment ago.
    fn issued_at(&self, token: &Token, source: IpAddr, now: Instant) -> Option<Instant> {
        let (time, mac) = token.0.split_first_chunk::<TIME_LEN>()?;
        self.mac(*time, source).verify_slice(mac).ok()?;
        let [a, b, c, d, e, f] = *time;
        let millis = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        let at = self.start.checked_add(Duration::from_millis(millis))?;
        (now.saturating_duration_since(at) < TOKEN_LIFETIME).then_some(at)
    }

    fn mac(&self, time: [u8; TIME_LEN], source: IpAddr) -> blake2::Blake2sMac<U10> {
        let mut mac = <blake2::Blake2sMac<U10> as KeyInit>::new((&self.key).into());
        mac.update(&time);
        match source_of(source) {
            IpAddr::V4(ip) => mac.update(&ip.octets()),
            IpAddr::V6(ip) => mac.update(&ip.octets()),
        }
        mac
    }
}

/// Tells new first messages from old ones.
#[derive(Debug)]
pub struct Freshness {
    tokens: Tokens,
    /// When the holder of a machine key was last let in.
    let_in: HashMap<PublicKey, Instant>,
    /// The same, oldest first; an entry that is not the last of its key counts no more.
    order: VecDeque<(Instant, PublicKey)>,
    /// Until then somebody may have been let in who is not remembered.
    blind_until: Option<Instant>,
}

impl Freshness {
    /// Takes what these tokens vouch for.
    #[must_use]
    pub fn new(tokens: Tokens) -> Self {
        let (let_in, order) = (HashMap::new(), VecDeque::new());
        Self { tokens, let_in, order, blind_until: None }
    }

    /// Whether a first message of the holder of `key`, which came from `source` and has this token in
    /// it, may be acted on. It may once.
    pub fn take(&mut self, key: PublicKey, token: &Token, source: IpAddr, now: Instant) -> bool {
        self.forget(now);
        let Some(issued) = self.tokens.issued_at(token, source, now) else { return false };
        let is_newer = self.let_in.get(&key).is_none_or(|at| *at < issued);
        let fresh = is_newer && self.blind_until.is_none();
        if fresh {
            self.note(key, now);
        }
        fresh && self.blind_until.is_none()
    }

    /// The holder of `key` was let in, by whatever way: what it said before is old.
    pub fn note(&mut self, key: PublicKey, now: Instant) {
        self.forget(now);
        if self.order.len() >= REMEMBERED {
            self.blind_until = Some(now + TOKEN_LIFETIME);
            return;
        }
        self.let_in.insert(key, now);
        self.order.push_back((now, key));
    }

    fn forget(&mut self, now: Instant) {
        let is_old = |at: Instant| now.saturating_duration_since(at) > TOKEN_LIFETIME;
        while let Some((at, key)) = self.order.pop_front_if(|(at, _)| is_old(*at)) {
            if self.let_in.get(&key) == Some(&at) {
                self.let_in.remove(&key);
            }
        }
        self.blind_until = self.blind_until.filter(|until| *until > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    const MS: Duration = Duration::from_millis(1);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn key(number: u32) -> PublicKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        PublicKey(bytes)
    }

    fn tokens() -> Tokens {
        Tokens::new([5; 32], epoch())
    }

    #[test]
    fn a_token_is_good_for_a_while_for_who_asked_and_in_one_run() {
        let (home, asked) = (ip("192.0.2.1"), epoch() + MS * 700);
        let token = tokens().issue(home, asked);
        let take = |source: &str, at| Freshness::new(tokens()).take(key(1), &token, ip(source), at);
        assert!(take("192.0.2.1", asked) && take("192.0.2.1", asked + TOKEN_LIFETIME - MS));
        assert!(take("::ffff:192.0.2.1", asked), "the same on a socket for both families");
        assert!(!take("192.0.2.1", asked + TOKEN_LIFETIME), "too old");
        assert!(!take("192.0.2.2", asked), "from elsewhere");
        let mut restarted = Freshness::new(Tokens::new([6; 32], epoch()));
        assert!(!restarted.take(key(1), &token, home, asked), "of another run");
        for bit in 0..8 * TOKEN_LEN {
            let mut other = token;
            other.0[bit / 8] ^= 1 << (bit % 8);
            assert!(!Freshness::new(tokens()).take(key(1), &other, home, asked), "bit {bit}");
        }
    }

    #[test]
    fn neighbours_in_one_ipv6_network_are_one_source() {
        let token = tokens().issue(ip("2001:db8:1:2::1"), epoch());
        let take =
            |source: &str| Freshness::new(tokens()).take(key(1), &token, ip(source), epoch());
        assert!(take("2001:db8:1:2:ffff::9"), "a temporary address of the same machine");
        assert!(!take("2001:db8:1:3::1"));
    }

    #[test]
    fn what_was_said_once_counts_once_and_others_are_not_in_its_way() {
        let (home, mut fresh) = (ip("192.0.2.1"), Freshness::new(tokens()));
        let token = tokens().issue(home, epoch());
        assert!(fresh.take(key(1), &token, home, epoch() + MS));
        for after in [MS, MS * 5000, TOKEN_LIFETIME - MS, TOKEN_LIFETIME * 3] {
            assert!(!fresh.take(key(1), &token, home, epoch() + after), "{after:?}");
        }
        assert!(fresh.take(key(2), &token, home, epoch() + MS), "two behind one address");
        let newer = tokens().issue(home, epoch() + MS * 2);
        assert!(fresh.take(key(1), &newer, home, epoch() + MS * 3), "it asked again");
    }

    #[test]
    fn what_was_held_back_while_its_sender_came_in_without_it_is_old() {
        let (home, mut fresh) = (ip("192.0.2.1"), Freshness::new(tokens()));
        let held = tokens().issue(home, epoch());
        fresh.note(key(1), epoch() + MS * 400);
        assert!(!fresh.take(key(1), &held, home, epoch() + MS * 900));
    }

    #[test]
    fn a_crowd_costs_bounded_memory_and_only_the_round_trip_that_is_saved() {
        let (home, mut fresh) = (ip("192.0.2.1"), Freshness::new(tokens()));
        let token = tokens().issue(home, epoch());
        let crowd = u32::try_from(REMEMBERED).unwrap();
        assert!((0..crowd).all(|number| fresh.take(key(number), &token, home, epoch() + MS)));
        assert!(!fresh.take(key(crowd), &token, home, epoch() + MS), "nobody can be remembered");
        assert!(!fresh.take(key(3), &token, home, epoch() + MS * 2));
        assert_eq!((fresh.let_in.len(), fresh.order.len()), (REMEMBERED, REMEMBERED));
        // Who came in unremembered has no token left that is good.
        let later = epoch() + TOKEN_LIFETIME + MS * 2;
        assert!(!fresh.take(key(crowd), &token, home, later));
        let newer = tokens().issue(home, later);
        assert!(fresh.take(key(crowd), &newer, home, later + MS));
        assert_eq!((fresh.let_in.len(), fresh.order.len()), (1, 1));
    }
}
