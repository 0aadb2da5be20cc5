//! Every pair of NAT kinds: the way that packets take, how soon, and that they arrive.

use std::time::Duration;

use crate::case::Case;
use crate::clock::holds_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{self, Node, PORT, Server, find_peer};
use crate::ping;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for a in Nat::ALL {
        for b in Nat::ALL {
            cases.push(Case::new(format!("matrix::{a}_with_{b}"), move || pair(a, b)));
        }
    }
    for kind in [Nat::OpenInput, Nat::Sequential] {
        for other in Nat::ALL.into_iter().chain([kind]) {
            let mut add = |a: Nat, b: Nat| {
                let name = format!("matrix::{a}_with_{b}");
                // A router with an open input is spoiled by a ping that gets there before its own
                // node has sent: both keep to an order that a busy machine can upset.
                let race = kind == Nat::OpenInput;
                let run = move || pair(a, b);
                cases.push(if race { Case::timed(name, run) } else { Case::new(name, run) });
            };
            add(kind, other);
            if other != kind {
                add(other, kind);
            }
        }
    }
    for kind in [Nat::Decrementing, Nat::ByTwo] {
        for (a, b) in
            [(kind, Nat::PortRestricted), (Nat::PortRestricted, kind), (kind, Nat::Sequential)]
        {
            cases.push(Case::new(format!("matrix::{a}_with_{b}"), move || pair(a, b)));
        }
    }
    cases.push(Case::new("matrix::one_private_address_in_both_homes", same_private_address));
    cases.push(Case::new("matrix::two_nodes_in_one_home_talk_inside_it", one_home));
    cases.push(Case::new("matrix::ipv6_makes_a_symmetric_pair_direct", symmetric_pair_with_ipv6));
    cases
}

/// `alice` is there first; `bob` comes, and everything is measured from the start of his `up`.
fn pair(a: Nat, b: Nat) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = net.machine("alice", a);
    let bob = net.machine("bob", b);
    let kind = if a.can_be_punched(b) { "direct" } else { "relay-udp" };
    let counts = |nat| matches!(nat, Nat::Sequential | Nat::Decrementing | Nat::ByTwo);
    let guessed = counts(a) && counts(b);
    let limit = if guessed { GUESSED_PATH_LIMIT } else { PATH_LIMIT };
    let what = format!("{a} with {b}");
    let nodes = check_pair(&what, &net, &server, [&alice, &bob], (kind, limit));
    check_verdicts(&nodes, [a.verdict(b, kind), b.verdict(a, kind)]);
}

/// The verdicts of a pair from both sides.
pub(super) fn check_verdicts([one, other]: &[Node; 2], words: [&str; 2]) {
    check_verdict(one, other, words[0]);
    check_verdict(other, one, words[1]);
}

/// Asks why the pair is as it is; both halves are there, and say which candidate it is.
fn check_verdict(node: &Node, peer: &Node, word: &str) {
    let why = node.wait_verdict(&peer.name, &[word], VERDICT_LIMIT);
    for (half, name) in [("here", &node.name), ("there", &peer.name)] {
        let half = &why[half];
        assert_eq!(half["name"], **name, "{why}");
        let candidates = half["candidates"].as_array().expect("candidates");
        assert!(!candidates.is_empty(), "{why}");
        if half["path"] == "direct" {
            let of_path = candidates.iter().find(|it| it["endpoint"] == half["remote"]);
            assert_eq!(of_path.expect("the path is a candidate")["outcome"], "answered", "{why}");
        }
    }
    assert!(!overlay::text(&why, "/verdict/remedy").is_empty(), "{why}");
}

