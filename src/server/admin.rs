//! What the administrator asks for, and the answers as `--json` prints them.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::invites::State;
pub use super::policy::PolicyInfo;
use super::policy::checked_tags;
use super::records::MemberRecord;
pub use super::removal::{Acknowledged, Removal};
use super::{Act, Decision, Server};
use crate::types::{InviteId, NodeId, NodeName, Tag};
use crate::wire::join::JoinLine;

/// The version of the answers: fields are added, never changed.
pub const SCHEMA: u32 = 1;
/// An invite lives a year at most: for ever is a password.
pub const MAX_TTL_S: u64 = 366 * 24 * 3600;

/// A question on the local socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Make an invite.
    Invite {
        /// How many nodes may join with it.
        uses: u32,
        /// How long, in seconds.
        ttl_s: u64,
        /// The name of the node that joins.
        name: Option<NodeName>,
        /// Its tags.
        #[serde(default)]
        tags: Vec<Tag>,
    },
    /// List the invites.
    InviteList,
    /// Take an invite back.
    InviteRevoke {
        /// Which one.
        id: InviteId,
    },
    /// List the nodes.
    Nodes,
    /// Remove a node.
    Remove {
        /// Its name, overlay address or id.
        node: String,
    },
    /// Look who has taken note of a removal.
    Acknowledged {
        /// The one of [`Removal::epoch`].
        epoch: u64,
    },
    /// Give a node another name.
    Rename {
        /// Its name, overlay address or id.
        node: String,
        /// The new name.
        name: NodeName,
    },
    /// Give a node these tags and no others.
    Tag {
        /// Its name, overlay address or id.
        node: String,
        /// All of them.
        tags: Vec<Tag>,
    },
    /// Set when a node's membership ends.
    Expire {
        /// Its name, overlay address or id.
        node: String,
        /// In so many seconds; none for never.
        in_s: Option<u64>,
    },
    /// Set how long the memberships last of nodes that join from now on.
    ExpireNew {
        /// So many seconds; none for ever.
        in_s: Option<u64>,
    },
    /// Show the access rules.
    PolicyShow,
    /// Set the access rules.
    PolicySet {
        /// The file.
        text: String,
    },
    /// Take the access rules away.
    PolicyClear,
}

impl Request {
    /// Whether it changes something, or shows a secret.
    #[must_use]
    pub fn is_write(&self) -> bool {
        !matches!(
            self,
            Self::Nodes | Self::InviteList | Self::PolicyShow | Self::Acknowledged { .. }
        )
    }
}

/// For logs: the text of access rules is long, and `policy show` has it.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PolicySet { text } => write!(f, "PolicySet {{ {} bytes }}", text.len()),
            other => write!(f, "{other:?}"),
        }
    }
}

/// Why a request is turned down.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No node of that name, address or id.
    #[error("there is no node \"{node}\"")]
    UnknownNode {
        /// What was asked for.
        node: String,
    },
    /// No invite of that id.
    #[error("there is no invite {id}")]
    UnknownInvite {
        /// What was asked for.
        id: InviteId,
    },
    /// Another node has that name.
    #[error("another node is called \"{name}\"")]
    NameTaken {
        /// The name.
        name: NodeName,
    },
    /// Numbers that make no sense.
    #[error("an invite has at least one use and lives between one second and {} days", MAX_TTL_S / 86400)]
    BadInvite,
    /// Nothing that a join line could name.
    #[error("this machine has no address under which nodes could find the server")]
    NoAddress,
    /// More tags than a node can have.
    #[error("a node has 32 tags at the most")]
    TooManyTags,
    /// A time that makes no sense.
    #[error("a membership lasts between one second and ten years, or for ever")]
    BadExpiry,
    /// Access rules that cannot be read, or whose own tests fail.
    #[error("these access rules cannot be set")]
    BadPolicy {
        /// What is wrong with them, and where.
        reason: String,
    },
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// A new invite.
    Invited(Invited),
    /// All invites.
    Invites(InviteList),
    /// An invite that is of no more use.
    Revoked(InviteInfo),
    /// All nodes.
    Nodes(NodeList),
    /// A node that is gone.
    Removed(Box<Removal>),
    /// Who has taken note of it.
    Acknowledged(Acknowledged),
    /// A node with its new name.
    Renamed(NodeInfo),
    /// A node with its new tags.
    Tagged(NodeInfo),
    /// A node whose membership ends at another time now.
    Expiring(NodeInfo),
    /// How long new memberships last now.
    ExpiringNew(NewMembers),
    /// The access rules.
    Policy(PolicyInfo),
}

