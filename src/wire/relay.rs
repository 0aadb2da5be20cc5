//! Relay datagrams and the sign-on and reflector messages between a node and the server.
//!
//! Data, 8 bytes before the payload. `node` is whom it is for on the way to the server, and whom
//! it is from on the way to a node; the server changes these four bytes and nothing else, so a
//! train of equal-sized datagrams stays one.
//!
//! ```text
//!  0      1      2       3      4        8
//! +------+------+-------+------+--------+--------------------------+
//! | 0xB2 | 0x01 | flags | zero |  node  | payload: WireGuard, disco|
//! +------+------+-------+------+--------+--------------------------+
//! ```
//!
//! Flag 1, on the way to the server by a control connection, asks for the receiver's connection, too: the
//! datagram is longer than what UDP carries to it.
//!
//! Control, always 50 bytes, so an answer is never larger than its question and the server cannot
//! be used to amplify traffic to a forged source. Only a reflect may have any padding behind it: its
//! answer tells that a datagram of that size arrives.
//!
//! ```text
//!  0      1      2      3       4        8          16                    34        50
//! +------+------+------+-------+--------+----------+---------------------+---------+
//! | 0xB3 | 0x01 | type | flags |  node  | counter  | endpoint or zero    |  MAC    |
//! +------+------+------+-------+--------+----------+---------------------+---------+
//! ```
//!
//! *Bind* (1) tells the server at which address a node is; the MAC is keyed BLAKE2s over all that
//! stands before it, under the relay key that the control connection gave out, and the counter
//! must rise, so an old bind cannot be replayed from elsewhere. *Bound* (2) answers with the
//! address seen. What a node asks for with flag 2 in its bind, and what it may leave out, is a proof
//! of its address: then bound has flag 2 as well, and its last 16 bytes are a proof (8) and a MAC cut
//! to 8 bytes; the node says the proof in the first bytes of the endpoint field of its next binds.
//! Flag 4 in bound says that the server has none yet for this address.
//!
//! *Reflect* (3) and *Reflected* (4) tell anybody the address seen, unauthenticated: node and counter
//! together are the 12-byte transaction id, the MAC bytes are zero, and flag 1 asks for the answer
//! from the server's other port (RFC 5780 section 4.4: which filter has my NAT?). In the answer a
//! [`Token`] stands in the place of the MAC.
//! *Knock* (5) asks the server to send *knocked* (6) to another port of the address that the
//! question came from, written as an endpoint without address, and from a socket that the asker
//! never sent to: does the router let strangers in at that port?
//! Reflected addresses are written inverted, since some routers rewrite addresses that they find
//! in payloads (RFC 8489 section 14.2 has the same reason).

use std::net::{Ipv4Addr, SocketAddr};

use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};

use super::cursor::{ENDPOINT_LEN, Reader, UnexpectedEnd, endpoint_bytes};
use super::disco;
use crate::types::{NodeId, TxId};

/// First byte of a relay datagram.
pub const DATA_MAGIC: u8 = 0xB2;
/// First byte of a sign-on or reflector message.
pub const CONTROL_MAGIC: u8 = 0xB3;
/// Bytes before the payload of a relay datagram.
pub const DATA_HEADER_LEN: usize = 8;
/// Length of every sign-on and reflector message.
pub const CONTROL_LEN: usize = 50;

const VERSION: u8 = 1;
const FLAG_BY_LINK: u8 = 1;
const BIND: u8 = 1;
const BOUND: u8 = 2;
const REFLECT: u8 = 3;
const REFLECTED: u8 = 4;
const KNOCK: u8 = 5;
const KNOCKED: u8 = 6;
const FLAG_OTHER_PORT: u8 = 1;
const FLAG_PROOF: u8 = 2;
const FLAG_UNPROVED: u8 = 4;
const MAC_LEN: usize = 16;
/// Length of a token.
pub const TOKEN_LEN: usize = MAC_LEN;
/// Of a bound that carries a proof.
const SHORT_MAC_LEN: usize = 8;
/// Where the proof of a bound stands.
const PROOF_AT: usize = CONTROL_LEN - MAC_LEN;

/// Why a relay message was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RelayError {
    /// Cut short, or a control message of another length.
    #[error("relay message of wrong length")]
    WrongLength,
    /// A version that we do not speak.
    #[error("unknown relay version {version}")]
    UnknownVersion {
        /// The version found.
        version: u8,
    },
    /// An unknown type, or node number zero.
    #[error("unknown relay message type {kind}")]
    UnknownType {
        /// The type found.
        kind: u8,
    },
    /// The MAC does not fit the key.
    #[error("relay message with a wrong MAC")]
    Forged,
}

impl From<UnexpectedEnd> for RelayError {
    fn from(_: UnexpectedEnd) -> Self {
        Self::WrongLength
    }
}

