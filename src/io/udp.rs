//! UDP sockets that send and receive many datagrams per call.
//!
//! `quinn-udp` does the system calls: UDP segmentation offload out, receive offload in, and the
//! address that a datagram was sent to, so that an answer can leave from there. Sockets never
//! block; whoever waits uses poll(2).

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{setsockopt, sockopt};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use super::clock;
use super::sys::{Fragments, receive_drops, set_fragments};

mod gso;
mod train;

pub use gso::Gso;
pub use train::{Sent, Train, send_train};

/// Room for the longest train that the kernel hands over, and so for any datagram.
pub const SLOT_BYTES: usize = 65_536;
/// Buffers per receive call. Full ones are still in the processor's cache when they are opened,
/// which sixteen were not.
const SLOTS: usize = 4;
/// Kernel buffers, each way: two hundred full trains, so that a busy core loses nothing.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// How long a full socket is waited for before its datagrams are lost.
const FULL_SOCKET_WAIT_MS: u8 = 5;
/// After a wait in vain there is none for so long: at most a tenth of the time of whoever sends.
const NO_WAIT: Duration = Duration::from_millis(45);

/// Whether a full socket is worth a wait.
#[derive(Debug, Default)]
struct Patience(Mutex<Option<Instant>>);

impl Patience {
    fn is_left(&self, now: Instant) -> bool {
        let ended = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ended.is_none_or(|ended| now.saturating_duration_since(ended) >= NO_WAIT)
    }

    fn end(&self, now: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }
}

/// What the kernel has thrown away of what came for a socket, as far as it was asked.
#[derive(Debug, Default)]
pub struct Unread(Mutex<u32>);

impl Unread {
    /// How many datagrams it were since this was last asked, a train of them being one; always 0 where
    /// the kernel does not tell.
    pub fn take(&self, socket: &impl AsFd) -> u64 {
        // Held while the kernel is asked, or an older answer might be taken for a newer one.
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(all) = receive_drops(socket) else { return 0 };
        all.wrapping_sub(std::mem::replace(&mut seen, all)).into()
    }
}

/// A UDP socket of one address family.
#[derive(Debug)]
pub struct UdpSocket {
    socket: std::net::UdpSocket,
    state: UdpSocketState,
    gso: Gso,
    gro: bool,
    patience: Patience,
    unread: Unread,
}

impl UdpSocket {
    /// Binds a socket. An IPv6 one takes no IPv4 traffic.
    ///
    /// # Errors
    /// What the kernel says; `AddrInUse` when the port is taken.
    pub fn bind(addr: SocketAddr) -> io::Result<Self> {
        Self::bind_to(addr, None)
    }

    /// Binds a socket that sends and receives by this network interface only, whatever the routes of
    /// the others say: SO_BINDTODEVICE, socket(7).
    ///
    /// # Errors
    /// What the kernel says; `ENODEV` when there is no such interface.
    pub fn bind_to(addr: SocketAddr, device: Option<&str>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        if device.is_some() {
            socket.bind_device(device.map(str::as_bytes))?;
        }
        socket.bind(&addr.into())?;
        let socket = std::net::UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        allow_fragments(&socket)?;
        // Nobody asks when a datagram came; to note it costs time for each.
        let _ = setsockopt(&socket, sockopt::ReceiveTimestampns, &false);
        // Where the kernel allows less, less it is.
        let _ = state.set_send_buffer_size((&socket).into(), SOCKET_BUFFER_BYTES);
        let _ = state.set_recv_buffer_size((&socket).into(), SOCKET_BUFFER_BYTES);
        let (gso, gro) = (Gso::new(state.max_gso_segments()), state.gro_segments() > 1);
        Ok(Self {
            socket,
            state,
            gso,
            gro,
            patience: Patience::default(),
            unread: Unread::default(),
        })
    }

    /// Sends every datagram singly from here on.
    pub fn disable_gso(&mut self) {
        self.gso = Gso::new(1);
    }

