//! The answers of the local socket: the JSON contract of the command line. Fields are added here,
//! never renamed or removed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::node::PeerStatus;

/// Version of all of these.
pub const SCHEMA: u32 = 1;

/// `overlay status --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// This node.
    #[serde(rename = "self")]
    pub own: OwnStatus,
    /// The coordination server.
    pub server: ServerStatus,
    /// All other nodes; in a large network those that this node uses.
    pub peers: Vec<PeerReport>,
    /// How many nodes the network has, when `peers` are a part of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u32>,
}

/// This node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnStatus {
    /// Eight hex digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Overlay address.
    pub ipv4: Ipv4Addr,
    /// Overlay address.
    pub ipv6: Ipv6Addr,
    /// The TUN interface.
    pub interface: String,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// UDP port.
    pub listen_port: u16,
    /// WireGuard public key, base64.
    pub public_key: String,
    /// The network's id.
    pub network: String,
    /// Dropped packets by reason.
    pub drops: BTreeMap<String, u64>,
    /// Version of the running daemon.
    pub version: String,
    /// Offloads in use.
    #[serde(default)]
    pub offloads: OffloadReport,
    /// Whether packets are moved ahead of ordinary programs.
    #[serde(default)]
    pub realtime: bool,
    /// The port that the router forwards to us; none when it is not to be asked.
    #[serde(default)]
    pub port_mapping: Option<PortMappingReport>,
    /// Costly ways to peers between hard NATs.
    #[serde(default)]
    pub punching: PunchReport,
    /// How old the node key is, and whether it is being renewed.
    #[serde(default)]
    pub node_key: NodeKeyReport,
    /// Whether the membership of this node has ended: no peer talks to it.
    #[serde(default)]
    pub expired: bool,
    /// What the user should do something about, in sentences.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The default routes, the preferred one of each family first; empty when there is no choice.
    #[serde(default)]
    pub uplinks: Vec<UplinkReport>,
    /// Where its keys and its netmap are; none of an older version.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
}

/// An interface with a default route.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UplinkReport {
    /// Its name.
    pub interface: String,
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// Whether the kernel sends by it.
    pub preferred: bool,
    /// Whether the server answers by it: `answers`, `silent` or `unknown`.
    pub state: String,
    /// Where the server sees this node by it.
    pub endpoint: Option<String>,
    /// Round trip to the server by it, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Whether the relay is reached by it.
    pub in_use: bool,
}

/// What `overlay netcheck` has measured by one uplink.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UplinkProbe {
    /// Its interface.
    pub interface: String,
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// Whether the kernel sends by it.
    pub preferred: bool,
    /// Where the server sees this node by it; none when no answer came.
    pub endpoint: Option<String>,
    /// Round trip to the server by it, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Whether the kernel drops what comes by it from places that it sends to by another uplink.
    pub strict_filter: bool,
}

/// The node key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeKeyReport {
    /// Seconds since it was made, by this machine's clock.
    pub age_s: u64,
    /// Whether the server has it.
    pub stored: bool,
    /// Whether the one before it is still accepted, for peers that may know no other.
    pub old_accepted: bool,
}

/// What the router in front of us does for us.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMappingReport {
    /// `no-gateway`, `searching`, `unmapped` or `mapped`.
    pub state: String,
    /// `pcp`, `nat-pmp`, `upnp`: what the router answered in the last search; none before it.
    pub protocols: Option<Vec<String>>,
    /// The one that the mapping was made by.
    pub protocol: Option<String>,
    /// The mapped endpoint as the router told it.
    pub external: Option<String>,
    /// Whether that address can be one of the internet's: if not, there is another NAT behind.
    pub public: Option<bool>,
    /// Whether something that a stranger sent there has arrived.
    pub verified: Option<bool>,
    /// Seconds that the router promised; none for ever.
    pub lease_s: Option<u64>,
    /// What the router refused last.
    pub error: Option<String>,
}

/// What costly ways to peers have cost and brought since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PunchReport {
    /// Whether birthday probing is switched on.
    pub birthday_probing: bool,
    /// Runs of it.
    pub birthday_runs: u64,
    /// Tries with a fresh local port.
    pub fresh_ports: u64,
    /// Of both, those that ended with a direct path.
    pub found: u64,
    /// Extra sockets opened so far.
    pub sockets: u64,
    /// Extra sockets open now.
    pub sockets_open: usize,
    /// Ports probed.
    pub probes: u64,
}

/// Offloads in use: many packets per system call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadReport {
    /// TCP super-packets on the TUN interface.
    pub tun_tso: bool,
    /// UDP super-packets on the TUN interface.
    pub tun_uso: bool,
    /// Many datagrams per send.
    pub udp_gso: bool,
    /// Many datagrams per receive.
    pub udp_gro: bool,
}

