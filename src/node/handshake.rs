//! WireGuard handshakes in and out. A session lives above paths: which way a handshake came only
//! decides where the answer goes.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::Node;
use crate::dataplane::{MIN_SEAL_BUFFER, send_datagram, sender_index};
use crate::path::{TRAFFIC_TICK, Via};
use crate::types::{DropReason, NodeId, PublicKey};

/// How a handshake message names its session.
#[derive(Debug, Clone, Copy)]
enum Named {
    /// By our node key and the peer's, and the lane: it starts a handshake.
    Keys(PublicKey, PublicKey, Lane),
    /// By our receiver index.
    Receiver(u32),
}

/// One of the two lanes with a peer (see `lanes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    First,
    Second,
}

/// A handshake because of an unknown session is started at most this often per peer.
const STALE_SPACING: Duration = Duration::from_secs(1);

impl Node {
    pub(super) fn handle_initiation(
        &mut self,
        via: Via,
        relayed: Option<NodeId>,
        from: IpAddr,
        datagram: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        let (own, key) = self.keys.sender_of(datagram)?;
        let id = *self.peers_by_key.get(&key).ok_or(DropReason::BadHandshake)?;
        if relayed.is_some_and(|from| from != id) {
            return Err(DropReason::BadRelayFrame);
        }
        let second =
            |sender| self.peers.get(&id).map(|peer| peer.fast.calls_second(own, key, sender));
        let lane = if sender_index(datagram).and_then(second).unwrap_or(false) {
            self.prepare_second(id, (own, key), now);
            Lane::Second
        } else {
            self.prepare_session_of(id, own, key, now);
            Lane::First
        };
        self.handle_handshake(id, Named::Keys(own, key, lane), via, from, datagram, now)
    }

    pub(super) fn handle_handshake_reply(
        &mut self,
        via: Via,
        receiver: u32,
        from: IpAddr,
        datagram: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        let table = self.shared.table();
        let id = table.by_receiver(receiver).ok_or(DropReason::UnknownSession)?.id;
        self.handle_handshake(id, Named::Receiver(receiver), via, from, datagram, now)
    }

    fn handle_handshake(
        &mut self,
        id: NodeId,
        named: Named,
        via: Via,
        from: IpAddr,
        datagram: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        let peer = self.peers.get_mut(&id).ok_or(DropReason::BadHandshake)?;
        let mut reply = [0; MIN_SEAL_BUFFER];
        let is_cookie = datagram.first() == Some(&3);
        let lane = match named {
            Named::Keys(.., lane) => lane,
            Named::Receiver(receiver) if peer.fast.is_second(receiver) => Lane::Second,
            Named::Receiver(_) => Lane::First,
        };
        let mut state = match lane {
            Lane::First => peer.fast.lock(),
            Lane::Second => peer.fast.lock_second().ok_or(DropReason::UnknownSession)?,
        };
        let session = match named {
            Named::Keys(own, key, _) => state.session_of(own, key),
            Named::Receiver(receiver) => state.session_at(receiver),
        };
        let session = session.ok_or(DropReason::UnknownSession)?;
        let outcome = session.handle_handshake(datagram, from, &mut reply, now)?;
        let own = session.own_key();
        state.settle(now);
        drop(state);
        if outcome.established && lane == Lane::First {
            peer.fast.seal_on_second(false);
        }
        let proved = peer.agent.choice().primary == Some(via);
        // A cookie proves nothing about its sender: who has seen our handshake can make one.
        if !is_cookie {
            peer.agent.handle_authenticated(via, now);
            self.note_heard_under(id, own, now);
            self.note_present(id, via, now);
        }
        let peer = self.peers.get_mut(&id).ok_or(DropReason::BadHandshake)?;
        if let Some(len) = outcome.reply {
            let relay = peer.agent.choice().primary.filter(|it| !proved && it.is_relay());
            let mut ways = vec![via];
            if via.is_relay() {
                ways.extend(peer.agent.beside_pings(now));
            } else {
                // It may be a way in only, and the copy by relay is not answered any more.
                ways.extend(relay);
            }
            self.send_on_all(id, &ways, &reply[..len]);
        }
        self.drain_agent(id, now);
        if outcome.established {
            self.handshakes += 1;
            match lane {
                Lane::First => self.handle_session_up(id, now),
                Lane::Second => self.handle_second_up(id),
            }
        }
        Ok(())
    }

