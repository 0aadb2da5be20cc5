//! The control connection, kept up: all known server addresses are tried side by side, the first
//! that answers with the pinned key wins, and a lost connection is made again with growing,
//! jittered waits. Further uplinks are tried beside the preferred one, a little later.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::io::clock;
use crate::io::link::{
    Backoff, ConnectError, Inbound, Link, LinkError, LinkReceiver, LinkSender, Offers, RelayBatch,
    Way, connect_by,
};
use crate::types::{PublicKey, SecretKey};
use crate::wire::join::ServerAddr;
use crate::wire::relay::Token;

/// The next address is tried beside the first after this (RFC 8305 section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// A further uplink is tried so much later than the preferred one: more than a slow server takes.
const FURTHER_DELAY: Duration = Duration::from_secs(1);
/// When another machine connected with our key, there is less and less hurry to throw it out again:
/// twice the last wait, up to this.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// The first of these waits: the server soon sees what is going on.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// A connection by another uplink than the right one is made anew after this,
const IMPROVE_AFTER: Duration = Duration::from_secs(2);
/// and, when that fails again and again, this often.
const IMPROVE_RARELY: Duration = Duration::from_secs(120);

/// What became of the connection.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// One is being made; tokens are of use now.
    Trying,
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
        /// The hello, if the server has had that already.
        said: Option<Vec<u8>>,
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

/// When the connection is to be made again by the uplink that is the right one: ever more rarely, since
/// an attempt costs something on a metered one as well.
#[derive(Debug)]
struct Improvement {
    due: Option<Instant>,
    wait: Duration,
}

impl Improvement {
    /// Nothing is to be made better.
    const NONE: Self = Self { due: None, wait: IMPROVE_AFTER };

    /// The connection goes by the wrong uplink: it is tried after a wait, and the next time later.
    fn plan(&mut self, now: Instant) {
        self.due = Some(now + self.wait);
        self.wait = (self.wait * 2).min(IMPROVE_RARELY);
    }
}

type Attempts = JoinSet<Result<Made, ConnectError>>;

enum Phase {
    Waiting(Instant),
    Connecting(Attempts, Option<ConnectError>),
    Connected(Box<LinkReceiver>),
}

/// The control connection.
pub(super) struct ControlLink {
    destination: Arc<Destination>,
    phase: Phase,
    backoff: Backoff,
    pause: Duration,
    /// What there is for the first message.
    offers: watch::Sender<Offers>,
    /// The last attempts came to nothing, perhaps since something on the way dislikes long headers.
    plain: bool,
    /// The interfaces of further uplinks.
    devices: Vec<String>,
    /// The one of them by which the server is known to answer, when it does not by the preferred one.
    favoured: Option<String>,
    /// Where each server was when it was last connected to.
    addresses: BTreeMap<String, SocketAddr>,
    /// Attempts at a connection by another uplink, in place of the one there is.
    better: Attempts,
    /// When the next of them are made.
    improvement: Improvement,
    /// The uplink that the connection goes by.
    device: Option<String>,
    /// The connection that was replaced: it ends when the new one is at work, since its end would make
    /// us look offline for a moment.
    replaced: Option<Box<LinkReceiver>>,
}

impl ControlLink {
    pub(super) fn new(destination: Destination) -> Self {
        Self {
            destination: Arc::new(destination),
            phase: Phase::Waiting(clock::now()),
            backoff: Backoff::default(),
            pause: MIN_PAUSE,
            offers: watch::Sender::default(),
            plain: false,
            devices: Vec::new(),
            favoured: None,
            addresses: BTreeMap::new(),
            better: JoinSet::new(),
            improvement: Improvement::NONE,
            device: None,
            replaced: None,
        }
    }

    /// These servers have been asked for tokens.
    pub(super) fn expect_tokens(&self, servers: impl IntoIterator<Item = IpAddr>) {
        self.offers.send_modify(|offers| offers.expect(servers));
    }

    /// A token, and what to say with it.
    pub(super) fn offer(&self, server: IpAddr, token: Token, hello: Vec<u8>) {
        self.offers.send_modify(|offers| offers.put(server, token, hello));
    }

    /// Whether there is a token for a connection to this server.
    pub(super) fn has_token(&self, server: IpAddr) -> bool {
        self.offers.borrow().has_token(server)
    }

