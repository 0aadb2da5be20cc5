//! Invites: made, looked at, used, taken back.

use std::collections::BTreeMap;

use rand::Rng;
use rand::rngs::StdRng;

use super::records::{Change, InviteRecord, Key, Record, Versioned};
use crate::types::{InviteId, NodeName, Tag};
use crate::wire::control::{InviteUse, RefusedCode};
use crate::wire::join::InviteSecret;

/// An invite that ended this long ago is forgotten: until then its holder is told why.
const KEPT_AFTER_END_S: u64 = 30 * 24 * 3600;

/// All invites.
#[derive(Debug)]
pub(super) struct Invites {
    by_id: BTreeMap<InviteId, Versioned<InviteRecord>>,
}

/// What may be done with an invite now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Open,
    Expired,
    UsedUp,
    Revoked,
}

impl State {
    pub(super) fn of(invite: &InviteRecord, wall: u64) -> Self {
        if invite.revoked {
            Self::Revoked
        } else if invite.used >= invite.uses {
            Self::UsedUp
        } else if invite.expires <= wall {
            Self::Expired
        } else {
            Self::Open
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Expired => "expired",
            Self::UsedUp => "used",
            Self::Revoked => "revoked",
        }
    }
}

impl Invites {
    pub(super) fn new(invites: Vec<Versioned<InviteRecord>>) -> Self {
        Self { by_id: invites.into_iter().map(|invite| (invite.record.id, invite)).collect() }
    }

    pub(super) fn put(&mut self, invite: Versioned<InviteRecord>) {
        self.by_id.insert(invite.record.id, invite);
    }

    pub(super) fn remove(&mut self, id: InviteId) {
        self.by_id.remove(&id);
    }

    pub(super) fn of(&self, id: InviteId) -> Option<&Versioned<InviteRecord>> {
        self.by_id.get(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &InviteRecord> {
        self.by_id.values().map(|invite| &invite.record)
    }

    /// The invite that is presented, if it may be used now. Who does not hold the secret learns
    /// nothing, not even whether there is such an invite.
    pub(super) fn check(
        &self,
        presented: &InviteUse,
        wall: u64,
    ) -> Result<&Versioned<InviteRecord>, RefusedCode> {
        let hash = presented.secret.hash();
        let invite = self
            .by_id
            .get(&InviteId(presented.id))
            .filter(|invite| same(invite.record.secret_hash.as_bytes(), hash.as_bytes()))
            .ok_or(RefusedCode::NotAccepted)?;
        match State::of(&invite.record, wall) {
            State::Open => Ok(invite),
            State::Expired => Err(RefusedCode::InviteExpired),
            State::UsedUp => Err(RefusedCode::InviteUsedUp),
            State::Revoked => Err(RefusedCode::InviteRevoked),
        }
    }

    /// The change that makes a new invite, and its secret.
    pub(super) fn make(
        &self,
        uses: u32,
        ttl_s: u64,
        name: Option<NodeName>,
        tags: Vec<Tag>,
        rng: &mut StdRng,
        wall: u64,
    ) -> (InviteRecord, InviteSecret) {
        let id = loop {
            let id = InviteId(rng.random());
            if !self.by_id.contains_key(&id) {
                break id;
            }
        };
        let secret = InviteSecret(rng.random());
        let record = InviteRecord {
            id,
            secret_hash: secret.hash(),
            name,
            used: 0,
            uses,
            created: wall,
            expires: wall.saturating_add(ttl_s),
            revoked: false,
            tags,
        };
        (record, secret)
    }

    /// The change that writes `record` over what is there under its id.
    pub(super) fn write(&self, record: InviteRecord) -> Change {
        let expected = self.of(record.id).map_or(0, |invite| invite.rev);
        Change::put(Record::Invite(record), expected)
    }

    /// The changes that forget what ended long ago.
    pub(super) fn forget_old(&self, wall: u64) -> Vec<Change> {
        self.by_id
            .values()
            .filter(|invite| invite.record.expires.saturating_add(KEPT_AFTER_END_S) < wall)
            .map(|invite| Change::delete(Key::Invite(invite.record.id), invite.rev))
            .collect()
    }
}

/// Compares in a time that depends on the lengths alone.
fn same(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
    a.len() == b.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn only_the_holder_of_the_secret_is_told_what_became_of_an_invite() {
        let mut invites = Invites::new(Vec::new());
        let mut rng = StdRng::seed_from_u64(1);
        let (record, secret) = invites.make(1, 3600, None, Vec::new(), &mut rng, 1000);
        let present =
            |secret: InviteSecret, id: InviteId| InviteUse { id: id.0, secret, network: [0; 8] };
        let right = present(secret, record.id);
        let wrong = present(InviteSecret([0; 20]), record.id);
        let unknown = present(InviteSecret([0; 20]), InviteId([0xee; 4]));
        let variants = [
            (record.clone(), 2000, Ok(())),
            (record.clone(), 4600, Err(RefusedCode::InviteExpired)),
            (InviteRecord { used: 1, ..record.clone() }, 2000, Err(RefusedCode::InviteUsedUp)),
            (InviteRecord { revoked: true, ..record }, 2000, Err(RefusedCode::InviteRevoked)),
        ];
        for (record, wall, expected) in variants {
            invites.put(Versioned { rev: 1, record });
            assert_eq!(invites.check(&right, wall).map(|_| ()), expected);
            for stranger in [&wrong, &unknown] {
                let told = invites.check(stranger, wall).map(|_| ());
                assert_eq!(told, Err(RefusedCode::NotAccepted));
            }
        }
    }

    #[test]
    fn comparing_finds_every_difference() {
        assert!(same(b"abc", b"abc") && same(b"", b""));
        assert!(!same(b"abc", b"abd") && !same(b"abc", b"ab") && !same(b"", b"a"));
    }
}
