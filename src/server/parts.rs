//! Who is told of whom in a network that is too large to tell everybody of everybody.
//!
//! A node that is told of a part of the network asks for a peer when it first needs it, and says when
//! it has not used it for long. Both sides of a pair are told of each other from the first question
//! until neither uses the other: the one that did not ask has to know who comes. What a node uses it
//! says in every hello, so nothing of this is on disk. A node that is offline stays in the parts of
//! its peers, whose direct paths may work all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::policy::Affected;
use crate::types::NodeId;

/// The least time between two changes for a node with many peers: some messages a second.
const GATHER: Duration = Duration::from_millis(100);
/// The same for each of its peers: a node with a few of them waits for nothing.
const GATHER_PER_PEER: Duration = Duration::from_micros(250);

/// What one node is told of, and what it has not been told yet.
#[derive(Debug)]
pub(super) struct Part {
    /// The peers, and whether the node uses them itself.
    peers: BTreeMap<NodeId, bool>,
    /// The last epoch that it was told.
    pub(super) epoch: u64,
    pub(super) changed: BTreeSet<NodeId>,
    pub(super) removed: BTreeSet<NodeId>,
    pub(super) forgotten: BTreeSet<NodeId>,
    pub(super) renamed: bool,
    pub(super) rules_stale: bool,
    /// When it may be told again.
    next: Instant,
    /// When it will be, if there is something to be told.
    due: Option<Instant>,
}

impl Part {
    /// Whether there is nothing that it has not been told.
    pub(super) fn is_told(&self) -> bool {
        self.changed.is_empty()
            && self.removed.is_empty()
            && self.forgotten.is_empty()
            && !self.renamed
            && !self.rules_stale
    }

    /// What it has been told by this, it need not be told again.
    pub(super) fn clear(&mut self, epoch: u64, now: Instant) {
        self.epoch = epoch;
        self.changed.clear();
        self.removed.clear();
        self.forgotten.clear();
        (self.renamed, self.rules_stale) = (false, false);
        let peers = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        self.next = now + GATHER.min(GATHER_PER_PEER * peers.min(1_000));
    }
}

/// The parts of all nodes that are online and told of a part.
#[derive(Debug)]
pub(super) struct Parts {
    /// A time that is past.
    origin: Instant,
    parts: BTreeMap<NodeId, Part>,
    /// Whose parts a node is in.
    watchers: BTreeMap<NodeId, BTreeSet<NodeId>>,
    due: BTreeSet<(Instant, NodeId)>,
}

