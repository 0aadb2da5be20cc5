//! What goes to an endpoint of the peer before our own ping there is answered.
//!
//! The peer's ping has come by the path and ours has left: both NATs are open, and data could go
//! straight half a round trip before the proof is here. So a few copies of it do, while all of it
//! goes by the relay: one that is lost costs nothing. What a liar could make of that is little:
//!
//! - the endpoint is one that the peer has announced, and that we have pinged ourselves; a replayed
//!   ping from anywhere else starts nothing
//! - [`EARLY_BYTES`] at the most, within [`EARLY_FOR`], and once in [`SPACING`] for each peer
//! - all of them are paid for beforehand, from what probes may send to that address: with copies or
//!   without, an address that proves nothing hears no more
//!
//! Handshakes go beside pings for the same gain, and on the same account.

use std::time::{Duration, Instant};

use super::proof::Trust;
use super::{PING_SPACING, PathAgent};
use crate::path::{Place, Via};
use crate::types::CandidateKind;

/// Bytes that may go to an endpoint which has not answered, with the headers of [`UNDERLAY_BYTES`]:
/// the first packets of a flow, and a good third of what an address gets at once.
pub const EARLY_BYTES: u32 = 8 * 1024;
/// The headers of IPv6 and UDP, the longest that a datagram has on the way.
pub const UNDERLAY_BYTES: u32 = 48;
/// The answer comes within one direct round trip, or copies are of no use.
const EARLY_FOR: Duration = Duration::from_millis(600);
/// No other endpoint of the peer gets copies before this.
const SPACING: Duration = Duration::from_secs(5);
/// A handshake goes beside so many pings at the most.
const HANDSHAKE_COPIES: usize = 4;
/// The longest message of a handshake.
const HANDSHAKE_LEN: usize = 148;

/// An endpoint that gets copies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Early {
    pub(super) place: Place,
    since: Instant,
}

impl Early {
    pub(super) fn ends_at(&self) -> Instant {
        self.since + EARLY_FOR
    }
}

impl PathAgent {
    /// The peer's ping came by this path, and ours has left there.
    pub(super) fn begin_early(&mut self, place: Place, now: Instant) {
        let spaced = self.early_at.is_none_or(|at| now.saturating_duration_since(at) >= SPACING);
        let relayed = self.primary.is_some_and(Via::is_relay) && self.trial.is_none();
        let announced = self.endpoints.get(&place).is_some_and(|endpoint| {
            endpoint.kind != CandidateKind::PeerReflexive
                && endpoint.trust == Trust::New
                && !endpoint.is_penalised(now)
                && !endpoint.proved(now)
                && endpoint.prober.sent_pings() > 0
        });
        let fit = self.wanted && spaced && relayed && announced;
        if fit && self.may_spend(EARLY_BYTES, place.remote.ip(), now) {
            self.early = Some(Early { place, since: now });
            self.early_at = Some(now);
        }
    }

    /// Ends the copies when their time is over, or there is a better reason to send there.
    pub(super) fn end_early(&mut self, now: Instant) {
        let over = |early: &mut Early| {
            early.ends_at() <= now || !self.endpoints.contains_key(&early.place)
        };
        self.early.take_if(over);
        if self.is_direct() || self.trial.is_some() {
            self.early = None;
        }
    }

