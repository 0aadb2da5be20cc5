//! What each node is told about the others: the whole netmap once, then what has changed.
//!
//! Every peer's description is encoded when it changes and kept. A delta is put together once and
//! sent to all; only a node that is in it itself gets its own copy without itself. So the work
//! follows the change, not the network. Changes that come close together travel together: the
//! first goes out at once, the next ones wait a little, longer in a larger network (up to
//! [`GATHER`]), or a thousand nodes that reconnect would cost a million messages. A removal waits
//! for nothing.
//!
//! In a network of more nodes than the settings say, a node is told of the peers that it uses only
//! (`parts`), and so is everybody of it: a change goes to a few nodes and does not wait.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::parts::Parts;
use super::records::MemberRecord;
use super::update::{Update, in_order};
use super::{ConnectionId, Output, Server};
use crate::policy::Affected;
use crate::types::{
    Candidate, CandidateKind, MAX_CANDIDATES, NodeId, OverlayAddrs, usable_underlay,
};
use crate::wire::control::{MAX_FIND, ServerMessage, WireCandidate, WirePeer};

/// The least time between two deltas to everybody in the largest network.
const GATHER: Duration = Duration::from_millis(500);
/// The same for each node that is online: a small network has no storms, only people who wait.
const GATHER_PER_NODE: Duration = Duration::from_micros(500);

/// Whether a node has a control connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    Online,
    Offline,
}

/// What the nodes are told, and what they have not been told yet.
#[derive(Debug)]
pub(super) struct Distribution {
    /// Of the newest message to anybody.
    epoch: u64,
    /// Of the newest message to those who are told of everybody.
    whole_epoch: u64,
    /// Those who are not.
    pub(super) parts: Parts,
    peers: BTreeMap<NodeId, Described>,
    changed: BTreeSet<NodeId>,
    removed: BTreeSet<NodeId>,
    /// Nodes whose own name changed.
    renamed: BTreeSet<NodeId>,
    /// For whom the access rules may say something else.
    rules_stale: Affected,
    next_flush: Instant,
    /// A time that is past.
    origin: Instant,
}

#[derive(Debug)]
struct Described {
    peer: WirePeer,
    encoded: Vec<u8>,
}

