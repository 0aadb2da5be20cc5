//! A packet's way out: TUN -> route -> seal -> UDP batch.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::batch::{Target, UdpBatch};
use super::icmp::{self, Trouble};
use super::offload::{FrameHeader, Segments};
use super::peer::LockedPeer;
use super::session::{MIN_SEAL_BUFFER, SEAL_OVERHEAD, SealError, Session};
use super::{ForwardingTable, Note, PathCounts, Peer, Shared};
use crate::path::{Choice, Via};
use crate::types::{BASE_MTU, DropReason, NodeId, SizeCounts};
use crate::wire::ip::IpView;
use crate::wire::{disco, relay};

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
        let sent = Train::route(shared, table, packet, now, notes).map(|(mut train, len)| {
            if len > train.mtu {
                train.tell_sender(&packet[..len]);
            }
            train.send(&packet[..len], out)
        });
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(reason)) | Err(Stop::Drop(reason)) => shared.drops().count(reason),
            Err(Stop::Wait) => notes.push(Note::PeerWanted(packet.to_vec())),
        }
    }
}

/// Why a packet does not go on.
enum Stop {
    Drop(DropReason),
    /// The server may know whose address it is for.
    Wait,
}

impl From<DropReason> for Stop {
    fn from(reason: DropReason) -> Self {
        Self::Drop(reason)
    }
}

/// Like [`outbound`] for what a TUN interface with offloads hands over: a virtio header and a
/// packet or a super-packet. A super-packet is routed once, and its segments are sealed under one
/// lock. `frame` is scratch afterwards.
pub fn outbound_frame(
    shared: &Shared,
    table: &ForwardingTable,
    frame: &mut [u8],
    now: Instant,
    out: &mut UdpBatch,
    notes: &mut Vec<Note>,
) {
    let sent = match outbound_segments(shared, table, frame, now, out, notes) {
        Err(Stop::Wait) => keep_segments(frame, notes),
        Err(Stop::Drop(reason)) => Err(reason),
        Ok(()) => Ok(()),
    };
    if let Err(reason) = sent {
        shared.drops().count(reason);
    }
}

/// Has what is in the frame wait for its peer.
fn keep_segments(frame: &mut [u8], notes: &mut Vec<Note>) -> Result<(), DropReason> {
    let (header, packet) = FrameHeader::parse(frame).map_err(|_| DropReason::BadInnerPacket)?;
    let len = IpView::parse(packet).map_err(|_| DropReason::BadInnerPacket)?.len;
    let mut segments = Segments::new(&header, &mut packet[..len])?;
    while let Some(segment) = segments.next_segment() {
        notes.push(Note::PeerWanted(segment.to_vec()));
    }
    Ok(())
}

fn outbound_segments(
    shared: &Shared,
    table: &ForwardingTable,
    frame: &mut [u8],
    now: Instant,
    out: &mut UdpBatch,
    notes: &mut Vec<Note>,
) -> Result<(), Stop> {
    let (header, packet) = FrameHeader::parse(frame).map_err(|_| DropReason::BadInnerPacket)?;
    let (mut train, len) = Train::route(shared, table, packet, now, notes)?;
    let longest = header.segmentation.map_or(len, |cut| len.min(cut.longest(&packet[..len])));
    if longest > train.mtu {
        // What the kernel has cut too long for the path was cut before it knew the path.
        train.tell_sender(&packet[..len]);
    }
    let mut segments = Segments::new(&header, &mut packet[..len])?;
    while let Some(segment) = segments.next_segment() {
        train.send(segment, out)?;
    }
    Ok(())
}

/// Packets to one peer, under one lock.
struct Train<'t> {
    shared: &'t Shared,
    peer: &'t Peer,
    way: Way,
    state: LockedPeer<'t>,
    /// Whether that is the second lane.
    is_second: bool,
    notes: &'t mut Vec<Note>,
    now: Instant,
    /// Bytes of the longest packet that the path carries uncut.
    mtu: usize,
    counts: SizeCounts,
    copies: SizeCounts,
    bytes: usize,
}

impl Drop for Train<'_> {
    fn drop(&mut self) {
        self.way.count(&mut self.peer.records().sent, self.counts, self.copies);
        if let Some(via) = self.way.choice.primary {
            self.shared.sent.add(via, self.counts.total().into(), self.bytes as u64);
        }
    }
}

