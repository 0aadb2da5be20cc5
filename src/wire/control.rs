//! Messages on the control connection, as CBOR maps with numbered fields.
//!
//! The rule of change: numbers are never used again, new fields are `Option`, unknown fields are
//! skipped. A message is a record of optional parts rather than an enum, since a reader could not
//! skip an enum variant that it does not know. No message names its sender: that is the machine
//! key of the Noise session.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use minicbor::{Decode, Encode};

use crate::types::{Candidate, CandidateKind, MAX_CANDIDATES};
use crate::wire::filter::WireFilter;
use crate::wire::join::InviteSecret;

/// TCP and UDP port of a server, unless it is told otherwise.
pub const DEFAULT_PORT: u16 = 41820;
/// The only version of these messages so far.
pub const VERSION: u16 = 1;
/// The server sends a tick this often; a node that hears nothing for [`SILENCE_LIMIT_S`] reconnects.
pub const TICK_INTERVAL_S: u64 = 15;
/// So long before a membership ends, in seconds, everybody concerned is warned: 14 days.
pub const EXPIRY_WARNING_S: u64 = 14 * 86_400;
/// What a node names in one [`ClientMessage::find`] at the most.
pub const MAX_FIND: usize = 64;
/// A control connection that is silent for this long is dead: two ticks and some.
pub const SILENCE_LIMIT_S: u64 = 40;

/// From a node to the server.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct ClientMessage {
    /// The first message: who I am, and perhaps an invite.
    #[n(0)]
    pub hello: Option<Hello>,
    /// Where I may be reached.
    #[n(1)]
    pub candidates: Option<Vec<WireCandidate>>,
    /// Comes back in [`ServerMessage::pong`].
    #[n(2)]
    pub ping: Option<u64>,
    /// The epoch of a netmap that I have put into effect. Said of those that take something away.
    #[n(3)]
    pub applied: Option<u64>,
    /// My node key from now on; the one before it stays good until everybody has changed over.
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    pub node_key: Option<[u8; 32]>,
    /// Of a large network (see [`Hello::known`]): tell me of these peers, named by name, overlay
    /// address or id.
    #[n(10)]
    pub find: Option<Vec<String>>,
    /// I have not talked to these peers for long; I need not be told of them any more.
    #[n(11)]
    pub unused: Option<Vec<u32>>,
}

/// The first message of a node.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// Oldest version that this node speaks.
    #[n(0)]
    pub min_version: u16,
    /// Newest version that this node speaks.
    #[n(1)]
    pub max_version: u16,
    /// For logs: program and version.
    #[n(2)]
    pub software: String,
    /// The node key: WireGuard and disco.
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub node_key: [u8; 32],
    /// The wished name, or none to keep the one it has.
    #[n(4)]
    pub name: Option<String>,
    /// Only when joining.
    #[n(5)]
    pub invite: Option<InviteUse>,
    /// Where the node may be reached, so that peers can start at once.
    #[n(6)]
    pub candidates: Vec<WireCandidate>,
    /// A random number of this run of the program: two that take turns are two machines.
    #[n(7)]
    pub instance: Option<u64>,
    /// I can do with a part of a large network, and these are the peers that I know of it. None of
    /// an older node, which needs to be told of everybody.
    #[n(10)]
    pub known: Option<Vec<u32>>,
}

/// An invite being used.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct InviteUse {
    /// Which one.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub id: [u8; 4],
    /// Its secret.
    #[n(1)]
    pub secret: InviteSecret,
    /// The network in the join line.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub network: [u8; 8],
}

