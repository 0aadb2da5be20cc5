//! When an initiation is sent, and sent again.
//!
//! Two initiations may cross: both are answered, and each side has keys one round trip after its own
//! has left. The engine remembers two states of a handshake, and whatever is sent or answered after
//! that pushes one out: an initiation of ours whose answer is on its way would be forgotten. So who has
//! just answered one sends none before the peer had the time to use the answer, whatever else happens.
//! When the answer is lost it is the peer who asks again, and after a while we do.

use std::time::{Duration, Instant};

/// The initiator confirms a new session with its next packet, one round trip after our answer.
const CONFIRM_PATIENCE: Duration = Duration::from_millis(1_500);
/// The same when an initiation of ours is under way as well: its answer comes within this.
const CROSSING_PATIENCE: Duration = Duration::from_millis(500);
/// Waits before a handshake initiation is repeated; the last one repeats.
const RETRY: [Duration; 5] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];

/// A handshake under way, from whichever side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt {
    next_at: Instant,
    tries: usize,
    /// The peer has an answer of ours since we last sent an initiation.
    answered: bool,
}

impl Attempt {
    /// An initiation leaves; `before` is the attempt that it belongs to.
    pub(super) fn after_initiation(before: Option<Self>, now: Instant) -> Self {
        let tries = before.filter(|it| !it.answered).map_or(0, |it| it.tries + 1);
        Self { next_at: now + RETRY[tries.min(RETRY.len() - 1)], tries, answered: false }
    }

    /// An initiation of the peer was answered.
    pub(super) fn after_answer(before: Option<Self>, now: Instant) -> Self {
        let latest = now + CONFIRM_PATIENCE;
        match before {
            // One that is repeated gains no time: perhaps none of our answers arrives.
            Some(before) if before.answered => before,
            Some(Self { next_at, tries, .. }) => {
                let next_at = next_at.clamp(now + CROSSING_PATIENCE, latest);
                Self { next_at, tries, answered: true }
            }
            None => Self { next_at: latest, tries: 0, answered: true },
        }
    }

    /// There is a new path: an initiation of ours that left by another one is sent again at once.
    pub(super) fn hurried(self, now: Instant) -> Self {
        if self.answered { self } else { Self { next_at: now, tries: 0, answered: false } }
    }

    /// When an initiation is due.
    pub(super) fn next_at(self) -> Instant {
        self.next_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn initiations_are_repeated_ever_more_rarely_and_at_once_on_a_new_path() {
        let mut now = epoch();
        let mut attempt = None;
        let mut waits = Vec::new();
        for _ in 0..6 {
            let next = Attempt::after_initiation(attempt, now);
            waits.push((next.next_at() - now).as_millis());
            now = next.next_at();
            attempt = Some(next);
        }
        assert_eq!(waits, [250, 500, 1_000, 2_000, 5_000, 5_000]);
        let hurried = attempt.map(|it| it.hurried(now + MS)).unwrap();
        assert_eq!(hurried.next_at(), now + MS);
        assert_eq!(Attempt::after_initiation(Some(hurried), now).next_at(), now + 500 * MS);
    }

    #[test]
    fn who_has_answered_sends_no_initiation_on_a_new_path_and_one_when_nothing_comes() {
        let now = epoch();
        let answered = Attempt::after_answer(None, now);
        assert_eq!(answered.hurried(now + 3 * MS).next_at(), now + CONFIRM_PATIENCE);
        let again = Attempt::after_answer(Some(answered), now + 250 * MS);
        assert_eq!(again.next_at(), now + CONFIRM_PATIENCE, "its turn is not put off");
        let ours = Attempt::after_initiation(Some(again), again.next_at());
        assert_eq!(ours.next_at() - again.next_at(), RETRY[0]);
        assert_eq!(ours.hurried(now).next_at(), now);
    }

    #[test]
    fn initiations_that_cross_leave_each_other_the_time_of_a_round_trip() {
        let now = epoch();
        let ours = Attempt::after_initiation(None, now);
        let crossed = Attempt::after_answer(Some(ours), now + 200 * MS);
        assert_eq!(crossed.next_at(), now + 200 * MS + CROSSING_PATIENCE);
        // One that had waited for long asks sooner than it would have.
        let mut late = ours;
        for _ in 0..6 {
            late = Attempt::after_initiation(Some(late), now);
        }
        let crossed = Attempt::after_answer(Some(late), now);
        assert_eq!(crossed.next_at(), now + CONFIRM_PATIENCE);
    }
}
