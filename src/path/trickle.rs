//! How much goes to an address for which only the peer vouches.
//!
//! A peer may lie about where it is, and a datagram about where it comes from: probes and their
//! answers go to whoever has that address. So an address that has proved nothing gets a first
//! handful, for all its ports together, and then a trickle.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::types::source_of;

/// At once: more than all candidates and guesses of a hard NAT's first rounds.
const BURST: u32 = 240;
/// One more after each of these.
const INTERVAL: Duration = Duration::from_millis(160);
/// Addresses that are kept account of. A peer has a few; one that claims more waits.
const MAX_SOURCES: usize = 64;

/// The account of one peer.
#[derive(Debug, Default)]
pub(super) struct Trickle {
    /// When all that was sent there would have been at the steady pace.
    paid_until: BTreeMap<IpAddr, Instant>,
}

impl Trickle {
    /// Whether one more small datagram may go to this address, which has proved nothing.
    pub(super) fn take(&mut self, to: IpAddr, now: Instant) -> bool {
        let source = source_of(to);
        if !self.paid_until.contains_key(&source) && self.paid_until.len() >= MAX_SOURCES {
            self.paid_until.retain(|_, at| *at > now);
            if self.paid_until.len() >= MAX_SOURCES {
                return false;
            }
        }
        let paid_until = self.paid_until.entry(source).or_insert(now);
        let at = (*paid_until).max(now);
        if at > now + INTERVAL * (BURST - 1) {
            return false;
        }
        *paid_until = at + INTERVAL;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    #[test]
    fn an_address_gets_a_handful_and_then_a_trickle_whatever_its_ports() {
        let mut trickle = Trickle::default();
        let now = epoch();
        let count = |trickle: &mut Trickle, ip: &str, now| {
            let ip = ip.parse().unwrap();
            (0..1_000).filter(|_| trickle.take(ip, now)).count() as u32
        };
        assert_eq!(count(&mut trickle, "192.0.2.1", now), BURST);
        assert_eq!(count(&mut trickle, "192.0.2.2", now), BURST, "another address");
        assert_eq!(count(&mut trickle, "192.0.2.1", now + INTERVAL * 3), 3);
        assert_eq!(count(&mut trickle, "2001:db8::1", now), BURST);
        assert_eq!(count(&mut trickle, "2001:db8::2", now), 0, "one home has one /64");
    }

    #[test]
    fn who_claims_to_be_everywhere_is_nowhere() {
        let mut trickle = Trickle::default();
        let now = epoch();
        let sent = (0..=255u8).filter(|n| trickle.take([192, 0, 2, *n].into(), now)).count();
        assert_eq!(sent, MAX_SOURCES);
        assert!(trickle.take([198, 51, 100, 1].into(), now + INTERVAL), "later there is room");
    }
}
