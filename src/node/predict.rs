//! What the NAT in front of us will do next, for the peers that have to guess it.
//!
//! The main socket binds at the server's first port and asks the second one where it is seen: two
//! mappings tell whether the NAT maps by destination, and whether it counts. If so, the peers get
//! guesses with every call: our own port (somebody may have forwarded it by hand) and the ports
//! that come next. Guesses age with every flow behind that NAT, so they go to peers only, and a
//! *scratch* socket, which the daemon opens for one question, looks again before each call.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;

use super::Node;
use crate::dataplane::Target;
use crate::path::predict::Counter;
use crate::types::{Candidate, CandidateKind, NodeId, TxId};
use crate::wire::relay::Control;

/// A guess this old is looked at again before it is told.
const FRESH: Duration = Duration::from_millis(500);
/// A call that waits for a look is answered without after this.
const LOOK_LIMIT: Duration = Duration::from_millis(500);
/// Peers whose calls wait for a look, at most.
const MAX_WAITING: usize = 16;

/// What is known of the NAT's counter.
#[derive(Debug, Default)]
pub(super) struct Prediction {
    second_port: Option<SocketAddr>,
    asked: Option<TxId>,
    first: Option<SocketAddr>,
    second: Option<SocketAddr>,
    /// The two were seen to differ: calls carry guesses.
    varies: bool,
    /// Where a NAT that counts stands, and when that was seen.
    counter: Option<(Counter, Instant)>,
    looking: Option<(TxId, Instant)>,
    waiting: Vec<(NodeId, u64, Vec<Candidate>)>,
}

impl Prediction {
    pub(super) fn set_second_port(&mut self, endpoint: Option<SocketAddr>) {
        self.second_port = endpoint;
    }

    /// The network is another one.
    pub(super) fn forget(&mut self) {
        *self = Self { second_port: self.second_port, ..Self::default() };
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        self.looking.map(|(_, at)| at + LOOK_LIMIT)
    }

    /// Where the first reflector port sees the main socket.
    pub(super) fn first_mapping(&self) -> Option<SocketAddr> {
        self.first
    }

    /// Whether the NAT was seen to count.
    pub(super) fn counts(&self) -> bool {
        self.counter.is_some()
    }

    /// Whether our calls say more than the server knows.
    pub(super) fn has_guesses(&self) -> bool {
        self.varies
    }

    /// Where the two reflector ports see the main socket.
    pub(super) fn mappings(&self) -> Option<(SocketAddr, SocketAddr)> {
        Some((self.first?, self.second?))
    }

    fn is_stale(&self, now: Instant) -> bool {
        self.counter.is_some_and(|(_, at)| now.saturating_duration_since(at) >= FRESH)
    }
}

impl Node {
    /// A bind leaves: the second port is asked with it until it has answered.
    pub(super) fn ask_second_port(&mut self) {
        let Some(remote) = self.prediction.second_port.filter(|_| self.prediction.second.is_none())
        else {
            return;
        };
        let tx = TxId(self.rng.random());
        self.prediction.asked = Some(tx);
        let question = Control::Reflect { tx, from_other_port: false }.encode(None);
        self.datagrams.push_bytes(Target::udp(remote), &question);
    }

    /// The first port saw us.
    pub(super) fn note_first_port(&mut self, observed: SocketAddr, now: Instant) {
        let before = self.prediction.first.replace(observed);
        if before.is_some_and(|before| before != observed) {
            // The NAT has started over; which answer comes first to a new socket says nothing.
            self.prediction.second = None;
            self.ask_second_port();
        }
        self.weigh_mappings(now);
    }

    /// The second port, as far as it can be known before a welcome, saw us.
    pub(super) fn note_second_port(
        &mut self,
        from: SocketAddr,
        observed: SocketAddr,
        now: Instant,
    ) {
        self.prediction.second_port.get_or_insert(from);
        self.prediction.second = Some(observed);
        self.weigh_mappings(now);
    }

    /// The second port, or a scratch socket's question, is answered. Tells whether it was ours.
    pub(super) fn handle_reflected(
        &mut self,
        from: SocketAddr,
        tx: TxId,
        observed: SocketAddr,
        now: Instant,
    ) -> bool {
        if Some(from) != self.prediction.second_port {
            return false;
        }
        if self.prediction.asked == Some(tx) {
            self.prediction.asked = None;
            self.prediction.second = Some(observed);
            self.weigh_mappings(now);
            return true;
        }
        if self.prediction.looking.is_some_and(|(looking, _)| looking == tx) {
            self.prediction.looking = None;
            let counter =
                self.prediction.counter.map(|(before, _)| (before.advance(observed), now));
            self.prediction.counter = counter;
            self.call_everybody(now);
            self.answer_waiting(now);
            return true;
        }
        false
    }

