//! Floods from strangers, while members go on talking and joining.
//!
//! `OVERLAY_TEST_FLOOD_PPS` (packets a second) and `OVERLAY_TEST_FLOOD_S` (seconds) make them larger.

use std::net::SocketAddrV4;
use std::time::Duration;

use crate::attack::{self, Recorder};
use crate::case::Case;
use crate::clock::now;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server};
use crate::ping;
use crate::spoofer::Spoofer;
use crate::steady::Steady;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::timed("flood::handshakes_with_forged_sources_do_not_stop_a_node", handshakes),
        Case::new("flood::no_answer_to_a_stranger_is_larger_than_the_question", reflection),
    ]
}

/// A size of a test: what `variable` says, else `default`.
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    assert!(variable.starts_with("OVERLAY_TEST_"), "the sandbox takes {variable} away");
    let Ok(text) = std::env::var(variable) else { return default };
    text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}"))
}

fn packets_per_second() -> u64 {
    number("OVERLAY_TEST_FLOOD_PPS", 5_000)
}

fn span() -> Duration {
    Duration::from_secs(number("OVERLAY_TEST_FLOOD_S", 4))
}

fn udp_endpoint(node: &Node) -> SocketAddrV4 {
    let port = node.status().unwrap()["self"]["listen_port"].as_u64().expect("a listen port");
    SocketAddrV4::new(node.host.address, u16::try_from(port).unwrap())
}

fn drops(node: &Node, reason: &str) -> u64 {
    node.status().unwrap()["self"]["drops"][reason].as_u64().unwrap_or_default()
}

/// Records what a start of `peer` sends to `node`.
fn record_start(node: &Node, peer: &mut Node) -> Vec<Vec<u8>> {
    let recorder = Recorder::open(&node.host, udp_endpoint(node).port());
    let address = peer.ipv4();
    assert_eq!(peer.stop(), Some(0));
    peer.up_again();
    ping::assert_answers(&node.host, &address);
    peer.wait_path(&node.name, "direct", PATH_LIMIT);
    recorder.record(Duration::from_millis(500))
}

/// The server is gone, so that handshakes can only come by the flooded way.
fn handshakes() {
    let net = Net::new();
    let mut server = Server::start(&net, &net.machine("server", Nat::None));
    let [alice, mut bob, mut carol] =
        [("alice", Nat::None), ("bob", Nat::FullCone), ("carol", Nat::PortRestricted)]
            .map(|(name, nat)| Node::start(&net, &net.machine(name, nat), &server));
    let mallory = net.machine("mallory", Nat::None);
    for peer in [&mut bob, &mut carol] {
        ping::assert_answers(&peer.host, &alice.ipv4());
        peer.wait_path("alice", "direct", PATH_LIMIT);
    }
    let recorded = record_start(&alice, &mut bob);
    let calls: Vec<Vec<u8>> =
        recorded.into_iter().filter(|it| it.len() == 148 && it[0] == 1).collect();
    assert!(!calls.is_empty(), "a handshake was recorded");
    let target = udp_endpoint(&alice);
    server.stop();

    let flow = Steady::start(&carol.host, &alice.host, &alice.ipv4(), FLOW_PACKETS);
    let calm = flow.share(Duration::from_secs(1));
    let lines_before = alice.log().lines().count();
    let flood = Spoofer::flood(&mallory, target, hostile(&calls), packets_per_second());
    let start = now();
    let mut times = Vec::new();
    // A twentieth may take longer.
    while start.elapsed() < span() || times.len() < 20 {
        bob.kill();
        bob.up_again();
        times.push(ping::first_answer(&bob.host, &alice.ipv4(), bob.started, LEGIT_LIMIT * 5));
    }
    let loud = flow.share(Duration::from_secs(1));
    let sent = flood.stop();
    let seconds = start.elapsed().as_secs_f64();
    times.sort();
    let late = times[(times.len() * 95).div_ceil(100) - 1];
    eprintln!(
        "{:.0} forged handshakes a second: {} new ones of a member took {:?} (p95 {late:?}), \
         an established flow kept {:.0} % of {:.0} %",
        sent as f64 / seconds,
        times.len(),
        times,
        loud * 100.0,
        calm * 100.0,
    );
    assert!(calm > 0.95, "the flow flows before: {calm}");
    assert!(loud > 0.8, "the flow keeps at least 80 %: {loud}");
    assert!(late < LEGIT_LIMIT);
    assert!(sent as f64 / seconds > packets_per_second() as f64 / 2.0, "it was a flood: {sent}");
    assert!(drops(&alice, "rate-limited") > 1000, "handshakes were asked for cookies");
    let lines = alice.log().lines().count() - lines_before;
    assert!((lines as f64) < 10.0 * seconds, "{lines} lines of log in {seconds:.1} s");
}

