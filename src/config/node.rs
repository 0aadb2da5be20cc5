//! `node.toml`.

use std::path::PathBuf;

use serde::Deserialize;

use crate::types::NodeName;

/// What can be set in `node.toml`. Every key is optional; flags and variables win over it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct NodeConfig {
    /// The name to ask the server for when joining. Default: the host name.
    pub name: Option<NodeName>,
    /// Where keys and the last netmap are kept.
    pub state_dir: Option<PathBuf>,
    /// The local socket.
    pub socket: Option<PathBuf>,
    /// The name of the TUN interface. Default: `overlay0`.
    pub interface: Option<String>,
    /// UDP port. Default: a random one, kept for the next start; 0 is a new one each start.
    pub listen_port: Option<u16>,
    /// MTU of the TUN interface, in bytes. Default: 1280, which fits every path.
    pub mtu: Option<u16>,
    /// Renew WireGuard keys after so many seconds, 5 to 120. Default: 120.
    pub rekey_after_s: Option<u16>,
    /// Make paths before they are used in networks of up to so many peers. Default: 64.
    pub eager_peers: Option<u16>,
    /// Ask the router to forward a port, by UPnP, NAT-PMP or PCP. Default: true.
    pub port_mapping: Option<bool>,
    /// The lease to ask for, in seconds, 20 to 86400. Default: 7200.
    pub port_mapping_lease_s: Option<u32>,
    /// Look for a path between hard NATs by chance when nothing else has led to one. Default: true.
    pub birthday_probing: Option<bool>,
    /// Let the kernel hand over and take many packets of one flow at once. Default: true.
    pub tun_offload: Option<bool>,
    /// Send many datagrams in one call. Default: true.
    pub udp_gso: Option<bool>,
    /// Receive many datagrams of one sender as one. Default: true.
    pub udp_gro: Option<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_example_shows_every_key_and_parses_with_and_without_them() {
        let example = include_str!("../../config/node.toml");
        let path = Path::new("node.toml");
        let plain: NodeConfig = crate::config::load(path, example).unwrap();
        assert_eq!(plain, NodeConfig::default(), "as shipped, everything is the default");
        let uncommented: String = example
            .lines()
            .map(|line| {
                line.strip_prefix("#").filter(|rest| !rest.starts_with(' ')).unwrap_or(line)
            })
            .fold(String::new(), |text, line| text + line + "\n");
        let all: NodeConfig = crate::config::load(path, &uncommented).unwrap();
        let NodeConfig {
            name,
            state_dir,
            socket,
            interface,
            listen_port,
            mtu,
            rekey_after_s,
            eager_peers,
            port_mapping,
            port_mapping_lease_s,
            birthday_probing,
            tun_offload,
            udp_gso,
            udp_gro,
        } = all;
        assert!(name.is_some() && state_dir.is_some() && socket.is_some() && interface.is_some());
        assert!(listen_port.is_some() && mtu.is_some());
        assert!(rekey_after_s.is_some() && eager_peers.is_some());
        assert!(port_mapping.is_some() && port_mapping_lease_s.is_some());
        assert!(birthday_probing.is_some());
        assert!(tun_offload.is_some() && udp_gso.is_some() && udp_gro.is_some());
    }
}
