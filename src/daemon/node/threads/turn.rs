//! When a packet thread runs: ahead of ordinary programs, as the kernel's own network code does, but
//! not for ever.
//!
//! A packet that wakes a thread on a busy machine waits until a program has used up its turn, at each
//! end: that is most of a round trip under load. So the threads ask for real-time scheduling, of the
//! lowest priority. In a flood that would leave a machine with two processors nothing for anything
//! else, so whoever works for long without a pause is an ordinary thread now and then. And while little
//! goes on they are ordinary threads, too: those the kernel wakes beside the one that woke them, on a
//! processor that is awake, and the others where they slept, which makes a lone packet late. Nor do they
//! go ahead of a program that sends packet after packet: it would be stopped for each of them, and
//! none could be moved together.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::place::{Place, Places};
use crate::io::sched;

/// A wait this long was a pause: others could run.
const PAUSE: Duration = Duration::from_micros(50);
/// A wait this long was a rest: little goes on.
const REST: Duration = Duration::from_millis(2);
/// Much goes on after so many waits without a rest.
const BUSY: u32 = 8;
/// Work this short, without a pause before the next, was for a packet or two:
const HASTE: Duration = Duration::from_micros(20);
/// so often, and it is a program's that should not be stopped each time,
const HASTY: u32 = 128;
/// for so long.
const PATIENCE: Duration = Duration::from_millis(100);
/// Without a pause, so long ahead of the others,
const AHEAD: Duration = Duration::from_millis(20);
/// and so long among them.
const AMONG: Duration = Duration::from_millis(2);

/// How the calling thread is scheduled.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    /// None when it is not allowed, or not wanted.
    state: Option<State>,
    /// Only who runs ahead can stay somewhere: there is nobody who might be in the way.
    place: Option<Place>,
    /// How many threads run ahead, this one included as long as it does.
    ahead: &'a AtomicUsize,
}

#[derive(Debug, Clone, Copy)]
struct State {
    ahead: bool,
    since: Instant,
    /// Waits since the last rest.
    waits: u32,
    /// Short works more than long ones.
    hasty: u32,
    /// When the last wait ended.
    woken: Instant,
    /// Not ahead before.
    among_until: Instant,
}

impl State {
    fn new(now: Instant) -> Self {
        let (ahead, waits, hasty) = (true, 0, 0);
        Self { ahead, since: now, waits, hasty, woken: now, among_until: now }
    }

    /// Takes when the thread has waited for work; tells what it is to be from here on, if that is
    /// something else.
    fn waited(&mut self, from: Instant, until: Instant) -> Option<bool> {
        let waited = until.saturating_duration_since(from);
        let (rested, paused) = (waited >= REST, waited >= PAUSE);
        self.waits = if rested { 0 } else { self.waits.saturating_add(1) };
        let worked = from.saturating_duration_since(self.woken);
        self.woken = until;
        let hasty = !paused && worked < HASTE;
        self.hasty = if hasty { self.hasty + 1 } else { self.hasty.saturating_sub(1) };
        if self.hasty >= HASTY {
            (self.hasty, self.among_until) = (0, until + PATIENCE);
        }
        if paused {
            self.since = until;
        }
        let limit = if self.ahead { AHEAD } else { AMONG };
        let is_over = until.saturating_duration_since(self.since) >= limit;
        let ahead = if self.ahead {
            !rested && !is_over && until >= self.among_until
        } else {
            self.waits >= BUSY && (paused || is_over) && until >= self.among_until
        };
        if ahead == self.ahead {
            return None;
        }
        (self.ahead, self.since) = (ahead, until);
        Some(ahead)
    }
}

