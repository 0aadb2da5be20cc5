//! What runs the asynchronous part of a command.

use std::future::Future;

use tokio::runtime::{Builder, Runtime};

use super::fail::Failure;

/// For a command that does one thing at a time.
///
/// # Errors
/// When the kernel gives none.
pub(super) fn on_this_thread() -> Result<Runtime, Failure> {
    built(Builder::new_current_thread())
}

/// Runs a command to its end, and waits for nothing that it has left behind: a look-up of a name that
/// hangs cannot be called off, and would hold up the end for as long as the resolver likes.
///
/// # Errors
/// When the kernel gives no runtime.
pub(super) fn run_and_leave<T>(command: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = on_this_thread()?;
    let end = runtime.block_on(command);
    runtime.shutdown_background();
    Ok(end)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::io::clock;

    #[test]
    fn the_end_waits_for_no_look_up_that_hangs() {
        let (hang, until) = std::sync::mpsc::channel::<()>();
        let start = clock::now();
        run_and_leave(async {
            let (begun, begins) = tokio::sync::oneshot::channel();
            tokio::task::spawn_blocking(move || {
                let _ = begun.send(());
                let _ = until.recv_timeout(Duration::from_secs(60));
            });
            begins.await.unwrap();
        })
        .unwrap();
        let took = clock::now().saturating_duration_since(start);
        assert!(took < Duration::from_secs(30), "{took:?}");
        drop(hang);
    }
}
