//! `overlay ping`: over the path that data takes, and says which one that is.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::ask::{Next, SocketArg};
use super::fail::{Failure, NO_REPLY, ONLY_RELAYED};
use super::{Done, print};
use crate::daemon::node::{PingLine, Question};

/// With `--until-direct` and no other limit, ten times what the slowest punch takes.
const UNTIL_DIRECT_LIMIT: Duration = Duration::from_secs(20);

/// Arguments of `overlay ping`.
#[derive(Debug, Clone, Args)]
#[command(
    about = "Ping a peer over the path that data takes; shows the path of each reply",
    after_help = "A ping goes out every second (every 100 ms with --until-direct). Exit codes: \
                  0 a reply came, 3 the node stopped meanwhile, 5 unknown peer, 6 no reply, 7 \
                  replies, but only relayed ones (--until-direct)."
)]
pub struct PingArgs {
    /// Name, overlay address or id
    #[arg(value_name = "PEER")]
    peer: String,

    #[command(flatten)]
    socket: SocketArg,

    /// How often, at least once [default: 5; with --until-direct as often as time allows]
    #[arg(short, long, value_name = "N", value_parser = count)]
    count: Option<u64>,

    /// Print one JSON line per reply, and a summary line
    #[arg(long)]
    json: bool,

    /// Stop at the first reply that came directly
    #[arg(long)]
    until_direct: bool,

    /// Stop after this long, for example 5s [default: none; with --until-direct 20s]
    #[arg(long, value_name = "D", value_parser = limit)]
    timeout: Option<Duration>,
}

fn count(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0) => Err("at least one ping".into()),
        Ok(count) => Ok(count),
        Err(_) => Err("not a number of pings".into()),
    }
}

fn limit(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("a time longer than that, for example 5s".into()),
        Ok(limit) => Ok(limit),
        Err(error) => Err(error.to_string()),
    }
}

#[derive(Serialize)]
struct JsonReply<'a> {
    seq: u64,
    rtt_ms: f64,
    path: JsonPath<'a>,
}

#[derive(Serialize)]
struct JsonPath<'a> {
    kind: &'a str,
    remote: Option<&'a str>,
}

#[derive(Serialize)]
struct Summary {
    sent: u64,
    received: u64,
    min_ms: Option<f64>,
    avg_ms: Option<f64>,
    max_ms: Option<f64>,
}

/// Runs it.
///
/// # Errors
/// When the peer is unknown or does not reply.
pub fn run(args: &PingArgs) -> Done {
    let timeout = args.timeout.or(args.until_direct.then_some(UNTIL_DIRECT_LIMIT));
    let count = args.count.or((!args.until_direct).then_some(5));
    let mut answers = args.socket.start(&Question::Ping {
        peer: args.peer.clone(),
        count,
        until_direct: args.until_direct,
        timeout_ms: timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
    })?;
    let (mut sent, mut rtts, mut direct) = (0, Vec::new(), false);
    let (mut last_kind, mut last_path) = (String::new(), String::new());
    answers.end_on_interrupt();
    let end = loop {
        let line = match answers.next::<Option<PingLine>>() {
            Ok(Next::Answer(Some(line))) => line,
            // An empty line ends the row.
            Ok(Next::Answer(None) | Next::Interrupted) => break Ok(()),
            Ok(Next::HungUp) => break Err(answers.ended()),
            Err(failure) if sent == 0 => return Err(failure),
            Err(failure) => break Err(failure),
        };
        sent = line.seq;
        if let Some(rtt_ms) = line.rtt_ms {
            rtts.push(rtt_ms);
            direct |= line.kind == "direct";
        }
        if args.json {
            if let Some(rtt_ms) = line.rtt_ms {
                let path = JsonPath { kind: &line.kind, remote: line.remote.as_deref() };
                print::json(&JsonReply { seq: line.seq, rtt_ms, path })?;
            }
        } else {
            show(&line, &last_kind)?;
        }
        last_path.clone_from(&line.kind);
        if line.rtt_ms.is_some() {
            last_kind = line.kind;
        }
    };
    let received = rtts.len() as u64;
    let summary = Summary {
        sent,
        received,
        min_ms: rtts.iter().copied().reduce(f64::min),
        avg_ms: (received > 0)
            .then(|| (rtts.iter().sum::<f64>() / received as f64 * 1e3).round() / 1e3),
        max_ms: rtts.iter().copied().reduce(f64::max),
    };
    if args.json {
        print::json(&summary)?;
    } else if let (Some(min), Some(avg), Some(max)) =
        (summary.min_ms, summary.avg_ms, summary.max_ms)
    {
        print::line(format!(
            "{sent} sent, {received} received, {min:.1}/{avg:.1}/{max:.1} ms min/avg/max"
        ))?;
    } else {
        print::line(format!("{sent} sent, {received} received"))?;
    }
    end?;
    if received == 0 {
        return Err(no_reply(&args.peer, sent, &last_path));
    }
    if args.until_direct && !direct {
        return Err(Failure::new(
            format!("{} replies, but only through the relay", args.peer),
            format!("in {sent} pings no direct path came up between the two NATs"),
            "overlay netcheck (here and there: it says what each NAT allows)",
        )
        .code(ONLY_RELAYED));
    }
    Ok(())
}

fn no_reply(peer: &str, sent: u64, path: &str) -> Failure {
    let cause = match (sent, path) {
        (0, _) => "the time was over before the first ping".into(),
        (_, "offline") => format!("it is offline: {sent} pings, and no path to send them on"),
        (1, path) => format!("one ping got lost (path: {path})"),
        (_, path) => format!("all {sent} pings got lost (path: {path})"),
    };
    let help = "overlay status (it shows whether the peer is online, and the path to it)";
    Failure::new(format!("{peer} does not reply"), cause, help).code(NO_REPLY)
}

fn show(line: &PingLine, last_kind: &str) -> Done {
    let PingLine { seq, name, ipv4, rtt_ms, kind, remote } = line;
    let Some(rtt) = rtt_ms else {
        return print::line(format!("no reply from {name} ({ipv4}) seq {seq} (path: {kind})"));
    };
    let way = match (kind.as_str(), remote) {
        ("direct", Some(remote)) => format!("direct {remote}"),
        _ => kind.clone(),
    };
    let change = if !last_kind.is_empty() && last_kind != kind {
        format!("   <- was {last_kind}")
    } else {
        String::new()
    };
    print::line(format!("reply from {name} ({ipv4}) seq {seq} via {way} in {rtt:.1} ms{change}"))
}
