//! The network as the server described it last. It is kept on disk, so that a node can start and
//! find its peers while the server is away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::types::{Candidate, NetworkId, NodeId, NodeName, OverlayAddrs, OverlayRange, PublicKey};
use crate::wire::control::{NetmapUpdate, Welcome, WirePeer, usable_candidates};
use crate::wire::filter::WireFilter;

/// Who this node is in its network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The network.
    pub network: NetworkId,
    /// This node's number.
    pub id: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Its addresses.
    pub addrs: OverlayAddrs,
    /// The network's range.
    pub range: OverlayRange,
}

/// What is known of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerInfo {
    /// Its name.
    pub name: NodeName,
    /// WireGuard and disco.
    pub node_key: PublicKey,
    /// Its addresses.
    pub addrs: OverlayAddrs,
    /// Whether the server sees it. Not saved: nobody knows after a restart.
    #[serde(skip)]
    pub online: bool,
    /// Where it may be reached.
    pub candidates: Vec<Candidate>,
    /// When its membership ends, in Unix seconds by the server's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<u64>,
    /// Where it was reached last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_direct: Option<SocketAddr>,
}

/// This node and its peers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netmap {
    /// None before the first welcome.
    pub identity: Option<Identity>,
    /// Of the last update.
    pub epoch: u64,
    /// By number.
    pub peers: BTreeMap<NodeId, PeerInfo>,
    /// What is let in; everything, when there are no rules in it. On disk with all else, so that a
    /// node that starts while the server is away is as closed as it was.
    #[serde(default)]
    pub filter: WireFilter,
    /// When our own membership ends, in Unix seconds by the server's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<u64>,
    /// What the clocks showed when this was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clocks: Option<Clocks>,
    /// How many nodes the network has, when the server tells only of the peers that are used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members: Option<u32>,
    /// What our calls to peers were numbered with when this was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_epoch: Option<u64>,
}

/// A run that was killed has made calls since it saved their number, and never so many.
const UNSAVED_CALLS: u64 = 100_000;

/// Two clocks at one moment, in Unix seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// The server's.
    pub server: u64,
    /// This machine's.
    pub own: u64,
}

/// What an update changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct NetmapDiff {
    /// New, or with other addresses: to be made anew.
    pub replaced: Vec<NodeId>,
    /// With another key: the old one is good beside it for a while.
    pub rekeyed: Vec<NodeId>,
    /// Other name, candidates or presence.
    pub changed: Vec<NodeId>,
    /// Gone.
    pub removed: Vec<NodeId>,
    /// Still members, and not told of any more.
    pub forgotten: Vec<NodeId>,
    /// Whether the access rules are others.
    pub filter: bool,
}

/// An update that cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NetmapError {
    /// It is a change to an epoch that we do not have: ask for the whole netmap.
    #[error("netmap update from epoch {from}, we have {have}")]
    Gap {
        /// What it is a change to.
        from: u64,
        /// What we have.
        have: u64,
    },
    /// A field makes no sense.
    #[error("malformed netmap or welcome")]
    Malformed,
}

impl Identity {
    /// Whether an interface made for this identity fits `other` too.
    #[must_use]
    pub fn same_addresses(&self, other: &Self) -> bool {
        self.addrs == other.addrs && self.range == other.range
    }

    /// Reads a welcome.
    ///
    /// # Errors
    /// When a field makes no sense.
    pub fn from_welcome(welcome: &Welcome) -> Result<Self, NetmapError> {
        let v4 = Ipv4Net::new(welcome.ipv4, welcome.ipv4_prefix_len);
        let v6 = Ipv6Net::new(welcome.ipv6, welcome.ipv6_prefix_len);
        let (Ok(v4), Ok(v6)) = (v4, v6) else { return Err(NetmapError::Malformed) };
        Ok(Self {
            network: NetworkId(welcome.network),
            id: NodeId::new(welcome.id).ok_or(NetmapError::Malformed)?,
            name: welcome.name.parse().map_err(|_| NetmapError::Malformed)?,
            addrs: OverlayAddrs { v4: welcome.ipv4, v6: welcome.ipv6 },
            range: OverlayRange::new(v4, v6).map_err(|_| NetmapError::Malformed)?,
        })
    }
}

impl Netmap {
    /// What the calls of a node that starts with this are numbered from, when its clock shows this time.
    /// Peers do not listen to a lower number than the last, and clocks go back: one that ran ahead in
    /// the run before would silence this one until that time has come.
    #[must_use]
    pub fn next_call_epoch(&self, unix_seconds: u64) -> u64 {
        let by_clock = unix_seconds.saturating_mul(1000);
        let above = self.call_epoch.map_or(0, |last| last.saturating_add(UNSAVED_CALLS));
        // Whatever the file says, there is room to count on.
        by_clock.max(above).min(u64::MAX / 2)
    }

