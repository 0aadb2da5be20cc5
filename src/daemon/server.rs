//! The server daemon: joins the server's control plane to sockets, store and clock.
//!
//! [`start`] opens everything and returns when the server can be used; the rest runs in tasks and
//! in one thread for each UDP socket. This file starts and stops the parts:
//! `state` is what lies on disk, `sockets` what is bound, `connections` the control connections,
//! `relay` the UDP side, `core` the loop around the state machine, `local` the administrator,
//! `metrics` what Prometheus is told, `status` what a person is.

mod addresses;
mod backup;
mod connections;
mod core;
mod local;
mod metrics;
mod relay;
mod sockets;
mod state;
mod status;

pub use backup::{BackupError, Restored, records_in, restore};
pub use local::{EventInfo, FOLLOW_QUIET, Question, StoreAnswer};
pub use status::{RateInfo, RelayInfo, ServerStatus, WayInfo};

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::io::files::FileError;
use crate::io::local::{LocalError, LocalListener, Refusal};
use crate::io::metrics::{LoopbackAddr, MetricsServer};
use crate::io::service::handed_listeners;
use crate::io::service::reload::{Reload, notify_reloaded, notify_reloading, warn_of_unapplied};
use crate::io::threads::Fallen;
use crate::server::admin::{Answer, JoinText, Request};
use crate::server::fresh::Tokens;
use crate::server::relay::RelayTable;
use crate::server::relay::limit::Limits;
use crate::server::{Server, Settings};
use crate::store::StoreError;
use crate::types::{DropCounters, RangeError};
use crate::wire::join::ServerAddr;
use addresses::Advertised;
use core::Event;
use relay::Hub;

/// Events that may wait for the core; connections that have more to say wait.
const EVENT_QUEUE: usize = 1024;
/// How long a stopping server may write down what it knows.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// The invite of the first start, as `overlay server invite` makes it.
const FIRST_INVITE_TTL_S: u64 = 3600;

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses to listen on, TCP and UDP; none for the defaults.
    pub listen: Vec<SocketAddr>,
    /// Addresses for join lines; none to look at the interfaces.
    pub public_addr: Vec<ServerAddr>,
    /// Where keys and members are kept.
    pub state_dir: PathBuf,
    /// The local socket.
    pub socket: PathBuf,
    /// The wished IPv4 range.
    pub network: Option<Ipv4Net>,
    /// The wished IPv6 range.
    pub network_ipv6: Option<Ipv6Net>,
    /// Where Prometheus may ask; none for nowhere.
    pub metrics: Option<LoopbackAddr>,
    /// In a network of up to so many nodes each is told of every other.
    pub whole_netmap_up_to: usize,
    /// How much the relay carries.
    pub relay_limits: Limits,
}

/// Why a server does not start, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file in the state directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record in the store.
    #[error("the store holds {kind} {id}, which cannot be read: {reason}")]
    Record {
        /// The kind of the record.
        kind: String,
        /// Its id.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// The store is gone and the key is there.
    #[error("{} is there, but the store {} is not or is empty", key.display(), store.display())]
    StoreLost {
        /// The key file.
        key: PathBuf,
        /// The database.
        store: PathBuf,
    },
    /// A backup was not put in place to the end.
    #[error("a backup was about to be restored in {}, and that was interrupted", state_dir.display())]
    HalfRestored {
        /// The state directory.
        state_dir: PathBuf,
    },
    /// The key is gone and the store is there.
    #[error("the store has a network in it, but its key {} is not there or damaged", key.display())]
    KeyLost {
        /// The key file.
        key: PathBuf,
    },
    /// The key is one that no node of this network knows.
    #[error("{} is the key {found} of another server; that of the network in the store is {known}",
        key.display())]
    OtherKey {
        /// The key file.
        key: PathBuf,
        /// The start of the key in it.
        found: String,
        /// The start of the one that it should be.
        known: String,
    },
    /// A range that no network can have.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A range that is not the one of the network.
    #[error("the network has the range {has} and nodes in it; it cannot become {wished}")]
    RangeFixed {
        /// The range that it has.
        has: String,
        /// The range in the configuration.
        wished: String,
    },
    /// A socket that cannot be opened.
    #[error("cannot listen on {address} ({protocol}): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// TCP or UDP.
        protocol: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The listener for Prometheus.
    #[error("cannot listen on {address} (metrics)")]
    Metrics {
        /// The address.
        address: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The local socket.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The server of a new network has no invite for its first node.
    #[error("{}: {}", refusal.error, refusal.cause)]
    FirstInvite {
        /// Why, and what helps.
        refusal: Box<Refusal>,
    },
    /// It ran, and a part of it has ended.
    #[error("cannot {action}: {what} has ended")]
    Died {
        /// What it was for.
        action: &'static str,
        /// The part.
        what: String,
    },
    /// Threads, random numbers, interfaces: things that are always there.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The signals that a server obeys. Made before it starts: one that comes meanwhile is not lost.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From here on these signals do not end the process by themselves.
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn catch() -> Result<Self, StartError> {
        let catch = |kind| {
            signal(kind)
                .map_err(|source| StartError::System { action: "wait for a signal", source })
        };
        let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
        Ok(Self { terminate: catch(terminate)?, interrupt: catch(interrupt)? })
    }
}

