//! When to probe one endpoint, which answers count, and how long the round trip is.
//!
//! Knows nothing of candidates' origin or of other paths: the agent owns one [`Prober`] for each
//! endpoint and one for the relay.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::types::TxId;

/// When the pings of a round are sent, in milliseconds from its start. The close ones at the front
/// meet the peer's own first ping inside one round trip; the late ones survive loss and a peer
/// that starts later. Ten silent ones are proof enough.
const ROUND_MS: [u64; 10] = [0, 40, 100, 200, 400, 800, 1_400, 2_000, 3_000, 4_500];

/// Pings to a guessed endpoint: each opens our NAT for what the peer sends from there, and the
/// peer goes on sending.
const GUESS_STEPS: usize = 3;

/// An unanswered ping is forgotten after this: longer than any sane round trip.
const PING_LIFETIME: Duration = Duration::from_secs(5);

/// How an endpoint answered so far; for `why` and `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// Not yet probed.
    Untried,
    /// Pings are under way.
    Probing,
    /// A pong came back.
    Answered,
    /// A whole round was silent.
    Silent,
}

/// What is due on an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// A ping that dies on the way: it opens our NAT and does not reach the peer's.
    Opener,
    /// A ping.
    Ping,
}

/// Schedules the pings to one endpoint and measures their round trips.
#[derive(Debug, Default)]
pub(crate) struct Prober {
    opener_at: Option<Instant>,
    /// Pings in a round; none for all that there are.
    steps: Option<usize>,
    /// The round is one ping.
    is_single: bool,
    round_start: Option<Instant>,
    next_step: usize,
    in_flight: BTreeMap<TxId, Instant>,
    last_sent: Option<Instant>,
    last_pong: Option<Instant>,
    srtt: Option<Duration>,
    sent_pings: u32,
}

impl Prober {
    /// Starts a round of pings, from its first step.
    pub(crate) fn start_round(&mut self, now: Instant) {
        self.opener_at = None;
        self.round_start = Some(now);
        self.next_step = 0;
        self.is_single = false;
    }

    /// Starts a round of one ping.
    pub(crate) fn start_single(&mut self, now: Instant) {
        self.start_round(now);
        self.is_single = true;
    }

    /// Starts a round with an opener now and the first ping after `hold`; without a hold there is
    /// nothing to open ahead of.
    pub(crate) fn start_held_round(&mut self, hold: Duration, now: Instant) {
        self.start_round(now + hold);
        self.opener_at = (!hold.is_zero()).then_some(now);
    }

    /// What was proved does not count any more; an answer that is under way will.
    pub(crate) fn prove_again(&mut self, now: Instant) {
        self.last_pong = None;
        self.start_round(now);
    }

    /// A guess among many: a round of a few pings, for one of the others may be right.
    pub(crate) fn for_guess() -> Self {
        Self { steps: Some(GUESS_STEPS), ..Self::default() }
    }

    /// Whether the pings of the round still wait for the peer to open its NAT.
    pub(crate) fn is_held(&self, now: Instant) -> bool {
        self.next_step == 0 && self.round_start.is_some_and(|start| start > now)
    }

    /// Ends the round: the endpoint answered, or nobody cares any more.
    pub(crate) fn stop_round(&mut self) {
        self.opener_at = None;
        self.round_start = None;
    }

    pub(crate) fn in_round(&self) -> bool {
        self.round_start.is_some()
    }

