//! Join lines: good, bad, old, used up, of another server, and two nodes at once.

use std::net::TcpListener;
use std::time::Duration;

use crate::attack::WebServer;
use crate::case::Case;
use crate::clock::{now, wait_for};
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{
    self, EXIT_LIMIT, Node, PORT, START_LIMIT, Server, assert_error, call, path, text,
};
use crate::process;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("enrol::first_start_prints_one_join_line_that_works", first_join_line),
        Case::new("enrol::join_lines_with_mistakes_are_refused", malformed),
        Case::new("enrol::an_expired_invite_is_refused", expired),
        Case::new("enrol::a_one_time_invite_works_once", one_time),
        Case::new("enrol::an_invite_with_two_uses_works_twice", two_uses),
        Case::new("enrol::two_nodes_at_once_share_no_one_time_invite", same_instant),
        Case::new("enrol::invites_are_listed_and_revoked", list_and_revoke),
        Case::new("enrol::another_server_at_this_address_is_noticed", foreign),
        Case::new("enrol::a_server_that_is_not_there_is_an_error", unreachable),
        Case::new("enrol::a_web_server_on_the_port_is_an_error", web_server),
        Case::new("enrol::a_silent_server_on_the_port_is_an_error", silent_server),
        Case::new("enrol::a_restart_keeps_id_and_addresses", restart_keeps_identity),
        Case::new("enrol::the_hello_goes_with_the_first_message", early_hello),
        Case::new("enrol::join_line_as_argument_and_on_stdin", argument_and_stdin),
    ]
}

fn net_with_server() -> (Net, Server) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    (net, server)
}

fn assert_refused(node: &Node, join: &str, words: &[&str]) {
    assert_error(&node.up_to_end(join), &[1], words);
    assert!(node.host.ns.ip("-o link").lines().count() <= 2, "no interface is left behind");
}

fn first_join_line() {
    let (net, _server) = net_with_server();
    let log = std::fs::read_to_string(net.log_file("server")).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.starts_with("ovl1_")).collect();
    assert_eq!(lines.len(), 1, "one join line on stdout of the first start\n{log}");
    let mut alice = Node::new(&net, &net.machine("alice", Nat::PortRestricted));
    alice.up(lines[0]);
    alice.wait_connected();
}

/// From a home, with a token of the reflector that came as soon as the connection did.
fn early_hello() {
    let (net, server) = net_with_server();
    let mut node = Node::new(&net, &net.machine("alice", Nat::PortRestricted));
    node.env.push(("OVERLAY_LOG", "info,overlay::daemon::node=debug".into()));
    node.up(&server.join());
    node.wait_connected();
    for _ in 0..5 {
        if node.log().contains("early=true") {
            return;
        }
        // On a busy machine an answer may come after what it is waited for.
        assert_eq!(node.stop(), Some(0));
        node.up_again();
        node.wait_connected();
    }
    panic!("no hello was in the first message of six connections\n{}", node.log());
}

fn malformed() {
    let (net, server) = net_with_server();
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    let join = server.join();
    let middle = join.len() / 2;
    let other = if &join[middle..=middle] == "a" { "b" } else { "a" };
    let changed = format!("{}{other}{}", &join[..middle], &join[middle + 1..]);
    let words = ["checksum", "incomplete", "truncated", "cut", "damaged", "join line"];
    for wrong in [&join[..join.len() - 4], &join[..20], &changed, "ovl1_", "hello", "ovl9_abcd"] {
        assert_error(&node.up_to_end(wrong), &[1, 2], &words);
    }
    assert_eq!(server.nodes()["nodes"].as_array().map(Vec::len), Some(0), "nobody got in");
}

fn expired() {
    let (net, server) = net_with_server();
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    let join = text(&server.invite(&["--ttl", "1s"]), "/join");
    let made = now();
    wait_for("the end of the invite", Duration::from_secs(5), || {
        (made.elapsed() > Duration::from_millis(1100)).then_some(())
    });
    assert_refused(&node, &join, &["expired"]);
}

