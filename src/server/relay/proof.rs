//! Is a node where its binds come from? And what goes there before that is known.
//!
//! A member can forge the source of a bind, and have what others send to it go to a stranger. So a
//! bind is answered with eight bytes that only who receives at that address learns, and the next
//! bind says them: one more bind for each new address, while which data flows already. Until then
//! no more goes there than came from there, and a little besides: [`BURST`] bytes at once and then
//! 600 a second for each node, less than 1 kB/s in any minute. What is over that takes the
//! control connection.
//!
//! Nothing is stored for it: the bytes are a MAC under a key of this process, good for two windows.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use blake2::digest::consts::U8;
use blake2::digest::{KeyInit, Mac};

use super::Arrival;
use crate::types::{Account, NodeId, Rate};
use crate::wire::relay::{AddressProof, RelayKey};

/// A proof is good in the window in which it is told and in the next one.
const WINDOW: Duration = Duration::from_secs(300);
/// Bytes at once to an address that has proved nothing.
pub(super) const BURST: u32 = 16 * 1024;
/// The same, and 600 bytes in a second after that.
const UNPROVED: Rate = Rate::new(BURST, Duration::from_nanos(1_666_667));
/// Bytes that came from there are remembered up to this.
const MOST_CREDIT: u32 = 64 * 1024;
/// Of IPv4 and UDP; the longer ones of IPv6 are as many on the way in.
const HEADERS: u32 = 28;

/// Makes proofs and checks them.
#[derive(Debug)]
pub(super) struct Prover {
    secret: RelayKey,
    origin: Option<Instant>,
}

impl Prover {
    pub(super) fn new(secret: RelayKey) -> Self {
        Self { secret, origin: None }
    }

    /// What is told to who binds from there.
    pub(super) fn tell(&mut self, node: NodeId, arrival: Arrival, now: Instant) -> AddressProof {
        let window = self.window(now);
        AddressProof(self.mac(node, arrival, window).finalize().into_bytes().into())
    }

    /// Whether it was told there, not long ago.
    pub(super) fn accepts(
        &mut self,
        said: AddressProof,
        node: NodeId,
        arrival: Arrival,
        now: Instant,
    ) -> bool {
        let window = self.window(now);
        [Some(window), window.checked_sub(1)]
            .into_iter()
            .flatten()
            .any(|window| self.mac(node, arrival, window).verify_slice(&said.0).is_ok())
    }

    fn window(&mut self, now: Instant) -> u64 {
        let origin = *self.origin.get_or_insert(now);
        now.saturating_duration_since(origin).as_secs() / WINDOW.as_secs()
    }

    fn mac(&self, node: NodeId, arrival: Arrival, window: u64) -> blake2::Blake2sMac<U8> {
        let mut mac = <blake2::Blake2sMac<U8> as KeyInit>::new((&self.secret.0).into());
        let ip = match arrival.source.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        mac.update(&window.to_be_bytes());
        mac.update(&node.number().to_be_bytes());
        mac.update(&arrival.socket.0.to_be_bytes());
        mac.update(&ip.octets());
        mac.update(&arrival.source.port().to_be_bytes());
        mac
    }
}

/// What one node has had sent to addresses that have proved nothing, all of them together.
#[derive(Debug, Default)]
pub(super) struct Unproved {
    /// Bytes that came from such an address, and were not used up by what went there.
    credit: u32,
    /// Bytes that were sent beyond them.
    sent: Account,
}

impl Unproved {
    /// A datagram of so many bytes came from there.
    pub(super) fn heard(&mut self, len: usize) {
        let len = u32::try_from(len).unwrap_or(u32::MAX).saturating_add(HEADERS);
        self.credit = self.credit.saturating_add(len).min(MOST_CREDIT);
    }

    /// The node is seen at another address: what came from the last one counts for nothing.
    pub(super) fn moved(&mut self) {
        self.credit = 0;
    }

    /// Whether one more datagram of so many bytes may go there.
    pub(super) fn take(&mut self, len: usize, now: Instant) -> bool {
        let Ok(len) = u32::try_from(len) else { return false };
        let len = len.saturating_add(HEADERS);
        if self.credit >= len {
            self.credit -= len;
            return true;
        }
        self.sent.take(UNPROVED, len, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::relay::SocketId;
    use crate::testing::epoch;

    fn arrival(text: &str, socket: u16) -> Arrival {
        Arrival { socket: SocketId(socket), source: text.parse().unwrap(), local: None }
    }

    #[test]
    fn a_proof_is_of_one_node_one_address_one_server_and_ten_minutes() {
        let mut prover = Prover::new(RelayKey([1; 32]));
        let [node, other] = [1, 2].map(|id| NodeId::new(id).unwrap());
        let (now, here) = (epoch(), arrival("192.0.2.1:1000", 0));
        let proof = prover.tell(node, here, now);
        assert!(prover.accepts(proof, node, here, now));
        assert!(!prover.accepts(proof, other, here, now));
        for elsewhere in ["192.0.2.1:1001", "192.0.2.2:1000", "[2001:db8::1]:1000"] {
            assert!(!prover.accepts(proof, node, arrival(elsewhere, 0), now), "{elsewhere}");
        }
        assert!(!prover.accepts(proof, node, arrival("192.0.2.1:1000", 1), now), "another port");
        assert!(!prover.accepts(AddressProof::default(), node, here, now), "none at all");
        assert!(prover.accepts(proof, node, here, now + WINDOW));
        assert!(!prover.accepts(proof, node, here, now + WINDOW * 2), "too old");
        let mut stranger = Prover::new(RelayKey([2; 32]));
        assert!(!stranger.accepts(proof, node, here, now), "of another life of the server");
    }

    #[test]
    fn an_unproved_address_gets_what_it_sent_and_less_than_a_kilobyte_a_second() {
        let (mut unproved, start) = (Unproved::default(), epoch());
        let mut sent = 0;
        for ms in 0..60_000 {
            let now = start + Duration::from_millis(ms);
            sent += if unproved.take(1_400, now) { 1_428 } else { 0 };
        }
        assert!((40_000..60_000).contains(&sent), "{sent} bytes in a minute");
        let end = start + Duration::from_secs(60);
        while unproved.take(1_400, end) {}
        unproved.heard(1_400);
        assert!(unproved.take(1_400, end) && !unproved.take(1_400, end), "as much as came");
        unproved.heard(1_400);
        unproved.moved();
        assert!(!unproved.take(1_400, end), "from another address");
    }
}
