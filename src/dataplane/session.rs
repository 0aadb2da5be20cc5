//! WireGuard keys with one peer. The only file that names `boringtun`.
//!
//! The engine does the cryptography; *when* to shake hands is decided here, with the `now` that we
//! are given, so that a handshake lost on a fresh path is repeated after a quarter of a second and
//! not after five. What of WireGuard the engine leaves to its caller, and where that is done:
//! inner source addresses (`inbound`), padding (not done: allowed), giving up and key lifetimes
//! (here), limits on handshakes (`gate`).

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519;

use super::attempt::Attempt;
use super::gate::COOKIE_LEN;
use crate::types::{self, DropReason, PublicKey, SecretKey};

/// Bytes that sealing adds.
pub(super) const SEAL_OVERHEAD: usize = types::SEAL_OVERHEAD as usize;
/// The engine wants at least this much room: it may write a handshake instead.
pub const MIN_SEAL_BUFFER: usize = 148;

/// The engine keeps eight sessions; so many of them may wait for the peer.
const MAX_UNCONFIRMED: usize = 4;
/// WireGuard's `REJECT_AFTER_TIME` (180 s), less what clocks and timers may differ by.
const KEY_LIFETIME: Duration = Duration::from_secs(175);
/// The side that answered the handshake lets the other start the next one for this long.
const RESPONDER_PATIENCE: Duration = Duration::from_secs(10);
/// Keys are renewed only while data flows: this long after the last packet it does not.
const IN_USE: Duration = Duration::from_secs(15);
/// The engine's own timers are looked at no more often than this, the resolution it was made for, however
/// often a session is looked at for another reason. `node::timers` does so once a second at least.
const ENGINE_TICK_AT_MOST: Duration = Duration::from_millis(250);

/// Our static keys in the engine's form, shared by all sessions of a node.
#[derive(Clone)]
pub struct EngineKeys {
    secret: x25519::StaticSecret,
    public: x25519::PublicKey,
    limiter: Arc<RateLimiter>,
}

impl std::fmt::Debug for EngineKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineKeys").finish_non_exhaustive()
    }
}

impl EngineKeys {
    /// Prepares the node key.
    #[must_use]
    pub fn new(node_key: &SecretKey) -> Self {
        let secret = x25519::StaticSecret::from(*node_key.expose());
        let public = x25519::PublicKey::from(&secret);
        // The engine's limiter is one counter for all sources, which lets one flooder lock all
        // others out; handshakes are limited per source before they come here (`gate`).
        let limiter = Arc::new(RateLimiter::new(&public, u64::MAX));
        Self { secret, public, limiter }
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.public.to_bytes())
    }

    /// A number that nobody else can guess.
    pub(super) fn place_seed(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        ("gate", self.secret.as_bytes()).hash(&mut hasher);
        hasher.finish()
    }
}

/// The two MACs of handshake messages, which are checked before any Diffie-Hellman.
pub(super) struct HandshakeMacs {
    /// Asks for the first MAC only.
    first: Arc<RateLimiter>,
    /// Asks for both: the engine takes itself to be under load from the first message on.
    both: RateLimiter,
}

/// What a look at the second MAC says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SecondMac {
    Good,
    Bad,
    /// It is not that of this address; a reply with the cookie that makes one.
    Missing([u8; COOKIE_LEN]),
}

impl HandshakeMacs {
    pub(super) fn new(keys: &EngineKeys) -> Self {
        Self { first: Arc::clone(&keys.limiter), both: RateLimiter::new(&keys.public, 0) }
    }

    /// Whether a handshake message is made for our public key.
    pub(super) fn first_is_ours(&self, datagram: &[u8]) -> bool {
        self.first.verify_packet(None, datagram, &mut [0; COOKIE_LEN]).is_ok()
    }