fn one_time() {
    let (net, server) = net_with_server();
    let join = server.join();
    let mut alice = Node::new(&net, &net.machine("alice", Nat::None));
    alice.up(&join);
    alice.wait_connected();
    let bob = Node::new(&net, &net.machine("bob", Nat::None));
    assert_refused(&bob, &join, &["used"]);
    assert_eq!(server.nodes()["nodes"].as_array().map(Vec::len), Some(1));
}

fn two_uses() {
    let (net, server) = net_with_server();
    let invite = server.invite(&["--uses", "2"]);
    assert_eq!(invite["uses"], 2);
    let join = text(&invite, "/join");
    let [mut alice, mut bob] = ["alice", "bob"].map(|name| {
        let mut node = Node::new(&net, &net.machine(name, Nat::None));
        node.up(&join);
        node
    });
    alice.wait_connected();
    bob.wait_connected();
    let carol = Node::new(&net, &net.machine("carol", Nat::None));
    assert_refused(&carol, &join, &["used"]);
    ping_by_name(&alice, "bob");
}

fn ping_by_name(node: &Node, peer: &str) {
    wait_for("a ping by name", Duration::from_secs(5), || {
        (node.cli(&["ping", peer, "-c", "1"]).code == Some(0)).then_some(())
    });
}

fn same_instant() {
    let (net, server) = net_with_server();
    let hosts = ["alice", "bob"].map(|name| net.machine(name, Nat::None));
    for round in 0..10 {
        let join = server.join();
        let mut nodes = hosts
            .each_ref()
            .map(|host| Node::with_config(&net, host, &format!("{}-{round}", host.name), ""));
        nodes.iter_mut().for_each(|node| node.up(&join));
        let (code, _) = wait_for("one of the two is refused", START_LIMIT, || {
            nodes.iter_mut().find_map(|node| node.daemon().exit())
        });
        assert_eq!(code.code(), Some(1), "round {round}");
        let mut winners =
            nodes.iter_mut().filter_map(|node| node.daemon().exit().is_none().then_some(node));
        let winner = winners.next().expect("one of the two gets in");
        assert!(winners.next().is_none());
        winner.wait_connected();
        assert_eq!(winner.stop(), Some(0));
    }
    assert_eq!(server.nodes()["nodes"].as_array().map(Vec::len), Some(10), "one a round");
}

fn list_and_revoke() {
    let (net, server) = net_with_server();
    let kept = server.invite(&["--name", "for-bob"]);
    let revoked = server.invite(&[]);
    let [kept_id, revoked_id] = [&kept, &revoked].map(|invite| text(invite, "/id"));
    let list = server.cli(&["invite", "list"]).success("invite list");
    for part in [kept_id.as_str(), revoked_id.as_str(), "for-bob"] {
        assert!(list.contains(part), "{part} is not in the list:\n{list}");
    }
    let secret = text(&kept, "/join");
    assert!(!list.contains(&secret), "a list shows no secrets");

    server.cli(&["invite", "revoke", &revoked_id]).success("invite revoke");
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    assert_refused(&node, &text(&revoked, "/join"), &["revoked", "unknown", "no longer"]);
    assert_error(&server.cli(&["invite", "revoke", "nonsense"]), &[1, 2], &["invite"]);
    let mut bob = Node::new(&net, &net.machine("bob", Nat::None));
    bob.up(&secret);
    bob.wait_connected();
}

fn foreign() {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    let at = format!("{}:{PORT}", host.address);
    let mut first = Server::prepare(&net, &host, "first", &[&at], &[&at], "");
    first.run();
    first.wait_ready();
    let join = first.join();
    first.stop();
    let mut second = Server::prepare(&net, &host, "second", &[&at], &[&at], "");
    second.run();
    second.wait_ready();
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    assert_refused(&node, &join, &["key", "another server", "not the server"]);
}