impl Distribution {
    /// Epochs start at the time, so that they rise over a restart too.
    pub(super) fn new(now: Instant, wall: u64) -> Self {
        let epoch = wall.saturating_mul(256);
        Self {
            epoch,
            whole_epoch: epoch,
            parts: Parts::new(now),
            peers: BTreeMap::new(),
            changed: BTreeSet::new(),
            removed: BTreeSet::new(),
            renamed: BTreeSet::new(),
            rules_stale: Affected::default(),
            next_flush: now,
            origin: now,
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The last epoch that `node` was told.
    pub(super) fn told_epoch(&self, node: NodeId) -> u64 {
        self.parts.get(node).map_or(self.whole_epoch, |part| part.epoch)
    }

    /// Takes a new or changed member.
    pub(super) fn put_member(&mut self, member: &MemberRecord, addresses: OverlayAddrs) {
        let known = self.peers.get(&member.id).map(|described| &described.peer);
        if known.is_some_and(|peer| peer.name != member.name.as_str()) {
            self.renamed.insert(member.id);
            self.parts.note_renamed(member.id);
        }
        let peer = WirePeer {
            id: member.id.number(),
            name: member.name.to_string(),
            node_key: member.node_key.0,
            ipv4: addresses.v4,
            ipv6: addresses.v6,
            online: known.is_some_and(|peer| peer.online),
            candidates: known.map(|peer| peer.candidates.clone()).unwrap_or_default(),
            expires: member.expires,
        };
        self.put(member.id, peer);
    }

    pub(super) fn set_online(&mut self, node: NodeId, presence: Presence) {
        if let Some(described) = self.peers.get(&node) {
            let online = presence == Presence::Online;
            self.put(node, WirePeer { online, ..described.peer.clone() });
        }
    }

    pub(super) fn set_candidates(&mut self, node: NodeId, candidates: Vec<Candidate>) {
        if let Some(described) = self.peers.get(&node) {
            let candidates = candidates.into_iter().map(WireCandidate::from).collect();
            self.put(node, WirePeer { candidates, ..described.peer.clone() });
        }
    }

    /// Takes where the relay saw a node. The node itself announces the same list a little later.
    fn set_reflexive(&mut self, node: NodeId, endpoint: SocketAddr) {
        let Some(described) = self.peers.get(&node) else { return };
        let mut candidates = described.peer.candidates.clone();
        let uplink = CandidateKind::Uplink.code();
        if candidates.iter().any(|it| it.endpoint == endpoint && it.kind == uplink) {
            // It goes by another uplink for a while, and what it has announced holds.
            return;
        }
        let reflexive = WireCandidate::from(Candidate::new(endpoint, CandidateKind::Reflexive));
        candidates.retain(|candidate| candidate.kind != reflexive.kind);
        if candidates.iter().all(|candidate| candidate.endpoint != endpoint) {
            candidates.insert(0, reflexive);
            candidates.truncate(MAX_CANDIDATES);
        }
        self.put(node, WirePeer { candidates, ..described.peer.clone() });
    }

    fn put(&mut self, node: NodeId, peer: WirePeer) {
        if self.peers.get(&node).is_some_and(|described| described.peer == peer) {
            return;
        }
        let encoded = crate::wire::control::encode(&peer);
        self.peers.insert(node, Described { peer, encoded });
        self.changed.insert(node);
        self.removed.remove(&node);
        self.parts.note_changed(node);
    }

    pub(super) fn remove(&mut self, node: NodeId) {
        if self.peers.remove(&node).is_some() {
            self.changed.remove(&node);
            self.renamed.remove(&node);
            self.removed.insert(node);
            self.parts.remove(node);
        }
    }

    /// Whether the next delta says of somebody that it is gone.
    pub(super) fn has_removals(&self) -> bool {
        !self.removed.is_empty()
    }

    /// Whether a node has a control connection, and where it says it may be reached.
    pub(super) fn is_online(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|described| described.peer.online)
    }

    /// The next delta says to these what has become of the access rules.
    pub(super) fn set_rules_stale(&mut self, affected: &Affected) {
        self.rules_stale.merge(affected);
        self.parts.note_rules(affected);
    }

    /// The message with all that `receiver` is told of, who lets in what `filter` says.
    pub(super) fn full(&self, receiver: NodeId, filter: Option<&[u8]>) -> Vec<u8> {
        let is_part = self.parts.contains(receiver);
        let peers: Vec<&[u8]> = if is_part {
            self.parts.peers(receiver).filter_map(|node| self.described(node)).collect()
        } else {
            let others = self.peers.iter().filter(|(node, _)| **node != receiver);
            others.map(|(_, described)| described.encoded.as_slice()).collect()
        };
        let members = is_part.then(|| self.members());
        let to = self.told_epoch(receiver);
        Update { to, peers, filter, members, ..Update::default() }.encode()
    }

    pub(super) fn described(&self, node: NodeId) -> Option<&[u8]> {
        Some(self.peers.get(&node)?.encoded.as_slice())
    }

    pub(super) fn members(&self) -> u32 {
        u32::try_from(self.peers.len()).unwrap_or(u32::MAX)
    }

    /// Forgets what was not told: while nobody is online there is nobody to tell.
    pub(super) fn forget_pending(&mut self) {
        self.changed.clear();
        self.removed.clear();
        self.renamed.clear();
        self.rules_stale = Affected::default();
    }

    /// When the next delta should go out, if there is something in it.
    pub(super) fn flush_at(&self) -> Option<Instant> {
        let nothing = self.changed.is_empty()
            && self.removed.is_empty()
            && self.renamed.is_empty()
            && self.rules_stale.is_nobody();
        if nothing {
            return None;
        }
        // The one in whose part it is no more waits for nothing.
        Some(if self.removed.is_empty() { self.next_flush } else { self.origin })
    }

    /// When somebody should be told something.
    pub(super) fn next_due(&self, anybody_whole: bool) -> Option<Instant> {
        let whole = self.flush_at().filter(|_| anybody_whole);
        [whole, self.parts.next_due()].into_iter().flatten().min()
    }

    /// The message from the last epoch to the new one for those who are told of everybody, without
    /// `receiver` in it and with the filter that is new for it.
    fn delta(&self, from: u64, receiver: Option<NodeId>, filter: Option<&[u8]>) -> Vec<u8> {
        let peers = self.changed.iter().filter(|node| Some(**node) != receiver);
        let renamed = receiver.filter(|node| self.renamed.contains(node));
        Update {
            from: Some(from),
            to: self.epoch,
            peers: peers.filter_map(|node| self.described(*node)).collect(),
            removed: &in_order(&self.removed),
            own_name: renamed.and_then(|node| self.name_of(node)),
            filter,
            ..Update::default()
        }
        .encode()
    }

    fn name_of(&self, node: NodeId) -> Option<&str> {
        Some(&*self.peers.get(&node)?.peer.name)
    }

    /// The message with all that a node has not been told that is told of a part.
    fn part_delta(&self, receiver: NodeId, to: u64, filter: Option<&[u8]>) -> Option<Vec<u8>> {
        let part = self.parts.get(receiver)?;
        let own_name = part.renamed.then(|| self.name_of(receiver)).flatten();
        let update = Update {
            from: Some(part.epoch),
            to,
            peers: part.changed.iter().filter_map(|node| self.described(*node)).collect(),
            removed: &in_order(&part.removed),
            own_name,
            filter,
            members: Some(self.members()),
            forgotten: &in_order(&part.forgotten),
        };
        Some(update.encode())
    }

    /// From now on `node`, which was told of everybody, is told of no others any more.
    fn narrow(&mut self, node: NodeId) {
        let known: Vec<NodeId> = self.peers.keys().copied().collect();
        self.parts.enter(node, known, self.whole_epoch);
        let stale = self.rules_stale.holds(node);
        self.parts.put_untold(node, &self.changed, &self.removed, stale);
        if self.renamed.contains(&node) {
            self.parts.note_renamed(node);
        }
    }

    /// From now on `node` is told of the peers that it uses, which are `known`.
    pub(super) fn enter_part(&mut self, node: NodeId, known: impl IntoIterator<Item = NodeId>) {
        let peers = &self.peers;
        let known = known.into_iter().filter(|peer| peers.contains_key(peer));
        // A new number: what was told before a removal counts for nothing after it.
        self.epoch += 1;
        self.parts.enter(node, known, self.epoch);
    }
}

impl Server {
    /// The relay has seen a node at `endpoint`: its peers are told at the moment at which it is told
    /// itself, so that both open their NATs for each other half a round trip sooner.
    pub fn note_reflexive(&mut self, node: NodeId, endpoint: SocketAddr) {
        let inside = self.network.record.range.contains(endpoint.ip());
        if self.online.contains_key(&node) && usable_underlay(endpoint) && !inside {
            self.distribution.set_reflexive(node, endpoint);
        }
    }

