//! Port mappings: endpoints at which the router lets anybody in, and the proof that it does.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use rand::Rng;

use super::{Event, Node};
use crate::dataplane::Target;
use crate::types::{Candidate, CandidateKind, TxId};
use crate::wire::relay::Control;

/// Knocks whose answers are still known.
const OPEN_KNOCKS: usize = 4;

/// What came of [`Node::knock`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knocked {
    /// The server is heard, whether or not the knock comes.
    ServerHeard,
    /// The knock came in, sent to this endpoint.
    Arrived(SocketAddr),
}

/// The endpoints that the router gave us, and the open question.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    endpoints: Vec<(SocketAddr, bool)>,
    /// The last knocks, each with the plain question that went with it: a far server's answer to
    /// the first one may come after the second was sent.
    asked: VecDeque<(TxId, TxId)>,
}

impl Mapped {
    /// The candidates whose endpoint is proved, or is not.
    pub(super) fn candidates(&self, proved: bool) -> impl Iterator<Item = Candidate> {
        let these = self.endpoints.iter().filter(move |(_, works)| *works == proved);
        these.map(|(endpoint, _)| Candidate::new(*endpoint, CandidateKind::PortMapped))
    }
}

impl Node {
    /// The endpoints at which the router forwards to our socket, each with whether something was
    /// seen to come in there; they replace the earlier ones.
    pub fn handle_mapped(&mut self, endpoints: Vec<(SocketAddr, bool)>, now: Instant) {
        if endpoints != self.mapped.endpoints {
            self.mapped.endpoints = endpoints;
            self.announce(None, now);
        }
    }

    /// Asks the server to send to `port` of our external address, from a socket that we never sent
    /// to; what comes of it is an [`Event::Knocked`]. Tells whether there is a server to ask: over
    /// IPv4, since that is what has mappings.
    pub fn knock(&mut self, port: u16) -> bool {
        let server = self.relay.server().filter(|it| it.is_ipv4() && self.relay.is_bound());
        let Some(remote) = server else { return false };
        let (knock, control) = (TxId(self.rng.random()), TxId(self.rng.random()));
        self.mapped.asked.push_back((knock, control));
        if self.mapped.asked.len() > OPEN_KNOCKS {
            self.mapped.asked.pop_front();
        }
        let plain = Control::Reflect { tx: control, from_other_port: false };
        for question in [plain, Control::Knock { tx: knock, port }] {
            self.datagrams.push_bytes(Target::udp(remote), &question.encode(None));
        }
        true
    }

    /// The server answers the question that went with a knock. Tells whether it was ours.
    pub(super) fn handle_server_heard(&mut self, from: SocketAddr, tx: TxId) -> bool {
        let ours = Some(from) == self.relay.server()
            && self.mapped.asked.iter().any(|(_, control)| *control == tx);
        if ours {
            self.events.push_back(Event::Knocked(Knocked::ServerHeard));
        }
        ours
    }

    /// A knock comes in, from a port of the server that we do not know. Tells whether it is ours.
    pub(super) fn handle_knocked(&mut self, tx: TxId, at: SocketAddr) -> bool {
        let ours = self.mapped.asked.iter().any(|(knock, _)| *knock == tx);
        if ours {
            self.mapped.asked.clear();
            self.events.push_back(Event::Knocked(Knocked::Arrived(at)));
        }
        ours
    }
}