    /// Whether the sender has shown that it receives at its address.
    pub(super) fn second(&self, from: IpAddr, datagram: &[u8]) -> SecondMac {
        let mut reply = [0; COOKIE_LEN];
        match self.both.verify_packet(Some(from), datagram, &mut reply) {
            Ok(_) => SecondMac::Good,
            Err(TunnResult::WriteToNetwork(_)) => SecondMac::Missing(reply),
            Err(_) => SecondMac::Bad,
        }
    }
}

/// How often keys are renewed.
#[derive(Debug, Clone, Copy)]
pub struct SessionSettings {
    /// WireGuard's `REKEY_AFTER_TIME`: 120 s. Tests shorten it.
    pub rekey_after: Duration,
}

impl Default for SessionSettings {
    fn default() -> Self {
        Self { rekey_after: Duration::from_secs(120) }
    }
}

/// Why a packet could not be sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SealError {
    NoSession,
    NoPath,
    TooLarge,
}

/// A packet that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opened {
    /// Length of the inner packet; zero is a keepalive.
    pub(super) len: usize,
    /// Whether this is the first packet under new keys.
    pub(super) confirms_session: bool,
}

/// What came of a handshake message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandshakeOutcome {
    /// Length of the datagram to send back on the same path.
    pub reply: Option<usize>,
    /// Whether data can be sent from here on.
    pub established: bool,
}

/// WireGuard keys with one peer, and the timers around them.
pub struct Session {
    engine: Tunn,
    /// Our receiver index without the count of sessions: 24 bits.
    index: u32,
    own: PublicKey,
    peer: PublicKey,
    /// How new its keys are: of two sessions that work, data takes the one of the higher rank.
    rank: u64,
    settings: SessionSettings,
    established: Option<Instant>,
    initiator: bool,
    /// The indexes under which we answered handshakes that the peer has not confirmed yet, oldest
    /// first: on a long way an initiation is repeated before its answer is there.
    unconfirmed: VecDeque<u32>,
    attempt: Option<Attempt>,
    last_data: Option<Instant>,
    engine_tick_at: Option<Instant>,
    /// What the peer called itself in its last handshake message that was good.
    peer_index: Option<u32>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("established", &self.established).finish_non_exhaustive()
    }
}

impl Session {
    /// A session with `peer`, without keys yet. `index` has 24 bits and is unique on this node.
    #[must_use]
    pub fn new(keys: &EngineKeys, peer: &PublicKey, index: u32, settings: SessionSettings) -> Self {
        let engine = Tunn::new(
            keys.secret.clone(),
            x25519::PublicKey::from(peer.0),
            None,
            None,
            index & 0x00ff_ffff,
            Some(Arc::clone(&keys.limiter)),
        );
        Self {
            engine,
            index: index & 0x00ff_ffff,
            own: keys.public(),
            peer: *peer,
            rank: 0,
            settings,
            established: None,
            initiator: false,
            unconfirmed: VecDeque::new(),
            attempt: None,
            last_data: None,
            engine_tick_at: None,
            peer_index: None,
        }
    }

    /// The same session, to be preferred to all of a lower rank.
    #[must_use]
    pub fn with_rank(self, rank: u64) -> Self {
        Self { rank, ..self }
    }

    /// Sets how new its keys are.
    pub fn set_rank(&mut self, rank: u64) {
        self.rank = rank;
    }

    /// How new its keys are.
    #[must_use]
    pub fn rank(&self) -> u64 {
        self.rank
    }

    /// Our receiver index, 24 bits.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// The peer's receiver index, 24 bits.
    pub(super) fn peer_index(&self) -> Option<u32> {
        self.peer_index
    }

    /// Our node key in it.
    #[must_use]
    pub fn own_key(&self) -> PublicKey {
        self.own
    }

    /// The peer's node key in it.
    #[must_use]
    pub fn peer_key(&self) -> PublicKey {
        self.peer
    }

