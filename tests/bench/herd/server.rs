//! The server under load: the real program as a process of its own, asked through its local socket
//! and weighed through `/proc`.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use overlay::io::clock;
use overlay::io::local::{LocalClient, Reply};
use overlay::server::admin::{Answer, Request};
use overlay::wire::join::JoinLine;

use crate::die;

const PROGRAM: &str = env!("CARGO_BIN_EXE_overlay");
const READY_LIMIT: Duration = Duration::from_secs(30);
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// How the server is run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    /// Nodes are told of everybody in a network of up to so many.
    pub(crate) whole_netmap_up_to: usize,
    /// The only core that it gets.
    pub(crate) core: Option<usize>,
    /// The address of this machine at which it listens.
    pub(crate) at: Ipv4Addr,
}

/// A server in a directory of its own.
pub(crate) struct Server {
    dir: tempfile::TempDir,
    wish: Wish,
    pub(crate) address: SocketAddr,
    process: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// CPU time and memory of a process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weight {
    pub(crate) cpu: Duration,
    pub(crate) rss_bytes: u64,
    pub(crate) peak_rss_bytes: u64,
}

impl Server {
    pub(crate) async fn start(wish: Wish) -> Self {
        let dir = tempfile::tempdir().unwrap_or_else(|error| die("a directory", &error));
        // Free now, and with luck in a moment too.
        let address = TcpListener::bind((wish.at, 0)).and_then(|probe| probe.local_addr());
        let address = address.unwrap_or_else(|error| die("a port", &error));
        let process = spawn(&dir, wish, address);
        let mut server = Self { dir, wish, address, process };
        server.ready().await;
        server
    }

    /// Ends it as the service manager would, and waits for that.
    pub(crate) fn stop(&mut self) {
        let pid = Pid::from_raw(self.process.id().cast_signed());
        kill(pid, Signal::SIGTERM).unwrap_or_else(|error| die("SIGTERM", &error));
        self.process.wait().unwrap_or_else(|error| die("the end of the server", &error));
    }

    /// Starts it again in its place; it may not answer yet.
    pub(crate) fn restart(&mut self) {
        self.process = spawn(&self.dir, self.wish, self.address);
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("server.sock")
    }

    pub(crate) async fn ready(&mut self) {
        let deadline = clock::now() + READY_LIMIT;
        while self.try_ask(&Request::InviteList).await.is_none() {
            if clock::now() > deadline || matches!(self.process.try_wait(), Ok(Some(_))) {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                die("a server that answers", &log);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn try_ask(&self, request: &Request) -> Option<Reply<Answer>> {
        let asking = async {
            let mut client = LocalClient::connect(&self.socket()).await.ok()?;
            client.ask(request).await.ok()?;
            client.next().await.ok()?
        };
        tokio::time::timeout(ANSWER_LIMIT, asking).await.ok()?
    }

    pub(crate) async fn ask(&self, request: Request) -> Answer {
        match self.try_ask(&request).await {
            Some(Reply::Ok(answer)) => answer,
            other => die("an answer of the server", &format!("{other:?}")),
        }
    }

    /// A join line for so many nodes.
    pub(crate) async fn invite(&self, uses: usize) -> JoinLine {
        let uses = u32::try_from(uses).unwrap_or(u32::MAX);
        let request = Request::Invite { uses, ttl_s: 3600, name: None, tags: Vec::new() };
        let Answer::Invited(invited) = self.ask(request).await else {
            die("an invite", &"the answer is another one")
        };
        invited.join.expose().parse().unwrap_or_else(|error| die("a join line", &error))
    }

    pub(crate) fn weight(&self) -> Weight {
        let place = PathBuf::from(format!("/proc/{}", self.process.id()));
        let stat = fs::read_to_string(place.join("stat")).unwrap_or_default();
        // The name of the program may hold anything; what follows its bracket are fields from 3 on.
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at - 3).and_then(|text| text.parse::<f64>().ok());
        let (Some(user), Some(system)) = (ticks(14), ticks(15)) else {
            die("/proc/PID/stat of the server", &stat)
        };
        let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        let status = fs::read_to_string(place.join("status")).unwrap_or_default();
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
            kib.unwrap_or_else(|| die(name, &status)) * 1024
        };
        Weight {
            cpu: Duration::from_secs_f64((user + system) / per_second as f64),
            rss_bytes: bytes("VmRSS"),
            peak_rss_bytes: bytes("VmHWM"),
        }
    }
}

fn spawn(dir: &tempfile::TempDir, wish: Wish, address: SocketAddr) -> Child {
    let config =
        format!("network = \"10.64.0.0/16\"\nwhole-netmap-up-to = {}\n", wish.whole_netmap_up_to);
    let path = dir.path().join("server.toml");
    fs::write(&path, config).unwrap_or_else(|error| die("a configuration", &error));
    let log = File::options().create(true).append(true).open(dir.path().join("log"));
    let mut command = match wish.core {
        Some(core) => {
            let mut command = Command::new("taskset");
            command.args(["-c", &core.to_string(), PROGRAM]);
            command
        }
        None => Command::new(PROGRAM),
    };
    command.args(["server", "--listen", &address.to_string()]);
    command.arg("--config").arg(&path);
    command.arg("--state-dir").arg(dir.path().join("state"));
    command.arg("--socket").arg(dir.path().join("server.sock"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OVERLAY_") {
            command.env_remove(name);
        }
    }
    let log = log.unwrap_or_else(|error| die("a log", &error));
    let started = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    started.unwrap_or_else(|error| die(PROGRAM, &error))
}
