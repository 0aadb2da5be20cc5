//! The overlay's own addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::reach::is_inside;

/// What counts as one source where senders are limited: a home has one IPv4 address or one IPv6 /64.
#[must_use]
pub fn source_of(remote: IpAddr) -> IpAddr {
    match remote.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(ip) >> 64 << 64)),
    }
}

/// Why a pair of prefixes cannot be an overlay range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Too small for a network, or absurdly large.
    #[error("the IPv4 range {range} must have a prefix length of 8 to 29")]
    V4Size {
        /// The range.
        range: Ipv4Net,
    },
    /// An address and the length of a prefix, which may be a slip of the keyboard.
    #[error("{net} is an address in the range {range}: write {range}")]
    Inside {
        /// What was written.
        net: IpNet,
        /// What it is in.
        range: IpNet,
    },
    /// Public, loopback or multicast space.
    #[error("the IPv4 range {range} is not private (10/8, 172.16/12, 192.168/16, 100.64/10)")]
    V4NotPrivate {
        /// The range.
        range: Ipv4Net,
    },
    /// Not a unique local /64 or larger.
    #[error("the IPv6 range {range} must be in fd00::/8 with a prefix length of 48 to 64")]
    V6 {
        /// The range.
        range: Ipv6Net,
    },
}

/// The address range of a network: one IPv4 prefix and one IPv6 unique local prefix (RFC 4193).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Prefixes")]
pub struct OverlayRange {
    v4: Ipv4Net,
    v6: Ipv6Net,
}

/// A range as it lies in a file, not yet checked.
#[derive(Deserialize)]
struct Prefixes {
    v4: Ipv4Net,
    v6: Ipv6Net,
}

impl TryFrom<Prefixes> for OverlayRange {
    type Error = RangeError;

    fn try_from(Prefixes { v4, v6 }: Prefixes) -> Result<Self, RangeError> {
        Self::new(v4, v6)
    }
}

impl OverlayRange {
    /// Checks and keeps the two prefixes.
    ///
    /// # Errors
    /// When a prefix is not private or its size makes no sense.
    pub fn new(v4: Ipv4Net, v6: Ipv6Net) -> Result<Self, RangeError> {
        let (v4, v6) = (v4.trunc(), v6.trunc());
        Self::check_v4(v4)?;
        Self::check_v6(v6)?;
        Ok(Self { v4, v6 })
    }

    /// Whether a network can have this IPv4 range.
    ///
    /// # Errors
    /// When it is not private, its size makes no sense, or it is not the start of a range.
    pub fn check_v4(v4: Ipv4Net) -> Result<(), RangeError> {
        if v4 != v4.trunc() {
            return Err(RangeError::Inside { net: v4.into(), range: v4.trunc().into() });
        }
        if !(8..=29).contains(&v4.prefix_len()) {
            return Err(RangeError::V4Size { range: v4 });
        }
        if !(is_inside(v4.network().into()) && is_inside(v4.broadcast().into())) {
            return Err(RangeError::V4NotPrivate { range: v4 });
        }
        Ok(())
    }

    /// Whether a network can have this IPv6 range.
    ///
    /// # Errors
    /// When it is not a unique local one of a sensible size, or not the start of a range.
    pub fn check_v6(v6: Ipv6Net) -> Result<(), RangeError> {
        if v6 != v6.trunc() {
            return Err(RangeError::Inside { net: v6.into(), range: v6.trunc().into() });
        }
        if v6.network().octets()[0] != 0xfd || !(48..=64).contains(&v6.prefix_len()) {
            return Err(RangeError::V6 { range: v6 });
        }
        Ok(())
    }

    /// The IPv4 prefix.
    #[must_use]
    pub fn v4(&self) -> Ipv4Net {
        self.v4
    }

    /// The IPv6 prefix.
    #[must_use]
    pub fn v6(&self) -> Ipv6Net {
        self.v6
    }

