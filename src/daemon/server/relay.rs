//! The UDP side: one thread for each socket, decisions by the relay table, batches in and out.
//!
//! A batch is decided under the lock and sent without it: answers first, then data, in turns for
//! the nodes that it is for. Datagrams that came as one train and go to one node leave as one
//! train. What a full socket does not take waits in [`FairQueues`].

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error};

mod decide;
mod trains;

use super::StartError;
use super::core::Event;
use super::metrics::Relayed;
use super::sockets::UdpPort;
use crate::io::clock;
use crate::io::link::{LinkSender, RelayBatch};
use crate::io::listen::Fare;
use crate::io::service::Progress;
use crate::io::threads::Fallen;
use crate::io::udp::{self, send_train};
use crate::server::ConnectionId;
use crate::server::relay::limit::Limits;
use crate::server::relay::queue::{FairQueues, Train};
use crate::server::relay::{Arrival, RelayChange, RelayTable, SocketId, Verdict, Way};
use crate::types::{DropCounters, DropReason, NodeId, PublicKey};
use crate::wire::relay::travels_alone;
use decide::{Decided, decide, keep_within_limits};
use trains::Trains;

/// How long a thread may take to notice that it should stop.
const POLL_MS: u16 = 200;
/// Trains received in one call: full ones are still in the processor's cache when they leave.
const TRAINS: usize = 8;

/// What the threads and the connections share: the relay table and the ways out.
#[derive(Debug)]
pub(super) struct Hub {
    table: Mutex<RelayTable>,
    links: Mutex<BTreeMap<ConnectionId, Exit>>,
    ports: Vec<UdpPort>,
    /// Nobody sends to these, so no NAT takes what they send for an answer.
    knockers: Vec<std::net::UdpSocket>,
    /// One for the thread of each port.
    progress: Vec<Arc<Progress>>,
    drops: DropCounters,
    /// Out by UDP, and out on control connections.
    relayed: [Relayed; 2],
    /// Connections so far.
    links_made: AtomicU64,
    /// Bytes that wait for each port.
    waiting: Vec<AtomicUsize>,
    events: mpsc::Sender<Event>,
}

/// A control connection, as the relay sees it.
#[derive(Debug)]
struct Exit {
    sender: LinkSender,
    node: Option<NodeId>,
    /// What it counts for its source as long as it may be a stranger's.
    fare: Option<(Fare, PublicKey)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Neither table is left half changed by a panic: each change is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    pub(super) fn new(ports: Vec<UdpPort>, table: RelayTable, events: mpsc::Sender<Event>) -> Self {
        Self {
            table: Mutex::new(table),
            links: Mutex::default(),
            progress: ports.iter().map(|_| Arc::default()).collect(),
            relayed: Default::default(),
            links_made: AtomicU64::new(0),
            waiting: ports.iter().map(|_| AtomicUsize::new(0)).collect(),
            ports,
            knockers: knockers(),
            drops: DropCounters::default(),
            events,
        }
    }

    /// By the word for the way out.
    pub(super) fn relayed(&self) -> impl Iterator<Item = (&'static str, &Relayed)> {
        ["udp", "tcp"].into_iter().zip(&self.relayed)
    }

    /// Whether trains are sent in one call.
    pub(super) fn sends_trains(&self) -> bool {
        self.ports.iter().all(|port| port.gso.works())
    }

    /// How much it carries.
    pub(super) fn limits(&self) -> Limits {
        lock(&self.table).limits()
    }

    /// Carries so much from now on.
    pub(super) fn set_limits(&self, limits: Limits) {
        lock(&self.table).set_limits(limits);
    }

    /// Connections now, and ever.
    pub(super) fn connections(&self) -> (usize, u64) {
        (lock(&self.links).len(), self.links_made.load(Ordering::Relaxed))
    }

    /// Messages and datagrams that wait on control connections.
    pub(super) fn waiting_on_links(&self) -> usize {
        lock(&self.links).values().map(|exit| exit.sender.waiting()).sum()
    }

    /// Bytes that wait for a full socket.
    pub(super) fn waiting_bytes(&self) -> usize {
        self.waiting.iter().map(|bytes| bytes.load(Ordering::Relaxed)).sum()
    }

    /// What has died here, up to this moment.
    pub(super) fn drops(&self) -> &DropCounters {
        let unread = self.ports.iter().map(|port| port.unread.take(&port.socket)).sum();
        self.drops.count_many(DropReason::ReceiveBufferFull, unread);
        &self.drops
    }

