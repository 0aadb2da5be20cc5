//! The sockets of a server: control on TCP, relay and reflector on UDP with a second port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use quinn_udp::{UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tracing::{debug, info, warn};

use super::StartError;
use crate::io::listen;
use crate::io::service::{forget_listener, store_listener};
use crate::io::udp::{Gso, Unread, allow_fragments};
use crate::wire::control::DEFAULT_PORT;

/// Passes most firewalls; taken when it is free and may be taken.
const EXTRA_TCP_PORT: u16 = 443;
/// A burst of a gigabit per second for some milliseconds.
const UDP_BUFFER_BYTES: usize = 4 << 20;
/// Port 0 means any, and the one that TCP gets may be taken on UDP.
const ANY_PORT_ATTEMPTS: u32 = 20;

/// All sockets.
#[derive(Debug, Default)]
pub(super) struct Bound {
    pub(super) tcp: Vec<Listener>,
    /// In pairs: main port, second port.
    pub(super) udp: Vec<UdpPort>,
}

/// A control port, and the UDP ports that belong to it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) listener: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) relay_port: u16,
    pub(super) second_port: u16,
}

/// One UDP socket. It answers from the address that was asked.
#[derive(Debug)]
pub(super) struct UdpPort {
    pub(super) socket: UdpSocket,
    pub(super) state: UdpSocketState,
    /// The state has a number of its own, which one datagram to an impossible address is enough to
    /// change.
    pub(super) gso: Gso,
    pub(super) unread: Unread,
}

/// Listening TCP sockets that somebody else has opened.
type Handed = Vec<(SocketAddr, std::net::TcpListener)>;

/// Opens the sockets of `listen`, or the default ones. Those of `handed` with the same address are
/// taken: connections to them have waited while no server ran.
pub(super) fn bind(listen: &[SocketAddr], mut handed: Handed) -> Result<Bound, StartError> {
    let mut bound = Bound::default();
    if !listen.is_empty() {
        for address in needed(listen) {
            bind_pair(&mut bound, address, &mut handed)?;
        }
        leave(handed);
        return Ok(bound);
    }
    let everywhere = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];
    let [v6, v4] = everywhere.map(|ip| SocketAddr::new(ip, DEFAULT_PORT));
    match bind_pair(&mut bound, v6, &mut handed) {
        Err(StartError::Listen { source, .. }) if has_no_ipv6(&source) => {
            info!("this machine has no IPv6");
            bind_pair(&mut bound, v4, &mut handed)?;
        }
        result => result?,
    }
    let Some(main) = bound.tcp.first() else {
        return Ok(bound);
    };
    let extra = SocketAddr::new(main.address.ip(), EXTRA_TCP_PORT);
    let (relay_port, second_port) = (main.relay_port, main.second_port);
    let opened = open_tcp(extra, &mut handed);
    leave(handed);
    match opened {
        Ok(listener) => {
            bound.tcp.push(Listener { listener, address: extra, relay_port, second_port });
        }
        Err(error) => info!(port = EXTRA_TCP_PORT, %error, "not listening on the extra port"),
    }
    Ok(bound)
}

/// Those of `listen` that have to be opened: all addresses of IPv6 are those of IPv4, too, and where
/// many programs need a line for each, this one would meet its own port.
fn needed(listen: &[SocketAddr]) -> impl Iterator<Item = SocketAddr> {
    let everywhere = |port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let is_in_other = move |address: &SocketAddr| {
        address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED)
            && address.port() != 0
            && listen.contains(&everywhere(address.port()))
    };
    listen.iter().copied().filter(move |address| !is_in_other(address))
}

/// The socket of this address that was handed over, or a new one.
fn open_tcp(wished: SocketAddr, handed: &mut Handed) -> io::Result<TcpListener> {
    match handed.iter().position(|(address, _)| *address == wished) {
        Some(found) => TcpListener::from_std(handed.swap_remove(found).1),
        None => {
            let listener = listen::bind(wished)?;
            store_listener(listener.local_addr()?, &listener);
            Ok(listener)
        }
    }
}

/// What nobody wanted is closed here and, if it is of an earlier run of ours, by the service manager;
/// a socket unit still has its own.
fn leave(handed: Handed) {
    for (address, _) in handed {
        forget_listener(address);
        warn!(%address, "the service manager listens there for us, and the configuration does not \
            name it");
    }
}

