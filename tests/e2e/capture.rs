//! What passes one interface of a machine: only what the protocol knows, and no byte of the programs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::clock::now;
use crate::lab::Host;
use crate::overlay::PORT;

/// A capture that runs.
pub(crate) struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

/// What was captured.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Packets, by kind.
    pub(crate) kinds: BTreeMap<&'static str, u64>,
    /// What should not have been there: the first ten.
    pub(crate) leaks: Vec<String>,
}

impl Capture {
    /// Captures what `host` sends and receives by `eth0`. No packet may contain `secret`.
    pub(crate) fn start(host: &Host, secret: &'static [u8]) -> Self {
        let (socket, interface) = host.ns.enter(|| (open(), eth0()));
        let stop = Arc::<AtomicBool>::default();
        let asked = Arc::clone(&stop);
        let thread = thread::spawn(move || record(&socket, interface, secret, &asked));
        Self { stop, thread }
    }

    pub(crate) fn finish(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn open() -> OwnedFd {
    let (family, protocol) = (AddressFamily::Packet, SockProtocol::EthAll);
    let fd = socket(family, SockType::Datagram, SockFlag::empty(), protocol).unwrap();
    setsockopt(&fd, sockopt::RcvBufForce, &(64 << 20)).unwrap();
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50)).unwrap();
    fd
}

fn eth0() -> usize {
    usize::try_from(nix::net::if_::if_nametoindex("eth0").unwrap()).unwrap()
}

fn record(socket: &OwnedFd, interface: usize, secret: &[u8], stop: &AtomicBool) -> Seen {
    let (mut seen, mut packet, start) = (Seen::default(), vec![0; 1 << 17], now());
    // What is still in the queue when the end is asked for is looked at, too.
    loop {
        let (len, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut packet) {
            Ok(received) => received,
            Err(_) if stop.load(Ordering::Relaxed) => return seen,
            Err(_) => continue,
        };
        let Some(from) = from.filter(|from| from.ifindex() == interface) else { continue };
        let packet = &packet[..len];
        match kind(u16::from_be(from.protocol()), packet, secret) {
            Ok(kind) => *seen.kinds.entry(kind).or_default() += 1,
            Err(why) if seen.leaks.len() < 10 => {
                seen.leaks.push(format!("after {} ms {why}", start.elapsed().as_millis()));
            }
            Err(_) => {}
        }
    }
}

/// The kind of a packet that may be there, or what is wrong with it.
fn kind(ethertype: u16, packet: &[u8], secret: &[u8]) -> Result<&'static str, String> {
    let is_open = packet.windows(secret.len()).any(|window| window == secret);
    let (protocol, addresses, rest) = match ethertype {
        0x0806 => return Ok("arp"),
        // The rest of a datagram that was cut: its bytes have been searched, and it has no header.
        0x0800 if !is_open && u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0 => {
            return Ok("fragment");
        }
        0x0800 => {
            let header = usize::from(packet[0] & 0x0f) * 4;
            let address = |at: usize| <[u8; 4]>::try_from(&packet[at..at + 4]).unwrap();
            (packet[9], [12, 16].map(|at| IpAddr::from(address(at))), &packet[header..])
        }
        0x86dd => {
            let address = |at: usize| <[u8; 16]>::try_from(&packet[at..at + 16]).unwrap();
            (packet[6], [8, 24].map(|at| IpAddr::from(address(at))), &packet[40..])
        }
        other => return Err(format!("an ethertype {other:04x}")),
    };
    let [from, to] = addresses;
    if is_open {
        return Err(format!("the secret in the open, protocol {protocol} from {from} to {to}"));
    }
    if let Some(inner) = addresses.iter().find(|address| is_inner(address)) {
        return Err(format!("a packet with the overlay address {inner}, protocol {protocol}"));
    }
    match protocol {
        17 => datagram(rest.get(8..).unwrap_or_default())
            .ok_or_else(|| format!("a datagram of no kind from {from} to {to}: {rest:02x?}")),
        6 if rest.chunks(2).take(2).any(|port| port == PORT.to_be_bytes()) => Ok("control link"),
        // Errors of the kernel, neighbours, groups. Had they the secret in them, it would be seen.
        1 | 2 | 58 => Ok("icmp"),
        // Hop-by-hop options, before a report of groups.
        0 if rest.first() == Some(&58) => Ok("icmp"),
        other => Err(format!("protocol {other} from {from} to {to}")),
    }
}

/// The server takes its ranges from these.
fn is_inner(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[0] == 10,
        IpAddr::V6(address) => address.octets()[0] == 0xfd,
    }
}

fn datagram(payload: &[u8]) -> Option<&'static str> {
    match (*payload.first()?, payload.len()) {
        (1..=4, _) if payload.get(1..4)? != [0; 3] => None,
        (1, 148) | (2, 92) | (3, 64) => Some("wireguard handshake"),
        (4, 32..) => Some("wireguard data"),
        (0xB1, _) => Some("disco"),
        (0xB2, 8..) => match datagram(&payload[8..])? {
            "relay" | "relayed handshake" | "relay control" => None,
            "wireguard handshake" => Some("relayed handshake"),
            _ => Some("relay"),
        },
        (0xB3, 50..) => Some("relay control"),
        _ => None,
    }
}
