//! What each node is told about the others: the whole netmap once, then what has changed.
//!
//! Every peer's description is encoded when it changes and kept. A delta is put together once and
//! sent to all; only a node that is in it itself gets its own copy without itself. So the work
//! follows the change, not the network. Changes that come close together travel together: the
//! first goes out at once, the next ones wait a little, longer in a larger network (up to
//! [`GATHER`]), or a thousand nodes that reconnect would cost a million messages.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use minicbor::Encoder;

use super::records::MemberRecord;
use super::{Output, Server};
use crate::types::{
    Candidate, CandidateKind, MAX_CANDIDATES, NodeId, OverlayAddrs, usable_underlay,
};
use crate::wire::control::{WireCandidate, WirePeer};

/// The least time between two deltas in the largest network: a removed node must be out everywhere
/// within a second.
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
    epoch: u64,
    peers: BTreeMap<NodeId, Described>,
    changed: BTreeSet<NodeId>,
    removed: BTreeSet<NodeId>,
    /// Nodes whose own name changed.
    renamed: BTreeSet<NodeId>,
    /// Whether access rules have to be compiled again for the nodes.
    rules_stale: bool,
    next_flush: Instant,
}

#[derive(Debug)]
struct Described {
    peer: WirePeer,
    encoded: Vec<u8>,
}

