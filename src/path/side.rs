//! One side's view of the ways to the other, and what two networks allow together.

use std::net::SocketAddr;
use std::time::Duration;

use super::{Filtering, Mapping, NatFacts, ProbeOutcome, Via};
use crate::types::CandidateKind;

/// What was heard this long ago, in a pair that is in use, is no news of before.
const JUST_HEARD: Duration = Duration::from_secs(3);

/// What a node knows of the network in front of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether UDP reaches the server and comes back; none when that is not known yet, or the server is
    /// away.
    pub udp: Option<bool>,
    /// How the NAT maps.
    pub mapping: Option<Mapping>,
    /// What it lets in. Not tested behind a NAT that maps by destination.
    pub filtering: Option<Filtering>,
    /// Whether the NAT gives its ports in order.
    pub counts: bool,
    /// Where the server sees the node.
    pub reflexive: Option<SocketAddr>,
    /// Whether the node has a global IPv6 address.
    pub ipv6: bool,
    /// Whether the node has an IPv4 address; none when that is not known, or an older node does not
    /// tell.
    pub ipv4: Option<bool>,
    /// Whether a router maps a port to it.
    pub port_mapped: bool,
    /// Its own UDP port.
    pub port: Option<u16>,
}

/// A candidate of the other side, and how it answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// Where.
    pub endpoint: SocketAddr,
    /// Where the knowledge of it comes from.
    pub kind: CandidateKind,
    /// How it answered.
    pub outcome: ProbeOutcome,
    /// Pings sent to it.
    pub pings: u32,
    /// Its smoothed round trip.
    pub rtt: Option<Duration>,
    /// Time since anything authenticated was heard from it.
    pub heard: Option<Duration>,
    /// Whether this machine has no route there, so that nothing has left it. Not known of a peer.
    pub no_route: bool,
}

/// One side's view.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Side {
    /// The network in front of it.
    pub facts: Facts,
    /// The way that its data takes.
    pub path: Option<Via>,
    /// The other side's candidates.
    pub tried: Vec<Tried>,
}

/// What stands between a node and the internet, as far as punching cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edge {
    /// Lets strangers in, or could not be seen to keep them out.
    Open,
    /// One endpoint for all, and only answers come in.
    Filtered,
    /// Another port for each destination, in order.
    Counting,
    /// Another port for each destination, at random.
    Random,
}

/// What is to be expected between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlook {
    /// A direct path.
    Direct,
    /// A direct path, once the next port of a NAT is guessed.
    AfterPrediction,
    /// Relay, and a direct path if one of many guesses hits.
    IfGuessed,
    /// Relay.
    RelayOnly,
    /// Relay over TCP: one side has no UDP.
    NoUdp,
    /// Relay: one side has only IPv6, the other one only IPv4.
    NoFamily,
    /// Too little is known of one side.
    Unknown,
}

impl Outlook {
    /// The word in `forecast` of `overlay netcheck --json`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::AfterPrediction => "direct-after-prediction",
            Self::IfGuessed => "relay-unless-guessed",
            Self::RelayOnly => "relay",
            Self::NoUdp => "relay-tcp",
            Self::NoFamily => "relay-no-common-family",
            Self::Unknown => "unknown",
        }
    }

    /// Why, in a sentence.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Direct => "the two networks let a direct path through",
            Self::AfterPrediction => {
                "one NAT gives another port to each destination, but in order: its next ports are \
                 guessed"
            }
            Self::IfGuessed => {
                "one NAT gives a random port to each destination, and the other lets only answers \
                 in: it becomes direct when one of many guesses hits"
            }
            Self::RelayOnly => {
                "both NATs give another port to each destination, at least one of them at random: \
                 nothing can guess both"
            }
            Self::NoUdp => "UDP is blocked on one side",
            Self::NoFamily => "one side has only IPv6, and the other one only IPv4",
            Self::Unknown => {
                "too little is known of one of the networks (of a node with IPv4 and IPv6 whose \
                 server answers by IPv6, not what its NAT does to IPv4)"
            }
        }
    }
}

impl Facts {
    /// Without what only looks like knowledge of a NAT: where a node with both families is seen by IPv6,
    /// how that is mapped and filtered says nothing of its IPv4.
    #[must_use]
    pub fn of_ipv4(self) -> Self {
        let by_ipv6 = self.reflexive.is_some_and(|endpoint| endpoint.is_ipv6());
        if by_ipv6 && self.ipv4 == Some(true) {
            Self { mapping: None, filtering: None, counts: false, ..self }
        } else {
            self
        }
    }

    pub(super) fn edge(&self) -> Option<Edge> {
        if self.port_mapped {
            return Some(Edge::Open);
        }
        let facts = NatFacts { mapping: self.mapping?, filtering: self.filtering };
        let closed = facts.filtering == Some(Filtering::AddressAndPortDependent);
        Some(match facts.mapping {
            Mapping::AddressAndPortDependent if self.counts => Edge::Counting,
            Mapping::AddressAndPortDependent => Edge::Random,
            Mapping::None if closed => Edge::Filtered,
            Mapping::None => Edge::Open,
            // Untested counts as the stricter.
            Mapping::EndpointIndependent if facts.filtering.is_none() || closed => Edge::Filtered,
            Mapping::EndpointIndependent => Edge::Open,
        })
    }

