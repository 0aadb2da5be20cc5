//! Answers to the command line. Each connection has a task; what it needs of the core it asks the
//! control task for.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use super::ping::{PingLine, PingPlan, ping};
use super::portmap::PortMapping;
use super::report::{OwnStatus, PeerReport, PunchReport, SCHEMA, ServerStatus, Status, millis};
use super::rotate::Rotated;
use super::{Daemon, Ended, explain, netcheck, taken};
use crate::daemon::exit;
use crate::io::clock;
use crate::io::local::{LocalConnection, LocalError, LocalListener, Refusal, Reply};
use crate::io::metrics::Page;
use crate::path::Answer;
use crate::types::NodeId;

/// How long the server is waited for when the node key is renewed.
const ROTATE_LIMIT: Duration = Duration::from_secs(6);
/// How often it is looked whether the server has told of a peer that it was asked for.
const SEEK_INTERVAL: Duration = Duration::from_millis(10);
/// How long that is looked for; the node gives up before.
const SEEK_LIMIT: Duration = Duration::from_secs(1);

/// What the command line asks a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// Everything that is known.
    Status,
    /// Ping a peer, one answer per ping.
    Ping {
        /// Name, address or id.
        peer: String,
        /// How often; none without end.
        count: Option<u64>,
        /// Stop at the first direct reply.
        until_direct: bool,
        /// Stop after this.
        timeout_ms: Option<u64>,
    },
    /// Why the path to a peer is what it is.
    Why {
        /// Name, address or id.
        peer: String,
    },
    /// What became of the paths to a peer.
    History {
        /// Name, address or id.
        peer: String,
    },
    /// Whether there is such a peer; of a large network it is in the status from then on.
    Find {
        /// Name, address or id.
        peer: String,
    },
    /// Measure the network in front of us.
    Netcheck,
    /// Renew the node key.
    Rotate,
    /// Stop the daemon.
    Down,
}

/// What a connection asks the control task.
pub(super) enum Request {
    Status(oneshot::Sender<Status>),
    Find(String, oneshot::Sender<Option<(NodeId, PingLine)>>),
    /// Has the server asked for a peer that we do not know; whether its answer is waited for.
    Seek(String, oneshot::Sender<bool>),
    Ping(NodeId, oneshot::Sender<Option<oneshot::Receiver<Answer>>>),
    Netcheck(oneshot::Sender<netcheck::Inputs>),
    /// Why nothing but that can be answered yet, if so.
    Unready(oneshot::Sender<Option<Refusal>>),
    Explain(explain::Request),
    Metrics(oneshot::Sender<Page>),
    Rotate(oneshot::Sender<Result<Rotated, Refusal>>),
    Down,
}

/// Serves the socket until this is dropped.
pub(super) struct LocalServer(JoinHandle<()>);

