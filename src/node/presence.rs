//! Who is there: whom the server sees, and whom we hear by the relay although it does not.
//!
//! The server calls a node offline when its control connection ends. A machine that wakes up after
//! minutes needs two or three round trips to make another one, and then the news has to travel. Its
//! key for the relay is as good as before: it is cut when the membership ends, not with the connection.
//! So a peer that says something by relay that only it can have sealed is there, and answers go that way,
//! until the server sees it again or it is silent for as long as a binding at the relay lasts.

use std::time::{Duration, Instant};

use super::Node;
use crate::path::Via;
use crate::types::NodeId;

/// News of the end of a connection may overtake what its node has sent before.
const SETTLED: Duration = Duration::from_secs(1);
/// A node that says nothing by the relay for so long may be bound there no more.
const HEARD_FOR: Duration = Duration::from_secs(30);

impl Node {
    /// Whether a peer can be reached by relay, as far as is known.
    pub(super) fn is_present(&self, id: NodeId) -> bool {
        let heard = self.peers.get(&id).is_some_and(|peer| peer.heard_until.is_some());
        heard || self.netmap.peers.get(&id).is_some_and(|info| info.online)
    }

    /// Something came from a peer that nobody else can have made.
    pub(super) fn note_present(&mut self, id: NodeId, via: Via, now: Instant) {
        let unseen = self.netmap.peers.get(&id).is_some_and(|info| !info.online);
        let Some(peer) = self.peers.get_mut(&id).filter(|_| unseen && via.is_relay()) else {
            return;
        };
        let since = peer.insight.offline_since;
        if since.is_some_and(|at| now.saturating_duration_since(at) < SETTLED) {
            return;
        }
        if peer.heard_until.replace(now + HEARD_FOR).is_none() {
            self.update_peer(id, now);
        }
    }

    /// Those that have become silent are away, if the server says so; and those that are away are not
    /// looked for for ever because somebody once sent them something.
    pub(super) fn handle_presence_timeout(&mut self, now: Instant) {
        let over = |until: Option<Instant>| until.is_some_and(|until| until <= now);
        let ids: Vec<NodeId> = self
            .peers
            .iter()
            .filter(|(_, peer)| over(peer.heard_until) || over(peer.lapses_at))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.heard_until = peer.heard_until.filter(|until| *until > now);
            }
            self.update_peer(id, now);
        }
    }
}
