//! `overlay netcheck`.

use clap::Args;

use super::ask::SocketArg;
use super::{Done, print};
use crate::daemon::node::Question;
use crate::daemon::node::report::Netcheck;

/// Arguments of `overlay netcheck`.
#[derive(Debug, Clone, Args)]
#[command(about = "What the network in front of this node allows: NAT kind, UDP, IPv6")]
pub struct NetcheckArgs {
    #[command(flatten)]
    socket: SocketArg,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// When the daemon cannot be asked.
pub fn run(args: &NetcheckArgs) -> Done {
    let report: Netcheck = args.socket.ask(&Question::Netcheck)?;
    if args.json {
        return print::json(&report);
    }
    let yes_no = |known: Option<bool>| match known {
        Some(true) => "yes",
        Some(false) => "no",
        None => "not tested",
    };
    let mut lines = vec![
        format!("UDP         {}", yes_no(Some(report.udp))),
        format!("IPv4        {}", report.ipv4.as_deref().unwrap_or("no")),
        format!("IPv6        {}", report.ipv6.as_deref().unwrap_or("no")),
        format!("NAT         {}", report.nat.kind),
        format!("  mapping   {}", report.nat.mapping),
        format!("  filtering {}", report.nat.filtering),
        format!("  hairpin   {}", yes_no(report.nat.hairpin)),
    ];
    for server in &report.servers {
        let rtt = server.rtt_ms.map_or_else(|| "no answer".into(), |rtt| format!("{rtt:.1} ms"));
        let mtu = server.path_mtu.map(|mtu| format!(", path MTU {mtu}")).unwrap_or_default();
        let blocked = if server.udp_blocked { ", UDP blocked or server away" } else { "" };
        lines.push(format!("server      {}  {rtt}{mtu}{blocked}", server.address));
    }
    for peer in &report.forecast {
        lines.push(format!("peer        {}  {}: {}", peer.name, peer.forecast, peer.reason));
    }
    lines.push(String::new());
    lines.push(report.verdict);
    print::line(lines.join("\n"))
}
