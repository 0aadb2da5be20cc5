//! The node daemon: joins the node core to sockets, TUN, netlink and the local socket.
//!
//! One task owns the core and serves every source once per turn; two plain threads (`threads`) move
//! packets, and `extra` are sockets that come and go. `startup` makes all of it, `bind` the main
//! UDP sockets, `state` is what is on disk, `saving` when it gets there, `control_link` keeps the
//! control connection, `interface` the TUN interface on its `device`, `roam` follows the network around us,
//! `portmap` asks the router for a port, `local` answers the command line, `ping` the longest of
//! its questions, `lines` knows the uplinks beside the preferred one, `metrics` Prometheus,
//! `rotate` renews the node key, `reload` applies a new configuration, `explain` has its answers
//! about paths, `netcheck` measures the network in front of us.

mod bind;
mod control_link;
mod device;
pub mod explain;
mod extra;
mod interface;
mod lines;
mod local;
mod metrics;
mod netcheck;
mod path_mtu;
mod ping;
mod portmap;
mod reload;
pub mod report;
mod roam;
pub mod rotate;
mod saving;
mod scratch;
mod standing;
mod startup;
mod state;
mod taken;
mod threads;
mod warnings;

pub use device::try_interface;
pub use interface::InterfaceError;
pub use local::Question;
pub use ping::PingLine;
pub use startup::{NodeOptions, Offloads, StartError, run};
pub use state::{ENROLMENT_FILE, StateError, rewritten};
pub use taken::{Said, ask_for_status};

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::dataplane::{Note, Source, TunBatch, UdpBatch, inbound_all};
use crate::io::clock;
use crate::io::link::{ConnectError, RelayBatch};
use crate::io::metrics::MetricsServer;
use crate::io::service::Watchdog;
use crate::io::service::reload::Reload;
use crate::io::tun::Tun;
use crate::node::{Event, Node};
use crate::path::Answer;
use crate::types::{NodeId, OverlayAddrs};
use crate::wire::control::{self, ClientMessage, RefusedCode, SILENCE_LIMIT_S, ServerMessage};
use control_link::{ControlLink, LinkEvent};
use interface::{Interface, Unrouted};
use local::Request;
use portmap::PortMapping;
use roam::Surroundings;
use rotate::Rotation;
use saving::Saving;
use scratch::ScratchAnswer;
use state::StateDir;
use threads::{Ports, send_all, send_opener, send_whole_probe, write_packet, write_tun};

/// Notes taken in one turn, so that no flood starves the other sources.
const NOTES_PER_TURN: usize = 256;

/// Another machine with our keys is spoken of for so long after its last try; it tries once a minute.
const RIVAL_MEMORY: Duration = Duration::from_secs(300);

/// Why the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By a signal; the service manager knows whether another run follows.
    Stopped,
    /// By a command.
    Down,
    /// The server says that this machine is not a member.
    Removed,
}

/// What runs: the core and everything it is joined to.
struct Daemon {
    node: Node,
    ports: Arc<Ports>,
    interface: Option<Interface>,
    /// TUN devices that an earlier run has left to the service manager, and one made in advance.
    kept: Vec<Tun>,
    /// What each direct path carries, where that is not what every path does.
    peer_mtus: BTreeMap<Ipv4Addr, (OverlayAddrs, u16)>,
    unrouted: Unrouted,
    state: StateDir,
    control_link: ControlLink,
    server: Option<SocketAddr>,
    /// Our address on the control connection.
    link_local: Option<IpAddr>,
    /// The interface that it is bound to; none when it goes where the routes say.
    link_device: Option<String>,
    reflector_ports: (Option<u16>, Option<u16>),
    heard_server: Instant,
    notes: mpsc::Receiver<Note>,
    requests: mpsc::Receiver<Request>,
    /// Both ends: the daemon hands the one to every scratch socket.
    scratch: (mpsc::Sender<ScratchAnswer>, mpsc::Receiver<ScratchAnswer>),
    surroundings: Surroundings,
    port_mapping: Option<PortMapping>,
    pings: BTreeMap<u64, oneshot::Sender<Answer>>,
    next_token: u64,
    /// Who waits for a peer's half of the view.
    halves: BTreeMap<NodeId, Vec<oneshot::Sender<()>>>,
    /// The overlay address can be used.
    ready: bool,
    saving: Saving,
    watchdog: Watchdog,
    rotation: Rotation,
    /// What was said last of memberships that end.
    said: Vec<String>,
    /// In seconds since 1970.
    started: u64,
    out: UdpBatch,
    /// What came by the control connection, on its way to the interface.
    relayed: TunBatch,
    options: NodeOptions,
    /// The options as they were given.
    configured: NodeOptions,
    reload: Reload<NodeOptions>,
    metrics: Option<MetricsServer>,
    request_sender: mpsc::Sender<Request>,
    refused: Option<(RefusedCode, String)>,
    /// When it was last seen that another machine has our keys, and what is known of it.
    rival: Option<(Instant, String)>,
    connect_error: Option<ConnectError>,
    ended: Option<Ended>,
}

