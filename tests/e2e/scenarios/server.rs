//! The server by itself: a start without any flag, its ports, and what it keeps.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, PORT, START_LIMIT, Server, assert_error, find_peer, text};
use crate::ping;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("server::a_start_without_flags_serves_its_public_address", no_flags),
        Case::new("server::a_network_that_only_opens_443_gets_in", only_443),
        Case::new("server::a_taken_port_443_is_no_reason_to_stop", taken_443),
        Case::new("server::only_private_addresses_are_pointed_out", only_private),
        Case::new("server::without_an_address_no_join_line_is_made", no_address),
        Case::new("server::what_was_acknowledged_survives_sigkill", survives_sigkill),
        Case::new("server::keys_and_join_lines_stay_private", secrets),
    ]
}

/// A server with no flag besides the folders of the test.
fn bare(net: &Net) -> Server {
    let host = net.machine("server", Nat::None);
    Server::start_at(net, &host, &[], &[], "")
}

fn no_flags() {
    let net = Net::new();
    let server = bare(&net);
    let [alice, bob] = ["alice", "bob"]
        .map(|name| Node::start(&net, &net.machine(name, Nat::PortRestricted), &server));
    ping::assert_answers(&bob.host, &alice.ipv4());
    let address = text(&alice.status().unwrap(), "/server/address");
    assert!(address.starts_with(&format!("{}:", server.host.address)), "{address}");
    for port in [PORT, 443] {
        let reached = bob.host.ns.enter(|| TcpStream::connect((server.host.address, port)));
        assert!(reached.is_ok(), "port {port}: {reached:?}");
    }
}

fn only_443() {
    let net = Net::new();
    let server = bare(&net);
    let alice = Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);
    let office = net.machine("bob", Nat::PortRestricted);
    office.router.as_ref().unwrap().ns.nft(
        "table inet strict {\n chain forward { type filter hook forward priority -9; policy drop;\n  \
         tcp dport 443 accept\n  tcp sport 443 accept\n }\n}\n",
    );
    let mut bob = Node::start(&net, &office, &server);
    ping::assert_answers(&bob.host, &alice.ipv4());
    ping::assert_answers(&alice.host, &bob.ipv6());
    bob.wait_path("alice", "relay-tcp", START_LIMIT);
}

fn taken_443() {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    let _web = host.ns.enter(|| TcpListener::bind("0.0.0.0:443").unwrap());
    let server = Server::start_at(&net, &host, &[], &[], "");
    Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);
}

fn only_private() {
    let net = Net::new();
    let host = net.machine("server", Nat::PortRestricted);
    let server = Server::start_at(&net, &host, &[], &[], "");
    let log = fs::read_to_string(net.log_file("server")).unwrap();
    assert!(log.contains("--public-addr"), "the flag is named:\n{log}");
    // Whoever makes a line for a service does not see its log.
    let hint = server.cli(&["invite"]).stderr;
    for word in ["only private addresses", "--public-addr HOST", "public-addr = ["] {
        assert!(hint.contains(word), "{word} is not in:\n{hint}");
    }
    assert!(text(&server.invite(&[]), "/warning").contains("only private addresses"));
}

/// A server may be started before the network is.
fn no_address() {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    host.ns.ip("link set eth0 down");
    host.ns.ip("addr flush dev eth0");
    let server = Server::start_at(&net, &host, &[], &[], "");
    let log = || fs::read_to_string(net.log_file("server")).unwrap();
    assert!(!log().contains("ovl1_"), "a line that names no address is of no use:\n{}", log());
    assert!(log().contains("--public-addr"), "the flag is named:\n{}", log());
    let refused = server.cli(&["invite"]);
    assert_error(&refused, &[1], &["no address"]);
    assert!(refused.stderr.contains("--public-addr"), "{}", refused.stderr);

    host.ns.ip(&format!("addr add {}/24 dev eth0", host.address));
    host.ns.ip("link set eth0 up");
    Node::start(&net, &net.machine("alice", Nat::None), &server);
}

fn survives_sigkill() {
    let net = Net::new();
    let mut server = Server::start(&net, &net.machine("server", Nat::None));
    let mut alice = Node::start(&net, &net.machine("alice", Nat::None), &server);
    let again = |server: &mut Server| {
        server.kill();
        server.run();
        server.wait_ready();
    };
    again(&mut server);
    assert_eq!(server.nodes()["nodes"].as_array().map(Vec::len), Some(1), "the member is kept");

    let join = server.join();
    again(&mut server);
    let mut bob = Node::new(&net, &net.machine("bob", Nat::None));
    bob.up(&join);
    bob.wait_connected();

    server.cli(&["rename", "bob", "robert"]).success("rename");
    again(&mut server);
    bob.wait_connected();
    alice.wait_status("robert is known", START_LIMIT, |status| {
        !find_peer(status, "robert").is_null()
    });

    let invite = text(&server.invite(&[]), "/id");
    server.cli(&["invite", "revoke", &invite]).success("revoke");
    server.cli(&["remove", "robert"]).success("remove");
    again(&mut server);
    assert_eq!(server.nodes()["nodes"].as_array().map(Vec::len), Some(1), "gone stays gone");
    let list = server.cli(&["invite", "list", "--json"]).success("invite list");
    assert!(!list.contains(&invite) || list.contains("revoked"), "{list}");
}

fn secrets() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let join = server.join();
    let mut alice = Node::new(&net, &net.machine("alice", Nat::None));
    alice.up(&join);
    alice.wait_connected();
    // The end of a join line is the part that no other line shares.
    let secret = &join[join.len() - 20..];
    assert!(!alice.log().contains(secret), "no join line in a log");
    let own = fs::read_to_string(net.log_file("server")).unwrap();
    assert!(!own.contains(secret), "the server logs no join line");

    for state in [net.dir().join("server/state"), alice.dir.join("state")] {
        wait_for("the state is written", START_LIMIT, || state.is_dir().then_some(()));
        assert_private(&state);
    }
}

/// The folder is closed to everybody else, or each file in it is.
fn assert_private(folder: &Path) {
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077;
    if mode(folder) == 0 {
        return;
    }
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0, "{} is open to others", path.display());
    }
}
