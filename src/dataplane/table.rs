//! The forwarding table: which peer a packet is for, and which peer it is from.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use super::Peer;
use super::sessions::SLOT_BITS;
use crate::policy::Filter;
use crate::types::{NodeId, OverlayAddrs, OverlayRange, SocketId};
use crate::wire::disco::Tag;

/// Immutable once published; the control plane makes a new one for each change of the netmap.
#[derive(Debug, Default)]
pub struct ForwardingTable {
    /// This node's own overlay addresses.
    pub own: Option<OverlayAddrs>,
    /// Where relay datagrams go to and come from.
    pub relay: Option<SocketAddr>,
    /// The socket that they go by.
    pub relay_socket: SocketId,
    /// What is let in; none when everything is.
    pub filter: Option<Arc<Filter>>,
    /// The overlay's range, when peers may be in it that are not in the table.
    pub part_of: Option<OverlayRange>,
    /// Whole prefixes; single addresses are in `hosts`.
    routes_v4: PrefixMap<Ipv4Net, Arc<Peer>>,
    routes_v6: PrefixMap<Ipv6Net, Arc<Peer>>,
    // Only for look-up, never iterated: their order is of no consequence.
    hosts: HashMap<IpAddr, Arc<Peer>>,
    by_index: HashMap<u32, Arc<Peer>>,
    by_tag: HashMap<Tag, NodeId>,
}

impl ForwardingTable {
    /// An empty table of the node with these addresses.
    #[must_use]
    pub fn new(own: Option<OverlayAddrs>, relay: Option<SocketAddr>) -> Self {
        Self { own, relay, ..Self::default() }
    }

    /// Adds a peer: its addresses, its session index.
    pub fn insert(&mut self, peer: Arc<Peer>) {
        for prefix in peer.addrs.prefixes() {
            match prefix {
                _ if prefix.prefix_len() == prefix.max_prefix_len() => {
                    self.hosts.insert(prefix.addr(), Arc::clone(&peer));
                }
                IpNet::V4(prefix) => drop(self.routes_v4.insert(prefix, Arc::clone(&peer))),
                IpNet::V6(prefix) => drop(self.routes_v6.insert(prefix, Arc::clone(&peer))),
            }
        }
        self.by_index.insert(peer.index >> SLOT_BITS, peer);
    }

    /// Expects disco messages with this tag, from this peer.
    pub fn expect_disco(&mut self, tag: Tag, peer: NodeId) {
        self.by_tag.insert(tag, peer);
    }

    /// Whose disco messages have this tag.
    #[must_use]
    pub fn by_tag(&self, tag: Tag) -> Option<NodeId> {
        self.by_tag.get(&tag).copied()
    }

    /// The peer that packets to `dst` go to: the longest prefix wins.
    ///
    /// No prefix is longer than a whole address, and nearly all packets are for one: these cost
    /// the same however many there are.
    #[must_use]
    pub fn route(&self, dst: IpAddr) -> Option<&Arc<Peer>> {
        if let Some(peer) = self.hosts.get(&dst) {
            return Some(peer);
        }
        match dst {
            IpAddr::V4(dst) => self.routes_v4.get_lpm(&Ipv4Net::from(dst)).map(|(_, peer)| peer),
            IpAddr::V6(dst) => self.routes_v6.get_lpm(&Ipv6Net::from(dst)).map(|(_, peer)| peer),
        }
    }

    /// Whether nobody in the table has this address, but somebody in the network may.
    #[must_use]
    pub fn may_be_elsewhere(&self, dst: IpAddr) -> bool {
        let own = self.own.is_some_and(|own| own.contains(dst));
        !own && self.part_of.is_some_and(|range| range.host_of(dst).is_some())
    }

    /// The peer whose session has this receiver index: the upper 21 bits are ours per peer, three
    /// tell its sessions apart, the lower 8 count the handshakes of each.
    #[must_use]
    pub fn by_receiver(&self, receiver: u32) -> Option<&Arc<Peer>> {
        self.by_index.get(&(receiver >> (8 + SLOT_BITS)))
    }

    /// Whether a session index is one of a peer's.
    #[must_use]
    pub fn has_index(&self, index: u32) -> bool {
        self.by_index.contains_key(&(index >> SLOT_BITS))
    }
}
