//! Node keys are renewed under traffic.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::failover::Connection;
use crate::case::Case;
use crate::clock::wait_for;
use crate::nat::Nat;
use crate::overlay::{Node, Server, assert_error, find_peer, parse, text};
use crate::pair::Pair;
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (nat, path) in [(Nat::PortRestricted, "direct"), (Nat::Symmetric, "relay-udp")] {
        let name = format!("rotation::a_{path}_pair_loses_no_packet");
        cases.push(Case::new(name, move || nothing_is_lost(nat, path)));
    }
    cases.push(Case::new("rotation::killed_nodes_and_servers_agree_on_the_key", kills));
    cases.push(Case::new("rotation::a_peer_that_was_away_learns_the_new_key", away));
    cases
}

const PATH_LIMIT: Duration = Duration::from_secs(20);
/// A silence of TCP that nobody notices: the machine has two cores, and all nodes are on it.
const TCP_SILENCE: Duration = Duration::from_millis(500);

fn key(node: &Node) -> String {
    text(&node.status().expect("the node runs"), "/self/public_key")
}

fn stored_key(server: &Server, name: &str) -> String {
    let list = server.nodes();
    let nodes = list["nodes"].as_array().expect("nodes");
    let node = nodes.iter().find(|node| node["name"] == name).expect("it is a member");
    text(node, "/public_key")
}

fn rotate(node: &Node) {
    let before = key(node);
    let rotated = parse(&node.cli(&["rotate", "--json"]).success("rotate"));
    assert_eq!((&rotated["schema"], text(&rotated, "/old_public_key")), (&Value::from(1), before));
    assert_eq!(text(&rotated, "/public_key"), key(node));
}

fn nothing_is_lost(nat: Nat, path: &str) {
    let Pair { net, server, mut alice, mut bob } = Pair::settled(nat, path, PATH_LIMIT);
    let first: BTreeSet<String> = [&alice, &bob].map(key).into();
    let there = Stream::every(&net, &bob.host, &alice.ipv4(), "0.005");
    let back = Stream::every(&net, &alice.host, &bob.ipv6(), "0.005");
    let flows = [
        Connection::start(&alice.host, &bob.host, &bob.ipv4()),
        Connection::start(&bob.host, &alice.host, &alice.ipv6()),
    ];
    there.wait_for_more(100);

    // Both at the same time.
    thread::scope(|scope| {
        scope.spawn(|| rotate(&alice));
        scope.spawn(|| rotate(&bob));
    });
    for (node, peer) in [(&mut alice, "bob"), (&mut bob, "alice")] {
        node.wait_status("a session of the new keys", Duration::from_secs(5), |status| {
            find_peer(status, peer)["last_handshake_s"].as_u64().is_some_and(|age| age <= 2)
        });
    }
    there.wait_for_more(400);
    let (there, back) = (there.stop_without_loss(), back.stop_without_loss());
    let silences = flows.map(Connection::finish);
    eprintln!(
        "{path}: {} and {} answers at 5 ms, none missing; TCP silent for {silences:.0?}",
        there.packets, back.packets
    );
    assert!(silences.iter().all(|silence| *silence <= TCP_SILENCE), "{silences:?}");
    for (node, peer) in [(&alice, "bob"), (&bob, "alice")] {
        assert_eq!(node.path_kind(peer), path, "the path is the one it was");
        assert_eq!(stored_key(&server, &node.name), key(node));
        assert!(!first.contains(&key(node)));
        let status = node.status().unwrap();
        let report = &status["self"]["node_key"];
        assert!(report["age_s"].as_u64().is_some_and(|age| age < 60), "{report}");
        assert_eq!((&report["stored"], &report["old_accepted"]), (&true.into(), &true.into()));
        // The one before is not through.
        assert_error(&node.cli(&["rotate"]), &[1], &["moment ago"]);
    }
    let events = server.cli(&["events", "--json"]).success("events");
    assert_eq!(events.matches("node-key-changed").count(), 2, "{events}");
}

/// SIGKILL a moment after the command was given, so that it hits different steps.
fn kills() {
    let Pair { net: _net, mut server, mut alice, mut bob } =
        Pair::settled(Nat::PortRestricted, "direct", PATH_LIMIT);
    for (number, wait_ms) in [0, 3, 8, 20].into_iter().enumerate() {
        let before = stored_key(&server, "alice");
        let socket = alice.socket();
        let asking = crate::overlay::overlay(&alice.host, &["rotate", "--socket", &socket])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn();
        let mut asking = asking.unwrap();
        thread::sleep(Duration::from_millis(wait_ms));
        if number % 2 == 0 {
            alice.kill();
        } else {
            server.kill();
        }
        asking.wait().unwrap();
        if number % 2 == 0 {
            alice.up_again();
        } else {
            server.run();
            server.wait_ready();
        }
        alice.wait_connected();
        let what = format!("killed after {wait_ms} ms");
        wait_for(&format!("both have the same key, {what}"), PATH_LIMIT, || {
            (alice.status()?["self"]["public_key"] == stored_key(&server, "alice")).then_some(())
        });
        ping::assert_answers(&bob.host, &alice.ipv4());
        alice.wait_path("bob", "direct", PATH_LIMIT);
        bob.wait_path("alice", "direct", PATH_LIMIT);
        eprintln!(
            "{what}: the key is {}",
            if key(&alice) == before { "the old one" } else { "new" }
        );
        // A node that starts anew may renew its key anew.
        alice.kill();
        alice.up_again();
        alice.wait_connected();
    }
}

fn away() {
    let Pair { net, server, alice, mut bob } =
        Pair::settled(Nat::PortRestricted, "direct", PATH_LIMIT);
    bob.kill();
    rotate(&alice);
    let known = std::fs::read_to_string(bob.dir.join("state/netmap.json")).unwrap();
    assert!(!known.contains(&key(&alice)), "bob has not heard of it");
    bob.up_again();
    bob.wait_connected();
    ping::assert_answers(&bob.host, &alice.ipv4());
    wait_for("bob has written the new key down", Duration::from_secs(5), || {
        let known = std::fs::read_to_string(bob.dir.join("state/netmap.json")).unwrap();
        known.contains(&key(&alice)).then_some(())
    });
    // From here on nobody needs the server, nor anything that is not on disk.
    drop(server);
    bob.kill();
    bob.up_again();
    ping::first_answer(&bob.host, &alice.ipv4(), bob.started, PATH_LIMIT);
    let stream = Stream::start(&net, &alice.host, &bob.ipv4());
    stream.wait_for_more(50);
    stream.stop_without_loss();
}