    /// Whether anybody is online who is told of everybody.
    fn anybody_whole(&self) -> bool {
        self.online.len() > self.distribution.parts.len()
    }

    /// When [`Self::distribute`] has something to do.
    pub(super) fn distribute_at(&self) -> Option<Instant> {
        self.distribution.next_due(self.anybody_whole())
    }

    /// Sends what is due to those who have not been told.
    pub(super) fn distribute(&mut self, now: Instant) {
        while let Some(node) = self.distribution.parts.take_due(now) {
            self.distribute_part(node, now);
        }
        if self.distribution.flush_at().is_none_or(|at| at > now) {
            return;
        }
        if self.anybody_whole() {
            self.distribute_whole(now);
        }
        self.distribution.forget_pending();
    }

    fn distribute_whole(&mut self, now: Instant) {
        let from = self.distribution.whole_epoch;
        self.distribution.epoch += 1;
        self.distribution.whole_epoch = self.distribution.epoch;
        let online = u32::try_from(self.online.len()).unwrap_or(u32::MAX);
        self.distribution.next_flush = now + GATHER.min(GATHER_PER_NODE * online.min(1_000));
        let shared = self.distribution.delta(from, None, None);
        let stale = std::mem::take(&mut self.distribution.rules_stale);
        for (node, connection) in &self.online {
            if self.distribution.parts.contains(*node) {
                continue;
            }
            let filter =
                stale.holds(*node).then(|| self.access.news_for(*node, &self.members)).flatten();
            let is_in_it = self.distribution.changed.contains(node);
            let message = if is_in_it || filter.is_some() {
                self.distribution.delta(from, Some(*node), filter.as_deref())
            } else {
                shared.clone()
            };
            self.outputs.push_back(Output::Send { connection: *connection, message });
        }
    }

    fn distribute_part(&mut self, node: NodeId, now: Instant) {
        let stale = match self.distribution.parts.get(node) {
            Some(part) if !part.is_told() => part.rules_stale,
            _ => return,
        };
        let filter = if stale { self.access.news_for(node, &self.members) } else { None };
        let to = self.distribution.epoch + 1;
        let message = self.distribution.part_delta(node, to, filter.as_deref());
        self.distribution.epoch = to;
        if let Some(part) = self.distribution.parts.get_mut(node) {
            part.clear(to, now);
        }
        if let (Some(connection), Some(message)) = (self.online.get(&node), message) {
            self.outputs.push_back(Output::Send { connection: *connection, message });
        }
    }

    /// A node asks for peers that it is to be told of.
    pub(super) fn find_peers(&mut self, connection: ConnectionId, node: NodeId, texts: &[String]) {
        let mut unknown = Vec::new();
        for text in texts.iter().take(MAX_FIND) {
            match self.members.find(text).map(|member| member.record.id) {
                Some(peer) if peer == node => {}
                // One whose membership has ended is nobody.
                Some(peer) if self.distribution.described(peer).is_some() => {
                    self.distribution.parts.join(node, peer);
                }
                _ => unknown.push(text.clone()),
            }
        }
        if !unknown.is_empty() {
            let unknown = Some(unknown);
            self.send(connection, &ServerMessage { unknown, ..ServerMessage::default() });
        }
    }

    /// A node has not used these peers for long.
    pub(super) fn release_peers(&mut self, node: NodeId, peers: &[u32]) {
        for peer in peers.iter().filter_map(|peer| NodeId::new(*peer)) {
            self.distribution.parts.release(node, peer);
        }
    }

    /// The network has become too large to tell everybody of everybody: who can do with a part is
    /// told of no more than it knows already.
    pub(super) fn tell_parts(&mut self) {
        let able = |id: &ConnectionId| self.connections.get(id).is_some_and(|known| known.can_part);
        let whole: Vec<NodeId> = self
            .online
            .iter()
            .filter(|(node, id)| able(id) && !self.distribution.parts.contains(**node))
            .map(|(node, _)| *node)
            .collect();
        for node in whole {
            self.distribution.narrow(node);
        }
    }
}
