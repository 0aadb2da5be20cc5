//! One peer's control state, and what of it the data plane gets to see.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;

use super::disco::RecentPings;
use super::keyring::PeerKeys;
use super::lanes::SecondLane;
use super::part::UseRecord;
use super::report::Insight;
use super::{Event, Netmap, Node};
use crate::dataplane::{ForwardingTable, Peer, SLOT_MASK, flush_pending, send_keepalive};
use crate::path::{PathAgent, PathEvent, PathTransmit, Via, WORTH_A_PATH};
use crate::policy::Filter;
use crate::types::{BASE_MTU, Candidate, CandidateKind, NodeId};
use crate::wire::disco::Message;

/// Who has gone is often back soon, from sleep or a restart: our NAT is kept open for it so long.
const EXPECTED_BACK: Duration = Duration::from_secs(15 * 60);

#[derive(Debug)]
pub(super) struct PeerControl {
    /// What packets see of it.
    pub(super) fast: Arc<Peer>,
    pub(super) agent: PathAgent,
    /// What of its pings was answered lately.
    pub(super) pings: RecentPings,
    pub(super) keys: PeerKeys,
    /// Somebody waits for a session with it.
    pub(super) session_wanted: bool,
    /// When the last packet was sent to it, as the traffic tick saw it last.
    pub(super) used_at: Option<Instant>,
    /// When an unknown session of this peer was last answered with a handshake.
    pub(super) stale_at: Option<Instant>,
    /// What is kept to explain its paths.
    pub(super) insight: Insight,
    /// When packets have waited for a path for too long.
    pub(super) waiting_until: Option<Instant>,
    pub(super) use_record: UseRecord,
    /// The server does not see it, and it was heard by relay: it counts as present until then.
    pub(super) heard_until: Option<Instant>,
    /// It is wanted and not there: whether it still is wanted is asked again then.
    pub(super) lapses_at: Option<Instant>,
    /// It went away while data went straight to it, and is expected back until then.
    pub(super) expected_until: Option<Instant>,
    pub(super) second: SecondLane,
}

