//! The local socket, which another daemon may have: who that is, and whether it is about to end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::local::{Question, STOPPING};
use super::state::is_known;
use super::{NodeOptions, StartError};
use crate::io::clock;
use crate::io::local::{LocalClient, LocalError, LocalListener, Reply};
use crate::wire::join::JoinLine;

/// How long a node that is about to end is waited for, and how often it is looked whether it has.
const ENDING: Duration = Duration::from_secs(5);
const ENDING_LOOK: Duration = Duration::from_millis(50);
/// How long a daemon may take to say what it is.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// What a daemon says of itself when it is asked for its status, of whichever kind it is.
#[derive(Debug, Deserialize)]
pub struct Said {
    /// Of a node.
    #[serde(rename = "self")]
    pub own: Option<Own>,
    /// Of a server.
    pub status: Option<IgnoredAny>,
}

/// What a node says of itself, as far as others look at it.
#[derive(Debug, Deserialize)]
pub struct Own {
    /// Older ones do not tell it.
    pub state_dir: Option<PathBuf>,
}

/// Who has the socket.
#[derive(Debug, PartialEq, Eq)]
enum Holder {
    /// A node that is about to end, or has just ended.
    Ending,
    /// A node, with its state directory where it tells that.
    Node(Option<PathBuf>),
    Server,
}

/// Takes the local socket. A node that is about to end still has it, and is waited for.
pub(super) async fn listen(options: &NodeOptions) -> Result<LocalListener, StartError> {
    let until = clock::now() + ENDING;
    loop {
        match LocalListener::bind(&options.socket).await {
            Err(LocalError::AlreadyRunning { path }) => {
                let holder = holder(&path).await;
                if clock::now() > until || holder != Holder::Ending {
                    return Err(refusal(options, path, holder));
                }
                tokio::time::sleep(ENDING_LOOK).await;
            }
            result => return Ok(result?),
        }
    }
}

/// Asks who serves the socket for its status, which node and server both know, each with an answer of its
/// own; none when it says nothing for `limit`.
///
/// # Errors
/// What the socket says.
pub async fn ask_for_status(
    socket: &Path,
    limit: Duration,
) -> Option<Result<Option<Reply<Said>>, LocalError>> {
    let asked = async {
        let mut client = LocalClient::connect(socket).await?;
        client.ask(&Question::Status).await?;
        client.next().await
    };
    tokio::time::timeout(limit, asked).await.ok()
}

async fn holder(socket: &Path) -> Holder {
    match ask_for_status(socket, ANSWER_LIMIT).await {
        Some(Ok(Some(Reply::Ok(Said { status: Some(_), .. })))) => Holder::Server,
        Some(Ok(Some(Reply::Ok(said)))) => Holder::Node(said.own.and_then(|own| own.state_dir)),
        Some(Ok(Some(Reply::Error(refusal)))) if refusal.error == STOPPING => Holder::Ending,
        // It has just ended.
        Some(Ok(None) | Err(LocalError::NotRunning { .. })) => Holder::Ending,
        Some(Ok(Some(Reply::Error(_))) | Err(_)) | None => Holder::Node(None),
    }
}

/// Another daemon serves the socket: if it is the same node, that is an error only where it lacks what
/// the join line says.
fn refusal(options: &NodeOptions, socket: PathBuf, holder: Holder) -> StartError {
    let wanted = absolute(&options.state_dir);
    match holder {
        Holder::Server => return StartError::ServerAnswers { socket },
        Holder::Node(Some(runs)) if runs != wanted => {
            return StartError::RunsElsewhere { socket, runs, wanted };
        }
        Holder::Node(_) | Holder::Ending => {}
    }
    let known = |join: &JoinLine| is_known(&options.state_dir, join);
    match options.join.as_ref().is_none_or(known) {
        true => StartError::AlreadyRunning { socket },
        false => StartError::RunsOtherwise { socket },
    }
}

/// The same directory has one such name, whichever way it was written; one that is not there, or may not
/// be looked at, is taken as written.
pub(super) fn absolute(dir: &Path) -> PathBuf {
    let written = || std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
    dir.canonicalize().unwrap_or_else(|_| written())
}
