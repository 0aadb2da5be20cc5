//! What happens in a world, read from bytes: any bytes are a scenario.

use std::fmt;
use std::time::{Duration, Instant};

use overlay::lab::nat::NatKind;
use overlay::node::NodeSettings;

use crate::link::Line;
use crate::oracle;
use crate::world::{EventLog, World};

/// Who is there, and what happens.
#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    server_latency: Duration,
    settings: NodeSettings,
    places: Vec<Place>,
    steps: Vec<(Duration, Transition)>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    kind: NatKind,
    line: Line,
    /// In the LAN of the host before it.
    beside: bool,
    port: u16,
}

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transition {
    /// One sends the other some packets, close together.
    Pings { from: usize, to: usize, packets: usize, payload_bytes: usize },
    /// The server dies.
    KillServer,
    /// The server comes back.
    StartServer,
    /// A node dies.
    Stop(usize),
    /// It comes back with its keys and its netmap.
    Start(usize),
    /// It does both within an instant.
    Restart(usize),
    /// A NAT reboots.
    FlushNat(usize),
    /// A host moves to another place.
    Roam(usize, NatKind),
    /// The edge of a host lets UDP through no more, or again.
    UdpBlock(usize, bool),
    /// Nothing gets through between two hosts, or again.
    Partition(usize, usize, bool),
    /// A host's control connection breaks, or may be made again.
    CutLink(usize, bool),
    /// Nothing happens for long.
    Quiet,
}

/// Bytes, and zeros after them.
struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.next()) % end.max(1)
    }

    fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    fn kind(&mut self) -> NatKind {
        NatKind::ALL[self.below(NatKind::ALL.len())]
    }

    fn line(&mut self) -> Line {
        let ms = |value: usize| Duration::from_millis(value as u64);
        let latency = ms(1 + self.below(60));
        let quality = self.next();
        let rare = |bit: u8, permille: u32| if quality & bit == 0 { 0 } else { permille };
        Line {
            latency,
            jitter: if quality & 1 == 0 { Duration::ZERO } else { latency / 4 },
            loss_permille: rare(2, 10) + rare(4, 40),
            twice_permille: rare(8, 20),
            late_permille: rare(16, 30),
        }
    }
}

impl Scenario {
    /// The scenario that these bytes mean.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let mut bytes = Bytes(bytes.iter());
        let hosts = 2 + [0, 0, 1, 0, 1, 2, 3, 4][bytes.below(8)];
        let server_latency = Duration::from_millis(1 + bytes.below(40) as u64);
        let rekey_after = [120, 20, 8, 120][bytes.below(4)];
        let settings = NodeSettings {
            rekey_after: Duration::from_secs(rekey_after),
            // Hundreds of probes for one pair are worth their time in some of the scenarios.
            birthday_probing: rekey_after == 8,
            ..NodeSettings::default()
        };
        let places = (0..hosts)
            .map(|number| {
                let flags = bytes.next();
                let port = if flags & 1 == 0 { 5000 } else { 5000 + number };
                let beside = number > 0 && flags & 0b1110 == 0;
                Place { kind: bytes.kind(), line: bytes.line(), beside, port }
            })
            .collect();
        let mut steps = Vec::new();
        while !bytes.is_empty() && steps.len() < MAX_STEPS {
            let step = Self::step(&mut bytes, usize::from(hosts));
            let wait = [0, 1, 50, 400, 2_000, 7_000, 12_000, 25_000][bytes.below(8)];
            steps.push((Duration::from_millis(wait), step));
        }
        Self { server_latency, settings, places, steps }
    }

    fn step(bytes: &mut Bytes<'_>, hosts: usize) -> Transition {
        let what = bytes.below(24);
        let host = bytes.below(hosts);
        let other = (host + 1 + bytes.below(hosts - 1)) % hosts;
        match what {
            0..=8 => Transition::Pings {
                from: host,
                to: other,
                packets: 1 + bytes.below(6),
                payload_bytes: [8, 100, 1_200][bytes.below(3)],
            },
            9 => Transition::KillServer,
            10 => Transition::StartServer,
            11 => Transition::Stop(host),
            12 => Transition::Start(host),
            13 => Transition::Restart(host),
            14 | 15 => Transition::FlushNat(host),
            16 | 17 => Transition::Roam(host, bytes.kind()),
            18 => Transition::UdpBlock(host, true),
            19 => Transition::UdpBlock(host, false),
            20 => Transition::Partition(host, other, true),
            21 => Transition::Partition(host, other, false),
            22 => Transition::CutLink(host, bytes.next() & 1 == 0),
            _ => Transition::Quiet,
        }
    }

    /// The world at the start of this scenario.
    pub(crate) fn world(&self, seed: u64, now: Instant) -> World {
        let mut world = World::new(seed, Line::clean(self.server_latency), now);
        let mut edge = 0;
        for place in &self.places {
            if !(place.beside && world.edges[edge].kind != NatKind::None) {
                edge = world.add_edge(place.kind, place.line);
            }
            world.add_host(edge, place.port, self.settings);
        }
        world
    }

    /// Plays the scenario in `world` and holds what must be true.
    ///
    /// # Panics
    /// When it is not.
    pub(crate) fn play(&self, world: &mut World) {
        for host in 0..world.hosts.len() {
            world.start_host(host);
            world.run_for(Duration::from_millis(20));
        }
        world.run_for(Duration::from_secs(3));
        for (wait, step) in &self.steps {
            world.note(&format!("-- {step}"));
            apply(world, *step);
            world.run_for(*wait);
        }
        bring_peace(world);
        world.note("-- quiet from here on");
        world.run_for(QUIET);
        check_paths(world);
        check_delivery(world);
    }
}

