//! What runs the asynchronous part of a command.

use tokio::runtime::{Builder, Runtime};

use super::fail::Failure;

/// For a command that does one thing at a time.
///
/// # Errors
/// When the kernel gives none.
pub(super) fn on_this_thread() -> Result<Runtime, Failure> {
    built(Builder::new_current_thread())
}

/// For a daemon that serves many.
///
/// # Errors
/// When the kernel gives none.
pub(super) fn on_all_cores() -> Result<Runtime, Failure> {
    built(Builder::new_multi_thread())
}

fn built(mut builder: Builder) -> Result<Runtime, Failure> {
    builder.enable_all().build().map_err(|error| {
        Failure::caused_by(
            "this command cannot start",
            &error,
            "see how many threads and open files are allowed: ulimit -u -n",
        )
    })
}
