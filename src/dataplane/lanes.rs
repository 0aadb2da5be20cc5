//! Two lanes with one peer: sealing and opening without waiting for one another.
//!
//! The engine keeps all keys of a session behind one `&mut`, so with one session the thread that seals
//! for a peer and the thread that opens from it take turns. A second session, the second *lane*, with a
//! lock of its own ends that: of two nodes the one with the higher id seals on the second lane, the
//! other one on the first, and each opens on the lane on which it does not seal.
//!
//! The second lane is made beside a first one that works, by the node that seals on it, when there is
//! much to do in both directions, and it is of use only as long as the keys of the first lane are those
//! beside which it was made: whatever gives the first lane new keys (time, another node key, a peer
//! that has lost its own) ends it, and it is made anew. So everything that has to notice the end of a
//! session has one lane to watch, and a peer that knows of no lanes has a first one like everybody.
//!
//! The lanes of one peer differ in one bit of the receiver index. An initiation belongs to the second
//! lane when its sender's index differs in this bit from that of a first lane of the same keys.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Peer;
use super::peer::LockedPeer;
use super::session::Session;
use super::sessions::{KEY_SLOT_MASK, LANE_BIT};
use crate::types::PublicKey;

impl Peer {
    /// Takes the lock of both lanes, one after the other.
    pub(crate) fn lanes(&self) -> impl Iterator<Item = LockedPeer<'_>> {
        std::iter::once_with(|| Some(self.lock()))
            .chain(std::iter::once_with(|| self.lock_second()))
            .flatten()
    }

    /// Whether a receiver index of ours is one of the second lane.
    pub(crate) fn is_second(&self, receiver: u32) -> bool {
        (receiver >> 8 ^ self.index) & LANE_BIT != 0
    }

    /// Takes the lock of the lane that this receiver index is of.
    pub(super) fn lock_lane(&self, receiver: u32) -> Option<LockedPeer<'_>> {
        if self.is_second(receiver) { self.lock_second() } else { Some(self.lock()) }
    }

    /// Takes the lock of the lane that data leaves on; and tells whether it is the second.
    pub(super) fn lock_to_seal(&self, now: Instant) -> (LockedPeer<'_>, bool) {
        if self.seals_second()
            && let Some(second) = self.lock_second()
        {
            if second.session.is_usable(now) {
                return (second, true);
            }
            self.seal_on_second(false);
        }
        (self.lock(), false)
    }

    /// Whether data leaves on the second lane.
    pub(crate) fn seals_second(&self) -> bool {
        self.seals_second.load(Ordering::Relaxed)
    }

    /// From here on data leaves on the second lane, or on the first.
    pub fn seal_on_second(&self, second: bool) {
        self.seals_second.store(second, Ordering::Relaxed);
    }

    /// Sees to it that the second lane has a session of these two keys, and no others but such as
    /// still open what is under way. `make` is given its index.
    pub fn prepare_second(
        &self,
        own: PublicKey,
        peer: PublicKey,
        make: impl Fn(u32) -> Session,
        now: Instant,
    ) {
        let mut state = self.second_or(|| make(self.index & !KEY_SLOT_MASK ^ LANE_BIT));
        state.retire_sessions(now);
        if state.session_of(own, peer).is_none() {
            state.add_session(make, now);
        }
    }

    /// Whether an initiation from `sender` (its index, as it stands in the message) is for the second
    /// lane.
    pub(crate) fn calls_second(&self, own: PublicKey, peer: PublicKey, sender: u32) -> bool {
        let first = self.lock().session_of(own, peer).and_then(|session| session.peer_index());
        first.is_some_and(|first| (first ^ sender >> 8) & !KEY_SLOT_MASK == LANE_BIT)
    }
}