impl Daemon {
    /// Serves until something ends it.
    async fn serve(&mut self, stop: &mut startup::StopSignals) -> Result<Ended, StartError> {
        loop {
            self.drain().await?;
            if let Some(ended) = self.ended {
                return Ok(ended);
            }
            self.turn(stop).await;
        }
    }

    /// Waits for one source and takes what it has.
    async fn turn(&mut self, stop: &mut startup::StopSignals) {
        let deadline = self.deadline();
        let sleep = tokio::time::sleep_until(deadline.into());
        tokio::select! {
            biased;
            () = stop.wait() => self.ended = Some(Ended::Stopped),
            Some(request) = self.requests.recv() => self.handle_request(request),
            surprise = self.surroundings.next() => self.handle_surprise(surprise, clock::now()),
            event = self.control_link.next() => self.handle_control_link(event),
            Some(note) = self.notes.recv() => self.take_notes(note),
            Some((from, answer)) = self.scratch.1.recv() => {
                self.node.handle_scratch(from, &answer, clock::now());
            }
            outcome = portmap::next(self.port_mapping.as_mut()) => {
                self.handle_portmap_outcome(outcome);
            }
            () = self.reload.asked() => self.handle_reload().await,
            () = self.ports.fallen.wait() => {}
            () = sleep => {}
        }
        let now = clock::now();
        let silent = Duration::from_secs(SILENCE_LIMIT_S);
        if self.server.is_some() && now.saturating_duration_since(self.heard_server) > silent {
            tracing::warn!("the server is silent, connecting again");
            self.control_link.reconnect();
            self.handle_link_down();
        }
        self.check_proof(now);
        self.node.handle_timeout(now);
        self.look_at_key(now);
        self.watchdog.look(now);
    }

    /// The part of a [turn](Self::turn) that paths need. Cancel-safe.
    async fn path_turn(&mut self) {
        let far = || clock::now() + Duration::from_secs(1);
        let deadline = self.node.poll_timeout().map_or_else(far, |(at, _)| at);
        tokio::select! {
            event = self.control_link.next() => self.handle_control_link(event),
            Some(note) = self.notes.recv() => self.take_notes(note),
            () = tokio::time::sleep_until(deadline.into()) => {}
        }
        self.node.handle_timeout(clock::now());
    }

    fn take_notes(&mut self, first: Note) {
        let now = clock::now();
        self.node.handle_note(first, now);
        for _ in 1..NOTES_PER_TURN {
            let Ok(note) = self.notes.try_recv() else { break };
            self.node.handle_note(note, now);
        }
    }

    fn deadline(&self) -> Instant {
        let silence = self.server.map(|_| {
            self.heard_server + Duration::from_secs(SILENCE_LIMIT_S) + Duration::from_millis(10)
        });
        [
            self.node.poll_timeout().map(|(at, _)| at),
            self.surroundings.rescan_at,
            self.surroundings.proof_due(),
            self.saving.due(),
            silence,
            self.portmap_deadline(),
            self.watchdog.next(),
            Some(self.rotation.deadline()),
            self.unrouted.due(),
        ]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or_else(|| clock::now() + Duration::from_secs(3600))
    }

