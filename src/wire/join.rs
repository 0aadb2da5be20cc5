//! The join line: the one string that lets a node in.
//!
//! `ovl1_` and base32 (RFC 4648, lower case, no padding) of a CBOR record and the first four bytes
//! of its BLAKE2s hash. It pins the server's static key, so neither CA nor domain nor clock is
//! needed to trust the first byte.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use blake2::{Blake2s256, Digest};
use data_encoding::{BASE32_NOPAD, BASE64};
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::types::{InviteId, NetworkId, PublicKey};

/// What every join line starts with; the digit is the version of the record.
pub const PREFIX: &str = "ovl1_";

/// `text` with what follows the start of a join line, in whichever case, taken out: a line that was typed
/// in the wrong place is not to be printed or logged with its secret.
#[must_use]
pub fn without_lines(text: &str) -> String {
    let (small, mut told, mut at) = (text.to_ascii_lowercase(), String::new(), 0);
    while let Some(found) = small[at..].find(PREFIX) {
        let body = at + found + PREFIX.len();
        told += &text[at..body];
        let rest = &text[body..];
        let length =
            rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        if length > 0 {
            told += "...";
        }
        at = body + length;
    }
    told + &text[at..]
}
const CHECKSUM_LEN: usize = 4;
/// A join line holds at most this many server addresses.
pub const MAX_ADDRESSES: usize = 16;

/// Why a text is no join line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// No `ovl1_` at the front.
    #[error("a join line starts with \"ovl1_\"")]
    NoPrefix,
    /// `ovl` and another version.
    #[error("this join line is of version {version}, this program knows version 1")]
    Version {
        /// The version found.
        version: String,
    },
    /// Not the alphabet.
    #[error("the join line holds a character that cannot be in one (position {position})")]
    BadCharacter {
        /// Counted from 1, prefix included.
        position: usize,
    },
    /// Cut off, or a character wrong.
    #[error("the checksum of the join line does not fit: it was cut off or changed")]
    Checksum,
    /// The checksum is right and the content is not: a newer or broken program made it.
    #[error("the join line cannot be read: {reason}")]
    Content {
        /// What is wrong.
        reason: String,
    },
}

/// Where a server is: an IP address, or a name that is looked up when connecting.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerAddr {
    /// An address in literal form or a DNS name.
    pub host: String,
    /// TCP and UDP.
    pub port: u16,
}

/// A text that is no server address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not HOST or HOST:PORT (an IPv6 address with a port is written [ADDR]:PORT)")]
pub struct ServerAddrError(String);

impl ServerAddr {
    /// Reads `HOST` or `HOST:PORT`; without a port, `default_port`.
    ///
    /// # Errors
    /// When the host is empty or not a name or address, or the port is no number.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, ServerAddrError> {
        let error = || ServerAddrError(text.to_string());
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return Ok(Self { host: addr.ip().to_string(), port: addr.port() });
        }
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Ok(Self { host: ip.to_string(), port: default_port });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| error())?),
            None => (text, default_port),
        };
        let label_ok = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        let name_ok = host.len() <= 253
            && host.trim_end_matches('.').split('.').all(label_ok)
            && !host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        if name_ok && port != 0 { Ok(Self { host: host.into(), port }) } else { Err(error()) }
    }

    /// The address, when the host is one in literal form.
    #[must_use]
    pub fn literal(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.host.parse().ok()?, self.port))
    }
}

impl From<SocketAddr> for ServerAddr {
    fn from(addr: SocketAddr) -> Self {
        Self { host: addr.ip().to_string(), port: addr.port() }
    }
}

impl fmt::Display for ServerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.literal() {
            Some(addr) => addr.fmt(f),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl FromStr for ServerAddr {
    type Err = ServerAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text, crate::wire::control::DEFAULT_PORT)
    }
}

impl TryFrom<String> for ServerAddr {
    type Error = ServerAddrError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ServerAddr> for String {
    fn from(addr: ServerAddr) -> Self {
        addr.to_string()
    }
}

/// Proof that somebody was invited. Never logged.
#[derive(Clone, PartialEq, Eq, Encode, Decode, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
#[cbor(transparent)]
pub struct InviteSecret(
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub [u8; 20],
);

impl InviteSecret {
    /// What the server keeps of it. A fast hash is enough: the secret is 160 random bits.
    #[must_use]
    pub fn hash(&self) -> String {
        BASE64.encode(&Blake2s256::digest(self.0))
    }
}

impl fmt::Debug for InviteSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InviteSecret(***)")
    }
}

/// The content of a join line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinLine {
    /// The network.
    pub network: NetworkId,
    /// The server's static key.
    pub server_key: PublicKey,
    /// The key that will follow it, when the server has one ready.
    pub next_server_key: Option<PublicKey>,
    /// Where the server is, best first.
    pub addresses: Vec<ServerAddr>,
    /// Which invite.
    pub invite: InviteId,
    /// Its secret.
    pub secret: InviteSecret,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Record {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    network: [u8; 8],
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    server_key: [u8; 32],
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    next_server_key: Option<[u8; 32]>,
    #[n(3)]
    addresses: Vec<String>,
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    invite: [u8; 4],
    #[n(5)]
    secret: InviteSecret,
}

impl JoinLine {
    /// The text to hand over. It is a secret until it is used up.
    #[must_use]
    pub fn expose(&self) -> Zeroizing<String> {
        let record = Record {
            network: self.network.0,
            server_key: self.server_key.0,
            next_server_key: self.next_server_key.map(|key| key.0),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            invite: self.invite.0,
            secret: self.secret.clone(),
        };
        let mut bytes =
            Zeroizing::new(minicbor::to_vec(&record).expect("encoding into memory cannot fail"));
        let checksum = checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        Zeroizing::new(format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase()))
    }
}