impl Distribution {
    /// Epochs start at the time, so that they rise over a restart too.
    pub(super) fn new(now: Instant, wall: u64) -> Self {
        Self {
            epoch: wall.saturating_mul(256),
            peers: BTreeMap::new(),
            changed: BTreeSet::new(),
            removed: BTreeSet::new(),
            renamed: BTreeSet::new(),
            rules_stale: false,
            next_flush: now,
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Takes a new or changed member.
    pub(super) fn put_member(&mut self, member: &MemberRecord, addresses: OverlayAddrs) {
        let known = self.peers.get(&member.id).map(|described| &described.peer);
        if known.is_some_and(|peer| peer.name != member.name.as_str()) {
            self.renamed.insert(member.id);
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
    }

    pub(super) fn remove(&mut self, node: NodeId) {
        if self.peers.remove(&node).is_some() {
            self.changed.remove(&node);
            self.renamed.remove(&node);
            self.removed.insert(node);
        }
    }

    /// Whether a node has a control connection, and where it says it may be reached.
    pub(super) fn is_online(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|described| described.peer.online)
    }

    /// The next delta says what has become of the access rules.
    pub(super) fn set_rules_stale(&mut self) {
        self.rules_stale = true;
    }

    /// The message with the whole netmap for `receiver`, which lets in what `filter` says.
    pub(super) fn full(&self, receiver: NodeId, filter: Option<&[u8]>) -> Vec<u8> {
        let peers: Vec<&[u8]> = self
            .peers
            .iter()
            .filter(|(node, _)| **node != receiver)
            .map(|(_, described)| described.encoded.as_slice())
            .collect();
        let (removed, own_name) = (&BTreeSet::new(), None);
        Update { from: None, to: self.epoch, peers, removed, own_name, filter }.encode()
    }

    /// Forgets what was not told: while nobody is online there is nobody to tell.
    pub(super) fn forget_pending(&mut self) {
        self.changed.clear();
        self.removed.clear();
        self.renamed.clear();
        self.rules_stale = false;
    }

    /// When the next delta should go out, if there is something in it.
    pub(super) fn flush_at(&self) -> Option<Instant> {
        let nothing = self.changed.is_empty()
            && self.removed.is_empty()
            && self.renamed.is_empty()
            && !self.rules_stale;
        (!nothing).then_some(self.next_flush)
    }

    /// The message from the last epoch to the new one, without `receiver` in it and with the
    /// filter that is new for it.
    fn delta(&self, receiver: Option<NodeId>, filter: Option<&[u8]>) -> Vec<u8> {
        let described = |node: &NodeId| Some(self.peers.get(node)?.encoded.as_slice());
        let peers = self.changed.iter().filter(|node| Some(**node) != receiver);
        let renamed = receiver.filter(|node| self.renamed.contains(node));
        let own_name = renamed.and_then(|node| self.peers.get(&node)).map(|own| &*own.peer.name);
        Update {
            from: Some(self.epoch - 1),
            to: self.epoch,
            peers: peers.filter_map(described).collect(),
            removed: &self.removed,
            own_name,
            filter,
        }
        .encode()
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

    /// Sends a delta to every node that is online, if one is due.
    pub(super) fn distribute(&mut self, now: Instant) {
        if self.distribution.flush_at().is_none_or(|at| at > now) {
            return;
        }
        self.distribution.epoch += 1;
        let online = u32::try_from(self.online.len()).unwrap_or(u32::MAX);
        self.distribution.next_flush = now + GATHER.min(GATHER_PER_NODE * online.min(1_000));
        let shared = self.distribution.delta(None, None);
        let stale = self.distribution.rules_stale;
        for (node, connection) in &self.online {
            let filter = if stale { self.access.news_for(*node, &self.members) } else { None };
            let is_in_it = self.distribution.changed.contains(node);
            let message = if is_in_it || filter.is_some() {
                self.distribution.delta(Some(*node), filter.as_deref())
            } else {
                shared.clone()
            };
            self.outputs.push_back(Output::Send { connection: *connection, message });
        }
        self.distribution.forget_pending();
    }
}

/// A `NetmapUpdate` whose peers are encoded already.
struct Update<'a> {
    from: Option<u64>,
    to: u64,
    peers: Vec<&'a [u8]>,
    removed: &'a BTreeSet<NodeId>,
    own_name: Option<&'a str>,
    filter: Option<&'a [u8]>,
}

impl Update<'_> {
    /// The whole `ServerMessage`, with the field numbers of [`crate::wire::control`].
    fn encode(&self) -> Vec<u8> {
        let peers_len: usize = self.peers.iter().map(|peer| peer.len()).sum();
        let mut encoder = Encoder::new(Vec::with_capacity(peers_len + 64));
        // Writing into a vector cannot fail, so there is no error to look at.
        let _: Result<(), minicbor::encode::Error<std::convert::Infallible>> = (|| {
            let optional = [self.from.is_some(), self.own_name.is_some(), self.filter.is_some()];
            let fields = 3 + optional.into_iter().map(u64::from).sum::<u64>();
            encoder.map(1)?.u8(2)?.map(fields)?;
            if let Some(from) = self.from {
                encoder.u8(0)?.u64(from)?;
            }
            encoder.u8(1)?.u64(self.to)?;
            encoder.u8(2)?.array(self.peers.len() as u64)?;
            for peer in &self.peers {
                encoder.writer_mut().extend_from_slice(peer);
            }
            encoder.u8(3)?.array(self.removed.len() as u64)?;
            for node in self.removed {
                encoder.u32(node.number())?;
            }
            if let Some(name) = self.own_name {
                encoder.u8(4)?.str(name)?;
            }
            if let Some(filter) = self.filter {
                encoder.u8(5)?.writer_mut().extend_from_slice(filter);
            }
            Ok(())
        })();
        encoder.into_writer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::{NetmapUpdate, ServerMessage, decode, encode};
    use crate::wire::filter::WireFilter;

    #[test]
    fn the_bytes_are_those_of_the_derived_encoder() {
        let peer = WirePeer {
            id: 7,
            name: "bob".into(),
            node_key: [1; 32],
            ipv4: "10.77.0.7".parse().unwrap(),
            ipv6: "fd12::7".parse().unwrap(),
            online: true,
            candidates: vec![WireCandidate { kind: 1, endpoint: "192.0.2.1:5".parse().unwrap() }],
            expires: Some(1_800_000_000),
        };
        let encoded = encode(&peer);
        let gone = BTreeSet::from([NodeId::new(300).unwrap()]);
        let rules = WireFilter { rules: Some(Vec::new()) };
        let filter = encode(&rules);
        for (from, own_name, filter) in
            [(None, None, None), (Some(5), Some("carol"), Some(filter.as_slice()))]
        {
            let peers = vec![encoded.as_slice(), &encoded];
            let update = Update { from, to: 6, peers, removed: &gone, own_name, filter };
            let netmap = NetmapUpdate {
                from,
                to: 6,
                peers: vec![peer.clone(), peer.clone()],
                removed: vec![300],
                own_name: own_name.map(str::to_string),
                filter: filter.map(|_| rules.clone()),
            };
            let message = ServerMessage { netmap: Some(netmap), ..Default::default() };
            assert_eq!(decode::<ServerMessage>(&update.encode()).unwrap(), message);
            assert_eq!(update.encode(), encode(&message));
        }
    }
}
