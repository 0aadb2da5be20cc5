//! Every inner packet that was sent, and what became of it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// An inner packet under way, or arrived.
#[derive(Debug, Clone)]
pub(crate) struct Ping {
    /// The host that sent it.
    pub(crate) from: usize,
    /// The host that it is for.
    pub(crate) to: usize,
    /// When.
    pub(crate) sent_at: Instant,
    /// When it came out of the other end.
    pub(crate) arrived_at: Option<Instant>,
    packet: Vec<u8>,
}

impl Ping {
    /// How long it took; none when it has not arrived.
    pub(crate) fn took(&self) -> Option<Duration> {
        self.arrived_at.map(|at| at.saturating_duration_since(self.sent_at))
    }
}

/// All of them, by number.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// What TCP has kept for so long may come out.
    pub(crate) slack: Duration,
    pings: BTreeMap<u64, Ping>,
}

impl Ledger {
    /// Makes the packet of a new ping and returns its number with it.
    pub(crate) fn send(
        &mut self,
        (from, src): (usize, Ipv4Addr),
        (to, dst): (usize, Ipv4Addr),
        payload_bytes: usize,
        now: Instant,
    ) -> (u64, Vec<u8>) {
        let number = self.pings.len() as u64;
        let packet = ipv4(src, dst, number, payload_bytes);
        let ping = Ping { from, to, sent_at: now, arrived_at: None, packet: packet.clone() };
        self.pings.insert(number, ping);
        (number, packet)
    }

    /// Takes a packet that came out at a host: it must be there for the first time, at the right
    /// host, unchanged and not long after it was of any use. Returns who sent it.
    pub(crate) fn arrive(&mut self, host: usize, packet: &[u8], now: Instant) -> usize {
        let number = packet.get(20..28).and_then(|bytes| bytes.try_into().ok());
        let number = u64::from_be_bytes(number.expect("every inner packet carries a number"));
        let ping = self.pings.get_mut(&number).expect("only what was sent can arrive");
        assert_eq!(ping.to, host, "ping {number} came out at the wrong host");
        assert_eq!(ping.packet, packet, "ping {number} was changed on its way");
        assert_eq!(ping.arrived_at, None, "ping {number} arrived twice");
        ping.arrived_at = Some(now);
        let took = now.saturating_duration_since(ping.sent_at);
        assert!(
            took <= STALE + self.slack,
            "ping {number} came out after {took:?}: some queue kept it"
        );
        ping.from
    }

    /// What became of a ping.
    pub(crate) fn ping(&self, number: u64) -> &Ping {
        &self.pings[&number]
    }
}

/// What waits for a session or a path is dropped after 3 s; the rest is for the slowest line.
const STALE: Duration = Duration::from_secs(4);

fn ipv4(src: Ipv4Addr, dst: Ipv4Addr, number: u64, payload_bytes: usize) -> Vec<u8> {
    let payload_bytes = payload_bytes.max(8);
    let total = u16::try_from(20 + payload_bytes).expect("scenarios send no jumbo packets");
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&total.to_be_bytes());
    packet.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&dst.octets());
    packet.extend_from_slice(&number.to_be_bytes());
    let filler = number.to_le_bytes();
    packet.extend((8..payload_bytes).map(|at| filler[at % 8] ^ (at % 251) as u8));
    packet
}
