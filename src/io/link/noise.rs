//! The Noise IK handshake and the sealing of frames.
//!
//! The first message can be replayed by anybody who saw it, so what it says may count only when
//! the server knows that it is new ([`crate::server::fresh`]). The first frame behind the handshake
//! cannot.

use std::sync::Arc;

use data_encoding::BASE64URL_NOPAD;
use snow::{Builder, HandshakeState, StatelessTransportState};

use super::LinkError;
use crate::types::{PublicKey, SecretKey};
use crate::wire::frame::{
    EARLY_TAKEN, Frame, MAC_LEN, MAX_EARLY_HELLO, NOISE_PATTERN, NOISE_PROLOGUE,
};
use crate::wire::relay::TOKEN_LEN;

/// No payload has more bytes: a token and a hello.
const MAX_PAYLOAD: usize = TOKEN_LEN + MAX_EARLY_HELLO;
/// No handshake message of IK has more bytes: two keys, one of them with a MAC, and a payload with one.
const MAX_HANDSHAKE: usize = 32 + 48 + MAX_PAYLOAD + MAC_LEN;

/// The handshake did not work out: another key, or no Noise at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the handshake does not open with this key")]
pub(crate) struct HandshakeError;

fn builder<'a>(key: &'a [u8; 32]) -> Result<Builder<'a>, HandshakeError> {
    let pattern = NOISE_PATTERN.parse().map_err(|_| HandshakeError)?;
    Builder::new(pattern)
        .local_private_key(key)
        .and_then(|builder| builder.prologue(NOISE_PROLOGUE))
        .map_err(|_| HandshakeError)
}

fn write(state: &mut HandshakeState, payload: &[u8]) -> Result<String, HandshakeError> {
    let mut message = vec![0; MAX_HANDSHAKE];
    let len = state.write_message(payload, &mut message).map_err(|_| HandshakeError)?;
    Ok(BASE64URL_NOPAD.encode(&message[..len]))
}

/// The message in this text. Comes before anything that costs more: it may be anybody's.
fn decode(text: &[u8]) -> Result<Vec<u8>, HandshakeError> {
    let message = BASE64URL_NOPAD.decode(text).map_err(|_| HandshakeError)?;
    if message.len() > MAX_HANDSHAKE { Err(HandshakeError) } else { Ok(message) }
}

fn read(state: &mut HandshakeState, message: &[u8]) -> Result<Vec<u8>, HandshakeError> {
    let mut payload = vec![0; message.len()];
    let len = state.read_message(message, &mut payload).map_err(|_| HandshakeError)?;
    payload.truncate(len);
    Ok(payload)
}

/// The ephemeral key of a first message, which is made anew for each of them.
pub(crate) fn ephemeral(first: &[u8]) -> Option<[u8; 32]> {
    BASE64URL_NOPAD.decode(first).ok()?.first_chunk().copied()
}

fn finish(state: HandshakeState) -> Result<Secured, HandshakeError> {
    let key = state.get_remote_static().and_then(|key| key.try_into().ok());
    let peer_key = PublicKey(key.ok_or(HandshakeError)?);
    let transport = state.into_stateless_transport_mode().map_err(|_| HandshakeError)?;
    Ok(Secured { transport: Arc::new(transport), peer_key })
}

/// The node's half of the handshake, waiting for the answer.
#[derive(Debug)]
pub(crate) struct Initiator(HandshakeState);

impl Initiator {
    /// The state, and the text of the first message with this payload.
    pub(crate) fn start(
        server_key: &PublicKey,
        machine_key: &SecretKey,
        payload: &[u8],
    ) -> Result<(Self, String), HandshakeError> {
        let secret = machine_key.expose();
        let mut state = builder(&secret)?
            .remote_public_key(&server_key.0)
            .and_then(Builder::build_initiator)
            .map_err(|_| HandshakeError)?;
        let text = write(&mut state, payload)?;
        Ok((Self(state), text))
    }

    /// The keys, and whether the payload counts with the server.
    pub(crate) fn finish(mut self, answer: &[u8]) -> Result<(Secured, bool), HandshakeError> {
        let taken = read(&mut self.0, &decode(answer)?)? == EARLY_TAKEN;
        Ok((finish(self.0)?, taken))
    }
}

/// The server's half of the handshake.
#[derive(Debug)]
pub(crate) struct Responder;

/// A finished handshake and the text of the second message.
#[derive(Debug)]
pub struct Answered {
    pub(crate) text: String,
    /// What the first message held, if it counts.
    pub(crate) early: Option<Vec<u8>>,
    pub(super) secured: Secured,
}

impl Responder {
    /// Opens a first message and answers it. What it holds counts if `is_new` says so of its
    /// sender's key and payload.
    pub(crate) fn answer(
        first: &[u8],
        server_key: &SecretKey,
        is_new: impl FnOnce(PublicKey, &[u8]) -> bool,
    ) -> Result<Answered, HandshakeError> {
        let (message, secret) = (decode(first)?, server_key.expose());
        let mut state = builder(&secret)?.build_responder().map_err(|_| HandshakeError)?;
        let payload = read(&mut state, &message)?;
        let key = state.get_remote_static().and_then(|key| key.try_into().ok());
        let taken = is_new(PublicKey(key.ok_or(HandshakeError)?), &payload);
        let text = write(&mut state, if taken { EARLY_TAKEN } else { &[] })?;
        Ok(Answered { text, early: taken.then_some(payload), secured: finish(state)? })
    }
}

/// The keys of a connection and who is at its other end.
#[derive(Debug)]
pub struct Secured {
    transport: Arc<StatelessTransportState>,
    pub(super) peer_key: PublicKey,
}

impl Secured {
    pub(super) fn split(&self) -> (Sealer, Opener) {
        let sealer = Sealer { transport: Arc::clone(&self.transport), nonce: 0, plain: Vec::new() };
        let opener = Opener { transport: Arc::clone(&self.transport), nonce: 0, plain: Vec::new() };
        (sealer, opener)
    }
}

/// Seals frames in the order in which they are sent.
#[derive(Debug)]
pub(super) struct Sealer {
    transport: Arc<StatelessTransportState>,
    nonce: u64,
    plain: Vec<u8>,
}

impl Sealer {
    /// Puts the frame with its length behind what is in `stream`.
    pub(super) fn seal(
        &mut self,
        frame: &Frame<'_>,
        stream: &mut Vec<u8>,
    ) -> Result<(), LinkError> {
        frame.encode_into(&mut self.plain);
        let length = self.plain.len() + MAC_LEN;
        let Ok(length_field) = u16::try_from(length) else {
            return Err(crate::wire::frame::FrameError::TooLarge.into());
        };
        stream.extend_from_slice(&length_field.to_be_bytes());
        let at = stream.len();
        stream.resize(at + length, 0);
        self.transport
            .write_message(self.nonce, &self.plain, &mut stream[at..])
            .map_err(|_| LinkError::Closed)?;
        self.nonce += 1;
        Ok(())
    }
}

/// Opens frames in the order in which they were sent.
#[derive(Debug)]
pub(super) struct Opener {
    transport: Arc<StatelessTransportState>,
    nonce: u64,
    plain: Vec<u8>,
}

impl Opener {
    pub(super) fn open(&mut self, sealed: &[u8]) -> Result<&[u8], LinkError> {
        self.plain.resize(sealed.len().saturating_sub(MAC_LEN), 0);
        let len = self
            .transport
            .read_message(self.nonce, sealed, &mut self.plain)
            .map_err(|_| LinkError::Forged)?;
        self.nonce += 1;
        Ok(&self.plain[..len])
    }
}
