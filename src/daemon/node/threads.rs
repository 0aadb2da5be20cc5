//! The two threads that move packets, and the ports they share with the control task.
//!
//! Each runs to completion: read a batch, call the packet function, write the batch. Nothing is
//! handed from thread to thread but notes for the control plane.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use arc_swap::ArcSwapOption;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc;

use crate::dataplane::{Note, Shared, Source, Target, TunBatch, UdpBatch, inbound, outbound};
use crate::io::clock;
use crate::io::link::LinkSender;
use crate::io::opener::send_with_ttl;
use crate::io::tun::Tun;
use crate::io::udp::{RecvBuffers, UdpSocket};
use crate::node::Opener;
use crate::types::DropReason;

/// Packets read from the TUN interface before they are sent.
const TUN_BATCH: usize = 64;
/// The largest packet that a TUN interface can hand over.
const MAX_PACKET: usize = 65_536;
/// How long a full socket is waited for before its datagrams are dropped.
const FULL_SOCKET_WAIT_MS: u8 = 5;

/// Everything that datagrams and packets can leave by.
#[derive(Debug)]
pub(super) struct Ports {
    pub(super) udp_v4: Option<UdpSocket>,
    pub(super) udp_v6: Option<UdpSocket>,
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

    fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        self.udp_v4.iter().chain(&self.udp_v6)
    }
}

/// Sends a whole batch. What cannot be sent is dropped and counted.
pub(super) fn send_all(ports: &Ports, batch: &UdpBatch) {
    let drops = ports.shared.drops();
    for (run, bytes) in batch.runs() {
        match run.target {
            Target::Udp { remote, local } => {
                let socket = if remote.is_ipv4() { &ports.udp_v4 } else { &ports.udp_v6 };
                let sent =
                    socket.as_ref().map(|s| send_or_wait(s, remote, local, bytes, run.segment));
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
    let socket = if opener.remote.is_ipv4() { &ports.udp_v4 } else { &ports.udp_v6 };
    let Some(socket) = socket else { return };
    if let Err(error) = send_with_ttl(socket, opener.remote, opener.ttl, &opener.datagram) {
        ports.shared.drops().count(DropReason::SendFailed);
        tracing::trace!(remote = %opener.remote, %error, "opener not sent");
    }
}

fn send_or_wait(
    socket: &UdpSocket,
    remote: std::net::SocketAddr,
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
pub(super) fn write_tun(ports: &Ports, batch: &TunBatch) {
    let tun = ports.tun.load();
    for packet in batch.packets() {
        let written = tun.as_ref().map(|tun| tun.write(packet));
        if !matches!(written, Some(Ok(_))) {
            ports.shared.drops().count(DropReason::TunWriteFailed);
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
        let mut handles = Vec::new();
        for (name, run) in
            [("tun-to-udp", run_outbound as fn(&Ports, &NoteSender)), ("udp-to-tun", run_inbound)]
        {
            let ports = Arc::clone(ports);
            let notes = NoteSender { notes: notes.clone(), shared: Arc::clone(&ports.shared) };
            let thread = std::thread::Builder::new().name(name.into());
            handles.push(thread.spawn(move || run(&ports, &notes))?);
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

fn run_outbound(ports: &Ports, notes: &NoteSender) {
    let mut buffer = vec![0; MAX_PACKET];
    let mut batch = UdpBatch::default();
    let mut asked = Vec::new();
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
        let Some(tun) = tun else { continue };
        let table = ports.shared.table();
        let now = clock::now();
        batch.clear();
        for _ in 0..TUN_BATCH {
            let Ok(len) = tun.read(&mut buffer) else { break };
            let packet = &buffer[..len];
            outbound(&ports.shared, &table, [packet], now, &mut batch, &mut asked);
        }
        send_all(ports, &batch);
        notes.send(&mut asked);
    }
}

fn run_inbound(ports: &Ports, notes: &NoteSender) {
    let mut buffers = RecvBuffers::default();
    let mut batch = TunBatch::default();
    let mut asked = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(ports.stop.as_fd(), PollFlags::POLLIN)];
        fds.extend(ports.sockets().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        if !wait(&mut fds) {
            return;
        }
        for socket in ports.sockets() {
            if socket.receive(&mut buffers).is_err() {
                continue;
            }
            let table = ports.shared.table();
            let now = clock::now();
            batch.clear();
            for datagram in buffers.datagrams() {
                let source = Source::Udp { remote: datagram.remote, local: datagram.local };
                let shared = &ports.shared;
                inbound(shared, &table, source, datagram.bytes, now, &mut batch, &mut asked);
            }
            write_tun(ports, &batch);
            notes.send(&mut asked);
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
