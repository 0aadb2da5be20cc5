//! Bytes to structs and back. Decoding never panics and trusts nothing.
//!
//! Everything that crosses a network or is pasted by a person has its layout here, one room per
//! protocol; `docs/protocol.md` shows the same bytes to readers. What the messages *mean* is the
//! business of `path`, `node` and `server`.

pub mod control;
mod cursor;
pub mod disco;
pub mod filter;
pub mod frame;
pub mod ip;
pub mod join;
pub mod punch;
pub mod relay;
pub mod report;
pub mod strict;

pub use cursor::UnexpectedEnd;

/// What a datagram on a node's or the server's UDP socket is, told by its first bytes.
///
/// The ranges cannot overlap: WireGuard messages start with 1 to 4 and three zero bytes, ours with
/// `0xB1` to `0xB3`, which is neither STUN (00), TURN channel data (01) nor a QUIC header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacketKind {
    /// WireGuard handshake initiation (type 1): finds its peer by the static key inside.
    HandshakeInitiation,
    /// WireGuard handshake response (type 2) or cookie reply (type 3) for this receiver index.
    HandshakeReply {
        /// The index that we chose.
        receiver: u32,
    },
    /// WireGuard transport data (type 4) for this receiver index.
    Data {
        /// The index that we chose.
        receiver: u32,
    },
    /// A sealed path probe.
    Disco,
    /// A datagram between two nodes with a relay header in front.
    Relay,
    /// Reflector and relay sign-on between a node and the server.
    RelayControl,
    /// None of these.
    Unknown,
}

impl PacketKind {
    /// Tells what `datagram` is. The only place that looks at first bytes.
    #[must_use]
    pub fn classify(datagram: &[u8]) -> Self {
        let word = |at: usize| -> Option<u32> {
            let bytes = datagram.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        match (datagram.first(), word(0), datagram.len()) {
            (_, Some(4), 32..) => word(4).map_or(Self::Unknown, |receiver| Self::Data { receiver }),
            (_, Some(1), 148) => Self::HandshakeInitiation,
            (_, Some(2), 92) => {
                word(8).map_or(Self::Unknown, |receiver| Self::HandshakeReply { receiver })
            }
            (_, Some(3), 64) => {
                word(4).map_or(Self::Unknown, |receiver| Self::HandshakeReply { receiver })
            }
            (Some(&disco::MAGIC), ..) => Self::Disco,
            (Some(&relay::DATA_MAGIC), ..) => Self::Relay,
            (Some(&relay::CONTROL_MAGIC), ..) => Self::RelayControl,
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wireguard_is_told_by_type_and_length() {
        let mut message = [0u8; 148];
        message[0] = 1;
        assert_eq!(PacketKind::classify(&message), PacketKind::HandshakeInitiation);
        assert_eq!(PacketKind::classify(&message[..147]), PacketKind::Unknown);
        message[0] = 4;
        message[4..8].copy_from_slice(&0x0102_0304_u32.to_le_bytes());
        assert_eq!(PacketKind::classify(&message), PacketKind::Data { receiver: 0x0102_0304 });
        message[1] = 1;
        assert_eq!(PacketKind::classify(&message), PacketKind::Unknown, "reserved bytes are zero");
    }

    #[test]
    fn short_datagrams_are_unknown_or_left_to_their_parser() {
        assert_eq!(PacketKind::classify(&[]), PacketKind::Unknown);
        assert_eq!(PacketKind::classify(&[4, 0, 0, 0]), PacketKind::Unknown);
        assert_eq!(PacketKind::classify(&[disco::MAGIC]), PacketKind::Disco);
        assert_eq!(PacketKind::classify(&[relay::DATA_MAGIC]), PacketKind::Relay);
    }
}
