//! The loop around the server's state machine: events in, commits, outputs out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, info, warn};

use super::addresses::Advertised;
use super::local::{EventInfo, Question, StoreAnswer};
use super::metrics::Counts;
use super::relay::Hub;
use super::{StartError, backup, notify, state, where_found};
use crate::daemon::exit;
use crate::io::clock;
use crate::io::files::DirLock;
use crate::io::link::LinkError;
use crate::io::local::Refusal;
use crate::io::metrics::Page;
use crate::io::service::Watchdog;
use crate::server::admin::{Answer, Request, RequestError};
use crate::server::{Connected, ConnectionId, Decision, Output, Server};
use crate::store::{Committed, Store, StoreError};
use crate::types::{NodeId, SecretKey};
use crate::wire::control::ClientMessage;
use crate::wire::join::ServerAddr;

/// Events that are handled before the outputs go out.
const BATCH: usize = 256;
/// How often it is written down when nodes were last seen.
const SEEN_INTERVAL: Duration = Duration::from_secs(3600);

/// The end of a membership that could not be written down is tried again after this; and so often the
/// clock is looked at, which may be set.
const EXPIRY_RETRY: Duration = Duration::from_secs(5);

/// What happens to a server.
#[derive(Debug)]
pub(super) enum Event {
    Connected { id: ConnectionId, about: Connected },
    Message { id: ConnectionId, message: Box<ClientMessage> },
    Disconnected { id: ConnectionId },
    Sighted { node: NodeId, endpoint: SocketAddr },
    Request { actor: String, request: Request, answer: oneshot::Sender<Result<Answer, Refusal>> },
    PublicAddr(Vec<ServerAddr>),
    Metrics { answer: oneshot::Sender<Page> },
    Look { question: Question, answer: oneshot::Sender<Result<StoreAnswer, Refusal>> },
}

/// The state machine and what it acts on.
#[derive(Debug)]
pub(super) struct Core {
    server: Server,
    parts: Parts,
    next_seen: Instant,
    /// Before that no end of a membership is written down: the last try may have failed.
    next_expiry: Instant,
    watchdog: Watchdog,
    /// The number of the newest event, for those who follow the log.
    newest: watch::Sender<u64>,
    counts: Counts,
}

/// What the state machine acts on.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) store: Store,
    /// For backups.
    pub(super) key: SecretKey,
    pub(super) hub: Arc<Hub>,
    pub(super) advertised: Advertised,
    pub(super) lock: DirLock,
}

impl Core {
    pub(super) async fn new(server: Server, parts: Parts) -> Result<Self, StoreError> {
        let next_seen = Instant::from_std(clock::now()) + SEEN_INTERVAL;
        let last = parts.store.events(0, 1).await?;
        let newest = watch::Sender::new(last.last().map_or(0, |event| event.seq));
        let watchdog = Watchdog::new(parts.hub.progress(), clock::now());
        let counts = Counts::new(clock::unix_seconds());
        let next_expiry = Instant::from_std(clock::now());
        Ok(Self { server, parts, next_seen, next_expiry, watchdog, newest, counts })
    }

