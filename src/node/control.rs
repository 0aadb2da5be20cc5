//! What the server says, and what it is told.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::{Event, Identity, Node, PeerInfo};
use crate::policy::Filter;
use crate::types::{Candidate, CandidateKind, MAX_CANDIDATES, NodeId, PublicKey, usable_underlay};
use crate::wire::control::{
    ClientMessage, Hello, InviteUse, NetmapUpdate, RefusedCode, ServerMessage, VERSION, Welcome,
};
use crate::wire::relay::RelayKey;

impl Node {
    /// The first message on a new control connection.
    #[must_use]
    pub fn hello(&self, name: Option<String>, invite: Option<InviteUse>) -> ClientMessage {
        ClientMessage {
            hello: Some(Hello {
                min_version: VERSION,
                max_version: VERSION,
                software: concat!("overlay ", env!("CARGO_PKG_VERSION")).into(),
                node_key: self.keys.public().0,
                name,
                invite,
                candidates: self.announced.iter().map(|candidate| (*candidate).into()).collect(),
                instance: Some(self.instance),
                known: Some(self.netmap.peers.keys().map(|id| id.number()).collect()),
            }),
            ..ClientMessage::default()
        }
    }

    /// What to say first on a connection on which the server has had the hello `said` already: what is
    /// different by now, and that we are there, in any case. None when a new hello is needed.
    #[must_use]
    pub fn confirmation(&self, said: &Hello) -> Option<ClientMessage> {
        let now = self.hello(None, None).hello?;
        let same = now.node_key == said.node_key && now.known == said.known;
        let candidates = (now.candidates != said.candidates).then_some(now.candidates);
        same.then(|| ClientMessage { candidates, ..ClientMessage::default() })
    }

    /// Takes a message of the server on the connection whose far end is `server`.
    pub fn handle_message(&mut self, message: &ServerMessage, server: SocketAddr, now: Instant) {
        if let Some(welcome) = &message.welcome {
            self.handle_welcome(welcome, server, now);
        }
        if let Some(standing) = &message.standing {
            self.handle_standing(standing, now);
        }
        if let Some(update) = &message.netmap {
            self.handle_update(update, now);
        }
        if let Some(key) = message.node_key {
            self.handle_key_stored(PublicKey(key), now);
        }
        if self.netmap.members.is_some() {
            self.netmap.members = message.members.or(self.netmap.members);
        }
        for text in message.unknown.iter().flatten() {
            self.handle_unknown_peer(text, now);
        }
        if let Some(rival) = message.rival {
            self.events.push_back(Event::Rival(rival));
        }
        if let Some(refused) = &message.refused {
            self.events.push_back(Event::Refused(refused.reason(), refused.message.clone()));
        }
    }

    fn handle_welcome(&mut self, welcome: &Welcome, server: SocketAddr, now: Instant) {
        let Ok(identity) = Identity::from_welcome(welcome) else {
            tracing::warn!("the server's welcome makes no sense, ignored");
            return;
        };
        self.link_up = true;
        // It was in the hello.
        self.handle_key_stored(self.keys.public(), now);
        if self.sighting.rtt().is_some() {
            // It was in the hello.
            self.note_announced(false, now);
        }
        if self.netmap.identity.as_ref() != Some(&identity) {
            self.netmap.identity = Some(identity.clone());
            self.events.push_back(Event::Save);
        }
        self.events.push_back(Event::Identity(identity.clone()));
        if let Some(port) = welcome.relay_port {
            let relay = SocketAddr::new(server.ip(), port);
            let second = welcome.second_port.map(|port| SocketAddr::new(server.ip(), port));
            self.prediction.set_second_port(second);
            self.relay.start(relay, identity.id, RelayKey(welcome.relay_key), now);
            self.hurry_lines(now);
            self.handle_relay_timeout(now);
        }
        self.publish();
        self.update_peers(now);
        self.ask_again();
    }

    fn handle_update(&mut self, update: &NetmapUpdate, now: Instant) {
        let leaving = self.leaving(update, now);
        let was_part = self.netmap.members.is_some();
        let diff = match self.netmap.apply(update) {
            Ok(diff) => diff,
            Err(error) => {
                // A new connection brings the whole netmap.
                tracing::warn!(%error, "netmap update does not fit");
                self.events.push_back(Event::Refused(RefusedCode::BadRequest, error.to_string()));
                return;
            }
        };
        self.note_removed(leaving);
        for id in diff.removed.iter().chain(&diff.forgotten) {
            self.drop_peer(*id);
        }
        for id in &diff.replaced {
            self.make_peer(*id, now);
        }
        for id in &diff.rekeyed {
            self.rekey_peer(*id, now);
        }
        if !diff.rekeyed.is_empty() {
            self.events.push_back(Event::PeerKeys);
        }
        if diff.filter {
            self.filter = Filter::new(&self.netmap.filter).map(Arc::new);
            self.events.push_back(Event::Rules);
        }
        let others = [&diff.removed, &diff.forgotten, &diff.replaced, &diff.rekeyed];
        let same_peers = others.into_iter().all(|ids| ids.is_empty());
        if diff.filter || !same_peers || self.netmap.members.is_some() != was_part {
            self.publish();
        }
        self.look_at_expiry(now);
        for id in self.in_own_order(diff.replaced.iter().chain(&diff.changed).copied()) {
            self.update_peer(id, now);
        }
        self.handle_found_peers(&diff.replaced, now);
        if update.from.is_none() || !update.removed.is_empty() || diff.filter {
            self.acknowledge();
        }
        self.events.push_back(Event::Save);
    }

