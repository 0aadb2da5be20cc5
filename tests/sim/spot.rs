//! What a place has beside a plain NAT: a second NAT, IPv6, its own idea of how long to remember.

use std::fmt;
use std::time::Duration;

use overlay::lab::nat::NatKind;

/// IPv6 at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ipv6 {
    /// None.
    Absent,
    /// A global address behind a stateful firewall, as most homes have it.
    Firewall,
    /// A global address, and anybody may send to it.
    Open,
}

/// A place where hosts can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    /// The NAT at home.
    pub(crate) kind: NatKind,
    /// The provider's NAT behind it.
    pub(crate) outer: Option<NatKind>,
    /// IPv6 beside it.
    pub(crate) ipv6: Ipv6,
    /// How long NATs and firewalls remember.
    pub(crate) expiry: Duration,
    /// The router forwards a port to each host here that asks.
    pub(crate) forwards: bool,
}

impl Spot {
    /// A NAT of this kind, and nothing else.
    pub(crate) fn plain(kind: NatKind) -> Self {
        let expiry = Duration::from_secs(120);
        Self { kind, outer: None, ipv6: Ipv6::Absent, expiry, forwards: false }
    }

    /// What a byte says of it; 0 says nothing.
    pub(crate) fn with_extras(self, byte: u8) -> Self {
        let expiry = [120, 30, 45, 300][usize::from(byte & 3)];
        let ipv6 = match byte >> 2 & 3 {
            2 => Ipv6::Firewall,
            3 => Ipv6::Open,
            _ => Ipv6::Absent,
        };
        let outer = match byte >> 4 & 7 {
            1 => Some(NatKind::FullCone),
            2 => Some(NatKind::PortRestricted),
            3 => Some(NatKind::Symmetric),
            _ => None,
        };
        let forwards = byte >> 6 == 3;
        Self { expiry: Duration::from_secs(expiry), ipv6, outer, forwards, ..self }
    }
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(outer) = self.outer.filter(|_| self.kind != NatKind::None) {
            write!(f, " behind {outer}")?;
        }
        match self.ipv6 {
            Ipv6::Absent => {}
            Ipv6::Firewall => f.write_str(", IPv6 behind a firewall")?,
            Ipv6::Open => f.write_str(", open IPv6")?,
        }
        if self.forwards {
            f.write_str(", forwards ports")?;
        }
        write!(f, ", forgets after {:?}", self.expiry)
    }
}
