//! X25519 keys. A secret key has no printed form of its own and is wiped when dropped.
//!
//! A machine has two: the *machine key* (its identity on the control connection) and the *node
//! key* (WireGuard and disco). Fields say which one they hold.

use std::fmt;
use std::str::FromStr;

use boringtun::x25519;
use data_encoding::BASE64;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// A text that is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a key: want 32 bytes in base64 (44 characters)")]
pub struct KeyError;

/// The public half of an X25519 key pair.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// The first eight characters: enough to tell keys apart in a log.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..8].to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.short())
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        decode(text).map(|bytes| Self(*bytes))
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

/// The secret half of an X25519 key pair.
#[derive(Clone)]
pub struct SecretKey(x25519::StaticSecret);

impl SecretKey {
    /// The key made of these bytes (clamped when used, as RFC 7748 says).
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(x25519::StaticSecret::from(bytes))
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.0).to_bytes())
    }

    /// The secret that only the holders of the two keys can compute (RFC 7748 section 6.1).
    ///
    /// All zero when `peer` is a point of small order: callers use it only as input of a key
    /// derivation that also binds both public keys.
    #[must_use]
    pub fn shared_secret(&self, peer: &PublicKey) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.diffie_hellman(&x25519::PublicKey::from(peer.0)).to_bytes())
    }

    /// The bytes, for the state file and for the crypto libraries. Never for a log.
    #[must_use]
    pub fn expose(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// The form in the state file: base64.
    #[must_use]
    pub fn expose_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(BASE64.encode(&*self.expose()))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(***)")
    }
}

impl FromStr for SecretKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        decode(text).map(|bytes| Self::from_bytes(*bytes))
    }
}

fn decode(text: &str) -> Result<Zeroizing<[u8; 32]>, KeyError> {
    let bytes = Zeroizing::new(BASE64.decode(text.as_bytes()).map_err(|_| KeyError)?);
    Ok(Zeroizing::new(bytes.as_slice().try_into().map_err(|_| KeyError)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_compute_the_same_secret() {
        let (a, b) = (SecretKey::from_bytes([1; 32]), SecretKey::from_bytes([2; 32]));
        assert_eq!(*a.shared_secret(&b.public()), *b.shared_secret(&a.public()));
    }

    #[test]
    fn a_secret_key_is_never_printed() {
        let key = SecretKey::from_bytes([7; 32]);
        assert_eq!(format!("{key:?}"), "SecretKey(***)");
    }

    #[test]
    fn keys_survive_base64() {
        let key = SecretKey::from_bytes([9; 32]);
        let copy: SecretKey = key.expose_base64().parse().unwrap();
        assert_eq!(copy.public(), key.public());
        assert_eq!(key.public().to_string().parse(), Ok(key.public()));
        assert!("AAAA".parse::<PublicKey>().is_err());
    }
}
