//! A packet's way in: UDP -> classify -> open -> source check -> TUN batch.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{ForwardingTable, Note, Shared, Source, TunBatch};
use crate::path::Via;
use crate::types::{DropReason, NodeId};
use crate::wire::ip::IpView;
use crate::wire::{PacketKind, relay};

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
    let taken = match (PacketKind::classify(datagram), source) {
        (PacketKind::Relay, _) => relayed(shared, table, source, datagram, now, tun, notes),
        (PacketKind::Data { receiver }, Source::Udp { remote, local }) => {
            let via = Via::Direct { remote, local };
            data(shared, table, via, receiver, datagram, now, tun, notes)
        }
        (
            PacketKind::HandshakeInitiation
            | PacketKind::HandshakeReply { .. }
            | PacketKind::Disco
            | PacketKind::RelayControl,
            Source::Udp { .. },
        ) => {
            notes.push(Note::Control { source, relayed: None, datagram: datagram.to_vec() });
            Ok(())
        }
        (PacketKind::Unknown, _) | (_, Source::Link) => Err(DropReason::Malformed),
    };
    if let Err(reason) = taken {
        shared.drops().count(reason);
        if reason == DropReason::UnknownSession && shared.may_note_unknown(now) {
            note_unknown_session(source, datagram, notes);
        }
    }
}

/// The peer may hold keys of a session that ended with an earlier life of this node; it would go
/// on sending into nothing until it renews them.
fn note_unknown_session(source: Source, datagram: &[u8], notes: &mut Vec<Note>) {
    let framed = PacketKind::classify(datagram) == PacketKind::Relay;
    let relayed = framed.then(|| relay::parse_data(datagram).ok()).flatten().map(|(from, _)| from);
    let via = match (source, relayed) {
        (Source::Udp { remote, local }, None) => Via::Direct { remote, local },
        (Source::Udp { .. }, Some(_)) => Via::RelayUdp,
        (Source::Link, _) => Via::RelayTcp,
    };
    notes.push(Note::UnknownSession { via, relayed });
}

/// A datagram in a relay frame: from the server's relay port or the control connection only.
fn relayed(
    shared: &Shared,
    table: &ForwardingTable,
    source: Source,
    datagram: &[u8],
    now: Instant,
    tun: &mut TunBatch,
    notes: &mut Vec<Note>,
) -> Result<(), DropReason> {
    let via = match source {
        Source::Udp { remote, .. } if table.relay == Some(remote) => Via::RelayUdp,
        Source::Udp { .. } => return Err(DropReason::BadRelayFrame),
        Source::Link => Via::RelayTcp,
    };
    let (from, payload) = relay::parse_data(datagram).map_err(|_| DropReason::BadRelayFrame)?;
    match PacketKind::classify(payload) {
        PacketKind::Data { receiver } => {
            check_sender(table, receiver, from)?;
            data(shared, table, via, receiver, payload, now, tun, notes)
        }
        PacketKind::HandshakeInitiation | PacketKind::HandshakeReply { .. } | PacketKind::Disco => {
            notes.push(Note::Control { source, relayed: Some(from), datagram: payload.to_vec() });
            Ok(())
        }
        PacketKind::Relay | PacketKind::RelayControl | PacketKind::Unknown => {
            Err(DropReason::BadRelayFrame)
        }
    }
}

/// The relay names the sender; a session of somebody else in such a frame is not meant well.
fn check_sender(table: &ForwardingTable, receiver: u32, from: NodeId) -> Result<(), DropReason> {
    match table.by_receiver(receiver) {
        Some(peer) if peer.id == from => Ok(()),
        Some(_) => Err(DropReason::BadRelayFrame),
        None => Err(DropReason::UnknownSession),
    }
}

#[expect(clippy::too_many_arguments, reason = "the whole context of one packet, by reference")]
fn data(
    shared: &Shared,
    table: &ForwardingTable,
    via: Via,
    receiver: u32,
    datagram: &[u8],
    now: Instant,
    tun: &mut TunBatch,
    notes: &mut Vec<Note>,
) -> Result<(), DropReason> {
    let peer = table.by_receiver(receiver).ok_or(DropReason::UnknownSession)?;
    let mut confirmed = false;
    let mut authentic = false;
    let taken = tun.push(datagram.len(), |room| {
        let opened = peer.lock().session.open(receiver, datagram, room, now)?;
        authentic = true;
        confirmed = opened.confirms_session;
        if opened.len == 0 {
            return Ok(0);
        }
        let view = IpView::parse(&room[..opened.len]).map_err(|_| DropReason::BadInnerPacket)?;
        if !peer.addrs.contains(view.src) {
            return Err(DropReason::SpoofedSource);
        }
        if table.own.is_none_or(|own| !own.contains(view.dst)) {
            return Err(DropReason::NoRoute);
        }
        peer.counters.rx_bytes.fetch_add(view.len as u64, Ordering::Relaxed);
        Ok(view.len)
    });
    if authentic {
        let stamp = shared.stamp(now);
        peer.counters.last_heard.store(stamp, Ordering::Relaxed);
        if peer.choice().primary.is_some_and(|primary| primary == via) {
            peer.counters.last_heard_primary.store(stamp, Ordering::Relaxed);
        } else if !via.is_relay() {
            notes.push(Note::HeardOn { peer: peer.id, via });
        }
        if confirmed {
            notes.push(Note::SessionConfirmed(peer.id));
        }
    }
    taken
}
