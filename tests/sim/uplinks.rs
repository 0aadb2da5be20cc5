//! The network interfaces of a host: `e0`, which every host has, and perhaps `e1`, which leads into
//! another home with a line and a NAT of its own. Each has a default route or has none; `e0` is
//! preferred.
//!
//! As on Linux: the main socket leaves by the preferred route, whatever address it sends from; a socket
//! that is bound to an interface leaves by that one only; what is for a LAN goes there.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use overlay::io::link::{GIVEN_UP_AFTER, TCP_USER_TIMEOUT};
use overlay::server::ConnectionId;
use overlay::types::{SocketId, Uplink};

use crate::host::Host;
use crate::link::Line;
use crate::routing::Parcel;
use crate::server::Frame;
use crate::spot::Spot;
use crate::world::World;

/// Of a host, by number.
const DEVICES: [&str; 2] = ["e0", "e1"];

/// The way of a control connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Way {
    /// The number of the interface.
    pub(crate) interface: usize,
    /// Bound to it, rather than sent where the routes say.
    pub(crate) bound: bool,
}

/// What a host has beside its first interface.
#[derive(Debug, Clone)]
pub(crate) struct Uplinks {
    /// The edge behind the second interface, and the address there.
    second: Option<(usize, IpAddr)>,
    /// Which interfaces have a default route.
    pub(crate) routes: [bool; 2],
    /// The first interface has no address at this moment.
    away: bool,
    /// The interface that the default route in use led to at the last look.
    pub(crate) last_gateway: Option<usize>,
}

impl Default for Uplinks {
    fn default() -> Self {
        Self { second: None, routes: [true, true], away: false, last_gateway: Some(0) }
    }
}

impl Host {
    /// Whether there is more than one interface.
    pub(crate) fn has_second(&self) -> bool {
        self.uplinks.second.is_some()
    }

    /// The numbers of the interfaces that have an address.
    fn interfaces(&self) -> impl Iterator<Item = usize> + use<> {
        let first = usize::from(self.uplinks.away);
        first..1 + usize::from(self.has_second())
    }

    /// The edge behind an interface.
    pub(crate) fn edge_of(&self, interface: usize) -> usize {
        self.uplinks.second.filter(|_| interface == 1).map_or(self.edge, |(edge, _)| edge)
    }

    /// The IPv4 address of an interface.
    pub(crate) fn address_of(&self, interface: usize) -> IpAddr {
        let second = self.uplinks.second.filter(|_| interface == 1);
        second.map_or(self.endpoint.ip(), |(_, address)| address)
    }

    /// The interface of the default route in use.
    pub(crate) fn gateway(&self) -> Option<usize> {
        self.interfaces().find(|interface| self.uplinks.routes[*interface])
    }

    /// Whether one of the interfaces is in the LAN of this edge.
    pub(crate) fn is_behind(&self, edge: usize) -> bool {
        self.interfaces().any(|interface| self.edge_of(interface) == edge)
    }

