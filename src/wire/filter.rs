//! A node's access rules as they travel and as the node keeps them on disk: who may send it what.
//!
//! Rules only ever allow. A reader leaves out a rule of a kind that it does not know, which lets in
//! less, never more; what makes a rule of a known kind narrower must therefore be a new kind.

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Everything: every protocol, every port.
pub const KIND_ANY: u8 = 0;
/// ICMP and ICMPv6.
pub const KIND_ICMP: u8 = 1;
/// TCP to some ports; its own protocol number.
pub const KIND_TCP: u8 = 6;
/// UDP to some ports; its own protocol number.
pub const KIND_UDP: u8 = 17;

/// What may be sent to one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct WireFilter {
    /// What is let in, and nothing else; none when the network has no access rules, so that
    /// everything is.
    #[n(0)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<Vec<WireRule>>,
}

/// One thing that is let in.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct WireRule {
    /// One of the `KIND_` constants.
    #[n(0)]
    pub kind: u8,
    /// From nodes with these numbers, first and last of each run; none for every member.
    #[n(1)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources: Option<Vec<(u32, u32)>>,
    /// To these ports, first and last of each run; none for all.
    #[n(2)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<(u16, u16)>>,
}
