//! `overlay history`.

use std::time::{Duration, SystemTime};

use clap::Args;

use super::ask::SocketArg;
use super::{Done, print};
use crate::daemon::node::Question;
use crate::daemon::node::explain::HistoryReport;

/// Arguments of `overlay history`.
#[derive(Debug, Clone, Args)]
#[command(
    about = "Path changes to a peer with their cause, round trips, and time direct or relayed",
    after_help = "The last 64 changes and 16 paths are kept. The history survives changes of the \
                  network; it starts anew with the daemon. Times of day are UTC."
)]
pub struct HistoryArgs {
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
pub fn run(args: &HistoryArgs) -> Done {
    let history: HistoryReport = args.socket.ask(&Question::History { peer: args.peer.clone() })?;
    if args.json {
        return print::json(&history);
    }
    print::line(text(&history))
}

fn text(history: &HistoryReport) -> String {
    let HistoryReport { name, direct_s, relayed_s, without_s, .. } = history;
    let since = time_of_day(history.since as f64);
    let mut lines = vec![format!(
        "{name} since {since}: {direct_s:.0} s direct, {relayed_s:.0} s relayed, {without_s:.0} s \
         without a path"
    )];
    let ms = |ms: f64| format!("{ms:.1} ms");
    if history.changes.is_empty() {
        lines.push("no path so far".into());
    } else {
        lines.push(String::new());
        let mut table = print::table(&["TIME", "FROM", "TO", "RTT", "CAUSE"]);
        for change in &history.changes {
            table.add_row(vec![
                time_of_day(change.at),
                change.from.clone(),
                change.to.clone(),
                change.rtt_ms.map_or_else(|| "-".into(), ms),
                change.cause.clone(),
            ]);
        }
        lines.push(print::table_text(&table));
    }
    if !history.paths.is_empty() {
        lines.push(String::new());
        let mut table =
            print::table(&["PATH", "RTT MIN", "RTT AVG", "SAMPLES", "LOSS", "LAST ANSWER"]);
        for path in &history.paths {
            table.add_row(vec![
                path.path.clone(),
                ms(path.rtt_min_ms),
                ms(path.rtt_avg_ms),
                path.samples.to_string(),
                path.loss.map_or_else(|| "-".into(), |loss| format!("{:.1} %", loss * 100.0)),
                format!("{:.1} s ago", path.last_s),
            ]);
        }
        lines.push(print::table_text(&table));
    }
    lines.join("\n")
}

fn time_of_day(seconds: f64) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds.max(0.0));
    humantime::format_rfc3339_seconds(at).to_string()
}
