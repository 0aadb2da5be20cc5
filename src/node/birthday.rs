//! Our part in a costly way to a peer: opening sockets, probing ports, or moving to a fresh port.
//!
//! The sockets open our NAT by datagrams that die on the way, so that they do not reach a router
//! whose open input would hold on to them; a moment later pings follow that go all the way, for a
//! NAT that is further out. Ports are probed once the sockets are there.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;

use super::{Node, Opener};
use crate::dataplane::Target;
use crate::path::OPENER_TTL;
use crate::path::birthday::{PROBE_SPACING, PROBES, PortOrder, SOCKETS};
use crate::types::{Candidate, CandidateKind, NodeId, SocketId, TxId};
use crate::wire::disco::Message;
use crate::wire::punch::NatHint;
use crate::wire::relay::Control;

/// Sockets are opened so many at a time,
const BURST: usize = 16;
/// so far apart.
const BURST_SPACING: Duration = Duration::from_millis(20);
/// The pings that go all the way follow the last opener after this,
const SECOND_ROUND_AFTER: Duration = Duration::from_secs(3);
/// and then each socket sends again: often enough for NATs that forget within seconds.
const AGAIN_SPACING: Duration = Duration::from_millis(10);
/// Ports are probed after this: the other side has its sockets then.
const HEAD_START: Duration = Duration::from_millis(400);
/// Probes that a late timer may catch up with at once.
const CATCH_UP: usize = 4;
/// After the last probe an answer may be under way.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// A fresh port has this long to lead to a path.
const MOVE_LIMIT: Duration = Duration::from_secs(3);
/// The question where a fresh port is seen is repeated after this.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// What we do in a run.
#[derive(Debug)]
pub(super) enum Part {
    /// Wait for the answer to our offer.
    Offered,
    /// Open sockets towards the peer's one endpoint.
    Opening { target: SocketAddr, sockets: Vec<SocketId>, sent: usize },
    /// Probe random ports of the peer's address.
    Probing { address: IpAddr, left: usize, sent: usize },
    /// Take a fresh port; `asked` is the question where it is seen.
    Moving { socket: Option<SocketId>, asked: Option<TxId> },
}

impl Part {
    pub(super) fn opening(target: SocketAddr) -> Self {
        Self::Opening { target, sockets: Vec::new(), sent: 0 }
    }

    pub(super) fn probing(address: IpAddr, probes: usize) -> Self {
        Self::Probing { address, left: probes, sent: 0 }
    }

    pub(super) fn moving() -> Self {
        Self::Moving { socket: None, asked: None }
    }

    /// How long it waits before it begins.
    pub(super) fn delay(&self) -> Duration {
        match self {
            Self::Probing { .. } => HEAD_START,
            _ => Duration::ZERO,
        }
    }

    /// How long it takes at most.
    pub(super) fn limit(&self) -> Duration {
        let probing = |probes| HEAD_START + PROBE_SPACING * probes + LAST_ANSWER;
        let all = |probes: usize| u32::try_from(probes).unwrap_or(u32::MAX);
        match self {
            Self::Offered => Duration::ZERO,
            // The side that probes says when it is done.
            Self::Opening { .. } => probing(all(PROBES)) + LAST_ANSWER,
            Self::Probing { left, .. } => probing(all(*left)),
            Self::Moving { .. } => MOVE_LIMIT,
        }
    }

    /// Entries that it has left in our NAT, beside those of sockets.
    pub(super) fn probes_sent(&self) -> usize {
        match self {
            Self::Probing { sent, .. } => *sent,
            _ => 0,
        }
    }
}

/// The ports that are probed, over all runs.
#[derive(Debug, Default)]
pub(super) struct Probes {
    order: Option<PortOrder>,
}

impl Node {
    /// Does the next step of our part.
    pub(super) fn drive_run(&mut self, now: Instant) {
        let Some(run) = &mut self.punching.run else { return };
        let (id, due) = (run.peer, run.next_at <= now);
        if !due {
            return;
        }
        match &mut run.part {
            Part::Offered => self.move_alone(now),
            Part::Opening { target, sockets, sent } => {
                let target = *target;
                if sockets.len() < SOCKETS {
                    run.next_at = now + BURST_SPACING;
                    self.open_burst(id, target, now);
                } else {
                    let socket = sockets[*sent % sockets.len()];
                    *sent += 1;
                    run.next_at = now + AGAIN_SPACING;
                    self.ping_by(id, Target::Udp { remote: target, local: None, socket });
                }
            }
            Part::Probing { address, left, sent } => {
                let address = *address;
                let late = now.saturating_duration_since(run.next_at);
                let wanted = 1 + late.as_millis() / PROBE_SPACING.as_millis();
                let count = usize::try_from(wanted).unwrap_or(CATCH_UP).min(CATCH_UP).min(*left);
                *left -= count;
                *sent += count;
                run.next_at =
                    if *left == 0 { run.end_at } else { (run.next_at + PROBE_SPACING).max(now) };
                self.probe_ports(id, address, count);
            }
            Part::Moving { socket, .. } => {
                let socket = *socket;
                run.next_at = now + ASK_AGAIN;
                self.ask_about(id, socket);
            }
        }
    }

