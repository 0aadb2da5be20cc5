//! Questions to the server by one uplink: where does it see the socket?

use std::time::{Duration, Instant};

use super::relay::RETRY;
use crate::types::TxId;

/// Questions that may be answered late.
const ANSWERABLE: usize = 4;

/// Questions to the server by one line.
#[derive(Debug, Default)]
pub(super) struct Asks {
    open: Vec<(TxId, Instant)>,
    pub(super) unanswered: usize,
    pub(super) next_at: Option<Instant>,
    pub(super) answered_at: Option<Instant>,
    /// When the question was asked that was answered last.
    pub(super) answer_to: Option<Instant>,
    /// Since when each question is answered.
    pub(super) good_since: Option<Instant>,
    pub(super) rtt: Option<Duration>,
}

impl Asks {
    pub(super) fn start(at: Instant) -> Self {
        Self { next_at: Some(at), ..Self::default() }
    }

    /// Asks now, and again soon if no answer comes.
    pub(super) fn hurry(&mut self, now: Instant) {
        (self.unanswered, self.next_at) = (0, Some(now));
    }

    /// The question that is due.
    pub(super) fn take_due(&mut self, tx: TxId, now: Instant) -> Option<TxId> {
        if self.next_at.is_none_or(|at| at > now) {
            return None;
        }
        if self.unanswered >= 2 {
            self.good_since = None;
        }
        if self.open.len() >= ANSWERABLE {
            self.open.remove(0);
        }
        self.open.push((tx, now));
        self.next_at = Some(now + RETRY[self.unanswered.min(RETRY.len() - 1)]);
        self.unanswered += 1;
        Some(tx)
    }

    pub(super) fn handle_answer(&mut self, tx: TxId, again: Duration, now: Instant) -> bool {
        let Some(place) = self.open.iter().position(|(asked, _)| *asked == tx) else {
            return false;
        };
        let (_, asked_at) = self.open[place];
        self.open.drain(..=place);
        self.rtt = Some(now.saturating_duration_since(asked_at));
        self.answered_at = Some(now);
        self.answer_to = Some(asked_at);
        self.good_since.get_or_insert(now);
        self.unanswered = 0;
        self.next_at = Some(now + again);
        true
    }

    /// Whether a question was answered that was asked after this.
    pub(super) fn answers_since(&self, then: Instant) -> bool {
        self.answer_to.is_some_and(|at| at >= then)
    }

    /// When the first question since then was asked that no answer has come to.
    pub(super) fn owes_since(&self, then: Instant) -> Option<Instant> {
        self.open.iter().map(|(_, at)| *at).find(|at| *at >= then)
    }
}
