//! Two agents and a little internet between them: what the agents promise together.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{EARLY_BYTES, PathAgent, PathEvent, PathTransmit, Signalling, Traffic, Via};
use crate::testing::epoch;
use crate::types::{Candidate, CandidateKind, TxId};
use crate::wire::disco::{PING_LEN, PONG_LEN};

const ONE_WAY: Duration = Duration::from_millis(10);
const RELAY_ONE_WAY: Duration = Duration::from_millis(20);

enum Message {
    Ping(TxId),
    Pong(TxId),
    CallMeMaybe,
}

struct Side {
    agent: PathAgent,
    public: SocketAddr,
    announced: SocketAddr,
    /// Endpoints that this side's NAT lets in; none when it lets in everybody.
    open_for: Option<BTreeSet<SocketAddr>>,
    /// Strangers that a router with an open input remembers: what is sent to them is moved to
    /// another port, and does not pass their filter.
    claimed_by: BTreeSet<SocketAddr>,
    events: Vec<(Duration, PathEvent)>,
}

/// Two sides, each behind a port-restricted NAT or in the open.
struct World {
    start: Instant,
    now: Instant,
    sides: [Side; 2],
    flights: Vec<(Instant, usize, Via, Message)>,
    cut: bool,
}

impl World {
    fn new(filtered: [bool; 2]) -> Self {
        let announced = epoch();
        let now = announced + Duration::from_secs(1);
        let endpoints: [SocketAddr; 2] =
            ["203.0.113.10:4000".parse().unwrap(), "203.0.113.20:5000".parse().unwrap()];
        let side = |i: usize| Side {
            agent: PathAgent::new([u8::try_from(i).unwrap(); 32], now),
            public: endpoints[i],
            announced: endpoints[i],
            open_for: filtered[i].then(BTreeSet::new),
            claimed_by: BTreeSet::new(),
            events: Vec::new(),
        };
        let mut sides = [side(0), side(1)];
        for side in &mut sides {
            side.agent.set_signalling(Signalling {
                server_rtt: Some(RELAY_ONE_WAY),
                announced_at: Some(announced),
                lag: None,
                counts: false,
                has_guesses: false,
                doubles: false,
            });
        }
        Self { start: now, now, sides, flights: Vec::new(), cut: false }
    }

    fn meet(&mut self, relay: Option<Via>) {
        for i in 0..2 {
            let candidate = Candidate::new(self.sides[1 - i].announced, CandidateKind::Reflexive);
            let agent = &mut self.sides[i].agent;
            agent.set_relay(relay, self.now);
            agent.set_candidates(&[candidate], self.now);
            agent.set_wanted(true, self.now);
        }
        self.drain();
    }

    fn drain(&mut self) {
        for i in 0..2 {
            while let Some(transmit) = self.sides[i].agent.poll_transmit() {
                let (via, message) = match transmit {
                    PathTransmit::Opener { remote, .. } => {
                        if let Some(open) = &mut self.sides[i].open_for {
                            open.insert(remote);
                        }
                        continue;
                    }
                    PathTransmit::Ping { via, tx } | PathTransmit::Sized { via, tx, .. } => {
                        (via, Message::Ping(tx))
                    }
                    PathTransmit::Keepalive { .. } => continue,
                    PathTransmit::Pong { via, tx } => (via, Message::Pong(tx)),
                    PathTransmit::CallMeMaybe { via } => (via, Message::CallMeMaybe),
                };
                self.send(i, via, message);
            }
            while let Some(event) = self.sides[i].agent.poll_event() {
                self.sides[i].events.push((self.now - self.start, event));
            }
        }
    }

