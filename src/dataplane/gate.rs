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
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::session::{EngineKeys, HandshakeMacs, SecondMac};
use crate::types::{DropReason, NodeId, Rate, SharedAccount, source_of};

/// Initiations without a cookie, of all senders together: a few hundredths of a processor.
const UNPROVED: Rate = Rate::per_second(200, 200);
/// Initiations with a cookie, of all senders together.
const PROVED: Rate = Rate::per_second(500, 500);
/// Handshake messages of one sender: an address that a cookie has proved, a member by the relay, or a
/// session of ours that is answered.
const ONE_SENDER: Rate = Rate::per_second(20, 20);
/// Disco of one peer: birthday probing is the most that an honest one sends.
const DISCO: Rate = Rate::per_second(500, 500);
/// Answers of the server about our address and our sign-on.
const RELAY_CONTROL: Rate = Rate::per_second(500, 500);
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
    /// Of each key of ours: two while one is renewed.
    macs: ArcSwap<Vec<HandshakeMacs>>,
    /// Chooses the places.
    seed: u64,
    unproved: SharedAccount,
    proved: SharedAccount,
    relay_control: SharedAccount,
    senders: Box<[SharedAccount]>,
    disco: Box<[SharedAccount]>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    pub(super) fn new(keys: &EngineKeys) -> Self {
        let places = || (0..PLACES).map(|_| SharedAccount::default()).collect();
        Self {
            macs: ArcSwap::from_pointee(vec![HandshakeMacs::new(keys)]),
            seed: keys.place_seed(),
            unproved: SharedAccount::default(),
            proved: SharedAccount::default(),
            relay_control: SharedAccount::default(),
            senders: places(),
            disco: places(),
        }
    }

    /// From here on handshakes for these keys may pass, and for no others.
    pub(super) fn let_in<'k>(&self, keys: impl Iterator<Item = &'k EngineKeys>) {
        self.macs.store(Arc::new(keys.map(HandshakeMacs::new).collect()));
    }

    /// Looks at a handshake initiation; `now` is the time since any moment.
    pub(super) fn initiation(&self, sender: Sender, datagram: &[u8], now: Duration) -> Entry {
        let macs = self.macs.load();
        let Some(macs) = macs.iter().find(|macs| macs.first_is_ours(datagram)) else {
            return Entry::Out(DropReason::BadHandshake);
        };
        let ip = match sender {
            Sender::Member(id) => {
                let within = self.senders[self.place(id)].take(ONE_SENDER, 1, now);
                return if within { Entry::In } else { Entry::Out(DropReason::RateLimited) };
            }
            Sender::Address(ip) => ip,
        };
        if self.unproved.take(UNPROVED, 1, now) {
            return Entry::In;
        }
        match macs.second(ip, datagram) {
            SecondMac::Missing(reply) => Entry::Ask(reply),
            SecondMac::Good => {
                let place = self.place(source_of(ip));
                let within = self.senders[place].take(ONE_SENDER, 1, now)
                    && self.proved.take(PROVED, 1, now);
                if within { Entry::In } else { Entry::Out(DropReason::RateLimited) }
            }
            SecondMac::Bad => Entry::Out(DropReason::BadHandshake),
        }
    }

    /// Whether an answer to a handshake of ours may pass, which `receiver` says.
    pub(super) fn may_answer(&self, receiver: u32, datagram: &[u8], now: Duration) -> bool {
        let is_cookie = datagram.len() == COOKIE_LEN;
        let for_us = || self.macs.load().iter().any(|macs| macs.first_is_ours(datagram));
        (is_cookie || for_us()) && self.senders[self.place(receiver)].take(ONE_SENDER, 1, now)
    }

    /// Whether one more disco message with the tag of this peer may pass.
    pub(super) fn may_disco(&self, peer: NodeId, now: Duration) -> bool {
        self.disco[self.place(peer)].take(DISCO, 1, now)
    }

    /// Whether one more answer of a relay or reflector may pass.
    pub(super) fn may_relay_control(&self, now: Duration) -> bool {
        self.relay_control.take(RELAY_CONTROL, 1, now)
    }

    fn place(&self, of: impl Hash) -> usize {
        let mut hasher = DefaultHasher::new();
        (self.seed, of).hash(&mut hasher);
        hasher.finish() as usize % PLACES
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
        assert_eq!(two.gate.initiation(address("192.0.2.1"), &call, Duration::ZERO), Entry::In);
        call[40] ^= 1;
        let out = Entry::Out(DropReason::BadHandshake);
        assert_eq!(two.gate.initiation(address("192.0.2.1"), &call, Duration::ZERO), out);
    }

    #[test]
    fn while_a_key_is_renewed_handshakes_for_both_pass() {
        let mut two = two();
        let [own, next] = [1, 3].map(|key| EngineKeys::new(&SecretKey::from_bytes([key; 32])));
        let call = two.call();
        let passes =
            |gate: &Gate| gate.initiation(address("192.0.2.1"), &call, Duration::ZERO) == Entry::In;
        two.gate.let_in([&next, &own].into_iter());
        assert!(passes(&two.gate));
        two.gate.let_in(std::iter::once(&next));
        assert!(!passes(&two.gate));
    }

    #[test]
    fn in_a_flood_who_has_a_cookie_passes_and_nobody_else() {
        let mut two = two();
        let call = two.call();
        let spoofed = |n: u64| address(&format!("198.18.{}.{}", n / 250, n % 250));
        let passed = (0..50_000)
            .filter(|n| {
                two.gate.initiation(spoofed(*n), &call, Duration::from_micros(*n)) == Entry::In
            })
            .count();
        assert!(passed < 220, "{passed} of 50,000 in 50 ms");

        let home: IpAddr = "192.0.2.1".parse().unwrap();
        let now = Duration::from_micros(49_999);
        let call = two.call();
        let Entry::Ask(reply) = two.gate.initiation(Sender::Address(home), &call, now) else {
            panic!("a cookie is asked for");
        };
        let took = two.caller.handle_handshake(&reply, home, &mut [0; MIN_SEAL_BUFFER], epoch());
        assert!(took.is_ok(), "{took:?}");
        let call = two.call();
        assert_eq!(two.gate.initiation(Sender::Address(home), &call, now), Entry::In);
        let elsewhere = two.gate.initiation(address("192.0.2.2"), &call, now);
        assert!(matches!(elsewhere, Entry::Ask(_)), "a cookie is for one address: {elsewhere:?}");
        // And its own limit.
        let passed = (0..1_000)
            .filter(|_| two.gate.initiation(Sender::Address(home), &call, now) == Entry::In)
            .count();
        assert_eq!(passed as u64, u64::from(ONE_SENDER.burst()) - 1);
    }

    #[test]
    fn one_member_by_the_relay_does_not_use_up_what_others_have() {
        let mut two = two();
        let call = two.call();
        let [loud, quiet] = [1, 2].map(|id| Sender::Member(NodeId::new(id).unwrap()));
        let count = |sender| {
            (0..1_000)
                .filter(|_| two.gate.initiation(sender, &call, Duration::ZERO) == Entry::In)
                .count() as u64
        };
        assert_eq!(count(loud), u64::from(ONE_SENDER.burst()));
        assert_eq!(count(quiet), u64::from(ONE_SENDER.burst()));
    }
}
