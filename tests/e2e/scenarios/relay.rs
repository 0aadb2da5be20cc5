//! The relay, over UDP and over TCP, and hostile packets while it works.

use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::attack::{self, Recorder};
use crate::case::Case;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server, find_peer};
use crate::pair::Pair;
use crate::ping::{self, Stream};
use crate::process;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("relay::udp_blocked_on_one_side_runs_over_tcp", || blocked(false)),
        Case::new("relay::udp_blocked_on_both_sides_runs_over_tcp", || blocked(true)),
        Case::new("relay::udp_that_is_blocked_later_moves_to_tcp", blocked_later),
        Case::timed("relay::udp_that_only_leaves_runs_over_tcp", one_way),
        Case::new("relay::full_packets_pass_a_narrow_relayed_path", || narrow(Nat::Symmetric)),
        Case::new("relay::full_packets_pass_a_narrow_direct_path", || narrow(Nat::PortRestricted)),
        Case::new("relay::hostile_datagrams_do_no_harm_to_the_server", datagrams_to_server),
        Case::new("relay::hostile_datagrams_do_no_harm_to_a_node", datagrams_to_node),
        Case::new("relay::hostile_connections_do_no_harm_to_the_server", connections_to_server),
        Case::new("relay::a_server_that_talks_noise_does_no_harm_to_a_node", noise_to_node),
    ]
}

/// Two nodes behind these NATs, once `kind` is the path of both. The path is the way that a node
/// sends: where UDP is blocked, that is TCP, and the other side may go on with UDP.
fn pair(nats: [Nat; 2], block_udp: [bool; 2], kind: &str) -> Pair {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mut number = 0;
    let [mut alice, mut bob] = ["alice", "bob"].map(|name| {
        let host = net.machine(name, nats[number]);
        if block_udp[number] {
            host.router.as_ref().expect("UDP is blocked by a router").block_udp();
        }
        number += 1;
        Node::start(&net, &host, &server)
    });
    ping::assert_answers(&bob.host, &alice.ipv4());
    let any_udp_blocked = block_udp.contains(&true);
    for (blocked, node, peer) in
        [(block_udp[0], &mut alice, "bob"), (block_udp[1], &mut bob, "alice")]
    {
        if blocked || !any_udp_blocked {
            node.wait_path(peer, kind, PATH_LIMIT);
        } else {
            let what = format!("path to {peer} is a relay");
            node.wait_status(&what, PATH_LIMIT, |status| is_relayed(status, peer));
        }
    }
    Pair { net, server, alice, bob }
}

/// Home links that take less than a full packet with all headers.
fn narrow(nat: Nat) {
    let kind = if nat == Nat::Symmetric { "relay-udp" } else { "direct" };
    let pair = pair([nat, nat], [false, false], kind);
    for (host, mtu) in [(&pair.alice.host, 1300), (&pair.bob.host, 1280)] {
        let router = host.router.as_ref().expect("both are at home");
        router.ns.ip(&format!("link set dev l{} mtu {mtu}", host.address.octets()[3]));
        router.ns.ip(&format!("link set dev lan mtu {mtu}"));
        host.ns.ip(&format!("link set dev eth0 mtu {mtu}"));
    }
    for (host, address) in
        [(&pair.alice.host, pair.bob.ipv4()), (&pair.bob.host, pair.alice.ipv4())]
    {
        let mut command = host.ns.command("ping");
        command.args(["-n", "-q", "-M", "do", "-s", "1252", "-i", "0.1", "-c", "3", "-w", "5"]);
        command.arg(address);
        process::run(command, Duration::from_secs(20)).success("a ping of 1280 bytes");
    }
}

fn is_relayed(status: &Value, peer: &str) -> bool {
    let kind = &find_peer(status, peer)["path"]["kind"];
    kind == "relay-udp" || kind == "relay-tcp"
}

