//! Disco: the sealed probe messages by which two nodes find a path, outside WireGuard.
//!
//! ```text
//!  0      1      2      4            12                36
//! +------+------+------+------------+-----------------+---------------------+
//! | 0xB1 | 0x01 | zero |    tag     |      nonce      | sealed message, MAC |
//! +------+------+------+------------+-----------------+---------------------+
//! ```
//!
//! The key comes from the static-static X25519 of the two node keys, so it works before and
//! without a WireGuard session. The tag tells the receiver which peer this is from without naming
//! anybody to a listener, and differs per direction, so that a message cannot be reflected to its
//! sender. Sealing is XChaCha20-Poly1305 with a random nonce; header bytes are authenticated.
//!
//! Inside, the first byte is the type. Bytes behind the last field are ignored: they are padding
//! for path-MTU probes, or fields of a newer version.

use std::net::SocketAddr;

use blake2::digest::consts::U32;
use blake2::digest::{KeyInit, Mac};
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};

use super::cursor::{ENDPOINT_LEN, Reader, UnexpectedEnd, endpoint_bytes};
use super::punch::Punch;
use crate::types::{
    Candidate, CandidateKind, MAX_CANDIDATES, PublicKey, SecretKey, SizeCounts, TxId,
};

/// First byte of a disco packet.
pub const MAGIC: u8 = 0xB1;
const VERSION: u8 = 1;
const HEADER_LEN: usize = 12;
const NONCE_LEN: usize = 24;
const MAC_LEN: usize = 16;

/// Bytes that sealing adds to a message.
pub const OVERHEAD: usize = HEADER_LEN + NONCE_LEN + MAC_LEN;
/// A sealed ping without padding.
pub const PING_LEN: usize = OVERHEAD + 14;
/// The longest sealed pong.
pub const PONG_LEN: usize = OVERHEAD + 13 + ENDPOINT_LEN + COUNTS_LEN;

/// Bytes of the largest packet that is opened: more than any message needs, less than costs time.
pub const MAX_PACKET: usize = 9000;

/// In a ping: the sender answers a second session beside the first.
pub const TWO_LANES: u8 = 1;

/// Of the counts in a pong.
const COUNTS_LEN: usize = 4 * SizeCounts::CLASSES;

/// Whether this may be a ping that asks how long a datagram a path carries. Such a one is no part of a train:
/// a router judges a train by what it was cut from, and lets it pass where none of its datagrams would.
#[must_use]
pub fn travels_alone(datagram: &[u8]) -> bool {
    datagram.first() == Some(&MAGIC) && datagram.len() > PONG_LEN
}

const PING: u8 = 1;
const PONG: u8 = 2;
const CALL_ME_MAYBE: u8 = 3;
const PUNCH: u8 = 4;
const REPORT_REQUEST: u8 = 8;
const REPORT: u8 = 9;

/// Which peer a disco packet is from, as that pair of nodes writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub [u8; 8]);

/// Why a disco packet was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiscoError {
    /// Shorter than its header.
    #[error("disco packet too short")]
    TooShort,
    /// Longer than any message needs.
    #[error("disco packet too long")]
    TooLong,
    /// A version that we do not speak.
    #[error("unknown disco version {version}")]
    UnknownVersion {
        /// The version found.
        version: u8,
    },
    /// Not sealed by this peer for us.
    #[error("disco packet does not open")]
    Forged,
    /// Opened, but of an unknown type.
    #[error("unknown disco message type {kind}")]
    UnknownType {
        /// The type found.
        kind: u8,
    },
    /// Opened, but cut short.
    #[error("disco message ends too early")]
    Truncated,
}

impl From<UnexpectedEnd> for DiscoError {
    fn from(_: UnexpectedEnd) -> Self {
        Self::Truncated
    }
}

