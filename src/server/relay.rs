//! Which datagram goes where: sign-on, relay and reflector, decided without a socket.
//!
//! The relay carries sealed packets between members of the network and changes nothing but the
//! four bytes that say whom a packet is for, then whom it is from. Who is not a member can neither
//! send nor be sent to; who did not sign on with its key has no address here.

pub mod limit;
mod proof;
pub mod queue;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::fresh::Tokens;
use super::{ConnectionId, reflect};
use crate::types::{DropReason, NodeId};
use crate::wire::PacketKind;
use crate::wire::relay::{
    self as wire, AddressProof, CONTROL_LEN, Control, DATA_HEADER_LEN, Proving, RelayKey,
    data_header, parse_data,
};
use limit::{Admitted, Allowance, Limits, Meter};
use proof::{Prover, Unproved};

/// A node is sent to by UDP for this long after its last bind. It binds every 20 seconds, and six
/// times more in the next ten when it is not answered.
pub const BIND_LIFETIME: Duration = Duration::from_secs(30);

/// A node that signed on this long ago has had its answer, and sends by UDP if it can. One that sends by
/// its control connection instead does not receive by UDP, though its binds may go on to arrive.
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
    /// By UDP, to an address that has proved nothing: each datagram has to be asked for.
    Unproved(Arrival),
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
#[derive(Debug)]
pub struct RelayTable {
    nodes: BTreeMap<NodeId, Entry>,
    by_source: BTreeMap<(SocketId, SocketAddr), NodeId>,
    sightings: BTreeMap<NodeId, SocketAddr>,
    meter: Meter,
    prover: Prover,
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
    unproved: Unproved,
}

#[derive(Debug, Clone, Copy)]
struct Binding {
    arrival: Arrival,
    at: Instant,
    /// The node has shown that it receives there.
    proved: bool,
    /// When data came from there last, or the first bind if none has.
    silent_since: Instant,
    /// Data has come by the control connection in this silence.
    by_link: bool,
}

/// What a bind says.
#[derive(Debug, Clone, Copy)]
struct Bind {
    node: NodeId,
    counter: u64,
    proof: Option<AddressProof>,
}

impl RelayTable {
    /// A table without nodes. `secret` is random: who knows it can prove any address.
    #[must_use]
    pub fn new(limits: Limits, secret: [u8; 32]) -> Self {
        Self {
            nodes: BTreeMap::new(),
            by_source: BTreeMap::new(),
            sightings: BTreeMap::new(),
            meter: Meter::new(limits),
            prover: Prover::new(RelayKey(secret)),
            tokens: None,
        }
    }

