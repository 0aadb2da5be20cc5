//! UDP with forged sources: whole IPv4 packets through a raw socket.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::clock::now;
use crate::lab::Host;

/// Sends what it is told from whatever address it is told.
pub(crate) struct Spoofer {
    socket: Socket,
}

/// A flood in the background; over on drop.
pub(crate) struct Flood {
    over: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Spoofer {
    pub(crate) fn open(host: &Host) -> Self {
        let raw = Protocol::from(IPPROTO_RAW);
        let socket = host.ns.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(raw)).unwrap());
        Self { socket }
    }

    /// Sends one datagram; whether it went out.
    pub(crate) fn send(&self, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> bool {
        let packet = packet(from, to, payload);
        self.socket.send_to(&packet, &SockAddr::from(SocketAddr::V4(to))).is_ok()
    }

    /// Sends these in turn, each from another address of 198.18.0.0/15, until it is stopped.
    pub(crate) fn flood(
        host: &Host,
        to: SocketAddrV4,
        payloads: Vec<Vec<u8>>,
        per_second: u64,
    ) -> Flood {
        let spoofer = Self::open(host);
        let (over, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (until, count) = (Arc::clone(&over), Arc::clone(&sent));
        let thread = thread::spawn(move || {
            let start = now();
            let mut next: u64 = 0;
            while !until.load(Ordering::Relaxed) {
                // Behind the clock: a full burst, never more than a hundredth of a second's worth.
                let due =
                    (start.elapsed().as_micros() as u64).saturating_mul(per_second) / 1_000_000;
                next = next.max(due.saturating_sub(per_second / 100));
                while next < due {
                    let payload = &payloads[next as usize % payloads.len()];
                    let mixed = (next as u32).wrapping_mul(0x9e37_79b1);
                    let source = Ipv4Addr::from(0xc612_0000 | (mixed >> 15));
                    let from = SocketAddrV4::new(source, 1024 + (mixed & 0x7fff) as u16);
                    if spoofer.send(from, to, payload) {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    next += 1;
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        Flood { over, sent, thread: Some(thread) }
    }
}

impl Flood {
    /// Ends it and tells how many were sent.
    pub(crate) fn stop(mut self) -> u64 {
        self.end();
        self.sent.load(Ordering::Relaxed)
    }

    fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.end();
    }
}

/// An IPv4 packet; the kernel fills in its length, number and header checksum. A UDP checksum of
/// zero is none (RFC 768).
fn packet(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend_from_slice(&from.ip().octets());
    packet.extend_from_slice(&to.ip().octets());
    packet.extend_from_slice(&from.port().to_be_bytes());
    packet.extend_from_slice(&to.port().to_be_bytes());
    packet.extend_from_slice(&u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(payload);
    packet
}

const IPPROTO_RAW: i32 = 255;
