//! The server's control plane: who is in the network, and what each node is told.
//!
//! A state machine without socket, file, clock or task. Whoever drives it hands in what happened
//! (`handle_*`) with the time, takes out what is to be done ([`Server::poll_output`]), and calls
//! [`Server::handle_timeout`] when [`Server::poll_timeout`] says so. A change of what is on disk
//! goes in two steps, so that nothing is acknowledged before it is written: a [`Decision`] is made,
//! its changes are committed, and only then [`Server::apply`] makes it true; after a failed commit
//! [`Server::give_up`] leaves everything as it was.
//!
//! This file holds fields and queues; the rules are in the rooms beside it.

mod addresses;
pub mod admin;
mod clones;
mod distribute;
mod enrol;
pub mod events;
mod expiry;
pub mod fresh;
mod guesses;
mod invites;
mod keys;
mod members;
mod pace;
mod parts;
mod policy;
pub mod records;
mod reflect;
pub mod relay;
mod removal;
mod update;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

pub use addresses::choose_range;

use crate::policy::Affected;
use crate::types::{NodeId, PublicKey};
use crate::wire::control::{
    self, ClientMessage, Refused, RefusedCode, ServerMessage, TICK_INTERVAL_S, usable_candidates,
};
use crate::wire::join::ServerAddr;
use clones::Clones;
use distribute::Distribution;
use expiry::Expiries;
use guesses::Guesses;
use invites::Invites;
use members::Members;
use pace::Pace;
use policy::Access;
use records::{Change, Key, NetworkRecord, Record, Records, Versioned};
use relay::RelayChange;

/// One control connection; its owner gives the numbers and never gives one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// What the server knows of itself.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its static key, for join lines.
    pub server_key: PublicKey,
    /// Where it can be reached, for join lines and for the next time a node connects.
    pub addresses: Vec<ServerAddr>,
    /// See [`WHOLE_NETMAP_UP_TO`].
    pub whole_netmap_up_to: usize,
}

/// In a network of up to so many nodes each is told of every other, unless it is set otherwise.
pub const WHOLE_NETMAP_UP_TO: usize = 256;
/// What a node hears whose arrival could not be written down.
const CANNOT_STORE: &str = "the server cannot store this node now, as it cannot write to its disk; its \
                            operator finds the reason in the server's log";

/// A new control connection.
#[derive(Debug, Clone, Copy)]
pub struct Connected {
    /// The node's machine key, proved by the handshake and a first frame.
    pub machine_key: PublicKey,
    /// Where the connection comes from.
    pub observed: SocketAddr,
    /// The UDP port of relay and reflector on the address that the node connected to.
    pub relay_port: Option<u16>,
    /// The second reflector port there.
    pub second_port: Option<u16>,
}

/// What the driver has to do.
#[derive(Debug, Clone)]
pub enum Output {
    /// Send this control message.
    Send {
        /// To whom.
        connection: ConnectionId,
        /// The encoded message.
        message: Vec<u8>,
    },
    /// Close this connection when all that was sent before is out.
    Close {
        /// Which one.
        connection: ConnectionId,
    },
    /// Change the relay's table.
    Relay(RelayChange),
}

/// Something that was decided and is not true before it is written.
#[derive(Debug)]
#[must_use = "a decision does nothing before it is applied"]
pub struct Decision {
    changes: Vec<Change>,
    act: Act,
}

#[derive(Debug)]
enum Act {
    Welcome(enrol::Arrival),
    Refuse {
        connection: ConnectionId,
        code: RefusedCode,
    },
    /// Turn away a machine whose twin is connected.
    Rival {
        connection: ConnectionId,
        node: NodeId,
        first: bool,
    },
    /// A member whose time is over waits until it has more.
    Expired {
        connection: ConnectionId,
        node: NodeId,
    },
    /// A member has another node key.
    Rekey {
        connection: ConnectionId,
        node: NodeId,
        key: PublicKey,
    },
    /// Turn away who presents an invite that does not exist, and write down how many did.
    Guessed {
        connection: ConnectionId,
        tries: u64,
    },
    Answer(admin::Answer),
    /// A node is not told all access rules.
    Cut(policy::CutRules),
    Nothing,
}

