//! The administrator's questions, from the local socket to the core and back.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::backup::SecretText;
use super::core::Event;
use super::status::ServerStatus;
use crate::daemon::exit;
use crate::io::local::{LocalConnection, LocalListener, Peer, Refusal, Reply};
use crate::server::admin::{Answer, Removal, Request, SCHEMA, rfc3339};
use crate::store::StoredEvent;

/// A commit takes milliseconds; a full disk or a locked store takes until here.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// So long a removal waits for the nodes to take note of it.
const ACKNOWLEDGE_LIMIT: Duration = Duration::from_secs(2);
/// How often it looks.
const ACKNOWLEDGE_POLL: Duration = Duration::from_millis(20);

/// Events in one answer to a client that follows them.
const FOLLOWED_AT_ONCE: u32 = 10_000;

/// A question on the local socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// The newest events.
    Events {
        /// Only those after this number.
        after: u64,
        /// So many at most.
        limit: u32,
        /// And then those that come.
        follow: bool,
    },
    /// Everything, for a file.
    Backup,
    /// What the server does.
    Status,
    /// What the state machine answers.
    #[serde(untagged)]
    Admin(Request),
}

/// An answer that is not the state machine's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreAnswer {
    /// Events, oldest first.
    Events(Vec<EventInfo>),
    /// The text of a backup file.
    Backup(SecretText),
    /// What the server does.
    Status(ServerStatus),
}

/// One line of `overlay server events --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventInfo {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// Its number; they rise without gaps.
    pub seq: u64,
    /// When (RFC 3339, UTC).
    pub at: String,
    /// What happened, like `node-joined`.
    pub kind: String,
    /// Who did it.
    pub actor: String,
    /// What came of it; a change that was not made is not in the log.
    pub result: String,
    /// To what it was done.
    pub fields: BTreeMap<String, String>,
}

impl From<StoredEvent> for EventInfo {
    fn from(StoredEvent { seq, event }: StoredEvent) -> Self {
        Self {
            schema: SCHEMA,
            seq,
            at: rfc3339(event.at),
            kind: event.kind,
            actor: event.actor,
            result: "done".into(),
            // A line that cannot be read is still a line.
            fields: serde_json::from_str(&event.body).unwrap_or_default(),
        }
    }
}

/// Serves the socket for ever.
pub(super) async fn serve(
    listener: LocalListener,
    events: mpsc::Sender<Event>,
    newest: watch::Receiver<u64>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(connection) => {
                    connections.spawn(answer_all(connection, events.clone(), newest.clone()));
                }
                Err(error) => {
                    warn!(%error, "cannot accept on the local socket");
                    sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer_all(
    mut connection: LocalConnection,
    events: mpsc::Sender<Event>,
    newest: watch::Receiver<u64>,
) {
    loop {
        let question = match connection.question::<Question>().await {
            Ok(Some(question)) => question,
            Ok(None) => return,
            Err(error) => {
                debug!(%error, "local socket");
                let refusal = Refusal {
                    code: exit::USAGE,
                    error: "the server does not understand the question".into(),
                    cause: error.to_string(),
                    help: "use the same version for command and server (overlay version), and \
                           restart the server if it was replaced"
                        .into(),
                };
                let _ = connection.answer(&Reply::<Answer>::Error(refusal)).await;
                return;
            }
        };
        let answered = match question {
            Question::Admin(request) => {
                let mut result = answer(connection.peer, request, &events).await;
                if let Ok(Answer::Removed(removal)) = &mut result {
                    wait_for_nodes(connection.peer, removal, &events).await;
                }
                connection.answer(&reply(result)).await
            }
            Question::Events { after, limit, follow: true } => {
                return follow(connection, after, limit, &events, newest).await;
            }
            question => {
                let reply = reply(look(connection.peer, question, &events).await);
                connection.answer(&reply).await
            }
        };
        if let Err(error) = answered {
            return debug!(%error, "local socket");
        }
    }
}

fn reply<T>(result: Result<T, Refusal>) -> Reply<T> {
    match result {
        Ok(answer) => Reply::Ok(answer),
        Err(refusal) => Reply::Error(refusal),
    }
}

/// Sends the events that there are and those that come, until the client hangs up.
async fn follow(
    mut connection: LocalConnection,
    mut after: u64,
    mut limit: u32,
    events: &mpsc::Sender<Event>,
    mut newest: watch::Receiver<u64>,
) {
    loop {
        newest.mark_unchanged();
        let question = Question::Events { after, limit, follow: false };
        let answer = look(connection.peer, question, events).await;
        let seen = match &answer {
            Ok(StoreAnswer::Events(list)) => list.last().map(|event| event.seq),
            _ => None,
        };
        let failed = answer.is_err();
        // The first answer is sent also when there is nothing in it.
        if let Err(error) = connection.answer(&reply(answer)).await {
            return debug!(%error, "local socket");
        }
        if failed {
            return;
        }
        after = seen.unwrap_or(after).max(after);
        limit = FOLLOWED_AT_ONCE;
        while *newest.borrow() <= after {
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = connection.hung_up() => return,
            }
        }
    }
}

fn gone() -> Refusal {
    Refusal {
        code: exit::FAILED,
        error: "the server does not answer".into(),
        cause: "it is stopping, or it waits for its disk".into(),
        help: "look at what it does: systemctl status overlay-server".into(),
    }
}

async fn look(
    peer: Peer,
    question: Question,
    events: &mpsc::Sender<Event>,
) -> Result<StoreAnswer, Refusal> {
    if question == Question::Backup && !peer.may_write {
        return Err(Refusal {
            code: exit::PERMISSION,
            error: "this user may not have a backup".into(),
            cause: "it holds the server's secret key; only root and the server's own user may"
                .into(),
            help: "type the same command with sudo".into(),
        });
    }
    let (sender, receiver) = oneshot::channel();
    events.send(Event::Look { question, answer: sender }).await.map_err(|_| gone())?;
    timeout(ANSWER_LIMIT, receiver).await.map_err(|_| gone())?.map_err(|_| gone())?
}

async fn answer(
    peer: Peer,
    request: Request,
    events: &mpsc::Sender<Event>,
) -> Result<Answer, Refusal> {
    if request.is_write() && !peer.may_write {
        return Err(Refusal {
            code: exit::PERMISSION,
            error: "this user may not change the network".into(),
            cause: "only root and the server's own user may; others may only look".into(),
            help: "type the same command with sudo".into(),
        });
    }
    let (sender, receiver) = oneshot::channel();
    let actor = format!("administrator uid {}", peer.uid);
    events.send(Event::Request { actor, request, answer: sender }).await.map_err(|_| gone())?;
    timeout(ANSWER_LIMIT, receiver).await.map_err(|_| gone())?.map_err(|_| gone())?
}

/// Waits until every node that is online has put a removal into effect, for a while.
async fn wait_for_nodes(peer: Peer, removal: &mut Removal, events: &mpsc::Sender<Event>) {
    let waiting = async {
        while !removal.progress.waiting.is_empty() {
            sleep(ACKNOWLEDGE_POLL).await;
            let request = Request::Acknowledged { epoch: removal.epoch };
            // The removal itself is done: a server that stops meanwhile makes it no failure.
            let Ok(Answer::Acknowledged(progress)) = answer(peer, request, events).await else {
                return;
            };
            removal.progress = progress;
        }
    };
    let _ = timeout(ACKNOWLEDGE_LIMIT, waiting).await;
}
