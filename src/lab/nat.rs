//! A network address translator as a pure state machine, in the words of RFC 4787.
//!
//! ```text
//!            inside                     NAT                      outside
//!   192.168.1.2:5000  ->  outbound(): mapping, permission  ->  203.0.113.10:5000
//!   192.168.1.2:5000  <-  inbound(): mapping?  filter?     <-  198.51.100.7:7000
//! ```
//!
//! A *mapping* ties an internal endpoint to an external one (RFC 4787 section 4). A *permission* is
//! the memory that the inside has sent to a remote endpoint, which the filter asks for (section 5).
//! Works for UDP, and in the same way for TCP and for ICMP echo, whose identifier stands in for the
//! port. It sees flows, not packets: bytes are the business of [`super::packet`].
//!
//! Not modelled: TCP states, fragments, port overloading and more than one external address.

mod behaviour;
mod table;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

pub use behaviour::{
    Dependence, NatBehaviour, NatKind, PortAllocation, UnknownNatKind, Unsolicited,
};
use table::{MappingKey, Table};

/// The protocols that a NAT understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// UDP.
    Udp,
    /// TCP.
    Tcp,
    /// ICMP echo. The identifier is the port of the side that asks; the other port is 0.
    IcmpEcho,
}

/// Who talks to whom: one packet's direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// The protocol.
    pub protocol: Protocol,
    /// The sender.
    pub src: SocketAddr,
    /// The receiver.
    pub dst: SocketAddr,
}

impl Flow {
    /// The same conversation in the other direction.
    pub fn reversed(self) -> Self {
        Self { protocol: self.protocol, src: self.dst, dst: self.src }
    }
}

/// Where a packet from the inside goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outbound {
    /// Out to the internet.
    Forward(Flow),
    /// Back in, to another inside host that was addressed by its external endpoint.
    Hairpin(Flow),
}

/// Why a NAT dropped a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum NatDrop {
    /// Nobody inside has this external endpoint.
    #[error("no mapping for this external endpoint")]
    NoMapping,
    /// The inside has not sent to this remote endpoint.
    #[error("the filter has no permission for this remote endpoint")]
    Filtered,
    /// Every external port is in use.
    #[error("no free external port")]
    PortsExhausted,
    /// The NAT does not turn packets around.
    #[error("this NAT has no hairpinning")]
    NoHairpinning,
}

/// What a NAT has done so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NatCounters {
    /// Packets sent out.
    pub forwarded: u64,
    /// Packets let in.
    pub admitted: u64,
    /// Packets turned around.
    pub hairpinned: u64,
    /// Mappings made.
    pub mappings_made: u64,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<NatDrop, u64>,
}

/// A NAT, or a plain router, or a stateful firewall.
#[derive(Debug)]
pub struct Nat {
    behaviour: Option<NatBehaviour>,
    table: Table,
    counters: NatCounters,
}

impl Nat {
    /// A NAT of a classical kind with one external address; [`NatKind::None`] passes everything.
    pub fn new(kind: NatKind, external: IpAddr, seed: u64) -> Self {
        Self {
            behaviour: kind.behaviour(),
            table: Table::new(Some(external), seed),
            counters: NatCounters::default(),
        }
    }

    /// A NAT of any behaviour with one external address.
    pub fn with_behaviour(behaviour: NatBehaviour, external: IpAddr, seed: u64) -> Self {
        Self {
            behaviour: Some(behaviour),
            table: Table::new(Some(external), seed),
            counters: NatCounters::default(),
        }
    }

    /// A stateful firewall: it filters like a NAT of this behaviour and changes no address. This
    /// is what stands before IPv6 hosts.
    pub fn firewall(behaviour: NatBehaviour) -> Self {
        Self {
            behaviour: Some(behaviour),
            table: Table::new(None, 0),
            counters: NatCounters::default(),
        }
    }

    /// Translates a packet from the inside.
    ///
    /// # Errors
    /// Why the packet dies here.
    pub fn outbound(&mut self, flow: Flow, now: Instant) -> Result<Outbound, NatDrop> {
        let result = self.translate_outbound(flow, now);
        match result {
            Ok(Outbound::Forward(_)) => self.counters.forwarded += 1,
            Ok(Outbound::Hairpin(_)) => self.counters.hairpinned += 1,
            Err(reason) => self.count_drop(reason),
        }
        result
    }

    /// Translates a packet from the outside.
    ///
    /// # Errors
    /// Why the packet dies here.
    pub fn inbound(&mut self, flow: Flow, now: Instant) -> Result<Flow, NatDrop> {
        let result = self.admit(flow, now);
        match result {
            Ok(_) => self.counters.admitted += 1,
            Err(reason) => self.count_drop(reason),
        }
        result
    }

