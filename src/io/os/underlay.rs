//! Which addresses of this machine a peer might reach it at, and by which way its packets leave.
//!
//! A machine has many addresses that are of no use to anybody else: those of container and virtual
//! machine bridges, of other tunnels (also of another overlay network), of links without a carrier.
//! Announcing them costs every peer probes, and a tunnel's would carry our packets inside another
//! tunnel. Interfaces are judged by what the kernel knows of them, never by their names.

use std::cmp::Reverse;
use std::net::IpAddr;

use super::{InterfaceAddress, Link, LinkKind, Route};
use crate::types::{Uplink, is_inside, is_link_local};

/// The most addresses of one family.
const MAX_PER_FAMILY: usize = 16;
/// The most of both: a node's other candidates want room in [`crate::types::MAX_CANDIDATES`] too.
const MAX_ADDRESSES: usize = 20;
/// The most uplinks of one family: the preferred one, and two for when it fails. Each costs a socket,
/// and a packet to the server every 20 s.
const MAX_UPLINKS: usize = 3;

/// How this machine hangs on the networks around it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Underlay {
    /// Addresses worth announcing, the best ones first.
    pub addresses: Vec<IpAddr>,
    /// All addresses that work, but those of the overlay's own interface.
    pub present: Vec<IpAddr>,
    /// The default route in use, of each family that has one.
    pub gateways: Vec<Route>,
    /// Every uplink that packets of ours may leave by, the preferred one of each family first.
    pub uplinks: Vec<Uplink>,
    /// The addresses on the interfaces of `gateways`.
    pub sources: Vec<IpAddr>,
}

impl Underlay {
    /// Whether our packets leave from the same addresses by the same ways. What else is `present`
    /// comes and goes with every container.
    #[must_use]
    pub fn leads_out_like(&self, other: &Self) -> bool {
        self.addresses == other.addresses
            && self.gateways == other.gateways
            && self.sources == other.sources
    }

    /// Judges the interfaces; `own` is the overlay's.
    #[must_use]
    pub fn of(
        links: &[Link],
        addresses: &[InterfaceAddress],
        routes: &[Route],
        own: Option<u32>,
    ) -> Self {
        let working: Vec<&InterfaceAddress> = addresses
            .iter()
            .filter(|address| Some(address.index) != own && address.up && !address.tentative)
            .collect();
        let facts = Facts { links, routes, own, addresses: &working };
        let mut ranked: Vec<_> = working
            .iter()
            .filter_map(|address| Some((facts.rank(address)?, address.addr.addr())))
            .collect();
        ranked.sort_unstable();
        ranked.dedup_by_key(|(_, address)| *address);
        let gateways: Vec<Route> =
            [true, false].into_iter().filter_map(|v4| facts.default_in_use(v4)).collect();
        let preferred = |index| gateways.iter().any(|route| route.index == index);
        Self {
            addresses: cap(ranked.into_iter().map(|(_, address)| address)),
            present: working.iter().map(|address| address.addr.addr()).collect(),
            uplinks: [true, false].into_iter().flat_map(|v4| facts.uplinks(v4)).collect(),
            sources: working
                .iter()
                .filter(|address| preferred(address.index))
                .map(|address| address.addr.addr())
                .collect(),
            gateways,
        }
    }
}

/// Lower is better.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Its interface has the default route in use.
    Default,
    /// Its interface has another default route, and it is of a private net.
    OtherDefault,
    /// It is on some other network that a peer may be on, too.
    Local,
    /// A privacy address beside none that lives longer.
    Temporary,
}

struct Facts<'a> {
    links: &'a [Link],
    routes: &'a [Route],
    own: Option<u32>,
    addresses: &'a [&'a InterfaceAddress],
}