impl<'t> Train<'t> {
    /// Finds the peer that `packet` goes to; gives the packet's length by its header, too.
    fn route(
        shared: &'t Shared,
        table: &'t ForwardingTable,
        packet: &[u8],
        now: Instant,
        notes: &'t mut Vec<Note>,
    ) -> Result<(Self, usize), Stop> {
        let view = IpView::parse(packet).map_err(|_| Stop::Drop(DropReason::BadInnerPacket))?;
        if is_multicast(view.dst) {
            return Err(Stop::Drop(DropReason::Multicast));
        }
        let Some(peer) = table.route(view.dst) else {
            if table.may_be_elsewhere(view.dst) {
                let may = shared.may_want_peer(now);
                return Err(if may { Stop::Wait } else { Stop::Drop(DropReason::QueueFull) });
            }
            if shared.may_answer_unroutable(now) {
                let answer = icmp::answer(packet, view.dst, Trouble::HostUnreachable);
                notes.extend(answer.map(Note::Answer));
            }
            return Err(Stop::Drop(DropReason::NoRoute));
        };
        let stamp = shared.stamp(now);
        let before = peer.counters.last_sent.swap(stamp, Ordering::Relaxed);
        if before == 0 || stamp.saturating_sub(before) > PAUSE_MS {
            notes.push(Note::Active(peer.id));
        }
        let way = Way::to(peer, table);
        let mtu = usize::from(peer.mtu());
        let (counts, copies) = (SizeCounts::default(), SizeCounts::default());
        note_flow(table, peer, packet, now);
        let (state, is_second) = peer.lock_to_seal(now);
        let bytes = 0;
        Ok((
            Self { shared, peer, way, state, is_second, notes, now, mtu, counts, copies, bytes },
            view.len,
        ))
    }

    /// Tells the sender of `packet` what the path carries. The packet goes on all the same, in
    /// fragments or by the control connection: it was accepted, and the answer comes too late for it.
    fn tell_sender(&mut self, packet: &[u8]) {
        let Ok(view) = IpView::parse(packet) else { return };
        if view.dst.is_ipv6() && packet.len() <= usize::from(BASE_MTU) {
            return;
        }
        self.peer.counters.too_big.fetch_add(1, Ordering::Relaxed);
        let mtu = u16::try_from(self.mtu).unwrap_or(u16::MAX);
        if self.peer.records().may_answer(self.now)
            && let Some(answer) = icmp::answer(packet, view.dst, Trouble::TooBig { mtu })
        {
            self.notes.push(Note::TooBig { peer: self.peer.id, mtu, answer });
        }
    }

    fn send(&mut self, packet: &[u8], out: &mut UdpBatch) -> Result<(), DropReason> {
        let mut sent = self.seal(packet, out);
        if self.is_second && matches!(sent, Err(SealError::NoSession)) {
            self.peer.seal_on_second(false);
            self.is_second = false;
            self.state = self.peer.lock();
            sent = self.seal(packet, out);
        }
        match sent {
            Ok(copied) => {
                self.counts.count(packet.len() + SEAL_OVERHEAD, 1);
                self.copies.count(packet.len() + SEAL_OVERHEAD, copied.into());
                self.bytes += packet.len();
                Ok(())
            }
            Err(SealError::NoSession | SealError::NoPath) => {
                if std::mem::take(&mut self.is_second) {
                    // Packets wait on the first lane only.
                    self.state = self.peer.lock();
                }
                self.state.keep(packet, self.shared.drops(), self.now);
                if self.peer.ask_for_session() {
                    self.notes.push(Note::SessionWanted(self.peer.id));
                }
                Ok(())
            }
            Err(SealError::TooLarge) => Err(DropReason::TooLarge),
        }
    }

    fn seal(&mut self, packet: &[u8], out: &mut UdpBatch) -> Result<bool, SealError> {
        send(&mut self.state.session, self.peer, &self.way, packet, self.now, out)
    }
}