    /// The number of the newest event, as it rises.
    pub(super) fn newest_event(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    pub(super) fn hub(&self) -> &Hub {
        &self.parts.hub
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Members, and those of them that are online.
    pub(super) fn population(&self) -> (usize, usize) {
        self.server.population()
    }

    pub(super) fn network_id(&self) -> String {
        self.server.network().id.to_string()
    }

    pub(super) fn members_last_s(&self) -> Option<u64> {
        self.server.network().members_last_s
    }

    pub(super) fn has_no_address(&self) -> bool {
        self.server.has_no_address()
    }

    pub(super) fn has_no_members(&self) -> bool {
        self.server.has_no_members()
    }

    /// Tells the administrator what will not work.
    pub(super) fn warn(&self) {
        self.parts.advertised.warn();
    }

    /// Runs until told to stop.
    pub(super) async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Event>,
        mut stopping: watch::Receiver<bool>,
    ) {
        self.drain();
        loop {
            let mut wake = Instant::from_std(self.server.poll_timeout()).min(self.next_seen);
            wake = wake.min(self.expiry_at());
            if let Some(look) = self.watchdog.next() {
                wake = wake.min(Instant::from_std(look));
            }
            tokio::select! {
                biased;
                () = stopped(&mut stopping) => break,
                event = inbox.recv() => {
                    let Some(event) = event else { break };
                    self.handle(event, inbox.len()).await;
                    for _ in 1..BATCH {
                        let Ok(event) = inbox.try_recv() else { break };
                        self.handle(event, inbox.len()).await;
                    }
                }
                () = sleep_until(wake) => {}
            }
            let now = clock::now();
            self.server.handle_timeout(now);
            if self.watchdog.next().is_some_and(|look| look <= now) {
                // Any answer will do: a full disk is no reason to be started again.
                let _ = self.parts.store.events(0, 1).await;
                self.watchdog.look(clock::now());
            }
            self.note_expiry(Instant::from_std(now)).await;
            if let Some(decision) = self.server.decide_cut() {
                // It is for the administrator to read, and changes nothing.
                let _ = self.commit(decision, "server").await;
            }
            if self.next_seen <= Instant::from_std(now) {
                self.next_seen += SEEN_INTERVAL;
                self.write_seen().await;
            }
            self.drain();
        }
        self.write_seen().await;
        // The lock goes last.
        let Parts { store, lock, .. } = self.parts;
        store.close().await;
        drop(lock);
    }

    /// `waiting` events come after this one.
    async fn handle(&mut self, event: Event, waiting: usize) {
        let wall = clock::unix_seconds();
        match event {
            Event::Connected { id, about } => {
                // What the welcome tells is what is true now.
                self.note_addresses();
                self.server.handle_connected(id, about);
            }
            Event::Disconnected { id } => self.server.handle_disconnected(id, wall),
            Event::Sighted { node, endpoint } => self.server.note_reflexive(node, endpoint),
            Event::Message { id, message } => {
                if let Some(decision) = self.server.handle_message(id, *message, wall) {
                    // Who waits for it is told by `give_up` when it fails.
                    let _ = self.commit(decision, "server").await;
                }
            }
            Event::Request { actor, request, answer } => {
                let logged = request.is_write().then(|| request.to_string());
                let result = self.answer(request, &actor).await;
                if let Some(request) = logged.filter(|_| result.is_ok()) {
                    info!(%request, actor, "done for the administrator");
                }
                // The client may have gone; what it asked for is done all the same.
                let _ = answer.send(result);
            }
            Event::PublicAddr(told) => {
                self.parts.advertised.tell(told);
                self.note_addresses();
                self.warn();
            }
            Event::Metrics { answer } => {
                let _ = answer.send(self.metrics(waiting));
            }
            Event::Look { question, answer } => {
                let _ = answer.send(self.look(question).await);
            }
        }
        self.drain();
    }

    /// Has nodes and the service manager told how the server is found, if that has changed.
    fn note_addresses(&mut self) {
        if let Some(addresses) = self.parts.advertised.news(clock::now()) {
            notify(&[sd_notify::NotifyState::Status(&where_found(&addresses))]);
            self.server.set_addresses(addresses);
        }
    }

    /// Does what the administrator asks for.
    pub(super) async fn answer(
        &mut self,
        request: Request,
        actor: &str,
    ) -> Result<Answer, Refusal> {
        if matches!(request, Request::Invite { .. }) {
            // The machine may have got another address just now.
            self.parts.advertised.look_again();
            self.note_addresses();
        }
        let decision =
            self.server.decide(request, clock::unix_seconds()).map_err(|error| refusal(&error))?;
        let mut answer = self.commit(decision, actor).await?;
        if let Some(Answer::Invited(invited)) = &mut answer {
            invited.warning = self.parts.advertised.trouble().map(Into::into);
        }
        answer.ok_or_else(|| unavailable("the server has no answer", "the question has none"))
    }

    /// Answers a question that the state machine has no answer to.
    async fn look(&self, question: Question) -> Result<StoreAnswer, Refusal> {
        let failed =
            |error: StoreError| unavailable("the store cannot be read", &error.to_string());
        match question {
            Question::Events { after, limit, first, .. } => {
                let store = &self.parts.store;
                let events = match first {
                    true => store.events_from(after, limit).await,
                    false => store.events(after, limit).await,
                };
                let events = events.map_err(failed)?;
                let events = events.into_iter().map(EventInfo::from).collect();
                Ok(StoreAnswer::Events(events))
            }
            Question::Backup => {
                let snapshot = self.parts.store.snapshot().await.map_err(failed)?;
                let network = self.server.network().id;
                let made = clock::unix_seconds();
                let text = backup::write(network, made, &self.parts.key, snapshot);
                text.map(StoreAnswer::Backup).map_err(|error| {
                    unavailable("the backup cannot be written", &error.to_string())
                })
            }
            Question::Status => Ok(StoreAnswer::Status(self.status())),
            Question::Admin(_) => Err(unavailable("the server has no answer", "no such question")),
        }
    }

    /// Writes a decision down, then makes it true.
    async fn commit(&mut self, decision: Decision, actor: &str) -> Result<Option<Answer>, Refusal> {
        let wall = clock::unix_seconds();
        let silent = self.server.events(&decision, actor, wall).is_empty();
        if decision.changes().is_empty() && silent {
            return Ok(self.server.apply(decision, 0, wall));
        }
        match self.write(&decision, actor, wall).await {
            Ok(committed) => {
                self.counts.committed(committed.took);
                if let Some(last) = committed.events.last() {
                    self.newest.send_replace(last.seq);
                }
                Ok(self.server.apply(decision, committed.rev, wall))
            }
            Err(failure) => {
                error!(%failure, "a change could not be stored and was not made");
                self.counts.failed();
                self.server.give_up(decision);
                let cause = failure.to_string();
                Err(unavailable("the change was not made, as it cannot be stored", &cause))
            }
        }
    }

    async fn write(
        &self,
        decision: &Decision,
        actor: &str,
        wall: u64,
    ) -> Result<Committed, StartError> {
        let rows = state::rows_of(decision.changes())?;
        let lines = state::lines_of(&self.server.events(decision, actor, wall))?;
        Ok(self.parts.store.commit(&rows, &lines).await?)
    }

    async fn write_seen(&mut self) {
        let decision = self.server.decide_seen(clock::unix_seconds());
        // Soft knowledge: the next time will do.
        let _ = self.commit(decision, "server").await;
    }

    /// When the end of a membership is to be written down; the clock may be set meanwhile.
    fn expiry_at(&self) -> Instant {
        let now = Instant::from_std(clock::now());
        let Some(due) = self.server.expiry_due() else { return now + SEEN_INTERVAL };
        let wait = Duration::from_secs(due.saturating_sub(clock::unix_seconds()));
        (now + wait.min(EXPIRY_RETRY)).max(self.next_expiry)
    }

    async fn note_expiry(&mut self, now: Instant) {
        let wall = clock::unix_seconds();
        if self.next_expiry <= now && self.server.expiry_due().is_some_and(|due| due <= wall) {
            let decision = self.server.decide_expiry(wall);
            if self.commit(decision, "server").await.is_err() {
                self.next_expiry = now + EXPIRY_RETRY;
            }
        }
    }

    /// Does what the state machine wants done.
    fn drain(&mut self) {
        while let Some(output) = self.server.poll_output() {
            match output {
                Output::Relay(change) => self.parts.hub.apply(change),
                Output::Close { connection } => {
                    if let Some(sender) = self.parts.hub.sender(connection) {
                        sender.close();
                    }
                }
                Output::Send { connection, message } => {
                    let Some(sender) = self.parts.hub.sender(connection) else {
                        debug!(connection = connection.0, "a message to nobody");
                        continue;
                    };
                    match sender.try_send_control(message) {
                        Ok(()) => {}
                        // What was said before may still be on its way out.
                        Err(error @ LinkError::Closed) => {
                            debug!(connection = connection.0, %error, "a message too late");
                        }
                        Err(error) => {
                            warn!(connection = connection.0, %error, "connection given up");
                            sender.abort();
                        }
                    }
                }
            }
        }
    }
}

/// Waits until the server should stop, or nobody is left to say so.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

fn unavailable(error: &str, cause: &str) -> Refusal {
    Refusal {
        code: exit::FAILED,
        error: error.into(),
        cause: cause.into(),
        help: "look at the server's disk (df -h) and log (journalctl -u overlay-server), then \
               type the command again"
            .into(),
    }
}

fn refusal(error: &RequestError) -> Refusal {
    let (code, cause, help) = match error {
        RequestError::UnknownNode { .. } => (
            exit::UNKNOWN_PEER,
            "it is no name, overlay address or id of a node in this network",
            "overlay server nodes (it lists them)",
        ),
        RequestError::UnknownInvite { .. } => (
            exit::FAILED,
            "no invite has this id; one that ended long ago is forgotten",
            "overlay server invite list",
        ),
        RequestError::NameTaken { .. } => (
            exit::FAILED,
            "a name belongs to one node",
            "choose another name, or rename that node first: overlay server rename NODE NAME",
        ),
        RequestError::BadInvite => (
            exit::USAGE,
            "its number of uses (--uses) or its time (--ttl) makes no sense",
            "overlay server invite --uses 1 --ttl 1h",
        ),
        RequestError::NoAddress => (
            exit::FAILED,
            "the network of this machine is not up, or it has to be said how it is reached",
            "look at its addresses: ip addr; or name one: overlay server --public-addr HOST, or \
             for the service public-addr = [\"HOST\"] in server.toml and a reload",
        ),
        RequestError::TooManyTags => (
            exit::USAGE,
            "tags are for groups of nodes, and each is one more thing to keep in mind",
            "give it fewer: overlay server tag NODE TAG...",
        ),
        RequestError::BadExpiry => {
            (exit::USAGE, "the time (--in) makes no sense", "overlay server expire NODE --in 180d")
        }
        RequestError::BadPolicy { reason } => (
            exit::FAILED,
            reason.as_str(),
            "correct the file, then: overlay server policy test FILE; the rules are as before",
        ),
    };
    Refusal { code, error: error.to_string(), cause: cause.into(), help: help.into() }
}