/// One disco message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// "Do you hear me on this path?" Answered by a pong on the path it came by.
    ///
    /// Layout: type 1, 12 bytes transaction id, one byte of what the sender can do, then padding.
    /// Older nodes send at most zeros behind the id, and can do nothing of it.
    Ping {
        /// Comes back in the pong.
        tx: TxId,
        /// What the sender can do: [`TWO_LANES`].
        able: u8,
        /// Zero bytes behind the message, to probe a path at a packet size.
        padding: u16,
    },
    /// The answer to a ping.
    ///
    /// Layout: type 2, 12 bytes transaction id, 16 bytes address and 2 bytes port that the ping
    /// came from (all zero when it came by relay); then, since 0.2, three times 4 bytes.
    Pong {
        /// Of the ping.
        tx: TxId,
        /// Where the ping came from, as the answering node saw it. It helps who reads a capture; no node
        /// acts on it, since a peer could name any address.
        observed: Option<SocketAddr>,
        /// How much data the answering node has got from the asking one on the path of the ping.
        arrived: Option<SizeCounts>,
    },
    /// "Here I may be reached, please probe now." Sent by relay.
    ///
    /// Layout: type 3, 8 bytes epoch, 1 byte count, then per candidate 1 byte kind, 16 bytes
    /// address, 2 bytes port.
    CallMeMaybe {
        /// Rises with every change; an older one than the last seen is ignored.
        epoch: u64,
        /// Where the sender may be reached.
        candidates: Vec<Candidate>,
    },
    /// "How do you see the ways between us?"
    ///
    /// Layout: type 8, 12 bytes transaction id.
    ReportRequest {
        /// Comes back in the report.
        tx: TxId,
    },
    /// The answer to a report request, on the path that the answering node's data takes.
    ///
    /// Layout: type 9, 12 bytes transaction id, then the CBOR of [`super::report::Report`].
    Report {
        /// Of the request.
        tx: TxId,
        /// To be read by [`super::report::Report::decode`].
        body: Vec<u8>,
    },
    /// Agreement on a costly way to punch. Sent by relay. Layout: type 4, then that of [`Punch`].
    Punch(Punch),
}

impl Message {
    /// A ping as short as it can be.
    #[must_use]
    pub fn ping(tx: TxId, able: u8) -> Self {
        Self::Ping { tx, able, padding: 0 }
    }

    /// A ping in a packet of `len` bytes, or of its own length where that is more.
    #[must_use]
    pub fn ping_of_len(tx: TxId, able: u8, len: u16) -> Self {
        let bare = u16::try_from(PING_LEN).unwrap_or(u16::MAX);
        Self::Ping { tx, able, padding: len.saturating_sub(bare) }
    }

    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Ping { tx, able, padding } => {
                let mut bytes = vec![PING];
                bytes.extend_from_slice(&tx.0);
                if *able != 0 || *padding != 0 {
                    bytes.push(*able);
                }
                bytes.resize(bytes.len() + usize::from(*padding), 0);
                bytes
            }
            Self::Pong { tx, observed, arrived } => {
                let mut bytes = vec![PONG];
                bytes.extend_from_slice(&tx.0);
                bytes.extend_from_slice(&observed.map_or([0; ENDPOINT_LEN], endpoint_bytes));
                for count in arrived.iter().flat_map(|counts| counts.0) {
                    bytes.extend_from_slice(&count.to_be_bytes());
                }
                bytes
            }
            Self::CallMeMaybe { epoch, candidates } => {
                let mut bytes = vec![CALL_ME_MAYBE];
                bytes.extend_from_slice(&epoch.to_be_bytes());
                let count = candidates.len().min(MAX_CANDIDATES);
                bytes.push(u8::try_from(count).unwrap_or(u8::MAX));
                for candidate in candidates.iter().take(count) {
                    bytes.push(candidate.kind.code());
                    bytes.extend_from_slice(&endpoint_bytes(candidate.endpoint));
                }
                bytes
            }
            Self::ReportRequest { tx } => {
                let mut bytes = vec![REPORT_REQUEST];
                bytes.extend_from_slice(&tx.0);
                bytes
            }
            Self::Report { tx, body } => {
                let mut bytes = vec![REPORT];
                bytes.extend_from_slice(&tx.0);
                bytes.extend_from_slice(body);
                bytes
            }
            Self::Punch(punch) => {
                let mut bytes = vec![PUNCH];
                punch.encode_into(&mut bytes);
                bytes
            }
        }
    }

    /// Reads what was sealed; bytes behind a message are ignored.
    ///
    /// # Errors
    /// When it is cut short or of no type that we know.
    pub fn decode(bytes: &[u8]) -> Result<Self, DiscoError> {
        let mut reader = Reader(bytes);
        match reader.u8()? {
            PING => {
                let tx = TxId(reader.array()?);
                let able = reader.u8().unwrap_or_default();
                let padding = u16::try_from(reader.0.len()).unwrap_or(u16::MAX);
                Ok(Self::Ping { tx, able, padding })
            }
            PONG => {
                let tx = TxId(reader.array()?);
                let observed = reader.endpoint()?;
                let observed = (observed.port() != 0).then_some(observed);
                // Older nodes do not count.
                let counts = reader.array::<COUNTS_LEN>().ok();
                let arrived = counts.map(|bytes| {
                    let (words, _) = bytes.as_chunks::<4>();
                    let count =
                        |class: usize| words.get(class).map_or(0, |it| u32::from_be_bytes(*it));
                    SizeCounts(std::array::from_fn(count))
                });
                Ok(Self::Pong { tx, observed, arrived })
            }
            CALL_ME_MAYBE => {
                let epoch = reader.u64()?;
                let count = usize::from(reader.u8()?).min(MAX_CANDIDATES);
                let mut candidates = Vec::with_capacity(count);
                for _ in 0..count {
                    let kind = CandidateKind::from_code(reader.u8()?);
                    candidates.push(Candidate::new(reader.endpoint()?, kind));
                }
                Ok(Self::CallMeMaybe { epoch, candidates })
            }
            REPORT_REQUEST => Ok(Self::ReportRequest { tx: TxId(reader.array()?) }),
            REPORT => {
                let tx = TxId(reader.array()?);
                Ok(Self::Report { tx, body: reader.0.to_vec() })
            }
            PUNCH => {
                let punch = Punch::decode(&mut reader)?;
                punch.map(Self::Punch).ok_or(DiscoError::UnknownType { kind: PUNCH })
            }
            kind => Err(DiscoError::UnknownType { kind }),
        }
    }
}

