//! Does what we send on a path arrive? The peer's pongs say how much of our data came by the path
//! that the ping took; what was sent before the ping and is not in there was lost.
//!
//! ```text
//!   sent so far   10        30        50        70
//!   pings            p1        p2        p3        p4
//!   arrived           10        10        10          -> what left before p2 is lost: in doubt
//! ```
//!
//! Probes alone cannot tell: a filter may let them pass and drop data, all of it or long datagrams
//! only, and in one direction. Counts are compared with a moment's grace, as a ping may overtake
//! data that was sealed and waits for its turn.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::liveness::Suspicion;
use crate::types::{SizeCounts, TxId};

/// What was sealed this long before a ping left before it.
const GRACE: Duration = Duration::from_millis(30);
/// Pings without a pong for this long (or three round trips): double the data.
const DOUBLE_AFTER: Duration = Duration::from_millis(150);
/// The same while we send more than anybody may be able to open: pings stand in the queue that
/// overflows, and are lost there like data.
const DOUBLE_FLOOD_AFTER: Duration = Duration::from_millis(400);
/// The path is asked this often while in doubt,
const ASK_SPACING: Duration = Duration::from_millis(100);
/// and in a flood.
const ASK_FLOOD_SPACING: Duration = Duration::from_millis(25);
/// So many datagrams a second are a flood, counted over
const FLOOD_PER_SECOND: u32 = 20_000;
/// at least this long.
const FLOOD_SPAN: Duration = Duration::from_millis(120);
/// Doubt that nothing ended for this long (or eight round trips): the path is dead. Little is lost
/// meanwhile, as all but the most of a fast flow is doubled.
const DEAD_AFTER: Duration = Duration::from_millis(1_000);
/// A path that carries nothing at all of a class has lost so many of it.
const DEAD_MISSING: u32 = 3;
/// Loss is counted over this time,
const LOSS_WINDOW: Duration = Duration::from_secs(3);
/// at least this long,
const LOSS_SPAN: Duration = Duration::from_millis(900);
/// and over so many datagrams.
const LOSS_DATAGRAMS: u32 = 20;
/// So much loss, in a thousand, is too much: 30 %, less what the grace hides.
const LOSSY_PERMILLE: u16 = 280;
/// A path by which so many datagrams arrive in a second is not broken but full: somebody sends more
/// than it carries, or than the peer opens. A second copy of each, by a relay that has less room,
/// would take from what arrives.
const FULL_PER_SECOND: u32 = 2_000;
/// An unanswered ping is forgotten after this.
const PING_LIFETIME: Duration = Duration::from_secs(5);
/// Moments that are remembered.
const HISTORY: usize = 64;

/// What is known of the delivery on one path.
#[derive(Debug, Default)]
pub(super) struct Delivery {
    /// What had been sent, at moments of the past.
    history: VecDeque<(Instant, SizeCounts)>,
    open: BTreeMap<TxId, Instant>,
    unanswered_since: Option<Instant>,
    asked_at: Option<Instant>,
    last: Option<SizeCounts>,
    classes: [Class; SizeCounts::CLASSES],
    window: VecDeque<(Instant, SizeCounts, SizeCounts)>,
    loss_permille: Option<u16>,
    lossy_reports: u32,
    lossy_since: Option<Instant>,
    /// What had been sent when the proof began.
    proof_from: SizeCounts,
    floods: bool,
}

/// Datagrams of about one size.
#[derive(Debug, Default, Clone, Copy)]
struct Class {
    /// What had been sent when the last one is known to have arrived.
    base: u32,
    /// When the last one arrived, so many were missing: by chance, or because the path has died.
    unsure: u32,
    /// Sent since, and known not to have arrived.
    missing: u32,
    missing_since: Option<Instant>,
    /// When more were last seen to be missing.
    grew_at: Option<Instant>,
    /// Arrived since the proof began.
    arrived: u32,
}

