//! What happens in a world, read from bytes: any bytes are a scenario.

use std::fmt;
use std::time::{Duration, Instant};

use overlay::lab::nat::NatKind;
use overlay::node::NodeSettings;

use crate::check::{
    QUIET, check_delivery, check_keys, check_paths, check_removed, check_wakeups, talk_once,
};
use crate::host::Host;
use crate::link::Line;
use crate::spot::Spot;
use crate::transition::{Swallowed, Transition, apply};
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
    spot: Spot,
    line: Line,
    /// In the LAN of the host before it.
    beside: bool,
    port: u16,
    /// A second uplink.
    second: Option<(NatKind, Line)>,
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
    /// The scenario that these bytes mean: the first [`BASE_BYTES`] say what earlier versions of
    /// this reader knew, so that seeds keep their meaning, the ones behind them all else.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let (base, extras) = bytes.split_at(bytes.len().min(BASE_BYTES));
        let (extras, ends) = extras.split_at(extras.len().min(EXTRA_BYTES));
        let (ends, uplinks) = ends.split_at(ends.len().min(END_BYTES));
        let mut scenario = Self::base(base);
        scenario.add_extras(&mut Bytes(extras.iter()));
        scenario.add_ends(&mut Bytes(ends.iter()));
        scenario.add_uplinks(&mut Bytes(uplinks.iter()));
        scenario
    }

    /// Plays what bytes mean; they decide the world's own luck, too.
    ///
    /// # Panics
    /// When something is not as it must be.
    pub(crate) fn play_bytes(bytes: &[u8], now: Instant) {
        let seed =
            bytes.iter().fold(7, |seed: u64, byte| (seed ^ u64::from(*byte)).wrapping_mul(FNV));
        let scenario = Self::from_bytes(bytes);
        scenario.play(&mut scenario.world(seed & 0xffff_ffff, now));
    }

    fn base(bytes: &[u8]) -> Self {
        let mut bytes = Bytes(bytes.iter());
        let hosts = 2 + [0, 0, 1, 0, 1, 2, 3, 4][bytes.below(8)];
        let server_latency = Duration::from_millis(1 + bytes.below(40) as u64);
        let rekey_after = [120, 20, 8, 120][bytes.below(4)];
        let settings = NodeSettings {
            rekey_after: Duration::from_secs(rekey_after),
            // Hundreds of probes for one pair are worth their time in some of the scenarios.
            birthday_probing: rekey_after == 8 && server_latency.as_millis().is_multiple_of(4),
            // Any traffic is enough for a second session.
            second_lane_from: if server_latency.as_millis() % 2 == 1 { 1 } else { u64::MAX },
            ..NodeSettings::default()
        };
        let places = (0..hosts)
            .map(|number| {
                let flags = bytes.next();
                let port = if flags & 1 == 0 { 5000 } else { 5000 + number };
                let beside = number > 0 && flags & 0b1110 == 0;
                let (spot, line) = (Spot::plain(bytes.kind()), bytes.line());
                Place { spot, line, beside, port, second: None }
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

    fn add_extras(&mut self, bytes: &mut Bytes<'_>) {
        let more = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 6][bytes.below(16)];
        for place in &mut self.places {
            place.spot = place.spot.with_extras(bytes.next());
        }
        for number in 0..more {
            let spot = Spot::plain(bytes.kind()).with_extras(bytes.next());
            let line = bytes.line();
            let port = 6000 + number;
            self.places.push(Place { spot, line, beside: false, port, second: None });
        }
        self.steps.truncate([MAX_STEPS, 7, 5, 3][bytes.below(4)]);
        let mut added = 0;
        while !bytes.is_empty() && added < MAX_EXTRA_STEPS {
            let at = bytes.below(self.steps.len() + 1);
            let step = Self::extra_step(bytes, self.places.len());
            let wait = [0, 20, 300, 1_000, 2_000, 5_000, 8_000, 12_000][bytes.below(8)];
            self.steps.insert(at, (Duration::from_millis(wait), step));
            added += 1;
        }
    }

    /// Memberships that end, and some that go on.
    fn add_ends(&mut self, bytes: &mut Bytes<'_>) {
        let ends = [0, 0, 0, 1, 1, 2][bytes.below(6)];
        for _ in 0..ends {
            if bytes.is_empty() {
                return;
            }
            let host = bytes.below(self.places.len());
            let in_s = [1, 2, 10, 40, 3_600][bytes.below(5)];
            let at = bytes.below(self.steps.len() + 1);
            let wait = Duration::from_millis([0, 300, 1_000, 2_500, 6_000][bytes.below(5)]);
            self.steps.insert(at, (wait, Transition::Expire(host, Some(in_s))));
            if bytes.next() & 1 == 0 {
                let at = at + 1 + bytes.below(self.steps.len() - at);
                self.steps.insert(at, (wait, Transition::Expire(host, None)));
            }
        }
    }

    /// Second uplinks in some scenarios, which go dark and come back, or lose their routes.
    fn add_uplinks(&mut self, bytes: &mut Bytes<'_>) {
        if bytes.below(3) != 1 {
            return;
        }
        for place in &mut self.places {
            let wanted = bytes.next() & 1 == 1;
            let (kind, line) = (bytes.kind(), bytes.line());
            // What comes for a public address of a further uplink at the main socket is answered by the
            // preferred one, from an address that is foreign there.
            let kind = if kind == NatKind::None { NatKind::FullCone } else { kind };
            place.second = wanted.then_some((kind, line));
        }
        let two: Vec<usize> =
            (0..self.places.len()).filter(|place| self.places[*place].second.is_some()).collect();
        for _ in 0..[1, 2, 3, 4][bytes.below(4)] {
            let at = bytes.below(self.steps.len() + 1);
            let Some(host) = two.get(bytes.below(two.len())).copied() else { return };
            let interface = [0, 0, 1][bytes.below(3)];
            let step = match bytes.below(6) {
                0..=2 => Transition::Dark { host, interface, dark: true },
                3 => Transition::Dark { host, interface, dark: false },
                4 => Transition::Route { host, interface, there: false },
                _ => Transition::Route { host, interface, there: true },
            };
            let wait = [0, 300, 1_000, 2_500, 6_000, 12_000][bytes.below(6)];
            self.steps.insert(at, (Duration::from_millis(wait), step));
        }
    }

    fn extra_step(bytes: &mut Bytes<'_>, hosts: usize) -> Transition {
        let what = bytes.below(16);
        let host = bytes.below(hosts);
        match what {
            0..=2 => Transition::Sleep(host, Duration::from_secs([1, 10, 45, 120][bytes.below(4)])),
            3 => Transition::Wake(host),
            // Two must be left.
            4 | 5 if hosts > 2 && host > 1 => Transition::Remove(host),
            4 | 6 => Transition::MoveServer,
            7 => Transition::SetClock([-48, -1, 1, 48][bytes.below(4)]),
            8 => Transition::BlackHole(host, true),
            9 => Transition::BlackHole(host, false),
            10 => Transition::Swallow(host, Swallowed::Data),
            11 => Transition::Swallow(host, Swallowed::Large),
            12 => Transition::Move(host, Spot::plain(bytes.kind()).with_extras(bytes.next())),
            13 => Transition::Burst { from: host, to: (host + 1 + bytes.below(hosts - 1)) % hosts },
            14 => Transition::Rotate(host),
            _ => Self::step(bytes, hosts),
        }
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
                edge = world.add_spot(place.spot, place.line);
            }
            let host = world.add_host(edge, place.port, self.settings);
            if place.spot.forwards {
                world.forward_port(host);
            }
            if let Some((kind, line)) = place.second {
                world.add_second(host, Spot::plain(kind), line);
            }
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
        if world.healed {
            // Nobody is told that a way is open again, and a pair that does not talk tries rarely: the
            // relay serves it until then. One packet is enough to look sooner.
            talk_once(world);
        }
        world.run_for(QUIET);
        check_wakeups(world);
        check_keys(world);
        check_paths(world);
        check_delivery(world);
        check_removed(world);
    }
}

