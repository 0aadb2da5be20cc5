//! Asking the running daemons, node or server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::fail::{Failure, NO_REPLY, NOT_ENROLLED, NOT_RUNNING, PERMISSION, USAGE};
use super::runtime;
use crate::config::node::NodeConfig;
use crate::config::paths::{Paths, Role};
use crate::config::{self, ConfigError, Wanted};
use crate::daemon::node::{Question, Said, ask_for_status};
use crate::io::local::{LocalClient, LocalError, Reply};

/// A daemon that says nothing for so long hangs. Of a node the slowest answer, that to `netcheck`,
/// takes half of it; a server says after 15 s that its store does not take a change.
fn answer_limit(role: Role) -> Duration {
    match role {
        Role::Node => Duration::from_secs(8),
        Role::Server => Duration::from_secs(20),
    }
}

/// How often and how long apart it is looked whether a daemon that has hung up is gone.
const GONE_LOOKS: u32 = 5;
const GONE_LOOK: Duration = Duration::from_millis(100);
/// How long a daemon may take to say whether it is a node or a server.
const ASIDE_LIMIT: Duration = Duration::from_secs(2);

/// Where the running node is asked.
#[derive(Debug, Clone, Args)]
pub struct SocketArg {
    /// Socket of the running node
    #[arg(long, value_name = "PATH", env = "OVERLAY_SOCKET")]
    pub socket: Option<PathBuf>,
}

impl SocketArg {
    /// The socket to ask: the given one, or where the configuration files say, the user's own or the
    /// system's.
    ///
    /// # Errors
    /// When `OVERLAY_CONFIG` names the file of a server.
    pub fn path(&self) -> Result<PathBuf, Failure> {
        if let Some(socket) = &self.socket {
            return Ok(socket.clone());
        }
        let file = std::env::var_os("OVERLAY_CONFIG").filter(|file| !file.is_empty());
        let Some(file) = file else { return Ok(Paths::socket_to_ask(Role::Node)) };
        let named = match config::load_file::<NodeConfig>(Path::new(&file), Wanted::IfThere) {
            Ok(config) => config.socket,
            Err(error @ ConfigError::OtherRole { .. }) => return Err(error.into()),
            // Who asks may have no right to read it, and the daemon goes on with what it has read
            // before.
            Err(_) => None,
        };
        Ok(Paths::socket_of_file(Role::Node, named))
    }

    /// Asks the node a question that has one answer.
    ///
    /// # Errors
    /// When the daemon does not run, may not be asked, or says no.
    pub fn ask<A: DeserializeOwned>(&self, question: &Question) -> Result<A, Failure> {
        ask(Role::Node, &self.path()?, question)
    }

    /// Asks the node a question that has several answers.
    ///
    /// # Errors
    /// When the daemon does not run or may not be asked.
    pub fn start(&self, question: &Question) -> Result<Answers, Failure> {
        Answers::to(Role::Node, &self.path()?, question)
    }
}

/// Asks the daemon of this role behind `socket` a question that has one answer.
pub(super) fn ask<Q: Serialize, A: DeserializeOwned>(
    role: Role,
    socket: &Path,
    question: &Q,
) -> Result<A, Failure> {
    let mut answers = Answers::to(role, socket, question)?;
    answers.next_answer()?.ok_or_else(|| answers.ended())
}

/// What came next of a row of answers.
pub(super) enum Next<A> {
    Answer(A),
    /// The daemon has ended it.
    HungUp,
    /// The user has, by Ctrl-C.
    Interrupted,
}

/// The answers to one question.
#[derive(Debug)]
pub struct Answers {
    role: Role,
    socket: PathBuf,
    runtime: Runtime,
    client: LocalClient,
    /// Ctrl-C, where it ends the row and not the program.
    interrupt: Option<Signal>,
}

impl Answers {
    pub(super) fn to<Q: Serialize>(
        role: Role,
        socket: &Path,
        question: &Q,
    ) -> Result<Self, Failure> {
        let runtime = runtime::on_this_thread()?;
        let client = runtime.block_on(async {
            let mut client = LocalClient::connect(socket).await?;
            client.ask(question).await?;
            Ok(client)
        });
        let client = client.map_err(|error| unanswered(role, &error))?;
        Ok(Self { role, socket: socket.to_path_buf(), runtime, client, interrupt: None })
    }