    /// Whether a connection is being made at this moment, rather than waited for.
    pub(super) fn is_trying(&self) -> bool {
        matches!(self.phase, Phase::Connecting(..))
    }

    /// The server has let us in: when this connection is lost, the next one is made soon. Nothing else
    /// that it says counts: a refusal comes by a connection that works, too, and may come every time.
    pub(super) fn note_welcome(&mut self) {
        self.backoff.reset();
    }

    /// Drops the connection and makes another, after a wait that grows from welcome to welcome.
    pub(super) fn reconnect(&mut self) {
        self.wait();
    }

    /// Drops the connection or the attempt that there is, and makes another without a wait: the
    /// network around us is another one, so nothing that failed in it counts.
    pub(super) fn try_now(&mut self) {
        self.backoff.reset();
        self.better = JoinSet::new();
        self.replaced = None;
        self.wait_until(clock::now());
    }

    /// Where the server is from now on, if that is known; it counts for the next attempt.
    pub(super) fn set_servers(&mut self, servers: &[ServerAddr]) {
        if !servers.is_empty() && self.destination.servers != servers {
            Arc::make_mut(&mut self.destination).servers = servers.to_vec();
        }
    }

    /// The interfaces of the further uplinks that there are.
    pub(super) fn set_devices(&mut self, devices: Vec<String>) {
        self.devices = devices;
    }

    /// The server is known to answer by this further uplink only; none when it is not so.
    pub(super) fn favour(&mut self, device: Option<&str>) {
        self.favoured = device.map(str::to_owned);
        if self.device == self.favoured {
            self.improvement = Improvement::NONE;
            self.better = JoinSet::new();
        }
    }

    /// Replaces the connection by one over this further uplink, or the preferred one, as soon as
    /// there is such a one.
    pub(super) fn improve(&mut self, device: Option<&str>) {
        if matches!(self.phase, Phase::Connected(_)) {
            self.improvement = Improvement::NONE;
            self.better = self.start_by(device);
        }
    }

    /// Drops the connection for a while, and the next time for longer.
    pub(super) fn pause(&mut self) {
        self.wait_until(clock::now() + self.pause);
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }

    fn wait(&mut self) {
        self.better = JoinSet::new();
        self.replaced = None;
        let at = clock::now() + self.backoff.next_wait();
        self.wait_until(at);
    }

    fn wait_until(&mut self, at: Instant) {
        self.improvement = Improvement::NONE;
        self.offers.send_replace(Offers::default());
        self.phase = Phase::Waiting(at);
    }

    /// The next event. Cancel-safe.
    pub(super) async fn next(&mut self) -> LinkEvent {
        loop {
            match &mut self.phase {
                Phase::Waiting(at) => {
                    tokio::time::sleep_until((*at).into()).await;
                    self.phase = Phase::Connecting(self.start(), None);
                    return LinkEvent::Trying;
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
                        self.plain = !self.plain;
                        self.wait();
                        if let Some(error) = error {
                            return LinkEvent::Failed(error);
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
                            if self.better.is_empty() && self.device != self.favoured {
                                self.improvement.plan(clock::now());
                            }
                            continue;
                        }
                        () = due(self.improvement.due) => {
                            self.improvement.due = None;
                            self.better = self.start_by(self.favoured.as_deref());
                            continue;
                        }
                        received = receiver.next() => received,
                    };
                    match received {
                        Ok(Inbound::Control(message)) => {
                            self.replaced = None;
                            return LinkEvent::Control(message);
                        }
                        Ok(Inbound::Relay(first)) => {
                            let mut relayed = RelayBatch::default();
                            relayed.push(&first);
                            receiver.more_relayed(&mut relayed);
                            return LinkEvent::Relayed(relayed);
                        }
                        Err(error) => {
                            self.wait();
                            return LinkEvent::Lost(error);
                        }
                    }
                }
            }
        }
    }

    fn take(&mut self, made: Made) -> LinkEvent {
        let Link { sender, receiver, local, remote, said, .. } = made.link;
        self.plain = false;
        // A token is for one connection.
        self.offers.send_replace(Offers::default());
        self.better = JoinSet::new();
        self.addresses.insert(made.server.to_string(), remote);
        let before = std::mem::replace(&mut self.phase, Phase::Connected(Box::new(receiver)));
        self.replaced = match before {
            Phase::Connected(receiver) => Some(receiver),
            Phase::Waiting(_) | Phase::Connecting(..) => None,
        };
        self.device.clone_from(&made.device);
        match self.device == self.favoured {
            true => self.improvement = Improvement::NONE,
            false => self.improvement.plan(clock::now()),
        }
        let (local, device) = (local.ip(), made.device);
        LinkEvent::Connected { server: remote, local, device, sender, said }
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
            let offers = match self.plain || device.is_some() {
                // Seen from another address a token is worth nothing.
                true => watch::Sender::default().subscribe(),
                false => self.offers.subscribe(),
            };
            let device = device.map(str::to_owned);
            let address = device.as_ref().and(self.addresses.get(&server.to_string())).copied();
            let way = Way { device, address };
            attempts.spawn(async move {
                tokio::time::sleep(delay).await;
                let Destination { server_keys, machine_key, .. } = &*destination;
                let link = connect_by(&way, &server, server_keys, machine_key, offers).await?;
                Ok(Made { link, server, device: way.device })
            });
            delay += STAGGER;
        }
    }
}

