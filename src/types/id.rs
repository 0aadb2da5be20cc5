//! Identifiers: small numbers with a type and one way of writing each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text that is not an identifier of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not {wanted}")]
pub struct ParseIdError {
    text: String,
    wanted: &'static str,
}

/// A member of the network, for ever: a removed node's number is not given out again.
///
/// Also the address of a node in relay frames. Written as eight hex digits; never zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId(u32);

impl NodeId {
    /// The id with this number, or `None` for zero.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }

    /// The number that stands in frames.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

/// One of this machine's UDP sockets, for as long as the process lives. Never leaves the machine.
///
/// [`SocketId::MAIN`] stands for the two sockets, one per address family, that every node has. The
/// others are *extra sockets*: the node core orders them when a path needs a local port of its own,
/// or an uplink a socket of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(u16);

impl SocketId {
    /// The sockets that are always there.
    pub const MAIN: Self = Self(0);

    /// The socket with this number; zero is the main one.
    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

impl FromStr for NodeId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `from_str_radix` would also take a sign.
        let digits = text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits
            .then(|| u32::from_str_radix(text, 16).ok())
            .flatten()
            .and_then(Self::new)
            .ok_or_else(|| ParseIdError { text: text.into(), wanted: "a node id (8 hex digits)" })
    }
}

impl TryFrom<String> for NodeId {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<NodeId> for String {
    fn from(id: NodeId) -> Self {
        id.to_string()
    }
}

macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $wanted:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                data_encoding::HEXLOWER_PERMISSIVE
                    .decode(text.as_bytes())
                    .ok()
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(Self)
                    .ok_or_else(|| ParseIdError { text: text.into(), wanted: $wanted })
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

byte_id! {
    /// One virtual LAN: random, made at the first start of its server.
    NetworkId, 8, "a network id (16 hex digits)"
}

byte_id! {
    /// One invite. Not a secret: the join line holds the secret beside it.
    InviteId, 4, "an invite id (8 hex digits)"
}

byte_id! {
    /// Pairs a disco pong with its ping; random, so that it cannot be guessed off the path.
    TxId, 12, "a transaction id (24 hex digits)"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_printing_and_parsing() {
        let node = NodeId::new(0x00ab_cdef).unwrap();
        assert_eq!(node.to_string(), "00abcdef");
        assert_eq!("00abcdef".parse(), Ok(node));
        let network = NetworkId([1, 2, 3, 4, 5, 6, 7, 0xff]);
        assert_eq!(network.to_string().parse(), Ok(network));
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for bad in ["", "0", "00000000", "zzzzzzzz", "000000001", "-0000001", "+0000001"] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
        assert!("0102".parse::<NetworkId>().is_err());
    }
}
