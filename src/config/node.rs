//! `node.toml`.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use super::Config;
use super::paths::Role;
use super::server::ServerConfig;
use crate::io::metrics::LoopbackAddr;
use crate::io::tun::check_name;
use crate::types::NodeName;

/// What can be set in `node.toml`. Every key is optional; flags and variables win over it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct NodeConfig {
    /// The name to ask the server for when joining. Default: the host name.
    pub name: Option<NodeName>,
    /// Where keys and the last netmap are kept.
    #[serde(deserialize_with = "path")]
    pub state_dir: Option<PathBuf>,
    /// The local socket.
    #[serde(deserialize_with = "path")]
    pub socket: Option<PathBuf>,
    /// The name of the TUN interface. Default: `overlay0`.
    #[serde(deserialize_with = "interface")]
    pub interface: Option<String>,
    /// UDP port. Default: a random one, kept for the next start; 0 is a new one each start.
    pub listen_port: Option<u16>,
    /// The largest MTU that is used, in bytes, or `"auto"`: what the widest link takes. Default: auto.
    pub mtu: Option<MtuSetting>,
    /// Renew WireGuard keys after so many seconds, 5 to 120. Default: 120.
    #[serde(deserialize_with = "rekey_after")]
    pub rekey_after_s: Option<u32>,
    /// Renew the node key after so many days, up to 3650; 0 is never. Default: 30.
    #[serde(deserialize_with = "rotate_key_after")]
    pub rotate_key_after_d: Option<u32>,
    /// Make paths before they are used in networks of up to so many peers. Default: 64.
    pub eager_peers: Option<u16>,
    /// Ask the router to forward a port, by UPnP, NAT-PMP or PCP. Default: true.
    pub port_mapping: Option<bool>,
    /// The lease to ask for, in seconds, 20 to 86400. Default: 7200.
    #[serde(deserialize_with = "lease")]
    pub port_mapping_lease_s: Option<u32>,
    /// Look for a path between hard NATs by chance when nothing else has led to one. Default: true.
    pub birthday_probing: Option<bool>,
    /// A second session with busy peers, so that sealing and opening do not wait for one another.
    /// Default: true.
    pub second_session: Option<bool>,
    /// Go by every default route when the preferred one fails. Default: true.
    pub all_uplinks: Option<bool>,
    /// Where Prometheus may ask, an address of this machine alone. Default: nowhere.
    pub metrics: Option<LoopbackAddr>,
    /// Let the kernel hand over and take many packets of one flow at once. Default: true.
    pub tun_offload: Option<bool>,
    /// Send many datagrams in one call. Default: true.
    pub udp_gso: Option<bool>,
    /// Receive many datagrams of one sender as one. Default: true.
    pub udp_gro: Option<bool>,
    /// Move packets ahead of ordinary programs, where that is allowed. Default: true.
    pub realtime: Option<bool>,
}

impl Config for NodeConfig {
    const ROLE: Role = Role::Node;
    type Other = ServerConfig;
}

/// The largest packet that the overlay carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtuSetting {
    /// What the widest link of this machine allows.
    Auto,
    /// So many bytes.
    Bytes(u16),
}

/// The MTUs that an interface can have: IPv6 wants the lower one, jumbo frames end at the upper one.
const MTU_RANGE: RangeInclusive<u16> = 1_280..=9_000;

/// Not an MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an MTU is \"auto\" or a number from 1280 to 9000")]
pub struct BadMtu;

impl FromStr for MtuSetting {
    type Err = BadMtu;

    fn from_str(text: &str) -> Result<Self, BadMtu> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse().map_err(|_| BadMtu).and_then(Self::of_bytes)
    }
}

impl MtuSetting {
    fn of_bytes(bytes: u16) -> Result<Self, BadMtu> {
        if MTU_RANGE.contains(&bytes) { Ok(Self::Bytes(bytes)) } else { Err(BadMtu) }
    }

    /// The number, if there is one.
    #[must_use]
    pub fn bytes(self) -> Option<u16> {
        match self {
            Self::Auto => None,
            Self::Bytes(bytes) => Some(bytes),
        }
    }
}

impl<'de> Deserialize<'de> for MtuSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Word(String),
        }
        let setting = match Written::deserialize(deserializer) {
            Ok(Written::Number(number)) => {
                u16::try_from(number).map_err(|_| BadMtu).and_then(Self::of_bytes)
            }
            Ok(Written::Word(word)) if word == "auto" => Ok(Self::Auto),
            Ok(Written::Word(_)) | Err(_) => Err(BadMtu),
        };
        setting.map_err(serde::de::Error::custom)
    }
}

