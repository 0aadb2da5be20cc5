//! What the server keeps on disk, as typed records. How they are written is the store's business.

use serde::{Deserialize, Serialize};

use crate::types::{InviteId, NetworkId, NodeId, NodeName, OverlayRange, PublicKey, Tag};

/// The network itself; there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Its id, random.
    pub id: NetworkId,
    /// Its addresses.
    pub range: OverlayRange,
    /// When it was made, in Unix seconds.
    pub created: u64,
    /// How long the memberships last of nodes that join, in seconds; none for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members_last_s: Option<u64>,
    /// The key that the server of this network has; none until it has been seen once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_key: Option<PublicKey>,
}

/// A node that is let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Its number, for ever.
    pub id: NodeId,
    /// Its identity on the control connection.
    pub machine_key: PublicKey,
    /// Its WireGuard and disco key.
    pub node_key: PublicKey,
    /// Its name.
    pub name: NodeName,
    /// The name that it asked for last.
    pub wish: Option<NodeName>,
    /// Its place in the address range.
    pub host: u32,
    /// When it joined, in Unix seconds.
    pub joined: u64,
    /// When it was last seen, in Unix seconds; written now and then.
    pub last_seen: u64,
    /// With which invite it came.
    pub invite: InviteId,
    /// What access rules know it by, beside its name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<Tag>,
    /// Since when it has its node key, in Unix seconds; 0 when that is not known.
    #[serde(default)]
    pub key_since: u64,
    /// When its membership ends, in Unix seconds; none for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<u64>,
    /// What of that has been noted.
    #[serde(default, skip_serializing_if = "ExpiryNoted::is_nothing")]
    pub expiry_noted: ExpiryNoted,
    /// Whether an administrator gave it its name: then no wish of it changes that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub named: bool,
}

/// What has been noted of the end of a membership: each is one line in the log of changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpiryNoted {
    /// Nothing yet.
    #[default]
    Nothing,
    /// That it comes soon.
    Soon,
    /// That it has come: the node is shut out.
    Over,
}

impl ExpiryNoted {
    fn is_nothing(&self) -> bool {
        *self == Self::Nothing
    }
}

/// A right to join, for whoever holds the secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteRecord {
    /// Its id.
    pub id: InviteId,
    /// A hash of its secret; the secret itself is only in the join line.
    pub secret_hash: String,
    /// The name of the node that joins with it.
    pub name: Option<NodeName>,
    /// How often it was used.
    pub used: u32,
    /// How often it may be used.
    pub uses: u32,
    /// When it was made, in Unix seconds.
    pub created: u64,
    /// When it ends, in Unix seconds.
    pub expires: u64,
    /// Whether somebody took it back.
    pub revoked: bool,
    /// The tags of the node that joins with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<Tag>,
}

/// The access rules; there is one such record, or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRecord {
    /// The file, as the administrator wrote it; none when the rules were taken away. The record
    /// stays, since a deleted one never comes back.
    pub text: Option<String>,
    /// When it was set, in Unix seconds.
    pub set: u64,
}

/// One kind of record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// The network.
    Network(NetworkRecord),
    /// A node.
    Member(MemberRecord),
    /// An invite.
    Invite(InviteRecord),
    /// The access rules.
    Policy(PolicyRecord),
}

/// Which record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// The network.
    Network,
    /// The node of this number.
    Member(NodeId),
    /// The invite of this id.
    Invite(InviteId),
    /// The access rules.
    Policy,
}

impl Record {
    /// Which record this is.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Network(_) => Key::Network,
            Self::Member(member) => Key::Member(member.id),
            Self::Invite(invite) => Key::Invite(invite.id),
            Self::Policy(_) => Key::Policy,
        }
    }
}

/// A record and the revision of the store at which it was written; 0 when it was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The revision.
    pub rev: u64,
    /// The record.
    pub record: T,
}

/// One change to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Of which record.
    pub key: Key,
    /// The revision that the record must have; 0 when it must not exist.
    pub expected_rev: u64,
    /// The new content, or none to delete it.
    pub record: Option<Record>,
}

impl Change {
    /// Writes `record` in place of revision `expected_rev`.
    pub(super) fn put(record: Record, expected_rev: u64) -> Self {
        Self { key: record.key(), expected_rev, record: Some(record) }
    }

    /// Deletes revision `expected_rev` of a record.
    pub(super) fn delete(key: Key, expected_rev: u64) -> Self {
        Self { key, expected_rev, record: None }
    }
}

/// All that the store holds, as the server starts with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Records {
    /// The network.
    pub network: Versioned<NetworkRecord>,
    /// The nodes.
    pub members: Vec<Versioned<MemberRecord>>,
    /// The invites.
    pub invites: Vec<Versioned<InviteRecord>>,
    /// The access rules, if there are any.
    pub policy: Option<Versioned<PolicyRecord>>,
    /// The highest node number ever given, removed nodes included.
    pub highest_node: u32,
}
