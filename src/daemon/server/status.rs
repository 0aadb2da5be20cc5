//! What `overlay server status` shows.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::core::Core;
use crate::server::admin::{SCHEMA, rfc3339};
use crate::server::relay::limit::Throughput;

/// What the server does, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// The version of the program.
    pub version: String,
    /// Since when it runs (RFC 3339, UTC).
    pub started: String,
    /// The network's id.
    pub network: String,
    /// Members.
    pub nodes: usize,
    /// Members that are connected.
    pub online: usize,
    /// Control connections.
    pub connections: usize,
    /// How long the memberships last of nodes that join, in seconds; none for ever.
    #[serde(default)]
    pub members_last_s: Option<u64>,
    /// The relay.
    pub relay: RelayInfo,
    /// Datagrams that died here, by reason; only the reasons that have occurred.
    pub drops: BTreeMap<String, u64>,
}

/// What the relay does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayInfo {
    /// Taken to pass on by UDP.
    pub udp: WayInfo,
    /// Taken to pass on by control connections.
    pub tcp: WayInfo,
    /// Bytes that wait for a full socket.
    pub waiting_bytes: usize,
    /// Whether datagrams leave in trains (UDP segmentation offload).
    pub udp_gso: bool,
    /// What one node may send.
    pub node_limit: RateInfo,
    /// What all nodes may send.
    pub network_limit: RateInfo,
}

/// What has been taken to pass on by one way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayInfo {
    /// Datagrams.
    pub datagrams: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// So much in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateInfo {
    /// Megabits.
    pub mbit: u32,
    /// Datagrams.
    pub packets: u32,
}

impl From<Throughput> for RateInfo {
    fn from(Throughput { mbit, datagrams }: Throughput) -> Self {
        Self { mbit, packets: datagrams }
    }
}

impl Core {
    /// What the server does at this moment.
    pub(super) fn status(&self) -> ServerStatus {
        let hub = self.hub();
        let (nodes, online) = self.population();
        let mut ways = hub.relayed().map(|(_, relayed)| WayInfo {
            datagrams: relayed.datagrams.load(Ordering::Relaxed),
            bytes: relayed.bytes.load(Ordering::Relaxed),
        });
        let mut way = || ways.next().unwrap_or(WayInfo { datagrams: 0, bytes: 0 });
        let (udp, tcp) = (way(), way());
        let limits = hub.limits();
        let drops = hub.drops().snapshot();
        ServerStatus {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            started: rfc3339(self.counts().started),
            network: self.network_id(),
            nodes,
            online,
            connections: hub.connections().0,
            members_last_s: self.members_last_s(),
            relay: RelayInfo {
                udp,
                tcp,
                waiting_bytes: hub.waiting_bytes(),
                udp_gso: hub.sends_trains(),
                node_limit: limits.node.into(),
                network_limit: limits.network.into(),
            },
            drops: drops.into_iter().map(|(reason, count)| (reason.into(), count)).collect(),
        }
    }
}
