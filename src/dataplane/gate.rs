//! What of strangers gets a place in the control plane's queue: a first look at handshakes, disco
//! and relay control, before anything costly.
//!
//! A handshake costs the control plane a third of a millisecond of Diffie-Hellman, and anybody who
//! has seen one can send it again from any address. So its first MAC is checked here; a few a second
//! pass as they are; when there are more, a sender has to show with a cookie (WireGuard's second MAC)
//! that it receives at its address, and then has a limit of its own. The engine's limiter is one
//! counter for all: with it alone a flood would lock everybody out.
//!
//! Everything here is a look-up in tables of fixed size: no lock, no allocation, nothing to evict.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use super::session::{EngineKeys, HandshakeMacs, SecondMac};
use crate::types::{DropReason, NodeId, source_of};

/// Initiations without a cookie, of all senders together: a few hundredths of a processor.
const UNPROVED: Rate = Rate { per_second: 200, burst: 200 };
/// Initiations with a cookie, of all senders together.
const PROVED: Rate = Rate { per_second: 500, burst: 500 };
/// Handshake messages of one sender: an address that a cookie has proved, a member by the relay, or a
/// session of ours that is answered.
const ONE_SENDER: Rate = Rate { per_second: 20, burst: 20 };
/// Disco of one peer: birthday probing is the most that an honest one sends.
const DISCO: Rate = Rate { per_second: 500, burst: 500 };
/// Answers of the server about our address and our sign-on.
const RELAY_CONTROL: Rate = Rate { per_second: 500, burst: 500 };
/// Senders that share a place share a limit; who shares with whom, nobody outside can know.
const PLACES: usize = 4096;
/// Bytes of a cookie reply.
pub(super) const COOKIE_LEN: usize = 64;

/// Who a message says it is from, as far as that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    /// Nobody has proved this address.
    Address(IpAddr),
    /// The relay has named this member.
    Member(NodeId),
}

/// What becomes of a handshake initiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    In,
    Out(DropReason),
    /// Nothing but this answer, which is shorter than the question: come again with that cookie.
    Ask([u8; COOKIE_LEN]),
}

/// The first look; see the module.
pub(super) struct Gate {
    macs: HandshakeMacs,
    /// Chooses the places.
    seed: u64,
    unproved: Bucket,
    proved: Bucket,
    relay_control: Bucket,
    senders: Box<[Bucket]>,
    disco: Box<[Bucket]>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    pub(super) fn new(keys: &EngineKeys) -> Self {
        let places = || (0..PLACES).map(|_| Bucket::default()).collect();
        Self {
            macs: HandshakeMacs::new(keys),
            seed: keys.place_seed(),
            unproved: Bucket::default(),
            proved: Bucket::default(),
            relay_control: Bucket::default(),
            senders: places(),
            disco: places(),
        }
    }

    /// Looks at a handshake initiation; `now_us` is the time in microseconds since any moment.
    pub(super) fn initiation(&self, sender: Sender, datagram: &[u8], now_us: u64) -> Entry {
        if !self.macs.first_is_ours(datagram) {
            return Entry::Out(DropReason::BadHandshake);
        }
        let ip = match sender {
            Sender::Member(id) => {
                let within = self.senders[self.place(id)].take(ONE_SENDER, now_us);
                return if within { Entry::In } else { Entry::Out(DropReason::RateLimited) };
            }
            Sender::Address(ip) => ip,
        };
        if self.unproved.take(UNPROVED, now_us) {
            return Entry::In;
        }
        match self.macs.second(ip, datagram) {
            SecondMac::Missing(reply) => Entry::Ask(reply),
            SecondMac::Good => {
                let place = self.place(source_of(ip));
                let within = self.senders[place].take(ONE_SENDER, now_us)
                    && self.proved.take(PROVED, now_us);
                if within { Entry::In } else { Entry::Out(DropReason::RateLimited) }
            }
            SecondMac::Bad => Entry::Out(DropReason::BadHandshake),
        }
    }

    /// Whether an answer to a handshake of ours may pass, which `receiver` says.
    pub(super) fn may_answer(&self, receiver: u32, datagram: &[u8], now_us: u64) -> bool {
        let is_cookie = datagram.len() == COOKIE_LEN;
        (is_cookie || self.macs.first_is_ours(datagram))
            && self.senders[self.place(receiver)].take(ONE_SENDER, now_us)
    }

    /// Whether one more disco message with the tag of this peer may pass.
    pub(super) fn may_disco(&self, peer: NodeId, now_us: u64) -> bool {
        self.disco[self.place(peer)].take(DISCO, now_us)
    }

