//! Signing on at the relay over UDP, and the reflexive address that comes with it.
//!
//! A *bind* is sent until the server answers *bound*; after that often enough to keep the NAT
//! open. Without an answer UDP to the server counts as blocked, and relay frames go by the control
//! connection; binds go on, rarely.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Node;
use crate::dataplane::Target;
use crate::path::Via;
use crate::types::{DropReason, NodeId, SocketId};
use crate::wire::relay::{AddressProof, Control, Proving, RelayKey, verify};

/// Waits between binds that are not answered; the last one repeats.
pub(super) const RETRY: [Duration; 7] = [
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(20),
];
/// So many binds without an answer: UDP does not reach the server.
const SILENT_BINDS: usize = 4;
/// So many of them may be answered late.
const ANSWERABLE: usize = 8;
/// A relay that answered this long ago is not asked again, whatever seems silent.
const CHECK_SPACING: Duration = Duration::from_secs(2);
/// Keeps the NAT binding of the relay socket: 30 s on the worst common routers.
pub(super) const REFRESH: Duration = Duration::from_secs(20);
/// While somebody talks to us by relay, we want to know soon that UDP stopped reaching us: the
/// other side cannot tell.
const REFRESH_IN_USE: Duration = Duration::from_secs(5);
/// The same when there is another uplink to go by.
const REFRESH_WITH_CHOICE: Duration = Duration::from_secs(1);
/// A relayed peer that was heard or sent to this long ago needs the relay soon again.
const RELAYED_LATELY: Duration = Duration::from_secs(30);
/// Data that goes by the control connection has paused for this long: perhaps nothing can arrive any more.
const LINK_PAUSE: Duration = Duration::from_secs(2);

/// The node's side of the relay's sign-on.
#[derive(Debug, Default)]
pub(super) struct RelayClient {
    session: Option<RelaySession>,
    /// The socket that it is bound by.
    socket: SocketId,
}

#[derive(Debug)]
struct RelaySession {
    server: SocketAddr,
    node: NodeId,
    key: RelayKey,
    counter: u64,
    bound: bool,
    bound_at: Option<Instant>,
    unanswered: usize,
    next_at: Instant,
    /// The binds that may still be answered, newest last.
    sent: VecDeque<(u64, Instant)>,
    /// Other uplinks were asked because of this silence.
    called_others: bool,
    rtt: Option<Duration>,
    /// What only who receives at our address knows, as the server told it last.
    proof: AddressProof,
    /// Answers in a row that asked for it.
    asked_for_proof: usize,
}

impl RelaySession {
    /// The server says what proves our address. What it asks for is said at once, and more and more
    /// rarely to one that sees us somewhere else each time: until then it sends little to us by UDP.
    fn handle_proof(&mut self, Proving { proof, wanted }: Proving, now: Instant) {
        self.proof = proof;
        if !wanted {
            self.asked_for_proof = 0;
            return;
        }
        let again = self.asked_for_proof.checked_sub(1);
        let wait = again.map_or(Duration::ZERO, |tries| RETRY[tries.min(RETRY.len() - 1)]);
        self.next_at = self.next_at.min(now + wait);
        self.asked_for_proof += 1;
    }

    /// Whether the next bind only says what the last one could not.
    fn only_proves(&self) -> bool {
        self.asked_for_proof == 1 && self.unanswered == 0
    }
}

impl RelayClient {
    pub(super) fn server(&self) -> Option<SocketAddr> {
        self.session.as_ref().map(|session| session.server)
    }

