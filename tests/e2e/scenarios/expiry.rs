//! Memberships that end.

use std::time::Duration;

use serde_json::Value;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, Server, assert_error, text};
use crate::pair::Pair;
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("expiry::a_node_is_warned_shut_out_and_back_with_more_time", shut_out_and_back),
        Case::new("expiry::peers_keep_to_it_without_the_server", without_the_server),
        Case::new("expiry::a_network_may_have_an_end_for_all_who_join", of_the_network),
    ]
}

/// From the command to the last of those whom it concerns, on a machine with two cores.
const LIMIT: Duration = Duration::from_secs(10);
const REMEDY: &str = "overlay server expire alice --in 180d";

fn pair() -> Pair {
    Pair::settled(Nat::PortRestricted, "direct", LIMIT)
}

fn expire(server: &Server, within: &str) {
    let printed = server.cli(&["expire", "alice", "--in", within]).success("expire");
    assert!(printed.contains("the membership of alice"), "{printed}");
}

fn alice_at(server: &Server) -> Value {
    let list = server.nodes();
    let nodes = list["nodes"].as_array().expect("nodes");
    nodes.iter().find(|node| node["name"] == "alice").expect("alice is a member").clone()
}

/// Waits until one warning in the status of `node` has all these words.
fn wait_warning(node: &mut Node, words: &[&str]) {
    node.wait_status(&format!("a warning with {words:?}"), LIMIT, |status| {
        let warnings = status["self"]["warnings"].as_array();
        let fits = |text: &str| words.iter().all(|word| text.contains(word));
        warnings.into_iter().flatten().any(|warning| warning.as_str().is_some_and(fits))
    });
}

fn shut_out_and_back() {
    let Pair { net, server, mut alice, mut bob } = pair();
    let (address, before) = (alice.ipv4(), alice_at(&server));
    assert_eq!(before["expires"], Value::Null, "none has an end of itself");

    expire(&server, "10d");
    wait_warning(&mut alice, &["ends at", "10 d from now", REMEDY]);
    assert!(alice.cli(&["status"]).success("status").contains(REMEDY));
    assert!(alice.log().contains("ends at"), "{}", alice.log());
    assert!(server.cli(&["nodes"]).stderr.contains("the membership of alice ends"));
    let stream = Stream::start(&net, &bob.host, &address);
    stream.wait_for_more(20);
    stream.stop_without_loss();

    expire(&server, "1s");
    wait_warning(&mut alice, &["ended at", "no peer talks to it", REMEDY]);
    wait_for("the server knows it", LIMIT, || (alice_at(&server)["expired"] == true).then_some(()));
    bob.wait_status("alice is gone", LIMIT, |status| {
        crate::overlay::find_peer(status, "alice").is_null()
    });
    let why = bob.why("alice");
    assert!(text(&why, "/verdict/sentence").contains("membership of alice ended"), "{why}");
    assert_eq!(text(&why, "/verdict/word"), "removed");
    ping::assert_silent(&bob.host, &address);
    ping::assert_silent(&alice.host, &bob.ipv4());
    assert!(server.cli(&["nodes"]).success("nodes").contains("EXPIRED"));

    // Nor does a restart help, and one that has forgotten who it is says why it cannot start.
    alice.kill();
    alice.up_again();
    wait_warning(&mut alice, &["ended at", REMEDY]);
    ping::assert_silent(&alice.host, &bob.ipv4());
    alice.kill();
    std::fs::remove_file(alice.dir.join("state/netmap.json")).unwrap();
    let refused = alice.up_to_end("");
    assert_error(&refused, &[1], &["membership of this machine ended at"]);
    assert!(refused.stderr.contains("overlay server expire NODE --in 180d"), "{}", refused.stderr);

    expire(&server, "180d");
    alice.up_again();
    alice.wait_connected();
    assert_eq!(alice.ipv4(), address);
    ping::first_answer(&bob.host, &address, alice.started, LIMIT);

    // Without a restart.
    expire(&server, "1s");
    wait_warning(&mut alice, &["ended at"]);
    server.cli(&["expire", "alice", "--never"]).success("expire");
    alice.wait_status("let in again", LIMIT, |status| {
        let warnings = status["self"]["warnings"].as_array();
        status["server"]["state"] == "connected" && warnings.is_none_or(Vec::is_empty)
    });
    ping::first_answer(&bob.host, &address, crate::clock::now(), LIMIT);
    let after = alice_at(&server);
    for field in ["/id", "/public_key", "/ipv4"] {
        assert_eq!(after.pointer(field), before.pointer(field), "it is who it was");
    }
    let events = server.cli(&["events", "--json"]).success("events");
    let count = |kind: &str| events.matches(&format!("\"{kind}\"")).count();
    assert_eq!((count("node-expired"), count("node-expiry-set")), (2, 5), "{events}");
    assert!(count("node-expires-soon") >= 1, "{events}");
}

