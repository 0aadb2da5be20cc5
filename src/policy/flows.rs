//! Which flows with one peer this node started, so that their answers are let in.
//!
//! Both ends have one address per family, so a flow is told by family, protocol and ports. What
//! the peer started by right of a rule is kept in mind too, else this node's answer would look
//! like a flow of its own and outlive the rule.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use super::fragments::Fragments;
use super::packet::{Packet, TCP as TCP_PROTOCOL, Transport};

/// An open TCP connection may be silent for this long (RFC 5382 REQ-5).
const TCP_OPEN: Duration = Duration::from_secs(2 * 3600 + 4 * 60);
/// A TCP connection that was never answered, or that has ended (RFC 5382 REQ-5).
const TCP_TRANSITORY: Duration = Duration::from_secs(4 * 60);
/// RFC 4787 REQ-5 recommends five minutes.
const UDP: Duration = Duration::from_secs(300);
/// RFC 5508 REQ-1.
const ECHO: Duration = Duration::from_secs(60);
/// Half of the flows that are kept in mind per peer and side; those not used for longest go first.
const GENERATION: usize = 4_096;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Whether a TCP segment asks for a new connection.
pub(super) fn opens_connection(flags: u8) -> bool {
    flags & (SYN | ACK | RST) == SYN
}

/// A flow with one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FlowKey(u64);

/// The protocols whose flows are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Followed {
    Tcp,
    Udp,
    /// The local port is the identifier, the remote one is zero.
    Echo,
}

impl FlowKey {
    pub(super) fn new(v6: bool, followed: Followed, local: u16, remote: u16) -> Self {
        let kind = u64::from(v6) << 2 | followed as u64;
        Self(kind << 32 | u64::from(local) << 16 | u64::from(remote))
    }
}

#[derive(Debug, Clone, Copy)]
struct Flow {
    until: Instant,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// TCP: asked for, and not answered.
    Asked,
    /// TCP: answered.
    Open,
    /// TCP: one side has ended it.
    Closing,
    Stateless,
}

impl Flow {
    /// Where a TCP connection is after a segment with these flags.
    fn after(self, flags: u8, from_peer: bool, now: Instant) -> Self {
        let state = match self.state {
            _ if flags & (FIN | RST) != 0 => State::Closing,
            State::Asked if from_peer => State::Open,
            state => state,
        };
        let time = if state == State::Open { TCP_OPEN } else { TCP_TRANSITORY };
        Self { until: now + time, state }
    }
}

/// What a node keeps in mind of its flows with one peer.
#[derive(Debug, Default)]
pub struct Flows {
    ours: Recent<FlowKey, Flow>,
    /// UDP that the peer was let in with by a rule, until when.
    theirs: Recent<FlowKey, Instant>,
    pub(super) fragments: Fragments,
}

impl Flows {
    /// Takes a TCP segment that leaves.
    pub(super) fn tcp_out(&mut self, key: FlowKey, flags: u8, now: Instant) {
        if opens_connection(flags) {
            let flow = Flow { until: now + TCP_TRANSITORY, state: State::Asked };
            self.ours.insert(key, flow);
        } else if let Some(flow) = self.ours.get_mut(key) {
            *flow = flow.after(flags, false, now);
        }
    }

    /// Takes a packet that leaves while there are no rules. Connections are kept in mind even then,
    /// or the first rules of a network would cut those that they allow.
    pub fn note_connection(&mut self, bytes: &[u8], now: Instant) {
        let (protocol, flags) = match bytes.first() {
            Some(0x45) => (bytes.get(9), bytes.get(33)),
            Some(0x60..0x70) => (bytes.get(6), bytes.get(53)),
            _ => return,
        };
        if protocol != Some(&TCP_PROTOCOL) || !flags.is_some_and(|flags| opens_connection(*flags)) {
            return;
        }
        let Ok(packet) = Packet::parse(bytes) else { return };
        if let Transport::Tcp { src, dst, .. } = packet.transport {
            let key = FlowKey::new(packet.is_ipv6(), Followed::Tcp, src, dst);
            self.ours.insert(key, Flow { until: now + TCP_OPEN, state: State::Open });
        }
    }

    /// Whether a TCP segment of the peer belongs to a connection of ours.
    pub(super) fn tcp_in(&mut self, key: FlowKey, flags: u8, now: Instant) -> bool {
        match self.ours.get_mut(key) {
            // With our state nobody opens a connection of his own.
            Some(flow) if flow.until > now && !opens_connection(flags) => {
                *flow = flow.after(flags, true, now);
                true
            }
            _ => false,
        }
    }

    /// Takes a UDP datagram that leaves: an answer, or a flow of ours.
    pub(super) fn udp_out(&mut self, key: FlowKey, now: Instant) {
        match self.theirs.get_mut(key) {
            Some(until) if *until > now => *until = now + UDP,
            _ => self.ours.insert(key, Flow { until: now + UDP, state: State::Stateless }),
        }
    }

