//! Frames of the control connection.
//!
//! After the HTTP upgrade the stream is a row of Noise messages (Noise_IK_25519_ChaChaPoly_BLAKE2s),
//! each with its length before it. Inside a decrypted message the first byte is the frame type.
//!
//! ```text
//!  0        2                                    0      1
//! +--------+------------------------+           +------+------------------------+
//! | length | Noise message          |  holds    | type | body                   |
//! +--------+------------------------+           +------+------------------------+
//! ```
//!
//! A control message longer than one frame is cut: all parts but the last have type *more*.

use super::relay::Token;

/// The protocol name in the HTTP `Upgrade` header.
pub const UPGRADE_PROTOCOL: &str = "overlay-control";
/// The HTTP path of the control connection.
pub const UPGRADE_PATH: &str = "/overlay";
/// The HTTP header that carries the first Noise message, in base64url, in both directions.
pub const HANDSHAKE_HEADER: &str = "overlay-handshake";
/// The Noise pattern of the control connection.
pub const NOISE_PATTERN: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
/// Mixed into the handshake by both sides, so that nobody between them can talk the version down.
pub const NOISE_PROLOGUE: &[u8] = b"overlay control 1";

/// Bytes of the largest hello in a first Noise message: the HTTP header that it is in has to have 8 KiB at most.
pub const MAX_EARLY_HELLO: usize = 4096;
/// In the second Noise message: the hello in the first one counts.
pub const EARLY_TAKEN: &[u8] = &[1];

/// Bytes of the length before a Noise message.
pub const LENGTH_LEN: usize = 2;
/// Bytes that Noise adds to a message.
pub const MAC_LEN: usize = 16;
/// Bytes of the largest body of one frame: what a Noise message can hold, less type and MAC.
pub const MAX_BODY: usize = 65_535 - MAC_LEN - 1;
/// Bytes of the largest control message: the netmap of a network of ten thousand nodes.
pub const MAX_MESSAGE: usize = 4 << 20;
/// The same for what a node says, who may be a stranger: a hello has some hundred bytes.
pub const MAX_CLIENT_MESSAGE: usize = 64 << 10;

const CONTROL_LAST: u8 = 1;
const CONTROL_MORE: u8 = 2;
const RELAY: u8 = 3;

/// What the first Noise message may hold, so that the server can act on it at once: a token of the
/// server's reflector, and behind it the hello as it would be in the first frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Early<'a> {
    /// Shows that the message is new.
    pub token: Token,
    /// An encoded control message.
    pub hello: &'a [u8],
}

impl<'a> Early<'a> {
    /// Reads the payload of a first Noise message; most are empty.
    #[must_use]
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let (token, hello) = payload.split_first_chunk()?;
        Some(Self { token: Token(*token), hello })
    }

    /// The payload, unless the hello is too long for it.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let fits = self.hello.len() <= MAX_EARLY_HELLO;
        fits.then(|| [&self.token.0, self.hello].concat())
    }
}

