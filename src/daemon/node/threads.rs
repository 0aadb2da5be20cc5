//! The two threads that move packets, and the ports they share with the control task.
//!
//! Each runs to completion: read a batch, call the packet function, write the batch. Nothing is
//! handed from thread to thread but notes for the control plane.
//! What they do is in [`pump`].

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use arc_swap::ArcSwapOption;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc;

use super::extra::ExtraSockets;
use super::report::OffloadReport;
use crate::dataplane::offload::MergeKinds;
use crate::dataplane::{Note, Run, Shared, Target, TunBatch, UdpBatch};
use crate::io::clock;
use crate::io::link::LinkSender;
use crate::io::opener::send_with_ttl;
use crate::io::service::Progress;
use crate::io::threads::Fallen;
use crate::io::tun::Tun;
use crate::io::udp::UdpSocket;
use crate::node::{Opener, WholeProbe};
use crate::types::{DropReason, SocketId};

mod place;
mod pump;
mod turn;
mod watch;

use place::Places;
use pump::{NoteSender, Outlet, run_inbound, run_outbound};
use turn::Turn;

/// Packets that may wait for an interface which is being made: the first of a few peers.
const WAITING_PACKETS: usize = 64;

/// Everything that datagrams and packets can leave by.
#[derive(Debug)]
pub(super) struct Ports {
    pub(super) udp_v4: Option<UdpSocket>,
    pub(super) udp_v6: Option<UdpSocket>,
    pub(super) extra: ExtraSockets,
    tun: ArcSwapOption<Tun>,
    /// Packets that came while the interface is being made; none when it is not.
    waiting: Mutex<Option<Vec<Box<[u8]>>>>,
    link: ArcSwapOption<LinkSender>,
    shared: Arc<Shared>,
    stop: EventFd,
    stopping: AtomicBool,
    /// A thread that has ended without having been told to: no packets move any more.
    pub(super) fallen: Fallen,
    /// Whether the sending thread watches the interface, and not the receiving one.
    sender_watches: AtomicBool,
    /// What goes both ways, and where the threads stay while that is much.
    places: Places,
    /// Tell the threads that there is another interface, or that it is theirs to watch.
    wake_sender: EventFd,
    wake_receiver: EventFd,
    /// Whether the threads are to run ahead of ordinary programs, and how many of them do.
    realtime: bool,
    ahead: AtomicUsize,
    /// How far the two threads have come: out, in.
    progress: [Arc<Progress>; 2],
}

