//! Control connections: accepted, upgraded, and read until they end.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::core::Event;
use super::relay::Hub;
use super::sockets::Listener;
use crate::io::clock;
use crate::io::link::{Inbound, Link, LinkReceiver, RelayBatch};
use crate::io::listen::{self, Admission, Gate, HANDSHAKE_LIMIT};
use crate::io::said::Said;
use crate::server::fresh::{Freshness, Tokens};
use crate::server::{Connected, ConnectionId};
use crate::types::{Account, PublicKey, Rate, SecretKey};
use crate::wire::control::{ClientMessage, decode};
use crate::wire::frame::{Early, MAX_CLIENT_MESSAGE};

/// Control messages of a connection that are read at once; an honest node sends a few.
const MESSAGES: Rate = Rate::per_second(20, 200);
/// After an error like "too many open files", until the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Until those that make room are looked at again; they may wait for the core.
const LEAVING_PAUSE: Duration = Duration::from_millis(1);

/// What every new connection needs.
#[derive(Debug)]
pub(super) struct Entrance {
    key: SecretKey,
    gate: Arc<Gate>,
    said: Said,
    fresh: Mutex<Freshness>,
    next: AtomicU64,
    events: mpsc::Sender<Event>,
    hub: Arc<Hub>,
}

impl Entrance {
    pub(super) fn new(
        key: SecretKey,
        tokens: Tokens,
        events: mpsc::Sender<Event>,
        hub: Arc<Hub>,
    ) -> Self {
        let fresh = Mutex::new(Freshness::new(tokens));
        let (gate, said, next) = (Arc::default(), Said::default(), AtomicU64::new(1));
        Self { key, gate, said, fresh, next, events, hub }
    }

    /// Whether what a first message holds may be acted on before there is another.
    fn is_new(&self, machine_key: PublicKey, payload: &[u8], source: IpAddr) -> bool {
        let Some(early) = Early::parse(payload) else { return false };
        self.fresh().take(machine_key, &early.token, source, clock::now())
    }

    fn fresh(&self) -> std::sync::MutexGuard<'_, Freshness> {
        // A panic between its changes would at worst forget somebody who was let in before it.
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts connections for ever.
pub(super) async fn accept(port: Listener, entrance: Arc<Entrance>) {
    // Aborts the connections when this task is aborted.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = port.listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "cannot accept connections");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // In a flood accepting waits for nothing else: those that ended are let go of, and those that
        // have to make room get their turn.
        while connections.try_join_next().is_some() {}
        while entrance.gate.is_crowded() {
            sleep(LEAVING_PAUSE).await;
        }
        let Some(admission) = entrance.gate.admit(remote.ip(), clock::now()) else {
            debug!(%remote, "too many connections at once");
            continue;
        };
        let (relay_port, second_port) = (port.relay_port, port.second_port);
        let entrance = Arc::clone(&entrance);
        connections.spawn(async move {
            serve(stream, admission, &entrance, relay_port, second_port).await;
        });
    }
}

async fn serve(
    stream: TcpStream,
    admission: Admission,
    entrance: &Entrance,
    relay_port: u16,
    second_port: u16,
) {
    let (link, first, framed) = tokio::select! {
        greeted = greet(stream, entrance) => match greeted {
            Ok(greeted) => greeted,
            Err(error) => return debug!(error, "no control connection"),
        },
        () = admission.pushed_out() => return debug!("a connection made room for others"),
    };
    let fare = admission.fare();
    let id = ConnectionId(entrance.next.fetch_add(1, Ordering::Relaxed));
    let about = Connected {
        machine_key: link.peer_key,
        observed: link.remote,
        relay_port: Some(relay_port),
        second_port: Some(second_port),
    };
    debug!(connection = id.0, machine = %link.peer_key.short(), remote = %link.remote, "connected");
    let Link { sender, mut receiver, peer_key, .. } = link;
    entrance.hub.add_link(id, sender, (fare, peer_key));
    if entrance.events.send(Event::Connected { id, about }).await.is_ok() {
        let admission = (!framed).then_some(admission);
        read(id, &mut receiver, first, admission, entrance).await;
    }
    entrance.hub.remove_link(id);
    // When the core is gone, so is everything that this would matter to.
    let _ = entrance.events.send(Event::Disconnected { id }).await;
    receiver.close().await;
}

/// The handshake and the first message: a handshake may be a replay, unless there is proof that it is
/// not, and a first frame cannot be. Tells whether it was that, which shows that somebody holds the key,
/// and nothing of who that is.
async fn greet(stream: TcpStream, entrance: &Entrance) -> Result<(Link, Vec<u8>, bool), String> {
    let source = stream.peer_addr().map_err(|error| error.to_string())?.ip();
    let is_new = |key: PublicKey, payload: &[u8]| entrance.is_new(key, payload, source);
    let upgraded = listen::upgrade(stream, &entrance.key, &entrance.said, is_new).await;
    let (mut link, early) = upgraded.map_err(|error| error.to_string())?;
    link.receiver.limit_messages(MAX_CLIENT_MESSAGE);
    if let Some(early) = early.as_deref().and_then(Early::parse) {
        return Ok((link, early.hello.to_vec(), false));
    }
    match timeout(HANDSHAKE_LIMIT, link.receiver.next()).await {
        Ok(Ok(Inbound::Control(message))) => {
            entrance.fresh().note(link.peer_key, clock::now());
            Ok((link, message, true))
        }
        Ok(Ok(Inbound::Relay(_))) => Err("a connection that starts with data".into()),
        Ok(Err(error)) => Err(format!("a connection without a message: {error}")),
        Err(_) => Err("a connection that says nothing".into()),
    }
}

/// Reads until the link ends, from either side. One that still has its `admission` owes a frame: what
/// its first message said was new, and may have been brought by somebody else.
async fn read(
    id: ConnectionId,
    receiver: &mut LinkReceiver,
    first: Vec<u8>,
    mut admission: Option<Admission>,
    entrance: &Entrance,
) {
    let mut inbound = Ok(Inbound::Control(first));
    let mut messages = Account::default();
    loop {
        match inbound {
            Ok(Inbound::Relay(first)) => {
                let mut datagrams = RelayBatch::default();
                datagrams.push(&first);
                receiver.more_relayed(&mut datagrams);
                entrance.hub.handle_link_datagrams(id, &mut datagrams);
            }
            Ok(Inbound::Control(bytes)) => {
                wait_for_room(&mut messages).await;
                let message = match decode::<ClientMessage>(&bytes) {
                    Ok(message) => message,
                    Err(error) => return debug!(connection = id.0, %error, "not understood"),
                };
                if entrance
                    .events
                    .send(Event::Message { id, message: Box::new(message) })
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(error) => return debug!(connection = id.0, %error, "disconnected"),
        }
        inbound = match &admission {
            None => receiver.next().await,
            Some(place) => tokio::select! {
                inbound = timeout(HANDSHAKE_LIMIT, receiver.next()) => match inbound {
                    Ok(inbound) => inbound,
                    Err(_) => return debug!(connection = id.0, "nothing follows on the hello"),
                },
                () = place.pushed_out() => return debug!("a connection made room for others"),
            },
        };
        if inbound.is_ok() && admission.take().is_some() {
            debug!(connection = id.0, "a frame has followed on the hello");
        }
    }
}

/// Who has sent too many messages waits for each.
async fn wait_for_room(messages: &mut Account) {
    while !messages.take(MESSAGES, 1, clock::now()) {
        if let Some(at) = messages.room_at(MESSAGES) {
            sleep_until(at.into()).await;
        }
    }
}