impl Parts {
    /// Nobody yet.
    pub(super) fn new(origin: Instant) -> Self {
        Self { origin, parts: BTreeMap::new(), watchers: BTreeMap::new(), due: BTreeSet::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn contains(&self, node: NodeId) -> bool {
        self.parts.contains_key(&node)
    }

    pub(super) fn get(&self, node: NodeId) -> Option<&Part> {
        self.parts.get(&node)
    }

    /// The peers that `node` is told of.
    pub(super) fn peers(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        self.parts.get(&node).into_iter().flat_map(|part| part.peers.keys().copied())
    }

    /// A node is online that uses `known`. It is told of these and of all that use it, and the ones
    /// among them that are online of it.
    pub(super) fn enter(
        &mut self,
        node: NodeId,
        known: impl IntoIterator<Item = NodeId>,
        epoch: u64,
    ) {
        self.leave(node);
        let used = known.into_iter().filter(|peer| *peer != node).map(|peer| (peer, true));
        let mut peers: BTreeMap<NodeId, bool> = used.collect();
        for peer in self.watchers.get(&node).into_iter().flatten() {
            // Whoever let go of it while it was away is not waited for.
            peers.entry(*peer).or_insert(false);
        }
        for peer in peers.keys() {
            self.watchers.entry(*peer).or_default().insert(node);
        }
        let ids: Vec<NodeId> = peers.keys().copied().collect();
        let part = Part {
            peers,
            epoch,
            changed: BTreeSet::new(),
            removed: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            renamed: false,
            rules_stale: false,
            next: self.origin,
            due: None,
        };
        self.parts.insert(node, part);
        for peer in ids {
            self.tell_of(peer, node);
            if !self.uses(node, peer) && !self.uses(peer, node) && self.contains(peer) {
                self.part(node, peer);
            }
        }
    }

    /// A node is offline, or told of everybody from now on.
    pub(super) fn leave(&mut self, node: NodeId) {
        let Some(part) = self.parts.remove(&node) else { return };
        if let Some(at) = part.due {
            self.due.remove(&(at, node));
        }
        for peer in part.peers.keys() {
            self.unwatch(*peer, node);
        }
    }

    /// `node` uses `peer`: both are told of each other at once.
    pub(super) fn join(&mut self, node: NodeId, peer: NodeId) {
        let Some(part) = self.parts.get_mut(&node) else { return };
        part.peers.insert(peer, true);
        part.forgotten.remove(&peer);
        // Also when it was told before: it would not ask if it knew.
        part.changed.insert(peer);
        self.watchers.entry(peer).or_default().insert(node);
        self.hurry(node);
        if self.tell_of(peer, node) {
            self.hurry(peer);
        }
    }

    /// `node` does not use `peer` any more; when neither uses the other, both forget each other.
    pub(super) fn release(&mut self, node: NodeId, peer: NodeId) {
        let Some(used) = self.parts.get_mut(&node).and_then(|part| part.peers.get_mut(&peer))
        else {
            return;
        };
        *used = false;
        if !self.uses(peer, node) {
            self.part(node, peer);
        }
    }

    /// Somebody is no member any more: everybody is told, whoever knows of it.
    pub(super) fn remove(&mut self, node: NodeId) {
        self.leave(node);
        self.watchers.remove(&node);
        let receivers: Vec<NodeId> = self.parts.keys().copied().collect();
        for receiver in receivers {
            if let Some(part) = self.parts.get_mut(&receiver) {
                part.peers.remove(&node);
                part.changed.remove(&node);
                part.forgotten.remove(&node);
                part.removed.insert(node);
            }
            self.hurry(receiver);
        }
    }

    /// The description of a node has changed.
    pub(super) fn note_changed(&mut self, node: NodeId) {
        let watchers: Vec<NodeId> =
            self.watchers.get(&node).into_iter().flatten().copied().collect();
        for receiver in watchers {
            if let Some(part) = self.parts.get_mut(&receiver) {
                part.changed.insert(node);
            }
            self.schedule(receiver);
        }
    }

    /// The node itself has another name.
    pub(super) fn note_renamed(&mut self, node: NodeId) {
        if let Some(part) = self.parts.get_mut(&node) {
            part.renamed = true;
            self.schedule(node);
        }
    }

    /// The access rules may have changed for these.
    pub(super) fn note_rules(&mut self, affected: &Affected) {
        let receivers: Vec<NodeId> = match affected.nodes() {
            Some(nodes) => nodes.iter().filter(|node| self.contains(**node)).copied().collect(),
            None => self.parts.keys().copied().collect(),
        };
        for receiver in receivers {
            if let Some(part) = self.parts.get_mut(&receiver) {
                part.rules_stale = true;
            }
            self.schedule(receiver);
        }
    }

    /// What has happened before a node was told of a part, and is to be told.
    pub(super) fn put_untold(
        &mut self,
        node: NodeId,
        changed: &BTreeSet<NodeId>,
        removed: &BTreeSet<NodeId>,
        rules_stale: bool,
    ) {
        if let Some(part) = self.parts.get_mut(&node) {
            part.changed.extend(changed.iter().filter(|peer| **peer != node));
            part.removed.extend(removed);
            part.rules_stale = rules_stale;
        }
        // When nothing has, nothing is sent: the next tick says how many nodes there are.
        self.hurry(node);
    }

    /// When somebody has to be told something.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Somebody who has to be told something now.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<NodeId> {
        let (at, node) = *self.due.first()?;
        if at > now {
            return None;
        }
        self.due.pop_first();
        self.parts.get_mut(&node)?.due = None;
        Some(node)
    }

    pub(super) fn get_mut(&mut self, node: NodeId) -> Option<&mut Part> {
        self.parts.get_mut(&node)
    }

    fn uses(&self, node: NodeId, peer: NodeId) -> bool {
        self.parts.get(&node).is_some_and(|part| part.peers.get(&peer) == Some(&true))
    }

    /// Puts `peer` into the part of `node`, if that is told of a part; whether it is new there.
    fn tell_of(&mut self, node: NodeId, peer: NodeId) -> bool {
        let Some(part) = self.parts.get_mut(&node) else { return false };
        let is_new = !part.peers.contains_key(&peer);
        part.peers.entry(peer).or_insert(false);
        if is_new {
            part.forgotten.remove(&peer);
            part.changed.insert(peer);
            self.watchers.entry(peer).or_default().insert(node);
            self.schedule(node);
        }
        is_new
    }

    /// Takes a pair apart.
    fn part(&mut self, one: NodeId, other: NodeId) {
        for (node, peer) in [(one, other), (other, one)] {
            if let Some(part) = self.parts.get_mut(&node)
                && part.peers.remove(&peer).is_some()
            {
                part.changed.remove(&peer);
                part.forgotten.insert(peer);
                self.unwatch(peer, node);
                self.schedule(node);
            }
        }
    }

    fn unwatch(&mut self, peer: NodeId, node: NodeId) {
        if let Some(watchers) = self.watchers.get_mut(&peer) {
            watchers.remove(&node);
            if watchers.is_empty() {
                self.watchers.remove(&peer);
            }
        }
    }

    /// Has a node told as soon as it may be.
    fn schedule(&mut self, node: NodeId) {
        if let Some(part) = self.parts.get_mut(&node)
            && part.due.is_none()
        {
            part.due = Some(part.next);
            self.due.insert((part.next, node));
        }
    }

    /// Has a node told at once.
    fn hurry(&mut self, node: NodeId) {
        let Some(part) = self.parts.get_mut(&node) else { return };
        if let Some(at) = part.due.replace(self.origin) {
            self.due.remove(&(at, node));
        }
        self.due.insert((self.origin, node));
    }
}
