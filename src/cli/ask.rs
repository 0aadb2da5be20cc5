//! Asking the running node.

use std::path::PathBuf;

use clap::Args;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use super::fail::{Failure, NOT_RUNNING, PERMISSION};
use crate::config::paths::{Paths, Role};
use crate::daemon::node::Question;
use crate::io::local::{LocalClient, LocalError, Reply};

/// Where the running node is asked.
#[derive(Debug, Clone, Args)]
pub struct SocketArg {
    /// Socket of the running node
    #[arg(long, value_name = "PATH", env = "OVERLAY_SOCKET")]
    pub socket: Option<PathBuf>,
}

impl SocketArg {
    /// The socket to ask: the given one, the user's own, or the system's.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| Paths::socket_to_ask(Role::Node))
    }

    /// Asks a question that has one answer.
    ///
    /// # Errors
    /// When the daemon does not run, may not be asked, or says no.
    pub fn ask<A: DeserializeOwned>(&self, question: &Question) -> Result<A, Failure> {
        let mut answers = self.start(question)?;
        answers.next_answer()?.ok_or_else(|| Failure::new("the daemon hung up without an answer"))
    }

    /// Asks a question that has several answers.
    ///
    /// # Errors
    /// When the daemon does not run or may not be asked.
    pub fn start(&self, question: &Question) -> Result<Answers, Failure> {
        let runtime = runtime()?;
        let path = self.path();
        let client = runtime.block_on(async {
            let mut client = LocalClient::connect(&path).await?;
            client.ask(question).await?;
            Ok(client)
        });
        let client = client.map_err(failure)?;
        Ok(Answers { runtime, client })
    }
}

/// The answers to one question.
#[derive(Debug)]
pub struct Answers {
    runtime: Runtime,
    client: LocalClient,
}

impl Answers {
    /// The next answer, or none when the daemon hung up.
    ///
    /// # Errors
    /// When the daemon says no.
    pub fn next_answer<A: DeserializeOwned>(&mut self) -> Result<Option<A>, Failure> {
        let reply: Option<Reply<A>> = self.runtime.block_on(self.client.next()).map_err(failure)?;
        match reply {
            None => Ok(None),
            Some(Reply::Ok(answer)) => Ok(Some(answer)),
            Some(Reply::Error(refusal)) => {
                let failure = Failure::new(refusal.error).code(refusal.code);
                Err(match refusal.help {
                    Some(help) => failure.help(help),
                    None => failure,
                })
            }
        }
    }
}

/// A runtime for one command.
///
/// # Errors
/// When the kernel gives none.
pub(super) fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start").cause(error))
}

/// How a failed local socket is told.
pub(super) fn failure(error: LocalError) -> Failure {
    let text = error.to_string();
    match error {
        LocalError::NotRunning { path } => Failure::new("overlay does not run on this machine")
            .cause(format!("nobody listens on {}", path.display()))
            .help(
                "sudo overlay up (or sudo systemctl start overlay); after a first install: \
                 sudo overlay up JOINLINE",
            )
            .code(NOT_RUNNING),
        LocalError::Permission { path, source } => {
            Failure::new("no permission to talk to the running overlay")
                .cause(format!("{}: {source}", path.display()))
                .help("use sudo, or become a member of the group \"overlay\"")
                .code(PERMISSION)
        }
        LocalError::AlreadyRunning { .. }
        | LocalError::NotASocket { .. }
        | LocalError::Io { .. }
        | LocalError::NotUnderstood { .. }
        | LocalError::TimedOut => Failure::new("the running overlay does not answer").cause(text),
    }
}
