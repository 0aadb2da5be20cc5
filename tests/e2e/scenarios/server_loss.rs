//! The server may go away, and come back.

use std::net::SocketAddr;
use std::time::Duration;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server, call, find_peer, path};
use crate::pair::Pair;
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for nat in [Nat::None, Nat::PortRestricted] {
        cases.push(Case::new(format!("server_loss::{nat}_pair_loses_no_packet"), move || {
            no_packet_is_lost(nat);
        }));
        cases.push(Case::new(
            format!("server_loss::{nat}_pair_restarts_without_the_server"),
            move || restarts_without_the_server(nat),
        ));
    }
    cases.push(Case::new("server_loss::sessions_re_key_without_the_server", re_key));
    cases.push(Case::new("server_loss::running_nodes_follow_a_server_that_moves", moves));
    cases
}

/// Two nodes that are direct.
fn direct_pair(nat: Nat, config: &str) -> Pair {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [mut alice, mut bob] = ["alice", "bob"].map(|name| {
        let host = net.machine(name, nat);
        let mut node = Node::with_config(&net, &host, name, config);
        node.up(&server.join());
        node
    });
    alice.wait_connected();
    bob.wait_connected();
    ping::assert_answers(&bob.host, &alice.ipv4());
    alice.wait_path("bob", "direct", Duration::from_secs(5));
    bob.wait_path("alice", "direct", Duration::from_secs(5));
    Pair { net, server, alice, bob }
}

fn wait_unreachable(node: &mut Node) {
    node.wait_status("sees that the server is gone", SERVER_LOSS_LIMIT, |status| {
        status["server"]["state"] != "connected"
    });
}

fn no_packet_is_lost(nat: Nat) {
    let Pair { net, mut server, mut alice, mut bob } = direct_pair(nat, "");
    let (alice_ipv4, bob_ipv6) = (alice.ipv4(), bob.ipv6());
    let there = Stream::start(&net, &bob.host, &alice_ipv4);
    let back = Stream::start(&net, &alice.host, &bob_ipv6);
    there.wait_for_more(50);

    server.kill();
    wait_unreachable(&mut alice);
    wait_unreachable(&mut bob);
    there.wait_for_more(200);
    assert_eq!(bob.path_kind("alice"), "direct", "the path outlives the server");

    server.run();
    server.wait_ready();
    alice.wait_status("connected again", RECONNECT_LIMIT, is_connected);
    bob.wait_status("connected again", RECONNECT_LIMIT, is_connected);
    there.wait_for_more(50);
    let there = there.stop_without_loss();
    let back = back.stop_without_loss();
    eprintln!("server loss: {} and {} answers, none missing", there.packets, back.packets);
    assert_eq!(alice.ipv4(), alice_ipv4, "addresses survive the server");
}

fn re_key() {
    let Pair { net, mut server, mut alice, bob } = direct_pair(Nat::PortRestricted, RE_KEY_CONFIG);
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    server.kill();
    wait_unreachable(&mut alice);

    // The age of the last handshake falls when there was a new one.
    for _ in 0..2 {
        let mut oldest = 0;
        wait_for("a new handshake without the server", Duration::from_secs(25), || {
            let age = find_peer(&alice.status()?, "bob")["last_handshake_s"].as_u64()?;
            let fell = age < oldest;
            oldest = oldest.max(age);
            fell.then_some(())
        });
    }
    stream.wait_for_more(50);
    let received = stream.stop_without_loss();
    eprintln!("two new sessions without the server: {} answers, none missing", received.packets);
}

fn restarts_without_the_server(nat: Nat) {
    let Pair { net: _net, mut server, mut alice, mut bob } = direct_pair(nat, "");
    let (alice_ipv4, alice_ipv6) = (alice.ipv4(), alice.ipv6());
    server.kill();
    assert_eq!(alice.stop(), Some(0));
    assert_eq!(bob.stop(), Some(0));

    alice.up_again();
    bob.up_again();
    let limit = Duration::from_secs(10);
    let took = ping::first_answer(&bob.host, &alice_ipv4, bob.started, limit);
    eprintln!("{nat} pair: first answer {took:.0?} after a restart without the server");
    ping::assert_answers(&bob.host, &alice_ipv6);
    assert_eq!(bob.path_kind("alice"), "direct");

    server.run();
    server.wait_ready();
    alice.wait_status("connected again", RECONNECT_LIMIT, is_connected);
    bob.wait_status("connected again", RECONNECT_LIMIT, is_connected);
    ping::assert_answers(&alice.host, &bob.ipv4());
}

/// The steps of "Moving a server" in docs/operation.md, with nodes that run all the time.
fn moves() {
    let net = Net::new();
    let [old, new] = ["old", "new"].map(|name| net.machine(name, Nat::None));
    let at = |host: &Host| SocketAddr::from((host.address, PORT)).to_string();
    let (old_at, new_at) = (at(&old), at(&new));
    let mut server = Server::start(&net, &old);
    let [mut alice, mut bob] = ["alice", "bob"]
        .map(|name| Node::start(&net, &net.machine(name, Nat::PortRestricted), &server));
    let alice_ipv4 = alice.ipv4();

    server.stop();
    let both = [new_at.as_str(), old_at.as_str()];
    let mut server = Server::start_at(&net, &old, &[&old_at], &both, "");
    alice.wait_status("connected again", RECONNECT_LIMIT, is_connected);
    bob.wait_status("connected again", RECONNECT_LIMIT, is_connected);
    let backup = path(&net.dir().join("backup"));
    server.cli(&["backup", &backup]).success("server backup");
    server.stop();
    wait_unreachable(&mut alice);
    wait_unreachable(&mut bob);

    let mut server = Server::prepare(&net, &new, "moved", &[&new_at], &[&new_at], "");
    let state = path(&net.dir().join("moved/state"));
    call(&new, &["server", "restore", &backup, "--state-dir", &state]).success("server restore");
    server.run();
    server.wait_ready();
    let found = |status: &serde_json::Value| {
        is_connected(status) && status["server"]["address"] == new_at.as_str()
    };
    alice.wait_status("connected to the new place", RECONNECT_LIMIT, found);
    bob.wait_status("connected to the new place", RECONNECT_LIMIT, found);
    assert_eq!(alice.ipv4(), alice_ipv4, "addresses survive the move");
    ping::assert_answers(&bob.host, &alice_ipv4);
    let again = alice.up_to_end(&server.join());
    assert_eq!(again.code, Some(0), "a line of the new place says nothing new: {again:?}");
}

fn is_connected(status: &serde_json::Value) -> bool {
    status["server"]["state"] == "connected"
}

/// WireGuard re-keys after two minutes; a test cannot wait so long.
const RE_KEY_CONFIG: &str = "rekey-after-s = 10\n";

/// A killed server resets its connections, so nobody needs a time-out to notice.
const SERVER_LOSS_LIMIT: Duration = Duration::from_secs(10);

/// Nodes that lost the server ask for it again at growing intervals.
const RECONNECT_LIMIT: Duration = Duration::from_secs(20);