impl<'a> Turn<'a> {
    /// Asks for the calling thread, number 0 or 1, if that is wanted. While it is granted, the thread
    /// is one of those that are `ahead`.
    pub(super) fn new(wanted: bool, thread: usize, ahead: &'a AtomicUsize, now: Instant) -> Self {
        // With a single processor there is none left for whoever is not ahead.
        let others = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        let granted = wanted && others && sched::run_ahead(true).is_ok();
        let place = granted.then(|| Place::new(thread, now));
        ahead.fetch_add(granted.into(), Ordering::Relaxed);
        let mut turn = Self { state: granted.then(|| State::new(now)), place, ahead };
        turn.take_turn(now, now + REST, sched::run_ahead);
        turn
    }

    /// The thread has waited for work.
    pub(super) fn waited(&mut self, places: &Places, from: Instant, until: Instant) {
        self.take_turn(from, until, sched::run_ahead);
        if let Some(place) = &mut self.place
            && let Err(error) = place.look(places, until)
        {
            tracing::debug!(%error, "the packet thread cannot stay on a processor");
            self.place = None;
        }
    }

    fn take_turn(
        &mut self,
        from: Instant,
        until: Instant,
        run_ahead: impl FnOnce(bool) -> io::Result<()>,
    ) {
        let Some(state) = &mut self.state else { return };
        if let Some(ahead) = state.waited(from, until)
            && let Err(error) = run_ahead(ahead)
        {
            tracing::warn!(%error, ahead, "the packet thread cannot be scheduled anew");
            self.state = None;
            self.ahead.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn who_works_without_a_pause_lets_the_others_have_their_turn() {
        let mut now = epoch();
        let mut state = State { waits: BUSY, ..State::new(now) };
        let mut among = Duration::ZERO;
        for _ in 0..10_000 {
            let before = now;
            now += 100 * US;
            among += if state.ahead { Duration::ZERO } else { now - before };
            state.waited(now, now);
        }
        assert!(among > Duration::from_millis(80), "{among:?} of a second");
        assert!(among < Duration::from_millis(120), "{among:?} of a second");
    }

    #[test]
    fn who_waits_for_work_is_ahead_while_much_goes_on() {
        let mut now = epoch();
        let mut state = State { ahead: false, ..State::new(now) };
        for wait in 1..=BUSY {
            now += 60 * US;
            assert_eq!(state.waited(now - 60 * US, now), (wait == BUSY).then_some(true));
        }
        for _ in 0..1_000 {
            now += Duration::from_millis(10);
            assert_eq!(state.waited(now, now), None, "work");
            now += 60 * US;
            assert_eq!(state.waited(now - 60 * US, now), None, "pause");
        }
        now += REST;
        assert_eq!(state.waited(now - REST, now), Some(false), "little goes on");
        for _ in 0..1_000 {
            now += REST;
            assert_eq!(state.waited(now - REST, now), None, "a lone packet now and then");
        }
    }

    #[test]
    fn who_is_not_scheduled_anew_is_no_longer_one_of_those_ahead() {
        let now = epoch();
        let ahead = AtomicUsize::new(2);
        let mut turn = Turn { state: Some(State::new(now)), place: None, ahead: &ahead };
        let refused = |_| Err(io::ErrorKind::PermissionDenied.into());
        turn.take_turn(now, now, refused);
        assert_eq!(ahead.load(Ordering::Relaxed), 2, "nothing was asked for");
        for number in 1..3 {
            let from = now + REST * number;
            turn.take_turn(from, from + REST, refused);
            assert_eq!(ahead.load(Ordering::Relaxed), 1, "once");
        }
    }

    #[test]
    fn a_program_that_sends_packet_after_packet_is_not_stopped_for_each() {
        let mut now = epoch();
        let mut state = State { waits: BUSY, ..State::new(now) };
        let mut ahead = 0;
        for _ in 0..100_000 {
            now += 5 * US;
            state.waited(now - US, now);
            ahead += u32::from(state.ahead);
        }
        assert!(ahead < 2_000, "{ahead} of 100,000 packets");
        let mut changes = 0;
        for _ in 0..10_000 {
            now += 100 * US;
            changes += u32::from(state.waited(now - 60 * US, now).is_some());
        }
        assert!(state.ahead && changes == 1, "{changes} changes");
    }
}
