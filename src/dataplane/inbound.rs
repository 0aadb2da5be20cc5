//! A packet's way in: UDP -> classify -> open -> source check -> TUN batch.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::filter::admit;
use super::gate::{Entry, Sender};
use super::peer::LockedPeer;
use super::{ForwardingTable, Note, Peer, Shared, Source, TunBatch};
use crate::path::Via;
use crate::types::{DropReason, NodeId, SizeCounts};
use crate::wire::ip::IpView;
use crate::wire::{PacketKind, disco, relay};

/// Takes one datagram. Data ends in `tun`; all else becomes a note or a counted drop.
pub fn inbound(
    shared: &Shared,
    table: &ForwardingTable,
    source: Source,
    datagram: &[u8],
    now: Instant,
    tun: &mut TunBatch,
    notes: &mut Vec<Note>,
) {
    Run { shared, table, source, now, tun, notes, lane: None }.take(datagram);
}

/// Takes datagrams from one source: those in a row for one session are opened under one lock.
pub fn inbound_all<'d>(
    shared: &Shared,
    table: &ForwardingTable,
    source: Source,
    datagrams: impl Iterator<Item = &'d [u8]>,
    now: Instant,
    tun: &mut TunBatch,
    notes: &mut Vec<Note>,
) {
    let mut run = Run { shared, table, source, now, tun, notes, lane: None };
    datagrams.for_each(|datagram| run.take(datagram));
}

/// Takes datagrams of `stride` bytes each (the last may be shorter) from one sender: those in a row
/// for one session are opened under one lock.
#[expect(clippy::too_many_arguments, reason = "the whole context of one train, by reference")]
pub fn inbound_train(
    shared: &Shared,
    table: &ForwardingTable,
    source: Source,
    train: &[u8],
    stride: usize,
    now: Instant,
    tun: &mut TunBatch,
    notes: &mut Vec<Note>,
) {
    inbound_all(shared, table, source, train.chunks(stride.max(1)), now, tun, notes);
}

/// Datagrams from one source.
struct Run<'a> {
    shared: &'a Shared,
    table: &'a ForwardingTable,
    source: Source,
    now: Instant,
    tun: &'a mut TunBatch,
    notes: &'a mut Vec<Note>,
    lane: Option<Lane<'a>>,
}

/// The session that the last datagram was for, locked.
struct Lane<'a> {
    peer: &'a Peer,
    state: LockedPeer<'a>,
    receiver: u32,
    via: Via,
    authentic: bool,
    rx_packets: u64,
    rx_bytes: usize,
    arrived: SizeCounts,
    /// Refused by their counters, which are looked at before the seal: second copies, or anything.
    copies: SizeCounts,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.close_lane();
    }
}

impl<'a> Run<'a> {
    fn take(&mut self, datagram: &[u8]) {
        let taken = match (PacketKind::classify(datagram), self.source) {
            (PacketKind::Relay, _) => self.relayed(datagram),
            (PacketKind::Data { receiver }, Source::Udp { remote, local, socket }) => {
                self.data(Via::Direct { remote, local, socket }, receiver, datagram)
            }
            (
                kind @ (PacketKind::HandshakeInitiation
                | PacketKind::HandshakeReply { .. }
                | PacketKind::Disco
                | PacketKind::RelayControl),
                Source::Udp { remote, .. },
            ) => self.control(kind, Sender::Address(remote.ip()), datagram),
            (PacketKind::Unknown, _) | (_, Source::Link) => Err(DropReason::Malformed),
        };
        if let Err(reason) = taken {
            self.shared.drops().count(reason);
            if reason == DropReason::UnknownSession && self.shared.may_note_unknown(self.now) {
                note_unknown_session(self.source, datagram, self.notes);
            }
        }
    }

    /// A message for the control plane, if it is worth a place in its queue: anybody can send these.
    fn control(
        &mut self,
        kind: PacketKind,
        sender: Sender,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let (source, shared) = (self.source, self.shared);
        let (gate, now) = (&shared.gate, shared.since_start(self.now));
        let within = match kind {
            PacketKind::HandshakeInitiation => match gate.initiation(sender, datagram, now) {
                Entry::In => true,
                Entry::Out(reason) => return Err(reason),
                Entry::Ask(reply) => {
                    self.notes.push(Note::Cookie { source, reply });
                    false
                }
            },
            PacketKind::HandshakeReply { receiver } => {
                let peer = self.table.by_receiver(receiver).ok_or(DropReason::BadHandshake)?;
                if matches!(sender, Sender::Member(from) if from != peer.id) {
                    return Err(DropReason::BadRelayFrame);
                }
                gate.may_answer(receiver, datagram, now)
            }
            PacketKind::Disco => {
                let tag = disco::peek_tag(datagram).map_err(|_| DropReason::BadDisco)?;
                let peer = self.table.by_tag(tag).ok_or(DropReason::BadDisco)?;
                gate.may_disco(peer, now)
            }
            _ => gate.may_relay_control(now),
        };
        if !within {
            return Err(DropReason::RateLimited);
        }
        let relayed = match sender {
            Sender::Member(from) => Some(from),
            Sender::Address(_) => None,
        };
        self.notes.push(Note::Control { source, relayed, datagram: datagram.to_vec() });
        Ok(())
    }

