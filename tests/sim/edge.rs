//! What stands between hosts and the internet: nothing, or a NAT or two with a LAN behind them, and
//! for IPv6 a firewall.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use overlay::lab::nat::{
    Dependence, Flow, Nat, NatBehaviour, NatKind, Outbound, PortAllocation, Protocol, Unsolicited,
};

use crate::link::Line;
use crate::spot::{Ipv6, Spot};

/// One place where hosts meet the internet.
#[derive(Debug)]
pub(crate) struct Edge {
    /// What kind of NAT; none means that its one host has a public address.
    pub(crate) kind: NatKind,
    /// The public address.
    pub(crate) external: IpAddr,
    /// The line to the internet.
    pub(crate) line: Line,
    nat: Nat,
    /// A provider's NAT behind the one at home.
    outer: Option<Nat>,
    /// The IPv6 prefix of the LAN, and what filters there.
    v6: Option<(Ipv6Addr, Nat)>,
    /// Ports that the router forwards.
    forwards: BTreeMap<u16, SocketAddr>,
    /// By inside and remote endpoint: conversations that began at a forwarded port.
    forwarded: BTreeMap<(SocketAddr, SocketAddr), (u16, Instant)>,
    homes: u8,
    /// The third number of the addresses in the LAN.
    pub(crate) subnet: u8,
    /// Nothing gets through to the internet or from there.
    pub(crate) dark: bool,
}

impl Edge {
    pub(crate) fn new(kind: NatKind, external: Ipv4Addr, line: Line, seed: u64) -> Self {
        let external = IpAddr::V4(external);
        Self {
            kind,
            external,
            line,
            nat: Nat::new(kind, external, seed),
            outer: None,
            v6: None,
            forwards: BTreeMap::new(),
            forwarded: BTreeMap::new(),
            homes: 0,
            subnet: 1,
            dark: false,
        }
    }

    /// Everything that a spot can have; `number` makes its addresses differ from all others.
    pub(crate) fn at(spot: Spot, number: u8, line: Line, seed: u64) -> Self {
        let mut edge = Self::new(spot.kind, Ipv4Addr::new(198, 51, 100, number), line, seed);
        let nat = |kind: NatKind, external: IpAddr, seed: u64| match kind.behaviour() {
            Some(behaviour) => {
                let mapping_timeout = spot.expiry;
                let behaviour = NatBehaviour { mapping_timeout, ..behaviour };
                Nat::with_behaviour(behaviour, external, seed)
            }
            None => Nat::new(kind, external, seed),
        };
        let (inner, outer) = (spot.kind, spot.outer.filter(|_| spot.kind != NatKind::None));
        edge.nat = nat(inner, edge.external, seed);
        if let Some(outer) = outer {
            // RFC 6598: the space between the two.
            edge.nat = nat(inner, IpAddr::V4(Ipv4Addr::new(100, 64, 0, number)), seed);
            edge.outer = Some(nat(outer, edge.external, !seed));
            // The kinds are in order: two in a row map and filter as the more closed one does.
            edge.kind = inner.max(outer);
        }
        let firewall = match spot.ipv6 {
            Ipv6::Absent => None,
            Ipv6::Open => Some(Nat::new(NatKind::None, edge.external, seed)),
            Ipv6::Firewall => Some(Nat::firewall(NatBehaviour {
                mapping_timeout: spot.expiry,
                ..NatBehaviour::default()
            })),
        };
        let prefix = Ipv6Addr::new(0x2001, 0xdb8, u16::from(number), 0, 0, 0, 0, 0);
        edge.v6 = firewall.map(|firewall| (prefix, firewall));
        edge
    }

    /// The IPv6 address of the host that got its address last; none where there is no IPv6.
    pub(crate) fn last_ipv6(&self) -> Option<IpAddr> {
        let (prefix, _) = self.v6.as_ref()?;
        Some(Ipv6Addr::from(u128::from(*prefix) + u128::from(self.homes) + 1).into())
    }

    /// Whether this address is reached by way of this edge.
    pub(crate) fn owns(&self, address: IpAddr) -> bool {
        self.external == address || self.owns_ipv6(address)
    }

    /// Whether this address is in the LAN here.
    pub(crate) fn owns_ipv6(&self, address: IpAddr) -> bool {
        let (IpAddr::V6(address), Some((prefix, _))) = (address, &self.v6) else { return false };
        address.segments()[..4] == prefix.segments()[..4]
    }

    /// Has the router forward a port to a host here; none when the router has no public address.
    pub(crate) fn forward(&mut self, to: SocketAddr) -> Option<SocketAddr> {
        if self.outer.is_some() || self.kind == NatKind::None {
            return None;
        }
        // Below all ports that a NAT gives out.
        let port = FIRST_FORWARDED + self.forwards.len() as u16;
        self.forwards.insert(port, to);
        Some(SocketAddr::new(self.external, port))
    }