    /// Translates the packet quoted in an ICMP error that an inside host sends: `quoted` is a
    /// packet that came in earlier. Neither makes nor refreshes a mapping (RFC 5508 section 4).
    ///
    /// # Errors
    /// When no such packet can have come in.
    pub fn outbound_error(&self, quoted: Flow, now: Instant) -> Result<Flow, NatDrop> {
        let Some(behaviour) = &self.behaviour else {
            return Ok(quoted);
        };
        let answer = quoted.reversed();
        let key = self.key_in_use(behaviour, answer, now).ok_or(NatDrop::NoMapping)?;
        let external = self.table.external(&key, behaviour, now).ok_or(NatDrop::NoMapping)?;
        Ok(Flow { dst: external, ..quoted })
    }

    /// Translates the packet quoted in an ICMP error from the outside: `quoted` is a packet that
    /// went out earlier.
    ///
    /// # Errors
    /// When no such packet can have gone out.
    pub fn inbound_error(&self, quoted: Flow, now: Instant) -> Result<Flow, NatDrop> {
        let Some(behaviour) = &self.behaviour else {
            return Ok(quoted);
        };
        let key = self.table.key_of(quoted.protocol, quoted.src, behaviour, now);
        let internal = key.ok_or(NatDrop::NoMapping)?.internal();
        Ok(Flow { src: internal, ..quoted })
    }

    /// Forgets every mapping and permission, as a reboot does.
    pub fn flush(&mut self) {
        self.table.flush();
    }

    /// Moves to another external address, as a provider's reassignment does; nothing is kept.
    pub fn renumber(&mut self, external: IpAddr) {
        self.table.flush();
        self.table.set_external(external);
    }

    /// How many mappings are alive.
    pub fn mappings(&self, now: Instant) -> usize {
        self.behaviour.as_ref().map_or(0, |behaviour| self.table.count(behaviour, now))
    }

    /// What it has done so far.
    pub fn counters(&self) -> &NatCounters {
        &self.counters
    }

    fn translate_outbound(&mut self, flow: Flow, now: Instant) -> Result<Outbound, NatDrop> {
        let Some(behaviour) = self.behaviour.clone() else {
            return Ok(Outbound::Forward(flow));
        };
        let to_ourselves = self.table.is_external(flow.dst.ip());
        if to_ourselves && !behaviour.hairpinning {
            return Err(NatDrop::NoHairpinning);
        }
        let key = self.key_for(&behaviour, flow, now);
        let external = if let Some(external) = self.table.external(&key, &behaviour, now) {
            external
        } else {
            self.counters.mappings_made += 1;
            self.table.create(&key, flow.dst, &behaviour, now)?
        };
        self.table.refresh_outbound(&key, flow.dst, &behaviour, now);
        let sent = Flow { src: external, ..flow };
        if !to_ourselves {
            return Ok(Outbound::Forward(sent));
        }
        // RFC 4787 REQ-9: the inside host sees the external endpoint of its neighbour.
        self.admit(sent, now).map(Outbound::Hairpin)
    }

    fn admit(&mut self, flow: Flow, now: Instant) -> Result<Flow, NatDrop> {
        let Some(behaviour) = self.behaviour.clone() else {
            return Ok(flow);
        };
        let key = self.table.key_of(flow.protocol, flow.dst, &behaviour, now);
        let permitted = |key: &MappingKey| self.table.permits(key, flow.src, &behaviour, now);
        let reason = match key {
            None => NatDrop::NoMapping,
            Some(key) if !permitted(&key) => NatDrop::Filtered,
            Some(key) => {
                if behaviour.inbound_refresh {
                    self.table.refresh_inbound(&key, flow.src, now);
                }
                return Ok(Flow { dst: key.internal(), ..flow });
            }
        };
        if let Unsolicited::Claims { timeout } = behaviour.unsolicited {
            self.table.claim(flow, now + timeout, now);
        }
        Err(reason)
    }

    /// The mapping that `flow` uses or would make.
    fn key_for(&self, behaviour: &NatBehaviour, flow: Flow, now: Instant) -> MappingKey {
        if let Some(key) = self.key_in_use(behaviour, flow, now) {
            let external = self.table.external(&key, behaviour, now);
            if !external.is_some_and(|external| self.table.is_claimed(flow, external, now)) {
                return key;
            }
        } else {
            let wanted = self.table.preserved(flow.src);
            let preserving = behaviour.port_allocation == PortAllocation::Preserving;
            if !preserving || !self.table.is_claimed(flow, wanted, now) {
                return MappingKey::new(behaviour.mapping, flow);
            }
        }
        // A stranger holds the external endpoint for this remote: the flow gets one of its own.
        MappingKey::new(Dependence::AddressAndPort, flow)
    }

    fn key_in_use(&self, behaviour: &NatBehaviour, flow: Flow, now: Instant) -> Option<MappingKey> {
        [Dependence::AddressAndPort, behaviour.mapping]
            .map(|dependence| MappingKey::new(dependence, flow))
            .into_iter()
            .find(|key| self.table.external(key, behaviour, now).is_some())
    }

    fn count_drop(&mut self, reason: NatDrop) {
        *self.counters.drops.entry(reason).or_default() += 1;
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