/// A packet of a flow is on its way: what comes back is wanted. Before the lane is locked, so that the
/// lock of the records is held for a moment only.
fn note_flow(table: &ForwardingTable, peer: &Peer, packet: &[u8], now: Instant) {
    let mut records = peer.records();
    match &table.filter {
        Some(filter) => filter.outbound(peer.id, packet, &mut records.flows, now),
        None => records.flows.note_connection(packet, now),
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
    let way = Way::to(peer, table);
    while let Some(packet) = state.take_pending(shared.drops(), now) {
        let Ok(copied) = send(&mut state.session, peer, &way, &packet, now, out) else {
            state.keep(&packet, shared.drops(), now);
            return;
        };
        let (mut counts, mut copies) = (SizeCounts::default(), SizeCounts::default());
        counts.count(packet.len() + SEAL_OVERHEAD, 1);
        copies.count(packet.len() + SEAL_OVERHEAD, copied.into());
        way.count(&mut peer.records().sent, counts, copies);
        if let Some(via) = way.choice.primary {
            shared.sent.add(via, 1, packet.len() as u64);
        }
    }
}

/// Sends an empty packet of the session to `peer` on a path: nothing for its programs, and data for
/// every filter on the way. Returns whether there are keys to do it.
pub fn send_keepalive(
    table: &ForwardingTable,
    peer: &Peer,
    via: Via,
    now: Instant,
    out: &mut UdpBatch,
) -> bool {
    let mut state = peer.lock();
    let mut datagram = [0; MIN_SEAL_BUFFER];
    if !state.session.is_usable(now) {
        return false;
    }
    let Ok(len) = state.session.seal(&[], &mut datagram, now) else { return false };
    let mut counts = SizeCounts::default();
    counts.count(len, 1);
    drop(state);
    peer.records().sent.add(via, counts);
    send_datagram(table, peer.id, via, &datagram[..len], out)
}

/// Where packets to a peer go at this moment.
struct Way {
    choice: Choice,
    primary: Option<(Target, Header)>,
    duplicate: Option<(Target, Header)>,
    /// Where a packet goes that is longer than this, instead of by the UDP relay.
    long: Option<(usize, (Target, Header))>,
}

impl Way {
    fn to(peer: &Peer, table: &ForwardingTable) -> Self {
        let choice = peer.choice();
        let way = |via: Option<Via>| {
            let via = via?;
            Some((target_of(via, table)?, header_of(via, peer.id)))
        };
        let long_from = peer.long_from().filter(|_| choice.primary == Some(Via::RelayUdp));
        let by_link = Header::Relay(relay::data_header_by_link(peer.id));
        let long = long_from.map(|len| (len, (Target::Link, by_link)));
        Self { choice, primary: way(choice.primary), duplicate: way(choice.duplicate), long }
    }

    /// Where a packet of this length goes.
    fn of(&self, len: usize) -> Option<&(Target, Header)> {
        match &self.long {
            Some((longest, by_link)) if len > *longest => Some(by_link),
            _ => self.primary.as_ref(),
        }
    }

    fn count(&self, sent: &mut PathCounts, counts: SizeCounts, copies: SizeCounts) {
        let ways = [(self.choice.primary, counts), (self.choice.duplicate, copies)];
        for (via, counts) in ways {
            if let Some(via) = via.filter(|_| counts != SizeCounts::default()) {
                sent.add(via, counts);
            }
        }
    }
}

/// Returns whether a copy went by the second path.
fn send(
    session: &mut Session,
    peer: &Peer,
    way: &Way,
    packet: &[u8],
    now: Instant,
    out: &mut UdpBatch,
) -> Result<bool, SealError> {
    let (target, header) = way.of(packet.len()).ok_or(SealError::NoPath)?;
    let room = header.len() + (packet.len() + SEAL_OVERHEAD).max(MIN_SEAL_BUFFER);
    // A doubled packet is sealed once: the same counter lets the receiver drop the second copy.
    let mut copied = false;
    out.push(*target, room, |room| {
        let (head, body) = room.split_at_mut(header.len());
        head.copy_from_slice(header.as_slice());
        let len = session.seal(packet, body, now)?;
        let may_copy = || match way.choice.early {
            true => peer.spend_early(len),
            false => peer.records().may_copy(packet.len(), now),
        };
        copied = way.duplicate.is_some() && may_copy();
        Ok(header.len() + len)
    })?;
    if copied && let Some((target, copy_header)) = &way.duplicate {
        out.copy_last(header.len(), *target, copy_header.as_slice());
    }
    peer.counters.tx_bytes.fetch_add(packet.len() as u64, Ordering::Relaxed);
    Ok(copied)
}

/// Where datagrams on this path go; none when the relay is not known.
pub(super) fn target_of(via: Via, table: &ForwardingTable) -> Option<Target> {
    match via {
        Via::Direct { remote, local, socket } => Some(Target::Udp { remote, local, socket }),
        Via::RelayUdp => table.relay.map(|remote| Target::Udp {
            remote,
            local: None,
            socket: table.relay_socket,
        }),
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
    // What may be a question of its length travels by itself.
    let alone = disco::travels_alone(datagram);
    let push = if alone { UdpBatch::push_alone } else { UdpBatch::push_bytes };
    if via.is_relay() {
        let mut framed = relay::data_header(peer).to_vec();
        framed.extend_from_slice(datagram);
        push(out, target, &framed);
    } else {
        push(out, target, datagram);
    }
    true
}

fn is_multicast(dst: IpAddr) -> bool {
    match dst {
        IpAddr::V4(dst) => dst.is_multicast() || dst.is_broadcast(),
        IpAddr::V6(dst) => dst.is_multicast(),
    }
}