impl LocalServer {
    /// Removes the socket; when this returns, it is gone.
    pub(super) async fn end(mut self) {
        self.0.abort();
        // It was called off, which is what was wanted.
        let _ = (&mut self.0).await;
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(super) fn serve_local(listener: LocalListener, requests: mpsc::Sender<Request>) -> LocalServer {
    let accepting = async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(connection) => {
                        let requests = requests.clone();
                        connections.spawn(async move {
                            if let Err(error) = serve(connection, &requests).await {
                                tracing::debug!(%error, "a command went away");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "local socket");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    };
    LocalServer(tokio::spawn(accepting))
}

async fn serve(
    mut connection: LocalConnection,
    requests: &mpsc::Sender<Request>,
) -> Result<(), LocalError> {
    loop {
        let question = match connection.question().await {
            Ok(Some(question)) => question,
            Ok(None) => return Ok(()),
            Err(error @ LocalError::NotUnderstood { .. }) => {
                connection.answer(&Reply::<()>::Error(not_understood(&error))).await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let always = matches!(question, Question::Netcheck | Question::Down);
        if !always && let Some(Some(refusal)) = ask(requests, Request::Unready).await {
            connection.answer(&Reply::<()>::Error(refusal)).await?;
            continue;
        }
        match question {
            Question::Status => {
                let status = ask(requests, Request::Status).await;
                connection.answer(&or_stopping(status)).await?;
            }
            Question::Find { peer } => {
                seek(requests, &peer).await;
                let found = ask(requests, |sender| Request::Find(peer.clone(), sender)).await;
                connection
                    .answer(&match found {
                        Some(Some(_)) => Reply::Ok(()),
                        Some(None) => Reply::Error(unknown_peer(requests, &peer).await),
                        None => or_stopping(None),
                    })
                    .await?;
            }
            Question::Ping { peer, count, until_direct, timeout_ms } => {
                seek(requests, &peer).await;
                let limit = timeout_ms.map(Duration::from_millis);
                let plan = PingPlan { count, until_direct, limit };
                ping(&mut connection, requests, peer, plan).await?;
            }
            Question::Why { peer } => {
                seek(requests, &peer).await;
                let why = explain::why(requests, peer).await;
                connection.answer(&why.unwrap_or_else(|| or_stopping(None))).await?;
            }
            Question::History { peer } => {
                seek(requests, &peer).await;
                let history = explain::history(requests, peer).await;
                connection.answer(&history.unwrap_or_else(|| or_stopping(None))).await?;
            }
            Question::Netcheck => match ask(requests, Request::Netcheck).await {
                Some(inputs) => {
                    let halves = explain::ask_all(requests);
                    let (mut report, asked) = tokio::join!(netcheck::run(inputs), halves);
                    report.forecast = explain::forecast(requests, &report, asked).await;
                    connection.answer(&Reply::Ok(report)).await?;
                }
                None => connection.answer(&or_stopping::<()>(None)).await?,
            },
            Question::Down if connection.peer.may_write => {
                // Answered first: the daemon's end takes this connection with it.
                connection.answer(&Reply::Ok(())).await?;
                let _ = requests.send(Request::Down).await;
                return Ok(());
            }
            Question::Down => {
                let refusal = not_allowed("stop the node", "sudo overlay down");
                connection.answer(&Reply::<()>::Error(refusal)).await?;
            }
            Question::Rotate if connection.peer.may_write => {
                connection.answer(&rotate(requests).await).await?;
            }
            Question::Rotate => {
                let refusal = not_allowed("renew the node's key", "sudo overlay rotate");
                connection.answer(&Reply::<()>::Error(refusal)).await?;
            }
        }
    }
}

fn not_understood(error: &LocalError) -> Refusal {
    Refusal {
        code: exit::USAGE,
        error: "the node does not understand the question".into(),
        cause: error.to_string(),
        help: "use the same version for command and node (overlay version), and restart the node \
               if it was replaced"
            .into(),
    }
}

fn not_allowed(what: &str, help: &str) -> Refusal {
    Refusal {
        code: exit::PERMISSION,
        error: format!("this user may not {what}"),
        cause: "only root and the node's own user may; others may only look".into(),
        help: help.into(),
    }
}

/// Waits until the server has stored the new key, or for so long that it must be cut off.
async fn rotate(requests: &mpsc::Sender<Request>) -> Reply<Rotated> {
    match tokio::time::timeout(ROTATE_LIMIT, ask(requests, Request::Rotate)).await {
        Ok(Some(Ok(rotated))) => Reply::Ok(rotated),
        Ok(Some(Err(refusal))) => Reply::Error(refusal),
        Ok(None) => or_stopping(None),
        Err(_) => Reply::Error(Refusal {
            code: exit::FAILED,
            error: "the server has not confirmed the new node key yet".into(),
            cause: "it does not answer, or cannot write to its disk".into(),
            help: "nothing is lost: the new key is stored here, the old one is good until the \
                   server has the new one, and it is told again by itself; overlay status shows it"
                .into(),
        }),
    }
}

/// The error of whoever asks a node that is about to end.
pub(super) const STOPPING: &str = "the node does not answer any more";

pub(super) fn or_stopping<T>(answer: Option<T>) -> Reply<T> {
    answer.map_or_else(
        || {
            Reply::Error(Refusal {
                code: exit::NOT_RUNNING,
                error: STOPPING.into(),
                cause: "it is about to end: it was stopped, or removed from its network".into(),
                help: "sudo overlay up (as a service: sudo systemctl start overlay)".into(),
            })
        },
        Reply::Ok,
    )
}

/// There is no such peer; the node itself is none.
pub(super) async fn unknown_peer(requests: &mpsc::Sender<Request>, text: &str) -> Refusal {
    let own = ask(requests, Request::Status).await.map(|status| status.own);
    let is_own = own.is_some_and(|own| {
        let [ipv4, ipv6] = [IpAddr::from(own.ipv4), IpAddr::from(own.ipv6)];
        own.name.eq_ignore_ascii_case(text)
            || own.id == text
            || text.parse().is_ok_and(|ip: IpAddr| ip == ipv4 || ip == ipv6)
    });
    let cause = if is_own {
        "it is this node itself, and a peer is another one"
    } else {
        "it is no name, overlay address or id of a node in this network"
    };
    Refusal {
        code: exit::UNKNOWN_PEER,
        error: format!("no peer is called \"{text}\""),
        cause: cause.into(),
        help: "overlay status (it lists all peers)".into(),
    }
}

pub(super) async fn ask<T>(
    requests: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Option<T> {
    let (sender, receiver) = oneshot::channel();
    requests.send(request(sender)).await.ok()?;
    receiver.await.ok()
}

/// Gives the server of a large network the time to tell of a peer that we do not know.
async fn seek(requests: &mpsc::Sender<Request>, text: &str) {
    let end = clock::now() + SEEK_LIMIT;
    let again = |sender| Request::Seek(text.into(), sender);
    while clock::now() < end && ask(requests, again).await == Some(true) {
        tokio::time::sleep(SEEK_INTERVAL).await;
    }
}

impl Daemon {
    fn punching(&self) -> PunchReport {
        let counters = self.node.punch_counters();
        PunchReport {
            birthday_probing: self.options.settings.birthday_probing,
            birthday_runs: counters.birthday_runs,
            fresh_ports: counters.fresh_ports,
            found: counters.found,
            sockets: counters.sockets,
            sockets_open: self.node.extra_sockets(),
            probes: counters.probes,
        }
    }

    /// From here on every command is told that the node is about to end.
    pub(super) fn refuse_requests(&mut self) {
        self.requests.close();
        while self.requests.try_recv().is_ok() {}
    }

    pub(super) fn handle_request(&mut self, request: Request) {
        let now = clock::now();
        // A command that went away meanwhile does not take its answer; that is no error.
        match request {
            Request::Status(reply) => {
                if let Some(status) = self.status() {
                    let _ = reply.send(status);
                }
            }
            Request::Find(text, reply) => {
                let found = self.node.netmap().find(&text).and_then(|id| {
                    let status = self.node.peer_status(id, now)?;
                    let line = PingLine {
                        seq: 0,
                        name: status.name.to_string(),
                        ipv4: status.addrs.v4,
                        rtt_ms: None,
                        kind: status.path.as_str().into(),
                        remote: status.remote.map(|remote| remote.to_string()),
                    };
                    Some((id, line))
                });
                let _ = reply.send(found);
            }
            Request::Seek(text, reply) => {
                let known = self.node.netmap().find(&text).is_some();
                let _ = reply.send(!known && self.node.want_peer(&text, now));
            }
            Request::Ping(id, reply) => {
                let (sender, receiver) = oneshot::channel();
                self.next_token += 1;
                self.pings.retain(|_, sender| !sender.is_closed());
                let sent = self.node.ping(id, self.next_token, now).is_some();
                if sent {
                    self.pings.insert(self.next_token, sender);
                }
                let _ = reply.send(sent.then_some(receiver));
            }
            Request::Netcheck(reply) => {
                let _ = reply.send(self.netcheck_inputs());
            }
            Request::Unready(reply) => {
                let _ = reply.send((!self.ready).then(|| self.not_enrolled_yet()));
            }
            Request::Explain(request) => self.handle_explain(request, now),
            Request::Rotate(reply) => self.handle_rotate(reply),
            Request::Metrics(reply) => {
                let _ = reply.send(self.metrics());
            }
            Request::Down => {
                tracing::info!("stopped by a command");
                self.ended = Some(Ended::Down);
            }
        }
    }

    /// What is answered while the server has not let us in yet.
    fn not_enrolled_yet(&self) -> Refusal {
        let servers = self.state.enrolment().map(|enrolment| &enrolment.servers);
        let servers: Vec<String> = servers.into_iter().flatten().map(ToString::to_string).collect();
        let cause = match &self.connect_error {
            Some(error) => format!("the last attempt: {error}"),
            None => "the server has not let this machine in so far".into(),
        };
        Refusal {
            code: exit::NOT_ENROLLED,
            error: format!("not enrolled yet, connecting to {}", servers.join(", ")),
            cause,
            help: "wait a moment, then: overlay status; is the server reachable: overlay netcheck"
                .into(),
        }
    }

    fn status(&self) -> Option<Status> {
        let now = clock::now();
        self.ports.count_unread();
        let own = self.node.self_status();
        let identity = own.identity?;
        // The server keeps the connection of a node whose time is over.
        let up = own.link_up || self.node.is_expired(now);
        let state = match (self.server.is_some() && up, self.control_link.is_trying()) {
            (true, _) => "connected",
            (false, true) => "connecting",
            (false, false) => "unreachable",
        };
        let address = self
            .server
            .map(|server| server.to_string())
            .or_else(|| Some(self.state.enrolment()?.servers.first()?.to_string()));
        Some(Status {
            schema: SCHEMA,
            own: OwnStatus {
                id: identity.id.to_string(),
                name: identity.name.to_string(),
                ipv4: identity.addrs.v4,
                ipv6: identity.addrs.v6,
                interface: self.options.interface.clone(),
                mtu: self.options.interface_mtu(),
                listen_port: self.ports.listen_port(),
                public_key: own.public_key.to_string(),
                network: identity.network.to_string(),
                drops: own.drops.iter().map(|(why, count)| ((*why).into(), *count)).collect(),
                version: env!("CARGO_PKG_VERSION").into(),
                offloads: self.ports.offloads(),
                realtime: self.ports.is_realtime(),
                port_mapping: self.port_mapping.as_ref().map(PortMapping::report),
                punching: self.punching(),
                node_key: self.key_report(),
                expired: self.node.is_expired(now),
                warnings: self.warnings(now),
                uplinks: self.uplink_reports(),
                state_dir: Some(taken::absolute(&self.options.state_dir)),
            },
            server: ServerStatus {
                state: state.into(),
                address,
                rtt_ms: own.server_rtt.filter(|_| own.link_up).map(millis),
                uplink: self.further_uplink_of_link(),
            },
            peers: self.node.peer_statuses(now).into_iter().map(PeerReport::from).collect(),
            nodes: self.node.network_size(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::local::LocalClient;

    #[tokio::test]
    async fn a_question_of_another_version_is_answered_with_that_as_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.sock");
        let listener = LocalListener::bind(&path).await.unwrap();
        let (requests, _nobody_asks) = mpsc::channel(1);
        let local = serve_local(listener, requests);
        let mut client = LocalClient::connect(&path).await.unwrap();
        client.ask(&serde_json::json!({"of-tomorrow": {"peer": "bob"}})).await.unwrap();
        let answer = client.next::<Reply<()>>().await.unwrap();
        let Some(Reply::Error(refusal)) = answer else { panic!("{answer:?}") };
        assert_eq!(refusal.code, exit::USAGE);
        assert!(refusal.cause.contains("of-tomorrow"), "{refusal:?}");
        assert!(refusal.help.contains("overlay version"), "{refusal:?}");
        assert_eq!(client.next::<Reply<()>>().await.unwrap(), None, "and it hangs up");
        local.end().await;
        assert!(!path.exists());
    }
}
