//! Which datagram goes where: sign-on, relay and reflector, decided without a socket.
//!
//! The relay carries sealed packets between members of the network and changes nothing but the
//! four bytes that say whom a packet is for, then whom it is from. Who is not a member can neither
//! send nor be sent to; who did not sign on with its key has no address here.

pub mod limit;
pub mod queue;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::fresh::Tokens;
use super::{ConnectionId, reflect};
use crate::types::{DropReason, NodeId};
use crate::wire::PacketKind;
use crate::wire::relay::{
    self as wire, CONTROL_LEN, Control, DATA_HEADER_LEN, RelayKey, data_header, parse_data,
};
use limit::{Admitted, Allowance, Limits, Meter};

/// A node is sent to by UDP for this long after its last bind. It binds every 20 seconds, and six
/// times more in the next ten when it is not answered.
pub const BIND_LIFETIME: Duration = Duration::from_secs(30);

/// A node that signed on this long ago has had its answer, and sends by UDP if it can.
const BIND_ANSWERED: Duration = Duration::from_secs(2);

/// One of the server's UDP sockets. They come in pairs, a main and a second port: the last bit
/// tells which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketId(pub u16);

impl SocketId {
    /// The socket on the same address and the other port.
    #[must_use]
    pub fn other_port(self) -> Self {
        Self(self.0 ^ 1)
    }
}

/// The control plane is told at most this often where a node is; the node tells it too.
const SIGHTING_SPACING: Duration = Duration::from_secs(1);

/// Where a datagram came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// On which socket.
    pub socket: SocketId,
    /// From where.
    pub source: SocketAddr,
    /// At which of our addresses; answers leave from it.
    pub local: Option<IpAddr>,
}

/// What to do with a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Send these bytes back to the source.
    Reply {
        /// The answer.
        bytes: [u8; CONTROL_LEN],
        /// From which socket.
        from: SocketId,
    },
    /// Send these bytes there, from a socket that nobody sends to.
    Knock {
        /// The bytes.
        bytes: [u8; CONTROL_LEN],
        /// Another port of who asked for it.
        to: SocketAddr,
    },
    /// Send the datagram, whose header has been rewritten, this way.
    Forward(Way),
    /// Count it and forget it.
    Drop(DropReason),
}

/// How a node is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By UDP.
    Udp(Arrival),
    /// By its control connection.
    Link(ConnectionId),
}

/// A change that the control plane makes to the table.
#[derive(Debug, Clone)]
pub enum RelayChange {
    /// A node is a member, perhaps without a connection.
    Member(NodeId),
    /// A node has a new control connection and with it a new key for binds.
    Online {
        /// The node.
        node: NodeId,
        /// The key that it was given.
        key: RelayKey,
        /// The connection.
        connection: ConnectionId,
    },
    /// A control connection of a node has ended. Its last bind stays good for its time.
    Offline {
        /// The node.
        node: NodeId,
        /// The connection.
        connection: ConnectionId,
    },
    /// A node is no member any more.
    Removed(NodeId),
}

/// Who is where.
#[derive(Debug, Default)]
pub struct RelayTable {
    nodes: BTreeMap<NodeId, Entry>,
    by_source: BTreeMap<(SocketId, SocketAddr), NodeId>,
    sightings: BTreeMap<NodeId, SocketAddr>,
    meter: Meter,
    tokens: Option<Tokens>,
}

#[derive(Debug, Default)]
struct Entry {
    key: Option<RelayKey>,
    counter: Option<u64>,
    bound: Option<Binding>,
    connection: Option<ConnectionId>,
    sighted_at: Option<Instant>,
    allowance: Allowance,
}

#[derive(Debug, Clone, Copy)]
struct Binding {
    arrival: Arrival,
    at: Instant,
}

impl RelayTable {
    /// A table without nodes, whose reflector gives out `tokens`.
    #[must_use]
    pub fn new(limits: Limits, tokens: Tokens) -> Self {
        Self { meter: Meter::new(limits), tokens: Some(tokens), ..Self::default() }
    }