    /// How far the threads have come.
    pub(super) fn progress(&self) -> Vec<(String, Arc<Progress>)> {
        let named = self.progress.iter().enumerate();
        named.map(|(number, progress)| (format!("relay-{number}"), Arc::clone(progress))).collect()
    }

    /// A connection is there and can be sent to.
    pub(super) fn add_link(
        &self,
        connection: ConnectionId,
        sender: LinkSender,
        fare: (Fare, PublicKey),
    ) {
        self.links_made.fetch_add(1, Ordering::Relaxed);
        let exit = Exit { sender, node: None, fare: Some(fare) };
        lock(&self.links).insert(connection, exit);
    }

    pub(super) fn remove_link(&self, connection: ConnectionId) {
        lock(&self.links).remove(&connection);
    }

    /// The sending half of a connection.
    pub(super) fn sender(&self, connection: ConnectionId) -> Option<LinkSender> {
        lock(&self.links).get(&connection).map(|exit| exit.sender.clone())
    }

    /// Takes a change from the control plane.
    pub(super) fn apply(&self, change: RelayChange) {
        let mut links = lock(&self.links);
        match &change {
            RelayChange::Member(_) => {}
            RelayChange::Online { node, connection, .. } => {
                if let Some(exit) = links.get_mut(connection) {
                    exit.node = Some(*node);
                    if let Some((fare, member)) = exit.fare.take() {
                        fare.give_back(member, clock::now());
                    }
                }
            }
            RelayChange::Offline { connection, .. } => {
                if let Some(exit) = links.get_mut(connection) {
                    exit.node = None;
                }
            }
            RelayChange::Removed(node) => {
                for exit in links.values_mut().filter(|exit| exit.node == Some(*node)) {
                    exit.node = None;
                }
            }
        }
        drop(links);
        lock(&self.table).apply(change);
    }

    /// Passes on relay datagrams that came over a control connection. Those in a row that go the same
    /// way leave as one train.
    pub(super) fn handle_link_datagrams(
        &self,
        connection: ConnectionId,
        datagrams: &mut RelayBatch,
    ) {
        let sender = lock(&self.links).get(&connection).and_then(|exit| exit.node);
        let Some(sender) = sender else {
            let count = datagrams.ranges().count() as u64;
            return self.drops.count_many(DropReason::BadRelayFrame, count);
        };
        let now = clock::now();
        let ranges: Vec<Range<usize>> = datagrams.ranges().collect();
        let bytes = datagrams.bytes_mut();
        let mut trains = Trains::default();
        let mut table = lock(&self.table);
        for range in ranges {
            let Some(datagram) = bytes.get_mut(range.clone()) else { continue };
            let alone = travels_alone(datagram);
            let mut verdict = table.handle_from(sender, datagram, now);
            if matches!(verdict, Verdict::Forward(_)) {
                let admitted = table.admit(sender, 1, datagram.len(), now);
                if admitted.datagrams == 0 {
                    verdict = Verdict::Drop(admitted.refused);
                }
            }
            match verdict {
                Verdict::Forward(way) => trains.push(way, range, alone),
                Verdict::Drop(reason) => self.drops.count(reason),
                // Only UDP sockets are asked questions.
                Verdict::Reply { .. } | Verdict::Knock { .. } => {
                    self.drops.count(DropReason::Malformed);
                }
            }
        }
        drop(table);
        for (way, range, segment_bytes) in trains.0 {
            self.forward(way, bytes.get(range).unwrap_or_default(), segment_bytes, None);
        }
    }

