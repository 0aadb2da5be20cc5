//! The network around us changes, or we were away: nothing that was proved holds, and both ways to
//! the server are tried at once.

use std::time::{Duration, Instant};

use super::Node;
use crate::path::PathAgent;
use crate::types::NodeId;
use crate::wire::control::ClientMessage;

/// The server is asked at most this often for the sake of a silent peer.
const ASK_SPACING: Duration = Duration::from_millis(500);

impl Node {
    /// Packets leave by another way than before: other addresses, or another default route.
    pub fn handle_network_change(&mut self, now: Instant) {
        self.announced_at = None;
        self.sighting.stop();
        self.prediction.forget();
        self.forget_punching(now);
        self.filter_test = super::nat::FilterTest::default();
        self.update_signalling();
        self.relay.start_over(now);
        self.handle_relay_timeout(now);
        self.tell_agents(now, PathAgent::handle_network_change);
    }

    /// The machine slept, or the process stood still, for long enough that NATs and peers may have
    /// given us up. `suspended` tells that our clock stood still as well: then the keys may be older
    /// than they seem, and new ones are made.
    pub fn handle_wake(&mut self, suspended: bool, now: Instant) {
        self.ask_server(now);
        self.handle_network_change(now);
        if suspended {
            let ids: Vec<NodeId> = self.peers.keys().copied().collect();
            for id in ids {
                let known = self.peers.get(&id);
                if known.is_some_and(|peer| peer.fast.lock().session.is_usable(now)) {
                    self.renew_session(id, now);
                }
            }
        }
    }

    /// A peer does not answer on the direct path. Perhaps it is our NAT that has forgotten
    /// everything: then a bind opens it for the relay, and the server sees our new endpoint; and
    /// the control connection shows whether it is still one.
    pub(super) fn handle_silent_path(&mut self, now: Instant) {
        let recent = |at: Instant| now.saturating_duration_since(at) < ASK_SPACING;
        if self.asked_server_at.is_some_and(recent) {
            return;
        }
        self.ask_server(now);
        self.relay.ask(now);
        self.handle_relay_timeout(now);
    }

    /// Asks the server for a sign of life on the control connection.
    pub(super) fn ask_server(&mut self, now: Instant) {
        self.asked_server_at = Some(now);
        if self.link_up {
            let message = ClientMessage { ping: Some(self.call_epoch), ..ClientMessage::default() };
            self.messages.push_back(message);
        }
    }

    /// The last round trip to the relay.
    #[must_use]
    pub fn relay_rtt(&self) -> Option<Duration> {
        self.relay.rtt()
    }

    /// Tells every path agent something, and carries out what it wants.
    pub(super) fn tell_agents(
        &mut self,
        now: Instant,
        mut tell: impl FnMut(&mut PathAgent, Instant),
    ) {
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            if let Some(peer) = self.peers.get_mut(&id) {
                tell(&mut peer.agent, now);
            }
            self.drain_agent(id, now);
        }
    }
}
