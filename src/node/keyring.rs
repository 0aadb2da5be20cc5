//! The keys themselves: ours, those of a peer, and what the two make together. What is done with them,
//! and when, is in `keys`.

use std::sync::Arc;
use std::time::Instant;

use super::keys::{NEWS_TRAVEL, OVERLAP};
use crate::dataplane::{EngineKeys, Shared, handshake_sender};
use crate::types::{DropReason, PublicKey, SecretKey};
use crate::wire::disco::{DiscoKeys, Tag};

/// The node keys of a node that starts.
#[derive(Debug, Clone)]
pub struct NodeKeys {
    /// The newest one.
    pub current: SecretKey,
    /// The one before it, as long as some peer may know no other.
    pub previous: Option<SecretKey>,
    /// Whether the server has stored the newest.
    pub told: bool,
}

impl From<SecretKey> for NodeKeys {
    fn from(current: SecretKey) -> Self {
        Self { current, previous: None, told: true }
    }
}

/// Our keys.
#[derive(Debug)]
pub(super) struct OwnKeys {
    pub(super) newest: OwnKey,
    pub(super) old: Option<OwnKey>,
    pub(super) told: Told,
    /// When the newest was made, if that was in this life.
    pub(super) since: Option<Instant>,
    pub(super) tell_at: Option<Instant>,
    /// When it is looked at whether the old one can go.
    pub(super) look_at: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct OwnKey {
    pub(super) secret: SecretKey,
    pub(super) public: PublicKey,
    pub(super) engine: EngineKeys,
    pub(super) rank: u64,
}

/// Whether the server has stored the newest key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    No,
    /// At this time, and not all peers need have heard of it.
    At(Instant),
    /// So long ago that every peer that the server sees has heard of it.
    Known,
}

impl OwnKey {
    pub(super) fn new(secret: SecretKey, rank: u64) -> Self {
        Self { public: secret.public(), engine: EngineKeys::new(&secret), secret, rank }
    }
}

impl OwnKeys {
    pub(super) fn new(keys: NodeKeys, now: Instant) -> Self {
        let old = keys.previous.map(|secret| OwnKey::new(secret, 0));
        Self {
            newest: OwnKey::new(keys.current, 1),
            told: if keys.told { Told::Known } else { Told::No },
            since: None,
            tell_at: None,
            look_at: old.is_some().then_some(now + OVERLAP),
            old,
        }
    }

    /// What the data plane of a node with these keys works on.
    pub(super) fn new_shared(&self, now: Instant) -> Arc<Shared> {
        let shared = Shared::new(now, &self.newest.engine);
        self.open_gate(&shared);
        shared
    }

    /// Lets handshakes for these keys in, and for no others.
    pub(super) fn open_gate(&self, shared: &Shared) {
        shared.let_in(self.all().map(|key| &key.engine));
    }

    pub(super) fn public(&self) -> PublicKey {
        self.newest.public
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &OwnKey> {
        std::iter::once(&self.newest).chain(&self.old)
    }

    /// Whose handshake initiation this is, and for which of our keys.
    pub(super) fn sender_of(
        &self,
        initiation: &[u8],
    ) -> Result<(PublicKey, PublicKey), DropReason> {
        let opened = self
            .all()
            .find_map(|own| Some((own.public, handshake_sender(&own.engine, initiation).ok()?)));
        opened.ok_or(DropReason::BadHandshake)
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        let known_at = match self.told {
            Told::At(at) => Some(at + NEWS_TRAVEL),
            Told::No | Told::Known => None,
        };
        [self.tell_at, self.look_at, known_at].into_iter().flatten().min()
    }
}

/// A peer's keys, and what it makes with ours.
#[derive(Debug)]
pub(super) struct PeerKeys {
    pub(super) newest: PublicKey,
    /// Its key before that, and until when it is accepted.
    pub(super) old: Option<(PublicKey, Instant)>,
    /// How often it has changed.
    pub(super) rank: u64,
    pub(super) sets: Vec<DiscoSet>,
    /// It was heard under our newest key.
    pub(super) knows_newest: bool,
    /// It was heard under our old one when it should have known better.
    pub(super) is_behind: bool,
}

#[derive(Debug)]
pub(super) struct DiscoSet {
    pub(super) own: PublicKey,
    pub(super) peer: PublicKey,
    pub(super) keys: DiscoKeys,
}

impl PeerKeys {
    pub(super) fn new(own: &OwnKeys, newest: PublicKey) -> Self {
        let (sets, knows_newest) = (Vec::new(), own.old.is_none());
        let mut keys = Self { newest, old: None, rank: 0, sets, knows_newest, is_behind: false };
        keys.derive(own);
        keys
    }

    /// Makes the sets of all pairs of keys that are good now, and no others.
    pub(super) fn derive(&mut self, own: &OwnKeys) {
        let peers: Vec<PublicKey> = self.all().collect();
        self.sets
            .retain(|set| own.all().any(|own| own.public == set.own) && peers.contains(&set.peer));
        for own in own.all() {
            for peer in &peers {
                if !self.sets.iter().any(|set| set.own == own.public && set.peer == *peer) {
                    let keys = DiscoKeys::derive(&own.secret, peer);
                    self.sets.push(DiscoSet { own: own.public, peer: *peer, keys });
                }
            }
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = PublicKey> + use<> {
        std::iter::once(self.newest).chain(self.old.map(|(key, _)| key))
    }

    /// What the peer's disco packets are known by.
    pub(super) fn tags(&self) -> impl Iterator<Item = Tag> {
        self.sets.iter().map(|set| set.keys.tag_from_peer())
    }

    /// The keys of the packets of the peer that have this tag, and our node key in them.
    pub(super) fn tagged(&self, tag: Tag) -> Option<(&DiscoKeys, PublicKey)> {
        let set = self.sets.iter().find(|set| set.keys.tag_from_peer() == tag)?;
        Some((&set.keys, set.own))
    }

    pub(super) fn sealing(&self, own: PublicKey) -> Option<&DiscoKeys> {
        let fits = |set: &&DiscoSet| set.own == own && set.peer == self.newest;
        self.sets.iter().find(fits).map(|set| &set.keys)
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        self.old.map(|(_, until)| until)
    }
}