    /// The interfaces that lead to the internet, if that is lit, and whether the main socket goes there.
    pub(crate) fn leads_out(&self) -> impl Iterator<Item = (usize, bool)> + use<'_> {
        let gateway = self.gateway();
        let routed = self.interfaces().filter(|interface| self.uplinks.routes[*interface]);
        routed.map(move |interface| (interface, gateway == Some(interface)))
    }

    /// The interface by which this socket sends to there; none when it has no way.
    pub(crate) fn interface_towards(&self, socket: SocketId, remote: SocketAddr) -> Option<usize> {
        let bound = self.lines.get(&socket).copied();
        if remote.is_ipv6() {
            let first = !self.uplinks.away && self.uplinks.routes[0];
            return first.then_some(0);
        }
        let near = |interface: &usize| same_lan(self.address_of(*interface), remote.ip());
        match bound {
            Some(interface) => {
                (near(&interface) || self.uplinks.routes[interface]).then_some(interface)
            }
            None => self.interfaces().find(near).or_else(|| self.gateway()),
        }
    }

    /// The default routes as the daemon sees them, the preferred one first.
    pub(crate) fn known_uplinks(&self) -> Vec<Uplink> {
        let uplink = |(interface, _): (usize, bool)| Uplink {
            device: DEVICES[interface].into(),
            index: 1 + interface as u32,
            ipv6: false,
        };
        self.leads_out().map(uplink).collect()
    }

    /// The endpoints that are worth announcing.
    pub(crate) fn endpoints(&self) -> Vec<SocketAddr> {
        let port = self.endpoint.port();
        let of = |interface: usize| SocketAddr::new(self.address_of(interface), port);
        let ipv6 = self.ipv6.filter(|_| !self.uplinks.away);
        self.interfaces().map(of).chain(ipv6).collect()
    }

    /// Looks at the interfaces, as the daemon does when the kernel says that something has changed.
    /// Tells whether the default route in use is another one.
    fn look(&mut self, now: Instant) -> bool {
        let (uplinks, endpoints) = (self.known_uplinks(), self.endpoints());
        let gateway = self.gateway();
        let rerouted = std::mem::replace(&mut self.uplinks.last_gateway, gateway) != gateway;
        if let Some(node) = self.node_mut() {
            node.handle_uplinks(uplinks, now);
            let known = node.host_endpoints().to_vec();
            node.handle_host_endpoints(endpoints, now);
            let told = known.iter().any(|endpoint| !node.host_endpoints().contains(endpoint));
            if rerouted && !told {
                node.handle_network_change(now);
            }
        }
        rerouted
    }

    /// The first interface has another address, and had none for a moment.
    pub(crate) fn readdress(&mut self, edge: usize, endpoint: SocketAddr, now: Instant) {
        self.uplinks.away = true;
        self.look(now);
        (self.edge, self.endpoint) = (edge, endpoint);
        self.uplinks.away = false;
        self.look(now);
    }
}

/// The number of an interface.
pub(crate) fn interface_number(device: &str) -> usize {
    DEVICES.iter().position(|it| *it == device).expect("a host has no other interfaces")
}

/// All LANs are of this size.
fn same_lan(a: IpAddr, b: IpAddr) -> bool {
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => a.is_private() && a.octets()[..3] == b.octets()[..3],
        _ => false,
    }
}

impl World {
    /// Gives a host that is switched off a second interface, behind an edge of its own.
    pub(crate) fn add_second(&mut self, host: usize, spot: Spot, line: Line) {
        let edge = self.add_spot(spot, line);
        self.edges[edge].subnet = 2;
        let address = self.edges[edge].next_address();
        self.hosts[host].uplinks.second = Some((edge, address));
    }

    /// Whether packets of a host get to the internet by this interface.
    pub(crate) fn leads_out(&self, host: usize, interface: usize) -> bool {
        let host = &self.hosts[host];
        host.leads_out().any(|(it, _)| it == interface) && !self.edges[host.edge_of(interface)].dark
    }

    /// Whether there is any way from a host to the internet.
    pub(crate) fn has_way_out(&self, host: usize) -> bool {
        [0, 1].into_iter().any(|interface| self.leads_out(host, interface))
    }

    /// The internet behind an interface is dead, while its link and its route stay; or works again.
    pub(crate) fn set_dark(&mut self, host: usize, interface: usize, dark: bool) {
        let edge = self.hosts[host].edge_of(interface);
        if std::mem::replace(&mut self.edges[edge].dark, dark) != dark {
            self.healed = true;
            self.note_ways();
        }
    }

    /// Adds or takes away the default route of an interface; the kernel says so.
    pub(crate) fn set_route(&mut self, host: usize, interface: usize, there: bool) {
        self.wake(host);
        let now = self.now;
        if !self.hosts[host].has_second() || self.hosts[host].uplinks.routes[interface] == there {
            return;
        }
        self.hosts[host].uplinks.routes[interface] = there;
        self.healed = true;
        if self.hosts[host].gateway() != Some(0) {
            // Another router.
            self.hosts[host].handle_mapped(None, now);
        }
        let rerouted = self.hosts[host].look(now);
        self.hosts[host].refresh();
        self.check_link(host, rerouted);
        self.settle(host);
        if rerouted && self.hosts[host].gateway() == Some(0) && self.hosts[host].forwarded {
            self.forward_port(host);
        }
        self.note_ways();
    }

