//! The two threads that move packets, and the ports they share with the control task.
//!
//! Each runs to completion: read a batch, call the packet function, write the batch. Nothing is
//! handed from thread to thread but notes for the control plane. The thread that has just written
//! to the interface looks for an answer there, which would else wait for the other one to wake.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use arc_swap::ArcSwapOption;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc;

use super::extra::ExtraSockets;
use super::report::OffloadReport;
use crate::dataplane::{
    Note, Run, Shared, Source, Target, TunBatch, UdpBatch, inbound_train, outbound, outbound_frame,
};
use crate::io::clock;
use crate::io::link::LinkSender;
use crate::io::opener::send_with_ttl;
use crate::io::tun::Tun;
use crate::io::udp::{RecvBuffers, UdpSocket};
use crate::node::Opener;
use crate::types::{DropReason, SocketId};

/// What the TUN thread reads before it looks at the other descriptors.
const TUN_BUDGET: Budget = Budget { packets: 64, bytes: 64 * MAX_PACKET };
/// What the receiving thread looks for: a handful of acknowledgements, no upload.
const ANSWER_BUDGET: Budget = Budget { packets: 16, bytes: 16_000 };
/// The largest packet that a TUN interface can hand over, with its header.
const MAX_PACKET: usize = 65_536 + 64;
/// Sealed bytes that are sent before more packets are read: one full run.
const SEND_BYTES: usize = 65_000;
/// Opened bytes that are written before more datagrams are looked at.
const WRITE_BYTES: usize = 128 << 10;
/// How long a full socket is waited for before its datagrams are dropped.
const FULL_SOCKET_WAIT_MS: u8 = 5;

/// Everything that datagrams and packets can leave by.
#[derive(Debug)]
pub(super) struct Ports {
    pub(super) udp_v4: Option<UdpSocket>,
    pub(super) udp_v6: Option<UdpSocket>,
    pub(super) extra: ExtraSockets,
    tun: ArcSwapOption<Tun>,
    link: ArcSwapOption<LinkSender>,
    shared: Arc<Shared>,
    stop: EventFd,
    /// Wakes the TUN thread when there is another interface.
    tun_changed: EventFd,
}

impl Ports {
    pub(super) fn new(
        udp_v4: Option<UdpSocket>,
        udp_v6: Option<UdpSocket>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            udp_v4,
            udp_v6,
            extra: ExtraSockets::new()?,
            tun: ArcSwapOption::empty(),
            link: ArcSwapOption::empty(),
            shared,
            stop: EventFd::from_value_and_flags(0, flags)?,
            tun_changed: EventFd::from_value_and_flags(0, flags)?,
        })
    }

    pub(super) fn link(&self) -> Option<Arc<LinkSender>> {
        self.link.load_full()
    }

    pub(super) fn set_link(&self, link: Option<LinkSender>) {
        self.link.store(link.map(Arc::new));
    }

    pub(super) fn set_tun(&self, tun: Option<Arc<Tun>>) {
        self.tun.store(tun);
        // Fails only when the counter is full, and then the thread is awake anyway.
        let _ = self.tun_changed.write(1);
    }

    pub(super) fn listen_port(&self) -> u16 {
        let socket = self.udp_v4.as_ref().or(self.udp_v6.as_ref());
        socket.and_then(|socket| socket.local_addr().ok()).map_or(0, |addr| addr.port())
    }

    /// The offloads in use at this moment.
    pub(super) fn offloads(&self) -> OffloadReport {
        let trains = self.tun.load().as_ref().map(|tun| tun.trains()).unwrap_or_default();
        let all = |has: fn(&UdpSocket) -> bool| self.sockets().all(has);
        OffloadReport {
            tun_tso: trains.tcp,
            tun_uso: trains.udp,
            udp_gso: all(UdpSocket::sends_trains),
            udp_gro: all(UdpSocket::receives_trains),
        }
    }

    /// Does something with a socket; nothing when it is not there (any more).
    fn with_socket<T>(
        &self,
        socket: SocketId,
        remote: SocketAddr,
        work: impl FnOnce(&UdpSocket) -> T,
    ) -> Option<T> {
        if socket != SocketId::MAIN {
            return self.extra.get(socket).map(|socket| work(&socket));
        }
        let main = if remote.is_ipv4() { &self.udp_v4 } else { &self.udp_v6 };
        main.as_ref().map(work)
    }

    fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        self.udp_v4.iter().chain(&self.udp_v6)
    }
}

