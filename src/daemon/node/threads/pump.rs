//! What the two packet threads do: read a batch, call the packet function, write the batch.
//!
//! The receiving thread watches the interface as well while little comes from there: answers and
//! acknowledgements leave without a second thread that wakes for each. When more comes than that,
//! the sending thread is woken and watches the interface until it has become quiet again.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::turn::Turn;
use super::watch::Watch;
use super::{Ports, send_all, send_now, send_runs, write_tun};
use crate::dataplane::{
    Note, Shared, Source, Target, TunBatch, UdpBatch, inbound_train, outbound, outbound_frame,
};
use crate::io::clock;
use crate::io::tun::Tun;
use crate::io::udp::{RecvBuffers, UdpSocket};
use crate::types::{DropReason, MAX_TRAIN_BYTES, SocketId};

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
/// Bytes of the largest packet that a TUN interface can hand over, with its header.
const MAX_PACKET: usize = 65_536 + 64;
/// Sealed bytes that are sent before more packets are read: one full run.
const SEND_BYTES: usize = MAX_TRAIN_BYTES;
/// Opened bytes that are written before more datagrams are looked at.
const WRITE_BYTES: usize = 128 << 10;
/// A thread without work shows this often that it lives.
const IDLE_MS: u16 = 3000;
/// When it looks again whether the control plane has room for what is not said again,
const KEPT_MS: u16 = 10;
/// and how much of that it keeps.
const KEPT_NOTES: usize = 1024;
/// A drain of more than this is part of much: the sending thread lets the next packets gather,
const MUCH_BYTES: usize = 32 << 10;
/// for so long. Each wait that ends with a packet costs several microseconds, at both ends.
const GATHER: Duration = Duration::from_micros(50);
/// The numbers of what both threads wait for: the stop signal, and what tells of another interface.
const STOP: u64 = 0;
const WAKE: u64 = 1;
/// Of what the receiving thread waits for besides: the extra sockets, and the others from there on.
const EXTRA: u64 = 2;
const SOCKETS: u64 = 3;

/// Where the threads put what the control plane is to know.
pub(super) struct NoteSender {
    notes: mpsc::Sender<Note>,
    shared: Arc<Shared>,
    /// What found no room, and nothing says again.
    kept: RefCell<Vec<Note>>,
}

impl NoteSender {
    pub(super) fn new(notes: mpsc::Sender<Note>, shared: Arc<Shared>) -> Self {
        Self { notes, shared, kept: RefCell::default() }
    }

    /// Sends these; first what found no room before and is not said again.
    fn send(&self, notes: &mut Vec<Note>) {
        let kept = self.kept.take();
        for note in kept.into_iter().chain(notes.drain(..)) {
            let Err(refused) = self.notes.try_send(note) else { continue };
            let mut kept = self.kept.borrow_mut();
            match refused {
                TrySendError::Full(note) if note.is_said_once() && kept.len() < KEPT_NOTES => {
                    kept.push(note);
                }
                _ => self.shared.drops().count(DropReason::QueueFull),
            }
        }
    }

    /// How long to wait for packets, in milliseconds.
    fn patience(&self) -> u16 {
        if self.kept.borrow().is_empty() { IDLE_MS } else { KEPT_MS }
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
        ports.places.count_sent(drained.bytes);
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

    /// Whether the next packets are to gather: there will be more, and none waits now. What comes in
    /// is acknowledgements; who sends and receives much has the processors busy anyhow.
    fn is_much(&self, received: u64) -> bool {
        self.all && self.bytes > MUCH_BYTES && received < self.bytes as u64 / 4
    }
}

pub(super) fn run_outbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) {
    stopped(pump_outbound(ports, outlet, notes));
}

pub(super) fn run_inbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) {
    stopped(pump_inbound(ports, outlet, notes));
}

fn stopped(end: io::Result<()>) {
    if let Err(error) = end {
        tracing::error!(%error, "waiting for packets failed, they stop");
    }
}

