//! The UDP side: one thread for each socket, decisions by the relay table, batches in and out.
//!
//! A batch is decided under the lock and sent without it. Datagrams that came as one train and go
//! to one node leave as one train.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error};

use super::StartError;
use super::core::Event;
use super::sockets::UdpPort;
use crate::io::clock;
use crate::io::link::LinkSender;
use crate::io::service::Progress;
use crate::server::ConnectionId;
use crate::server::relay::{Arrival, RelayChange, RelayTable, SocketId, Verdict, Way};
use crate::types::{DropCounters, DropReason, NodeId};
use crate::wire::relay::DATA_HEADER_LEN;

/// How long a thread may take to notice that it should stop.
const POLL_MS: u16 = 200;
/// The largest train that the kernel hands over.
const TRAIN_BYTES: usize = 65_535;

/// What the threads and the connections share: the relay table and the ways out.
#[derive(Debug)]
pub(super) struct Hub {
    table: Mutex<RelayTable>,
    links: Mutex<BTreeMap<ConnectionId, Exit>>,
    ports: Vec<UdpPort>,
    /// One for the thread of each port.
    progress: Vec<Arc<Progress>>,
    drops: DropCounters,
    events: mpsc::Sender<Event>,
}

/// A control connection, as the relay sees it.
#[derive(Debug)]
struct Exit {
    sender: LinkSender,
    node: Option<NodeId>,
}

/// Part of a received buffer, and what becomes of it.
struct Decided {
    bytes: Range<usize>,
    segment_bytes: usize,
    verdict: Verdict,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Neither table is left half changed by a panic: each change is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    pub(super) fn new(ports: Vec<UdpPort>, events: mpsc::Sender<Event>) -> Self {
        Self {
            table: Mutex::default(),
            links: Mutex::default(),
            progress: ports.iter().map(|_| Arc::default()).collect(),
            ports,
            drops: DropCounters::default(),
            events,
        }
    }

    pub(super) fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// How far the threads have come.
    pub(super) fn progress(&self) -> Vec<(String, Arc<Progress>)> {
        let named = self.progress.iter().enumerate();
        named.map(|(number, progress)| (format!("relay-{number}"), Arc::clone(progress))).collect()
    }

    /// A connection is there and can be sent to.
    pub(super) fn add_link(&self, connection: ConnectionId, sender: LinkSender) {
        lock(&self.links).insert(connection, Exit { sender, node: None });
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

    /// Passes on a relay datagram that came over a control connection.
    pub(super) fn handle_link_datagram(&self, connection: ConnectionId, mut datagram: Vec<u8>) {
        let sender = lock(&self.links).get(&connection).and_then(|exit| exit.node);
        let Some(sender) = sender else {
            return self.drops.count(DropReason::BadRelayFrame);
        };
        let verdict = lock(&self.table).handle_from(sender, &mut datagram, clock::now());
        match verdict {
            Verdict::Forward(way) => self.forward(way, &datagram, datagram.len()),
            Verdict::Drop(reason) => self.drops.count(reason),
            // Only UDP sockets are asked questions.
            Verdict::Reply { .. } => self.drops.count(DropReason::Malformed),
        }
    }

    /// Handles one train from a UDP socket.
    fn handle_train(&self, id: SocketId, buffer: &mut [u8], meta: &RecvMeta) {
        let arrival = Arrival { socket: id, source: meta.addr, local: meta.dst_ip };
        let stride = meta.stride.max(1);
        let now = clock::now();
        let mut decided: Vec<Decided> = Vec::new();
        // The header of the last datagram as it came, and as it goes on.
        let mut last_headers: Option<([u8; DATA_HEADER_LEN], [u8; DATA_HEADER_LEN])> = None;
        let mut table = lock(&self.table);
        for start in (0..meta.len).step_by(stride) {
            let end = (start + stride).min(meta.len);
            let Some(datagram) = buffer.get_mut(start..end) else {
                break;
            };
            let came = datagram.first_chunk::<DATA_HEADER_LEN>().copied();
            // Only the header and the arrival decide, and a train is mostly for one node.
            if let (Some(came), Some((last_came, goes)), Some(last)) =
                (came, last_headers, decided.last_mut())
                && came == last_came
            {
                datagram[..DATA_HEADER_LEN].copy_from_slice(&goes);
                last.bytes.end = end;
                continue;
            }
            let verdict = table.handle_datagram(datagram, arrival, now);
            let goes = datagram.first_chunk::<DATA_HEADER_LEN>().copied();
            last_headers = came.zip(goes).filter(|_| matches!(verdict, Verdict::Forward(_)));
            match decided.last_mut() {
                Some(last) if last.verdict == verdict && matches!(verdict, Verdict::Forward(_)) => {
                    last.bytes.end = end;
                }
                _ => {
                    let bytes = start..end;
                    decided.push(Decided { bytes, segment_bytes: end - start, verdict });
                }
            }
        }
        while let Some((node, endpoint)) = table.poll_sighting() {
            // When the core is that busy, the node's own word comes soon enough.
            let _ = self.events.try_send(Event::Sighted { node, endpoint });
        }
        drop(table);
        for Decided { bytes, segment_bytes, verdict } in decided {
            match verdict {
                Verdict::Forward(way) => {
                    self.forward(way, buffer.get(bytes).unwrap_or_default(), segment_bytes);
                }
                Verdict::Reply { bytes, from } => {
                    let exit = Arrival { socket: from, ..arrival };
                    self.send_udp(exit, &bytes, bytes.len());
                }
                Verdict::Drop(reason) => self.drops.count(reason),
            }
        }
    }

    /// Sends one or more datagrams of `segment_bytes` each (the last may be shorter).
    fn forward(&self, way: Way, bytes: &[u8], segment_bytes: usize) {
        match way {
            Way::Udp(exit) => self.send_udp(exit, bytes, segment_bytes),
            Way::Link(connection) => {
                let sender = self.sender(connection);
                for datagram in bytes.chunks(segment_bytes.max(1)) {
                    let sent = match &sender {
                        Some(sender) => sender.try_send_relay(datagram),
                        None => Err(DropReason::RelayPeerAbsent),
                    };
                    if let Err(reason) = sent {
                        self.drops.count(reason);
                    }
                }
            }
        }
    }

    fn send_udp(&self, exit: Arrival, bytes: &[u8], segment_bytes: usize) {
        let Some(port) = self.ports.get(usize::from(exit.socket.0)) else {
            return self.drops.count(DropReason::SendFailed);
        };
        let segment_bytes = segment_bytes.max(1);
        let train_bytes = segment_bytes * port.state.max_gso_segments().max(1);
        for train in bytes.chunks(train_bytes) {
            match send(port, exit, train, segment_bytes) {
                Ok(()) => {}
                // A full queue has no room for the parts either: the senders slow down by losing.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let datagrams = train.len().div_ceil(segment_bytes);
                    self.drops.count_many(DropReason::SendFailed, datagrams as u64);
                }
                // A network card or tunnel that takes no trains may take them one by one.
                Err(_) => self.send_singly(port, exit, train, segment_bytes),
            }
        }
    }