/// What one decrypted frame holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The last or only part of a control message.
    ControlLast(&'a [u8]),
    /// A part of a control message that is not the last.
    ControlMore(&'a [u8]),
    /// A relay datagram, as it would be on UDP.
    Relay(&'a [u8]),
}

/// Why a frame was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No type byte.
    #[error("empty frame")]
    Empty,
    /// The parts of one message add up to too much.
    #[error("control message of more bytes than there may be")]
    TooLarge,
}

impl<'a> Frame<'a> {
    /// Reads a decrypted frame. `None` is a type of a newer version, to be ignored.
    ///
    /// # Errors
    /// When there is no type byte.
    pub fn parse(plain: &'a [u8]) -> Result<Option<Self>, FrameError> {
        let (kind, body) = plain.split_first().ok_or(FrameError::Empty)?;
        Ok(match *kind {
            CONTROL_LAST => Some(Self::ControlLast(body)),
            CONTROL_MORE => Some(Self::ControlMore(body)),
            RELAY => Some(Self::Relay(body)),
            _ => None,
        })
    }

    /// The bytes to encrypt. The body must not be longer than [`MAX_BODY`].
    pub fn encode_into(&self, plain: &mut Vec<u8>) {
        let (kind, body) = match self {
            Self::ControlLast(body) => (CONTROL_LAST, body),
            Self::ControlMore(body) => (CONTROL_MORE, body),
            Self::Relay(body) => (RELAY, body),
        };
        plain.clear();
        plain.push(kind);
        plain.extend_from_slice(body);
    }
}

/// Cuts an encoded control message into frames.
pub fn split_control(message: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    let parts = message.len().div_ceil(MAX_BODY).max(1);
    (0..parts).map(move |part| {
        let end = ((part + 1) * MAX_BODY).min(message.len());
        let body = &message[part * MAX_BODY..end];
        if part + 1 == parts { Frame::ControlLast(body) } else { Frame::ControlMore(body) }
    })
}

/// Puts control messages together again.
#[derive(Debug)]
pub struct Assembler {
    parts: Vec<u8>,
    limit: usize,
}

impl Default for Assembler {
    fn default() -> Self {
        Self::with_limit(MAX_MESSAGE)
    }
}

impl Assembler {
    /// One for messages of at most so many bytes.
    #[must_use]
    pub fn with_limit(limit: usize) -> Self {
        Self { parts: Vec::new(), limit }
    }

    /// Takes a part; returns the message when it was the last one.
    ///
    /// # Errors
    /// When the message grows over the limit; the connection is of no use after that.
    pub fn push(&mut self, body: &[u8], last: bool) -> Result<Option<Vec<u8>>, FrameError> {
        if self.parts.len() + body.len() > self.limit {
            return Err(FrameError::TooLarge);
        }
        self.parts.extend_from_slice(body);
        Ok(last.then(|| std::mem::take(&mut self.parts)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_early_hello_survives_unless_it_is_too_long() {
        let (token, hello) = (Token([3; 16]), vec![5; MAX_EARLY_HELLO]);
        let early = Early { token, hello: &hello };
        assert_eq!(Early::parse(&early.encode().unwrap()), Some(early));
        let longer = vec![5; MAX_EARLY_HELLO + 1];
        assert_eq!(Early { token, hello: &longer }.encode(), None);
        assert_eq!(Early::parse(&[]), None);
        assert_eq!(Early::parse(&[3; 15]), None);
    }

    #[test]
    fn a_long_message_is_cut_and_put_together_again() {
        for len in [0, 1, MAX_BODY, MAX_BODY + 1, 3 * MAX_BODY + 7] {
            let message: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let mut assembler = Assembler::default();
            let mut whole = None;
            let mut plain = Vec::new();
            for frame in split_control(&message) {
                assert!(whole.is_none(), "nothing comes after the last part");
                frame.encode_into(&mut plain);
                whole = match Frame::parse(&plain).unwrap().unwrap() {
                    Frame::ControlLast(body) => assembler.push(body, true).unwrap(),
                    Frame::ControlMore(body) => assembler.push(body, false).unwrap(),
                    Frame::Relay(_) => unreachable!("no relay frame was written"),
                };
            }
            assert_eq!(whole, Some(message));
        }
    }

    #[test]
    fn a_message_without_end_is_refused() {
        let mut assembler = Assembler::default();
        let part = vec![0; MAX_BODY];
        let error = (0..=MAX_MESSAGE / MAX_BODY).find_map(|_| assembler.push(&part, false).err());
        assert_eq!(error, Some(FrameError::TooLarge));
    }

    #[test]
    fn unknown_frame_types_are_ignored() {
        assert_eq!(Frame::parse(&[99, 1, 2]), Ok(None));
        assert_eq!(Frame::parse(&[]), Err(FrameError::Empty));
    }
}
