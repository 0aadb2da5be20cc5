//! What the two packet threads do: read a batch, call the packet function, write the batch.
//!
//! The receiving thread watches the interface as well while little comes from there: answers and
//! acknowledgements leave without a second thread that wakes for each. When more comes than that,
//! the sending thread is woken and watches the interface until it has become quiet again.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;

use super::turn::Turn;
use super::{Ports, send_all, send_now, send_runs, write_tun};
use crate::dataplane::{
    Note, Shared, Source, Target, TunBatch, UdpBatch, inbound_train, outbound, outbound_frame,
};
use crate::io::clock;
use crate::io::service::Progress;
use crate::io::tun::Tun;
use crate::io::udp::{RecvBuffers, UdpSocket};
use crate::types::{DropReason, SocketId};

/// What the sending thread reads before it looks at the other descriptors.
const TUN_BUDGET: Budget = Budget { packets: 256, bytes: 64 * MAX_PACKET };
/// What the receiving thread sends itself: a handful of acknowledgements, no upload.
const ANSWER_BUDGET: Budget = Budget { packets: 16, bytes: 16_000 };
/// The sending thread gives the interface back after so many drains that were no more than that.
const QUIET_DRAINS: u32 = 16;
/// After more than this the receiving thread looks for the next batch before it sleeps: there is
/// one, mostly.
const BUSY_BYTES: usize = 32 << 10;
/// And so many times at most, before it looks at the other descriptors.
const BUSY_ROUNDS: usize = 16;
/// The largest packet that a TUN interface can hand over, with its header.
const MAX_PACKET: usize = 65_536 + 64;
/// Sealed bytes that are sent before more packets are read: one full run.
const SEND_BYTES: usize = 65_000;
/// Opened bytes that are written before more datagrams are looked at.
const WRITE_BYTES: usize = 128 << 10;
/// A thread without work shows this often that it lives.
const IDLE_MS: u16 = 3000;
/// Where the descriptor that wakes a thread stands among those that it waits for; the first is the
/// stop signal.
const WAKE_AT: usize = 1;

/// Where the threads put what the control plane is to know.
pub(super) struct NoteSender {
    notes: mpsc::Sender<Note>,
    shared: Arc<Shared>,
}

impl NoteSender {
    pub(super) fn new(notes: mpsc::Sender<Note>, shared: Arc<Shared>) -> Self {
        Self { notes, shared }
    }

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
pub(super) struct Outlet {
    buffer: Vec<u8>,
    batch: UdpBatch,
    asked: Vec<Note>,
}

impl Outlet {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; MAX_PACKET], batch: UdpBatch::default(), asked: Vec::new() }
    }

    /// Sends what is there, up to `budget`; tells whether that was all.
    fn drain(&mut self, ports: &Ports, tun: &Tun, notes: &NoteSender, budget: Budget) -> Drained {
        let Self { buffer, batch, asked } = self;
        let shared = &ports.shared;
        let table = shared.table();
        let now = clock::now();
        batch.clear();
        let mut drained = Drained::default();
        while drained.packets < budget.packets && drained.bytes <= budget.bytes {
            let Ok(len) = tun.read(buffer) else {
                drained.all = true;
                break;
            };
            drained.bytes += len;
            drained.packets += 1;
            if tun.has_headers() {
                outbound_frame(shared, &table, &mut buffer[..len], now, batch, asked);
            } else {
                outbound(shared, &table, [&buffer[..len]], now, batch, asked);
            }
            if batch.len() > SEND_BYTES {
                send_runs(ports, batch.closed_runs());
                batch.keep_open_run();
            }
        }
        send_all(ports, batch);
        batch.clear();
        notes.send(asked);
        drained
    }
}

/// What was read from the interface in one go.
#[derive(Default)]
struct Drained {
    packets: usize,
    bytes: usize,
    all: bool,
}

impl Drained {
    fn is_within(&self, budget: Budget) -> bool {
        self.all && self.packets <= budget.packets && self.bytes <= budget.bytes
    }
}

