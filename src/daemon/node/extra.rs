//! The extra sockets that the core has ordered: opened and closed by the control task, sent by
//! and polled by the packet threads.
//!
//! They are many for a few seconds and then one or none, so the receiving thread has a single
//! descriptor for all of them: an epoll instance, which poll(2) takes like any other.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::startup::Offloads;
use crate::io::udp::UdpSocket;
use crate::node::SocketOrder;
use crate::types::SocketId;

/// Sockets that are read from in one turn; the others are still ready in the next.
const READY: usize = 16;

/// Sockets by id.
type Table = BTreeMap<SocketId, Arc<UdpSocket>>;

/// All extra sockets of a node.
#[derive(Debug)]
pub(super) struct ExtraSockets {
    open: ArcSwap<Table>,
    epoll: Epoll,
    /// What the kernel had thrown away of what came for sockets that are closed, until it is asked for.
    unread: AtomicU64,
}

impl ExtraSockets {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { open: ArcSwap::default(), epoll, unread: AtomicU64::new(0) })
    }

    /// Carries out orders; returns the sockets that could not be opened, and why.
    pub(super) fn carry_out(
        &self,
        orders: &[SocketOrder],
        offloads: Offloads,
    ) -> Vec<(SocketId, io::Error)> {
        let mut failed = Vec::new();
        if orders.is_empty() {
            return failed;
        }
        let mut open = Table::clone(&self.open.load());
        for order in orders {
            match order {
                SocketOrder::Open { socket, bind, device } => {
                    match self.open_one(*socket, *bind, device.as_deref(), offloads) {
                        Ok(opened) => drop(open.insert(*socket, Arc::new(opened))),
                        Err(error) => failed.push((*socket, error)),
                    }
                }
                SocketOrder::Close { socket } => {
                    if let Some(closed) = open.remove(socket) {
                        self.unread.fetch_add(closed.take_unread(), Ordering::Relaxed);
                        // A packet thread may hold it for a moment longer.
                        let _ = self.epoll.delete(closed.as_fd());
                    }
                }
            }
        }
        self.open.store(Arc::new(open));
        failed
    }

    fn open_one(
        &self,
        id: SocketId,
        bind: SocketAddr,
        device: Option<&str>,
        offloads: Offloads,
    ) -> io::Result<UdpSocket> {
        let socket = bind_socket(bind, device, offloads)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::from(id.number()));
        self.epoll.add(socket.as_fd(), event)?;
        Ok(socket)
    }

    pub(super) fn get(&self, socket: SocketId) -> Option<Arc<UdpSocket>> {
        self.open.load().get(&socket).cloned()
    }

    /// Whether this holds for every socket.
    pub(super) fn all(&self, has: impl Fn(&UdpSocket) -> bool) -> bool {
        self.open.load().values().all(|socket| has(socket))
    }

    /// How many datagrams the kernel has thrown away since this was last asked.
    pub(super) fn take_unread(&self) -> u64 {
        let open: u64 = self.open.load().values().map(|socket| socket.take_unread()).sum();
        open + self.unread.swap(0, Ordering::Relaxed)
    }

    /// The sockets that have something to read.
    pub(super) fn ready(&self) -> Vec<(SocketId, Arc<UdpSocket>)> {
        let mut events = [EpollEvent::empty(); READY];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        let ids = events[..count].iter().filter_map(|event| u16::try_from(event.data()).ok());
        let open = self.open.load();
        ids.map(SocketId::new).filter_map(|id| Some((id, Arc::clone(open.get(&id)?)))).collect()
    }
}

/// Readable when any of the sockets is.
impl AsFd for ExtraSockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

/// Binds a UDP socket, to one interface if it is named, with the offloads that are wanted.
///
/// # Errors
/// What the kernel says.
pub(super) fn bind_socket(
    addr: SocketAddr,
    device: Option<&str>,
    offloads: Offloads,
) -> io::Result<UdpSocket> {
    let mut socket = UdpSocket::bind_to(addr, device)?;
    if !offloads.udp_gso {
        socket.disable_gso();
    }
    if !offloads.udp_gro {
        // A kernel that does not know it does not do it.
        let _ = socket.disable_gro();
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;

    const OFFLOADS: Offloads = Offloads { tun: true, udp_gso: true, udp_gro: true };

    fn readable(sockets: &ExtraSockets, patience_ms: u16) -> bool {
        let mut fds = [PollFd::new(sockets.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, patience_ms).unwrap() == 1
    }

    #[test]
    fn an_extra_socket_is_ready_when_something_came_and_gone_when_closed() {
        let sockets = ExtraSockets::new().unwrap();
        let bind = "127.0.0.1:0".parse().unwrap();
        let open = |number| SocketOrder::Open { socket: SocketId::new(number), bind, device: None };
        assert!(sockets.carry_out(&[open(1), open(2)], OFFLOADS).is_empty());
        assert!(!readable(&sockets, 0));

        let sender = sockets.get(SocketId::new(1)).unwrap();
        let receiver = sockets.get(SocketId::new(2)).unwrap();
        let sent = sender.send(receiver.local_addr().unwrap(), None, b"hello", 5);
        assert_eq!((sent.done, sent.lost), (5, 0));
        assert!(readable(&sockets, 2_000));
        let ready: Vec<SocketId> = sockets.ready().into_iter().map(|(id, _)| id).collect();
        assert_eq!(ready, [SocketId::new(2)]);

        let close = SocketOrder::Close { socket: SocketId::new(2) };
        assert!(sockets.carry_out(&[close], OFFLOADS).is_empty());
        assert!(sockets.get(SocketId::new(2)).is_none() && !readable(&sockets, 0));
        assert!(sockets.get(SocketId::new(1)).is_some());
    }

    #[test]
    fn what_cannot_be_opened_is_told() {
        let sockets = ExtraSockets::new().unwrap();
        let foreign = "192.0.2.77:0".parse().unwrap();
        let any = "0.0.0.0:0".parse().unwrap();
        let order = |number, bind, device| SocketOrder::Open {
            socket: SocketId::new(number),
            bind,
            device,
        };
        let orders = [order(1, foreign, None), order(2, any, Some("no-such-device".into()))];
        let failed = sockets.carry_out(&orders, OFFLOADS);
        let ids: Vec<SocketId> = failed.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [SocketId::new(1), SocketId::new(2)]);
        assert!(sockets.get(SocketId::new(1)).is_none());
    }
}
