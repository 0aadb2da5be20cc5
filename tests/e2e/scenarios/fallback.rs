//! Kernels that lack an offload, and kernels that lose one while data flows: nothing is lost, nothing
//! comes twice, and the status says what is off.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::offload::streams_are_equal;
use crate::case::Case;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server, parse, path};
use crate::ping;
use crate::process;

const ALL: [&str; 4] = ["tun_tso", "tun_uso", "udp_gso", "udp_gro"];

pub(crate) fn cases() -> Vec<Case> {
    let node = |name: &str, refused, off: &'static [&str], when| {
        Case::new(format!("fallback::{name}"), move || node_without(refused, off, when))
    };
    vec![
        node("udp_trains_that_fail_with_eio_go_singly", "gso-eio", &["udp_gso"], When::Later),
        node("udp_trains_that_fail_with_einval_go_singly", "gso-einval", &["udp_gso"], When::Later),
        node("tcp_trains_that_the_interface_refuses_go_singly", "tso", &["tun_tso"], When::Later),
        node("udp_trains_that_the_interface_refuses_go_singly", "uso", &["tun_uso"], When::Later),
        node("linux_before_6_2_has_no_udp_on_the_interface", "uso-probe", &["tun_uso"], When::Ever),
        node("no_receive_offload_from_the_start", "gro-probe", &["udp_gro"], When::Ever),
        node("a_kernel_without_any", "gso-probe,gro-probe,tun-probe", &ALL, When::Ever),
        Case::new("fallback::a_relay_whose_trains_fail_sends_singly", || relay("gso-eio", true)),
        Case::new("fallback::a_node_whose_packets_stop_ends", packets_stop_at_a_node),
        Case::new("fallback::a_relay_whose_packets_stop_ends", packets_stop_at_the_relay),
        Case::new("fallback::a_relay_on_an_old_kernel", || relay("gso-probe,gro-probe", false)),
        Case::new(
            "fallback::a_question_that_cannot_be_answered_costs_the_relay_nothing",
            port_zero,
        ),
    ]
}

/// When the kernel refuses.
#[derive(Clone, Copy, PartialEq)]
enum When {
    Ever,
    /// After some trains.
    Later,
}

/// Trains that the kernel takes before it refuses.
const TAKEN: u32 = 12;
const LIMIT: Duration = Duration::from_secs(20);

/// The variables of a process whose kernel refuses these things.
fn refusing(net: &Net, words: &str) -> Vec<(&'static str, String)> {
    let library = net.dir().join("refuse.so");
    if !library.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/refuse.c");
        let mut command = Command::new("cc");
        command.args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(source);
        process::run(command, LIMIT).success("cc");
    }
    let after = TAKEN.to_string();
    vec![("LD_PRELOAD", path(&library)), ("REFUSE", words.into()), ("REFUSE_AFTER", after)]
}

fn node_without(refused: &str, off: &[&str], when: When) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mut alice = Node::new(&net, &net.machine("alice", Nat::None));
    alice.env = refusing(&net, refused);
    alice.up(&server.join());
    alice.wait_connected();
    let bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    ping::assert_answers(&alice.host, &bob.ipv4());
    alice.wait_path("bob", "direct", LIMIT);
    let before = alice.status().unwrap();
    assert_offloads(&before, if when == When::Later { &[] } else { off });
    each_once(&alice.host, &bob.host, &bob.ipv4());
    each_once(&bob.host, &alice.host, &alice.ipv4());
    for (from, to, address) in [(&alice, &bob, bob.ipv4()), (&bob, &alice, alice.ipv6())] {
        streams_are_equal(&from.host, &to.host, address.parse().unwrap());
    }
    each_once(&alice.host, &bob.host, &bob.ipv6());
    each_once(&bob.host, &alice.host, &alice.ipv6());
    let after = alice.status().unwrap();
    assert_offloads(&after, off);
    for reason in ["send-failed", "tun-write-failed"] {
        assert!(after["self"]["drops"][reason].is_null(), "{}", after["self"]["drops"]);
    }
    assert_offloads(&bob.status().unwrap(), &[]);
}

fn assert_offloads(status: &Value, off: &[&str]) {
    for name in ALL {
        let shown = &status["self"]["offloads"][name];
        assert_eq!(*shown, Value::Bool(!off.contains(&name)), "{name} of {}", status["self"]);
    }
}

/// Datagrams in a row, which become trains on the way; every one has to come, once, in order.
fn each_once(from: &Host, to: &Host, address: &str) {
    let address: std::net::IpAddr = address.parse().unwrap();
    let far = to.ns.enter(|| UdpSocket::bind((address, 0)).unwrap());
    far.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let any: SocketAddr =
        if address.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let near = from.ns.enter(|| UdpSocket::bind(any).unwrap());
    near.connect(far.local_addr().unwrap()).unwrap();
    let (mut datagram, mut buffer) = (vec![7; BYTES], vec![0; BYTES + 1]);
    for round in 0..ROUNDS {
        let numbers = round * BURST..(round + 1) * BURST;
        for number in numbers.clone() {
            datagram[..4].copy_from_slice(&number.to_be_bytes());
            near.send(&datagram).unwrap();
        }
        for number in numbers {
            let got = far.recv(&mut buffer).unwrap_or_else(|e| panic!("{number} is lost: {e}"));
            datagram[..4].copy_from_slice(&number.to_be_bytes());
            let came = u32::from_be_bytes(buffer[..4].try_into().unwrap());
            assert!(buffer[..got] == datagram[..], "{number} was to come, and {came} did");
        }
    }
    far.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(far.recv(&mut buffer).is_err(), "nothing comes twice");
}

