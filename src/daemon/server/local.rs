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
use crate::io::local::{LocalConnection, LocalError, LocalListener, Peer, Refusal, Reply};
use crate::server::admin::{Answer, Removal, Request, SCHEMA, rfc3339};
use crate::store::StoredEvent;

/// A commit takes milliseconds; a full disk or a locked store takes until here.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// So long a removal waits for the nodes to take note of it.
const ACKNOWLEDGE_LIMIT: Duration = Duration::from_secs(2);
/// How often it looks.
const ACKNOWLEDGE_POLL: Duration = Duration::from_millis(20);

/// A client that follows hears an empty list when nothing has come for so long: who hears nothing at
/// all takes the server for dead.
pub const FOLLOW_QUIET: Duration = Duration::from_secs(10);
/// Events in one answer to a client that follows them.
const FOLLOWED_AT_ONCE: u32 = 10_000;

/// A question on the local socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// Events.
    Events {
        /// Only those after this number.
        after: u64,
        /// So many at most.
        limit: u32,
        /// The first of these, rather than the newest.
        #[serde(default)]
        first: bool,
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
    /// Its number; they rise without gaps, but for one before each `network-restored`.
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
            Err(error @ LocalError::NotUnderstood { .. }) => {
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
            Err(error) => return debug!(%error, "local socket"),
        };
        let answered = match question {
            Question::Admin(request) => {
                let mut result = answer(connection.peer, request, &events).await;
                if let Ok(Answer::Removed(removal)) = &mut result {
                    wait_for_nodes(connection.peer, removal, &events).await;
                }
                connection.answer(&reply(result)).await
            }
            Question::Events { after, limit, first, follow: true } => {
                let asked = Followed { after, limit, first };
                return follow(connection, asked, FOLLOW_QUIET, &events, newest).await;
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

/// What a client that follows the log has asked for.
#[derive(Debug, Clone, Copy)]
struct Followed {
    after: u64,
    limit: u32,
    first: bool,
}

/// Sends the events that there are and those that come, until the client hangs up; and an empty list
/// when none has come for `quiet`.
async fn follow(
    mut connection: LocalConnection,
    asked: Followed,
    quiet: Duration,
    events: &mpsc::Sender<Event>,
    mut newest: watch::Receiver<u64>,
) {
    let Followed { mut after, mut limit, mut first } = asked;
    loop {
        let newest_then = *newest.borrow_and_update();
        let question = Question::Events { after, limit, first, follow: false };
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
        // Who asks for the newest does not want those before them; of the first, more come next.
        let known = if first { after } else { after.max(newest_then) };
        after = seen.map_or(known, |seen| seen.max(known));
        (limit, first) = (FOLLOWED_AT_ONCE, true);
        while *newest.borrow() <= after {
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = connection.hung_up() => return,
                () = sleep(quiet) => {
                    let nothing = Reply::Ok(StoreAnswer::Events(Vec::new()));
                    if let Err(error) = connection.answer(&nothing).await {
                        return debug!(%error, "local socket");
                    }
                }
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

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;

    use super::*;
    use crate::io::local::LocalClient;

    fn info(seq: u64) -> EventInfo {
        let (at, kind, actor) = (0, "kind".to_string(), "test".to_string());
        let event = crate::store::Event { at, kind, actor, body: "{}".into() };
        EventInfo::from(StoredEvent { seq, event })
    }

    /// Answers as a core whose log has as many events as `newest` says.
    fn core(newest: watch::Receiver<u64>) -> (mpsc::Sender<Event>, JoinHandle<()>) {
        let (sender, mut inbox) = mpsc::channel(1);
        let answering = tokio::spawn(async move {
            while let Some(event) = inbox.recv().await {
                let Event::Look { question, answer } = event else { panic!("{event:?}") };
                let Question::Events { after, limit, first, follow: false } = question else {
                    panic!("{question:?}")
                };
                let all: Vec<u64> = (after + 1..=*newest.borrow()).collect();
                let limit = limit as usize;
                let skipped = if first { 0 } else { all.len().saturating_sub(limit) };
                let list = all.into_iter().skip(skipped).take(limit).map(info).collect();
                answer.send(Ok(StoreAnswer::Events(list))).unwrap();
            }
        });
        (sender, answering)
    }

    /// The numbers in the next answer that is not empty.
    async fn next(client: &mut LocalClient) -> Vec<u64> {
        loop {
            let reply = client.next::<Reply<StoreAnswer>>().await.unwrap().unwrap();
            let Reply::Ok(StoreAnswer::Events(list)) = reply else { panic!("{reply:?}") };
            if !list.is_empty() {
                return list.iter().map(|event| event.seq).collect();
            }
        }
    }

    #[tokio::test]
    async fn who_follows_the_log_misses_nothing_and_hears_that_the_server_lives() {
        let dir = tempfile::tempdir().unwrap();
        let listener = LocalListener::bind(&dir.path().join("sock")).await.unwrap();
        for (after, limit, first, shown) in [
            (0, 0, false, &[][..]),
            (0, 2, false, &[149, 150]),
            (147, u32::MAX, true, &[148, 149, 150]),
            (10, 2, true, &[11, 12]),
        ] {
            let (newest, watched) = watch::channel(150);
            let (events, answering) = core(watched.clone());
            let mut client = LocalClient::connect(&dir.path().join("sock")).await.unwrap();
            let connection = listener.accept().await.unwrap();
            let asked = Followed { after, limit, first };
            let quiet = Duration::from_millis(1);
            let serving = tokio::spawn(async move {
                follow(connection, asked, quiet, &events, watched).await;
            });
            if !shown.is_empty() {
                assert_eq!(next(&mut client).await, shown);
            }
            if shown == [11, 12] {
                assert_eq!(next(&mut client).await, (13..=150).collect::<Vec<_>>());
            }
            for _ in 0..3 {
                let reply = client.next::<Reply<StoreAnswer>>().await.unwrap().unwrap();
                assert_eq!(reply, Reply::Ok(StoreAnswer::Events(Vec::new())), "it lives");
            }
            newest.send_replace(152);
            assert_eq!(next(&mut client).await, [151, 152], "after {after}, {limit} at most");
            drop(client);
            serving.await.unwrap();
            answering.await.unwrap();
        }
    }
}
