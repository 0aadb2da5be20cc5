//! What stands between hosts and the internet: nothing, or a NAT with a LAN behind it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use overlay::lab::nat::{
    Dependence, Flow, Nat, NatBehaviour, NatKind, Outbound, PortAllocation, Protocol, Unsolicited,
};

use crate::link::Line;

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
    homes: u8,
}

impl Edge {
    pub(crate) fn new(kind: NatKind, external: Ipv4Addr, line: Line, seed: u64) -> Self {
        let external = IpAddr::V4(external);
        Self { kind, external, line, nat: Nat::new(kind, external, seed), homes: 0 }
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

    /// The address of one more host here. All LANs use one private range, as homes do.
    pub(crate) fn next_address(&mut self) -> IpAddr {
        self.homes += 1;
        match self.kind {
            NatKind::None => self.external,
            _ => IpAddr::V4(Ipv4Addr::new(192, 168, 1, 1 + self.homes)),
        }
    }

    /// Where a datagram from a host here goes; none when the NAT drops it.
    pub(crate) fn outbound(
        &mut self,
        src: SocketAddr,
        dst: SocketAddr,
        now: Instant,
    ) -> Option<Outbound> {
        self.nat.outbound(Flow { protocol: Protocol::Udp, src, dst }, now).ok()
    }

    /// The flow as the host here sees it; none when the NAT drops it.
    pub(crate) fn inbound(
        &mut self,
        src: SocketAddr,
        dst: SocketAddr,
        now: Instant,
    ) -> Option<Flow> {
        self.nat.inbound(Flow { protocol: Protocol::Udp, src, dst }, now).ok()
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

    /// Reboots the NAT.
    pub(crate) fn flush(&mut self) {
        self.nat.flush();
    }
}

/// Linux forgets a flow without an answer after this.
const CLAIM_LIFETIME: Duration = Duration::from_secs(30);

/// Whether an address means something in a LAN only.
pub(crate) fn is_private(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(address) if address.is_private())
}