/// From the server to a node.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct ServerMessage {
    /// The answer to [`Hello`].
    #[n(0)]
    pub welcome: Option<Welcome>,
    /// The other answer to [`Hello`], or the end of a membership. The connection closes.
    #[n(1)]
    pub refused: Option<Refused>,
    /// The network as it is, or what has changed.
    #[n(2)]
    pub netmap: Option<NetmapUpdate>,
    /// Sent every [`TICK_INTERVAL_S`] seconds: the newest epoch.
    #[n(3)]
    pub tick: Option<u64>,
    /// Answer to [`ClientMessage::ping`].
    #[n(4)]
    pub pong: Option<u64>,
    /// Another machine has this node's keys and was turned away; it comes from there.
    #[n(5)]
    pub rival: Option<SocketAddr>,
    /// The node key of this node that has just been stored.
    #[n(6)]
    #[cbor(with = "minicbor::bytes")]
    pub node_key: Option<[u8; 32]>,
    /// How long this membership lasts; said with a welcome, instead of one to a node whose time is
    /// over, and when the end is another.
    #[n(7)]
    pub standing: Option<Standing>,
    /// Of what [`ClientMessage::find`] asked for, the texts that no node of the network fits.
    #[n(10)]
    pub unknown: Option<Vec<String>>,
    /// With a tick, to a node that is told of a part of the network: see [`NetmapUpdate::members`].
    #[n(11)]
    pub members: Option<u32>,
}

/// How long a membership lasts, by the server's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Standing {
    /// What time it is, in Unix seconds.
    #[n(0)]
    pub now: u64,
    /// When it ends or has ended, in Unix seconds; none for never.
    #[n(1)]
    pub expires: Option<u64>,
}

/// What a node is told about itself and the server.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct Welcome {
    /// The version to be spoken on this connection.
    #[n(0)]
    pub version: u16,
    /// The network's id.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub network: [u8; 8],
    /// The node's number.
    #[n(2)]
    pub id: u32,
    /// The node's name.
    #[n(3)]
    pub name: String,
    /// Its overlay addresses.
    #[n(4)]
    pub ipv4: Ipv4Addr,
    /// Its overlay addresses.
    #[n(5)]
    pub ipv6: Ipv6Addr,
    /// Prefix length of the overlay's IPv4 range.
    #[n(6)]
    pub ipv4_prefix_len: u8,
    /// Prefix length of the overlay's IPv6 range.
    #[n(7)]
    pub ipv6_prefix_len: u8,
    /// Proves binds at the relay, for as long as this connection is the newest one of the node.
    #[n(8)]
    #[cbor(with = "minicbor::bytes")]
    pub relay_key: [u8; 32],
    /// UDP port of relay and reflector, on the address that this connection goes to.
    #[n(9)]
    pub relay_port: Option<u16>,
    /// A second reflector port, to see how the NAT maps.
    #[n(10)]
    pub second_port: Option<u16>,
    /// Where this connection comes from, as the server sees it.
    #[n(11)]
    pub observed: Option<SocketAddr>,
    /// All addresses at which the server says it can be reached, for the next time.
    #[n(12)]
    pub server_addresses: Vec<String>,
}

/// Why a node is not let in.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct Refused {
    /// See [`RefusedCode`].
    #[n(0)]
    pub code: u8,
    /// A sentence for people.
    #[n(1)]
    pub message: String,
    /// A code that older nodes do not know, where `code` is the next best for them.
    #[n(2)]
    pub exact: Option<u8>,
}

impl Refused {
    /// Why, as exactly as this version knows it.
    #[must_use]
    pub fn reason(&self) -> RefusedCode {
        // What is not known counts as this one, which says nothing.
        let exact = self.exact.map(RefusedCode::from_code);
        exact
            .filter(|code| *code != RefusedCode::NotAccepted)
            .unwrap_or_else(|| RefusedCode::from_code(self.code))
    }
}