/// `overlay server invite --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invited {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// The join line.
    pub join: JoinText,
    /// The invite's id.
    pub id: InviteId,
    /// How many nodes may join with it.
    pub uses: u32,
    /// When it ends (RFC 3339, UTC).
    pub expires: String,
    /// Why most nodes cannot come in with it, and what to do about that; none when they can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// The text of a join line: shown to who asked for it, never to a log.
#[derive(
    Clone, PartialEq, Eq, Serialize, Deserialize, zeroize::Zeroize, zeroize::ZeroizeOnDrop,
)]
#[serde(transparent)]
pub struct JoinText(String);

impl JoinText {
    /// The text.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for JoinText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinText(***)")
    }
}

/// `overlay server invite list --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteList {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// The invites, newest last.
    pub invites: Vec<InviteInfo>,
}

/// One invite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteInfo {
    /// Its id.
    pub id: InviteId,
    /// The name of the node that joins with it.
    pub name: Option<NodeName>,
    /// How many nodes may join with it.
    pub uses: u32,
    /// How many have.
    pub used: u32,
    /// When it was made (RFC 3339, UTC).
    pub created: String,
    /// When it ends (RFC 3339, UTC).
    pub expires: String,
    /// `open`, `expired`, `used` or `revoked`.
    pub state: String,
    /// The tags of the node that joins with it.
    #[serde(default)]
    pub tags: Vec<Tag>,
}

/// `overlay server nodes --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeList {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// The nodes, in the order in which they joined.
    pub nodes: Vec<NodeInfo>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its overlay addresses.
    pub ipv4: Ipv4Addr,
    /// Its overlay addresses.
    pub ipv6: Ipv6Addr,
    /// Whether it is connected to the server.
    pub online: bool,
    /// When it was last connected (RFC 3339, UTC); for a node that is online, now.
    pub last_seen: String,
    /// When it joined (RFC 3339, UTC).
    pub joined: String,
    /// Its node key.
    pub public_key: String,
    /// The address that its control connection comes from.
    pub remote: Option<String>,
    /// Its tags.
    #[serde(default)]
    pub tags: Vec<Tag>,
    /// Since when it has its node key (RFC 3339, UTC); none when that is not known.
    #[serde(default)]
    pub key_since: Option<String>,
    /// When its membership ends (RFC 3339, UTC); none for never.
    #[serde(default)]
    pub expires: Option<String>,
    /// Whether it has ended.
    #[serde(default)]
    pub expired: bool,
    /// Whether two running machines have its keys, as it was in the last minutes.
    #[serde(default)]
    pub cloned: bool,
}

/// `overlay server expire --new --json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewMembers {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// How long the memberships last of nodes that join, in seconds; none for ever.
    pub members_last_s: Option<u64>,
}