impl Ports {
    pub(super) fn new(
        udp_v4: Option<UdpSocket>,
        udp_v6: Option<UdpSocket>,
        shared: Arc<Shared>,
        realtime: bool,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            udp_v4,
            udp_v6,
            extra: ExtraSockets::new()?,
            tun: ArcSwapOption::empty(),
            waiting: Mutex::new(None),
            link: ArcSwapOption::empty(),
            shared,
            stop: EventFd::from_value_and_flags(0, flags)?,
            stopping: AtomicBool::new(false),
            fallen: Fallen::default(),
            sender_watches: AtomicBool::new(false),
            places: Places::default(),
            wake_sender: EventFd::from_value_and_flags(0, flags)?,
            wake_receiver: EventFd::from_value_and_flags(0, flags)?,
            realtime,
            ahead: AtomicUsize::new(0),
            progress: Default::default(),
        })
    }

    /// The calling thread, number 0 or 1, begins to move packets.
    fn begin_turn(&self, thread: usize) -> Turn<'_> {
        Turn::new(self.realtime, thread, &self.ahead, clock::now())
    }

    /// Whether both threads run ahead of ordinary programs.
    pub(super) fn is_realtime(&self) -> bool {
        self.ahead.load(Ordering::Relaxed) == self.progress.len()
    }

    /// How far the two threads have come.
    pub(super) fn progress(&self) -> Vec<(String, Arc<Progress>)> {
        let names = ["tun-to-udp", "udp-to-tun"].map(String::from);
        names.into_iter().zip(self.progress.iter().cloned()).collect()
    }

    pub(super) fn link(&self) -> Option<Arc<LinkSender>> {
        self.link.load_full()
    }

    pub(super) fn set_link(&self, link: Option<LinkSender>) {
        self.link.store(link.map(Arc::new));
    }

    /// An interface is being made: what comes for it waits.
    pub(super) fn expect_tun(&self) {
        *self.waiting() = Some(Vec::new());
    }

    /// What has waited is written before anybody else can write to the interface: flows keep their
    /// order.
    pub(super) fn set_tun(&self, tun: Option<Arc<Tun>>) {
        let mut waiting = self.waiting();
        let mut lost = 0;
        for packet in waiting.take().into_iter().flatten() {
            let written = tun.as_ref().is_some_and(|tun| tun.write_packet(&packet).is_ok());
            lost += u64::from(!written);
        }
        self.tun.store(tun);
        drop(waiting);
        if lost > 0 {
            self.shared.drops().count_many(DropReason::TunWriteFailed, lost);
        }
        // These fail only when the counter is full, and then the thread is awake anyway.
        let _ = self.wake_sender.write(1);
        let _ = self.wake_receiver.write(1);
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Vec<Box<[u8]>>>> {
        // A list of packets is whole after any panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a packet for the interface that is being made, or writes it to the one that was made
    /// since the caller looked; `false` when there is none or no room.
    fn keep_waiting(&self, packet: &[u8]) -> bool {
        let mut waiting = self.waiting();
        if let Some(packets) = waiting.as_mut() {
            let has_room = packets.len() < WAITING_PACKETS;
            if has_room {
                packets.push(packet.into());
            }
            return has_room;
        }
        drop(waiting);
        self.tun.load().as_ref().is_some_and(|tun| tun.write_packet(packet).is_ok())
    }

    /// Lets one thread watch the interface, and the other one not.
    fn let_watch(&self, sender: bool) {
        self.sender_watches.store(sender, Ordering::Release);
        let thread = if sender { &self.wake_sender } else { &self.wake_receiver };
        let _ = thread.write(1);
    }

    /// The interface, if it is this thread's to watch.
    fn watched_tun(&self, sender: bool) -> Option<Arc<Tun>> {
        let is_mine = self.sender_watches.load(Ordering::Acquire) == sender;
        if is_mine { self.tun.load_full() } else { None }
    }

    /// The interface was removed. Until the control task has made another one there is nothing to
    /// wait for.
    fn forget_tun(&self, broken: &Arc<Tun>) {
        self.tun.compare_and_swap(broken, None);
    }

    pub(super) fn listen_port(&self) -> u16 {
        let socket = self.udp_v4.as_ref().or(self.udp_v6.as_ref());
        socket.and_then(|socket| socket.local_addr().ok()).map_or(0, |addr| addr.port())
    }

    /// What the interface takes as trains.
    pub(super) fn trains(&self) -> MergeKinds {
        self.tun.load().as_ref().map(|tun| tun.trains()).unwrap_or_default()
    }

    /// The offloads in use at this moment.
    pub(super) fn offloads(&self) -> OffloadReport {
        let trains = self.trains();
        let all = |has: fn(&UdpSocket) -> bool| self.sockets().all(has) && self.extra.all(has);
        OffloadReport {
            tun_tso: trains.tcp,
            tun_uso: trains.udp,
            udp_gso: all(UdpSocket::sends_trains),
            udp_gro: all(UdpSocket::receives_trains),
        }
    }

    /// Counts what the kernel has thrown away before it was read, as far as that is not counted yet.
    pub(super) fn count_unread(&self) {
        let main: u64 = self.sockets().map(UdpSocket::take_unread).sum();
        let unread = main + self.extra.take_unread();
        self.shared.drops().count_many(DropReason::ReceiveBufferFull, unread);
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
                    socket.send_or_wait(remote, local, bytes, run.segment)
                });
                let datagrams = || bytes.len().div_ceil(run.segment.max(1));
                let lost = sent.as_ref().map_or_else(datagrams, |sent| sent.lost);
                if lost > 0 {
                    drops.count_many(DropReason::SendFailed, lost as u64);
                    tracing::trace!(%remote, ?sent, "datagrams not sent");
                }
            }
            Target::Link => {
                let datagrams = bytes.len().div_ceil(run.segment.max(1));
                let sent = match &*ports.link.load() {
                    Some(link) => link.try_send_train(bytes, run.segment),
                    None => Err((DropReason::NoPath, datagrams)),
                };
                if let Err((reason, lost)) = sent {
                    drops.count_many(reason, lost as u64);
                }
            }
        }
    }
}