/// What two nodes need to seal and open each other's disco messages.
#[derive(Clone)]
pub struct DiscoKeys {
    cipher: XChaCha20Poly1305,
    tag_to_peer: Tag,
    tag_from_peer: Tag,
}

impl std::fmt::Debug for DiscoKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiscoKeys").finish_non_exhaustive()
    }
}

impl DiscoKeys {
    /// Derives the keys for the pair of `own` and `peer`; the peer derives the same.
    #[must_use]
    pub fn derive(own: &SecretKey, peer: &PublicKey) -> Self {
        let shared = own.shared_secret(peer);
        let own_public = own.public();
        let (low, high) =
            if own_public < *peer { (&own_public, peer) } else { (peer, &own_public) };
        let key = keyed_hash(&shared, &[b"overlay disco 1 key", &low.0, &high.0]);
        let tag = |from: &PublicKey| {
            let hash = keyed_hash(&shared, &[b"overlay disco 1 tag", &from.0]);
            let mut tag = [0; 8];
            tag.copy_from_slice(&hash[..8]);
            Tag(tag)
        };
        Self {
            cipher: XChaCha20Poly1305::new(&key.into()),
            tag_to_peer: tag(&own_public),
            tag_from_peer: tag(peer),
        }
    }

    /// The tag on packets that this peer sends to us.
    #[must_use]
    pub fn tag_from_peer(&self) -> Tag {
        self.tag_from_peer
    }

    /// Seals `message`. `nonce` must be random and is never used twice.
    #[must_use]
    pub fn seal(&self, message: &Message, nonce: [u8; NONCE_LEN]) -> Vec<u8> {
        let mut packet = Vec::with_capacity(OVERHEAD + 64);
        packet.extend_from_slice(&[MAGIC, VERSION, 0, 0]);
        packet.extend_from_slice(&self.tag_to_peer.0);
        let plain = message.encode();
        let sealed = self
            .cipher
            .encrypt(XNonce::from_slice(&nonce), Payload { msg: &plain, aad: &packet })
            .expect("a message of a few kilobytes can always be sealed");
        packet.extend_from_slice(&nonce);
        packet.extend_from_slice(&sealed);
        packet
    }

    /// Opens a packet of this peer.
    ///
    /// # Errors
    /// When it is not one, or holds no message that we know.
    pub fn open(&self, packet: &[u8]) -> Result<Message, DiscoError> {
        if packet.len() > MAX_PACKET {
            return Err(DiscoError::TooLong);
        }
        let (header, rest) = packet.split_at_checked(HEADER_LEN).ok_or(DiscoError::TooShort)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN).ok_or(DiscoError::TooShort)?;
        let plain = self
            .cipher
            .decrypt(XNonce::from_slice(nonce), Payload { msg: sealed, aad: header })
            .map_err(|_| DiscoError::Forged)?;
        Message::decode(&plain)
    }
}

/// The tag of a disco packet, to find the peer by before any crypto.
///
/// # Errors
/// When the packet is too short or of another version.
pub fn peek_tag(packet: &[u8]) -> Result<Tag, DiscoError> {
    let mut reader = Reader(packet);
    let (Ok(_magic), Ok(version), Ok(_zero)) = (reader.u8(), reader.u8(), reader.u16()) else {
        return Err(DiscoError::TooShort);
    };
    if version != VERSION {
        return Err(DiscoError::UnknownVersion { version });
    }
    reader.array().map(Tag).map_err(|_| DiscoError::TooShort)
}