impl Delivery {
    /// Takes what has been sent on the path so far.
    pub(super) fn handle_sent(&mut self, sent: SizeCounts, now: Instant) {
        if self.history.back().is_some_and(|(at, _)| *at == now) {
            self.history.pop_back();
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        let long_ago = |at: Instant| now.saturating_duration_since(at) >= FLOOD_SPAN;
        if let Some((at, before)) = self.history.iter().rev().find(|(at, _)| long_ago(*at)) {
            let secs = now.saturating_duration_since(*at).as_secs_f64();
            let more = sent.since(*before).total();
            self.floods = f64::from(more) >= f64::from(FLOOD_PER_SECOND) * secs;
        }
        self.history.push_back((now, sent));
    }

    /// Whether so much is sent that pings may be lost for no other reason.
    pub(super) fn floods(&self) -> bool {
        self.floods
    }

    /// A ping leaves on the path.
    pub(super) fn handle_ping(&mut self, tx: TxId, now: Instant) {
        self.open.retain(|_, at| now.saturating_duration_since(*at) < PING_LIFETIME);
        self.open.insert(tx, now);
        self.asked_at = Some(now);
        self.unanswered_since.get_or_insert(now);
    }

    /// A pong arrived; `report` is what the peer has received, if it says so.
    pub(super) fn handle_pong(&mut self, tx: TxId, report: Option<SizeCounts>, now: Instant) {
        let Some(asked_at) = self.open.remove(&tx) else { return };
        self.open.retain(|_, at| *at > asked_at);
        self.unanswered_since = self.open.values().min().copied();
        let Some(arrived) = report else { return };
        let sent_by = |moment: Option<Instant>| {
            let before = |(at, _): &&(Instant, SizeCounts)| moment.is_some_and(|m| *at <= m);
            self.history.iter().rev().find(before).map(|(_, sent)| *sent)
        };
        let Some(at_ping) = sent_by(Some(asked_at)) else { return };
        let surely = sent_by(asked_at.checked_sub(GRACE)).unwrap_or_default();
        let Some(last) = self.last.filter(|last| arrived.since(*last).total() < u32::MAX / 2)
        else {
            // The first report, or the peer has begun to count anew.
            self.last = Some(arrived);
            for (class, sent) in self.classes.iter_mut().zip(at_ping.0) {
                *class = Class { base: sent, ..Class::default() };
            }
            self.window.clear();
            self.window.push_back((asked_at, at_ping, arrived));
            return;
        };
        self.last = Some(arrived);
        for (number, class) in self.classes.iter_mut().enumerate() {
            let more = arrived.since(last).0[number];
            class.handle_report(more, at_ping.0[number], surely.0[number], now);
        }
        self.measure_loss(asked_at, at_ping, arrived, now);
    }

    fn measure_loss(
        &mut self,
        asked_at: Instant,
        sent: SizeCounts,
        arrived: SizeCounts,
        now: Instant,
    ) {
        self.window.push_back((asked_at, sent, arrived));
        while let Some((at, ..)) = self.window.front()
            && (self.window.len() > HISTORY
                || asked_at.saturating_duration_since(*at) > LOSS_WINDOW)
        {
            self.window.pop_front();
        }
        let Some((since, sent_before, arrived_before)) = self.window.front().copied() else {
            return;
        };
        let (out, came) = (sent.since(sent_before).total(), arrived.since(arrived_before).total());
        if out < LOSS_DATAGRAMS || asked_at.saturating_duration_since(since) < LOSS_SPAN {
            // Too little for a figure; an old one has nothing to say any more.
            if out == 0 {
                self.loss_permille = None;
                (self.lossy_reports, self.lossy_since) = (0, None);
            }
            return;
        }
        let permille = permille(out.saturating_sub(came), out);
        self.loss_permille = Some(permille);
        if permille < LOSSY_PERMILLE || self.excused_permille(out) < LOSSY_PERMILLE {
            (self.lossy_reports, self.lossy_since) = (0, None);
            return;
        }
        // A burst that was sealed just before the last ping looks like loss once.
        self.lossy_reports += 1;
        if self.lossy_reports >= 2 {
            self.lossy_since.get_or_insert(now);
        }
    }

    /// The loss, of `out` datagrams, without what was lost while the path was full: between two
    /// reports, or right before and after, since nobody begins to send with a report.
    fn excused_permille(&self, out: u32) -> u16 {
        let pieces = self.window.iter().zip(self.window.iter().skip(1));
        let pieces: Vec<_> = pieces
            .map(|((since, sent_before, arrived_before), (until, sent, arrived))| {
                let out = sent.since(*sent_before).total();
                let came = arrived.since(*arrived_before).total();
                let secs = until.saturating_duration_since(*since).as_secs_f64();
                (f64::from(came) >= f64::from(FULL_PER_SECOND) * secs, out, came)
            })
            .collect();
        let is_full = |at: usize| pieces.get(at).is_some_and(|piece| piece.0);
        let lost: i64 = (0..pieces.len())
            .filter(|at| !is_full(*at) && !is_full(*at + 1) && !is_full(at.wrapping_sub(1)))
            .map(|at| i64::from(pieces[at].1) - i64::from(pieces[at].2))
            .sum();
        permille(u32::try_from(lost.max(0)).unwrap_or(u32::MAX), out)
    }

    /// How many datagrams were sent since [`Self::begin_proof`].
    pub(super) fn sent_in_proof(&self) -> u32 {
        let sent = self.history.back().map_or(SizeCounts::default(), |(_, sent)| *sent);
        sent.since(self.proof_from).total()
    }

    /// What to do, on a path of this round trip.
    pub(super) fn suspicion(&self, srtt: Duration, now: Instant) -> Suspicion {
        let dead = |since: Instant| now >= since + DEAD_AFTER.max(srtt * 8) && self.has_failed();
        if self.doubted_since(srtt, now).is_some_and(dead) {
            Suspicion::Dead
        } else if self.next_at(srtt).is_some_and(|at| at <= now) {
            Suspicion::Ask
        } else {
            Suspicion::None
        }
    }

    /// Whether enough is known to leave the path.
    fn has_failed(&self) -> bool {
        let missing = |class: usize| self.classes[class].missing >= DEAD_MISSING;
        self.unanswered_since.is_some()
            || self.lossy_since.is_some()
            || missing(SizeCounts::SHORT)
            || missing(SizeCounts::FULL)
    }

    fn doubted_since(&self, srtt: Duration, now: Instant) -> Option<Instant> {
        let patience = if self.floods { DOUBLE_FLOOD_AFTER } else { DOUBLE_AFTER }.max(srtt * 3);
        let unanswered = self.unanswered_since.filter(|since| now >= *since + patience);
        let missing = self.classes[..SizeCounts::LARGE].iter().filter_map(|it| it.missing_since);
        missing.chain(unanswered).chain(self.lossy_since).min()
    }

    /// Whether data is doubled onto another path.
    pub(super) fn wants_duplicate(&self, srtt: Duration, now: Instant) -> bool {
        let large = &self.classes[SizeCounts::LARGE];
        self.doubted_since(srtt, now).is_some() || large.missing_since.is_some()
    }

    /// Whether datagrams above the size that every path has do not arrive.
    pub(super) fn large_missing(&self) -> bool {
        self.classes[SizeCounts::LARGE].missing >= 2
    }

    /// Whether large datagrams, or full ones, do not arrive.
    pub(super) fn long_missing(&self) -> bool {
        self.large_missing() || self.classes[SizeCounts::FULL].missing >= 2
    }

    /// What was sent of large ones was too long; a new count begins.
    pub(super) fn forgive_large(&mut self) {
        let sent = self.history.back().map_or(0, |(_, sent)| sent.0[SizeCounts::LARGE]);
        self.classes[SizeCounts::LARGE] = Class { base: sent, ..Class::default() };
    }

    /// All is forgotten but how much was sent: the data plane goes on counting from there.
    pub(super) fn start_over(&mut self) {
        let last = self.history.pop_back();
        *self = Self::default();
        self.history.extend(last);
        self.begin_proof();
    }

    /// Begins to count what arrives, as a proof.
    pub(super) fn begin_proof(&mut self) {
        self.proof_from = self.history.back().map(|(_, sent)| *sent).unwrap_or_default();
        for class in &mut self.classes {
            class.arrived = 0;
        }
    }

    /// Reports since [`Self::begin_proof`] in which more had arrived, by class of length.
    pub(super) fn proofs(&self) -> u32 {
        self.classes.iter().map(|class| class.arrived).sum()
    }

    /// Whether the peer counts what arrives at all.
    pub(super) fn is_reported(&self) -> bool {
        self.last.is_some()
    }

    /// Of a thousand datagrams, so many were lost lately; none when too few were sent.
    pub(super) fn loss_permille(&self) -> Option<u16> {
        self.loss_permille
    }

    /// When the path was last asked.
    pub(super) fn asked_at(&self) -> Option<Instant> {
        self.asked_at
    }

    /// When the path is to be asked again; none while nothing is in doubt.
    pub(super) fn next_at(&self, srtt: Duration) -> Option<Instant> {
        let in_doubt = |it: &Class| it.missing_since.is_some() || it.unsure >= 2 && it.missing == 0;
        let missing = self.classes.iter().any(in_doubt);
        let spacing = if self.floods { ASK_FLOOD_SPACING } else { ASK_SPACING };
        let again = self.asked_at.map(|at| at + spacing);
        if missing || self.lossy_since.is_some() {
            return again;
        }
        let patience = spacing.max(srtt * 3 / 2);
        self.unanswered_since
            .map(|since| again.map_or(since + patience, |at| at.max(since + patience)))
    }
}

fn permille(part: u32, all: u32) -> u16 {
    u16::try_from(u64::from(part) * 1_000 / u64::from(all.max(1))).unwrap_or(1_000)
}

impl Class {
    fn handle_report(&mut self, more: u32, at_ping: u32, surely: u32, now: Instant) {
        // What is known to have left may be less than what the base counted.
        let open = Some(surely.wrapping_sub(self.base)).filter(|open| *open < u32::MAX / 2);
        let open = open.unwrap_or_default();
        if more > 0 {
            // Some arrived; were they the first ones, and none after them? The next report tells.
            let unsure = open.saturating_sub(more);
            *self = Self { base: at_ping, unsure, arrived: self.arrived + 1, ..Self::default() };
            return;
        }
        // Without anything new, what was lost before says nothing about this moment.
        let missing = if open == 0 { 0 } else { self.unsure.saturating_add(open) };
        if missing > self.missing {
            self.missing = missing;
            self.missing_since.get_or_insert(now);
            self.grew_at = Some(now);
        } else if self.grew_at.is_some_and(|at| now.saturating_duration_since(at) >= DEAD_AFTER) {
            // Nothing more of this size is sent: a loss of one moment proves nothing about this one.
            *self = Self { base: at_ping, arrived: self.arrived, ..Self::default() };
        }
    }
}

#[cfg(test)]
mod tests;
