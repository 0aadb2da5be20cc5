//! Is the direct path still alive? Told by what is heard while we send, never by probes alone.
//!
//! ```text
//! calm --sent, nothing heard--> waiting --100 ms--> asking --200 ms--> doubling --800 ms--> dead
//!   ^                              |                  |                   |
//!   +---------- heard -------------+------------------+-------------------+
//! ```
//!
//! Traffic that has no answers of its own is asked about all the time; a path that answers the
//! question never gets as far as doubling.

use std::time::{Duration, Instant};

/// Sent something and heard nothing for this long (or two round trips): ask.
const ASK_AFTER: Duration = Duration::from_millis(100);
/// Asked, and heard nothing (or four round trips): double the data.
const DOUBLE_AFTER: Duration = Duration::from_millis(200);
/// The same in a flood, in which questions and answers are lost like data.
const DOUBLE_FLOOD_AFTER: Duration = Duration::from_millis(400);
/// Heard nothing for this long (or six round trips): the path is dead. A second is what a user
/// may lose; the traffic tick and the switch need the rest.
const DEAD_AFTER: Duration = Duration::from_millis(800);
/// The path is asked this often while in doubt.
const ASK_SPACING: Duration = Duration::from_millis(100);

/// What to do about the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Suspicion {
    /// All is well.
    None,
    /// Not long enough to act.
    Waiting,
    /// Ping it now.
    Ask,
    /// Leave it.
    Dead,
}

/// How much we doubt the primary.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    waiting_since: Option<Instant>,
    asked_at: Option<Instant>,
    limits: Option<(Instant, Instant)>,
    doubled: bool,
}

impl Doubt {
    /// Takes when data was last sent, and anything last heard.
    pub(super) fn handle_traffic(
        &mut self,
        sent: Option<Instant>,
        heard: Option<Instant>,
        now: Instant,
    ) {
        if let (Some(since), Some(heard)) = (self.waiting_since, heard)
            && heard >= since
        {
            *self = Self::default();
        }
        if self.waiting_since.is_none() && sent > heard && sent.is_some() {
            self.waiting_since = Some(now);
        }
    }

    /// A keepalive ping left: it wants an answer like data does.
    pub(super) fn handle_keepalive(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    /// The peer says that it is elsewhere now.
    pub(super) fn handle_moved(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
        self.doubled = true;
    }

    /// Whether the path was asked and has not answered.
    pub(super) fn is_asking(&self) -> bool {
        self.asked_at.is_some()
    }

    /// Since when an answer is waited for, if so long that data is doubled.
    pub(super) fn doubled_since(&self) -> Option<Instant> {
        self.waiting_since.filter(|_| self.doubled)
    }

    /// Something authenticated arrived on the primary.
    pub(super) fn handle_heard(&mut self) {
        *self = Self::default();
    }

    /// A ping left because of [`Suspicion::Ask`].
    pub(super) fn handle_asked(&mut self, now: Instant) {
        self.asked_at = Some(now);
    }

    /// What to do, on a path of this round trip; `floods` when we send more than it may carry.
    pub(super) fn suspicion(&mut self, srtt: Duration, floods: bool, now: Instant) -> Suspicion {
        let Some(since) = self.waiting_since else { return Suspicion::None };
        let ask_at = since + ASK_AFTER.max(srtt * 2);
        let dead_at = since + DEAD_AFTER.max(srtt * 6);
        self.limits = Some((ask_at, dead_at));
        let double_after = if floods { DOUBLE_FLOOD_AFTER } else { DOUBLE_AFTER };
        self.doubled |= now >= since + double_after.max(srtt * 4);
        if now >= dead_at {
            Suspicion::Dead
        } else if now < ask_at {
            Suspicion::Waiting
        } else if self.asked_at.is_none_or(|at| now >= at + ASK_SPACING) {
            Suspicion::Ask
        } else {
            Suspicion::Waiting
        }
    }

    /// Whether data is doubled onto the relay.
    pub(super) fn wants_duplicate(&self) -> bool {
        self.doubled
    }

    /// Whether there is no doubt at all.
    pub(super) fn is_calm(&self) -> bool {
        self.waiting_since.is_none()
    }

    /// When [`Self::suspicion`] changes its answer.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let since = self.waiting_since?;
        let (ask_at, dead_at) = self.limits.unwrap_or((since + ASK_AFTER, since + DEAD_AFTER));
        Some(match self.asked_at {
            None => ask_at,
            Some(at) => (at + ASK_SPACING).min(dead_at),
        })
    }
}
