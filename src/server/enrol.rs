//! The first message of a connection: join, come back, or be turned away.
//!
//! Who somebody is, is told by the session's machine key alone. A member needs no invite, whatever
//! it presents; so the repetition of a join whose answer was lost is a login, and costs no use.

use rand::Rng;

use super::distribute::Presence;
use super::keys::is_key;
use super::records::MemberRecord;
use super::relay::RelayChange;
use super::{Act, ConnectionId, Decision, Output, Server};
use crate::types::{Candidate, NodeId, NodeName, PublicKey, source_of};
use crate::wire::control::{
    Hello, RefusedCode, ServerMessage, Standing, VERSION, Welcome, usable_candidates,
};
use crate::wire::relay::RelayKey;

/// A node that is let in, as soon as that is on disk.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) connection: ConnectionId,
    node: NodeId,
    candidates: Vec<Candidate>,
    instance: Option<u64>,
    known: Option<Vec<u32>>,
}

impl Arrival {
    pub(super) fn node(&self) -> NodeId {
        self.node
    }
}

impl Decision {
    pub(super) fn refuse(connection: ConnectionId, code: RefusedCode) -> Self {
        Self { changes: Vec::new(), act: Act::Refuse { connection, code } }
    }
}

impl Server {
    pub(super) fn decide_hello(
        &mut self,
        connection: ConnectionId,
        hello: Hello,
        wall: u64,
    ) -> Decision {
        let decision = match self.admit(connection, hello, wall) {
            Ok(decision) => decision,
            Err(RefusedCode::NotAccepted) => return self.not_accepted(connection, wall),
            Err(code) => Decision::refuse(connection, code),
        };
        let Act::Welcome(arrival) = &decision.act else { return decision };
        if let Some(instance) = arrival.instance
            && let Some(act) = self.rival(connection, arrival.node, instance, wall)
        {
            return Decision { changes: Vec::new(), act };
        }
        // What somebody writes who joins, its invite bounds.
        if !decision.changes.is_empty() && self.members.of(arrival.node).is_some() {
            self.pace.note(arrival.node, wall);
        }
        decision
    }

    /// An invite that does not exist; some of these are written down.
    fn not_accepted(&mut self, connection: ConnectionId, wall: u64) -> Decision {
        let source = self.connections.get(&connection).map(|known| known.about.observed.ip());
        let tries = source.and_then(|ip| self.guesses.note(source_of(ip), wall));
        let Some(tries) = tries else {
            return Decision::refuse(connection, RefusedCode::NotAccepted);
        };
        Decision { changes: Vec::new(), act: Act::Guessed { connection, tries } }
    }

    fn admit(
        &self,
        connection: ConnectionId,
        hello: Hello,
        wall: u64,
    ) -> Result<Decision, RefusedCode> {
        let known = self.connections.get(&connection).ok_or(RefusedCode::BadRequest)?;
        if known.node.is_some() {
            return Err(RefusedCode::BadRequest);
        }
        if !(hello.min_version..=hello.max_version).contains(&VERSION) {
            return Err(RefusedCode::Version);
        }
        let machine_key = known.about.machine_key;
        let node_key = PublicKey(hello.node_key);
        let member = self.members.with_machine_key(&machine_key);
        let own = member.map(|member| member.record.id);
        // Whose keys there are is told to members and to who holds an invite.
        if !is_key(node_key) || (own.is_some() && !self.may_have_key(own, node_key)) {
            return Err(RefusedCode::BadRequest);
        }
        let wish = hello.name.as_deref().map(NodeName::from_hostname);
        let candidates = self.underlay(&usable_candidates(&hello.candidates));
        let (node, changes) = match member {
            Some(member) if member.record.is_over() => {
                let act = Act::Expired { connection, node: member.record.id };
                return Ok(Decision { changes: Vec::new(), act });
            }
            Some(member) => {
                let paced = self.pace.allows(member.record.id, wall);
                if !paced && node_key != member.record.node_key {
                    return Err(RefusedCode::TooOften);
                }
                // A name alone can wait: it asks for it again when it comes back.
                let wish = wish.filter(|_| paced);
                let record = self.returning(&member.record, node_key, wish, wall);
                let changed = record != member.record;
                (record.id, if changed { vec![self.members.write(record)] } else { Vec::new() })
            }
            None if hello.invite.is_some()
                && !self.guesses.allows(source_of(known.about.observed.ip()), wall) =>
            {
                return Err(RefusedCode::NotAccepted);
            }
            None => self.joining(machine_key, node_key, wish, &hello, wall)?,
        };
        let Hello { instance, known, .. } = hello;
        let arrival = Arrival { connection, node, candidates, instance, known };
        Ok(Decision { changes, act: Act::Welcome(arrival) })
    }

    /// The record of a member that logs in, with what is new about it.
    fn returning(
        &self,
        member: &MemberRecord,
        node_key: PublicKey,
        wish: Option<NodeName>,
        wall: u64,
    ) -> MemberRecord {
        let mut record = member.clone();
        if record.node_key != node_key {
            (record.node_key, record.key_since) = (node_key, wall);
        }
        if wish.is_some() && wish != member.wish {
            if let Some(wish) = wish.as_ref().filter(|_| !member.named) {
                record.name = self.name_by_wish(wish, Some(member));
            }
            record.wish = wish;
        }
        record
    }