/// Sends a whole batch. What cannot be sent is dropped and counted.
pub(super) fn send_all(ports: &Ports, batch: &UdpBatch) {
    send_runs(ports, batch.runs());
}

fn send_runs<'b>(ports: &Ports, runs: impl Iterator<Item = (&'b Run, &'b [u8])>) {
    let drops = ports.shared.drops();
    for (run, bytes) in runs {
        match run.target {
            Target::Udp { remote, local, socket } => {
                let sent = ports.with_socket(socket, remote, |socket| {
                    send_or_wait(socket, remote, local, bytes, run.segment)
                });
                if !matches!(sent, Some(Ok(()))) {
                    let datagrams = bytes.len().div_ceil(run.segment.max(1));
                    drops.count_many(DropReason::SendFailed, datagrams as u64);
                    tracing::trace!(%remote, ?sent, "datagrams not sent");
                }
            }
            Target::Link => {
                let link = ports.link.load();
                for datagram in bytes.chunks(run.segment.max(1)) {
                    let sent = link
                        .as_ref()
                        .map_or(Err(DropReason::NoPath), |link| link.try_send_relay(datagram));
                    if let Err(reason) = sent {
                        drops.count(reason);
                    }
                }
            }
        }
    }
}

/// Sends a datagram with a short life. What cannot be sent now is not worth waiting for.
pub(super) fn send_opener(ports: &Ports, opener: &Opener) {
    let sent = ports.with_socket(opener.socket, opener.remote, |socket| {
        send_with_ttl(socket, opener.remote, opener.ttl, &opener.datagram)
    });
    if let Some(Err(error)) = sent {
        ports.shared.drops().count(DropReason::SendFailed);
        tracing::trace!(remote = %opener.remote, %error, "opener not sent");
    }
}

fn send_or_wait(
    socket: &UdpSocket,
    remote: SocketAddr,
    local: Option<std::net::IpAddr>,
    bytes: &[u8],
    segment: usize,
) -> io::Result<()> {
    match socket.send(remote, local, bytes, segment) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
            poll(&mut fds, FULL_SOCKET_WAIT_MS)?;
            socket.send(remote, local, bytes, segment)
        }
        // An address that we no longer have must not hold the datagram back.
        Err(error) if local.is_some() && error.kind() != io::ErrorKind::PermissionDenied => {
            tracing::trace!(%error, "sending from the address that was asked failed");
            socket.send(remote, None, bytes, segment)
        }
        result => result,
    }
}

/// Writes a whole batch to the TUN interface.
pub(super) fn write_tun(ports: &Ports, batch: &mut TunBatch) {
    batch.finish();
    let tun = ports.tun.load();
    for frame in batch.frames() {
        let written = tun.as_ref().map(|tun| tun.write_frame(&frame));
        if !matches!(written, Some(Ok(()))) {
            let packets = frame.packets().count() as u64;
            ports.shared.drops().count_many(DropReason::TunWriteFailed, packets);
        }
    }
}

/// The running threads; they end when this is dropped.
#[derive(Debug)]
pub(super) struct Threads {
    ports: Arc<Ports>,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts both. Notes go to `notes`; when it is full they are dropped and counted.
    pub(super) fn start(ports: &Arc<Ports>, notes: &mpsc::Sender<Note>) -> io::Result<Self> {
        let outlet = Arc::new(Mutex::new(Outlet::new()));
        let mut handles = Vec::new();
        for (name, run) in [
            ("tun-to-udp", run_outbound as fn(&Ports, &Mutex<Outlet>, &NoteSender)),
            ("udp-to-tun", run_inbound),
        ] {
            let (ports, outlet) = (Arc::clone(ports), Arc::clone(&outlet));
            let notes = NoteSender { notes: notes.clone(), shared: Arc::clone(&ports.shared) };
            let thread = std::thread::Builder::new().name(name.into());
            handles.push(thread.spawn(move || run(&ports, &outlet, &notes))?);
        }
        Ok(Self { ports: Arc::clone(ports), handles })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Never read, so it stays readable and every poll sees it.
        let _ = self.ports.stop.write(1);
        for handle in self.handles.drain(..) {
            if handle.join().is_err() {
                tracing::error!("a packet thread panicked");
            }
        }
    }
}

struct NoteSender {
    notes: mpsc::Sender<Note>,
    shared: Arc<Shared>,
}

impl NoteSender {
    fn send(&self, notes: &mut Vec<Note>) {
        for note in notes.drain(..) {
            if self.notes.try_send(note).is_err() {
                self.shared.drops().count(DropReason::QueueFull);
            }
        }
    }
}