    pub(super) fn is_bound(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.bound)
    }

    /// Whether UDP reaches the server and comes back; none when that is not known yet.
    pub(super) fn udp_works(&self) -> Option<bool> {
        let session = self.session.as_ref()?;
        (session.bound || session.unanswered >= SILENT_BINDS).then_some(session.bound)
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.session.as_ref().and_then(|session| session.rtt)
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        self.session.as_ref().map(|session| session.next_at)
    }

    /// A new control connection gave out a new key.
    pub(super) fn start(&mut self, server: SocketAddr, node: NodeId, key: RelayKey, now: Instant) {
        self.session = Some(RelaySession {
            server,
            node,
            key,
            counter: 0,
            bound: false,
            bound_at: None,
            unanswered: 0,
            next_at: now,
            sent: VecDeque::new(),
            called_others: false,
            rtt: None,
            proof: AddressProof::default(),
            asked_for_proof: 0,
        });
    }

    /// The socket that it is bound by.
    pub(super) fn socket(&self) -> SocketId {
        self.socket
    }

    /// Binds by this socket from now on.
    pub(super) fn set_socket(&mut self, socket: SocketId, now: Instant) {
        self.socket = socket;
        if let Some(session) = &mut self.session {
            session.unanswered = 0;
            session.sent.clear();
            session.next_at = now;
            session.called_others = false;
        }
    }

    /// When the first of the binds was sent that no answer has come to.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        let session = self.session.as_ref().filter(|session| session.unanswered > 0)?;
        session.sent.front().map(|(_, at)| *at)
    }

    /// Whether a second bind had to be sent; once for each silence.
    pub(super) fn wants_another(&mut self) -> bool {
        let Some(session) = &mut self.session else { return false };
        let wants = session.unanswered >= 2 && !session.called_others;
        session.called_others |= wants;
        wants
    }

    /// The main socket leaves by another way: what it owed by the last one says nothing.
    pub(super) fn start_over(&mut self, now: Instant) {
        if self.socket == SocketId::MAIN
            && let Some(session) = &mut self.session
        {
            session.sent.clear();
            session.called_others = false;
        }
        self.hurry(now);
    }

    /// The server ended the membership: there is no relay.
    pub(super) fn stop(&mut self) {
        self.session = None;
    }

    /// Checks whether the server still answers: at once, or a moment after the last answer.
    pub(super) fn verify(&mut self, now: Instant) {
        let Some(session) = &mut self.session else { return };
        if let (true, 0, Some(at)) = (session.bound, session.unanswered, session.bound_at) {
            session.next_at = session.next_at.min(now.max(at + CHECK_SPACING));
        }
    }

    /// Checks now whether the server still answers, and opens our NAT for it; an answer that is
    /// waited for already is waited for as before.
    pub(super) fn ask(&mut self, now: Instant) {
        if let Some(session) = &mut self.session
            && session.unanswered == 0
        {
            session.next_at = now;
        }
    }

    /// Checks soon whether the server still answers.
    pub(super) fn hurry(&mut self, now: Instant) {
        if let Some(session) = &mut self.session {
            session.unanswered = 0;
            session.next_at = now;
        }
    }
}

impl Node {
    /// Sends a bind if one is due.
    pub(super) fn handle_relay_timeout(&mut self, now: Instant) {
        let Some(session) = &mut self.relay.session else { return };
        if session.next_at > now {
            return;
        }
        session.counter += 1;
        session.sent.push_back((session.counter, now));
        if session.sent.len() > ANSWERABLE {
            session.sent.pop_front();
        }
        session.next_at = now + RETRY[session.unanswered.min(RETRY.len() - 1)];
        let only_proves = session.only_proves();
        session.unanswered += 1;
        let lost = session.bound && session.unanswered > SILENT_BINDS;
        let proof = Some(session.proof);
        let bind = Control::Bind { node: session.node, counter: session.counter, proof };
        let socket = self.relay.socket;
        let target = Target::Udp { remote: session.server, local: None, socket };
        self.datagrams.push_bytes(target, &bind.encode(Some(&session.key)));
        if !only_proves && socket == SocketId::MAIN {
            // The last bind's question is as good.
            self.ask_second_port();
        }
        if lost {
            if let Some(session) = &mut self.relay.session {
                session.bound = false;
            }
            self.update_peers(now);
        }
        self.check_quiet_link(now);
    }

    /// Without UDP, data comes by the control connection, and a NAT that has started over keeps it
    /// from us without a word: who sends is told by TCP, who only receives has to ask. Not while
    /// anything goes or comes, which an answer would have to wait behind.
    fn check_quiet_link(&mut self, now: Instant) {
        let used_at = self.relayed_at(Via::RelayTcp);
        let Some(pause) = used_at.map(|at| now.saturating_duration_since(at)) else { return };
        let Some(session) = &mut self.relay.session else { return };
        if session.bound || pause >= RELAYED_LATELY {
            return;
        }
        session.next_at = session.next_at.min(now + REFRESH_IN_USE);
        if pause >= LINK_PAUSE {
            self.ask_server(now);
        }
    }

