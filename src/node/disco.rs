//! Probes in and out, and every other datagram that is not data.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use rand::Rng;

use super::{Event, Node, WholeProbe};
use crate::dataplane::{Source, send_datagram};
use crate::path::Via;
use crate::types::{DropReason, NodeId, SEAL_OVERHEAD, SocketId, TxId};
use crate::wire::PacketKind;
use crate::wire::disco::{self, Message};

/// The last pings of one peer, and the ways by which they came first. Who has recorded some must not
/// have us answer them again to whatever address they seem to come from; what the network has doubled
/// comes by the same way.
#[derive(Debug, Default)]
pub(super) struct RecentPings(VecDeque<(TxId, Via)>);

impl RecentPings {
    fn may_answer(&mut self, tx: TxId, via: Via) -> bool {
        if let Some((_, first)) = self.0.iter().find(|(seen, _)| *seen == tx) {
            return *first == via;
        }
        if self.0.len() >= RECENT_PINGS {
            self.0.pop_front();
        }
        self.0.push_back((tx, via));
        true
    }
}

/// Some minutes of an honest peer's pings.
const RECENT_PINGS: usize = 256;

impl Node {
    /// Takes a datagram that the data plane did not decide.
    pub(super) fn handle_datagram(
        &mut self,
        source: Source,
        relayed: Option<NodeId>,
        datagram: &[u8],
        now: Instant,
    ) {
        let via = match (source, relayed) {
            (Source::Udp { remote, local, socket }, None) => Via::Direct { remote, local, socket },
            (Source::Udp { .. }, Some(_)) => Via::RelayUdp,
            (Source::Link, _) => Via::RelayTcp,
        };
        // The engine wants some address to bind cookies to; for relayed handshakes the relay's.
        let ip = match source {
            Source::Udp { remote, .. } => remote.ip(),
            Source::Link => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        let handled = match (PacketKind::classify(datagram), source) {
            (PacketKind::Disco, _) => self.handle_disco(via, relayed, datagram, now),
            (PacketKind::HandshakeInitiation, _) => {
                self.handle_initiation(via, relayed, ip, datagram, now)
            }
            (PacketKind::HandshakeReply { receiver }, _) => {
                self.handle_handshake_reply(via, receiver, ip, datagram, now)
            }
            (PacketKind::RelayControl, Source::Udp { remote, socket, .. }) if relayed.is_none() => {
                self.handle_relay_control(remote, socket, datagram, now)
            }
            _ => Err(DropReason::Malformed),
        };
        if let Err(reason) = handled {
            self.shared.drops().count(reason);
            if let Some(id) = relayed.filter(|id| !self.peers.contains_key(id)) {
                self.handle_stranger(id, now);
            }
        }
    }

    fn handle_disco(
        &mut self,
        via: Via,
        relayed: Option<NodeId>,
        packet: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        let tag = disco::peek_tag(packet).map_err(|_| DropReason::BadDisco)?;
        let id = *self.peers_by_tag.get(&tag).ok_or(DropReason::BadDisco)?;
        if relayed.is_some_and(|from| from != id) {
            return Err(DropReason::BadRelayFrame);
        }
        let peer = self.peers.get(&id).ok_or(DropReason::BadDisco)?;
        let (keys, own) = peer.keys.tagged(tag).ok_or(DropReason::BadDisco)?;
        let message = keys.open(packet).map_err(|_| DropReason::BadDisco)?;
        self.note_heard_under(id, own, now);
        let peer = self.peers.get_mut(&id).ok_or(DropReason::BadDisco)?;
        if let Message::Ping { tx, .. } = message
            && !peer.pings.may_answer(tx, via)
        {
            return Err(DropReason::Replayed);
        }
        self.note_present(id, via, now);
        let peer = self.peers.get_mut(&id).ok_or(DropReason::BadDisco)?;
        match message {
            Message::Ping { tx, able, padding: _ } => {
                peer.second.is_known = able & disco::TWO_LANES != 0;
                peer.agent.handle_ping(tx, via, now);
            }
            Message::Pong { tx, observed: _, arrived } => {
                let answer = peer.agent.handle_pong(tx, via, arrived, now);
                if let Some(answer) = answer {
                    let loss = peer.agent.loss_permille(answer.via);
                    let via = match answer.via {
                        Via::Direct { remote, local, socket } => {
                            // Of the sockets those of uplinks are paths of their own.
                            let line = self.uplinks.has_socket(socket);
                            let socket = if line { socket } else { SocketId::MAIN };
                            Via::Direct { remote, local, socket }
                        }
                        relay => relay,
                    };
                    peer.insight.history.note_answer(via, answer.rtt, loss, now);
                }
                if let (Some(answer), Some((token, _))) = (answer, self.open_pings.remove(&tx)) {
                    self.events.push_back(Event::Pinged { token, answer });
                }
            }
            Message::Punch(punch) => self.handle_punch(id, via, &punch, now),
            Message::CallMeMaybe { epoch, mut candidates } => {
                if let Some(identity) = &self.netmap.identity {
                    candidates.retain(|c| !identity.range.contains(c.endpoint.ip()));
                }
                if self.defers_call(id, epoch, &candidates, now) {
                    return Ok(());
                }
                if let Some(peer) = self.peers.get_mut(&id) {
                    let direct = matches!(peer.agent.choice().primary, Some(Via::Direct { .. }));
                    if !direct && !peer.agent.is_wanted() {
                        self.pace.charge(now);
                    }
                    peer.agent.handle_call_me_maybe(epoch, &candidates, now);
                }
            }
            Message::ReportRequest { tx } => self.handle_report_request(id, tx, now)?,
            Message::Report { tx, body } => self.handle_report(id, tx, &body, now)?,
        }
        self.drain_agent(id, now);
        Ok(())
    }

    /// Seals a message for a peer.
    pub(super) fn seal_disco(&mut self, id: NodeId, message: &Message) -> Option<Vec<u8>> {
        let nonce = self.rng.random();
        let own = *self.keys_for(id).first()?;
        Some(self.disco_keys(id, own)?.seal(message, nonce))
    }

    /// Seals a message for a peer and sends it on a path; twice to one that may know only one of our
    /// keys.
    pub(super) fn send_disco(&mut self, id: NodeId, via: Via, message: &Message) {
        let table = self.shared.table();
        for own in self.keys_for(id) {
            let nonce = self.rng.random();
            let Some(keys) = self.disco_keys(id, own) else { continue };
            let packet = keys.seal(message, nonce);
            if !send_datagram(&table, id, via, &packet, &mut self.datagrams) {
                self.shared.drops().count(DropReason::NoPath);
            }
        }
    }

    /// Seals a ping that is as long as the data that holds an inner packet of `inner` bytes. Its length is the
    /// question: it is never part of a train.
    pub(super) fn send_sized(&mut self, id: NodeId, via: Via, tx: TxId, inner: u16, whole: bool) {
        let ping = Message::ping_of_len(tx, self.able(), inner + SEAL_OVERHEAD);
        let (Via::Direct { remote, socket, .. }, true) = (via, whole) else {
            return self.send_disco(id, via, &ping);
        };
        if let Some(datagram) = self.seal_disco(id, &ping) {
            self.whole_probes.push_back(WholeProbe { remote, socket, datagram });
        }
    }

    /// Pings a peer on the path that data takes; the answer comes as [`Event::Pinged`] with
    /// `token`. Returns the path, or nothing when there is none at the moment.
    pub fn ping(&mut self, id: NodeId, token: u64, now: Instant) -> Option<Via> {
        self.note_use(id, now);
        let peer = self.peers.get_mut(&id)?;
        let sent = peer.agent.ping_primary(now);
        if let Some((tx, _)) = sent {
            self.open_pings.insert(tx, (token, now));
        }
        self.drain_agent(id, now);
        sent.map(|(_, via)| via)
    }
}
