//! What this node knows of the network in front of it: told from what it sees anyway, and by one
//! question to the reflector.
//!
//! How the NAT maps is seen on the main socket. What it lets in is seen by a scratch socket that
//! asks to be answered from the port that it has not sent to. That is not asked behind a NAT that
//! maps by destination: the answer would explain nothing, and the question would use up a port that
//! the peers may be guessing at.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;

use super::Node;
use crate::path::side::Facts;
use crate::path::{Filtering, Mapping};
use crate::types::{CandidateKind, TxId, is_of_one_site};
use crate::wire::relay::Control;

/// An answer that has not come by then was kept out.
const FILTER_LIMIT: Duration = Duration::from_millis(600);
/// The scratch socket does not wait for servers that are further away.
const SLOWEST_ANSWER: Duration = Duration::from_millis(200);

/// The question how the NAT filters.
#[derive(Debug, Default)]
pub(super) struct FilterTest {
    asked: Option<(TxId, Instant)>,
    let_in: bool,
}

impl Node {
    /// Both ports of the server have seen our socket, at these endpoints.
    pub(super) fn test_filter(&mut self, first: SocketAddr, second: SocketAddr, now: Instant) {
        let Some(server) = self.relay.server() else { return };
        if first != second || self.filter_test.asked.is_some() {
            return;
        }
        let tx = TxId(self.rng.random());
        self.filter_test.asked = Some((tx, now));
        let question = Control::Reflect { tx, from_other_port: true }.encode(None);
        self.scratch.push_back((server, question.to_vec()));
    }

    /// The answer to that question found its way in. Tells whether it was that.
    pub(super) fn handle_let_in(&mut self, tx: TxId) -> bool {
        let ours = self.filter_test.asked.is_some_and(|(asked, _)| asked == tx);
        self.filter_test.let_in |= ours;
        ours
    }

    /// Whether we can send by IPv4, as far as is known. A translator for IPv6 hosts (NAT64) gives the server
    /// an IPv4 endpoint of ours to see, and leads to no peer.
    pub(super) fn has_ipv4(&self) -> bool {
        self.host_endpoints.is_empty() || self.host_endpoints.iter().any(SocketAddr::is_ipv4)
    }

    /// The network in front of us, as far as it is known.
    #[must_use]
    pub fn facts(&self, now: Instant) -> Facts {
        let first = self.prediction.first_mapping();
        let mapping = match (first, self.prediction.mappings()) {
            (_, Some((first, second))) if first != second => Some(Mapping::AddressAndPortDependent),
            (Some(first), _) if self.host_endpoints.contains(&first) => Some(Mapping::None),
            (_, Some(_)) => Some(Mapping::EndpointIndependent),
            _ => None,
        };
        let near = self.relay.rtt().is_some_and(|rtt| rtt < SLOWEST_ANSWER);
        let waited = |(_, at): (TxId, Instant)| now.saturating_duration_since(at) >= FILTER_LIMIT;
        let filtering = if self.filter_test.let_in {
            Some(Filtering::EndpointIndependentOrAddressDependent)
        } else {
            let kept_out = near && self.filter_test.asked.is_some_and(waited);
            kept_out.then_some(Filtering::AddressAndPortDependent)
        };
        let global = |ip: IpAddr| ip.is_ipv6() && !is_of_one_site(ip);
        // A static candidate is a guess, and no fact.
        let mapped = |kind| kind == CandidateKind::PortMapped;
        Facts {
            // A server that is away says nothing of UDP.
            udp: self.relay.udp_works().filter(|works| *works || self.link_up),
            mapping,
            filtering,
            counts: self.prediction.counts(),
            reflexive: first,
            ipv6: self.host_endpoints.iter().any(|endpoint| global(endpoint.ip())),
            ipv4: (!self.host_endpoints.is_empty()).then(|| self.has_ipv4()),
            port_mapped: self.announced.iter().any(|candidate| mapped(candidate.kind)),
            port: self
                .host_endpoints
                .iter()
                .min_by_key(|endpoint| endpoint.is_ipv6())
                .map(SocketAddr::port),
        }
        .of_ipv4()
    }
}
