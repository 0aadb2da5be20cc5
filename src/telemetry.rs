//! Logging: to stderr, one line per change that a user feels; never per packet above `trace`.
//!
//! Field names are words of the vocabulary, such as `peer`, `path`, `was`, `why`, `server`, `interface`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The variable that sets what is logged, in the syntax of `tracing`: `debug`, or
/// `info,overlay::node=trace`.
pub const LOG_VARIABLE: &str = "OVERLAY_LOG";

/// Other crates log what their own users care for; the WireGuard engine calls an idle peer an
/// error.
const QUIET: &str = "boringtun=off,netlink_proto=error,hyper=warn,sqlx=warn";

/// Starts logging. Called once, by the commands that run a daemon.
pub fn start() {
    let wanted = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| "info".into());
    let filter = EnvFilter::try_new(format!("{QUIET},{wanted}"))
        .unwrap_or_else(|_| EnvFilter::new(format!("{QUIET},info")));
    // Under systemd the journal writes the time itself.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    // A second start, as in a test, leaves the first one in place.
    let _ = if journal {
        registry.with(lines.without_time()).try_init()
    } else {
        registry.with(lines.with_timer(SystemTime)).try_init()
    };
}