    /// Where a handshake goes as well: to endpoints that were pinged in this moment and have not
    /// answered yet.
    pub fn beside_pings(&mut self, now: Instant) -> Vec<Via> {
        if self.is_direct() {
            return Vec::new();
        }
        let just = |at: Instant| now.saturating_duration_since(at) < PING_SPACING;
        let mut ways: Vec<Via> = self
            .endpoints
            .iter()
            .filter(|(_, endpoint)| endpoint.prober.last_sent().is_some_and(just))
            .filter(|(_, endpoint)| endpoint.kind != CandidateKind::Predicted)
            .map(|(place, endpoint)| endpoint.via(*place))
            .take(HANDSHAKE_COPIES)
            .collect();
        ways.retain(|via| self.may_send(*via, HANDSHAKE_LEN, now));
        ways
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::Choice;
    use crate::testing::epoch;
    use crate::types::{Candidate, TxId};

    const TX: TxId = TxId([0; 12]);

    /// An agent on the relay that has pinged what its peer announces.
    fn agent(announced: &[&str], now: Instant) -> PathAgent {
        let candidates: Vec<Candidate> = announced
            .iter()
            .map(|text| Candidate::new(text.parse().unwrap(), CandidateKind::Reflexive))
            .collect();
        let mut agent = PathAgent::new([1; 32], now);
        agent.set_relay(Some(Via::RelayUdp), now);
        agent.set_candidates(&candidates, now);
        agent.set_wanted(true, now);
        agent
    }

    fn path(text: &str) -> Via {
        Via::direct(text.parse().unwrap())
    }

    #[test]
    fn the_ping_of_an_announced_endpoint_starts_copies_for_a_moment() {
        let now = epoch();
        let via = path("203.0.113.10:4000");
        let mut agent = agent(&["203.0.113.10:4000"], now);
        assert_eq!(agent.choice().duplicate, None);
        agent.handle_ping(TX, via, now);
        let early = Choice { primary: Some(Via::RelayUdp), duplicate: Some(via), early: true };
        assert_eq!(agent.choice(), early);
        assert!(agent.poll_timeout().is_some_and(|(at, _)| at <= now + EARLY_FOR));
        agent.handle_timeout(now + EARLY_FOR);
        assert_eq!(agent.choice().duplicate, None, "no answer came");
    }

    #[test]
    fn nobody_makes_us_send_data_anywhere_else_or_again_and_again() {
        let now = epoch();
        let (one, other) = ("203.0.113.10:4000", "203.0.113.11:4000");
        let mut agent = agent(&[one, other], now);
        for _ in 0..3 {
            // Recorded, and sent again from the address of a victim.
            agent.handle_ping(TX, path("198.51.100.9:53"), now);
            assert_eq!(agent.choice().duplicate, None, "not announced by the peer");
        }
        agent.handle_ping(TX, path(one), now);
        agent.handle_ping(TX, path(other), now);
        assert_eq!(agent.choice().duplicate, Some(path(one)), "one at a time");
        let mut started = 0;
        let mut before = true;
        for ms in (0..20_000).step_by(1_000) {
            let now = now + Duration::from_millis(ms);
            agent.handle_timeout(now);
            agent.handle_ping(TX, path(other), now);
            let early = agent.choice().early;
            started += usize::from(early && !before);
            before = early;
        }
        assert_eq!(started, 3, "once in five seconds");
    }

    #[test]
    fn copies_are_paid_for_and_end_when_nothing_is_left_for_them() {
        let now = epoch();
        let victim = "203.0.113.10:4000";
        let mut agent = agent(&[victim], now);
        let mut started = Vec::new();
        for second in 0..120 {
            let now = now + Duration::from_secs(second);
            agent.handle_timeout(now);
            agent.handle_ping(TX, path(victim), now);
            if agent.choice().early {
                started.push(second);
            }
        }
        // A ping and a pong go there in each second, 216 of the 600 bytes that are to be had.
        assert_eq!(started[..3], [0, 5, 10], "what there is at once");
        let pauses: Vec<u64> = started[2..].windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.len() >= 4, "an address may be the right one after all: {started:?}");
        assert!(pauses.iter().all(|pause| *pause >= 18), "what comes in: {started:?}");
    }

    #[test]
    fn an_address_without_anything_left_gets_no_handshake_beside_its_ping() {
        let now = epoch();
        let mut agent = agent(&["203.0.113.10:4000"], now);
        agent.handle_ping(TX, path("203.0.113.10:4000"), now);
        let copies = (0..500).filter(|_| !agent.beside_pings(now).is_empty()).count();
        assert!((50..128).contains(&copies), "{copies} of 176 bytes");
    }

    #[test]
    fn handshakes_go_beside_pings_of_this_moment_only() {
        let now = epoch();
        let announced = ["203.0.113.10:4000", "203.0.113.11:4000", "203.0.113.12:4000"];
        let mut agent = agent(&announced, now);
        assert!(agent.beside_pings(now).is_empty(), "only openers have left");
        agent.handle_ping(TX, path(announced[1]), now);
        assert_eq!(agent.beside_pings(now), [path(announced[1])]);
        assert!(agent.beside_pings(now + PING_SPACING).is_empty());
    }
}