fn blocked(both: bool) {
    let nats = [Nat::PortRestricted, Nat::PortRestricted];
    let Pair { net, alice, bob, server: _server } = pair(nats, [true, both], "relay-tcp");
    let there = Stream::start(&net, &bob.host, &alice.ipv4());
    let back = Stream::start(&net, &alice.host, &bob.ipv6());
    there.wait_for_more(200);
    there.stop_without_loss();
    back.stop_without_loss();
    assert_eq!(alice.path_kind("bob"), "relay-tcp");
    assert!(is_relayed(&bob.status().unwrap(), "alice"));
}

fn blocked_later() {
    let nats = [Nat::Symmetric, Nat::Symmetric];
    let Pair { net, mut alice, bob, server: _server } = pair(nats, [false, false], "relay-udp");
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    stream.wait_for_more(20);
    alice.host.router.as_ref().unwrap().block_udp();
    alice.wait_path("bob", "relay-tcp", Duration::from_secs(15));
    stream.wait_for_more(100);
    let received = stream.stop();
    let lost = received.lost.len();
    eprintln!("UDP blocked under traffic: {lost} packets at 10 ms lost before TCP took over");
}

/// A node whose data comes by its connection for so long gets what is for it there, too.
const UDP_SILENCE: Duration = Duration::from_secs(2);

/// What the server sends to one node by UDP is lost, and its binds arrive.
fn one_way() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("alice", Nat::Symmetric);
    host.ns.nft(&format!(
        "table inet noanswer {{
          chain input {{ type filter hook input priority 0; policy accept;
           ip saddr {} meta l4proto udp counter drop
          }}
         }}",
        server.host.address
    ));
    let mut alice = Node::start(&net, &host, &server);
    let mut bob = Node::start(&net, &net.machine("bob", Nat::Symmetric), &server);
    ping::assert_answers(&bob.host, &alice.ipv4());
    alice.wait_path("bob", "relay-tcp", PATH_LIMIT);
    bob.wait_path("alice", "relay-udp", PATH_LIMIT);
    // Until then the server cannot know that its answers are lost.
    thread::sleep(UDP_SILENCE + Duration::from_secs(1));
    // For longer than the waits between binds: the next ones turn nothing back.
    let there = Stream::start(&net, &bob.host, &alice.ipv4());
    let back = Stream::start(&net, &alice.host, &bob.ipv6());
    there.wait_for_more(700);
    there.stop_without_loss();
    back.stop_without_loss();
    assert_eq!(alice.path_kind("bob"), "relay-tcp");
    let rules = host.ns.run("nft", &["list", "table", "inet", "noanswer"]);
    assert!(!rules.stdout.contains("packets 0 "), "answers to binds were sent: {}", rules.stdout);
}

/// A machine that has no part in the network, and what it can learn on the way.
fn stranger(net: &Net) -> Host {
    net.machine("mallory", Nat::None)
}

fn datagrams_to_server() {
    let nats = [Nat::Symmetric, Nat::Symmetric];
    let Pair { net, server, mut alice, mut bob } = pair(nats, [false, false], "relay-udp");
    let mallory = stranger(&net);
    let target = SocketAddr::from((server.host.address, PORT));
    // A start shows everything that a node ever says to its server by UDP.
    let recorder = Recorder::open(&server.host, PORT);
    let alice_ipv4 = alice.ipv4();
    assert_eq!(alice.stop(), Some(0));
    alice.up_again();
    ping::assert_answers(&bob.host, &alice_ipv4);
    alice.wait_path("bob", "relay-udp", PATH_LIMIT);
    bob.wait_path("alice", "relay-udp", PATH_LIMIT);
    let stream = Stream::start(&net, &bob.host, &alice_ipv4);
    let back = Stream::start(&net, &alice.host, &bob.ipv6());
    let hostile = attack::hostile_datagrams(&record_some(&recorder));
    attack::flood(&mallory, target, &hostile);
    // The same from inside the network: a member's own address, another port.
    attack::flood(&alice.host, target, &hostile);

    stream.wait_for_more(100);
    stream.stop_without_loss();
    back.stop_without_loss();
    alice.wait_path("bob", "relay-udp", PATH_LIMIT);
    bob.wait_connected();
    assert_new_node_gets_in(&net, &server, &alice);
}