    /// The server answered a bind.
    pub(super) fn handle_relay_control(
        &mut self,
        from: SocketAddr,
        socket: SocketId,
        datagram: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        let relaying = self.is_relaying(now);
        let has_choice = self.uplinks.has_choice(from);
        let message = Control::parse(datagram).map_err(|_| DropReason::BadRelayFrame)?;
        if let Control::Reflected { tx, observed, token } = message {
            let from_server = self.relay.server() == Some(from);
            let ours = from_server && self.handle_line_seen(socket, tx, observed, now)
                || self.handle_sighted(from, tx, (observed, token), now)
                || self.handle_reflected(from, tx, observed, now)
                || self.handle_server_heard(from, tx)
                || self.handle_fresh_port(tx, observed, now);
            return if ours { Ok(()) } else { Err(DropReason::BadRelayFrame) };
        }
        if let Control::Knocked { tx, at } = message {
            let ours = self.handle_knocked(tx, at);
            return if ours { Ok(()) } else { Err(DropReason::BadRelayFrame) };
        }
        let Some(session) = &mut self.relay.session else { return Err(DropReason::BadRelayFrame) };
        let Control::Bound { node, counter, observed, proof } = message else {
            return Err(DropReason::BadRelayFrame);
        };
        // What was asked by a line that was left says nothing of the one in use.
        let genuine = from == session.server
            && socket == self.relay.socket
            && node == session.node
            && verify(datagram, &session.key).is_ok();
        // On a long way several binds are sent before the first is answered.
        let sent_at = session.sent.iter().find(|(sent, _)| *sent == counter).map(|(_, at)| *at);
        let (true, Some(sent_at)) = (genuine, sent_at) else {
            return Err(DropReason::BadRelayFrame);
        };
        self.sighting.settle();
        session.sent.retain(|(sent, _)| *sent > counter);
        session.rtt = Some(now.saturating_duration_since(sent_at));
        session.unanswered = 0;
        session.called_others = false;
        session.bound_at = Some(now);
        session.next_at = now
            + match (relaying, has_choice) {
                (false, _) => REFRESH,
                (true, false) => REFRESH_IN_USE,
                (true, true) => REFRESH_WITH_CHOICE,
            };
        if let Some(proving) = proof {
            session.handle_proof(proving, now);
        }
        let appeared = !std::mem::replace(&mut session.bound, true);
        if self.relay.socket != SocketId::MAIN {
            // It says where that line is seen, and nothing of the main socket.
            self.note_line_endpoint(self.relay.socket, observed, now);
            if appeared {
                self.update_peers(now);
            }
            return Ok(());
        }
        let moved = self.reflexive != Some(observed) && !self.host_endpoints.contains(&observed);
        self.note_announced(moved, now);
        self.handle_reflexive(observed, now);
        self.note_first_port(observed, now);
        if appeared {
            self.update_peers(now);
        }
        Ok(())
    }

    /// Whether data goes to or comes from some peer by the UDP relay.
    fn is_relaying(&self, now: Instant) -> bool {
        let used_at = self.relayed_at(Via::RelayUdp);
        used_at.is_some_and(|at| now.saturating_duration_since(at) < RELAYED_LATELY)
    }

    /// When data last went to or came from a peer whose path this relay is.
    fn relayed_at(&self, relay: Via) -> Option<Instant> {
        let peers = self.peers.values();
        let relayed = peers.filter(|peer| peer.agent.choice().primary == Some(relay));
        let stamps = relayed.flat_map(|peer| {
            let counters = &peer.fast.counters;
            [&counters.last_sent, &counters.last_heard].map(|stamp| stamp.load(Ordering::Relaxed))
        });
        self.shared.unstamp(stamps.max()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::NodeSettings;
    use crate::node::netmap::with_bob;
    use crate::testing::epoch;
    use crate::types::SecretKey;

    /// When a node without UDP asks its server for a sign of life, in milliseconds; it has a peer by the
    /// control connection that it last heard at these times.
    fn asked_at(heard_ms: &[u64], until_ms: u64) -> Vec<u64> {
        let (start, id) = (epoch(), NodeId::new(2).unwrap());
        let key = SecretKey::from_bytes([1; 32]);
        let mut node = Node::new(key, with_bob(true), NodeSettings::default(), [7; 32], 1, start);
        node.link_up = true;
        let server = "192.0.2.1:41820".parse().unwrap();
        node.relay.start(server, NodeId::new(1).unwrap(), RelayKey([3; 32]), start);
        let peer = node.peers.get_mut(&id).unwrap();
        peer.agent.set_relay(Some(Via::RelayTcp), start);
        let mut asked = Vec::new();
        for ms in (0..until_ms).step_by(10) {
            let now = start + Duration::from_millis(ms);
            if heard_ms.contains(&ms) {
                let stamp = node.shared.stamp(now);
                node.peers[&id].fast.counters.last_heard.store(stamp, Ordering::Relaxed);
            }
            node.handle_relay_timeout(now);
            while let Some(message) = node.poll_message() {
                asked.extend(message.ping.map(|_| ms));
            }
        }
        asked
    }

    #[test]
    fn who_only_receives_by_the_control_connection_asks_in_a_pause_whether_it_stands() {
        assert_eq!(asked_at(&[], 120_000), [0; 0], "nothing came that way");
        let flow: Vec<u64> = (0..60_000).step_by(500).collect();
        assert_eq!(asked_at(&flow, 60_000), [0; 0], "data says enough");
        let asked = asked_at(&flow, 180_000);
        assert!((62_000..68_000).contains(&asked[0]), "{asked:?}");
        assert!(asked.len() <= 6 && asked.iter().all(|at| *at < 90_000), "for a while: {asked:?}");
    }
}