macro_rules! refused_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// Why a node is not let in.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum RefusedCode { $($(#[$doc])* $name,)* }

        impl RefusedCode {
            /// The number in [`Refused::code`].
            #[must_use]
            pub fn code(self) -> u8 {
                match self { $(Self::$name => $code,)* }
            }

            /// The code with this number; an unknown one counts as [`Self::NotAccepted`].
            #[must_use]
            pub fn from_code(code: u8) -> Self {
                match code { $($code => Self::$name,)* _ => Self::NotAccepted }
            }

            /// A sentence for people.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

refused_codes! {
    /// The invite is unknown or its secret is wrong: one answer for both, so nothing can be tried out.
    NotAccepted = 1, "the invite is not known to this server";
    /// The secret is right, its time is over.
    InviteExpired = 2, "the invite has expired";
    /// The secret is right, all its uses are used.
    InviteUsedUp = 3, "the invite was already used";
    /// The secret is right, somebody took the invite back.
    InviteRevoked = 4, "the invite was revoked";
    /// No invite, and the machine key is not that of a member.
    NotMember = 5, "this machine is not a member of the network (removed, or never joined)";
    /// Every address is taken.
    NetworkFull = 6, "the network's address range is full";
    /// No common version.
    Version = 7, "node and server have no protocol version in common";
    /// The server cannot write its store just now.
    Unavailable = 8, "the server cannot store the change just now";
    /// The join line is for another network.
    WrongNetwork = 9, "the join line is for another network";
    /// Another machine connected with this machine's key.
    Replaced = 10, "another connection of this machine took its place";
    /// What was sent makes no sense.
    BadRequest = 11, "the server did not understand the request";
    /// Two running machines have the same keys, and the other one is connected.
    Cloned = 12, "another machine has the keys of this one: a copied disk, container or state directory";
    /// More changes than are written down for one member; told to older nodes as [`Self::Unavailable`].
    TooOften = 13, "this machine has changed its key too often";
}

impl RefusedCode {
    /// Whether it is the invite that was presented which is of no use. Only who is no member hears
    /// that: nobody else needs one.
    #[must_use]
    pub fn is_about_the_invite(self) -> bool {
        matches!(
            self,
            Self::NotAccepted | Self::InviteExpired | Self::InviteUsedUp | Self::InviteRevoked
        )
    }
}

impl From<RefusedCode> for Refused {
    fn from(code: RefusedCode) -> Self {
        let message = code.text().into();
        match code {
            RefusedCode::TooOften => {
                Self { code: RefusedCode::Unavailable.code(), message, exact: Some(code.code()) }
            }
            _ => Self { code: code.code(), message, exact: None },
        }
    }
}

/// The network as it is, or what has changed.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct NetmapUpdate {
    /// The epoch that this is a change to; none when it is the whole netmap, and a peer that is
    /// not in it is gone.
    #[n(0)]
    pub from: Option<u64>,
    /// The epoch after it.
    #[n(1)]
    pub to: u64,
    /// New and changed peers.
    #[n(2)]
    pub peers: Vec<WirePeer>,
    /// Numbers of the peers that are gone.
    #[n(3)]
    pub removed: Vec<u32>,
    /// The receiver's own name, when it changed.
    #[n(4)]
    pub own_name: Option<String>,
    /// What the receiver lets in. None in a change when that is as before, and in a whole netmap
    /// when the network has no access rules.
    #[n(5)]
    pub filter: Option<WireFilter>,
    /// How many nodes the network has, when the receiver is told only of the peers that it uses.
    #[n(10)]
    pub members: Option<u32>,
    /// Numbers of peers that neither side uses any more: still members, no longer told of.
    #[n(11)]
    pub forgotten: Option<Vec<u32>>,
}

/// A peer as the server describes it.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct WirePeer {
    /// Its number.
    #[n(0)]
    pub id: u32,
    /// Its name.
    #[n(1)]
    pub name: String,
    /// Its node key.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub node_key: [u8; 32],
    /// Its overlay addresses.
    #[n(3)]
    pub ipv4: Ipv4Addr,
    /// Its overlay addresses.
    #[n(4)]
    pub ipv6: Ipv6Addr,
    /// Whether it has a control connection.
    #[n(5)]
    pub online: bool,
    /// Where it may be reached.
    #[n(6)]
    pub candidates: Vec<WireCandidate>,
    /// When its membership ends, in Unix seconds by the server's clock.
    #[n(7)]
    pub expires: Option<u64>,
}

/// A candidate in a control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct WireCandidate {
    /// See [`CandidateKind::code`].
    #[n(0)]
    pub kind: u8,
    /// Where.
    #[n(1)]
    pub endpoint: SocketAddr,
}