    /// Whether a handshake is under way, from whichever side.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.attempt.is_some()
    }

    /// Whether data can be sealed now.
    #[must_use]
    pub fn is_usable(&self, now: Instant) -> bool {
        self.established.is_some_and(|at| now.saturating_duration_since(at) < KEY_LIFETIME)
    }

    /// When the keys in use were agreed on.
    #[must_use]
    pub fn established(&self) -> Option<Instant> {
        self.established
    }

    /// Seals `packet` into `out`, which has room for `max(packet + 32, 148)` bytes.
    pub(super) fn seal(
        &mut self,
        packet: &[u8],
        out: &mut [u8],
        now: Instant,
    ) -> Result<usize, SealError> {
        if out.len() < (packet.len() + SEAL_OVERHEAD).max(MIN_SEAL_BUFFER) {
            return Err(SealError::TooLarge);
        }
        if !self.is_usable(now) {
            return Err(SealError::NoSession);
        }
        match self.engine.encapsulate(packet, out) {
            TunnResult::WriteToNetwork(sealed) if sealed[0] == 4 => {
                self.last_data = Some(now);
                Ok(sealed.len())
            }
            // The engine threw its keys away before we did. It keeps the packet and wants to
            // start over, which is done by the timers here, so that is not lost either.
            _ => {
                self.established = None;
                Err(SealError::NoSession)
            }
        }
    }

    /// Opens a data packet for receiver index `receiver` into `out`, which is no shorter.
    pub(super) fn open(
        &mut self,
        receiver: u32,
        datagram: &[u8],
        out: &mut [u8],
        now: Instant,
    ) -> Result<Opened, DropReason> {
        if out.len() < datagram.len() {
            return Err(DropReason::TooLarge);
        }
        let len = match self.engine.decapsulate(None, datagram, out) {
            TunnResult::Done => 0,
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                packet.len()
            }
            TunnResult::WriteToNetwork(_) => return Err(DropReason::Malformed),
            TunnResult::Err(error) => return Err(reason_of(&error)),
        };
        if len > 0 {
            self.last_data = Some(now);
        }
        let confirmed = self.unconfirmed.iter().position(|index| *index == receiver);
        if let Some(at) = confirmed {
            self.unconfirmed.drain(..=at);
            self.established = Some(now);
            self.initiator = false;
            self.attempt = None;
        }
        Ok(Opened { len, confirms_session: confirmed.is_some() })
    }

    /// Takes a handshake message from the peer; `out` has at least 148 bytes.
    ///
    /// # Errors
    /// When the message is not from this peer, or is a replay.
    pub fn handle_handshake(
        &mut self,
        datagram: &[u8],
        from: IpAddr,
        out: &mut [u8],
        now: Instant,
    ) -> Result<HandshakeOutcome, DropReason> {
        let is_initiation = datagram.first() == Some(&1);
        match self.engine.decapsulate(Some(from), datagram, out) {
            TunnResult::WriteToNetwork(reply) => {
                self.peer_index = sender_index(datagram).map(|index| index >> 8);
                if is_initiation {
                    self.unconfirmed.extend(sender_index(reply));
                    let too_many = self.unconfirmed.len().saturating_sub(MAX_UNCONFIRMED);
                    self.unconfirmed.drain(..too_many);
                    // Until the peer confirms, data goes on under the old keys, which a restarted
                    // peer has lost. Its confirmation may be lost too; then it is our turn.
                    self.attempt = Some(Attempt::after_answer(self.attempt, now));
                } else {
                    self.established = Some(now);
                    self.initiator = true;
                    self.attempt = None;
                }
                Ok(HandshakeOutcome { reply: Some(reply.len()), established: !is_initiation })
            }
            TunnResult::Done => Ok(HandshakeOutcome { reply: None, established: false }),
            // The second copy of one that was sent on two paths.
            TunnResult::Err(
                WireGuardError::WrongTai64nTimestamp | WireGuardError::UnexpectedPacket,
            ) => Err(DropReason::Replayed),
            TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => Err(DropReason::BadHandshake),
        }
    }

    /// Starts a handshake, unless one is under way. Returns the length of the initiation in `out`.
    pub fn initiate(&mut self, out: &mut [u8], now: Instant) -> Option<usize> {
        if self.attempt.is_some_and(|attempt| attempt.next_at() > now) {
            return None;
        }
        self.attempt = Some(Attempt::after_initiation(self.attempt, now));
        match self.engine.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(initiation) => Some(initiation.len()),
            _ => None,
        }
    }

    /// Forgets the waits of a handshake that we have started: there is a new path, try it at once.
    pub fn hurry(&mut self, now: Instant) {
        self.attempt = self.attempt.map(|attempt| attempt.hurried(now));
    }

    /// Gives up the handshake under way and the renewal that is due: there is no way to the peer.
    /// The next data asks again.
    pub fn give_up(&mut self) {
        self.attempt = None;
        self.last_data = None;
    }

    /// Does what is due; returns the length of a datagram in `out` that wants sending.
    pub fn handle_timeout(&mut self, out: &mut [u8], now: Instant) -> Option<usize> {
        let due = self.attempt.is_some_and(|attempt| attempt.next_at() <= now);
        if due || (self.attempt.is_none() && self.rekey_at().is_some_and(|at| at <= now)) {
            return self.initiate(out, now);
        }
        if self.engine_tick_at.is_none_or(|at| at <= now) {
            self.engine_tick_at = Some(now + ENGINE_TICK_AT_MOST);
            if let TunnResult::WriteToNetwork(datagram) = self.engine.update_timers(out) {
                if datagram[0] == 1 {
                    self.attempt = Some(Attempt::after_initiation(None, now));
                }
                return Some(datagram.len());
            }
        }
        None
    }

    /// When [`Self::handle_timeout`] has something to do, beside the engine's tick.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        match self.attempt {
            Some(attempt) => Some((attempt.next_at(), "handshake retry")),
            None => self.rekey_at().map(|at| (at, "key renewal")),
        }
    }

    /// Whether a handshake is to be repeated or keys are to be renewed now.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.poll_timeout().is_some_and(|(at, _)| at <= now)
    }

    /// When data last went through it, either way.
    pub(crate) fn last_data(&self) -> Option<Instant> {
        self.last_data
    }

    /// Data went through the other lane: what counts is that the peer is in use.
    pub(crate) fn note_data(&mut self, at: Option<Instant>) {
        self.last_data = self.last_data.max(at);
    }

    /// When keys are renewed, if data flows; none when it does not.
    fn rekey_at(&self) -> Option<Instant> {
        let established = self.established?;
        let patience = if self.initiator { Duration::ZERO } else { RESPONDER_PATIENCE };
        let at = established + self.settings.rekey_after + patience;
        self.last_data.filter(|last| *last + IN_USE >= at).map(|_| at)
    }
}

/// Whose static key a handshake initiation carries, before any session is touched.
///
/// # Errors
/// When its first MAC is not for our key, or it does not decrypt.
pub fn handshake_sender(keys: &EngineKeys, initiation: &[u8]) -> Result<PublicKey, DropReason> {
    let mut scratch = [0; MIN_SEAL_BUFFER];
    let packet = keys
        .limiter
        .verify_packet(None, initiation, &mut scratch)
        .map_err(|_| DropReason::BadHandshake)?;
    let Packet::HandshakeInit(initiation) = packet else { return Err(DropReason::BadHandshake) };
    parse_handshake_anon(&keys.secret, &keys.public, &initiation)
        .map(|half| PublicKey(half.peer_static_public))
        .map_err(|_| DropReason::BadHandshake)
}

/// By which receiver index the sender of a handshake message wants to be answered.
pub(crate) fn sender_index(handshake: &[u8]) -> Option<u32> {
    handshake.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes)
}

fn reason_of(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropReason::Replayed,
        WireGuardError::InvalidPacket => DropReason::BadInnerPacket,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => DropReason::UnknownSession,
        _ => DropReason::Undecryptable,
    }
}
