//! Everything that happens because time passes, and the list of all deadlines.
//!
//! - each path agent: probes, doubt, keepalives, retries
//! - each session: a handshake to repeat, keys to renew, the engine's own timers
//! - the relay: binds
//! - uplinks: questions whether they work, and the relay by another one
//! - old node keys, ours and those of peers, which go when they are no longer needed
//! - the traffic tick: tells the agents of busy peers what the data plane counted
//! - a costly way to a peer that is due, or under way
//! - peers that were heard of by relay alone
//! - packets that have waited for a path for too long
//! - user pings that nobody answered

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Node;
use crate::dataplane::{MIN_SEAL_BUFFER, Session, send_datagram};
use crate::path::{Soonest, TRAFFIC_TICK, Traffic, Via};
use crate::types::NodeId;

/// The engine's timers are whole seconds: looking more often would only wake an idle machine.
const ENGINE_TICK: Duration = Duration::from_secs(1);
/// A peer that was not sent to for this long is not watched.
const QUIET: Duration = Duration::from_secs(2);
/// Sent by UDP and heard nothing for this long: does the server still answer by UDP?
const UDP_PATIENCE: Duration = Duration::from_secs(1);
/// An unanswered user ping is forgotten after this.
const PING_LIFETIME: Duration = Duration::from_secs(30);

impl Node {
    /// Does all that is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.handle_relay_timeout(now);
        self.handle_uplinks_timeout(now);
        self.handle_sighting_timeout(now);
        self.handle_look_timeout(now);
        self.handle_pace_timeout(now);
        self.handle_punch_timeout(now);
        self.handle_waiting_timeout(now);
        self.handle_keys_timeout(now);
        self.handle_expiry_timeout(now);
        self.handle_presence_timeout(now);
        self.handle_wanted_timeout(now);
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let agents: Vec<NodeId> = self
            .peers
            .iter()
            .filter(|(_, peer)| due(peer.agent.poll_timeout().map(|(at, _)| at)))
            .map(|(id, _)| *id)
            .collect();
        for id in agents {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.agent.handle_timeout(now);
            }
            self.drain_agent(id, now);
        }
        if due(self.traffic_tick_at) {
            self.handle_traffic_tick(now);
        }
        let engine_due = due(self.engine_tick_at);
        let sessions: Vec<NodeId> = self
            .peers
            .iter()
            .filter(|(_, peer)| {
                engine_due
                    || peer.fast.lanes().any(|lane| due(lane.poll_timeout().map(|(at, _)| at)))
            })
            .map(|(id, _)| *id)
            .collect();
        for id in sessions {
            self.handle_session_timeout(id, now);
        }
        if engine_due {
            let any = self.peers.values().any(|peer| peer.fast.lock().session.is_usable(now));
            self.engine_tick_at = any.then(|| now + ENGINE_TICK);
        }
        self.open_pings.retain(|_, (_, at)| now.saturating_duration_since(*at) < PING_LIFETIME);
    }

    /// When [`Self::handle_timeout`] has something to do, and what.
    ///
    /// All peers are looked at each time. A list in order of time would have to be told of every change
    /// of a peer, and the packet threads move the deadlines of sessions without a word.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let mut soonest = Soonest::default();
        for peer in self.peers.values() {
            let lanes = peer.fast.lanes().filter_map(|lane| lane.poll_timeout());
            for (at, what) in lanes.chain(peer.agent.poll_timeout()) {
                soonest.add(Some(at), what);
            }
            soonest.add(peer.waiting_until, "packets wait for a path");
            soonest.add(peer.keys.next_at(), "a peer's old key");
            soonest.add(peer.heard_until, "a peer that the server does not see");
            soonest.add(peer.lapses_at, "a peer that is away may be wanted no more");
        }
        soonest.add(self.wanted.next_at(), "peers of a large network");
        soonest.add(self.relay.next_at(), "relay bind");
        soonest.add(self.uplinks_next_at(), "uplinks");
        soonest.add(self.keys.next_at(), "our own keys");
        soonest.add(self.calendar.next_at(), "a membership ends");
        soonest.add(self.sighting.next_at(), "where are we seen");
        soonest.add(self.pace.next_at(), "next peer that nobody asked for");
        soonest.add(self.prediction.next_at(), "look at the NAT's counter");
        soonest.add(self.punch_next_at(), "costly way to a peer");
        soonest.add(self.traffic_tick_at, "traffic tick");
        soonest.add(self.engine_tick_at, "session engine");
        soonest.get()
    }

    fn handle_traffic_tick(&mut self, now: Instant) {
        let (mut busy, mut udp_silent) = (false, false);
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            let counters = &peer.fast.counters;
            let sent = self.shared.unstamp(counters.last_sent.load(Ordering::Relaxed));
            let heard = self.shared.unstamp(counters.last_heard_primary.load(Ordering::Relaxed));
            let quiet = |at: Instant| now.saturating_duration_since(at) > QUIET;
            if sent.is_none_or(quiet) {
                self.let_second_go(id);
                continue;
            }
            busy = true;
            peer.used_at = peer.used_at.max(sent);
            if let Some(via) = peer.agent.choice().primary {
                let counts = peer.fast.records().sent.of(via);
                peer.agent.handle_counts(via, counts, now);
            }
            peer.agent.handle_traffic(Traffic { sent, heard }, now);
            // Who only answers notices nothing else of it when all UDP has failed here.
            let by_udp = peer.agent.choice().primary != Some(Via::RelayTcp);
            udp_silent |=
                by_udp && heard.is_none_or(|at| now.saturating_duration_since(at) > UDP_PATIENCE);
            self.drain_agent(id, now);
            self.look_at_lanes(id, now);
        }
        if udp_silent {
            self.relay.verify(now);
        }
        self.traffic_tick_at = busy.then(|| now + TRAFFIC_TICK);
    }

    fn handle_session_timeout(&mut self, id: NodeId, now: Instant) {
        let wanted = self.wanted_keys(id);
        let via = self.peers.get(&id).and_then(|peer| peer.agent.choice().primary);
        self.handle_second_timeout(id, via, now);
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let mut state = peer.fast.lock();
        let waiting = state.expire_pending(self.shared.drops(), now);
        let Some(via) = via else {
            // Without a path an initiation would only use up its waits; the next path hurries it.
            state.sessions_mut().for_each(Session::give_up);
            return;
        };
        state.settle(now);
        state.retire_sessions(now);
        let newest = state.newest_usable(now);
        let mut renewed = false;
        let table = self.shared.table();
        for session in state.sessions_mut() {
            // Nothing is renewed of keys that are on their way out.
            let outranked = newest.is_some_and(|newest| newest > session.rank());
            let outdated = !wanted.contains(&(session.own_key(), session.peer_key()));
            renewed |= outdated && !outranked && session.is_due(now);
            if outranked || outdated {
                session.give_up();
            }
            let mut datagram = [0; MIN_SEAL_BUFFER];
            let sent = session.handle_timeout(&mut datagram, now);
            if outranked || outdated {
                session.give_up();
            } else if let Some(len) = sent {
                send_datagram(&table, id, via, &datagram[..len], &mut self.datagrams);
            }
        }
        let usable = state.session.is_usable(now);
        drop(state);
        if renewed || !usable && waiting {
            self.renew_session(id, now);
        }
    }

    /// Whether data to this peer goes straight.
    #[must_use]
    pub fn is_direct(&self, id: NodeId) -> bool {
        self.peers
            .get(&id)
            .is_some_and(|peer| matches!(peer.agent.choice().primary, Some(Via::Direct { .. })))
    }
}
