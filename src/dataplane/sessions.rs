//! More than one session with a peer: while a node key is renewed, the old keys and the new ones
//! are good side by side.
//!
//! Data leaves under the *current* session. One of newer keys is made beside it, and takes its place
//! when both sides have it; the old one goes on opening what was under way until it has expired. So
//! nothing that is sent before, during or after the change is lost. Each side has two keys at most,
//! so there are four pairs, and the receiver index has room for as many on each lane.

use std::time::Instant;

use super::peer::PeerState;
use super::session::{Opened, Session};
use crate::types::{DropReason, PublicKey};

/// The lower bits of a session's index tell sessions with one peer apart: two those of different keys,
/// one the lanes.
pub(super) const SLOT_BITS: u32 = 3;
/// Those bits.
pub(crate) const SLOT_MASK: u32 = (1 << SLOT_BITS) - 1;
/// The sessions of different keys on one lane.
const SLOTS: u32 = 1 << 2;
pub(super) const KEY_SLOT_MASK: u32 = SLOTS - 1;
pub(super) const LANE_BIT: u32 = SLOTS;

impl PeerState {
    /// Opens a data packet for receiver index `receiver` into `out`, which is no shorter.
    pub(super) fn open(
        &mut self,
        receiver: u32,
        datagram: &[u8],
        out: &mut [u8],
        now: Instant,
    ) -> Result<Opened, DropReason> {
        if self.session.index() == receiver >> 8 {
            return self.session.open(receiver, datagram, out, now);
        }
        let session = self.others.iter_mut().find(|session| session.index() == receiver >> 8);
        let session = session.ok_or(DropReason::UnknownSession)?;
        let opened = session.open(receiver, datagram, out, now)?;
        if opened.confirms_session {
            self.settle(now);
        }
        Ok(opened)
    }

    /// The sessions with this peer, the current one first.
    pub(crate) fn sessions_mut(&mut self) -> impl Iterator<Item = &mut Session> {
        std::iter::once(&mut self.session).chain(&mut self.others)
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        std::iter::once(&self.session).chain(&self.others)
    }

    /// The session under this receiver index.
    pub(crate) fn session_at(&mut self, receiver: u32) -> Option<&mut Session> {
        self.sessions_mut().find(|session| session.index() == receiver >> 8)
    }

    /// The session of these two node keys.
    pub(crate) fn session_of(&mut self, own: PublicKey, peer: PublicKey) -> Option<&mut Session> {
        self.sessions_mut().find(|session| session.own_key() == own && session.peer_key() == peer)
    }

    /// Takes a session of other keys in. `make` is given its index.
    pub(crate) fn add_session(&mut self, make: impl FnOnce(u32) -> Session, now: Instant) {
        let base = self.session.index() & !KEY_SLOT_MASK;
        if self.others.len() + 1 >= SLOTS as usize {
            let oldest = self.others.iter().enumerate().min_by_key(|(_, it)| it.rank());
            if let Some((oldest, _)) = oldest {
                self.others.swap_remove(oldest);
            }
        }
        let taken = |index: u32| self.sessions().any(|session| session.index() == index);
        let Some(index) = (base..base + SLOTS).find(|index| !taken(*index)) else { return };
        self.others.push(make(index));
        self.settle(now);
    }

    /// Makes the best session the current one: one that works, of the newest keys, made last.
    pub(crate) fn settle(&mut self, now: Instant) {
        let worth = |it: &Session| {
            let made = it.established().filter(|_| it.is_usable(now));
            (made.is_some(), it.rank(), made)
        };
        let best = self.others.iter().enumerate().max_by_key(|(_, session)| worth(session));
        if let Some((at, best)) = best
            && worth(best) > worth(&self.session)
        {
            std::mem::swap(&mut self.session, &mut self.others[at]);
        }
    }

    /// The rank of the newest keys that work: no handshake is worth making for older ones.
    pub(crate) fn newest_usable(&self, now: Instant) -> Option<u64> {
        self.sessions().filter(|session| session.is_usable(now)).map(Session::rank).max()
    }

    /// Drops the sessions of keys that are no longer accepted, but for the current one when there is
    /// no other; its keys are none that a handshake is made for.
    pub(crate) fn forget_sessions(&mut self, gone: impl Fn(&Session) -> bool, now: Instant) {
        self.others.retain(|session| !gone(session));
        if gone(&self.session) && !self.others.is_empty() {
            self.session = self.others.swap_remove(0);
            self.settle(now);
        }
    }

    /// Drops the sessions beside the current one that are over.
    pub(crate) fn retire_sessions(&mut self, now: Instant) {
        self.others.retain(|session| session.is_usable(now) || session.is_under_way());
    }

    /// When a session has something to do, and what.
    pub(crate) fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        self.sessions().filter_map(Session::poll_timeout).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{EngineKeys, MIN_SEAL_BUFFER, Peer, SessionSettings};
    use super::*;
    use crate::types::{BASE_MTU, NodeId, OverlayAddrs, SecretKey};

    fn key(number: u8) -> SecretKey {
        SecretKey::from_bytes([number; 32])
    }

    fn session(own: u8, peer: u8, index: u32, rank: u64) -> Session {
        let engine = EngineKeys::new(&key(own));
        let settings = SessionSettings::default();
        Session::new(&engine, &key(peer).public(), index, settings).with_rank(rank)
    }