/// A time as all answers have it (RFC 3339, UTC).
#[must_use]
pub fn rfc3339(unix_seconds: u64) -> String {
    // The formatter knows no years beyond 9999.
    let seconds = unix_seconds.min(253_402_300_799);
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

impl Server {
    /// Decides what to do about a request of the administrator.
    ///
    /// # Errors
    /// When it names something that is not there, or makes no sense. Nothing has changed then.
    pub fn decide(&mut self, request: Request, wall: u64) -> Result<Decision, RequestError> {
        match request {
            Request::Invite { uses, ttl_s, name, tags } => {
                self.decide_invite(uses, ttl_s, name, checked_tags(tags)?, wall)
            }
            Request::InviteList => {
                let mut invites: Vec<_> = self.invites.iter().collect();
                invites.sort_by_key(|invite| invite.created);
                let invites = invites.iter().map(|invite| info_of(invite, wall)).collect();
                Ok(read(Answer::Invites(InviteList { schema: SCHEMA, invites })))
            }
            Request::InviteRevoke { id } => {
                let invite = self.invites.of(id).ok_or(RequestError::UnknownInvite { id })?;
                let mut record = invite.record.clone();
                record.revoked = true;
                let answer = Answer::Revoked(info_of(&record, wall));
                Ok(Decision { changes: vec![self.invites.write(record)], act: Act::Answer(answer) })
            }
            Request::Nodes => {
                let nodes = self.members.iter().map(|member| self.node_info(member, wall));
                let nodes = nodes.collect();
                Ok(read(Answer::Nodes(NodeList { schema: SCHEMA, nodes })))
            }
            Request::Remove { node } => self.decide_remove(&node, wall),
            Request::Acknowledged { epoch } => {
                Ok(read(Answer::Acknowledged(self.acknowledged(epoch))))
            }
            Request::Rename { node, name } => self.decide_rename(&node, name, wall),
            Request::Tag { node, tags } => self.decide_tag(&node, tags, wall),
            Request::Expire { node, in_s } => self.decide_expire(&node, in_s, wall),
            Request::ExpireNew { in_s } => self.decide_expire_new(in_s),
            Request::PolicyShow => Ok(self.decide_policy_show()),
            Request::PolicySet { text } => self.decide_policy_set(text, wall),
            Request::PolicyClear => Ok(self.decide_policy_clear(wall)),
        }
    }

    fn decide_invite(
        &mut self,
        uses: u32,
        ttl_s: u64,
        name: Option<NodeName>,
        tags: Vec<Tag>,
        wall: u64,
    ) -> Result<Decision, RequestError> {
        if uses == 0 || !(1..=MAX_TTL_S).contains(&ttl_s) {
            return Err(RequestError::BadInvite);
        }
        if self.settings.addresses.is_empty() {
            return Err(RequestError::NoAddress);
        }
        // The node that joins would be called otherwise, and rules may go by the name.
        if let Some(name) = name.as_ref().filter(|name| self.members.name_owner(name).is_some()) {
            return Err(RequestError::NameTaken { name: name.clone() });
        }
        let (record, secret) = self.invites.make(uses, ttl_s, name, tags, &mut self.rng, wall);
        let line = JoinLine {
            network: self.network.record.id,
            server_key: self.settings.server_key,
            next_server_key: None,
            addresses: self.settings.addresses.clone(),
            invite: record.id,
            secret,
        };
        let answer = Answer::Invited(Invited {
            schema: SCHEMA,
            join: JoinText(line.expose().to_string()),
            id: record.id,
            uses,
            expires: rfc3339(record.expires),
            // Whoever knows the machine's addresses adds it.
            warning: None,
        });
        let mut changes = self.invites.forget_old(wall);
        changes.push(self.invites.write(record));
        Ok(Decision { changes, act: Act::Answer(answer) })
    }

    fn decide_rename(
        &self,
        node: &str,
        name: NodeName,
        wall: u64,
    ) -> Result<Decision, RequestError> {
        let mut record = self.member(node)?;
        if self.members.name_owner(&name).is_some_and(|owner| owner != record.id) {
            return Err(RequestError::NameTaken { name });
        }
        (record.name, record.named) = (name, true);
        let answer = Answer::Renamed(self.node_info(&record, wall));
        Ok(Decision { changes: vec![self.members.write(record)], act: Act::Answer(answer) })
    }

    /// Writes down when nodes were last seen, so that it outlives a restart.
    pub fn decide_seen(&mut self, wall: u64) -> Decision {
        for node in self.online.keys() {
            self.seen.insert(*node, wall);
        }
        let write = |(node, last_seen): (&NodeId, &u64)| {
            let record = &self.members.of(*node)?.record;
            let record = MemberRecord { last_seen: *last_seen, ..record.clone() };
            (self.members.of(*node)?.record != record).then(|| self.members.write(record))
        };
        Decision { changes: self.seen.iter().filter_map(write).collect(), act: Act::Nothing }
    }

    pub(super) fn member(&self, text: &str) -> Result<MemberRecord, RequestError> {
        let found = self.members.find(text).map(|member| member.record.clone());
        found.ok_or_else(|| RequestError::UnknownNode { node: text.into() })
    }

    pub(super) fn node_info(&self, member: &MemberRecord, wall: u64) -> NodeInfo {
        let addresses = self.members.addresses(member);
        let online = self.distribution.is_online(member.id);
        let seen = self.seen.get(&member.id).copied().unwrap_or(member.last_seen);
        let connection = self.online.get(&member.id).and_then(|id| self.connections.get(id));
        NodeInfo {
            id: member.id.to_string(),
            name: member.name.to_string(),
            ipv4: addresses.v4,
            ipv6: addresses.v6,
            online,
            last_seen: rfc3339(if online { wall } else { seen }),
            joined: rfc3339(member.joined),
            public_key: member.node_key.to_string(),
            remote: connection.map(|connection| connection.about.observed.to_string()),
            tags: member.tags.clone(),
            key_since: Some(member.key_since).filter(|at| *at != 0).map(rfc3339),
            expires: member.expires.map(rfc3339),
            expired: member.is_over() || member.expires.is_some_and(|at| at <= wall),
            cloned: self.clones.is_cloned(member.id, wall),
        }
    }
}

/// A decision that only tells something.
fn read(answer: Answer) -> Decision {
    Decision { changes: Vec::new(), act: Act::Answer(answer) }
}

pub(super) fn info_of(invite: &super::records::InviteRecord, wall: u64) -> InviteInfo {
    InviteInfo {
        id: invite.id,
        name: invite.name.clone(),
        uses: invite.uses,
        used: invite.used,
        created: rfc3339(invite.created),
        expires: rfc3339(invite.expires),
        state: State::of(invite, wall).as_str().into(),
        tags: invite.tags.clone(),
    }
}