    /// Handles what one call received on a UDP socket.
    fn handle_batch(
        &self,
        id: SocketId,
        buffers: &mut [Vec<u8>],
        metas: &[RecvMeta],
        waiting: &mut FairQueues,
    ) {
        let now = clock::now();
        let mut decided: Vec<Decided> = Vec::new();
        let mut table = lock(&self.table);
        for (number, (buffer, meta)) in buffers.iter_mut().zip(metas).enumerate() {
            let before = decided.len();
            decide(&mut table, id, number, buffer, meta, now, &mut decided);
            for part in decided.get_mut(before..).unwrap_or_default() {
                keep_within_limits(&mut table, buffer, part, now, &self.drops);
            }
        }
        while let Some((node, endpoint)) = table.poll_sighting() {
            // When the core is that busy, the node's own word comes soon enough.
            let _ = self.events.try_send(Event::Sighted { node, endpoint });
        }
        drop(table);
        // Control goes ahead of data, and the nodes take turns: the first train of each, then the
        // second of each.
        let mut turns: BTreeMap<(SocketId, SocketAddr), usize> = BTreeMap::new();
        let mut forward = Vec::new();
        for Decided { buffer, bytes, segment_bytes, verdict } in decided {
            match verdict {
                // All of it was over a limit.
                Verdict::Forward(_) if bytes.is_empty() => {}
                Verdict::Forward(way) => {
                    let turn = match way {
                        Way::Udp(exit) | Way::Unproved(exit) => {
                            turns.entry((exit.socket, exit.source)).or_insert(0)
                        }
                        Way::Link(_) => &mut 0,
                    };
                    forward.push((*turn, way, buffer, bytes, segment_bytes));
                    *turn += 1;
                }
                Verdict::Reply { bytes, from } => {
                    let Some(meta) = metas.get(buffer) else { continue };
                    let exit = Arrival { socket: from, source: meta.addr, local: meta.dst_ip };
                    self.send_udp(exit, &bytes, bytes.len(), None);
                }
                Verdict::Knock { bytes, to } => self.knock(&bytes, to),
                Verdict::Drop(reason) => self.drops.count(reason),
            }
        }
        forward.sort_by_key(|(turn, ..)| *turn);
        for (_, way, buffer, bytes, segment_bytes) in forward {
            let bytes = buffers.get(buffer).and_then(|buffer| buffer.get(bytes));
            self.forward(way, bytes.unwrap_or_default(), segment_bytes, Some(waiting));
        }
    }

    fn knock(&self, bytes: &[u8], to: SocketAddr) {
        // What came over IPv4 to a socket for both families is still an IPv4 address outside.
        let to = SocketAddr::new(to.ip().to_canonical(), to.port());
        let mut sockets = self.knockers.iter();
        let fits = |it: &&std::net::UdpSocket| {
            it.local_addr().is_ok_and(|own| own.is_ipv4() == to.is_ipv4())
        };
        if sockets.find(fits).is_none_or(|socket| socket.send_to(bytes, to).is_err()) {
            self.drops.count(DropReason::SendFailed);
        }
    }

    /// Sends one or more datagrams of `segment_bytes` each (the last may be shorter). What finds
    /// the socket full goes to `waiting`, or is lost.
    fn forward(
        &self,
        way: Way,
        bytes: &[u8],
        segment_bytes: usize,
        waiting: Option<&mut FairQueues>,
    ) {
        let [by_udp, by_tcp] = &self.relayed;
        let relayed = if matches!(way, Way::Link(_)) { by_tcp } else { by_udp };
        relayed.add(bytes.len().div_ceil(segment_bytes.max(1)), bytes.len());
        match way {
            Way::Udp(exit) | Way::Unproved(exit) => {
                self.send_udp(exit, bytes, segment_bytes, waiting);
            }
            Way::Link(connection) => {
                let sender = self.sender(connection);
                let datagrams = bytes.len().div_ceil(segment_bytes.max(1));
                let sent = match &sender {
                    Some(sender) => sender.try_send_train(bytes, segment_bytes),
                    None => Err((DropReason::RelayPeerAbsent, datagrams)),
                };
                if let Err((reason, lost)) = sent {
                    self.drops.count_many(reason, lost as u64);
                }
            }
        }
    }

    fn send_udp(
        &self,
        exit: Arrival,
        bytes: &[u8],
        segment_bytes: usize,
        waiting: Option<&mut FairQueues>,
    ) {
        let segment_bytes = segment_bytes.max(1);
        let behind = waiting.as_ref().is_some_and(|waiting| waiting.waits(&exit));
        let sent = if behind { 0 } else { self.send_trains(exit, bytes, segment_bytes) };
        let rest = bytes.get(sent..).unwrap_or_default();
        if rest.is_empty() {
            return;
        }
        let train = Train { exit, bytes: rest.to_vec(), segment_bytes };
        let (lost, reason) = match waiting {
            Some(waiting) => (waiting.push(train), DropReason::QueueFull),
            None => (train.datagrams(), DropReason::SendFailed),
        };
        self.drops.count_many(reason, lost as u64);
    }