    fn send(&mut self, from: usize, via: Via, message: Message) {
        match via {
            Via::Direct { remote, .. } => {
                if let Some(open) = &mut self.sides[from].open_for {
                    open.insert(remote);
                }
                let source = self.sides[from].public;
                let moved = self.sides[from].claimed_by.contains(&remote);
                if remote == self.sides[1 - from].public && !self.cut && !moved {
                    let via = Via::direct(source);
                    self.flights.push((self.now + ONE_WAY, 1 - from, via, message));
                }
            }
            relay => self.flights.push((self.now + RELAY_ONE_WAY, 1 - from, relay, message)),
        }
    }

    fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        loop {
            let timers = self.sides.iter().filter_map(|side| side.agent.poll_timeout());
            let flights = self.flights.iter().map(|flight| flight.0);
            let Some(next) = timers.map(|(at, _)| at).chain(flights).min() else { break };
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            let now = self.now;
            let due: Vec<_> = self.flights.extract_if(.., |flight| flight.0 <= now).collect();
            for (_, to, via, message) in due {
                self.deliver(to, via, message);
            }
            for side in &mut self.sides {
                side.agent.handle_timeout(now);
            }
            self.drain();
        }
        self.now = end;
    }

    fn deliver(&mut self, to: usize, via: Via, message: Message) {
        let announced = self.sides[1 - to].announced;
        let side = &mut self.sides[to];
        if let (Via::Direct { remote, .. }, Some(open)) = (via, &side.open_for)
            && !open.contains(&remote)
        {
            side.claimed_by.insert(remote);
            return;
        }
        match message {
            Message::Ping(tx) => side.agent.handle_ping(tx, via, self.now),
            Message::Pong(tx) => {
                side.agent.handle_pong(tx, via, None, self.now);
            }
            Message::CallMeMaybe => {
                let candidate = Candidate::new(announced, CandidateKind::Reflexive);
                side.agent.handle_call_me_maybe(1, &[candidate], self.now);
            }
        }
    }

    fn direct_after(&self, side: usize) -> Option<Duration> {
        self.sides[side].events.iter().find_map(|(at, PathEvent::Primary { to, .. })| {
            matches!(to, Some(Via::Direct { .. })).then_some(*at)
        })
    }
}

#[test]
fn data_goes_by_relay_at_once_and_direct_after_the_punch() {
    let mut world = World::new([true, true]);
    world.meet(Some(Via::RelayUdp));
    assert_eq!(world.sides[0].agent.choice().primary, Some(Via::RelayUdp));
    world.run(Duration::from_secs(1));
    for side in 0..2 {
        let direct = world.direct_after(side).expect("a port-restricted pair is punched");
        assert!(direct <= Duration::from_millis(100), "took {direct:?}");
    }
}

#[test]
fn routers_with_an_open_input_are_not_spoiled_whoever_is_first() {
    for (first, ahead_ms) in [(0, 0), (1, 0), (0, 5), (1, 5), (0, 15), (1, 15), (0, 60), (1, 60)] {
        let mut world = World::new([true, true]);
        for i in [first, 1 - first] {
            let now = world.now;
            let candidate = Candidate::new(world.sides[1 - i].announced, CandidateKind::Reflexive);
            let agent = &mut world.sides[i].agent;
            agent.set_relay(Some(Via::RelayUdp), now);
            agent.set_candidates(&[candidate], now);
            agent.set_wanted(true, now);
            world.drain();
            world.run(Duration::from_millis(ahead_ms));
        }
        world.run(Duration::from_millis(200));
        for side in 0..2 {
            assert!(world.sides[side].claimed_by.is_empty(), "{first} first by {ahead_ms} ms");
            let direct = world.direct_after(side).expect("the pair is punched");
            assert!(direct <= Duration::from_millis(140), "{first} by {ahead_ms}: {direct:?}");
        }
    }
}

