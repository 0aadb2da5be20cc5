//! The program as a process, and clients of it.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use overlay::daemon::server::{EventInfo, Question, StoreAnswer};
use overlay::io::clock::now;
use overlay::io::link::{Inbound, Link, connect};
use overlay::io::local::{LocalClient, Refusal, Reply};
use overlay::server::admin::{Answer, Invited, NodeInfo, Request};
use overlay::types::SecretKey;
use overlay::wire::control::{
    ClientMessage, Hello, InviteUse, ServerMessage, Welcome, decode, encode,
};
use overlay::wire::join::JoinLine;

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_overlay");
/// A start takes a tenth of a second; several run at once on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(30);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A directory with a server in it, running or not.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) address: SocketAddr,
}

impl Place {
    pub(crate) fn new() -> Self {
        // Free now, and with luck in a moment too.
        let probe = TcpListener::bind("127.0.0.1:0").unwrap();
        Self { dir: tempfile::tempdir().unwrap(), address: probe.local_addr().unwrap() }
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.state().join("server.db")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("server.sock")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// The command that runs the server, behind these words.
    pub(crate) fn command(&self, before: &[&str]) -> Command {
        let mut words = before.iter().copied().chain([PROGRAM]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words);
        command.args(["server", "--listen", &self.address.to_string()]);
        command.arg("--state-dir").arg(self.state());
        command.arg("--socket").arg(self.socket());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("OVERLAY_") {
                command.env_remove(name);
            }
        }
        let log = File::options().create(true).append(true).open(self.dir.path().join("log"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.unwrap());
        command
    }

    /// Starts it without waiting for anything.
    pub(crate) fn spawn(&self, before: &[&str]) -> Process {
        Process(self.command(before).spawn().unwrap())
    }

    /// Starts it and waits until it answers.
    pub(crate) async fn start(&self) -> Process {
        let mut process = self.spawn(&[]);
        self.ready(&mut process).await;
        process
    }

    pub(crate) async fn ready(&self, process: &mut Process) {
        let deadline = now() + READY_LIMIT;
        while self.try_ask(&Question::Admin(Request::Nodes)).await.is_none() {
            let ended = process.0.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended: {ended:?}\n{}", self.log());
            assert!(now() < deadline, "the server is not ready\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until it answers (true), or has ended.
    pub(crate) async fn ready_or_ended(&self, process: &mut Process, limit: Duration) -> bool {
        let deadline = now() + limit;
        while now() < deadline {
            if process.0.try_wait().unwrap().is_some() {
                return false;
            }
            if self.try_ask(&Question::Admin(Request::Nodes)).await.is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("neither ready nor ended\n{}", self.log());
    }

    /// One question; none when the server does not answer.
    pub(crate) async fn try_ask(&self, question: &Question) -> Option<serde_json::Value> {
        let asking = async {
            let mut client = LocalClient::connect(&self.socket()).await.ok()?;
            client.ask(question).await.ok()?;
            client.next().await.ok()?
        };
        tokio::time::timeout(ANSWER_LIMIT, asking).await.ok()?
    }

    /// What the server answers to the administrator; none when it has died.
    pub(crate) async fn ask(&self, request: Request) -> Option<Result<Answer, Refusal>> {
        let value = self.try_ask(&Question::Admin(request)).await?;
        match serde_json::from_value(value).unwrap() {
            Reply::Ok(answer) => Some(Ok(answer)),
            Reply::Error(refusal) => Some(Err(refusal)),
        }
    }

    pub(crate) async fn nodes(&self) -> Vec<NodeInfo> {
        match self.ask(Request::Nodes).await.unwrap().unwrap() {
            Answer::Nodes(list) => list.nodes,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn invite(&self, uses: u32) -> Invited {
        let request = Request::Invite { uses, ttl_s: 3600, name: None, tags: Vec::new() };
        match self.ask(request).await.unwrap().unwrap() {
            Answer::Invited(invited) => invited,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn events(&self) -> Vec<EventInfo> {
        let question = Question::Events { after: 0, limit: 100_000, first: true, follow: false };
        let value = self.try_ask(&question).await.unwrap();
        match serde_json::from_value(value).unwrap() {
            Reply::Ok(StoreAnswer::Events(events)) => events,
            other => panic!("{other:?}"),
        }
    }
}

/// A process that is killed when the test leaves it.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Waits until it has ended by itself.
    pub(crate) fn ended(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = now() + limit;
        while now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    pub(crate) async fn stop(mut self) {
        let id = i32::try_from(self.0.id()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGTERM)
            .unwrap();
        let status = tokio::task::spawn_blocking(move || self.ended(READY_LIMIT)).await.unwrap();
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kills what runs under strace, which would let go of it when it is killed itself.
pub(crate) fn kill_traced(mut process: Process) {
    let id = process.0.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    for child in children.split_whitespace() {
        let child = nix::unistd::Pid::from_raw(child.parse().unwrap());
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    process.0.wait().unwrap();
}

/// Joins, or logs in, as the node of this key; none when the server died on it.
pub(crate) async fn join(
    address: SocketAddr,
    line: &JoinLine,
    key: [u8; 32],
) -> Option<(Link, Result<Welcome, String>)> {
    let joining = async {
        let machine_key = SecretKey::from_bytes(key);
        let mut link = connect(&address.into(), &[line.server_key], &machine_key).await.ok()?;
        let mut node_key = key;
        node_key[31] ^= 0x40;
        let hello = Hello {
            min_version: 1,
            max_version: 1,
            software: "test".into(),
            node_key: SecretKey::from_bytes(node_key).public().0,
            name: Some("node".into()),
            invite: Some(InviteUse {
                id: line.invite.0,
                secret: line.secret.clone(),
                network: line.network.0,
            }),
            candidates: Vec::new(),
            instance: None,
            known: None,
        };
        let hello = ClientMessage { hello: Some(hello), ..Default::default() };
        link.sender.try_send_control(encode(&hello)).ok()?;
        loop {
            let Inbound::Control(bytes) = link.receiver.next().await.ok()? else { continue };
            let message: ServerMessage = decode(&bytes).unwrap();
            if let Some(welcome) = message.welcome {
                return Some((link, Ok(welcome)));
            }
            if let Some(refused) = message.refused {
                return Some((link, Err(format!("{refused:?}"))));
            }
        }
    };
    tokio::time::timeout(ANSWER_LIMIT, joining).await.ok()?
}

/// Runs a test that waits for things.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().unwrap().block_on(test)
}

/// Whether `strace` can be used here; without it a test is counted as skipped.
pub(crate) fn has_strace() -> bool {
    let tried = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    tried.is_ok_and(|output| output.status.success())
}

/// Copies the files of a directory.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}
