//! The memory of a NAT: mappings, permissions, claims, and the ports they use.
//!
//! Decides nothing about packets. An entry that has timed out counts as absent everywhere and is
//! removed when its place is needed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::behaviour::{Dependence, NatBehaviour, PortAllocation};
use super::{Flow, NatDrop, Protocol};

/// What makes two flows share a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct MappingKey {
    protocol: Protocol,
    internal: SocketAddr,
    remote_addr: Option<IpAddr>,
    remote_port: Option<u16>,
}

impl MappingKey {
    /// The key of an outbound flow.
    pub(super) fn new(dependence: Dependence, flow: Flow) -> Self {
        let (remote_addr, remote_port) = match dependence {
            Dependence::EndpointIndependent => (None, None),
            Dependence::Address => (Some(flow.dst.ip()), None),
            Dependence::AddressAndPort => (Some(flow.dst.ip()), Some(flow.dst.port())),
        };
        Self { protocol: flow.protocol, internal: flow.src, remote_addr, remote_port }
    }

    pub(super) fn internal(&self) -> SocketAddr {
        self.internal
    }
}

#[derive(Debug)]
struct Mapping {
    external: SocketAddr,
    used_at: Instant,
    permissions: BTreeMap<SocketAddr, Instant>,
}

/// A claim: who sent unsolicited packets, and to which external endpoint.
type ClaimKey = (Protocol, SocketAddr, SocketAddr);

#[derive(Debug)]
pub(super) struct Table {
    external: Option<IpAddr>,
    mappings: BTreeMap<MappingKey, Mapping>,
    keys_by_external: BTreeMap<(Protocol, SocketAddr), MappingKey>,
    claims: BTreeMap<ClaimKey, Instant>,
    next_port: u16,
    rng: StdRng,
}

impl Table {
    /// A table without an external address keeps every endpoint as it is.
    pub(super) fn new(external: Option<IpAddr>, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        Self {
            external,
            mappings: BTreeMap::new(),
            keys_by_external: BTreeMap::new(),
            claims: BTreeMap::new(),
            next_port: rng.random_range(FIRST_PORT..=u16::MAX),
            rng,
        }
    }

    pub(super) fn is_external(&self, address: IpAddr) -> bool {
        self.external == Some(address)
    }

    pub(super) fn set_external(&mut self, external: IpAddr) {
        self.external = Some(external);
    }

    /// The external endpoint that keeps the internal port.
    pub(super) fn preserved(&self, internal: SocketAddr) -> SocketAddr {
        self.external.map_or(internal, |address| SocketAddr::new(address, internal.port()))
    }

    /// The external endpoint of a live mapping.
    pub(super) fn external(
        &self,
        key: &MappingKey,
        behaviour: &NatBehaviour,
        now: Instant,
    ) -> Option<SocketAddr> {
        let mapping = self.mappings.get(key)?;
        mapping.is_live(key, behaviour, now).then_some(mapping.external)
    }

    /// The live mapping that has an external endpoint.
    pub(super) fn key_of(
        &self,
        protocol: Protocol,
        external: SocketAddr,
        behaviour: &NatBehaviour,
        now: Instant,
    ) -> Option<MappingKey> {
        let key = self.keys_by_external.get(&(protocol, external))?;
        self.external(key, behaviour, now).map(|_| *key)
    }

    /// Makes the mapping of a flow to `remote`.
    pub(super) fn create(
        &mut self,
        key: &MappingKey,
        remote: SocketAddr,
        behaviour: &NatBehaviour,
        now: Instant,
    ) -> Result<SocketAddr, NatDrop> {
        self.remove(key);
        let external = self.allocate(key, remote, behaviour, now).ok_or(NatDrop::PortsExhausted)?;
        self.keys_by_external.insert((key.protocol, external), *key);
        let mapping = Mapping { external, used_at: now, permissions: BTreeMap::new() };
        self.mappings.insert(*key, mapping);
        Ok(external)
    }

    /// Keeps a mapping alive and permits `remote` to answer.
    pub(super) fn refresh_outbound(
        &mut self,
        key: &MappingKey,
        remote: SocketAddr,
        behaviour: &NatBehaviour,
        now: Instant,
    ) {
        let Some(mapping) = self.mappings.get_mut(key) else {
            return;
        };
        mapping.used_at = now;
        if mapping.permissions.len() >= PERMISSIONS_BEFORE_SWEEP {
            let timeout = behaviour.timeout(key.protocol);
            mapping.permissions.retain(|_, at| now.saturating_duration_since(*at) < timeout);
        }
        mapping.permissions.insert(remote, now);
    }