    /// From here on Ctrl-C ends the row of answers, and the command tells what it has.
    pub(super) fn end_on_interrupt(&mut self) {
        let _inside = self.runtime.enter();
        // Where the kernel gives no handler it ends the program, as ever.
        self.interrupt = signal(SignalKind::interrupt()).ok();
    }

    /// The next answer, or none when the daemon hung up.
    ///
    /// # Errors
    /// When the daemon says no.
    pub fn next_answer<A: DeserializeOwned>(&mut self) -> Result<Option<A>, Failure> {
        match self.next()? {
            Next::Answer(answer) => Ok(Some(answer)),
            Next::HungUp | Next::Interrupted => Ok(None),
        }
    }

    /// What comes next of the row.
    ///
    /// # Errors
    /// When the daemon says no.
    pub(super) fn next<A: DeserializeOwned>(&mut self) -> Result<Next<A>, Failure> {
        let limit = answer_limit(self.role);
        let Self { runtime, client, interrupt, .. } = self;
        let reply: Option<Result<Option<Reply<A>>, _>> = runtime.block_on(async {
            let interrupted = async {
                match interrupt {
                    Some(signal) => signal.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = interrupted => None,
                next = tokio::time::timeout(limit, client.next()) => {
                    Some(next.unwrap_or(Err(LocalError::TimedOut)))
                }
            }
        });
        let Some(reply) = reply else { return Ok(Next::Interrupted) };
        match reply {
            Ok(None) => Ok(Next::HungUp),
            Ok(Some(Reply::Ok(answer))) => Ok(Next::Answer(answer)),
            Ok(Some(Reply::Error(refusal))) if refusal.code != USAGE => Err(refusal.into()),
            Ok(Some(Reply::Error(refusal))) => Err(self.other_daemon().unwrap_or(refusal.into())),
            Err(error @ LocalError::NotUnderstood { .. }) => {
                Err(self.other_daemon().unwrap_or_else(|| unanswered(self.role, &error)))
            }
            Err(error) => Err(unanswered(self.role, &error)),
        }
    }

    /// How a command fails whose question the daemon does not understand, or whose answer makes no sense,
    /// where that is since the socket is the other daemon's.
    fn other_daemon(&self) -> Option<Failure> {
        let said = self.runtime.block_on(ask_for_status(&self.socket, ASIDE_LIMIT));
        let answers = match said?.ok()?? {
            Reply::Ok(Said { own: Some(_), .. }) => Role::Node,
            Reply::Ok(Said { status: Some(_), .. }) => Role::Server,
            // Only a node says that it has not joined yet.
            Reply::Error(refusal) if refusal.code == NOT_ENROLLED => Role::Node,
            Reply::Ok(_) | Reply::Error(_) => return None,
        };
        (answers != self.role).then(|| wrong_socket(self.role, &self.socket))
    }

    /// How a command fails that waited for more, when there is no more.
    pub(super) fn ended(&self) -> Failure {
        // A daemon that ends takes its commands with it, and its socket a moment later.
        let gone = self.runtime.block_on(async {
            for _ in 0..GONE_LOOKS {
                match LocalClient::connect(&self.socket).await {
                    Err(LocalError::NotRunning { .. }) => return true,
                    Ok(_) | Err(_) => tokio::time::sleep(GONE_LOOK).await,
                }
            }
            false
        });
        if gone {
            return Failure::new(
                format!("{} has stopped", running(self.role)),
                format!("nobody listens on {} any more", self.socket.display()),
                format!("start it again: {}; why it ended: {}", start(self.role), log(self.role)),
            )
            .code(NOT_RUNNING);
        }
        Failure::new(
            format!("{} hung up without an answer", running(self.role)),
            "it came to its end, or it serves too many other commands at this moment",
            format!("type the command again; if that does not help: {}", log(self.role)),
        )
    }
}

/// How a command fails that was told the socket of the other daemon.
fn wrong_socket(role: Role, socket: &Path) -> Failure {
    let socket = socket.display();
    let (error, cause, help) = match role {
        Role::Node => (
            "a server answers on this socket, not a node",
            format!("this command asks a node, and {socket} is the socket of a server"),
            "the server is asked with: overlay server status --socket PATH (or nodes, events ...); a \
             node with --socket PATH or OVERLAY_SOCKET, which both may be left out",
        ),
        Role::Server => (
            "a node answers on this socket, not a server",
            format!("this command asks a server, and {socket} is the socket of a node"),
            "the node is asked with: overlay status --socket PATH (or why, ping ...); a server with \
             --socket PATH or OVERLAY_SOCKET, which both may be left out",
        ),
    };
    Failure::new(error, cause, help).code(USAGE)
}

fn running(role: Role) -> &'static str {
    match role {
        Role::Node => "the running node",
        Role::Server => "the running server",
    }
}