impl Facts<'_> {
    fn rank(&self, address: &InterfaceAddress) -> Option<Rank> {
        let link = self.links.iter().find(|link| link.index == address.index)?;
        let ip = address.addr.addr();
        let useless = address.loopback || address.deprecated || !link.carrier || is_link_local(ip);
        if useless || !self.leads_outside(link, address) {
            return None;
        }
        let v4 = ip.is_ipv4();
        let in_use = self.default_in_use(v4).is_some_and(|route| route.index == link.index);
        let other_default = !in_use && self.has_default(link.index, v4);
        // What the main socket answers leaves by the route in use, where this source is foreign. A
        // further uplink has a socket and a candidate of its own.
        if other_default && !is_inside(ip) {
            return None;
        }
        if address.temporary {
            return (!self.has_stable_sibling(address)).then_some(Rank::Temporary);
        }
        Some(match (in_use, other_default) {
            (true, _) => Rank::Default,
            (false, true) => Rank::OtherDefault,
            (false, false) => Rank::Local,
        })
    }

    /// Whether a peer on another machine could be on the net behind this interface.
    fn leads_outside(&self, link: &Link, address: &InterfaceAddress) -> bool {
        let v4 = address.addr.addr().is_ipv4();
        let default = self.has_default(link.index, v4);
        // One address and no net: a container network's own, unless all packets leave by it.
        let alone = address.addr.prefix_len() == address.addr.max_prefix_len();
        match link.kind {
            LinkKind::Tunnel => default && !self.has_default_beside_tunnels(v4),
            LinkKind::PointToPoint | LinkKind::Tap => default,
            LinkKind::Bridge => default || self.has_real_port(link.index),
            LinkKind::Device | LinkKind::Veth => {
                default || !alone || v4 && !is_inside(address.addr.addr())
            }
        }
    }

    /// Whether a bridge joins more than virtual machines and containers.
    fn has_real_port(&self, bridge: u32) -> bool {
        let of_bridge = |link: &&Link| link.controller == Some(bridge);
        self.links.iter().filter(of_bridge).any(|link| link.kind == LinkKind::Device)
    }

    fn has_stable_sibling(&self, address: &InterfaceAddress) -> bool {
        self.addresses.iter().any(|other| {
            other.index == address.index
                && !other.temporary
                && !other.deprecated
                && other.addr.trunc() == address.addr.trunc()
        })
    }

    fn defaults(&self, v4: bool) -> impl Iterator<Item = &Route> {
        let ours = self.own;
        self.routes.iter().filter(move |route| {
            // Two halves of everything are how some tunnels hide the default route.
            route.dst.prefix_len() <= 1
                && route.dst.addr().is_ipv4() == v4
                && Some(route.index) != ours
        })
    }

    fn has_default(&self, index: u32, v4: bool) -> bool {
        self.defaults(v4).any(|route| route.index == index)
    }

    fn has_default_beside_tunnels(&self, v4: bool) -> bool {
        let tunnel = |index| {
            let link = self.links.iter().find(|link| link.index == index);
            link.is_some_and(|link| link.kind == LinkKind::Tunnel)
        };
        self.defaults(v4).any(|route| !tunnel(route.index))
    }

    fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// The kernel's order among routes to everywhere.
    fn order(&self, route: &Route) -> impl Ord + use<> {
        let carrier = self.link(route.index).is_some_and(|link| link.carrier);
        (Reverse(carrier), Reverse(route.dst.prefix_len()), route.metric.unwrap_or(0))
    }

    fn default_in_use(&self, v4: bool) -> Option<Route> {
        self.defaults(v4).min_by_key(|route| self.order(route)).cloned()
    }

    /// The interfaces with a default route, the preferred one first.
    /// Who sends everything through a tunnel wants nothing to leave beside it, and a tunnel with a
    /// route behind the preferred one is another network's.
    fn uplinks(&self, v4: bool) -> Vec<Uplink> {
        let mut routes: Vec<&Route> = self.defaults(v4).collect();
        routes.sort_by_key(|route| self.order(route));
        let own_line = |index| {
            let link = self.link(index)?;
            let tunnel = matches!(link.kind, LinkKind::Tunnel | LinkKind::Tap);
            (!tunnel).then_some(link)
        };
        let Some(preferred) = routes.first().and_then(|route| own_line(route.index)) else {
            return Vec::new();
        };
        let works = |link: &Link| {
            let of_family = |address: &&&InterfaceAddress| {
                let ip = address.addr.addr();
                address.index == link.index && ip.is_ipv4() == v4 && !is_link_local(ip)
            };
            link.carrier && self.addresses.iter().any(|address| of_family(&address))
        };
        let uplink =
            |link: &Link| Uplink { device: link.name.clone(), index: link.index, ipv6: !v4 };
        let mut uplinks = vec![uplink(preferred)];
        for link in routes.iter().filter_map(|route| own_line(route.index)).filter(|it| works(it)) {
            if !uplinks.contains(&uplink(link)) {
                uplinks.push(uplink(link));
            }
        }
        uplinks.truncate(MAX_UPLINKS);
        uplinks
    }
}