/// A server that runs; it stops when this is dropped, and in good order by [`Self::stop`].
#[derive(Debug)]
pub struct RunningServer {
    listening: Vec<SocketAddr>,
    advertised: Vec<ServerAddr>,
    first_join_line: Option<JoinText>,
    options: Options,
    events: mpsc::Sender<Event>,
    hub: Arc<Hub>,
    metrics: Option<MetricsServer>,
    stop: watch::Sender<bool>,
    core: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Of the threads, one that has ended without having been told to.
    fallen: Fallen,
}

/// Starts a server. When this returns its sockets are bound and its store is open.
///
/// # Errors
/// When something is in the way; nothing of it runs then.
pub async fn start(options: Options) -> Result<RunningServer, StartError> {
    allow_many_connections();
    let bound = sockets::bind(&options.listen, handed_listeners())?;
    let local = LocalListener::bind(&options.socket).await?;
    let state = state::open(&options).await?;
    let (now, wall) = (crate::io::clock::now(), crate::io::clock::unix_seconds());
    let mut advertised =
        Advertised::new(&options.public_addr, &bound, state.records.network.record.range);
    let addresses = advertised.news(now).unwrap_or_default();
    let settings = Settings {
        server_key: state.key.public(),
        addresses: addresses.clone(),
        whole_netmap_up_to: options.whole_netmap_up_to,
    };
    let server = Server::new(settings, state.records, state.seed, now, wall);
    let range = server.network().range;
    let listening: Vec<SocketAddr> = bound.tcp.iter().map(|listener| listener.address).collect();
    info!(
        network = %server.network().id,
        ipv4 = %range.v4(),
        ipv6 = %range.v6(),
        key = %state.key.public().short(),
        state_dir = %options.state_dir.display(),
        "network open"
    );

    let (stop, stopping) = watch::channel(false);
    let (events, inbox) = mpsc::channel(EVENT_QUEUE);
    let tokens = Tokens::new(*state::random()?, now);
    let table = RelayTable::new(options.relay_limits, *state::random()?);
    let table = table.with_tokens(tokens.clone());
    let hub = Arc::new(Hub::new(bound.udp, table, events.clone()));
    let fallen = Fallen::default();
    let threads = relay::spawn(&hub, &stopping, &fallen)?;
    let parts = core::Parts {
        store: state.store,
        key: state.key.clone(),
        hub: Arc::clone(&hub),
        advertised,
        lock: state.lock,
    };
    let mut core = core::Core::new(server, parts).await?;
    let newest = core.newest_event();
    let first_join_line = first_join_line(&mut core).await?;
    core.warn();
    let metrics = options.metrics.map(|at| metrics::start(at, &events)).transpose()?;
    let mut tasks = Vec::new();
    let entrance =
        Arc::new(connections::Entrance::new(state.key, tokens, events.clone(), Arc::clone(&hub)));
    for listener in bound.tcp {
        let (udp, second) = (listener.relay_port, listener.second_port);
        info!(address = %listener.address, udp, second, "listening");
        tasks.push(tokio::spawn(connections::accept(listener, Arc::clone(&entrance))));
    }
    tasks.push(tokio::spawn(local::serve(local, events.clone(), newest)));
    let core = tokio::spawn(core.run(inbox, stopping));
    let advertised = addresses;
    Ok(RunningServer {
        listening,
        advertised,
        first_join_line,
        options,
        events,
        hub,
        metrics,
        stop,
        core,
        tasks,
        threads,
        fallen,
    })
}

/// Takes as many open files as the system allows: every node is one.
fn allow_many_connections() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files");
    }
}