/// A quarter of what a socket holds.
const BURST: u32 = 32;
const ROUNDS: u32 = 20;
const BYTES: usize = 1_100;

fn relay(refused: &str, at_first: bool) {
    let net = Net::new();
    let hub = net.machine("server", Nat::None);
    let address = format!("{}:{}", hub.address, crate::overlay::PORT);
    let mut server = Server::prepare(&net, &hub, "server", &[&address], &[&address], "");
    server.env = refusing(&net, refused);
    server.run();
    server.wait_ready();
    assert_eq!(trains(&server), at_first);
    let mut alice = Node::start(&net, &net.machine("alice", Nat::Symmetric), &server);
    let bob = Node::start(&net, &net.machine("bob", Nat::Symmetric), &server);
    ping::assert_answers(&alice.host, &bob.ipv4());
    alice.wait_path("bob", "relay-udp", LIMIT);
    each_once(&alice.host, &bob.host, &bob.ipv4());
    streams_are_equal(&alice.host, &bob.host, bob.ipv4().parse().unwrap());
    streams_are_equal(&bob.host, &alice.host, alice.ipv6().parse().unwrap());
    each_once(&bob.host, &alice.host, &alice.ipv6());
    assert!(!trains(&server), "trains are off");
    let status = parse(&server.cli(&["status", "--json"]).success("server status"));
    assert!(status["drops"]["send-failed"].is_null(), "{status}");
}

/// Whoever supervises it starts it anew.
fn packets_stop_at_a_node() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    let mut alice = Node::new(&net, &net.machine("alice", Nat::None));
    alice.env = refusing(&net, "packets");
    alice.up(&server.join());
    // What wakes the thread until it has failed; the last of them has no answer.
    let mut pings = bob.host.ns.command("ping");
    pings.args(["-n", "-i", "0.1", "-c", "40", "-w", "6", &bob_sees(&bob, "alice")]);
    process::run(pings, LIMIT);
    assert_eq!(alice.daemon().wait_exit(LIMIT), Some(1));
    let log = alice.log();
    assert!(log.contains("no packets move any more: the thread udp-to-tun has ended"), "{log}");
    assert!(alice.host.ns.interfaces().iter().all(|it| !it.contains("overlay")), "nothing stays");
}

/// The overlay address of `name`, once `node` has it.
fn bob_sees(node: &Node, name: &str) -> String {
    let find = || {
        let status = node.status()?;
        let peers = status["peers"].as_array()?;
        let peer = peers.iter().find(|peer| peer["name"] == name)?;
        peer["ipv4"].as_str().map(str::to_owned)
    };
    crate::clock::wait_for("the peer is known", LIMIT, find).0
}

fn packets_stop_at_the_relay() {
    let net = Net::new();
    let hub = net.machine("server", Nat::None);
    let address = format!("{}:{}", hub.address, crate::overlay::PORT);
    let mut server = Server::prepare(&net, &hub, "server", &[&address], &[&address], "");
    server.env = refusing(&net, "packets");
    server.run();
    server.wait_ready();
    let mallory = net.machine("mallory", Nat::None);
    let socket = mallory.ns.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    for _ in 0..100 {
        socket.send_to(b"what wakes the thread", &address).unwrap();
        if server.daemon().exit().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(server.daemon().wait_exit(LIMIT), Some(1));
    let log = server.daemon().log();
    assert!(log.contains("cannot relay: the thread relay-0 has ended"), "{log}");
}

fn trains(server: &Server) -> bool {
    let status = parse(&server.cli(&["status", "--json"]).success("server status"));
    status["relay"]["udp_gso"].as_bool().expect("a switch")
}

/// A reflect from port 0 of a stranger: an answer to that port fails with EINVAL, like a train.
fn port_zero() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mallory = net.machine("mallory", Nat::None);
    let mut question = vec![0xB3, 1, 3, 0];
    question.resize(50, 0);
    let dropped = || {
        let status = parse(&server.cli(&["status", "--json"]).success("server status"));
        status["drops"]["malformed"].as_u64().unwrap_or_default()
    };
    let target = server.host.address;
    crate::attack::send_from_port(&mallory, 0, (target, crate::overlay::PORT).into(), &question);
    crate::clock::wait_for("the question has been dropped", LIMIT, || {
        (dropped() == 1).then_some(())
    });
    assert!(trains(&server), "the relay still sends trains");
}