/// A name that Linux takes.
fn interface<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let name = String::deserialize(deserializer)?;
    check_name(&name).map_err(serde::de::Error::custom)?;
    Ok(Some(name))
}

/// A path; no text at all names nothing.
pub(super) fn path<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.as_os_str().is_empty() {
        return Err(serde::de::Error::custom("an empty path: name one, or leave the line out"));
    }
    Ok(Some(path))
}

fn rekey_after<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    number(deserializer, 5..=120, "a new key each so many seconds")
}

fn rotate_key_after<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    number(deserializer, 0..=3650, "so many days, and 0 is never")
}

fn lease<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    number(deserializer, 20..=86_400, "a shorter lease could end before it is renewed")
}

fn number<'de, D: Deserializer<'de>>(
    deserializer: D,
    range: RangeInclusive<u32>,
    why: &str,
) -> Result<Option<u32>, D::Error> {
    let number = u32::deserialize(deserializer)?;
    if range.contains(&number) {
        return Ok(Some(number));
    }
    let (least, most) = range.into_inner();
    let text = format!("{number} is not a number from {least} to {most}: {why}");
    Err(serde::de::Error::custom(text))
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
            rotate_key_after_d,
            eager_peers,
            port_mapping,
            port_mapping_lease_s,
            birthday_probing,
            second_session,
            all_uplinks,
            metrics,
            tun_offload,
            udp_gso,
            udp_gro,
            realtime,
        } = all;
        assert!(name.is_some() && state_dir.is_some() && socket.is_some() && interface.is_some());
        assert!(listen_port.is_some() && mtu.is_some());
        assert!(rekey_after_s.is_some() && eager_peers.is_some());
        assert!(rotate_key_after_d.is_some());
        assert!(port_mapping.is_some() && port_mapping_lease_s.is_some());
        assert!(birthday_probing.is_some() && second_session.is_some() && metrics.is_some());
        assert!(all_uplinks.is_some());
        assert!(tun_offload.is_some() && udp_gso.is_some() && udp_gro.is_some());
        assert!(realtime.is_some());
    }

    #[test]
    fn what_is_out_of_its_range_is_pointed_at() {
        let said = |text: &str| {
            let loaded = crate::config::load::<NodeConfig>(Path::new("node.toml"), text);
            loaded.map_or_else(|error| error.to_string(), |_| "good".into())
        };
        for good in ["5", "120"] {
            assert_eq!(said(&format!("rekey-after-s = {good}")), "good");
        }
        for bad in ["4", "121", "-1", "0", "\"9\""] {
            let said = said(&format!("\nrekey-after-s = {bad}"));
            assert!(said.starts_with("node.toml:2:17: "), "{said}");
        }
        for (good, bad) in [("20", "19"), ("86400", "86401")] {
            assert_eq!(said(&format!("port-mapping-lease-s = {good}")), "good");
            let said = said(&format!("port-mapping-lease-s = {bad}"));
            assert!(said.starts_with("node.toml:1:24: ") && said.contains("from 20 to"), "{said}");
        }
        for key in ["state-dir", "socket"] {
            let said = said(&format!("{key} = \"\""));
            assert!(said.contains("an empty path"), "{said}");
        }
        assert_eq!(said("interface = \"lan7\""), "good");
        let said = said("interface = \"a b\"");
        assert!(said.starts_with("node.toml:1:13: ") && said.contains("interface name"), "{said}");
    }

    #[test]
    fn an_mtu_is_a_number_in_range_or_the_word() {
        let file = |text: &str| {
            crate::config::load::<NodeConfig>(Path::new("node.toml"), text).map(|it| it.mtu)
        };
        assert_eq!(file("mtu = \"auto\"").unwrap(), Some(MtuSetting::Auto));
        assert_eq!(file("mtu = 1420").unwrap(), Some(MtuSetting::Bytes(1_420)));
        for bad in ["1279", "9001", "70000", "\"many\"", "\"1420\"", "-1", "[]"] {
            assert!(file(&format!("mtu = {bad}")).is_err(), "{bad}");
        }
        assert_eq!("9000".parse(), Ok(MtuSetting::Bytes(9_000)));
        assert_eq!("many".parse::<MtuSetting>(), Err(BadMtu));
    }
}