    /// Receives every datagram singly from here on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn disable_gro(&mut self) -> io::Result<()> {
        setsockopt(&self.socket, sockopt::UdpGroSegment, &false)?;
        self.gro = false;
        Ok(())
    }

    /// Whether trains are sent in one call.
    pub fn sends_trains(&self) -> bool {
        self.gso.works()
    }

    /// Whether trains are received in one piece.
    pub fn receives_trains(&self) -> bool {
        self.gro
    }

    /// How many datagrams the kernel has thrown away since this was last asked; see [`Unread::take`].
    pub fn take_unread(&self) -> u64 {
        self.unread.take(self)
    }

    /// The address that the socket is bound to.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Sends datagrams of `segment` bytes each (the last may be shorter) to `remote`, from address
    /// `local` of ours if one is given and still there. Where the kernel cannot cut them, they are sent
    /// singly.
    #[must_use]
    pub fn send(
        &self,
        remote: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
        segment: usize,
    ) -> Sent {
        let train = Train { bytes, segment, local, may_leave_elsewhere: true };
        send_train(&self.gso, train, |contents, segment_size, src_ip| {
            let transmit =
                Transmit { destination: remote, ecn: None, contents, segment_size, src_ip };
            self.state.try_send((&self.socket).into(), &transmit)
        })
    }

    /// Sends as [`send`](Self::send) does, and waits a little for room when the socket is full. What is
    /// left even so is lost; then the next that find it full are not waited for, so that a slow link
    /// does not hold up what leaves by others.
    #[must_use]
    pub fn send_or_wait(
        &self,
        remote: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
        segment: usize,
    ) -> Sent {
        let mut sent = self.send(remote, local, bytes, segment);
        if sent.done < bytes.len() && self.patience.is_left(clock::now()) {
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLOUT)];
            // It may have room now, whatever this says.
            let _ = poll(&mut fds, FULL_SOCKET_WAIT_MS);
            let rest = bytes.get(sent.done..).unwrap_or_default();
            let more = self.send(remote, local, rest, segment);
            if more.done == 0 {
                self.patience.end(clock::now());
            }
            sent.done += more.done;
            sent.lost += more.lost;
            sent.error = more.error.or(sent.error);
        }
        let left = bytes.len().saturating_sub(sent.done);
        sent.lost += left.div_ceil(segment.max(1));
        sent.done = bytes.len();
        sent
    }

    /// Sends one datagram that nobody may cut: it arrives whole or not at all.
    ///
    /// # Errors
    /// What the kernel says; `EMSGSIZE` when the first link is too narrow for it.
    pub fn send_whole(&self, remote: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let ipv6 = remote.is_ipv6();
        let sent = match set_fragments(&self.socket, ipv6, Fragments::Forbidden) {
            Ok(()) => self.socket.send_to(datagram, remote).map(drop),
            Err(error) => Err(error.into()),
        };
        set_fragments(&self.socket, ipv6, Fragments::Allowed)?;
        sent
    }

    /// Receives what is there, up to the size of `buffers`.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing, else what the kernel says.
    pub fn receive(&self, buffers: &mut RecvBuffers) -> io::Result<()> {
        buffers.filled = 0;
        let mut slots = buffers.bytes.chunks_mut(SLOT_BYTES);
        let mut slices: [IoSliceMut<'_>; SLOTS] =
            std::array::from_fn(|_| IoSliceMut::new(slots.next().unwrap_or_default()));
        let received = self.state.recv((&self.socket).into(), &mut slices, &mut buffers.metas)?;
        buffers.filled = received;
        Ok(())
    }
}

/// The address of ours that packets to `remote` leave from, by the routes of this moment. Nothing is
/// sent.
///
/// # Errors
/// When there is no way to it.
pub fn source_towards(remote: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match remote.ip() {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = std::net::UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(remote)?;
    Ok(socket.local_addr()?.ip())
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Lets nobody cut a datagram of `socket`: one that is too long for the path does not arrive, and
/// one that is too long for our own link is not sent.
///
/// # Errors
/// What the kernel says.
pub fn forbid_fragments(socket: &impl std::os::fd::AsRawFd, ipv6: bool) -> io::Result<()> {
    Ok(set_fragments(socket, ipv6, Fragments::Forbidden)?)
}

/// To call after `quinn-udp` has set up `socket`, which forbids fragments: it is made for QUIC, and
/// QUIC finds out how much a path takes. A full packet of the overlay has 1340 bytes and more with
/// the headers of IPv4, 1360 with those of IPv6, where 1280 is all that a path must take; one that
/// takes less than a full packet is slower with fragments, and without them it swallows every full
/// packet with no word to anybody.
///
/// # Errors
/// What the kernel says.
pub fn allow_fragments(socket: &std::net::UdpSocket) -> io::Result<()> {
    let ipv6 = socket.local_addr()?.is_ipv6();
    Ok(set_fragments(socket, ipv6, Fragments::Allowed)?)
}

/// Datagrams of one sender that were received together.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// From where.
    pub remote: SocketAddr,
    /// The address of ours that it was sent to.
    pub local: Option<IpAddr>,
    /// Their content, one behind the other.
    pub bytes: &'a [u8],
    /// Length of each datagram but the last, which may be shorter.
    pub stride: usize,
}

/// Room for one receive call.
pub struct RecvBuffers {
    bytes: Vec<u8>,
    metas: [RecvMeta; SLOTS],
    filled: usize,
}

impl Default for RecvBuffers {
    fn default() -> Self {
        Self { bytes: vec![0; SLOTS * SLOT_BYTES], metas: [RecvMeta::default(); SLOTS], filled: 0 }
    }
}

impl RecvBuffers {
    /// What the last call brought, in order.
    pub fn trains(&self) -> impl Iterator<Item = Received<'_>> {
        let slots = self.bytes.chunks(SLOT_BYTES).zip(&self.metas).take(self.filled);
        slots.map(|(slot, meta)| Received {
            remote: meta.addr,
            local: meta.dst_ip,
            bytes: &slot[..meta.len.min(slot.len())],
            stride: meta.stride,
        })
    }
}

