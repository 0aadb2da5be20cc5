//! Which fragments belong to a packet that was let in.
//!
//! Only the first fragment has the headers, so only it can be judged; the others are let in behind
//! it. What makes this safe is that no header byte of a packet that was let in can be replaced: a
//! later fragment lies wholly behind the first one, also when there are several first ones.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::packet::{Fragment, Packet};

/// Fragments of one packet leave together; on the longest sane path they are apart this much.
const LIFETIME: Duration = Duration::from_secs(2);
/// Packets in fragments that are kept in mind, per peer; the oldest makes room.
const MAX_OPEN: usize = 4_096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    /// IPv4 keeps apart by protocol too (RFC 791 section 3.2), IPv6 does not.
    protocol: u8,
}

impl Key {
    fn of(packet: &Packet, fragment: &Fragment) -> Self {
        let protocol = if packet.is_ipv6() { 0 } else { fragment.next };
        Self { src: packet.src, dst: packet.dst, id: fragment.id, protocol }
    }
}

#[derive(Debug)]
struct Open {
    /// When its newest first fragment came.
    at: Instant,
    next: u8,
    /// Where the longest of its first fragments ends.
    first_end: u32,
    /// Where the lowest of the later ones starts that were let in.
    later_start: u32,
}

/// The packets of one peer that came in part.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    // Only for look-up, never iterated: its order is of no consequence.
    open: HashMap<Key, Open>,
    order: VecDeque<(Instant, Key)>,
}

impl Fragments {
    /// Takes a first fragment whose headers are allowed; whether it may come in.
    pub(super) fn first(&mut self, packet: &Packet, fragment: &Fragment, now: Instant) -> bool {
        self.expire(now);
        let key = Key::of(packet, fragment);
        match self.open.get_mut(&key) {
            Some(open) => {
                // Its headers would lie under what came before, or be read by another protocol.
                if open.next != fragment.next || fragment.len > open.later_start {
                    return false;
                }
                open.first_end = open.first_end.max(fragment.len);
                open.at = now;
            }
            None => {
                let open = Open {
                    at: now,
                    next: fragment.next,
                    first_end: fragment.len,
                    later_start: u32::MAX,
                };
                self.open.insert(key, open);
            }
        }
        self.order.push_back((now, key));
        if self.order.len() > MAX_OPEN {
            self.forget_oldest();
        }
        true
    }

    /// Whether a later fragment belongs to a packet whose first one was let in.
    pub(super) fn later(&mut self, packet: &Packet, fragment: &Fragment, now: Instant) -> bool {
        let Some(open) = self.open.get_mut(&Key::of(packet, fragment)) else { return false };
        if now.saturating_duration_since(open.at) > LIFETIME || fragment.offset < open.first_end {
            return false;
        }
        open.later_start = open.later_start.min(fragment.offset);
        true
    }

    fn expire(&mut self, now: Instant) {
        while let Some((at, _)) = self.order.front()
            && now.saturating_duration_since(*at) > LIFETIME
        {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some((at, key)) = self.order.pop_front() else { return };
        // A newer first fragment of the same packet stands further back in the queue.
        if self.open.get(&key).is_some_and(|open| open.at == at) {
            self.open.remove(&key);
        }
    }
}