    fn handle_control_link(&mut self, event: LinkEvent) {
        let now = clock::now();
        match event {
            LinkEvent::Trying => {
                let mut reflectors = self.netcheck_inputs().reflectors();
                reflectors.retain(|at| !self.control_link.has_token(at.ip()));
                self.node.ask_tokens(&reflectors, now);
                self.control_link.expect_tokens(reflectors.iter().map(SocketAddr::ip));
            }
            LinkEvent::Connected { server, local, device, sender, said } => {
                tracing::debug!(%server, early = said.is_some(), "the key exchange is through");
                (self.server, self.connect_error) = (Some(server), None);
                self.link_local = Some(local);
                self.link_device = device;
                self.heard_server = now;
                // What was queued for an older connection is in the hello already.
                while self.node.poll_message().is_some() {}
                self.saving.forget_held();
                let first = match said.map(|said| control::decode::<ClientMessage>(&said)) {
                    Some(Ok(ClientMessage { hello: Some(said), .. })) => {
                        self.node.confirmation(&said)
                    }
                    _ => Some(self.hello()),
                };
                let sent = first.map(|first| sender.try_send_control(control::encode(&first)));
                if !matches!(sent, Some(Ok(()))) {
                    self.control_link.reconnect();
                }
                self.ports.set_link(Some(sender));
            }
            LinkEvent::Control(bytes) => {
                self.heard_server = now;
                match control::decode::<ServerMessage>(&bytes) {
                    Ok(message) => {
                        if message.netmap.is_some() {
                            self.saving.note_news();
                        }
                        if let Some(server) = self.server {
                            self.node.handle_message(&message, server, now);
                        }
                        if let Some(welcome) = &message.welcome {
                            self.control_link.note_welcome();
                            let server = self.server.map(|server| server.to_string());
                            tracing::info!(server, name = %welcome.name, address = %welcome.ipv4,
                                "connected to the server");
                            self.reflector_ports = (welcome.relay_port, welcome.second_port);
                            let servers = self.state.note_welcome(welcome, self.server);
                            self.control_link.set_servers(servers);
                            // A member needs no invite, and who is removed is not to come back by it.
                            self.options.join = None;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "message of the server not understood"),
                }
            }
            LinkEvent::Relayed(datagrams) => {
                self.heard_server = now;
                self.handle_relayed(&datagrams, now);
            }
            LinkEvent::Lost(error) => {
                if self.server.is_some() {
                    tracing::info!(%error, "connection to the server lost");
                }
                self.handle_link_down();
            }
            LinkEvent::Failed(error) => {
                tracing::info!(%error, "cannot reach the server");
                self.connect_error = Some(error);
            }
        }
    }

    /// What is said first on a control connection.
    fn hello(&self) -> ClientMessage {
        let invite = self.options.join.as_ref().map(|join| control::InviteUse {
            id: join.invite.0,
            secret: join.secret.clone(),
            network: join.network.0,
        });
        self.node.hello(self.options.name.as_ref().map(ToString::to_string), invite)
    }

    fn handle_link_down(&mut self) {
        self.ports.set_link(None);
        self.server = None;
        self.node.handle_link_down(clock::now());
    }

    /// Relay frames that came by the control connection take the same way in as those by UDP.
    fn handle_relayed(&mut self, datagrams: &RelayBatch, now: Instant) {
        let shared = Arc::clone(self.node.shared());
        let table = shared.table();
        let (mut tun, mut notes) = (std::mem::take(&mut self.relayed), Vec::new());
        tun.clear(self.ports.trains());
        inbound_all(&shared, &table, Source::Link, datagrams.iter(), now, &mut tun, &mut notes);
        write_tun(&self.ports, &mut tun);
        self.relayed = tun;
        for note in notes {
            self.node.handle_note(note, now);
        }
    }

    /// Carries out all that the core wants.
    async fn drain(&mut self) -> Result<(), StartError> {
        if let Some(thread) = self.ports.fallen.name() {
            return Err(StartError::ThreadEnded { thread });
        }
        let now = clock::now();
        self.drive_portmap(now);
        while let Some(event) = self.node.poll_event() {
            self.handle_event(event, now).await?;
        }
        self.retry_routes(now).await;
        self.flush();
        if self.surroundings.rescan_at.is_some_and(|at| at <= now) {
            self.surroundings.rescan_at = None;
            if !self.options.enrol_only {
                self.mend_interface(now).await;
            }
            self.scan_interfaces().await;
        }
        self.save_when_due(now);
        Ok(())
    }

    /// Carries out what needs no waiting: everything that goes to sockets and threads.
    fn flush(&mut self) {
        let now = clock::now();
        let orders = self.node.take_socket_orders();
        for (socket, error) in self.ports.extra.carry_out(&orders, self.options.offloads) {
            tracing::warn!(%error, "an extra UDP socket could not be opened");
            self.node.handle_socket_lost(socket, now);
        }
        while let Some(opener) = self.node.poll_opener() {
            send_opener(&self.ports, &opener);
        }
        while let Some(probe) = self.node.poll_whole_probe() {
            send_whole_probe(&self.ports, &probe);
        }
        while let Some(packet) = self.node.poll_packet() {
            write_packet(&self.ports, &packet);
        }
        while let Some((remote, question)) = self.node.poll_scratch() {
            scratch::ask(remote, question, self.scratch.0.clone());
        }
        let mut out = std::mem::take(&mut self.out);
        self.node.take_datagrams(&mut out);
        send_all(&self.ports, &out);
        self.out = out;
        while let Some(message) = self.node.poll_message() {
            if message.ping.is_some() {
                self.note_asked(now);
            }
            self.say(message);
        }
    }

    async fn handle_event(&mut self, event: Event, now: Instant) -> Result<(), StartError> {
        match event {
            Event::Identity(identity) => {
                let current = self.interface.as_ref().map(Interface::identity);
                let known = current.is_some_and(|current| current.same_addresses(&identity));
                if !known && !self.options.enrol_only {
                    self.make_interface(identity).await?;
                    self.save();
                    self.scan_interfaces().await;
                }
            }
            Event::Rules | Event::PeerKeys => {
                self.save();
            }
            Event::Standing => self.note_standing(now),
            Event::KeyTold => self.note_key_told(),
            Event::KeyRetired => self.forget_old_key(),
            Event::Save => self.saving.plan(now),
            Event::Mtu { addrs, mtu } => self.set_peer_mtu(addrs, mtu).await,
            Event::Path { peer, from, to, why } => self.log_path(peer, from, to, why),
            Event::Pinged { token, answer } => {
                if let Some(reply) = self.pings.remove(&token) {
                    // The command may have gone away meanwhile.
                    let _ = reply.send(answer);
                }
            }
            Event::Token { server, token } => {
                let hello = control::encode(&self.hello());
                self.control_link.offer(server, token, hello);
            }
            Event::Knocked(knocked) => self.handle_knocked(knocked, now),
            Event::Reported(peer) => {
                for waiting in self.halves.remove(&peer).unwrap_or_default() {
                    // The command may have gone away meanwhile.
                    let _ = waiting.send(());
                }
            }
            Event::Uplink(by) => self.note_uplink(by.as_ref()),
            Event::Refused(code, message) => self.handle_refused(code, message),
            Event::Rival(from) => {
                self.note_rival(format!("it comes from {} and is kept out", from.ip()));
            }
        }
        Ok(())
    }

    fn handle_refused(&mut self, code: RefusedCode, message: String) {
        tracing::warn!(%message, "refused by the server");
        let was_member = self.node.netmap().identity.is_some();
        if was_member && code.is_about_the_invite() && self.options.join.take().is_some() {
            // A member is let in whatever it presents; without the invite we are told what we are.
            self.handle_link_down();
            return self.control_link.try_now();
        }
        self.refused = Some((code, message));
        match code {
            RefusedCode::NotMember if was_member => {
                self.node.handle_removed(clock::now());
                self.state.forget_enrolment();
                self.ended = Some(Ended::Removed);
            }
            RefusedCode::Replaced => self.control_link.pause(),
            RefusedCode::Cloned => {
                self.note_rival("it is connected, and this machine is kept out".into());
                self.control_link.pause();
            }
            _ => self.control_link.reconnect(),
        }
        self.handle_link_down();
    }

    fn note_rival(&mut self, what: String) {
        let first = self.rival_warnings(clock::now()).is_empty();
        self.rival = Some((clock::now(), what));
        // The other one tries again and again; the log says it once.
        for warning in self.rival_warnings(clock::now()).iter().filter(|_| first) {
            tracing::warn!("{warning}");
        }
    }

    fn rival_warnings(&self, now: Instant) -> Vec<String> {
        let recent =
            |(at, _): &&(Instant, String)| now.saturating_duration_since(*at) < RIVAL_MEMORY;
        let text = |(_, what): &(Instant, String)| {
            format!(
                "another machine has the keys of this one: {what}; stop one of the two, remove its \
                 state directory, and join with it anew: sudo overlay up JOINLINE"
            )
        };
        self.rival.iter().filter(recent).map(text).collect()
    }

    fn log_path(
        &self,
        peer: NodeId,
        from: Option<crate::path::Via>,
        to: Option<crate::path::Via>,
        why: &str,
    ) {
        let name = self.node.peer_info(peer).map(|info| info.name.to_string()).unwrap_or_default();
        let (path, was) = (self.show_path(to), self.show_path(from));
        tracing::info!(peer = name, path, was, why, "path changed");
    }
}