    /// The classical name of the NAT, `udp-blocked` or `unknown`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.mapping {
            _ if self.udp == Some(false) => "udp-blocked",
            None => "unknown",
            // An untested filter of a public address is not called a firewall.
            Some(Mapping::None) if self.filtering.is_none() => super::NatKind::None.as_str(),
            Some(mapping) => NatFacts { mapping, filtering: self.filtering }.kind().as_str(),
        }
    }

    /// Whether both are seen at one public address, and neither has it itself.
    #[must_use]
    pub fn same_nat(&self, other: &Self) -> bool {
        let behind = |facts: &Self| facts.mapping.is_some_and(|mapping| mapping != Mapping::None);
        let at = |facts: &Self| facts.reflexive.map(|endpoint| endpoint.ip());
        behind(self) && behind(other) && at(self).is_some() && at(self) == at(other)
    }

    /// Whether it has IPv6, and no IPv4 of its own. It may still reach servers with IPv4 only, by a translator
    /// (NAT64); what is sent to a bare IPv4 address does not go there.
    pub(super) fn is_ipv6_only(&self) -> bool {
        self.ipv4 == Some(false) && self.ipv6
    }

    /// Whether one has only IPv6, and the other one only IPv4.
    pub(super) fn no_common_family(&self, other: &Self) -> bool {
        let ipv4_only = |facts: &Self| !facts.ipv6 && facts.ipv4 != Some(false);
        self.is_ipv6_only() && ipv4_only(other) || other.is_ipv6_only() && ipv4_only(self)
    }

    /// What is to be expected between two nodes with these networks in front of them.
    #[must_use]
    pub fn outlook(&self, other: &Self) -> Outlook {
        if self.udp == Some(false) || other.udp == Some(false) {
            return Outlook::NoUdp;
        }
        if self.ipv6 && other.ipv6 || self.same_nat(other) {
            return Outlook::Direct;
        }
        if self.no_common_family(other) {
            return Outlook::NoFamily;
        }
        self.outlook_ipv4(other)
    }

    /// The same without IPv6, and without a way inside one home.
    pub(super) fn outlook_ipv4(&self, other: &Self) -> Outlook {
        use Edge::{Counting, Filtered, Open, Random};
        match (self.edge(), other.edge()) {
            (Some(Open), _) | (_, Some(Open)) | (Some(Filtered), Some(Filtered)) => Outlook::Direct,
            (None, _) | (_, None) => Outlook::Unknown,
            (Some(Counting), Some(Counting | Filtered)) | (Some(Filtered), Some(Counting)) => {
                Outlook::AfterPrediction
            }
            (Some(Random), Some(Filtered)) | (Some(Filtered), Some(Random)) => Outlook::IfGuessed,
            (Some(Random), Some(Random | Counting)) | (Some(Counting), Some(Random)) => {
                Outlook::RelayOnly
            }
        }
    }
}

impl Tried {
    /// What is known of one endpoint by two of our sockets.
    pub(super) fn or_better(self, other: Self) -> Self {
        let pings = self.pings.saturating_add(other.pings);
        let heard = match (self.heard, other.heard) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let best = if self.rank() <= other.rank() { self } else { other };
        Self { pings, heard, ..best }
    }

    /// For sorting: what tells most first.
    pub(super) fn rank(&self) -> (u8, bool, SocketAddr) {
        let outcome = match self.outcome {
            ProbeOutcome::Answered => 0,
            ProbeOutcome::Probing => 1,
            ProbeOutcome::Silent => 2,
            ProbeOutcome::Untried => 3,
        };
        (outcome, self.kind == CandidateKind::Predicted, self.endpoint)
    }
}

impl Side {
    /// The kind of the candidate that its direct path leads to.
    pub(super) fn path_kind(&self) -> Option<CandidateKind> {
        let Some(Via::Direct { remote, .. }) = self.path else { return None };
        self.tried.iter().find(|tried| tried.endpoint == remote).map(|tried| tried.kind)
    }

    pub(super) fn count(&self, outcome: ProbeOutcome) -> usize {
        self.tried.iter().filter(|tried| tried.outcome == outcome).count()
    }

    /// Whether a candidate that has answered was heard within the last seconds.
    pub(super) fn hears_now(&self) -> bool {
        self.tried.iter().any(|tried| {
            tried.outcome == ProbeOutcome::Answered && tried.heard.is_some_and(|at| at < JUST_HEARD)
        })
    }

