//! Netlink messages to our words and back.

use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteScope, RouteType,
    RouteVia,
};

use super::{InterfaceAddress, Link, LinkKind, NetlinkError, Route};

pub(super) fn link(message: &LinkMessage) -> Link {
    let mut name = String::new();
    let (mut mtu_bytes, mut controller, mut info) = (0, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name.clone_from(value),
            LinkAttribute::Mtu(value) => mtu_bytes = *value,
            LinkAttribute::Controller(index) => controller = Some(*index).filter(|it| *it != 0),
            LinkAttribute::LinkInfo(all) => {
                info = all.iter().find_map(|part| match part {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Link {
        index: message.header.index,
        name,
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        mtu_bytes,
        kind: kind(info, message),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        controller,
    }
}

fn kind(info: Option<&InfoKind>, message: &LinkMessage) -> LinkKind {
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    match info {
        Some(InfoKind::Bridge) => LinkKind::Bridge,
        Some(InfoKind::Veth | InfoKind::Netkit) => LinkKind::Veth,
        Some(InfoKind::Tun) if ethernet => LinkKind::Tap,
        Some(
            InfoKind::Tun
            | InfoKind::Wireguard
            | InfoKind::IpIp
            | InfoKind::Ip6Tnl
            | InfoKind::SitTun
            | InfoKind::GreTun
            | InfoKind::GreTun6
            | InfoKind::GreTap
            | InfoKind::GreTap6
            | InfoKind::ErSpan
            | InfoKind::Ip6ErSpan
            | InfoKind::Vti
            | InfoKind::Vti6
            | InfoKind::Xfrm
            | InfoKind::Vxlan
            | InfoKind::Geneve
            | InfoKind::BareUdp
            | InfoKind::Amt,
        ) => LinkKind::Tunnel,
        // Tunnels that the library has no name for.
        Some(InfoKind::Other(name)) if matches!(name.as_str(), "ovpn" | "l2tpeth" | "lisp") => {
            LinkKind::Tunnel
        }
        _ if message.header.flags.contains(LinkFlags::Pointopoint) && !ethernet => {
            LinkKind::PointToPoint
        }
        _ => LinkKind::Device,
    }
}

pub(super) fn address(message: &AddressMessage, links: &[Link]) -> Option<InterfaceAddress> {
    let mut local = None;
    let mut remote = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link `Address` is the other end; `Local` is ours.
            AddressAttribute::Local(addr) => local = Some(*addr),
            AddressAttribute::Address(addr) => remote = Some(*addr),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let index = message.header.index;
    let link = links.iter().find(|link| link.index == index)?;
    let addr = IpNet::new(local.or(remote)?, message.header.prefix_len).ok()?;
    Some(InterfaceAddress {
        index,
        name: link.name.clone(),
        up: link.up,
        loopback: link.loopback,
        addr,
        deprecated: flags.contains(AddressFlags::Deprecated),
        tentative: flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
        // For IPv6 the kernel uses the bit of IPv4's "secondary" for a privacy address.
        temporary: addr.addr().is_ipv6() && flags.contains(AddressFlags::Secondary),
    })
}

pub(super) fn skip_duplicate_detection(message: &mut AddressMessage) {
    message.header.flags |= AddressHeaderFlags::Nodad;
}

pub(super) fn route_message(route: &Route) -> Result<RouteMessage, NetlinkError> {
    let mixed = |_| NetlinkError::MixedFamilies { route: Box::new(route.clone()) };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .output_interface(route.index)
        .destination_prefix(route.dst.network(), route.dst.prefix_len())
        .map_err(mixed)?;
    builder = match route.gateway {
        Some(gateway) => builder.gateway(gateway).map_err(mixed)?,
        None if route.dst.addr().is_ipv4() => builder.scope(RouteScope::Link),
        None => builder,
    };
    if let Some(source) = route.pref_src {
        builder = builder.pref_source(source).map_err(mixed)?;
    }
    if let Some(metric) = route.metric {
        builder = builder.priority(metric);
    }
    let metrics: Vec<RouteMetric> =
        [route.mtu_bytes.map(RouteMetric::Mtu), route.advmss_bytes.map(RouteMetric::Advmss)]
            .into_iter()
            .flatten()
            .collect();
    let mut message = builder.build();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    Ok(message)
}

/// A route that leads nowhere, and says so.
pub(super) fn unreachable_message(route: &Route) -> Result<RouteMessage, NetlinkError> {
    let mut message = route_message(route)?;
    message.header.kind = RouteType::Unreachable;
    message.header.scope = RouteScope::Universe;
    // The kernel takes none with it.
    message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
    Ok(message)
}

pub(super) fn routes(message: &RouteMessage) -> Vec<Route> {
    let mut facts = Facts::default();
    facts.read(&message.attributes);
    let table = facts.table.unwrap_or_else(|| u32::from(message.header.table));
    if message.header.kind != RouteType::Unicast || table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return Vec::new();
    }
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return Vec::new(),
    };
    let length = message.header.destination_prefix_length;
    let Ok(dst) = IpNet::new(facts.destination.unwrap_or(unspecified), length) else {
        return Vec::new();
    };
    let route = |index, gateway| Route {
        dst,
        index,
        gateway,
        pref_src: facts.pref_src,
        metric: facts.metric,
        mtu_bytes: facts.mtu_bytes,
        advmss_bytes: facts.advmss_bytes,
    };
    let mut routes: Vec<Route> =
        facts.next_hops.iter().map(|(index, gateway)| route(*index, *gateway)).collect();
    if let Some(index) = facts.index {
        routes.push(route(index, facts.gateway));
    }
    routes
}

#[derive(Default)]
struct Facts {
    destination: Option<IpAddr>,
    index: Option<u32>,
    gateway: Option<IpAddr>,
    pref_src: Option<IpAddr>,
    metric: Option<u32>,
    mtu_bytes: Option<u32>,
    advmss_bytes: Option<u32>,
    table: Option<u32>,
    next_hops: Vec<(u32, Option<IpAddr>)>,
}

impl Facts {
    fn read(&mut self, attributes: &[RouteAttribute]) {
        for attribute in attributes {
            match attribute {
                RouteAttribute::Destination(addr) => self.destination = ip(addr),
                RouteAttribute::Oif(index) => self.index = Some(*index),
                RouteAttribute::Gateway(addr) => self.gateway = ip(addr),
                RouteAttribute::Via(RouteVia::Inet6(addr)) => self.gateway = Some((*addr).into()),
                RouteAttribute::PrefSource(addr) => self.pref_src = ip(addr),
                RouteAttribute::Priority(metric) => self.metric = Some(*metric),
                RouteAttribute::Metrics(metrics) => {
                    for metric in metrics {
                        match metric {
                            RouteMetric::Mtu(bytes) => self.mtu_bytes = Some(*bytes),
                            RouteMetric::Advmss(bytes) => self.advmss_bytes = Some(*bytes),
                            _ => {}
                        }
                    }
                }
                RouteAttribute::Table(table) => self.table = Some(*table),
                RouteAttribute::MultiPath(hops) => {
                    for hop in hops {
                        let mut inner = Self::default();
                        inner.read(&hop.attributes);
                        self.next_hops.push((hop.interface_index, inner.gateway));
                    }
                }
                _ => {}
            }
        }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(addr) => Some((*addr).into()),
        RouteAddress::Inet6(addr) => Some((*addr).into()),
        _ => None,
    }
}
