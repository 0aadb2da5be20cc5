//! The two main UDP sockets, one for each address family, and which port they get.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::extra::bind_socket;
use super::startup::{NodeOptions, StartError};
use crate::io::udp::UdpSocket;

/// The sockets for IPv4 and IPv6; none for a family that this machine does not have.
type Pair = (Option<UdpSocket>, Option<UdpSocket>);

/// Binds both: to the port that is asked for, else to the one of the last run or a free one.
///
/// # Errors
/// When the port that is asked for cannot be had, and when there is no socket at all.
pub(super) fn bind_udp(options: &NodeOptions, saved_port: u16) -> Result<Pair, StartError> {
    let bind = |addr| bind_socket(addr, None, options.offloads);
    bind_pair(options.listen_port, saved_port, bind)
}

fn bind_pair(
    asked: Option<u16>,
    saved_port: u16,
    bind: impl Fn(SocketAddr) -> io::Result<UdpSocket>,
) -> Result<Pair, StartError> {
    let at = |ip: IpAddr, port| bind(SocketAddr::new(ip, port));
    let v4 = |port| at(Ipv4Addr::UNSPECIFIED.into(), port);
    let v6 = |port| at(Ipv6Addr::UNSPECIFIED.into(), port);
    let wanted = asked.unwrap_or(saved_port);
    let udp_v4 = match v4(wanted) {
        Ok(socket) => Some(socket),
        Err(error) if is_absent(&error) => None,
        Err(error) => match asked {
            Some(port) => return Err(refused(port, error)),
            None => {
                tracing::warn!(port = wanted, %error, "the UDP port of the last run cannot be had, \
                    using another");
                v4(0).ok()
            }
        },
    };
    let port =
        udp_v4.as_ref().and_then(|socket| socket.local_addr().ok()).map_or(wanted, |a| a.port());
    let udp_v6 = match v6(port) {
        Ok(socket) => Some(socket),
        Err(error) if is_absent(&error) => None,
        Err(error) => {
            // Another port for IPv6 is as good, it has candidates of its own; but a firewall may be
            // open for the one that was asked for, and without IPv4 there is no other.
            if let Some(port) = asked {
                if udp_v4.is_none() {
                    return Err(refused(port, error));
                }
                tracing::warn!(port, %error, "the UDP port cannot be had for IPv6, using another \
                    there");
            }
            v6(0).ok()
        }
    };
    if udp_v4.is_none() && udp_v6.is_none() {
        let source = io::Error::from(io::ErrorKind::AddrNotAvailable);
        return Err(StartError::Io { action: "binding a UDP socket", source });
    }
    Ok((udp_v4, udp_v6))
}

/// The port that was asked for cannot be had.
fn refused(port: u16, source: io::Error) -> StartError {
    match source.kind() {
        io::ErrorKind::AddrInUse => StartError::PortTaken { port },
        _ => StartError::Port { port, source },
    }
}

/// Whether the kernel has no such addresses at all.
fn is_absent(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    number == Some(libc::EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Binds on the loopback, unless `refused` has an error number for the place.
    fn bind_but(
        refused: impl Fn(SocketAddr) -> Option<i32>,
    ) -> impl Fn(SocketAddr) -> io::Result<UdpSocket> {
        move |addr| match refused(addr) {
            Some(number) => Err(io::Error::from_raw_os_error(number)),
            None => UdpSocket::bind("127.0.0.1:0".parse().unwrap()),
        }
    }

    #[test]
    fn a_port_that_was_asked_for_is_had_for_ipv4_or_the_node_does_not_start() {
        let low = |number| bind_but(move |addr| (addr.port() == 53).then_some(number));
        let denied = bind_pair(Some(53), 0, low(libc::EACCES)).unwrap_err();
        let StartError::Port { port: 53, source } = &denied else { panic!("{denied}") };
        assert_eq!(source.raw_os_error(), Some(libc::EACCES), "the kernel's own reason");
        let taken = bind_pair(Some(53), 0, low(libc::EADDRINUSE)).unwrap_err();
        assert!(matches!(taken, StartError::PortTaken { port: 53 }), "{taken}");
        // Nobody has asked for the one of the last run.
        for number in [libc::EACCES, libc::EADDRINUSE] {
            assert!(bind_pair(None, 53, low(number)).unwrap().0.is_some());
        }
    }

    #[test]
    fn a_machine_may_lack_one_family_and_not_both() {
        let lacks = |gone: fn(&SocketAddr) -> bool| {
            bind_but(move |addr| gone(&addr).then_some(libc::EAFNOSUPPORT))
        };
        let (v4, v6) = bind_pair(Some(4711), 0, lacks(SocketAddr::is_ipv4)).unwrap();
        assert!(v4.is_none() && v6.is_some());
        let (v4, v6) = bind_pair(Some(4711), 0, lacks(SocketAddr::is_ipv6)).unwrap();
        assert!(v4.is_some() && v6.is_none());
        bind_pair(Some(4711), 0, lacks(|_| true)).unwrap_err();
    }

    #[test]
    fn ipv6_goes_by_another_port_when_only_its_own_is_taken() {
        let bind =
            bind_but(|addr| (addr.is_ipv6() && addr.port() != 0).then_some(libc::EADDRINUSE));
        let (v4, v6) = bind_pair(Some(4711), 0, bind).unwrap();
        assert!(v4.is_some() && v6.is_some());
        let alone = bind_but(|addr| match (addr.is_ipv4(), addr.port()) {
            (true, _) => Some(libc::EAFNOSUPPORT),
            (false, 4711) => Some(libc::EADDRINUSE),
            (false, _) => None,
        });
        let taken = bind_pair(Some(4711), 0, &alone).unwrap_err();
        assert!(matches!(taken, StartError::PortTaken { port: 4711 }), "{taken}");
        assert!(bind_pair(None, 4711, &alone).unwrap().1.is_some());
    }
}