    fn send_singly(&self, port: &UdpPort, exit: Arrival, train: &[u8], segment_bytes: usize) {
        for datagram in train.chunks(segment_bytes) {
            if let Err(error) = send(port, exit, datagram, segment_bytes) {
                debug!(%error, "cannot send");
                self.drops.count(DropReason::SendFailed);
            }
        }
    }
}

fn send(port: &UdpPort, exit: Arrival, bytes: &[u8], segment_bytes: usize) -> io::Result<()> {
    let transmit = Transmit {
        destination: exit.source,
        ecn: None,
        contents: bytes,
        segment_size: (bytes.len() > segment_bytes).then_some(segment_bytes),
        src_ip: exit.local,
    };
    port.state.try_send(UdpSockRef::from(&port.socket), &transmit)
}

/// Starts the thread of every UDP socket; they end when `stopping` turns true.
pub(super) fn spawn(
    hub: &Arc<Hub>,
    stopping: &watch::Receiver<bool>,
) -> Result<Vec<std::thread::JoinHandle<()>>, StartError> {
    let start = |number: u16| {
        let (hub, stopping) = (Arc::clone(hub), stopping.clone());
        std::thread::Builder::new()
            .name(format!("relay-{number}"))
            .spawn(move || run(&hub, SocketId(number), &stopping))
            .map_err(|source| StartError::System { action: "start a thread", source })
    };
    (0u16..).zip(&hub.ports).map(|(number, _)| start(number)).collect()
}

fn run(hub: &Hub, id: SocketId, stopping: &watch::Receiver<bool>) {
    let number = usize::from(id.0);
    let (Some(port), Some(progress)) = (hub.ports.get(number), hub.progress.get(number)) else {
        return;
    };
    let mut buffers = vec![vec![0; TRAIN_BYTES]; BATCH_SIZE];
    let mut metas = [RecvMeta::default(); BATCH_SIZE];
    while !*stopping.borrow() && stopping.has_changed().is_ok() {
        progress.step();
        let mut wait = [PollFd::new(port.socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut wait, PollTimeout::from(POLL_MS)).is_ok_and(|ready| ready == 0) {
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
        for (buffer, meta) in buffers.iter_mut().zip(&metas).take(count) {
            hub.handle_train(id, buffer, meta);
        }
    }
}