    /// Tells the server what is in effect here, once for all that has come since the last time.
    /// Only of what takes something away: who is waited for is who might still let a removed node
    /// in, and a thousand nodes that come back need no million answers.
    fn acknowledge(&mut self) {
        self.messages.retain(|message| message.applied.is_none());
        let applied = Some(self.netmap.epoch);
        self.messages.push_back(ClientMessage { applied, ..ClientMessage::default() });
    }

    /// The control connection is gone. Direct paths do not care; the relay is checked at once.
    pub fn handle_link_down(&mut self, now: Instant) {
        self.link_up = false;
        self.note_no_server();
        self.relay.hurry(now);
        self.handle_relay_timeout(now);
        self.update_peers(now);
    }

    /// The membership ended: no peer may be talked to any more.
    pub fn handle_removed(&mut self, now: Instant) {
        self.link_up = false;
        self.relay.stop();
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            self.drop_peer(id);
        }
        self.netmap = super::Netmap::default();
        self.filter = None;
        self.publish();
        self.events.push_back(Event::Save);
        self.update_peers(now);
    }

    /// The endpoints of our sockets on the local interfaces. When one is gone, so may be every path;
    /// one more may make a better one.
    pub fn handle_host_endpoints(&mut self, mut endpoints: Vec<SocketAddr>, now: Instant) {
        endpoints.retain(|endpoint| {
            let overlay = self
                .netmap
                .identity
                .as_ref()
                .is_some_and(|identity| identity.range.contains(endpoint.ip()));
            usable_underlay(*endpoint) && !overlay
        });
        endpoints.sort_unstable();
        endpoints.dedup();
        // Rounds have started without what is seen at the first look; they need no other for it.
        let first = !std::mem::replace(&mut self.looked_at_host, true);
        if endpoints == self.host_endpoints {
            return;
        }
        let gone = self.host_endpoints.iter().any(|endpoint| !endpoints.contains(endpoint));
        self.host_endpoints = endpoints;
        self.announce(None, now);
        if gone {
            self.handle_network_change(now);
        } else if !first {
            self.relay.verify(now);
            self.tell_agents(now, |agent, now| agent.handle_more_addresses(now));
        }
    }

    /// The server saw us at `observed`.
    pub(super) fn handle_reflexive(&mut self, observed: SocketAddr, now: Instant) {
        self.announce(Some(observed), now);
    }

    /// Tells the server and, with the next call-me-maybe, the peers where we may be reached.
    pub(super) fn announce(&mut self, reflexive: Option<SocketAddr>, now: Instant) {
        let reflexive = reflexive.or(self.reflexive);
        self.reflexive = reflexive.filter(|endpoint| {
            usable_underlay(*endpoint) && !self.host_endpoints.contains(endpoint)
        });
        let reflexive = self.reflexive.map(|at| Candidate::new(at, CandidateKind::Reflexive));
        let host = |endpoint: &SocketAddr| Candidate::new(*endpoint, CandidateKind::Host);
        // An endpoint that has two kinds is told with the first: a mapping that lets anybody in
        // needs no opener, one that may not be there does.
        let mut candidates: Vec<Candidate> = self.mapped.candidates(true).collect();
        candidates.extend(reflexive);
        candidates.extend(self.mapped.candidates(false));
        candidates.extend(self.uplinks.candidates());
        candidates.retain(|candidate| usable_underlay(candidate.endpoint));
        candidates.extend(self.host_endpoints.iter().map(host));
        let mut seen = BTreeSet::new();
        candidates.retain(|candidate| seen.insert(candidate.endpoint));
        candidates.truncate(MAX_CANDIDATES);
        if candidates == self.announced {
            return;
        }
        self.announced = candidates;
        self.call_epoch += 1;
        self.messages.push_back(ClientMessage {
            candidates: Some(self.announced.iter().map(|candidate| (*candidate).into()).collect()),
            ..ClientMessage::default()
        });
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.agent.handle_own_candidates(now);
            }
            self.drain_agent(id, now);
        }
    }

    /// What the netmap says of a peer.
    #[must_use]
    pub fn peer_info(&self, id: NodeId) -> Option<&PeerInfo> {
        self.netmap.peers.get(&id)
    }
}
