//! The node key is renewed without anybody losing a packet: the new one is there before the old one
//! goes.
//!
//! - Ours: from [`Node::rotate`] on (the key is on disk) handshakes and disco are opened with both
//!   keys. The server is told, stores it, and tells the peers; we use it towards a peer as soon as
//!   that peer was heard under it, or must have been told. The old key goes when everybody has been
//!   heard under the new one.
//! - A peer's: it has the new key before the server has, so we use it from the moment at which we
//!   hear of it, and shake hands at once where a session is in use; the old session serves until
//!   that is through. The old key is accepted for [`OVERLAP`].

use std::time::{Duration, Instant};

use super::keyring::{OwnKey, PeerKeys, Told};
use super::peer::PeerControl;
use super::{Event, Node};
use crate::dataplane::{Session, SessionSettings};
use crate::types::{NodeId, PublicKey, SecretKey};
use crate::wire::control::ClientMessage;
use crate::wire::disco::DiscoKeys;

/// A peer's old key is accepted for so long after we heard of its new one: no session of the old one
/// lives longer.
pub(super) const OVERLAP: Duration = Duration::from_secs(180);
/// A peer that the server sees has heard of our new key so long after the server has.
pub(super) const NEWS_TRAVEL: Duration = Duration::from_secs(5);
/// The server is told again when it has not answered; in the long run it takes one key a minute.
const TELL_AGAIN: Duration = Duration::from_secs(65);

/// Why the key cannot be renewed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RotateError {
    /// Without the server nobody can be told.
    #[error("the server cannot be reached, and it tells the peers of a new key")]
    NoServer,
    /// The last one has not come to its end: it takes three minutes.
    #[error("the key was renewed a moment ago, and peers still change over to it")]
    UnderWay,
}

/// Under which of our keys a peer is to be spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Newest,
    Old,
    /// It may know only one of them, and nobody can tell which.
    Both,
}

impl Node {
    /// Whether the node key can be renewed now.
    ///
    /// # Errors
    /// When nobody could be told of it, or the last time is not over.
    pub fn may_rotate(&self, now: Instant) -> Result<(), RotateError> {
        let recent = self.keys.since.is_some_and(|at| now.saturating_duration_since(at) < OVERLAP);
        match (self.link_up, recent || self.keys.told == Told::No) {
            (false, _) => Err(RotateError::NoServer),
            (true, true) => Err(RotateError::UnderWay),
            (true, false) => Ok(()),
        }
    }

    /// Takes `key` as the node key in place of the present one. It must be on disk, and the present
    /// one beside it, since from here on there may be peers that know only the one or the other.
    ///
    /// # Errors
    /// As [`Self::may_rotate`]; then nothing has changed.
    pub fn rotate(&mut self, key: SecretKey, now: Instant) -> Result<(), RotateError> {
        self.may_rotate(now)?;
        let newest = OwnKey::new(key, self.keys.newest.rank + 1);
        self.keys.old = Some(std::mem::replace(&mut self.keys.newest, newest));
        (self.keys.told, self.keys.since) = (Told::No, Some(now));
        self.keys.look_at = Some(now + OVERLAP);
        self.derive_all(now);
        for peer in self.peers.values_mut() {
            (peer.keys.knows_newest, peer.keys.is_behind) = (false, false);
        }
        self.tell_key(now);
        Ok(())
    }

    /// Whether the server has stored the newest key.
    #[must_use]
    pub fn key_is_told(&self) -> bool {
        self.keys.told != Told::No
    }

    /// Whether the key before the newest is still accepted.
    #[must_use]
    pub fn has_old_key(&self) -> bool {
        self.keys.old.is_some()
    }

    fn tell_key(&mut self, now: Instant) {
        self.keys.tell_at = Some(now + TELL_AGAIN);
        let node_key = Some(self.keys.public().0);
        self.messages.push_back(ClientMessage { node_key, ..ClientMessage::default() });
    }

    /// The server has stored `key` as ours.
    pub(super) fn handle_key_stored(&mut self, key: PublicKey, now: Instant) {
        if key == self.keys.public() && self.keys.told == Told::No {
            self.keys.told = Told::At(now);
            self.keys.tell_at = None;
            self.keys.look_at = self.keys.old.as_ref().map(|_| now + OVERLAP);
            self.events.push_back(Event::KeyTold);
        }
    }

    /// Nobody can be told any more; the next hello does it.
    pub(super) fn note_no_server(&mut self) {
        self.keys.tell_at = None;
    }