    /// Both sides have keys: what waited can go.
    pub(super) fn handle_session_up(&mut self, id: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.session_wanted = false;
            peer.fast.session_request_heard();
            let own = peer.fast.lock().session.own_key();
            self.note_heard_under(id, own, now);
        }
        self.engine_tick_at.get_or_insert(now);
        self.flush(id, now);
        self.try_second(id, now);
    }

    /// The data plane has packets for a peer, and no session or no path.
    pub(super) fn handle_session_wanted(&mut self, id: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get(&id) {
            peer.fast.session_request_heard();
        }
        self.note_use(id, now);
        self.want_session(id, now);
        // The session may have come up between the packet and this note.
        self.flush(id, now);
        self.look_at_waiting(id, now);
    }

    /// The first packet after a pause.
    pub(super) fn handle_active(&mut self, id: NodeId, now: Instant) {
        self.note_use(id, now);
        self.relay.verify(now);
        self.traffic_tick_at.get_or_insert(now + TRAFFIC_TICK);
    }

    /// Authenticated data came by another way than the primary.
    pub(super) fn handle_heard(&mut self, id: NodeId, via: Via, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.agent.handle_authenticated(via, now);
            self.drain_agent(id, now);
        }
    }

    /// A peer sends under keys that we do not have (any more): a handshake of ours replaces them.
    /// Nothing here is authenticated, so it costs one initiation a second at most.
    pub(super) fn handle_stale(&mut self, via: Via, relayed: Option<NodeId>, now: Instant) {
        let sender = relayed.or_else(|| {
            let Via::Direct { remote, .. } = via else { return None };
            self.peers.iter().find(|(_, peer)| peer.agent.knows(remote)).map(|(id, _)| *id)
        });
        let Some(peer) = sender.and_then(|id| self.peers.get_mut(&id)) else { return };
        let id = peer.fast.id;
        let recent = |at: Instant| now.saturating_duration_since(at) < STALE_SPACING;
        if peer.stale_at.is_some_and(recent) {
            return;
        }
        peer.stale_at = Some(now);
        self.renew_session(id, now);
    }

    /// Makes new keys with a peer, whatever the ones there are seem worth.
    pub(super) fn renew_session(&mut self, id: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.session_wanted = true;
            self.try_handshake(id, now);
        }
    }

    /// Somebody uses this peer: its path is worth keeping.
    pub(super) fn note_use(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let before = peer.used_at.replace(now);
        let let_go = peer.use_record.touch(now);
        if before.is_none_or(|at| now.saturating_duration_since(at) > TRAFFIC_TICK * 10) {
            self.update_peer(id, now);
        }
        if let_go {
            self.ask_for(&id.to_string());
        }
    }

    /// Makes a session with a peer as soon as there is a path to it.
    pub(super) fn want_session(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.fast.lock().session.is_usable(now) {
            return;
        }
        if !peer.session_wanted {
            peer.session_wanted = true;
            self.try_handshake(id, now);
        }
    }

    /// Sends an initiation, if one is due and there is a path.
    pub(super) fn try_handshake(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get(&id) else { return };
        let Some(via) = peer.agent.choice().primary else { return };
        for (own, key) in self.wanted_sessions(id, now) {
            let Some(peer) = self.peers.get_mut(&id) else { return };
            let mut initiation = [0; MIN_SEAL_BUFFER];
            let mut state = peer.fast.lock();
            let session = state.session_of(own, key);
            let sent = session.and_then(|session| session.initiate(&mut initiation, now));
            drop(state);
            if let Some(len) = sent {
                let mut ways = vec![via];
                ways.extend(peer.agent.beside_pings(now));
                self.send_on_all(id, &ways, &initiation[..len]);
            }
        }
    }

    /// Sends a handshake message by several ways: the first copy that arrives counts.
    fn send_on_all(&mut self, id: NodeId, ways: &[Via], message: &[u8]) {
        let table = self.shared.table();
        for via in ways {
            send_datagram(&table, id, *via, message, &mut self.datagrams);
        }
    }
}