impl FromStr for JoinLine {
    type Err = JoinError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).ok_or_else(|| {
            let version = text.strip_prefix("ovl").and_then(|rest| rest.split_once('_'));
            version.map_or(JoinError::NoPrefix, |(version, _)| JoinError::Version {
                version: version.chars().take(8).collect(),
            })
        })?;
        let bad = body.bytes().position(|b| !matches!(b, b'a'..=b'z' | b'A'..=b'Z' | b'2'..=b'7'));
        if let Some(at) = bad {
            return Err(JoinError::BadCharacter { position: PREFIX.len() + at + 1 });
        }
        let bytes = BASE32_NOPAD
            .decode(body.to_ascii_uppercase().as_bytes())
            .map(Zeroizing::new)
            .map_err(|_| JoinError::Checksum)?;
        let (record, sum) = bytes
            .len()
            .checked_sub(CHECKSUM_LEN)
            .and_then(|at| bytes.split_at_checked(at))
            .ok_or(JoinError::Checksum)?;
        if sum != checksum(record) {
            return Err(JoinError::Checksum);
        }
        let content = |reason: String| JoinError::Content { reason };
        let record: Record =
            minicbor::decode(record).map_err(|error| content(error.to_string()))?;
        let addresses = record
            .addresses
            .iter()
            .take(MAX_ADDRESSES)
            .map(|address| address.parse())
            .collect::<Result<Vec<ServerAddr>, _>>()
            .map_err(|error| content(error.to_string()))?;
        if addresses.is_empty() {
            return Err(content("it names no server address".into()));
        }
        Ok(Self {
            network: NetworkId(record.network),
            server_key: PublicKey(record.server_key),
            next_server_key: record.next_server_key.map(PublicKey),
            addresses,
            invite: InviteId(record.invite),
            secret: record.secret,
        })
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
    let hash = Blake2s256::digest(bytes);
    [hash[0], hash[1], hash[2], hash[3]]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> JoinLine {
        JoinLine {
            network: NetworkId([1; 8]),
            server_key: PublicKey([2; 32]),
            next_server_key: None,
            addresses: vec!["203.0.113.1".parse().unwrap(), "[2001:db8::1]:443".parse().unwrap()],
            invite: InviteId([3; 4]),
            secret: InviteSecret([4; 20]),
        }
    }

    #[test]
    fn a_line_in_a_text_keeps_its_start_only() {
        for (text, told) in [
            ("unexpected 'ovl1_abc2' found", "unexpected 'ovl1_...' found"),
            ("x=OVL1_AbC ovl1_d\novl1_", "x=OVL1_... ovl1_...\novl1_"),
            ("starts with \"ovl1_\"", "starts with \"ovl1_\""),
            ("\u{e4}ovl1_aovl1_b\u{e4}", "\u{e4}ovl1_...\u{e4}"),
            ("none", "none"),
        ] {
            assert_eq!(without_lines(text), told, "{text}");
        }
    }

    #[test]
    fn a_join_line_survives_and_is_one_token() {
        let text = line().expose();
        assert!(text.starts_with(PREFIX) && !text.contains(char::is_whitespace));
        assert_eq!(text.parse(), Ok(line()));
        assert_eq!(format!("  {}\n", *text).parse(), Ok(line()), "pasted with white space");
        assert_eq!(*text, include_str!("../../tests/golden/join-line.txt").trim());
    }

    #[test]
    fn every_cut_and_every_changed_character_is_noticed() {
        let text = line().expose();
        for len in 0..text.len() {
            assert!(text[..len].parse::<JoinLine>().is_err(), "cut to {len}");
        }
        for at in PREFIX.len()..text.len() {
            let mut bad = text.as_bytes().to_vec();
            bad[at] = if bad[at] == b'a' { b'b' } else { b'a' };
            let parsed = String::from_utf8(bad).unwrap().parse::<JoinLine>();
            assert!(parsed.is_err(), "changed at {at}");
        }
    }

    #[test]
    fn errors_say_what_is_wrong() {
        assert_eq!("hello".parse::<JoinLine>(), Err(JoinError::NoPrefix));
        assert_eq!("ovl9_aa".parse::<JoinLine>(), Err(JoinError::Version { version: "9".into() }));
        assert_eq!("ovl1_a!".parse::<JoinLine>(), Err(JoinError::BadCharacter { position: 7 }));
        assert_eq!("ovl1_aaaaaaaa".parse::<JoinLine>(), Err(JoinError::Checksum));
    }

    #[test]
    fn server_addresses_are_names_or_literals() {
        for (text, shown) in [
            ("203.0.113.1", "203.0.113.1:41820"),
            ("203.0.113.1:443", "203.0.113.1:443"),
            ("2001:db8::1", "[2001:db8::1]:41820"),
            ("[2001:db8::1]:443", "[2001:db8::1]:443"),
            ("vpn.example.org:443", "vpn.example.org:443"),
        ] {
            assert_eq!(text.parse::<ServerAddr>().unwrap().to_string(), shown);
        }
        for bad in ["", ":1", "a b", "host:0", "host:99999", "1.2.3", "a..b", "http://x"] {
            assert!(bad.parse::<ServerAddr>().is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,80}", body in "[a-z2-7]{0,200}") {
            let _ = text.parse::<JoinLine>();
            let _ = format!("{PREFIX}{body}").parse::<JoinLine>();
            let _ = text.parse::<ServerAddr>();
        }
    }
}
