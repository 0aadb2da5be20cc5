//! One node's access rules, ready to be asked about packets.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::flows::{FlowKey, Flows, Followed};
use super::packet::{Packet, Quoted, Transport};
use crate::types::NodeId;
use crate::wire::filter::{KIND_ANY, KIND_ICMP, KIND_TCP, KIND_UDP, WireFilter, WireRule};

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It comes in.
    Allow,
    /// It does not, and its sender may be told.
    Refuse,
    /// It does not, and nobody is told: it is a fragment, an ICMP error, or broken.
    Drop,
}

/// One node's access rules.
///
/// Nodes that the same rules speak of are one class, and the ports of a class are merged runs: a
/// verdict costs two binary searches, however many rules there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// From which node number on which class holds; the first one starts at 0.
    runs: Vec<(u32, usize)>,
    classes: Vec<Class>,
}

/// What some nodes may send.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Class {
    any: bool,
    icmp: bool,
    tcp: Ports,
    udp: Ports,
}

/// Runs of ports, first and last, in their order, with gaps between them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Ports(Vec<(u16, u16)>);

impl Ports {
    fn merged(mut runs: Vec<(u16, u16)>) -> Self {
        runs.retain(|(first, last)| first <= last);
        runs.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(runs.len());
        for (first, last) in runs {
            match merged.last_mut() {
                Some(before) if u32::from(first) <= u32::from(before.1) + 1 => {
                    before.1 = before.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    fn contain(&self, port: u16) -> bool {
        let behind = self.0.partition_point(|(first, _)| *first <= port);
        behind > 0 && self.0[behind - 1].1 >= port
    }
}

impl Filter {
    /// The filter that a node was sent; none when the network has no rules.
    #[must_use]
    pub fn new(wire: &WireFilter) -> Option<Self> {
        let rules = wire.rules.as_ref()?;
        let mut starts = BTreeSet::from([0]);
        for (first, last) in rules.iter().filter_map(|rule| rule.sources.as_ref()).flatten() {
            starts.insert(*first);
            starts.extend(last.checked_add(1));
        }
        let sources: Vec<Option<Runs>> =
            rules.iter().map(|rule| rule.sources.as_deref().map(merged)).collect();
        let mut known: BTreeMap<Vec<usize>, usize> = BTreeMap::new();
        let mut runs: Vec<(u32, usize)> = Vec::new();
        let mut classes = Vec::new();
        for start in starts {
            let speaking: Vec<usize> =
                (0..rules.len()).filter(|rule| speaks_of(&sources[*rule], start)).collect();
            let class = *known.entry(speaking).or_insert_with_key(|speaking| {
                classes.push(Class::of(speaking.iter().map(|index| &rules[*index])));
                classes.len() - 1
            });
            if runs.last().is_none_or(|(_, before)| *before != class) {
                runs.push((start, class));
            }
        }
        Some(Self { runs, classes })
    }

    fn class(&self, peer: NodeId) -> &Class {
        let behind = self.runs.partition_point(|(start, _)| *start <= peer.number());
        // The first run starts at zero, so there is always one.
        &self.classes[self.runs[behind.saturating_sub(1)].1]
    }

    /// Whether rules let in everything from `peer`.
    #[must_use]
    pub fn admits_everything(&self, peer: NodeId) -> bool {
        self.class(peer).any
    }

    /// Whether rules let in echo requests from `peer`.
    #[must_use]
    pub fn admits_icmp(&self, peer: NodeId) -> bool {
        self.class(peer).admits_icmp()
    }

    /// Whether rules let in TCP from `peer` to `port`.
    #[must_use]
    pub fn admits_tcp(&self, peer: NodeId, port: u16) -> bool {
        self.class(peer).admits_tcp(port)
    }

    /// Whether rules let in UDP from `peer` to `port`.
    #[must_use]
    pub fn admits_udp(&self, peer: NodeId, port: u16) -> bool {
        self.class(peer).admits_udp(port)
    }

    /// Judges a packet that came from `peer`, whose source address is known to be the peer's.
    pub fn inbound(&self, peer: NodeId, bytes: &[u8], flows: &mut Flows, now: Instant) -> Verdict {
        let class = self.class(peer);
        let Ok(packet) = Packet::parse(bytes) else {
            return if class.any { Verdict::Allow } else { Verdict::Drop };
        };
        let allowed = class.allows(&packet, flows, now);
        let in_place = match &packet.fragment {
            _ if class.any => true,
            Some(fragment) if packet.transport == Transport::Later => {
                flows.fragments.later(&packet, fragment, now)
            }
            Some(fragment) if allowed => flows.fragments.first(&packet, fragment, now),
            Some(_) | None => true,
        };
        let is_error = matches!(packet.transport, Transport::IcmpError { .. });
        match (allowed && in_place, packet.fragment.is_some() || is_error) {
            (true, _) => Verdict::Allow,
            (false, true) => Verdict::Drop,
            (false, false) => Verdict::Refuse,
        }
    }

    /// Takes a packet that leaves for `peer`: its answers are let in.
    pub fn outbound(&self, peer: NodeId, bytes: &[u8], flows: &mut Flows, now: Instant) {
        let Ok(packet) = Packet::parse(bytes) else { return };
        let key = |followed, local, remote| FlowKey::new(packet.is_ipv6(), followed, local, remote);
        match packet.transport {
            Transport::Tcp { src, dst, flags } => {
                flows.tcp_out(key(Followed::Tcp, src, dst), flags, now);
            }
            // Where a rule lets the answer in, a flow of our own would only outlive the rule.
            Transport::Udp { src, .. } if self.class(peer).admits_udp(src) => {}
            Transport::Udp { src, dst } => flows.udp_out(key(Followed::Udp, src, dst), now),
            Transport::EchoRequest { id } => flows.echo_out(key(Followed::Echo, id, 0), now),
            Transport::EchoReply { .. }
            | Transport::IcmpError { .. }
            | Transport::Icmp
            | Transport::Other
            | Transport::Later => {}
        }
    }
}

/// Runs of node numbers, first and last, in their order and without overlap.
type Runs = Vec<(u32, u32)>;

fn merged(sources: &[(u32, u32)]) -> Runs {
    let mut runs: Runs = sources.iter().copied().filter(|(first, last)| first <= last).collect();
    runs.sort_unstable();
    let mut merged: Runs = Vec::with_capacity(runs.len());
    for (first, last) in runs {
        match merged.last_mut() {
            Some(before) if first <= before.1 => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// A search, since there are as many questions as runs.
fn speaks_of(sources: &Option<Runs>, node: u32) -> bool {
    sources.as_ref().is_none_or(|runs| {
        let behind = runs.partition_point(|(first, _)| *first <= node);
        behind > 0 && runs[behind - 1].1 >= node
    })
}

impl Class {
    fn of<'r>(rules: impl Iterator<Item = &'r WireRule>) -> Self {
        let (mut any, mut icmp, mut tcp, mut udp) = (false, false, Vec::new(), Vec::new());
        for rule in rules {
            let ports = rule.ports.as_deref().unwrap_or(&[(0, u16::MAX)]);
            match rule.kind {
                KIND_ANY => any = true,
                KIND_ICMP => icmp = true,
                KIND_TCP => tcp.extend_from_slice(ports),
                KIND_UDP => udp.extend_from_slice(ports),
                // What is not known lets nothing in.
                _ => {}
            }
        }
        Self { any, icmp, tcp: Ports::merged(tcp), udp: Ports::merged(udp) }
    }

    fn admits_tcp(&self, port: u16) -> bool {
        self.any || self.tcp.contain(port)
    }

    fn admits_udp(&self, port: u16) -> bool {
        self.any || self.udp.contain(port)
    }

    fn admits_icmp(&self) -> bool {
        self.any || self.icmp
    }

    /// Whether what the packet carries may come in; a later fragment is judged by its place.
    fn allows(&self, packet: &Packet, flows: &mut Flows, now: Instant) -> bool {
        let key = |followed, local, remote| FlowKey::new(packet.is_ipv6(), followed, local, remote);
        match packet.transport {
            Transport::Tcp { src, dst, flags } => {
                self.admits_tcp(dst) || flows.tcp_in(key(Followed::Tcp, dst, src), flags, now)
            }
            Transport::Udp { src, dst } if self.admits_udp(dst) => {
                flows.udp_by_rule(key(Followed::Udp, dst, src), now);
                true
            }
            Transport::Udp { src, dst } => flows.udp_in(key(Followed::Udp, dst, src), now),
            Transport::EchoReply { id } => {
                self.admits_icmp() || flows.echo_in(key(Followed::Echo, id, 0), now)
            }
            Transport::IcmpError { about } => {
                self.admits_icmp()
                    || about.is_some_and(|about| self.knows(packet, about, flows, now))
            }
            Transport::EchoRequest { .. } | Transport::Icmp => self.admits_icmp(),
            Transport::Other => self.any,
            Transport::Later => true,
        }
    }

    /// Whether an ICMP error is about a flow of ours, or about an answer of ours to a flow that a
    /// rule lets in.
    fn knows(&self, packet: &Packet, about: Quoted, flows: &mut Flows, now: Instant) -> bool {
        let key = |followed, local, remote| FlowKey::new(packet.is_ipv6(), followed, local, remote);
        match about {
            Quoted::Tcp(local, remote) => {
                self.admits_tcp(local) || flows.is_ours(key(Followed::Tcp, local, remote), now)
            }
            Quoted::Udp(local, remote) => {
                self.admits_udp(local) || flows.is_ours(key(Followed::Udp, local, remote), now)
            }
            Quoted::EchoRequest(id) => flows.is_ours(key(Followed::Echo, id, 0), now),
        }
    }
}