    /// A datagram in a relay frame: from the server's relay port or the control connection only.
    fn relayed(&mut self, datagram: &[u8]) -> Result<(), DropReason> {
        let via = match self.source {
            Source::Udp { remote, .. } if self.table.relay == Some(remote) => Via::RelayUdp,
            Source::Udp { .. } => return Err(DropReason::BadRelayFrame),
            Source::Link => Via::RelayTcp,
        };
        let (from, payload) = relay::parse_data(datagram).map_err(|_| DropReason::BadRelayFrame)?;
        match PacketKind::classify(payload) {
            PacketKind::Data { receiver } => {
                self.check_sender(receiver, from)?;
                self.data(via, receiver, payload)
            }
            kind @ (PacketKind::HandshakeInitiation
            | PacketKind::HandshakeReply { .. }
            | PacketKind::Disco) => self.control(kind, Sender::Member(from), payload),
            PacketKind::Relay | PacketKind::RelayControl | PacketKind::Unknown => {
                Err(DropReason::BadRelayFrame)
            }
        }
    }

    /// The relay names the sender; a session of somebody else in such a frame is not meant well.
    fn check_sender(&self, receiver: u32, from: NodeId) -> Result<(), DropReason> {
        let open = self.lane.as_ref().filter(|lane| lane.receiver == receiver);
        let peer = match open {
            Some(lane) => lane.peer,
            None => self.table.by_receiver(receiver).ok_or(DropReason::UnknownSession)?,
        };
        if peer.id == from { Ok(()) } else { Err(DropReason::BadRelayFrame) }
    }

    fn data(&mut self, via: Via, receiver: u32, datagram: &[u8]) -> Result<(), DropReason> {
        if self.lane.as_ref().is_none_or(|lane| lane.receiver != receiver || lane.via != via) {
            self.close_lane();
            let peer = self.table.by_receiver(receiver).ok_or(DropReason::UnknownSession)?;
            let state = peer.lock_lane(receiver).ok_or(DropReason::UnknownSession)?;
            let (authentic, rx_packets, rx_bytes) = (false, 0, 0);
            let (arrived, copies) = (SizeCounts::default(), SizeCounts::default());
            self.lane = Some(Lane {
                peer,
                state,
                receiver,
                via,
                authentic,
                rx_packets,
                rx_bytes,
                arrived,
                copies,
            });
        }
        let Some(lane) = &mut self.lane else { return Err(DropReason::UnknownSession) };
        let (own, now) = (self.table.own, self.now);
        let (mut confirmed, mut refused) = (false, None);
        let taken = self.tun.push(datagram.len(), |room| {
            let opened = lane.state.open(receiver, datagram, room, now)?;
            lane.authentic = true;
            confirmed = opened.confirms_session;
            if opened.len == 0 {
                return Ok(0);
            }
            let view =
                IpView::parse(&room[..opened.len]).map_err(|_| DropReason::BadInnerPacket)?;
            if !lane.peer.addrs.contains(view.src) {
                return Err(DropReason::SpoofedSource);
            }
            if own.is_none_or(|own| !own.contains(view.dst)) {
                return Err(DropReason::NoRoute);
            }
            if let Some(filter) = &self.table.filter {
                let records = &mut lane.peer.records();
                let packet = &room[..view.len];
                admit(filter, lane.peer.id, packet, records, now).map_err(|answer| {
                    refused = answer;
                    DropReason::Filtered
                })?;
            }
            lane.rx_packets += 1;
            lane.rx_bytes += view.len;
            Ok(view.len)
        });
        match taken {
            // The second copy of a doubled packet says as much of its path as the first one, but
            // nobody can tell it from what a stranger made up.
            Err(DropReason::Replayed) => lane.copies.count(datagram.len(), 1),
            Err(
                DropReason::Undecryptable
                | DropReason::UnknownSession
                | DropReason::Malformed
                | DropReason::TooLarge,
            ) => {}
            _ => lane.arrived.count(datagram.len(), 1),
        }
        self.notes.extend(refused.map(Note::Refused));
        if confirmed && !lane.peer.is_second(receiver) {
            // The peer may have lost what it knew of the second lane.
            lane.peer.seal_on_second(false);
            self.notes.push(Note::SessionConfirmed(lane.peer.id));
        }
        taken
    }

    /// Unlocks the session and tells what was heard from the peer.
    fn close_lane(&mut self) {
        let Some(lane) = self.lane.take() else { return };
        let Lane { peer, state, via, authentic, rx_packets, rx_bytes, arrived, copies, .. } = lane;
        drop(state);
        let mut records = peer.records();
        if arrived != SizeCounts::default() {
            records.arrived.add(via, arrived);
        }
        records.arrived.add_known(via, copies);
        if !authentic {
            return;
        }
        let is_primary = peer.choice().primary.is_some_and(|primary| primary.is_same(via));
        let is_news = !is_primary && !via.is_relay() && records.may_note_heard(via, self.now);
        drop(records);
        let stamp = self.shared.stamp(self.now);
        self.shared.received.add(via, rx_packets, rx_bytes as u64);
        peer.counters.rx_bytes.fetch_add(rx_bytes as u64, Ordering::Relaxed);
        peer.counters.last_heard.store(stamp, Ordering::Relaxed);
        if is_primary {
            peer.counters.last_heard_primary.store(stamp, Ordering::Relaxed);
        } else if is_news {
            self.notes.push(Note::HeardOn { peer: peer.id, via });
        }
    }
}

/// The peer may hold keys of a session that ended with an earlier life of this node; it would go
/// on sending into nothing until it renews them.
fn note_unknown_session(source: Source, datagram: &[u8], notes: &mut Vec<Note>) {
    let framed = PacketKind::classify(datagram) == PacketKind::Relay;
    let relayed = framed.then(|| relay::parse_data(datagram).ok()).flatten().map(|(from, _)| from);
    let via = match (source, relayed) {
        (Source::Udp { remote, local, socket }, None) => Via::Direct { remote, local, socket },
        (Source::Udp { .. }, Some(_)) => Via::RelayUdp,
        (Source::Link, _) => Via::RelayTcp,
    };
    notes.push(Note::UnknownSession { via, relayed });
}