/// Does one thing.
pub(crate) fn apply(world: &mut World, step: Transition) {
    match step {
        Transition::Pings { from, to, packets, payload_bytes } => {
            for _ in 0..packets {
                world.ping(from, to, payload_bytes);
                world.run_for(Duration::from_millis(2));
            }
        }
        Transition::KillServer => world.kill_server(),
        Transition::StartServer => world.start_server(),
        Transition::Stop(host) => world.stop_host(host),
        Transition::Start(host) => world.start_host(host),
        Transition::Restart(host) => {
            world.stop_host(host);
            world.start_host(host);
        }
        Transition::FlushNat(host) => {
            let edge = world.hosts[host].edge;
            world.edges[edge].flush();
        }
        Transition::Roam(host, kind) => {
            let line = world.edges[world.hosts[host].edge].line;
            world.roam(host, kind, line);
        }
        Transition::UdpBlock(host, blocked) => world.hosts[host].udp_blocked = blocked,
        Transition::Partition(a, b, partitioned) => world.set_partitioned(a, b, partitioned),
        Transition::CutLink(host, true) => world.cut_link(host),
        Transition::CutLink(host, false) => world.hosts[host].uplink.cut = false,
        Transition::Quiet => world.run_for(Duration::from_secs(40)),
    }
}

/// The server runs, every node runs and may talk to it, no datagram is lost. What is blocked stays
/// blocked.
fn bring_peace(world: &mut World) {
    world.start_server();
    for edge in &mut world.edges {
        edge.line = edge.line.calm();
    }
    for host in 0..world.hosts.len() {
        world.hosts[host].uplink.cut = false;
        world.start_host(host);
    }
    let all_up = |world: &World| world.hosts.iter().all(|host| host.uplink.connection().is_some());
    assert!(world.run_until(Duration::from_secs(15), all_up), "some node does not connect");
}

/// Every node sees the way to every other that the oracle knows.
pub(crate) fn check_paths(world: &World) {
    let mut wrong = Vec::new();
    for (from, to) in pairs(world) {
        let peer = world.hosts[to].id().expect("all have joined");
        let kind = world.hosts[from].path_kind(peer, world.now);
        let expected = oracle::expected_path(world, from, to);
        let lucky = kind == "direct" && oracle::may_be_found_by_chance(world, from, to);
        if kind != expected && !lucky {
            let why = world.hosts[from].why(peer, world.now);
            wrong.push(format!("host {from} to host {to} ({peer}): {kind}, not {expected}: {why}"));
        }
    }
    assert!(wrong.is_empty(), "stuck after quiet time:\n{}", wrong.join("\n"));
}

/// Every node reaches every other, once for each packet.
pub(crate) fn check_delivery(world: &mut World) {
    let mut pings = Vec::new();
    for (from, to) in pairs(world) {
        pings.push(world.ping(from, to, 64).expect("all have joined and run"));
    }
    world.run_for(Duration::from_secs(2));
    let mut lost = Vec::new();
    for number in pings {
        let ping = world.ledger.ping(number);
        if ping.took().is_none() {
            lost.push(format!("from host {} to host {}", ping.from, ping.to));
        }
    }
    assert!(lost.is_empty(), "pings lost in quiet time: {}", lost.join(", "));
}

fn pairs(world: &World) -> impl Iterator<Item = (usize, usize)> + use<> {
    let hosts = world.hosts.len();
    (0..hosts).flat_map(move |a| (0..hosts).map(move |b| (a, b))).filter(|(a, b)| a != b)
}

/// The last lines of a log, as one text.
pub(crate) fn tail(log: &EventLog) -> String {
    log.borrow().iter().cloned().collect::<Vec<_>>().join("\n")
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rekey = self.settings.rekey_after;
        writeln!(f, "server at {:?}, keys renewed after {rekey:?}", self.server_latency)?;
        for (number, place) in self.places.iter().enumerate() {
            let beside =
                if place.beside { ", beside the one before if that has a NAT" } else { "" };
            let Place { kind, line, port, .. } = place;
            writeln!(f, "host {number}: {kind}, port {port}, {line}{beside}")?;
        }
        for (wait, step) in &self.steps {
            writeln!(f, "  {step}, then {wait:?}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pings { from, to, packets, payload_bytes } => {
                write!(f, "{packets} packets of {payload_bytes} bytes from {from} to {to}")
            }
            Self::KillServer => f.write_str("the server dies"),
            Self::StartServer => f.write_str("the server starts"),
            Self::Stop(host) => write!(f, "node {host} dies"),
            Self::Start(host) => write!(f, "node {host} starts"),
            Self::Restart(host) => write!(f, "node {host} restarts"),
            Self::FlushNat(host) => write!(f, "the NAT of host {host} forgets everything"),
            Self::Roam(host, kind) => write!(f, "host {host} moves to a new place: {kind}"),
            Self::UdpBlock(host, true) => write!(f, "UDP of host {host} is blocked"),
            Self::UdpBlock(host, false) => write!(f, "UDP of host {host} is free"),
            Self::Partition(a, b, true) => write!(f, "hosts {a} and {b} are parted"),
            Self::Partition(a, b, false) => write!(f, "hosts {a} and {b} meet again"),
            Self::CutLink(host, true) => write!(f, "host {host} loses its control connection"),
            Self::CutLink(host, false) => write!(f, "host {host} may connect"),
            Self::Quiet => f.write_str("nothing, for 40 s"),
        }
    }
}

/// After so long without news every pair must have the best path there is.
const QUIET: Duration = Duration::from_secs(30);
/// Enough to combine any three faults.
const MAX_STEPS: usize = 10;