    /// The limits that hold.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.meter.limits()
    }

    /// Other limits from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.meter.set_limits(limits);
    }

    /// Decides how much of what is to be forwarded is within the limits: `datagrams` of `bytes`
    /// each (the last may be shorter) that `sender` has sent.
    pub fn admit(
        &mut self,
        sender: NodeId,
        datagrams: usize,
        bytes: usize,
        now: Instant,
    ) -> Admitted {
        match self.nodes.get_mut(&sender) {
            Some(entry) => self.meter.admit(&mut entry.allowance, datagrams, bytes, now),
            None => Admitted { datagrams: 0, refused: DropReason::BadRelayFrame },
        }
    }

    /// Takes a change from the control plane.
    pub fn apply(&mut self, change: RelayChange) {
        match change {
            RelayChange::Member(node) => {
                self.nodes.entry(node).or_default();
            }
            RelayChange::Online { node, key, connection } => {
                let entry = self.nodes.entry(node).or_default();
                entry.key = Some(key);
                entry.counter = None;
                entry.connection = Some(connection);
                entry.sighted_at = None;
            }
            RelayChange::Offline { node, connection } => {
                if let Some(entry) = self.nodes.get_mut(&node) {
                    entry.connection = entry.connection.filter(|current| *current != connection);
                }
            }
            RelayChange::Removed(node) => {
                self.sightings.remove(&node);
                if let Some(Entry { bound: Some(bound), .. }) = self.nodes.remove(&node) {
                    self.by_source.remove(&(bound.arrival.socket, bound.arrival.source));
                }
            }
        }
    }

    /// Decides what to do with a datagram from a UDP socket.
    pub fn handle_datagram(
        &mut self,
        datagram: &mut [u8],
        arrival: Arrival,
        now: Instant,
    ) -> Verdict {
        match PacketKind::classify(datagram) {
            PacketKind::Relay => {
                let sender = self.by_source.get(&(arrival.socket, arrival.source)).copied();
                match sender.filter(|sender| self.is_bound(*sender, now)) {
                    Some(sender) => self.forward(sender, datagram, now),
                    None => Verdict::Drop(DropReason::BadRelayFrame),
                }
            }
            // Nobody can be answered there (RFC 768).
            PacketKind::RelayControl if arrival.source.port() == 0 => {
                Verdict::Drop(DropReason::Malformed)
            }
            PacketKind::RelayControl => self.handle_control(datagram, arrival, now),
            _ => Verdict::Drop(DropReason::Malformed),
        }
    }

    /// A node that signed on from somewhere else than before, and where that is: the others may be
    /// told before it can tell them itself. Call until none.
    pub fn poll_sighting(&mut self) -> Option<(NodeId, SocketAddr)> {
        self.sightings.pop_first()
    }

    /// Decides what to do with a relay datagram that came by the control connection of `sender`.
    ///
    /// Who sends this way although it once signed on by UDP has lost UDP, and is answered this way
    /// too.
    pub fn handle_from(&mut self, sender: NodeId, datagram: &mut [u8], now: Instant) -> Verdict {
        let bound = self.nodes.get(&sender).and_then(|entry| entry.bound);
        if bound.is_some_and(|bound| now.saturating_duration_since(bound.at) >= BIND_ANSWERED) {
            self.unbind(sender);
        }
        self.forward(sender, datagram, now)
    }

    fn unbind(&mut self, node: NodeId) {
        if let Some(bound) = self.nodes.get_mut(&node).and_then(|entry| entry.bound.take()) {
            self.by_source.remove(&(bound.arrival.socket, bound.arrival.source));
        }
    }

    fn forward(&self, sender: NodeId, datagram: &mut [u8], now: Instant) -> Verdict {
        let Ok((target, _)) = parse_data(datagram) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let members = self.nodes.contains_key(&sender) && sender != target;
        let Some(entry) = self.nodes.get(&target).filter(|_| members) else {
            return Verdict::Drop(DropReason::BadRelayFrame);
        };
        let way = match (entry.bound, entry.connection) {
            (Some(bound), _) if bound.is_fresh(now) => Way::Udp(bound.arrival),
            (_, Some(connection)) => Way::Link(connection),
            _ => return Verdict::Drop(DropReason::RelayPeerAbsent),
        };
        if let Some(header) = datagram.first_chunk_mut::<DATA_HEADER_LEN>() {
            *header = data_header(sender);
        }
        Verdict::Forward(way)
    }

    fn is_bound(&self, node: NodeId, now: Instant) -> bool {
        self.nodes.get(&node).and_then(|entry| entry.bound).is_some_and(|at| at.is_fresh(now))
    }

    fn handle_control(&mut self, datagram: &[u8], arrival: Arrival, now: Instant) -> Verdict {
        match Control::parse(datagram) {
            Ok(Control::Bind { node, counter }) => {
                self.handle_bind(datagram, node, counter, arrival, now)
            }
            Ok(Control::Reflect { tx, from_other_port }) => {
                let from =
                    if from_other_port { arrival.socket.other_port() } else { arrival.socket };
                let token = self.tokens.as_ref();
                let token = token.map(|tokens| tokens.issue(arrival.source.ip(), now));
                Verdict::Reply { bytes: reflect::answer(tx, arrival.source, token), from }
            }
            Ok(Control::Knock { tx, port }) => match reflect::knock(tx, arrival.source, port) {
                Some((bytes, to)) => Verdict::Knock { bytes, to },
                None => Verdict::Drop(DropReason::Malformed),
            },
            Ok(Control::Bound { .. } | Control::Reflected { .. } | Control::Knocked { .. })
            | Err(_) => Verdict::Drop(DropReason::Malformed),
        }
    }

    fn handle_bind(
        &mut self,
        datagram: &[u8],
        node: NodeId,
        counter: u64,
        arrival: Arrival,
        now: Instant,
    ) -> Verdict {
        let bad = Verdict::Drop(DropReason::BadRelayFrame);
        let Some(entry) = self.nodes.get_mut(&node) else {
            return bad;
        };
        let Some(key) = &entry.key else {
            return bad;
        };
        if wire::verify(datagram, key).is_err() || entry.counter >= Some(counter) {
            return bad;
        }
        let bound = Control::Bound { node, counter, observed: arrival.source };
        let bytes = bound.encode(Some(key));
        entry.counter = Some(counter);
        let before = entry.bound.replace(Binding { arrival, at: now });
        let moved = before.is_none_or(|before| before.arrival.source != arrival.source);
        let recent = |at: Instant| now.saturating_duration_since(at) < SIGHTING_SPACING;
        if (moved || entry.sighted_at.is_none()) && !entry.sighted_at.is_some_and(recent) {
            entry.sighted_at = Some(now);
            self.sightings.insert(node, arrival.source);
        }
        if let Some(Binding { arrival, .. }) = before {
            self.by_source.remove(&(arrival.socket, arrival.source));
        }
        let displaced = self.by_source.insert((arrival.socket, arrival.source), node);
        // A NAT has given an old address to another node: the old owner is not there any more.
        if let Some(entry) =
            displaced.filter(|id| *id != node).and_then(|id| self.nodes.get_mut(&id))
        {
            entry.bound = None;
        }
        Verdict::Reply { bytes, from: arrival.socket }
    }
}

impl Binding {
    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < BIND_LIFETIME
    }
}

#[cfg(test)]
mod tests;
