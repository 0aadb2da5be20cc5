//! The program under test: servers and nodes in namespaces, asked by its commands and JSON.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::clock::{now, wait_for};
use crate::lab::{Host, Net};
use crate::process::{self, Daemon, Output};

/// The program under test.
pub(crate) fn binary() -> String {
    std::env::var("OVERLAY_TEST_BINARY")
        .unwrap_or_else(|_| env!("CARGO_BIN_EXE_overlay").to_owned())
}

/// The port that servers use in these tests, TCP and UDP.
pub(crate) const PORT: u16 = 41820;

/// A command that runs the program in the namespace of `host`.
pub(crate) fn overlay(host: &Host, args: &[&str]) -> Command {
    let mut command = host.ns.command(binary());
    command.args(args);
    command
}

/// Runs the program to its end.
pub(crate) fn call(host: &Host, args: &[&str]) -> Output {
    process::run(overlay(host, args), CALL_LIMIT)
}

/// Asserts that `output` is an error as the contract wants it, which says one of `words`.
pub(crate) fn assert_error(output: &Output, codes: &[i32], words: &[&str]) {
    let Output { code, stdout, stderr } = output;
    assert!(
        code.is_some_and(|code| codes.contains(&code)),
        "exit code {code:?}, wanted one of {codes:?}\n{stdout}{stderr}"
    );
    for part in ["error:", "cause:", "help:"] {
        let said = stderr.lines().filter(|line| line.starts_with(part)).count();
        assert_eq!(said, 1, "one line of stderr starts with `{part}`:\n{stderr}");
    }
    let text = stderr.to_lowercase();
    assert!(
        words.iter().any(|word| text.contains(word)),
        "stderr says none of {words:?}:\n{stderr}"
    );
}

/// A server; killed on drop.
pub(crate) struct Server {
    pub(crate) host: Host,
    dir: PathBuf,
    log: PathBuf,
    args: Vec<String>,
    /// More variables for its process.
    pub(crate) env: Vec<(&'static str, String)>,
    daemon: Option<Daemon>,
}

impl Server {
    /// Starts a server that listens on the address of `host` and waits until it answers.
    pub(crate) fn start(net: &Net, host: &Host) -> Self {
        let address = SocketAddr::from((host.address, PORT)).to_string();
        Self::start_at(net, host, &[&address], &[&address], "")
    }

    /// Starts a server with these addresses, and `config` as its file if it is not empty.
    pub(crate) fn start_at(
        net: &Net,
        host: &Host,
        listen: &[&str],
        public: &[&str],
        config: &str,
    ) -> Self {
        let mut server = Self::prepare(net, host, "server", listen, public, config);
        server.run();
        server.wait_ready();
        server
    }

    /// Prepares a server without starting it; `name` tells two servers of one host apart.
    pub(crate) fn prepare(
        net: &Net,
        host: &Host,
        name: &str,
        listen: &[&str],
        public: &[&str],
        config: &str,
    ) -> Self {
        let dir = net.dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        let mut args = vec!["server".to_owned()];
        args.extend(listen.iter().flat_map(|ip| ["--listen".to_owned(), (*ip).to_owned()]));
        args.extend(public.iter().flat_map(|ip| ["--public-addr".to_owned(), (*ip).to_owned()]));
        args.extend(["--state-dir".to_owned(), path(&dir.join("state"))]);
        args.extend(["--socket".to_owned(), path(&dir.join("socket"))]);
        args.extend(config_args(&dir, "server.toml", config));
        let log = net.log_file(name);
        Self { host: host.clone(), dir, log, args, env: Vec::new(), daemon: None }
    }

    /// Starts the process; see `wait_ready`.
    pub(crate) fn run(&mut self) {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let mut command = overlay(&self.host, &args);
        command.envs(self.env.iter().cloned());
        self.daemon = Some(Daemon::start(command, &self.log));
    }

    /// Starts the process by a command that ends in the program and its words; see `wait_ready`.
    pub(crate) fn run_by(&mut self, mut before: Command) {
        before.arg(binary()).args(&self.args);
        self.daemon = Some(Daemon::start(before, &self.log));
    }

    pub(crate) fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("the server was started")
    }

    /// Runs the server in the foreground until it ends by itself.
    pub(crate) fn run_to_end(&self) -> Output {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        call(&self.host, &args)
    }

    pub(crate) fn wait_ready(&mut self) {
        wait_for("the server answers on its socket", START_LIMIT, || {
            let daemon = self.daemon.as_mut().expect("the server was started");
            if let Some(status) = daemon.exit() {
                panic!("the server ended with {status}\n{}", daemon.log());
            }
            (self.cli(&["nodes", "--json"]).code == Some(0)).then_some(())
        });
    }