/// The 8 bytes before a relayed payload.
#[must_use]
pub fn data_header(node: NodeId) -> [u8; DATA_HEADER_LEN] {
    let [a, b, c, d] = node.number().to_be_bytes();
    [DATA_MAGIC, VERSION, 0, 0, a, b, c, d]
}

/// The same on the way to the server, for what is to reach the node by its control connection.
#[must_use]
pub fn data_header_by_link(node: NodeId) -> [u8; DATA_HEADER_LEN] {
    let mut header = data_header(node);
    header[2] = FLAG_BY_LINK;
    header
}

/// Whether what is relayed is no part of a train, see [`disco::travels_alone`].
#[must_use]
pub fn travels_alone(datagram: &[u8]) -> bool {
    datagram.get(DATA_HEADER_LEN..).is_some_and(disco::travels_alone)
}

/// Whether a relay datagram is to reach its receiver by the control connection.
#[must_use]
pub fn asks_for_link(datagram: &[u8]) -> bool {
    datagram.get(2).is_some_and(|flags| flags & FLAG_BY_LINK != 0)
}

/// Splits a relay datagram into the node in its header and the payload.
///
/// # Errors
/// When it is too short, of another version, or names no node.
pub fn parse_data(datagram: &[u8]) -> Result<(NodeId, &[u8]), RelayError> {
    let mut reader = Reader(datagram);
    reader.u8()?;
    let version = reader.u8()?;
    if version != VERSION {
        return Err(RelayError::UnknownVersion { version });
    }
    reader.u16()?;
    let node = NodeId::new(reader.u32()?).ok_or(RelayError::UnknownType { kind: 0 })?;
    Ok((node, reader.0))
}

/// The key that proves a bind, given out on the control connection.
#[derive(Clone, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct RelayKey(pub [u8; 32]);

impl std::fmt::Debug for RelayKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RelayKey(***)")
    }
}

impl RelayKey {
    fn mac(&self, bytes: &[u8]) -> blake2::Blake2sMac<U16> {
        let mut mac = <blake2::Blake2sMac<U16> as KeyInit>::new((&self.0).into());
        mac.update(bytes);
        mac
    }
}

/// Said again in the first message of a control connection, it shows the server that this message is
/// no old recording. The bytes mean something to the server alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; TOKEN_LEN]);
/// What only who receives at an address knows: the server has told it there, and nowhere else. All
/// zero is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AddressProof(pub [u8; 8]);

/// A sign-on or reflector message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Node to server: here I am. Check with [`verify`] under the node's key.
    Bind {
        /// Who says so.
        node: NodeId,
        /// Rises with every bind under one key.
        counter: u64,
        /// The last one that was told; none from a node that cannot say it.
        proof: Option<AddressProof>,
    },
    /// Server to node: I saw you at `observed`. Check with [`verify`].
    Bound {
        /// The node.
        node: NodeId,
        /// Of the bind that is answered.
        counter: u64,
        /// Where the bind came from: the node's reflexive candidate.
        observed: SocketAddr,
        /// For who can say it in its next binds.
        proof: Option<Proving>,
    },
    /// Anybody to server: where do you see me?
    Reflect {
        /// Comes back in the answer.
        tx: TxId,
        /// Whether to answer from the server's other port.
        from_other_port: bool,
    },
    /// Server to anybody: there.
    Reflected {
        /// Of the question.
        tx: TxId,
        /// Where the question came from.
        observed: SocketAddr,
        /// For the control connection; a server of an older version gives none.
        token: Option<Token>,
    },
    /// Anybody to server: send to this port of my address.
    Knock {
        /// Comes back in the answer.
        tx: TxId,
        /// Of the address that the question comes from.
        port: u16,
    },
    /// Server to the port that it was asked to try.
    Knocked {
        /// Of the question.
        tx: TxId,
        /// Where this is sent to.
        at: SocketAddr,
    },
}

/// What a node is told about the proof of its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proving {
    /// To be said in the next binds.
    pub proof: AddressProof,
    /// The bind that this answers did not have it: another one is due.
    pub wanted: bool,
}

