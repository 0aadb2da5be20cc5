//! A removal is done when it is written and the relay is closed to the node; it is in effect when
//! every other node has dropped its session. Each says so with the epoch that it has put into
//! effect, and the administrator is told who has not.

use serde::{Deserialize, Serialize};

use super::admin::{Answer, InviteInfo, NodeInfo, RequestError, SCHEMA, info_of};
use super::invites::State;
use super::{Act, ConnectionId, Decision, Server};

/// `overlay server remove --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// The node as it was.
    pub removed: NodeInfo,
    /// The epoch in which the nodes are told; 0 when there is nothing to tell, since the membership had
    /// ended before.
    pub epoch: u64,
    /// The invite that it came with, if that was still open: it is revoked with the removal, or the
    /// node could join again with the same line.
    #[serde(default)]
    pub invite_revoked: Option<InviteInfo>,
    /// Who has taken note.
    #[serde(flatten)]
    pub progress: Acknowledged,
}

/// Which nodes have put an epoch into effect.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledged {
    /// How many of those that are online have.
    pub acknowledged: usize,
    /// How many are online.
    pub online: usize,
    /// The names of those that are online and have not.
    pub waiting: Vec<String>,
    /// The names of those that are offline: they are told as the first thing when they come back.
    pub offline: Vec<String>,
}

impl Removal {
    /// Before it is made.
    fn of(removed: NodeInfo, invite_revoked: Option<InviteInfo>) -> Self {
        let progress = Acknowledged::default();
        Self { schema: SCHEMA, removed, epoch: 0, invite_revoked, progress }
    }
}

impl Server {
    /// Ends a membership, and with it the invite that still lets the same machine in.
    pub(super) fn decide_remove(&self, node: &str, wall: u64) -> Result<Decision, RequestError> {
        let member = self.member(node)?;
        let mut changes = Vec::from_iter(self.members.delete(member.id));
        let invite = self.invites.of(member.invite).map(|invite| invite.record.clone());
        let open = invite.filter(|invite| State::of(invite, wall) == State::Open);
        let revoked = open.map(|mut invite| {
            invite.revoked = true;
            let info = info_of(&invite, wall);
            changes.push(self.invites.write(invite));
            info
        });
        let removal = Removal::of(self.node_info(&member, wall), revoked);
        Ok(Decision { changes, act: Act::Answer(Answer::Removed(Box::new(removal))) })
    }

    /// A node says which epoch is in effect there.
    pub(super) fn note_applied(&mut self, connection: ConnectionId, epoch: u64) {
        // None that was not told can be in effect.
        let epoch = epoch.min(self.distribution.epoch());
        if let Some(known) = self.connections.get_mut(&connection) {
            known.applied = known.applied.max(epoch);
        }
    }

    /// Says of a removal that has just been made in which epoch it will be told.
    pub(super) fn follow(&self, removal: &mut Removal) {
        let epoch = self.distribution.epoch() + 1;
        removal.epoch = if self.distribution.has_removals() { epoch } else { 0 };
        removal.progress = self.acknowledged(removal.epoch);
    }

    /// Who has put `epoch` into effect.
    pub(super) fn acknowledged(&self, epoch: u64) -> Acknowledged {
        let mut progress = Acknowledged::default();
        for member in self.members.iter() {
            let connection = self.online.get(&member.id).and_then(|id| self.connections.get(id));
            let Some(connection) = connection else {
                progress.offline.push(member.name.to_string());
                continue;
            };
            progress.online += 1;
            if connection.applied >= epoch {
                progress.acknowledged += 1;
            } else {
                progress.waiting.push(member.name.to_string());
            }
        }
        progress
    }
}
