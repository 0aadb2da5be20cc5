//! What is asked of a router, and what it may answer.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use super::{Failure, Gateway};
use crate::types::is_global_v4;

/// A mapping that is gone sooner is of no use: it could not be renewed in time.
const SHORTEST_LEASE: Duration = Duration::from_secs(10);
/// Longer leases are renewed as if they were this long.
const LONGEST_LEASE: Duration = Duration::from_secs(24 * 3600);

/// A way to ask for a mapping, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// UPnP-IGD.
    Upnp,
}

impl Protocol {
    /// The word in the JSON contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pcp => "pcp",
            Self::NatPmp => "nat-pmp",
            Self::Upnp => "upnp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A port of the router that leads to our socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// How it was asked for.
    pub protocol: Protocol,
    /// Where the router says that it is.
    pub external: SocketAddrV4,
    /// For how long; none for ever.
    pub lease: Option<Duration>,
}

impl Mapping {
    /// Checks what a router said. A lease of none is for ever.
    pub(super) fn checked(
        protocol: Protocol,
        external: Ipv4Addr,
        port: u16,
        lease: Option<Duration>,
    ) -> Result<Self, Failure> {
        if external.is_unspecified()
            || external.is_loopback()
            || external.is_multicast()
            || external.is_broadcast()
        {
            return Err(Failure::Nonsense(format!("{external} as external address")));
        }
        if port == 0 {
            return Err(Failure::Nonsense("external port 0".into()));
        }
        if lease.is_some_and(|lease| lease < SHORTEST_LEASE) {
            return Err(Failure::Nonsense("a lease that ends at once".into()));
        }
        let lease = lease.map(|lease| lease.min(LONGEST_LEASE));
        Ok(Self { protocol, external: SocketAddrV4::new(external, port), lease })
    }

    /// Whether the external address can be one of the internet's. If not, there is another NAT
    /// behind this router.
    #[must_use]
    pub fn is_public(&self) -> bool {
        is_global_v4(*self.external.ip())
    }
}

/// What a job is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Find out what the router speaks, and map.
    Find,
    /// Ask again for the mapping, which is there.
    Renew(Mapping),
    /// Remove the mapping, which does not work, and ask again.
    Repair(Mapping),
}

/// One conversation with the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Tells late outcomes apart.
    pub id: u64,
    /// Whom to ask.
    pub gateway: Gateway,
    /// The local port.
    pub port: u16,
    /// The lease to ask for.
    pub lease: Duration,
    /// What for.
    pub goal: Goal,
    /// For how long each protocol is tried.
    pub budget: Duration,
}

impl Job {
    /// The lease in seconds.
    pub(super) fn lease_s(&self) -> u32 {
        u32::try_from(self.lease.as_secs()).unwrap_or(u32::MAX)
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Of the job.
    pub id: u64,
    /// The protocols that the router answers, if that was asked.
    pub answered: Option<Vec<Protocol>>,
    /// The mapping, or why there is none.
    pub result: Result<Mapping, String>,
}
