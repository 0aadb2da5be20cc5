//! On which processor a packet thread runs: on any, as the kernel likes; but while much goes both ways
//! at once, each of the two stays on one of its own.
//!
//! One way, whoever has the work moves to where there is room, and should. Both ways there is work for
//! two all the time, and what a thread gains by moving is less than what it leaves behind in the
//! processor's cache: see "Both ways at once" in `docs/measurements.md`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

/// How often a thread looks how much goes on.
const WINDOW: Duration = Duration::from_millis(10);
/// Bytes in a window that are much, each way: 1 Gb/s,
const MUCH: u64 = 1_250_000;
/// and a quarter of what goes the other way: more than acknowledgements.
const SHARE: u64 = 4;

/// What the two packet threads know of each other.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Bytes that went out and came in, modulo 2^64.
    moved: [AtomicU64; 2],
    /// The processor that each thread stays on.
    kept: Mutex<[Option<usize>; 2]>,
}

impl Places {
    pub(super) fn count_sent(&self, bytes: usize) {
        self.moved[0].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn count_received(&self, bytes: usize) {
        self.moved[1].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes of datagrams that came in, modulo 2^64.
    pub(super) fn received(&self) -> u64 {
        self.moved[1].load(Ordering::Relaxed)
    }
}

/// Where one of the two threads runs.
#[derive(Debug)]
pub(super) struct Place {
    /// 0 or 1.
    thread: usize,
    looked: Instant,
    moved: [u64; 2],
    /// Where it may run otherwise, while it stays.
    elsewhere: Option<CpuSet>,
}

impl Place {
    pub(super) fn new(thread: usize, now: Instant) -> Self {
        Self { thread, looked: now, moved: [0; 2], elsewhere: None }
    }

    /// Has the calling thread stay, or go where it likes, by what went on since the last look.
    ///
    /// # Errors
    /// What the kernel says; then it goes where it likes.
    pub(super) fn look(&mut self, places: &Places, now: Instant) -> nix::Result<()> {
        let window = now.saturating_duration_since(self.looked);
        if window < WINDOW {
            return Ok(());
        }
        let moved = places.moved.each_ref().map(|bytes| bytes.load(Ordering::Relaxed));
        let [out, back] = [0, 1].map(|way| moved[way].wrapping_sub(self.moved[way]));
        (self.looked, self.moved) = (now, moved);
        match (is_much_both_ways(window, out, back), self.elsewhere.take()) {
            (true, None) => self.stay(places),
            (false, Some(elsewhere)) => {
                self.free(places);
                sched_setaffinity(Pid::from_raw(0), &elsewhere)
            }
            (_, as_before) => {
                self.elsewhere = as_before;
                Ok(())
            }
        }
    }

    /// Stays on the processor on which it runs, or on another one if the other thread is there.
    fn stay(&mut self, places: &Places) -> nix::Result<()> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let here = sched_getcpu()?;
        let mut kept = places.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free =
            |cpu: usize| allowed.is_set(cpu).unwrap_or(false) && kept[1 - self.thread] != Some(cpu);
        let Some(cpu) = std::iter::once(here).chain(0..CpuSet::count()).find(|&cpu| is_free(cpu))
        else {
            return Ok(());
        };
        kept[self.thread] = Some(cpu);
        drop(kept);
        let mut only = CpuSet::new();
        let kept = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
        match kept {
            Ok(()) => self.elsewhere = Some(allowed),
            Err(_) => self.free(places),
        }
        kept
    }

    fn free(&self, places: &Places) {
        places.kept.lock().unwrap_or_else(PoisonError::into_inner)[self.thread] = None;
    }
}

/// Whether two threads have had work all the time.
fn is_much_both_ways(window: Duration, out: u64, back: u64) -> bool {
    let least = u128::from(MUCH) * window.as_nanos() / WINDOW.as_nanos();
    let (less, more) = (out.min(back), out.max(back));
    u128::from(less) >= least && less.saturating_mul(SHARE) >= more
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    fn allowed() -> Vec<usize> {
        let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
        (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap()).collect()
    }

    #[test]
    fn much_is_much_for_the_time_it_took_and_more_than_acknowledgements() {
        let is_much = |ms, out, back| is_much_both_ways(Duration::from_millis(ms), out, back);
        assert!(is_much(10, MUCH, MUCH) && is_much(10, 3 * MUCH, MUCH));
        assert!(!is_much(10, 5 * MUCH, MUCH) && !is_much(10, MUCH, MUCH - 1));
        assert!(!is_much(3_000, MUCH, MUCH), "who has slept meanwhile");
    }

    /// Where the calling thread may run after it has looked, `bytes` having gone each way.
    fn after(bytes: usize, place: &mut Place, places: &Places, now: Instant) -> Vec<usize> {
        places.count_sent(bytes);
        places.count_received(bytes);
        place.look(places, now).unwrap();
        allowed()
    }

    #[test]
    fn each_stays_on_a_processor_of_its_own_while_much_goes_both_ways() {
        let everywhere = allowed();
        let places = Places::default();
        let much = 2 * usize::try_from(MUCH).unwrap();
        let (stays, goes) = (epoch() + WINDOW, epoch() + 2 * WINDOW);
        let mut first = Place::new(0, epoch());
        let here = after(much, &mut first, &places, stays);
        assert_eq!(here.len(), 1);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                // A thread starts where its parent may run, which has chosen already.
                let mut place = Place::new(1, epoch());
                assert_eq!(after(much, &mut place, &places, stays), here, "nowhere else to go");
                assert_eq!(places.kept.lock().unwrap()[1], None, "not kept there");
                sched_setaffinity(Pid::from_raw(0), first.elsewhere.as_ref().unwrap()).unwrap();
                let there = after(2 * much, &mut place, &places, goes);
                let is_alone = everywhere.len() == 1;
                assert!(is_alone || there.len() == 1 && there != here, "{there:?}, {here:?}");
                assert_eq!(after(0, &mut place, &places, goes + WINDOW), everywhere);
            });
            second.join().unwrap();
        });
        assert_eq!(after(0, &mut first, &places, goes + 30 * WINDOW), everywhere, "little goes on");
        assert_eq!(*places.kept.lock().unwrap(), [None; 2]);
    }
}