    /// A packet of a peer was opened that it made for `own`. From the first one for our newest key on
    /// the session has to be one of that key: the peer will soon forget the other.
    pub(super) fn note_heard_under(&mut self, id: NodeId, own: PublicKey, now: Instant) {
        if self.keys.old.is_none() {
            return;
        }
        let (newest, known) = (own == self.keys.public(), self.keys.told == Told::Known);
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.keys.is_behind |= !newest && known;
        if newest && !std::mem::replace(&mut peer.keys.knows_newest, true) {
            let mut state = peer.fast.lock();
            let wanted = (self.keys.public(), peer.keys.newest);
            let current = (state.session.own_key(), state.session.peer_key());
            let under_way = state.session_of(wanted.0, wanted.1);
            let under_way = under_way.is_some_and(|session| session.is_under_way());
            let outdated = state.session.is_usable(now) && current != wanted && !under_way;
            drop(state);
            if outdated {
                self.renew_session(id, now);
            }
        }
    }

    /// What a peer's new key in the netmap means: the old one stays beside it for a while.
    pub(super) fn rekey_peer(&mut self, id: NodeId, now: Instant) {
        let (Some(peer), Some(info)) = (self.peers.get_mut(&id), self.netmap.peers.get(&id)) else {
            return self.make_peer(id, now);
        };
        let old = std::mem::replace(&mut peer.keys.newest, info.node_key);
        peer.keys.old = Some((old, now + OVERLAP));
        peer.keys.rank += 1;
        self.derive(id, now);
        if self.peers.get(&id).is_some_and(|peer| peer.fast.lock().session.is_usable(now)) {
            self.renew_session(id, now);
        } else {
            self.prepare_session(id, self.keys.public(), now);
        }
    }

    /// Derives all that follows from the keys of both sides, and drops what follows from others.
    fn derive(&mut self, id: NodeId, now: Instant) {
        self.unindex_keys(id);
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.keys.derive(&self.keys);
        self.index_keys(id);
        let Some(peer) = self.peers.get(&id) else { return };
        let good = |own: PublicKey, other: PublicKey| {
            self.keys.all().any(|key| key.public == own) && peer.keys.all().any(|key| key == other)
        };
        let outdated = |session: &Session| !good(session.own_key(), session.peer_key());
        if outdated(&peer.fast.lock().session) {
            self.prepare_session(id, self.keys.public(), now);
        }
        let second = |peer: &PeerControl| peer.fast.lock_second().map(|it| outdated(&it.session));
        if self.peers.get(&id).and_then(second) == Some(true) {
            let newest = self.peers.get(&id).map(|peer| (self.keys.public(), peer.keys.newest));
            newest.map(|newest| self.prepare_second(id, newest, now));
        }
        if let Some(peer) = self.peers.get(&id) {
            for mut lane in peer.fast.lanes() {
                lane.forget_sessions(outdated, now);
            }
        }
    }