pub(super) fn run_outbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) {
    let mut quiet = 0;
    let mut turn = ports.begin_turn();
    loop {
        let tun = ports.watched_tun(true);
        let mut fds = vec![
            PollFd::new(ports.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(ports.wake_sender.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(tun.iter().map(|tun| PollFd::new(tun.as_fd(), PollFlags::POLLIN)));
        if !wait(&mut fds, &ports.progress[0], &mut turn) {
            return;
        }
        if is_ready(fds.get(WAKE_AT)) {
            let _ = ports.wake_sender.read();
            quiet = 0;
            continue;
        }
        if is_broken(fds.get(2)) {
            ports.forget_tun(&tun);
            continue;
        }
        let Some(tun) = tun else { continue };
        // A batch that a panic left behind is cleared before it is used.
        let mut outlet = outlet.lock().unwrap_or_else(PoisonError::into_inner);
        let drained = outlet.drain(ports, &tun, notes, TUN_BUDGET);
        drop(outlet);
        quiet = if drained.is_within(ANSWER_BUDGET) { quiet + 1 } else { 0 };
        if quiet >= QUIET_DRAINS {
            ports.let_watch(false);
        }
    }
}

pub(super) fn run_inbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) {
    let mut turn = ports.begin_turn();
    let mut inlet =
        Inlet { buffers: RecvBuffers::default(), batch: TunBatch::default(), asked: Vec::new() };
    loop {
        let watched = ports.watched_tun(false);
        let mut fds = vec![
            PollFd::new(ports.stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(ports.wake_receiver.as_fd(), PollFlags::POLLIN),
            PollFd::new(ports.extra.as_fd(), PollFlags::POLLIN),
        ];
        let sockets_at = fds.len();
        fds.extend(ports.sockets().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        let tun_at = fds.len();
        fds.extend(watched.iter().map(|tun| PollFd::new(tun.as_fd(), PollFlags::POLLIN)));
        if !wait(&mut fds, &ports.progress[1], &mut turn) {
            return;
        }
        if is_ready(fds.get(WAKE_AT)) {
            let _ = ports.wake_receiver.read();
        }
        if is_broken(fds.get(tun_at)) {
            ports.forget_tun(&watched);
            continue;
        }
        let mut answer = |tun: Option<&Tun>| {
            let Some(tun) = tun else { return };
            if ports.sender_watches.load(Ordering::Relaxed) {
                return;
            }
            let mut outlet = outlet.lock().unwrap_or_else(PoisonError::into_inner);
            let drained = outlet.drain(ports, tun, notes, ANSWER_BUDGET);
            drop(outlet);
            if !drained.is_within(ANSWER_BUDGET) {
                ports.let_watch(true);
            }
        };
        if is_ready(fds.get(tun_at)) {
            answer(watched.as_deref());
        }
        for (number, socket) in ports.sockets().enumerate() {
            if !is_ready(fds.get(sockets_at + number)) {
                continue;
            }
            for _ in 0..BUSY_ROUNDS {
                if inlet.receive(ports, SocketId::MAIN, socket, notes, &mut answer) < BUSY_BYTES {
                    break;
                }
            }
        }
        if is_ready(fds.get(WAKE_AT + 1)) {
            for (id, socket) in ports.extra.ready() {
                inlet.receive(ports, id, &socket, notes, &mut answer);
            }
        }
    }
}

/// The way from the sockets to the interface.
struct Inlet {
    buffers: RecvBuffers,
    batch: TunBatch,
    asked: Vec<Note>,
}

impl Inlet {
    /// Writes what one call receives; `answer` looks for what comes back.
    fn receive(
        &mut self,
        ports: &Ports,
        id: SocketId,
        socket: &UdpSocket,
        notes: &NoteSender,
        mut answer: impl FnMut(Option<&Tun>),
    ) -> usize {
        let Self { buffers, batch, asked } = self;
        if socket.receive(buffers).is_err() {
            return 0;
        }
        let shared = &ports.shared;
        let table = shared.table();
        let now = clock::now();
        let tun = ports.tun.load_full();
        let kinds = tun.as_ref().map(|tun| tun.trains()).unwrap_or_default();
        let mut received = 0;
        batch.clear(kinds);
        for train in buffers.trains() {
            let (remote, local) = (train.remote, train.local);
            let source = Source::Udp { remote, local, socket: id };
            let (bytes, stride) = (train.bytes, train.stride);
            received += bytes.len();
            inbound_train(shared, &table, source, bytes, stride, now, batch, asked);
            if batch.len() > WRITE_BYTES {
                write_tun(ports, batch);
                batch.clear(kinds);
                answer(tun.as_deref());
            }
        }
        if !batch.is_empty() {
            write_tun(ports, batch);
            answer(tun.as_deref());
        }
        send_cookies(ports, asked);
        notes.send(asked);
        received
    }
}

/// Cookies leave at once: in a flood there are too many for the control task.
fn send_cookies(ports: &Ports, notes: &mut Vec<Note>) {
    notes.retain(|note| {
        let Note::Cookie { source: Source::Udp { remote, local, socket }, reply } = note else {
            return true;
        };
        send_now(ports, Target::Udp { remote: *remote, local: *local, socket: *socket }, reply);
        false
    });
}

fn is_ready(fd: Option<&PollFd<'_>>) -> bool {
    fd.is_some_and(|fd| fd.any() == Some(true))
}

fn is_broken(fd: Option<&PollFd<'_>>) -> bool {
    fd.and_then(PollFd::revents).is_some_and(|events| events.contains(PollFlags::POLLERR))
}

/// Waits for any of `fds`; `false` when the first one, the stop signal, is set.
fn wait(fds: &mut [PollFd<'_>], progress: &Progress, turn: &mut Turn) -> bool {
    progress.step();
    let from = clock::now();
    let ready = poll(fds, PollTimeout::from(IDLE_MS));
    turn.waited(from, clock::now());
    match ready {
        Ok(_) | Err(nix::errno::Errno::EINTR) => fds[0].any() != Some(true),
        Err(error) => {
            tracing::error!(%error, "poll failed, packets stop");
            false
        }
    }
}