fn keyed_hash(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = <blake2::Blake2sMac<U32> as KeyInit>::new(key.into());
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (DiscoKeys, DiscoKeys) {
        let (a, b) = (SecretKey::from_bytes([1; 32]), SecretKey::from_bytes([2; 32]));
        (DiscoKeys::derive(&a, &b.public()), DiscoKeys::derive(&b, &a.public()))
    }

    fn messages() -> Vec<Message> {
        let v4 = "203.0.113.7:41820".parse().unwrap();
        let v6 = "[2001:db8::7]:9".parse().unwrap();
        vec![
            Message::Ping { tx: TxId([3; 12]), able: 0, padding: 0 },
            Message::Ping { tx: TxId([3; 12]), able: 0, padding: 1200 },
            Message::ping(TxId([3; 12]), TWO_LANES),
            Message::Pong { tx: TxId([4; 12]), observed: Some(v4), arrived: None },
            Message::Pong {
                tx: TxId([4; 12]),
                observed: None,
                arrived: Some(SizeCounts([1, u32::MAX, 0x0102_0304])),
            },
            Message::CallMeMaybe {
                epoch: 7,
                candidates: vec![
                    Candidate::new(v4, CandidateKind::Reflexive),
                    Candidate::new(v6, CandidateKind::Host),
                ],
            },
            Message::ReportRequest { tx: TxId([5; 12]) },
            Message::Report { tx: TxId([5; 12]), body: vec![0xa0, 1, 2] },
        ]
    }

    #[test]
    fn what_one_node_seals_the_other_opens() {
        let (a, b) = pair();
        for message in messages() {
            let packet = a.seal(&message, [9; 24]);
            assert_eq!(peek_tag(&packet), Ok(b.tag_from_peer()));
            assert_eq!(b.open(&packet), Ok(message));
        }
    }

    #[test]
    fn a_message_cannot_be_reflected_to_its_sender() {
        let (a, b) = pair();
        let packet = a.seal(&messages()[0], [9; 24]);
        assert_ne!(peek_tag(&packet), Ok(a.tag_from_peer()));
        let mut turned = packet;
        turned[4..12].copy_from_slice(&a.tag_from_peer().0);
        assert_eq!(a.open(&turned), Err(DiscoError::Forged));
        assert_eq!(b.open(&turned), Err(DiscoError::Forged));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let (a, b) = pair();
        let packet = a.seal(&messages()[4], [9; 24]);
        for bit in 0..packet.len() * 8 {
            let mut bad = packet.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(b.open(&bad), Err(DiscoError::Forged), "bit {bit}");
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_protocol_document() {
        let (a, _) = pair();
        let packet = a.seal(&Message::Ping { tx: TxId([3; 12]), able: 0, padding: 0 }, [9; 24]);
        assert_eq!(packet.len(), PING_LEN - 1, "as older nodes send it");
        let observed = Some("192.0.2.1:1".parse().unwrap());
        let arrived = Some(SizeCounts::default());
        let pong = Message::Pong { tx: TxId([3; 12]), observed, arrived };
        assert_eq!(a.seal(&pong, [9; 24]).len(), PONG_LEN);
        let ping = Message::ping(TxId([3; 12]), TWO_LANES);
        assert_eq!(a.seal(&ping, [9; 24]).len(), PING_LEN);
        assert_eq!(
            data_encoding::HEXLOWER.encode(&packet),
            include_str!("../../tests/golden/disco-ping.hex").trim()
        );
    }

    #[test]
    fn a_ping_can_be_as_long_as_data() {
        let (a, _) = pair();
        for len in [PING_LEN, 100, 1_312, MAX_PACKET] {
            let ping = Message::ping_of_len(TxId([3; 12]), TWO_LANES, u16::try_from(len).unwrap());
            assert_eq!(a.seal(&ping, [9; 24]).len(), len);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(0u8.., 0..200)) {
            let (_, b) = pair();
            let _ = b.open(&bytes);
            let _ = peek_tag(&bytes);
            let _ = Message::decode(&bytes);
        }

        #[test]
        fn messages_survive(tx: [u8; 12], epoch: u64, port: u16, ip: u128, kind in 1u8..=6) {
            let ip = std::net::Ipv6Addr::from(ip);
            let endpoint = SocketAddr::new(ip.to_ipv4_mapped().map_or(ip.into(), Into::into), port);
            let candidate = Candidate::new(endpoint, CandidateKind::from_code(kind));
            for message in [
                Message::Ping { tx: TxId(tx), able: tx[0], padding: port % 1400 },
                Message::CallMeMaybe { epoch, candidates: vec![candidate] },
            ] {
                proptest::prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
            }
        }
    }
}
