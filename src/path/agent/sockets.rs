//! Paths by extra sockets: which of them are still of use, and what ends with one.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::opener::Cause;
use super::{Endpoint, PROOF_LIFETIME, PathAgent};
use crate::path::{Place, ProbeOutcome};
use crate::types::{CandidateKind, SocketId, is_of_one_site};

/// A path that was heard this long ago, and is not proved yet, is waited for.
const PROVING: Duration = Duration::from_secs(6);
/// The peer, which takes a fresh port as well, has opened its NAT for ours by then, however much else its
/// machine does: seconds have passed already, and a ping that comes too early spoils these ports, too.
const FRESH_HOLD: Duration = Duration::from_millis(400);

impl PathAgent {
    /// Whether an extra socket has to stay open: a path by it works, or is about to be proved.
    #[must_use]
    pub fn needs_socket(&self, socket: SocketId, now: Instant) -> bool {
        self.endpoints.iter().any(|(place, endpoint)| {
            let heard = |at: Instant| now.saturating_duration_since(at) < PROVING;
            place.socket == socket && (endpoint.proved(now) || endpoint.heard.is_some_and(heard))
        })
    }

    /// Since when a wanted peer is tried in vain, with nothing but the relay to carry its data.
    /// Where something answers the NATs are open, and it takes no costly way to open them.
    #[must_use]
    pub fn stuck_since(&self) -> Option<Instant> {
        let since = self
            .stuck_since
            .filter(|_| self.wanted && self.relay.is_some() && !self.is_direct())?;
        let pongs = self.endpoints.values().filter_map(|it| it.prober.last_pong());
        // What answered before has died since.
        let answered = pongs.filter(|at| *at >= since).max();
        Some(answered.map_or(since, |at| since.max(at + PROOF_LIFETIME)))
    }

