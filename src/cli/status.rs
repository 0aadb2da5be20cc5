//! `overlay status`.

use std::time::Duration;

use clap::Args;

use super::ask::SocketArg;
use super::{Done, print};
use crate::daemon::node::Question;
use crate::daemon::node::report::{PeerReport, Status, UplinkReport};

/// Arguments of `overlay status`.
#[derive(Debug, Clone, Args)]
#[command(about = "This node, its server and all peers with the path to each")]
pub struct StatusArgs {
    #[command(flatten)]
    socket: SocketArg,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Print again every second, until stopped
    #[arg(long)]
    watch: bool,
}

/// Runs it.
///
/// # Errors
/// When the daemon cannot be asked.
pub fn run(args: &StatusArgs) -> Done {
    loop {
        let status: Status = args.socket.ask(&Question::Status)?;
        if args.json {
            print::json(&status)?;
        } else {
            if args.watch {
                // Clear the screen and go to its top (ECMA-48).
                print::line("\x1b[2J\x1b[H")?;
            }
            print::line(text(&status))?;
        }
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// The uplink, where it is not the preferred one.
fn by(uplink: Option<&str>) -> String {
    uplink.map(|uplink| format!(" by {uplink}")).unwrap_or_default()
}

fn uplink_line(uplink: &UplinkReport) -> String {
    let UplinkReport { interface, family, preferred, state, .. } = uplink;
    let place = match (preferred, uplink.in_use) {
        (true, true) => "preferred",
        (true, false) => "preferred, not in use",
        (false, true) => "in use",
        (false, false) => "for when that fails",
    };
    let state = if state == "unknown" { "not asked" } else { state };
    let rtt = uplink.rtt_ms.filter(|_| state == "answers");
    let rtt = rtt.map(|rtt| format!(", {rtt:.1} ms")).unwrap_or_default();
    format!("uplink {interface} {family} ({place})  {state}{rtt}")
}

/// What is said in place of the peers when there are none.
fn alone(expired: bool) -> &'static str {
    if expired {
        "no peers: the membership of this node has ended"
    } else {
        "no other node yet; on the server: overlay server invite, on another machine: \
         sudo overlay up JOINLINE"
    }
}

fn text(status: &Status) -> String {
    let own = &status.own;
    let server = &status.server;
    let mut lines = vec![
        format!("{}  {}  {}  ({}, id {})", own.name, own.ipv4, own.ipv6, own.interface, own.id),
        format!(
            "server {}  {}{}{}",
            server.address.as_deref().unwrap_or("unknown"),
            server.state,
            server.rtt_ms.map(|rtt| format!(", {rtt:.1} ms")).unwrap_or_default(),
            by(server.uplink.as_deref())
        ),
        String::new(),
    ];
    let warnings = own.warnings.iter().map(|warning| format!("warning: {warning}"));
    lines.splice(2..2, own.uplinks.iter().map(uplink_line).chain(warnings).collect::<Vec<_>>());
    if let Some(nodes) = status.nodes {
        let known = status.peers.len();
        lines.push(format!(
            "# {known} of the network's {nodes} nodes: those that this one talks to; any other is \
             found when it is first used"
        ));
    }
    if status.peers.is_empty() && status.nodes.is_none() {
        lines.push(alone(own.expired).into());
        return lines.join("\n");
    }
    let mut table = print::table(&["NAME", "IPV4", "PATH", "RTT", "RX", "TX", "WHY"]);
    let mut peers: Vec<&PeerReport> = status.peers.iter().collect();
    peers.sort_by(|a, b| a.name.cmp(&b.name));
    for peer in peers {
        let path = match (&peer.path.remote, peer.path.kind.as_str()) {
            (Some(remote), "direct") => format!("direct {remote}"),
            (_, kind) => kind.to_string(),
        };
        let path = path + &by(peer.path.uplink.as_deref());
        table.add_row(vec![
            peer.name.clone(),
            peer.ipv4.to_string(),
            path,
            peer.rtt_ms.map_or_else(|| "-".into(), |rtt| format!("{rtt:.1} ms")),
            print::bytes(peer.rx_bytes),
            print::bytes(peer.tx_bytes),
            peer.path.why.clone(),
        ]);
    }
    lines.push(print::table_text(&table));
    for (reason, count) in &own.drops {
        if reason != "multicast" {
            lines.push(format!("# dropped packets: {count} {reason}"));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_node_is_not_told_to_join() {
        let status = |expired: bool| -> Status {
            let own = serde_json::json!({
                "id": "00000001", "name": "alice", "ipv4": "10.77.0.1", "ipv6": "fd00::1",
                "interface": "overlay0", "mtu": 1280, "listen_port": 4711, "public_key": "",
                "network": "", "drops": {}, "version": "", "expired": expired,
            });
            let server = serde_json::json!({
                "state": "connected", "address": null, "rtt_ms": null,
            });
            let status = serde_json::json!({
                "schema": 1, "self": own, "server": server, "peers": [],
            });
            serde_json::from_value(status).unwrap()
        };
        assert!(text(&status(false)).contains("overlay up JOINLINE"));
        let expired = text(&status(true));
        assert!(expired.contains("has ended") && !expired.contains("JOINLINE"), "{expired}");
    }
}