impl std::fmt::Debug for RecvBuffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecvBuffers").field("filled", &self.filled).finish_non_exhaustive()
    }
}

/// Whether the kernel has a route to `remote`. Nothing is sent: a UDP socket is connected, and dropped.
#[must_use]
pub fn has_route(remote: SocketAddr) -> bool {
    let any: SocketAddr = match remote {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let connected = std::net::UdpSocket::bind(any).and_then(|socket| socket.connect(remote));
    let Err(error) = connected else { return true };
    // No route, one that says so (`unreachable`, `prohibit`, `blackhole` of ip-route(8)), or none of this
    // family; whatever else fails says nothing of routes.
    !matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::ENETUNREACH
                | Errno::EHOSTUNREACH
                | Errno::EACCES
                | Errno::EINVAL
                | Errno::EAFNOSUPPORT
                | Errno::EADDRNOTAVAIL
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_train_arrives_as_its_datagrams_with_their_addresses() {
        let receiver = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let train: Vec<u8> = (0..2_500u32).map(|i| u8::try_from(i / 1000).unwrap()).collect();
        let sent = sender.send(receiver.local_addr().unwrap(), None, &train, 1000);
        assert_eq!((sent.done, sent.lost), (2_500, 0));
        let mut buffers = RecvBuffers::default();
        let mut got: Vec<Vec<u8>> = Vec::new();
        while got.iter().map(Vec::len).sum::<usize>() < train.len() {
            let mut fds = [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, 2_000u16), Ok(1), "all of it arrives");
            receiver.receive(&mut buffers).unwrap();
            for train in buffers.trains() {
                assert_eq!(train.remote, sender.local_addr().unwrap());
                assert_eq!(train.local, Some("127.0.0.1".parse().unwrap()));
                got.extend(train.bytes.chunks(train.stride).map(<[u8]>::to_vec));
            }
        }
        assert_eq!(got, [vec![0; 1000], vec![1; 1000], vec![2; 500]]);
    }

    #[test]
    fn what_finds_the_receive_buffer_full_is_counted_once() {
        let receiver = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        assert_eq!(receiver.take_unread(), 0);
        // The kernel doubles what is set, and never gives less than some thousand bytes.
        receiver.state.set_recv_buffer_size((&receiver.socket).into(), 1).unwrap();
        for _ in 0..50 {
            sender.send(&[7; 1_000]).unwrap();
        }
        let mut read = 0;
        let mut buffers = RecvBuffers::default();
        while receiver.receive(&mut buffers).is_ok() {
            read += buffers.trains().map(|train| train.bytes.len() as u64 / 1_000).sum::<u64>();
        }
        let unread = receiver.take_unread();
        assert!(unread > 0 && read + unread == 50, "{read} read and {unread} not");
        assert_eq!(receiver.take_unread(), 0, "each is told once");
    }

    #[test]
    fn trains_go_through_one_by_one_when_they_are_switched_off() {
        let mut receiver = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut sender = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        receiver.disable_gro().unwrap();
        sender.disable_gso();
        let sent = sender.send(receiver.local_addr().unwrap(), None, &[7; 2_500], 1000);
        assert_eq!((sent.done, sent.lost), (2_500, 0));
        let mut buffers = RecvBuffers::default();
        receiver.receive(&mut buffers).unwrap();
        let lens: Vec<usize> = buffers.trains().map(|train| train.bytes.len()).collect();
        assert_eq!(lens, [1000, 1000, 500]);
        assert!(!sender.sends_trains() && !receiver.receives_trains());
    }

    #[test]
    fn a_lost_address_of_ours_does_not_switch_trains_off() {
        let receiver = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let before = sender.sends_trains();
        let foreign = Some("192.0.2.77".parse().unwrap());
        let sent = sender.send(receiver.local_addr().unwrap(), foreign, &[7; 2_500], 1000);
        assert_eq!((sent.done, sent.lost), (2_500, 0), "from another address");
        assert_eq!(sender.sends_trains(), before);
        let mut buffers = RecvBuffers::default();
        receiver.receive(&mut buffers).unwrap();
        assert!(buffers.trains().all(|train| train.remote == sender.local_addr().unwrap()));
    }
}