    /// Ends it without a chance to say good-bye.
    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("the server runs");
        daemon.signal(Signal::SIGKILL);
        daemon.wait_exit(EXIT_LIMIT);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.daemon.as_ref().expect("the server runs").signal(signal);
    }

    /// Ends it as systemd does.
    pub(crate) fn stop(&mut self) {
        let mut daemon = self.daemon.take().expect("the server runs");
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait_exit(EXIT_LIMIT), Some(0), "the server ends cleanly");
    }

    pub(crate) fn process_id(&self) -> u32 {
        self.daemon.as_ref().expect("the server runs").id()
    }

    /// `overlay server ARGS`, at this server.
    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        let socket = path(&self.dir.join("socket"));
        let args = [&["server"], args, &["--socket", &socket]].concat();
        call(&self.host, &args)
    }

    /// A fresh join line, with these further flags of `invite`.
    pub(crate) fn invite(&self, flags: &[&str]) -> Value {
        let args = [&["invite", "--json"], flags].concat();
        let invite = parse(&self.cli(&args).success("server invite"));
        assert_eq!(invite["schema"], 1, "{invite}");
        invite
    }

    /// A fresh one-time join line.
    pub(crate) fn join(&self) -> String {
        text(&self.invite(&[]), "/join")
    }

    pub(crate) fn nodes(&self) -> Value {
        parse(&self.cli(&["nodes", "--json"]).success("server nodes"))
    }
}

/// A node; killed on drop.
pub(crate) struct Node {
    pub(crate) host: Host,
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    log: PathBuf,
    args: Vec<String>,
    /// More variables for its process.
    pub(crate) env: Vec<(&'static str, String)>,
    daemon: Option<Daemon>,
    /// When `overlay up` was started last.
    pub(crate) started: Instant,
}

impl Node {
    /// Prepares a node named after its host.
    pub(crate) fn new(net: &Net, host: &Host) -> Self {
        Self::with_config(net, host, &host.name, "")
    }

    /// Prepares a node with `config` as its file if it is not empty.
    pub(crate) fn with_config(net: &Net, host: &Host, name: &str, config: &str) -> Self {
        let dir = net.dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        let mut args = vec!["--state-dir".to_owned(), path(&dir.join("state"))];
        args.extend(["--socket".to_owned(), path(&dir.join("socket"))]);
        args.extend(config_args(&dir, "node.toml", config));
        let log = net.log_file(name);
        let host = host.clone();
        let (name, env) = (name.to_owned(), Vec::new());
        Self { host, name, dir, log, args, env, daemon: None, started: now() }
    }

    /// Enrols, starts, and waits until the node is connected.
    pub(crate) fn start(net: &Net, host: &Host, server: &Server) -> Self {
        let mut node = Self::new(net, host);
        node.up(&server.join());
        node.wait_connected();
        node
    }

    /// Gives the node another name than its folder and log have.
    pub(crate) fn call_itself(&mut self, name: &str) {
        name.clone_into(&mut self.name);
    }

    /// Further flags of `up`.
    pub(crate) fn add_args(&mut self, args: &[&str]) {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
    }

    /// The command `overlay up` with `join` (a join line, or nothing) and all flags.
    pub(crate) fn up_args(&self, join: &str) -> Vec<String> {
        let mut args = vec!["up".to_owned()];
        if !join.is_empty() {
            let file = self.dir.join("join");
            fs::write(&file, format!("{join}\n")).unwrap();
            args.push(format!("file:{}", file.display()));
        }
        args.extend(["--name".to_owned(), self.name.clone()]);
        args.extend(self.args.iter().cloned());
        args
    }

    /// Starts `overlay up` with a join line.
    pub(crate) fn up(&mut self, join: &str) {
        let args = self.up_args(join);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command = overlay(&self.host, &args);
        command.envs(self.env.iter().cloned());
        self.up_by(command);
    }

    /// Starts a command that is a form of `overlay up`.
    pub(crate) fn up_by(&mut self, command: Command) {
        self.started = now();
        self.daemon = Some(Daemon::start(command, &self.log));
    }

    /// Starts `overlay up` from what the state directory knows.
    pub(crate) fn up_again(&mut self) {
        self.up("");
    }

    /// `overlay down`, and at once what [`Self::up_again`] does.
    pub(crate) fn down_and_up(&mut self) {
        let mut old = self.daemon.take().expect("the node runs");
        self.cli(&["down"]).success("down");
        self.up_again();
        assert_eq!(old.wait_exit(EXIT_LIMIT), Some(0));
    }