fn log(role: Role) -> &'static str {
    match role {
        Role::Node => "journalctl -u overlay",
        Role::Server => "journalctl -u overlay-server",
    }
}

/// Why a daemon gives no answer.
fn unanswered(role: Role, error: &LocalError) -> Failure {
    match error {
        LocalError::NotRunning { path } => {
            let (error, help) = match role {
                Role::Node => (
                    "overlay does not run on this machine",
                    "sudo overlay up (as a service: sudo systemctl start overlay); on a machine \
                     that is new here: sudo overlay up JOINLINE",
                ),
                Role::Server => (
                    "no server runs on this machine",
                    "overlay server (as a service: sudo systemctl start overlay-server); one \
                     that runs elsewhere on this machine is named with --socket PATH",
                ),
            };
            let cause = format!("nobody listens on {}", path.display());
            Failure::new(error, cause, help).code(NOT_RUNNING)
        }
        LocalError::Permission { path, source } => Failure::new(
            format!("this user may not talk to {}", running(role)),
            format!("no permission to use {}: {source}", path.display()),
            "type the same command with sudo; beside a service the members of the group overlay \
             need none: sudo usermod -aG overlay USER, then log in again",
        )
        .code(PERMISSION),
        LocalError::NotUnderstood { .. } => Failure::caused_by(
            format!("{} gives an answer that makes no sense", running(role)),
            error,
            "restart it, if this program was replaced since it was started; else look at its \
             version: overlay version",
        ),
        LocalError::AlreadyRunning { .. }
        | LocalError::NotASocket { .. }
        | LocalError::Io { .. } => Failure::caused_by(
            format!("{} does not answer", running(role)),
            error,
            format!("look at what it says: {}", log(role)),
        ),
        LocalError::TimedOut => Failure::new(
            format!("{} does not answer", running(role)),
            format!("it took the question and was silent for {} s", answer_limit(role).as_secs()),
            format!("look at what it says: {}; then start it anew: {}", log(role), restart(role)),
        )
        .code(NO_REPLY),
    }
}

fn start(role: Role) -> &'static str {
    match role {
        Role::Node => "sudo overlay up (as a service: sudo systemctl start overlay)",
        Role::Server => "overlay server (as a service: sudo systemctl start overlay-server)",
    }
}

fn restart(role: Role) -> &'static str {
    match role {
        Role::Node => "sudo systemctl restart overlay",
        Role::Server => "sudo systemctl restart overlay-server",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::server::FOLLOW_QUIET;

    #[test]
    fn who_follows_the_log_hears_something_in_time() {
        assert!(answer_limit(Role::Server) >= FOLLOW_QUIET * 2);
    }

    #[test]
    fn a_daemon_that_does_not_run_is_named_by_its_role() {
        let error = LocalError::NotRunning { path: "/run/overlay/x.sock".into() };
        let node = unanswered(Role::Node, &error);
        let server = unanswered(Role::Server, &error);
        for failure in [&node, &server] {
            assert_eq!(failure.exit_code(), NOT_RUNNING);
            assert!(failure.to_string().contains("\ncause: nobody listens on /run/overlay/x.sock"));
        }
        assert!(node.to_string().contains("sudo overlay up"), "{node}");
        assert!(server.to_string().contains("help: overlay server"), "{server}");
    }
}
