//! The state of one peer that packets touch: session, path, counters.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::path_counts::PathCounts;
use super::session::Session;
use crate::path::{Choice, EARLY_BYTES, UNDERLAY_BYTES, Via};
use crate::policy::Flows;
use crate::types::{Account, BASE_MTU, DropCounters, DropReason, NodeId, OverlayAddrs, Rate};

/// Packets that wait for a session, per peer: one TCP window's worth of a handshake's time.
const MAX_PENDING: usize = 64;
/// A packet that waited for longer is of no use to its program any more.
const PENDING_LIFETIME: Duration = Duration::from_secs(3);

/// Answers to a peer's packets that go no further, or to our own for it: one for every flow of a busy
/// machine at once, and then so many in a second (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4 f).
const ANSWERS: Rate = Rate::per_second(50, 16);
/// Packets that are doubled onto another path: 110 Mb/s of full ones. With all of a faster flow a relay
/// would drown, and the flow slows down by itself if its path has failed.
const COPIES: Rate = Rate::per_second(10_000, 1_000);
/// So many of them are left for packets up to this length: what somebody waits for.
const SHORT_COPIES: u32 = 500;
const SHORT: usize = 256;

/// A packet by another way than the primary is news once in this time,
const HEARD_SPACING: Duration = Duration::from_millis(20);
/// and by yet another way after this.
const HEARD_ELSEWHERE_SPACING: Duration = Duration::from_millis(1);

/// What the data plane counts per peer.
#[derive(Debug, Default)]
pub struct PeerCounters {
    /// Inner bytes sent.
    pub tx_bytes: AtomicU64,
    /// Inner bytes received.
    pub rx_bytes: AtomicU64,
    /// Stamp of the last inner packet sent.
    pub last_sent: AtomicU64,
    /// Stamp of the last authenticated data on the primary path.
    pub last_heard_primary: AtomicU64,
    /// Stamp of the last authenticated data on any path.
    pub last_heard: AtomicU64,
    /// Inner packets that were longer than the path carries uncut, and told so to their sender.
    pub too_big: AtomicU64,
}

/// What stands behind the lock of one lane with a peer (see `lanes`).
#[derive(Debug)]
pub struct PeerState {
    /// The WireGuard session that data leaves under.
    pub session: Session,
    /// Those of other keys, while some are renewed.
    pub(super) others: Vec<Session>,
    pending: VecDeque<(Instant, Vec<u8>)>,
}

/// What both lanes with a peer write down. Locked for a moment, also while a lane is; never the other
/// way round.
#[derive(Debug, Default)]
pub struct Records {
    /// Data sent, by path.
    pub sent: PathCounts,
    /// Data that arrived, by path.
    pub arrived: PathCounts,
    /// Flows with the peer, as far as access rules need to know them.
    pub(super) flows: Flows,
    answers: Account,
    copies: Account,
    /// The last packet by another way than the primary that the control plane heard of.
    heard: Option<(Via, Instant)>,
}

impl Records {
    /// Whether one more answer may be given.
    pub(super) fn may_answer(&mut self, now: Instant) -> bool {
        self.answers.take(ANSWERS, 1, now)
    }

    /// Whether the control plane is to hear of a packet that came by another way than the primary.
    pub(super) fn may_note_heard(&mut self, via: Via, now: Instant) -> bool {
        let is_news = self.heard.is_none_or(|(before, at)| {
            let spacing = if before == via { HEARD_SPACING } else { HEARD_ELSEWHERE_SPACING };
            now.saturating_duration_since(at) >= spacing
        });
        if is_news {
            self.heard = Some((via, now));
        }
        is_news
    }

    /// Whether a packet of this length may be doubled.
    pub(super) fn may_copy(&mut self, len: usize, now: Instant) -> bool {
        let left = if len > SHORT { SHORT_COPIES } else { 0 };
        self.copies.has(COPIES, 1 + left, now) && self.copies.take(COPIES, 1, now)
    }
}

/// A peer's state while its lock is held.
pub type LockedPeer<'a> = MutexGuard<'a, PeerState>;

/// One peer, as packets see it.
#[derive(Debug)]
pub struct Peer {
    /// The peer's id.
    pub id: NodeId,
    /// Its overlay addresses: what it may send from, and what is routed to it.
    pub addrs: OverlayAddrs,
    /// Our receiver index for its sessions (24 bits, of which the lowest three tell them apart).
    pub index: u32,
    /// Counters and stamps.
    pub counters: PeerCounters,
    choice: ArcSwap<Choice>,
    /// Bytes that may still go to an endpoint which has not answered yet.
    early_left: AtomicU32,
    /// Longest inner packet that the path carries uncut.
    mtu: AtomicU16,
    /// Whether what is longer goes by the control connection.
    long_by_link: AtomicBool,
    session_wanted: AtomicBool,
    first: Mutex<PeerState>,
    /// The second lane, once there was one. Boxed: few peers ever have it.
    second: OnceLock<Box<Mutex<PeerState>>>,
    /// Whether what leaves is sealed on the second lane.
    pub(super) seals_second: AtomicBool,
    records: Mutex<Records>,
}