    /// Applies an update. A peer whose description makes no sense is left out, the rest counts.
    ///
    /// # Errors
    /// When it is a change to something that we do not have; then nothing changed.
    pub fn apply(&mut self, update: &NetmapUpdate) -> Result<NetmapDiff, NetmapError> {
        if let Some(from) = update.from
            && from != self.epoch
        {
            return Err(NetmapError::Gap { from, have: self.epoch });
        }
        let mut diff = NetmapDiff::default();
        let full = update.from.is_none();
        let mut seen = BTreeSet::new();
        for peer in &update.peers {
            let Some((id, info)) = self.read_peer(peer) else { continue };
            seen.insert(id);
            match self.peers.get_mut(&id) {
                Some(old) if old.addrs == info.addrs => {
                    let info = PeerInfo { last_direct: old.last_direct, ..info };
                    if old.node_key != info.node_key {
                        diff.rekeyed.push(id);
                    }
                    if *old != info {
                        *old = info;
                        diff.changed.push(id);
                    }
                }
                _ => {
                    self.peers.insert(id, info);
                    diff.replaced.push(id);
                }
            }
        }
        let gone: Vec<NodeId> = if full {
            self.peers.keys().filter(|id| !seen.contains(id)).copied().collect()
        } else {
            update.removed.iter().filter_map(|id| NodeId::new(*id)).collect()
        };
        for id in gone {
            if self.peers.remove(&id).is_some() {
                diff.removed.push(id);
            }
        }
        for id in update.forgotten.iter().flatten().filter_map(|id| NodeId::new(*id)) {
            if self.peers.remove(&id).is_some() {
                diff.forgotten.push(id);
            }
        }
        if full || update.members.is_some() {
            self.members = update.members;
        }
        if let (Some(identity), Some(name)) = (&mut self.identity, &update.own_name)
            && let Ok(name) = name.parse()
        {
            identity.name = name;
        }
        let filter = match (&update.filter, full) {
            (Some(filter), _) => Some(filter.clone()),
            (None, full) => full.then(WireFilter::default),
        };
        if let Some(filter) = filter.filter(|filter| *filter != self.filter) {
            self.filter = filter;
            diff.filter = true;
        }
        self.epoch = update.to;
        Ok(diff)
    }

    fn read_peer(&self, peer: &WirePeer) -> Option<(NodeId, PeerInfo)> {
        let id = NodeId::new(peer.id)?;
        let identity = self.identity.as_ref()?;
        let addrs = OverlayAddrs { v4: peer.ipv4, v6: peer.ipv6 };
        let inside = addrs.prefixes().iter().all(|prefix| identity.range.contains(prefix.addr()));
        // A peer with our own addresses would be routed to instead of ourselves.
        if !inside || id == identity.id || addrs == identity.addrs {
            return None;
        }
        let mut candidates = usable_candidates(&peer.candidates);
        candidates.retain(|candidate| !identity.range.contains(candidate.endpoint.ip()));
        let info = PeerInfo {
            name: peer.name.parse().ok()?,
            node_key: PublicKey(peer.node_key),
            addrs,
            online: peer.online,
            candidates,
            expires: peer.expires,
            last_direct: None,
        };
        Some((id, info))
    }

    /// The peer with this name, overlay address or id.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<NodeId> {
        let ip: Option<std::net::IpAddr> = text.parse().ok();
        let id: Option<NodeId> = text.parse().ok();
        self.peers
            .iter()
            .find(|(peer, info)| {
                ip.is_some_and(|ip| info.addrs.contains(ip))
                    || id == Some(**peer)
                    || info.name.as_str().eq_ignore_ascii_case(text)
            })
            .map(|(id, _)| *id)
    }
}

