//! `overlay netcheck`.

use clap::Args;

use super::ask::SocketArg;
use super::{Done, print};
use crate::daemon::node::Question;
use crate::daemon::node::report::{Netcheck, PortMappingReport, UplinkProbe};

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
        format!("port        {}", port_line(report.nat.mapped.as_ref())),
    ];
    for server in &report.servers {
        let rtt = server.rtt_ms.map_or_else(|| "no answer".into(), |rtt| format!("{rtt:.1} ms"));
        let mtu = server.path_mtu.map(|mtu| format!(", path MTU {mtu}")).unwrap_or_default();
        let blocked = if server.udp_blocked { ", UDP blocked" } else { "" };
        lines.push(format!("server      {}  {rtt}{mtu}{blocked}", server.address));
    }
    for uplink in &report.uplinks {
        let UplinkProbe { interface, family, preferred, strict_filter, .. } = uplink;
        let place = if *preferred { "preferred" } else { "for when that fails" };
        let seen = match (&uplink.endpoint, uplink.rtt_ms) {
            (Some(endpoint), Some(rtt)) => format!("{endpoint}, {rtt:.1} ms"),
            _ if *strict_filter => "no answer: strict reverse path filter (rp_filter=1)".into(),
            _ => "no answer".into(),
        };
        lines.push(format!("uplink      {interface} {family} ({place})  {seen}"));
    }
    for peer in &report.forecast {
        lines.push(format!("peer        {}  {}: {}", peer.name, peer.forecast, peer.reason));
    }
    lines.push(String::new());
    lines.push(report.verdict);
    print::line(lines.join("\n"))
}

/// What the router does for us, in a line.
fn port_line(mapped: Option<&PortMappingReport>) -> String {
    let Some(report) = mapped else {
        return "not asked for: port-mapping is off in the configuration".into();
    };
    let (Some(external), Some(protocol)) = (&report.external, &report.protocol) else {
        let why = match report.state.as_str() {
            "no-gateway" => "not needed: no router on the way out, or our own address is public",
            "searching" => "the router is being asked",
            _ => report.error.as_deref().unwrap_or("the router gives none"),
        };
        return why.into();
    };
    let proof = match (report.verified, report.public) {
        (Some(true), _) => "verified",
        (_, Some(false)) => "not public: there is another NAT behind the router",
        _ => "not verified: nothing sent there has arrived",
    };
    format!("{external} by {protocol}, {proof}")
}
