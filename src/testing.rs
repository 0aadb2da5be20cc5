//! What the unit tests of several rooms share.

use std::sync::OnceLock;
use std::time::Instant;

/// The moment at which every test's virtual time starts; tests only add to it.
#[expect(clippy::disallowed_methods, reason = "the one place where unit tests read a clock")]
pub(crate) fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}
