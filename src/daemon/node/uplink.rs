//! The control connection, kept up: all known server addresses are tried side by side, the first
//! that answers with the pinned key wins, and a lost connection is made again with growing,
//! jittered waits. Further uplinks are tried beside the preferred one, a little later.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::io::clock;
use crate::io::link::{
    Backoff, ConnectError, Inbound, Link, LinkError, LinkReceiver, LinkSender, RelayBatch, Way,
    connect_by,
};
use crate::types::{PublicKey, SecretKey};
use crate::wire::join::ServerAddr;

/// The next address is tried beside the first after this (RFC 8305 section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// A further uplink is tried so much later than the preferred one: more than a slow server takes.
const FURTHER_DELAY: Duration = Duration::from_secs(1);
/// When another machine connected with our key, there is less and less hurry to throw it out again:
/// twice the last wait, up to this.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// The first of these waits: the server soon sees what is going on.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// What became of the connection.
#[derive(Debug)]
pub(super) enum UplinkEvent {
    /// There is one.
    Connected {
        /// Its far end.
        server: SocketAddr,
        /// Our address on it.
        local: IpAddr,
        /// The further uplink that it goes by; none for what the routes say.
        device: Option<String>,
        /// To send on it.
        sender: LinkSender,
    },
    /// A control message came.
    Control(Vec<u8>),
    /// Relay datagrams came.
    Relayed(RelayBatch),
    /// It is gone; another is being made.
    Lost(LinkError),
    /// None of the addresses works; they are tried again.
    Failed(ConnectError),
}

/// Whom to connect to, and as whom.
#[derive(Debug, Clone)]
pub(super) struct Destination {
    pub(super) servers: Vec<ServerAddr>,
    pub(super) server_keys: Vec<PublicKey>,
    pub(super) machine_key: SecretKey,
}

/// A connection that was made, and how.
struct Made {
    link: Link,
    server: ServerAddr,
    device: Option<String>,
}

type Attempts = JoinSet<Result<Made, ConnectError>>;

enum Phase {
    Waiting(Instant),
    Connecting(Attempts, Option<ConnectError>),
    Connected(Box<LinkReceiver>),
}

/// The control connection.
pub(super) struct Uplink {
    destination: Arc<Destination>,
    phase: Phase,
    backoff: Backoff,
    pause: Duration,
    /// The interfaces of further uplinks.
    devices: Vec<String>,
    /// The one of them by which the server is known to answer, when it does not by the preferred one.
    favoured: Option<String>,
    /// Where each server was when it was last connected to.
    addresses: BTreeMap<String, SocketAddr>,
    /// Attempts at a connection by another uplink, in place of the one there is.
    better: Attempts,
    /// The connection that was replaced: it ends when the new one is at work, since its end would make
    /// us look offline for a moment.
    replaced: Option<Box<LinkReceiver>>,
}

impl Uplink {
    pub(super) fn new(destination: Destination) -> Self {
        Self {
            destination: Arc::new(destination),
            phase: Phase::Waiting(clock::now()),
            backoff: Backoff::default(),
            pause: MIN_PAUSE,
            devices: Vec::new(),
            favoured: None,
            addresses: BTreeMap::new(),
            better: JoinSet::new(),
            replaced: None,
        }
    }

    /// Whether a connection is being made at this moment, rather than waited for.
    pub(super) fn is_trying(&self) -> bool {
        matches!(self.phase, Phase::Connecting(..))
    }

    /// Drops the connection and makes another.
    pub(super) fn reconnect(&mut self) {
        self.wait();
    }

    /// Drops the connection or the attempt that there is, and makes another without a wait: the
    /// network around us is another one, so nothing that failed in it counts.
    pub(super) fn try_now(&mut self) {
        self.backoff.reset();
        self.better = JoinSet::new();
        self.replaced = None;
        self.phase = Phase::Waiting(clock::now());
    }

    /// The interfaces of the further uplinks that there are.
    pub(super) fn set_devices(&mut self, devices: Vec<String>) {
        self.devices = devices;
    }

    /// The server is known to answer by this further uplink only; none when it is not so.
    pub(super) fn favour(&mut self, device: Option<&str>) {
        self.favoured = device.map(str::to_owned);
    }

    /// Replaces the connection by one over this further uplink, or the preferred one, as soon as
    /// there is such a one.
    pub(super) fn improve(&mut self, device: Option<&str>) {
        if matches!(self.phase, Phase::Connected(_)) {
            self.better = self.start_by(device);
        }
    }

