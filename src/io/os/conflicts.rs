//! Which local networks an overlay range would collide with.
//!
//! A pure helper: the lists come from [`super::Netlink`], the judgement of what to do with a
//! conflict is the caller's.

use ipnet::IpNet;

use super::{InterfaceAddress, Route};

/// An overlay range and a local network that share addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The overlay range.
    pub range: IpNet,
    /// What it meets.
    pub local: LocalNet,
    /// The index of the interface that the local network is on.
    pub index: u32,
    /// The name of that interface; empty when it has no address and the name is not known.
    pub interface: String,
    /// Which of the two is the wider one.
    pub overlap: Overlap,
}

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { range, local, interface, index, .. } = self;
        write!(f, "overlay range {range} meets {local} on ")?;
        if interface.is_empty() { write!(f, "interface {index}") } else { write!(f, "{interface}") }
    }
}

/// What is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalNet {
    /// A route to this network.
    Route(IpNet),
    /// An address of this machine, with the network around it.
    Address(IpNet),
}

impl std::fmt::Display for LocalNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Route(net) => write!(f, "the route to {net}"),
            Self::Address(net) => write!(f, "address {net}"),
        }
    }
}

/// How a local network lies to the overlay range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Overlap {
    /// The local network is as specific as the range or lies inside it: packets to some overlay
    /// addresses would leave by the local network.
    Inside,
    /// The local network is wider: the overlay works, and hides a part of the local network.
    Around,
}

/// The local routes and addresses that overlap an overlay range, worst first.
///
/// Default routes, routes so wide that they mean "everywhere" and everything on the overlay's own
/// interface are no conflicts.
pub fn conflicts(
    routes: &[Route],
    addresses: &[InterfaceAddress],
    ranges: &[IpNet],
    own_index: Option<u32>,
) -> Vec<Conflict> {
    let name = |index: u32| {
        let found = addresses.iter().find(|address| address.index == index);
        found.map(|address| address.name.clone()).unwrap_or_default()
    };
    let of_addresses =
        addresses.iter().map(|address| (LocalNet::Address(address.addr), address.index));
    let of_routes = routes
        .iter()
        // The route of an address's own network says nothing that the address does not say.
        .filter(|route| {
            let same = |address: &InterfaceAddress| {
                address.index == route.index && address.addr.trunc() == route.dst.trunc()
            };
            !addresses.iter().any(same)
        })
        .map(|route| (LocalNet::Route(route.dst), route.index));

    let mut found = Vec::new();
    for (local, index) in of_addresses.chain(of_routes) {
        let (LocalNet::Route(net) | LocalNet::Address(net)) = local;
        if Some(index) == own_index || means_everywhere(net) {
            continue;
        }
        for range in ranges {
            let overlap = if range.contains(&net) {
                Overlap::Inside
            } else if net.contains(range) {
                Overlap::Around
            } else {
                continue;
            };
            found.push(Conflict { range: *range, local, index, interface: name(index), overlap });
        }
    }
    found.sort_by_key(|conflict| conflict.overlap);
    found
}

/// Halves and quarters of the address space are how VPNs replace a default route.
fn means_everywhere(net: IpNet) -> bool {
    match net {
        IpNet::V4(net) => net.prefix_len() < WIDEST_LOCAL_V4,
        IpNet::V6(net) => net.prefix_len() < WIDEST_LOCAL_V6,
    }
}

/// No private IPv4 network is wider than 10.0.0.0/8.
const WIDEST_LOCAL_V4: u8 = 8;

/// 2000::/3, fc00::/7 and the like are summaries; a site has a /32 at most (RFC 6177 gives a /48).
const WIDEST_LOCAL_V6: u8 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn address(index: u32, name: &str, addr: &str) -> InterfaceAddress {
        InterfaceAddress {
            index,
            name: name.to_owned(),
            up: true,
            loopback: false,
            addr: net(addr),
            deprecated: false,
            tentative: false,
            temporary: false,
        }
    }

    fn found(routes: &[(&str, u32)], ranges: &[&str]) -> Vec<(LocalNet, Overlap)> {
        let routes: Vec<Route> =
            routes.iter().map(|(dst, index)| Route::direct(net(dst), *index)).collect();
        let ranges: Vec<IpNet> = ranges.iter().map(|range| net(range)).collect();
        let found = conflicts(&routes, &[], &ranges, Some(7));
        found.into_iter().map(|conflict| (conflict.local, conflict.overlap)).collect()
    }

    #[test]
    fn a_route_inside_the_range_or_equal_to_it_takes_overlay_traffic_away() {
        for dst in ["10.83.16.0/20", "10.83.17.0/24", "10.83.31.255/32"] {
            let expected = [(LocalNet::Route(net(dst)), Overlap::Inside)];
            assert_eq!(found(&[(dst, 2)], &["10.83.16.0/20"]), expected);
        }
    }

    #[test]
    fn a_wider_route_is_reported_as_around_and_after_the_worse_ones() {
        let routes = [("10.0.0.0/8", 2), ("10.83.16.0/24", 3)];
        let expected = [
            (LocalNet::Route(net("10.83.16.0/24")), Overlap::Inside),
            (LocalNet::Route(net("10.0.0.0/8")), Overlap::Around),
        ];
        assert_eq!(found(&routes, &["10.83.16.0/20"]), expected);
    }

    #[test]
    fn default_routes_their_halves_and_our_own_interface_are_no_conflict() {
        let routes = [
            ("0.0.0.0/0", 2),
            ("0.0.0.0/1", 2),
            ("::/0", 2),
            ("2000::/3", 2),
            ("10.83.16.0/20", 7),
            ("192.168.1.0/24", 2),
        ];
        assert_eq!(found(&routes, &["10.83.16.0/20", "fd12:3456:789a::/48"]), []);
    }

    #[test]
    fn an_address_is_named_with_its_interface_and_its_own_route_is_not_told_twice() {
        let addresses = [address(3, "docker0", "10.83.17.1/24")];
        let routes = [Route::direct(net("10.83.17.0/24"), 3)];
        let found = conflicts(&routes, &addresses, &[net("10.83.16.0/20")], Some(7));
        assert_eq!(found.len(), 1, "one cause, one conflict");
        assert_eq!(
            found[0].to_string(),
            "overlay range 10.83.16.0/20 meets address 10.83.17.1/24 on docker0"
        );
    }
}