/// The coordination server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// `connected`, `connecting` or `unreachable`.
    pub state: String,
    /// Where it is, or was last.
    pub address: Option<String>,
    /// Round trip to its relay, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// The interface of the uplink that the control connection goes by, when it is not the preferred
    /// one.
    #[serde(default)]
    pub uplink: Option<String>,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Eight hex digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Overlay address.
    pub ipv4: Ipv4Addr,
    /// Overlay address.
    pub ipv6: Ipv6Addr,
    /// Whether the server sees it or it answers directly.
    pub online: bool,
    /// The way that a packet sent now would take.
    pub path: PathReport,
    /// Round trip on that path in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Inner bytes sent.
    pub tx_bytes: u64,
    /// Inner bytes received.
    pub rx_bytes: u64,
    /// Packets that were too long for the path, and told so to their sender.
    #[serde(default)]
    pub too_big: u64,
    /// Seconds since the last WireGuard handshake.
    pub last_handshake_s: Option<u64>,
    /// Whether there is a second session, so that sealing and opening do not wait for one another.
    #[serde(default)]
    pub second_session: bool,
}

/// A way to a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PathReport {
    /// `direct`, `relay-udp`, `relay-tcp`, `connecting` or `offline`.
    pub kind: String,
    /// The endpoint that datagrams go to.
    pub remote: Option<String>,
    /// For how long, in seconds.
    pub since_s: u64,
    /// Why, in a sentence.
    pub why: String,
    /// The longest packet that it carries uncut, in bytes.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Percent of the data of the last seconds that did not arrive; none when little was sent.
    #[serde(default)]
    pub loss_percent: Option<f64>,
    /// The interface of the uplink that it goes by, when it is not the preferred one.
    #[serde(default)]
    pub uplink: Option<String>,
}

/// `overlay netcheck --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Netcheck {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Whether UDP reaches the server and comes back.
    pub udp: bool,
    /// Our endpoint as the server sees it over IPv4.
    pub ipv4: Option<String>,
    /// A global IPv6 address of ours, or our endpoint as the server sees it.
    pub ipv6: Option<String>,
    /// The NAT in front of us.
    pub nat: NatReport,
    /// The reflectors that were asked.
    pub servers: Vec<ServerProbe>,
    /// Each default route, the preferred one of each family first; empty when there is no choice.
    #[serde(default)]
    pub uplinks: Vec<UplinkProbe>,
    /// What it means, in a sentence.
    pub verdict: String,
    /// What is to be expected of the path to each peer.
    #[serde(default)]
    pub forecast: Vec<Forecast>,
}

/// What is to be expected of the path to a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Eight hex digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `direct`, `direct-after-prediction`, `relay-unless-guessed`, `relay`, `relay-tcp`,
    /// `relay-no-common-family`, `offline` or `unknown`.
    pub forecast: String,
    /// Why, in a sentence.
    pub reason: String,
    /// The path of this moment.
    pub path: PathReport,
}

/// The NAT in front of us.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NatReport {
    /// RFC 4787 mapping behaviour, or `unknown`.
    pub mapping: String,
    /// RFC 4787 filtering behaviour, or `unknown`.
    pub filtering: String,
    /// The classical name, or `udp-blocked`.
    pub kind: String,
    /// Whether it turns packets for our own external endpoint around.
    pub hairpin: Option<bool>,
    /// Port mapping protocols that the router answers: `pcp`, `nat-pmp`, `upnp`; none when it was
    /// not asked.
    pub port_mapping: Option<Vec<String>>,
    /// The port that the router forwards to us; none when it is not to be asked.
    #[serde(default)]
    pub mapped: Option<PortMappingReport>,
}

/// A reflector that was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerProbe {
    /// Where it is.
    pub address: String,
    /// Round trip in milliseconds, when it answered.
    pub rtt_ms: Option<f64>,
    /// Whether UDP to it is blocked: it is silent while the control connection stands.
    #[serde(default)]
    pub udp_blocked: bool,
    /// The largest of some usual sizes of IP packets that arrives there uncut, in bytes; none when
    /// that could not be measured.
    #[serde(default)]
    pub path_mtu: Option<u16>,
}

/// `overlay ip --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Addresses {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Whose.
    pub name: String,
    /// Overlay address.
    pub ipv4: IpAddr,
    /// Overlay address.
    pub ipv6: IpAddr,
}

/// Milliseconds with three decimals: microseconds are what a clock here can tell.
#[must_use]
pub fn millis(duration: std::time::Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// The way that a packet to this peer would take now.
impl From<&PeerStatus> for PathReport {
    fn from(peer: &PeerStatus) -> Self {
        Self {
            kind: peer.path.as_str().into(),
            remote: peer.remote.map(|remote| remote.to_string()),
            since_s: peer.since.as_secs(),
            why: peer.why.clone(),
            mtu: Some(peer.mtu).filter(|_| peer.remote.is_some()),
            loss_percent: peer.loss_permille.map(|permille| f64::from(permille) / 10.0),
            uplink: peer.uplink.as_ref().map(|uplink| uplink.device.clone()),
        }
    }
}

impl From<PeerStatus> for PeerReport {
    fn from(peer: PeerStatus) -> Self {
        Self {
            id: peer.id.to_string(),
            name: peer.name.to_string(),
            ipv4: peer.addrs.v4,
            ipv6: peer.addrs.v6,
            online: peer.online,
            path: PathReport::from(&peer),
            rtt_ms: peer.rtt.map(millis),
            tx_bytes: peer.tx_bytes,
            rx_bytes: peer.rx_bytes,
            too_big: peer.too_big,
            last_handshake_s: peer.last_handshake.map(|at| at.as_secs()),
            second_session: peer.second_session,
        }
    }
}