    fn derive_all(&mut self, now: Instant) {
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            self.derive(id, now);
        }
        self.keys.open_gate(&self.shared);
        self.publish();
    }

    /// Makes a peer to be found by its keys.
    pub(super) fn index_keys(&mut self, id: NodeId) {
        let Some(peer) = self.peers.get(&id) else { return };
        for set in &peer.keys.sets {
            self.peers_by_tag.insert(set.keys.tag_from_peer(), id);
            self.peers_by_key.insert(set.peer, id);
        }
    }

    /// Undoes [`Self::index_keys`].
    pub(super) fn unindex_keys(&mut self, id: NodeId) {
        let Some(peer) = self.peers.get(&id) else { return };
        for set in &peer.keys.sets {
            self.peers_by_tag.remove(&set.keys.tag_from_peer());
            if self.peers_by_key.get(&set.peer) == Some(&id) {
                self.peers_by_key.remove(&set.peer);
            }
        }
    }

    /// A session with a new peer, without keys yet.
    pub(super) fn first_session(&self, keys: &PeerKeys, index: u32) -> Session {
        let own = &self.keys.newest;
        self.session(own, keys.newest, own.rank + keys.rank, index)
    }

    fn session(&self, own: &OwnKey, peer: PublicKey, rank: u64, index: u32) -> Session {
        let settings = SessionSettings { rekey_after: self.settings.rekey_after };
        Session::new(&own.engine, &peer, index, settings).with_rank(rank)
    }

    /// Makes a session of our key `own` and the peer's newest, if there is none.
    fn prepare_session(&self, id: NodeId, own: PublicKey, now: Instant) {
        if let Some(peer) = self.peers.get(&id) {
            self.prepare_session_of(id, own, peer.keys.newest, now);
        }
    }

    /// The same of any two keys that are good.
    pub(super) fn prepare_session_of(
        &self,
        id: NodeId,
        own: PublicKey,
        other: PublicKey,
        now: Instant,
    ) {
        let Some(peer) = self.peers.get(&id) else { return };
        let Some(own) = self.keys.all().find(|key| key.public == own) else { return };
        let newest = u64::from(other == peer.keys.newest);
        let rank = own.rank + (peer.keys.rank + newest).saturating_sub(1);
        let mut state = peer.fast.lock();
        match state.session_of(own.public, other) {
            // A key may come back: of a restored backup, or of a second machine.
            Some(session) => session.set_rank(rank),
            None => state.add_session(|index| self.session(own, other, rank, index), now),
        }
    }

    /// Under which of our keys this peer is spoken to.
    fn use_for(&self, id: NodeId) -> Use {
        let Some(peer) = self.peers.get(&id).filter(|_| self.keys.old.is_some()) else {
            return Use::Newest;
        };
        let online = self.netmap.peers.get(&id).is_some_and(|info| info.online);
        match (peer.keys.knows_newest, self.link_up, self.keys.told) {
            (true, ..) => Use::Newest,
            (false, true, Told::No | Told::At(_)) => Use::Old,
            (false, true, Told::Known) if online && !peer.keys.is_behind => Use::Newest,
            (false, ..) => Use::Both,
        }
    }

    /// Our keys to speak to this peer under, the better one first.
    pub(super) fn keys_for(&self, id: NodeId) -> Vec<PublicKey> {
        let (newest, old) = (self.keys.public(), self.keys.old.as_ref().map(|key| key.public));
        match (self.use_for(id), old) {
            (Use::Newest, _) | (_, None) => vec![newest],
            (Use::Old, Some(old)) => vec![old],
            (Use::Both, Some(old)) => vec![newest, old],
        }
    }

    /// What seals disco messages for this peer under our key `own`.
    pub(super) fn disco_keys(&self, id: NodeId, own: PublicKey) -> Option<&DiscoKeys> {
        self.peers.get(&id)?.keys.sealing(own)
    }

    /// The sessions that a handshake is made for now.
    pub(super) fn wanted_sessions(&self, id: NodeId, now: Instant) -> Vec<(PublicKey, PublicKey)> {
        let pairs = self.wanted_keys(id);
        for (own, other) in &pairs {
            self.prepare_session_of(id, *own, *other, now);
        }
        pairs
    }

    /// The keys of these sessions: one of ours, and the peer's newest.
    pub(super) fn wanted_keys(&self, id: NodeId) -> Vec<(PublicKey, PublicKey)> {
        let newest = self.peers.get(&id).map(|peer| peer.keys.newest);
        let own = self.keys_for(id).into_iter();
        own.filter_map(|own| Some((own, newest?))).collect()
    }

    /// Does what is due: a key that is no longer accepted goes.
    pub(super) fn handle_keys_timeout(&mut self, now: Instant) {
        let over = |until: Option<Instant>| until.is_some_and(|until| until <= now);
        let peers = self.peers.iter().filter(|(_, peer)| over(peer.keys.next_at()));
        let peers: Vec<NodeId> = peers.map(|(id, _)| *id).collect();
        for id in peers {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.keys.old = None;
            }
            // The data plane may take its packets for known until the table is the next one: here
            // they are not.
            self.derive(id, now);
        }
        if let Told::At(at) = self.keys.told
            && at + NEWS_TRAVEL <= now
        {
            self.keys.told = Told::Known;
        }
        if over(self.keys.tell_at) {
            self.tell_key(now);
        }
        if over(self.keys.look_at) {
            self.keys.look_at = Some(now + OVERLAP);
            self.retire_old_key(now);
        }
    }

    /// Drops our old key once everybody has been heard under the new one and no session needs it.
    fn retire_old_key(&mut self, now: Instant) {
        let newest = self.keys.public();
        let done = self.peers.values().all(|peer| {
            let state = peer.fast.lock();
            let old_session = state.session.own_key() != newest && state.session.is_usable(now);
            peer.keys.knows_newest && !old_session
        });
        if self.keys.told == Told::No || !done {
            return;
        }
        (self.keys.old, self.keys.look_at) = (None, None);
        self.derive_all(now);
        self.events.push_back(Event::KeyRetired);
    }
}