/// A netmap with one peer, number 2.
#[cfg(test)]
pub(super) fn with_bob(online: bool) -> Netmap {
    let bob = PeerInfo {
        name: "bob".parse().unwrap(),
        node_key: crate::types::SecretKey::from_bytes([2; 32]).public(),
        addrs: OverlayAddrs {
            v4: "10.77.0.2".parse().unwrap(),
            v6: "fd00:1:2::2".parse().unwrap(),
        },
        online,
        candidates: Vec::new(),
        expires: None,
        last_direct: None,
    };
    let peers = [(NodeId::new(2).unwrap(), bob)].into();
    Netmap { peers, ..Netmap::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn identity() -> Identity {
        Identity {
            network: NetworkId([1; 8]),
            id: NodeId::new(1).unwrap(),
            name: "alice".parse().unwrap(),
            addrs: OverlayAddrs {
                v4: "10.77.0.1".parse().unwrap(),
                v6: "fd00:1:2::1".parse().unwrap(),
            },
            range: OverlayRange::new(
                "10.77.0.0/20".parse().unwrap(),
                "fd00:1:2::/48".parse().unwrap(),
            )
            .unwrap(),
        }
    }

    fn wire_peer(id: u32) -> WirePeer {
        let range = identity().range;
        let addrs = range.addresses(id).unwrap();
        WirePeer {
            id,
            name: format!("peer-{id}"),
            node_key: [u8::try_from(id).unwrap(); 32],
            ipv4: addrs.v4,
            ipv6: addrs.v6,
            online: true,
            candidates: vec![],
            expires: None,
        }
    }

    fn netmap() -> Netmap {
        Netmap { identity: Some(identity()), ..Netmap::default() }
    }

    #[test]
    fn calls_are_numbered_upwards_whatever_the_clock_says() {
        let (ahead, right) = (1_800_000_000, 1_799_990_000);
        let first = netmap().next_call_epoch(ahead);
        assert_eq!(first, ahead * 1000);
        let last = first + 17;
        let saved = Netmap { call_epoch: Some(last), ..netmap() };
        let read: Netmap = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
        let second = read.next_call_epoch(right);
        assert!(second > last + 1_000, "more than was made and not saved: {second}");
        assert_eq!(read.next_call_epoch(ahead + 1_000), (ahead + 1_000) * 1000);
        let absurd = Netmap { call_epoch: Some(u64::MAX), ..netmap() };
        assert!(absurd.next_call_epoch(right).checked_add(1 << 32).is_some());
    }

    #[test]
    fn a_full_netmap_removes_who_is_not_in_it() {
        let mut netmap = netmap();
        let full = |ids: &[u32], to| NetmapUpdate {
            to,
            peers: ids.iter().map(|id| wire_peer(*id)).collect(),
            ..NetmapUpdate::default()
        };
        assert_eq!(netmap.apply(&full(&[2, 3], 5)).unwrap().replaced.len(), 2);
        let diff = netmap.apply(&full(&[3, 4], 6)).unwrap();
        assert_eq!(diff.removed, [NodeId::new(2).unwrap()]);
        assert_eq!(diff.replaced, [NodeId::new(4).unwrap()]);
        assert_eq!(diff.changed, []);
    }

    #[test]
    fn a_delta_with_a_gap_changes_nothing() {
        let mut netmap = netmap();
        netmap.epoch = 5;
        let update = NetmapUpdate {
            from: Some(6),
            to: 7,
            peers: vec![wire_peer(2)],
            ..NetmapUpdate::default()
        };
        assert_eq!(netmap.apply(&update), Err(NetmapError::Gap { from: 6, have: 5 }));
        assert!(netmap.peers.is_empty());
    }

    #[test]
    fn rules_stay_until_the_server_says_otherwise_also_on_disk() {
        let mut netmap = netmap();
        let rules = WireFilter { rules: Some(Vec::new()) };
        let delta = |from, filter: Option<&WireFilter>| NetmapUpdate {
            from: Some(from),
            to: from + 1,
            filter: filter.cloned(),
            ..NetmapUpdate::default()
        };
        assert!(netmap.apply(&delta(0, Some(&rules))).unwrap().filter);
        assert!(!netmap.apply(&delta(1, None)).unwrap().filter, "nothing was said of them");
        let text = serde_json::to_string(&netmap).unwrap();
        assert_eq!(serde_json::from_str::<Netmap>(&text).unwrap().filter, rules);
        assert!(netmap.apply(&delta(2, Some(&WireFilter::default()))).unwrap().filter);
        assert_eq!(netmap.filter, WireFilter::default());

        netmap.apply(&delta(3, Some(&rules))).unwrap();
        let whole = NetmapUpdate { to: 9, ..NetmapUpdate::default() };
        assert!(netmap.apply(&whole).unwrap().filter, "a whole netmap without rules has none");
        assert_eq!(netmap.filter, WireFilter::default());
    }

    #[test]
    fn peers_that_would_take_our_place_or_lie_outside_are_left_out() {
        let mut netmap = netmap();
        let outside = WirePeer { ipv4: "8.8.8.8".parse().unwrap(), ..wire_peer(2) };
        let ourselves = WirePeer { id: 9, ..wire_peer(1) };
        let named = WirePeer { name: "x; rm -rf /".into(), ..wire_peer(3) };
        let update = NetmapUpdate {
            to: 1,
            peers: vec![outside, ourselves, named, wire_peer(4)],
            ..NetmapUpdate::default()
        };
        netmap.apply(&update).unwrap();
        assert_eq!(netmap.peers.keys().map(|id| id.number()).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn peers_are_found_by_name_address_and_id() {
        let mut netmap = netmap();
        let update = NetmapUpdate { to: 1, peers: vec![wire_peer(2)], ..NetmapUpdate::default() };
        netmap.apply(&update).unwrap();
        for text in ["peer-2", "PEER-2", "10.77.0.2", "fd00:1:2::2", "00000002"] {
            assert_eq!(netmap.find(text), NodeId::new(2), "{text}");
        }
        assert_eq!(netmap.find("peer-3"), None);
    }

    #[test]
    fn a_netmap_survives_the_disk() {
        let mut netmap = netmap();
        let update = NetmapUpdate { to: 1, peers: vec![wire_peer(2)], ..NetmapUpdate::default() };
        netmap.apply(&update).unwrap();
        let text = serde_json::to_string(&netmap).unwrap();
        let mut copy: Netmap = serde_json::from_str(&text).unwrap();
        assert!(copy.peers.values().all(|peer| !peer.online), "presence is not saved");
        copy.peers.values_mut().for_each(|peer| peer.online = true);
        assert_eq!(copy, netmap);
    }
}
