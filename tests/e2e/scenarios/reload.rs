//! SIGHUP: what a daemon takes from a changed file, what it does not, and a file that is wrong.

use std::fs;
use std::net::{TcpListener, TcpStream};

use nix::sys::signal::Signal;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, PORT, START_LIMIT, Server};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("reload::a_node_applies_what_it_can_and_names_the_rest", node),
        Case::new("reload::a_server_applies_what_it_can_and_names_the_rest", server),
    ]
}

fn listens(host: &Host, port: u16) -> bool {
    host.ns.enter(|| TcpStream::connect(("127.0.0.1", port)).is_ok())
}

fn wait_log(log: impl Fn() -> String, words: &str, times: usize) {
    wait_for(&format!("the log says {words:?}"), START_LIMIT, || {
        (log().matches(words).count() >= times).then_some(())
    });
}

fn node() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let home = net.machine("alice", Nat::PortRestricted);
    let mut alice = Node::with_config(&net, &home, "alice", "birthday-probing = true\n");
    let file = alice.dir.join("node.toml");
    alice.up(&server.join());
    let status = alice.wait_connected();
    assert_eq!(status["self"]["punching"]["birthday_probing"], true);
    let port = status["self"]["listen_port"].clone();

    let config = "birthday-probing = false\nport-mapping = false\nmetrics = \"127.0.0.1:9586\"\n\
                  listen-port = 5555\n";
    fs::write(&file, config).unwrap();
    let taken = home.ns.enter(|| TcpListener::bind("127.0.0.1:9586").unwrap());
    alice.daemon().signal(Signal::SIGHUP);
    wait_log(|| alice.log(), "the configuration was read again", 1);
    assert!(alice.log().contains("metrics cannot be moved"), "{}", alice.log());
    drop(taken);
    assert!(!listens(&home, 9586));
    alice.daemon().signal(Signal::SIGHUP);
    wait_log(|| alice.log(), "the configuration was read again", 2);
    let status = alice.status().unwrap();
    assert_eq!(status["self"]["punching"]["birthday_probing"], false);
    assert!(status["self"]["port_mapping"].is_null(), "{status}");
    assert_eq!(status["self"]["listen_port"], port, "this one waits for a restart");
    let log = alice.log();
    assert!(log.contains("in force after a restart only") && log.contains("listen-port"), "{log}");
    assert!(listens(&home, 9586));

    // A wrong file changes nothing, and the place is told.
    fs::write(&file, "birthday-probing = true\nmetricz = 1\n").unwrap();
    alice.daemon().signal(Signal::SIGHUP);
    wait_log(|| alice.log(), "node.toml:2:1", 1);
    assert!(listens(&home, 9586));
    assert_eq!(alice.status().unwrap()["self"]["punching"]["birthday_probing"], false);

    fs::write(&file, "").unwrap();
    alice.daemon().signal(Signal::SIGHUP);
    wait_log(|| alice.log(), "the configuration was read again", 3);
    wait_for("nobody listens for Prometheus", START_LIMIT, || {
        (!listens(&home, 9586)).then_some(())
    });
    let status = alice.wait_connected();
    assert!(!status["self"]["port_mapping"].is_null(), "{status}");
}

fn server() {
    let net = Net::new();
    let hub = net.machine("server", Nat::None);
    let address = format!("{}:{PORT}", hub.address);
    let server = Server::start_at(&net, &hub, &[&address], &[], "public-addr = [\"192.0.2.9\"]\n");
    let file = net.dir().join("server/server.toml");
    let log = || fs::read_to_string(net.log_file("server")).unwrap();
    let hang_up = || server.signal(Signal::SIGHUP);
    // No node can use a line with that address.
    let config = format!(
        "public-addr = [\"{address}\"]\nmetrics = \"127.0.0.1:9587\"\n\
                          network = \"10.99.0.0/20\"\n"
    );
    fs::write(&file, config).unwrap();
    hang_up();
    wait_log(log, "the configuration was read again", 1);
    assert!(log().contains("in force after a restart only"), "{}", log());
    assert!(listens(&hub, 9587));
    Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);

    fs::write(&file, "\n  lisen = []\n").unwrap();
    hang_up();
    wait_log(log, "server.toml:2:3", 1);
    assert!(listens(&hub, 9587));
    Node::start(&net, &net.machine("bob", Nat::PortRestricted), &server);
}