    /// Sends until the socket is full; returns how many bytes are done with, sent or lost.
    fn send_trains(&self, exit: Arrival, bytes: &[u8], segment_bytes: usize) -> usize {
        let Some(port) = self.ports.get(usize::from(exit.socket.0)) else {
            self.drops.count(DropReason::SendFailed);
            return bytes.len();
        };
        // Who asked one address of ours takes no answer from another.
        let train = udp::Train {
            bytes,
            segment: segment_bytes,
            local: exit.local,
            may_leave_elsewhere: false,
        };
        let sent = send_train(&port.gso, train, |contents, segment_size, src_ip| {
            let destination = exit.source;
            let transmit = Transmit { destination, ecn: None, contents, segment_size, src_ip };
            port.state.try_send(UdpSockRef::from(&port.socket), &transmit)
        });
        if let Some(error) = sent.error {
            debug!(%error, "cannot send");
            self.drops.count_many(DropReason::SendFailed, sent.lost as u64);
        }
        sent.done
    }

    /// Sends what waits, in turn, until its sockets are full again.
    fn flush(&self, waiting: &mut FairQueues) {
        let mut full = Vec::new();
        while let Some(mut train) = waiting.pop(&full) {
            let sent = self.send_trains(train.exit, &train.bytes, train.segment_bytes);
            if sent < train.bytes.len() {
                train.bytes.drain(..sent);
                full.push(train.exit.socket);
                waiting.put_back(train);
            }
        }
    }
}

/// One for each family that this machine has.
fn knockers() -> Vec<std::net::UdpSocket> {
    let any: [SocketAddr; 2] =
        [(Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::UNSPECIFIED, 0).into()];
    let open = |any: SocketAddr| {
        let socket = std::net::UdpSocket::bind(any).ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(socket)
    };
    any.into_iter().filter_map(open).collect()
}

/// Starts the thread of every UDP socket; they end when `stopping` turns true. `fallen` has the one that
/// ends before.
pub(super) fn spawn(
    hub: &Arc<Hub>,
    stopping: &watch::Receiver<bool>,
    fallen: &Fallen,
) -> Result<Vec<std::thread::JoinHandle<()>>, StartError> {
    let start = |number: u16| {
        let (hub, stopping, told) = (Arc::clone(hub), stopping.clone(), stopping.clone());
        let is_told = move || should_stop(&told);
        fallen
            .spawn(&format!("relay-{number}"), is_told, move || {
                run(&hub, SocketId(number), &stopping);
            })
            .map_err(|source| StartError::System { action: "start a thread", source })
    };
    (0u16..).zip(&hub.ports).map(|(number, _)| start(number)).collect()
}

fn should_stop(stopping: &watch::Receiver<bool>) -> bool {
    *stopping.borrow() || stopping.has_changed().is_err()
}

fn run(hub: &Hub, id: SocketId, stopping: &watch::Receiver<bool>) {
    let number = usize::from(id.0);
    let (Some(port), Some(progress)) = (hub.ports.get(number), hub.progress.get(number)) else {
        return;
    };
    let mut buffers = vec![vec![0; udp::SLOT_BYTES]; TRAINS];
    let mut metas = [RecvMeta::default(); TRAINS];
    let mut waiting = FairQueues::default();
    while !should_stop(stopping) {
        progress.step();
        if let Some(bytes) = hub.waiting.get(number) {
            bytes.store(waiting.bytes(), Ordering::Relaxed);
        }
        let mut wait = vec![PollFd::new(port.socket.as_fd(), PollFlags::POLLIN)];
        let full: BTreeSet<SocketId> = waiting.sockets().collect();
        let full = full.iter().filter_map(|id| hub.ports.get(usize::from(id.0)));
        wait.extend(full.map(|port| PollFd::new(port.socket.as_fd(), PollFlags::POLLOUT)));
        if poll(&mut wait, PollTimeout::from(POLL_MS)).is_ok_and(|ready| ready == 0) {
            continue;
        }
        hub.flush(&mut waiting);
        if wait.first().is_some_and(|own| own.any() == Some(false)) {
            continue;
        }
        let mut slices: Vec<IoSliceMut<'_>> =
            buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
        let count = match port.state.recv(UdpSockRef::from(&port.socket), &mut slices, &mut metas) {
            Ok(count) => count,
            // ICMP errors of earlier datagrams arrive here too; none of them is about the socket.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {
                return error!(%error, "a relay socket is gone");
            }
            Err(error) => {
                debug!(%error, "cannot receive");
                continue;
            }
        };
        hub.handle_batch(id, &mut buffers, &metas[..count], &mut waiting);
    }
}
