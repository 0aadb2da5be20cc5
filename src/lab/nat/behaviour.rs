//! What a NAT does: RFC 4787's dimensions, and the classical kinds as points among them.

use std::str::FromStr;
use std::time::Duration;

use super::Protocol;

/// The classical NAT kinds, and no NAT at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NatKind {
    /// A public host: no translation, no filter.
    None,
    /// Endpoint-independent mapping and filtering.
    FullCone,
    /// Endpoint-independent mapping, filter by remote address.
    AddressRestricted,
    /// Endpoint-independent mapping, filter by remote address and port: most home routers.
    PortRestricted,
    /// A new random external port for each remote endpoint, filter by address and port.
    Symmetric,
}

impl NatKind {
    /// All kinds, from the most open to the most closed.
    pub const ALL: [Self; 5] = [
        Self::None,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Symmetric,
    ];

    /// The kind in RFC 4787 terms; nothing for [`NatKind::None`].
    pub fn behaviour(self) -> Option<NatBehaviour> {
        let cone = NatBehaviour::default();
        match self {
            Self::None => None,
            Self::FullCone => {
                Some(NatBehaviour { filtering: Dependence::EndpointIndependent, ..cone })
            }
            Self::AddressRestricted => {
                Some(NatBehaviour { filtering: Dependence::Address, ..cone })
            }
            Self::PortRestricted => Some(cone),
            Self::Symmetric => Some(NatBehaviour {
                mapping: Dependence::AddressAndPort,
                port_allocation: PortAllocation::Random,
                ..cone
            }),
        }
    }

    /// The word for it on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::FullCone => "full-cone",
            Self::AddressRestricted => "address-restricted",
            Self::PortRestricted => "port-restricted",
            Self::Symmetric => "symmetric",
        }
    }
}

impl std::fmt::Display for NatKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for NatKind {
    type Err = UnknownNatKind;

    fn from_str(word: &str) -> Result<Self, UnknownNatKind> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == word);
        found.ok_or_else(|| UnknownNatKind { word: word.to_owned() })
    }
}

/// A word that is no NAT kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{word:?} is not a NAT kind: none, full-cone, address-restricted, port-restricted or symmetric"
)]
pub struct UnknownNatKind {
    word: String,
}

/// On what of the remote endpoint a mapping or a filter depends (RFC 4787 sections 4.1 and 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dependence {
    /// On nothing.
    EndpointIndependent,
    /// On its address.
    Address,
    /// On its address and port.
    AddressAndPort,
}

/// How the external port of a new mapping is chosen (RFC 4787 section 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortAllocation {
    /// The internal port, or a random one if that is taken.
    Preserving,
    /// The next one.
    Sequential,
    /// Any.
    Random,
}

/// What an unsolicited packet from outside leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsolicited {
    /// Nothing: the packet is dropped and forgotten.
    Forgotten,
    /// An entry that owns the external endpoint towards its sender: a later packet from the inside
    /// to that sender gets another external port, and the sender's packets go on to be dropped.
    /// This is Linux connection tracking on a router whose own input is open.
    Claims {
        /// How long the entry lives after the last such packet.
        timeout: Duration,
    },
}

/// Everything that tells one NAT from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NatBehaviour {
    /// When two flows share an external endpoint.
    pub mapping: Dependence,
    /// Who may send to an external endpoint.
    pub filtering: Dependence,
    /// Which external port a mapping gets.
    pub port_allocation: PortAllocation,
    /// Whether inside hosts reach each other by their external endpoints.
    pub hairpinning: bool,
    /// How long a UDP mapping and a UDP permission live without use.
    pub mapping_timeout: Duration,
    /// The same for TCP.
    pub tcp_timeout: Duration,
    /// The same for ICMP echo.
    pub icmp_timeout: Duration,
    /// Whether packets from outside keep a mapping alive; packets from inside always do.
    pub inbound_refresh: bool,
    /// What an unsolicited packet from outside leaves behind.
    pub unsolicited: Unsolicited,
}

impl NatBehaviour {
    pub(super) fn timeout(&self, protocol: Protocol) -> Duration {
        match protocol {
            Protocol::Udp => self.mapping_timeout,
            Protocol::Tcp => self.tcp_timeout,
            Protocol::IcmpEcho => self.icmp_timeout,
        }
    }
}

/// A port-restricted cone, as most home routers are.
impl Default for NatBehaviour {
    fn default() -> Self {
        Self {
            mapping: Dependence::EndpointIndependent,
            filtering: Dependence::AddressAndPort,
            port_allocation: PortAllocation::Preserving,
            hairpinning: false,
            mapping_timeout: UDP_TIMEOUT,
            tcp_timeout: TCP_TIMEOUT,
            icmp_timeout: ICMP_TIMEOUT,
            inbound_refresh: true,
            unsolicited: Unsolicited::Forgotten,
        }
    }
}

/// RFC 4787 REQ-5 forbids less than two minutes, and Linux has exactly that for a stream.
const UDP_TIMEOUT: Duration = Duration::from_secs(120);

/// RFC 5382 REQ-5: an established connection lives 2 hours 4 minutes at least.
const TCP_TIMEOUT: Duration = Duration::from_secs(2 * 3600 + 4 * 60);

/// RFC 5508 REQ-2: an echo query lives 60 seconds at least.
const ICMP_TIMEOUT: Duration = Duration::from_secs(60);
