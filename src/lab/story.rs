//! What the lab shows: a server, two nodes that join, a first relayed answer, a direct path.
//!
//! Uses the commands and the JSON that everybody uses.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::LabOptions;
use super::inside::Shutdown;
use super::machine::Machine;
use super::node::{Lines, Next, Node, Stdout, run};
use super::ping::ping;
use super::report::{KernelPing, PathKind, PingReport, Report, milliseconds};
use crate::io::clock;

/// The local socket of what runs on a machine.
pub(super) fn socket(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

/// The overlay processes of the lab.
#[derive(Default)]
pub(super) struct Overlay {
    nodes: Vec<Node>,
}

impl Overlay {
    /// Starts everything and shows it step by step.
    pub(super) fn tell(
        &mut self,
        options: &LabOptions,
        machines: &[Machine],
        directory: &Path,
        shutdown: &Shutdown,
        report: &mut Report,
    ) -> Result<()> {
        let [server, alice, bob] = machines else {
            bail!("the story needs three machines");
        };
        let stage = Stage { directory, shutdown };
        let node = stage.start_server(server)?;
        self.nodes.push(node);
        let server_node = self.nodes.last_mut().context("the server was just added")?;
        stage.wait_for_socket(server_node, "server")?;
        report.done("server", &format!("server up at {LISTEN}"));

        for machine in [alice, bob] {
            stage.write_join_line(server, machine.name)?;
        }
        report.begin();
        self.nodes.push(stage.start_node(alice)?);
        let began = clock::now();
        self.nodes.push(stage.start_node(bob)?);
        let mut overlay_ips = Vec::new();
        for (machine, node) in [alice, bob].into_iter().zip(self.nodes.iter_mut().skip(1)) {
            let ip = stage.wait_for_node(machine, node)?;
            if let Some(told) = report.machines.iter_mut().find(|it| it.name == machine.name) {
                told.overlay_ipv4 = Some(ip);
            }
            report.done("enrol", &format!("{} enrolled as {ip}", machine.name));
            overlay_ips.push(ip);
        }
        if let Some(alice_node) = self.nodes.get_mut(1) {
            stage.wait_for_peer(alice, alice_node, bob.name)?;
        }
        stage.ping_until_direct(options, alice, began, report)?;

        let bob_ip = *overlay_ips.last().context("bob has an address")?;
        let timeout = Duration::from_secs(1) + options.round_trip();
        report.begin();
        let answers = ping(alice, bob_ip, KERNEL_PINGS, timeout)?;
        let received = answers.iter().flatten().count();
        report.kernel_ping = Some(KernelPing { sent: answers.len(), received });
        let text = format!("ping {bob_ip} through the kernel: {received}/{}", answers.len());
        report.done("kernel-ping", &text);
        Ok(())
    }

    /// Says in one line how alice reaches bob; fails if that is not as it must be.
    pub(super) fn verdict(&self, options: &LabOptions, report: &mut Report) -> Result<()> {
        let Some(last) = report.pings.last() else {
            bail!("no answer from bob");
        };
        report.verdict = last.path;
        let expected = options.expected_path();
        let unlucky = options.is_left_to_chance() && report.verdict == PathKind::RelayUdp;
        if report.verdict != expected && !unlucky {
            bail!("alice reaches bob: {}, it must be {expected}", report.verdict);
        }
        let Some(KernelPing { sent, received }) = report.kernel_ping else {
            bail!("the kernel has not pinged");
        };
        let enough = if options.loss_percent > 0.0 { 1 } else { sent };
        if received < enough {
            bail!("only {received} of {sent} pings through the kernel were answered");
        }
        let why = match report.verdict {
            PathKind::RelayTcp => ", as it must be without UDP",
            PathKind::RelayUdp if unlucky => {
                ", as chance found no way through these NATs this time"
            }
            PathKind::RelayUdp => ", as it must be with these NATs",
            PathKind::Direct if options.is_left_to_chance() => ", found by chance",
            PathKind::Direct | PathKind::None => "",
        };
        report.say(&format!("\n  alice reaches bob: {}{why}", report.verdict));
        Ok(())
    }

    /// Fails if one of the processes has ended.
    pub(super) fn check_running(&mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::check_running)
    }

    /// What to tell a person about processes that have ended since the last call.
    pub(super) fn ends_to_tell(&mut self) -> Vec<String> {
        self.nodes.iter_mut().filter_map(Node::end_to_tell).collect()
    }

    /// Ends all processes, in order where they will.
    pub(super) fn stop(&mut self) {
        for node in &self.nodes {
            node.ask_to_end();
        }
        let deadline = clock::now() + ORDERLY_END;
        while clock::now() < deadline && !self.nodes.iter_mut().all(Node::has_ended) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.nodes.clear();
    }
}

