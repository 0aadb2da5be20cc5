//! A network that is too large to tell everybody of everybody: peers are found when they are used.

use std::time::Duration;

use serde_json::Value;

use crate::case::Case;
use crate::clock::now;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server, assert_error, find_peer};
use crate::ping::{self, Stream};
use crate::process;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("large::a_peer_is_found_by_the_first_packet_which_is_not_lost", found),
        Case::new("large::both_sides_may_find_each_other_at_once", at_once),
        Case::new("large::a_peer_is_found_by_its_name", by_name),
        Case::new("large::a_removal_reaches_who_uses_the_node_and_who_does_not", removed),
        Case::new("large::what_is_used_survives_restarts_with_the_server_and_without", restarts),
    ]
}

const LIMIT: Duration = Duration::from_secs(10);

/// Of networks above this size a node is told a part. The one that makes it large is told to all.
const WHOLE_UP_TO: usize = 3;

struct Large {
    net: Net,
    server: Server,
    nodes: [Node; 6],
}

/// The first four have been told of each other, the last two of nobody.
fn large() -> Large {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    let at = format!("{}:{PORT}", host.address);
    let config = format!("whole-netmap-up-to = {WHOLE_UP_TO}\n");
    let server = Server::start_at(&net, &host, &[&at], &[&at], &config);
    let mut nodes = [
        ("alice", Nat::None),
        ("bob", Nat::PortRestricted),
        ("carol", Nat::Symmetric),
        ("dave", Nat::FullCone),
        ("eve", Nat::PortRestricted),
        ("frank", Nat::PortRestricted),
    ]
    .map(|(name, nat)| Node::start(&net, &net.machine(name, nat), &server));
    nodes[0].wait_status("the network is large", LIMIT, |status| peers(status).len() <= 3);
    for node in &nodes[4..] {
        let status = node.status().unwrap();
        assert!(peers(&status).is_empty(), "{} was told of peers: {status}", node.name);
        // How many there are is said in passing: eve may not have heard of frank yet.
        assert!(status["nodes"].as_u64() >= Some(5), "{status}");
    }
    Large { net, server, nodes }
}

fn peers(status: &Value) -> Vec<&str> {
    let peers = status["peers"].as_array().expect("peers");
    peers.iter().filter_map(|peer| peer["name"].as_str()).collect()
}

fn wait_knows(node: &mut Node, peer: &str) {
    node.wait_status(&format!("knows {peer}"), LIMIT, |status| peers(status).contains(&peer));
}

/// Every packet of a ping of 10 ms is answered, the first one too.
fn assert_first_arrives(net: &Net, from: &Node, to: &Node) {
    let stream = Stream::start(net, &from.host, &to.ipv4());
    stream.wait_for_more(50);
    stream.stop_without_loss();
}

fn found() {
    let Large { net, server: _server, nodes: [_, mut bob, carol, _dave, mut eve, mut frank] } =
        large();
    // Two that know nobody; one that knows others and one that knows nobody, both ways.
    assert_first_arrives(&net, &frank, &eve);
    assert_first_arrives(&net, &bob, &eve);
    assert_first_arrives(&net, &frank, &carol);
    wait_knows(&mut frank, "eve");
    for peer in ["frank", "bob"] {
        wait_knows(&mut eve, peer);
    }
    frank.wait_path("eve", "direct", LIMIT);
    eve.wait_path("frank", "direct", LIMIT);
    bob.wait_path("eve", "direct", LIMIT);
    let status = frank.status().unwrap();
    assert_eq!(peers(&status).len(), 2, "those that it uses and no others: {status}");
    let shown = frank.cli(&["status"]).success("status");
    assert!(shown.contains("# 2 of the network's 6 nodes"), "{shown}");

    // An address that nobody has is refused, not a silence.
    let network = frank.ipv4();
    let nobody = format!("{}.254", network.rsplit_once('.').unwrap().0);
    let mut command = frank.host.ns.command("ping");
    command.args(["-n", "-c", "2", "-i", "0.2", "-W", "5", &nobody]);
    let start = now();
    let told = process::run(command, LIMIT);
    assert!(told.stdout.contains("Destination Host Unreachable"), "{}", told.stdout);
    assert!(start.elapsed() < Duration::from_secs(4), "it took {:?}", start.elapsed());
}

