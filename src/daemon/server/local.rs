//! The administrator's questions, from the local socket to the core and back.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::core::Event;
use crate::daemon::exit;
use crate::io::local::{LocalConnection, LocalListener, Peer, Refusal, Reply};
use crate::server::admin::{Answer, Request};

/// A commit takes milliseconds; a full disk or a locked store takes until here.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// Serves the socket for ever.
pub(super) async fn serve(listener: LocalListener, events: mpsc::Sender<Event>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(connection) => {
                    connections.spawn(answer_all(connection, events.clone()));
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

async fn answer_all(mut connection: LocalConnection, events: mpsc::Sender<Event>) {
    loop {
        let request = match connection.question::<Request>().await {
            Ok(Some(request)) => request,
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
        let reply = match answer(connection.peer, request, &events).await {
            Ok(answer) => Reply::Ok(answer),
            Err(refusal) => Reply::Error(refusal),
        };
        if let Err(error) = connection.answer(&reply).await {
            return debug!(%error, "local socket");
        }
    }
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
    let gone = || Refusal {
        code: exit::FAILED,
        error: "the server does not answer".into(),
        cause: "it is stopping, or it waits for its disk".into(),
        help: "look at what it does: systemctl status overlay-server".into(),
    };
    events.send(Event::Request { request, answer: sender }).await.map_err(|_| gone())?;
    timeout(ANSWER_LIMIT, receiver).await.map_err(|_| gone())?.map_err(|_| gone())?
}