/// A join line of a server that has gone, and its host.
fn join_of_the_gone(net: &Net) -> (Host, String) {
    let mut server = Server::start(net, &net.machine("server", Nat::None));
    let join = server.join();
    server.stop();
    (server.host.clone(), join)
}

fn unreachable() {
    let net = Net::new();
    let (_, join) = join_of_the_gone(&net);
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    assert_refused(&node, &join, &["refused", "unreachable", "reach", "answer", "timed out"]);
    // A port that says nothing at all is the firewall's way of the same.
    let router = net.machine("bob", Nat::PortRestricted);
    router.router.as_ref().unwrap().ns.nft(
        "table inet shut {\n chain forward { type filter hook forward priority -9; policy drop;\n }\n}\n",
    );
    let node = Node::new(&net, &router);
    assert_refused(&node, &join, &["timed out", "unreachable", "reach", "answer"]);
}

fn web_server() {
    let net = Net::new();
    let (host, join) = join_of_the_gone(&net);
    let _web = WebServer::start(&host, PORT);
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    assert_refused(
        &node,
        &join,
        &["404", "not an overlay server", "another protocol", "web server"],
    );
}

fn silent_server() {
    let net = Net::new();
    let (host, join) = join_of_the_gone(&net);
    let _listener = host.ns.enter(|| TcpListener::bind((host.address, PORT)).unwrap());
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    assert_refused(&node, &join, &["timed out", "no answer", "did not answer", "silent"]);
}

fn restart_keeps_identity() {
    let (net, mut server) = net_with_server();
    let mut alice = Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);
    let identity = |node: &Node| {
        let status = node.status().unwrap();
        ["/self/id", "/self/ipv4", "/self/ipv6", "/self/public_key"].map(|at| text(&status, at))
    };
    let before = identity(&alice);
    assert_eq!(alice.stop(), Some(0));
    alice.up_again();
    alice.wait_connected();
    assert_eq!(identity(&alice), before, "after a restart of the node");

    server.stop();
    server.run();
    server.wait_ready();
    alice.wait_connected();
    assert_eq!(identity(&alice), before, "after a restart of the server");
    let log = std::fs::read_to_string(net.log_file("server")).unwrap();
    let printed = log.lines().filter(|line| line.starts_with("ovl1_")).count();
    assert_eq!(printed, 1, "a server that has a node prints no join line:\n{log}");
}

fn argument_and_stdin() {
    let (net, server) = net_with_server();
    let alice = net.machine("alice", Nat::None);
    let mut node = Node::new(&net, &alice);
    let mut args = node.up_args("");
    args.insert(1, server.join());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    node.up_by(overlay::overlay(&alice, &args));
    node.wait_connected();

    let bob = net.machine("bob", Nat::None);
    let mut node = Node::new(&net, &bob);
    let mut args = node.up_args("");
    args.insert(1, "-".to_owned());
    // The shell puts the line on stdin; `exec` leaves the program with the process id.
    let file = net.dir().join("line");
    std::fs::write(&file, server.join()).unwrap();
    let script = format!("exec \"$0\" \"$@\" <{}", path(&file));
    let mut command = bob.ns.command("sh");
    command.args(["-c", &script, &overlay::binary()]).args(args);
    node.up_by(command);
    node.wait_connected();

    let mut command = overlay::overlay(&bob, &["up", "-"]);
    command.args(Node::with_config(&net, &bob, "carol", "").up_args("").split_off(1));
    let output = process::run(command, EXIT_LIMIT);
    assert_error(&output, &[1, 2], &["join line", "stdin", "empty"]);
    let missing = call(&bob, &["up", "file:/nowhere/line", "--state-dir", "/run/e2e/none"]);
    assert_error(&missing, &[1, 2], &["/nowhere/line"]);
}
