//! `server.toml`.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::de::Error;
use serde::{Deserialize, Deserializer};

use super::Config;
use super::node::{NodeConfig, path};
use super::paths::Role;
use crate::io::metrics::LoopbackAddr;
use crate::types::OverlayRange;
use crate::wire::join::ServerAddr;

/// The content of `server.toml`; what is not set has the default that `config/server.toml` shows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ServerConfig {
    /// Addresses to listen on, TCP and UDP.
    pub listen: Vec<SocketAddr>,
    /// Addresses to put into join lines.
    pub public_addr: Vec<ServerAddr>,
    /// Where keys and members are kept.
    #[serde(deserialize_with = "path")]
    pub state_dir: Option<PathBuf>,
    /// The local socket for `overlay server nodes` and the like.
    #[serde(deserialize_with = "path")]
    pub socket: Option<PathBuf>,
    /// The overlay's IPv4 range; only before the first node has joined.
    #[serde(deserialize_with = "network")]
    pub network: Option<Ipv4Net>,
    /// The overlay's IPv6 range; only before the first node has joined.
    #[serde(deserialize_with = "network_ipv6")]
    pub network_ipv6: Option<Ipv6Net>,
    /// Where Prometheus may ask, an address of this machine alone. Default: nowhere.
    pub metrics: Option<LoopbackAddr>,
    /// In a network of up to so many nodes each is told of every other, in a larger one of the
    /// peers that it uses. Default: [`crate::server::WHOLE_NETMAP_UP_TO`]; 4,096 at most.
    #[serde(deserialize_with = "whole_netmap")]
    pub whole_netmap_up_to: Option<usize>,
    /// Megabits in a second that the relay carries for one node. Default: 10,000.
    pub relay_node_mbit: Option<NonZeroU32>,
    /// Datagrams in a second that the relay carries for one node. Default: 2,000,000.
    pub relay_node_packets: Option<NonZeroU32>,
    /// Megabits in a second that the relay carries in all. Default: 40,000.
    pub relay_network_mbit: Option<NonZeroU32>,
    /// Datagrams in a second that the relay carries in all. Default: 8,000,000.
    pub relay_network_packets: Option<NonZeroU32>,
}

impl Config for ServerConfig {
    const ROLE: Role = Role::Server;
    type Other = NodeConfig;
}

/// All of so many nodes, each with as many candidates as it may have, go into one message
/// ([`crate::wire::frame::MAX_MESSAGE`]).
const MAX_WHOLE_NETMAP: usize = 4096;

fn whole_netmap<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let nodes = usize::deserialize(deserializer)?;
    if nodes > MAX_WHOLE_NETMAP {
        return Err(D::Error::custom(format!(
            "{nodes} is more than {MAX_WHOLE_NETMAP}: a node is told of no more others in one message, \
             and in a larger network of those that it talks to"
        )));
    }
    Ok(Some(nodes))
}

/// What the server would refuse when it starts.
fn network<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ipv4Net>, D::Error> {
    let range = Ipv4Net::deserialize(deserializer)?;
    OverlayRange::check_v4(range).map_err(Error::custom)?;
    Ok(Some(range))
}

fn network_ipv6<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ipv6Net>, D::Error> {
    let range = Ipv6Net::deserialize(deserializer)?;
    OverlayRange::check_v6(range).map_err(Error::custom)?;
    Ok(Some(range))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::load;

    const EXAMPLE: &str = include_str!("../../config/server.toml");

    #[test]
    fn the_example_as_it_is_changes_nothing() {
        let config: ServerConfig = load(Path::new("config/server.toml"), EXAMPLE).unwrap();
        assert_eq!(config, ServerConfig::default());
    }

    #[test]
    fn what_the_server_would_refuse_is_pointed_at() {
        let said = |text: &str| {
            let loaded = load::<ServerConfig>(Path::new("server.toml"), text);
            loaded.map_or_else(|error| error.to_string(), |_| "good".into())
        };
        assert_eq!(said("network = \"10.0.0.0/20\"\nnetwork-ipv6 = \"fd00:1:2::/48\""), "good");
        for (line, why) in [
            ("network = \"127.0.0.0/8\"", "is not private"),
            ("network = \"0.0.0.0/0\"", "a prefix length of 8 to 29"),
            ("network = \"10.0.0.0/31\"", "a prefix length of 8 to 29"),
            ("network = \"10.0.0.1/20\"", "write 10.0.0.0/20"),
            ("network-ipv6 = \"fe80::/64\"", "must be in fd00::/8"),
            ("network-ipv6 = \"fd00::1/64\"", "write fd00::/64"),
            ("state-dir = \"\"", "an empty path"),
            ("socket = \"\"", "an empty path"),
        ] {
            let said = said(line);
            assert!(said.starts_with("server.toml:1:") && said.contains(why), "{line}: {said}");
        }
    }

    #[test]
    fn every_setting_of_the_example_is_one_that_exists() {
        let uncommented: String = EXAMPLE
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| line.contains(" = ") && !line.starts_with(' '))
            .map(|line| format!("{line}\n"))
            .collect();
        let config: ServerConfig = load(Path::new("config/server.toml"), &uncommented).unwrap();
        assert!(!config.listen.is_empty() && !config.public_addr.is_empty());
        assert!(config.state_dir.is_some() && config.socket.is_some());
        assert!(config.network.is_some() && config.network_ipv6.is_some());
        assert!(config.metrics.is_some());
        assert_eq!(config.whole_netmap_up_to, Some(crate::server::WHOLE_NETMAP_UP_TO));
        assert!(config.relay_node_mbit.is_some() && config.relay_node_packets.is_some());
        assert!(config.relay_network_mbit.is_some() && config.relay_network_packets.is_some());
    }

    #[test]
    fn nobody_is_told_of_more_nodes_than_a_message_holds() {
        let read = |text: &str| load::<ServerConfig>(Path::new("server.toml"), text);
        assert_eq!(read("whole-netmap-up-to = 4096").unwrap().whole_netmap_up_to, Some(4096));
        let error = read("whole-netmap-up-to = 4097").unwrap_err().to_string();
        assert!(error.starts_with("server.toml:1:22: 4097 is more than 4096"), "{error}");
    }
}
