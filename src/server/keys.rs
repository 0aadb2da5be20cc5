//! A member renews its node key on a connection that stands.
//!
//! It accepts both keys from before it says so until its peers have changed over; so all that is to
//! be done is to write the new one down, tell the others, and say that it is written. It holds the
//! session of the member's machine key, and what comes twice is done once. A machine that was
//! copied has the same machine key: which of the two is the member is decided before (`clones`).

use super::records::MemberRecord;
use super::{Act, ConnectionId, Decision, Server};
use crate::types::{NodeId, PublicKey};
use crate::wire::control::ServerMessage;

/// Whether it could be anybody's.
pub(super) fn is_key(key: PublicKey) -> bool {
    key.0 != [0; 32]
}

impl Server {
    /// What is to be done about a member's wish for another node key; none for a key that it cannot
    /// have, or a wish that comes too soon: it goes on with the one it has, and asks again.
    pub(super) fn decide_key(
        &mut self,
        connection: ConnectionId,
        node: NodeId,
        key: PublicKey,
        wall: u64,
    ) -> Option<Decision> {
        let member = &self.members.of(node)?.record;
        let record = MemberRecord { node_key: key, key_since: wall, ..member.clone() };
        let act = Act::Rekey { connection, node, key };
        if member.node_key == key {
            return Some(Decision { changes: Vec::new(), act });
        }
        let possible = self.may_have_key(Some(node), key);
        if !possible || !self.pace.allows(node, wall) {
            return None;
        }
        self.pace.note(node, wall);
        Some(Decision { changes: vec![self.members.write(record)], act })
    }

    /// Whether a member, or somebody who is none yet, may have this node key: one of zeros is no key,
    /// and with another node's one could take its packets.
    pub(super) fn may_have_key(&self, node: Option<NodeId>, key: PublicKey) -> bool {
        let owner = self.members.with_node_key(&key);
        is_key(key) && owner.is_none_or(|owner| Some(owner) == node)
    }

    /// The new key is written down.
    pub(super) fn confirm_key(&mut self, connection: ConnectionId, key: PublicKey) {
        self.send(connection, &ServerMessage { node_key: Some(key.0), ..Default::default() });
    }
}
