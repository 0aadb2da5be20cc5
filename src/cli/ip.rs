//! `overlay ip`.

use clap::Args;

use super::ask::SocketArg;
use super::fail::{Failure, UNKNOWN_PEER};
use super::{Done, print};
use crate::daemon::node::Question;
use crate::daemon::node::report::{Addresses, SCHEMA, Status};

/// Arguments of `overlay ip`.
#[derive(Debug, Clone, Args)]
#[command(about = "Overlay addresses of this node, or of a peer")]
pub struct IpArgs {
    /// Name, overlay address or id [default: this node]
    #[arg(value_name = "PEER")]
    peer: Option<String>,

    #[command(flatten)]
    socket: SocketArg,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// When the daemon cannot be asked, or nobody has that name.
pub fn run(args: &IpArgs) -> Done {
    let mut status: Status = args.socket.ask(&Question::Status)?;
    if let (Some(peer), Some(_)) = (&args.peer, status.nodes) {
        // Of a large network the node knows only the peers that it uses: here is one more. One that
        // does not exist is told of below.
        let _: Result<(), Failure> = args.socket.ask(&Question::Find { peer: peer.clone() });
        status = args.socket.ask(&Question::Status)?;
    }
    let own = &status.own;
    let own = (&own.name, &own.id, own.ipv4, own.ipv6);
    let peers = status.peers.iter().map(|peer| (&peer.name, &peer.id, peer.ipv4, peer.ipv6));
    let found = match &args.peer {
        None => Some(own),
        Some(wanted) => std::iter::once(own).chain(peers).find(|(name, id, ipv4, ipv6)| {
            name.eq_ignore_ascii_case(wanted)
                || *id == wanted
                || ipv4.to_string() == *wanted
                || wanted.parse() == Ok(*ipv6)
        }),
    };
    let Some((name, _, ipv4, ipv6)) = found else {
        let wanted = args.peer.as_deref().unwrap_or_default();
        return Err(Failure::new(
            format!("no peer is called \"{wanted}\""),
            "it is no name, overlay address or id of a node in this network",
            "overlay status (it lists all peers)",
        )
        .code(UNKNOWN_PEER));
    };
    if args.json {
        let (ipv4, ipv6) = (ipv4.into(), ipv6.into());
        return print::json(&Addresses { schema: SCHEMA, name: name.clone(), ipv4, ipv6 });
    }
    print::line(ipv4)?;
    print::line(ipv6)
}