    /// What a node is called that would like to be called `wish`. A name that access rules know means
    /// rights, so no wish gets it that has not got it already.
    fn name_by_wish(&self, wish: &NodeName, member: Option<&MemberRecord>) -> NodeName {
        let own = member.map(|member| &member.name);
        let is_barred = |name: &NodeName| own != Some(name) && self.access.knows(name);
        self.members.free_name(wish, member.map(|member| member.id), is_barred)
    }

    /// What a node is called that joins: the administrator's name, if its invite has one.
    fn name_of_new(&self, given: Option<&NodeName>, wish: Option<&NodeName>) -> NodeName {
        let Some(given) = given else {
            let unnamed = || NodeName::from_hostname("");
            return self.name_by_wish(&wish.cloned().unwrap_or_else(unnamed), None);
        };
        // One with a number behind it is not the name that was given.
        let is_barred = |name: &NodeName| name != given && self.access.knows(name);
        self.members.free_name(given, None, is_barred)
    }

    /// A new member and the use of its invite: both are written, or none.
    fn joining(
        &self,
        machine_key: PublicKey,
        node_key: PublicKey,
        wish: Option<NodeName>,
        hello: &Hello,
        wall: u64,
    ) -> Result<(NodeId, Vec<super::Change>), RefusedCode> {
        let presented = hello.invite.as_ref().ok_or(RefusedCode::NotMember)?;
        let mut invite = self.invites.check(presented, wall)?.record.clone();
        if presented.network != self.network.record.id.0 {
            return Err(RefusedCode::WrongNetwork);
        }
        if !self.may_have_key(None, node_key) {
            return Err(RefusedCode::BadRequest);
        }
        let host = self.members.free_host().ok_or(RefusedCode::NetworkFull)?;
        let id = self.members.free_id().ok_or(RefusedCode::NetworkFull)?;
        let record = MemberRecord {
            id,
            machine_key,
            node_key,
            name: self.name_of_new(invite.name.as_ref(), wish.as_ref()),
            wish,
            host,
            joined: wall,
            last_seen: wall,
            invite: invite.id,
            tags: invite.tags.clone(),
            key_since: wall,
            expires: self.network.record.members_last_s.map(|last| wall.saturating_add(last)),
            expiry_noted: crate::server::records::ExpiryNoted::Nothing,
            named: invite.name.is_some(),
        };
        invite.used += 1;
        Ok((id, vec![self.invites.write(invite), self.members.write(record)]))
    }

    /// Tells a node that it is in, and everybody that it is online.
    pub(super) fn welcome(&mut self, arrival: Arrival, wall: u64) {
        let Arrival { connection, node, candidates, instance, known: uses } = arrival;
        let Some(member) = self.members.of(node) else {
            return;
        };
        let Some(known) = self.connections.get_mut(&connection) else {
            return;
        };
        known.node = Some(node);
        known.instance = instance;
        known.can_part = uses.is_some();
        let key = RelayKey(self.rng.random());
        let standing = Standing { now: wall, expires: member.record.expires };
        let range = self.network.record.range;
        let addresses = self.members.addresses(&member.record);
        let welcome = Welcome {
            version: VERSION,
            network: self.network.record.id.0,
            id: node.number(),
            name: member.record.name.to_string(),
            ipv4: addresses.v4,
            ipv6: addresses.v6,
            ipv4_prefix_len: range.v4().prefix_len(),
            ipv6_prefix_len: range.v6().prefix_len(),
            relay_key: key.0,
            relay_port: known.about.relay_port,
            second_port: known.about.second_port,
            observed: Some(known.about.observed),
            server_addresses: self.settings.addresses.iter().map(ToString::to_string).collect(),
        };
        if let Some(replaced) = self.online.insert(node, connection) {
            if let Some(old) = self.connections.get_mut(&replaced) {
                old.node = None;
            }
            self.refuse(replaced, RefusedCode::Replaced);
        }
        self.seen.insert(node, wall);
        self.outputs.push_back(Output::Relay(RelayChange::Online { node, key, connection }));
        let standing = Some(standing);
        let message = ServerMessage { welcome: Some(welcome), standing, ..Default::default() };
        self.send(connection, &message);
        self.distribution.set_online(node, Presence::Online);
        self.distribution.set_candidates(node, candidates);
        match uses {
            Some(uses) if self.members.len() > self.settings.whole_netmap_up_to => {
                let uses = uses.into_iter().filter_map(NodeId::new);
                self.distribution.enter_part(node, uses);
            }
            _ => self.distribution.parts.leave(node),
        }
        let filter = self.access.whole_for(node, &self.members);
        let message = self.distribution.full(node, filter.as_deref());
        self.outputs.push_back(Output::Send { connection, message });
    }

    /// The candidates that lie outside the overlay: the way to a node never leads through itself.
    pub(super) fn underlay(&self, candidates: &[Candidate]) -> Vec<Candidate> {
        let range = self.network.record.range;
        let outside = |candidate: &&Candidate| !range.contains(candidate.endpoint.ip());
        candidates.iter().filter(outside).copied().collect()
    }
}
