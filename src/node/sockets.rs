//! Extra sockets: local ports beside the main one, ordered from the daemon when a path needs one,
//! and given back when none does.
//!
//! Whoever wants one calls [`Node::open_socket`] for a peer and sends by its id at once: orders are
//! carried out before datagrams are sent. It is held until [`Node::release_sockets`]; from then on
//! it stays open for as long as the peer's path agent has a path by it. Roaming, disuse and the
//! peer's end close it. Those of further uplinks belong to no peer, and `uplinks` closes them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use super::Node;
use crate::types::{NodeId, SocketId, Uplink};

/// Extra sockets of one node at a time: a run of birthday probing, and the paths that are left of
/// earlier ones.
pub const MAX_EXTRA_SOCKETS: usize = 320;

/// What the daemon has to do about its sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketOrder {
    /// Bind one here, and take what arrives as from this id.
    Open {
        /// The id.
        socket: SocketId,
        /// Any address and any port, of the family that is wanted.
        bind: SocketAddr,
        /// The only interface that it sends and receives by; none for what the routes say.
        device: Option<String>,
    },
    /// Close it.
    Close {
        /// The id.
        socket: SocketId,
    },
}

/// What an extra socket is for.
#[derive(Debug)]
struct Use {
    peer: NodeId,
    held: bool,
}

/// The extra sockets.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    open: BTreeMap<SocketId, Use>,
    /// Of uplinks: they belong to no peer.
    lines: BTreeSet<SocketId>,
    last: u16,
    orders: Vec<SocketOrder>,
}

impl Sockets {
    /// An id is used again as late as possible: a datagram may still be on its way up.
    fn fresh_id(&mut self) -> SocketId {
        loop {
            self.last = self.last.wrapping_add(1);
            let id = SocketId::new(self.last);
            if id != SocketId::MAIN && !self.open.contains_key(&id) && !self.lines.contains(&id) {
                return id;
            }
        }
    }
}

fn any_port(ipv6: bool) -> SocketAddr {
    let any: IpAddr =
        if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, 0)
}

impl Node {
    /// Orders an extra socket for a peer, to send to `remote`'s family; none when there are too
    /// many already.
    pub(super) fn open_socket(&mut self, peer: NodeId, remote: IpAddr) -> Option<SocketId> {
        let sockets = &mut self.sockets;
        if sockets.open.len() >= MAX_EXTRA_SOCKETS {
            return None;
        }
        let socket = sockets.fresh_id();
        sockets.open.insert(socket, Use { peer, held: true });
        let bind = any_port(remote.is_ipv6());
        sockets.orders.push(SocketOrder::Open { socket, bind, device: None });
        Some(socket)
    }

    /// Orders a socket that sends and receives by this uplink only.
    pub(super) fn open_line(&mut self, uplink: &Uplink) -> SocketId {
        let sockets = &mut self.sockets;
        let socket = sockets.fresh_id();
        sockets.lines.insert(socket);
        let (bind, device) = (any_port(uplink.ipv6), Some(uplink.device.clone()));
        sockets.orders.push(SocketOrder::Open { socket, bind, device });
        socket
    }

    /// The uplink is gone, or is reached by the main socket.
    pub(super) fn close_line(&mut self, socket: SocketId) {
        if self.sockets.lines.remove(&socket) {
            self.sockets.orders.push(SocketOrder::Close { socket });
        }
    }

    /// Whoever opened sockets for this peer is done; those that no path goes by are closed.
    pub(super) fn release_sockets(&mut self, id: NodeId, now: Instant) {
        for held in self.sockets.open.values_mut().filter(|it| it.peer == id) {
            held.held = false;
        }
        self.close_idle_sockets(id, now);
    }

    /// Closes the sockets of a peer that nothing needs any more.
    pub(super) fn close_idle_sockets(&mut self, id: NodeId, now: Instant) {
        if self.sockets.open.is_empty() {
            return;
        }
        let Some(agent) = self.peers.get(&id).map(|peer| &peer.agent) else { return };
        let idle: Vec<SocketId> = self
            .sockets
            .open
            .iter()
            .filter(|(_, it)| it.peer == id && !it.held)
            .map(|(socket, _)| *socket)
            .filter(|socket| !agent.needs_socket(*socket, now))
            .collect();
        for socket in idle {
            self.close_socket(socket, now);
        }
    }

    /// The peer is gone.
    pub(super) fn close_sockets_of(&mut self, id: NodeId) {
        let Sockets { open, orders, .. } = &mut self.sockets;
        open.retain(|socket, it| {
            if it.peer == id {
                orders.push(SocketOrder::Close { socket: *socket });
            }
            it.peer != id
        });
    }

    fn close_socket(&mut self, socket: SocketId, now: Instant) {
        let Some(closed) = self.sockets.open.remove(&socket) else { return };
        self.sockets.orders.push(SocketOrder::Close { socket });
        if let Some(peer) = self.peers.get_mut(&closed.peer) {
            peer.agent.handle_socket_closed(socket, now);
        }
    }

    /// The daemon could not open an extra socket, or has lost it.
    pub fn handle_socket_lost(&mut self, socket: SocketId, now: Instant) {
        if self.sockets.lines.contains(&socket) {
            return self.handle_line_lost(socket, now);
        }
        let Some(peer) = self.sockets.open.get(&socket).map(|it| it.peer) else { return };
        self.close_socket(socket, now);
        self.drain_agent(peer, now);
    }

    /// What to do about sockets, in order. To be asked for and carried out before openers and
    /// datagrams are sent.
    pub fn take_socket_orders(&mut self) -> Vec<SocketOrder> {
        std::mem::take(&mut self.sockets.orders)
    }

    /// How many extra sockets are open, those of uplinks aside.
    #[must_use]
    pub fn extra_sockets(&self) -> usize {
        self.sockets.open.len()
    }
}