    fn peer(session: Session, index: u32) -> std::sync::Arc<Peer> {
        let addrs =
            OverlayAddrs { v4: "10.77.0.9".parse().unwrap(), v6: "fd00:1:2::9".parse().unwrap() };
        Peer::new(NodeId::new(9).unwrap(), addrs, index, session)
    }

    /// Shakes hands between the sessions of `a` and `b` for these keys, but for the last step: `b`
    /// has not heard anything under the new keys yet.
    fn shake(a: &Peer, b: &Peer, keys: (u8, u8), now: Instant) {
        let (a_key, b_key) = (key(keys.0).public(), key(keys.1).public());
        let ip = "203.0.113.1".parse().unwrap();
        let (mut first, mut second) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
        let mut a = a.lock();
        let len = a.session_of(a_key, b_key).unwrap().initiate(&mut first, now).unwrap();
        let mut b = b.lock();
        let at_b = b.session_of(b_key, a_key).unwrap();
        let reply = at_b.handle_handshake(&first[..len], ip, &mut second, now).unwrap();
        let receiver = u32::from_le_bytes(second[8..12].try_into().unwrap());
        let at_a = a.session_at(receiver).unwrap();
        let len = reply.reply.unwrap();
        assert!(at_a.handle_handshake(&second[..len], ip, &mut first, now).unwrap().established);
        a.settle(now);
        b.settle(now);
    }

    /// What `a` seals for `b` under its current session, and whether `b` opens it.
    fn seal(a: &Peer, now: Instant) -> (u32, Vec<u8>) {
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[3] = 28;
        let mut out = vec![0; usize::from(BASE_MTU)];
        let len = a.lock().session.seal(&packet, &mut out, now).unwrap();
        out.truncate(len);
        (u32::from_le_bytes(out[4..8].try_into().unwrap()), out)
    }

    fn opens(b: &Peer, sealed: &(u32, Vec<u8>), now: Instant) -> bool {
        let mut out = vec![0; sealed.1.len()];
        b.lock().open(sealed.0, &sealed.1, &mut out, now).is_ok()
    }

    #[test]
    fn while_keys_change_every_packet_is_opened_in_whatever_order_it_comes() {
        let now = crate::io::clock::now();
        let (a, b) = (peer(session(1, 2, 400, 0), 400), peer(session(2, 1, 800, 0), 800));
        shake(&a, &b, (1, 2), now);
        assert!(opens(&b, &seal(&a, now), now));
        let (late_to_a, late_to_b) = (seal(&b, now), seal(&a, now));

        // The second key of b, which a has been told.
        a.lock().add_session(|index| session(1, 3, index, 1), now);
        b.lock().add_session(|index| session(3, 1, index, 1), now);
        assert_eq!(a.lock().session.peer_key(), key(2).public(), "the old one works");
        shake(&a, &b, (1, 3), now);
        assert_eq!(a.lock().session.peer_key(), key(3).public());
        assert_eq!(b.lock().session.own_key(), key(2).public(), "b does not know yet");
        let before_b_knows = seal(&b, now);
        assert!(opens(&b, &seal(&a, now), now));
        assert_eq!(b.lock().session.own_key(), key(3).public());
        assert!(opens(&a, &seal(&b, now), now));
        for (side, late) in [(&a, late_to_a), (&b, late_to_b), (&a, before_b_knows)] {
            assert!(opens(side, &late, now), "sealed under the old keys, opened after the change");
            assert!(!opens(side, &late, now), "once");
        }

        let later = now + Duration::from_secs(176);
        for side in [&a, &b] {
            side.lock().retire_sessions(later);
            assert!(side.lock().others.is_empty(), "the old session has an end");
        }
    }

    #[test]
    fn a_session_of_older_keys_never_takes_the_place_of_a_newer_one_that_works() {
        let now = crate::io::clock::now();
        let (a, b) = (peer(session(1, 2, 400, 1), 400), peer(session(2, 1, 800, 1), 800));
        shake(&a, &b, (1, 2), now);
        a.lock().add_session(|index| session(1, 3, index, 0), now);
        b.lock().add_session(|index| session(3, 1, index, 0), now);
        shake(&a, &b, (1, 3), now);
        assert_eq!(a.lock().session.peer_key(), key(2).public());
        assert_eq!(a.lock().newest_usable(now), Some(1));

        let gone = key(2).public();
        a.lock().forget_sessions(|session| session.peer_key() == gone, now);
        assert_eq!(a.lock().session.peer_key(), key(3).public(), "until its keys are taken back");
    }

    #[test]
    fn there_is_room_for_every_pair_of_two_keys_each_and_the_oldest_makes_room() {
        let now = crate::io::clock::now();
        let a = peer(session(1, 2, 403, 0), 403);
        for (own, other, rank) in [(1, 3, 1), (4, 2, 1), (4, 3, 2), (4, 5, 3)] {
            a.lock().add_session(|index| session(own, other, index, rank), now);
        }
        let mut state = a.lock();
        let mut indexes: Vec<u32> = state.sessions().map(Session::index).collect();
        indexes.sort_unstable();
        assert_eq!(indexes, [400, 401, 402, 403]);
        assert_eq!(state.session.peer_key(), key(5).public(), "of none that works, the newest");
        assert!(state.session_of(key(1).public(), key(2).public()).is_none());
        assert!(state.session_of(key(4).public(), key(3).public()).is_some());
    }
}