/// Brings two nodes up and checks times, kind of path and delivery; returns them.
pub(super) fn check_pair(
    what: &str,
    net: &Net,
    server: &Server,
    hosts: [&Host; 2],
    (kind, path_limit): (&str, Duration),
) -> [Node; 2] {
    let mut alice = Node::start(net, hosts[0], server);
    let alice_ipv4 = alice.ipv4();
    let join = server.join();
    let mut bob = Node::new(net, hosts[1]);
    bob.up(&join);

    let first = ping::first_answer(&bob.host, &alice_ipv4, bob.started, FIRST_ANSWER_LIMIT);
    let path_limit = path_limit.saturating_sub(bob.started.elapsed());
    let seen_by_bob = bob.wait_path("alice", kind, path_limit);
    let seen_by_alice = alice.wait_path("bob", kind, path_limit);
    let settled = bob.started.elapsed();
    eprintln!("{what}: first answer after {first:.0?}, {kind} both ways after {settled:.0?}");

    if std::env::var_os("OVERLAY_E2E_TIMES_ONLY").is_some() {
        return [alice, bob];
    }
    let addresses = [(&bob, &seen_by_bob), (&alice, &seen_by_alice)];
    for (node, peer) in addresses {
        for family in ["ipv4", "ipv6"] {
            ping::assert_answers(&node.host, peer[family].as_str().expect("a peer has addresses"));
        }
        assert_eq!(peer["online"], true, "{peer}");
    }
    // A path that is found stays: traffic in both directions, and no flapping. A pair that is left
    // to chance may become direct at any time from its third second (scenario `hard`).
    let stream = ping::Stream::start(net, &bob.host, &alice_ipv4);
    let stays = |seen: String| seen == kind || kind == "relay-udp" && seen == "direct";
    holds_for("the kind of path", Duration::from_millis(500), || {
        stays(bob.path_kind("alice")) && stays(alice.path_kind("bob"))
    });
    stream.wait_for_more(10);
    stream.stop_without_loss();
    [alice, bob]
}

fn same_private_address() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = net.machine("alice", Nat::PortRestricted);
    let neighbour = net.machine("neighbour", Nat::PortRestricted);
    let bob = net.at_home("bob", neighbour.router.as_ref().unwrap(), alice.address);
    let nodes =
        check_pair("one private address", &net, &server, [&alice, &bob], ("direct", PATH_LIMIT));
    check_verdicts(&nodes, ["direct-punched"; 2]);
}

fn one_home() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = net.machine("alice", Nat::Symmetric);
    let address = [192, 168, 1, 99].into();
    let bob = net.at_home("bob", alice.router.as_ref().unwrap(), address);
    let nodes = check_pair("one home", &net, &server, [&alice, &bob], ("direct", PATH_LIMIT));

    let status = nodes[1].status().unwrap();
    let remote = overlay::text(find_peer(&status, "alice"), "/path/remote");
    let inside = format!("{}:", alice.address);
    assert!(remote.starts_with(&inside), "the path stays inside the home: {remote}");
    check_verdicts(&nodes, ["direct-lan"; 2]);
}

fn symmetric_pair_with_ipv6() {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    let ipv6 = net.add_ipv6(&host);
    let addresses = [format!("{}:{PORT}", host.address), format!("[{ipv6}]:{PORT}")];
    let addresses = addresses.each_ref().map(String::as_str);
    let server = Server::start_at(&net, &host, &addresses, &addresses, "");
    let alice = net.machine("alice", Nat::Symmetric);
    let bob = net.machine("bob", Nat::Symmetric);
    net.add_ipv6(&alice);
    net.add_ipv6(&bob);
    let what = "symmetric with symmetric and IPv6";
    let nodes = check_pair(what, &net, &server, [&alice, &bob], ("direct", PATH_LIMIT));
    check_verdicts(&nodes, ["direct-ipv6"; 2]);
}

/// From the start of the second node's `up`, which enrols first.
const FIRST_ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// What is known of a NAT is known soon after the path, and why nothing was found after a round of probes.
const VERDICT_LIMIT: Duration = Duration::from_secs(15);

/// From the start of the second node's `up`, to both nodes knowing the final kind of path.
pub(super) const PATH_LIMIT: Duration = Duration::from_secs(2);

/// The same where both sides guess the other's next port: the first guesses may miss.
const GUESSED_PATH_LIMIT: Duration = Duration::from_secs(3);