impl Control {
    /// The 50 bytes of this message. Bind and bound need the node's `key`, the others have none.
    #[must_use]
    pub fn encode(&self, key: Option<&RelayKey>) -> [u8; CONTROL_LEN] {
        let zero = [0; ENDPOINT_LEN];
        let (kind, flags, id, endpoint) = match *self {
            Self::Bind { node, counter, proof } => {
                let mut field = zero;
                field[..8].copy_from_slice(&proof.unwrap_or_default().0);
                let flags = if proof.is_some() { FLAG_PROOF } else { 0 };
                (BIND, flags, node_id_bytes(node, counter), field)
            }
            Self::Bound { node, counter, observed, proof } => {
                let flags = match proof {
                    None => 0,
                    Some(Proving { wanted: false, .. }) => FLAG_PROOF,
                    Some(Proving { wanted: true, .. }) => FLAG_PROOF | FLAG_UNPROVED,
                };
                (BOUND, flags, node_id_bytes(node, counter), inverted(observed))
            }
            Self::Reflect { tx, from_other_port } => {
                (REFLECT, if from_other_port { FLAG_OTHER_PORT } else { 0 }, tx.0, zero)
            }
            Self::Reflected { tx, observed, .. } => (REFLECTED, 0, tx.0, inverted(observed)),
            Self::Knock { tx, port } => {
                (KNOCK, 0, tx.0, inverted((Ipv4Addr::UNSPECIFIED, port).into()))
            }
            Self::Knocked { tx, at } => (KNOCKED, 0, tx.0, inverted(at)),
        };
        let mut bytes = [0; CONTROL_LEN];
        bytes[..4].copy_from_slice(&[CONTROL_MAGIC, VERSION, kind, flags]);
        bytes[4..16].copy_from_slice(&id);
        bytes[16..34].copy_from_slice(&endpoint);
        if let Self::Reflected { token: Some(token), .. } = self {
            bytes[CONTROL_LEN - MAC_LEN..].copy_from_slice(&token.0);
        }
        if let Self::Bound { proof: Some(Proving { proof, .. }), .. } = self {
            bytes[PROOF_AT..PROOF_AT + 8].copy_from_slice(&proof.0);
        }
        if let Some(key) = key {
            let at = CONTROL_LEN - mac_len(&bytes);
            let mac = key.mac(&bytes[..at]).finalize().into_bytes();
            bytes[at..].copy_from_slice(&mac[..CONTROL_LEN - at]);
        }
        bytes
    }

    /// Reads a message. The MAC is not checked here, see [`verify`].
    ///
    /// # Errors
    /// When the length, version or type is not one of ours.
    pub fn parse(datagram: &[u8]) -> Result<Self, RelayError> {
        let padded = datagram.len() > CONTROL_LEN && datagram.get(2) == Some(&REFLECT);
        if datagram.len() != CONTROL_LEN && !padded {
            return Err(RelayError::WrongLength);
        }
        let mut reader = Reader(datagram);
        reader.u8()?;
        let version = reader.u8()?;
        if version != VERSION {
            return Err(RelayError::UnknownVersion { version });
        }
        let kind = reader.u8()?;
        let flags = reader.u8()?;
        let id: [u8; 12] = reader.array()?;
        let field: [u8; ENDPOINT_LEN] = reader.array()?;
        let tail: [u8; MAC_LEN] = reader.array()?;
        let told = AddressProof(Reader(&tail).array()?);
        let said = AddressProof(Reader(&field).array()?);
        let proves = flags & FLAG_PROOF != 0;
        let endpoint = invert(field);
        let mut id_reader = Reader(&id);
        let node = NodeId::new(id_reader.u32()?);
        let counter = id_reader.u64()?;
        let observed = Reader(&endpoint).endpoint()?;
        let token = (tail != [0; TOKEN_LEN]).then_some(Token(tail));
        match (kind, node) {
            (BIND, Some(node)) => Ok(Self::Bind { node, counter, proof: proves.then_some(said) }),
            (BOUND, Some(node)) => {
                let wanted = flags & FLAG_UNPROVED != 0;
                let proof = proves.then_some(Proving { proof: told, wanted });
                Ok(Self::Bound { node, counter, observed, proof })
            }
            (REFLECT, _) => {
                Ok(Self::Reflect { tx: TxId(id), from_other_port: flags & FLAG_OTHER_PORT != 0 })
            }
            (REFLECTED, _) => Ok(Self::Reflected { tx: TxId(id), observed, token }),
            (KNOCK, _) => Ok(Self::Knock { tx: TxId(id), port: observed.port() }),
            (KNOCKED, _) => Ok(Self::Knocked { tx: TxId(id), at: observed }),
            _ => Err(RelayError::UnknownType { kind }),
        }
    }
}

/// Checks the MAC of a bind or bound message, in constant time.
///
/// # Errors
/// When it was not made with this key.
pub fn verify(datagram: &[u8], key: &RelayKey) -> Result<(), RelayError> {
    let at = CONTROL_LEN - mac_len(datagram);
    let (head, mac) = datagram.split_at_checked(at).ok_or(RelayError::WrongLength)?;
    if mac.len() != CONTROL_LEN - at {
        return Err(RelayError::WrongLength);
    }
    key.mac(head).verify_truncated_left(mac).map_err(|_| RelayError::Forged)
}

fn mac_len(datagram: &[u8]) -> usize {
    match datagram {
        [_, _, BOUND, flags, ..] if flags & FLAG_PROOF != 0 => SHORT_MAC_LEN,
        _ => MAC_LEN,
    }
}