    fn open_burst(&mut self, id: NodeId, target: SocketAddr, now: Instant) {
        for _ in 0..BURST {
            // What the daemon cannot open, or is too much, makes the run smaller.
            let Some(socket) = self.open_socket(id, target.ip()) else { break };
            let tx = TxId(self.rng.random());
            let Some(datagram) = self.seal_disco(id, &Message::ping(tx, self.able())) else {
                break;
            };
            self.openers.push_back(Opener { remote: target, socket, ttl: OPENER_TTL, datagram });
            self.punching.counters.sockets += 1;
            if let Some(run) = &mut self.punching.run
                && let Part::Opening { sockets, .. } = &mut run.part
            {
                sockets.push(socket);
                if sockets.len() >= SOCKETS {
                    run.next_at = now + SECOND_ROUND_AFTER;
                    break;
                }
            }
        }
    }

    fn probe_ports(&mut self, id: NodeId, address: IpAddr, count: usize) {
        let rng = &mut self.rng;
        let order = self.punching.probes.order.get_or_insert_with(|| PortOrder::new(rng));
        let ports: Vec<u16> = (0..count).map(|_| order.take()).collect();
        self.punching.counters.probes += count as u64;
        for port in ports {
            self.ping_by(id, Target::udp(SocketAddr::new(address, port)));
        }
    }

    /// A ping that no path waits for. Its arrival is what counts: the peer checks the path by which
    /// it came.
    fn ping_by(&mut self, id: NodeId, target: Target) {
        let tx = TxId(self.rng.random());
        if let Some(datagram) = self.seal_disco(id, &Message::ping(tx, self.able())) {
            self.datagrams.push_bytes(target, &datagram);
        }
    }

    /// The peer does not know these messages, or is asleep: a fresh port of ours needs nothing of it
    /// but that it answers a call.
    fn move_alone(&mut self, now: Instant) {
        let varies = self.prediction.nat_hint() == NatHint::Varies;
        let Some(peer) = self.punching.run.as_ref().map(|run| run.peer) else { return };
        let asleep = self.punching.history(peer).takes_part();
        if let Some(run) = &mut self.punching.run {
            run.silent = true;
            if varies || asleep {
                // Nothing more to wait for, and the peer's own offer may be under way.
                return self.end_run(false, now);
            }
            run.part = Part::moving();
            (run.next_at, run.end_at) = (now, now + MOVE_LIMIT);
            self.punching.counters.fresh_ports += 1;
            self.drive_run(now);
        }
    }

    /// Asks the server where it sees a fresh socket.
    fn ask_about(&mut self, id: NodeId, socket: Option<SocketId>) {
        let Some(server) = self.relay.server().filter(SocketAddr::is_ipv4) else { return };
        let Some(socket) = socket.or_else(|| self.open_socket(id, server.ip())) else { return };
        let tx = TxId(self.rng.random());
        let Some(run) = &mut self.punching.run else { return };
        if let Part::Moving { socket: taken, asked } = &mut run.part {
            if taken.replace(socket).is_none() {
                self.punching.counters.sockets += 1;
            }
            *asked = Some(tx);
            let question = Control::Reflect { tx, from_other_port: false }.encode(None);
            let target = Target::Udp { remote: server, local: None, socket };
            self.datagrams.push_bytes(target, &question);
        }
    }

    /// The server has seen our fresh socket: our NAT is opened for the peer, and then it is called.
    pub(super) fn handle_fresh_port(
        &mut self,
        tx: TxId,
        observed: SocketAddr,
        now: Instant,
    ) -> bool {
        let Some(run) = &mut self.punching.run else { return false };
        let Part::Moving { socket: Some(socket), asked } = &mut run.part else { return false };
        if *asked != Some(tx) {
            return false;
        }
        *asked = None;
        run.next_at = run.end_at;
        let (id, socket) = (run.peer, *socket);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.agent.move_to(socket, now);
        }
        self.drain_agent(id, now);
        let mut candidates = vec![Candidate::new(observed, CandidateKind::Reflexive)];
        candidates.extend(self.call_candidates(now));
        candidates.truncate(crate::types::MAX_CANDIDATES);
        if let Some(via) = self.relay_path() {
            let message = Message::CallMeMaybe { epoch: self.call_epoch, candidates };
            self.send_disco(id, via, &message);
        }
        true
    }
}