impl Peer {
    /// A peer without a path.
    #[must_use]
    pub fn new(id: NodeId, addrs: OverlayAddrs, index: u32, session: Session) -> Arc<Self> {
        Arc::new(Self {
            id,
            addrs,
            index,
            counters: PeerCounters::default(),
            choice: ArcSwap::from_pointee(Choice::default()),
            early_left: AtomicU32::new(0),
            mtu: AtomicU16::new(BASE_MTU),
            long_by_link: AtomicBool::new(false),
            session_wanted: AtomicBool::new(false),
            first: Mutex::new(PeerState::new(session)),
            second: OnceLock::new(),
            seals_second: AtomicBool::new(false),
            records: Mutex::default(),
        })
    }

    /// Takes the lock of the peer's first lane: once per run of packets, never while holding one of
    /// another peer. Who holds the second lane's of this peer may take the first one's as well, and
    /// never the other way round.
    pub fn lock(&self) -> LockedPeer<'_> {
        // A panic while holding it can only come from the crypto library refusing a buffer; the
        // state behind it is whole.
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock of the second lane, if there is one; by the rules of [`Self::lock`].
    pub fn lock_second(&self) -> Option<LockedPeer<'_>> {
        Some(self.second.get()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the lock of the second lane, and makes it with this session if there is none yet.
    pub(super) fn second_or(&self, make: impl FnOnce() -> Session) -> LockedPeer<'_> {
        let new = || Box::new(Mutex::new(PeerState::new(make())));
        self.second.get_or_init(new).lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is written down about the peer; let go of at once.
    pub fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of this moment.
    #[must_use]
    pub fn choice(&self) -> Choice {
        **self.choice.load()
    }

    /// Sets the path.
    pub fn set_choice(&self, choice: Choice) {
        let before = self.choice();
        if before != choice {
            if choice.early && !before.early {
                self.early_left.store(EARLY_BYTES, Ordering::Relaxed);
            }
            self.choice.store(Arc::new(choice));
        }
    }

    /// Whether a datagram of so many bytes more may go to an endpoint that has not answered yet.
    pub(super) fn spend_early(&self, bytes: usize) -> bool {
        let spend = |left: u32| left.checked_sub(u32::try_from(bytes).ok()? + UNDERLAY_BYTES);
        self.early_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }

    /// The longest inner packet that the path of this moment carries uncut, in bytes.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu.load(Ordering::Relaxed)
    }

    /// Sets it; returns whether it was another.
    pub fn set_mtu(&self, mtu: u16) -> bool {
        self.mtu.swap(mtu, Ordering::Relaxed) != mtu
    }

    /// Sets whether what is longer than the UDP relay carries goes by the control connection.
    pub fn set_long_by_link(&self, by_link: bool) {
        self.long_by_link.store(by_link, Ordering::Relaxed);
    }

    /// The length of the longest inner packet that goes by the UDP relay, if longer ones go another way.
    pub(super) fn long_from(&self) -> Option<usize> {
        self.long_by_link.load(Ordering::Relaxed).then(|| self.mtu().into())
    }

    /// Whether the control plane has still to be told that a session is wanted.
    pub(super) fn ask_for_session(&self) -> bool {
        !self.session_wanted.swap(true, Ordering::Relaxed)
    }

    /// The control plane has heard: the next packet without a session may ask again.
    pub fn session_request_heard(&self) {
        self.session_wanted.store(false, Ordering::Relaxed);
    }
}

impl PeerState {
    pub(super) fn new(session: Session) -> Self {
        Self { session, others: Vec::new(), pending: VecDeque::new() }
    }

    /// Keeps a packet until there is a session; the oldest makes room.
    pub(super) fn keep(&mut self, packet: &[u8], drops: &DropCounters, now: Instant) {
        if self.pending.len() >= MAX_PENDING {
            self.pending.pop_front();
            drops.count(DropReason::QueueFull);
        }
        self.pending.push_back((now, packet.to_vec()));
    }

    /// How many packets wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pending.len()
    }

    /// Takes the oldest packet that is still worth sending.
    pub(super) fn take_pending(&mut self, drops: &DropCounters, now: Instant) -> Option<Vec<u8>> {
        while let Some((at, packet)) = self.pending.pop_front() {
            if now.saturating_duration_since(at) <= PENDING_LIFETIME {
                return Some(packet);
            }
            drops.count(DropReason::NoPath);
        }
        None
    }

    /// Takes all packets that have waited at least since `since`.
    pub(crate) fn take_waiting(&mut self, since: Instant) -> Vec<Vec<u8>> {
        let waiting = self.pending.iter().take_while(|(at, _)| *at <= since).count();
        self.pending.drain(..waiting).map(|(_, packet)| packet).collect()
    }

    /// Since when the oldest packet waits.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        self.pending.front().map(|(at, _)| *at)
    }

    /// Drops the packets that waited for too long; tells whether any still wait.
    pub fn expire_pending(&mut self, drops: &DropCounters, now: Instant) -> bool {
        while let Some((at, _)) = self.pending.front()
            && now.saturating_duration_since(*at) > PENDING_LIFETIME
        {
            self.pending.pop_front();
            drops.count(DropReason::NoPath);
        }
        !self.pending.is_empty()
    }
}