fn node_id_bytes(node: NodeId, counter: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&node.number().to_be_bytes());
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    bytes
}

fn invert(bytes: [u8; ENDPOINT_LEN]) -> [u8; ENDPOINT_LEN] {
    bytes.map(|byte| !byte)
}

fn inverted(endpoint: SocketAddr) -> [u8; ENDPOINT_LEN] {
    invert(endpoint_bytes(endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeId {
        NodeId::new(0x0102_0304).unwrap()
    }

    fn proving(wanted: bool) -> Proving {
        Proving { proof: AddressProof([8; 8]), wanted }
    }

    #[test]
    fn a_relay_header_survives_and_keeps_the_payload() {
        let mut datagram = data_header(node()).to_vec();
        datagram.extend_from_slice(b"payload");
        assert_eq!(parse_data(&datagram), Ok((node(), b"payload".as_slice())));
        assert_eq!(data_header(node()), [0xb2, 1, 0, 0, 1, 2, 3, 4]);
        for len in 0..DATA_HEADER_LEN {
            assert!(parse_data(&datagram[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn control_messages_survive_and_are_all_of_one_length() {
        let observed = "203.0.113.9:1234".parse().unwrap();
        let key = RelayKey([5; 32]);
        for message in [
            Control::Bind { node: node(), counter: 7, proof: None },
            Control::Bind { node: node(), counter: 7, proof: Some(AddressProof([9; 8])) },
            Control::Bound { node: node(), counter: 7, observed, proof: None },
            Control::Bound { node: node(), counter: 7, observed, proof: Some(proving(true)) },
            Control::Bound { node: node(), counter: 7, observed, proof: Some(proving(false)) },
            Control::Reflect { tx: TxId([1; 12]), from_other_port: true },
            Control::Knock { tx: TxId([1; 12]), port: 7 },
            Control::Knocked { tx: TxId([1; 12]), at: observed },
        ] {
            assert_eq!(Control::parse(&message.encode(Some(&key))), Ok(message));
        }
        for token in [None, Some(Token([7; TOKEN_LEN]))] {
            let message = Control::Reflected { tx: TxId([1; 12]), observed, token };
            assert_eq!(Control::parse(&message.encode(None)), Ok(message));
        }
    }

    #[test]
    fn only_a_reflect_question_may_be_padded() {
        let question = Control::Reflect { tx: TxId([1; 12]), from_other_port: false };
        let observed = "203.0.113.9:1".parse().unwrap();
        let answer = Control::Reflected { tx: TxId([1; 12]), observed, token: None };
        let bind = Control::Bind { node: node(), counter: 7, proof: None };
        let padded = |message: Control| [&message.encode(None)[..], &[0; 1400]].concat();
        assert_eq!(Control::parse(&padded(question)), Ok(question));
        for message in [answer, bind] {
            assert_eq!(Control::parse(&padded(message)), Err(RelayError::WrongLength));
        }
    }

    #[test]
    fn an_answer_with_a_token_reads_as_it_is_written_down() {
        let message = Control::Reflected {
            tx: TxId([0x11; 12]),
            observed: "203.0.113.9:1234".parse().unwrap(),
            token: Some(Token([0x22; TOKEN_LEN])),
        };
        let golden = include_str!("../../tests/golden/reflected.hex").trim();
        assert_eq!(data_encoding::HEXLOWER.encode(&message.encode(None)), golden);
    }

    #[test]
    fn a_bind_or_bound_under_another_key_or_with_a_changed_byte_is_forged() {
        let key = RelayKey([5; 32]);
        let observed = "203.0.113.9:1234".parse().unwrap();
        for message in [
            Control::Bind { node: node(), counter: 7, proof: None },
            Control::Bind { node: node(), counter: 7, proof: Some(AddressProof([9; 8])) },
            Control::Bound { node: node(), counter: 7, observed, proof: None },
            Control::Bound { node: node(), counter: 7, observed, proof: Some(proving(true)) },
        ] {
            let bytes = message.encode(Some(&key));
            assert_eq!(verify(&bytes, &key), Ok(()));
            assert_eq!(verify(&bytes, &RelayKey([6; 32])), Err(RelayError::Forged));
            for at in 0..CONTROL_LEN {
                let mut changed = bytes;
                changed[at] ^= 2;
                assert!(verify(&changed, &key).is_err(), "{message:?}, byte {at}");
            }
        }
        assert_eq!(verify(&[0xb3; 20], &key), Err(RelayError::WrongLength));
        assert_eq!(verify(&[0xb3; 60], &key), Err(RelayError::WrongLength));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(0u8.., 0..80)) {
            let _ = parse_data(&bytes);
            let _ = Control::parse(&bytes);
            let _ = verify(&bytes, &RelayKey([0; 32]));
        }
    }
}