#[test]
fn a_peer_that_knows_our_endpoint_only_now_has_not_opened_its_nat() {
    let mut world = World::new([true, true]);
    let now = world.now;
    let side = &mut world.sides[0];
    let signalling = Signalling {
        server_rtt: Some(RELAY_ONE_WAY),
        announced_at: Some(now),
        lag: None,
        counts: false,
        has_guesses: false,
        doubles: false,
    };
    side.agent.set_signalling(signalling);
    side.agent.set_relay(Some(Via::RelayUdp), now);
    let candidate = Candidate::new("203.0.113.20:5000".parse().unwrap(), CandidateKind::Reflexive);
    side.agent.handle_call_me_maybe(1, &[candidate], now);
    let sent: Vec<_> = std::iter::from_fn(|| side.agent.poll_transmit()).collect();
    let reaches_peer = |transmit: &PathTransmit| {
        matches!(transmit, PathTransmit::Ping { via: Via::Direct { .. }, .. })
    };
    assert!(sent.iter().any(|transmit| matches!(transmit, PathTransmit::Opener { .. })));
    assert!(!sent.iter().any(reaches_peer), "{sent:?}");
}

#[test]
fn a_guess_that_the_server_confirms_is_a_guess_no_more() {
    let start = epoch();
    let mut agent = PathAgent::new([7; 32], start);
    agent.set_relay(Some(Via::RelayUdp), start);
    let at: SocketAddr = "203.0.113.20:5000".parse().unwrap();
    let mut kind = |told| {
        agent.set_candidates(&[Candidate::new(at, told)], start);
        agent.outcomes().find(|(remote, ..)| *remote == at).unwrap().1
    };
    assert_eq!(kind(CandidateKind::Static), CandidateKind::Static);
    assert_eq!(kind(CandidateKind::Reflexive), CandidateKind::Reflexive);
    assert_eq!(kind(CandidateKind::Static), CandidateKind::Reflexive);
}

/// What the history says of a way by the relay; the first path of all is no change of a relay.
#[test]
fn the_cause_of_a_path_by_the_relay_is_what_became_of_the_relay() {
    let start = epoch();
    let mut agent = PathAgent::new([7; 32], start);
    let (udp, tcp) = (Some(Via::RelayUdp), Some(Via::RelayTcp));
    for (relay, cause) in [
        (udp, "the relay leads to the peer"),
        (tcp, "UDP does not reach the relay any more"),
        (udp, "UDP reaches the relay"),
        (None, "the relay does not lead to the peer any more"),
        (tcp, "the relay leads to the peer"),
    ] {
        agent.set_relay(relay, start);
        let events = std::iter::from_fn(|| agent.poll_event());
        let told: Vec<_> = events.map(|PathEvent::Primary { to, why, .. }| (to, why)).collect();
        assert_eq!(told, [(relay, cause)]);
    }
}

#[test]
fn the_server_sees_that_udp_has_failed_a_node_which_has_nothing_to_send() {
    let start = epoch();
    for used in [true, false] {
        let mut agent = PathAgent::new([7; 32], start);
        agent.set_relay(Some(Via::RelayUdp), start);
        if used {
            agent.handle_traffic(Traffic { sent: Some(start), heard: Some(start) }, start);
        }
        while agent.poll_transmit().is_some() {}
        agent.set_relay(Some(Via::RelayTcp), start + Duration::from_secs(3));
        let mut sent = std::iter::from_fn(|| agent.poll_transmit());
        let told = sent.any(|it| matches!(it, PathTransmit::Ping { via: Via::RelayTcp, .. }));
        assert_eq!(told, used);
    }
}

#[test]
fn a_symmetric_side_is_reached_at_the_endpoint_it_sends_from() {
    let mut world = World::new([true, false]);
    // Side 0 announces what the server saw; towards side 1 its NAT maps another port.
    world.sides[0].announced = "203.0.113.10:9999".parse().unwrap();
    world.meet(Some(Via::RelayUdp));
    world.run(Duration::from_secs(1));
    assert!(world.direct_after(0).is_some() && world.direct_after(1).is_some());
    assert!(world.sides[1].agent.why().contains("peer-reflexive"));
}

