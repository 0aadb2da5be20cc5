//! Why a packet died. Every drop has a reason, and every reason a counter.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// Why a packet died.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum DropReason {
            $($(#[$doc])* $name,)*
        }

        impl DropReason {
            /// All reasons, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word used in status, metrics and logs.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

drop_reasons! {
    /// The bytes are of no known packet kind, or too short for the kind they claim.
    Malformed => "malformed",
    /// An inner packet to an address that no peer has.
    NoRoute => "no-route",
    /// An inner packet that is neither IPv4 nor IPv6, or shorter than it says.
    BadInnerPacket => "bad-inner-packet",
    /// Multicast or broadcast, which this network does not carry.
    Multicast => "multicast",
    /// An inner packet whose source address does not belong to the peer that sent it.
    SpoofedSource => "spoofed-source",
    /// An inner packet that the network's access rules do not let in.
    Filtered => "filtered",
    /// A data packet for a session that we do not have.
    UnknownSession => "unknown-session",
    /// Decryption failed: forged, damaged or of an old session.
    Undecryptable => "undecryptable",
    /// A data packet with a counter that was seen before.
    Replayed => "replayed",
    /// A handshake that is not for us, replayed, or from nobody we know.
    BadHandshake => "bad-handshake",
    /// A disco message from nobody we know, or that does not open.
    BadDisco => "bad-disco",
    /// A relay frame from or to somebody who is not in the network, or with a bad code.
    BadRelayFrame => "bad-relay-frame",
    /// The peer is known, but there is no path to it.
    NoPath => "no-path",
    /// The peer is not connected to the relay.
    RelayPeerAbsent => "relay-peer-absent",
    /// The sender is over the relay's limit for one node.
    RelayNodeLimit => "relay-node-limit",
    /// All nodes together are over the relay's limit, and the sender over its part of it.
    RelayNetworkLimit => "relay-network-limit",
    /// A bounded queue was full.
    QueueFull => "queue-full",
    /// The kernel threw it away before it was read, mostly as the socket's receive buffer was full.
    ReceiveBufferFull => "receive-buffer-full",
    /// The packet is larger than the tunnel or a frame may carry.
    TooLarge => "too-large",
    /// Too many of these from one source in too short a time.
    RateLimited => "rate-limited",
    /// The kernel would not send it.
    SendFailed => "send-failed",
    /// The kernel would not take it on the TUN interface.
    TunWriteFailed => "tun-write-failed",
}

/// One counter for each [`DropReason`]; shared by threads, never reset.
#[derive(Debug, Default)]
pub struct DropCounters {
    counts: [AtomicU64; DropReason::ALL.len()],
}

impl DropCounters {
    /// Counts one dropped packet.
    pub fn count(&self, reason: DropReason) {
        self.count_many(reason, 1);
    }

    /// Counts `packets` dropped packets.
    pub fn count_many(&self, reason: DropReason, packets: u64) {
        self.counts[reason as usize].fetch_add(packets, Ordering::Relaxed);
    }

    /// How many packets died of `reason`.
    #[must_use]
    pub fn of(&self, reason: DropReason) -> u64 {
        self.counts[reason as usize].load(Ordering::Relaxed)
    }

    /// The reasons that have occurred, with their counts.
    #[must_use]
    pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
        DropReason::ALL
            .iter()
            .map(|&reason| (reason.as_str(), self.of(reason)))
            .filter(|&(_, count)| count > 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter_and_word() {
        let counters = DropCounters::default();
        for (index, &reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason as usize, index);
            counters.count_many(reason, index as u64 + 1);
        }
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.len(), DropReason::ALL.len());
        let words: std::collections::BTreeSet<_> = snapshot.iter().map(|(word, _)| word).collect();
        assert_eq!(words.len(), snapshot.len(), "no two reasons share a word");
    }
}