fn pump_outbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) -> io::Result<()> {
    let (mut quiet, mut received) = (0, 0);
    let mut turn = ports.begin_turn(0);
    let mut watch = Watch::new([ports.stop.as_fd(), ports.wake_sender.as_fd()])?;
    loop {
        watch.set_tun(ports.watched_tun(true))?;
        wait(ports, 0, &mut watch, &mut turn, notes)?;
        if watch.is_ready(STOP) {
            return Ok(());
        }
        if watch.is_ready(WAKE) {
            let _ = ports.wake_sender.read();
            quiet = 0;
            continue;
        }
        let (Some(is_whole), Some(tun)) = (watch.tun_is_ready(), watch.tun()) else { continue };
        if !is_whole {
            ports.forget_tun(tun);
            continue;
        }
        // A batch that a panic left behind is cleared before it is used.
        let mut outlet = outlet.lock().unwrap_or_else(PoisonError::into_inner);
        let drained = outlet.drain(ports, tun, notes, TUN_BUDGET);
        drop(outlet);
        quiet = if drained.is_within(ANSWER_BUDGET) { quiet + 1 } else { 0 };
        if quiet >= QUIET_DRAINS {
            ports.let_watch(false);
        }
        let before = std::mem::replace(&mut received, ports.places.received());
        if drained.is_much(received.wrapping_sub(before)) {
            let from = clock::now();
            std::thread::sleep(GATHER);
            turn.waited(&ports.places, from, clock::now());
        }
    }
}

fn pump_inbound(ports: &Ports, outlet: &Mutex<Outlet>, notes: &NoteSender) -> io::Result<()> {
    let mut turn = ports.begin_turn(1);
    let mut inlet =
        Inlet { buffers: RecvBuffers::default(), batch: TunBatch::default(), asked: Vec::new() };
    let fds = [ports.stop.as_fd(), ports.wake_receiver.as_fd(), ports.extra.as_fd()];
    let mut watch = Watch::new(fds.into_iter().chain(ports.sockets().map(AsFd::as_fd)))?;
    loop {
        watch.set_tun(ports.watched_tun(false))?;
        wait(ports, 1, &mut watch, &mut turn, notes)?;
        if watch.is_ready(STOP) {
            return Ok(());
        }
        if watch.is_ready(WAKE) {
            let _ = ports.wake_receiver.read();
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
        match (watch.tun_is_ready(), watch.tun()) {
            (Some(true), tun) => answer(tun.map(Arc::as_ref)),
            (Some(false), Some(tun)) => {
                ports.forget_tun(tun);
                continue;
            }
            _ => {}
        }
        for (number, socket) in (SOCKETS..).zip(ports.sockets()) {
            if !watch.is_ready(number) {
                continue;
            }
            for _ in 0..BUSY_ROUNDS {
                if inlet.receive(ports, SocketId::MAIN, socket, notes, &mut answer) < BUSY_BYTES {
                    break;
                }
            }
        }
        if watch.is_ready(EXTRA) {
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
        ports.places.count_received(received);
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

/// The thread with this number waits until there is something for it to do.
fn wait(
    ports: &Ports,
    thread: usize,
    watch: &mut Watch,
    turn: &mut Turn<'_>,
    notes: &NoteSender,
) -> io::Result<()> {
    notes.send(&mut Vec::new());
    ports.progress[thread].step();
    let from = clock::now();
    let waited = watch.wait(notes.patience());
    turn.waited(&ports.places, from, clock::now());
    waited
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::EngineKeys;
    use crate::path::Via;
    use crate::types::{NodeId, SecretKey};

    #[test]
    fn what_is_not_said_again_waits_for_room() {
        let (sender, mut receiver) = mpsc::channel(1);
        let keys = EngineKeys::new(&SecretKey::from_bytes([1; 32]));
        let notes = NoteSender::new(sender, Shared::new(clock::now(), &keys));
        let wanted = |id: u32| Note::SessionWanted(NodeId::new(id).unwrap());
        let unknown = Note::UnknownSession { via: Via::RelayTcp, relayed: None };
        notes.send(&mut vec![wanted(1), unknown, wanted(2), wanted(3)]);
        assert_eq!(notes.shared.drops().of(DropReason::QueueFull), 1, "the one in between");
        let mut heard = Vec::new();
        while let Ok(note) = receiver.try_recv() {
            let Note::SessionWanted(id) = note else { panic!("{note:?}") };
            heard.push(id.number());
            assert_eq!(notes.patience(), if heard.len() < 3 { KEPT_MS } else { IDLE_MS });
            notes.send(&mut Vec::new());
        }
        assert_eq!(heard, [1, 2, 3], "in order");
    }

    #[test]
    fn packets_gather_only_behind_a_transfer_that_has_none_waiting() {
        let drained = |packets, bytes, all| Drained { packets, bytes, all };
        assert!(!drained(1, 98, true).is_much(0), "a lone packet");
        assert!(!drained(200, 200 * 102, true).is_much(0), "a flood of small ones");
        assert!(drained(1, MAX_PACKET - 64, true).is_much(200), "one full super-packet");
        assert!(!drained(1, MAX_PACKET - 64, true).is_much(65_000), "as much comes in");
        assert!(!drained(64, TUN_BUDGET.bytes + 1, false).is_much(0), "more is there already");
    }
}
