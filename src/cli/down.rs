//! `overlay down`.

use std::time::Duration;

use clap::Args;

use super::Done;
use super::ask::SocketArg;
use super::fail::Failure;
use crate::daemon::node::Question;

/// How long a daemon may take to remove its interface and end.
const LIMIT: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(20);

/// Arguments of `overlay down`.
#[derive(Debug, Clone, Args)]
#[command(about = "Stop the running node; its interface, addresses and routes go with it")]
pub struct DownArgs {
    #[command(flatten)]
    socket: SocketArg,
}

/// Runs it, and waits until the daemon is gone.
///
/// # Errors
/// When the daemon cannot be asked, or does not end.
pub fn run(args: &DownArgs) -> Done {
    let () = args.socket.ask(&Question::Down)?;
    let path = args.socket.path()?;
    for _ in 0..LIMIT.as_millis() / STEP.as_millis() {
        if std::os::unix::net::UnixStream::connect(&path).is_err() {
            return Ok(());
        }
        std::thread::sleep(STEP);
    }
    Err(Failure::new(
        "the node was told to stop and still runs",
        format!("after {} s it still answers on {}", LIMIT.as_secs(), path.display()),
        "look at what it does: sudo systemctl status overlay",
    ))
}