fn has_no_ipv6(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(libc::EAFNOSUPPORT) || code == Some(libc::EADDRNOTAVAIL)
}

/// Binds one address: TCP, and UDP on the same port and a second one.
fn bind_pair(bound: &mut Bound, wished: SocketAddr, handed: &mut Handed) -> Result<(), StartError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let tcp = |source| StartError::Listen { address: wished, protocol: "TCP", source };
        let listener = open_tcp(wished, handed).map_err(tcp)?;
        let address = listener.local_addr().map_err(tcp)?;
        let main = match bind_udp(address) {
            Ok(main) => main,
            Err(error) if wished.port() == 0 && attempt < ANY_PORT_ATTEMPTS => {
                debug!(%error, %address, "trying another port");
                continue;
            }
            Err(source) => return Err(StartError::Listen { address, protocol: "UDP", source }),
        };
        let (second, second_port) = bind_second(address)?;
        bound.udp.extend(main.into_iter().zip(second).flat_map(|(main, second)| [main, second]));
        let relay_port = address.port();
        bound.tcp.push(Listener { listener, address, relay_port, second_port });
        return Ok(());
    }
}

/// The second port is the next one; where that is taken, any other does.
fn bind_second(address: SocketAddr) -> Result<(Vec<UdpPort>, u16), StartError> {
    let next = address.port().checked_add(1);
    let candidates = next.into_iter().chain(std::iter::repeat_n(0, 20));
    let mut failure = io::Error::from(io::ErrorKind::AddrInUse);
    for port in candidates {
        let port = if port == 0 {
            warn!("the next UDP port is taken, using any other as second reflector port");
            let probe = UdpSocket::bind(SocketAddr::new(address.ip(), 0));
            probe.and_then(|probe| probe.local_addr()).map_or(0, |probe| probe.port())
        } else {
            port
        };
        match bind_udp(SocketAddr::new(address.ip(), port)) {
            Ok(sockets) => return Ok((sockets, port)),
            Err(error) => failure = error,
        }
    }
    Err(StartError::Listen { address, protocol: "UDP, second port", source: failure })
}

/// One socket for each family of the address: a socket for both would have to name IPv4 addresses
/// in IPv6 form, which not every kernel interface takes.
fn bind_udp(address: SocketAddr) -> io::Result<Vec<UdpPort>> {
    let mut sockets = vec![bind_udp_socket(address)?];
    if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
        sockets.push(bind_udp_socket(v4)?);
    }
    Ok(sockets)
}

fn bind_udp_socket(address: SocketAddr) -> io::Result<UdpPort> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Less is slower and still works; the kernel caps what an ordinary user may ask for.
    let _ = socket.set_recv_buffer_size(UDP_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(UDP_BUFFER_BYTES);
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
    allow_fragments(&socket)?;
    let gso = Gso::new(state.max_gso_segments());
    Ok(UdpPort { socket, state, gso, unread: Unread::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_of_ipv4_are_opened_with_those_of_ipv6_of_the_same_port() {
        for (listen, opened) in [
            ("0.0.0.0:41820 [::]:41820", "[::]:41820"),
            ("[::]:41820 0.0.0.0:41820 0.0.0.0:443", "[::]:41820 0.0.0.0:443"),
            ("0.0.0.0:41820 [::1]:41820", "0.0.0.0:41820 [::1]:41820"),
            ("192.0.2.1:41820 [::]:443", "192.0.2.1:41820 [::]:443"),
        ] {
            let addresses = |text: &str| -> Vec<SocketAddr> {
                text.split(' ').map(|address| address.parse().unwrap()).collect()
            };
            assert!(needed(&addresses(listen)).eq(addresses(opened)), "{listen}");
        }
    }

    #[tokio::test]
    async fn a_line_for_each_family_opens_one_socket_for_both() {
        let any = bind(&["[::]:0".parse().unwrap()], Vec::new()).unwrap();
        let port = any.tcp[0].address.port();
        drop(any);
        let both = [format!("0.0.0.0:{port}"), format!("[::]:{port}")];
        let bound = bind(&both.map(|address| address.parse().unwrap()), Vec::new()).unwrap();
        assert_eq!(bound.tcp.len(), 1);
        std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    }
}