    /// Whether one more answer of a relay or reflector may pass.
    pub(super) fn may_relay_control(&self, now_us: u64) -> bool {
        self.relay_control.take(RELAY_CONTROL, now_us)
    }

    fn place(&self, of: impl Hash) -> usize {
        let mut hasher = DefaultHasher::new();
        (self.seed, of).hash(&mut hasher);
        hasher.finish() as usize % PLACES
    }
}

#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: u64,
    burst: u64,
}

/// When all that has passed would have done so at the steady rate, in microseconds (the generic cell
/// rate algorithm). Two threads at the same moment may let one more through, which does no harm.
#[derive(Debug, Default)]
struct Bucket(AtomicU64);

impl Bucket {
    fn take(&self, rate: Rate, now_us: u64) -> bool {
        let interval = 1_000_000 / rate.per_second;
        let paid_until = self.0.load(Ordering::Relaxed).max(now_us);
        if paid_until > now_us + interval * (rate.burst - 1) {
            return false;
        }
        self.0.store(paid_until + interval, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::{MIN_SEAL_BUFFER, Session, SessionSettings};
    use crate::testing::epoch;
    use crate::types::SecretKey;

    struct Two {
        gate: Gate,
        caller: Session,
    }

    fn two() -> Two {
        let (own, other) = (SecretKey::from_bytes([1; 32]), SecretKey::from_bytes([2; 32]));
        let gate = Gate::new(&EngineKeys::new(&own));
        let engine = EngineKeys::new(&other);
        let caller = Session::new(&engine, &own.public(), 7, SessionSettings::default());
        Two { gate, caller }
    }

    impl Two {
        fn call(&mut self) -> Vec<u8> {
            let mut out = [0; MIN_SEAL_BUFFER];
            self.caller.hurry(epoch());
            let len = self.caller.initiate(&mut out, epoch()).expect("an initiation");
            out[..len].to_vec()
        }
    }

    fn address(ip: &str) -> Sender {
        Sender::Address(ip.parse().unwrap())
    }

    #[test]
    fn a_handshake_for_another_key_never_passes() {
        let mut two = two();
        let mut call = two.call();
        assert_eq!(two.gate.initiation(address("192.0.2.1"), &call, 0), Entry::In);
        call[40] ^= 1;
        let out = Entry::Out(DropReason::BadHandshake);
        assert_eq!(two.gate.initiation(address("192.0.2.1"), &call, 0), out);
    }

    #[test]
    fn in_a_flood_who_has_a_cookie_passes_and_nobody_else() {
        let mut two = two();
        let call = two.call();
        let spoofed = |n: u64| address(&format!("198.18.{}.{}", n / 250, n % 250));
        let passed = (0..50_000)
            .filter(|n| two.gate.initiation(spoofed(*n), &call, *n) == Entry::In)
            .count();
        assert!(passed < 220, "{passed} of 50,000 in 50 ms");

        let home: IpAddr = "192.0.2.1".parse().unwrap();
        let now_us = 49_999;
        let call = two.call();
        let Entry::Ask(reply) = two.gate.initiation(Sender::Address(home), &call, now_us) else {
            panic!("a cookie is asked for");
        };
        let took = two.caller.handle_handshake(&reply, home, &mut [0; MIN_SEAL_BUFFER], epoch());
        assert!(took.is_ok(), "{took:?}");
        let call = two.call();
        assert_eq!(two.gate.initiation(Sender::Address(home), &call, now_us), Entry::In);
        let elsewhere = two.gate.initiation(address("192.0.2.2"), &call, now_us);
        assert!(matches!(elsewhere, Entry::Ask(_)), "a cookie is for one address: {elsewhere:?}");
        // And its own limit.
        let passed = (0..1_000)
            .filter(|_| two.gate.initiation(Sender::Address(home), &call, now_us) == Entry::In)
            .count();
        assert_eq!(passed as u64, ONE_SENDER.burst - 1);
    }

    #[test]
    fn one_member_by_the_relay_does_not_use_up_what_others_have() {
        let mut two = two();
        let call = two.call();
        let [loud, quiet] = [1, 2].map(|id| Sender::Member(NodeId::new(id).unwrap()));
        let count = |sender| {
            (0..1_000).filter(|_| two.gate.initiation(sender, &call, 0) == Entry::In).count() as u64
        };
        assert_eq!(count(loud), ONE_SENDER.burst);
        assert_eq!(count(quiet), ONE_SENDER.burst);
    }

    #[test]
    fn a_bucket_refills() {
        let bucket = Bucket::default();
        let rate = Rate { per_second: 10, burst: 5 };
        let take = |now_us| (0..100).filter(|_| bucket.take(rate, now_us)).count();
        assert_eq!((take(0), take(100_000), take(10_000_000)), (5, 1, 5));
    }
}