/// How much is read in one go.
#[derive(Clone, Copy)]
struct Budget {
    packets: usize,
    bytes: usize,
}

/// The way from the interface to the sockets; one thread at a time goes it.
struct Outlet {
    buffer: Vec<u8>,
    batch: UdpBatch,
    asked: Vec<Note>,
}

impl Outlet {
    fn new() -> Self {
        Self { buffer: vec![0; MAX_PACKET], batch: UdpBatch::default(), asked: Vec::new() }
    }

    /// Sends what is there, up to `budget`.
    fn drain(&mut self, ports: &Ports, tun: &Tun, notes: &NoteSender, budget: Budget) {
        let Self { buffer, batch, asked } = self;
        let shared = &ports.shared;
        let table = shared.table();
        let now = clock::now();
        batch.clear();
        let mut bytes = 0;
        for _ in 0..budget.packets {
            let Ok(len) = tun.read(buffer) else { break };
            bytes += len;
            if tun.has_headers() {
                outbound_frame(shared, &table, &mut buffer[..len], now, batch, asked);
            } else {
                outbound(shared, &table, [&buffer[..len]], now, batch, asked);
            }
            if batch.len() > SEND_BYTES {
                send_runs(ports, batch.closed_runs());
                batch.keep_open_run();
            }
            if bytes > budget.bytes {
                break;
            }
        }
        send_all(ports, batch);
        batch.clear();
        notes.send(asked);
    }
}

fn run_outbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) {
    loop {
        let tun = ports.tun.load_full();
        let mut fds = vec![
            PollFd::new(ports.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(ports.tun_changed.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(tun) = &tun {
            fds.push(PollFd::new(tun.as_fd(), PollFlags::POLLIN));
        }
        if !wait(&mut fds) {
            return;
        }
        if fds[1].any() == Some(true) {
            let _ = ports.tun_changed.read();
            continue;
        }
        let broken = fds.get(2).and_then(PollFd::revents);
        if broken.is_some_and(|events| events.contains(PollFlags::POLLERR)) {
            // The interface was removed. Until the control task has made another one there is
            // nothing to wait for.
            ports.tun.compare_and_swap(&tun, None);
            continue;
        }
        let Some(tun) = tun else { continue };
        // A batch that a panic left behind is cleared before it is used.
        let mut outlet = outlet.lock().unwrap_or_else(PoisonError::into_inner);
        outlet.drain(ports, &tun, notes, TUN_BUDGET);
    }
}

fn run_inbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) {
    let mut buffers = RecvBuffers::default();
    let mut batch = TunBatch::default();
    let mut asked = Vec::new();
    loop {
        let mut fds = vec![
            PollFd::new(ports.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(ports.extra.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(ports.sockets().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        if !wait(&mut fds) {
            return;
        }
        let extra = if fds[1].any() == Some(true) { ports.extra.ready() } else { Vec::new() };
        let main = ports.sockets().map(|socket| (SocketId::MAIN, socket));
        for (id, socket) in main.chain(extra.iter().map(|(id, socket)| (*id, &**socket))) {
            if socket.receive(&mut buffers).is_err() {
                continue;
            }
            let shared = &ports.shared;
            let table = shared.table();
            let now = clock::now();
            let tun = ports.tun.load_full();
            let kinds = tun.as_ref().map(|tun| tun.trains()).unwrap_or_default();
            batch.clear(kinds);
            let mut wrote = false;
            for train in buffers.trains() {
                let (remote, local) = (train.remote, train.local);
                let source = Source::Udp { remote, local, socket: id };
                let (bytes, stride) = (train.bytes, train.stride);
                inbound_train(shared, &table, source, bytes, stride, now, &mut batch, &mut asked);
                if batch.len() > WRITE_BYTES {
                    write_tun(ports, &mut batch);
                    batch.clear(kinds);
                    wrote = true;
                }
            }
            wrote |= !batch.is_empty();
            write_tun(ports, &mut batch);
            notes.send(&mut asked);
            if wrote
                && let Some(tun) = &tun
                && let Ok(mut outlet) = outlet.try_lock()
            {
                outlet.drain(ports, tun, notes, ANSWER_BUDGET);
            }
        }
    }
}

/// Waits for any of `fds`; `false` when the first one, the stop signal, is set.
fn wait(fds: &mut [PollFd<'_>]) -> bool {
    match poll(fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => fds[0].any() != Some(true),
        Err(error) => {
            tracing::error!(%error, "poll failed, packets stop");
            false
        }
    }
}