    /// The same with a reflector that gives out these tokens.
    #[must_use]
    pub fn with_tokens(self, tokens: Tokens) -> Self {
        Self { tokens: Some(tokens), ..self }
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
                self.unbind(node);
                self.nodes.remove(&node);
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
                match sender.filter(|sender| self.is_heard(*sender, datagram.len(), now)) {
                    Some(sender) => self.forward(sender, datagram, false, now),
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
    /// Who sends this way and not by UDP, where it signed on, does not receive by UDP: it is answered
    /// this way until it sends by UDP again. What is too long for UDP asks for the receiver's connection,
    /// and says nothing about either side.
    pub fn handle_from(&mut self, sender: NodeId, datagram: &mut [u8], now: Instant) -> Verdict {
        let by_link = wire::asks_for_link(datagram);
        let bound = self.nodes.get_mut(&sender).and_then(|entry| entry.bound.as_mut());
        if let Some(bound) = bound.filter(|_| !by_link) {
            bound.note_link(now);
        }
        self.forward(sender, datagram, by_link, now)
    }

    fn unbind(&mut self, node: NodeId) {
        if let Some(bound) = self.nodes.get_mut(&node).and_then(|entry| entry.bound.take()) {
            let source = (bound.arrival.socket, bound.arrival.source);
            // Another node may have it by now.
            if self.by_source.get(&source) == Some(&node) {
                self.by_source.remove(&source);
            }
        }
    }

    fn forward(
        &mut self,
        sender: NodeId,
        datagram: &mut [u8],
        by_link: bool,
        now: Instant,
    ) -> Verdict {
        let Ok((target, _)) = parse_data(datagram) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let members = self.nodes.contains_key(&sender) && sender != target;
        let Some(entry) = self.nodes.get_mut(&target).filter(|_| members) else {
            return Verdict::Drop(DropReason::BadRelayFrame);
        };
        let by_udp = |bound: &Binding| {
            let elsewhere = by_link || bound.is_lost(now);
            bound.is_fresh(now) && !(entry.connection.is_some() && elsewhere)
        };
        let way = match (entry.bound.filter(by_udp), entry.connection) {
            (Some(bound), _) if bound.proved => Way::Udp(bound.arrival),
            (Some(bound), _) if entry.unproved.take(datagram.len(), now) => {
                Way::Unproved(bound.arrival)
            }
            (_, Some(connection)) => Way::Link(connection),
            _ => return Verdict::Drop(DropReason::RelayPeerAbsent),
        };
        if let Some(header) = datagram.first_chunk_mut::<DATA_HEADER_LEN>() {
            *header = data_header(sender);
        }
        Verdict::Forward(way)
    }

    /// Whether a node may send from where it is; what comes from an address that has proved nothing
    /// may go back there.
    fn is_heard(&mut self, node: NodeId, len: usize, now: Instant) -> bool {
        let Some(entry) = self.nodes.get_mut(&node) else { return false };
        let Some(bound) = entry.bound.as_mut().filter(|bound| bound.is_fresh(now)) else {
            return false;
        };
        bound.note_data(now);
        if !bound.proved {
            entry.unproved.heard(len);
        }
        true
    }

    fn handle_control(&mut self, datagram: &[u8], arrival: Arrival, now: Instant) -> Verdict {
        match Control::parse(datagram) {
            Ok(Control::Bind { node, counter, proof }) => {
                self.handle_bind(datagram, Bind { node, counter, proof }, arrival, now)
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
        Bind { node, counter, proof }: Bind,
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
        let proved = proof.is_some_and(|said| self.prover.accepts(said, node, arrival, now));
        let proof =
            proof.map(|_| Proving { proof: self.prover.tell(node, arrival, now), wanted: !proved });
        let bound = Control::Bound { node, counter, observed: arrival.source, proof };
        let bytes = bound.encode(Some(key));
        let is_first = entry.counter.replace(counter).is_none();
        let moved = entry.bound.is_none_or(|before| before.arrival.source != arrival.source);
        let recent = |at: Instant| now.saturating_duration_since(at) < SIGHTING_SPACING;
        if (moved || entry.sighted_at.is_none()) && !entry.sighted_at.is_some_and(recent) {
            entry.sighted_at = Some(now);
            self.sightings.insert(node, arrival.source);
        }
        if moved {
            entry.unproved.moved();
        }
        let mut binding = Binding::new(arrival, proved, now);
        if let Some(before) = entry.bound.filter(|_| !is_first) {
            binding.go_on_from(&before);
        }
        self.bind(node, binding, now);
        Verdict::Reply { bytes, from: arrival.socket }
    }

    /// A node is sent to there from now on. What comes from there is its own, unless another node
    /// has shown that it is there and this one has not.
    fn bind(&mut self, node: NodeId, binding: Binding, now: Instant) {
        self.unbind(node);
        if let Some(entry) = self.nodes.get_mut(&node) {
            entry.bound = Some(binding);
        }
        let source = (binding.arrival.socket, binding.arrival.source);
        let owner = self.by_source.get(&source).filter(|owner| **owner != node);
        let owner = owner.and_then(|owner| self.nodes.get_mut(owner));
        if let Some(owner) = owner {
            let there = owner.bound.is_some_and(|bound| bound.proved && bound.is_fresh(now));
            if there && !binding.proved {
                return;
            }
            // A NAT has given an old address to another node: the old owner is not there any more.
            owner.bound = None;
        }
        self.by_source.insert(source, node);
    }
}

/// A table whose proofs anybody can make.
#[cfg(test)]
impl Default for RelayTable {
    fn default() -> Self {
        Self::new(Limits::default(), [0; 32])
    }
}

impl Binding {
    fn new(arrival: Arrival, proved: bool, now: Instant) -> Self {
        Self { arrival, at: now, proved, silent_since: now, by_link: false }
    }

    /// What is known of the last bind holds on, unless this one shows that an answer has arrived since
    /// or comes from elsewhere: binds alone say nothing about the way back.
    fn go_on_from(&mut self, before: &Self) {
        let shows_more = self.proved && !before.proved;
        if self.arrival == before.arrival && before.is_fresh(self.at) && !shows_more {
            self.silent_since = before.silent_since;
            self.by_link = before.by_link;
        }
    }

    /// Data came from there: the node has had its answer.
    fn note_data(&mut self, now: Instant) {
        self.silent_since = now;
        self.by_link = false;
    }

    /// Data of the node came by its control connection. What has been on its way since before the
    /// node proved its address, or has been overtaken by UDP, says nothing.
    fn note_link(&mut self, now: Instant) {
        self.by_link |= !self.proved || self.is_silent(now);
    }

    /// Whether the node, for all that it sends, does not receive there.
    fn is_lost(&self, now: Instant) -> bool {
        self.by_link && self.is_silent(now)
    }

    fn is_silent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.silent_since) >= BIND_ANSWERED
    }

    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < BIND_LIFETIME
    }
}

#[cfg(test)]
mod tests;