/// Real handshakes again and again, and noise of every kind that a node takes from strangers.
fn hostile(calls: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    for call in calls {
        for _ in 0..6 {
            all.push(call.clone());
        }
        // Another first MAC; disco and relay control of nobody.
        let mut wrong = call.clone();
        wrong[120] ^= 1;
        all.push(wrong);
        all.push([&[0xB1, 1, 0, 0][..], &call[4..120]].concat());
        all.push([&[0xB3, 1, 4, 0][..], &call[4..50]].concat());
    }
    all
}

/// Whatever is said to the server and to a node from an address that has proved nothing: what comes
/// back is not longer. What came of one question is looked at before the next.
fn reflection() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [mut alice, mut bob] =
        ["alice", "bob"].map(|name| Node::start(&net, &net.machine(name, Nat::None), &server));
    let mallory = net.machine("mallory", Nat::None);
    alice.wait_path("bob", "direct", PATH_LIMIT);
    let at_server = Recorder::open(&server.host, PORT);
    let mut to_alice = record_start(&alice, &mut bob);
    let mut to_server = at_server.record(Duration::from_millis(100));
    to_server.extend(questions());
    assert!(to_server.len() >= 3 && to_alice.len() >= 2, "something was recorded");
    to_alice.extend(questions());
    let server_at = SocketAddrV4::new(server.host.address, PORT);
    let second = SocketAddrV4::new(server.host.address, PORT + 1);
    let alice_at = udp_endpoint(&alice);
    for (target, datagrams) in
        [(server_at, &to_server), (second, &to_server), (alice_at, &to_alice)]
    {
        for datagram in datagrams {
            let (bytes, count) = attack::answers(&mallory, target.into(), datagram);
            assert!(
                bytes <= datagram.len(),
                "{target} sent {bytes} bytes in {count} datagrams for {} bytes: {:02x?}",
                datagram.len(),
                &datagram[..datagram.len().min(16)],
            );
        }
    }
    // And in sum, with what may come late: what bob said to alice, said again by a stranger.
    let sent: usize = to_alice.iter().map(Vec::len).sum();
    let came = attack::answers_to_all(&mallory, alice_at.into(), &to_alice);
    assert!(came <= sent, "alice answered {came} bytes to {sent}");
    bob.wait_connected();
}

/// What the server answers to anybody: reflect, reflect from the other port, knock.
fn questions() -> Vec<Vec<u8>> {
    let question = |kind: u8, flags: u8| {
        let mut bytes = vec![0; 50];
        bytes[..4].copy_from_slice(&[0xB3, 1, kind, flags]);
        bytes[16..34].fill(0xff);
        bytes
    };
    vec![question(3, 0), question(3, 1), question(5, 0)]
}

const PATH_LIMIT: Duration = Duration::from_secs(5);

/// The bar for what members do in a flood.
const LEGIT_LIMIT: Duration = Duration::from_secs(2);

/// Of 1200 bytes a second: 20 Mbit/s.
const FLOW_PACKETS: u64 = 2000;