fn at_once() {
    let Large { net, server: _server, nodes: [_, _, _, _, eve, frank] } = large();
    let both = [(&frank, &eve), (&eve, &frank)]
        .map(|(from, to)| Stream::start(&net, &from.host, &to.ipv4()));
    for stream in both {
        stream.wait_for_more(50);
        stream.stop_without_loss();
    }
}

fn by_name() {
    let Large { net: _net, server, nodes: [mut alice, bob, _carol, _dave, eve, frank] } = large();
    frank.cli(&["ping", "bob", "-c", "1"]).success("ping by name");
    let address = eve.cli(&["ip", "alice"]).success("ip by name");
    assert!(address.contains(&alice.ipv4()), "{address}");
    assert_error(&frank.cli(&["ping", "nobody", "-c", "1"]), &[5], &["nobody"]);
    let id = find_peer(&frank.status().unwrap(), "bob")["id"].as_str().unwrap().to_owned();
    eve.cli(&["ping", &id, "-c", "1"]).success("ping by id");
    assert_eq!(frank.why("bob")["schema"], 1);

    server.cli(&["rename", "eve", "erin"]).success("rename");
    alice.cli(&["ping", "erin", "-c", "1"]).success("ping by the new name");
    wait_knows(&mut alice, "erin");
    drop(bob);
}

fn removed() {
    let Large { net, server, nodes: [alice, mut bob, carol, _dave, eve, mut frank] } = large();
    let gone = eve.ipv4();
    for node in [&bob, &frank] {
        ping::assert_answers(&node.host, &gone);
    }
    // Alice was never told of eve, carol uses frank.
    ping::assert_answers(&carol.host, &frank.ipv4());
    let other = Stream::start(&net, &carol.host, &frank.ipv4());
    let said = server.cli(&["remove", "eve"]).success("remove");
    assert!(said.contains("acknowledged"), "{said}");
    for node in [&mut bob, &mut frank] {
        node.wait_status("eve is gone", LIMIT, |status| find_peer(status, "eve").is_null());
    }
    for host in [&alice.host, &bob.host, &frank.host] {
        ping::assert_silent(host, &gone);
    }
    ping::assert_silent(&eve.host, &alice.ipv4());
    assert_error(&alice.cli(&["ping", "eve", "-c", "1"]), &[5], &["eve"]);
    other.wait_for_more(20);
    other.stop_without_loss();
}

fn restarts() {
    let Large { net, mut server, nodes: [mut alice, _bob, _carol, dave, mut eve, mut frank] } =
        large();
    let to_eve = eve.ipv4();
    ping::assert_answers(&frank.host, &to_eve);
    frank.wait_path("eve", "direct", LIMIT);
    eve.wait_path("frank", "direct", LIMIT);

    // The server comes back and knows of no pair: the nodes tell it.
    let stream = Stream::start(&net, &frank.host, &to_eve);
    server.kill();
    server.run();
    server.wait_ready();
    for node in [&mut alice, &mut eve, &mut frank] {
        node.wait_connected();
    }
    stream.wait_for_more(20);
    stream.stop_without_loss();
    assert_first_arrives(&net, &frank, &alice);

    // Who starts from its disk alone has the peers that it used.
    server.kill();
    frank.kill();
    frank.up_again();
    ping::first_answer(&frank.host, &to_eve, frank.started, LIMIT);
    ping::assert_silent(&frank.host, &dave.ipv4());
    server.run();
    server.wait_ready();
    frank.wait_connected();
    ping::assert_answers(&frank.host, &dave.ipv4());
}
