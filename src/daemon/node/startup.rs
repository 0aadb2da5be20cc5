//! From options to a running daemon, and its end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::bind::bind_udp;
use super::control_link::ControlLink;
use super::device::reserve;
use super::interface::{InterfaceError, widest_mtu};
use super::local::{LocalServer, serve_local};
use super::portmap::PortMapping;
use super::roam::Surroundings;
use super::rotate::Rotation;
use super::state::{StateDir, StateError};
use super::threads::{Ports, Threads};
use super::{Daemon, Ended, taken};
use crate::dataplane::{Note, TunBatch, UdpBatch};
use crate::io::clock;
use crate::io::link::ConnectError;
use crate::io::local::{LocalError, LocalListener};
use crate::io::metrics::LoopbackAddr;
use crate::io::os::{Netlink, NetlinkError};
use crate::io::service::reload::{Read, Reload};
use crate::io::service::{Watchdog, handed_tuns};
use crate::node::{Event, Node, NodeSettings};
use crate::server::admin::rfc3339;
use crate::types::{BASE_MTU, NetworkId, NodeName};
use crate::wire::control::RefusedCode;
use crate::wire::join::JoinLine;

/// A first enrolment takes no longer: the connection has its own, shorter limits.
const ENROL_LIMIT: Duration = Duration::from_secs(20);
/// Notes and requests that wait for the control task.
const QUEUE: usize = 1024;
/// One scratch socket lives at a time; a second answer may be late.
const SCRATCH_QUEUE: usize = 8;

/// What the daemon is told by flags, variables and files.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// To join with; none to use the enrolment in the state directory.
    pub join: Option<JoinLine>,
    /// The name to ask for.
    pub name: Option<NodeName>,
    /// Keys and netmap.
    pub state_dir: PathBuf,
    /// The local socket.
    pub socket: PathBuf,
    /// The TUN interface.
    pub interface: String,
    /// UDP port; none for the last one or a random one.
    pub listen_port: Option<u16>,
    /// MTU of the TUN interface in bytes; none for what the widest link allows.
    pub mtu: Option<u16>,
    /// What the core can be told.
    pub settings: NodeSettings,
    /// What the data plane may ask the kernel for.
    pub offloads: Offloads,
    /// Have the threads that move packets run ahead of ordinary programs, where that is allowed.
    pub realtime: bool,
    /// The lease to ask the router for when it maps a port; none to leave it alone.
    pub port_mapping: Option<Duration>,
    /// Go by every default route when the preferred one fails.
    pub all_uplinks: bool,
    /// Where Prometheus may ask; none for nowhere.
    pub metrics: Option<LoopbackAddr>,
    /// Renew the node key when it is so old; none for never.
    pub rotate_key_after: Option<Duration>,
    /// Stop as soon as the server has let us in.
    pub enrol_only: bool,
}

impl NodeOptions {
    /// Looks at the links when no MTU is wished; `roam` does again when others come.
    async fn settle_mtu(&mut self) {
        if self.mtu.is_none() {
            self.mtu = widest_link(&self.interface)
                .await
                .inspect_err(|error| tracing::warn!(%error, "the MTU of the links is not known"))
                .ok();
        }
        self.settings.max_mtu = self.interface_mtu();
    }

    /// MTU of the TUN interface in bytes.
    pub(super) fn interface_mtu(&self) -> u16 {
        self.mtu.unwrap_or(BASE_MTU)
    }
}

async fn widest_link(own: &str) -> Result<u16, NetlinkError> {
    Ok(widest_mtu(&Netlink::connect()?.links().await?, own))
}

/// Offloads that may be used where the kernel has them.
#[derive(Debug, Clone, Copy)]
pub struct Offloads {
    /// Super-packets on the TUN interface.
    pub tun: bool,
    /// Many datagrams per send.
    pub udp_gso: bool,
    /// Many datagrams per receive.
    pub udp_gro: bool,
}