/// Some of what came, which stands for all: a node's packets are of few kinds.
fn record_some(recorder: &Recorder) -> Vec<Vec<u8>> {
    let mut recorded = recorder.record(Duration::from_millis(500));
    assert!(!recorded.is_empty(), "packets were recorded");
    recorded.truncate(12);
    recorded
}

fn datagrams_to_node() {
    let nats = [Nat::None, Nat::PortRestricted];
    let Pair { net, server: _server, alice, mut bob } = pair(nats, [false, false], "direct");
    let mallory = stranger(&net);
    let port = alice.status().unwrap()["self"]["listen_port"].as_u64().expect("a listen port");
    let port = u16::try_from(port).unwrap();
    let target = SocketAddr::from((alice.host.address, port));
    // A start shows everything that nodes say to each other.
    let recorder = Recorder::open(&alice.host, port);
    let bob_ipv4 = bob.ipv4();
    assert_eq!(bob.stop(), Some(0));
    bob.up_again();
    ping::assert_answers(&alice.host, &bob_ipv4);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    attack::flood(&mallory, target, &attack::hostile_datagrams(&record_some(&recorder)));

    stream.wait_for_more(100);
    stream.stop_without_loss();
    bob.wait_path("alice", "direct", PATH_LIMIT);
    let status = alice.status().unwrap();
    let drops = status["self"]["drops"].as_object().expect("drops are counted");
    let dropped: u64 = drops.values().filter_map(Value::as_u64).sum();
    assert!(dropped > 0, "hostile datagrams are dropped and counted: {drops:?}");
}

fn connections_to_server() {
    let nats = [Nat::PortRestricted, Nat::PortRestricted];
    let Pair { net, mut server, mut alice, mut bob } = pair(nats, [true, true], "relay-tcp");
    let target = SocketAddr::from((server.host.address, PORT));

    // What a real node says first is learned by standing in for the server for a moment.
    server.stop();
    let listener = server.host.ns.enter(|| TcpListener::bind(target).unwrap());
    let real = attack::answer_with_noise(&listener);
    assert!(!real.is_empty(), "a node says something to its server");
    drop(listener);
    server.run();
    server.wait_ready();
    alice.wait_connected();
    bob.wait_connected();

    let mallory = stranger(&net);
    ping::assert_answers(&bob.host, &alice.ipv4());
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    stream.wait_for_more(20);
    let silent = attack::open_and_say_nothing(&mallory, target, 300);
    assert!(silent.len() > 200, "{} connections were accepted", silent.len());
    attack::babble(&mallory, target, &attack::hostile_openings(&real));
    stream.wait_for_more(100);
    stream.stop_without_loss();
    alice.wait_connected();
    assert_new_node_gets_in(&net, &server, &alice);
    drop(silent);
}

fn noise_to_node() {
    let nats = [Nat::PortRestricted, Nat::PortRestricted];
    let Pair { net, mut server, mut alice, mut bob } = pair(nats, [false, false], "direct");
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    stream.wait_for_more(20);
    server.kill();
    let target = SocketAddr::from((server.host.address, PORT));
    let listener = server.host.ns.enter(|| TcpListener::bind(target).unwrap());
    for _ in 0..4 {
        assert!(!attack::answer_with_noise(&listener).is_empty());
    }
    drop(listener);
    stream.wait_for_more(50);
    stream.stop_without_loss();
    server.run();
    server.wait_ready();
    alice.wait_connected();
    bob.wait_connected();
}

/// The server still does all of its work: a new node enrols, connects, and is reached.
fn assert_new_node_gets_in(net: &Net, server: &Server, peer: &Node) {
    let carol = Node::start(net, &net.machine("carol", Nat::None), server);
    ping::assert_answers(&carol.host, &peer.ipv4());
}

const PATH_LIMIT: Duration = Duration::from_secs(5);
