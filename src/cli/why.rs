//! `overlay why`.

use clap::Args;

use super::ask::SocketArg;
use super::{Done, print};
use crate::daemon::node::Question;
use crate::daemon::node::explain::{SideReport, Why};

/// Arguments of `overlay why`.
#[derive(Debug, Clone, Args)]
#[command(
    about = "Why the path to a peer is what it is: both sides' candidates, NATs, and what to do",
    after_help = "The peer is asked for its half on the path of this moment; one that does not \
                  answer within a second (an older version) leaves this node's half. A peer that \
                  was removed is known until this node restarts."
)]
pub struct WhyArgs {
    /// Name, overlay address or id
    #[arg(value_name = "PEER")]
    peer: String,

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
pub fn run(args: &WhyArgs) -> Done {
    let why: Why = args.socket.ask(&Question::Why { peer: args.peer.clone() })?;
    if args.json {
        return print::json(&why);
    }
    print::line(text(&why))
}

fn text(why: &Why) -> String {
    let mut lines = vec![
        format!("{}: {}", why.name, why.verdict.sentence),
        format!("to do: {}", why.verdict.remedy),
    ];
    if let Some(uplink) = why.peer.as_ref().and_then(|peer| peer.path.uplink.as_ref()) {
        lines.push(format!("it goes by {uplink}: by the preferred uplink nothing answers"));
    }
    for (side, other) in [(&why.here, &why.there), (&why.there, &why.here)] {
        let Some(side) = side else { continue };
        let other = other.as_ref().map_or(why.name.as_str(), |other| other.name.as_str());
        lines.push(String::new());
        lines.extend(side_lines(side, other));
    }
    if let Some(missing) = &why.there_missing {
        lines.push(String::new());
        lines.push(format!("# the other half is missing: {missing}"));
    }
    lines.join("\n")
}

fn side_lines(side: &SideReport, other: &str) -> Vec<String> {
    let nat = &side.nat;
    let counts = if nat.counts { ", in order" } else { "" };
    let mut lines = vec![
        format!(
            "{}: {}{}; UDP {}; seen at {}",
            side.name,
            side.path,
            side.remote.as_ref().map(|remote| format!(" {remote}")).unwrap_or_default(),
            match side.udp {
                Some(true) => "works",
                Some(false) => "is blocked",
                None => "is not known yet",
            },
            side.reflexive.as_deref().unwrap_or("no endpoint"),
        ),
        format!(
            "  NAT {} (mapping {}{counts}; filtering {}{})",
            nat.kind,
            nat.mapping,
            nat.filtering,
            if nat.port_mapped { "; a port is mapped" } else { "" },
        ),
    ];
    if side.candidates.is_empty() {
        lines.push(format!("  knows no candidate of {other}"));
        return lines;
    }
    let header = format!("  CANDIDATE OF {}", other.to_uppercase());
    let mut table = print::table(&[&header, "KIND", "OUTCOME", "PINGS", "RTT", "HEARD"]);
    for candidate in &side.candidates {
        table.add_row(vec![
            format!("  {}", candidate.endpoint),
            candidate.kind.clone(),
            if candidate.no_route { "no route".into() } else { candidate.outcome.clone() },
            candidate.pings.to_string(),
            candidate.rtt_ms.map_or_else(|| "-".into(), |rtt| format!("{rtt:.1} ms")),
            candidate.heard_s.map_or_else(|| "-".into(), |ago| format!("{ago:.1} s ago")),
        ]);
    }
    lines.push(print::table_text(&table));
    lines
}