    /// Takes a UDP datagram that a rule let in.
    pub(super) fn udp_by_rule(&mut self, key: FlowKey, now: Instant) {
        match self.theirs.get_mut(key) {
            Some(until) => *until = now + UDP,
            None => self.theirs.insert(key, now + UDP),
        }
    }

    /// Whether a UDP datagram belongs to a flow of ours.
    pub(super) fn udp_in(&mut self, key: FlowKey, now: Instant) -> bool {
        self.refreshed(key, UDP, now)
    }

    /// Takes an echo request that leaves.
    pub(super) fn echo_out(&mut self, key: FlowKey, now: Instant) {
        self.ours.insert(key, Flow { until: now + ECHO, state: State::Stateless });
    }

    /// Whether an echo reply answers a request of ours.
    pub(super) fn echo_in(&mut self, key: FlowKey, now: Instant) -> bool {
        self.refreshed(key, ECHO, now)
    }

    /// Whether there is such a flow of ours.
    pub(super) fn is_ours(&mut self, key: FlowKey, now: Instant) -> bool {
        self.ours.get_mut(key).is_some_and(|flow| flow.until > now)
    }

    fn refreshed(&mut self, key: FlowKey, time: Duration, now: Instant) -> bool {
        match self.ours.get_mut(key) {
            Some(flow) if flow.until > now => {
                flow.until = now + time;
                true
            }
            _ => false,
        }
    }
}

/// A bounded table that forgets what was not used for longest: what is used moves to the young
/// half; when that is full it becomes the old one, and the old one is gone.
#[derive(Debug)]
struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new() }
    }
}

impl<K: Hash + Eq + Copy, V> Recent<K, V> {
    fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        if self.young.len() >= GENERATION && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    fn get_mut(&mut self, key: K) -> Option<&mut V> {
        if let Some(value) = self.old.remove(&key) {
            self.insert(key, value);
        }
        self.young.get_mut(&key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    #[test]
    fn a_full_table_forgets_what_was_not_used() {
        let mut recent = Recent::default();
        recent.insert(0usize, 0);
        for key in 1..10 * GENERATION {
            recent.insert(key, key);
            assert_eq!(recent.get_mut(0), Some(&mut 0), "it is used all the time");
            assert!(recent.young.len() + recent.old.len() <= 2 * GENERATION);
        }
        assert!(recent.get_mut(9 * GENERATION).is_some() && recent.get_mut(1).is_none());
    }

    #[test]
    fn a_connection_from_before_the_first_rules_is_ours() {
        let now = epoch();
        let mut flows = Flows::default();
        let segment = |src: u16, flags: u8| {
            let mut bytes =
                vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
            bytes.extend(src.to_be_bytes());
            bytes.extend([0, 22, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
            bytes
        };
        flows.note_connection(&segment(4000, SYN), now);
        flows.note_connection(&segment(4001, SYN | ACK), now);
        let ours = |flows: &mut Flows, port| {
            flows.tcp_in(FlowKey::new(false, Followed::Tcp, port, 22), ACK, now)
        };
        assert!(ours(&mut flows, 4000));
        assert!(!ours(&mut flows, 4001), "the peer has opened that one");
    }

    #[test]
    fn an_ended_connection_is_soon_forgotten_and_an_open_one_is_not() {
        let now = epoch();
        let key = FlowKey::new(false, Followed::Tcp, 40_000, 22);
        let hour = now + Duration::from_secs(3600);
        let mut flows = Flows::default();
        flows.tcp_out(key, SYN, now);
        assert!(!flows.tcp_in(key, SYN, now), "a bare SYN is never an answer");
        assert!(!flows.tcp_in(key, ACK, hour), "nobody answered");
        flows.tcp_out(key, SYN, now);
        assert!(flows.tcp_in(key, SYN | ACK, now));
        flows.tcp_out(key, ACK, now);
        assert!(flows.tcp_in(key, ACK, hour));
        assert!(flows.tcp_in(key, FIN | ACK, hour));
        assert!(flows.tcp_in(key, ACK, hour), "the last acknowledgements");
        assert!(!flows.tcp_in(key, ACK, hour + TCP_TRANSITORY));
    }

    #[test]
    fn an_answer_to_what_a_rule_let_in_is_no_flow_of_ours() {
        let now = epoch();
        let key = FlowKey::new(true, Followed::Udp, 53, 40_000);
        let mut flows = Flows::default();
        flows.udp_by_rule(key, now);
        flows.udp_out(key, now);
        assert!(!flows.udp_in(key, now));
        let later = now + UDP + Duration::from_secs(1);
        flows.udp_out(key, later);
        assert!(flows.udp_in(key, later), "a new flow, started by us");
    }
}
