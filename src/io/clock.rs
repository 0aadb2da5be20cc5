//! The only place that reads a clock.
//!
//! Everything else is given the time, so that the simulator and the tests can invent it.

#![expect(clippy::disallowed_methods, reason = "this module is the clock the others are given")]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The monotonic time, for timers and measurements.
pub fn now() -> Instant {
    Instant::now()
}

/// The time of day, for what people read and what outlives the process.
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// Whole seconds since 1970; a clock that stands before 1970 counts as 1970.
pub fn unix_seconds() -> u64 {
    wall().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_time_does_not_run_backwards() {
        let earlier = now();
        assert!(now() >= earlier, "an Instant never decreases");
    }

    #[test]
    fn the_day_is_after_this_code_was_written() {
        assert!(unix_seconds() > 1_750_000_000, "the wall clock counts seconds since 1970");
    }
}