impl From<Candidate> for WireCandidate {
    fn from(candidate: Candidate) -> Self {
        Self { kind: candidate.kind.code(), endpoint: candidate.endpoint }
    }
}

/// The candidates of a message: capped, and only such as may be sent to.
#[must_use]
pub fn usable_candidates(candidates: &[WireCandidate]) -> Vec<Candidate> {
    candidates
        .iter()
        .filter(|candidate| crate::types::usable_underlay(candidate.endpoint))
        .take(MAX_CANDIDATES)
        .map(|candidate| {
            Candidate::new(candidate.endpoint, CandidateKind::from_code(candidate.kind))
        })
        .collect()
}

/// The bytes of a message.
#[must_use]
pub fn encode<M: Encode<()>>(message: &M) -> Vec<u8> {
    minicbor::to_vec(message).expect("encoding into memory cannot fail")
}

/// The message in `bytes`.
///
/// # Errors
/// When the bytes are not such a message; bytes behind it are ignored.
pub fn decode<'b, M: Decode<'b, ()>>(bytes: &'b [u8]) -> Result<M, minicbor::decode::Error> {
    minicbor::decode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> ClientMessage {
        ClientMessage {
            hello: Some(Hello {
                min_version: 1,
                max_version: 1,
                software: "overlay 0.1.0".into(),
                node_key: [7; 32],
                name: Some("bob".into()),
                invite: Some(InviteUse {
                    id: [1; 4],
                    secret: InviteSecret([2; 20]),
                    network: [3; 8],
                }),
                candidates: vec![WireCandidate {
                    kind: 1,
                    endpoint: "192.168.1.2:4000".parse().unwrap(),
                }],
                instance: None,
                known: None,
            }),
            ..ClientMessage::default()
        }
    }

    #[test]
    fn a_hello_survives_and_its_bytes_are_fixed() {
        let bytes = encode(&hello());
        assert_eq!(decode::<ClientMessage>(&bytes).unwrap(), hello());
        assert_eq!(
            data_encoding::HEXLOWER.encode(&bytes),
            include_str!("../../tests/golden/hello.hex").trim()
        );
    }

    #[test]
    fn fields_of_a_newer_version_are_skipped() {
        let mut encoder = minicbor::Encoder::new(Vec::new());
        encoder.map(2).unwrap().u8(2).unwrap().u64(5).unwrap();
        encoder.u8(200).unwrap().array(2).unwrap().str("new").unwrap().u8(1).unwrap();
        let message: ClientMessage = decode(&encoder.into_writer()).unwrap();
        assert_eq!(message, ClientMessage { ping: Some(5), ..ClientMessage::default() });
    }

    #[test]
    fn a_newer_code_is_told_beside_one_that_older_nodes_know() {
        let refused = Refused::from(RefusedCode::TooOften);
        assert_eq!(RefusedCode::from_code(refused.code), RefusedCode::Unavailable, "an older node");
        assert_eq!(refused.reason(), RefusedCode::TooOften);
        let newer = Refused { exact: Some(200), ..refused };
        assert_eq!(newer.reason(), RefusedCode::Unavailable, "a newer server's");
        assert_eq!(Refused::from(RefusedCode::Cloned).reason(), RefusedCode::Cloned);
    }

    #[test]
    fn endpoints_that_could_hurt_somebody_are_left_out() {
        let at = |text: &str| WireCandidate { kind: 1, endpoint: text.parse().unwrap() };
        let mut candidates = vec![at("127.0.0.1:22"), at("224.0.0.1:9"), at("192.168.1.2:4000")];
        candidates.extend((0..100u8).map(|i| at(&format!("10.0.0.{i}:1"))));
        let usable = usable_candidates(&candidates);
        assert_eq!(usable.len(), MAX_CANDIDATES);
        assert_eq!(usable[0].endpoint, "192.168.1.2:4000".parse().unwrap());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(0u8.., 0..300)) {
            let _ = decode::<ClientMessage>(&bytes);
            let _ = decode::<ServerMessage>(&bytes);
        }
    }
}