    /// Takes the answer that came to a scratch socket.
    pub fn handle_scratch(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) {
        if let Ok(Control::Reflected { tx, observed, .. }) = Control::parse(datagram) {
            let _ = self.handle_let_in(tx) || self.handle_reflected(from, tx, observed, now);
        }
    }

    /// A question to be sent from a socket that has never sent anything; call until none.
    pub fn poll_scratch(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.scratch.pop_front()
    }

    fn weigh_mappings(&mut self, now: Instant) {
        let (Some(first), Some(second)) = (self.prediction.first, self.prediction.second) else {
            return;
        };
        self.test_filter(first, second, now);
        if first == second || self.prediction.counter.is_some() {
            return;
        }
        self.prediction.counter = Counter::observe(first, second).map(|counter| (counter, now));
        let known = std::mem::replace(&mut self.prediction.varies, true);
        if !known || self.prediction.counter.is_some() {
            self.call_everybody(now);
        }
    }

    /// Our guesses changed: the peers that are not direct are called.
    fn call_everybody(&mut self, now: Instant) {
        self.call_epoch += 1;
        self.update_signalling();
        let ids: Vec<NodeId> = self.peers.keys().copied().collect();
        for id in ids {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.agent.handle_own_candidates(now);
            }
            self.drain_agent(id, now);
        }
    }

    /// What a call says: what the server is told too, and guesses.
    pub(super) fn call_candidates(&mut self, now: Instant) -> Vec<Candidate> {
        let mut candidates = self.announced.clone();
        let (first, second) = (self.prediction.first, self.prediction.second);
        if let (Some(first), Some(second)) = (first, second)
            && first != second
        {
            let own = self.host_endpoints.iter().find(|own| own.is_ipv4() == first.is_ipv4());
            let guess = own.map(|own| SocketAddr::new(first.ip(), own.port()));
            candidates.extend(guess.map(|at| Candidate::new(at, CandidateKind::Static)));
        }
        if self.prediction.is_stale(now) {
            self.look(now);
        } else if let Some((counter, _)) = self.prediction.counter {
            candidates.extend(counter.window());
        }
        let mut seen = std::collections::BTreeSet::new();
        candidates.retain(|candidate| seen.insert(candidate.endpoint));
        candidates.truncate(crate::types::MAX_CANDIDATES);
        candidates
    }

    /// Asks from a scratch socket where the counter stands.
    fn look(&mut self, now: Instant) {
        let Some(remote) = self.prediction.second_port else { return };
        if self.prediction.looking.is_none() {
            let tx = TxId(self.rng.random());
            self.prediction.looking = Some((tx, now));
            let question = Control::Reflect { tx, from_other_port: false }.encode(None);
            self.scratch.push_back((remote, question.to_vec()));
        }
    }

    /// Whether a peer's call with guesses has to wait: our own next ports are told first and used
    /// then, or they would be used up before the peer knows them.
    pub(super) fn defers_call(
        &mut self,
        id: NodeId,
        epoch: u64,
        candidates: &[Candidate],
        now: Instant,
    ) -> bool {
        let guesses = candidates.iter().any(|it| it.kind == CandidateKind::Predicted);
        if !guesses || !self.prediction.is_stale(now) || self.is_direct(id) {
            return false;
        }
        self.look(now);
        self.prediction.waiting.retain(|(peer, ..)| *peer != id);
        if self.prediction.waiting.len() < MAX_WAITING {
            self.prediction.waiting.push((id, epoch, candidates.to_vec()));
        }
        true
    }

    fn answer_waiting(&mut self, now: Instant) {
        for (id, epoch, candidates) in std::mem::take(&mut self.prediction.waiting) {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.agent.handle_call_me_maybe(epoch, &candidates, now);
            }
            self.drain_agent(id, now);
        }
    }

    /// A look that is not answered holds nobody up.
    pub(super) fn handle_look_timeout(&mut self, now: Instant) {
        if self.prediction.next_at().is_some_and(|at| at <= now) {
            self.prediction.looking = None;
            self.answer_waiting(now);
        }
    }
}
