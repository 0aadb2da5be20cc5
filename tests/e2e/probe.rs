//! Plain UDP probes: what a NAT does, and whether two NATs can be punched, with no help from the
//! program under test.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::lab::Host;
use crate::nat::Nat;

/// Two addresses with two ports each that tell a client how they see it.
pub(crate) struct Reflectors {
    sockets: [[UdpSocket; 2]; 2],
}

impl Reflectors {
    /// Opens them on a public host, which gets a second address for it.
    pub(crate) fn open(host: &Host) -> Self {
        let second = Ipv4Addr::new(203, 0, 113, 200);
        host.ns.ip(&format!("addr add {second}/24 dev eth0"));
        let sockets = [host.address, second]
            .map(|ip| [7001, 7002].map(|port| open_socket(host, SocketAddr::from((ip, port)))));
        Self { sockets }
    }

    /// Sends from `client` and returns the source that reflector `ip`, `port` saw.
    pub(crate) fn observe(&self, client: &UdpSocket, ip: usize, port: usize) -> SocketAddr {
        let reflector = &self.sockets[ip][port];
        client.send_to(b"who am I", reflector.local_addr().unwrap()).unwrap();
        let (_, source) = reflector.recv_from(&mut [0; 64]).expect("a probe reaches the reflector");
        source
    }

    /// Whether a packet of `client` arrives.
    pub(crate) fn hears(&self, client: &UdpSocket) -> bool {
        let reflector = &self.sockets[0][0];
        client.send_to(b"anybody there", reflector.local_addr().unwrap()).unwrap();
        reflector.recv_from(&mut [0; 64]).is_ok()
    }

    fn reaches(&self, client: &UdpSocket, ip: usize, port: usize, at: SocketAddr) -> bool {
        self.sockets[ip][port].send_to(b"hello", at).unwrap();
        client.recv_from(&mut [0; 64]).is_ok()
    }
}

/// Finds out the kind of NAT in front of `client` in the manner of RFC 5780.
pub(crate) fn classify(client: &Host, reflectors: &Reflectors) -> Nat {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let mapped = open_socket(client, any);
    let first = reflectors.observe(&mapped, 0, 0);
    let other_port = reflectors.observe(&mapped, 0, 1);
    let other_address = reflectors.observe(&mapped, 1, 0);
    if first != other_port || first != other_address {
        return Nat::Symmetric;
    }
    // A port that has talked to one reflector only shows who else may answer.
    let filtered = open_socket(client, any);
    let outer = reflectors.observe(&filtered, 0, 0);
    let from_address = reflectors.reaches(&filtered, 1, 1, outer);
    let from_port = reflectors.reaches(&filtered, 0, 1, outer);
    assert!(reflectors.reaches(&filtered, 0, 0, outer), "who was asked can always answer");
    match (from_address, from_port) {
        (true, true) if outer.ip() == IpAddr::V4(client.address) => Nat::None,
        (true, true) => Nat::FullCone,
        (false, true) => Nat::AddressRestricted,
        (false, false) => Nat::PortRestricted,
        (true, false) => panic!("a stranger is let in and another port of a friend is not"),
    }
}

/// Whether two hosts reach each other by sending at the same time, and answering who they hear.
pub(crate) fn punch(a: &Host, b: &Host, reflectors: &Reflectors) -> bool {
    let mut sides = [a, b].map(Puncher::new);
    let outer = [0, 1].map(|side: usize| reflectors.observe(&sides[side].socket, 0, 0));
    sides[0].targets.push(outer[1]);
    sides[1].targets.push(outer[0]);
    for _ in 0..PUNCH_ROUNDS {
        sides.iter_mut().for_each(Puncher::send);
        sides.iter_mut().for_each(Puncher::receive);
        if sides.iter().all(|side| side.heard) {
            return true;
        }
    }
    false
}

struct Puncher {
    socket: UdpSocket,
    targets: Vec<SocketAddr>,
    heard: bool,
}

impl Puncher {
    fn new(host: &Host) -> Self {
        let socket = open_socket(host, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        Self { socket, targets: Vec::new(), heard: false }
    }

    fn send(&mut self) {
        for target in &self.targets {
            self.socket.send_to(b"punch", target).unwrap();
        }
    }

    fn receive(&mut self) {
        if let Ok((_, source)) = self.socket.recv_from(&mut [0; 64]) {
            self.heard = true;
            if !self.targets.contains(&source) {
                self.targets.push(source);
            }
        }
    }
}

/// A UDP socket in the host's namespace that gives up waiting after a moment.
pub(crate) fn open_socket(host: &Host, at: SocketAddr) -> UdpSocket {
    let socket = host.ns.enter(|| UdpSocket::bind(at).unwrap());
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    socket
}

/// In the lab a packet takes far less than a millisecond.
const SILENCE: Duration = Duration::from_millis(250);

/// Three rounds join every pair that can be joined; the rest is for a loaded machine.
const PUNCH_ROUNDS: usize = 10;
