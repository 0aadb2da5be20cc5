//! Datagrams with a time to live of their own, beside the socket's usual one.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

/// Sends one datagram that dies after `ttl` hops: IP_TTL and IPV6_HOPLIMIT as ancillary data,
/// ip(7) and RFC 3542 section 6.3.
///
/// # Errors
/// What the kernel says.
pub fn send_with_ttl(
    socket: &impl AsFd,
    remote: SocketAddr,
    ttl: u8,
    datagram: &[u8],
) -> io::Result<()> {
    let hops = i32::from(ttl);
    let control = match remote {
        SocketAddr::V4(_) => ControlMessage::Ipv4Ttl(&hops),
        SocketAddr::V6(_) => ControlMessage::Ipv6HopLimit(&hops),
    };
    let descriptor = socket.as_fd().as_raw_fd();
    let address = SockaddrStorage::from(remote);
    let parts = [IoSlice::new(datagram)];
    sendmsg(descriptor, &parts, &[control], MsgFlags::MSG_DONTWAIT, Some(&address))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::net::UdpSocket;

    use nix::sys::socket::{ControlMessageOwned, recvmsg, setsockopt, sockopt};

    use super::*;

    #[test]
    fn the_datagram_carries_its_own_time_to_live() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // Not every machine has IPv6.
            let Ok(receiver) = UdpSocket::bind(address) else { continue };
            match receiver.local_addr().unwrap() {
                SocketAddr::V4(_) => setsockopt(&receiver, sockopt::Ipv4RecvTtl, &true).unwrap(),
                SocketAddr::V6(_) => {
                    setsockopt(&receiver, sockopt::Ipv6RecvHopLimit, &true).unwrap();
                }
            }
            let sender = UdpSocket::bind(address).unwrap();
            send_with_ttl(&sender, receiver.local_addr().unwrap(), 2, b"opener").unwrap();
            let mut buffer = [0; 64];
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let mut space = nix::cmsg_space!(i32);
            let descriptor = receiver.as_raw_fd();
            let flags = MsgFlags::empty();
            let message = recvmsg::<()>(descriptor, &mut parts, Some(&mut space), flags).unwrap();
            let hops: Vec<i32> = message
                .cmsgs()
                .unwrap()
                .filter_map(|control| match control {
                    ControlMessageOwned::Ipv4Ttl(hops)
                    | ControlMessageOwned::Ipv6HopLimit(hops) => Some(hops),
                    _ => None,
                })
                .collect();
            assert_eq!((message.bytes, hops), (6, vec![2]));
        }
    }
}
