//! How news travels to the peers, by which their agents time who sends to whom first; and the
//! datagrams that open our own NAT only.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::pace::BURST;
use super::{Node, Opener};
use crate::path::{OPENER_TTL, Signalling};
use crate::types::{NodeId, SocketId, TxId};
use crate::wire::disco::Message;

/// The server gathers changes for so long per node that is online.
const GATHER_PER_NODE: Duration = Duration::from_micros(500);

impl Node {
    /// Tells every agent how news travels now.
    pub(super) fn update_signalling(&mut self) {
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            let signalling = self.signalling(id);
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.agent.set_signalling(signalling);
            }
        }
    }

    /// How news travels between us and a peer now.
    pub(super) fn signalling(&self, id: NodeId) -> Signalling {
        let peers = self.netmap.peers.len();
        let at_once = self.link_up && peers <= self.settings.eager_peers;
        let peers = u32::try_from(peers).unwrap_or(u32::MAX);
        // In a larger network a peer's turn comes later, or with our call.
        let eager = at_once && peers <= BURST;
        Signalling {
            server_rtt: self.relay.rtt().or(self.sighting.rtt()),
            announced_at: self.announced_at,
            counts: self.prediction.counts(),
            has_guesses: self.prediction.has_guesses(),
            doubles: self.netmap.identity.as_ref().is_some_and(|own| own.id > id),
            lag: eager.then(|| GATHER_PER_NODE.saturating_mul(peers)),
        }
    }

    /// The server has seen us, at another endpoint than before if `moved`.
    pub(super) fn note_announced(&mut self, moved: bool, now: Instant) {
        if moved || self.announced_at.is_none() {
            self.announced_at = Some(now);
        }
        self.update_signalling();
    }

    /// Seals a ping that opens our NAT towards `remote`.
    pub(super) fn send_opener(
        &mut self,
        id: NodeId,
        remote: SocketAddr,
        socket: SocketId,
        tx: TxId,
    ) {
        let Some(datagram) = self.seal_disco(id, &Message::ping(tx, self.able())) else { return };
        self.openers.push_back(Opener { remote, socket, ttl: OPENER_TTL, datagram });
    }
}