/// The server runs, every node runs and may talk to it, no datagram is lost. What is blocked stays
/// blocked.
fn bring_peace(world: &mut World) {
    world.start_server();
    for host in 0..world.hosts.len() {
        if world.hosts[host].may_end {
            world.expire(host, None);
        }
    }
    for edge in &mut world.edges {
        edge.line = edge.line.calm();
    }
    for host in 0..world.hosts.len() {
        if !world.has_way_out(host) {
            world.set_route(host, 0, true);
            world.set_dark(host, 0, false);
        }
    }
    for host in 0..world.hosts.len() {
        world.hosts[host].control_link.cut = false;
        world.start_host(host);
    }
    let all_up = |world: &World| {
        // Who has missed its removal is refused by every hello.
        let out = |host: &Host| host.expelled || host.removed_at.is_some();
        (0..world.hosts.len()).all(|host| out(&world.hosts[host]) || world.is_connected(host))
    };
    assert!(world.run_until(Duration::from_secs(60), all_up), "some node does not connect");
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
            let Place { spot, line, port, .. } = place;
            writeln!(f, "host {number}: {spot}, port {port}, {line}{beside}")?;
            if let Some((kind, line)) = place.second {
                writeln!(f, "    and by a second uplink: {kind}, {line}")?;
            }
        }
        for (wait, step) in &self.steps {
            writeln!(f, "  {step}, then {wait:?}")?;
        }
        Ok(())
    }
}

/// Enough to combine any three faults.
const MAX_STEPS: usize = 10;
/// The same for what came later.
const MAX_EXTRA_STEPS: usize = 3;
/// Enough for six hosts and ten steps.
pub(crate) const BASE_BYTES: usize = 96;
/// What came behind them.
pub(crate) const EXTRA_BYTES: usize = 48;
/// And behind these: enough for two memberships that end.
pub(crate) const END_BYTES: usize = 16;
/// And behind these: second uplinks of eight hosts, and what becomes of them.
pub(crate) const UPLINK_BYTES: usize = 56;
/// The prime of the 64-bit Fowler-Noll-Vo hash.
const FNV: u64 = 0x0100_0000_01b3;