    /// Both prefixes.
    #[must_use]
    pub fn prefixes(&self) -> [IpNet; 2] {
        [IpNet::V4(self.v4), IpNet::V6(self.v6)]
    }

    /// Whether `ip` lies in the overlay: such an address is never an underlay endpoint.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.contains(&ip),
            IpAddr::V6(ip) => self.v6.contains(&ip),
        }
    }

    /// How many nodes fit: all addresses but network and broadcast.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        (1u32 << (32 - self.v4.prefix_len())) - 2
    }

    /// The addresses of the node with this host number (1 to [`Self::capacity`]).
    #[must_use]
    pub fn addresses(&self, host: u32) -> Option<OverlayAddrs> {
        if host == 0 || host > self.capacity() {
            return None;
        }
        let v4 = Ipv4Addr::from(u32::from(self.v4.network()) + host);
        let v6 = Ipv6Addr::from(u128::from(self.v6.network()) + u128::from(host));
        Some(OverlayAddrs { v4, v6 })
    }

    /// The host number whose address this is.
    #[must_use]
    pub fn host_of(&self, ip: IpAddr) -> Option<u32> {
        let host = match ip {
            IpAddr::V4(ip) => u32::from(ip).checked_sub(u32::from(self.v4.network()))?,
            IpAddr::V6(ip) => {
                u32::try_from(u128::from(ip).checked_sub(u128::from(self.v6.network()))?).ok()?
            }
        };
        self.addresses(host).is_some_and(|addrs| addrs.contains(ip)).then_some(host)
    }
}

/// The two overlay addresses of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OverlayAddrs {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl OverlayAddrs {
    /// Whether `ip` is one of the two.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip == self.v4,
            IpAddr::V6(ip) => ip == self.v6,
        }
    }

    /// Both, as host prefixes.
    #[must_use]
    pub fn prefixes(&self) -> [IpNet; 2] {
        [IpNet::from(IpAddr::V4(self.v4)), IpNet::from(IpAddr::V6(self.v6))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(v4: &str) -> Result<OverlayRange, RangeError> {
        OverlayRange::new(v4.parse().unwrap(), "fd12:3456:789a::/48".parse().unwrap())
    }

    #[test]
    fn a_range_that_no_network_can_have_cannot_be_read_from_a_file() {
        let read = |text: &str| serde_json::from_str::<OverlayRange>(text);
        let good = r#"{"v4":"10.77.0.0/20","v6":"fd12:3456:789a::/48"}"#;
        assert_eq!(read(good).unwrap(), range("10.77.0.0/20").unwrap());
        for bad in ["0.0.0.0/0", "10.77.0.0/31", "10.77.0.0/32", "8.8.8.0/24"] {
            let error = read(&good.replace("10.77.0.0/20", bad)).unwrap_err().to_string();
            assert!(error.contains("the IPv4 range"), "{error}");
        }
        assert!(read(&good.replace("fd12", "2001")).is_err());
    }

    #[test]
    fn host_numbers_cover_the_range_and_nothing_else() {
        let range = range("10.77.16.0/29").unwrap();
        assert_eq!(range.capacity(), 6);
        assert_eq!(range.addresses(0), None);
        assert_eq!(range.addresses(1).unwrap().v4, Ipv4Addr::new(10, 77, 16, 1));
        assert_eq!(range.addresses(6).unwrap().v6.to_string(), "fd12:3456:789a::6");
        assert_eq!(range.addresses(7), None);
    }

    #[test]
    fn public_and_absurd_ranges_are_refused() {
        for bad in ["8.8.8.0/24", "10.0.0.0/30", "0.0.0.0/8", "192.168.0.0/15", "127.0.0.0/8"] {
            assert!(range(bad).is_err(), "{bad}");
        }
        for good in ["10.1.2.0/20", "100.64.0.0/10", "192.168.7.0/24", "172.16.0.0/12"] {
            assert!(range(good).is_ok(), "{good}");
        }
    }
}