/// The join line that a server without nodes shows when it starts.
async fn first_join_line(core: &mut core::Core) -> Result<Option<JoinText>, StartError> {
    // A line that names no address is of no use; `Core::warn` says what to do.
    if !core.has_no_members() || core.has_no_address() {
        return Ok(None);
    }
    let request =
        Request::Invite { uses: 1, ttl_s: FIRST_INVITE_TTL_S, name: None, tags: Vec::new() };
    match core.answer(request, "server").await {
        Ok(Answer::Invited(invited)) => Ok(Some(invited.join)),
        Ok(_) => Ok(None),
        Err(refusal) => Err(StartError::FirstInvite { refusal: Box::new(refusal) }),
    }
}

impl RunningServer {
    /// The TCP addresses; the first one's port is the UDP port too.
    #[must_use]
    pub fn listening(&self) -> &[SocketAddr] {
        &self.listening
    }

    /// A join line, when nobody has joined yet.
    #[must_use]
    pub fn first_join_line(&self) -> Option<&JoinText> {
        self.first_join_line.as_ref()
    }

    /// What the relay has dropped, by reason.
    #[must_use]
    pub fn drops(&self) -> &DropCounters {
        self.hub.drops()
    }

    /// Tells the service manager that the server is ready, waits for SIGTERM or SIGINT, and stops.
    /// SIGHUP reads the options anew.
    ///
    /// # Errors
    /// When the signals cannot be had, or the server has died.
    pub async fn run_until_signal(
        mut self,
        signals: Signals,
        mut reload: Reload<Options>,
    ) -> Result<(), StartError> {
        let Signals { mut terminate, mut interrupt } = signals;
        let status = where_found(&self.advertised);
        notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(&status)]);
        let died = loop {
            tokio::select! {
                _ = terminate.recv() => break false,
                _ = interrupt.recv() => break false,
                _ = &mut self.core => break true,
                () = self.fallen.wait() => break false,
                () = reload.asked() => {}
            }
            notify_reloading();
            if let Some(new) = reload.read() {
                self.apply_options(new).await;
            }
            notify_reloaded();
        };
        info!("stopping");
        notify(&[sd_notify::NotifyState::Stopping]);
        if died {
            return Err(StartError::Died {
                action: "go on",
                what: "the core of the server".into(),
            });
        }
        let fallen = self.fallen.name();
        self.stop().await;
        let Some(thread) = fallen else { return Ok(()) };
        Err(StartError::Died { action: "relay", what: format!("the thread {thread}") })
    }

    async fn apply_options(&mut self, new: Options) {
        let old = &mut self.options;
        warn_of_unapplied(&[
            ("listen", new.listen != old.listen),
            ("state-dir", new.state_dir != old.state_dir),
            ("socket", new.socket != old.socket),
            ("network", new.network != old.network),
            ("network-ipv6", new.network_ipv6 != old.network_ipv6),
            ("whole-netmap-up-to", new.whole_netmap_up_to != old.whole_netmap_up_to),
        ]);
        if new.public_addr != old.public_addr {
            old.public_addr.clone_from(&new.public_addr);
            // The core is gone only when the server is about to end.
            let _ = self.events.send(Event::PublicAddr(new.public_addr)).await;
        }
        if new.relay_limits != old.relay_limits {
            old.relay_limits = new.relay_limits;
            self.hub.set_limits(new.relay_limits);
        }
        if new.metrics != old.metrics {
            match new.metrics.map(|at| metrics::start(at, &self.events)).transpose() {
                Ok(server) => (self.metrics, old.metrics) = (server, new.metrics),
                Err(error) => error!(%error, "metrics cannot be moved"),
            }
        }
        info!("the configuration was read again");
    }

    /// Writes down what is known and closes everything.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        if timeout(STOP_LIMIT, &mut self.core).await.is_err() {
            warn!("the store takes too long, stopping without it");
        }
        let drops = self.hub.drops().snapshot();
        info!(?drops, "stopped");
        // A task that is aborted lets go of its sockets only when it is polled for the last time.
        for task in &mut self.tasks {
            task.abort();
            let _ = task.await;
        }
        for thread in std::mem::take(&mut self.threads) {
            if !matches!(tokio::task::spawn_blocking(|| thread.join()).await, Ok(Ok(()))) {
                error!("a relay thread had panicked");
            }
        }
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        self.core.abort();
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What `overlay service status` shows.
fn where_found(addresses: &[ServerAddr]) -> String {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    format!("nodes find it at {}", addresses.join(", "))
}

/// Without a service manager there is nobody to tell.
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "cannot tell the service manager");
    }
}