    /// Runs `overlay up` in the foreground; for starts that are to fail.
    pub(crate) fn up_to_end(&self, join: &str) -> Output {
        let args = self.up_args(join);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        call(&self.host, &args)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn socket(&self) -> String {
        path(&self.dir.join("socket"))
    }

    pub(crate) fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("the node was started")
    }

    /// Ends it as systemd does, and returns the exit code.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        let mut daemon = self.daemon.take().expect("the node runs");
        daemon.signal(Signal::SIGTERM);
        daemon.wait_exit(EXIT_LIMIT)
    }

    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("the node runs");
        daemon.signal(Signal::SIGKILL);
        daemon.wait_exit(EXIT_LIMIT);
    }

    /// `overlay ARGS`, at this node.
    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        let socket = self.socket();
        call(&self.host, &[args, &["--socket", &socket]].concat())
    }

    /// What `overlay status --json` says, or `None` while it fails.
    pub(crate) fn status(&self) -> Option<Value> {
        let output = self.cli(&["status", "--json"]);
        (output.code == Some(0)).then(|| parse(&output.stdout))
    }

    /// Waits until the status is as `condition` wants it, and returns it.
    pub(crate) fn wait_status(
        &mut self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Value) -> bool,
    ) -> Value {
        let what = format!("{}: {what}", self.name);
        wait_for(&what, limit, || {
            if let Some(status) = self.daemon().exit() {
                panic!("{} ended with {status} before: {what}\n{}", self.name, self.log());
            }
            self.status().filter(&condition)
        })
        .0
    }

    pub(crate) fn wait_connected(&mut self) -> Value {
        self.wait_status("connected to the server", START_LIMIT, |status| {
            status["server"]["state"] == "connected"
        })
    }

    /// Waits until packets to `peer` take a path of this kind; returns the peer's status.
    pub(crate) fn wait_path(&mut self, peer: &str, kind: &str, limit: Duration) -> Value {
        let what = format!("path to {peer} is {kind}");
        let status = self.wait_status(&what, limit, |status| path_kind(status, peer) == kind);
        find_peer(&status, peer).clone()
    }

    /// What `overlay why PEER --json` says.
    pub(crate) fn why(&self, peer: &str) -> Value {
        parse(&self.cli(&["why", peer, "--json"]).success("why"))
    }

    /// Waits until `overlay why` gives one of these verdicts; returns all that it says.
    pub(crate) fn wait_verdict(&self, peer: &str, words: &[&str], limit: Duration) -> Value {
        let what = format!("{}: why {peer} says {words:?}", self.name);
        let mut said = String::new();
        wait_for(&what, limit, || {
            let why = self.why(peer);
            let verdict = text(&why, "/verdict/word");
            if verdict != said {
                eprintln!("{}: why {peer} says {verdict}", self.name);
                said.clone_from(&verdict);
            }
            words.contains(&&*verdict).then_some(why)
        })
        .0
    }

    pub(crate) fn path_kind(&self, peer: &str) -> String {
        self.status().map_or_else(String::new, |status| path_kind(&status, peer).to_owned())
    }

    pub(crate) fn ipv4(&self) -> String {
        text(&self.status().expect("the node runs"), "/self/ipv4")
    }

    pub(crate) fn ipv6(&self) -> String {
        text(&self.status().expect("the node runs"), "/self/ipv6")
    }
}

/// The entry of a peer in a status; null if it has none.
pub(crate) fn find_peer<'a>(status: &'a Value, name: &str) -> &'a Value {
    let peers = status["peers"].as_array();
    peers.and_then(|all| all.iter().find(|peer| peer["name"] == name)).unwrap_or(&Value::Null)
}

fn path_kind<'a>(status: &'a Value, peer: &str) -> &'a str {
    find_peer(status, peer)["path"]["kind"].as_str().unwrap_or_default()
}

/// Parses one JSON document.
pub(crate) fn parse(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or_else(|error| panic!("not JSON ({error}): {json}"))
}

/// The string at a JSON pointer.
pub(crate) fn text(value: &Value, pointer: &str) -> String {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_else(|| panic!("no text at {pointer} in {value}")).to_owned()
}

fn config_args(dir: &Path, name: &str, config: &str) -> Vec<String> {
    if config.is_empty() {
        return Vec::new();
    }
    let file = dir.join(name);
    fs::write(&file, config).unwrap();
    vec!["--config".to_owned(), path(&file)]
}

pub(crate) fn path(path: &Path) -> String {
    path.display().to_string()
}

/// A program that has not come up by then has failed.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(10);

/// A program that was told to end takes interfaces and routes away first.
pub(crate) const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// The longest that a command may take; most take milliseconds.
const CALL_LIMIT: Duration = Duration::from_secs(30);