#[test]
fn an_impossible_pair_stays_on_the_relay_and_goes_quiet() {
    let mut world = World::new([true, true]);
    world.sides[0].announced = "203.0.113.10:9999".parse().unwrap();
    world.meet(Some(Via::RelayUdp));
    world.run(Duration::from_secs(600));
    assert_eq!(world.sides[0].agent.choice().primary, Some(Via::RelayUdp));
    let pings: u32 = world.sides[1].agent.outcomes().map(|(.., pings, _)| pings).sum();
    assert!(pings < 160, "{pings} pings in ten minutes");
}

#[test]
fn without_a_relay_two_nodes_find_each_other_by_their_old_candidates() {
    let mut world = World::new([true, true]);
    world.meet(None);
    world.run(Duration::from_secs(1));
    assert!(world.direct_after(0).is_some() && world.direct_after(1).is_some());
}

#[test]
fn a_path_that_goes_silent_under_traffic_costs_less_than_a_second() {
    let mut world = World::new([true, true]);
    world.meet(Some(Via::RelayUdp));
    world.run(Duration::from_secs(5));
    world.cut = true;
    let (cut_at, heard) = (world.now, world.now);
    let mut doubled_after = None;
    while world.sides[0].agent.choice().primary != Some(Via::RelayUdp) {
        let now = world.now;
        world.sides[0].agent.handle_traffic(Traffic { sent: Some(now), heard: Some(heard) }, now);
        world.drain();
        if world.sides[0].agent.choice().duplicate.is_some() {
            doubled_after.get_or_insert(now - cut_at);
        }
        assert!(now - cut_at < Duration::from_secs(1), "still on the dead path");
        world.run(super::TRAFFIC_TICK);
    }
    let doubled_after = doubled_after.expect("data is doubled before the switch");
    assert!(doubled_after <= Duration::from_millis(500), "doubled after {doubled_after:?}");
}

#[test]
fn a_path_comes_back_when_it_answers_again() {
    let mut world = World::new([true, true]);
    world.meet(Some(Via::RelayUdp));
    world.run(Duration::from_secs(30));
    world.cut = true;
    world.run(Duration::from_secs(60));
    assert_eq!(world.sides[0].agent.choice().primary, Some(Via::RelayUdp), "keepalives noticed");
    world.cut = false;
    world.run(Duration::from_secs(90));
    for side in &world.sides {
        assert!(matches!(side.agent.choice().primary, Some(Via::Direct { .. })));
    }
}

#[test]
fn a_peer_that_asks_again_and_again_does_not_hear_our_answers() {
    let mut world = World::new([true, true]);
    world.meet(Some(Via::RelayUdp));
    world.run(Duration::from_secs(30));
    let now = world.now;
    let side = &mut world.sides[0];
    let via = side.agent.choice().primary.expect("a direct path");
    assert!(!via.is_relay());
    side.agent.handle_ping(TxId([1; 12]), via, now);
    let asked = |agent: &mut PathAgent| {
        let sent: Vec<_> = std::iter::from_fn(|| agent.poll_transmit()).collect();
        sent.iter().any(|it| matches!(it, PathTransmit::Ping { via: by, .. } if *by == via))
    };
    assert!(!asked(&mut side.agent), "a keepalive serves both sides");
    side.agent.handle_ping(TxId([2; 12]), via, now + Duration::from_millis(40));
    assert!(asked(&mut side.agent));
    for ms in (50..1_200).step_by(10) {
        side.agent.handle_timeout(now + Duration::from_millis(ms));
    }
    assert_eq!(side.agent.choice().primary, Some(Via::RelayUdp), "nothing gets through to it");
}

#[test]
fn an_idle_direct_path_costs_one_small_packet_in_twenty_five_seconds() {
    let mut world = World::new([true, true]);
    world.meet(Some(Via::RelayUdp));
    world.run(Duration::from_secs(30));
    let pings = |world: &World| -> u32 {
        world.sides.iter().flat_map(|side| side.agent.outcomes()).map(|(.., pings, _)| pings).sum()
    };
    let before = pings(&world);
    world.run(Duration::from_secs(1000));
    let sent = pings(&world) - before;
    assert!((36..=40).contains(&sent), "{sent} pings by both sides in 1000 s");
}