/// Sends one datagram that nobody waits for: a full socket has better things to do.
fn send_now(ports: &Ports, target: Target, datagram: &[u8]) {
    let Target::Udp { remote, local, socket } = target else { return };
    let sent = ports
        .with_socket(socket, remote, |socket| socket.send(remote, local, datagram, datagram.len()));
    if sent.is_none_or(|sent| sent.lost > 0 || sent.done < datagram.len()) {
        ports.shared.drops().count(DropReason::SendFailed);
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

/// Sends a datagram that must not be cut. One that does not fit is an answer, too: it stays out.
pub(super) fn send_whole_probe(ports: &Ports, probe: &WholeProbe) {
    let sent = ports.with_socket(probe.socket, probe.remote, |socket| {
        socket.send_whole(probe.remote, &probe.datagram)
    });
    if let Some(Err(error)) = sent {
        tracing::trace!(remote = %probe.remote, %error, "probe not sent");
    }
}

/// Writes one packet to the TUN interface.
pub(super) fn write_packet(ports: &Ports, packet: &[u8]) {
    let mut batch = TunBatch::default();
    let copied: Result<(), std::convert::Infallible> = batch.push(packet.len(), |room| {
        room.copy_from_slice(packet);
        Ok(packet.len())
    });
    match copied {
        Ok(()) => write_tun(ports, &mut batch),
        Err(never) => match never {},
    }
}

/// Writes a whole batch to the TUN interface.
pub(super) fn write_tun(ports: &Ports, batch: &mut TunBatch) {
    batch.finish();
    let mut tun = ports.tun.load();
    for frame in batch.frames() {
        let lost = match tun.as_ref() {
            Some(tun) => tun.write_frame(&frame),
            None => {
                let lost = frame.packets().filter(|packet| !ports.keep_waiting(packet)).count();
                tun = ports.tun.load();
                lost
            }
        };
        if lost > 0 {
            ports.shared.drops().count_many(DropReason::TunWriteFailed, lost as u64);
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
            let notes = NoteSender::new(notes.clone(), Arc::clone(&ports.shared));
            let (fallen, told) = (ports.fallen.clone(), Arc::clone(&ports));
            let is_told = move || told.stopping.load(Ordering::Acquire);
            handles.push(fallen.spawn(name, is_told, move || run(&ports, &outlet, &notes))?);
        }
        Ok(Self { ports: Arc::clone(ports), handles })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.ports.stopping.store(true, Ordering::Release);
        // Never read, so it stays readable and every poll sees it.
        let _ = self.ports.stop.write(1);
        for handle in self.handles.drain(..) {
            if handle.join().is_err() {
                tracing::error!("a packet thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::super::startup::Offloads;
    use super::*;
    use crate::dataplane::EngineKeys;
    use crate::node::SocketOrder;
    use crate::testing::epoch;
    use crate::types::SecretKey;

    fn ports(main: Option<UdpSocket>) -> Ports {
        let keys = EngineKeys::new(&SecretKey::from_bytes([1; 32]));
        Ports::new(main, None, Shared::new(epoch(), &keys), false).unwrap()
    }

    /// An interface, and where each byte written to it comes out.
    fn interface() -> (Arc<Tun>, UnixStream) {
        let (device, outside) = UnixStream::pair().unwrap();
        outside.set_nonblocking(true).unwrap();
        (Arc::new(Tun::over(device.into())), outside)
    }

    fn came_out(mut outside: &UnixStream) -> Vec<u8> {
        let mut bytes = [0; 512];
        let count = outside.read(&mut bytes).unwrap_or_default();
        bytes[..count].to_vec()
    }

    #[test]
    fn what_waits_for_an_interface_gets_there_also_when_it_comes_in_that_moment() {
        let ports = ports(None);
        let lost = || ports.shared.drops().of(DropReason::TunWriteFailed);
        write_packet(&ports, &[0]);
        assert_eq!(lost(), 1, "none is being made");
        ports.expect_tun();
        for number in 1..=3 {
            write_packet(&ports, &[number]);
        }
        let (tun, outside) = interface();
        ports.set_tun(Some(tun));
        assert_eq!(came_out(&outside), [1, 2, 3]);
        assert!(ports.keep_waiting(&[4]), "who has looked before there was one");
        write_packet(&ports, &[5]);
        assert_eq!((came_out(&outside), lost()), (vec![4, 5], 1));

        ports.set_tun(None);
        ports.expect_tun();
        for _ in 0..=WAITING_PACKETS {
            write_packet(&ports, &[6]);
        }
        assert_eq!(lost(), 2, "there is so much room");
        ports.set_tun(None);
        assert_eq!(lost(), 2 + WAITING_PACKETS as u64, "none was made");
        let (tun, outside) = interface();
        ports.set_tun(Some(tun));
        assert!(came_out(&outside).is_empty());
    }

    #[test]
    fn packets_keep_their_order_while_the_interface_is_handed_over() {
        const PACKETS: u8 = 60;
        for round in 0..200 {
            let ports = ports(None);
            ports.expect_tun();
            let (tun, outside) = interface();
            let written = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for number in 0..PACKETS {
                        write_packet(&ports, &[number]);
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                });
                while written.load(Ordering::Relaxed) < round % usize::from(PACKETS) {
                    std::hint::spin_loop();
                }
                ports.set_tun(Some(tun));
            });
            assert_eq!(came_out(&outside), (0..PACKETS).collect::<Vec<_>>(), "round {round}");
        }
    }

    #[test]
    fn an_extra_socket_without_an_offload_is_told() {
        let bind: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let main = UdpSocket::bind_to(bind, None).unwrap();
        let (gso, gro) = (main.sends_trains(), main.receives_trains());
        let ports = ports(Some(main));
        let told = || (ports.offloads().udp_gso, ports.offloads().udp_gro);
        assert_eq!(told(), (gso, gro));
        let order =
            |number| SocketOrder::Open { socket: SocketId::new(number), bind, device: None };
        let offloads = |udp_gso, udp_gro| Offloads { tun: true, udp_gso, udp_gro };
        assert!(ports.extra.carry_out(&[order(1)], offloads(true, true)).is_empty());
        assert_eq!(told(), (gso, gro));
        assert!(ports.extra.carry_out(&[order(2)], offloads(false, true)).is_empty());
        assert_eq!(told(), (false, gro));
        assert!(ports.extra.carry_out(&[order(3)], offloads(true, false)).is_empty());
        assert_eq!(told(), (false, false));
    }
}