impl Node {
    /// Takes a saved netmap as the truth until the server says otherwise.
    pub(super) fn restore(&mut self, netmap: Netmap, now: Instant) {
        self.netmap = netmap;
        self.filter = Filter::new(&self.netmap.filter).map(Arc::new);
        let ids: Vec<NodeId> = self.netmap.peers.keys().copied().collect();
        let eager = ids.len() <= self.settings.eager_peers;
        for id in ids {
            self.make_peer(id, now);
            // A peer that we talked to in an earlier life has keys for us that we have lost, and
            // would not notice before it renews them: the first handshake is ours, whoever we are.
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.session_wanted = eager;
            }
        }
        self.publish();
        self.update_peers(now);
    }

    /// Makes the control state of a peer that is new in the netmap, or whose addresses changed.
    pub(super) fn make_peer(&mut self, id: NodeId, now: Instant) {
        self.drop_peer(id);
        if self.is_over(id, now) {
            return;
        }
        let Some(info) = self.netmap.peers.get(&id) else { return };
        let keys = PeerKeys::new(&self.keys, info.node_key);
        let table = self.shared.table();
        let index = loop {
            let index = self.rng.random_range(1..1 << 24) & !SLOT_MASK;
            let taken =
                table.has_index(index) || self.peers.values().any(|peer| peer.fast.index == index);
            if !taken {
                break index;
            }
        };
        let session = self.first_session(&keys, index);
        let mut agent = PathAgent::new(self.rng.random(), now);
        agent.set_mtu_limit(self.settings.max_mtu);
        agent.share_account(self.together.clone());
        agent.set_uplinks(&self.uplinks.sockets(), now);
        let peer = PeerControl {
            fast: Peer::new(id, info.addrs, index, session),
            agent,
            pings: RecentPings::default(),
            keys,
            session_wanted: false,
            used_at: None,
            stale_at: None,
            insight: Insight::new(now),
            waiting_until: None,
            use_record: UseRecord::new(now),
            heard_until: None,
            lapses_at: None,
            expected_until: None,
            second: SecondLane::default(),
        };
        self.peers.insert(id, peer);
        self.index_keys(id);
    }

    /// Forgets a peer, its session included.
    pub(super) fn drop_peer(&mut self, id: NodeId) {
        self.unindex_keys(id);
        if let Some(peer) = self.peers.remove(&id) {
            if peer.fast.set_mtu(BASE_MTU) {
                self.events.push_back(Event::Mtu { addrs: peer.fast.addrs, mtu: BASE_MTU });
            }
            self.close_sockets_of(id);
            self.punching.forget_peer(id);
        }
    }

    /// Publishes a forwarding table of all peers.
    pub(super) fn publish(&mut self) {
        let own = self.netmap.identity.as_ref().map(|identity| identity.addrs);
        let mut table = ForwardingTable::new(own, self.relay.server());
        table.relay_socket = self.relay.socket();
        table.filter.clone_from(&self.filter);
        let identity = self.netmap.identity.as_ref();
        table.part_of = identity.filter(|_| self.netmap.members.is_some()).map(|own| own.range);
        for peer in self.peers.values() {
            table.insert(Arc::clone(&peer.fast));
            peer.keys.tags().for_each(|tag| table.expect_disco(tag, peer.fast.id));
        }
        self.shared.publish(table);
    }

    /// Tells every agent what the netmap, the relay and use mean for it.
    pub(super) fn update_peers(&mut self, now: Instant) {
        for id in self.in_own_order(self.peers.keys().copied()) {
            self.update_peer(id, now);
        }
    }

    /// Each node has an order of its own, or all would start with the same peers.
    pub(super) fn in_own_order(&self, ids: impl Iterator<Item = NodeId>) -> Vec<NodeId> {
        let own = self.netmap.identity.as_ref().map_or(0, |identity| identity.id.number());
        let mut ids: Vec<NodeId> = ids.collect();
        ids.sort_unstable_by_key(|id| scatter(own ^ id.number()));
        ids
    }

    /// Those who waited for others to start first ask again.
    pub(super) fn handle_pace_timeout(&mut self, now: Instant) {
        if self.pace.next_at().is_some_and(|at| at <= now) {
            self.pace.ask_again();
            self.update_peers(now);
        }
    }

    /// Tells the agent of one peer what the netmap, the relay and use mean for it.
    pub(super) fn update_peer(&mut self, id: NodeId, now: Instant) {
        let relay = self.relay_path();
        let eager = self.netmap.peers.len() <= self.settings.eager_peers;
        self.pace.set_peers(self.netmap.peers.len());
        let link_up = self.link_up;
        let signalling = self.signalling(id);
        let present = self.is_present(id);
        let (Some(peer), Some(info)) = (self.peers.get_mut(&id), self.netmap.peers.get(&id)) else {
            return;
        };
        let last_direct = info
            .last_direct
            .filter(|last| !info.candidates.iter().any(|candidate| candidate.endpoint == *last))
            .map(|last| Candidate::new(last, CandidateKind::PeerReflexive));
        let candidates: Vec<Candidate> =
            last_direct.into_iter().chain(info.candidates.iter().copied()).collect();
        let unused_at = peer.used_at.map(|at| at + WORTH_A_PATH).filter(|at| *at > now);
        let direct = matches!(peer.agent.choice().primary, Some(Via::Direct { .. }));
        if info.online {
            peer.heard_until = None;
        }
        let reachable = link_up && present;
        let eager = eager && (reachable || !link_up || direct);
        // A direct path that nobody could help to make again is kept, used or not.
        if reachable {
            peer.expected_until = None;
        } else if direct {
            peer.expected_until = Some(now + EXPECTED_BACK);
        }
        let expected_until = peer.expected_until.filter(|until| *until > now);
        let worth = eager || expected_until.is_some();
        let going = peer.agent.is_wanted() || eager && direct;
        let wanted = unused_at.is_some() || worth && (going || self.pace.take(now));
        let lapses = wanted && !reachable;
        peer.lapses_at =
            lapses.then(|| unused_at.max(expected_until).unwrap_or(now + WORTH_A_PATH));
        peer.insight.note_presence(info.online, now);
        peer.agent.set_signalling(signalling);
        peer.agent.set_candidates(&candidates, now);
        if !info.online && link_up {
            // Gone, or cut off from the server only? Its path can tell.
            peer.agent.verify(now);
        }
        peer.agent.set_relay(relay.filter(|_| present), now);
        peer.agent.set_wanted(wanted, now);
        self.drain_agent(id, now);
        // One side of a pair makes the session before anybody asks.
        let own = self.netmap.identity.as_ref().map(|identity| identity.id);
        if wanted && own < Some(id) {
            self.want_session(id, now);
        }
    }

    /// The path by which every online peer can be reached, if there is a relay.
    pub(super) fn relay_path(&self) -> Option<Via> {
        if self.relay.is_bound() {
            Some(Via::RelayUdp)
        } else {
            self.link_up.then_some(Via::RelayTcp)
        }
    }

    /// Carries out what a path agent wants, and publishes its choice.
    pub(super) fn drain_agent(&mut self, id: NodeId, now: Instant) {
        self.close_idle_sockets(id, now);
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let (mut moved, mut newly_direct) = (false, false);
        while let Some(event) = peer.agent.poll_event() {
            let PathEvent::Primary { from, to, why } = event;
            moved = true;
            let is_direct = |via| matches!(via, Some(Via::Direct { .. }));
            newly_direct |= is_direct(to) && !is_direct(from);
            peer.insight.note_path(&peer.agent, from, to, why, now);
            if !is_upgrade(from, to) {
                // What is under way on the old path is lost.
                for mut lane in peer.fast.lanes() {
                    lane.sessions_mut().for_each(|session| session.hurry(now));
                }
            }
            if let (Some(Via::Direct { remote, .. }), Some(info)) =
                (to, self.netmap.peers.get_mut(&id))
                && info.last_direct != Some(remote)
            {
                info.last_direct = Some(remote);
                self.events.push_back(Event::Save);
            }
            if matches!((from, to), (Some(Via::Direct { .. }), Some(Via::RelayUdp))) {
                // Perhaps it was not the path that died but all of UDP.
                self.relay.hurry(now);
            }
            self.events.push_back(Event::Path { peer: id, from, to, why });
        }
        peer.fast.set_choice(peer.agent.choice());
        let mtu = peer.agent.mtu(now);
        let by_udp_relay = peer.agent.choice().primary == Some(Via::RelayUdp);
        peer.fast.set_long_by_link(self.link_up && by_udp_relay && mtu < BASE_MTU);
        if peer.fast.set_mtu(mtu) {
            self.events.push_back(Event::Mtu { addrs: peer.fast.addrs, mtu });
        }
        while let Some(transmit) = self.peers.get_mut(&id).and_then(|p| p.agent.poll_transmit()) {
            match transmit {
                PathTransmit::Opener { remote, socket, tx } => {
                    self.send_opener(id, remote, socket, tx);
                }
                PathTransmit::Ping { via, tx } => {
                    if let Some(peer) = self.peers.get_mut(&id) {
                        let sent = peer.fast.records().sent.of(via);
                        peer.agent.handle_counts(via, sent, now);
                    }
                    self.send_disco(id, via, &Message::ping(tx, self.able()));
                }
                PathTransmit::Sized { via, tx, inner, whole } => {
                    self.send_sized(id, via, tx, inner, whole);
                }
                PathTransmit::Keepalive { via } => {
                    if let Some(peer) = self.peers.get(&id) {
                        let table = self.shared.table();
                        send_keepalive(&table, &peer.fast, via, now, &mut self.datagrams);
                    }
                }
                PathTransmit::Pong { via, tx } => {
                    let peer = self.peers.get(&id);
                    let arrived = peer.map(|it| it.fast.records().arrived.report(via));
                    let observed = match via {
                        Via::Direct { remote, .. } => Some(remote),
                        Via::RelayUdp | Via::RelayTcp => None,
                    };
                    self.send_disco(id, via, &Message::Pong { tx, observed, arrived });
                }
                PathTransmit::CallMeMaybe { via } => {
                    let candidates = self.call_candidates(now);
                    let message = Message::CallMeMaybe { epoch: self.call_epoch, candidates };
                    self.send_disco(id, via, &message);
                }
            }
        }
        if moved {
            if self.is_direct(id) {
                self.note_direct(id, newly_direct, now);
            }
            self.handle_path_change(id, now);
        }
        if self.peers.get(&id).is_some_and(|peer| peer.agent.is_asking()) {
            self.handle_silent_path(now);
        }
    }

    /// There is another path: what waited for one goes. A handshake under way on a path that was
    /// only left for a better one goes on, since its answer is as good as a new one's and sooner.
    fn handle_path_change(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.agent.choice().primary.is_none() {
            return;
        }
        if peer.session_wanted {
            self.try_handshake(id, now);
        }
        self.flush(id, now);
    }

    /// Sends what waited for a session or a path.
    pub(super) fn flush(&mut self, id: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get(&id) {
            let table = self.shared.table();
            flush_pending(&self.shared, &table, &peer.fast, now, &mut self.datagrams);
        }
    }
}

/// Multiplicative hashing: neighbours end up far apart.
fn scatter(number: u32) -> u32 {
    number.wrapping_mul(0x9e37_79b1)
}

/// Whether data left a path only because a better kind answered.
fn is_upgrade(from: Option<Via>, to: Option<Via>) -> bool {
    let rank = |via: Option<Via>| match via {
        None => 0,
        Some(Via::RelayTcp) => 1,
        Some(Via::RelayUdp) => 2,
        Some(Via::Direct { .. }) => 3,
    };
    from.is_some() && rank(from) < rank(to)
}