#[test]
fn a_stranger_cannot_fill_the_table_or_push_out_a_working_path() {
    let mut world = World::new([false, false]);
    world.meet(Some(Via::RelayUdp));
    world.run(Duration::from_secs(1));
    let now = world.now;
    let agent = &mut world.sides[0].agent;
    for port in 1..2000u16 {
        let remote = SocketAddr::new("198.51.100.1".parse().unwrap(), port);
        agent.handle_ping(TxId([0; 12]), Via::direct(remote), now);
    }
    assert!(agent.outcomes().count() <= 32);
    assert!(matches!(agent.choice().primary, Some(Via::Direct { .. })));
}

#[test]
fn a_candidate_that_comes_late_is_probed_at_once() {
    let mut world = World::new([true, true]);
    let now = world.now;
    for side in &mut world.sides {
        side.agent.set_relay(Some(Via::RelayUdp), now);
        let host = Candidate::new("192.168.1.2:4000".parse().unwrap(), CandidateKind::Host);
        side.agent.set_candidates(&[host], now);
        side.agent.set_wanted(true, now);
    }
    world.drain();
    world.run(Duration::from_millis(60));
    for i in 0..2 {
        let candidate = Candidate::new(world.sides[1 - i].public, CandidateKind::Reflexive);
        let now = world.now;
        world.sides[i].agent.handle_call_me_maybe(2, &[candidate], now);
    }
    world.drain();
    world.run(Duration::from_millis(300));
    assert!(world.direct_after(0).is_some() && world.direct_after(1).is_some());
}

/// A peer that claims to be where somebody else is, in every way that it has: calls with other ports
/// each time, candidates from the server, and pings with a forged source. How often suits it best is
/// its choice; so is whether the copies of data find anything left for them.
#[test]
fn who_is_named_by_a_lying_peer_hears_a_trickle() {
    for every in [10, 300, 1_000, 5_000, 7_500, 15_000, 20_000] {
        let Heard { bytes, copied, datagrams } = heard_by_a_victim(Duration::from_millis(every));
        let rate = bytes as f64 / SPAN.as_secs_f64();
        let (at_all, at_one) = most_in_a_window(&datagrams);
        println!(
            "claims every {every} ms: {rate:.0} bytes a second, {copied} of copies; besides {} \
             datagrams, at most {at_all} in 30 s, and {at_one} to one port",
            datagrams.len(),
        );
        // What the account has at once and in 30 s, in the shortest datagrams that there are.
        assert!(at_all <= (22_400 + 30 * 600) / (PING_LEN + HEADERS), "{at_all} in 30 s");
        assert!(rate <= 1000.0, "claims every {every} ms: {rate:.0} bytes a second");
        assert!(bytes > copied, "an address may be the right one");
        assert!(copied <= 5 * EARLY_BYTES as usize, "{copied} bytes of copies");
    }
}

/// How long the peer lies.
const SPAN: Duration = Duration::from_secs(60);

/// What a victim hears.
struct Heard {
    bytes: usize,
    /// So many of them were copies of data.
    copied: usize,
    /// When the others came, and to which port.
    datagrams: Vec<(Instant, u16)>,
}

/// The most datagrams in any 30 s, to all ports together and to one.
fn most_in_a_window(datagrams: &[(Instant, u16)]) -> (usize, usize) {
    let window = Duration::from_secs(30);
    let from = |start: usize| {
        let (first, _) = datagrams[start];
        datagrams[start..].iter().take_while(move |(at, _)| *at < first + window)
    };
    let at_all = (0..datagrams.len()).map(|start| from(start).count()).max();
    let to_one = |start: usize| {
        let (_, port) = datagrams[start];
        from(start).filter(|(_, to)| *to == port).count()
    };
    let at_one = (0..datagrams.len()).map(to_one).max();
    (at_all.unwrap_or_default(), at_one.unwrap_or_default())
}