    /// Keeps a mapping, and the permission of `remote` if it has one, alive.
    pub(super) fn refresh_inbound(&mut self, key: &MappingKey, remote: SocketAddr, now: Instant) {
        let Some(mapping) = self.mappings.get_mut(key) else {
            return;
        };
        mapping.used_at = now;
        if let Some(at) = mapping.permissions.get_mut(&remote) {
            *at = now;
        }
    }

    /// Whether the filter lets `remote` in.
    pub(super) fn permits(
        &self,
        key: &MappingKey,
        remote: SocketAddr,
        behaviour: &NatBehaviour,
        now: Instant,
    ) -> bool {
        let Some(mapping) = self.mappings.get(key) else {
            return false;
        };
        let timeout = behaviour.timeout(key.protocol);
        let is_live = |at: &Instant| now.saturating_duration_since(*at) < timeout;
        match behaviour.filtering {
            Dependence::EndpointIndependent => true,
            Dependence::Address => {
                let from = SocketAddr::new(remote.ip(), 0);
                let to = SocketAddr::new(remote.ip(), u16::MAX);
                mapping.permissions.range(from..=to).any(|(_, at)| is_live(at))
            }
            Dependence::AddressAndPort => mapping.permissions.get(&remote).is_some_and(is_live),
        }
    }

    /// Remembers an unsolicited packet until `until`.
    pub(super) fn claim(&mut self, flow: Flow, until: Instant, now: Instant) {
        if self.claims.len() >= CLAIMS {
            self.claims.retain(|_, until| *until > now);
        }
        if self.claims.len() < CLAIMS {
            self.claims.insert((flow.protocol, flow.dst, flow.src), until);
        }
    }

    /// Whether the receiver of outbound `flow` holds `external` by a claim.
    pub(super) fn is_claimed(&self, flow: Flow, external: SocketAddr, now: Instant) -> bool {
        self.claims.get(&(flow.protocol, external, flow.dst)).is_some_and(|until| *until > now)
    }

    pub(super) fn flush(&mut self) {
        self.mappings.clear();
        self.keys_by_external.clear();
        self.claims.clear();
    }

    pub(super) fn count(&self, behaviour: &NatBehaviour, now: Instant) -> usize {
        self.mappings.iter().filter(|(key, mapping)| mapping.is_live(key, behaviour, now)).count()
    }

    fn remove(&mut self, key: &MappingKey) {
        if let Some(mapping) = self.mappings.remove(key) {
            self.keys_by_external.remove(&(key.protocol, mapping.external));
        }
    }

    fn allocate(
        &mut self,
        key: &MappingKey,
        remote: SocketAddr,
        behaviour: &NatBehaviour,
        now: Instant,
    ) -> Option<SocketAddr> {
        let Some(address) = self.external else {
            return Some(key.internal);
        };
        let preserved = SocketAddr::new(address, key.internal.port());
        if behaviour.port_allocation == PortAllocation::Preserving
            && self.take(key, preserved, remote, behaviour, now)
        {
            return Some(preserved);
        }
        let start = match behaviour.port_allocation {
            PortAllocation::Sequential => self.next_port,
            PortAllocation::Preserving | PortAllocation::Random => {
                self.rng.random_range(FIRST_PORT..=u16::MAX)
            }
        };
        let ports = (start..=u16::MAX).chain(FIRST_PORT..start);
        for port in ports {
            let external = SocketAddr::new(address, port);
            if self.take(key, external, remote, behaviour, now) {
                self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
                return Some(external);
            }
        }
        None
    }

    /// Whether a mapping may have this endpoint; a timed-out one makes room.
    fn take(
        &mut self,
        key: &MappingKey,
        external: SocketAddr,
        remote: SocketAddr,
        behaviour: &NatBehaviour,
        now: Instant,
    ) -> bool {
        let flow = Flow { protocol: key.protocol, src: key.internal, dst: remote };
        if self.is_claimed(flow, external, now) {
            return false;
        }
        let Some(holder) = self.keys_by_external.get(&(key.protocol, external)).copied() else {
            return true;
        };
        if self.external(&holder, behaviour, now).is_some() {
            return false;
        }
        self.remove(&holder);
        true
    }
}

impl Mapping {
    fn is_live(&self, key: &MappingKey, behaviour: &NatBehaviour, now: Instant) -> bool {
        now.saturating_duration_since(self.used_at) < behaviour.timeout(key.protocol)
    }
}

/// Ports below are never given to a mapping that did not ask for them (RFC 4787 section 4.2.2).
const FIRST_PORT: u16 = 1024;

/// Enough for a port scan through the NAT; timed-out permissions are swept from here on.
const PERMISSIONS_BEFORE_SWEEP: usize = 4096;

/// Bounds the memory that strangers can take.
const CLAIMS: usize = 65_536;