    /// A port-restricted NAT whose own input is open: what a stranger sends stays in its memory.
    pub(crate) fn open_input(&mut self, seed: u64) {
        let unsolicited = Unsolicited::Claims { timeout: CLAIM_LIFETIME };
        let behaviour = NatBehaviour { unsolicited, ..NatBehaviour::default() };
        self.nat = Nat::with_behaviour(behaviour, self.external, seed);
    }

    /// A symmetric NAT that hands out its ports in order.
    pub(crate) fn sequential(&mut self, seed: u64) {
        let mapping = Dependence::AddressAndPort;
        let port_allocation = PortAllocation::Sequential;
        let behaviour = NatBehaviour { mapping, port_allocation, ..NatBehaviour::default() };
        self.kind = NatKind::Symmetric;
        self.nat = Nat::with_behaviour(behaviour, self.external, seed);
    }

    /// The address of one more host here. LANs use one private range, as homes do, but for those of second
    /// uplinks.
    pub(crate) fn next_address(&mut self) -> IpAddr {
        self.homes += 1;
        match self.kind {
            NatKind::None => self.external,
            _ => IpAddr::V4(Ipv4Addr::new(192, 168, self.subnet, 1 + self.homes)),
        }
    }

    /// Where a datagram from a host here goes; none when the NAT drops it.
    pub(crate) fn outbound(
        &mut self,
        src: SocketAddr,
        dst: SocketAddr,
        now: Instant,
    ) -> Option<Outbound> {
        let flow = Flow { protocol: Protocol::Udp, src, dst };
        if self.kind == NatKind::None && src.is_ipv4() && src.ip() != self.external {
            // RFC 2827: a provider lets no foreign source out.
            return None;
        }
        if let (IpAddr::V6(_), Some((_, firewall))) = (dst.ip(), &mut self.v6) {
            return firewall.outbound(flow, now).ok();
        }
        if let Some((port, at)) = self.forwarded.get_mut(&(src, dst))
            && now.saturating_duration_since(*at) < FORWARDED_LIFETIME
        {
            *at = now;
            let src = SocketAddr::new(self.external, *port);
            return Some(Outbound::Forward(Flow { src, ..flow }));
        }
        match (self.nat.outbound(flow, now).ok()?, &mut self.outer) {
            (Outbound::Forward(flow), Some(outer)) => outer.outbound(flow, now).ok(),
            (outbound, _) => Some(outbound),
        }
    }

    /// The flow as the host here sees it; none when the NAT drops it.
    pub(crate) fn inbound(
        &mut self,
        src: SocketAddr,
        dst: SocketAddr,
        now: Instant,
    ) -> Option<Flow> {
        let flow = Flow { protocol: Protocol::Udp, src, dst };
        if let (IpAddr::V6(_), Some((_, firewall))) = (dst.ip(), &mut self.v6) {
            return firewall.inbound(flow, now).ok();
        }
        if let Some(to) = self.forwards.get(&dst.port()) {
            self.forwarded.insert((*to, src), (dst.port(), now));
            return Some(Flow { dst: *to, ..flow });
        }
        let flow = match &mut self.outer {
            Some(outer) => outer.inbound(flow, now).ok()?,
            None => flow,
        };
        self.nat.inbound(flow, now).ok()
    }

    /// Datagrams that it has sent out so far.
    pub(crate) fn forwarded(&self) -> u64 {
        self.nat.counters().forwarded
    }

    /// External ports in use.
    pub(crate) fn mappings(&self, now: Instant) -> usize {
        self.nat.mappings(now)
    }

    /// A stranger's datagram got here before anything left: spoils the pair of endpoints.
    pub(crate) fn spoil(&mut self, stranger: SocketAddr, port: u16, now: Instant) {
        let dst = SocketAddr::new(self.external, port);
        let spoiled = self.inbound(stranger, dst, now);
        assert_eq!(spoiled, None, "nobody here takes it");
    }

    /// Reboots the NATs and the firewall.
    pub(crate) fn flush(&mut self) {
        self.nat.flush();
        self.forwarded.clear();
        for nat in self.outer.iter_mut().chain(self.v6.as_mut().map(|(_, firewall)| firewall)) {
            nat.flush();
        }
    }
}

/// The first forwarded port of an edge.
const FIRST_FORWARDED: u16 = 600;

/// As a NAT that keeps to RFC 4787 REQ-5.
const FORWARDED_LIFETIME: Duration = Duration::from_secs(120);

/// Linux forgets a flow without an answer after this.
const CLAIM_LIFETIME: Duration = Duration::from_secs(30);

/// Whether an address means something in a LAN only.
pub(crate) fn is_private(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(address) if address.is_private())
}
