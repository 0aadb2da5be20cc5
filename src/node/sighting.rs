//! Where is our socket seen? Asked at the start, while the control connection is still being made:
//! the answer is in the hello then, and peers hear of it with everything else. With it comes a token,
//! by which the hello may be in the first message of the connection, so it is asked for again beside
//! each later one.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;

use super::{Event, Node};
use crate::dataplane::Target;
use crate::types::TxId;
use crate::wire::relay::{Control, Token};

/// Waits after each question that is not answered; then the control connection has its turn.
const RETRY: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// So many addresses of servers are asked.
const MAX_SERVERS: usize = 4;

/// The question, until it is answered.
#[derive(Debug, Default)]
pub(super) struct Sighting {
    servers: Vec<SocketAddr>,
    asked: Vec<(SocketAddr, TxId, Instant)>,
    /// The round trip of the answer.
    rtt: Option<Duration>,
    tries: usize,
    next_at: Option<Instant>,
}

impl Sighting {
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.next_at
    }

    /// The round trip to the server that has seen us.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// A bind is answered, which says it better. A token may still come.
    pub(super) fn settle(&mut self) {
        let asked = std::mem::take(&mut self.asked);
        *self = Self { asked, ..Self::default() };
    }

    /// The network is another one.
    pub(super) fn stop(&mut self) {
        *self = Self::default();
    }
}

impl Node {
    /// Asks the servers' reflectors, at these UDP endpoints, where they see us; for the time before
    /// the first control connection.
    pub fn ask_reflectors(&mut self, servers: &[SocketAddr], now: Instant) {
        let servers = servers.iter().copied().take(MAX_SERVERS).collect();
        self.sighting = Sighting { servers, next_at: Some(now), ..Sighting::default() };
        self.handle_sighting_timeout(now);
    }

    /// Asks the servers' reflectors for tokens, once, beside a control connection that is being made;
    /// what was asked at the start is as good.
    pub fn ask_tokens(&mut self, servers: &[SocketAddr], now: Instant) {
        if self.sighting.next_at.is_some() {
            return;
        }
        self.sighting.asked.clear();
        for server in servers.iter().take(MAX_SERVERS) {
            self.ask_reflector(*server, now);
        }
    }

    fn ask_reflector(&mut self, server: SocketAddr, now: Instant) {
        let tx = TxId(self.rng.random());
        self.sighting.asked.push((server, tx, now));
        let question = Control::Reflect { tx, from_other_port: false }.encode(None);
        self.datagrams.push_bytes(Target::udp(server), &question);
    }

    /// Asks, and asks again.
    pub(super) fn handle_sighting_timeout(&mut self, now: Instant) {
        if self.sighting.next_at.is_none_or(|at| at > now) {
            return;
        }
        let wait = RETRY.get(self.sighting.tries).copied();
        self.sighting.tries += 1;
        self.sighting.next_at = wait.map(|wait| now + wait);
        if wait.is_none() {
            return;
        }
        for server in self.sighting.servers.clone() {
            self.ask_reflector(server, now);
        }
    }

    /// A reflector answers. Tells whether it was asked here.
    pub(super) fn handle_sighted(
        &mut self,
        from: SocketAddr,
        tx: TxId,
        (observed, token): (SocketAddr, Option<Token>),
        now: Instant,
    ) -> bool {
        let asked = self.sighting.asked.extract_if(.., |(at, it, _)| (*at, *it) == (from, tx));
        let Some((.., asked_at)) = asked.last() else { return false };
        self.sighting.rtt = Some(now.saturating_duration_since(asked_at));
        self.sighting.next_at = None;
        // Over IPv6 we are mostly seen as we are, which says nothing about IPv4.
        if self.reflexive.is_none() {
            self.announce(Some(observed), now);
        }
        if let Some(token) = token {
            self.events.push_back(Event::Token { server: from.ip(), token });
        }
        true
    }
}
