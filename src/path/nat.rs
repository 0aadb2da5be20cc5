//! What a NAT does, told from what reflectors saw, in the words of RFC 4787.
//!
//! With one server address and two ports, address-dependent behaviour cannot be told from
//! endpoint-independent behaviour (that takes a second address); the facts say which words cover
//! both. A kind never vetoes an attempt to punch: it only explains.

use std::net::SocketAddr;

/// How internal endpoints are mapped to external ones (RFC 4787 section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// No translation at all.
    None,
    /// The same external endpoint for every destination seen.
    EndpointIndependent,
    /// Another external endpoint for another destination port.
    AddressAndPortDependent,
}

/// Which packets from outside are let in (RFC 4787 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filtering {
    /// From any port of an address that was sent to; perhaps from anybody.
    EndpointIndependentOrAddressDependent,
    /// Only from the very address and port that was sent to.
    AddressAndPortDependent,
}

/// The classical name of a NAT (RFC 3489 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatKind {
    /// No NAT, and nothing filtered.
    None,
    /// No NAT, but a firewall that lets in only answers.
    Firewall,
    /// Endpoint-independent mapping, and the filter lets other ports in.
    FullConeOrAddressRestricted,
    /// Endpoint-independent mapping, and only answers come in.
    PortRestricted,
    /// Another external port for each destination.
    Symmetric,
}

impl NatKind {
    /// The word in `nat.kind` of the JSON contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Firewall => "firewall",
            Self::FullConeOrAddressRestricted => "full-cone-or-address-restricted",
            Self::PortRestricted => "port-restricted",
            Self::Symmetric => "symmetric",
        }
    }
}

/// What was found out about the NAT in front of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NatFacts {
    /// How it maps.
    pub mapping: Mapping,
    /// What it lets in; none when that could not be tested.
    pub filtering: Option<Filtering>,
}

impl NatFacts {
    /// Tells the facts from two reflectors' answers to one local socket.
    ///
    /// `local` are the endpoints that the socket has on this machine, `first` and `second` what
    /// the two reflector ports saw, and `other_port_answered` whether an answer came in from a
    /// port that was never sent to (none when not tested).
    #[must_use]
    pub fn observe(
        local: &[SocketAddr],
        first: SocketAddr,
        second: SocketAddr,
        other_port_answered: Option<bool>,
    ) -> Self {
        let mapping = if first != second {
            Mapping::AddressAndPortDependent
        } else if local.contains(&first) {
            Mapping::None
        } else {
            Mapping::EndpointIndependent
        };
        let filtering = other_port_answered.map(|answered| {
            if answered {
                Filtering::EndpointIndependentOrAddressDependent
            } else {
                Filtering::AddressAndPortDependent
            }
        });
        Self { mapping, filtering }
    }

    /// The classical name.
    #[must_use]
    pub fn kind(&self) -> NatKind {
        let open = self.filtering == Some(Filtering::EndpointIndependentOrAddressDependent);
        match (self.mapping, open) {
            (Mapping::None, true) => NatKind::None,
            (Mapping::None, false) => NatKind::Firewall,
            (Mapping::AddressAndPortDependent, _) => NatKind::Symmetric,
            (Mapping::EndpointIndependent, true) => NatKind::FullConeOrAddressRestricted,
            (Mapping::EndpointIndependent, false) => NatKind::PortRestricted,
        }
    }
}

impl Mapping {
    /// The word in `nat.mapping` of the JSON contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::EndpointIndependent => "endpoint-independent",
            Self::AddressAndPortDependent => "address-and-port-dependent",
        }
    }
}

impl Filtering {
    /// The word in `nat.filtering` of the JSON contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EndpointIndependentOrAddressDependent => {
                "endpoint-independent-or-address-dependent"
            }
            Self::AddressAndPortDependent => "address-and-port-dependent",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_classical_kinds_are_told_apart() {
        let local = ["192.168.1.2:4000".parse().unwrap()];
        let a = "203.0.113.10:4000".parse().unwrap();
        let b = "203.0.113.10:4001".parse().unwrap();
        let kind = |first, second, filter| NatFacts::observe(&local, first, second, filter).kind();
        assert_eq!(kind(local[0], local[0], Some(true)), NatKind::None);
        assert_eq!(kind(local[0], local[0], Some(false)), NatKind::Firewall);
        assert_eq!(kind(a, a, Some(true)), NatKind::FullConeOrAddressRestricted);
        assert_eq!(kind(a, a, Some(false)), NatKind::PortRestricted);
        assert_eq!(kind(a, a, None), NatKind::PortRestricted, "untested counts as the stricter");
        assert_eq!(kind(a, b, Some(false)), NatKind::Symmetric);
        assert_eq!(kind(a, b, Some(true)), NatKind::Symmetric);
    }
}