/// What goes to the victim when it is named so often.
fn heard_by_a_victim(every: Duration) -> Heard {
    let victim = |port: u16| SocketAddr::from(([198, 51, 100, 7], port));
    let claims = |port: u16, kind| -> Vec<Candidate> {
        (0..24).map(|n| Candidate::new(victim(port.wrapping_add(n).max(1)), kind)).collect()
    };
    let start = epoch();
    let mut agent = PathAgent::new([7; 32], start);
    agent.set_relay(Some(Via::RelayUdp), start);
    agent.set_wanted(true, start);
    let (mut bytes, mut copied, mut early, mut datagrams) = (0, 0, false, Vec::new());
    let (mut port, mut now, mut claim_at) = (1024u16, start, start);
    while now < start + SPAN {
        now += Duration::from_millis(10);
        if now >= claim_at {
            claim_at = now + every;
            port = port.wrapping_add(24).max(1024);
            let call = u64::from(port);
            agent.handle_call_me_maybe(call, &claims(port, CandidateKind::Predicted), now);
            agent.set_candidates(&claims(port, CandidateKind::Reflexive), now);
        }
        let mut tx = [0; 12];
        tx[..2].copy_from_slice(&port.to_be_bytes());
        let since_claim = now + every - claim_at;
        if every < Duration::from_secs(1) || since_claim < Duration::from_millis(100) {
            agent.handle_ping(TxId(tx), Via::direct(victim(port)), now);
        }
        agent.handle_timeout(now);
        while let Some(transmit) = agent.poll_transmit() {
            bytes += match transmit {
                PathTransmit::Ping { via: Via::Direct { remote, .. }, .. } => {
                    datagrams.push((now, remote.port()));
                    PING_LEN + HEADERS
                }
                PathTransmit::Pong { via: Via::Direct { remote, .. }, .. } => {
                    datagrams.push((now, remote.port()));
                    PONG_LEN + HEADERS
                }
                // These open our own NAT, and die before they get anywhere.
                PathTransmit::Opener { .. } => 0,
                PathTransmit::Sized { .. }
                | PathTransmit::Keepalive { via: Via::Direct { .. } } => {
                    panic!("to nobody: {transmit:?}")
                }
                _ => 0,
            };
        }
        // A handshake that is tried every now and then.
        if now.duration_since(start).as_millis() % 5_000 < 10 {
            let calls = agent.beside_pings(now);
            bytes += calls.len() * (HANDSHAKE_BYTES + HEADERS);
            let ports = calls.iter().filter_map(|via| Some(via.place()?.remote.port()));
            datagrams.extend(ports.map(|port| (now, port)));
        }
        let choice = agent.choice();
        assert_eq!(choice.primary, Some(Via::RelayUdp), "no data that counts");
        assert_eq!(choice.duplicate.is_some(), choice.early, "nothing but the few copies");
        if choice.early && !early {
            // The data plane sends no more than this: see its own tests.
            copied += EARLY_BYTES as usize;
        }
        early = choice.early;
    }
    Heard { bytes: bytes + copied, copied, datagrams }
}

/// An endpoint that is named once, and where nobody answers.
#[test]
fn a_silent_endpoint_hears_a_few_rounds_and_then_next_to_nothing() {
    let Heard { datagrams, .. } = heard_by_a_victim(SPAN * 2);
    let (_, at_one) = most_in_a_window(&datagrams);
    println!("named once: at most {at_one} datagrams to one port in 30 s");
    assert!(at_one <= 36, "{at_one} datagrams");
}

/// A handshake.
const HANDSHAKE_BYTES: usize = 148;
/// Headers of IPv4 and UDP.
const HEADERS: usize = 28;