    /// A control connection by a way that is gone is made anew at once.
    pub(super) fn check_link(&mut self, host: usize, rerouted: bool) {
        let link = &self.hosts[host].control_link;
        let gateway = self.hosts[host].gateway();
        let useless = match link.connection().map(|connection| link.way(connection)) {
            None => true,
            Some(way) if way.bound => !self.hosts[host].uplinks.routes[way.interface],
            Some(_) => rerouted,
        };
        let elsewhere = link.connection().is_none_or(|connection| {
            gateway.is_some_and(|gateway| gateway != link.way(connection).interface)
        });
        if useless && elsewhere && self.hosts[host].node().is_some() {
            let was_up = self.hosts[host].control_link.connection().is_some();
            self.leave_link(host);
            let now = self.now;
            self.hosts[host].control_link.start(now);
            if was_up {
                self.hosts[host].handle_link_down(now);
            }
        }
    }

    /// The core goes by another uplink: so does the control connection, as soon as there is one by it.
    pub(super) fn improve_link(&mut self, host: usize, by: Option<&Uplink>) {
        let interface = by.map(|uplink| interface_number(&uplink.device));
        let link = &mut self.hosts[host].control_link;
        link.favoured = interface;
        let Some(connection) = link.connection() else { return };
        let way = link.way(connection);
        if way.bound.then_some(way.interface) == interface {
            return;
        }
        let wanted = match interface {
            Some(interface) => Some(Way { interface, bound: true }),
            None => {
                let gateway = self.hosts[host].gateway();
                gateway.map(|interface| Way { interface, bound: false })
            }
        };
        if let Some(way) = wanted {
            let attempt = self.hosts[host].control_link.improve();
            self.knock(host, attempt, way, Duration::ZERO);
        }
    }

    /// Ways have opened or closed: TCP sends again what is still of use, and gives up in time.
    fn note_ways(&mut self) {
        for parcel in std::mem::take(&mut self.stalled) {
            let (Parcel::Up { host, connection, .. } | Parcel::Down { host, connection, .. }) =
                parcel
            else {
                continue;
            };
            // The kernel forgets what was for a connection that is closed.
            if self.hosts[host].control_link.connection() == Some(connection) {
                self.deliver(parcel);
            }
        }
        for host in 0..self.hosts.len() {
            let link = &self.hosts[host].control_link;
            let connection = link.connection().filter(|it| {
                let interface = link.way(*it).interface;
                !self.leads_out(host, interface)
            });
            if let Some(connection) = connection {
                let at = self.now + GIVEN_UP_AFTER;
                self.launch(at, Parcel::GivenUp { host, connection });
            }
        }
    }

    /// Whether a frame gets through now; one that does not is sent again when the way is open, but for
    /// data, which has a place in the queue for a short while only.
    pub(super) fn gets_through(&mut self, parcel: Parcel) -> Option<Parcel> {
        let (Parcel::Up { host, connection, ref frame }
        | Parcel::Down { host, connection, ref frame }) = parcel
        else {
            return Some(parcel);
        };
        let way = self.hosts[host].control_link.way(connection);
        if self.leads_out(host, way.interface) {
            return Some(parcel);
        }
        if *frame == Frame::Closed {
            let at = self.now + GIVEN_UP_AFTER;
            self.launch(at, Parcel::GivenUp { host, connection });
        }
        if matches!(parcel, Parcel::Up { .. }) {
            self.launch(self.now + TCP_USER_TIMEOUT, Parcel::Unheard { host, connection });
        }
        if !matches!(
            parcel,
            Parcel::Up { frame: Frame::Relay(_), .. } | Parcel::Down { frame: Frame::Relay(_), .. }
        ) {
            self.stalled.push(parcel);
        }
        None
    }

    /// Nobody has acknowledged what a host has sent on its connection.
    pub(super) fn give_up(&mut self, host: usize, connection: ConnectionId) {
        let link = &self.hosts[host].control_link;
        let current = link.connection() == Some(connection);
        if current && !self.is_connected(host) {
            let now = self.now;
            self.note(&format!("host {host}: nobody acknowledges"));
            self.hosts[host].control_link.retry(now);
            self.hosts[host].handle_link_down(now);
            self.settle(host);
        }
    }
}
