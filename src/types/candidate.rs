//! Candidates: endpoints at which a node might be reached.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

/// How many candidates one node may announce; more only cost the peers probes.
pub const MAX_CANDIDATES: usize = 24;

/// Where a candidate comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateKind {
    /// An address of a local interface.
    Host,
    /// Our address as the server sees it (RFC 8445 section 5.1.1.2: server-reflexive).
    Reflexive,
    /// Our address as a peer saw it.
    PeerReflexive,
    /// Given by the router (UPnP, NAT-PMP, PCP).
    PortMapped,
    /// Guessed from how the NAT allocates ports.
    Predicted,
    /// Our own port at our public address: somebody may have forwarded it by hand.
    Static,
    /// Our address as the server sees it by another uplink than the preferred one: for when that fails.
    Uplink,
}

impl CandidateKind {
    /// The number of this kind in disco and control messages.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Host => 1,
            Self::Reflexive => 2,
            Self::PeerReflexive => 3,
            Self::PortMapped => 4,
            Self::Predicted => 5,
            Self::Static => 6,
            Self::Uplink => 7,
        }
    }

    /// The kind with this number; an unknown one comes from a newer node and is read as `Static`.
    #[must_use]
    pub fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Host,
            2 => Self::Reflexive,
            3 => Self::PeerReflexive,
            4 => Self::PortMapped,
            5 => Self::Predicted,
            7 => Self::Uplink,
            _ => Self::Static,
        }
    }

    /// The word used in output and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Reflexive => "reflexive",
            Self::PeerReflexive => "peer-reflexive",
            Self::PortMapped => "port-mapped",
            Self::Predicted => "predicted",
            Self::Static => "static",
            Self::Uplink => "uplink",
        }
    }
}

/// An endpoint that might work, with its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Candidate {
    /// Where to send.
    pub endpoint: SocketAddr,
    /// Where this knowledge comes from.
    pub kind: CandidateKind,
}

impl Candidate {
    /// A candidate of `kind` at `endpoint`.
    #[must_use]
    pub fn new(endpoint: SocketAddr, kind: CandidateKind) -> Self {
        Self { endpoint, kind }
    }
}

/// Whether `endpoint` is an address that a datagram of ours may be sent to at all.
///
/// Never loopback, multicast, broadcast, unspecified or port 0: a lying peer could otherwise turn
/// our probes against the machine itself or a whole segment.
#[must_use]
pub fn usable_underlay(endpoint: SocketAddr) -> bool {
    if endpoint.port() == 0 {
        return false;
    }
    match endpoint.ip() {
        IpAddr::V4(ip) => {
            !(ip.is_loopback()
                || ip.is_multicast()
                || ip.is_broadcast()
                || ip.is_unspecified()
                || ip.octets()[0] == 0
                || ip.octets()[0] >= 240
                || ip == Ipv4Addr::new(169, 254, 169, 254))
        }
        IpAddr::V6(ip) => {
            !(ip.is_loopback()
                || ip.is_multicast()
                || ip.is_unspecified()
                || ip.to_ipv4_mapped().is_some()
                || (ip.segments()[0] & 0xffc0) == 0xfe80)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_that_could_hurt_somebody_are_refused() {
        for bad in [
            "127.0.0.1:1",
            "0.0.0.0:1",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "192.0.2.1:0",
            "169.254.169.254:80",
            "[::1]:1",
            "[ff02::1]:1",
            "[fe80::1]:1",
            "[::ffff:192.0.2.1]:1",
        ] {
            assert!(!usable_underlay(bad.parse().unwrap()), "{bad}");
        }
        for good in ["192.168.1.2:1", "203.0.113.7:41820", "[2001:db8::1]:1", "[fd00::1]:1"] {
            assert!(usable_underlay(good.parse().unwrap()), "{good}");
        }
    }

    #[test]
    fn kinds_survive_their_code() {
        for code in 1..=7 {
            assert_eq!(CandidateKind::from_code(code).code(), code);
        }
    }
}