    /// When something of the round is due.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        let start = self.round_start?;
        if self.opener_at.is_some() {
            return self.opener_at;
        }
        let step =
            ROUND_MS.get(self.next_step).copied().unwrap_or(ROUND_MS[ROUND_MS.len() - 1] + 500);
        Some(start + Duration::from_millis(step))
    }

    /// What of the round is due; goes on to the next step.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Due> {
        if self.next_at().is_none_or(|at| at > now) {
            return None;
        }
        if self.opener_at.take().is_some() {
            return Some(Due::Opener);
        }
        let steps = if self.is_single { 1 } else { self.steps.unwrap_or(ROUND_MS.len()) };
        if self.next_step >= steps {
            self.round_start = None;
            return None;
        }
        // Who comes late sends one ping for all the steps that were missed.
        self.next_step += 1;
        while self.next_step < steps && self.next_at().is_some_and(|at| at <= now) {
            self.next_step += 1;
        }
        Some(Due::Ping)
    }

    /// Records that ping `tx` was sent, by whatever cause.
    pub(crate) fn sent(&mut self, tx: TxId, now: Instant) {
        self.in_flight.retain(|_, at| now.saturating_duration_since(*at) < PING_LIFETIME);
        self.in_flight.insert(tx, now);
        self.last_sent = Some(now);
        self.sent_pings = self.sent_pings.saturating_add(1);
    }

    /// The round trip if `tx` is an open ping of this endpoint; a stranger's pong is nothing.
    pub(crate) fn handle_pong(&mut self, tx: TxId, now: Instant) -> Option<Duration> {
        let sent_at = self.in_flight.remove(&tx)?;
        let rtt = now.saturating_duration_since(sent_at);
        // RFC 6298 section 2.3, with alpha 1/4: few samples come, so each counts for more.
        self.srtt = Some(self.srtt.map_or(rtt, |srtt| (srtt * 3 + rtt) / 4));
        self.last_pong = Some(now);
        self.stop_round();
        Some(rtt)
    }

    /// Records that opener `tx` was sent: it may be answered, but nothing has reached the peer.
    pub(crate) fn opened(&mut self, tx: TxId, now: Instant) {
        self.in_flight.insert(tx, now);
        self.sent_pings = self.sent_pings.saturating_add(1);
    }

    pub(crate) fn last_sent(&self) -> Option<Instant> {
        self.last_sent
    }

    pub(crate) fn last_pong(&self) -> Option<Instant> {
        self.last_pong
    }

    /// The smoothed round trip.
    pub(crate) fn srtt(&self) -> Option<Duration> {
        self.srtt
    }

    pub(crate) fn sent_pings(&self) -> u32 {
        self.sent_pings
    }

    /// Forgets what was proved: the network changed under it.
    pub(crate) fn forget(&mut self) {
        *self = Self { sent_pings: self.sent_pings, steps: self.steps, ..Self::default() };
    }

    pub(crate) fn outcome(&self) -> ProbeOutcome {
        if self.last_pong.is_some() {
            ProbeOutcome::Answered
        } else if self.in_round() {
            ProbeOutcome::Probing
        } else if self.sent_pings > 0 {
            ProbeOutcome::Silent
        } else {
            ProbeOutcome::Untried
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    fn tx(number: u8) -> TxId {
        TxId([number; 12])
    }

    #[test]
    fn a_silent_endpoint_goes_quiet_after_its_round() {
        let mut prober = Prober::default();
        prober.start_round(epoch());
        let mut sent = 0;
        while let Some(at) = prober.next_at() {
            if prober.take_due(at).is_some() {
                prober.sent(tx(sent), at);
                sent += 1;
            }
        }
        assert_eq!(usize::from(sent), ROUND_MS.len(), "the ladder, and not one ping more");
        assert_eq!(prober.outcome(), ProbeOutcome::Silent);
    }

    #[test]
    fn who_comes_late_sends_one_ping_for_all_that_were_missed() {
        let mut prober = Prober::default();
        prober.start_round(epoch());
        let late = epoch() + Duration::from_millis(450);
        assert_eq!(prober.take_due(late), Some(Due::Ping));
        assert_eq!(prober.take_due(late), None);
        assert_eq!(prober.next_at(), Some(epoch() + Duration::from_millis(800)));
        let end = epoch() + Duration::from_secs(60);
        assert_eq!((prober.take_due(end), prober.take_due(end)), (Some(Due::Ping), None));
        assert!(!prober.in_round());
    }

    #[test]
    fn a_held_round_opens_first_and_pings_when_the_hold_is_over() {
        let now = epoch();
        let hold = Duration::from_millis(30);
        let mut prober = Prober::default();
        prober.start_held_round(hold, now);
        assert_eq!(prober.take_due(now), Some(Due::Opener));
        assert!(prober.is_held(now));
        assert_eq!((prober.take_due(now), prober.next_at()), (None, Some(now + hold)));
        assert_eq!(prober.take_due(now + hold), Some(Due::Ping));
        assert!(!prober.is_held(now + hold));
        prober.start_held_round(Duration::ZERO, now);
        assert_eq!(prober.take_due(now), Some(Due::Ping), "no hold, no opener");
    }

    #[test]
    fn an_answer_ends_the_round_and_gives_the_round_trip() {
        let now = epoch();
        let mut prober = Prober::default();
        prober.start_round(now);
        assert_eq!(prober.take_due(now), Some(Due::Ping));
        prober.sent(tx(1), now);
        let later = now + Duration::from_millis(30);
        assert_eq!(prober.handle_pong(tx(2), later), None, "a stranger's pong is nothing");
        assert_eq!(prober.handle_pong(tx(1), later), Some(Duration::from_millis(30)));
        assert_eq!(prober.handle_pong(tx(1), later), None, "a pong counts once");
        assert!(!prober.in_round());
        assert_eq!(prober.srtt(), Some(Duration::from_millis(30)));
    }
}