/// What every scene needs.
struct Stage<'a> {
    directory: &'a Path,
    shutdown: &'a Shutdown,
}

impl Stage<'_> {
    fn start_server(&self, machine: &Machine) -> Result<Node> {
        let args = words(["server", "--listen", LISTEN, "--public-addr", LISTEN])
            .chain(self.own_files("server"))
            .collect();
        Node::start(machine, self.directory, "server", args, Stdout::Log)
    }

    fn start_node(&self, machine: &Machine) -> Result<Node> {
        let mut join = OsString::from("file:");
        join.push(self.join_file(machine.name));
        let args = words(["up"])
            .chain([join])
            .chain(words(["--name", machine.name]))
            .chain(self.own_files(machine.name))
            .collect();
        Node::start(machine, self.directory, machine.name, args, Stdout::Log)
    }

    fn own_files(&self, name: &str) -> impl Iterator<Item = OsString> + use<> {
        let state = self.directory.join(name).into_os_string();
        let socket = socket(self.directory, name).into_os_string();
        [OsString::from("--state-dir"), state, OsString::from("--socket"), socket].into_iter()
    }

    fn join_file(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.join"))
    }

    fn wait_for_socket(&self, node: &mut Node, name: &str) -> Result<()> {
        let path = socket(self.directory, name);
        node.wait_until("a local socket that answers", self.shutdown, || {
            Ok(std::os::unix::net::UnixStream::connect(&path).ok().map(drop))
        })
    }

    fn write_join_line(&self, server: &Machine, name: &str) -> Result<()> {
        let answer = self.ask(server, &["server", "invite", "--json"])?;
        let (status, output, words) = &answer;
        let invite: Value = serde_json::from_str(output.trim()).unwrap_or_default();
        let Some(join) = invite.get("join").and_then(Value::as_str) else {
            bail!("overlay server invite gave no join line ({status}){words}");
        };
        let path = self.join_file(name);
        std::fs::write(&path, join).with_context(|| format!("writing {}", path.display()))
    }

    /// Waits until a node is connected, and returns its overlay address.
    fn wait_for_node(&self, machine: &Machine, node: &mut Node) -> Result<Ipv4Addr> {
        self.wait_for_socket(node, machine.name)?;
        node.wait_until("a connection to the server", self.shutdown, || {
            let (_, output, _) = self.ask(machine, &["status", "--json"])?;
            let status: Value = serde_json::from_str(output.trim()).unwrap_or_default();
            let connected = status.pointer("/server/state").and_then(Value::as_str);
            let ip = status.pointer("/self/ipv4").and_then(Value::as_str);
            Ok(ip.filter(|_| connected == Some("connected")).and_then(|ip| ip.parse().ok()))
        })
    }

    /// Waits until the server has told a node of another.
    fn wait_for_peer(&self, machine: &Machine, node: &mut Node, peer: &str) -> Result<()> {
        node.wait_until("news of the other node", self.shutdown, || {
            let (_, output, _) = self.ask(machine, &["status", "--json"])?;
            let status: Value = serde_json::from_str(output.trim()).unwrap_or_default();
            let peers = status.pointer("/peers").and_then(Value::as_array);
            let known = peers.is_some_and(|peers| peers.iter().any(|it| it["name"] == peer));
            Ok(known.then_some(()))
        })
    }

    fn ping_until_direct(
        &self,
        options: &LabOptions,
        alice: &Machine,
        began: Instant,
        report: &mut Report,
    ) -> Result<()> {
        let patience = match options.expected_path() {
            PathKind::Direct if options.is_left_to_chance() => PATIENCE_CHANCE,
            PathKind::Direct => PATIENCE_DIRECT,
            _ => PATIENCE_RELAYED,
        };
        let timeout = patience + options.round_trip() * 5;
        let seconds = format!("{}s", timeout.as_secs().max(1));
        let args = words(["ping", "bob", "--until-direct", "--json", "--timeout", &seconds])
            .chain(words(["--socket"]))
            .chain([socket(self.directory, alice.name).into_os_string()])
            .collect();
        let mut node = Node::start(alice, self.directory, "ping", args, Stdout::Lines)?;
        let deadline = clock::now() + timeout + Duration::from_secs(5);
        let lines = node.lines();
        self.hear(&lines, deadline, began, report)?;
        let status = node.wait(deadline, self.shutdown)?;
        if report.pings.is_empty() || !may_end_so(status) {
            bail!("overlay ping bob has failed: {status}{}", node.log_tail());
        }
        Ok(())
    }

    fn hear(
        &self,
        lines: &Lines,
        deadline: Instant,
        began: Instant,
        report: &mut Report,
    ) -> Result<()> {
        while clock::now() < deadline {
            let (at, line) = match lines.next(Duration::from_millis(50)) {
                Next::Line(at, line) => (at, line),
                Next::Nothing => {
                    self.shutdown.check()?;
                    continue;
                }
                Next::End => return Ok(()),
            };
            let Some(pong) = serde_json::from_str(&line).ok().and_then(|it| read_pong(&it)) else {
                continue;
            };
            let since = milliseconds(at.saturating_duration_since(began));
            let is_direct = pong.path == PathKind::Direct;
            report.pong(pong);
            if report.first_reply_ms.is_none() {
                report.first_reply_ms = Some(since);
                report
                    .done("first-reply", &format!("first answer, {since:.1} ms after bob started"));
            }
            if is_direct && report.direct_ms.is_none() {
                report.direct_ms = Some(since);
                report.done("direct", &format!("direct path, {since:.1} ms after bob started"));
            }
        }
        bail!("overlay ping bob goes on for too long");
    }

    fn ask(&self, machine: &Machine, command: &[&str]) -> Result<(ExitStatus, String, String)> {
        let args = words(command.iter().copied())
            .chain(words(["--socket"]))
            .chain([socket(self.directory, machine.name).into_os_string()])
            .collect();
        run(machine, self.directory, args, self.shutdown)
    }
}

fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> impl Iterator<Item = OsString> {
    words.into_iter().map(OsString::from).collect::<Vec<_>>().into_iter()
}

/// A line of `overlay ping --json` that tells of an answer; the summary is none.
fn read_pong(line: &Value) -> Option<PingReport> {
    let path = line.get("path")?;
    Some(PingReport {
        seq: line.get("seq")?.as_u64()?,
        rtt_ms: line.get("rtt_ms")?.as_f64()?,
        path: serde_json::from_value(path.get("kind")?.clone()).ok()?,
        remote: path.get("remote").and_then(Value::as_str).map(str::to_owned),
    })
}

/// 7 is "answered, but only relayed", which is what some pairs must come to.
fn may_end_so(status: ExitStatus) -> bool {
    status.success() || status.code() == Some(ONLY_RELAYED)
}

const LISTEN: &str = "203.0.113.1:41820";
const ONLY_RELAYED: i32 = 7;
const KERNEL_PINGS: u16 = 3;

/// A direct path takes two seconds at most; a debug build on a busy machine gets more.
const PATIENCE_DIRECT: Duration = Duration::from_secs(15);

/// One run of birthday probing, and the cheap ways before it.
const PATIENCE_CHANCE: Duration = Duration::from_secs(20);

/// Long enough to show that no direct path comes.
const PATIENCE_RELAYED: Duration = Duration::from_secs(4);

/// A node that removes its interface and tells its peers needs far less.
const ORDERLY_END: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_and_the_summary_is_not_taken_for_one() {
        let line = r#"{"seq":2,"rtt_ms":0.8,"path":{"kind":"direct","remote":"203.0.113.20:5"}}"#;
        let pong = read_pong(&serde_json::from_str(line).unwrap()).unwrap();
        assert_eq!((pong.seq, pong.path), (2, PathKind::Direct));
        assert_eq!(pong.remote.as_deref(), Some("203.0.113.20:5"));
        let summary = r#"{"sent":2,"received":2,"min_ms":0.8,"avg_ms":1,"max_ms":2}"#;
        assert!(read_pong(&serde_json::from_str(summary).unwrap()).is_none());
    }
}
