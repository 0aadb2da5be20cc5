//! Real time: the one clock of these tests, and bounded waiting.

use std::thread;
use std::time::{Duration, Instant};

#[expect(clippy::disallowed_methods, reason = "tests measure the real clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Asks `condition` again and again until it yields something, and returns that and the time.
///
/// # Panics
/// When `limit` has passed; `what` says what was waited for.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> (T, Duration) {
    let start = now();
    loop {
        if let Some(found) = condition() {
            return (found, start.elapsed());
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain for: {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Asks `condition` until `span` has passed.
///
/// # Panics
/// As soon as it does not hold.
pub(crate) fn holds_for(what: &str, span: Duration, mut condition: impl FnMut() -> bool) {
    let start = now();
    while start.elapsed() < span {
        assert!(condition(), "did not hold for {span:?}: {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Short against every time that a test asserts, long against the cost of one question.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