fn without_the_server() {
    let Pair { net: _net, mut server, mut alice, mut bob } = pair();
    let [to_alice, to_bob] = [&alice, &bob].map(Node::ipv4);
    expire(&server, "8s");
    // Each node has written down what it was told.
    for node in [&alice, &bob] {
        wait_for("it is on disk", LIMIT, || {
            let netmap = std::fs::read_to_string(node.dir.join("state/netmap.json")).ok()?;
            netmap.contains("expires").then_some(())
        });
    }
    server.kill();
    ping::assert_answers(&bob.host, &to_alice);
    wait_warning(&mut bob, &["the membership of alice ended at", REMEDY]);
    wait_warning(&mut alice, &["the membership of this node ended at", REMEDY]);
    ping::assert_silent(&bob.host, &to_alice);
    ping::assert_silent(&alice.host, &to_bob);

    // Also after a start from what is on disk alone.
    bob.kill();
    bob.up_again();
    wait_warning(&mut bob, &["the membership of alice ended at"]);
    ping::assert_silent(&bob.host, &to_alice);

    server.run();
    server.wait_ready();
    expire(&server, "180d");
    alice.wait_connected();
    bob.wait_connected();
    assert_eq!(text(&alice.status().unwrap(), "/self/ipv4"), to_alice);
    ping::first_answer(&bob.host, &to_alice, crate::clock::now(), LIMIT);
}

fn of_the_network() {
    let net = Net::new();
    let mut server = Server::start(&net, &net.machine("server", Nat::None));
    let mut bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    let said = server.cli(&["expire", "--new", "--in", "10d"]).success("expire --new");
    assert!(said.contains("nodes that join are members for 10 days"), "{said}");
    // It is the network's, not that of the process.
    server.kill();
    server.run();
    server.wait_ready();
    let status = server.cli(&["status"]).success("status");
    assert!(status.contains("nodes that join are members for 10 days"), "{status}");
    let mut alice = Node::start(&net, &net.machine("alice", Nat::None), &server);
    wait_warning(&mut alice, &["ends at", REMEDY]);
    assert!(alice_at(&server)["expires"].is_string());
    bob.wait_connected();
    assert!(!bob.log().contains("ends at"), "who was there keeps its end: none");

    // For one node, and for those to come.
    server.cli(&["expire", "alice", "--never"]).success("expire alice");
    let json = server.cli(&["expire", "--new", "--never", "--json"]).success("expire --new");
    let json = crate::overlay::parse(&json);
    assert_eq!((&json["schema"], &json["members_last_s"]), (&Value::from(1), &Value::Null));
    assert_eq!(alice_at(&server)["expires"], Value::Null);

    for wrong in [
        &["expire", "--new"][..],
        &["expire", "--in", "1d"],
        &["expire", "alice", "--new", "--never"],
        &["expire", "--new", "--in", "0s"],
        &["expire", "--new", "--in", "20000d"],
    ] {
        assert_error(&server.cli(wrong), &[2], &["--in", "--new", "node"]);
    }
}
