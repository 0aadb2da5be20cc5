//! What programs are told that send to nobody: a refusal at once is worth more than a silence.

use std::time::{Duration, Instant};

use super::{Node, PathKind};
use crate::dataplane::icmp::{self, Trouble};
use crate::dataplane::outbound;
use crate::types::{DropReason, NodeId};
use crate::wire::ip::IpView;

/// A peer that is offline gets this long to come back: as long as it takes nodes to find their
/// server again after it was restarted.
const OFFLINE_PATIENCE: Duration = Duration::from_millis(250);
/// A path that is being made gets this long: programs are to know within a second.
const PATH_PATIENCE: Duration = Duration::from_millis(900);
/// Answers that wait to be written; more at once are of no use to anybody.
const MAX_ANSWERS: usize = 64;

/// An answer to a packet of this machine.
#[derive(Debug)]
pub(super) struct Answer {
    packet: Vec<u8>,
    /// It says that the path to this peer carries no more than this.
    says: Option<(NodeId, u16)>,
}

impl Node {
    /// Takes an answer to a packet of this machine, and what it says of the path to a peer.
    pub(super) fn answer(&mut self, packet: Vec<u8>, says: Option<(NodeId, u16)>) {
        if self.packets.len() < MAX_ANSWERS {
            self.packets.push_back(Answer { packet, says });
        } else {
            self.shared.drops().count(DropReason::QueueFull);
        }
    }

    /// An IP packet for this machine, to be written to the TUN interface; call until none, after all
    /// [events](Self::poll_event) are carried out. The kernel keeps for ten minutes what an answer
    /// says of a path, whatever its route says afterwards: an answer that is not true any more is
    /// left out, and one that is finds the route made.
    pub fn poll_packet(&mut self) -> Option<Vec<u8>> {
        loop {
            let Answer { packet, says } = self.packets.pop_front()?;
            let holds = |(id, mtu)| self.peers.get(&id).is_some_and(|it| it.fast.mtu() == mtu);
            if says.is_none_or(holds) {
                return Some(packet);
            }
        }
    }

    /// Sends the answer to a packet of a peer that the access rules refused.
    pub(super) fn handle_refused(&mut self, answer: &[u8], now: Instant) {
        let mut notes = Vec::new();
        let table = self.shared.table();
        outbound(&self.shared, &table, [answer], now, &mut self.datagrams, &mut notes);
        for note in notes {
            self.handle_note(note, now);
        }
    }

    /// Answers the packets to a peer that have waited for a path in vain, and says when to look
    /// again.
    pub(super) fn look_at_waiting(&mut self, id: NodeId, now: Instant) {
        let patience = match self.path_kind(id) {
            Some(PathKind::Offline) => OFFLINE_PATIENCE,
            Some(PathKind::Connecting) => PATH_PATIENCE,
            // What waits there waits for a session.
            Some(PathKind::Via(_)) | None => return self.set_waiting(id, None),
        };
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let mut state = peer.fast.lock();
        let packets = now.checked_sub(patience).map(|since| state.take_waiting(since));
        let next = state.waiting_since().map(|since| since + patience);
        drop(state);
        for packet in packets.unwrap_or_default() {
            self.shared.drops().count(DropReason::NoPath);
            let dst = IpView::parse(&packet).ok().map(|view| view.dst);
            let answer = dst.and_then(|dst| icmp::answer(&packet, dst, Trouble::HostUnreachable));
            if let Some(answer) = answer {
                self.answer(answer, None);
            }
        }
        self.set_waiting(id, next);
    }

    fn set_waiting(&mut self, id: NodeId, until: Option<Instant>) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.waiting_until = until;
        }
    }

    /// Looks at every peer whose packets have waited long enough.
    pub(super) fn handle_waiting_timeout(&mut self, now: Instant) {
        let due = |until: Option<Instant>| until.is_some_and(|until| until <= now);
        let waiting: Vec<NodeId> = self
            .peers
            .iter()
            .filter(|(_, peer)| due(peer.waiting_until))
            .map(|(id, _)| *id)
            .collect();
        for id in waiting {
            self.look_at_waiting(id, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::Note;
    use crate::node::NodeSettings;
    use crate::node::netmap::with_bob;
    use crate::testing::epoch;
    use crate::types::SecretKey;

    #[test]
    fn nobody_is_told_what_the_path_carried_before() {
        let (now, id) = (epoch(), NodeId::new(2).unwrap());
        let key = SecretKey::from_bytes([1; 32]);
        let mut node = Node::new(key, with_bob(false), NodeSettings::default(), [7; 32], 1, now);
        let too_big = |mtu: u16| Note::TooBig { peer: id, mtu, answer: mtu.to_be_bytes().into() };
        let answers =
            |node: &mut Node| std::iter::from_fn(|| node.poll_packet()).collect::<Vec<_>>();
        node.peers[&id].fast.set_mtu(1_180);
        node.handle_note(too_big(1_180), now);
        assert_eq!(answers(&mut node), [1_180u16.to_be_bytes()]);
        // One that waits while the path gets wider, and one that was on its way to us.
        node.handle_note(too_big(1_180), now);
        node.peers[&id].fast.set_mtu(1_220);
        node.handle_note(too_big(1_180), now);
        node.handle_note(too_big(1_220), now);
        node.handle_note(Note::Answer(vec![7]), now);
        assert_eq!(answers(&mut node), [&1_220u16.to_be_bytes()[..], &[7]]);
    }
}