/// Fair to both families: the longer list is cut first.
fn cap(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let (mut v4, mut v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.partition(IpAddr::is_ipv4);
    v4.truncate(MAX_PER_FAMILY);
    v6.truncate(MAX_PER_FAMILY);
    while v4.len() + v6.len() > MAX_ADDRESSES {
        if v4.len() > v6.len() {
            v4.pop()
        } else {
            v6.pop()
        };
    }
    v4.append(&mut v6);
    v4
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, kind: LinkKind) -> Link {
        Link {
            index,
            name: format!("if{index}"),
            up: true,
            loopback: false,
            mtu_bytes: 1500,
            kind,
            carrier: true,
            controller: None,
        }
    }

    fn address(index: u32, addr: &str) -> InterfaceAddress {
        InterfaceAddress {
            index,
            name: format!("if{index}"),
            up: true,
            loopback: false,
            addr: addr.parse().unwrap(),
            deprecated: false,
            tentative: false,
            temporary: false,
        }
    }

    fn default_route(index: u32, metric: u32) -> Route {
        Route { metric: Some(metric), ..Route::direct("0.0.0.0/0".parse().unwrap(), index) }
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn only_addresses_that_others_can_reach_are_worth_announcing() {
        let mut unplugged = link(6, LinkKind::Device);
        unplugged.carrier = false;
        let mut port = link(8, LinkKind::Device);
        port.controller = Some(7);
        let mut guest = link(9, LinkKind::Veth);
        guest.controller = Some(2);
        let links = [
            link(1, LinkKind::Device),
            link(2, LinkKind::Bridge),
            link(3, LinkKind::Tunnel),
            link(4, LinkKind::Veth),
            link(5, LinkKind::Tap),
            unplugged,
            link(7, LinkKind::Bridge),
            port,
            guest,
            link(10, LinkKind::PointToPoint),
        ];
        let addresses = [
            address(10, "10.64.3.9/32"),
            address(1, "169.254.7.7/16"),
            address(1, "192.168.1.5/24"),
            address(2, "172.17.0.1/16"),
            address(3, "10.99.0.1/16"),
            address(4, "10.0.0.77/32"),
            address(5, "10.147.17.2/24"),
            address(6, "192.168.9.5/24"),
            address(7, "192.168.7.5/24"),
        ];
        let underlay = Underlay::of(&links, &addresses, &[default_route(1, 100)], None);
        assert_eq!(underlay.addresses, ips(&["192.168.1.5", "192.168.7.5"]));
        assert_eq!(underlay.present.len(), addresses.len(), "a connection may use any of them");
    }

    #[test]
    fn a_container_that_comes_does_not_change_the_way_out() {
        let (links, routes) = ([link(1, LinkKind::Device)], [default_route(1, 100)]);
        let before = Underlay::of(&links, &[address(1, "192.168.1.5/24")], &routes, None);
        let links = [links[0].clone(), link(2, LinkKind::Bridge), link(3, LinkKind::Veth)];
        let container = [
            address(1, "192.168.1.5/24"),
            address(2, "172.17.0.1/16"),
            address(3, "fe80::42:acff:fe11:2/64"),
        ];
        let after = Underlay::of(&links, &container, &routes, None);
        assert_ne!(before, after);
        assert!(after.leads_out_like(&before));
        let moved = [address(1, "192.168.1.6/24")];
        assert!(!Underlay::of(&links, &moved, &routes, None).leads_out_like(&before));
        let rerouted = Underlay::of(&links, &container, &[default_route(1, 50)], None);
        assert!(!rerouted.leads_out_like(&before));
    }

    #[test]
    fn what_carries_everything_is_the_way_out_whatever_it_is() {
        for kind in [LinkKind::Tunnel, LinkKind::Tap, LinkKind::PointToPoint, LinkKind::Bridge] {
            let links = [link(1, kind)];
            let addresses = [address(1, "10.0.2.100/32")];
            let underlay = Underlay::of(&links, &addresses, &[default_route(1, 0)], None);
            assert_eq!(underlay.addresses, ips(&["10.0.2.100"]), "{kind:?}");
        }
        // But a tunnel is not when there is a way beside it.
        let links = [link(1, LinkKind::Tunnel), link(2, LinkKind::Device)];
        let addresses = [address(1, "10.8.0.2/24"), address(2, "192.168.1.5/24")];
        let routes = [default_route(1, 50), default_route(2, 100)];
        let underlay = Underlay::of(&links, &addresses, &routes, None);
        assert_eq!(underlay.addresses, ips(&["192.168.1.5"]));
        assert_eq!(underlay.gateways, [default_route(1, 50)], "and packets leave by it");
    }

    #[test]
    fn the_own_interface_is_none_of_it() {
        let links = [link(1, LinkKind::Device), link(2, LinkKind::Tunnel)];
        let addresses = [address(1, "192.168.1.5/24"), address(2, "10.77.0.1/20")];
        let underlay = Underlay::of(&links, &addresses, &[default_route(2, 0)], Some(2));
        assert_eq!(underlay.addresses, ips(&["192.168.1.5"]));
        assert_eq!((underlay.present, underlay.gateways), (ips(&["192.168.1.5"]), vec![]));
    }

    #[test]
    fn an_address_that_lives_long_stands_for_its_privacy_address() {
        let links = [link(1, LinkKind::Device)];
        let temporary = |addr: &str| InterfaceAddress { temporary: true, ..address(1, addr) };
        let addresses = [
            temporary("2001:db8::99/64"),
            address(1, "2001:db8::1/64"),
            temporary("2001:db8:1::9/64"),
        ];
        let underlay = Underlay::of(&links, &addresses, &[], None);
        assert_eq!(underlay.addresses, ips(&["2001:db8::1", "2001:db8:1::9"]));
    }

    #[test]
    fn uplinks_are_what_has_a_default_route_in_the_kernels_order() {
        let mut unplugged = link(5, LinkKind::Device);
        unplugged.carrier = false;
        let links = [
            link(1, LinkKind::Device),
            link(2, LinkKind::PointToPoint),
            link(3, LinkKind::Tunnel),
            link(4, LinkKind::Tap),
            unplugged,
            link(6, LinkKind::Device),
            link(7, LinkKind::Tunnel),
        ];
        let mut addresses: Vec<InterfaceAddress> =
            (1..=5).map(|index| address(index, &format!("10.{index}.0.2/24"))).collect();
        addresses.push(address(1, "2001:db8::2/64"));
        addresses.push(address(7, "10.77.0.1/20"));
        let names = |metrics: &[(u32, u32)]| -> Vec<String> {
            let routes: Vec<Route> =
                metrics.iter().map(|(index, metric)| default_route(*index, *metric)).collect();
            let underlay = Underlay::of(&links, &addresses, &routes, Some(7));
            underlay.uplinks.into_iter().map(|uplink| uplink.device).collect()
        };
        assert_eq!(names(&[(2, 200), (1, 100)]), ["if1", "if2"]);
        assert_eq!(names(&[(2, 100), (1, 200), (1, 300)]), ["if2", "if1"], "once each");
        assert_eq!(names(&[(1, 100)]), ["if1"], "the only one may have been a further one before");
        // Tunnels of others, no carrier, no address, and our own interface.
        let useless = [(3, 200), (4, 200), (5, 200), (6, 200), (7, 50)];
        assert_eq!(names(&[&useless[..], &[(1, 100)]].concat()), ["if1"]);
        for tunnel in [3, 4] {
            let all = names(&[(tunnel, 50), (1, 100), (2, 200)]);
            assert!(all.is_empty(), "nothing leaves beside a tunnel that has everything");
        }
        // The kernel has no other idea of what is preferred.
        assert_eq!(names(&[(6, 50), (2, 200), (1, 100)]), ["if6", "if1", "if2"]);
        let v6 = Route { metric: Some(5), ..Route::direct("::/0".parse().unwrap(), 1) };
        let underlay = Underlay::of(&links, &addresses, &[v6, default_route(2, 9)], None);
        let found: Vec<(u32, bool)> =
            underlay.uplinks.iter().map(|uplink| (uplink.index, uplink.ipv6)).collect();
        assert_eq!(found, [(2, false), (1, true)], "each family has one");
    }

    #[test]
    fn a_public_address_of_a_further_uplink_is_not_announced() {
        let links = [link(1, LinkKind::Device), link(2, LinkKind::Device)];
        let addresses = ["203.0.113.1/24", "2001:db8::1/64"].map(|it| address(1, it));
        let further = ["198.51.100.2/24", "192.168.7.2/24", "2001:db8:7::2/64", "fd01::2/64"];
        let addresses = [&addresses[..], &further.map(|it| address(2, it))].concat();
        let v6 =
            |index, metric| Route { dst: "::/0".parse().unwrap(), ..default_route(index, metric) };
        let routes = [default_route(1, 1), default_route(2, 2), v6(1, 1), v6(2, 2)];
        let underlay = Underlay::of(&links, &addresses, &routes, None);
        let announced = ["203.0.113.1", "192.168.7.2", "2001:db8::1", "fd01::2"];
        assert_eq!(underlay.addresses, ips(&announced));
    }

    #[test]
    fn of_too_many_addresses_the_best_stay() {
        let links = [link(1, LinkKind::Device), link(2, LinkKind::Device)];
        let mut addresses = Vec::new();
        for number in 0..40 {
            addresses.push(address(1, &format!("10.1.0.{}/24", number + 1)));
            addresses.push(address(1, &format!("2001:db8::{}/64", number + 1)));
        }
        addresses.push(address(2, "192.168.1.5/24"));
        let underlay = Underlay::of(&links, &addresses, &[default_route(2, 0)], None);
        let v4 = underlay.addresses.iter().filter(|address| address.is_ipv4()).count();
        assert_eq!((underlay.addresses.len(), v4), (MAX_ADDRESSES, MAX_ADDRESSES / 2));
        assert!(underlay.addresses.contains(&"192.168.1.5".parse().unwrap()));

        addresses.retain(|address| address.addr.addr().is_ipv4());
        let underlay = Underlay::of(&links, &addresses, &[default_route(2, 0)], None);
        assert_eq!(underlay.addresses.len(), MAX_PER_FAMILY);
    }
}
