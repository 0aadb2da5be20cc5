//! Where is our socket seen? Asked at the start, while the control connection is still being made:
//! the answer is in the hello then, and peers hear of it with everything else. The second reflector
//! port is asked in the same breath: behind a NAT that counts, the first round of probes must wait
//! until the peer knows more than the server does. With an answer comes a token, by which the hello may be
//! in the first message of the connection, so it is asked for again beside each later one.

use std::net::{IpAddr, SocketAddr};
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
/// An answer that takes longer is of no use.
const LATE: Duration = Duration::from_secs(2);
/// So many addresses of servers are asked.
const MAX_SERVERS: usize = 4;

/// The question, until it is answered.
#[derive(Debug, Default)]
pub(super) struct Sighting {
    servers: Vec<SocketAddr>,
    asked: Vec<(SocketAddr, TxId, Instant)>,
    /// The server that answered first: where two of them see us shows nothing of a NAT's order.
    answered: Option<IpAddr>,
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
        let (servers, mut asked) =
            (std::mem::take(&mut self.servers), std::mem::take(&mut self.asked));
        asked.retain(|(server, ..)| servers.contains(server));
        *self = Self { servers, asked, ..Self::default() };
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
        // What was asked a moment ago may still be answered.
        let late = |at: Instant| now.saturating_duration_since(at) > LATE;
        self.sighting.asked.retain(|(.., at)| !late(*at));
        if self.sighting.asked.is_empty() {
            self.sighting.servers.clear();
        }
        for server in servers.iter().take(MAX_SERVERS) {
            if !self.sighting.servers.contains(server) {
                self.sighting.servers.push(*server);
            }
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
        let ports = |server: SocketAddr| [server, second_port(server)];
        for port in self.sighting.servers.clone().into_iter().flat_map(ports) {
            self.ask_reflector(port, now);
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
        let first_port = self.sighting.servers.contains(&from);
        if *self.sighting.answered.get_or_insert(from.ip()) == from.ip() {
            if first_port {
                self.note_first_port(observed, now);
            } else {
                self.note_second_port(from, observed, now);
            }
        }
        if !first_port {
            return true;
        }
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

/// Where a server's second reflector is, unless that port was taken; it tells in its welcome.
fn second_port(server: SocketAddr) -> SocketAddr {
    SocketAddr::new(server.ip(), server.port().saturating_add(1))
}