impl Decision {
    /// What has to be written, in one transaction, before the decision is applied.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

/// The server's control plane.
#[derive(Debug)]
pub struct Server {
    settings: Settings,
    network: Versioned<NetworkRecord>,
    members: Members,
    invites: Invites,
    access: Access,
    connections: BTreeMap<ConnectionId, Connection>,
    /// The newest connection of each node that is online.
    online: BTreeMap<NodeId, ConnectionId>,
    /// When nodes were last seen that have been online in this run; written down now and then.
    seen: BTreeMap<NodeId, u64>,
    clones: Clones,
    pace: Pace,
    expiries: Expiries,
    guesses: Guesses,
    distribution: Distribution,
    outputs: VecDeque<Output>,
    next_tick: Instant,
    rng: StdRng,
}

#[derive(Debug)]
struct Connection {
    about: Connected,
    /// Once it has been welcomed.
    node: Option<NodeId>,
    /// The newest epoch that the node says is in effect there.
    applied: u64,
    /// Which run of the node's program it belongs to.
    instance: Option<u64>,
    /// The member that waits on it, since its time is over.
    expired: Option<NodeId>,
    /// The server has had its last word on it: nothing counts that still comes.
    refused: bool,
    /// Whether it can do with a part of a large network.
    can_part: bool,
}

impl Server {
    /// The server with what its store holds. Everything random comes from `seed`.
    #[must_use]
    pub fn new(
        settings: Settings,
        records: Records,
        seed: [u8; 32],
        now: Instant,
        wall: u64,
    ) -> Self {
        let range = records.network.record.range;
        let members = Members::new(range, records.members, records.highest_node);
        let mut distribution = Distribution::new(now, wall);
        let mut outputs = VecDeque::new();
        let mut expiries = Expiries::default();
        for member in members.iter() {
            expiries.change(None, Some(member));
            if !member.is_over() {
                distribution.put_member(member, members.addresses(member));
                outputs.push_back(Output::Relay(RelayChange::Member(member.id)));
            }
        }
        distribution.forget_pending();
        Self {
            settings,
            network: records.network,
            invites: Invites::new(records.invites),
            access: Access::new(records.policy),
            members,
            connections: BTreeMap::new(),
            online: BTreeMap::new(),
            seen: BTreeMap::new(),
            clones: Clones::default(),
            pace: Pace::default(),
            expiries,
            guesses: Guesses::default(),
            distribution,
            outputs,
            next_tick: now + TICK_INTERVAL,
            rng: StdRng::from_seed(seed),
        }
    }

    /// Whether nobody has joined yet.
    #[must_use]
    pub fn has_no_members(&self) -> bool {
        self.members.is_empty()
    }