    /// Whether the peer has said that this address is one of its own.
    #[must_use]
    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.endpoints.keys().any(|place| place.remote.ip() == ip)
    }

    /// Reaches out to the peer's public IPv4 endpoints by a fresh socket too: opens our NAT towards them,
    /// and pings when a call has had the time to reach the peer.
    /// What the peer announces meanwhile is taken in, too.
    pub fn move_to(&mut self, socket: SocketId, now: Instant) {
        self.fresh = Some(socket);
        self.open_fresh(now);
    }

    pub(super) fn open_fresh(&mut self, now: Instant) {
        let Some(socket) = self.fresh else { return };
        let hold = self.hold(Cause::Wanted, now).max(FRESH_HOLD);
        let public: Vec<(Place, CandidateKind)> = self
            .endpoints
            .iter()
            .filter(|(place, _)| place.socket == SocketId::MAIN && place.remote.is_ipv4())
            .filter(|(place, _)| !is_of_one_site(place.remote.ip()))
            .filter(|(_, endpoint)| endpoint.kind != CandidateKind::Predicted)
            .map(|(place, endpoint)| (Place { socket, ..*place }, endpoint.kind))
            .collect();
        for (place, kind) in public {
            let endpoint = self.endpoints.entry(place).or_insert_with(|| Endpoint::new(kind));
            if endpoint.prober.outcome() == ProbeOutcome::Untried {
                endpoint.prober.start_held_round(hold, now);
            }
        }
        self.ping_due(now);
    }

    /// An extra socket is closed: its paths are gone.
    pub fn handle_socket_closed(&mut self, socket: SocketId, now: Instant) {
        if socket != SocketId::MAIN {
            self.forget_sockets(|it| it == socket, now);
        }
    }

    /// Forgets the paths by all extra sockets: nobody uses the peer any more, or the network that
    /// the sockets were opened in is gone.
    pub(super) fn forget_extra_sockets(&mut self, now: Instant) {
        let lines: Vec<SocketId> =
            self.endpoints.keys().map(|it| it.socket).filter(|it| self.uplinks.has(*it)).collect();
        self.forget_sockets(|it| it != SocketId::MAIN && !lines.contains(&it), now);
    }

    fn forget_sockets(&mut self, gone: impl Fn(SocketId) -> bool, now: Instant) {
        self.fresh = self.fresh.filter(|socket| !gone(*socket));
        let before = self.endpoints.len();
        self.endpoints.retain(|place, _| !gone(place.socket));
        if self.endpoints.len() != before {
            self.choose("its socket was closed", now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::{PathTransmit, Via};
    use crate::testing::epoch;
    use crate::types::{Candidate, CandidateKind, TxId};

    const EXTRA: SocketId = SocketId::new(7);

    /// An agent whose peer has just pinged an extra socket from the endpoint that it announces, and
    /// has answered the check by it.
    fn agent_on_extra_socket() -> (PathAgent, Via) {
        let now = epoch();
        let remote = "203.0.113.10:4000".parse().unwrap();
        let mut agent = PathAgent::new([1; 32], now);
        agent.set_relay(Some(Via::RelayUdp), now);
        agent.set_candidates(&[Candidate::new(remote, CandidateKind::Reflexive)], now);
        agent.set_wanted(true, now);
        while agent.poll_transmit().is_some() {}
        let via = Via::Direct { remote, local: None, socket: EXTRA };
        agent.handle_ping(TxId([0; 12]), via, now);
        let sent: Vec<PathTransmit> = std::iter::from_fn(|| agent.poll_transmit()).collect();
        let check = sent.iter().find_map(|it| match it {
            PathTransmit::Ping { via: by, tx } if *by == via => Some(*tx),
            _ => None,
        });
        assert!(sent.contains(&PathTransmit::Pong { via, tx: TxId([0; 12]) }), "{sent:?}");
        assert!(agent.needs_socket(EXTRA, now), "about to be proved");
        let tx = check.expect("a triggered check by the same socket");
        assert!(agent.handle_pong(tx, Via::direct(remote), None, now).is_none(), "another path");
        assert!(agent.handle_pong(tx, via, None, now).is_some());
        (agent, via)
    }

    #[test]
    fn a_path_by_an_extra_socket_carries_data_until_that_is_closed() {
        let now = epoch();
        let (mut agent, via) = agent_on_extra_socket();
        assert_eq!(agent.choice().primary, Some(via));
        assert!(agent.needs_socket(EXTRA, now) && !agent.needs_socket(SocketId::new(8), now));
        agent.handle_socket_closed(SocketId::MAIN, now);
        assert_eq!(agent.choice().primary, Some(via), "the main socket is never closed");
        agent.handle_socket_closed(EXTRA, now);
        assert_eq!(agent.choice().primary, Some(Via::RelayUdp));
    }

    #[test]
    fn what_answered_before_the_path_was_lost_does_not_keep_costly_ways_waiting() {
        let now = epoch();
        for answers in [false, true] {
            let (mut agent, via) = agent_on_extra_socket();
            let left = now + Duration::from_secs(1);
            let place = via.place().expect("it is direct");
            agent.leave(place, "for the test", left);
            assert_eq!((agent.choice().primary, agent.stuck_since()), (agent.relay, Some(left)));
            // Whether it answers still is asked at once.
            agent.handle_timeout(left);
            let asked = std::iter::from_fn(|| agent.poll_transmit()).find_map(|it| match it {
                PathTransmit::Ping { via: by, tx } if by == via => Some(tx),
                _ => None,
            });
            let tx = asked.expect("a ping on the path that was left");
            if answers {
                let at = left + Duration::from_millis(40);
                agent.handle_pong(tx, via, None, at);
                assert_eq!(agent.stuck_since(), Some(at + PROOF_LIFETIME), "the NATs are open");
            }
        }
    }

    #[test]
    fn roaming_and_disuse_give_the_socket_back() {
        let now = epoch();
        let (mut agent, _) = agent_on_extra_socket();
        agent.handle_network_change(now);
        assert!(!agent.needs_socket(EXTRA, now));
        assert_eq!(agent.choice().primary, Some(Via::RelayUdp));

        let (mut agent, _) = agent_on_extra_socket();
        agent.set_wanted(false, now);
        assert!(!agent.needs_socket(EXTRA, now));
        assert_eq!(agent.choice().primary, Some(Via::RelayUdp));
    }
}
