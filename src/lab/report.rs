//! What the lab shows: the drawing and the steps for people, one JSON object for programs.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::LabOptions;
use super::nat::NatKind;
use crate::io::clock;

/// Answers on one path that people are shown.
const SHOWN_PONGS: usize = 4;

/// The way that packets to a peer take, in the words of `overlay status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PathKind {
    Direct,
    RelayUdp,
    RelayTcp,
    /// None of the others: not there, or not there yet.
    #[serde(other)]
    None,
}

impl std::fmt::Display for PathKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::RelayUdp => "relay-udp",
            Self::RelayTcp => "relay-tcp",
            Self::None => "none",
        })
    }
}

/// Everything that there is to tell about one run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    nats: [String; 2],
    delay_ms: f64,
    loss_percent: f64,
    block_udp: bool,
    pub(super) machines: Vec<MachineReport>,
    steps: Vec<Step>,
    pub(super) pings: Vec<PingReport>,
    /// From the start of the second node.
    pub(super) first_reply_ms: Option<f64>,
    /// From the start of the second node.
    pub(super) direct_ms: Option<f64>,
    pub(super) kernel_ping: Option<KernelPing>,
    expected: PathKind,
    pub(super) verdict: PathKind,
    pub(super) ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Packets that died on the lab's internet, by reason.
    drops: BTreeMap<String, u64>,
    #[serde(skip)]
    json: bool,
    #[serde(skip)]
    json_due: bool,
    #[serde(skip)]
    step_began: Instant,
}

#[derive(Debug, Serialize)]
pub(super) struct MachineReport {
    pub(super) name: String,
    pub(super) address: Ipv4Addr,
    pub(super) public: Ipv4Addr,
    pub(super) overlay_ipv4: Option<Ipv4Addr>,
}

#[derive(Debug, Serialize)]
struct Step {
    name: &'static str,
    ms: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct PingReport {
    pub(super) seq: u64,
    pub(super) rtt_ms: f64,
    pub(super) path: PathKind,
    pub(super) remote: Option<String>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct KernelPing {
    pub(super) sent: usize,
    pub(super) received: usize,
}

impl Report {
    pub(super) fn new(options: &LabOptions) -> Self {
        Self {
            schema: 1,
            nats: options.nats.map(|kind| kind.to_string()),
            delay_ms: milliseconds(options.delay),
            loss_percent: options.loss_percent,
            block_udp: options.block_udp,
            machines: Vec::new(),
            steps: Vec::new(),
            pings: Vec::new(),
            first_reply_ms: None,
            direct_ms: None,
            kernel_ping: None,
            expected: options.expected_path(),
            verdict: PathKind::None,
            ok: false,
            error: None,
            drops: BTreeMap::new(),
            json: options.json,
            json_due: options.json,
            step_began: clock::now(),
        }
    }

    /// Starts the clock of the next step.
    pub(super) fn begin(&mut self) {
        self.step_began = clock::now();
    }

    /// Tells that a step is done.
    pub(super) fn done(&mut self, name: &'static str, text: &str) {
        let took = clock::now().saturating_duration_since(self.step_began);
        self.steps.push(Step { name, ms: milliseconds(took) });
        self.say(&format!("  ok   {text:<58} {:>8.1} ms", milliseconds(took)));
        self.begin();
    }

    /// Tells of one answer.
    pub(super) fn pong(&mut self, pong: PingReport) {
        let way = pong
            .remote
            .as_ref()
            .map_or_else(|| pong.path.to_string(), |remote| format!("{:<10} {remote}", pong.path));
        let line =
            format!("  pong {:<58} {:>8.1} ms", format!("{way}  seq {}", pong.seq), pong.rtt_ms);
        // People see the first answers and every change of the path; the JSON has them all.
        let changed = self.pings.last().is_none_or(|last| last.path != pong.path);
        if changed || self.pings.len() < SHOWN_PONGS {
            self.say(&line);
        } else if self.pings.len() == SHOWN_PONGS {
            self.say("  ...");
        }
        self.pings.push(pong);
    }

    /// A line for people only.
    pub(super) fn say(&self, line: &str) {
        if !self.json {
            // Nobody reads any more: the lab goes on all the same.
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        }
    }

    pub(super) fn failed(&mut self, error: &anyhow::Error) {
        self.ok = false;
        self.error = Some(format!("{error:#}"));
    }

    pub(super) fn set_drops(&mut self, drops: &BTreeMap<super::internet::InternetDrop, u64>) {
        self.drops = drops.iter().map(|(reason, count)| (reason.to_string(), *count)).collect();
    }

    /// The JSON object, if it is wanted; once.
    pub(super) fn print_json(&mut self) {
        if std::mem::take(&mut self.json_due)
            && let Ok(text) = serde_json::to_string(self)
        {
            let _ = writeln!(std::io::stdout().lock(), "{text}");
        }
    }
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    // Whole microseconds: more digits would be noise.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// The lab in ASCII.
pub(super) fn drawing(options: &LabOptions) -> String {
    let [alice, bob] = options.nats;
    let home = |kind: NatKind| match kind {
        NatKind::None => "no NAT".to_owned(),
        kind => format!("NAT {kind}"),
    };
    let inside = |kind: NatKind| match kind {
        NatKind::None => "the same",
        _ => "192.168.1.2",
    };
    let mut line = Vec::new();
    if !options.delay.is_zero() {
        line.push(format!("{} ms each way", milliseconds(options.delay)));
    }
    if options.loss_percent > 0.0 {
        line.push(format!("{}% loss", options.loss_percent));
    }
    let mut notes = String::new();
    if !line.is_empty() {
        notes.push_str(&format!("\n  each home's line: {}\n", line.join(", ")));
    }
    if options.block_udp {
        notes.push_str("\n  alice's line drops UDP\n");
    }
    let server = if options.bare { "server" } else { "overlay server" };
    format!(
        "
                   203.0.113.0/24, the internet
         +----------------------+----------------------+
         |                      |                      |
  {:<22} {server:^17}      {}
  203.0.113.10              203.0.113.1          203.0.113.20
         |                                             |
  alice {:<37} bob {}
{notes}",
        home(alice),
        home(bob),
        inside(alice),
        inside(bob),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drawing_is_plain_ascii_and_shows_what_was_asked_for() {
        let options = LabOptions {
            nats: [NatKind::Symmetric, NatKind::None],
            delay: Duration::from_millis(20),
            loss_percent: 1.5,
            block_udp: true,
            ..LabOptions::default()
        };
        let drawing = drawing(&options);
        assert!(drawing.is_ascii());
        for part in ["NAT symmetric", "no NAT", "20 ms each way, 1.5% loss", "drops UDP"] {
            assert!(drawing.contains(part), "{part} in {drawing}");
        }
    }

    #[test]
    fn path_kinds_have_the_words_of_the_status_command_and_strangers_are_none() {
        let parse = |word: &str| serde_json::from_value::<PathKind>(word.into()).unwrap();
        for kind in [PathKind::Direct, PathKind::RelayUdp, PathKind::RelayTcp] {
            assert_eq!(parse(&kind.to_string()), kind);
        }
        assert_eq!(parse("connecting"), PathKind::None);
    }
}
