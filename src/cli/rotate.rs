//! `overlay rotate`.

use clap::Args;

use super::ask::SocketArg;
use super::{Done, print};
use crate::daemon::node::Question;
use crate::daemon::node::rotate::Rotated;

/// Arguments of `overlay rotate`.
#[derive(Debug, Clone, Args)]
#[command(
    about = "Renew this node's key now; nobody loses a packet",
    long_about = "Renew this node's key now. It is done by itself every 30 days \
                  (rotate-key-after-d in node.toml). Peers change over to the new key within \
                  seconds, no session ends and no packet is lost; the old key is good for three \
                  more minutes, and for peers that are away until they come back."
)]
pub struct RotateArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Runs it; done is done when the server has stored the new key.
///
/// # Errors
/// When the node does not run, may not be told, or cannot renew its key now.
pub fn run(args: &RotateArgs) -> Done {
    let rotated: Rotated = args.socket.ask(&Question::Rotate)?;
    if args.json {
        return print::json(&rotated);
    }
    print::line(format_args!(
        "new node key {}\nold node key {}, good until all peers have changed over",
        rotated.public_key, rotated.old_public_key
    ))
}