    pub(super) fn hears(&self) -> bool {
        self.tried.iter().any(|tried| tried.heard.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(mapping: Mapping, closed: bool, counts: bool) -> Facts {
        let filtering = if closed {
            Filtering::AddressAndPortDependent
        } else {
            Filtering::EndpointIndependentOrAddressDependent
        };
        let udp = Some(true);
        Facts {
            udp,
            mapping: Some(mapping),
            filtering: Some(filtering),
            counts,
            ..Facts::default()
        }
    }

    #[test]
    fn every_pair_of_networks_has_its_outlook() {
        use Outlook::{AfterPrediction as Guess, Direct, IfGuessed, RelayOnly};
        let public = facts(Mapping::None, false, false);
        let firewall = facts(Mapping::None, true, false);
        let cone = facts(Mapping::EndpointIndependent, false, false);
        let ordinary = facts(Mapping::EndpointIndependent, true, false);
        let counting = facts(Mapping::AddressAndPortDependent, true, true);
        let random = facts(Mapping::AddressAndPortDependent, true, false);
        let all = [public, firewall, cone, ordinary, counting, random];
        let expected = [
            [Direct, Direct, Direct, Direct, Direct, Direct],
            [Direct, Direct, Direct, Direct, Guess, IfGuessed],
            [Direct, Direct, Direct, Direct, Direct, Direct],
            [Direct, Direct, Direct, Direct, Guess, IfGuessed],
            [Direct, Guess, Direct, Guess, Guess, RelayOnly],
            [Direct, IfGuessed, Direct, IfGuessed, RelayOnly, RelayOnly],
        ];
        for (a, row) in all.iter().zip(expected) {
            for (b, outlook) in all.iter().zip(row) {
                assert_eq!(a.outlook(b), outlook, "{a:?} with {b:?}");
            }
        }
    }

    #[test]
    fn ipv6_one_home_and_a_mapped_port_help_and_blocked_udp_does_not() {
        let random = facts(Mapping::AddressAndPortDependent, true, false);
        let with_ipv6 = Facts { ipv6: true, ..random };
        assert_eq!(with_ipv6.outlook(&with_ipv6), Outlook::Direct);
        assert_eq!(with_ipv6.outlook(&random), Outlook::RelayOnly);
        assert_eq!(random.outlook(&Facts { port_mapped: true, ..random }), Outlook::Direct);
        let home = Facts { reflexive: "203.0.113.9:1".parse().ok(), ..random };
        let neighbour = Facts { reflexive: "203.0.113.9:2".parse().ok(), ..random };
        assert_eq!(home.outlook(&neighbour), Outlook::Direct);
        let blocked = Facts { udp: Some(false), ..with_ipv6 };
        assert_eq!(blocked.outlook(&with_ipv6), Outlook::NoUdp);
        assert_eq!(Facts::default().outlook(&random), Outlook::Unknown);
        assert_eq!(Facts::default().kind(), "unknown");
    }

    #[test]
    fn what_the_server_sees_by_ipv6_is_no_knowledge_of_an_ipv4_nat() {
        let reflexive = "[2001:db8::7]:41000".parse().ok();
        let ipv4 = Some(true);
        let by_ipv6 = Facts { reflexive, ipv4, ipv6: true, ..facts(Mapping::None, false, true) };
        let random = Facts { ipv4, ..facts(Mapping::AddressAndPortDependent, true, false) };
        // No firewall and no NAT by IPv6 once made it a node that all reach by IPv4.
        assert_eq!(by_ipv6.outlook(&random), Outlook::Direct);
        let judged = by_ipv6.of_ipv4();
        assert_eq!((judged.mapping, judged.filtering, judged.counts), (None, None, false));
        assert_eq!((judged.kind(), judged.reflexive), ("unknown", reflexive));
        assert_eq!(judged.outlook(&random), Outlook::Unknown);
        assert!(Outlook::Unknown.reason().contains("IPv6"));
        assert_eq!(judged.outlook(&judged), Outlook::Direct, "by IPv6");
        let mapped = Facts { port_mapped: true, ..judged };
        assert_eq!(mapped.outlook(&random), Outlook::Direct, "a router forwards IPv4");
        for same in [random, Facts { ipv4: Some(false), ..by_ipv6 }] {
            assert_eq!(same.of_ipv4(), same);
        }
    }

    #[test]
    fn one_with_ipv6_only_and_one_with_ipv4_only_have_no_way_but_the_relay() {
        // What its translator maps, or that nothing maps its IPv6 address, is no IPv4 of its own.
        for mapping in [Mapping::None, Mapping::EndpointIndependent] {
            let six = Facts { ipv6: true, ipv4: Some(false), ..facts(mapping, false, false) };
            let four = Facts { ipv4: Some(true), ..facts(Mapping::None, false, false) };
            let older = Facts { ipv4: None, ..four };
            for other in [four, older] {
                assert_eq!(six.outlook(&other), Outlook::NoFamily);
                assert_eq!(other.outlook(&six), Outlook::NoFamily);
            }
            let both = Facts { ipv6: true, ..four };
            assert_eq!(six.outlook(&both), Outlook::Direct);
            assert_eq!(both.outlook(&four), Outlook::Direct);
            assert_eq!(six.outlook(&six), Outlook::Direct);
        }
    }
}