/// Why the daemon did not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A daemon serves this socket.
    #[error("overlay is already running (it answers on {})", socket.display())]
    AlreadyRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// A daemon serves this socket, and the join line says what it does not know.
    #[error("overlay is already running (it answers on {}), and uses another join line",
        socket.display())]
    RunsOtherwise {
        /// The socket.
        socket: PathBuf,
    },
    /// A daemon with another state directory serves this socket.
    #[error("another node (state directory {}) answers on {}", runs.display(), socket.display())]
    RunsElsewhere {
        /// The socket.
        socket: PathBuf,
        /// The state directory of that one.
        runs: PathBuf,
        /// The state directory of this one.
        wanted: PathBuf,
    },
    /// The socket is that of a server.
    #[error("a server answers on {}", socket.display())]
    ServerAnswers {
        /// The socket.
        socket: PathBuf,
    },
    /// No join line, and nothing in the state directory.
    #[error("this machine is not enrolled in a network")]
    NotEnrolled,
    /// The join line is for another network than the one in the state directory.
    #[error("this machine is a member of network {have}, the join line is for {wanted}")]
    OtherNetwork {
        /// In the state directory.
        have: NetworkId,
        /// In the join line.
        wanted: NetworkId,
    },
    /// The server cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server says no.
    #[error("{message}")]
    Refused {
        /// Why.
        code: RefusedCode,
        /// In its words.
        message: String,
    },
    /// The server knows us, and will not let us in.
    #[error("the membership of this machine ended at {at}")]
    Expired {
        /// When.
        at: String,
    },
    /// The server neither let us in nor said no.
    #[error("the server did not answer the request to join within {} s", ENROL_LIMIT.as_secs())]
    NoAnswer,
    /// A packet thread has ended by itself; what it met is in the log.
    #[error("no packets move any more: the thread {thread} has ended")]
    ThreadEnded {
        /// Its name.
        thread: String,
    },
    /// The UDP port is taken.
    #[error("UDP port {port} is taken by another program")]
    PortTaken {
        /// The port.
        port: u16,
    },
    /// The UDP port that was asked for cannot be had.
    #[error("UDP port {port} cannot be used")]
    Port {
        /// The port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// The local socket.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The TUN interface.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// The listener for Prometheus.
    #[error("cannot listen on {address} (metrics)")]
    Metrics {
        /// The address.
        address: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else that the kernel refuses.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// SIGTERM and SIGINT.
pub(super) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> Result<Self, StartError> {
        let signal = |kind| {
            signal(kind).map_err(|source| StartError::Io { action: "watching signals", source })
        };
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for one of them. Cancel-safe.
    pub(super) async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// A join line makes a state directory one of its network, if it is none of another.
fn prepare(options: &NodeOptions, state: &mut StateDir) -> Result<(), StartError> {
    match (&options.join, state.enrolment()) {
        (None, None) => return Err(StartError::NotEnrolled),
        (Some(join), Some(enrolment)) if join.network != enrolment.network => {
            return Err(StartError::OtherNetwork { have: enrolment.network, wanted: join.network });
        }
        (Some(join), _) => state.prepare(join),
        (None, Some(_)) => {}
    }
    Ok(())
}

/// Runs a node until it is stopped or removed. `ready` is called when the overlay address is
/// usable; `read` reads the options anew when SIGHUP comes.
///
/// # Errors
/// When it cannot start; after that only when the interface cannot be remade, or a packet thread has
/// ended.
pub async fn run(
    mut options: NodeOptions,
    read: Read<NodeOptions>,
    ready: impl FnOnce(&Node),
) -> Result<Ended, StartError> {
    let (reload, configured) = (Reload::new(read), NodeOptions { join: None, ..options.clone() });
    options.settle_mtu().await;
    let mut stop = StopSignals::new()?;
    let listener = taken::listen(&options).await?;
    let mut state = StateDir::open(&options.state_dir)?;
    prepare(&options, &mut state)?;
    let enrolment = state.enrolment().ok_or(StartError::NotEnrolled)?.clone();
    let netmap = if enrolment.joined { state.netmap() } else { crate::node::Netmap::default() };
    let mut kept = handed_tuns();
    if netmap.identity.is_none() && !options.enrol_only {
        // Before there are keys: another user, who may do it, will join with others.
        reserve(&options, &mut kept).await?;
    }
    let keys = state.keys()?;

    let now = clock::now();
    let call_epoch = netmap.next_call_epoch(clock::unix_seconds());
    let node = Node::new(keys.node, netmap, options.settings, rand::random(), call_epoch, now);
    let ports = open_ports(&options, &node, enrolment.listen_port)?;
    let (note_sender, notes) = mpsc::channel(QUEUE);
    let (request_sender, requests) = mpsc::channel(QUEUE);
    let port_mapping = PortMapping::wanted(&options, &ports, &keys.machine);
    let control_link = ControlLink::new(enrolment.destination(keys.machine));
    let mut daemon = Daemon {
        node,
        ports: Arc::clone(&ports),
        interface: None,
        kept,
        peer_mtus: std::collections::BTreeMap::new(),
        unrouted: super::interface::Unrouted::default(),
        state,
        control_link,
        server: None,
        link_local: None,
        link_device: None,
        reflector_ports: (None, None),
        heard_server: now,
        notes,
        requests,
        scratch: mpsc::channel(SCRATCH_QUEUE),
        surroundings: Surroundings::watch(),
        port_mapping,
        pings: std::collections::BTreeMap::new(),
        next_token: 0,
        halves: std::collections::BTreeMap::new(),
        ready: false,
        saving: super::saving::Saving::default(),
        watchdog: Watchdog::new(ports.progress(), now),
        rotation: Rotation::new(now),
        said: Vec::new(),
        started: clock::unix_seconds(),
        out: UdpBatch::default(),
        relayed: TunBatch::default(),
        options,
        configured,
        reload,
        metrics: None,
        request_sender,
        refused: None,
        rival: None,
        connect_error: None,
        ended: None,
    };
    daemon.scan_interfaces().await;
    live(daemon, listener, note_sender, &mut stop, ready).await
}

/// The life of a daemon that has all it needs.
async fn live(
    mut daemon: Daemon,
    listener: LocalListener,
    note_sender: mpsc::Sender<Note>,
    stop: &mut StopSignals,
    ready: impl FnOnce(&Node),
) -> Result<Ended, StartError> {
    // From here on commands are answered, though most of them with "not enrolled yet".
    let (request_sender, ports) = (daemon.request_sender.clone(), Arc::clone(&daemon.ports));
    let metrics = daemon.options.metrics.filter(|_| !daemon.options.enrol_only);
    daemon.metrics = metrics.map(|at| super::metrics::start(at, &request_sender)).transpose()?;
    let local = serve_local(listener, request_sender);
    let start_threads = || {
        Threads::start(&ports, &note_sender)
            .map_err(|source| StartError::Io { action: "starting the packet threads", source })
    };
    let threads = match daemon.come_up(stop, &start_threads).await {
        Ok((threads, None)) => threads,
        Ok((threads, Some(ended))) => {
            drop(threads);
            leave(daemon, ports, local).await;
            return Ok(ended);
        }
        Err(error) => {
            leave(daemon, ports, local).await;
            return Err(error);
        }
    };
    daemon.state.set_listen_port(ports.listen_port());
    daemon.save();
    if daemon.options.enrol_only {
        ready(&daemon.node);
        return Ok(Ended::Stopped);
    }
    let threads = threads.map_or_else(start_threads, Ok)?;
    daemon.ready = true;
    ready(&daemon.node);
    let ended = daemon.serve(stop).await;
    daemon.metrics = None;
    daemon.refuse_requests();
    daemon.end_interface(matches!(ended, Ok(Ended::Down | Ended::Removed))).await;
    drop(threads);
    daemon.end_portmap().await;
    daemon.save();
    leave(daemon, ports, local).await;
    ended
}

/// The socket goes last: who waits for its end finds the interface, the port and the lock free.
async fn leave(mut daemon: Daemon, ports: Arc<Ports>, local: LocalServer) {
    daemon.refuse_requests();
    drop((daemon, ports));
    local.end().await;
}

/// Binds the main sockets, for the two threads and the control task.
fn open_ports(
    options: &NodeOptions,
    node: &Node,
    listen_port: u16,
) -> Result<Arc<Ports>, StartError> {
    let (udp_v4, udp_v6) = bind_udp(options, listen_port)?;
    let ports = Ports::new(udp_v4, udp_v6, Arc::clone(node.shared()), options.realtime)
        .map_err(|source| StartError::Io { action: "making an event descriptor", source })?;
    Ok(Arc::new(ports))
}

impl Daemon {
    /// Makes the interface of a member, or has a new node enrol, unless it ends before: then nothing of
    /// it stays. The packet threads of a new node, if it is to send packets, run from then on.
    async fn come_up(
        &mut self,
        stop: &mut StopSignals,
        start_threads: &impl Fn() -> Result<Threads, StartError>,
    ) -> Result<(Option<Threads>, Option<Ended>), StartError> {
        let started = self.get_in(stop, start_threads).await;
        if !matches!(started, Ok((_, None))) {
            // The router was asked beside everything else.
            self.settle_portmap().await;
            self.end_portmap().await;
        }
        started
    }

    async fn get_in(
        &mut self,
        stop: &mut StopSignals,
        start_threads: &impl Fn() -> Result<Threads, StartError>,
    ) -> Result<(Option<Threads>, Option<Ended>), StartError> {
        self.node.guess_server_time(clock::unix_seconds(), clock::now());
        let reflectors = self.netcheck_inputs().reflectors();
        if self.options.enrol_only {
            return Ok((None, self.enrol(stop).await?));
        }
        if let Some(identity) = self.node.netmap().identity.clone() {
            // What peers send must not be read before there is an interface for it.
            self.handle_event(Event::Identity(identity), clock::now()).await?;
            self.node.ask_reflectors(&reflectors, clock::now());
            return Ok((None, None));
        }
        // The answers are here before there is a control connection to tell them on.
        let threads = start_threads()?;
        self.node.ask_reflectors(&reflectors, clock::now());
        Ok((Some(threads), self.enrol(stop).await?))
    }

    /// Serves until the server has let us in, or will not.
    async fn enrol(&mut self, stop: &mut StopSignals) -> Result<Option<Ended>, StartError> {
        let deadline = clock::now() + ENROL_LIMIT;
        loop {
            self.drain().await?;
            if self.ended.is_some() {
                return Ok(self.ended);
            }
            if let Some((code, message)) = self.refused.take() {
                return Err(StartError::Refused { code, message });
            }
            if let Some(error) = self.connect_error.take() {
                return Err(StartError::Connect(error));
            }
            if self.node.is_told_expired(clock::now()) {
                let ends = self.node.netmap().expires.unwrap_or_default();
                return Err(StartError::Expired { at: rfc3339(ends) });
            }
            let let_in = self.node.netmap().identity.is_some() && self.server.is_some();
            if let_in && (self.options.enrol_only || self.interface.is_some()) {
                return Ok(None);
            }
            if clock::now() >= deadline {
                return Err(StartError::NoAnswer);
            }
            let limit = deadline.saturating_duration_since(clock::now());
            // Every source in a turn is cancel-safe, so nothing is lost at the limit.
            let _ = tokio::time::timeout(limit, self.turn(stop)).await;
        }
    }
}