/// Waits until then, or for ever.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::listen;
    use crate::io::said::Said;

    #[test]
    fn an_uplink_that_stays_away_is_tried_ever_more_rarely() {
        let (mut improvement, now) = (Improvement::NONE, crate::testing::epoch());
        let mut waits = Vec::new();
        for _ in 0..8 {
            improvement.plan(now);
            waits.extend(improvement.due.map(|due| (due - now).as_secs()));
        }
        assert_eq!(waits, [2, 4, 8, 16, 32, 64, 120, 120]);
    }

    /// A server that nobody serves yet, its key, and a link that will ask it.
    async fn listener_and_link() -> (tokio::net::TcpListener, SecretKey, ControlLink) {
        let server_key = SecretKey::from_bytes([1; 32]);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = ControlLink::new(Destination {
            servers: vec![listener.local_addr().unwrap().into()],
            server_keys: vec![server_key.public()],
            machine_key: SecretKey::from_bytes([2; 32]),
        });
        (listener, server_key, link)
    }

    #[tokio::test]
    async fn a_server_that_refuses_every_time_is_asked_ever_more_rarely() {
        let (listener, server_key, mut link) = listener_and_link().await;
        tokio::spawn(async move {
            let mut links = Vec::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let said = Said::default();
                let upgraded = listen::upgrade(stream, &server_key, &said, |_, _| false).await;
                let (link, _) = upgraded.unwrap();
                link.sender.try_send_control(b"no".to_vec()).unwrap();
                links.push(link);
            }
        });
        let mut waits = Vec::new();
        let refused = async {
            for _ in 0..12 {
                while !matches!(link.next().await, LinkEvent::Control(_)) {}
                link.reconnect();
                let Phase::Waiting(at) = link.phase else { panic!("it waits") };
                waits.push(at.saturating_duration_since(clock::now()));
                // Who has that much time?
                link.phase = Phase::Waiting(clock::now());
            }
        };
        tokio::time::timeout(Duration::from_secs(30), refused).await.unwrap();
        assert!(waits.iter().any(|wait| *wait > Duration::from_millis(700)), "{waits:?}");
        link.note_welcome();
        link.reconnect();
        let Phase::Waiting(at) = link.phase else { panic!("it waits") };
        let wait = at.saturating_duration_since(clock::now());
        assert!(wait < Duration::from_millis(400), "after a welcome it is soon: {wait:?}");
    }

    #[tokio::test]
    async fn a_connection_by_a_further_uplink_goes_back_to_the_preferred_one() {
        let (listener, server_key, mut link) = listener_and_link().await;
        link.set_devices(vec!["lo".into()]);
        tokio::spawn(async move {
            // The first is by the preferred uplink, which does not work yet.
            drop(listener.accept().await.unwrap());
            let mut links = Vec::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                links.push(
                    listen::upgrade(stream, &server_key, &Said::default(), |_, _| false).await,
                );
            }
        });
        let mut devices = Vec::new();
        let both = async {
            while devices.len() < 2 {
                if let LinkEvent::Connected { device, .. } = link.next().await {
                    devices.push(device);
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), both).await.unwrap();
        assert_eq!(devices, [Some("lo".to_owned()), None]);
    }
}
