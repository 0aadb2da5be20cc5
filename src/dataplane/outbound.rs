//! A packet's way out: TUN -> route -> seal -> UDP batch.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::batch::{Target, UdpBatch};
use super::session::{MIN_SEAL_BUFFER, SEAL_OVERHEAD, SealError, Session};
use super::{ForwardingTable, Note, Peer, Shared};
use crate::path::Via;
use crate::types::{DropReason, NodeId};
use crate::wire::ip::IpView;
use crate::wire::relay;

/// After a pause this long the control plane no longer watches the peer's path.
const PAUSE_MS: u64 = 1_000;

/// Sends one batch of packets from the TUN interface on its way.
///
/// `packets` are whole IP packets. What has no session yet is kept with its peer, and the control
/// plane is asked for one.
pub fn outbound<'p>(
    shared: &Shared,
    table: &ForwardingTable,
    packets: impl IntoIterator<Item = &'p [u8]>,
    now: Instant,
    out: &mut UdpBatch,
    notes: &mut Vec<Note>,
) {
    for packet in packets {
        if let Err(reason) = outbound_one(shared, table, packet, now, out, notes) {
            shared.drops().count(reason);
        }
    }
}

fn outbound_one(
    shared: &Shared,
    table: &ForwardingTable,
    packet: &[u8],
    now: Instant,
    out: &mut UdpBatch,
    notes: &mut Vec<Note>,
) -> Result<(), DropReason> {
    let view = IpView::parse(packet).map_err(|_| DropReason::BadInnerPacket)?;
    let packet = &packet[..view.len];
    if is_multicast(view.dst) {
        return Err(DropReason::Multicast);
    }
    let peer = table.route(view.dst).ok_or(DropReason::NoRoute)?;
    let stamp = shared.stamp(now);
    let before = peer.counters.last_sent.swap(stamp, Ordering::Relaxed);
    if before == 0 || stamp.saturating_sub(before) > PAUSE_MS {
        notes.push(Note::Active(peer.id));
    }
    let mut state = peer.lock();
    match send(&mut state.session, peer, table, packet, now, out) {
        Ok(()) => Ok(()),
        Err(SealError::NoSession | SealError::NoPath) => {
            state.keep(packet, shared.drops(), now);
            if peer.ask_for_session() {
                notes.push(Note::SessionWanted(peer.id));
            }
            Ok(())
        }
        Err(SealError::TooLarge) => Err(DropReason::TooLarge),
    }
}

/// Sends the packets that waited for a session with `peer`.
pub fn flush_pending(
    shared: &Shared,
    table: &ForwardingTable,
    peer: &Peer,
    now: Instant,
    out: &mut UdpBatch,
) {
    let mut state = peer.lock();
    if !state.session.is_usable(now) || peer.choice().primary.is_none() {
        return;
    }
    while let Some(packet) = state.take_pending(shared.drops(), now) {
        if send(&mut state.session, peer, table, &packet, now, out).is_err() {
            state.keep(&packet, shared.drops(), now);
            return;
        }
    }
}

fn send(
    session: &mut Session,
    peer: &Peer,
    table: &ForwardingTable,
    packet: &[u8],
    now: Instant,
    out: &mut UdpBatch,
) -> Result<(), SealError> {
    let choice = peer.choice();
    let via = choice.primary.ok_or(SealError::NoPath)?;
    let target = target_of(via, table).ok_or(SealError::NoPath)?;
    let header = header_of(via, peer.id);
    let room = header.len() + (packet.len() + SEAL_OVERHEAD).max(MIN_SEAL_BUFFER);
    // A doubled packet is sealed once: the same counter lets the receiver drop the second copy.
    let mut copy = None;
    out.push(target, room, |room| {
        let (head, body) = room.split_at_mut(header.len());
        head.copy_from_slice(header.as_slice());
        let len = session.seal(packet, body, now)?;
        if choice.duplicate.is_some() {
            copy = Some(body[..len].to_vec());
        }
        Ok(header.len() + len)
    })?;
    if let (Some(copy), Some(via)) = (copy, choice.duplicate)
        && let Some(target) = target_of(via, table)
    {
        let mut datagram = header_of(via, peer.id).as_slice().to_vec();
        datagram.extend_from_slice(&copy);
        out.push_bytes(target, &datagram);
    }
    peer.counters.tx_bytes.fetch_add(packet.len() as u64, Ordering::Relaxed);
    Ok(())
}

/// Where datagrams on this path go; none when the relay is not known.
pub(super) fn target_of(via: Via, table: &ForwardingTable) -> Option<Target> {
    match via {
        Via::Direct { remote, local } => Some(Target::Udp { remote, local }),
        Via::RelayUdp => table.relay.map(|remote| Target::Udp { remote, local: None }),
        Via::RelayTcp => Some(Target::Link),
    }
}

/// The bytes before a datagram on some path.
enum Header {
    None,
    Relay([u8; relay::DATA_HEADER_LEN]),
}

impl Header {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::Relay(bytes) => bytes,
        }
    }

    fn len(&self) -> usize {
        self.as_slice().len()
    }
}

fn header_of(via: Via, peer: NodeId) -> Header {
    if via.is_relay() { Header::Relay(relay::data_header(peer)) } else { Header::None }
}

/// Puts a ready datagram (a handshake, disco) for `peer` on a path.
///
/// Returns whether there was a way.
pub(crate) fn send_datagram(
    table: &ForwardingTable,
    peer: NodeId,
    via: Via,
    datagram: &[u8],
    out: &mut UdpBatch,
) -> bool {
    let Some(target) = target_of(via, table) else { return false };
    if via.is_relay() {
        let mut framed = relay::data_header(peer).to_vec();
        framed.extend_from_slice(datagram);
        out.push_bytes(target, &framed);
    } else {
        out.push_bytes(target, datagram);
    }
    true
}

fn is_multicast(dst: IpAddr) -> bool {
    match dst {
        IpAddr::V4(dst) => dst.is_multicast() || dst.is_broadcast(),
        IpAddr::V6(dst) => dst.is_multicast(),
    }
}