    /// Members, and those of them that are online.
    #[must_use]
    pub fn population(&self) -> (usize, usize) {
        (self.members.iter().count(), self.online.len())
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> &NetworkRecord {
        &self.network.record
    }

    /// Whether there is no address that a join line could name.
    #[must_use]
    pub fn has_no_address(&self) -> bool {
        self.settings.addresses.is_empty()
    }

    /// Replaces the addresses that join lines name.
    pub fn set_addresses(&mut self, addresses: Vec<ServerAddr>) {
        self.settings.addresses = addresses;
    }

    /// A connection has been made, and its first frame was genuine.
    pub fn handle_connected(&mut self, connection: ConnectionId, about: Connected) {
        let known = Connection {
            about,
            node: None,
            applied: 0,
            instance: None,
            expired: None,
            refused: false,
            can_part: false,
        };
        self.connections.insert(connection, known);
    }

    /// A connection has ended, whoever ended it.
    pub fn handle_disconnected(&mut self, connection: ConnectionId, wall: u64) {
        let Some(Connection { node: Some(node), .. }) = self.connections.remove(&connection) else {
            return;
        };
        self.outputs.push_back(Output::Relay(RelayChange::Offline { node, connection }));
        // A connection that was replaced says nothing about the node.
        if self.online.get(&node) == Some(&connection) {
            self.online.remove(&node);
            self.seen.insert(node, wall);
            self.distribution.parts.leave(node);
            self.distribution.set_online(node, distribute::Presence::Offline);
        }
    }

    /// Takes a message; a hello and a new key lead to a decision, everything else is done at once.
    pub fn handle_message(
        &mut self,
        connection: ConnectionId,
        message: ClientMessage,
        wall: u64,
    ) -> Option<Decision> {
        let known = self.connections.get(&connection)?;
        let Connection { node, expired: None, refused: false, .. } = *known else {
            return None;
        };
        if let Some(hello) = message.hello {
            return Some(self.decide_hello(connection, hello, wall));
        }
        let Some(node) = node else {
            return Some(Decision::refuse(connection, RefusedCode::BadRequest));
        };
        if let Some(candidates) = message.candidates {
            let usable = self.underlay(&usable_candidates(&candidates));
            self.distribution.set_candidates(node, usable);
        }
        if let Some(epoch) = message.applied {
            self.note_applied(connection, epoch);
        }
        if let Some(texts) = message.find {
            self.find_peers(connection, node, &texts);
        }
        if let Some(peers) = message.unused {
            self.release_peers(node, &peers);
        }
        if let Some(ping) = message.ping {
            self.send(connection, &ServerMessage { pong: Some(ping), ..Default::default() });
        }
        let key = PublicKey(message.node_key?);
        self.decide_key(connection, node, key, wall)
    }

    /// Makes a decision true whose changes are on disk at revision `rev`.
    pub fn apply(&mut self, decision: Decision, rev: u64, wall: u64) -> Option<admin::Answer> {
        for change in decision.changes {
            self.apply_change(change, rev, wall);
        }
        match decision.act {
            Act::Welcome(arrival) => self.welcome(arrival, wall),
            Act::Refuse { connection, code } => self.refuse(connection, code),
            Act::Guessed { connection, .. } => self.refuse(connection, RefusedCode::NotAccepted),
            Act::Rival { connection, node, .. } => self.turn_away(connection, node),
            Act::Rekey { connection, key, .. } => self.confirm_key(connection, key),
            Act::Expired { connection, node } => {
                if let Some(member) = self.members.of(node).map(|member| member.record.clone()) {
                    self.keep_waiting(connection, &member, wall);
                }
            }
            Act::Answer(mut answer) => {
                if let admin::Answer::Removed(removal) = &mut answer {
                    self.follow(removal);
                }
                return Some(answer);
            }
            Act::Cut(_) | Act::Nothing => {}
        }
        None
    }

    /// Drops a decision whose changes could not be written. Who waits for it is told.
    pub fn give_up(&mut self, decision: Decision) {
        match decision.act {
            Act::Welcome(arrival) => {
                let code = RefusedCode::Unavailable.code();
                let refused = Refused { code, message: CANNOT_STORE.into(), exact: None };
                self.refuse_as(arrival.connection, refused);
            }
            Act::Refuse { connection, code } => self.refuse(connection, code),
            Act::Guessed { connection, .. } => self.refuse(connection, RefusedCode::NotAccepted),
            Act::Rival { connection, node, .. } => self.turn_away(connection, node),
            // The node asks again.
            Act::Expired { .. } | Act::Rekey { .. } | Act::Answer(_) => {}
            Act::Cut(_) | Act::Nothing => {}
        }
    }

    fn apply_change(&mut self, change: Change, rev: u64, wall: u64) {
        match (change.key, change.record) {
            (_, Some(Record::Network(record))) => self.network = Versioned { rev, record },
            (_, Some(Record::Invite(record))) => self.invites.put(Versioned { rev, record }),
            (_, Some(Record::Policy(record))) => {
                self.access.put(Some(Versioned { rev, record }));
                self.distribution.set_rules_stale(&Affected::everybody());
            }
            (_, Some(Record::Member(record))) => {
                let old = self.members.of(record.id).map(|member| member.record.clone());
                self.expiries.change(old.as_ref(), Some(&record));
                if record.is_over() {
                    self.shut_out(&record, wall);
                } else {
                    let addresses = self.members.addresses(&record);
                    self.distribution.put_member(&record, addresses);
                    self.outputs.push_back(Output::Relay(RelayChange::Member(record.id)));
                    if let Some(old) = old {
                        self.follow_expiry(&old, &record, wall);
                    }
                }
                let limit = self.settings.whole_netmap_up_to;
                let (was_small, node) = (self.members.len() <= limit, record.id);
                self.members.put(Versioned { rev, record });
                if was_small && self.members.len() > limit {
                    self.tell_parts();
                }
                self.follow_rules(node);
            }
            (Key::Member(node), None) => self.forget_member(node),
            (Key::Invite(id), None) => self.invites.remove(id),
            (Key::Network | Key::Policy, None) => {}
        }
    }

    fn forget_member(&mut self, node: NodeId) {
        let old = self.members.remove(node);
        self.expiries.change(old.as_ref(), None);
        for connection in self.waiting(node) {
            self.refuse(connection, RefusedCode::NotMember);
        }
        self.follow_rules(node);
        self.access.forget(node);
        self.seen.remove(&node);
        self.clones.forget(node);
        self.pace.forget(node);
        self.distribution.remove(node);
        self.outputs.push_back(Output::Relay(RelayChange::Removed(node)));
        if let Some(connection) = self.online.remove(&node) {
            if let Some(connection) = self.connections.get_mut(&connection) {
                connection.node = None;
            }
            self.refuse(connection, RefusedCode::NotMember);
        }
    }

    /// The next thing to be done.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Self::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        self.distribute_at().map_or(self.next_tick, |at| at.min(self.next_tick))
    }

    /// Tells the nodes what has changed, and that the server is alive. May be called at any time.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.distribute(now);
        if self.next_tick <= now {
            self.next_tick = now + TICK_INTERVAL;
            for (node, connection) in &self.online {
                let tick = Some(self.distribution.told_epoch(*node));
                let is_part = self.distribution.parts.contains(*node);
                let members = is_part.then(|| self.distribution.members());
                let tick = ServerMessage { tick, members, ..Default::default() };
                let message = control::encode(&tick);
                self.outputs.push_back(Output::Send { connection: *connection, message });
            }
            self.tick_waiting();
        }
    }

    /// The last word of the server on a connection.
    fn refuse(&mut self, connection: ConnectionId, code: RefusedCode) {
        self.refuse_as(connection, Refused::from(code));
    }

    fn refuse_as(&mut self, connection: ConnectionId, refused: Refused) {
        let Some(known) = self.connections.get_mut(&connection) else { return };
        if std::mem::replace(&mut known.refused, true) {
            return;
        }
        self.send(connection, &ServerMessage { refused: Some(refused), ..Default::default() });
        self.outputs.push_back(Output::Close { connection });
    }

    fn send(&mut self, connection: ConnectionId, message: &ServerMessage) {
        let message = control::encode(message);
        self.outputs.push_back(Output::Send { connection, message });
    }
}

const TICK_INTERVAL: Duration = Duration::from_secs(TICK_INTERVAL_S);

#[cfg(test)]
mod tests;
