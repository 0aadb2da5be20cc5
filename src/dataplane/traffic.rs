//! What went out and came in, all peers together, by the kind of path.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::path::Via;

/// Kinds of paths that are counted apart, by the word that metrics use.
const KINDS: [&str; 3] = ["direct_v4", "direct_v6", "relay"];

/// Inner packets and their bytes in one direction; shared by threads, never reset.
#[derive(Debug, Default)]
pub struct Traffic {
    counts: [Count; KINDS.len()],
}

#[derive(Debug, Default)]
struct Count {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Traffic {
    /// Counts what took this path.
    pub(super) fn add(&self, via: Via, packets: u64, bytes: u64) {
        let kind = match via {
            Via::Direct { remote: SocketAddr::V4(_), .. } => 0,
            Via::Direct { remote: SocketAddr::V6(_), .. } => 1,
            Via::RelayUdp | Via::RelayTcp => 2,
        };
        if packets > 0 {
            self.counts[kind].packets.fetch_add(packets, Ordering::Relaxed);
            self.counts[kind].bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Kind of path, packets, bytes.
    pub fn by_path(&self) -> impl Iterator<Item = (&'static str, u64, u64)> {
        KINDS.into_iter().zip(&self.counts).map(|(kind, count)| {
            let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
            (kind, read(&count.packets), read(&count.bytes))
        })
    }
}
