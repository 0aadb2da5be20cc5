//! The second lane with a busy peer: when it is made, and what keeps it going (`dataplane::lanes` says
//! what it is).
//!
//! It is made by the node with the higher id, which is the one that seals on it. The other one answers,
//! and needs not know of it before. A peer says in its pings that it understands two lanes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Node;
use crate::dataplane::{MIN_SEAL_BUFFER, Session, SessionSettings, send_datagram};
use crate::path::Via;
use crate::types::{NodeId, PublicKey};
use crate::wire::PacketKind;
use crate::wire::disco::TWO_LANES;

/// A second lane is never renewed by itself: the first one is older, and its renewal ends the second.
const NEVER: Duration = Duration::from_secs(3_600);

/// What is known of the second lane with one peer.
#[derive(Debug, Default)]
pub(super) struct SecondLane {
    /// The peer understands it.
    pub(super) is_known: bool,
    /// There is enough to do for two.
    is_wanted: bool,
    /// Bytes sent and received when the traffic tick looked last.
    seen: [u64; 2],
}

impl Node {
    /// What a ping of ours says that we can do.
    pub(super) fn able(&self) -> u8 {
        if self.settings.second_lane_from == u64::MAX { 0 } else { TWO_LANES }
    }

    /// Looks at what went to and came from a peer since the last traffic tick.
    pub(super) fn look_at_lanes(&mut self, id: NodeId, now: Instant) {
        let enough = self.settings.second_lane_from;
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let counters = &peer.fast.counters;
        let bytes = [&counters.tx_bytes, &counters.rx_bytes].map(|it| it.load(Ordering::Relaxed));
        let before = std::mem::replace(&mut peer.second.seen, bytes);
        let busy = bytes.iter().zip(before).all(|(now, before)| now - before >= enough);
        if busy && !std::mem::replace(&mut peer.second.is_wanted, true) {
            self.try_second(id, now);
        }
    }

    /// Nothing was sent for a while.
    pub(super) fn let_second_go(&mut self, id: NodeId) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.second.is_wanted = false;
        }
    }

    /// Whether we are to make the second lane with this peer now.
    fn makes_second(&self, id: NodeId) -> bool {
        let own = self.netmap.identity.as_ref().map(|identity| identity.id);
        let peer = self.peers.get(&id).filter(|peer| peer.second.is_known && peer.second.is_wanted);
        own > Some(id) && peer.is_some_and(|peer| !peer.fast.seals_second())
    }

    /// Calls the peer on the second lane, if that is up to us and not under way.
    pub(super) fn try_second(&mut self, id: NodeId, now: Instant) {
        let Some(peer) = self.peers.get(&id).filter(|_| self.makes_second(id)) else { return };
        let Some(via) = peer.agent.choice().primary else { return };
        let first = peer.fast.lock();
        let keys = (first.session.own_key(), first.session.peer_key());
        let is_up = first.session.is_usable(now);
        drop(first);
        if !is_up || !self.prepare_second(id, keys, now) {
            return;
        }
        let mut initiation = [0; MIN_SEAL_BUFFER];
        let mut second = peer.fast.lock_second();
        let session = second.as_mut().and_then(|state| state.session_of(keys.0, keys.1));
        let sent = session.and_then(|session| session.initiate(&mut initiation, now));
        drop(second);
        if let Some(len) = sent {
            let table = self.shared.table();
            send_datagram(&table, id, via, &initiation[..len], &mut self.datagrams);
        }
    }

    /// Makes a session of these keys on the second lane, if there is none; tells whether that could be.
    pub(super) fn prepare_second(
        &self,
        id: NodeId,
        (own, other): (PublicKey, PublicKey),
        now: Instant,
    ) -> bool {
        let Some(peer) = self.peers.get(&id) else { return false };
        let Some(own) = self.keys.all().find(|key| key.public == own) else { return false };
        let settings = SessionSettings { rekey_after: NEVER };
        let make = |index| Session::new(&own.engine, &other, index, settings);
        peer.fast.prepare_second(own.public, other, make, now);
        true
    }

    /// The second lane was made, by our call.
    pub(super) fn handle_second_up(&self, id: NodeId) {
        if let Some(peer) = self.peers.get(&id) {
            peer.fast.seal_on_second(true);
        }
    }

    /// Does what is due on the second lane.
    pub(super) fn handle_second_timeout(&mut self, id: NodeId, via: Option<Via>, now: Instant) {
        let calls = self.makes_second(id);
        let Some(peer) = self.peers.get(&id) else { return };
        let Some(mut state) = peer.fast.lock_second() else { return };
        let used = state.sessions_mut().filter_map(|session| session.last_data()).max();
        state.settle(now);
        state.retire_sessions(now);
        let table = self.shared.table();
        for session in state.sessions_mut() {
            if !calls || via.is_none() {
                session.give_up();
            }
            let mut datagram = [0; MIN_SEAL_BUFFER];
            let Some(len) = session.handle_timeout(&mut datagram, now) else { continue };
            let is_call = PacketKind::classify(&datagram[..len]) == PacketKind::HandshakeInitiation;
            match via {
                Some(via) if calls || !is_call => {
                    send_datagram(&table, id, via, &datagram[..len], &mut self.datagrams);
                }
                _ => session.give_up(),
            }
        }
        drop(state);
        // Its keys are renewed as long as either lane is in use.
        peer.fast.lock().session.note_data(used);
    }
}