    /// Drops the connection for a while, and the next time for longer.
    pub(super) fn pause(&mut self) {
        self.phase = Phase::Waiting(clock::now() + self.pause);
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }

    fn wait(&mut self) {
        self.better = JoinSet::new();
        self.replaced = None;
        self.phase = Phase::Waiting(clock::now() + self.backoff.next_wait());
    }

    /// The next event. Cancel-safe.
    pub(super) async fn next(&mut self) -> UplinkEvent {
        loop {
            match &mut self.phase {
                Phase::Waiting(at) => {
                    tokio::time::sleep_until((*at).into()).await;
                    self.phase = Phase::Connecting(self.start(), None);
                }
                Phase::Connecting(attempts, worst) => match attempts.join_next().await {
                    Some(Ok(Ok(made))) => return self.take(made),
                    Some(Ok(Err(error))) => {
                        if worst.as_ref().is_none_or(|worst| telling(&error) > telling(worst)) {
                            *worst = Some(error);
                        }
                    }
                    Some(Err(panicked)) => tracing::error!(%panicked, "connecting panicked"),
                    None => {
                        let error = worst.take();
                        self.wait();
                        if let Some(error) = error {
                            return UplinkEvent::Failed(error);
                        }
                    }
                },
                Phase::Connected(receiver) => {
                    let received = tokio::select! {
                        biased;
                        Some(attempt) = self.better.join_next() => {
                            if let Ok(Ok(made)) = attempt {
                                return self.take(made);
                            }
                            continue;
                        }
                        received = receiver.next() => received,
                    };
                    match received {
                        Ok(Inbound::Control(message)) => {
                            self.backoff.reset();
                            self.replaced = None;
                            return UplinkEvent::Control(message);
                        }
                        Ok(Inbound::Relay(first)) => {
                            self.backoff.reset();
                            let mut relayed = RelayBatch::default();
                            relayed.push(&first);
                            receiver.more_relayed(&mut relayed);
                            return UplinkEvent::Relayed(relayed);
                        }
                        Err(error) => {
                            self.wait();
                            return UplinkEvent::Lost(error);
                        }
                    }
                }
            }
        }
    }

    fn take(&mut self, made: Made) -> UplinkEvent {
        let Link { sender, receiver, local, remote, .. } = made.link;
        self.better = JoinSet::new();
        self.addresses.insert(made.server.to_string(), remote);
        let before = std::mem::replace(&mut self.phase, Phase::Connected(Box::new(receiver)));
        self.replaced = match before {
            Phase::Connected(receiver) => Some(receiver),
            Phase::Waiting(_) | Phase::Connecting(..) => None,
        };
        UplinkEvent::Connected { server: remote, local: local.ip(), device: made.device, sender }
    }

    /// Tries all servers by all uplinks.
    fn start(&self) -> Attempts {
        let mut attempts = self.start_by(None);
        for device in &self.devices {
            let favoured = self.favoured.as_ref() == Some(device);
            let delay = if favoured { Duration::ZERO } else { FURTHER_DELAY };
            self.add_attempts(&mut attempts, Some(device), delay);
        }
        attempts
    }

    fn start_by(&self, device: Option<&str>) -> Attempts {
        let mut attempts = JoinSet::new();
        self.add_attempts(&mut attempts, device, Duration::ZERO);
        attempts
    }

    fn add_attempts(&self, attempts: &mut Attempts, device: Option<&str>, mut delay: Duration) {
        for server in self.destination.servers.clone() {
            let destination = Arc::clone(&self.destination);
            let device = device.map(str::to_owned);
            let address = device.as_ref().and(self.addresses.get(&server.to_string())).copied();
            let way = Way { device, address };
            attempts.spawn(async move {
                tokio::time::sleep(delay).await;
                let Destination { server_keys, machine_key, .. } = &*destination;
                let link = connect_by(&way, &server, server_keys, machine_key).await?;
                Ok(Made { link, server, device: way.device })
            });
            delay += STAGGER;
        }
    }
}

/// Of several failures, the one that says most is shown.
fn telling(error: &ConnectError) -> u8 {
    match error {
        ConnectError::WrongKey { .. } => 4,
        ConnectError::NotOurProtocol { .. } => 3,
        ConnectError::Closed { .. } => 2,
        ConnectError::TimedOut { .. } | ConnectError::Unreachable { .. } => 1,
        ConnectError::Resolve { .. } => 0,
    }
}
